"""Training and evaluation files from ToolBench's queries, category by category.

    python -m skillvec.recipes.toolbench.prepare --instructions G1_query.json G2_query.json \\
        --answers G1_answer G2_answer --test G1_category.json ... --output runs/toolbench/data

Writes, for every part of the source (`source_1`) and every target (`target_weather`):
NAME_apis.jsonl (stage 1: what each function is), NAME_format.jsonl (stage 2: first turns),
NAME_questions.jsonl (queries for RL and evaluation), and manifest.json with every choice and count.

Hides how the files are made. Invariants: no query that is asked in an evaluation stands in a format
file or a source part; a seed gives the same files. Refuses categories with too little to train on
or to ask, and tells how much each has.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.toolbench.apis import Item, read_apis, read_items, standard_name
from skillvec.recipes.toolbench.categories import by_category_of, choose_targets, split_parts
from skillvec.recipes.toolbench.react import SHOWN, system_text
from skillvec.recipes.toolbench.texts import format_row, knowledge_rows, read_answers


def prepare(
    instructions: Sequence[str],
    output: Path,
    test: Sequence[str] = (),
    answers: Sequence[str] = (),
    source: str = "Movies",
    parts: int = 2,
    targets: Sequence[str] = (),
    target_count: int = 20,
    questions: int = 50,
    show: str = "nothing",
    turns: int = 5,
    seed: int = 42,
) -> dict[str, Any]:
    """Write the files and return the manifest.

    `test` are files of queries to evaluate on; without them `questions` queries of each target are
    held out. `answers` are folders of ToolBench's answers for the format files; without them the
    turns are made from the API documents. `targets` are categories; without them the `target_count`
    with most queries to ask.

    Raises ValueError for files, categories and counts that cannot be used.
    """
    items = read_items(instructions)
    asked = read_items(test) if test else []
    by_category = by_category_of(items)
    pool = by_category_of(asked) if test else by_category
    chosen = choose_targets(source, targets, target_count, by_category, pool)
    if parts < 1 or questions < 1:
        raise ValueError("parts and questions: expected 1 or more")
    turn_of = read_answers(answers)
    rng = random.Random(seed)
    tested = {item.query for item in asked}
    written: dict[str, dict[str, int]] = {}

    def write(name: str, train: list[Item], ask: list[Item], documented: list[Item]) -> None:
        rows: dict[str, list[dict[str, Any]]] = {
            "apis": knowledge_rows(documented, rng),
            "format": [r for i in train if (r := format_row(i, turn_of, show, turns))],
            "questions": [question_row(i, show, turns) for i in ask],
        }
        for kind, listed in rows.items():
            if not listed:
                raise ValueError(f"{name}: nothing for {name}_{kind}.jsonl in {len(documented)} "
                                 "queries; give more queries, fewer parts or questions, or answers "
                                 "to these queries")  # fmt: skip
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed)
            (output / f"{name}_{kind}.jsonl").write_text(text, encoding="utf-8")
        written[name] = {kind: len(listed) for kind, listed in rows.items()}

    output.mkdir(parents=True, exist_ok=True)
    untested = [item for item in by_category[source] if item.query not in tested]
    divided, spanning = split_parts(untested, parts, rng)
    for number, part in enumerate(divided, start=1):
        write(f"source_{number}", part, part, part)
    for name in chosen:
        own = by_category[name]
        ask = pool[name] if test else rng.sample(own, min(questions, len(own)))
        held = {item.query for item in ask} | tested
        train = [item for item in own if item.query not in held]
        write(f"target_{standard_name(name)}", train, ask, [*own, *ask])
    manifest = {
        "instructions": list(map(str, instructions)), "test": list(map(str, test)),
        "answers": list(map(str, answers)), "source": source, "parts": parts, "targets": chosen,
        "questions": None if test else questions, "show": show, "turns": turns, "seed": seed,
        "rows": written,
        "left_out": {
            "queries across categories": sum(item.category is None for item in [*items, *asked]),
            "source queries across parts": spanning,
            "source queries that are in test": len(by_category[source]) - len(untested),
            "documents with a name taken in their list": sum(
                len(item.documents) - len(read_apis(item.documents)) for item in items
            ),
        },
        "queries": {c: len(listed) for c, listed in sorted(pool.items())},
    }  # fmt: skip
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def question_row(item: Item, show: str, turns: int) -> dict[str, Any]:
    """Return a row for RL and evaluation; `group` is the list of APIs."""
    system = system_text(read_apis(item.documents), turns, show)
    return {
        "prompt": [
            {"role": "system", "content": system},
            {"role": "user", "content": item.query},
        ],
        "question": item.query,
        "environment": item.environment,
        "group": item.environment,
        "api_list": json.dumps(item.documents, ensure_ascii=False),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "skillvec.recipes.toolbench.prepare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--instructions", nargs="+", required=True, metavar="FILE",
                        help="G1_query.json, G2_query.json")  # fmt: skip
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE",
                        help="queries to evaluate on, such as StableToolBench's")  # fmt: skip
    parser.add_argument("--answers", nargs="+", default=[], metavar="FOLDER",
                        help="ToolBench's answers, for the first turns")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--source", default="Movies")
    parser.add_argument("--parts", type=int, default=2, help="parts of the source, one a round")
    parser.add_argument("--targets", nargs="+", default=[], metavar="CATEGORY")
    parser.add_argument("--target-count", type=int, default=20, help="where none are named")
    parser.add_argument("--questions", type=int, default=50, help="held out, without --test")
    parser.add_argument("--show", choices=SHOWN, default="nothing",
                        help="what a prompt tells of its functions")  # fmt: skip
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    try:
        manifest = prepare(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{len(manifest['rows'])} sets in {len(manifest['targets'])} targets and "
          f"{manifest['parts']} source parts, counts in manifest.json")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
