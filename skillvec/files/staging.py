"""Where output is made before it has its name: one folder beside it, a lock, a journal, one rename.

Hides what outlives a process. A run that is cut off leaves the folder; its journal says what is
done, each line written when the bytes that it speaks of are on the disk. The same command goes on
from there. A folder of another command, or of inputs that have changed, is refused.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from skillvec.errors import (
    FormatError,
    IncompatibleError,
    OutputError,
    SkillvecError,
    TransferError,
    UsageError,
    VerificationError,
)
from skillvec.files.journal import JOURNAL, KEPT, OTHER, OWNER, Journal, explain_refusal, read_lines
from skillvec.files.output_file import explain, explained, fsync_path

STAGING_SUFFIX = ".skillvec-unfinished"
# after these the same command fails again: what was done is of no use
FINAL = (FormatError, IncompatibleError, VerificationError)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # two numbers on macOS


@dataclass
class Staging:
    """A folder beside the output in which everything is made before one rename publishes it.

    `deliver` takes what was made where that is not a rename; `resumed` are the jobs that an
    interrupted run had done.
    """

    output: Path
    folder: Path
    force: bool
    deliver: Callable[[Path], None] | None = None
    journal: Journal | None = None
    resumed: int = 0
    published: str = ""  # what there is to say of the output, once it has its name
    _old: bool = False  # whether the folder holds what a power failure may bring back

    @property
    def made(self) -> Path:
        """The folder in which output is made; it is there."""
        made = self.folder / "made"
        made.mkdir(exist_ok=True)
        return made

    @property
    def _replaced(self) -> Path:
        return self.folder / KEPT

    def publish(self, source: Path) -> None:
        """Rename `source` (inside the folder) to the output, moving an old folder away first."""
        self.refuse_existing()
        for folder in (source, *source.rglob("*")):
            if folder.is_dir():
                fsync_path(os.fspath(folder))
        if self.deliver is not None:
            self.deliver(source)
            self.published = "whole and in place"
            return
        with self.journal.laid_aside() if self.journal else contextlib.nullcontext():
            self._rename(source)
        self.published = "whole and in place, but its name may not survive a power failure"
        self._old = source.exists() or self._replaced.exists()
        fsync_path(os.fspath(self.output.parent))
        self.published, self._old = "whole and in place", False

    def _rename(self, source: Path) -> None:
        folders = source.is_dir() or self.output.is_dir()
        try:
            if not (folders and os.path.lexists(self.output) and _exchange(source, self.output)):
                if folders and os.path.lexists(self.output):
                    os.rename(self.output, self._replaced)
                os.rename(source, self.output)
        except OSError as error:
            self._restore()
            raise explain(error, os.fspath(self.output)) from None

    def refuse_existing(self) -> None:
        """Raise OutputError where another run has published meanwhile."""
        if not self.force and os.path.lexists(self.output):
            raise OutputError(f"{self.output}: exists now: another run made it meanwhile")

    def has_to_stay(self, error: BaseException) -> bool:
        """Return whether the folder is of use after an error.

        It is where the same command may go on, and where it holds the output that was replaced,
        while a power failure may bring that back.
        """
        if self.published:
            return self._old
        claims = self.journal is not None and self.journal.has_claims
        return claims and _may_pass(error)

    def clear(self) -> None:
        """Empty the folder; an output that was moved away and never replaced goes back."""
        self._restore()
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _restore(self) -> None:
        if self._replaced.exists() and not os.path.lexists(self.output):
            os.rename(self._replaced, self.output)


def staging_of(output: Path) -> Path:
    """Return the folder beside an output in which it is made."""
    return output.parent / f".{output.name}{STAGING_SUFFIX}"


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, TransferError) or not isinstance(error, FINAL)


def _exchange(source: Path, output: Path) -> bool:
    """Swap two folders in one step, so that no kill finds the name empty; False if unsupported."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(source), here, os.fsencode(output), swap) == 0)


def _owned(folder: Path) -> str:
    """Return who works in a folder, as its owner has written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['start']}"
    return "it has only just begun"


def _lock(output: Path, folder: Path) -> int:
    """Return a descriptor that holds the lock on the folder; OutputError where another has it."""
    with explained(os.fspath(folder)):
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise BlockingIOError  # the run that held it has just removed it
    except OSError as error:
        os.close(lock)
        if error.errno in NO_LOCKS:
            raise OutputError(
                f"{folder}: this file system has no locks, so two runs could mix: write elsewhere"
            ) from None
        raise OutputError(
            f"{output}: another run is writing it: {_owned(folder)} (lock on {folder})"
        ) from None
    return lock


@contextlib.contextmanager
def staging(
    output: Path,
    force: bool = False,
    request: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    deliver: Callable[[Path], None] | None = None,
) -> Iterator[Staging]:
    """Yield the staging folder of `output`: fresh, or as an interrupted run has left it.

    The folder is named `.NAME.skillvec-unfinished` and locked while a run works in it, so a second
    run with the same output is refused and an abandoned folder is recognised. With `request`, what
    is asked, and `inputs`, what is read, there is a journal: the folder then stays after an error
    that may pass (a full disk, Ctrl-C), if the journal claims anything. Else it is removed
    whatever happens. Raises OutputError; UsageError where the folder is of another request.
    """
    folder = staging_of(output)
    lock = _lock(output, folder)
    stage = Staging(output, folder, force, deliver)
    kept = False
    try:
        kept = True  # until it is known to be of this request
        if request is not None:
            stage.journal = Journal(folder, request, inputs or {})
        elif read_lines(folder / JOURNAL)[0]:
            raise UsageError(explain_refusal(folder, *OTHER))
        kept = False
        if stage.journal is None or not stage.journal.has_claims:
            stage.clear()
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": platform.node(), "start": start}
        (folder / OWNER).write_text(json.dumps(owner))
        stage.refuse_existing()
        yield stage
    except BaseException as error:
        refused, kept = kept, kept or stage.has_to_stay(error)
        told = _told(error, stage, kept and not refused)
        if told is error:
            raise
        raise told from None
    finally:
        if not kept:
            _removed(stage)
        os.close(lock)


def _told(error: BaseException, stage: Staging, kept: bool) -> BaseException:
    """Return the error with what became of the output, and of what is done, in its text."""
    hint = ""
    if stage.published:
        hint = f"{stage.output.name if stage.deliver else stage.output}: {stage.published}"
    elif kept and _may_pass(error):
        hint = f"what is done is kept in {stage.folder}: the same command goes on from it"
    if isinstance(error, OSError) and not isinstance(error, SkillvecError):
        if stage.published:
            return OutputError(f"{hint} ({error.strerror or error})")
        error = explain(error, os.fspath(error.filename or stage.output))
    if hint and isinstance(error, KeyboardInterrupt):
        error.args = (hint if stage.published else f"nothing was published; {hint}",)
    elif hint and isinstance(error, SkillvecError):
        error.args = (f"{error}\n{hint}",)
    return error


def _removed(stage: Staging) -> None:
    """Remove the folder; a disk that does not let us has been complained of already."""
    with contextlib.suppress(OSError):
        stage.clear()
        stage.folder.rmdir()
        if stage.deliver is not None:
            stage.folder.parent.rmdir()
