"""Tiny checkpoints in the layouts that transformers writes, made with the official library only."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TORCH_DTYPE = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    metadata: dict[str, str] | None = None,
    shards: int = 1,
    config: dict | None = None,
    side_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write tensors to one file (a path ending in .safetensors) or to a model folder.

    A folder holds model.safetensors or, with `shards` > 1, numbered shards (tensors dealt in turn)
    and their index, and a config.json. Numpy arrays are taken as they are; BF16 needs torch.
    """
    path = Path(path)
    content = {
        name: (torch.from_numpy(np.array(t)) if isinstance(t, np.ndarray) else t).contiguous()
        for name, t in tensors.items()
    }
    metadata = {"format": "pt"} if metadata is None else metadata
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path, metadata)
        return path
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(content, path / "model.safetensors", metadata)
    else:
        weight_map = {}
        for shard in range(shards):
            part = dict(list(content.items())[shard::shards])
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, path / file, metadata)
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.nbytes for t in content.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config or {"model_type": "toy"}))
    for name, text in (side_files or {}).items():
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read every tensor of a file, or of all the safetensors files of a folder, officially."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def bits(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return the flat bit patterns as unsigned integers: the only equality that sees -0 and NaN."""
    if isinstance(tensor, np.ndarray):
        flat = np.ascontiguousarray(tensor).reshape(-1)
    else:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return flat.view(UNSIGNED[tensor.element_size()])
    return flat.view(UNSIGNED[flat.dtype.itemsize])


def from_bits(patterns: np.ndarray, dtype: str, shape: tuple[int, ...] | None = None):
    """Return a torch tensor of a safetensors float dtype with exactly these bit patterns."""
    flat = torch.from_numpy(np.array(patterns).reshape(-1).view(np.uint8))
    return flat.view(TORCH_DTYPE[dtype]).reshape(shape or np.shape(patterns))


def assert_same_bits(found, expected) -> None:
    """Fail, with tensor name and first position, unless names, dtypes, shapes and bits are equal.

    Both are paths or mappings of tensors.
    """
    found, expected = (x if isinstance(x, Mapping) else load(x) for x in (found, expected))
    assert set(found) == set(expected)
    for name, right in expected.items():
        left = found[name]
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        differs = np.flatnonzero(bits(left) != bits(right))
        assert not differs.size, (
            f"{name}: {differs.size} of {left.numel()} differ, first at {differs[0]}:"
            f" {bits(left)[differs[0]]:#x}, expected {bits(right)[differs[0]]:#x}"
        )


def toy(
    seed: int = 0,
    dtype: str = "BF16",
    layers: int = 2,
    width: int = 24,
    vocabulary: int = 40,
    scale: float = 0.05,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a small decoder under Hugging Face names, untied, random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(TORCH_DTYPE[dtype])

    tensors = {"model.embed_tokens.weight": normal(vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = normal(width, width)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = normal(width)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(2 * width, width)
        tensors[f"{prefix}.input_layernorm.weight"] = normal(width) + 1
    tensors["model.norm.weight"] = normal(width) + 1
    tensors["lm_head.weight"] = normal(vocabulary, width)
    return tensors


def perturbed(
    tensors: Mapping[str, torch.Tensor], seed: int = 1, size: float = 2e-3, density: float = 1.0
) -> dict[str, torch.Tensor]:
    """Return a fine-tuned copy: noise of `size` on a random `density` of every tensor's values.

    The noise is fp64: one that fp32 holds would come back from fp32 differences by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tuned[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size
        noise *= torch.rand(tensor.shape, generator=generator) < density
        tuned[name] = (tensor.double() + noise).to(tensor.dtype)
    return tuned


def save_int4(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Save a transformers model as compressed-tensors packs it, 4 bits in groups of 16.

    Returns the model that transformers loads from there, dequantised.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.unflatten(-1, (-1, 16))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    settings = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
