"""From sums and names to statements."""

from math import sqrt

import numpy as np
import pytest
from harm import DIGITS, lowered

from skillvec.analysis.levels import (
    pair_levels,
    pair_row,
    pair_terms,
    realised,
    sentence,
    vector_row,
)
from skillvec.analysis.spreads import Units, Variances
from skillvec.ops.names import MOST_DIGITS, kind_of, layer_of, module_of, natural_order
from skillvec.ops.statistics import Request, layout


@pytest.mark.parametrize(
    "name,layer,kind",
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj.weight"),
        ("model.layers.11.input_layernorm.weight", "model.layers.11", "input_layernorm.weight"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.11", "mlp.c_fc.weight"),
        ("h.0.attn.c_attn.bias", "h.0", "attn.c_attn.bias"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0",
         "mlp.up_proj.weight"),
        ("model.layers.2.mlp.experts.12.down_proj.weight", "model.layers.2",
         "mlp.experts.*.down_proj.weight"),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "model.layers.2",
         "block_sparse_moe.experts.*.w1.weight"),
        ("visual.blocks.3.attn.qkv.weight", "visual.blocks.3", "attn.qkv.weight"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
         "vision_tower.vision_model.encoder.layers.1", "mlp.fc1.bias"),
        ("model.visual.merger.mlp.0.weight", "model.visual.merger.mlp.0", "weight"),
        ("blocks.3.0.weight", "blocks.3", "*.weight"),
        ("blocks.3.1.2.weight", "blocks.3", "*.*.weight"),
        ("layers.4", "layers.4", ""),
        ("model.embed_tokens.weight", "", "model.embed_tokens.weight"),
        ("lm_head.weight", "", "lm_head.weight"),
        ("model.conv1d.weight", "", "model.conv1d.weight"),
        ("model.layer3x.weight", "", "model.layer3x.weight"),
        ("transformer.wte.weight", "", "transformer.wte.weight"),
    ],
)  # fmt: skip
def test_names_split_into_layer_and_kind(name: str, layer: str, kind: str) -> None:
    assert layer_of(name) == layer
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    "name,module",
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn"),
        ("model.layers.11.input_layernorm.weight", "input_layernorm"),
        ("h.0.attn.c_attn.bias", "attn"),
        ("model.layers.2.mlp.experts.12.down_proj.weight", "mlp"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"), ("scale", "scale"), ("layers.4", ""),
    ],
)  # fmt: skip
def test_names_have_a_module(name: str, module: str) -> None:
    assert module_of(name) == module


def test_natural_order_counts() -> None:
    names = ["a.10.b", "a.9.b", "a.9", "a.b", "b.1", "a.9.c", "10", "9", "", "a.09.b"]
    ordered = sorted(names, key=natural_order)
    assert ordered.index("a.9.b") < ordered.index("a.10.b")
    assert ordered.index("a.9.b") < ordered.index("a.9.c")
    assert ordered.index("9") < ordered.index("10")
    assert ordered.index("a.10.b") < ordered.index("b.1")


def test_numbers_that_are_too_long_are_text() -> None:
    short, long = "9" * MOST_DIGITS, "1" * (MOST_DIGITS + 1)
    assert layer_of(f"layers.{short}.w") == f"layers.{short}"
    assert layer_of(f"layers.{long}.w") == "" and layer_of(f"layers.{long}.3.w").endswith(".3")
    names = [f"w.{short}", "w.2", f"w.{long}", f"w.{DIGITS}"]
    with lowered():
        assert sorted(names, key=natural_order) == [names[2], names[3], names[1], names[0]]


def test_natural_order_takes_any_digit() -> None:
    """A superscript two is a digit to Unicode, but no number to int()."""
    assert sorted(["w²", "w1", "w٣", "²"], key=natural_order)


