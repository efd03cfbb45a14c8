"""Cosines, norms and z-scores against a plain numpy script, on stored vectors and on pairs."""

import csv
import io
import json
import sys
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from click.testing import CliRunner
from families import load, perturbed, save, toy

import skillvec as sv
from skillvec.analysis.report_csv import csv_text
from skillvec.cli.commands import main
from skillvec.cli.screen import Screen

NUMBERS = ("cosine", "z_isotropic", "norm_a", "norm_b", "norm_ratio")


def script(tuned_a: dict, base_a: dict, tuned_b: dict, base_b: dict) -> dict[str, dict]:
    """Return the rows by level and name that a float64 script computes; names grouped by hand."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in base_a:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = "(no layer)" if number is None else ".".join(parts[: number + 1])
        kind = name if number is None else ".".join(parts[number + 1 :])
        for key in (("tensors", name), ("layers", layer), ("kinds", kind), ("overall", "")):
            groups.setdefault(key, []).append(name)
    rows = {}
    for key, names in groups.items():
        a = np.concatenate([oracle.delta(tuned_a[n], base_a[n]) for n in names])
        b = np.concatenate([oracle.delta(tuned_b[n], base_b[n]) for n in names])
        norms = sqrt(a @ a), sqrt(b @ b)
        rows[key] = {"numel": a.size, "norm_a": norms[0], "norm_b": norms[1]}
        if all(norms):
            cosine = a @ b / (norms[0] * norms[1])
            rows[key] |= {"cosine": cosine, "z_isotropic": cosine * sqrt(a.size)}
        rows[key]["norm_ratio"] = norms[0] / norms[1] if norms[1] else None
    return rows


def check_pair(pair: dict, expected: dict) -> None:
    found = {("overall", ""): pair["overall"]}
    for level in ("tensors", "layers", "kinds"):  # modules: tests/support/angles.py
        found |= {(level, row["name"]): row for row in pair[level]}
    assert set(found) == set(expected)
    for key, row in expected.items():
        assert found[key]["numel"] == row["numel"]
        # fp32 sums within a step: 1e-6 of the norms, so absolute for a cosine
        if "cosine" in row:
            assert found[key]["cosine"] == pytest.approx(row["cosine"], abs=2e-6), key
            z = pytest.approx(row["z_isotropic"], abs=2e-6 * sqrt(row["numel"]))
            assert found[key]["z_isotropic"] == z, key
        else:
            assert (found[key]["cosine"], found[key]["z"]) == (None, None), key
        for number in ("norm_a", "norm_b", "norm_ratio"):
            assert found[key][number] == pytest.approx(row[number], rel=2e-6), key


@pytest.mark.parametrize("form", ["stored", "pairs", "mixed"])
def test_every_number_is_the_scripts(form: str, family, tmp_path: Path) -> None:
    """RL against SFT delta; stored values and pairs read in one pass say the same."""
    a: object = f"{family.tuned}::{family.base}"
    b: object = f"{family.sft}::{family.base}"
    if form != "pairs":
        a = sv.diff(family.tuned, family.base, tmp_path / "a.safetensors")
    if form == "stored":
        b = tmp_path / "b.safetensors"
        sv.diff(family.sft, family.base, b)
    report = sv.orthogonality(a, b)
    tuned, sft, base = (load(path) for path in (family.tuned, family.sft, family.base))
    check_pair(report.facts["pairs"][0], script(tuned, base, sft, base))


@pytest.mark.parametrize(
    "dtypes", [("F16", "F16"), ("F32", "F32"), ("BF16", "F32"), ("F64", "F32")]
)
def test_other_dtypes_and_mixtures(dtypes: tuple[str, str], tmp_path: Path) -> None:
    sides = []
    for number, dtype in enumerate(dtypes):
        base = toy(0, dtype)
        tuned = perturbed(base, 10 + number)
        save(tmp_path / f"base{number}", base)
        save(tmp_path / f"tuned{number}", tuned)
        sv.diff(
            tmp_path / f"tuned{number}", tmp_path / f"base{number}",
            tmp_path / f"{number}.safetensors",
        )  # fmt: skip
        sides += [tuned, base]
    report = sv.orthogonality(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    check_pair(report.facts["pairs"][0], script(*sides))


def pair_of(
    a: dict, b: dict, tmp_path: Path, dtype: torch.dtype = torch.float32, **options: int
) -> dict:
    """Return the report's pair for two deltas given as tensors."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    for name, tensors in (("a", a), ("b", b), ("zero", zero)):
        save(tmp_path / name, {n: t.to(dtype) for n, t in tensors.items()})
    refs = (f"{tmp_path / side}::{tmp_path / 'zero'}" for side in "ab")
    report = sv.orthogonality(*refs, **options)
    return report.facts["pairs"][0]


