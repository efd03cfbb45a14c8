"""Matrices one for each worker at a time."""

import threading
import time

import pytest
import torch

from skillvec.engine import matrix_workers
from skillvec.engine.matrix_workers import at_once_nbytes, in_turn
from skillvec.errors import IncompatibleError


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_turn_from_as_many_as_fit(workers: int) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def work(item: int) -> tuple[int, int]:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.02 if item % 3 else 0.002)
        with lock:
            at_work -= 1
        return item, torch.get_num_threads()

    found = list(in_turn(work, range(12), lambda item: 8, workers))
    assert found == [(item, 1) for item in range(12)] and most == workers


def test_matrices_wait_for_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_workers, "available_memory_nbytes", lambda: 4 * 3 * 100)
    at_work: list[int] = []
    most = []

    def work(nbytes: int) -> None:
        at_work.append(nbytes)
        time.sleep(0.01)
        most.append(sum(at_work))
        at_work.remove(nbytes)

    sizes = [40, 60, 50, 50, 300, 10, 90, 100]
    list(in_turn(work, sizes, lambda nbytes: nbytes, 4))
    assert max(most) == 300 and sorted(most)[-2] <= 100
    assert at_once_nbytes(sizes, 4) == 3 * 300
    assert at_once_nbytes([10, 20, 30], 2) == 3 * 50 and not at_once_nbytes([], 2)


def test_an_error_ends_what_is_done_in_turn() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise IncompatibleError("broken")
        return item

    results = in_turn(work, range(100), lambda item: 0, 2)
    assert next(results) == 0
    with pytest.raises(IncompatibleError, match="broken"):
        list(results)
    assert len(begun) < 10


def test_what_is_done_waits_for_its_turn_two_for_each_worker_at_most() -> None:
    ahead: list[int] = []

    def work(item: int) -> int:
        if item:
            ahead.append(item)
        else:
            time.sleep(0.3)  # the others could all be done in that time
            assert len(ahead) < 4
        return item

    assert list(in_turn(work, range(40), lambda item: 0, 2)) == list(range(40))
