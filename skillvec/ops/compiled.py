"""The compiled kernels, where there are some and they give numpy's bytes on this machine.

Hides the module `_native`, which an installation without a compiler lacks, and which of its builds
this processor runs. The numpy code beside each kernel is its documentation and takes its place: a
kernel is used only after it has given, on a fixed sample, the digest that numpy gives. The variable
SKILLVEC_KERNELS chooses: numpy, or an instruction set, or (not set) the best that is here.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import NamedTuple

from xxhash import xxh3_64_hexdigest

from skillvec.errors import UsageError

Kernel = Callable[..., int]
ISAS = ("avx512", "avx2", "neon")  # best first
CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}  # dtypes, as native/tiles.h numbers them


class _Choice(NamedTuple):
    isa: str  # or "numpy"
    kernels: dict[str, Kernel]
    why: str  # numpy; "" for an instruction set


_refused: list[str] = []  # names of kernels that have not given numpy's digest


@cache
def _chosen() -> _Choice:
    """Return the instruction set in use and its kernels by name.

    Raises UsageError where SKILLVEC_KERNELS asks for what nobody knows, or for what is not here.
    """
    # glibc keeps for the next array, and does not return to the system, what is as large as a
    # block that was once freed: numpy's arrays of a step cost twice the time else
    bytearray(2 << 20)
    wanted = os.environ.get("SKILLVEC_KERNELS", "")
    if wanted not in ("", "numpy", *ISAS):
        raise UsageError(f"SKILLVEC_KERNELS={wanted}: expected numpy, or one of {', '.join(ISAS)}")
    if wanted == "numpy":
        return _Choice("numpy", {}, "SKILLVEC_KERNELS says so")
    found: dict[str, dict[str, Kernel]] = {}
    try:
        native = import_module("skillvec.ops._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = "installed without a C compiler" if missing else f"no compiled module: {error}"
    else:
        found = {isa: kernels for isa in ISAS if (kernels := native.kernels(isa))}
        why = "the processor has neither AVX2 with FMA, BMI2 and F16C nor NEON"
    if wanted not in ("", *found):
        lacks = f"the processor lacks it, and runs {', '.join(found)}" if found else why
        raise UsageError(f"SKILLVEC_KERNELS={wanted}: not on this machine: {lacks}")
    for isa in [wanted] if wanted else found:
        return _Choice(isa, found[isa], "")
    return _Choice("numpy", {}, why)


def kernel(name: str, sample: Callable[[Kernel], bytes], digest: str) -> Kernel | None:
    """Return a compiled kernel, or None where numpy has to do its work.

    `sample` runs a kernel on fixed inputs and returns all that it wrote; `digest` is that of numpy.
    For a module's constant or a cached function: it is not cached here.
    """
    found = kernels([name], lambda run: sample(run[0]), digest)
    return found[0] if found else None


def kernels(
    names: Sequence[str], sample: Callable[[Sequence[Kernel]], bytes], digest: str
) -> list[Kernel] | None:
    """Return several compiled kernels that one sample checks, or None, as `kernel` does."""
    here = _chosen().kernels
    found = [here[name] for name in names if name in here]
    if len(found) < len(names):
        return None
    try:
        same = xxh3_64_hexdigest(sample(found)) == digest
    except Exception:  # other arguments, as of another version; positions that cannot be
        same = False
    if not same:
        _refused.extend(name for name in names if name not in _refused)
    return found if same else None


def in_use() -> str:
    """Return whose kernels run here: an instruction set or "numpy", and what numpy does beside."""
    isa = _chosen().isa
    return f"{isa}, numpy for {', '.join(_refused)}" if _refused else isa


def explain() -> str:
    """Return why numpy does the work, or a part of it; "" where it does none that has a kernel."""
    if _refused:
        return "kernels that gave other bytes than numpy on this machine are not used"
    return _chosen().why
