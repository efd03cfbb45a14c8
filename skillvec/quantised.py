"""Quantised checkpoints: weights that are multiplied by their scales when they are read.

Hides FP8 (DeepSeek, Qwen, MiniMax: blocks, per tensor, fused experts), compressed-tensors (float-,
int-, naive- and pack-quantized, NVFP4, MXFP4, MXFP6, MXFP8), MXFP4 (gpt-oss), MLX (affine),
torchao (int8, float8, intx) and optimum-quanto. The values are those that these libraries' own
dequantisation gives, in the model's dtype where it does not say one itself, bit for bit (NaNs up to
their payload). Where they differ - FP8 whose edge blocks happen to divide a matrix evenly -
compressed-tensors is followed: its blocks have the size that the config names. What a tensor is
comes from its partners, never from a list of layers. Memory is bounded by tiles of 2^20 values.

Refused by name: other methods (bitsandbytes, gptq, awq, nvfp4, hqq, fbgemm_fp8, modelopt, ...) and
formats, reordered columns, rotated weights, scales without weights, weights without scales, and
what no config explains: 8-bit floats, and integers that are called weights or lie beside tensors
that scale them, whatever their names. Integer buffers (masks, positions, indexes, counts) pass.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeGuard

import numpy as np

from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.kernels import DTYPE_NAMES, STORAGE_DTYPE, Array, F32Array, narrow, widen
from skillvec.sources import (
    Derived,
    Index,
    Source,
    Viewed,
    fill,
    is_gathering,
    read_values,
    values_of,
    whole,
)
from skillvec.unread import FLOATS, Tensors, refuse_unexplained
from skillvec.unread import INTEGERS as INTEGERS
from skillvec.unread import LeftOut as LeftOut
from skillvec.unread import may_be_weight as may_be_weight
from skillvec.unread import nothing_left_out as nothing_left_out
from skillvec.unread import unexplained as unexplained

TILE = 1 << 20  # values computed, and read, at a time
STEP = 1 << 16  # where they lie together: their intermediate results stay near the core
MAX_SIDE = 1 << 40  # of a side that a config states
# of compressed-tensors: small floats in groups as (codes, bits, scales), and the others
SMALL = {
    "nvfp4-pack-quantized": ("U8", 4, "F8_E4M3"), "mxfp4-pack-quantized": ("U8", 4, "U8"),
    "mxfp6-pack-quantized": ("U8", 6, "U8"), "mxfp8-quantized": ("F8_E4M3", 8, "U8"),
}  # fmt: skip
# of optimum-quanto: bits of what is packed, and dtypes of what is not
PACKED = {"qint2": 2, "qint4": 4}
BYTES = {
    "qint8": "I8", "qfloat8": "F8_E4M3", "qfloat8_e4m3fn": "F8_E4M3", "qfloat8_e5m2": "F8_E5M2",
    "qfloat8_e4m3fnuz": "F8_E4M3FNUZ",
}  # fmt: skip
TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
HEADERS, SHAPES = "headers", "shapes"  # keys of `settings` for what else `dequantised` is given
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", *SMALL)
# what serves only kernels that compute in few bits
UNUSED = {
    "activations": (
        ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale",
        ".output_zero_point", "activation_scale",
    ),
    "the KV cache": (".q_scale", ".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point"),
}  # fmt: skip
# what means nothing without a weight beside it
PARTNERS = (
    "_scale_inv", ".weight_scale", ".weight_zero_point", ".weight_packed", ".weight_shape",
    ".weight_global_scale", ".weight_g_idx",
)  # fmt: skip


def _small_floats(exponents: int, mantissas: int, halvings: int = 0) -> F32Array:
    """Return the values of all codes of a sign and so many bits, none of them infinite."""
    code = np.arange(2 << exponents + mantissas)
    exponent, mantissa = code >> mantissas & (1 << exponents) - 1, code & (1 << mantissas) - 1
    whole = mantissa + (exponent > 0) * 2.0**mantissas
    power = np.maximum(exponent, 1) - (1 << exponents - 1) + 1 - mantissas - halvings
    size = np.ldexp(whole, power)
    return np.array(np.where(code >> exponents + mantissas, -size, size), np.float32)


E4M3, E4M3FNUZ = _small_floats(4, 3), _small_floats(4, 3, 1)
E5M2, E5M2FNUZ = _small_floats(5, 2), _small_floats(5, 2, 1)
E4M3[[127, 255]] = E4M3FNUZ[128] = E5M2FNUZ[128] = np.nan
E5M2[[124, 252]] = np.inf, -np.inf
E5M2[[125, 126, 127, 253, 254, 255]] = np.nan
FP8 = {
    "F8_E4M3": E4M3,
    "F8_E5M2": E5M2,
    "F8_E4M3FNUZ": E4M3FNUZ,
    "F8_E5M2FNUZ": E5M2FNUZ,
}
RAW: dict[str, Any] = STORAGE_DTYPE | dict.fromkeys((*FP8, "F8_E8M0"), np.dtype("u1"))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M3 = _small_floats(2, 3)
# both of a byte, low half first, as one number of 64 bits
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], 1).view(np.uint64).reshape(-1)
TWICE = (2 * PAIRS.view(np.float32)).view(np.uint64)
HALVED = np.ldexp(np.float32(1), np.arange(256) - 128)  # so that 2^128 need not be held
with np.errstate(over="ignore"):
    POWERS = 2 * HALVED  # 255 is infinite in U8,
E8M0 = np.where(np.isinf(POWERS), np.float32(np.nan), POWERS)  # and no number in F8_E8M0
TABLES = {"U8": POWERS, "F8_E8M0": E8M0, "F8_E4M3": E4M3}  # of scales of a byte


@dataclass(frozen=True)
class Dequantised(Derived):
    """A weight, less its zero points, times the scales of its blocks.

    The last two dimensions of `shape`, swapped where `turned`, are a matrix of codes stored row by
    row: one a byte, or packed (`bits` > 0) with an offset of 2^(bits-1) in I32, as E2M1 (4 bits) or
    E2M3 (6) in bytes. `divisor` is one value that divides all scales. Where `halved`, codes count
    twice and powers half, so that 2^128 need not be held. The product is rounded to `product`, then
    to `dtype`. Where there is a `shift`, `sign` times that is added to the product, and the sum
    rounded in the same way.
    """

    name: str
    dtype: str
    shape: Index
    weight: Source
    scale: Source
    block: tuple[int, int]
    zero: Source | None = None
    bits: int = 0
    product: str = "F32"
    turned: bool = False
    divisor: Source | None = None
    halved: bool = False
    shift: Source | None = None
    sign: int = 1

    @property
    def parts(self) -> tuple[Source, ...]:
        rest = (self.zero, self.divisor, self.shift)
        return (self.weight, self.scale, *(part for part in rest if part is not None))

    def read(self, begin: int, out: Array) -> None:
        if self.turned and is_gathering():
            experts, height, width = self.shape
            stored = replace(self, shape=(experts, width, height), turned=False)
            fill(self, whole(stored, stored.shape).transpose(1, 2), begin, out, read_values)
            return
        height, width = self.shape[-2:]
        most = TILE if self.turned else min(STEP, TILE)
        at = 0
        while at < out.size:  # whole rows of one matrix, or a part of one row
            row, low = divmod(begin + at, width)
            count = min((out.size - at) // width, most // width, height - row % height)
            count, low, high = (count, 0, width) if count and not low else (1, low, width)
            high = min(high, low + out.size - at, low + most)
            rows, cols = (row % height, row % height + count), (low, high)
            if self.turned:
                values = self._box(row // height, cols, rows).T
            else:
                values = self._box(row // height, rows, cols)
            room = out[at : at + values.size].reshape(values.shape)
            room[...] = narrow(np.ascontiguousarray(values), self.dtype)
            at += values.size

    def _box(self, number: int, rows: tuple[int, int], cols: tuple[int, int]) -> F32Array:
        """Return a box of a stored matrix."""
        with np.errstate(all="ignore"):
            values = self._codes(number, rows, cols)
            if self.zero is not None:
                values = values - self._per_block(self.zero, number, rows, cols)
            scales = self._per_block(self.scale, number, rows, cols)
            if self.divisor is not None:
                divisor: F32Array = values_of(self.divisor, 0, 1)
                scales = scales / divisor
            values = values * scales
            if self.shift is not None:
                shifts = self._per_block(self.shift, number, rows, cols)
                values = self._rounded(values) + self.sign * shifts
        return values if self.product == self.dtype else self._rounded(values)

    def _rounded(self, values: F32Array) -> F32Array:
        if self.product == "F32":
            return values
        rounded: F32Array = widen(narrow(values, self.product), self.product)
        return rounded

    @property
    def _matrix(self) -> tuple[int, int]:
        rows, cols = self.shape[-2:]
        return (cols, rows) if self.turned else (rows, cols)

    def _codes(self, number: int, rows: tuple[int, int], cols: tuple[int, int]) -> F32Array:
        (height, width), (low, high) = self._matrix, cols
        first, count = number * height + rows[0], rows[1] - rows[0]
        if not self.bits:
            codes = _read_box(self.weight, first, count, width, low, high)
            table = FP8.get(self.weight.dtype)
            return codes.astype(np.float32) if table is None else table[codes]
        unit = 32 if self.weight.dtype in ("I32", "U32") else 8
        start, stop = low * self.bits // unit, -(-high * self.bits // unit)
        width = -(-width * self.bits // unit)
        words = _read_box(self.weight, first, count, width, start, stop)
        if unit == 32:
            codes = _unpack(words, self.bits, low * self.bits - 32 * start, high - low)
            offset = 1 << (self.bits - 1) if self.weight.dtype == "I32" else 0
            return codes.astype(np.float32) - np.float32(offset)
        if self.bits == 6:
            return E2M3[_unpack(words, 6, low * 6 - 8 * start, high - low)]
        pairs = TWICE if self.halved else PAIRS
        both = np.take(pairs, words.view(np.uint8)).view(np.float32)
        return both.reshape(count, -1)[:, low - 2 * start : high - 2 * start]

    def _per_block(
        self, source: Source, number: int, rows: tuple[int, int], cols: tuple[int, int]
    ) -> F32Array:
        """Return scales or zero points so that they broadcast over a box of the matrix."""
        grid = [-(-n // size) for n, size in zip(self._matrix, self.block, strict=True)]
        (top, bottom), (left, right) = (
            (low // size, (high - 1) // size + 1)
            for (low, high), size in zip((rows, cols), self.block, strict=True)
        )
        if source.dtype == "I32":  # zero points, packed down the rows
            word, end = top * self.bits // 32, -(-bottom * self.bits // 32)
            words = _read_box(source, word, end - word, grid[1], left, right).T
            codes = _unpack(words, self.bits, top * self.bits - 32 * word, bottom - top).T
            values = codes.astype(np.float32) - np.float32(1 << (self.bits - 1))
        else:
            first = top + (number * grid[0] if source.numel > 1 else 0)
            raw = _read_box(source, first, bottom - top, grid[1], left, right)
            if source.dtype in TABLES:
                values = (HALVED if self.halved else TABLES[source.dtype])[raw]
            else:
                values = widen(raw, source.dtype)
        if right - left > 1:
            values = values[:, np.arange(*cols) // self.block[1] - left]
        if bottom - top > 1 and self.block[0] > 1:
            values = values[np.arange(*rows) // self.block[0] - top]
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Sliced(Derived):
    """Codes of a few bits of which optimum-quanto lays whole rows over each other in bytes.

    The first rows are the low bits of all bytes, the next ones the bits above them.
    """

    name: str
    shape: Index
    packed: Source
    bits: int
    dtype: str = "U8"

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.packed,)

    def read(self, begin: int, out: Array) -> None:
        at = 0
        while at < out.size:
            layer, offset = divmod(begin + at, self.packed.numel)
            count = min(out.size - at, self.packed.numel - offset)
            part = out[at : at + count]
            read_values(self.packed, offset, part)
            part >>= self.bits * layer
            part &= (1 << self.bits) - 1
            at += count


def _read_box(source: Source, first: int, count: int, width: int, low: int, high: int) -> Array:
    """Return some columns of some rows of a source seen as rows of `width` values."""
    box = np.empty((count, high - low), RAW[source.dtype])
    step = count if high - low == width else max(1, TILE // width)
    for at in range(0, count, step):
        rows = min(step, count - at)
        begin, end = (0, width) if rows > 1 else (low, high)
        slab = np.empty((rows, end - begin), box.dtype)
        read_values(source, (first + at) * width + begin, slab.reshape(-1))
        box[at : at + rows] = slab[:, low - begin : high - begin]
    return box


def _unpack(words: Array, bits: int, begin: int, count: int) -> Array:
    """Return `count` codes of each row of words of 32 bits, or of 8, from bit `begin` on."""
    unit = 8 * words.itemsize
    position = begin + bits * np.arange(count)
    index, offset = position // unit, (position % unit).astype(np.uint32)
    words = np.ascontiguousarray(words).view(f"u{words.itemsize}").astype(np.uint32, copy=False)
    codes = words[:, index] >> offset
    over = np.flatnonzero(offset + bits > unit)
    codes[:, over] |= words[:, index[over] + 1] << (unit - offset[over])
    return codes & np.uint32((1 << bits) - 1)


Found = tuple[
    tuple[str, ...], Dequantised | Viewed, str
]  # the names it takes, what they give, the note
Settings = Mapping[str, Any]


def dequantised(
    tensors: Tensors,
    config: Mapping[str, Any],
    what: str,
    left_out: LeftOut = nothing_left_out,
    headers: Mapping[str, str] = {},
    shapes: Callable[[], Mapping[str, Index]] = dict,
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the tensors with quantised weights under their plain names, read dequantised.

    `tensors` have their safetensors dtypes, `config` is the parsed config.json, `what` names the
    checkpoint in errors. Weights get the config's dtype, bf16 where it has none. The second result
    says of each weight how it was quantised and of each tensor left out why. Reads headers only,
    but for the 16 bytes that tell the width of integers packed per channel. `headers` are the
    metadata of the files, in which torchao says what it wrote; `shapes` gives those of the model's
    weights, of which optimum-quanto's groups of 4 and 2 bits do not tell. What no config explains
    stays as it is where all of it is `left_out`. Raises FormatError for partners that are missing
    or do not fit, IncompatibleError for what is not taken.
    """
    nested = [value for value in config.values() if isinstance(value, dict)]
    entries = [c["quantization_config"] for c in (config, *nested) if c.get("quantization_config")]
    if not entries and _is_mlx(config.get("quantization")):
        entries = [config["quantization"]]
    if not entries:
        refuse_unexplained(tensors, config, what, left_out)
        return dict(tensors), {}
    settings = entries[0] if isinstance(entries[0], dict) else {"quant_method": f"{entries[0]}?"}
    unnamed = "mlx" if _is_mlx(settings) else "unnamed method"
    method = str(settings.get("quant_method", unnamed))
    if method not in METHODS or any(entry != settings for entry in entries):
        raise IncompatibleError(
            f"{what}: quantised ({method[:40]}; {len(entries)} quantization_config), expected one"
            f" of {', '.join(METHODS)}: dequantise the model with the library that made it, and"
            " save it, first"
        )
    standing: dict[str, Source] = {}
    notes: dict[str, str] = {}
    problems, taken = [], set[str]()
    try:
        said = settings | {HEADERS: headers, SHAPES: shapes}
        for found in METHODS[method](tensors, said, _model_dtype(config)):
            if isinstance(found, str):
                problems.append(found)
                continue
            names, source, note = found
            if source.name in notes or (source.name in tensors and source.name not in names):
                problems.append(f"{source.name}: also made by {names[0]}: which is the weight?")
            standing[names[0]], notes[source.name] = source, note
            taken.update(names)
    except IncompatibleError as error:
        raise IncompatibleError(f"{what}: {error}") from None
    result: dict[str, Source] = {}
    for name, tensor in tensors.items():
        uses = [use for use, ends in UNUSED.items() if name.endswith(ends)]
        if name in standing:
            result[standing[name].name] = standing[name]
        elif uses and name not in taken:
            notes[name] = f"not a weight: scales {uses[0]}"
        elif name not in taken:
            result[name] = tensor
    if not problems:
        left = [name for name in result if name.endswith(PARTNERS)]
        problems = [f"{name}: without the weight that it belongs to" for name in left]
    if problems:
        raise FormatError(f"{what}: {method} tensors that do not fit:\n{up_to_five(problems)}")
    refuse_unexplained(result, config, what, left_out)
    return result, notes


