"""inspect: what headers say of a model or a vector."""

import os
from collections import defaultdict
from math import hypot

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.locate import locate
from skillvec.checkpoints.opening import open_checkpoint, open_tensors
from skillvec.engine.outputs import PathLike
from skillvec.engine.run import Run
from skillvec.errors import UsageError
from skillvec.files.file import shown
from skillvec.ops.names import NO_LAYER, layer_of
from skillvec.report import Report, Watcher
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.match import match, to_layout, verdict_on
from skillvec.vectors.reader import find_vector
from skillvec.vectors.vector import SkillVector, StoredVector
from skillvec.verbs.content import add_digests, known_digests
from skillvec.verbs.model_facts import describe_weights
from skillvec.verbs.other_folders import describe_folder, find_unfinished


def inspect(
    path: PathLike,
    target: PathLike | Checkpoint | None = None,
    *,
    digest: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Describe what lies at `path`, from headers alone: a model, a vector, a folder of others.

    Of a vector with `target`, a model, give the verdict on that model. With `digest`, read every
    byte of a model's tensors, by `engine` and `workers`, and add the digest of its content. The
    report's ledger has a line for every tensor. Raises IncompatibleError where the vector does not
    fit, FormatError for a broken file, UsageError for a path that is not there.
    """
    run = Run.by(engine, workers, watcher=watcher)
    place = locate(find_unfinished(path), "input")
    stored = find_vector(place)
    if stored is not None:
        if digest:
            raise UsageError(
                f"{stored.ref} is a vector: its manifest has the digests of all that it is made of,"
                " which `verify` holds against the bytes; digest is of models"
            )
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
    other = describe_folder(place)
    if target is not None:
        what = "a model" if other is None else "no vector"
        raise UsageError(f"{place.ref} is {what}: only a vector has a verdict on a target")
    if other is not None:
        if digest:
            raise UsageError(f"{place.ref}: no model at its top, and digest is of models")
        return other
    opened = open_tensors(place, "input")
    report = describe_weights(opened)
    if digest:
        add_digests(report, opened, run)
    return report


def describe_vector(vector: StoredVector) -> Report:
    """Return what inspect says of a stored vector."""
    stored, manifest = vector.stored, vector.manifest
    report = Report("inspect", {"path": shown(stored.ref, stored.path), "nbytes": stored.nbytes})
    facts, entries = report.facts, manifest["tensors"]
    facts["kind"] = "vector"
    for key in ("schema", "tool", "command", "formula", "identity", "dtype", "codec", "exactness",
                "base", "tuned", "parents", "recipe", "training", "license", "tied", "excluded",
                "differing"):  # fmt: skip
        facts[key] = manifest.get(key)
    facts |= {"untied": vector.untied} if vector.untied else {}
    facts |= {"kept": manifest["kept"]} if "kept" in manifest else {}
    report.warnings += vector.warnings
    numel = sum(delta.spec.numel for delta in stored.deltas.values())
    changed = sum(entry["changed"] for entry in entries.values())
    codecs: dict[str, dict[str, int]] = {}
    layers: dict[str, float] = defaultdict(float)
    for name, delta in stored.deltas.items():
        entry = entries[name]
        held = codecs.setdefault(delta.codec, {"tensors": 0, "nbytes": 0})
        held["tensors"] += 1
        held["nbytes"] += delta.nbytes
        layers[layer_of(name) or NO_LAYER] += entry["norm"] ** 2
        line = ledger_line(delta.spec, "delta") | {"codec": delta.codec, "nbytes": delta.nbytes}
        line |= {"numel": delta.spec.numel, "changed": entry["changed"], "norm": entry["norm"]}
        report.ledger.append(line)
    report.ledger += [{"name": name, "status": "equal"} for name in manifest["equal"]]
    largest = sorted(layers.items(), key=lambda item: -item[1])
    facts |= {
        "files": [os.path.basename(file) for file in stored.files],
        "lineage": vector.dtypes,
        "nonfinite": sum(vector.nonfinite().values()),
        "numel": numel,
        "changed": changed,
        "density": changed / numel if numel else 0.0,
        "norm": hypot(*(entry["norm"] for entry in entries.values())),
        "codecs": codecs,
        "layers": [{"name": name, "norm": sq**0.5} for name, sq in largest],
        "content": known_digests(manifest),
    }
    return report
