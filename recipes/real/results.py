"""What a seed of the real model measured, in one file: docs/real/seed-N.json.

Hides the form of these files. A file holds what is finished, and names what is not: of every
evaluation the means, and of one or two metrics the marks of every question, as a text such as
"0110", with the subject that each question is about; the command and the seconds of every stage;
the settings of every training; of the reports of angles what claims and figures read. It holds no
path of the machine that ran. `gather` reads the files of several seeds, and takes what all have.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import skillvec
from skillvec.recipes.claims.results import Results
from skillvec.recipes.claims.rules import Spread
from skillvec.recipes.real.seed import DOMAINS
from skillvec.recipes.stages import Pipeline, Stage, maker, read_marker, spell
from skillvec.trials.scores import Score, score_of

SCHEMA = 1
PICTURES = "images/real-"
PACKAGES = ("torch", "transformers", "trl")
TRAINING = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "global_batch",
            "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations",
            "max_completion_length", "temperature", "beta", "max_length", "bf16",
            "dtype")  # fmt: skip
ROW = ("cosine", "p", "control_cosine", "density_a", "density_b", "norm_a", "norm_b", "norm_ratio",
       "numel")  # fmt: skip
# whose marks are kept of which targets; of others those of `exact`
MARKED = dict.fromkeys(DOMAINS, ("exact", "contains")) | {"thinking": ("exact", "ends", "contains")}
DIGITS = 7
# what a file of a seed has at least; a report that is not finished is null
HELD: Mapping[str, Any] = {
    "settings": dict, "machine": dict, "versions": dict, "unfinished": list,
    "seconds": dict, "trainings": dict, "commands": dict, "scores": dict, "angles": dict | None,
    "copies": dict, "regimes": dict | None, "nbytes": dict,
}  # fmt: skip

# ---------------------------------------------------------------------------------- one seed


def write_seed(
    line: Pipeline,
    seed: int,
    settings: Mapping[str, Any],
    file: Path,
    asked: Container[str] | None = None,
) -> list[str]:
    """Write what the finished stages of a seed measured; return the names of those that are not.

    `settings`: what was run, in words that hold on any machine (model, subjects, form). `asked`:
    the stages that are missed if they are not finished (none: all).
    """
    unfinished = [stage for stage in line.stages if not read_marker(line, stage).get("finished")]
    done = [stage for stage in line.stages if stage not in unfinished]
    missed = [stage.name for stage in unfinished if asked is None or stage.name in asked]
    files = {stage.output for stage in done}
    found = {
        "schema": SCHEMA,
        "seed": seed,
        "settings": dict(settings),
        "machine": {"machine": platform.machine(), "processors": os.cpu_count()},
        "versions": {"skillvec": skillvec.__version__}
        | {name: version(name).partition("+")[0] for name in PACKAGES},
        "unfinished": missed,
        "seconds": {stage.name: read_marker(line, stage)["seconds"] for stage in done},
        "trainings": {stage.name: {key: stage.settings[key] for key in TRAINING
                                   if key in stage.settings}
                      for stage in done if stage.settings is not None},
        "commands": {stage.name: _spell(line, stage) for stage in done},
        "scores": _scores(line),
        "angles": _report(line.out, line.out / "angles", files),
        "copies": {domain: _report(line.out, line.out / domain / "copies" / "angles", files)
                   for domain in DOMAINS},
        "regimes": _report(line.out, line.out / "regimes" / "angles", files),
        "nbytes": {stage.name: stage.output.stat().st_size for stage in done
                   if stage.output.suffix == ".safetensors" and stage.output.is_file()},
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.{os.getpid()}")
    whole.write_text(_lay_out(found) + "\n", encoding="utf-8")
    whole.replace(file)
    return missed


def _spell(line: Pipeline, stage: Stage) -> str:
    """Return a stage's command with OUT for the folder of the seed, BASE for the model."""

    out = re.compile(rf"(?<![^=+*:]){re.escape(str(line.out))}(?=/|$)")  # it may hold the signs

    def name(word: str) -> str:
        if word == line.base:
            return "BASE"
        for sign in ("::", "=", "+", "*"):  # of arms and vectors
            if sign in word:
                return sign.join(map(name, word.split(sign)))
        return Path(word).name if Path(word).is_absolute() else word

    words = (out.sub("OUT", word) for word in shlex.split(spell(line, stage)))
    return shlex.join(map(name, words))


