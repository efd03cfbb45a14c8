"""Codecs: every bit pattern comes back, and bytes that others wrote are refused, never believed."""

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import reader
import zstandard
from families import bits
from hypothesis import example, given
from hypothesis import strategies as st

from skillvec.ops import codecs
from skillvec.ops.codecs import CODECS, Encoded, decode_block, encode_block
from skillvec.ops.kernels import STORAGE_DTYPE, narrow, widen

STORED = CODECS[1:]
DTYPES = ("BF16", "F16", "F32", "F64")


def made(dtype: str, size: int, density: float, kind: str, seed: int) -> np.ndarray:
    """Return a block of which about `density` is not 0, as values of the storage dtype.

    `wild` are any bit patterns (-0, NaN, infinities among them), `steps` small multiples of a few
    powers of two, as fine-tuning leaves them, `subnormal` the smallest numbers of either sign.
    """
    rng = np.random.default_rng(seed)
    unsigned = np.dtype(f"<u{np.dtype(STORAGE_DTYPE[dtype]).itemsize}")
    top = np.array(1, unsigned) << np.array(8 * unsigned.itemsize - 1, unsigned)
    if kind == "wild":
        patterns = np.frombuffer(rng.bytes(size * unsigned.itemsize), unsigned).copy()
    elif kind == "steps":
        patterns = rng.integers(1, 5, size).astype(unsigned) << (8 * unsigned.itemsize - 9)
    else:
        patterns = rng.integers(1, 8, size).astype(unsigned)
    if kind != "wild":
        patterns |= np.where(rng.random(size) < 0.5, top, 0).astype(unsigned)
    patterns[rng.random(size) >= density] = 0
    return patterns.view(STORAGE_DTYPE[dtype])


def returned(encoded: Encoded, codec: str, like: np.ndarray) -> np.ndarray:
    """Return what decode_block writes over garbage."""
    out = np.frombuffer(b"\xa5" * like.nbytes, like.dtype).copy()
    decode_block(encoded, codec, out)
    return out


def check(values: np.ndarray, codec: str) -> Encoded:
    """Check one block in every way that holds for all; return its encoding."""
    before = values.copy()
    encoded = encode_block(values, codec)
    assert np.array_equal(bits(values), bits(before))  # the caller's buffer is still its own
    assert np.array_equal(bits(returned(encoded, codec, values)), bits(values))
    other = np.zeros(values.size, f"<u{values.itemsize}")
    reader.decode(codec, encoded.payload, encoded.bitmap, other)
    assert np.array_equal(other, bits(values))
    again = encode_block(before, codec)
    assert again.payload.tobytes() == encoded.payload.tobytes()
    assert again.bitmap.tobytes() == encoded.bitmap.tobytes()
    changed = bits(values) != 0
    if codec == "dense":
        assert encoded.payload.tobytes() == values.tobytes() and not encoded.bitmap.size
    elif codec == "sparse":
        assert encoded.payload.tobytes() == bits(values)[changed].tobytes()
        assert encoded.bitmap.tobytes() == np.packbits(changed, bitorder="little").tobytes()
    else:
        assert encoded.payload.size <= values.nbytes and not encoded.bitmap.size
        assert bool(encoded.payload.size) == bool(changed.any())
    return encoded


