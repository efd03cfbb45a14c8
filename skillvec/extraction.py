"""Vectors out as LoRA: the best low-rank factors of every matrix, in a folder that PEFT loads.

What an adapter can hold, and under which names, is asked of the model class of the base's config
(`holding`): linear layers, and transformers' Conv1D, whose weights lie turned; experts that are
fused in one parameter; by choice embeddings, and modules saved whole. Left out, by name, and
counted in the energy: norms, biases, convolutions, embeddings and heads tied to them. Counted
apart: names that the model does not have, of which nothing is known.

One matrix (of experts, one expert's) is in memory for each worker at a time, with its factors;
those go to the disk as they come. Each has one thread, so that the bytes depend on neither. The
share of energy that is kept is measured against the factors as they are stored, not taken from
singular values. Refused: a base whose config is not there or not known to transformers, other
shapes.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skillvec import hub, subspace
from skillvec.checkpoint import ADAPTER_CONFIG, Checkpoint
from skillvec.combining import viewed_delta
from skillvec.deltas import DeltaSource, ViewDelta, dtype_of, pieces_of
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.holding import LEFT_OUT, NOT_FOUND, Held, Hold
from skillvec.job import Job, Plan
from skillvec.jobs import AddJob, CompareJob, CopyJob, PointJob
from skillvec.kernels import Array, narrow, widen
from skillvec.matrix_workers import at_once_nbytes, in_turn
from skillvec.measures import Request
from skillvec.outputs import Output, PathLike, output_adapter
from skillvec.plan import plan_compare
from skillvec.report import Report, Watcher
from skillvec.run import Run
from skillvec.running import measure_plan, run_plan, show_plan
from skillvec.sources import as_integers, whole
from skillvec.staging import staging
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    TensorSpec,
    encode_header,
    fingerprints,
    forget_open_files,
    fsync_path,
    refuse_changed,
    refuse_misread,
)
from skillvec.summary import refuse_announced, refuse_nonfinite
from skillvec.vector import SkillVector
from skillvec.vectorfile import BlockReader, readers_of

FIRST_RANK = 16  # tried for an energy, then doubled
LITTLE = 0.9  # of the energy: below, the adapter is another thing than the vector
SLACK = 1e-6  # of an energy: below, it is rounding that is missing
WEIGHTS = "adapter_model.safetensors"


def extract_lora(
    vector: PathLike | SkillVector,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embed_lora: bool = False,
    save_module: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    device: str = "auto",
    seed: int = 0,
    base: str | None = None,
    dtype: str = "fp32",
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Write the vector's matrices as a PEFT LoRA adapter for its base: B A is the best of its rank.

    Every matrix gets `rank`, or the smallest rank that keeps the share `energy` of its squared
    norm (experts of one parameter get the largest of theirs). So that share is kept of all that has
    factors; of the whole vector it may be less, which the report and a warning say. `embed_lora`
    makes factors of embeddings too, `save_module` names modules (by the ends of their names) that
    are saved whole, base + v in the base's dtype, as apply gives it. `base` is where the base is
    now (its config is read), if not where it was. `dtype` is that of the factors; the SVD is in
    fp32 (fp64 of fp64 deltas), by `device` and `seed`. The report has rank and kept energy of every
    tensor and of all, with what is left out, and what is not found in the model of that config.
    Values without a finite delta are refused, or with `allow_nonfinite` count as unchanged. Raises
    UsageError, IncompatibleError, NonfiniteError, FormatError, OutputError.
    """
    _check_request(rank, energy, seed, dtype)
    opened = SkillVector.open(vector)
    point = opened.reopen_base(base)
    plan = plan_compare([opened], Request((opened.scale,)), None, include, exclude)
    announced = refuse_announced(opened, allow_nonfinite, {job.name for job in plan.jobs})
    plan.warnings.extend(announced)
    plan = replace(plan, verb="extract-lora")
    plan, model, held, saved = _sorted_out(plan, opened, point, embed_lora, save_module)
    copies = _whole_jobs(model, saved, plan.jobs, opened)
    most = 4096 + sum(_most_nbytes(job, held[job.name], rank, dtype_of(dtype)) for job in plan.jobs)
    plan = replace(plan, bound_nbytes=most + sum(_in_file_nbytes(job) for job in copies))
    place = output_adapter(output, force, [*opened.inputs(), point])
    facts: dict[str, Any] = {
        "vector": opened.ref, "lineage": opened.dtypes, "base": point.ref, "output": place.ref,
        "rank": rank, "energy": energy, "embed_lora": embed_lora,
        "save_module": list(save_module), "dtype": dtype, "seed": seed,
        "device": subspace.resolve_device(device),
    }  # fmt: skip
    one = "serial" if facts["device"] != "cpu" else "threads"
    run = Run.by(one, dry_run=dry_run, force=force, watcher=watcher)
    sizes = [_matrix_nbytes(part) for part in _parts(plan.jobs, held)]
    matrices_nbytes = at_once_nbytes(sizes, run.engine.in_process)
    report = show_plan(plan, facts, run, place, matrices_nbytes)
    lines = {line["name"]: line for line in report.ledger}
    for name, hold in held.items():
        lines[name] |= {"status": hold.status} | ({"note": hold.why} if hold.why else {})
    tied, excluded = opened.manifest["tied"], opened.manifest["excluded"]
    report.ledger += [{"name": n, "status": "tied", "note": f"copy of {tied[n]}"} for n in tied]
    report.ledger += [{"name": name, "status": "excluded"} for name in excluded]
    if run.dry_run:
        return report
    parts = model, held, saved, copies
    lost = _write_adapter(opened, plan, parts, place, report, run, allow_nonfinite)
    if lost:
        told = [f"{job.name}: {lost[job.name]} of {job.numel} values"
                for job in plan.jobs if job.name in lost]  # fmt: skip
        report.warnings.append(
            f"differences that are not finite count as unchanged:\n{up_to_five(told)}"
        )
    return report


