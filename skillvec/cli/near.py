"""What a user may have meant by a word that is no command and no option: near ones, other names."""

from collections.abc import Iterable, Mapping, Sequence

OPERATORS = (
    "linear", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "ram", "sparsify",
    "orthogonal", "slerp", "nuslerp", "fisher", "spectral", "coarsen", "project",
)  # fmt: skip
# what other tools, or other words, call it
COMMANDS_ALSO = {
    "merge": ("combine", "apply"), "mix": ("combine",), "add": ("apply",), "inject": ("apply",),
    "subtract": ("diff",), "sub": ("diff",), "extract": ("diff", "extract-lora"),
    "create": ("diff",), "make": ("diff",), "lora": ("extract-lora",),
    "patch": ("export-patch", "import-patch"), "compare": ("orthogonality",),
    "cosine": ("orthogonality",), "angle": ("orthogonality",), "similarity": ("orthogonality",),
    "norm": ("norms",), "measure": ("norms", "orthogonality"), "info": ("inspect",),
    "show": ("inspect",), "describe": ("inspect",), "ls": ("inspect",), "check": ("verify",),
    "validate": ("verify",), "prove": ("verify",), "eval": ("sweep", "search"),
    "evaluate": ("sweep", "search"), "scan": ("sweep",), "tune": ("search",),
    "optimize": ("search",), "upload": ("push",), "publish": ("push",), "download": ("pull",),
    "fetch": ("pull",), "version": ("--version",),
    **{name: ("combine", "apply") for name in OPERATORS if name != "orthogonal"},
}  # fmt: skip
OPTIONS_ALSO = {
    "--lambda": ("--lam",), "--scale": ("--lam",), "--alpha": ("--lam",), "--coef": ("--lam",),
    "--weight": ("--lam",), "--operator": ("--op",), "--merge-method": ("--op",),
    "--density": ("--param",), "--overwrite": ("--force",), "--out": ("--output",),
    "--jobs": ("--workers",), "--threads": ("--workers",), "--num-workers": ("--workers",),
    "--only": ("--include",), "--filter": ("--include",), "--skip": ("--exclude",),
}  # fmt: skip


def find_near(word: str, known: Iterable[str], also: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the known words that a word may stand for: other names of it first, else near ones."""
    from difflib import get_close_matches

    known, word = [*known], word.lower()
    dashed = word.replace("_", "-")
    meant = [name for name in also.get(word, (dashed,)) if name in known]
    return meant or get_close_matches(dashed, known)


def ask_if(words: Sequence[str]) -> str:
    """Return the question whether one of some words was meant, "" for none."""
    if not words:
        return ""
    *others, last = words
    before = f"{', '.join(others)} or " if others else ""
    return f" Did you mean {before}{last}?"
