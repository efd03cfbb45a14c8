"""The public actions on vectors and models: diff, combine, apply, inspect, verify.

Each one opens, plans, checks the output, runs, proves and publishes, in this order, and answers
with a Report. Parameters have the names of the command line's flags.
"""

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from skillvec import __version__
from skillvec.block import BLOCK_NUMEL
from skillvec.bridging import in_memory, seen_as
from skillvec.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    as_model,
    is_adapter,
    locate,
    open_checkpoint,
    open_tensors,
    relocate,
    reopen,
)
from skillvec.codecs import CODECS
from skillvec.combining import seen_like
from skillvec.deltas import dtype_of
from skillvec.displacement import ledger_line
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    UsageError,
    VerificationError,
    up_to_five,
)
from skillvec.fitting import match, to_layout, verdict_on
from skillvec.job import JobResult, Plan
from skillvec.jobs import CopyJob, ListJob
from skillvec.manifest import Manifest
from skillvec.merging import OPERATORS, Operator, check_parameters
from skillvec.outputs import (
    Output,
    PathLike,
    choose_storage,
    output_model,
    output_vector,
    parse_size,
    vector_nbytes,
    writing,
    writing_patch,
    writing_vector,
)
from skillvec.patch import find_patch, form_of
from skillvec.plan import (
    plan_apply,
    plan_patch,
    plan_store,
    plan_verify_apply,
    plan_verify_combination,
    plan_verify_vector,
)
from skillvec.provenance import (
    digests_of,
    opened_parents,
    parents_of,
    read_merged,
    reopened,
)
from skillvec.report import Report, Watcher
from skillvec.rules import (
    Recipe,
    Share,
    flags,
    leaving_out,
    parse_recipe,
    read_recipe,
    selection,
)
from skillvec.run import Run
from skillvec.running import measure_plan, run_plan, show_plan
from skillvec.staging import Staging
from skillvec.storage import (
    TensorSpec,
    copy_file,
    fsync_path,
    header_layout,
    refuse_misread,
    refuse_misread_files,
    shown,
)
from skillvec.summary import (
    complete_manifest,
    correct_verdict,
    describe_vector,
    job_line,
    mismatch_line,
    refuse_announced,
    refuse_nonfinite,
    report_apply,
    report_stored,
    side_facts,
    side_warnings,
    tell_nonfinite,
)
from skillvec.unread import LeftOut
from skillvec.vector import FP32_MAX, SkillVector, StoredVector
from skillvec.vectorfile import find_vector

CARD = "README.md"


def diff(
    tuned: PathLike | Checkpoint,
    base: PathLike | Checkpoint,
    output: PathLike | None = None,
    *,
    dtype: str = "auto",
    codec: str = "auto",
    max_shard_size: int | str = "5GB",
    method: str | None = None,
    notes: str | None = None,
    license: str | None = None,
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
) -> SkillVector:
    """Compute the skill vector v = tuned - base (PaST, arXiv 2601.11258, stage 2).

    With `output`, write it there and return the opened vector; without, return it unread, to be
    subtracted where it is used. `dtype` auto is exact: base + 1 * v restores tuned bit for bit,
    whatever the dtypes; bf16, fp16 and fp32 store rounded values. `codec` auto takes the smallest.
    NaN and infinities are refused where tuned and base do not hold the same, unless
    `allow_nonfinite`: then they come back on the exact base alone. `rename` rules ("REGEX=TEXT")
    bring tuned's names to base's where no known layout does; `rows` says what happens to
    embeddings of another length (strict, common, skip). `tuned` may be a PEFT adapter of base.
    With `stream` a checkpoint on the Hub is read shard by shard, at most two of them on the disk.
    The report is the attribute `report` of what is returned. Raises UsageError,
    IncompatibleError, NonfiniteError, FormatError, OutputError.
    """
    vector = SkillVector.between(tuned, base, dtype, include, exclude, rename, rows)
    if output is None:
        if dry_run:
            raise UsageError("a dry run of diff needs an output")
        return vector
    run = Run.by(engine, workers, stream=stream, dry_run=dry_run, force=force, watcher=watcher)
    form = StoredForm("auto", codec, max_shard_size, method, notes, license, allow_nonfinite)
    return store_vector(vector, output, form, run)


