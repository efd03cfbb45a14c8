"""verify: the proof from the disk of what a file claims."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from skillvec.checkpoints.align import seen_as
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.locate import locate, relocate
from skillvec.checkpoints.opening import open_checkpoint, open_tensors, reopen
from skillvec.checkpoints.patch import find_patch
from skillvec.engine.outputs import PathLike
from skillvec.engine.plan import JobResult, job_line
from skillvec.engine.plan_checks import (
    plan_verify_apply,
    plan_verify_combination,
    plan_verify_vector,
)
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan, run_plan, show_plan
from skillvec.errors import UsageError, VerificationError, up_to_five
from skillvec.files.file import shown
from skillvec.files.header import TensorSpec
from skillvec.files.official_reader import refuse_misread_files
from skillvec.report import Report, Watcher
from skillvec.vectors.combining import seen_like
from skillvec.vectors.match import verdict_on
from skillvec.vectors.provenance import digests_of, parents_of, read_merged, reopened
from skillvec.vectors.reader import find_vector
from skillvec.vectors.recipe import leaving_out
from skillvec.vectors.vector import SkillVector, StoredVector
from skillvec.verbs._apply import find_unused, plan_request
from skillvec.verbs.findings import correct_verdict, tell_nonfinite


def verify(
    path: PathLike,
    *,
    tuned: PathLike | Checkpoint | None = None,
    base: PathLike | Checkpoint | None = None,
    target: PathLike | Checkpoint | None = None,
    vector: PathLike | SkillVector | None = None,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Prove from the disk what the file or folder `path` claims, bit for bit.

    A vector: vector + `base` = `tuned`, or that a combination is what its parents give. A merged
    model: OUT = round(`target` + lam * `vector`) by the recipe in its header. These inputs are
    found where they were when it was made, unless given here. Raises VerificationError naming the
    tensors where it does not hold, UsageError and FormatError for inputs that cannot be read.
    """
    run = Run.by(engine, workers, dry_run=dry_run, watcher=watcher)
    given = {"tuned": tuned, "base": base, "target": target, "vector": vector}
    place = locate(path, "input")
    stored = find_vector(place)
    if stored is not None:
        made_of = stored.manifest["tuned"] or not stored.manifest["recipe"]  # a pair, an adapter
        _refuse_idle(given, ("tuned", "base") if made_of else ())
        return _verify_vector(SkillVector.of_file(stored), tuned, base, run)
    opened = open_tensors(place, "input")
    recipe = read_merged(opened)
    said, request = recipe["vector"], recipe["request"]
    left_out = leaving_out(request["include"], request["exclude"])
    subtracted = "tuned" in said or (tuned is not None and base is not None)
    _refuse_idle(given, tuple(given) if subtracted else ("target", "vector"))
    if vector is not None:
        displacement = SkillVector.open(vector, rename=request.get("rename", ()))
    elif "tuned" in said:
        displacement = reopened(said, {"tuned": tuned, "base": base}, left_out)
    elif tuned is not None and base is not None:
        displacement = SkillVector.between(tuned, base, left_out=left_out)
    else:
        displacement = reopened(said, rename=request.get("rename", ()))
    unused = find_unused(displacement, left_out)
    point = reopen(target, recipe["target"]["ref"], "target", unused)
    plan, now = plan_request(point, displacement, request)
    same_kind = ("ref" in said) == ("ref" in now["vector"])  # else the bytes decide
    if same_kind and digests_of(now["vector"]) != digests_of(said):
        raise VerificationError(
            f"{displacement.ref} is not the vector that {opened.ref} was made with"
        )
    plan = plan_verify_apply(replace(plan, lam=recipe["lam"]), opened)
    facts = {
        "claim": "OUT = round(TARGET + LAM * V)",
        "path": shown(opened.ref, opened.path),
        "target": point.ref,
        "vector": displacement.ref,
        "lam": plan.lam,
        "verdict": plan.verdict,
    }
    report = show_plan(plan, facts, run)
    if not run.dry_run:
        results = run_plan(measure_plan(plan, run), run)
        specs = (spec for spec in opened.values() if isinstance(spec, TensorSpec))
        refuse_misread_files(specs, VerificationError)
        _conclude(report, results, "merged model's")
    return report


