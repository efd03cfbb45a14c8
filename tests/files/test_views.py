"""Sources: any range of a view is what numpy makes of the whole, and nothing more is read."""

import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from families import save, toy
from hypothesis import given
from hypothesis import strategies as st

from skillvec.files import gather
from skillvec.files.file import digest_bytes, digest_file_range
from skillvec.files.gather import Gatherer, fill, gathering, is_turned
from skillvec.files.header import read_header
from skillvec.files.tensors import Viewed, digest_values, files_of, read_raw, values_of
from skillvec.files.views import SPAN, Box, View, concatenate, stack, whole


def read(source: np.ndarray, begin: int, out: np.ndarray) -> None:
    assert out.size and begin + out.size <= source.size
    out[:] = source.reshape(-1)[begin : begin + out.size]


def filled(view: View, begin: int = 0, end: int | None = None, reader=read) -> np.ndarray:
    numel = int(np.prod(view.shape))
    out = np.full((numel if end is None else end) - begin, -1)
    view.fill(begin, out, reader)
    return out


@st.composite
def views(draw: st.DrawFn) -> tuple[View, np.ndarray]:
    """Draw a view made by several steps, and the array that numpy makes by the same ones."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    parts = [np.arange(np.prod(shape)).reshape(shape) + 1000 * i for i in range(3)]
    seen = [whole(part, shape) for part in parts]
    view, array = seen[0], parts[0]
    if draw(st.booleans()):
        view, array = stack(seen), np.stack(parts)
    else:
        dim = draw(st.integers(0, len(shape) - 1))
        view, array = concatenate(seen, dim), np.concatenate(parts, dim)
    for _ in range(draw(st.integers(0, 3))):
        one, other = (draw(st.integers(0, array.ndim - 1)) for _ in range(2))
        if draw(st.booleans()):
            view, array = view.transpose(one, other), array.swapaxes(one, other)
        else:
            low = draw(st.integers(0, array.shape[one] - 1))
            high = draw(st.integers(low + 1, array.shape[one]))
            view, array = view.slice(one, low, high), array.take(range(low, high), one)
    return view, array


@given(views(), st.data())
def test_any_range_of_a_view_is_what_numpy_makes_of_the_whole(drawn, data: st.DataObject):
    view, array = drawn
    assert view.shape == array.shape
    begin = data.draw(st.integers(0, array.size - 1))
    end = data.draw(st.integers(begin + 1, array.size))
    assert (filled(view, begin, end) == array.reshape(-1)[begin:end]).all()


def test_what_no_box_covers_is_zero():
    array = np.arange(1, 7).reshape(2, 3)
    (box,) = whole(array, (2, 3)).boxes
    assert filled(View((4, 3), (box,))).tolist() == [*range(1, 7), *[0] * 6]


def test_adding_and_dropping_a_dimension_and_scalars():
    array = np.arange(6).reshape(2, 3)
    view = whole(array, (2, 3)).unsqueeze()
    assert view.shape == (1, 2, 3) and (filled(view) == array.reshape(-1)).all()
    assert view.squeeze().shape == (2, 3) and (filled(view.squeeze()) == array.reshape(-1)).all()
    assert filled(whole(np.array(7), ())).tolist() == [7]
    assert filled(whole(np.zeros((0, 3)), (0, 3))).size == 0


def test_shapes_that_cannot_be_joined_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\], \[2, 4\]"):
        concatenate([whole(None, (2, 3)), whole(None, (2, 4))], 0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_block_reads_about_its_own_size_from_a_large_tensor(turned: bool):
    rows, columns, block = 700, 900, 4096
    array = np.arange(rows * columns).reshape(rows, columns)
    view = whole(array, array.shape)
    view, array = (view.transpose(0, 1), array.T) if turned else (view, array)
    asked = []

    def counting(source: np.ndarray, begin: int, out: np.ndarray) -> None:
        asked.append(out.size)
        read(source, begin, out)

    # `source` is the untransposed array: rows of the view are columns there
    for begin in (0, 12_345, view.shape[0] * view.shape[1] - block):
        asked.clear()
        found = filled(view, begin, begin + block, counting)
        assert (found == np.ascontiguousarray(array).reshape(-1)[begin : begin + block]).all()
        assert max(asked) <= SPAN * block and sum(asked) <= SPAN * block
        assert turned or len(asked) <= 3


# ------------------------------------------------------------------------------- turned views


def gathered(view: View, block: int, gatherer: Gatherer, reader=read) -> np.ndarray:
    """Return a view read block by block, by threads that share a gatherer."""
    out = np.full(int(np.prod(view.shape)), -1)

    def one(begin: int) -> None:
        with gathering(gatherer):
            fill(view, view, begin, out[begin : begin + block], reader)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(0, out.size, block)))
    return out


@given(views(), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
def test_threads_that_gather_a_view_read_what_numpy_makes(drawn, block: int, group: int, unit: int):
    view, array = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "GATHERED_NBYTES", 8 * group)
        patch.setattr(gather, "UNIT", unit)
        found = gathered(view, block, Gatherer(2))
    assert (found == array.reshape(-1)).all()


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_a_turned_view_reads_each_unit_of_its_source_once(rows: tuple[int, ...], monkeypatch):
    """Of two joined matrices, turned: one group of all, of which each block needs every row."""
    parts = [np.arange(70 * n).reshape(n, 70) + 1000 * n for n in rows]
    view = concatenate([whole(part, part.shape) for part in parts], 0).transpose(0, 1)
    monkeypatch.setattr(gather, "UNIT", 50)
    asked: Counter[tuple[int, int]] = Counter()

    def counting(source: np.ndarray, begin: int, out: np.ndarray) -> None:
        asked[source.size, begin // 50] += 1
        assert begin // 50 == (begin + out.size - 1) // 50
        read(source, begin, out)

    found = gathered(view, 7, Gatherer(), counting)
    assert (found == np.concatenate(parts).T.reshape(-1)).all()
    assert len(asked) == sum(-(-part.size // 50) for part in parts)
    assert set(asked.values()) == {1}


def test_what_is_gathered_is_let_go_when_it_was_taken_and_bounded_before(monkeypatch):
    monkeypatch.setattr(gather, "GATHERED_NBYTES", 8 * 10)
    array = np.arange(400).reshape(20, 20)
    view, gatherer = whole(array, array.shape).transpose(0, 1), Gatherer(3)
    out = np.zeros(5, int)
    with gathering(gatherer):
        for begin in range(0, 400, 20):  # a quarter of each row, so that none is ever done
            fill(view, view, begin, out, read)
            assert len(gatherer._groups) <= 3
    again = Gatherer(3)
    gathered(view, 20, again)
    assert not again._groups


def test_an_error_below_a_turned_view_reaches_every_thread_that_waits():
    array = np.arange(400).reshape(20, 20)
    view, gatherer = whole(array, array.shape).transpose(0, 1), Gatherer()
    begun, go = threading.Event(), threading.Event()

    def broken(source: np.ndarray, begin: int, out: np.ndarray) -> None:
        begun.set()
        go.wait(10)
        raise OSError("broken")

    def one(begin: int) -> None:
        with gathering(gatherer):
            fill(view, view, begin, np.zeros(100, int), broken)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one, 0)
        assert begun.wait(10)
        second = pool.submit(one, 100)  # finds nothing left to do, and waits
        go.set()
        for work in (first, second):
            with pytest.raises(OSError, match="broken"):
                work.result(10)


def test_only_what_lies_turned_is_gathered():
    array = np.arange(24).reshape(2, 3, 4)
    view = whole(array, array.shape)
    assert not is_turned(view)
    assert not is_turned(view.slice(2, 1, 3)) and not is_turned(stack([view, view]))
    assert is_turned(view.transpose(1, 2)) and is_turned(view.transpose(0, 1))
    assert not is_turned(view.slice(1, 0, 1).transpose(0, 1))  # a dimension of 1 has no order
    twice = Box((0, 0), (3, 4), array, 0, (1, 2))  # windows that overlap
    assert not is_turned(View((3, 4), (twice,)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "toy.safetensors", toy(dtype="BF16"))


def test_a_viewed_tensor_is_read_digested_and_pickled_like_one_in_a_file(file: Path):
    specs = read_header(file).tensors
    spec = specs["model.embed_tokens.weight"]
    same = Viewed(spec.name, spec.dtype, whole(spec, spec.shape))
    again = pickle.loads(pickle.dumps(same))
    assert (again.shape, again.nbytes, again.path) == (spec.shape, spec.nbytes, str(file))
    assert list(files_of(again)) == [str(file)]
    assert (values_of(again, 5, 100) == values_of(spec, 5, 100)).all()
    expected = digest_file_range(spec.path, spec.start, spec.nbytes)
    assert digest_values(again) == digest_values(spec) == expected
    raw = bytearray(77)
    read_raw(again, 13, memoryview(raw))
    whole_bytes = file.read_bytes()[spec.start :]
    assert raw == whole_bytes[13 : 13 + 77]
    assert digest_values(spec, 2, 30) == digest_bytes(whole_bytes[4:64])
