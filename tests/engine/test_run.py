"""How a plan is run: the options that verbs share, and the engine that they name."""

import os

import pytest

from skillvec.engine.run import Run, choose_engine
from skillvec.errors import UsageError


@pytest.mark.parametrize(("engine", "workers", "said"), [
    ("threads", 0, "expected at least 1"), ("serial", 2, "the calling thread alone"),
    ("ray ", 1, "expected one of threads, serial, ray"),
])  # fmt: skip
def test_what_no_engine_does_is_refused(engine: str, workers: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_engine(engine, workers)


def test_threads_are_the_cores_sixteen_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((3, 3), (16, 16), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert choose_engine("threads", None).workers == workers
    assert choose_engine("threads", 40).workers == 40  # who asks for more gets them
    assert choose_engine("serial", 1).workers == choose_engine("serial", None).workers == 0


def test_where_a_system_does_not_say_which_cores_are_ours_all_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    for cores, workers in ((5, 5), (64, 16), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda n=cores: n)
        assert choose_engine("threads", None).workers == workers


def test_a_run_of_no_options_writes_once() -> None:
    run = Run.by()
    assert not (run.stream or run.dry_run or run.force or run.watcher)
