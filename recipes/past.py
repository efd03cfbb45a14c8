"""PaST as a pipeline of stages (arXiv 2601.11258).

    python -m skillvec.recipes CONFIG [--dry-run | --show]

CONFIG is a YAML file, or the name of a configuration that comes with the package. SFT on part k of
the source, RL from there plus the skill so far, v_k = theta_rl - theta_sft (K rounds), SFT on each
target without v, injection theta_sft_T + lambda * v, evaluation beside the SFT-only control.
docs/past.md walks through a configuration.

Hides running: recipes/stages.py keeps what is finished. Refuses what recipes/checks.py finds
before the first stage, parts of the source that share a row, and RL questions that a target is
evaluated on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skillvec.recipes.checks import (
    DataCheck,
    FaultsError,
    base_faults,
    find_faults,
    require_training,
)
from skillvec.recipes.dry_run import show_stages
from skillvec.recipes.stages import TRAINERS, Pipeline, flat, maker, run_stages, states
from skillvec.recipes.training import fetch_model
from skillvec.recipes.trl_arguments import nearest

SHIPPED = {path.parent.name: path for path in sorted(Path(__file__).parent.glob("*/past.yaml"))}


@dataclass(frozen=True)
class Config:
    """What a configuration file may say; every path is relative to the working directory.

    `base`: a folder or a Hub id. `launch`: how trainings are launched (recipes/launch.py); none:
    all in one process. `processes`: of a launched training; none: one a GPU. `prepare`: modules run
    first, {run, out, with: options}. `training`: arguments of every training stage (TRL's names).
    `sft`: its steps, in order. `rl`: its arguments. `source`: K parts, {sft: one file a step, rl:
    file}. `targets`: name -> {sft: files, evaluate: options}. `lam`: lambdas. `controls`: of
    random, shuffled. `evaluate`: {run, with}. `angles`: options of orthogonality. `environment`:
    variables of every stage. `parameters`: of the base, for sizes while it is not on disk.
    """

    out: str
    base: str
    sft: list[dict[str, Any]]
    rl: dict[str, Any]
    source: list[dict[str, Any]]
    targets: dict[str, dict[str, Any]]
    evaluate: dict[str, Any]
    prepare: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    launch: str | list[str] = field(default_factory=list)
    processes: int | None = None
    lam: list[float] = field(default_factory=lambda: [1.0])
    controls: list[str] = field(default_factory=list)
    angles: dict[str, Any] = field(default_factory=lambda: {"control": "random"})
    environment: dict[str, str] = field(default_factory=dict)
    parameters: float | None = None


def find_config(name: str) -> Path:
    """Return the file of a configuration; one that comes with the package goes by its name."""
    path = Path(name)
    if path.is_file() or name not in SHIPPED:
        return path
    return SHIPPED[name]


def read_config(path: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file; FaultsError names all that is missing, unknown or does not fit together."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file, and no configuration of this name comes with the package:"
            f" {', '.join(SHIPPED)}"
        ) from None
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected settings, one a line, as `name: value`")
    read |= changes or {}
    known = Config.__dataclass_fields__
    faults = [f"unknown {name}{nearest(name, {*known})}" for name in read.keys() - known.keys()]
    faults += [
        f"{name} is missing"
        for name, one in known.items()
        if name not in read and one.default is MISSING and one.default_factory is MISSING
    ]
    faults += _shape_faults(read)
    if faults:
        raise FaultsError([f"{path}: {fault}" for fault in sorted(faults)])
    return Config(**read)


def _shape_faults(read: Mapping[str, Any]) -> list[str]:
    """Return which settings are not built as `Config` says."""
    wanted = {"sft": list, "source": list, "prepare": list, "lam": list, "controls": list,
              "rl": dict, "targets": dict, "evaluate": dict, "training": dict, "angles": dict,
              "environment": dict, "out": str, "base": str}  # fmt: skip
    faults = [
        f"{name}: expected {'text' if kind is str else f'a {kind.__name__}'}, found {read[name]!r}"
        for name, kind in wanted.items()
        if name in read and not isinstance(read[name], kind)
    ]
    if faults:
        return faults
    numbers = [("lam", value) for value in read.get("lam", [])]
    numbers += [("parameters", read["parameters"])] if read.get("parameters") is not None else []
    for name, value in numbers:
        try:
            fits = math.isfinite(float(value)) and (name == "lam" or float(value) > 0)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            faults.append(f"{name}: expected a finite number, found {value!r}")
    faults += _launch_faults(read.get("launch", []), read.get("processes"))
    if Path(read.get("out", "runs")).is_file():
        faults.append(f"out: {read['out']} is a file, expected a folder")
    steps = read.get("sft", [])
    faults += [f"sft: expected settings, found {one!r}" for one in steps if type(one) is not dict]
    for name in read.get("targets", {}):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+=,-]{0,99}", name):
            faults.append(
                f"target {name!r}: its name becomes a folder; expected a text of letters, digits"
                " and . _ + = , - that begins with a letter or a digit"
            )
    parts = [(f"source part {k}", part) for k, part in enumerate(read.get("source", []), 1)]
    parts += [(f"target {key}", part) for key, part in read.get("targets", {}).items()]
    if not read.get("source", [0]) or not read.get("targets", [0]):
        faults.append("expected at least one part in source and one in targets")
    steps = len(read.get("sft", []))
    for name, part in parts:
        keys = {"sft", "rl"} if name.startswith("source") else {"sft", "evaluate"}
        files = part.get("sft") if isinstance(part, dict) else None
        if (
            not isinstance(files, list)
            or {*part} != keys
            or len(files) != steps
            or not all(isinstance(file, str) for file in [*files, part.get("rl", "")])
            or not isinstance(part.get("evaluate", {}), dict)
        ):
            faults.append(
                f"{name}: expected {' and '.join(sorted(keys))}, with a list of {steps} files in"
                f" sft (one a step); found {part}"
            )
    entries = [
        (f"prepare {k}", one, {"run", "out"}) for k, one in enumerate(read.get("prepare", []), 1)
    ]
    if "evaluate" in read:
        entries.append(("evaluate", read["evaluate"], {"run"}))
    for name, entry, keys in entries:
        fits = isinstance(entry, dict) and keys <= {*entry} <= keys | {"with"}
        if not fits or not isinstance(entry.get("with", {}), dict):
            faults.append(f"{name}: expected {', '.join(sorted(keys))} and `with`; found {entry}")
        elif entry["run"] in TRAINERS and not {"data", "model_name_or_path"} <= {
            *entry.get("with", {})
        }:
            faults.append(f"{name}: expected data and model_name_or_path in `with`; found {entry}")
    return faults


def _launch_faults(launch: Any, processes: Any) -> list[str]:
    faults = []
    if processes is not None and (type(processes) is not int or processes < 1):
        faults.append(f"processes: expected a whole number of at least 1, found {processes!r}")
    if not isinstance(launch, str):
        if not isinstance(launch, list) or not all(isinstance(word, str) for word in launch):
            faults.append(f"launch: expected a name, a file or a list of words, found {launch!r}")
        elif launch and shutil.which(launch[0]) is None:
            faults.append(f"launch: no command {launch[0]} here")
    return faults


def plan(config: Config, base: str) -> Pipeline:
    """List the stages; `base` is the folder of the base model, or its Hub id for a dry run."""
    parameters = config.parameters and float(config.parameters)  # YAML reads 7e9 as text
    line = Pipeline(
        Path(config.out),
        base,
        config.training,
        config.launch,
        parameters,
        config.processes,
        bool(config.rl.get("allow_no_reward")),
    )
    for number, entry in enumerate(config.prepare, 1):
        line.module(f"prepare-{number}", entry["run"], entry.get("with", {}), Path(entry["out"]))
    rl = [config.rl for _ in config.source]
    skill, sft = refine(line, "", base, config.sft, rl, config.source)
    vectors = {f"lambda {lam:g}": (skill, lam) for lam in config.lam}
    for kind in config.controls:
        noise = line.control(f"controls/{kind}.safetensors", skill, kind)
        vectors[f"{kind}, lambda 1"] = (noise, 1.0)
    trained = {}
    for name, target in config.targets.items():
        at = f"targets/{name}"
        trained[name] = line.sft(f"{at}/sft", base, config.sft, target["sft"])
        asked = config.evaluate.get("with", {}) | target["evaluate"]
        arms: dict[str, Path | str] = {"base": base, "SFT only": trained[name]}
        for arm, (vector, lam) in vectors.items():
            arms[arm] = line.apply(f"{at}/{flat(arm)}", trained[name], {vector: lam})
        for arm, model in arms.items():
            line.evaluate(name, arm, model, config.evaluate["run"], asked)
    # of twenty targets one shows the angle; all pairs of them would read every model at once
    deltas = [skill, *(f"{tuned}::{base}" for tuned in (sft, next(iter(trained.values()))))]
    line.orthogonality("angles", deltas, config.angles)
    return line


def refine(
    line: Pipeline,
    at: str,
    base: str | Path,
    steps: Sequence[Mapping[str, Any]],
    rl: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
) -> tuple[Path, Path]:
    """Add K rounds of iterative refinement (the paper, stages 1 and 2); return v_K and SFT_K.

    v_0 = 0; for k = 1..K: SFT on part k from the base, RL from theta_sft_k + v_(k-1), and
    v_k = theta_rl_k - theta_sft_k. The difference is from the round's SFT model, not from where RL
    began, so v_k holds all that was learnt so far. The paper does not say whether every round's SFT
    begins at the base; it does here.
    """
    skill = None
    for number, (settings, part) in enumerate(zip(rl, parts, strict=True), 1):
        name = f"{at}round-{number}"
        sft = line.sft(f"{name}/sft", base, steps, part["sft"])
        start = sft if skill is None else line.apply(f"{name}/start", sft, {skill: 1.0})
        trained = line.rl(f"{name}/rl", start, settings, part["rl"])
        skill = line.diff(f"{name}/skill.safetensors", trained, sft, "grpo")
    if skill is None:
        raise ValueError("source: expected at least one part")
    return skill, sft


def row_faults(config: Config) -> list[str]:
    """Return which parts of the source share a row, and which evaluations one with RL.

    Looks at the files that are there; those that a stage makes are looked at when it has.
    """
    faults = []
    parts = [_rows([*part["sft"], part["rl"]], ()) for part in config.source]
    for (j, one), (k, other) in itertools.combinations(enumerate(parts, 1), 2):
        if shared := one & other:
            faults.append(
                f"source: parts {j} and {k} share {len(shared)} rows, first {min(shared)[:80]};"
                " the rounds of iterative refinement take disjoint parts"
            )
    rewarded = _rows([part["rl"] for part in config.source], ("prompt",))
    for name, target in config.targets.items():
        asked = [str(v) for v in target["evaluate"].values() if str(v).endswith(".jsonl")]
        if shared := rewarded & _rows(asked, ("prompt",)):
            faults.append(
                f"target {name}: {len(shared)} of its questions are in the source's RL data, first"
                f" {min(shared)[:80]}; a target is what RL never saw"
            )
    return faults


def _rows(files: Sequence[str], columns: Sequence[str]) -> set[str]:
    rows: set[str] = set()
    for file in files:
        if not file.endswith(".jsonl") or not Path(file).is_file():
            continue
        with open(file, encoding="utf-8") as lines:
            for text in lines:
                with contextlib.suppress(
                    ValueError, LookupError, TypeError
                ):  # DataCheck names those
                    row = json.loads(text)
                    kept = {column: row[column] for column in columns or row}
                    rows.add(json.dumps(kept, sort_keys=True))
    return rows


def find_base(config: Config, fetch: bool) -> str:
    """Return the folder of the base model; a Hub id (with @revision) is fetched, if it may be."""
    if any(Path(config.base).is_relative_to(entry["out"]) for entry in config.prepare):
        return config.base
    from huggingface_hub.errors import HFValidationError

    try:
        return fetch_model(config.base, fetch)
    except (OSError, HFValidationError) as error:
        if fetch:
            raise ValueError(f"base {config.base}: no such folder, and the Hub: {error}") from None
        return config.base


def report(config: Config, line: Pipeline) -> dict[str, Any]:
    """Gather every score as {target: {arm: metrics}} and print a table a target."""
    from rich.console import Console
    from rich.table import Table

    scores: dict[str, Any] = {}
    for (target, arm), path in line.scores.items():
        read = json.loads(path.read_text(encoding="utf-8"))
        scores.setdefault(target, {})[arm] = read["metrics"]
    for target, arms in scores.items():
        names = list(next(iter(arms.values())))
        table = Table(title=f"{target} (mean, standard error)", title_justify="left")
        table.add_column("model")
        for name in names:
            table.add_column(name, justify="right")
        for arm, metrics in arms.items():
            table.add_row(arm, *(_cell(metrics[name]) for name in names))
        Console().print(table)
    return scores


def _cell(metric: Mapping[str, float | None]) -> str:
    error = metric.get("standard_error")
    return f"{metric['mean']:.3f}" + ("" if error is None else f" ({error:.3f})")


def check(config: Config) -> tuple[Pipeline, DataCheck, list[str]]:
    """Return the stages, what has looked at their data, and all that is wrong now."""
    print(f"{config.out}: checking settings, modules, files and disk", flush=True)
    os.environ.update({name: str(value) for name, value in config.environment.items()})
    require_training()
    line = plan(config, find_base(config, fetch=False))
    faults = find_faults(config, line)
    data = DataCheck(line)
    faults += data.faults({stage.name for stage, state, _ in states(line) if state == "done"})
    return line, data, list(dict.fromkeys(faults + row_faults(config)))


def run(config: Config) -> dict[str, Any]:
    """Check everything, then run what is not finished; return {target: {arm: metrics}}.

    Raises FaultsError for what is wrong before a stage runs, or with what `prepare` has made.
    """
    line, data, faults = check(config)
    if faults:
        raise FaultsError(faults)
    folder = find_base(config, fetch=True)
    is_new = folder != line.base or maker(line, None, folder) is not None
    if folder != line.base:  # it was on the Hub alone
        line = plan(config, folder)
        data = DataCheck(line)
    prepared = len(config.prepare)
    for number in range(prepared):
        run_stages(line, number, number + 1)
        made = [stage.name for stage in line.stages[: number + 1]]
        if faults := data.faults(made) + row_faults(config):
            raise FaultsError(faults)
    if is_new and (faults := base_faults(folder)):
        raise FaultsError(faults)
    run_stages(line, first=prepared)
    scores = report(config, line)
    path = Path(config.out) / "scores.json"
    path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}, {config.out}/angles/report.json", flush=True)
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="skillvec.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("config", help=f"YAML file (docs/past.md), or one of {', '.join(SHIPPED)}")
    parser.add_argument("--out", help="instead of the configuration's `out`")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check, and print the stages")
    what.add_argument("--show", action="store_true", help="print the configuration, to copy it")
    options = parser.parse_args(arguments)
    path = find_config(options.config)
    try:
        config = read_config(path, {"out": options.out} if options.out else None)
        if options.show:
            print(path.read_text(encoding="utf-8"), end="")
        elif options.dry_run:
            line, _, faults = check(config)
            show_stages(line)
            if faults:
                raise FaultsError(faults)
        else:
            run(config)
    except FaultsError as error:
        print(f"\npast: {len(error.faults)} to mend:", file=sys.stderr)
        for fault in error.faults:
            print(f"- {fault}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"past: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        failed = shlex.join(error.cmd)
        print(f"past: stopped, exit code {error.returncode}: {failed}", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
