"""Words that sentences of several verbs share."""

import pytest

from skillvec.report import Report
from skillvec.verbs import phrases
from skillvec.verbs.sentences import LISTED, say_push_plan


@pytest.mark.parametrize("verb", [
    "diff", "combine", "import-patch", "export-patch", "extract-lora", "orthogonality", "norms",
    "apply", "verify",
])  # fmt: skip
def test_a_size_that_is_known_after_the_work_is_said_as_a_bound(verb: str) -> None:
    before = {"orthogonality": "about ", "norms": "about ", "apply": "", "verify": ""}
    said = phrases.say_written(Report(verb, {"nbytes_written": 1500}))
    assert said == before.get(verb, "at most ") + "1.5 kB"


@pytest.mark.parametrize(("engine", "said", "each"), [
    ("threads", "2 workers", ""), ("serial", "2 workers", ""),
    ("ray", "2 workers of ray", " a worker"),
])  # fmt: skip
def test_workers_of_another_machine_are_said(engine: str, said: str, each: str) -> None:
    assert phrases.say_workers(Report("diff", {"engine": engine, "workers": 2})) == said
    assert phrases.say_each(engine) == each


def test_a_ledger_lists_what_its_verb_moves() -> None:
    lines = [
        {"name": "w", "status": "applied", "shape": [2, 3], "changed": 5, "cosine": 0.25,
         "gain": None, "norm": 1.0},
        {"name": "x", "status": "equal", "shape": []},
    ]  # fmt: skip
    (grid,) = phrases.list_ledger(Report("apply", ledger=lines), None)
    assert not isinstance(grid, str)
    assert grid.heads == ["tensor", "status", "shape", "changed", "norm", "gain", "cosine"]
    assert grid.rows[0] == ["w", "applied", "2x3", "5", "1", "", "0.25"]
    assert grid.rows[1] == ["x", "equal", "scalar", "", "", "", ""]
    _, more = phrases.list_ledger(Report("apply", ledger=lines), 1)
    assert more == "... and 1 more tensor; -v or --json has all"
    for verb in ("push", "pull"):
        (grid, *_) = phrases.list_ledger(Report(verb, ledger=lines), None)
        assert not isinstance(grid, str) and grid.heads[0] == "file"


def test_files_that_a_push_deletes_are_named_or_counted() -> None:
    facts = {"kind": "model", "repo": "org/m", "revision": None, "files": [], "nbytes": 0}
    names = [f"model-{i}.safetensors" for i in range(LISTED + 1)]
    _, *few = say_push_plan(facts | {"deleted": names[:LISTED]})
    assert few == [f"  delete  {name}" for name in names[:LISTED]]
    *same, more = say_push_plan(facts | {"deleted": names})[1:]
    assert same == few and more.strip() == "... and 1 more file; --json has all"


def test_what_a_list_leaves_out_is_counted() -> None:
    assert phrases.count_rest(212, "tensors", "-v") == ["... and 212 more tensors; -v has all"]
    assert phrases.count_rest(1, "ways", "--json") == ["... and 1 more way; --json has all"]
    assert phrases.count_rest(0, "ways", "-v") == phrases.count_rest(-3, "ways", "-v") == []


def test_verdicts_say_what_they_go_by() -> None:
    facts = {"verdict": "exact base", "verdict_sampled": True}
    assert phrases.say_verdict(facts) == "exact base (by samples of its weights)"
    assert phrases.say_verdict({"verdict": "exact base"}) == "exact base"
    assert phrases.say_verdict(facts | {"verdict": "another model"}) == "another model"
    assert phrases.say_stored_as("auto") == "fp32 (fp64 where an input is)"
    assert phrases.say_stored_as("bf16") == "bf16"
