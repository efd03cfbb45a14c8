"""What files of the Hub and of object stores share: retries, heads, names, a few at once.

Hides how often and how long something is tried again: what an error means is for whoever asked.
The first MiB of a file is asked for once. Listings are hostile until checked: a name that is no
relative path, or a size that cannot be, is refused.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TypeVar

from skillvec.errors import FormatError, SkillvecError
from skillvec.files.weight_files import is_weight_file

# files at the root that say what a model is: configs, indexes, tokenizers, templates, card, licence
DESCRIBING, DESCRIBING_NBYTES = (".json", ".jinja", ".txt", ".model", ".md", ""), 64 << 20
HEAD_NBYTES = 1 << 20  # fetched at the first read: length prefix and header are one request
AT_ONCE = 4  # files that are fetched or sent
Told = Callable[[int], None]  # takes the bytes received so far
Judge = Callable[[Exception, int], float]
Result = TypeVar("Result")


# --------------------------------------------------------------------------------------- retries


class Patience:
    """Waits between tries, and counts them: `failures` in a row.

    `judge` takes an error and the failures with it, and returns the seconds to wait before another
    try, or raises: the error of ours that it means, where another is of no use or was the last.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, self.failures = judge, 0

    def bear(self, error: Exception) -> None:
        """Wait before another try, or raise."""
        self.failures += 1
        time.sleep(self.judge(error, self.failures))


def retry(call: Callable[[], Result], judge: Judge) -> Result:
    """Return what `call` gives, tried again for as long as `judge` (see `Patience`) has it."""
    patience = Patience(judge)
    while True:
        try:
            return call()
        except Exception as error:
            patience.bear(error)


def seconds_after(failures: int) -> float:
    """Return the seconds to wait after so many failures where the place says nothing of it."""
    return float(2 ** (failures - 1))


# --------------------------------------------------------------------------------------- listings


def is_plain(name: str) -> bool:
    """Return whether a name, relative and with slashes, stays in its folder on every system."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def describes(name: str, nbytes: int) -> bool:
    """Return whether a file is a small one at the root that says what the model is."""
    suffix = PurePosixPath(name).suffix
    return "/" not in name and suffix in DESCRIBING and nbytes <= DESCRIBING_NBYTES


def is_replaced(name: str) -> bool:
    """Return whether a new model at the same place leaves no room for an old file of this name.

    So it is for weights and describing files at the root; hidden files and folders stay.
    """
    plain = "/" not in name and not name.startswith(".")
    return plain and (PurePosixPath(name).suffix in DESCRIBING or is_weight_file(name))


def check_listed(what: str, kind: str, who: str, name: object, nbytes: object) -> None:
    """Raise FormatError for an entry of a listing that cannot be: its name or its size.

    `kind` ("a file") and `who` ("the Hub") are words of the sentences.
    """
    if type(name) is not str or not is_plain(name):
        raise FormatError(f"{what}: {kind} named {str(name)[:200]!r}: no relative path")
    if type(nbytes) is not int or nbytes < 0:
        raise FormatError(f"{what}: {name}: {who} says no size that can be: {nbytes!r}")


# ------------------------------------------------------------------------------------------ files


class ReadByRange(ABC):
    """A remote file of which ranges are asked for (file.RemoteFile)."""

    nbytes: int

    @property
    @abstractmethod
    def address(self) -> str:
        """What names it in plans and errors."""

    @abstractmethod
    def request(self, begin: int, end: int) -> bytes:
        """Return bytes begin..end, which lie in the file and are one or more."""

    def read_range(self, offset: int, nbytes: int) -> bytes:
        """Return some bytes by range requests; the first MiB is asked for once.

        Raises FormatError for bytes beyond its end, and what `request` raises.
        """
        end, head = offset + nbytes, b""
        if not 0 <= offset <= end <= self.nbytes:
            raise FormatError(f"{self.address}: bytes {offset} to {end} of {self.nbytes}")
        if offset < HEAD_NBYTES:
            head = _head_of(self)[offset:end]
        at = offset + len(head)
        return head + self.request(at, end) if at < end else head


@lru_cache(maxsize=16)  # not all shards of a large model at a time
def _head_of(file: ReadByRange) -> bytes:
    return file.request(0, min(HEAD_NBYTES, file.nbytes)) if file.nbytes else b""


def side_by_side(calls: Sequence[Callable[[Told], object]], told: Told) -> None:
    """Run calls, a few at once; `told`, in this thread, gets the sum of the bytes they tell of.

    After an error, or an interrupt, the others end by an exception when they next tell.
    """
    from concurrent.futures import ThreadPoolExecutor, wait  # with logging

    stopped, moved = threading.Event(), [0] * len(calls)

    def run(number: int) -> None:
        def telling(nbytes: int) -> None:
            moved[number] = nbytes
            if stopped.is_set():
                raise SkillvecError("given up, because another file failed")

        calls[number](telling)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(run, number) for number in range(len(calls))}
        try:
            while running:
                done, running = wait(running, 0.1, "FIRST_EXCEPTION")
                for future in done:
                    future.result()
                told(sum(moved))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
