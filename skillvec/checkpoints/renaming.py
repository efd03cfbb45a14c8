"""Names that move together: rules, prefixes, numbers."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.files.views import Index

Shapes = Mapping[str, Index]
DEPTH = 16  # parts of a name that may be a prefix


def moves(names: Iterable[str], there: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the ways in which one prefix for another may bring names there: name -> new name.

    Those that are there as they are stay; whether all of the new ones are is left to the caller. No
    prefix has a number in it, and modules keep their own names.
    """
    held = list(there)
    apart = sorted(set(names).difference(held))
    common = [
        prefix for prefix in (prefixes_of(apart[0]) if apart else ())
        if all(name.startswith(prefix) and "." in name[len(prefix) :] for name in apart)
    ]  # fmt: skip
    done = set()
    for prefix in common:
        probe = apart[0][len(prefix) :]
        for end in (name for name in held if name == probe or name.endswith(f".{probe}")):
            other = end[: len(end) - len(probe)]
            way = {name: other + name[len(prefix) :] for name in apart}
            if not numbered(other) and way[apart[0]] not in done:
                done.add(way[apart[0]])
                yield way


def numbered(name: str) -> bool:
    """Return whether a tensor is one of a row of layers or experts, going by its name."""
    return any(part.isdigit() for part in name.split("."))


# -------------------------------------------------------------------------- rules and prefixes


def renamed(mine: Shapes, rename: Sequence[str]) -> dict[str, str]:
    """Return new name -> old name after rules REGEX=REPLACEMENT, one after the other."""
    names = {name: name for name in mine}
    for rule in rename:
        regex, equals, replacement = rule.rpartition("=")  # a lookahead holds "=", a name does not
        if not equals or not regex:
            raise UsageError(f"--rename {rule!r}: expected REGEX=REPLACEMENT")
        try:
            pattern = re.compile(regex)
            changed = [(pattern.subn(replacement, name), old) for name, old in names.items()]
        except (re.error, IndexError, OverflowError) as error:
            raise UsageError(f"--rename {rule!r}: not a regular expression: {error}") from None
        if not any(count for (_, count), _ in changed):
            some = up_to_five(list(names))
            raise UsageError(f"--rename {rule!r}: matches none of the names:\n{some}")
        times = Counter(name for (name, _), _ in changed)
        twice = [f"{old}: {name}" for (name, _), old in changed if times[name] > 1]
        if twice:
            raise IncompatibleError(
                f"--rename {rule!r}: tensors that become one:\n{up_to_five(twice)}"
            )
        names = {name: old for (name, _), old in changed}
    return names


def prefixes_of(name: str) -> Iterator[str]:
    """Yield "", "a.", "a.b." of a.b.c: what may stand for another prefix has no number in it."""
    yield ""
    at = -1
    for part in name.split(".", DEPTH)[: min(DEPTH, name.count("."))]:
        if part.isdigit():
            return
        at += len(part) + 1
        yield name[: at + 1]


class Subtrees:
    """Names by prefix, and the prefixes under which the same names and shapes lie."""

    def __init__(self, shapes: Shapes) -> None:
        self.names: dict[str, list[str]] = defaultdict(list)
        self.alike: dict[tuple[int, int], list[str]] = defaultdict(list)
        self.keys: dict[str, tuple[int, int]] = {}
        self.taken: set[str] = set()
        for name in shapes:
            for prefix in prefixes_of(name):
                self.names[prefix].append(name)
        for prefix, names in self.names.items():
            # sums do not depend on the order; whoever pairs two prefixes compares each name
            total = sum(hash((name[len(prefix) :], shapes[name])) for name in names)
            self.keys[prefix] = len(names), total
            self.alike[len(names), total].append(prefix)

    def inside(self, prefix: str) -> bool:
        """Return whether a prefix lies within one that is taken."""
        return any(above in self.taken and above != prefix for above in prefixes_of(prefix))

    def like(self, key: tuple[int, int]) -> list[str]:
        return [prefix for prefix in self.alike.get(key, ()) if not self.inside(prefix)]


def last_part(prefix: str) -> str:
    return prefix[:-1].rpartition(".")[2]
