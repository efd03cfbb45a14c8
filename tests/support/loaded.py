"""Models in memory, for what attaches vectors to them."""

from collections.abc import Mapping

import torch
from torch import nn

Weights = dict[str, torch.Tensor]


def module_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module that holds copies of tensors under their names: floats as parameters."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(leaf, tensor.clone())
    return root


def held_by(model: nn.Module) -> Weights:
    """Return copies of the state of a model, laid out as files lay it out."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()}  # fmt: skip


def weigh(model: nn.Module, tokenizer: object, split: str = "all") -> dict[str, list[float]]:
    """Score a model by the norms of a few weights: an evaluator in which nothing is random."""
    return {"norm": [float(held.detach().double().norm()) for held in model.parameters()][:6]}
