"""Which opener takes what lies at a place: one table, in order.

A new format is one file, which offers a test by names and a function from `Found` to `Opened`, and
one row of OPENERS. What takes nothing, and is refused with advice, has rows too.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from skillvec.checkpoints import dcp, fsdp, torch_files, zero
from skillvec.checkpoints.adapter_folder import find_value_heads, is_adapter
from skillvec.checkpoints.folder import (
    GGUF,
    INDEX,
    SINGLE,
    VECTOR_INDEX,
    find_inside,
    find_steps,
    is_listed,
    list_shards,
    read_index,
)
from skillvec.checkpoints.opened import PICKLED, SAFETENSORS, Found, Opened, Opener
from skillvec.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    SkillvecError,
    UsageError,
    up_to_five,
    up_to_five_each,
)
from skillvec.files.file import Place
from skillvec.files.header import Header, read_header
from skillvec.files.tensors import Source

# what calls a file a part: `i-of-N`, which is whole where N is 1, and files of ranks
PART = re.compile(
    r"-of-(\d{1,9})\b|^(?:model[-_.])?(?:rank|shard|part|tp|pp)[-_]?\d+(?=[-_.])"
    r"|(?:^|_)[mtp]p_rank_\d|^consolidated\.\d"
)
FOREIGN = {
    ".h5": "TensorFlow weights: load them with transformers (from_tf=True), then save_pretrained",
    ".msgpack": "Flax weights: load them with transformers (from_flax=True), then save_pretrained",
    ".onnx": "an ONNX graph for inference: use the checkpoint that it was exported from",
    ".npz": "numpy arrays: save them by safetensors.numpy.save_file under the model's names",
    ".nemo": "a NeMo archive: export it to Hugging Face format with NeMo first",
}


def open_place(place: Place, what: str) -> Opened:
    """Return what lies at a place, opened by the first row that takes it; errors as of `Opener`."""
    found = look_at(place, what)
    for opener in OPENERS:
        if opener.takes(found):
            return opener.open(found)
    if found.is_file:  # of any other name: the header says what it is
        return open_safetensors(found)
    raise refuse_folder(found, place)


def look_at(place: Place, what: str) -> Found:
    """Return what lies at a place: a file under the name it is given by, or what a folder holds.

    An adapter's files are left out where a model lies beside it, and everything else otherwise.
    """
    if place.member is not None or not place.path.is_dir():
        given, address = place.ref, os.fspath(place.path)
        if place.member is not None:
            given, address = place.member, place.files[place.member]
        name = Path(given).name  # a link leads to blobs named by hash, whose names tell nothing
        return Found(what, {name: address}, [name], is_file=True, notes=note_part(name))
    names = sorted(name for name in place.files if "/" not in name)
    notes = note_finer(place.files)
    if ADAPTER_CONFIG in place.files:
        own = [name for name in names if name in ADAPTER_WEIGHTS]
        adapter = own and is_adapter(place)
        names = own if adapter else [name for name in names if name not in own]
        beside = find_value_heads(place) if adapter else []
        notes += tuple(f"{name}: a head of values beside the adapter, left out" for name in beside)
    folder = None if is_listed(place) else place.path
    return Found(what, place.files, names, folder, notes=notes)


def note_part(name: str) -> tuple[str, ...]:
    """Return a note where the name of a file says that it is a part of a model."""
    found = PART.search(name)
    if found is None or (found[1] and int(found[1]) < 2):
        return ()
    return (f"{name}: by its name one part of several: what lies in the others is left out",)


def note_finer(files: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note where a trainer kept fp32 weights beside those that it rounded."""
    return tuple(
        f"{name}/ holds DeepSpeed's fp32 weights, which keep what this model's dtype rounds away:"
        " name that folder to read them"
        for name in find_steps(files)[-1:]
    )


# ------------------------------------------------------------------------------------ safetensors


def has_safetensors(found: Found) -> bool:
    return INDEX in found.files or SINGLE in found.files or bool(found.ending(".safetensors"))


def open_safetensors(found: Found) -> Opened:
    """Open one file, the shards of an index, or the files of ranks."""
    files, what = found.files, found.what
    if not found.is_file and INDEX in files:
        weight_map, _ = read_index(files[INDEX])
        if SINGLE in files and SINGLE not in weight_map.values():
            raise FormatError(f"{what}: holds both {SINGLE} and {INDEX} over other files: which?")
        return open_indexed(found, weight_map)
    names = found.ending(".safetensors")
    names = found.names if found.is_file else [SINGLE] if SINGLE in files else names
    headers = {name: read_header(files[name]) for name in names}
    opened = put_together(headers, what, found.notes if len(names) == 1 else ())
    if len(names) == 1:
        if note_part(names[0]) and not found.is_file:
            raise FormatError(
                f"{what}: {names[0]} alone, by its name one part of several, and no {INDEX}: copy"
                " or download the model whole; if this part is what is meant, name the file"
            )
    elif opened.is_safetensors:
        also = f" {ADAPTER_CONFIG} lies there too: an adapter is" if ADAPTER_CONFIG in files else ""
        also = also and f"{also} used where no model is beside {ADAPTER_WEIGHTS[0]}."
        raise FormatError(
            f"{what}: {len(names)} safetensors files and no {INDEX}: which tensors are the model?"
            f"{also} If one of the files is meant, name it:\n{up_to_five(names)}"
        )
    return opened


