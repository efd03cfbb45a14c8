"""Quantised checkpoints against the libraries that make and read them, bit for bit."""

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import from_bits, save_int4
from safetensors.torch import load_file, save_file

import skillvec
from skillvec.checkpoints import dequantized, quantized_format
from skillvec.checkpoints.quantized import dequantised
from skillvec.checkpoints.unread import may_be_weight, unexplained
from skillvec.errors import FormatError, IncompatibleError
from skillvec.files.header import TensorSpec, encode_header, read_header, tensor_nbytes
from skillvec.files.tensors import Source, Viewed, read_values, values_of
from skillvec.files.views import whole

E4M3 = torch.float8_e4m3fn
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def sources_of(folder: Path) -> dict[str, Source]:
    """Return the raw tensors of a folder of safetensors files."""
    found: dict[str, Source] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_header(file).tensors
    return found


def opened(folder: Path) -> tuple[dict[str, Source], dict[str, str]]:
    config = json.loads((folder / "config.json").read_text())
    return dequantised(sources_of(folder), config, "model toy")


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: t.detach().contiguous() for name, t in tensors.items()}
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensor_of(source: Source, block: int = 1 << 20) -> torch.Tensor:
    """Return all the values of a source, read `block` at a time."""
    starts = range(0, source.numel, block)
    parts = [values_of(source, at, min(block, source.numel - at)) for at in starts]
    return from_bits(np.concatenate(parts), source.dtype, source.shape)


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Fail unless dtypes, shapes and bits are equal, but for the payload of NaNs."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(found.isnan(), expected.isnan()), name
    same = torch.where(found.isnan(), 0, found).contiguous().view(torch.uint8)
    assert torch.equal(
        same, torch.where(expected.isnan(), 0, expected).contiguous().view(torch.uint8)
    ), name


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random F8_E4M3 of every pattern but the two that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.where(raw & 127 == 127, raw - 1, raw).view(E4M3)


