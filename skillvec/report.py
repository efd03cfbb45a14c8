"""What happened, tensor by tensor: the one form in which every verb answers."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol, overload

Line = dict[str, Any]


class Shown:
    """What shows itself in one line, and in a notebook as a small table.

    The words are those of skillvec.verbs.reprs and skillvec.verbs.notebook, which are imported when
    somebody looks.
    """

    def __repr__(self) -> str:
        return str(sys.modules["skillvec"].write_repr(self))  # sugar: it knows the rooms above

    def _repr_html_(self) -> str:
        return str(sys.modules["skillvec"].write_html(self))


class Folded(Shown, dict[str, Any]):
    """A dict of many keys, such as a manifest: whole as data, one line where it is shown."""


@dataclass(repr=False)
class Report(Shown):
    """The answer of a verb.

    `facts` are its totals and statements, `ledger` has a line for every tensor of every input
    (name, status, dtype, shape and what was measured), `warnings` are sentences for the user. What
    holds for the moment of a plan alone, such as free room, is in `now`: two runs may differ in it.
    """

    verb: str
    facts: dict[str, Any] = field(default_factory=dict)
    ledger: list[Line] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    now: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        return dict(sorted(Counter(line["status"] for line in self.ledger).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but `now` as plain data; `--json` prints both.

        Numbers that are not finite, which JSON cannot hold, are None.
        """
        said: dict[str, Any] = _finite(
            {
                "verb": self.verb,
                **self.facts,
                "counts": self.counts,
                "warnings": self.warnings,
                "tensors": self.ledger,
            }
        )
        return said


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, Rows)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class Rows(Sequence[Line]):
    """Lines that are made when they are looked at: those of many tensors would fill the memory."""

    def __init__(self, count: int, make: Callable[[int], Line]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Line: ...
    @overload
    def __getitem__(self, at: slice) -> list[Line]: ...
    def __getitem__(self, at: int | slice) -> Line | list[Line]:
        found = range(self._count)[at]
        return self._make(found) if isinstance(found, int) else [*map(self._make, found)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Rows, list)) and [*self] == [*other]

    def __repr__(self) -> str:
        return f"<Rows: {len(self)} lines; list(rows) has them as dicts>"

    def __reduce__(self) -> Any:
        return list, ([*self],)


class Watcher(Protocol):
    """Follows a verb from outside: told of the plan once, then of the bytes read."""

    def planned(self, report: Report) -> None:
        """Take the plan, before any tensor is read."""

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Take the progress, about ten times a second."""


class TrialWatcher(Watcher, Protocol):
    """A Watcher that follows trials too: each takes as long as an evaluation."""

    def tried(self, line: str) -> None:
        """Take what came out of a trial, in a line."""
