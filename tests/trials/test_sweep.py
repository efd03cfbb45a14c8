"""Sweeps over a planted optimum: what is found, what is written, what goes on after an end."""

import csv
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import load, perturbed, save
from planted import Peak, Planted, plain, plant

import skillvec as sv
from skillvec.analysis import sweep_page
from skillvec.analysis.sweep_sentences import list_answers
from skillvec.errors import IncompatibleError, SkillvecError, UsageError

LAM = "-0.5:1.5:0.5"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    found = plant(tmp_path_factory.mktemp("planted"))
    gc.freeze()  # a sweep collects garbage at its end, which takes long where tests left much
    yield found
    gc.unfreeze()


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw no page, which takes longer than a sweep here, but where a test is about it."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(sweep_page, "html", lambda content: "a page")
        monkeypatch.setattr(sweep_page, "figures", lambda content: [("curve.svg", b"a curve")])
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield


@pytest.fixture
def draws() -> None:
    """Let a test draw the page."""


class Lines:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.tried_lines: list[str] = []
        self.plans: list[dict[str, Any]] = []

    def planned(self, report: sv.Report) -> None:
        self.plans.append(dict(report.facts))

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        """Nothing is read here that takes long."""

    def tried(self, line: str) -> None:
        self.tried_lines.append(line)


def run(planted: Planted, evaluator: Peak, output: Path, **options: Any) -> sv.Report:
    given = {"lam": LAM, "workers": 1} | options
    return sv.sweep(planted.target, planted.skill, eval=evaluator, output=output, **given)


def at(report: sv.Report, curve: str, lam: float) -> dict[str, Any]:
    points = report.facts["points"]
    return next(row for row in points if (row["curve"], row["lam"]) == (curve, lam))


# ------------------------------------------------------------------------------------ what is found


def test_the_planted_lambda_is_found_and_controls_stay(planted: Planted, tmp_path: Path) -> None:
    evaluator, watcher = Peak(planted, peak=1.0), Lines()
    report = run(planted, evaluator, tmp_path / "out", control="random,shuffled", watcher=watcher)
    facts = report.facts
    assert evaluator.calls[:5] == [0, -0.5, 0.5, 1, 1.5] and len(evaluator.calls) == 13
    assert all(abs(lam) < 0.3 for lam in evaluator.calls[5:])  # controls: the skill is not in them
    assert facts["found"] and facts["best"]["lam"] == 1 and facts["compared"] == 4
    assert facts["metric"] == "score" and not facts["less_is_better"]
    assert facts["best"]["difference"] == pytest.approx(1, abs=0.1)
    assert facts["best"]["low"] < 1 < facts["best"]["high"] and facts["best"]["is_paired"]
    assert [one["control"] for one in facts["beside"]] == ["random", "shuffled"]
    assert all(one["beaten"] and one["low"] > 0.5 for one in facts["beside"])
    for curve, lam in [("skill", 0.5), ("random", -0.5), ("shuffled", 1.5)]:
        point = at(report, curve, lam)
        assert point["gain"] == pytest.approx(1, abs=1e-3) and point["changed"] > 5000
    assert at(report, "target", 0)["gain"] is None and facts["failed"] == []
    assert len(watcher.tried_lines) == 13 and facts["planned"] == 13
    assert re.match(r"4 of 13: lambda 1: score \d\.\d+ ± [\d.]+ \(.* left\)$",
                    watcher.tried_lines[3])  # fmt: skip
    assert watcher.plans[0]["lam"] == [-0.5, 0, 0.5, 1, 1.5]


def test_noise_is_called_nothing(planted: Planted, tmp_path: Path) -> None:
    report = run(planted, Peak(planted, height=0, seed=3), tmp_path / "out")
    said = list_answers(report.facts)
    assert not report.facts["found"] and said[0].startswith("Nothing was found: score of the best")
    assert len(said) == 1  # nothing is optimistic about it


