"""Codecs: one block of a delta's values as bytes, and back. Pure numpy and zstd, no paths.

dense: the values as they are. sparse: a bitmap (one bit a value, little bit order) and the values
that are not zero. packed: the same two, the values turned left by one bit and split into byte
planes, each piece through zstd if that makes it smaller; a block of zeros takes no byte, one that
does not shrink is kept as it is. Decoding writes into a given buffer and believes nothing: no
length that the bytes claim is allocated before it is known to be right.
"""

import threading
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from skillvec.ops import compiled
from skillvec.ops.compiled import Kernel
from skillvec.ops.kernels import Array, Bytes
from skillvec.ops.special import bit_pattern

CODECS = ("zero", "dense", "sparse", "packed")
NO_BYTES: Bytes = np.zeros(0, np.uint8)
DENSE_SHARE = 15 / 16  # of non-zero values from which a bitmap costs more than it saves
WIDTHS = (2, 4, 8)  # bytes a value

# Huffman coding is what shrinks these planes; matches are rare, and short ones cost more time and
# bytes than they save. Against level 1: 12 % smaller and 2.4 times faster (docs/log.md).
ZSTD = {"min_match": 7, "hash_log": 6, "chain_log": 6, "window_log": 17, "search_log": 1}

_local = threading.local()  # zstd contexts serve one thread each


class Encoded(NamedTuple):
    """A block as bytes: `payload`, and for sparse the `bitmap` that is kept beside it."""

    payload: Bytes
    bitmap: Bytes = NO_BYTES