def _scores(line: Pipeline) -> dict[str, Any]:
    """Return, by target and arm, means and marks; groups stand once a target, or beside an arm.

    A stage that asks several arms may have finished some of them: their files are whole.
    """
    found: dict[str, Any] = {}
    for (target, arm), path in line.scores.items():
        stage = maker(line, None, path)
        if stage is None or not read_marker(line, stage) or not path.is_file():
            continue
        read = json.loads(path.read_text(encoding="utf-8"))
        answers = read.get("answers", [])
        marks = {
            name: "".join(str(int(answer[name])) for answer in answers)
            for name in MARKED.get(target.partition(" ")[0], ("exact",))
            if name in read["metrics"]
            and answers
            and all(answer.get(name) in (0, 1) for answer in answers)
        }
        means = {name: _short(value["mean"]) for name, value in read["metrics"].items()}
        entry: dict[str, Any] = {"stage": stage.name, "means": means}
        entry |= {"marks": marks} if marks else {}
        of_target = found.setdefault(target, {"groups": [], "arms": {}})
        if marks and all("group" in answer for answer in answers):
            named = (str(answer["group"]) for answer in answers)
            groups = [[name, len([*same])] for name, same in itertools.groupby(named)]
            of_target["groups"] = of_target["groups"] or groups
            if groups != of_target["groups"]:
                entry["groups"] = groups
        elif marks:
            entry["groups"] = []
        of_target["arms"][arm] = entry
    return found


def _report(out: Path, folder: Path, files: set[Path]) -> dict[str, Any] | None:
    """Return the numbers of a report of angles that are read again; None if it is not finished.

    Of layers and tensors there are names and cosines alone, of the pairs that are shown by layer: a
    domain's skill and SFT on S, each with its SFT on T; tensors are drawn of the first domain.
    """
    if folder not in files:
        return None
    pairs = []
    for pair in json.loads((folder / "report.json").read_text(encoding="utf-8"))["pairs"]:
        a, b = (_label(out, pair[side]) for side in "ab")
        shown = b.endswith("sft_t") and a.partition("/")[0] == b.partition("/")[0]
        pairs.append({
            "a": a, "b": b, "overall": _row(pair["overall"]),
            "parts": [{"name": row["name"]} | _row(row) for row in pair["parts"]],
            "layers": _cosines(pair["layers"]) if shown else {},
            "tensors": _cosines(pair["tensors"]) if shown and a.startswith(DOMAINS[0]) else {},
        })  # fmt: skip
    return {"pairs": pairs}


def _label(out: Path, label: str) -> str:
    """Return what a label of a report names first: its path below the folder of the seed."""
    path = Path(label.split("::")[0])
    return str(path.relative_to(out)) if path.is_relative_to(out) else path.name


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _short(row[key]) for key in ROW if key in row}


