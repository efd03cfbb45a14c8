"""Stages of a pipeline: what each reads and makes, run once, resumed where they stopped.

Hides markers and processes. A finished stage leaves OUT/stages/NAME.json, written last: its
command, how long it took, digests of all that it read and of every file that it made. A stage runs
again when its command or a byte of what it reads changed, or when a file that it made is gone. What
was changed after it was made is never overwritten: it is kept, and what reads it runs again. A
training stage that was cut goes on from its last checkpoint; all others start anew. A skill that is
zero everywhere stops the pipeline.
"""

from __future__ import annotations

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

from skillvec.recipes.alone import alone_in
from skillvec.recipes.contents import Contents
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
    contents: Contents = field(init=False)

    def __post_init__(self) -> None:
        self.contents = Contents(self.out / "stages" / "contents.json")

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


def digest_stage(line: Pipeline, stage: Stage) -> dict[str, str]:
    """Return what decides the stage's result: digests of its command and of all that it reads."""
    found = {"command": _hash(json.dumps([stage.words, stage.settings], sort_keys=True))}
    for read in stage.reads:
        if (digest := line.contents.digest(Path(read), _apart(line, read))) is not None:
            found[read] = digest
    return found


def maker(line: Pipeline, stage: Stage | None, path: str | Path) -> Stage | None:
    """Return the stage that makes a path: one before `stage`, or any."""
    path = Path(path)
    for earlier in line.stages:
        if earlier is stage:
            return None
        if path == earlier.output or earlier.output in path.parents:
            return earlier
    return None


def _files_made(line: Pipeline, stage: Stage) -> dict[str, str]:
    return line.contents.files(stage.output, _apart(line, stage.output))


def _apart(line: Pipeline, path: str | Path) -> set[Path]:
    """Return what lies below a path and is made by some stage of its own."""
    return {other.output for other in line.stages if other.output != Path(path)} | {
        line.out / "stages"
    }


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


def states(line: Pipeline) -> list[tuple[Stage, str, list[str]]]:
    """Return every stage with "done", "begun" or "to do", and its files that were changed since.

    What reads from a stage that is not done is not done either.
    """
    found: dict[str, tuple[Stage, str, list[str]]] = {}
    for stage in line.stages:
        made_by = [maker(line, stage, read) for read in stage.reads]
        if all(earlier is None or found[earlier.name][1] == "done" for earlier in made_by):
            state, changed = _state(line, stage)
        else:
            state, changed = "to do", []
        found[stage.name] = stage, state, changed
    return list(found.values())


def _state(line: Pipeline, stage: Stage) -> tuple[str, list[str]]:
    """Return the stage's state, and the files that were changed after it made them."""
    marker = read_marker(line, stage)
    same = bool(marker) and marker.get("digests") == digest_stage(line, stage)
    if not marker.get("finished"):
        return "begun" if same and _is_made(stage) else "to do", []
    if "made" not in marker or not _is_made(stage):
        return "to do", []
    made, now = marker["made"], _files_made(line, stage)
    changed = [name for name, digest in now.items() if made.get(name) != digest]
    return "done" if same and made.keys() <= now.keys() else "to do", changed


def is_of_earlier_version(line: Pipeline, stage: Stage) -> bool:
    """Say whether the record is of a version that did not record what was made."""
    marker = read_marker(line, stage)
    return bool(marker.get("finished")) and "made" not in marker


def run_stages(line: Pipeline, first: int = 0, last: int | None = None) -> None:
    """Run what is not done of the stages first..last, in order.

    Raises subprocess.CalledProcessError with the exit code of a command that failed, ValueError for
    an output that is there and that no stage of this pipeline made, or that was changed since, for
    a skill that is zero, and where another process runs stages of the same folder.
    """
    with alone_in(line.out / "stages"):
        for number, stage in enumerate(line.stages[first:last], first + 1):
            state, changed = _state(line, stage)
            title = f"[{number}/{len(line.stages)}] {stage.name}"
            if state == "done":
                print(f"{title}: done before", flush=True)
                if changed:
                    print(f"  {tell_changed(stage, changed)}", flush=True)
            else:
                print(f"{title}\n$ {spell(line, stage)}", flush=True)
                if is_of_earlier_version(line, stage):
                    print(
                        "  an earlier version of skillvec did not record what it made", flush=True
                    )
                digests = digest_stage(line, stage)
                _begin(line, stage, digests, state == "begun", changed)
                start = time.perf_counter()
                _run(line, stage)
                seconds = round(time.perf_counter() - start, 1)
                made = _files_made(line, stage)
                _record(line, stage, digests, finished=True, seconds=seconds, made=made)
            if stage.words[:2] == ("skillvec", "diff"):
                _refuse_zero(line, stage)


def tell_changed(stage: Stage, changed: Sequence[str]) -> str:
    """Say which files were changed by hand, and what that means."""
    return (
        f"{_shown(stage, changed)} changed after {stage.name} made it: the change is kept, and what"
        " reads it runs again"
    )


def _shown(stage: Stage, changed: Sequence[str]) -> str:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(str(stage.output / name) for name in changed[:3]) + more


def _refuse_zero(line: Pipeline, stage: Stage) -> None:
    """Raise ValueError for a vector without a value other than 0, unless the pipeline allows it."""
    import skillvec as sv

    deltas = sv.SkillVector.open(stage.output).manifest.get("tensors", {})
    if not line.allow_no_reward and not any(entry["changed"] for entry in deltas.values()):
        raise ValueError(
            f"{stage.output}: the skill is zero in every tensor: reinforcement learning changed no"
            ' weight, so there is nothing to inject. docs/past.md, "RL has no reward", says what'
            " says what to look at; `allow_no_reward: true` in `rl` goes on with it"
        )


def in_the_way(line: Pipeline, stage: Stage, changed: Sequence[str]) -> str | None:
    """Return why a stage may not make its output anew: what lies there is not of its making."""
    if not _is_made(stage):
        return None
    if not _marker(line, stage).exists():
        return (
            f"{stage.output}: exists and was not made by this pipeline; move it away, or let"
            f" {stage.name} make another path"
        )
    if changed:
        return (
            f"{stage.output}: {stage.name} has to run again, which would remove what was changed"
            f" after it: {_shown(stage, changed)}; move {stage.output} away, then run again"
        )
    return None


def _begin(
    line: Pipeline,
    stage: Stage,
    digests: Mapping[str, str],
    goes_on: bool,
    changed: Sequence[str],
) -> None:
    trains = stage.settings is not None
    if not (goes_on and trains) and _is_made(stage):
        if blocked := in_the_way(line, stage, changed):
            raise ValueError(blocked)
        shutil.rmtree(stage.output) if stage.output.is_dir() else stage.output.unlink()
    _record(line, stage, digests, finished=False)
    if stage.settings is not None:
        whole = as_run(line, stage)
        if goes_on and (last := last_checkpoint(stage.output)) is not None:
            whole["resume_from_checkpoint"] = str(last)
        Path(stage.words[-1]).write_text(yaml.safe_dump(whole), encoding="utf-8")


def as_run(line: Pipeline, stage: Stage) -> dict[str, Any]:
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
    line.contents.save()
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
