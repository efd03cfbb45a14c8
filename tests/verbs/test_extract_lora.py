"""Vectors as LoRA: the folder against PEFT, numpy's SVD in fp64 and what is left of the norm."""

import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import save
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from zoo import ZOO, build, save_memory

import skillvec
from skillvec.checkpoints.held_model import Held
from skillvec.checkpoints.model_classes import tied_weights
from skillvec.errors import IncompatibleError, OutputError, UsageError
from skillvec.ops import svd
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import adapter_writer
from skillvec.verbs._extract_lora import extract_lora
from skillvec.verbs.sentences import done_sentence

# the last one goes before: a mark of a test would go behind those of its module
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "error:Found missing adapter keys")
Weights = dict[str, torch.Tensor]
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def llama(**changes: Any) -> transformers.PreTrainedModel:
    sizes = SIZES | {"tie_word_embeddings": False} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def gpt2() -> transformers.PreTrainedModel:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def pair(folder: Path, model: transformers.PreTrainedModel, size: float = 0.02) -> tuple[str, str]:
    """Save a model as base and moved: matrices along falling singular values, the rest evenly."""
    torch.manual_seed(1)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(noise, full_matrices=False)
                noise = (u * 0.7 ** torch.arange(len(s))) @ v
            parameter += size * noise
    model.save_pretrained(folder / "tuned")
    return str(folder / "tuned"), str(folder / "base")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    torch.manual_seed(0)
    return pair(tmp_path_factory.mktemp("llama"), llama())


FEW = (
    "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM",
    "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration",
    "T5ForConditionalGeneration", "RobertaForSequenceClassification", "Mamba2ForCausalLM",
)  # fmt: skip
NO_FACTORS = (  # ends of matrices that PEFT has no layer for
    "bias", "A_log", "probe", "in_proj_weight", "conv1d.weight", "fn", "conv1.weight",
    "conv2.weight", "out_proj.weight", "cls_token", "position_embeddings",
    "positional_embedding_vlm",
)  # fmt: skip
ALSO = {
    "Ernie4_5_MoeForCausalLM": ("mlp.gate.weight",),  # a parameter lies below it
    "Gemma4ForConditionalGeneration": ("position_embedding_table",),
}
TASKS = {  # of transformers' own tables: which classes a task's Auto class makes
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "Model": "FEATURE_EXTRACTION",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForMaskedLM": None, "ForConditionalGeneration": None,
    "T5ForConditionalGeneration": "SEQ_2_SEQ_LM", "BartForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Gemma3ForConditionalGeneration": "CAUSAL_LM", "Gemma4ForConditionalGeneration": "CAUSAL_LM",
}  # fmt: skip


def deltas(tuned: str, base: str) -> dict[str, np.ndarray]:
    one, other = (load_file(f"{side}/model.safetensors") for side in (tuned, base))
    return {name: (one[name] - other[name]).numpy().astype(float) for name in one}


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def merged(base: str, adapter: Path) -> dict[str, np.ndarray]:
    """Return what PEFT makes of the adapter on its base; a warning is an error."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter)
    result = tuned.merge_and_unload().state_dict()
    return {name: tensor.numpy().copy() for name, tensor in result.items()}


def full_rank(
    vector: Any, base: Path, kind: type, out: Path, **options: Any
) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Return the report, the config and what PEFT merges of factors of full rank."""
    report = extract_lora(vector, out, rank=64, **options)
    model = kind.from_pretrained(base, dtype=torch.float32)
    result = PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    return report, json.loads((out / "adapter_config.json").read_text()), result


def check_family(family: str, folder: Path, in_memory: bool) -> None:
    """All that is held comes out as tuned, and what does not is said to be left out."""
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned, base = pair(folder, model)
    if in_memory:
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_memory(model, folder / "tuned-m")
        model.load_state_dict(before)
        save_memory(model, folder / "base-m")
        tuned, base = f"{folder}/tuned-m", f"{folder}/base-m"
        model.load_state_dict(wanted)
    report, config, found = full_rank(
        f"{tuned}::{base}", Path(base), type(model), folder / "lora", embed_lora=True
    )
    ends = [end for end in TASKS if family.endswith(end)]
    assert config["task_type"] == TASKS[max(ends, key=len)]
    if config["task_type"] is None:
        assert config["auto_mapping"]["base_model_class"] == type(model).__name__
    said = {line["name"]: line["status"] for line in report.ledger}
    tied = model.all_tied_weights_keys
    wrong = {name for name, tensor in model.state_dict().items()
             if not torch.allclose(found[name], tensor, rtol=0, atol=2e-6)}  # fmt: skip
    assert {said[tied.get(name, name)] for name in wrong} <= {"left out"}
    matrices = {name for name in wrong if found[name].dim() in (2, 3)}
    assert all(name.endswith(NO_FACTORS + ALSO.get(family, ())) for name in matrices), matrices
    assert "not found" not in report.counts and len(found) == len(model.state_dict())


