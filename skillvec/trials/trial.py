"""One target that is tried with many vectors: loaded once, evaluated at one point after the other.

Hides the model: it is in memory once, vectors are attached to it in place, and whatever an
evaluation does (an exception, no end, no number, other weights), the next point finds the target as
it lies on the disk. An evaluator that takes folders is given merged weights in a scratch folder,
one at a time.
"""

import gc
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict, Unpack

import numpy as np

from skillvec.checkpoints.fingerprint import probe_digest
from skillvec.engine.outputs import free_nbytes
from skillvec.errors import (
    NonfiniteError,
    OutputError,
    SkillvecError,
    UsageError,
    VerificationError,
    needs,
)
from skillvec.files.file import digest_bytes
from skillvec.ops.svd import resolve_device
from skillvec.trials.loading import fetch, load_target, open_target, open_tokenizer
from skillvec.trials.scores import ALL, Evaluator, Scores, not_finite, refuse_split
from skillvec.trials.watch import Attributes, Watch, surroundings
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import apply
from skillvec.verbs.live import Live, attach

DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"
CHANGED, NOT_A_NUMBER = "changed the model", "not a number"
SCRATCH = "skillvec-trial"  # how folders in scratch begin; host, process and letters follow
AGAIN_SECONDS = 15.0  # after the end of the time; more than a command has to end in
BURST_SECONDS = 1e-4  # from one to the next then
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Outcome:
    """What came of one point.

    `status` is DONE, or why there are no scores, with `message`; NOT_A_NUMBER keeps those that are
    numbers. `seconds` are those of the evaluation, `attach_seconds` those before it, in which the
    vector was attached or a folder written. `gain`, `cosine` and `changed` are of the rounded
    result, as `apply` reports them; None without a vector.
    """

    status: str
    message: str = ""
    scores: Scores = field(default_factory=dict)
    seconds: float = 0.0
    gain: float | None = None
    cosine: float | None = None
    changed: int | None = None
    attach_seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.status == DONE


class Applied(TypedDict, total=False):
    """Options of `apply` and `attach` that hold for every point."""

    rounding: str
    seed: int
    include: Sequence[str]
    exclude: Sequence[str]
    rename: Sequence[str]
    rows: str
    workers: int | None


