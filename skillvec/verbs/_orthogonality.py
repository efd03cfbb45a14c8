"""The verbs that measure vectors: orthogonality and norms.

One pass over the data gives every sum; singular subspaces, where asked, take the matrices after it,
one for each worker at a time. What is said of them is made in `analysis.levels`; what is
written, in `analysis.angle_page`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, cast

import numpy as np

from skillvec.analysis import levels
from skillvec.analysis.angle_report import (
    AngleFacts,
    AngleReport,
    PairEntry,
    Row,
    SharedRounding,
    VectorEntry,
)
from skillvec.analysis.levels import pair_levels, sentence, vector_levels
from skillvec.analysis.spreads import Variances
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.input_moments import open_moments
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.engine.matrix_workers import at_once_nbytes
from skillvec.engine.outputs import Output, PathLike, output_report
from skillvec.engine.plan import JobResult, job_line
from skillvec.engine.plan_checks import plan_compare
from skillvec.engine.run import Run, choose_engine
from skillvec.engine.runner import measure_plan, run_plan, show_plan
from skillvec.engine.threads import Engine, Threads
from skillvec.errors import UsageError
from skillvec.files.fingerprints import fingerprints, refuse_changed
from skillvec.files.output_file import fsync_path
from skillvec.files.staging import staging
from skillvec.ops.comparison import STEP_EDGES
from skillvec.ops.kernels import HALVES
from skillvec.ops.names import natural_order
from skillvec.ops.statistics import Request, layout
from skillvec.ops.svd import resolve_device
from skillvec.report import Report, Watcher
from skillvec.vectors.combining import align_vectors, seen_like
from skillvec.vectors.recipe import leaving_out
from skillvec.vectors.vector import SkillVector
from skillvec.verbs.activations import (
    Outputs,
    find_outputs,
    match_moments,
    memory_nbytes,
)
from skillvec.verbs.chances import Supports, find_spreads, rows_nbytes
from skillvec.verbs.findings import refuse_announced, refuse_nonfinite, tell_nonfinite
from skillvec.verbs.spectra import Spectra, find_spectra, is_matrix

SCHEMA = 2


def orthogonality(
    *vectors: PathLike | SkillVector,
    against: PathLike | Checkpoint | None = None,
    control: PathLike | SkillVector | None = None,
    subspace: int = 0,
    activations: PathLike | None = None,
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
    """Compare two or more vectors: angles against chance, supports, rounding, subspaces.

    `vectors` are files, SkillVectors or "TUNED::BASE". The facts hold for every pair, and for every
    vector, the numbers that docs/orthogonality.md explains: overall, per module, kind, layer and
    tensor. `against` are weights, for rounding and for their own subspaces (a pair has its base).
    `control` is "random" (the first of a pair with the signs of its channels drawn anew by `seed`)
    or a vector to put in its place. `subspace` K compares the K leading singular directions of
    every matrix on the torch `device`. `activations` is a file of second moments of the modules'
    inputs (recipes/calibrate.py), for the outputs of the updates, on the same device. `output` is a
    folder for report.json, report.csv and report.html, with `figures` as SVG and PNG beside them.
    With `allow_nonfinite`, values without a finite delta count as unchanged. Sums are fp64, the
    same digits whatever the worker count.

    Raises UsageError, IncompatibleError, NonfiniteError, FormatError.
    """
    if len(vectors) < 2:
        raise UsageError(f"expected at least two vectors, found {len(vectors)}")
    asked = _Asked(
        "orthogonality", vectors, against=against, subspace=subspace, device=device, seed=seed,
        activations=activations, include=include, exclude=exclude,
        allow_nonfinite=allow_nonfinite, control=control,
    )  # fmt: skip
    run = Run.by(engine, workers, dry_run=dry_run, force=force, watcher=watcher)
    return _compare(asked, output, figures, run)


def norms(
    vector: PathLike | SkillVector,
    *,
    against: PathLike | Checkpoint | None = None,
    subspace: int = 0,
    activations: PathLike | None = None,
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
    """Measure one vector: norm, density, rounding and spectrum at every level.

    `vector`, `against`, `subspace`, `activations`, `device`, `seed`, `output` and `figures` are as
    of `orthogonality`, and so are the errors. It reads the values, so the norms have more digits
    than those of the manifest.
    """
    asked = _Asked(
        "norms", [vector], against=against, subspace=subspace, device=device, seed=seed,
        activations=activations, include=include, exclude=exclude, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    run = Run.by(engine, workers, dry_run=dry_run, force=force, watcher=watcher)
    return _compare(asked, output, figures, run)


@dataclass(frozen=True, eq=False, repr=False)
class _Asked:
    """What is measured, as the verbs are asked for it."""

    verb: str
    vectors: Sequence[PathLike | SkillVector]
    against: PathLike | Checkpoint | None
    subspace: int
    device: str
    seed: int
    include: Sequence[str]
    exclude: Sequence[str]
    allow_nonfinite: bool
    activations: PathLike | None = None
    control: PathLike | SkillVector | None = None

    def check(self) -> None:
        """Raise UsageError for what nothing can be measured by."""
        if self.subspace < 0:
            raise UsageError(f"subspace {self.subspace}: expected at least 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed}: expected at least 0")


class _Inputs(NamedTuple):
    """What is opened: labels, all that is compared (the control last), weights, the control."""

    labels: list[str]
    compared: list[SkillVector]
    weights: Checkpoint | None
    control: SkillVector | None

    @property
    def vectors(self) -> list[SkillVector]:
        return self.compared[: len(self.labels)]


def _open(asked: _Asked) -> _Inputs:
    """Open the inputs, all in the layout of the first."""
    opened = [SkillVector.open(ref) for ref in asked.vectors]
    labels = [v.ref if v.scale == 1 else f"{v.scale:g}*{v.ref}" for v in opened]
    left_out = leaving_out(asked.include, asked.exclude)
    weights = None
    if asked.against is not None:
        weights = open_checkpoint(asked.against, "against", left_out)
    control = None
    if asked.control is not None and asked.control != "random":
        control = SkillVector.open(asked.control, "control")
    compared = align_vectors([*opened, *([control] if control else [])])
    if weights is not None:
        weights = seen_like(weights, compared[0])
    return _Inputs(labels, compared, weights, control)


def _compare(asked: _Asked, output: PathLike | None, figures: bool, run: Run) -> Report:
    """Measure: open, plan, run, look at subspaces, conclude, write."""
    asked.check()
    if figures and output is None:
        raise UsageError("figures need an output folder")
    inputs = _open(asked)
    request = _request(asked, inputs)
    plan = plan_compare(inputs.compared, request, inputs.weights, asked.include, asked.exclude)
    measured_names = {job.name for job in plan.jobs}
    for vector in inputs.compared:
        plan.warnings.extend(refuse_announced(vector, asked.allow_nonfinite, measured_names))
    place = _place(output, inputs, run.force) if output is not None else None
    facts = _facts(asked, inputs, place)
    plan = replace(plan, verb=asked.verb)
    if place is not None:
        from skillvec.analysis.page import LEAST_NBYTES

        plan = replace(plan, bound_nbytes=LEAST_NBYTES, sure_nbytes=LEAST_NBYTES)
    moments = None
    if asked.activations is not None:
        moments = open_moments(asked.activations)
        facts["activations"] = match_moments(moments, plan.jobs, asked.device)
    workers = _workers(run.engine)
    devices = {said["device"] for said in (facts["subspace"], facts["activations"]) if said}
    at_once = workers if devices <= {"cpu"} else 1
    sizes = [4 * job.numel for job in plan.jobs if asked.subspace and is_matrix(job)]
    most = max(
        at_once_nbytes(sizes, at_once),
        rows_nbytes(plan, workers),
        memory_nbytes(moments, plan.jobs, at_once),
    )
    report = show_plan(plan, dict(facts), run, place, most)
    if run.dry_run:
        return report
    again = asked.subspace or request.pairs or moments  # what is read after the run
    before = fingerprints([*plan.files(), *([moments.path] if moments else [])] if again else ())
    plan = measure_plan(plan, run)
    results = run_plan(plan, run)
    refuse_nonfinite(results, asked.allow_nonfinite)
    results.sort(key=lambda result: natural_order(result.job.name))
    spectra = Spectra.empty(request, len(results))
    measured = _Measured(results, spectra, {}, {}, Outputs.empty(request))
    if request.pairs:
        redrawn = asked.control == "random"
        spreads, supports = find_spreads(results, plan, redrawn, workers, run.watcher)
        measured = measured._replace(spreads=spreads, supports=supports)
    if facts["subspace"]:
        found = find_spectra(results, plan, report.facts["subspace"], at_once, run.watcher)
        measured = measured._replace(spectra=found)
    if moments:
        outputs = find_outputs(results, plan, moments, asked.device, at_once, run.watcher)
        measured = measured._replace(outputs=outputs)
    refuse_changed(before)
    _conclude(report, measured, request, inputs)
    report.ledger = [job_line(result.job, "compared") for result in results] + plan.ledger
    tell_nonfinite(report, results)
    if place is not None:
        _write(report, place, run.force, figures, run.watcher)
    return report


def _place(output: PathLike, inputs: _Inputs, force: bool) -> Output:
    """Return where the report goes."""
    from skillvec.analysis.page import check_available

    check_available()
    sides = [side for vector in inputs.compared for side in vector.inputs()]
    sides += [inputs.weights] if inputs.weights else []
    return output_report(output, force, sides)


def _facts(asked: _Asked, inputs: _Inputs, place: Output | None) -> AngleFacts:
    """Return what the report says before anything is measured."""
    control = None
    if asked.control is not None:
        control = inputs.control.ref if inputs.control else "random"
    facts: AngleFacts = {
        "schema": SCHEMA,
        "vectors": inputs.labels,
        "lineage": [v.dtypes for v in inputs.vectors],
        "against": inputs.weights.ref if inputs.weights else None,
        "control": control,
        "seed": asked.seed,
        "subspace": None,
        "activations": None,
        "step_edges": list(STEP_EDGES),
    }
    if place is not None:
        facts["output"] = place.ref
    if asked.subspace:
        facts["subspace"] = {"k": asked.subspace, "device": resolve_device(asked.device)}
    return facts


def _request(asked: _Asked, inputs: _Inputs) -> Request:
    """Return what is measured: all pairs of the vectors, and the control of each."""
    count = len(inputs.labels)
    pairs, other = tuple(combinations(range(count), 2)), inputs.control is not None
    controls = tuple((count, j) for _, j in pairs) if other else ()
    scales = tuple(vector.scale for vector in inputs.compared)
    by_weight = tuple(
        n for n, pair in enumerate(pairs)
        if all(is_thresholded(inputs.vectors[i]) for i in pair)
    )  # fmt: skip
    return Request(scales, pairs, controls, asked.seed, by_weight)


def is_thresholded(vector: SkillVector) -> bool:
    """Return whether rounding decides what a vector changes: a tuned side of it has 16 bits."""
    sides = [lineage.partition(" - ")[0] for lineage in vector.dtypes.split(", ")]
    return vector.scale != 0 and any(dtype in side for side in sides for dtype in HALVES)


class _Measured(NamedTuple):
    """What the passes have found of each tensor, and of each pair."""

    results: list[JobResult]
    spectra: Spectra
    spreads: dict[tuple[int, int], dict[levels.Place, Variances]]
    supports: Supports
    outputs: Outputs


@np.errstate(over="ignore", invalid="ignore")  # squares that leave fp64
def _conclude(report: Report, measured: _Measured, request: Request, inputs: _Inputs) -> None:
    """Turn sums into the facts of the report."""
    form, opened, labels = layout(request), inputs.vectors, inputs.labels
    results, spectra, spreads, supports, outputs = measured
    matrices = [n for n, result in enumerate(results) if is_matrix(result.job)]
    records = levels.Records(
        [result.job.name for result in results],
        np.array([result.job.numel for result in results], np.int64),
        np.frombuffer(b"".join([result.sums.tobytes() for result in results]), form),
        [result.found or {} for result in results],
        supports,
    )
    vectors: list[VectorEntry] = [
        {"label": labels[i], "lineage": vector.dtypes,
         **vector_levels(records, i, spectra.vectors[i], outputs.vectors[i])}
        for i, vector in enumerate(opened)
    ]  # fmt: skip
    pairs: list[PairEntry] = []
    for n, (i, j) in enumerate(request.pairs):
        control = spreads[request.controls[n]] if request.controls else None
        held = pair_levels(
            records, request, n, spectra.pairs[n], spreads[i, j], control, matrices,
            outputs.pairs[n],
        )  # fmt: skip
        shared = _shared_rounding(opened, (i, j), records, held["overall"])
        rounding = shared["cosine"] if shared else None
        pairs.append({
            "a": labels[i], "b": labels[j], "lineage_a": opened[i].dtypes,
            "lineage_b": opened[j].dtypes, "control": report.facts["control"],
            "shared_rounding": shared, "sentence": sentence(held, rounding),
            **held,
        })  # fmt: skip
    report.facts |= {"norms": vectors, "pairs": pairs}
    report.warnings += _warnings(pairs, [vector.dtypes for vector in opened])


def _shared_rounding(
    opened: Sequence[SkillVector], pair: tuple[int, int], records: levels.Records,
    overall: Row,
) -> SharedRounding | None:  # fmt: skip
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
        hidden = levels.hidden_product(records, first)
        hidden *= opened[first].scale * opened[second].scale
        roles = "base of A and tuned of B" if first == pair[0] else "tuned of A and base of B"
        cosine = -hidden / size if hidden and size else None
        return {"checkpoint": begins["ref"], "roles": roles, "cosine": cosine}
    return None


def _warnings(pairs: Sequence[PairEntry], lineage: Sequence[str]) -> list[str]:
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
    overall = [pair["overall"] for pair in pairs]
    if any(row["overlap_z"] is None and row["overlap_z_plain"] is not None for row in overall):
        found.append(
            "rounding to 16 bits decided which values changed, by the size of their weights, which"
            " are not known: how far supports overlap is not judged (--against BASE)"
        )
    if any(dtype in words for words in lineage for dtype in HALVES):
        found.append(
            "inputs are 16-bit: a vector taken from bf16 or fp16 checkpoints is a thresholded copy"
            " of the true update, so supports and cosines are those of what was kept"
        )
    return found


def _workers(runner: Engine) -> int:
    """Return how many tensors are at work in this process after the run."""
    return (runner if isinstance(runner, Threads) else choose_engine("threads", None)).in_process


# -------------------------------------------------------------------------------------- written


def _write(
    report: Report, place: Output, force: bool, figures: bool, watcher: Watcher | None
) -> None:
    """Write the report's folder beside its place and move it there."""
    from skillvec.analysis import angle_page, page
    from skillvec.analysis.report_csv import csv_text, tell_apart

    content = report.to_dict()
    shown = tell_apart(cast(AngleReport, content))
    with staging(place.path, force, deliver=place.delivery(force, watcher)) as stage:
        made = stage.made
        files = {
            "report.json": (json.dumps(content, indent=1) + "\n").encode(),
            "report.csv": csv_text(shown).encode(),
            "report.html": angle_page.html(shown).encode(),
        }
        if figures:
            (made / "figures").mkdir()
            files |= {f"figures/{name}": drawn for name, drawn in page.figures(shown)}
        for name, data in files.items():
            (made / name).write_bytes(data)
            fsync_path(os.fspath(made / name))
        stage.publish(made)
