"""What Python and a notebook show: one line and a small table, whatever the size and the names."""

import json
import pickle
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import perturbed, save, toy
from loaded import module_of
from safetensors.numpy import save_file

import skillvec as sv
from skillvec.analysis import page
from skillvec.errors import UsageError
from skillvec.report import Folded, Rows
from skillvec.trials.scores import score_of
from skillvec.vectors.manifest import encode_manifest
from skillvec.verbs import notebook
from skillvec.verbs.notebook import find_figure
from skillvec.verbs.reprs import cut, write_repr

EVIL = "<script>alert(1)</script>"
EVIL_FOLDER = "<img src=x onerror=alert(1)>\x1b[2J\n&amp;"  # a name of a folder has no slash
MANY = 600
LONGEST = 330  # characters of a line
CONFIG = {"model_type": "llama", "hidden_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two tuned models, and the vector of one of them."""
    place = tmp_path_factory.mktemp("shown")
    base = toy(0)
    for name, tensors in {"base": base, "rl": perturbed(base, 1, density=0.3),
                          "sft": perturbed(base, 2)}.items():  # fmt: skip
        save(place / name, tensors, config=CONFIG)
    sv.diff(place / "rl", place / "base", place / "v.safetensors", method="grpo")
    return place


@pytest.fixture(scope="module")
def v(folder: Path) -> sv.SkillVector:
    return sv.SkillVector.open(folder / "v.safetensors")


@pytest.fixture(scope="module")
def w(folder: Path) -> sv.SkillVector:
    return sv.diff(folder / "sft", folder / "base")


@pytest.fixture(scope="module")
def compared(v: sv.SkillVector, w: sv.SkillVector) -> sv.Report:
    return sv.orthogonality(v, w, control="random")


def line_of(held: object) -> str:
    said = repr(held)
    assert "\n" not in said and said.isprintable() and len(said) <= LONGEST, said
    return said


class Seen(HTMLParser):
    """Tags, attributes and text of a fragment; every tag has to end."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text, self._open = "", list[str]()
        self.feed(fragment)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def html_of(held: Any) -> Seen:
    """Return what a fragment holds; it may run, load and paint nothing."""
    fragment = held._repr_html_()
    seen = Seen(fragment)
    known = {"div", "table", "tr", "th", "td", "img", "br", "svg", "rect", "title"}
    assert {*seen.tags} <= known
    inheriting = re.findall("<table style=[^>]*color:inherit", fragment)  # else black on black
    assert len(inheriting) == seen.tags.count("table")
    for name, value in seen.attributes:
        assert not name.startswith("on")
        assert name != "href" and (name != "src" or value.startswith("data:image/svg+xml;base64,"))
        if name == "style":
            colours = re.findall(r"(?:^|;)(?:color|background|fill):([^;]+)", value)
            assert {*colours} <= {"inherit", "none", "#fff"}  # #fff is the paper of a picture
    return seen


# ----------------------------------------------------------------------------------------- vectors


def test_a_stored_vector_says_its_models_size_dtypes_and_that_it_is_exact(
    v: sv.SkillVector, folder: Path
) -> None:
    said = line_of(v)
    size = f"{v.stored.nbytes / 1000:.3g} kB"  # type: ignore[attr-defined]
    for word in ("SkillVector", cut(folder / "v.safetensors"), cut(folder / "rl"),
                 f"- {cut(folder / 'base')}", "BF16 - BF16", "11 tensors", "5.5 K values",
                 "% changed", size, "exact"):  # fmt: skip
        assert word in said, word
    assert str(v) == said


def test_what_is_not_stored_says_so_and_how_it_is_made(
    v: sv.SkillVector, w: sv.SkillVector, folder: Path
) -> None:
    assert line_of(w).endswith(": BF16 - BF16, 11 tensors, 5.5 K values, not stored, exact>")
    rounded = sv.diff(folder / "sft", folder / "base", dtype="bf16")
    assert line_of(rounded).endswith("not stored, rounded to bf16>")
    names = [cut(ref, 32) for ref in (v.ref, w.ref)]
    assert f"SkillVector 0.5 * {names[0]} - 2 * {names[1]}:" in line_of(0.5 * v - 2 * w)
    assert f"SkillVector 3 * ({names[0]} + {names[1]}):" in line_of(3 * (v + w))
    assert f"SkillVector {names[0]} + {names[0]} + {names[1]} + 2 more:" in line_of(
        sum([v, v, w, w, v])
    )
    ties = sv.combine(v, w, op="ties", parameters={"density": 0.5})
    assert f"SkillVector ties of {names[0]}, {names[1]}:" in line_of(ties)


def test_a_factor_is_shown_and_no_multiple_is_called_exact(v: sv.SkillVector) -> None:
    said = line_of(-2 * v)
    assert said.startswith("<SkillVector -2 * ") and "exact" not in said
    told = "restores tunedexact"
    assert told not in html_of(-2 * v).text and told in html_of(v).text


def test_a_lossy_copy_says_that_it_is_lossy(v: sv.SkillVector, tmp_path: Path) -> None:
    coarse = sv.combine(v, op="coarsen", parameters={"bits": 4})
    assert line_of(coarse).endswith("not stored, lossy>")
    stored = coarse.save(tmp_path / "c.safetensors")
    assert line_of(stored).endswith(", lossy>") and "coarsen of 1 vector" in line_of(stored)
    kept = replace(stored, manifest=stored.manifest | {"kept": 0.5})
    assert line_of(kept).endswith("lossy, keeps 50 % of the squared norm>")


def test_an_adapter_and_a_patch_say_what_they_are(v: sv.SkillVector, folder: Path) -> None:
    place = folder / "adapter"
    place.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": np.ones((2, 24), np.float32), "lora_B": np.ones((24, 2), np.float32)}
    save_file({f"{stem}.{key}.weight": value for key, value in factors.items()},
              place / "adapter_model.safetensors")  # fmt: skip
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(said))
    lone = sv.SkillVector.open(place)
    assert line_of(lone) == f"<SkillVector adapter {cut(place)}: adds to the model that it meets>"
    assert "those of the model that it meets" in html_of(lone).text
    on = sv.SkillVector.between(place, folder / "base")
    assert f"adapter {cut(place)} on {cut(folder / 'base')}: " in line_of(on)
    assert f"(adapter on {cut(folder / 'base')})" in line_of(on.save(folder / "lora.safetensors"))
    sv.export_patch(v, folder / "patch.safetensors")
    patch = sv.SkillVector.patched(folder / "patch.safetensors", folder / "base")
    assert f"patch {cut(folder / 'patch.safetensors')} of {cut(folder / 'base')}" in line_of(patch)
    for vector in (on, patch):
        html_of(vector)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> sv.SkillVector:
    """A vector of thousands of tensors, in folders and layers with names that are markup."""
    place = tmp_path_factory.mktemp("large") / EVIL_FOLDER
    for name, step in {"base": 0, "rl": 1}.items():
        (place / name).mkdir(parents=True)
        tensors = {f"model.{EVIL}.{i // 20}.w{i % 20}": np.full((1, 2), i + step, np.float32)
                   for i in range(MANY)}  # fmt: skip
        save_file(tensors, place / name / "model.safetensors")
    return sv.diff(place / "rl", place / "base", place / "v.safetensors", notes=f"{EVIL}\x1b[2J",
                   workers=1)  # fmt: skip


def test_thousands_of_tensors_and_evil_names_are_one_line_and_a_small_table(
    large: sv.SkillVector,
) -> None:
    assert f"{MANY} tensors" in line_of(large)
    for held in (large + large, large.manifest, large.report, sv.norms(large),
                 sv.open_checkpoint(large.manifest["base"]["ref"])):  # fmt: skip
        line_of(held)
        html_of(held)
    seen = html_of(large)
    assert EVIL in seen.text and "\x1b" not in seen.text  # as text: no tag of that name
    assert len(large._repr_html_()) < 40_000
    assert len(large.report._repr_html_()) < 40_000
    assert seen.tags.count("rect") == MANY // 20


def test_the_bars_are_norms_by_layer(v: sv.SkillVector) -> None:
    seen = html_of(v)
    assert seen.tags.count("rect") == 3  # two layers, and what is in none
    heights = [float(value) for name, value in seen.attributes if name == "height"][1:]
    entries = v.manifest["tensors"]
    norms = [sum(e["norm"] ** 2 for n, e in entries.items() if f"layers.{i}." in n) ** 0.5
             for i in (0, 1)]  # fmt: skip
    assert f"model.layers.0: {norms[0]:.4g}" in seen.text
    assert heights[2] / heights[1] == pytest.approx(norms[1] / norms[0], rel=0.01)
    assert f"{2 * norms[0]:.4g}" in html_of(2 * v).text
    assert "svg" not in html_of(v + v).tags  # whose norms are not known


def test_a_cell_says_what_the_manifest_says(v: sv.SkillVector, folder: Path) -> None:
    text = html_of(v).text
    for word in ("grpo", f"{folder / 'rl'} (llama, BF16)", str(folder / "v.safetensors"), "packed"):
        assert word in text, word


# ----------------------------------------------------------------------------------- what else is


def test_a_manifest_is_the_same_data_and_one_line(v: sv.SkillVector) -> None:
    manifest = v.manifest
    assert line_of(manifest) == (
        f"<Manifest of tuned - base, schema 1, 11 tensors, bitwise; a dict of {len(manifest)} keys>"
    )
    assert isinstance(manifest, dict) and manifest == dict(manifest)
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert json.loads(json.dumps(manifest)) == manifest
    stored = v.stored.manifest  # type: ignore[attr-defined]
    assert encode_manifest(manifest) == encode_manifest(stored)
    assert "11 keys" in html_of(manifest).text


def test_a_checkpoint_says_what_it_holds(folder: Path, tmp_path: Path) -> None:
    model = sv.open_checkpoint(folder / "base")
    assert line_of(model) == (
        f"<Checkpoint {cut(folder / 'base')}: llama, 11 tensors, 5.5 K values, BF16, 11 kB,"
        " safetensors>"
    )
    assert "llama" in html_of(model).text
    mixed = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    said = line_of(sv.open_checkpoint(save(tmp_path / "mixed", mixed)))
    assert "1 BF16, 1 F32" in said and "llama" not in said


def test_rows_of_a_report_are_one_line() -> None:
    rows = Rows(MANY, lambda i: {"name": str(i)})
    assert line_of(rows) == f"<Rows: {MANY} lines; list(rows) has them as dicts>"


def test_a_score_does_not_show_its_values() -> None:
    said = line_of(score_of([0.0, 1.0] * MANY))
    assert "mean=0.5" in said and "values" not in said


def test_what_is_attached_to_a_model_says_so(v: sv.SkillVector) -> None:
    model = module_of({"w": torch.zeros(2)})
    live = sv.Live(model)
    assert line_of(live) == "<Live Module: nothing attached>"


def test_what_is_attached_names_vector_and_lambda(v: sv.SkillVector, w: sv.SkillVector) -> None:
    model = module_of(toy(0))
    with sv.attach(model, v, lam=0.25) as live:
        assert line_of(live) == f"<Live {type(model).__name__}: 0.25 * {cut(v.ref)}>"
        assert "realised gain" in html_of(live.report).text
        assert line_of(live.report).startswith("<Report of attach: ")
        live.set(v, w, lam=(1.0, 2.0))
        assert f"1 * {cut(v.ref)} + 2 * " in line_of(live)
    assert "nothing attached" in line_of(live)


def test_what_is_of_no_known_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="int"):
        write_repr(1)
    with pytest.raises(TypeError, match="int"):
        notebook.write_html(1)


@pytest.mark.parametrize(("text", "most", "said"), [
    ("short", 10, "short"), ("0123456789abcdef", 10, "012…abcdef"[:3] + "…" + "abcdef"),
    ("/models/rl::/models/base-of-them", 24, "/models/rl::/mod…of-them"),
    ("/a/long/path/to/rl::/b/sft", 24, "/a/lo…path/to/rl::/b/sft"),
    ("two\n  lines\t", 20, "two lines"), ("\x1b[2J", 20, r"\x1b[2J"),
])  # fmt: skip
def test_text_is_cut_in_its_middle(text: str, most: int, said: str) -> None:
    assert cut(text, most) == said and len(said) <= most


# ----------------------------------------------------------------------------------------- reports


def test_a_report_says_verb_numbers_counts_and_place(v: sv.SkillVector, folder: Path) -> None:
    report = sv.diff(folder / "rl", folder / "base", folder / "again.safetensors").report
    said = line_of(report)
    for word in ("Report of diff:", "norm ", "28.1 % changed", "10 delta, 1 unchanged",
                 f"in {cut(folder / 'again.safetensors')}"):  # fmt: skip
        assert word in said, word
    assert "base + 1 * v is tuned, bit for bit" in html_of(report).text
    report.warnings.append(f"take care: {EVIL}")
    assert line_of(report).endswith(", 1 warning>")
    assert f"warning: take care: {EVIL}" in html_of(report).text
    applied = sv.apply(folder / "sft", v, folder / "merged", lam=0.5)
    assert "same family, realised gain " in line_of(applied)
    assert "; realised gain " in html_of(applied).text
    assert "holds" in line_of(sv.verify(folder / "merged"))
    assert "holds" in html_of(sv.verify(folder / "merged")).text


def test_a_plan_and_an_empty_report_show_themselves(v: sv.SkillVector, folder: Path) -> None:
    plan = sv.apply(folder / "sft", v, folder / "planned", dry_run=True)
    assert line_of(plan).startswith("<Report of apply, a dry run: ")
    assert "dry run" not in line_of(sv.apply(folder / "sft", v, folder / "planned"))
    assert "11 applied" in line_of(plan) and "reads " in html_of(plan).text
    assert line_of(sv.Report("mine")) == "<Report of mine: nothing yet>"
    mine = sv.Report("mine", {"x": EVIL, "many": list(range(99))})
    assert EVIL in html_of(mine).text and "99 items" in html_of(mine).text


def test_a_comparison_shows_its_answer_its_map_and_its_numbers(compared: sv.Report) -> None:
    (pair,) = compared.facts["pairs"]
    cosine = f"{pair['overall']['cosine']:+.4f}"
    assert f"2 vectors, cosine {cosine}, control random, 11 compared" in line_of(compared)
    assert line_of(compared).count("cosine") == 1
    seen = html_of(compared)
    words = " ".join(seen.text.split())
    assert f"their cosine is {cosine}, where chance alone gives ±" in words
    assert "as by chance" in seen.text and "facts and ledger hold all numbers" in words
    assert not re.search(r"(^|\s)(-v|-o|--json)\s", words)  # options of the terminal
    ((_, source),) = [one for one in seen.attributes if one[0] == "src"]
    drawn = b64decode(source.partition(",")[2]).decode()
    assert seen.tags.count("table") == 1
    assert drawn.startswith("<svg") and "<script" not in drawn and "q_proj" in drawn


def test_norms_show_the_map_of_the_vector(v: sv.SkillVector) -> None:
    report = sv.norms(v)
    assert line_of(report).startswith(f"<Report of norms: {cut(v.ref)}, norm ")
    figure = find_figure(report)
    assert figure is not None and figure.spec["name"] == "cells"


def test_cosines_of_several_pairs_are_shown_as_a_range() -> None:
    entry: dict[str, Any] = {"label": "a", "overall": {}}
    pairs = [{"overall": {"cosine": cosine}} for cosine in (0.5, None, -0.25)]
    report = sv.Report("orthogonality", {"norms": [entry] * 3, "pairs": pairs})
    assert "3 vectors, cosines -0.2500 to +0.5000" in repr(report)
    nothing = sv.Report("orthogonality", {"norms": [entry] * 2, "pairs": pairs[1:2]})
    assert "2 vectors, cosine unknown" in repr(nothing)


def test_without_the_package_that_draws_a_sentence_says_which(
    compared: sv.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UsageError("the page needs vl_convert, which is not installed: pip install X")

    monkeypatch.setattr(page, "check_available", missing)
    seen = html_of(compared)
    assert "img" not in seen.tags and "pip install X" in seen.text and "cosine" in seen.text


def test_a_picture_that_is_too_large_is_left_to_the_page(
    compared: sv.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "MOST_SVG_NBYTES", 100)
    seen = html_of(compared)
    assert "img" not in seen.tags and "too large" in seen.text


def test_long_tables_end_with_a_count(v: sv.SkillVector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "MOST_ROWS", 2)
    monkeypatch.setattr(notebook, "_picture", lambda report: "")
    assert "and 6 more rows" in html_of(sv.norms(v)).text
    text = html_of(sv.inspect(v.ref)).text
    assert "and 3 more tensors" in text and "--json has all" not in text


def test_sweeps_and_searches_say_what_they_found() -> None:
    best = {"lam": 0.75, "scores": {"acc": {"mean": 0.625}}}
    facts = {"metric": "acc", "points": [{}] * 9, "best": best, "found": True,
             "target_score": 0.5, "output": "curve"}  # fmt: skip
    said = line_of(sv.Report("sweep", facts))
    assert "acc at 9 points, best 0.625 at lambda 0.75, better than the target's 0.5, in" in said
    assert "not clearly better" in line_of(sv.Report("sweep", facts | {"found": False}))
    assert "none could be compared" in line_of(sv.Report("sweep", facts | {"best": None}))
    trials = {"metric": "acc", "trials": {"complete": 50, "failed": 0}, "verdict": "found"}
    assert "acc in 50 trials, a better recipe found" in line_of(sv.Report("search", trials))
    nothing = sv.Report("search", trials | {"verdict": "nothing"})
    assert "nothing beyond noise found" in line_of(nothing)


def test_a_folded_dict_without_a_formula_is_shown_all_the_same() -> None:
    assert line_of(Folded()) == "<Manifest of no formula, schema None; a dict of 0 keys>"
