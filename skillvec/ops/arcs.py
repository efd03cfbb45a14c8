"""Two vectors on an arc: the angle between them, and the shares of both on the way (slerp).

Hides how sine and angle are computed: in decimals, rounded once, because the C libraries that
Python's math asks differ in their last bits. The same inputs give the same bytes on all machines.
"""

import math
from functools import lru_cache
from typing import Any

from skillvec.ops.merge_counts import Counts, exact_total


def find_angle(sums: Counts) -> list[float]:
    """Return cosine and sine between two vectors, nothing where |cosine| exceeds .9995 (slerp).

    `sums` are those of `gram`. With a vector of zeros the cosine is 0.
    """
    cosine, sine = _angle(sums)
    return [] if abs(cosine) > 0.9995 else [cosine, sine]


def find_small_angle(sums: Counts) -> list[float]:
    """Return cosine and sine between two vectors, nothing where the sine is at most 1e-8 (nuslerp).

    `sums` are those of `gram`. With a vector of zeros the cosine is 0.
    """
    cosine, sine = _angle(sums)
    return [] if sine <= 1e-8 else [cosine, sine]


def _angle(sums: Counts) -> tuple[float, float]:
    first, product, second = map(exact_total, sums)
    norms = first * second
    if not norms:
        return 0.0, 1.0
    square = min(product**2, norms)  # products of fp64 are rounded
    cosine, sine = math.sqrt(square / norms), math.sqrt((norms - square) / norms)
    return (-cosine if product < 0 else cosine), sine


@lru_cache(maxsize=1024)  # asked for every piece
def arc_shares(weights: tuple[float, ...], angle: tuple[float, ...]) -> tuple[float, float]:
    """Return sin(s_i angle) / sin(angle) with s_i = w_i / (w_0 + w_1), without an angle s_i.

    `angle` is its cosine and sine. Weights of 0 give 0.
    """
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 100
        one, other = map(Decimal, weights)
        if not (total := one + other):
            return 0.0, 0.0
        shares = [one / total, other / total]
        if angle:
            whole = _find_arc(*map(Decimal, angle))
            turn = 2 * _find_arc(Decimal(-1), Decimal(0))
            sines = [_sine_cosine(share * whole % turn)[0] for share in shares]
            shares = [sine / _sine_cosine(whole)[0] for sine in sines]
        return float(shares[0]), float(shares[1])


def _find_arc(cosine: Any, sine: Any) -> Any:
    """Return the angle from 0 to pi, by steps from what math finds, each three times as exact."""
    arc = type(sine)(math.atan2(sine, cosine))
    for _ in range(4):
        found = _sine_cosine(arc)
        arc += sine * found[1] - cosine * found[0]
    return arc


def _sine_cosine(arc: Any) -> tuple[Any, Any]:
    """Return sine and cosine by their series, to 1e-60."""
    power, term = 0, arc * 0 + 1
    sine, cosine = arc * 0, term
    while abs(term) > 1e-60:
        power += 2
        sine += term * arc / (power - 1)
        term *= -arc * arc / (power * (power - 1))
        cosine += term
    return sine, cosine
