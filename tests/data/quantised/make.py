"""Make the files beside this one: weights as three libraries quantise and save them.

Each file holds what the library wrote, its metadata, and under `expected.` what it reads of it.
Run with mlx[cpu] 0.32.4, torchao 0.18.0, optimum-quanto 0.2.7, torch 2.13.0, safetensors 0.8.0:

    python tests/data/quantised/make.py
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from optimum.quanto import freeze, quantization_map, quantize
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerTensor,
    quantize_,
)

HERE = Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def save(name: str, tensors: dict, expected: dict, metadata: dict, config: dict) -> None:
    held = {**tensors, **{f"expected.{key}": value for key, value in expected.items()}}
    held = {key: value.detach().clone() for key, value in held.items()}
    save_file(held, HERE / f"{name}.safetensors", metadata)
    (HERE / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def of_mlx() -> None:
    settings: dict = {"group_size": 64, "bits": 4, "mode": "affine"}
    written, expected = {}, {}
    rng = np.random.default_rng(0)
    for bits in (2, 3, 4, 5, 6, 8):
        for size in (32, 64):
            for dtype in (mx.bfloat16, mx.float16, mx.float32):
                name = f"b{bits}.g{size}.{str(dtype).rpartition('.')[2]}"
                shape = (2, 3, 64) if bits == 3 else (4, 64)  # experts, stacked
                weight = mx.array(rng.standard_normal(shape, np.float32)).astype(dtype)
                parts = mx.quantize(weight, group_size=size, bits=bits)
                read = mx.dequantize(*parts, group_size=size, bits=bits)
                names = ("weight", "scales", "biases")
                written |= {f"{name}.{n}": part for n, part in zip(names, parts, strict=True)}
                expected[f"{name}.weight"] = read
                if (bits, size) != (4, 64):
                    settings[name] = {"group_size": size, "bits": bits}
    mx.save_safetensors(str(HERE / "raw.safetensors"), written, {"format": "mlx"})
    mx.save_safetensors(str(HERE / "read.safetensors"), expected)
    both = [load_file(HERE / f"{name}.safetensors") for name in ("raw", "read")]
    config = {"quantization": settings, "quantization_config": settings}
    save("mlx", *both, {"format": "mlx"}, config)
    for name in ("raw", "read"):
        (HERE / f"{name}.safetensors").unlink()


def of_torchao() -> None:
    torch.manual_seed(0)
    configs = {
        "int8": Int8WeightOnlyConfig(version=2),
        "float8": Float8WeightOnlyConfig(),
        "float8_e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "intx_groups": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int3),
    }
    model = torch.nn.ModuleDict()
    for kind, config in configs.items():
        for name, dtype in DTYPES.items():
            layer = torch.nn.Sequential(torch.nn.Linear(64, 4, bias=False)).to(dtype)
            quantize_(layer, config)
            model[f"{kind}_{name}"] = layer[0]
    layer = torch.nn.Linear(64, 4, bias=False, dtype=torch.bfloat16)
    whole = Float8Tensor.from_hp(layer.weight.data, granularity=PerTensor())
    layer.weight = torch.nn.Parameter(whole, requires_grad=False)
    model["float8_tensor"] = layer
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    expected = {f"{name}.weight": layer.weight.dequantize() for name, layer in model.items()}
    config = {"quantization_config": {"quant_method": "torchao"}}
    save("torchao", tensors, expected, metadata, config)


def of_quanto() -> None:
    torch.manual_seed(0)
    written, expected, said = {}, {}, {}
    for kind in ("qint8", "qfloat8", "qfloat8_e5m2", "qfloat8_e4m3fnuz", "qint4", "qint2"):
        for name, dtype in DTYPES.items():
            for wide in (48, 160):  # of 4 and 2 bits: a group a row, and groups of 32
                module = f"{kind}_{name}_{wide}"
                layer = torch.nn.Linear(wide, 5, bias=False, dtype=dtype)
                model = torch.nn.ModuleDict({module: layer})
                quantize(model, weights=kind)
                freeze(model)
                written |= model.state_dict()
                said |= quantization_map(model)
                expected[f"{module}.weight"] = model[module].weight.dequantize()
    save("quanto", written, expected, {"format": "pt"}, said)


for make in (of_mlx, of_torchao, of_quanto):
    make()
