"""Vectors and models of different layouts through the verbs: nothing skipped, doubled or moved."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from families import assert_same_bits, from_bits, load, perturbed, save, toy
from zoo import build, save_memory

import skillvec as sv
from skillvec.engine import plan_models as plans
from skillvec.engine import runner, threads
from skillvec.engine.plan_models import plan_apply
from skillvec.errors import NonfiniteError, OutputError

Weights = dict[str, torch.Tensor]
MLP = "model.layers.0.mlp"


def experts(count: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Weights:
    """Return a mixture of experts, one by one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{MLP}.experts.{i}.{kind}_proj.weight": shape
        for i in range(count)
        for kind, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))
    } | {f"{MLP}.gate.weight": (count, 8)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def fused(parts: Weights) -> Weights:
    """Return the same experts as transformers holds them."""

    def all_of(kind: str) -> list[torch.Tensor]:
        return [t for name, t in parts.items() if name.endswith(f".{kind}_proj.weight")]

    joined = [torch.cat(pair) for pair in zip(all_of("gate"), all_of("up"), strict=True)]
    return {
        f"{MLP}.experts.gate_up_proj": torch.stack(joined),
        f"{MLP}.experts.down_proj": torch.stack(all_of("down")),
        f"{MLP}.gate.weight": parts[f"{MLP}.gate.weight"],
    }


CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.parametrize("codec", ["packed", "sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused_vector", [True, False])
def test_a_vector_in_one_layout_gives_what_it_gives_in_the_other(
    fused_vector: bool, dtype: torch.dtype, codec: str, tmp_path: Path
):
    base = experts(dtype=dtype)
    models = {"base": base, "tuned": perturbed(base, 1, 0.3), "target": perturbed(base, 2, 0.1)}
    folders = {
        (name, side): save(tmp_path / f"{name}-{side}",
                           fused(parts) if (side == "mine") == fused_vector else parts,
                           config=CONFIG)
        for name, parts in models.items()
        for side in ("mine", "theirs")
    }  # fmt: skip
    vectors = {
        side: sv.diff(folders["tuned", side], folders["base", side],
                      tmp_path / f"{side}.safetensors", codec=codec)
        for side in ("mine", "theirs")
    }  # fmt: skip
    if dtype == torch.bfloat16:
        assert vectors["mine"].manifest["exactness"]["exceptions"] > 0
    for lam in (1.0, 0.7):
        crossed = tmp_path / f"crossed-{lam}"
        report = sv.apply(folders["target", "theirs"], vectors["mine"], crossed, lam=lam)
        assert set(report.counts) <= {"applied", "unchanged"}
        straight = tmp_path / f"straight-{lam}"
        sv.apply(folders["target", "theirs"], vectors["theirs"], straight, lam=lam)
        assert_same_bits(crossed, straight)
        assert sv.verify(crossed).facts["verified"]
    pair = {"tuned": folders["tuned", "mine"], "base": folders["base", "mine"]}
    sv.apply(folders["target", "theirs"], output=tmp_path / "pass", **pair)
    assert_same_bits(tmp_path / "pass", tmp_path / "crossed-1.0")
    report = sv.inspect(vectors["mine"].stored.path, target=folders["base", "theirs"])
    assert report.facts["verdict"] == "exact base"


def test_blocks_of_a_stored_delta_do_not_share_a_buffer(tmp_path: Path):
    """Two fp32 experts of more than a block each: what was decoded for one is not the other's."""
    torch.manual_seed(0)
    wide = (3, 2 * 450, 900)
    base = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(wide),
            "model.layers.0.mlp.experts.down_proj": torch.randn(3, 900, 450)}  # fmt: skip
    tuned = {name: tensor + torch.randn(tensor.shape) for name, tensor in base.items()}
    config = CONFIG
    sv.diff(save(tmp_path / "tuned", tuned, config=config),
            save(tmp_path / "base", base, config=config), tmp_path / "v.safetensors")  # fmt: skip
    target = {
        f"model.layers.0.mlp.experts.{i}.{kind}_proj.weight": torch.zeros(shape)
        for i in range(3)
        for kind, shape in (("gate", (450, 900)), ("up", (450, 900)), ("down", (900, 450)))
    }
    sv.apply(save(tmp_path / "target", target, config=config), tmp_path / "v.safetensors",
             tmp_path / "out", workers=2)  # fmt: skip
    out = load(tmp_path / "out")
    delta = {name: tuned[name] - base[name] for name in base}
    gate_up, down = (delta[f"model.layers.0.mlp.experts.{n}_proj"] for n in ("gate_up", "down"))
    for i in range(3):
        name = f"model.layers.0.mlp.experts.{i}"
        assert torch.equal(out[f"{name}.gate_proj.weight"], gate_up[i, :450])
        assert torch.equal(out[f"{name}.up_proj.weight"], gate_up[i, 450:])
        assert torch.equal(out[f"{name}.down_proj.weight"], down[i])


def test_rename_rules_of_an_apply_are_kept_for_its_proof(tmp_path: Path):
    base = toy()
    vector = sv.diff(save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base),
                     tmp_path / "v.safetensors")  # fmt: skip
    other = {name.replace(".self_attn.", ".attention."): t for name, t in base.items()}
    target = save(tmp_path / "target", other)
    with pytest.raises(sv.IncompatibleError, match="--rename"):
        sv.apply(target, vector, tmp_path / "no")
    rule = [r"\.self_attn\.=.attention."]
    report = sv.apply(target, vector, tmp_path / "out", rename=rule)
    assert report.facts["verdict"] == "exact base"
    assert "model.layers.0" in " ".join(report.facts["layout"].values())
    found = {n.replace(".attention.", ".self_attn."): t for n, t in load(tmp_path / "out").items()}
    assert_same_bits(found, load(tmp_path / "rl"))
    assert sv.verify(tmp_path / "out").facts["verified"]
    said = json.loads(sv.open_checkpoint(tmp_path / "out").metadata["skillvec"])
    assert said["request"]["rename"] == rule