def test_less_may_be_better(planted: Planted, tmp_path: Path) -> None:
    evaluator = Peak(planted, peak=0.5)
    report = run(planted, evaluator, tmp_path / "out", metric="loss")
    assert report.facts["less_is_better"] and report.facts["best"]["lam"] == 0.5
    assert list_answers(report.facts)[0].startswith("loss (less is better) falls from ")
    # the same points, whose scores are all in the journal, with another question
    other = run(planted, evaluator, tmp_path / "out", minimize="score")
    assert other.facts["best"]["lam"] == 1.5 and other.facts["resumed"] == 5
    assert other.facts["found"] and other.facts["best"]["difference"] < 0
    assert len(evaluator.calls) == 5


def test_a_metric_that_is_not_there_cannot_be_minimized(planted: Planted, tmp_path: Path) -> None:
    evaluator = Peak(planted)
    with pytest.raises(UsageError, match=r"metric 'scores': .* did you mean score"):
        run(planted, evaluator, tmp_path / "out", minimize="scores")
    evaluator.metrics = None
    with pytest.raises(UsageError, match="metric nope: the evaluation gives score, loss"):
        run(planted, evaluator, tmp_path / "out", minimize=["score", "nope"])
    assert evaluator.calls == [0.0]


def test_several_vectors_are_one_combination(planted: Planted, tmp_path: Path) -> None:
    evaluator = Peak(planted)
    sv.sweep(planted.target, planted.skill, planted.other, eval=evaluator, lam="1,2",
             weights=[0.5, -1e-6], control="random", output=tmp_path / "out")  # fmt: skip
    assert evaluator.calls[:3] == [0, 0.5, 1] and len(evaluator.calls) == 5


# ---------------------------------------------------------------------------------- what is written


def test_json_and_csv_hold_every_point(planted: Planted, tmp_path: Path) -> None:
    report = run(planted, Peak(planted), tmp_path / "out", control=("random",))
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    rows = list(csv.DictReader((tmp_path / "out" / "points.csv").open()))
    assert [(row["curve"], float(row["lam"])) for row in rows] == [
        (point["curve"], point["lam"]) for point in report.facts["points"]
    ]
    best = next(row for row in rows if (row["curve"], row["lam"]) == ("skill", "0.5"))
    point = at(report, "skill", 0.5)
    assert float(best["score"]) == point["scores"]["score"]["mean"]
    assert float(best["loss standard error"]) == point["scores"]["loss"]["standard_error"]
    assert float(best["low"]) == point["low"] and float(best["p"]) == point["p"]
    assert (tmp_path / "out" / "index.html").read_text() == "a page"


@pytest.mark.usefixtures("draws")
def test_without_the_extra_numbers_are_written_all_the_same(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    (tmp_path / "out").mkdir()
    report = run(planted, Peak(planted), tmp_path / "out", lam=1)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "journal.jsonl", "points.csv", "report.json",
    }  # fmt: skip
    assert "written without it" in report.warnings[-1] and "skillvec[report]" in report.warnings[-1]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["warnings"] == report.warnings


# ------------------------------------------------------------------------------------- going on


def test_a_sweep_that_was_cut_off_goes_on(planted: Planted, tmp_path: Path) -> None:
    whole = run(planted, Peak(planted), tmp_path / "whole", control="shuffled")
    evaluator = Peak(planted)
    evaluator.fails[1.0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt, match=r"3 of 9 points are done; the same command goes"):
        run(planted, evaluator, tmp_path / "out", control="shuffled")
    assert not (tmp_path / "out" / "report.json").exists()
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])  # the power fails too: the last line is cut
    evaluator.fails.clear()
    evaluator.calls.clear()
    report = run(planted, evaluator, tmp_path / "out", control="shuffled")
    assert evaluator.calls[:3] == [0.5, 1, 1.5] and len(evaluator.calls) == 7
    assert report.facts["resumed"] == 2
    assert plain(report.facts["points"]) == plain(whole.facts["points"])
    for key in whole.facts.keys() - {"points", "resumed", "output", "load_seconds", "best"}:
        assert report.facts[key] == whole.facts[key], key
    more = run(planted, evaluator, tmp_path / "out", lam="0.25,0.5")  # other lambdas join in
    assert evaluator.calls[7:] == [0.25] and more.facts["resumed"] == 2


