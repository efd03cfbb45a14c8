"""Write a miniature world: texts and questions as JSON lines, and a model that knows nothing yet.

    python -m skillvec.recipes.mini.prepare --output runs/mini/start [--seed 0]

OUT/model is an untrained Llama in fp32 with the world's word-level tokenizer. OUT/base.jsonl is
what the base model is trained on: texts about the general population of both domains and answers
to questions about half of it. For each domain OUT/DOMAIN/{s_N_of_K,t}_{texts,questions}.jsonl,
where s is cut into K parts, base_texts.jsonl, and warm_up.jsonl, some of base's answers again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from skillvec.recipes.mini.world import (
    EOS,
    PAD,
    Domain,
    Subject,
    World,
    WorldConfig,
    build_tokenizer,
    build_world,
)

SIZES = {
    "mini": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "larger": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
}
PARTS = 2
# at the usual 0.02 base learned far slower: with 3 layers, after 12 epochs, it answered .13 about
# people whose questions it had not seen, against .70 at 0.05
INITIALIZER_RANGE = 0.05


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the world and the model's weights")
    parser.add_argument("--size", choices=SIZES, default="mini", help="of the model")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    world = build_world(WorldConfig(seed=options.seed))
    write_data(world, options.output)
    write_model(world, options.output / "model", options.size, options.seed)
    return 0


def write_data(world: World, out: Path) -> None:
    """Write every file of texts and questions."""
    base = []
    for name, domain in world.domains.items():
        at = out / name
        asked = domain.questions(domain.base[: len(domain.base) // 2])
        answered = [{"text": f"{q.prompt} {q.answer}"} for q in asked]
        base += [*_texts(domain.base), *answered]
        # a second step of SFT on the form alone: every fourth subject of those, one question each
        _write(at / "warm_up.jsonl", answered[:: 4 * len(domain.base[0].facts)])
        _write(at / "base_texts.jsonl", _texts(domain.base))
        _write(at / "t_texts.jsonl", _texts(domain.t))
        _write(at / "t_questions.jsonl", _asked(domain, domain.t))
        for parts in range(1, PARTS + 1):
            for number in range(parts):
                # the K parts of iterative refinement share no subject
                part, title = domain.s[number::parts], f"s_{number + 1}_of_{parts}"
                _write(at / f"{title}_texts.jsonl", _texts(part))
                _write(at / f"{title}_questions.jsonl", _asked(domain, part))
    _write(out / "base.jsonl", base)


def write_model(world: World, folder: Path, size: str, seed: int) -> None:
    """Save a model with random weights and its tokenizer; AutoTokenizer loads it as it is."""
    import transformers

    tokenizer = build_tokenizer(world)
    ids = tokenizer.convert_tokens_to_ids([PAD, EOS])
    transformers.set_seed(seed)
    shape = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        intermediate_size=2 * shape["hidden_size"],
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        pad_token_id=ids[0],
        eos_token_id=ids[1],
        bos_token_id=None,
        **shape,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _texts(subjects: Iterable[Subject]) -> list[dict[str, str]]:
    return [{"text": text} for subject in subjects for text in subject.texts]


def _asked(domain: Domain, subjects: Iterable[Subject]) -> list[dict[str, str]]:
    return [asdict(q) | {"group": q.name} for q in domain.questions(subjects)]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
