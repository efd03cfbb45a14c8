"""inspect: what headers say of a model or a vector."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Mapping
from math import hypot

from skillvec.checkpoints.adapter_folder import is_adapter
from skillvec.checkpoints.checkpoint import METADATA_KEY, Checkpoint
from skillvec.checkpoints.locate import locate
from skillvec.checkpoints.opening import as_model, open_checkpoint, open_tensors
from skillvec.checkpoints.patch import form_of
from skillvec.engine.outputs import PathLike
from skillvec.errors import FormatError, IncompatibleError, UsageError
from skillvec.files.file import shown
from skillvec.ops.names import NO_LAYER, layer_of
from skillvec.report import Report
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.match import match, to_layout, verdict_on
from skillvec.vectors.provenance import read_merged
from skillvec.vectors.reader import find_vector
from skillvec.vectors.vector import SkillVector, StoredVector


def inspect(path: PathLike, target: PathLike | Checkpoint | None = None) -> Report:
    """Describe the model or vector at `path` from its headers alone; no tensor is read.

    Of a vector with `target`, a model, give the verdict on that model. The report's ledger has a
    line for every tensor. Raises IncompatibleError where the vector does not fit, FormatError for a
    broken file, UsageError for a path that is not there.
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
    }
    return report
