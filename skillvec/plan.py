"""From headers to jobs: what will be read, computed and written, before anything is.

A plan is plain picklable data: addresses, names and numbers, no tensors and no closures. It can be
printed (`--dry-run`), handed to any engine, and holds the ledger of every tensor that needs no job.
"""

import json
import os
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from skillvec.checkpoint import INDEX, METADATA_KEY, PICKLES, SINGLE, Checkpoint
from skillvec.configs import (
    Written,
    is_of,
    plain_config,
    retyped,
    retyped_config,
    untied_config,
)
from skillvec.deltas import (
    ComputedDelta,
    DeltaSource,
    MixDelta,
    PairDelta,
    ViewDelta,
    names_of,
)
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
from skillvec.kernels import FLOATS
from skillvec.layouts import numbered
from skillvec.lineage import is_idle_buffer, under_name
from skillvec.measures import Request
from skillvec.patch import FORMS, NARROW
from skillvec.rules import is_selected, refuse_idle_globs
from skillvec.sources import Source, as_integers, files_of
from skillvec.storage import (
    ITEMSIZE,
    TensorSpec,
    encode_header,
    file_nbytes,
    read_bytes,
    tensor_nbytes,
)
from skillvec.vector import SkillVector
from skillvec.vectorfile import Entry, StoredDelta, VectorFile, block_count, in_file_order


@dataclass(frozen=True)
class Job:
    """All the work on one tensor.

    `operator` is store (deltas[0] into a vector file), add (point + lam * deltas[0]), copy (point),
    compare (deltas with each other and with the weights `point`, as the plan's request says), same
    (deltas[0] is deltas[1]), list (what point + deltas[0] changes, into a patch) or measure (what
    the operator of deltas[0] needs to know). The result goes to `output`, a file number and an
    absolute offset, or is compared with `expected`, or is only measured.
    """

    name: str
    operator: str
    numel: int
    out_dtype: str = ""
    point: Source | None = None
    deltas: tuple[DeltaSource, ...] = ()
    output: tuple[int, int] | None = None
    expected: Source | None = None
    expected_digest: str | None = None  # of `expected`, where differing values are announced
    base_digest: str | None = None  # of the tensor the stored delta was taken from
    tuned_dtype: str = ""  # the dtype in which replacements hold
    codec: str = ""  # of the vector being written
    first_block: int = 0  # its row there
    note: str = ""

    @property
    def nbytes_read(self) -> int:
        sides = (self.point, self.expected, *self.deltas)
        return sum(side.nbytes for side in sides if side is not None)

    def files(self) -> Iterator[str]:
        """Yield the files that its tensors lie in, perhaps one more than once; no vector files."""
        for side in (self.point, self.expected):
            if side is not None:
                yield from files_of(side)
        yield from _delta_files(self.deltas)


def _delta_files(deltas: Iterable[Any]) -> Iterator[str]:
    for delta in deltas:
        if isinstance(delta, PairDelta):
            yield from files_of(delta.tuned)
            yield from files_of(delta.base)
        elif isinstance(delta, ComputedDelta):
            yield from files_of(delta.source)
        elif isinstance(delta, MixDelta):
            yield from _delta_files(delta.sources)
        elif isinstance(delta, ViewDelta):
            yield from _delta_files(delta.view.sources)


@dataclass(frozen=True)
class OutputPlan:
    """A file to write: its name inside the output, size in bytes and (for models) header."""

    name: str
    nbytes: int
    header: bytes = b""


