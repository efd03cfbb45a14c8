"""The header of a safetensors file: names, dtypes, shapes and places, checked before use."""

import json
import os
import re
import struct
import sys
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from skillvec.errors import FormatError, OutputError
from skillvec.files.file import file_nbytes, read_bytes
from skillvec.files.fingerprints import witness

MAX_HEADER_NBYTES = 100_000_000  # the cap of the official reader
MAX_DIMENSIONS = 64  # where numpy and torch end
MAX_SIZE = (1 << 63) - 1  # of a dimension and of an offset

# dtype name -> bytes per element; the packed and 8-bit float kinds are known so they can be named
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
SUBBYTE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # dtype name -> bits per element


class TensorSpec(NamedTuple):
    """Where a tensor lies: `start` is the absolute byte offset in the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Header(NamedTuple):
    """A checked safetensors header: tensors in file order, and the string metadata."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dict; ValueError for a key that stands twice, for readers of
    which some take the first and some the last."""
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return keys


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes a tensor takes; raise ValueError for a dtype the format does not have."""
    if dtype in ITEMSIZE:
        return ITEMSIZE[dtype] * prod(shape)
    if dtype in SUBBYTE:
        nbits = SUBBYTE[dtype] * prod(shape)
        if nbits % 8:
            raise ValueError(f"{dtype} x {list(shape)} does not fill whole bytes")
        return nbits // 8
    raise ValueError(f"unknown dtype {dtype!r}")


KEYS = {"dtype", "shape", "data_offsets"}


