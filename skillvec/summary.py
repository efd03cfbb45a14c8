"""From what the engine measured to what is said: manifest entries, ledger lines, warnings."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from math import hypot
from typing import Any

import numpy as np

from skillvec import analysis, operators
from skillvec.checkpoint import INDEX
from skillvec.displacement import ledger_line
from skillvec.errors import NonfiniteError, up_to_five
from skillvec.job import Job, JobResult, Plan
from skillvec.jobs import AddJob, CompareJob, CopyJob, StoreJob
from skillvec.kernels import HALVES
from skillvec.manifest import Claim, Manifest, TensorEntry
from skillvec.names import NO_LAYER, layer_of
from skillvec.report import Line, Report
from skillvec.sidefiles import ADAPTER, OLD, is_weight_file
from skillvec.storage import file_nbytes, shown
from skillvec.vector import SkillVector, StoredVector
from skillvec.vectorfile import NO_DIGEST, Entry, Settled, VectorFile, tensor_entry


def job_line(job: Job, status: str) -> Line:
    """Return the ledger line of a tensor that has a job."""
    side = job.point or job.deltas[0].spec
    line = ledger_line(side, status, job.note)
    return line | {"name": job.name, "dtype": job.out_dtype or side.dtype}


def complete_manifest(
    manifest: Manifest, results: Sequence[JobResult], settled: Settled, vector: SkillVector
) -> None:
    """Add what is known when all blocks are written: digests, counts, codecs, exactness."""
    manifest["tensors"], manifest["differing"] = {}, []
    equal, differing, announced = {}, [], vector.nonfinite()
    for result in results:
        job = result.job
        if isinstance(job, StoreJob):
            placed, stated = settled.placed[job.name], vector.find_entry(job.name)
            nonfinite = min(result.lost + announced.get(job.name, 0), job.numel)
            manifest["tensors"][job.name] = _entry(result, placed, stated, nonfinite)
        elif result.mismatches:
            differing.append(job.name)
        else:
            assert job.point is not None
            equal[job.name] = [job.point.dtype, result.digests["point"]]
    manifest["side"] = settled.side
    unrestored = sum(entry.get("unrestored", 0) for entry in manifest["tensors"].values())
    manifest["equal"], manifest["differing"], claim = vector.conclude(equal, differing, unrestored)
    manifest["exactness"] = Claim(
        claim=claim,
        exceptions=settled.exceptions,
        replacements=settled.replacements, unrestored=unrestored,
    )  # fmt: skip


def _entry(
    result: JobResult, placed: tuple[str, int], stated: TensorEntry | None, nonfinite: int
) -> TensorEntry:
    """Return the manifest's line on a delta that was written; `stated` is its line where it was."""
    job, (codec, block) = result.job, placed
    delta = job.deltas[0]
    entry = Entry(job.name, job.out_dtype, delta.spec.shape, codec)
    digest = NO_DIGEST if codec == "zero" else result.digests["output"]
    if stated is not None:
        return tensor_entry(
            entry, codec, block, digest, stated["changed"], stated["norm"], stated["base"],
            stated["tuned"], stated.get("unrestored", 0), nonfinite,
        )  # fmt: skip
    base = tuned = None
    if (pair := delta.pair) is not None:
        base = [pair.base.dtype, result.digests["base"]]
        tuned = [pair.tuned.dtype, result.digests["tuned"]]
    norm = float(result.sums[0]) ** 0.5
    return tensor_entry(
        entry, codec, block, digest, result.changed, norm, base, tuned, result.unrestored, nonfinite
    )


def zero_warning(why: str) -> str:
    return f"no value differs: the vector is zero ({why}), and adding it changes nothing"


