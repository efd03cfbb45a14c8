"""attach: target + lam * vector, in a model that is loaded; detach: its own bits again."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from types import TracebackType
from typing import Any, Self

import numpy as np

from skillvec.checkpoints.live_model import LiveModel, see_model, unwrapped
from skillvec.checkpoints.live_tensors import LiveTensor, put_all_back
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.jobs.live import LiveJob
from skillvec.engine.outputs import PathLike
from skillvec.engine.plan import JobResult, Plan
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan, run_plan, show_plan
from skillvec.errors import IncompatibleError, UsageError, VerificationError, up_to_five
from skillvec.files.file import LEAF_NBYTES
from skillvec.ops.block import block_count
from skillvec.report import Report, Watcher
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.recipe import leaving_out, selection
from skillvec.vectors.vector import SkillVector
from skillvec.verbs._apply import find_unused, plan_request, refuse_request, report_apply
from skillvec.verbs.findings import refuse_nonfinite
from skillvec.verbs.reprs import cut

CLAIMING = threading.Lock()  # held while a model is marked
MARK = "_skillvec_live"  # of modules that have a vector attached: their Live
Vector = PathLike | SkillVector
Lam = float | Sequence[float]


def attach(
    model: Any,
    *vectors: Vector,
    lam: Lam = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    allow_nonfinite: bool = False,
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> "Live":
    """Change the parameters of a loaded `model` to target + lam * vector, where they lie.

    They are bit for bit what `apply` writes for that model, whose other options this takes, such as
    `rounding` and `seed`. Several `vectors` are added as one linear combination, in one rounding:
    `lam` is one number, by which their sum is multiplied, or their weights in it. What brings the
    original bits back is kept in memory, packed. Use it in a with statement, or call `detach`. An
    error, or Ctrl-C, leaves the original bits. Raises UsageError where a vector is attached
    already, IncompatibleError for parameters that cannot be changed where they lie (on the meta
    device, offloaded, quantised, in parts) and as apply.
    """
    if not vectors:
        raise UsageError("attach needs a vector")
    live = Live(
        model, include=include, exclude=exclude, rename=rename, rows=rows,
        allow_nonfinite=allow_nonfinite, workers=workers, watcher=watcher,
    )  # fmt: skip
    live.set(*vectors, lam=lam, rounding=rounding, seed=seed)
    return live


class Live:
    """Vectors attached to a model; a context manager that detaches them.

    `report` is that of the last `set`. `lock` is held while parameters change.
    """

    report: Report

    def __init__(
        self, model: Any, *, include: Sequence[str] = (), exclude: Sequence[str] = (),
        rename: Sequence[str] = (), rows: str = "strict", allow_nonfinite: bool = False,
        workers: int | None = None, watcher: Watcher | None = None,
    ) -> None:  # fmt: skip
        self.lock = threading.RLock()
        self._module = unwrapped(model)
        self._run = Run.by("threads", workers, watcher=watcher)
        self._rename, self._left_out = rename, leaving_out(include, exclude)
        self._chosen: dict[str, Any] = {**selection(include, exclude, rename, rows)}
        self._chosen |= {"allow_nonfinite": True} if allow_nonfinite else {}
        self._model: LiveModel | None = None
        # the last vector with its plan, which holds at any lambda while the model is attached to
        self._planned: tuple[SkillVector, Plan, dict[str, Any]] | None = None
        self._is_measured = False  # the plan: at no lambda does an operator find anything else
        self._vectors: list[SkillVector] = []
        self._lam: float | tuple[float, ...] = 1.0
        self._rounding, self._seed = "nearest", 0

    def __repr__(self) -> str:
        said = " + ".join(f"{lam:g} * {cut(ref)}" for ref, lam in self.weights().items())
        many = f" ({len(self._vectors)} vectors)" if len(self._vectors) > 3 else ""
        return f"<Live {type(self._module).__name__}: {cut(said, 150) or 'nothing attached'}{many}>"

    @staticmethod
    def of(model: Any) -> "Live | None":
        """Return what is attached to a model, or to a part of it, None where nothing is."""
        marks = (module.__dict__.get(MARK) for module in unwrapped(model).modules())
        return next((m for m in marks if isinstance(m, Live) and m.is_attached), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.detach()

    def __reduce__(self) -> Any:
        """Stand for nothing in copies of the model, whose modules are marked with it."""
        return type(None), ()

    @property
    def is_attached(self) -> bool:
        return self._module.__dict__.get(MARK) is self

    def weights(self) -> dict[str, float]:
        """Return the lambda of each vector that is attached, by its ref."""
        found: dict[str, float] = {}
        if self.is_attached:
            each = _each(self._lam, len(self._vectors))
            for vector, lam in zip(self._vectors, each, strict=True):
                found[vector.ref] = found.get(vector.ref, 0.0) + lam * vector.scale
        return found

    def set(
        self, *vectors: Vector, lam: Lam | None = None, rounding: str | None = None,
        seed: int | None = None,
    ) -> Report:  # fmt: skip
        """Attach these vectors, or the same ones otherwise, in place of what is attached.

        It goes from the original parameters, never from the changed ones. Of vectors that are named
        `lam` is 1 if not said. What is refused before anything moves leaves all as it is; after any
        other error, and Ctrl-C, the model has its original bits and nothing attached. Raises as
        `attach`, and VerificationError as `detach`.
        """
        with self.lock:
            opened = [SkillVector.open(vector, rename=self._rename) for vector in vectors]
            opened = opened or self._vectors
            if not opened:
                raise UsageError("set needs a vector: none was attached before")
            if lam is None:
                lam = 1.0 if vectors else self._lam
            factors = _numbers(lam)
            vector, factor = _as_one(opened, factors)
            request = self._chosen | {
                "lam": factor, "dtype": None,
                "rounding": self._rounding if rounding is None else rounding,
                "seed": self._seed if seed is None else seed,
            }  # fmt: skip
            begun = self._model is None
            if begun:
                self._claim()
            try:
                model = self._model or see_model(self._module)
                plan, report = self._plan(model, vector, request)
                begun = True
                self._change(model, plan, report)
            except BaseException as error:
                lost = self._put_back() if begun or isinstance(error, VerificationError) else []
                if lost and isinstance(error, Exception):
                    raise _explain_lost(lost) from error
                raise
            self._vectors, self._lam = opened, factors
            self._rounding, self._seed = request["rounding"], request["seed"]
            self.report = report
            return report

    def _claim(self) -> None:
        """Mark the model's modules, of which no other thread may have attached anything since."""
        with CLAIMING:
            if Live.of(self._module) is not None:
                raise UsageError(
                    f"{type(self._module).__name__}: a vector is attached to it already:"
                    " Live.of(model) is what attach returned; its set changes it, its detach"
                    " ends it"
                )
            for module in self._module.modules():
                module.__dict__[MARK] = self

    def _plan(
        self, model: LiveModel, vector: SkillVector, request: dict[str, Any]
    ) -> tuple[Plan, Report]:
        """Plan an apply to the original parameters, and say what it will do; nothing moves."""
        model.refuse_unchangeable(find_unused(vector, self._left_out))
        if self._planned is None or self._planned[0] is not vector:
            self._planned = vector, *self._plan_anew(model, vector, request)
            self._is_measured = False
        refuse_request(vector, request)
        _, plan, described = self._planned
        plan = replace(
            plan, lam=request["lam"] * vector.scale, rounding=request["rounding"],
            seed=request["seed"],
        )  # fmt: skip
        touched = [(job.point, job.deltas[0]) for job in _moving(plan)]
        touched = [(point, delta) for point, delta in touched if not delta.is_zero]
        facts = {
            "formula": "MODEL + LAM * V", "target": model.facts, "vector": described,
            "name": vector.ref, "lineage": vector.dtypes, "lam": plan.lam,
            "rounding": plan.rounding,
            "seed": plan.seed if plan.rounding == "stochastic" else None,
            "verdict": plan.verdict, "touched_nbytes": sum(point.nbytes for point, _ in touched),
            "most_kept_nbytes": sum(_most_kept(*held, vector) for held in touched),
        }  # fmt: skip
        if plan.layout:
            facts["layout"] = plan.layout
        report = show_plan(replace(plan, jobs=_moving(plan)), facts, self._run)
        if not self._is_measured:
            plan = measure_plan(plan, self._run)
            self._planned, self._is_measured = (vector, plan, described), True
        return plan, report

    def _plan_anew(
        self, model: LiveModel, vector: SkillVector, request: dict[str, Any]
    ) -> tuple[Plan, dict[str, Any]]:
        """Return the plan of an apply as jobs in memory, and the vector as recipes describe it."""
        plan, recipe = plan_request(model, vector, request)
        if parted := [job.name for job in plan.jobs if job.name not in model]:
            raise IncompatibleError(
                f"{vector.ref}: it moves apart what {model.ref} holds as one parameter: load the"
                f" model with tie_word_embeddings=False, or use apply:\n{up_to_five(parted)}"
            )
        jobs = [LiveJob.of(job) if isinstance(job, AddJob) else job for job in plan.jobs]
        return replace(plan, verb="attach", jobs=jobs, outputs=[], texts={}), recipe["vector"]

    def _change(self, model: LiveModel, plan: Plan, report: Report) -> None:
        """Write what a plan gives in place of the original parameters, or of what is attached."""
        self._model, moving = model, _moving(plan)
        names = {job.name for job in moving}
        held = self._tensors()
        left = [tensor for tensor in held if tensor.kept.records and tensor.name not in names]
        if lost := put_all_back(left, self._run.engine.workers):
            raise _explain_lost(lost)
        for tensor in held:
            tensor.kept.is_closed = False
        found = {r.job: r for r in run_plan(replace(plan, jobs=moving), self._run)}
        refuse_nonfinite([*found.values()], self._chosen.get("allow_nonfinite", False))
        none = np.zeros(0)  # of tensors that nothing is added to, and that are not read
        results = [found.get(job) or JobResult(job, {}, none) for job in plan.jobs]
        report_apply(report, plan, results)
        report.facts["kept_nbytes"] = sum(tensor.kept.nbytes for tensor in held)

    def detach(self) -> None:
        """Give the model its original bits back; nothing where nothing is attached.

        Raises VerificationError where something else, such as a step of training, has changed
        parameters since they were written: those stay what they are, all others are restored.
        """
        with self.lock:
            if lost := self._put_back():
                raise _explain_lost(lost)

    def _tensors(self) -> list[LiveTensor]:
        """Return all tensors of the model."""
        return [held for held in (self._model or {}).values() if isinstance(held, LiveTensor)]

    def _put_back(self) -> list[str]:
        """Put all original values back and forget the tensors; return those that are lost."""
        try:
            return put_all_back(self._tensors(), self._run.engine.workers)
        finally:  # after Ctrl-C as well: threads finish what they were given
            self._model = self._planned = None
            for module in self._module.modules():
                if module.__dict__.get(MARK) is self:
                    del module.__dict__[MARK]


