"""What is said of a target before anything is added to it, and what a vector says of itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from families import perturbed, save, toy

import skillvec as sv
from skillvec.cli.commands import main

EXACT, FAMILY, UNKNOWN = "exact base", "same family", "same shapes, unknown lineage"
Tensors = dict[str, torch.Tensor]
CONFIG = {"model_type": "llama", "hidden_size": 48}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report_of(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def initialised(seed: int, dtype: str = "BF16") -> Tensors:
    """Return the weights of a small model as transformers would draw them."""
    return toy(seed, dtype, layers=4, width=48, vocabulary=200, scale=0.02)


def wide(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a model tuned from it and their vector."""
    folder = tmp_path_factory.mktemp("skill")
    base = initialised(0)
    side_files = {"tokenizer.json": '{"model": 1}'}
    save(folder / "base", base, config=CONFIG, side_files=side_files)
    save(folder / "tuned", perturbed(base, 1, density=0.2), config=CONFIG)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


TARGETS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "the base": (lambda base: base, EXACT),
    "fine-tuned": (lambda base: perturbed(base, 3), FAMILY),
    "fine-tuned in fp32": (lambda base: perturbed(wide(base), 3), FAMILY),
    "the base in fp16": (lambda base: {n: t.half() for n, t in base.items()}, FAMILY),
    "moved by a third": (lambda base: perturbed(base, 3, size=0.007), FAMILY),
    "half of it pruned": (
        lambda base: {n: t * (torch.rand(t.shape) < 0.5) for n, t in base.items()}, FAMILY),
    "one matrix drawn anew": (
        lambda base: base | {"lm_head.weight": initialised(5)["lm_head.weight"]}, FAMILY),
    "drawn anew": (lambda base: initialised(77), UNKNOWN),
    "drawn anew in fp32": (lambda base: initialised(78, "F32"), UNKNOWN),
    "the other way round": (lambda base: {n: -t for n, t in base.items()}, UNKNOWN),
    "nothing but zeros": (lambda base: {n: 0 * t for n, t in base.items()}, UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "shards", "file"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_verdict_comes_from_the_weights(
    name: str, form: str, skill: Path, tmp_path: Path
) -> None:
    """The same in inspect, in a dry run, in apply and in verify; a file alone has no config."""
    make, verdict = TARGETS[name]
    torch.manual_seed(1)
    tensors = make(initialised(0))
    if form == "file":
        target, out = save(tmp_path / "target.safetensors", tensors), tmp_path / "out.safetensors"
    else:
        shards, out = 3 if form == "shards" else 1, tmp_path / "out"
        # a config that differs: what the weights say counts more
        target = save(tmp_path / "target", tensors, shards=shards, config=CONFIG | {"note": name})
    vector = skill / "v.safetensors"
    said = [
        report_of("inspect", vector, "--target", target),
        report_of("apply", target, vector, "-o", out, "--dry-run"),
        report_of("apply", target, vector, "-o", out),
        report_of("verify", out),
    ]
    for report in said:
        assert report["verdict"] == verdict, report["verb"]
        warned = [w for w in report["warnings"] if "same shapes, but nothing says" in w]
        assert len(warned) == (verdict == UNKNOWN), report["verb"]
    shown = run("inspect", vector, "--target", target)
    assert f"verdict  on {target}: {verdict}" in shown.stdout
    assert ("warning: " in shown.stderr) == (verdict == UNKNOWN)
    assert sv.inspect(vector, target).facts["verdict"] == verdict


def test_of_twenty_strangers_none_is_family(skill: Path) -> None:
    vector = sv.SkillVector.open(skill / "v.safetensors")
    for seed in range(100, 120):
        stranger = save(skill / f"stranger-{seed}", initialised(seed), config=CONFIG | {"s": seed})
        assert sv.inspect(vector.ref, stranger).facts["verdict"] == UNKNOWN, seed


def pair_of(base: Tensors, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Save a base and a model where one value more is 1, and their vector; return its path."""
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    next(iter(tuned.values())).reshape(-1)[0] = 1
    save(folder / "base", base, config=config)
    save(folder / "tuned", tuned, config=config)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder / "v.safetensors"


def drawn(seed: int, count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": (torch.randn(*shape, generator=generator) * 0.02).to(dtype)
            for i in range(count)}  # fmt: skip


def with_constants(seed: int) -> Tensors:
    """Return three drawn matrices among nine that say the same in every model."""
    tables = {f"table.{i}.weight": torch.full((16, 16), 0.5 + i) for i in range(6)}
    masks = {f"mask.{i}": torch.tril(torch.ones(1, 1, 64, 64)) for i in range(3)}
    return drawn(seed, 3, 32, 32) | tables | masks


STRANGERS: dict[str, Callable[[int], Tensors]] = {
    "one matrix": lambda seed: drawn(seed, 1, 64, 64),
    "two matrices": lambda seed: drawn(seed, 2, 64, 64),
    "tiny matrices": lambda seed: drawn(seed, 8, 2, 2),
    "vectors alone": lambda seed: drawn(seed, 8, 300),
    "constants": with_constants,
    "in fp64": lambda seed: drawn(seed, 8, 32, 32, dtype=torch.float64),
    "far out": lambda seed: {
        name: tensor * 1e200 for name, tensor in drawn(seed, 8, 9, 9, dtype=torch.float64).items()
    },
    "many": lambda seed: drawn(seed, 90, 16, 16),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_not_taken_for_family(name: str, tmp_path: Path) -> None:
    """However little there is to compare; and a relative is not taken for a stranger."""
    make = STRANGERS[name]
    vector = pair_of(make(0), tmp_path, {"model_type": "toy", "layers": 1})
    relative = {name: tensor * 1.001 for name, tensor in perturbed(make(0), 5, 1e-4).items()}
    verdicts = {}
    for seed in range(1, 25):
        stranger = save(tmp_path / f"{seed}", make(seed), config={"model_type": "toy", "s": seed})
        verdicts[seed] = sv.inspect(vector, stranger).facts["verdict"]
    assert set(verdicts.values()) == {UNKNOWN}, verdicts
    if name != "vectors alone":
        kin = save(tmp_path / "kin", relative)
        assert sv.inspect(vector, kin).facts["verdict"] == FAMILY


@pytest.mark.parametrize("special", ["nan", "inf", "zeros", "empty"])
def test_weights_that_tell_nothing_leave_it_to_the_config(special: str, tmp_path: Path) -> None:
    """Where no weight can be compared the config decides; nothing breaks, no warning of numpy."""
    value = {"nan": float("nan"), "inf": float("inf")}.get(special, 0.0)
    rows = 0 if special == "empty" else 8
    base = {f"{i}.weight": torch.full((rows, 8), value) for i in range(3)} | {"n": torch.zeros(3)}
    vector = pair_of({"n": base.pop("n")} | base, tmp_path, CONFIG)
    other = {name: tensor.clone() for name, tensor in base.items()} | {"n": torch.full((3,), 2.0)}
    same = save(tmp_path / "same", other, config=CONFIG)
    another = save(tmp_path / "another", other, config=CONFIG | {"hidden_size": 3})
    alone = save(tmp_path / "alone.safetensors", other)
    assert sv.inspect(vector, tmp_path / "base").facts["verdict"] == EXACT
    for target, verdict in ((same, FAMILY), (another, UNKNOWN), (alone, UNKNOWN)):
        report = sv.inspect(vector, target)
        assert report.facts["verdict"] == verdict
        assert any("no weights to compare" in w for w in report.warnings) == (verdict == UNKNOWN)


def test_some_weights_that_are_not_finite_do_not_hide_the_rest(tmp_path: Path) -> None:
    base = drawn(0, 6, 32, 32)
    for tensor in base.values():
        tensor[::2] = float("nan")
        tensor[1, :3] = float("inf")
        tensor[0, 0] = 0.5  # which changes: that of a NaN would be refused
    vector = pair_of(base, tmp_path)
    near = {name: tensor + 1e-5 for name, tensor in base.items()}
    assert sv.inspect(vector, save(tmp_path / "near", near)).facts["verdict"] == FAMILY
    assert sv.inspect(vector, tmp_path / "base").facts["verdict"] == EXACT


def test_a_config_or_tokenizer_that_differs_is_a_warning(skill: Path, tmp_path: Path) -> None:
    vector = skill / "v.safetensors"
    tensors = perturbed(initialised(0), 4)
    for name, config, text, words in (
        ("alike", CONFIG, '{"model": 1}', []),
        ("no tokenizer", CONFIG, None, []),
        ("token", CONFIG, '{"model": 2}', ["tokenizer differs"]),
        ("qwen", CONFIG | {"model_type": "qwen2"}, None, ["is a qwen2", "made on a llama"]),
        ("both", {"model_type": "gpt2"}, "{}", ["tokenizer differs", "is a gpt2"]),
    ):
        files = {} if text is None else {"tokenizer.json": text}
        target = save(tmp_path / name, tensors, config=config, side_files=files)
        for report in (
            report_of("inspect", vector, "--target", target),
            report_of("apply", target, vector, "-o", tmp_path / "out", "--force"),
            report_of("verify", tmp_path / "out"),
        ):
            said = " ".join(w for w in report["warnings"] if "differs" in w or "made on" in w)
            assert report["verdict"] == FAMILY
            assert all(word in said for word in words) and bool(said) == bool(words), name


def test_an_incompatible_target_is_refused_with_both_shapes(skill: Path, tmp_path: Path) -> None:
    vector = skill / "v.safetensors"
    narrow = save(tmp_path / "narrow", toy(0, layers=4, width=32, vocabulary=200))
    fewer = save(tmp_path / "fewer", toy(0, layers=3, width=48, vocabulary=200))
    more = initialised(0) | {"model.extra.weight": torch.ones(2, 3)}
    whole = {name: tensor.to(torch.bool) for name, tensor in initialised(0).items()}
    for target, words in (
        (narrow, ["lm_head.weight: target [200, 32], vector [200, 48]", "... and "]),
        (fewer, ["model.layers.3.mlp.up_proj.weight [96, 48]: only in the vector"]),
        (save(tmp_path / "more", more), ["model.extra.weight [2, 3]: only in the target"]),
        (save(tmp_path / "whole", whole), ["lm_head.weight: target is BOOL"]),
    ):
        for arguments in (
            ("inspect", vector, "--target", target),
            ("apply", target, vector, "-o", tmp_path / "out"),
            ("apply", target, f"{vector}=0.5", f"{vector}=1", "-o", tmp_path / "out"),
        ):
            result = run(*arguments)
            assert result.exit_code == 3 and result.stdout == "", result.output
            message = " ".join(result.stderr.split())
            assert all(word in message for word in ["verdict: incompatible", "--exclude", *words])
    result = run("inspect", skill / "base", "--target", narrow)
    assert result.exit_code == 2 and "is a model" in result.stderr


def test_a_combination_is_judged_by_the_first_base_and_says_so(skill: Path, tmp_path: Path) -> None:
    """Vectors of unrelated bases can be added, but that alone deserves a word."""
    stranger = initialised(9)
    save(tmp_path / "other", stranger, config=CONFIG)
    save(tmp_path / "moved", perturbed(stranger, 2), config=CONFIG)
    theirs = tmp_path / "w.safetensors"
    sv.diff(tmp_path / "moved", tmp_path / "other", theirs)
    vector = sv.combine(skill / "v.safetensors", theirs, output=tmp_path / "c.safetensors")
    assert any("unrelated" in warning or "not related" in warning
               for warning in vector.report.warnings)  # fmt: skip
    assert sv.inspect(tmp_path / "c.safetensors", skill / "base").facts["verdict"] == FAMILY


# ----------------------------------------------------------------------- labels and revisions


def test_labels_are_kept_and_shown(skill: Path, tmp_path: Path) -> None:
    labels = {"method": "grpo", "notes": "two rounds,\nK = 2", "license": "apache-2.0"}
    words = [word for item in labels.items() for word in (f"--{item[0]}", item[1])]
    python, shell = tmp_path / "p.safetensors", tmp_path / "s.safetensors"
    sv.diff(skill / "tuned", skill / "base", python, **labels)
    sides = skill / "tuned", skill / "base"
    assert run("diff", *sides, "-o", shell, *words).exit_code == 0
    assert python.read_bytes() == shell.read_bytes()
    assert run("combine", shell, "--codec", "dense", "-o", tmp_path / "d.safetensors",
               "--notes", "dense").exit_code == 0  # fmt: skip
    sv.combine(shell, shell, output=tmp_path / "c.safetensors", method="sum")
    for name, method, notes in (("s", "grpo", labels["notes"]), ("d", "grpo", "dense"),
                                ("c", "sum", None)):  # fmt: skip
        facts = sv.inspect(tmp_path / f"{name}.safetensors").facts
        assert facts["training"] == {"method": method, "notes": notes}
        assert facts["license"] == "apache-2.0"
        shown = run("inspect", tmp_path / f"{name}.safetensors").stdout
        assert f"method   {method}" in shown and "apache-2.0" in shown
        assert notes is None or f"notes    {notes}" in shown
    bare = sv.diff(*sides, tmp_path / "bare.safetensors").manifest
    assert bare["training"] == {"method": None, "notes": None} and bare["license"] is None
    assert bare["identity"] == sv.SkillVector.open(shell).manifest["identity"]


@pytest.mark.parametrize("form", ["folder", "link to it", "file"])
def test_the_commit_of_a_base_in_the_cache_of_the_hub(
    form: str, skill: Path, tmp_path: Path
) -> None:
    """A snapshot's folder is named by its commit; its files link to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / commit, cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (skill / "base").iterdir():
        (blobs / f"sha-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    (tmp_path / "link").symlink_to(snapshot)
    base = {"folder": snapshot, "link to it": tmp_path / "link",
            "file": snapshot / "model.safetensors"}[form]  # fmt: skip
    manifest = sv.diff(skill / "tuned", base, tmp_path / "v.safetensors").manifest
    assert manifest["base"]["revision"] == commit and manifest["tuned"]["revision"] is None
    shown = " ".join(run("inspect", tmp_path / "v.safetensors").stdout.split())
    assert (str(base) if form != "link to it" else f"{base}@{commit[:12]}") in shown
    again = sv.diff(base, skill / "base", tmp_path / "w.safetensors").manifest
    assert again["tuned"]["revision"] == commit
    assert np.all([entry["changed"] == 0 for entry in again["tensors"].values()])


@pytest.mark.parametrize("name", ["0123456789abcdef", "g" * 40, "0123456789ABCDEF" * 2 + "0" * 8])
def test_what_is_no_commit_is_no_revision(name: str, skill: Path, tmp_path: Path) -> None:
    base = save(tmp_path / "snapshots" / name, initialised(0))
    assert sv.diff(skill / "tuned", base).manifest["base"]["revision"] is None
