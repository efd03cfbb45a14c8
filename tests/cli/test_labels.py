"""Labels: cut in the middle, one for each name, and found again by what is left."""

import random
import re

import pytest

from skillvec.cli.labels import CUT, MOST_SHAPES, shorten

MODULES = (
    "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight",
    "mlp.down_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight",
    "post_attention_layernorm.weight", "post_feedforward_layernorm.weight",
)  # fmt: skip
ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
DENSE = [f"model.layers.{i}.{module}" for i in range(12) for module in MODULES] + [*ENDS]
EXPERTS = [
    f"model.language_model.layers.{i}.mlp.experts.{j}.{module}_proj.weight"
    for i in (0, 7, 11) for j in (0, 3, 127) for module in ("gate", "up", "down")
]  # fmt: skip
SHARDS = [f"model-{i:05d}-of-00120.safetensors" for i in range(1, 121)]
FAMILIES = {"dense": DENSE, "experts": [*EXPERTS, *ENDS], "shards": SHARDS}


def find(label: str, names: list[str]) -> set[str]:
    """Return the names that a label can be read as.

    "…" is anything, a number is that number, and `weight` may be gone at the end.
    """
    anything = ".*".join(map(re.escape, label.strip().split(CUT)))
    anything = re.sub(r"\d+", lambda number: rf"(?<!\d){number[0]}(?!\d)", anything)
    end = r"(\.weight)?" if CUT in label else ""
    return {name for name in names if re.fullmatch(anything + end, name.strip())}


@pytest.mark.parametrize("room", [5, 12, 18, 24, 31, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_label_finds_its_own_name_alone(family: str, room: int):
    names = FAMILIES[family]
    labels = shorten(names, room)
    assert all(find(label, names) == {name} for label, name in zip(labels, names, strict=True))
    if room >= 18 and names is not SHARDS:  # which differ in the middle of a word
        assert max(map(len, labels)) <= room
    assert any(CUT in label for label in labels) == (max(map(len, names)) > room)


def test_the_beginning_and_the_end_stay():
    labels = dict(zip(DENSE, shorten(DENSE, 22), strict=True))
    assert labels["model.layers.11.self_attn.k_proj.weight"] == "model.layers.11…k_proj"
    assert labels["model.layers.0.mlp.up_proj.weight"] == "…layers.0.mlp.up_proj"  # as of 11
    assert labels["lm_head.weight"] == "lm_head.weight"
    (one,) = shorten(["one_long_word_without_any_dot"], 11)
    assert one == "one_l…y_dot"


def test_what_fits_is_left_alone():
    widest = max(map(len, DENSE))
    assert shorten(DENSE, widest) == DENSE
    assert shorten(DENSE, widest - 1) != DENSE
    assert shorten([], 3) == []


def test_names_that_differ_in_numbers_alone_are_cut_alike():
    labels = shorten(EXPERTS, 22)
    assert len({re.sub(r"\d+", "N", label) for label in labels}) == 3
    words = [re.findall(r"\d+", label) for label in labels]
    assert words == [re.findall(r"\d+", name) for name in EXPERTS]


def test_blanks_in_front_stay_and_are_counted():
    names = ["  model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    assert shorten(names, 24) == ["  model.layers.3…q_proj", "model.layers.3…q_proj"]


def test_a_name_that_looks_like_a_label_is_not_mistaken_for_one():
    names = ["model.layers.1…q_proj", "model.layers.1.self_attn.q_proj.weight"]
    assert shorten(names, 22) == names


def test_no_two_names_of_any_kind_become_one():
    """Of words drawn from a few, in names that begin and end alike more often than not."""
    drawn = random.Random(0)
    words = ["a", "ab", "abc", "weight", "0", "1", "12", "layers", "*", "q", "long_word_in_it", ""]
    for _ in range(200):
        names = [".".join(drawn.choices(words, k=drawn.randint(1, 6))) for _ in range(12)]
        labels = shorten(names, drawn.randint(1, 20))
        assert len({*labels}) == len({*names}), names


def test_names_of_more_shapes_than_can_be_compared_stay_whole():
    names = [f"word_{i}_of_many.weight" for i in range(MOST_SHAPES + 1)]
    assert shorten(names, 10) == names
    assert shorten(names[:5], 10) != names[:5]
