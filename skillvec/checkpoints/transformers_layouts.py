"""transformers' registry of checkpoint layouts, run on names and shapes instead of tensors.

Hides transformers' conversion objects: which of them a config.json names, how they rename, and
what their operations make, as views. `between` turns two sets of such views, of what is there and
of what is wanted, into views of the wanted tensors over those that are there. Taken are operations
that stack, join, cut and transpose whole tensors; those that reorder rows inside a tensor (rotary
permutations, interleaving) and those for many tensors to many are refused by name.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from skillvec.files.views import Box, Index, View, concatenate, row_major, stack

Shapes = Mapping[str, Index]
NESTED = 16  # configs within a config that are looked at
PAIRS = 1 << 16  # pairs of boxes of one tensor, beyond which it is not taken apart


def all_of(source: str, shape: Index) -> View:
    """Return a view of all of a tensor; it has a box also where there are no values."""
    return View(shape, (Box((0,) * len(shape), shape, source, 0, row_major(shape)),))


def drop_partial(views: Mapping[str, View], shapes: Shapes) -> dict[str, View]:
    """Return views without those of tensors (of `shapes`) of which only a part goes somewhere."""
    used: Counter[str] = Counter()
    for view in views.values():
        for box in view.boxes:
            used[box.source] += prod(box.sizes)
    partly = {name for name, numel in used.items() if numel != prod(shapes[name])}
    return {name: view for name, view in views.items() if not partly & {*view.sources}}


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Return the model types that a config and those within it name, its own first."""
    nested, at = [config], 0
    while at < len(nested) < NESTED:
        nested += [inner for inner in nested[at].values() if isinstance(inner, Mapping)]
        at += 1
    found = [inner.get("model_type") for inner in nested[:NESTED]]
    return list(dict.fromkeys(kind for kind in found if isinstance(kind, str)))


def mapping_of(config: Mapping[str, Any]) -> tuple[str, Callable[[], list[Any]]]:
    """Return the names in the registry that a config leads to, and what makes their entries anew.

    In transformers' order: of the class or else the model type, the base model, the models within,
    names of old. Entries hold state, so each use takes new ones. Raises ImportError before
    transformers 5.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    entries_of: Callable[[str], list[Any] | None] = get_checkpoint_conversion_mapping
    own, *within = model_types(config) or [""]
    classes = config.get("architectures")
    classes = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    base = str(MODEL_MAPPING_NAMES.get(own))

    def fresh() -> list[Any]:
        of_class = [entry for name in classes for entry in entries_of(name) or ()]
        of_base = entries_of(base) or (of_class and entries_of(own)) or []
        for entry in of_base:  # its patterns begin below the base model
            entry.scope_prefix, entry.base_model_prefix = "", "model"
        inner = [entry for name in within for entry in entries_of(name) or ()]
        old = entries_of("legacy") or []
        return [*(of_class or entries_of(own) or []), *of_base, *inner, *old]

    known = [name for name in (*classes, own, base, *within) if entries_of(name) is not None]
    return ", ".join(dict.fromkeys(known)), fresh


def converted(
    shapes: Shapes, mapping: list[Any], expected: Shapes
) -> tuple[dict[str, View | str], dict[str, str]]:
    """Return what a mapping makes of tensors, and what it refuses.

    The first is new name -> the old name, or a view over old ones; the second is reason -> a name
    that is not made. `expected` holds the shapes on the other side, where these decide.
    """
    renamings = [entry for entry in mapping if not hasattr(entry, "operations")]
    converters = [entry for entry in mapping if hasattr(entry, "operations")]
    made: list[tuple[str, View | str]] = []
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes):
        key, by, pattern = name, -1, None
        try:
            for entry in renamings:
                key, _ = entry.rename_source_key(key)
            while pattern is None and by + 1 < len(converters):
                by += 1
                key, pattern = converters[by].rename_source_key(key)
        except ValueError:  # a number in the name is none, or too long
            continue
        if pattern is None:
            made.append((key, name))
        else:
            groups[key, by][pattern].append(name)
    refused: dict[str, str] = {}
    for (key, by), parts in groups.items():
        try:
            made += _operated(converters[by], parts, key, shapes, expected)
        except ValueError as error:
            refused.setdefault(str(error), key)
    times = Counter(name for name, _ in made)
    return {name: how for name, how in made if times[name] == 1}, refused


def _runs(name: str) -> list[str]:
    return re.findall(r"[0-9]+|[^0-9]+", name)


def _order(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers by value and before text, as transformers does."""
    runs = ((run, run.lstrip("0")) for run in _runs(name))
    return [(0, len(n), n) if run[0] in "0123456789" else (1, 0, run) for run, n in runs]


