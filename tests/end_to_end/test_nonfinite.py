"""NaN, infinities and overflow: what they decide is counted, refused by name, or let through.

What is right comes from numpy, torch and PEFT. A value is lost where no finite difference carries
it: tuned is another value than base, and tuned - base is not finite; or where the output is not
finite although the target is, or although the vector wanted to change it.
"""

import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from click.testing import CliRunner
from families import (
    TORCH_DTYPE,
    UNSIGNED,
    assert_same_bits,
    bits,
    from_bits,
    load,
    perturbed,
    save,
    toy,
)
from hubserver import HubServer
from raycluster import cluster
from safetensors.torch import save_file
from test_bridging import CONFIG, MLP, experts, fused

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.engine import runner, threads
from skillvec.engine.plan import Plan
from skillvec.errors import NonfiniteError
from skillvec.ops import special
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.delta import STEP
from skillvec.vectors import provenance
from skillvec.verbs import cards

ALLOW = {"allow_nonfinite": True}
NAN, INF = float("nan"), float("inf")
CLI = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
FLOATS = tuple(CLI)
PAIRS = [pytest.param(a, b, id=f"{a}-{b}") for a, b in itertools.product(FLOATS, FLOATS)]
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that really syncs proves nothing here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ------------------------------------------------------------------------------------ what is right


def wide(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().reshape(-1).to(dtype).numpy()


def lost(tuned: torch.Tensor, base: torch.Tensor) -> int:
    """Return how many values no finite fp32 difference carries (fp64 where a side is fp64)."""
    dtype = torch.float64 if torch.float64 in (tuned.dtype, base.dtype) else torch.float32
    b, a = wide(tuned, dtype), wide(base, dtype)
    with np.errstate(all="ignore"):
        difference = b - a
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return int(np.count_nonzero(~np.isfinite(difference) & ~same))


def nonfinite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def ordinary(dtype: str, seed: int = 0, numel: int = 40) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=draw, dtype=torch.float64).to(TORCH_DTYPE[dtype])


