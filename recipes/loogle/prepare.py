"""Split LooGLE into source parts and target, and write texts to learn and questions to answer.

    python -m skillvec.recipes.loogle.prepare --output runs/loogle/data [--data FILE] [--pairs FILE]

Writes, for NAME = source_1 ... source_K and target: NAME_passages.jsonl (what pairs.py lets a model
write about), NAME.jsonl (stage 1: `text`), NAME_questions.jsonl (RL, evaluation), with --pairs also
NAME_form.jsonl (stage 2: `prompt`, `completion`); then manifest.json. Invariants: no document is in
two of them; a prompt shows the question, never the text; the same data gives the same bytes.
Refuses data with too few documents and what documents.py and pairs.py refuse.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.loogle.documents import HUB_ID, SPLIT, SUBSET, Document, read_documents
from skillvec.recipes.loogle.pairs import Pair, pairs_of
from skillvec.recipes.squad.items import Passage

ASK = "Please answer the question below. \nQuestion: {question}\nAnswer: "  # the first author's
RECALL = (
    "You answer questions about documents that you have read, from memory. First write the "
    "sentences of the document that hold the answer. Then write the answer inside <answer> and "
    "</answer>."
)
ANSWERED = "{evidence}\n<answer>{answer}</answer>"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.loogle.prepare",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--data", default=HUB_ID,
                        help="a file in either schema, or a Hub id (%(default)s)")  # fmt: skip
    parser.add_argument("--source", type=int, default=10, help="last documents (%(default)s)")
    parser.add_argument("--target", type=int, default=50, help="first documents (%(default)s)")
    parser.add_argument("--parts", type=int, default=2, help="K, parts of the source (%(default)s)")
    parser.add_argument("--chunk-words", type=int, default=400, help="words a text (%(default)s)")
    parser.add_argument("--overlap-words", type=int, default=50,
                        help="words that a text shares with the next (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="what a model wrote about the passages: skillvec.recipes.loogle.pairs",
    )
    parser.add_argument("--topic", choices=("missing", "always", "never"), default="never",
                        help="put the title before questions that name no word of it, before all, "
                        "or before none (%(default)s)")  # fmt: skip
    parser.add_argument("--skip-empty", action="store_true",
                        help="leave out questions without text or answer")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(arguments))
    try:
        prepare(**options)
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(
    output: Path,
    *,
    data: str = HUB_ID,
    source: int = 10,
    target: int = 50,
    parts: int = 2,
    chunk_words: int = 400,
    overlap_words: int = 50,
    pairs: Path | None = None,
    topic: str = "never",
    skip_empty: bool = False,
) -> dict[str, Any]:
    """Write the files and return the manifest; ValueError for sizes or data that do not fit."""
    if min(target, parts) < 1 or source < parts:
        raise ValueError(
            f"expected a target, and as many source documents as parts; found {target} target "
            f"and {source} source documents in {parts} parts"
        )
    if not 0 <= overlap_words < chunk_words:
        raise ValueError(
            f"expected 0 <= overlap-words < chunk-words, found {overlap_words} and {chunk_words}"
        )
    documents, skipped = read_documents(data, skip_empty)
    if len(documents) < source + target:
        raise ValueError(
            f"{data}: {len(documents)} documents; the first {target} and the last {source} overlap"
        )
    last = documents[-source:]
    shared = {one.text for one in last} & {one.text for one in documents[:target]}
    if shared:
        titles = ", ".join(repr(one.title) for one in last if one.text in shared)
        raise ValueError(f"{data}: source and target share {len(shared)} texts: {titles}")
    cut_texts = {one.number: passages_of(one, chunk_words, overlap_words)
                 for one in [*documents[:target], *last]}  # fmt: skip
    cuts = [round(part * source / parts) for part in range(parts + 1)]
    sets = {f"source_{k + 1}": last[cuts[k] : cuts[k + 1]] for k in range(parts)}
    sets["target"] = documents[:target]

    every = [passage for made in cut_texts.values() for passage in made]
    written = pairs_of(pairs, every) if pairs else {}

    output.mkdir(parents=True, exist_ok=True)
    stale = [*output.glob("source_*.jsonl"), *output.glob("target*.jsonl")]
    for path in (output / "manifest.json", *stale):
        path.unlink(missing_ok=True)
    counts = {}
    for name, chosen in sets.items():
        passages = [passage for one in chosen for passage in cut_texts[one.number]]
        asked = [row for one in chosen for row in question_rows(one, topic)]
        known = [(passage, pair) for passage in passages for pair in written.get(passage.id, ())]
        rows = {
            "": [*map(text_row, passages), *(pair_row(*one) for one in known)],
            "_passages": [{"id": one.id, "title": one.title, "context": one.context}
                          for one in passages],
            "_questions": asked,
        } | ({"_form": [form_row(pair) for _, pair in known]} if pairs else {})  # fmt: skip
        for kind, listed in rows.items():
            write_rows(output / f"{name}{kind}.jsonl", listed)
        counts[name] = {
            "passages": len(passages),
            "pairs": len(known),
            "passages_without_pairs": sum(not written.get(one.id) for one in passages),
            "questions": len(asked),
            "with_topic": sum(row["question"].startswith("Topic: ") for row in asked),
            "documents": [
                {"number": one.number, "title": one.title, "sha256": one.sha256} for one in chosen
            ],
        }
    file = Path(data)
    manifest = {
        "data": file.name if file.is_file() else f"{data}, {SUBSET}, {SPLIT}",
        "data_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        "documents_sha256": hashlib.sha256(
            "".join(one.sha256 for one in documents).encode()
        ).hexdigest(),
        "documents": len(documents),
        "skipped_questions": skipped,
        "chunk_words": chunk_words,
        "overlap_words": overlap_words,
        "pairs_sha256": hashlib.sha256(pairs.read_bytes()).hexdigest() if pairs else None,
        "topic": topic,
        "sets": counts,
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def passages_of(document: Document, words: int, overlap: int) -> list[Passage]:
    """Cut a document into stretches of so many words under its title, white space kept."""
    spans = [match.span() for match in re.finditer(r"\S+", document.text)]
    starts = range(0, max(len(spans) - overlap, 1), words - overlap)
    ends = [(spans[i][0], spans[min(i + words, len(spans)) - 1][1]) for i in starts]
    return [Passage(document.title, document.text[begin:end], ()) for begin, end in ends]


def text_row(passage: Passage) -> dict[str, str]:
    """Return a stretch as a text of stage 1."""
    return {"text": f"{passage.title}\n{passage.context}"}


def pair_row(passage: Passage, pair: Pair) -> dict[str, str]:
    """Return a generated pair as a text of stage 1."""
    told = f"Question: {pair.question}\n{pair.evidence}\nAnswer: {pair.answer}"
    return {"text": f"{passage.title}\n{told}"}


def form_row(pair: Pair) -> dict[str, Any]:
    """Return a generated pair as RL and evaluation ask and are answered: stage 2."""
    told = ANSWERED.format(evidence=pair.evidence, answer=pair.answer)
    return {
        "prompt": prompt_for(pair.question),
        "completion": [{"role": "assistant", "content": told}],
    }


def prompt_for(question: str) -> list[dict[str, str]]:
    """Return the messages that ask a question, with no text in sight."""
    return [
        {"role": "system", "content": RECALL},
        {"role": "user", "content": ASK.format(question=question)},
    ]


def question_rows(document: Document, topic: str = "never") -> list[dict[str, Any]]:
    """Return rows for RL and evaluation; `group` is the document."""
    rows = []
    for question, answer in document.questions:
        named = bool(_long_words(document.title) & _long_words(question))
        if topic == "always" or (topic == "missing" and not named):
            question = f"Topic: {document.title}\n{question}"
        rows.append({"prompt": prompt_for(question), "answer": answer, "question": question,
                     "group": document.number})  # fmt: skip
    return rows


def _long_words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) >= 4}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write .jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
