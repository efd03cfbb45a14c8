"""base + 1 * (tuned - base) == tuned, on what transformers writes, read back from the disk.

Expected values come from the official libraries and from oracle.py, never from skillvec.
"""

import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import oracle
import pytest
import reader
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from families import TORCH_DTYPE, assert_same_bits, bits, from_bits, load, perturbed, save, toy
from hypothesis import given, settings
from hypothesis import strategies as st

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.errors import NonfiniteError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CODECS = ("dense", "sparse", "packed", "auto")
INDEX = "vector.safetensors.index.json"
WILD = {"allow_nonfinite": True}  # of tests that plant NaN and infinities


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that really syncs proves nothing here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False))


def qwen2_tied():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True))


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    return Qwen3MoeForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
    )
    return LlavaForConditionalGeneration(config)


KINDS = {f.__name__: f for f in (llama, qwen2_tied, gemma3, mixtral, qwen3_moe, gpt2, llava)}


def fine_tune(model: torch.nn.Module, seed: int) -> None:
    """Change parameters in place: one dense, some not at all, the rest sparsely, some far."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if number % 5 == 4:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 1e-3
            if number % 5:
                noise *= torch.rand(parameter.shape, generator=generator) < 0.2
            changed = parameter.double() + noise
            flat = changed.reshape(-1)
            flat[:2] *= torch.tensor([2.3, -3.0])  # across exponents, and the sign
            parameter.copy_(changed.to(parameter.dtype))


def plant(model: torch.nn.Module, row: int) -> None:
    """Give a token that no test uses what no difference restores, and numbers almost zero."""
    special = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 6e-8, -9e-41])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "wte" in name:
                parameter[row, : special.numel()] = special.to(parameter.dtype)
                return
    raise AssertionError("no embedding")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Folders of a base and a tuned model of a kind and dtype, the tuned one in many shards."""
    kind, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
    torch.manual_seed(1)
    model = KINDS[kind]().to(TORCH_DTYPE[dtype]).eval()
    plant(model, 60)
    model.save_pretrained(folder / "base")
    fine_tune(model, 2)
    plant(model, 61)
    model.save_pretrained(folder / "tuned", max_shard_size="6KB")
    (folder / "base" / "tokenizer_config.json").write_text('{"kept": "byte for byte"}\n')
    return type(model), folder / "base", folder / "tuned"


