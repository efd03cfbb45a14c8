"""Several vectors made into one: algebra, operators through the whole engine, recipes, proofs.

Expected values come from loops over whole models in float64 (`by_hand`), never from skillvec.
"""

import json
import math
import shlex
import shutil
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
import xxhash
from click.testing import CliRunner, Result
from families import assert_same_bits, load, perturbed, save, toy

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.ops.merge_methods import OPERATORS
from skillvec.vectors.recipe import Recipe, Rule, Share, parse_recipe, read_recipe

BLOCK = 1 << 20
LAYER = "model.layers.{}.mlp.up_proj.weight"


class World(NamedTuple):
    """Folders of models, vector files by codec and name, and what they hold as float64.

    The vectors "small" leave out the tensor of many blocks.
    """

    folder: Path
    target: Path
    pairs: dict[str, str]
    files: dict[str, dict[str, Path]]
    deltas: dict[str, list[np.ndarray]]  # by tensor: one array a vector, in the order a, b, c


def models() -> dict[str, dict[str, torch.Tensor]]:
    """Return a base and three fine-tuned models: sparse, dense and in fp32.

    One tensor has more values than a block, one is F64, one empty, one of integers.
    """
    base = toy(0, layers=3) | {
        LAYER.format(1): torch.randn(1025, 1024, generator=torch.manual_seed(5)).bfloat16() * 0.05,
        "odd.weight": torch.randn(7, 5, dtype=torch.float64, generator=torch.manual_seed(6)),
        "empty.weight": torch.zeros(0, 8),
        "position_ids": torch.arange(6),
    }
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in base.items()}
    return {
        "base": base,
        "a": perturbed(base, 1, density=0.2),
        "b": perturbed(base, 2),
        "c": perturbed(wide, 3),
        "target": perturbed(base, 4),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tensors = models()
    for name, model in tensors.items():
        save(folder / name, model, shards=2 if name == "target" else 1)
    pairs = {name: f"{folder / name}::{folder / 'base'}" for name in "abc"}
    files: dict[str, dict[str, Path]] = {}
    for name, form in product("abc", ("dense", "sparse", "packed", "small")):
        file, codec = folder / f"{name}-{form}.safetensors", form.replace("small", "packed")
        left_out = [LAYER.format(1)] if form == "small" else []
        sv.diff(folder / name, folder / "base", file, codec=codec, exclude=left_out)
        files.setdefault(form, {})[name] = file
    deltas = {}
    for name, tensor in tensors["base"].items():
        if tensor.is_floating_point():
            dtype = "F64" if tensor.dtype == torch.float64 else "F32"
            exact = [oracle.delta(tensors[side][name], tensor) for side in "abc"]
            deltas[name] = [oracle.wide(oracle.round_to(values, dtype)) for values in exact]
    return World(folder, folder / "target", pairs, files, deltas)


def values_of(vector: sv.SkillVector | Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the deltas of a vector as the official library reads them; zeros are not stored."""
    plain = tmp_path / "plain.safetensors"
    manifest = sv.combine(vector, output=plain, codec="dense", force=True).manifest
    held = load(plain)
    dtypes = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}
    return {
        name: held.get(name, torch.zeros(entry["shape"], dtype=dtypes[entry["dtype"]]))
        for name, entry in manifest["tensors"].items()
    }


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -------------------------------------------------------------------- operators on whole models

Deltas = dict[str, list[np.ndarray]]


def bounds(values: np.ndarray, given: dict[str, Any]) -> tuple[float, float]:
    """Return the smallest and the largest fp32 magnitude to keep, by sorting them all."""
    size = np.abs(values.astype(np.float32))
    ordered = np.sort(size[size > 0])[::-1]
    count = ordered.size if given.get("density_of", "nonzero") == "nonzero" else size.size
    first = math.floor(Fraction(str(given.get("gamma", 0))) * count)
    last = min(first + math.ceil(Fraction(str(given["density"])) * count), ordered.size)
    return (ordered[last - 1], ordered[first]) if first < ordered.size else (np.inf, np.inf)


def kept(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    size = np.abs(values.astype(np.float32))
    return np.where((size >= limits[0]) & (size <= limits[1]), values, 0.0)


def chances(seed: int, stream: str, name: str, numel: int) -> np.ndarray:
    """Return the random number of each position of a tensor, in [0, 1)."""
    key = np.frombuffer(xxhash.xxh3_128_digest(f"{seed}:{stream}:{name}".encode()), "<u8")
    raw = np.random.Philox(key=key).random_raw(-(-numel // 2))
    return raw.astype("<u8").view("<u4")[:numel] / 2.0**32


def probabilities(values: np.ndarray, given: dict[str, Any]) -> np.ndarray:
    """Return DELLA's probability of each value: by its rank among the upper halves of fp32."""
    half = np.abs(values.astype(np.float32)).view(np.uint32) >> 16
    among = half if given.get("density_of") == "all" else half[values != 0]
    equal = np.bincount(among, minlength=1 << 16)
    below = np.cumsum(equal) - equal
    rank = (below[half] + (equal[half] - 1) / 2) / max(among.size - 1, 1)
    if among.size == 1:
        rank = np.full(half.size, 0.5)
    return np.where(
        values != 0, given["density"] - given["epsilon"] + 2 * given["epsilon"] * rank, 1.0
    )


def total(products: np.ndarray) -> Fraction:
    """Return a sum of float64 values to twice their precision."""
    items = products[products != 0].tolist()
    near = math.fsum(items)
    return Fraction(near) + Fraction(math.fsum([*items, -near]))


def coefficients(vectors: Sequence[np.ndarray]) -> list[float]:
    """Return what of the other two lies in the first: the normal equations by Cramer's rule."""
    v, x, y = vectors
    xx, xy, yy, xv, yv = (total(p * q) for p, q in ((x, x), (x, y), (y, y), (x, v), (y, v)))
    determinant = xx * yy - xy * xy
    if not determinant:  # one is zero, or both point the same way
        return [float(xv / xx) if xx else 0.0, float(yv / yy) if yy and not xx else 0.0]
    return [float((xv * yy - yv * xy) / determinant), float((yv * xx - xv * xy) / determinant)]


def elected(terms: list[np.ndarray], weights: Sequence[float], mean: bool) -> np.ndarray:
    sign = np.sign(summed(terms))
    agree = [np.where(term * sign > 0, term, 0.0) for term in terms]
    mass = summed([abs(w) * (term * sign > 0) for w, term in zip(weights, terms, strict=True)])
    return summed(agree) / np.where(mass > 0, mass, 1.0) if mean else summed(agree)


def summed(terms: Sequence[np.ndarray]) -> np.ndarray:
    sums = np.zeros(terms[0].size)
    for term in terms:
        sums = sums + term
    return sums


def by_hand(
    op: str, deltas: Deltas, weights: Sequence[float], given: dict[str, Any],
    streams: Sequence[str] = (), seed: int = 0,
) -> Deltas:  # fmt: skip
    """Merge the vectors of a whole model: every operator as its paper has it, in float64."""
    given = dict(OPERATORS[op].defaults) | given  # test_merge_methods.py holds the defaults
    whole = [np.concatenate(parts) for parts in zip(*deltas.values(), strict=True)]
    across = given.get("scope") == "vector"
    measured = {
        "ties": lambda vectors: [bounds(v, given) for v in vectors],
        "breadcrumbs": lambda vectors: [bounds(v, given) for v in vectors],
        "sparsify": lambda vectors: [bounds(v, given) for v in vectors],
        "orthogonal": coefficients,
    }.get(op, lambda vectors: None)
    known = measured(whole) if across else None
    out = {}
    for name, vectors in deltas.items():
        parts, found = vectors, known if across else measured(vectors)
        if op in ("ties", "breadcrumbs", "sparsify"):
            parts = [kept(v, limits) for v, limits in zip(vectors, found, strict=True)]
        if op == "ram":
            parts = [np.where(np.abs(v) > given["threshold"], v, 0.0) for v in vectors]
        if op.startswith("dare"):
            parts = [
                np.where(chances(seed, stream, name, v.size) < given["density"],
                         v / given["density"], 0.0)
                for v, stream in zip(vectors, streams, strict=True)
            ]  # fmt: skip
        if op == "della":
            rates = [probabilities(v, given) for v in vectors]
            parts = [
                np.where(chances(seed, stream, name, v.size) < rate, v / rate, 0.0)
                for v, rate, stream in zip(vectors, rates, streams, strict=True)
            ]
        if op == "sparsify":
            norms = [[total(v * v) for v in side] for side in (vectors, parts)]
            ratios = [math.sqrt(v / p) if p else 1.0 for v, p in zip(*norms, strict=True)]
            parts = [part * ratio for part, ratio in zip(parts, ratios, strict=True)]
        terms = [weight * part for weight, part in zip(weights, parts, strict=True)]
        if op in ("ties", "dare_ties", "della"):
            out[name] = elected(terms, weights, given["normalize"])
        elif op == "ram":
            out[name] = summed(terms) / np.maximum(summed([term != 0 for term in terms]), 1)
        elif op == "orthogonal":
            first, second = found
            out[name] = weights[0] * (vectors[0] - first * vectors[1] - second * vectors[2])
        else:
            out[name] = summed(terms)
    return out


WEIGHTS = (0.7, -0.3, 0.45)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.07, "scope": "tensor", "normalize": False, "density_of": "all"}),
    ("dare_linear", {"density": 0.4}),
    ("dare_ties", {"density": 0.5, "normalize": False}),
    ("della", {"density": 0.5, "epsilon": 0.2}),
    ("della", {"density": 0.5, "epsilon": 0.4, "density_of": "all"}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.05}),
    ("ram", {"threshold": 2.0**-11}),
    ("sparsify", {"density": 0.25}),
    ("orthogonal", {}),
    ("orthogonal", {"scope": "vector"}),
]
case = pytest.mark.parametrize(
    "op,given", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)


