"""Vectors out as LoRA: the best low-rank factors of every matrix, in a folder that PEFT loads.

Hides which weights LoRA can hold. That is asked of the model class of the base's config, built on
the meta device: nn.Linear, and transformers' Conv1D, whose weights lie turned. Left out, by name,
and counted in the energy: embeddings (few servers take them), heads tied to them (a delta on one
would change both), norms, biases, fused experts. Counted apart: names that the model does not have,
of which nothing is known.

One matrix is in memory at a time, with its factors; those go to the disk as they come. The share
of energy that is kept is measured against the factors as they are stored, not taken from singular
values. Refused: a base whose config is not there or not known to transformers, other shapes.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skillvec import hub, subspace
from skillvec.blocks import pieces_of
from skillvec.checkpoint import ADAPTER_CONFIG, Checkpoint, reopen
from skillvec.conversions import model_of
from skillvec.deltas import dtype_of
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.kernels import Array, narrow, widen
from skillvec.measures import Request
from skillvec.outputs import PathLike, output_adapter
from skillvec.plan import Job, Plan, plan_compare
from skillvec.report import Line, Report, Watcher
from skillvec.running import engine_of, measured, planned
from skillvec.staging import staging
from skillvec.storage import (
    ITEMSIZE,
    OutputFile,
    encode_header,
    fingerprints,
    forget_open_files,
    fsync_path,
    refuse_changed,
)
from skillvec.summary import refuse_announced
from skillvec.vector import SkillVector
from skillvec.vectorfile import readers_of

FIRST_RANK = 16  # tried for an energy, then doubled
NOT_FOUND = "not found"  # status of names that the model does not have
LITTLE = 0.9  # of the energy: below, the adapter is another thing than the vector
PIECE = 1 << 20  # values of the residual at a time
WEIGHTS = "adapter_model.safetensors"


def extract_lora(
    vector: PathLike | SkillVector,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
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
    """Write the vector's matrices as a PEFT LoRA adapter for its base: B A is the best of its rank.

    Every matrix gets `rank`, or the smallest rank that keeps the share `energy` of its squared
    norm. `base` is where the base is now (its config is read), if not where it was. `dtype` is
    that of the factors; the SVD is in fp32 (fp64 of fp64 deltas), by `device` and `seed`. The
    report has rank and kept energy of every tensor and of all, with what is left out, and what is
    not found in the model of that config. Values without a finite delta are refused, or with
    `allow_nonfinite` count as unchanged. Raises UsageError, IncompatibleError, NonfiniteError,
    FormatError, OutputError.
    """
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
    opened = SkillVector.open(vector)
    point = opened.base
    if point is None or base is not None:
        excluded = set(opened.manifest["excluded"]).__contains__
        point = reopen(base, opened.manifest["base"]["ref"], "base", excluded)
    plan = plan_compare([opened], Request((opened.scale,)), None, include, exclude)
    announced = refuse_announced(opened, allow_nonfinite, {job.name for job in plan.jobs})
    plan.warnings.extend(announced)
    held = _sorted_out(plan.jobs, point)
    most = 4096  # of the config, beside the names
    for job in (job for job in plan.jobs if not held[job.name].why):
        m, n = job.deltas[0].spec.shape
        most += min(rank or m, m, n) * (m + n) * ITEMSIZE[dtype_of(dtype)]
        most += 6 * len(job.name) + 600  # in the header twice, in the config four times
    plan = replace(plan, verb="extract-lora", bound_nbytes=most)
    place = output_adapter(output, force, [*opened.inputs(), point])
    facts: dict[str, Any] = {
        "vector": opened.ref, "lineage": opened.dtypes, "base": point.ref, "output": place.ref,
        "rank": rank, "energy": energy, "dtype": dtype, "seed": seed,
        "device": subspace.resolve_device(device),
    }  # fmt: skip
    one = engine_of("serial", None)  # matrices come one by one
    report = planned(plan, facts, one, watcher, place=place, dry_run=dry_run)
    lines = {line["name"]: line for line in report.ledger}
    for name, hold in held.items():
        lines[name] |= {"status": hold.status} | ({"note": hold.why} if hold.why else {})
    tied, excluded = opened.manifest["tied"], opened.manifest["excluded"]
    report.ledger += [{"name": n, "status": "tied", "note": f"copy of {tied[n]}"} for n in tied]
    report.ledger += [{"name": name, "status": "excluded"} for name in excluded]
    if dry_run:
        return report
    before, lost = fingerprints(plan.files()), dict[str, int]()
    plan = measured(plan, engine_of("threads", None), watcher)
    try:
        with staging(place.path, force, deliver=place.delivery(force, watcher)) as stage:
            made = stage.made
            ranks = _write(made / WEIGHTS, plan, opened.scale, held, lines, report.facts, watcher,
                           lost if allow_nonfinite else None)  # fmt: skip
            config = _config(ranks, any(hold.turned for hold in held.values()), point, opened)
            (made / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            fsync_path(os.fspath(made / ADAPTER_CONFIG))
            report.facts["nbytes"] = os.path.getsize(made / WEIGHTS)
            refuse_changed(before)
            stage.publish(made)
    finally:
        forget_open_files()
    _conclude(report, list(ranks.values()))
    if lost:
        told = [f"{job.name}: {lost[job.name]} of {job.numel} values"
                for job in plan.jobs if job.name in lost]  # fmt: skip
        report.warnings.append(
            f"differences that are not finite count as unchanged:\n{up_to_five(told)}"
        )
    return report


# --------------------------------------------------------------------------------- what it holds


class Hold(NamedTuple):
    """Whether LoRA holds a weight: why not, else whether the module keeps it turned."""

    why: str = ""
    turned: bool = False
    status: str = "held"


def _left(why: str) -> Hold:
    return Hold(why, status="left out")


def _sorted_out(jobs: Sequence[Job], base: Checkpoint) -> dict[str, Hold]:
    """Say of every delta whether LoRA holds it. Raises IncompatibleError where none is held."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model = _model_of(base)
    modules, known = dict(model.named_modules()), set(model.state_dict(keep_vars=True))
    owners = Counter(id(getattr(module, "weight", None)) for module in modules.values())
    held, problems = {}, []
    for job in jobs:
        name, shape = job.name, tuple(job.deltas[0].spec.shape)
        module = modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if len(shape) != 2:
            held[name] = _left(f"{len(shape)} dimensions, a matrix has 2")
        elif name not in known:
            held[name] = Hold(f"no module of {base.model_type} has it", status=NOT_FOUND)
        elif not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            kind = "parameter" if module is None else f"weight of a {type(module).__name__}"
            held[name] = _left(f"the {kind}, not of a linear module")
        elif tuple(module.weight.shape) != shape:
            problems.append(f"{name}: {list(shape)}, base {list(module.weight.shape)}")
        elif owners[id(module.weight)] > 1:
            held[name] = _left("tied: a delta would change the other weight too")
        elif isinstance(module, nn.Embedding):
            held[name] = _left("an embedding")
        else:
            held[name] = Hold(turned=isinstance(module, Conv1D))
    if problems:
        raise IncompatibleError(
            f"the vector does not fit the config of {base.ref}:\n{up_to_five(problems)}"
        )
    if all(hold.why for hold in held.values()):
        reasons = [f"{name}: {hold.why}" for name, hold in held.items()]
        raise IncompatibleError(
            f"no tensor that LoRA could hold, by the model of {base.ref}:\n{up_to_five(reasons)}"
        )
    return held


