"""What orthogonality and norms say: planted cases, laws of chance, and angles.py on all."""

import json
from math import isclose, sqrt
from pathlib import Path

import angles
import numpy as np
import pytest
import torch
from angles import Side
from families import TORCH_DTYPE, from_bits, load, perturbed, save, toy
from oracle import round_to
from scipy import stats

import skillvec as sv
from skillvec.analysis.statistics_table import (
    PAIR_OUTPUTS,
    PAIRS,
    VECTOR_OUTPUTS,
    VECTORS,
)
from skillvec.errors import NonfiniteError

Deltas = dict[str, np.ndarray | torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float32)


def refs_of(folder: Path, *deltas: Deltas, base: Deltas | None = None) -> list[str]:
    """Save deltas as fp32 models on a base (of zeros, if not given); return TUNED::BASE of each."""
    base = {n: tensor(t) for n, t in (base or {n: 0 * d for n, d in deltas[0].items()}).items()}
    save(folder / "base", base)
    refs = []
    for i, delta in enumerate(deltas):
        sums = {name: base[name].float() + tensor(d) for name, d in delta.items()}
        refs.append(f"{save(folder / f'v{i}', sums)}::{folder / 'base'}")
    return refs


def rows_of(folder: Path, *deltas: Deltas, **options) -> dict:
    """Return (level, name) -> row of the first pair of deltas given as tensors."""
    return rows(sv.orthogonality(*refs_of(folder, *deltas), **options))


def rows(report: sv.Report, pair: int = 0) -> dict:
    return angles.rows_in(report.to_dict()["pairs"][pair])


def sides_of(report: dict) -> dict[str, Side]:
    """Return the vectors of a report whose labels are TUNED::BASE."""
    return {label: angles.side(*label.split("::")) for label in report["vectors"]}


def check(report: sv.Report, sides: dict[str, Side] | None = None, against: Path | None = None):
    """Fail with every column of a report that tests/support/angles.py finds otherwise."""
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))  # as it is written
    weights = angles.load(against) if against else None
    worst = angles.deviations(said, sides or sides_of(said), weights)
    wrong = [f"{column}: {what}" for column, what in worst.items() if what[0] > 1]
    assert not wrong, "\n".join(wrong)
    return worst


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def small(seed: int) -> Deltas:
    """Return dense noise in the shapes of a toy."""
    rng = np.random.default_rng(seed)
    return {name: normal(rng, *t.shape) for name, t in toy(0).items()}


# ---------------------------------------------------------------- the script, number by number


@pytest.mark.parametrize("form", ["pairs", "stored"])
def test_every_number_of_a_family(form: str, family, tmp_path: Path) -> None:
    """RL against SFT delta, with everything that can be asked for."""
    given = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    options = {"subspace": 4, "control": f"{family.target}::{family.base}"}
    made = {ref: angles.side(*ref.split("::")) for ref in (*given, options["control"])}
    refs: list = given
    if form == "stored":
        refs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for path, ref in zip(refs, given, strict=True):
            sv.diff(*ref.split("::"), path)
            made[str(path)] = made[ref]
    report = sv.orthogonality(*refs, against=family.target, **options)
    worst = check(report, made, family.target)
    outputs = {number.key for number in (*PAIR_OUTPUTS, *VECTOR_OUTPUTS)}  # test_activations
    shown = {number.key for number in (*PAIRS, *VECTORS)} - outputs
    # every other number has a formula in angles.py
    assert shown - set(worst) == {"svd_error", "effective_rank_error"}


def test_the_script_finds_what_is_wrong(family) -> None:
    """A report with one altered number, one missing or one null does not pass."""
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    said = json.loads(json.dumps(sv.orthogonality(*refs).to_dict()))
    sides = sides_of(said)
    whole = said["pairs"][0]["overall"]
    for column, wrong in (("cosine", whole["cosine"] + 1e-5), ("jaccard", None),
                          ("overlap_z", whole["overlap_z"] * (1 + 1e-6)),
                          ("conflict_b", whole["conflict_b"] + 1e-5)):  # fmt: skip
        right, whole[column] = whole[column], wrong
        assert angles.deviations(said, sides)[column][0] > 1, column
        del whole[column]
        assert angles.deviations(said, sides)[column][0] > 1, column
        whole[column] = right
    said["pairs"][0]["layers"].pop()
    assert angles.deviations(said, sides)["row"][0] > 1


def test_the_script_as_a_command(family, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    report = sv.orthogonality(*refs, against=family.base, subspace=2)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.to_dict()))
    assert angles.main([str(file)]) == 0
    assert "cosine_se" in capsys.readouterr().out
    said = report.to_dict()
    said["norms"][0]["layers"][0]["kept_gain"] += 1e-3
    file.write_text(json.dumps(said))
    assert angles.main([str(file), "--against", str(family.base)]) == 1


@pytest.mark.parametrize(
    "dtypes", [("F16", "F16"), ("F32", "F32"), ("F64", "F64"), ("BF16", "F32"), ("F16", "BF16"),
               ("F32", "F64")],
)  # fmt: skip
def test_dtypes_and_mixtures(dtypes: tuple[str, str], tmp_path: Path) -> None:
    """Two vectors of their own dtypes, and one whose tuned model has another than its base."""
    refs = []
    for number, dtype in enumerate(dtypes):
        base, other = toy(0, dtype), perturbed(toy(0, dtype), 10 + number, density=0.5)
        save(tmp_path / f"base{number}", base)
        save(tmp_path / f"tuned{number}", other)
        refs.append(f"{tmp_path / f'tuned{number}'}::{tmp_path / f'base{number}'}")
    refs.append(f"{tmp_path / 'tuned1'}::{tmp_path / 'base0'}")
    check(sv.orthogonality(*refs, subspace=3))