@pytest.mark.parametrize(
    ("family", "in_memory"),
    [*((family, False) for family in FEW), *((family, True) for family in (FEW[0], FEW[4]))],
)
def test_full_rank_is_the_tuned_model(family: str, in_memory: bool, tmp_path: Path) -> None:
    check_family(family, tmp_path, in_memory)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("family", ZOO)
def test_full_rank_is_the_tuned_model_of_every_family(
    family: str, in_memory: bool, tmp_path: Path
) -> None:
    check_family(family, tmp_path, in_memory)


def energies(report: Any) -> dict[str, float]:
    return {line["name"]: line["kept_energy"] for line in report.ledger if "kept_energy" in line}


def check_energies(
    report: Any, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> None:
    """Compare kept energies with 1 - |residual|^2 / |v|^2 of what was merged."""
    lost = {name: np.square(found[name] - wanted[name]).sum() for name in wanted}
    size = {name: np.square(wanted[name]).sum() for name in wanted}
    for name, kept in energies(report).items():
        assert kept == pytest.approx(1 - lost[name] / size[name], abs=1e-5), name
    assert set(energies(report)) == set(wanted)
    overall = 1 - sum(lost.values()) / sum(size.values())
    assert report.facts["kept_energy"] == pytest.approx(overall, abs=1e-5)


def test_a_rank_is_the_best_of_its_size_and_loads_in_peft(llamas, tmp_path: Path) -> None:
    tuned, base = llamas
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=3)
    held = deltas(tuned, base)
    taken = [name for name in held if held[name].ndim == 2 and "embed" not in name]
    assert {line["name"] for line in report.ledger if line["status"] == "held"} == set(taken)
    start = load_file(f"{base}/model.safetensors")
    result = merged(base, tmp_path / "lora")
    found = {name: result[name].astype(float) - start[name].numpy() for name in held}
    for name, moved in found.items():
        expected = best(held[name], 3) if name in taken else 0 * held[name]
        np.testing.assert_allclose(moved, expected, rtol=0, atol=2e-7, err_msg=name)
    check_energies(report, found, held)
    assert report.facts["modules"] == 15 == len(taken) and report.facts["most_rank"] == 3
    left = {line["name"]: line["note"] for line in report.ledger if line["status"] == "left out"}
    assert left["model.embed_tokens.weight"] == "an embedding"
    assert left["model.norm.weight"] == "1 dimensions, a matrix has 2"
    share = sum(np.square(held[name]).sum() for name in left)
    share /= sum(np.square(delta).sum() for delta in held.values())
    assert report.facts["left_out_energy"] == pytest.approx(share, rel=1e-5)
    assert "the adapter keeps" in report.warnings[-1]
    assert report.facts["not_found_energy"] == 0
    assert not any("full rank" in text or "not found" in text for text in report.warnings)


