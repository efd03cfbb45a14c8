"""Stages of a pipeline: what each reads and makes, run once, resumed where they stopped.

Hides markers and processes. A finished stage leaves OUT/stages/NAME.json, written last: its
command, how long it took, digests of every file and stage that it read. A stage runs again when any
of that changed, or when what it makes is gone. A training stage that was cut goes on from its last
checkpoint; all others start anew. What a stage reads from an earlier one is known by its path.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skillvec.recipes.launch import RESUMABLE, launch_words

TRAINERS = ("skillvec.recipes.sft", "skillvec.recipes.grpo")


@dataclass(frozen=True)
class Stage:
    """One command and the one path that it makes.

    `words`: a module and its arguments, or "skillvec" and a command. `settings`: the configuration
    of a training stage. `reads`: paths and Hub ids that decide the result. `models`: the size of
    what is made, in copies of the model in fp32.
    """

    name: str
    output: Path
    words: tuple[str, ...]
    reads: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    models: float = 0.0


@dataclass
class Pipeline:
    """Stages below `out` in the order they run in; the methods add one and return its output."""

    out: Path
    base: str
    training: Mapping[str, Any] = field(default_factory=dict)
    launch: str | Sequence[str] = ()
    parameters: float | None = None
    processes: int | None = None
    allow_no_reward: bool = False
    stages: list[Stage] = field(default_factory=list)
    scores: dict[tuple[str, str], Path] = field(default_factory=dict)

    def add(self, name: str, words: Sequence[Any], reads: Sequence[Any], **more: Any) -> Path:
        """Add a stage that makes OUT/NAME, or more["output"]; ValueError for a second of a name."""
        if any(stage.name == name for stage in self.stages):
            raise ValueError(f"two stages are named {name}")
        output = more.pop("output", self.out / name)
        self.stages.append(Stage(name, output, (*map(str, words),), (*map(str, reads),), **more))
        return output

    def module(
        self, name: str, module: str, options: Mapping[str, Any], output: Path | None = None
    ) -> Path:
        """Run `module --output OUTPUT --option value ...`; options name what it reads.

        skillvec.recipes.sft and skillvec.recipes.grpo take the options as their configuration.
        """
        output = output or self.out / name
        if module in TRAINERS:
            return self._train(name, module, options["model_name_or_path"], options, output)
        words = [module, "--output", output, *flags(options)]
        reads = [value for value in flags(options) if not value.startswith("--")]
        return self.add(name, words, reads, output=output)

    def sft(
        self,
        name: str,
        start: str | Path,
        steps: Sequence[Mapping[str, Any]],
        files: Sequence[str | Path],
    ) -> Path:
        """Fine-tune by recipes/sft.py, one step after the other; the last one makes OUT/NAME."""
        for number, (step, data) in enumerate(zip(steps, files, strict=True), 1):
            last = number == len(steps)
            at = name if last else f"{name}-step-{number}"
            start = self._train(at, "skillvec.recipes.sft", start, {**step, "data": str(data)})
        return Path(start)

    def rl(self, name: str, start: Path, settings: Mapping[str, Any], data: str | Path) -> Path:
        """Train by skillvec.recipes.grpo."""
        return self._train(name, "skillvec.recipes.grpo", start, {**settings, "data": str(data)})

    def _train(
        self,
        name: str,
        module: str,
        start: str | Path,
        settings: Mapping[str, Any],
        output: Path | None = None,
    ) -> Path:
        output = output or self.out / name
        whole = {**self.training, **settings}
        whole |= {"model_name_or_path": str(start), "output_dir": str(output)}
        config = self.out / "stages" / f"{flat(name)}.yaml"
        reads = (start, settings["data"])
        words = (module, "--config", config)
        return self.add(name, words, reads, settings=whole, models=1, output=output)

    def diff(self, name: str, tuned: Path, base: Path, method: str) -> Path:
        """Cut out tuned - base."""
        words = ("skillvec", "diff", tuned, base, "-o", self.out / name, "--method", method)
        return self.add(name, (*words, "--force"), (tuned, base), models=1)

    def apply(self, name: str, target: Path, vectors: Mapping[Path, float], *more: str) -> Path:
        """Add vectors, each with its lambda, to a model."""
        if len(vectors) == 1:
            ((vector, lam),) = vectors.items()
            given = [str(vector), "--lam", f"{lam:g}"]
        else:
            given = [f"{vector}={lam:g}" for vector, lam in vectors.items()]
        words = ("skillvec", "apply", target, *given, "-o", self.out / name, *more, "--force")
        return self.add(name, words, (target, *vectors), models=1)

    def control(self, name: str, vector: Path, kind: str, seed: int = 0) -> Path:
        """Make noise as large as the vector: recipes/controls.py."""
        options = ("--vector", vector, "--kind", kind, "--seed", seed)
        words = ("skillvec.recipes.controls", *options, "--output", self.out / name)
        return self.add(name, words, (vector,), models=1)

    def orthogonality(
        self, name: str, deltas: Sequence[str | Path], options: Mapping[str, Any]
    ) -> Path:
        """Compare deltas with each other."""
        words = ("skillvec", "orthogonality", *deltas, *flags(options), "-o", self.out / name)
        reads = [side for delta in deltas for side in str(delta).split("::")]
        return self.add(name, (*words, "--force"), reads)

    def evaluate(
        self, target: str, arm: str, model: str | Path, module: str, options: Mapping[str, Any]
    ) -> Path:
        """Score a model; the file is found under scores[target, arm]."""
        name = f"scores/{flat(target)}/{flat(arm)}.json"
        path = self.module(name, module, {"model": str(model), **options})
        self.scores[target, arm] = path
        return path


def flags(options: Mapping[str, Any]) -> list[str]:
    """Spell settings as options: lists become several words, true the bare flag, false nothing."""
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list | tuple) else [value])
    return words


def flat(name: str) -> str:
    return name.replace("/", "-").replace(", ", "_").replace(" ", "_")


# ---------------------------------------------------------------------------------- what is done


def digest_stage(line: Pipeline, stage: Stage, known: Mapping[str, str]) -> dict[str, str]:
    """Return what decides the stage's result: its command, and a digest of everything it reads."""
    found = {"command": _hash(json.dumps([stage.words, stage.settings], sort_keys=True))}
    for read in stage.reads:
        path = Path(read)
        if (of := _maker(line, stage, path)) is not None:
            found[read] = known[of.name]
        elif path.is_file():
            found[read] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            found[read] = _hash(json.dumps(seen))
    return found


