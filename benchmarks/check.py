"""Compare a merged checkpoint or a stored delta with a reference, value by value.

Hides the reading of safetensors and the distance between bf16 values. Nothing of skillvec, torch
or safetensors is imported: this is the second opinion. Invariants: numpy only, one block of each
input in memory, float32 arithmetic with lambda in float32 and one rounding at the end.

The reference is `tuned - base`, or `target + lam * (tuned - base)` when a target is given, or
another program's output (`--against`). A step is one bf16 value: the distance between two values
is the number of steps between them in the order of the real numbers, with -0 and +0 in one place.
Near zero one float32 rounding can be thousands of steps, so differing values are counted as well,
and those that differ in any bit, a zero's sign included.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 1 << 18
Tensor = tuple[int, int, int]  # file descriptor, first byte, number of values


def tensors(place: Path) -> dict[str, Tensor]:
    """Map the names of the bf16 tensors of a file or folder to where they lie."""
    found: dict[str, Tensor] = {}
    for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        fd = os.open(path, os.O_RDONLY)
        (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
        for name, entry in json.loads(os.pread(fd, length, 8)).items():
            if entry.get("dtype") == "BF16":
                begin, end = entry["data_offsets"]
                found[name] = fd, 8 + length + begin, (end - begin) // 2
    return found


def read(tensor: Tensor, first: int) -> np.ndarray:
    """Return the uint16 bits of one block."""
    fd, start, numel = tensor
    nbytes = 2 * min(BLOCK, numel - first)
    return np.frombuffer(os.pread(fd, nbytes, start + 2 * first), np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to the nearest bf16, ties to even; returns uint16 bits."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def steps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distance of bf16 bits in steps."""

    def rank(bits: np.ndarray) -> np.ndarray:
        magnitude = (bits & 0x7FFF).astype(np.int32)
        return np.where(bits >> 15, -magnitude, magnitude)

    away: np.ndarray = np.abs(rank(a) - rank(b))
    return away


def compare(output: Path, sources: dict[str, Path], lam: float) -> dict[str, int]:
    """Compare every tensor of `output`; raises ValueError where names or sizes differ."""
    actual = tensors(output)
    inputs = {role: tensors(place) for role, place in sources.items()}
    for role, found in inputs.items():
        names = found.keys() | actual.keys()
        unlike = [n for n in names if found.get(n, ())[2:] != actual.get(n, ())[2:]]
        if unlike:
            raise ValueError(
                f"{role} and output differ in {len(unlike)} tensors: {sorted(unlike)[:5]}"
            )

    def measure(job: tuple[str, int]) -> tuple[int, int, int, int, int]:
        name, first = job
        bits = {role: read(found[name], first) for role, found in inputs.items()}
        if "against" in bits:
            expected = bits["against"]
        else:
            value = widen(bits["tuned"]) - widen(bits["base"])
            if "target" in bits:
                value = widen(bits["target"]) + np.float32(lam) * value
            expected = round_bf16(value)
        found = read(actual[name], first)
        unequal = int(np.count_nonzero(found != expected))
        away = steps(found, expected)
        away = away[away > 0]
        return away.size, int((away > 1).sum()), int(away.max(initial=0)), unequal, expected.size

    jobs = ((name, first) for name in actual for first in range(0, actual[name][2], BLOCK))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        columns = list(zip(*pool.map(measure, jobs), strict=True))
    return {
        "values": sum(columns[4]),
        "unequal_bits": sum(columns[3]),
        "differ": sum(columns[0]),
        "beyond_one_step": sum(columns[1]),
        "worst_steps": max(columns[2]),
    }


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    for role in ("tuned", "base", "target", "against"):
        parser.add_argument(f"--{role}", type=Path)
    parser.add_argument("--lam", type=float, default=1.0)
    given = vars(parser.parse_args())
    output, lam = given.pop("output"), given.pop("lam")
    print(json.dumps(compare(output, {role: p for role, p in given.items() if p}, lam)))


if __name__ == "__main__":
    main()
