"""How the tensors of one layout are made of those of another: names and shapes in, views out.

Hides prefixes, transformers' conversion registry and vocabularies of different length. Works on
names and shapes alone, without a list of architectures, and never guesses: a tensor for which no
rule holds, or more than one, is in no view. Transposes, stacks, joins and cuts are taken in both
directions; operations that reorder rows inside a tensor (rotary permutations, interleaving) are
refused by name, as is whatever transformers' registry does not describe.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from skillvec.checkpoints.model_classes import likely_configs, need_model_classes
from skillvec.checkpoints.renaming import (
    Shapes,
    Subtrees,
    last_part,
    numbered,
    prefixes_of,
    renamed,
)
from skillvec.checkpoints.transformers_layouts import (
    all_of,
    between,
    converted,
    mapping_of,
    model_types,
)
from skillvec.errors import IncompatibleError, UsageError
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source, Viewed
from skillvec.files.views import Box, Index, View
from skillvec.ops.kernels import STORAGE_DTYPE

SKIPPED = "rows differ: skipped"
UNRELATED = "by their shapes, no tensor of one can be joined, cut or turned out of the other's"
MOST_ROWS = 1 << 22  # beyond which sums of rows are not looked at
ALIKE = 32  # prefixes over the same tensors, beyond which none is looked at


class Bridge(NamedTuple):
    """What `bridge` found, by wanted name; the sources of the views are names of mine.

    `notes` says how a view was found where name or shape differ, `unused` which of mine go nowhere
    or in part, and why ("" where that is unknown), `rows_differ` what only a rule for rows can
    give, `skipped` what such a rule left out; `hints` are for whoever reports what is unmatched.
    """

    views: dict[str, View]
    notes: dict[str, str]
    unused: dict[str, str]
    rows_differ: list[str]
    skipped: dict[str, str]
    hints: list[str]


def bridge(
    mine: Shapes,
    wanted: Shapes,
    *,
    configs: Sequence[Mapping[str, Any]] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
) -> Bridge:
    """Find how each tensor of `wanted` is made of tensors of `mine`; both map names to shapes.

    In this order: `rename` rules (REGEX=REPLACEMENT, on names of mine), equal names, one prefix
    for another, transformers' mappings for the model types in `configs`, the rule for `rows`:
    "strict", "common" (the first rows, zeros below) or "skip". Raises UsageError for a rule that
    is broken or matches nothing, and where transformers is needed and missing; IncompatibleError
    where two names become one.
    """
    if rows not in ("strict", "common", "skip"):
        raise UsageError(f"--rows {rows}: expected strict, common or skip")
    search = _Search(mine, wanted, renamed(mine, rename))
    _match_names(search)
    most, least = sorted((len(search.have), len(search.want)), reverse=True)
    if least and len(search.rows_apart()) < most:
        if _may_share_values(search.have, search.want):
            _match_by_registry(search, configs)
        else:
            search.hints[UNRELATED] = None
    _match_rows(search, rows)
    return search.found()


def loaded_as(
    files: Shapes, memory: Shapes, label: str, fresh: Callable[[], list[Any]]
) -> tuple[Bridge, Bridge]:
    """Find how a model in memory is made of files, and files of it: `label` names its class.

    `fresh` makes the entries of transformers' mapping for the class. That goes first, as in
    loading, then equal names and prefixes.
    """
    by = f"by transformers' mapping of {label}"
    found = []
    for mine, wanted in ((files, memory), (memory, files)):
        search = _Search(mine, wanted, {name: name for name in mine})
        for again in (False, True):  # then under the prefixes that were found
            names = {search.moved.get(name, name): name for name in search.have}
            have: dict[str, Index] = {new: search.have[name] for new, name in names.items()}
            left, no = converted(have, fresh() if mine is files else [], search.want)
            right, nor = converted(search.want, fresh() if wanted is files else [], have)
            search.hints |= dict.fromkeys(f"{key}, {by}: {why}" for why, key in (no | nor).items())
            _join(search, left, right, names, by)
            if not again:
                _match_names(search)
        found.append(search.found())
    return found[0], found[1]


def viewed_specs(bridge: Bridge, tensors: Mapping[str, Source]) -> dict[str, Source]:
    """Return the wanted tensors as sources, given those of mine by name.

    A tensor in a file that is all of a wanted one stays that, under the wanted name. Raises
    IncompatibleError where the parts of one differ in dtype, or have one that cannot be cut.
    """
    sources: dict[str, Source] = {}
    for name, view in bridge.views.items():
        first = tensors[view.boxes[0].source]
        if view == all_of(view.boxes[0].source, first.shape):
            if isinstance(first, TensorSpec) and first.name != name:
                first = first._replace(name=name)
            if first.name == name:
                sources[name] = first
                continue
        if first.dtype not in STORAGE_DTYPE:
            raise IncompatibleError(
                f"{name}: made of {first.name}, {first.dtype}, expected a dtype whose values can be"
                " read one by one: dequantise the model first"
            )
        for part in view.sources:
            if tensors[part].dtype != first.dtype:
                raise IncompatibleError(
                    f"{name}: made of {first.name}, {first.dtype}, and {part},"
                    f" {tensors[part].dtype}: expected one dtype; save the model in one"
                )
        boxes = tuple(box._replace(source=tensors[box.source]) for box in view.boxes)
        sources[name] = Viewed(name, first.dtype, View(view.shape, boxes))
    return sources


def _match_names(search: "_Search") -> None:
    """Take what has the same name and shape, then the same under another prefix."""
    for name, shape in list(search.want.items()):
        if search.have.get(name) == shape:
            search.take_whole(name, name)
    _match_prefixes(search)


class _Search:
    """What is still to be found: `have` and `want` hold what no view has taken or made.

    Tensors of mine go by their names after --rename here; views get their `real` ones.
    """

    def __init__(self, mine: Shapes, wanted: Shapes, real: dict[str, str]) -> None:
        self.real, self.shapes = real, {name: mine[real[name]] for name in real}
        self.have, self.want = dict(self.shapes), dict(wanted)
        self.moved: dict[str, str] = {}  # name of mine -> under the wanted prefix
        self.views: dict[str, View] = {}
        self.notes: dict[str, str] = {}
        self.why: dict[str, str] = {}  # why a tensor of mine is not used
        self.used: Counter[str] = Counter()  # values that views hold
        self.rows_differ: list[str] = []
        self.skipped: dict[str, str] = {}
        self.hints: dict[str, None] = {}

    def take(self, wanted: str, view: View, note: str) -> None:
        """Give a wanted tensor its view."""
        for box in view.boxes:
            self.used[box.source] += prod(box.sizes)
            self.have.pop(box.source, None)
        boxes = tuple(box._replace(source=self.real[box.source]) for box in view.boxes)
        self.views[wanted] = View(view.shape, boxes)
        del self.want[wanted]
        if note:
            self.notes[wanted] = note

    def take_whole(self, wanted: str, name: str, how: str = "") -> None:
        note = f"from {self.real[name]}{how}" if self.real[name] != wanted else ""
        self.take(wanted, all_of(name, self.have[name]), note)

    def rows_apart(self) -> dict[str, str]:
        """Return wanted name -> name of mine for what is left and differs in rows alone."""
        come = {self.moved[name]: name for name in self.have if name in self.moved}
        pairs = {w: w if w in self.have else come.get(w) for w in self.want}
        return {
            wanted: name
            for wanted, name in pairs.items()
            if name is not None and _rows_apart(self.have[name], self.want[wanted])
        }

    def found(self) -> Bridge:
        unused = {}
        for name, shape in self.shapes.items():
            to = self.want.get(self.moved.get(name, name))
            if name not in self.used:
                expected = "" if to is None else f"{list(shape)}, expected {list(to)}"
                unused[self.real[name]] = self.why.get(name, expected)
            elif self.used[name] < prod(shape):
                unused[self.real[name]] = f"{self.used[name]} of {prod(shape)} values are used"
        hints = list(self.hints) if self.want else []
        if self.want and self.have:
            hints.append(
                "names that differ are mapped by --rename REGEX=REPLACEMENT; tensors that are"
                " joined, cut or turned where transformers has no mapping for it are not taken"
            )
        return Bridge(self.views, self.notes, unused, self.rows_differ, self.skipped, hints)


def _rows_apart(one: Index, other: Index) -> bool:
    return (
        len(one) == len(other) in (1, 2)
        and one[:1] != other[:1]
        and (-1, *one[1:]) == (-1, *other[1:])
    )


def _match_rows(search: _Search, rows: str) -> None:
    """Treat what differs in rows alone: the vocabulary, one pair of lengths for all tensors."""
    apart = search.rows_apart()
    lengths = {(search.have[name][0], search.want[w][0]) for w, name in apart.items()}
    # in numbered layers alone it is heads or widths that differ, not the vocabulary
    if len(lengths) != 1 or all(map(numbered, apart)):
        return
    ((have, want),) = lengths
    for wanted, name in apart.items():
        if rows == "strict":
            search.rows_differ.append(wanted)
        elif rows == "skip":
            search.skipped[wanted] = f"{have} rows, expected {want}: skipped"
            search.why[name] = SKIPPED
            del search.have[name], search.want[wanted]
        elif min(have, want):
            view = all_of(name, search.have[name]).slice(0, 0, min(have, want))
            note = f"first {want} of {have} rows" if have > want else f"{have} rows, then zeros"
            search.take(wanted, View(search.want[wanted], view.boxes), note)
            search.used[name] = prod(search.shapes[name])  # cut on purpose


def _match_prefixes(search: _Search) -> None:
    """Take the subtrees of names that are the same but for their prefix, where only one fits.

    A subtree goes to the one with the same last part, else, if it holds modules, to the only one
    that has the same names and shapes. The prefixes found hold for the other names too.
    """
    mine, wanted = Subtrees(search.have), Subtrees(search.want)
    rules: dict[str, set[str]] = defaultdict(set)
    undecided: set[str] = set()  # what lies inside is not tried: it would fit by elimination
    for prefix in sorted(mine.names, key=lambda prefix: (prefix.count("."), prefix)):
        key, names = mine.keys[prefix], mine.names[prefix]
        if key not in wanted.alike or mine.inside(prefix) or undecided & {*prefixes_of(prefix)}:
            continue
        if max(len(mine.alike[key]), len(wanted.alike[key])) > ALIKE:
            undecided.add(prefix)
            continue
        sides = mine.like(key), wanted.like(key)
        ours, theirs = ([p for p in side if last_part(p) == last_part(prefix)] for side in sides)
        if not theirs and any("." in name[len(prefix) :] for name in names):
            ours, theirs = sides
        if len(theirs) == 1 == len(ours):
            other = theirs[0]
            moved = {name: other + name[len(prefix) :] for name in names}
            if any(
                to in search.have or search.want.get(to) != search.have[name]
                for name, to in moved.items()
            ):
                continue
            for name, to in moved.items():
                search.take_whole(to, name)
            mine.taken.add(prefix)
            wanted.taken.add(other)
            while prefix and last_part(prefix) == last_part(other):
                prefix, other = (p[: -len(last_part(p)) - 1] for p in (prefix, other))
            rules[prefix].add(other)
        elif theirs:
            undecided.add(prefix)
            what = f"{prefix or 'no prefix'} may stand for {' or '.join(map(repr, theirs[:5]))}"
            search.hints[f"{what}: say which with --rename REGEX=REPLACEMENT"] = None
    moved = {}
    for name in search.have:
        fitting = [prefix for prefix in prefixes_of(name) if prefix in rules]
        if fitting and len(rules[fitting[-1]]) == 1 and name not in search.want:
            moved[name] = min(rules[fitting[-1]]) + name[len(fitting[-1]) :]
    times = Counter([*moved.values(), *search.have])
    search.moved = {name: to for name, to in moved.items() if times[to] == 1}
    for name, to in search.moved.items():
        if search.want.get(to) == search.have[name]:
            search.take_whole(to, name)


# ------------------------------------------------------------------------ transformers' registry


def _may_share_values(mine: Shapes, wanted: Shapes) -> bool:
    """Return whether shapes allow that some tensors are made of others: True where in doubt.

    Whatever the registry describes stacks, joins, cuts or turns matrices, or rows, along one side
    and leaves the other side whole. So with rows of that side's length, some tensors of mine have
    as many rows, all together, as some wanted ones. Those of the same length as they lie may also
    be cut, or differ in their number.
    """
    lengths = [{s[-1] for s in shapes.values() if len(s) > 1} for shapes in (mine, wanted)]
    if lengths[0] & lengths[1]:
        return True
    sides = [_rows_by_width(shapes) for shapes in (mine, wanted)]
    return any(
        _sums(sides[0][width]) & _sums(sides[1][width]) > 1
        if max(sum(n * count for n, count in side[width].items()) for side in sides) <= MOST_ROWS
        else True
        for width in sides[0].keys() & sides[1].keys()
    )


def _rows_by_width(shapes: Shapes) -> dict[int, Counter[int]]:
    """Return how often tensors have how many rows, by each of the last two sides as the width."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for shape in shapes.values():
        for width in {n for n in shape[-2:] if n > 1}:
            found[width][prod(shape) // width] += 1
    return found


def _sums(counted: Counter[int]) -> int:
    """Return the sums of some of these numbers as bits of one; bit 0 is the sum of none."""
    sums = 1
    for number, count in counted.items():
        times = 1
        while count:
            times = min(times, count)
            sums |= sums << number * times
            count, times = count - times, 2 * times
    return sums


def _match_by_registry(search: _Search, configs: Sequence[Mapping[str, Any]]) -> None:
    """Take what transformers' mappings make of the rest: of mine, of the wanted names, of both."""
    if not configs:
        search.hints["no config.json says which of transformers' mappings to use"] = None
    elif search.want and search.have:
        need_model_classes(
            f"{next(iter(search.want))}: no tensor of the other side has its name and shape, and"
            " looking up other layouts of the model"
        )
    for config in chain.from_iterable(map(likely_configs, configs)):
        if not search.want or not search.have:
            return
        try:
            label, fresh = mapping_of(config)
        except ImportError:
            search.hints["this transformers has no registry of layouts: 5.23 has one"] = None
            return
        if not label:
            kinds = ", ".join(model_types(config)[:5]) or "a config without a model type"
            search.hints[f"transformers has no mapping for {kinds}"] = None
        by = f"by transformers' mapping of {label or 'old names'}"
        for moved in (dict[str, str](), search.moved):
            for of_mine, of_wanted in ((True, False), (False, True), (True, True)):
                names = {moved.get(name, name): name for name in search.have}
                have = {new: search.have[name] for new, name in names.items()}
                again = moved is search.moved and names.keys() == search.have.keys()
                if not search.want or not have or again:
                    break
                left, no = converted(have, fresh() if of_mine else [], search.want)
                right, nor = converted(search.want, fresh() if of_wanted else [], have)
                for why, key in (no | nor).items():
                    search.hints[f"{key}, {by}: {why}"] = None
                _join(search, left, right, names, by)


def _join(
    search: _Search,
    left: Mapping[str, View | str],
    right: Mapping[str, View | str],
    names: Mapping[str, str],
    by: str,
) -> None:
    """Take what the same tensors, made of mine (left) and of wanted ones (right), say of these.

    `names` gives the names of mine that those on the left stand for.
    """
    parts: dict[str, list[Box]] = defaultdict(list)
    for key, one in left.items():
        other = right.get(key)
        if isinstance(one, str) and isinstance(other, str):
            shape = search.have[names[one]]
            if shape == search.want[other]:
                search.take_whole(other, names[one], f", {by}")
            elif _rows_apart(shape, search.want[other]):
                search.moved[names[one]] = other
        elif other is not None:
            there = all_of(one, search.have[names[one]]) if isinstance(one, str) else one
            wanted = all_of(other, search.want[other]) if isinstance(other, str) else other
            for name, box in between(there, wanted, search.want):
                parts[name].append(box._replace(source=names[box.source]))
    for name, boxes in parts.items():
        if sum(prod(box.sizes) for box in boxes) == prod(search.want[name]):
            note = f"{len(boxes)} tensors, {boxes[0].source} to {boxes[-1].source}, joined {by}"
            note = note if len(boxes) > 1 else f"made of {boxes[0].source} {by}"
            search.take(name, View(search.want[name], tuple(boxes)), note)
