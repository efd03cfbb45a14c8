"""Storing a vector, for every verb that makes one: its form, manifest and report."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillvec import __version__
from skillvec.engine.jobs.store import StoreJob
from skillvec.engine.outputs import (
    PathLike,
    choose_storage,
    output_vector,
    parse_size,
    vector_nbytes,
    writing_vector,
)
from skillvec.engine.plan import JobResult, Plan, job_line
from skillvec.engine.plan_vectors import plan_store
from skillvec.engine.run import Run
from skillvec.engine.runner import measure_plan, run_plan, show_plan
from skillvec.errors import UsageError, up_to_five
from skillvec.files.file import file_nbytes
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.ops.codecs import CODECS
from skillvec.report import Report, Watcher
from skillvec.vectors.deltas.base import NO_DIGEST, dtype_of
from skillvec.vectors.deltas.factored import StackDelta
from skillvec.vectors.manifest import Claim, Manifest, TensorEntry
from skillvec.vectors.reader import VectorFile
from skillvec.vectors.recipe import flags
from skillvec.vectors.vector import SkillVector, StoredVector
from skillvec.vectors.writer import Entry, Settled, tensor_entry
from skillvec.verbs.findings import (
    refuse_announced,
    refuse_nonfinite,
    rounding_warning,
    tell_nonfinite,
    tell_resumed,
)
from skillvec.verbs.matrix_energies import share_kept, tell_energies

NO_DIGESTS: dict[str, str] = {}


@dataclass(frozen=True, eq=False, repr=False)
class StoredForm:
    """How a vector is written, and what its manifest says of it: the options of `save`."""

    dtype: str
    codec: str
    max_shard_size: int | str
    method: str | None
    notes: str | None
    license: str | None
    allow_nonfinite: bool


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
    """Write `vector` to one safetensors file, or to a folder of shards where that would be large.

    `output` is the file or folder. `dtype` of a combination: auto is fp32 (fp64 where an input is);
    that of a difference was chosen when it was taken. `codec`: auto, dense, sparse or packed
    (docs/format.md); `max_shard_size` in bytes, or "5GB". A stored vector is written with its
    manifest and exact values, whatever the codec. `method`, `notes` and `license` go into the
    manifest. Raises NonfiniteError where values have no finite delta, unless `allow_nonfinite`.
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
    tell_resumed(report, stage)
    # of many tensors it takes room, and what is opened says the same
    del manifest, entries, settled, writer
    report.ledger = []
    for result in results:
        result.digests = NO_DIGESTS
    saved = SkillVector.open(place.ref)
    assert isinstance(saved, StoredVector)
    report_stored(report, plan, results, saved.manifest, saved.stored)
    tell_energies(report, plan)
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


def complete_manifest(
    manifest: Manifest, results: Sequence[JobResult], settled: Settled, vector: SkillVector
) -> None:
    """Add what is known when all blocks are written: digests, counts, codecs, exactness."""
    manifest["tensors"], manifest["differing"] = {}, []
    equal, differing, announced = {}, [], vector.nonfinite()
    for result in results:
        job = result.job
        if isinstance(job, StoreJob):
            placed, stated = settled.placed[job.name], vector.find_entry(job.name)
            nonfinite = min(result.lost + announced.get(job.name, 0), job.numel)
            manifest["tensors"][job.name] = _entry(result, placed, stated, nonfinite)
        elif result.mismatches:
            differing.append(job.name)
        else:
            assert job.point is not None
            equal[job.name] = [job.point.dtype, result.digests["point"]]
    manifest["schema"] = 2 if any(result.ranked for result in results) else 1
    if any("rank" in entry for entry in manifest["tensors"].values()):
        manifest["schema"] = 3
    if (kept := share_kept([result.job for result in results])) is not None:
        manifest["kept"] = float(f"{max(kept, 0.0):.4e}")  # a zero may be less by rounding
    manifest["side"] = settled.side
    unrestored = sum(entry.get("unrestored", 0) for entry in manifest["tensors"].values())
    manifest["equal"], manifest["differing"], claim = vector.conclude(equal, differing, unrestored)
    manifest["exactness"] = Claim(
        claim=claim,
        exceptions=settled.exceptions,
        replacements=settled.replacements, unrestored=unrestored,
    )  # fmt: skip


