"""`make real`: the claims of the paper on a real model, SmolLM2-135M, on a CPU.

python -m skillvec.recipes.real [--seeds 0 1 2] [--jobs 2] [--quick] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from skillvec.recipes.real.seed import DOMAINS, PARTS, plan_seed, read_settings
from skillvec.recipes.stages import run_stages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--one", type=int, metavar="SEED", help="run one seed in this process")
    given = parser.parse_args(arguments)
    settings = read_settings({"parts": given.parts, "domains": given.domains})
    os.environ.update(settings.environment)
    run_stages(plan_seed(given.out / f"seed-{given.one}", given.one, settings))
    return 0
