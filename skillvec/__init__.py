"""Skill vectors: v = theta_rl - theta_sft, kept as a file and added to other models.

The method is that of PaST (arXiv 2601.11258). Five calls do most of the work:

    import skillvec as sv

    v = sv.diff("rl", "sft", "skill.safetensors")     # the vector, stored exactly
    sv.apply("other", v, "merged", lam=0.7)           # other + 0.7 * v, a model like other
    sv.verify("merged")                               # proves it from what lies on the disk
    sv.orthogonality(v, "sft::base", output="angles") # angles, beside what chance gives
    sv.sweep("other", v, eval=score, output="curve")  # which lambda helps, by your function

and in memory, until the block ends:

    with sv.attach(model, v, lam=0.7) as live:        # a loaded model of transformers
        live.set(lam=0.3)

A MODEL is a folder as save_pretrained writes it, a safetensors file, or "org/name[@revision]" on
the Hub. A VECTOR is what diff wrote, "TUNED::BASE", a PEFT adapter, or a SkillVector. Vectors are
added and scaled as formulas say (0.7 * v - w), without reading a value before it is needed;
v["model.norm.weight"] is one tensor as a numpy array of fp32. The arithmetic is fp32 (fp64 where an
input is) with one rounding, and its bits depend on no worker count and no engine.

Options that many calls share, under one name:

    include, exclude  globs of tensor names: which are taken, which are left out
    rename            rules "REGEX=TEXT" for names that no known layout explains
    rows              embeddings of another length: "strict" refuses, "common" takes the rows that
                      both have, "skip" leaves the tensor out
    allow_nonfinite   take NaN and infinities that are refused otherwise
    workers, engine   how many threads (None: all processors); "threads", "serial" or "ray"
    stream            read a model on the Hub shard by shard, at most two of them on the disk
    dry_run           check and plan everything, write nothing
    force             replace an output that is there
    watcher           is told of the plan and of the progress (skillvec.report.Watcher)

Whatever is refused is a SkillvecError: a UsageError where the request cannot be meant, an
IncompatibleError where models or vectors do not fit (a NonfiniteError where values do not), a
FormatError for a broken file, an OutputError where nothing can be written, a VerificationError
where a proof fails. Reports, vectors and checkpoints show themselves in one line, and in a notebook
as a table.

Importing this module imports nothing heavy: names resolve when they are first used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
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
    "write_html": "verbs.notebook",  # of what shows itself
    "write_repr": "verbs.reprs",
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


if not TYPE_CHECKING:
    # without transformers there are no callbacks: help and `import *` ask for every name of these
    try:
        _found = sys.modules.get("transformers") or find_spec("transformers")
    except (ModuleNotFoundError, ValueError):
        _found = None
    if not _found:
        __all__.remove("SkillVectorCallback")
        __all__.remove("SkillVectorEvaluation")

    # for a type checker every misspelt name would be Any
    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'skillvec' has no attribute {name!r}")
        return getattr(import_module(f"skillvec.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
