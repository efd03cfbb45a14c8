"""The public actions: diff, apply, orthogonality, inspect, verify.

Each one opens, plans, checks the output, runs, proves and publishes, in this order, and answers
with a Report. Parameters have the names of the command line's flags.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any

from skillvec import __version__, analysis, engine, kernels
from skillvec.checkpoint import (
    INDEX,
    METADATA_KEY,
    Checkpoint,
    is_vector,
    open_checkpoint,
    open_tensors,
)
from skillvec.engine import JobResult
from skillvec.errors import UsageError, VerificationError, up_to_five
from skillvec.operators import subtract
from skillvec.outputs import PathLike, output_file, output_model, writing
from skillvec.plan import (
    Plan,
    ledger_line,
    plan_apply,
    plan_diff,
    plan_gram,
    plan_verify_apply,
    plan_verify_vector,
)
from skillvec.report import Report, Watcher
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    copy_file,
    digest_bytes,
    forget_open_files,
    fsync_path,
    read_into,
)
from skillvec.summary import (
    complete_manifest,
    job_line,
    mismatch_line,
    report_apply,
    report_diff,
)
from skillvec.vector import (
    BLOCK_NUMEL,
    FP32_MAX,
    PairDelta,
    SideWriter,
    SkillVector,
    check_shape,
)

DTYPES = {
    "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32",
    "float32": "F32", "fp64": "F64", "float64": "F64",
}  # fmt: skip
PROBE_NUMEL = 4096


def diff(
    tuned: PathLike | Checkpoint,
    base: PathLike | Checkpoint,
    output: PathLike | None = None,
    *,
    dtype: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> SkillVector:
    """Compute the skill vector v = tuned - base (PaST, arXiv 2601.11258, stage 2).

    With `output`, write it to that one safetensors file and return the opened file; without,
    return it unread, to be subtracted where it is used. `dtype` auto is exact: base + 1 * v
    restores tuned bit for bit (for fp32 as stated in the manifest); bf16, fp16 and fp32 store
    rounded values. The report is the attribute `report` of what is returned. Raises UsageError,
    IncompatibleError, FormatError, OutputError.
    """
    kept = "auto" if dtype == "auto" else _dtype(dtype)
    if kept == "F64":
        raise UsageError("dtype fp64: auto keeps fp64 inputs in fp64")
    vector = SkillVector.between(tuned, base, kept, include, exclude)
    if output is None:
        if dry_run:
            raise UsageError("a dry run of diff needs an output")
        return vector
    left, right = vector.tuned, vector.base
    assert left is not None and right is not None
    path = output_file(output, force, [left, right])
    vector = replace(vector, deltas=_affordable(vector))
    manifest = vector.manifest | {
        "tool": f"skillvec {__version__}",
        "command": _command("diff", left.ref, right.ref, dtype=dtype, include=include,
                            exclude=exclude),
        "dtype": dtype,
        "block_numel": BLOCK_NUMEL,
    }  # fmt: skip
    plan, layout = plan_diff(vector, manifest)
    facts = {
        "formula": "v = TUNED - BASE",
        "tuned": {"ref": left.ref, "path": os.fspath(left.path), "dtypes": left.dtypes},
        "base": {"ref": right.ref, "path": os.fspath(right.path), "dtypes": right.dtypes},
        "output": os.fspath(path),
        "dtype": dtype,
    }
    report = _planned(plan, facts, workers, watcher)
    if dry_run:
        return replace(vector, report=report)
    with writing(plan, path, force) as (stage, files):
        side = SideWriter(stage.folder, layout.rows)
        try:
            results = _run(plan, files, workers, watcher, side)
            digests = side.write(files[0], layout.blocks_offset)
            exceptions, replacements = side.totals
        finally:
            side.close()
        complete_manifest(manifest, results, digests, exceptions, replacements)
        files[0].write(0, layout.header(manifest, exceptions, replacements))
        for file in files:
            file.sync()
        stage.publish(Path(files[0].path))
    report_diff(report, plan, results, manifest, os.path.getsize(path))
    return replace(SkillVector.open(path), report=report)


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
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Write target + lam * vector in the target's shard layout (PaST, stage 4).

    fp32 arithmetic (fp64 where an input is fp64) and one rounding to the target's dtype or
    `dtype`; `rounding` stochastic is right on average at every lam, its randomness addressed by
    `seed`. With `tuned` and `base` in place of a vector the difference is taken in the same pass
    and not stored: the same bytes. Raises IncompatibleError with both shapes where the vector
    does not fit, UsageError, FormatError, OutputError.
    """
    if output is None:
        raise UsageError("apply needs an output")
    if (vector is None) == (tuned is None or base is None) or (tuned is None) != (base is None):
        raise UsageError("apply takes either a vector or both tuned and base")
    request = {"lam": lam, "dtype": dtype, "rounding": rounding, "seed": seed,
               "include": list(include), "exclude": list(exclude)}  # fmt: skip
    point = open_checkpoint(target, "target")
    plan, displacement, recipe = _plan_apply(point, vector, tuned, base, request)
    sources = [displacement.stored, displacement.tuned, displacement.base, point]
    path = output_model(output, force, point, [c for c in sources if c is not None])
    facts = {
        "formula": "OUT = TARGET + LAM * V",
        "target": {"ref": point.ref, "path": os.fspath(point.path), "dtypes": point.dtypes},
        "vector": recipe["vector"],
        "lineage": displacement.dtypes,
        "output": os.fspath(path),
        "lam": plan.lam,
        "dtype": dtype,
        "rounding": rounding,
        "seed": seed if rounding == "stochastic" else None,
        "verdict": plan.verdict,
        "left_behind": plan.left_behind,
    }
    report = _planned(plan, facts, workers, watcher)
    if dry_run:
        return report
    with writing(plan, path, force) as (stage, files):
        for file, output_plan in zip(files, plan.outputs, strict=True):
            file.write(0, output_plan.header)
        results = _run(plan, files, workers, watcher)
        for file in files:
            file.sync()
        made = Path(files[0].path).parent
        for source, name in plan.copies:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, os.fspath(made / name))
        if plan.index is not None:
            (made / INDEX).write_text(json.dumps(plan.index, indent=2) + "\n")
            fsync_path(os.fspath(made / INDEX))
        stage.publish(made if point.path.is_dir() else Path(files[0].path))
    report_apply(report, plan, results)
    return report


