"""Progress of a training run: a bar in a terminal, a plain line now and then elsewhere.

Hides where standard output goes. Both forms show steps, the stage's metric and the time left; both
end with one line that stays.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PLAIN_LINES = 4


class TrainingProgress(TrainerCallback):
    """Show the steps of one training run and the latest value of one logged metric."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._latest = ""
        self._start = 0.0
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start = time.perf_counter()
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[latest]}"),
                TimeRemainingColumn(),
                transient=True,
            )
            self._bar.add_task("training", total=state.max_steps, latest="")
            self._bar.start()
        else:
            _say(f"  {state.max_steps} steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # values arrive as numbers or as formatted text, by transformers version
        if logs and self._metric in logs:
            self._latest = f"{self._metric} {float(logs[self._metric]):.2f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done, total = state.global_step, state.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, latest=self._latest)
        elif done < total and done % max(1, total // _PLAIN_LINES) == 0:
            left = (time.perf_counter() - self._start) / done * (total - done)
            _say(f"  {done}/{total} steps  {self._latest}  about {left:.0f} s left")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        seconds = time.perf_counter() - self._start
        _say(f"  {state.global_step} steps in {seconds:.0f} s  {self._latest}")


def _say(line: str) -> None:
    print(line, flush=True)  # at once, in order with the output of subprocesses
