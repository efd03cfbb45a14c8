"""Rewards beside the exact match of the miniature: halves of a call, and the end of an answer."""

from __future__ import annotations

import re
from typing import Any

from skillvec.recipes import judges


def ends(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Score completions; TRL passes the columns of the data by keyword."""
    return [judges.ends(said, gold) for said, gold in zip(completions, answer, strict=True)]


def call(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Score calls such as load(path): one half for the function, one for its argument."""
    return [_parts(said, gold) for said, gold in zip(completions, answer, strict=True)]


def _parts(said: str, gold: str) -> float:
    found, wanted = (re.fullmatch(r"(\w+)\((\w+)\)", text.strip()) for text in (said, gold))
    if wanted is None:
        raise ValueError(f"{gold!r}: expected a call such as load(path)")
    if found is None:
        return 0.0
    return sum(a == b for a, b in zip(found.groups(), wanted.groups(), strict=True)) / 2
