"""What can go wrong, as types: one root, each also a standard exception, each with its exit code.

Messages say what, where (tensor, file), what was expected and found, and what to do. All take one
string, so they pickle.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager


class SkillvecError(Exception):
    """Root of every error skillvec raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class FormatError(SkillvecError, ValueError):
    """A file breaks the safetensors format, its index, or the vector format."""


class TransferError(FormatError):
    """What arrived is not what its place says it has; another try may help."""


class OutputError(SkillvecError, OSError):
    """The output could not be written: disk full, no permission, another run at work."""


class VerificationError(SkillvecError, ValueError):
    """What lies on the disk is not what the arithmetic gives."""


class UsageError(SkillvecError, ValueError):
    """The request cannot be meant: unknown path, output inside an input, existing output."""

    exit_code = 2


class IncompatibleError(SkillvecError, ValueError):
    """The inputs do not belong together, or are of a kind that is not taken."""

    exit_code = 3


class NonfiniteError(IncompatibleError):
    """Values that are not finite where they are not expected, or that no finite delta carries."""


# of pyproject.toml
EXTRAS = ("eval", "gcs", "gguf", "hf", "ray", "report", "s3", "search", "torch", "train")


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Import within it what one of EXTRAS, or a package, installs; UsageError where that fails.

    `what` begins the sentence: it needs the package that is missing, and how to install it.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or f"the extra {extra}").partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"cannot be imported ({error})"
        install = f'"skillvec[{extra}]"' if extra in EXTRAS else extra
        raise UsageError(f"{what} needs {package}, which {why}: pip install {install}") from None


def printable(text: str) -> str:
    """Return text with control characters escaped: names in files may hold any."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def up_to_five(lines: Sequence[str], kind: str = "") -> str:
    """Return the first five of `lines`, one a row, and how many more (of a kind) there are."""
    shown = [f"  {line:.500}" for line in lines[:5]]  # names in files may be of any length
    if len(lines) > 5:
        shown.append(f"  ... and {len(lines) - 5} more {kind:.200}".rstrip())
    return "\n".join(shown)


def up_to_five_each(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return the first five lines of every kind, one a row, and how many more there are of it.

    For what two sides say: whoever reads names of one side alone cannot see why they differ. Keys
    say what a kind has in common, in words that go on after "and 3 more".
    """
    given = {kind: lines for kind, lines in kinds.items() if lines}
    shown = [up_to_five(lines, kind) for kind, lines in list(given.items())[:5]]
    rest = list(given.values())[5:]
    if rest:
        shown.append(f"  ... and {sum(map(len, rest))} more of {len(rest)} other kinds")
    return "\n".join(shown)


def only_here(here: Iterable[str], there: Iterable[str], where: str) -> dict[str, list[str]]:
    """Return the names that only one of two sides has, as a kind for `up_to_five_each`."""
    other = set(there)
    return {f"only in {where}": [f"{n}: only in {where}" for n in here if n not in other]}