def scales(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        raw = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
        return raw.view(dtype)
    return (torch.rand(shape, generator=generator) * 0.01 + 1e-4).to(dtype)


def fp8_config(size: list[int] | None, dtype: torch.dtype = torch.bfloat16) -> dict:
    settings = {"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic"}
    return {"dtype": NAMES[dtype], "quantization_config": settings}


def fp8_reference(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)


def limit_reads(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Have tiles of another size, and fail where more than that is read at once."""

    def read(source: Source, begin: int, out: np.ndarray) -> None:
        assert out.size <= tile, f"{out.size} values of {source.name}, tiles of {tile}"
        read_values(source, begin, out)

    monkeypatch.setattr(dequantized, "TILE", tile)
    monkeypatch.setattr(dequantized, "read_values", read)


# ------------------------------------------------------------------------------------------ fp8


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(
    ("shape", "grid", "size", "scale_dtype", "note"),
    [
        ((64, 96), (4, 3), [16, 32], torch.float32, "fp8 blocks 16x32"),
        ((64, 96), (4, 3), [16, 32], torch.bfloat16, "fp8 blocks 16x32"),
        ((64, 96), (4, 3), [16, 32], torch.float16, "fp8 blocks 16x32"),
        ((64, 96), (64, 3), [1, 32], torch.uint8, "fp8 blocks 1x32"),
        ((64, 96), (4, 3), [16, 32], torch.float8_e8m0fnu, "fp8 blocks 16x32"),
        ((64, 96), (), None, torch.float32, "fp8 per tensor"),
        ((64, 96), (1,), None, torch.bfloat16, "fp8 per tensor"),
        ((64, 96), (1, 1), [128, 128], torch.float32, "fp8 per tensor"),
        ((64, 96), (64, 1), None, torch.float32, "fp8 blocks 1x96"),
        ((3, 64, 96), (3, 4, 3), [16, 32], torch.float32, "fp8 blocks 16x32"),
        ((3, 24, 96), (3, 2, 1), [128, 128], torch.float32, "fp8 blocks 12x96"),  # gate, up
        ((3, 64, 96), (3, 1, 1), None, torch.float32, "fp8 blocks 64x96"),
        ((3, 64, 96), (3,), None, torch.float32, "fp8 blocks 64x96"),
        ((3, 64, 96), (1,), None, torch.float32, "fp8 per tensor"),
        ((3, 64, 96), (), [128, 128], torch.bfloat16, "fp8 per tensor"),
    ],
)
def test_fp8_is_what_transformers_makes_of_it(
    tmp_path: Path, dtype, shape, grid, size, scale_dtype, note
):
    weight, scale = codes(*shape), scales(*grid, dtype=scale_dtype)
    plain = "experts.gate_up_proj" if len(shape) == 3 else "layer.weight"
    folder = write(
        tmp_path,
        {plain: weight, f"{plain}_scale_inv": scale, "norm.weight": torch.ones(3)},
        fp8_config(size, dtype),
    )
    tensors, notes = opened(folder)
    assert notes == {plain: note}
    assert sorted(tensors) == sorted([plain, "norm.weight"])
    assert_same(tensor_of(tensors[plain]), fp8_reference(weight, scale, dtype))


@pytest.mark.parametrize("shape", [(40, 56), (57, 31), (16, 33), (192, 32)])
def test_fp8_edge_blocks_are_those_of_compressed_tensors(tmp_path: Path, shape):
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    weight, scale = codes(*shape), scales(-(-shape[0] // 16), -(-shape[1] // 32))
    if shape == (192, 32):  # transformers would take the two rows of scales for halves of 96
        scale = scales(2, 1)
    size = [128, 128] if shape == (192, 32) else [16, 32]
    folder = write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, fp8_config(size))
    reference = FP8BlockDequantizer(targets=["a"], weight_block_size=tuple(size))
    expected = reference.process({"a.weight": weight, "a.weight_scale_inv": scale})
    found = tensor_of(opened(folder)[0]["a.weight"])
    assert_same(found, expected["a.weight"])


def test_fp8_of_every_code_and_every_exponent(tmp_path: Path):
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(E4M3)
    for kind in (torch.uint8, torch.float8_e8m0fnu):
        scale = torch.arange(256, dtype=torch.uint8).reshape(256, 1).view(kind)
        for dtype in NAMES:
            pair = {"a.weight": weight, "a.weight_scale_inv": scale}
            folder = write(tmp_path / f"{kind} {dtype}", pair, fp8_config([1, 256], dtype))
            found = tensor_of(opened(folder)[0]["a.weight"])
            assert_same(found, fp8_reference(weight, scale, dtype), f"{kind} {dtype}")


def test_other_floats_of_8_bits_and_pairs_of_4_as_transformers_reads_them(tmp_path: Path):
    raw = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    kinds = {
        "f8_e5m2": torch.float8_e5m2, "f8_e4m3fnuz": torch.float8_e4m3fnuz,
        "f8_e5m2fnuz": torch.float8_e5m2fnuz, "fp4": torch.int8,
    }  # fmt: skip
    for form, kind in kinds.items():
        weight, scale = raw.view(kind), scales(64, 2)
        folder = write(
            tmp_path / form, {"a.weight": weight, "a.weight_scale_inv": scale}, fp8_config([1, 128])
        )
        found, notes = opened(folder)
        cols = 256 if form == "fp4" else 128
        assert notes == {"a.weight": f"{form} blocks 1x{cols}"}
        expected = fp8_reference(weight, scale, torch.bfloat16)
        assert_same(tensor_of(found["a.weight"]), expected, form)
        assert_same(tensor_of(found["a.weight"], 99), expected, form)


def test_tables_of_small_floats_are_those_of_torch():
    raw = torch.arange(256, dtype=torch.uint8)
    for name, table in dequantized.FP8.items():
        kind = getattr(torch, f"float8_{name[3:].lower()}{'fn' if name == 'F8_E4M3' else ''}")
        assert_same(torch.from_numpy(table), raw.view(kind).float(), name)


def test_any_range_of_values_is_the_same_from_any_thread_and_process(tmp_path: Path, monkeypatch):
    weight, scale = codes(3, 40, 64), scales(3, 3, 2)
    one = {"e": weight, "e_scale_inv": scale}
    source = opened(write(tmp_path, one, fp8_config([16, 32])))[0]["e"]
    source = pickle.loads(pickle.dumps(source))
    every = values_of(source, 0, source.numel)
    edge = np.random.default_rng(0).integers(0, source.numel + 1, (20, 2))
    ranges = [(min(a, b), max(a, b)) for a, b in edge.tolist()]
    for tile in (dequantized.TILE, 100, 40):
        limit_reads(monkeypatch, tile)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda r: values_of(source, r[0], r[1] - r[0]), ranges))
        for (begin, end), part in zip(ranges, parts, strict=True):
            assert np.array_equal(part, every[begin:end]), (tile, begin, end)


def test_fp8_out_of_views(tmp_path: Path):
    weight, scale = codes(40, 64), scales(3, 2)
    folder = write(tmp_path, {"w": weight, "s": scale}, {})
    raw = sources_of(folder)
    views: dict[str, Source] = {
        "a.weight": Viewed("a.weight", "F8_E4M3", whole(raw["w"], (40, 64))),
        "a.weight_scale_inv": Viewed("a.weight_scale_inv", "F32", whole(raw["s"], (3, 2))),
    }
    made, _ = dequantised(views, fp8_config([16, 32]), "toy")
    again = write(
        tmp_path / "plain", {"a.weight": weight, "a.weight_scale_inv": scale}, fp8_config([16, 32])
    )
    assert_same(tensor_of(made["a.weight"]), tensor_of(opened(again)[0]["a.weight"]))


def tiny(kind: str = "llama", **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=64, tie_word_embeddings=False,
        dtype="bfloat16", **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def assert_like_loaded(folder: Path, loaded: torch.nn.Module) -> None:
    tensors, notes = opened(folder)
    expected = loaded.state_dict()
    assert notes and set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert_same(tensor_of(tensors[name]), tensor, name)


def test_a_model_quantised_by_transformers_is_what_it_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    model = tiny()
    size = [16, 32]
    settings = SimpleNamespace(weight_block_size=size, scale_fmt="float")
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith("_proj.weight")
        tensors |= quantise.convert({name: tensor}) if linear else {name: tensor}
    config = model.config.to_dict() | fp8_config(size)
    folder = write(tmp_path, tensors, config)
    assert sum(t.dtype == E4M3 for t in tensors.values()) == 7
    assert_like_loaded(folder, AutoModelForCausalLM.from_pretrained(folder))


# --------------------------------------------------------------------------- compressed-tensors


def scheme_of(kind: str, weights: dict):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=kind)


def ct_config(*groups: tuple[str, dict], dtype: torch.dtype = torch.bfloat16, **more) -> dict:
    """Return a config.json with schemes as compressed-tensors itself writes them."""
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {f"group_{i}": scheme_of(*group) for i, group in enumerate(groups)}
    settings = QuantizationConfig(
        config_groups=schemes, format=groups[0][0], quantization_status="compressed", ignore=[]
    ).model_dump(mode="json")
    settings = json.loads(json.dumps(settings, default=str))
    return {"dtype": NAMES[dtype], "quantization_config": settings | more}


def compressed(
    kind: str, weights: dict, shape: tuple[int, int], scale_dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Compress a random weight; return the state of its module and the decompressed weight."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = scheme_of(kind, weights)
    arguments = scheme.weights
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    block = arguments.block_structure or [1, 1]
    grid = {
        "tensor": (1,), "channel": (rows, 1), "group": (rows, cols // (arguments.group_size or 1)),
        "block": (-(-rows // block[0]), -(-cols // block[1])),
    }[arguments.strategy]  # fmt: skip
    top = 448.0 if arguments.type == "float" else 2.0 ** (arguments.num_bits - 1)
    scale = ((torch.rand(grid, generator=generator) + 0.5) * 0.06 / top).to(scale_dtype)
    state = {
        "weight": (torch.randn(shape, generator=generator) * 0.02).to(scale_dtype),
        "weight_scale": scale,
    }
    if not arguments.symmetric:
        half = 1 << (arguments.num_bits - 1)
        state["weight_zero_point"] = torch.randint(
            -half, half, grid, generator=generator, dtype=torch.int8
        )
    compressor = BaseCompressor.get_value_from_registry(kind)
    state = compressor.compress(state, scheme)
    return state, compressor.decompress(state, scheme)["weight"]


GROUPS = {"type": "float", "strategy": "group", "group_size": 32}
FLOAT4 = GROUPS | {"num_bits": 4}
SMALL = [
    ("nvfp4-pack-quantized", FLOAT4 | {"strategy": "tensor_group", "group_size": 16}),
    ("nvfp4-pack-quantized", FLOAT4 | {"group_size": 16}),
    ("mxfp4-pack-quantized", FLOAT4),
    ("mxfp6-pack-quantized", GROUPS | {"num_bits": 6}),
    ("mxfp8-quantized", GROUPS | {"num_bits": 8, "scale_dtype": "torch.uint8"}),
]  # fmt: skip
NVFP4, MXFP8 = SMALL[0], SMALL[4]


def small_floats(kind: str, weights: dict, rows: int = 64, cols: int = 192) -> dict:
    """Return the state of a module of every code and every exponent, as it is stored."""
    generator = torch.Generator().manual_seed(0)
    size, bits = weights["group_size"], weights["num_bits"]
    raw = torch.randint(0, 256, (rows, cols * bits // 8), generator=generator, dtype=torch.uint8)
    grid = rows, cols // size
    scale = torch.randint(0, 256, grid, generator=generator, dtype=torch.uint8)
    scale.reshape(-1)[:256] = torch.arange(256)[: scale.numel()]
    state = {
        "weight" if bits == 8 else "weight_packed": raw.view(E4M3) if bits == 8 else raw,
        "weight_scale": scale.view(E4M3) if kind.startswith("nvfp4") else scale,
    }
    if weights["strategy"] == "tensor_group":
        state["weight_global_scale"] = torch.tensor([271.3])
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "weights"), SMALL)
def test_small_floats_of_compressed_tensors(tmp_path: Path, kind, weights, dtype, monkeypatch):
    from compressed_tensors.compressors import BaseCompressor

    state, compressor = small_floats(kind, weights), BaseCompressor.get_value_from_registry(kind)
    expected = compressor.decompress(state, scheme_of(kind, weights))["weight"].to(dtype)
    tensors = {f"a.{name}": tensor for name, tensor in state.items()}
    tensors["a.input_global_scale"] = torch.ones(1)
    found, notes = opened(write(tmp_path, tensors, ct_config((kind, weights), dtype=dtype)))
    size = weights["group_size"]
    assert notes["a.weight"] == f"{kind.partition('-')[0]} groups of {size}"
    assert set(found) == {"a.weight"}
    assert_same(tensor_of(found["a.weight"]), expected)
    for tile in (20, 500):
        limit_reads(monkeypatch, tile)
        values = values_of(found["a.weight"], 1234, 999)
        part = expected.reshape(-1)[1234:][:999]
        assert_same(from_bits(values, found["a.weight"].dtype, part.shape), part)


def test_small_floats_as_their_library_compresses_them(tmp_path: Path):
    from compressed_tensors.compressors import BaseCompressor

    generator = torch.Generator().manual_seed(0)
    for number, (kind, weights) in enumerate(SMALL):
        size, given = weights["group_size"], small_floats(kind, weights)
        weight = torch.randn(64, 192, generator=generator).to(torch.bfloat16)
        scale = (weight.reshape(64, -1, size).abs().amax(-1) / 6).float()
        state = {"weight": weight, "weight_scale": scale * (271.3 if "nvfp4" in kind else 1)}
        state |= {k: v for k, v in given.items() if k == "weight_global_scale"}
        scheme = scheme_of(kind, weights)
        compressor = BaseCompressor.get_value_from_registry(kind)
        state = compressor.compress(state, scheme)
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in given.items()}
        folder = write(
            tmp_path / str(number), {f"a.{k}": v for k, v in state.items()},
            ct_config((kind, weights)),
        )  # fmt: skip
        expected = compressor.decompress(state, scheme)["weight"]
        assert_same(tensor_of(opened(folder)[0]["a.weight"]), expected, kind)


UNEVEN = {"symmetric": False}
FLOAT8 = {"num_bits": 8, "type": "float"}
SYMMETRIC = [
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 8}),
    ("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [16, 16]}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("naive-quantized", {"num_bits": 4, "strategy": "group", "group_size": 24}),
    ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 24}),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "actorder": "weight"}),
    ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 24}),
]  # fmt: skip
ASYMMETRIC = [
    (kind, weights | {"symmetric": False})
    for kind, weights in SYMMETRIC
    if "type" not in weights and (kind, weights["strategy"]) != ("pack-quantized", "tensor")
]
OTHERS = [
    ("pack-quantized", {"num_bits": 4, "strategy": "block", "block_structure": [16, 24]}),
    (
        "naive-quantized",
        {"num_bits": 8, "strategy": "block", "block_structure": [16, 24], "symmetric": False},
    ),
] + [
    ("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": 8, "symmetric": even})
    for bits in (1, 2, 3, 5, 6, 7)
    for even in (True, False)
]


def assert_decompressed(folder: Path, kind: str, weights: dict, shape, scale_dtype, dtype) -> str:
    state, expected = compressed(kind, weights, shape, scale_dtype)
    tensors = {f"model.layer.{name}": tensor for name, tensor in state.items()}
    write(folder, tensors, ct_config((kind, weights), dtype=dtype))
    found, notes = opened(folder)
    assert set(found) == {"model.layer.weight"}
    assert_same(tensor_of(found["model.layer.weight"]), expected.to(dtype))
    assert_same(tensor_of(found["model.layer.weight"], 37), expected.to(dtype))
    return notes["model.layer.weight"]


@pytest.mark.parametrize(("kind", "weights"), SYMMETRIC + ASYMMETRIC)
def test_compressed_tensors(tmp_path: Path, kind: str, weights: dict):
    note = assert_decompressed(tmp_path, kind, weights, (36, 72), torch.bfloat16, torch.bfloat16)
    assert ("asymmetric" in note) == (weights.get("symmetric") is False)
    assert note.startswith(
        f"fp{weights['num_bits']}" if "type" in weights else f"int{weights['num_bits']}"
    )


def test_products_are_rounded_to_the_dtype_of_the_scales_first(tmp_path: Path):
    for number, weights in enumerate(({"num_bits": 8, "strategy": "channel"} | UNEVEN, FLOAT8)):
        kind = "float-quantized" if weights is FLOAT8 else "int-quantized"
        folder = tmp_path / str(number)
        assert_decompressed(folder, kind, weights, (64, 64), torch.float16, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("scale_dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(("kind", "weights"), SYMMETRIC + ASYMMETRIC + OTHERS)
def test_compressed_tensors_in_every_dtype(tmp_path: Path, kind, weights, scale_dtype, dtype):
    assert_decompressed(tmp_path, kind, weights, (200, 264), scale_dtype, dtype)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_channels_of_a_width_that_fills_no_word(tmp_path: Path, bits: int):
    weights = {"num_bits": bits, "strategy": "channel", "symmetric": False}
    assert_decompressed(tmp_path, "pack-quantized", weights, (37, 53), torch.float32, torch.float32)


def test_the_width_of_packed_groups_is_known_without_reading(tmp_path: Path):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 24}
    state, _ = compressed("pack-quantized", weights, (36, 72), torch.bfloat16)
    folder = write(
        tmp_path, {f"a.{k}": v for k, v in state.items()}, ct_config(("pack-quantized", weights))
    )
    raw = {
        name: spec._replace(path="/nowhere") if name.endswith("shape") else spec
        for name, spec in read_header(folder / "model.safetensors").tensors.items()
    }
    made, _ = dequantised(raw, json.loads((folder / "config.json").read_text()), "toy")
    assert made["a.weight"].shape == (36, 72)


def test_each_weight_is_read_by_the_group_that_fits_it(tmp_path: Path):
    groups = [
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 24}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 24} | UNEVEN),
    ]  # fmt: skip
    tensors, expected = {"head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}, {}
    for number, group in enumerate(groups):
        state, weight = compressed(*group, (36, 72), torch.bfloat16, seed=number)
        tensors |= {f"layer{number}.{name}": tensor for name, tensor in state.items()}
        expected[f"layer{number}.weight"] = weight
    config = ct_config(*groups)
    config = {"text_config": config, "dtype": "bfloat16"}  # nested, as multimodal models have it
    found, notes = opened(write(tmp_path, tensors, config))
    for name, weight in expected.items():
        assert_same(tensor_of(found[name]), weight, name)
    assert notes == {
        "layer0.weight": "fp8 per channel",
        "layer1.weight": "int4 groups of 24",
        "layer2.weight": "int8 groups of 24, asymmetric",
    }
    assert_same(tensor_of(found["head.weight"]), tensors["head.weight"])


def test_a_model_compressed_by_its_library_is_what_transformers_loads(tmp_path: Path):
    assert_like_loaded(tmp_path, save_int4(tiny(), tmp_path))


# ---------------------------------------------------------------------------------------- mxfp4


def mxfp4_config(dtype: torch.dtype = torch.bfloat16) -> dict:
    return {"dtype": NAMES[dtype], "quantization_config": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mxfp4_of_every_byte_and_every_exponent(tmp_path: Path, dtype, monkeypatch):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(64, 1)
    blocks = blocks.reshape(2, 32, 16, 16)
    scale = torch.arange(1024).reshape(2, 32, 16).to(torch.uint8)
    scale[0] = scale[0].T.reshape(32, 16)
    name = "model.experts.down_proj"
    folder = write(
        tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scale}, mxfp4_config(dtype)
    )
    found, notes = opened(folder)
    expected = convert_moe_packed_tensors(blocks, scale, dtype=dtype)
    assert notes == {name: "mxfp4"}
    assert_same(tensor_of(found[name]), expected)
    for tile in (20, 1000):  # also by single rows and by slabs
        limit_reads(monkeypatch, tile)
        values = values_of(found[name], 12345, 1999)
        part = expected.reshape(-1)[12345:][:1999]
        assert_same(from_bits(values, found[name].dtype, part.shape), part)


def test_a_gpt_oss_model_is_what_transformers_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tiny("gpt_oss", num_local_experts=3, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)
        for part, size, low, high in (
            ("blocks", (*shape, 16), 0, 256),
            ("scales", shape, 110, 125),
        ):
            tensors[f"{name}_{part}"] = torch.randint(
                low, high, size, generator=generator, dtype=torch.uint8
            )
    config = model.config.to_dict() | mxfp4_config()
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head"]
    folder = write(tmp_path, tensors, config)
    assert_like_loaded(folder, AutoModelForCausalLM.from_pretrained(folder))


# ------------------------------------------------------------------------------------- refusals

F8 = {"a.weight": codes(32, 32), "a.weight_scale_inv": scales(2, 2)}
INT4 = ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8})
CHANNEL4 = ("pack-quantized", {"num_bits": 4, "strategy": "channel"})
ZERO4 = ("pack-quantized", INT4[1] | {"symmetric": False})
INT8 = ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False})
TENSOR4 = ("pack-quantized", {"num_bits": 4, "strategy": "tensor", "symmetric": False})
FP8, MXFP4 = fp8_config([16, 16]), mxfp4_config()
AS_INT4, AS_CHANNEL4, AS_ZERO4, AS_INT8 = map(ct_config, (INT4, CHANNEL4, ZERO4, INT8))


def packed(kind: str, weights: dict, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return a compressed layer `a` of 16 x 32, with tensors changed or taken away."""
    state = compressed(kind, weights, (16, 32), torch.bfloat16)[0] | changes
    return {f"a.{name}": tensor for name, tensor in state.items() if tensor is not None}


AS_NVFP4, AS_MXFP8 = map(ct_config, (NVFP4, MXFP8))


def small(
    kind: str = NVFP4[0], weights: dict = NVFP4[1], **changes: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return a layer `a` of small floats, with tensors changed or taken away."""
    state = small_floats(kind, weights) | changes
    return {f"a.{name}": tensor for name, tensor in state.items() if tensor is not None}


def size(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def i8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (F8 | {"a.weight_scale_inv": scales(3, 2)}, FP8, r"\[32, 32\].*\[3, 2\]"),
        (F8 | {"a.weight_scale_inv": scales(2, 2, 2)}, FP8, "does not lie over"),
        (F8 | {"a.weight_scale_inv": scales(32)}, FP8, "does not lie over"),
        (F8 | {"a.weight_scale_inv": i32(2, 2)}, FP8, "I32"),
        (F8 | {"a.weight_scale_inv": torch.ones(2, 0)}, FP8, "and its scales"),
        (F8 | {"a.weight": codes(32)}, FP8, "expected a matrix"),
        ({"a.weight": codes(32, 32)}, FP8, "F8_E4M3 without a.weight_scale_inv"),
        ({"a.weight_scale_inv": scales(2, 2)}, FP8, "without the weight"),
        (F8 | {"a.weight": torch.ones(32, 32)}, FP8, "without the weight"),
        ({"e": codes(2, 24, 8), "e_scale_inv": scales(2, 2, 1)}, FP8, "cannot tell"),
        (packed(*INT4, weight_scale=None), AS_INT4, "I32 without a.weight_scale"),
        (packed(*INT4, weight_packed=None), AS_INT4, "a.weight_scale: without the weight"),
        (packed(*INT4, weight_shape=None), AS_INT4, "expected a.weight_shape"),
        (packed(*INT4, weight_scale=scales(16, 5)), AS_INT4, "4 words hold no 40 columns"),
        (packed(*INT4, weight_scale=scales(15, 4)), AS_INT4, "no floats per group"),
        (packed(*INT4, weight_scale=u8(16, 4)), AS_INT4, "a.weight_scale U8"),
        (packed(*INT4, weight_packed=i32(16, 0)), AS_INT4, "expected I32"),
        (packed(*INT4, weight_packed=u8(16, 16)), AS_INT4, "a.weight_packed U8.*expected I32"),
        (packed(*CHANNEL4, weight_shape=size(16, 33)), AS_CHANNEL4, "words hold no"),
        (packed(*CHANNEL4, weight_shape=size(16, -32)), AS_CHANNEL4, "words hold no"),
        (packed(*CHANNEL4, weight_shape=size(8, 32)), AS_CHANNEL4, "words hold no"),
        (packed(*ZERO4, weight_zero_point=None), AS_ZERO4, "zero_point: found nothing"),
        (packed(*ZERO4), AS_INT4, "zero_point: found I32.*expected nothing"),
        (packed(*ZERO4, weight_zero_point=i32(3, 4)), AS_ZERO4, "found I32"),
        (packed(*INT8, weight_zero_point=i8(16)), AS_INT8, "found I8"),
        (packed(*TENSOR4, weight_zero_point=i32(2, 1)), ct_config(TENSOR4), "found I32"),
        (packed(*INT4, weight_packed=None, weight=i32(16, 4)), AS_INT4, "a.weight I32"),
        (packed(*INT8, weight_scale=None), AS_INT8, "I8 without a.weight_scale"),
        (packed(*INT8), AS_INT4, "expected I32"),
        (packed(*INT4) | {"a.weight": torch.ones(2)}, AS_INT4, "a.weight: also made by"),
        (small(weight_packed=u8(64, 95)), AS_NVFP4, "no groups of 16 of 190 columns"),
        (small(weight_packed=i8(64, 96)), AS_NVFP4, "expected U8 .rows"),
        (small(weight_scale=u8(64, 12)), AS_NVFP4, "weight_scale U8.*expected F8_E4M3 .64, 12"),
        (small(weight_scale=codes(64, 11)), AS_NVFP4, "weight_scale F8_E4M3 .64, 11"),
        (small(weight_scale=None), AS_NVFP4, "U8 without a.weight_scale"),
        (small(weight_global_scale=None), AS_NVFP4, "global_scale: found nothing"),
        (small(weight_global_scale=scales()), AS_NVFP4, r"global_scale: found F32 \[\]"),
        (small(weight_global_scale=scales(2)), AS_NVFP4, r"global_scale: found F32 \[2\]"),
        (small(weight_zero_point=i8(64, 12)), AS_NVFP4, "weight_zero_point: compressed-tensors"),
        (small(weight_packed=None), AS_NVFP4, "global_scale: without the weight"),
        (small(*MXFP8, weight_scale=scales(64, 6)), AS_MXFP8, "weight_scale F32"),
        (small(*MXFP8), AS_NVFP4, "expected U8 .rows"),
        ({"x_blocks": u8(2, 3, 4, 16), "x_scales": u8(2, 3, 5)}, MXFP4, "U8 .2, 3, 5"),
        ({"x_blocks": u8(2, 3, 4, 15), "x_scales": u8(2, 3, 4)}, MXFP4, "expected U8"),
        ({"x_blocks": u8(3, 4, 16), "x_scales": u8(3, 4)}, MXFP4, "expected U8"),
        ({"x_blocks": u8(2, 3, 4, 16)}, MXFP4, "x_blocks: without its scales"),
        ({"x_scales": u8(2, 3, 4)}, MXFP4, "x_scales: without its blocks"),
        ({"x_blocks": u8(1, 1, 1, 16), "x_scales": u8(1, 1, 1), "x": u8(1)}, MXFP4, "x: also"),
    ],
)  # fmt: skip
def test_partners_that_do_not_fit_are_named(tmp_path: Path, tensors, config, message):
    write(tmp_path, tensors, config)
    with pytest.raises(FormatError, match=f"(?s)^model toy: .*{message}"):
        opened(tmp_path)


def ct_changed(**more) -> dict:
    return AS_INT4 | {"quantization_config": AS_INT4["quantization_config"] | more}


def scheme(**more) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8} | more
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        *(
            (F8, {"quantization_config": {"quant_method": method}}, f"quantised \\({method}")
            for method in ("bitsandbytes", "gptq", "awq", "nvfp4", "hqq", "fbgemm_fp8", "modelopt")
        ),
        (F8, {"quantization_config": {"bits": 4}}, "unnamed method"),
        (F8, {"quantization_config": {"quant_method": ["fp8"]}}, "quantised"),
        (F8, {"quantization_config": "fp8"}, "quantised"),
        (F8, FP8 | {"text_config": fp8_config([8, 8])}, "2 quantization_config"),
        (F8, FP8 | {"dtype": "float8"}, "dtype 'float8'"),
        (F8, fp8_config([16]), "weight_block_size"),
        (F8, fp8_config([16, 0]), "weight_block_size"),
        (F8, {}, "in config.json.*a.weight: F8_E4M3"),
        ({"a.weight": codes(4, 4).view(torch.float8_e5m2)}, fp8_config([2, 2]), "F8_E5M2"),
        ({"a.weight_packed": i32(2, 2)}, {}, "a.weight_packed: I32"),
        ({"a.qweight": i32(2, 2)}, {}, "a.qweight: I32"),
        ({"x_blocks": u8(2, 3, 4, 16), "x_scales": u8(2, 3, 4)}, {}, "x_blocks: U8"),
        (packed(*INT4), ct_changed(format="nvfp4", config_groups=scheme()), "format 'nvfp4'"),
        (packed(*INT4), ct_changed(format="dense", config_groups=scheme()), "format 'dense'"),
        (packed(*INT4), ct_changed(config_groups=scheme(num_bits=9)), "at most 8 bits"),
        (packed(*INT4), ct_changed(config_groups=scheme(num_bits=True)), "at most 8 bits"),
        (packed(*INT4), ct_changed(config_groups={"W4A16": ["Linear"]}), "at most 8 bits"),
        (packed(*INT4), ct_changed(config_groups=[1]), "at most 8 bits"),
        (packed(*INT4), ct_changed(transform_config={"groups": [1]}), "transform_config"),
        (packed(*INT4), ct_changed(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
        (packed(*INT4, weight_g_idx=i32(32)), AS_INT4, "a.weight_g_idx"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_refused_by_name(tmp_path: Path, tensors, config, message):
    write(tmp_path, tensors, config)
    with pytest.raises(IncompatibleError, match=f"(?s)^model toy: .*{message}"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "group", "group_size": -1},
        {"strategy": "group", "group_size": "8"},
        {"strategy": "block", "block_structure": [0, 8]},
        {"strategy": "block", "block_structure": "8x8"},
        {"strategy": {"a": 1}},
        {"strategy": "token"},
        {"type": "float"},
        {"type": [1]},
    ],
)
def test_schemes_that_make_no_sense_fit_nothing(tmp_path: Path, changes):
    write(tmp_path, packed(*INT4), ct_changed(config_groups=scheme(**changes)))
    with pytest.raises(FormatError, match=r"a.weight_packed I32 \[16, 4\]: "):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (F8, fp8_config([16, 16]), "weight_block_size"),
        (packed(*INT4), AS_INT4, r"a.weight_packed I32 \[16, 4\]: "),
    ],
)
def test_sizes_larger_than_any_are_none(tmp_path: Path, monkeypatch, tensors, config, message):
    write(tmp_path, tensors, config)
    assert opened(tmp_path)
    assert quantized_format.MAX_SIDE == 1 << 40
    monkeypatch.setattr(quantized_format, "MAX_SIDE", 7)
    with pytest.raises((IncompatibleError, FormatError), match=message):
        opened(tmp_path)


def test_two_groups_that_fit_are_not_guessed_between(tmp_path: Path):
    # 4 words hold 30 columns of 4 bits, and of 3 bits as many as 40
    groups = [CHANNEL4, ("pack-quantized", {"num_bits": 3, "strategy": "channel"})]
    state = packed(*CHANNEL4, weight_packed=i32(16, 1))
    state["a.weight_shape"] = torch.tensor([16, 8])
    write(tmp_path, state, ct_config(*groups))
    with pytest.raises(FormatError, match="more than one config group"):
        opened(tmp_path)


def test_more_than_five_problems_are_counted(tmp_path: Path):
    tensors = {f"layer{i}.weight": codes(2, 2) for i in range(8)}
    write(tmp_path, tensors, fp8_config([2, 2]))
    with pytest.raises(FormatError, match=r"and 3 more"):
        opened(tmp_path)


def test_scales_of_activations_and_caches_are_left_out_and_listed(tmp_path: Path):
    names = ("a.input_scale", "attn.k_scale", "e_activation_scale", "b.weight")
    extra = {name: torch.ones(1) for name in names}
    found, notes = opened(write(tmp_path, F8 | extra, FP8))
    assert set(found) == {"a.weight", "b.weight"}
    assert notes == {
        "a.weight": "fp8 blocks 16x16",
        "a.input_scale": "not a weight: scales activations",
        "e_activation_scale": "not a weight: scales activations",
        "attn.k_scale": "not a weight: scales the KV cache",
    }


def test_what_is_not_quantised_is_left_as_it_is(tmp_path: Path):
    plain = {"a.weight": torch.ones(2, 2), "b.input_scale": torch.ones(1), "c": u8(2)}
    write(tmp_path, plain, {"model_type": "toy"})
    assert opened(tmp_path) == (sources_of(tmp_path), {})
    write(tmp_path / "said", {"a.weight": torch.ones(2, 2)}, FP8)
    assert opened(tmp_path / "said") == (sources_of(tmp_path / "said"), {})


# ------------------------------------------------------------------- what no config explains


def headers(rows: str) -> dict[str, Source]:
    """Return tensors of "name DTYPE sizes" lines, as their headers tell of them."""
    found: dict[str, Source] = {}
    for row in rows.strip().split("\n"):
        name, dtype, *sizes = row.split()
        shape = tuple(map(int, sizes))
        found[name] = TensorSpec(name, dtype, shape, "", 0, tensor_nbytes(dtype, shape))
    return found


# as the libraries write them; the first is the weight, then what belongs to it, then what does not
QUANTISED = {
    "optimum-quanto int8": """
        1.weight._data I8 128 64
        1.weight._scale BF16 128 1
        - 1.bias BF16 128
        - 2.weight BF16 128""",
    "optimum-quanto int4": """
        1.weight._data._data U8 64 64
        1.weight._scale BF16 128 1
        1.weight._shift BF16 128 1
        - 1.bias BF16 128""",
    "int8 of ComfyUI": """
        q.weight I8 64 64
        q.weight_scale F32 64 1
        q.comfy_quant U8 35""",
    "int8 per tensor": """
        q.weight I8 64 64
        q.weight_scale F32""",
    "MLX 4 bits": """
        q.weight U32 64 8
        q.scales F16 64 1
        q.biases F16 64 1
        - q.bias F16 64""",
    "HQQ": """
        q.W_q U8 64 64
        q.scale BF16 128 1
        q.zero BF16 128 1
        q.packing U8 7
        q.unpack_view_dtype U8 11
        q.shape I64 2
        - q.bias BF16 128""",
    "HQQ viewed as floats": """
        q.W_q BF16 64 32
        q.scale BF16 128 1
        q.zero BF16 128 1""",
    "AQLM": """
        q.codes I8 64 8 2
        q.codebooks F16 2 256 1 8
        q.scales F16 64 1 1 1""",
    "torchao flattened": """
        1._weight_qdata I8 128 64
        1._weight_scale F32 128 1
        1._weight_zero_point I8 128 1
        - 1.bias BF16 128""",
    "EETQ": """
        q.weight I8 64 64
        q.weight_scales F16 64""",
    "bitsandbytes int8": """
        q.weight I8 64 64
        q.SCB F32 64""",
    "bitsandbytes nf4": """
        q.weight U8 2048 1
        q.weight.absmax U8 64
        q.weight.nested_absmax F32 1
        q.weight.nested_quant_map F32 256
        q.weight.quant_map F32 16
        q.weight.quant_state.bitsandbytes__nf4 U8 95""",
    "bitsandbytes nf4 stored in bf16": """
        q.weight.quant_state.bitsandbytes__nf4 U8 95
        q.weight BF16 1024 1
        q.weight.absmax F32 64
        q.weight.quant_map F32 16""",
    "GPTQ": """
        q.qweight I32 64 128
        q.qzeros I32 8 16
        q.scales F16 8 128
        q.g_idx I32 512
        - q.bias F16 128""",
    "AWQ": """
        q.qweight I32 512 16
        q.qzeros I32 4 16
        q.scales F16 4 128""",
    "Marlin": """
        q.B I32 32 256
        q.s F16 4 128""",
    "VPTQ": """
        q.indices I16 1 64 128
        q.centroids.weight F16 1 2048
        q.weight_scale F16 512
        q.perm U16 512""",
    "QuIP#": """
        q.Qidxs I64 64 8
        q.SU F16 64
        q.SV F16 64
        q.Wscale F32""",
    "EXL2": """
        q.q_weight I32 64 128
        q.q_scale I32 8 16
        q.q_scale_max F16 8
        q.q_groups I16 16""",
    "EXL3": """
        q.trellis I16 32 32 64
        q.suh F16 512
        q.svh F16 512
        - q.bias F16 512""",
    "NVFP4": """
        q.weight U8 64 32
        q.weight_scale F8_E4M3 64 4
        q.weight_scale_2 F32""",
    "MXFP4": """
        e.gate_up_proj_blocks U8 2 32 2 16
        e.gate_up_proj_scales U8 2 32 2
        - e.gate_up_proj_bias BF16 2 32""",
    "an embedding": """
        token_embedding I8 100 16
        token_embedding_scale F32 100""",
    "a fused projection": """
        x.in_proj_weight I8 96 32
        x.in_proj_weight_scale F32 96
        - x.in_proj_bias F32 0""",
    "names that nobody has used": """
        q.qs U8 4096
        q.d F16 128
        q.m F16 128
        - q.bias F16 64""",
    "others": """
        q.matrix I8 64 32
        q.gain F32 64""",
    "flax": """
        q.kernel I8 64 32
        q.kernel_gain F32 32""",
    "a weight without scales": """
        q.weight I32 64 32
        - k.weight BF16 64 32""",
    "one 8-bit float": """
        q.weight F8_E5M2 64 32
        - k.weight BF16 64 32""",
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_weights_that_nothing_explains_are_refused_with_what_scales_them(kind: str):
    rows = [row.strip() for row in QUANTISED[kind].strip().split("\n")]
    own = headers("\n".join(row for row in rows if row[0] != "-"))
    rest = headers("\n".join([*(row[2:] for row in rows if row[0] == "-"), "norm.weight F32 9"]))
    weight = next(iter(own))
    found = unexplained(rest | own)
    assert set(found) == set(own)
    assert {entry.of for entry in found.values()} <= set(own)
    with pytest.raises(IncompatibleError, match=r"(?s)^model toy: .*nothing in config") as no:
        dequantised(rest | own, {"quantization": {"bits": 4}}, "model toy")
    message = str(no.value)
    assert f"{weight}: {own[weight].dtype}" in message and "(quantization is not read)" in message
    for name in list(own)[1:3]:
        assert name.rpartition(".")[2] in message
    # left out as a whole, it stays as it is; in part, the rest is named
    assert dequantised(rest | own, {}, "model toy", own.__contains__) == (rest | own, {})
    for name in own:
        with pytest.raises(IncompatibleError, match=f"{re.escape(name)}: "):
            dequantised(rest | own, {}, "model toy", (set(own) - {name}).__contains__)


# integer buffers of real models, old and new, with the floats beside them
BUFFERS = """
    h.0.attn.bias U8 1 1 64 64
    h.0.attn.masked_bias F32
    h.1.attn.bias BOOL 1 1 64 64
    transformer.h.0.attn.attention.bias U8 1 1 64 64
    transformer.h.0.attn.attention.masked_bias F32
    transformer.h.0.attn.causal_mask U8 1 1 64 64
    transformer.h.0.attn.scale_attn F32
    gpt_neox.layers.0.attention.bias U8 1 1 64 64
    gpt_neox.layers.0.attention.masked_bias F32
    gpt_neox.layers.0.attention.rotary_emb.inv_freq F32 8
    embeddings.position_ids I64 1 512
    embeddings.token_type_ids I64 1 512
    text_model.embeddings.position_ids I64 1 77
    vision_model.embeddings.position_ids I64 1 50
    vision_model.embeddings.class_embedding F32 768
    logit_scale F32
    position_ids I64 1 77
    video.embeddings.position_ids I64 1 64
    video.embeddings.cls_emb F32 1 1 768
    video.embeddings.position_embedding F32 64 768
    swin.attn.relative_position_index I64 64 64
    swin.attn.relative_position_bias_table F32 225 4
    swinv2.attn.relative_position_index I64 64 64
    swinv2.attn.logit_scale F32 4 1 1
    swinv2.attn.relative_coords_table F32 1 15 15 2
    swinv2.attn.q_bias F32 96
    beit.relative_position_bias.relative_position_index I64 197 197
    beit.relative_position_bias.relative_position_bias_table F32 732 12
    levit.attention_bias_idxs I64 49 49
    levit.attention_biases F32 4 49
    bn.num_batches_tracked I64
    bn.running_mean F32 8
    layers.0.mlp.gate.tid2eid I64 1000 6
    layers.0.mlp.gate.weight F32 8 64
    layers.0.mlp.gate.e_score_correction_bias F32 8
    layers.0.mlp.expert_map I32 256
    layers.0.mlp.physical_to_logical_map I64 58 288
    layers.0.mlp.router_scale F32 8
    latent_stats_num_updates I64
    latent_mean F32 32
    vision_model.summary_idxs I64 2
    codec.quantizer.codebook_offsets I64 8
    codec.quantizer.codebook F32 8 1024 64
    codec.quantizer.cluster_size F32 8
    generation.suppress_tokens I64 90
    esm.af2_to_esm I64 66
    esm.residx_atom37_to_atom14 I64 21 37
    esm.lit_scale F32
    series.lags_seq I64 70
    series.loc F32
    optimizer.step I64
    rng_state U8 5056
"""


def test_integer_buffers_are_no_weights():
    for dtype in ("U8", "I32", "I64"):
        tensors = headers(re.sub(r"\b[IU](8|32|64)\b", dtype, BUFFERS))
        assert unexplained(tensors) == {}
        assert dequantised(tensors, {}, "model toy") == (tensors, {})
        integers = [n for n, t in tensors.items() if t.dtype == dtype and t.numel > 1]
        assert not any(may_be_weight(name, tensors[name]) for name in integers)


def tower() -> dict[str, torch.Tensor]:
    """Return a model whose visual tower nothing explains: dtypes that are not taken, and int8."""
    generator = torch.Generator().manual_seed(7)
    made = {
        "q.weight": torch.randn(32, 16, generator=generator).bfloat16(),
        "norm.weight": torch.ones(16).bfloat16(),
        "visual.a.weight": codes(16, 16),
        "visual.a.weight_scale": scales(16, 1),
        "visual.b.weight": codes(16, 16).view(torch.float8_e5m2),
        "visual.c.weight": torch.randint(-9, 9, (16, 16), generator=generator, dtype=torch.int8),
        "visual.c.gain": scales(16, 1, dtype=torch.float16),
        "visual.c.bias": torch.zeros(16),
        "visual.d": torch.randn(3, 5, generator=generator).to(torch.complex64),
        "visual.e": scales(4, dtype=torch.float8_e8m0fnu),
    }
    return made


def with_f4(path: Path) -> Path:
    """Add a tensor of 4 bits a value to a file, which torch cannot save."""
    header = read_header(path)
    content = path.read_bytes()
    layout = [(s.name, s.dtype, s.shape) for s in header.tensors.values()]
    head = encode_header([*layout, ("visual.f", "F4", (3, 4))], header.metadata)
    path.write_bytes(head + content[header.data_start :] + b"\1\2\3\4\5\6")
    return path


def raw_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    held = path.read_bytes()
    return {
        s.name: (s.dtype, s.shape, held[s.start : s.start + s.nbytes])
        for s in read_header(path).tensors.values()
    }


@pytest.fixture
def towers(tmp_path: Path) -> SimpleNamespace:
    base = tower()
    tuned = base | {
        "q.weight": base["q.weight"] + 0.125,
        "visual.c.weight": base["visual.c.weight"] + 1,
    }
    for name, tensors in (("base", base), ("tuned", tuned), ("plain", {})):
        tensors = {k: v for k, v in (tensors or base).items() if name != "plain" or k[0] != "v"}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return SimpleNamespace(
        base=with_f4(tmp_path / "base.safetensors"), tuned=with_f4(tmp_path / "tuned.safetensors"),
        v=tmp_path / "v.safetensors", out=tmp_path / "out.safetensors",
        plain=tmp_path / "plain.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize("chosen", [{"exclude": ["visual.*"]}, {"include": ["q.*", "norm.*"]}])
def test_what_is_left_out_is_passed_through_byte_for_byte(towers, chosen):
    with pytest.raises(IncompatibleError, match=r"visual.e: F8_E8M0 \[4\]"):
        skillvec.diff(towers.tuned, towers.base, towers.v)
    skillvec.diff(towers.tuned, towers.base, towers.v, **chosen)
    assert skillvec.verify(towers.v).facts["verified"]
    report = skillvec.apply(towers.base, towers.v, towers.out)  # the vector says what it left out
    assert skillvec.verify(towers.out).facts["verified"]
    base, tuned, out = (raw_bytes(path) for path in (towers.base, towers.tuned, towers.out))
    assert out == base | {"q.weight": tuned["q.weight"]}
    lines = {line["name"]: (line["dtype"], line["shape"]) for line in report.ledger}
    assert lines["visual.a.weight"] == ("F8_E4M3", [16, 16]) and lines["visual.f"] == ("F4", [3, 4])
    # in one pass, and from a pair that can be read
    again = towers.out.with_name("again.safetensors")
    sides = {"tuned": towers.tuned, "base": towers.base}
    skillvec.apply(towers.base, None, again, **sides, **chosen)
    assert raw_bytes(again) == out and skillvec.verify(again).facts["verified"]
    skillvec.diff(towers.plain, towers.plain, towers.v, force=True)
    with pytest.raises(IncompatibleError, match=r"visual.f: F4"):
        skillvec.apply(towers.base, towers.v, towers.out, force=True)
    skillvec.apply(towers.base, towers.v, towers.out, force=True, **chosen)
    assert raw_bytes(towers.out) == base
    (note,) = skillvec.open_checkpoint(towers.base, "model", lambda n: n[0] == "v").facts["notes"]
    assert note.startswith("7 tensors stay as they are")


def test_what_scales_a_weight_is_left_out_with_it(towers):
    globs = ["visual.[!c]*", "visual.c.weight"]
    with pytest.raises(IncompatibleError, match=r"visual.c.gain: F16 \[16, 1\], belongs to vis"):
        skillvec.diff(towers.tuned, towers.base, towers.v, exclude=globs)
    skillvec.diff(towers.tuned, towers.base, towers.v, exclude=[*globs, "visual.c.gain"])
    assert set(skillvec.SkillVector.open(towers.v).deltas) == {
        "q.weight", "norm.weight", "visual.c.bias",
    }  # fmt: skip


def test_leaving_out_is_advised_where_it_can_be_done(towers):
    with pytest.raises(IncompatibleError, match="or leave them out"):
        skillvec.diff(towers.tuned, towers.base, towers.v)
    with pytest.raises(IncompatibleError, match="TUNED::BASE is taken whole"):
        skillvec.combine(f"{towers.tuned}::{towers.base}")
    for use in (
        lambda: skillvec.open_checkpoint(towers.base),
        lambda: skillvec.import_patch(towers.plain, towers.base, towers.v),
    ):
        with pytest.raises(IncompatibleError, match=r"visual.f: F4") as refused:
            use()
        assert "--exclude" not in str(refused.value)


def test_an_open_model_does_not_lose_what_it_was_opened_without(towers):
    opened = skillvec.open_checkpoint(towers.base, "model", lambda name: name[0] == "v")
    skillvec.diff(towers.plain, towers.plain, towers.v)
    for use in (
        lambda: skillvec.diff(opened, opened, towers.v, force=True),
        lambda: skillvec.apply(opened, towers.v, towers.out),
    ):
        with pytest.raises(IncompatibleError, match="nothing says how to read it"):
            use()
    skillvec.apply(opened, towers.v, towers.out, exclude=["visual.*"])
    assert raw_bytes(towers.out) == raw_bytes(towers.base)


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("gate.expert_ids", (8, 6), True),
        ("attn.bias", (1, 1, 8, 8), True),
        ("num_batches_tracked", (), True),
        ("q.codes", (8, 8), False),
        ("q.matrix", (8, 8), False),
    ],
)
def test_integers_that_differ_are_side_tensors_only_where_they_are_no_codes(
    tmp_path: Path, name: str, shape: tuple[int, ...], taken: bool
):
    files = [tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"]
    for i, file in enumerate(files):
        held = {"k.weight": torch.ones(4, 4), name: torch.full(shape, i, dtype=torch.int64)}
        save_file(held, file)
    if not taken:
        with pytest.raises(IncompatibleError, match=rf"{name} I64 \[8, 8\]: integers that differ"):
            skillvec.diff(*files, tmp_path / "v.safetensors")
        skillvec.diff(files[0], files[0], tmp_path / "v.safetensors")  # the same codes
        return
    skillvec.diff(*files, tmp_path / "v.safetensors")
    assert skillvec.SkillVector.open(tmp_path / "v.safetensors").manifest["differing"] == [name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_buffer_of_any_model_of_transformers_is_taken_for_a_weight():
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        name: made
        for table in vars(modeling_auto)
        if table.endswith("MAPPING_NAMES")
        for made in getattr(modeling_auto, table).values()
        for name in (made if isinstance(made, tuple | list) else (made,))
    }
    dtypes = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "U8"}
    built = integers = 0
    for name in sorted(kinds):
        kind = getattr(transformers, name, None)
        try:
            with torch.device("meta"):
                try:
                    model = kind(kind.config_class(num_hidden_layers=2))
                except Exception:  # no such key, or others go with it
                    model = kind(kind.config_class())
        except Exception:  # needs another library, or has no default
            continue
        state = model.state_dict()
        tensors = {
            n: TensorSpec(n, dtypes.get(t.dtype, "F32"), tuple(t.shape), "", 0, 0)
            for n, t in state.items()
        }
        assert unexplained(tensors) == {}, name
        built += 1
        integers += any(t.dtype != "F32" and t.numel > 1 for t in tensors.values())
    assert built > 1000 and integers > 20


# --------------------------------------------------------------------------------- complex numbers


def test_complex_numbers_pass_through_where_they_are_equal(tmp_path: Path):
    turns = torch.polar(torch.ones(4, 4), torch.randn(4, 4))
    given = {"w.weight": torch.randn(8, 8), "freqs_cis": turns, "one": turns[0, 0].clone()}
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    save_file(given, files[0])
    save_file(given | {"w.weight": given["w.weight"] + 0.1}, files[1])
    skillvec.diff(files[1], files[0], files[2])
    skillvec.verify(files[2])
    skillvec.apply(files[0], files[2], files[3])
    skillvec.verify(files[3])
    found, expected = load_file(files[3]), load_file(files[1])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["freqs_cis"].dtype == torch.complex64
    save_file(given | {"freqs_cis": turns * 2, "w.weight": given["w.weight"] + 0.1}, files[4])
    with pytest.raises(IncompatibleError, match=r"freqs_cis C64 \[4, 4\]: values that differ"):
        skillvec.diff(files[4], files[0], files[2], force=True)
    skillvec.diff(files[4], files[0], files[2], force=True, exclude=["freqs_cis"])
    skillvec.apply(files[0], files[2], files[3], force=True)
    assert torch.equal(load_file(files[3])["freqs_cis"], turns)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_floats_that_no_config_explains_are_refused_or_left_out(tmp_path: Path, kind):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    held = {"w.weight": torch.ones(4, 4), "x": torch.arange(16, dtype=torch.uint8).view(kind)}
    save_file(held, files[0])
    with pytest.raises(IncompatibleError, match=r"x: F8_E\dM\dFNUZ \[16\]"):
        skillvec.diff(files[0], files[0], files[1])
    skillvec.diff(files[0], files[0], files[1], exclude=["x"])
    skillvec.apply(files[0], files[1], files[2], exclude=["x"])
    skillvec.verify(files[2])
    assert torch.equal(load_file(files[2])["x"].view(torch.uint8), held["x"].view(torch.uint8))
