"""Write the world of a seed as JSON lines: texts to train on, and questions.

    python -m skillvec.recipes.real.prepare -o runs/real/start [--seed 0] [--subjects 25]

For each domain (people, tools) OUT/DOMAIN/{s,t}_{texts,questions}.jsonl, and for the two rounds of
iterative refinement s_N_of_2_{texts,questions}.jsonl, whose subjects are halves of S.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from skillvec.recipes.real.world import Domain, Subject, build_world

ROUNDS = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the world (%(default)s)")
    parser.add_argument("--subjects", type=int, default=25, help="in S, and in T (%(default)s)")
    parser.add_argument("--texts", type=int, default=8, help="about each subject (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(arguments)
    try:
        world = build_world(given.seed, given.subjects)
    except ValueError as error:
        print(f"real.prepare: {error}", file=sys.stderr)
        return 2
    for name, domain in world.items():
        groups: dict[str, tuple[Subject, ...]] = {"s": domain.s, "t": domain.t}
        for number in range(ROUNDS):
            groups[f"s_{number + 1}_of_{ROUNDS}"] = domain.s[number::ROUNDS]
        for title, subjects in groups.items():
            _write(given.output / name / title, domain, subjects, given.texts, given.seed)
    return 0


def _write(path: Path, domain: Domain, subjects: Sequence[Subject], texts: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, rows in (
        ("texts", domain.texts(subjects, texts, seed)),
        ("questions", domain.questions(subjects)),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.with_name(f"{path.name}_{kind}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
