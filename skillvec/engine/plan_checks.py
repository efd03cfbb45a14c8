"""Planning proofs and comparisons: the same jobs, compared in place of written."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.renaming import numbered
from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.same import SameJob
from skillvec.engine.plan import Job, Plan
from skillvec.engine.plan_models import add_job
from skillvec.engine.plan_vectors import find_unknown, proof_of_equal
from skillvec.errors import IncompatibleError, only_here, up_to_five_each
from skillvec.files.tensors import Source, as_integers
from skillvec.ops.statistics import Request
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.idle import is_idle_buffer
from skillvec.vectors.recipe import is_selected, refuse_idle_globs
from skillvec.vectors.vector import SkillVector

# ------------------------------------------------------------------------------------- verify


def plan_verify_vector(vector: SkillVector, tuned: Checkpoint, base: Checkpoint) -> Plan:
    """Plan the proof that vector + base = tuned, bit for bit."""
    jobs: list[Job] = []
    problems = defaultdict(list)
    for name, delta in vector.deltas.items():
        if name not in tuned or name not in base:
            kind = f"not in {tuned.ref if name not in tuned else base.ref}"
            problems[kind].append(f"{name}: {kind}")
        elif not delta.spec.shape == tuned[name].shape == base[name].shape:
            problems["of different shapes"].append(
                f"{name}: vector {list(delta.spec.shape)}, tuned {list(tuned[name].shape)},"
                f" base {list(base[name].shape)}"
            )
        else:
            job = add_job(base[name], vector, name, tuned[name].dtype, "")
            entry = vector.manifest["tensors"][name]
            digest = entry["tuned"][1] if entry["tuned"] and entry.get("unrestored") else None
            jobs.append(replace(job, expected=tuned[name], expected_digest=digest))
    for name in vector.manifest["equal"]:
        if name not in tuned or name not in base:
            kind = f"not in {tuned.ref if name not in tuned else base.ref}"
            problems[kind].append(f"{name}: {kind}")
        else:
            jobs.append(proof_of_equal(name, base[name], tuned[name]))
    problems |= find_unknown(vector, tuned) | find_unknown(vector, base)
    if any(problems.values()):
        raise IncompatibleError(
            f"{vector.ref} is not of these models:\n{up_to_five_each(problems)}"
        )
    return Plan("verify", jobs, vectors=vector.files())


def plan_verify_combination(vector: SkillVector, again: SkillVector) -> Plan:
    """Plan the proof that a stored combination is what its parts give."""
    if set(vector.deltas) != set(again.deltas):
        alone = only_here(vector.deltas, again.deltas, "the file")
        alone |= only_here(again.deltas, vector.deltas, "what its parts give")
        raise IncompatibleError(
            f"{vector.ref} has other tensors than its parts give:\n{up_to_five_each(alone)}"
        )
    jobs: list[Job] = []
    for name, delta in vector.deltas.items():
        pair = (again.deltas[name], delta)  # the first of two gives digests of its sides
        if pair[0].spec.shape != pair[1].spec.shape:
            raise IncompatibleError(f"{name}: another shape than its parts have")
        jobs.append(SameJob(name, delta.spec.numel, deltas=pair))
    sides: Mapping[str, Source] = again.open_base() or {}
    for name in vector.manifest["equal"]:
        if (spec := sides.get(name)) is not None:  # its digest is compared with the manifest's
            jobs.append(CopyJob(name, spec.numel, point=spec, expected=spec))
    files = [*vector.files(), *again.files()]
    return Plan("verify", jobs, vectors=files, mixes=again.mixes())


def plan_verify_apply(applied: Plan, merged: Checkpoint) -> Plan:
    """Turn the plan of an apply into the proof that its output lies on the disk."""
    jobs: list[Job] = []
    problems = defaultdict(list)
    names = {job.name for job in applied.jobs}
    passed = {line["name"]: line for line in applied.ledger}
    for job in applied.jobs:
        spec = merged.get(job.name)
        assert job.point is not None
        expected = job.out_dtype, list(job.point.shape)
        if isinstance(job, CopyJob):  # as the target has it, whatever it is read as
            expected = passed[job.name]["dtype"], passed[job.name]["shape"]
        if spec is None:
            kind = f"missing in {merged.ref}"
            problems[kind].append(f"{job.name}: {kind}")
        elif (spec.dtype, list(spec.shape)) != expected:
            problems["of another shape or dtype"].append(
                f"{job.name}: expected {expected[0]} {expected[1]}, found"
                f" {spec.dtype} {list(spec.shape)}"
            )
        else:
            jobs.append(replace(job, expected=as_integers(spec)))
    problems |= only_here(merged, names, merged.ref)
    if any(problems.values()):
        raise IncompatibleError(f"{merged.ref} is not of this target:\n{up_to_five_each(problems)}")
    return replace(applied, verb="verify", jobs=jobs, outputs=[], copies=[], texts={})


# -------------------------------------------------------------------------------------- compare


def _compared_as(name: str, vectors: Sequence[SkillVector], names: Sequence[str]) -> str | None:
    """Return the tensor of all vectors that is one with what only some have, None if none is.

    All that have both move them alike. Layers may do so and not be one: of those another vector has
    to say that they are.
    """
    holders = [vector for vector in vectors if name in vector.deltas]
    twins = set.intersection(*(vector.find_same(name) for vector in holders))
    if not twins:
        return None
    said = {vector.manifest["tied"].get(name) for vector in vectors}
    for twin in names:
        may_be = twin in said or not (numbered(name) or numbered(twin))
        if twin in twins and may_be and all(twin in vector.deltas for vector in vectors):
            return twin
    return None


def _without_job(
    name: str, vectors: Sequence[SkillVector], names: Sequence[str]
) -> dict[str, Any] | None:
    """Return the ledger line of what only some vectors have and may be left out, None if not."""
    held = [vector.deltas[name] for vector in vectors if name in vector.deltas]
    if all(is_idle_buffer(name, delta) for delta in held):
        return ledger_line(held[0].spec, "left out", "the model computes it")
    twin = _compared_as(name, vectors, names)
    return None if twin is None else ledger_line(held[0].spec, "tied", f"same delta as {twin}")


def plan_compare(
    vectors: Sequence[SkillVector],
    request: Request,
    against: Checkpoint | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Plan the measuring of vectors tensor by tensor, with the weights `against` beside them."""
    names = list(dict.fromkeys(name for vector in vectors for name in vector.deltas))
    refuse_idle_globs(names, include, exclude)
    jobs, problems, ledger = [], defaultdict(list), []
    for name in names:
        spec = next(vector.deltas[name] for vector in vectors if name in vector.deltas).spec
        if not is_selected(name, include, exclude):
            ledger.append(ledger_line(spec, "excluded"))
            continue
        missing = next((vector for vector in vectors if name not in vector.deltas), None)
        if missing is not None:
            if line := _without_job(name, vectors, names):
                ledger.append(line)
            else:
                kind = f"not in {missing.ref}"
                problems[kind].append(f"{name} {list(spec.shape)}: {kind}")
            continue
        shapes = [vector.deltas[name].spec.shape for vector in vectors]
        if len(set(shapes)) > 1:
            said = f"{name}: " + ", ".join(str(list(shape)) for shape in shapes)
            problems["of different shapes"].append(said)
            continue
        weights = against.get(name) if against is not None else None
        if against is not None and (weights is None or weights.shape != spec.shape):
            kind = f"not so in {against.ref}"
            problems[kind].append(f"{name} {list(spec.shape)}: {kind}")
        deltas = tuple(vector.deltas[name] for vector in vectors)
        jobs.append(CompareJob(name, spec.numel, point=weights, deltas=deltas))
    if problems:
        if against is not None and f"not so in {against.ref}" in problems:
            problems |= only_here(against, names, against.ref)
        raise IncompatibleError(
            "the inputs do not match (--exclude GLOB leaves tensors out):\n"
            + up_to_five_each(problems)
        )
    if not jobs:
        raise IncompatibleError("no tensor is left to compare")
    files = [file for vector in vectors for file in vector.files()]
    mixes = [mix for vector in vectors for mix in vector.mixes()]
    return Plan("orthogonality", jobs, ledger=ledger, vectors=files, mixes=mixes, request=request)