def test_what_a_rule_moves_away_is_missed(tmp_path: Path):
    """A rule that takes a tensor from where it fits must not leave it unused in silence."""
    base = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
    folders = save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base)
    with pytest.raises(sv.IncompatibleError, match=r"\ba\b"):
        sv.diff(*folders, rename=["^a$=elsewhere"])


def test_an_expert_too_many_is_refused_and_none_is_dropped(tmp_path: Path):
    parts, fewer = experts(4), fused(experts(3))
    for sides in ((parts, fewer), (fewer, parts)):
        tuned, base = (save(tmp_path / f"{id(s)}", s, config=CONFIG) for s in sides)
        with pytest.raises(sv.IncompatibleError):
            sv.diff(tuned, base)
        sv.diff(tuned, tuned, tmp_path / f"{id(tuned)}.safetensors")
        with pytest.raises(sv.IncompatibleError):
            sv.apply(base, tmp_path / f"{id(tuned)}.safetensors", tmp_path / "out")


def test_plans_name_every_file_that_a_viewed_delta_is_read_from(tmp_path: Path):
    parts = experts()
    tuned, base = (
        save(tmp_path / name, tensors, shards=2, config=CONFIG)
        for name, tensors in (("tuned", perturbed(parts)), ("base", parts))
    )
    target = sv.open_checkpoint(save(tmp_path / "target", fused(parts), config=CONFIG))
    plan = plan_apply(target, sv.SkillVector.between(tuned, base))
    files = {os.fspath(file) for folder in (tuned, base, target.path)
             for file in folder.glob("*.safetensors")}  # fmt: skip
    assert {file for file in plan.files() if file.endswith(".safetensors")} == files
    assert {file for job in plan.jobs for file in job.files()} == files


