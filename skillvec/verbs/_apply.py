"""apply: target + lam * vector."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skillvec import __version__
from skillvec.analysis import levels
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.folder import INDEX
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.side_files import ADAPTER, OLD
from skillvec.checkpoints.unread import LeftOut
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.outputs import Output, PathLike, output_model, writing
from skillvec.engine.plan import JobResult, Plan, job_line
from skillvec.engine.plan_models import plan_apply
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan, run_plan, show_plan
from skillvec.errors import UsageError, up_to_five
from skillvec.files.header import header_layout
from skillvec.files.official_reader import refuse_misread
from skillvec.files.output_file import copy_file, fsync_path
from skillvec.files.weight_files import is_weight_file
from skillvec.ops.kernels import HALVES
from skillvec.report import Report, Watcher
from skillvec.vectors.deltas.base import dtype_of
from skillvec.vectors.recipe import leaving_out, selection
from skillvec.vectors.vector import SkillVector
from skillvec.verbs.findings import (
    correct_verdict,
    refuse_announced,
    refuse_nonfinite,
    rounding_warning,
    tell_nonfinite,
    tell_resumed,
)
from skillvec.verbs.matrix_energies import tell_energies

CARD = "README.md"
FP32_MAX = 3.4028234e38


def apply(
    target: PathLike | Checkpoint,
    vector: PathLike | SkillVector | None = None,
    output: PathLike | None = None,
    *,
    lam: float = 1.0,
    tuned: PathLike | Checkpoint | None = None,
    base: PathLike | Checkpoint | None = None,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    allow_nonfinite: bool = False,
    stream: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Write target + lam * vector in the target's shard layout (PaST, stage 4).

    `target` is a model, `vector` one that fits it, `output` a folder that gets the target's other
    files too. fp32 arithmetic (fp64 where an input is fp64) and one rounding to the target's dtype
    or `dtype`; `rounding` stochastic is right on average at every `lam`, its randomness addressed
    by `seed`. With `tuned` and `base` in place of a vector the difference is taken in the same pass
    and not stored: the same weights. Of `rows` that only the target has, nothing changes. The
    report says the verdict on the target, the realised gain and the cosine of what arrived.

    Raises IncompatibleError with both shapes where the vector does not fit, NonfiniteError where
    values of the output are NaN or infinite and were not so in the target, or should have changed
    (unless `allow_nonfinite`), UsageError, FormatError, OutputError.
    """
    if output is None:
        raise UsageError("apply needs an output")
    if (vector is None) == (tuned is None or base is None) or (tuned is None) != (base is None):
        raise UsageError("apply takes either a vector or both tuned and base")
    run = Run.by(engine, workers, stream=stream, dry_run=dry_run, force=force, watcher=watcher)
    request: dict[str, Any] = {"lam": lam, "dtype": dtype, "rounding": rounding, "seed": seed}
    request |= selection(include, exclude, rename, rows)
    request |= {"allow_nonfinite": True} if allow_nonfinite else {}
    left_out = leaving_out(include, exclude)
    if vector is not None:
        displacement = SkillVector.open(vector, rename=rename)
    else:
        assert tuned is not None and base is not None
        displacement = SkillVector.between(tuned, base, left_out=left_out)
    point = open_checkpoint(target, "target", find_unused(displacement, left_out))
    plan, recipe = plan_request(point, displacement, request)
    place = output_model(output, force, point, [*displacement.inputs(), point])
    facts = {
        "formula": "OUT = TARGET + LAM * V",
        "target": point.facts,
        "vector": recipe["vector"],
        "name": displacement.ref,
        "lineage": displacement.dtypes,
        "output": place.ref,
        "lam": plan.lam,
        "dtype": dtype,
        "rounding": rounding,
        "seed": seed if rounding == "stochastic" else None,
        "verdict": plan.verdict,
        **side_facts(plan),
    }
    if plan.layout:
        facts["layout"] = plan.layout
    report = show_plan(plan, facts, run, place)
    report.warnings += side_warnings(report)
    if not run.dry_run:
        _write_model(point, measure_plan(plan, run), place, recipe, report, run)
    return report


