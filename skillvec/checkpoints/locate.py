"""Where a reference leads: to this disk, the Hub or an object store; also one of a record."""

import os
from itertools import islice
from pathlib import Path

from skillvec.checkpoints.opened_by import SUFFIXES
from skillvec.errors import SkillvecError, UsageError, printable
from skillvec.files.file import Place
from skillvec.remote.references import SCHEME, is_of_hub, is_of_store, is_recorded

MOST_NAMES = 10_000  # of a folder that are looked at for one like that which is not there


def locate(ref: str | os.PathLike[str], role: str) -> Place:
    """Return where a reference leads; what exists on this disk comes before the Hub.

    URLs but hf:// are those of object stores.
    """
    text = written(ref, role)
    if not text.strip():  # "$MODEL" where it was not set; a path it would be that of this folder
        raise UsageError(f"{role} {text!r}: an empty name, expected a path or a name on the Hub")
    try:
        text.encode()
    except UnicodeEncodeError:  # it could not stand in a manifest
        raise UsageError(f"{role} {text!r}: a path that is no valid UTF-8: rename it") from None
    if is_of_store(text):
        from skillvec.remote import object_store

        return object_store.locate(text, role)
    try:
        path = Path(text).expanduser()
        there = path.exists()
    except (RuntimeError, OSError) as error:  # ~ of nobody; a name longer than the system takes
        raise UsageError(f"{role} {text:.200}: {str(error)[:200]}") from None
    if there:
        path = path.resolve()
        files = {entry.name: entry.path for entry in os.scandir(path)} if path.is_dir() else {}
        # written as a commit of the Hub, and none: a record must not say that it is
        return Place(f"./{text}" if is_recorded(text) else text, path, files)
    if path.is_symlink():
        raise UsageError(f"{role} {text}: a link, and what it leads to is not there")
    if Path(text).suffix in SUFFIXES and not text.startswith(SCHEME):
        raise UsageError(f"{role} {text}: no such file{_ask(text, role)}")
    if not is_of_hub(text):
        raise UsageError(f"{role} {text}: no such file or folder{_ask(text, role)}")
    from skillvec.remote import hub

    try:
        return hub.locate(text, role)
    except SkillvecError as error:
        if text.startswith(SCHEME):
            raise
        here = f"(nor is {text} a file or folder of this disk{_ask(text, role)})"
        raise type(error)(f"{error}\n{here}") from None


def written(ref: str | os.PathLike[str], role: str) -> str:
    """Return a reference as text; UsageError for what is none, such as a vector in memory."""
    if not isinstance(ref, str | os.PathLike):
        raise UsageError(f"{role}: expected a path or a name on the Hub, found {ref!r:.200}")
    return os.fspath(ref)


def _ask(text: str, role: str) -> str:
    """Return the question whether something that exists was meant, "" where nothing is near.

    That is a pair of models whose "::" is one colon, a path with one other name in it, or a file
    whose name goes on.
    """
    from difflib import get_close_matches  # no run that succeeds needs it

    tuned, colon, base = text.partition(":")
    if role == "vector" and colon and any(map(os.path.exists, (tuned, base))):
        return f"; did you mean {tuned}::{base}?"
    path = Path(text).expanduser()
    try:
        found = next(part for part in reversed((path, *path.parents)) if not part.exists())
        beside = [Path(entry) for entry in islice(os.scandir(found.parent), MOST_NAMES)]
    except (OSError, StopIteration):
        return ""
    rest = path.relative_to(found)
    alike = {path.stem: path for path in beside if path.suffix == found.suffix}
    near = (alike[stem] / rest for stem in get_close_matches(found.stem, alike, 5))
    unnamed = (path for path in beside if path.stem == found.name and path.suffix in SUFFIXES)
    there = next((path for path in (*near, *unnamed) if path.exists()), None)
    return f"; did you mean {printable(str(there))}?" if there else ""


def relocate(ref: str, role: str, option: str = "") -> Place:
    """Return where a reference leads that stands in a record: a manifest, a recipe.

    What was read of the Hub is recorded with its commit; what names none was of this disk, and the
    Hub is never asked for it: `runs/sft` may be the name of a stranger's model. `option` is how to
    say where it is now. Raises UsageError where it is not there, else as `locate`.
    """
    if is_recorded(ref):
        from skillvec.remote import hub

        return hub.locate(ref, role)
    path = os.path.expanduser(ref)
    if is_of_store(ref) or os.path.exists(path):
        return locate(ref, role)
    seen = "" if os.path.isabs(path) else ", seen from the folder in which that command ran"
    advice = f"say with {option} where it is now" if option else "put it there again"
    raise UsageError(
        f"{role} {printable(ref):.300}: no such file or folder; it was recorded as one of the disk"
        f"{seen}: {advice}"
    )
