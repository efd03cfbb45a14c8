"""Exact is exact: fp32 and fp64 come back bit for bit, on the base alone, however it is guessed;
what a vector is made of, and what of a result was measured or proved, is said.

What is right comes from numpy and torch, in oracle.py and here.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import reader
import safetensors
import torch
from click.testing import CliRunner, Result
from families import TORCH_DTYPE, assert_same_bits, bits, from_bits, load, perturbed, save, toy
from safetensors.torch import save_file

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.engine import runner, threads
from skillvec.engine.plan import Plan
from skillvec.errors import IncompatibleError, VerificationError
from skillvec.ops.block import BLOCK_NUMEL

CODECS = ("dense", "sparse", "packed", "auto")
CLI = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that really syncs proves nothing here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pair(folder: Path, tuned: Tensors, base: Tensors, **options: Any) -> tuple[Path, Path]:
    return save(folder / "tuned", tuned, **options), save(folder / "base", base, **options)


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def warned(words: str, report: sv.Report) -> str:
    """Return the one warning that holds these words."""
    (found,) = [text for text in report.warnings if words in text]
    return found


# ------------------------------------------------------------------------ bit for bit, in any dtype


def hostile(tuned_dtype: str, base_dtype: str, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Return tensors that differences miss: far apart, of many magnitudes, almost equal, zeros."""
    draw = np.random.default_rng(seed)

    def held(values: np.ndarray, dtype: str) -> torch.Tensor:
        found = torch.from_numpy(np.asarray(values, np.float64)).to(TORCH_DTYPE[dtype])
        return torch.where(torch.isfinite(found), found, torch.ones_like(found))

    def orders(numel: int, most: float) -> np.ndarray:
        return 10.0 ** draw.uniform(-most, most, numel) * draw.choice([-1, 1], numel)

    near = draw.normal(size=900)
    values = {
        "small on one": (1e-9 * draw.normal(size=700), 1 + 0.1 * draw.normal(size=700)),
        "orders": (orders(900, 30), orders(900, 30)),
        "more orders": (orders(900, 200), orders(900, 200)),
        "close": (near * (1 + 1e-6 * draw.normal(size=900)), near),
        "zeros": (np.tile([-0.0, 0.0, 1e-300, -1e-45], 5), np.tile([0.0, -0.0, 3.0, -0.0, 1.0], 4)),
        "same": (near[:50], near[:50]),
        "empty": (near[:0], near[:0]),
    }  # fmt: skip
    return (
        {name: held(left, tuned_dtype) for name, (left, _) in values.items()},
        {name: held(right, base_dtype) for name, (_, right) in values.items()},
    )


