"""Operators on whole matrices, through the whole engine: against numpy's SVD in float64."""

import errno
import gc
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import assert_same_bits, load, perturbed, save, toy
from moments import write_moments

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.errors import IncompatibleError, OutputError, UsageError
from skillvec.files.scratch import Scratch
from skillvec.ops import low_rank, svd
from skillvec.vectors.deltas.low_rank import Factors

pytestmark = pytest.mark.usefixtures("one_thread")

UP, CONV = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.c_fc.weight"
EXPERTS, ODD = "experts.weight", "odd.weight"
BIAS, EMBED = "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"
RANK = 3


class World(NamedTuple):
    """A base, two updates of it as stored vectors, a target, moments, and what they are in fp64."""

    folder: Path
    files: list[Path]
    pairs: list[str]
    deltas: list[dict[str, np.ndarray]]
    moments: Path
    inputs: dict[str, np.ndarray]
    said: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One tensor has matrices of experts, one is fp64, one empty."""
    folder, rng = tmp_path_factory.mktemp("matrices"), np.random.default_rng(7)
    generator = torch.manual_seed(1)
    base = toy(0, width=16, vocabulary=24) | {
        CONV: 0.1 * torch.randn(16, 40, generator=generator).bfloat16(),
        EXPERTS: 0.1 * torch.randn(3, 10, 12, generator=generator).bfloat16(),
        ODD: torch.randn(7, 5, dtype=torch.float64, generator=generator),
        "empty.weight": torch.zeros(0, 8),
    }
    models = {"base": base, "one": perturbed(base, 1), "two": perturbed(base, 2, density=0.3)}
    models["two"]["lm_head.weight"] = base["lm_head.weight"]
    models["target"] = perturbed(base, 3)
    for name, tensors in models.items():
        save(folder / name, tensors)
    pairs = [f"{folder / name}::{folder / 'base'}" for name in ("one", "two")]
    files = [folder / f"{name}.safetensors" for name in ("one", "two")]
    for pair, file in zip(pairs, files, strict=True):
        sv.diff(*pair.split("::"), file)
    kept = {name: t.double().numpy() for name, t in load(folder / "base").items()}
    deltas = [
        {name: t.double().numpy() - kept[name] for name, t in load(folder / model).items()}
        for model in ("one", "two")
    ]
    said: dict[str, Any] = {UP: {"entry": "up", "input": "columns"}}
    said[UP.replace("0", "1")] = {"entry": "up", "input": "columns"}
    said[CONV] = {"entry": "conv", "input": "rows"}
    inputs = {
        entry: rng.standard_normal((50, 16)) * rng.lognormal(0, 1, 16) for entry in ("up", "conv")
    }
    file = write_moments(folder / "moments.safetensors", inputs, said)
    return World(folder, files, pairs, deltas, file, inputs, said)


def values_of(vector: sv.SkillVector, tmp_path: Path, **options: Any) -> dict[str, np.ndarray]:
    """Return the deltas of a vector as the official library reads them; zeros are not stored."""
    file = tmp_path / "plain.safetensors"
    manifest = vector.save(file, codec="dense", force=True, **options).manifest
    held = load(file)
    assert all(held[name].dtype == (torch.float64 if name == ODD else torch.float32)
               for name in manifest["tensors"] if name in held)  # fmt: skip
    return {name: held[name].double().numpy() if name in held else np.zeros(entry["shape"])
            for name, entry in manifest["tensors"].items()}  # fmt: skip


def head(delta: np.ndarray, rank: int, energy: float = 0.0) -> np.ndarray:
    """Return the best of a rank, or of the least rank with a share of energy, by numpy's SVD."""
    if delta.ndim < 2 or not delta.size:
        return delta
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    if energy:
        shares = np.cumsum(s**2, axis=-1) / np.sum(s**2, axis=-1, keepdims=True)
        kept = np.arange(s.shape[-1]) <= np.sum(shares < energy, axis=-1, keepdims=True)
    else:
        kept = np.arange(s.shape[-1]) < rank
    result: np.ndarray = (u * (s * kept)[..., None, :]) @ v
    return result


