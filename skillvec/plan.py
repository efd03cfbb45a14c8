"""From headers to plans: which jobs a verb needs, checked before anything is read or written."""

import json
import os
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from skillvec.block import block_count
from skillvec.checkpoint import INDEX, METADATA_KEY, SINGLE, Checkpoint
from skillvec.configs import (
    Written,
    is_of,
    plain_config,
    retyped,
    retyped_config,
    untied_config,
)
from skillvec.deltas import DeltaSource
from skillvec.displacement import ledger_line
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    UsageError,
    only_here,
    up_to_five,
    up_to_five_each,
)
from skillvec.fitting import (
    head_note,
    match,
    parted,
    to_layout,
    verdict_on,
)
from skillvec.job import Job, OutputPlan, Plan
from skillvec.jobs import AddJob, CompareJob, CopyJob, ListJob, PointJob, SameJob, StoreJob
from skillvec.kernels import FLOATS
from skillvec.layouts import numbered
from skillvec.lineage import is_idle_buffer, under_name
from skillvec.measures import Request
from skillvec.patch import FORMS, NARROW
from skillvec.rules import is_selected, refuse_idle_globs
from skillvec.sources import Source, as_integers
from skillvec.storage import (
    ITEMSIZE,
    TensorSpec,
    encode_header,
    file_nbytes,
    read_bytes,
    tensor_nbytes,
)
from skillvec.vector import SkillVector
from skillvec.vectorfile import Entry, in_file_order

# -------------------------------------------------------------------------------------- vectors


def plan_store(
    verb: str, vector: SkillVector, storage: Mapping[str, tuple[str, str]]
) -> tuple[Plan, list[Entry]]:
    """Plan the writing of a vector: `storage` maps names to dtype and codec.

    Returns the entries in the order of the file as well, in which the jobs stand.
    """
    entries = in_file_order(
        Entry(name, storage[name][0], delta.spec.shape, storage[name][1])
        for name, delta in vector.deltas.items()
    )
    jobs: list[Job] = []
    row = 0
    for entry in entries:
        delta = vector.deltas[entry.name].stored_as(entry.dtype)
        note = vector.notes.get(entry.name, "")
        jobs.append(StoreJob(
            entry.name, entry.numel, out_dtype=entry.dtype, deltas=(delta,), codec=entry.codec,
            first_block=row, note=note,
        ))  # fmt: skip
        row += block_count(entry.numel)
    for name, (tuned, base) in vector.pair_integers().items():
        jobs.append(_proof_of_equal(name, base, tuned))
    ledger = vector.list_left_out()
    ledger += [line for side in vector.sides().values() for line in _dropped(side)]
    plan = Plan(
        verb, jobs, ledger=ledger, vectors=vector.files(), mixes=vector.mixes(),
        warnings=vector.list_warnings(),
    )  # fmt: skip
    return plan, entries


def _proof_of_equal(name: str, base: Source, tuned: Source) -> CopyJob:
    """Return the job that compares a tensor that no delta carries with the base's, bit for bit."""
    point, expected = as_integers(base), as_integers(tuned)
    return CopyJob(name, point.numel, point=point, expected=expected)


def _dropped(checkpoint: Checkpoint) -> list[dict[str, Any]]:
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
        problems |= _unknown_to(fitted.vector, base)
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


def _unknown_to(vector: SkillVector, model: Checkpoint) -> dict[str, list[str]]:
    """Return the tensors of a model that its vector does not speak of."""
    said = vector.manifest
    known = {*vector.deltas, *said["equal"], *said["differing"], *said["tied"], *said["excluded"]}
    return only_here(model, known, model.ref)


# -------------------------------------------------------------------------------------- apply

SHARD_NBYTES = 5 * 10**9  # of new shards; transformers' own default is of this size


def _add_job(target: Source, vector: SkillVector, source: str, out_dtype: str, note: str) -> AddJob:
    delta = vector.deltas[source]
    own = delta.name_in_manifest(source)
    return AddJob(
        target.name,
        target.numel,
        out_dtype=out_dtype,
        point=target,
        deltas=(delta,),
        base_digest=vector.base_digest(own) if own else None,
        tuned_dtype=vector.tuned_dtype(source, own) if own else "",
        note=note or vector.notes.get(source, ""),
    )


