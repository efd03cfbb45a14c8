"""PaST as a pipeline of stages (arXiv 2601.11258).

    python -m skillvec.recipes CONFIG.yaml [--dry-run]

SFT on part k of the source, RL from there plus the skill so far, v_k = theta_rl - theta_sft (K
rounds), SFT on each target without v, injection theta_sft_T + lambda * v, evaluation beside the
SFT-only control. docs/past.md walks through a configuration.

Hides running: recipes/stages.py keeps what is finished. Refuses unknown settings, parts of the
source that share a row, and RL questions that a target is evaluated on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skillvec.recipes.stages import Pipeline, flat, run_stages, show_stages
from skillvec.recipes.training import fetch_model


@dataclass(frozen=True)
class Config:
    """What a configuration file may say; every path is relative to the working directory.

    `base`: a folder or a Hub id. `launch`: words before `-m skillvec.recipes.sft ...`; none:
    all in one process. `prepare`: modules run first, {run, out, with: options}. `training`:
    arguments of every training stage (TRL's names). `sft`: its steps, in order. `rl`: its
    arguments. `source`: K parts, {sft: one file a step, rl: file}. `targets`: name ->
    {sft: files, evaluate: options}. `lam`: lambdas. `controls`: of random, shuffled.
    `evaluate`: {run, with}. `angles`: options of orthogonality. `environment`: variables of every
    stage. `parameters`: of the base, for sizes while it is not on disk.
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
    launch: list[str] = field(default_factory=list)
    lam: list[float] = field(default_factory=lambda: [1.0])
    controls: list[str] = field(default_factory=list)
    angles: dict[str, Any] = field(default_factory=lambda: {"control": "random"})
    environment: dict[str, str] = field(default_factory=dict)
    parameters: float | None = None


def read_config(path: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file; ValueError names what is missing, unknown or does not fit together."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected settings, one a line, as `name: value`")
    read |= changes or {}
    if unknown := sorted(read.keys() - Config.__dataclass_fields__.keys()):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}")
    try:
        config = Config(**read)
    except TypeError as error:  # names what is missing
        raise ValueError(f"{path}: {str(error).removeprefix('Config.__init__() ')}") from None
    steps = len(config.sft)
    given = [(f"source part {k}", part) for k, part in enumerate(config.source, 1)]
    if not given or not config.targets:
        raise ValueError(f"{path}: expected at least one part in source and one in targets")
    for name, part in [*given, *((f"target {key}", part) for key, part in config.targets.items())]:
        wanted = {"sft", "rl"} if name.startswith("source") else {"sft", "evaluate"}
        if set(part) != wanted or len(part["sft"]) != steps:
            raise ValueError(
                f"{path}: {name}: expected {' and '.join(sorted(wanted))}, with a list of"
                f" {steps} files in sft (one a step); found {part}"
            )
    return config


def plan(config: Config, base: str) -> Pipeline:
    """List the stages; `base` is the folder of the base model, or its Hub id for a dry run."""
    parameters = config.parameters and float(config.parameters)  # YAML reads 7e9 as text
    line = Pipeline(Path(config.out), base, config.training, config.launch, parameters)
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


def check_rows(config: Config) -> None:
    """Refuse a row that two parts of the source share, or that RL and an evaluation share.

    Looks at the files that are there; those that a stage makes are looked at when it has.
    """
    parts = [_rows([*part["sft"], part["rl"]], ()) for part in config.source]
    for (j, one), (k, other) in itertools.combinations(enumerate(parts, 1), 2):
        if shared := one & other:
            raise ValueError(
                f"source: parts {j} and {k} share {len(shared)} rows, first {min(shared)[:80]};"
                " the rounds of iterative refinement take disjoint parts"
            )
    rewarded = _rows([part["rl"] for part in config.source], ("prompt",))
    for name, target in config.targets.items():
        asked = [str(v) for v in target["evaluate"].values() if str(v).endswith(".jsonl")]
        if shared := rewarded & _rows(asked, ("prompt",)):
            raise ValueError(
                f"target {name}: {len(shared)} of its questions are in the source's RL data, first"
                f" {min(shared)[:80]}; a target is what RL never saw"
            )


def _rows(files: Sequence[str], columns: Sequence[str]) -> set[str]:
    rows: set[str] = set()
    for file in files:
        if not file.endswith(".jsonl") or not Path(file).is_file():
            continue
        with open(file, encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                try:
                    row = json.loads(text)
                    kept = {column: row[column] for column in columns or row}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, row {number}: {error!r}") from None
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


def run(config: Config) -> dict[str, Any]:
    """Run what is not finished, stage by stage; return {target: {arm: metrics}}."""
    os.environ.update({name: str(value) for name, value in config.environment.items()})
    check_rows(config)
    line = plan(config, find_base(config, fetch=True))
    prepared = len(config.prepare)
    run_stages(line, last=prepared)
    check_rows(config)
    run_stages(line, first=prepared)
    scores = report(config, line)
    path = Path(config.out) / "scores.json"
    path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}, {config.out}/angles/report.json", flush=True)
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file: docs/past.md")
    parser.add_argument("--out", help="instead of the configuration's `out`")
    parser.add_argument("--dry-run", action="store_true", help="print the stages with sizes")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, {"out": options.out} if options.out else None)
        if options.dry_run:
            check_rows(config)
            show_stages(plan(config, find_base(config, fetch=False)))
            return 0
        run(config)
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