def assert_near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, right in expected.items():
        largest = np.linalg.norm(right.reshape(-1, right.shape[-1]), 2) if right.size else 0
        np.testing.assert_allclose(found[name], right, rtol=0, atol=2e-6 * largest, err_msg=name)


# ---------------------------------------------------------------------------------------- spectral


@pytest.mark.parametrize("given", [{"rank": RANK}, {"energy": 0.6}, {"energy": 0.97}])
def test_heads_and_residuals_are_those_of_numpy(
    given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    delta, made = world.deltas[0], {}
    for part in ("head", "residual"):
        parameters = given | {"part": part, "others": "split"}
        vector = sv.combine(world.files[0], op="spectral", parameters=parameters)
        made[part] = values_of(vector, tmp_path)
    heads = {name: head(d, given.get("rank", 0), given.get("energy", 0)) for name, d in
             delta.items()}  # fmt: skip
    assert_near(made["head"], heads)
    for name, values in delta.items():
        one, rest = made["head"][name], made["residual"][name]
        eps = 2.0**-24 if name != ODD else 2.0**-52
        assert (np.abs(one + rest - values) <= eps * (np.abs(one) + np.abs(rest))).all(), name
        norm = np.linalg.norm(values - heads[name])
        assert np.linalg.norm(rest) == pytest.approx(norm, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("given", [{"rank": 16}, {"energy": 1}])
def test_where_no_more_is_wanted_the_head_is_the_vector_itself(
    given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """So it is where a matrix has fewer directions than are wanted, beyond rounding."""
    plain = values_of(sv.combine(world.files[0], world.files[0], weights=[1, 0]), tmp_path)
    made = values_of(sv.combine(world.files[0], op="spectral", parameters=given), tmp_path)
    rest = values_of(
        sv.combine(world.files[0], op="spectral", parameters=given | {"part": "residual"}), tmp_path
    )
    for name, values in plain.items():
        assert made[name].tobytes() == values.tobytes(), name
        assert not rest[name].any() or values.ndim < 2, name
    rng = np.random.default_rng(0)
    thin = np.float32(rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30)))
    with svd.settled():
        assert low_rank.find_leading(thin, 5, 0).left is None
        assert low_rank.find_leading(thin, 1, 0).left is not None
        assert low_rank.find_leading(0 * thin, 5, 0)[2:5] == (None, 0.0, 0.0)


def test_a_krylov_space_gives_what_numpy_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "EXACT", 8)
    rng = np.random.default_rng(3)
    values = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 200))
    matrix = np.float32(values + 1e-3 * rng.standard_normal((300, 200)))
    with svd.settled():
        found = low_rank.find_leading(matrix, RANK, 0)
    assert found.left.shape == (300, RANK) and found.right.shape == (200, RANK)
    expected = head(matrix.astype(np.float64), RANK)
    np.testing.assert_allclose(found.left.astype(np.float64) @ found.right.T, expected, atol=1e-4)
    rest_sq = np.sum((matrix - expected) ** 2)
    assert found.rest_sq == pytest.approx(rest_sq, rel=1e-4)
    assert found.norm_sq == pytest.approx(np.sum(matrix.astype(np.float64) ** 2), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 350_000), (350_000, 3)])