def _model_dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    configs = (config, text) if isinstance(text, dict) else (config,)
    named = [c[key] for c in configs for key in ("dtype", "torch_dtype") if c.get(key) is not None]
    dtype = str(named[0]).removeprefix("torch.") if named else "bfloat16"
    if DTYPE_NAMES.get(dtype) not in FLOATS:
        raise IncompatibleError(
            f"config.json: dtype {dtype[:40]!r}, expected bfloat16, float16 or float32, in which to"
            " dequantise the weights"
        )
    return DTYPE_NAMES[dtype]


def _is_size(value: object, most: int | None = None) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= (MAX_SIDE if most is None else most)


def _sizes(pair: object, most: Index | None = None) -> tuple[int, int] | None:
    """Return two sizes that someone wrote, cut to a matrix; None where they are no sizes."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_size, pair)):
        return None
    rows, columns = most or (MAX_SIDE, MAX_SIDE)
    return min(pair[0], rows), min(pair[1], columns)


def _fp8(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
    """Find 8-bit floats and pairs of E2M1 with `_scale_inv`, as transformers has them."""
    wanted = settings.get("weight_block_size", [128, 128])
    size = _sizes(wanted)
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
            source = Dequantised(name, dtype, shape, weight, scale, block, bits=bits)
            yield (name, f"{name}_scale_inv"), source, f"{form} {kind}"


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


def _compressed(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
    """Find the weights of compressed-tensors: of its groups, the one that the headers fit."""
    groups = list(_groups(settings))
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
            (_fit_small if group["format"] in SMALL else _fit)(tensors, name, group, dtype)
            for group in groups
        ]
        fits = {found[1]: found for found in tried if not isinstance(found, str)}
        if len(fits) == 1:
            yield next(iter(fits.values()))
        else:
            why = "; ".join(dict.fromkeys(str(t) for t in tried)) or "no config group"
            why = "fits more than one config group" if fits else why[:300]
            yield f"{name} {weight.dtype} {list(weight.shape)}: {why}"


def _groups(settings: Settings) -> Iterator[dict[str, Any]]:
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
        if form not in FORMATS or not _is_size(bits, 8):
            raise IncompatibleError(
                f"compressed-tensors format {str(form)[:40]!r}, weights {str(weights)[:80]}:"
                f" expected {', '.join(FORMATS)} of at most 8 bits: decompress the model first"
            )
        yield {"type": "int", "symmetric": True, **weights, "num_bits": bits, "format": form}


def _fit(tensors: Tensors, name: str, group: dict[str, Any], dtype: str) -> Found | str:
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
        if strategy == "group" and _is_size(size) and len(scale.shape) == 2:
            cols = scale.shape[1] * size
        else:
            rows, cols = map(int, values_of(stored, 0, 2))
        if (rows, -(-cols * bits // 32)) != weight.shape:
            return f"{weight.shape[1]} words hold no {cols} columns of {bits} bits"
    block = {
        "tensor": (rows, cols), "channel": (1, cols), "block": group.get("block_structure"),
        "group": (1, size if _is_size(size) and cols % size == 0 else None),
    }.get(strategy)  # fmt: skip
    block = _sizes(block, (rows, cols))
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
    return tuple(names), source, f"{'fp' if kind == 'F8_E4M3' else 'int'}{bits} {label}"


def _fit_small(tensors: Tensors, name: str, group: dict[str, Any], dtype: str) -> Found | str:
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
    if strategy not in ("group", "tensor_group") or not _is_size(size) or cols % size:
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
    return tuple(names), source, f"{form.partition('-')[0]} groups of {size}"


def _mxfp4(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
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
                plain, dtype, turned, blocks, scales, (1, 32), bits=4, turned=True, halved=True
            )
            yield (name, f"{plain}_scales"), source, "mxfp4"


def _is_mlx(settings: object) -> bool:
    """Return whether settings are those of mlx, which names no method."""
    return isinstance(settings, dict) and {"group_size", "bits"} <= set(settings)


def _mlx(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
    """Find U32 weights with `scales` and `biases`, as mlx has them."""
    for name, weight in tensors.items():
        module, _, last = name.rpartition(".")
        scale, bias = (tensors.get(f"{module}.{part}") for part in ("scales", "biases"))
        if last == "scales" and bias is not None and f"{module}.weight" not in tensors:
            yield f"{name}: without the weight that it belongs to"
        if last != "weight" or weight.dtype != "U32":
            continue
        own = settings.get(module)
        own = own if isinstance(own, dict) else settings
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
            yield (name, scale.name, bias.name), source, note


def _of_mlx(
    weight: Source, scale: Source, bias: Source, size: object, bits: object
) -> Dequantised | str:
    """Return a weight in the dtype of its scales, in which mlx multiplies and adds."""
    if not _is_size(size) or not _is_size(bits, 8):
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


def _torchao(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
    """Find what the headers call tensors of torchao's classes, in their own dtype."""
    for name, said in settings[HEADERS].items():
        try:
            entry = json.loads(said)
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
            yield tuple(sorted(names)), source, f"torchao {kind}"


