"""The vector file: an independent reader, hostile manifests and side tables, and the algebra."""

import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from click.testing import CliRunner
from families import assert_same_bits, bits, from_bits, load, perturbed, save, toy
from xxhash import xxh3_128

import skillvec
from skillvec.cli import main
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, UsageError
from skillvec.vector import SkillVector

BLOCK = 1048576  # elements; written out, so that a change of the format shows here
SIDE = ("skillvec.blocks", "skillvec.exceptions", "skillvec.replacements")
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


# ------------------------------------------------------- a second reader, from the format alone


def read_raw(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
    """Return the manifest, and name -> (dtype, shape, bytes) in the order of the data."""
    content = path.read_bytes()
    (nbytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + nbytes])
    manifest = json.loads(header.pop("__metadata__")["skillvec"])
    tensors = {}
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + nbytes + offset for offset in spec["data_offsets"])
        tensors[name] = spec["dtype"], spec["shape"], content[begin:end]
    return manifest, tensors


def widened(dtype: str, content: bytes) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    wide = np.frombuffer(content, NUMPY[dtype])
    return wide.astype(np.float32) if dtype == "F16" else wide.copy()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bit patterns of values rounded to nearest even (finite values only)."""
    if dtype != "BF16":
        return bits(values.astype(NUMPY[dtype]))
    pattern = values.astype(np.float32).view(np.uint32)
    return ((pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16).astype(np.uint16)


def restored(vector: Path, base: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return base + vector as name -> (dtype, bit patterns), by nothing but the file format."""
    manifest, tensors = read_raw(vector)
    official = safetensors.deserialize(base.read_bytes())
    points = {name: (spec["dtype"], bytes(spec["data"])) for name, spec in official}
    counts = np.frombuffer(tensors["skillvec.blocks"][2], "<u4").reshape(-1, 2)
    ends = np.cumsum(counts, axis=0, dtype=np.int64)
    exceptions = np.frombuffer(
        tensors.get("skillvec.exceptions", ("", 0, b""))[2], [("at", "<u4"), ("value", "<f4")]
    )
    replacements = np.frombuffer(
        tensors.get("skillvec.replacements", ("", 0, b""))[2], [("at", "<u4"), ("bits", "<u8")]
    )
    assert (len(exceptions), len(replacements)) == tuple(counts.sum(axis=0))
    result, row = {}, 0
    for name, (dtype, _, content) in tensors.items():
        if name in SIDE:
            continue
        delta = widened(dtype, content)
        base_dtype, point = points[name]
        tuned_dtype = manifest["tensors"][name]["tuned"][0]
        replaced = []
        for begin in range(0, delta.size, BLOCK):
            for records, column in ((exceptions, 0), (replacements, 1)):
                mine = records[ends[row, column] - counts[row, column] : ends[row, column]]
                if column == 0:
                    delta[begin + mine["at"].astype(np.int64)] = mine["value"]
                else:
                    replaced.append((begin + mine["at"].astype(np.int64), mine["bits"]))
            row += 1
        wide = widened(base_dtype, point)
        with np.errstate(all="ignore"):
            total = np.where(delta == 0, wide, wide + delta)  # -0 stays where nothing is added
        pattern = rounded(total, tuned_dtype)
        for at, new in replaced:
            pattern[at] = new
        result[name] = tuned_dtype, pattern
    assert row == len(counts)
    return result