@dataclass(frozen=True)
class Plan:
    """Jobs in the order of their output, files, and lines of the ledger that need no work."""

    verb: str
    jobs: list[Job]
    outputs: list[OutputPlan] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)  # side files: source, name
    ledger: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[VectorFile] = field(default_factory=list)  # read from
    mixes: list[MixDelta] = field(default_factory=list)  # of whole combinations
    lam: float = 1.0
    rounding: str = "nearest"
    seed: int = 0
    verdict: str = ""
    warnings: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # files to write: index, changed config
    left_behind: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    layout: Mapping[str, str] = field(default_factory=dict)  # how tensors of another layout fit
    bound_nbytes: int = 0  # the most that a vector takes
    sure_nbytes: int = 0  # of them, what it takes whatever its values are
    request: Request | None = None  # what compare measures

    @property
    def expects_base(self) -> bool:
        """Whether the target is likely to be the vector's exact base; its digests decide."""
        return self.verdict in ("", "exact base")  # verify proves a vector on its base

    @property
    def nbytes_read(self) -> int:
        return sum(job.nbytes_read for job in self.jobs) + sum(
            file_nbytes(source) for source, _ in self.copies
        )

    @property
    def nbytes_written(self) -> int:
        """The most that is written."""
        outputs = self.bound_nbytes + sum(output.nbytes for output in self.outputs)
        outputs += sum(len(text.encode()) for text in self.texts.values())
        return outputs + sum(file_nbytes(source) for source, _ in self.copies)

    @property
    def least_nbytes(self) -> int:
        """The least that is written."""
        return self.nbytes_written - self.bound_nbytes + self.sure_nbytes

    def files(self) -> list[str]:
        """Return every file that is read, each once: vectors, tensors, side files."""
        held = [file for vector in self.vectors for file in vector.files]
        held += [file for job in self.jobs for file in job.files()]
        held += [file for mix in self.mixes for file in _delta_files([mix])]
        return list(dict.fromkeys(held + [source for source, _ in self.copies]))


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
    jobs, row = [], 0
    for entry in entries:
        delta = vector.deltas[entry.name]
        if isinstance(delta, PairDelta):
            delta = delta._replace(dtype=entry.dtype)
        jobs.append(
            Job(
                entry.name,
                "store",
                entry.numel,
                out_dtype=entry.dtype,
                deltas=(delta,),
                codec=entry.codec,
                first_block=row,
                note=vector.notes.get(entry.name, ""),
            )
        )
        row += block_count(entry.numel)
    for name, (tuned, base) in vector.pair_integers().items():
        point, expected = as_integers(base), as_integers(tuned)
        jobs.append(Job(name, "copy", point.numel, point=point, expected=expected))
    ledger = vector.list_left_out()
    ledger += [line for side in vector.sides().values() for line in _dropped(side)]
    plan = Plan(
        verb, jobs, ledger=ledger, vectors=vector.files(), mixes=vector.mixes(),
        warnings=vector.list_warnings(),
    )  # fmt: skip
    return plan, entries


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
    jobs, problems, row = [], defaultdict(list), 0
    changed: dict[str, int] = {}
    seen: dict[str, None] = {}  # tensors of the vector that are listed in another layout
    for name, delta in fitted.vector.deltas.items():
        spec, own = base.get(name), list(dict.fromkeys(names_of(delta)))
        dtypes = dict.fromkeys(map(vector.tuned_dtype, own))
        changed[name] = sum(entries[part]["changed"] for part in own)
        if spec is None or spec.shape != delta.spec.shape:
            kind = f"not so in {base.ref}"
            problems[kind].append(f"{name} {list(delta.spec.shape)}: {kind}")
        elif [*dtypes] != [spec.dtype]:
            said = f"{name}: tuned is {', '.join(dtypes)}, base {spec.dtype}"
            problems["of different dtypes"].append(said)
        elif form != "lists" and spec.numel >= NARROW and changed[name]:
            said = f"{name}: {spec.numel} values, and {form} sends positions in 32 bits"
            problems["too large for the form"].append(f"{said}: --form lists")
        else:
            is_view = isinstance(delta, ViewDelta)
            seen |= dict.fromkeys(own) if is_view else {}
            note = fitted.vector.notes.get(name, "")
            jobs.append(Job(
                name, "list", spec.numel, spec.dtype, spec, (delta,), first_block=row, note=note,
                base_digest=None if is_view else vector.base_digest(own[0]), tuned_dtype=spec.dtype,
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
    proofs = [
        Job(name, "copy", point.numel, point.dtype, point, base_digest=vector.base_digest(name))
        for name in seen if (point := fitted.seen[name])
    ]  # fmt: skip
    wide = max((ITEMSIZE[job.out_dtype] for job in jobs), default=0) if form == "verl" else 0
    bound = 4096 + sum(  # a position takes 4 or 8 bytes, and the header has each name twice
        changed[job.name] * (8 + max(wide, ITEMSIZE[job.out_dtype]))
        + 6 * len(job.name) + 300
        for job in jobs
    )  # fmt: skip
    return Plan("export-patch", jobs + proofs, vectors=vector.files(), bound_nbytes=bound)


def _unknown_to(vector: SkillVector, model: Checkpoint) -> dict[str, list[str]]:
    """Return the tensors of a model that its vector does not speak of."""
    said = vector.manifest
    known = {*vector.deltas, *said["equal"], *said["differing"], *said["tied"], *said["excluded"]}
    return only_here(model, known, model.ref)


# -------------------------------------------------------------------------------------- apply

SHARD_NBYTES = 5 * 10**9  # of new shards; transformers' own default is of this size


def _add_job(target: Source, vector: SkillVector, source: str, out_dtype: str, note: str) -> Job:
    delta = vector.deltas[source]
    # in another layout a stored delta keeps the name under which the manifest speaks of it
    own = delta.spec.name if isinstance(delta, StoredDelta) else source
    return Job(
        target.name,
        "add",
        target.numel,
        out_dtype=out_dtype,
        point=target,
        deltas=(delta,),
        base_digest=None if isinstance(delta, ViewDelta) else vector.base_digest(own),
        tuned_dtype="" if isinstance(delta, ViewDelta) else vector.tuned_dtype(source, own),
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
    jobs, outputs = [], []
    weight_map: dict[str, str] = {}
    dtypes = {
        name: (dtype if dtype and spec.dtype in FLOATS and name in routes else spec.dtype)
        for name, spec in target.items()
    }
    for number, (file, specs) in enumerate(_shards(target, dtypes, untied)):
        metadata = _metadata(target, specs)
        if recipe is not None:
            metadata[METADATA_KEY] = json.dumps(recipe, separators=(",", ":"), ensure_ascii=False)
        header = encode_header([(s.name, dtypes[s.name], s.shape) for s in specs], metadata)
        position = len(header)
        for spec in specs:
            out_dtype = dtypes[spec.name]
            if spec.name in routes:
                source = routes[spec.name]
                note = "" if source == spec.name else f"tied: takes the delta of {source}"
                job = _add_job(spec, vector, source, out_dtype, notes.get(spec.name, note))
            else:
                point = as_integers(spec)  # the header says what they are
                job = Job(spec.name, "copy", point.numel, out_dtype=point.dtype, point=point)
            jobs.append(replace(job, output=(number, position)))
            position += tensor_nbytes(out_dtype, spec.shape)
        outputs.append(OutputPlan(file, position, header))
        weight_map |= {spec.name: file for spec in specs}
    ledger += [ledger_line(target[name], *why) for name, why in passed.items()]
    ledger += _dropped(target)
    copies: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    texts: dict[str, str] = {}
    if target.is_folder:
        written = _written(target, dtypes, routes if dtype else ())
        texts = _texts(target, outputs, weight_map, written, is_untied, untied)
        if "config.json" not in texts and not is_of(target.config, written):
            warnings.append(
                "config.json names a dtype that no tensor has, as the target's does, and"
                " from_pretrained goes by it: --dtype makes the two agree"
            )
        own = target.kind == "safetensors" and INDEX in target.place.files
        kept = own and target.is_plain and INDEX not in texts
        made = [output.name for output in outputs]
        copies, left = target.side_files(made, own and (kept or INDEX in texts))
        copies = [(source, name) for source, name in copies if name not in texts]
        if kept:
            copies.append((target.place.files[INDEX], INDEX))
    return Plan(
        "apply", jobs, outputs, copies, ledger, vector.files(), mixes,
        lam * vector.scale, rounding, seed, verdict, warnings, texts, left,
        {**vector.notes, **notes},
    )  # fmt: skip


def _not_carried(vector: SkillVector, moves: Mapping[str, DeltaSource]) -> str:
    """Return what to say where values that no difference restores do not come along, "" else."""
    parts = [part for delta in moves.values() if isinstance(delta, ViewDelta)
             for part in delta.view.sources]  # fmt: skip
    kept = vector.manifest.get("exactness", {}).get("replacements", 0)
    stored = kept and any(isinstance(part, StoredDelta) for part in parts)
    if not stored and not any(
        isinstance(p, PairDelta) and p.dtype in ("F32", "F64") for p in parts
    ):
        return ""
    count = f"{kept} values" if stored else "values"
    return (
        f"{count} of tuned that no difference restores are known in the layout of the vector's base"
        " alone, and the target has another: where they lie, base + v is tuned but for a rounding,"
        " and NaN or infinities of tuned do not come"
    )


def _metadata(target: Checkpoint, specs: Sequence[Source]) -> dict[str, str]:
    """Return the header metadata of a file of the output: that of its own shard of the target.

    An old recipe goes, and offsets of the writer whose parts are put together here.
    """
    own = target.opened.labels.get(specs[0].path, {}) if specs and target.is_plain else {}
    kept = {k: v for k, v in own.items() if k != METADATA_KEY and not k.startswith("DCP_")}
    return kept if "format" in kept else {"format": "pt"} | kept


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
    return Written(frozenset(floats), target.kind not in ("safetensors", PICKLES[0]))


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
    problems, jobs = defaultdict(list), []
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
            point, expected = as_integers(base[name]), as_integers(tuned[name])
            jobs.append(Job(name, "copy", point.numel, point=point, expected=expected))
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
    jobs = []
    for name, delta in vector.deltas.items():
        pair = (again.deltas[name], delta)  # the first of two gives digests of its sides
        if pair[0].spec.shape != pair[1].spec.shape:
            raise IncompatibleError(f"{name}: another shape than its parts have")
        jobs.append(Job(name, "same", delta.spec.numel, deltas=pair))
    sides: Mapping[str, Source] = again.open_base() or {}
    for name in vector.manifest["equal"]:
        if (spec := sides.get(name)) is not None:  # its digest is compared with the manifest's
            jobs.append(Job(name, "copy", spec.numel, point=spec, expected=spec))
    files = [*vector.files(), *again.files()]
    return Plan("verify", jobs, vectors=files, mixes=again.mixes())


def plan_verify_apply(applied: Plan, merged: Checkpoint) -> Plan:
    """Turn the plan of an apply into the proof that its output lies on the disk."""
    problems, jobs = defaultdict(list), []
    names = {job.name for job in applied.jobs}
    passed = {line["name"]: line for line in applied.ledger}
    for job in applied.jobs:
        spec = merged.get(job.name)
        assert job.point is not None
        expected = job.out_dtype, list(job.point.shape)
        if job.operator == "copy":  # as the target has it, whatever it is read as
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
        holders = [vector for vector in vectors if name in vector.deltas]
        spec = holders[0].deltas[name].spec
        if not is_selected(name, include, exclude):
            ledger.append(ledger_line(spec, "excluded"))
            continue
        missing = [vector for vector in vectors if name not in vector.deltas]
        if missing:
            if all(is_idle_buffer(name, vector.deltas[name]) for vector in holders):
                ledger.append(ledger_line(spec, "left out", "the model computes it"))
                continue
            twin = _compared_as(name, vectors, names)
            if twin is not None:
                ledger.append(ledger_line(spec, "tied", f"same delta as {twin}"))
            else:
                kind = f"not in {missing[0].ref}"
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
        jobs.append(Job(name, "compare", spec.numel, point=weights, deltas=deltas))
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
