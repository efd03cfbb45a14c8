"""The manifest of a vector: which keys its JSON text has, of which types, and its digest.

Its objects stay the dicts that JSON makes, in the order of the file and with the keys that a newer
version may have added; the classes name their keys for who reads them, and are what a file that
someone else wrote is checked against. docs/format.md is the normative text.
"""

import json
from typing import Annotated, Any, NotRequired, TypedDict

from skillvec.checkpoints.checkpoint import METADATA_KEY
from skillvec.checkpoints.fingerprint import Digest, ModelFacts
from skillvec.files.file import digest_bytes
from skillvec.files.typed_json import check_json

SCHEMA = 1  # with blocks of ranks 2, with factors 3; all are read for ever
SCHEMAS = (1, 2, 3)
CLAIMS = ("bitwise", "partial", "rounded", "combined", "lossy")
MAX_NORM = 1e150  # its square is still a number
TensorSide = Annotated[list[Any], (str, Digest)]  # dtype and digest of a tensor of a model
Count = Annotated[int, ...]  # of values of a tensor: who knows its size checks it


class Selection(TypedDict):
    """What who subtracts may choose besides the dtype; the last two stand where they were given."""

    include: list[str]
    exclude: list[str]
    rename: NotRequired[list[str]]
    rows: NotRequired[str]


CHOSEN = tuple(Selection.__annotations__)


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
    rank: NotRequired[Count]


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
    kept: NotRequired[int | float]


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
    if not 0 <= said.get("kept", 0) <= 1:
        raise TypeError(f"manifest: kept {said['kept']!r:.40}, expected a share")


def encode_manifest(manifest: Manifest) -> dict[str, str]:
    """Return the metadata that holds a manifest, with its own digest in it."""
    if "digest" in manifest:  # of what was opened: it stays where it stands
        text = _as_text({**manifest, "digest": manifest_digest(manifest)})
    else:
        text = _as_text({**manifest})  # once: it is long
        text = f'{text[:-1]},"digest":"{digest_bytes(text.encode())}"}}'
    return {"format": "pt", METADATA_KEY: text}


def manifest_digest(manifest: Manifest) -> str:
    """Return the digest of a manifest without the key `digest`."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return digest_bytes(_as_text(said).encode())


def _as_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
