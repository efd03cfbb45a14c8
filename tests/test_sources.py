"""Sources: any range of a view is what numpy makes of the whole, and nothing more is read."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from families import save, toy
from hypothesis import given
from hypothesis import strategies as st

from skillvec.sources import (
    SPAN,
    View,
    Viewed,
    concatenate,
    digest_values,
    files_of,
    read_raw,
    stack,
    values_of,
    whole,
)
from skillvec.storage import digest_bytes, digest_file_range, read_header


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
