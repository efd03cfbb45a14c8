"""Twelve lambdas on one loaded model, beside a merged copy for each: wall time, and what is added.

Method. The target of a family (see family.py) is evaluated at twelve lambdas along rl - sft, by the
loss over random tokens: a number of forward passes that takes about `--seconds` here. Contenders,
in turn, every other round backwards:

- `sweep`: one process, `skillvec.sweep` from the start of Python to the written report
- `copies`: for each lambda `skillvec apply`, then a process that loads the copy and evaluates it
- `copies, one process`: the same in one process, which pays for Python's start and imports once

All have to give the same losses, bit for bit. `added` is what a point takes over its evaluation in
the sweep: attaching, watching the weights, the journal; from the second point after the target on,
because the first plans. No numpy or torch in this process (see measure.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders import PYTHON, SKILLVEC, diff, stored
from measure import Command, remove, rounds, sampled
from run import about, families_of, save, show

LAMBDAS = [i / 4 for i in range(-4, 8)]  # -1 to 1.75, with 0: twelve
PACKAGES = ("numpy", "torch", "transformers", "safetensors")
RATIO, ADDED = 5.0, 0.05  # at least, for evaluations of a second; at most
HEADING = f"{'evaluation':<12} {'who':<22}{'wall s: min med max':>24}{'x sweep':>22}  goal"


@dataclass
class Row:
    """One line: a contender's seconds by round, and how many times the sweep's, or a share."""

    evaluation: str
    who: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    goal: str = ""

    def __str__(self) -> str:
        walls, ratios = (
            " ".join(f"{value:7.3g}" for value in (min(own), statistics.median(own), max(own)))
            if own else "" for own in (self.seconds, self.ratios)
        )  # fmt: skip
        return f"{self.evaluation:<12} {self.who:<22}{walls:>24}{ratios:>24}  {self.goal}".rstrip()


# -------------------------------------------------------------------------- in processes of its own


def score(model: Any, tokenizer: Any, passes: int = 1) -> dict[str, list[float]]:
    """Return the loss of each of `passes` texts of 128 random tokens."""
    import torch

    draw = torch.Generator().manual_seed(0)
    losses = []
    with torch.inference_mode():
        for _ in range(passes):
            tokens = torch.randint(0, model.config.vocab_size, (1, 128), generator=draw)
            losses.append(model(tokens, labels=tokens).loss.item())
    return {"loss": losses}


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def time_passes(target: str) -> None:
    """Print the seconds of one forward pass."""
    model = load(target)
    score(model, None, 2)
    began = time.perf_counter()
    score(model, None, 5)
    print((time.perf_counter() - began) / 5)


def run_sweep(target: str, vector: str, passes: int, output: str) -> None:
    """Sweep, and write the losses and what each point took, the time of its evaluation beside."""
    import skillvec as sv

    class Clock:
        times: list[float] = []  # noqa: RUF012

        def planned(self, report: Any) -> None:
            self.times.append(time.perf_counter())

        def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
            """Nothing of a sweep is measured in bytes."""

        def tried(self, line: str) -> None:
            self.times.append(time.perf_counter())

    report = sv.sweep(
        target, vector, eval="sweep:score", eval_options={"passes": passes}, output=f"{output}.d",
        lam=LAMBDAS, watcher=Clock(),
    )  # fmt: skip
    points = report.facts["points"]
    whole = [after - before for before, after in zip(Clock.times, Clock.times[1:], strict=False)]
    taken = [[spent, point["seconds"]] for spent, point in zip(whole, points, strict=True)]
    losses = {str(point["lam"]): point["scores"]["loss"]["mean"] for point in points}
    Path(output).write_text(json.dumps({"losses": losses, "taken": taken[2:]}))


def run_copies(target: str, vector: str, passes: int, output: str) -> None:
    """Write, load and evaluate a copy for each lambda in this process."""
    import skillvec as sv

    losses = {}
    for lam in LAMBDAS:
        place = f"{output}.merged" if lam else target
        if lam:
            sv.apply(target, vector, place, lam=lam, force=True)
        losses[str(lam)] = statistics.fmean(score(load(place), None, passes)["loss"])
    remove(Path(f"{output}.merged"))
    Path(output).write_text(json.dumps({"losses": losses}))


def run_processes(target: str, vector: str, passes: int, output: str) -> None:
    """Write a copy for each lambda, and evaluate it, in processes of their own."""
    losses, place = {}, f"{output}.merged"
    for lam in LAMBDAS:
        if lam:
            words = [
                SKILLVEC,
                "apply",
                target,
                vector,
                "--lam",
                str(lam),
                "-o",
                place,
                "-q",
                "--force",
            ]
            subprocess.run([*map(str, words)], check=True)
        words = [PYTHON, __file__, "--child", "one", place if lam else target, "", str(passes), ""]
        said = subprocess.run(words, check=True, capture_output=True, text=True)
        losses[str(lam)] = float(said.stdout.split()[-1])
    remove(Path(place))
    Path(output).write_text(json.dumps({"losses": losses}))


def run_child(words: Sequence[str]) -> None:
    kind, target, vector, passes, output = words
    if kind == "time":
        time_passes(target)
    elif kind == "one":
        print(statistics.fmean(score(load(target), None, int(passes))["loss"]))
    else:
        kinds = {"sweep": run_sweep, "copies": run_processes, "copies, one process": run_copies}
        kinds[kind](target, vector, int(passes), output)


# ------------------------------------------------------------------------------------------- table


def measure(
    seconds: float, each: float, target: Path, vector: Path, number: int, work: Path
) -> list[Row]:
    """Return the rows of an evaluation of about so many seconds; `each` is those of a pass."""
    passes = max(1, round(seconds / each))
    results = {
        name: work / f"{name[-11:]}.json" for name in ("sweep", "copies, one process", "copies")
    }
    commands = {
        name: Command(
            [PYTHON, __file__, "--child", name, str(target), str(vector), str(passes), str(result)],
            (target, vector), Path(f"{result}.d"),
        )
        for name, result in results.items()
    }  # fmt: skip
    taken: list[list[float]] = []
    spent = {name: list[float]() for name in commands}
    for turn in range(number):
        order = dict([*commands.items()][:: 1 if turn % 2 == 0 else -1])
        for name, own in rounds(order, 1, work).items():
            spent[name].append(own[0].seconds)
        found = {name: json.loads(result.read_text()) for name, result in results.items()}
        if any(one["losses"] != found["sweep"]["losses"] for one in found.values()):
            raise RuntimeError(f"the contenders give other losses: {found}")
        taken += found["sweep"]["taken"]
    evaluations = [one for _, one in taken]
    title = f"{statistics.median(evaluations):.2g} s"
    rows = []
    for name, own in spent.items():
        ratios = [mine / theirs for mine, theirs in zip(own, spent["sweep"], strict=True)]
        rows.append(Row(title, name, own, ratios if name != "sweep" else []))
    reached = statistics.median(rows[-1].ratios)
    rows[-1].goal = f">= {RATIO:g} {'yes' if reached >= RATIO else 'NO'}"
    added = [(whole - one) for whole, one in taken]
    share = sum(added) / sum(evaluations)
    rows.append(Row(title, "added to a point", added,
                    goal=f"{share:.1%} of the evaluation <= {ADDED:.0%}"
                    f" {'yes' if share <= ADDED else 'NO'}"))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="of the family: small, middle, big")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 4.0],
                        help="about how long an evaluation takes")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.child:
        os.environ["HF_HUB_OFFLINE"] = "1"
        run_child(given.child)
        return
    family = families_of([given.size])[given.size]
    work = Path(tempfile.mkdtemp(prefix="sweep-", dir=family.parent))
    os.chdir(Path(__file__).parent)  # where `sweep:score` is found
    try:
        facts, target = about(work, PACKAGES), family / "target"
        sampled(diff(family / "rl", family / "sft", stored(work, "packed"), "packed"), work)
        words = [PYTHON, __file__, "--child", "time", str(target), "", "0", ""]
        each = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        rows = []
        for seconds in given.seconds:
            rows += measure(seconds, each, target, stored(work, "packed"), given.rounds, work)
    finally:
        shutil.rmtree(work)
    facts["parameters"] = f"{json.loads((family / 'family.json').read_text())['parameters']:,}"
    show(facts, HEADING, rows, "evaluation")
    del given.child
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