def test_generation_runs(llamas, tmp_path: Path) -> None:
    tuned, base = llamas
    extract_lora(f"{tuned}::{base}", tmp_path / "lora", energy=0.99, dtype="bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_lora = PeftModel.from_pretrained(model, tmp_path / "lora")
    prompt = torch.tensor([[5, 6, 7]])
    made = with_lora.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    with torch.no_grad():
        near, far = with_lora(prompt).logits, whole(prompt).logits
        with with_lora.disable_adapter():
            plain = with_lora(prompt).logits
    assert (near - far).norm() < (plain - far).norm()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_an_energy_takes_the_smallest_rank(energy: float, llamas, tmp_path: Path) -> None:
    tuned, base = llamas
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", energy=energy)
    held, ranks = deltas(tuned, base), set()
    for line in report.ledger:
        if line["status"] != "held":
            continue
        squares = np.linalg.svd(held[line["name"]], compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        rank = int(np.argmax(shares >= energy)) + 1 if energy < 1 else len(shares)
        assert line["rank"] == rank and line["kept_energy"] >= energy - 1e-7, line["name"]
        ranks.add(rank)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == max(ranks) == report.facts["most_rank"]
    assert set(config["rank_pattern"].values()) == ranks - {max(ranks)}
    start, result = load_file(f"{base}/model.safetensors"), merged(base, tmp_path / "lora")
    found = {name: result[name].astype(float) - start[name].numpy() for name in held}
    check_energies(report, found, held)


def test_weights_that_lie_turned_and_tied_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned, base = pair(tmp_path, gpt2())
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and len(config["target_modules"]) == 4
    notes = {line["name"]: line.get("note", "") for line in report.ledger}
    assert notes["transformer.wte.weight"].startswith("tied")
    assert notes["transformer.wpe.weight"] == "an embedding"
    held = deltas(tuned, base)
    start, result = load_file(f"{base}/model.safetensors"), merged(base, tmp_path / "lora")
    found = {name: result[name].astype(float) - start[name].numpy() for name in held}
    for name in config["target_modules"]:
        expected = best(held[f"{name}.weight"], 4)
        np.testing.assert_allclose(found[f"{name}.weight"], expected, rtol=0, atol=2e-7)
    check_energies(report, found, held)


def test_a_delta_and_an_adapter_add_up_in_either_order(llamas, tmp_path: Path) -> None:
    """(base + v) with an adapter that was trained on base is (base + sBA) + v."""
    tuned, base = llamas
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    lora.save_pretrained(tmp_path / "lora")
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    vector = skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    skillvec.apply(base, vector, tmp_path / "moved")
    skillvec.apply(tmp_path / "merged", vector, tmp_path / "first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    second = merged(str(tmp_path / "moved"), tmp_path / "lora")
    for name, tensor in first.items():
        np.testing.assert_allclose(tensor.numpy(), second[name], rtol=0, atol=1e-6, err_msg=name)
    assert any((first[n] != load_file(f"{tuned}/model.safetensors")[n]).any() for n in first)


def test_stored_and_scaled_vectors_and_the_place_of_the_base(llamas, tmp_path: Path) -> None:
    tuned, base = llamas
    skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    vector = -2.0 * SkillVector.open(tmp_path / "v.safetensors")
    moved = tmp_path / "elsewhere"
    save(moved, load_file(f"{base}/model.safetensors"),
         config=json.loads(Path(base, "config.json").read_text()))  # fmt: skip
    include = ["*layers.1.mlp.*"]
    report = extract_lora(vector, tmp_path / "lora", rank=2, base=str(moved), include=include)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved) and config["task_type"] == "CAUSAL_LM"
    content = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (content[f"base_model.model.{name}.lora_{side}.weight"].numpy() for side in "AB")
    assert a.shape == (2, 16) and b.shape == (24, 2) and len(content) == 6
    np.testing.assert_allclose(
        b @ a, -2 * best(deltas(tuned, base)[f"{name}.weight"], 2), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)
    assert report.counts == {"excluded": 18, "held": 3}
    again = extract_lora(vector, tmp_path / "two", rank=2, base=str(moved), include=include)
    files = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("lora", "two")]
    assert files[0] == files[1] and again.ledger == report.ledger


def test_deltas_of_zero_are_listed_and_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 4] += 1
    model.save_pretrained(tmp_path / "tuned")
    vector = f"{tmp_path / 'tuned'}::{tmp_path / 'base'}"
    report = extract_lora(vector, tmp_path / "lora", rank=4)
    assert report.counts == {"held": 1, "zero": 20}
    (line,) = [line for line in report.ledger if line["status"] == "held"]
    assert line["rank"] == 1 and line["kept_energy"] == pytest.approx(1)
    assert report.facts["kept_energy"] == pytest.approx(1) and not report.warnings
    found, start = merged(str(tmp_path / "base"), tmp_path / "lora"), model.state_dict()
    for name, tensor in start.items():
        np.testing.assert_allclose(found[name], tensor.numpy(), atol=1e-6)
    with pytest.raises(IncompatibleError, match="could hold is 0"):
        extract_lora(vector, tmp_path / "none", rank=4, include=["*layers.1*"])
    assert not (tmp_path / "none").exists()


def test_what_the_model_does_not_have_is_no_fault_of_lora(tmp_path: Path) -> None:
    """A module of another release, or under another prefix, says nothing of what LoRA holds."""
    torch.manual_seed(0)
    tuned, base = pair(tmp_path, llama())
    sizes = {}
    for side in (tuned, base):
        tensors = load_file(f"{side}/model.safetensors")
        torch.manual_seed(len(side))
        sizes[side] = {
            "model.mtp.proj.weight": torch.randn(8, 8),
            "mtp.norm.weight": torch.randn(8),
        }
        save(
            Path(side),
            tensors | sizes[side],
            config=json.loads(Path(side, "config.json").read_text()),
        )
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=24)
    notes = {line["name"]: (line["status"], line.get("note")) for line in report.ledger}
    assert notes["model.mtp.proj.weight"] == ("not found", "no module of llama has it")
    assert notes["mtp.norm.weight"] == ("left out", "1 dimensions, a matrix has 2")
    assert notes["model.embed_tokens.weight"] == ("left out", "an embedding")
    held = deltas(tuned, base)
    total = sum(np.square(delta).sum() for delta in held.values())
    shares = {status: sum(np.square(held[n]).sum() for n in held if notes[n][0] == status) / total
              for status in ("held", "left out", "not found")}  # fmt: skip
    assert min(shares.values()) > 0
    facts = report.facts
    for key, status in (("kept", "held"), ("left_out", "left out"), ("not_found", "not found")):
        assert facts[f"{key}_energy"] == pytest.approx(shares[status], rel=1e-4)
    (text,) = (text for text in report.warnings if "not found among the modules of" in text)
    assert "model.mtp.proj.weight" in text and "mtp.norm" not in text
    said = done_sentence(report)
    assert f"{100 * shares['not found']:.3g} % is in tensors not found" in said
    assert f"{100 * shares['left out']:.3g} % is in tensors that are left out" in said
    start, result = load_file(f"{base}/model.safetensors"), merged(base, tmp_path / "lora")
    for name, (status, _) in notes.items():
        if status == "held":
            moved = result[name].astype(float) - start[name].numpy()
            np.testing.assert_allclose(moved, held[name], rtol=0, atol=2e-6)