def test_a_target_of_another_format_is_written_in_shards_with_an_index(tmp_path, monkeypatch):
    tensors = toy(dtype="F32")
    (tmp_path / "target").mkdir()
    torch.save(tensors, tmp_path / "target" / "pytorch_model.bin")
    (tmp_path / "target" / "config.json").write_text('{"model_type": "toy"}')
    base = save(tmp_path / "base", tensors)
    vector = sv.diff(save(tmp_path / "rl", perturbed(tensors)), base)
    monkeypatch.setattr(plans, "SHARD_NBYTES", 10_000)
    sv.apply(tmp_path / "target", vector, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    sv.apply(base, vector, tmp_path / "plain")
    assert_same_bits(tmp_path / "out", tmp_path / "plain")
    assert sv.open_checkpoint(tmp_path / "out").nbytes == index["metadata"]["total_size"]
    assert sv.verify(tmp_path / "out").facts["verified"]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_the_config_of_a_quantised_text_model_is_cleaned_and_nothing_else(tmp_path: Path):
    codes = torch.arange(1024).remainder(120).to(torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"a.weight": codes.reshape(32, 32), "a.weight_scale_inv": torch.ones(2, 2)}
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    config = {"model_type": "toy", "text_config": {"hidden": 32, "quantization_config": said}}
    target = save(tmp_path / "target", tensors, config=config)
    base = {"a.weight": torch.zeros(32, 32, dtype=torch.bfloat16)}
    vector = sv.diff(save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base))
    sv.apply(target, vector, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "toy", "text_config": {"hidden": 32}}
    assert load(tmp_path / "out")["a.weight"].dtype == torch.bfloat16


def test_a_stored_adapter_is_proved_by_that_very_adapter(tmp_path: Path):
    base = save(tmp_path / "base", toy(dtype="F32"))
    folder = tmp_path / "adapter"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    name = "base_model.model.model.layers.0.self_attn.q_proj"

    def write(value: float) -> None:
        pair = {f"{name}.lora_A.weight": torch.eye(2, 24),
                f"{name}.lora_B.weight": torch.full((24, 2), value)}  # fmt: skip
        save(folder / "adapter_model.safetensors", pair)
        (folder / "adapter_config.json").write_text(json.dumps(config))

    write(1.0)
    sv.diff(folder, base, tmp_path / "v.safetensors")
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    (folder / "adapter_model.safetensors").unlink()
    write(2.0)
    with pytest.raises(sv.VerificationError, match="not the adapter"):
        sv.verify(tmp_path / "v.safetensors")