def test_shapes_of_every_kind(tmp_path: Path) -> None:
    """Scalars, vectors, empty tensors, 3-D and 4-D ones, columns, integers, experts."""
    rng = np.random.default_rng(3)
    shapes = {
        "scale": (), "bias": (7,), "nothing": (0, 3), "conv": (4, 3, 2, 2), "column": (9, 1),
        "model.layers.0.mlp.experts.0.up.weight": (6, 5), "row": (1, 9),
        "model.layers.0.mlp.experts.1.up.weight": (6, 5), "model.layers.10.mlp.fused": (2, 6, 5),
        "model.layers.9.mlp.fused": (2, 6, 5), "one": (1,),
    }  # fmt: skip
    a, b = ({name: normal(rng, *shape) for name, shape in shapes.items()} for _ in range(2))
    refs = refs_of(tmp_path, a, b)
    whole = {"table": torch.arange(12), "flag": torch.tensor(True)}
    for folder in ("base", "v0", "v1"):  # integers are compared, never subtracted
        save(tmp_path / folder, load(tmp_path / folder) | whole)
    report = sv.orthogonality(*refs, subspace=2)
    check(report)
    names = [row["name"] for row in report.to_dict()["pairs"][0]["tensors"]]
    assert set(names) == set(shapes)
    layers = [row["name"] for row in report.to_dict()["pairs"][0]["layers"]]
    assert layers.index("model.layers.9") < layers.index("model.layers.10")


def test_exceptions_count_in_every_number(tmp_path: Path) -> None:
    """1 - 2^-9 is stored as 1 and an exception; signs and supports stay, energies are exact."""
    rng = np.random.default_rng(4)
    tuned = torch.from_numpy(np.sign(normal(rng, 64, 64))).bfloat16()
    base = tuned.clone()
    base.view(-1)[::10] *= 2.0**-9
    other = torch.from_numpy(normal(rng, 64, 64)).bfloat16()
    for name, values in (("tuned", tuned), ("base", base), ("other", other)):
        save(tmp_path / name, {"x": values})
    refs = [f"{tmp_path / side}::{tmp_path / 'base'}" for side in ("tuned", "other")]
    vector = sv.diff(*refs[0].split("::"), tmp_path / "v.safetensors", codec="dense")
    assert vector.manifest["exactness"]["exceptions"] == 410
    made = {ref: angles.side(*ref.split("::")) for ref in refs}
    made[vector.ref] = made[refs[0]]
    check(sv.orthogonality(vector, refs[1], against=tmp_path / "base", subspace=4), made,
          tmp_path / "base")  # fmt: skip
    check(sv.orthogonality(*refs, subspace=4))


def test_hidden_zeros_are_no_support(tmp_path: Path) -> None:
    """-0 against +0, a NaN that stays and an infinity differ in bits, but have no difference."""
    base = torch.full((40,), 0.5)
    base[:4] = torch.tensor([0.0, -0.0, np.nan, np.inf])
    tuned = base.clone()
    tuned[0] = -0.0
    tuned[3] = -np.inf
    tuned[10:20] += 0.25
    other = base.clone()
    other[4:16] -= 0.125
    for name, values in (("base", base), ("tuned", tuned), ("other", other)):
        save(tmp_path / name, {"x": values})
    refs = [f"{tmp_path / side}::{tmp_path / 'base'}" for side in ("tuned", "other")]
    with pytest.raises(NonfiniteError, match="x: 1 of 40 values"):  # the NaN is the same in both
        sv.orthogonality(*refs)
    report = sv.orthogonality(*refs, allow_nonfinite=True)
    row = rows(report)["overall", ""]
    assert (row["density_a"], row["density_b"]) == (10 / 40, 12 / 40)
    assert row["jaccard"] == 6 / 16
    assert (row["sign_agreement"], row["conflict_a"]) == (0.0, pytest.approx(0.6))
    check(report)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    """One side stores the tied copy, the other does not: the numbers are those without it."""
    config = {"model_type": "toy", "tie_word_embeddings": True}
    base, tuned, other = toy(0), perturbed(toy(0), 1), perturbed(toy(0), 2)
    for name, tensors, stores in (("base", base, True), ("tuned", tuned, True),
                                  ("other", other, False)):  # fmt: skip
        tensors.pop("lm_head.weight")
        if stores:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save(tmp_path / name, tensors, config=config)
    report = sv.orthogonality(*(f"{tmp_path / x}::{tmp_path / 'base'}" for x in ("tuned", "other")))
    said = report.to_dict()
    assert "lm_head.weight" not in {row["name"] for row in said["pairs"][0]["tensors"]}
    assert "lm_head.weight" not in {row["name"] for row in said["norms"][0]["tensors"]}
    check(report)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two bf16 vectors whose tensors end behind a block of 2^20 values."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(5)
    sizes = {"layers.0.w": 2**20 + 3000, "layers.1.w": 2**15 + 40, "layers.2.w": 70_001}
    base = {n: torch.from_numpy(normal(rng, s) * 0.02).bfloat16() for n, s in sizes.items()}
    for weights in base.values():
        weights[::11] = 2.0**-19
    save(folder / "base", base)
    refs = []
    for side, density in (("a", 0.2), ("b", 0.7)):
        tuned = {}
        for name, weights in base.items():
            noise = normal(rng, weights.numel()) * (rng.random(weights.numel()) < density)
            noise *= np.linspace(0.1, 3, weights.numel())
            tuned[name] = (weights.float() + torch.from_numpy(noise * 3e-4).float()).bfloat16()
            if side == "a":
                tuned[name][::22] = 2.0**-10  # the difference needs an exception
        refs.append(f"{save(folder / side, tuned)}::{folder / 'base'}")
    return refs


def test_numbers_are_those_of_every_value(long: list[str]) -> None:
    other = Path(long[1].split("::")[0])
    check(sv.norms(long[0], against=other), against=other)
    check(sv.orthogonality(*long))


@pytest.mark.parametrize("workers", [2, 3])
def test_no_digit_depends_on_the_workers(workers: int, long: list[str]) -> None:
    options = {"control": "random", "seed": 3}
    one, many = (sv.orthogonality(*long, workers=n, **options).to_dict() for n in (1, workers))
    assert (one["pairs"], one["norms"]) == (many["pairs"], many["norms"])


