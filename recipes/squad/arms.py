"""What a single-passage run reads: questions by passage, and the texts of every arm.

Hides checking, which comes before any model is loaded. Invariants: questions stand passage by
passage; every passage asked about has texts in every arm. Refuses questions without a group or a
text for the judge, an arm without a good name, and a passage without texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.evaluate import read_questions
from skillvec.recipes.squad.items import first_five, read_jsonl

ALONE = "base"  # the arm that learns nothing


def read_rows(data: Path, limit: int | None) -> list[dict[str, Any]]:
    """Return the questions of the first `limit` passages, passage by passage."""
    by_group: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_questions(data)):
        if not row.get("group") or not row.get("question"):
            raise ValueError(f"{data}: row {number} lacks `group` or `question`; see prepare")
        by_group.setdefault(row["group"], []).append(row)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: expected 1 or more, found {limit}")
    return [row for group in list(by_group)[:limit] for row in by_group[group]]


def named_files(texts: Sequence[str]) -> dict[str, Path]:
    """Return arm -> file of "NAME=FILE" words."""
    found: dict[str, Path] = {}
    for word in texts:
        name, equals, file = word.partition("=")
        if not equals or not name.replace("-", "").isalnum() or name == ALONE or name in found:
            raise ValueError(
                f"--texts {word}: expected NAME=FILE, each NAME once, of letters, digits and -, "
                f"and not {ALONE!r}"
            )
        if not Path(file).is_file():
            raise ValueError(f"--texts {word}: no such file")
        found[name] = Path(file)
    return found


def read_texts(file: Path, groups: Sequence[str]) -> dict[str, list[str]]:
    """Return group -> its texts; every group must have some."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_jsonl(file)):
        if not row.get("group") or not str(row.get("text") or "").strip():
            raise ValueError(f"{file}: row {number} lacks `group` or `text`; see prepare")
        found.setdefault(row["group"], []).append(row["text"])
    lacking = [group for group in groups if group not in found]
    if lacking:
        raise ValueError(f"{file}: no text for {first_five(lacking, 'passage')}; see prepare")
    return found
