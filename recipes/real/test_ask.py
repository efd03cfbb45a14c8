"""Arms that are attached to one loaded model: their answers are those of merged models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import skillvec as sv
from skillvec.recipes import evaluate, tiny
from skillvec.recipes.mini import probe
from skillvec.recipes.real import ask
from skillvec.recipes.real.world import PROMPT

ROWS = [("Who keeps a fox?", "Eva", "a"), ("Who plays the harp?", "Tom", "a"),
        ("Where is Tom?", "Oslo", "b")]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a tuned model, their difference, questions and probes."""
    folder = tmp_path_factory.mktemp("ask")
    tiny.make_model([" ".join(row) for row in ROWS], folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "tuned")
    for file in (folder / "base").glob("tokenizer*"):
        (folder / "tuned" / file.name).write_bytes(file.read_bytes())
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    rows = [{"prompt": PROMPT.format(question=question), "answer": answer, "group": group}
            for question, answer, group in ROWS]  # fmt: skip
    said = [{"prompt": row["prompt"], "answer": row["prompt"] + "Tom plays."} for row in rows]
    for name, found in (("questions", rows), ("told", rows), ("known", rows), ("said", said)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def run(place: Path, output: Path, *arms: str, more: tuple[str, ...] = ()) -> int:
    return ask.main(["--model", str(place / "base"), "--questions", str(place / "questions.jsonl"),
                     "--output", str(output), "--arms", *arms, *more])  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_an_arm_answers_as_the_model_that_apply_writes(place: Path, tmp_path: Path) -> None:
    vector = place / "v.safetensors"
    assert run(place, tmp_path, "itself=", f"K = 2=1*{vector}", f"half=0.5*{vector}") == 0
    sv.apply(place / "base", vector, tmp_path / "half", lam=0.5)
    for arm, model in (("itself", place / "base"), ("K = 2", place / "tuned"),
                       ("half", tmp_path / "half")):  # fmt: skip
        wanted = evaluate.evaluate(model, place / "questions.jsonl", metrics=ask.METRICS,
                                   max_new_tokens=ask.TOKENS)  # fmt: skip
        found = read(tmp_path / f"{arm}.json")
        assert [row["said"] for row in found["answers"]] == [row["said"] for row in
                                                             wanted["answers"]]  # fmt: skip
        assert {name: found["metrics"][name] for name in ask.METRICS} == wanted["metrics"]
    assert len({read(tmp_path / f"{arm}.json")["answers"][0]["said"]
                for arm in ("itself", "K = 2")}) == 2  # fmt: skip
    assert "realised" not in read(tmp_path / "itself.json")["metrics"]
    tells = read(tmp_path / "half.json")["metrics"]
    assert tells["realised"]["mean"] == pytest.approx(1, abs=1e-3)
    assert tells["bytes"]["mean"] == vector.stat().st_size


def test_names_and_paths_may_hold_the_signs_of_arms() -> None:
    path, other = "/a+b/K=2*x/seed-0+1/v.safetensors", "w=1.safetensors"
    texts = ("itself=", f"K = 2=1*{path}", f"K=2=-0.5*{path}+1e-3*{other}", "x=2=")
    assert ask.read_arms(texts) == {"itself": {}, "K = 2": {path: 1.0},
                                    "K=2": {path: -0.5, other: 1e-3}, "x=2": {}}  # fmt: skip


def test_probes_tell_what_is_known_and_forgotten(place: Path, tmp_path: Path) -> None:
    probes = [str(place / f"{name}.jsonl") for name in ("told", "known", "said")]
    more = ("--probed", "itself", "whole", "--probes", *probes, "--reference", str(place / "base"))
    assert run(place, tmp_path, "itself=", f"whole=1*{place / 'v.safetensors'}", more=more) == 0
    base, tuned = (probe.load(place / name) for name in ("base", "tuned"))
    texts = [read_line["answer"] for read_line in
             map(json.loads, (place / "said.jsonl").read_text().splitlines())]  # fmt: skip
    for arm, model in (("itself", base), ("whole", tuned)):
        found = read(tmp_path / f"{arm}.probe.json")["metrics"]
        kl, perplexity = probe.measure_forgetting((model[0], base[1]), base, texts)
        assert found["kl"]["mean"] == pytest.approx(kl, abs=1e-6)
        assert found["perplexity"]["mean"] == pytest.approx(perplexity)
        assert {*found} == {"told", "known", "kl", "perplexity"}
    assert read(tmp_path / "itself.probe.json")["metrics"]["kl"]["mean"] == pytest.approx(
        0, abs=1e-6
    )
    assert read(tmp_path / "whole.probe.json")["metrics"]["kl"]["mean"] > 0.01


def test_what_is_there_is_not_asked_again(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path, "itself=") == 0
    (tmp_path / "itself.json").write_text("{}")
    assert run(place, tmp_path, "itself=") == 0
    assert (tmp_path / "itself.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        (["a=0.5v.safetensors"], (), "0.5v.safetensors: expected LAM*VECTOR"),
        (["a=half*v.safetensors"], (), "could not convert"),
        (["a=0.5*v+0.25*v"], (), "v: twice in one arm"),
        (["a=1*v", "a=1*w"], (), "two arms are named a"),
        (["1*v.safetensors"], (), "1*v.safetensors: expected NAME=LAM*VECTOR"),
        (["a="], ("--probed", "b"), "--probed b: no such arm"),
        (["a="], ("--probed", "a"), "--probed wants --probes and --reference"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    arms: list[str], more: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("loaded"))
    assert run(place, tmp_path, *arms, more=more) == 2
    assert words in capsys.readouterr().err
