"""The builds of the compiled kernels that run on this machine; none without the compiled module."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from skillvec.ops import compiled

try:
    NATIVE: Any = import_module("skillvec.ops._native")
except ImportError:
    NATIVE = SimpleNamespace(kernels=lambda isa: {})
BUILDS: dict[str, dict[str, compiled.Kernel]] = {
    isa: found for isa in compiled.ISAS if (found := NATIVE.kernels(isa))
}
