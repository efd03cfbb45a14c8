"""What results of a run tell, whatever the verb: NaN and infinities, rounding, the verdict."""

from collections import Counter
from collections.abc import Collection, Sequence

from skillvec.engine.jobs.add import AddJob
from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.plan import JobResult
from skillvec.errors import NonfiniteError, up_to_five
from skillvec.files.staging import Staging
from skillvec.ops import arithmetic
from skillvec.report import Report
from skillvec.vectors.vector import SkillVector


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


def rounding_warning(results: Sequence[JobResult], column: int) -> list[str]:
    """Return what to say of tensors whose whole delta is the rounding of one side to a dtype.

    `column` is that of the delta's squared norm in the sums of the results.
    """
    total = sum(float(result.sums[column]) for result in results)
    ways: dict[int, list[JobResult]] = {}
    for result in results:
        if result.casts and result.sums[column] > 0:
            ways.setdefault((result.casts & -result.casts).bit_length() - 1, []).append(result)
    found = []
    for way, held in sorted(ways.items()):
        side, dtype = arithmetic.CASTS[way]
        other = "base" if side == "tuned" else "tuned"
        share = sum(float(result.sums[column]) for result in held) / total
        found.append(
            f"{100 * share:.3g} % of the vector's squared norm is rounding, not training: in"
            f" these tensors {side} is {other} rounded to {dtype}, value for value ({LEFT_OUT}):\n"
            + up_to_five([result.job.name for result in held])
        )
    return found


def tell_resumed(report: Report, stage: Staging) -> None:
    if stage.resumed:
        report.facts["resumed"] = stage.resumed
