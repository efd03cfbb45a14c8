"""The rows of an orthogonality or norms report as one table, and vectors that are told apart."""

import csv
import io
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import combinations, count
from typing import Any

from skillvec.analysis.angle_report import AngleReport, Levels, Row
from skillvec.analysis.statistics_table import PAIRS, VECTORS

SIDES = ("a", "b", "lineage_a", "lineage_b")
PLACES = ("level", "name", "layer", "kind", "module")
COLUMNS = {number.key for number in PAIRS + VECTORS} | {*SIDES, *PLACES}


def tell_apart(content: AngleReport) -> AngleReport:
    """Return a report in which labels that stand twice have a number, as of one vector twice.

    In a report pairs stand in the order of their vectors, which a table of rows has not.
    """
    labels: list[str] = []
    for label in content["vectors"]:
        tries = (f"{label} ({n})" if n > 1 else label for n in count(1))
        labels.append(next(name for name in tries if name not in labels))
    sides = combinations(labels, 2)  # none of norms
    found = content.copy()
    found["vectors"] = labels
    found["pairs"] = [
        {**pair, "a": a, "b": b} for pair, (a, b) in zip(content["pairs"], sides, strict=False)
    ]
    found["norms"] = [
        {**entry, "label": label} for entry, label in zip(content["norms"], labels, strict=True)
    ]
    return found


def csv_text(content: AngleReport) -> str:
    """Return every row of every level as CSV: pairs first, then vectors, with `b` empty.

    Columns are the numbers of `statistics_table`, in the order of report.json; lists are left out.
    """
    return table_text(list(_flat_rows(tell_apart(content))), COLUMNS)


def table_text(rows: Sequence[Mapping[str, Any]], kept: Container[str] | None = None) -> str:
    """Return rows as CSV, with the columns in the order in which they are first met.

    `kept` are the columns that are wanted, if not all are.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if kept is None or key in kept]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat_rows(content: AngleReport) -> Iterator[dict[str, Any]]:
    """Yield the rows of every level of every pair, then of every vector."""
    sets: list[tuple[Row, Levels]] = [
        ({"a": pair["a"], "b": pair["b"], "lineage_a": pair["lineage_a"],
          "lineage_b": pair["lineage_b"]}, pair)
        for pair in content["pairs"]
    ]  # fmt: skip
    sets += [
        ({"a": entry["label"], "b": "", "lineage_a": entry["lineage"], "lineage_b": ""}, entry)
        for entry in content["norms"]
    ]
    for sides, held in sets:
        levels = {"overall": [{"name": "overall"} | held["overall"]], "part": held["parts"],
                  "module": held["modules"], "kind": held["kinds"], "layer": held["layers"],
                  "tensor": held["tensors"]}  # fmt: skip
        for level, rows in levels.items():
            for row in rows:
                plain = {k: v for k, v in row.items() if not isinstance(v, list)}
                yield sides | {"level": level} | plain
