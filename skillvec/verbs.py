"""The public actions: diff, apply, orthogonality, inspect, verify.

Each one opens, plans, checks the output, runs, proves and publishes, in this order, and answers
with a Report. Parameters have the names of the command line's flags.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
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
from skillvec.plan import (
    Plan,
    exactness_entry,
    plan_apply,
    plan_diff,
    plan_gram,
    plan_verify_apply,
    plan_verify_vector,
    tensor_entry,
)
from skillvec.report import Line, Report, Watcher
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    Staging,
    available_memory_nbytes,
    copy_file,
    digest_bytes,
    forget_open_files,
    read_into,
    staging,
)
from skillvec.vector import BLOCK_NUMEL, PairDelta, SideWriter, SkillVector

PathLike = str | os.PathLike[str]
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
    path = _output_file(output, force, [left, right])
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
    with _writing(plan, path) as (stage, files):
        side = SideWriter(stage.folder, layout.rows)
        try:
            results = _run(plan, files, workers, watcher, side)
            digests = side.write(files[0], layout.blocks_offset)
            exceptions, replacements = side.totals
        finally:
            side.close()
        _complete_manifest(manifest, results, digests, exceptions, replacements)
        files[0].write(0, layout.header(manifest, exceptions, replacements))
        _close(files)
        stage.publish(Path(files[0].path))
    _report_diff(report, plan, results, manifest, os.path.getsize(path))
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
    path = _output_model(output, force, point, [c for c in sources if c is not None])
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
    with _writing(plan, path) as (stage, files):
        for file, output_plan in zip(files, plan.outputs, strict=True):
            file.write(0, output_plan.header)
        results = _run(plan, files, workers, watcher)
        _close(files)
        made = Path(files[0].path).parent
        for source, name in plan.copies:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, os.fspath(made / name))
        if plan.index is not None:
            (made / INDEX).write_text(json.dumps(plan.index, indent=2) + "\n")
        stage.publish(made if point.path.is_dir() else Path(files[0].path))
    _report_apply(report, plan, results)
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
    report.ledger = [_job_line(result.job, "compared") for result in results] + plan.ledger
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
        norms = [float(entry["norm"]) for entry in entries.values()]
        numel = sum(delta.spec.numel for delta in vector.deltas.values())
        changed = sum(int(entry["changed"]) for entry in entries.values())
        facts |= {
            "numel": numel,
            "changed": changed,
            "density": changed / numel if numel else 0.0,
            "norm": sum(norm**2 for norm in norms) ** 0.5,
        }
        for name, delta in vector.deltas.items():
            entry = entries[name]
            line = {"name": name, "status": "delta", "dtype": delta.spec.dtype}
            line |= {"shape": list(delta.spec.shape), "numel": delta.spec.numel}
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
        with contextlib.suppress(ValueError):
            facts["recipe"] = json.loads(recipe)
    if opened.config.get("quantization_config"):
        report.warnings.append("quantised: diff and apply refuse it; dequantise it first")
    for spec in opened.values():
        line = {"name": spec.name, "status": "stored", "dtype": spec.dtype}
        report.ledger.append(line | {"shape": list(spec.shape), "nbytes": spec.nbytes})
    return report


def verify(
    path: PathLike,
    *,
    tuned: PathLike | Checkpoint | None = None,
    base: PathLike | Checkpoint | None = None,
    target: PathLike | Checkpoint | None = None,
    vector: PathLike | SkillVector | None = None,
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Prove from the disk what a file claims, bit for bit.

    A vector: vector + base = tuned. A merged model: OUT = round(target + lam * v) by the recipe in
    its header. Inputs are found where they were when it was made, unless given here. Raises
    VerificationError naming the tensors where it does not hold.
    """
    opened = open_tensors(path, "input")
    if is_vector(opened.metadata):
        return _verify_vector(SkillVector.open(path), tuned, base, workers, watcher)
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
    facts = {"claim": "OUT = round(TARGET + LAM * V)", "path": os.fspath(opened.path),
             "target": point.ref, "vector": displacement.ref, "lam": plan.lam}  # fmt: skip
    report = _planned(plan, facts, workers, watcher)
    results = _run(plan, [], workers, watcher)
    report.ledger = []
    wrong = []
    for result in results:
        holds = not result.mismatches
        report.ledger.append(_job_line(result.job, "verified" if holds else "differs"))
        if not holds:
            wrong.append(_mismatch(result, "merged"))
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
    if not isfinite(lam):
        raise UsageError(f"lam {lam}: expected a finite number")
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding {rounding!r}: expected nearest or stochastic")
    if vector is not None:
        displacement = SkillVector.open(vector)
    else:
        assert tuned is not None and base is not None
        displacement = SkillVector.between(tuned, base)
    if displacement.stored is not None:
        source: dict[str, Any] = {"ref": displacement.ref, "digest": _vector_digest(displacement)}
    else:
        assert displacement.tuned is not None and displacement.base is not None
        source = {"tuned": displacement.tuned.ref, "base": displacement.base.ref}
    recipe = {
        "kind": "merged",
        "schema": 1,
        "tool": f"skillvec {__version__}",
        "target": {"ref": point.ref, "probe": None},
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


def _read_recipe(opened: Checkpoint) -> dict[str, Any]:
    try:
        recipe = json.loads(opened.metadata[METADATA_KEY])
        if recipe["kind"] != "merged" or recipe["schema"] != 1:
            raise ValueError("kind and schema")
        for key in ("lam", "dtype", "rounding", "seed", "include", "exclude"):
            recipe["request"][key]
        recipe["target"]["ref"], recipe["vector"], recipe["lam"]
    except (KeyError, ValueError, TypeError):
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


# ----------------------------------------------------------------------------------- outputs


def _refuse_place(path: Path, force: bool, inputs: Sequence[Checkpoint]) -> None:
    for checkpoint in inputs:
        at = checkpoint.path
        if path == at or (at.is_dir() and at in path.parents):
            raise UsageError(
                f"output {path}: inside the input {checkpoint.ref}; write it elsewhere"
            )
        if path in at.parents:
            raise UsageError(
                f"output {path}: holds the input {checkpoint.ref}; write it elsewhere"
            )
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(f"output {path}: exists already; --force overwrites it")


def _output_file(output: PathLike, force: bool, inputs: Sequence[Checkpoint]) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(output)))
    if path.suffix != ".safetensors":
        raise UsageError(f"output {path}: the name of a safetensors file ends in .safetensors")
    if path.name == "model.safetensors":
        raise UsageError(
            f"output {path}: a vector must not be called model.safetensors, or from_pretrained"
            " would load differences as weights"
        )
    _refuse_place(path, force, inputs)
    if path.is_dir():
        raise UsageError(f"output {path}: is a folder")
    return path


