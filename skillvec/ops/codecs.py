"""Codecs: one block of a delta's values as bytes, and back. Pure numpy and zstd, no paths.

dense: the values as they are. sparse: a bitmap (one bit a value, little bit order) and the values
that are not zero. packed: the same two, the values turned left by one bit and split into byte
planes, each piece through zstd if that makes it smaller; a block of zeros takes no byte, one that
does not shrink is kept as it is. Of many 16-bit values most are among the 255 most frequent ones:
then a byte each says which, and only those and the few others become planes. Decoding writes into
a given buffer and believes nothing: no length that the bytes claim is allocated before it is known
to be right.
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
PATTERNS = 1 << 16
ESCAPE = 255  # the rank of values that are not in the table
RANKED = 1 << 31  # in the first word of a block with ranks
# where ranks are better: a table pays, and what is not in it is at most one value in eight
LEAST_RANKED, ESCAPES = 4096, 8

# Huffman coding is what shrinks these planes; matches are rare, and short ones cost more time and
# bytes than they save. Against level 1: 12 % smaller and 2.4 times faster (docs/log.md).
ZSTD = {"min_match": 7, "hash_log": 6, "chain_log": 6, "window_log": 17, "search_log": 1}

_local = threading.local()  # zstd contexts serve one thread each


class Encoded(NamedTuple):
    """A block as bytes: `payload`, and for sparse the `bitmap` that is kept beside it.

    `ranked` is whether the payload has the form with ranks, which is of schema 2.
    """

    payload: Bytes
    bitmap: Bytes = NO_BYTES
    ranked: bool = False


def room_nbytes(values: Array, codec: str) -> int:
    """Return how many bytes of room `encode_block` takes for values."""
    return 0 if codec == "dense" else 2 * values.nbytes + 2 * -(-values.size // 8) + 128


def encode_block(
    values: Array, codec: str, room: Bytes | None = None, loose: float = 0.0
) -> Encoded:  # fmt: skip
    """Return a block of values (1-D, storage dtype, zeros positive) as bytes in a codec.

    The bytes are those of `values`, or lie in `room`, which a worker uses again for every block.
    A packed block that takes at most the share `loose` of its values without zstd is left so.
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
    # what is made of them; before it is room for the payload, which is put together at the end
    work = room[-(-(kept.nbytes + bitmap.size + 64) // 8) * 8 :][: kept.nbytes]
    marker, pieces = _ranked(kept, work) if width == 2 else ((), [])
    if not pieces:
        use.split(kept, width, work)
        pieces = [*work.reshape(width, -1)]
    pieces = [bitmap, *pieces]
    if sum(map(len, pieces)) > loose * values.nbytes:
        pieces = [_shrink(piece) for piece in pieces]
    head = np.array([*marker, *map(len, pieces)], "<u4").view(np.uint8)
    total = head.size + sum(map(len, pieces))
    if total >= values.nbytes:
        return Encoded(values.view(np.uint8))
    parts = [head, *(np.frombuffer(piece, np.uint8) for piece in pieces)]
    return Encoded(np.concatenate(parts, out=room[:total]), ranked=bool(marker))


def is_packed_within(values: Array, share: float) -> bool:
    """Return whether a packed block takes less than a share of the bytes of its values."""
    width, limit = values.itemsize, share * values.nbytes
    count = int(np.count_nonzero(bit_pattern(values)))
    # where no piece shrinks; most blocks need no closer look
    most = 4 * (1 + width) + -(-values.size // 8) + count * width
    if most < limit and count < LEAST_RANKED and count <= DENSE_SHARE * values.size:
        return True
    return encode_block(values, "packed").payload.size < limit


def _ranked(kept: Array, work: Bytes) -> tuple[tuple[int, ...], list[Bytes]]:
    """Return the marker and the pieces of 16-bit values as ranks, none where planes are better.

    The pieces lie in `work`, which has two bytes a value.
    """
    use, count = _kernels(), kept.size
    if count < LEAST_RANKED:
        return (), []
    if not hasattr(_local, "tallies"):
        _local.tallies = np.zeros(PATTERNS, np.uint32), np.zeros(PATTERNS, np.uint64)
    found = _local.tallies[1][: use.tally(kept, *_local.tallies)]
    if found.size > ESCAPE:
        found = np.partition(found, found.size - ESCAPE)[-ESCAPE:]
    table = np.sort((found % PATTERNS).astype(kept.dtype))
    escaped = count - int((found // PATTERNS).sum())
    if escaped * ESCAPES > count:
        return (), []
    rank_of = np.full(PATTERNS, ESCAPE, np.uint8)
    rank_of[table] = np.arange(table.size)
    ranks, rest = work[:count], work[-(-count // 8) * 8 :]
    listed = rest[: 2 * (table.size + escaped)].view(kept.dtype)
    planes = rest[listed.nbytes :][: listed.nbytes]
    listed[: table.size] = table
    use.rank(kept, rank_of, ranks, listed[table.size :])
    use.split(listed, 2, planes)
    return (RANKED | table.size,), [ranks, *planes.reshape(2, -1)]


def decode_block(encoded: Encoded, codec: str, out: Array) -> None:
    """Write the values of an encoded block to `out`; raise ValueError where the bytes are wrong."""
    payload, bitmap, _ = encoded
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
    width, raw = out.itemsize, payload.size
    begin = 4 * (width == 2 and raw >= 20 and payload[3] > 127)  # where the lengths begin
    end = begin + 4 * (4 if begin else 1 + width)
    if raw < end:
        raise ValueError(f"{raw} bytes are too few for a packed block")
    lengths = payload[begin:end].view("<u4").tolist()
    if sum(lengths) + end != raw:
        raise ValueError(f"pieces of {lengths} bytes do not fill {raw}")
    pieces = []
    for length in lengths:
        pieces.append(payload[end : end + length])
        end += length
    kept = integers
    if lengths[0]:
        bitmap = _expand(pieces[0], -(-out.size // 8))
        _check_bitmap(bitmap, out.size)
        kept = integers[out.size - _count_bits(bitmap) :]  # where `scatter` does not need room
    if begin:
        table_size = int(payload[:4].view("<u4")[0]) - RANKED
        _unranked(pieces[1:], table_size, kept)
    else:
        _joined(pieces[1:], kept)
    if lengths[0]:
        _kernels().scatter(bitmap, kept, width, integers)


def _joined(pieces: list[Bytes], out: Array) -> None:
    """Write the values whose planes pieces hold."""
    planes = [_expand(piece, out.size) for piece in pieces]
    _kernels().join(*planes, *[NO_BYTES] * (8 - len(planes)), len(planes), out)


def _unranked(pieces: list[Bytes], table_size: int, out: Array) -> None:
    """Write the values whose ranks, table and escapes pieces hold."""
    if not 1 <= table_size <= ESCAPE:
        raise ValueError(f"a table of {table_size} values, expected 1 to {ESCAPE}")
    ranks = _expand(pieces[0], out.size)
    escaped = int(np.count_nonzero(ranks == ESCAPE))
    listed = np.empty(table_size + escaped, out.dtype)
    _joined(pieces[1:], listed)
    table = listed[:table_size]
    if not (table[1:] > table[:-1]).all():
        raise ValueError("the values of the table do not rise")
    if _kernels().unrank(ranks, listed, table_size, out) > out.size:
        raise ValueError(f"a rank behind the table of {table_size} values")


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


def _tally(values: Array, counts: Array, found: Array) -> int:
    """Count 16-bit patterns, and write count * 65,536 + pattern of those there are, in order."""
    counts[:] = np.bincount(values, minlength=PATTERNS)
    at = np.flatnonzero(counts)
    found[: at.size] = counts[at].astype(np.uint64) * PATTERNS + at.astype(np.uint64)
    return at.size


def _rank(values: Array, rank_of: Bytes, ranks: Bytes, escapes: Array) -> int:
    """Write the rank of each value, and the values that have none; return how many those are."""
    np.take(rank_of, values, out=ranks, mode="clip")
    none = ranks == ESCAPE
    escaped = int(np.count_nonzero(none))
    escapes[:escaped] = values[none]
    return escaped


def _unrank(ranks: Bytes, listed: Array, table_size: int, out: Array) -> int:
    """Write the values that have ranks, which `listed` has first, and then those that have none.

    Returns how many have none, and more than all where one has a rank behind the table; writes
    nothing where `listed` does not fit them.
    """
    none = ranks == ESCAPE
    escaped = int(np.count_nonzero(none))
    if int(np.count_nonzero(ranks >= table_size)) > escaped:
        return ranks.size + 1
    if listed.size == table_size + escaped:
        table = np.zeros(ESCAPE + 1, listed.dtype)
        table[:table_size] = listed[:table_size]
        np.take(table, ranks, out=out, mode="clip")
        out[none] = listed[table_size:]
    return escaped


class Kernels(NamedTuple):
    """What does the work: compiled, or numpy as above."""

    pick: Kernel = _pick
    scatter: Kernel = _scatter
    split: Kernel = _split
    join: Kernel = _join
    tally: Kernel = _tally
    rank: Kernel = _rank
    unrank: Kernel = _unrank


SAMPLE = "45f08e02b494fa9c"  # XXH3 of it


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
    kept = kept.view("<u2") % 400
    counts, found = np.zeros(PATTERNS, np.uint32), np.zeros(PATTERNS, np.uint64)
    found = found[: use.tally(kept, counts, found)]
    rank_of = (np.arange(PATTERNS) % 400).clip(0, ESCAPE).astype(np.uint8)
    ranks, listed, out = np.zeros(kept.size, np.uint8), kept.copy(), kept.copy()
    listed[:ESCAPE] = np.arange(ESCAPE)
    listed = listed[: ESCAPE + use.rank(kept, rank_of, ranks, listed[ESCAPE:])]
    use.unrank(ranks, listed, ESCAPE, out)
    written += [array.tobytes() for array in (counts, found, ranks, listed, out)]
    return b"".join(written)


@cache
def _kernels() -> Kernels:
    found = compiled.kernels(Kernels._fields, lambda run: _sample(Kernels(*run)), SAMPLE)
    return Kernels(*found or ())


@cache
def _zstd() -> Any:
    return import_module("zstandard")


def _shrink(piece: Bytes) -> Any:
    """Return the piece as one zstd frame if that is shorter, else as it is."""
    if not hasattr(_local, "compressor"):
        zstd = _zstd()
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
    zstd = _zstd()
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
