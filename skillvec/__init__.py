"""skillvec: compute, store, analyse and apply skill vectors (PaST, arXiv 2601.11258).

Importing this module imports nothing heavy: names resolve when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "FormatError",
    "IncompatibleError",
    "NonfiniteError",
    "OutputError",
    "Report",
    "SkillVector",
    "SkillVectorCallback",
    "SkillvecError",
    "UsageError",
    "VerificationError",
    "apply",
    "combine",
    "diff",
    "export_patch",
    "extract_lora",
    "import_patch",
    "inspect",
    "norms",
    "open_checkpoint",
    "orthogonality",
    "pull",
    "push",
    "verify",
]

_HOME = {name: "errors" if name.endswith("Error") else "verbs" for name in __all__} | {
    "Checkpoint": "checkpoint",
    "Report": "report",
    "extract_lora": "extraction",
    "pull": "publishing",
    "push": "publishing",
    "SkillVector": "vector",
    "SkillVectorCallback": "training",
    "norms": "comparison",
    "open_checkpoint": "checkpoint",
    "orthogonality": "comparison",
}

if TYPE_CHECKING:
    from skillvec.checkpoint import Checkpoint, open_checkpoint
    from skillvec.comparison import norms, orthogonality
    from skillvec.errors import (
        FormatError,
        IncompatibleError,
        NonfiniteError,
        OutputError,
        SkillvecError,
        UsageError,
        VerificationError,
    )
    from skillvec.extraction import extract_lora
    from skillvec.publishing import pull, push
    from skillvec.report import Report
    from skillvec.training import SkillVectorCallback
    from skillvec.vector import SkillVector
    from skillvec.verbs import (
        apply,
        combine,
        diff,
        export_patch,
        import_patch,
        inspect,
        verify,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'skillvec' has no attribute {name!r}")
    return getattr(import_module(f"skillvec.{_HOME[name]}"), name)
