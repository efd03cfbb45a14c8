"""The values of a vector by name: every kind, rows, scale, streaming, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import skillvec as sv
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.vectors.vector import SkillVector

NAME, WIDE, STILL = "model.layers.0.q_proj.weight", "wide.weight", "still.bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of an fp32, an fp64 and an unchanged tensor, their vector, an adapter, a patch."""
    folder, rng = tmp_path_factory.mktemp("values"), np.random.default_rng(0)
    base = {
        NAME: rng.standard_normal((6, 4), np.float32), WIDE: rng.standard_normal((3, 2, 5)),
        STILL: np.zeros(3, np.float32), "scalar": np.float32([1]).reshape(()),
    }  # fmt: skip
    tuned = base | {
        name: np.asarray(base[name] + base[name] ** 2) for name in (NAME, WIDE, "scalar")
    }
    tuned[NAME][2:] = base[NAME][2:]
    for side, tensors in {"base": base, "tuned": tuned}.items():
        (folder / side).mkdir()
        save_file(tensors, folder / side / "model.safetensors")
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    sv.export_patch(folder / "v.safetensors", folder / "patch.safetensors")
    (folder / "adapter").mkdir()
    stem = f"base_model.model.{NAME.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": np.float32([[1, 2, 3, 4]]),
               f"{stem}.lora_B.weight": np.arange(6, dtype=np.float32)[:, None]}  # fmt: skip
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return folder


def difference(folder: Path, name: str) -> np.ndarray:
    from safetensors.numpy import load_file

    tuned, base = (load_file(folder / side / "model.safetensors") for side in ("tuned", "base"))
    return np.asarray(tuned[name] - base[name])


@pytest.mark.parametrize("codec", ["dense", "sparse", "packed"])
def test_a_stored_vector_gives_its_differences(folder: Path, tmp_path: Path, codec: str) -> None:
    stored = SkillVector.open(folder / "v.safetensors").save(
        tmp_path / "w.safetensors", codec=codec
    )
    assert list(stored) == list(stored.keys()) == [name for name, _ in stored.items()]
    assert len(stored) == 4 and NAME in stored and "absent" not in stored
    for name, values in stored.items():
        expected = difference(folder, name)
        assert values.dtype == expected.dtype and values.shape == expected.shape
        assert values.tobytes() == expected.tobytes() == stored[name].tobytes()
    codecs = [delta.codec for delta in stored.deltas.values()]
    assert codec in codecs and (codec == "dense" or stored.deltas[STILL].is_zero)


def test_a_tensor_times_the_scale_is_what_a_saved_multiple_holds(
    folder: Path, tmp_path: Path
) -> None:
    vector = -0.7 * SkillVector.open(folder / "v.safetensors")
    saved = vector.save(tmp_path / "v.safetensors")
    for name, values in vector.items():
        assert values.tobytes() == saved[name].tobytes()
    assert not np.signbit(vector[STILL]).any()
    with pytest.raises(sv.NonfiniteError, match=r"1e\+39 times it is beyond the range"):
        _ = (1e39 * saved)[NAME]


def test_every_kind_of_vector_is_read_alike(folder: Path, tmp_path: Path) -> None:
    stored = SkillVector.open(folder / "v.safetensors")
    pair = SkillVector.between(folder / "tuned", folder / "base")
    patch = SkillVector.patched(folder / "patch.safetensors", folder / "base")
    adapter = SkillVector.between(folder / "adapter", folder / "base")
    for name in stored:
        expected = stored[name]
        assert pair[name].tobytes() == patch[name].tobytes() == expected.tobytes()
        both = (2 * stored + pair)[name]
        assert both.dtype == expected.dtype and np.allclose(both, 3 * expected, rtol=1e-6)
    product = 2 * np.outer(np.arange(6), [1, 2, 3, 4])
    assert (adapter[NAME] == product).all() and not adapter[STILL].any()
    assert (adapter[NAME, 4:] == product[4:]).all()
    saved = adapter.save(tmp_path / "adapter.safetensors")
    assert saved[NAME].tobytes() == adapter[NAME].tobytes()


@pytest.mark.parametrize("op", ["ties", "breadcrumbs", "della"])
def test_what_an_operator_measures_is_measured_first(folder: Path, tmp_path: Path, op: str) -> None:
    pair = SkillVector.between(folder / "tuned", folder / "base")
    adapter = SkillVector.between(folder / "adapter", folder / "base")
    merged = sv.combine(pair, adapter, op=op, parameters={"density": 0.5})
    assert any(mix.passes for mix in merged.mixes())
    saved = merged.save(tmp_path / "v.safetensors")
    for name, values in merged.items():
        assert values.tobytes() == merged[name].tobytes() == saved[name].tobytes()