def _write_model(
    point: Checkpoint, plan: Plan, place: Output, recipe: dict[str, Any], report: Report, run: Run
) -> None:
    """Write the weights of a plan, and what comes along with them; complete the report."""
    with writing(plan, place, run, recipe) as (stage, files):
        for file, output_plan in zip(files, plan.outputs, strict=True):
            file.write(0, output_plan.header)
        results = run_plan(plan, run, stage, files)
        refuse_nonfinite(results, recipe["request"].get("allow_nonfinite", False))
        for file, output_plan in zip(files, plan.outputs, strict=True):
            file.sync()
            refuse_misread(file.path, header_layout(output_plan.header))
        made = stage.made
        for source, name in plan.copies:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, os.fspath(made / name))
        for name, text in plan.texts.items():
            (made / name).write_text(text)
            fsync_path(os.fspath(made / name))
        report_apply(report, plan, results)
        tell_energies(report, plan)
        if point.is_folder:
            _write_card(made / CARD, recipe, report)
        stage.publish(made if point.is_folder else Path(files[0].path))
    tell_resumed(report, stage)


def find_unused(vector: SkillVector, left_out: LeftOut) -> LeftOut:
    """Return which tensors of a target need not be readable: no delta is meant for them."""
    excluded = set(vector.manifest["excluded"])
    return lambda name: name in excluded or left_out(name)


def _write_card(file: Path, recipe: Mapping[str, Any], report: Report) -> None:
    """Write the card of a merged model, over the copy of the target's, whose text it keeps.

    It does not name the output: the same inputs give the same bytes, wherever they lie.
    """
    from skillvec.verbs.cards import merged_card

    inherited = None
    try:
        inherited = file.read_bytes().decode() if file.exists() else None
        text = merged_card(recipe, name="A merged model", inherited=inherited, facts=report.facts)
    except (UsageError, UnicodeDecodeError) as error:
        report.warnings.append(f"the target's {CARD} is copied as it is: {error}")
        return
    file.unlink(missing_ok=True)  # the copy may be read-only
    file.write_bytes(text.encode())
    fsync_path(os.fspath(file))


def refuse_request(displacement: SkillVector, request: Mapping[str, Any]) -> None:
    """Raise UsageError for a lambda or a rounding that no apply has."""
    lam, rounding = request["lam"], request["rounding"]
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding {rounding!r}: expected nearest or stochastic")
    if not abs(lam * displacement.scale) <= FP32_MAX:
        raise UsageError(f"lam {lam}: expected a finite number that fp32 can hold")


