"""Vectors out as LoRA: the best low-rank factors of every matrix, in a folder that PEFT loads.

What an adapter can hold, and under which names, is asked of the model class of the base's config
(`held_model`): linear layers, and transformers' Conv1D, whose weights lie turned; experts that are
fused in one parameter; by choice embeddings, and modules saved whole. Left out, by name, and
counted in the energy: norms, biases, convolutions, embeddings and heads tied to them. Counted
apart: names that the model does not have, of which nothing is known.

One matrix (of experts, one expert's) is in memory for each worker at a time, with its factors;
those go to the disk as they come. Each has one thread, so that the bytes depend on neither. The
share of energy that is kept is measured against the factors as they are stored, not taken from
singular values. Refused: a base whose config is not there or not known to transformers, other
shapes.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.held_model import LEFT_OUT, NOT_FOUND, Held, Hold
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.engine.jobs.add import AddJob
from skillvec.engine.jobs.compare import CompareJob
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.point import PointJob
from skillvec.engine.matrix_workers import at_once_nbytes
from skillvec.engine.outputs import Output, PathLike, output_adapter
from skillvec.engine.plan import Job, Plan
from skillvec.engine.plan_checks import plan_compare
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan, show_plan
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.files.file import forget_open_files
from skillvec.files.fingerprints import fingerprints, refuse_changed
from skillvec.files.header import ITEMSIZE
from skillvec.files.output_file import fsync_path
from skillvec.files.staging import staging
from skillvec.files.tensors import as_integers
from skillvec.files.views import whole
from skillvec.ops import svd
from skillvec.ops.statistics import Request
from skillvec.remote import references
from skillvec.report import Report, Watcher
from skillvec.vectors.combining import viewed_delta
from skillvec.vectors.deltas.base import DeltaSource, dtype_of
from skillvec.vectors.vector import SkillVector
from skillvec.verbs.adapter_writer import SLACK, AdapterWriter, cut_parts, matrix_nbytes
from skillvec.verbs.findings import refuse_announced

LITTLE = 0.9  # of the energy: below, the adapter is another thing than the vector
WEIGHTS = "adapter_model.safetensors"


def extract_lora(
    vector: PathLike | SkillVector,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embed_lora: bool = False,
    save_module: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    device: str = "auto",
    seed: int = 0,
    base: str | None = None,
    dtype: str = "fp32",
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Write the best PEFT LoRA adapter of `vector` for its base to the folder `output`.

    B A of every matrix is the best of its rank: `rank`, or the smallest that keeps the share
    `energy` of its squared norm (experts of one parameter get the largest of theirs). So that share
    is kept of all that has factors; of the whole vector it may be less, which the report and a
    warning say. `embed_lora` makes factors of embeddings too, `save_module` names modules (by the
    ends of their names) that are saved whole, base + v in the base's dtype, as apply gives it.
    `base` is where the base is now (its config is read), if not where it was. `dtype` is that of
    the factors; the SVD is in fp32 (fp64 of fp64 deltas), by `device` and `seed`. The report has
    rank and kept energy of every tensor and of all, with what is left out, and what is not found in
    the model of that config. With `allow_nonfinite`, values without a finite delta count as
    unchanged. Raises UsageError, IncompatibleError, NonfiniteError, FormatError, OutputError.
    """
    _check_request(rank, energy, seed, dtype)
    opened = SkillVector.open(vector)
    point = opened.reopen_base(base)
    plan = plan_compare([opened], Request((opened.scale,)), None, include, exclude)
    announced = refuse_announced(opened, allow_nonfinite, {job.name for job in plan.jobs})
    plan.warnings.extend(announced)
    plan = replace(plan, verb="extract-lora")
    plan, model, held, saved = _sorted_out(plan, opened, point, embed_lora, save_module)
    copies = _whole_jobs(model, saved, plan.jobs, opened)
    most = 4096 + sum(_most_nbytes(job, held[job.name], rank, dtype_of(dtype)) for job in plan.jobs)
    plan = replace(plan, bound_nbytes=most + sum(_in_file_nbytes(job) for job in copies))
    place = output_adapter(output, force, [*opened.inputs(), point])
    facts: dict[str, Any] = {
        "vector": opened.ref, "lineage": opened.dtypes, "base": point.ref, "output": place.ref,
        "rank": rank, "energy": energy, "embed_lora": embed_lora,
        "save_module": list(save_module), "dtype": dtype, "seed": seed,
        "device": svd.resolve_device(device),
    }  # fmt: skip
    one = "serial" if facts["device"] != "cpu" else "threads"
    run = Run.by(one, dry_run=dry_run, force=force, watcher=watcher)
    sizes = [matrix_nbytes(part) for part in cut_parts(plan.jobs, held)]
    matrices_nbytes = at_once_nbytes(sizes, run.engine.in_process)
    report = show_plan(plan, facts, run, place, matrices_nbytes)
    lines = {line["name"]: line for line in report.ledger}
    for name, hold in held.items():
        lines[name] |= {"status": hold.status} | ({"note": hold.why} if hold.why else {})
    tied, excluded = opened.manifest["tied"], opened.manifest["excluded"]
    report.ledger += [{"name": n, "status": "tied", "note": f"copy of {tied[n]}"} for n in tied]
    report.ledger += [{"name": name, "status": "excluded"} for name in excluded]
    if run.dry_run:
        return report
    parts = model, held, saved, copies
    lost = _write_adapter(opened, plan, parts, place, report, run, allow_nonfinite)
    if lost:
        told = [f"{job.name}: {lost[job.name]} of {job.numel} values"
                for job in plan.jobs if job.name in lost]  # fmt: skip
        report.warnings.append(
            f"differences that are not finite count as unchanged:\n{up_to_five(told)}"
        )
    return report


