"""The answer of a verb."""

from dataclasses import replace
from math import inf, nan

from skillvec.report import Report


def test_what_holds_for_a_moment_alone_tells_no_reports_apart() -> None:
    report = Report("diff", {"norm": 1.0}, now={"nbytes_free": 1})
    assert report == replace(report, now={"nbytes_free": 2})
    assert report != replace(report, facts={"norm": 2.0})


def test_json_holds_no_number_that_is_not_finite() -> None:
    ledger = [{"name": "w", "status": "delta", "norm": nan}, {"name": "x", "status": "delta"}]
    said = Report("norms", {"norms": [{"z": inf, "p": 0.5}]}, ledger, now={"nbytes_free": 1})
    found = said.to_dict()
    assert found["norms"] == [{"z": None, "p": 0.5}] and found["tensors"][0]["norm"] is None
    assert found["counts"] == {"delta": 2} and "nbytes_free" not in found