def report_stored(
    report: Report,
    plan: Plan,
    results: Sequence[JobResult],
    manifest: Manifest,
    stored: VectorFile,
) -> None:
    report.ledger = []
    entries = manifest["tensors"]
    for result in results:
        name = result.job.name
        if isinstance(result.job, StoreJob):
            entry = entries[name]
            line = job_line(result.job, "delta" if entry["changed"] else "unchanged")
            line |= {"numel": result.job.numel, "changed": entry["changed"], "norm": entry["norm"]}
            line |= {"codec": entry["codec"], "nbytes": stored.deltas[name].nbytes}
            line |= {"exceptions": result.exceptions, "replacements": result.replacements}
            report.ledger.append(line | {"unrestored": result.unrestored})
        else:
            status = "differs" if result.mismatches else "equal"
            report.ledger.append(job_line(result.job, status))
    report.ledger += plan.ledger
    numel = sum(line["numel"] for line in report.ledger if "numel" in line)
    changed = sum(line["changed"] for line in report.ledger if "changed" in line)
    report.facts |= {
        "nbytes": sum(file_nbytes(file) for file in stored.files),
        "files": [os.path.basename(file) for file in stored.files],
        "codecs": dict(Counter(entry["codec"] for entry in entries.values())),
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": sum(entry["norm"] ** 2 for entry in entries.values()) ** 0.5,
        "exactness": manifest["exactness"],
        "is_whole": not manifest["excluded"] and manifest.get("rows", "strict") == "strict",
    }
    if not changed:
        why = (
            "its adapter adds nothing: B is zero" if not manifest["tuned"] else "TUNED equals BASE"
        )
        why = {"combine": "its vectors are, or cancel out", "import-patch": "its patch changes none"
               }.get(plan.verb, why)  # fmt: skip
        report.warnings.append(zero_warning(why))
    if manifest["differing"]:
        report.warnings.append(
            "integer or bool tensors differ and are not transferred:\n"
            + up_to_five(manifest["differing"])
        )
    sides = [
        (entry["base"][0], entry["tuned"][0])
        for entry in entries.values() if entry["base"] and entry["tuned"]
    ]  # fmt: skip
    mixed = sorted({tuned for base, tuned in sides if tuned != base})
    if mixed:
        report.warnings.append(
            f"tuned is {'+'.join(mixed)} where base is not: tuned comes back when the vector is"
            " applied to base with --dtype of the tuned model"
        )
    stored_results = [result for result in results if isinstance(result.job, StoreJob)]
    report.warnings += rounding_warning(stored_results, 0)
    tell_nonfinite(report, results)


def correct_verdict(report: Report, results: Sequence[JobResult]) -> None:
    """Take back the verdict "exact base", which a sample gave, where digests say otherwise."""
    added = [result for result in results if isinstance(result.job, AddJob)]
    known = [result for result in added if result.job.knows_base]
    other = [result.job.name for result in known if not result.exact_base]
    if report.facts.get("verdict") != "exact base":
        return
    if len(known) < len(added):
        report.facts["verdict_sampled"] = True
    if other:
        report.facts["verdict"] = "same family"
        report.warnings.append(
            "the target looked like the vector's base but differs from it in:\n" + up_to_five(other)
        )


def report_apply(report: Report, plan: Plan, results: Sequence[JobResult]) -> None:
    report.ledger = []
    passed = {line["name"]: line for line in plan.ledger}
    added = [result for result in results if isinstance(result.job, AddJob)]
    for result in results:
        job = result.job
        if isinstance(job, CopyJob):
            report.ledger.append(job_line(job, "passed through") | passed.pop(job.name, {}))
            continue
        gain, cosine = analysis.realised(result.sums, plan.lam)
        assert job.point is not None
        same_dtype = job.out_dtype == job.point.dtype
        unchanged = same_dtype and result.digests["output"] == result.digests["point"]
        line = job_line(job, "unchanged" if unchanged else "applied")
        line |= {"numel": job.numel, "changed": result.changed, "gain": gain, "cosine": cosine}
        line["estimated"] = job.numel > operators.SAMPLE  # changed, gain, cosine: of a sample
        if unchanged and result.sums[2] > 0 and plan.lam:
            line["note"] = "rounding absorbed the whole delta"
        report.ledger.append(line)
    report.ledger += passed.values()
    correct_verdict(report, results)
    sums = np.sum([result.sums for result in added], axis=0)
    gain, cosine = analysis.realised(sums, plan.lam)
    report.facts |= {
        "numel": sum(result.job.numel for result in added),
        "changed": sum(result.changed for result in added),
        "estimated": any(line["estimated"] for line in report.ledger if "estimated" in line),
        "gain": gain,
        "cosine": cosine,
        "worst": [
            {key: line[key] for key in ("name", "gain", "cosine", "estimated")}
            for line in sorted(
                (line for line in report.ledger if line.get("gain") is not None),
                key=lambda line: line["cosine"] if line["cosine"] is not None else -2.0,
            )[:5]
        ],
    }
    if nothing := _nothing(added, plan.lam, report.counts):
        report.warnings.append(f"no value differs: {nothing}; OUT holds the weights of TARGET")
    about = "about " if report.facts["estimated"] else ""
    report.warnings += rounding_warning(added, 2, about)
    tell_nonfinite(report, results)
    lost = report.facts.get("nonfinite", {}).get("lost")  # that, not the grid, is the reason then
    if gain is not None and not lost and not (0.9 <= gain <= 1.1 and (cosine or 0) >= 0.9):
        report.warnings.append(_staircase(plan, added, gain, cosine, report.facts["estimated"]))
    wide = all(result.job.out_dtype not in HALVES for result in added)
    if plan.rounding == "stochastic" and wide:
        report.warnings.append("rounding stochastic changes 16-bit outputs alone: there are none")


