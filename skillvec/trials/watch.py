"""What an evaluation has done to the model that it was given.

Hides how a change is found without a second copy: torch counts the writes to every tensor, and a
few values of each are compared, which also finds writes that go around the counter. Training mode
and settings are put back; changed weights cannot be.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from skillvec.errors import up_to_five

SAMPLES = 64  # values of a tensor


class Watch:
    """The state of a model before an evaluation."""

    def __init__(self, model: Any) -> None:
        self._tensors = dict(_described(model))
        self._samples = _sampled(model)
        self._hooks = dict(_hooks(model))
        self._modes = [(module, module.training) for module in model.modules()]
        self._settings = [
            (config, _copied(config))
            for name in ("config", "generation_config")
            for config in _within(getattr(model, name, None))
        ]
        self._generation_config = getattr(model, "generation_config", None)

    def find_changes(self, model: Any) -> str:
        """Return which weights are no longer what they were, up to five by name; "" for none."""
        now, samples, hooks = dict(_described(model)), _sampled(model), dict(_hooks(model))
        found = [f"{name}: gone" for name in self._tensors.keys() - now.keys()]
        found += [f"{name}: new" for name in now.keys() - self._tensors.keys()]
        for name in self._tensors.keys() & now.keys():
            before, after = self._tensors[name], now[name]
            if before[1:] != after[1:]:
                found.append(f"{name}: {_spelled(before)} before, {_spelled(after)} now")
            elif before[0] != after[0] or self._samples.get(name) != samples.get(name):
                found.append(f"{name}: other values")
        found += [
            f"{name or 'the model'}: another module, or other hooks"
            for name in self._hooks.keys() | hooks.keys()
            if self._hooks.get(name) != hooks.get(name)
        ]
        return up_to_five(sorted(found)) if found else ""

    def restore(self, model: Any) -> None:
        """Put back training modes and the settings of config and generation_config."""
        for module, mode in self._modes:
            module.training = mode
        if self._generation_config is not None:
            model.generation_config = self._generation_config
        for config, kept in self._settings:
            if _copied(config) != kept:
                nested = {k: v for k, v in vars(config).items() if _is_config(v)}
                vars(config).clear()
                vars(config).update(nested | deepcopy(kept))


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


def _hooks(model: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, module in model.named_modules():
        yield name, (id(module), len(module._forward_hooks), len(module._forward_pre_hooks))


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
