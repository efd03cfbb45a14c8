"""torch.distributed.checkpoint: folders of .metadata and .distcp, and safetensors of its ranks.

Optimizer state is left out and counted in notes. Refused by name: compressed streams, a file that
is missing. The safetensors are those that its HuggingFaceStorageWriter leaves of each rank.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skillvec.checkpoints.opened import Found, Opened
from skillvec.checkpoints.parts import as_shape, assemble, find_side, of_training
from skillvec.checkpoints.pickles import (
    ADVICE,
    MAX_PICKLE_NBYTES,
    Record,
    Stored,
    brief,
    load_pickle,
)
from skillvec.checkpoints.torch_files import WRAPPERS, load_archive
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, up_to_five
from skillvec.files.file import is_plain_name, read_bytes
from skillvec.files.header import ITEMSIZE, Header, refuse_duplicates
from skillvec.files.tensors import Source
from skillvec.files.views import Index, row_major

SHARDING = "DCP_SHARDING_INFO"  # header metadata: where in its tensor each part of a file begins
WHOLE = "model.safetensors"
SHARD_FILE = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")  # by rank, from 1 on
OPTIMIZERS = ("optimizer", "optim", "optimizers", "lr_scheduler", "scheduler", "dataloader")


def _dcp_folders(folder: Path) -> list[Path]:
    """Return the folder, or accelerate's folders of models in it, where a .metadata lies."""
    inner = sorted(folder.glob("pytorch_model_fsdp_*/.metadata"))
    return [file.parent for file in (folder / ".metadata", *inner) if file.is_file()]


def has_dcp(found: Found) -> bool:
    if found.folder is None:
        return False
    return bool(_dcp_folders(found.folder)) or any(n.endswith(".distcp") for n in found.files)


@of_training
def open_dcp(folder: Path, what: str) -> Opened:
    """Open a folder of .metadata and .distcp files, or accelerate's folder around one."""
    inner = _dcp_folders(folder)
    if len(inner) != 1:
        found = [path.name for path in inner] or ["*.distcp without .metadata: saved to the end?"]
        raise IncompatibleError(f"{folder}: expected one checkpoint, found:\n{up_to_five(found)}")
    file = os.fspath(inner[0] / ".metadata")
    metadata = load_pickle(read_bytes(file, 0, MAX_PICKLE_NBYTES + 1), file)
    entries: dict[str, Record] = metadata.get("state_dict_metadata")
    planned = metadata.get("planner_data")
    places = {}
    for index, info in metadata.get("storage_data").items():
        offset = index.state.get("offset")
        places[index.get("fqn"), None if offset is None else as_shape(offset)] = info
    paths = {
        fqn: _path(planned[fqn]) if isinstance(planned, dict) else (fqn,)
        for fqn, entry in entries.items()
        if entry.name.endswith(".TensorStorageMetadata")
    }
    notes = []
    if len(paths) < len(entries):
        notes.append(f"{len(entries) - len(paths)} entries that are no tensors left out")
    tensors: dict[str, Source] = {}
    for fqn, name in _model_of(paths, notes).items():
        shape, parts = as_shape(entries[fqn].get("size")), []
        for chunk in entries[fqn].get("chunks"):
            offset, sizes = as_shape(chunk.get("offsets")), as_shape(chunk.get("sizes"))
            info = places.get((fqn, offset)) or places[fqn, None]
            parts.append((offset, _chunk(inner[0], info, fqn, sizes)))
        if name in tensors:
            raise FormatError(f"{file}: two tensors called {name!r}")
        tensors[name] = assemble(name, shape, parts)
    side = find_side(folder, folder / "huggingface", inner[0])
    return Opened(tensors, format="torch.distributed.checkpoint", side=side, notes=tuple(notes))


def _path(keys: Any) -> tuple[str, ...]:
    """Return where in the state dict a tensor was: keys of dicts and places in lists, checked."""
    if any(type(key) not in (str, int) for key in keys):
        raise FormatError(f"not a path of a state dict: {brief(keys)}")
    return tuple(map(str, keys))


def _model_of(paths: dict[str, tuple[str, ...]], notes: list[str]) -> dict[str, str]:
    """Return fqn -> name of the model's tensors; add to notes what is left out."""
    while True:
        heads = {path[0] for path in paths.values() if len(path) > 1}
        roots = [head for head in ("app", *WRAPPERS) if head in heads]
        if len(roots) > 1:
            raise IncompatibleError(f"which of {roots} is the model? {ADVICE}")
        left = {
            fqn: path[0]
            for fqn, path in paths.items()
            if (path[0] not in roots or len(path) == 1 if roots else path[0] in OPTIMIZERS)
        }
        counts = Counter(left.values()).items()
        notes += [f"{head}: {count} tensors left out" for head, count in counts]
        paths = {fqn: path[len(roots) :] for fqn, path in paths.items() if fqn not in left}
        if not paths:
            raise IncompatibleError(f"no model beside other state:\n{up_to_five(notes)}")
        if not roots:
            return {fqn: ".".join(path) for fqn, path in paths.items()}