def _staircase(
    plan: Plan, added: Sequence[JobResult], gain: float, cosine: float | None, estimated: bool
) -> str:
    """Return that rounding to the grid of the output changed what was asked for, and what helps."""
    dtypes = sorted({result.job.out_dtype for result in added})
    about = "about " if estimated else ""
    advice = "--dtype fp32 is exact" if set(dtypes) & set(HALVES) else "a larger lam is met better"
    if set(dtypes) & set(HALVES) and plan.rounding != "stochastic":
        advice += ", --rounding stochastic right on average"
    return (
        f"rounding to {'+'.join(dtypes)} changed the request: of lam {plan.lam:g}, {about}"
        f"{gain * plan.lam:.3g} arrived (gain {about}{gain:.3g}, cosine {about}{cosine or 0:.3g});"
        f" steps of the target's grid are as large as the delta. {advice}"
    )


def _nothing(added: Sequence[JobResult], lam: float, counts: dict[str, int]) -> str:
    """Return why an apply changed no value, "" where it did or where rounding is the reason."""
    if lam == 0:
        return "lam is 0"
    if np.float32(lam) == 0 and not any(r.job.out_dtype == "F64" for r in added):
        return f"lam {lam:g} is 0 in fp32"
    if any(result.sums[2] for result in added):  # on a sample, so the digests decide
        return ""
    same = all(r.job.point is not None and r.job.point.dtype == r.job.out_dtype for r in added)
    if same:
        return "" if counts.get("applied") else "the vector is zero"
    sampled = any(r.job.numel > operators.SAMPLE for r in added)
    return "" if sampled or any(r.changed for r in added) else "the vector is zero"


SIDES = ("tuned", "base", "target", "output")
LEFT_OUT = "--exclude leaves tensors out"


def _sides_of(result: JobResult) -> dict[str, int]:
    """Return how many NaN and infinities each side of a tensor holds, where it holds any."""
    counts = {side: getattr(result, f"{side}_nonfinite") for side in SIDES}
    return {side: count for side, count in counts.items() if count}


def nonfinite_line(result: JobResult) -> str:
    """Return which values of a tensor NaN, infinities or the range of a dtype decide."""
    sides = ", ".join(f"{count} in {side}" for side, count in _sides_of(result).items())
    why = f"not finite: {sides}" if sides else "not finite"
    if isinstance(result.job, CompareJob):  # of several pairs, whose counts add up
        why = "not finite"
    if not sides and result.job.deltas[0].pair is not None:
        why = "differences beyond the range of their dtype"
    return f"{result.job.name}: {result.lost} of {result.job.numel} values ({why})"


def refuse_nonfinite(results: Sequence[JobResult], allow_nonfinite: bool) -> None:
    """Raise NonfiniteError naming the tensors in which NaN or infinities decide a value."""
    wrong = [result for result in results if result.lost]
    if not wrong or allow_nonfinite:
        return
    advice = (
        "no finite difference leads from base to tuned there, so targets would keep their own"
        f" values: {LEFT_OUT}; --allow-nonfinite goes on, for the exact base alone"
    )
    if not any(r.tuned_nonfinite or r.base_nonfinite for r in wrong) and any(
        r.output_nonfinite for r in wrong
    ):
        advice = (
            f"a smaller lam or a wider --dtype may hold what overflows; {LEFT_OUT};"
            " --allow-nonfinite writes it as it is"
        )
    lines = up_to_five([nonfinite_line(result) for result in wrong])
    raise NonfiniteError(f"values that are not finite, or out of range:\n{lines}\n({advice})")


def refuse_announced(
    vector: SkillVector, allow_nonfinite: bool, names: Collection[str]
) -> list[str]:
    """Raise NonfiniteError where manifests say that values of these tensors have no delta.

    Returns a warning that says so where that is allowed.
    """
    found = {name: count for name, count in vector.nonfinite().items() if name in names}
    if not found:
        return []
    merged = vector.manifest["tuned"] is None
    holders = Counter(name for part in vector.parts for name in part.nonfinite())
    entries = [part.manifest.get("tensors", {}) for part in (vector, *vector.parts)]
    views = {name for part in entries for name, entry in part.items() if entry["codec"] == "view"}
    lines = []
    for name, count in found.items():  # those of several may overlap, or lie beside what is seen
        most = "at most " if (merged and holders[name] != 1) or name in views else ""
        lines.append(f"{name}: {most}{count} of {vector.deltas[name].spec.numel} values")
    said = f"{vector.ref}: made with --allow-nonfinite: where tuned or base was not finite, " + (
        "no target gets anything" if merged else "only the exact base gets tuned's values"
    )
    if not allow_nonfinite:
        raise NonfiniteError(
            f"{said}:\n{up_to_five(lines)}\n({LEFT_OUT}; --allow-nonfinite goes on)"
        )
    return [f"{said}:\n{up_to_five(lines)}"]