def other_payload(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with another bit in each NaN."""
    flipped = np.where(torch.isnan(tensor).numpy().reshape(-1), bits(tensor) ^ 1, bits(tensor))
    pattern = flipped.astype(UNSIGNED[tensor.element_size()])
    kind = next(name for name, dtype in TORCH_DTYPE.items() if dtype == tensor.dtype)
    return from_bits(pattern, kind, tuple(tensor.shape))


# tuned and base at one place, and whether it is lost
ROWS: dict[str, tuple[float, float, bool]] = {
    "nan on finite": (NAN, 1.0, True),
    "inf on finite": (INF, 1.0, True),
    "minus inf on finite": (-INF, 1.0, True),
    "finite on nan": (1.0, NAN, True),
    "finite on inf": (1.0, INF, True),
    "inf on minus inf": (INF, -INF, True),
    "nan on inf": (NAN, INF, True),
    "inf on nan": (INF, NAN, True),
    "the same inf": (INF, INF, False),
    "the same minus inf": (-INF, -INF, False),
    "the same nan": (NAN, NAN, False),
    "the same zero": (-0.0, 0.0, False),
}


def rows_of(tuned_dtype: str, base_dtype: str) -> tuple[Tensors, Tensors]:
    """Return tuned and base with a tensor a row of ROWS, planted at 3, 17 and 39 of 40 values."""
    tuned, base = {}, {}
    for seed, (name, (left, right, _)) in enumerate(ROWS.items()):
        tuned[name], base[name] = ordinary(tuned_dtype, seed), ordinary(base_dtype, seed)
        tuned[name][[3, 17, 39]], base[name][[3, 17, 39]] = left, right
    return tuned, base


def pair(folder: Path, tuned: Tensors, base: Tensors, **options: Any) -> tuple[Path, Path]:
    return save(folder / "tuned", tuned, **options), save(folder / "base", base, **options)


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of a NonfiniteError."""
    with pytest.raises(NonfiniteError) as caught:
        action(*arguments, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


def warned(warning: str, report: sv.Report) -> str:
    """Return the one warning that holds these words."""
    (found,) = [text for text in report.warnings if warning in text]
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_that_is_not_finite_is_counted(dtype: str) -> None:
    """By numpy: of 16 bits all, of more the same in their upper bits, alone and together."""
    unsigned = UNSIGNED[TORCH_DTYPE[dtype].itemsize]
    width = 8 * np.dtype(unsigned).itemsize
    every = np.arange(1 << 16, dtype=unsigned) << np.array(width - 16, unsigned)
    every = np.concatenate((every, every | np.array(1, unsigned)))
    right = ~torch.isfinite(from_bits(every, dtype)).numpy()
    values = every if dtype == "BF16" else every.view(f"<f{width // 8}")
    assert special.count_nonfinite(values, dtype) == int(right.sum()) >= 64
    assert special.count_nonfinite(values[~right], dtype) == 0
    assert special.count_nonfinite(values[:0], dtype) == 0
    found = [special.has_nonfinite(values[i : i + 1], dtype) for i in range(0, every.size, 61)]
    assert found == right[::61].tolist()
    edges = np.flatnonzero(np.diff(right.astype(int)))  # next to the infinities of either sign
    for at in (*edges, *(edges + 1)):
        assert special.has_nonfinite(values[at : at + 1], dtype) == right[at]


# ------------------------------------------------------------------------------------------- diff


@pytest.mark.parametrize(("tuned_dtype", "base_dtype"), PAIRS)
def test_every_row_of_every_pair_of_dtypes(
    tuned_dtype: str, base_dtype: str, tmp_path: Path
) -> None:
    """Refused, with all counts; with leave, the exact base gets every bit of tuned."""
    tuned, base = rows_of(tuned_dtype, base_dtype)
    sides = pair(tmp_path, tuned, base)
    expected = {name: 3 for name, (_, _, is_lost) in ROWS.items() if is_lost}
    assert expected == {n: lost(tuned[n], base[n]) for n in ROWS if lost(tuned[n], base[n])}
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors")
    assert "... and 3 more" in said and "--exclude" in said and "--allow-nonfinite" in said
    named = re.findall(r"^  (.*): 3 of 40 values \(not finite: .*\)$", said, re.MULTILINE)
    assert len(named) == 5 and set(named) < set(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]

    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    assert vector.manifest["allow_nonfinite"] is True
    entries = vector.manifest["tensors"]
    assert {n: e["nonfinite"] for n, e in entries.items() if "nonfinite" in e} == expected
    assert vector.manifest["exactness"]["claim"] == "bitwise"
    lines = {line["name"]: line.get("nonfinite", {}) for line in vector.report.ledger}
    for name in ROWS:
        counts = {"tuned": nonfinite(tuned[name]), "base": nonfinite(base[name])}
        counts["lost"] = expected.get(name, 0)
        assert lines[name] == {side: count for side, count in counts.items() if count}, name
    totals = {side: sum(line.get(side, 0) for line in lines.values())
              for side in ("tuned", "base", "lost")}  # fmt: skip
    assert vector.report.facts["nonfinite"] == totals
    said = warned("or out of range", vector.report)
    assert "... and 3 more" in said
    assert "the same nan: 3 of 40 values" in warned("nothing changes", vector.report)

    options = {} if tuned_dtype == base_dtype else {"dtype": CLI[tuned_dtype]}
    refused(sv.apply, sides[1], vector, tmp_path / "out", **options)
    sv.apply(sides[1], vector, tmp_path / "out", **ALLOW, **options)
    assert_same_bits(tmp_path / "out", tuned)
    sv.apply(sides[1], None, tmp_path / "one", tuned=sides[0], base=sides[1], **ALLOW, **options)
    assert_same_bits(tmp_path / "one", tuned)
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    assert sv.verify(tmp_path / "out").facts["verified"]


@pytest.mark.parametrize(("tuned_dtype", "base_dtype"), PAIRS)
def test_what_both_sides_hold_passes_with_a_note(
    tuned_dtype: str, base_dtype: str, tmp_path: Path
) -> None:
    """The same infinities, and NaN against NaN, of another payload too; tuned comes back."""
    tuned, base = ({"w": ordinary(dtype)} for dtype in (tuned_dtype, base_dtype))
    for side in (tuned, base):
        side["w"][:6] = torch.tensor([NAN, INF, -INF, NAN, -INF, INF])
    tuned["w"] = other_payload(tuned["w"])
    tuned["w"][30] += 1
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    assert "w: 6 of 40 values" in warned("nothing changes", vector.report)
    assert vector.report.facts["nonfinite"] == {"tuned": 6, "base": 6}
    assert "allow_nonfinite" not in vector.manifest
    assert "nonfinite" not in vector.manifest["tensors"]["w"]
    options = {} if tuned_dtype == base_dtype else {"dtype": CLI[tuned_dtype]}
    report = sv.apply(sides[1], vector, tmp_path / "out", **options)
    assert_same_bits(tmp_path / "out", tuned)
    assert "w: 6 of 40 values" in warned("nothing changes", report)
    assert report.facts["nonfinite"] == {"target": 6, "output": 6}
    verified = sv.verify(tmp_path / "v.safetensors")
    assert "w: 6 of 40 values" in warned("nothing changes", verified)


# tuned and base, each in a dtype, whose difference leaves fp32 (fp64 where a side is fp64)
FAR = [("BF16", 3e38, "BF16"), ("BF16", 3e38, "F32"), ("F32", 3e38, "F32"), ("F64", 1.7e308, "F64")]


@pytest.mark.parametrize(("tuned_dtype", "size", "base_dtype"), FAR)
def test_finite_values_too_far_apart_are_lost_too(
    tuned_dtype: str, size: float, base_dtype: str, tmp_path: Path
) -> None:
    tuned, base = ({"w": ordinary(dtype)} for dtype in (tuned_dtype, base_dtype))
    tuned["w"][[0, 21]], base["w"][[0, 21]] = size, -size
    assert lost(tuned["w"], base["w"]) == 2
    sides = pair(tmp_path, tuned, base)
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors")
    assert "w: 2 of 40 values (differences beyond the range of their dtype)" in said
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    assert vector.manifest["tensors"]["w"]["nonfinite"] == 2
    options = {} if tuned_dtype == base_dtype else {"dtype": CLI[tuned_dtype]}
    sv.apply(sides[1], vector, tmp_path / "out", **ALLOW, **options)
    assert_same_bits(tmp_path / "out", tuned)


def test_fp16_differences_of_any_size_are_carried(tmp_path: Path) -> None:
    """2 * 65504 is no fp16, but an fp32 exception: nothing is lost."""
    tuned, base = {"w": ordinary("F16")}, {"w": ordinary("F16", 1)}
    tuned["w"][5], base["w"][5] = 65504, -65504
    assert lost(tuned["w"], base["w"]) == 0
    sides = pair(tmp_path, tuned, base)
    sv.apply(sides[1], sv.diff(*sides, tmp_path / "v.safetensors"), tmp_path / "out")
    assert_same_bits(tmp_path / "out", tuned)


def test_infinity_is_another_value_than_the_number_that_overflows_to_it(tmp_path: Path) -> None:
    """An fp32 base rounded to the fp16 of tuned is infinity; the base itself is 1e10."""
    base = {"w": torch.tensor([1e10, -1e10, 1.0, 2.0])}
    tuned = {"w": torch.tensor([INF, -INF, 1.5, 2.0]).half()}
    assert lost(tuned["w"], base["w"]) == 2
    sides = pair(tmp_path, tuned, base)
    assert "w: 2 of 4 values" in refused(sv.diff, *sides, tmp_path / "v.safetensors")
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    assert vector.manifest["tensors"]["w"]["nonfinite"] == 2
    sv.apply(sides[1], vector, tmp_path / "out", dtype="fp16", **ALLOW)
    assert_same_bits(tmp_path / "out", tuned)


@pytest.mark.parametrize(
    ("dtype", "kept", "size"),
    [("F32", "fp16", 65520.0), ("F32", "bf16", 3.4e38), ("F64", "fp32", 1e39),
     ("BF16", "fp16", 1e6)],
)  # fmt: skip
def test_a_dtype_that_cannot_hold_the_difference_loses_it(
    dtype: str, kept: str, size: float, tmp_path: Path
) -> None:
    """By torch: the difference in the stored dtype is an infinity."""
    base = {"w": torch.zeros(40, dtype=TORCH_DTYPE[dtype])}
    tuned = {"w": ordinary(dtype)}
    large = torch.tensor([size, -size, size], dtype=torch.float64)
    tuned["w"][[1, 2, 39]] = large.to(base["w"].dtype)
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kept]
    assert nonfinite((tuned["w"] - base["w"]).to(stored)) == 3
    sides = pair(tmp_path, tuned, base)
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors", dtype=kept)
    assert "w: 3 of 40 values (differences beyond the range of their dtype)" in said
    vector = sv.diff(*sides, tmp_path / "v.safetensors", dtype=kept, **ALLOW)
    assert vector.manifest["tensors"]["w"]["nonfinite"] == 3
    sv.diff(*sides, tmp_path / "auto.safetensors")  # which holds it


@pytest.mark.parametrize("kept", ["fp32", "bf16", "fp16"])
def test_rounded_vectors_count_as_well(kept: str, tmp_path: Path) -> None:
    tuned, base = rows_of("F32", "F32")
    sides = pair(tmp_path, tuned, base)
    refused(sv.diff, *sides, tmp_path / "v.safetensors", dtype=kept)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", dtype=kept, **ALLOW)
    counts = {n: e.get("nonfinite", 0) for n, e in vector.manifest["tensors"].items()}
    assert counts == {name: 3 * is_lost for name, (_, _, is_lost) in ROWS.items()}


def test_signalling_nans_are_counted_without_a_word_of_numpy(tmp_path: Path) -> None:
    patterns = {"BF16": 0x7F81, "F16": 0x7C01, "F32": 0x7F800001, "F64": (0x7FF << 52) + 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for left, right in itertools.product(FLOATS, FLOATS):
            folder = tmp_path / f"{left}-{right}"
            tuned = ordinary(left)
            planted = bits(tuned).copy()
            planted[3] = patterns[left]
            base = {"w": ordinary(right, 1)}
            sides = pair(folder, {"w": from_bits(planted, left)}, base)
            assert "w: 1 of 40" in refused(sv.diff, *sides, folder / "v.safetensors")
            vector = sv.diff(*sides, folder / "v.safetensors", **ALLOW)
            sv.apply(sides[1], vector, folder / "out", dtype=CLI[left], **ALLOW)
            assert_same_bits(folder / "out", sides[0])


def test_what_is_excluded_may_be_anything(tmp_path: Path) -> None:
    tuned, base = perturbed(toy()), toy()
    tuned["lm_head.weight"][0, 0] = NAN
    sides = pair(tmp_path, tuned, base)
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors")
    assert "lm_head.weight: 1 of 960 values (not finite: 1 in tuned)" in said
    vector = sv.diff(*sides, tmp_path / "v.safetensors", exclude=["lm_head.*"])
    assert "nonfinite" not in vector.report.facts
    request = {"tuned": sides[0], "base": sides[1]}
    refused(sv.apply, sides[1], None, tmp_path / "out", **request)
    report = sv.apply(sides[1], None, tmp_path / "out", exclude=["lm_head.*"], **request)
    assert "nonfinite" not in report.facts
    assert not nonfinite(load(tmp_path / "out")["lm_head.weight"])


# ------------------------------------------------------------------------------ apply: the output


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Folders of fp16: base, a tuned model 30,000 above it in 3 of 40 values, and a target."""
    base = {"w": ordinary("F16"), "x": ordinary("F16", 1)}
    tuned = {"w": base["w"].clone(), "x": base["x"] + 1}
    tuned["w"][[0, 9, 39]] += 30000
    target = {name: tensor.clone() for name, tensor in base.items()}
    target["w"][[0, 39]] = 20000  # + 2 * 30000 is beyond 65504, + 30000 is not
    target["w"][1] = 60000
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        save(tmp_path / name, tensors)
    return tmp_path


def apply_ways(folder: Path) -> dict[str, Callable[..., sv.Report]]:
    """Return apply of a stored vector, of a pair in one pass, and of a stored combination."""
    sides = folder / "tuned", folder / "base"
    vector = sv.diff(*sides, folder / "v.safetensors")
    both = sv.combine(0.5 * vector, 0.5 * vector, output=folder / "c.safetensors")
    return {
        "stored": lambda target, out, **o: sv.apply(target, vector, out, **o),
        "one": lambda target, out, **o: sv.apply(
            target, None, out, tuned=sides[0], base=sides[1], **o
        ),
        "combined": lambda target, out, **o: sv.apply(target, both, out, **o),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("way", ["stored", "one", "combined"])
def test_fp16_that_overflows_is_refused(way: str, rounding: str, half: Path) -> None:
    apply = apply_ways(half)[way]
    target, tuned, base = (load(half / side) for side in ("target", "tuned", "base"))
    expected = oracle.apply(target["w"], oracle.delta(tuned["w"], base["w"]), 2.0)
    assert nonfinite(expected) == 2
    options = {"lam": 2.0, "rounding": rounding}
    said = refused(apply, half / "target", half / "out", **options)
    assert "w: 2 of 40 values (not finite: 2 in output)" in said and "x:" not in said
    assert "smaller lam or a wider --dtype" in said and "tuned" not in said
    assert not (half / "out").exists()
    report = apply(half / "target", half / "out", **options, **ALLOW)
    assert report.facts["nonfinite"] == {"output": 2, "lost": 2}
    assert "w: 2 of 40 values (not finite: 2 in output)" in warned("out of range", report)
    assert not any("grid" in warning for warning in report.warnings)
    found = load(half / "out")["w"]
    assert np.array_equal(~torch.isfinite(found), ~torch.isfinite(expected))
    if rounding == "nearest":
        assert_same_bits({"w": found}, {"w": expected})
    line = {line["name"]: line for line in report.ledger}["w"]
    assert line["changed"] == int((found != target["w"]).sum())
    assert line["nonfinite"] == {"output": 2, "lost": 2}
    verified = sv.verify(half / "out")
    assert verified.facts["verified"] and "w: 2 of 40" in warned("out of range", verified)
    apply(half / "target", half / "fits", lam=1.0)
    assert nonfinite(load(half / "fits")["w"]) == 0


@pytest.mark.parametrize(
    ("dtype", "to", "size"),
    [("BF16", "fp16", 1e6), ("F32", "fp16", 65520.0), ("F32", "bf16", 3.4e38),
     ("F64", "fp32", 1e39), ("F64", "bf16", 1e300)],
)  # fmt: skip
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "still"])
def test_an_output_dtype_that_cannot_hold_the_target_is_refused(
    moved: bool, dtype: str, to: str, size: float, tmp_path: Path
) -> None:
    """By torch: the target in the output dtype is an infinity, moved by the vector or not."""
    base = {"w": ordinary(dtype), "x": ordinary(dtype)}
    tuned = {"w": base["w"].clone(), "x": base["x"] + 1}
    tuned["w"][:30] += 0.5 * moved
    target = {name: tensor.clone() for name, tensor in base.items()}
    target["w"][[0, 20, 39]] = torch.tensor([size, -size, size], dtype=torch.float64).to(
        base["w"].dtype
    )
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[to]
    assert nonfinite(target["w"]) == 0 and nonfinite(target["w"].to(narrow)) == 3
    target["w"][35] = -INF  # stays
    moved_w = (target["w"].double() + tuned["w"].double() - base["w"].double()).to(narrow)
    count = nonfinite(moved_w) - 1  # -65520 + .5 is an fp16
    assert count == (2 if moved and size == 65520 else 3)
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors")
    onto = save(tmp_path / "target", target)
    said = refused(sv.apply, onto, vector, tmp_path / "out", dtype=to)
    assert f"w: {count} of 40 values (not finite: 1 in target, {count + 1} in output)" in said
    report = sv.apply(onto, vector, tmp_path / "out", dtype=to, **ALLOW)
    assert report.facts["nonfinite"] == {"target": 1, "output": count + 1, "lost": count}
    found = load(tmp_path / "out")["w"]
    assert found.dtype == narrow
    assert torch.equal(torch.isfinite(found), torch.isfinite(moved_w))
    sv.apply(onto, vector, tmp_path / "left", dtype=to, exclude=["w"])  # keeps its own dtype


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("way", ["stored", "one", "combined"])
def test_a_target_that_is_not_finite_where_it_should_change(
    way: str, dtype: str, tmp_path: Path
) -> None:
    """Refused where the vector wants to change it; passed with a note where it does not."""
    base = {"w": ordinary(dtype), "mask": torch.zeros(40, dtype=TORCH_DTYPE[dtype])}
    tuned = {"w": base["w"].clone(), "mask": base["mask"].clone()}
    tuned["w"][10:] += 1
    pair(tmp_path, tuned, base)
    apply = apply_ways(tmp_path)[way]
    masked = {"w": base["w"].clone(), "mask": base["mask"].clone()}
    masked["mask"][::2] = -INF
    masked["w"][:3] = torch.tensor([NAN, INF, -INF])
    target = save(tmp_path / "masked", masked)
    report = apply(target, tmp_path / "out")
    said = warned("nothing changes", report)
    assert "mask: 20 of 40 values" in said and "w: 3 of 40 values" in said
    assert report.facts["nonfinite"] == {"target": 23, "output": 23}
    assert report.facts["changed"] == 30 and report.facts["gain"] == pytest.approx(1, abs=0.02)
    found = load(tmp_path / "out")
    assert_same_bits({"mask": found["mask"]}, {"mask": masked["mask"]})
    assert np.array_equal(bits(found["w"])[:10], bits(masked["w"])[:10])
    assert sv.verify(tmp_path / "out").facts["verified"]

    masked["w"][10:14] = torch.tensor([NAN, INF, -INF, NAN])
    target = save(tmp_path / "wrong", masked)
    said = refused(apply, target, tmp_path / "never")
    assert "w: 4 of 40 values (not finite: 7 in target, 7 in output)" in said
    assert "mask" not in said and not (tmp_path / "never").exists()
    report = apply(target, tmp_path / "let", **ALLOW)
    assert report.facts["nonfinite"] == {"target": 27, "output": 27, "lost": 4}
    apply(target, tmp_path / "zero", lam=0.0)  # which changes nothing
    assert_same_bits(tmp_path / "zero", masked)


def test_what_is_refused_replaces_nothing(half: Path) -> None:
    """With --force as well: the old output stays, and nothing lies beside it."""
    vector = sv.diff(half / "tuned", half / "base", half / "v.safetensors")
    sv.apply(half / "target", vector, half / "out")
    nan = {name: tensor * NAN for name, tensor in load(half / "tuned").items()}
    save(half / "nan", nan)
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    refused(sv.apply, half / "target", vector, half / "out", lam=2.0, force=True)
    refused(sv.diff, half / "nan", half / "base", half / "v.safetensors", force=True)
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_what_takes_no_delta_passes_whatever_it_holds(tmp_path: Path) -> None:
    """A tensor that is copied: of a dtype that takes no delta, left out, or excluded here."""
    base = toy()
    sides = pair(tmp_path, perturbed(base), base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", exclude=["model.norm.*"])
    target = perturbed(base, 3)
    target["model.norm.weight"][:5] = -INF
    target["lm_head.weight"][0, :2] = NAN
    onto = save(tmp_path / "target", target | {"ids": torch.arange(4)})
    with pytest.raises(NonfiniteError, match=r"lm_head\.weight: 2 of 960 values"):
        sv.apply(onto, vector, tmp_path / "out")
    report = sv.apply(onto, vector, tmp_path / "out", exclude=["lm_head.*"])
    said = warned("nothing changes", report)
    assert "lm_head.weight: 2 of 960" in said and "model.norm.weight: 5 of 24" in said
    found = load(tmp_path / "out")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert_same_bits({name: found[name]}, {name: target[name]})


# -------------------------------------------------------------------------------------- every verb


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of a base, one with 3 NaN and 2 infinities; their vectors; another target."""
    folder = tmp_path_factory.mktemp("kin")
    base = toy()
    tuned = perturbed(base, 1)
    tuned["model.norm.weight"][[0, 7, 23]] = NAN
    tuned["lm_head.weight"][2, 5:7] = torch.tensor([INF, -INF])
    for name, tensors in (("base", base), ("tuned", tuned), ("other", perturbed(base, 2)),
                          ("target", perturbed(base, 3))):  # fmt: skip
        save(folder / name, tensors)
    sides = folder / "tuned", folder / "base"
    sv.diff(*sides, folder / "v.safetensors", **ALLOW)
    sv.diff(folder / "other", folder / "base", folder / "w.safetensors")
    sv.export_patch(folder / "v.safetensors", folder / "p.safetensors", **ALLOW)
    return folder


COUNTS = {"model.norm.weight": 3, "lm_head.weight": 2}
OPERATORS = ["linear", "ties", "dare_linear", "task_arithmetic"]


def test_the_vector_says_what_it_could_not_carry(kin: Path) -> None:
    vector = sv.SkillVector.open(kin / "v.safetensors")
    entries = vector.manifest["tensors"]
    assert {n: e["nonfinite"] for n, e in entries.items() if "nonfinite" in e} == COUNTS
    assert "--allow-nonfinite" in vector.manifest["command"].split()
    assert sv.inspect(kin / "v.safetensors").facts["nonfinite"] == 5
    assert sv.inspect(kin / "w.safetensors").facts["nonfinite"] == 0
    assert (vector * 0.5).nonfinite() == COUNTS
    assert sv.combine(vector, kin / "w.safetensors").nonfinite() == COUNTS
    numel = {"model.norm.weight": 6, "lm_head.weight": 4}  # at most, and never more than there are
    assert sv.combine(vector, vector).nonfinite() == numel
    assert sv.combine(*[vector] * 9).nonfinite()["model.norm.weight"] == 24


def calls_of(kin: Path, ref: str, out: Path) -> dict[str, Callable[..., Any]]:
    """Return what can be done with a vector: "TUNED::BASE", or a file that says so."""
    w = kin / "w.safetensors"
    v = out / "v.safetensors"
    return {
        "apply": lambda **o: sv.apply(kin / "target", ref, out / "out", **o),
        "apply to the base": lambda **o: sv.apply(kin / "base", ref, out / "out", **o),
        "save": lambda **o: sv.combine(ref, output=v, codec="dense", **o),
        "scaled": lambda **o: sv.combine(ref, weights=[0.5], output=v, **o),
        "combine": lambda **o: sv.combine(ref, w, output=v, **o),
        "ties": lambda **o: sv.combine(w, ref, op="ties", output=v, **o),
        "apply of a combination": lambda **o: sv.apply(
            kin / "target", sv.combine(w, ref), out / "out", **o
        ),
        "orthogonality": lambda **o: sv.orthogonality(w, ref, **o),
        "orthogonality, second": lambda **o: sv.orthogonality(ref, w, control=None, **o),
        "norms": lambda **o: sv.norms(ref, **o),
        "subspace": lambda **o: sv.norms(ref, subspace=2, **o),
    }


VERBS = list(calls_of(Path(), "", Path()))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["pair", "stored"])
def test_every_verb_refuses_a_vector_with_values_that_it_lacks(
    kind: str, verb: str, kin: Path, tmp_path: Path
) -> None:
    ref = f"{kin / 'tuned'}::{kin / 'base'}" if kind == "pair" else str(kin / "v.safetensors")
    call = calls_of(kin, ref, tmp_path)[verb]
    said = refused(call)
    numel = {"model.norm.weight": 24, "lm_head.weight": 960}
    for name, count in COUNTS.items():
        assert f"{name}: {count} of {numel[name]} values" in said
    assert "--allow-nonfinite" in said and "--exclude" in said
    assert not list(tmp_path.iterdir())
    made = call(**ALLOW)
    report = made if isinstance(made, sv.Report) else made.report
    json.dumps(report.to_dict(), allow_nan=False)
    if verb in ("save", "scaled", "combine", "ties"):
        entries = made.manifest["tensors"]
        assert {n: e["nonfinite"] for n, e in entries.items() if "nonfinite" in e} == COUNTS
        refused(sv.apply, kin / "target", made, tmp_path / "again")
        return
    rest = {"exclude": list(COUNTS)}  # all else is finite
    if not verb.startswith("apply"):
        call(**rest)
        return
    for options in (ALLOW, rest):
        call(force=True, **options)
        request = provenance.read_merged(sv.open_checkpoint(tmp_path / "out"))["request"]
        assert request.get("allow_nonfinite", False) is (options is ALLOW)


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS if "subspace" not in verb and "orthogonality, " not in verb]
)
def test_a_vector_that_says_so_is_refused_before_a_value_is_read(
    verb: str, kin: Path, tmp_path: Path
) -> None:
    """By its header: a dry run refuses, and so does one whose watcher would be told of a plan."""

    class Never:
        def planned(self, report: sv.Report) -> None:
            raise AssertionError("there is a plan")

        def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
            raise AssertionError("bytes were read")

    call = calls_of(kin, str(kin / "v.safetensors"), tmp_path)[verb]
    refused(call, dry_run=True)
    refused(call, watcher=Never())


