"""The compiled kernels, where there are some and they give numpy's bytes on this machine.

Hides the module `_native`, which an installation without a compiler lacks, and which of its builds
this processor runs. The numpy code beside each kernel is its documentation and takes its place: a
kernel is used only after it has given, on a fixed sample, the digest that numpy gives. The variable
SKILLVEC_KERNELS chooses: numpy, or an instruction set, or (not set) the best that is here.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module

from xxhash import xxh3_64_hexdigest

Kernel = Callable[..., int]
ISAS = ("avx512", "avx2", "neon")  # best first
CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}  # dtypes, as native/tiles.h numbers them


@cache
def _chosen() -> tuple[str, dict[str, Kernel]]:
    """Return the instruction set in use and its kernels by name; "numpy" and none without."""
    wanted = os.environ.get("SKILLVEC_KERNELS", "")
    if wanted not in ("", "numpy", *ISAS):
        raise ValueError(f"SKILLVEC_KERNELS={wanted}: expected numpy or one of {', '.join(ISAS)}")
    try:
        native = import_module("skillvec.ops._native")
    except ImportError:  # no compiler, or none for this platform
        return "numpy", {}
    for isa in ISAS:
        found = native.kernels(isa) if wanted in ("", isa) else {}
        if found:
            return isa, found
    return "numpy", {}


def kernel(name: str, sample: Callable[[Kernel], bytes], digest: str) -> Kernel | None:
    """Return a compiled kernel, or None where numpy has to do its work.

    `sample` runs a kernel on fixed inputs and returns all that it wrote; `digest` is that of numpy.
    For a module's constant or a cached function: it is not cached here.
    """
    found = _chosen()[1].get(name)
    if found is None or xxh3_64_hexdigest(sample(found)) != digest:
        return None
    return found


def in_use() -> str:
    """Return whose kernels run here: an instruction set, or "numpy"."""
    return _chosen()[0]