def _check_request(rank: int | None, energy: float | None, seed: int, dtype: str) -> None:
    if (rank is None) == (energy is None):
        raise UsageError("extract-lora takes either rank or energy")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy}: expected a share above 0, up to 1")
    if seed < 0:
        raise UsageError(f"seed {seed}: expected at least 0")
    if dtype_of(dtype) == "F64":
        raise UsageError("dtype fp64: factors are stored in fp32, bf16 or fp16")


def _write_adapter(
    vector: SkillVector, plan: Plan,
    parts: tuple[Held, dict[str, Hold], list[str], Sequence[Job]],
    place: Output, report: Report, run: Run, allow_nonfinite: bool,
) -> dict[str, int]:  # fmt: skip
    """Write factors, what is saved whole, and their config; complete the report.

    Returns how many values have no finite delta, by tensor.
    """
    model, held, saved, copies = parts
    sources = (*plan.files(), *(file for job in copies for file in job.files()))
    before, lost = fingerprints(dict.fromkeys(sources)), dict[str, int]()
    plan = measure_plan(plan, Run.by(watcher=run.watcher))
    try:
        deliver = place.delivery(run.force, run.watcher)
        with staging(place.path, run.force, deliver=deliver) as stage:
            made = stage.made
            writer = _Writer(made / WEIGHTS, plan, model, held, copies, report)
            workers = run.engine.in_process
            ranks = writer.write(vector.scale, workers, run.watcher, lost, allow_nonfinite)
            config = _config(ranks, model, held, saved, vector)
            (made / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            fsync_path(os.fspath(made / ADAPTER_CONFIG))
            report.facts["nbytes"] = os.path.getsize(made / WEIGHTS)
            refuse_changed(before)
            stage.publish(made)
    finally:
        forget_open_files()
    _conclude(report, list(ranks.values()))
    return lost


# --------------------------------------------------------------------------------- what it holds


def _sorted_out(
    plan: Plan, vector: SkillVector, base: Checkpoint, embed_lora: bool, save_module: Sequence[str]
) -> tuple[Plan, Held, dict[str, Hold], list[str]]:
    """Return the plan under the names of the base's model, how each delta is held, what is whole.

    Raises IncompatibleError where nothing has factors, or what a shape says otherwise.
    """
    model = Held(base)
    plan = replace(plan, jobs=_in_memory(plan.jobs, vector, model))
    saved = model.whole_modules(save_module)
    held, problems, warnings = dict[str, Hold](), [], []
    for job in plan.jobs:
        name, shape = job.name, tuple(job.deltas[0].spec.shape)
        weight = model.weights.get(name)
        if weight is not None and tuple(weight.shape) != shape:
            problems.append(f"{name}: {list(shape)}, base {list(weight.shape)}")
        held[name] = model.hold(name, shape, saved, embed_lora)
    if problems:
        raise IncompatibleError(
            f"the vector does not fit the config of {base.ref}:\n{up_to_five(problems)}"
        )
    held = model.as_loaded(held)
    shared = []
    for name in [name for name in held if name in model.tied]:
        hold = held[name] = _of_tied(name, model, held, vector, plan.jobs)
        if hold.has_factors:
            others = ", ".join(other for other in model.tied[name] if other != name)
            asked = f": --save-module {hold.place} holds it either way"
            shared.append(f"{name}: tied to {others}{asked if hold.kind == 'embedding' else ''}")
    if shared:
        warnings.append(
            "merging adds factors of weights that the base ties to the one weight, which is right;"
            f" unmerged they do not reach the other places where it is used:\n{up_to_five(shared)}"
        )
    if not any(hold.has_factors for hold in held.values()):
        reasons = [f"{name}: {hold.why or 'saved whole'}" for name, hold in held.items()]
        raise IncompatibleError(
            f"no tensor that LoRA could hold, by the model of {base.ref}:\n{up_to_five(reasons)}"
        )
    return replace(plan, warnings=[*plan.warnings, *warnings]), model, held, saved


def _in_memory(jobs: Sequence[Job], vector: SkillVector, model: Held) -> list[Job]:
    """Return jobs under the names of a model, in the order of what they are made of."""
    files = {job.name: tuple(job.deltas[0].spec.shape) for job in jobs}
    order, used = {name: n for n, name in enumerate(files)}, set[str]()
    made: list[tuple[int, Job]] = []
    for name, view in model.views(files).items():
        source, *others = view.sources
        used |= set(view.sources)
        job = jobs[order[source]]
        if others or view != whole(source, files[source]):
            delta = viewed_delta(name, view, vector)
            job = CompareJob(name, delta.spec.numel, deltas=(delta,))
        made.append((min(order[part] for part in view.sources), replace(job, name=name)))
    made += [(order[job.name], job) for job in jobs if job.name not in used]
    return [job for _, job in sorted(made, key=lambda pair: pair[0])]


def _of_tied(
    name: str, model: Held, held: Mapping[str, Hold], vector: SkillVector, jobs: Sequence[Job]
) -> Hold:
    """Say how the delta of a weight with several names is held, of which one says it."""
    hold, others = held[name], [other for other in model.tied[name] if other in held]
    moved = {job.name: _name_in(vector, job.deltas[0]) for job in jobs if job.name in others}
    files = set(moved.values())
    apart = files & set(vector.untied) or any(
        not file or not files <= {file, *vector.find_same(file)} for file in files if len(files) > 1
    )
    if apart and not all(held[other].kind == "whole" for other in others):
        both = " and ".join(f"--save-module {n.rpartition('.')[0]}" for n in model.tied[name])
        return Hold(f"tied in the base, which the vector parts: {both} hold it", LEFT_OUT)
    if hold.why or hold.kind == "whole" or others[0] == name:
        return hold
    return Hold(f"tied: the delta of {others[0]}", "tied")


def _name_in(vector: SkillVector, delta: DeltaSource) -> str:
    """Return the name by which a vector has a delta, "" of one that is made of several."""
    name = "" if delta.is_relaid else delta.spec.name
    return name if name in vector.deltas else ""


def _whole_jobs(
    model: Held, saved: Sequence[str], jobs: Sequence[Job], vector: SkillVector
) -> list[Job]:
    """Return what apply does to all weights of modules that are saved whole, the widest first.

    Raises IncompatibleError where the base does not store one.
    """
    names, deltas = model.within(saved), {job.name: job.deltas[0] for job in jobs}
    sources = model.sources(other for name in names for other in (name, *model.tied.get(name, ())))
    made: list[PointJob] = []
    for name in names:
        group = (name, *model.tied.get(name, ()))
        source = next((sources[other] for other in group if other in sources), None)
        delta = next((deltas[other] for other in group if other in deltas), None)
        if source is None:
            raise IncompatibleError(f"{model.base.ref}: {name}: not stored, and to be saved whole")
        if delta is None:
            source = as_integers(source)
            made.append(CopyJob(name, source.numel, out_dtype=source.dtype, point=source))
            continue
        file = _name_in(vector, delta)
        made.append(
            AddJob(
                name,
                source.numel,
                out_dtype=source.dtype,
                point=source,
                deltas=(delta,),
                base_digest=vector.base_digest(file),
                tuned_dtype=vector.tuned_dtype(file) if file else "",
            )
        )
    return sorted(made, key=lambda job: -ITEMSIZE[job.out_dtype])


def _in_file_nbytes(job: Job) -> int:
    """Return the most that a tensor that is saved whole takes in the file and its header."""
    return job.numel * ITEMSIZE[job.out_dtype] + 3 * len(job.name) + 300


def _most_nbytes(job: Job, hold: Hold, rank: int | None, dtype: str) -> int:
    """Return the most that the factors of a delta take in the file, its header and the config."""
    if not hold.has_factors:
        return 0
    *experts, m, n = job.deltas[0].spec.shape
    values = prod(experts) * min(rank or m, m, n) * (m + n)
    return values * ITEMSIZE[dtype] + 6 * len(job.name) + 600


# ------------------------------------------------------------------------------------ factorised


class _Part(NamedTuple):
    """A matrix to factorise, of a tensor or of one of its experts; without `shape`, to measure."""

    job: Job
    delta: DeltaSource
    shape: tuple[int, ...] = ()


def _matrix_nbytes(part: _Part) -> int:
    width = 8 if part.delta.dtype == "F64" else 4
    return prod(part.shape) * width if part.shape else 0


def _parts(jobs: Sequence[Job], held: Mapping[str, Hold]) -> Iterator[_Part]:
    for job in jobs:
        (delta,), shape = job.deltas, job.deltas[0].spec.shape
        if not held[job.name].has_factors:
            yield _Part(job, delta)
        elif len(shape) == 2:
            yield _Part(job, delta, shape)
        else:
            view = delta.as_view()
            for i in range(shape[0]):
                dtype = "F64" if delta.dtype == "F64" else "F32"
                spec = TensorSpec(f"{job.name}[{i}]", dtype, (1, *shape[1:]), "", 0, 0)
                yield _Part(job, ViewDelta(spec, view.slice(0, i, i + 1)), shape[1:])


class _Factors(NamedTuple):
    """What is known of a part: its squared norm, what the factors lose of it, and these as stored:
    out x rank and in x rank, of the transpose where the module keeps it turned."""

    norm_sq: float
    lost: int = 0
    lost_sq: float = 0.0
    error: float = 0.0
    out: Array | None = None
    inner: Array | None = None

    @property
    def rank(self) -> int:
        return 0 if self.out is None else self.out.shape[1]


class _Writer:
    """The file of an adapter: factors as they come, and what is saved whole."""

    def __init__(
        self, path: Path, plan: Plan, model: Held, held: Mapping[str, Hold],
        copies: Sequence[Job], report: Report,
    ) -> None:  # fmt: skip
        self._plan, self._model, self._held, self._report = plan, model, held, report
        self._path, self._stored = os.fspath(path), dtype_of(report.facts["dtype"])
        self._lines = {line["name"]: line for line in report.ledger}
        width = ITEMSIZE[self._stored]  # a reader maps each tensor at a multiple of its own width
        self._first = [job for job in copies if ITEMSIZE[job.out_dtype] >= width]
        self._last = [job for job in copies if ITEMSIZE[job.out_dtype] < width]
        self._copied = [*self._first, *self._last]

    def write(
        self, scale: float, workers: int, watcher: Watcher | None, lost: dict[str, int],
        allow_nonfinite: bool,
    ) -> dict[str, int]:  # fmt: skip
        """Write it; return ranks by module or parameter. Fills in lines of the ledger, and `lost`.

        Raises IncompatibleError where no factors are left, NonfiniteError.
        """
        made: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}  # kind, B, A by place
        self._file = OutputFile(self._path, reserve := self._reserve())
        try:
            addresses = [self._file.reserve(_tensor_nbytes(job)) for job in self._first]
            for name, factors in self._factorised(scale, workers, watcher, allow_nonfinite):
                if lost_here := sum(part.lost for part in factors):
                    lost[name] = lost_here
                hold = self._held[name]
                pair = _joined(factors, hold) if self._told(name, factors) else None
                if pair is not None:
                    made[hold.place] = hold.kind, pair[0].shape, pair[1].shape
                    for values in pair:
                        self._file.append(
                            np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
                        )
            if not made:
                raise IncompatibleError("every delta that LoRA could hold is 0")
            addresses += [self._file.reserve(_tensor_nbytes(job)) for job in self._last]
            self._copy(addresses, scale, watcher, allow_nonfinite)
            keys = self._model.keys(made)
            entries = [entry for place, (kind, out, inner) in made.items()
                       for entry in self._entries(keys[place], kind, out, inner)]  # fmt: skip
            first, last = (list(map(_entry, jobs)) for jobs in (self._first, self._last))
            layout = [*first, *entries, *last]
            self._file.write(0, encode_header(layout, {"format": "pt"}, reserve))
            self._file.sync()
        finally:
            self._file.close()
        refuse_misread(self._path, layout)
        return {place: inner[0] // self._experts(place) for place, (_, _, inner) in made.items()}

    def _experts(self, place: str) -> int:
        """Return how many matrices lie in a parameter."""
        weight = self._model.weights.get(place)
        return int(weight.shape[0]) if weight is not None and weight.dim() == 3 else 1

    def _entries(
        self, key: str, kind: str, out: tuple[int, ...], inner: tuple[int, ...]
    ) -> list[Any]:
        ends = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
        return [(f"{key}.{ends.format(side)}", self._stored, shape)
                for side, shape in (("B", out), ("A", inner))]  # fmt: skip

    def _reserve(self) -> int:
        """Return the length of a header that no other is longer than."""
        places = {self._held[job.name].place: job for job in self._plan.jobs
                  if self._held[job.name].has_factors}  # fmt: skip
        keys, most = self._model.keys(places), list(map(_entry, self._copied))
        for place, job in places.items():
            *experts, m, n = job.deltas[0].spec.shape
            side = prod(experts) * max(m, n)
            most += self._entries(
                keys[place], self._held[job.name].kind, (side, side), (side, side)
            )
        return len(encode_header(most, {"format": "pt"}))

    def _factorised(
        self, scale: float, workers: int, watcher: Watcher | None, allow_nonfinite: bool
    ) -> Iterator[tuple[str, list[_Factors]]]:
        """Yield the names of deltas, with the factors of their parts, as they come."""
        readers = readers_of(self._plan.vectors)

        def work(part: _Part) -> _Factors:
            hold = self._held[part.job.name]
            return _factors(part, readers, scale, hold, self._report.facts, allow_nonfinite)

        parts = _parts(self._plan.jobs, self._held)
        done, total = 0, sum(job.nbytes_read for job in self._plan.jobs)
        with closing(in_turn(work, parts, _matrix_nbytes, workers)) as results:
            for job in self._plan.jobs:
                count = sum(1 for _ in _parts([job], self._held))
                yield job.name, list(islice(results, count))
                done += job.nbytes_read
                if watcher:
                    watcher.advanced(done, total)

    def _told(self, name: str, factors: Sequence[_Factors]) -> bool:
        """Fill in the line of a delta; return whether it has factors."""
        norm_sq, hold = sum(part.norm_sq for part in factors), self._held[name]
        rank = max(part.rank for part in factors)
        kept = 0.0 if norm_sq else None
        if norm_sq and not hold.why:
            kept = 1 - sum(part.lost_sq for part in factors) / norm_sq
        line: dict[str, Any] = {"norm_sq": norm_sq, "kept_energy": kept, "rank": rank}
        if not norm_sq:
            line["status"] = "zero"
        elif rank:
            line["svd_error"] = max(part.error for part in factors)
        self._lines[name] |= line
        return bool(rank)

    def _copy(
        self, addresses: Sequence[int], scale: float, watcher: Watcher | None, allow: bool
    ) -> None:
        """Write the modules that are saved whole, as apply does."""
        jobs = [replace(job, output=(0, at))
                for job, at in zip(self._copied, addresses, strict=True)]  # fmt: skip
        if jobs:
            plan = Plan("extract-lora", jobs, vectors=self._plan.vectors, lam=scale)
            results = run_plan(plan, Run.by(watcher=watcher), files=[self._file])
            refuse_nonfinite(results, allow)
        for job in jobs:
            if job.name not in self._lines:
                note = "as it is in the base" if isinstance(job, CopyJob) else "tied in the base"
                self._report.ledger.append({"name": job.name, "status": "whole", "note": note})


def _tensor_nbytes(job: Job) -> int:
    return job.numel * ITEMSIZE[job.out_dtype]


def _entry(job: Job) -> tuple[str, str, tuple[int, ...]]:
    assert job.point is not None
    return f"base_model.model.{job.name}", job.out_dtype, job.point.shape


def _factors(
    part: _Part, readers: Mapping[str, BlockReader], scale: float, hold: Hold,
    facts: Mapping[str, Any], allow_nonfinite: bool,
) -> _Factors:  # fmt: skip
    """Return what a part has of factors, in their storage dtype."""
    name, lost = part.delta.spec.name, dict[str, int]()
    norm_sq, matrix, at = 0.0, None, 0
    for _, read in pieces_of(part.delta, readers, lost if allow_nonfinite else None):
        piece = scale * read
        norm_sq += float(np.square(piece, dtype=np.float64).sum())
        if part.shape:
            matrix = np.empty(prod(part.shape), piece.dtype) if matrix is None else matrix
            matrix[at : at + piece.size] = piece
            at += piece.size
    if not np.isfinite(norm_sq):
        raise IncompatibleError(f"{name}: the delta holds NaN, infinities or too large values")
    counted = sum(lost.values())
    if matrix is None or not norm_sq:
        return _Factors(norm_sq, counted)
    matrix = matrix.reshape(part.shape)
    found, rank = _decomposed(matrix, facts)
    roots = np.sqrt(found.values[:rank]).astype(matrix.dtype)
    left, right = found.left[:, :rank] * roots, found.right[:, :rank] * roots
    stored = dtype_of(facts["dtype"])
    sides = [narrow(np.ascontiguousarray(side), stored) for side in (left, right)]
    left, right = (widen(side, stored).astype(matrix.dtype) for side in sides)
    lost_sq = subspace.residual_sq(matrix, left, right)
    if not np.isfinite(lost_sq):
        raise IncompatibleError(f"{name}: factors leave {facts['dtype']}: take fp32")
    out, inner = sides[::-1] if hold.turned else sides
    return _Factors(norm_sq, counted, lost_sq, found.error, out, inner)


def _joined(factors: Sequence[_Factors], hold: Hold) -> tuple[Array, Array]:
    """Return B, out x rank, and A, rank x in.

    Of E experts, PEFT keeps rank k of expert e in row e r + k of A and column k E + e of B.
    """
    if len(factors) == 1:
        (only,) = factors
        assert only.out is not None and only.inner is not None
        return only.out, np.ascontiguousarray(only.inner.T)
    rank, count = max(part.rank for part in factors), len(factors)
    like = next(part for part in factors if part.rank)
    assert like.out is not None and like.inner is not None
    B = np.zeros((len(like.out), rank, count), like.out.dtype)
    A = np.zeros((count, rank, len(like.inner)), like.inner.dtype)
    for e, part in enumerate(factors):
        if part.out is not None and part.inner is not None:
            B[:, : part.rank, e], A[e, : part.rank] = part.out, part.inner.T
    return B.reshape(len(B), -1), A.reshape(-1, A.shape[2])


def _decomposed(matrix: Array, facts: Mapping[str, Any]) -> tuple[subspace.Spectrum, int]:
    """Return the leading triplets, and how many are wanted: no more than there are."""
    device, seed, most = facts["device"], facts["seed"], min(matrix.shape)
    if facts["rank"] is not None:
        found = subspace.decompose(matrix, min(facts["rank"], most), device, seed)
        return found, found.values.size
    wanted = FIRST_RANK
    while True:
        found = subspace.decompose(matrix, min(wanted, most), device, seed)
        enough = np.cumsum(found.values**2) >= facts["energy"] * found.norm_sq
        if enough.any():
            return found, int(np.argmax(enough)) + 1
        if found.values.size < wanted:  # the rank of the matrix
            return found, found.values.size
        wanted *= 2


# ------------------------------------------------------------------------------------- described


def _config(
    ranks: Mapping[str, int], model: Held, held: Mapping[str, Hold], saved: Sequence[str],
    vector: SkillVector,
) -> dict[str, Any]:  # fmt: skip
    """Return adapter_config.json: every scaling is 1, all modules by their full names."""
    base = model.base
    kinds = {hold.place: hold for hold in held.values() if hold.has_factors}
    parameters = sorted(place for place in ranks if kinds[place].kind == "parameter")
    modules = sorted(set(ranks) - set(parameters))
    turned = any(kinds[place].turned and kinds[place].kind == "linear" for place in ranks)
    rank = max(ranks.values())
    others = {f"^{re.escape(name)}": k for name, k in ranks.items() if k != rank}
    revision = vector.manifest["base"]["revision"] if base is vector.open_base() else None
    ref, commit = hub.pinned(base.ref) or (base.ref, revision)
    if ref == base.ref and hub.is_reference(ref) and not ref.startswith(hub.SCHEME):
        ref = f"./{ref}"  # a folder of this disk: PEFT would ask the Hub for that name
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": model.task,
        "base_model_name_or_path": ref,
        "revision": commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": modules,
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(saved) or None,
    }
    if parameters:
        config["target_parameters"] = parameters
    if beside := model.beside(modules):
        config["exclude_modules"] = "|".join(map(re.escape, beside))
    if model.stays_tied(saved, vector.untied):
        config["ensure_weight_tying"] = True
    if model.task is None:
        kind = type(model.model)
        config["auto_mapping"] = {
            "base_model_class": kind.__name__, "parent_library": kind.__module__
        }  # fmt: skip
    return config


