"""What stands after --eval: functions, commands and questions, and how their answers are read."""

import json
import linecache
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from skillvec.errors import UsageError
from skillvec.trials import scores
from skillvec.trials.commands import CommandError
from skillvec.trials.evaluators import open_evaluator, read_options, refuse_metric
from skillvec.trials.scores import ALL, Score, ScoreError, half_of, read_scores, score_of

# -------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (0.5, Score(0.5)),
        (Score(0.5, 0.1), Score(0.5, 0.1)),
        (True, Score(1.0)),
        (np.float32(0.5), Score(0.5)),
        ((0.5, 0.1), Score(0.5, 0.1)),
        ((0.5, None), Score(0.5)),
        ((0.5, float("nan")), Score(0.5)),  # as numpy says of one item
        ({"mean": 0.5, "standard_error": 0.1}, Score(0.5, 0.1)),
        ([1, 0], Score(0.5, 0.5, (1.0, 0.0))),
        (np.array([1.0, 0.0]), Score(0.5, 0.5, (1.0, 0.0))),
        ({"values": [1, 0], "mean": 0.5}, Score(0.5, 0.5, (1.0, 0.0))),
        ({"values": [1, 0], "standard_error": 0.25}, Score(0.5, 0.25, (1.0, 0.0))),
        ({"values": [1, 0], "groups": ["a", "a"]}, Score(0.5, None, (1.0, 0.0), ("a", "a"))),
    ],
)
def test_an_answer_is_read_in_every_form(said: Any, expected: Score):
    assert read_scores({"acc": said}) == {"acc": expected}
    assert read_scores({"metrics": {"acc": said}, "model": "m"}) == {"acc": expected}


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (0.5, r"expected metrics by name, such as .*, found 0\.5"),
        ({"a": 1j}, "metric a: expected a number, found 1j"),
        ({"a": [[1.0]]}, r"metric a: expected a number, found \[1.0\]"),
        ({}, "expected metrics"),
        ({"acc": "0.5"}, "metric acc: expected a number, found '0.5'"),
        ({"acc": None}, "metric acc: expected a number, found None"),
        ({"acc": []}, "metric acc: expected values and a group for each, found 0"),
        ({"acc": (0.5, -1)}, "standard error of 0 or more, found -1"),
        ({"acc": {"mean": 1, "error": 2}}, "found mean, error"),
        ({"acc": {"standard_error": 2}}, "expected mean or values"),
        ({"acc": {"values": [1, 0], "mean": 0.6}}, "the mean is 0.6, but that of its values 0.5"),
        ({"acc": {"values": [1, 0], "groups": ["a"]}}, "found 2 values and 1 groups"),
        ({"acc": object()}, "metric acc: "),
    ],
)
def test_an_answer_that_is_no_scores_is_refused(said: Any, match: str):
    with pytest.raises(ScoreError, match=match):
        read_scores(said)


