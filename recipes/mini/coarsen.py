"""A copy of an fp32 model with fewer bits of mantissa, as a coarser bf16 would store it.

    python -m skillvec.recipes.mini.coarsen --model M --bits 2 --output OUT

bf16 has 7 bits after the leading one, and an update below |w| / 256 is rounded away. The updates of
the miniature are far larger than that, so it takes fewer bits for rounding to decide which of its
weights change. Refuses weights that are not fp32 or not finite.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

MANTISSA = 23  # stored bits of fp32


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=range(MANTISSA), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    weights = load_file(options.model / "model.safetensors")
    shutil.copytree(options.model, options.output, dirs_exist_ok=True)
    rounded = {name: round_mantissa(weight, options.bits) for name, weight in weights.items()}
    save_file(rounded, options.output / "model.safetensors", {"format": "pt"})
    return 0


def round_mantissa(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Round fp32 values to `bits` stored bits of mantissa, to nearest, ties to even.

    ValueError for another dtype and for NaN or infinities.
    """
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise ValueError(f"expected finite fp32 values, found {values.dtype}")
    drop = np.uint32(MANTISSA - bits)
    pattern = np.ascontiguousarray(values).view(np.uint32)
    last = (pattern >> drop) & np.uint32(1)
    half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)
    return ((pattern + half + last) >> drop << drop).view(np.float32)


if __name__ == "__main__":
    sys.exit(main())
