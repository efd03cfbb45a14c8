"""Weights of compressed-tensors: its int, float, naive and packed ones, NVFP4, MXFP4, MXFP6, MXFP8.

The values are those of its own decompression. Refused by name: other forms, reordered columns,
rotated and sparse weights.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from skillvec.checkpoints.dequantized import Dequantised
from skillvec.checkpoints.quantized_format import FoundWeight, Stated, cut_sizes, is_size
from skillvec.checkpoints.unread import FLOATS, Tensors
from skillvec.errors import IncompatibleError
from skillvec.files.tensors import values_of

# small floats in groups as (codes, bits, scales), and the others
SMALL = {
    "nvfp4-pack-quantized": ("U8", 4, "F8_E4M3"), "mxfp4-pack-quantized": ("U8", 4, "U8"),
    "mxfp6-pack-quantized": ("U8", 6, "U8"), "mxfp8-quantized": ("F8_E4M3", 8, "U8"),
}  # fmt: skip
FORMS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", *SMALL)


def find_compressed(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find the weights of compressed-tensors: of its groups, the one that the headers fit."""
    groups = list(_groups(said.settings))
    for name, weight in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "weight_packed"):
            continue
        if f"{module}.weight_g_idx" in tensors:
            raise IncompatibleError(
                f"{module}.weight_g_idx: columns reordered by activations, which compressed-tensors"
                " no longer reads: decompress with the version that wrote them first"
            )
        if f"{module}.weight_scale" not in tensors:
            if kind == "weight_packed" or weight.dtype in ("F8_E4M3", "I8"):
                yield f"{name}: {weight.dtype} without {module}.weight_scale"
            continue
        tried = [
            (_fit_small if group["format"] in SMALL else _fit)(tensors, name, group, said.dtype)
            for group in groups
        ]
        fits = {found.source: found for found in tried if not isinstance(found, str)}
        if len(fits) == 1:
            yield next(iter(fits.values()))
        else:
            why = "; ".join(dict.fromkeys(str(t) for t in tried)) or "no config group"
            why = "fits more than one config group" if fits else why[:300]
            yield f"{name} {weight.dtype} {list(weight.shape)}: {why}"


