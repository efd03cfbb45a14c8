"""Coarse copies and their factors: against numpy, another reader, and all that reads a file."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import load, save
from reader import read_vector
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import skillvec as sv
from skillvec.checkpoints.lora_deltas import product
from skillvec.engine.jobs.store import StoreJob
from skillvec.engine.plan import Plan
from skillvec.engine.threads import check_views
from skillvec.errors import FormatError, IncompatibleError, NonfiniteError
from skillvec.files.file import digest_bytes
from skillvec.files.header import TensorSpec
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.special import round_mantissa
from skillvec.vectors.block_reader import Block, Workspace
from skillvec.vectors.deltas.view import VIEW, ViewDelta
from skillvec.vectors.manifest import manifest_digest
from skillvec.vectors.reader import readers_of
from skillvec.verbs.cards import vector_card
from skillvec.verbs.inspect_sentences import say_inspect

pytestmark = pytest.mark.usefixtures("one_thread")

UP, EXPERTS, NORM, THIN = "layers.0.up.weight", "experts.weight", "norm.weight", "thin.weight"
SHAPES = {UP: (96, 64), EXPERTS: (3, 40, 50), NORM: (64,), THIN: (3, 90), "equal.weight": (8, 8)}


def models_of(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write base and tuned, and return their difference, stored."""
    generator = torch.manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    step = {name: 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
    save(folder / "base", base)
    save(folder / "tuned", {n: t + step[n] * (n != "equal.weight") for n, t in base.items()})
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder / "v.safetensors"


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_of(tmp_path_factory.mktemp("coarsen"), SHAPES)


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Change the manifest and tensors of a vector, and give it the right digest again."""
    with safe_open(file, "np") as opened:
        manifest = json.loads(opened.metadata()["skillvec"])
    tensors = load_file(file)
    change(manifest, tensors)
    manifest["digest"] = manifest_digest(manifest)
    save_file(tensors, file, {"format": "pt", "skillvec": json.dumps(manifest)})


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Round mantissas by frexp and rint, which rounds ties to even.

    Of no bits both neighbours are powers of two: ties go to the even pattern, an odd exponent.
    """
    share, exponent = np.frexp(values.astype(np.float64))
    found = np.ldexp(np.rint(np.ldexp(share, bits + 1)), exponent - bits - 1)
    if not bits:
        down = (np.abs(share) == 0.75) & (exponent % 2 == 0)  # 1.5 * 2^(exponent - 1)
        found = np.where(down, np.ldexp(np.sign(share), exponent - 1), found)
    return np.where(np.abs(found) < 2.0**-126, 0, found)


# ------------------------------------------------------------------------------------- mantissas


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 7, 22])
def test_mantissas_are_rounded_to_nearest_ties_to_even(bits: int) -> None:
    rng = np.random.default_rng(bits)
    patterns = rng.integers(0, 2**32, 20_000, np.uint32)
    short = (patterns >> np.uint32(22 - bits)) << np.uint32(22 - bits)  # every other one is a tie
    values = np.concatenate([patterns, short]).view(np.float32)
    values = values[np.isfinite(values)]
    found = round_mantissa(values, bits)
    assert np.array_equal(found, rounded(values, bits))
    near = found[np.abs(found) < 3e38]
    stored = near.astype(np.float32)
    assert np.array_equal(stored, near)  # fp32 holds them
    if bits <= 7:
        assert not (stored.view(np.uint32) & 0xFFFF).any()  # and so does bf16
    for value, other in zip(values[:200], found[:200], strict=True):
        if other:
            step = Fraction(2) ** (int(np.frexp(value)[1]) - 1 - bits)
            assert abs(Fraction(float(value)) - Fraction(float(other))) <= step / 2


def test_all_bits_leave_every_value_alone() -> None:
    values = np.array([1e-40, -1.1754942e-38, 0.1, 3.4e38], np.float32)
    assert np.array_equal(round_mantissa(values, 23), values)
    assert round_mantissa(np.array([1e-300]), 23)[0] == 1e-300
    assert round_mantissa(values, 21)[:2].tolist() == [0, -(2.0**-126)]