def put_together(headers: Mapping[str, Header], what: str, notes: tuple[str, ...] = ()) -> Opened:
    """Return what safetensors files hold, by name: tensors, or the parts of ranks put together."""
    metadata = next(iter(headers.values())).metadata
    if dcp.is_of_ranks(headers):
        made = dcp.join_files(headers, what)
        metadata = {key: said for key, said in metadata.items() if not key.startswith("DCP_")}
        return replace(made, metadata=metadata, notes=(*notes, *made.notes))
    tensors: dict[str, Source] = {}
    labels: dict[str, dict[str, str]] = {}
    for header in headers.values():
        tensors |= header.tensors
        labels |= {spec.path: header.metadata for spec in header.tensors.values()}
    return Opened(tensors, metadata, notes=notes, labels=labels)


def open_indexed(found: Found, weight_map: Mapping[str, str]) -> Opened:
    """Open the shards that an index lists, which have to hold what it says and nothing else."""
    files, what = found.files, found.what
    headers = {name: read_header(files[name]) for name in list_shards(files, weight_map, what)}
    opened = put_together(headers, what, found.notes)
    problems = defaultdict(list)
    for file, header in headers.items():
        for name in header.tensors:
            apart = name in weight_map and not opened.is_safetensors  # in the file of each rank
            if weight_map.get(name) == file or apart:
                continue
            said = weight_map.get(name, "not in the index")
            kind = "of another file" if name in weight_map else said
            problems[kind].append(f"{name}: found in {file}, index: {said}")
    for name, file in weight_map.items():
        if name not in opened.tensors:
            problems["not in the shards"].append(f"{name}: not in {file}")
    if problems:
        raise FormatError(f"{what}: index and shards disagree:\n{up_to_five_each(problems)}")
    return opened


# ------------------------------------------------------------------------------- what is refused


def has_vector(found: Found) -> bool:
    return VECTOR_INDEX in found.files


def refuse_vector(found: Found) -> Opened:
    raise IncompatibleError(f"{found.what}: this is a skill vector, expected a model")


def has_foreign(found: Found) -> bool:
    return any(Path(name).suffix in FOREIGN for name in found.names)


def refuse_foreign(found: Found) -> Opened:
    name = next(name for name in found.names if Path(name).suffix in FOREIGN)
    also = "" if found.is_file else f"no safetensors, but {name}: "
    raise IncompatibleError(f"{found.what}: {also}{FOREIGN[Path(name).suffix]}")


def refuse_folder(found: Found, place: Place) -> SkillvecError:
    """Return the error of a folder that no row takes: what is in it, and what to name instead."""
    what = found.what
    inner = [f"{name}/: {kind}" for name, kind in find_inside(place)]
    if inner:
        return UsageError(
            f"{what}: no {SINGLE} and no {INDEX} in this folder; "
            + ("download and name" if is_listed(place) else "name")
            + f" the one in it that is meant:\n{up_to_five(inner)}"
        )
    if ADAPTER_CONFIG in found.files:
        return UsageError(f"{what}: {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS[0]} beside it")
    if held := found.ending(*torch_files.SUFFIXES):
        return IncompatibleError(f"{what}: no {SINGLE}, but {held[0]}: name the file that is meant")
    return UsageError(f"{what}: no {SINGLE} and no {INDEX} in this folder")


# -------------------------------------------------------------------------------------- the table


def has_gguf(found: Found) -> bool:
    return bool(found.ending(GGUF))


def open_gguf(found: Found) -> Opened:
    from skillvec.checkpoints.gguf import open_gguf  # with the layouts of transformers

    return open_gguf(found)


OPENERS = (
    Opener("skill vector", (), has_vector, refuse_vector),
    Opener(SAFETENSORS, (".safetensors",), has_safetensors, open_safetensors),
    Opener("FSDP rank files", (), fsdp.has_rank_files, fsdp.open_rank_files),
    Opener("torch.distributed.checkpoint", (), dcp.has_dcp, dcp.open_dcp),
    Opener("DeepSpeed ZeRO", (), zero.has_zero, zero.open_zero),
    Opener("FSDP full state dict", (), fsdp.has_fsdp, fsdp.open_fsdp),
    Opener(PICKLED, torch_files.SUFFIXES, torch_files.has_pickles, torch_files.open_pickled),
    Opener("GGUF", (GGUF,), has_gguf, open_gguf),
    Opener("other frameworks", tuple(FOREIGN), has_foreign, refuse_foreign),
)
# how names of files end, not of repositories
SUFFIXES = frozenset(suffix for opener in OPENERS for suffix in opener.suffixes)
