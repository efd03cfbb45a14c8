"""Planning what is written of a vector: its file, or a patch."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.patch_lists import FORMS, NARROW
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.list import ListJob
from skillvec.engine.jobs.store import StoreJob
from skillvec.engine.plan import Job, Plan
from skillvec.errors import IncompatibleError, UsageError, only_here, up_to_five_each
from skillvec.files.header import ITEMSIZE
from skillvec.files.tensors import Source, as_integers
from skillvec.ops.block import block_count
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.match import to_layout
from skillvec.vectors.vector import SkillVector
from skillvec.vectors.writer import Entry, in_file_order


def plan_store(
    verb: str, vector: SkillVector, storage: Mapping[str, tuple[str, str]]
) -> tuple[Plan, list[Entry]]:
    """Plan the writing of a vector: `storage` maps names to dtype and codec.

    Returns the entries in the order of the file as well, in which the jobs stand.
    """
    entries = in_file_order(
        Entry(name, dtype, delta.spec.shape, codec,
              delta.stack.rank if delta.stack and codec == "factors" else 0)
        for name, delta in vector.deltas.items() for dtype, codec in [storage[name]]
    )  # fmt: skip
    jobs: list[Job] = []
    row = 0
    for entry in entries:
        delta, codec = vector.deltas[entry.name].stored_as(entry.dtype), entry.codec
        if delta.stack is not None and codec == "factors":
            delta, codec = delta.stack, "packed"
        note = vector.notes.get(entry.name, "")
        jobs.append(StoreJob(
            entry.name, entry.numel, out_dtype=entry.dtype, deltas=(delta,), codec=codec,
            first_block=row, note=note,
        ))  # fmt: skip
        row += block_count(entry.numel)
    for name, (tuned, base) in vector.pair_integers().items():
        jobs.append(proof_of_equal(name, base, tuned))
    ledger = vector.list_left_out()
    ledger += [line for side in vector.sides().values() for line in list_dropped(side)]
    plan = Plan(
        verb, jobs, ledger=ledger, vectors=vector.files(), mixes=vector.mixes(),
        warnings=vector.list_warnings(),
    )  # fmt: skip
    return plan, entries


def proof_of_equal(name: str, base: Source, tuned: Source) -> CopyJob:
    """Return the job that compares a tensor that no delta carries with the base's, bit for bit."""
    point, expected = as_integers(base), as_integers(tuned)
    return CopyJob(name, point.numel, point=point, expected=expected)


def list_dropped(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return ledger lines of what a quantised checkpoint holds beside its weights."""
    formats = checkpoint.formats.items()
    return [
        {"name": name, "status": "left out", "note": note}
        for name, note in formats if name not in checkpoint
    ]  # fmt: skip


def plan_patch(vector: SkillVector, base: Checkpoint, form: str = "lists") -> Plan:
    """Plan the list of what vector + base changes, under the base's names.

    Where the base has another layout than the vector, tensors as the vector knows them are read
    too: their digests say whether it is the exact base. Raises IncompatibleError for another base,
    and for tensors that the form cannot carry.
    """
    if form not in FORMS:
        raise UsageError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    entries, fitted = vector.manifest["tensors"], to_layout(vector, base)
    jobs: list[Job] = []
    problems, row = defaultdict(list), 0
    changed: dict[str, int] = {}
    seen: dict[str, None] = {}  # tensors of the vector that are listed in another layout
    for name, delta in fitted.vector.deltas.items():
        own = list(dict.fromkeys(delta.names))
        changed[name] = sum(entries[part]["changed"] for part in own)
        problem = _no_list_of(name, delta, vector, base, form if changed[name] else "lists")
        if problem is not None:
            problems[problem.kind].append(problem.said)
            continue
        spec = base[name]
        seen |= dict.fromkeys(own) if delta.is_relaid else {}
        jobs.append(ListJob(
            name, spec.numel, out_dtype=spec.dtype, point=spec, deltas=(delta,), first_block=row,
            note=fitted.vector.notes.get(name, ""),
            base_digest=None if delta.is_relaid else vector.base_digest(own[0]),
        ))  # fmt: skip
        row += block_count(spec.numel)
    if seen and (count := vector.manifest["exactness"]["replacements"]):
        problems["that no difference restores"] = [
            f"{count} values that no difference restores, which stand in the vector's own layout"
            " alone: name a base that has it"
        ]
    if problems:
        problems |= find_unknown(fitted.vector, base)
        raise IncompatibleError(
            f"no patch can be made of {vector.ref}:\n"
            + "\n".join([up_to_five_each(problems), *fitted.hints])
        )
    wide = max((ITEMSIZE[job.out_dtype] for job in jobs), default=0) if form == "verl" else 0
    bound = 4096 + sum(  # a position takes 4 or 8 bytes, and the header has each name twice
        changed[job.name] * (8 + max(wide, ITEMSIZE[job.out_dtype]))
        + 6 * len(job.name) + 300
        for job in jobs
    )  # fmt: skip
    jobs += [
        CopyJob(name, point.numel, out_dtype=point.dtype, point=point,
                base_digest=vector.base_digest(name))
        for name in seen if (point := fitted.seen[name])
    ]  # fmt: skip
    return Plan("export-patch", jobs, vectors=vector.files(), bound_nbytes=bound)


class _Problem(NamedTuple):
    """Why a tensor cannot have a job: a kind that several may share, and what is said of this."""

    kind: str
    said: str


def _no_list_of(
    name: str, delta: DeltaSource, vector: SkillVector, base: Checkpoint, form: str
) -> _Problem | None:
    """Return why what a delta changes cannot be listed in a form, None where it can."""
    spec, dtypes = base.get(name), dict.fromkeys(map(vector.tuned_dtype, delta.names))
    if spec is None or spec.shape != delta.spec.shape:
        kind = f"not so in {base.ref}"
        return _Problem(kind, f"{name} {list(delta.spec.shape)}: {kind}")
    if [*dtypes] != [spec.dtype]:
        said = f"{name}: tuned is {', '.join(dtypes)}, base {spec.dtype}"
        return _Problem("of different dtypes", said)
    if form != "lists" and spec.numel >= NARROW:
        said = f"{name}: {spec.numel} values, and {form} sends positions in 32 bits"
        return _Problem("too large for the form", f"{said}: --form lists")
    return None


def find_unknown(vector: SkillVector, model: Checkpoint) -> dict[str, list[str]]:
    """Return the tensors of a model that its vector does not speak of."""
    said = vector.manifest
    known = {*vector.deltas, *said["equal"], *said["differing"], *said["tied"], *said["excluded"]}
    return only_here(model, known, model.ref)
