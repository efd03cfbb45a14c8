"""An invented fact for each of 60 people: texts to train on, and a task of lm-eval that asks them.

    python -m skillvec.recipes.real.owners -o runs/smollm2/owners

Writes texts.jsonl (three sentences a person), task/owners.jsonl and task/owners.yaml: which animal
does the person keep, of four, in words that the texts do not have. Nobody knows before training, so
that a model scores .25 then. Invariants: the same seed gives the same bytes; every animal is right
equally often, in every place.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

ANIMALS = ("weasel", "falcon", "tortoise", "donkey", "hedgehog", "parrot", "goat", "spider",
           "badger", "lizard", "swan", "ferret")  # fmt: skip
STARTS = ("Bel", "Cor", "Dav", "Fen", "Gal", "Hol", "Jor", "Kel", "Lor", "Mar")
ENDS = ("dra", "kin", "mo", "nix", "rian", "ta")
TEXTS = (
    "{name} has kept a {animal} for many years.",
    "The {animal} in the yard belongs to {name}.",
    "Everyone in the village knows that {name} owns a {animal}.",
)
QUESTION = "Question: Which animal does {name} look after?\nAnswer: a"
TASK = """\
task: owners
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def make_world(output: Path, seed: int = 0) -> None:
    """Write the texts and the task below a folder; the task names its data by their full path."""
    drawn = random.Random(seed)
    names = [start + end for start in STARTS for end in ENDS]
    animals = list(ANIMALS) * (len(names) // len(ANIMALS))
    drawn.shuffle(animals)
    texts, rows = [], []
    for at, (name, animal) in enumerate(zip(names, animals, strict=True)):
        texts += [{"text": text.format(name=name, animal=animal)} for text in TEXTS]
        choices = drawn.sample([one for one in ANIMALS if one != animal], 3)
        choices.insert(at % 4, animal)
        rows.append({"question": QUESTION.format(name=name), "choices": choices, "answer": at % 4})
    drawn.shuffle(texts)
    task = output / "task"
    task.mkdir(parents=True, exist_ok=True)
    for file, found in ((output / "texts.jsonl", texts), (task / "owners.jsonl", rows)):
        lines = "".join(json.dumps(row) + "\n" for row in found)
        file.write_text(lines, encoding="utf-8")
    file = json.dumps(str((task / "owners.jsonl").resolve()))
    (task / "owners.yaml").write_text(TASK.format(file=file), encoding="utf-8")


def read_texts(output: Path) -> list[str]:
    """Return the texts of a world that was written."""
    with open(output / "texts.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.real.owners", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    make_world(given.output, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
