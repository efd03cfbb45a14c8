"""import-patch and export-patch: changed values of the exact base, in and out."""

import os
from typing import Any

from skillvec.checkpoints.align import in_memory
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import reopen
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.jobs.list import ListJob
from skillvec.engine.outputs import PathLike, output_vector, writing_patch
from skillvec.engine.plan import JobResult
from skillvec.engine.plan_vectors import plan_patch
from skillvec.engine.run import Run
from skillvec.engine.runner import run_plan, show_plan
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.report import Report, Watcher
from skillvec.vectors.vector import SkillVector
from skillvec.verbs._save import save
from skillvec.verbs.findings import refuse_nonfinite, tell_nonfinite, tell_resumed


def import_patch(
    patch: PathLike,
    base: PathLike | Checkpoint,
    output: PathLike,
    **options: Any,
) -> SkillVector:
    """Make a vector of a patch: changed values of the exact base, as RL stacks send them.

    `patch` is a safetensors file, or a folder of several, of any form that `export_patch` writes;
    which one, the file tells. Positions are flat, of the tensors of `base` or of those that
    transformers makes of them in memory; what is not listed did not change. The vector is stored at
    `output`; `options` are those of SkillVector.save.

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
    """Write the values that `vector` + base changes, under the base's names and in its dtypes.

    `names` are those of the base's `files`, or of the model that transformers makes of them in
    `memory`. `form` is `lists` (NAME.indices, NAME.values), `vllm` (the same, with what vLLM's
    weight transfer is told in the header) or `verl` (__delta_spec__, __positions__, __values__).
    `output` is a safetensors file. Raises IncompatibleError unless `base` (where it was, if not
    given) is the vector's exact base, on which alone such a list holds, and where the form cannot
    carry a tensor; NonfiniteError where NaN or infinities would be listed, unless
    `allow_nonfinite`, and for NaN in a form that cannot carry it.
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
    tell_resumed(report, stage)
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