def test_identical_negated_and_scaled_vectors(family, tmp_path: Path) -> None:
    vector = sv.diff(family.sft, family.base, tmp_path / "v.safetensors")
    for other, sign, ratio in ((vector, 1, 1), (-vector, -1, 1), (4 * vector, 1, 0.25)):
        overall = sv.orthogonality(vector, other).facts["pairs"][0]["overall"]
        near = 1e-12 if other is vector else 1e-7  # sums in fp32 groups against sums in fp64
        assert overall["cosine"] == pytest.approx(sign, abs=near)
        assert overall["z_isotropic"] == pytest.approx(sign * sqrt(overall["numel"]), rel=1e-6)
        assert overall["norm_ratio"] == pytest.approx(ratio, rel=1e-7)
    swapped = f"{family.base}::{family.sft}"
    overall = sv.orthogonality(vector, swapped).facts["pairs"][0]["overall"]
    assert overall["cosine"] == pytest.approx(-1, abs=1e-12)


def test_disjoint_supports_are_orthogonal(tmp_path: Path) -> None:
    a, b = torch.zeros(100), torch.zeros(100)
    a[::2], b[1::2] = 1.5, -2.5
    row = pair_of({"x": a}, {"x": b}, tmp_path)["overall"]
    assert (row["cosine"], row["z"]) == (0.0, 0.0)
    assert (row["norm_a"], row["norm_b"]) == (
        pytest.approx(1.5 * sqrt(50)),
        pytest.approx(2.5 * sqrt(50)),
    )


def test_a_zero_vector_has_no_cosine(tmp_path: Path) -> None:
    a = {"x": torch.ones(5), "y": torch.ones(5)}
    b = {"x": torch.zeros(5), "y": torch.ones(5)}
    pair = pair_of(a, b, tmp_path)
    rows = {row["name"]: row for row in pair["tensors"]}
    assert (rows["x"]["cosine"], rows["x"]["z"], rows["x"]["norm_ratio"]) == (None,) * 3
    assert (rows["x"]["norm_a"], rows["x"]["norm_b"]) == (pytest.approx(sqrt(5)), 0.0)
    assert rows["y"]["cosine"] == pytest.approx(1.0, abs=1e-12)
    assert pair["overall"]["cosine"] == pytest.approx(1 / sqrt(2))


def test_exceptions_count_with_their_exact_value(tmp_path: Path) -> None:
    """1 - 2^-9 is held as 1 and an exception; sums that used the 1 would be .2 % too large."""
    tuned = torch.ones(2000, dtype=torch.bfloat16)
    base = tuned.clone()
    base[::10] = 2.0**-9  # one in ten is below the share at which diff would choose fp32
    save(tmp_path / "tuned", {"x": tuned})
    save(tmp_path / "base", {"x": base})
    vector = sv.diff(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors", codec="dense"
    )
    assert vector.manifest["exactness"]["exceptions"] == 200
    stored = load(tmp_path / "v.safetensors")["x"]
    assert stored.dtype == torch.bfloat16
    expected = sqrt(200) * (1 - 2.0**-9)
    for other in (vector, f"{tmp_path / 'tuned'}::{tmp_path / 'base'}"):
        row = sv.orthogonality(vector, other).facts["pairs"][0]["overall"]
        assert row["norm_a"] == pytest.approx(expected, rel=1e-6)
        assert row["norm_b"] == pytest.approx(expected, rel=1e-6)
        assert row["cosine"] == pytest.approx(1.0, abs=1e-9)


