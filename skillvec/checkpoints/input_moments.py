"""A file of second moments: what the modules of a model are given, by weight (docs/format.md).

recipes/calibrate.py writes it. Such a file is hostile until checked: shapes, names and values are
refused by name.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from skillvec.checkpoints.checkpoint import METADATA_KEY
from skillvec.checkpoints.fingerprint import probe_digest
from skillvec.checkpoints.opening import kind_of_file
from skillvec.errors import FormatError
from skillvec.files.file import digest_bytes
from skillvec.files.header import TensorSpec, read_header
from skillvec.files.tensors import values_of
from skillvec.ops.kernels import Array

SCHEMA = 1
SIDES = {"columns": 1, "rows": 0}  # the dimension of a weight that its module's input meets


class Input(NamedTuple):
    """What some modules are given: E[x x'] (n x n) and E[x], and where they lie."""

    second: TensorSpec
    mean: TensorSpec

    @property
    def width(self) -> int:
        return self.mean.numel


class Moments(NamedTuple):
    """A file of moments: by weight the input, and the dimension of the weight that meets it."""

    path: str
    about: Mapping[str, Any]
    weights: dict[str, tuple[str, int]]
    inputs: dict[str, Input]

    def misfit(self, name: str, shape: tuple[int, ...]) -> str:
        """Return what is wrong with the shape of a weight that the file knows, "" for nothing."""
        entry, side = self.weights[name]
        width = self.inputs[entry].width
        if len(shape) == 2 and shape[side] == width:
            return ""
        meets = "columns" if side else "rows"
        return f"{name} {list(shape)}: inputs of {width} values meet its {meets}"

    @property
    def digest(self) -> str:
        """A digest of what it says of weights, and of samples of its tensors."""
        tensors = {spec.name: spec for held in self.inputs.values() for spec in held}
        said = [sorted(self.weights.items()), self.about["tokens"], probe_digest(tensors)]
        return digest_bytes(json.dumps(said).encode())


def open_moments(path: str | os.PathLike[str]) -> Moments:
    """Return what a file of second moments holds; FormatError where it is none."""
    place = os.fspath(path)
    header = read_header(place)
    if kind_of_file(header.metadata) != "moments":
        raise FormatError(f"{place}: no moments of activations: recipes/calibrate.py writes them")
    about = json.loads(header.metadata[METADATA_KEY])
    inputs, weights = {}, about.get("weights")
    try:
        if about["schema"] != SCHEMA or not isinstance(about["tokens"], int):
            raise ValueError(f"schema {about['schema']}, expected {SCHEMA}")
        weights = {str(name): (str(said["entry"]), SIDES[said["input"]])
                   for name, said in weights.items()}  # fmt: skip
        for entry in {entry for entry, _ in weights.values()}:
            second, mean = (header.tensors[f"{entry}.{part}"] for part in ("moment", "mean"))
            if second.shape != mean.shape * 2 or {second.dtype, mean.dtype} != {"F32"}:
                raise ValueError(f"{entry}: expected F32 of n x n and n values")
            inputs[entry] = Input(second, mean)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{place}: not as docs/format.md has it: {error}") from None
    return Moments(place, about, weights, inputs)


def read_part(spec: TensorSpec) -> Array:
    """Return a tensor of such a file, fp32; FormatError for values that no inputs have."""
    values = values_of(spec, 0, spec.numel)
    if not np.isfinite(values).all():
        raise FormatError(f"{spec.path}: {spec.name} holds NaN or infinities")
    return values.reshape(spec.shape)
