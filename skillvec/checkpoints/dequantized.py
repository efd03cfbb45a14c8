"""Weights that are multiplied by their scales when they are read: codes, zero points, scales.

Hides how codes of a few bits are packed and what they stand for. Memory is bounded by tiles of 2^20
values.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skillvec.files.gather import fill, is_gathering
from skillvec.files.tensors import Derived, Source, read_values, values_of
from skillvec.files.views import Index, whole
from skillvec.ops.kernels import STORAGE_DTYPE, Array, F32Array, narrow, widen

TILE = 1 << 20  # values computed, and read, at a time
STEP = 1 << 16  # where they lie together: their intermediate results stay near the core


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
