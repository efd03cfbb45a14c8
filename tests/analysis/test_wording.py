"""Sizes, counts and names in words."""

import pytest

from skillvec.analysis import wording


@pytest.mark.parametrize(("nbytes", "said"), [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.5e9, "1.5 GB"), (999.4e9, "999 GB"),
    (1e12, "1 TB"), (1e15, "1e+03 TB"),
])  # fmt: skip
def test_bytes_are_said_in_decimal_units(nbytes: float, said: str) -> None:
    assert wording.human_bytes(nbytes) == said


@pytest.mark.parametrize(("count", "said"), [
    (999, "999"), (1000, "1 K"), (1.236e9, "1.24 B"), (1e12, "1 T"),
])  # fmt: skip
def test_counts_of_values_have_a_letter(count: float, said: str) -> None:
    assert wording.human_count(count) == said


def test_three_names_are_said_and_how_many_more() -> None:
    assert wording.name_some(["a", "b", "c"]) == "a, b, c"
    assert wording.name_some(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert wording.count_files(["a"]) == "1 file"
    assert wording.count_files([], "weight ") == "0 weight files"
    assert wording.write_optional(None) == "-" and wording.write_optional(0.5) == "0.5000"
