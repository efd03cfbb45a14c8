"""The studies of a search: which trials there are, who runs which, and which of them count.

Hides Optuna. Several processes may ask one storage; Optuna gives each its own trial, and what a
process that died was at is tried again. A trial counts if it is complete, or failed for a reason
that it names. The seed of a trial is that of the search with its number, so a search that goes on
does not draw its first points again.
"""

import io
import os
import pickle
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from skillvec.errors import FormatError, SkillvecError, UsageError, needs, printable
from skillvec.trials.spaces import Dimension, Range

BEAT, GRACE = 10, 60  # seconds: a process says that it lives; it is taken for dead
LOOK = 1  # seconds until one that waits for others looks again
FEWEST = 5  # trials of which all have failed are enough
SAMPLERS = ("tpe", "cmaes", "random")
OPTIMIZER = "cma:optimizer"  # begins the attributes in which Optuna keeps the state of CMA-ES
STATE = {
    ("cmaes._cma", "CMA"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
}  # fmt: skip
WHY = "why"  # of a trial that failed and counts: the attribute that says it

Point = Mapping[str, Any]
Found = tuple[Sequence[float], Mapping[str, Any]]  # what a trial is told, and its attributes


class FailedError(Exception):
    """A trial that has no value, and why; the search goes on."""


class _NotMineError(Exception):
    """A trial that was asked for beyond the budget, while other processes asked too."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from talking of every trial, and of what is experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(url: str) -> Any:
    """Return Optuna's storage at a URL of SQLAlchemy; UsageError where it cannot be opened."""
    with needs("search", "a search"):
        import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with quiet():
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=BEAT, grace_period=GRACE,
                heartbeat_stale_trial_callback=_try_again,
            )  # fmt: skip
    except (ImportError, RuntimeError, ValueError, LookupError, SQLAlchemyError,
            optuna.exceptions.OptunaError) as error:  # fmt: skip
        said = str(error).partition("\n")[0]  # the URL, which may hold a password, is not said
        raise UsageError(f"storage: Optuna cannot open it: {printable(said)}") from None


def sqlite_url(path: Path) -> str:
    """Return the URL of a database on this disk; Optuna fills in what stands in braces."""
    if "?" in os.fspath(path.absolute()):
        raise UsageError(f"output {path.parent}: the URL of a database cannot hold its ?")
    text = os.fspath(path.absolute()).replace("{", "{{").replace("}", "}}")
    return f"sqlite:///{text}"


def _try_again(study: Any, trial: Any) -> None:
    """Put the point of a dead process back."""
    study.enqueue_trial(trial.params)