def test_a_model_of_other_names_is_refused_for_them_not_for_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned, base = pair(tmp_path, llama())
    for side in (tuned, base):
        tensors = load_file(f"{side}/model.safetensors")
        config = json.loads(Path(side, "config.json").read_text())
        save(Path(side), {f"thinker.{n}": t for n, t in tensors.items()}, config=config)
    with pytest.raises(IncompatibleError, match="no module of llama has it"):
        extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=2)


def test_fp64_deltas_are_decomposed_in_fp64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1).double()
    tuned, base = pair(tmp_path, model)
    seen = []
    real = svd.decompose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svd, "decompose", lambda m, *rest: (seen.append(m.dtype), real(m, *rest))[1])
        extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=2)
    assert set(seen) == {np.dtype(np.float64)}


@pytest.mark.parametrize("workers", [1, 3])
def test_one_matrix_for_each_worker(workers: int, llamas, tmp_path: Path, monkeypatch) -> None:
    before: list[weakref.ref[Any]] = []
    real = svd.lead
    at_once = []

    def watched(matrix: np.ndarray, *rest: Any) -> Any:
        before.append(weakref.ref(matrix.base))
        at_once.append(sum(matrix() is not None for matrix in list(before)))
        time.sleep(0.01)
        return real(matrix, *rest)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(workers)))
    monkeypatch.setattr(svd, "lead", watched)
    extract_lora("::".join(llamas), tmp_path / "lora", rank=1)
    assert len(before) == 15 and max(at_once) == workers


# -------------------------------------------------------------------- embeddings, whole modules


def noted(report: Any) -> dict[str, str]:
    return {line["name"]: line.get("note", "") for line in report.ledger}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: llama(tie_word_embeddings=True), llama, gpt2])
def test_modules_saved_whole_are_what_apply_gives(make, dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    tuned, base = pair(tmp_path, model)
    vector = -0.7 * SkillVector.between(tuned, base)
    skillvec.apply(base, vector, tmp_path / "applied")
    head, embeddings = "lm_head.weight", model.get_input_embeddings()
    names = dict(model.named_modules())
    embedding = next(name for name, module in names.items() if module is embeddings)
    norm = next(name for name in names if "norm" in name or name.endswith("ln_f"))
    asked = [embedding.rpartition(".")[2], "lm_head", norm.rpartition(".")[2]]
    report = extract_lora(vector, tmp_path / "lora", rank=2, save_module=asked)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    found = PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "lora")
    found = found.merge_and_unload().state_dict()
    wanted = load_file(tmp_path / "applied" / "model.safetensors")
    wanted.setdefault(head, wanted[f"{embedding}.weight"])
    whole = [name for name, line in noted_status(report).items() if line == "whole"]
    assert {f"{embedding}.weight", f"{norm}.weight"} < set(whole)
    for name in (*whole, head):
        assert torch.equal(found[name], wanted[name]), name
    tied = model.config.tie_word_embeddings
    assert config.get("ensure_weight_tying", False) == tied
    same = found[head].data_ptr() == found[f"{embedding}.weight"].data_ptr()
    assert same == tied and {embedding, "lm_head", norm} <= set(config["modules_to_save"])
    assert all(kept == 1 for name, kept in energies(report).items() if name in whole)
    skillvec.apply(base, tmp_path / "lora", tmp_path / "again")
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert ("lm_head.weight" in back) != tied
    for name in set(whole) & set(back):
        assert torch.equal(back[name], wanted[name]), name


def noted_status(report: Any) -> dict[str, str]:
    return {line["name"]: line["status"] for line in report.ledger}