def test_rows_across_the_borders_of_blocks(shape: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.manual_seed(2)
    models = [{"wide.weight": torch.randn(*shape, generator=generator)} for _ in range(2)]
    for name, model in zip(("tuned", "base"), models, strict=True):
        save(tmp_path / name, model)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base")
    (delta,) = ((one - other).double().numpy() for one, other in zip(*map(dict.values, models),
                                                                     strict=True))  # fmt: skip
    for part, expected in (("head", head(delta, 2)), ("residual", delta - head(delta, 2))):
        made = sv.combine(vector, op="spectral", parameters={"rank": 2, "part": part})
        found = values_of(made, tmp_path, workers=2)
        assert_near(found, {"wide.weight": expected})
        assert found["wide.weight"].tobytes() == values_of(made, tmp_path, workers=1)[
            "wide.weight"].tobytes()  # fmt: skip


RECIPE = {
    "op": "spectral",
    "parameters": {"rank": 2},
    "vectors": [
        {"vector": "one", "weight": 0.5,
         "rules": [{"match": EMBED, "part": "whole"}, {"match": UP, "rank": 1}]},
        {"vector": "two", "weight": -2, "parameters": {"part": "residual", "others": "drop"}},
    ],
}  # fmt: skip


def test_a_recipe_says_what_is_taken_of_which_vector(world: World, tmp_path: Path) -> None:
    """It is the sum of the parts of each, rounded once; not the part of the sum."""
    recipe = json.loads(json.dumps(RECIPE))
    for share, file in zip(recipe["vectors"], world.files, strict=True):
        share["vector"] = str(file)
    vector = sv.combine(recipe=recipe)
    one, two = world.deltas
    expected = {}
    for name in one:
        first = one[name] if name == EMBED else head(one[name], 1 if name == UP else 2)
        second = two[name] - head(two[name], 2) if two[name].ndim > 1 else 0
        expected[name] = 0.5 * first - 2 * second
    assert_near(values_of(vector, tmp_path), expected)
    stored = vector.save(tmp_path / "v.safetensors")
    assert stored.report.facts["matrices"]["tensors"] == 9
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]


def test_parts_may_have_the_norm_of_the_matrix(world: World, tmp_path: Path) -> None:
    for part in ("head", "residual"):
        given = {"rank": 1, "rescale": True, "part": part}
        made = values_of(sv.combine(world.files[0], op="spectral", parameters=given), tmp_path)
        for name in (UP, EXPERTS):
            delta = world.deltas[0][name]
            norms = [np.linalg.norm(values, axis=(-2, -1)) for values in (made[name], delta)]
            np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


@pytest.mark.parametrize(("others", "kept"), [("keep", "hr"), ("drop", ""), ("split", "h")])
def test_tensors_of_one_dimension(others: str, kept: str, world: World, tmp_path: Path) -> None:
    for part in ("head", "residual"):
        given = {"part": part, "others": others}
        made = values_of(sv.combine(world.files[0], op="spectral", parameters=given), tmp_path)
        right = world.deltas[0][BIAS] if part[0] in kept else np.zeros(16)
        assert np.array_equal(made[BIAS], right), part


# ----------------------------------------------------------------------------------------- project


def directions(world: World, entry: str, energy: float) -> np.ndarray:
    """Return the leading eigenvectors of E[x x'] from the very inputs, as columns."""
    _, values, vectors = np.linalg.svd(world.inputs[entry], full_matrices=False)
    count = int(np.sum(np.cumsum(values**2) / np.sum(values**2) < energy)) + 1
    result: np.ndarray = vectors[:count].T
    return result


def project(world: World, **given: Any) -> sv.SkillVector:
    return sv.combine(world.files[0], op="project", parameters={"moments": str(world.moments)}
                      | given)  # fmt: skip


def test_nothing_is_left_in_the_subspace_and_the_rest_is_as_it_was(
    world: World, tmp_path: Path
) -> None:
    made, expected = values_of(project(world), tmp_path), dict(world.deltas[0])
    for name, said in world.said.items():
        delta, basis = expected[name], directions(world, said["entry"], 0.9)
        assert 1 <= basis.shape[1] < 16
        if said["input"] == "columns":
            expected[name] = delta - delta @ basis @ basis.T
            inside = made[name] @ basis
        else:
            expected[name] = delta - basis @ basis.T @ delta
            inside = basis.T @ made[name]
        assert np.abs(inside).max() < 2e-6 * np.linalg.norm(delta, 2)
    assert_near(made, expected)
    untouched = [name for name in expected if name not in world.said]
    assert all(np.array_equal(made[name], world.deltas[0][name]) for name in untouched)