def special_pair(dtype: str, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base and tuned with sign changes, -0, infinities and NaN payloads here and there."""
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    if not numel:
        return torch.zeros(0, dtype=torch_dtype), torch.zeros(0, dtype=torch_dtype)
    rng = np.random.default_rng(5)
    base = rng.normal(size=numel).astype(np.float32) * 0.01
    tuned = base + np.where(rng.random(numel) < 0.2, rng.normal(size=numel) * 0.01, 0)
    pair = [torch.from_numpy(x.astype(np.float32)).to(torch_dtype) for x in (base, tuned)]
    patterns = [bits(x).copy() for x in pair]
    width = patterns[0].itemsize * 8
    odd = {"BF16": 0x7FC1, "F16": 0x7E01, "F32": 0x7FC00001}[dtype]
    infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    for i, at in enumerate(range(3, numel, max(1, numel // 40))):
        patterns[1][at] = (1 << (width - 1), odd, infinity, infinity | 1 << (width - 1))[i % 4]
        patterns[0][at] = patterns[0][at] if i % 3 else (1 << (width - 1))
    return from_bits(patterns[0], dtype), from_bits(patterns[1], dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_reader_written_from_the_format_alone_restores_tuned(dtype: str, tmp_path: Path):
    base, tuned = {}, {}
    for name, numel in {
        "z": 5,
        "a.long": BLOCK + 77,
        "m": 4096,
        "one.block": BLOCK,
        "0": 0,
    }.items():
        base[name], tuned[name] = special_pair(dtype, numel)
    base["same"] = tuned["same"] = torch.ones(7).to(base["z"].dtype)
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    skillvec.diff(left, right, tmp_path / "v.safetensors")
    found = restored(tmp_path / "v.safetensors", right / "model.safetensors")
    manifest, tensors = read_raw(tmp_path / "v.safetensors")
    assert set(found) == set(base)
    for name, (found_dtype, pattern) in found.items():
        assert found_dtype == dtype
        expected = bits(tuned[name]) if tuned[name].numel() else pattern[:0]
        wrong = int(np.count_nonzero(pattern != expected))
        assert wrong == manifest["tensors"][name].get("unrestored", 0), name
    if dtype == "BF16":  # else the test would prove less than it says
        assert len(tensors["skillvec.exceptions"][2]) and len(tensors["skillvec.replacements"][2])
    if dtype != "F32":
        assert manifest["exactness"]["claim"] == "bitwise"


def test_the_manifest_holds_what_a_stranger_needs(tmp_path: Path, family):
    skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors", exclude=["*.norm.weight"])
    manifest, tensors = read_raw(tmp_path / "v.safetensors")
    assert manifest["kind"] == "vector" and manifest["schema"] == 1
    assert manifest["tool"] == f"skillvec {skillvec.__version__}"
    assert manifest["formula"] == "tuned - base"
    assert manifest["excluded"] == ["model.norm.weight"]
    assert str(family.tuned) in manifest["command"] and str(tmp_path) not in manifest["command"]
    assert set(manifest["tensors"]) == set(tensors) - set(SIDE)
    official = {"base": load(family.base), "tuned": load(family.tuned)}
    for name, entry in manifest["tensors"].items():
        for side, model in official.items():
            content = model[name].view(torch.uint8).numpy().tobytes()
            assert entry[side] == ["BF16", digest(content)]
        assert entry["digest"] == digest(tensors[name][2])
        differs = bits(official["base"][name]) != bits(official["tuned"][name])
        assert entry["changed"] == int(np.count_nonzero(differs))
    for name in set(SIDE) & set(tensors):
        assert manifest["side"][name] == digest(tensors[name][2])


def test_official_safetensors_opens_a_vector(tmp_path: Path, family):
    skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    with safetensors.safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(toy()) <= set(file.keys())
        for name, tensor in toy().items():
            assert list(file.get_tensor(name).shape) == list(tensor.shape)


# ------------------------------------------------------------------------------ hostile vectors


def digest(content: bytes) -> str:
    leaves = b"".join(
        xxh3_128(content[at : at + 1048576]).digest() for at in range(0, len(content), 1048576)
    )
    return xxh3_128(leaves).hexdigest()


def write_raw(
    path: Path, manifest: object, tensors: dict[str, tuple[str, list[int], bytes]]
) -> Path:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "skillvec": text}}
    position = 0
    for name, (dtype, shape, content) in tensors.items():
        offsets = [position, position + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position = offsets[1]
    raw = json.dumps(header).encode()
    data = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


class Made:
    """A small true vector with exceptions and replacements, taken apart, with its models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base, tuned = {}, {}
        for name, numel in {"w": 3000, "u": 200}.items():
            base[name], tuned[name] = special_pair("BF16", numel)
        base["ids"] = tuned["ids"] = torch.arange(4)
        self.base, self.tuned = save(folder / "base", base), save(folder / "tuned", tuned)
        self.path = folder / "v.safetensors"
        skillvec.diff(self.tuned, self.base, self.path)
        self.manifest, self.tensors = read_raw(self.path)

    def parts(self) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
        return copy.deepcopy(self.manifest), dict(self.tensors)

    def everything(self, path: Path, output: Path | None) -> list[str]:
        """Do all that can be done with a vector; return the names of errors, all of our own.

        Without `output` nothing is written (verify walks the same way, short of the disk).
        """
        errors = []
        if output is not None:
            try:
                skillvec.apply(self.base, path, output)
            except SkillvecError as error:
                errors.append(type(error).__name__)
        for arguments in (
            ["inspect", "-v", str(path)],
            ["apply", str(self.base), str(path), "-o", f"{path}.dry", "--dry-run", "-v"],
            ["orthogonality", "-v", str(path), str(path)],
            ["verify", str(path), "--base", str(self.base), "--tuned", str(self.tuned)],
        ):
            result = CliRunner().invoke(main, arguments)
            if result.exception is None:
                continue
            if not isinstance(result.exception, SystemExit):
                raise AssertionError(f"skillvec {arguments[0]}") from result.exception
            errors.append(f"{arguments[0]}: exit {result.exit_code}")
        return errors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def test_taking_apart_and_putting_together_changes_nothing(made: Made, tmp_path: Path):
    # The control of every test below: the same way round without harm works.
    path = write_raw(tmp_path / "v.safetensors", *made.parts())
    assert made.everything(path, tmp_path / "out") == []
    assert_same_bits(tmp_path / "out", made.tuned)


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema of tomorrow": lambda m: m.update(schema=2),
    "schema as text": lambda m: m.update(schema="1"),
    "no schema": lambda m: m.pop("schema"),
    "other blocks": lambda m: m.update(block_numel=1 << 18),
    "no tensors": lambda m: m.pop("tensors"),
    "tensors as a list": lambda m: m.update(tensors=["w", "u"]),
    "a tensor too few": lambda m: m["tensors"].pop("w"),
    "a tensor too many": lambda m: m["tensors"].update(x=m["tensors"]["w"]),
    "a tensor's entry is null": lambda m: m["tensors"].update(w=None),
    "no base digest": lambda m: m["tensors"]["w"].pop("base"),
    "base digest is a number": lambda m: m["tensors"]["w"].update(base=["BF16", 3]),
    "base dtype unknown": lambda m: m["tensors"]["w"].update(base=["I32", "0"]),
    "base entry too short": lambda m: m["tensors"]["w"].update(base=["BF16"]),
    "tuned dtype a list": lambda m: m["tensors"]["w"].update(tuned=[["BF16"], "0"]),
    "digest missing": lambda m: m["tensors"]["w"].pop("digest"),
    "digest a number": lambda m: m["tensors"]["w"].update(digest=1),
    "no base": lambda m: m.pop("base"),
    "base is text": lambda m: m.update(base="org/name"),
    "base without family": lambda m: m["base"].pop("family"),
    "base dtypes a list": lambda m: m["base"].update(dtypes=["BF16"]),
    "tokenizer a number": lambda m: m["tuned"].update(tokenizer=3),
    "excluded is text": lambda m: m.update(excluded="w"),
    "tied is a list": lambda m: m.update(tied=[]),
    "equal is null": lambda m: m.update(equal=None),
    "side is missing": lambda m: m.pop("side"),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_a_broken_manifest_is_a_format_error_naming_the_file(harm: str, made: Made, tmp_path: Path):
    manifest, tensors = made.parts()
    REFUSED[harm](manifest)
    path = write_raw(tmp_path / "v.safetensors", manifest, tensors)
    with pytest.raises(FormatError) as caught:
        SkillVector.open(path)
    assert str(path) in str(caught.value)
    assert made.everything(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"vector"', "{}", '{"kind": "model"}', '{"kind":' + "[" * 99999]
)
def test_a_file_without_a_vector_manifest_is_no_vector(text: str, made: Made, tmp_path: Path):
    path = write_raw(tmp_path / "v.safetensors", text, made.tensors)
    with pytest.raises(IncompatibleError, match="not a skill vector"):
        SkillVector.open(path)
    assert made.everything(path, tmp_path / "out")


def every_key(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the paths of all keys of a manifest that has one tensor's entry looked at."""
    paths: list[tuple[str, ...]] = [(key,) for key in manifest]
    paths += [(side, key) for side in ("base", "tuned", "exactness") for key in manifest[side]]
    paths += [("tensors", "w", key) for key in manifest["tensors"]["w"]]
    paths += [("equal", "ids"), ("side", SIDE[0]), ("side", SIDE[1])]
    return paths


@pytest.mark.parametrize("value", ["(gone)", None, 1e308, "\u001b[31m", {"a": {}}])
def test_no_value_of_any_key_leads_to_anything_but_an_error_of_ours(
    value: object, made: Made, tmp_path: Path
):
    failures = []
    for number, keys in enumerate(every_key(made.manifest)):
        manifest, tensors = made.parts()
        parent = manifest
        for key in keys[:-1]:
            parent = parent[key]
        if value == "(gone)":
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = value
        path = write_raw(tmp_path / f"{number}.safetensors", manifest, tensors)
        try:
            made.everything(path, None)
        except Exception as error:  # collected, so that one run shows them all
            cause = error.__cause__ or error
            failures.append(f"{'.'.join(keys)}: {error}: {type(cause).__name__}: {cause}"[:200])
    assert not failures, "\n".join(failures)


def records(made: Made, name: str, dtype: list[tuple[str, str]]) -> np.ndarray:
    return np.frombuffer(made.tensors[name][2], dtype).copy()


EXCEPTION = [("at", "<u4"), ("value", "<f4")]
REPLACEMENT = [("at", "<u4"), ("bits", "<u8")]


def with_side(made: Made, path: Path, name: str, content: bytes, shape: list[int]) -> Path:
    """Write the vector with another side tensor whose digest in the manifest is right."""
    manifest, tensors = made.parts()
    tensors[name] = "U8", shape, content
    manifest["side"][name] = digest(content)
    return write_raw(path, manifest, tensors)


@pytest.mark.parametrize(("name", "dtype"), [(SIDE[1], EXCEPTION), (SIDE[2], REPLACEMENT)])
@pytest.mark.parametrize("harm", ["swapped", "repeated", "beyond the block", "far beyond"])
def test_positions_must_rise_within_their_block(
    name: str, dtype: list[tuple[str, str]], harm: str, made: Made, tmp_path: Path
):
    found = records(made, name, dtype)
    counts = np.frombuffer(made.tensors[SIDE[0]][2], "<u4").reshape(-1, 2)
    first = int(counts[0, SIDE.index(name) - 1])
    assert first >= 2  # of the first block, which is that of tensor u or w
    at = found["at"]
    if harm == "swapped":
        at[:2] = at[1::-1].copy()
    elif harm == "repeated":
        at[1] = at[0]
    else:
        at[first - 1] = 3000 if harm == "beyond the block" else 0xFFFFFFFF
    content = found.tobytes()
    shape = made.tensors[name][1]
    path = with_side(made, tmp_path / "v.safetensors", name, content, shape)
    with pytest.raises(FormatError, match=f"{name}, block 0: positions"):
        skillvec.apply(made.base, path, tmp_path / "out")
    with pytest.raises(FormatError, match="positions"):
        skillvec.verify(path, base=made.base, tuned=made.tuned)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "other dtype", "flat"])
def test_side_tensors_must_have_the_size_that_the_blocks_say(
    name: str, harm: str, made: Made, tmp_path: Path
):
    manifest, tensors = made.parts()
    dtype, (count, width), content = tensors[name]
    if harm == "missing":
        del tensors[name]
    else:
        tensors[name] = {
            "shorter": (dtype, [count - 1, width], content[:-width]),
            "longer": (dtype, [count + 1, width], content + content[:width]),
            "other dtype": ("I8", [count, width], content),
            "flat": (dtype, [count * width], content),
        }[harm]
        manifest["side"][name] = digest(tensors[name][2])
    path = write_raw(tmp_path / "v.safetensors", manifest, tensors)
    with pytest.raises(FormatError, match=f"{name} is not U8"):
        skillvec.apply(made.base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_counts_that_claim_billions_of_records_take_no_memory(made: Made, tmp_path: Path):
    counts = np.frombuffer(made.tensors[SIDE[0]][2], "<u4").copy()
    counts[0] = 0xFFFFFFFF
    path = with_side(
        made, tmp_path / "v.safetensors", SIDE[0], counts.tobytes(), made.tensors[SIDE[0]][1]
    )
    with pytest.raises(FormatError, match="is not U8"):
        skillvec.apply(made.base, path, tmp_path / "out")


@pytest.mark.parametrize("name", ["w", "u", *SIDE])
@pytest.mark.parametrize("at", [0, -1])
def test_one_altered_byte_anywhere_is_refused_naming_the_tensor(
    name: str, at: int, made: Made, tmp_path: Path
):
    manifest, tensors = made.parts()
    dtype, shape, content = tensors[name]
    altered = bytearray(content)
    altered[at] ^= 1
    tensors[name] = dtype, shape, bytes(altered)
    path = write_raw(tmp_path / "v.safetensors", manifest, tensors)
    for call in (
        lambda: skillvec.apply(made.base, path, tmp_path / "out"),
        lambda: skillvec.orthogonality(path, made.path),
        lambda: skillvec.verify(path, base=made.base, tuned=made.tuned),
    ):
        with pytest.raises(FormatError) as caught:
            call()
        assert name in str(caught.value) and str(path) in str(caught.value)
        assert "altered" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_vector_of_an_integer_tensor_is_refused(made: Made, tmp_path: Path):
    manifest, tensors = made.parts()
    _, shape, content = tensors["w"]
    tensors["w"] = "U16", shape, content
    path = write_raw(tmp_path / "v.safetensors", manifest, tensors)
    with pytest.raises(FormatError, match="broken manifest"):
        SkillVector.open(path)


def test_a_replacement_wider_than_its_tensor_is_refused_or_never_written(
    made: Made, tmp_path: Path
):
    found = records(made, SIDE[2], REPLACEMENT)
    found["bits"][0] |= 1 << 40  # BF16 has 16 bits: the rest would be cut off without a word
    path = with_side(
        made, tmp_path / "v.safetensors", SIDE[2], found.tobytes(), made.tensors[SIDE[2]][1]
    )
    with pytest.raises(FormatError):
        skillvec.apply(made.base, path, tmp_path / "out")


# ---------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("name", ["model.safetensors", "skill.bin", "skill", "skill.pt"])
def test_a_vector_is_never_named_so_that_it_loads_as_weights(name: str, tmp_path: Path, family):
    with pytest.raises(UsageError, match=name):
        skillvec.diff(family.tuned, family.base, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_transformers_does_not_load_a_folder_with_a_vector(tmp_path: Path, family):
    from transformers import AutoModel

    skillvec.diff(family.tuned, family.base, tmp_path / "skill.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    with pytest.raises(OSError):
        AutoModel.from_pretrained(tmp_path, local_files_only=True)


# ----------------------------------------------------------------------------------- the algebra


def test_what_has_no_meaning_is_a_type_error_that_says_so(family):
    base, tuned = skillvec.open_checkpoint(family.base), skillvec.open_checkpoint(family.tuned)
    vector = tuned - base
    for meaningless, words in (
        (lambda: base + tuned, "no sum"),
        (lambda: base + vector, "skillvec.apply"),
        (lambda: vector + base, "skillvec.apply"),
        (lambda: vector + 1, "skillvec.apply"),
        (lambda: 1 + vector, "skillvec.apply"),
        (lambda: base - vector, "only a checkpoint"),
        (lambda: base - 1, "only a checkpoint"),
        (lambda: vector * "x", "finite number"),
        (lambda: "x" * vector, "finite number"),
        (lambda: vector * None, "finite number"),
        (lambda: vector * vector, "finite number"),
        (lambda: vector * base, "finite number"),
        (lambda: vector * math.nan, "finite number"),
        (lambda: vector * math.inf, "finite number"),
        (lambda: vector * 1j, "finite number"),
        (lambda: base * 2, ""),
        (lambda: vector - base, ""),
    ):
        with pytest.raises(TypeError) as caught:
            meaningless()
        assert words in str(caught.value)


def test_what_has_a_meaning_gives_vectors_and_leaves_its_operands_alone(family):
    base, tuned = skillvec.open_checkpoint(family.base), skillvec.open_checkpoint(family.tuned)
    vector = tuned - base
    assert isinstance(vector, SkillVector) and vector.scale == 1
    assert (2 * vector).scale == (vector * 2).scale == 2
    assert (-vector).scale == -1
    assert (0.5 * -(2 * vector)).scale == -1
    assert (vector * np.float32(0.25)).scale == 0.25
    assert vector.scale == 1
    with pytest.raises(AttributeError):
        vector.scale = 3  # type: ignore[misc]


def test_a_product_that_overflows_is_refused_too(tmp_path: Path, family):
    vector = skillvec.diff(family.tuned, family.base) * 1e300
    with pytest.raises((TypeError, SkillvecError)):
        skillvec.apply(family.base, vector * 1e300, tmp_path / "out")
    with pytest.raises(SkillvecError):
        skillvec.apply(family.base, vector, tmp_path / "out", lam=1e300)
    assert not (tmp_path / "out").exists()


def test_scaling_a_vector_is_scaling_lam(tmp_path: Path, family):
    vector = skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    skillvec.apply(family.target, 0.5 * vector, tmp_path / "one", lam=3.0)
    skillvec.apply(family.target, vector, tmp_path / "other", lam=1.5)
    assert_same_bits(tmp_path / "one", tmp_path / "other")


def test_a_difference_of_checkpoints_is_that_of_diff(tmp_path: Path, family):
    vector = skillvec.open_checkpoint(family.tuned) - skillvec.open_checkpoint(family.base)
    skillvec.apply(family.target, vector, tmp_path / "one")
    skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    skillvec.apply(family.target, tmp_path / "v.safetensors", tmp_path / "other")
    assert_same_bits(tmp_path / "one", tmp_path / "other")


def test_integer_tensors_that_differ_are_listed_and_not_transferred(tmp_path: Path):
    base, tuned = toy(), perturbed(toy())
    base |= {"ids": torch.arange(5), "same": torch.arange(3)}
    tuned |= {"ids": torch.arange(5) + 1, "same": torch.arange(3)}
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    vector = skillvec.diff(left, right, tmp_path / "v.safetensors")
    manifest, _ = read_raw(tmp_path / "v.safetensors")
    assert manifest["differing"] == ["ids"] and list(manifest["equal"]) == ["same"]
    assert any("ids" in warning for warning in vector.report.warnings)
    skillvec.apply(right, tmp_path / "v.safetensors", tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["ids"], base["ids"])