def _model_of(base: Checkpoint) -> Any:
    """Return the model of the base's config, without memory for its weights."""
    where = f"{base.ref}: config.json (it tells linear weights from others)"
    if base.model_type is None:
        raise IncompatibleError(f"{where}: has no model_type, or is not there")
    try:
        return model_of(base.config, len(base))
    except Exception as error:  # whatever a model's code raises on a config of others
        problem = str(error).partition(". ")[0][:200]  # it goes on to list every model there is
        raise IncompatibleError(f"{where}: transformers makes no model of it: {problem}") from None


# ------------------------------------------------------------------------------------ factorised


def _write(
    path: Path, plan: Plan, scale: float, held: Mapping[str, Hold], lines: Mapping[str, Line],
    facts: dict[str, Any], watcher: Watcher | None, lost: dict[str, int] | None,
) -> dict[str, int]:  # fmt: skip
    """Write the factors of every matrix; return ranks by module. Fills in lines of the ledger."""
    stored = dtype_of(facts["dtype"])
    readers = readers_of(plan.vectors)

    def layout(name: str, b: tuple[int, ...], a: tuple[int, ...]) -> list[Any]:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        return [(f"{prefix}.lora_B.weight", stored, b), (f"{prefix}.lora_A.weight", stored, a)]

    most, entries = [], []
    for job in plan.jobs:
        if not held[job.name].why:
            shape = job.deltas[0].spec.shape
            most += layout(job.name, (max(shape), max(shape)), (max(shape), max(shape)))
    reserve = len(encode_header(most, {"format": "pt"}))  # what comes is no longer
    ranks: dict[str, int] = {}
    done, total = 0, sum(job.nbytes_read for job in plan.jobs)
    file = OutputFile(os.fspath(path), reserve)
    try:
        for job in plan.jobs:
            found = pieces_of(job.deltas[0], readers, lost)
            pieces = (scale * piece for _, piece in found)
            factors = _factors(job, pieces, held[job.name], lines[job.name], facts)
            if factors is not None:
                entries += layout(job.name, factors[0].shape, factors[1].shape)
                ranks[job.name.removesuffix(".weight")] = len(factors[1])
                for values in factors:
                    file.append(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
            done += job.nbytes_read
            if watcher:
                watcher.advanced(done, total)
        if not ranks:
            raise IncompatibleError("every delta that LoRA could hold is 0")
        file.write(0, encode_header(entries, {"format": "pt"}, reserve))
        file.sync()
    finally:
        file.close()
    return ranks


def _factors(
    job: Job, pieces: Iterator[Array], hold: Hold, line: Line, facts: Mapping[str, Any]
) -> tuple[Array, Array] | None:
    """Return B and A in their storage dtype, None of what is not held; fill in the line."""
    norm_sq, matrix, at = 0.0, None, 0
    for piece in pieces:
        norm_sq += float(np.square(piece, dtype=np.float64).sum())
        if not hold.why:
            matrix = np.empty(job.numel, piece.dtype) if matrix is None else matrix
            matrix[at : at + piece.size] = piece
            at += piece.size
    if not np.isfinite(norm_sq):
        raise IncompatibleError(f"{job.name}: the delta holds NaN, infinities or too large values")
    line |= {"norm_sq": norm_sq, "kept_energy": 0.0 if norm_sq else None, "rank": 0}
    if matrix is None or not norm_sq:
        line["status"] = line["status"] if norm_sq else "zero"
        return None
    matrix = matrix.reshape(job.deltas[0].spec.shape)
    found, rank = _decomposed(matrix, facts)
    roots = np.sqrt(found.values[:rank]).astype(matrix.dtype)
    left, right = found.left[:, :rank] * roots, found.right[:, :rank] * roots
    stored = dtype_of(facts["dtype"])
    sides = [narrow(np.ascontiguousarray(side), stored) for side in (left, right)]
    left, right = (widen(side, stored).astype(matrix.dtype) for side in sides)
    lost, step = 0.0, max(1, PIECE // len(right))
    for row in range(0, len(left), step):
        rest = matrix[row : row + step] - left[row : row + step] @ right.T
        lost += float(np.square(rest, dtype=np.float64).sum())
    if not np.isfinite(lost):
        raise IncompatibleError(f"{job.name}: factors leave {facts['dtype']}: take fp32")
    line |= {"rank": rank, "kept_energy": 1 - lost / norm_sq, "svd_error": found.error}
    out, inner = sides[::-1] if hold.turned else sides
    return out, np.ascontiguousarray(inner.T)


def _decomposed(matrix: Array, facts: Mapping[str, Any]) -> tuple[subspace.Spectrum, int]:
    """Return the leading triplets, and how many are wanted: no more than there are."""
    device, seed, most = facts["device"], facts["seed"], min(matrix.shape)
    if facts["rank"] is not None:
        found = subspace.decompose(matrix, min(facts["rank"], most), device, seed)
        return found, found.values.size
    wanted = FIRST_RANK
    while True:
        found = subspace.decompose(matrix, min(wanted, most), device, seed)
        enough = np.cumsum(found.values**2) >= facts["energy"] * found.norm_sq
        if enough.any():
            return found, int(np.argmax(enough)) + 1
        if found.values.size < wanted:  # the rank of the matrix
            return found, found.values.size
        wanted *= 2


# ------------------------------------------------------------------------------------- described


def _config(
    ranks: Mapping[str, int], turned: bool, base: Checkpoint, vector: SkillVector
) -> dict[str, Any]:
    """Return adapter_config.json: every scaling is 1, all modules by their full names."""
    rank = max(ranks.values())
    others = {f"^{re.escape(name)}": k for name, k in ranks.items() if k != rank}
    named = str(base.config.get("architectures") or "")
    revision = vector.manifest["base"]["revision"] if base is vector.base else None
    ref, commit = hub.pinned(base.ref) or (base.ref, revision)
    if ref == base.ref and hub.is_reference(ref) and not ref.startswith(hub.SCHEME):
        ref = f"./{ref}"  # a folder of this disk: PEFT would ask the Hub for that name
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "ForCausalLM" in named else None,
        "base_model_name_or_path": ref,
        "revision": commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _conclude(report: Report, ranks: Sequence[int]) -> None:
    """Add what was kept of all, and warn where that is little."""
    told = [line for line in report.ledger if "norm_sq" in line]
    total = sum(line["norm_sq"] for line in told)
    kept = sum(line["norm_sq"] * (line["kept_energy"] or 0) for line in told)
    left, missing = (
        sum(line["norm_sq"] for line in told if line["status"] == status)
        for status in ("left out", NOT_FOUND)
    )
    report.facts |= {
        "norm_sq": total, "kept_energy": kept / total, "left_out_energy": left / total,
        "not_found_energy": missing / total,
        "modules": len(ranks), "least_rank": min(ranks), "most_rank": max(ranks),
        "svd_error": max(line.get("svd_error", 0.0) for line in told),
    }  # fmt: skip
    if kept < LITTLE * total:
        report.warnings.append(
            f"the adapter keeps {kept / total:.3g} of the vector's squared norm: what it does may"
            " differ"
        )
    if missing:
        names = [line["name"] for line in told if line["status"] == NOT_FOUND and line["norm_sq"]]
        report.warnings.append(
            f"{missing / total:.3g} of the vector's squared norm is in tensors that were not found"
            f" among the modules of {report.facts['base']}, so no adapter of it reaches them:\n"
            + up_to_five(names)
        )
