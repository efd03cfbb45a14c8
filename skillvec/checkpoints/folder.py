"""What a folder of files holds, by their names, and the small JSON files in it.

Indexes and configs are read whole, up to the cap of a header; no weight is.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skillvec.checkpoints.opened import PICKLED
from skillvec.checkpoints.side_files import ADAPTER_CONFIG
from skillvec.errors import FormatError, up_to_five
from skillvec.files.file import Place, file_nbytes, is_plain_name, read_bytes, remote_of
from skillvec.files.header import MAX_HEADER_NBYTES, refuse_duplicates
from skillvec.remote.references import is_of_store

INDEX = "model.safetensors.index.json"
VECTOR_INDEX = "vector.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF = ".gguf"
PICKLES = (PICKLED, f"{PICKLED}.index.json")
SHARDS = (".metadata", "*_optim_states.pt", "model_world_size_*.pt")  # of a training's checkpoint
STEP = re.compile(r"global_step(\d{1,18})(?=/|$)")  # a folder of DeepSpeed's
DEEP, MANY = 3, 1000  # levels below a folder, and folders there, that are looked into for a model


def _parsed(file: str) -> Any:
    """Return what a JSON file holds; ValueError where it is none, or longer than any header."""
    nbytes = file_nbytes(file)
    if nbytes > MAX_HEADER_NBYTES:
        raise ValueError(f"{nbytes} bytes, over the cap of {MAX_HEADER_NBYTES}")
    return json.loads(read_bytes(file, 0, nbytes), object_pairs_hook=refuse_duplicates)


def read_json(file: str) -> dict[str, Any]:
    """Return a JSON object; FormatError where the file holds something else."""
    try:
        content = _parsed(file)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_index(index: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the weight map, tensor name to plain file name, and the metadata of an index."""
    try:
        content = _parsed(index)
        weight_map, metadata = content["weight_map"], content.get("metadata")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{index}: no readable weight_map: {error!r:.200}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is not a map of tensor names to files")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise FormatError(
                f"{index}: tensor {name!r:.200} is said to lie in {file!r:.200}, no plain file"
                " name in this folder"
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def list_shards(files: Mapping[str, str], weight_map: Mapping[str, str], what: str) -> list[str]:
    """Return the names of the shards that an index lists; FormatError where some are missing."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in files or not is_there(files[name])]
    if missing:
        raise FormatError(
            f"{what}: shards named by the index are missing; copy or download the model again,"
            f" whole:\n{up_to_five(missing)}"
        )
    return names


def is_there(address: str) -> bool:
    return remote_of(address) is not None or os.path.isfile(address)


def is_away(address: str) -> bool:
    """Return whether a file has to be fetched before it is read; ranged ones need not."""
    remote = remote_of(address)
    return remote is not None and remote.local is None and not remote.ranged


def is_listed(place: Place) -> bool:
    """Return whether `files` is all that a place holds: on the Hub, in an object store."""
    return place.revision is not None or is_of_store(place.ref)


def find_inside(place: Place) -> list[tuple[str, str]]:
    """Return the folders in a folder that hold an adapter, a vector or a model, and which it is."""
    held: dict[str, list[str]] = defaultdict(list)
    for name in place.files:  # of the Hub and of stores: names with slashes
        folder, slash, file = name.rpartition("/")
        if slash and folder.count("/") < DEEP:
            held[folder].append(file)
    if not is_listed(place) and place.path.is_dir():
        held |= _folders_of(place.path)
    kinds = {ADAPTER_CONFIG: "a PEFT adapter", VECTOR_INDEX: "a skill vector"}
    kinds |= dict.fromkeys((SINGLE, INDEX, *PICKLES, *SHARDS), "a model")
    found = [(name, [k for g, k in kinds.items() if fnmatch.filter(held[name], g)])
             for name in held]  # fmt: skip
    return sorted((name, kind[0]) for name, kind in found if kind)


def _folders_of(path: Path) -> dict[str, list[str]]:
    """Return what lies in the folders below one, by their names; not hidden ones, nor very many."""
    held: dict[str, list[str]] = {}
    level = [""]
    for _ in range(DEEP):
        inner = []
        for above in level:
            with os.scandir(path / above) as entries:
                names = [e.name for e in entries if not e.name.startswith(".") and _is_folder(e)]
            for name in sorted(names)[: MANY - len(held)]:
                folder = f"{above}/{name}" if above else name
                with contextlib.suppress(OSError):  # not to be read
                    held[folder] = os.listdir(path / folder)
                    inner.append(folder)
        level = inner
    return held


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; False of a link that leads in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_steps(names: Iterable[str]) -> list[str]:
    """Return the folders of DeepSpeed's steps among names of files, the last step last."""
    found = {match[0]: int(match[1]) for name in names if (match := STEP.match(name))}
    return sorted(found, key=lambda name: found[name])