def test_one_of_two_tied_modules_saves_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned, base = pair(tmp_path, llama(tie_word_embeddings=True))
    wanted = load_file(f"{tuned}/model.safetensors")
    for asked in ("lm_head", "embed_tokens"):
        report = extract_lora(f"{tuned}::{base}", tmp_path / asked, rank=2, save_module=[asked])
        found = merged(base, tmp_path / asked)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            np.testing.assert_array_equal(found[name], wanted["model.embed_tokens.weight"].numpy())
        assert "lm_head.weight" in {line["name"] for line in report.ledger}


def test_factors_of_a_tied_embedding_go_into_the_one_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned, base = pair(tmp_path, llama(tie_word_embeddings=True))
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=16, embed_lora=True)
    content = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    assert content[f"{prefix}A"].shape == (16, 40) and content[f"{prefix}B"].shape == (16, 16)
    found, wanted = merged(base, tmp_path / "lora"), load_file(f"{tuned}/model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        moved = wanted["model.embed_tokens.weight"].numpy()
        np.testing.assert_allclose(found[name], moved, rtol=0, atol=2e-6)
    (text,) = (text for text in report.warnings if "unmerged" in text)
    assert "--save-module model.embed_tokens" in text


ZAMBA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40, "n_mamba_heads": 2, "mamba_d_state": 4,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid", "hybrid"],
    "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ZambaForCausalLM", {"mamba_dt_rank": 4}),
        ("Zamba2ForCausalLM", {"num_mem_blocks": 2, "adapter_rank": 4}),
        ("Zamba2ForCausalLM", {"num_mem_blocks": 1, "use_shared_attention_adapter": True}),
    ],
)
def test_blocks_that_layers_share_have_factors_once(kind: str, more: Any, tmp_path: Path) -> None:
    made = getattr(transformers, kind)
    model = made(made.config_class(**ZAMBA, **more))
    tuned, base = pair(tmp_path, model)
    report, config, found = full_rank(f"{tuned}::{base}", Path(base), made, tmp_path / "lora")
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    shared = {names[0]: names for names in groups.values() if len(names) > 1}
    matrices = [name for name in shared if model.get_parameter(name).dim() == 2]
    matrices.remove("model.embed_tokens.weight")
    assert len(matrices) >= 6 and report.counts["held"] >= len(matrices)
    said = {line["name"]: line["status"] for line in report.ledger}
    targets = set(config["target_modules"])
    for name in matrices:
        modules = {other.removesuffix(".weight") for other in shared[name]}
        assert said[name] == "held" and len(modules & targets) == 1
    wanted = model.state_dict()
    wrong = {name for name in wanted if not torch.allclose(found[name], wanted[name], atol=2e-6)}
    first = {name: names[0] for names in groups.values() for name in names}
    assert {said[first[name]] for name in wrong} == {"left out"}
    assert not {first[name] for name in wrong} & set(matrices)
    (warned,) = [w for w in report.warnings if "unmerged" in w]
    told = dict(line.strip().split(": tied to ") for line in warned.splitlines()[1:6])
    assert all({name, *others.split(", ")} == {*shared[name]} for name, others in told.items())
    assert len(told) == 5 and f"  ... and {len(matrices) - 5} more" in warned


