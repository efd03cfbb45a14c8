"""The compiled kernels' face, who is chosen, and the order of sums, by every build that runs here.

Without a compiled module the numpy twin stands in the same tests alone.
"""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from math import fsum
from types import SimpleNamespace

import numpy as np
import pytest
from builds import BUILDS, NATIVE
from xxhash import xxh3_64_hexdigest

from skillvec.errors import UsageError
from skillvec.ops import compiled, lanes
from skillvec.ops.kernels import widen

STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


# ------------------------------------------------------------------------------------- the face

A = np.ones(32, np.float32)
OUT = np.zeros(2)
F32 = compiled.CODES["F32"]
CALL = (A, A, 16, F32, F32, OUT)  # two groups of ones


def changed(place: int, value: object) -> tuple[object, ...]:
    return (*CALL[:place], value, *CALL[place + 1 :])


WRONG_TYPES = [
    (CALL[:-1], TypeError), ((*CALL, 1), TypeError), ((), TypeError),
    (changed(0, "text"), TypeError), (changed(0, 3), TypeError), (changed(2, 16.0), TypeError),
    (changed(2, None), TypeError), (changed(2, 1 << 64), OverflowError),
    (changed(5, bytes(16)), BufferError),
    (changed(5, np.frombuffer(bytes(16))), ValueError),  # read-only
    (changed(0, np.ones(64, np.float32)[::2]), ValueError),  # not contiguous
    (changed(5, np.ones((2, 2))[:, 0]), ValueError),
]  # fmt: skip
WRONG_SIZES = [
    changed(2, 0), changed(2, -1), changed(2, 15), changed(2, 32), changed(2, (1 << 63) - 1),
    changed(2, -(1 << 63)), changed(3, 3), changed(3, 4), changed(3, -1), changed(3, 1 << 32),
    changed(3, 0), changed(4, 0), changed(4, (1 << 63) - 1), changed(0, A[:31]), changed(1, A[:31]),
    changed(0, A.view(np.uint8)[:-1]), changed(0, A[:0]), changed(5, OUT[:1]),
    changed(5, np.zeros(3)), changed(5, OUT.view(np.uint8)[:-1]),
]  # fmt: skip


@pytest.mark.parametrize("isa", BUILDS)
def test_a_wrong_call_is_refused_and_keeps_nothing(isa: str):
    run = BUILDS[isa]["group_products"]
    OUT[:] = 7
    held = sys.getrefcount(A), sys.getrefcount(OUT)
    for _ in range(3):
        for call, error in WRONG_TYPES:
            with pytest.raises(error):
                run(*call)
        for call in WRONG_SIZES:
            with pytest.raises(ValueError, match="group_products: its buffers do not fit"):
                run(*call)
    assert OUT.tolist() == [7, 7]
    del call
    assert held == (sys.getrefcount(A), sys.getrefcount(OUT))
    assert run(*CALL) == 0 and OUT.tolist() == [16, 16]
    resizable = bytearray(16)
    run(*changed(5, resizable))
    resizable.append(0)  # its buffer was given back


@pytest.mark.parametrize("isa", BUILDS)
def test_buffers_may_be_empty_and_may_start_anywhere(isa: str):
    run = BUILDS[isa]["group_products"]
    assert run(b"", bytearray(), 1024, F32, F32, np.zeros(0)) == 0
    assert run(b"", b"", (1 << 63) - 1, 0, 0, bytearray()) == 0
    raw, out = np.zeros(4 * 32 + 1, np.uint8), np.zeros(8 * 2 + 1, np.uint8)
    raw[1:] = A.view(np.uint8)
    run(raw[1:], raw[1:], 16, F32, F32, out[1:])
    assert np.frombuffer(out[1:].tobytes()).tolist() == [16, 16]


def test_an_instruction_set_that_is_not_here_has_no_kernels():
    assert NATIVE.kernels("mmx") == {} == NATIVE.kernels("")
    if BUILDS:
        with pytest.raises(TypeError):
            NATIVE.kernels(2)
    names = [set(found) for found in BUILDS.values()]
    assert all(found == names[0] for found in names)


