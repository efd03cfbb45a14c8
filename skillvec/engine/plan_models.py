"""Planning an apply: from headers to jobs, shards and side files."""

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from skillvec.checkpoints.checkpoint import METADATA_KEY, Checkpoint
from skillvec.checkpoints.configs import (
    Written,
    is_of,
    plain_config,
    retyped,
    retyped_config,
    untied_config,
)
from skillvec.checkpoints.folder import INDEX, SINGLE
from skillvec.checkpoints.ties import under_name
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.point import PointJob
from skillvec.engine.plan import Job, OutputPlan, Plan
from skillvec.engine.plan_vectors import list_dropped
from skillvec.errors import FormatError, up_to_five
from skillvec.files.file import file_nbytes, read_bytes
from skillvec.files.header import ITEMSIZE, TensorSpec, encode_header, tensor_nbytes
from skillvec.files.tensors import Source, as_integers
from skillvec.ops.kernels import FLOATS
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.match import head_note, match, parted, to_layout, verdict_on
from skillvec.vectors.vector import SkillVector

SHARD_NBYTES = 5 * 10**9  # of new shards; transformers' own default is of this size


def add_job(target: Source, vector: SkillVector, source: str, out_dtype: str, note: str) -> AddJob:
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
    ledger += list_dropped(target)
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
    return replace(add_job(spec, vector, source, dtypes[spec.name], note), output=output)


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
