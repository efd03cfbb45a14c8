"""How long names of tensors become short ones: cut in the middle, and one for each name.

A name is a row of words between dots. Names that differ in whole numbers alone (of layers, of
experts) have one shape and are cut alike; numbers stay. Each cut is one "…", for words or for the
middle of one, and a label finds its own name alone in the table, read as a pattern with "…" for
anything. A last word `weight` goes first, without a mark where the label has one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

CUT = "\u2026"
NUMBER = "\0"  # stands for a whole number; no name that is printed has it
LEAST = 3  # characters of a word that is cut are left at its beginning, and at its end
WIDENED = 3  # by which a room grows that is too small
MOST_WORDS = 8  # of a name are tried to be left out: names in files may have any number
MOST_SHAPES = 500  # of which each is compared with all others


def measure(text: str) -> int:
    """Return how many places of a terminal a text takes: letters of some scripts take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text.replace(NUMBER, "0"))


def shorten(names: Sequence[str], room: int) -> list[str]:
    """Return a label for each name: itself where it fits the room, else with its middle cut.

    Different names have different labels; where the room is too small for that, some are wider.
    Blanks that indent a name stay.
    """
    shapes: dict[str, int] = {}  # and what the longest name of each has beside it
    for name in names:
        shape = _shape(name)
        shapes[shape] = max(shapes.get(shape, 0), measure(name) - measure(shape))
    if len(shapes) > MOST_SHAPES or any(CUT in shape for shape in shapes):
        return [*names]  # too many to compare, or cut already
    common = Counter(word for shape in shapes for word in {*shape.split(".")})
    chosen = {shape: _choose(shape, room - more, common, [*shapes.keys() - {shape}])
              for shape, more in shapes.items()}  # fmt: skip
    return [_fill(chosen[_shape(name)], name) for name in names]


def _shape(name: str) -> str:
    """Return a name without its indent and with a mark for every whole number."""
    return ".".join(NUMBER if word.isdecimal() else word for word in name.strip().split("."))


def _fill(label: str, name: str) -> str:
    """Return the label of a shape with the indent and the numbers of one name."""
    words = name.strip()
    numbers = iter([word for word in words.split(".") if word.isdecimal()])
    return name[: name.index(words)] + re.sub(NUMBER, lambda _: next(numbers), label)


def _choose(shape: str, room: int, common: Counter[str], others: Sequence[str]) -> str:
    """Return the first label of a shape that fits the room, and fits no other shape.

    Where there is none the room grows, in the end to what the whole name takes.
    """
    for most in range(max(room, 1), measure(shape), WIDENED):
        for label in _list_labels(shape.split("."), most, common):
            if measure(label) <= most and not _fits_any(label, others):
                return label
    return shape


def _list_labels(words: list[str], room: int, common: Counter[str]) -> Iterator[str]:
    """Yield the labels of a name, those first that leave out what tells least."""
    ways = [*_list_left_out(words, common)]
    for left_out in ways:
        yield _join(words, left_out)
    for left_out in [frozenset[int](), *ways]:  # a word that stays is cut
        label = _join(words, left_out)
        for i in sorted({*range(len(words))} - left_out, key=lambda i: -len(words[i])):
            rest = room - measure(label) + measure(words[i])
            rest = max(rest * len(words[i]) // max(measure(words[i]), 1), 2 * LEAST + 1) - 1
            if rest < len(words[i]) - 1:
                word = f"{words[i][: rest // 2]}{CUT}{words[i][rest // 2 - rest :]}"
                yield _join([*words[:i], word, *words[i + 1 :]], left_out)


def _list_left_out(words: list[str], common: Counter[str]) -> Iterator[frozenset[int]]:
    """Yield which words of a name to leave out, those first that tell least.

    These are `weight` at the end, words inside that most names have, the first word and words
    before a number. Numbers stay, and so does the last word beside `weight`.
    """
    end = len(words) - (words[-1] == "weight" and len(words) > 1)
    inside: list[int] = []
    before: list[int] = []
    for i in range(1, end - 1):
        if words[i] != NUMBER:
            (before if words[i + 1] == NUMBER else inside).append(i)
    inside.sort(key=lambda i: -common[words[i]])
    first = [0] if end > 1 and words[0] != NUMBER else []
    order = [*range(end, len(words)), *inside, *first, *reversed(before)][:MOST_WORDS]
    for chosen in _list_choices(len(order)):
        yield frozenset(order[i] for i in chosen)


@cache
def _list_choices(count: int) -> list[tuple[int, ...]]:
    """Return all choices of some of `count` things; each weighs more than all before it."""
    sizes = range(1, count + 1)
    every = [chosen for size in sizes for chosen in combinations(range(count), size)]
    return sorted(every, key=lambda chosen: sum(1 << i for i in chosen))


def _join(words: list[str], left_out: frozenset[int]) -> str:
    """Return the words that stay, with a mark for each run of those that do not."""
    parts: list[str] = []
    for i, word in enumerate(words):
        if i not in left_out:
            parts.append(word)
        elif parts[-1:] != [CUT] and (i < len(words) - 1 or CUT not in "".join(parts)):
            parts.append(CUT)
    return ".".join(parts).replace(f".{CUT}", CUT).replace(f"{CUT}.", CUT)


def _fits_any(label: str, others: Sequence[str]) -> bool:
    """Return whether a label could be read as another shape too."""
    pattern = ".*".join(map(re.escape, label.split(CUT)))
    found = re.compile(rf"{pattern}(\.weight)?", re.DOTALL)
    return any(found.fullmatch(other) for other in others)