def _cosines(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {row["name"]: _short(row["cosine"], 4) for row in rows}


def _short(value: float | None, digits: int = DIGITS) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def _lay_out(value: Any, depth: int = 0) -> str:
    """Return JSON with a line for every stage, arm and pair."""
    of_pairs = isinstance(value, list) and any(isinstance(one, dict) for one in value)
    if depth > 3 or not value or not (isinstance(value, dict) or of_pairs):
        return json.dumps(value, ensure_ascii=False)
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if of_pairs:
        return (
            "[" + ",".join(pad + json.dumps(one, ensure_ascii=False) for one in value) + end + "]"
        )
    inner = (f"{json.dumps(key, ensure_ascii=False)}: {_lay_out(one, depth + 1)}"
             for key, one in value.items())  # fmt: skip
    return "{" + ",".join(pad + one for one in inner) + end + "}"


# ---------------------------------------------------------------------------------- many seeds


def read_seeds(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what the files say, in the order of their seeds.

    Raises ValueError for no file, two of one seed, and a file that is no seed of this version.
    """
    seeds = []
    for file in files:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        told = read if isinstance(read, dict) else {}
        if told.get("schema") != SCHEMA or type(told.get("seed")) is not int:
            raise ValueError(f"{file}: expected a seed of schema {SCHEMA}, as write_seed makes it")
        seeds.append(read)
    numbers = [read["seed"] for read in seeds]
    if not seeds or len({*numbers}) < len(numbers):
        raise ValueError(f"expected files of different seeds, found {numbers or 'none'}")
    return sorted(seeds, key=lambda read: read["seed"])


def gather(seeds: Sequence[Mapping[str, Any]]) -> Results:
    """Return what all seeds measured; what one of them lacks is left out.

    Raises ValueError for a seed without the keys that `write_seed` gives it.
    """
    for seed in seeds:
        wrong = [key for key, kind in HELD.items()
                 if key not in seed or not isinstance(seed[key], kind)]  # fmt: skip
        if wrong:
            raise ValueError(
                f"seed {seed['seed']}: expected {', '.join(wrong)} as write_seed makes it"
            )
    measured = [dict(_measured(seed)) for seed in seeds]
    scores = {key: _spread([one[key] for one in measured]) for key in _common(measured)}
    times = [seed["seconds"] for seed in seeds]
    arms = {arm for domain, arm, _ in scores if domain in DOMAINS}
    lambdas = sorted(float(arm.removeprefix("lambda ")) for arm in arms if arm.startswith("lambda"))
    copies = {domain: [_open_report(seed["copies"][domain]) for seed in seeds]
              for domain in DOMAINS if all(seed["copies"][domain] for seed in seeds)}  # fmt: skip
    return Results(
        scores=scores,
        seconds={name: Spread(tuple(one[name] for one in times)) for name in _common(times)},
        angles=[_open_report(seed["angles"]) for seed in seeds]
        if all(seed["angles"] for seed in seeds) else [],
        copies=copies,
        seeds=tuple(seed["seed"] for seed in seeds),
        domains=tuple(domain for domain in DOMAINS if any(key[0] == domain for key in scores)),
        lambdas=(*lambdas,),
        pictures=PICTURES,
    )  # fmt: skip


def partial_scores(seeds: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Return the seeds that lack a (target, arm) which another seed has."""
    held = [{(target, arm) for target, found in seed["scores"].items() for arm in found["arms"]}
            for seed in seeds]  # fmt: skip
    lacking: dict[tuple[str, str], list[int]] = {}
    for key in sorted(set().union(*held)):
        missing = [seed["seed"] for seed, has in zip(seeds, held, strict=True) if key not in has]
        if missing:
            lacking[key] = missing
    return lacking


def count_completions(training: Mapping[str, Any]) -> int:
    """Return how many answers a training by GRPO sampled, from its settings."""
    batch = training.get("global_batch") or (
        training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    )
    return int(training["max_steps"] * batch)


def _measured(seed: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], Score]]:
    """Yield the score of every (target, arm, metric), with values where there are marks."""
    for target, found in seed["scores"].items():
        for arm, entry in found["arms"].items():
            runs = tuple((name, count) for name, count in entry.get("groups", found["groups"]))
            for metric, mean in entry["means"].items():
                marks = entry.get("marks", {}).get(metric)
                yield (target, arm, metric), _score(marks, runs) if marks else Score(mean)


@cache  # every claim gathers every seed
def _score(marks: str, runs: tuple[tuple[str, int], ...]) -> Score:
    return score_of(map(int, marks), [name for name, count in runs for _ in range(count)])


def _spread(scores: Sequence[Score]) -> Spread:
    known = all(score.values for score in scores)
    return Spread(tuple(score.mean for score in scores), tuple(scores) if known else ())


def _common(found: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """Return the keys that all have, in the order of the first."""
    return [key for key in found[0] if all(key in one for one in found)]


def _open_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with a row for every layer and tensor, as `skillvec orthogonality` has it."""
    return {"pairs": [
        pair | {level: [{"name": name, "cosine": cosine} for name, cosine in pair[level].items()]
                for level in ("layers", "tensors")}
        for pair in report["pairs"]
    ]}  # fmt: skip
