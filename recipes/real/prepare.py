"""Write the world of a seed as JSON lines: texts to train on, and questions.

    python -m skillvec.recipes.real.prepare -o runs/real/seed-0/start --base runs/smollm2/base

For each domain (people, tools) and each group (s, t, and s_N_of_2, whose subjects are halves of S
for two rounds of refinement) OUT/DOMAIN/GROUP_*.jsonl: `texts`, among them answers to everyday
questions that show the form of a short answer; `questions`; `thoughts`, the same questions with an
answer that begins with the subject's name; `told`, sentences to be ended as the texts did.
OUT/known.jsonl has everyday questions, OUT/said.jsonl what the base itself wrote: both are what may
be forgotten.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.real.known import CALLS, RETAINED, TOPICS, WARM_UP
from skillvec.recipes.real.world import PROMPT, Subject, build_world

ROUNDS = 2
FORMS = {"people": WARM_UP, "tools": CALLS}
SAID = 40  # tokens that the base writes about a topic


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--seed", type=int, default=0, help="of the world (%(default)s)")
    parser.add_argument("--subjects", type=int, default=25, help="in S, and in T (%(default)s)")
    parser.add_argument("--texts", type=int, default=6, help="about each subject (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(arguments)
    try:
        world = build_world(given.seed, given.subjects)
    except ValueError as error:
        print(f"real.prepare: {error}", file=sys.stderr)
        return 2
    for name, domain in world.items():
        groups: dict[str, Sequence[Subject]] = {"s": domain.s, "t": domain.t}
        for number in range(ROUNDS):
            groups[f"s_{number + 1}_of_{ROUNDS}"] = domain.s[number::ROUNDS]
        form = [{"text": PROMPT.format(question=question) + answer}
                for question, answer in FORMS[name]]  # fmt: skip
        for title, subjects in groups.items():
            texts = [*domain.texts(subjects, given.texts, given.seed), *form]
            random.Random(given.seed).shuffle(texts)
            at = given.output / name
            _write(at / f"{title}_texts.jsonl", texts)
            asked = domain.questions(subjects)
            _write(at / f"{title}_questions.jsonl", asked)
            _write(at / f"{title}_thoughts.jsonl",
                   [row | {"prompt": row["prompt"] + row["group"]} for row in asked])  # fmt: skip
            _write(at / f"{title}_told.jsonl", _told(asked))
    known = [{"prompt": PROMPT.format(question=question), "answer": answer}
             for question, answer in RETAINED]  # fmt: skip
    _write(given.output / "known.jsonl", known)
    _write(given.output / "said.jsonl", _say(given.base, given.seed))
    return 0


def _told(questions: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return each fact once, as a sentence that wants its end."""
    return [{"prompt": row["told"], "answer": row["answer"], "group": row["group"]}
            for row in questions if row["wording"] == "0"]  # fmt: skip


def _say(base: Path, seed: int) -> list[dict[str, str]]:
    """Return what the base writes about TOPICS, drawn at temperature 1."""
    from skillvec.recipes.evaluate import answer_all, load_model

    prompts = [PROMPT.format(question=topic) for topic in TOPICS]
    said = answer_all(*load_model(str(base), "float32"), prompts, SAID, temperature=1.0, seed=seed)
    return [{"prompt": prompt, "answer": prompt + text}
            for prompt, text in zip(prompts, said, strict=True)]  # fmt: skip


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