def _moving(plan: Plan) -> list[LiveJob]:
    return [job for job in plan.jobs if isinstance(job, LiveJob)]


def _numbers(lam: Any) -> float | tuple[float, ...]:
    """Return one lambda, or several, as Python's floats; UsageError for what is no number."""
    given = lam.tolist() if isinstance(lam, np.ndarray) else lam
    many = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    each = [*given] if many else [given]
    try:
        if not all(isinstance(one, Real) and not isinstance(one, bool) for one in each):
            raise TypeError
        found = tuple(map(float, each))
    except (TypeError, OverflowError):
        raise UsageError(
            f"lam {lam!r:.60}: expected a finite number, or one for each vector"
        ) from None
    return found if many else found[0]


def _each(lam: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return the lambda of each of so many vectors."""
    each = lam if isinstance(lam, tuple) else (lam,) * count
    if len(each) != count:
        raise UsageError(f"lam: {len(each)} numbers, expected one, or {count}: one for each vector")
    return each


def _as_one(
    vectors: Sequence[SkillVector], lam: float | tuple[float, ...]
) -> tuple[SkillVector, float]:
    """Return vectors as one, and by what it is to be multiplied."""
    each = _each(lam, len(vectors))
    if len(vectors) == 1:
        return vectors[0], each[0]
    if not isinstance(lam, tuple):
        return sum(vectors[1:], vectors[0]), each[0]
    terms = [one * vector for one, vector in zip(each, vectors, strict=True)]
    return sum(terms[1:], terms[0]), 1.0


def _most_kept(tensor: LiveTensor, delta: DeltaSource, vector: SkillVector) -> int:
    """Return the most bytes that undoing a delta takes: bits that say where, and what changed.

    No packed block is larger than its values; how many values change, manifests of files say.
    """
    entry = vector.find_entry(delta.spec.name) if delta.is_stored else None
    changed = tensor.numel if entry is None else entry["changed"]
    width = tensor.nbytes // max(tensor.numel, 1)
    blocks = block_count(tensor.numel)
    sparse = -(-tensor.numel // 8) + changed * width + blocks * (4 * (3 + width) + 1)
    digests = 16 * (tensor.nbytes // LEAF_NBYTES + blocks)
    return min(tensor.nbytes, sparse) + digests


def _explain_lost(names: Sequence[str]) -> VerificationError:
    return VerificationError(
        "something else changed parameters while a vector was attached, so their original bits"
        " are not known (load the model again); they stay as they are, the others are"
        f" restored, and nothing is attached:\n{up_to_five(names)}"
    )
