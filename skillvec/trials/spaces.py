"""Spaces: what a search may choose, and the recipe that a point of it is.

A space is said in words ("lam=0:2 by=layers:4") or by a YAML or JSON file with the same keys. Its
dimensions have names ("lam.attention") and bounds; a point gives each a value, and is a recipe that
`combine` takes. Which layers and kinds of modules there are, the names of the vectors' tensors say.
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any

from skillvec.errors import UsageError, up_to_five
from skillvec.ops.merge_methods import OPERATORS, check_parameters
from skillvec.ops.names import NUMBER, layer_of, natural_order
from skillvec.vectors.recipe import MAX_NBYTES, PARSERS, Recipe, Rule, Share

LAM = "0:2"  # where nothing is said of lambda
OF_VECTOR = ("lam", "by", "switch", "only")
OF_SPACE = ("op", "seed", "vectors")
NUMERIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.I)
# Looked for part by part from the end of a tensor's name
ROLES = (
    ("norm", ("norm", "ln_", "ln1", "ln2")),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "ffn", "feed_forward", "feedforward", "expert", "moe", "fc1", "fc2")),
    ("embeddings", ("embed", "wte", "wpe", "lm_head")),
)

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: evenly, or in their logarithm; or whole ones."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        notes = [word for word, so in (("log", self.log), ("whole", self.whole)) if so]
        return ", ".join([f"{self.low:g} to {self.high:g}", *notes])

    def nearest(self, value: float) -> float:
        """Return the number of the range that is nearest to a value."""
        return min(max(value, self.low), self.high)


Dimension = Range | tuple[str | bool | int | float, ...]


@dataclass(frozen=True)
class Free:
    """The name of a dimension, where a recipe has a number or a word."""

    name: str


@dataclass(frozen=True)
class Part:
    """What is said of one vector: numbers, or the dimensions that give them."""

    ref: str
    weight: tuple[Any, ...]  # one, or the points of a gradient
    rules: tuple[tuple[str, Any], ...] = ()  # a glob and its weight
    switches: tuple[tuple[str, Free], ...] = ()  # globs of what may be off
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what is off, by choice
    chosen: Any = None  # the dimension whose choices those are
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """Dimensions by name, and what a point of them makes of the vectors."""

    op: str
    seed: int
    parts: tuple[Part, ...]
    dimensions: Mapping[str, Dimension]
    parameters: Mapping[str, Any] = field(default_factory=dict)  # the same for all vectors

    def recipe(self, point: Point) -> Recipe:
        """Return the recipe of a point."""

        def value(said: Any) -> Any:
            return point[said.name] if isinstance(said, Free) else said

        def values(said: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value(item) for key, item in said.items()}

        shares = []
        for part in self.parts:
            weight: Any = tuple(float(value(item)) for item in part.weight)
            rules = [Rule(match, float(value(item))) for match, item in part.rules]
            off = [match for match, item in part.switches if not value(item)]
            off += part.only[value(part.chosen)] if part.only else ()
            rules += [Rule(match, 0.0) for match in off]
            shares.append(
                Share(
                    part.ref,
                    weight if len(weight) > 1 else weight[0],
                    values(part.parameters),
                    tuple(rules),
                )
            )
        return Recipe(self.op, tuple(shares), values(self.parameters), self.seed)

    def start(self) -> dict[str, Any]:
        """Return the point nearest to lambda = 1, all layers on, parameters at their defaults."""
        defaults = OPERATORS[self.op].defaults
        point: dict[str, Any] = {}
        for name, dimension in self.dimensions.items():
            key = name.rpartition(".")[2]
            if isinstance(dimension, Range):
                point[name] = dimension.nearest(defaults.get(key, 1))
            else:
                default = defaults.get(key)
                point[name] = default if default in dimension else dimension[0]
        return point

    def unchanged(self) -> Recipe:
        """Return the recipe that adds every vector as it is: lambda = 1."""
        return Recipe("linear", tuple(Share(part.ref) for part in self.parts))

    def describe(self) -> dict[str, str]:
        """Return the bounds of each dimension, in words, by name."""
        return {
            name: str(d) if isinstance(d, Range) else " or ".join(map(str, d))
            for name, d in self.dimensions.items()
        }


def read_space(spec: str | Mapping[str, Any], vectors: Mapping[str, Sequence[str]]) -> Space:
    """Return the space that words, a file or its content say of vectors.

    `vectors` gives the names of the tensors of each, by its reference. Raises UsageError for keys
    that are not known, bounds that an operator does not take, and a space of one point.
    """
    where, said = _read(spec)
    op = said.get("op", "linear")
    if op not in OPERATORS:
        raise UsageError(f"{where}: no operator {op!r}; there are {', '.join(OPERATORS)}")
    taken = OPERATORS[op].defaults
    each = [key for key, default in taken.items() if type(default) in (int, float)]
    shared = [key for key in taken if key not in each]
    _refuse_unknown(said, (*OF_SPACE, *OF_VECTOR, *taken), where)
    own = said.get("vectors", [{}] * len(vectors))
    if not isinstance(own, list | tuple) or len(own) != len(vectors):
        raise UsageError(
            f"{where}: vectors: expected a list of {len(vectors)}, one for each vector, in their"
            f" order, found {own!r:.60}"
        )
    dimensions: dict[str, Dimension] = {}
    parts = []
    for i, ((ref, names), mine) in enumerate(zip(vectors.items(), own, strict=True)):
        at = f"{where}: vectors[{i}]"
        if not isinstance(mine, Mapping):
            raise UsageError(f"{at}: expected an object, found {mine!r:.60}")
        _refuse_unknown(mine, (*OF_VECTOR, *each), at)
        told = {key: said[key] for key in (*OF_VECTOR, *each) if key in said} | dict(mine)
        prefix = f"v{i + 1}." if len(vectors) > 1 else ""
        part = _Reader(prefix, dimensions, at if mine else where, taken)
        parts.append(part.read(ref, names, told))
    reader = _Reader("", dimensions, where, taken)
    parameters = reader.parameters({key: said[key] for key in shared if key in said})
    seed = said.get("seed", 0)
    if type(seed) is not int:
        raise UsageError(f"{where}: seed: expected a whole number, found {seed!r:.40}")
    space = Space(op, seed, tuple(parts), dimensions, parameters)
    if not dimensions:
        raise UsageError(f"{where}: nothing is left to choose; a range is low:high, as in lam=0:2")
    _check_bounds(space, where)
    return space


# --------------------------------------------------------------------------------------- reading


def _read(spec: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return where a space is said, for messages, and its keys."""
    if isinstance(spec, Mapping):
        return "space", spec
    parse = PARSERS.get(Path(spec).suffix.lower())
    if parse is None:
        return "space", dict(_read_words(spec))
    where = f"space {spec}"
    try:
        content = Path(spec).read_bytes()
        if len(content) > MAX_NBYTES:
            raise ValueError(f"expected at most {MAX_NBYTES} bytes, found more")
        data = parse(content.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no space can be read from it: {error}") from None
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected keys such as lam, by and op, found {data!r:.60}")
    return where, data


def _read_words(spec: str) -> Iterator[tuple[str, Any]]:
    seen = set()
    for word in re.split(r"[,\s]+", spec.strip()):
        key, equals, text = ("lam", "=", LAM) if word == "lam" else word.partition("=")
        if not equals or not key or not text:
            raise UsageError(
                f"space {spec!r}: {word!r} is not KEY=VALUE; write lam=0:2, by=layers:4 or a file"
                f" that ends in {', '.join(PARSERS)}"
            )
        if key in seen:
            raise UsageError(f"space {spec!r}: {key} is said twice")
        seen.add(key)
        yield key, _read_text(text)


def _read_text(text: str) -> Any:
    """Return the number, truth value or text that a word is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if NUMERIC.fullmatch(text):
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    return text


def _refuse_unknown(said: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = [str(key) for key in said if key not in allowed]
    if unknown:
        raise UsageError(
            f"{where}: unknown keys; there are {', '.join(allowed)}:\n{up_to_five(unknown)}"
        )


def _read_dimension(said: Any, whole: bool, where: str) -> Any:
    """Return a Range, a tuple of choices, or what is said where it leaves no choice."""
    log = False
    if isinstance(said, str) and ":" in said:
        words = said.split(":")
        log = words[-1] == "log"
        ends = [_read_text(word) for word in (words[:-1] if log else words)]
    elif isinstance(said, str) and "|" in said:
        return tuple(_read_text(word) for word in said.split("|"))
    elif isinstance(said, list | tuple):
        ends = [*said]
    else:
        return said
    numbers = all(type(end) in (int, float) and isfinite(end) for end in ends)
    if not numbers or len(ends) != 2 or ends[0] >= ends[1]:
        raise UsageError(f"{where}: expected low:high with low below high, found {said!r:.60}")
    if log and ends[0] <= 0:
        raise UsageError(f"{where}: a logarithmic range begins above 0, found {said!r:.60}")
    if whole and not all(isinstance(end, int) for end in ends):
        raise UsageError(f"{where}: expected whole numbers, found {said!r:.60}")
    return Range(ends[0], ends[1], log, whole)


@dataclass(frozen=True)
class _Reader:
    """Reads what is said of one vector, or of all, and adds the dimensions that it leaves open."""

    prefix: str
    dimensions: dict[str, Dimension]
    where: str
    taken: Mapping[str, Any]  # the operator's parameters with their defaults

    def read(self, ref: str, names: Sequence[str], said: Mapping[str, Any]) -> Part:
        lam = _read_dimension(said.get("lam", LAM), False, f"{self.where}: lam")
        if not isinstance(lam, Range | int | float) or isinstance(lam, bool):
            raise UsageError(f"{self.where}: lam: expected a number or low:high, found {lam!r:.60}")
        by = said.get("by", "whole")
        kind, count = self._grouping("by", by, ("whole", "layers", "knots", "kinds"))
        weight: tuple[Any, ...] = (1.0,)
        groups: list[tuple[str, str]] = []
        if kind == "whole":
            weight = (self._open("lam", lam),)
        elif kind == "knots":
            most = max(map(len, layers_of(names).values()), default=0)
            if not 2 <= count <= most:
                raise UsageError(
                    f"{self.where}: by: a gradient takes at least 2 knots and at most one a layer,"
                    f" of which the vector has {most}"
                )
            weight = tuple(self._open(f"lam.knot{k + 1}", lam) for k in range(count))
        else:
            groups = self._groups("by", kind, count, names)
        if kind in ("layers", "knots"):
            outside = [name for name in names if not layer_of(name)]
            groups += [(glob.escape(name), "outside") for name in outside]
        rules = [(match, self._open(f"lam.{label}", lam)) for match, label in groups]
        switches = []
        if "switch" in said:
            kind, count = self._grouping("switch", said["switch"], ("layers", "kinds"))
            either = Range(0, 1, whole=True)
            groups = self._groups("switch", kind, count, names)
            switches = [(match, self._open(f"on.{label}", either)) for match, label in groups]
        only = self._only(said["only"], names) if "only" in said else {}
        chosen = self._open("only", tuple(only)) if len(only) > 1 else next(iter(only), None)
        rest = {key: item for key, item in said.items() if key not in OF_VECTOR}
        return Part(ref, weight, tuple(rules), tuple(switches), only, chosen, self.parameters(rest))

    def _only(self, said: Any, names: Sequence[str]) -> dict[str, list[str]]:
        """Return globs of what is off for each choice of "all|layers|mlp|layers:3"."""
        roles = {name: role_of(name) for name in names}
        kinds = [match for match, _ in self._groups("only", "kinds", 0, names)]
        matched = {match: [n for n in names if fnmatchcase(n, match)] for match in kinds}
        outside = [glob.escape(name) for name in names if not layer_of(name)]
        off: dict[str, list[str]] = {}
        for word in said.split("|") if isinstance(said, str) else [said]:
            if word == "all":
                off[word] = []
            elif word == "layers":
                off[word] = outside
            elif word in roles.values():
                off[word] = []
                for match, taken in matched.items():  # a star may take names of several kinds
                    others = [name for name in taken if roles[name] != word]
                    whole = len(others) == len(taken)
                    off[word] += [match] if whole else map(glob.escape, others)
            elif isinstance(word, str) and word.startswith("layers:"):
                groups = self._groups("only", *self._grouping("only", word, ("layers",)), names)
                for label in dict.fromkeys(label for _, label in groups):
                    off[label] = [*outside, *(m for m, other in groups if other != label)]
            else:
                there = ", ".join(dict.fromkeys(roles.values()))
                raise UsageError(
                    f"{self.where}: only: expected all, layers, layers:K or one of {there}, with |"
                    f" between them, found {word!r:.40}"
                )
        return off

    def parameters(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return parameters of the operator, with the names of dimensions where they are open."""
        return {
            key: self._open(
                key, _read_dimension(item, type(self.taken[key]) is int, f"{self.where}: {key}")
            )
            for key, item in said.items()
        }

    def _open(self, name: str, said: Any) -> Any:
        """Return `said`, as the name of a dimension where it leaves a choice."""
        if not isinstance(said, Range | tuple):
            return said
        self.dimensions[self.prefix + name] = said
        return Free(self.prefix + name)

    def _grouping(self, key: str, said: Any, allowed: Sequence[str]) -> tuple[str, int]:
        """Return "layers" and 4 for "layers:4"."""
        kind, _, number = said.partition(":") if isinstance(said, str) else ("", "", "")
        counted = kind in ("layers", "knots")
        if kind not in allowed or number.isdecimal() != counted or len(number) > 9:
            words = [f"{word}:K" if word in ("layers", "knots") else word for word in allowed]
            raise UsageError(
                f"{self.where}: {key}: expected {' or '.join(words)}, found {said!r:.40}"
            )
        return kind, int(number or 1)

    def _groups(
        self, key: str, kind: str, count: int, names: Sequence[str]
    ) -> list[tuple[str, str]]:
        """Return globs with the label of the group that each selects; the last that matches counts.

        Layers: `count` groups of each stack's layers, as equal as can be. Kinds: what tensors do.
        """
        if kind == "kinds":
            # A star may also take parts of a longer name, whose own glob has to come later
            ordered = sorted(names, key=lambda name: len(NUMBER.sub("", name)))
            globs = {NUMBER.sub("*", glob.escape(name)): role_of(name) for name in ordered}
            return list(globs.items())
        stacks = layers_of(names)
        most = max(map(len, stacks.values()), default=0)
        if not 1 <= count <= most:
            raise UsageError(
                f"{self.where}: {key}: the vector has {most} layers, found {count} groups of them"
            )
        found = []
        for layers in stacks.values():
            for i, layer in enumerate(layers):
                k = i * count // len(layers)
                inside = [n for n in range(len(layers)) if n * count // len(layers) == k]
                label = f"layers{inside[0]}-{inside[-1]}" if len(stacks) == 1 else f"group{k + 1}"
                found.append((f"{glob.escape(layer)}.*", label))
        return found


# ----------------------------------------------------------------------------------------- names


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the layers of each stack, in their order."""
    stacks: dict[str, list[str]] = {}
    for layer in sorted({layer_of(name) for name in names} - {""}, key=natural_order):
        stacks.setdefault(layer.rpartition(".")[0], []).append(layer)
    return stacks


def role_of(name: str) -> str:
    """Return what a tensor is for, by its name: attention, mlp, norm, embeddings or other."""
    parts = name.lower().split(".")
    for part in reversed(parts[:-1] or parts):
        for role, words in ROLES:
            if any(word in part for word in words):
                return role
    return "other"


def _check_bounds(space: Space, where: str) -> None:
    """Raise UsageError where an operator does not take the ends of a range."""
    start = space.start()
    for name, dimension in space.dimensions.items():
        ends = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension
        for end in ends:
            recipe = space.recipe(start | {name: end})
            try:
                for share in recipe.shares:
                    check_parameters(recipe.op, {**recipe.parameters, **share.parameters})
            except UsageError as error:
                raise UsageError(f"{where}: {name} at {end}: {error}") from None