def fp32_sum(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return what base + (tuned - base) gives in tuned's dtype: fp32, or fp64 where a side is."""
    dtype = np.float64 if torch.float64 in (tuned.dtype, base.dtype) else np.float32
    a, b = (oracle.wide(x).astype(dtype) for x in (base, tuned))  # exact
    difference = b - a
    kind = NAMES[tuned.dtype]
    total = oracle.round_to((a + difference).astype(np.float64), kind)
    if tuned.dtype == base.dtype:  # where nothing is added, the bits stay
        total = torch.where(torch.from_numpy(difference == 0), base, total)
    else:
        stays = oracle.round_to(a.astype(np.float64), kind)
        total = torch.where(torch.from_numpy(difference == 0), stays, total)
    return total


PAIRS = [("F32", "F32"), ("F64", "F64"), ("BF16", "F32"), ("F32", "BF16"), ("F32", "F64"),
         ("F64", "F32"), ("F16", "F32"), ("F32", "F16"), ("BF16", "F64"), ("BF16", "BF16"),
         ("F16", "F16"), ("F16", "BF16")]  # fmt: skip


@pytest.mark.parametrize(("tuned_dtype", "base_dtype"), PAIRS, ids=["-".join(x) for x in PAIRS])
def test_every_value_comes_back_through_every_codec(
    tuned_dtype: str, base_dtype: str, tmp_path: Path
) -> None:
    """The replacements are the values that the sum misses, by numpy, and no others."""
    tuned, base = hostile(tuned_dtype, base_dtype)
    sides = pair(tmp_path, tuned, base)
    missed = {
        name: np.flatnonzero(bits(fp32_sum(tuned[name], base[name])) != bits(tensor))
        for name, tensor in tuned.items()
    }
    assert missed["orders"].size > 20 and not missed["same"].size
    options = {} if tuned_dtype == base_dtype else {"dtype": CLI[tuned_dtype]}
    for codec in CODECS:
        path = tmp_path / f"{codec}.safetensors"
        vector = sv.diff(*sides, path, codec=codec)
        exactness = vector.manifest["exactness"]
        assert exactness["claim"] == "bitwise" and exactness["unrestored"] == 0
        assert exactness["replacements"] == sum(at.size for at in missed.values())
        for name, (_, positions, patterns) in reader.read_vector(path)[1].items():
            assert np.array_equal(positions, missed[name]), name
            assert np.array_equal(patterns, bits(tuned[name])[missed[name]]), name
        assert not any("unrestored" in entry for entry in vector.manifest["tensors"].values())
        report = sv.apply(sides[1], vector, tmp_path / codec, **options)
        assert report.facts["verdict"] == "exact base"
        assert_same_bits(tmp_path / codec, tuned)
        assert sv.verify(path).facts["unrestored"] == {}
    sv.apply(sides[1], None, tmp_path / "one", tuned=sides[0], base=sides[1], **options)
    assert_same_bits(tmp_path / "one", tuned)
    ref = f"{sides[0]}::{sides[1]}"
    sv.apply(sides[1], ref, tmp_path / "named", **options)
    assert_same_bits(tmp_path / "named", tuned)
    assert sv.verify(tmp_path / "one").facts["verified"]


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_patch_of_fp32_comes_back(dtype: str, tmp_path: Path) -> None:
    """Exported from a vector, and written by numpy: taken in and applied, bit for bit."""
    tuned, base = hostile(dtype, dtype)
    sides = pair(tmp_path, tuned, base)
    sv.diff(*sides, tmp_path / "v.safetensors")
    sv.export_patch(tmp_path / "v.safetensors", tmp_path / "p.safetensors")
    listed, own = load(tmp_path / "p.safetensors"), {}
    for name, tensor in tuned.items():
        at = np.flatnonzero(bits(tensor) != bits(base[name])) if tensor.numel() else np.zeros(0)
        if at.size:
            own[f"{name}.indices"] = torch.from_numpy(at.astype(np.int32))
            own[f"{name}.values"] = tensor[at].clone()
            assert torch.equal(listed[f"{name}.indices"], own[f"{name}.indices"])
            assert_same_bits({name: listed[f"{name}.values"]}, {name: own[f"{name}.values"]})
    save(tmp_path / "own.safetensors", own)
    for patch in ("p", "own"):
        for codec in CODECS:
            path = tmp_path / f"{patch}-{codec}.safetensors"
            vector = sv.import_patch(tmp_path / f"{patch}.safetensors", sides[1], path, codec=codec)
            assert vector.manifest["exactness"]["claim"] == "bitwise"
            sv.apply(sides[1], vector, tmp_path / f"{patch}-{codec}")
            assert_same_bits(tmp_path / f"{patch}-{codec}", tuned)


def test_replacements_lie_in_their_block(tmp_path: Path) -> None:
    """Of three blocks of fp32, in the first and last value of each; by both engines."""
    base = torch.ones(2 * BLOCK_NUMEL + 3)
    tuned = base.clone()
    at = [0, BLOCK_NUMEL - 1, BLOCK_NUMEL, 2 * BLOCK_NUMEL - 1, 2 * BLOCK_NUMEL, base.numel() - 1]
    tuned[at] = torch.tensor([1e-9, -0.0, 3e-9, 1e-20, -2e-9, 5e-10])
    sides = pair(tmp_path, {"w": tuned}, {"w": base})
    found = []
    for number, options in enumerate(({"engine": "serial"}, {"workers": 3})):
        path = tmp_path / f"{number}.safetensors"
        vector = sv.diff(*sides, path, **options)
        assert vector.manifest["exactness"]["replacements"] == 6
        found.append(path.read_bytes())
        sv.apply(sides[1], vector, tmp_path / f"out{number}", **options)
        assert_same_bits(tmp_path / f"out{number}", {"w": tuned})
    assert found[0] == found[1]
    assert reader.read_vector(path)[1]["w"][1].tolist() == at


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_fp32_asked_for_is_smaller_and_says_what_it_misses(dtype: str, tmp_path: Path) -> None:
    """Without the replacements but for what no finite difference restores."""
    tuned, base = hostile(dtype, dtype)
    del tuned["more orders"], base["more orders"]  # beyond fp32
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", dtype="fp32")
    whole = sv.diff(*sides, tmp_path / "whole.safetensors")
    sv.apply(sides[1], vector, tmp_path / "out")
    found = load(tmp_path / "out")
    missed = {n: int(np.count_nonzero(bits(found[n]) != bits(t))) if t.numel() else 0
              for n, t in tuned.items()}  # fmt: skip
    stated = {n: e.get("unrestored", 0) for n, e in vector.manifest["tensors"].items()}
    assert stated == missed and missed["orders"] > 20
    assert vector.manifest["exactness"]["claim"] == "rounded"
    said = vector.manifest["exactness"]["replacements"]
    assert said < whole.manifest["exactness"]["replacements"]
    assert sv.verify(tmp_path / "v.safetensors").facts["unrestored"] == {
        name: count for name, count in missed.items() if count
    }


# ---------------------------------------------------------------- only on the base, however guessed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a tuned model full of replacements in fp32 and bf16, and targets of all kinds.

    "one" has one tensor of the base and else another model; "near" is the base but for a value in
    every tensor which the probe, 4 KiB of the middle, does not see; "half" the same in every other
    tensor; "far" has nothing of it.
    """
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(3)
    base, tuned = {}, {}
    for number, dtype in enumerate(("F32", "BF16", "F32", "BF16")):
        name = f"layers.{number}.weight"
        values = torch.from_numpy(draw.normal(size=(90, 90)))
        base[name] = values.to(TORCH_DTYPE[dtype])
        tuned[name] = base[name] * (1 + 0.01 * (number + 1))
        tuned[name][::7] = 1e-9  # which no difference from about one restores
        tuned[name][5, ::3] = -0.0
    far = {name: tensor * 0.9 for name, tensor in base.items()}
    near, half = ({name: tensor.clone() for name, tensor in base.items()} for _ in range(2))
    for number, name in enumerate(base):
        near[name][0, 0] += 1
        half[name][0, 0] += number % 2
    models = {"base": base, "tuned": tuned, "far": far, "near": near, "half": half,
              "one": far | {"layers.2.weight": base["layers.2.weight"]}}  # fmt: skip
    for name, tensors in models.items():
        save(folder / name, tensors, shards=2)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


# the verdict before and after the work, and tensors that are the base's
TARGETS = {
    "base": ("exact base", "exact base", {0, 1, 2, 3}),
    "far": ("same family", "same family", set()),
    "one": ("same family", "same family", {2}),
    "near": ("exact base", "same family", set()),
    "half": ("exact base", "same family", {0, 2}),
}


def expected_of(world: Path, target: str, lam: float = 1.0) -> Tensors:
    """Return tuned where the target's tensor is the base's, else target + lam * fp32 difference."""
    point, tuned, base = (load(world / side) for side in (target, "tuned", "base"))
    found = {}
    for number, (name, tensor) in enumerate(sorted(point.items())):
        if number in TARGETS[target][2] and lam == 1:
            found[name] = tuned[name]
            continue
        difference = oracle.wide(oracle.round_to(oracle.delta(tuned[name], base[name]), "F32"))
        single = oracle.apply(tensor, difference, lam, "F32")  # one rounding to fp32, then on
        kind = NAMES[tensor.dtype]
        total = oracle.round_to(oracle.wide(single), kind).reshape(tensor.shape)
        keep = torch.from_numpy(difference == 0).reshape(tensor.shape)
        found[name] = torch.where(keep, tensor, total)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", ["stored", "one pass"])
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_replacements_are_for_the_bases_tensors_alone(
    lam: float, way: str, target: str, world: Path, tmp_path: Path
) -> None:
    before, after, _ = TARGETS[target]
    options: dict[str, Any] = {"lam": lam}
    vector: Path | None = world / "v.safetensors"
    if way == "one pass":
        vector, options = None, options | {"tuned": world / "tuned", "base": world / "base"}
    planned = sv.apply(world / target, vector, tmp_path / "out", dry_run=True, **options)
    assert planned.facts["verdict"] == before
    report = sv.apply(world / target, vector, tmp_path / "out", **options)
    assert report.facts["verdict"] == after
    assert any("looked like the vector's base" in w for w in report.warnings) == (before != after)
    assert_same_bits(tmp_path / "out", expected_of(world, target, lam))
    verified = sv.verify(tmp_path / "out")
    assert verified.facts["verified"] and verified.facts["verdict"] == after


def test_what_is_expected_of_each_target_differs(world: Path) -> None:
    """The control: with replacements or without is not the same in any tensor here."""
    for target in ("near", "half", "one"):
        found, tuned = expected_of(world, target), load(world / "tuned")
        for number, name in enumerate(sorted(found)):
            same = np.array_equal(bits(found[name])[1:], bits(tuned[name])[1:])
            assert same == (number in TARGETS[target][2])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("engine_name", ["serial", "threads"])
def test_neither_bytes_nor_reports_know_of_the_guess(
    engine_name: str, target: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessed always and never: the same files, sums, counts, warnings, and proofs."""
    options: dict[str, Any] = {"engine": engine_name}
    options |= {"workers": 3} if engine_name == "threads" else {}
    again: list[tuple[bool, str]] = []

    def noted(plan: Plan, number: int, index: int, is_again: bool) -> None:
        if is_again:
            again.append((guess, plan.jobs[number].name))

    found = []
    for guess in (True, False):
        monkeypatch.setattr(Plan, "expects_base", property(lambda plan, guess=guess: guess))
        out = tmp_path / str(guess)
        with threads.on_block(noted):
            report = sv.apply(world / target, world / "v.safetensors", out, **options).to_dict()
            checked = sv.verify(out, **options).to_dict()
            proved = sv.verify(world / "v.safetensors", **options).to_dict()
        del report["output"]
        files = {file.name: file.read_bytes() for file in sorted(out.iterdir())}
        found.append((files, report, checked["tensors"], proved))
    assert found[0] == found[1]
    exact = {f"layers.{number}.weight" for number in TARGETS[target][2]}
    everything = {f"layers.{number}.weight" for number in range(4)}
    assert {name for guess, name in again if guess} == everything - exact
    assert {name for guess, name in again if not guess} >= exact


def test_a_wrong_guess_hides_no_difference(world: Path, tmp_path: Path, monkeypatch) -> None:
    """verify counts the values that differ once, and names the first, whatever was guessed."""
    out = tmp_path / "out"
    sv.apply(world / "half", world / "v.safetensors", out)
    file = next(f for f in sorted(out.glob("*.safetensors")) if "layers.2.weight" in load(f))
    tensors = load(file)
    pattern = bits(tensors["layers.2.weight"]).copy()
    pattern[[77, 300]] ^= 1
    tensors["layers.2.weight"] = from_bits(pattern, "F32", (90, 90))
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    texts = []
    for guess in (True, False):
        monkeypatch.setattr(Plan, "expects_base", property(lambda plan, guess=guess: guess))
        with pytest.raises(VerificationError) as caught:
            sv.verify(out)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "layers.2.weight: 2 of 8100 values" in texts[0] and "position 77" in texts[0]


@pytest.mark.parametrize("guess", [True, False])
def test_a_wrong_guess_is_no_first_difference(guess: bool, tmp_path: Path, monkeypatch) -> None:
    """The first block, full of replacements, holds; one value of the second does not."""
    base = torch.ones(BLOCK_NUMEL + 9)
    tuned = base.clone()
    tuned[:50] = 1e-9
    sides = pair(tmp_path, {"w": tuned}, {"w": base})
    sv.diff(*sides, tmp_path / "v.safetensors")
    tuned[BLOCK_NUMEL + 7] = 3
    save(tmp_path / "tuned", {"w": tuned})
    monkeypatch.setattr(Plan, "expects_base", property(lambda plan: guess))
    said = f"w: 1 of {BLOCK_NUMEL + 9} values .* position {BLOCK_NUMEL + 7}"
    with pytest.raises(VerificationError, match=said):
        sv.verify(tmp_path / "v.safetensors")


def test_a_run_that_goes_on_restores_as_well(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    call: Callable[[], sv.Report] = lambda: sv.apply(  # noqa: E731
        world / "half", world / "v.safetensors", tmp_path / "out", engine="serial"
    )
    with pytest.raises(KeyboardInterrupt), threads.on_block(failing):
        call()
    assert call().facts["resumed"] > 0
    assert_same_bits(tmp_path / "out", expected_of(world, "half"))


# ------------------------------------------------------------------------ rounding is not training


def in_dtype(tensors: Tensors, dtype: str) -> Tensors:
    return {name: tensor.to(TORCH_DTYPE[dtype]) for name, tensor in tensors.items()}


WIDE = toy(dtype="F32", layers=1)
SIDE = re.compile(
    r"([0-9.e+-]+) % of the vector's squared norm is rounding, not training: in these tensors"
    r" (tuned|base) is (tuned|base) rounded to (\w+), value for value"
)


def share_of(tuned: Tensors, base: Tensors, names: set[str]) -> float:
    squares = {n: float((oracle.delta(tuned[n], base[n]) ** 2).sum()) for n in base}
    return 100 * sum(squares[name] for name in names) / sum(squares.values())


# tuned, base, which side is rounded, to what
CASTS: dict[str, tuple[Tensors, Tensors, str, str]] = {
    "bf16 of fp32": (in_dtype(WIDE, "BF16"), WIDE, "tuned", "BF16"),
    "bf16 values in fp32": (in_dtype(in_dtype(WIDE, "BF16"), "F32"), WIDE, "tuned", "BF16"),
    "fp16 of fp32": (in_dtype(WIDE, "F16"), WIDE, "tuned", "F16"),
    "fp16 values in fp32": (in_dtype(in_dtype(WIDE, "F16"), "F32"), WIDE, "tuned", "F16"),
    "fp16 of bf16 weights": (
        in_dtype(in_dtype(in_dtype(toy(scale=1e-6), "BF16"), "F32"), "F16"),
        in_dtype(toy(scale=1e-6), "BF16"), "tuned", "F16",
    ),
    "base is bf16 of fp32": (WIDE, in_dtype(WIDE, "BF16"), "base", "BF16"),
    "base is bf16 values": (WIDE, in_dtype(in_dtype(WIDE, "BF16"), "F32"), "base", "BF16"),
    "base is fp16 of fp32": (WIDE, in_dtype(WIDE, "F16"), "base", "F16"),
    "fp32 of fp64": (
        in_dtype(perturbed(toy(dtype="F64")), "F32"), perturbed(toy(dtype="F64")), "tuned", "F32",
    ),
    "bf16 of fp64": (
        in_dtype(perturbed(toy(dtype="F64")), "BF16"), perturbed(toy(dtype="F64")), "tuned", "BF16",
    ),
    "base is fp32 of fp64": (
        perturbed(toy(dtype="F64")), in_dtype(perturbed(toy(dtype="F64")), "F32"), "base", "F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trained", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("case", CASTS)
def test_rounding_taken_for_training_is_told(case: str, trained: bool, tmp_path: Path) -> None:
    """With its share of the squared norm, by numpy; on the whole model, or on some tensors."""
    tuned, base, side, dtype = CASTS[case]
    tuned = dict(tuned)
    names = {n for n in base if oracle.delta(tuned[n], base[n]).any()}
    assert len(names) > 3
    if trained:
        for name in sorted(names)[::2]:
            draw = torch.Generator().manual_seed(len(name))
            factors = 1 + 0.1 * torch.rand(tuned[name].shape, generator=draw)
            values = tuned[name].double() * factors
            tuned[name] = values.to(tuned[name].dtype)
            names.remove(name)
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    found = warned("is rounding, not training", vector.report)
    share, *words = SIDE.match(found).groups()
    other = "base" if side == "tuned" else "tuned"
    assert words == [side, other, dtype]
    expected = share_of(tuned, base, names)
    assert float(share) == pytest.approx(expected, rel=6e-3)
    assert trained or expected == pytest.approx(100)
    listed = {line.strip() for line in found.split("\n")[1:]}
    assert {line for line in listed if not line.startswith("...")} <= names
    assert len(listed) == min(len(names), 6)
    report = sv.apply(sides[1], None, tmp_path / "out", tuned=sides[0], base=sides[1])
    again = warned("is rounding, not training", report).split("\n")
    assert again[0] == found.split("\n")[0] and len(again) == len(found.split("\n"))


def test_two_ways_of_rounding_are_told_apart(tmp_path: Path) -> None:
    base = {name: torch.randn(300, generator=torch.manual_seed(2)) for name in "abc"}
    tuned = {"a": base["a"].bfloat16().float(), "b": base["b"].half().float(), "c": base["c"] + 0.1}
    vector = sv.diff(*pair(tmp_path, tuned, base), tmp_path / "v.safetensors")
    found = [text for text in vector.report.warnings if "is rounding" in text]
    shares = {SIDE.match(text)[4]: float(SIDE.match(text)[1]) for text in found}
    assert shares == {
        "BF16": pytest.approx(share_of(tuned, base, {"a"}), rel=6e-3),
        "F16": pytest.approx(share_of(tuned, base, {"b"}), rel=6e-3),
    }
    assert [text.split("\n")[1].strip() for text in found] == ["a", "b"]


@pytest.mark.parametrize("place", [0, 70_000, BLOCK_NUMEL, BLOCK_NUMEL + 4])
def test_one_value_more_is_no_rounding(place: int, tmp_path: Path) -> None:
    """In the first and a later step of the first block, in the next block and at its end."""
    base = {"w": torch.linspace(0.1, 1, BLOCK_NUMEL + 5)}
    tuned = {"w": base["w"].bfloat16()}
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    assert "100 % of" in warned("is rounding", vector.report)
    tuned["w"][place] *= 1.5
    save(tmp_path / "tuned", tuned)
    vector = sv.diff(*sides, tmp_path / "other.safetensors")
    assert not any("is rounding" in text for text in vector.report.warnings)


NOTHING: dict[str, tuple[Tensors, Tensors]] = {
    "bf16 on bf16": (perturbed(toy()), toy()),
    "fp16 on fp16": (perturbed(toy(dtype="F16")), toy(dtype="F16")),
    "bf16 values on bf16 values": (
        in_dtype(perturbed(toy()), "F32"), in_dtype(toy(), "F32"),
    ),
    "trained in fp32": (perturbed(WIDE), WIDE),
    "trained, then rounded": (in_dtype(perturbed(WIDE), "BF16"), WIDE),
    "nothing changed": (WIDE, WIDE),
    "nothing changed of bf16 values": (in_dtype(toy(), "F32"), in_dtype(toy(), "F32")),
    "bf16 values, bf16": (toy(), in_dtype(toy(), "F32")),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_training_is_not_taken_for_rounding(case: str, tmp_path: Path) -> None:
    tuned, base = NOTHING[case]
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    report = sv.apply(sides[1], None, tmp_path / "out", tuned=sides[0], base=sides[1])
    for warnings in (vector.report.warnings, report.warnings):
        assert not any("is rounding" in text for text in warnings)


def test_rounding_is_told_by_a_run_that_goes_on(tmp_path: Path, monkeypatch) -> None:
    sides = pair(tmp_path, in_dtype(WIDE, "BF16"), WIDE)
    whole = sv.diff(*sides, tmp_path / "whole.safetensors").report
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        if number == len(plan.jobs) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), threads.on_block(failing):
        sv.diff(*sides, tmp_path / "v.safetensors", engine="serial")
    report = sv.diff(*sides, tmp_path / "v.safetensors", engine="serial").report
    assert report.facts["resumed"] > 0
    assert warned("is rounding", report) == warned("is rounding", whole)


# ------------------------------------------------------------------------- what is said of a result


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and a tuned model of fp32 with integers that differ, and some that do not."""
    tuned, base = perturbed(WIDE, size=1.0), dict(WIDE)
    for side, step in ((tuned, 1), (base, 0)):
        side |= {"steps": torch.arange(4) + step, "ids": torch.arange(5), "more": torch.arange(3)}
    pair(tmp_path, tuned, base)
    return tmp_path


def proof(folder: Path) -> Result:
    return run("verify", folder / "v.safetensors", "--tuned", folder / "tuned", "--base",
               folder / "base")  # fmt: skip


def test_a_proof_holds_without_a_but_where_all_is_restored(tmp_path: Path) -> None:
    sv.diff(*pair(tmp_path, perturbed(WIDE), WIDE), tmp_path / "v.safetensors")
    said = proof(tmp_path)
    assert said.exit_code == 0 and "VECTOR + BASE = TUNED: holds\n" in said.output


@pytest.mark.parametrize("what", ["unrestored", "differing", "excluded", "all"])
def test_a_proof_says_for_what_it_does_not_hold(what: str, models: Path) -> None:
    """By torch: the values that base + vector misses, the integers, the tensors left out."""
    words = ["diff", models / "tuned", models / "base", "-o", models / "v.safetensors"]
    words += ["--dtype", "fp32"] if what in ("unrestored", "all") else []
    words += ["--exclude", "lm_head.*"] if what in ("excluded", "all") else []
    words += ["--exclude", "steps"] if what == "excluded" or what == "unrestored" else []
    assert run(*words).exit_code == 0
    said = proof(models)
    assert said.exit_code == 0, said.output
    text = " ".join(said.output.split())
    assert "holds but for what the manifest announces" in text
    left = {"lm_head.weight"} if what == "all" else {"steps"} if what == "unrestored" else set()
    left |= {"lm_head.weight", "steps"} if what == "excluded" else set()
    missed = {}
    for name, tensor in perturbed(WIDE, size=1.0).items():
        if name not in left:
            total = WIDE[name] + (tensor - WIDE[name])
            missed[name] = int((total.view(torch.int32) != tensor.view(torch.int32)).sum())
    missed = {name: count for name, count in missed.items() if count}
    assert len(missed) > 2
    is_rounded = what in ("unrestored", "all")
    assert (f"{sum(missed.values())} values of" in text) is is_rounded
    differs = what in ("differing", "all")
    assert ("steps: integers that differ, not transferred" in text) is differs
    assert ("left out of the vector" in text) is bool(left)
    report = sv.verify(models / "v.safetensors")
    assert report.facts["unrestored"] == (missed if is_rounded else {})
    assert report.facts["differing"] == (["steps"] if differs else [])
    assert set(report.facts["excluded"]) == left
    statuses = {line["name"]: line["status"] for line in report.ledger}
    assert {name for name, status in statuses.items() if status == "excluded"} == left
    assert set(statuses) == set(load(models / "tuned"))


CHANGES: dict[str, tuple[str, str, int]] = {  # which side changes where, and what is said
    "a value of tuned": ("tuned", "model.norm.weight", 1),
    "a value of base": ("base", "model.norm.weight", 1),
    "an integer of tuned": ("tuned", "ids", 1),
    "an integer of base": ("base", "ids", 1),
    "an integer of both": ("both", "ids", 1),
    "one more in tuned": ("tuned", "new", 3),
    "one more in base": ("base", "new", 3),
    "one more in both": ("both", "new", 3),
    "a float more in both": ("both", "new.weight", 3),
    "one less in tuned": ("tuned", "-more", 3),
    "one less in base": ("base", "-more", 3),
    "a float less in tuned": ("tuned", "-model.norm.weight", 3),
}


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_proof_fails_where_anything_differs_that_was_not_announced(
    change: str, dtype: str, models: Path
) -> None:
    side, name, code = CHANGES[change]
    sv.diff(models / "tuned", models / "base", models / "v.safetensors", dtype=dtype)
    assert proof(models).exit_code == 0
    for folder in ("tuned", "base"):
        if side not in (folder, "both"):
            continue
        tensors = load(models / folder)
        if name.startswith("-"):
            del tensors[name[1:]]
        elif name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name].view(torch.int32 if name[0] == "m" else torch.int64)[2] ^= 1
        else:
            tensors[name] = torch.ones(3) if "weight" in name else torch.arange(3)
        save(models / folder, tensors)
    said = proof(models)
    assert said.exit_code == code, said.output
    assert name.removeprefix("-") in said.output and "holds" not in said.output.split("\n")[0]


def test_integers_that_differ_are_announced_whatever_they_are_now(models: Path) -> None:
    """The vector holds nothing of them, and says so."""
    sv.diff(models / "tuned", models / "base", models / "v.safetensors")
    tensors = load(models / "tuned")
    tensors["steps"] += 5
    save(models / "tuned", tensors)
    said = proof(models)
    assert said.exit_code == 0 and "steps: integers that differ" in said.output


def test_a_model_that_the_vector_does_not_speak_of_is_named(models: Path) -> None:
    sv.diff(models / "tuned", models / "base", models / "v.safetensors")
    tensors = load(models / "tuned") | {f"new.{i}": torch.ones(2) for i in range(7)}
    save(models / "tuned", tensors)
    with pytest.raises(IncompatibleError, match=r"(?s)new\.0: only in .*tuned.*and 2 more"):
        sv.verify(models / "v.safetensors")
