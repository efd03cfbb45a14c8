"""Lambdas as people write them."""

from typing import Any

import numpy as np
import pytest
import torch

from skillvec.errors import UsageError
from skillvec.trials.lambdas import read_lambdas


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("0:0.5:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5]),  # .3 is no .30000000000000004
        ("2:-1:-0.5", [-1, -0.5, 0, 0.5, 1, 1.5, 2]),
        ("-1, 0, .5,1", [-1, 0, 0.5, 1]),
        (["1:2:0.5", "1e-3", "-0.0", "2"], [0, 0.001, 1, 1.5, 2]),
        ([0.5, -1], [-1, 0, 0.5]),
        (1.5, [0, 1.5]),
        ("1:1:1", [0, 1]),
    ],
)
def test_lists_and_ranges(said: Any, meant: list[float]) -> None:
    assert read_lambdas(said) == meant


def test_the_range_of_the_docs_has_thirteen_points_and_both_ends() -> None:
    found = read_lambdas("-1:2:0.25")
    assert (len(found), found[0], found[-1], found[4]) == (13, -1, 2, 0)
    assert str(read_lambdas("-0")) == "[0.0]"


def test_arrays_of_numbers_are_lambdas() -> None:
    for given in (np.linspace(0, 1, 3), torch.tensor([0.5, 1.0]), (0.5, "1"), range(2)):
        assert read_lambdas(given)[-1] == 1.0
    assert read_lambdas(torch.tensor(0.5)) == read_lambdas(np.float32(0.5)) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "lam '': expected a number that fp32 can hold, or a range"),
        ("1:2", "lam '1:2': expected"),
        ("a", "lam 'a': expected"),
        ("nan", "lam 'nan': expected"),
        ("1e400", "lam '1e400': expected"),
        ("1_0", "lam '1_0': expected"),
        ("0:inf:1", "lam '0:inf:1': expected"),
        ("0:1:0", "lam 0:1:0: steps of 0 do not lead from 0 to 1"),
        ("0:1:-0.1", "lam 0:1:-0.1: steps of -0.1 do not lead"),
        ("-1:2:0.4", "lam -1:2:0.4: steps of 0.4 from -1 meet 1.8, but not 2"),
        ("0:1:1e-9", "lam 0:1:1e-9: more than 1000 lambdas"),
        ("0:1:0.001,2:3:0.01", "lam: 1102 lambdas; at most 1000"),
        (None, "lam 'None': expected"),
        ([], "lam: expected at least one lambda"),
    ],
)
def test_what_is_no_lambda_is_refused(said: Any, why: str) -> None:
    with pytest.raises(UsageError) as error:
        read_lambdas(said)
    assert str(error.value).startswith(why)