@given(
    st.sampled_from(STORED),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 2, 7, 8, 9, 15, 63, 255, 4097]) | st.integers(0, 600),
    st.sampled_from([0.0, 0.001, 0.02, 0.5, 0.93, 0.95, 1.0]) | st.floats(0, 1),
    st.sampled_from(["wild", "steps", "subnormal"]),
    st.integers(0, 1 << 32),
)
@example("packed", "BF16", 4097, 1.0, "steps", 0)
@example("packed", "BF16", 4097, 0.02, "steps", 0)
@example("packed", "F64", 9, 0.5, "wild", 0)
def test_every_block_comes_back_and_a_second_reader_agrees(
    codec: str, dtype: str, size: int, density: float, kind: str, seed: int
) -> None:
    check(made(dtype, size, density, kind, seed), codec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", STORED)
def test_whole_blocks_come_back(codec: str, dtype: str) -> None:
    for density, kind in ((0.02, "steps"), (1.0, "wild")):
        values = made(dtype, 1 << 20, density, kind, 1)
        encoded = check(values, codec)
        if codec == "packed" and kind == "steps":  # 2 % of values: .14 bits for where, 3 for what
            assert encoded.payload.size < 0.04 * (1 << 20)
        elif codec == "packed":  # noise does not shrink: kept as it is
            assert encoded.payload.tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_and_exponents_get_planes_of_their_own(dtype: str) -> None:
    """Rotated left by one, the eight top bits of a plane are exponent: nearly constant here."""
    rng = np.random.default_rng(0)
    wide = np.where(rng.random(1 << 14) < 0.5, -1, 1) * rng.uniform(1, 2, 1 << 14)
    if dtype == "BF16":
        values = (wide.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        values = wide.astype(STORAGE_DTYPE[dtype])
    saved = values.nbytes - check(values, "packed").payload.size
    assert saved > 0.4 * values.size  # of a byte of exponent, its 7 or 8 bits; 5 for fp16


def of_patterns(frequent: int, rare: int) -> np.ndarray:
    """Return a block of 255 patterns `frequent` times each, and of as many others once."""
    patterns = np.concatenate((np.tile(np.arange(1, 256), frequent), np.arange(1000, 1000 + rare)))
    return np.random.default_rng(0).permutation(patterns).astype(np.uint16)


@pytest.mark.parametrize(
    ("values", "ranked"),
    [
        (of_patterns(20, 0), True),  # 5,100 values
        (of_patterns(20, 728), True),  # of 5,828 one in eight and a half
        (of_patterns(20, 729), False),  # more than one in eight
        (of_patterns(16, 15)[:4095], False),  # too few
        (of_patterns(16, 16)[:4096], True),
        (np.append(of_patterns(16, 0), np.zeros(100_000, np.uint16)), False),  # 4,080 not zero
        (np.append(of_patterns(17, 9), np.zeros(100_000, np.uint16)), True),
        (of_patterns(20, 0).astype(np.float32), False),
        (np.full(1 << 16, 3, np.uint16), True),  # a table of one
        (np.arange(1 << 16, dtype=np.uint16), False),
        (made("F16", 1 << 16, 1.0, "wild", 1), False),  # noise is kept as it is
    ],
)
def test_ranks_are_taken_where_few_patterns_are_frequent(values: np.ndarray, ranked: bool) -> None:
    encoded = check(values, "packed")
    assert encoded.ranked == ranked
    if 0 < encoded.payload.size < values.nbytes:
        assert (encoded.payload[3] > 127) == ranked


def test_ranks_take_less_room_than_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after RL: a small step of fp32 weights, of which the bf16 copies are subtracted."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal(1 << 18, np.float32) * np.float32(0.02)
    after = before + rng.standard_normal(1 << 18, np.float32) * np.float32(8e-6)
    rounded = [widen(narrow(side, "BF16"), "BF16") for side in (after, before)]
    values = narrow(rounded[0] - rounded[1], "BF16")
    assert 0.15 < np.mean(values != 0) < 0.2
    with_ranks = check(values, "packed")
    monkeypatch.setattr(codecs, "LEAST_RANKED", 1 << 21)
    without = check(values, "packed")
    assert with_ranks.ranked and not without.ranked
    assert with_ranks.payload.size < 0.97 * without.payload.size


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_may_be_loose_is_left_as_it_is_up_to_its_share(dtype: str) -> None:
    values = made(dtype, 1 << 16, 0.05, "steps", 4)
    tight = encode_block(values, "packed")
    loose = encode_block(values, "packed", loose=0.15)
    assert tight.payload.size < 0.9 * loose.payload.size < 0.9 * 0.15 * values.nbytes
    assert encode_block(values, "packed", loose=0.05).payload.tobytes() == tight.payload.tobytes()
    out = np.empty_like(values)
    decode_block(loose, "packed", out)
    assert np.array_equal(bits(out), bits(values))


def test_a_block_uses_its_own_room_alone() -> None:
    """Whatever is in the room before, and whatever is behind what it says it takes."""
    for dtype in DTYPES:
        for density in (0.0, 0.3, 0.94, 0.97, 1.0):
            for kind in ("wild", "steps"):
                values = made(dtype, 5003, density, kind, 2)
                for codec in ("sparse", "packed"):
                    nbytes = codecs.room_nbytes(values, codec)
                    room = np.full(nbytes + 64, 0xA5, np.uint8)
                    before = bits(values).copy()
                    found = encode_block(values, codec, room[:nbytes])
                    wanted = encode_block(values, codec)
                    assert found.payload.tobytes() == wanted.payload.tobytes()
                    assert found.bitmap.tobytes() == wanted.bitmap.tobytes()
                    assert (room[nbytes:] == 0xA5).all()
                    assert np.array_equal(bits(values), before)


def test_what_is_exactly_as_long_packed_as_not_is_taken_for_what_it_is() -> None:
    """Of so many sizes some have a frame, or a block, of just the length of what it holds."""
    for dtype in ("BF16", "F64"):
        for kind in ("steps", "subnormal"):
            for size in range(1, 120):
                check(made(dtype, size, 1.0, kind, 0), "packed")
    for size in range(1, 200):
        values = np.zeros(size, np.uint16)
        values[-1] = 0x3F80  # planes of one byte, and a bitmap that may shrink
        check(values, "packed")
        check(np.full(size, 0x3F80, np.uint16), "packed")


def test_threads_do_not_share_what_they_compress_with() -> None:
    blocks = [made("BF16", 1 << 16, 0.1, "steps", seed) for seed in range(24)]
    expected = [encode_block(block, "packed").payload.tobytes() for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda block: encode_block(block, "packed"), blocks))
        back = pool.map(
            lambda pair: returned(pair[0], "packed", pair[1]), zip(found, blocks, strict=True)
        )
        assert all(np.array_equal(a, b) for a, b in zip(back, blocks, strict=True))
    assert [encoded.payload.tobytes() for encoded in found] == expected


# ---------------------------------------------------------------------------------- hostile bytes

NUMEL = 1001  # bf16 values of the blocks below: 126 bytes of bitmap, the last with one bit in use
BITMAP = np.packbits(np.arange(NUMEL) % 7 == 0, bitorder="little").tobytes()  # marks 143 values
COUNT = 143


def frame(content: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


def stating(nbytes: int, content: bytes, flags: int = 0xE0, dictionary: bytes = b"") -> bytes:
    """Return the frame of `content` with a header that states `nbytes`, whatever it holds."""
    body = frame(content)[zstandard.frame_header_size(frame(content)) :]
    return b"\x28\xb5\x2f\xfd" + bytes([flags]) + dictionary + struct.pack("<Q", nbytes) + body


def skipped(nbytes: int) -> bytes:
    """Return a skippable frame, which zstd reads over."""
    return struct.pack("<II", 0x184D2A50, nbytes) + bytes(nbytes)


def of_pieces(*pieces: bytes) -> bytes:
    return struct.pack(f"<{len(pieces)}I", *map(len, pieces)) + b"".join(pieces)


def ranked(
    ranks: bytes, listed: bytes | None = None, size: int = 3, bitmap: bytes = BITMAP
) -> bytes:
    """Return a packed block with ranks, whose high plane is right; `listed` is the low one.

    It has a table of three values, then the values without a rank.
    """
    low = bytes([2, 4, 6]) + bytes(ranks.count(255)) if listed is None else listed
    pieces = of_pieces(bitmap, ranks, low, b"\x40" * (3 + ranks.count(255)))
    return struct.pack("<I", 1 << 31 | size) + pieces


def planes(low: bytes, bitmap: bytes = BITMAP) -> bytes:
    """Return a packed block whose high plane is right."""
    return of_pieces(bitmap, low, b"\x40" * COUNT)


RANKS = bytes([0, 1, 2, 255, 255] * 28 + [0, 1, 2])
BEHIND = BITMAP[:-1] + bytes([BITMAP[-1] | 2])  # one value marked that the tensor has not
PLANE = bytes(COUNT)
TWO_PLANES = b"\x40" * 2 * COUNT
HALF = frame(bytes(71)) + frame(bytes(72))
# what is wrong -> (codec, payload, bitmap, words of the message)
HOSTILE: dict[str, tuple[str, bytes, bytes, str]] = {
    "dense, a byte too few": ("dense", bytes(2 * NUMEL - 1), b"", "2001 bytes, expected 2002"),
    "dense, a byte too many": ("dense", bytes(2 * NUMEL + 1), b"", "2003 bytes, expected 2002"),
    "dense, nothing": ("dense", b"", b"", "0 bytes"),
    "sparse, half a value": ("sparse", TWO_PLANES[:-1], BITMAP, "whole number"),
    "sparse, a value too few": ("sparse", TWO_PLANES[:-2], BITMAP, "143 values, 142"),
    "sparse, a value too many": ("sparse", TWO_PLANES + b"ab", BITMAP, "143 values, 144"),
    "sparse, no bitmap": ("sparse", TWO_PLANES, b"", "bitmap of 0 bytes"),
    "sparse, a bitmap too short": ("sparse", TWO_PLANES, BITMAP[:-1], "bitmap of 125 bytes"),
    "sparse, a bitmap too long": ("sparse", TWO_PLANES, BITMAP + b"\0", "bitmap of 127 bytes"),
    "sparse, bits behind the end": ("sparse", TWO_PLANES + b"ab", BEHIND, "longer than"),
    "one byte": ("packed", b"\1", b"", "1 bytes are too few"),
    "lengths cut off": ("packed", planes(PLANE)[:11], b"", "11 bytes are too few"),
    "lengths alone": ("packed", planes(PLANE)[:12], b"", "do not fill"),
    "a byte less than the lengths say": ("packed", planes(PLANE)[:-1], b"", "do not fill"),
    "a byte more than the lengths say": ("packed", planes(PLANE) + b"\0", b"", "do not fill"),
    "a length beyond the end": (
        "packed", struct.pack("<3I", 126, COUNT, COUNT + 1) + planes(PLANE)[12:], b"", "not fill",
    ),
    "a bitmap too short": ("packed", planes(PLANE, BITMAP[:-1]), b"", "zstd"),
    "a bitmap too long": ("packed", planes(PLANE, BITMAP + b"\0"), b"", "zstd"),
    "a bitmap with bits behind the end": (
        "packed", of_pieces(BEHIND, bytes(COUNT + 1), bytes(COUNT + 1)), b"", "longer than",
    ),
    "a bitmap's frame that holds less": ("packed", planes(PLANE, frame(bytes(125))), b"", "125"),
    "a bitmap's frame that holds more": ("packed", planes(PLANE, frame(bytes(127))), b"", "127"),
    "a bitmap of no values with planes": ("packed", planes(PLANE, bytes(126)), b"", "zstd"),
    "a plane too short": ("packed", planes(PLANE[:-1]), b"", "zstd"),
    "a plane too long": ("packed", planes(PLANE + b"\0"), b"", "zstd"),
    "a plane of nothing": ("packed", planes(b""), b"", "zstd"),
    "a plane of all values": ("packed", planes(bytes(NUMEL)), b"", "zstd"),
    "all values, a plane of the marked": ("packed", planes(PLANE, b""), b"", "zstd"),
    "a frame of one byte less": ("packed", planes(frame(PLANE[:-1])), b"", "142 bytes, expected"),
    "a frame of one byte more": ("packed", planes(frame(PLANE + b"\0")), b"", "144 bytes, exp"),
    "a frame longer than what it holds": (
        "packed", planes(frame(np.random.default_rng(0).bytes(COUNT))), b"", "143 bytes, expected",
    ),
    "a frame of nothing": ("packed", planes(frame(b"")), b"", "0 bytes, expected 143"),
    "a frame that does not state its size": (
        "packed", planes(frame(PLANE, write_content_size=False)), b"", "expected 143",
    ),
    "a frame that states more": ("packed", planes(stating(COUNT + 9, PLANE)), b"", "152 bytes, ex"),
    "a frame that states and holds more": ("packed", planes(frame(bytes(512))), b"", "512 bytes,"),
    "a frame that states less than it holds": (
        "packed", planes(stating(COUNT, bytes(512))), b"", "broken zstd frame",
    ),
    "a frame that states more than it holds": (
        "packed", planes(stating(COUNT, PLANE[1:])), b"", "zstd frame",
    ),
    "a frame cut off": ("packed", planes(frame(PLANE)[:-1]), b"", "broken zstd frame"),
    "a frame's header alone": ("packed", planes(frame(PLANE)[:6]), b"", "broken zstd frame"),
    "half a frame's header": ("packed", planes(frame(PLANE)[:5]), b"", "broken zstd frame"),
    "not a frame": ("packed", planes(b"no frame of any kind"), b"", "broken zstd frame"),
    "two frames": ("packed", planes(frame(PLANE) + frame(PLANE)), b"", "broken zstd frame"),
    "two frames that make the whole": ("packed", planes(HALF), b"", "71 bytes, expected 143"),
    "an empty frame behind": ("packed", planes(frame(PLANE) + frame(b"")), b"", "broken zstd"),
    "a frame and a byte": ("packed", planes(frame(PLANE) + b"\0"), b"", "broken zstd frame"),
    "a frame to be skipped": ("packed", planes(skipped(10)), b"", "expected 143"),
    "a frame to be skipped before": ("packed", planes(skipped(9) + frame(PLANE)), b"", "expected"),
    "a frame to be skipped behind": ("packed", planes(frame(PLANE) + skipped(9)), b"", "broken"),
    "a dictionary": ("packed", planes(stating(COUNT, PLANE, 0xE1, b"\7")), b"", "broken zstd"),
    "a reserved bit": ("packed", planes(stating(COUNT, PLANE, 0xE8)), b"", "broken zstd frame"),
    "ranks, no table": ("packed", ranked(RANKS, size=0), b"", "a table of 0 values"),
    "ranks, a table of 256": ("packed", ranked(RANKS, size=256), b"", "a table of 256 values"),
    "ranks, a table beyond all": ("packed", ranked(RANKS, size=2**31 - 1), b"", "a table of 21"),
    "ranks, a table larger than its planes": ("packed", ranked(RANKS, size=4), b"", "zstd"),
    "ranks, a table smaller than its planes": ("packed", ranked(RANKS, size=2), b"", "zstd"),
    "ranks, a table with a value twice": (
        "packed", ranked(RANKS, bytes([2, 4, 4]) + bytes(56)), b"", "do not rise",
    ),
    "ranks, a table that falls": (
        "packed", ranked(RANKS, bytes([4, 2, 6]) + bytes(56)), b"", "do not rise",
    ),
    "ranks, one behind the table": (
        "packed", ranked(RANKS[:-1] + b"\3"), b"", "a rank behind the table of 3",
    ),
    "ranks, one far behind the table": (
        "packed", ranked(b"\376" + RANKS[1:]), b"", "a rank behind the table of 3",
    ),
    "ranks, too few": ("packed", ranked(RANKS[:-1]), b"", "zstd"),
    "ranks, too many": ("packed", ranked(RANKS + b"\0"), b"", "zstd"),
    "ranks, none": ("packed", ranked(b""), b"", "zstd"),
    "ranks, a frame of one more": ("packed", ranked(frame(RANKS + b"\0")), b"", "144 bytes, exp"),
    "ranks, a frame that states more": (
        "packed", ranked(stating(COUNT + 9, RANKS)), b"", "152 bytes, ex",
    ),
    "ranks, a value without rank too few": (
        "packed", ranked(RANKS, bytes([2, 4, 6]) + bytes(55)), b"", "zstd",
    ),
    "ranks, a value without rank too many": (
        "packed", ranked(RANKS, bytes([2, 4, 6]) + bytes(57)), b"", "zstd",
    ),
    "ranks, of all values": ("packed", ranked(RANKS, bitmap=b""), b"", "zstd"),
    "ranks, bits behind the end": ("packed", ranked(RANKS + b"\0", bitmap=BEHIND), b"", "longer"),
    "ranks, lengths cut off": ("packed", ranked(RANKS)[:19], b"", "do not fill"),
    "ranks, lengths alone": ("packed", ranked(RANKS)[:20], b"", "do not fill"),
    "ranks, a byte less than the lengths say": ("packed", ranked(RANKS)[:-1], b"", "do not fill"),
    "ranks, a byte more than the lengths say": (
        "packed", ranked(RANKS) + b"\0", b"", "do not fill",
    ),
    "a wrong checksum": (
        "packed", planes(frame(PLANE, write_checksum=True)[:-1] + b"\0"), b"", "broken zstd frame",
    ),
}  # fmt: skip


def decoded(codec: str, payload: bytes, bitmap: bytes, numel: int, dtype: str) -> np.ndarray:
    encoded = Encoded(np.frombuffer(payload, np.uint8), np.frombuffer(bitmap, np.uint8))
    return returned(encoded, codec, np.zeros(numel, STORAGE_DTYPE[dtype]))


class Watched:
    """A decompressor that is given no frame which states more than `most` bytes.

    What a frame states is what a decompressor allocates.
    """

    def __init__(self, most: int) -> None:
        self.most, self.real = most, zstandard.ZstdDecompressor()

    def decompress(self, piece: Any, **options: Any) -> bytes:
        stated = zstandard.get_frame_parameters(piece).content_size
        assert stated <= self.most, f"{stated} bytes are allocated, {self.most} expected"
        return self.real.decompress(piece, **options)


@pytest.mark.parametrize("wrong", HOSTILE)
def test_hostile_bytes_are_a_value_error_before_memory_is_taken(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, payload, bitmap, words = HOSTILE[wrong]
    monkeypatch.setattr(codecs._local, "decompressor", Watched(COUNT), raising=False)
    with pytest.raises(ValueError, match=words):
        decoded(codec, payload, bitmap, NUMEL, "BF16")


def test_what_the_hostile_blocks_are_made_of_is_right() -> None:
    """The control: the same pieces, all true, decode; a frame may come from any compressor."""
    marked = np.flatnonzero(np.unpackbits(np.frombuffer(BITMAP, np.uint8), bitorder="little"))
    for low in (PLANE, frame(PLANE), frame(PLANE, level=19), frame(PLANE, write_checksum=True),
                stating(COUNT, PLANE)):  # fmt: skip
        for bitmap in (BITMAP, frame(BITMAP)):
            found = decoded("packed", planes(low, bitmap), b"", NUMEL, "BF16")
            assert np.flatnonzero(found).tolist() == marked.tolist()
            assert set(found[marked].tolist()) == {0x2000}
    listed = bytes([2, 4, 6]) + bytes(56)
    for ranks in (RANKS, frame(RANKS), stating(COUNT, RANKS)):
        for bitmap in (BITMAP, frame(BITMAP)):
            pieces = of_pieces(bitmap, ranks, listed, frame(b"\x40" * 59))
            block = struct.pack("<I", 1 << 31 | 3) + pieces
            found = decoded("packed", block, b"", NUMEL, "BF16")
            assert np.flatnonzero(found).tolist() == marked.tolist()
            wanted = [{0: 0x2001, 1: 0x2002, 2: 0x2003, 255: 0x2000}[rank] for rank in RANKS]
            assert found[marked].tolist() == wanted
    for pieces in ((b"", frame(bytes(NUMEL)), bytes(NUMEL)), (bytes(126), b"", b"")):  # zeros too
        assert not decoded("packed", of_pieces(*pieces), b"", NUMEL, "BF16").any()


BITS = [1 << bit for bit in range(8)]


@pytest.mark.parametrize(
    ("dtype", "numel", "density", "masks"),
    [
        ("BF16", 240, 1.0, list(range(1, 256))),  # two planes of Huffman codes, no bitmap
        ("BF16", 1500, 0.02, BITS),  # a bitmap that shrinks, planes that do not
        ("F32", 100, 1.0, BITS),  # planes of one value
        ("BF16", 4100, 1.0, [1, 128]),  # ranks, of which most bits lead to other ranks
    ],
)
def test_a_changed_byte_gives_values_or_a_value_error_and_takes_no_memory(
    dtype: str, numel: int, density: float, masks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of a block: lengths, frame headers, Huffman tables, codes."""
    monkeypatch.setattr(codecs._local, "decompressor", Watched(numel), raising=False)
    values = made(dtype, numel, density, "steps", 3)
    payload = encode_block(values, "packed").payload
    assert payload.size < 0.5 * values.nbytes  # frames, not raw pieces
    out = np.empty_like(values)

    refused = 0
    for at in range(payload.size):
        changed = payload.copy()
        for mask in masks:
            changed[at] = payload[at] ^ mask
            try:
                decode_block(Encoded(changed), "packed", out)
            except ValueError:
                refused += 1
    assert refused > (0.2 if numel < 4096 else 0.02) * payload.size * len(masks)


@given(st.binary(max_size=80), st.sampled_from(DTYPES), st.integers(0, 40), st.binary(max_size=6))
def test_any_bytes_give_values_or_a_value_error(
    payload: bytes, dtype: str, numel: int, bitmap: bytes
) -> None:
    for codec in STORED:
        try:
            decoded(codec, payload, bitmap, numel, dtype)
        except ValueError as error:
            assert str(error)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 9, 63, 4096]) | st.integers(1, 600),
    st.sampled_from([0.02, 0.5, 0.9, 0.92, 0.95, 1.0]),
    st.sampled_from(["wild", "steps"]),
    st.sampled_from([0.5, 0.9, 0.98, 1.0]),
)
def test_whether_a_block_shrinks_is_told_without_packing_most(
    dtype: str, size: int, density: float, kind: str, share: float
) -> None:
    values = made(dtype, size, density, kind, 5)
    packed = encode_block(values, "packed").payload.size
    assert codecs.is_packed_within(values, share) == (packed < share * values.nbytes)
