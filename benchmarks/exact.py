"""Count the values of a vector or a model that are not the correctly rounded exact ones.

Hides how a result without any rounding but the last is found, and how each program's output is
read. Nothing of skillvec, torch or safetensors is imported: this is the second opinion. Invariants:
numpy only, one block of each input in memory (of a database, one tensor); lambda is 1.

- vector: tuned - base
- sum: target + (tuned - base)
- tuned: tuned itself, which base and a stored vector have to give back

Each value is computed from the stored values in float64 together with the error of every float64
addition, and rounded once, to nearest with ties to even, to the dtype of the output. An output is
a safetensors file, a folder of them, or a database of reminis.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 20
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bf16: its bits
WHATS = ("vector", "sum", "tuned")


class Tensor(NamedTuple):
    """A tensor of float values; `read` returns the bytes of `count` values from `first` on."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], bytes]

    @property
    def numel(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


# ------------------------------------------------------------------------------------ arithmetic


def add_exactly(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 sum and its error, which together are a + b (Knuth's two-sum)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def round_to_odd(nearest: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the neighbour with an odd last bit where `error` says that rounding took place.

    `nearest` is float32 or float64 and `error` has the sign of what was lost. A value rounded to
    odd keeps the order towards everything that has two bits less, so a second rounding is as good
    as one alone (Boldo and Melquiond, doi 10.1109/TC.2007.70819).
    """
    bits = nearest.view(f"i{nearest.itemsize}")
    away = np.where((error < 0) == np.signbit(nearest), 1, -1).astype(bits.dtype)
    even = (error != 0) & (bits & 1 == 0)
    return np.where(even, bits + away, bits).view(nearest.dtype)


def sum_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a + b + c of float32, float16 or bf16 values held in float64, rounded to odd."""
    high, low = add_exactly(b, c)
    total, lost = add_exactly(a, high)
    rest = round_to_odd(*add_exactly(lost, low))
    return round_to_odd(*add_exactly(total, rest))


def round_once(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values, exact or rounded to odd, to the nearest of `dtype`; bits of bf16."""
    with np.errstate(over="ignore"):  # what is too large for the dtype is infinite there
        narrow = values.astype(STORED[dtype] if dtype != "BF16" else np.float32)
    if dtype != "BF16":
        return narrow
    bits = round_to_odd(narrow, values - narrow).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float64 values of a stored block."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def expected(what: str, values: dict[str, np.ndarray]) -> np.ndarray:
    """Return the exact result of a block in float64, rounded to odd where it does not fit."""
    if what == "tuned":
        return values["tuned"]
    first = values["target"] if what == "sum" else np.zeros_like(values["tuned"])
    return sum_to_odd(first, values["tuned"], -values["base"])


# ---------------------------------------------------------------------------------------- reading


def in_files(place: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file or folder by name."""
    for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        fd = os.open(path, os.O_RDONLY)
        (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
        for name, entry in json.loads(os.pread(fd, length, 8)).items():
            if name == "__metadata__":
                continue
            at, dtype = 8 + length + entry["data_offsets"][0], entry["dtype"]
            size = np.dtype(STORED.get(dtype, "u1")).itemsize

            def read(first: int, count: int, fd: int = fd, at: int = at, size: int = size) -> bytes:
                return os.pread(fd, size * count, at + size * first)

            yield name, Tensor(dtype, tuple(entry["shape"]), read)


def in_database(place: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a database of reminis, which keeps shapes in reverse."""
    base = sqlite3.connect(f"file:{place}?mode=ro", uri=True)
    held: dict[str, bytes] = {}  # the tensor that was asked for last
    for name, shape, dtype in base.execute("SELECT name, shape, dtype FROM tensors").fetchall():
        size = np.dtype(STORED.get(dtype, "u1")).itemsize

        def read(first: int, count: int, name: str = name, size: int = size) -> bytes:
            if name not in held:
                held.clear()
                ask = "SELECT data FROM tensors WHERE name = ?"
                held[name] = base.execute(ask, (name,)).fetchone()[0]
            return held[name][size * first : size * (first + count)]

        yield name, Tensor(dtype, tuple(json.loads(shape)[::-1]), read)


def tensors(place: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, folder or database by name."""
    found = dict(in_database(place) if place.suffix == ".db" else in_files(place))
    strange = sorted({t.dtype for t in found.values()} - STORED.keys())
    if strange or not found:
        what = f"tensors of {', '.join(strange)}" if strange else "no tensors"
        raise ValueError(f"{place}: {what}; expected float values of {', '.join(STORED)}")
    return found


def block(tensor: Tensor, first: int) -> np.ndarray:
    """Return a block as it is stored; raises ValueError where the file ends before it."""
    count = min(BLOCK, tensor.numel - first)
    return np.frombuffer(tensor.read(first, count), STORED[tensor.dtype], count)


# --------------------------------------------------------------------------------------- counting


def compare(output: Path, what: str, sources: dict[str, Path]) -> dict[str, float]:
    """Compare `output` with the exact result of the models in `sources`, by role.

    Returns counts: `values` of all tensors that should be there, `wrong` values, zeros of either
    sign being one number, `unequal_bits`, `missing` and `extra` tensors, and `other_dtype`, tensors
    of another dtype than those of the tuned model. All of a tensor that is missing or has another
    shape is wrong. `lost` is the norm of what is wrong over the norm of tuned - base, of the
    tensors that are there. Raises ValueError for models that do not fit each other or are not
    finite.
    """
    actual, inputs = tensors(output), {role: tensors(place) for role, place in sources.items()}
    shapes = {name: tensor.shape for name, tensor in inputs["tuned"].items()}
    for role, found in inputs.items():
        if {name: tensor.shape for name, tensor in found.items()} != shapes:
            raise ValueError(f"{sources[role]}: names or shapes are not those of the tuned model")
    count = dict.fromkeys(("values", "wrong", "unequal_bits", "missing", "other_dtype"), 0)
    count["extra"] = len(actual.keys() - shapes.keys())
    squares = np.zeros(2)
    for name, shape in shapes.items():
        numel = inputs["tuned"][name].numel
        count["values"] += numel
        own = actual.get(name)
        if own is None or own.shape != shape:
            count["missing"] += 1
            count["wrong"] += numel
            count["unequal_bits"] += numel
            continue
        count["other_dtype"] += own.dtype != inputs["tuned"][name].dtype
        for first in range(0, numel, BLOCK):
            here = {role: widen(block(f[name], first), f[name].dtype) for role, f in inputs.items()}
            if not all(np.isfinite(values).all() for values in here.values()):
                raise ValueError(f"{name}: a model has values that are not finite")
            exact = expected(what, here)
            right, stored = round_once(exact, own.dtype), block(own, first)
            values = widen(stored, own.dtype)
            count["wrong"] += int(np.count_nonzero(values != widen(right, own.dtype)))
            bits = f"u{stored.itemsize}"
            count["unequal_bits"] += int(np.count_nonzero(stored.view(bits) != right.view(bits)))
            squares += [np.square(values - widen(right, own.dtype)).sum(),
                        np.square(here["tuned"] - here["base"]).sum()]  # fmt: skip
    error, moved = np.sqrt(squares)
    return count | {"lost": float(error / moved) if moved else float(error)}


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--what", choices=WHATS, required=True)
    for role in ("tuned", "base"):
        parser.add_argument(f"--{role}", type=Path, required=True)
    parser.add_argument("--target", type=Path, help="of the sum")
    given = vars(parser.parse_args())
    output, what = given.pop("output"), given.pop("what")
    if (what == "sum") != (given["target"] is not None):
        parser.error("--target belongs to --what sum")
    print(json.dumps(compare(output, what, {role: p for role, p in given.items() if p})))


if __name__ == "__main__":
    main()