def tell_nonfinite(report: Report, results: Sequence[JobResult]) -> None:
    """Add counts of NaN and infinities to facts and ledger, and sentences on what they are."""
    lines = {line["name"]: line for line in report.ledger}
    totals: Counter[str] = Counter()
    lost, kept, gone = [], [], []
    for result in results:
        sides = _sides_of(result)
        if result.lost:
            lost.append(nonfinite_line(result))
            sides["lost"] = result.lost
        elif sides and result.target_nonfinite in (0, result.output_nonfinite):
            kept.append(f"{result.job.name}: {max(sides.values())} of {result.job.numel} values")
        elif sides:
            gone.append(nonfinite_line(result))
        if sides:
            lines[result.job.name]["nonfinite"] = sides
            totals.update(sides)
    if totals:
        report.facts["nonfinite"] = dict(totals)
    if lost:
        report.warnings.append(f"values that are not finite, or out of range:\n{up_to_five(lost)}")
    if gone:
        report.warnings.append(
            f"NaN or infinities of the target that tuned's values replace:\n{up_to_five(gone)}"
        )
    if kept:
        report.warnings.append(
            f"NaN or infinities that nothing changes, so they stay as they are:\n{up_to_five(kept)}"
        )


def rounding_warning(results: Sequence[JobResult], column: int, about: str = "") -> list[str]:
    """Return what to say of tensors whose whole delta is the rounding of one side to a dtype.

    `column` is that of the delta's squared norm in the sums of the results; `about` stands before
    shares of a sample.
    """
    total = sum(float(result.sums[column]) for result in results)
    ways: dict[int, list[JobResult]] = {}
    for result in results:
        if result.casts and result.sums[column] > 0:
            ways.setdefault((result.casts & -result.casts).bit_length() - 1, []).append(result)
    found = []
    for way, held in sorted(ways.items()):
        side, dtype = operators.CASTS[way]
        other = "base" if side == "tuned" else "tuned"
        share = sum(float(result.sums[column]) for result in held) / total
        found.append(
            f"{about}{100 * share:.3g} % of the vector's squared norm is rounding, not training: in"
            f" these tensors {side} is {other} rounded to {dtype}, value for value ({LEFT_OUT}):\n"
            + up_to_five([result.job.name for result in held])
        )
    return found


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


def mismatch_line(result: JobResult, side: str) -> str:
    return (
        f"{result.job.name}: {result.mismatches} of {result.job.numel} values differ from the"
        f" {side}, the first at flat position {result.first_mismatch}"
    )


def describe_vector(vector: StoredVector) -> Report:
    """Return what inspect says of a stored vector."""
    stored, manifest = vector.stored, vector.manifest
    report = Report("inspect", {"path": shown(stored.ref, stored.path), "nbytes": stored.nbytes})
    facts, entries = report.facts, manifest["tensors"]
    facts["kind"] = "vector"
    for key in ("schema", "tool", "command", "formula", "identity", "dtype", "codec", "exactness",
                "base", "tuned", "parents", "recipe", "training", "license", "tied", "excluded",
                "differing"):  # fmt: skip
        facts[key] = manifest.get(key)
    facts |= {"untied": vector.untied} if vector.untied else {}
    report.warnings += vector.warnings
    numel = sum(delta.spec.numel for delta in stored.deltas.values())
    changed = sum(entry["changed"] for entry in entries.values())
    codecs: dict[str, dict[str, int]] = {}
    layers: dict[str, float] = defaultdict(float)
    for name, delta in stored.deltas.items():
        entry = entries[name]
        held = codecs.setdefault(delta.codec, {"tensors": 0, "nbytes": 0})
        held["tensors"] += 1
        held["nbytes"] += delta.nbytes
        layers[layer_of(name) or NO_LAYER] += entry["norm"] ** 2
        line = ledger_line(delta.spec, "delta") | {"codec": delta.codec, "nbytes": delta.nbytes}
        line |= {"numel": delta.spec.numel, "changed": entry["changed"], "norm": entry["norm"]}
        report.ledger.append(line)
    report.ledger += [{"name": name, "status": "equal"} for name in manifest["equal"]]
    largest = sorted(layers.items(), key=lambda item: -item[1])
    facts |= {
        "files": [os.path.basename(file) for file in stored.files],
        "lineage": vector.dtypes,
        "nonfinite": sum(vector.nonfinite().values()),
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": hypot(*(entry["norm"] for entry in entries.values())),
        "codecs": codecs,
        "layers": [{"name": name, "norm": sq**0.5} for name, sq in largest],
    }
    return report
