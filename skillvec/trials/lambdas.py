"""Lambdas as people write them: lists and ranges, in exact decimals."""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation

from skillvec.errors import UsageError

FP32_MAX = Decimal("3.4028234e38")
MOST = 1000  # points of one sweep: more are a slip of the pen


def read_lambdas(lam: str | float | Sequence[float | str]) -> list[float]:
    """Return lambdas in rising order, each once, with 0 among them.

    Words are numbers and ranges START:STOP:STEP with both ends, separated by commas: -1:2:0.25 has
    13 points, and none is .30000000000000004. Raises UsageError for what is none of these.
    """
    plain = lam.tolist() if hasattr(lam, "tolist") else lam  # numpy's and torch's
    given = [*plain] if isinstance(plain, Iterable) and not isinstance(plain, str) else [plain]
    words = [word for one in given for word in str(one).split(",")]
    found = {float(number) for word in words for number in _read_word(word.strip())}
    if not found:
        raise UsageError("lam: expected at least one lambda, found none")
    if len(found) > MOST:
        raise UsageError(f"lam: {len(found)} lambdas; at most {MOST} are taken")
    return sorted({0.0} | {number + 0.0 for number in found})  # -0 is 0


def _read_word(word: str) -> Iterator[Decimal]:
    """Yield the numbers of one word."""
    try:
        numbers = [Decimal(part) for part in word.split(":")]
        plain = word.isascii() and "_" not in word  # Decimal takes more than people write
        if len(numbers) not in (1, 3) or not plain or not all(abs(n) <= FP32_MAX for n in numbers):
            raise InvalidOperation
    except InvalidOperation:
        raise UsageError(
            f"lam {word!r:.60}: expected a number that fp32 can hold, or a range START:STOP:STEP"
            " such as -1:2:0.25"
        ) from None
    if len(numbers) == 1:
        yield numbers[0]
        return
    start, stop, step = numbers
    if not step or (count := (stop - start) / step) < 0:
        raise UsageError(f"lam {word}: steps of {step} do not lead from {start} to {stop}")
    if count > MOST:
        raise UsageError(f"lam {word}: more than {MOST} lambdas")
    if count != int(count):
        last = start + int(count) * step
        raise UsageError(f"lam {word}: steps of {step} from {start} meet {last}, but not {stop}")
    for i in range(int(count) + 1):
        yield start + i * step