def _entry(
    result: JobResult, placed: tuple[str, int], stated: TensorEntry | None, nonfinite: int
) -> TensorEntry:
    """Return the manifest's line on a delta that was written; `stated` is its line where it was."""
    job, (codec, block) = result.job, placed
    delta = job.deltas[0]
    rank = delta.rank if isinstance(delta, StackDelta) else 0
    entry = Entry(job.name, job.out_dtype, delta.spec.shape, codec, rank)
    digest = NO_DIGEST if codec == "zero" else result.digests["output"]
    if stated is not None:
        return tensor_entry(
            entry, codec, block, digest, stated["changed"], stated["norm"], stated["base"],
            stated["tuned"], stated.get("unrestored", 0), nonfinite,
        )  # fmt: skip
    base = tuned = None
    if (pair := delta.pair) is not None:
        base = [pair.base.dtype, result.digests["base"]]
        tuned = [pair.tuned.dtype, result.digests["tuned"]]
    changed, norm = result.changed, float(result.sums[0]) ** 0.5
    if isinstance(delta, StackDelta):  # of what the factors make
        changed, norm = delta.measured()
    return tensor_entry(
        entry, codec, block, digest, changed, norm, base, tuned, result.unrestored, nonfinite
    )


def zero_warning(why: str) -> str:
    return f"no value differs: the vector is zero ({why}), and adding it changes nothing"


def report_stored(
    report: Report,
    plan: Plan,
    results: Sequence[JobResult],
    manifest: Manifest,
    stored: VectorFile,
) -> None:
    report.ledger = []
    entries = manifest["tensors"]
    for result in results:
        name = result.job.name
        if isinstance(result.job, StoreJob):
            entry = entries[name]
            line = job_line(result.job, "delta" if entry["changed"] else "unchanged")
            line |= {
                "numel": stored.deltas[name].spec.numel,
                "changed": entry["changed"],
                "norm": entry["norm"],
            }
            line |= {"codec": entry["codec"], "nbytes": stored.deltas[name].nbytes}
            line |= {"exceptions": result.exceptions, "replacements": result.replacements}
            report.ledger.append(line | {"unrestored": result.unrestored})
        else:
            status = "differs" if result.mismatches else "equal"
            report.ledger.append(job_line(result.job, status))
    report.ledger += plan.ledger
    numel = sum(line["numel"] for line in report.ledger if "numel" in line)
    changed = sum(line["changed"] for line in report.ledger if "changed" in line)
    report.facts |= {
        "nbytes": sum(file_nbytes(file) for file in stored.files),
        "files": [os.path.basename(file) for file in stored.files],
        "codecs": dict(Counter(entry["codec"] for entry in entries.values())),
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": sum(entry["norm"] ** 2 for entry in entries.values()) ** 0.5,
        "exactness": manifest["exactness"],
        "is_whole": not manifest["excluded"] and manifest.get("rows", "strict") == "strict",
    }
    if not changed:
        why = (
            "its adapter adds nothing: B is zero" if not manifest["tuned"] else "TUNED equals BASE"
        )
        why = {"combine": "its vectors are, or cancel out", "import-patch": "its patch changes none"
               }.get(plan.verb, why)  # fmt: skip
        report.warnings.append(zero_warning(why))
    if manifest["differing"]:
        report.warnings.append(
            "integer or bool tensors differ and are not transferred:\n"
            + up_to_five(manifest["differing"])
        )
    sides = [
        (entry["base"][0], entry["tuned"][0])
        for entry in entries.values() if entry["base"] and entry["tuned"]
    ]  # fmt: skip
    mixed = sorted({tuned for base, tuned in sides if tuned != base})
    if mixed:
        report.warnings.append(
            f"tuned is {'+'.join(mixed)} where base is not: tuned comes back when the vector is"
            " applied to base with --dtype of the tuned model"
        )
    stored_results = [result for result in results if isinstance(result.job, StoreJob)]
    report.warnings += rounding_warning(stored_results, 0)
    tell_nonfinite(report, results)
