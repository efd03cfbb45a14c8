"""The vector file: what a stranger reads in it, hostile files of every kind, and the algebra."""

import copy
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reader
import safetensors
import test_codecs
import torch
from click.testing import CliRunner
from families import assert_same_bits, bits, from_bits, load, perturbed, save, toy
from harm import NESTED, lowered
from test_faults import seconds
from xxhash import xxh3_128

import skillvec
from skillvec.cli.commands import main
from skillvec.engine import runner, threads
from skillvec.engine.plan import Plan
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    NonfiniteError,
    SkillvecError,
    UsageError,
)
from skillvec.files.header import MAX_DIMENSIONS
from skillvec.vectors import reader as reader_module
from skillvec.vectors.manifest import SCHEMAS
from skillvec.vectors.reader import MAX_NUMEL
from skillvec.vectors.vector import SkillVector

BLOCK = 1048576  # elements; written out, so that a change of the format shows here
SIDE = ("skillvec.blocks", "skillvec.exceptions", "skillvec.replacements")
INDEX = "vector.safetensors.index.json"
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
PARTS = {"zero": [], "dense": [""], "sparse": [".values", ".bitmap"], "packed": [".packed"]}
HOLDERS = ("dense", "sparse", "packed", "shards")  # a file of each codec, and a folder

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, bytes; in file order
Manifest = dict[str, Any]


# ------------------------------------------------------------ vectors taken apart and put together


def digest(content: bytes) -> str:
    leaves = b"".join(
        xxh3_128(content[at : at + 1048576]).digest() for at in range(0, len(content), 1048576)
    )
    return xxh3_128(leaves).hexdigest()


def manifest_digest(manifest: Manifest) -> str:
    said = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False)
    return digest(text.encode("utf-8", "surrogatepass"))


def read_file(path: Path) -> tuple[dict[str, str], Tensors]:
    content = path.read_bytes()
    (nbytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + nbytes])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + nbytes + offset for offset in spec["data_offsets"])
        tensors[name] = spec["dtype"], spec["shape"], content[begin:end]
    return metadata, tensors


def read_raw(path: Path) -> tuple[Manifest, list[Tensors]]:
    """Return the manifest, and the tensors of the file or of each shard in name order."""
    if path.is_file():
        metadata, tensors = read_file(path)
        return json.loads(metadata["skillvec"]), [tensors]
    metadata = json.loads((path / INDEX).read_bytes())["metadata"]
    shards = [read_file(file)[1] for file in sorted(path.glob("vector-*.safetensors"))]
    return json.loads(metadata["skillvec"]), shards


