"""Bytes: hostile headers, the official format, digests, and the staging folder."""

import bz2
import fcntl
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from families import toy
from harm import DIGITS, NESTED, lowered
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from skillvec.errors import FormatError, OutputError, VerificationError
from skillvec.files import file as file_module
from skillvec.files import header as header_module
from skillvec.files import official_reader
from skillvec.files import staging as staging_module
from skillvec.files.file import (
    LEAF_NBYTES,
    _remotes,
    digest_bytes,
    digest_file_range,
    fold_digest,
    forget_open_files,
    leaf_digests,
    read_into,
)
from skillvec.files.header import (
    ITEMSIZE,
    MAX_DIMENSIONS,
    MAX_HEADER_NBYTES,
    MAX_SIZE,
    TensorSpec,
    encode_header,
    header_layout,
    read_header,
    tensor_nbytes,
)
from skillvec.files.output_file import OutputFile
from skillvec.files.staging import Staging, staging


def names_in(folder: str | Path) -> list[str]:
    return sorted(entry.name for entry in Path(folder).iterdir())


def raw_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a file with any header, true or not, and any stated header length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> bytes:
    """Return a file with one tensor `w` over 8 bytes of data, described as asked."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    return raw_file(json.dumps(header).encode(), bytes(8))


def two(first: tuple[int, int], second: tuple[int, int], nbytes: int = 16) -> bytes:
    """Return a file with tensors a and b (F32, two values each) at the given offsets."""
    header = {"a": entry("F32", [2], *first), "b": entry("F32", [2], *second)}
    return raw_file(json.dumps(header).encode(), bytes(nbytes))


def header_of(header: object, data: bytes = b"") -> bytes:
    return raw_file(json.dumps(header).encode(), data)


W = entry("F32", [2], 0, 8)
# what is wrong -> (content of the file, words that the message must hold)
HOSTILE = {
    "no bytes at all": (b"", ["0 bytes"]),
    "shorter than the length prefix": (b"\x08\0\0\0", ["4 bytes"]),
    "header longer than the file": (raw_file(b"{}", b"", 3), ["truncated"]),
    "header of no bytes": (raw_file(b"", b""), ["JSON"]),
    "not JSON": (raw_file(b"{'w': 1}", b""), ["JSON"]),
    "not UTF-8": (raw_file(b'{"\xff": 1}', b""), ["JSON"]),
    "a lone surrogate as a name": (
        raw_file(b'{"\\ud800": ' + json.dumps(W).encode() + b"}", bytes(8)),
        ["JSON"],
    ),
    "a list": (raw_file(b"[]", b""), ["object"]),
    "null": (raw_file(b"null", b""), ["object"]),
    "blanks before the object": (raw_file(b"  {}", b""), ["object"]),
    "two objects": (raw_file(b"{}{}", b""), ["JSON"]),
    "a tensor twice": (
        raw_file(f'{{"w": {json.dumps(W)}, "w": {json.dumps(W)}}}'.encode(), bytes(8)),
        ["w", "twice"],
    ),
    "a key of an entry twice": (
        raw_file(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        ["dtype", "twice"],
    ),
    "nested too deep": (raw_file(b'{"w":' + NESTED.encode(), b""), ["JSON", "recursion"]),
    "an integer of too many digits": (
        raw_file(b'{"w":{"dtype":"F32","shape":[' + DIGITS.encode() + b"]}}", b""),
        ["JSON", "digits"],
    ),
    "entry is a number": (header_of({"w": 3}), ["'w'", "exactly dtype"]),
    "entry without dtype": (header_of({"w": {"shape": [2], "data_offsets": [0, 8]}}), ["'w'"]),
    "entry without shape": (header_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), ["'w'"]),
    "entry without offsets": (header_of({"w": {"dtype": "F32", "shape": [2]}}), ["'w'"]),
    "entry with one key more": (header_of({"w": W | {"scale": 2}}, bytes(8)), ["'w'"]),
    "dtype that is none": (one("F33"), ["'w'", "unknown dtype 'F33'"]),
    "dtype in small letters": (one("f32"), ["'w'", "unknown dtype"]),
    "dtype is a list": (one(["F32"]), ["'w'", "unknown dtype"]),
    "dtype is null": (one(None), ["'w'", "unknown dtype"]),
    "shape is a number": (one(shape=2), ["'w'", "shape"]),
    "shape is null": (one(shape=None), ["'w'", "shape"]),
    "shape holds true": (one(shape=[2, True]), ["'w'", "shape"]),
    "shape holds a negative number": (one(shape=[-1, -2]), ["'w'", "shape"]),
    "shape holds a float": (one(shape=[2.0]), ["'w'", "shape"]),
    "shape holds a string": (one(shape=["2"]), ["'w'", "shape"]),
    "shape smaller than its bytes": (one(shape=[1]), ["'w'", "takes 4 bytes"]),
    "shape larger than its bytes": (one(shape=[3]), ["'w'", "takes 12 bytes"]),
    "offsets are one number": (one(offsets=[8]), ["'w'", "data_offsets"]),
    "offsets are three numbers": (one(offsets=[0, 4, 8]), ["'w'", "data_offsets"]),
    "offsets are a map": (one(offsets={"0": 8}), ["'w'", "data_offsets"]),
    "offsets reversed": (one(offsets=(8, 0)), ["'w'", "not [begin, end]"]),
    "offsets negative": (one(offsets=(-8, 0)), ["'w'", "data_offsets"]),
    "offsets as floats": (one(offsets=(0, 8.0)), ["'w'", "data_offsets"]),
    "offsets as booleans": (one("U8", [1], [False, True]), ["'w'", "data_offsets"]),
    "tensors overlap": (two((0, 8), (4, 12), 12), ["'b'", "overlaps"]),
    "tensors on one another": (two((0, 8), (0, 8), 8), ["'b'", "overlaps"]),
    "a gap between tensors": (two((0, 8), (12, 20), 20), ["'b'", "gap"]),
    "a gap before the first": (two((4, 12), (12, 20), 20), ["'a'", "gap"]),
    "half bytes": (one("F4", [3], [0, 1]), ["'w'", "whole bytes"]),
    "data cut off": (one()[:-1], ["truncated"]),
    "bytes behind the data": (one() + b"\0", ["behind"]),
    "metadata is a list": (header_of({"__metadata__": ["pt"]}), ["__metadata__"]),
    "metadata holds a number": (header_of({"__metadata__": {"format": 1}}), ["__metadata__"]),
    "metadata holds null": (header_of({"__metadata__": {"format": None}}), ["__metadata__"]),
}


@pytest.mark.parametrize("wrong", HOSTILE)
def test_hostile_header_is_refused_naming_file_and_rule(wrong: str, tmp_path: Path):
    content, words = HOSTILE[wrong]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught, lowered():
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert all(word in message for word in words), message
    assert len(message) < 500  # a message never quotes a hostile header at length


@pytest.mark.parametrize("wrong", HOSTILE)
def test_what_is_called_hostile_the_official_reader_refuses_too(wrong: str):
    # The kinds below are ours alone: the official reader takes a repeated entry key (the last one
    # wins) and blanks. Everything else guards the test against a strawman.
    ours = {
        "a key of an entry twice", "a tensor twice", "entry with one key more",
        "blanks before the object",
    }  # fmt: skip
    content, _ = HOSTILE[wrong]
    if wrong not in ours:
        with pytest.raises(Exception):  # noqa: B017  its errors have no common type of their own
            safetensors.deserialize(content)


def test_metadata_that_is_null_is_none_as_for_the_official_reader(tmp_path: Path):
    content = header_of({"__metadata__": None, "w": W}, bytes(8))  # as mlx writes it
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert [name for name, _ in safetensors.deserialize(content)] == ["w"]
    assert safetensors.safe_open(path, "np").metadata() is None
    header = read_header(path)
    assert header.metadata == {} and list(header.tensors) == ["w"]


def _tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
    return made.getvalue()


def _saved(content: object, zipped: bool) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, _use_new_zipfile_serialization=zipped)
    return made.getvalue()


def _scripted() -> bytes:
    made = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), made)
    return made.getvalue()


OTHERS = {
    "torch.save": (lambda: _saved({"w": torch.ones(2)}, True), "a zip archive"),
    "TorchScript": (_scripted, "a zip archive"),
    "torch.save before 1.6": (lambda: _saved({"w": torch.ones(2)}, False), "a pickle"),
    **{
        f"pickle {n}": (lambda n=n: pickle.dumps({"a": [1.0] * 9}, n), "a pickle")
        for n in (2, 3, 4, 5)
    },
    "gzip": (lambda: gzip.compress(bytes(5000), mtime=0), "a gzip archive"),
    "gzip with a time": (lambda: gzip.compress(bytes(5000), mtime=1 << 30), "a gzip archive"),
    "bzip2": (lambda: bz2.compress(bytes(5000)), "a bzip2 archive"),
    "xz": (lambda: lzma.compress(bytes(5000)), "an xz archive"),
    "tar": (_tar, "a tar archive"),
    "numpy": (lambda: b"\x93NUMPY\1\0v\0{'descr': '<f4'}", "a numpy array"),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "a page": (lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>", "'<!DOCTYPE html>"),
    "an answer": (lambda: b'{"data":{"error":"Repository not found"}}', "text that begins with"),
    "a word": (lambda: b"404", "text that begins with '404'"),
    "zeros": (lambda: bytes(4096), "zeros, as"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_called_safetensors_and_is_none_is_named_by_its_first_bytes(
    kind: str, tmp_path: Path
):
    made, words = OTHERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(made())
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not safetensors, but ") and words in message
    assert "header of" not in message


@pytest.mark.parametrize("nbytes", [0x280, 0x8B1F, 0x4034B50])  # their bytes are those of others
def test_a_header_cut_off_is_truncated_whatever_its_length_looks_like(nbytes: int, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(struct.pack("<Q", nbytes) + b'{"w":{"dtype":"F32"')
    with pytest.raises(FormatError, match="truncated"):
        read_header(path)


# limit, what it is set to -> a file that is right but for it, words of the message
LIMITED: list[tuple[str, int, bytes, str]] = [
    ("MAX_HEADER_NBYTES", 50, one(), "header of 61 bytes, over the cap of 50"),
    ("MAX_DIMENSIONS", 2, one(shape=(2, 1, 1)), "'w': shape is not a list of at most 2"),
    ("MAX_SIZE", 7, one("U8", (8,)), "'w': shape is not a list"),
    ("MAX_SIZE", 7, one(), "'w': data_offsets is not a list"),
]


@pytest.mark.parametrize(
    ("limit", "most", "content", "words"), LIMITED, ids=["header", "dimensions", "size", "offset"]
)
def test_what_is_over_a_limit_is_refused(
    limit: str, most: int, content: bytes, words: str, tmp_path: Path, monkeypatch
):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert set(read_header(path).tensors) == {"w"}
    monkeypatch.setattr(header_module, limit, most)
    with pytest.raises(FormatError, match=re.escape(words)):
        read_header(path)


def test_limits_are_those_of_the_format_and_of_other_readers():
    assert MAX_HEADER_NBYTES == 100_000_000
    assert (MAX_DIMENSIONS, MAX_SIZE) == (64, 2**63 - 1)


def test_a_missing_file_is_an_oserror(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent.safetensors")


VALID = safetensors.torch.save(
    {
        "a.weight": torch.zeros(3, 2, dtype=torch.bfloat16),
        "b": torch.zeros((), dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    },
    {"format": "pt"},
)
VALID_HEADER_NBYTES = 8 + struct.unpack("<Q", VALID[:8])[0]


@given(
    st.lists(
        st.tuples(st.integers(0, VALID_HEADER_NBYTES - 1), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_a_mutated_header_is_refused_or_stays_within_the_file(mutations: list[tuple[int, int]]):
    content = bytearray(VALID)
    for position, byte in mutations:
        content[position] = byte
    descriptor = os.memfd_create("mutated")
    try:
        os.write(descriptor, content)
        path = f"/proc/self/fd/{descriptor}"
        try:
            header = read_header(path)
        except FormatError as error:
            assert path in str(error)
            return
    finally:
        os.close(descriptor)
    position = header.data_start
    for name, spec in header.tensors.items():
        assert (spec.name, spec.start) == (name, position)
        assert spec.nbytes == tensor_nbytes(spec.dtype, spec.shape)
        position += spec.nbytes
    assert position == len(content)
    name.encode()  # what is accepted can be printed and written again


def test_specs_are_those_of_the_official_reader(tmp_path: Path):
    path = tmp_path / "valid.safetensors"
    path.write_bytes(VALID)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    for name, official in safetensors.deserialize(VALID):
        spec = header.tensors[name]
        assert (spec.dtype, list(spec.shape)) == (official["dtype"], official["shape"])
        assert VALID[spec.start : spec.start + spec.nbytes] == bytes(official["data"])


# ------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": "pt", "né": 'q"\\\n\u2028'}])
def test_encoded_header_is_byte_for_byte_the_official_one(metadata: dict[str, str]):
    tensors = toy(0) | {
        "fp32": torch.arange(6.0).reshape(2, 3),
        "scalar": torch.tensor(7),
        "flags": torch.ones(5, dtype=torch.bool),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "gewicht.größe/日本": torch.ones(3, dtype=torch.float64),
    }
    # one key of metadata: the official writer keeps two in an order of its own
    official = safetensors.torch.save(tensors, {k: metadata[k] for k in list(metadata)[-1:]})
    names = list(json.loads(official[8 : 8 + struct.unpack("<Q", official[:8])[0]]))
    layout = [
        (name, spec["dtype"], tuple(spec["shape"]))
        for name, spec in sorted(
            safetensors.deserialize(official), key=lambda pair: names.index(pair[0])
        )
    ]
    header = encode_header(layout, {k: metadata[k] for k in list(metadata)[-1:]})
    assert header == official[: len(header)]


def test_reserved_room_is_filled_with_blanks_and_read_again(tmp_path: Path):
    header = encode_header([("w", "F32", (2,))], {"format": "pt"}, 512)
    assert len(header) == 512 and header.endswith(b"    ")
    path = tmp_path / "reserved.safetensors"
    path.write_bytes(header + bytes(8))
    assert read_header(path).tensors["w"].start == 512
    assert list(dict(safetensors.deserialize(path.read_bytes()))) == ["w"]


def test_a_header_over_the_cap_is_not_written(monkeypatch):
    monkeypatch.setattr(header_module, "MAX_HEADER_NBYTES", 100)
    with pytest.raises(OutputError, match="over the format's cap of 100"):
        encode_header([], {"long": "x" * 100})


# --------------------------------------------------------------------------------------- reads


def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_says_so(tmp_path: Path):
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(one())
    spec = read_header(path).tensors["w"]
    os.truncate(path, spec.start + 5)
    with pytest.raises(FormatError, match=rf"ends at byte {spec.start + 5}\b"):
        read_into(spec.path, spec.start, memoryview(bytearray(8)))
    forget_open_files()


def test_read_into_fills_exactly_the_buffer(tmp_path: Path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(64)))
    buffer = bytearray(b"\xff" * 12)
    read_into(str(path), 7, memoryview(buffer)[1:11])
    assert buffer == b"\xff" + bytes(range(7, 17)) + b"\xff"
    forget_open_files()


def test_a_long_read_is_asked_for_in_parts(tmp_path: Path, monkeypatch):
    """macOS refuses to read 2 GiB in one call."""
    path, read, asked = tmp_path / "bytes", os.preadv, []
    path.write_bytes(bytes(range(64)))

    def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(len(buffers[0]))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(file_module, "READ", 5)
    buffer = bytearray(12)
    read_into(str(path), 7, memoryview(buffer))
    assert buffer == bytes(range(7, 19)) and asked == [5, 5, 2]
    forget_open_files()


# ------------------------------------------------------------------------------------- digests


def pattern(nbytes: int) -> bytes:
    return (np.arange(nbytes, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).tobytes()


def recomputed(content: bytes) -> str:
    """XXH3-128 over the concatenated XXH3-128 digests of 1 MiB pieces, written out longhand."""
    leaves = b""
    while content:
        leaves, content = leaves + xxh3_128(content[:1048576]).digest(), content[1048576:]
    return xxh3_128(leaves).hexdigest()


GOLDEN_DIGESTS = {
    0: "99aa06d3014798d86001c324468d497f",
    1: "de68429b8afe28ce97cda390d38d6d2b",
    LEAF_NBYTES: "5996ad44ec3d29960b546679976a3a94",
    LEAF_NBYTES + 1: "b2fd7ed2b4a13cd7a3e08c841c92a73c",
    5 * LEAF_NBYTES + 12345: "8977ac0cf564c2124d95678e7f013545",
}


@pytest.mark.parametrize("nbytes", GOLDEN_DIGESTS)
def test_digest_never_changes_between_versions(nbytes: int):
    # A vector stored today must still be recognised by tomorrow's skillvec.
    assert digest_bytes(pattern(nbytes)) == GOLDEN_DIGESTS[nbytes]


@pytest.mark.parametrize("nbytes", [0, 1, LEAF_NBYTES - 1, LEAF_NBYTES, LEAF_NBYTES + 1, 9_000_001])
def test_digest_is_a_tree_of_1_mib_leaves(nbytes: int, tmp_path: Path):
    content = pattern(nbytes)
    assert digest_bytes(content) == recomputed(content)
    path = tmp_path / "bytes"
    path.write_bytes(b"before" + content + b"behind")
    assert digest_file_range(str(path), 6, nbytes) == recomputed(content)
    forget_open_files()


def test_leaves_can_be_hashed_in_any_order():
    content = memoryview(pattern(3 * LEAF_NBYTES + 5))
    pieces = [content[at : at + LEAF_NBYTES] for at in range(0, len(content), LEAF_NBYTES)]
    backwards = [leaf_digests(piece) for piece in reversed(pieces)]
    assert fold_digest(b"".join(reversed(backwards))) == digest_bytes(bytes(content))


def test_one_flipped_bit_changes_the_digest():
    content = bytearray(pattern(LEAF_NBYTES + 10))
    before = digest_bytes(bytes(content))
    content[LEAF_NBYTES + 9] ^= 1
    assert digest_bytes(bytes(content)) != before


# -------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_written_files_honour_the_umask(umask: int, mode: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        file = OutputFile(str(tmp_path / "file"), 8, False)
        file.write(0, b"12345678")
        file.sync()
        file.close()
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("windowed", [False, True])
def test_writes_land_at_their_offsets_in_any_order(windowed: bool, tmp_path: Path):
    step = 40 << 20  # beyond START, so that write-back begins where windowed
    file = OutputFile(str(tmp_path / "file"), 2 * step + 3, windowed)
    file.write(2 * step, b"end")
    file.write(0, b"begin")
    file.write(step, b"middle")
    file.append(b"more")
    assert file.nbytes == 2 * step + 7
    buffer = bytearray(6)
    file.read_into(step, memoryview(buffer))
    file.sync()  # gives back what append took ahead
    file.close()
    file.close()  # a second call does nothing
    assert buffer == b"middle"
    with (tmp_path / "file").open("rb") as written:
        for offset, expected in ((0, b"begin"), (step, b"middle"), (2 * step, b"endmore")):
            written.seek(offset)
            assert written.read(len(expected)) == expected
        assert written.read() == b""


def test_a_growing_file_takes_its_extents_ahead_and_gives_back_the_rest(
    tmp_path: Path, monkeypatch
):
    """Room doubles as it is asked for, up to 64 MiB ahead, so that few calls ask the disk."""
    allocate, calls = os.posix_fallocate, []

    def counted(descriptor: int, offset: int, nbytes: int) -> None:
        calls.append((offset, nbytes))
        allocate(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", counted)
    file = OutputFile(str(tmp_path / "file"), 0)
    sizes = [1000] + [4096] * 2000
    offsets = [file.reserve(nbytes) for nbytes in sizes]
    assert offsets == np.cumsum([0, *sizes[:-1]]).tolist()
    assert len(calls) < 20
    assert [at for at, _ in calls[1:]] == np.cumsum([n for _, n in calls[:-1]]).tolist()
    assert file.reserve(300 << 20) == file.nbytes - (300 << 20)
    assert calls[-1][1] <= (300 << 20) + OutputFile.START
    for at, mark in ((offsets[7], b"seven"), (file.nbytes - 4, b"last")):
        file.write(at, mark)
    file.sync()
    assert (tmp_path / "file").stat().st_size == file.nbytes
    file.close()
    with (tmp_path / "file").open("rb") as written:
        written.seek(offsets[7])
        assert written.read(5) == b"seven"
        written.seek(-4, os.SEEK_END)
        assert written.read() == b"last"


def test_a_nearly_full_disk_is_used_to_its_last_byte(tmp_path: Path, monkeypatch):
    allocate = os.posix_fallocate

    def small(descriptor: int, offset: int, nbytes: int) -> None:
        if offset + nbytes > 1000:
            raise OSError(28, "No space left on device")
        allocate(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", small)
    file = OutputFile(str(tmp_path / "file"), 0)
    assert [file.reserve(nbytes) for nbytes in (300, 300, 400)] == [0, 300, 600]
    with pytest.raises(OutputError, match=r"file: the disk is full .*nothing was published"):
        file.reserve(1)
    file.close()


def test_a_link_is_never_written_through(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OutputError, match="link"):
        OutputFile(str(tmp_path / "link"), 8, False)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_file_that_a_killed_run_left_is_cut_to_its_size(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"a longer one")
    file = OutputFile(str(tmp_path / "file"), 4)
    file.write(1, b"bc")
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"abco"


def test_a_failed_allocation_leaves_no_descriptor_open(tmp_path: Path, monkeypatch):
    # An open descriptor holds the blocks of an unlinked file: the disk would stay full.
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = names_in("/proc/self/fd")
    with pytest.raises(OutputError, match="full"):
        OutputFile(str(tmp_path / "file"), 8, False)
    assert names_in("/proc/self/fd") == before


def test_a_file_system_without_allocation_is_written_all_the_same(tmp_path: Path, monkeypatch):
    def unsupported(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    file = OutputFile(str(tmp_path / "file"), 8, False)
    file.write(4, b"last")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"\0\0\0\0last"


# ------------------------------------------------------------------------------------- staging


def staged_file(stage: Staging, content: bytes) -> Path:
    path = stage.folder / "made"
    path.write_bytes(content)
    return path


def test_staging_publishes_by_rename_and_leaves_nothing_behind(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    with staging(output) as stage:
        assert stage.folder.name == ".out.safetensors.skillvec-unfinished"
        made = staged_file(stage, b"new")
        inode = made.stat().st_ino
        assert not output.exists()
        stage.publish(made)
    assert output.read_bytes() == b"new"
    assert output.stat().st_ino == inode  # renamed, not copied
    assert names_in(tmp_path) == ["out.safetensors"]


def test_staging_replaces_a_folder_whole(tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_bytes(b"old")
    with staging(output, force=True) as stage:
        (stage.folder / "made").mkdir()
        (stage.folder / "made" / "new").write_bytes(b"new")
        stage.publish(stage.folder / "made")
    assert names_in(output) == ["new"]
    assert names_in(tmp_path) == ["out"]


def test_an_error_in_the_middle_removes_the_staging_folder(tmp_path: Path):
    with pytest.raises(RuntimeError), staging(tmp_path / "out") as stage:
        staged_file(stage, b"half")
        (stage.folder / "sub").mkdir()
        raise RuntimeError
    assert names_in(tmp_path) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path):
    left = tmp_path / ".out.skillvec-unfinished"
    (left / "made" / "deep").mkdir(parents=True)
    (left / "made" / "deep" / "shard").write_bytes(b"half")
    (left / "side-0").write_bytes(b"half")
    (left / "link").symlink_to(tmp_path / "elsewhere")
    with staging(tmp_path / "out") as stage:
        assert names_in(stage.folder) == ["owner"]
    assert names_in(tmp_path) == []


def test_a_second_run_is_refused_and_the_first_ones_files_stay(tmp_path: Path):
    output = tmp_path / "out"
    with staging(output) as stage:
        made = staged_file(stage, b"first")
        with pytest.raises(OutputError, match="another run"), staging(output):
            raise AssertionError("never entered")
        assert made.read_bytes() == b"first"
        stage.publish(made)
    assert output.read_bytes() == b"first"


def test_runs_with_other_outputs_do_not_meet(tmp_path: Path):
    with staging(tmp_path / "a") as one_stage, staging(tmp_path / "b") as other:
        assert one_stage.folder != other.folder


def test_a_missing_parent_folder_is_named(tmp_path: Path):
    with pytest.raises(OutputError, match="absent"), staging(tmp_path / "absent" / "x"):
        raise AssertionError("never entered")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_existing_output_is_refused_at_both_ends_without_force(kind: str, tmp_path: Path):
    def appear() -> None:
        path = tmp_path / "out"
        {"file": path.touch, "folder": path.mkdir,
         "dangling link": lambda: path.symlink_to("nowhere")}[kind]()  # fmt: skip

    with pytest.raises(OutputError, match="exists"), staging(tmp_path / "out") as stage:
        appear()
        stage.publish(staged_file(stage, b"new"))
    with pytest.raises(OutputError, match="exists"), staging(tmp_path / "out"):
        raise AssertionError("never entered")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_an_old_output_that_a_killed_run_had_moved_away_comes_back(force: bool, tmp_path: Path):
    # Where two folders cannot be exchanged in one step, a run can die between two renames.
    moved = tmp_path / ".out.skillvec-unfinished" / "replaced"
    moved.mkdir(parents=True)
    (moved / "old").write_bytes(b"old")
    if force:
        with staging(tmp_path / "out", force=True):
            assert (tmp_path / "out" / "old").read_bytes() == b"old"
    else:
        with pytest.raises(OutputError, match="exists"), staging(tmp_path / "out"):
            raise AssertionError("never entered")
    assert (tmp_path / "out" / "old").read_bytes() == b"old"
    assert names_in(tmp_path) == ["out"]


def test_a_link_in_place_of_the_staging_folder_is_not_followed(tmp_path: Path):
    # In a folder that others may write, such a link would make skillvec empty any folder of ours.
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_bytes(b"years")
    (tmp_path / ".out.skillvec-unfinished").symlink_to(precious)
    with pytest.raises(OutputError), staging(tmp_path / "out"):
        raise AssertionError("never entered")
    assert (precious / "thesis").read_bytes() == b"years"


def test_a_failed_publish_gives_the_old_output_back(tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_bytes(b"old")
    rename = os.rename

    def failing(source: object, destination: object, **kwargs: object) -> None:
        if os.path.basename(os.fspath(source)) == "made":  # type: ignore[call-overload]
            raise OSError(5, "Input/output error")
        rename(source, destination)  # type: ignore[arg-type]

    # as on a file system that cannot exchange two folders in one step
    monkeypatch.setattr(staging_module, "_exchange", lambda *folders: False)
    with pytest.raises(OutputError), staging(output, force=True) as stage:
        assert stage.made.is_dir()
        monkeypatch.setattr(os, "rename", failing)
        stage.publish(stage.folder / "made")
    assert names_in(tmp_path) == ["out"] and (output / "old").read_bytes() == b"old"


def test_without_exchange_a_folder_is_replaced_all_the_same(tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_bytes(b"old")
    monkeypatch.setattr(staging_module, "_exchange", lambda *folders: False)
    with staging(output, force=True) as stage:
        stage.publish(stage.made)
    assert names_in(output) == [] and names_in(tmp_path) == ["out"]


def test_the_lock_is_on_the_folder_that_is_there_now(tmp_path: Path, monkeypatch):
    # The first run ends (removes its folder) between our open and our lock, and a third one makes
    # the folder anew: a lock on the dead folder protects nothing.
    flock, folder = fcntl.flock, tmp_path / ".out.skillvec-unfinished"
    calls = []

    def swapped(descriptor: int, operation: int) -> None:
        if not calls:
            folder.rmdir()
            folder.mkdir()
            (folder / "made").write_bytes(b"of the third run")
            calls.append(os.open(folder, os.O_RDONLY))
            flock(calls[0], operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", swapped)
    try:
        with pytest.raises(OutputError), staging(tmp_path / "out"):
            pass
        assert (folder / "made").read_bytes() == b"of the third run"
    finally:
        for descriptor in calls:
            os.close(descriptor)


# --------------------------------------------------------------------------- the official reader

LAYOUT = [("a", "BF16", (2, 3)), ("b", "F8_E4M3", (4,)), ("", "I64", ())]


def written(path: Path, layout: list[tuple[str, str, tuple[int, ...]]]) -> str:
    header = encode_header(layout, {"format": "pt"}, 4096)
    path.write_bytes(header + bytes(sum(tensor_nbytes(*part[1:]) for part in layout)))
    assert header_layout(header) == layout
    return str(path)


def test_the_official_reader_finds_what_was_planned(tmp_path: Path) -> None:
    path = written(tmp_path / "x", LAYOUT)
    official_reader.refuse_misread(path, LAYOUT[::-1])
    official_reader.refuse_misread(written(tmp_path / "empty", []), [])
    for layout, said in (
        (LAYOUT[1:], r"a: expected nothing, found BF16 \[2, 3\]"),
        ([*LAYOUT, ("c", "F32", (1,))], r"c: expected F32 \[1\], found nothing"),
        ([("a", "BF16", (3, 2)), *LAYOUT[1:]], r"a: expected BF16 \[3, 2\], found BF16 \[2, 3\]"),
        ([("a", "F16", (2, 3)), *LAYOUT[1:]], r"a: expected F16 \[2, 3\], found BF16"),
    ):
        with pytest.raises(OutputError, match=f"(?s){path}: .*reads other tensors:\n *{said}"):
            official_reader.refuse_misread(path, layout)
    specs = [spec._replace(dtype="F16") for spec in read_header(path).tensors.values()]
    with pytest.raises(VerificationError, match=r"a: expected F16"):
        official_reader.refuse_misread_files(specs, VerificationError)


def test_a_file_that_the_official_reader_does_not_open_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "x", LAYOUT)
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(OutputError, match=f"{path}: the safetensors package cannot open it: "):
        official_reader.refuse_misread(path, LAYOUT)


def test_a_dtype_that_the_official_reader_does_not_know_is_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ITEMSIZE, "F8_NEW", 1)
    layout = [*LAYOUT, ("new", "F8_NEW", (5,))]
    official_reader.refuse_misread(written(tmp_path / "x", layout), layout)
    known = [dtype for dtype in ITEMSIZE if official_reader._is_known_dtype(dtype)]
    assert "BF16" in known and "F8_NEW" not in known


def test_what_is_not_on_this_disk_is_left_to_our_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = SimpleNamespace(local=None)
    monkeypatch.setitem(_remotes, "hf://org/name@0/x", away)  # type: ignore[misc]
    spec = TensorSpec("a", "BF16", (2, 3), "hf://org/name@0/x", 0, 12)
    official_reader.refuse_misread_files([spec], VerificationError)
    away.local = written(tmp_path / "x", LAYOUT)
    with pytest.raises(VerificationError, match=r"b: expected nothing"):
        official_reader.refuse_misread_files([spec], VerificationError)
