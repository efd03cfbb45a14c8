"""Combinations weighed by Fisher information from files: values, proofs, and files that lie."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from families import load, perturbed, save, toy

import skillvec as sv
from skillvec.checkpoints.fisher_files import match_fishers, open_fisher
from skillvec.cli.commands import main

LONG = "model.layers.1.mlp.up_proj.weight"  # more than a block of 2^20


class World(NamedTuple):
    """Vector files, Fisher files, and what both hold as float64."""

    folder: Path
    vectors: list[str]
    fishers: list[str]
    values: list[dict[str, torch.Tensor]]
    information: list[dict[str, torch.Tensor]]


def diagonal(model: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in model.items():
        squares = torch.randn(tensor.shape, generator=generator) ** 2 * 1e-9
        made[name] = squares * (torch.rand(tensor.shape, generator=generator) < 0.7)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = toy(0) | {LONG: torch.randn(1025, 1024, generator=torch.manual_seed(5)).bfloat16()}
    save(folder / "base", base)
    vectors, fishers, values, information = [], [], [], []
    for seed, name in enumerate("ab", start=1):
        tuned = perturbed(base, seed, density=0.5)
        save(folder / name, tuned)
        sv.diff(folder / name, folder / "base", folder / f"{name}.safetensors")
        held = diagonal(base, seed)
        if name == "b":  # in another dtype, and in two files
            held = {key: tensor.bfloat16() for key, tensor in held.items()}
            save(folder / "fisher-b", held, shards=2)
        else:
            save(folder / "fisher-a.safetensors", held)
        vectors.append(str(folder / f"{name}.safetensors"))
        values.append({key: tuned[key].double() - base[key].double() for key in base})
        information.append({key: tensor.double() for key, tensor in held.items()})
    fishers = [str(folder / "fisher-a.safetensors"), str(folder / "fisher-b")]
    return World(folder, vectors, fishers, values, information)


def expected(world: World, name: str, weights: list[float], floor: float = 0.0) -> torch.Tensor:
    v = torch.stack([values[name] for values in world.values])
    f = torch.stack([held[name] for held in world.information]).clamp(min=floor)
    f[:, (f == 0).all(dim=0)] = 1
    w = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * (v.ndim - 1))
    return (w * f * v).sum(0) / (w * f).sum(0)


def check(world: World, vector: Path, weights: list[float], floor: float = 0.0) -> None:
    found = load(vector)
    del found["skillvec.blocks"]
    assert {*found} == {*world.values[0]}
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(), expected(world, name, weights, floor), rtol=2e-7, atol=1e-10
        )


def test_values_are_those_of_the_formula(world: World, tmp_path: Path) -> None:
    weights = [0.7, 1.2]
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for workers, file in zip((1, 3), files, strict=True):
        made = sv.combine(*world.vectors, weights=weights, op="fisher",
                          parameters={"fisher": world.fishers})  # fmt: skip
        made.save(file, codec="dense", workers=workers)
    assert files[0].read_bytes() == files[1].read_bytes()
    check(world, files[0], weights)
    some = expected(world, LONG, weights)
    assert all(delta.way is None for delta in made.deltas.values())  # equal values, other weights
    with pytest.raises(sv.SkillvecError, match="inside the input"):
        made.save(world.fishers[0], force=True)
    plain = sum(w * v[LONG] for w, v in zip(weights, world.values, strict=True)) / 1.9
    assert (some - plain).abs().max() > 1e-3  # it is no plain mean


def test_the_command_line_takes_a_file_for_each_vector(world: World, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    words = ["combine", f"{world.vectors[0]}=2", world.vectors[1], "-o", str(out), "--op", "fisher",
             "--param", "floor=1e-10", "--codec", "dense"]  # fmt: skip
    given = [word for file in world.fishers for word in ("--param", f"fisher={file}")]
    done = CliRunner().invoke(main, words + given)
    assert done.exit_code == 0, done.output
    check(world, out, [2, 1], 1e-10)
    for files, said in (
        ([], "no file of Fisher information for"),
        (given[:2] * 3, "2 vectors, but 3 files"),
        (["--param", "fisher=nowhere.safetensors"], "nowhere.safetensors"),
    ):
        done = CliRunner().invoke(main, [*words, "--force", *files])
        assert done.exit_code == 2 and said in done.output, done.output


def test_a_stored_one_is_made_again_and_proven(world: World, tmp_path: Path) -> None:
    """Wherever the files lie it has one identity; with other Fisher files it is another vector."""
    moved = [Path(shutil.copy(world.fishers[0], tmp_path / "f.safetensors")), world.fishers[1]]
    out, again = tmp_path / "c.safetensors", tmp_path / "again.safetensors"
    made = sv.combine(*world.vectors, op="fisher", parameters={"fisher": moved}, output=out,
                      codec="dense")  # fmt: skip
    other = sv.combine(*world.vectors, op="fisher", parameters={"fisher": world.fishers})
    turned = sv.combine(*world.vectors, op="fisher", parameters={"fisher": world.fishers[::-1]})
    assert made.manifest["identity"] == other.manifest["identity"] != turned.manifest["identity"]
    shares = made.manifest["recipe"]["vectors"]
    assert [share["parameters"]["fisher"] for share in shares] == list(map(str, moved))
    assert len({share["parameters"]["fisher_digest"] for share in shares}) == 2

    sv.verify(out)
    sv.combine(recipe=out, output=again, codec="dense")
    assert load(again)[LONG].equal(load(out)[LONG])
    lazy, stored = tmp_path / "lazy", tmp_path / "stored"
    sv.apply(world.folder / "base", made, stored)
    sv.apply(world.folder / "base", other, lazy)
    for name, tensor in load(lazy / "model.safetensors").items():
        assert tensor.equal(load(stored / "model.safetensors")[name])
    sv.verify(lazy)

    save(moved[0], {name: tensor * 2 for name, tensor in load(moved[0]).items()})
    with pytest.raises(sv.VerificationError, match=r"f\.safetensors: this is not the file"):
        sv.verify(out)
    moved[0].unlink()
    with pytest.raises(sv.UsageError, match=r"fisher .*f\.safetensors: no such file"):
        sv.verify(out)


def test_one_that_was_changed_where_no_sample_looks_is_found(world: World, tmp_path: Path) -> None:
    held = load(world.fishers[0])
    fisher, out = save(tmp_path / "f.safetensors", held), tmp_path / "c.safetensors"
    sv.combine(*world.vectors, op="fisher", output=out,
               parameters={"fisher": [fisher, world.fishers[1]]})  # fmt: skip
    at = int(torch.nonzero(world.values[0][LONG][-1] * held[LONG][-1])[0])
    held[LONG][-1, at] *= 3
    save(fisher, held)
    with pytest.raises(sv.VerificationError, match=f"{LONG}: 1 of 1049600 values differ"):
        sv.verify(out)


def test_recipes_name_files_by_vector(world: World, tmp_path: Path) -> None:
    shares: list[dict[str, Any]] = [
        {"vector": vector, "parameters": {"fisher": fisher}}
        for vector, fisher in zip(world.vectors, world.fishers, strict=True)
    ]
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"op": "fisher", "vectors": shares}))
    sv.combine(recipe=recipe, output=tmp_path / "c.safetensors", codec="dense")
    check(world, tmp_path / "c.safetensors", [1, 1])
    shares[1]["rules"] = [{"match": "*mlp*", "fisher": world.fishers[0]}]
    with pytest.raises(sv.UsageError, match="which no rule can change"):
        sv.combine(recipe={"op": "fisher", "vectors": shares})


def test_a_file_of_another_layout_is_brought_over(world: World, tmp_path: Path) -> None:
    """Names as a model inside another one has them; and a head that the files tie."""
    held = {f"base_model.{name}": tensor for name, tensor in load(world.fishers[0]).items()}
    fisher, out = save(tmp_path / "f.safetensors", held), tmp_path / "c.safetensors"
    files = {"fisher": [fisher, world.fishers[1]]}
    sv.combine(*world.vectors, op="fisher", parameters=files, output=out, codec="dense")
    check(world, out, [1, 1])


def test_a_head_goes_by_its_embedding_where_a_file_has_no_other(tmp_path: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    held = {embedding: torch.ones(4, 3)}
    (tied, _), (both, _) = (
        open_fisher(save(tmp_path / f"{n}.safetensors", tensors))
        for n, tensors in enumerate((held, held | {head: torch.ones(4, 3)}))
    )
    wanted = {head: (4, 3), embedding: (4, 3)}
    found = match_fishers([tied, both], wanted, {head: embedding}, ())
    names = {name: [source.name for source in sources] for name, sources in found.items()}
    assert names == {head: [embedding, head], embedding: [embedding, embedding]}
    with pytest.raises(sv.IncompatibleError, match=r"lm_head.weight \[4, 3\]: not in"):
        match_fishers([tied, both], wanted, {}, ())
    assert match_fishers([tied, both], wanted, {}, {head}).keys() == {embedding}


def refusal(world: World, held: dict[str, torch.Tensor], folder: Path) -> str:
    """Return what is said of a Fisher file, beside one that is as it should be."""
    fisher = save(folder / "f.safetensors", held)
    with pytest.raises(sv.SkillvecError) as caught:
        sv.combine(*world.vectors, op="fisher", output=folder / "c.safetensors",
                   parameters={"fisher": [world.fishers[1], fisher]})  # fmt: skip
    assert not (folder / "c.safetensors").exists()
    return str(caught.value)


@pytest.mark.parametrize("value", [-1e-30, float("nan"), float("inf")])
def test_values_that_are_no_information_are_refused(
    world: World, tmp_path: Path, value: float
) -> None:
    held = load(world.fishers[0])
    held[LONG][1024, 1000] = value
    said = refusal(world, held, tmp_path)
    assert f"f.safetensors: {LONG}: 1 values from" in said and "negative or not finite" in said


def test_files_that_do_not_fit_are_refused(world: World, tmp_path: Path) -> None:
    held = load(world.fishers[0])
    said = refusal(world, {LONG: held[LONG]}, tmp_path)
    count = len(held) - 1
    assert said.count(": not in ") == 5 and f"and {count - 5} more of" in said
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert f"{bias} [24]: F32 [23] in" in refusal(world, held | {bias: held[bias][1:]}, tmp_path)
    said = refusal(world, held | {bias: torch.ones(24, dtype=torch.int32)}, tmp_path)
    assert f"{bias} [24]: I32 [24] in" in said


def test_what_no_vector_changes_needs_no_information(world: World, tmp_path: Path) -> None:
    """Buffers have no gradient, and so stand in no Fisher file."""
    folder = world.folder
    for name in ("base", "a", "b"):
        model = load(folder / name / "model.safetensors")
        save(tmp_path / name, model | {"model.scale": torch.ones(3)})
    sides = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for name, side in zip("ab", sides, strict=True):
        sv.diff(tmp_path / name, tmp_path / "base", side)
    out = tmp_path / "c.safetensors"
    sv.combine(*sides, op="fisher", parameters={"fisher": world.fishers}, output=out, codec="dense")
    made = load(out)
    assert made["model.scale"].tolist() == [0, 0, 0]
    torch.testing.assert_close(made[LONG].double(), expected(world, LONG, [1, 1]))
