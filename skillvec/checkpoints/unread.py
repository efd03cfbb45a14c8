"""Weights that nothing says how to read: integers and dtypes without arithmetic.

Hides what libraries call the codes of a weight and what scales them, and what tells them from
masks, positions, indexes and counts, which pass: names, dtypes, shapes and what lies beside.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from skillvec.errors import IncompatibleError, up_to_five
from skillvec.files.tensors import Source
from skillvec.ops.kernels import STORAGE_DTYPE

FLOATS = ("BF16", "F16", "F32")

COMPLEX = "C64"  # holds its values as it is: passed through
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# last parts of names: a weight whatever its dtype; what scales, shifts or looks up the codes of one
WEIGHT = r"(?i)weight|^(w_q|kernel|qzeros)$|_(blocks|packed)$"
SCALING = (
    r"(?i)scale|absmax|amax|zero|shift|quant|codebook|centroid|(^|_)(lut|scb|s[uv]h?|biases|norms)$"
)
# integer buffers, by their last words: they point, count or hide; bare ones may be codes as well
BUFFER = (
    r"(?i)(^|_)(ids?|idxs?|index(es)?|indices|pos(ition)?s?|masks?|tril|counts?|counter|steps?|updates?"
    r"|tracked|lens?|lengths?|sizes?|shapes?|offsets?|order|seen|init(ed|ialized)?|version|seed|map"
    r"|mapping|perm(utation)?|tokens?|vocab|buckets?|hash(es)?|coords?|anchors?|lags?|state)\d*$"
    r"|(^|_)(seq|labels|classes|levels|types)$|^[a-z]+2[a-z]+$|\w_to_\w"
)
BARE = r"(?i)[a-z]?_?(idxs?|index(es)?|indices|perm|map)"
FEW = 64  # values of a vector of integers that may be packed weights
Tensors = Mapping[str, Source]
LeftOut = Callable[[str], bool]  # whether the tensor of a name is left out of what is done


def nothing_left_out(name: str) -> bool:
    return False


class Unexplained(NamedTuple):
    """A tensor that cannot be read as it is: a weight, or what belongs to the weight `of`."""

    of: str
    text: str


def unexplained(tensors: Tensors) -> dict[str, Unexplained]:
    """Return what cannot be read as it is, by name: weights of integers or of a dtype that is not
    taken, and the tensors beside them that scale them.

    Only for tensors that no config explains: dequantised ones are floats.
    """
    suspects = [
        (name, tensor)
        for name, tensor in tensors.items()
        if tensor.dtype not in (*STORAGE_DTYPE, COMPLEX)
        or (tensor.dtype in INTEGERS and tensor.numel > 1)
        or _last(name) == "W_q"  # of HQQ, which may view them as floats
    ]
    if not suspects:
        return {}
    beside: dict[str, list[str]] = defaultdict(list)  # names by module; those of codebooks by two
    for name in tensors:
        module = name.rpartition(".")[0]
        beside[module].append(name)
        if re.search(SCALING, _last(module)):
            beside[module.rpartition(".")[0]].append(name)
    found: dict[str, Unexplained] = {}
    for name, tensor in sorted(suspects, key=lambda suspect: -suspect[1].nbytes):
        if name in found:
            continue
        others = _beside(name, beside, tensors)
        if tensor.dtype in INTEGERS and not _is_weight(name, tensor, others, tensors):
            continue
        parts = [other for other in others if _belongs(other, tensors[other], name, tensor)]
        said = ", ".join(f"{_last(part)} {_described(tensors[part])}" for part in parts[:3])
        said += f" and {len(parts) - 3} more" if len(parts) > 3 else ""
        text = f"{name}: {_described(tensor)}" + (f", beside {said}" if said else "")
        found[name] = Unexplained(name, text)
        for part in parts:
            text = f"{part}: {_described(tensors[part])}, belongs to {name}"
            found.setdefault(part, Unexplained(name, text))
    return {name: found[name] for name in tensors if name in found}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _described(tensor: Source) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _beside(name: str, beside: Mapping[str, Sequence[str]], tensors: Tensors) -> list[str]:
    """Return the names of the same module, and of the same weight where that is cut into parts."""
    parts = name.split(".")
    first = parts.index("weight") + 1 if "weight" in parts[:-1] else len(parts) - 1
    found: list[str] = []
    for end in range(first, len(parts)):
        module, above = ".".join(parts[:end]), ".".join(parts[: end - 1])
        found += [module] if module in tensors else []
        found += beside.get(module, ())
        found += [other for other in beside.get(above, ()) if other.startswith(f"{module}_")]
    return [other for other in dict.fromkeys(found) if other != name]


def _is_weight(name: str, tensor: Source, others: Sequence[str], tensors: Tensors) -> bool:
    """Return whether integers are the codes of a weight, by their name and what lies beside it."""
    module, _, last = name.rpartition(".")
    if last == "indices" and f"{module}.values" in tensors:  # of a list, such as a patch
        return False
    if _is_called_weight(name):
        return True
    scaling = [other for other in others if _is_scaling(other, module)]
    if any(_last(other).startswith(f"{last}_") for other in scaling):
        return True
    if not may_be_weight(name, tensor) or scaling:
        return may_be_weight(name, tensor)
    own = tensors.get(f"{module}.weight")
    if re.fullmatch(BARE, last) or (own is not None and own.dtype in FLOATS and len(own.shape) > 1):
        return False  # the module has its weight: these are none
    floats = [tensors[n] for n in others if tensors[n].dtype not in (*INTEGERS, "BOOL")]
    return any(other.numel < tensor.numel for other in floats)


def _is_scaling(name: str, module: str = "") -> bool:
    """Return whether a tensor scales others by its name, or by that of its part of the module."""
    return re.search(SCALING, name.removeprefix(f"{module}.")) is not None


def _is_called_weight(name: str) -> bool:
    *modules, last = name.split(".")
    return "weight" in modules or re.search(WEIGHT, last) is not None


def may_be_weight(name: str, tensor: Source) -> bool:
    """Return whether integers may be codes of a weight, for all that name and shape say: they are
    no masks, positions, indexes or counts.
    """
    shape, last = tensor.shape, _last(name)
    if _is_called_weight(name):
        return tensor.numel > 1
    square = len(shape) > 1 and shape[-1] == shape[-2] and tensor.numel == shape[-1] ** 2
    mask = square and (len(shape) > 2 or "bias" in last)  # of attention, in old checkpoints
    buffer = re.search(BUFFER, last) and not re.fullmatch(BARE, last)
    return not (mask or buffer) and (len(shape) > 1 or tensor.numel >= FEW)


def _belongs(name: str, tensor: Source, of: str, weight: Source) -> bool:
    """Return whether a tensor that lies beside a weight of codes has to go where it goes."""
    last = _last(name)
    if _is_scaling(name, of.rpartition(".")[0]) or of.startswith(f"{name}."):
        return True
    if weight.dtype not in INTEGERS or (last.endswith("bias") and "weight" not in last):
        return False
    return tensor.numel < weight.numel


def refuse_unexplained(
    tensors: Tensors, config: Mapping[str, Any], what: str, left_out: LeftOut
) -> None:
    found = unexplained(tensors)
    taken = {name for name in found if not left_out(name)}
    lines = [
        it.text for n, it in found.items() if n in taken and (n == it.of or it.of not in taken)
    ]
    if not taken:
        return
    keys = [key for key in config if "quant" in key.lower() and key != "quantization_config"]
    said = f" ({', '.join(keys[:3])} is not read)" if keys else ""
    other = "" if left_out is nothing_left_out else ", or leave them out, with all that scales them"
    other += " (--exclude GLOB)" if other else ""
    raise IncompatibleError(
        f"{what}: weights stored as integers, or tensors of a dtype that is not taken, and nothing"
        f" in config.json says how to read them{said}: dequantise the model with the library that"
        f" made it, and save it, first{other}:\n{up_to_five(lines)}"
    )