class _Optimizer(pickle.Unpickler):
    """Loads the state of CMA-ES that Optuna keeps in a storage, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STATE:
            raise FormatError(
                f"the storage holds a state of CMA-ES with {module}.{name} in it, which would be"
                " run; Optuna writes none like it: the storage is not to be trusted"
            )
        return super().find_class(module, name)


def refuse_foreign_states(study: Any, checked: set[int]) -> None:
    """Raise FormatError for a state of CMA-ES that is more than that; Optuna loads any pickle."""
    for trial in study.get_trials(deepcopy=False):
        parts = {key: v for key, v in trial.system_attrs.items() if key.startswith(OPTIMIZER)}
        if parts and trial.number not in checked:
            text = "".join(parts[f"{OPTIMIZER}:{i}"] for i in range(len(parts)))
            _Optimizer(io.BytesIO(bytes.fromhex(text))).load()
            checked.add(trial.number)


def make_sampler(name: str, seed: int) -> Any:
    """Return a sampler that draws each trial's numbers from the seed and the trial's number."""
    with needs("search", "a search"):
        import optuna

        if name == "cmaes":
            import_module("cmaes")

    def make(seed: int) -> Any:
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        kind: Any = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        return kind[name](seed=seed)

    checked: set[int] = set()

    class Seeded(optuna.samplers.BaseSampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            if name == "cmaes":
                refuse_foreign_states(study, checked)
            own = zlib.crc32(f"{seed}:{study.study_name}:{trial.number}".encode())
            self.inner = make(own)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, *rest: Any) -> Any:
            return self.inner.sample_independent(study, trial, *rest)

        def after_trial(self, study: Any, trial: Any, *rest: Any) -> None:
            self.inner.after_trial(study, trial, *rest)

    return Seeded()


@dataclass(frozen=True)
class Study:
    """A study of Optuna, with its dimensions and the number of trials that it may have."""

    study: Any
    dimensions: Mapping[str, Dimension]
    budget: int

    @classmethod
    def open(cls, storage: Any, name: str, dimensions: Mapping[str, Dimension], budget: int,
             sampler: Any, minimized: Sequence[bool] = (False,)) -> "Study":  # fmt: skip
        """Return a study of a storage, made if it is not there yet."""
        import optuna

        directions: Any = ["minimize" if down else "maximize" for down in minimized]
        with quiet():
            study = optuna.create_study(storage=storage, study_name=name, sampler=sampler,
                                        directions=directions, load_if_exists=True)  # fmt: skip
        return cls(study, dimensions, budget)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of the study itself."""
        return dict(self.study.user_attrs)

    def start_at(self, point: Point) -> None:
        """Have a point tried first, unless there is any trial."""
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(dict(point), skip_if_exists=True)

    def trials(self) -> list[Any]:
        """Return what counts and has ended, in the order of the trials."""
        return [t for t in self.study.get_trials(deepcopy=False) if _is_counted(t)]

    def complete(self) -> list[Any]:
        """Return the trials that have values."""
        return [trial for trial in self.trials() if trial.values is not None]

    def run_one(self, measure: Callable[[Point], Found]) -> bool:
        """Run one trial, if one is left that nobody is at; return whether there was.

        Raises SkillvecError where the first trials have all failed.
        """
        import optuna

        with quiet():
            optuna.storages.fail_stale_trials(self.study)
        if self._count_claimed() >= self.budget:
            return False
        asked: list[Any] = []
        wrong: list[Exception] = []

        def objective(trial: Any) -> Sequence[float]:
            asked.append(trial)
            if self._count_claimed(before=trial.number) >= self.budget:
                raise _NotMineError
            point = {name: _suggest(trial, name, d) for name, d in self.dimensions.items()}
            try:
                values, said = measure(point)
            except FailedError as error:
                trial.set_user_attr(WHY, str(error))
                raise
            except Exception as error:
                wrong.append(error)
                raise
            for key, value in said.items():
                trial.set_user_attr(key, value)
            return values

        try:
            with quiet():
                self.study.optimize(objective, n_trials=1, catch=(FailedError, _NotMineError))
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # Another process took this one for dead, and has the point tried again
            states = {t.number: t.state for t in self.study.get_trials(deepcopy=False)}
            if wrong or not asked or states[asked[0].number] != optuna.trial.TrialState.FAIL:
                raise
        self._refuse_failures()
        return True

    def finish(self, measure: Callable[[Point], Found], say: Callable[[str], None]) -> None:
        """Run what is left, wait for what other processes are at, and take over from dead ones."""
        said = False
        while len(self.trials()) < self.budget:
            if self.run_one(measure):
                continue
            if not said:
                say(f"waiting for trials that other processes are at, or were a minute ago"
                    f" ({self.study.study_name})")  # fmt: skip
                said = True
            time.sleep(LOOK)

    def _count_claimed(self, before: int | None = None) -> int:
        """Return how many trials count or are being run, of those with a lower number."""
        from optuna.trial import TrialState

        return sum(
            _is_counted(trial) or trial.state == TrialState.RUNNING
            for trial in self.study.get_trials(deepcopy=False)
            if before is None or trial.number < before
        )

    def _refuse_failures(self) -> None:
        ended = self.trials()
        if len(ended) == FEWEST and not self.complete():
            raise SkillvecError(
                f"the first {FEWEST} trials have all failed, the last because"
                f" {ended[-1].user_attrs[WHY]}\n(a search with another evaluator or space is"
                " another search: give it another output)"
            )


def _is_counted(trial: Any) -> bool:
    from optuna.trial import TrialState

    failed = trial.state == TrialState.FAIL and WHY in trial.user_attrs
    return bool(trial.state == TrialState.COMPLETE or failed)


def _suggest(trial: Any, name: str, dimension: Dimension) -> Any:
    if not isinstance(dimension, Range):
        return trial.suggest_categorical(name, dimension)
    suggest = trial.suggest_int if dimension.whole else trial.suggest_float
    return suggest(name, dimension.low, dimension.high, log=dimension.log)
