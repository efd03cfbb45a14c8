"""What a format of quantised weights is: how a config says it, what makes weights of tensors."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from skillvec.checkpoints.unread import Tensors
from skillvec.files.tensors import Derived
from skillvec.files.views import Index

MAX_SIDE = 1 << 40  # of a side that a config states
# last parts of what means nothing without a weight beside it
PARTNERS = (
    "_scale_inv", ".weight_scale", ".weight_zero_point", ".weight_packed", ".weight_shape",
    ".weight_global_scale", ".weight_g_idx",
)  # fmt: skip


class Stated(NamedTuple):
    """What a checkpoint says of how its weights were quantised, and of the weights themselves.

    `dtype` is that of its config, `headers` are the metadata of its files, `shapes` gives those of
    the model's weights.
    """

    settings: Mapping[str, Any]
    dtype: str
    headers: Mapping[str, str]
    shapes: Callable[[], Mapping[str, Index]]


class FoundWeight(NamedTuple):
    """A quantised weight: the tensors that it takes, the weight's own first, and what they give."""

    names: tuple[str, ...]
    source: Derived
    note: str


class QuantizedFormat(NamedTuple):
    """A format of quantised weights; a row of quantized.FORMATS makes it known.

    `name` is the config's quant_method; `is_meant` tells settings that name none. `find` yields the
    weights that it finds among tensors, and sentences on what does not fit, from headers alone; it
    raises IncompatibleError for what is not taken.
    """

    name: str
    find: Callable[[Tensors, Stated], Iterator[FoundWeight | str]]
    is_meant: Callable[[object], bool] = lambda settings: False


def is_size(value: object, most: int | None = None) -> TypeGuard[int]:
    """Return whether someone wrote a size, of at most `most`."""
    return type(value) is int and 0 < value <= (MAX_SIDE if most is None else most)


def cut_sizes(pair: object, most: Index | None = None) -> tuple[int, int] | None:
    """Return two sizes that someone wrote, cut to a matrix; None where they are no sizes."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(is_size, pair)):
        return None
    rows, columns = most or (MAX_SIDE, MAX_SIDE)
    return min(pair[0], rows), min(pair[1], columns)
