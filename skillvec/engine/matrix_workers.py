"""Matrices one for each worker at a time, while their copies fit into the memory that is free."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

from skillvec.engine.threads import one_blas_thread
from skillvec.files.output_file import available_memory_nbytes
from skillvec.ops.svd import settled

if TYPE_CHECKING:
    from concurrent.futures import Future

Item = TypeVar("Item")
Result = TypeVar("Result")
COPIES = 3  # of a matrix, that stand in memory while it is decomposed
SHARE = 4  # of the memory that is free, one part in so many may be taken by matrices


def at_once_nbytes(sizes: Iterable[int], workers: int) -> int:
    """Return the most memory that `in_turn` takes for matrices of these sizes, in bytes."""
    largest = sorted(sizes, reverse=True)[:workers]
    alone = COPIES * max(largest, default=0)
    return max(alone, min(COPIES * sum(largest), available_memory_nbytes() // SHARE))


def in_turn(
    work: Callable[[Item], Result], items: Iterable[Item], nbytes_of: Callable[[Item], int],
    workers: int, around: Callable[[], AbstractContextManager[object]] = settled, ahead: int = 2,
) -> Generator[Result, None, None]:  # fmt: skip
    """Yield work(item) in the order of the items: up to `workers` at a time, one thread each.

    `nbytes_of` is the size of an item's matrix: several are at work while their copies fit into a
    quarter of the memory that is free. What is done waits for its turn, `ahead` for each worker at
    most. `around` is entered by every thread, and numpy's products have one thread each: with more
    they round otherwise. The first error ends it.
    """
    from concurrent.futures import ThreadPoolExecutor, wait  # with logging

    room = available_memory_nbytes() // SHARE
    waiting: deque[tuple[Future[Result], int]] = deque()

    def is_full(more: int) -> bool:
        taken = [nbytes for future, nbytes in waiting if not future.done()]
        busy = len(taken) >= workers or (taken and COPIES * (sum(taken) + more) > room)
        return bool(busy) or len(waiting) >= ahead * workers

    def alone(item: Item) -> Result:
        with around():
            return work(item)

    with one_blas_thread(), around(), ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                nbytes = nbytes_of(item)
                while is_full(nbytes):
                    if waiting[0][0].done():
                        yield waiting.popleft()[0].result()
                    else:
                        wait([f for f, _ in waiting if not f.done()], return_when="FIRST_COMPLETED")
                waiting.append((pool.submit(alone, item), nbytes))
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()
