"""skillvec: compute, store, analyse and apply skill vectors (PaST, arXiv 2601.11258).

Importing this module imports nothing heavy: names resolve when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skillvec.moved import answer_old_names

__version__ = "0.2.0"

__all__ = [
    "Checkpoint",
    "FormatError",
    "IncompatibleError",
    "Live",
    "NonfiniteError",
    "OutputError",
    "Report",
    "SkillVector",
    "SkillVectorCallback",
    "SkillVectorEvaluation",
    "SkillvecError",
    "UsageError",
    "VerificationError",
    "apply",
    "attach",
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
    "search",
    "sweep",
    "verify",
]

_HOME = {name: "errors" if name.endswith("Error") else "verbs" for name in __all__} | {
    "Checkpoint": "checkpoints.checkpoint",
    "Live": "verbs.live",
    "Report": "report",
    "SkillVector": "vectors.vector",
    "SkillVectorCallback": "verbs.training",
    "SkillVectorEvaluation": "verbs.training",
    "attach": "verbs.live",
    "open_checkpoint": "checkpoints.opening",
    "read_values": "verbs",  # of vector["name"]
    "save": "verbs",  # of SkillVector.save
    "search": "trials.search",
    "sweep": "trials.sweep",
}

answer_old_names()

if TYPE_CHECKING:
    from skillvec.checkpoints.checkpoint import Checkpoint
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.errors import (
        FormatError,
        IncompatibleError,
        NonfiniteError,
        OutputError,
        SkillvecError,
        UsageError,
        VerificationError,
    )
    from skillvec.report import Report
    from skillvec.trials.search import search
    from skillvec.trials.sweep import sweep
    from skillvec.vectors.vector import SkillVector
    from skillvec.verbs import (
        apply,
        combine,
        diff,
        export_patch,
        extract_lora,
        import_patch,
        inspect,
        norms,
        orthogonality,
        pull,
        push,
        verify,
    )
    from skillvec.verbs.live import Live, attach
    from skillvec.verbs.training import SkillVectorCallback, SkillVectorEvaluation


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'skillvec' has no attribute {name!r}")
    return getattr(import_module(f"skillvec.{_HOME[name]}"), name)
