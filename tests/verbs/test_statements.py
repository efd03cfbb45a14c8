"""Sentences and numbers: what is said of a result is true, against numpy over every value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import bits, from_bits, load, save

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.cli.group import OF_PROGRAM
from skillvec.errors import NonfiniteError, VerificationError
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.verbs.sentences import ANSWERS, DONE, PLANS, TRIALS, done_sentence

BEHIND = 40_000  # values of a tensor
ONES = {"BF16": 0x3F80, "F16": 0x3C00}


def halves(numel: int = BEHIND, dtype: str = "BF16") -> np.ndarray:
    return np.full(numel, ONES[dtype], np.uint16)


def stored(path: Path, patterns: np.ndarray, dtype: str = "BF16", **more: torch.Tensor) -> Path:
    return save(path, {"w": from_bits(patterns, dtype), **more})


def said_of(report: sv.Report, word: str) -> str:
    (text,) = [text for text in report.warnings if word in text]
    return text


def test_every_verb_has_its_words() -> None:
    """A verb without any would be said as a plan, of whose facts it has none."""
    elsewhere = {"verify", "orthogonality", "norms"}  # any proof, and the sentences of angles
    verbs = (set(main.commands) - {*OF_PROGRAM}) | {"attach"}  # which is of Python alone
    assert {*DONE, *ANSWERS, *TRIALS} | elsewhere == verbs
    assert set(PLANS) <= set(main.commands)


# -------------------------------------------------------------------------------- every value


def test_a_few_values_far_from_the_front_are_counted(tmp_path: Path) -> None:
    tuned = halves()
    tuned[-150:-50] += 9
    base = stored(tmp_path / "b", halves())
    v = sv.diff(stored(tmp_path / "t", tuned), base, tmp_path / "v.safetensors")
    report = sv.apply(base, v, tmp_path / "o", dtype="fp32")
    assert (load(tmp_path / "o")["w"] != 1).sum() == report.facts["changed"] == 100
    assert report.facts["gain"] == pytest.approx(1, rel=1e-6)
    assert not [text for text in report.warnings if "no value differs" in text]


def test_a_share_of_rounding_in_one_pass_is_that_of_diff(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(BEHIND, generator=generator)
    trained = torch.randn(BEHIND, generator=generator)
    base = save(tmp_path / "b", {"a": wide, "b": trained})
    tuned = save(tmp_path / "t", {"a": wide.bfloat16(), "b": trained + 0.01})
    exact = sv.diff(tuned, base, tmp_path / "v.safetensors").report
    moved = {"a": wide.bfloat16().double() - wide, "b": (trained + 0.01).double() - trained}
    squares = {name: float(delta.square().sum()) for name, delta in moved.items()}
    share = 100 * squares["a"] / sum(squares.values())
    assert said_of(exact, "rounding, not training").startswith(f"{share:.3g} % of")
    fused = sv.apply(base, None, tmp_path / "o", tuned=tuned, base=base)
    assert said_of(fused, "rounding, not training").startswith(f"{share:.3g} % of")


# ----------------------------------------------------------------------------------- gains


@pytest.mark.parametrize("lam", [0.1, 0.25, 0.5, 0.7])
def test_the_gain_of_exceptions_is_numpys(lam: float, tmp_path: Path) -> None:
    base = torch.ones(2000)
    tuned = base.clone()
    tuned[::40], tuned[1::2] = 300.0, 1.0078125
    sides = [save(tmp_path / n, {"w": s.bfloat16()}) for n, s in (("t", tuned), ("b", base))]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    assert v.manifest["exactness"]["exceptions"] == 50
    report = sv.apply(sides[1], v, tmp_path / "o", lam=lam)
    moved = load(tmp_path / "o")["w"].double() - 1
    asked = lam * (tuned.double() - 1)
    assert report.facts["gain"] == pytest.approx(float(moved @ asked / (asked @ asked)), rel=1e-5)
    cosine = float(moved @ asked / moved.norm() / asked.norm())
    assert report.facts["cosine"] == pytest.approx(cosine, rel=1e-5)


def test_advice_that_cannot_help_is_not_given(tmp_path: Path) -> None:
    base = torch.linspace(1, 2, 500)
    sides = [save(tmp_path / n, {"w": s}) for n, s in (("t", base + 1e-3), ("b", base))]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    report = sv.apply(sides[1], v, tmp_path / "o", lam=1e-5, rounding="stochastic")
    words = said_of(report, "changed the request")
    assert "--dtype fp32" not in words and "--rounding stochastic" not in words
    assert said_of(report, "changes 16-bit outputs alone")
    report = sv.apply(sides[1], v, tmp_path / "p", lam=1e-50)
    assert "lam 1e-50 is 0 in fp32" in said_of(report, "no value differs")


def test_numbers_beyond_fp64_are_no_json_and_no_traceback(tmp_path: Path) -> None:
    base = torch.ones(1, 2, dtype=torch.float64)
    tuned = torch.tensor([[1e200, 1.0]], dtype=torch.float64)
    sides = [save(tmp_path / n, {"w": s}) for n, s in (("t", tuned), ("b", base))]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    assert sv.apply(sides[1], v, tmp_path / "o").facts["gain"] is None
    shown = CliRunner().invoke(main, ["norms", str(tmp_path / "v.safetensors")])
    assert shown.exit_code == 0, shown.output
    measured = CliRunner().invoke(main, ["norms", str(tmp_path / "v.safetensors"), "--json"])
    json.loads(measured.stdout, parse_constant=lambda word: pytest.fail(word))


def test_a_support_counts_what_only_exceptions_hold(tmp_path: Path) -> None:
    base = torch.ones(64, 64, dtype=torch.float16)
    tuned = base.clone()
    base[0, 0], tuned[0, 0] = -65504, 65504
    base[0, 5], tuned[0, 5] = 65504, -65504
    tuned[0, 9] = 1.5
    sides = [save(tmp_path / n, {"w": s}) for n, s in (("t", tuned), ("b", base))]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    (measured,) = sv.norms(v).facts["norms"]
    assert measured["overall"]["density"] == 3 / 4096


# -------------------------------------------------------------------------------- what changed


def test_the_same_nan_in_two_dtypes_is_no_change(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), 2.0])
    sides = [save(tmp_path / n, {"w": s}) for n, s in (("t", values.bfloat16()), ("b", values))]
    report = sv.diff(*sides, tmp_path / "v.safetensors").report
    assert report.facts["changed"] == 0 and said_of(report, "no value differs")


@pytest.mark.parametrize("patterns", [(0x8000, 0), (0, 0x8000)])
def test_zeros_of_two_signs_are_counted_alike(patterns: tuple[int, int], tmp_path: Path) -> None:
    base, tuned = (np.array([p, 0x3F80], np.uint16) for p in patterns)
    sides = [stored(tmp_path / "t", tuned), stored(tmp_path / "b", base)]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    assert v.report.facts["changed"] == 1
    assert sv.apply(sides[1], v, tmp_path / "o").facts["changed"] == 1
    assert np.array_equal(bits(load(tmp_path / "o")["w"]), tuned)


def test_integers_that_stay_the_targets_are_named(tmp_path: Path) -> None:
    sides = [
        stored(tmp_path / "t", halves(9) + 1, steps=torch.tensor(7)),
        stored(tmp_path / "b", halves(9), steps=torch.tensor(5)),
    ]
    v = sv.diff(*sides, tmp_path / "v.safetensors")
    pair: dict[str, Any] = {"tuned": sides[0], "base": sides[1]}
    for vector, more in ((v, {}), (None, pair)):
        report = sv.apply(sides[1], vector, tmp_path / "o", force=True, **more)
        assert "steps" in said_of(report, "stay the target's")
        assert load(tmp_path / "o")["steps"] == 5


# -------------------------------------------------------------------------- verdicts and proofs


def test_no_digest_confirms_the_verdict_on_a_combination(tmp_path: Path) -> None:
    base = halves(2 * BLOCK_NUMEL)
    sides = [stored(tmp_path / n, base + step) for n, step in (("b", 0), ("t", 1), ("u", 2))]
    vectors = [sv.diff(side, sides[0], tmp_path / f"{side.name}.safetensors") for side in sides[1:]]
    other = base.copy()
    other[BLOCK_NUMEL + 12345] ^= 0x40
    target = stored(tmp_path / "g", other)
    assert sv.apply(target, vectors[0], tmp_path / "o").facts["verdict"] == "same family"
    both = sv.combine(*vectors, weights=[0.5, 0.5], output=tmp_path / "c.safetensors")
    facts = sv.apply(target, both, tmp_path / "p").facts
    assert facts["verdict"] == "exact base" and facts["verdict_sampled"]
    shown = CliRunner().invoke(main, ["verify", str(tmp_path / "p")])
    assert "exact base (by samples of its weights)" in shown.stdout
    assert "verdict_sampled" not in sv.apply(sides[0], vectors[0], tmp_path / "q").facts


@pytest.mark.parametrize("what", ["a value", "an integer"])
def test_an_imported_patch_is_proved_on_the_base_that_it_was_made_on(
    what: str, tmp_path: Path
) -> None:
    patterns, steps = halves(90_000), torch.tensor(5)
    tuned = patterns.copy()
    tuned[::7] += 3
    base = stored(tmp_path / "b", patterns, steps=steps)
    v = sv.diff(stored(tmp_path / "t", tuned, steps=steps), base, tmp_path / "v.safetensors")
    sv.export_patch(v, tmp_path / "p.safetensors")
    sv.import_patch(tmp_path / "p.safetensors", base, tmp_path / "i.safetensors")
    assert sv.verify(tmp_path / "i.safetensors").facts["verified"]
    if what == "a value":
        patterns[77_777] ^= 0x40
    stored(tmp_path / "b", patterns, steps=steps if what == "a value" else steps + 1)
    with pytest.raises(VerificationError, match="base's tensor is not the one"):
        sv.verify(tmp_path / "i.safetensors")


def test_a_patch_of_a_rounded_vector_says_whose_values_it_has(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, generator=generator)
    tuned = base + 1e-3 * torch.randn(400, generator=generator)
    sides = [save(tmp_path / n, {"w": s}) for n, s in (("t", tuned), ("b", base))]
    v = sv.diff(*sides, tmp_path / "v.safetensors", dtype="bf16")
    assert "rounded to bf16" in said_of(sv.export_patch(v, tmp_path / "p.safetensors"), "the list")


# ---------------------------------------------------------------------- what is let through


def test_infinities_that_tuned_replaces_are_not_said_to_stay(tmp_path: Path) -> None:
    base, tuned = halves(100), halves(100)
    base[:2] = 0x7F80
    tuned[:2] = 0x7FC0, 0x3F81
    sides = [stored(tmp_path / "t", tuned), stored(tmp_path / "b", base)]
    v = sv.diff(*sides, tmp_path / "v.safetensors", allow_nonfinite=True)
    report = sv.apply(sides[1], v, tmp_path / "o", allow_nonfinite=True)
    assert np.array_equal(bits(load(tmp_path / "o")["w"]), tuned)
    assert not [text for text in report.warnings if "stay as they are" in text]
    with pytest.raises(NonfiniteError, match="w: 1 of 100"):  # infinity became NaN
        sv.export_patch(v, tmp_path / "p.safetensors")


def test_what_several_vectors_lack_is_at_most_their_sum_and_told_by_all(tmp_path: Path) -> None:
    base = stored(tmp_path / "b", halves(100))
    vectors = []
    for name, step in (("t", 1), ("u", 2)):
        tuned = halves(100) + step
        tuned[:4] = 0x7FC0
        side = stored(tmp_path / name, tuned)
        path = tmp_path / f"{name}.safetensors"
        vectors.append(sv.diff(side, base, path, allow_nonfinite=True))
    with pytest.raises(NonfiniteError, match="w: at most 8 of 100"):
        sv.combine(*vectors, output=tmp_path / "c.safetensors")
    both = sv.combine(*vectors, output=tmp_path / "c.safetensors", allow_nonfinite=True)
    assert "at most 8" in said_of(both.report, "no target gets anything")
    for report in (sv.norms(vectors[0], allow_nonfinite=True),
                   sv.orthogonality(*vectors, allow_nonfinite=True)):  # fmt: skip
        assert "w: 4 of 100" in " ".join(report.warnings)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c.safetensors")]).stdout
    assert "but for at most 8 values, which nobody gets" in shown


def test_a_control_leaves_room_for_all_columns(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"]
    base = {name: torch.randn(32, 32, generator=generator).bfloat16() for name in names}
    refs = []
    for name in ("t", "u"):
        moved = {n: (w.float() + 0.01 * torch.randn(w.shape, generator=generator)).bfloat16()
                 for n, w in base.items()}  # fmt: skip
        refs.append(f"{save(tmp_path / name, moved)}::{tmp_path / 'b'}")
    save(tmp_path / "b", base)
    call = ["orthogonality", *refs, "--control", "random"]
    shown = CliRunner().invoke(main, call, env={"COLUMNS": "80"}).stdout
    head = shown.splitlines()[
        : next(n for n, line in enumerate(shown.splitlines()) if "───" in line)
    ]
    above, below = (line.rstrip() for line in head[-2:])
    assert "control" in above and "lift" in "".join(head)
    assert "weights" in below and below.endswith("relation") and len(below) <= 80


@pytest.mark.parametrize(("count", "said"), [(12, "12 values, where"), (0, "integer tensors")])
def test_what_a_vector_does_not_restore_is_named(count: int, said: str, tmp_path: Path) -> None:
    """Also of vectors made when some values of fp32 were given up, and only counted."""
    sides = [
        stored(tmp_path / "t", halves(9) + 1, steps=torch.tensor(7)),
        stored(tmp_path / "b", halves(9), steps=torch.tensor(5)),
    ]
    report = sv.diff(*sides, tmp_path / "v.safetensors").report
    assert report.facts["exactness"]["claim"] == "partial"
    report.facts["exactness"] |= {"unrestored": count}
    assert f"base + 1 * v is tuned but for {said}" in done_sentence(report)