def test_every_operator_is_tried_here() -> None:
    """Those of two vectors stand below, fisher with its files in tests/vectors/test_fishers.py,
    those of whole matrices in test_matrix_operators.py.
    """
    assert {op for op, _ in CASES} | {"slerp", "nuslerp", "fisher"} == {
        name for name, method in OPERATORS.items() if not method.of_matrices
    }


@pytest.mark.parametrize(("op", "scope"), [("slerp", "tensor"), ("nuslerp", "vector")])
def test_two_vectors_on_an_arc(op: str, scope: str, world: World, tmp_path: Path) -> None:
    """Tensors of many blocks, empty ones and zeros; any number of threads, and proven."""
    files, weights = list(world.files["packed"].values())[:2], WEIGHTS[:2]
    given = {"scope": scope}
    made = sv.combine(*files, weights=weights, op=op, parameters=given)
    outs = [tmp_path / f"{workers}.safetensors" for workers in (1, 3)]
    for workers, out in zip((1, 3), outs, strict=True):
        made.save(out, workers=workers, codec="dense")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    sv.verify(outs[0])
    pair = {name: vectors[:2] for name, vectors in world.deltas.items()}
    whole = [np.concatenate(parts) for parts in zip(*pair.values(), strict=True)]

    def angle_of(a: np.ndarray, b: np.ndarray) -> float:
        norms = math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b))
        return math.acos(np.dot(a, b) / norms) if norms else math.pi / 2

    across = angle_of(*whole)
    for name, found in values_of(outs[0], tmp_path).items():
        angle = across if scope == "vector" else angle_of(*pair[name])
        shares = [math.sin(w / sum(weights) * angle) / math.sin(angle) for w in weights]
        right = shares[0] * pair[name][0] + shares[1] * pair[name][1]
        np.testing.assert_allclose(found.numpy().reshape(-1), right, rtol=2e-7, atol=1e-12)
    with pytest.raises(sv.UsageError, match=f"{op} takes 2 vectors, found 3"):
        sv.combine(*files, files[0], op=op)
    with pytest.raises(sv.UsageError, match="the weights 1 and -1 add up to 0"):
        sv.combine(*files, weights=[1, -1], op=op)