def _groups(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what each config group says about weights, with its format."""
    for key in ("transform_config", "sparsity_config"):
        entry = settings.get(key) or {}
        if not isinstance(entry, dict) or (entry.get("format") != "dense" and any(entry.values())):
            raise IncompatibleError(f"a {key}: decompress the rotated or sparse model first")
    groups = settings.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else [groups]:
        scheme = group if isinstance(group, dict) else {"weights": group}
        weights, form = scheme.get("weights"), scheme.get("format") or settings.get("format")
        if weights is None:  # activations only
            continue
        bits = weights.get("num_bits", 8) if isinstance(weights, dict) else None
        if form not in FORMS or not is_size(bits, 8):
            raise IncompatibleError(
                f"compressed-tensors format {str(form)[:40]!r}, weights {str(weights)[:80]}:"
                f" expected {', '.join(FORMS)} of at most 8 bits: decompress the model first"
            )
        yield {"type": "int", "symmetric": True, **weights, "num_bits": bits, "format": form}


def _fit(tensors: Tensors, name: str, group: dict[str, Any], dtype: str) -> FoundWeight | str:
    """Return a weight as a group describes it, or why it does not fit."""
    bits, packed = group["num_bits"], group["format"] == "pack-quantized"
    module = name.rpartition(".")[0]
    weight, scale = tensors[name], tensors[f"{module}.weight_scale"]
    kind = {"float": "F8_E4M3", "int": "I32" if packed else "I8"}.get(str(group["type"]))
    if (
        (weight.dtype, name.endswith("_packed"), len(weight.shape)) != (kind, packed, 2)
        or 0 in weight.shape or (kind == "F8_E4M3" and (packed or bits < 8))
    ):  # fmt: skip
        return f"expected {kind} [rows, columns] in {group['format']}, {bits} bits"
    names, (rows, cols) = [name, f"{module}.weight_scale"], weight.shape
    strategy, size = str(group.get("strategy")), group.get("group_size")
    if packed:
        names.append(f"{module}.weight_shape")
        stored = tensors.get(names[-1])
        if stored is None or (stored.dtype, stored.shape) not in (("I64", (2,)), ("I32", (2,))):
            return f"expected {names[-1]}, two integers"
        if strategy == "group" and is_size(size) and len(scale.shape) == 2:
            cols = scale.shape[1] * size
        else:
            rows, cols = map(int, values_of(stored, 0, 2))
        if (rows, -(-cols * bits // 32)) != weight.shape:
            return f"{weight.shape[1]} words hold no {cols} columns of {bits} bits"
    block = {
        "tensor": (rows, cols), "channel": (1, cols), "block": group.get("block_structure"),
        "group": (1, size if is_size(size) and cols % size == 0 else None),
    }.get(strategy)  # fmt: skip
    block = cut_sizes(block, (rows, cols))
    grid = tuple(-(-n // m) for n, m in zip((rows, cols), block, strict=True)) if block else ()
    if not block or scale.dtype not in FLOATS or (
        scale.shape != grid and not scale.numel == prod(grid) == 1
    ):  # fmt: skip
        return f"{names[1]} {scale.dtype} {list(scale.shape)}: no floats per {strategy[:20]}"
    zero, symmetric = tensors.get(f"{module}.weight_zero_point"), group["symmetric"] is True
    if not symmetric or zero is not None:
        names.append(f"{module}.weight_zero_point")
        wanted = ("I8", scale.shape)
        if packed:  # down the rows; what else is packed has no zero points in the reference
            wanted = ("I32", (-(-rows * bits // 32), grid[1] if block[0] == 1 else -1))
        if symmetric or zero is None or (zero.dtype, zero.shape) != wanted or kind == "F8_E4M3":
            found = f"{zero.dtype} {list(zero.shape)}" if zero else "nothing"
            return f"{names[-1]}: found {found}, expected {'nothing' if symmetric else wanted}"
    source = Dequantised(
        f"{module}.weight", dtype, (rows, cols), weight, scale, block, zero,
        bits if packed else 0, scale.dtype,
    )  # fmt: skip
    spread = {"group": f"groups of {size}", "block": f"blocks {block[0]}x{block[1]}"}
    label = spread.get(strategy, f"per {strategy}") + ("" if symmetric else ", asymmetric")
    return FoundWeight(
        tuple(names), source, f"{'fp' if kind == 'F8_E4M3' else 'int'}{bits} {label}"
    )


def _fit_small(tensors: Tensors, name: str, group: dict[str, Any], dtype: str) -> FoundWeight | str:
    """Return a weight of small floats as a group describes it, or why it does not fit."""
    (kind, bits, scaled), form = SMALL[group["format"]], group["format"]
    module = name.rpartition(".")[0]
    weight, scale = tensors[name], tensors[f"{module}.weight_scale"]
    if (
        (weight.dtype, name.endswith("_packed"), len(weight.shape)) != (kind, bits < 8, 2)
        or (group["type"], group["num_bits"]) != ("float", bits)
        or 0 in weight.shape or weight.shape[1] * 8 % bits
    ):  # fmt: skip
        return f"expected {kind} [rows, columns] in {form}, floats of {bits} bits"
    (rows, width), strategy, size = weight.shape, group.get("strategy"), group.get("group_size")
    cols = width * 8 // bits
    if strategy not in ("group", "tensor_group") or not is_size(size) or cols % size:
        return f"no groups of {str(size)[:20]} of {cols} columns ({str(strategy)[:20]})"
    if (scale.dtype, scale.shape) != (scaled, (rows, cols // size)):
        found = f"{scale.dtype} {list(scale.shape)}"
        return f"{module}.weight_scale {found}: expected {scaled} {[rows, cols // size]}"
    if f"{module}.weight_zero_point" in tensors or group["symmetric"] is not True:
        return f"{module}.weight_zero_point: compressed-tensors leaves it out of small floats"
    names, divisor = [name, f"{module}.weight_scale"], tensors.get(f"{module}.weight_global_scale")
    if divisor is not None:
        names.append(f"{module}.weight_global_scale")
    if (divisor is None and strategy == "tensor_group") or (
        divisor is not None and (divisor.dtype, divisor.shape) != ("F32", (1,))
    ):
        found = f"{divisor.dtype} {list(divisor.shape)}" if divisor else "nothing"
        return f"{module}.weight_global_scale: found {found}, expected F32 [1]"
    source = Dequantised(
        f"{module}.weight", dtype, (rows, cols), weight, scale, (1, size),
        bits=bits % 8, product="BF16", divisor=divisor,
    )  # fmt: skip
    return FoundWeight(tuple(names), source, f"{form.partition('-')[0]} groups of {size}")