def test_no_subspace_digit_depends_on_the_workers(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    reports = [sv.orthogonality(*refs, subspace=3, workers=n).to_dict() for n in (1, 3)]
    assert reports[0]["pairs"] == reports[1]["pairs"]
    assert reports[0]["norms"] == reports[1]["norms"]


# ------------------------------------------------------------------------ one delta, many forms


def test_forms_of_one_delta_give_the_same_numbers(family, tmp_path: Path) -> None:
    """Dense, sparse, packed and the pair itself; the random control too."""
    pair = f"{family.tuned}::{family.base}"
    other = f"{family.sft}::{family.base}"
    options = {"control": "random", "against": family.base, "subspace": 2}
    found = []
    for codec in ("dense", "sparse", "packed", None):
        ref: object = pair
        if codec:
            ref = tmp_path / f"{codec}.safetensors"
            sv.diff(family.tuned, family.base, ref, codec=codec)
        said = sv.orthogonality(ref, other, **options).to_dict()
        found.append((rows_in_full(said["pairs"][0]), rows_in_full(said["norms"][0])))
    assert found[1:] == found[:1] * 3


def rows_in_full(entry: dict) -> dict:
    """Return the rows of a pair or vector; its labels are another matter."""
    return {level: entry[level] for level in angles.LEVELS}


def test_three_vectors_make_three_pairs_as_if_alone(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft, family.target)]
    options = {"subspace": 2, "control": "random"}
    report = sv.orthogonality(*refs, **options)
    check(report)
    pairs = report.to_dict()["pairs"]
    assert [(p["a"], p["b"]) for p in pairs] == [
        (refs[0], refs[1]), (refs[0], refs[2]), (refs[1], refs[2]),
    ]  # fmt: skip
    for pair in pairs:
        alone = sv.orthogonality(pair["a"], pair["b"], **options).to_dict()["pairs"][0]
        assert rows_in_full(alone) == rows_in_full(pair)
        assert alone["forecast"] == pair["forecast"]


