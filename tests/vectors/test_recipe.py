"""Recipes: what a file may say, where its errors point, and the numbers every tensor gets."""

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harm import DIGITS, NESTED, lowered
from hypothesis import given, settings
from hypothesis import strategies as st

from skillvec.errors import IncompatibleError, UsageError
from skillvec.vectors import recipe as recipe_module
from skillvec.vectors.recipe import (
    MAX_NBYTES,
    Recipe,
    Rule,
    Share,
    parse_recipe,
    read_recipe,
    resolve,
)

TEXT = """
op: ties
parameters: {density: 0.3}
seed: 7
vectors:
  - vector: a.safetensors
    weight: 0.7
    parameters: {density: 0.5}
    rules:
      - {match: "*.mlp.*", weight: 0.2}
      - {match: "model.layers.*", weight: [0.0, 1.0]}
      - {match: "lm_head.*", weight: 0.0, density: 0.1}
  - vector: b.safetensors
    weight: -0.3
"""
RECIPE = Recipe(
    "ties",
    (
        Share(
            "a.safetensors",
            0.7,
            {"density": 0.5},
            (
                Rule("*.mlp.*", 0.2, {}),
                Rule("model.layers.*", (0.0, 1.0), {}),
                Rule("lm_head.*", 0.0, {"density": 0.1}),
            ),
        ),
        Share("b.safetensors", -0.3),
    ),
    {"density": 0.3},
    7,
)
NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in ("mlp.up_proj", "norm")),
]


def one(names: list[str], **share: Any) -> dict[str, tuple[float, dict[str, Any]]]:
    """Return what the only vector of a recipe gets."""
    resolved = resolve(parse_recipe({"vectors": [{"vector": "v", **share}]}), names)
    return {name: setting for name, (setting,) in resolved.items()}


def layers(count: int, stack: str = "model.layers") -> list[str]:
    return [f"{stack}.{i}.weight" for i in range(count)]


def weights(weight: Any, names: list[str]) -> list[float]:
    resolved = one(names, weight=weight)
    return [resolved[name][0] for name in names]


# --------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML"])
def test_the_same_recipe_from_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"recipe{suffix}"
    path.write_text(json.dumps(yaml.safe_load(TEXT)) if suffix == ".json" else TEXT)
    assert read_recipe(path) == read_recipe(str(path)) == RECIPE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # with a byte order mark
    assert read_recipe(path) == RECIPE


