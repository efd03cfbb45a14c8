"""Tasks of lm-eval over a model in memory, from local files."""

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tried import World, make_task, make_world

from skillvec.errors import UsageError
from skillvec.trials import loading
from skillvec.trials.evaluators import open_evaluator, refuse_metric
from skillvec.trials.scores import ALL
from skillvec.trials.trial import Trials
from skillvec.vectors.vector import SkillVector

pytestmark = pytest.mark.usefixtures("one_thread", "own_tasks")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out lm-eval's own 14,000 tasks, of which the list takes it 14 s to make."""
    from lm_eval import evaluator

    manager = partial(evaluator.TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", manager)


@pytest.fixture(scope="module")
def loaded(world: World) -> tuple[Any, Any]:
    point = loading.open_target(str(world.target))
    return loading.load_target(point), loading.open_tokenizer(point)


def opened(tasks: Path, name: str = "colours", **options: Any) -> Any:
    return open_evaluator(f"lm-eval:{name}", {"include_path": str(tasks), **options})


def test_scores_are_those_of_lm_eval(tasks: Path, loaded: tuple[Any, Any]):
    from lm_eval import evaluator as lm_eval
    from lm_eval.models.huggingface import HFLM

    found = opened(tasks)
    scores = found.evaluate(*loaded, ALL)
    expected = lm_eval.simple_evaluate(
        HFLM(pretrained=loaded[0], tokenizer=loaded[1]), tasks=["colours"], bootstrap_iters=10,
        task_manager=lm_eval.TaskManager(include_path=str(tasks)),
    )  # fmt: skip
    theirs = expected["results"]["colours"]
    acc, brier = scores["colours/acc"], scores["colours/brier_score"]
    assert acc.mean == pytest.approx(theirs["acc,none"])
    assert acc.standard_error == pytest.approx(theirs["acc_stderr,none"])
    assert acc.values == tuple(one["acc"] for one in expected["samples"]["colours"])
    assert brier.mean == pytest.approx(theirs["brier_score,none"])
    assert (brier.values, brier.standard_error) == ((), None)  # no mean of items
    assert found.metrics == tuple(scores) == ("colours/acc", "colours/brier_score")
    assert found.lower_is_better == ("colours/brier_score",)
    with pytest.raises(UsageError, match="did you mean colours/acc"):
        refuse_metric(found, "acc")


def test_halves_and_a_limit_are_of_the_items(tasks: Path, loaded: tuple[Any, Any]):
    whole = opened(tasks).evaluate(*loaded, ALL)["colours/acc"].values
    search, report = (opened(tasks)._samples(split)["colours"] for split in ("search", "report"))
    assert sorted(search + report) == [*range(12)] and len(search) == 6
    for split, items in (("search", search), ("report", report)):
        values = opened(tasks).evaluate(*loaded, split)["colours/acc"].values
        assert values == tuple(whole[item] for item in items)
    limited = opened(tasks, limit=5)
    assert limited.evaluate(*loaded, ALL)["colours/acc"].values == whole[:5]
    halves = [limited._samples(split)["colours"] for split in ("search", "report")]
    assert sorted([*halves[0], *halves[1]]) == [*range(5)]
    assert opened(tasks, limit=0.3)._samples(ALL) == {"colours": [0, 1, 2, 3]}
    with pytest.raises(UsageError, match="has no split 'dev'"):
        opened(tasks).evaluate(*loaded, "dev")


GROUP = """\
group: every
task: [colours, more]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def test_groups_and_filters_have_metrics_of_their_own(tmp_path: Path, loaded: tuple[Any, Any]):
    tasks = make_task(tmp_path / "tasks", 4)
    text = (tasks / "colours.yaml").read_text().replace("task: colours", "task: more", 1)
    (tasks / "more.yaml").write_text(text.replace(
        "metadata:", "filter_list:\n  - {name: first, filter: [{function: take_first}]}\n"
        "  - {name: again, filter: [{function: take_first}]}\nmetadata:"))  # fmt: skip
    (tasks / "every.yaml").write_text(GROUP)
    found = opened(tasks, "every")
    scores = found.evaluate(*loaded, ALL)
    wanted = {"colours/acc", "more/acc,first", "more/acc,again"}
    assert wanted <= {*scores} and wanted <= {*found.metrics}
    group = [name for name in scores if name.startswith("every/acc")]
    assert group and {*group} <= {*found.metrics}
    assert all(scores[name].standard_error is not None for name in group)


def test_nothing_is_printed_or_left_behind(
    tasks: Path, loaded: tuple[Any, Any], capfd: pytest.CaptureFixture[str]
):
    before = dict(os.environ), logging.getLogger("lm_eval").level, sys.stderr, sys.stdout
    found = opened(tasks)
    found.check("")
    found.evaluate(*loaded, ALL)
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert before == (dict(os.environ), logging.getLogger("lm_eval").level, sys.stderr, sys.stdout)


def test_a_vector_is_tried_without_a_sign_of_change(world: World, tasks: Path):
    vector = SkillVector.open(world.vector)
    with Trials(world.target, opened(tasks, batch_size=4), device="cpu") as trials:
        points = [trials.run(None), trials.run(vector), trials.run(None)]
    assert [one.status for one in points] == ["done"] * 3
    assert points[0].scores == points[2].scores != points[1].scores


# ------------------------------------------------------------------------------------ bad input


def test_what_is_wrong_with_a_task_is_said_before_a_model_is_there(tasks: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="lm-eval knows no task colors; near are colours;"):
        opened(tasks, "colours,colors").check("")
    broken = make_task(tmp_path / "broken")
    (broken / "colours.jsonl").unlink()
    with pytest.raises(UsageError, match="the task cannot be loaded: FileNotFoundError"):
        opened(broken).check("")
    empty = make_task(tmp_path / "empty", 1)
    (empty / "data.py").write_text(
        "import datasets\n\ndef load(**given):\n"
        "    rows = datasets.Dataset.from_list([{'question': 'x', 'choices': ['a'], 'gold': 0}])\n"
        "    return {'train': rows}\n\ndef none(rows):\n    return rows.select([])\n"
    )
    text = (empty / "colours.yaml").read_text()
    (empty / "colours.yaml").write_text(text.replace(
        "dataset_path: json", "custom_dataset: !function data.load\n"
        "process_docs: !function data.none"))  # fmt: skip
    with pytest.raises(UsageError, match="the task cannot be loaded"):
        opened(empty).check("")
    unsafe = make_task(tmp_path / "unsafe", 2)
    (unsafe / "colours.yaml").write_text(
        (unsafe / "colours.yaml").read_text() + "unsafe_code: true\n"
    )
    with pytest.raises(UsageError, match="runs code that the model writes; to allow it"):
        opened(unsafe).check("")
    opened(unsafe, confirm_run_unsafe_code=True).check("")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limits": 3}, "--eval-option limits: lm-eval takes .*; did you mean limit"),
        ({"limit": "all"}, "--eval-option limit: expected int or float, found 'all'"),
        ({"limit": True}, "--eval-option limit: expected int or float, found True"),
        ({"limit": 0}, "--eval-option limit: expected more than 0, found 0"),
        ({"apply_chat_template": 3}, "apply_chat_template: expected bool or str, found 3"),
    ],
)
def test_an_option_that_lm_eval_does_not_take_is_refused(options: dict[str, Any], match: str):
    with pytest.raises(UsageError, match=match):
        open_evaluator("lm-eval:colours", options)


def test_a_list_of_no_tasks_and_a_folder_that_is_not_there_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="expected one task or more"):
        open_evaluator("lm-eval: , ")
    with pytest.raises(UsageError, match=r"include_path: .*nowhere: no such folder"):
        opened(tmp_path / "nowhere").check("")


def test_a_task_may_be_named_by_its_file(tasks: Path):
    assert open_evaluator(f"lm-eval:{tasks}/colours.yaml").metrics == (
        "colours/acc", "colours/brier_score",
    )  # fmt: skip