def orthogonality(
    *vectors: PathLike | SkillVector,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Compare two or more deltas: cosine, norms and z-score against unrelated directions.

    Each input is a vector file, a SkillVector or "TUNED::BASE". Sums are fp64 over fixed blocks:
    the same digits whatever the worker count. The facts hold for every pair `overall`, `layers`,
    `kinds` and `tensors`, each with cosine, z (cosine times sqrt of the number of values), both
    norms and their ratio.
    """
    opened = [_open_displacement(ref) for ref in vectors]
    plan = plan_gram(opened, include, exclude)
    labels = [v.ref if v.scale == 1 else f"{v.scale:g}*{v.ref}" for v in opened]
    facts: dict[str, Any] = {"vectors": labels, "lineage": [v.dtypes for v in opened]}
    report = _planned(plan, facts, workers, watcher)
    if dry_run:
        return report
    results = _run(plan, [], workers, watcher)
    scales = [v.scale for v in opened]
    grams = []
    for result in results:
        matrix = result.sums.reshape(len(opened), len(opened))
        for i, scale in enumerate(scales):
            matrix[i] *= scale
            matrix[:, i] *= scale
        grams.append((result.job.name, result.job.numel, matrix))
    report.facts["pairs"] = analysis.compare(grams, labels)
    report.ledger = [job_line(result.job, "compared") for result in results] + plan.ledger
    if any(len(v.manifest[side]["dtypes"]) > 1 or "BF16" in v.manifest[side]["dtypes"]
           for v in opened for side in ("tuned", "base")):  # fmt: skip
        report.warnings.append(
            "inputs are bf16: a vector taken from bf16 checkpoints is a thresholded copy of the"
            " true update, and deltas that share a bf16 checkpoint share its rounding error with"
            " opposite sign, which shows as a small negative cosine"
        )
    return report


def inspect(path: PathLike) -> Report:
    """Describe a model or a vector from its headers alone; no tensor is read."""
    opened = open_tensors(path, "input")
    report = Report("inspect", {"path": os.fspath(opened.path), "nbytes": opened.nbytes})
    facts = report.facts
    if is_vector(opened.metadata):
        vector = SkillVector.open(path)
        manifest = vector.manifest
        facts["kind"] = "vector"
        for key in ("schema", "tool", "command", "formula", "dtype", "exactness", "base", "tuned",
                    "tied", "excluded", "differing"):  # fmt: skip
            facts[key] = manifest.get(key)
        entries = manifest["tensors"]
        numel = sum(delta.spec.numel for delta in vector.deltas.values())
        changed = sum(entry["changed"] for entry in entries.values())
        facts |= {
            "numel": numel,
            "changed": changed,
            "density": changed / numel if numel else 0.0,
            "norm": hypot(*(entry["norm"] for entry in entries.values())),
        }
        for name, delta in vector.deltas.items():
            entry = entries[name]
            line = ledger_line(delta.spec, "delta") | {"numel": delta.spec.numel}
            report.ledger.append(line | {"changed": entry["changed"], "norm": entry["norm"]})
        report.ledger += [{"name": name, "status": "equal"} for name in manifest["equal"]]
        return report
    facts |= {
        "kind": "model",
        "files": [file.name for file in opened.files],
        "numel": sum(spec.numel for spec in opened.values()),
        "dtypes": opened.dtypes,
        "model_type": opened.model_type,
        "ties_embeddings": opened.ties_embeddings,
        "config_digest": opened.config_digest,
        "tokenizer_digest": opened.tokenizer_digest,
        "family_digest": opened.family_digest,
    }
    recipe = opened.metadata.get(METADATA_KEY)
    if recipe is not None:
        with contextlib.suppress(UsageError):
            facts["recipe"] = _read_recipe(opened)
    if opened.config.get("quantization_config"):
        report.warnings.append("quantised: diff and apply refuse it; dequantise it first")
    for spec in opened.values():
        report.ledger.append(ledger_line(spec, "stored") | {"nbytes": spec.nbytes})
    return report


def verify(
    path: PathLike,
    *,
    tuned: PathLike | Checkpoint | None = None,
    base: PathLike | Checkpoint | None = None,
    target: PathLike | Checkpoint | None = None,
    vector: PathLike | SkillVector | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Prove from the disk what a file claims, bit for bit.

    A vector: vector + base = tuned. A merged model: OUT = round(target + lam * v) by the recipe in
    its header. Inputs are found where they were when it was made, unless given here. Raises
    VerificationError naming the tensors where it does not hold.
    """
    opened = open_tensors(path, "input")
    if is_vector(opened.metadata):
        return _verify_vector(SkillVector.open(path), tuned, base, workers, dry_run, watcher)
    recipe = _read_recipe(opened)
    if vector is None and tuned is None and recipe["vector"].get("ref"):
        vector = recipe["vector"]["ref"]
    if vector is None:
        tuned, base = tuned or recipe["vector"]["tuned"], base or recipe["vector"]["base"]
    point = open_checkpoint(target or recipe["target"]["ref"], "target")
    plan, displacement, now = _plan_apply(point, vector, tuned, base, recipe["request"])
    if now["vector"].get("digest") != recipe["vector"].get("digest"):
        raise VerificationError(
            f"{displacement.ref} is not the vector that {opened.ref} was made with"
        )
    plan = plan_verify_apply(replace(plan, lam=recipe["lam"]), opened)
    facts = {
        "claim": "OUT = round(TARGET + LAM * V)",
        "path": os.fspath(opened.path),
        "target": point.ref,
        "vector": displacement.ref,
        "lam": plan.lam,
    }
    report = _planned(plan, facts, workers, watcher)
    if dry_run:
        return report
    results = _run(plan, [], workers, watcher)
    report.ledger = []
    wrong = []
    for result in results:
        holds = not result.mismatches
        report.ledger.append(job_line(result.job, "verified" if holds else "differs"))
        if not holds:
            wrong.append(mismatch_line(result, "merged"))
    _conclude(report, wrong)
    return report


# ---------------------------------------------------------------------------------- planning


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _open_displacement(ref: PathLike | SkillVector) -> SkillVector:
    if isinstance(ref, str) and "::" in ref:
        tuned, _, base = ref.partition("::")
        return SkillVector.between(tuned, base)
    return SkillVector.open(ref)


def _affordable(vector: SkillVector) -> dict[str, Any]:
    """Store a tensor in fp32 where a look at its middle says exceptions would take more room.

    An exception costs 8 bytes, fp32 costs 2 more a value: the turn is at one in four. RL deltas
    have one in 4,000; unrelated models have most.
    """
    kept: dict[str, Any] = {}
    for name, delta in vector.deltas.items():
        assert isinstance(delta, PairDelta)
        kept[name] = delta
        numel = min(PROBE_NUMEL, delta.base.numel)
        if not delta.exact or ITEMSIZE[delta.dtype] != 2 or not numel:
            continue
        sides = []
        for spec in (delta.tuned, delta.base):
            content = bytearray(numel * ITEMSIZE[spec.dtype])
            middle = (spec.numel - numel) // 2 * ITEMSIZE[spec.dtype]
            read_into(spec.path, spec.start + middle, memoryview(content))
            sides.append(kernels.from_bytes(content, spec.dtype))
        out, scratch = sides[0].copy(), kernels.from_bytes(bytearray(2 * numel), "U16")
        found = subtract(
            sides[0], delta.tuned.dtype, sides[1], delta.base.dtype, delta.dtype, True, out, scratch
        )
        if found.delta.positions.size * 4 > numel:
            kept[name] = delta._replace(dtype="F32")
    return kept


def _plan_apply(
    point: Checkpoint,
    vector: PathLike | SkillVector | None,
    tuned: PathLike | Checkpoint | None,
    base: PathLike | Checkpoint | None,
    request: dict[str, Any],
) -> tuple[Plan, SkillVector, dict[str, Any]]:
    """Plan an apply from the request as it stands in a recipe; return plan, vector and recipe."""
    lam, dtype, rounding, seed = (request[key] for key in ("lam", "dtype", "rounding", "seed"))
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding {rounding!r}: expected nearest or stochastic")
    if vector is not None:
        displacement = SkillVector.open(vector)
    else:
        assert tuned is not None and base is not None
        displacement = SkillVector.between(tuned, base)
    if not abs(lam * displacement.scale) <= FP32_MAX:
        raise UsageError(f"lam {lam}: expected a finite number that fp32 can hold")
    if displacement.stored is not None:
        source: dict[str, Any] = {"ref": displacement.ref, "digest": _vector_digest(displacement)}
    else:
        assert displacement.tuned is not None and displacement.base is not None
        source = {"tuned": displacement.tuned.ref, "base": displacement.base.ref}
    recipe = {
        "kind": "merged",
        "schema": 1,
        "tool": f"skillvec {__version__}",
        "target": {"ref": point.ref},
        "vector": source,
        "lam": lam * displacement.scale,
        "request": request,
    }
    plan = plan_apply(
        point,
        displacement,
        lam=lam,
        dtype=_dtype(dtype) if dtype else None,
        rounding=rounding,
        seed=seed,
        include=request["include"],
        exclude=request["exclude"],
        recipe=recipe,
    )
    if dtype and "torch_dtype" in point.config | {"torch_dtype": point.config.get("dtype")}:
        plan.warnings.append(
            "config.json is copied as it is: its dtype still names the target's, so pass"
            f" dtype to from_pretrained to load {dtype}"
        )
    return plan, displacement, recipe


def _vector_digest(vector: SkillVector) -> str:
    """Return one digest for a stored vector: of its manifest, which holds those of its tensors."""
    assert vector.stored is not None
    return digest_bytes(vector.stored.metadata[METADATA_KEY].encode())


NUMBER = int | float
RECIPE = {
    "kind": str, "schema": int, "target": {"ref": str}, "vector": {...: str}, "lam": NUMBER,
    "request": {"lam": NUMBER, "dtype": str | None, "rounding": str, "seed": int,
                "include": {0: ...}, "exclude": {0: ...}},
}  # fmt: skip


def _read_recipe(opened: Checkpoint) -> dict[str, Any]:
    try:
        recipe = json.loads(opened.metadata[METADATA_KEY])
        check_shape(recipe, RECIPE, "recipe")
        if recipe["kind"] != "merged" or recipe["schema"] != 1:
            raise ValueError("another kind or schema")
        if not {"ref"} <= set(recipe["vector"]) and not {"tuned", "base"} <= set(recipe["vector"]):
            raise ValueError("no vector")
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UsageError(
            f"{opened.ref}: neither a skill vector nor written by skillvec apply (no recipe in its"
            " header), so there is nothing to verify it against"
        ) from None
    return dict(recipe)


def _command(verb: str, *positional: str, **options: Any) -> str:
    """Return the command that gives these bytes, in one spelling (no workers, no output)."""
    words = ["skillvec", verb, *positional]
    for key, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{key}", str(item)]
    return shlex.join(words)


# ----------------------------------------------------------------------------------- running


def _workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UsageError(f"workers {workers}: expected at least 1")
    return workers or min(16, len(os.sched_getaffinity(0)))


def _planned(
    plan: Plan, facts: dict[str, Any], workers: int | None, watcher: Watcher | None
) -> Report:
    """Return the report as far as headers can tell, and show it to the watcher."""
    count = _workers(workers)
    planned = {
        "nbytes_read": plan.nbytes_read,
        "nbytes_written": plan.nbytes_written,
        "files": [output.name for output in plan.outputs if output.name],
        "side_files": [name for _, name in plan.copies],
        "workers": count,
        "memory_nbytes": (64 + count * 24) << 20,  # interpreter and numpy, then buffers a worker
        "kernels": kernels.kernels_in_use(),
    }
    status = {"add": "applied", "subtract": "delta", "copy": "passed through", "gram": "compared"}
    report = Report(plan.verb, facts | planned, warnings=list(plan.warnings))
    named = {line["name"] for line in plan.ledger}
    report.ledger = [
        job_line(job, status[job.operator]) for job in plan.jobs if job.name not in named
    ] + plan.ledger
    if watcher:
        watcher.planned(report)
    return report


def _run(
    plan: Plan,
    files: list[OutputFile],
    workers: int | None,
    watcher: Watcher | None,
    side: SideWriter | None = None,
) -> list[JobResult]:
    total = sum(job.nbytes_read for job in plan.jobs)

    def progress(done_nbytes: int) -> None:
        if watcher:
            watcher.advanced(done_nbytes, total)

    try:
        return engine.run(plan, files, side=side, workers=_workers(workers), progress=progress)
    finally:
        forget_open_files()


def _verify_vector(
    vector: SkillVector,
    tuned: PathLike | Checkpoint | None,
    base: PathLike | Checkpoint | None,
    workers: int | None,
    dry_run: bool,
    watcher: Watcher | None,
) -> Report:
    manifest = vector.manifest
    assert vector.stored is not None
    left = open_checkpoint(tuned or manifest["tuned"]["ref"], "tuned")
    right = open_checkpoint(base or manifest["base"]["ref"], "base")
    plan = plan_verify_vector(vector, left, right)
    facts = {
        "claim": "VECTOR + BASE = TUNED",
        "path": os.fspath(vector.stored.path),
        "tuned": left.ref,
        "base": right.ref,
        "exactness": manifest["exactness"],
    }
    report = _planned(plan, facts, workers, watcher)
    if dry_run:
        return report
    results = _run(plan, [], workers, watcher)
    report.ledger, wrong = [], []
    for result in results:
        name = result.job.name
        entry = manifest["tensors"].get(name)
        stated = entry.get("unrestored", 0) if entry else 0
        problem = None
        if entry and result.digests["point"] != entry["base"][1]:
            problem = f"{name}: the base's tensor is not the one the vector was made from"
        elif result.mismatches != stated:
            problem = mismatch_line(result, "tuned")
        line = job_line(result.job, "differs" if problem else "verified")
        report.ledger.append(line | ({"unrestored": stated} if stated else {}))
        if problem:
            wrong.append(problem)
    _conclude(report, wrong)
    return report


def _conclude(report: Report, wrong: list[str]) -> None:
    if wrong:
        raise VerificationError(f"{report.facts['claim']} does not hold:\n{up_to_five(wrong)}")
    report.facts["verified"] = True