# --------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("given", [{"rank": 4, "bits": 2}, {"rank": 2}, {"bits": 3},
                                   {"rank": 1, "bits": 0}])  # fmt: skip
def test_every_way_to_store_and_to_read_gives_the_same_bits(
    given: dict[str, Any], vector: Path, tmp_path: Path
) -> None:
    """Factors, multiplied out, values, computed where they are used, one worker and two."""
    file = tmp_path / "v.safetensors"
    made = sv.combine(vector, op="coarsen", parameters=given, output=file, workers=1)
    one = file.read_bytes()
    sv.combine(vector, op="coarsen", parameters=given, output=file, workers=2, force=True)
    assert file.read_bytes() == one
    plain = sv.combine(vector, op="coarsen", parameters=given, output=tmp_path / "d.safetensors",
                       codec="dense")  # fmt: skip
    computed = dict(sv.combine(vector, op="coarsen", parameters=given).items())
    manifest, read = read_vector(file)
    for name, values in made.items():
        for other in (plain[name], computed[name], read[name][0]):
            assert np.array_equal(values.view(np.uint32), other.view(np.uint32)), name
    codecs = {name: entry["codec"] for name, entry in manifest["tensors"].items()}
    kept = "factors" if given.get("rank") else "packed"
    assert codecs[UP] == codecs[EXPERTS] == kept
    assert codecs[NORM] == "packed"
    assert codecs["equal.weight"] == "zero"
    # four triplets of 3 x 90 take more numbers than it has
    assert codecs[THIN] == ("packed" if given.get("rank") == 4 else kept)
    # without factors the 16-bit values have ranks, as any of a file of schema 2
    assert manifest["schema"] == (3 if given.get("rank") else 2)
    assert {entry["dtype"] for entry in manifest["tensors"].values()} == (
        {"BF16"} if given.get("bits", 23) <= 7 else {"F32"})  # fmt: skip
    for name, entry in manifest["tensors"].items():
        found = np.count_nonzero(made[name])
        assert found <= entry["changed"] and found >= 0.9 * entry["changed"]
        assert entry["norm"] == pytest.approx(np.linalg.norm(made[name].ravel()), rel=1e-4)
    assert sv.verify(file).facts["verified"]
    again = sv.combine(file, output=tmp_path / "again.safetensors")
    assert again.manifest["tensors"] == manifest["tensors"]


def test_values_are_those_of_numpy(vector: Path) -> None:
    """The product of a matrix' leading triplets, each side rounded; without a rank the values."""
    exact = dict(sv.SkillVector.open(vector).items())
    found = sv.combine(vector, op="coarsen", parameters={"rank": 2, "bits": 3})
    matrices = exact[EXPERTS].astype(np.float64)
    u, s, v = np.linalg.svd(matrices, full_matrices=False)
    for at, values in enumerate(found[EXPERTS]):
        left, right = u[at][:, :2] * s[at][:2] ** 0.5, v[at][:2].T * s[at][:2] ** 0.5
        expected = np.float32(rounded(np.float32(left), 3) @ rounded(np.float32(right), 3).T)
        # a value that LAPACK's last bit puts on the other side of a tie is another one
        assert np.mean(np.isclose(values, expected, rtol=1e-6, atol=1e-9)) > 0.95
    assert np.array_equal(found[NORM], rounded(exact[NORM], 3))
    whole = sv.combine(vector, op="coarsen", parameters={"bits": 1})
    assert np.array_equal(whole[UP], rounded(exact[UP], 1))
    dropped = sv.combine(vector, op="coarsen", parameters={"bits": 1, "others": "drop"})
    assert not dropped[NORM].any() and np.array_equal(dropped[UP], whole[UP])