def test_realised_by_hand() -> None:
    """Asked lam * v with v = (3, 4); <w, lam v> / |lam v|^2 and their cosine."""
    assert realised((25.0, 25.0, 25.0), 1.0) == (1.0, 1.0)
    assert realised((100.0, 50.0, 25.0), 2.0) == (1.0, 1.0)
    assert realised((9.0, 9.0, 25.0), 1.0) == (9 / 25, pytest.approx(3 / 5))  # w = (3, 0)
    assert realised((25.0, -25.0, 25.0), -1.0) == (1.0, 1.0)
    assert realised((25.0, -25.0, 25.0), 1.0) == (-1.0, -1.0)  # the opposite of what was asked
    assert realised((4.0, 0.0, 25.0), 0.5) == (0.0, 0.0)


def test_realised_has_no_answer_where_nothing_was_asked_or_written() -> None:
    assert realised((4.0, 2.0, 25.0), 0.0) == (None, None)
    assert realised((0.0, 0.0, 0.0), 1.0) == (None, None)
    assert realised((0.0, 0.0, 25.0), 1.0) == (0.0, None)


def test_gain_and_cosine_at_the_ends_of_fp64() -> None:
    tiny = 1e-180  # the product of two of these is 0
    assert realised((tiny, tiny, tiny), 1.0) == (1.0, 1.0)
    assert realised((0.0, 0.0, tiny), 1e-300) == (None, None)  # lam * |v|^2 is 0
    assert realised((1.0, -(1 + 1e-9), 1.0), -1.0) == (1 + 1e-9, 1.0)  # fp32 lanes round


REQUEST = Request((1.0, 1.0), ((0, 1),), ((0, 1),))


def record(numel: int, **given: object) -> tuple[str, int, np.void]:
    """Return the sums of one tensor; vectors and pairs by the names of statistics.layout."""
    made = np.zeros(1, layout(REQUEST))
    for key, value in given.items():
        group, _, name = key.partition("_")
        made[0][group][name] = value
    return numel, made[0]


def terms(*records: tuple[int, np.void]) -> dict:
    held = [pair_terms(numel, sums, REQUEST, 0) for numel, sums in records]
    return {key: sum(term[key] for term in held) for key in held[0]}


def test_pair_row_by_hand() -> None:
    """|a| = 5, |b| = 4, <a, b> = 12 over 100 values in 100 groups; 10 and 20 changed, 8 of both."""
    one = record(
        100, vectors_square=[25, 16], vectors_support=[10, 20],
        pairs_product=12, pairs_groups_sq=9, pairs_shared=8, pairs_agree=6, pairs_met_a=20,
        pairs_met_b=8, pairs_clash_a=5, pairs_clash_b=2, controls_product=-2,
        controls_groups_sq=4,
    )  # fmt: skip
    row = pair_row(terms(one))
    assert row["cosine"] == pytest.approx(0.6) and row["z_isotropic"] == pytest.approx(6.0)
    assert (row["norm_a"], row["norm_b"], row["norm_ratio"]) == (5.0, 4.0, 1.25)
    assert (row["null"], row["z"], row["z_groups"]) == ("groups", 4.0, 4.0)  # nothing else is known
    assert row["cosine_sd"] == pytest.approx(3 / 20) and row["z_rotation"] is None
    assert row["cosine_se"] == pytest.approx(sqrt(100 / 99 * (9 - 144 / 100)) / 20)
    assert (row["density_a"], row["density_b"]) == (0.1, 0.2)
    assert row["jaccard"] == pytest.approx(8 / 22) and row["lift"] == pytest.approx(4.0)
    variance = 10 * 20 * 90 * 80 / (100**2 * 99)
    assert row["overlap_z"] == pytest.approx(6 / sqrt(variance))
    assert row["sign_agreement"] == 0.75 and row["sign_z"] == pytest.approx(4 / sqrt(8))
    assert (row["on_support_a"], row["on_support_b"]) == (0.8, 0.5)
    assert (row["conflict_a"], row["conflict_b"]) == (0.2, 0.125)
    assert row["along"] == pytest.approx(144 / 16 / 25)
    assert row["control_cosine"] == pytest.approx(-0.1)
    assert row["control_z"] == pytest.approx(-1.0)
    rows = Variances(rows=Units(16.0, 30))
    assert pair_row(terms(one), None, rows)["control_z"] == pytest.approx(-0.5)
    drawn = pair_row(terms(one) | {"control_product": 0.0}, Variances(control=-6.0))
    assert drawn["control_cosine"] == 0.0  # the measured control goes before a drawn one
    plain = {key: of for key, of in terms(one).items() if not key.startswith("control")}
    drawn = pair_row(plain, Variances(control=-6.0))
    assert (drawn["control_cosine"], drawn["control_z"]) == (pytest.approx(-0.3), -2.0)