def room_nbytes(values: Array, codec: str) -> int:
    """Return how many bytes of room `encode_block` takes for values."""
    return 0 if codec == "dense" else 2 * values.nbytes + 2 * -(-values.size // 8) + 128


def encode_block(values: Array, codec: str, room: Bytes | None = None) -> Encoded:
    """Return a block of values (1-D, storage dtype, zeros positive) as bytes in a codec.

    The bytes are those of `values`, or lie in `room`, which a worker uses again for every block.
    """
    if codec == "dense":
        return Encoded(values.view(np.uint8))
    use, integers, width = _kernels(), bit_pattern(values), values.itemsize
    room = np.empty(room_nbytes(values, codec), np.uint8) if room is None else room
    bitmap, room = room[: -(-values.size // 8)], room[-(-values.size // 64) * 8 :]
    kept = room[: values.nbytes].view(integers.dtype)
    count = use.pick(integers, width, bitmap, kept)
    kept = kept[:count]
    if codec == "sparse":
        return Encoded(kept.view(np.uint8), bitmap)
    assert codec == "packed", codec
    if not count:
        return Encoded(NO_BYTES)
    if count > DENSE_SHARE * integers.size:
        kept, bitmap = integers, NO_BYTES
    head = np.zeros(1 + width, "<u4")
    begin = kept.nbytes + head.nbytes + bitmap.size  # the payload is put together before this
    planes = room[begin : begin + kept.nbytes]
    use.split(kept, width, planes)
    pieces = [_shrink(piece) for piece in (bitmap, *planes.reshape(width, -1))]
    head[:] = [len(piece) for piece in pieces]
    total = head.nbytes + int(head.sum())
    if total >= values.nbytes:
        return Encoded(values.view(np.uint8))
    parts = [head.view(np.uint8), *(np.frombuffer(piece, np.uint8) for piece in pieces)]
    return Encoded(np.concatenate(parts, out=room[:total]))


def decode_block(encoded: Encoded, codec: str, out: Array) -> None:
    """Write the values of an encoded block to `out`; raise ValueError where the bytes are wrong."""
    payload, bitmap = encoded
    if codec == "dense" or (codec == "packed" and payload.size == out.nbytes):
        if payload.size != out.nbytes:
            raise ValueError(f"{payload.size} bytes, expected {out.nbytes}")
        out.view(np.uint8)[:] = payload
        return
    integers = bit_pattern(out)
    if codec == "sparse":
        if payload.size % out.itemsize:
            raise ValueError(f"{payload.size} bytes are no whole number of values")
        _check_bitmap(bitmap, out.size)
        marked = _kernels().scatter(bitmap, payload.view(integers.dtype), out.itemsize, integers)
        if marked * out.itemsize != payload.size:
            stored = payload.size // out.itemsize
            raise ValueError(f"the bitmap marks {marked} values, {stored} are stored")
        return
    assert codec == "packed", codec
    if not payload.size:
        out.fill(0)
        return
    width = out.itemsize
    if payload.size < 4 * (1 + width):
        raise ValueError(f"{payload.size} bytes are too few for a packed block")
    lengths = payload[: 4 * (1 + width)].view("<u4").tolist()
    if sum(lengths) + 4 * (1 + width) != payload.size:
        raise ValueError(f"pieces of {lengths} bytes do not fill {payload.size}")
    pieces, end = [], 4 * (1 + width)
    for length in lengths:
        pieces.append(payload[end : end + length])
        end += length
    kept = integers
    if lengths[0]:
        bitmap = _expand(pieces[0], -(-out.size // 8))
        _check_bitmap(bitmap, out.size)
        kept = integers[out.size - _count_bits(bitmap) :]  # where `scatter` does not need room
    planes = [_expand(piece, kept.size) for piece in pieces[1:]]
    _kernels().join(*planes, *[NO_BYTES] * (8 - width), width, kept)
    if lengths[0]:
        _kernels().scatter(bitmap, kept, width, integers)


def _check_bitmap(bitmap: Bytes, numel: int) -> None:
    if bitmap.size != -(-numel // 8):
        raise ValueError(f"a bitmap of {bitmap.size} bytes for {numel} values")
    if numel % 8 and bitmap[-1] >> (numel % 8):
        raise ValueError("the bitmap is longer than the tensor")


def _count_bits(bitmap: Bytes) -> int:
    whole = bitmap.size & -8
    words = np.bitwise_count(bitmap[:whole].view("<u8")).sum(dtype=np.int64)
    return int(words + np.bitwise_count(bitmap[whole:]).sum(dtype=np.int64))


# ------------------------------------------------ what native/planes.c does, in numpy's words


def _pick(values: Array, width: int, bitmap: Bytes, kept: Array) -> int:
    """Write which values are not 0, and those; return how many they are."""
    changed = values != 0
    bitmap[:] = np.packbits(changed, bitorder="little")
    at = np.flatnonzero(changed)
    np.take(values, at, out=kept[: at.size], mode="clip")
    return at.size


def _scatter(bitmap: Bytes, values: Array, width: int, out: Array) -> int:
    """Set the values where the bitmap says, zero elsewhere; return how many it marks.

    The values may lie at the end of `out`. Nothing is written where they are not as many.
    """
    at = np.flatnonzero(np.unpackbits(bitmap, count=out.size, bitorder="little").view(np.bool_))
    if at.size == values.size:
        held = values.copy()
        out.fill(0)
        out[at] = held
    return at.size


def _split(values: Array, width: int, planes: Bytes) -> int:
    """Write the bytes of values turned by one bit (the sign below, the exponent in one plane)."""
    turned = (values << 1) | (values >> (8 * width - 1))
    planes.reshape(width, -1)[:] = turned.view(np.uint8).reshape(-1, width).T
    return 0


def _join(*args: Any) -> int:
    """Write the values of eight planes, of which those behind their width are empty."""
    *planes, width, out = args
    turned = np.stack(planes[:width], axis=1).reshape(-1).view(out.dtype)
    out[:] = (turned >> 1) | (turned << (8 * width - 1))
    return 0


class Kernels(NamedTuple):
    """What does the work: compiled, or numpy as above."""

    pick: Kernel = _pick
    scatter: Kernel = _scatter
    split: Kernel = _split
    join: Kernel = _join


SAMPLE = "025f4710e02387d2"  # XXH3 of it


def _sample(use: Kernels) -> bytes:
    """Return all that kernels write of a block of each width, there and back."""
    written = []
    number = np.arange(1, 1400, dtype=np.uint64)
    for width in WIDTHS:
        values = (number * 0x9E3779B97F4A7C15 >> (64 - 8 * width)).astype(f"<u{width}")
        values[number * number % 7 < 4] = 0
        bitmap, kept, out = np.zeros(-(-values.size // 8), np.uint8), values.copy(), values.copy()
        kept = kept[: use.pick(values, width, bitmap, kept)]
        planes, tail = np.zeros(kept.nbytes, np.uint8), out[values.size - kept.size :]
        use.split(kept, width, planes)
        use.join(*planes.reshape(width, -1), *[NO_BYTES] * (8 - width), width, tail)
        written += [kept.tobytes(), bitmap.tobytes(), planes.tobytes(), tail.tobytes()]
        use.scatter(bitmap, tail, width, out)
        written.append(out.tobytes())
    return b"".join(written)


@cache
def _kernels() -> Kernels:
    use = Kernels()
    for name in Kernels._fields:
        run = compiled.kernel(name, lambda k: _sample(Kernels()._replace(**{name: k})), SAMPLE)  # noqa: B023
        use = use._replace(**{name: run or getattr(use, name)})
    return use


def _shrink(piece: Bytes) -> Any:
    """Return the piece as one zstd frame if that is shorter, else as it is."""
    if not hasattr(_local, "compressor"):
        zstd: Any = import_module("zstandard")
        parameters = zstd.ZstdCompressionParameters(
            strategy=zstd.STRATEGY_FAST, write_content_size=1, write_checksum=0, **ZSTD
        )
        _local.compressor = zstd.ZstdCompressor(compression_params=parameters)
    frame = _local.compressor.compress(piece) if piece.size else b""
    return frame if len(frame) < piece.size else piece


def _expand(piece: Bytes, nbytes: int) -> Bytes:
    """Return the `nbytes` bytes that a piece holds; a frame must state this very size."""
    if piece.size == nbytes:
        return piece
    zstd: Any = import_module("zstandard")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstd.ZstdDecompressor(max_window_size=1 << 27)
    try:
        # the size that a frame states is what would be allocated
        stated = zstd.get_frame_parameters(piece).content_size
        if stated != nbytes or piece.size > nbytes:
            raise ValueError(f"a zstd frame of {stated} bytes, expected {nbytes}")
        content = _local.decompressor.decompress(piece, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise ValueError(f"broken zstd frame: {error}") from None
    if len(content) != nbytes:
        raise ValueError(f"a zstd frame of {len(content)} bytes, expected {nbytes}")
    return np.frombuffer(content, np.uint8)
