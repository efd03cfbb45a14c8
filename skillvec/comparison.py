"""The verbs that measure vectors: orthogonality and norms.

One pass over the data gives every sum; singular subspaces, where asked, take the matrices after it,
one for each worker at a time. What is said of them is made in `analysis`; what is written, in
`page`.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations, count
from typing import Any, NamedTuple

import numpy as np

from skillvec import analysis, page, subspace
from skillvec.checkpoint import Checkpoint, open_checkpoint
from skillvec.combining import align_vectors, seen_like
from skillvec.deltas import add_values
from skillvec.engine import Engine, Threads
from skillvec.errors import UsageError
from skillvec.job import Job, JobResult, Plan
from skillvec.kernels import HALVES
from skillvec.matrix_workers import at_once_nbytes, in_turn
from skillvec.measures import ESTIMATED, STEP_EDGES, Request, is_estimated, layout
from skillvec.names import natural_order
from skillvec.outputs import Output, PathLike, output_report
from skillvec.plan import plan_compare
from skillvec.report import Report, Watcher
from skillvec.rules import leaving_out
from skillvec.run import Run, choose_engine
from skillvec.running import measure_plan, run_plan, show_plan
from skillvec.staging import staging
from skillvec.storage import fingerprints, forget_open_files, fsync_path, refuse_changed
from skillvec.summary import job_line, refuse_announced, refuse_nonfinite, tell_nonfinite
from skillvec.vector import SkillVector
from skillvec.vectorfile import BlockReader, readers_of

SCHEMA = 1
MOST_FLIPS = 100_000


def orthogonality(
    *vectors: PathLike | SkillVector,
    against: PathLike | Checkpoint | None = None,
    control: PathLike | SkillVector | None = None,
    sign_flips: int = 0,
    subspace: int = 0,
    device: str = "auto",
    seed: int = 0,
    output: PathLike | None = None,
    figures: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Compare two or more deltas: angles against chance, supports, rounding, subspaces.

    Each input is a vector file, a SkillVector or "TUNED::BASE". The facts hold for every pair, and
    for every vector, the numbers that docs/orthogonality.md explains: overall, per module, kind,
    layer and tensor. `against` are weights, for rounding and for their own subspaces (a pair has
    its base). `control` is "random" (the first of a pair with its signs drawn anew by `seed`) or a
    vector to put in its place. `sign_flips` draws make a randomisation test. `subspace` K compares
    the K leading singular directions of every matrix on the torch `device`. `output` is a folder
    for report.json, report.csv and report.html, with `figures` as SVG and PNG beside them.
    Values without a finite delta are refused, or with `allow_nonfinite` count as unchanged. The
    same digits whatever the worker count. Raises UsageError, IncompatibleError, NonfiniteError,
    FormatError.
    """
    if len(vectors) < 2:
        raise UsageError(f"expected at least two vectors, found {len(vectors)}")
    return _compare(
        "orthogonality", vectors, against=against, control=control, sign_flips=sign_flips,
        subspace_k=subspace, device=device, seed=seed, output=output, figures=figures,
        include=include, exclude=exclude, allow_nonfinite=allow_nonfinite, engine=engine,
        workers=workers, dry_run=dry_run, force=force, watcher=watcher,
    )  # fmt: skip


