"""What a sweep's scores come to: statements, sentences, the table, the curve and the page."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_page import HOSTILE
from webpage import Parsed, check_stands_alone, check_structure

from skillvec.analysis import sweep_page
from skillvec.analysis.sweep_report import Asked, Tried, conclude, csv_text
from skillvec.analysis.sweep_sentences import (
    list_answers,
    say_lead,
    say_sweep,
    say_sweep_plan,
    tabulate,
    write_score,
)
from skillvec.cli.screen import Screen
from skillvec.report import Report
from skillvec.trials.scores import Score, score_of

MEASURED = {"gain": 0.998, "cosine": 0.97, "changed": 12_345, "seconds": 1.5, "attach_seconds": 0.1}
HEIGHTS = {-0.5: -0.3, 0.5: 0.4, 1.0: 0.31, 2.0: -0.1}


def tried(
    heights: dict[float, float], *, items: int = 60, seed: int = 0, control: Sequence[str] = (),
    control_height: float = 0.0, metric: str = "exact", failed: Sequence[float] = (),
    known: bool = True,
) -> list[Tried]:  # fmt: skip
    """Return points whose scores lie by `heights` above the target's, noise of .1 an item."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(0.3, 0.5, items)

    def point(curve: str, lam: float, height: float) -> Tried:
        if lam in failed and curve == "skill":
            return Tried(curve, lam, "failed", f"OSError: {HOSTILE}", {}, MEASURED)
        score = score_of(hard + height + draw.normal(0, 0.1, items))
        score = score if known else Score(score.mean)
        return Tried(curve, lam, "done", "", {metric: score, "other": Score(0.5)}, MEASURED)

    made = [point("target", 0, 0)]
    made += [point("skill", lam, height) for lam, height in heights.items()]
    return made + [point(kind, lam, control_height) for kind in control for lam in heights]


def content(made: list[Tried], metric: str = "exact", less: bool = False) -> dict[str, Any]:
    """Return what report.json holds of such points."""
    kinds = dict.fromkeys(one.curve for one in made if one.curve not in ("target", "skill"))
    facts = conclude(made, Asked(metric, less)) | {
        "target": {"ref": "models/target", "path": "models/target", "dtypes": {"BF16": 9}},
        "target_nbytes": 2_000_000,
        "name": "skill.safetensors", "eval": "module:score", "verdict": "exact base",
        "control": list(kinds), "seed": 0, "rounding": "nearest", "dtype": "auto",
        "takes_folder": False, "planned": len(made), "output": "report",
        "lam": sorted({one.lam for one in made}),
    }  # fmt: skip
    return Report("sweep", facts).to_dict()


# -------------------------------------------------------------------------------------- sentences


def test_the_answer_in_a_sentence() -> None:
    said = list_answers(content(tried(HEIGHTS, control=["random", "shuffled"])))
    assert said[0].startswith("exact rises from 0.") and "at lambda 0.5, the best of 4" in said[0]
    assert "for all 4 at once); lambda 1 gives 0." in said[0]
    assert said[1].startswith("The random control stays between 0.")
    assert said[1].endswith("at lambda 0.5 the vector is clearly better.")
    assert "optimistic" in said[2] and "skillvec search" in said[2]


def test_controls_that_do_the_same_are_named() -> None:
    said = list_answers(content(tried(HEIGHTS, control=["random"], control_height=0.42)))
    assert "not clearly better than the random control" in said[1]


def test_what_is_not_found() -> None:
    worse = {lam: -abs(height) for lam, height in HEIGHTS.items()}
    for heights in (dict.fromkeys(HEIGHTS, 0.0), worse):
        found = content(tried(heights, control=["random"]))
        said = list_answers(found)
        assert not found["found"] and said[0].startswith("Nothing was found: exact of the best of")
        assert "clearly" not in said[1] and len(said) == 2
        assert ("is worse than" if heights is worse else "is within noise of") in said[0]
    assert content(tried(worse), less=True)["found"]  # who wants less of it has found something


def test_the_best_is_one_that_is_clear() -> None:
    """The highest score by itself may be luck: of few items, or of a noisy model."""
    made = tried({0.5: 0.2, 1.0: 0.0})
    noisy = score_of(np.random.default_rng(1).normal(2, 8.0, 60))
    made[2] = Tried("skill", 1.0, "done", "", {"exact": noisy}, MEASURED)
    found = content(made)
    assert noisy.mean > found["best"]["scores"]["exact"]["mean"]
    assert found["found"] and found["best"]["lam"] == 0.5