def test_a_subspace_of_no_direction_or_of_all(world: World, tmp_path: Path) -> None:
    for given in ({"rank": 16}, {"rank": 99}, {"energy": 1}):
        made = values_of(project(world, **given), tmp_path)
        assert not any(made[name].any() for name in world.said), given
    made = values_of(project(world, energy=0, rank=0), tmp_path)
    assert all(np.array_equal(made[name], delta) for name, delta in world.deltas[0].items())
    one = values_of(project(world, rank=1), tmp_path)
    moved = world.deltas[0][UP] - one[UP]
    assert np.linalg.matrix_rank(moved, tol=1e-4 * np.linalg.norm(moved)) == 1


def test_what_moments_do_not_know_is_named(world: World, tmp_path: Path) -> None:
    report = project(world).save(tmp_path / "p.safetensors").report
    (warning,) = report.warnings
    assert "of 6 of 9 matrices, which are kept whole" in warning and EMBED in warning
    assert BIAS not in warning
    assert warning in project(world, rank=0, energy=0).warnings
    alien = {f"model.{name}": said for name, said in world.said.items()}
    other = write_moments(tmp_path / "other.safetensors", world.inputs, alien)
    with pytest.raises(IncompatibleError, match="of 9 of 9 matrices: are the moments"):
        project(world, moments=str(other))


def test_each_vector_has_its_own_subspace(world: World, tmp_path: Path) -> None:
    vectors = [{"vector": str(file), "parameters": {"rank": rank, "moments": str(world.moments)}}
               for file, rank in zip(world.files, (1, 5), strict=True)]  # fmt: skip
    vector = sv.combine(recipe={"op": "project", "vectors": vectors})
    made, basis = values_of(vector, tmp_path), directions(world, "up", 1 - 1e-9)
    one, two = (deltas[UP] for deltas in world.deltas)
    expected = one + two - one @ basis[:, :1] @ basis[:, :1].T - two @ basis[:, :5] @ basis[:, :5].T
    assert_near({UP: made[UP]}, {UP: expected})
    told = [share.parameters["moments_digest"] for share in vector.recipe.shares]
    assert told == [project(world).recipe.parameters["moments_digest"]] * 2


def test_a_head_is_no_copy_of_an_embedding_whose_inputs_are_others(
    world: World, tmp_path: Path
) -> None:
    """Tied weights need one delta: a part of the one and all of the other are two."""
    said = world.said | {"lm_head.weight": {"entry": "up", "input": "columns"}}
    other = write_moments(tmp_path / "other.safetensors", world.inputs, said)
    for moments, same in ((world.moments, True), (other, False)):
        ways = [project(world, moments=str(moments)).deltas[name].way for name in
                (EMBED, "lm_head.weight")]  # fmt: skip
        assert (ways[0] == ways[1]) == same


