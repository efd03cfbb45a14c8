"""What an evaluation has done to the model that it was given, and to the process.

Hides how a change is found without a second copy: torch counts the writes to every tensor, and a
few values of each are compared, which also finds writes that go around the counter. Changed weights
cannot be put back. All else that modules hold is: training mode, hooks, other attributes, buffers
that are not saved, gradients, settings; and so are the current folder, the environment, and torch's
gradient mode, default dtype, threads and global hooks. What changes code (classes, functions of
modules), files or other switches of torch is not seen.
"""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from skillvec.errors import up_to_five

SAMPLES = 64  # values of a tensor
HOLDERS = (dict, list, set, OrderedDict, defaultdict)


class Watch:
    """The state of a model before an evaluation."""

    def __init__(self, model: Any) -> None:
        self._tensors = dict(_described(model))
        self._samples = _sampled(model)
        self._attributes = [Attributes(module) for module in model.modules()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in _unsaved(model)]
        self._gradients = [(one, one.requires_grad, one.grad) for one in model.parameters()]
        self._settings = [
            (config, _copied(config))
            for name in ("config", "generation_config")
            for config in _within(getattr(model, name, None))
        ]

    def find_changes(self, model: Any) -> str:
        """Return which weights are no longer what they were, up to five by name; "" for none."""
        now, samples = dict(_described(model)), _sampled(model)
        found = [f"{name}: gone" for name in self._tensors.keys() - now.keys()]
        found += [f"{name}: new" for name in now.keys() - self._tensors.keys()]
        for name in self._tensors.keys() & now.keys():
            before, after = self._tensors[name], now[name]
            if before[1:] != after[1:]:
                found.append(f"{name}: {_spelled(before)} before, {_spelled(after)} now")
            elif before[0] != after[0] or self._samples.get(name) != samples.get(name):
                found.append(f"{name}: other values")
        return "; ".join(line.strip() for line in up_to_five(sorted(found)).splitlines())

    def restore(self) -> None:
        """Put back what is no weight; the model is that of before, in which no weight changed."""
        for attributes in self._attributes:
            attributes.restore()
        for tensor, values in self._values:
            tensor.data = values
        for parameter, needs_gradient, gradient in self._gradients:
            parameter.requires_grad_(needs_gradient)
            parameter.grad = gradient
        for config, kept in self._settings:
            if _copied(config) != kept:
                nested = {k: v for k, v in vars(config).items() if _is_config(v)}
                vars(config).clear()
                vars(config).update(nested | deepcopy(kept))


class Attributes:
    """The attributes of an object, by identity, and what lists, dicts and sets of them hold."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._held = {
            name: (value, value.copy() if type(value) in HOLDERS else None)
            for name, value in vars(owner).items()
        }

    def restore(self) -> None:
        """Put them back as they were."""
        own = vars(self._owner)
        own.clear()
        for name, (value, held) in self._held.items():
            own[name] = value
            if held is not None:
                value.clear()
                (value.extend if type(value) is list else value.update)(held)


def surroundings() -> list[tuple[Callable[[Any], Any], Any]]:
    """Return what the process and torch have one of, each as a function that restores a state."""
    import torch
    from torch.nn.modules import module

    hooks = [vars(module)[name] for name in vars(module) if name.startswith("_global_")]
    return [
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_num_threads, torch.get_num_threads()),
        (os.chdir, os.getcwd()),
        (_refill(os.environ), dict(os.environ)),
        *((_refill(table), table.copy()) for table in hooks if isinstance(table, dict)),
    ]


def _refill(table: Any) -> Callable[[Any], None]:
    def restore(held: Mapping[Any, Any]) -> None:
        if table != held:
            table.clear()
            table.update(held)

    return restore


def _unsaved(model: Any) -> list[Any]:
    """Return each tensor of modules that `state_dict` leaves out, once."""
    import torch

    found = {}
    for module in model.modules():
        buffers = (module._buffers.get(name) for name in module._non_persistent_buffers_set)
        for value in (*buffers, *vars(module).values()):
            if isinstance(value, torch.Tensor):
                found[id(value)] = value
    return [*found.values()]


def _tensors_of(model: Any) -> Mapping[str, Any]:
    """Return parameters and the buffers that are saved; a model writes to the others itself."""
    found: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return found


def _described(model: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, tensor in _tensors_of(model).items():
        writes = None if tensor.is_inference() else tensor._version
        yield name, (writes, str(tensor.dtype), tuple(tensor.shape), str(tensor.device))


def _spelled(described: tuple[Any, ...]) -> str:
    _, dtype, shape, device = described
    return f"{dtype.removeprefix('torch.')} {list(shape)} on {device}"


def _sampled(model: Any) -> dict[str, bytes]:
    """Return a few values of every tensor as bytes; one transfer a device."""
    import torch

    pieces: dict[Any, list[tuple[str, Any]]] = {}
    for name, tensor in _tensors_of(model).items():
        if tensor.is_contiguous() and tensor.numel():
            flat = tensor.detach().view(-1)
            piece = flat[:: max(1, len(flat) // SAMPLES)].contiguous().view(torch.uint8)
            pieces.setdefault(tensor.device, []).append((name, piece))
    found = {}
    for parts in pieces.values():
        whole = torch.cat([piece for _, piece in parts]).cpu().numpy().tobytes()
        start = 0
        for name, piece in parts:
            found[name] = whole[start : start + len(piece)]
            start += len(piece)
    return found


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")


def _within(config: Any) -> Iterator[Any]:
    """Yield a config and those within it, which modules hold too."""
    if _is_config(config):
        yield config
        for value in vars(config).values():
            yield from _within(value)


def _copied(config: Any) -> dict[str, Any]:
    return {name: deepcopy(value) for name, value in vars(config).items() if not _is_config(value)}