def test_groups_of_tensors_add_sums_not_cosines() -> None:
    """Large tensors count more; the chance of an overlap is that of each tensor on its own."""
    one = record(4, vectors_square=[9, 9], pairs_product=-9, pairs_groups_sq=27,
                 vectors_support=[4, 4], pairs_shared=4, pairs_agree=0)  # fmt: skip
    two = record(6, vectors_square=[1, 1], pairs_product=1, pairs_groups_sq=1,
                 vectors_support=[1, 6], pairs_shared=1)  # fmt: skip
    row = pair_row(terms(one, two))
    assert row["numel"] == 10 and row["cosine"] == pytest.approx(-8 / 10)
    assert row["z_groups"] == pytest.approx(-8 / sqrt(28))
    assert row["lift"] == 1.0 and row["overlap_z"] is None  # all that chance allows
    assert row["along"] == pytest.approx((81 / 9 + 1) / 10)
    records = [("l.0.w", *one), ("l.1.w", *two)]
    levels = pair_levels(records, REQUEST, 0, [{}, {}], {}, matrices=[0, 1])
    (part,) = levels["parts"]
    assert (part["name"], part["cosine"]) == ("layers", levels["overall"]["cosine"])
    assert part["cosine_mean"] == 0.0 and part["cosine_mean_se"] == pytest.approx(1.0)
    assert part["rare_share"] == 0.0 and "cosine_mean" not in levels["tensors"][0]
    outside = pair_levels([("embed.w", *one), ("l.1.w", *two)], REQUEST, 0, [{}, {}], {})
    assert {row["name"]: row["cosine"] for row in outside["parts"]} == {"outside": -1, "layers": 1}
    assert [row["name"] for row in levels["layers"]] == ["l.0", "l.1"]
    assert [row["cosine"] for row in levels["layers"]] == [-1.0, 1.0]
    assert levels["kinds"][0]["cosine"] == levels["overall"]["cosine"] == pytest.approx(-0.8)
    assert (
        levels["tensors"][1] | {"layer": "l.1", "kind": "w", "module": "w"}
        == (levels["tensors"][1])
    )


def test_a_zero_delta_has_no_angle() -> None:
    row = pair_row(terms(record(100, vectors_square=[25, 0], vectors_support=[3, 0])))
    for key in ("cosine", "cosine_se", "z", "p", "z_groups", "null", "norm_ratio", "sign_z",
                "lift", "overlap_z", "sign_agreement", "control_cosine"):  # fmt: skip
        assert row[key] is None, key
    assert row["jaccard"] == 0.0 and row["along"] == 0.0
    assert "there is no angle" in sentence({"overall": row, "parts": []})


def judged(cosine: float, z: float, p: float, null: str = "rotation", **others: float) -> dict:
    row = {"cosine": cosine, "cosine_sd": abs(cosine / z), "z": z, "p": p, "null": null}
    zs = dict.fromkeys(("z_groups", "z_rows", "z_channels", "z_rotation"), z) | others
    return {"name": "layers"} | row | zs


def test_what_the_sentences_say() -> None:
    clear = judged(0.02, 20.0, 1e-80)
    pair: dict = {"overall": clear, "parts": [clear]}
    assert sentence(pair) == (
        "cosine +0.0200, by chance \u00b1 0.0020: nearly orthogonal but not by chance"
        " (z +20.0 by the spread of random rotations of the hidden axis)"
    )
    assert "orthogonal, of which rounding may give -0.0100, but not" in sentence(pair, -0.01)
    assert "aligned" in sentence(pair | {"overall": judged(0.5, 20, 1e-80)})
    assert "opposed" in sentence(pair | {"overall": judged(-0.5, -20, 1e-80)})
    for row in (judged(0.02, 2.5, 0.012), judged(0.02, 4.0, 1e-4, "groups", z_rotation=1.9)):
        said = sentence(pair | {"overall": row})
        assert "no more than unrelated updates of this structure show (z +" in said
        assert "not by chance" not in said
    parts = [clear | {"name": "outside"}, judged(-0.3, -1.0, 0.3, "rows")]
    assert sentence(pair | {"parts": parts}).endswith(
        "; without embeddings, head and last norm cosine -0.3000, by chance \u00b1 0.5880, no more"
        " than unrelated updates of this structure show (z -1.0 by the spread of random signs of"
        " whole rows)"
    )