def test_a_model_with_an_adapter_config_beside_it_is_a_model(tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    (folder / "adapter_config.json").write_text("{}")
    assert set(sv.open_checkpoint(folder)) == set(toy())


def test_values_that_no_difference_restores_come_through_a_new_name(tmp_path: Path):
    patterns = np.array([[0x0000, 0x3F80, 0x7F80, 0x8000]], np.uint16)
    base = {"model.w": from_bits(patterns, "BF16"), "model.x": from_bits(patterns, "BF16")}
    tuned = {"decoder.w": from_bits(patterns[:, ::-1].copy(), "BF16"),
             "decoder.x": from_bits(patterns, "BF16")}  # fmt: skip
    folders = save(tmp_path / "rl", tuned), save(tmp_path / "base", base)
    rule = [r"^decoder\.=model."]
    with pytest.raises(NonfiniteError, match=r"model\.w: 2 of 4 values"):  # infinity against 1
        sv.diff(*folders, tmp_path / "v.safetensors", rename=rule)
    vector = sv.diff(*folders, tmp_path / "v.safetensors", rename=rule, allow_nonfinite=True)
    assert vector.manifest["exactness"]["replacements"] > 0
    sv.apply(folders[1], vector, tmp_path / "out", allow_nonfinite=True)
    renamed = {name.replace("decoder.", "model."): t for name, t in tuned.items()}
    assert_same_bits(load(tmp_path / "out"), renamed)


def test_an_altered_vector_is_refused_in_another_layout_too(tmp_path: Path):
    parts = experts()
    vector = sv.diff(save(tmp_path / "tuned", perturbed(parts), config=CONFIG),
                     save(tmp_path / "base", parts, config=CONFIG),
                     tmp_path / "v.safetensors", codec="dense")  # fmt: skip
    target = save(tmp_path / "target", fused(parts), config=CONFIG)
    spec = vector.deltas[f"{MLP}.experts.1.up_proj.weight"].spec
    content = bytearray((tmp_path / "v.safetensors").read_bytes())
    content[spec.start + 1] ^= 0x10
    (tmp_path / "altered.safetensors").write_bytes(content)
    with pytest.raises(sv.FormatError, match=r"experts.1.up_proj.weight differs from its digest"):
        sv.apply(target, tmp_path / "altered.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    both = sv.combine(tmp_path / "altered.safetensors", tmp_path / "v.safetensors")
    with pytest.raises(sv.FormatError, match=r"experts.1.up_proj.weight differs from its digest"):
        sv.apply(target, both, tmp_path / "out")
    sv.apply(target, sv.combine(vector, vector), tmp_path / "out")


def test_an_altered_vector_that_an_interrupted_run_has_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Views are proved at the end of a run: the run that goes on proves those of the other too."""
    parts, altered = experts(), tmp_path / "altered.safetensors"
    sides = perturbed(parts), parts
    places = [save(tmp_path / str(i), side, config=CONFIG) for i, side in enumerate(sides)]
    vector = sv.diff(*places, altered, codec="dense")
    target = save(tmp_path / "target", fused(parts), config=CONFIG)
    spec = vector.deltas[f"{MLP}.experts.1.down_proj.weight"].spec
    with open(altered, "r+b") as file:
        file.seek(spec.start + 1)
        file.write(b"!")

    def stopping(plan, number, *rest) -> None:
        if plan.jobs[number].name == f"{MLP}.gate.weight":
            raise OutputError("full")

    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    with pytest.raises(OutputError, match="what is done is kept"), threads.on_block(stopping):
        sv.apply(target, altered, tmp_path / "out", engine="serial")
    with pytest.raises(sv.FormatError, match=r"experts.1.down_proj.weight differs from its digest"):
        sv.apply(target, altered, tmp_path / "out", engine="serial")
    assert not (tmp_path / "out").exists()


def test_a_block_that_no_view_reads_is_checked_too(tmp_path: Path):
    """Rows that the target does not have lie in a second block, which is the altered one."""
    rows = (1 << 20) // 512 + 8
    base = {"embed.weight": torch.zeros(rows, 512, dtype=torch.bfloat16)}
    tuned = {"embed.weight": torch.ones(rows, 512, dtype=torch.bfloat16)}
    vector = sv.diff(save(tmp_path / "tuned", tuned), save(tmp_path / "base", base),
                     tmp_path / "v.safetensors", codec="dense")  # fmt: skip
    target = save(tmp_path / "target", {"embed.weight": base["embed.weight"][:16]})
    sv.apply(target, vector, tmp_path / "out", rows="common")
    assert load(tmp_path / "out")["embed.weight"].eq(1).all()
    spec = vector.deltas["embed.weight"].spec
    content = bytearray((tmp_path / "v.safetensors").read_bytes())
    content[spec.start + 2 * rows * 512 - 1] ^= 0x10
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(sv.FormatError, match="differs from its digest"):
        sv.apply(target, tmp_path / "v.safetensors", tmp_path / "no", rows="common")


@pytest.mark.parametrize("op", ["ties", "orthogonal"])
def test_tensors_that_go_nowhere_are_measured_as_in_a_stored_combination(op: str, tmp_path: Path):
    base = toy(dtype="F32")
    folder = save(tmp_path / "base", base)
    other = perturbed(base, 2, size=1e-2)
    other["model.embed_tokens.weight"] *= 3
    parts = [sv.diff(save(tmp_path / f"{i}", tensors), folder, tmp_path / f"{i}.safetensors")
             for i, tensors in enumerate([perturbed(base), other])]  # fmt: skip
    given = {"op": op, "parameters": {"scope": "vector"} if op == "orthogonal" else {}}
    stored = sv.combine(*parts, output=tmp_path / "c.safetensors", **given)
    longer = base | {name: torch.cat([t, t[:2]]) for name, t in base.items()
                     if "embed_tokens" in name or "lm_head" in name}  # fmt: skip
    target = save(tmp_path / "target", longer)
    for vector, out in ((stored, "stored"), (sv.combine(*parts, **given), "computed")):
        sv.apply(target, vector, tmp_path / out, rows="skip")
    assert_same_bits(tmp_path / "stored", tmp_path / "computed")


def test_what_must_be_measured_in_its_own_layout_is_refused_in_another(tmp_path: Path):
    parts = experts()
    base = save(tmp_path / "base", parts, config=CONFIG)
    pair = [sv.diff(save(tmp_path / f"{i}", perturbed(parts, i), config=CONFIG), base)
            for i in (1, 2)]  # fmt: skip
    target = save(tmp_path / "target", fused(parts), config=CONFIG)
    with pytest.raises(sv.IncompatibleError, match="store the combination first"):
        sv.apply(target, sv.combine(*pair, op="ties"), tmp_path / "no")
    stored = sv.combine(*pair, op="ties", output=tmp_path / "c.safetensors")
    sv.apply(target, stored, tmp_path / "out")
    assert sv.verify(tmp_path / "out").facts["verified"]


def test_a_rule_that_swaps_fitting_tensors_is_followed(tmp_path: Path):
    base = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
    tuned = {name: tensor + 1 + len(name) * i for i, (name, tensor) in enumerate(base.items())}
    swap = ["^a$=c", "^b$=a", "^c$=b"]
    folders = save(tmp_path / "rl", tuned), save(tmp_path / "base", base)
    vector = sv.diff(*folders, tmp_path / "v.safetensors")
    sv.apply(folders[1], vector, tmp_path / "out", rename=swap)
    out = load(tmp_path / "out")
    assert torch.allclose(out["a"], base["a"] + 2, atol=1e-6)
    assert torch.allclose(out["b"], base["b"] + 1, atol=1e-6)
    # a difference that is not stored keeps its rules in the header, for verify
    sv.apply(folders[1], sv.diff(*folders, rename=swap), tmp_path / "straight")
    assert torch.allclose(load(tmp_path / "straight")["a"], tuned["b"], atol=1e-6)
    assert sv.verify(tmp_path / "straight").facts["verified"]
    with pytest.raises(sv.IncompatibleError, match="goes nowhere under its new name"):
        sv.apply(folders[1], vector, tmp_path / "no", rename=["^a$=elsewhere"])


@pytest.mark.parametrize("related", [True, False])
def test_the_verdict_on_other_names_is_that_on_the_same(related: bool, tmp_path: Path):
    base = toy()
    vector = sv.diff(save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base),
                     tmp_path / "v.safetensors")  # fmt: skip
    other = perturbed(base, 4) if related else {n: torch.randn_like(t) for n, t in base.items()}
    moved = {f"vlm.{name}": tensor for name, tensor in other.items()}
    # the config says the contrary: it is the weights that tell
    config = {"model_type": "another"} if related else {"model_type": "toy"}
    target = save(tmp_path / "target", moved, config=config)
    verdict = sv.inspect(vector.stored.path, target=target).facts["verdict"]
    assert verdict == ("same family" if related else "same shapes, unknown lineage")


def an_adapter(folder: Path, whole: torch.Tensor | None = None, ref: str | None = None) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"],
              "base_model_name_or_path": ref}  # fmt: skip
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.eye(2, 24),
               f"{name}.lora_B.weight": torch.full((24, 2), 0.5)}  # fmt: skip
    if whole is not None:
        config["modules_to_save"] = ["norm"]
        tensors["base_model.model.model.norm.weight"] = whole
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_with_a_base_that_was_given_is_proved_with_that_base(tmp_path: Path):
    tensors = toy(dtype="F32")
    base = save(tmp_path / "base", tensors)
    whole = tensors["model.norm.weight"] + 1
    adapter = an_adapter(tmp_path / "adapter", whole, ref=str(tmp_path / "gone"))
    with pytest.raises(sv.UsageError, match="base of the adapter"):
        sv.apply(base, adapter, tmp_path / "no")
    sv.apply(base, tuned=adapter, base=base, output=tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["model.norm.weight"], whole)
    assert sv.verify(tmp_path / "out").facts["verified"]
    skill = sv.diff(save(tmp_path / "rl", perturbed(tensors)), base, tmp_path / "v.safetensors")
    sv.combine(f"{adapter}::{base}", skill, output=tmp_path / "c.safetensors")
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]


def test_rules_are_for_the_names_of_an_adapter_and_for_those_of_its_base(tmp_path: Path):
    target = save(tmp_path / "target", toy(dtype="F32"))
    adapter = an_adapter(tmp_path / "adapter")
    rules = [r"\.0\.=.x.", r"\.1\.=.0.", r"\.x\.=.1."]
    sv.apply(target, adapter, tmp_path / "out", rename=rules[:1] + rules[2:])
    sv.apply(target, f"{adapter}::{target}", tmp_path / "two", rename=rules)
    assert_same_bits(tmp_path / "out", tmp_path / "two")
    before, after = load(target), load(tmp_path / "out")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]
    assert sv.verify(tmp_path / "out").facts["verified"]
    assert sv.verify(tmp_path / "two").facts["verified"]
    with pytest.raises(sv.UsageError, match="matches none"):
        sv.apply(target, adapter, tmp_path / "out", rename=["visual=x"], force=True)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_on_a_target_without_a_head(whole: bool, tmp_path: Path):
    """A head that it leaves alone is like all that it leaves alone; else it is missed by name."""
    full = toy(dtype="F32") | {"model.embed_tokens.weight": torch.randn(6, 4),
                               "lm_head.weight": torch.randn(6, 4)}  # fmt: skip
    base = save(tmp_path / "base", full)
    target = save(tmp_path / "target", {n: t for n, t in full.items() if n != "lm_head.weight"},
                  config={"model_type": "toy", "tie_word_embeddings": True})  # fmt: skip
    adapter = an_adapter(tmp_path / "adapter")
    if whole:
        name = "base_model.model.lm_head.weight"
        file = adapter / "adapter_model.safetensors"
        held = load(file) | {name: full["lm_head.weight"] + 1}
        save(file, held)
        with pytest.raises(sv.IncompatibleError, match=r"lm_head.weight \[6, 4\]: only in the v"):
            sv.apply(target, f"{adapter}::{base}", tmp_path / "out")
        return
    report = sv.apply(target, f"{adapter}::{base}", tmp_path / "out")
    assert report.counts["tied"] == 1 and report.counts["applied"] == 1
    found = sv.orthogonality(f"{adapter}::{base}", sv.diff(target, target))
    assert found.counts["tied"] == 1


@pytest.mark.parametrize(("key", "value"), [("rename", 5), ("rename", [5]), ("rows", 5)])
def test_rules_in_a_header_are_checked(key: str, value: object, tmp_path: Path):
    base = toy()
    folders = save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base)
    sv.apply(folders[1], tuned=folders[0], base=folders[1], output=tmp_path / "out")
    said = json.loads(sv.open_checkpoint(tmp_path / "out").metadata["skillvec"])
    for place in ("request", "vector"):
        bad = said | {place: said[place] | {key: value}}
        save(tmp_path / place, base, metadata={"format": "pt", "skillvec": json.dumps(bad)})
        with pytest.raises(sv.UsageError, match="nothing to verify it against"):
            sv.verify(tmp_path / place)


@pytest.mark.parametrize("silent", ["target", "base", "tuned"])
def test_one_config_is_enough_to_know_the_layout(silent: str, tmp_path: Path):
    parts = experts()
    folders = {
        name: save(tmp_path / name, tensors,
                   config={"model_type": "toy"} if name == silent else CONFIG)
        for name, tensors in (("tuned", perturbed(parts)), ("base", parts),
                              ("target", fused(parts)))
    }  # fmt: skip
    if silent == "target":
        sv.apply(folders["target"], sv.diff(folders["tuned"], folders["base"]), tmp_path / "out")
        assert_same_bits(tmp_path / "out", fused(perturbed(parts)))
    else:
        pair = (folders["target"], folders["base"]), (folders["tuned"], folders["target"])
        vector = sv.diff(*pair[silent == "tuned"])
        assert set(vector.deltas) == set(vector.base)


def test_one_pickled_file_gives_one_file_however_large(tmp_path: Path, monkeypatch):
    tensors = toy(dtype="F32")
    torch.save(tensors, tmp_path / "model.pt")
    base = save(tmp_path / "base", tensors)
    vector = sv.diff(save(tmp_path / "rl", perturbed(tensors)), base)
    monkeypatch.setattr(plans, "SHARD_NBYTES", 10_000)
    sv.apply(tmp_path / "model.pt", vector, tmp_path / "out.safetensors")
    sv.apply(base, vector, tmp_path / "plain")
    assert_same_bits(tmp_path / "out.safetensors", tmp_path / "plain")
    assert sv.verify(tmp_path / "out.safetensors").facts["verified"]


# --------------------------------------------------------------------- vectors of two layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tuned models on a base, saved with experts apart, and under the names in memory."""
    folder = tmp_path_factory.mktemp("layouts")
    model = build("Qwen3MoeForCausalLM").bfloat16()
    for name in ("base", "one", "two"):
        with torch.no_grad():
            for parameter in model.parameters() if name != "base" else ():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        save_memory(model, folder / f"{name}-memory")
    sv.diff(folder / "one", folder / "base", folder / "one.safetensors")
    sv.diff(folder / "two", folder / "base", folder / "two.safetensors")
    sv.diff(folder / "two-memory", folder / "base-memory", folder / "fused.safetensors")
    return folder


@pytest.mark.parametrize("op", ["linear", "ties", "dare_linear"])
def test_vectors_of_two_layouts_combine_in_that_of_the_first(layouts: Path, op: str, tmp_path):
    """The same bytes as of two vectors of one layout; random numbers go by names of the first."""
    parameters = {} if op == "linear" else {"density": 0.5}
    for pair in ("one", "two"), ("one", "fused"):
        vectors = [layouts / f"{name}.safetensors" for name in pair]
        made = sv.combine(*vectors, weights=[0.5, 0.25], op=op, parameters=parameters, seed=3,
                          output=tmp_path / f"{pair[1]}.safetensors")  # fmt: skip
        assert sv.verify(made.ref).facts["verified"]
    same = {name: entry["digest"] for name, entry in made.manifest["tensors"].items()}
    other = sv.SkillVector.open(tmp_path / "two.safetensors").manifest["tensors"]
    if op == "dare_linear":  # addressed by the identity of a vector, which is that of its own file
        assert same.keys() == other.keys()
    else:
        assert same == {name: entry["digest"] for name, entry in other.items()}


def test_a_sum_of_two_layouts_on_targets_of_either(layouts: Path, tmp_path: Path):
    vectors = [sv.SkillVector.open(layouts / f"{n}.safetensors") for n in ("one", "two", "fused")]
    for target in ("base", "base-memory"):
        sv.apply(layouts / target, vectors[0] + vectors[1], tmp_path / "want", force=True)
        sv.apply(layouts / target, vectors[0] + vectors[2], tmp_path / "out", force=True)
        assert_same_bits(tmp_path / "out", tmp_path / "want")
        assert sv.verify(tmp_path / "out").facts["verified"]


def test_measures_of_two_layouts(layouts: Path):
    """Angles, and weights to measure against, of whatever layout."""
    one, two, fused = (layouts / f"{name}.safetensors" for name in ("one", "two", "fused"))
    (want,) = sv.orthogonality(one, two, against=layouts / "base").facts["pairs"]
    for against in ("base", "base-memory"):
        (found,) = sv.orthogonality(one, fused, against=layouts / against).facts["pairs"]
        for key, number in want["overall"].items():  # sums of bf16, and of what a view widened
            if isinstance(number, float):
                number = pytest.approx(number, rel=1e-7)
            assert found["overall"][key] == number, key
        assert found["shared_rounding"] == want["shared_rounding"]
    same = sv.orthogonality(two, fused).facts["pairs"][0]["overall"]
    assert same["cosine"] == pytest.approx(1, abs=1e-12)


def test_a_vector_is_proved_on_models_of_another_layout(layouts: Path):
    for vector, side in (("two", "-memory"), ("fused", "")):
        report = sv.verify(
            layouts / f"{vector}.safetensors", tuned=layouts / f"two{side}",
            base=layouts / f"base{side}",
        )  # fmt: skip
        assert report.facts["verified"]
    with pytest.raises(sv.VerificationError, match="not the one the vector was made from"):
        sv.verify(layouts / "fused.safetensors", tuned=layouts / "one", base=layouts / "one")


def test_an_altered_delta_of_another_layout_is_found(layouts: Path, tmp_path: Path):
    """One flipped bit in what a combination, and a comparison, read through views."""
    altered = tmp_path / "altered.safetensors"
    content = bytearray((layouts / "fused.safetensors").read_bytes())
    vector = sv.SkillVector.open(layouts / "fused.safetensors")
    spec = vector.deltas["model.layers.1.mlp.experts.down_proj"].spec
    content[spec.start + 100] ^= 1
    altered.write_bytes(content)
    for call in (
        lambda: sv.combine(layouts / "one.safetensors", altered, output=tmp_path / "c.safetensors"),
        lambda: sv.orthogonality(layouts / "one.safetensors", altered),
    ):
        with pytest.raises(sv.SkillvecError, match=r"down_proj.*altered|block"):
            call()


def test_values_without_a_delta_are_announced_in_another_layout(layouts: Path, tmp_path: Path):
    tuned = load(layouts / "two-memory")
    tuned["model.layers.0.mlp.experts.down_proj"][1, 2, 3] = float("nan")
    save(tmp_path / "tuned", tuned)
    pair = tmp_path / "tuned", layouts / "base-memory", tmp_path / "v.safetensors"
    vector = sv.diff(*pair, allow_nonfinite=True)
    with pytest.raises(sv.NonfiniteError, match=r"experts\.1\.down_proj\.weight: at most 1 of"):
        sv.combine(layouts / "one.safetensors", vector, output=tmp_path / "c.safetensors")


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen3MoeForCausalLM"])
def test_what_no_difference_restores_in_another_layout(name: str, tmp_path: Path):
    """Under other names it comes along; in other shapes it does not, and that is said."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    save_memory(model, tmp_path / "base-memory")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 10.0 ** torch.randint(-6, 3, parameter.shape, generator=generator)
            parameter.copy_(1e3 * torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(tmp_path / "tuned")
    save_memory(model, tmp_path / "tuned-memory")
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    assert vector.manifest["exactness"]["replacements"] > 100
    report = sv.apply(tmp_path / "base-memory", vector, tmp_path / "out")
    if name.startswith("Gemma3"):
        assert report.facts["verdict"] == "exact base"
        assert_same_bits(tmp_path / "out", tmp_path / "tuned-memory")
        return
    assert report.facts["verdict"] == "same family"
    assert "that no difference restores are known in the layout" in " ".join(report.warnings)
    found, want = load(tmp_path / "out"), load(tmp_path / "tuned-memory")
    for key, tensor in want.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_vectors_whose_layouts_a_class_tells_apart(tmp_path: Path):
    """Of a stored vector's base the type alone is known; mappings hang on classes, too."""
    for name in ("Qwen3_5MoeForConditionalGeneration", "GPTNeoXForCausalLM"):
        model = build(name)
        for side in ("base", "tuned"):
            model.save_pretrained(tmp_path / side)
            save_memory(model, tmp_path / f"{side}-memory")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
        ours = sv.diff(
            tmp_path / "tuned", tmp_path / "base", tmp_path / "a.safetensors", force=True
        )
        memory = tmp_path / "tuned-memory", tmp_path / "base-memory", tmp_path / "b.safetensors"
        theirs = sv.diff(*memory, force=True)
        for pair in ((ours, theirs), (theirs, ours)):
            zero = sv.combine(*pair, weights=[1, -1])
            zero = zero.save(tmp_path / "c.safetensors", force=True)
            assert all(entry["norm"] == 0 for entry in zero.manifest["tensors"].values())