def _check_request(rank: int | None, energy: float | None, seed: int, dtype: str) -> None:
    if (rank is None) == (energy is None):
        raise UsageError("extract-lora takes either rank or energy")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy {energy}: expected a share above 0, up to 1")
    if seed < 0:
        raise UsageError(f"seed {seed}: expected at least 0")
    if dtype_of(dtype) == "F64":
        raise UsageError("dtype fp64: factors are stored in fp32, bf16 or fp16")


def _write_adapter(
    vector: SkillVector, plan: Plan,
    parts: tuple[Held, dict[str, Hold], list[str], Sequence[Job]],
    place: Output, report: Report, run: Run, allow_nonfinite: bool,
) -> dict[str, int]:  # fmt: skip
    """Write factors, what is saved whole, and their config; complete the report.

    Returns how many values have no finite delta, by tensor.
    """
    model, held, saved, copies = parts
    sources = (*plan.files(), *(file for job in copies for file in job.files()))
    before, lost = fingerprints(dict.fromkeys(sources)), dict[str, int]()
    plan = measure_plan(plan, Run.by(watcher=run.watcher))
    try:
        deliver = place.delivery(run.force, run.watcher)
        with staging(place.path, run.force, deliver=deliver) as stage:
            made = stage.made
            writer = AdapterWriter(made / WEIGHTS, plan, model, held, copies, report)
            workers = run.engine.in_process
            ranks = writer.write(vector.scale, workers, run.watcher, lost, allow_nonfinite)
            config = _config(ranks, model, held, saved, vector)
            (made / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            fsync_path(os.fspath(made / ADAPTER_CONFIG))
            report.facts["nbytes"] = os.path.getsize(made / WEIGHTS)
            refuse_changed(before)
            stage.publish(made)
    finally:
        forget_open_files()
    _conclude(report, list(ranks.values()))
    return lost


# --------------------------------------------------------------------------------- what it holds


def _sorted_out(
    plan: Plan, vector: SkillVector, base: Checkpoint, embed_lora: bool, save_module: Sequence[str]
) -> tuple[Plan, Held, dict[str, Hold], list[str]]:
    """Return the plan under the names of the base's model, how each delta is held, what is whole.

    Raises IncompatibleError where nothing has factors, or what a shape says otherwise.
    """
    model = Held(base)
    plan = replace(plan, jobs=_in_memory(plan.jobs, vector, model))
    saved = model.whole_modules(save_module)
    held, problems, warnings = dict[str, Hold](), [], []
    for job in plan.jobs:
        name, shape = job.name, tuple(job.deltas[0].spec.shape)
        weight = model.weights.get(name)
        if weight is not None and tuple(weight.shape) != shape:
            problems.append(f"{name}: {list(shape)}, base {list(weight.shape)}")
        held[name] = model.hold(name, shape, saved, embed_lora)
    if problems:
        raise IncompatibleError(
            f"the vector does not fit the config of {base.ref}:\n{up_to_five(problems)}"
        )
    held = model.as_loaded(held)
    shared = []
    for name in [name for name in held if name in model.tied]:
        hold = held[name] = _of_tied(name, model, held, vector, plan.jobs)
        if hold.has_factors:
            others = ", ".join(other for other in model.tied[name] if other != name)
            asked = f": --save-module {hold.place} holds it either way"
            shared.append(f"{name}: tied to {others}{asked if hold.kind == 'embedding' else ''}")
    if shared:
        warnings.append(
            "merging adds factors of weights that the base ties to the one weight, which is right;"
            f" unmerged they do not reach the other places where it is used:\n{up_to_five(shared)}"
        )
    if not any(hold.has_factors for hold in held.values()):
        reasons = [f"{name}: {hold.why or 'saved whole'}" for name, hold in held.items()]
        raise IncompatibleError(
            f"no tensor that LoRA could hold, by the model of {base.ref}:\n{up_to_five(reasons)}"
        )
    return replace(plan, warnings=[*plan.warnings, *warnings]), model, held, saved


def _in_memory(jobs: Sequence[Job], vector: SkillVector, model: Held) -> list[Job]:
    """Return jobs under the names of a model, in the order of what they are made of."""
    files = {job.name: tuple(job.deltas[0].spec.shape) for job in jobs}
    order, used = {name: n for n, name in enumerate(files)}, set[str]()
    made: list[tuple[int, Job]] = []
    for name, view in model.views(files).items():
        source, *others = view.sources
        used |= set(view.sources)
        job = jobs[order[source]]
        if others or view != whole(source, files[source]):
            delta = viewed_delta(name, view, vector)
            job = CompareJob(name, delta.spec.numel, deltas=(delta,))
        made.append((min(order[part] for part in view.sources), replace(job, name=name)))
    made += [(order[job.name], job) for job in jobs if job.name not in used]
    return [job for _, job in sorted(made, key=lambda pair: pair[0])]


def _of_tied(
    name: str, model: Held, held: Mapping[str, Hold], vector: SkillVector, jobs: Sequence[Job]
) -> Hold:
    """Say how the delta of a weight with several names is held, of which one says it."""
    hold, others = held[name], [other for other in model.tied[name] if other in held]
    moved = {job.name: _name_in(vector, job.deltas[0]) for job in jobs if job.name in others}
    files = set(moved.values())
    apart = files & set(vector.untied) or any(
        not file or not files <= {file, *vector.find_same(file)} for file in files if len(files) > 1
    )
    if apart and not all(held[other].kind == "whole" for other in others):
        both = " and ".join(f"--save-module {n.rpartition('.')[0]}" for n in model.tied[name])
        return Hold(f"tied in the base, which the vector parts: {both} hold it", LEFT_OUT)
    if hold.why or hold.kind == "whole" or others[0] == name:
        return hold
    return Hold(f"tied: the delta of {others[0]}", "tied")


def _name_in(vector: SkillVector, delta: DeltaSource) -> str:
    """Return the name by which a vector has a delta, "" of one that is made of several."""
    name = "" if delta.is_relaid else delta.spec.name
    return name if name in vector.deltas else ""


def _whole_jobs(
    model: Held, saved: Sequence[str], jobs: Sequence[Job], vector: SkillVector
) -> list[Job]:
    """Return what apply does to all weights of modules that are saved whole, the widest first.

    Raises IncompatibleError where the base does not store one.
    """
    names, deltas = model.within(saved), {job.name: job.deltas[0] for job in jobs}
    sources = model.sources(other for name in names for other in (name, *model.tied.get(name, ())))
    made: list[PointJob] = []
    for name in names:
        group = (name, *model.tied.get(name, ()))
        source = next((sources[other] for other in group if other in sources), None)
        delta = next((deltas[other] for other in group if other in deltas), None)
        if source is None:
            raise IncompatibleError(f"{model.base.ref}: {name}: not stored, and to be saved whole")
        if delta is None:
            source = as_integers(source)
            made.append(CopyJob(name, source.numel, out_dtype=source.dtype, point=source))
            continue
        file = _name_in(vector, delta)
        made.append(
            AddJob(
                name,
                source.numel,
                out_dtype=source.dtype,
                point=source,
                deltas=(delta,),
                base_digest=vector.base_digest(file),
                tuned_dtype=vector.tuned_dtype(file) if file else "",
            )
        )
    return sorted(made, key=lambda job: -ITEMSIZE[job.out_dtype])


def _in_file_nbytes(job: Job) -> int:
    """Return the most that a tensor that is saved whole takes in the file and its header."""
    return job.numel * ITEMSIZE[job.out_dtype] + 3 * len(job.name) + 300


def _most_nbytes(job: Job, hold: Hold, rank: int | None, dtype: str) -> int:
    """Return the most that the factors of a delta take in the file, its header and the config."""
    if not hold.has_factors:
        return 0
    *experts, m, n = job.deltas[0].spec.shape
    values = prod(experts) * min(rank or m, m, n) * (m + n)
    return values * ITEMSIZE[dtype] + 6 * len(job.name) + 600


# ------------------------------------------------------------------------------------- described


def _config(
    ranks: Mapping[str, int], model: Held, held: Mapping[str, Hold], saved: Sequence[str],
    vector: SkillVector,
) -> dict[str, Any]:  # fmt: skip
    """Return adapter_config.json: every scaling is 1, all modules by their full names."""
    base = model.base
    kinds = {hold.place: hold for hold in held.values() if hold.has_factors}
    parameters = sorted(place for place in ranks if kinds[place].kind == "parameter")
    modules = sorted(set(ranks) - set(parameters))
    turned = any(kinds[place].turned and kinds[place].kind == "linear" for place in ranks)
    rank = max(ranks.values())
    others = {f"^{re.escape(name)}": k for name, k in ranks.items() if k != rank}
    revision = vector.manifest["base"]["revision"] if base is vector.open_base() else None
    ref, commit = references.pinned(base.ref) or (base.ref, revision)
    if ref == base.ref and references.is_of_hub(ref) and not ref.startswith(references.SCHEME):
        ref = f"./{ref}"  # a folder of this disk: PEFT would ask the Hub for that name
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": model.task,
        "base_model_name_or_path": ref,
        "revision": commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": modules,
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(saved) or None,
    }
    if parameters:
        config["target_parameters"] = parameters
    if beside := model.beside(modules):
        config["exclude_modules"] = "|".join(map(re.escape, beside))
    if model.stays_tied(saved, vector.untied):
        config["ensure_weight_tying"] = True
    if model.task is None:
        kind = type(model.model)
        config["auto_mapping"] = {
            "base_model_class": kind.__name__, "parent_library": kind.__module__
        }  # fmt: skip
    return config


