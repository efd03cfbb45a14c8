"""native/planes.c against numpy: the same bytes for every instruction set, and none outside."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builds import BUILDS
from xxhash import xxh3_64_hexdigest

from skillvec.ops import codecs
from skillvec.ops.codecs import ESCAPE, NO_BYTES, PATTERNS, WIDTHS, Kernels

TWIN = Kernels()
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1023, 1024, 1025, 4099)
DENSITIES = (0.0, 0.03, 0.5, 0.97, 1.0)
GUARD = 72  # bytes before and behind


COMPILED = {isa: Kernels(*map(k.get, Kernels._fields)) for isa, k in BUILDS.items()}
EVERY = {"numpy": TWIN, **COMPILED}


class Room:
    """Bytes between guards, at any address; `check` sees that the guards are as they were."""

    def __init__(self, nbytes: int, shift: int = 0) -> None:
        self.whole = np.full(nbytes + 2 * GUARD + 8, 0xA5, np.uint8)
        self.cut = slice(GUARD + shift, GUARD + shift + nbytes)
        self.bytes = self.whole[self.cut]

    def of(self, values: np.ndarray) -> np.ndarray:
        self.bytes[:] = values.view(np.uint8)
        return self.bytes.view(values.dtype)

    def check(self) -> None:
        assert (np.delete(self.whole, self.cut) == 0xA5).all()


def drawn(size: int, width: int, density: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.frombuffer(rng.bytes(size * width), f"<u{width}").copy()
    values[rng.random(size) >= density] = 0
    return values


def there_and_back(use: Kernels, values: np.ndarray, shift: int) -> None:
    """Compare what kernels write with what numpy says it is."""
    width, size = values.itemsize, values.size
    given, bitmap, kept = (
        Room(values.nbytes, shift),
        Room(-(-size // 8)),
        Room(values.nbytes, shift),
    )
    count = use.pick(given.of(values), width, bitmap.bytes, kept.bytes.view(values.dtype))
    listed = values[values != 0]
    assert count == listed.size
    assert kept.bytes[: listed.nbytes].tobytes() == listed.tobytes()
    assert bitmap.bytes.tobytes() == np.packbits(values != 0, bitorder="little").tobytes()

    planes = Room(listed.nbytes, shift)
    use.split(kept.bytes[: listed.nbytes].view(values.dtype), width, planes.bytes)
    turned = listed << np.array(1, values.dtype) | listed >> np.array(8 * width - 1, values.dtype)
    wanted = turned.view(np.uint8).reshape(-1, width).T
    assert planes.bytes.tobytes() == wanted.tobytes()

    out = Room(values.nbytes, shift)
    out.bytes[:] = 0x5A
    tail = out.bytes[values.nbytes - listed.nbytes :].view(values.dtype)
    pieces = planes.bytes.reshape(width, -1) if count else [NO_BYTES] * width
    use.join(*pieces, *[NO_BYTES] * (8 - width), width, tail)
    assert tail.tobytes() == listed.tobytes()
    assert (out.bytes[: values.nbytes - listed.nbytes] == 0x5A).all()
    apart = Room(values.nbytes, shift)
    for held, room in ((tail.copy(), apart), (tail, out)):  # beside, and where they lie
        assert use.scatter(bitmap.bytes, held, width, room.bytes.view(values.dtype)) == count
        assert room.bytes.tobytes() == values.tobytes()
    for room in (given, bitmap, kept, planes, out, apart):
        room.check()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", EVERY)
def test_values_become_bitmap_and_planes_and_come_back(isa: str, width: int) -> None:
    for size in SIZES:
        for density in DENSITIES:
            there_and_back(EVERY[isa], drawn(size, width, density, size), size % 3)


@pytest.mark.parametrize("isa", EVERY)
def test_every_pattern_of_16_bits_is_kept_as_it_is(isa: str) -> None:
    patterns = np.arange(PATTERNS, dtype=np.uint16)
    for values in (patterns, patterns[::-1].copy(), patterns * np.uint16(40503)):
        there_and_back(EVERY[isa], values, 1)


@pytest.mark.parametrize("isa", EVERY)
def test_whole_blocks(isa: str) -> None:
    for width in WIDTHS:
        there_and_back(EVERY[isa], drawn((1 << 20) - 3, width, 0.17), 0)


@pytest.mark.parametrize("isa", EVERY)
def test_nothing_is_spread_where_the_bitmap_marks_another_number(isa: str) -> None:
    use = EVERY[isa]
    for width in WIDTHS:
        values = drawn(300, width, 0.5)
        bitmap = np.packbits(values != 0, bitorder="little")
        for stored in (values[values != 0][1:], values[:1], np.append(values, values), values[:0]):
            out = np.full_like(values, 77)
            assert use.scatter(bitmap, stored, width, out) == np.count_nonzero(values)
            assert (out == 77).all()


# ------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("isa", EVERY)
def test_ranks_are_told_and_found_again(isa: str) -> None:
    use = EVERY[isa]
    rng = np.random.default_rng(5)
    for size in (*SIZES, 70_001):
        for patterns, table_size in ((1, 1), (3, 2), (255, 255), (300, 255), (PATTERNS, 7)):
            values = rng.integers(0, patterns, size).astype(np.uint16)
            counts, found = np.zeros(PATTERNS, np.uint32), np.zeros(PATTERNS, np.uint64)
            number = use.tally(values, counts, found)
            expected = np.bincount(values, minlength=PATTERNS)
            assert np.array_equal(counts, expected)
            assert np.array_equal(found[:number] % PATTERNS, np.flatnonzero(expected))
            assert np.array_equal(found[:number] // PATTERNS, expected[expected > 0])

            table = np.sort(rng.choice(PATTERNS, table_size, replace=False)).astype(np.uint16)
            rank_of = np.full(PATTERNS, ESCAPE, np.uint8)
            rank_of[table] = np.arange(table_size)
            without = values[~np.isin(values, table)]
            ranks, escapes = Room(size, size % 3), Room(without.nbytes, size % 2)
            found_escapes = escapes.bytes.view(np.uint16)
            assert use.rank(values, rank_of, ranks.bytes, found_escapes) == without.size
            assert np.array_equal(ranks.bytes, rank_of[values])
            assert np.array_equal(found_escapes, without)
            out = Room(values.nbytes, size % 3)
            listed = np.concatenate((table, without))
            back = out.bytes.view(np.uint16)
            assert use.unrank(ranks.bytes, listed, table_size, back) == without.size
            assert np.array_equal(back, values)
            for room in (ranks, escapes, out):
                room.check()


@pytest.mark.parametrize("isa", EVERY)
def test_no_rank_leads_outside_the_table_or_the_escapes(isa: str) -> None:
    use, listed = EVERY[isa], np.arange(12, dtype=np.uint16)
    for size in (1, 31, 32, 33, 70_000):
        for at in {0, size // 2, size - 1}:
            out, ranks = np.full(size, 77, np.uint16), np.zeros(size, np.uint8)
            for wrong in (10, 11, 100, 254):
                ranks[at] = wrong
                assert use.unrank(ranks, listed[:10], 10, out) == size + 1
            ranks[at] = ESCAPE
            for held in (10, 12):  # one value without a rank too few, one too many
                assert use.unrank(ranks, listed[:held], 10, out) == 1
            assert (out == 77).all()
            assert use.unrank(ranks, listed[:11], 10, out) == 1
            assert out[at] == 10 and out.sum() == 10
    assert use.unrank(np.full(600, ESCAPE, np.uint8), listed, 10, np.zeros(600, np.uint16)) == 600


# ---------------------------------------------------------------------------------- wrong buffers


def wrong_calls() -> dict[str, tuple[str, list[Any]]]:
    """Return calls whose buffers do not fit together, by what is wrong with them."""
    bits, two, four = np.zeros(2, np.uint8), np.zeros(16, np.uint16), np.zeros(16, np.uint32)
    eight, none = np.zeros(PATTERNS, np.uint64), [NO_BYTES] * 6
    counts, table = np.zeros(PATTERNS, np.uint32), np.full(PATTERNS, ESCAPE, np.uint8)
    ranks, plane = np.full(16, ESCAPE, np.uint8), np.zeros(16, np.uint8)
    return {
        "pick: width 0": ("pick", [two, 0, bits, two]),
        "pick: width 3": ("pick", [two[:15], 3, bits, two]),
        "pick: width -2": ("pick", [two, -2, bits, two]),
        "pick: half a value": ("pick", [two, 64, bits, two]),
        "pick: a bitmap too short": ("pick", [two, 2, bits[:1], two.copy()]),
        "pick: room for a value less": ("pick", [two, 2, bits, two[:15].copy()]),
        "scatter: width 0": ("scatter", [bits, two, 0, two]),
        "scatter: width 16": ("scatter", [bits, two[:0], 16, two]),
        "scatter: a bitmap too long": ("scatter", [bits, two, 2, two[:8].copy()]),
        "scatter: bits behind": ("scatter", [ranks[:2], two[:15], 2, two[:15].copy()]),
        "scatter: half a value": ("scatter", [bits, plane[:3], 2, two]),
        "split: width 0": ("split", [two, 0, two.copy()]),
        "split: width 5": ("split", [plane[:10], 5, plane[:10].copy()]),
        "split: room for a value less": ("split", [four, 4, four[:15].copy()]),
        "join: a plane too short": ("join", [plane, plane[:15], *none, 2, two]),
        "join: a plane too many": ("join", [plane, plane, plane, *none[1:], 2, two]),
        "join: width 3": ("join", [plane, plane, plane, *none[1:], 3, np.zeros(48, np.uint8)]),
        "join: room for a value less": ("join", [plane, plane, *none, 2, two[:15].copy()]),
        "tally: half a value": ("tally", [plane[:3], counts, eight]),
        "tally: few counts": ("tally", [two, counts[1:].copy(), eight]),
        "tally: little room": ("tally", [two, counts, eight[1:].copy()]),
        "rank: a short table": ("rank", [two, table[1:], plane, two.copy()]),
        "rank: few ranks": ("rank", [two, table, plane[1:].copy(), two.copy()]),
        "rank: room for a value less": ("rank", [two, table, plane, two[1:].copy()]),
        "unrank: a table too long": ("unrank", [ranks, eight, 256, two]),
        "unrank: a table of less than nothing": ("unrank", [ranks, two, -1, two]),
        "unrank: a table cut off": ("unrank", [ranks, two[:3], 4, two.copy()]),
        "unrank: room for a value less": ("unrank", [ranks, two, 0, two[1:].copy()]),
    }


@pytest.mark.parametrize("isa", [isa for isa in EVERY if isa != "numpy"])
def test_a_call_with_wrong_buffers_is_a_value_error(isa: str) -> None:
    for wrong, (name, given) in wrong_calls().items():
        run: Callable[..., int] = getattr(EVERY[isa], name)
        with pytest.raises(ValueError, match="do not fit"):
            run(*given)
            pytest.fail(wrong)


@pytest.mark.parametrize("isa", EVERY)
def test_the_sample_that_decides_at_the_start_has_one_digest(isa: str) -> None:
    assert xxh3_64_hexdigest(codecs._sample(EVERY[isa])) == codecs.SAMPLE
