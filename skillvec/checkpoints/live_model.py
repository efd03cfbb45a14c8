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
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.layouts import loaded_as
from skillvec.checkpoints.live_tensors import Kept, LiveTensor, Spot
from skillvec.checkpoints.opened import Opened
from skillvec.checkpoints.pickles import DTYPES
from skillvec.checkpoints.transformers_layouts import all_of
from skillvec.checkpoints.unread import LeftOut
from skillvec.errors import IncompatibleError, UsageError, needs, up_to_five_each
from skillvec.files.file import Place
from skillvec.files.tensors import Source
from skillvec.files.views import Index, View, span_of

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

    Raises UsageError for what is no module.
    """
    with needs("torch", "attaching a vector to a model"):
        from torch import nn
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model: a {type(model).__name__}, expected a torch.nn.Module that is loaded"
        )
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
    while (name := inner.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def see_model(model: Any) -> LiveModel:
    """Return a module (as `unwrapped` gives it) as a checkpoint; reads no values.

    Tensors are those that save_pretrained would write, or those of the state dict where
    transformers knows no such class.
    """
    spots, unchangeable = _find_spots(model)
    whole = {name: all_of(name, shape) for name, shape in _shapes(spots | unchangeable).items()}
    views = _saved(model, _shapes(spots | unchangeable)) or whole
    tensors: dict[str, Source] = {}
    refused: dict[str, str] = {}
    for name, view in views.items():
        wrong = [unchangeable[part][1] for part in view.sources if part in unchangeable]
        parts = [spots[part] for part in view.sources if part in spots]
        dtypes = {str(part.tensor().dtype) for part in parts}
        if not wrong and len(dtypes) > 1:
            wrong = [f"made of {' and '.join(sorted(dtypes))}, expected one dtype"]
        if wrong:
            refused[name] = wrong[0]
            continue
        boxes = tuple(box._replace(source=spots[box.source]) for box in view.boxes)
        tensors[name] = LiveTensor(name, DTYPES[dtypes.pop()], View(view.shape, boxes), Kept())
    if getattr(model, "is_quantized", False) and not refused:
        method = getattr(getattr(model, "quantization_method", ""), "value", "")
        refused = dict.fromkeys(tensors, f"the model is quantised {method}".rstrip())
    ref = f"{type(model).__name__} in memory"
    place = Place(ref, Path(ref), {})
    return LiveModel(place, Opened(tensors, format=FORMAT), {}, _config_of(model), refused)


def _config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model as config.json would hold it, {} where it has none."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    said: dict[str, Any] = json.loads(config.to_json_string())
    return said | {"architectures": [type(model).__name__]}


# ------------------------------------------------------------------------------- what can be changed

Refused = tuple[Index, str]  # the shape of a parameter, and why it cannot be changed


def _shapes(found: Mapping[str, Spot | Refused]) -> dict[str, Index]:
    return {name: at.shape if isinstance(at, Spot) else at[0] for name, at in found.items()}


def _find_spots(model: Any) -> tuple[dict[str, Spot], dict[str, Refused]]:
    """Return parameters and saved buffers under the one name that is saved, and those refused."""
    held: dict[str, tuple[Any, str, Any]] = {}
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
    spots: dict[str, Spot] = {}
    refused: dict[str, Refused] = {}
    offloaded = [n for n, m in model.named_modules(remove_duplicate=False) if _is_offloaded(m)]
    for name, (module, leaf, tensor) in _once(held, model).items():
        why = _problem(tensor)
        if tensor.is_meta and any(not n or name.startswith(f"{n}.") for n in offloaded):
            why = "offloaded: it is on its device only while it is used"
        if why:
            refused[name] = tuple(tensor.shape), why
        else:
            spots[name] = Spot(name, module, leaf)
    for name in _overlapping(spots):
        refused[name] = spots.pop(name).shape, "shares a part of its memory with another"
    return spots, refused


def _is_offloaded(module: Any) -> bool:
    """Return whether hooks of accelerate bring a module's weights to the device only for a call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def _problem(tensor: Any) -> str:
    """Return why a parameter cannot be changed where it lies, "" where it can."""
    import torch

    kind, home = type(tensor), type(tensor).__module__
    if any(home == name or home.startswith(f"{name}.") for name in QUANTISERS):
        return f"quantised: a {kind.__name__} of {home.partition('.')[0]}"
    if kind.__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
        return "a DTensor, of which every process holds a part"
    if hasattr(tensor, "ds_status"):
        return "of ZeRO-3, of which every process holds a part"
    if kind.__name__ == "FlatParameter":
        return "flattened by FullyShardedDataParallel"
    ordinary = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    dispatch = kind.__torch_dispatch__  # that of a class that keeps its values elsewhere is its own
    if (
        kind not in ordinary
        and dispatch is not torch._C._disabled_torch_dispatch_impl
        and dispatch is not torch.Tensor.__torch_dispatch__
    ):
        return f"a {kind.__name__} of {home}, which keeps its values elsewhere"
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
    if tensor.is_meta or not tensor.numel() or _problem(tensor):
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _once(held: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return each of what several names hold once: under the name that save_pretrained keeps."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, (_, _, tensor) in held.items():
        groups[_memory_of(tensor)].append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {}
    for names in groups.values():
        left = [name for name in sorted(names) if not _is_tied_copy(name, tied)]
        kept[(left or sorted(names)[-1:])[0] if len(names) > 1 else names[0]] = None
    return {name: held[name] for name in held if name in kept}


def _is_tied_copy(name: str, tied: Mapping[str, str]) -> bool:
    return any(re.search(pattern, name) for pattern in tied)


def _overlapping(spots: Mapping[str, Spot]) -> list[str]:
    """Return parameters some of whose values are those of others too."""
    by_storage: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
    for name, spot in spots.items():
        tensor = spot.tensor()
        if tensor.numel():
            key = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage[key].append((name, tensor))
    found = []
    for held in by_storage.values():
        if len(held) < 2:
            continue
        ends = [(t.storage_offset() * t.itemsize, t) for _, t in held]
        spans = sorted((a, a + span_of(t.shape, t.stride()) * t.itemsize) for a, t in ends)
        if all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False)):
            continue
        used = np.zeros(max(end for _, end in spans), np.uint8)
        for begin, t in ends:
            strides = [stride * t.itemsize for stride in t.stride()]
            for byte in range(t.itemsize):
                cells = used[begin + byte :]
                np.lib.stride_tricks.as_strided(cells, tuple(t.shape), strides)[...] += 1
        for (name, t), (begin, _) in zip(held, ends, strict=True):
            strides = [stride * t.itemsize for stride in t.stride()]
            if (np.lib.stride_tricks.as_strided(used[begin:], tuple(t.shape), strides) > 1).any():
                found.append(name)
    return found


