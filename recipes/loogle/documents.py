"""Documents of LooGLE with their questions, from the Hub or a file, in either published schema.

Hides the schemas. The older has one row a document (input, title, qa_pairs: a Python literal in a
string, a list of {Q, A, S}); the newer one row a question (context, title, question, answer,
evidence, doc_id). Invariants: documents keep the order of the data, and the same data gives the
same documents in both. Refuses other columns, malformed pairs, empty texts, a doc_id on two texts.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HUB_ID, SUBSET, SPLIT = "bigai-nlco/LooGLE", "shortdep_qa", "test"
OLD = ("input", "title", "qa_pairs")
NEW = ("context", "title", "question", "answer")


@dataclass(frozen=True)
class Document:
    """A text, its title, its place in the data from 0, and (question, answer) pairs."""

    number: int
    title: str
    text: str
    questions: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Digest of title, text and questions."""
        whole = json.dumps([self.title, self.text, self.questions], ensure_ascii=False)
        return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One question with its document, as a row says it; `where` names the row in errors."""

    where: str
    title: str
    text: str
    question: str
    answer: str
    doc_id: Any = None


def read_documents(data: str = HUB_ID, skip_empty: bool = False) -> tuple[list[Document], int]:
    """Return all documents, and how many questions were skipped for an empty question or answer.

    Raises:
        ValueError: for data that cannot be used; without `skip_empty`, for empty questions too.
    """
    from datasets.exceptions import DatasetsError

    from skillvec.recipes.training import Data, load_rows

    try:
        rows = load_rows(Data(data=data, subset=SUBSET, split=SPLIT, columns=[]))
    except DatasetsError as error:
        cause = error.__cause__ or error  # what was wrong with the file, where it was the file
        raise ValueError(f"{data}: cannot be read: {cause}") from error
    asked = list(read_questions(rows, rows.column_names, data))
    for one in asked:
        if not one.title or not one.text:
            raise ValueError(f"{one.where}: the document's title or text is empty")
    empty = [one.where for one in asked if not one.question or not one.answer]
    if empty and not skip_empty:
        shown = "; ".join(empty[:5]) + ("; ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{len(empty)} questions are empty or have an empty answer: {shown}; --skip-empty "
            "leaves them out and counts them"
        )
    return group(one for one in asked if one.question and one.answer), len(empty)


def read_questions(rows: Iterable[Any], columns: Sequence[str], name: str) -> Iterator[Asked]:
    """Yield every question of rows in either schema."""
    if set(OLD) <= set(columns):
        for number, row in enumerate(rows):
            where = f"{name}, row {number}"
            for index, pair in enumerate(_pairs(row["qa_pairs"], where)):
                yield Asked(f"{where}, pair {index}", _text(row["title"]), _text(row["input"]),
                            _text(pair["Q"]), _text(pair["A"]))  # fmt: skip
    elif set(NEW) <= set(columns):
        kept: dict[str, str] = {}  # a row repeats its whole document: hold each text once
        for number, row in enumerate(rows):
            text = _text(row["context"])
            yield Asked(f"{name}, row {number}", _text(row["title"]), kept.setdefault(text, text),
                        _text(row["question"]), _text(row["answer"]),
                        row.get("doc_id"))  # fmt: skip
    else:
        raise ValueError(
            f"{name}: expected columns {', '.join(OLD)} or {', '.join(NEW)}; found "
            f"{', '.join(columns)}"
        )


def group(asked: Iterable[Asked]) -> list[Document]:
    """Gather questions by document, in the order in which documents first appear."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    by_id: dict[Any, tuple[str, str]] = {}
    for one in asked:
        key = (one.title, one.text)
        if one.doc_id is not None and by_id.setdefault(one.doc_id, key) != key:
            raise ValueError(f"{one.where}: doc_id {one.doc_id!r} had another title or text before")
        found.setdefault(key, []).append((one.question, one.answer))
    return [
        Document(number, *key, tuple(pairs)) for number, (key, pairs) in enumerate(found.items())
    ]


def _pairs(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the pairs of the older schema: a list, or a string that holds one."""
    try:
        # the published strings are Python's, with single quotes; literals run no code
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: qa_pairs is no Python literal: {error}") from None
    good = isinstance(pairs, list) and all(isinstance(pair, dict) for pair in pairs)
    if not good or not pairs or any("Q" not in pair or "A" not in pair for pair in pairs):
        raise ValueError(f"{where}: qa_pairs: expected a list of {{Q, A}}, found {value!r:.80}")
    return pairs


def _text(value: Any) -> str:
    """Return stripped text; a number stands for its digits, anything else is empty."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else ""