def _chunk(folder: Path, info: Record, name: str, sizes: Index) -> Stored:
    """Return the address of one chunk, an archive of torch.save of its own in a .distcp file."""
    file, transforms = info.get("relative_path"), info.state.get("transform_descriptors")
    if not is_plain_name(file):
        raise FormatError(f"tensor {name!r} is said to lie in {brief(file)}, no plain file name")
    if transforms:
        raise IncompatibleError(f"tensor {name!r} is stored through {brief(transforms)}: {ADVICE}")
    begin, nbytes = as_shape((info.get("offset"), info.get("length")))
    path = os.fspath(folder / file)
    if not os.path.isfile(path):
        raise FormatError(f"{folder}: {file} is missing (tensor {name!r})")
    stored = load_archive(path, begin, nbytes)
    if not isinstance(stored, Stored) or stored.shape != sizes:
        raise FormatError(f"{path}: expected a part of {list(sizes)} of {name!r} at byte {begin}")
    return stored


# ------------------------------------------------- safetensors of HuggingFaceStorageWriter


def is_of_ranks(headers: Mapping[str, Header]) -> bool:
    """Return whether files, by name, hold parts of tensors: shards that a rank wrote."""
    found = {name: header for name, header in headers.items() if SHARDING in header.metadata}
    return any(
        SHARD_FILE.fullmatch(name) or any(map(any, read_offsets(name, header).values()))
        for name, header in found.items()
    )


def join_files(headers: Mapping[str, Header], what: str) -> Opened:
    """Return the model that safetensors files of ranks hold together, by the offsets they name.

    `what` names the model in errors. How many ranks there were stands nowhere: the first one's
    shard alone is refused, a rank between others shows as a gap. Raises FormatError,
    IncompatibleError.
    """
    other = [name for name, header in headers.items() if SHARDING not in header.metadata]
    if other:
        raise FormatError(
            f"{what}: shards of ranks ({SHARDING}) beside other safetensors: which are the model?"
            f" Name the file, or move the others away:\n{up_to_five(other)}"
        )
    ranks = sorted({int(match[1]) for match in map(SHARD_FILE.fullmatch, headers) if match})
    if len(ranks) == 1 or len(headers) == 1:
        raise IncompatibleError(
            f"{what}: {min(headers)}: what one rank wrote by torch's HuggingFaceStorageWriter, a"
            " part of every tensor: name a folder that holds the shards of all ranks (of a run of"
            f" one rank: rename the file to {WHOLE}, or have torch consolidate it)"
        )
    parts: dict[str, list[tuple[Index, Stored]]] = {}
    for file, header in headers.items():
        for name, begin in read_offsets(file, header).items():
            spec = header.tensors[name]
            if spec.dtype not in ITEMSIZE:
                raise IncompatibleError(f"{what}: {name}: parts of {spec.dtype}: {ADVICE}")
            strides = row_major(spec.shape)
            stored = Stored(spec.dtype, spec.shape, strides, spec.path, spec.start)
            parts.setdefault(name, []).append((begin, stored))
    tensors: dict[str, Source] = {}
    said = f"shards of {len(ranks) or len(headers)} ranks"
    for name, found in parts.items():
        ends = [[a + n for a, n in zip(at, part.shape, strict=False)] for at, part in found]
        try:
            tensors[name] = assemble(name, tuple(map(max, *ends, ends[0])), found)
        except SkillvecError as error:
            raise type(error)(f"{what}: {error}; {said} are here: is one missing?") from None
    notes = [f"put together from {said}; how many there were is not recorded"]
    return Opened(tensors, format="DCP safetensors", notes=tuple(notes))


def read_offsets(file: str, header: Header) -> dict[str, Index]:
    """Return where the tensors of a file begin in those that they are parts of."""
    try:
        said = json.loads(header.metadata[SHARDING], object_pairs_hook=refuse_duplicates)
        found = {name: as_shape(said[name]["saved_offsets"]) for name in header.tensors}
    except (ValueError, LookupError, TypeError, RecursionError, FormatError) as error:
        raise FormatError(f"{file}: no readable {SHARDING}: {error!r:.200}") from None
    wrong = [name for name, at in found.items() if len(at) != len(header.tensors[name].shape)]
    if wrong:
        raise FormatError(f"{file}: offsets of other dimensions:\n{up_to_five(wrong)}")
    return found