def test_another_question_is_refused_by_name(planted: Planted, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(planted, Peak(planted), output, lam=1)
    for options, what in (
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"rounding": "stochastic"}, "rounding:"),
        ({"exclude": ["*norm*"]}, "exclude:"),
        ({"weights": [2.0]}, "vector:"),
    ):
        with pytest.raises(UsageError, match=what):
            run(planted, Peak(planted), output, lam=1, **options)
    with pytest.raises(UsageError, match="eval:"):
        run(planted, Peak(planted, seed=1), output, lam=1)
    with pytest.raises(UsageError, match="vector:"):
        sv.sweep(planted.target, planted.other, eval=Peak(planted), output=output, lam=1)
    with pytest.raises(UsageError, match="target:"):
        sv.sweep(planted.target.parent / "skill_tuned", planted.skill, eval=Peak(planted),
                 output=output, lam=1)  # fmt: skip
    anew = run(planted, Peak(planted, seed=1), output, lam=1, force=True)
    assert anew.facts["resumed"] == 0


# ------------------------------------------------------------------------------- what goes wrong


def test_a_point_that_fails_is_marked_and_tried_again(planted: Planted, tmp_path: Path) -> None:
    evaluator, watcher = Peak(planted, peak=1), Lines()
    evaluator.fails[0.5] = RuntimeError("the judge is away")
    report = run(planted, evaluator, tmp_path / "out", watcher=watcher)
    assert report.facts["failed"] == ["lambda 0.5"] and report.facts["compared"] == 3
    failed = at(report, "skill", 0.5)
    assert (failed["status"], failed["scores"], failed.get("p")) == ("failed", {}, None)
    assert "the judge is away" in failed["message"]
    assert "3 of 5: lambda 0.5: failed: RuntimeError: the judge is away" in watcher.tried_lines[2]
    assert "1 point failed: lambda 0.5; the same command tries them again." in (
        list_answers(report.facts))  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "points.csv").open()))
    assert [row["status"] for row in rows] == ["done", "done", "failed", "done", "done"]
    evaluator.fails.clear()
    again = run(planted, evaluator, tmp_path / "out")
    assert evaluator.calls[5:] == [0.5] and again.facts["failed"] == []


def test_a_target_that_cannot_be_evaluated_ends_it(planted: Planted, tmp_path: Path) -> None:
    evaluator = Peak(planted)
    evaluator.fails[0.0] = ValueError("no items")
    with pytest.raises(SkillvecError, match=r"target itself cannot be evaluated \(failed\): Value"):
        run(planted, evaluator, tmp_path / "out")
    assert evaluator.calls == [0]


def test_what_cannot_be_is_said_before_the_model_loads(planted: Planted, tmp_path: Path) -> None:
    evaluator, output = Peak(planted), tmp_path / "out"
    for options, what in (
        ({"metric": "scor"}, "metric 'scor'.*did you mean score"),
        ({"control": "rotated"}, "control 'rotated': expected random or shuffled"),
        ({"lam": "1:2"}, "lam '1:2'"),
        ({"weights": [1, 2]}, "1 vectors, but 2 weights"),
        ({"output": planted.target / "out"}, "lies inside of .*target, which is read"),
        ({"output": planted.skill}, "exists already, and is no folder"),
        ({"output": planted.target.parent / "skill_tuned"}, "exists already, and holds no sweep"),
        ({"output": "s3://bucket/out"}, "a folder of this disk"),
    ):
        with pytest.raises(UsageError, match=what):
            run(planted, evaluator, **{"output": output} | options)
    with pytest.raises(UsageError, match="expected at least one vector"):
        sv.sweep(planted.target, eval=evaluator, output=output)
    assert evaluator.calls == [] and not output.exists()
    evaluator.metrics = None  # what it gives is known when it was asked
    with pytest.raises(UsageError, match="metric scor: the evaluation gives score, loss"):
        run(planted, evaluator, output, metric="scor")
    assert evaluator.calls == [0]
    with pytest.raises(IncompatibleError, match="not a skill vector"):
        sv.sweep(planted.target, planted.target, eval=evaluator, output=output, force=True)
    tensors = load(planted.target)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    wrong = [save(tmp_path / name, perturbed(tensors, seed)) for seed, name in enumerate("ab")]
    with pytest.raises(IncompatibleError, match=r"lm_head\.weight"):  # before the target is asked
        sv.sweep(planted.target, f"{wrong[0]}::{wrong[1]}", eval=evaluator, output=output)
    assert evaluator.calls == [0]


