"""From sums and names to statements."""

from math import sqrt

import numpy as np
import pytest

from skillvec.analysis import compare, kind_of, layer_of, natural_order, pair_row, realised


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


def test_natural_order_counts() -> None:
    names = ["a.10.b", "a.9.b", "a.9", "a.b", "b.1", "a.9.c", "10", "9", "", "a.09.b"]
    ordered = sorted(names, key=natural_order)
    assert ordered.index("a.9.b") < ordered.index("a.10.b")
    assert ordered.index("a.9.b") < ordered.index("a.9.c")
    assert ordered.index("9") < ordered.index("10")
    assert ordered.index("a.10.b") < ordered.index("b.1")


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


def test_pair_row_by_hand() -> None:
    gram = np.array([[25.0, 12.0], [12.0, 16.0]])
    row = pair_row(gram, 0, 1, 100)
    assert row["cosine"] == pytest.approx(0.6)
    assert row["z"] == pytest.approx(6.0)
    assert (row["norm_a"], row["norm_b"], row["norm_ratio"]) == (5.0, 4.0, 1.25)
    zero = pair_row(np.array([[25.0, 0.0], [0.0, 0.0]]), 0, 1, 100)
    assert (zero["cosine"], zero["z"], zero["norm_ratio"]) == (None, None, None)
    assert pair_row(np.array([[1.0, 1 + 1e-9], [0, 1.0]]), 0, 1, 4)["cosine"] == 1.0


def test_compare_groups_sums_not_cosines() -> None:
    """Cosines of layers and kinds come from summed inner products, so large tensors count more."""
    grams = [
        ("layers.10.w", 4, np.array([[1.0, 1.0], [1.0, 1.0]])),
        ("layers.2.w", 4, np.array([[9.0, -9.0], [-9.0, 9.0]])),
        ("layers.2.b", 2, np.array([[1.0, 0.0], [0.0, 1.0]])),
        ("head", 6, np.array([[4.0, 0.0], [0.0, 1.0]])),
    ]
    (pair,) = compare(grams, ["A", "B"])
    assert (pair["a"], pair["b"]) == ("A", "B")
    assert [row["name"] for row in pair["tensors"]] == [
        "head", "layers.2.b", "layers.2.w", "layers.10.w",
    ]  # fmt: skip
    layers = {row["name"]: row for row in pair["layers"]}
    assert list(layers) == ["(no layer)", "layers.2", "layers.10"]
    assert layers["layers.2"]["cosine"] == pytest.approx(-9 / 10)
    assert layers["layers.2"]["numel"] == 6
    kinds = {row["name"]: row for row in pair["kinds"]}
    assert kinds["w"]["cosine"] == pytest.approx(-8 / 10)
    assert pair["overall"]["cosine"] == pytest.approx(-8 / sqrt(15 * 12))
    assert pair["overall"]["numel"] == 16


def test_compare_makes_every_pair_once() -> None:
    gram = np.eye(4)
    pairs = compare([("w", 3, gram)], ["a", "b", "c", "d"])
    assert [p["a"] + p["b"] for p in pairs] == ["ab", "ac", "ad", "bc", "bd", "cd"]
