"""Controls for a skill vector: noise of its size, or its own values in other places.

What such a vector does to a model is what any change of that size does: a skill has to do better.
Both are operators, so they go through the engine block by block, and a seed gives the same bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_intdigest

from skillvec.errors import UsageError

Values = npt.NDArray[np.floating[Any]]


class Noise:
    """Gaussian noise with the norm of the vectors' linear combination, tensor by tensor."""

    name = "random_control"

    def passes(self, parameters: Any) -> int:
        return 1

    def scope(self, parameters: Any) -> str:
        return "tensor"

    def measure(
        self, number: int, values: Any, weights: Any, parameters: Any, place: Any, known: Any
    ) -> npt.NDArray[np.float64]:
        """Return the sum of squares and the number of values, two float64."""
        block = _sum(values, weights)
        return np.array([np.dot(block, block), block.size])

    def settle(self, number: int, total: Any, weights: Any, parameters: Any, known: Any) -> float:
        """Return the root of the mean square."""
        return float(np.sqrt(total[0] / max(total[1], 1)))

    def combine(self, values: Any, weights: Any, parameters: Any, place: Any, known: Any) -> Values:
        noise = _generator(place).standard_normal(values[0].size)
        made: Values = (known * noise).astype(np.result_type(*values))
        return made


class Shuffle(Noise):
    """The combination's own values in random order, tensor by tensor, above 2**20 block by block.

    Nothing is measured for it.
    """

    name = "shuffled_control"

    def passes(self, parameters: Any) -> int:
        return 0

    def combine(self, values: Any, weights: Any, parameters: Any, place: Any, known: Any) -> Values:
        shuffled = _generator(place).permutation(_sum(values, weights))
        made: Values = shuffled.astype(np.result_type(*values))
        return made


def _sum(values: Any, weights: Any) -> npt.NDArray[np.float64]:
    """Return the vectors' linear combination."""
    total: npt.NDArray[np.float64] = weights[0] * values[0].astype(np.float64)
    for weight, block in zip(weights[1:], values[1:], strict=True):
        total += weight * block
    return total


def _generator(place: Any) -> np.random.Generator:
    key = f"{place.seed} {place.streams} {place.name} {place.begin}"
    return np.random.default_rng(xxh3_128_intdigest(key.encode()))


CONTROLS: dict[str, type[Noise]] = {"random": Noise, "shuffled": Shuffle}


def read_controls(words: str | Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of controls that are asked for, each once: words, or lists with commas."""
    given = [words] if isinstance(words, str) else words
    kinds = dict.fromkeys(kind.strip() for word in given for kind in word.split(",") if word)
    for kind in kinds:
        if kind not in CONTROLS:
            raise UsageError(f"control {kind!r}: expected {' or '.join(CONTROLS)}")
    return tuple(kinds)