def combine(
    *vectors: PathLike | SkillVector,
    weights: Sequence[float] | None = None,
    op: str | Operator = "linear",
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    recipe: PathLike | Mapping[str, Any] | None = None,
    output: PathLike | None = None,
    **options: Any,
) -> SkillVector:
    """Merge vectors by an operator of docs/operators.md, or by an Operator of your own.

    `weights` are 1 if not given. `recipe`, a YAML or JSON file or its content, names vectors,
    weights per tensor and layer, and operator instead; a stored combination gives its own. Without
    `output` the result is computed where it is used; with, it is stored (options as of `save`).
    Raises UsageError for parameters out of range, IncompatibleError where names or shapes differ.
    """
    if recipe is not None:
        if vectors or weights or parameters or seed or op != "linear":
            raise UsageError("a recipe names vectors, weights, operator and seed: give it alone")
        made, parts = _of_recipe(recipe)
    else:
        parts = [SkillVector.open(vector) for vector in vectors]
        name = op if isinstance(op, str) else op.name
        made = Recipe(name, _weighted(parts, weights), dict(parameters or {}), seed)
    operator = _operator_of(op, made)
    first = made.shares[0]
    plain = made.op == "linear" and isinstance(first.weight, float) and not first.rules
    if output is None and options:
        raise TypeError(f"combine: {', '.join(options)} is of no use without output")
    if len(parts) == 1 and plain:
        check_parameters(made.op, {**made.parameters, **first.parameters})  # it takes none
        vector = parts[0] * first.weight
    else:
        vector = SkillVector.combined(parts, made, operator)
    return vector if output is None else save(vector, output, **options)


def _of_recipe(recipe: PathLike | Mapping[str, Any]) -> tuple[Recipe, list[SkillVector]]:
    """Return what a recipe says, and the vectors that it names, opened."""
    if not isinstance(recipe, Mapping) and os.fspath(recipe).endswith(".safetensors"):
        manifest = SkillVector.open(recipe).manifest
        if manifest["recipe"] is None:
            raise UsageError("recipe: this vector is no combination")
        made = parse_recipe(manifest["recipe"])
        return made, opened_parents(manifest, made)
    made = parse_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)
    return made, [SkillVector.open(share.vector) for share in made.shares]


def _weighted(parts: Sequence[SkillVector], weights: Sequence[float] | None) -> tuple[Share, ...]:
    """Return the shares of vectors, 1 each where nothing else is given."""
    if not parts:
        raise UsageError("expected at least one vector, found none")
    weights = [1.0] * len(parts) if weights is None else weights
    if not all(map(isfinite, weights)):
        raise UsageError(f"weights {', '.join(map(str, weights))}: expected finite numbers")
    if len(weights) != len(parts):
        raise UsageError(f"{len(parts)} vectors, but {len(weights)} weights")
    return tuple(Share(p.ref, float(w)) for p, w in zip(parts, weights, strict=True))


def _operator_of(op: str | Operator, recipe: Recipe) -> Operator | None:
    """Return the operator that a user brings, None where the recipe names one of skillvec's."""
    if not isinstance(op, str):
        if op.name in OPERATORS and op is not OPERATORS[op.name]:
            raise UsageError(f"op: {op.name} is the name of an operator of skillvec: take another")
        return op
    if recipe.op not in OPERATORS:
        raise UsageError(f"op {recipe.op!r}: expected one of {', '.join(OPERATORS)}")
    return None


@dataclass(frozen=True)
class StoredForm:
    """How a vector is written, and what its manifest says of it: the options of `save`."""

    dtype: str = "auto"
    codec: str = "auto"
    max_shard_size: int | str = "5GB"
    method: str | None = None
    notes: str | None = None
    license: str | None = None
    allow_nonfinite: bool = False


