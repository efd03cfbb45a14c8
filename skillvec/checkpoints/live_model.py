"""A model that is loaded as a checkpoint: its parameters under the names that files give them.

Hides how transformers names and cuts in files what it holds in memory (`save_pretrained` and the
conversions by which the model was loaded), which parameters are one, and which cannot be changed
where they lie. Nothing is read from the folder that the model came from.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import loaded_as
from skillvec.checkpoints.live_tensors import Kept, LiveTensor, Spot
from skillvec.checkpoints.opened import Opened
from skillvec.checkpoints.pickles import DTYPES
from skillvec.checkpoints.transformers_layouts import all_of, drop_partial
from skillvec.checkpoints.unread import LeftOut
from skillvec.errors import IncompatibleError, UsageError, needs, up_to_five_each
from skillvec.files.file import Place
from skillvec.files.tensors import Source
from skillvec.files.views import Index, View, span_of
from skillvec.ops.kernels import Bytes

FORMAT = "a model in memory"
QUANTISERS = (
    "bitsandbytes",
    "torchao",
    "optimum.quanto",
    "quanto",
    "hqq",
    "auto_gptq",
    "gptqmodel",
)


class LiveModel(Checkpoint):
    """A model in memory: names as in files -> LiveTensor, with the config of the model.

    `unchangeable` says of parameters that are not among them why not.
    """

    def __init__(
        self, place: Place, opened: Opened, formats: Mapping[str, str] = {},
        config: Mapping[str, Any] = {}, unchangeable: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        super().__init__(place, opened, formats)
        self.config, self.unchangeable = dict(config), unchangeable

    def with_tensors(
        self, tensors: Mapping[str, Source], formats: Mapping[str, str] = {}
    ) -> "LiveModel":
        opened = replace(self.opened, tensors=tensors)
        return LiveModel(self.place, opened, formats, self.config, self.unchangeable)

    @property
    def is_folder(self) -> bool:
        return False

    def refuse_unchangeable(self, left_out: LeftOut) -> None:
        """Raise IncompatibleError for parameters that are not left out and cannot be changed."""
        kinds = defaultdict(list)
        for name, why in self.unchangeable.items():
            if not left_out(name):
                kinds[why].append(f"{name}: {why}")
        if kinds:
            raise IncompatibleError(
                f"{self.ref}: parameters that no vector can be attached to where they lie (apply"
                f" writes a model with it; exclude leaves tensors out):\n{up_to_five_each(kinds)}"
            )


def unwrapped(model: Any) -> Any:
    """Return the module within what torch.compile and DistributedDataParallel put around it.

    Raises UsageError for what is no module, IncompatibleError for one that PEFT has changed.
    """
    with needs("torch", "attaching a vector to a model"):
        from torch import nn
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: a {type(model).__name__}, expected a torch.nn.Module")
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
    while (name := inner.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise IncompatibleError(
            f"model: a {type(model).__name__} with an adapter of PEFT in it, expected one without:"
            " unload or merge it (merge_and_unload); the adapter's folder can be attached as a"
            " vector"
        )
    return model


def see_model(model: Any) -> LiveModel:
    """Return a module (as `unwrapped` gives it) as a checkpoint; reads no values.

    Tensors are those that save_pretrained would write, or those of the state dict where
    transformers knows no such class.
    """
    spots = _find_spots(model)
    memory = {name: spot.shape for name, spot in spots.items()}
    views = _saved(model, memory) or {n: all_of(n, shape) for n, shape in memory.items()}
    tensors: dict[str, Source] = {}
    refused: dict[str, str] = {}
    for name, view in views.items():
        parts = [spots[part] for part in view.sources]
        dtypes = {str(part.tensor().dtype) for part in parts}
        wrong = [part.why for part in parts if part.why]
        if wrong or len(dtypes) > 1:
            refused[name] = [*wrong, f"made of {', '.join(sorted(dtypes))}, expected one dtype"][0]
            continue
        boxes = tuple(box._replace(source=spots[box.source]) for box in view.boxes)
        tensors[name] = LiveTensor(name, DTYPES[dtypes.pop()], View(view.shape, boxes), Kept())
    if getattr(model, "is_quantized", False) and not refused:
        tensors, refused = {}, dict.fromkeys(tensors, "the model is quantised")
    ref = f"{type(model).__name__} in memory"
    place = Place(ref, Path(ref), {})
    return LiveModel(place, Opened(tensors, format=FORMAT), {}, _config_of(model), refused)


def _config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model as config.json would hold it, {} where it has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    said: dict[str, Any] = json.loads(config.to_json_string())
    return said | {"architectures": [type(model).__name__]}


# ------------------------------------------------------------------------------ what can be changed

Held = dict[str, tuple[Any, str, Any]]  # by name: module, name in it, tensor


def _find_spots(model: Any) -> dict[str, Spot]:
    """Return parameters and saved buffers, each under the one name that is saved."""
    held: Held = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        saved = {
            leaf: tensor for leaf, tensor in module._buffers.items()
            if leaf not in module._non_persistent_buffers_set
        }  # fmt: skip
        for leaf, tensor in (module._parameters | saved).items():
            if tensor is not None:
                held[f"{prefix}.{leaf}".lstrip(".")] = module, leaf, tensor
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        held.pop(name, None)
    found = _once(held, model)
    shared = _overlapping({name: tensor for name, (_, _, tensor) in found.items()})
    offloaded = [f"{n}.".lstrip(".") for n, m in model.named_modules() if _is_offloaded(m)]
    spots = {}
    for name, (module, leaf, tensor) in found.items():
        why = _problem(tensor)
        if tensor.is_meta and name.startswith(tuple(offloaded)):
            why = "offloaded: it is on its device only while it is used"
        if name in shared:
            why = "shares a part of its memory with another"
        spots[name] = Spot(name, module, leaf, why)
    return spots


def _is_offloaded(module: Any) -> bool:
    """Return whether hooks of accelerate bring a module's weights to the device only for a call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def _problem(tensor: Any) -> str:
    """Return why a parameter cannot be changed where it lies, "" where it can."""
    import torch

    kind, home = type(tensor), type(tensor).__module__
    if any(home == name or home.startswith(f"{name}.") for name in QUANTISERS):
        return f"quantised by {home.partition('.')[0]} ({kind.__name__})"
    if kind.__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
        return "a DTensor, of which every process holds a part"
    if hasattr(tensor, "ds_status"):
        return "of ZeRO-3, of which every process holds a part"
    if getattr(tensor, "_is_flat_param", False):
        return "flattened by FullyShardedDataParallel"
    if kind.__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        return f"a tensor of class {home}.{kind.__name__}, which keeps its values elsewhere"
    if torch.nn.parameter.is_lazy(tensor):
        return "not initialised yet"
    if tensor.is_meta:
        return "on the meta device: it has no values"
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return f"{tensor.dtype}, {tensor.layout}, expected plain values"
    if str(tensor.dtype) not in DTYPES:
        return f"{tensor.dtype}, expected a dtype that files hold"
    if tensor.numel() and any(n > 1 and not s for n, s in _steps(tensor)):
        return "expanded: several of its values are one in memory"
    return ""


