"""From what the engine measured to what is said: manifest entries, ledger lines, warnings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from skillvec import analysis
from skillvec.engine import JobResult
from skillvec.errors import up_to_five
from skillvec.plan import Job, Plan, exactness_entry, ledger_line, tensor_entry
from skillvec.report import Line, Report
from skillvec.vector import PairDelta


def job_line(job: Job, status: str) -> Line:
    """Return the ledger line of a tensor that has a job."""
    side = job.point or job.deltas[0].spec
    line = ledger_line(side, status, job.note)
    return line | {"name": job.name, "dtype": job.out_dtype or side.dtype}


def complete_manifest(
    manifest: dict[str, Any],
    results: Sequence[JobResult],
    side_digests: dict[str, str],
    exceptions: int,
    replacements: int,
) -> None:
    manifest["tensors"], manifest["differing"], equal = {}, [], {}
    unrestored = 0
    for result in results:
        job = result.job
        if job.operator == "subtract":
            delta = job.deltas[0]
            assert isinstance(delta, PairDelta)
            unrestored += result.unrestored
            manifest["tensors"][job.name] = tensor_entry(
                delta,
                result.digests["base"],
                result.digests["tuned"],
                result.digests["output"],
                result.changed,
                float(result.sums[0]) ** 0.5,
                result.unrestored,
            )
        elif result.mismatches:
            manifest["differing"].append(job.name)
        else:
            assert job.point is not None
            equal[job.name] = [job.point.dtype, result.digests["point"]]
    manifest["equal"] = equal
    manifest["side"] = side_digests
    claim = "partial" if unrestored or manifest["differing"] else "bitwise"
    if manifest["dtype"] != "auto":
        claim = "rounded" if unrestored else claim
    manifest["exactness"] = exactness_entry(claim, exceptions, replacements, unrestored)


def report_diff(
    report: Report,
    plan: Plan,
    results: Sequence[JobResult],
    manifest: dict[str, Any],
    nbytes: int,
) -> None:
    report.ledger = []
    for result in results:
        if result.job.operator == "subtract":
            entry = manifest["tensors"][result.job.name]
            line = job_line(result.job, "delta" if result.changed else "unchanged")
            line |= {"numel": result.job.numel, "changed": result.changed, "norm": entry["norm"]}
            line |= {"exceptions": result.exceptions, "replacements": result.replacements}
            report.ledger.append(line | {"unrestored": result.unrestored})
        else:
            status = "differs" if result.mismatches else "equal"
            report.ledger.append(job_line(result.job, status))
    report.ledger += plan.ledger
    numel = sum(line["numel"] for line in report.ledger if "numel" in line)
    changed = sum(line["changed"] for line in report.ledger if "changed" in line)
    report.facts |= {
        "nbytes": nbytes,
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": sum(float(r.sums[0]) for r in results if r.job.operator == "subtract") ** 0.5,
        "exactness": manifest["exactness"],
    }
    if manifest["differing"]:
        report.warnings.append(
            "integer or bool tensors differ and are not transferred:\n"
            + up_to_five(manifest["differing"])
        )
    entries = manifest["tensors"].values()
    mixed = sorted({e["tuned"][0] for e in entries if e["tuned"][0] != e["base"][0]})
    if mixed:
        report.warnings.append(
            f"tuned is {'+'.join(mixed)} where base is not: tuned comes back when the vector is"
            " applied to base with --dtype of the tuned model"
        )


def report_apply(report: Report, plan: Plan, results: Sequence[JobResult]) -> None:
    report.ledger = []
    passed = {line["name"]: line for line in plan.ledger}
    added = [result for result in results if result.job.operator == "add"]
    for result in results:
        job = result.job
        if job.operator == "copy":
            report.ledger.append(job_line(job, "passed through") | passed.pop(job.name, {}))
            continue
        gain, cosine = analysis.realised(result.sums, plan.lam)
        assert job.point is not None
        # the count of changed values is taken on a sample; the digests saw every byte
        same_dtype = job.out_dtype == job.point.dtype
        unchanged = same_dtype and result.digests["output"] == result.digests["point"]
        line = job_line(job, "unchanged" if unchanged else "applied")
        line |= {"numel": job.numel, "changed": result.changed, "gain": gain, "cosine": cosine}
        if unchanged and result.sums[2] > 0 and plan.lam:
            line["note"] = "rounding absorbed the whole delta"
        report.ledger.append(line)
    report.ledger += passed.values()
    other = [result.job.name for result in added if not result.exact_base]
    if plan.verdict == "exact base" and other:
        report.facts["verdict"] = "same family"
        report.warnings.append(
            "the target looked like the vector's base but differs from it in:\n" + up_to_five(other)
        )
    sums = np.sum([result.sums for result in added], axis=0)
    gain, cosine = analysis.realised(sums, plan.lam)
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
    if gain is not None and not (0.9 <= gain <= 1.1 and (cosine or 0) >= 0.9):
        stored = sorted({result.job.out_dtype for result in added})
        report.warnings.append(
            f"rounding to {'+'.join(stored)} changed the request: of lam {plan.lam:g}, "
            f"{gain * plan.lam:.3g} arrived (gain {gain:.3g}, cosine {cosine or 0:.3g});"
            " steps of the target's grid are as large as the delta. --dtype fp32 is exact,"
            " --rounding stochastic right on average"
        )


def mismatch_line(result: JobResult, side: str) -> str:
    return (
        f"{result.job.name}: {result.mismatches} of {result.job.numel} values differ from the"
        f" {side} model's, the first at flat position {result.first_mismatch}"
    )
