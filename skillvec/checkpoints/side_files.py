"""What of a model's folder comes along when its weights are written anew, and what stays behind.

Everything comes along, byte for byte, but three kinds of files. States of a training are of no use
beside weights that were not trained. Files at the top of the folder in which a loader looks for
the very weights that are rewritten, in another format, precision or numbering, hold them as they
were: under such a name they would be loaded in place of what was made. An adapter at the top is
added by from_pretrained to the weights beside it, into which it was merged before. Names decide,
and of safetensors the names of the tensors in them; no weight is read.
"""

import json
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from skillvec.errors import FormatError
from skillvec.files.file import file_nbytes, read_bytes
from skillvec.files.header import MAX_HEADER_NBYTES, read_header

ADAPTER_CONFIG = "adapter_config.json"  # where it lies, PEFT finds an adapter
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

STATE = "state of a training"
OLD = "weights of the target as they were"
ADAPTER = "an adapter, which from_pretrained adds to the weights beside it"
STRAY = "an index of files that stay behind"
# of transformers, accelerate, DeepSpeed, Megatron, FSDP and verl
STATE_FILE = (
    r"(distrib_|model_)?optim(izer)?s?([-_.][\w.-]*)?\.(pt|pth|bin|safetensors)"
    r"|((lr_)?scheduler|scaler|sampler|dl_state_dict|rng_state|random_states)(_\d+)*\.(pt|pth|bin|pkl)"
    r"|.+_(optim|model)_states\.pt|(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt"
    r"|pytorch_model_fsdp(_\d+)?(_rank\d+)?\.bin"
)
STATE_FOLDER = r"global_step\d+(_universal)?|(optimizer|pytorch_model_fsdp)_\d+"
SHARDED = (".distcp", ".metadata")  # of torch.distributed.checkpoint
TRAINED = "trainer_state.json"  # in a folder below: the Trainer saved all of it
# where loaders look for a model's weights: name, shard and variant as transformers writes them
LOADED = (
    r"(pytorch_model|diffusion_pytorch_model|tf_model|flax_model|rust_model|consolidated)"
    r"(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.(bin|h5|msgpack|ot|pth|safetensors)(\.index(\.\w+)?\.json)?"
)
VARIANT = r"model(\.\w+(-\d+-of-\d+)?|-\d+-of-\d+\.\w+)\.safetensors"
INDEX_FILE = r".+\.index(\.\w+)?\.json"


class Made(NamedTuple):
    """What is written: names of its tensors and files, and whether loaders go by its index."""

    tensors: Collection[str]
    files: Collection[str]
    indexed: bool


def left_behind(files: Mapping[str, str], made: Made) -> dict[str, str]:
    """Return the names of files (name: address) that do not come along, with the reason of each.

    Headers of safetensors at the top and indexes are read.
    """
    saved = {posixpath.dirname(name) for name in files if posixpath.basename(name) == TRAINED}
    steps = {folder for name in files for folder in _folders(name) if _is_step(folder)}
    left = {}
    for name, address in files.items():
        if _is_state(name, saved - {""}, steps):
            left[name] = STATE
        elif ADAPTER_CONFIG in files and name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
            left[name] = ADAPTER
        elif "/" not in name and _is_old(name, address, made):
            left[name] = OLD
    there = {*made.files, *(name for name in files if name not in left)}
    for name in files:
        if name not in left and re.fullmatch(INDEX_FILE, posixpath.basename(name)):
            folder = posixpath.dirname(name)
            if not {posixpath.join(folder, file) for file in _indexed(files[name])} <= there:
                left[name] = STRAY
    return left


def _folders(name: str) -> Iterable[str]:
    """Yield the folders above a file, the nearest first."""
    while name := posixpath.dirname(name):
        yield name


def _is_step(folder: str) -> bool:
    return re.fullmatch(STATE_FOLDER, posixpath.basename(folder)) is not None


def _is_state(name: str, saved: Collection[str], steps: Collection[str]) -> bool:
    """Return whether a file is state of a training, by its name or the folder that it lies in."""
    folder, base = posixpath.split(name)
    if re.fullmatch(STATE_FILE, base) or any(f in saved or f in steps for f in _folders(name)):
        return True
    if base in ("latest", "latest_universal"):  # DeepSpeed's pointers to a step
        return any(posixpath.dirname(step) == folder for step in steps)
    return base.endswith(SHARDED) and (not folder or "optim" in folder)


def _is_old(name: str, address: str, made: Made) -> bool:
    """Return whether a file at the top is one in which a loader finds the weights as they were.

    Where no index says which files are the model, loaders such as vLLM take every safetensors.
    """
    if name == "model.safetensors" or name in made.files or re.fullmatch(LOADED, name):
        return True
    if not name.endswith(".safetensors"):
        return False
    try:
        held = set(read_header(address).tensors)
    except FormatError:
        return re.fullmatch(VARIANT, name) is not None
    if re.fullmatch(VARIANT, name):
        return not held.isdisjoint(made.tensors)
    return not made.indexed and bool(held) and held <= set(made.tensors)


def _indexed(address: str) -> set[str]:
    """Return the files that an index names, none where it is no index."""
    try:
        nbytes = file_nbytes(address)
        content = json.loads(read_bytes(address, 0, min(nbytes, MAX_HEADER_NBYTES)))
        return {file for file in content["weight_map"].values() if isinstance(file, str)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
