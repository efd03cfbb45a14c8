"""Heat maps: cells of layers and kinds, their shades, and their numbers in few characters."""

from typing import Any

import pytest

from skillvec.analysis.maps import Cell, HeatMap, list_pair_cells, list_vector_cells, make_map
from skillvec.analysis.statistics_table import PAIRS, VECTORS, pick

COSINE, Z = pick(PAIRS, "cosine", "z")
RMS, DENSITY = pick(VECTORS, "rms", "density")


def cell(value: float | None, layer: str = "m.layers.0", kind: str = "k", key: str = "") -> Cell:
    return Cell(
        layer, kind, [{"numel": 1}], dict.fromkeys(("cosine", "z", "rms", "density"), value)
    )


def texts(values: list[float | None], number: Any = COSINE, ramp: str = "diverging") -> list[Any]:
    """Return step and text of values, a layer each, and the unit."""
    made = make_map("m", number, ramp, [cell(v, f"l.{i}") for i, v in enumerate(values)])
    shades = [row[2][0] for stack in made.stacks for row in stack.layers]
    return [(s.step, s.text) for s in shades if s is not None] + [made.unit]


def test_shades_are_centred_at_zero_and_signed() -> None:
    assert texts([-0.3, -0.06, 0.0, 0.04, 0.3, None]) == [
        (0, "−30"), (4, "−6"), (5, "0"), (6, "4"), (10, "30"), (None, "–"), "hundredths",
    ]  # fmt: skip
    legend = make_map("m", COSINE, "diverging", [cell(-0.3)]).legend
    assert legend == [(0, "−0.3"), (5, "0"), (10, "0.3")]


def test_a_tower_leaves_shades_for_the_others() -> None:
    steps = [step for step, _ in texts([0.002, 0.002, -0.002, 0.9])[:-1]]
    assert steps[-1] == 10 and steps[0] > 5 and steps[2] < 5  # straight, all three would be 5


def test_sizes_rise_from_zero_and_by_powers_where_they_span_much() -> None:
    assert [step for step, _ in texts([0.0, 0.5, 1.0], RMS, "heatmap")[:-1]] == [0, 4, 8]
    steps = [step for step, _ in texts([0.0, 1e-6, 1e-4, 1e-2], RMS, "heatmap")[:-1]]
    assert steps == [0, 0, 4, 8]
    assert make_map("m", RMS, "heatmap", [cell(0.5), cell(1.0)]).legend == [(0, "0"), (8, "1")]


@pytest.mark.parametrize(("values", "said"), [
    ([0.021, 0.03, 0.0004], ["21", "30", "0", "thousandths"]),
    ([0.9, 0.95], ["90", "95", "hundredths"]),
    ([2.1e-5, 3e-5], ["21", "30", "millionths"]),
    ([2e-6, 3e-6], ["20", "30", "10⁻⁷"]),
    ([0.002, 0.003, 0.9], ["2", "3", "900", "thousandths"]),
    ([1e-7, 2e-7, 0.9], ["0", "0", "9000", "10⁻⁴"]),
    ([0.0], ["0", ""]),
])  # fmt: skip
def test_a_unit_leaves_a_usual_value_a_digit(values: list[float], said: list[str]) -> None:
    assert [one if isinstance(one, str) else one[1] for one in texts([*values])] == said


def test_z_is_whole_and_density_is_percent() -> None:
    assert texts([0.4, -12.4, 55.0], Z)[:3] == [(5, "0"), (4, "−12"), (10, "55")]
    assert texts([3e4, 1.0], Z)[0][1] == "3000" and texts([3e4, 1.0], Z)[-1] == "10¹"
    assert texts([0.14, 0.98], DENSITY, "heatmap")[-1] == "percent"
    assert texts([0.014], DENSITY, "heatmap")[:1] == [(8, "14")]


def named(made: HeatMap) -> list[Any]:
    return [
        (
            stack.name,
            stack.kinds,
            [(short, [s and s.text for s in row]) for _, short, row in stack.layers],
            stack.void,
        )
        for stack in made.stacks
    ]


def test_stacks_kinds_and_what_is_outside() -> None:
    cells = [
        cell(0.1, "t.layers.10", "q"), cell(0.2, "t.layers.9", "q"), cell(None, "t.layers.9", "n"),
        cell(0.3, "v.blocks.0", "q"), cell(0.3, "v.blocks.0", "w"), cell(0.4, "v.blocks.1", "w"),
        cell(0.5, "(no layer)", "lm_head"),
    ]  # fmt: skip
    made = make_map("m", COSINE, "diverging", cells)
    assert named(made) == [
        ("t.layers", ["q"], [("9", ["20"]), ("10", ["10"])], ["n"]),
        ("v.blocks", ["q", "w"], [("0", ["30", "30"]), ("1", [None, "40"])], []),
    ]
    assert [(kind, shade.text) for kind, shade in made.outside] == [("lm_head", "50")]


def row(name: str, layer: str, kind: str, numel: int, **numbers: Any) -> dict[str, Any]:
    return {"name": name, "layer": layer, "kind": kind, "numel": numel, **numbers}


def test_norms_whose_squares_leave_fp64_neither_overflow_nor_count_as_zero() -> None:
    known = {"cosine": 0.5, "cosine_sd": 0.25, "norm_a": 1e120, "norm_b": 2e120}
    beyond = known | {"norm_a": None, "norm": None}
    rows = [row("m.0.a", "m.0", "a", 4, **known, norm=1e153),
            row("m.0.b.0", "m.0", "b", 4, **known, norm=1e3),
            row("m.0.b.1", "m.0", "b", 4, **beyond)]  # fmt: skip
    one, other = list_pair_cells(rows)
    assert one.numbers["cosine"] == pytest.approx(0.5) and one.numbers["z"] == pytest.approx(2)
    assert other.numbers["cosine"] is None and other.numbers["z"] is None
    one, other = list_vector_cells(rows)
    assert one.numbers["rms"] == pytest.approx(5e152) and other.numbers["rms"] is None


def test_experts_of_a_layer_are_one_cell() -> None:
    kind = "mlp.experts.*.up_proj.weight"
    rows = [
        row("m.layers.0.mlp.experts.0.up_proj.weight", "m.layers.0", kind, 100, cosine=0.5,
            cosine_sd=0.25, norm_a=3.0, norm_b=4.0, norm=3.0, density=0.5),
        row("m.layers.0.mlp.experts.1.up_proj.weight", "m.layers.0", kind, 300, cosine=-1.0,
            cosine_sd=1 / 3, norm_a=4.0, norm_b=3.0, norm=4.0, density=0.1),
    ]  # fmt: skip
    (pair,), (vector,) = list_pair_cells(rows), list_vector_cells(rows)
    # <a, b> = 0.5 * 12 - 12 = -6 with a spread of (3^2 + 4^2)^.5, |a| = |b| = 5, 400 values.
    assert pair.kind == "mlp.experts.*.up_proj" and pair.numel == 400
    assert pair.numbers["cosine"] == pytest.approx(-6 / 25)
    assert pair.numbers["z"] == pytest.approx(-6 / 5)
    assert pair.numbers["norm_a"] == pair.numbers["norm_b"] == pytest.approx(5)
    assert vector.numbers["rms"] == pytest.approx(5 / 20)
    assert vector.numbers["density"] == pytest.approx(0.2)
    rows[1]["cosine"] = rows[1]["density"] = None  # no angle: it adds nothing to the inner product
    assert list_pair_cells(rows)[0].numbers["cosine"] == pytest.approx(6 / 25)
    assert list_vector_cells(rows)[0].numbers["density"] is None
