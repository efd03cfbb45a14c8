"""Files of diagonal Fisher information: how one is known again, and whether it fits a model.

Tensors under the names and in the shapes of a model's weights, each value a mean of squares. Any
file or folder of tensors will do. The values are checked where they are read.
"""

import os
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import probe_digest
from skillvec.checkpoints.locate import locate, relocate
from skillvec.checkpoints.opening import open_tensors
from skillvec.errors import IncompatibleError, VerificationError, up_to_five_each
from skillvec.files.tensors import Source
from skillvec.ops.kernels import FLOATS


def open_fisher(ref: str | os.PathLike[str], known: str = "") -> tuple[Checkpoint, str]:
    """Open a file of Fisher information; return it and its digest, of samples as a model's.

    Raises VerificationError if that is not the digest that is `known`.
    """
    opened = open_tensors(
        relocate(str(ref), "fisher") if known else locate(ref, "fisher"), "fisher"
    )
    digest = probe_digest(opened)
    if known not in ("", digest):
        raise VerificationError(
            f"fisher {ref}: this is not the file that the combination was made with: expected the"
            f" digest {known!s:.40}, found {digest}"
        )
    return opened, digest


def match_fishers(
    files: Sequence[Checkpoint], wanted: Mapping[str, Sequence[int]], untied: Mapping[str, str],
    needless: Container[str],
) -> dict[str, list[Source]]:  # fmt: skip
    """Return the tensor of each file for every name of which a shape is wanted.

    `untied` are heads, which may go by the name of the embedding that a file has in their place.
    Names that are `needless` are left out where a file lacks them. Raises IncompatibleError for
    what a file lacks, or has in another shape or as integers.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    matched: dict[str, list[Source]] = {}
    for name, shape in wanted.items():
        found = [file.get(name) or file.get(untied.get(name, "")) for file in files]
        if None in found and name in needless:
            continue
        for file, source in zip(files, found, strict=True):
            if source is None or source.dtype not in FLOATS or list(source.shape) != list(shape):
                has = f"{source.dtype} {list(source.shape)}" if source else "not"
                problems[f"of {file.ref}"].append(f"{name} {list(shape)}: {has} in {file.ref}")
        matched[name] = [source for source in found if source is not None]
    if problems:
        raise IncompatibleError(
            f"Fisher information does not match the vectors:\n{up_to_five_each(problems)}"
        )
    return matched
