"""Recipes: how much of each vector goes where, and by which operator with which parameters.

Hides the recipe file (YAML or JSON), the globs of its rules and the gradients over layers;
`resolve` leaves plain numbers for every tensor. A recipe is checked wherever it comes from. Refuses
unknown and repeated keys, numbers that are not finite, globs that match no tensor, gradients on
tensors outside the layers, and in YAML anchors, aliases and tags. Whether an operator exists and
takes its parameters, the operator says.
"""

import fnmatch
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from math import isfinite
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from skillvec.checkpoints.opening import NOT_TEXT
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.ops.names import layer_of
from skillvec.vectors.manifest import Selection

MAX_NBYTES = 1_000_000  # a recipe is written by hand
FLOAT_1_2 = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 takes 1e-3 for text
FISHER, FISHER_DIGEST = "fisher", "fisher_digest"  # parameters: a file, and how it is known
Curve = float | tuple[float, ...]  # a number, or the points of a gradient from first to last layer


@dataclass(frozen=True)
class Rule:
    """What holds for the tensors of a share that the glob `match` selects; None: not stated."""

    match: str
    weight: Curve | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def stated(self) -> dict[str, Any]:
        """Return what the rule states, by key."""
        return {**({} if self.weight is None else {"weight": self.weight}), **self.parameters}


