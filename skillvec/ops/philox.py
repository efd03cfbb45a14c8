"""Random numbers addressed by a key and a position, so that no order of work can change one.

Philox 4x64 (Salmon et al. 2011) keyed by the hash of a text: a step of its counter gives 256 bits.
numpy's generator says what the words are; a compiled kernel gives the same ones.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from skillvec.ops.compiled import Kernel, kernel

DIGEST = "643f56fca31ce9ce"  # of numpy_words(bytes(range(16)), 2**32 - 7, 40); a test compares


def draw_uint16(key: str, begin: int, numel: int) -> npt.NDArray[np.uint16]:
    """Return the 16 random bits of each position from `begin` on."""
    return _draw(key, begin, numel, np.dtype("<u2"))


def draw_uint32(key: str, begin: int, numel: int) -> npt.NDArray[np.uint32]:
    """Return the 32 random bits of each position from `begin` on."""
    return _draw(key, begin, numel, np.dtype("<u4"))


def _draw(key: str, begin: int, numel: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    step, first = divmod(begin, 32 // dtype.itemsize)
    steps = -(-(first + numel) * dtype.itemsize // 32)
    digest, run = xxh3_128_digest(key.encode()), _kernel()
    if run is None or step >> 63:
        words = numpy_words(digest, step, steps)
    else:
        words = np.empty(4 * steps, "<u8")
        run(digest, step, words)
    return words.view(dtype)[first:][:numel]


def numpy_words(key: bytes, step: int, steps: int) -> npt.NDArray[np.uint64]:
    """Return four words of 64 bits for each of `steps` counters behind `step`."""
    raw = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=step).random_raw(4 * steps)
    return raw.astype("<u8", copy=False)


@cache
def _kernel() -> Kernel | None:
    def sample(run: Kernel) -> bytes:
        words = np.empty(160, "<u8")
        run(bytes(range(16)), 2**32 - 7, words)
        return words.tobytes()

    return kernel("draw", sample, DIGEST)