def plan_apply(
    target: Checkpoint,
    vector: SkillVector,
    *,
    lam: float = 1.0,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    recipe: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan target + lam * vector in the target's own shard layout.

    A target that is no safetensors, or quantised, is written as shards of plain safetensors.
    Raises IncompatibleError with up to five names and both shapes where the vector does not fit.
    """
    mixes = vector.mixes()  # those that go nowhere are measured too
    untransferred = [name for name in vector.untransferred() if name in target]
    fitted = to_layout(vector, target, rename, rows)
    routes, passed, ledger, untied = match(target, fitted, include, exclude)
    moves = {name: fitted.vector.deltas[source] for name, source in routes.items()}
    is_untied = bool(untied) or parted(target, fitted.own, moves)
    vector = fitted.vector
    verdict, warnings = verdict_on(fitted.seen, vector)
    if lost := _not_carried(vector, moves):
        verdict = "same family" if verdict == "exact base" else verdict
        warnings.append(lost)
    if untransferred:
        warnings.append(
            "integer tensors in which tuned differs from base stay the target's:\n"
            + up_to_five(untransferred)
        )
    heads = {head: under_name(target[source], head) for head, source in untied.items()}
    target = target.with_tensors({**target, **heads}) if heads else target
    notes = {head: head_note(moves.get(head)) for head in untied}
    dtypes = {
        name: (dtype if dtype and spec.dtype in FLOATS and name in routes else spec.dtype)
        for name, spec in target.items()
    }
    jobs: list[Job] = []
    outputs: list[OutputPlan] = []
    files = _shards(target, dtypes, untied)
    for file, specs in files:
        layout = [(spec.name, dtypes[spec.name], spec.shape) for spec in specs]
        header = encode_header(layout, _metadata(target, specs, recipe))
        position = len(header)
        for spec in specs:
            at = len(outputs), position
            jobs.append(_point_job(spec, vector, routes, dtypes, notes, at))
            position += tensor_nbytes(dtypes[spec.name], spec.shape)
        outputs.append(OutputPlan(file, position, header))
    ledger += [ledger_line(target[name], *why) for name, why in passed.items()]
    ledger += _dropped(target)
    beside = _Beside([], {}, [], [])
    if target.is_folder:
        written = _written(target, dtypes, routes if dtype else ())
        weight_map = {spec.name: file for file, specs in files for spec in specs}
        texts = _texts(target, outputs, weight_map, written, is_untied, untied)
        beside = _beside(target, outputs, texts, written)
    return Plan(
        "apply", jobs, outputs, beside.copies, ledger, vector.files(), mixes,
        lam * vector.scale, rounding, seed, verdict, warnings + beside.warnings, beside.texts,
        beside.left_behind, {**vector.notes, **notes},
    )  # fmt: skip


def _point_job(
    spec: Source, vector: SkillVector, routes: Mapping[str, str], dtypes: Mapping[str, str],
    notes: Mapping[str, str], output: tuple[int, int],
) -> PointJob:  # fmt: skip
    """Return the job of a tensor of the target: add the delta that `routes` gives it, or copy."""
    if spec.name not in routes:
        point = as_integers(spec)  # the header says what they are
        return CopyJob(spec.name, point.numel, out_dtype=point.dtype, point=point, output=output)
    source = routes[spec.name]
    note = "" if source == spec.name else f"tied: takes the delta of {source}"
    note = notes.get(spec.name, note)
    return replace(_add_job(spec, vector, source, dtypes[spec.name], note), output=output)


class _Beside(NamedTuple):
    """What comes along with the weights of an output: as in `Plan`."""

    copies: list[tuple[str, str]]
    texts: dict[str, str]
    left_behind: list[tuple[str, str]]
    warnings: list[str]


def _beside(
    target: Checkpoint, outputs: Sequence[OutputPlan], texts: dict[str, str], written: Written
) -> _Beside:
    """Return which files of a target's folder come along, beside `texts`, and which do not."""
    warnings = []
    if "config.json" not in texts and not is_of(target.config, written):
        warnings.append(
            "config.json names a dtype that no tensor has, as the target's does, and"
            " from_pretrained goes by it: --dtype makes the two agree"
        )
    own = target.opened.is_safetensors and INDEX in target.place.files
    kept = own and target.is_plain and INDEX not in texts
    made = [output.name for output in outputs]
    copies, left = target.side_files(made, own and (kept or INDEX in texts))
    copies = [(source, name) for source, name in copies if name not in texts]
    if kept:
        copies.append((target.place.files[INDEX], INDEX))
    return _Beside(copies, texts, left, warnings)


def _not_carried(vector: SkillVector, moves: Mapping[str, DeltaSource]) -> str:
    """Return what to say where values that no difference restores do not come along, "" else."""
    parts = [part for delta in moves.values() if delta.is_relaid for part in delta.parts]
    kept = vector.manifest.get("exactness", {}).get("replacements", 0)
    stored = kept and any(part.is_stored for part in parts)
    pairs = [part.pair for part in parts if part.pair is not None]
    if not stored and not any(pair.dtype in ("F32", "F64") for pair in pairs):
        return ""
    count = f"{kept} values" if stored else "values"
    return (
        f"{count} of tuned that no difference restores are known in the layout of the vector's base"
        " alone, and the target has another: where they lie, base + v is tuned but for a rounding,"
        " and NaN or infinities of tuned do not come"
    )


def _metadata(
    target: Checkpoint, specs: Sequence[Source], recipe: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return the header metadata of a file of the output: that of its own shard of the target.

    An old recipe goes, and offsets of the writer whose parts are put together here.
    """
    own = target.opened.labels.get(specs[0].path, {}) if specs and target.is_plain else {}
    kept = {k: v for k, v in own.items() if k != METADATA_KEY and not k.startswith("DCP_")}
    kept = kept if "format" in kept else {"format": "pt"} | kept
    if recipe is not None:
        kept[METADATA_KEY] = json.dumps(recipe, separators=(",", ":"), ensure_ascii=False)
    return kept


def _shards(
    target: Checkpoint, dtypes: Mapping[str, str], added: Container[str]
) -> Sequence[tuple[str, Sequence[Source]]]:
    """Return the files of the output with their tensors in order: the target's own, or new ones.

    Those in `added` come last in the file where their values are read.
    """
    if target.is_plain:
        by_file: dict[str, list[TensorSpec]] = {}
        for spec in target.values():
            assert isinstance(spec, TensorSpec)
            by_file.setdefault(spec.path, []).append(spec)
        for specs in by_file.values():
            specs.sort(key=lambda spec: (spec.name in added, spec.start, spec.nbytes))
        return [(os.path.basename(path), specs) for path, specs in by_file.items()]
    shards: list[list[Source]] = [[]]
    held = 0
    for spec in sorted(target.values(), key=lambda s: -ITEMSIZE.get(dtypes[s.name], 1)):
        nbytes = tensor_nbytes(dtypes[spec.name], spec.shape)
        if shards[-1] and held + nbytes > SHARD_NBYTES and target.is_folder:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += nbytes
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return list(zip(names, shards, strict=True))


def _written(target: Checkpoint, dtypes: Mapping[str, str], asked: Container[str]) -> Written:
    """Return what dtypes the output has, where those of the tensors in `asked` were asked for."""
    floats = (
        ("" if name in asked else spec.dtype, dtypes[name])
        for name, spec in target.items() if spec.dtype in FLOATS
    )  # fmt: skip
    return Written(frozenset(floats), not target.opened.is_loadable)


def _texts(
    target: Checkpoint, outputs: list[OutputPlan], weight_map: dict[str, str],
    written: Written, is_untied: bool, added: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Return the index and config of the output where they are not those of the target."""
    texts: dict[str, str] = {}
    total = sum(output.nbytes - len(output.header) for output in outputs)
    if target.is_plain:
        own = target.place.files.get(INDEX)
        if own is not None and (added or written.converted):
            index: dict[str, Any] = json.loads(read_bytes(own, 0, file_nbytes(own)))
            made = _index_of(index, target, total, written, added, weight_map)
            texts |= {INDEX: _as_text(made)} if made != index else {}
    elif len(outputs) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        texts[INDEX] = _as_text(index)
    config = plain_config(target.config) if target.formats else target.config
    if written.converted or written.is_new or not (target.is_plain or is_of(config, written)):
        config = retyped_config(config, written)
    config = untied_config(config) if is_untied else config
    if target.config and (target.formats or config != target.config):
        texts["config.json"] = _as_text(config)
    return texts


def _index_of(
    index: Mapping[str, Any], target: Checkpoint, total: int, written: Written,
    added: Mapping[str, str], weight_map: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return the target's own index with what is otherwise in the output."""
    said = index.get("metadata")
    metadata = dict(said) if isinstance(said, dict) else {}
    if added or total != target.nbytes:
        metadata["total_size"] = total
    if written.converted:
        retyped(metadata, written)
    if added and type(metadata.get("total_parameters")) is int:
        metadata["total_parameters"] += sum(target[name].numel for name in added)
    held = index["weight_map"] | {name: weight_map[name] for name in added}
    changed = {"metadata": metadata} if metadata != said else {}
    return {**index, **changed, "weight_map": held}


def _as_text(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2) + "\n"
    except RecursionError:
        raise FormatError("config.json or the index is nested too deeply to be written") from None


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
            job = _add_job(base[name], vector, name, tuned[name].dtype, "")
            entry = vector.manifest["tensors"][name]
            digest = entry["tuned"][1] if entry["tuned"] and entry.get("unrestored") else None
            jobs.append(replace(job, expected=tuned[name], expected_digest=digest))
    for name in vector.manifest["equal"]:
        if name not in tuned or name not in base:
            kind = f"not in {tuned.ref if name not in tuned else base.ref}"
            problems[kind].append(f"{name}: {kind}")
        else:
            jobs.append(_proof_of_equal(name, base[name], tuned[name]))
    problems |= _unknown_to(vector, tuned) | _unknown_to(vector, base)
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
