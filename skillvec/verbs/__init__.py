"""What can be done? One file a verb: its function, its facts, its sentences.

`from skillvec.verbs import apply` gives the function. Its file is _apply.py, because a module of
the same name would take its place here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "apply",
    "combine",
    "diff",
    "export_patch",
    "extract_lora",
    "import_patch",
    "inspect",
    "norms",
    "orthogonality",
    "pull",
    "push",
    "read_values",
    "save",
    "verify",
]

_HOME = {
    "apply": "_apply",
    "combine": "_combine",
    "diff": "_diff",
    "export_patch": "_patch",
    "extract_lora": "_extract_lora",
    "import_patch": "_patch",
    "inspect": "_inspect",
    "norms": "_orthogonality",
    "orthogonality": "_orthogonality",
    "pull": "_publish",
    "push": "_publish",
    "read_values": "_values",
    "save": "_save",
    "verify": "_verify",
}

if TYPE_CHECKING:
    from skillvec.verbs._apply import apply
    from skillvec.verbs._combine import combine
    from skillvec.verbs._diff import diff
    from skillvec.verbs._extract_lora import extract_lora
    from skillvec.verbs._inspect import inspect
    from skillvec.verbs._orthogonality import norms, orthogonality
    from skillvec.verbs._patch import export_patch, import_patch
    from skillvec.verbs._publish import pull, push
    from skillvec.verbs._save import save
    from skillvec.verbs._values import read_values
    from skillvec.verbs._verify import verify


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'skillvec.verbs' has no attribute {name!r}")
    return getattr(import_module(f"skillvec.verbs.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
