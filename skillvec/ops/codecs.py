"""Codecs: one block of a delta's values as bytes, and back. Pure numpy and zstd, no paths.

dense: the values as they are. sparse: a bitmap (one bit a value, little bit order) and the values
that are not zero. packed: the same two, the values turned left by one bit and split into byte
planes, each piece through zstd if that makes it smaller; a block of zeros takes no byte, one that
does not shrink is kept as it is. Decoding writes into a given buffer and believes nothing: no
length that the bytes claim is allocated before it is known to be right.
"""

import threading
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from skillvec.ops.kernels import Array, Bytes
from skillvec.ops.special import bit_pattern

CODECS = ("zero", "dense", "sparse", "packed")
NO_BYTES: Bytes = np.zeros(0, np.uint8)
DENSE_SHARE = 15 / 16  # of non-zero values from which a bitmap costs more than it saves

# Huffman coding is what shrinks these planes; matches are rare, and short ones cost more time and
# bytes than they save. Against level 1: 12 % smaller and 2.4 times faster (docs/log.md).
ZSTD = {"min_match": 7, "hash_log": 6, "chain_log": 6, "window_log": 17, "search_log": 1}

_local = threading.local()  # zstd contexts serve one thread each


class Encoded(NamedTuple):
    """A block as bytes: `payload`, and for sparse the `bitmap` that is kept beside it."""

    payload: Bytes
    bitmap: Bytes = NO_BYTES


def encode_block(values: Array, codec: str) -> Encoded:
    """Return a block of values (1-D, storage dtype, zeros positive) as bytes in a codec."""
    if codec == "dense":
        return Encoded(values.view(np.uint8))
    integers = bit_pattern(values)
    changed = integers != 0
    count = int(np.count_nonzero(changed))
    bitmap = np.packbits(changed, bitorder="little")
    kept = integers if count == integers.size else integers[np.flatnonzero(changed)]
    if codec == "sparse":
        return Encoded(kept.view(np.uint8), bitmap)
    assert codec == "packed", codec
    if not count:
        return Encoded(NO_BYTES)
    if count > DENSE_SHARE * integers.size:
        kept, bitmap = integers, NO_BYTES
    width = values.dtype.itemsize
    turned = (kept << 1) | (kept >> (8 * width - 1))  # the sign below, the exponent in one plane
    planes = turned.view(np.uint8).reshape(-1, width)
    pieces = [_shrink(piece) for piece in (bitmap, *(planes[:, i].copy() for i in range(width)))]
    head = np.array([len(piece) for piece in pieces], "<u4").view(np.uint8)
    if head.size + sum(map(len, pieces)) >= values.nbytes:
        return Encoded(values.view(np.uint8))
    return Encoded(np.concatenate((head, *(np.frombuffer(piece, np.uint8) for piece in pieces))))


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
        _scatter(bitmap, payload.view(integers.dtype), integers)
        return
    assert codec == "packed", codec
    if not payload.size:
        out.fill(0)
        return
    width, raw_bitmap = out.itemsize, -(-out.size // 8)
    if payload.size < 4 * (1 + width):
        raise ValueError(f"{payload.size} bytes are too few for a packed block")
    lengths = payload[: 4 * (1 + width)].view("<u4").tolist()
    if sum(lengths) + 4 * (1 + width) != payload.size:
        raise ValueError(f"pieces of {lengths} bytes do not fill {payload.size}")
    ends = np.cumsum([4 * (1 + width), *lengths])
    pieces = [payload[ends[i] : ends[i + 1]] for i in range(1 + width)]
    count = out.size
    if lengths[0]:
        bitmap = _expand(pieces[0], raw_bitmap)
        count = int(np.bitwise_count(bitmap).sum(dtype=np.int64))
    planes = np.empty((count, width), np.uint8)
    for i in range(width):
        planes[:, i] = _expand(pieces[1 + i], count)
    turned = planes.reshape(-1).view(integers.dtype)
    values = (turned >> 1) | (turned << (8 * width - 1))
    if lengths[0]:
        _scatter(bitmap, values, integers)
    else:
        integers[:] = values


def _scatter(bitmap: Bytes, values: Array, out: Array) -> None:
    """Set the values where the bitmap says, zero elsewhere."""
    if bitmap.size != -(-out.size // 8):
        raise ValueError(f"a bitmap of {bitmap.size} bytes for {out.size} values")
    if out.size % 8 and bitmap[-1] >> (out.size % 8):
        raise ValueError("the bitmap is longer than the tensor")
    at = np.flatnonzero(np.unpackbits(bitmap, count=out.size, bitorder="little").view(np.bool_))
    if at.size != values.size:
        raise ValueError(f"the bitmap marks {at.size} values, {values.size} are stored")
    out.fill(0)
    out[at] = values


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
