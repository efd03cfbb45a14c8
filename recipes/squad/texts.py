"""What models read and are asked: prompts for writing, texts for SFT, closed-book questions.

Hides the wording of prompts and how a completion becomes training texts. Invariants: every text
begins with the title of its passage; the passage itself is always among the texts; a question
never shows the passage. Refuses a passage with fewer completions than asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from skillvec.recipes.squad.items import Passage, first_five, group_rows

WRITE = """\
Read the passage. Then list what follows from it, stated or implied, one statement a line.

Passage:
{title}
{context}

Statements:
"""
ASK = """\
Give a short and direct answer.

{question}
Answer:"""
SPLITS = ("lines", "sections")


def prompt_for(text: str, chat: bool) -> str | list[dict[str, str]]:
    """Return the text as it is, or as the one message of a user."""
    return [{"role": "user", "content": text}] if chat else text


def writing_prompt(passage: Passage) -> str:
    """Ask for implications of a passage; the wording is our own."""
    return WRITE.format(title=passage.title, context=passage.context)


def question_rows(passages: Sequence[Passage], chat: bool, all_answers: bool) -> list[dict]:
    """Return rows (prompt, answer, question, group), as evaluate.py and grpo.py take."""
    rows = []
    for passage in passages:
        for asked in passage.questions:
            shown = f"Topic: {passage.title}\n{asked.question}"  # SEAL's prefix
            rows.append({"prompt": prompt_for(ASK.format(question=shown), chat),
                         "answer": list(asked.answers if all_answers else asked.answers[:1]),
                         "question": shown, "group": passage.id})  # fmt: skip
    return rows


def split_completion(completion: str, split: str) -> list[str]:
    """Cut a completion at `---`, and with "lines" at every line too; drop empty pieces.

    A first line is dropped where the second begins with "1.": it only announces the list (SEAL).
    """
    pieces = completion.split("---")
    if split == "lines":
        pieces = [line for piece in pieces for line in re.split(r"[\r\n]+", piece)]
    pieces = [piece.strip() for piece in pieces if piece.strip()]
    if split == "lines" and len(pieces) > 1 and pieces[1].startswith("1."):
        return pieces[1:]
    return pieces


def text_rows(
    passages: Sequence[Passage],
    completions: dict[str, list[str]] | None,
    per_passage: int,
    split: str,
) -> list[dict[str, str]]:
    """Return rows (text, group): pieces of completions, after each completion the passage.

    Without completions the passage is the only text.
    """
    if completions is not None:
        check_completions(passages, completions, per_passage)
    rows = []
    for passage in passages:
        written = [""] if completions is None else completions[passage.id][:per_passage]
        for completion in written:
            for piece in [*split_completion(completion, split), passage.context]:
                rows.append({"text": f"{passage.title}\n{piece}", "group": passage.id})
    return rows


def check_completions(
    passages: Sequence[Passage], completions: dict[str, list[str]], per_passage: int
) -> None:
    """Raise ValueError that names passages with fewer completions than asked for."""
    short = [
        f"{passage.title} ({passage.id}) has {len(completions.get(passage.id, ()))}"
        for passage in passages
        if len(completions.get(passage.id, ())) < per_passage
    ]
    if short:
        raise ValueError(
            f"completions: expected {per_passage} for every passage; too few for "
            f"{first_five(short, 'passage')}. Write them with skillvec.recipes.squad.implications"
        )


def completions_of(rows: Sequence[dict[str, Any]], source: str) -> dict[str, list[str]]:
    """Return passage id -> its completions, of our rows (id, completion) or SEAL's (completions).

    Empty completions are refused: they would train on the passage alone without a word.
    """
    found: dict[str, list[str]] = {}
    bad = []
    for number, row in enumerate(rows):
        written = row.get("completions", [row.get("completion")])
        written = written if isinstance(written, list) and written else [None]
        if not all(isinstance(text, str) and text.strip() for text in written):
            bad.append(number)
            continue
        if "id" in row and "completion" in row:
            key = str(row["id"])
        else:  # SEAL's items: the id follows from the passage; its questions are not needed here
            stand_in = {"question": "-", "answer": "-", "row": number}
            key = group_rows([row | stand_in], source)[0].id
        found.setdefault(key, []).extend(written)
    if bad:
        raise ValueError(f"{source}: no completion, or an empty one, in {first_five(bad, 'row')}")
    return found