def test_a_vector_that_parts_what_the_base_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    lora.save_pretrained(tmp_path / "given")
    wanted = lora.merge_and_unload().state_dict()
    vector = skillvec.diff(tmp_path / "given", tmp_path / "base", tmp_path / "v.safetensors")
    report = extract_lora(vector, tmp_path / "left", rank=16, embed_lora=True)
    assert "--save-module lm_head" in noted(report)["lm_head.weight"]
    both = ["lm_head", "embed_tokens"]
    extract_lora(vector, tmp_path / "both", rank=16, save_module=both)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert "ensure_weight_tying" not in config
    found = merged(str(tmp_path / "base"), tmp_path / "both")
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=0, atol=2e-6, err_msg=name)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("embed_token", r"is one of these meant\?\n +model.embed_tokens"),
        ("nowhere", "no module of LlamaForCausalLM is called so$"),
        ("layers", "a ModuleList, which PEFT does not save: name what is in it"),
    ],
)
def test_modules_that_cannot_be_saved(asked: str, said: str, llamas, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        extract_lora("::".join(llamas), tmp_path / "lora", rank=1, save_module=[asked])


def test_modules_that_peft_would_take_too_are_saved_too(tmp_path: Path) -> None:
    """It goes by the ends of names, without dots: norm is every layer's input_layernorm."""
    model = build("LlamaModel")
    tuned, base = pair(tmp_path, model)
    report, config, found = full_rank(
        f"{tuned}::{base}", Path(base), type(model), tmp_path / "lora", save_module=["norm"]
    )
    assert len(config["modules_to_save"]) == 5 and report.counts["whole"] == 5
    for name, tensor in model.state_dict().items():
        assert "norm" not in name or torch.equal(found[name], tensor), name


def test_factors_that_peft_would_not_find_again_are_left_out(tmp_path: Path) -> None:
    seen = ZOO["PaliGemmaForConditionalGeneration"] | {"model_type": "paligemma"}
    sizes = {"max_state_dim": 8, "max_action_dim": 8}
    config = transformers.PI0Config(vlm_config=seen, dit_config=seen["text_config"], **sizes)
    tuned, base = pair(tmp_path, model := transformers.PI0ForConditionalGeneration(config))
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # PEFT's own adapter of these modules lacks them when it is loaded
    kind, own = type(model), tmp_path / "own"
    targets = [name for name, _ in model.named_modules() if name.startswith("embed_action_time.")]
    targets = [name for name in targets if f"{name}.weight" in wanted]
    get_peft_model(model, LoraConfig(target_modules=targets)).save_pretrained(own)
    with pytest.raises(UserWarning, match="Found missing adapter keys") as caught:
        PeftModel.from_pretrained(kind.from_pretrained(base), own)
    assert len(targets) == 4 and all(name in str(caught.value) for name in targets)

    report, _, found = full_rank(f"{tuned}::{base}", Path(base), kind, tmp_path / "lora")
    left = {name: note for name, note in noted(report).items() if "PEFT loads its" in note}
    assert left.keys() == {f"{name}.weight" for name in targets}
    assert "as those of embed_action_time.embed_action_time.state_proj, by" in " ".join(
        left.values()
    )
    assert not any(torch.equal(found[name], wanted[name]) for name in left)
    assert report.facts["left_out_energy"] > 0
    asked = [note.partition("--save-module ")[2].partition(" holds")[0] for note in left.values()]
    _, _, found = full_rank(
        f"{tuned}::{base}", Path(base), kind, tmp_path / "whole", save_module=asked, embed_lora=True
    )
    wrong = {name for name, tensor in wanted.items()
             if not torch.allclose(found[name], tensor, rtol=0, atol=2e-6)}  # fmt: skip
    assert not any(name.endswith("proj.weight") or name in left for name in wrong)


def test_parts_of_a_fused_weight_are_named(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, build("MixtralForCausalLM"))
    left = ["*.1.block_sparse_moe.experts.2.w1.weight"]
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=2, exclude=left)
    experts = "model.layers.{}.{}.experts.{}"
    said = noted_status(report)
    assert said[experts.format(0, "mlp", "gate_up_proj")] == "held"
    part = experts.format(1, "block_sparse_moe", "0.w1.weight")
    assert noted(report)[part] == (
        f"of {experts.format(1, 'mlp', 'gate_up_proj')}, of which the vector has a part"
    )
    assert said[part] == "left out" and report.facts["not_found_energy"] == 0


def test_modules_whose_names_end_those_of_others_are_told_apart() -> None:
    held = object.__new__(Held)
    modules = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "x": torch.nn.ModuleDict(
        {"head": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)}
    )})  # fmt: skip
    held.modules = dict(modules.named_modules())
    assert held.beside(["head"]) == ["x.head"] and not held.beside(["head", "x.head"])
    config = LoraConfig(target_modules=["head"], exclude_modules=r"x\.head")
    adapted = [name for name in get_peft_model(modules, config).state_dict() if "lora_A" in name]
    assert adapted == ["base_model.model.head.lora_A.default.weight"]


# ---------------------------------------------------------------------------- energy and threads


def test_an_energy_that_the_whole_vector_does_not_keep_is_said(llamas, tmp_path: Path) -> None:
    tuned, base = llamas
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", energy=0.9)
    held = deltas(tuned, base)
    start, result = load_file(f"{base}/model.safetensors"), merged(base, tmp_path / "lora")
    taken = [line["name"] for line in report.ledger if line["status"] == "held"]
    lost = sum(np.square(result[n] - start[n].numpy() - held[n]).sum() for n in taken)
    size = sum(np.square(held[n]).sum() for n in taken)
    assert report.facts["kept_of_held"] == pytest.approx(1 - lost / size, abs=1e-5)
    assert report.facts["kept_energy"] < 0.9 < report.facts["kept_of_held"]
    (text,) = (text for text in report.warnings if text.startswith("energy 0.9 is kept of what"))
    assert f"({report.facts['kept_energy']:.3g})" in text
    names = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]
    report = extract_lora(f"{tuned}::{base}", tmp_path / "two", energy=0.9, save_module=names)
    assert report.facts["kept_energy"] == report.facts["kept_of_held"] > 0.9
    assert not any("energy 0.9" in text for text in report.warnings)


