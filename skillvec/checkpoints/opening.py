"""Opening checkpoints: as tensors, and as a model all of whose weights are there."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from skillvec.checkpoints.adapter_folder import FACTOR, is_adapter
from skillvec.checkpoints.checkpoint import METADATA_KEY, QUANTO, Checkpoint
from skillvec.checkpoints.folder import STEP, find_inside, find_steps, read_json
from skillvec.checkpoints.locate import locate, relocate
from skillvec.checkpoints.opened_by import open_place
from skillvec.checkpoints.quantized import dequantised
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.checkpoints.unread import LeftOut, nothing_left_out, unexplained
from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.files.file import Place
from skillvec.files.fingerprints import refuse_stale, witnessed
from skillvec.files.tensors import Source, files_of
from skillvec.ops.kernels import FLOATS

LORA_META = "lora_train_meta.json"  # of verl: the rank and alpha of a run
NOT_TEXT = re.compile("[\ud800-\udfff]")  # lone surrogates, which no file can hold


def open_checkpoint(
    ref: str | os.PathLike[str] | Place | Checkpoint,
    role: str = "model",
    left_out: LeftOut = nothing_left_out,
) -> Checkpoint:
    """Open a model: a folder or file of this disk, or a reference to the Hub (docs/checkpoints.md).

    What `ref` leads to is a mapping from names to where tensors lie, with their dtypes and shapes;
    headers alone are read, quantised weights are dequantised when they are read. `role` names the
    input in errors. Tensors of a dtype that is not taken, and weights of integers that no config
    explains, are refused unless `left_out` says of each that it will not be used. Raises UsageError
    for a path that is not there, FormatError for a broken file, IncompatibleError for what is not
    taken.
    """
    if isinstance(ref, Checkpoint):
        refuse_stale(ref.opened.seen)
        return ref
    return as_model(open_tensors(ref, role), role, left_out)


def as_model(opened: Checkpoint, role: str, left_out: LeftOut = nothing_left_out) -> Checkpoint:
    """Return what was opened as a model, or refuse what is none; quantised weights are read plain.

    `left_out` and errors as of `open_checkpoint`.
    """
    if kind_of_file(opened.metadata) in ("vector", "vector shard"):
        raise IncompatibleError(f"{role} {opened.ref}: this is a skill vector, expected a model")
    if is_adapter(opened.place):
        raise IncompatibleError(
            f"{role} {opened.ref}: this is a PEFT adapter, a displacement and no model: use it in"
            " place of a vector, or as the TUNED of diff with its base model as BASE"
        )
    if ADAPTER_CONFIG in opened.place.files and opened.place.member is None:
        opened = _noting(
            opened,
            f"{ADAPTER_CONFIG} beside the weights: these are read as they are, and the adapter is"
            " not added, which from_pretrained does where PEFT is installed",
        )
    empty = find_placeholders(opened)
    weights = [opened[name].shape for name in opened if name.endswith(".weight")]
    if (0,) in weights and (2 * weights.count((0,)) > len(weights) or max(map(len, weights)) < 2):
        raise IncompatibleError(f"{role} {explain_placeholders(opened, empty)}")
    if empty:
        note = f"{len(empty)} tensors are empty ([0]), such as {empty[0]}: are they meant to be?"
        opened = _noting(opened, note)
    headers = {key: said for file in opened.opened.labels.values() for key, said in file.items()}
    config, what = opened.config, f"{role} {opened.ref}"
    if opened.is_folder and QUANTO in opened.place.files and "quantization_config" not in config:
        said = {"quant_method": "quanto", "map": read_json(opened.place.files[QUANTO])}
        config = config | {"quantization_config": said}

    def shapes() -> dict[str, tuple[int, ...]]:
        from skillvec.checkpoints.model_classes import shapes_of

        return shapes_of(opened.config, len(opened)) or {}

    tensors, formats = dequantised(opened, config, what, left_out, headers, shapes)
    model = opened.with_tensors(tensors, formats) if formats else opened
    unread = list(unexplained(tensors))
    if not unread:
        return model
    return _noting(
        model,
        f"{len(unread)} tensors stay as they are, because no config says how to read them, such as"
        f" {unread[0]}; scales that their method folded into other tensors are not undone",
    )


def _noting(model: Checkpoint, note: str) -> Checkpoint:
    """Return a model with one more note."""
    opened = replace(model.opened, notes=(*model.opened.notes, note))
    return Checkpoint(model.place, opened, model.formats)


def find_placeholders(model: Mapping[str, Source]) -> list[str]:
    """Return the names of floating-point tensors of shape [0], which stand for weights elsewhere.

    ZeRO-3 leaves them in a state dict that was not gathered.
    """
    return [name for name, spec in model.items() if spec.shape == (0,) and spec.dtype in FLOATS]


def explain_placeholders(opened: Checkpoint, names: Sequence[str]) -> str:
    """Return what to say of a checkpoint whose weights are placeholders, and where they may be."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    steps = find_steps([*os.listdir(folder), *opened.place.files])
    if not steps and not STEP.match(folder.name):  # of an adapter in a folder below the run's
        steps = [f"../{name}" for name in find_steps(os.listdir(folder.parent))]
    if is_adapter(opened.place) and steps:
        where = f"lie in {steps[-1]}/: copy {ADAPTER_CONFIG} into it and name that folder"
    elif steps or folder.name.startswith("global_step"):
        where = f"lie in {steps[-1] if steps else folder.name}/: name that folder"
    else:
        where = "lie in the global_step folder of the run: name that, or save them again, gathered"
    return (
        f"{opened.ref}: {len(names)} of {len(opened)} tensors are empty, as DeepSpeed's ZeRO-3"
        " leaves them where weights are saved without being gathered"
        f" (stage3_gather_16bit_weights_on_model_save); the weights {where}:\n"
        + up_to_five([f"{name}: {opened[name].dtype} [0]" for name in names])
    )


