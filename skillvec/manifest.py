"""The manifest of a vector: which keys its JSON text has, of which types, and its digest.

Its objects stay the dicts that JSON makes, in the order of the file and with the keys that a newer
version may have added; the classes name their keys for who reads them, and are what a file that
someone else wrote is checked against. docs/format.md is the normative text.
"""

import json
import re
from functools import cache
from types import UnionType
from typing import Annotated, Any, NotRequired, TypedDict, Union, get_args, get_origin
from typing import get_type_hints as hints_of_class

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


_keys_of = cache(lambda kind: hints_of_class(kind, include_extras=True))


def check_json(value: Any, kind: Any, where: str) -> None:
    """Raise TypeError where `value`, as JSON gives it, is not of the type `kind`.

    That is a class of keys (TypedDict), list[X], dict[str, X], a plain type, unions of these, or
    one with what its values have to be: Annotated with a pattern or a range, of a list with a type
    for each item, with ... where others check it.
    """
    origin, given = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is NotRequired:
        check_json(value, given[0], where)
    elif origin is Annotated:
        _check_annotated(value, given[1], where)
    elif origin in (Union, UnionType) and given[0] not in PLAIN:
        if value is not None:
            check_json(value, given[0], where)
    elif origin is list:
        _expect(isinstance(value, list), "a list", value, where)
        for i, item in enumerate(value):
            check_json(item, given[0], f"{where}[{i}]")
    elif origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        for key, item in value.items():
            check_json(item, given[1], f"{where}.{key}")
    elif hasattr(kind, "__required_keys__"):
        _expect(isinstance(value, dict), "an object", value, where)
        for key, expected in _keys_of(kind).items():
            if key in value:
                check_json(value[key], expected, f"{where}.{key}")
            elif key in kind.__required_keys__:
                raise TypeError(f"{where}: {key} is missing")
    elif kind is bool:
        _expect(type(value) is bool, "true or false", value, where)
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
        _expect(fits, getattr(kind, "__name__", str(kind)), value, where)


def _check_annotated(value: Any, allowed: Any, where: str) -> None:
    if isinstance(allowed, re.Pattern):
        fits = isinstance(value, str) and allowed.fullmatch(value) is not None
        _expect(fits, "a digest of 32 hex digits", value, where)
    elif isinstance(allowed, range):
        _expect(type(value) is int and value in allowed, f"a number in {allowed}", value, where)
    elif isinstance(allowed, tuple):
        _expect(isinstance(value, list) and len(value) == len(allowed), "a pair", value, where)
        for i, (item, kind) in enumerate(zip(value, allowed, strict=True)):
            check_json(item, kind, f"{where}[{i}]")


def _expect(fits: bool, expected: str, value: Any, where: str) -> None:
    if not fits:
        raise TypeError(f"{where}: expected {expected}, found {str(value)[:40]!r}")


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