def test_without_standard_errors_nothing_is_claimed() -> None:
    found = content(tried(HEIGHTS, known=False))
    assert not found["found"] and found["best"]["lam"] == 0.5
    assert "no standard error is known" in list_answers(found)[0]


def test_the_lead_of_the_page_says_so_too_and_no_p_is_shown() -> None:
    found = content(tried(HEIGHTS, known=False))
    assert "nobody can say whether that is more than noise." in say_lead(found)
    assert [row[4] for row in tabulate(found).rows] == ["-"] * 5
    parsed = Parsed(sweep_page.html(found))
    assert "nobody can say" in parsed.shown and "1.000" not in parsed.text


def test_few_items_that_all_moved_alike_have_no_interval() -> None:
    """None of four items is right, then all are: p is 2^-3, and no end of an interval is known."""
    made = [Tried(curve, lam, "done", "", {"exact": score_of([value] * 4)}, MEASURED)
            for curve, lam, value in (("target", 0, 0.0), ("skill", 1.0, 1.0))]  # fmt: skip
    found = content(made)
    assert list_answers(found) == [
        "Nothing was found: exact of the one lambda, 1.000, is within noise of the target's own"
        " 0.000 (difference +1, p 0.125, too few items for an interval)."
    ]
    check_structure(Parsed(sweep_page.html(found)))


def test_what_is_better_is_said_of_a_metric_that_should_fall() -> None:
    for known in (True, False):
        found = content(tried(HEIGHTS, known=known), less=True)
        assert say_lead(found).startswith("exact (less is better) ")
        assert "Less exact is better." in Parsed(sweep_page.html(found)).shown
    assert "better" not in say_lead(content(tried(HEIGHTS)))


def test_no_lambda_is_left() -> None:
    said = list_answers(content(tried({1.0: 0.5}, failed=[1.0])))
    assert said[0].startswith("No lambda could be compared with the target, whose exact is 0.")
    assert said[1] == "1 point failed: lambda 1; the same command tries them again."


def test_scores_as_a_person_reads_them() -> None:
    written = [write_score(value) for value in (None, 0.0, 0.31249, 9.5, 11.2, 123456.0, 0.00123)]
    assert written == ["-", "0.000", "0.312", "9.500", "11.20", "1.235e+05", "0.0012"]


def test_one_sweep_in_twenty_finds_something_where_nothing_is() -> None:
    heights = dict.fromkeys((-1.0, 0.5, 1.0, 1.5, 2.0), 0.0)
    alarms = [conclude(tried(heights, items=12, seed=seed), Asked("exact", False))["found"]
              for seed in range(200)]  # fmt: skip
    assert 0 < sum(alarms) <= 200 * 0.025 + 5  # better, not worse: one side of .05


# --------------------------------------------------------------------------------- table and plan


def test_eighty_columns_hold_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = tried(HEIGHTS | {-0.125: 0.0}, control=["random", "shuffled"], failed=[2.0])
    Screen().show(Report("sweep", content(made)))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "0 (target)" in said and "-0.125" in said and "failed" in said
    best = next(line for line in said.splitlines() if line.startswith("0.5 "))
    assert best.split()[4:6] == ["<", ".001"] and len(best.split()) == 9


def test_the_table_has_a_row_for_each_lambda_and_a_column_for_each_control() -> None:
    grid = tabulate(content(tried(HEIGHTS, control=["random"])))
    assert [row[0] for row in grid.rows] == ["-0.5", "0 (target)", "0.5", "1", "2"]
    assert grid.heads == ["lambda", "exact", "±", "less target", "p", "gain", "random"]
    assert grid.rows[1][3:] == ["-", "-", "0.998", "-"]
    assert len(say_sweep(content(tried(HEIGHTS)), True)) == 4  # verbose: every metric too


def test_the_plan_says_what_it_takes() -> None:
    facts = content(tried(HEIGHTS, control=["random"])) | {"resumed": 3, "lam": list(range(20))}
    said = "\n".join(say_sweep_plan(facts))
    assert "(BF16, 2 MB), loaded once" in said and "points  9, 3 of them done before" in said
    assert "10, 11 and 8 more" in said and "random, at the same lambdas" in said
    assert (
        "(BF16, 2 MB), written to a folder of 2 MB"
        in say_sweep_plan(facts | {"takes_folder": True})[1]
    )