# ------------------------------------------------------------------------------ how files name it


def _saved(model: Any, memory: Mapping[str, Index]) -> dict[str, View] | None:
    """Return what transformers writes of a model as views over names in memory.

    None where it is none of its models. What its mappings do to a tensor that no view can say
    (values in another order) stays under its name in memory.
    """
    try:
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return None
    if not isinstance(model, transformers.PreTrainedModel):
        return None
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
    views = {
        name: view for name, view in back.views.items()
        if sum(prod(box.sizes) for box in view.boxes) == prod(view.shape)
    }  # fmt: skip
    used: dict[str, int] = defaultdict(int)
    for view in views.values():
        for box in view.boxes:
            used[box.source] += prod(box.sizes)
    partly = {name for name, numel in used.items() if numel != prod(memory[name])}
    views = {name: view for name, view in views.items() if not partly & {*view.sources}}
    there = {source for view in views.values() for source in view.sources}
    return views | {n: all_of(n, shape) for n, shape in memory.items() if n not in there}


def _conversions_of(model: Any) -> Callable[[], list[Any]]:
    """Return what makes the entries of the mapping by which a model is saved, as loading takes them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    loaded_by: Sequence[Any] | None = getattr(model, "_weight_conversions", None)

    def fresh() -> list[Any]:
        if loaded_by is not None:
            return copy.deepcopy([*loaded_by])
        made = get_model_conversion_mapping(model, add_legacy=False)
        return [entry for entry in made if type(entry).__name__ != "PrefixChange"]

    return fresh
