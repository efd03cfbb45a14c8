"""Whether a folder holds a PEFT adapter, and what lies beside it: a model, a head of values."""

import contextlib
import re
from collections.abc import Iterable

from skillvec.checkpoints.folder import INDEX, PICKLES, SINGLE, is_away
from skillvec.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE_FILE
from skillvec.checkpoints.torch_files import open_pickles
from skillvec.errors import FormatError, SkillvecError
from skillvec.files.file import Place, file_nbytes
from skillvec.files.header import read_header

FACTOR = r"(^|\.)lora_(embedding_)?[AB](\.|$)"  # of LoRA, in a tensor's name
VALUE_HEAD = r"(^|\.)(v_head|value_head)\."
MAX_HEAD_NBYTES = 1 << 24  # of a pickle that is looked into for no more than a head of values


def is_adapter(place: Place) -> bool:
    """Return whether a folder holds a PEFT adapter, and no weights of a model beside it."""
    if place.member is not None or ADAPTER_CONFIG not in place.files:
        return False
    return not (SINGLE in place.files or INDEX in place.files or find_models_beside(place))


def find_models_beside(place: Place) -> list[str]:
    """Return files beside an adapter's that hold a model: pickles, other safetensors, by name.

    Other safetensors without a factor of LoRA; an adapter may lie in a file of another name. A head
    of values alone, which trainers of PPO keep beside the adapter, is no model.
    """
    own = [name for name in ADAPTER_WEIGHTS if name in place.files]
    heads = find_value_heads(place)
    found = [name for name in PICKLES if name in place.files and own and name not in heads]
    for name, address in sorted(place.files.items()):
        other = name.endswith(".safetensors") and "/" not in name and name not in own
        if other and name not in heads and not re.fullmatch(STATE_FILE, name):
            with contextlib.suppress(FormatError):
                found += (
                    []
                    if any(re.search(FACTOR, t) for t in read_header(address).tensors)
                    else [name]
                )
    return found


def find_value_heads(place: Place) -> list[str]:
    """Return the files at the top of an adapter's folder that hold heads of values and no more.

    TRL saved one as pytorch_model.bin, LLaMA-Factory does as value_head.safetensors or .bin.
    """
    found = []
    for name, address in place.files.items():
        tensors: Iterable[str] = ()
        with contextlib.suppress(SkillvecError):
            if name.endswith(".safetensors") and "/" not in name:
                tensors = read_header(address).tensors
            elif name in (PICKLES[0], "value_head.bin") and _is_small(address):
                tensors = open_pickles([address], name)
        names = [tensor for tensor in tensors if type(tensor) is str]
        found += [name] if names and all(re.search(VALUE_HEAD, tensor) for tensor in names) else []
    return sorted(found)


def _is_small(address: str) -> bool:
    """Return whether a pickle is here, and no larger than one of a head alone."""
    return not is_away(address) and file_nbytes(address) <= MAX_HEAD_NBYTES