def _output_model(
    output: PathLike, force: bool, target: Checkpoint, inputs: Sequence[Checkpoint]
) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(output)))
    _refuse_place(path, force, inputs)
    if not target.path.is_dir():
        if path.suffix != ".safetensors" or path.is_dir():
            raise UsageError(
                f"output {path}: the target is one file, so the output is one .safetensors file"
            )
    elif path.exists() and (
        not path.is_dir() or (any(path.iterdir()) and not any(path.glob("*.safetensors")))
    ):
        raise UsageError(f"output {path}: holds no model, so --force does not replace it")
    return path


@contextlib.contextmanager
def _writing(plan: Plan, path: Path) -> Iterator[tuple[Staging, list[OutputFile]]]:
    """Yield the staging folder and the plan's files, allocated in full; close what is left open."""
    windowed = plan.nbytes_written * 10 > available_memory_nbytes()
    with staging(path) as stage, contextlib.ExitStack() as stack:
        made = stage.folder / "made"
        made.mkdir()
        files = []
        for output in plan.outputs:
            name = output.name if plan.verb == "apply" else path.name
            files.append(OutputFile(os.fspath(made / name), output.nbytes, windowed))
            stack.callback(files[-1].close)
        stack.callback(forget_open_files)
        yield stage, files


def _close(files: Sequence[OutputFile]) -> None:
    for file in files:
        file.close(durable=True)


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
        _job_line(job, status[job.operator]) for job in plan.jobs if job.name not in named
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


def _job_line(job: Any, status: str) -> Line:
    side = job.point or job.deltas[0].spec
    line: Line = {"name": job.name, "status": status, "dtype": job.out_dtype or side.dtype}
    line["shape"] = list(side.shape)
    return line | ({"note": job.note} if job.note else {})


# ----------------------------------------------------------------------------------- answers


def _complete_manifest(
    manifest: dict[str, Any],
    results: Sequence[JobResult],
    side_digests: dict[str, str],
    exceptions: int,
    replacements: int,
) -> None:
    manifest["tensors"], manifest["differing"], equal = {}, [], {}
    unrestored = 0
    for result in results:
        job = result.job
        if job.operator == "subtract":
            delta = job.deltas[0]
            assert isinstance(delta, PairDelta)
            unrestored += result.unrestored
            manifest["tensors"][job.name] = tensor_entry(
                delta,
                result.digests["base"],
                result.digests["tuned"],
                result.digests["output"],
                result.changed,
                float(result.sums[0]) ** 0.5,
                result.unrestored,
            )
        elif result.mismatches:
            manifest["differing"].append(job.name)
        else:
            assert job.point is not None
            equal[job.name] = [job.point.dtype, result.digests["point"]]
    manifest["equal"] = equal
    manifest["side"] = side_digests
    claim = "partial" if unrestored or manifest["differing"] else "bitwise"
    if manifest["dtype"] != "auto":
        claim = "rounded" if unrestored else claim
    manifest["exactness"] = exactness_entry(claim, exceptions, replacements, unrestored)


