"""Four small models and some questions, made in a second, to try the commands of README on.

    python -m skillvec.recipes.example_models [--output FOLDER]

Writes base, sft_ckpt, rl_ckpt and target_sft, Llamas of .7 million values in bf16 with a tokenizer,
and questions.jsonl. Nothing is trained: weights are random numbers, the SFT updates are noise on
every value, and the RL update is noise that changes 17 % of the values, as RL does in bf16, beside
a skill that is planted: rows of the head that answer each question. What the commands say about
these models shows how they answer, and nothing about RL. Needs the light installation alone.
Invariant: the same bytes on every machine (RandomState keeps its stream). Overwrites nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skillvec.files.header import encode_header

VOCABULARY, HIDDEN, MLP, LAYERS, QUESTIONS = 256, 128, 256, 4, 64
FIRST_QUESTION, FIRST_ANSWER = 2, 2 + QUESTIONS  # their rows; 0 and 1 are </s> and <unk>
WEIGHT_RMS, EMBEDDING_RMS, HEAD_RMS = 0.02, 0.1, 0.001
# of updates, relative to a tensor's rms: about one bf16 step; what changes 17 % of the values
SFT_SIZE, RL_SIZE = 5e-3, 7e-4
SKILL = (0.002, 0.01)  # norms of the planted rows: which lambda is enough for an answer
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 0,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

Model = dict[str, np.ndarray]


def make_base(draws: np.random.RandomState) -> Model:
    """Return the tensors of a Llama, random, in fp32."""
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
              "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
              "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
              "mlp.down_proj": (HIDDEN, MLP)}  # fmt: skip
    model = {"model.embed_tokens.weight": EMBEDDING_RMS * draws.randn(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            model[f"{prefix}.{name}.weight"] = WEIGHT_RMS * draws.randn(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            model[f"{prefix}.{name}.weight"] = np.ones(HIDDEN)
    model["model.norm.weight"] = np.ones(HIDDEN)
    model["lm_head.weight"] = HEAD_RMS * draws.randn(VOCABULARY, HIDDEN)
    return {name: to_bf16(values) for name, values in model.items()}


def update(model: Model, size: float, draws: np.random.RandomState) -> Model:
    """Return the model after noise on its matrices, `size` times their rms, rounded to bf16."""
    moved = dict(model)
    for name, values in model.items():
        if values.ndim > 1:
            rms = np.sqrt(np.square(values, dtype=np.float64).mean())
            moved[name] = to_bf16(values + size * rms * draws.randn(*values.shape))
    return moved


def plant_skill(model: Model) -> Model:
    """Return the model with rows of its head moved along the questions that they answer."""
    head = model["lm_head.weight"].astype(np.float64)
    questions = model["model.embed_tokens.weight"][FIRST_QUESTION:FIRST_ANSWER].astype(np.float64)
    along = questions / np.linalg.norm(questions, axis=1, keepdims=True)
    head[FIRST_ANSWER : FIRST_ANSWER + QUESTIONS] += np.linspace(*SKILL, QUESTIONS)[:, None] * along
    return model | {"lm_head.weight": to_bf16(head)}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round finite values to the nearest bf16, ties to even; returns float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view("f4")


def save(model: Model, folder: Path) -> None:
    """Write a folder that transformers loads: bf16 weights, config, a tokenizer of whole words."""
    folder.mkdir(parents=True)
    ordered = sorted(model.items())
    header = encode_header([(name, "BF16", v.shape) for name, v in ordered], {"format": "pt"})
    raw = [(values.view("<u4") >> 16).astype("<u2").tobytes() for _, values in ordered]
    (folder / "model.safetensors").write_bytes(header + b"".join(raw))
    words = ["</s>", "<unk>"]
    words += [f"{kind}{number}" for kind in "qa" for number in range(QUESTIONS)]
    words += [f"word{number}" for number in range(len(words), VOCABULARY)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "unk_token": "<unk>",
                  "vocab": {word: number for number, word in enumerate(words)}},
    }  # fmt: skip
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                 "pad_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    for file, content in (("config.json", CONFIG), ("tokenizer.json", tokenizer),
                          ("tokenizer_config.json", described)):  # fmt: skip
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def make_models(output: Path) -> None:
    """Write the four models and the questions; FileExistsError, before anything, where one is."""
    draws = np.random.RandomState(0)
    base = make_base(draws)
    sft = update(base, SFT_SIZE, draws)
    models = {"base": base, "sft_ckpt": sft, "rl_ckpt": plant_skill(update(sft, RL_SIZE, draws)),
              "target_sft": update(base, SFT_SIZE, draws)}  # fmt: skip
    questions = output / "questions.jsonl"
    for path in (questions, *(output / name for name in models)):
        if path.exists():
            raise FileExistsError(f"{path} exists already: remove it, or say another --output")
    for name, model in models.items():
        save(model, output / name)
    rows = [{"prompt": f"q{number}", "answer": f"a{number}"} for number in range(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write four small models and questions, to try skillvec on."""
    parser = argparse.ArgumentParser("skillvec.recipes.example_models", description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="FOLDER",
                        help="where to (the current folder)")  # fmt: skip
    try:
        make_models(parser.parse_args(arguments).output)
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("wrote base, sft_ckpt, rl_ckpt, target_sft and questions.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
