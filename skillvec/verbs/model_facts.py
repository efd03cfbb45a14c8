"""What inspect says of files of weights that are no vector: a model, an adapter or a patch.

From headers and the small JSON files beside them alone.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from skillvec.checkpoints.adapter_folder import is_adapter
from skillvec.checkpoints.checkpoint import METADATA_KEY, Checkpoint
from skillvec.checkpoints.folder import read_json
from skillvec.checkpoints.opening import as_model
from skillvec.checkpoints.patch import form_of
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.errors import FormatError, IncompatibleError, UsageError, printable
from skillvec.files.file import shown
from skillvec.ops.kernels import FLOATS
from skillvec.report import Report
from skillvec.vectors.displacement import ledger_line
from skillvec.vectors.provenance import read_merged

NO_WEIGHT = "not a weight"  # how notes on tensors begin that are none


def describe_weights(opened: Checkpoint) -> Report:
    """Return what inspect says of a model, an adapter or a patch."""
    report = Report("inspect", {"path": shown(opened.ref, opened.path), "nbytes": opened.nbytes})
    facts, adapter = report.facts, is_adapter(opened.place)
    facts |= {
        "kind": "adapter" if adapter else "model",
        "format": opened.format,
        "notes": list(opened.opened.notes),
        "files": [os.path.basename(file) for file in opened.files],
        "numel": sum(spec.numel for spec in opened.values()),
        "dtypes": opened.dtypes,
        "model_type": opened.model_type,
        "architecture": _architecture_of(opened),
        "ties_embeddings": None,
        "config_digest": opened.config_digest,
        "tokenizer_digest": opened.tokenizer_digest,
        "family_digest": opened.family_digest,
    }
    if form := form_of(opened, opened.metadata):
        facts |= {"kind": "patch", "form": form}
    if METADATA_KEY in opened.metadata:
        with contextlib.suppress(UsageError):
            facts["recipe"] = read_merged(opened)
    notes: Mapping[str, str] = {}
    if facts["kind"] == "model":
        notes = _describe_model(opened, report)
    elif adapter:
        facts["adapter"] = _describe_adapter(opened)
    for spec in opened.values():
        line = ledger_line(spec, "stored", notes.get(spec.name, ""))
        report.ledger.append(line | {"nbytes": spec.nbytes})
    return report


def _describe_model(opened: Checkpoint, report: Report) -> Mapping[str, str]:
    """Add what is said of models alone; return how tensors are stored, where they are not plain."""
    facts = report.facts
    facts |= {"parameters": None, "quantised": {}}
    try:
        facts["ties_embeddings"] = opened.tied_in_transformers if opened.config else None
    except UsageError as error:  # without transformers it is unknown
        report.warnings.append(str(error))
    try:
        model = as_model(opened, "input")
    except (IncompatibleError, FormatError, UsageError) as error:  # described all the same
        report.warnings.append(str(error))
        return {}
    facts["parameters"] = sum(spec.numel for spec in model.values() if spec.dtype in FLOATS)
    schemes = Counter(note for note in model.formats.values() if not note.startswith(NO_WEIGHT))
    facts["quantised"] = dict(sorted(schemes.items()))
    return model.formats


def _architecture_of(opened: Checkpoint) -> str | None:
    """Return the class of transformers that config.json names."""
    names = opened.config.get("architectures")
    named = isinstance(names, list) and names and isinstance(names[0], str)
    return printable(names[0])[:100] if named else None


def _describe_adapter(opened: Checkpoint) -> dict[str, Any]:
    """Return what adapter_config.json says of an adapter, None where it does not; unchecked."""
    said = read_json(opened.place.files[ADAPTER_CONFIG])

    def taken(key: str, kind: type) -> Any:
        value = said.get(key)
        value = printable(value)[:300] if isinstance(value, str) else value
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    return {
        "method": taken("peft_type", str),
        "rank": taken("r", int),
        "alpha": taken("lora_alpha", int | float),  # type: ignore[arg-type]
        "base": taken("base_model_name_or_path", str),
    }