def test_to_dict_is_the_file() -> None:
    assert RECIPE.to_dict() == yaml.safe_load(TEXT)
    assert parse_recipe(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE


def test_defaults_are_filled_in_and_left_out() -> None:
    recipe = parse_recipe({"vectors": [{"vector": "a"}]})
    assert recipe == Recipe("linear", (Share("a", 1.0, {}, ()),), {}, 0)
    assert recipe.to_dict() == {"op": "linear", "vectors": [{"vector": "a"}]}
    full = {"op": "linear", "parameters": {}, "seed": 0,
            "vectors": [{"vector": "a", "weight": 1, "parameters": {}, "rules": []}]}  # fmt: skip
    assert parse_recipe(full) == recipe
    assert Recipe("linear", (Share("a"),)) == recipe


def test_to_dict_shares_nothing_with_the_recipe() -> None:
    recipe = parse_recipe({"vectors": [{"vector": "a", "parameters": {"density": [0.1, 0.2]}}]})
    recipe.to_dict()["vectors"][0]["parameters"]["density"] = 1
    assert recipe.shares[0].parameters == {"density": (0.1, 0.2)}


def test_values_keep_their_kind() -> None:
    stated = {"k": 3, "flag": True, "mode": "sum", "rate": 0.5, "curve": [1, 2], "np": np.int64(4)}
    recipe = parse_recipe({"parameters": stated, "vectors": [{"vector": "a", "weight": 2}]})
    expected = {"k": 3, "flag": True, "mode": "sum", "rate": 0.5, "curve": (1.0, 2.0), "np": 4}
    assert recipe.parameters == expected
    assert [type(value) for value in recipe.parameters.values()] == [
        int, bool, str, float, tuple, int,
    ]  # fmt: skip
    assert type(recipe.shares[0].weight) is float
    json.dumps(recipe.to_dict())
    assert parse_recipe({"vectors": [{"vector": "a", "weight": np.float32(0.5)}]}).shares == (
        Share("a", 0.5),
    )


@pytest.mark.parametrize("number,value", [("1e-3", 1e-3), ("-2E+2", -200.0), ("1.5e1", 15.0)])
def test_yaml_takes_the_exponents_json_takes(number: str, value: float, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text; nobody means that."""
    (tmp_path / "r.yaml").write_text(f"vectors: [{{vector: a, weight: {number}}}]")
    assert read_recipe(tmp_path / "r.yaml").shares[0].weight == value


def test_colons_and_digits_in_text_stay(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("vectors: [{vector: hf://org/v@1.0}, {vector: '1:30'}]")
    assert read_recipe(tmp_path / "r.yaml").shares == (Share("hf://org/v@1.0"), Share("1:30"))


# --------------------------------------------------------------------------- the example, by hand


def test_the_example_by_hand() -> None:
    resolved = resolve(RECIPE, NAMES)
    assert list(resolved) == NAMES
    first = {name: shares[0] for name, shares in resolved.items()}
    assert first == {
        "lm_head.weight": (0.0, {"density": 0.1}),
        "model.embed_tokens.weight": (0.7, {"density": 0.5}),
        "model.layers.0.mlp.up_proj.weight": (0.0, {"density": 0.5}),  # the later rule decides
        "model.layers.0.norm.weight": (0.0, {"density": 0.5}),
        "model.layers.1.mlp.up_proj.weight": (0.5, {"density": 0.5}),
        "model.layers.1.norm.weight": (0.5, {"density": 0.5}),
        "model.layers.2.mlp.up_proj.weight": (1.0, {"density": 0.5}),
        "model.layers.2.norm.weight": (1.0, {"density": 0.5}),
    }
    assert all(shares[1:] == [(-0.3, {"density": 0.3})] for shares in resolved.values())


# ----------------------------------------------------------------------------------------- rules


def test_the_last_rule_that_states_a_key_decides_that_key() -> None:
    rules = [
        {"match": "a*", "weight": 0.1, "density": 0.2, "k": 1},
        {"match": "*b", "weight": 0.3, "mode": "x"},
        {"match": "ab", "density": 0.4},
    ]
    resolved = one(["a", "ab", "b", "c"], weight=9, parameters={"k": 5}, rules=rules)
    assert resolved == {
        "a": (0.1, {"k": 1, "density": 0.2}),
        "ab": (0.3, {"k": 1, "density": 0.4, "mode": "x"}),
        "b": (0.3, {"k": 5, "mode": "x"}),
        "c": (9.0, {"k": 5}),
    }


def test_weight_zero_is_a_statement() -> None:
    assert one(["a", "b"], rules=[{"match": "a", "weight": 0}]) == {"a": (0.0, {}), "b": (1.0, {})}


def test_parameters_of_recipe_vector_and_rule_merge_key_by_key() -> None:
    recipe = parse_recipe(
        {
            "parameters": {"x": 1, "y": 1, "z": 1},
            "vectors": [
                {"vector": "a", "parameters": {"y": 2, "z": 2},
                 "rules": [{"match": "t", "z": 3}]},
                {"vector": "b"},
            ],
        }
    )  # fmt: skip
    assert resolve(recipe, ["t", "u"]) == {
        "t": [(1.0, {"x": 1, "y": 2, "z": 3}), (1.0, {"x": 1, "y": 1, "z": 1})],
        "u": [(1.0, {"x": 1, "y": 2, "z": 2}), (1.0, {"x": 1, "y": 1, "z": 1})],
    }


def test_results_share_nothing() -> None:
    recipe = parse_recipe({"parameters": {"x": 1}, "vectors": [{"vector": "a"}, {"vector": "b"}]})
    resolved = resolve(recipe, ["t", "u"])
    resolved["t"][0][1]["x"] = 2
    assert [settings for _, settings in (*resolved["t"][1:], *resolved["u"])] == [{"x": 1}] * 3
    assert resolve(recipe, ["t"])["t"][0] == (1.0, {"x": 1})


def test_globs_cover_the_whole_name_and_know_case() -> None:
    names = ["mlp", "x.mlp", "MLP", "mlp.x"]
    assert weights_of(one(names, rules=[{"match": "mlp", "weight": 0}])) == [0, 1, 1, 1]
    assert weights_of(one(names, rules=[{"match": "mlp*", "weight": 0}])) == [0, 1, 1, 0]
    assert weights_of(one(names, rules=[{"match": "?????", "weight": 0}])) == [1, 0, 1, 0]
    assert weights_of(one(names, rules=[{"match": "[!m]*", "weight": 0}])) == [1, 0, 0, 1]


def weights_of(resolved: dict[str, tuple[float, dict[str, Any]]]) -> list[float]:
    return [weight for weight, _ in resolved.values()]


GLOBS = st.text("ab*?[]!-.\\", min_size=1, max_size=8)


@given(GLOBS, st.lists(st.text("ab.[]", max_size=5), unique=True))
def test_globs_are_those_of_fnmatchcase(glob: str, names: list[str]) -> None:
    hits = [fnmatchcase(name, glob) for name in names]
    if any(hits):
        resolved = one(names, rules=[{"match": glob, "weight": 0}])
        assert weights_of(resolved) == [0.0 if hit else 1.0 for hit in hits]
    else:
        with pytest.raises(IncompatibleError):
            one(names, rules=[{"match": glob, "weight": 0}])


def test_globs_that_match_nothing_are_refused_together() -> None:
    rules = [{"match": f"typo{i}", "weight": 0} for i in range(3)] + [{"match": "a", "weight": 0}]
    vectors = [{"vector": "v"}, {"vector": "w", "rules": rules}, {"vector": "x", "rules": rules}]
    with pytest.raises(IncompatibleError) as raised:
        resolve(parse_recipe({"vectors": vectors}), ["a", "b"])
    assert str(raised.value).splitlines() == [
        "globs that match no tensor:",
        "  vectors[1].rules[0].match: typo0",
        "  vectors[1].rules[1].match: typo1",
        "  vectors[1].rules[2].match: typo2",
        "  vectors[2].rules[0].match: typo0",
        "  vectors[2].rules[1].match: typo1",
        "  ... and 1 more",
    ]


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "points,count,expected",
    [
        ([0, 1], 2, [0, 1]),
        ([0, 1], 3, [0, 0.5, 1]),
        ([0, 1], 4, [0, 1 / 3, 2 / 3, 1]),
        ([1, -1], 5, [1, 0.5, 0, -0.5, -1]),
        ([0, 1, 0], 5, [0, 0.5, 1, 0.5, 0]),
        ([0, 1, 0], 4, [0, 2 / 3, 2 / 3, 0]),  # at 2/3 and 4/3 of the way from point to point
        ([0, 3, 6, 0], 2, [0, 0]),  # only the ends
        ([0, 3, 6, 0], 3, [0, 4.5, 0]),
        ([0, 4, 6], 1, [0]),  # one layer is the first
        ([0.7], 3, [0.7, 0.7, 0.7]),
        ([0.7, 0.7], 4, [0.7] * 4),  # to the bit
        ([-1.7e308, 1.7e308], 3, [-1.7e308, 0, 1.7e308]),  # whose difference fp64 does not hold
    ],
)
def test_gradients_by_hand(points: list[float], count: int, expected: list[float]) -> None:
    assert weights(points, layers(count)) == expected


def test_layers_are_ordered_by_number_and_counted_once() -> None:
    """Layers 2, 9, 10 in names of any order: places 0, 1 and 2 of 3, whatever their numbers."""
    names = ["h.10.a", "h.9.b", "h.2.b", "h.10.b", "h.9.a.0.w", "h.2.a", "h.10"]
    assert weights([0, 1], names) == [1, 0.5, 0, 1, 0.5, 0, 1]


def test_every_stack_has_its_own_gradient() -> None:
    text, vision = layers(3), layers(5, "visual.blocks")
    short = ["layers.0.w", "layers.1.w", "0.w", "1.w"]  # stacks "layers" and ""
    assert weights([0, 1], [*vision, *text, *short]) == [
        0, 0.25, 0.5, 0.75, 1, 0, 0.5, 1, 0, 1, 0, 1,
    ]  # fmt: skip


def test_a_glob_does_not_change_the_layers_of_a_gradient() -> None:
    """Layers 1 and 2 of 0..4 get their share of the whole way, not a way of their own."""
    resolved = one(layers(5), rules=[{"match": "*.[12].*", "weight": [0, 1]}])
    assert weights_of(resolved) == [1, 0.25, 0.5, 1, 1]


def test_parameters_take_gradients_too() -> None:
    rules = [{"match": "*.1.*", "density": 0.9}]
    resolved = one(layers(3), parameters={"density": [0.2, 0.4], "k": 2}, rules=rules)
    assert [settings for _, settings in resolved.values()] == [
        {"density": 0.2, "k": 2}, {"density": 0.9, "k": 2}, {"density": 0.4, "k": 2},
    ]  # fmt: skip


OUTSIDE = [f"outside{i}.weight" for i in range(7)]


@pytest.mark.parametrize(
    "recipe,key",
    [
        ({"vectors": [{"vector": "v"}, {"vector": "w", "weight": [0, 1]}]}, "weight of vectors[1]"),
        ({"vectors": [{"vector": "v", "weight": [0.5]}]}, "weight of vectors[0]"),
        ({"vectors": [{"vector": "v", "parameters": {"d": [0, 1]}}]}, "d of vectors[0]"),
        ({"parameters": {"d": [0, 1]}, "vectors": [{"vector": "v"}]}, "d of vectors[0]"),
        ({"vectors": [{"vector": "v", "rules": [{"match": "o*", "weight": [0, 1]}]}]},
         "weight of vectors[0]"),
        ({"vectors": [{"vector": "v", "weight": [0, 1], "parameters": {"d": [0, 1]}}] * 2},
         " of vectors[0]"),
    ],
)  # fmt: skip
def test_a_gradient_outside_every_layer_is_refused(recipe: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match="add a rule") as raised:
        resolve(parse_recipe(recipe), [*layers(2), *OUTSIDE])
    first, *lines = str(raised.value).splitlines()
    assert "outside every layer" in first
    assert len(lines) == 6 and lines[-1] == "  ... and 2 more"
    assert all(
        line.startswith(f"  {name}: ") and line.endswith(key)
        for line, name in zip(lines[:5], OUTSIDE, strict=False)
    )


def test_a_rule_with_a_number_lifts_the_refusal() -> None:
    rules = [{"match": "out*", "weight": 0.5}]
    resolved = one([*layers(2), *OUTSIDE], weight=[0, 1], rules=rules)
    assert weights_of(resolved) == [0, 1, *[0.5] * 7]
    everywhere = [{"match": "*", "weight": [0, 1]}, *rules]
    assert weights_of(one([*layers(2), *OUTSIDE], rules=everywhere)) == [0, 1, *[0.5] * 7]


# ------------------------------------------------------------------------------------- properties


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.lists(NUMBERS, min_size=1, max_size=5)


@given(POINTS, st.integers(1, 40))
def test_a_gradient_starts_and_ends_at_its_points(points: list[float], count: int) -> None:
    found = weights(points, layers(count))
    assert found[0] == points[0]
    assert count == 1 or found[-1] == points[-1]
    assert all(min(points) <= weight <= max(points) for weight in found)


@given(POINTS, st.integers(2, 40))
def test_a_gradient_of_rising_points_rises(points: list[float], count: int) -> None:
    found = weights(sorted(points), layers(count))
    assert found == sorted(found)
    assert weights([-point for point in sorted(points)], layers(count)) == [-w for w in found]


@given(POINTS.filter(lambda points: len(points) > 1), st.integers(1, 6))
def test_a_gradient_passes_through_its_points(points: list[float], steps: int) -> None:
    found = weights(points, layers((len(points) - 1) * steps + 1))
    assert found[::steps] == points


@given(st.permutations(NAMES), st.randoms())
def test_the_order_of_names_does_not_matter(names: list[str], random: Any) -> None:
    assert resolve(RECIPE, names) == resolve(RECIPE, NAMES)
    assert resolve(RECIPE, [*names, random.choice(names)]) == resolve(RECIPE, NAMES)


KEYS = st.text(min_size=1).filter(lambda key: key not in ("match", "weight"))
CURVES = st.one_of(NUMBERS, POINTS.map(tuple))
VALUES = st.one_of(CURVES, st.booleans(), st.text(), st.integers(-(2**60), 2**60))
PARAMETERS = st.dictionaries(KEYS, VALUES, max_size=3)
NAMED = st.text(min_size=1)
RULES = st.builds(Rule, NAMED, st.one_of(st.none(), CURVES), PARAMETERS).filter(
    lambda rule: rule.stated()
)
SHARES = st.builds(Share, NAMED, CURVES, PARAMETERS, st.lists(RULES, max_size=3).map(tuple))
RECIPES = st.builds(
    Recipe,
    NAMED,
    st.lists(SHARES, min_size=1, max_size=3).map(tuple),
    PARAMETERS,
    st.integers(-(2**63) + 1, 2**63 - 1),
)


@settings(max_examples=40)
@given(RECIPES)
def test_every_recipe_survives_its_dict(recipe: Recipe) -> None:
    found = recipe.to_dict()
    assert parse_recipe(found) == recipe
    assert parse_recipe(json.loads(json.dumps(found, allow_nan=False))) == recipe


# ----------------------------------------------------------------------------------------- errors


def share(**entries: Any) -> dict[str, Any]:
    return {"vectors": [{"vector": "v"}, {"vector": "w", **entries}]}


def rule(**entries: Any) -> dict[str, Any]:
    return share(rules=[{"match": "a", "weight": 0}, {"match": "b", **entries}])


WORDS = "expected text that is not empty, found "
FINITE = "expected a finite number, found "
TEXT_KEYS = "expected keys that are text, found "
NUMBER = "expected a finite number or a list of them, found "
VALUE = "expected a finite number, a boolean, text or a list of numbers, found "
NO_PARAMETER = "weight is no parameter; it belongs to a vector or a rule"


@pytest.mark.parametrize(
    "data,place,message",
    [
        (None, "", "expected an object, found None"),
        ([1], "", "expected an object, found [1]"),
        ({}, "", "vectors is missing"),
        ({"vectors": []}, "vectors", "expected at least one vector, found none"),
        ({"vectors": "a"}, "vectors", "expected a list, found 'a'"),
        ({"vectors": {"a": 1}}, "vectors", "expected a list, found {'a': 1}"),
        ({**share(), "opp": 1}, "",
         "expected only the keys op, parameters, seed, vectors, found 'opp'"),
        ({**share(), 1: 1}, "", f"{TEXT_KEYS}1"),
        ({**share(), "op": 1}, "op", f"{WORDS}1"),
        ({**share(), "op": ""}, "op", f"{WORDS}''"),
        ({**share(), "seed": True}, "seed", "expected a whole number of 64 bits, found True"),
        ({**share(), "seed": 1.0}, "seed", "expected a whole number of 64 bits, found 1.0"),
        ({**share(), "seed": "1"}, "seed", "expected a whole number of 64 bits, found '1'"),
        ({**share(), "seed": 2**63}, "seed", f"expected a whole number of 64 bits, found {2**63}"),
        ({**share(), "seed": 10**700}, "seed", "expected a whole number of 64 bits, found int"),
        ({**share(), "parameters": 3}, "parameters", "expected an object, found 3"),
        ({**share(), "parameters": {"d": None}}, "parameters.d", f"{VALUE}None"),
        ({**share(), "parameters": {"weight": 1}}, "parameters.weight", NO_PARAMETER),
        ({"vectors": ["a"]}, "vectors[0]", "expected an object, found 'a'"),
        ({"vectors": [{"weight": 1}]}, "vectors[0]", "vector is missing"),
        (share(vector=3), "vectors[1].vector", f"{WORDS}3"),
        (share(vector=Path("a")), "vectors[1].vector", f"{WORDS}"),
        (share(wieght=3), "vectors[1]",
         "expected only the keys vector, weight, parameters, rules, found 'wieght'"),
        (share(weight="0.5"), "vectors[1].weight", f"{NUMBER}'0.5'"),
        (share(weight=None), "vectors[1].weight", f"{NUMBER}None"),
        (share(weight=True), "vectors[1].weight", f"{NUMBER}True"),
        (share(weight=np.True_), "vectors[1].weight", f"{NUMBER}"),
        (share(weight=1j), "vectors[1].weight", f"{NUMBER}1j"),
        (share(weight=float("nan")), "vectors[1].weight", f"{NUMBER}nan"),
        (share(weight=float("-inf")), "vectors[1].weight", f"{NUMBER}-inf"),
        (share(weight=10**400), "vectors[1].weight", f"{NUMBER}1000"),
        (share(weight=[]), "vectors[1].weight", f"{NUMBER}[]"),
        (share(weight=[0, True]), "vectors[1].weight[1]", f"{FINITE}True"),
        (share(weight=[0, [1]]), "vectors[1].weight[1]", f"{FINITE}[1]"),
        (share(weight=[float("inf")]), "vectors[1].weight[0]", f"{FINITE}inf"),
        (share(parameters=[1]), "vectors[1].parameters", "expected an object, found [1]"),
        (share(parameters={1: 1}), "vectors[1].parameters", f"{TEXT_KEYS}1"),
        (share(parameters={"match": "a"}), "vectors[1].parameters.match", "match is no parameter"),
        (share(parameters={"d": {}}), "vectors[1].parameters.d", f"{VALUE}{{}}"),
        (share(parameters={"d": []}), "vectors[1].parameters.d", f"{VALUE}[]"),
        (share(parameters={"d": 10**400}), "vectors[1].parameters.d", f"{VALUE}1000"),
        (share(parameters={"d": ["a"]}), "vectors[1].parameters.d[0]", f"{FINITE}'a'"),
        (share(rules={"match": "a"}), "vectors[1].rules", "expected a list, found {'match': 'a'}"),
        (share(rules=[3]), "vectors[1].rules[0]", "expected an object, found 3"),
        (share(rules=[{"weight": 3}]), "vectors[1].rules[0]", "match is missing"),
        (rule(match=["a"], weight=1), "vectors[1].rules[1].match", f"{WORDS}['a']"),
        (rule(match="", weight=1), "vectors[1].rules[1].match", f"{WORDS}''"),
        (rule(), "vectors[1].rules[1]",
         "expected a weight or a parameter next to match, found neither"),
        (rule(weight="x"), "vectors[1].rules[1].weight", f"{NUMBER}'x'"),
        (rule(weight=None), "vectors[1].rules[1].weight", f"{NUMBER}None"),
        (rule(density=None), "vectors[1].rules[1].density", f"{VALUE}None"),
        (share(rules=[{"match": "b", 1: 1}]), "vectors[1].rules[0]", f"{TEXT_KEYS}1"),
        (share(weight="x" * 99), "vectors[1].weight", f"{NUMBER}'{'x' * 39}"),
    ],
)  # fmt: skip
def test_errors_name_the_place(data: Any, place: str, message: str) -> None:
    message = f"r: {place}: {message}" if place else f"r: {message}"
    with pytest.raises(UsageError) as raised, lowered():
        parse_recipe(data, "r")
    found = str(raised.value)
    assert found == message or (found.startswith(message) and len(found) < len(message) + 60)
    assert len(found) < 160


class TooDeep:
    """Stands for lists in lists, of which Python prints only so many."""

    def __repr__(self) -> str:
        raise RecursionError


def test_an_error_survives_a_value_too_deep_to_print() -> None:
    with pytest.raises(UsageError) as raised:
        parse_recipe(share(weight=[TooDeep()]))
    assert str(raised.value).endswith(": expected a finite number, found TooDeep")


def test_the_place_has_a_default() -> None:
    with pytest.raises(UsageError, match=r"^recipe: vectors is missing$"):
        parse_recipe({})


def test_a_recipe_built_by_hand_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match=r"^recipe: vectors\[0\].weight: "):
        resolve(Recipe("linear", (Share("v", float("nan")),)), ["a"])
    with pytest.raises(UsageError, match="at least one vector"):
        resolve(Recipe("linear", ()), ["a"])
    by_hand = Recipe("linear", [Share("v", [0.0, 1.0])])  # type: ignore[arg-type]
    assert resolve(by_hand, layers(2)) == {"model.layers.0.weight": [(0.0, {})],
                                           "model.layers.1.weight": [(1.0, {})]}  # fmt: skip


TAIL = "\nvectors: [{vector: a}]\n"
NOT_TAKEN = "anchors, aliases and tags are not taken"
UNREAD = "no recipe can be read from it: "


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("r.yaml", "", "r.yaml: expected an object, found None"),
        ("r.yaml", "- a", "r.yaml: expected an object, found ['a']"),
        ("r.yaml", "vectors: [{vector: a, weight: .nan}]", "r.yaml: vectors[0].weight: expected"),
        ("r.yaml", "vectors: [{vector: 2020-01-01}]", "r.yaml: vectors[0].vector: expected text"),
        ("r.yaml", "vectors: [", f"{UNREAD}while parsing"),
        ("r.yaml", "op: a: b", "mapping values are not allowed here"),
        ("r.yaml", "op: \0", "special characters are not allowed"),
        ("r.yaml", "op: a" + TAIL + "---" + TAIL, "expected a single document"),
        ("r.yaml", "op: a\nop: b" + TAIL, "key 'op' appears twice\n  in \"recipe\", line 2"),
        ("r.yaml", "op: a\n\"op\": b" + TAIL, "key 'op' appears twice"),
        ("r.yaml", "vectors: [{vector: a, vector: b}]", "key 'vector' appears twice"),
        ("r.yaml", "vectors: [{vector: a, <<: {weight: 2}}]", f"{TEXT_KEYS}'<<'"),
        ("r.yaml", "on: a" + TAIL, f"{TEXT_KEYS}'on'"),
        ("r.yaml", "? [a]\n: a" + TAIL, TEXT_KEYS),
        ("r.yaml", "op: &a x" + TAIL, NOT_TAKEN),
        ("r.yaml", "&a op: x" + TAIL, NOT_TAKEN),
        ("r.yaml", "op: &a [x]\nvectors: [*a]", NOT_TAKEN),
        ("r.yaml", "op: !!str x" + TAIL, NOT_TAKEN),
        ("r.yaml", "op: ! x" + TAIL, NOT_TAKEN),
        ("r.yaml", "vectors: !!python/tuple [a]", NOT_TAKEN),
        ("r.yaml", "vectors: [{vector: a, rules: [{match: *mlp, weight: 1}]}]", "needs quotes"),
        ("r.yaml", "vectors: [{vector: a, rules: [{match: *.mlp, weight: 1}]}]", "needs quotes"),
        ("r.yaml", "vectors: [{vector: a, weight: 1:30}]", "numbers to base 60"),
        ("r.yaml", "vectors: [{vector: a, weight: 1:30.5}]", "numbers to base 60"),
        ("r.yaml", "seed: 1:30:20", "numbers to base 60"),
        ("r.yaml", "vectors: [{vector: a, weight: 0b_}]", f"{UNREAD}invalid literal"),
        ("r.yaml", "vectors: [{vector: a, weight: " + DIGITS + "}]", UNREAD),
        ("r.yaml", "vectors: " + NESTED, "recursion"),
        ("r.yml", NESTED, "recursion"),
        ("r.json", NESTED, "recursion"),
        ("r.json", "", f"{UNREAD}Expecting value"),
        ("r.json", "op: x", f"{UNREAD}Expecting value"),
        ("r.json", '{"op": 1, "seed": 3, "op": 2}', "key 'op' appears twice"),
        ("r.json", '{"vectors": [{"vector": "a", "vector": "b"}]}', "key 'vector' appears twice"),
        ("r.json", '{"vectors": [{"vector": "a", "weight": NaN}]}', ": vectors[0].weight: "),
        ("r.json", '{"vectors": [{"vector": "a", "weight": 1e400}]}', "found inf"),
        ("r.json", '{"seed": ' + DIGITS + "}", UNREAD),
        ("r.toml", "", "expected a recipe, a file that ends in .yaml, .yml, .json"),
        ("recipe", TEXT, "expected a recipe, a file that ends in .yaml, .yml, .json"),
    ],
)  # fmt: skip
def test_files_that_hold_no_recipe(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as raised, lowered():
        read_recipe(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_glob_hint_only_where_an_asterisk_may_be_meant(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("op: [")
    with pytest.raises(UsageError) as raised:
        read_recipe(tmp_path / "r.yaml")
    assert "quotes" not in str(raised.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "device.yaml").symlink_to(os.devnull)
    for name in ("missing.yaml", "folder.yaml", "device.yaml"):
        with pytest.raises(UsageError, match=f"{name}: no such recipe file"):
            read_recipe(tmp_path / name)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"op: \xff")
    with pytest.raises(UsageError, match=r"r\.yaml: no recipe can be read from it: 'utf-8"):
        read_recipe(path)

    def fails(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UsageError, match=r"r\.yaml: no recipe can be read from it: .*Permission"):
        read_recipe(path)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_longer_than_is_written_by_hand_is_no_recipe(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"r{suffix}"
    text = json.dumps(RECIPE.to_dict())
    assert MAX_NBYTES == 1_000_000
    monkeypatch.setattr(recipe_module, "MAX_NBYTES", 500)
    path.write_text(text + " " * (500 - len(text)))
    assert read_recipe(path) == RECIPE
    path.write_text(text + " " * (501 - len(text)))
    with pytest.raises(UsageError, match="expected at most 500 bytes, found more"):
        read_recipe(path)


def test_the_one_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    keys = ",".join(f'"k{i}":1' for i in range(60))
    (tmp_path / "r.json").write_text(f'{{{keys},"k7":1}}')
    with pytest.raises(UsageError, match="key 'k7' appears twice"):
        read_recipe(tmp_path / "r.json")
