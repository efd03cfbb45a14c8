"""Passages of SQuAD and their questions: read, checked, grouped, shuffled, cut into parts.

Hides which of four schemas a source has: rows of the Hub (title, context, question, answers{text}),
SEAL's items (title, context, questions[{question, answer}]), the same with a list of answers, as
`prepare.py` writes them, and the original file of SQuAD (data, paragraphs, qas).
Invariants: a passage is a (title, context) pair and keeps its first place; its id follows from its
text alone, so files made at different times fit together; a seed gives one order on every machine.
Refuses a row without a title, context, question or answer; unanswerable questions are such rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

FILES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Question:
    """What is asked, and every answer that counts as right."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """One paragraph of an article, with its questions."""

    title: str
    context: str
    questions: tuple[Question, ...]

    @property
    def id(self) -> str:
        """Return 16 hexadecimal digits that follow from title and context."""
        return hashlib.sha256(f"{self.title}\n{self.context}".encode()).hexdigest()[:16]

    def as_row(self) -> dict[str, Any]:
        """Return SEAL's item; `answer` is a list."""
        asked = [{"question": q.question, "answer": list(q.answers)} for q in self.questions]
        return {"id": self.id, "title": self.title, "context": self.context, "questions": asked}


def read_passages(source: str) -> list[Passage]:
    """Return the passages of a file, or of a split of a Hub id given as "owner/name:split".

    Raises:
        ValueError: names the source, what is missing and the rows (from 0) in which it is.
    """
    return group_rows(_flat_rows(read_rows(source)), source)


def read_rows(source: str) -> list[dict[str, Any]]:
    """Return the rows of a file, or of a split of a Hub id, as they are."""
    path = Path(source)
    if path.suffix in FILES and not path.is_file():
        raise ValueError(f"{source}: no such file")
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{source}: not JSON: {error}") from None
        found = found["data"] if isinstance(found, dict) and "data" in found else found
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{source}: expected a list of objects, or one under the key 'data'")
        return found
    name, colon, split = source.partition(":")
    if path.suffix != ".parquet" and not colon:
        raise ValueError(
            f"{source}: expected one of {', '.join(FILES)}, or a Hub id with its split, as in "
            "rajpurkar/squad:validation"
        )
    import datasets

    if path.suffix == ".parquet":
        return list(datasets.load_dataset("parquet", data_files=source, split="train"))
    return list(datasets.load_dataset(name, split=split))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; ValueError names the lines (from 1) that are none."""
    rows, bad = [], []
    # not splitlines: texts of the Hub hold characters that it takes for ends of lines
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        rows.append(row) if isinstance(row, dict) else bad.append(number)
    if bad:
        raise ValueError(f"{path}: no JSON object in {first_five(bad, 'line')}")
    return rows


def group_rows(rows: Iterable[dict[str, Any]], source: str) -> list[Passage]:
    """Group flat rows by (title, context), in order of first appearance."""
    bad: dict[str, list[int]] = {}
    grouped: dict[tuple[str, str], list[Question]] = {}
    for row in rows:
        title, context, question = (_text(row.get(k)) for k in ("title", "context", "question"))
        answers = _answers(row.get("answers", row.get("answer")))
        found = {"title": title, "context": context, "question": question, "answers": answers}
        for key in (key for key, value in found.items() if not value):
            bad.setdefault(key, []).append(row["row"])
        # the Hub's titles are those of addresses: Super_Bowl_50
        passage = (title.replace("_", " "), context)
        grouped.setdefault(passage, []).append(Question(question, answers))
    if bad:
        found_in = "; ".join(f"{key!r} in {first_five(at, 'row')}" for key, at in bad.items())
        raise ValueError(
            f"{source}: missing or empty {found_in}. Expected title, context, question and "
            "answers{text}, or SEAL's items; take unanswerable questions out first"
        )
    if not grouped:
        raise ValueError(f"{source}: no rows")
    return [Passage(title, text, tuple(asked)) for (title, text), asked in grouped.items()]


def choose(passages: Sequence[Passage], count: int, seed: int, source: str) -> list[Passage]:
    """Return the first `count` passages (0: all) of the order that `seed` gives, as SEAL does."""
    if not 0 <= count <= len(passages):
        raise ValueError(f"{source}: {count} passages asked for, found {len(passages)}")
    order = list(passages)
    random.Random(seed).shuffle(order)
    return order[: count or len(order)]


def cut(passages: Sequence[Passage], parts: int) -> list[list[Passage]]:
    """Cut passages into disjoint runs, whose sizes differ by 1 at most."""
    if not 1 <= parts <= len(passages):
        raise ValueError(f"parts: expected 1 to {len(passages)} (the passages), found {parts}")
    ends = [len(passages) * part // parts for part in range(parts + 1)]
    return [list(passages[a:b]) for a, b in pairwise(ends)]


def first_five(found: Sequence[Any], noun: str) -> str:
    """Return "3 rows: 1, 4, 7", or the first five and a count."""
    shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
    return f"{len(found)} {noun}{'s' if len(found) > 1 else ''}: {shown}"


def _flat_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        for paragraph in row.get("paragraphs", [row]):
            asked = paragraph.get("qas", paragraph.get("questions"))
            for question in [{}] if asked is None else asked or [{"question": None}]:
                yield {"title": row.get("title")} | paragraph | question | {"row": number}


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _answers(value: Any) -> tuple[str, ...]:
    """Return distinct answers in order, of a string, a list, {"text": [...]} or [{"text": ...}]."""
    value = value.get("text") if isinstance(value, dict) else value
    listed = [value] if isinstance(value, str) else list(value or ())
    texts = [_text(answer.get("text") if isinstance(answer, dict) else answer) for answer in listed]
    return tuple(dict.fromkeys(text for text in texts if text))