def test_rows_are_those_of_the_whole(folder: Path) -> None:
    vector = 0.3 * SkillVector.open(folder / "v.safetensors")
    for name in (NAME, WIDE):
        for rows in (slice(1, 3), slice(None), slice(-2, None), slice(2, 1), slice(1, 99)):
            part = vector[name, rows]
            assert part.shape == vector[name][rows].shape
            assert part.tobytes() == vector[name][rows].tobytes()
    for name, rows, why in (("scalar", slice(1), "a number has none"), (NAME, slice(0, 4, 2), "2")):
        with pytest.raises(sv.UsageError, match=why):
            _ = vector[name, rows]


def test_rows_are_read_alone_and_the_whole_is_held_against_its_digest(tmp_path: Path) -> None:
    rows, width = 5 * BLOCK_NUMEL // 2 // 1024, 1024
    tuned = np.random.default_rng(1).integers(0, 9, (rows, width)).astype(np.float32)
    for side, values in {"tuned": tuned, "base": 0 * tuned}.items():
        (tmp_path / side).mkdir()
        save_file({NAME: values}, tmp_path / side / "model.safetensors")
    file = tmp_path / "v.safetensors"
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", file, codec="packed")
    across = slice(1000, 1030)  # of both the first block and the second
    assert vector[NAME, across].tobytes() == tuned[across].tobytes()
    spec = vector.deltas[NAME].spec
    with file.open("r+b") as opened:  # the middle of the first block
        opened.seek(spec.start + spec.nbytes // 5)
        opened.write(b"\xff" * 64)
    assert vector[NAME, 1024:].tobytes() == tuned[1024:].tobytes()
    with pytest.raises(sv.FormatError, match=r"altered"):
        _ = vector[NAME]
    file = tmp_path / "d.safetensors"
    dense = sv.diff(tmp_path / "tuned", tmp_path / "base", file, codec="dense")
    with file.open("r+b") as opened:
        opened.seek(dense.deltas[NAME].spec.start)
        opened.write(b"\x01")
    assert dense[NAME, 1:].tobytes() == tuned[1:].tobytes()
    with pytest.raises(sv.FormatError, match="differs from its digest"):
        list(dense.items())
    os.truncate(file, dense.deltas[NAME].spec.start + 5 * BLOCK_NUMEL)  # bytes: a block and more
    assert dense[NAME, 1:1024].tobytes() == tuned[1:1024].tobytes()
    with pytest.raises(sv.FormatError, match="the file ends"):
        _ = dense[NAME, 1:1025]


def test_unknown_names_and_keys_of_other_types_are_refused(folder: Path) -> None:
    vector = SkillVector.open(folder / "v.safetensors")
    with pytest.raises(KeyError, match=f"no such tensor; near: {NAME}"):
        _ = vector["model.layers.1.q_proj.weight"]
    for key in (3, ("a", 3), ("a", slice(1), slice(1)), slice(2)):
        with pytest.raises(TypeError, match="a slice of its rows"):
            _ = vector[key]
    lone = SkillVector.open(folder / "adapter")
    for read in (len, list, lambda vector: vector[NAME], lambda vector: list(vector.items())):
        with pytest.raises(sv.UsageError, match="skillvec diff ADAPTER BASE"):
            read(lone)


def test_what_is_not_finite_is_refused_where_it_is_read(tmp_path: Path) -> None:
    values = np.ones((4, 3), np.float32)
    for side, last in {"tuned": np.inf, "base": 1.0}.items():
        (tmp_path / side).mkdir()
        values[3, 0] = last
        save_file({NAME: values}, tmp_path / side / "model.safetensors")
    vector = SkillVector.between(tmp_path / "tuned", tmp_path / "base")
    with pytest.raises(sv.NonfiniteError, match=f"{NAME}: 1 of 12 differences"):
        _ = vector[NAME]
    assert not vector[NAME, :3].any()


def test_a_vector_is_still_a_vector_and_no_array(folder: Path) -> None:
    vector = SkillVector.open(folder / "v.safetensors")
    assert bool(vector) and bool(SkillVector.open(folder / "adapter"))
    for number in (np.float64(2), np.float32(2), 2):
        twice = number * vector
        assert isinstance(twice, SkillVector) and twice.scale == 2
        assert (twice[NAME] == 2 * vector[NAME]).all()
    assert vector == vector and vector != SkillVector.open(folder / "v.safetensors")
    assert {vector: 1}[vector] == 1
    assert dict(vector).keys() == vector.keys()