def test_three_vectors_make_three_pairs(family, tmp_path: Path) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft, family.target)]
    pairs = sv.orthogonality(*refs).facts["pairs"]
    assert [(p["a"], p["b"]) for p in pairs] == [
        (refs[0], refs[1]), (refs[0], refs[2]), (refs[1], refs[2]),
    ]  # fmt: skip
    for pair in pairs:  # each as if it were alone
        alone = sv.orthogonality(pair["a"], pair["b"]).facts["pairs"][0]
        assert alone == pair


def test_three_vectors_against_the_script(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft, family.target)]
    pairs = sv.orthogonality(*refs).facts["pairs"]
    base = load(family.base)
    sides = [load(path) for path in (family.tuned, family.sft, family.target)]
    for pair, (i, j) in zip(pairs, ((0, 1), (0, 2), (1, 2)), strict=True):
        check_pair(pair, script(sides[i], base, sides[j], base))


def test_z_of_unrelated_vectors_is_standard_normal(tmp_path: Path) -> None:
    """100 independent pairs of 4096 values: the mean has std .1, the std .07; 4 sigmas each."""
    rng = np.random.default_rng(20)
    draws = rng.normal(size=(2, 100, 4096)).astype(np.float32)
    a, b = ({f"t{i}": torch.from_numpy(row) for i, row in enumerate(side)} for side in draws)
    pair = pair_of(a, b, tmp_path)
    z = np.array([row["z"] for row in pair["tensors"]])
    assert z.size == 100
    assert abs(z.mean()) < 4 / sqrt(100)
    assert abs(z.std() - 1) < 4 / sqrt(200)
    assert abs(pair["overall"]["z"]) < 4


