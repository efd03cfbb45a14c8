"""Writing the factors of a vector's matrices as PEFT's adapter."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skillvec.checkpoints.held_model import Held, Hold
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.matrix_workers import in_turn
from skillvec.engine.plan import Job, Plan
from skillvec.engine.run import Run
from skillvec.engine.runner import run_plan
from skillvec.errors import IncompatibleError
from skillvec.files.header import ITEMSIZE, TensorSpec, encode_header
from skillvec.files.official_reader import refuse_misread
from skillvec.files.output_file import OutputFile
from skillvec.ops import svd
from skillvec.ops.kernels import Array, narrow, widen
from skillvec.report import Report, Watcher
from skillvec.vectors.deltas.base import DeltaSource, dtype_of, pieces_of
from skillvec.vectors.deltas.view import ViewDelta
from skillvec.vectors.reader import BlockReader, readers_of
from skillvec.verbs.findings import refuse_nonfinite

SLACK = 1e-6  # of an energy: below, it is rounding that is missing


class _Part(NamedTuple):
    """A matrix to factorise, of a tensor or of one of its experts; without `shape`, to measure."""

    job: Job
    delta: DeltaSource
    shape: tuple[int, ...] = ()


def matrix_nbytes(part: _Part) -> int:
    width = 8 if part.delta.dtype == "F64" else 4
    return prod(part.shape) * width if part.shape else 0


def cut_parts(jobs: Sequence[Job], held: Mapping[str, Hold]) -> Iterator[_Part]:
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


class AdapterWriter:
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

        parts = cut_parts(self._plan.jobs, self._held)
        done, total = 0, sum(job.nbytes_read for job in self._plan.jobs)
        with closing(in_turn(work, parts, matrix_nbytes, workers)) as results:
            for job in self._plan.jobs:
                count = sum(1 for _ in cut_parts([job], self._held))
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
    found, rank = svd.lead(matrix, facts["rank"], facts["energy"], facts["device"], facts["seed"])
    roots = np.sqrt(found.values[:rank]).astype(matrix.dtype)
    left, right = found.left[:, :rank] * roots, found.right[:, :rank] * roots
    stored = dtype_of(facts["dtype"])
    sides = [narrow(np.ascontiguousarray(side), stored) for side in (left, right)]
    left, right = (widen(side, stored).astype(matrix.dtype) for side in sides)
    lost_sq = svd.residual_sq(matrix, left, right)
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
