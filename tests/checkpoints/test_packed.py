"""MLX, torchao and optimum-quanto: what they saved, against what they read of it, bit for bit.

The files of tests/data/quantised were made by these libraries (make.py says by which versions).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import from_bits
from safetensors.torch import load_file, save_file

import skillvec
from skillvec.checkpoints import dequantized
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.quantized import dequantised
from skillvec.errors import FormatError, IncompatibleError
from skillvec.files.header import read_header
from skillvec.files.tensors import Source, read_values, values_of

HERE = Path(__file__).parents[1] / "data" / "quantised"
Weights = dict[str, torch.Tensor]


class Saved:
    """What a library saved: tensors of the file, what it reads of them, metadata and config."""

    def __init__(self, name: str) -> None:
        header = read_header(HERE / f"{name}.safetensors")
        self.tensors: dict[str, Source] = dict(header.tensors)
        held: Weights = load_file(HERE / f"{name}.safetensors")
        self.expected = {
            key.removeprefix("expected."): held[key] for key in list(held) if "expected" in key
        }
        for key in self.expected:
            del self.tensors[f"expected.{key}"]
        self.held = {key: held[key] for key in self.tensors}
        self.metadata = header.metadata
        self.config = json.loads((HERE / f"{name}.json").read_text())
        if name == "quanto":
            self.config = {"quantization_config": {"quant_method": name, "map": self.config}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.expected.items()}

    def opened(self) -> tuple[dict[str, Source], dict[str, str]]:
        return dequantised(
            self.tensors, self.config, "toy", headers=self.metadata, shapes=self.shapes
        )


def assert_read(source: Source, expected: torch.Tensor, step: int) -> None:
    starts = range(0, source.numel, step)
    parts = [values_of(source, at, min(step, source.numel - at)) for at in starts]
    found = from_bits(np.concatenate(parts), source.dtype, source.shape)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), source.name
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), source.name


@pytest.mark.parametrize(("name", "count"), [("mlx", 36), ("torchao", 16), ("quanto", 36)])
def test_a_file_of_a_library_is_what_it_reads_of_it(name: str, count: int, monkeypatch):
    saved = Saved(name)
    found, notes = saved.opened()
    assert set(found) == set(saved.expected) and len(found) == count
    assert {key for key in notes if not notes[key].startswith("not a weight")} == set(found)
    for step, tile in ((1 << 20, dequantized.TILE), (37, dequantized.TILE), (1 << 20, 60)):
        monkeypatch.setattr(dequantized, "TILE", tile)
        for key, expected in saved.expected.items():
            assert_read(found[key], expected, step)


def test_no_more_than_a_tile_is_read_at_a_time(monkeypatch):
    def read(source: Source, begin: int, out: np.ndarray) -> None:
        assert out.size <= 100, source.name
        read_values(source, begin, out)

    monkeypatch.setattr(dequantized, "TILE", 100)
    monkeypatch.setattr(dequantized, "read_values", read)
    for name in ("mlx", "torchao", "quanto"):
        saved = Saved(name)
        for key, source in saved.opened()[0].items():
            assert_read(source, saved.expected[key], 1 << 20)


# ---------------------------------------------------------------------------- as base and target


def folder_of(path: Path, saved: Saved, name: str) -> Path:
    path.mkdir()
    save_file(saved.held, path / "model.safetensors", saved.metadata)
    config = {} if name == "quanto" else saved.config
    (path / "config.json").write_text(json.dumps({"model_type": "toy"} | config))
    if name == "quanto":
        shutil.copy(HERE / "quanto.json", path / "quanto_qmap.json")
    return path


@pytest.mark.parametrize("name", ["mlx", "torchao", "quanto"])
def test_such_a_model_is_base_and_target(tmp_path: Path, name: str, monkeypatch):
    saved = Saved(name)
    monkeypatch.setattr("skillvec.checkpoints.model_classes.shapes_of", lambda *_: saved.shapes())
    target = folder_of(tmp_path / "target", saved, name)
    tuned = tmp_path / "tuned.safetensors"
    save_file({key: weight * 1.5 for key, weight in saved.expected.items()}, tuned)
    skillvec.diff(tuned, target, tmp_path / "v.safetensors")
    skillvec.verify(tmp_path / "v.safetensors")
    report = skillvec.apply(target, tmp_path / "v.safetensors", tmp_path / "out")
    skillvec.verify(tmp_path / "out")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(tuned)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], weight) for key, weight in wanted.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "quantization"} & set(said)
    metadata = read_header(tmp_path / "out" / "model.safetensors").metadata
    assert set(metadata) == {"format", "skillvec"}
    assert "tensor_names" not in metadata and report.facts["verdict"] == "exact base"


def test_the_shapes_of_groups_are_those_of_the_models_class(tmp_path: Path):
    from transformers import AutoConfig

    saved = Saved("quanto")
    module = "qint4_bfloat16_160"
    parts = {key.replace(module, "lm_head"): t for key, t in saved.held.items() if module in key}
    (tmp_path / "m").mkdir()
    save_file(parts, tmp_path / "m" / "model.safetensors")
    said = {"lm_head": {"weights": "qint4", "activations": "none"}}
    (tmp_path / "m" / "quanto_qmap.json").write_text(json.dumps(said))
    config = AutoConfig.for_model(
        "llama", hidden_size=160, intermediate_size=8, num_hidden_layers=1, vocab_size=5,
        num_attention_heads=2, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m")
    assert_read(found["lm_head.weight"], saved.expected[f"{module}.weight"], 1 << 20)
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"25 groups of 32 .* shape .*, which is not known"):
        open_checkpoint(tmp_path / "m")


# --------------------------------------------------------------------------------------- refusals


def refused(
    error: type[Exception], message: str, tensors: Weights, config: dict[str, Any],
    path: Path, metadata: dict[str, str] | None = None,
) -> None:  # fmt: skip
    save_file(tensors, path / "m.safetensors", metadata)
    held = read_header(path / "m.safetensors")
    with pytest.raises(error, match=f"(?s)^toy: .*{message}"):
        dequantised(held.tensors, config, "toy", headers=held.metadata)


def i32(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint32)


AFFINE = {"a.weight": i32(4, 8), "a.scales": torch.ones(4, 2), "a.biases": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"bits": 5}, "no groups of 32 of 5 bits"),
        ({}, {"bits": 9}, "9 bits in groups of 32"),
        ({}, {"group_size": 0}, "4 bits in groups of 0"),
        ({}, {"group_size": 64}, r"F32 \[4, 2\], F32 \[4, 2\], expected floats \[4, 1\]"),
        ({}, {"a": {"bits": 8, "group_size": 32}}, r"expected floats \[4, 1\]"),
        ({"a.scales": torch.ones(4, 3)}, {}, r"F32 \[4, 3\]"),
        ({"a.biases": torch.ones(4, 2).half()}, {}, r"F16 \[4, 2\]"),
        ({"a.scales": i32(4, 2), "a.biases": i32(4, 2)}, {}, r"U32 \[4, 2\]"),
        ({"a.weight": i32(8)}, {}, "no groups"),
        ({"a.scales": None}, {}, "a.weight: U32 without a.scales and a.biases"),
        ({"a.weight": None}, {}, "a.scales: without the weight"),
    ],
)
def test_mlx_that_does_not_fit_is_named(tmp_path: Path, changes, settings, message):
    tensors = {key: t for key, t in (AFFINE | changes).items() if t is not None}
    config = {"quantization": {"group_size": 32, "bits": 4} | settings}
    refused(FormatError, message, tensors, config, tmp_path)


def test_other_modes_of_mlx_are_refused_by_name(tmp_path: Path):
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    refused(IncompatibleError, "mode 'mxfp4' of mlx", AFFINE, config, tmp_path)


def of_torchao(kind: str = "Int8Tensor", **more: Any) -> dict[str, str]:
    said = {"block_size": [1, 8], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}} | more
    parts = said.pop("parts", ["qdata", "scale", "zero_point"])
    return {"a.weight": json.dumps({"_type": kind, "_data": said, "_tensor_data_names": parts})}


AFFINE8 = {
    "a._weight_qdata": torch.ones(4, 8, dtype=torch.int8), "a._weight_scale": torch.ones(4, 1),
    "a._weight_zero_point": torch.ones(4, 1, dtype=torch.int8),
}  # fmt: skip
AS_TORCHAO = {"quantization_config": {"quant_method": "torchao"}}


@pytest.mark.parametrize(
    ("changes", "said", "message"),
    [
        ({}, of_torchao(block_size=[1, 3]), "block|expected floats"),
        ({}, of_torchao(block_size=[1, 4]), r"F32 \[4, 1\], expected floats \[4, 2\]"),
        ({}, of_torchao(block_size=8), "in blocks of 8"),
        ({}, of_torchao(dtype={"_data": "float64"}), "for F64"),
        ({"a._weight_scale": None}, of_torchao(), "some of its tensors are missing"),
        ({"a._weight_zero_point": torch.ones(4, 1)}, of_torchao(), "zero_point F32"),
        ({"a._weight_qdata": torch.ones(4, 8)}, of_torchao(), r"F32 \[4, 8\] in blocks"),
    ],
)
def test_torchao_that_does_not_fit_is_named(tmp_path: Path, changes, said, message):
    tensors = {key: t for key, t in (AFFINE8 | changes).items() if t is not None}
    refused(FormatError, message, tensors, AS_TORCHAO, tmp_path, said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (of_torchao("NVFP4Tensor"), "a.weight: torchao's NVFP4Tensor.*expected one of Int8Tensor"),
        (of_torchao(parts=["qdata", "scale", "act_pre_scale"]), "act_pre_scale"),
        ({"format": "pt"}, "a._weight_qdata: I8"),  # the header says nothing of it
    ],
)
def test_what_torchao_has_beside_is_refused_by_name(tmp_path: Path, said, message):
    refused(IncompatibleError, message, AFFINE8, AS_TORCHAO, tmp_path, said)


GROUPS = {
    "a.weight._data._data": torch.ones(2, 32, dtype=torch.uint8),
    "a.weight._scale": torch.ones(4, 1), "a.weight._shift": torch.ones(4, 1),
}  # fmt: skip
ROWS = {"a.weight._data": torch.ones(4, 8, dtype=torch.int8), "a.weight._scale": torch.ones(4, 1)}


@pytest.mark.parametrize(
    ("tensors", "changes", "kind", "message"),
    [
        (GROUPS, {}, "qint4", "4 groups of 32 in the shape .*, which is not known"),
        (GROUPS, {}, "qint2", "expected U8 of 4 groups of 2 bits"),
        (GROUPS, {"a.weight._shift": torch.ones(4)}, "qint4", r"_shift F32 \[4\]"),
        (GROUPS, {"a.weight._scale": torch.ones(4)}, "qint4", r"_scale F32 \[4\]"),
        (GROUPS, {"a.weight._shift": None}, "qint4", "the map says qint4"),
        (ROWS, {"a.weight._scale": torch.ones(8, 1)}, "qint8", r"_scale F32 \[8, 1\]"),
        (ROWS, {}, "qfloat8", "expected qint2.* the map says qfloat8"),
        (ROWS, {}, "qint99", "the map says qint99"),
        (ROWS, {}, None, "the map says nothing"),
    ],
)
def test_quanto_that_does_not_fit_is_named(tmp_path: Path, tensors, changes, kind, message):
    tensors = {key: t for key, t in (tensors | changes).items() if t is not None}
    said = {} if kind is None else {"a": {"weights": kind}}
    config = {"quantization_config": {"quant_method": "quanto", "map": said}}
    refused(FormatError, message, tensors, config, tmp_path)