def _maker(line: Pipeline, stage: Stage, path: Path) -> Stage | None:
    """Return the earlier stage that makes a path."""
    for earlier in line.stages:
        if earlier is stage:
            return None
        if path == earlier.output or earlier.output in path.parents:
            return earlier
    return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_marker(line: Pipeline, stage: Stage) -> dict[str, Any]:
    """Return what is recorded about a stage; nothing if there is no whole record."""
    try:
        read = json.loads(_marker(line, stage).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _marker(line: Pipeline, stage: Stage) -> Path:
    return line.out / "stages" / f"{flat(stage.name)}.json"


def _is_made(stage: Stage) -> bool:
    return stage.output.is_file() or (stage.output.is_dir() and any(stage.output.iterdir()))


def states(line: Pipeline) -> list[tuple[Stage, str]]:
    """Return every stage with "done", "begun" or "to do"."""
    known: dict[str, str] = {}
    return [(stage, _state(line, stage, known)[1]) for stage in line.stages]


def _state(line: Pipeline, stage: Stage, known: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return the stage's digests and state; `known` are the earlier stages', this one is added."""
    digests = digest_stage(line, stage, known)
    known[stage.name] = _hash(json.dumps(digests, sort_keys=True))
    marker = read_marker(line, stage)
    if marker.get("digests") != digests or not _is_made(stage):
        return digests, "to do"
    return digests, "done" if marker.get("finished") else "begun"


def run_stages(line: Pipeline, first: int = 0, last: int | None = None) -> None:
    """Run what is not done of the stages first..last, in order.

    Raises subprocess.CalledProcessError with the exit code of a command that failed, ValueError for
    an output that is there and that no stage of this pipeline made.
    """
    known: dict[str, str] = {}
    for number, stage in enumerate(line.stages[:last], 1):
        digests, state = _state(line, stage, known)
        if number <= first:
            continue
        title = f"[{number}/{len(line.stages)}] {stage.name}"
        if state == "done":
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}\n$ {spell(line, stage)}", flush=True)
        _begin(line, stage, digests, state == "begun")
        start = time.perf_counter()
        _run(line, stage)
        seconds = time.perf_counter() - start
        _record(line, stage, digests, finished=True, seconds=round(seconds, 1))


def _begin(line: Pipeline, stage: Stage, digests: Mapping[str, str], goes_on: bool) -> None:
    trains = stage.settings is not None
    if not (goes_on and trains) and _is_made(stage):
        if not _marker(line, stage).exists():
            raise ValueError(
                f"{stage.output}: exists and was not made by this pipeline; move it away, or let"
                f" {stage.name} make another path"
            )
        shutil.rmtree(stage.output) if stage.output.is_dir() else stage.output.unlink()
    _record(line, stage, digests, finished=False)
    if stage.settings is not None:
        whole = _as_run(line, stage)
        if goes_on and (last := last_checkpoint(stage.output)) is not None:
            whole["resume_from_checkpoint"] = str(last)
        Path(stage.words[-1]).write_text(yaml.safe_dump(whole), encoding="utf-8")


def _as_run(line: Pipeline, stage: Stage) -> dict[str, Any]:
    """Return the settings of a training with those that say how it runs and not what it makes.

    They are in no digest: a training that was made on one GPU is not made again on eight. Whoever
    says when to save says all of it.
    """
    whole = dict(stage.settings or {})
    if line.launch and not any(name.startswith("save_") for name in whole):
        whole |= RESUMABLE
    if line.allow_no_reward and "rewards" in whole:
        whole["allow_no_reward"] = True
    return whole


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint-N of a Trainer that is whole: its state is written last."""
    found = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _record(line: Pipeline, stage: Stage, digests: Mapping[str, str], **more: Any) -> None:
    marker = _marker(line, stage)
    marker.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: value for key, value in asdict(stage).items() if key != "output"}
    whole |= {"output": str(stage.output), "digests": digests, **more}
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    partial.replace(marker)


def command(line: Pipeline, stage: Stage) -> list[str]:
    """Return the words of the stage's own process."""
    if stage.settings is not None and line.launch:
        return [*launch_words(line.launch, line.processes), "-m", *stage.words]
    return [sys.executable, "-m", *stage.words]


def spell(line: Pipeline, stage: Stage) -> str:
    """Spell the command as a user would type it."""
    words = command(line, stage)
    if stage.words[0] == "skillvec":
        return shlex.join(stage.words)
    return shlex.join(["python" if word == sys.executable else word for word in words])


def _run(line: Pipeline, stage: Stage) -> None:
    words = command(line, stage)
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    if line.launch or stage.words[0] == "skillvec":
        subprocess.run(words, check=True)
        return
    # one process for all: importing TRL again for every stage would take longer than a small one
    if code := importlib.import_module(stage.words[0]).main(list(stage.words[1:])):
        raise subprocess.CalledProcessError(code, words)
    if stage.settings is not None:
        gc.collect()  # the trainer holds its model in cycles


# ---------------------------------------------------------------------------------- a dry run


def show_stages(line: Pipeline) -> None:
    """Print every stage with what it reads, the size of what it makes at most, and its state."""
    from rich.console import Console
    from rich.table import Table

    from skillvec.analysis.wording import human_bytes

    nbytes = model_nbytes(line)
    table = Table(title=f"{line.out}: {len(line.stages)} stages", title_justify="left", box=None)
    table.add_column("state", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("makes", overflow="fold")
    table.add_column("from", overflow="fold", style="dim")
    missing = 0
    for stage, state in states(line):
        size = "" if not stage.models else "?" if nbytes is None else human_bytes(nbytes)
        sources = [_short(line, read) for read in stage.reads if Path(read).suffix or "/" in read]
        table.add_row(state, size, _short(line, stage.output), ", ".join(dict.fromkeys(sources)))
        missing += (state != "done") * bool(stage.models)
    console = Console()
    console.print(table)
    free = shutil.disk_usage(_existing(line.out)).free
    if nbytes is None:
        console.print(
            "sizes: unknown until the base model is on disk; `parameters` says them before"
        )
        return
    need = missing * nbytes
    console.print(
        f"to do: at most {human_bytes(need)} in fp32 besides training checkpoints;"
        f" free here: {human_bytes(free)}" + (" - NOT ENOUGH" if need > free else "")
    )


def model_nbytes(line: Pipeline) -> float | None:
    """Return the size of the base model in fp32: from its headers, else from `parameters`."""
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.errors import SkillvecError

    with contextlib.suppress(SkillvecError):  # not there yet, or a Hub id
        return 4.0 * sum(spec.numel for spec in open_checkpoint(line.base, "base").values())
    return None if line.parameters is None else 4.0 * line.parameters


def _short(line: Pipeline, path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(line.out) if path.is_relative_to(line.out) else path)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