class Trials:
    """A target and an evaluator, for `run` at any number of points; as a context it ends both.

    `timeout` is in seconds, of one evaluation, and needs the main thread. It cannot end native code
    that does not come back. `dtype` is transformers' name, "auto" that of the target; `device`
    auto, cpu, cuda or cuda:N. `scratch` is where an evaluator that takes folders finds them.
    `applied` as of `apply`. What an evaluation leaves behind is put back or marks its point
    (trials/watch.py says what). An os._exit in it ends this process, though, and a thread that goes
    on may change the model of later points; if it is no daemon, Python waits for it at the end.
    Raises UsageError and OutputError for what cannot work, before any model is loaded; that happens
    at the first point.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        evaluator: Evaluator,
        *,
        scratch: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **applied: Unpack[Applied],
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise UsageError(f"timeout {timeout}: expected seconds, more than 0")
        if dtype not in ("auto", *DTYPES):
            raise UsageError(f"dtype {dtype}: expected auto, {', '.join(DTYPES)}")
        self._point = open_target(os.fspath(target))
        self._evaluator, self._timeout, self._applied = evaluator, timeout, applied
        self._dtype, self._device = dtype, ""
        self._scratch = Path(scratch or tempfile.gettempdir())
        self._model: Any = None
        self._tokenizer: Any = None
        self._live: Live | None = None
        self.load_seconds: float | None = None
        if evaluator.takes_folder:
            if not self._point.is_folder:
                raise UsageError(f"target {target}: {evaluator.spec} needs a folder, not a file")
            self._refuse_scratch()
        else:
            self._tokenizer = self._find_tokenizer()
            with needs("hf", "loading a model to evaluate it"):
                import torch  # noqa: F401, or the next line asked for less than is needed
            self._device = resolve_device(device or "auto")
        evaluator.check(os.fspath(self._point.folder))

    @property
    def target_digest(self) -> str:
        """A digest of samples of the weights, of config and tokenizer."""
        point = self._point
        parts = (probe_digest(point), point.config_digest, point.tokenizer_digest)
        return digest_bytes(" ".join(map(str, parts)).encode())

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back; a later `run` loads it again."""
        if self._live is not None:
            with suppress(VerificationError):  # of weights that are given up
                self._live.detach()
        if self._model is not None:
            self._live = self._model = None
            gc.collect()  # before another one is loaded

    def run(self, vector: SkillVector | None, lam: float = 1.0, split: str = ALL) -> Outcome:
        """Evaluate target + lam * vector, or the target itself where there is no vector.

        Random numbers begin at `seed` for each point, so that none depends on those before it. What
        the evaluation does wrong is in the outcome, and so is a vector that gives values that are
        not finite at this lam. Raises UsageError for a split that the evaluator does not have, and
        IncompatibleError for a vector that does not fit the target.
        """
        refuse_split(split, self._evaluator.splits, self._evaluator.spec)
        if self._timeout and threading.current_thread() is not threading.main_thread():
            raise UsageError("a timeout needs the main thread, which alone gets the signal of it")
        run = self._run_folder if self._evaluator.takes_folder else self._run_live
        try:
            outcome = run(vector, lam, split)
        except NonfiniteError as error:
            outcome = Outcome(FAILED, str(error))
        return replace(outcome, message=" ".join(outcome.message.split()))

    # ------------------------------------------------------------------------ in memory

    def _run_live(self, vector: SkillVector | None, lam: float, split: str) -> Outcome:
        model, begun = self._loaded(), time.perf_counter()
        try:
            self._attach(model, vector, lam)
        except VerificationError:  # by an evaluation, in a way that its samples did not show
            del model
            self.close()
            model, begun = self._loaded(), time.perf_counter()
            self._attach(model, vector, lam)
        attached = time.perf_counter() - begun
        watch = Watch(model)
        with self._tokenizer_kept():
            outcome = self._evaluate(model, split)
        outcome = replace(outcome, attach_seconds=attached, **self._facts(vector))
        if found := watch.find_changes(model):
            said = f"the evaluation changed the model, which is loaded again: {found}"
            if outcome.status in (DONE, NOT_A_NUMBER):
                outcome = replace(outcome, status=CHANGED, message=said, scores={})
            else:
                outcome = replace(outcome, message=f"{outcome.message}; {said}")
            del model, watch
            self.close()
        else:
            watch.restore()
        return outcome

    def _loaded(self) -> Any:
        if self._model is None:
            begun = time.perf_counter()
            self._model = load_target(self._point, self._dtype, self._device)
            if self.load_seconds is None:
                self.load_seconds = time.perf_counter() - begun
        return self._model

    def _attach(self, model: Any, vector: SkillVector | None, lam: float) -> None:
        """Bring the model to target + lam * vector; VerificationError where it is another one."""
        if vector is None:
            if self._live is not None:
                self._live.detach()
        elif self._live is None:
            self._live = attach(model, vector, lam=lam, **self._applied)
        else:
            self._live.set(vector, lam=lam)

    def _facts(self, vector: SkillVector | None) -> dict[str, Any]:
        facts = self._live.report.facts if self._live is not None and vector is not None else {}
        return {name: facts.get(name) for name in ("gain", "cosine", "changed")}

    def _find_tokenizer(self) -> Any:
        """Return the tokenizer, None where there is none and the evaluator can do without."""
        try:
            return open_tokenizer(self._point)
        except UsageError:
            if getattr(self._evaluator, "needs_tokenizer", True):
                raise
            return None

    @contextmanager
    def _tokenizer_kept(self) -> Iterator[None]:
        """Put back a tokenizer's attributes, and read it anew where it has got other tokens."""
        if self._tokenizer is None:
            yield
            return
        attributes, tokens = Attributes(self._tokenizer), _tokens(self._tokenizer)
        yield
        attributes.restore()
        if _tokens(self._tokenizer) != tokens:
            self._tokenizer = self._find_tokenizer()

    # --------------------------------------------------------------------------- folders

    def _run_folder(self, vector: SkillVector | None, lam: float, split: str) -> Outcome:
        if vector is None:
            return self._evaluate(os.fspath(self._point.folder), split)
        begun = time.perf_counter()
        name = f"{SCRATCH}-{socket.gethostname()}-{os.getpid()}-"
        place = Path(tempfile.mkdtemp(prefix=name, dir=self._scratch))
        try:
            merged = place / "merged"
            dtype = DTYPES.get(self._dtype)
            facts = apply(self._point, vector, merged, lam=lam, dtype=dtype, **self._applied).facts
            written = time.perf_counter() - begun
            outcome = self._evaluate(os.fspath(merged), split)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        facts = {name: facts[name] for name in ("gain", "cosine", "changed")}
        return replace(outcome, attach_seconds=written, **facts)

    def _refuse_scratch(self) -> None:
        """Refuse a scratch folder without room for a model; remove what killed runs left there."""
        fetch(self._point)
        if not self._scratch.is_dir():
            raise UsageError(f"scratch {self._scratch}: no such folder")
        for left in self._scratch.glob(f"{SCRATCH}-{socket.gethostname()}-[0-9]*-*"):
            if not _is_running(int(left.name.split("-")[-2])):
                shutil.rmtree(left, ignore_errors=True)
        free = free_nbytes(self._scratch)
        if free is not None and free < self._point.nbytes:
            raise OutputError(
                f"scratch {self._scratch}: a merged model of {self._point.nbytes:,} bytes does not"
                f" fit: {free:,} are free there"
            )

    # ------------------------------------------------------------------------ evaluation

    def _evaluate(self, model: Any, split: str) -> Outcome:
        """Return what an evaluation gives, whatever it does."""
        begun = time.perf_counter()
        try:
            with _seeded(self._applied.get("seed", 0), model), _time_limit(self._timeout):
                scores = self._call(model, split)
            status, message = DONE, ""
        except _ExpiredError:
            status, message, scores = TIMED_OUT, "", {}
        except (Exception, SystemExit, GeneratorExit) as error:
            ours = isinstance(error, SkillvecError)
            said = str(error) if ours else f"{type(error).__name__}: {error}"
            status, message, scores = FAILED, said, {}
        seconds = time.perf_counter() - begun
        if self._timeout is not None and (status == TIMED_OUT or seconds > self._timeout):
            # an evaluator may have caught what ends it
            status, scores = TIMED_OUT, {}
            message = f"the evaluation took longer than {self._timeout:g} s"
        elif bad := not_finite(scores):
            status, message = NOT_A_NUMBER, f"not finite: {', '.join(bad[:5])}"
            scores = {name: score for name, score in scores.items() if name not in bad}
        return Outcome(status, message, scores, seconds)

    def _call(self, model: Any, split: str) -> Scores:
        """Call the evaluator; a child process that comes out of it ends, with 1 for an error."""
        process = os.getpid()
        try:
            return self._evaluator.evaluate(model, self._tokenizer, split)
        finally:
            if os.getpid() != process:
                os._exit(int(sys.exc_info()[0] is not None))