def _conclude(report: Report, ranks: Sequence[int]) -> None:
    """Add what was kept of all, and warn where that is little."""
    told = [line for line in report.ledger if "norm_sq" in line]
    total = sum(line["norm_sq"] for line in told)
    kept = sum(line["norm_sq"] * (line["kept_energy"] or 0) for line in told)
    left, missing = (
        sum(line["norm_sq"] for line in told if line["status"] == status)
        for status in (LEFT_OUT, NOT_FOUND)
    )
    taken = sum(line["norm_sq"] for line in told if line["status"] in ("held", "whole"))
    report.facts |= {
        "norm_sq": total, "kept_energy": kept / total, "kept_of_held": kept / taken,
        "left_out_energy": left / total, "not_found_energy": missing / total,
        "modules": len(ranks), "least_rank": min(ranks), "most_rank": max(ranks),
        "svd_error": max(line.get("svd_error", 0.0) for line in told),
    }  # fmt: skip
    if kept < LITTLE * total:
        report.warnings.append(
            f"the adapter keeps {kept / total:.3g} of the vector's squared norm: what it does may"
            " differ"
        )
    wanted = report.facts["energy"]
    short = [f"{line['name']}: {line['kept_energy']:.6g}" for line in told if wanted
             and line["status"] == "held" and line["kept_energy"] < wanted - SLACK]  # fmt: skip
    if wanted and kept / total < wanted - SLACK:
        report.warnings.append(
            f"energy {wanted:g} is kept of what the adapter holds ({kept / taken:.3g} of it), not"
            f" of the whole vector ({kept / total:.3g}): {(total - taken) / total:.3g} of that is"
            " in tensors that are left out or not found (--embed-lora and --save-module hold more)"
        )
    if short:
        report.warnings.append(
            f"energy {wanted:g} is not met by factors in {report.facts['dtype']}:\n"
            + up_to_five(short)
        )
    if missing:
        names = [line["name"] for line in told if line["status"] == NOT_FOUND and line["norm_sq"]]
        report.warnings.append(
            f"{missing / total:.3g} of the vector's squared norm is in tensors that were not found"
            f" among the modules of {report.facts['base']}, so no adapter of it reaches them:\n"
            + up_to_five(names)
        )