def norms(
    vector: PathLike | SkillVector,
    *,
    against: PathLike | Checkpoint | None = None,
    subspace: int = 0,
    device: str = "auto",
    seed: int = 0,
    output: PathLike | None = None,
    figures: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Measure one delta: norm, density, rounding and spectrum at every level, as `orthogonality`.

    It reads the values, so the norms have more digits than those of the manifest.
    """
    return _compare(
        "norms", [vector], against=against, subspace_k=subspace, device=device, seed=seed,
        output=output, figures=figures, include=include, exclude=exclude,
        allow_nonfinite=allow_nonfinite, engine=engine, workers=workers, dry_run=dry_run,
        force=force, watcher=watcher,
    )  # fmt: skip


def _compare(
    verb: str,
    vectors: Sequence[PathLike | SkillVector],
    *,
    against: PathLike | Checkpoint | None,
    control: PathLike | SkillVector | None = None,
    sign_flips: int = 0,
    subspace_k: int,
    device: str,
    seed: int,
    output: PathLike | None,
    figures: bool,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_nonfinite: bool,
    engine: str,
    workers: int | None,
    dry_run: bool,
    force: bool,
    watcher: Watcher | None,
) -> Report:
    run = Run.by(engine, workers, dry_run=dry_run, force=force, watcher=watcher)
    if not 0 <= sign_flips <= MOST_FLIPS:
        raise UsageError(f"sign_flips {sign_flips}: expected 0 to {MOST_FLIPS}")
    if subspace_k < 0:
        raise UsageError(f"subspace {subspace_k}: expected at least 1")
    if seed < 0:
        raise UsageError(f"seed {seed}: expected at least 0")
    if figures and output is None:
        raise UsageError("figures need an output folder")
    opened = [SkillVector.open(ref) for ref in vectors]
    names = [v.ref if v.scale == 1 else f"{v.scale:g}*{v.ref}" for v in opened]
    left_out = leaving_out(include, exclude)
    weights = open_checkpoint(against, "against", left_out) if against is not None else None
    other = None
    if control is not None and control != "random":
        other = SkillVector.open(control, "control")
    compared = align_vectors([*opened, *([other] if other else [])])
    opened = compared[: len(opened)]
    if weights is not None:
        weights = seen_like(weights, compared[0])
    request = _request(compared, len(opened), control is not None, seed, sign_flips)
    plan = plan_compare(compared, request, weights, include, exclude)
    measured_names = {job.name for job in plan.jobs}
    for vector in compared:
        plan.warnings.extend(refuse_announced(vector, allow_nonfinite, measured_names))
    inputs = [side for vector in compared for side in vector.inputs()]
    place = None
    if output is not None:
        page.check_available()
        place = output_report(output, force, [*inputs, *([weights] if weights else [])])
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "vectors": names,
        "lineage": [v.dtypes for v in opened],
        "against": weights.ref if weights else None,
        "control": (other.ref if other else "random") if control is not None else None,
        "seed": seed,
        "sign_flips": sign_flips,
        "subspace": None,
        "step_edges": list(STEP_EDGES),
    }
    if place is not None:
        facts["output"] = place.ref
    if subspace_k:
        facts["subspace"] = {"k": subspace_k, "device": subspace.resolve_device(device)}
    page_nbytes = page.LEAST_NBYTES if place is not None else 0
    plan = replace(plan, verb=verb, bound_nbytes=page_nbytes, sure_nbytes=page_nbytes)
    at_once = _at_once(run.engine, facts["subspace"])
    sizes = [4 * job.numel for job in plan.jobs if subspace_k and _is_matrix(job)]
    report = show_plan(plan, facts, run, place, at_once_nbytes(sizes, at_once))
    if dry_run:
        return report
    before = fingerprints(plan.files() if subspace_k else ())  # for what is read after the run
    plan = measure_plan(plan, run)
    results = run_plan(plan, run)
    refuse_nonfinite(results, allow_nonfinite)
    results.sort(key=lambda result: natural_order(result.job.name))
    spectra = _Spectra.empty(request, len(results))
    if subspace_k:
        _find_subspaces(results, plan, report, watcher, spectra, at_once)
        refuse_changed(before)
    _conclude(report, results, request, opened, spectra)
    report.ledger = [job_line(result.job, "compared") for result in results] + plan.ledger
    tell_nonfinite(report, results)
    if place is not None:
        _write(report, place, force, figures, watcher)
    return report


def _request(
    compared: Sequence[SkillVector], count: int, controlled: bool, seed: int, flips: int
) -> Request:
    """Return what is measured: all pairs of the first `count`, and the control of each."""
    pairs = tuple(combinations(range(count), 2))
    other = len(compared) > count
    controls = tuple((count if other else i, j, not other) for i, j in pairs) if controlled else ()
    return Request(tuple(vector.scale for vector in compared), pairs, controls, seed, flips)


@np.errstate(over="ignore", invalid="ignore")  # squares that leave fp64
def _conclude(
    report: Report,
    results: Sequence[JobResult],
    request: Request,
    opened: Sequence[SkillVector],
    spectra: "_Spectra",
) -> None:
    """Turn sums into the facts of the report."""
    form = layout(request)
    records = [(r.job.name, r.job.numel, r.sums.view(form)[0]) for r in results]
    if any(is_estimated(numel) for _, numel, _ in records):
        report.facts["estimated"] = list(ESTIMATED)
    labels, lineage = report.facts["vectors"], report.facts["lineage"]
    report.facts["norms"] = [
        {"label": labels[i], "lineage": lineage[i]}
        | analysis.vector_levels(records, i, spectra.vectors[i])
        for i in range(len(opened))
    ]
    report.facts["pairs"] = []
    for n, (i, j) in enumerate(request.pairs):
        found = analysis.pair_levels(records, request, n, spectra.pairs[n])
        said = {"a": labels[i], "b": labels[j], "lineage_a": lineage[i], "lineage_b": lineage[j],
                "control": report.facts["control"]}  # fmt: skip
        shared = _shared_rounding(opened, (i, j), records, found["overall"])
        rounding = shared["cosine"] if shared else None
        said |= {"shared_rounding": shared,
                 "sentence": analysis.sentence(found["overall"], rounding)}  # fmt: skip
        report.facts["pairs"].append(said | found)
    report.warnings += _warnings(report.facts["pairs"], lineage)


def _shared_rounding(
    opened: Sequence[SkillVector], pair: tuple[int, int], records: Sequence[analysis.Record],
    overall: dict[str, Any],
) -> dict[str, Any] | None:  # fmt: skip
    """Return the 16-bit checkpoint in which one delta ends and the other begins, if there is one.

    With the cosine that its rounding alone gives if training went on from an unrounded master.
    """
    for first, second in (pair, pair[::-1]):
        begins, ends = opened[first].manifest["base"], opened[second].manifest["tuned"]
        if opened[first].parts or not ends or ends["probe"] != begins["probe"]:
            continue
        if not set(begins["dtypes"]) & set(HALVES):
            continue
        size = overall["norm_a"] * overall["norm_b"]
        hidden = analysis.hidden_product(records, first)
        hidden *= opened[first].scale * opened[second].scale
        roles = "base of A and tuned of B" if first == pair[0] else "tuned of A and base of B"
        cosine = -hidden / size if hidden and size else None
        return {"checkpoint": begins["ref"], "roles": roles, "cosine": cosine}
    return None


def _warnings(pairs: Sequence[dict[str, Any]], lineage: Sequence[str]) -> list[str]:
    found = []
    for pair in pairs:
        shared = pair["shared_rounding"]
        if shared is not None and pair["overall"]["cosine"] is not None:  # no delta is zero
            size = "" if shared["cosine"] is None else f" of about {shared['cosine']:+.2g}"
            found.append(
                f"A = {pair['a']} and B = {pair['b']} share the 16-bit {shared['checkpoint']}"
                f" ({shared['roles']}): if training went on from fp32 master weights, its"
                f" rounding alone gives a cosine{size}"
            )
    if any(dtype in words for words in lineage for dtype in HALVES):
        found.append(
            "inputs are 16-bit: a vector taken from bf16 or fp16 checkpoints is a thresholded copy"
            " of the true update, so supports and cosines are those of what was kept"
        )
    return found


# ------------------------------------------------------------------------------------ subspaces


class _Spectra(NamedTuple):
    """What is known of each matrix, by vector or pair and tensor: nothing unless it is asked."""

    vectors: list[list[dict[str, Any]]]
    pairs: list[list[dict[str, Any]]]

    @staticmethod
    def empty(request: Request, tensors: int) -> "_Spectra":
        return _Spectra(
            [[{} for _ in range(tensors)] for _ in request.scales],
            [[{} for _ in range(tensors)] for _ in request.pairs],
        )


def _find_subspaces(
    results: Sequence[JobResult], plan: Plan, report: Report, watcher: Watcher | None,
    spectra: _Spectra, at_once: int,
) -> None:  # fmt: skip
    """Decompose every matrix of every vector, one for each worker at a time, and relate them."""
    assert plan.request is not None
    request, said = plan.request, report.facts["subspace"]
    matrices = [n for n, result in enumerate(results) if _is_matrix(result.job)]
    said |= {"exact": 0, "randomised": 0, "left_out": len(results) - len(matrices), "error": 0.0}
    readers = readers_of(plan.vectors)
    total = sum(results[n].job.nbytes_read for n in matrices)
    done = 0

    def related(n: int) -> tuple[bool, float]:
        return _relate(results[n].job, n, request, said["k"], said["device"], readers, spectra)

    def nbytes_of(n: int) -> int:
        return 4 * results[n].job.numel

    try:
        with closing(in_turn(related, matrices, nbytes_of, at_once)) as found:
            for n, (exact, error) in zip(matrices, found, strict=True):
                said["exact" if exact else "randomised"] += 1
                said["error"] = max(said["error"], error)
                done += results[n].job.nbytes_read
                if watcher:
                    watcher.advanced(done, total)
    finally:
        forget_open_files()


def _is_matrix(job: Job) -> bool:
    shape = job.deltas[0].spec.shape
    return len(shape) == 2 and min(shape) > 1


def _at_once(runner: Engine, asked: dict[str, Any] | None) -> int:
    """Return how many matrices are at work: one for each worker here, one on a device."""
    if asked is None or asked["device"] != "cpu":
        return 1
    return (runner if isinstance(runner, Threads) else choose_engine("threads", None)).in_process


def _relate(
    job: Job, n: int, request: Request, k: int, device: str,
    readers: dict[str, BlockReader], spectra: _Spectra,
) -> tuple[bool, float]:  # fmt: skip
    """Fill in what the singular subspaces of one tensor's deltas say.

    Returns whether they are exact, and the largest error of an SVD.
    """
    shape, error = job.deltas[0].spec.shape, 0.0

    def matrix(*numbers: int) -> Any:
        values = np.zeros(job.numel, np.float32)
        for number in numbers:
            add_values(job.deltas[number], readers, values, request.scales[number])
        return values.reshape(shape)

    def spectrum(values: Any) -> subspace.Spectrum:
        nonlocal error
        found = subspace.decompose(values, k, device, request.seed)
        error = max(error, found.error)
        return found

    wanted = range(1 + max((j for _, j in request.pairs), default=0))  # not the control
    alone = [spectrum(matrix(i)) for i in wanted]
    merged = [spectrum(matrix(i, j)) for i, j in request.pairs]
    point = None
    if job.point is not None:
        values = np.zeros(job.numel, np.float32)
        add_values(job.point, readers, values)
        if np.isfinite(values).all():
            point = spectrum(values.reshape(shape))
        del values
    for i in wanted:
        values, own = matrix(i), alone[i]
        inside = {
            j: subspace.shares_inside(values, alone[j], device)
            for j in wanted
            if (i, j) in request.pairs or (j, i) in request.pairs
        }
        align = {
            m: subspace.alignment_ratio(values, merged[m], device)
            for m, pair in enumerate(request.pairs)
            if i in pair
        }
        within = subspace.shares_inside(values, point, device) if point is not None else None
        spectra.vectors[i][n] = {
            "energy": own.norm_sq,
            "stable_rank": own.stable_rank,
            "effective_rank": own.effective_rank,
            "effective_rank_error": own.effective_rank_error,
            "top_energy": float((own.values**2).sum()) / own.norm_sq if own.norm_sq else None,
            "energy_in_w": within[2] if within else None,
            "svd_error": own.error,
        }
        for m, pair in enumerate(request.pairs):
            if i in pair:
                side, across = ("a", "b") if i == pair[0] else ("b", "a")
                row = spectra.pairs[m][n]
                share = inside[pair[1] if side == "a" else pair[0]]
                row |= {f"energy_{side}": own.norm_sq, f"sar_{side}": align[m],
                        f"{side}_in_{across}": share[2] if share else None}  # fmt: skip
    for m, (i, j) in enumerate(request.pairs):
        spectra.pairs[m][n] |= _angles(alone[i], alone[j], k, shape)
    return alone[0].exact, error


def _angles(
    one: subspace.Spectrum, other: subspace.Spectrum, k: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    left, right = subspace.principal_angles(one, other)
    rows, columns = shape
    k = max(one.values.size, other.values.size) or min(k, rows, columns)  # fewer of low rank
    met = subspace.interference([one, other])
    overlaps = [float(np.mean(np.cos(np.radians(angles)) ** 2)) if angles else None
                for angles in (left, right)]  # fmt: skip
    return {
        "overlap_left": overlaps[0],
        "overlap_right": overlaps[1],
        "overlap_chance": (k / rows + k / columns) / 2,
        "in_chance": k * k / (rows * columns),
        "interference": met.raw,
        "interference_share": met.relative,
        "angles_left": left,
        "angles_right": right,
    }


# -------------------------------------------------------------------------------------- written


def _write(
    report: Report, place: Output, force: bool, figures: bool, watcher: Watcher | None
) -> None:
    """Write the report's folder beside its place and move it there."""
    content = report.to_dict()
    shown = _told_apart(content)
    with staging(place.path, force, deliver=place.delivery(force, watcher)) as stage:
        made = stage.made
        files = {
            "report.json": (json.dumps(content, indent=1) + "\n").encode(),
            "report.csv": csv_text(content).encode(),
            "report.html": page.html(shown).encode(),
        }
        if figures:
            (made / "figures").mkdir()
            files |= {f"figures/{name}": drawn for name, drawn in page.figures(shown)}
        for name, data in files.items():
            (made / name).write_bytes(data)
            fsync_path(os.fspath(made / name))
        stage.publish(made)


def _told_apart(content: dict[str, Any]) -> dict[str, Any]:
    """Return a report in which labels that stand twice have a number, as of one vector twice.

    In a report pairs stand in the order of their vectors, which a table of rows has not.
    """
    labels: list[str] = []
    for label in content["vectors"]:
        tries = (f"{label} ({n})" if n > 1 else label for n in count(1))
        labels.append(next(name for name in tries if name not in labels))
    sides = list(combinations(labels, 2))  # none of norms
    pairs = [pair | {"a": a, "b": b} for pair, (a, b) in zip(content["pairs"], sides, strict=False)]
    norms = [
        entry | {"label": label} for entry, label in zip(content["norms"], labels, strict=True)
    ]
    return content | {"vectors": labels, "pairs": pairs, "norms": norms}


def csv_text(content: dict[str, Any]) -> str:
    """Return every row of every level as CSV: pairs first, then vectors, with `b` empty."""
    rows = list(_flat_rows(_told_apart(content)))
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat_rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    said = ("a", "b", "lineage_a", "lineage_b")
    sets = [({key: pair[key] for key in said}, pair) for pair in content["pairs"]]
    sets += [
        (dict(zip(said, (norms["label"], "", norms["lineage"], ""), strict=True)), norms)
        for norms in content["norms"]
    ]
    for sides, levels in sets:
        overall = [{"name": "overall"} | levels["overall"]]
        for level in ("overall", "modules", "kinds", "layers", "tensors"):
            for row in overall if level == "overall" else levels[level]:
                plain = {k: v for k, v in row.items() if not isinstance(v, list)}
                yield sides | {"level": level.removesuffix("s")} | plain
