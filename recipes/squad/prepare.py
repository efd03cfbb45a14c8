"""Make the files of the SQuAD recipe: passages, questions about them, texts to learn them from.

    python -m skillvec.recipes.squad.prepare -o runs/squad/data --documents 200 --parts 2

Writes into the folder, for `target` and for `source_1` ... `source_K`: NAME_items.jsonl (SEAL's
items), NAME_questions.jsonl (prompt, answer, question, group) and NAME.jsonl (text, group); then
manifest.json with counts and digests. Invariants: the target is the first N passages of the order
that the seed gives (42: SEAL's); a question keeps its first answer, as in SEAL's items; the parts
share no passage with each other nor with the target; the manifest is written last, so a folder
without one is unfinished. Refuses a target with another number of questions than is known of it.
`--style` other than passage takes completions from a file: of the model itself, of one trained by
RL to write them (SEAL's self-edits), or of a larger one; the texts are made in the same way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.squad.items import Passage, choose, cut, first_five, read_passages, read_rows
from skillvec.recipes.squad.texts import SPLITS, completions_of, question_rows, text_rows

STYLES = ("passage", "implications", "self-edits", "teacher")
HUB = "rajpurkar/squad"
VALIDATION = f"{HUB}:validation"
# questions of a target, by source, passages and seed: SEAL's 200, and all of SQuAD 1.1's
KNOWN = {(VALIDATION, 200, 42): 974, (VALIDATION, 0, 42): 10_570}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.squad.prepare", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FOLDER")
    add("--target", default=VALIDATION, metavar="SOURCE",
        help="what is learnt and asked: file, or Hub id:split (%(default)s)")  # fmt: skip
    add("--source", default=f"{HUB}:train", metavar="SOURCE",
        help="where the skill is trained: file, or Hub id:split (%(default)s)")  # fmt: skip
    add("--documents", type=int, default=200, help="passages of the target; 0: all (%(default)s)")
    add("--source-documents", type=int, default=200, help="passages of all parts (%(default)s)")
    add("--parts", type=int, default=2, help="K disjoint source parts; 0: none (%(default)s)")
    add("--seed", type=int, default=42, help="of the order of passages (%(default)s)")
    add("--expect-questions", type=int, metavar="N",
        help="stop if the target has another number (974 for SEAL's 200 passages)")  # fmt: skip
    add("--style", choices=STYLES, default="passage", help="what the texts are (%(default)s)")
    add("--completions", nargs="+", default=[], metavar="FILE",
        help="what a model wrote about the passages, for every style but passage")  # fmt: skip
    add("--per-passage", type=int, default=5, help="completions of a passage (%(default)s)")
    add("--split", choices=SPLITS, default="lines", help="cut completions at --- and lines")
    add("--all-answers", action="store_true", help="keep every answer; SEAL's items keep the first")
    add("--chat", action="store_true", help="prompts as messages, for instruct models")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; print `prepare: message` and return 2 where an input is refused."""
    options = build_parser().parse_args(arguments)
    try:
        print(prepare(options))
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: argparse.Namespace) -> str:
    """Write all files, the manifest last, and return one line that says what there is."""
    if (options.style == "passage") == bool(options.completions):
        needs = "none" if options.style == "passage" else "--completions FILE"
        raise ValueError(f"--style {options.style} needs {needs}; found {options.completions}")
    if options.per_passage < 1 or options.parts < 0:
        raise ValueError("--per-passage: expected 1 or more, and --parts 0 or more")
    named = {"target": choose(
        read_passages(options.target), options.documents, options.seed, options.target
    )}  # fmt: skip
    if options.parts:
        pool = read_passages(options.source)
        chosen = choose(pool, options.source_documents, options.seed, options.source)
        refuse_shared(chosen, named["target"])
        parts = cut(chosen, options.parts)
        named |= {f"source_{k}": part for k, part in enumerate(parts, start=1)}
    count = sum(len(passage.questions) for passage in named["target"])
    known = KNOWN.get((options.target, options.documents, options.seed))
    expected = known if options.expect_questions is None else options.expect_questions
    if expected not in (None, count):
        raise ValueError(
            f"{options.target}: expected {expected} questions about the target, found {count}; "
            "another order of the rows, or another version of them, gives others"
        )
    completions = read_completions(options.completions) if options.completions else None
    files: dict[str, list[dict[str, Any]]] = {}
    for name, passages in named.items():
        files[f"{name}_items.jsonl"] = [passage.as_row() for passage in passages]
        asked = question_rows(passages, options.chat, options.all_answers)
        files[f"{name}_questions.jsonl"] = asked
        files[f"{name}.jsonl"] = text_rows(
            passages, completions, options.per_passage, options.split
        )
    write_files(options.output, files, options)
    return (
        f"{options.output}: {count} questions about {len(named['target'])} passages of the target, "
        + (f"{options.parts} source parts")
    )


def read_completions(sources: Sequence[str]) -> dict[str, list[str]]:
    """Return passage id -> completions of all files, in order."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for key, written in completions_of(read_rows(source), source).items():
            found.setdefault(key, []).extend(written)
    return found


def refuse_shared(source: Sequence[Passage], target: Sequence[Passage]) -> None:
    """Raise ValueError where RL would see a passage of the target, under whatever title."""
    seen = {passage.context for passage in target}
    shared = [passage.title for passage in source if passage.context in seen]
    if shared:
        raise ValueError(
            f"source and target share {first_five(shared, 'passage')}; take another split"
        )


def write_files(
    folder: Path, files: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> None:
    """Write .jsonl files, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    digests = {}
    for name, rows in files.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(data)
        digests[name] = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    inputs = [options.target, *([options.source] if options.parts else []), *options.completions]
    manifest = {
        "settings": {k: v for k, v in vars(options).items() if k != "output"},
        "inputs": {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in inputs
            if Path(name).is_file()
        },
        "files": digests,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
