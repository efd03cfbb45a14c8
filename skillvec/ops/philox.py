"""Random numbers addressed by a key and a position, so that no order of work can change one.

Philox 4x64 (Salmon et al. 2011) keyed by the hash of a text: a step of its counter gives 256 bits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest


def draw_uint16(key: str, begin: int, numel: int) -> npt.NDArray[np.uint16]:
    """Return the 16 random bits of each position from `begin` on."""
    return _draw(key, begin, numel, np.dtype("<u2"))


def draw_uint32(key: str, begin: int, numel: int) -> npt.NDArray[np.uint32]:
    """Return the 32 random bits of each position from `begin` on."""
    return _draw(key, begin, numel, np.dtype("<u4"))


def _draw(key: str, begin: int, numel: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    words = np.frombuffer(xxh3_128_digest(key.encode()), "<u8")
    step, first = divmod(begin, 32 // dtype.itemsize)
    nbytes = (first + numel) * dtype.itemsize
    raw = np.random.Philox(key=words, counter=step).random_raw(-(-nbytes // 8))
    return raw.astype("<u8").view(dtype)[first:][:numel]
