"""Pipelines of several seeds side by side, each in a process of its own, with its log.

Hides the processes. The cores of the machine are shared by the seeds that run at once. A seed that
fails stops the others, which go on from there the next time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from skillvec.recipes.stages import Pipeline, read_marker

Plan = Callable[[int], Pipeline]


def run_seeds(plan: Plan, seeds: Sequence[int], words: Sequence[str], jobs: int) -> None:
    """Run `python -m WORDS --one SEED` for every seed, `jobs` at once; show how far they are.

    Raises ValueError with the end of the log of a seed that failed, for a seed that is named twice,
    which would run twice in one folder and count as two, and for less than one job.
    """
    if len({*seeds}) < len(seeds) or jobs < 1:
        raise ValueError(f"seeds {' '.join(map(str, seeds))}, {jobs} at once: expected each once,"
                         " and at least one job")  # fmt: skip
    waiting, running = list(seeds), {}
    threads = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(seeds))))
    start, shown = time.monotonic(), 0.0
    begun = _count(plan, seeds)[0]
    while waiting or running:
        while waiting and len(running) < jobs:
            seed = waiting.pop(0)
            running[seed] = _start(plan(seed).out, [*words, "--one", str(seed)], threads)
        time.sleep(1)
        for seed, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[seed]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                log = (plan(seed).out / "log.txt").read_text(errors="replace")
                raise ValueError(f"seed {seed} failed; the end of its log:\n{log[-2000:]}")
        if time.monotonic() - shown > 30 or not (waiting or running):
            shown = time.monotonic()
            done, whole, names = _count(plan, seeds)
            minutes = (shown - start) / 60
            left = (whole - done) * minutes / max(done - begun, 1e-9)
            rest = f", about {left:.0f} min left" if done - begun > 0.03 * whole else ""
            print(f"{minutes:5.1f} min  {done / whole:4.0%}{rest}  {names}", flush=True)


def _start(folder: Path, words: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *words], stdout=log, stderr=log, env=environment
        )


def _count(plan: Plan, seeds: Sequence[int]) -> tuple[float, float, str]:
    """Return the work done, the whole work (a training counts as ten others), what is next."""
    done, whole, names = 0.0, 0.0, []
    for seed in seeds:
        line = plan(seed)
        for stage in line.stages:
            weight = 1.0 if stage.settings is None else 10.0
            whole += weight
            marker = read_marker(line, stage)
            done += weight * bool(marker.get("finished"))
            if marker and not marker["finished"]:
                names.append(f"{seed}: {stage.name}")
    return done, whole, ", ".join(names)