@pytest.mark.parametrize("kind", ["pair", "stored"])
def test_measures_count_what_is_lost_as_unchanged(kind: str, kin: Path, tmp_path: Path) -> None:
    """Norms, cosines and subspaces are numpy's with 0 in these places."""
    ref = f"{kin / 'tuned'}::{kin / 'base'}" if kind == "pair" else str(kin / "v.safetensors")
    tuned, base, other = (load(kin / side) for side in ("tuned", "base", "other"))
    report = sv.orthogonality(ref, kin / "w.safetensors", **ALLOW)
    deltas = [{n: oracle.delta(t[n], base[n]) for n in base} for t in (tuned, other)]
    a, b = (np.concatenate([delta[name] for name in base]) for delta in deltas)
    found = report.facts["pairs"][0]["overall"]
    assert found["cosine"] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-5)
    if kind == "pair":
        assert report.facts["nonfinite"] == {"tuned": 5, "lost": 5}
        assert "lm_head.weight: 2 of 960" in warned("finite", report)
    norms = sv.norms(ref, **ALLOW).facts["norms"][0]
    rows = {row["name"]: row for row in norms["tensors"]}
    for name in COUNTS:
        own = deltas[0][name]
        assert rows[name]["norm"] == pytest.approx(np.sqrt(own @ own), rel=1e-5)
    both = sv.combine(ref, kin / "w.safetensors", output=tmp_path / "c.safetensors", **ALLOW)
    out = sv.apply(kin / "base", both, tmp_path / "out", dtype="fp32", **ALLOW)
    for name, tensor in load(tmp_path / "out").items():
        delta = deltas[0][name].astype(np.float32) + deltas[1][name].astype(np.float32)
        expected = oracle.apply(base[name], delta.astype(np.float64), 1.0, "F32")
        assert np.abs(oracle.wide(tensor) - oracle.wide(expected)).max() < 1e-6, name
    assert out.facts["verdict"] == "exact base"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a tuned model of fp32, with NaN and infinities in 3 values of Q; the vector."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 48, "vocab_size": 40,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
              "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    base = toy(dtype="F32")
    tuned = perturbed(base)
    tuned[Q][0, :3] = torch.tensor([NAN, INF, -INF])
    sv.diff(*pair(folder, tuned, base, config=config), folder / "v.safetensors", **ALLOW)
    return folder