@pytest.mark.parametrize(
    "pair", [(kind, dtype) for kind in KINDS for dtype in ("BF16", "F16")], indirect=True,
    ids=lambda p: "-".join(p),
)  # fmt: skip
def test_models_of_every_kind_come_back_bit_for_bit(pair, tmp_path: Path) -> None:
    model_class, base, tuned = pair
    assert len(list(tuned.glob("*.safetensors"))) > 1
    vector = sv.diff(tuned, base, tmp_path / "skill.safetensors", **WILD)
    report = sv.apply(base, vector, tmp_path / "merged", **WILD)
    assert report.facts["verdict"] == "exact base"
    assert_same_bits(tmp_path / "merged", tuned)
    assert sv.verify(tmp_path / "skill.safetensors").facts["verified"]
    assert sv.verify(tmp_path / "merged").facts["verified"]
    assert vector.manifest["exactness"]["replacements"] >= 4  # of those planted
    for codec, size in (("dense", "5GB"), ("sparse", "5GB"), ("packed", "9KB")):
        path = tmp_path / f"{codec}.safetensors"
        stored = sv.diff(tuned, base, path, codec=codec, max_shard_size=size, **WILD)
        assert path.is_dir() == (size != "5GB")
        assert {e["codec"] for e in stored.manifest["tensors"].values()} >= {codec}
        sv.apply(base, stored, tmp_path / codec, **WILD)
        assert tensor_data(tmp_path / codec) == tensor_data(tmp_path / "merged")

    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {"README.md"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()

    tokens = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        merged = model_class.from_pretrained(tmp_path / "merged")
        logits = [
            model(input_ids=tokens).logits
            for model in (merged.eval(), model_class.from_pretrained(tuned).eval())
        ]
    assert_same_bits({"logits": logits[0]}, {"logits": logits[1]})  # the planted ones: NaN
    assert np.isfinite(logits[0][..., :60].float().numpy()).all()


@pytest.mark.parametrize("pair", [("qwen2_tied", "BF16")], indirect=True)
def test_the_target_keeps_its_own_shards(pair, tmp_path: Path) -> None:
    """The other way round: base - tuned onto the many shards of tuned."""
    _, base, tuned = pair
    sv.apply(tuned, sv.diff(base, tuned), tmp_path / "merged", **WILD)
    assert_same_bits(tmp_path / "merged", base)
    for file in tuned.iterdir():
        written = tmp_path / "merged" / file.name
        if file.suffix == ".safetensors":
            assert set(load(written)) == set(load(file))
        else:
            assert written.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("pair", [("llama", "BF16")], indirect=True)
def test_a_vector_is_never_loaded_as_weights(pair, tmp_path: Path) -> None:
    """Beside a config.json, and where it is named itself, from_pretrained finds no model."""
    model_class, base, tuned = pair
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes((base / "config.json").read_bytes())
    file = tmp_path / "folder" / "skill.safetensors"
    sv.diff(tuned, base, file, **WILD)
    with pytest.raises(OSError):
        model_class.from_pretrained(tmp_path / "folder")
    with pytest.raises((OSError, ValueError)):
        model_class.from_pretrained(file)


# ------------------------------------------------------------------------ hand-made checkpoints


def round_trip(
    tmp_path: Path, base: dict, tuned: dict, codec: str = "auto", size: str = "5GB",
    kept: str = "auto", wild: bool = False, **apply_with,
) -> tuple[dict, dict]:  # fmt: skip
    """Diff and apply to the base in new folders; return merged tensors and the manifest.

    `kept` is the dtype of the vector. `wild` models differ in NaN or infinities: refused without
    leave, and taken with it.
    """
    number = len(list(tmp_path.iterdir()))
    folder = tmp_path / f"round-{number}"
    save(folder / "base", base)
    save(folder / "tuned", tuned, shards=min(2, len(tuned)))
    path = folder / "v.safetensors"
    sides = folder / "tuned", folder / "base"
    options = {"codec": codec, "max_shard_size": size, "dtype": kept}
    if wild:
        with pytest.raises(NonfiniteError):
            sv.diff(*sides, path, **options)
        options |= WILD
    vector = sv.diff(*sides, path, **options)
    if wild:
        with pytest.raises(NonfiniteError):
            sv.apply(folder / "base", vector, folder / "merged", **apply_with)
        apply_with |= WILD
    sv.apply(folder / "base", vector, folder / "merged", **apply_with)
    sv.verify(path)
    sv.verify(folder / "merged")
    return load(folder / "merged"), vector.manifest


def planted(dtype: str, numel: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base and tuned over all bit patterns, half of them close neighbours."""
    rng = np.random.default_rng(4)
    base = rng.integers(0, 1 << 16, numel, dtype=np.uint16)
    tuned = np.where(
        rng.random(numel) < 0.5, base + rng.integers(0, 3, numel), rng.permutation(base)
    )
    special = [0x0000, 0x8000, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0x7F81, 0x7C00, 0x7C01, 0x3F80]
    crossed = np.array([(a, b) for a in special for b in special], np.uint16).T
    base, tuned = np.concatenate((base, crossed[0])), np.concatenate((tuned, crossed[1]))
    return from_bits(base.astype(np.uint16), dtype), from_bits(tuned.astype(np.uint16), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize(
    ("codec", "size"), [(codec, "5GB") for codec in CODECS] + [("auto", "8KB")]
)
def test_planted_zeros_nans_and_infinities_come_back(
    dtype: str, codec: str, size: str, tmp_path: Path
) -> None:
    base, tuned = planted(dtype)
    quiet = toy(dtype=dtype)
    found, manifest = round_trip(
        tmp_path, {"wild": base, **quiet}, {"wild": tuned, **perturbed(quiet)}, codec, size,
        wild=True,
    )  # fmt: skip
    assert_same_bits(found, {"wild": tuned, **perturbed(quiet)})
    assert (len(manifest["side"]) > 1) == (size != "5GB")
    assert manifest["exactness"]["claim"] == "bitwise"
    assert manifest["exactness"]["unrestored"] == 0
    assert manifest["exactness"]["replacements"] > 100
    json.dumps(manifest, allow_nan=False)  # no norm is Infinity


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base and tuned of one to four 16-bit tensors: odd shapes, any density, any bit patterns."""
    sides: tuple[dict, dict] = {}, {}
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(["BF16", "F16"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 65]), max_size=3))
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        base = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
        density = draw(st.sampled_from([0.0, 0.01, 1.0]) | st.floats(0, 1))
        step = draw(st.sampled_from([1, 3, 40, 1 << 15]))
        moved = base + rng.integers(1, step + 1, shape, dtype=np.uint16)
        tuned = np.where(rng.random(shape) < density, moved, base).astype(np.uint16)
        for side, patterns in zip(sides, (base, tuned), strict=True):
            side[f"layer.{number}"] = from_bits(patterns, dtype).reshape(shape)
    return sides


@settings(max_examples=40)
@given(pairs(), st.sampled_from(CODECS), st.sampled_from(["5GB", "1KB"]), st.integers(1, 3))
def test_any_pair_comes_back_through_any_codec(sides, codec: str, size: str, workers: int) -> None:
    base, tuned = sides
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save(place / "base", base)
        save(place / "tuned", tuned)
        path = place / "v.safetensors"
        options = {"codec": codec, "max_shard_size": size, "workers": workers, **WILD}
        vector = sv.diff(place / "tuned", place / "base", path, **options)
        assert vector.manifest["exactness"]["unrestored"] == 0
        sv.apply(place / "base", path, place / "merged", workers=workers, **WILD)
        assert_same_bits(place / "merged", tuned)
        for name, (delta, positions, _) in reader.read_vector(path)[1].items():
            expected = oracle.round_to(oracle.delta(tuned[name], base[name]), "F32").numpy()
            fits = np.isfinite(expected)  # beyond fp32 it is a replacement
            assert np.array_equal(delta.ravel()[fits], expected[fits]), name
            assert not np.setdiff1d(np.flatnonzero(~fits), positions).size
            assert delta.shape == tuple(base[name].shape)
            assert vector.manifest["tensors"][name]["changed"] == np.count_nonzero(
                bits(tuned[name]) != bits(base[name])
            )


def test_minus_zero_after_a_negative_subnormal_comes_back(tmp_path: Path) -> None:
    base = from_bits(np.array([0x8001, 0x3F80, 0x8003], np.uint16), "BF16")
    tuned = from_bits(np.array([0x8000, 0x3F80, 0x8002], np.uint16), "BF16")
    found, manifest = round_trip(tmp_path, {"x": base}, {"x": tuned})
    assert_same_bits(found, {"x": tuned})
    assert manifest["exactness"]["replacements"] == 1