@case
def test_an_operator_does_what_its_paper_says_on_a_whole_model(
    op: str, given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """Multi-block, F64, empty and zero tensors; any codec of the parts, any number of threads."""
    options = {"weights": WEIGHTS, "op": op, "parameters": given, "seed": 11}
    parts = [sv.SkillVector.open(file) for file in world.files["packed"].values()]
    streams = [part.manifest["identity"] for part in parts]
    expected = by_hand(op, world.deltas, WEIGHTS, given, streams, 11)
    made = {}
    for form, workers in (("dense", 1), ("sparse", 2), ("packed", 5), ("pairs", 2)):
        refs = (world.pairs if form == "pairs" else world.files[form]).values()
        out = tmp_path / f"{form}.safetensors"
        made[form] = sv.combine(*refs, **options, output=out, workers=workers, codec="dense")
    shapes = {name: entry["shape"] for name, entry in made["dense"].manifest["tensors"].items()}
    assert set(shapes) == set(expected)
    found = values_of(made["dense"], tmp_path)
    for name, values in expected.items():
        dtype = "F64" if name == "odd.weight" else "F32"
        right = oracle.round_to(values + 0.0, dtype).reshape(shapes[name])
        assert_same_bits({name: found[name]}, {name: right})
    assert sum(int(np.count_nonzero(values)) for values in expected.values()) > 10_000
    for form in ("sparse", "packed", "pairs"):
        assert made[form].manifest["tensors"] == made["dense"].manifest["tensors"], form
        assert made[form].manifest["identity"] == made["dense"].manifest["identity"], form


@case
def test_combining_within_apply_gives_the_bytes_of_combining_before(
    op: str, given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """Whatever tensors the target leaves out: what is measured is the vectors."""
    refs = list(world.files["packed" if op in ("ties", "sparsify") else "small"].values())
    combo = sv.combine(*refs, weights=WEIGHTS, op=op, parameters=given, seed=11)
    stored = combo.save(tmp_path / "c.safetensors")
    for number, options in enumerate(
        ({}, {"exclude": ["*.1.*", "lm_head*"], "rounding": "stochastic", "lam": 0.6})
    ):
        report = sv.apply(world.target, combo, tmp_path / f"once{number}", **options, seed=11)
        sv.apply(world.target, stored, tmp_path / f"twice{number}", **options, seed=11)
        assert_same_bits(tmp_path / f"once{number}", tmp_path / f"twice{number}")
        assert report.facts["verdict"] == "same family" and report.counts["applied"] > 5
    assert sv.verify(tmp_path / "once1").facts["verified"]
    if op == "ties":
        words = [f"{ref}={weight}" for ref, weight in zip(refs, WEIGHTS, strict=True)]
        params = [word for item in given.items() for word in ("--param", "{}={}".format(*item))]
        result = run("apply", world.target, *words, "--op", op, *params, "--seed", 11, "-o",
                     tmp_path / "cli")  # fmt: skip
        assert result.exit_code == 0, result.output
        assert contents(tmp_path / "cli") == contents(tmp_path / "once0")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_the_same_whatever_the_number_of_threads(world: World, tmp_path: Path) -> None:
    combo = sv.combine(*world.files["sparse"].values(), op="ties", parameters={"density": 0.3})
    for workers in (1, 2, 5):
        combo.save(tmp_path / f"{workers}.safetensors", workers=workers)
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(files) == 3 and files[0] == files[1] == files[2]


def test_a_combination_with_itself_is_measured_once(world: World) -> None:
    """Two deltas of one job, or two jobs, may be the same combination."""
    refs = [world.files["packed"][name] for name in "ab"]
    for op, given in (("ties", {"scope": "tensor"}), ("orthogonal", {"scope": "vector"})):
        combo = sv.combine(*refs, op=op, parameters=given)
        alone = sv.orthogonality(combo, refs[0], workers=1).facts["pairs"][0]
        for _ in range(2):
            report = sv.orthogonality(combo, -2 * combo, workers=5)
            (pair,) = report.facts["pairs"]
            assert pair["overall"]["norm_a"] == alone["overall"]["norm_a"]
            assert pair["overall"]["cosine"] == pytest.approx(-1, abs=1e-7)


def test_only_some_tensors_compared_are_measured_over_all(world: World, tmp_path: Path) -> None:
    parts = list(world.files["packed"].values())
    combo = sv.combine(*parts, op="orthogonal", parameters={"scope": "vector"})
    stored = combo.save(tmp_path / "c.safetensors")
    sides = [
        sv.orthogonality(side, parts[0], include=["*.2.*"]).facts["pairs"][0]["tensors"]
        for side in (combo, stored)
    ]
    for left, right in zip(*sides, strict=True):
        assert left["norm_a"] == right["norm_a"], left["name"]


# ---------------------------------------------------------------------------------- the algebra


@pytest.fixture
def small(family, tmp_path: Path) -> tuple[sv.SkillVector, sv.SkillVector, Path]:
    """Return two stored vectors of one base, and a folder to write to."""
    a = sv.diff(family.tuned, family.base, tmp_path / "a.safetensors")
    b = sv.diff(family.sft, family.base, tmp_path / "b.safetensors")
    return a, b, tmp_path


def test_a_sum_is_computed_where_it_is_used(family, small) -> None:
    """0.7 a - 0.3 b: lazily, stored and as one word of sv.combine, the same numbers and bytes."""
    a, b, folder = small
    lazily = 0.7 * a - 0.3 * b
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]
    stored = lazily.save(folder / "c.safetensors")
    base, tuned, sft = (load(path) for path in (family.base, family.tuned, family.sft))
    found = values_of(stored, folder)
    for name, tensor in base.items():
        exact = 0.7 * oracle.delta(tuned[name], tensor) + -0.3 * oracle.delta(sft[name], tensor)
        assert_same_bits(
            {name: found[name]}, {name: oracle.round_to(exact + 0.0, "F32").reshape(tensor.shape)}
        )
    for number, vector in enumerate((lazily, stored, sv.combine(a, b, weights=[0.7, -0.3]))):
        sv.apply(family.target, vector, folder / str(number), lam=0.5)
        assert_same_bits(folder / str(number), folder / "0")
    merged = load(folder / "0")
    for name, tensor in load(family.target).items():
        assert_same_bits(
            {name: merged[name]}, {name: oracle.apply(tensor, oracle.wide(found[name]), 0.5)}
        )


def same_values(left: sv.SkillVector, right: sv.SkillVector, folder: Path) -> None:
    found = [values_of(side.save(folder / "s.safetensors", force=True), folder)
             for side in (left, right)]  # fmt: skip
    assert_same_bits(*found)


def test_laws_of_sums(small) -> None:
    a, b, folder = small
    same_values(a + b, b + a, folder)
    same_values(2 * (a - b), 2 * a - 2 * b, folder)
    same_values(-(a + 0.5 * b), -a - 0.5 * b, folder)
    same_values((a + b) / 4, 0.25 * a + b / 4, folder)
    same_values(sum([a, b]), a + b, folder)
    c = -a
    for grouped in ((a + b) + c, a + (b + c)):
        assert [part.ref for part in grouped.parts] == [a.ref, b.ref, a.ref]
        assert [share.weight for share in grouped.recipe.shares] == [1, 1, -1]
        assert not any(part.parts for part in grouped.parts)
    three = 0.5 * (2 * (a + b) - c) + b
    assert [share.weight for share in three.recipe.shares] == [1, 1, 0.5, 1]
    again = sv.combine(2 * a, b, weights=[3, 1]) + sv.combine(b)
    assert [share.weight for share in again.recipe.shares] == [6, 1, 1]
    ruled = (Rule("*", 0.5), Rule("*.layers.*", (0.0, 1.0)))
    share = Share(a.ref, 3.0, {}, ruled)
    doubled = sv.SkillVector.combined([2 * a], Recipe("linear", (share,))).recipe.shares[0]
    assert doubled.weight == 6 and [rule.weight for rule in doubled.rules] == [1, (0, 2)]


def test_nothing_is_left_of_a_minus_a(family, small) -> None:
    a, b, folder = small
    for number, nothing in enumerate((a - a, 0 * a, 0 * (a + b), 0 * a + 0.0 * b)):
        stored = nothing.save(folder / f"{number}.safetensors")
        entries = stored.manifest["tensors"].values()
        assert {(e["codec"], e["changed"], e["norm"]) for e in entries} == {("zero", 0, 0)}
        for vector in (nothing, stored):
            sv.apply(family.target, vector, folder / "out", force=True)
            assert_same_bits(folder / "out", family.target)


@pytest.mark.parametrize("factor", [-1, 0.25, np.float32(0.25), np.float64(-3), Fraction(1, 2)])
def test_any_real_number_is_a_factor(factor: Any, small) -> None:
    a, _, _ = small
    assert (factor * a).scale == (a * factor).scale == float(factor)
    assert (-a).scale == -1 and (a / 4).scale == 0.25
    assert a.scale == 1  # untouched


def test_what_has_no_meaning_is_a_type_error_that_says_what_to_do(family, small) -> None:
    a, b, folder = small
    model = sv.open_checkpoint(family.target)
    ties = sv.combine(a, b, op="ties")
    ruled = sv.combine(recipe={"vectors": [
        {"vector": a.ref, "rules": [{"match": "*.layers.*", "weight": [0, 1]}]}]})  # fmt: skip
    refused: dict[str, Callable[[], object]] = {
        r"skillvec\.apply\(": lambda: a + model,
        r"apply\(checkpoint, vector, output\)": lambda: model + a,
        "only a vector can be subtracted": lambda: a - model,
        r"apply\(model, vector, output\)": lambda: a + "b.safetensors",
        "by a finite number only": lambda: a * b,
        "finite number": lambda: a * "2",
        "finite": lambda: float("nan") * a,
        "finite ": lambda: a * float("inf"),
        r"vector / 0: expected a number that is not 0": lambda: a / 0,
        r"vector / '2'": lambda: a / "2",
        r"vector \+ int: ": lambda: 1 + a,
        "save it as it is first": lambda: ties + a,
        "not a plain sum": lambda: a - ties,
        "a plain sum": lambda: ruled + b,
        "cannot be combined again as it is: save it": lambda: sv.combine(ties, a),
    }
    for words, action in refused.items():
        with pytest.raises(TypeError, match=words):
            action()
    assert not any(path.suffix != ".safetensors" for path in folder.iterdir())


def test_a_factor_that_overflows_is_refused(family, small) -> None:
    a, b, folder = small
    with pytest.raises(sv.UsageError, match="overflows"):
        1e200 * (1e200 * a)
    with pytest.raises(sv.UsageError, match="finite number that fp32 can hold"):
        sv.apply(family.target, 1e200 * a, folder / "out")
    with pytest.raises(sv.SkillvecError, match="range of"):
        sv.apply(family.target, 1e200 * a + b, folder / "out")
    with pytest.raises(sv.UsageError, match=r"vectors\[0\]\.weight"):
        sv.combine(1e200 * a, b, weights=[1e200, 1])
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_factor_can_be_saved(family, small) -> None:
    """What works for apply works for save: the factor is folded into what is stored."""
    a, b, folder = small
    pair = sv.diff(family.sft, family.base)
    for number, vector in enumerate((3 * pair, 2 * a, -2 * (a - 0.5 * pair))):
        stored = vector.save(folder / f"{number}.safetensors")
        for name, side in (("lazily", vector), ("stored", stored)):
            sv.apply(family.target, side, folder / name, dtype="fp32", force=True)
        left, right = load(folder / "lazily"), load(folder / "stored")
        for name, tensor in left.items():  # one rounding more, of the scaled value to fp32
            np.testing.assert_allclose(tensor, right[name], rtol=0, atol=1e-7)
        assert sv.verify(stored.stored.path).facts["verified"]
    with pytest.raises((TypeError, sv.UsageError), match="save it as it is first"):
        (2 * sv.combine(a, b, op="ties")).save(folder / "ties.safetensors")


def test_stored_vectors_and_pairs_mix(family, small) -> None:
    a, b, folder = small
    pair = sv.diff(family.sft, family.base)
    same_values(a - 2 * pair, a - 2 * b, folder)
    sv.apply(family.target, 0.5 * pair + a, folder / "mixed")
    sv.apply(family.target, 0.5 * b + a, folder / "stored")
    assert_same_bits(folder / "mixed", folder / "stored")
    assert sv.verify(folder / "mixed").facts["verified"]


def test_what_a_pair_leaves_out_stays_out_of_the_proof(family, small) -> None:
    """A difference that was never stored has its filters in the recipe alone."""
    a, b, folder = small
    pair = sv.diff(family.sft, family.base, exclude=["*.bias", "lm_head*"])
    assert pair.manifest["identity"] != b.manifest["identity"]
    for number, vector in enumerate((pair, a + pair)):
        sv.apply(family.target, vector, folder / str(number))
        assert sv.verify(folder / str(number)).facts["verified"]
    stored = (a + pair).save(folder / "c.safetensors")
    assert sv.verify(stored.stored.path).facts["verified"]


def test_angles_of_combinations(family, small) -> None:
    """|x a + y b|^2 = x^2 aa + 2 x y ab + y^2 bb, summed over float64 values."""
    a, b, folder = small
    base, tuned, sft = (load(path) for path in (family.base, family.tuned, family.sft))
    rows = [
        np.concatenate([oracle.delta(side[name], base[name]) for name in base])
        for side in (tuned, sft)
    ]
    aa, ab, bb = rows[0] @ rows[0], rows[0] @ rows[1], rows[1] @ rows[1]
    lazily = 0.7 * a - 0.3 * b
    for combo in (lazily, lazily.save(folder / "c.safetensors")):
        pairs = sv.orthogonality(combo, a, 3 * (a + b)).facts["pairs"]
        norms = [math.sqrt(x * x * aa + 2 * x * y * ab + y * y * bb)
                 for x, y in ((0.7, -0.3), (1, 0), (3, 3))]  # fmt: skip
        dots = [0.7 * aa - 0.3 * ab, 3 * (0.7 * aa + 0.4 * ab - 0.3 * bb), 3 * (aa + ab)]
        for pair, (i, j), dot in zip(pairs, ((0, 1), (0, 2), (1, 2)), dots, strict=True):
            row = pair["overall"]
            assert row["cosine"] == pytest.approx(dot / norms[i] / norms[j], abs=2e-6)
            assert row["norm_a"] == pytest.approx(norms[i], rel=2e-6)
            assert row["norm_b"] == pytest.approx(norms[j], rel=2e-6)
    report = sv.orthogonality(lazily, 2 * a)
    assert report.facts["vectors"][1] == f"2*{a.ref}"
    assert a.ref in report.facts["vectors"][0] and "0.7" in report.facts["vectors"][0]
    assert report.facts["lineage"] == ["BF16 - BF16", "BF16 - BF16"]
    fp32 = save(folder / "fp32", {name: tensor.float() for name, tensor in tuned.items()})
    mixed = a + sv.diff(fp32, family.base)
    assert sv.orthogonality(mixed, lazily.save(folder / "d.safetensors")).facts["lineage"] == [
        "BF16 - BF16, F32 - BF16", "BF16",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- sv.combine


def test_arguments_of_combine_are_checked(family, small) -> None:
    a, b, folder = small
    file = folder / "r.json"
    file.write_text(json.dumps({"vectors": [{"vector": a.ref}]}))
    refused: dict[str, tuple[tuple, dict[str, Any]]] = {
        "at least one vector": ((), {}),
        "2 vectors, but 1 weights": ((a, b), {"weights": [1]}),
        "expected one of linear, ties": ((a, b), {"op": "slurp"}),
        "no parameter 'density'": ((a, b), {"parameters": {"density": 0.5}}),
        "give it alone": ((a,), {"recipe": file}),
        "give it alone|seed": ((), {"recipe": file, "seed": 5}),
        "codec 'zip'": ((a, b), {"output": folder / "c.safetensors", "codec": "zip"}),
        "weight": ((a, b), {"weights": [float("nan"), 1]}),
        "no such recipe": ((), {"recipe": folder / "absent.yaml"}),
        "codec is of no use without output": ((a, b), {"codec": "packed"}),
    }
    for words, (vectors, options) in refused.items():
        with pytest.raises((sv.UsageError, TypeError), match=words):
            sv.combine(*vectors, **options)
    with pytest.raises((TypeError, sv.UsageError), match="wieghts"):
        sv.combine(a, b, wieghts=[0.7, -0.3])
    assert not (folder / "c.safetensors").exists()


def test_one_vector_is_written_again_with_another_codec(world: World, tmp_path: Path) -> None:
    for name, (codec, other) in zip("abc", product(("dense", "packed"), ("sparse",)), strict=False):
        again = sv.combine(world.files[codec][name], output=tmp_path / f"{name}.st.safetensors",
                           codec=other)  # fmt: skip
        right = sv.SkillVector.open(world.files[other][name])
        assert again.manifest["tensors"] == right.manifest["tensors"]
        for key in ("identity", "formula", "base", "tuned", "exactness", "equal", "dtype", "side"):
            assert again.manifest[key] == right.manifest[key], key
        assert sv.verify(again.stored.path).facts["verified"]


def test_a_sum_alone_is_that_sum(small) -> None:
    a, b, folder = small
    for vector in (sv.combine(a + b), sv.combine(a + b, weights=[0.5])):
        assert vector.parts
    sv.combine(0.5 * (a + b), output=folder / "c.safetensors")
    same_values(sv.SkillVector.open(folder / "c.safetensors"), 0.5 * a + 0.5 * b, folder)


def test_the_manifest_tells_where_a_combination_comes_from(family, small) -> None:
    a, b, folder = small
    options = {"op": "ties", "parameters": {"density": 0.5}, "seed": 3, "weights": [0.7, -0.3]}
    manifest = sv.combine(a, b, **options, output=folder / "c.safetensors", method="merged",
                          notes="of two", license="MIT").manifest  # fmt: skip
    for parent, vector, tuned in zip(manifest["parents"], (a, b), (family.tuned, family.sft),
                                     strict=True):  # fmt: skip
        wanted = {
            "ref": vector.ref, "identity": vector.manifest["identity"],
            "manifest": vector.stored.digest, "base": str(family.base), "tuned": str(tuned),
        }  # fmt: skip
        assert wanted.items() <= parent.items()
    assert manifest["tuned"] is None and manifest["base"]["ref"] == str(family.base)
    assert manifest["base"]["probe"] == a.manifest["base"]["probe"] is not None
    assert manifest["recipe"] == {
        "op": "ties", "parameters": {"density": 0.5}, "seed": 3,
        "vectors": [{"vector": a.ref, "weight": 0.7}, {"vector": b.ref, "weight": -0.3}],
    }  # fmt: skip
    assert manifest["exactness"]["claim"] == "combined"
    assert manifest["training"] == {"method": "merged", "notes": "of two"}
    assert manifest["license"] == "MIT"
    again = sv.combine(a, b, **options)
    assert again.manifest["identity"] == manifest["identity"]
    for key, value in (("seed", 4), ("weights", [0.7, 0.3]), ("parameters", {"density": 0.4})):
        other = sv.combine(a, b, **options | {key: value})
        assert other.manifest["identity"] != manifest["identity"], key


def test_the_licence_of_parents_that_agree_is_kept(family, tmp_path: Path) -> None:
    for name, licence in (("a", "MIT"), ("b", "MIT"), ("c", "apache-2.0")):
        sv.diff(family.sft, family.base, tmp_path / f"{name}.safetensors", license=licence)
    a, b, c = (sv.SkillVector.open(tmp_path / f"{name}.safetensors") for name in "abc")
    assert (a + b).manifest["license"] == "MIT"
    assert (a + c).manifest["license"] is None


def test_vectors_of_different_bases_have_no_exact_base(family, small) -> None:
    a, b, folder = small
    other = save(folder / "other", perturbed(load(family.base), 9))
    c = sv.diff(family.sft, other, folder / "c.safetensors")
    for vector in (a + c, (a + c).save(folder / "d.safetensors")):
        assert vector.manifest["base"]["probe"] is None
        for target in (family.base, other):
            report = sv.apply(target, vector, folder / "out", force=True)
            assert report.facts["verdict"] == "same family" and not report.warnings
    for vector in (a + b, (a + b).save(folder / "e.safetensors")):
        report = sv.apply(family.base, vector, folder / "out", force=True)
        assert report.facts["verdict"] == "exact base"
        assert not any("differs from it" in warning for warning in report.warnings)


def test_an_exact_base_is_one_of_all_parents_to_the_last_byte(tmp_path: Path) -> None:
    """Probes are of 4 KiB; where digests of whole tensors are known they have the last word."""
    base = {"w": torch.randn(300, 300, generator=torch.manual_seed(0)).bfloat16()}
    near = {"w": base["w"].clone()}
    near["w"][0, 0] += 1
    for name, model in (("base", base), ("near", near), ("tuned", perturbed(base))):
        save(tmp_path / name, model)
    a, b, c = (
        sv.diff(tmp_path / tuned, tmp_path / other, tmp_path / f"{tuned}-{other}.safetensors")
        for tuned, other in (("tuned", "base"), ("near", "base"), ("tuned", "near"))
    )
    for vector, target, verdict in (
        (a + b, "base", "exact base"), (a + b, "near", "same family"),
        (a + c, "base", "same family"),
    ):  # fmt: skip
        report = sv.apply(tmp_path / target, vector, tmp_path / "out", force=True)
        assert report.facts["verdict"] == verdict, (vector.ref, target)
        assert any("differs from it" in w for w in report.warnings) == (target == "near")


def test_a_stored_dtype_is_one_rounding_more_and_never_infinite(family, small) -> None:
    a, b, folder = small
    wide = values_of((a + b).save(folder / "wide.safetensors"), folder)
    for dtype, kind in (("bf16", "BF16"), ("fp16", "F16"), ("fp64", "F64")):
        stored = (a + b).save(folder / f"{dtype}.safetensors", dtype=dtype, codec="dense")
        assert {e["dtype"] for e in stored.manifest["tensors"].values()} == {kind}
        held = load(stored.stored.path)
        for name, tensor in wide.items():
            right = oracle.round_to(oracle.wide(tensor), kind).reshape(tensor.shape)
            assert_same_bits({name: held[name]}, {name: right})
        assert sv.verify(stored.stored.path).facts["verified"]
    huge = {name: 1e7 * tensor.float() for name, tensor in load(family.base).items()}
    save(folder / "huge", huge)
    save(folder / "none", {name: 0 * tensor for name, tensor in huge.items()})
    far = sv.diff(folder / "huge", folder / "none")
    with pytest.raises(sv.SkillvecError, match="range"):
        (far + far).save(folder / "far.safetensors", dtype="fp16")
    assert not (folder / "far.safetensors").exists()


def test_a_combination_in_shards_is_the_same_vector(family, small) -> None:
    a, b, folder = small
    one = sv.combine(a, b, op="ties", output=folder / "one.safetensors")
    result = run("combine", a.ref, b.ref, "--op", "ties", "--max-shard-size", "9KB", "-o",
                 folder / "many.safetensors", "-q")  # fmt: skip
    assert result.exit_code == 0 and (folder / "many.safetensors").is_dir(), result.output
    many = sv.SkillVector.open(folder / "many.safetensors")
    assert len(many.stored.files) > 2
    assert many.manifest["identity"] == one.manifest["identity"]
    assert_same_bits(values_of(many, folder), values_of(one, folder))
    assert sv.verify(folder / "many.safetensors").facts["verified"]
    for name, vector in (("once", many - a), ("twice", one - a)):
        sv.apply(family.target, vector, folder / name)
        assert sv.verify(folder / name).facts["verified"]
    assert_same_bits(folder / "once", folder / "twice")


def test_a_dtype_is_kept_or_refused_never_only_noted(family, small) -> None:
    """Of a pair it is as of diff; the values of a stored vector are what they are."""
    a, _, folder = small
    right = sv.diff(family.sft, family.base, folder / "r.safetensors", dtype="bf16").manifest
    pair = sv.diff(family.sft, family.base, dtype="bf16")
    assert right["exactness"]["claim"] == "rounded" and right["dtype"] == "bf16"
    for number, options in enumerate(({}, {"dtype": "bf16"})):
        assert pair.save(folder / f"{number}.safetensors", **options).manifest == right
    for vector in (a, pair, sv.diff(family.sft, family.base)):
        with pytest.raises(sv.UsageError, match="dtype fp32"):
            vector.save(folder / "x.safetensors", dtype="fp32")
    result = run("combine", a.ref, "--dtype", "bf16", "-o", folder / "x.safetensors")
    assert result.exit_code == 2 and "dtype bf16" in result.stderr


def test_the_command_in_a_manifest_gives_these_bytes(family, small) -> None:
    a, b, folder = small
    recipe = folder / "r.yaml"
    recipe.write_text(f"vectors:\n- vector: {a.ref}\n  rules:\n  - {{match: '*', weight: 2}}\n")
    pair = sv.diff(family.sft, family.base, exclude=["*.bias"])
    made = [
        sv.combine(a, b, weights=[0.7, -0.3], output=folder / "0.safetensors"),
        sv.combine(a, b, op="dare_ties", parameters={"density": 0.5, "normalize": False}, seed=4,
                   output=folder / "1.safetensors", codec="sparse", license="MIT"),
        sv.combine(recipe=recipe, output=folder / "2.safetensors"),
        pair.save(folder / "3.safetensors"),
        a.save(folder / "4.safetensors", codec="dense", notes="two words"),
        (0.5 * a).save(folder / "5.safetensors"),
        sv.combine(f"{family.sft}::{family.base}", a, output=folder / "6.safetensors",
                   dtype="bf16", max_shard_size="1GB"),
    ]  # fmt: skip
    for vector in made:
        program, *words = shlex.split(vector.manifest["command"])
        assert program == "skillvec"
        # RECIPE is in the manifest, so the vector itself will do
        words = [str(vector.stored.path) if word == "RECIPE" else word for word in words]
        result = run(*words, "-o", folder / "again.safetensors", "--force")
        assert result.exit_code == 0, (vector.manifest["command"], result.output)
        assert (folder / "again.safetensors").read_bytes() == vector.stored.path.read_bytes()


# ---------------------------------------------------------------------------------- what is missing


def test_left_out_of_one_parent_is_zero_there(family, small) -> None:
    """A tensor that one vector excluded is what the others make of it; of all, it stays out."""
    a, b, folder = small
    some = sv.diff(family.sft, family.base, folder / "s.safetensors",
                   exclude=["*.bias", "lm_head*"])  # fmt: skip
    rest = sv.diff(family.tuned, family.base, folder / "r.safetensors", exclude=["*.bias"])
    bias = {name for name in toy() if name.endswith(".bias")}
    found = values_of((a + some).save(folder / "c.safetensors"), folder)
    alone = values_of((1.0 * a + 0 * b).save(folder / "d.safetensors"), folder)
    both = values_of((a + b).save(folder / "e.safetensors"), folder)
    for name, tensor in found.items():
        right = alone if name in bias | {"lm_head.weight"} else both
        assert_same_bits({name: tensor}, {name: right[name]})
    stored = (rest + some).save(folder / "f.safetensors")
    assert set(stored.deltas) == set(toy()) - bias
    assert set(stored.manifest["excluded"]) == bias
    report = sv.apply(family.target, rest + some, folder / "out")
    assert report.counts["passed through"] == len(bias)
    assert sv.verify(folder / "out").facts["verified"]


def within(seconds: float, action: Callable[[], object]) -> None:
    """Fail rather than hang."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "still at work"


def test_tensors_of_no_values(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64)):
        base = {"w": torch.ones(3, dtype=dtype), "empty": torch.zeros(2, 0, dtype=dtype)}
        tuned = base | {"w": base["w"] + 1}
        for name, model in (("base", base), ("tuned", tuned)):
            save(tmp_path / f"{name}{number}", model)
        vector = sv.diff(tmp_path / f"tuned{number}", tmp_path / f"base{number}",
                         tmp_path / f"{number}.safetensors")  # fmt: skip
        for op in ("linear", "ties", "della", "sparsify", "orthogonal"):
            combo = sv.combine(vector, vector, op=op)
            within(30, partial(combo.save, tmp_path / "c.safetensors", force=True))
            assert sv.verify(tmp_path / "c.safetensors").facts["verified"]
            sv.apply(tmp_path / f"base{number}", combo, tmp_path / "out", force=True)
            assert load(tmp_path / "out")["empty"].shape == (2, 0)


def test_a_tensor_that_only_some_hold_is_an_error_with_names_and_shapes(family, small) -> None:
    a, b, folder = small
    more = toy() | {"model.extra.weight": torch.ones(3, 5).bfloat16()}
    save(folder / "more", more)
    save(folder / "most", perturbed(more))
    c = sv.diff(folder / "most", folder / "more", folder / "c.safetensors")
    for combine in (lambda: a + c, lambda: c - a, lambda: sv.combine(a, b, c, op="ties")):
        with pytest.raises(sv.IncompatibleError, match=r"model\.extra\.weight \[3, 5\]: not in"):
            combine()
    wide = {**toy(width=16), "model.norm.weight": torch.ones(24).bfloat16()}
    save(folder / "wide", wide)
    d = sv.diff(folder / "wide", folder / "wide", folder / "d.safetensors")
    with pytest.raises(sv.IncompatibleError) as error:
        a + d
    assert "lm_head.weight: [40, 24], [40, 16]" in str(error.value)
    assert "and 5 more" in str(error.value) and "model.norm.weight" not in str(error.value)
    result = run("combine", a.ref, c.ref, "-o", folder / "x.safetensors")
    assert result.exit_code == 3 and "model.extra.weight [3, 5]" in result.stderr


def tied_models(folder: Path, stored: bool) -> dict[str, Path]:
    """Save base, two tuned and a target, tied by config; the vectors' models store lm_head or not.

    The target does the opposite.
    """
    config = {"model_type": "toy", "tie_word_embeddings": True}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    base = toy(vocabulary=300)
    saved = {}
    for name, model in {"base": base, "a": perturbed(base, 1), "b": perturbed(base, 2),
                        "target": perturbed(base, 3)}.items():  # fmt: skip
        model[head] = model[embedding].clone()
        if stored == (name == "target"):
            del model[head]
        saved[name] = save(folder / f"{name}-{stored}", model, config=config)
    return saved


def test_the_pair_under_an_operator_of_ones_own(tmp_path: Path) -> None:
    """Whether it goes by the names of tensors is not known, so its pair is taken for two."""
    paths = tied_models(tmp_path, True)
    a, b = (sv.diff(paths[side], paths["base"]) for side in "ab")
    with pytest.raises(sv.IncompatibleError, match=r"lm_head\.weight.*two different"):
        sv.apply(paths["target"], sv.combine(a, b, op=Balanced()), tmp_path / "out")
    operator = Balanced()
    operator.random = False  # said by its author
    sv.apply(paths["target"], sv.combine(a, b, op=operator), tmp_path / "out")


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("op,given", [
    ("linear", {}), ("ties", {}), ("orthogonal", {"scope": "vector"}), ("sparsify", {}),
    ("dare_linear", {}),
])  # fmt: skip
def test_tied_embeddings(stored: bool, op: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Of vectors that hold the pair once or twice on a target that does the other: no difference.

    Masks of the pair differ by name, so where the vectors hold both there is no one delta for it.
    """
    paths = tied_models(tmp_path, stored)
    a, b = (sv.diff(paths[side], paths["base"], tmp_path / f"{side}.safetensors") for side in "ab")
    combo = sv.combine(a, b, op=op, parameters=given)
    made = combo.save(tmp_path / "c.safetensors")
    for number, vector in enumerate((combo, made)):
        if stored and op == "dare_linear":
            with pytest.raises(sv.IncompatibleError, match=r"lm_head\.weight.*two different"):
                sv.apply(paths["target"], vector, tmp_path / str(number))
            continue
        sv.apply(paths["target"], vector, tmp_path / str(number))
        assert_same_bits(tmp_path / str(number), tmp_path / "0")
        assert sv.verify(tmp_path / str(number)).facts["verified"]


# ---------------------------------------------------------------------------------------- recipes

RECIPE = """
op: linear
vectors:
- vector: {a}
  weight: 0.5
  rules:
  - match: "model.layers.*"
    weight: [0.0, 1.0]
  - match: "*.mlp.*"
    weight: 0.25
- vector: {b}
  rules:
  - match: "*_norm*"
    weight: -1
  - match: "*layernorm*"
    weight: -2
"""


def llama(seed: int, base: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return a llama-like toy of five layers in fp32, or one fine-tuned from it."""
    return toy(seed, "F32", layers=5) if base is None else perturbed(base, seed)


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Return a recipe file over two stored vectors, and the models behind them."""
    base = llama(0)
    tensors = {"base": base, "a": llama(1, base), "b": llama(2, base), "target": llama(3, base)}
    for name, model in tensors.items():
        save(tmp_path / name, model)
    for name in "ab":
        sv.diff(tmp_path / name, tmp_path / "base", tmp_path / f"{name}.safetensors")
    file = tmp_path / "recipe.yaml"
    refs = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    file.write_text(RECIPE.format(**refs))
    return file, tensors


def weights_by_hand(name: str) -> tuple[float, float]:
    if ".mlp." in name:
        first = 0.25
    elif ".layers." in name:
        first = int(name.split(".")[2]) / 4  # five layers from 0 to 1
    else:
        first = 0.5
    return first, -2.0 if "layernorm" in name else 1.0


def test_a_recipe_says_how_much_of_what_goes_where(recipe, tmp_path: Path) -> None:
    file, tensors = recipe
    file.write_text(file.read_text().replace('  - match: "*_norm*"\n    weight: -1\n', ""))
    made = sv.combine(recipe=file, output=tmp_path / "c.safetensors")
    found = values_of(made, tmp_path)
    base = tensors["base"]
    for name, tensor in base.items():
        deltas = [oracle.wide(oracle.round_to(oracle.delta(tensors[side][name], tensor), "F32"))
                  for side in "ab"]  # fmt: skip
        values = summed([w * v for w, v in zip(weights_by_hand(name), deltas, strict=True)])
        right = oracle.round_to(values + 0.0, "F32").reshape(tensor.shape)
        assert_same_bits({name: found[name]}, {name: right})
    assert made.manifest["recipe"]["vectors"][0]["rules"] == [
        {"match": "model.layers.*", "weight": [0.0, 1.0]}, {"match": "*.mlp.*", "weight": 0.25},
    ]  # fmt: skip
    assert parse_recipe(made.manifest["recipe"]) == read_recipe(file)
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]
    # within apply, on the command line, and from what the manifest holds: the same
    sv.apply(tmp_path / "target", made, tmp_path / "stored")
    result = run("apply", tmp_path / "target", "--recipe", file, "-o", tmp_path / "once")
    assert result.exit_code == 0, result.output
    sv.apply(tmp_path / "target", sv.combine(recipe=made.manifest["recipe"]), tmp_path / "mapping")
    for other in ("once", "mapping"):
        assert_same_bits(tmp_path / other, tmp_path / "stored")
    assert sv.verify(tmp_path / "once").facts["verified"]
    assert run("combine", "--recipe", file, "-o", tmp_path / "d.safetensors").exit_code == 0
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("scope", ["tensor", "vector"])
def test_a_recipe_with_parameters_by_tensor(scope: str, recipe, tmp_path: Path) -> None:
    """Densities by rule: tensors of one set of parameters have one threshold between them."""
    _, tensors = recipe
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    rules = [{"match": "*.mlp.*", "density": 0.1}, {"match": "lm_head*", "density": 1}]
    given = {"op": "ties", "parameters": {"density": 0.5, "scope": scope}, "vectors": [
        {"vector": files[0], "weight": 0.5, "rules": rules},
        {"vector": files[1], "parameters": {"density": 0.2}}]}  # fmt: skip
    found = values_of(sv.combine(recipe=given, output=tmp_path / "c.safetensors"), tmp_path)
    base = tensors["base"]
    deltas = {
        name: [oracle.wide(oracle.round_to(oracle.delta(tensors[side][name], tensor), "F32"))
               for side in "ab"]
        for name, tensor in base.items()
    }  # fmt: skip
    densities = {name: 0.1 if ".mlp." in name else 1.0 if "lm_head" in name else 0.5
                 for name in base}  # fmt: skip
    for name, tensor in base.items():
        alike = [n for n in base if densities[n] == densities[name]]
        parts = []
        for i, density in enumerate((densities[name], 0.2)):
            among = np.concatenate([deltas[n][i] for n in (alike if scope == "vector" else [name])])
            parts.append(kept(deltas[name][i], bounds(among, {"density": density})))
        values = elected([0.5 * parts[0], parts[1]], [0.5, 1.0], True)
        right = oracle.round_to(values + 0.0, "F32").reshape(tensor.shape)
        assert_same_bits({name: found[name]}, {name: right})


def test_a_glob_of_a_recipe_that_matches_nothing_is_refused(recipe, tmp_path: Path) -> None:
    file, _ = recipe  # "*_norm*" is none of these names
    for arguments in (
        ("combine", "--recipe", file, "-o", tmp_path / "x.safetensors"),
        ("apply", tmp_path / "target", "--recipe", file, "-o", tmp_path / "x"),
    ):
        result = run(*arguments)
        assert result.exit_code == 3 and "*_norm*" in result.stderr and result.stdout == ""
        assert not Path(arguments[-1]).exists()


# --------------------------------------------------------------------------------- an own operator


class Balanced:
    """Vectors of one length: each divided by its norm, measured in float64 or by counting."""

    name = "balanced"

    def __init__(self, scope: str = "tensor", kind: type = np.float64) -> None:
        self._scope, self._kind = scope, kind

    def passes(self, parameters: Any) -> int:
        return 1

    def scope(self, parameters: Any) -> str:
        return self._scope

    def measure(self, number, values, weights, parameters, place, known):
        if self._kind is np.float64:
            return np.array([np.sum(np.square(v, dtype=np.float64)) for v in values])
        return np.array([np.count_nonzero(v) for v in values])

    def settle(self, number, total, weights, parameters, known):
        return [max(float(item), 1e-300) ** 0.5 for item in total]

    def combine(self, values, weights, parameters, place, known):
        terms = [w * v.astype(np.float64) / k
                 for w, v, k in zip(weights, values, known, strict=True)]  # fmt: skip
        return sum(terms).astype(np.result_type(np.float32, *values)) + np.float32(0)


@pytest.mark.parametrize("scope,kind", [("tensor", np.float64), ("vector", np.int64),
                                        ("vector", np.float64)])  # fmt: skip
def test_an_operator_of_ones_own(scope: str, kind: type, world: World, tmp_path: Path) -> None:
    operator = Balanced(scope, kind)
    refs = list(world.files["packed"].values())
    combo = sv.combine(*refs, weights=WEIGHTS, op=operator, parameters={"any": "thing"})
    stored = [
        combo.save(tmp_path / f"{workers}.safetensors", workers=workers) for workers in (1, 5)
    ]
    files = [vector.stored.path for vector in stored]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = values_of(stored[0], tmp_path)
    measured = {
        name: [np.sum(v * v) if kind is np.float64 else np.count_nonzero(v) for v in vectors]
        for name, vectors in world.deltas.items()
    }
    across = np.sum(list(measured.values()), axis=0)
    for name, vectors in world.deltas.items():
        norms = np.sqrt(np.maximum(measured[name] if scope == "tensor" else across, 1e-300))
        values = summed([w * v / n for w, v, n in zip(WEIGHTS, vectors, norms, strict=True)])
        np.testing.assert_allclose(oracle.wide(found[name]), values, rtol=1e-6, atol=1e-12)
    for number, vector in enumerate((combo, stored[0])):
        sv.apply(world.target, vector, tmp_path / str(number))
        assert_same_bits(tmp_path / str(number), tmp_path / "0")
    norm = sv.orthogonality(combo, refs[0]).facts["pairs"][0]["overall"]["norm_a"]
    assert norm == pytest.approx(
        math.sqrt(sum(float(oracle.wide(t) @ oracle.wide(t)) for t in found.values())), rel=1e-6
    )
    for path in (files[0], tmp_path / "0"):  # what is not skillvec's cannot be made again by it
        with pytest.raises(sv.UsageError, match=r"balanced.*not skillvec's"):
            sv.verify(path)
    assert sv.verify(tmp_path / "0", vector=combo).facts["verified"]
    assert sv.verify(tmp_path / "1").facts["verified"]


def test_what_is_measured_of_one_combination_is_not_taken_for_another(family, small) -> None:
    """Of the same vectors by other operators, weights, parameters, seeds; of other vectors."""
    a, b, _ = small

    class Leaning(Balanced):
        def settle(self, number, total, weights, parameters, known):
            norms = super().settle(number, total, weights, parameters, known)
            return [norm * weight for norm, weight in zip(norms, weights, strict=True)]

    counted = Balanced("tensor", np.int64)
    counted.name = "counted"
    ties = {"op": "ties", "parameters": {"density": 0.3}}
    across = {"op": "orthogonal", "parameters": {"scope": "vector"}}
    pair = sv.diff(family.sft, family.tuned)
    combos = [
        sv.combine(a, b, op=Balanced()), sv.combine(a, b, op=counted), sv.combine(a, b, **ties),
        sv.combine(b, a, **ties), sv.combine(a, b, op="ties", parameters={"density": 0.6}),
        sv.combine(a, b, **across), sv.combine(a, pair, **across), sv.combine(b, pair, **across),
        sv.combine(a, b, op="della"), sv.combine(a, b, op="della", weights=[2, 1]),
        sv.combine(a, b, op="della", seed=1), sv.combine(a, b, op=Leaning()),
        sv.combine(a, b, op=Leaning(), weights=[2, 1]),
    ]  # fmt: skip
    together = sv.orthogonality(a, *combos).facts["pairs"]  # a and each come first
    for combo, pair_of_a in zip(combos, together, strict=False):
        alone = sv.orthogonality(a, combo).facts["pairs"][0]
        assert alone == pair_of_a, (combo.ref, combo.recipe)


class Telltale(Balanced):
    """Shows the last bit of what was measured over the whole vector in every value."""

    name = "telltale"

    def __init__(self) -> None:
        super().__init__("vector", np.float64)

    def settle(self, number, total, weights, parameters, known):
        return [int(item) % 97 for item in total.view(np.int64)]

    def combine(self, values, weights, parameters, place, known):
        return (values[0] * (1 + known[0]) + values[1] * known[1]).astype(np.float32)


def test_sums_of_floats_have_one_order(tmp_path: Path) -> None:
    """The vector's own: not that of the target's shards, nor of the tensors that are compared."""
    folder, base = tmp_path, toy(0, "F32")
    for name, model in (("base", base), ("a", perturbed(base, 1)), ("b", perturbed(base, 2))):
        save(folder / name, model)
    pairs = [f"{folder / side}::{folder / 'base'}" for side in "ab"]
    combo = sv.combine(*pairs, op=Telltale())
    stored = combo.save(folder / "c.safetensors")
    turned = dict(reversed(perturbed(base, 3).items()))
    for shards in (1, 2, 5):
        target = save(folder / f"target{shards}", turned, shards=shards)
        for name, vector in (("lazily", combo), ("stored", stored)):
            sv.apply(target, vector, folder / name, lam=1e-3, workers=shards, force=True)
        assert_same_bits(folder / "lazily", folder / "stored")
    for include in ([], ["lm_head*"], ["*.1.*", "*norm*"]):
        (pair,) = sv.orthogonality(combo, stored, include=include).facts["pairs"]
        assert all(row["norm_ratio"] in (1, None) for row in pair["tensors"])


def test_an_own_operator_does_not_take_the_name_of_another(small) -> None:
    """Its recipe would be read as the other's, and verify would compute something else."""
    a, b, _ = small
    operator = Balanced()
    operator.name = "linear"
    with pytest.raises(sv.UsageError, match="linear"):
        sv.combine(a, b, op=operator)


def test_an_operator_that_leaves_the_numbers_is_an_error(family, small) -> None:
    a, b, folder = small

    class Broken(Balanced):
        def combine(self, values, weights, parameters, place, known):
            return np.full(values[0].size, np.nan, np.float32)

    with pytest.raises(sv.SkillvecError, match=r"weight.*: balanced left the range"):
        sv.apply(family.target, sv.combine(a, b, op=Broken()), folder / "out")
    assert not (folder / "out").exists()


# ---------------------------------------------------------------------------------------- proofs


def altered(path: Path) -> None:
    """Change one value of a model file by a step."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def movable(tmp_path: Path) -> Path:
    """Return a folder with models, two vectors, and what was made of them."""
    base = toy()
    for number, name in enumerate(("base", "a", "b", "target")):
        save(tmp_path / name, perturbed(base, number) if number else base)
    for name in "ab":
        sv.diff(tmp_path / name, tmp_path / "base", tmp_path / f"{name}.safetensors")
    words = [f"{tmp_path}/a.safetensors=0.7", f"{tmp_path}/b::{tmp_path}/base=0.5"]
    for arguments in (
        ("combine", *words, "--op", "ties", "-o", tmp_path / "c.safetensors"),
        ("apply", tmp_path / "target", *words, "--op", "dare_ties", "--seed", 3, "-o",
         tmp_path / "merged"),
        ("apply", tmp_path / "target", tmp_path / "c.safetensors", "-o", tmp_path / "stored"),
    ):  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    return tmp_path


MADE = ("c.safetensors", "merged", "stored")


def test_what_was_made_of_several_is_proved(movable: Path) -> None:
    for name in MADE:
        report = sv.verify(movable / name)
        assert report.facts["verified"] and report.counts == {"verified": 11}
        assert run("verify", movable / name, "--dry-run").exit_code == 0
    recipe = sv.inspect(movable / "merged").facts["recipe"]["vector"]
    assert recipe["recipe"]["vectors"] == [
        {"vector": f"{movable}/a.safetensors", "weight": 0.7},
        {"vector": f"{movable}/b::{movable}/base", "weight": 0.5},
    ]
    assert [sorted(part) for part in recipe["parts"]] == [["digest", "ref"], ["base", "tuned"]]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("what", ["value", "vector", "model", "missing"])
def test_a_parent_that_changed_fails_the_proof(name: str, what: str, movable: Path) -> None:
    if name == "stored" and what != "value":
        name = "c.safetensors"
    if what == "value":  # of what is to be proved
        file = movable / name
        if file.is_dir():
            altered(file / "model.safetensors")
        else:  # an honest file of another recipe, under this one's manifest
            sv.combine(f"{movable}/a.safetensors", output=file, force=True)
            graft(file, movable / "stored.safetensors", movable)
    elif what == "vector":
        sv.diff(movable / "b", movable / "base", movable / "a.safetensors", force=True)
    elif what == "model":
        altered(movable / "b" / "model.safetensors")
    else:
        (movable / "a.safetensors").unlink()
    errors = (sv.VerificationError, sv.FormatError) if what != "missing" else sv.UsageError
    words = {"vector": "is not the vector", "missing": "no such file"}.get(what)
    with pytest.raises(errors, match=words) as error:
        sv.verify(movable / name)
    assert "tuned model" not in str(error.value)


def graft(file: Path, scratch: Path, folder: Path) -> None:
    """Give a file of one vector the recipe of another."""
    donor = sv.combine(f"{folder}/a.safetensors", f"{folder}/b.safetensors", output=scratch)

    def edit(manifest: dict[str, Any]) -> None:
        for key in ("recipe", "parents", "tuned", "formula", "exactness"):
            manifest[key] = donor.manifest[key]
        for entry in manifest["tensors"].values():
            entry["base"] = entry["tuned"] = None

    edited(file, file, edit)


def test_a_vector_that_moved_is_given_by_hand(movable: Path) -> None:
    moved = movable / "moved.safetensors"
    shutil.copy(movable / "c.safetensors", moved)
    (movable / "c.safetensors").unlink()
    with pytest.raises(sv.UsageError, match="no such file"):
        sv.verify(movable / "stored")
    assert run("verify", movable / "stored", "--vector", moved).exit_code == 0
    with pytest.raises(sv.VerificationError, match="is not the vector"):
        sv.verify(movable / "stored", vector=movable / "a.safetensors")


def test_any_form_of_the_very_vector_proves_a_model(movable: Path) -> None:
    """Made in one pass or of a stored file: the bytes decide, where there is no digest to go by."""
    target, a = movable / "target", movable / "a.safetensors"
    parts = [a, f"{movable}/b::{movable}/base"]
    lazily = sv.combine(*parts, weights=[0.7, 0.5], op="dare_ties", seed=3)
    assert sv.verify(movable / "merged", vector=lazily).facts["verified"]
    file = lazily.save(movable / "lazily.safetensors").stored.path
    assert run("verify", movable / "merged", "--vector", file).exit_code == 0
    sv.apply(target, tuned=movable / "a", base=movable / "base", output=movable / "pair")
    assert run("verify", movable / "pair", "--vector", a).exit_code == 0
    assert run("verify", movable / "pair", "--vector", movable / "b.safetensors").exit_code == 1


@pytest.mark.parametrize(
    "name,words",
    [("a.safetensors", ["--target", "target"]), ("a.safetensors", ["--vector", "b.safetensors"]),
     ("c.safetensors", ["--base", "base"]), ("c.safetensors", ["--tuned", "a"]),
     ("c.safetensors", ["--target", "target"]), ("merged", ["--base", "base"]),
     ("stored", ["--tuned", "a"])],
)  # fmt: skip
def test_words_that_verify_has_no_use_for_are_refused(
    name: str, words: list[str], movable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than to say that it holds, of something else than was meant."""
    monkeypatch.chdir(movable)
    result = run("verify", name, *words)
    assert result.exit_code == 2 and words[0].strip("-") in result.stderr, result.output


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a vector file with an edited manifest, under a digest that fits it."""
    content = source.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["skillvec"])
    edit(manifest)
    del manifest["digest"]
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False).encode()
    leaves = [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]
    digests = b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves)
    manifest["digest"] = xxhash.xxh3_128_hexdigest(digests)
    header["__metadata__"]["skillvec"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return target


def test_a_hostile_recipe_in_a_vector_is_an_error_of_ours(movable: Path) -> None:
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m["parents"].pop(),
        lambda m: m["parents"].append(m["parents"][0]),
        lambda m: m.update(parents=[]),
        lambda m: m.update(recipe=None),
        lambda m: m.update(recipe={"vectors": []}),
        lambda m: m.update(recipe={"vectors": [{"vector": "a"}], "op": 7}),
        lambda m: m["recipe"].update(op="unheard of"),
        lambda m: m["recipe"].update(seed=1 << 90),
        lambda m: m["recipe"]["vectors"][0].update(weight="much"),
        lambda m: m["recipe"]["vectors"].pop(),
        lambda m: m["recipe"]["vectors"][0].update(vector=str(movable / "c.safetensors")),
        lambda m: m["parents"][0].update(ref="nowhere"),
        lambda m: m["base"].update(sketch={name: [10**200] * 6 for name in m["base"]["sketch"]}),
        lambda m: m["base"].update(sketch={name: [10**309] * 6 for name in m["base"]["sketch"]}),
    ]
    failures = []
    for number, edit in enumerate(edits):
        file = edited(movable / "c.safetensors", movable / "hostile.safetensors", edit)
        for words in (
            ("verify", file),
            ("inspect", file, "--target", movable / "target"),
            ("apply", movable / "target", file, "-o", movable / "out", "--force"),
        ):
            try:
                result = run(*words)
                if result.exit_code and not result.stderr.startswith("error: "):
                    failures.append(f"{number} {words[0]}: {result.output}")
            except Exception as error:  # collected, so that one run shows them all
                failures.append(f"{number} {words[0]}: {error!r}")
    assert not failures, "\n".join(failures)


# ------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("op", [op for op, method in OPERATORS.items() if not method.of_matrices])
def test_every_operator_from_the_command_line(op: str, family, small) -> None:
    a, b, folder = small
    given = {"density": "0.5", "epsilon": "0.1", "gamma": "0.01", "scope": "tensor",
             "normalize": "False", "density_of": "all", "threshold": "0.001", "floor": "0.1",
             "fisher": f"{folder}/f.safetensors"}  # fmt: skip
    defaults = [name for name in OPERATORS[op].defaults if name != "fisher_digest"]
    if op == "fisher":
        save(folder / "f.safetensors", {n: torch.rand(d.spec.shape) for n, d in a.deltas.items()})
    words = [w for name in defaults for w in ("--param", f"{name}={given[name]}")]
    wanted = {name: {"0.": lambda t: float(t), "Fa": lambda t: False}.get(
        given[name][:2], str)(given[name]) for name in defaults}  # fmt: skip
    result = run("combine", f"{a.ref}=0.7", f"{b.ref}=-3e-1", "--op", op, *words, "--seed", 2,
                 "-o", folder / "c.safetensors", "-q")  # fmt: skip
    assert result.exit_code == 0 and result.stdout == f"{folder}/c.safetensors\n", result.output
    sv.combine(a, b, weights=[0.7, -0.3], op=op, parameters=wanted, seed=2,
               output=folder / "d.safetensors")  # fmt: skip
    assert (folder / "c.safetensors").read_bytes() == (folder / "d.safetensors").read_bytes()
    assert run("verify", folder / "c.safetensors").exit_code == 0


def test_parameters_that_are_wrong_are_usage_and_name_what_is_allowed(family, small) -> None:
    a, b, folder = small
    for words, arguments in {
        "expected NAME=VALUE": ["--op", "ties", "--param", "density"],
        "'=0.5': expected NAME=VALUE": ["--op", "ties", "--param", "=0.5"],
        "it takes density, density_of, scope, normalize": ["--op", "ties", "--param", "rank=3"],
        "density = 1.5, expected above 0, at most 1": ["--op", "ties", "--param", "density=1.5"],
        "density = 0.0, expected above 0": ["--op", "ties", "--param", "density=0"],
        "density = 'much', expected above": ["--op", "ties", "--param", "density=much"],
        "density = '', expected above": ["--op", "ties", "--param", "density="],
        "density: expected a finite": ["--op", "ties", "--param", "density=nan"],
        "normalize = 1.0, expected true or false": ["--op", "ties", "--param", "normalize=1"],
        "scope = 'layer', expected tensor or vector": ["--op", "ties", "--param", "scope=layer"],
        "linear has no parameter 'density'; it takes none": ["--param", "density=0.5"],
        "expected one of linear, ties, dare_linear": ["--op", "slurp"],
    }.items():
        for command in (["combine", a.ref, b.ref, "-o", folder / "x.safetensors"],
                        ["apply", family.target, a.ref, b.ref, "-o", folder / "x"]):  # fmt: skip
            result = run(*command, *arguments)
            assert result.exit_code == 2 and result.stdout == "", (arguments, result.output)
            assert words in " ".join(result.stderr.split()), (words, result.stderr)
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_parameter_beside_one_vector_is_not_passed_over(family, small) -> None:
    """The operator that was meant is missing: the result would be another model."""
    a, _, folder = small
    for words in (["combine", f"{a.ref}=0.5", "-o", folder / "x.safetensors"],
                  ["apply", family.target, a.ref, "-o", folder / "x"]):  # fmt: skip
        result = run(*words, "--param", "density=0.3")
        assert result.exit_code == 2 and "linear has no parameter 'density'" in result.stderr
    for more in ({"parameters": {"density": 0.3}}, {}):
        share = {"vector": a.ref} | ({} if more else {"parameters": {"density": 0.3}})
        with pytest.raises(sv.UsageError, match="linear has no parameter 'density'"):
            sv.combine(recipe={"vectors": [share], **more})
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_weights_behind_an_equals_sign(family, small, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, folder = small
    monkeypatch.chdir(folder)
    shutil.copy("a.safetensors", "lr=1.safetensors")
    shutil.copy("b.safetensors", "b=2")
    save(folder / "m=3", load(family.sft))
    save(folder / "base=4", load(family.base))
    for words, expected in {
        ("a.safetensors=1e-3", "b.safetensors=-.3"): [
            ("a.safetensors", 1e-3), ("b.safetensors", -0.3)],
        ("lr=1.safetensors", "b=2"): [("lr=1.safetensors", None), ("b=2", None)],
        ("lr=1.safetensors=0.5", "b=2=+4"): [("lr=1.safetensors", 0.5), ("b=2", 4.0)],
        ("m=3::base=4",): [],
        ("m=3::base=4=2",): [("m=3::base=4", 2.0)],
        (f"{family.sft}::{family.base}=0.5", "a.safetensors=0"): [
            (f"{family.sft}::{family.base}", 0.5), ("a.safetensors", 0.0)],
    }.items():  # fmt: skip
        result = run("combine", *words, "-o", "c.safetensors", "--force")
        assert result.exit_code == 0, (words, result.output)
        recipe = sv.SkillVector.open("c.safetensors").manifest["recipe"]
        shares = recipe["vectors"] if recipe else []
        assert [(s["vector"], s.get("weight")) for s in shares] == expected, words
    for words, message in {
        ("a.safetensors=nan",): "expected finite numbers",
        ("a.safetensors=1", "b.safetensors=-inf"): "expected finite numbers",
        ("a.safetensors=0,7",): "a.safetensors=0,7: no such file",
        ("a.safetensors=", "b.safetensors"): "a.safetensors=: no such file",
        (): "expected at least one vector, found none",
        ("a.safetensors", "--recipe", "r.yaml"): "give it alone",
        ("--recipe", "r.yaml"): "no such recipe file",
        ("--recipe", "a.safetensors"): "no combination",
        ("--recipe", "notes.txt"): "ends in .yaml, .yml, .json",
    }.items():
        result = run("combine", *words, "-o", "x.safetensors")
        assert result.exit_code == 2 and message in result.stderr, (words, result.output)
    assert not Path("x.safetensors").exists()


def test_an_operator_needs_vectors_to_merge(family, small) -> None:
    """Words that would have no effect are refused, not dropped."""
    a, _, folder = small
    pair = ["--tuned", family.sft, "--base", family.base]
    recipe = folder / "r.yaml"
    recipe.write_text(f"vectors: [{{vector: {a.ref}}}]")
    for arguments in (
        ["apply", family.target, *pair, "--op", "ties"],
        ["apply", family.target, *pair, "--param", "density=0.5"],
        ["apply", family.target, *pair, "--recipe", recipe],
        ["apply", family.target, "--recipe", recipe, "--op", "ties"],
        ["apply", family.target, a.ref, "--recipe", recipe],
        ["combine", "--recipe", recipe, "--seed", 5],
    ):
        out = folder / ("x.safetensors" if arguments[0] == "combine" else "x")
        result = run(*arguments, "-o", out)
        assert result.exit_code == 2 and not out.exists(), (arguments, result.output)
    result = run("apply", family.target, a.ref, "--op", "ties", "--param", "density=0.5", "-o",
                 folder / "trimmed")  # fmt: skip
    assert result.exit_code == 0, result.output  # one vector has something to trim
    trimmed = sv.combine(a, op="ties", parameters={"density": 0.5}, output=folder / "t.safetensors")
    counts = [sum(entry["changed"] for entry in vector.manifest["tensors"].values())
              for vector in (trimmed, a)]  # fmt: skip
    assert 0 < counts[0] < counts[1]