def test_blocks_and_stacks_that_are_cut(tmp_path: Path) -> None:
    """Rows across the borders of blocks, and factors that fill more than a block themselves."""
    vector = models_of(tmp_path, {"wide.weight": (3, 420_000), "tall.weight": (420_000, 4)})
    file = tmp_path / "c.safetensors"
    given = {"rank": 1, "bits": 7}
    made = sv.combine(vector, op="coarsen", parameters=given, output=file)
    two = sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2},
                     output=tmp_path / "two.safetensors")  # fmt: skip
    assert two.manifest["tensors"]["tall.weight"]["rank"] == 3  # 1,260,012 factors
    for vector, path in ((made, file), (two, tmp_path / "two.safetensors")):
        _, read = read_vector(path)
        for name, values in vector.items():
            assert np.array_equal(values.view(np.uint32), read[name][0].view(np.uint32)), name
        rows = vector["tall.weight", 300_000:300_010]
        assert np.array_equal(rows, read["tall.weight"][0][300_000:300_010])


def test_products_do_not_depend_on_the_library() -> None:
    """Sums in the order of the columns, whatever order BLAS adds in."""
    rng = np.random.default_rng(5)
    left, right = (rng.integers(-9, 9, (40, 300)) * 2.0 ** rng.integers(-40, 40, 300)
                   for _ in range(2))  # fmt: skip
    total = np.zeros((40, 40))
    for c in range(300):
        total += np.outer(left[:, c], right[:, c])
    found = product(left, np.ascontiguousarray(right.T), 1.0)
    assert np.array_equal(found, total.astype(np.float32) + np.float32(0))


@pytest.mark.parametrize("weights", [[0.5], [1, 1]])
def test_what_is_no_product_is_multiplied_out(
    weights: list[float], vector: Path, tmp_path: Path
) -> None:
    given = {"rank": 2, "bits": 2}
    one = sv.combine(vector, op="coarsen", parameters=given)
    made = sv.combine(*[vector] * len(weights), weights=weights, op="coarsen", parameters=given,
                      output=tmp_path / "c.safetensors")  # fmt: skip
    assert made.manifest["tensors"][UP]["codec"] == "packed"
    assert np.array_equal(made[UP], np.float32(sum(weights) * one[UP].astype(np.float64)))
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]


def test_differences_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vector = models_of(tmp_path, SHAPES)
    tuned = load(tmp_path / "tuned")
    tuned[UP][3, 4] = float("nan")
    save(tmp_path / "tuned", tuned)
    pair = f"{tmp_path / 'tuned'}::{tmp_path / 'base'}"
    for rank in (0, 2):
        with pytest.raises(NonfiniteError, match=UP):
            sv.combine(pair, op="coarsen", parameters={"rank": rank, "bits": 2},
                       output=tmp_path / "c.safetensors")  # fmt: skip
    assert sv.combine(vector, op="coarsen", parameters={"rank": 2})[UP].any()


def test_products_beyond_fp32_are_refused_by_name(tmp_path: Path) -> None:
    """1.5 * 2^127 is finite, and what is left of it with no bits of mantissa is 2^128."""
    for dtype, value in ((torch.float32, 1.5 * 2.0**127), (torch.float64, 1e200)):
        sides = {"tuned": value, "base": 0.0}
        for side, number in sides.items():
            save(tmp_path / side, {UP: torch.full((9, 8), number, dtype=dtype)})
        pair = f"{tmp_path / 'tuned'}::{tmp_path / 'base'}"
        with pytest.raises((NonfiniteError, IncompatibleError), match=UP):
            sv.combine(pair, op="coarsen", parameters={"rank": 1, "bits": 0},
                       output=tmp_path / "c.safetensors")  # fmt: skip
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("kept", [float("nan"), 7, -0.1])
def test_a_share_that_cannot_be_is_refused(kept: float, vector: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    rewrite(file, lambda manifest, tensors: manifest.update(kept=kept))
    with pytest.raises(FormatError, match="kept"):
        sv.inspect(file)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "coarsen"),
        ({}, "coarsen"),
        ({"op": 7, "parameters": 3, "vectors": 3}, "coarsen"),
        ({"parameters": {"rank": 2.0, "\x1b[2J": 1, "others": "\x1b[2J"},
          "vectors": [3, {"parameters": None}, {"parameters": {"bits": 1, "others": "drop"}}]},
         "coarsen, rank 2, bits 1, others drop"),
    ],
)  # fmt: skip
def test_a_recipe_that_others_wrote_is_told_as_far_as_it_goes(
    recipe: Any, said: str, vector: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    rewrite(file, lambda manifest, tensors: manifest.update(recipe=recipe))
    assert f"  lossy    {said}" in say_inspect(sv.inspect(file))


def test_what_counts_for_nothing_is_stored_as_zero(vector: Path, tmp_path: Path) -> None:
    recipe = {"op": "coarsen", "parameters": {"rank": 2, "bits": 2}, "vectors": [
        {"vector": str(vector), "rules": [{"match": "experts*", "weight": 0}]}]}  # fmt: skip
    made = sv.combine(recipe=recipe, output=tmp_path / "c.safetensors")
    codecs = {name: entry["codec"] for name, entry in made.manifest["tensors"].items()}
    assert codecs[EXPERTS] == "zero" and codecs[UP] == "factors"
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]


