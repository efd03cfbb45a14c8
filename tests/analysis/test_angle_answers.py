"""The answer of a report: one plain sentence, and the few numbers that carry it."""

from typing import Any

import pytest

from skillvec.analysis.angle_answers import (
    in_letters,
    letter_of,
    letter_pairs,
    list_headlines,
    say_answer,
    say_relation,
)
from skillvec.analysis.statistics_table import VECTORS

NULLS = ("groups", "rows", "channels", "rotation")


def row(cosine: float | None, z: float | None, p: float = 1e-9, **more: Any) -> dict[str, Any]:
    """Return the numbers of a pair, alike by every null."""
    sd = abs(cosine / z) if cosine and z else 0.001
    return {"cosine": cosine, "z": z, "p": p, "cosine_sd": sd} | {f"z_{n}": z for n in NULLS} | more


def facts(*rows: dict[str, Any], count: int = 2) -> dict[str, Any]:
    return {"vectors": ["v"] * count, "pairs": [{"overall": one} for one in rows]}


@pytest.mark.parametrize(("one", "said"), [
    (row(0.0213, 12.0), "A and B are nearly orthogonal, but not unrelated: their cosine is"
     " +0.0213, where chance alone gives ±0.0035."),
    (row(0.3, 99.0), "A and B are partly aligned: their cosine is +0.3, where chance alone gives"
     " ±0.0059."),
    (row(-0.7, -70.0), "A and B are opposed: their cosine is -0.7, where chance alone gives"
     " ±0.02."),
    (row(0.001, 0.5, 0.6), "A and B are no more alike than unrelated updates: their cosine is"
     " +0.001, where chance alone gives ±0.0039."),
    (row(0.003, 2.1, 0.04), "A and B are not clearly more alike than unrelated updates: their"
     " cosine is +0.003, where chance alone gives ±0.0028 in 19 of 20 cases."),
    (row(1.0, 1.5, 0.2), "A and B are no more alike than unrelated updates: their cosine is +1,"
     " where chance alone gives ±1."),
    (row(0.5, None), "The cosine of A and B is +0.5, and nothing can judge it: squares leave"
     " fp64."),
    (row(None, None), "The cosine of A and B has no value: squares leave fp64."),
    (row(None, 3.0), "The cosine of A and B has no value: squares leave fp64."),
    (row(None, None, norm_a=1.0, norm_b=0.0), "There is no angle between A and B: B is zero."),
    (row(None, None, norm_a=0.0, norm_b=0.0),
     "There is no angle between A and B: A and B are zero."),
    (row(0.0, None, jaccard=0.0),
     "A and B are exactly orthogonal: no weight is changed by both of them."),
])  # fmt: skip
def test_a_pair_in_a_sentence(one: dict[str, Any], said: str) -> None:
    assert say_answer(facts(one)) == said


def test_related_is_what_every_null_says() -> None:
    assert say_relation(row(0.02, 9.0)) == "nearly orthogonal"
    assert say_relation(row(0.02, 9.0) | {"z_rotation": 1.9}) == "as by chance"
    assert say_relation(row(-0.2, -9.0)) == "partly opposed"
    assert say_relation(row(None, None)) == "not known"
    assert say_relation(row(None, None, norm_a=0.0)) == "one is zero"
    assert say_relation(row(0.0, None, jaccard=0.0)) == "nothing in common"


def test_several_pairs_in_a_sentence() -> None:
    chance, weak, strong = row(0.001, 0.5, 0.6), row(0.02, 9.0), row(-0.6, -99.0)
    said = [say_answer(facts(*rows, count=3)) for rows in
            ((chance, chance, chance), (chance, weak, chance), (weak, chance, strong),
             (weak, strong, weak))]  # fmt: skip
    assert said == [
        "None of the 3 pairs is more alike than unrelated updates.",
        "One of 3 pairs is related by more than chance: A and C (cosine +0.02).",
        "2 of 3 pairs are related by more than chance: B and C (cosine -0.6), A and B (cosine"
        " +0.02).",
        "All 3 pairs are related by more than chance: A and C (cosine -0.6), A and B (cosine"
        " +0.02), B and C (cosine +0.02).",
    ]
    zero, apart = row(None, None, norm_b=0.0), row(0.0, None, jaccard=0.0)
    assert say_answer(facts(weak, zero, zero, count=3)) == (
        "One of 3 pairs is related by more than chance: A and B (cosine +0.02); 2 cannot be"
        " judged, as a vector is zero."
    )
    assert say_answer(facts(chance, apart, zero, count=3)).endswith(
        "unrelated updates; 2 cannot be judged, as no weight is changed by both or a vector is"
        " zero."
    )
    assert say_answer(facts(zero, zero, apart, count=3)) == (
        "None of the 3 pairs can be judged: a vector is zero or no weight is changed by both."
    )
    many = say_answer(facts(*[weak] * 6, count=4))
    assert many.startswith("All 6 pairs") and many.endswith("(cosine +0.02) and 3 more.")


def vector(**more: Any) -> dict[str, Any]:
    overall = {"numel": 1_240_000, "norm": 6.5, "density": 0.14, "rms": 2e-5} | more
    kinds = [{"name": "mlp.up_proj.weight", "rms": 2e-5}, {"name": "norm.weight", "rms": 9e-6}]
    layers = [{"name": "m.layers.0", "rms": 1e-5}, {"name": "m.layers.7", "rms": 3e-5},
              {"name": "(no layer)", "rms": 1.0}]  # fmt: skip
    return {"vectors": ["v"], "pairs": [], "norms": [{"overall": overall, "kinds": kinds,
                                                      "layers": layers}]}  # fmt: skip


def test_a_vector_in_a_sentence() -> None:
    most = "most per value in mlp.up_proj and in m.layers.7."
    assert say_answer(vector()) == f"A changes 14 % of its 1.24 M values, {most}"
    assert say_answer(vector(density=None)) == (
        f"A is an update of 1.24 M values with a norm of 6.5, {most}"
    )
    assert say_answer(vector(norm=0.0)) == "A is zero: it changes none of its 1.24 M values."
    alone = vector()
    alone["norms"][0] |= {"kinds": [{"name": "w", "rms": 1.0}], "layers": []}
    assert say_answer(alone) == "A changes 14 % of its 1.24 M values."


def test_few_numbers_and_what_to_hold_them_against() -> None:
    one = row(0.0213, 12.0, norm_ratio=0.1, lift=1.5, lift_weights=1.1, a_in_b=0.3, in_chance=0.01)
    (found,) = list_headlines([one])
    assert [(h.number.key, h.value, h.beside) for h in found] == [
        ("cosine", "+0.0213", "chance ±0.0035"), ("z", "+12.0", "p 1e-09"),
        ("norm_ratio", "0.1", ""), ("lift_weights", "1.1", "chance 1"),
        ("a_in_b", "30 %", "chance 1 %"),
    ]  # fmt: skip
    (bare,) = list_headlines([one | {"lift_weights": None, "a_in_b": None}])
    assert [h.number.key for h in bare] == ["cosine", "z", "norm_ratio", "lift"]
    (of_vector,) = list_headlines([vector()["norms"][0]["overall"]], VECTORS)
    assert [h.number.key for h in of_vector] == ["norm", "rms", "density"]


def test_letters() -> None:
    assert [letter_of(i) for i in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]
    assert letter_pairs(3) == [("A", "B"), ("A", "C"), ("B", "C")]
    assert in_letters("A on B's support; norm A, AB", ("B", "D")) == "B on D's support; norm B, AB"
