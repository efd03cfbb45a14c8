"""Spaces: what their words allow, the recipe of a point, and what is refused with what there is."""

import re
from pathlib import Path
from typing import Any

import pytest

from skillvec.errors import UsageError
from skillvec.trials.spaces import Range, Space, read_space, role_of
from skillvec.vectors.recipe import resolve

OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
MODULES = ["input_layernorm", "self_attn.q_proj", "self_attn.q_norm", "mlp.up_proj", "mlp.gate"]
NAMES = [*OUTSIDE, *(f"model.layers.{i}.{m}.weight" for i in range(11) for m in MODULES)]


def space_of(spec: Any, *refs: str, names: list[str] = NAMES) -> Space:
    return read_space(spec, dict.fromkeys(refs or ("v",), names))


def weights(space: Space, names: list[str] = NAMES, **point: Any) -> dict[str, float]:
    """Return the weight of each tensor at a point, which starts at lambda = 1."""
    given = {name.replace("_", "."): value for name, value in point.items()}
    assert not given.keys() - space.dimensions.keys()
    shares = resolve(space.recipe({**space.start(), **given}), names)
    return {name: share[0][0] for name, share in shares.items()}


def layers(found: dict[str, float]) -> list[float]:
    """Return the weight of each layer, which all of its tensors must have."""
    each = [{found[n] for n in NAMES if n.startswith(f"model.layers.{i}.")} for i in range(11)]
    assert all(len(one) == 1 for one in each)
    return [one.pop() for one in each]


def test_one_lambda() -> None:
    space = space_of("lam=0:1.5")
    assert space.dimensions == {"lam": Range(0, 1.5)}
    assert set(weights(space, lam=0.3).values()) == {0.3}
    assert space_of("lam").dimensions == {"lam": Range(0, 2)}
    assert space_of("lam=0.1:10:log").describe() == {"lam": "0.1 to 10, log"}
    assert space_of({"lam": [0, 1]}).dimensions == {"lam": Range(0, 1)}


def test_groups_of_layers_and_what_is_outside() -> None:
    space = space_of("lam=0:2 by=layers:3")
    assert [*space.dimensions] == [
        "lam.layers0-3", "lam.layers4-7", "lam.layers8-10", "lam.outside",
    ]  # fmt: skip
    found = weights(space, **{"lam_layers0-3": 0.1, "lam_layers4-7": 0.2, "lam_layers8-10": 0.3,
                              "lam_outside": 0.4})  # fmt: skip
    assert layers(found) == [0.1] * 4 + [0.2] * 4 + [0.3] * 3
    assert {found[name] for name in OUTSIDE} == {0.4}


def test_two_stacks_are_cut_alike() -> None:
    names = [f"{stack}.layers.{i}.w" for stack, n in (("vision", 2), ("text", 4)) for i in range(n)]
    space = space_of("lam=0:2 by=layers:2", names=names)
    assert [*space.dimensions] == ["lam.group1", "lam.group2"]
    found = weights(space, names, lam_group1=0.0, lam_group2=2.0)
    assert found == {name: 0.0 if name in ("vision.layers.0.w", *names[2:4]) else 2.0
                     for name in names}  # fmt: skip


def test_kinds_of_modules() -> None:
    space = space_of("lam=0:2 by=kinds")
    assert {*space.dimensions} == {"lam.norm", "lam.attention", "lam.mlp", "lam.embeddings"}
    found = weights(space, lam_norm=0.1, lam_attention=0.2, lam_mlp=0.3, lam_embeddings=0.4)
    expected = {"norm": 0.1, "attention": 0.2, "mlp": 0.3, "embeddings": 0.4}
    assert found == {name: expected[role_of(name)] for name in NAMES}
    # the glob of layers.*.gate also takes layers.0.mlp.gate, and must not decide it
    names = ["layers.0.mlp.gate.weight", "layers.0.gate.weight"]
    found = weights(space_of("by=kinds", names=names), names, lam_mlp=0.3, lam_other=0.5)
    assert [*found.values()] == [0.3, 0.5]