def save(
    vector: SkillVector,
    output: PathLike,
    *,
    dtype: str = "auto",
    codec: str = "auto",
    max_shard_size: int | str = "5GB",
    method: str | None = None,
    notes: str | None = None,
    license: str | None = None,
    allow_nonfinite: bool = False,
    stream: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> SkillVector:
    """Write a vector to one safetensors file, or to a folder of shards where that would be large.

    `dtype` of a combination: auto is fp32 (fp64 where an input is); that of a difference was
    chosen when it was taken. `codec`: auto, dense, sparse
    or packed (docs/format.md). A stored vector is written with its manifest and exact values,
    whatever the codec. `method`, `notes` and `license` go into the manifest. Raises NonfiniteError
    where values have no finite delta, unless `allow_nonfinite`.
    """
    run = Run.by(engine, workers, stream=stream, dry_run=dry_run, force=force, watcher=watcher)
    form = StoredForm(dtype, codec, max_shard_size, method, notes, license, allow_nonfinite)
    return store_vector(vector, output, form, run)


def store_vector(vector: SkillVector, output: PathLike, form: StoredForm, run: Run) -> SkillVector:
    """Write a vector in a form, as `save` does, and return it opened."""
    if form.codec not in ("auto", *CODECS[1:]):
        raise UsageError(f"codec {form.codec!r}: expected auto, {', '.join(CODECS[1:])}")
    limit = parse_size(form.max_shard_size)
    vector = SkillVector.open(vector).unscaled()
    dtype = vector.choose_dtype(form.dtype)
    announced = refuse_announced(vector, form.allow_nonfinite, vector.deltas)
    place = output_vector(output, run.force, vector)
    storage = choose_storage(vector, "auto" if dtype == "auto" else dtype_of(dtype), form.codec)
    manifest = _announce(vector, dtype, form)
    plan, entries = plan_store(vector.to_command()[0], vector, storage)
    facts: dict[str, Any] = {"formula": manifest["formula"], "output": place.ref,
                             "dtype": dtype, "codec": form.codec}  # fmt: skip
    facts |= {side: model.facts for side, model in vector.sides().items()}
    if vector.notes:
        facts["layout"] = dict(vector.notes)
    least, most = vector_nbytes(entries, manifest)
    plan = replace(plan, warnings=plan.warnings + announced, bound_nbytes=most, sure_nbytes=least)
    report = show_plan(plan, facts, run, place)
    if run.dry_run:
        return replace(vector, report=report)
    plan = measure_plan(plan, run)
    with writing_vector(plan, place, run, entries, manifest, limit) as (stage, writer):
        results = run_plan(plan, run, stage, writer=writer)
        refuse_nonfinite(results, form.allow_nonfinite)
        settled = writer.settle()
        complete_manifest(manifest, results, settled, vector)
        stage.publish(writer.finish(manifest))
    _tell_resumed(report, stage)
    saved = SkillVector.open(place.ref)
    assert isinstance(saved, StoredVector)
    report_stored(report, plan, results, saved.manifest, saved.stored)
    return replace(saved, report=report)


def _announce(vector: SkillVector, dtype: str, form: StoredForm) -> Manifest:
    """Return the manifest of a vector that is about to be written."""
    labels = {"method": form.method, "notes": form.notes, "license": form.license}
    shown = {key: value for key, value in labels.items() if value is not None}
    verb, words = vector.to_command()
    if vector.parts:
        shown["dtype"] = dtype
    allowed = {"allow_nonfinite": True} if form.allow_nonfinite else {}
    chosen = flags(codec=form.codec, **shown, **allowed)
    training = vector.manifest["training"]
    manifest: Manifest = {
        **vector.manifest,
        "tool": f"skillvec {__version__}",
        "command": shlex.join(["skillvec", verb, *words, *chosen]),
        "dtype": dtype,
        "codec": form.codec,
        "block_numel": BLOCK_NUMEL,
        "training": {
            "method": form.method or training["method"],
            "notes": form.notes or training["notes"],
        },
        "license": form.license or vector.manifest["license"],
    }
    if form.allow_nonfinite:
        manifest["allow_nonfinite"] = True
    return manifest


def import_patch(
    patch: PathLike,
    base: PathLike | Checkpoint,
    output: PathLike,
    **options: Any,
) -> SkillVector:
    """Make a vector of a patch: changed values of the exact base, as RL stacks send them.

    A patch is a safetensors file, or a folder of several, of any form that `export_patch` writes;
    which one, the file tells. Positions are flat, of the base's tensors or of those that
    transformers makes of them in memory; what is not listed did not change. Options as of `save`.
    Raises IncompatibleError where it does not fit the base, FormatError where it is broken.
    """
    vector = SkillVector.patched(patch, base)
    return save(vector, output, **options)


def export_patch(
    vector: PathLike | SkillVector,
    output: PathLike,
    *,
    base: PathLike | Checkpoint | None = None,
    form: str = "lists",
    names: str = "files",
    allow_nonfinite: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Write the values that vector + base changes, under the base's names and in its dtypes.

    `names` are those of the base's `files`, or of the model that transformers makes of them in
    `memory`. `form` is `lists` (NAME.indices, NAME.values), `vllm` (the same, with what vLLM's
    weight transfer is told in the header) or `verl` (__delta_spec__, __positions__, __values__).
    Raises IncompatibleError unless `base` (where it was, if not given) is the vector's exact base,
    on which alone such a list holds, and where the form cannot carry a tensor; NonfiniteError where
    NaN or infinities would be listed, unless `allow_nonfinite`, and for NaN in a form that cannot
    carry it.
    """
    run = Run.by(engine, workers, dry_run=dry_run, force=force, watcher=watcher)
    opened = SkillVector.open(vector)
    if not opened.lists_tuned:
        raise UsageError(f"{opened.ref}: a patch is made of a stored tuned - base")
    point = reopen(base, opened.manifest["base"]["ref"], "base")
    if names not in ("files", "memory"):
        raise UsageError(f"names {names!r}: expected files or memory")
    target = point if names == "files" else in_memory(point)
    plan = plan_patch(opened, target, form)
    if opened.manifest["exactness"]["unrestored"]:
        plan.warnings.append(
            f"the vector was rounded to {opened.manifest['dtype']}: the list has the values that"
            " base + vector gives, not all of tuned's"
        )
    place = output_vector(output, force, opened, [point])
    facts = {"output": place.ref, "vector": opened.ref, "base": point.ref, "form": form,
             "names": names}  # fmt: skip
    report = show_plan(plan, facts, run, place)
    if run.dry_run:
        return report
    request = {"vector": opened.manifest["identity"], "family": target.family_digest}
    with writing_patch(plan, place, run, request | {"form": form}) as (stage, writer):
        results = run_plan(plan, run, stage, writer=writer)
        other = [result.job.name for result in results if not _is_of_base(result)]
        if other:
            raise IncompatibleError(
                f"{point.ref} is not the exact base of {opened.ref}:\n{up_to_five(other)}"
            )
        results = [result for result in results if isinstance(result.job, ListJob)]
        refuse_nonfinite(results, allow_nonfinite)
        made = writer.finish({"schema": 1, **request}, form)
        nbytes = os.path.getsize(made)
        stage.publish(made)
    _tell_resumed(report, stage)
    changed = int(writer.counts.sum())
    report.facts |= {"changed": changed, "nbytes": nbytes,
                     "numel": sum(result.job.numel for result in results)}  # fmt: skip
    if not changed:
        report.warnings.append("no value differs: the vector is zero, and the patch lists nothing")
    report.ledger = report.ledger[: len(writer.counts)]
    for line, count in zip(report.ledger, writer.counts, strict=True):
        line |= {"status": "listed" if count else "unchanged", "changed": int(count)}
    tell_nonfinite(report, results)
    return report


def _is_of_base(result: JobResult) -> bool:
    """Return whether a list was made on the very tensor that the vector was taken from.

    Of a list in another layout that is for the tensors it is made of to say.
    """
    job = result.job
    if isinstance(job, CopyJob):
        return result.digests["point"] == job.base_digest
    return result.exact_base or job.deltas[0].is_relaid


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

    fp32 arithmetic (fp64 where an input is fp64) and one rounding to the target's dtype or
    `dtype`; `rounding` stochastic is right on average at every lam, its randomness addressed by
    `seed`. With `tuned` and `base` in place of a vector the difference is taken in the same pass
    and not stored: the same weights. `rename` rules are applied to the vector's names; of `rows`
    that only the target has, nothing changes. `stream` as of diff. Raises IncompatibleError with
    both shapes where the vector does not fit, NonfiniteError where values of the output are NaN or
    infinite and were not so in the target, or should have changed (unless `allow_nonfinite`),
    UsageError, FormatError, OutputError.
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
    point = open_checkpoint(target, "target", _unused(displacement, left_out))
    plan, recipe = _plan_apply(point, displacement, request)
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
        if point.is_folder:
            _write_card(made / CARD, recipe, report)
        stage.publish(made if point.is_folder else Path(files[0].path))
    _tell_resumed(report, stage)


def _unused(vector: SkillVector, left_out: LeftOut) -> LeftOut:
    """Return which tensors of a target need not be readable: no delta is meant for them."""
    excluded = set(vector.manifest["excluded"])
    return lambda name: name in excluded or left_out(name)


def _tell_resumed(report: Report, stage: Staging) -> None:
    if stage.resumed:
        report.facts["resumed"] = stage.resumed


def _write_card(file: Path, recipe: Mapping[str, Any], report: Report) -> None:
    """Write the card of a merged model, over the copy of the target's, whose text it keeps.

    It does not name the output: the same inputs give the same bytes, wherever they lie.
    """
    from skillvec.cards import merged_card

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


def inspect(path: PathLike, target: PathLike | Checkpoint | None = None) -> Report:
    """Describe a model or a vector from its headers alone; no tensor is read.

    Of a vector with `target`, give the verdict on that model; raises IncompatibleError where it
    does not fit.
    """
    place = locate(path, "input")
    stored = find_vector(place)
    if stored is not None:
        vector = SkillVector.of_file(stored)
        report = describe_vector(vector)
        if target is not None:
            point = open_checkpoint(target, "target")
            fitted = to_layout(vector, point)
            match(point, fitted)
            verdict, warnings = verdict_on(fitted.seen, fitted.vector)
            report.facts |= {"target": point.ref, "verdict": verdict}
            report.warnings += warnings
        return report
    opened = open_tensors(place, "input")
    if target is not None:
        raise UsageError(f"{opened.ref} is a model: only a vector has a verdict on a target")
    report = Report("inspect", {"path": shown(opened.ref, opened.path), "nbytes": opened.nbytes})
    facts = report.facts
    facts |= {
        "kind": "adapter" if is_adapter(place) else "model",
        "format": opened.format,
        "notes": list(opened.opened.notes),
        "files": [os.path.basename(file) for file in opened.files],
        "numel": sum(spec.numel for spec in opened.values()),
        "dtypes": opened.dtypes,
        "model_type": opened.model_type,
        "ties_embeddings": None,
        "config_digest": opened.config_digest,
        "tokenizer_digest": opened.tokenizer_digest,
        "family_digest": opened.family_digest,
    }
    if form := form_of(opened, opened.metadata):
        facts |= {"kind": "patch", "form": form}
    recipe = opened.metadata.get(METADATA_KEY)
    if recipe is not None:
        with contextlib.suppress(UsageError):
            facts["recipe"] = read_merged(opened)
    quantised: Mapping[str, str] = {}
    if facts["kind"] == "model":
        try:
            facts["ties_embeddings"] = opened.tied_in_transformers if opened.config else None
        except UsageError as error:  # without transformers it is unknown
            report.warnings.append(str(error))
        try:
            quantised = as_model(opened, "input").formats
        except (IncompatibleError, FormatError, UsageError) as error:  # described all the same
            report.warnings.append(str(error))
    for spec in opened.values():
        line = ledger_line(spec, "stored", quantised.get(spec.name, ""))
        report.ledger.append(line | {"nbytes": spec.nbytes})
    return report


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
    """Prove from the disk what a file claims, bit for bit.

    A vector: vector + base = tuned, or that a combination is what its parents give. A merged
    model: OUT = round(target + lam * v) by the recipe in its header. Inputs are found where they
    were when it was made, unless given here. Raises VerificationError naming the tensors where it
    does not hold.
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
    unused = _unused(displacement, left_out)
    point = reopen(target, recipe["target"]["ref"], "target", unused)
    plan, now = _plan_apply(point, displacement, request)
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


def _plan_apply(
    point: Checkpoint, displacement: SkillVector, request: dict[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """Plan an apply from the request as it stands in a recipe; return plan and recipe."""
    lam, dtype, rounding, seed = (request[key] for key in ("lam", "dtype", "rounding", "seed"))
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding {rounding!r}: expected nearest or stochastic")
    if not abs(lam * displacement.scale) <= FP32_MAX:
        raise UsageError(f"lam {lam}: expected a finite number that fp32 can hold")
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