def test_a_dry_run_evaluates_and_writes_nothing(planted: Planted, tmp_path: Path) -> None:
    evaluator, watcher = Peak(planted), Lines()
    report = run(planted, evaluator, tmp_path / "out", dry_run=True, watcher=watcher,
                 control="random")  # fmt: skip
    assert evaluator.calls == [] and not (tmp_path / "out").exists()
    assert (report.facts["planned"], len(watcher.plans)) == (9, 1)
    assert report.facts["target_nbytes"] > 4 * 5000


# ------------------------------------------------------------------------------ whole processes

SLOW_SCORE = """
import time, torch
def score(model, tokenizer):
    time.sleep(0.3)
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    return {"score": (weight.flatten()[:50] * 100).tolist()}
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "slow_score.py").write_text(SLOW_SCORE)
    words = ["-m", "skillvec", "sweep", str(planted.target), str(planted.skill), "--lam", LAM,
             "--eval", "slow_score:score", "--control", "random", "--json"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(sv.__file__).parents[1])])}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *words, "-o", name], cwd=tmp_path, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    journal, killed = tmp_path / "out" / "journal.jsonl", 0
    for least in (3, 6):  # twice, each time with points of its own
        process = start("out")
        while not journal.exists() or journal.read_bytes().count(b"\n") <= least:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2 and not (tmp_path / "out" / "report.json").exists()
    done = journal.read_bytes().count(b"\n") - 1
    reports = []
    for name in ("out", "whole"):
        said, errors = start(name).communicate()
        reports.append(json.loads(said))
        assert json.loads((tmp_path / name / "report.json").read_text()) == reports[-1], errors
    assert (reports[0]["resumed"], reports[1]["resumed"]) == (done, 0) and 6 <= done < 9
    assert plain(reports[0].pop("points")) == plain(reports[1].pop("points"))
    for key in reports[1].keys() - {"resumed", "output", "load_seconds", "best"}:
        assert reports[0][key] == reports[1][key], key


@pytest.mark.slow
def test_questions_are_scored_as_a_merged_folder_is(tmp_path: Path) -> None:
    from skillvec.recipes import evaluate, tiny

    texts = [f"the colour of item {n} is {['red', 'green', 'blue'][n % 3]}" for n in range(40)]
    for seed, name in enumerate(("target", "other")):
        tiny.make_model(texts, tmp_path / name, seed=seed)
    vector = tmp_path / "v.safetensors"
    sv.diff(tmp_path / "other", tmp_path / "target", vector)
    model, tokenizer = evaluate.load_model(str(tmp_path / "target"))
    asked = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 4, "batch": 8}
    told = evaluate.answer_all(prompts=texts, **asked)  # so that the target itself is always right
    rows = [{"prompt": text, "answer": said} for text, said in zip(texts, told, strict=True)]
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = sv.sweep(
        tmp_path / "target", vector, eval=f"evaluate:{data}", lam="0.05,0.2,1", metric="exact",
        eval_options={"max_new_tokens": 4, "batch": 8}, output=tmp_path / "out",
    )  # fmt: skip
    assert report.facts["target_score"] == 1 and not report.facts["found"]
    means = [row["scores"]["exact"]["mean"] for row in report.facts["points"]]
    assert 0 < means[2] < 1 > means[3]
    for row in report.facts["points"][1:]:
        merged, scores = tmp_path / f"merged_{row['lam']}", tmp_path / f"{row['lam']}.json"
        sv.apply(tmp_path / "target", vector, merged, lam=row["lam"])
        words = ["--model", merged, "--data", data, "--output", scores, "--max-new-tokens", 4,
                 "--batch", 8]  # fmt: skip
        assert evaluate.main([*map(str, words)]) == 0
        found = json.loads(scores.read_text())["metrics"]["exact"]
        assert (row["scores"]["exact"]["mean"], row["scores"]["exact"]["standard_error"]) == (
            pytest.approx((found["mean"], found["standard_error"])))  # fmt: skip