def test_an_altered_vector_is_noticed(world: World, tmp_path: Path) -> None:
    file = tmp_path / "altered.safetensors"
    content = bytearray(world.files[0].read_bytes())
    spec = sv.SkillVector.open(world.files[0]).deltas[UP].spec
    content[spec.start + spec.nbytes // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(sv.FormatError, match=UP):
        sv.combine(file, op="spectral", output=tmp_path / "v.safetensors")


def test_moments_of_another_model_or_file_are_refused(world: World, tmp_path: Path) -> None:
    said = world.said | {EXPERTS: {"entry": "up", "input": "columns"},
                         "lm_head.weight": {"entry": "up", "input": "rows"}}  # fmt: skip
    other = write_moments(tmp_path / "other.safetensors", world.inputs, said)
    with pytest.raises(IncompatibleError, match=r"(?s)experts.weight \[3, 10, 12\].*lm_head"):
        project(world, moments=str(other))
    with pytest.raises(UsageError, match=r"gone.safetensors: no such file.*skillvec runs"):
        project(world, moments=str(tmp_path / "gone.safetensors"))
    shutil.copy(world.moments, moved := tmp_path / "moved.safetensors")
    vector = project(world, moments=str(moved))
    made = vector.save(tmp_path / "p.safetensors")
    digest = made.manifest["recipe"]["parameters"]["moments_digest"]
    assert made.manifest["identity"] == project(world).manifest["identity"]  # wherever it lies
    assert sv.verify(tmp_path / "p.safetensors").facts["verified"]
    inputs = world.inputs | {"up": 1.01 * world.inputs["up"]}
    write_moments(moved, inputs, world.said)
    with pytest.raises(IncompatibleError, match=f"expected {digest}.*another file"):
        sv.verify(tmp_path / "p.safetensors")
    assert project(world, moments=str(moved)).manifest["identity"] != made.manifest["identity"]


# ----------------------------------------------------------------------- wherever an operator works

CASES: list[tuple[str, dict[str, Any]]] = [
    ("spectral", {"rank": 2}), ("spectral", {"energy": 0.8, "part": "residual"}),
    ("project", {"energy": 0.7}),
]  # fmt: skip
case = pytest.mark.parametrize(("op", "given"), CASES)


def combined(op: str, given: dict[str, Any], world: World, **more: Any) -> sv.SkillVector:
    if op == "project":
        given = {"moments": str(world.moments)} | given
    return sv.combine(*world.files, weights=[0.7, -1.5], op=op, parameters=given, **more)


@case
def test_neither_seed_nor_workers_nor_codecs_change_a_byte(
    op: str, given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    vector = combined(op, given, world)
    for number, options in enumerate(({"engine": "serial"}, {"workers": 2}, {"workers": 5})):
        vector.save(tmp_path / f"{number}.safetensors", **options)
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 1
    seeded = combined(op, given, world, seed=9).save(tmp_path / "seeded.safetensors")
    pairs = dict(zip(world.files, world.pairs, strict=True))
    again = sv.combine(*pairs.values(), weights=[0.7, -1.5], op=op,
                       parameters=vector.recipe.parameters)  # fmt: skip
    made = again.save(tmp_path / "pairs.safetensors")
    first = sv.SkillVector.open(tmp_path / "0.safetensors").manifest["tensors"]
    assert seeded.manifest["tensors"] == made.manifest["tensors"] == first


@case
def test_computed_where_it_is_used_it_gives_the_bytes_of_what_is_stored(
    op: str, given: dict[str, Any], world: World, tmp_path: Path
) -> None:
    vector = combined(op, given, world)
    stored = vector.save(tmp_path / "v.safetensors")
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    target = world.folder / "target"
    options: dict[str, Any] = {"lam": 0.6, "rounding": "stochastic", "seed": 3}
    report = sv.apply(target, vector, tmp_path / "once", **options, exclude=["lm_head*"])
    sv.apply(target, stored, tmp_path / "twice", **options, exclude=["lm_head*"])
    assert_same_bits(tmp_path / "once", tmp_path / "twice")
    assert sv.verify(tmp_path / "once").facts["verified"]
    assert report.facts["matrices"]["kept_energy"][0] < 1
    angles = [
        sv.orthogonality(side, world.files[0]).facts["pairs"][0]["overall"]
        for side in (vector, stored)
    ]
    assert angles[0] == angles[1]


def test_head_and_residual_of_one_vector_are_orthogonal(world: World, tmp_path: Path) -> None:
    parts = [
        sv.combine(world.files[0], op="spectral", parameters={"rank": 2, "part": part})
        for part in ("head", "residual")
    ]
    (pair,) = sv.orthogonality(*parts, include=["*_proj.weight", "experts*"]).facts["pairs"]
    assert abs(pair["overall"]["cosine"]) < 1e-6


# -------------------------------------------------------------------------------- what is reported


def test_ranks_and_kept_energies(world: World, tmp_path: Path) -> None:
    given = {"energy": 0.6}
    report = sv.combine(*world.files, op="spectral", parameters=given,
                        output=tmp_path / "v.safetensors").report  # fmt: skip
    lines = {line["name"]: line for line in report.ledger}
    sums = np.zeros((2, 2))
    for name, line in lines.items():
        if "ranks" not in line:
            assert len(line["shape"]) == 1 or name == "empty.weight"
            continue
        for i, delta in enumerate(deltas[name] for deltas in world.deltas):
            if name == "lm_head.weight" and i == 1:
                assert line["ranks"][i] is None or line["kept_energies"][i] is None
                continue
            norm_sq, kept_sq = np.sum(delta**2), np.sum(head(delta, 0, 0.6) ** 2)
            sums[i] += kept_sq, norm_sq
            if delta.size:
                assert line["kept_energies"][i] == pytest.approx(kept_sq / norm_sq, rel=1e-5)
            ranks = np.linalg.matrix_rank(head(delta, 0, 0.6), tol=1e-7) if delta.size else 0
            assert line["ranks"][i] == np.max(ranks), name
    found = report.facts["matrices"]
    assert found["kept_energy"] == pytest.approx(list(sums[:, 0] / sums[:, 1]), rel=1e-5)
    assert found["tensors"] == 9 and found["least_rank"] == 2 and found["most_rank"] > 4


def test_on_the_screen(world: World, tmp_path: Path) -> None:
    words = ["combine", world.files[0], "--op", "project", "--param", f"moments={world.moments}",
             "--param", "rank=4", "-o", tmp_path / "v.safetensors"]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "% of the squared norm of 3 matrices (rank 4)" in said
    words = ["apply", world.folder / "target", world.files[0], "--op", "spectral", "--param",
             "rank=2", "--param", "part=residual", "-o", tmp_path / "out"]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "of the squared norm of 9 matrices (rank 2)" in " ".join(result.output.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| combined by | spectral, rank 2, part residual |" in card
    assert "--op spectral --param rank=2.0 --param part=residual" in card


def test_memory_of_whole_matrices_is_in_the_plan(world: World, tmp_path: Path) -> None:
    def planned(**more: Any) -> int:
        options = more | {"output": tmp_path / "v.safetensors", "dry_run": True, "workers": 1}
        return int(sv.combine(world.files[0], **options).report.facts["memory_nbytes"])

    # buffers of a vector that is merged, the room of a worker's reading, three copies in fp32
    plain = planned() + (4 << 20) + (32 << 20)
    assert planned(op="spectral") - plain == 3 * (4 * 16 * 40 + 8 * 16**2)
    given = {"moments": str(world.moments)}
    assert planned(op="project", parameters=given) - plain == 3 * (12 * 16**2 + 8 * 16 * 40)


# ------------------------------------------------------------------------------- the scratch file


def test_what_is_found_lies_on_the_disk_and_goes_with_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    seen, real = [], Scratch.read
    monkeypatch.setattr(Scratch, "read", lambda self, *rest: (seen.append(self.path),
                                                              real(self, *rest))[1])  # fmt: skip
    values_of(sv.combine(world.files[0], op="spectral"), tmp_path)
    assert len(set(seen)) == 1 and Path(seen[0]).parent == tmp_path / "scratch"
    gc.collect()
    assert not [*(tmp_path / "scratch").iterdir()]


def test_another_process_reads_it_and_leaves_it() -> None:
    scratch = Scratch()
    values = np.arange(6, dtype=np.float32)
    scratch.add(memoryview(b"xx"))
    begin = scratch.add(values.view(np.uint8).data)
    other = pickle.loads(pickle.dumps(Factors(scratch, ())))
    assert other.rows(begin, 1, 2, 2).tolist() == [[2, 3], [4, 5]]
    path = Path(other.scratch.path)
    del other
    gc.collect()
    assert path.exists()
    del scratch
    gc.collect()
    assert not path.exists()


def test_a_full_disk_is_an_error_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    scratch = Scratch()
    monkeypatch.setattr(scratch._file, "write", write)
    with pytest.raises(OutputError, match=r"no room for what is found.*No space.*TMPDIR"):
        scratch.add(memoryview(b"x"))


def test_a_stream_reads_once_and_so_cannot(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="spectral has to measure before"):
        combined("spectral", {}, world).save(tmp_path / "v.safetensors", stream=True)