def _of_torchao(name: str, held: Mapping[str, Source | None], said: Any) -> Dequantised | str:
    """Return a weight of torchao, or what is wrong with it."""
    weight, scale, zero = (held.get(part) for part in ("qdata", "scale", "zero_point"))
    block, dtype = said.get("block_size"), DTYPE_NAMES.get(str(said.get("dtype", {}).get("_data")))
    if weight is None or scale is None or None in held.values():
        return "some of its tensors are missing"
    sizes = _sizes(block, weight.shape)
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


def _quanto(tensors: Tensors, settings: Settings, dtype: str) -> Iterator[Found | str]:
    """Find `_data` and `_scale` of a weight, as optimum-quanto saves them, in the scales' dtype."""
    shapes: Mapping[str, Index] | None = None
    for name, data in tensors.items():
        if not name.endswith("._data"):
            continue
        plain = name.removesuffix("._data").removesuffix("._data")
        scale, shift = (tensors.get(f"{plain}.{part}") for part in ("_scale", "_shift"))
        said = settings["map"].get(plain.rpartition(".")[0])
        kind = str(said.get("weights"))[:40] if isinstance(said, dict) else "nothing"
        source: Dequantised | Viewed | str
        if kind in PACKED and scale is not None and shift is not None:
            shapes = settings[SHAPES]() if shapes is None else shapes
            source = _packed_by_quanto(plain, PACKED[kind], data, scale, shift, shapes.get(plain))
        elif kind in BYTES and data.dtype == BYTES[kind] and scale is not None:
            source = _bytes_of_quanto(plain, data, scale)
        else:
            source = f"expected {', '.join((*PACKED, *BYTES))} and its scales, the map says {kind}"
        if isinstance(source, str):
            yield f"{name} {data.dtype} {list(data.shape)}: {source}"
        else:
            parts = (part for part in (scale, shift) if part is not None)
            yield (name, *(part.name for part in parts)), source, f"quanto {kind}"


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


METHODS = {
    "fp8": _fp8, "mxfp8": _fp8, "compressed-tensors": _compressed, "mxfp4": _mxfp4,
    "mlx": _mlx, "torchao": _torchao, "quanto": _quanto,
}  # fmt: skip