def _tokens(tokenizer: Any) -> tuple[int, str]:
    return len(tokenizer), str(getattr(tokenizer, "added_tokens_decoder", ""))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's runs
    return True


class _ExpiredError(BaseException):
    """The time of an evaluation is over; no Exception, which evaluators may catch."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise _ExpiredError in the evaluator when the time is over; needs the main thread.

    An evaluator that goes on has caught it: AGAIN_SECONDS later, when all that it had to tidy is
    tidied, it is raised over and over, until it falls on a step outside of what catches it.
    """
    if seconds is None:
        yield
        return
    has_fired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal has_fired
        while frame is not None and frame.f_code is not Trials._call.__code__:
            frame = frame.f_back
        if frame is None:
            return  # too late: what ends the block would be left undone
        if has_fired:
            signal.setitimer(signal.ITIMER_REAL, BURST_SECONDS)  # once: none within this one
        has_fired = True
        raise _ExpiredError

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _seeded(seed: int, model: Any) -> Iterator[None]:
    """Let random numbers of Python, numpy and torch begin at a seed; outside they go on.

    What else the process has one of is put back too. A program that is given a folder has its own.
    """
    if isinstance(model, str):
        yield
        return
    import torch

    kept: list[tuple[Callable[[Any], Any], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        *surroundings(),
    ]
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    with torch.random.fork_rng([*devices]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for restore, state in kept:
                restore(state)
