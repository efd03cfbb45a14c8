"""The manifest of a vector: which keys its JSON text has, of which types, and its digest.

Its objects stay the dicts that JSON makes, in the order of the file and with the keys that a newer
version may have added; the classes name their keys for who reads them, and are what a file that
someone else wrote is checked against. docs/format.md is the normative text.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)  # fmt: skip

from skillvec.checkpoint import METADATA_KEY
from skillvec.storage import digest_bytes

SCHEMA = 1
CLAIMS = ("bitwise", "partial", "rounded", "combined")
PLAIN = (str, int, float)
MAX_NORM = 1e150  # its square is still a number

Digest = Annotated[str, re.compile("[0-9a-f]{32}")]
TensorSide = Annotated[list[Any], (str, Digest)]  # dtype and digest of a tensor of a model
Count = Annotated[int, ...]  # of values of a tensor: who knows its size checks it


class Selection(TypedDict):
    """What who subtracts may choose besides the dtype; the last two stand where they were given."""

    include: list[str]
    exclude: list[str]
    rename: NotRequired[list[str]]
    rows: NotRequired[str]


CHOSEN = tuple(Selection.__annotations__)


class ModelFacts(TypedDict):
    """What is recorded of a checkpoint, short of its tensors."""

    ref: str
    revision: str | None
    model_type: str | None
    config: Digest | None
    tokenizer: Digest | None
    family: Digest
    probe: Digest | None
    sketch: dict[str, list[Annotated[int, range(-127, 128)]]]
    dtypes: dict[str, int]


class Parent(Selection):
    """A vector or an adapter that this one was made of."""

    ref: str
    identity: Digest
    manifest: Digest | None
    base: str
    tuned: str | None
    dtype: str


class Claim(TypedDict):
    """What base + 1 * v restores, and with how many values beside the delta."""

    claim: str
    exceptions: int
    replacements: int
    unrestored: int


class Training(TypedDict):
    """What its maker says of the training."""

    method: str | None
    notes: str | None


class TensorEntry(TypedDict):
    """A delta: how it lies in the file, how large it is, of which tensors it is the difference."""

    dtype: str
    shape: list[int]
    codec: str
    block: int
    digest: Digest
    changed: int
    norm: int | float
    base: TensorSide | None
    tuned: TensorSide | None
    unrestored: NotRequired[Count]
    nonfinite: NotRequired[Count]


class Manifest(Selection):
    """All that a vector says of itself; those in `WRITTEN` are known once its data is written."""

    kind: str
    schema: int
    formula: str
    identity: Digest
    base: ModelFacts
    tuned: ModelFacts | None
    parents: list[Parent]
    recipe: dict[str, Any] | None
    training: Training
    license: str | None
    equal: dict[str, TensorSide]
    tied: dict[str, str]
    excluded: list[str]
    tool: NotRequired[str]
    command: NotRequired[str]
    dtype: NotRequired[str]
    codec: NotRequired[str]
    block_numel: NotRequired[int]
    exactness: NotRequired[Claim]
    tensors: NotRequired[dict[str, TensorEntry]]
    differing: NotRequired[list[str]]
    side: NotRequired[list[dict[str, Digest]]]
    digest: NotRequired[Digest]
    # what stands only where there is something to tell
    untied: NotRequired[dict[str, str]]
    warnings: NotRequired[list[str]]
    allow_nonfinite: NotRequired[bool]


WRITTEN = (
    "tool", "command", "dtype", "codec", "block_numel", "exactness", "tensors", "differing", "side",
    "digest",
)  # fmt: skip


def check_manifest(said: Any) -> None:
    """Raise TypeError naming the key where what was read is no manifest of a written vector."""
    check_json(said, Manifest, "manifest")
    for key in WRITTEN:
        if key not in said:
            raise TypeError(f"manifest: {key} is missing")
    if said["exactness"]["claim"] not in CLAIMS:
        raise TypeError(f"manifest: exactness.claim {said['exactness']['claim']!r:.40}")


Check = Callable[[Any, str], None]  # of a value that stands somewhere


def check_json(value: Any, kind: Any, where: str) -> None:
    """Raise TypeError where `value`, as JSON gives it, is not of the type `kind`.

    That is a class of keys (TypedDict), list[X], dict[str, X], a plain type, unions of these, or
    one with what its values have to be: Annotated with a pattern or a range, of a list with a type
    for each item, with ... where others check it.
    """
    _check_of(kind)(value, where)


@cache
def _check_of(kind: Any) -> Check:
    """Return what checks values of a type: looked up once, not for each of 100,000 tensors."""
    origin, given = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, where: None
    if origin is NotRequired:
        return _check_of(given[0])
    if origin is Annotated:
        return _check_annotated(given[1])
    if origin in (Union, UnionType) and given[0] not in PLAIN:
        check = _check_of(given[0])
        return lambda value, where: None if value is None else check(value, where)
    if origin is list:
        return _check_list(_check_of(given[0]))
    if origin is dict:
        return _check_dict(_check_of(given[1]))
    if hasattr(kind, "__required_keys__"):
        return _check_keys(kind)
    if kind is bool:
        return _check_that("true or false", lambda value: type(value) is bool)
    name = getattr(kind, "__name__", str(kind))
    return _check_that(name, lambda v: isinstance(v, kind) and v is not True and v is not False)


def _check_that(expected: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> None:
        if not fits(value):
            raise TypeError(f"{where}: expected {expected}, found {str(value)[:40]!r}")

    return check


_is_list = _check_that("a list", lambda value: isinstance(value, list))
_is_object = _check_that("an object", lambda value: isinstance(value, dict))


def _check_annotated(allowed: Any) -> Check:
    if isinstance(allowed, re.Pattern):
        match = allowed.fullmatch
        return _check_that(
            "a digest of 32 hex digits", lambda v: isinstance(v, str) and match(v) is not None
        )
    if isinstance(allowed, range):
        return _check_that(f"a number in {allowed}", lambda v: type(v) is int and v in allowed)
    if not isinstance(allowed, tuple):
        return _check_of(Any)
    checks = list(map(_check_of, allowed))
    is_pair = _check_that("a pair", lambda v: isinstance(v, list) and len(v) == len(checks))

    def check(value: Any, where: str) -> None:
        is_pair(value, where)
        for i, item in enumerate(value):
            checks[i](item, f"{where}[{i}]")

    return check


def _check_list(check_item: Check) -> Check:
    def check(value: Any, where: str) -> None:
        _is_list(value, where)
        for i, item in enumerate(value):
            check_item(item, f"{where}[{i}]")

    return check


def _check_dict(check_item: Check) -> Check:
    def check(value: Any, where: str) -> None:
        _is_object(value, where)
        for key, item in value.items():
            check_item(item, f"{where}.{key}")

    return check


def _check_keys(kind: Any) -> Check:
    hints = get_type_hints(kind, include_extras=True).items()
    keys = [(key, _check_of(hint), key in kind.__required_keys__) for key, hint in hints]

    def check(value: Any, where: str) -> None:
        _is_object(value, where)
        for key, check_value, required in keys:
            if key in value:
                check_value(value[key], f"{where}.{key}")
            elif required:
                raise TypeError(f"{where}: {key} is missing")

    return check


def encode_manifest(manifest: Manifest) -> dict[str, str]:
    """Return the metadata that holds a manifest, with its own digest in it."""
    text = _as_text({**manifest, "digest": manifest_digest(manifest)})
    return {"format": "pt", METADATA_KEY: text}


def manifest_digest(manifest: Manifest) -> str:
    """Return the digest of a manifest without the key `digest`."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return digest_bytes(_as_text(said).encode())


def _as_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