def test_the_error_is_over_groups():
    values, groups = [1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"]
    means = [0.5, 1.0, 0.0]
    assert score_of(values, groups).standard_error == pytest.approx(stdev(means) / 3**0.5)
    assert score_of(values).standard_error == pytest.approx(stdev(values) / 6**0.5)


def test_what_is_not_finite_is_named():
    found = read_scores({"a": float("inf"), "b": 1.0, "c": [1.0, float("nan")]})
    assert scores.not_finite(found) == ["a", "c"]


def test_halves_are_disjoint_whole_and_keep_groups_together():
    labels = [n // 3 for n in range(15)]  # five groups
    search, report = (half_of(labels, split) for split in scores.HALVES)
    assert sorted(search + report) == [*range(15)]
    assert search == sorted(search) and len(search) == 9
    assert not {labels[n] for n in search} & {labels[n] for n in report}
    assert half_of(labels, ALL) == [*range(15)]
    with pytest.raises(UsageError, match="cannot be halved"):
        half_of(["a", "a"], "search")


# ------------------------------------------------------------------------------ specs and options


def test_options_are_json_where_they_can_be():
    pairs = ["limit=10", "x=a=b", "names=[1, 2]", "yes=true", "empty="]
    assert read_options(pairs) == {
        "limit": 10, "x": "a=b", "names": [1, 2], "yes": True, "empty": "",
    }  # fmt: skip
    for wrong, match in ((["limit"], "KEY=VALUE"), (["=1"], "KEY=VALUE"),
                         (["a=1", "a=2"], "a is given twice")):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            read_options(wrong)


@pytest.mark.parametrize("spec", ["", "module", "module:", ":function", "command: "])
def test_a_text_that_names_no_evaluator_says_what_does(spec: str):
    with pytest.raises(UsageError, match="expected module:function, 'command"):
        open_evaluator(spec)


# ------------------------------------------------------------------------------------- functions

MODULE = '''\
"""Evaluates."""


def plain(model, tokenizer):
    return {"acc": 0.5}


def chosen(model, tokenizer, split="all", *, count=3, **more):
    return {"acc": [1.0] * count, split: 1, **more}


chosen.metrics = ["acc"]


def named(model, tokenizer, split):
    return {"x": 1}


named.splits = ("dev", "test")


def alone(model):
    """Take too little."""


def three(model, tokenizer, other):
    """Take too much."""


def lies(model, tokenizer):
    """Have splits and no parameter for them."""


lies.splits = ("dev", "test")


def text(model, tokenizer):
    """Have a text for a list."""


text.metrics = "acc"
number = 3
built_in = max


async def waits(model, tokenizer):
    """Give a coroutine."""


def gives(model, tokenizer):
    yield {"x": 1}
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a module of its own name in the current folder."""
    name = f"evaluates_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_function_of_the_current_folder_is_called(module: str):
    found = open_evaluator(f"{module}:plain")
    assert found.evaluate("model", "tokenizer", ALL) == {"acc": Score(0.5)}
    assert not found.takes_folder and found.splits == () and found.metrics is None
    with pytest.raises(UsageError, match="has no split 'search': expected all"):
        found.evaluate(None, None, "search")


def test_a_function_gets_options_and_the_split(module: str):
    found = open_evaluator(f"{module}:chosen", {"count": 2, "other": 4})
    assert found.splits == ("search", "report") and found.metrics == ("acc",)
    said = found.evaluate(None, None, "report")
    assert said["acc"].values == (1.0, 1.0) and said["report"].mean == 1 and said["other"].mean == 4
    assert open_evaluator(f"{module}:named").splits == ("dev", "test")


def test_a_journal_knows_a_function_by_its_options_and_its_source(module: str, tmp_path: Path):
    spec = open_evaluator(f"{module}:chosen", {"count": 2}).spec
    assert spec.startswith(f"{module}:chosen count=2 (")
    assert spec != open_evaluator(f"{module}:chosen", {"count": 3}).spec
    (tmp_path / f"{module}.py").write_text(MODULE + "# changed\n")
    assert spec != open_evaluator(f"{module}:chosen", {"count": 2}).spec


@pytest.mark.parametrize(
    ("function", "options", "match"),
    [
        ("missing", {}, "cannot be imported: AttributeError"),
        ("built_in", {}, "expected a function of Python"),
        ("number", {}, "expected a function, found 3"),
        ("alone", {}, "expected a function of .model, tokenizer. and options"),
        ("three", {}, "missing a required argument: 'other'"),
        ("plain", {"limit": 3}, "--eval-option limit: .*:plain takes no options"),
        ("three", {"limit": 3}, "takes other"),
        ("lies", {}, "says that it has splits, but takes no `split`"),
        ("waits", {}, "waits is async or a generator: expected a function that returns"),
        ("gives", {}, "gives is async or a generator"),
        ("text", {}, "its `metrics` should be a list of names"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(
    module: str, function: str, options: dict[str, Any], match: str
):
    with pytest.raises(UsageError, match=match):
        open_evaluator(f"{module}:{function}", options)


def test_a_module_that_raises_is_refused_with_what_it_says(module: str, tmp_path: Path):
    (tmp_path / f"{module}_broken.py").write_text("raise RuntimeError('no data here')")
    with pytest.raises(UsageError, match="RuntimeError: no data here"):
        open_evaluator(f"{module}_broken:plain")
    with pytest.raises(UsageError, match="ModuleNotFoundError: No module named 'nowhere_at_all'"):
        open_evaluator("nowhere_at_all:plain")
    with pytest.raises(UsageError, match="name a module, as nowhere:plain, and no file"):
        open_evaluator("evals/nowhere.py:plain")


def scored(model: Any, tokenizer: Any, *, count: int = 1) -> dict[str, list[float]]:
    return {"score": [1.0, 0.0] * count}


def test_in_python_a_function_is_an_evaluator_itself():
    found = open_evaluator(scored, {"count": 2})
    assert found.evaluate(None, None, ALL)["score"].values == (1.0, 0.0, 1.0, 0.0)
    assert found.spec == open_evaluator(f"{__name__}:scored", {"count": 2}).spec
    assert open_evaluator(found) is found
    by_count = partial(scored, count=3)
    assert len(open_evaluator(by_count).evaluate(None, None, ALL)["score"].values) == 6
    assert open_evaluator(by_count).spec == open_evaluator(scored, {"count": 3}).spec
    with pytest.raises(UsageError, match="takes count"):
        open_evaluator(scored, {"other": 1})
    with pytest.raises(UsageError, match="expected a function, an Evaluator, module:function"):
        open_evaluator(5)  # type: ignore[arg-type]


def test_a_function_that_a_notebook_defines_is_known_by_its_own_text(
    monkeypatch: pytest.MonkeyPatch,
):
    def define(text: str) -> Any:
        lines = text.splitlines(keepends=True)
        name = f"<cell {text}>"
        monkeypatch.setitem(linecache.cache, name, (len(text), None, lines, name))
        names: dict[str, Any] = {"__name__": "a_notebook"}
        exec(compile(text, name, "exec"), names)
        return names["score"]

    one, two = (f"def score(model, tokenizer):\n    return {{'score': {n}}}\n" for n in (1, 2))
    specs = [open_evaluator(define(text)).spec for text in (one, one, two)]
    assert specs[0] == specs[1] != specs[2] and specs[0].startswith("a_notebook:score (")
    linecache.cache.pop(f"<cell {two}>")
    lost = define(two)
    linecache.cache.pop(f"<cell {two}>")
    other = define(one)
    linecache.cache.pop(f"<cell {one}>")
    assert open_evaluator(lost).spec != open_evaluator(other).spec  # by what it was compiled to


class Scorer:
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, list[float]]:
        return {"score": [1.0] * self.count}

    def score(self, model: Any, tokenizer: Any) -> dict[str, list[float]]:
        return self(model, tokenizer)


def shift(by: float, model: Any, tokenizer: Any) -> dict[str, float]:
    return {"score": by}


def closing(by: float) -> Any:
    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        return {"score": by, "same": bool(score)}

    return score


@pytest.mark.parametrize(
    "make",
    [
        lambda n: closing(n),
        lambda n: partial(shift, n),
        lambda n: Scorer(n),
        lambda n: Scorer(n).score,
        lambda n: [lambda m, t: {"a": 1.0}, lambda m, t: {"a": 2.0}, lambda m, t: {"b": 1.0}][n],
    ],
)
def test_functions_that_share_a_name_and_a_file_are_told_apart(make: Any):
    """Else the points of one would be taken for those of the other."""
    specs = [open_evaluator(make(n)).spec for n in (0, 1, 2)]
    assert len({*specs}) == 3
    assert specs == [open_evaluator(make(n)).spec for n in (0, 1, 2)]
    assert not any("functools" in spec for spec in specs)


def test_what_awaits_or_names_no_metrics_is_refused_in_python_too():
    class Waits:
        async def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
            return {"score": 1.0}

    def names(model: Any, tokenizer: Any) -> dict[str, float]:
        return {"score": 1.0}

    with pytest.raises(UsageError, match="Waits is async or a generator"):
        open_evaluator(Waits())
    names.metrics = 3  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="its `metrics` should be a list of names"):
        open_evaluator(names)


def test_a_metric_that_is_known_not_to_be_there_is_refused(module: str):
    found = open_evaluator(f"{module}:chosen")
    refuse_metric(found, "acc")
    with pytest.raises(UsageError, match=r"metric 'accc': .* gives acc; did you mean acc"):
        refuse_metric(found, "accc")
    refuse_metric(open_evaluator(f"{module}:plain"), "whatever")


# -------------------------------------------------------------------------------------- commands

PROGRAM = """\
import json, sys
print("loading")
print(json.dumps({"acc": 0.5, "words": len(sys.argv)}))
print()
"""


def command(tmp_path: Path, text: str, words: str = "{model}") -> Any:
    (tmp_path / "program.py").write_text(text)
    return open_evaluator(f"command: {sys.executable} {tmp_path}/program.py {words}")


def test_a_command_prints_its_scores_last(tmp_path: Path):
    found = command(tmp_path, PROGRAM, "--model={model} 'two words'")
    assert found.takes_folder and found.splits == ()
    assert found.evaluate("/a b", None, ALL) == {"acc": Score(0.5), "words": Score(3.0)}


def test_a_command_gets_split_and_output(tmp_path: Path):
    text = "import sys\nopen(sys.argv[3], 'w').write('{\"%s %s\": 1}' % tuple(sys.argv[1:3]))"
    found = command(tmp_path, text, "{model} {split} {output}")
    assert found.splits == ("search", "report")
    assert [*found.evaluate("/a b", None, "report")] == ["/a b report"]
    with pytest.raises(UsageError, match="has no split 'dev'"):
        found.evaluate("/a", None, "dev")


def test_a_command_with_a_pipe_gets_a_shell(tmp_path: Path):
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    (folder / "scores").write_text('{"acc": 1}')
    found = open_evaluator("command: cat {model}/scores | sed s/1/2/")
    assert found.evaluate(folder, None, ALL) == {"acc": Score(2.0)}
    found = open_evaluator("command: NAME=value cat {model}/scores")
    assert found.evaluate(folder, None, ALL) == {"acc": Score(1.0)}


@pytest.mark.parametrize(
    ("spec", "options", "match"),
    [
        ("command: evaluate", {}, "expected {model}"),
        ("command: no_such_program {model}", {}, "no program no_such_program here"),
        ("command: cat '{model}", {}, "No closing quotation"),
        ("command: cat {model}", {"limit": 1}, "a command takes no options"),
    ],
)
def test_a_command_that_cannot_run_is_refused(spec: str, options: dict[str, Any], match: str):
    with pytest.raises(UsageError, match=match):
        open_evaluator(spec, options)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("import sys; print('why', file=sys.stderr); sys.exit(3)", CommandError,
         "exit code 3\n  why"),
        ("import sys; print('why'); sys.exit(3)", CommandError, "exit code 3\n  why"),
        ("import os; os.kill(os.getpid(), 9)", CommandError, "ended by signal 9"),
        ("print('done')", ScoreError, "as JSON in the last line that it printed, found 'done'"),
        ("", ScoreError, "the last line that it printed, found ''"),
        ("print([1])", ScoreError, "expected metrics"),
    ],
)  # fmt: skip
def test_a_command_that_gives_no_scores_says_why(
    tmp_path: Path, text: str, error: type[Exception], match: str
):
    with pytest.raises(error, match=match):
        command(tmp_path, text).evaluate("m", None, ALL)


def test_a_command_that_writes_no_output_says_so(tmp_path: Path):
    with pytest.raises(ScoreError, match=r"the file {output}, found ''"):
        command(tmp_path, "print('{}')", "{model} {output}").evaluate("m", None, ALL)


@pytest.fixture(params=["with waitid", "without"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no os.waitid on macOS before 3.13."""
    if request.param == "without":
        monkeypatch.delattr(os, "waitid")


def test_what_a_command_leaves_running_ends_with_it(waiting: None, tmp_path: Path):
    text = (
        "import json, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(json.dumps({'child': child.pid}))"
    )
    said = command(tmp_path, text).evaluate("m", None, ALL)
    assert not is_running(int(said["child"].mean))


def test_an_interruption_ends_the_whole_group_of_a_command(waiting: None, tmp_path: Path):
    text = (
        "import os, signal, subprocess, sys, time\n"
        "def tidy(*given):\n"
        f"    open({str(tmp_path / 'tidied')!r}, 'w').close()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, tidy)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "time.sleep(60)"
    )
    found = command(tmp_path, text)

    def stop(number: int, frame: object) -> None:
        if (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"):
            raise InterruptedError("enough")
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptedError):
            found.evaluate("m", None, ALL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "tidied").exists()  # it was asked before it was ended
    assert not any(is_running(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def is_running(pid: int) -> bool:
    """Return whether a process goes on; one that was ended may be there for a moment."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return True


# ------------------------------------------------------------------------------------- questions


def write_questions(path: Path, count: int = 4, **more: Any) -> Path:
    rows = [{"prompt": f"item {n}", "answer": "red", **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_say_what_is_wrong_before_a_model_is_there(tmp_path: Path):
    file = write_questions(tmp_path / "q.jsonl")
    found = open_evaluator(f"evaluate:{file}", {"metrics": "exact,first_word", "limit": 2})
    assert found.metrics == ("exact", "first_word") and found.splits == ("search", "report")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    for name, options, match in (
        ("nowhere.jsonl", {}, "expected an existing .jsonl file"),
        ("empty.jsonl", {}, "no questions"),
        ("broken.jsonl", {}, "line 1: not JSON"),
        ("q.jsonl", {"metrics": "bleu"}, "metrics: expected one or more of exact"),
        ("q.jsonl", {"metrics": 3}, "metrics: expected list, found 3"),
        ("q.jsonl", {"colour": 3}, "no option colour: expected answer, batch"),
        ("q.jsonl", {"batch": "many"}, "batch: expected int, found 'many'"),
        ("q.jsonl", {"batch": 0}, "batch: expected 1 or more, found 0"),
        ("q.jsonl", {"limit": 0}, "limit: expected 1 or more, found 0"),
        ("q.jsonl", {"temperature": -1}, "temperature: expected 0"),
        ("q.jsonl", {"answer": "nowhere:at_all"}, "nowhere:at_all: "),
        ("q.yaml", {}, "no such file, and no configuration of this name"),
    ):
        with pytest.raises(UsageError, match=match):
            open_evaluator(f"evaluate:{tmp_path / name}", options)


def test_a_journal_knows_questions_by_their_bytes(tmp_path: Path):
    file = write_questions(tmp_path / "q.jsonl")
    spec = open_evaluator(f"evaluate:{file}").spec
    assert spec == open_evaluator(f"evaluate:{file}").spec
    assert spec != open_evaluator(f"evaluate:{write_questions(file, 5)}").spec


CONFIG = """\
out: {folder}
base: {folder}
sft: [{{}}]
rl: {{}}
source: [{{sft: [a.jsonl], rl: b.jsonl}}]
targets:
  one: {{sft: [a.jsonl], evaluate: {{data: {folder}/q.jsonl}}}}
  two: {{sft: [a.jsonl], evaluate: {{data: {folder}/nowhere.jsonl}}}}
environment: {{SKILLVEC_TEST_OF_QUESTIONS: 1}}
evaluate: {{run: {module}, with: {{metrics: [exact], max-new-tokens: 3}}}}
"""


def test_a_configuration_says_what_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKILLVEC_TEST_OF_QUESTIONS", "0")
    write_questions(tmp_path / "q.jsonl")
    file = tmp_path / "past.yaml"
    file.write_text(CONFIG.format(folder=tmp_path, module="skillvec.recipes.evaluate"))
    found = open_evaluator(f"evaluate:{file}", {"target": "one", "batch": 2})
    assert found.metrics == ("exact",) and not found.takes_folder
    assert "target=one batch=2 max_new_tokens=3" in " ".join(found.spec.split())
    assert os.environ["SKILLVEC_TEST_OF_QUESTIONS"] == "1"
    for options, match in (({}, "say one by --eval-option target=NAME, of one, two"),
                           ({"target": "two"}, "nowhere.jsonl: expected an existing")):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            open_evaluator(f"evaluate:{file}", options)
    file.write_text(CONFIG.format(folder=tmp_path, module="skillvec.recipes.toolbench.evaluate"))
    found = open_evaluator(f"evaluate:{file}", {"target": "one"})
    assert found.takes_folder
    assert "-m skillvec.recipes.toolbench.evaluate --model" in found.spec