Q = "model.layers.0.self_attn.q_proj.weight"


def extracted(kind: str, llama: Path, out: Path, **options: Any) -> sv.Report:
    ref = llama / "v.safetensors" if kind == "stored" else f"{llama / 'tuned'}::{llama / 'base'}"
    given = {"rank": 3, "include": ["*q_proj.weight"], "base": os.fspath(llama / "base")}
    return sv.extract_lora(ref, out, **given | options)


@pytest.mark.parametrize("kind", ["pair", "stored"])
def test_extract_lora_refuses_and_takes_as_unchanged(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    """With leave the SVD is that of the matrix with 0 in these places, by numpy."""
    with pytest.raises(NonfiniteError, match=f"{Q}: 3 of 576"):
        extracted(kind, llama, tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    report = extracted(kind, llama, tmp_path / "lora", **ALLOW)
    tuned, base = load(llama / "tuned"), load(llama / "base")
    delta = oracle.delta(tuned[Q], base[Q]).reshape(24, 24)
    values = np.linalg.svd(delta, compute_uv=False)
    line = {line["name"]: line for line in report.ledger}[Q]
    kept = (values[:3] ** 2).sum() / (values**2).sum()
    assert line["kept_energy"] == pytest.approx(kept, abs=1e-4)
    extracted(kind, llama, tmp_path / "rest", include=["*layers.1*q_proj.weight"])


@pytest.mark.parametrize("kind", ["pair", "stored"])
def test_extract_lora_says_what_it_took_as_unchanged(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    report = extracted(kind, llama, tmp_path / "lora", **ALLOW)
    assert f"{Q}: 3 of 576" in warned("finite", report)


def test_a_count_is_never_more_than_there_are_values(tmp_path: Path) -> None:
    """A tensor all of NaN, from a pair and from a vector that says so: 8 of 8, and readable."""
    base = {"w": torch.ones(8), "x": torch.ones(8)}
    sides = pair(tmp_path, {"w": base["w"] * NAN, "x": base["x"] * 2}, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    ref = "::".join(map(str, sides))
    both = sv.combine(ref, vector, output=tmp_path / "c.safetensors", **ALLOW)
    assert both.manifest["tensors"]["w"]["nonfinite"] == 8
    assert "nonfinite" not in both.manifest["tensors"]["x"]


def test_patches_of_values_that_are_not_finite(kin: Path, tmp_path: Path) -> None:
    """Listed and taken in with leave only; the lists are the changed values, by numpy."""
    v, patch = kin / "v.safetensors", tmp_path / "p.safetensors"
    assert "model.norm.weight: 3 of 24" in refused(sv.export_patch, v, patch)
    assert not patch.exists()
    report = sv.export_patch(v, patch, **ALLOW)
    tuned, base = load(kin / "tuned"), load(kin / "base")
    listed = load(patch)
    for name, tensor in tuned.items():
        at = np.flatnonzero(bits(tensor) != bits(base[name]))
        assert np.array_equal(listed[f"{name}.indices"].numpy(), at)
        assert np.array_equal(bits(listed[f"{name}.values"]), bits(tensor)[at])
    assert report.facts["nonfinite"]["lost"] == 5
    made = tmp_path / "made.safetensors"
    said = refused(sv.import_patch, patch, kin / "base", made)
    assert "lm_head.weight: 2 of 960 values (not finite: 2 in tuned)" in said
    vector = sv.import_patch(patch, kin / "base", made, **ALLOW)
    entries = vector.manifest["tensors"]
    assert {n: e["nonfinite"] for n, e in entries.items() if "nonfinite" in e} == COUNTS
    sv.apply(kin / "base", vector, tmp_path / "out", **ALLOW)
    assert_same_bits(tmp_path / "out", tuned)


@pytest.mark.parametrize(
    "words",
    [
        "diff {tuned} {base} -o {out}.safetensors",
        "apply {target} {v} -o {out}",
        "apply {target} --tuned {tuned} --base {base} -o {out}",
        "combine {v} {w} -o {out}.safetensors",
        "import-patch {p} {base} -o {out}.safetensors",
        "export-patch {v} -o {out}.safetensors",
        "orthogonality {v} {w}",
        "norms {v}",
        "orthogonality {w} {tuned}::{base}",
    ],
)
def test_the_command_line_says_so_and_takes_the_flag(words: str, kin: Path, tmp_path: Path) -> None:
    names = {name: kin / name for name in ("tuned", "base", "target")}
    names |= {name: kin / f"{name}.safetensors" for name in "vwp"} | {"out": tmp_path / "out"}
    line = words.format(**names).split()
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 3, result.output
    assert "model.norm.weight: 3 of 24 values" in result.output
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(main, [*line, "--allow-nonfinite"])
    assert result.exit_code == 0, result.output


def test_verify_says_what_it_compared(kin: Path, tmp_path: Path) -> None:
    report = sv.verify(kin / "v.safetensors")
    said = warned("values that are not finite", report)
    assert "model.norm.weight: 3 of 24" in said and "lm_head.weight: 2 of 960" in said
    assert report.facts["verified"]
    sv.apply(kin / "base", kin / "v.safetensors", tmp_path / "out", **ALLOW)
    report = sv.verify(tmp_path / "out")
    assert report.facts["nonfinite"]["lost"] == 5
    assert "model.norm.weight: 3 of 24" in warned("values that are not finite", report)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_another_target_is_told_that_values_have_no_delta(
    lam: float, kin: Path, tmp_path: Path
) -> None:
    """As in one pass: 5 values stay the target's own, which report and card say."""
    target = load(kin / "target")
    pairs = {"tuned": kin / "tuned", "base": kin / "base"}
    ways = {"stored": (kin / "v.safetensors", {}), "one": (None, pairs)}
    for way, (vector, options) in ways.items():
        out = tmp_path / way
        report = sv.apply(kin / "target", vector, out, lam=lam, **options, **ALLOW)
        found = load(out)
        assert np.array_equal(bits(found["model.norm.weight"])[[0, 7, 23]],
                              bits(target["model.norm.weight"])[[0, 7, 23]])  # fmt: skip
        said = warned("model.norm.weight: 3 of 24", report)
        assert "lm_head.weight: 2 of 960" in said and "finite" in said, way
        assert "not finite" in (out / "README.md").read_text(), way


def test_half_of_a_vector_with_leave_reaches_no_infinity(kin: Path, tmp_path: Path) -> None:
    """Replacements hold at lambda 1 alone: at another the base keeps its own values."""
    sv.apply(kin / "base", kin / "v.safetensors", tmp_path / "half", lam=0.5, **ALLOW)
    assert not any(nonfinite(tensor) for tensor in load(tmp_path / "half").values())
    base, found = load(kin / "base"), load(tmp_path / "half")
    assert_same_bits({"x": found["model.norm.weight"][[0, 7, 23]]},
                     {"x": base["model.norm.weight"][[0, 7, 23]]})  # fmt: skip


def test_the_card_of_a_vector_says_so(kin: Path) -> None:
    for name, said in (("v", True), ("w", False)):
        manifest = sv.SkillVector.open(kin / f"{name}.safetensors").manifest
        card = cards.vector_card(manifest, name="org/skill", files={"v.safetensors": 1})
        assert ("5 values of 2 tensors have no finite difference" in card) is said
        assert ("--allow-nonfinite" in card) is said


# ---------------------------------------------------------------------------------------- adapters


def adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{n}": t.clone() for n, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    text = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(text))
    return folder


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return s B A by torch, as PEFT adds it to a weight."""
    return 2.0 * (b.double() @ a.double())


@pytest.mark.parametrize(
    ("dtype", "side", "value"),
    [("F32", "A", NAN), ("F32", "B", INF), ("BF16", "A", -INF), ("F16", "B", NAN),
     ("F32", "A", 3e38)],
)  # fmt: skip
def test_an_adapter_whose_product_is_not_finite(
    dtype: str, side: str, value: float, tmp_path: Path
) -> None:
    """Alone, on its base, and in a combination; refused like a checkpoint, counts by torch."""
    a, b = ordinary(dtype, 1, 12).reshape(2, 6), ordinary(dtype, 2, 16).reshape(8, 2)
    a2, b2 = ordinary(dtype, 3, 12).reshape(2, 6), ordinary(dtype, 4, 16).reshape(8, 2)
    (a if side == "A" else b)[0, 1] = value
    if value == 3e38:
        b[:, 0] = 4.0
    right = product(a, b)
    wrong = ~torch.isfinite(right) | (right.abs() > 3.4028235e38)
    count = int(wrong.sum())
    assert 0 < count < 48
    factors = {"q.lora_A": a, "q.lora_B": b, "k.lora_A": a2, "k.lora_B": b2}
    tensors = {f"{name}.weight": factor for name, factor in factors.items()}
    one = adapter(tmp_path / "one", tensors)
    fine = adapter(tmp_path / "fine", {f"{n}.lora_{s}.weight": t for n in "qk"
                                       for s, t in (("A", a2), ("B", b2))})  # fmt: skip
    base = {f"{n}.weight": ordinary("F32", i, 48).reshape(8, 6) for i, n in enumerate("qk")}
    onto = save(tmp_path / "base", base)
    both = f"{one}::{onto}"
    calls: dict[str, Callable[..., Any]] = {
        "alone": lambda **o: sv.apply(onto, one, tmp_path / "out", **o),
        "pair": lambda **o: sv.apply(onto, both, tmp_path / "out2", **o),
        "diff": lambda **o: sv.diff(one, onto, tmp_path / "v.safetensors", **o),
        "combination": lambda **o: sv.combine(
            both, f"{fine}::{onto}", output=tmp_path / "c.safetensors", **o
        ),
        "norms": lambda **o: sv.norms(both, **o),
        "orthogonality": lambda **o: sv.orthogonality(both, f"{fine}::{onto}", **o),
    }
    for name, call in calls.items():
        said = refused(call)
        assert f"q.weight: {count} of 48 values" in said and "k.weight" not in said, name
        call(**ALLOW)
    expected = torch.where(wrong, 0, right).float().double()
    for out in ("out", "out2"):
        found = load(tmp_path / out)["q.weight"]
        assert torch.equal(found, (base["q.weight"].double() + expected).float())
    for file in ("v", "c"):
        manifest = sv.SkillVector.open(tmp_path / f"{file}.safetensors").manifest
        assert manifest["tensors"]["q.weight"]["nonfinite"] == count
        assert "nonfinite" not in manifest["tensors"]["k.weight"]
        refused(sv.apply, onto, tmp_path / f"{file}.safetensors", tmp_path / "never", dry_run=True)


def test_an_adapter_of_nan_is_not_said_to_be_out_of_range(tmp_path: Path) -> None:
    """Nor is a smaller lam advised: what is not finite are the factors."""
    a, b = ordinary("F32", 1, 12).reshape(2, 6), ordinary("F32", 2, 16).reshape(8, 2)
    a[0, 1] = NAN
    one = adapter(tmp_path / "one", {"q.lora_A.weight": a, "q.lora_B.weight": b})
    onto = save(tmp_path / "base", {"q.weight": torch.ones(8, 6)})
    for call in (
        lambda: sv.apply(onto, one, tmp_path / "out"),
        lambda: sv.apply(onto, f"{one}::{onto}", tmp_path / "out"),
        lambda: sv.diff(one, onto, tmp_path / "v.safetensors"),
    ):
        said = refused(call)
        assert "q.weight: 8 of 48 values" in said
        assert "range of their dtype" not in said and "smaller lam" not in said


def test_peft_itself_makes_these_values_nan(tmp_path: Path) -> None:
    """Of a real model: NaN in a factor and in a module that is saved whole, merged by PEFT."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tuned = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name:
                parameter[0, 3] = NAN
            if "modules_to_save" in name:
                parameter[5, :4] = INF
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    counts = {name: nonfinite(tensor) for name, tensor in merged.items() if nonfinite(tensor)}
    assert counts == {"model.layers.0.self_attn.q_proj.weight": 16, "lm_head.weight": 4}
    sides = tmp_path / "adapter", tmp_path / "base"
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors")
    for name, count in counts.items():
        assert f"{name}: {count} of {merged[name].numel()} values" in said
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    entries = vector.manifest["tensors"]
    assert {n: e["nonfinite"] for n, e in entries.items() if "nonfinite" in e} == counts
    ref, both = "::".join(map(str, sides)), [0.5, 0.5]
    said = refused(sv.combine, ref, ref, weights=both, output=tmp_path / "c.safetensors")
    assert "lm_head.weight: 4 of 640 values" in said
    sv.combine(ref, ref, weights=both, output=tmp_path / "c.safetensors", **ALLOW)


# ---------------------------------------------------------------------------------- another layout


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts one by one and fused, base and tuned with NaN in two of them; vectors of each."""
    folder = tmp_path_factory.mktemp("split")
    base = experts()
    tuned = perturbed(base)
    for expert, count in ((0, 2), (2, 3)):
        name = f"{MLP}.experts.{expert}.up_proj.weight"
        tuned[name] = tuned[name].clone()
        tuned[name][1, :count] = NAN
    for name, parts in (("base", base), ("tuned", tuned), ("target", perturbed(base, 5))):
        save(folder / name, parts, config=CONFIG)
        save(folder / f"fused-{name}", fused(parts), config=CONFIG)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors", **ALLOW)
    sv.diff(folder / "fused-tuned", folder / "fused-base", folder / "f.safetensors", **ALLOW)
    return folder


UP, GATE_UP = f"{MLP}.experts.2.up_proj.weight", f"{MLP}.experts.gate_up_proj"


@pytest.mark.parametrize("onto", ["base", "target"])
@pytest.mark.parametrize("way", ["options", "named"])
def test_counts_are_exact_in_another_layout(
    way: str, onto: str, split: Path, tmp_path: Path
) -> None:
    """A pair one by one onto a fused target: 5 of 288 values; and the other way round, 2 and 3."""
    pairs = {"tuned": split / "tuned", "base": split / "base"}
    fuse = {"tuned": split / "fused-tuned", "base": split / "fused-base"}
    if way == "options":
        calls = (
            lambda **o: sv.apply(split / f"fused-{onto}", None, tmp_path / "out", **pairs, **o),
            lambda **o: sv.apply(split / onto, None, tmp_path / "out2", **fuse, **o),
        )
    else:
        calls = (
            lambda **o: sv.apply(split / f"fused-{onto}", "::".join(map(str, pairs.values())),
                                 tmp_path / "out", **o),
            lambda **o: sv.apply(split / onto, "::".join(map(str, fuse.values())),
                                 tmp_path / "out2", **o),
        )  # fmt: skip
    for call, counts in zip(
        calls,
        ({GATE_UP: (5, 288)}, {UP: (3, 48), UP.replace("2.up", "0.up"): (2, 48)}),
        strict=True,
    ):
        said = refused(call)
        for name, (count, numel) in counts.items():
            assert f"{name}: {count} of {numel} values" in said
        report = call(**ALLOW)
        lines = {line["name"]: line.get("nonfinite", {}).get("lost", 0) for line in report.ledger}
        assert {n: c for n, c in lines.items() if c} == {n: c for n, (c, _) in counts.items()}
        assert report.facts["nonfinite"]["lost"] == 5


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_nan_in_another_layout_is_not_said_to_be_out_of_range(
    side: str, split: Path, tmp_path: Path
) -> None:
    other = "base" if side == "tuned" else "tuned"
    pairs = {side: split / "tuned", other: split / "base"}
    said = refused(sv.apply, split / "fused-target", None, tmp_path / "out", **pairs)
    assert f"{GATE_UP}: 5 of 288 values (not finite: 5 in {side})" in said
    assert "smaller lam" not in said


LAYOUTS = [("v", "fused-target", GATE_UP), ("f", "target", UP), ("v", "target", UP),
           ("f", "fused-target", GATE_UP)]  # fmt: skip


@pytest.mark.parametrize(("vector", "target"), [case[:2] for case in LAYOUTS])
def test_a_vector_that_says_so_is_refused_in_every_layout(
    vector: str, target: str, split: Path, tmp_path: Path
) -> None:
    call = (split / target, split / f"{vector}.safetensors", tmp_path / "out")
    refused(sv.apply, *call)
    refused(sv.apply, *call, dry_run=True)
    assert not (tmp_path / "out").exists()
    sv.apply(*call, exclude=["*.experts.*"])


@pytest.mark.parametrize(("vector", "target", "name"), LAYOUTS)
def test_what_is_chosen_by_the_targets_names_is_refused_and_left_out(
    vector: str, target: str, name: str, split: Path, tmp_path: Path
) -> None:
    """Globs go by the names of the target; the vector's own are others in another layout."""
    call = (split / target, split / f"{vector}.safetensors", tmp_path / "out")
    refused(sv.apply, *call, include=[name])
    assert not (tmp_path / "out").exists()
    parts = [f"{MLP}.experts.*.{kind}_proj.weight" for kind in ("gate", "up")]
    sv.apply(*call, exclude=[GATE_UP] if "fused" in target else parts)


@pytest.mark.parametrize("chosen", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_vector_that_says_so_is_refused_through_a_tied_name(chosen: str, tmp_path: Path) -> None:
    config = {"model_type": "toy", "tie_word_embeddings": True}
    base = toy()
    del base["lm_head.weight"]
    tuned = perturbed(base)
    tuned["model.embed_tokens.weight"][0, 0] = NAN
    sides = pair(tmp_path, tuned, base, config=config)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    target = perturbed(base, 4)
    target["lm_head.weight"] = target["model.embed_tokens.weight"].clone()
    onto = save(tmp_path / "target", target, config=config)
    refused(sv.apply, onto, vector, tmp_path / "out", include=[chosen])
    sv.apply(onto, vector, tmp_path / "out", exclude=["*embed_tokens*", "lm_head*"])


def test_a_vector_that_says_so_is_refused_through_a_new_name(tmp_path: Path) -> None:
    base = toy()
    tuned = perturbed(base)
    tuned["model.norm.weight"][0] = NAN
    sides = pair(tmp_path, tuned, base)
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW)
    target = {n.replace("model.", "decoder."): t for n, t in perturbed(base, 4).items()}
    onto, rule = save(tmp_path / "target", target), {"rename": [r"^model\.=decoder."]}
    refused(sv.apply, onto, vector, tmp_path / "out", **rule)
    refused(sv.apply, onto, vector, tmp_path / "out", include=["decoder.norm.*"], **rule)
    sv.apply(onto, vector, tmp_path / "out", exclude=["decoder.norm.*"], **rule)


# ------------------------------------------------------------------------ blocks, engines, resuming


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of three blocks in bf16 and fp32, with NaN and infinities around block ends."""
    folder = tmp_path_factory.mktemp("long")
    at = [0, 5, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + STEP, 2 * BLOCK_NUMEL + 11]
    sides: dict[str, Tensors] = {"base": {}, "tuned": {}, "target": {}}
    for dtype in ("BF16", "F32"):
        base = torch.linspace(0.5, 1.5, 2 * BLOCK_NUMEL + 12).to(TORCH_DTYPE[dtype])
        tuned, target = base.clone(), base.clone()
        tuned[1000:2000] += 0.25
        tuned[at] = torch.tensor([NAN, INF, -INF, NAN, INF, NAN]).to(tuned.dtype)
        target[BLOCK_NUMEL + 3] = -INF  # stays
        target[1500] = NAN  # should change
        for name, tensor in (("base", base), ("tuned", tuned), ("target", target)):
            sides[name][dtype] = tensor
    for name, tensors in sides.items():
        tensors["small"] = torch.ones(8) + (name == "tuned")
        save(folder / name, tensors)
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors", **ALLOW)
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with cluster(2):
        yield


ENGINES = [
    pytest.param({"engine": "serial"}, id="serial"),
    pytest.param({"engine": "threads", "workers": 3}, id="threads"),
    pytest.param({"engine": "ray", "workers": 2}, id="ray", marks=pytest.mark.ray),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_counts_add_up_over_blocks_whatever_the_engine(
    engine: dict[str, Any], long: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if engine["engine"] == "ray":
        request.getfixturevalue("nodes")
    sides = long / "tuned", long / "base"
    numel = 2 * BLOCK_NUMEL + 12
    said = refused(sv.diff, *sides, tmp_path / "v.safetensors", **engine)
    for name in ("BF16", "F32"):
        assert f"{name}: 6 of {numel} values (not finite: 6 in tuned)" in said
    vector = sv.diff(*sides, tmp_path / "v.safetensors", **ALLOW, **engine)
    assert (tmp_path / "v.safetensors").read_bytes() == (long / "v.safetensors").read_bytes()
    assert vector.report.facts["nonfinite"] == {"tuned": 12, "lost": 12}
    said = refused(
        sv.apply, long / "target", None, tmp_path / "out", tuned=sides[0], base=sides[1], **engine
    )
    counts = "7 of 2097164 values (not finite: 6 in tuned, 2 in target, 2 in output)"
    assert f"BF16: {counts}" in said and f"F32: {counts}" in said
    report = sv.apply(long / "base", vector, tmp_path / "out", **ALLOW, **engine)
    assert_same_bits(tmp_path / "out", load(sides[0]))
    assert report.facts["nonfinite"] == {"output": 12, "lost": 12}
    pairs = {"tuned": sides[0], "base": sides[1]}
    report = sv.apply(long / "base", None, tmp_path / "one", **pairs, **ALLOW, **engine)
    assert report.facts["nonfinite"] == {"tuned": 12, "output": 12, "lost": 12}  # each once
    both = sv.combine(vector, vector, weights=[0.5, 0.5], op="ties",
                      output=tmp_path / "c.safetensors", **ALLOW, **engine)  # fmt: skip
    assert both.manifest["tensors"]["F32"]["nonfinite"] == 12  # 6 of each, at most


class Interrupted(Exception):  # noqa: N818
    """As a killed process, but for the process."""


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_counts_outlive_an_interruption(
    verb: str, allow: bool, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that was cut off has counted is refused, or announced, by the one that goes on."""
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)
    jobs: list[str] = []

    def failing(plan: Plan, number: int, *rest: Any) -> None:
        jobs.append(plan.jobs[number].name)
        if stops and number == len(plan.jobs) - 1:
            raise Interrupted

    options = {"engine": "serial", "allow_nonfinite": allow}
    sides = long / "tuned", long / "base"

    def run() -> dict[str, Any]:
        if verb == "diff":
            return sv.diff(*sides, tmp_path / "v.safetensors", **options).report.facts
        pairs = {"tuned": sides[0], "base": sides[1]}
        return sv.apply(long / "target", None, tmp_path / "out", **pairs, **options).facts

    stops = True
    with pytest.raises(Interrupted), threads.on_block(failing):
        run()
    done = set(jobs) - {jobs[-1]}
    assert done & {"BF16", "F32"}
    stops, jobs = False, []
    with threads.on_block(failing):
        facts, said = ({}, refused(run)) if not allow else (run(), "")
    if not allow:
        count = 6 if verb == "diff" else 7
        assert f"BF16: {count} of " in said and f"F32: {count} of " in said
        assert not list(tmp_path.iterdir())  # it would fail again
    else:
        assert facts["nonfinite"]["lost"] == (12 if verb == "diff" else 14)
        assert facts["nonfinite"]["tuned"] == 12 and facts["resumed"]
        if verb == "diff":
            written = (tmp_path / "v.safetensors").read_bytes()
            assert written == (long / "v.safetensors").read_bytes()
    assert len(set(jobs)) < 3  # the last, and perhaps one that was not yet claimed


def test_a_stream_of_shards_counts_as_well(
    kin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server, shard by shard: refused with all counts, and the same bytes with leave."""
    with HubServer() as server:
        for name in ("tuned", "base"):
            server.add_repo(f"org/{name}", save(tmp_path / name, load(kin / name), shards=3))
        server.adopt(monkeypatch, tmp_path / "home")
        options = {"stream": True}
        said = refused(sv.diff, "org/tuned", "org/base", tmp_path / "v.safetensors", **options)
        for name, count in COUNTS.items():
            assert f"{name}: {count} of" in said
        sv.diff("org/tuned", "org/base", tmp_path / "v.safetensors", **options, **ALLOW)
    assert_same_bits(tmp_path / "v.safetensors", kin / "v.safetensors")


def test_a_merged_model_says_that_it_was_let_through(kin: Path, tmp_path: Path) -> None:
    sv.apply(kin / "base", kin / "v.safetensors", tmp_path / "out", **ALLOW)
    recipe = provenance.read_merged(sv.open_checkpoint(tmp_path / "out"))
    assert recipe["request"]["allow_nonfinite"] is True
    sv.apply(kin / "base", kin / "w.safetensors", tmp_path / "plain")
    recipe = provenance.read_merged(sv.open_checkpoint(tmp_path / "plain"))
    assert "allow_nonfinite" not in recipe["request"]
    assert "not finite" in (tmp_path / "out" / "README.md").read_text()
    assert "not finite" not in (tmp_path / "plain" / "README.md").read_text()
