"""Vectors of zeros: every verb that makes or adds one says so, and none other is suspected."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import assert_same_bits, load, perturbed, save, toy
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import skillvec
from skillvec.cli.commands import main
from skillvec.errors import IncompatibleError
from skillvec.report import Report
from skillvec.verbs._extract_lora import extract_lora

SAYS = "no value differs: "


def said(report: Report) -> list[str]:
    return [text for text in report.warnings if SAYS in text]


@pytest.fixture(scope="module")
def zero(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zero") / "zero.safetensors"
    assert said(skillvec.diff(family.base, family.base, path).report) == [
        f"{SAYS}the vector is zero (TUNED equals BASE), and adding it changes nothing"
    ]
    return path


@pytest.mark.parametrize("codec", ["auto", "dense", "sparse", "packed"])
def test_models_of_the_same_values_give_a_vector_of_zeros(codec: str, tmp_path: Path, family):
    same = save(tmp_path / "same", toy(0), shards=2)  # other files, as dense as they come
    report = skillvec.diff(same, family.base, tmp_path / "v.safetensors", codec=codec).report
    assert len(said(report)) == 1 and report.facts["norm"] == report.facts["changed"] == 0
    one = toy(0)
    one["model.norm.weight"][3] += 1
    other = save(tmp_path / "other", one)
    assert not said(skillvec.diff(other, family.base, tmp_path / "o.safetensors").report)


def test_integers_that_differ_are_no_part_of_a_vector(tmp_path: Path):
    for value, name in enumerate(("base", "tuned")):
        save(tmp_path / name, toy() | {"ids": torch.full((3,), value)})
    report = skillvec.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors").report
    assert len(said(report)) == 1 and any("integer" in text for text in report.warnings)


def test_a_sign_of_zero_is_a_difference(tmp_path: Path, family):
    signed = toy(0)
    signed["model.norm.weight"][:] = 0.0
    base = save(tmp_path / "base", signed)
    tuned = save(tmp_path / "tuned", signed | {"model.norm.weight": -signed["model.norm.weight"]})
    vector = skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    assert not said(vector.report)
    report = skillvec.apply(base, vector, tmp_path / "out")
    assert_same_bits(tmp_path / "out", tuned)
    assert not said(report)


@pytest.mark.parametrize("op", ["linear", "ties", "dare_linear"])
def test_a_combination_that_cancels_out(op: str, tmp_path: Path, family, zero: Path):
    vector = skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    options = {"parameters": {"density": 1.0}} if op != "linear" else {}
    made = skillvec.combine(
        vector, vector, weights=[1, -1], op=op, output=tmp_path / "c.safetensors", **options
    )
    assert made.report.facts["norm"] == 0
    assert said(made.report) == [
        f"{SAYS}the vector is zero (its vectors are, or cancel out), and adding it changes nothing"
    ]
    assert said(skillvec.apply(family.target, made, tmp_path / "out"))
    again = skillvec.combine(zero, output=tmp_path / "again.safetensors", codec="dense")
    assert said(again.report)
    assert not said(skillvec.combine(vector, zero, output=tmp_path / "one.safetensors").report)


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_an_apply_that_changes_nothing(dtype: str | None, tmp_path: Path, family, zero: Path):
    base = family.base
    for i, given in enumerate(
        ({"vector": zero}, {"tuned": base, "base": base}, {"vector": 0.0 * skillvec_of(family)})
    ):
        report = skillvec.apply(family.target, output=tmp_path / f"{i}", dtype=dtype, **given)
        (text,) = said(report)
        assert "the vector is zero" in text or "lam is 0" in text
        assert report.facts["gain"] is None
        for name, tensor in load(family.target).items():
            made = load(tmp_path / f"{i}")[name]
            assert torch.equal(made, tensor.to(made.dtype))
    report = skillvec.apply(family.target, skillvec_of(family), tmp_path / "l", lam=0, dtype=dtype)
    assert said(report) == [f"{SAYS}lam is 0; OUT holds the weights of TARGET"]
    assert not said(skillvec.apply(family.target, skillvec_of(family), tmp_path / "y", dtype=dtype))


def skillvec_of(family) -> skillvec.SkillVector:
    return skillvec.diff(family.tuned, family.base)


def test_one_value_far_behind_every_sample_is_no_zero(tmp_path: Path):
    tensors = {"w": torch.zeros(1 << 20)}
    base = save(tmp_path / "base", tensors)
    tensors["w"][-1] = 1.0
    tuned = save(tmp_path / "tuned", tensors)
    vector = skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    assert not said(vector.report) and vector.report.facts["changed"] == 1
    assert not said(skillvec.apply(base, vector, tmp_path / "out"))


def test_rounding_that_swallows_all_is_another_matter(tmp_path: Path):
    base = save(tmp_path / "base", {"w": torch.ones(64).half()})
    tuned = save(tmp_path / "tuned", {"w": torch.ones(64).half() + 0.001})
    large = save(tmp_path / "large", {"w": torch.full((64,), 1000.0).half()})
    vector = skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    report = skillvec.apply(large, vector, tmp_path / "out")
    assert not said(report) and any("rounding" in text for text in report.warnings)


def test_patches_of_nothing(tmp_path: Path, family, zero: Path):
    patch = tmp_path / "p.safetensors"
    report = skillvec.export_patch(zero, patch)
    assert said(report) and not load(patch)
    listed = tmp_path / "listed.safetensors"  # as a trainer sends a step that moved nothing
    save_file({
        "model.norm.weight.indices": torch.zeros(0, dtype=torch.int32),
        "model.norm.weight.values": torch.zeros(0, dtype=torch.bfloat16),
    }, listed)  # fmt: skip
    for number, made in enumerate((patch, listed)):
        vector = skillvec.import_patch(made, family.base, tmp_path / f"{number}.safetensors")
        assert said(vector.report) == [
            f"{SAYS}the vector is zero (its patch changes none), and adding it changes nothing"
        ]
        assert vector.report.facts["norm"] == 0
        skillvec.verify(tmp_path / f"{number}.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_before_training_adds_nothing(tmp_path: Path):
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=24, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")  # PEFT begins with B = 0
    merged = adapted.merge_and_unload().state_dict()
    vector = skillvec.diff(tmp_path / "adapter", tmp_path / "base", tmp_path / "v.safetensors")
    (text,) = said(vector.report)
    assert "its adapter adds nothing: B is zero" in text
    report = skillvec.apply(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert said(report)
    assert_same_bits(tmp_path / "out", {name: tensor.clone() for name, tensor in merged.items()})
    with pytest.raises(IncompatibleError, match="is 0"):
        extract_lora(tmp_path / "v.safetensors", tmp_path / "lora", rank=2)


def test_the_console_says_it_and_a_pair_with_zero_is_not_accused_of_rounding(
    tmp_path: Path, family, zero: Path
):
    from click.testing import CliRunner

    done = CliRunner().invoke(
        main, ["diff", str(family.base), str(family.base), "-o", str(tmp_path / "v.safetensors")]
    )
    assert done.exit_code == 0 and f"warning: {SAYS}the vector is zero" in done.stderr
    done = CliRunner().invoke(
        main,
        ["orthogonality", str(zero), f"{family.tuned}::{family.base}", "--json"],
    )
    report = json.loads(done.stdout)
    assert not any("rounding alone" in text for text in report["warnings"])
    assert "one of the deltas is zero" in report["pairs"][0]["sentence"]
    moved = save(tmp_path / "moved", perturbed(load(family.tuned), 5))
    done = CliRunner().invoke(
        main,
        ["orthogonality", f"{moved}::{family.tuned}", f"{family.tuned}::{family.base}", "--json"],
    )
    assert any("rounding alone" in text for text in json.loads(done.stdout)["warnings"])