def test_the_forecast_names_the_layers_that_stand_out() -> None:
    """Half of a's energy is in layer 1, half of that along b; layer 0 is within chance."""
    quiet = record(10**6, vectors_square=[50, 50], pairs_product=0.05, pairs_groups_sq=0.0025,
                   pairs_clash_a=25, pairs_shared=10**5)  # fmt: skip
    loud = record(10**6, vectors_square=[50, 50], pairs_product=sqrt(0.5) * 50,
                  pairs_groups_sq=25, pairs_shared=10**5)  # fmt: skip
    names = ["l.0.w", "l.1.w"]
    pair = pair_levels(
        [(name, *sums) for name, sums in zip(names, (quiet, loud), strict=True)],
        REQUEST, 0, [{}, {}], {},
    )  # fmt: skip
    records = [("norm", *loud), ("other", *quiet)]
    outside = pair_levels(records, REQUEST, 0, [{}, {}], {})
    assert [layer["name"] for layer in outside["forecast"]["layers"]] == ["norm"]
    (layer,) = pair["forecast"]["layers"]
    assert layer["name"] == "l.1" and layer["share"] == pytest.approx(0.25)
    assert pair["forecast"]["along"] == pytest.approx(0.25, rel=1e-4)
    assert pair["forecast"]["conflict"] == pytest.approx(0.25)
    words = pair["forecast"]["sentence"]
    assert "25 % of A's energy lies along B" in words and words.endswith("look at l.1")


def test_what_rounding_keeps_by_hand() -> None:
    """Two of four changed values lie under half a step, one was absorbed."""
    sums = {"numel": 10, "square": 20.0, "support": 4, "moved": 4,
            "kept_dot": 15.0, "kept_sq": 12.0, "absorbed": 1,
            "steps": np.array([1, 1, 0, 2, 0, 0, 0, 0, 0])}  # fmt: skip
    row = vector_row(sums, 80.0)
    assert row["norm"] == sqrt(20) and row["rms"] == sqrt(2) and row["density"] == 0.4
    assert row["energy_share"] == 0.25 and row["below_half_step"] == 0.5
    assert row["kept_gain"] == 0.75 and row["kept_cosine"] == pytest.approx(15 / sqrt(240))
    assert row["absorbed"] == 0.25
    unknown = vector_row(sums | {"moved": 0, "steps": np.zeros(9)}, 80.0)
    for key in ("steps", "below_half_step", "kept_gain", "kept_cosine", "absorbed"):
        assert unknown[key] is None


def test_what_no_null_can_judge_is_said() -> None:
    """Squares of sums beyond fp64: there is a cosine, and no spread to hold it against."""
    norms = {"norm_a": 1.0, "norm_b": 1.0}
    pair = {"overall": {"cosine": 0.06, "z": None} | norms, "parts": []}
    assert sentence(pair) == "cosine +0.0600; squares of the sums leave fp64: no null can judge it"
    apart = {"overall": {"cosine": 0.0, "z": None} | norms, "parts": []}
    assert sentence(apart) == "no value is changed by both: the deltas are exactly orthogonal"
    zero = {"overall": {"cosine": None, "z": None, "norm_a": 0.0, "norm_b": 1.0}, "parts": []}
    assert sentence(zero) == "one of the deltas is zero: there is no angle to judge"
    huge = {"overall": {"cosine": None, "z": None} | norms, "parts": []}
    assert sentence(huge) == "squares of the deltas leave fp64: there is no cosine"
