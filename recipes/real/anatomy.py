"""The anatomy of a skill: the smallest vector that keeps 95 % of the gain.

    python -m skillvec.recipes.real.anatomy --target T --vector V --questions Q.jsonl -o OUT

`skillvec search` tries copies of V over the space of anatomy.yaml: which tensors, how many singular
triplets of each matrix, how many bits of mantissa. One half of the subjects chooses, the other half
judges, once. The winner is stored (OUT/skill.safetensors, a vector as any other), proved, added to
the target and proved again; OUT/anatomy.json has its bytes, the share of the gain that it keeps
with the interval, and every trial. The same command goes on with a search that was cut off.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import skillvec as sv
from skillvec.errors import SkillvecError
from skillvec.report import Report

SPACE = Path(__file__).with_suffix(".yaml")
KEEP = 0.95
BUDGET = 20  # trials of the sampler, and as many of random search


def find_anatomy(
    target: Path,
    vector: Path,
    questions: Path,
    output: Path,
    *,
    name: str = "",
    budget: int = BUDGET,
    metric: str = "exact",
    keep: float = KEEP,
    asking: Mapping[str, Any] = {},
    seed: int = 0,
    watcher: Any = None,
) -> dict[str, Any]:
    """Search, store the winner, prove it and return what anatomy.json holds.

    `asking` are options of recipes/evaluate.py. Raises SkillvecError where an input cannot be used,
    and VerificationError where what was written is not what it claims.
    """
    report = sv.search(
        target, vector, eval=f"evaluate:{questions}", output=output / "search", space=str(SPACE),
        budget=budget, metric=metric, second="bytes", keep=keep, eval_options=dict(asking),
        seed=seed, scratch=output, watcher=watcher,
    )  # fmt: skip
    skill, merged = output / "skill.safetensors", output / "merged"
    stored = sv.combine(recipe=output / "search" / "winner.yaml", output=skill, force=True)
    sv.verify(skill)
    try:
        sv.apply(target, skill, merged, force=True)
        sv.verify(merged)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    said = describe(report, name or vector.parent.name, output, keep)
    said["skill"] = {
        "nbytes": skill.stat().st_size, "claim": stored.manifest["exactness"]["claim"],
        "kept_norm_sq": stored.manifest.get("kept"),
        "codecs": sv.inspect(skill).facts["codecs"],
    }  # fmt: skip
    (output / "anatomy.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return said


def describe(report: Report, name: str, output: Path, keep: float) -> dict[str, Any]:
    """Return the answer of a search as plain data, with every trial."""
    facts = report.facts
    metric, nbytes = facts["metric"], facts["nbytes"]
    return {
        "name": name,
        "metric": metric,
        "keep": keep,
        "verdict": facts["verdict"],
        "winner": facts["chosen"]["winner"]["point"],
        "nbytes": nbytes["winner"],
        "exact_nbytes": nbytes["lambda 1"],
        "share_of_bytes": nbytes["winner"] / nbytes["lambda 1"],
        "kept": facts.get("kept"),  # share, low, high; none where lambda 1 itself gains nothing
        "scores": {point: scores[metric] for point, scores in facts["reported"].items()},
        "searched": {point: scores[metric] for point, scores in facts["searched"].items()},
        "trials": read_trials(output / "search" / "trials.csv", metric),
    }


def read_trials(file: Path, metric: str) -> list[dict[str, Any]]:
    """Return the trials of a search that have a score: by whom, the point, score and bytes."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["state"] == "complete"]
    return [
        {"by": row["search"], "only": row["only"], "rank": int(row["rank"]),
         "bits": int(row["bits"]), "score": float(row[metric]), "nbytes": int(row["bytes"])}
        for row in rows
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- the page


def section(files: Sequence[Path]) -> str:
    """Return the Markdown on what anatomy.json files say, a row each; "" of none."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not found:
        return ""
    heads = ["world", "keeps of the gain [95 % interval]", "target / lambda 1 / this",
             "bytes", "of the exact file", "tensors", "rank", "bits", "search"]  # fmt: skip
    lines = [f"- {_summary(said)}" for said in found]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [_row(said) for said in found]
    lines += [
        "",
        "The share is that of the gain of lambda 1 on the half of the subjects that the search"
        " never saw; its interval has all shares that these questions do not rule out (Fieller),"
        " by subject. *Found* means: beyond noise at least"
        f" {found[0]['keep']:g} of the gain. The stored vector says itself that it is lossy, and is"
        " applied and verified as any other.",
        "",
        "What no other trial beats in both, on the half that chose:",
        "",
        "| world | bytes | keeps of the gain | tensors | rank | bits |",
        "|---|---|---|---|---|---|",
    ]
    for said in found:
        lines += [_front_row(said, trial) for trial in find_front(said["trials"])]
    return "\n".join(lines) + "\n"


def find_front(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the trials that no other beats in score and bytes, the smallest first."""
    front: list[Mapping[str, Any]] = []
    for trial in sorted(trials, key=lambda one: (one["nbytes"], -one["score"])):
        if not front or trial["score"] > front[-1]["score"]:
            front.append(trial)
    return front


def _summary(said: Mapping[str, Any]) -> str:
    """Return what was found in one world, as a sentence; what was not found is said as such."""
    size = f"{said['nbytes'] / 1e6:.3g} MB, 1/{1 / said['share_of_bytes']:,.0f} of the exact file"
    if said["kept"] is None:
        return (
            f"**{said['name']}**: nothing can be said: on these questions lambda 1 itself gains"
            " nothing beyond noise."
        )
    kept = said["kept"]
    share = (
        f"{kept['share']:.0%} of the gain (95 % interval {kept['low']:.0%} to {kept['high']:.0%})"
    )
    if said["verdict"] == "found":
        return f"**{said['name']}**: {size}, keeps {share}."
    return (
        f"**{said['name']}**: not shown beyond noise. The candidate, {size}, keeps {share}, and"
        f" {said['keep']:.0%} lies within that."
        if kept["low"] <= said["keep"] <= kept["high"]
        else f"**{said['name']}**: not found. The candidate, {size}, keeps {share} only."
    )


def _row(said: Mapping[str, Any]) -> str:
    kept, winner = said["kept"], said["winner"]
    share = f"{kept['share']:.2f} [{kept['low']:.2f}, {kept['high']:.2f}]" if kept else "-"
    scores = " / ".join(
        f"{said['scores'][p]['mean']:.3f}" for p in ("target", "lambda 1", "winner")
    )
    cells = [said["name"], share, scores, f"{said['nbytes']:,}", f"{said['share_of_bytes']:.2%}",
             winner["only"], *_numbers(winner), said["verdict"]]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _front_row(said: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    base, whole = (said["searched"][point] for point in ("target", "lambda 1"))
    share = f"{(trial['score'] - base) / (whole - base):.2f}" if whole > base else "-"
    cells = [said["name"], f"{trial['nbytes']:,}", share, trial["only"], *_numbers(trial)]
    return "| " + " | ".join(cells) + " |"


def _numbers(point: Mapping[str, Any]) -> list[str]:
    """Return rank and bits, in words where all is kept."""
    return [str(point["rank"] or "all"), "all" if point["bits"] == 23 else str(point["bits"])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.real.anatomy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--target", type=Path, required=True, help="model folder")
    parser.add_argument("--vector", type=Path, required=True, help="the exact vector")
    parser.add_argument("--questions", type=Path, required=True, help=".jsonl, with groups")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--name", default="", help="of the world; the vector's folder")
    parser.add_argument("--budget", type=int, default=BUDGET,
                        help="trials, and as many of random search (%(default)s)")  # fmt: skip
    parser.add_argument("--metric", default="exact", help="%(default)s")
    parser.add_argument("--keep", type=float, default=KEEP, help="of the gain (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(arguments))
    asking = {key: given.pop(key) for key in ("max_new_tokens", "batch")}
    given["output"].mkdir(parents=True, exist_ok=True)
    try:
        said = find_anatomy(**given, asking=asking, watcher=Spoken())
    except (SkillvecError, OSError) as error:
        print(f"anatomy: {error}", file=sys.stderr)
        return 1
    print(_summary(said))
    return 0


class Spoken:
    """Says each trial in a line."""

    def planned(self, report: Report) -> None:
        print(f"anatomy: {report.facts['budget']} trials, and as many at random", flush=True)

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Pass over the bytes of a trial, of which there are many."""

    def tried(self, line: str) -> None:
        print(f"anatomy: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
