"""Formats of quantised weights with few rules: FP8, MXFP4, MLX, torchao, optimum-quanto.

The values are those that these libraries' own dequantisation gives, in the model's dtype where it
does not say one itself, bit for bit (NaNs up to their payload). Where they differ - FP8 whose edge
blocks happen to divide a matrix evenly - compressed-tensors is followed: its blocks have the size
that the config names.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from skillvec.checkpoints.dequantized import FP8, Dequantised, Sliced
from skillvec.checkpoints.quantized_format import PARTNERS, FoundWeight, Stated, cut_sizes, is_size
from skillvec.checkpoints.unread import FLOATS, Tensors
from skillvec.errors import IncompatibleError
from skillvec.files.tensors import Source, Viewed
from skillvec.files.views import Index, whole
from skillvec.ops.kernels import DTYPE_NAMES

# of optimum-quanto: bits of what is packed, and dtypes of what is not
PACKED = {"qint2": 2, "qint4": 4}
BYTES = {
    "qint8": "I8", "qfloat8": "F8_E4M3", "qfloat8_e4m3fn": "F8_E4M3", "qfloat8_e5m2": "F8_E5M2",
    "qfloat8_e4m3fnuz": "F8_E4M3FNUZ",
}  # fmt: skip
TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def find_fp8(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find 8-bit floats and pairs of E2M1 with `_scale_inv`, as transformers has them."""
    wanted = said.settings.get("weight_block_size", [128, 128])
    size = cut_sizes(wanted)
    if wanted is not None and size is None:
        raise IncompatibleError(f"weight_block_size {str(wanted)[:60]}, expected two sizes or null")
    for name, weight in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        pairs = weight.dtype == "I8" and len(weight.shape) > 1  # of E2M1, as DeepSeek has experts
        if not (weight.dtype in FP8 or pairs) or name.endswith(PARTNERS):
            continue
        if scale is None:  # of other dtypes nothing says how to read them
            if weight.dtype == "F8_E4M3":
                yield f"{name}: F8_E4M3 without {name}_scale_inv"
            continue
        shape = (*weight.shape[:-1], 2 * weight.shape[-1]) if pairs else weight.shape
        block = _fp8_block(shape, scale, None if pairs else size)
        if isinstance(block, str):
            found = f"{scale.dtype} {list(scale.shape)}"
            yield f"{name} {list(weight.shape)}: {name}_scale_inv {found}: {block}"
        else:
            kind = "per tensor" if scale.numel == 1 else f"blocks {block[0]}x{block[1]}"
            form = {"I8": "fp4", "F8_E4M3": "fp8"}.get(weight.dtype, weight.dtype.lower())
            bits = 4 if pairs else 0
            source = Dequantised(name, said.dtype, shape, weight, scale, block, bits=bits)
            yield FoundWeight((name, f"{name}_scale_inv"), source, f"{form} {kind}")