# ---------------------------------------------------------------------------- as any other vector


def test_it_is_applied_attached_and_merged_as_any_other(vector: Path, tmp_path: Path) -> None:
    folder, file = vector.parent, tmp_path / "c.safetensors"
    made = sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    sv.apply(folder / "base", file, tmp_path / "out", lam=0.5)
    assert sv.verify(tmp_path / "out").facts["verified"]
    base, out = load(folder / "base"), load(tmp_path / "out")
    for name, values in made.items():
        expected = (base[name].double() + 0.5 * torch.from_numpy(values).double()).float()
        assert torch.equal(out[name], expected), name
    both = sv.combine(file, vector, weights=[1, -1])
    exact = sv.SkillVector.open(vector)
    assert np.array_equal(both[UP], np.float32(made[UP].astype(np.float64) - exact[UP]))
    # a linear recipe of it alone is no product of its own: it is multiplied out
    rules = [{"match": "experts*", "weight": 0}]
    recipe = {"vectors": [{"vector": str(file), "rules": rules}]}
    mixed = sv.combine(recipe=recipe, output=tmp_path / "m.safetensors")
    assert mixed.manifest["tensors"][UP]["codec"] == "packed"
    assert np.array_equal(mixed[UP], made[UP])


def test_it_says_that_it_is_lossy(vector: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    made = sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    assert made.manifest["exactness"]["claim"] == "lossy"
    exact = sv.SkillVector.open(vector)
    names = [name for name, e in made.manifest["tensors"].items() if e["codec"] == "factors"]
    lost = sum(np.sum((exact[n].astype(np.float64) - made[n]) ** 2) for n in names)
    whole = sum(np.sum(exact[n].astype(np.float64) ** 2) for n in names)
    assert made.manifest["kept"] == pytest.approx(1 - lost / whole, rel=1e-3)
    said = "\n".join(say_inspect(sv.inspect(file)))
    share = f"{100 * made.manifest['kept']:.3g} % of its matrices' norm^2"
    for part in ("exact    lossy", "lossy    coarsen, rank 3, bits 2", share):
        assert part in said
    card = vector_card(made.manifest, name="org/c", files={"c.safetensors": 1})
    assert "a coarser copy, by the operator coarsen" in card
    assert f"keep {made.manifest['kept']:.3g} of the squared norm" in card
    again = sv.combine(file, output=tmp_path / "again.safetensors").manifest
    assert (again["exactness"]["claim"], again["kept"]) == ("lossy", made.manifest["kept"])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rank": 0}, "of rank 0"),
        ({"rank": True}, "of rank True"),
        ({"rank": 64}, "of rank 64"),  # no fewer numbers than the values
        ({"rank": 5}, "do not decode|does not fit|altered"),
        ({"rank": 2}, "altered"),
        ({"dtype": "F64"}, "F64"),
        ({"shape": [6144]}, "of rank 3"),
        ({"codec": "sketch"}, "a newer skillvec is needed"),
    ],
)
def test_files_that_others_wrote_are_checked(
    changes: dict[str, Any], said: str, vector: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    rewrite(file, lambda manifest, tensors: manifest["tensors"][UP].update(changes))
    with pytest.raises(FormatError, match=said):
        dict(sv.SkillVector.open(file).items())


def test_factors_laid_otherwise_do_not_fit_the_base(vector: Path, tmp_path: Path) -> None:
    file, turned = tmp_path / "c.safetensors", {"shape": [64, 96]}  # as many factors
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    rewrite(file, lambda manifest, tensors: manifest["tensors"][UP].update(turned))
    with pytest.raises(IncompatibleError, match=UP):
        sv.apply(vector.parent / "base", file, tmp_path / "out")


def test_factors_have_no_exceptions(vector: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)

    def change(manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        rows = tensors["skillvec.blocks"].view("<u4").copy()
        rows[manifest["tensors"][UP]["block"], 1] = 1
        tensors["skillvec.blocks"] = rows.view(np.uint8)
        tensors["skillvec.exceptions"] = np.zeros((1, 8), np.uint8)
        for name in ("skillvec.blocks", "skillvec.exceptions"):
            manifest["side"][0][name] = digest_bytes(tensors[name].tobytes())

    rewrite(file, change)
    with pytest.raises(FormatError, match=f"{UP}: factors with exceptions"):
        sv.SkillVector.open(file)[UP]


def test_altered_factors_are_found(vector: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 7}, output=file)
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin = 8 + int.from_bytes(content[:8], "little") + header[f"{UP}.factors"]["data_offsets"][1]
    content[begin - 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FormatError, match=UP):
        sv.SkillVector.open(file)[UP]
    with pytest.raises(FormatError, match=UP):
        sv.apply(vector.parent / "base", file, tmp_path / "out")


def test_through_another_layout(tmp_path: Path) -> None:
    """A target with fewer rows sees the product through a view; altered factors are found there."""
    embedding, file = "model.embed_tokens.weight", tmp_path / "c.safetensors"
    vector = models_of(tmp_path, {embedding: (96, 64), "head.weight": (4, 4)})
    made = sv.combine(vector, op="coarsen", parameters={"rank": 3, "bits": 2}, output=file)
    target = load(vector.parent / "base")
    target[embedding] = target[embedding][:90].clone()
    save(tmp_path / "target", target)
    sv.apply(tmp_path / "target", file, tmp_path / "out", rows="common")
    found = load(tmp_path / "out")[embedding]
    expected = (
        target[embedding].double() + torch.from_numpy(made[embedding][:90]).double()
    ).float()
    assert torch.equal(found, expected)
    entry = {"digest": "0" * 32}
    rewrite(file, lambda manifest, tensors: manifest["tensors"][embedding].update(entry))
    with pytest.raises(FormatError, match=f"{embedding} differs from its digest"):
        sv.apply(tmp_path / "target", file, tmp_path / "other", rows="common")


def test_factors_that_no_view_read_are_read_for_their_digest(tmp_path: Path) -> None:
    """The blocks of a stack are not those of its product, of which others have their numbers."""
    name, file = "tall.weight", tmp_path / "c.safetensors"
    vector = models_of(tmp_path, {name: (3 * BLOCK_NUMEL + 9, 2)})
    made = sv.combine(vector, op="coarsen", parameters={"rank": 1, "bits": 2}, output=file)
    delta, readers = made.deltas[name], readers_of(made.files())
    leaves: dict[str, bytearray] = {}
    for index in range(block_count(delta.spec.numel)):
        delta.read(Block(index, delta.spec.numel, Workspace(), readers, leaves), f"delta0{VIEW}")
    (held,) = leaves.values()
    first, held[16:32] = (
        bytes(held[:16]),
        bytes(16),
    )  # block 1: values that blocks 2 and 3 of the product have
    view = ViewDelta(TensorSpec(name, "F32", delta.spec.shape, "", 0, 0), delta.as_view())
    job = StoreJob(name, delta.spec.numel, out_dtype="F32", deltas=(view,), codec="dense")
    check_views(Plan("apply", [job]), readers, {delta.key: leaves})
    held[16:32] = first
    with pytest.raises(FormatError, match=f"{name} differs from its digest"):
        check_views(Plan("apply", [job]), readers, {delta.key: leaves})
