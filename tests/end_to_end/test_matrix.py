"""Every kind of checkpoint, made by the library that makes it, through diff, apply and verify.

What a kind holds is what its own library gives back. Then tuned = the kind must come back from
base + v bit for bit, and a kind as target must take a vector as the same model in plain
safetensors does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from families import assert_same_bits, load, perturbed, save, save_int4
from test_training_shards import small, train_zero, work
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import skillvec as sv

Weights = dict[str, torch.Tensor]


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, **more) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=64, dtype=str(dtype).removeprefix("torch."),
        **{"tie_word_embeddings": False} | more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype)


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Made(NamedTuple):
    """A checkpoint of a kind, and what its own library gives for it, by the names of `base`."""

    folder: Path
    holds: Weights
    base: Weights
    config: dict
    plan: str = ""  # what the plan says of it
    options: dict = {}  # noqa: RUF012


def llama(seed: int = 1) -> tuple[PreTrainedModel, Weights, Weights]:
    model = tiny()
    base = weights_of(model)
    tuned = perturbed(base, seed)
    model.load_state_dict(tuned)
    return model, base, tuned


def pickled(folder: Path) -> Made:
    model, base, tuned = llama()
    folder.mkdir()
    torch.save(tuned, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    given = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return Made(folder, given, base, model.config.to_dict(), "pytorch_model.bin")


def pickled_shards(folder: Path) -> Made:
    from accelerate import Accelerator, load_checkpoint_in_model

    model, base, _ = llama()
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, folder, max_shard_size="50KB", safe_serialization=False)
    model.config.save_pretrained(folder)
    assert len(list(folder.glob("*.bin"))) > 2
    again = tiny()
    load_checkpoint_in_model(again, folder)
    return Made(folder, weights_of(again), base, model.config.to_dict(), "pytorch_model.bin")


def distributed(folder: Path) -> Made:
    from torch.distributed import checkpoint

    model, base, tuned = llama()
    step = {"step": torch.tensor(3)}
    checkpoint.save({"model": tuned, "optimizer": {"state": step}}, checkpoint_id=folder)
    model.config.save_pretrained(folder)
    given = {"model": {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}}
    checkpoint.load(given, checkpoint_id=folder)
    return Made(
        folder, given["model"], base, model.config.to_dict(), "torch.distributed.checkpoint"
    )


def fp8(folder: Path) -> Made:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    model = tiny(dtype=torch.bfloat16)
    base = weights_of(model)
    size = [16, 32]
    settings = SimpleNamespace(weight_block_size=size, scale_fmt="float")
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    tensors: Weights = {}
    for name, tensor in perturbed(base).items():
        linear = name.endswith("_proj.weight")
        tensors |= quantise.convert({name: tensor}) if linear else {name: tensor}
    said = {"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic"}
    config = model.config.to_dict() | {"quantization_config": said | {"dequantize": True}}
    save(folder, tensors, config=config)
    given = weights_of(AutoModelForCausalLM.from_pretrained(folder))
    return Made(folder, given, base, model.config.to_dict(), "fp8 blocks 16x32")


def compressed(folder: Path) -> Made:
    model = tiny(dtype=torch.bfloat16)
    base = weights_of(model)
    loaded = save_int4(model, folder)
    config = tiny().config.to_dict()
    return Made(folder, weights_of(loaded), base, config, "int4 groups of 16")


def mxfp4(folder: Path) -> Made:
    model = tiny("gpt_oss", torch.bfloat16, num_local_experts=3, num_experts_per_tok=2)
    base = weights_of(model)
    generator = torch.Generator().manual_seed(0)
    tensors: Weights = {}
    for name, tensor in base.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)
        for part, size, low, high in (
            ("blocks", (*shape, 16), 0, 256),
            ("scales", shape, 110, 125),
        ):
            drawn = torch.randint(low, high, size, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_{part}"] = drawn
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    save(folder, tensors, config=model.config.to_dict() | {"quantization_config": said})
    given = weights_of(AutoModelForCausalLM.from_pretrained(folder))
    return Made(folder, given, base, model.config.to_dict(), "mxfp4")


def fused_experts(folder: Path) -> Made:
    """Names and shapes in memory, as inference stacks and trainers dump them."""
    model = tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    files = folder.with_name("per_expert")
    model.save_pretrained(files)
    base = load(files)  # one tensor an expert
    assert not set(base) & {name for name in weights_of(model) if "experts" in name}
    model.load_state_dict(perturbed(weights_of(model)))
    save(folder, weights_of(model), config=model.config.to_dict())
    model.save_pretrained(folder.with_name("tuned"))
    return Made(folder, load(folder.with_name("tuned")), base, model.config.to_dict(), "experts")


def one_by_one(folder: Path) -> Made:
    """The other way round: base fused, tuned an expert at a time."""
    model = tiny("mixtral", num_local_experts=3, num_experts_per_tok=2)
    base = weights_of(model)
    model.load_state_dict(perturbed(base))
    model.save_pretrained(folder)
    return Made(folder, weights_of(model), base, model.config.to_dict(), "experts")


def other_prefix(folder: Path) -> Made:
    model, base, tuned = llama()
    moved = {f"model.language_{name}": t for name, t in tuned.items() if name.startswith("model.")}
    save(folder, moved | {"lm_head.weight": tuned["lm_head.weight"]},
         config=model.config.to_dict())  # fmt: skip
    return Made(folder, tuned, base, model.config.to_dict(), "model.language_model.")


def renamed(folder: Path) -> Made:
    model, base, tuned = llama()
    names = {name: name.replace("self_attn", "attention") for name in tuned}
    save(folder, {names[name]: t for name, t in tuned.items()}, config=model.config.to_dict())
    rule = {"rename": [r"\.attention\.=.self_attn."]}
    return Made(folder, tuned, base, model.config.to_dict(), "attention", rule)


KINDS: dict[str, Callable[[Path], Made]] = {
    made.__name__: made
    for made in (pickled, pickled_shards, distributed, fp8, compressed, mxfp4, fused_experts,
                 one_by_one, other_prefix, renamed)
}  # fmt: skip


class Seen:
    """Keeps what a plan says."""

    facts: dict

    def planned(self, report: sv.Report) -> None:
        self.facts = report.facts

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Take no notice."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_what_its_library_gives(kind: str, tmp_path: Path):
    made = KINDS[kind](tmp_path / "kind")
    base = save(tmp_path / "base", made.base, shards=2, config=made.config)
    seen = Seen()
    skill = tmp_path / "skill.safetensors"
    vector = sv.diff(made.folder, base, skill, watcher=seen, **made.options)
    assert made.plan in json.dumps({key: seen.facts.get(key) for key in ("tuned", "layout")})
    assert vector.manifest["exactness"]["claim"] in ("bitwise", "partial")  # fp32 may be partial
    if vector.manifest["exactness"]["claim"] == "bitwise":
        sv.apply(base, vector, tmp_path / "again")
        assert_same_bits(load(tmp_path / "again"), made.holds)
    else:
        report = sv.apply(base, vector, tmp_path / "again")
        for name, tensor in load(tmp_path / "again").items():
            torch.testing.assert_close(tensor, made.holds[name], rtol=0, atol=1e-8)
        assert report.facts["gain"] == pytest.approx(1.0)
    assert sv.verify(skill).facts["verified"]
    # the plain model with the same values gives the same file of differences
    plain = save(tmp_path / "plain", made.holds, config=made.config)
    same = sv.diff(plain, base, tmp_path / "same.safetensors")
    assert_same_bits(skill, tmp_path / "same.safetensors")
    assert same.manifest["tensors"] == vector.manifest["tensors"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "renamed"])
def test_a_kind_as_target_takes_a_vector_as_the_plain_model_does(kind: str, tmp_path: Path):
    made = KINDS[kind](tmp_path / "kind")
    base = save(tmp_path / "base", made.base, config=made.config)
    tuned = save(tmp_path / "rl", perturbed(made.base, 7, density=0.3), config=made.config)
    skill = tmp_path / "skill.safetensors"
    sv.diff(tuned, base, skill)
    plain = save(tmp_path / "plain", made.holds, config=made.config)
    for lam in (1.0, 0.5):
        expected = tmp_path / f"expected-{lam}"
        sv.apply(plain, skill, expected, lam=lam)
        report = sv.apply(made.folder, skill, tmp_path / f"out-{lam}", lam=lam)
        assert report.facts["verdict"] != "same shapes, unknown lineage" or kind == "mxfp4"
        assert sv.verify(tmp_path / f"out-{lam}").facts["verified"]
        written = load(tmp_path / f"out-{lam}")
        if set(written) == set(load(expected)):
            assert_same_bits(written, expected)
        else:  # the target keeps its own layout: seen in base's, it is the same
            one = sv.diff(tmp_path / f"out-{lam}", base, tmp_path / f"a-{lam}.safetensors")
            other = sv.diff(expected, base, tmp_path / f"b-{lam}.safetensors")
            assert one.manifest["tensors"] == other.manifest["tensors"]
    config = json.loads((tmp_path / "out-1.0" / "config.json").read_text())
    assert "quantization_config" not in config
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "out-1.0").state_dict())
    assert not list((tmp_path / "out-1.0").glob("*.bin"))


# ------------------------------------------------------------------------------------- adapters


def trained_adapter(folder: Path, **lora) -> tuple[Path, Path, Weights]:
    """Return base, adapter, and what PEFT gives when it merges them in fp32."""
    from peft import LoraConfig, get_peft_model

    model = tiny()
    base = folder / "base"
    model.save_pretrained(base)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **lora))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter", weights_of(adapted.merge_and_unload())


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
     {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}],
    ids=["rslora", "whole modules"],
)  # fmt: skip
def test_an_adapter_is_a_vector_of_its_base(lora: dict, tmp_path: Path):
    base, adapter, merged = trained_adapter(tmp_path, **lora)
    vector = sv.diff(adapter, base, tmp_path / "v.safetensors")
    assert vector.manifest["exactness"]["claim"] == "combined"
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    for given, out in ((vector, "stored"), (adapter, "straight")):
        sv.apply(base, given, tmp_path / out)
        for name, tensor in load(tmp_path / out).items():
            torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=2e-7)
        assert sv.verify(tmp_path / out).facts["verified"]
    assert_same_bits(tmp_path / "stored", tmp_path / "straight")
    both = sv.combine(adapter, adapter, weights=[0.75, 0.25], output=tmp_path / "c.safetensors")
    sv.apply(base, both, tmp_path / "both")
    for name, tensor in load(tmp_path / "both").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=2e-7)


def test_an_adapter_without_its_base_fits_any_model_of_its_names(tmp_path: Path):
    base, adapter, merged = trained_adapter(tmp_path, target_modules=["q_proj"])
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(sv.UsageError, match="diff ADAPTER BASE"):
        sv.combine(adapter, adapter)
    with pytest.raises(sv.UsageError, match="the input"):
        sv.apply(moved, adapter, adapter, force=True)
    report = sv.apply(moved, adapter, tmp_path / "out")
    assert report.facts["verdict"] == "same shapes, unknown lineage"
    assert report.counts == {"applied": 2, "passed through": len(merged) - 2}
    base.mkdir()  # one that cannot be opened is as good as none
    assert sv.SkillVector.open(adapter).base is None
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=2e-7)


# ----------------------------------------------------------------------------------- vocabulary


def test_rows_of_two_dtypes(tmp_path: Path):
    base = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16(), "w": torch.randn(4, 4)}
    tuned = {name: tensor.float() + 0.01 for name, tensor in base.items()}
    tuned["model.embed_tokens.weight"] = tuned["model.embed_tokens.weight"][:6]
    folders = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    sv.diff(*folders, tmp_path / "v.safetensors", rows="common")
    sv.apply(folders[1], tmp_path / "v.safetensors", tmp_path / "out", dtype="fp32")
    out, name = load(tmp_path / "out"), "model.embed_tokens.weight"
    assert torch.equal(out["w"], tuned["w"]) and torch.equal(out[name][:6], tuned[name])
    assert torch.equal(out[name][6:], base[name][6:].float())


@pytest.mark.parametrize("more", ["tuned", "base"])
def test_vocabularies_of_different_length(more: str, tmp_path: Path):
    small, large = tiny(), tiny()
    large.resize_token_embeddings(70)
    sizes = {"tuned": large, "base": small} if more == "tuned" else {"tuned": small, "base": large}
    base, tuned = weights_of(sizes["base"]), perturbed(weights_of(sizes["tuned"]))
    folders = [
        save(tmp_path / name, tensors, config=sizes[name].config.to_dict())
        for name, tensors in (("tuned", tuned), ("base", base))
    ]
    with pytest.raises(sv.IncompatibleError, match=r"embed_tokens.weight: tuned \[") as refused:
        sv.diff(*folders)
    assert "--rows" in str(refused.value)
    heads = {"model.embed_tokens.weight", "lm_head.weight"}
    vector = sv.diff(*folders, tmp_path / "common.safetensors", rows="common")
    assert sv.verify(tmp_path / "common.safetensors").facts["verified"]
    sv.apply(folders[1], vector, tmp_path / "out")
    out = load(tmp_path / "out")
    for name in heads:
        rows = min(len(base[name]), len(tuned[name]))
        torch.testing.assert_close(out[name][:rows], tuned[name][:rows], rtol=0, atol=1e-8)
        assert torch.equal(out[name][rows:], base[name][rows:])
    skipped = sv.diff(*folders, tmp_path / "skip.safetensors", rows="skip")
    assert set(skipped.manifest["excluded"]) == heads
    assert sv.verify(tmp_path / "skip.safetensors").facts["verified"]
    # and onto a target with another vocabulary again
    third = tiny()
    third.resize_token_embeddings(67)
    target = save(tmp_path / "third", weights_of(third), config=third.config.to_dict())
    with pytest.raises(sv.IncompatibleError, match="--rows"):
        sv.apply(target, vector, tmp_path / "no")
    sv.apply(target, vector, tmp_path / "yes", rows="common")
    assert sv.verify(tmp_path / "yes").facts["verified"]
    before, after = load(target), load(tmp_path / "yes")
    for name in heads:
        rows = min(len(base[name]), len(tuned[name]))
        delta = after[name] - before[name]
        expected = (tuned[name][:rows] - base[name][:rows])[:67]
        torch.testing.assert_close(delta[: len(expected)], expected, rtol=0, atol=1e-7)
        assert not delta[rows:].any()
    report = sv.apply(target, vector, tmp_path / "left", rows="skip")
    assert {x["name"] for x in report.ledger if x["status"] == "passed through"} == heads


# ---------------------------------------------------------- trainings of several processes (slow)


def trained_by_torch(folder: Path, kind: str) -> tuple[Weights, Weights]:
    torch.multiprocessing.spawn(work, (2, kind, str(folder)), nprocs=2)
    return weights_of(small()), torch.load(folder / "whole.pt", weights_only=True)


def trained_by_deepspeed(folder: Path, stage: str) -> tuple[Weights, Weights]:
    pytest.importorskip("deepspeed", reason="make slow installs it")
    torch.multiprocessing.spawn(train_zero, (2, int(stage), str(folder)), nprocs=2)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    given = get_fp32_state_dict_from_zero_checkpoint(str(folder / "out"))
    given = {name: tensor.detach().clone() for name, tensor in given.items()}
    return perturbed(given), given


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "kind"),
    [(trained_by_torch, "dcp"), (trained_by_torch, "ranks"),
     (trained_by_torch, "accelerate SHARDED_STATE_DICT"), (trained_by_deepspeed, "2"),
     (trained_by_deepspeed, "3")],
)  # fmt: skip
def test_shards_of_a_training_are_what_their_library_gives(run, kind: str, tmp_path: Path):
    before, given = run(tmp_path, kind)
    base = save(tmp_path / "base", before)
    vector = sv.diff(tmp_path / "out", base, tmp_path / "v.safetensors")
    sv.apply(base, vector, tmp_path / "again")
    for name, tensor in load(tmp_path / "again").items():
        torch.testing.assert_close(tensor, given[name].to(tensor.dtype), rtol=0, atol=1e-7)
    assert vector.report.facts["density"] > 0.9
    report = sv.apply(tmp_path / "out", 0.5 * vector, tmp_path / "further")
    assert report.facts["target"]["format"] != "safetensors"
    for name, tensor in load(tmp_path / "further").items():
        expected = given[name] + 0.5 * (given[name] - before[name])
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0, atol=1e-6)