def test_globs_choose_tensors(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    report = sv.orthogonality(*refs, include=["model.layers.*"], exclude=["*.bias"])
    names = {row["name"] for row in report.facts["pairs"][0]["tensors"]}
    assert names == {
        n for n in load(family.base) if n.startswith("model.layers.") and not n.endswith(".bias")
    }
    assert report.counts["excluded"] == len(load(family.base)) - len(names)


def test_csv_holds_every_number_of_every_row(family) -> None:
    refs = [f"{s}::{family.base}" for s in (family.tuned, family.sft)]
    report = sv.orthogonality(*refs, control="random", subspace=2).to_dict()
    found, base = report["subspace"], load(family.base)
    flat = sum(tensor.dim() != 2 for tensor in base.values())
    assert found["left_out"] == flat > 0
    assert found["exact"] + found["randomised"] == len(base) - flat
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    expected = []
    lineage = dict.fromkeys(("lineage_a", "lineage_b"), "BF16 - BF16")
    sets = [
        (refs, report["pairs"][0]),
        *(([ref, ""], n) for ref, n in zip(refs, report["norms"], strict=True)),
    ]
    for (a, b), entry in sets:
        for level in ("overall", "parts", "modules", "kinds", "layers", "tensors"):
            held = entry[level] if level != "overall" else [entry[level] | {"name": "overall"}]
            sides = {"a": a, "b": b} | lineage | ({} if b else {"lineage_b": ""})
            expected += [sides | {"level": level.removesuffix("s")} | row for row in held]
    assert len(rows) == len(expected)
    numbers = 0
    for row, held in zip(rows, expected, strict=True):
        for key, value in held.items():
            if isinstance(value, float | int):
                numbers += 1
                assert float(row[key]) == value, key
            elif not isinstance(value, list):
                assert row[key] == (value or ""), key
        assert not [key for key in row if row[key] and key not in held]
    assert numbers > 1000


def test_command_line_says_the_same(family) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    words = ("--control", "random", "--subspace", "2", "--seed", "3")
    result = CliRunner().invoke(main, ["orthogonality", *refs, *words, "--json"])
    assert result.exit_code == 0, result.output
    report = sv.orthogonality(*refs, control="random", subspace=2, seed=3).to_dict()
    assert json.loads(result.stdout) == {"format_version": 1} | report


def test_one_screen_says_what_it_means(family) -> None:
    """The answer stands first, then whose the letters are, then few numbers; the rest with -v."""
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    (pair,) = sv.orthogonality(*refs, control="random").facts["pairs"]
    overall, env = pair["overall"], {"COLUMNS": "80"}
    plain = CliRunner(env=env).invoke(main, ["orthogonality", *refs]).stdout
    shown = CliRunner(env=env).invoke(main, ["orthogonality", *refs, "--control", "random"]).stdout
    row = next(line for line in shown.splitlines() if line.startswith("A, B "))
    for number in (f"{overall['cosine']:+.3g}", f"{1.96 * overall['cosine_sd']:.2g}",
                   f"{overall['z']:+.1f}", f"{overall['control_cosine']:+.3g}"):  # fmt: skip
        assert number in row
    assert " control " in shown and " control " not in plain and "|A| /" in plain
    for text in (plain, shown):
        lines = [line for line in text.splitlines() if "::" not in line]  # long paths
        assert len(text.splitlines()) <= 24 and max(map(len, lines)) <= 80
        words = " ".join(text.split())
        assert words.startswith("A and B are ") and "their cosine is" in words[:120]
        assert words.index("their cosine is") < words.index("A = ") < words.index("A, B ")
        assert "BF16 - BF16" in words and "Adding A to a model that holds B" in words
        assert "self_attn" not in words and "-v shows every number" in words
    full = CliRunner(env=env).invoke(main, ["orthogonality", *refs, "-v"]).stdout
    words = " ".join(full.split())
    assert pair["sentence"] in words and "self_attn" in words and "-v shows" not in words
    three = [*refs, f"{family.target}::{family.base}"]
    words = ["orthogonality", *three, "--subspace", "2"]
    text = CliRunner(env=env).invoke(main, words).stdout
    assert " 3 pairs " in text and "top 2 singular directions" in text
    assert "Adding B" not in text and "self_attn" not in text
    full = " ".join(CliRunner(env=env).invoke(main, [*words, "-v"]).stdout.split())
    assert "Adding B to a model that holds C" in full


def test_the_answer_about_one_vector(family) -> None:
    ref = f"{family.tuned}::{family.base}"
    words = [" ".join(CliRunner(env={"COLUMNS": "80"}).invoke(main, ["norms", ref, *more])
                      .stdout.split()) for more in ([], ["-v"])]  # fmt: skip
    for said in words:
        assert said.startswith("A changes ") and ", most per value in " in said
        assert said.index("most per value") < said.index("A = ") < said.index("kinds")
    assert "layers" not in words[0].partition("kinds")[2].replace("model.layers", "")
    assert "tensors" in words[1].partition("kinds")[2]


def test_weights_that_are_no_numbers_have_no_subspaces(tmp_path: Path) -> None:
    draw = torch.manual_seed(0)
    base = {"x": torch.randn(8, 6, generator=draw), "y": torch.randn(8, 6, generator=draw)}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", perturbed(base))
    save(tmp_path / "w", {"x": base["x"], "y": torch.full((8, 6), torch.inf)})
    ref = f"{tmp_path / 'tuned'}::{tmp_path / 'base'}"
    report = sv.norms(ref, against=tmp_path / "w", subspace=2)
    rows = {row["name"]: row for row in report.facts["norms"][0]["tensors"]}
    assert rows["x"]["energy_in_w"] > 0 and rows["y"]["energy_in_w"] is None
    assert rows["y"]["stable_rank"] > 1
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_report_is_a_folder(family, tmp_path: Path) -> None:
    refs = [f"{side}::{family.base}" for side in (family.tuned, family.sft)]
    report = sv.orthogonality(*refs, output=tmp_path / "r", figures=True)
    files = {str(p.relative_to(tmp_path / "r")) for p in (tmp_path / "r").rglob("*")}
    assert {"report.json", "report.csv", "report.html", "figures"} <= files
    assert any(name.endswith(".svg") for name in files)
    assert sum(name.endswith(".svg") for name in files) == sum(n.endswith(".png") for n in files)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report.to_dict()
    assert (tmp_path / "r" / "report.csv").read_text() == csv_text(report.to_dict())
    assert refs[0].rpartition("/")[2] in (tmp_path / "r" / "report.html").read_text()
    with pytest.raises(sv.UsageError, match="exists already"):
        sv.norms(refs[0], output=tmp_path / "r")
    sv.norms(refs[0], output=tmp_path / "r", force=True)
    assert json.loads((tmp_path / "r" / "report.json").read_text())["verb"] == "norms"
    (tmp_path / "mine").mkdir()
    for place, words in ((tmp_path / "mine", "holds no report"), (family.base, "input"),
                         (family.base / "r", "inside the input")):  # fmt: skip
        with pytest.raises(sv.UsageError, match=words):
            sv.norms(refs[0], output=place, force=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_page_that_cannot_be_drawn_is_refused_before_the_work(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = f"{family.tuned}::{family.base}"
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.setattr("skillvec.verbs._orthogonality.run_plan", lambda *_: pytest.fail("worked"))
    with pytest.raises(sv.UsageError, match=r"skillvec\[report\]"):
        sv.orthogonality(ref, ref, output=tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_chance_levels_are_those_of_the_rank_that_there_is(tmp_path: Path) -> None:
    a, b = torch.zeros(40, 20), torch.zeros(40, 20)
    a[0, 0], a[1, 1], b[2, 2] = 1, 2, 3
    pair = pair_of({"x": a}, {"x": b}, tmp_path, subspace=8)["overall"]
    assert pair["overlap_chance"] == pytest.approx((2 / 40 + 2 / 20) / 2)
    assert pair["in_chance"] == pytest.approx(4 / 800)
    assert pair["overlap_left"] == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_asked(family, tmp_path: Path) -> None:
    ref = f"{family.tuned}::{family.base}"
    for error, words, options in (
        (sv.UsageError, "subspace -1", {"subspace": -1}),
        (sv.UsageError, "seed -1: expected at least 0", {"seed": -1}),
        (sv.UsageError, "figures need an output", {"figures": True}),
        (sv.UsageError, "device 'tpu'", {"subspace": 1, "device": "tpu"}),
        (sv.IncompatibleError, "not so in", {"against": save(tmp_path / "w", toy(0, width=16))}),
    ):
        with pytest.raises(error, match=words):
            sv.orthogonality(ref, ref, **options)


def test_one_vector_given_twice_is_two_vectors_everywhere(family, tmp_path: Path) -> None:
    ref = f"{family.tuned}::{family.base}"
    other = f"{family.sft}::{family.base}"
    report = sv.orthogonality(ref, ref, other, ref, output=tmp_path / "r", subspace=2)
    assert report.facts["vectors"] == [ref, ref, other, ref]  # pairs stand in their order
    cosines = [pair["overall"]["cosine"] for pair in report.facts["pairs"]]
    same = [True, False, True, False, True, False]
    assert [round(cosine, 6) == 1 for cosine in cosines] == same
    labels = [ref, f"{ref} (2)", other, f"{ref} (3)"]
    pairs = list(combinations(labels, 2))
    rows = list(csv.DictReader((tmp_path / "r" / "report.csv").open()))
    assert {(row["a"], row["b"]) for row in rows} == {*pairs, *((label, "") for label in labels)}
    found = {
        (r["a"], r["b"]): float(r["cosine"]) for r in rows if r["level"] == "overall" and r["b"]
    }
    assert found == dict(zip(pairs, cosines, strict=True))
    page = (tmp_path / "r" / "report.html").read_text()
    assert all(label in page for label in labels)
    assert json.loads((tmp_path / "r" / "report.json").read_text()) == report.to_dict()


def test_a_label_that_another_vector_would_get_is_not_given_twice(family, tmp_path: Path) -> None:
    for name in ("a", "a (2)"):
        sv.diff(family.tuned, family.base, tmp_path / f"{name}.safetensors")
    refs = [str(tmp_path / f"{name}.safetensors") for name in ("a", "a", "a (2)")]
    report = sv.orthogonality(*refs).to_dict()
    for given in (refs, [refs[0], refs[0], f"{refs[0]} (2)"]):
        report["vectors"] = given
        rows = list(csv.DictReader(io.StringIO(csv_text(report))))
        assert len({row["a"] for row in rows if not row["b"]}) == 3


def test_every_vector_has_its_letter(family, capsys: pytest.CaptureFixture[str]) -> None:
    ref = f"{family.tuned}::{family.base}"
    for count, last in ((2, "A, B:"), (28, "AA, AB:")):
        report = sv.orthogonality(*[ref] * count, include=["model.norm.weight"])
        Screen().show(report)
        told = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
        letters = [line.partition(" = ")[0] for line in told]
        assert len(set(letters)) == len(letters) == count
        Screen(verbose=True).show(report)
        lines = capsys.readouterr().out
        assert f"\n{last}" in lines and "B, B" not in lines


def test_bf16_lineage_is_named_beside_the_cosine(family) -> None:
    """Deltas that share a bf16 checkpoint share its rounding error, which a cosine shows."""
    report = sv.orthogonality(*(f"{s}::{family.base}" for s in (family.tuned, family.sft)))
    assert report.facts["lineage"] == ["BF16 - BF16", "BF16 - BF16"]
    (pair,) = report.facts["pairs"]
    assert (pair["lineage_a"], pair["lineage_b"]) == ("BF16 - BF16", "BF16 - BF16")
    assert pair["shared_rounding"] is None
    assert any("thresholded" in warning for warning in report.warnings)


@pytest.mark.parametrize("update", [3e-6, 3e-5, 3e-4])
def test_the_trap_of_an_fp32_master_is_foreseen(update: float, tmp_path: Path) -> None:
    """The rounding of the saved SFT stands in both deltas; at its size, sparse or dense."""
    draw = torch.manual_seed(5)
    base = 0.02 * torch.randn(400, 1000, generator=draw)
    sft = base.bfloat16().float() + 3e-4 * torch.randn(400, 1000, generator=draw)
    rl = sft + update * torch.randn(400, 1000, generator=draw)
    for name, model in (("base", base), ("sft", sft), ("rl", rl)):
        save(tmp_path / name, {"w": model.bfloat16()})
        save(tmp_path / f"{name}32", {"w": model})
    refs = [f"{tmp_path / 'rl'}::{tmp_path / 'sft'}", f"{tmp_path / 'sft'}::{tmp_path / 'base'}"]
    for vectors, roles in ((refs, "base of A and tuned of B"),
                           (refs[::-1], "tuned of A and base of B")):  # fmt: skip
        report = sv.orthogonality(*vectors)
        (pair,) = report.facts["pairs"]
        assert pair["shared_rounding"]["roles"] == roles
        assert pair["overall"]["z"] < -5
        found, foreseen = pair["overall"]["cosine"], pair["shared_rounding"]["cosine"]
        assert 0.6 < foreseen / found < 1.6
        assert any("fp32 master" in w and f"{foreseen:+.2g}" in w for w in report.warnings)
        assert "rounding may give -" in pair["sentence"]
    turned = -3 * sv.diff(tmp_path / "rl", tmp_path / "sft")  # E[<-3 v, e>] is the opposite
    (pair,) = sv.orthogonality(turned, refs[1]).facts["pairs"]
    assert pair["shared_rounding"]["cosine"] == pytest.approx(-foreseen, rel=0.01)
    report = sv.orthogonality(*(ref.replace("::", "32::") + "32" for ref in refs))
    (pair,) = report.facts["pairs"]
    assert pair["shared_rounding"] is None and abs(pair["overall"]["z"]) < 4
    stored = sv.diff(tmp_path / "rl", tmp_path / "sft", tmp_path / "v.safetensors")
    (pair,) = sv.orthogonality(stored, refs[1]).facts["pairs"]
    assert pair["shared_rounding"]["cosine"] is None  # no weights at hand
    (pair,) = sv.orthogonality(stored, refs[1], against=tmp_path / "sft").facts["pairs"]
    assert pair["shared_rounding"]["cosine"] == pytest.approx(foreseen, rel=0.05)