def test_globs_leave_the_others_out_of_every_sum(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    report = sv.orthogonality(*refs, include=["model.layers.*"], exclude=["*.bias"], subspace=2)
    kept = {n for n in load(family.base) if n.startswith("model.layers.") and "bias" not in n}
    assert {row["name"] for row in report.to_dict()["norms"][1]["tensors"]} == kept
    check(report)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a_factor_scales_norms_and_nothing_else(factor: float, family) -> None:
    a, b = (sv.diff(side, family.base) for side in (family.tuned, family.sft))
    plain = rows(sv.orthogonality(a, b, subspace=2))
    scaled = rows(sv.orthogonality(factor * a, b, subspace=2))
    sign = np.sign(factor)
    for key, row in plain.items():
        for column, value in row.items():
            found = scaled[key][column]
            if value is None or isinstance(value, str):
                assert found == value
            elif column in ("norm_a", "norm_ratio"):
                assert found == pytest.approx(abs(factor) * value, rel=1e-6)
            elif column in ("cosine", "sign_z", "cosine_mean") or column.startswith("z"):
                assert found == pytest.approx(sign * value, rel=1e-5, abs=1e-6), column
            elif column == "sign_agreement":
                assert found == pytest.approx(value if sign > 0 else 1 - value)
            elif column in ("cosine_se", "cosine_sd", "p", "rare_share", "density_a", "jaccard",
                            "lift", "overlap_z", "on_support_a", "on_support_b", "along",
                            "overlap_left", "overlap_right", "a_in_b", "b_in_a"):  # fmt: skip
                assert found == pytest.approx(value, rel=1e-5, abs=1e-6), column


def test_factors_and_sums_of_vectors(family, tmp_path: Path) -> None:
    """3 * a and a - b are measured as what they are, on the grid of W as well."""
    a = sv.diff(family.tuned, family.base, tmp_path / "a.safetensors")
    b = sv.diff(family.sft, family.base, tmp_path / "b.safetensors")
    report = sv.orthogonality(3 * a, a - b, against=family.base, subspace=2)
    one, other = (angles.side(side, family.base).values for side in (family.tuned, family.sft))
    scaled = Side({name: 3 * x for name, x in one.items()}, None, True)
    difference = Side({name: x - other[name] for name, x in one.items()}, None, True)
    labels = report.to_dict()["vectors"]
    assert labels[0] == f"3*{a.ref}"
    check(report, dict(zip(labels, (scaled, difference), strict=True)), family.base)


# --------------------------------------------------------------------------------- planted cases


def test_identical_scaled_and_negated(tmp_path: Path) -> None:
    a = small(1)
    a["model.norm.weight"][::3] = 0
    for i, (factor, sign) in enumerate(((1.0, 1), (4.0, 1), (-1.0, -1), (-0.25, -1))):
        found = rows_of(tmp_path / str(i), a, {n: factor * x for n, x in a.items()}, subspace=3)
        for row in found.values():
            assert row["cosine"] == pytest.approx(sign, abs=1e-7)  # fp32 sums
            assert row["z_isotropic"] == pytest.approx(sign * sqrt(row["numel"]))
            assert row["p_isotropic"] == pytest.approx(
                0, abs=1e-6
            )  # 1e-12 off 1 is not 0 in 24 dimensions
            assert row["norm_ratio"] == pytest.approx(1 / abs(factor), rel=1e-7)
            assert row["along"] == pytest.approx(1)
            assert (row["jaccard"], row["sign_agreement"]) == (1.0, (1 + sign) / 2)
            assert row["sign_z_plain"] == pytest.approx(
                sign * sqrt(row["density_a"] * row["numel"])
            )
            for side in "ab":
                assert row[f"on_support_{side}"] == pytest.approx(1)
                assert row[f"conflict_{side}"] == pytest.approx((1 - sign) / 2)
        row = found["tensors", "model.norm.weight"]  # 16 of 24 hold, all shared: chance 16^2/24
        assert (row["density_a"], row["lift"]) == (16 / 24, pytest.approx(1.5))
        plain = (16 - 256 / 24) / sqrt(256 * 64 / (576 * 23))
        assert row["overlap_z_plain"] == pytest.approx(plain)
        full = found["tensors", "lm_head.weight"]
        assert (full["lift"], full["overlap_z"]) == (1.0, None)  # dense ones cannot but meet
        for column in ("overlap_left", "overlap_right"):
            assert full[column] == pytest.approx(1, abs=1e-6)
        assert full["angles_left"] == pytest.approx([0, 0, 0], abs=0.1)
        if factor != -1:  # a + b is 0 there
            assert full["sar_a"] == pytest.approx(full["sar_b"])


def test_disjoint_supports(tmp_path: Path) -> None:
    a, b = small(2), small(3)
    for name in a:
        a[name].reshape(-1)[::2] = 0
        b[name].reshape(-1)[1::2] = 0
    for row in rows_of(tmp_path, a, b, control="random").values():
        assert (row["cosine"], row["z_isotropic"], row["p_isotropic"]) == (0, 0, pytest.approx(1))
        assert (row["jaccard"], row["lift"], row["along"]) == (0, 0, 0)
        assert (row["conflict_a"], row["conflict_b"]) == (0, 0)
        assert (row["on_support_a"], row["on_support_b"]) == (0, 0)
        assert (row["sign_agreement"], row["sign_z"], row["z_groups"]) == (None, None, None), row
        assert row["overlap_z"] < -3
        # the control has a's support, so it meets b nowhere either
        assert row["control_cosine"] == 0


def test_a_zero_delta_has_no_angle(tmp_path: Path) -> None:
    a, b = {"x": np.ones((4, 4)), "y": np.ones(5)}, {"x": np.zeros((4, 4)), "y": np.ones(5)}
    report = sv.orthogonality(*refs_of(tmp_path, a, b), subspace=2, control="random")
    found = rows(report)
    row = found["tensors", "x"]
    for column in ("cosine", "cosine_se", "cosine_sd", "z", "p", "null", "z_groups", "z_rotation",
                   "p_isotropic", "norm_ratio", "lift", "overlap_z", "sign_agreement", "sign_z",
                   "conflict_b", "on_support_b", "control_cosine", "control_z", "overlap_left",
                   "b_in_a"):  # fmt: skip
        assert row[column] is None, column
    assert row["a_in_b"] == 0  # b has no direction
    assert (row["jaccard"], row["conflict_a"], row["along"]) == (0, 0, 0)
    assert found["overall", ""]["cosine"] == pytest.approx(5 / sqrt(21 * 5))
    check(report)


def turned(rng: np.random.Generator, m: int, n: int, k: int, degrees: list[float]) -> tuple:
    """Return bases of k columns of length m and n, and others at these angles from the first."""
    u, v = (np.linalg.qr(rng.normal(size=(size, 2 * k)))[0] for size in (m, n))
    turn = np.radians(degrees)
    other = u[:, :k] * np.cos(turn) + u[:, k:] * np.sin(turn)
    return u[:, :k], v[:, :k], other, v[:, k:]


def test_a_shared_subspace(tmp_path: Path) -> None:
    """Both live in the same two left and right directions, at right angles to each other."""
    rng = np.random.default_rng(6)
    u, v, *_ = turned(rng, 30, 20, 2, [0, 0])
    middle = np.array([[3.0, 0], [0, 2]]), np.array([[0, 2.5], [-3, 0]])
    a, b = (u @ m @ v.T for m in middle)
    report = sv.orthogonality(*refs_of(tmp_path, {"w": a}, {"w": b}), subspace=2)
    check(report)
    row = rows(report)["tensors", "w"]
    assert abs(row["cosine"]) < 1e-6  # nothing is shared along the flat directions
    for column in ("overlap_left", "overlap_right", "a_in_b", "b_in_a", "sar_a", "sar_b"):
        assert row[column] == pytest.approx(1, abs=1e-4), column
    assert row["angles_left"] + row["angles_right"] == pytest.approx([0] * 4, abs=0.1)
    assert row["overlap_chance"] == pytest.approx((2 / 30 + 2 / 20) / 2)
    assert row["in_chance"] == pytest.approx(4 / 600)


def test_planted_angles(tmp_path: Path) -> None:
    """Left subspaces at 30 and 60 degrees, right ones at right angles."""
    rng = np.random.default_rng(7)
    u, v, other_u, other_v = turned(rng, 40, 25, 2, [30, 60])
    a, b = u @ np.diag([5.0, 3]) @ v.T, other_u @ np.diag([4.0, 2]) @ other_v.T
    row = rows_of(tmp_path, {"w": a}, {"w": b}, subspace=2)["tensors", "w"]
    assert row["angles_left"] == pytest.approx([30, 60], abs=0.1)
    assert row["angles_right"] == pytest.approx([90, 90], abs=0.1)
    assert row["overlap_left"] == pytest.approx((0.75 + 0.25) / 2, abs=1e-4)
    for column in ("overlap_right", "a_in_b", "b_in_a"):
        assert row[column] == pytest.approx(0, abs=1e-4)


def test_ranks_by_hand(tmp_path: Path) -> None:
    """Three equal singular values: stable and effective rank 3, two of them hold two thirds."""
    rng = np.random.default_rng(8)
    u, v, *_ = turned(rng, 24, 18, 4, [0] * 4)
    base = {"w": u @ np.diag([9.0, 8, 0, 0]) @ v.T}
    delta = {"w": u @ np.diag([0, 2.0, 2, 2]) @ v.T}
    refs = refs_of(tmp_path, delta, base=base)
    found = sv.norms(refs[0], subspace=2).to_dict()["norms"][0]["tensors"][0]
    assert found["stable_rank"] == pytest.approx(3, rel=1e-4)
    assert found["effective_rank"] == pytest.approx(3, rel=1e-3)
    assert found["top_energy"] == pytest.approx(2 / 3, rel=1e-4)
    weights = tmp_path / "base"
    found = sv.norms(refs[0], subspace=2, against=weights).to_dict()["norms"][0]["tensors"][0]
    assert found["energy_in_w"] == pytest.approx(1 / 3, abs=1e-4)  # the second direction


def test_planted_layers_come_first(tmp_path: Path) -> None:
    """B holds half of A in layer 10 and a quarter in layer 2; the others stay within chance."""
    planted = {"model.layers.10": 0.5, "model.layers.2": 0.25}
    rng = np.random.default_rng(9)
    names = [f"model.layers.{i}.{kind}" for i in (0, 2, 10, 11) for kind in ("up.w", "down.w")]
    a = {name: normal(rng, 60, 50) for name in [*names, "head"]}
    b = {name: normal(rng, *x.shape) for name, x in a.items()}
    for name in names:
        b[name] += planted.get(".".join(name.split(".")[:3]), 0) * a[name]
    report = sv.orthogonality(*refs_of(tmp_path, a, b)).to_dict()
    (pair,) = report["pairs"]
    layers = {row["name"]: row for row in pair["layers"]}
    assert list(layers) == ["(no layer)", *(f"model.layers.{i}" for i in (0, 2, 10, 11))]
    forecast = pair["forecast"]
    assert [row["name"] for row in forecast["layers"]] == list(planted)
    whole = pair["overall"]["norm_a"] ** 2
    for found in forecast["layers"]:
        row, size = layers[found["name"]], planted[found["name"]]
        assert found["cosine"] == row["cosine"] == pytest.approx(size / sqrt(1 + size**2), abs=0.05)
        assert (found["z"], found["p"]) == (row["z"], row["p"]) and row["z"] > 4
        assert found["conflict"] == row["conflict_a"] < 0.45
        assert found["share"] == pytest.approx(row["along"] * row["norm_a"] ** 2 / whole)
        # two of nine tensors
        assert found["share"] == pytest.approx(found["cosine"] ** 2 * 2 / 9, rel=0.1)
        assert found["name"] in forecast["sentence"]
    for name, row in layers.items():
        assert name in planted or abs(row["z"]) < 4
    for row in pair["tensors"]:  # the cells of the heat map
        assert (row["cosine"] > 0.15) == (row["layer"] in planted), row["name"]
    for number, column in (("along", "along"), ("on_support", "on_support_a"),
                           ("conflict", "conflict_a")):  # fmt: skip
        assert forecast[number] == pair["overall"][column] is not None
    assert forecast["in_subspace"] is None
    pair = sv.orthogonality(*refs_of(tmp_path, a, b), subspace=2).to_dict()["pairs"][0]
    assert pair["forecast"]["in_subspace"] == pair["overall"]["a_in_b"] > 0


# ------------------------------------------------------------------------------- laws of chance


def follows(values: list[float], law: str = "norm", mean: float = 0.0, std: float = 1.0) -> None:
    """Fail unless the values could be draws: Kolmogorov-Smirnov, mean and spread at 4 sigma."""
    found = np.array(values, float)
    assert stats.kstest(found, law).pvalue > 0.001
    assert abs(found.mean() - mean) < 4 * std / sqrt(found.size)
    assert abs(found.std() / std - 1) < 4 / sqrt(2 * found.size)


def draws(folder: Path, a: np.ndarray, b: np.ndarray, **options) -> list[dict]:
    """Return the tensor rows of 200 independent pairs of vectors, each a tensor of two files."""
    deltas = ({f"t{i}": row for i, row in enumerate(side)} for side in (a, b))
    found = rows_of(folder, *deltas, **options)
    return [row for (level, _), row in found.items() if level == "tensors"]


def test_pure_noise_is_standard_normal(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    a, b = normal(rng, 200, 2500), normal(rng, 200, 2500)
    found = draws(tmp_path, a, b)
    for column in ("z", "z_groups", "z_rows", "z_channels", "z_rotation", "z_isotropic", "sign_z"):
        follows([row[column] for row in found])
    for column in ("p", "p_isotropic"):
        follows([row[column] for row in found], "uniform", 0.5, sqrt(1 / 12))
    scaled = [row["cosine"] / row["cosine_se"] for row in found]
    follows(scaled)
    assert all(row["overlap_z"] is None for row in found)


def test_independent_supports_overlap_by_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    a, b = normal(rng, 200, 3000), normal(rng, 200, 3000)
    a *= rng.random(a.shape) < 0.2
    b *= rng.random(b.shape) < np.linspace(0.1, 0.9, 200)[:, None]
    found = draws(tmp_path, a, b)
    for column in ("overlap_z", "sign_z", "z_groups"):
        follows([row[column] for row in found])
    assert np.mean([row["lift"] for row in found]) == pytest.approx(1, abs=0.02)


def common_support(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return heavy-tailed sparse values: the same places and sizes, signs of their own."""
    size = np.exp(0.4 * rng.normal(size=(200, 8192))) * (rng.random((200, 8192)) < 0.1)
    return tuple((size * rng.normal(size=size.shape)).astype(np.float32) for _ in range(2))


def runs_of_eight(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return values that are equal in eight neighbours each."""
    return tuple(np.repeat(normal(rng, 200, 1024), 8, axis=1) for _ in range(2))


@pytest.mark.parametrize("kind", [common_support, runs_of_eight])
def test_where_directions_are_marked_z_is_right(kind, tmp_path: Path) -> None:
    """Unequal magnitudes in common places, or dependent neighbours: the isotropic z is too wide."""
    found = draws(tmp_path, *kind(np.random.default_rng(13)))
    assert np.std([row["z_isotropic"] for row in found]) > 2
    assert stats.kstest([row["p_isotropic"] for row in found], "uniform").pvalue < 1e-6
    for column in ("z", "z_groups"):
        follows([row[column] for row in found])
    follows([row["cosine"] / row["cosine_se"] for row in found])
    follows([row["p"] for row in found], "uniform", 0.5, sqrt(1 / 12))


def test_small_tensors_have_the_exact_p(tmp_path: Path) -> None:
    """In three dimensions |cosine| is uniform, so p = 1 - |cosine|; in one, p is 1."""
    rng = np.random.default_rng(14)
    for i, size in enumerate((3, 1)):
        found = draws(tmp_path / str(i), normal(rng, 200, size), normal(rng, 200, size))
        for row in found:
            expected = 1 - abs(row["cosine"]) if size == 3 else 1.0
            assert row["p_isotropic"] == pytest.approx(expected, abs=1e-6)
        if size == 3:
            follows([row["p_isotropic"] for row in found], "uniform", 0.5, sqrt(1 / 12))


def test_groups_add_up_over_tensors(tmp_path: Path) -> None:
    """Tensors of very different sizes: the overall z_groups is standard normal as well."""
    rng = np.random.default_rng(15)
    overall = []
    for i in range(40):
        deltas = (
            {"l.0.w": normal(rng, 40, 60) * 3, "l.0.b": normal(rng, 9), "n": normal(rng, 300)}
            for _ in range(2)
        )
        overall.append(rows_of(tmp_path / str(i), *deltas)["overall", ""])
    follows([row["z_groups"] for row in overall])
    follows([row["cosine"] / row["cosine_se"] for row in overall])
    follows([row["sign_z"] for row in overall])


# ------------------------------------------------------------------------------------- controls


def test_the_random_control_sees_no_planted_alignment(tmp_path: Path) -> None:
    """A against itself: cosine 1, while the control with A's magnitudes is lost in chance."""
    rng = np.random.default_rng(16)
    a = {f"t{i}": normal(rng, 3000 + i) * (rng.random(3000 + i) < 0.5) for i in range(200)}
    found = rows_of(tmp_path, a, a, control="random")  # of axes of their own, each
    each = [found["tensors", name] for name in a]
    assert all(row["cosine"] == pytest.approx(1) for row in each)
    # the magnitudes are common, so the cosine spreads wider by sqrt(mean a^4) / mean a^2
    follows([row["control_cosine"] * sqrt(row["numel"] / 6) for row in each])


def test_the_random_control_has_the_same_support_and_norms(tmp_path: Path) -> None:
    """With one value a tensor nothing is left to draw but the sign of its channel."""
    a = {f"t{i}": np.eye(1, 50, i)[0] * (i + 1.0) for i in range(12)}
    b = {f"t{i}": np.eye(1, 50, i)[0] * 2.0 for i in range(12)}
    found = rows_of(tmp_path, a, b, control="random")
    signs = [found["tensors", name]["control_cosine"] for name in a]
    assert [abs(sign) for sign in signs] == pytest.approx([1] * 12)
    assert {round(sign) for sign in signs} == {-1, 1}
    norms = sqrt(sum((i + 1) ** 2 for i in range(12))) * sqrt(12 * 4)
    total = sum(round(sign) * (i + 1) * 2 for i, sign in enumerate(signs)) / norms
    assert found["overall", ""]["control_cosine"] == pytest.approx(total)


def test_the_signs_of_the_control_are_those_of_channels(tmp_path: Path) -> None:
    """A hidden channel has one sign, in rows that read from it and in columns that write to it."""
    channel, other = np.zeros((16, 1)), np.ones((1, 40))
    for at in (2, 7):
        channel[:] = 0
        channel[at] = 1.0
        delta = {"l.0.up.w": (channel * other).T, "l.0.down.w": channel * other, "n": channel[:, 0],
                 "embed": np.ones((30, 1)) * channel.T, "l.0.own": np.eye(1, 24, at)}  # fmt: skip
        found = rows_of(tmp_path / str(at), delta, delta, control="random")
        shared = {
            round(found["tensors", name]["control_cosine"]) for name in delta if name != "l.0.own"
        }
        assert shared in ({1}, {-1})
        assert abs(found["tensors", "l.0.own"]["control_cosine"]) == pytest.approx(1)


def test_controls_are_addressed_by_the_seed(tmp_path: Path) -> None:
    refs = refs_of(tmp_path, small(17), small(18))
    found = [
        rows(sv.orthogonality(*refs, seed=seed, control="random"))["overall", ""]["control_cosine"]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    report = sv.orthogonality(*refs, seed=7, control="random").to_dict()
    assert (report["seed"], report["control"]) == (7, "random")
    plain = sv.orthogonality(*refs).to_dict()
    assert plain["control"] is None
    row = plain["pairs"][0]["overall"]
    assert [row.get(c) for c in ("control_cosine", "control_z")] == [None] * 2


def test_a_third_vector_as_control(family) -> None:
    """The control stands in A's place: its numbers are those of the pair (control, B)."""
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft, family.target)]
    report = sv.orthogonality(refs[0], refs[1], control=refs[2])
    said = report.to_dict()
    assert said["control"] == refs[2]
    assert len(said["pairs"]) == 1 and len(said["norms"]) == 2
    pair, direct = rows(report), rows(sv.orthogonality(refs[2], refs[1]))
    assert set(pair) == set(direct)
    for key, row in pair.items():
        assert row["control_cosine"] == pytest.approx(direct[key]["cosine"], abs=1e-12)
        assert row["control_z"] == pytest.approx(direct[key]["z"], abs=1e-9)


# ---------------------------------------------------------------------------- the 16-bit grid


def rounding_row(folder: Path, weights: torch.Tensor, delta: list[float], form: str) -> dict:
    """Return the row of weights + delta (fp32) from the pair itself or against the weights."""
    base = save(folder / "base", {"w": weights})
    tuned = {"w": weights.double() + torch.tensor(delta, dtype=torch.float64)}
    pair = save(folder / "tuned", {"w": tuned["w"].float()}), base
    if form == "pair":
        report = sv.norms("::".join(map(str, pair)))
    else:
        vector = sv.diff(*pair, folder / "v.safetensors")
        report = sv.norms(vector, against=base)
    (entry,) = report.to_dict()["norms"]
    return entry["overall"]


@pytest.mark.parametrize(
    ("form", "dtype", "step"),
    [("pair", "BF16", 2.0**-7), ("stored", "BF16", 2.0**-7), ("pair", "F16", 2.0**-10)],
)
def test_steps_and_kept_gain_by_hand(form: str, dtype: str, step: float, tmp_path: Path) -> None:
    """Around 1.0: a quarter of a step is lost, a whole one is kept, .75 becomes a whole one."""
    weights = torch.ones(8, dtype=TORCH_DTYPE[dtype])
    sizes = [0.0, 0.2, -0.1, 0.25, 1.0, 0.75, -3.0, 40.0]  # below 1.0 the grid is twice as fine
    row = rounding_row(tmp_path, weights, [size * step for size in sizes], form)
    assert row["steps"] == [2, 1, 1, 1, 1, 0, 0, 0, 1]
    assert sum(row["steps"]) == 7
    assert row["below_half_step"] == pytest.approx(3 / 7)
    assert row["absorbed"] == pytest.approx(3 / 7)
    kept = np.array([0, 0, 0, 0, 1, 1, -3, 40])
    gain = kept @ sizes / np.dot(sizes, sizes)
    assert row["kept_gain"] == pytest.approx(gain, rel=1e-6)
    assert row["kept_cosine"] == pytest.approx(
        kept @ sizes / sqrt((kept @ kept) * np.dot(sizes, sizes)), rel=1e-6
    )


def test_the_grid_of_an_fp32_base_is_bf16(tmp_path: Path) -> None:
    """1.002 is held as 1.0: what counts is the step between the two rounded models."""
    weights = torch.full((4,), 1.002)
    row = rounding_row(tmp_path, weights, [0.0, 2.0**-10, 2.0**-9, 2.0**-7], "pair")
    # 1.002 + 2^-9 = 1.00395 lies above 1 + 2^-8, the middle: it rounds up to 1 + 2^-7
    assert row["absorbed"] == pytest.approx(1 / 3)
    assert row["steps"][:4] == [1, 1, 0, 1]


def test_differences_of_bf16_models_are_kept_whole(family) -> None:
    """tuned is on the grid already, so rounding base + v gives tuned: gain 1, nothing lost."""
    for side in (family.tuned, family.sft):
        row = sv.norms(f"{side}::{family.base}").to_dict()["norms"][0]["overall"]
        assert row["kept_gain"] == pytest.approx(1, abs=1e-6)
        assert row["kept_cosine"] == pytest.approx(1, abs=1e-6)
        assert row["absorbed"] == 0


def test_against_other_weights_much_is_lost(family, tmp_path: Path) -> None:
    """A stored vector has no weights of its own; on ones, steps are 2^-7 and little survives."""
    vector = sv.diff(family.sft, family.base, tmp_path / "v.safetensors")
    plain = sv.norms(vector).to_dict()["norms"][0]["overall"]
    for column in ("steps", "below_half_step", "kept_gain", "kept_cosine", "absorbed"):
        assert plain[column] is None, column
    ones = save(tmp_path / "ones", {n: torch.ones_like(t) for n, t in load(family.base).items()})
    report = sv.norms(vector, against=ones)
    side = angles.side(family.sft, family.base)
    check(report, {vector.ref: Side(side.values)}, ones)
    row = report.to_dict()["norms"][0]["overall"]
    assert row["absorbed"] > 0.5
    assert row["kept_cosine"] < 0.95


# -------------------------------------------------------------------------- the fp32-master trap


def masters(rng: np.random.Generator) -> tuple[dict, dict, dict]:
    """Return base, SFT and RL masters in fp32, two independent updates apart."""
    w0 = {f"model.layers.{i}.mlp.up_proj.weight": normal(rng, 128, 96) * 0.02 for i in range(3)}
    sft = {n: w + normal(rng, *w.shape) * np.float32(1e-4) for n, w in w0.items()}
    rl = {n: w + normal(rng, *w.shape) * np.float32(2e-5) for n, w in sft.items()}
    return w0, sft, rl


def to_bf16(tensors: dict) -> dict:
    return {
        n: round_to(x.astype(np.float64).ravel(), "BF16").reshape(x.shape)
        for n, x in tensors.items()
    }


@pytest.mark.parametrize("rl_saved", ["fp32", "bf16"])
def test_the_fp32_master_trap_is_seen_and_named(rl_saved: str, tmp_path: Path) -> None:
    """RL went on from the fp32 master, theta_sft was saved in bf16: its rounding is in both."""
    w0, sft, rl = masters(np.random.default_rng(19))
    base = save(tmp_path / "base", to_bf16(w0))
    middle = save(tmp_path / "sft", to_bf16(sft))
    tuned = save(tmp_path / "rl", rl if rl_saved == "fp32" else to_bf16(rl))
    report = sv.orthogonality(f"{tuned}::{middle}", f"{middle}::{base}")
    overall = rows(report)["overall", ""]
    assert overall["cosine"] < -0.1
    assert overall["z_groups"] < -10
    assert any("master" in w and str(middle) in w for w in report.warnings), report.warnings
    shared = report.to_dict()["pairs"][0]["shared_rounding"]
    assert shared["checkpoint"] == str(middle)
    assert shared["roles"] == "base of A and tuned of B"
    assert shared["cosine"] == pytest.approx(overall["cosine"], rel=0.15)
    swapped = sv.orthogonality(f"{middle}::{base}", f"{tuned}::{middle}").to_dict()["pairs"][0]
    assert swapped["shared_rounding"]["roles"] == "tuned of A and base of B"
    assert swapped["shared_rounding"]["cosine"] == pytest.approx(shared["cosine"])
    check(report)


def test_the_same_update_saved_in_fp32_is_within_chance(tmp_path: Path) -> None:
    w0, sft, rl = masters(np.random.default_rng(19))
    base, middle, tuned = (
        save(tmp_path / name, side) for name, side in (("base", w0), ("sft", sft), ("rl", rl))
    )
    report = sv.orthogonality(f"{tuned}::{middle}", f"{middle}::{base}")
    assert abs(rows(report)["overall", ""]["z_groups"]) < 4
    assert report.warnings == []
    assert report.to_dict()["pairs"][0]["shared_rounding"] is None


def test_two_updates_of_one_rounded_base_share_it_too(tmp_path: Path) -> None:
    """Both went on from the master of a base that was saved in bf16: a positive cosine.

    It is not foreseen, as most bases are where training began; what is said is that they are bf16.
    """
    rng = np.random.default_rng(23)
    w0, *_ = masters(rng)
    base = save(tmp_path / "base", to_bf16(w0))
    refs = []
    for i in range(2):
        tuned = {n: w + normal(rng, *w.shape) * np.float32(2e-5) for n, w in w0.items()}
        refs.append(f"{save(tmp_path / str(i), tuned)}::{base}")
    report = sv.orthogonality(*refs)
    assert rows(report)["overall", ""]["cosine"] > 0.3
    assert report.to_dict()["pairs"][0]["shared_rounding"] is None
    assert any("16-bit" in warning for warning in report.warnings)


# ------------------------------------------------------------------------- one vector by itself


def test_norms_is_the_same_entry(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    both = sv.orthogonality(*refs, subspace=2).to_dict()
    alone = sv.norms(refs[1], subspace=2).to_dict()
    assert (alone["verb"], alone["pairs"], len(alone["norms"])) == ("norms", [], 1)
    assert alone["norms"][0] == both["norms"][1]
    assert alone["vectors"] == refs[1:]
    assert alone["lineage"] == ["BF16 - BF16"]


def test_every_key_and_column_is_documented(family) -> None:
    page = (Path(__file__).parents[2] / "docs" / "orthogonality.md").read_text()
    refs = [f"{family.tuned}::{family.sft}", f"{family.sft}::{family.base}"]
    said = sv.orthogonality(*refs, subspace=2, control="random", against=family.base).to_dict()
    pair, vector = said["pairs"][0], said["norms"][0]
    holders = [said, pair, vector, said["subspace"], pair["tensors"][0], vector["tensors"][0],
               pair["forecast"], pair["shared_rounding"]]  # fmt: skip
    missing = {key for held in holders for key in held if f"`{key}`" not in page}
    assert not missing
    for key in said:  # each in the table of the file
        assert f"`{key}`" in page.split("## The files")[1], key


def test_energy_shares_add_up_to_one(family) -> None:
    entry = sv.norms(f"{family.tuned}::{family.base}").to_dict()["norms"][0]
    for level in angles.LEVELS[:-1]:
        assert sum(row["energy_share"] for row in entry[level]) == pytest.approx(1), level
    for row in entry["tensors"]:
        assert isclose(row["rms"], row["norm"] / sqrt(row["numel"]))
    assert entry["overall"]["density"] == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_norms_beyond_fp32_squares(size: float, tmp_path: Path) -> None:
    """Squares of such values leave fp32; shares and angles stay what they are."""
    a, b = small(20), small(21)
    plain = rows_of(tmp_path / "plain", a, b)["overall", ""]
    deltas = ({n: x * np.float32(size) for n, x in side.items()} for side in (a, b))
    found = rows_of(tmp_path / "scaled", *deltas)["overall", ""]
    for column in ("cosine", "z_groups", "along", "conflict_a", "on_support_b"):
        assert found[column] == pytest.approx(plain[column], rel=1e-4), column
    assert found["norm_a"] == pytest.approx(plain["norm_a"] * size, rel=1e-5)


def test_fp64_beyond_fp32(tmp_path: Path) -> None:
    """fp64 values that fp32 cannot hold neither overflow nor vanish."""
    rng = np.random.default_rng(22)
    w = torch.zeros(300, dtype=torch.float64)
    save(tmp_path / "base", {"w": w})
    refs = []
    for i, size in enumerate((1e60, 1e-60)):
        values = torch.from_numpy(rng.normal(size=300) * size)
        refs.append(f"{save(tmp_path / str(i), {'w': values})}::{tmp_path / 'base'}")
    row = rows(sv.orthogonality(*refs))["overall", ""]
    assert abs(row["cosine"]) < 0.3
    assert (row["density_a"], row["density_b"]) == (1, 1)
    assert row["on_support_a"] == pytest.approx(1)
    assert row["conflict_b"] == pytest.approx(0.5, abs=0.2)


def test_squares_beyond_fp64_have_no_cosine_and_a_page(tmp_path: Path) -> None:
    """inf / inf is no number, and was once said to be a cosine of 1."""
    rng = np.random.default_rng(23)
    w = torch.zeros(8, 8, dtype=torch.float64)
    save(tmp_path / "base", {"m.layers.0.w": w})
    refs = []
    for i in range(2):
        values = torch.from_numpy(rng.normal(size=(8, 8)) * 1e200)
        refs.append(f"{save(tmp_path / str(i), {'m.layers.0.w': values})}::{tmp_path / 'base'}")
    report = sv.orthogonality(*refs, control="random", output=tmp_path / "out")
    row = report.facts["pairs"][0]["overall"]
    assert row["cosine"] is row["control_cosine"] is row["z"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The cosine of" in page and "has no value: squares leave fp64." in page


def test_bit_patterns_of_every_exponent(tmp_path: Path) -> None:
    """Bf16 weights, moved to their neighbours: one step each, nothing absorbed.

    From 2^-119 on, where a step is a normal number of fp32.
    """
    patterns = np.arange(0x0400, 0x7E80, 5, dtype=np.uint16)
    base = save(tmp_path / "base", {"w": from_bits(patterns, "BF16")})
    tuned = save(tmp_path / "tuned", {"w": from_bits(patterns + np.uint16(1), "BF16")})
    report = sv.norms(f"{tuned}::{base}")
    row = report.to_dict()["norms"][0]["overall"]
    assert row["steps"] == [0, 0, 0, patterns.size, 0, 0, 0, 0, 0]
    assert row["absorbed"] == 0
