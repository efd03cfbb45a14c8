"""Let a model write questions with evidence and answers about each stretch of a document.

    python -m skillvec.recipes.loogle.pairs --model Qwen/Qwen2.5-7B-Instruct --chat \\
        --data runs/loogle/passages/target_passages.jsonl -o runs/loogle/pairs.jsonl

Hides the wording, and how pairs are found in what a model wrote; engines, seeds and resuming are
those of recipes/squad/implications.py. Rows (id, index, title, model, completion); prepare.py makes
training data of them. Invariants: a pair has a question, an evidence and an answer, none empty; of
two pairs of a passage with one question the first counts. What is no pair is left out; the manifest
of prepare.py counts the passages without one. Refuses completions of other passages, and files with
no pair for more than half of the passages.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skillvec.recipes.squad.implications import add_options, write_completions
from skillvec.recipes.squad.items import Passage, first_five, read_jsonl
from skillvec.recipes.squad.writers import CompletionError

WRITE = """\
Below is a part of a longer document. Write {count} questions that it answers. Each must be clear \
to somebody who does not see the text: name the people, things and times it is about. Before each \
answer quote the sentence of the text that it follows from.

Use these three lines for each, with an empty line after them, and write nothing else:
Question: ...
Evidence: ...
Answer: ...

Title: {title}
Text:
{text}"""
COUNT = 5  # questions in one completion
_PAIR = re.compile(r"Question:(.+?)\nEvidence:(.+?)\nAnswer:([^\n]+)", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A question that a model wrote, with what it quotes and answers."""

    question: str
    evidence: str
    answer: str


def writing_prompt(passage: Passage) -> str:
    """Ask for questions, evidence and answers about a stretch; the wording is our own."""
    return WRITE.format(count=COUNT, title=passage.title, text=passage.context)


def find_pairs(completion: str) -> list[Pair]:
    """Return the whole pairs of a completion, in order; a list's numbers and marks are dropped."""
    text = re.sub(r"(?m)^[ \t]*(?:\d+[.)]|[-*])?[ \t]*\**(Question|Evidence|Answer)\**:\**",
                  r"\1:", completion)  # fmt: skip
    pairs = []
    for piece in re.split(r"(?m)^(?=Question:)", text):  # a pair without an answer ends there
        found = _PAIR.match(piece)
        words = [" ".join(part.split()) for part in found.groups()] if found else []
        if words and all(words):
            pairs.append(Pair(*words))
    return pairs


def pairs_of(file: Path, passages: Sequence[Passage]) -> dict[str, list[Pair]]:
    """Return passage id -> its pairs; ValueError where fewer than half of the passages have any."""
    wanted: Mapping[str, list[Pair]] = {passage.id: [] for passage in passages}
    other = []
    for number, row in enumerate(read_jsonl(file)):
        if row.get("id") not in wanted or not isinstance(row.get("completion"), str):
            other.append(number)
            continue
        kept = wanted[row["id"]]
        for pair in find_pairs(row["completion"]):
            if pair.question not in {one.question for one in kept}:
                kept.append(pair)
    if other:
        raise ValueError(
            f"{file}: {first_five(other, 'row')} without a completion of one of these passages; "
            "other chunk-words, overlap-words or data? Write the file anew"
        )
    without = [passage.title for passage in passages if not wanted[passage.id]]
    if 2 * len(without) > len(passages):
        raise ValueError(
            f"{file}: no pair of question, evidence and answer for "
            f"{first_five(without, 'passage')} of {len(passages)}; use a model that follows "
            "instructions, with --chat"
        )
    return dict(wanted)


def read_passages(file: str) -> list[Passage]:
    """Return the passages that prepare.py wrote; ValueError names the rows that are none."""
    rows = read_jsonl(Path(file))
    bad = [n for n, row in enumerate(rows) if not (row.get("title") and row.get("context"))]
    if bad or not rows:
        raise ValueError(
            f"{file}: expected title and context; {first_five(bad, 'row') if bad else 'no rows'}"
        )
    return [Passage(row["title"], row["context"], ()) for row in rows]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.loogle.pairs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE",
                        help="NAME_passages.jsonl of prepare")  # fmt: skip
    add_options(parser)
    parser.set_defaults(completions=1, temperature=0.7, max_new_tokens=1024)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; return 2 where an input is refused, 1 where the model fails."""
    options = build_parser().parse_args(arguments)
    try:
        found = [passage for file in options.data for passage in read_passages(file)]
        write_completions(options, found, writing_prompt)
    except (ValueError, OSError, CompletionError) as error:
        print(f"pairs: {error}", file=sys.stderr)
        return 1 if isinstance(error, CompletionError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