def _steps(tensor: Any) -> Iterator[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)


def _memory_of(tensor: Any) -> Any:
    """Return what is the same of two tensors that are one."""
    if _problem(tensor) or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _once(held: Held, model: Any) -> Held:
    """Return each of what several names hold once: under the name that save_pretrained keeps."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, (_, _, tensor) in held.items():
        groups[_memory_of(tensor)].append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = set()
    for names in groups.values():
        own = [n for n in names if not any(re.search(pattern, n) for pattern in tied)]
        kept.add([*own, max(names)][0])
    return {name: held[name] for name in held if name in kept}


def _overlapping(tensors: Mapping[str, Any]) -> set[str]:
    """Return the names of tensors some of whose memory is that of others too."""
    by_storage: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if not _problem(tensor) and tensor.numel():
            key = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage[key].append(name)
    found: set[str] = set()
    for names in by_storage.values():
        spans = sorted(_span_of(tensors[name]) for name in names)
        if all(one[1] <= other[0] for one, other in pairwise(spans)):
            continue
        used = np.zeros(max(end for _, end in spans), np.uint8)
        cells = {name: _cells_of(tensors[name], used) for name in names}
        for place in cells.values():
            place += 1
        found |= {name for name, place in cells.items() if (place > 1).any()}
    return found


def _span_of(tensor: Any) -> tuple[int, int]:
    """Return where the bytes of a tensor begin and end in its storage."""
    begin = tensor.storage_offset() * tensor.itemsize
    return begin, begin + span_of(tensor.shape, tensor.stride()) * tensor.itemsize


def _cells_of(tensor: Any, storage: Bytes) -> Any:
    """Return the first byte of each value of a tensor, in an array of the bytes of its storage."""
    strides = [stride * tensor.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(
        storage[_span_of(tensor)[0] :], tuple(tensor.shape), strides
    )


# ------------------------------------------------------------------------------ how files name it


def _saved(model: Any, memory: Mapping[str, Index]) -> dict[str, View] | None:
    """Return what transformers writes of a model as views over names in memory.

    None where it is none of its models. What its mappings do to a tensor that no view can say
    (values in another order) stays under its name in memory.
    """
    if not any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        return None
    with needs("hf", "naming the parameters of a model as files do"):
        from transformers.core_model_loading import revert_weight_conversion
    import torch

    meta = {name: torch.empty(shape, device="meta") for name, shape in memory.items()}
    try:
        files = revert_weight_conversion(model, meta)
    except Exception:  # of shapes that are none of the class's: quantised, sharded
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in files.items()}
    if shapes == memory:
        return None
    _, back = loaded_as(shapes, memory, type(model).__name__, _conversions_of(model))
    views = drop_partial(back.views, memory)
    there = {source for view in views.values() for source in view.sources}
    return views | {n: all_of(n, shape) for n, shape in memory.items() if n not in there}


def _conversions_of(model: Any) -> Callable[[], list[Any]]:
    """Return what makes the entries by which a model is saved, in the direction of loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    loaded_by: Sequence[Any] | None = getattr(model, "_weight_conversions", None)

    def fresh() -> list[Any]:
        if loaded_by is not None:
            return copy.deepcopy([*loaded_by])
        made = get_model_conversion_mapping(model, add_legacy=False)
        return [entry for entry in made if type(entry).__name__ != "PrefixChange"]

    return fresh