def test_replacements_hold_on_the_exact_base_at_lam_one_only(tmp_path: Path) -> None:
    """A target that differs in one value, or another lam, gets target + lam * delta and no more."""
    base = from_bits(np.array([0x4040, 0x3F80, 0x0000], np.uint16), "BF16")  # 3, 1, 0
    tuned = from_bits(np.array([0x7FC0, 0x4000, 0x8000], np.uint16), "BF16")  # NaN, 2, -0
    other = from_bits(np.array([0x4040, 0x3F00, 0x0000], np.uint16), "BF16")  # 3, .5, 0
    for name, tensor in (("base", base), ("tuned", tuned), ("other", other)):
        save(tmp_path / name, {"x": tensor})
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors", **WILD)
    assert vector.manifest["exactness"]["replacements"] == 2
    sv.apply(tmp_path / "base", vector, tmp_path / "exact", **WILD)
    sv.apply(tmp_path / "other", vector, tmp_path / "near", **WILD)
    sv.apply(tmp_path / "base", vector, tmp_path / "half", lam=0.5, **WILD)
    sv.apply(tmp_path / "base", 2 * vector, tmp_path / "scaled", lam=0.5, **WILD)
    found = {n: bits(load(tmp_path / n)["x"]).tolist() for n in ("exact", "near", "half", "scaled")}
    assert found["exact"] == found["scaled"] == [0x7FC0, 0x4000, 0x8000]
    assert found["near"] == [0x4040, 0x3FC0, 0x0000]
    assert found["half"] == [0x4040, 0x3FC0, 0x0000]


