"""Controls for a skill vector: noise of its size, or its own values in other places.

    python -m skillvec.recipes.controls --vector V --kind random --output random.safetensors

What such a vector does to a model is what any change of that size does: a skill has to do better.
`random`: in every tensor Gaussian noise with the norm of the skill there. `shuffled`: the skill's
own values of every tensor, in random order (tensors above 2**20 values block by block). They go
through skillvec's engine as operators, so memory stays bounded, and a seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import skillvec as sv
from skillvec.trials.controls import CONTROLS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vector", required=True, type=Path)
    parser.add_argument("--kind", choices=CONTROLS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True, type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    control = sv.combine(options.vector, op=CONTROLS[options.kind](), seed=options.seed)
    control.save(options.output, force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