def plan_request(
    point: Checkpoint, displacement: SkillVector, request: dict[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """Plan an apply from the request as it stands in a recipe; return plan and recipe."""
    refuse_request(displacement, request)
    lam, dtype, rounding, seed = (request[key] for key in ("lam", "dtype", "rounding", "seed"))
    recipe = {
        "kind": "merged",
        "schema": 1,
        "tool": f"skillvec {__version__}",
        "target": {"ref": point.ref},
        "vector": displacement.describe(),
        "lam": lam * displacement.scale,
        "request": request,
    }
    plan = plan_apply(
        point,
        displacement,
        lam=lam,
        dtype=dtype_of(dtype) if dtype else None,
        rounding=rounding,
        seed=seed,
        include=request["include"],
        exclude=request["exclude"],
        rename=request.get("rename", ()),
        rows=request.get("rows", "strict"),
        recipe=recipe,
    )
    used = {name for job in plan.jobs for delta in job.deltas for name in delta.names}
    allowed = request.get("allow_nonfinite", False)
    plan.warnings.extend(refuse_announced(displacement, allowed, used))
    return plan, recipe


def report_apply(report: Report, plan: Plan, results: Sequence[JobResult]) -> None:
    report.ledger = []
    passed = {line["name"]: line for line in plan.ledger}
    added = [result for result in results if isinstance(result.job, AddJob)]
    for result in results:
        job = result.job
        if isinstance(job, CopyJob):
            report.ledger.append(job_line(job, "passed through") | passed.pop(job.name, {}))
            continue
        gain, cosine = levels.realised(result.sums, plan.lam)
        assert job.point is not None
        same_dtype = job.out_dtype == job.point.dtype
        unchanged = same_dtype and result.digests["output"] == result.digests["point"]
        line = job_line(job, "unchanged" if unchanged else "applied")
        line |= {"numel": job.numel, "changed": result.changed, "gain": gain, "cosine": cosine}
        if unchanged and result.sums[2] > 0 and plan.lam:
            line["note"] = "rounding absorbed the whole delta"
        report.ledger.append(line)
    report.ledger += passed.values()
    correct_verdict(report, results)
    sums = np.sum([result.sums for result in added], axis=0)
    gain, cosine = levels.realised(sums, plan.lam)
    report.facts |= {
        "numel": sum(result.job.numel for result in added),
        "changed": sum(result.changed for result in added),
        "gain": gain,
        "cosine": cosine,
        "worst": [
            {key: line[key] for key in ("name", "gain", "cosine")}
            for line in sorted(
                (line for line in report.ledger if line.get("gain") is not None),
                key=lambda line: line["cosine"] if line["cosine"] is not None else -2.0,
            )[:5]
        ],
    }
    if nothing := _explain_unchanged(added, plan.lam):
        report.warnings.append(f"no value differs: {nothing}; OUT holds the weights of TARGET")
    report.warnings += rounding_warning(added, 2)
    tell_nonfinite(report, results)
    lost = report.facts.get("nonfinite", {}).get("lost")  # that, not the grid, is the reason then
    if gain is not None and not lost and not (0.9 <= gain <= 1.1 and (cosine or 0) >= 0.9):
        report.warnings.append(_explain_rounding(plan, added, gain, cosine))
    wide = all(result.job.out_dtype not in HALVES for result in added)
    if plan.rounding == "stochastic" and wide:
        report.warnings.append("rounding stochastic changes 16-bit outputs alone: there are none")


def _explain_rounding(
    plan: Plan, added: Sequence[JobResult], gain: float, cosine: float | None
) -> str:
    """Return that rounding to the grid of the output changed what was asked for, and what helps."""
    dtypes = sorted({result.job.out_dtype for result in added})
    advice = "--dtype fp32 is exact" if set(dtypes) & set(HALVES) else "a larger lam is met better"
    if set(dtypes) & set(HALVES) and plan.rounding != "stochastic":
        advice += ", --rounding stochastic right on average"
    return (
        f"rounding to {'+'.join(dtypes)} changed the request: of lam {plan.lam:g},"
        f" {gain * plan.lam:.3g} arrived (gain {gain:.3g}, cosine {cosine or 0:.3g});"
        f" steps of the target's grid are as large as the delta. {advice}"
    )


def _explain_unchanged(added: Sequence[JobResult], lam: float) -> str:
    """Return why an apply changed no value, "" where it did or where rounding is the reason."""
    if lam == 0:
        return "lam is 0"
    if np.float32(lam) == 0 and not any(r.job.out_dtype == "F64" for r in added):
        return f"lam {lam:g} is 0 in fp32"
    if any(result.sums[2] for result in added):
        return ""
    return "" if any(r.changed for r in added) else "the vector is zero"


def side_facts(plan: Plan) -> dict[str, Any]:
    """Return which files of the target's folder stay behind, and which come along as they are."""
    old = [name for name, why in plan.left_behind if why == OLD]
    return {
        "left_behind": [name for name, _ in plan.left_behind],
        "old_weights": old,
        "adapter_files": [name for name, why in plan.left_behind if why == ADAPTER],
        "copied_weights": [
            name for _, name in plan.copies if name != INDEX and is_weight_file(name)
        ],
    }


def side_warnings(report: Report) -> list[str]:
    """Return what there is to know of weights in the target's folder that are not rewritten."""
    old, copied = report.facts["old_weights"], report.facts["copied_weights"]
    found = []
    if old:
        found.append(
            "the target holds its weights in other files too; these stay behind, because whatever"
            f" loads them would miss the vector:\n{up_to_five(old)}"
        )
    if report.facts["adapter_files"]:
        found.append(
            "the target holds an adapter beside its weights, which were read as they are; its files"
            " stay behind, because from_pretrained adds it to whatever lies beside them, where PEFT"
            " is installed: copy them to the output only if the weights do not hold it already:\n"
            + up_to_five(report.facts["adapter_files"])
        )
    if copied:
        found.append(
            "files that look like weights are copied as they are, without the vector:\n"
            + up_to_five(copied)
        )
    return found
