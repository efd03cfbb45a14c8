"""The rows of a report as one table."""

import csv
import io
from typing import Any

from skillvec.analysis.report_csv import csv_text, tell_apart


def entry(number: float, **names: Any) -> dict[str, Any]:
    """Return a vector or a pair with one tensor and no groups."""
    row = {"numel": 4, "rms": number, "steps": [1, 2], "of_nobody": 1}
    tensor = {"name": "w", "layer": "", "kind": "w", "module": "w", **row}
    return {
        **names,
        "overall": row,
        "parts": [],
        "modules": [],
        "kinds": [],
        "layers": [],
        "tensors": [tensor],
    }


def report(*labels: str) -> Any:
    sides = {"lineage_a": "BF16", "lineage_b": "F32"}
    pairs = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
    return {
        "vectors": [*labels],
        "pairs": [entry(n / 2, a=a, b=b, **sides) for n, (a, b) in enumerate(pairs)],
        "norms": [entry(n, label=name, lineage="BF16") for n, name in enumerate(labels)],
    }


def test_labels_that_stand_twice_are_numbered_and_the_report_stays_as_it_was() -> None:
    given = report("v", "v", "v (2)", "v")
    found = tell_apart(given)
    assert found["vectors"] == ["v", "v (2)", "v (2) (2)", "v (3)"]
    assert [vector["label"] for vector in found["norms"]] == found["vectors"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]][:3] == [
        ("v", "v (2)"), ("v", "v (2) (2)"), ("v", "v (3)"),
    ]  # fmt: skip
    assert given == report("v", "v", "v (2)", "v")


def test_a_table_has_pairs_before_vectors_and_known_numbers_alone() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(report("one", "two")))))
    assert [(row["a"], row["b"], row["level"], row["name"]) for row in rows] == [
        ("one", "two", "overall", "overall"), ("one", "two", "tensor", "w"),
        ("one", "", "overall", "overall"), ("one", "", "tensor", "w"),
        ("two", "", "overall", "overall"), ("two", "", "tensor", "w"),
    ]  # fmt: skip
    assert [row["rms"] for row in rows] == ["0.0", "0.0", "0", "0", "1", "1"]
    assert rows[0]["lineage_b"] == "F32" and rows[2]["lineage_b"] == ""
    assert not {"steps", "of_nobody"} & set(rows[0])