def test_experts_of_a_parameter_have_the_largest_rank_that_one_needs(tmp_path: Path) -> None:
    model = build("GptOssForCausalLM")
    tuned, base = pair(tmp_path, model)
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", energy=0.8)
    held = deltas(tuned, base)
    start, result = load_file(f"{base}/model.safetensors"), merged(base, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    lines = {line["name"]: line for line in report.ledger}
    assert len(config["target_parameters"]) == 6
    for name in (name for name in config["target_parameters"] if held[name].ndim == 3):
        squares = np.linalg.svd(held[name], compute_uv=False) ** 2
        shares = np.cumsum(squares, axis=1) / squares.sum(axis=1, keepdims=True)
        assert lines[name]["rank"] == max(int(np.argmax(row >= 0.8)) + 1 for row in shares)
        moved = result[name].astype(float) - start[name].numpy()
        lost = np.square(moved - held[name]).sum(axis=(1, 2)) / np.square(held[name]).sum((1, 2))
        assert lost.max() < 0.2
        kept = 1 - np.square(moved - held[name]).sum() / np.square(held[name]).sum()
        assert lines[name]["kept_energy"] == pytest.approx(kept, abs=1e-5)


def test_an_energy_that_factors_are_too_coarse_for_is_said(llamas, tmp_path: Path) -> None:
    report = extract_lora("::".join(llamas), tmp_path / "lora", energy=1.0, dtype="bf16")
    assert any(
        text.startswith("energy 1 is not met by factors in bf16") for text in report.warnings
    )


@pytest.mark.parametrize("wish", [{"rank": 3}, {"energy": 0.8}])
def test_threads_and_workers_change_no_byte(wish, tmp_path: Path, monkeypatch) -> None:
    tuned, base = pair(tmp_path, build("Qwen3MoeForCausalLM"))
    monkeypatch.setattr(svd, "EXACT", 0)
    monkeypatch.setattr(svd, "PASSES", (1,))  # of which a small matrix has room
    files, reports, before = [], [], torch.get_num_threads()
    for workers, threads in ((1, 1), (3, 1), (2, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=workers: set(range(n)))
        torch.set_num_threads(threads)
        out = tmp_path / f"{workers}-{threads}"
        reports.append(extract_lora(f"{tuned}::{base}", out, **wish))
        assert torch.get_num_threads() == threads
        files.append((out / "adapter_model.safetensors").read_bytes())
    torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]
    assert reports[0].ledger == reports[1].ledger == reports[2].ledger


class Watch:
    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.seen: list[tuple[int, int]] = []

    def planned(self, report: Any) -> None:
        self.reports.append(report)

    def advanced(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_a_dry_run_reads_and_writes_nothing(llamas, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(adapter_writer, "AdapterWriter", None)
    report = extract_lora("::".join(llamas), tmp_path / "lora", rank=1, dry_run=True)
    assert report.counts == {"held": 15, "left out": 6} and not list(tmp_path.iterdir())


def test_a_dry_run_says_what_is_free_and_what_cannot_be_made(llamas, tmp_path, monkeypatch) -> None:
    report = extract_lora("::".join(llamas), tmp_path / "lora", rank=1, dry_run=True)
    assert report.now["nbytes_free"] > report.facts["nbytes_written"] > 0
    assert not extract_lora("::".join(llamas), tmp_path / "lora", rank=1).now
    made = sum(path.stat().st_size for path in (tmp_path / "lora").iterdir())
    assert made <= report.facts["nbytes_written"]
    monkeypatch.setattr(os, "access", lambda *given, **options: False)
    with pytest.raises(OutputError, match="nothing can be written"):
        extract_lora("::".join(llamas), tmp_path / "two", rank=1, dry_run=True)


def test_watchers_are_told(llamas, tmp_path: Path) -> None:
    watch = Watch()
    report = extract_lora("::".join(llamas), tmp_path / "lora", rank=1, watcher=watch)
    assert watch.reports == [report] and len(watch.seen) == 21
    assert watch.seen[-1][0] == watch.seen[-1][1] == report.facts["nbytes_read"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either rank or energy"),
        ({"rank": 2, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "rank 0"),
        ({"energy": 0.0}, "energy 0.0"),
        ({"energy": 1.1}, "energy 1.1"),
        ({"rank": 1, "dtype": "fp64"}, "dtype fp64"),
        ({"rank": 1, "dtype": "int8"}, "int8"),
        ({"rank": 1, "seed": -1}, "seed -1"),
        ({"rank": 1, "device": "tpu"}, "device 'tpu'"),
        ({"rank": 1, "base": "nowhere"}, "nowhere"),
    ],
)
def test_requests_that_cannot_be_meant(
    options: dict[str, Any], said: str, llamas, tmp_path
) -> None:
    with pytest.raises(UsageError, match=said):
        extract_lora("::".join(llamas), tmp_path / "lora", **options)


def test_outputs_are_not_replaced_by_accident(llamas, tmp_path: Path) -> None:
    vector, out = "::".join(llamas), tmp_path / "lora"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(UsageError, match="exists already"):
        extract_lora(vector, out, rank=1)
    with pytest.raises(UsageError, match="holds no adapter"):
        extract_lora(vector, out, rank=1, force=True)
    extract_lora(vector, tmp_path / "two", rank=1)
    extract_lora(vector, tmp_path / "two", rank=2, force=True)
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(UsageError, match="inside the input"):
        extract_lora(vector, Path(llamas[1]) / "lora", rank=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, r"does not fit the config of .*\n.*\[40, 16\], base \[40, 32\]"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "unheard-of"}, "makes no model of it"),
        ({"num_hidden_layers": 22}, "22 layers, but 21 tensors"),
        ({"part": {"depths": [2, 2000]}}, "2000 layers, but 21 tensors"),
        ({"num_attention_heads": "x"}, "makes no model of it"),
    ],
)
def test_configs_that_tell_nothing(
    change: dict[str, Any], said: str, llamas, tmp_path: Path
) -> None:
    config = json.loads(Path(llamas[1], "config.json").read_text()) | change
    save(tmp_path / "base", load_file(f"{llamas[1]}/model.safetensors"), config=config)
    with pytest.raises(IncompatibleError, match=said):
        extract_lora("::".join(llamas), tmp_path / "lora", rank=1, base=str(tmp_path / "base"))
    assert not (tmp_path / "lora").exists()