def _checked_spec(path: str, name: str, entry: Any, data_start: int) -> TensorSpec:
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise ValueError("expected exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        # checked before the sizes are multiplied, which takes long where they are many
        fits = isinstance(numbers, list) and len(numbers) <= MAX_DIMENSIONS
        for n in numbers if fits else ():
            fits = fits and type(n) is int and 0 <= n <= MAX_SIZE
        if not fits:
            raise ValueError(
                f"{key} is not a list of at most {MAX_DIMENSIONS} non-negative integers:"
                f" {str(numbers)[:80]}"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {offsets} are not [begin, end]")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    dtype, shape = sys.intern(entry["dtype"]), tuple(shape)
    nbytes = tensor_nbytes(dtype, shape)
    if nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{dtype} x {list(shape)} takes {nbytes} bytes, data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorSpec(name, dtype, _one_shape(shape), path, data_start + offsets[0], nbytes)


@lru_cache(maxsize=4096)
def _one_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


# what else is found under the name of safetensors: bytes at an offset, what they begin, what to do
OTHERS = (
    (0, b"PK\3\4", "a zip archive", "if torch.save wrote it, name it .pt or .bin; a TorchScript"
     " module has to be loaded and its state dict saved as safetensors"),
    *((0, bytes([128, n]), "a pickle", "load it with torch, save it as safetensors")
      for n in (2, 3, 4, 5)),
    (0, b"GGUF", "GGUF", "diff and apply the safetensors that it was made from, then convert"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (0, b"BZh", "a bzip2 archive", "unpack it"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x89HDF\r\n", "HDF5 (Keras, TensorFlow)", "load it with its library, then save"),
    (0, b"\x93NUMPY", "a numpy array", "save it by safetensors.numpy.save_file"),
    (0, b"version http", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
)  # fmt: skip
TEXT = re.compile(rb"(\xef\xbb\xbf)?[\t\n\r\x20-\x7e]+")


def seems(path: str, nbytes: int) -> str | None:
    """Return what a file is by its first bytes and what to do with it; None where they say nothing.

    For errors alone: it is asked when a file is not what its name says.
    """
    head = read_bytes(path, 0, min(512, nbytes))
    for at, magic, what, advice in OTHERS:
        if head.startswith(magic, at) and head[8:9] != b"{":  # there JSON would begin
            return f"{what} by its first bytes: {advice}"
    if head and TEXT.fullmatch(head[:64]):
        said = head[:40].decode("ascii", "replace").strip()
        if path.endswith(".json"):  # a config or an index: what a person may point at
            return "JSON by its name: name the folder that it lies in"
        return f"text that begins with {said!r}, perhaps an error page: download the file again"
    if len(head) > 8 and not any(head):
        return "zeros, as an interrupted download leaves them: download the file again"
    return None


def _no_header(path: str, nbytes: int, problem: str) -> FormatError:
    """Return the error for a file that does not begin like safetensors."""
    found = seems(path, nbytes)
    return FormatError(f"{path}: {f'not safetensors, but {found}' if found else problem}")


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file without touching its data.

    Returns tensors in the order of their data. Raises FormatError naming the file, the tensor and
    the broken rule, or what the file is instead; OSError where the file cannot be read.
    """
    path = os.fspath(path)
    witness(path)
    nbytes = file_nbytes(path)
    header, data_start = _parsed_header(path, nbytes)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null, as mlx writes it
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is not a map of strings")
    specs = []
    for name, entry in header.items():
        try:
            specs.append(_checked_spec(path, name, entry, data_start))
        except ValueError as error:
            raise FormatError(f"{path}: tensor {name!r:.200}: {str(error)[:200]}") from None
    specs.sort(key=lambda spec: (spec.start, spec.nbytes))
    position = data_start
    for spec in specs:
        if spec.start != position:
            rule = "overlaps the tensor before it" if spec.start < position else "leaves a gap"
            raise FormatError(
                f"{path}: tensor {spec.name!r:.200} begins at byte {spec.start} and {rule}"
                f" (expected {position})"
            )
        position += spec.nbytes
    if position != nbytes:
        rule = "truncated" if position > nbytes else "bytes behind the last tensor"
        raise FormatError(f"{path}: expected {position} bytes, found {nbytes}: {rule}")
    return Header({spec.name: spec for spec in specs}, metadata, data_start)


def _parsed_header(path: str, nbytes: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object that a file of safetensors begins with, and where its data begins."""
    prefix = read_bytes(path, 0, min(8, nbytes))
    if len(prefix) < 8:
        raise _no_header(path, nbytes, f"{nbytes} bytes are too few for a safetensors file")
    (header_nbytes,) = struct.unpack("<Q", prefix)
    if header_nbytes > MAX_HEADER_NBYTES:
        cap = f"header of {header_nbytes} bytes, over the cap of {MAX_HEADER_NBYTES}"
        raise _no_header(path, nbytes, f"{cap} (not a safetensors file?)")
    if 8 + header_nbytes > nbytes:
        problem = f"header of {header_nbytes} bytes in a file of {nbytes}: truncated"
        raise _no_header(path, nbytes, problem)
    raw = read_bytes(path, 8, header_nbytes)
    try:
        text = raw.decode("utf-8")
        is_escaped, is_object = b"\\u" in raw, raw.startswith(b"{")
        del raw  # it is as long as the text
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        if is_escaped:  # escaped lone surrogates are no text
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _no_header(path, nbytes, f"header is not valid JSON: {error}") from None
    if not is_object or not isinstance(header, dict):
        raise _no_header(path, nbytes, "header is not a JSON object")
    return header, 8 + header_nbytes


def encode_header(
    layout: list[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    reserved_nbytes: int | None = None,
) -> bytes:
    """Return length prefix and JSON header for tensors laid end to end in the given order.

    `layout` holds (name, dtype, shape). The header is padded with blanks to a multiple of 8, or to
    `reserved_nbytes` (prefix included), so that it can be rewritten when the digests are known.
    """
    said = json.dumps({"__metadata__": dict(metadata)}, separators=(",", ":"), ensure_ascii=False)
    parts, position = [said[:-1]], 0
    for name, dtype, shape in layout:  # spelt out: as a dict, many tensors take room and time
        end, sizes = position + tensor_nbytes(dtype, shape), ",".join(map(str, shape))
        parts.append(
            f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{sizes}],'
            f'"data_offsets":[{position},{end}]}}'
        )
        position = end
    raw = (",".join(parts) + "}").encode()
    nbytes = -(-len(raw) // 8) * 8 if reserved_nbytes is None else reserved_nbytes - 8
    if nbytes > MAX_HEADER_NBYTES:
        raise OutputError(f"header of {nbytes} bytes, over the format's cap of {MAX_HEADER_NBYTES}")
    assert len(raw) <= nbytes, "the reserved header is too small"
    return b"".join((struct.pack("<Q", nbytes), raw, b" " * (nbytes - len(raw))))


def header_layout(header: bytes) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype, shape) of the tensors in what `encode_header` has made."""
    said = json.loads(header[8:])
    return [(n, e["dtype"], tuple(e["shape"])) for n, e in said.items() if n != "__metadata__"]
