"""The content of a model in one digest: of its tensors alone, wherever and in which order they lie.

Every byte is read once, by the engine that all runs have. Of stored vectors the manifest knows the
digests of what was subtracted, so that of the whole is known without reading.
"""

from collections.abc import Mapping
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint, family_of
from skillvec.checkpoints.fingerprint import content_digest
from skillvec.engine.jobs.copy import CopyJob
from skillvec.engine.plan import Plan
from skillvec.engine.run import Run
from skillvec.engine.runner import run_plan
from skillvec.files.tensors import as_integers
from skillvec.report import Report

SIDES = ("base", "tuned")


def add_digests(report: Report, model: Checkpoint, run: Run) -> None:
    """Add the digest of a model's content to a report on it, and that of each tensor to its line.

    Tensors are those that the lines name, as they are stored: quantised ones are not dequantised.
    """
    sources = {name: as_integers(spec) for name, spec in model.items()}
    jobs = [CopyJob(name, source.numel, point=source) for name, source in sources.items()]
    results = run_plan(Plan("inspect", jobs), run)
    digests = {result.job.name: result.digests["point"] for result in results}
    for line in report.ledger:
        line["digest"] = digests[line["name"]]
    rows = ((name, spec.dtype, spec.shape, digests[name]) for name, spec in model.items())
    report.facts |= {
        "digest": content_digest(rows),
        "engine": run.engine.name,
        "workers": max(run.engine.workers, 1),
        "nbytes_read": sum(job.nbytes_read for job in jobs),
    }


def known_digests(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the digests of base and tuned that a vector's manifest tells, None where it does not.

    It does where it names every tensor of that side: none left out, none tied, none of integers.
    """
    found: dict[str, str | None] = dict.fromkeys(SIDES)
    entries = manifest["tensors"].items()
    shapes = [(name, entry["shape"]) for name, entry in entries]
    for side in SIDES:
        if manifest[side] is None or manifest[side]["family"] != family_of(shapes):
            continue
        if all(entry[side] for _, entry in entries):
            found[side] = content_digest(
                (name, entry[side][0], entry["shape"], entry[side][1]) for name, entry in entries
            )
    return found