def far(size: float) -> tuple[dict, dict]:
    """Return an fp32 base and a tuned model with differences of `size`, -0, infinity and NaN."""
    base = toy(dtype="F32")
    tuned = perturbed(base, size=size)
    tuned["model.norm.weight"][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    return base, tuned


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_fp32_comes_back_bit_for_bit(size: float, tmp_path: Path) -> None:
    """What base + fp32 difference misses, by numpy, are the replacements, and no more."""
    base, tuned = far(size)
    found, manifest = round_trip(tmp_path, base, tuned, wild=True)
    assert_same_bits(found, tuned)
    missed = 0
    for name, tensor in tuned.items():
        point, side = base[name].numpy(), tensor.numpy()
        difference = np.where(np.isfinite(side), side - point, np.float32(0))
        missed += int(np.count_nonzero(bits(point + difference) != bits(side)))
    assert manifest["exactness"]["replacements"] == missed > 3
    assert manifest["exactness"]["unrestored"] == 0
    assert manifest["exactness"]["claim"] == "bitwise"


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_rounded_to_fp32_it_says_how_much_it_restores(size: float, tmp_path: Path) -> None:
    """What the manifest states is what an integer comparison of the written file counts."""
    base, tuned = far(size)
    found, manifest = round_trip(tmp_path, base, tuned, kept="fp32", wild=True)
    missed = {name: int(np.count_nonzero(bits(found[name]) != bits(tuned[name]))) for name in tuned}
    stated = {name: entry.get("unrestored", 0) for name, entry in manifest["tensors"].items()}
    assert missed == stated
    assert manifest["exactness"]["unrestored"] == sum(missed.values()) > 0
    assert manifest["exactness"]["claim"] == "rounded"
    for name in tuned:  # what is missed is missed by a rounding of fp32
        steps = oracle.ulps(found[name], tuned[name])
        wide = [oracle.wide(x[name]) for x in (found, tuned, base)]
        with np.errstate(invalid="ignore"):
            bound = 2.0**-23 * (np.abs(wide[1] - wide[2]) + np.abs(wide[1]))
            assert ((steps == 0) | (np.abs(wide[0] - wide[1]) <= bound)).all()


def test_bf16_base_with_fp32_tuned_comes_back_as_fp32(tmp_path: Path) -> None:
    base = toy(dtype="BF16")
    tuned = perturbed({name: tensor.float() for name, tensor in base.items()}, size=1e-4)
    found, manifest = round_trip(tmp_path, base, tuned, dtype="fp32")
    assert_same_bits(found, tuned)
    assert manifest["exactness"]["claim"] == "bitwise"
    rounded, _ = round_trip(tmp_path, base, tuned)  # without dtype: rounded to the base's bf16
    for name in tuned:
        assert oracle.ulps(rounded[name], tuned[name].bfloat16()).max() <= 1


@pytest.mark.parametrize(
    "tuned_dtype,base_dtype", [("BF16", "F32"), ("F16", "BF16"), ("BF16", "F64")]
)
def test_mixed_dtypes_give_tuned_back_when_its_dtype_is_asked_for(
    tuned_dtype: str, base_dtype: str, tmp_path: Path
) -> None:
    base = toy(dtype=base_dtype)
    tuned = perturbed({n: t.to(TORCH_DTYPE[tuned_dtype]) for n, t in base.items()}, size=0.01)
    tuned["model.norm.weight"][:2] = torch.tensor([-0.0, float("inf")])
    name = {"BF16": "bf16", "F16": "fp16"}[tuned_dtype]
    found, manifest = round_trip(tmp_path, base, tuned, dtype=name, wild=True)
    assert_same_bits(found, tuned)
    assert manifest["exactness"]["claim"] == "bitwise"
    stored = manifest["tensors"]["lm_head.weight"]["dtype"]
    assert stored == ("F64" if base_dtype == "F64" else "F32")


def test_fp64_is_kept_in_fp64(tmp_path: Path) -> None:
    base = {"x": torch.randn(300, dtype=torch.float64), "y": torch.tensor([1.0, 2.0]).double()}
    tuned = {"x": base["x"] * (1 + 1e-12), "y": torch.tensor([1.0, -0.0]).double()}
    found, manifest = round_trip(tmp_path, base, tuned)
    stored = reader.read_vector(next(tmp_path.rglob("v.safetensors")))[1]["x"][0]
    assert manifest["tensors"]["x"]["dtype"] == "F64" and stored.dtype == np.float64
    assert np.array_equal(stored, oracle.delta(tuned["x"], base["x"]))
    assert_same_bits(found, tuned)
    assert manifest["exactness"]["claim"] == "bitwise"


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_fp64_differences_whose_squares_overflow_are_stored_all_the_same(
    size: float, tmp_path: Path
) -> None:
    base = {"x": torch.ones(40).double() * size, "y": torch.ones(3)}
    tuned = {"x": base["x"].clone(), "y": torch.ones(3)}
    tuned["x"][::2] *= -1
    found, manifest = round_trip(tmp_path, base, tuned)
    assert_same_bits(found, tuned)
    json.dumps(manifest, allow_nan=False)
    skill = next(tmp_path.rglob("v.safetensors"))
    for words in (["inspect", "-v"], ["combine", "-o", str(tmp_path / "c.safetensors")]):
        result = CliRunner().invoke(main, [*words, str(skill)])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("codec", CODECS)
def test_scalars_empty_tensors_integers_and_bools(codec: str, tmp_path: Path) -> None:
    base = {
        "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 7, dtype=torch.bfloat16),
        "empty_int": torch.zeros(0, dtype=torch.int64),
        "steps": torch.tensor(7),
        "positions": torch.arange(12).reshape(3, 4),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "cube": torch.ones(2, 3, 4, dtype=torch.float16),
    }
    tuned = base | {"scalar": torch.tensor(1.5, dtype=torch.bfloat16), "cube": base["cube"] * 0.7}
    found, manifest = round_trip(tmp_path, base, tuned, codec)
    assert_same_bits(found, tuned)
    assert set(manifest["equal"]) == {"empty_int", "steps", "positions", "mask", "bytes"}
    assert manifest["exactness"]["claim"] == "bitwise"


def test_integers_that_differ_are_listed_and_not_transferred(tmp_path: Path) -> None:
    base = {"w": torch.ones(4, dtype=torch.bfloat16), "steps": torch.tensor([1, 2]),
            "mask": torch.tensor([True])}  # fmt: skip
    tuned = {"w": base["w"] * 2, "steps": torch.tensor([1, 3]), "mask": torch.tensor([True])}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    assert vector.manifest["differing"] == ["steps"]
    assert vector.manifest["exactness"]["claim"] == "partial"
    assert {line["name"]: line["status"] for line in vector.report.ledger} == {
        "w": "delta", "steps": "differs", "mask": "equal",
    }  # fmt: skip
    sv.apply(tmp_path / "base", vector, tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert_same_bits(found, tuned | {"steps": base["steps"]})


@pytest.mark.parametrize("stored_on", ["tuned", "base", "target"])
def test_a_tied_head_stored_on_one_side_only(stored_on: str, tmp_path: Path) -> None:
    """The copy follows its embedding: as a delta it is not stored, on a target it moves along."""
    config = {"model_type": "toy", "tie_word_embeddings": True}
    base = toy()
    del base["lm_head.weight"]
    sides = {"base": base, "tuned": perturbed(base), "target": perturbed(base, 5)}
    head = {"lm_head.weight": sides[stored_on]["model.embed_tokens.weight"].clone()}
    for name, tensors in sides.items():
        extra = head if name == stored_on else {}
        save(tmp_path / name, {**tensors, **extra}, config=config)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    assert "lm_head.weight" not in vector.deltas
    sv.apply(tmp_path / "target", vector, tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert ("lm_head.weight" in found) == (stored_on == "target")
    if stored_on == "target":
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
        assert not torch.equal(found["lm_head.weight"], head["lm_head.weight"])
    sv.apply(tmp_path / "base", vector, tmp_path / "restored")
    restored = load(tmp_path / "restored")
    assert_same_bits({n: restored[n] for n in base}, sides["tuned"])
    if stored_on == "base":
        assert torch.equal(restored["lm_head.weight"], sides["tuned"]["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------- shards and codecs


def files_of(vector: Path) -> list[Path]:
    return sorted(vector.glob("*.safetensors")) if vector.is_dir() else [vector]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, "6KB", "20 kB", "1MiB"])
def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(
    codec: str, size: int | str, tmp_path: Path
) -> None:
    """Side tables and headers counted; and a size that all fit in gives one file."""
    limit = {1: 1, "6KB": 6_000, "20 kB": 20_000, "1MiB": 1 << 20}[size]
    base, tuned = toy(), perturbed(toy(), density=0.5)
    for number in range(3):  # full of replacements: the side tables are what is large
        base[f"wild.{number}"], tuned[f"wild.{number}"] = planted("BF16", 2000)
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    path = tmp_path / "v.safetensors"
    sides = tmp_path / "tuned", tmp_path / "base"
    sv.diff(*sides, path, codec=codec, max_shard_size=size, **WILD)
    assert path.is_dir() == (limit < 1 << 20)
    entries = reader.read_vector(path)[0]["tensors"]
    too_large = []
    for file in files_of(path):
        stored = load(file)
        names = {re.sub(r"\.(packed|values|bitmap)$", "", n) for n in stored if n[:8] != "skillvec"}
        # how many records the last tensor has is known only when it has its place
        rows = (
            stored["skillvec.blocks"].numpy().view("<u4")[max(entries[n]["block"] for n in names) :]
        )
        own = int(rows[:, 1].sum()) * 8 + int(rows[:, 2].sum()) * 12
        if file.stat().st_size - own > limit and len(names) > 1:
            too_large.append(f"{file.name}: {file.stat().st_size} with {sorted(names)}")
    assert not too_large, "\n".join(too_large)
    sv.apply(tmp_path / "base", path, tmp_path / "merged", **WILD)
    assert_same_bits(tmp_path / "merged", tuned)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "-5GB", "x", "GB", "5XB", "5 apples", "nan", "inf", "1e400", "0.1B"]
)
def test_a_size_that_is_none_is_refused(text: str, family, tmp_path: Path) -> None:
    with pytest.raises(sv.UsageError, match=re.escape(f"max_shard_size {text}: expected a size")):
        sv.diff(family.tuned, family.base, tmp_path / "v.safetensors", max_shard_size=text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unchanged", [{0}, {0, 1}, {3}, {2, 3}, {1, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("codec", CODECS)
def test_shards_of_unchanged_tensors_are_not_missed(
    unchanged: set[int], codec: str, tmp_path: Path
) -> None:
    """A tensor without a byte begins no shard, and a shard without a tensor is none."""
    base = {f"{i}": t for i, t in enumerate(toy()["lm_head.weight"].chunk(4))}
    tuned = {n: t.clone() if int(n) in unchanged else t * 1.3 for n, t in base.items()}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    path = tmp_path / "v.safetensors"
    sv.diff(tmp_path / "tuned", tmp_path / "base", path, codec=codec, max_shard_size=100)
    count = 4 if codec == "dense" else 4 - len(unchanged)
    assert len(files_of(path)) == max(count, 1)
    sv.apply(tmp_path / "base", path, tmp_path / "merged")
    assert_same_bits(tmp_path / "merged", tuned)
    assert sv.verify(path).facts["verified"]


def test_every_verb_takes_a_folder_of_shards(family, tmp_path: Path, monkeypatch) -> None:
    """As it takes the file: the same answers, the same bytes."""
    whole = sv.diff(family.sft, family.base, tmp_path / "whole.safetensors")
    folder = tmp_path / "parts.safetensors"
    parts = sv.diff(family.sft, family.base, folder, max_shard_size="3KB")
    assert folder.is_dir() and len(files_of(folder)) > 3
    assert parts.report.facts["files"] == [file.name for file in files_of(folder)]
    assert parts.manifest["identity"] == whole.manifest["identity"]
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for number, ref in enumerate((folder, "parts.safetensors", "parts.safetensors/", "link")):
        out = tmp_path / f"out{number}"
        sv.apply(family.target, ref, out, lam=0.5)
        sv.apply(family.target, whole, f"{out}.whole", lam=0.5)
        assert tensor_data(out) == tensor_data(Path(f"{out}.whole"))
        assert sv.verify(out).facts["verified"] and sv.verify(ref).facts["verified"]
    facts = sv.orthogonality(folder, whole, f"{family.sft}::{family.base}").facts
    assert all(pair["overall"]["cosine"] == pytest.approx(1) for pair in facts["pairs"])
    seen, said = sv.inspect(folder).facts, sv.inspect(whole.ref).facts
    for key in ("numel", "changed", "norm", "identity", "exactness", "layers", "codecs"):
        assert seen[key] == said[key], key
    assert seen["files"] == [file.name for file in files_of(folder)]
    assert sv.inspect(folder, family.base).facts["verdict"] == "exact base"
    both = sv.combine(folder, whole, weights=[0.5, 0.5], output=tmp_path / "both.safetensors")
    sv.apply(family.target, both, tmp_path / "both")
    sv.apply(family.target, 0.5 * parts + 0.5 * whole, tmp_path / "lazy")
    assert tensor_data(tmp_path / "both") == tensor_data(tmp_path / "lazy")
    for ref in (folder, whole.ref):
        result = CliRunner().invoke(main, ["inspect", str(ref), "-q"])
        assert result.output.strip() == os.fspath(Path(ref).resolve())
    with pytest.raises(sv.UsageError, match="input"):
        sv.combine(folder, output=folder, force=True)
    with pytest.raises(sv.UsageError, match="input"):
        sv.combine(folder, output=folder / "inside.safetensors")


def test_force_replaces_file_by_folder_and_folder_by_file(family, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"

    def write(size: int | str, **options: object) -> None:
        sv.diff(family.tuned, family.base, path, max_shard_size=size, **options)
        assert path.is_dir() == (size != "5GB")
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert sv.verify(path).facts["verified"]

    write("5GB")
    for size in ("3KB", "8KB", "5GB", "3KB", "5GB", "5GB"):
        before = {file: file.read_bytes() for file in files_of(path)}
        with pytest.raises(sv.UsageError, match="--force"):
            write(size)
        assert before == {file: file.read_bytes() for file in files_of(path)}
        write(size, force=True)
        index = path / INDEX
        if path.is_dir():  # nothing of the larger number of shards before it is left
            count = len(files_of(path))
            names = [f"vector-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
            assert sorted(file.name for file in path.iterdir()) == sorted([*names, index.name])


@pytest.mark.parametrize("holds", ["nothing", "a note", "a model", "an index of a model"])
def test_a_folder_that_holds_no_vector_is_never_replaced(
    holds: str, family, tmp_path: Path
) -> None:
    path = tmp_path / "v.safetensors"
    if holds == "a model":
        save(tmp_path / "model", toy()).rename(path)
    else:
        path.mkdir()
        if holds != "nothing":
            (path / ("note" if holds == "a note" else "model" + INDEX[6:])).write_text("{}")
    before = {file: file.read_bytes() for file in path.iterdir()}
    for size in ("5GB", "3KB"):
        with pytest.raises(sv.UsageError, match="holds no vector"):
            sv.diff(family.tuned, family.base, path, max_shard_size=size, force=True)
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("codec", CODECS)
def test_names_that_clash_with_parts_fall_back_to_dense(codec: str, tmp_path: Path) -> None:
    clashing = ["a", "a.packed", "b", "b.bitmap", "c", "c.values", "c.values.packed", "d", "d.zero"]
    strange = ["", ".packed", "a b/ü 日本", 'q"\\', "skillvec", "skillvec.block"]
    tensors = list(toy()["lm_head.weight"].chunk(len(clashing + strange)))
    base = dict(zip(clashing + strange, tensors, strict=False))
    tuned = {name: tensor * 1.3 for name, tensor in base.items()}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    for size in ("5GB", "1KB"):
        path = tmp_path / f"{size}.safetensors"
        vector = sv.diff(
            tmp_path / "tuned", tmp_path / "base", path, codec=codec, max_shard_size=size
        )
        codecs = {name: entry["codec"] for name, entry in vector.manifest["tensors"].items()}
        assert set(codecs) == set(base)
        for name in ("a", "b", "c", "c.values", ""):
            assert codecs[name] == "dense", name
        if codec == "packed":
            assert codecs["d"] == codecs["a.packed"] == codecs["skillvec"] == "packed"
        sv.apply(tmp_path / "base", path, tmp_path / f"out{size}")
        assert_same_bits(tmp_path / f"out{size}", tuned)
        for name, (delta, *_) in reader.read_vector(path)[1].items():
            assert np.array_equal(delta.ravel(), oracle.delta(tuned[name], base[name])), name


def test_a_tensor_with_the_name_of_a_table_is_refused(tmp_path: Path) -> None:
    for name in ("skillvec.blocks", "skillvec.exceptions", "skillvec.replacements"):
        sides = [save(tmp_path / f"{name}{i}", {name: torch.ones(3) * i}) for i in (1, 2)]
        with pytest.raises(sv.IncompatibleError, match=f"{name}.*reserved"):
            sv.diff(*sides, tmp_path / "v.safetensors")


@pytest.mark.parametrize("old", CODECS[:3])
def test_a_vector_written_again_with_another_codec_is_the_same_vector(
    old: str, tmp_path: Path
) -> None:
    """Values, exceptions, replacements, lineage and labels; and the bytes of the codec's own."""
    wild = planted("BF16", 2000)
    base, tuned = toy() | {"wild": wild[0]}, perturbed(toy(), density=0.3) | {"wild": wild[1]}
    for side in (base, tuned):
        side |= {"steps": torch.arange(3), "same": torch.ones(5), "f16": torch.ones(40).half()}
    tuned["f16"] = tuned["f16"] * 1.1
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    labels = {"method": "grpo", "notes": "as it was", "license": "apache-2.0"}
    first = sv.diff(left, right, tmp_path / "old.safetensors", codec=old, **labels, **WILD)
    sv.apply(right, first, tmp_path / "expected", **WILD)
    for new, size in (("dense", "5GB"), ("sparse", "5GB"), ("packed", "5GB"), ("sparse", "2KB")):
        path = tmp_path / f"{new}{size}.safetensors"
        again = sv.combine(first, output=path, codec=new, max_shard_size=size, **WILD)
        own = {"command", "codec", "digest", "side", "tensors", "exactness"}
        for key in set(first.manifest) - own:
            assert again.manifest[key] == first.manifest[key], key
        assert again.manifest["exactness"] == first.manifest["exactness"]
        assert again.manifest["codec"] == new
        for name, entry in first.manifest["tensors"].items():
            kept = set(entry) - {"codec", "block", "digest"}
            found = again.manifest["tensors"][name]
            assert {k: entry[k] for k in kept} == {k: found[k] for k in kept}, name
        mine, theirs = (reader.read_vector(x)[1] for x in (path, tmp_path / "old.safetensors"))
        for name, parts in theirs.items():
            for one, other in zip(mine[name], parts, strict=True):
                assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), name
        sv.apply(right, again, tmp_path / f"{new}{size}", **WILD)
        assert tensor_data(tmp_path / f"{new}{size}") == tensor_data(tmp_path / "expected")
        assert sv.verify(path).facts["verified"]
        direct = tmp_path / f"direct{new}{size}.safetensors"
        sv.diff(left, right, direct, codec=new, max_shard_size=size, **labels, **WILD)
        chosen = [
            {n: e["codec"] for n, e in reader.read_vector(x)[0]["tensors"].items()}
            for x in (path, direct)
        ]
        if chosen[0] == chosen[1]:  # a probe and a count may differ about the turn to dense
            for one, other in zip(files_of(path), files_of(direct), strict=True):
                assert_same_bits(one, other)
        else:
            assert new == "sparse"


# ---------------------------------------------------------------------------- another target


LAMS = (1.0, -1.0, 0.5, 1.5, 0.3, -0.7)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("lam", LAMS)
def test_another_target_gets_what_the_oracle_says(dtype: str, lam: float, tmp_path: Path) -> None:
    """Bit for bit as the float64 sum rounded to fp32 and on; to one ulp as the sum rounded once.

    The two differ where the fp32 sum comes to lie on the middle of two outputs: with a decimal lam
    and deltas of whole steps (0.3 * 5 steps = 1.5 steps, but for what fp32 loses) on 4 % of values.
    """
    base = toy(0, dtype)
    tuned, target = perturbed(base, 1), perturbed(base, 3)
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        save(tmp_path / name, tensors, shards=3 if name == "target" else 1)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    report = sv.apply(tmp_path / "target", vector, tmp_path / "merged", lam=lam)
    assert report.facts["verdict"] == "same family"
    found = load(tmp_path / "merged")
    off = total = 0
    for name, point in target.items():
        difference = oracle.delta(tuned[name], base[name])
        single = oracle.apply(point, difference, lam, "F32")
        twice = oracle.round_to(oracle.wide(single), dtype).reshape(point.shape)
        assert np.array_equal(bits(found[name]), bits(twice)), name
        steps = oracle.ulps(found[name], oracle.apply(point, difference, lam))
        assert steps.max() <= 1
        off, total = off + int(np.count_nonzero(steps)), total + steps.size
    assert off <= (0.06 * total if lam in (0.3, -0.7) else 0)
    assert sv.verify(tmp_path / "merged").facts["verified"]


@pytest.mark.parametrize("dtype,name", [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_output_dtypes_are_the_oracles(dtype: str, name: str, family, tmp_path: Path) -> None:
    sv.apply(
        family.target, tuned=family.tuned, base=family.base, output=tmp_path / "m", dtype=dtype,
        lam=1.5,
    )  # fmt: skip
    found, target = load(tmp_path / "m"), load(family.target)
    tuned, base = load(family.tuned), load(family.base)
    for key, point in target.items():
        single = oracle.apply(point, oracle.delta(tuned[key], base[key]), 1.5, "F32")
        expected = oracle.round_to(oracle.wide(single), name)
        assert found[key].dtype == TORCH_DTYPE[name]
        assert np.array_equal(bits(found[key]), bits(expected))


def test_minus_one_then_plus_one_in_fp32_returns_to_the_target(family, tmp_path: Path) -> None:
    """target - v is exact to half an fp32 step, so + v comes back to within one."""
    vector = sv.diff(family.tuned, family.base)
    sv.apply(family.target, vector, tmp_path / "less", lam=-1.0, dtype="fp32")
    sv.apply(tmp_path / "less", vector, tmp_path / "again")
    sv.apply(family.base, -1.0 * -vector, tmp_path / "tuned")
    found, target = load(tmp_path / "again"), load(family.target)
    for name in target:
        rounded = oracle.round_to(oracle.wide(found[name]), "BF16")
        assert np.array_equal(bits(rounded), bits(target[name]))
    assert_same_bits(tmp_path / "tuned", family.tuned)


def test_scale_and_lam_multiply(family, tmp_path: Path) -> None:
    vector = sv.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    sv.apply(family.target, 3 * vector, tmp_path / "a", lam=0.5)
    sv.apply(family.target, vector, tmp_path / "b", lam=1.5)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def tensor_data(folder: Path) -> dict[str, bytes]:
    """Return what follows the header in every weight file."""
    data = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        data[file.name] = content[8 + int.from_bytes(content[:8], "little") :]
    return data


@pytest.mark.parametrize("lam", [1.0, 0.5, -1.3])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("onto", ["base", "target"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_pass_gives_the_bytes_of_diff_and_apply(
    lam: float, rounding: str, onto: str, dtype: str, tmp_path: Path
) -> None:
    """Also with -0, NaN and infinities planted, and where diff chose fp32 for its room."""
    wild = planted(dtype, 500)
    quiet = toy(dtype=dtype)
    far = {"far": from_bits(bits(quiet["lm_head.weight"])[::-1].copy(), dtype)}
    base = {"wild": wild[0], "far": quiet["lm_head.weight"].reshape(-1), **quiet}
    tuned = {"wild": wild[1], **far, **perturbed(quiet)}
    for name, tensors in (("base", base), ("tuned", tuned), ("target", perturbed(tuned, 9))):
        save(tmp_path / name, tensors, shards=2 if name == "base" else 1)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors", **WILD)
    request = {"lam": lam, "rounding": rounding, "seed": 3, **WILD}
    two = sv.apply(tmp_path / onto, vector, tmp_path / "two", **request)
    one = sv.apply(
        tmp_path / onto, None, tmp_path / "one", tuned=tmp_path / "tuned", base=tmp_path / "base",
        **request,
    )  # fmt: skip
    assert tensor_data(tmp_path / "one") == tensor_data(tmp_path / "two")
    assert one.facts["changed"] == two.facts["changed"]
    if onto == "base" and lam == 1.0:
        assert_same_bits(tmp_path / "one", tuned)
    sv.verify(tmp_path / "one")


def test_stochastic_rounding_is_right_on_average(tmp_path: Path) -> None:
    """A delta of .3 steps: nearest moves nothing, stochastic 30 % of values, five sigmas."""
    n = 100_000
    base = torch.full((n,), 1.0)
    tuned = base + 0.3 * 2.0**-7
    for name, tensor in (("base", base), ("tuned", tuned), ("target", base.bfloat16())):
        save(tmp_path / name, {"w": tensor})
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base")
    report = sv.apply(tmp_path / "target", vector, tmp_path / "near")
    assert report.facts["changed"] == 0
    assert report.facts["gain"] == 0
    assert any("lam" in warning for warning in report.warnings)
    report = sv.apply(tmp_path / "target", vector, tmp_path / "random", rounding="stochastic")
    p = float(tuned[0] - 1) * 2**7
    assert abs(report.facts["changed"] / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2.0**-16
    other = sv.apply(tmp_path / "target", vector, tmp_path / "other", rounding="stochastic", seed=1)
    assert other.facts["changed"] != 0
    assert not torch.equal(load(tmp_path / "random")["w"], load(tmp_path / "other")["w"])


def test_official_libraries_open_every_file_written(tmp_path: Path) -> None:
    """safe_open, torch and numpy read vector and merged shards, side tensors among them."""
    wild = planted("F16", 500)
    for name, x in (("base", wild[0]), ("tuned", wild[1])):
        save(tmp_path / name, {"x": x, "y": x[:7].clone(), "z": torch.zeros(0)}, shards=2)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors", **WILD)
    sv.apply(tmp_path / "base", vector, tmp_path / "merged", **WILD)
    exactness = vector.manifest["exactness"]
    for file in (tmp_path / "v.safetensors", *(tmp_path / "merged").glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            by_torch = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert_same_bits(by_torch, safetensors.torch.load_file(file))
        by_numpy = safetensors.numpy.load_file(file)
        for name, tensor in by_torch.items():
            assert np.array_equal(bits(tensor), bits(by_numpy[name]))
    stored = load(tmp_path / "v.safetensors")
    sides = {name: tuple(t.shape) for name, t in stored.items() if name.startswith("skillvec.")}
    assert sides["skillvec.replacements"] == (exactness["replacements"], 12)
    assert sides.get("skillvec.exceptions", (0, 8)) == (exactness["exceptions"], 8)
    assert sides["skillvec.blocks"][1] == 12


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_rounded_vector_says_so(dtype: str, family, tmp_path: Path) -> None:
    """Stored values are the rounded differences, and the manifest counts what that loses."""
    vector = sv.diff(family.sft, family.base, tmp_path / "v.safetensors", dtype=dtype)
    name = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    tuned, base = load(family.sft), load(family.base)
    stored = reader.read_vector(tmp_path / "v.safetensors")[1]
    for key in base:
        expected = oracle.round_to(oracle.delta(tuned[key], base[key]), name)
        assert np.array_equal(stored[key][0].ravel(), oracle.wide(expected))
        assert vector.manifest["tensors"][key]["dtype"] == name
    sv.apply(family.base, vector, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    missed = {k: int(np.count_nonzero(bits(merged[k]) != bits(tuned[k]))) for k in tuned}
    assert missed == {k: e.get("unrestored", 0) for k, e in vector.manifest["tensors"].items()}
    assert vector.manifest["exactness"]["claim"] == ("bitwise" if not any(missed.values()) else
                                                     "rounded")  # fmt: skip
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]


@pytest.mark.parametrize("codec", CODECS)
def test_the_stored_delta_is_the_difference(codec: str, family, tmp_path: Path) -> None:
    """Values with exceptions put in are tuned - base in float64, exactly."""
    for number, sides in enumerate([(family.sft, family.base), (family.tuned, family.base)]):
        path = tmp_path / f"{number}.safetensors"
        vector = sv.diff(*sides, path, codec=codec)
        tuned, base = map(load, sides)
        exceptions = 0
        for name, (delta, *_) in reader.read_vector(path)[1].items():
            expected = oracle.delta(tuned[name], base[name])
            assert np.array_equal(delta.ravel(), expected), name
            rounded = oracle.wide(oracle.round_to(expected, "BF16"))
            exceptions += int(np.count_nonzero(rounded != expected))
        assert vector.manifest["exactness"]["exceptions"] == exceptions
        assert exceptions or number


@pytest.mark.parametrize("lam", [1e39, -1e300, float("inf"), float("nan")])
def test_a_lam_that_fp32_cannot_hold_is_refused(lam: float, family, tmp_path: Path) -> None:
    """As an infinity it would write NaN over weights whose delta is zero."""
    with pytest.raises(sv.UsageError):
        sv.apply(family.target, sv.diff(family.tuned, family.base), tmp_path / "m", lam=lam)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("flipped", ["v.safetensors", "merged/model.safetensors", "base"])
def test_verify_finds_one_flipped_bit(flipped: str, family, tmp_path: Path) -> None:
    """The last bit of the last value of the last tensor in the file."""
    for side in ("tuned", "base"):
        save(tmp_path / side, load(getattr(family, side)))
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "base", vector, tmp_path / "merged")
    file = tmp_path / (f"{flipped}/model.safetensors" if flipped == "base" else flipped)
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    last = max((n for n in header if n[:8] != "skillvec"), key=lambda n: header[n]["data_offsets"])
    at = 8 + int.from_bytes(content[:8], "little") + header[last]["data_offsets"][1] - 2
    content[at] ^= 1
    file.write_bytes(content)
    which = tmp_path / ("merged" if "merged" in flipped else "v.safetensors")
    with pytest.raises((sv.VerificationError, sv.FormatError), match=last.removesuffix(".packed")):
        sv.verify(which)


def test_a_target_that_only_looks_like_the_base_is_found_out_while_it_is_read(
    tmp_path: Path,
) -> None:
    """The verdict before the work looks at 4 KiB of the middle; the digest has the last word."""
    base = {"w": torch.randn(300, 300, generator=torch.manual_seed(0)).bfloat16()}
    tuned = {"w": (base["w"].float() + 0.01).bfloat16()}
    near = {"w": base["w"].clone()}
    near["w"][0, 0] += 1
    folders = {
        name: save(tmp_path / name, tensors)
        for name, tensors in {"base": base, "tuned": tuned, "near": near}.items()
    }
    vector = sv.diff(folders["tuned"], folders["base"], tmp_path / "v.safetensors")
    exact = sv.apply(folders["base"], vector, tmp_path / "back")
    assert exact.facts["verdict"] == "exact base" and not exact.warnings
    planned = sv.apply(folders["near"], vector, tmp_path / "out", dry_run=True)
    assert planned.facts["verdict"] == "exact base"
    report = sv.apply(folders["near"], vector, tmp_path / "out")
    assert report.facts["verdict"] == "same family"
    assert any("differs from it in" in warning and "w" in warning for warning in report.warnings)


def test_a_change_outside_the_measured_sample_is_still_a_change(tmp_path: Path) -> None:
    """Gain and counts look at the first 30 Ki values of a block, the status at every byte."""
    base = {"w": torch.ones(200, 300).bfloat16(), "same": torch.ones(8).bfloat16()}
    tuned = {"w": base["w"].clone(), "same": base["same"].clone()}
    tuned["w"][-1, -1] = 2
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    report = sv.apply(right, sv.diff(left, right), tmp_path / "out")
    status = {line["name"]: line["status"] for line in report.ledger}
    assert status == {"w": "applied", "same": "unchanged"}