def test_csv_has_two_columns_for_each_metric() -> None:
    head, *rows = csv_text(content(tried(HEIGHTS, failed=[1.0]))["points"]).splitlines()
    assert head.startswith("curve,lam,status,exact,exact standard error,other,other standard error")
    assert len(rows) == 5 and rows[3].startswith("skill,1.0,failed,,,,,")


# ------------------------------------------------------------------------------------ the page


def layers(spec: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]


def test_the_curve_shows_all_that_was_tried() -> None:
    made = tried(HEIGHTS, control=["random"], failed=[2.0])
    found = content(made)
    figure = sweep_page.curve(found)
    values = figure.spec["data"]["values"]
    skill = {v["lam"]: v for v in values if v["curve"] == "vector"}
    assert set(skill) == {-0.5, 0, 0.5, 1}  # one has failed
    assert {v["lam"] for v in values if v["curve"] == "random control"} == {0, *HEIGHTS}
    point = found["best"]["scores"]["exact"]
    bar = skill[0.5]["high"] - skill[0.5]["score"]
    assert (
        bar == pytest.approx(1.96 * point["standard_error"]) and skill[0.5]["low"] < point["mean"]
    )
    lines = [layer["data"]["values"] for layer in layers(figure.spec, "rule") if "data" in layer]
    assert lines == [[{"lam": 1}], [{"score": found["target_score"]}]]
    assert figure.note.endswith("Without 1 that failed.")
    without_one = sweep_page.curve(content(tried({0.5: 0.1})))
    assert len(layers(without_one.spec, "rule")) == 2


@pytest.mark.parametrize("metric", ["score", "lam", "f1.macro", "pass[1", "it's"])
def test_a_metric_of_any_name_is_drawn(metric: str) -> None:
    """It is a title alone: neither a path into the points nor a value of theirs."""
    made = tried(HEIGHTS, metric=metric)
    figure = sweep_page.curve(content(made, metric))
    values = {v["lam"]: v for v in figure.spec["data"]["values"]}
    assert values[0.5]["score"] == made[2].scores[metric].mean
    assert dict(sweep_page.figures(content(made, metric)))["curve.svg"].startswith(b"<")


def test_the_page_begins_with_the_answer_and_holds_the_report() -> None:
    found = content(tried(HEIGHTS, control=["random"], failed=[2.0]))
    found["warnings"].append(HOSTILE)
    found["eval"] = f"command: {HOSTILE}"
    parsed = Parsed(sweep_page.html(found))
    check_structure(parsed)
    check_stands_alone(parsed)
    answer, lead = list_answers(found)[0], say_lead(found)
    assert lead.endswith("at lambda 0.5, the best of 3 lambdas.") and lead[:-1] in answer
    assert answer in parsed.text  # in full, folded
    assert parsed.shown.index(lead) < parsed.shown.index("The numbers behind it")
    assert parsed.shown.index("The numbers behind it") < parsed.shown.index(HOSTILE)
    assert "failed: OSError" in parsed.text and "lambda −0.5" in parsed.text
    assert parsed.json("report")["points"][0]["curve"] == "target"
    assert [held["class"] for held in parsed.find("div", role="img")] == [
        "chart desk",
        "chart phone",
    ]
    assert parsed.folded[:2] == ["Points", "All metrics"]
    assert [row[0][2] for row in parsed.tables[0].rows[1:3]] == ["target", "lambda −0.5"]
    assert "mark" not in {tag for tag, _ in parsed.tags} and parsed.text.count(HOSTILE) == 3
    assert json.loads(json.dumps(found)) == found


def test_the_curve_as_a_file() -> None:
    files = dict(sweep_page.figures(content(tried(HEIGHTS, control=["random"], metric=HOSTILE),
                                            HOSTILE)))  # fmt: skip
    assert list(files) == ["curve.svg", "curve.png"]
    head = ET.fromstring(files["curve.svg"])
    text = "".join(head.itertext())
    assert "lambda" in text and "random control" in text and HOSTILE in text
    assert files["curve.png"].startswith(b"\x89PNG")
