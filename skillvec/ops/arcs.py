"""Two vectors on an arc: the angle between them, and the shares of both on the way (slerp).

Hides how sine and angle are computed: in decimals, rounded once, because the C libraries that
Python's math asks differ in their last bits. The same inputs give the same bytes on all machines.
"""

import math
from functools import lru_cache
from typing import Any

from skillvec.ops.merge_counts import Counts, exact_total


def find_angle(sums: Counts) -> list[float]:
    """Return cosine and sine between two vectors, nothing where |cosine| exceeds .9995 (slerp)."""
    angle = find_small_angle(sums)
    return angle if angle and abs(angle[0]) <= 0.9995 else []


def find_small_angle(sums: Counts) -> list[float]:
    """Return cosine and sine between two vectors, nothing where the sine is at most 1e-8 (nuslerp).

    `sums` are those of `gram`. With a vector of zeros the cosine is 0.
    """
    first, product, second = map(exact_total, sums)
    norms = first * second or 1
    square = min(product**2, norms)  # products of fp64 are rounded
    cosine, sine = math.sqrt(square / norms), math.sqrt((norms - square) / norms)
    return [-cosine if product < 0 else cosine, sine] if sine > 1e-8 else []


@lru_cache(maxsize=1024)  # asked for every piece
def arc_shares(weights: tuple[float, ...], angle: tuple[float, ...]) -> tuple[float, ...]:
    """Return sin(s_i angle) / sin(angle) with s_i = w_i / (w_0 + w_1), without an angle s_i.

    `angle` is its cosine and sine. Weights of 0 give 0.
    """
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 100
        one, other = map(Decimal, weights)
        shares = [one / (one + other), other / (one + other)] if one + other else [one, other]
        if angle and any(shares):
            arc, half = Decimal(math.atan2(*reversed(angle))), Decimal(math.pi)
            for _ in range(4):  # each time three times as exact
                arc += Decimal(angle[1]) * _turn(arc)[0] - Decimal(angle[0]) * _turn(arc)[1]
                half += _turn(half)[1]
            shares = [_turn(share * arc % (2 * half))[1] / _turn(arc)[1] for share in shares]
        return tuple(map(float, shares))


def _turn(arc: Any) -> tuple[Any, Any]:
    """Return cosine and sine of at most a whole turn, by their series, to 1e-60."""
    terms = [arc * 0 + 1]
    for power in range(1, 90):
        terms.append(terms[-1] * arc / power)
    return sum(terms[::4]) - sum(terms[2::4]), sum(terms[1::4]) - sum(terms[3::4])