@dataclass(frozen=True)
class Share:
    """One vector's part; of its rules the last that states a key decides that key."""

    vector: str
    weight: Curve = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Vectors, how much of each, and the operator that combines them."""

    op: str
    shares: tuple[Share, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as its file holds it, for JSON; what is at its default is left out."""
        vectors = [
            _entries(
                vector=share.vector,
                weight=None if share.weight == 1.0 else share.weight,
                parameters=share.parameters or None,
                rules=[{"match": r.match, **_plain(r.stated())} for r in share.rules] or None,
            )
            for share in self.shares
        ]
        return _entries(
            op=self.op,
            parameters=self.parameters or None,
            seed=self.seed or None,
            vectors=vectors,
        )


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """Return the recipe that a .yaml, .yml or .json file holds; UsageError where it holds none."""
    path = Path(path)
    if path.suffix.lower() not in PARSERS:
        raise UsageError(f"{path}: expected a recipe, a file that ends in {', '.join(PARSERS)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_NBYTES + 1)
        if len(content) > MAX_NBYTES:
            raise ValueError(f"expected at most {MAX_NBYTES} bytes, found more")
        data = PARSERS[path.suffix.lower()](content.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no recipe can be read from it: {error}") from None
    return parse_recipe(data, str(path))


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Return the recipe in `data`, as a file or `to_dict` gives it.

    Raises UsageError that names the place, such as "recipe: vectors[1].rules[0].weight".
    """
    found = _object(data, where, "vectors", ("op", "parameters", "seed", "vectors"))
    seed = found.get("seed", 0)
    if type(seed) is not int or abs(seed) >= 1 << 63:
        raise _unexpected(f"{where}: seed", "a whole number of 64 bits", seed)
    vectors = _items(found["vectors"], f"{where}: vectors")
    if not vectors:
        raise UsageError(f"{where}: vectors: expected at least one vector, found none")
    return Recipe(
        _text(found.get("op", "linear"), f"{where}: op"),
        tuple(_share(*item) for item in vectors),
        _parameters(found.get("parameters", {}), f"{where}: parameters"),
        seed,
    )


def resolve(recipe: Recipe, names: Sequence[str]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Return for every tensor, by name, the weight and the parameters of each share.

    `names` are all tensors of the model: they say which layers there are. A gradient spans the
    layers of the tensor's own stack (vision and text each have theirs): layer i of L lies at
    i / (L - 1) on the line through the gradient's points. Raises IncompatibleError for a glob that
    matches no tensor, and UsageError for a gradient on a tensor outside every layer and for a
    recipe that `parse_recipe` would not take.
    """
    recipe = parse_recipe(recipe.to_dict())  # one built by hand is checked like one read
    places = _places(names)
    resolved: dict[str, list[tuple[float, dict[str, Any]]]] = {name: [] for name in names}
    idle: list[str] = []
    adrift: dict[str, str] = {}
    for i, share in enumerate(recipe.shares):
        start = {**recipe.parameters, **share.parameters, "weight": share.weight}
        settings = {name: dict(start) for name in resolved}
        for j, rule in enumerate(share.rules):
            matches = re.compile(fnmatch.translate(rule.match)).match  # fnmatchcase, compiled once
            matched = [name for name in resolved if matches(name)]
            if not matched:
                idle.append(f"vectors[{i}].rules[{j}].match: {rule.match}")
            for name in matched:
                settings[name].update(rule.stated())
        for name, setting in settings.items():
            for key, value in setting.items():
                if isinstance(value, tuple) and name in places:
                    setting[key] = _on_curve(value, *places[name])
                elif isinstance(value, tuple):
                    adrift.setdefault(name, f"{name}: {key} of vectors[{i}]")
            resolved[name].append((setting.pop("weight"), setting))
    if idle:
        raise IncompatibleError(f"globs that match no tensor:\n{up_to_five(idle)}")
    if adrift:
        raise UsageError(
            "gradients over layers that reach tensors outside every layer; add a rule with one"
            f" number for:\n{up_to_five(list(adrift.values()))}"
        )
    return resolved


def unplaced(share: Mapping[str, Any], vector: str = "") -> dict[str, Any]:
    """Return a share, as `to_dict` has it, without the places of its files.

    `vector` stands for the vector; of a Fisher file the digest remains.
    """
    given = share.get("parameters", {})
    kept = {"parameters": {key: given[key] for key in given if key != FISHER}} if given else {}
    return {**share, "vector": vector, **kept}


# ------------------------------------------------------------------------------------ gradients


def _places(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return index and count of a tensor's layer in its stack, for tensors that lie in a layer."""
    layers = {name: layer_of(name).rpartition(".") for name in names}
    stacks: dict[str, list[int]] = {}
    for stack, number in sorted({(stack, int(n)) for stack, _, n in layers.values() if n}):
        stacks.setdefault(stack, []).append(number)
    return {
        name: (bisect_left(stacks[stack], int(number)), len(stacks[stack]))
        for name, (stack, _, number) in layers.items()
        if number
    }


@lru_cache(maxsize=4096)
def _on_curve(points: tuple[float, ...], index: int, count: int) -> float:
    """Return the value at index / (count - 1) of the way, rounded once: ends exact, monotone."""
    segment, rest = divmod(index * (len(points) - 1), max(count - 1, 1))
    if not rest:
        return points[segment]
    from fractions import Fraction

    a, b = Fraction(points[segment]), Fraction(points[segment + 1])
    return float(a + (b - a) * Fraction(rest, count - 1))


# --------------------------------------------------------------------------------------- checks


def _unexpected(where: str, expected: str, value: Any) -> UsageError:
    try:
        found = repr(value)
    except (ValueError, RecursionError):  # an int of too many digits; lists too deep
        found = type(value).__name__
    return UsageError(f"{where}: expected {expected}, found {found[:40]}")


def _object(
    value: Any, where: str, required: str = "", allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """Return `value` as a dict with the key `required` and, where any are named, only `allowed`."""
    if not isinstance(value, Mapping):
        raise _unexpected(where, "an object", value)
    for key in value:
        if not isinstance(key, str) or NOT_TEXT.search(key):
            raise _unexpected(where, "keys that are text", key)
        if allowed and key not in allowed:
            raise _unexpected(where, f"only the keys {', '.join(allowed)}", key)
    if required and required not in value:
        raise UsageError(f"{where}: {required} is missing")
    return dict(value)


def _items(value: Any, where: str) -> list[tuple[Any, str]]:
    """Return the items of a list, each with its place."""
    if not isinstance(value, list | tuple):
        raise _unexpected(where, "a list", value)
    return [(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or NOT_TEXT.search(value):
        raise _unexpected(where, "text that is not empty", value)
    return value


def _number(value: Any, where: str, expected: str = "a finite number") -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int that fp64 cannot hold
            if isfinite(value):
                return float(value)
    raise _unexpected(where, expected, value)


def _curve(value: Any, where: str, expected: str = "a finite number or a list of them") -> Curve:
    if isinstance(value, list | tuple) and value:
        return tuple(_number(*item) for item in _items(value, where))
    return _number(value, where, expected)


def _parameters(value: Any, where: str) -> dict[str, Any]:
    found = _object(value, where)
    for key, item in found.items():
        at = f"{where}.{key}"
        if key in ("match", "weight"):
            raise UsageError(f"{at}: {key} is no parameter; it belongs to a vector or a rule")
        if isinstance(item, str) and NOT_TEXT.search(item):
            raise _unexpected(at, "text", item)
        if not isinstance(item, bool | str):
            curve = _curve(item, at, "a finite number, a boolean, text or a list of numbers")
            found[key] = int(item) if isinstance(item, Integral) else curve
    return found


def _share(value: Any, where: str) -> Share:
    found = _object(value, where, "vector", ("vector", "weight", "parameters", "rules"))
    return Share(
        _text(found["vector"], f"{where}.vector"),
        _curve(found.get("weight", 1.0), f"{where}.weight"),
        _parameters(found.get("parameters", {}), f"{where}.parameters"),
        tuple(_rule(*item) for item in _items(found.get("rules", ()), f"{where}.rules")),
    )


def _rule(value: Any, where: str) -> Rule:
    found = _object(value, where, "match")
    match = _text(found.pop("match"), f"{where}.match")
    if not found:
        raise UsageError(f"{where}: expected a weight or a parameter next to match, found neither")
    weight = _curve(found.pop("weight"), f"{where}.weight") if "weight" in found else None
    return Rule(match, weight, _parameters(found, where))


def _plain(value: Any) -> Any:
    """Return a gradient as a list, and so in a dict: what JSON and YAML give back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _entries(**entries: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in entries.items() if value is not None}


# ---------------------------------------------------------------------------------------- files


def _parse_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"key {key!r:.40} appears twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def _parse_yaml(text: str) -> Any:
    """Return what yaml.safe_load does, without anchors, tags, merges and numbers to base 60."""
    yaml: Any = import_module("yaml")

    def refuse(problem: str, mark: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if event.anchor is not None or event.tag is not None:  # an alias has its anchor
                refuse("anchors, aliases and tags are not taken", event.start_mark)
            node = super().compose_node(parent, index)
            if node.tag.endswith((":int", ":float")) and ":" in node.value:  # 1:30 would be 90
                refuse("numbers to base 60 are not taken: quote a range", node.start_mark)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":  # nor is << text, the key of a merge
                    refuse(f"expected keys that are text, found {key.value!r:.40}", key.start_mark)
                if key.value in seen:
                    refuse(f"key {key.value!r:.40} appears twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_1_2, list("-+0123456789"))
    try:
        loader = Loader(text)
        loader.name = "recipe"
        return loader.get_single_data()
    except yaml.YAMLError as error:
        hint = "\na glob that starts with * needs quotes" if "alias" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None


PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json,
}  # fmt: skip


# ------------------------------------------------------------------------------- by name alone


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether globs keep a name: it matches an include (if any) and no exclude."""
    if include and not any(fnmatch.fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def leaving_out(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return what tells of a name whether globs leave it out."""
    return lambda name: not is_selected(name, include, exclude)


def selection(
    include: Sequence[str], exclude: Sequence[str], rename: Sequence[str], rows: str
) -> Selection:
    """Return what is recorded of the choice of tensors, names and rows."""
    chosen = Selection(include=list(include), exclude=list(exclude))
    if rename:
        chosen["rename"] = list(rename)
    if rows != "strict":
        chosen["rows"] = rows
    return chosen


def flags(**options: Any) -> list[str]:
    """Return options as words of a command line."""
    return [
        word
        for key, value in options.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        for word in (f"--{key.replace('_', '-')}", *([] if item is True else [str(item)]))
    ]


def refuse_idle_globs(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise IncompatibleError for a glob that matches no tensor: a typing error, not a wish."""
    idle = [g for g in (*include, *exclude) if not fnmatch.filter(names, g)]
    if idle:
        raise IncompatibleError(f"globs that match no tensor:\n{up_to_five(idle)}")