def _report_diff(
    report: Report,
    plan: Plan,
    results: Sequence[JobResult],
    manifest: dict[str, Any],
    nbytes: int,
) -> None:
    report.ledger = []
    for result in results:
        if result.job.operator == "subtract":
            entry = manifest["tensors"][result.job.name]
            line = _job_line(result.job, "delta" if result.changed else "unchanged")
            line |= {"numel": result.job.numel, "changed": result.changed, "norm": entry["norm"]}
            line |= {"exceptions": result.exceptions, "replacements": result.replacements}
            report.ledger.append(line | {"unrestored": result.unrestored})
        else:
            status = "differs" if result.mismatches else "equal"
            report.ledger.append(_job_line(result.job, status))
    report.ledger += plan.ledger
    numel = sum(line["numel"] for line in report.ledger if "numel" in line)
    changed = sum(line["changed"] for line in report.ledger if "changed" in line)
    report.facts |= {
        "nbytes": nbytes,
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": sum(float(r.sums[0]) for r in results if r.job.operator == "subtract") ** 0.5,
        "exactness": manifest["exactness"],
    }
    if manifest["differing"]:
        report.warnings.append(
            "integer or bool tensors differ and are not transferred:\n"
            + up_to_five(manifest["differing"])
        )
    mixed = {result.job.deltas[0].tuned.dtype for result in results
             if result.job.deltas and result.job.deltas[0].tuned.dtype
             != result.job.deltas[0].base.dtype}  # fmt: skip
    if mixed:
        report.warnings.append(
            f"tuned is {'+'.join(sorted(mixed))} where base is not: tuned comes back when the"
            " vector is applied to base with --dtype of the tuned model"
        )


def _report_apply(report: Report, plan: Plan, results: Sequence[JobResult]) -> None:
    report.ledger = []
    passed = {line["name"]: line for line in plan.ledger}
    added = [result for result in results if result.job.operator == "add"]
    for result in results:
        job = result.job
        if job.operator == "copy":
            report.ledger.append(_job_line(job, "passed through") | passed.pop(job.name, {}))
            continue
        gain, cosine = analysis.realised(*result.sums, plan.lam)
        line = _job_line(job, "applied" if result.changed else "unchanged")
        line |= {"numel": job.numel, "changed": result.changed, "gain": gain, "cosine": cosine}
        if not result.changed and result.sums[2] > 0 and plan.lam:
            line["note"] = "rounding absorbed the whole delta"
        report.ledger.append(line)
    report.ledger += passed.values()
    if plan.verdict == "exact base" and not all(result.exact_base for result in added):
        plan_names = [result.job.name for result in added if not result.exact_base]
        report.facts["verdict"] = "same family"
        report.warnings.append(
            "the target looked like the vector's base but differs from it in:\n"
            + up_to_five(plan_names)
        )
    sums = sum((result.sums for result in added), start=0 * added[0].sums)
    gain, cosine = analysis.realised(*sums, plan.lam)
    report.facts |= {
        "numel": sum(result.job.numel for result in added),
        "changed": sum(result.changed for result in added),
        "gain": gain,
        "cosine": cosine,
        "worst": [
            {key: line[key] for key in ("name", "gain", "cosine")}
            for line in sorted(
                (line for line in report.ledger if line.get("gain") is not None),
                key=lambda line: line["cosine"] if line["cosine"] is not None else -2.0,
            )[:5]
        ],
    }
    if gain is not None and not (0.9 <= gain <= 1.1 and (cosine or 0) >= 0.9):
        stored = sorted({result.job.out_dtype for result in added})
        report.warnings.append(
            f"rounding to {'+'.join(stored)} changed the request: of lam {plan.lam:g}, "
            f"{gain * plan.lam:.3g} arrived (gain {gain:.3g}, cosine {cosine or 0:.3g});"
            " steps of the target's grid are as large as the delta. --dtype fp32 is exact,"
            " --rounding stochastic right on average"
        )


def _verify_vector(
    vector: SkillVector,
    tuned: PathLike | Checkpoint | None,
    base: PathLike | Checkpoint | None,
    workers: int | None,
    watcher: Watcher | None,
) -> Report:
    manifest = vector.manifest
    left = open_checkpoint(tuned or manifest["tuned"]["ref"], "tuned")
    right = open_checkpoint(base or manifest["base"]["ref"], "base")
    plan = plan_verify_vector(vector, left, right)
    facts = {"claim": "VECTOR + BASE = TUNED", "path": vector.ref, "tuned": left.ref,
             "base": right.ref, "exactness": manifest["exactness"]}  # fmt: skip
    report = _planned(plan, facts, workers, watcher)
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
            problem = _mismatch(result, "tuned")
        line = _job_line(result.job, "differs" if problem else "verified")
        report.ledger.append(line | ({"unrestored": stated} if stated else {}))
        if problem:
            wrong.append(problem)
    _conclude(report, wrong)
    return report


def _mismatch(result: JobResult, side: str) -> str:
    return (
        f"{result.job.name}: {result.mismatches} of {result.job.numel} values differ from the"
        f" {side} model's, the first at flat position {result.first_mismatch}"
    )


def _conclude(report: Report, wrong: list[str]) -> None:
    if wrong:
        raise VerificationError(f"{report.facts['claim']} does not hold:\n{up_to_five(wrong)}")
    report.facts["verified"] = True