def _counted(names: Sequence[str]) -> bool:
    """Return whether names are the same but for one number that counts from 0."""
    runs = [_runs(name) for name in names]
    if len(names) == 1 or len({len(run) for run in runs}) > 1:
        return len(names) == 1
    varying = [column for column in zip(*runs, strict=True) if len(set(column)) > 1]
    counted = [str(i) for i in range(len(names))]
    return len(varying) == 1 and [n.lstrip("0") or "0" for n in varying[0]] == counted


def _operated(
    converter: Any, parts: Mapping[str, list[str]], key: str, shapes: Shapes, expected: Shapes
) -> list[tuple[str, View | str]]:
    """Return the names and views that a converter makes; ValueError where it cannot be followed."""
    targets = converter.target_patterns
    head, found, tail = key.partition(targets[0])
    made = [head + target + tail for target in targets]
    if not found:
        raise ValueError(f"it has no {targets[0]!r} in its name")
    columns: list[list[View]] = []
    for pattern in converter.source_patterns:  # their order is that of joining
        if pattern in parts:
            ordered = sorted(parts[pattern], key=_order)
            if not _counted(ordered):
                raise ValueError(f"the tensors {pattern!r} are not numbered from 0 on")
            columns.append([all_of(name, shapes[name]) for name in ordered])
    for op in converter.operations:
        kind, dim, first = type(op).__name__, getattr(op, "dim", 0), columns[0][0]
        alone = len(columns) == len(columns[0]) == 1
        dims = {dim, getattr(op, "dim0", 0), getattr(op, "dim1", 0)}
        if kind == "MergeModulelist" and dim == 0:
            columns = [[stack(views)] for views in columns]
        elif not all(0 <= d < len(first.shape) for d in dims):
            raise ValueError(f"{op} of a tensor of shape {list(first.shape)}")
        elif kind == "Concatenate":
            columns = [[concatenate([view for views in columns for view in views], dim)]]
        elif kind == "Transpose" and alone:
            turned = first.transpose(op.dim0, op.dim1)
            if not op.check_dims or expected.get(made[0]) == turned.shape != first.shape:
                columns = [[turned]]
        elif kind in ("Chunk", "Split") and alone and not getattr(op, "num_shards_attribute", None):
            sizes = [-(-first.shape[dim] // len(made))] * len(made)
            if kind == "Split":
                sizes = [(*expected.get(name, ()), *[0] * dim, 0)[dim] for name in made]
            most = first.shape[dim]  # as torch cuts: the last pieces may be shorter
            ends = [min(sum(sizes[:i]), most) for i in range(len(made) + 1)]
            if ends[-1] != most or (kind == "Split" and sum(sizes) != most):
                raise ValueError(f"{op} does not fit a tensor of shape {list(first.shape)}")
            columns = [[first.slice(dim, begin, end)] for begin, end in pairwise(ends)]
        else:
            raise ValueError(f"the operation {kind} is not taken")
    if len(columns) != len(made) or any(len(views) != 1 for views in columns):
        raise ValueError(f"{converter.operations} do not make {len(made)} of it")
    return [(name, views[0]) for name, views in zip(made, columns, strict=True)]


def between(there: View, wanted: View, shapes: Shapes) -> list[tuple[str, Box]]:
    """Say of one tensor, as made of those there and as of wanted ones, how these come from those.

    `shapes` are those of the wanted tensors. Returns boxes of each; they do not cover it where the
    two differ in shape or are of too many boxes.
    """
    found: list[tuple[str, Box]] = []
    if there.shape != wanted.shape:
        return found
    twins = {(box.offset, box.sizes): box for box in there.boxes}
    many = len(there.boxes) * len(wanted.boxes) > PAIRS
    for box in wanted.boxes:
        twin, part = twins.get((box.offset, box.sizes)), there
        if twin is not None and 0 not in box.sizes:
            part = there._replace(boxes=(twin._replace(offset=(0,) * len(twin.offset)),))
        elif many:
            continue
        else:
            for dim, (begin, numel) in enumerate(zip(box.offset, box.sizes, strict=True)):
                part = part.slice(dim, begin, begin + numel)
        for piece in part.boxes:
            found.append((box.source, _placed(piece, box, shapes[box.source])))
    return found


def _placed(piece: Box, box: Box, shape: Index) -> Box:
    """Return a piece of a box that is read from a tensor of `shape` as a box of that tensor.

    Dimensions are told by their strides: whatever whole tensors go through, those stay the same.
    """
    strides = row_major(shape)
    start = box.start + sum(o * s for o, s in zip(piece.offset, box.strides, strict=True))
    offset = tuple(start // max(s, 1) % max(n, 1) for s, n in zip(strides, shape, strict=True))
    sizes, steps = [1] * len(shape), [0] * len(shape)
    for numel, stride, step in zip(piece.sizes, box.strides, piece.strides, strict=True):
        if numel != 1:
            dim = next(i for i, s in enumerate(strides) if s == stride and shape[i] > 1)
            sizes[dim], steps[dim] = numel, step
    return Box(offset, tuple(sizes), piece.source, piece.start, tuple(steps))