def _conclude(report: Report, ranks: Sequence[int]) -> None:
    """Add what was kept of all, and warn where that is little."""
    told = [line for line in report.ledger if "norm_sq" in line]
    total = sum(line["norm_sq"] for line in told)
    kept = sum(line["norm_sq"] * (line["kept_energy"] or 0) for line in told)
    left, missing = (
        sum(line["norm_sq"] for line in told if line["status"] == status)
        for status in (LEFT_OUT, NOT_FOUND)
    )
    taken = sum(line["norm_sq"] for line in told if line["status"] in ("held", "whole"))
    report.facts |= {
        "norm_sq": total, "kept_energy": kept / total, "kept_of_held": kept / taken,
        "left_out_energy": left / total, "not_found_energy": missing / total,
        "modules": len(ranks), "least_rank": min(ranks), "most_rank": max(ranks),
        "svd_error": max(line.get("svd_error", 0.0) for line in told),
    }  # fmt: skip
    if kept < LITTLE * total:
        report.warnings.append(
            f"the adapter keeps {kept / total:.3g} of the vector's squared norm: what it does may"
            " differ"
        )
    wanted = report.facts["energy"]
    short = [f"{line['name']}: {line['kept_energy']:.6g}" for line in told if wanted
             and line["status"] == "held" and line["kept_energy"] < wanted - SLACK]  # fmt: skip
    if wanted and kept / total < wanted - SLACK:
        report.warnings.append(
            f"energy {wanted:g} is kept of what the adapter holds ({kept / taken:.3g} of it), not"
            f" of the whole vector ({kept / total:.3g}): {(total - taken) / total:.3g} of that is"
            " in tensors that are left out or not found (--embed-lora and --save-module hold more)"
        )
    if short:
        report.warnings.append(
            f"energy {wanted:g} is not met by factors in {report.facts['dtype']}:\n"
            + up_to_five(short)
        )
    if missing:
        names = [line["name"] for line in told if line["status"] == NOT_FOUND and line["norm_sq"]]
        report.warnings.append(
            f"{missing / total:.3g} of the vector's squared norm is in tensors that were not found"
            f" among the modules of {report.facts['base']}, so no adapter of it reaches them:\n"
            + up_to_five(names)
        )