def explain_factors(model: Checkpoint, names: Iterable[str]) -> str | None:
    """Return what to say where some of the `names` of a model are factors of LoRA, else None."""
    factors = [name for name in names if re.search(FACTOR, name)]
    if not factors:
        return None
    inner = [name for name, kind in find_inside(model.place) if kind == "a PEFT adapter"]
    saved = f" (name {inner[0]}/, which holds an adapter)" if inner else ""
    said = f" ({LORA_META} beside them says both)" if LORA_META in model.place.files else ""
    return (
        f"{model.ref}: factors of LoRA, which are no weights of a model, and no {ADAPTER_CONFIG}"
        f" beside them, without which nobody knows how they are scaled: put it there, with the rank"
        f" (r) and lora_alpha of the training{said}, or take the adapter that PEFT saved{saved}:\n"
        f"{up_to_five(factors)}"
    )


def kind_of_file(metadata: Mapping[str, Any]) -> str | None:
    """Return what skillvec wrote: "vector", "vector shard", "merged"; None for files of others."""
    text = metadata.get(METADATA_KEY, "null")
    begin = '{"kind":"vector",'  # as manifests are written: those of many tensors are long
    if type(text) is str and text[: len(begin)] == begin and text.count('"kind"') == 1:
        return "vector"
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        return None
    kind = entry.get("kind") if isinstance(entry, dict) else None
    return kind if isinstance(kind, str) else None


def reopen(
    given: str | os.PathLike[str] | Checkpoint | None,
    ref: str,
    role: str,
    left_out: LeftOut = nothing_left_out,
) -> Checkpoint:
    """Open the model that is given, else the one that a record names; errors as of `relocate`."""
    place = relocate(ref, role, f"--{role}") if given is None else given
    return open_checkpoint(place, role, left_out)


def open_tensors(ref: str | os.PathLike[str] | Place, role: str) -> Checkpoint:
    """Open files of any meaning: a model, an adapter or a vector; nothing is dequantised."""
    place = ref if isinstance(ref, Place) else locate(ref, role)
    what = f"{role} {place.ref}"
    opened = open_place(place, what)
    if not opened.is_safetensors:  # a pickle may call a tensor what no header can
        for name in opened.tensors:
            if type(name) is not str or name == "__metadata__" or NOT_TEXT.search(name):
                raise FormatError(f"{what}: a tensor is called {name!r:.80}, which is no name")
    files = {path for spec in opened.tensors.values() for path in files_of(spec)}
    return Checkpoint(place, replace(opened, seen=witnessed(files)), opened.formats)