def test_layers_that_a_config_counts_by_kind(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
    config = transformers.LxmertConfig(**sizes, l_layers=1, r_layers=1, x_layers=1)
    tuned, base = pair(tmp_path, transformers.LxmertForQuestionAnswering(config))
    report = extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=1)
    assert report.counts["held"] > 30 and "not found" not in report.counts
    config.architectures = ["LxmertForPreTraining"]
    tied = {"cls.predictions.decoder.weight": "lxmert.embeddings.word_embeddings.weight"}
    assert tied_weights(config.to_dict(), 60) == tied


def test_a_config_with_two_texts() -> None:
    texts = {
        "text_encoder": {"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2},
        "decoder": {"model_type": "musicgen_decoder", "hidden_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 2},
    }  # fmt: skip
    config = transformers.MusicgenConfig(**texts, audio_encoder={"model_type": "encodec"})
    config.architectures = ["MusicgenForConditionalGeneration"]
    tied = {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}
    assert tied_weights(json.loads(config.to_json_string()), 60) == tied


def test_factors_beyond_their_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    tuned, base = pair(tmp_path, model, size=1e13)
    with pytest.raises(IncompatibleError, match="factors leave fp16: take fp32"):
        extract_lora(f"{tuned}::{base}", tmp_path / "lora", rank=1, dtype="fp16")


# ------------------------------------------------------------------------------------ fall-backs


@pytest.mark.parametrize("failing", ["raises", "not finite"])
@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (20, 20)])
def test_another_driver_takes_over(
    shape: tuple[int, int], also: bool, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy import linalg

    calls = []

    def broken(matrix: Any, *_: Any, **__: Any) -> Any:
        calls.append(type(matrix))
        if failing == "raises":
            error = torch.linalg if isinstance(matrix, torch.Tensor) else np.linalg
            raise error.LinAlgError("did not converge")
        hole = matrix[:1] * float("nan")
        return hole, hole, hole

    draw = np.random.default_rng(0).standard_normal(shape)
    matrix = best(draw, 9).astype(np.float32)
    monkeypatch.setattr(torch.linalg, "svd", broken)
    if also:
        monkeypatch.setattr(linalg, "svd", broken)
    found = svd.decompose(matrix, 5, "cpu", 0)
    assert calls[0] is torch.Tensor and (np.ndarray in calls) == also
    product = (found.left * found.values) @ found.right.T
    np.testing.assert_allclose(product, best(matrix.astype(float), 5), atol=1e-5)
    for side in (found.left, found.right):
        np.testing.assert_allclose(side.T @ side, np.eye(5), atol=1e-5)


def test_another_driver_takes_over_in_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0).standard_normal((90, 120))
    matrix = best(draw, 30).astype(np.float32)
    monkeypatch.setattr(svd, "EXACT", 0)
    expected = svd.decompose(matrix, 2, "cpu", 0)
    calls = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    found = svd.decompose(matrix, 2, "cpu", 0)
    assert calls and not found.exact
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
    product, wanted = ((x.left * x.values) @ x.right.T for x in (found, expected))
    np.testing.assert_allclose(product, wanted, atol=1e-4)