@pytest.mark.parametrize(
    "name, role",
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.k_norm.weight", "norm"),
        ("model.layers.3.post_attention_layernorm.weight", "norm"),
        ("transformer.h.0.mlp.c_proj.bias", "mlp"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.wte.weight", "embeddings"),
        ("model.layers.0.block_sparse_moe.experts.5.w1.weight", "mlp"),
        ("lm_head.weight", "embeddings"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_what_a_tensor_is_for(name: str, role: str) -> None:
    assert role_of(name) == role


def test_a_gradient_of_knots() -> None:
    space = space_of("lam=0:2 by=knots:3")
    assert [*space.dimensions] == ["lam.knot1", "lam.knot2", "lam.knot3", "lam.outside"]
    found = weights(space, lam_knot1=0.0, lam_knot2=1.0, lam_knot3=0.5, lam_outside=2.0)
    expected = [0, 0.2, 0.4, 0.6, 0.8, 1, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert layers(found) == pytest.approx(expected)
    assert {found[name] for name in OUTSIDE} == {2.0}


def test_which_layers_at_all() -> None:
    space = space_of("lam=0:2 by=kinds switch=layers:2")
    assert space.dimensions["on.layers0-5"] == Range(0, 1, whole=True)
    found = weights(space, lam_mlp=0.5, **{"on_layers0-5": 0})
    assert {w for name, w in found.items() if re.search(r"layers\.[0-5]\.", name)} == {0.0}
    assert found["model.layers.6.mlp.up_proj.weight"] == 0.5
    assert found["model.layers.6.self_attn.q_proj.weight"] == found["lm_head.weight"] == 1.0
    off = weights(space_of("lam=1 switch=kinds"), on_norm=0)
    assert {role_of(name) for name, weight in off.items() if not weight} == {"norm"}


def test_one_of_several_parts() -> None:
    space = space_of("lam=1 only=all|layers|attention|mlp|layers:3")
    assert space.dimensions == {
        "only": ("all", "layers", "attention", "mlp", "layers0-3", "layers4-7", "layers8-10")
    }
    assert space.start() == {"only": "all"}
    left = {
        part: {name for name, weight in weights(space, only=part).items() if weight}
        for part in space.dimensions["only"]
    }
    assert left["all"] == {*NAMES}
    assert left["layers"] == {*NAMES} - {*OUTSIDE}
    for role in ("attention", "mlp"):
        assert left[role] == {name for name in NAMES if role_of(name) == role}
    for part, first, last in (("layers0-3", 0, 3), ("layers8-10", 8, 10)):
        inside = re.compile(rf"model\.layers\.({'|'.join(map(str, range(first, last + 1)))})\.")
        assert left[part] == {name for name in NAMES if inside.match(name)}
    # one is no choice, and stands where it is said; a lambda of its own is kept
    alone = space_of("lam=0:2 by=kinds only=mlp")
    assert "only" not in alone.dimensions
    found = weights(alone, lam_mlp=0.5)
    assert {w for name, w in found.items() if role_of(name) == "mlp"} == {0.5}
    assert {w for name, w in found.items() if role_of(name) != "mlp"} == {0.0}


def test_a_star_does_not_switch_off_what_is_kept() -> None:
    """A glob with a star for a number matches longer names too, which may be of another kind."""
    names = ["a.0.w_norm.weight", "a.0.mlp.b.1.w_norm.weight", "a.0.b.1.mlp.weight", "a.0.weight",
             "a.0.mlp.1.weight"]  # fmt: skip
    space = space_of("lam=1 only=all|mlp|norm|other", names=names)
    for role in ("mlp", "norm", "other"):
        kept = {name for name, weight in weights(space, names, only=role).items() if weight}
        assert kept == {name for name in names if role_of(name) == role} and kept, role


def test_choices_may_be_numbers() -> None:
    space = space_of("op=coarsen lam=1 rank=0|2|16 bits=23|7|0")
    assert space.dimensions == {"rank": (0, 2, 16), "bits": (23, 7, 0)}
    assert space.start() == {"rank": 0, "bits": 23}
    (share,) = space.recipe({"rank": 16, "bits": 0}).shares
    assert share.parameters == {"rank": 16, "bits": 0}


def test_parameters_of_an_operator() -> None:
    space = space_of("op=ties lam=0:2 density=0.05:1:log density_of=nonzero|all seed=3", "a", "b")
    assert space.describe() == {
        "v1.lam": "0 to 2", "v1.density": "0.05 to 1, log", "v2.lam": "0 to 2",
        "v2.density": "0.05 to 1, log", "density_of": "nonzero or all",
    }  # fmt: skip
    assert space.start()["v2.density"] == 0.2  # the operator's own
    recipe = space.recipe(space.start() | {"v1.density": 0.5, "density_of": "all", "v2.lam": 0.3})
    assert recipe.to_dict() == {
        "op": "ties", "parameters": {"density_of": "all"}, "seed": 3,
        "vectors": [
            {"vector": "a", "parameters": {"density": 0.5}},
            {"vector": "b", "weight": 0.3, "parameters": {"density": 0.2}},
        ],
    }  # fmt: skip


def test_a_file_says_each_vector_its_own(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "lam: 0:2\nvectors:\n- {by: 'layers:2'}\n- {lam: [-1, 0]}\n"
    )
    space = space_of(str(tmp_path / "space.yaml"), "a", "b")
    assert [*space.dimensions] == ["v1.lam.layers0-5", "v1.lam.layers6-10", "v1.lam.outside",
                                   "v2.lam"]  # fmt: skip
    assert space.dimensions["v2.lam"] == Range(-1, 0)
    assert space.start()["v2.lam"] == 0  # nearest to 1
    assert [share.weight for share in space.unchanged().shares] == [1.0, 1.0]


@pytest.mark.parametrize(
    "spec, said",
    [
        (
            "density=0.1:1",
            r"unknown keys; there are op, seed, vectors, .*, switch, only:\n  density",
        ),
        ("op=tie", "no operator 'tie'; there are linear, ties"),
        ("lam=1", "nothing is left to choose; a range is low:high"),
        ("lam=2:0", "lam: expected low:high with low below high, found '2:0'"),
        ("lam=0:inf", "expected low:high"),
        ("lam=0:2:log", "a logarithmic range begins above 0"),
        ("lam=a|b", "lam: expected a number or low:high"),
        ("lam=0:1 lam=0:2", "lam is said twice"),
        ("rising", "'rising' is not KEY=VALUE"),
        ("by=layers", "by: expected whole or layers:K or knots:K or kinds, found 'layers'"),
        ("by=layers:12", "the vector has 11 layers, found 12 groups"),
        ("by=layers:0", "the vector has 11 layers, found 0 groups"),
        ("by=knots:1", "a gradient takes at least 2 knots"),
        ("switch=whole", "switch: expected layers:K or kinds"),
        ("only=all|heads", "only: expected all, layers, layers:K or one of embeddings, norm, "),
        ("only=layers:12", "only: the vector has 11 layers, found 12 groups"),
        ("op=coarsen bits=0|24", "bits at 24: coarsen: bits = 24, expected a whole number"),
        ("op=ties density=0:1", "density at 0: ties: density = 0, expected above 0, at most 1"),
        (
            "op=ties scope=tensor|all",
            "scope at all: ties: scope = 'all', expected tensor",
        ),
        ("op=ties seed=0.5", "seed: expected a whole number"),
        ("missing.yaml", "space missing.yaml: no space can be read from it"),
        ({"vectors": [{}, {}]}, r"vectors: expected a list of 1, one for each vector"),
        ({"vectors": [{"op": "ties"}]}, r"vectors\[0\]: unknown keys"),
    ],
)
def test_what_is_refused(spec: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        space_of(spec)


def test_a_vector_without_layers_has_no_gradient() -> None:
    with pytest.raises(UsageError, match="at most one a layer, of which the vector has 0"):
        space_of("by=knots:2", names=["w"])
    with pytest.raises(UsageError, match="the vector has 0 layers"):
        space_of("by=layers:1", names=["w"])