def _fp8_block(shape: Index, scale: Source, size: tuple[int, int] | None) -> tuple[int, int] | str:
    """Return rows and columns of a block, or what is wrong."""
    if scale.dtype not in (*FLOATS, "U8", "F8_E8M0"):
        return "expected a float or E8M0"
    if len(shape) < 2 or not all(shape) or not all(scale.shape):
        return "expected a matrix and its scales"
    (rows, cols), grid = shape[-2:], scale.shape[-2:]
    if scale.numel == 1 or (len(shape) == 3 and scale.shape == shape[:1]):
        return rows, cols
    if scale.shape[:-2] != shape[:-2] or len(grid) < 2:
        return "does not lie over the weight"
    even = None if rows % grid[0] or cols % grid[1] else (rows // grid[0], cols // grid[1])
    if size is None or grid != (-(-rows // size[0]), -(-cols // size[1])):
        return even or f"no grid of blocks of {size or 'one size'}"
    block = min(size[0], rows), min(size[1], cols)
    if len(shape) > 2 and even not in (None, block):
        return f"blocks of {block}, or of {even} in fused halves? cannot tell"
    return block


def find_mxfp4(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find pairs of `_blocks` and `_scales`, which gpt-oss holds transposed."""
    for name, tensor in tensors.items():
        plain, _, part = name.rpartition("_")
        blocks, scales = tensors.get(f"{plain}_blocks"), tensors.get(f"{plain}_scales")
        if tensor.dtype != "U8" or part not in ("blocks", "scales"):
            continue
        if blocks is None or scales is None:
            yield f"{name}: without its {'scales' if part == 'blocks' else 'blocks'}"
        elif part == "blocks":
            shape, found = blocks.shape, f"{scales.dtype} {list(scales.shape)}"
            if len(shape) != 4 or shape[3] != 16 or 0 in shape or (
                (scales.dtype, scales.shape) != ("U8", shape[:3])
            ):  # fmt: skip
                yield f"{name} {list(shape)}, scales {found}: expected U8 [e, r, g, 16], [e, r, g]"
                continue
            turned = (shape[0], shape[2] * 32, shape[1])
            source = Dequantised(
                plain, said.dtype, turned, blocks, scales, (1, 32), bits=4, turned=True, halved=True
            )
            yield FoundWeight((name, f"{plain}_scales"), source, "mxfp4")


def find_mlx(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find U32 weights with `scales` and `biases`, as mlx has them."""
    for name, weight in tensors.items():
        module, _, last = name.rpartition(".")
        scale, bias = (tensors.get(f"{module}.{part}") for part in ("scales", "biases"))
        if last == "scales" and bias is not None and f"{module}.weight" not in tensors:
            yield f"{name}: without the weight that it belongs to"
        if last != "weight" or weight.dtype != "U32":
            continue
        own = said.settings.get(module)
        own = own if isinstance(own, dict) else said.settings
        if own.get("mode", "affine") != "affine":
            raise IncompatibleError(
                f"{name}: mode {str(own['mode'])[:40]!r} of mlx, expected 'affine': dequantise the"
                " model with mlx_lm.convert --dequantize first"
            )
        if scale is None or bias is None:
            yield f"{name}: U32 without {module}.scales and {module}.biases"
            continue
        source = _of_mlx(weight, scale, bias, own.get("group_size"), own.get("bits"))
        if isinstance(source, str):
            yield f"{name} {list(weight.shape)}: {source}"
        else:
            note = f"mlx {source.bits} bits, groups of {source.block[1]}"
            yield FoundWeight((name, scale.name, bias.name), source, note)


def _of_mlx(
    weight: Source, scale: Source, bias: Source, size: object, bits: object
) -> Dequantised | str:
    """Return a weight in the dtype of its scales, in which mlx multiplies and adds."""
    if not is_size(size) or not is_size(bits, 8):
        return f"{str(bits)[:20]} bits in groups of {str(size)[:20]}"
    if len(weight.shape) < 2 or 0 in weight.shape or weight.shape[-1] * 32 % (bits * size):
        return f"no groups of {size} of {bits} bits"
    cols = weight.shape[-1] * 32 // bits
    grid = (*weight.shape[:-1], cols // size)
    parts = [(part.dtype, part.shape) for part in (scale, bias)]
    if scale.dtype not in FLOATS or parts != [(scale.dtype, grid)] * 2:
        found = ", ".join(f"{kind} {list(shape)}" for kind, shape in parts)
        return f"scales and biases {found}, expected floats {list(grid)}"
    return Dequantised(
        weight.name, scale.dtype, (*weight.shape[:-1], cols), weight, scale, (1, size), bits=bits,
        product=scale.dtype, shift=bias,
    )  # fmt: skip


def find_torchao(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find what the headers call tensors of torchao's classes, in their own dtype."""
    for name, text in said.headers.items():
        try:
            entry = json.loads(text)
            kind, inner = entry["_type"], entry.get("_data")
            parts = entry.get("_tensor_data_names", [])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # not of a tensor: format, recipe, tensor_names
        if kind == "Tensor":
            continue
        if kind not in TORCHAO or not set(parts) <= {"qdata", "scale", "zero_point"}:
            raise IncompatibleError(
                f"{name}: torchao's {str(kind)[:40]} of {str(parts)[:80]}, expected one of"
                f" {', '.join(TORCHAO)} without more: dequantise the model with torchao first"
            )
        stem, _, last = name.rpartition(".")
        names = [f"{stem}._{last}_{part}" for part in parts]
        held = dict(zip(parts, map(tensors.get, names), strict=True))
        source = _of_torchao(name, held, inner)
        if isinstance(source, str):
            yield f"{name}: {source}"
        else:
            yield FoundWeight(tuple(sorted(names)), source, f"torchao {kind}")


def _of_torchao(name: str, held: Mapping[str, Source | None], said: Any) -> Dequantised | str:
    """Return a weight of torchao, or what is wrong with it."""
    weight, scale, zero = (held.get(part) for part in ("qdata", "scale", "zero_point"))
    block, dtype = said.get("block_size"), DTYPE_NAMES.get(str(said.get("dtype", {}).get("_data")))
    if weight is None or scale is None or None in held.values():
        return "some of its tensors are missing"
    sizes = cut_sizes(block, weight.shape)
    if len(weight.shape) != 2 or sizes is None or weight.dtype not in ("I8", *FP8):
        return f"{weight.dtype} {list(weight.shape)} in blocks of {str(block)[:40]}"
    grid = tuple(n // size for n, size in zip(weight.shape, sizes, strict=True))
    uneven = any(n % size for n, size in zip(weight.shape, sizes, strict=True))
    if dtype not in FLOATS or scale.dtype not in FLOATS or uneven or (
        scale.shape != grid and not scale.numel == prod(grid) == 1
    ):  # fmt: skip
        return f"scale {scale.dtype} {list(scale.shape)}, expected floats {list(grid)}, for {dtype}"
    if zero is not None and (zero.dtype, zero.shape) != ("I8", grid):
        return f"zero_point {zero.dtype} {list(zero.shape)}, expected I8 {list(grid)}"
    return Dequantised(name, dtype, weight.shape, weight, scale, sizes, zero)


def find_quanto(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
    """Find `_data` and `_scale` of a weight, as optimum-quanto saves them, in the scales' dtype."""
    shapes: Mapping[str, Index] | None = None
    for name, data in tensors.items():
        if not name.endswith("._data"):
            continue
        plain = name.removesuffix("._data").removesuffix("._data")
        scale, shift = (tensors.get(f"{plain}.{part}") for part in ("_scale", "_shift"))
        entry = said.settings["map"].get(plain.rpartition(".")[0])
        kind = str(entry.get("weights"))[:40] if isinstance(entry, dict) else "nothing"
        source: Dequantised | Viewed | str
        if kind in PACKED and scale is not None and shift is not None:
            shapes = said.shapes() if shapes is None else shapes
            source = _packed_by_quanto(plain, PACKED[kind], data, scale, shift, shapes.get(plain))
        elif kind in BYTES and data.dtype == BYTES[kind] and scale is not None:
            source = _bytes_of_quanto(plain, data, scale)
        else:
            source = f"expected {', '.join((*PACKED, *BYTES))} and its scales, the map says {kind}"
        if isinstance(source, str):
            yield f"{name} {data.dtype} {list(data.shape)}: {source}"
        else:
            parts = (part for part in (scale, shift) if part is not None)
            yield FoundWeight((name, *(part.name for part in parts)), source, f"quanto {kind}")


def _bytes_of_quanto(name: str, data: Source, scale: Source) -> Dequantised | str:
    rows = data.shape[:1]
    if len(data.shape) != 2 or not data.numel or (
        scale.dtype not in FLOATS or scale.shape != (*rows, 1)
    ):  # fmt: skip
        return f"_scale {scale.dtype} {list(scale.shape)}, expected floats per row of a matrix"
    block = (1, data.shape[1])
    return Dequantised(name, scale.dtype, data.shape, data, scale, block, product=scale.dtype)


def _packed_by_quanto(
    name: str, bits: int, data: Source, scale: Source, shift: Source, shape: Index | None
) -> Viewed | str:
    """Return a weight of groups in the shape of the model's, or what is wrong with it."""
    if len(data.shape) != 2 or len(scale.shape) != 2 or scale.dtype not in FLOATS:
        return f"_scale {scale.dtype} {list(scale.shape)}, expected floats per group of a matrix"
    (height, width), groups = data.shape, scale.shape[0]
    if (shift.dtype, shift.shape, scale.shape) != (scale.dtype, scale.shape, (groups, 1)):
        return f"_shift {shift.dtype} {list(shift.shape)}, _scale {list(scale.shape)}"
    if data.dtype != "U8" or height != -(-groups * bits // 8) or not data.numel:
        return f"expected U8 of {groups} groups of {bits} bits"
    if shape is None or len(shape) != 2 or prod(shape) != groups * width or shape[1] % width:
        found = "which is not known" if shape is None else str(list(shape))
        return f"{groups} groups of {width} in the shape of the model's weight, {found}"
    codes = Sliced(name, (groups, width), data, bits)
    source = Dequantised(
        name, scale.dtype, (groups, width), codes, scale, (1, width), product=scale.dtype,
        shift=shift, sign=-1,
    )  # fmt: skip
    return Viewed(name, scale.dtype, whole(source, shape))
