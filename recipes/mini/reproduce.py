"""`make reproduce`: every claim of the paper in miniature, over seeds, with controls.

    python -m skillvec.recipes.mini.reproduce [--seeds 8 9 10] [--jobs 2] [--size mini]

Every seed is a world, a base model and some 200 stages of its own (recipes/stages.py): the
training by recipes/sft.py and recipes/grpo.py, every difference, sum and angle by
the skillvec command line. What is finished is not run again. At the end recipes/mini/page.py writes
the page.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from skillvec.recipes.mini.seed import SETTINGS, plan_seed
from skillvec.recipes.past import read_config
from skillvec.recipes.stages import read_marker, run_stages

# settings, rules and margins were chosen while looking at seeds 0 to 7: others judge
SEEDS = (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)


# ---------------------------------------------------------------------------------- many seeds


def run_seeds(out: Path, seeds: Sequence[int], size: str, jobs: int) -> None:
    """Run seeds side by side, each in a process of its own with a log; show how far they are.

    Raises ValueError with the end of the log of a seed that failed.
    """
    waiting, running = list(seeds), {}
    start, shown = time.monotonic(), 0.0
    begun = _done(out, seeds, size)[0]
    while waiting or running:
        while waiting and len(running) < jobs:
            seed = waiting.pop(0)
            running[seed] = _start(out, seed, size)
        time.sleep(1)
        for seed, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[seed]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                log = (out / f"seed-{seed}" / "log.txt").read_text(errors="replace")
                raise ValueError(f"seed {seed} failed; the end of its log:\n{log[-2000:]}")
        if time.monotonic() - shown > 30 or not (waiting or running):
            shown = time.monotonic()
            done, whole, names = _done(out, seeds, size)
            minutes = (shown - start) / 60
            left = (whole - done) * minutes / max(done - begun, 1e-9)
            rest = f", about {left:.0f} min left" if done - begun > 0.03 * whole else ""
            print(f"{minutes:5.1f} min  {done / whole:4.0%}{rest}  {names}", flush=True)


def _start(out: Path, seed: int, size: str) -> subprocess.Popen[bytes]:
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    words = ("--one", str(seed), "--out", str(out), "--size", size)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "skillvec.recipes.mini.reproduce", *words],
            stdout=log,
            stderr=log,
        )


def _done(out: Path, seeds: Sequence[int], size: str) -> tuple[float, float, str]:
    """Return the work done, the whole work (a training counts as ten others), what is next."""
    done, whole, names = 0.0, 0.0, []
    for seed in seeds:
        line = plan_seed(out / f"seed-{seed}", seed, size)
        for stage in line.stages:
            weight = 1.0 if stage.settings is None else 10.0
            whole += weight
            marker = read_marker(line, stage)
            done += weight * bool(marker.get("finished"))
            if marker and not marker["finished"]:
                names.append(f"{seed}: {stage.name}")
    return done, whole, ", ".join(names)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="runs/reproduce, or runs/larger")
    parser.add_argument(
        "--page", type=Path, default=Path("docs/reproduction.md"), help="%(default)s"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="%(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side (%(default)s)")
    parser.add_argument("--size", default="mini", help="mini, or larger (where there is a GPU)")
    parser.add_argument("--one", type=int, metavar="SEED", help="run one seed in this process")
    options = parser.parse_args(arguments)
    if options.one is not None:
        os.environ.update(read_config(SETTINGS).environment)
        line = plan_seed(options.out / f"seed-{options.one}", options.one, options.size)
        run_stages(line)
        return 0
    out = options.out or Path("runs") / ("reproduce" if options.size == "mini" else "larger")
    from skillvec.recipes.mini.page import write_page
    from skillvec.recipes.mini.results import gather

    try:
        run_seeds(out, options.seeds, options.size, options.jobs)
        results = {options.size: gather(out, options.seeds, options.size)}
        if options.size == "larger":  # adds its row to the page of the miniature
            results["mini"] = gather(Path("runs/reproduce"), options.seeds, "mini")
    except ValueError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    write_page(results["mini"], results.get("larger"), options.seeds, options.page)
    print(f"written: {options.page}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