def write_file(path: Path, metadata: dict[str, str], tensors: Tensors) -> Path:
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, content) in tensors.items():
        offsets = [position, position + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position = offsets[1]
    raw = json.dumps(header).encode()
    data = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_raw(path: Path, manifest: object, files: list[Tensors]) -> Path:
    """Write a vector as it is, right or wrong: one file, or shards and their index."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    metadata = {"format": "pt", "skillvec": text}
    if len(files) == 1:
        return write_file(path, metadata, files[0])
    path.mkdir()
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"vector-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys((n for n in tensors if n not in SIDE), name)
        said = {"format": "pt", "skillvec": json.dumps({"kind": "vector shard"})}
        write_file(path / name, said, tensors)
    (path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return path


def special_pair(
    dtype: str, numel: int, seed: int = 5, nonfinite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base and tuned with sign changes and -0 here and there.

    With `nonfinite` infinities and NaN payloads as well.
    """
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    if not numel:
        return torch.zeros(0, dtype=torch_dtype), torch.zeros(0, dtype=torch_dtype)
    rng = np.random.default_rng(seed)
    base = rng.normal(size=numel).astype(np.float32) * 0.01
    tuned = base + np.where(rng.random(numel) < 0.2, rng.normal(size=numel) * 0.01, 0)
    pair = [torch.from_numpy(x.astype(np.float32)).to(torch_dtype) for x in (base, tuned)]
    patterns = [bits(x).copy() for x in pair]
    width = patterns[0].itemsize * 8
    odd = {"BF16": 0x7FC1, "F16": 0x7E01, "F32": 0x7FC00001}[dtype]
    infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    minus = 1 << (width - 1)
    planted = (minus, odd, infinity, infinity | minus) if nonfinite else (minus, 0, minus, 0)
    for i, at in enumerate(range(3, numel, max(1, numel // 40))):
        patterns[1][at] = planted[i % 4]
        patterns[0][at] = patterns[0][at] if i % 3 else minus
    return from_bits(patterns[0], dtype), from_bits(patterns[1], dtype)


def rows_of(tensors: Tensors) -> np.ndarray:
    """Return a file's block table, to be changed: payload bytes, exceptions, replacements."""
    return np.frombuffer(tensors[SIDE[0]][2], "<u4").reshape(-1, 3).copy()


class Made:
    """A small true vector with exceptions and replacements, taken apart, with its models.

    `kind` is a codec, or "shards" for a folder of two files with a tensor each.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        folder.mkdir()
        base, tuned = {}, {}
        for seed, (name, numel) in enumerate({"u": 2000, "w": 3000}.items()):
            base[name], tuned[name] = special_pair("BF16", numel, seed)
        base["zero"] = tuned["zero"] = torch.ones(7).bfloat16()
        base["ids"] = tuned["ids"] = torch.arange(4)
        self.base, self.tuned = save(folder / "base", base), save(folder / "tuned", tuned)
        near = perturbed(base, 3)
        self.near = save(folder / "near", near | {"ids": base["ids"]})
        self.path = folder / "v.safetensors"
        codec = {"shards": "sparse"}.get(kind, kind)
        size = 8000 if kind == "shards" else "5GB"
        skillvec.diff(self.tuned, self.base, self.path, codec=codec, max_shard_size=size)
        self.codec, self.kind = codec, kind
        self.manifest, self.files = read_raw(self.path)

    def parts(self) -> tuple[Manifest, list[Tensors]]:
        return copy.deepcopy(self.manifest), [dict(tensors) for tensors in self.files]

    def of(self, name: str, files: list[Tensors]) -> tuple[Tensors, str]:
        """Return the file that holds a delta, and the name of its payload there."""
        payload = name + PARTS[self.codec][0]
        return next(tensors for tensors in files if payload in tensors), payload

    def write(self, path: Path, manifest: Manifest, files: list[Tensors]) -> Path:
        """Write a vector whose manifest has its right digest, unless that is what was changed."""
        if manifest.get("digest") == self.manifest["digest"]:
            manifest["digest"] = manifest_digest(manifest)
        return write_raw(path, manifest, files)

    def everything(self, path: Path, output: Path | None = None) -> list[str]:
        """Do all that can be done with a vector; return the errors, all of our own.

        Without `output` only what looks at manifest and data in ways of its own is done.
        """
        errors = []
        again = f"{path}.again.safetensors"
        calls = [
            ["inspect", "-v", str(path), "--target", str(self.near)],
            ["verify", str(path), "--base", str(self.base), "--tuned", str(self.tuned)],
            ["combine", str(path), "--codec", "dense", "-o", again, "--force"],
        ]
        if output is not None:
            calls += [
                ["apply", str(self.near), str(path), "-o", f"{path}.dry", "--dry-run", "-v"],
                ["orthogonality", "-v", str(path), str(path)],
                ["combine", str(path), f"{self.path}=0.5", "-o", again, "--force"],
                ["apply", str(self.base), str(path), "-o", str(output)],
            ]
        for arguments in calls:
            with seconds(20):
                result = CliRunner().invoke(main, arguments)
            if result.exception is None:
                continue
            if not isinstance(result.exception, SystemExit):
                raise AssertionError(f"skillvec {arguments[0]}") from result.exception
            errors.append(f"{arguments[0]}: exit {result.exit_code}: {result.output}")
        return errors


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that really syncs proves nothing here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    folder, known = tmp_path_factory.mktemp("made"), {}

    def made_of(kind: str) -> Made:
        if kind not in known:
            known[kind] = Made(folder / kind, kind)
        return known[kind]

    return made_of


@pytest.fixture
def made(made_of: Callable[[str], Made]) -> Made:
    return made_of("packed")


@pytest.mark.parametrize("kind", HOLDERS)
def test_taking_apart_and_putting_together_changes_nothing(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    # The control of every test below: the same way round without harm works.
    made = made_of(kind)
    assert len(made.files) == (2 if kind == "shards" else 1)
    for tensors in made.files:  # else a test below would prove less than it says
        assert set(SIDE) <= set(tensors)
    path = made.write(tmp_path / "v.safetensors", *made.parts())
    assert made.everything(path, tmp_path / "out") == []
    assert_same_bits(tmp_path / "out", made.tuned)


# ---------------------------------------------------------------------------- a stranger's reading


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bit patterns of values rounded to nearest even (finite values only)."""
    if dtype != "BF16":
        return bits(values.astype(reader.FLOAT[dtype]))
    pattern = values.astype(np.float32).view(np.uint32)
    return ((pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16).astype(np.uint16)


def restored(vector: Path, base: Path) -> dict[str, np.ndarray]:
    """Return base + vector as bit patterns, by nothing but the file format."""
    manifest, deltas = reader.read_vector(vector)
    points, found = dict(safetensors.deserialize(base.read_bytes())), {}
    for name, (delta, positions, patterns) in deltas.items():
        said = points[name]
        dtype = manifest["tensors"][name]["tuned"][0]
        assert said["dtype"] == dtype
        point = np.frombuffer(said["data"], reader.FLOAT[dtype])
        wide = (point.astype("<u4") << 16).view("<f4") if dtype == "BF16" else point
        wide = wide.astype(delta.dtype)
        with np.errstate(all="ignore"):
            total = np.where(np.isfinite(wide), wide + delta.ravel(), wide)
            same = (delta.ravel() == 0) | ~np.isfinite(wide)  # their bits stay: -0, NaN payloads
            found[name] = np.where(same, bits(point), rounded(total, dtype))
        found[name][positions] = patterns
    return found


@pytest.mark.parametrize(
    ("dtype", "codec", "size"),
    [(dtype, codec, "5GB") for dtype in ("BF16", "F16") for codec in ("dense", "sparse", "packed")]
    + [("F32", "packed", "5GB"), ("BF16", "auto", "1MB"), ("F16", "sparse", "600KB")],
)
def test_a_reader_written_from_the_format_alone_restores_tuned(
    dtype: str, codec: str, size: str, tmp_path: Path
):
    base, tuned = {}, {}
    sizes = {"z": 5, "a.long": BLOCK + 77, "m": 4096, "one.block": BLOCK, "0": 0}
    for seed, (name, numel) in enumerate(sizes.items()):
        base[name], tuned[name] = special_pair(dtype, numel, seed, nonfinite=True)
    base["same"] = tuned["same"] = torch.ones(7).to(base["z"].dtype)
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    path = tmp_path / "v.safetensors"
    skillvec.diff(left, right, path, codec=codec, max_shard_size=size, allow_nonfinite=True)
    manifest, files = read_raw(path)
    assert (len(files) > 1) == path.is_dir() == (size != "5GB")
    codecs = {name: entry["codec"] for name, entry in manifest["tensors"].items()}
    planned = codec if codec != "auto" else "packed"
    assert codecs == dict.fromkeys(sizes, planned) | {
        "0": "zero", "same": "dense" if codec == "dense" else "zero",
    }  # fmt: skip
    found = restored(path, right / "model.safetensors")
    assert set(found) == set(base)
    for name, pattern in found.items():
        assert np.array_equal(pattern, bits(tuned[name]) if tuned[name].numel() else []), name
    counts = sum(rows_of(tensors).sum(axis=0) for tensors in files)[1:].tolist()
    exactness = manifest["exactness"]
    assert counts == [exactness["exceptions"], exactness["replacements"]]
    assert exactness["claim"] == "bitwise" and exactness["unrestored"] == 0 and counts[1]
    if dtype == "BF16":
        assert counts[0]


@pytest.mark.parametrize("kind", HOLDERS)
def test_the_manifest_holds_what_a_stranger_needs(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of(kind)
    manifest, files = made.parts()
    assert manifest["kind"] == "vector" and manifest["schema"] == 1
    assert manifest["tool"] == f"skillvec {skillvec.__version__}"
    assert manifest["formula"] == "tuned - base"
    assert manifest["block_numel"] == BLOCK
    assert manifest["codec"] == made.codec and manifest["dtype"] == "auto"
    assert manifest["digest"] == manifest_digest(manifest)
    words = manifest["command"].split()
    assert words[:2] == ["skillvec", "diff"] and str(made.tuned) in words
    assert f"--codec {made.codec}" in manifest["command"] and str(made.path) not in words
    official = {"base": load(made.base), "tuned": load(made.tuned)}
    assert manifest["equal"] == {"ids": ["I64", digest(bytes(official["base"]["ids"].numpy()))]}
    deltas = reader.read_vector(made.path)[1]
    assert set(manifest["tensors"]) == set(deltas) == {"u", "w", "zero"}
    for name, entry in manifest["tensors"].items():
        assert entry["dtype"] == "BF16" and entry["shape"] == list(official["base"][name].shape)
        for side, model in official.items():
            content = model[name].view(torch.uint8).numpy().tobytes()
            assert entry[side] == ["BF16", digest(content)]
        differs = bits(official["base"][name]) != bits(official["tuned"][name])
        assert entry["changed"] == int(np.count_nonzero(differs))
        delta = deltas[name][0].astype(np.float64)
        assert entry["norm"] == pytest.approx(np.sqrt(delta @ delta), rel=6e-5)
        blocks = b""
        if entry["codec"] != "zero":
            assert entry["codec"] == made.codec
            tensors, payload = made.of(name, files)
            blocks = xxh3_128(
                tensors.get(f"{name}.bitmap", ("", 0, b""))[2] + tensors[payload][2]
            ).digest()
        assert entry["digest"] == xxh3_128(blocks).hexdigest()
    assert manifest["tensors"]["zero"]["codec"] == ("dense" if kind == "dense" else "zero")
    assert manifest["side"] == [
        {name: digest(tensors[name][2]) for name in SIDE} for tensors in files
    ]


def test_the_identity_is_that_of_the_displacement_whatever_the_codec(
    made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of("dense")
    for number, options in enumerate(
        [{"codec": "packed"}, {"max_shard_size": 500}, {"notes": "mine"}, {"workers": 1}]
    ):
        path = tmp_path / f"{number}.safetensors"
        vector = skillvec.diff(made.tuned, made.base, path, **options)
        assert vector.manifest["identity"] == made.manifest["identity"]
    others = [
        skillvec.diff(made.base, made.tuned), skillvec.diff(made.near, made.base),
        skillvec.diff(made.tuned, made.base, dtype="bf16"),
        skillvec.diff(made.tuned, made.base, exclude=["w"]),
    ]  # fmt: skip
    identities = {vector.manifest["identity"] for vector in others}
    assert len(identities | {made.manifest["identity"]}) == 5


@pytest.mark.parametrize("codec", ["dense", "sparse", "packed", "auto"])
def test_tensors_lie_in_the_order_of_the_format(codec: str, tmp_path: Path):
    """Payloads from wide dtypes to bytes, then bitmaps, then side tensors; zeros are positive."""
    base = {"d": torch.zeros(9).double(), "c": torch.zeros(9), "b": torch.zeros(9).half(),
            "a": torch.zeros(9).bfloat16(), "n": torch.zeros(9).half(),
            "l": torch.zeros(900).bfloat16(), "w": torch.zeros(900).double()}  # fmt: skip
    tuned = {name: tensor - 1 for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[: -(-tensor.numel() // 10)] = -0.0
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    skillvec.diff(left, right, tmp_path / "v.safetensors", codec=codec)
    manifest, (tensors,) = read_raw(tmp_path / "v.safetensors")
    side = [SIDE[0], SIDE[2]]  # no exceptions here
    dense, packed = ("dcabn", "wl") if codec == "auto" else ("", "dwcabln")
    if codec == "dense":
        dense, packed = "dwcabln", ""
    first, *behind = PARTS["packed" if codec == "auto" else codec]
    names = [*dense, *(name + first for name in packed)]
    names += [name + part for part in behind for name in packed]
    assert list(tensors) == names + side
    blocks = [manifest["tensors"][name]["block"] for name in dense + packed]
    assert blocks == list(range(len(base)))
    for name, (delta, *_) in reader.read_vector(tmp_path / "v.safetensors")[1].items():
        zeros = -(-delta.size // 10)
        assert delta.tolist() == [0] * zeros + [-1] * (delta.size - zeros), name
        assert not np.signbit(delta[:zeros]).any()


@pytest.mark.parametrize("kind", HOLDERS)
def test_official_safetensors_opens_a_vector(kind: str, made_of: Callable[[str], Made]):
    made = made_of(kind)
    paths = [made.path] if made.path.is_file() else sorted(made.path.glob("*.safetensors"))
    for path, tensors in zip(paths, made.files, strict=True):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert set(file.keys()) == set(tensors)
            for name, (_, shape, content) in tensors.items():
                tensor = file.get_tensor(name)
                assert list(tensor.shape) == shape
                assert tensor.view(torch.uint8).numpy().tobytes() == content
    if kind == "shards":
        index = json.loads((made.path / INDEX).read_bytes())
        assert index["metadata"]["format"] == "pt"
        data = sum(len(content) for held in made.files for _, _, content in held.values())
        assert index["metadata"]["total_size"] == data
        held = {n: p.name for p, t in zip(paths, made.files, strict=True) for n in t}
        assert index["weight_map"] == {n: p for n, p in held.items() if n not in SIDE}
        for path in paths:
            assert json.loads(read_file(path)[0]["skillvec"]) == {"kind": "vector shard"}


# --------------------------------------------------------------------------- hostile manifests


def refused(made: Made, path: Path, output: Path) -> str:
    """Return what is said of a vector that nothing may be done with, once all refuse it."""
    try:
        vector = SkillVector.open(path)
    except FormatError as error:
        result = CliRunner().invoke(main, ["inspect", str(path)])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert os.path.basename(path) in str(error)
        return str(error)
    said = set()
    for call in (
        lambda: skillvec.apply(made.base, vector, output),
        lambda: skillvec.orthogonality(vector, made.path),
        lambda: skillvec.verify(path, base=made.base, tuned=made.tuned),
        lambda: skillvec.combine(path, output=f"{output}.safetensors", codec="dense"),
    ):
        with pytest.raises(FormatError) as caught, seconds(20):
            call()
        said.add(str(caught.value))
        assert path.name in str(caught.value)
    assert not output.exists() and not Path(f"{output}.safetensors").exists()
    return "\n".join(said)


def of_w(**changes: object) -> Callable[[Manifest], object]:
    return lambda manifest: manifest["tensors"]["w"].update(changes)


def of_zero(**changes: object) -> Callable[[Manifest], object]:
    return lambda manifest: manifest["tensors"]["zero"].update(changes)


# what is done to the manifest of a packed vector
REFUSED: dict[str, Callable[[Manifest], object]] = {
    "schema of tomorrow": lambda m: m.update(schema=SCHEMAS[-1] + 1),
    "schema as text": lambda m: m.update(schema="1"),
    "schema as a float": lambda m: m.update(schema=1.0),
    "schema a boolean": lambda m: m.update(schema=True),
    "no schema": lambda m: m.pop("schema"),
    "other blocks": lambda m: m.update(block_numel=1 << 18),
    "no tensors": lambda m: m.pop("tensors"),
    "tensors as a list": lambda m: m.update(tensors=["w", "u"]),
    "a tensor too few": lambda m: m["tensors"].pop("w"),
    "a tensor too many": lambda m: m["tensors"].update(x=m["tensors"]["w"]),
    "a tensor's entry is null": lambda m: m["tensors"].update(w=None),
    "no base digest": lambda m: m["tensors"]["w"].pop("base"),
    "base digest is a number": of_w(base=["BF16", 3]),
    "base dtype unknown": of_w(base=["I32", "0" * 32]),
    "base digest too short": of_w(base=["BF16", "0" * 31]),
    "base without tuned": of_w(tuned=None),
    "base entry too short": of_w(base=["BF16"]),
    "tuned dtype a list": of_w(tuned=[["BF16"], "0" * 32]),
    "digest missing": lambda m: m["tensors"]["w"].pop("digest"),
    "digest a number": of_w(digest=1),
    "codec unknown": of_w(codec="zip"),
    "codec null": of_w(codec=None),
    "codec a list": of_w(codec=["packed"]),
    "codec another": of_w(codec="dense"),
    "codec another of many parts": of_w(codec="sparse"),
    "codec zero where there are bytes": of_w(codec="zero"),
    "codec packed where there are none": of_zero(codec="packed"),
    "dtype of integers": of_w(dtype="I16"),
    "dtype unknown": of_w(dtype="F8"),
    "dtype null": of_w(dtype=None),
    "dtype of another width": of_w(dtype="F32"),
    "dtype of a zero delta": of_zero(dtype="U8"),
    "shape a number": of_w(shape=3000),
    "shape of text": of_w(shape=["3000"]),
    "shape of floats": of_w(shape=[3000.0]),
    "shape of booleans": of_w(shape=[True]),
    "shape negative": of_w(shape=[-3000]),
    "shape negative twice": of_w(shape=[-60, -50]),
    "shape of no values": of_w(shape=[3000, 0]),
    "shape of 65 dimensions": of_w(shape=[3000] + [1] * 64),
    "zero delta of 65 dimensions": of_zero(shape=[7] + [1] * 64),
    "zero delta negative": of_zero(shape=[-7]),
    "block negative": of_w(block=-1),
    "block beyond the table": of_w(block=99),
    "block of another": of_w(block=0),
    "block not the next": of_w(block=2),
    "blocks exchanged": lambda m: [m["tensors"][n].update(block=i) for i, n in enumerate("wu")],
    "block a float": of_w(block=1.0),
    "block a boolean": of_w(block=True),
    "block null": of_w(block=None),
    "changed negative": of_w(changed=-1),
    "changed more than there is": of_w(changed=3001),
    "norm negative": of_w(norm=-1.0),
    "norm NaN": of_w(norm=math.nan),
    "norm infinite": of_w(norm=math.inf),
    "norm whose square is none": of_w(norm=1.1e150),
    "unrestored a text": of_w(unrestored="none"),
    "unrestored more than there is": of_w(unrestored=3001),
    "nonfinite more than there is": of_w(nonfinite=3001),
    "nonfinite negative": of_w(nonfinite=-1),
    "nonfinite a text": of_w(nonfinite="none"),
    "nonfinite a boolean": of_w(nonfinite=True),
    "nonfinite a float": of_w(nonfinite=1.0),
    "nonfinite of nothing": of_w(nonfinite=None),
    "nonfinite a list": of_w(nonfinite=[1]),
    "nonfinite beyond floats": of_w(nonfinite=10**400),
    "nonfinite leave a number": lambda m: m.update(allow_nonfinite=1),
    "nonfinite leave a text": lambda m: m.update(allow_nonfinite="true"),
    "nonfinite leave null": lambda m: m.update(allow_nonfinite=None),
    "no base": lambda m: m.pop("base"),
    "base is text": lambda m: m.update(base="org/name"),
    "base without family": lambda m: m["base"].pop("family"),
    "base dtypes a list": lambda m: m["base"].update(dtypes=["BF16"]),
    "sketch beyond 7 bits": lambda m: m["base"]["sketch"].update(w=[128] * 6),
    "tokenizer a number": lambda m: m["tuned"].update(tokenizer=3),
    "excluded is text": lambda m: m.update(excluded="w"),
    "tied is a list": lambda m: m.update(tied=[]),
    "equal is null": lambda m: m.update(equal=None),
    "a lone surrogate": lambda m: m["base"].update(ref="\ud800"),
    "a lone surrogate as a name": lambda m: m["tensors"].update({"\ud800": m["tensors"]["zero"]}),
    "side is missing": lambda m: m.pop("side"),
    "side of no file": lambda m: m.update(side=[]),
    "side of two files": lambda m: m["side"].append(m["side"][0]),
    "side without a table": lambda m: m["side"][0].pop(SIDE[0]),
    "side digest of another": lambda m: m["side"][0].update({SIDE[1]: "0" * 32}),
    "delta digest of another": of_w(digest="0" * 32),
    "no digest": lambda m: m.pop("digest"),
    "digest of another": lambda m: m.update(digest="0" * 32),
    "digest null": lambda m: m.update(digest=None),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_a_broken_manifest_is_a_format_error_naming_the_file(harm: str, made: Made, tmp_path: Path):
    manifest, files = made.parts()
    REFUSED[harm](manifest)
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    assert len(refused(made, path, tmp_path / "out")) < 3000


@pytest.mark.parametrize(
    ("limit", "most", "shape"), [("MAX_NUMEL", 2999, [3000]), ("MAX_DIMENSIONS", 2, [30, 10, 10])]
)
def test_a_tensor_larger_than_any_is_refused(
    limit: str, most: int, shape: list[int], made: Made, tmp_path: Path, monkeypatch
):
    manifest, files = made.parts()
    of_w(shape=shape)(manifest)
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    assert list(SkillVector.open(path).deltas["w"].spec.shape) == shape
    assert (MAX_NUMEL, MAX_DIMENSIONS) == (1 << 36, 64)
    monkeypatch.setattr(reader_module, limit, most)
    with pytest.raises(FormatError, match=r"w: BF16 \[.*expected floats, at most"):
        SkillVector.open(path)


def test_as_many_dimensions_as_a_model_may_have_come_back(tmp_path: Path):
    base = {"w": torch.ones([2] + [1] * 63)}
    right = save(tmp_path / "base", base)
    left = save(tmp_path / "tuned", {"w": base["w"] + 1})
    skillvec.diff(left, right, tmp_path / "v.safetensors")
    skillvec.apply(right, tmp_path / "v.safetensors", tmp_path / "out")
    assert_same_bits(tmp_path / "out", left)


@pytest.mark.parametrize("kind", ["packed", "shards"])
def test_an_altered_manifest_does_not_fit_its_own_digest(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of(kind)
    for old, new in ((b"tuned - base", b"tuned + base"), (b"skillvec diff", b"skillvec duff")):
        path = made.write(tmp_path / new.decode()[-4:], *made.parts())
        file = path / INDEX if path.is_dir() else path
        content = file.read_bytes()
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))
        with pytest.raises(FormatError, match="differs from its own digest: the file was altered"):
            SkillVector.open(path)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"vector"', "{}", '{"kind": "model"}', '{"kind":' + NESTED]
)
def test_a_file_without_a_vector_manifest_is_no_vector(text: str, made: Made, tmp_path: Path):
    path = write_raw(tmp_path / "v.safetensors", text, made.files)
    with pytest.raises(IncompatibleError, match="not a skill vector"), lowered():
        SkillVector.open(path)
    assert made.everything(path, tmp_path / "out")


def keys_of(value: Any, names: tuple[str, ...] = ("w", "zero", "ids")) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all keys; of objects by tensor and of lists the first entries only."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in keys_of(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:1]):
            yield (place,)
            yield from ((place, *rest) for rest in keys_of(inner))


ODD = ["(gone)", None, True, -1, 1e308, 10**309, math.nan, "\u001b[0m", [], {"a": {}}]


@pytest.mark.parametrize("kind", ["pair", "combination"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
def test_no_value_of_any_key_leads_to_anything_but_an_error_of_ours(
    kind: str, value: object, made: Made, tmp_path: Path
):
    original, files = made.parts()
    if kind == "combination":
        whole = tmp_path / "c.safetensors"
        options = {"weights": [0.5, -1.0], "op": "ties", "parameters": {"density": 0.5}}
        skillvec.combine(made.path, made.path, output=whole, **options)
        original, files = read_raw(whole)
    failures, opened = [], 0
    for number, keys in enumerate(keys_of(original)):
        if kind == "combination" and keys[0] not in ("parents", "recipe", "base", "identity"):
            continue
        manifest = copy.deepcopy(original)
        parent: Any = manifest
        for key in keys[:-1]:
            parent = parent[key]
        if value == "(gone)":
            del parent[keys[-1]]
        else:
            parent[keys[-1]] = value
        if keys[0] != "digest":
            manifest["digest"] = manifest_digest(manifest)
        path = write_raw(tmp_path / f"{number}.safetensors", manifest, files)
        try:
            SkillVector.open(path)
            opened += 1
            made.everything(path)
        except SkillvecError:
            continue
        except Exception as error:  # collected, so that one run shows them all
            cause = error.__cause__ or error
            failures.append(f"{keys}: {error}: {type(cause).__name__}: {cause}"[:200])
    assert not failures, "\n".join(failures)


COMBINED: dict[str, Callable[[Manifest], object]] = {
    "no parents": lambda m: m.update(parents=[]),
    "a parent too few": lambda m: m["parents"].pop(),
    "a parent too many": lambda m: m["parents"].append(m["parents"][0]),
    "parents of other identity": lambda m: m["parents"][0].update(identity="0" * 32),
    "no recipe": lambda m: m.update(recipe=None),
    "an empty recipe": lambda m: m.update(recipe={}),
    "a recipe of no vectors": lambda m: m["recipe"].update(vectors=[]),
    "a recipe of one vector": lambda m: m["recipe"]["vectors"].pop(),
    "a recipe of another operator": lambda m: m["recipe"].update(op="nothing"),
    "an operator that is a list": lambda m: m["recipe"].update(op=["linear"]),
    "a weight of NaN": lambda m: m["recipe"]["vectors"][0].update(weight=math.nan),
    "a weight of text": lambda m: m["recipe"]["vectors"][0].update(weight="much"),
    "a weight nested deep": lambda m: m["recipe"]["vectors"][0].update(weight=[[[[[1]]]]]),
    "a vector that is not there": lambda m: m["recipe"]["vectors"][0].update(vector="absent"),
    "a vector that is a number": lambda m: m["recipe"]["vectors"][0].update(vector=7),
    "a seed of text": lambda m: m["recipe"].update(seed="s"),
    "parameters as a list": lambda m: m["recipe"].update(parameters=[1]),
    "no formula": lambda m: m.pop("formula"),
}


@pytest.mark.parametrize("harm", COMBINED)
def test_a_combination_of_nonsense_is_not_verified(harm: str, made: Made, tmp_path: Path):
    path = tmp_path / "c.safetensors"
    skillvec.combine(made.path, made.path, weights=[0.5, 0.25], output=path)
    assert skillvec.verify(path).facts["verified"]
    manifest, files = read_raw(path)
    COMBINED[harm](manifest)
    manifest["digest"] = manifest_digest(manifest)
    write_raw(path, manifest, files)
    with pytest.raises(SkillvecError), seconds(20):
        skillvec.verify(path)
    for error in made.everything(path):
        assert "Traceback" not in error


# ------------------------------------------------------------------------------- hostile tensors


def altered_table(
    row: int, column: int, step: int
) -> Callable[[Made, Manifest, list[Tensors]], None]:
    """Return a harm: one number of the block table of the first file is another."""

    def harm(made: Made, manifest: Manifest, files: list[Tensors]) -> None:
        rows = rows_of(files[0]).astype(np.int64)
        rows[row, column] = (rows[row, column] + step) % (1 << 32)
        content = rows.astype("<u4").tobytes()
        files[0][SIDE[0]] = "U8", [len(rows), 12], content
        manifest["side"][0][SIDE[0]] = digest(content)

    return harm


def payload(change: Callable[[str, list[int], bytes], tuple[str, list[int], bytes] | None]):
    """Return a harm: the payload of w is another, or gone."""

    def harm(made: Made, manifest: Manifest, files: list[Tensors]) -> None:
        tensors, name = made.of("w", files)
        changed = change(*tensors[name])
        if changed is None:
            del tensors[name]
        else:
            tensors[name] = changed

    return harm


def bitmap(change: Callable[[str, list[int], bytes], tuple[str, list[int], bytes] | None]):
    def harm(made: Made, manifest: Manifest, files: list[Tensors]) -> None:
        tensors, _ = made.of("w", files)
        changed = change(*tensors.pop("w.bitmap"))
        if changed is not None:
            tensors["w.bitmap"] = changed

    return harm


Harm = Callable[[Made, Manifest, list[Tensors]], object]
# what is done to the tensors, with digests made right: kinds it is possible for, harm, words
BROKEN: dict[str, tuple[tuple[str, ...], Harm, str]] = {
    "a row of more bytes": (HOLDERS, altered_table(0, 0, 1), "skillvec.blocks does not fit"),
    "a row of fewer bytes": (HOLDERS, altered_table(0, 0, -1), "skillvec.blocks does not fit"),
    "a row of a whole block": (HOLDERS, altered_table(0, 0, 2 * BLOCK), "skillvec.blocks does not"),
    "a row of more exceptions": (HOLDERS, altered_table(0, 1, 1), "exceptions is not U8"),
    "a row of a block of exceptions": (HOLDERS, altered_table(0, 1, BLOCK), "exceptions is not U8"),
    "a row of fewer replacements": (HOLDERS, altered_table(0, 2, -1), "replacements is not U8"),
    "a payload missing": (HOLDERS, payload(lambda *_: None), "w"),
    "a payload of I8": (("packed",), payload(lambda d, s, c: ("I8", s, c)), "w.packed: I8"),
    "a payload of BF16": (
        ("packed",), payload(lambda d, s, c: ("BF16", [len(c) // 2], c[: len(c) // 2 * 2])), "BF16",
    ),
    "a payload of F16": (HOLDERS[:2], payload(lambda d, s, c: ("F16", s, c)), "F16"),
    "a payload of U8": (HOLDERS[:2], payload(lambda d, s, c: ("U8", [len(c)], c)), "U8"),
    "a payload of rank 2": (HOLDERS, payload(lambda d, s, c: (d, [1, *s], c)), r"\[1, "),
    "a payload of rank 0": (HOLDERS, payload(lambda d, s, c: ("U8", [], c[:1])), r"U8 \["),
    "a payload longer than its values": (
        ("packed", "sparse"), payload(lambda d, s, c: (d, [6002 >> (d != "U8")], bytes(6002))),
        "6002 bytes for 3000 values",
    ),
    "a payload a byte longer": (
        ("packed",), payload(lambda d, s, c: (d, [len(c) + 1], c + b"\0")), "does not fit",
    ),
    "a payload of nothing": (
        ("packed", "sparse", "shards"), payload(lambda d, s, c: (d, [0], b"")), "does not fit",
    ),
    "a bitmap missing": (("sparse", "shards"), bitmap(lambda *_: None), "w: its sparse tensors"),
    "a bitmap too short": (
        ("sparse", "shards"), bitmap(lambda d, s, c: (d, [374], c[:-1])), r"w.bitmap: U8 \[374\]",
    ),
    "a bitmap too long": (
        ("sparse", "shards"), bitmap(lambda d, s, c: (d, [376], c + b"x")), r"w.bitmap: U8 \[376",
    ),
    "a bitmap of rank 2": (
        ("sparse", "shards"), bitmap(lambda d, s, c: (d, [375, 1], c)), r"w.bitmap: U8 \[375, 1\]",
    ),
    "a bitmap of booleans": (
        ("sparse", "shards"), bitmap(lambda d, s, c: ("BOOL", s, c)), "w.bitmap: BOOL",
    ),
    "a bitmap in another shard": (
        ("shards",), lambda made, m, files: files[0].update({"w.bitmap": files[1].pop("w.bitmap")}),
        "w: its sparse tensors",
    ),
    "a tensor more": (HOLDERS, lambda made, m, f: f[0].update(x=("U8", [1], b"x")), "x"),
    "a tensor of another codec more": (
        ("dense", "sparse"), lambda made, m, f: f[0].update({"w.packed": ("U8", [1], b"x")}),
        "w.packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "harm"), [(kind, harm) for harm, (kinds, *_) in BROKEN.items() for kind in kinds]
)
def test_broken_tensors_are_a_format_error_naming_them(
    kind: str, harm: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of(kind)
    _, do, words = BROKEN[harm]
    manifest, files = made.parts()
    do(made, manifest, files)
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    said = refused(made, path, tmp_path / "out")
    assert re.search(words, said), said
    assert len(said) < 3000


def test_bytes_moved_between_rows_are_found(made: Made, tmp_path: Path):
    """The sum is right; a delta of its own first row must still end where its payload does."""
    manifest, files = made.parts()
    altered_table(0, 0, 5)(made, manifest, files)
    altered_table(1, 0, -5)(made, manifest, files)
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    assert "does not fit" in refused(made, path, tmp_path / "out")


@pytest.mark.parametrize("codec", ["dense", "sparse", "packed"])
def test_no_row_holds_more_than_a_block(codec: str, tmp_path: Path):
    """Also where the rows of the delta fill its payload together."""
    base = {"w": torch.zeros(2 * BLOCK).bfloat16()}
    noise = test_codecs.made("BF16", 2 * BLOCK, 0.9, "wild", 1)
    tuned = {"w": from_bits(np.where(noise & 0x7F80 == 0x7F80, 0, noise), "BF16")}
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    skillvec.diff(left, right, tmp_path / "v.safetensors", codec=codec)
    manifest, (tensors,) = read_raw(tmp_path / "v.safetensors")
    assert manifest["tensors"]["w"]["codec"] == codec
    rows = rows_of(tensors)
    moved = 2 * BLOCK - int(rows[0, 0]) + 2
    rows[:, 0] += np.array([moved, -moved], np.int64).astype(np.uint32)
    assert rows.min(axis=0)[0] > 0 and rows[:, 0].sum() == len(tensors["w" + PARTS[codec][0]][2])
    tensors[SIDE[0]] = "U8", [2, 12], rows.tobytes()
    manifest["side"][0][SIDE[0]] = digest(rows.tobytes())
    manifest["digest"] = manifest_digest(manifest)
    path = write_raw(tmp_path / "h.safetensors", manifest, [tensors])
    with pytest.raises(FormatError, match=rf"w: {SIDE[0]} does not fit its {codec} bytes"):
        skillvec.apply(right, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


EXCEPTION = [("at", "<u4"), ("value", "<f4")]
REPLACEMENT = [("at", "<u4"), ("bits", "<u8")]


def records(made: Made, name: str, dtype: list[tuple[str, str]]) -> np.ndarray:
    return np.frombuffer(made.files[0][name][2], dtype).copy()


def with_side(made: Made, path: Path, name: str, content: bytes) -> Path:
    """Write the vector with another side tensor whose digest in the manifest is right."""
    manifest, files = made.parts()
    width = files[0][name][1][1]
    files[0][name] = "U8", [len(content) // width, width], content
    manifest["side"][0][name] = digest(content)
    return made.write(path, manifest, files)


@pytest.mark.parametrize(("name", "dtype"), [(SIDE[1], EXCEPTION), (SIDE[2], REPLACEMENT)])
@pytest.mark.parametrize("harm", ["swapped", "repeated", "beyond the block", "far beyond"])
@pytest.mark.parametrize("kind", ["packed", "shards"])
def test_positions_must_rise_within_their_block(
    kind: str, name: str, dtype: list[tuple[str, str]], harm: str,
    made_of: Callable[[str], Made], tmp_path: Path,
):  # fmt: skip
    made = made_of(kind)
    found = records(made, name, dtype)
    first = int(rows_of(made.files[0])[0, SIDE.index(name)])
    assert first >= 2  # of the first block, which is that of tensor u
    at = found["at"]
    if harm == "swapped":
        at[:2] = at[1::-1].copy()
    elif harm == "repeated":
        at[1] = at[0]
    else:
        at[first - 1] = 2000 if harm == "beyond the block" else BLOCK
    path = with_side(made, tmp_path / "v.safetensors", name, found.tobytes())
    assert f"{name}, block 0: positions" in refused(made, path, tmp_path / "out")


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize(
    "harm", ["missing", "shorter", "longer", "wider", "other dtype", "flat", "deep"]
)
@pytest.mark.parametrize("kind", ["packed", "shards"])
def test_side_tensors_must_have_the_size_that_the_blocks_say(
    kind: str, name: str, harm: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of(kind)
    manifest, files = made.parts()
    dtype, (count, width), content = files[-1][name]
    if harm == "missing":
        del files[-1][name]
    else:
        files[-1][name] = {
            "shorter": (dtype, [count - 1, width], content[:-width]),
            "longer": (dtype, [count + 1, width], content + content[:width]),
            "wider": (dtype, [count, width + 1], content + bytes(count)),
            "other dtype": ("I8", [count, width], content),
            "flat": (dtype, [count * width], content),
            "deep": (dtype, [count, width, 1], content),
        }[harm]
        manifest["side"][-1][name] = digest(files[-1][name][2])
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    assert re.search(f"{name} is not U8", refused(made, path, tmp_path / "out"))


def test_a_replacement_wider_than_its_tensor_is_refused_or_never_written(
    made: Made, tmp_path: Path
):
    found = records(made, SIDE[2], REPLACEMENT)
    found["bits"][0] |= 1 << 40  # BF16 has 16 bits: the rest would be cut off without a word
    path = with_side(made, tmp_path / "v.safetensors", SIDE[2], found.tobytes())
    with pytest.raises(FormatError):
        skillvec.apply(made.base, path, tmp_path / "out")


# --------------------------------------------------------------------------------- altered bytes


def altered(made: Made, path: Path, number: int, name: str, at: int) -> Path:
    """Write the vector with one bit of one tensor changed and every digest as it was."""
    manifest, files = made.parts()
    dtype, shape, content = files[number][name]
    changed = bytearray(content)
    changed[at] ^= 1
    files[number][name] = dtype, shape, bytes(changed)
    return made.write(path, manifest, files)


@pytest.mark.parametrize("kind", HOLDERS)
def test_one_altered_byte_anywhere_is_refused_naming_the_tensor(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of(kind)
    places = [(i, name) for i, tensors in enumerate(made.files) for name in tensors]
    for place, (number, name) in enumerate(places):
        delta = name if name in SIDE else name.split(".")[0]
        size = len(made.files[number][name][2])
        for at in {0, size // 3, size // 2, size - 1}:
            path = altered(made, tmp_path / f"{place}-{at}.safetensors", number, name, at)
            for call in (
                lambda path=path: skillvec.apply(made.near, path, tmp_path / "out"),
                lambda path=path: skillvec.orthogonality(path, made.path),
                lambda path=path: skillvec.verify(path, base=made.base, tuned=made.tuned),
                lambda path=path: skillvec.combine(
                    path, output=tmp_path / "again.safetensors", codec="dense"
                ),
            ):
                with pytest.raises(FormatError, match="altered") as caught:
                    call()
                assert delta in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("kind", HOLDERS)
def test_no_flipped_bit_of_any_file_is_taken_for_the_vector(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    """Header, manifest, index, padding and data: refused, or every value is what it was."""
    made = made_of(kind)
    expected = {
        n: (d.tobytes(), *map(bytes, r)) for n, (d, *r) in reader.read_vector(made.path)[1].items()
    }
    rng = np.random.default_rng(7)
    refusals = 0
    files = [made.path] if made.path.is_file() else sorted(made.path.iterdir())
    for number in range(120):
        path = tmp_path / "v.safetensors"
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        if made.path.is_dir():
            path.mkdir(exist_ok=True)
            for other in files:
                (path / other.name).write_bytes(other.read_bytes())
            (path / file.name).write_bytes(content)
        else:
            path.write_bytes(content)
        try:
            skillvec.orthogonality(path, made.path)
        except SkillvecError:
            refusals += 1
        else:  # padding, a blank in the index, a label of the official format
            found = reader.read_vector(path)[1]
            assert {n: (d.tobytes(), *map(bytes, r)) for n, (d, *r) in found.items()} == expected
    assert refusals > 60


# ---------------------------------------------------------------------------------------- shards


def shards(made: Made, tmp_path: Path) -> tuple[Path, dict[str, Any], list[Path]]:
    """Return a true folder to be broken, its index, and its shards."""
    path = made.write(tmp_path / "v.safetensors", *made.parts())
    return path, json.loads((path / INDEX).read_bytes()), sorted(path.glob("vector-*"))


def with_map(change: Callable[[dict[str, Any]], object]) -> Callable[..., object]:
    def harm(path: Path, index: dict[str, Any], files: list[Path], other: Path) -> None:
        change(index)
        (path / INDEX).write_text(json.dumps(index))

    return harm


def exchange(path: Path, index: dict[str, Any], files: list[Path], other: Path) -> None:
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


SHARDS: dict[str, tuple[Callable[..., object], str]] = {
    "a shard missing": (lambda path, index, files, other: files[1].unlink(), "shards are missing"),
    "a shard that is a folder": (
        lambda path, index, files, other: (files[1].unlink(), files[1].mkdir()), "missing",
    ),
    "a shard cut off": (
        lambda path, index, files, other: files[1].write_bytes(files[1].read_bytes()[:-1]), "trunc",
    ),
    "a shard of no bytes": (
        lambda path, index, files, other: os.truncate(files[1], 0), "0 bytes are too few",
    ),
    "shards exchanged": (exchange, "disagree"),
    "a shard of another vector": (
        lambda path, index, files, other: shutil.copyfile(other / files[1].name, files[1]),
        "altered",
    ),
    "a tensor in two shards": (
        lambda path, index, files, other: write_file(
            files[0], *(lambda said, held: (said, held | {"w.values": ("BF16", [1], b"ab")}))(
                *read_file(files[0]))
        ), "disagree|w",
    ),
    "a tensor that no shard has": (
        with_map(lambda i: i["weight_map"].update(x=i["weight_map"]["w.values"])), "disagree",
    ),
    "a tensor that the index has not": (
        with_map(lambda i: i["weight_map"].pop("w.values")), "disagree",
    ),
    "a tensor in the other shard": (
        with_map(lambda i: i["weight_map"].update({"w.bitmap": i["weight_map"]["u.values"]})),
        "disagree",
    ),
    "a shard that is a number": (with_map(lambda i: i["weight_map"].update(u=3)), "plain file"),
    "a shard that is null": (with_map(lambda i: i["weight_map"].update(u=None)), "plain file name"),
    "a shard above": (with_map(lambda i: i["weight_map"].update(u="../v")), "plain file name"),
    "a shard below": (with_map(lambda i: i["weight_map"].update(u="a/b")), "plain file name"),
    "a shard from the root": (with_map(lambda i: i["weight_map"].update(u="/x")), "plain file"),
    "a shard without a name": (with_map(lambda i: i["weight_map"].update(u="")), "plain file name"),
    "a shard that is the folder": (with_map(lambda i: i["weight_map"].update(u=".")), "plain file"),
    "a shard with a NUL": (with_map(lambda i: i["weight_map"].update(u="a\0b")), "missing|plain"),
    "a shard with a surrogate": (with_map(lambda i: i["weight_map"].update(u="\ud800")), ""),
    "no map": (with_map(lambda i: i.pop("weight_map")), "weight_map"),
    "a map of nothing": (with_map(lambda i: i.update(weight_map={})), "weight_map"),
    "a map that is a list": (with_map(lambda i: i.update(weight_map=["u"])), "weight_map"),
    "no metadata": (with_map(lambda i: i.pop("metadata")), "no manifest"),
    "metadata as a list": (with_map(lambda i: i.update(metadata=[1])), "no manifest"),
    "a manifest as an object": (
        with_map(lambda i: i["metadata"].update(skillvec=json.loads(i["metadata"]["skillvec"]))),
        "no manifest",
    ),
    "the manifest of a shard": (
        with_map(lambda i: i["metadata"].update(skillvec='{"kind": "vector shard"}')),
        "no manifest",
    ),
    "a manifest with a surrogate": (
        with_map(lambda i: i["metadata"].update(skillvec=i["metadata"]["skillvec"] + "\ud800")), "",
    ),
    "an index that is no JSON": (
        lambda path, index, files, other: (path / INDEX).write_bytes(b"\xff{"), "weight_map",
    ),
    "an index nested deep": (
        lambda path, index, files, other: (path / INDEX).write_text(NESTED), "weight_map.*Recurs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", SHARDS)
def test_broken_folders_are_a_format_error(
    harm: str, made_of: Callable[[str], Made], tmp_path: Path
):
    made = made_of("shards")
    path, index, files = shards(made, tmp_path)
    skillvec.diff(
        made.base, made.tuned, tmp_path / "other.safetensors", codec="sparse", max_shard_size=8000
    )
    do, words = SHARDS[harm]
    do(path, index, files, tmp_path / "other.safetensors")
    with lowered():
        said = refused(made, path, tmp_path / "out")
    assert re.search(words, said), said
    result = CliRunner().invoke(main, ["apply", str(made.base), str(path), "-o", str(path) + "x"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)


def test_a_shard_alone_is_refused_with_advice(made_of: Callable[[str], Made], tmp_path: Path):
    _, _, files = shards(made_of("shards"), tmp_path)
    for file in files:
        with pytest.raises(FormatError, match="one shard of a vector: open the folder"):
            SkillVector.open(file)
        with pytest.raises(IncompatibleError, match="skill vector, expected a model"):
            skillvec.open_checkpoint(file)
    for place in (made_of("shards").path, made_of("packed").path):
        with pytest.raises(IncompatibleError, match="skill vector, expected a model"):
            skillvec.open_checkpoint(place)
    (tmp_path / "v.safetensors" / INDEX).unlink()
    with pytest.raises(SkillvecError):
        SkillVector.open(tmp_path / "v.safetensors")


# ---------------------------------------------------------------------------------------- memory


def test_frames_that_claim_more_than_their_block_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As `skillvec apply` meets them: frames and lengths that claim, or truly hold, more."""
    of_pieces, stating, frame = test_codecs.of_pieces, test_codecs.stating, test_codecs.frame
    numel = 3000
    watched = test_codecs.Watched(numel)
    monkeypatch.setattr("skillvec.ops.codecs._local.decompressor", watched, raising=False)
    base = {"w": torch.zeros(numel).bfloat16(), "v": torch.ones(9).bfloat16()}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"][::100] = 1
    right = save(tmp_path / "base", base)
    skillvec.diff(
        save(tmp_path / "tuned", tuned), right, tmp_path / "v.safetensors", codec="packed"
    )
    manifest, (tensors,) = read_raw(tmp_path / "v.safetensors")
    whole, more = frame(bytes(numel)), frame(bytes(2 * numel))
    hostile = {
        "states more": of_pieces(b"", stating(2 * numel, bytes(numel)), whole),
        "holds more": of_pieces(b"", more, whole),
        "holds more as a bitmap": of_pieces(more, whole, whole),
        "states a block, holds more": of_pieces(b"", stating(numel, bytes(2 * numel)), whole),
        "a length beyond the end": struct.pack("<3I", 0, 99, 5) + b"12345",
        "no frame": of_pieces(b"", b"x" * 99, whole),
        "nothing is wrong": of_pieces(b"", whole, whole),
    }
    for number, (name, block) in enumerate(hostile.items()):
        said, held = copy.deepcopy(manifest), dict(tensors)
        held["w.packed"] = "U8", [len(block)], block
        rows = rows_of(held)
        rows[said["tensors"]["w"]["block"], 0] = len(block)
        held[SIDE[0]] = "U8", [len(rows), 12], rows.tobytes()
        said["side"][0][SIDE[0]] = digest(rows.tobytes())
        said["tensors"]["w"]["digest"] = xxh3_128(xxh3_128(block).digest()).hexdigest()
        said["digest"] = manifest_digest(said)
        path = write_raw(tmp_path / f"{number}.safetensors", said, [held])
        command = ["apply", str(right), str(path), "-o", f"{path}.out", "--engine", "serial"]
        result = CliRunner().invoke(main, command)
        if name == "nothing is wrong":
            assert result.exit_code == 0, result.output
            continue
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), name
        assert re.search("w, block 0: .* altered", result.output), (name, result.output)
        assert len(result.output) < 1000 and "Traceback" not in result.output


# -------------------------------------------------------------------------------- written again


@pytest.mark.parametrize("kind", HOLDERS)
def test_unknown_keys_are_ignored_and_carried_along(
    kind: str, made_of: Callable[[str], Made], tmp_path: Path
):
    """A later version may say more, at more length; written again, it is still whole."""
    made = made_of(kind)
    manifest, files = made.parts()
    manifest["tensors"]["w"]["rank"] = list(range(2000))
    manifest["exactness"]["of"] = manifest["of"] = "x" * 5000
    manifest["base"]["licence"] = "y" * 3000
    path = made.write(tmp_path / "v.safetensors", manifest, files)
    assert made.everything(path, tmp_path / "out") == []
    again = skillvec.combine(path, output=tmp_path / "again.safetensors", codec="dense")
    assert skillvec.verify(again.ref, base=made.base, tuned=made.tuned).facts["verified"]


# ---------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("name", ["model.safetensors", "skill.bin", "skill", "skill.pt"])
def test_a_vector_is_never_named_so_that_it_loads_as_weights(name: str, tmp_path: Path, family):
    with pytest.raises(UsageError, match=name):
        skillvec.diff(family.tuned, family.base, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


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


# ------------------------------------------------------------------------------------- the golden

# Vectors of the first release, one a codec: they must be read for ever, and be written again as
# they are but for who wrote them and for what is now said of the NaN in them.
# `python tests/vectors/test_vector_file.py` writes them anew, which is for a new schema only.
GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_VALUES = "92d9220e790040d2c11f319793fa1d8f"  # of what a second reader finds in each


def scattered(numel: int, seed: int) -> np.ndarray:
    """Return 32 bits a position that no release of anything changes."""
    return (np.arange(1 + seed, numel + seed + 1, dtype=np.uint64) * 2654435761 >> 7).astype("<u4")


def golden_family(folder: Path) -> None:
    """Write base and tuned: every dtype, steps, far values, and what no difference restores."""
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    exponent = {"BF16": 0x3C00, "F16": 0x2400, "F32": 0x3C000000, "F64": 0x3F80 << 48}
    for seed, (dtype, width) in enumerate(WIDTH.items()):
        unsigned = np.dtype(f"<u{width}")
        low = scattered(40 * 12, seed).astype(unsigned) & np.array(0x1FF, unsigned)
        base = np.array(exponent[dtype], unsigned) + low
        base[::3] |= np.array(1, unsigned) << np.array(8 * width - 1, unsigned)
        tuned = base + (scattered(base.size, seed + 9) % 7 < 2).astype(unsigned)
        if width == 2:  # far away: exceptions, and values that fp32 would not restore
            tuned[5::97] ^= np.array(3 << 9, unsigned)
        tuned[7::101] = np.array(1, unsigned) << np.array(8 * width - 1, unsigned)  # -0
        nan = {"F16": 0x7C01, "F64": 0x7FF1}.get(dtype, 0x7F81)
        tuned[8::149] = np.array(nan, unsigned) << np.array(8 * width - 16, unsigned)
        for side, patterns in (("base", base), ("tuned", tuned)):
            sides[side][f"model.layers.{seed}.weight"] = from_bits(patterns, dtype, (40, 12))
    for tensors in sides.values():
        tensors["model.norm.weight"] = from_bits(np.full(12, 0x3F80, np.uint16), "BF16")
        tensors["model.empty"] = torch.zeros(0, 4).bfloat16()
        tensors["model.scalar"] = torch.tensor(1.5)
        tensors["model.positions"] = torch.arange(12)
    sides["tuned"]["model.scalar"] = torch.tensor(2.5)
    for side, tensors in sides.items():
        save(folder / side, tensors)


def write_golden(codec: str, path: Path) -> SkillVector:
    """Write the vector from the current folder, so that it names no place of this machine."""
    return skillvec.diff(
        "tuned", "base", path, codec=codec, license="apache-2.0", method="none",
        allow_nonfinite=True,
    )  # fmt: skip


def values_digest(path: Path) -> str:
    _, deltas = reader.read_vector(path)
    said = [[name, str(parts[0].dtype), parts[0].shape] for name, parts in sorted(deltas.items())]
    found = json.dumps(said).encode()
    for _, parts in sorted(deltas.items()):
        found += b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return digest(found)


@pytest.mark.parametrize("codec", ["dense", "sparse", "packed"])
def test_the_vectors_of_the_first_release_are_read_and_written_for_ever(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golden = GOLDEN / f"{codec}.safetensors"
    assert golden.stat().st_size < 20_000
    assert values_digest(golden) == GOLDEN_VALUES
    monkeypatch.chdir(tmp_path)
    golden_family(tmp_path)
    verified = skillvec.verify(golden)  # it was proved when nobody counted NaN
    assert verified.facts["verified"]
    assert any("not finite" in warning for warning in verified.warnings)
    with pytest.raises(NonfiniteError, match=r"model\.layers\.3\.weight: 4 of 480 values"):
        skillvec.apply("base", golden, "merged")
    merged = skillvec.apply("base", golden, "merged", allow_nonfinite=True)
    assert merged.facts["verdict"] == "exact base"
    assert_same_bits(tmp_path / "merged", tmp_path / "tuned")
    write_golden(codec, tmp_path / "v.safetensors")
    assert values_digest(tmp_path / "v.safetensors") == GOLDEN_VALUES
    (then, (old,)), (now, (new,)) = map(read_raw, (golden, tmp_path / "v.safetensors"))
    assert now.pop("allow_nonfinite") is True
    counts = {name: entry.pop("nonfinite", 0) for name, entry in now["tensors"].items()}
    assert {name: count for name, count in counts.items() if count} == {
        f"model.layers.{seed}.weight": 4 for seed in range(len(WIDTH))
    }
    for manifest in (then, now):
        for key in ("tool", "command", "digest"):
            del manifest[key]
        if codec == "packed":  # another zstd may give other bytes
            manifest["side"][0].pop(SIDE[0])
            for entry in manifest["tensors"].values():
                del entry["digest"]
    assert then == now
    if codec != "packed":
        assert list(old.items()) == list(new.items())


# A vector of schema 2, from the first release that writes it: `ranked.safetensors`.
RANKED_VALUES = "257b9fb6cc402183b2ea4859e028824a"


def ranked_family(folder: Path) -> None:
    """Write base and tuned of which packed blocks have ranks, with and without values beside."""
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for seed, (dtype, numel) in enumerate((("BF16", 6144), ("F16", 4800), ("BF16", 4000))):
        drawn = scattered(numel, seed)
        base = ((0x3C00, 0x2400)[dtype == "F16"] + (drawn & 0x3FF)).astype(np.uint16)
        rare = (drawn % 16 == 5) & (dtype == "BF16")
        tuned = base + np.where(rare, drawn >> 12 & 255, 1 + (drawn >> 12) % 2).astype(np.uint16)
        tuned[:: 9 - seed] = base[:: 9 - seed]
        for side, patterns in (("base", base), ("tuned", tuned)):
            sides[side][f"model.layers.{seed}.weight"] = from_bits(patterns, dtype)
    for side, tensors in sides.items():
        save(folder / side, tensors)


def test_the_vectors_of_schema_2_are_read_and_written_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golden = GOLDEN / "ranked.safetensors"
    assert golden.stat().st_size < 20_000
    assert values_digest(golden) == RANKED_VALUES
    monkeypatch.chdir(tmp_path)
    ranked_family(tmp_path)
    assert skillvec.verify(golden).facts["verified"]
    merged = skillvec.apply("base", golden, "merged")
    assert merged.facts["verdict"] == "exact base"
    assert_same_bits(tmp_path / "merged", tmp_path / "tuned")
    write_golden("packed", tmp_path / "v.safetensors")
    assert values_digest(tmp_path / "v.safetensors") == RANKED_VALUES
    (then, _), (now, _) = map(read_raw, (golden, tmp_path / "v.safetensors"))
    for manifest in (then, now):
        for key in ("tool", "command", "digest", "allow_nonfinite"):
            manifest.pop(key, None)
        manifest["side"][0].pop(SIDE[0])  # another zstd may give other bytes
        for entry in manifest["tensors"].values():
            del entry["digest"]
    assert then == now and now["schema"] == 2


def test_schema_2_is_that_of_files_with_ranks_alone(tmp_path: Path):
    """Whoever cannot read ranks can read all others; what is written again says what it has."""
    ranked_family(tmp_path)
    asked = {"packed": 2, "auto": 2, "sparse": 1, "dense": 1, "again": 2}
    for name, schema in asked.items():
        codec = name if name != "again" else "packed"
        path = tmp_path / f"{name}.safetensors"
        if name == "again":
            SkillVector.open(tmp_path / "sparse.safetensors").save(path, codec=codec)
        else:
            skillvec.diff(tmp_path / "tuned", tmp_path / "base", path, codec=codec)
        manifest, [tensors] = read_raw(path)
        assert manifest["schema"] == schema, name
        packed = [content[3] > 127 for tensor, (_, _, content) in sorted(tensors.items())
                  if tensor.endswith(".packed")]  # fmt: skip
        assert packed == [True, True, False] * (schema == 2)
    path = tmp_path / "as_dense.safetensors"
    SkillVector.open(tmp_path / "packed.safetensors").save(path, codec="dense")
    assert read_raw(path)[0]["schema"] == 1


def test_a_run_that_goes_on_knows_of_ranks_that_were_written_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(threads, "SMALL_NUMEL", 0)  # each tensor is written and noted alone
    ranked_family(tmp_path)
    sides, path = (tmp_path / "tuned", tmp_path / "base"), tmp_path / "v.safetensors"
    skillvec.diff(*sides, tmp_path / "whole.safetensors", engine="serial")

    def stop(plan: Plan, number: int, *rest: Any) -> None:
        if number == 2:  # the last, which has no ranks
            raise KeyError

    with threads.on_block(stop), pytest.raises(KeyError):
        skillvec.diff(*sides, path, engine="serial")
    report = skillvec.diff(*sides, path, engine="serial").report
    assert report is not None and report.facts["resumed"]
    (manifest, tensors), (whole, others) = map(read_raw, (path, tmp_path / "whole.safetensors"))
    assert manifest["schema"] == whole["schema"] == 2
    assert manifest["tensors"] == whole["tensors"] and tensors == others


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        golden_family(Path(place))
        GOLDEN.mkdir(exist_ok=True)
        for name in ("dense", "sparse", "packed"):
            (GOLDEN / f"{name}.safetensors").unlink(missing_ok=True)
            write_golden(name, GOLDEN / f"{name}.safetensors")
            print(name, values_digest(GOLDEN / f"{name}.safetensors"))
        os.chdir(tempfile.mkdtemp(dir=place))
        ranked_family(Path())
        (GOLDEN / "ranked.safetensors").unlink(missing_ok=True)
        write_golden("packed", GOLDEN / "ranked.safetensors")
        print("ranked", values_digest(GOLDEN / "ranked.safetensors"))
