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
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_intdigest

import skillvec as sv

Values = npt.NDArray[np.floating[Any]]


class Noise:
    """Gaussian noise with the norm of the vector, tensor by tensor."""

    name = "random_control"

    def passes(self, parameters: Any) -> int:
        return 1

    def scope(self, parameters: Any) -> str:
        return "tensor"

    def measure(
        self, number: int, values: Any, weights: Any, parameters: Any, place: Any, known: Any
    ) -> npt.NDArray[np.float64]:
        """Return the sum of squares and the number of values, two float64."""
        block = values[0].astype(np.float64)
        return np.array([np.dot(block, block), block.size])

    def settle(self, number: int, total: Any, weights: Any, parameters: Any, known: Any) -> float:
        """Return the root of the mean square."""
        return float(np.sqrt(total[0] / max(total[1], 1)))

    def combine(self, values: Any, weights: Any, parameters: Any, place: Any, known: Any) -> Values:
        noise = _generator(place).standard_normal(values[0].size)
        return (weights[0] * known * noise).astype(values[0].dtype)


class Shuffle(Noise):
    """The vector's own values in random order, tensor by tensor; nothing is measured for it."""

    name = "shuffled_control"

    def passes(self, parameters: Any) -> int:
        return 0

    def combine(self, values: Any, weights: Any, parameters: Any, place: Any, known: Any) -> Values:
        shuffled = _generator(place).permutation(values[0])
        return (weights[0] * shuffled).astype(values[0].dtype)


def _generator(place: Any) -> np.random.Generator:
    key = f"{place.seed} {place.streams} {place.name} {place.begin}"
    return np.random.default_rng(xxh3_128_intdigest(key.encode()))


KINDS = {"random": Noise, "shuffled": Shuffle}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vector", required=True, type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True, type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    control = sv.combine(options.vector, op=KINDS[options.kind](), seed=options.seed)
    control.save(options.output, force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
