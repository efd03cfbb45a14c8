"""What checkpoints of training runs have in common: tensors in parts, files of ranks, side files.

Every tensor comes out in the dtype it is stored in. Files are parsed for addresses
(skillvec.checkpoints.pickles); the parts of a tensor must tile it exactly.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.checkpoints.opened import Found, Opened
from skillvec.checkpoints.pickles import ADVICE, Stored, brief
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, up_to_five
from skillvec.files.header import MAX_DIMENSIONS, MAX_SIZE
from skillvec.files.tensors import Source, Viewed
from skillvec.files.views import Index, View

MAX_RANKS = 1 << 17
MAX_CELLS = 1 << 24  # of the grid that the parts of one tensor cut it into
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def of_training(open_folder: Callable[[Path, str], Opened]) -> Callable[[Found], Opened]:
    """Return an opener of folders that a training run saved, whose errors name the model.

    It reads metadata and pickles alone, and compares the values of what ranks hold in common.
    """

    @wraps(open_folder)
    def open_found(found: Found) -> Opened:
        folder, what = found.folder or Path(), found.what
        try:
            return open_folder(folder, what)
        except SkillvecError as error:
            text = str(error)
            raise type(error)(text if text.startswith(what) else f"{what}: {text}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                RecursionError) as error:  # fmt: skip
            raise FormatError(
                f"{what}: {folder} is not laid out as its kind of checkpoint: {error!r:.200}"
            ) from None

    return open_found


def find_side(*folders: Path) -> Path | None:
    """Return the first folder that holds a config or tokenizer."""
    return next((f for f in folders if any((f / name).is_file() for name in SIDE_FILES)), None)


def as_shape(value: Any) -> Index:
    """Return a shape or offset of a pickle, checked."""
    shape = tuple(value)
    if len(shape) > MAX_DIMENSIONS or any(
        type(n) is not int or not 0 <= n <= MAX_SIZE for n in shape
    ):
        raise FormatError(f"not a shape: {brief(value)}")
    return shape


def assemble(name: str, shape: Index, parts: Sequence[tuple[Index, Stored]]) -> Source:
    """Return a tensor made of parts at offsets, which must tile it: no gap and no overlap."""
    dtypes = sorted({part.dtype for _, part in parts})
    ranks = {len(shape), *(len(o) for o, _ in parts), *(len(part.shape) for _, part in parts)}
    if len(dtypes) != 1 or len(ranks) != 1:
        raise FormatError(f"tensor {name!r}: parts of {dtypes}, of {sorted(ranks)} dimensions")
    parts = [(offset, part) for offset, part in parts if prod(part.shape)]
    cuts = [
        sorted({0, n, *(o[d] for o, _ in parts), *(o[d] + part.shape[d] for o, part in parts)})
        for d, n in enumerate(shape)
    ]
    if prod(map(len, cuts)) > MAX_CELLS:
        raise IncompatibleError(f"tensor {name!r}: {len(parts)} parts that form no grid: {ADVICE}")
    covered = np.zeros([len(cut) - 1 for cut in cuts], np.bool_)
    places = [{value: i for i, value in enumerate(cut)} for cut in cuts]
    for offset, part in parts:
        corners = zip(places, offset, part.shape, strict=True)
        covered[tuple(slice(at[o], at[o + n]) for at, o, n in corners)] = True
    numel = sum(prod(part.shape) for _, part in parts)
    inside = all(cut[-1] == n for cut, n in zip(cuts, shape, strict=True))
    if not inside or numel != prod(shape) or not covered.all():
        raise FormatError(
            f"tensor {name!r}: {len(parts)} parts of {numel} values do not tile {list(shape)}"
        )
    if len(parts) == 1:
        return parts[0][1].source(name)
    view = View(shape, tuple(part.box(name, offset) for offset, part in parts))
    return Viewed(name, dtypes[0], view)


def order_ranks(found: Sequence[tuple[int, Path]], world: int) -> list[Path]:
    """Return the files of ranks 0.. in order; raise IncompatibleError naming those missing."""
    files = dict(found)
    missing = [str(rank) for rank in range(min(world, MAX_RANKS)) if rank not in files]
    if missing or not len(found) == len(files) == world:
        raise IncompatibleError(
            f"expected the files of {world} ranks, found {len(found)}; ranks missing:\n"
            + up_to_five(missing)
        )
    return [files[rank] for rank in range(world)]
