"""What a folder is that holds no weights at its top: a report, an unfinished run, checkpoints.

Names of files and small JSON files decide. What is none of these is refused, with what was looked
for.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillvec.checkpoints.folder import find_inside, is_listed, is_there, read_json
from skillvec.checkpoints.locate import written
from skillvec.checkpoints.opened_by import OPENERS, look_at
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.errors import FormatError, UsageError, up_to_five
from skillvec.files.file import Place, read_bytes, shown
from skillvec.files.journal import JOURNAL, read_lines
from skillvec.files.staging import STAGING_SUFFIX, staging_of
from skillvec.report import Report

REPORT = "report.json"
PAGES = ("report.html", "index.html")
# what trials keep from the first on: the file's name, its verb, how it begins
TRIALS = (("journal.jsonl", "sweep", b'{"form":'), ("study.db", "search", b"SQLite format 3\0"))
VERB = re.compile("[a-z-]{1,40}")
# of the Hub's cache: models--ORG--NAME, with refs/ and snapshots/
CACHED = re.compile(r"(model|dataset|space)s--(\w[\w.-]*?)(?:--(\w[\w.-]*))?")
STEPS = re.compile(r"(?:checkpoint|global_step|iter|step|epoch)[-_]?(\d{1,18})(?=/|$)")
LOOKED_FOR = (
    "weights of a model (safetensors, GGUF, pickles, shards of a training), a PEFT adapter, a skill"
    " vector, a patch, a report of skillvec, an unfinished run, checkpoints of a training, the"
    " Hub's cache"
)


def find_unfinished(path: str | os.PathLike[str]) -> str:
    """Return the folder of an unfinished run in place of its output, if that is not there yet."""
    text = written(path, "input")
    stage = os.fspath(staging_of(Path(os.path.expanduser(text)))) if Path(text).name else text
    missing = not os.path.exists(os.path.expanduser(text))  # false of names that cannot be, too
    return stage if missing and os.path.isdir(stage) else text


def describe_folder(place: Place) -> Report | None:
    """Return what a folder is that no opener takes, None of what one takes.

    Raises UsageError where it holds nothing that is known here, with what was looked for.
    """
    if place.member is not None or not (is_listed(place) or place.path.is_dir()):
        return None
    report = Report("inspect", {"path": shown(place.ref, place.path), "nbytes": 0})
    if place.path.name.endswith(STAGING_SUFFIX):
        report.facts |= _describe_unfinished(place.path)
        return report
    found = look_at(place, f"input {place.ref}")
    if any(opener.takes(found) for opener in OPENERS):
        return None
    for describe in (_describe_report, _describe_trials, _describe_cache, _describe_checkpoints):
        if facts := describe(place):
            report.facts |= facts
            return report
    if ADAPTER_CONFIG in place.files or find_inside(place):
        return None  # opening it says what to name
    raise UsageError(_say_nothing(place))


def _describe_unfinished(folder: Path) -> dict[str, Any]:
    """Return what the journal of a run says that has not published its output."""
    lines: list[Any] = []
    with contextlib.suppress(ValueError, RecursionError):  # no journal of ours
        lines, *_ = read_lines(folder / JOURNAL)
    said = lines[0] if lines and isinstance(lines[0], dict) else {}
    request = said.get("request")
    verb = request.get("verb") if isinstance(request, dict) else None
    return {
        "kind": "unfinished",
        "verb_run": verb if isinstance(verb, str) and VERB.fullmatch(verb) else None,
        "output": folder.name.removeprefix(".").removesuffix(STAGING_SUFFIX),
        "tensors_done": max(len(lines) - 1, 0),
    }


def _describe_report(place: Place) -> dict[str, Any] | None:
    """Return of which verb a report is, and its page."""
    if REPORT not in place.files:
        return None
    try:
        verb = read_json(place.files[REPORT]).get("verb")
    except FormatError:
        return None
    if not isinstance(verb, str) or not VERB.fullmatch(verb):
        return None
    return {"kind": "report", "verb_run": verb, "page": _page_of(place.files)}


def _describe_trials(place: Place) -> dict[str, Any] | None:
    """Return which trials began to write a folder, and have not come to their report."""
    for name, verb, begin in TRIALS:
        address = place.files.get(name)
        if address and is_there(address) and read_bytes(address, 0, len(begin)) == begin:
            return {"kind": "unfinished", "verb_run": verb, "output": None, "tensors_done": None}
    return None


def _page_of(files: Mapping[str, str]) -> str | None:
    return next((page for page in PAGES if page in files), None)


def _describe_cache(place: Place) -> dict[str, Any] | None:
    """Return the repositories in a folder of the Hub's cache, of one also its commits."""
    named = CACHED.fullmatch(place.path.name)
    if named is None or is_listed(place):
        repos = sorted(_repo_of(name) for name in place.files if CACHED.fullmatch(name))
        return {"kind": "cache", "repos": repos, "commits": [], "newest": []} if repos else None
    refs, snapshots = place.path / "refs", place.path / "snapshots"
    commits = sorted(os.listdir(snapshots)) if snapshots.is_dir() else []
    main = refs / "main"
    named_now = read_bytes(os.fspath(main), 0, 64).decode("ascii", "replace").strip() if (
        main.is_file()) else ""  # fmt: skip
    newest = [named_now] if named_now in commits else commits if len(commits) == 1 else []
    return {"kind": "cache", "repos": [_repo_of(place.path.name)], "commits": commits,
            "newest": [f"snapshots/{commit}" for commit in newest]}  # fmt: skip


def _repo_of(folder: str) -> str:
    found = CACHED.fullmatch(folder)
    assert found is not None
    return found[2] + (f"/{found[3]}" if found[3] else "")


def _describe_checkpoints(place: Place) -> dict[str, Any] | None:
    """Return the checkpoints of a training in a folder, in the order of their steps."""
    steps = {name: int(at[1]) for name, _ in find_inside(place) if (at := STEPS.match(name))}
    if not steps:
        return None
    names = sorted(steps, key=lambda name: (steps[name], name))
    top = list(dict.fromkeys(name.partition("/")[0] for name in names))
    newest = [name for name in names if steps[name] == steps[names[-1]]]
    return {"kind": "checkpoints", "checkpoints": top, "newest": newest}


def _say_nothing(place: Place) -> str:
    names = sorted(place.files)
    if not names:
        return f"input {place.ref}: an empty folder; looked for {LOOKED_FOR}"
    return (
        f"input {place.ref}: a folder with nothing in it that skillvec knows; looked for"
        f" {LOOKED_FOR}, and found:\n{up_to_five(names)}"
    )