def _refuse_idle(given: Mapping[str, Any], used: Sequence[str]) -> None:
    """Raise UsageError for what verify would not look at: it must not say that it holds."""
    idle = [name for name, value in given.items() if value is not None and name not in used]
    if idle:
        raise UsageError(f"{', '.join(idle)}: this proof does not take it")


def _verify_vector(
    vector: StoredVector,
    tuned: PathLike | Checkpoint | None,
    base: PathLike | Checkpoint | None,
    run: Run,
) -> Report:
    manifest = vector.manifest
    place = shown(vector.ref, vector.stored.path)
    facts = {"path": place, "exactness": manifest["exactness"]}
    if manifest["tuned"] is None:
        plan = plan_verify_combination(vector, parents_of(vector, tuned, base))
        facts |= {"claim": f"VECTOR = {manifest['formula']}"}
    else:
        excluded = set(manifest["excluded"]).__contains__
        theirs, ours = manifest["tuned"]["ref"], manifest["base"]["ref"]
        given = relocate(theirs, "tuned", "--tuned") if tuned is None else tuned
        if not isinstance(given, Checkpoint) and find_patch(given, "tuned"):
            claim = "VECTOR = PATCH - BASE"
            under = relocate(ours, "base", "--base") if base is None else base
            again = SkillVector.patched(given, under)
            left, right = again.tuned, again.base
            plan = plan_verify_combination(vector, again)
        else:
            claim = "VECTOR + BASE = TUNED"
            left = open_checkpoint(given, "tuned", excluded)
            right = seen_like(reopen(base, ours, "base", excluded), vector)
            seen = seen_as(left, right, manifest.get("rename", ()), manifest.get("rows", "strict"))
            plan = plan_verify_vector(vector, seen[0], right)
        facts |= {"claim": claim, "tuned": left.ref, "base": right.ref,
                  "verdict": verdict_on(right, vector)[0]}  # fmt: skip
    report = show_plan(plan, facts, run)
    if run.dry_run:
        return report
    results = run_plan(measure_plan(plan, run), run)
    refuse_misread_files(vector.stored.specs, VerificationError)
    side = "tuned model's" if manifest["tuned"] else "parents'"
    _conclude(report, results, side, manifest)
    return report


def _conclude(
    report: Report,
    results: list[JobResult],
    side: str,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Turn compared jobs into the ledger; raise VerificationError where one does not hold.

    `manifest` is that of a vector: it announces values that are not restored.
    """
    report.ledger, wrong = [], []
    entries, equal = (manifest or {}).get("tensors", {}), (manifest or {}).get("equal", {})
    unrestored: dict[str, int] = {}
    for result in results:
        name = result.job.name
        entry = entries.get(name)
        stated = entry.get("unrestored", 0) if entry else 0
        problem = None
        digest = result.digests.get("point") or result.digests.get("base")
        expected = entry["base"] if entry else equal.get(name)
        if expected and digest not in (None, expected[1]):
            problem = f"{name}: the base's tensor is not the one the vector was made from"
        elif result.mismatches != stated:
            problem = mismatch_line(result, side)
        elif result.digests.get("expected") != result.job.expected_digest:
            problem = f"{name}: the {side} tensor is not the one the vector was made from"
        line = job_line(result.job, "differs" if problem else "verified")
        report.ledger.append(line | ({"unrestored": stated} if stated else {}))
        if problem:
            wrong.append(problem)
        elif stated:
            unrestored[name] = stated
    if wrong:
        raise VerificationError(f"{report.facts['claim']} does not hold:\n{up_to_five(wrong)}")
    correct_verdict(report, results)
    tell_nonfinite(report, results)
    report.facts["verified"] = True
    if manifest is not None and manifest["tuned"]:
        left = ("differing", "excluded")
        report.facts["unrestored"] = unrestored
        report.facts |= {key: manifest[key] for key in left}
        if manifest.get("rows", "strict") != "strict":
            report.facts["rows"] = manifest["rows"]
        report.ledger += [{"name": name, "status": key} for key in left for name in manifest[key]]


def mismatch_line(result: JobResult, side: str) -> str:
    return (
        f"{result.job.name}: {result.mismatches} of {result.job.numel} values differ from the"
        f" {side}, the first at flat position {result.first_mismatch}"
    )