def test_here_every_kernel_gives_numpys_bytes():
    for name in ("arithmetic", "codecs", "merge_methods", "statistics"):
        import_module(f"skillvec.ops.{name}")
    assert compiled.in_use() in ("numpy", *BUILDS)


# --------------------------------------------------------------------------------- who is chosen


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have a module with builds of one kernel, or none, and SKILLVEC_KERNELS."""

    def chosen(value: str, here: tuple[str, ...] | ImportError) -> None:
        def native(name: str) -> SimpleNamespace:
            assert name == "skillvec.ops._native"
            if isinstance(here, ImportError):
                raise here
            kernel = {"twice": lambda out: out.__setitem__(0, 2)}
            return SimpleNamespace(kernels=lambda isa: kernel if isa in here else {})

        monkeypatch.setattr(compiled, "import_module", native)
        monkeypatch.setattr(compiled, "_refused", [])
        monkeypatch.setenv("SKILLVEC_KERNELS", value)
        compiled._chosen.cache_clear()

    yield chosen
    monkeypatch.undo()
    compiled._chosen.cache_clear()


NONE = ModuleNotFoundError("No module named 'skillvec.ops._native'")
BROKEN = ImportError("GLIBC_9 not found")


@pytest.mark.parametrize(
    ("value", "here", "isa", "why"),
    [
        ("", ("avx512", "avx2"), "avx512", ""), ("", ("avx2",), "avx2", ""),
        ("avx2", ("avx512", "avx2"), "avx2", ""), ("", ("neon",), "neon", ""),
        ("numpy", ("avx512", "avx2"), "numpy", "SKILLVEC_KERNELS says so"),
        ("", (), "numpy", "the processor has neither AVX2"),
        ("", NONE, "numpy", "installed without a C compiler"),
        ("numpy", NONE, "numpy", "SKILLVEC_KERNELS says so"),
        ("", BROKEN, "numpy", "GLIBC_9 not found"),
    ],
)  # fmt: skip
def test_the_best_build_is_used_or_the_one_that_is_asked_for(
    value: str, here: tuple[str, ...], isa: str, why: str, choose: Callable[..., None]
):
    choose(value, here)
    assert compiled.in_use() == isa
    assert why in compiled.explain() and bool(why) == bool(compiled.explain())
    found = compiled.kernel("twice", sample, xxh3_64_hexdigest(b"\2"))
    assert (found is None) == (isa == "numpy")


def sample(run: Callable[..., object]) -> bytes:
    out = bytearray(1)
    run(out)
    return bytes(out)


@pytest.mark.parametrize(
    ("value", "here", "said"),
    [
        ("AVX2", ("avx2",), "expected numpy, or one of avx512, avx2, neon"),
        ("avx512", ("avx2",), "not on this machine: the processor lacks it, and runs avx2"),
        ("avx2", (), "not on this machine: the processor has neither"),
        ("avx2", NONE, "not on this machine: installed without a C compiler"),
    ],
)
def test_what_is_asked_for_and_is_not_here_is_refused(
    value: str, here: tuple[str, ...], said: str, choose: Callable[..., None]
):
    choose(value, here)
    for ask in (compiled.in_use, compiled.explain, lambda: compiled.kernel("twice", sample, "")):
        with pytest.raises(UsageError, match=f"SKILLVEC_KERNELS={value}: {said}"):
            ask()


def test_a_kernel_that_gives_other_bytes_or_takes_other_arguments_is_not_used(
    choose: Callable[..., None],
):
    def refused(run: Callable[..., object]) -> bytes:
        raise ValueError("twice: its buffers do not fit together")

    def misspelt(run: Callable[..., object]) -> bytes:
        return bytes(run())

    def astray(run: Callable[..., object]) -> bytes:
        return bytes([b"numbers"[1 << 20]])  # by a position that a kernel gave

    for test in (sample, refused, misspelt, astray):
        choose("", ("avx2",))
        assert compiled.kernel("twice", test, xxh3_64_hexdigest(b"\3")) is None
        assert compiled.kernel("twice", test, xxh3_64_hexdigest(b"\3")) is None
        assert compiled.in_use() == "avx2, numpy for twice"
        assert "other bytes than numpy" in compiled.explain()
    assert compiled.kernel("unknown", sample, "") is None


# ------------------------------------------------------------------------------ the order of sums


def by_build(isa: str, a: np.ndarray, b: np.ndarray, kinds: tuple[str, str], width: int):
    out = np.full(-(-a.size // width), np.nan)
    codes = [compiled.CODES[kind] for kind in kinds]
    assert BUILDS[isa]["group_products"](a, b, width, *codes, out) == 0
    return out


def by_twin(a: np.ndarray, b: np.ndarray, kinds: tuple[str, str], width: int):
    x, y = widen(a, kinds[0]), widen(b, kinds[1])
    return lanes.row_products(lanes.by_rows(x, width), lanes.by_rows(y, width))


def drawn(rng: np.random.Generator, kind: str, numel: int) -> np.ndarray:
    """Return finite patterns, uniform, so that products leave the range of fp32 on both sides."""
    values = rng.integers(0, 1 << 32, numel, np.uint64).astype(np.uint32).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(-0.0))
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if kind == "F32":
        return values
    half = rng.integers(0, 1 << 16, numel, np.uint64).astype(np.uint16).view(np.float16)
    return np.where(np.isfinite(half), half, np.float16(-0.0))


def of_one_size(rng: np.random.Generator, kind: str, numel: int) -> np.ndarray:
    values = rng.standard_normal(numel).astype(np.float32)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(STORED[kind])


KINDS = [(a, b) for a in STORED for b in STORED]
SIZES = [1, 15, 16, 17, 1023, 1024, 1025, 3000, 65_536 + 1000]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("draw", [drawn, of_one_size])
def test_every_build_adds_as_the_twin_does(kinds: tuple[str, str], draw: Callable[..., np.ndarray]):
    rng = np.random.default_rng(5)
    for numel in SIZES:
        a, b = draw(rng, kinds[0], numel), draw(rng, kinds[1], numel)
        for width in (1, 8, 16, 64, 1024):
            if width < 16 and numel > 3000:
                continue
            twin = by_twin(a, b, kinds, width)
            check_sums(twin, a, b, kinds, width)
            for isa in BUILDS:
                found = by_build(isa, a, b, kinds, width)
                assert found.tobytes() == twin.tobytes(), (isa, numel, width)


def check_sums(twin: np.ndarray, a: np.ndarray, b: np.ndarray, kinds: tuple[str, str], width: int):
    """Compare the last group with a sum without rounding, by the bound that lanes promises."""
    last = slice((twin.size - 1) * width, None)
    x = widen(a[last], kinds[0]).astype(np.float64)
    y = widen(b[last], kinds[1]).astype(np.float64)
    norms = float(np.sqrt(fsum((x * x).tolist()))) * float(np.sqrt(fsum((y * y).tolist())))
    assert abs(float(twin[-1]) - fsum((x * y).tolist())) <= 3e-7 * norms


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_every_finite_pattern_is_read_as_it_is(kind: str):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(STORED[kind])
    values = widen(patterns, kind)
    patterns = patterns[np.isfinite(values)]
    ones = np.ones(patterns.size, np.float32)
    expected = values[np.isfinite(values)].astype(np.float64) + 0.0  # a sum begins with +0
    assert by_twin(patterns, ones, (kind, "F32"), 1).tobytes() == expected.tobytes()
    for isa in BUILDS:
        assert by_build(isa, patterns, ones, (kind, "F32"), 1).tobytes() == expected.tobytes()


def test_lanes_are_added_in_the_order_that_is_documented():
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((2, 100)).astype(np.float32)
    lane = [np.float32(0)] * 16
    for i in range(100):
        lane[i % 16] += a[i] * b[i]
    sums = [float(x) for x in lane]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [x + y for x, y in zip(sums[:half], sums[half:], strict=True)]
    assert lanes.group_products(a, b).tolist() == sums
    kinds, width = ("F32", "F32"), lanes.GROUP
    found = [by_twin(a, b, kinds, width), *(by_build(isa, a, b, kinds, width) for isa in BUILDS)]
    assert [x.tolist() for x in found] == [sums] * (1 + len(BUILDS))
