"""Displacements: the skill vector as a file, as a pair of checkpoints, or as a combination.

Hides where a delta comes from: stored values with exceptions, tuned and base subtracted as they
are read, or several deltas merged by an operator as they are read. Vectors can be scaled, added and
subtracted; what has no meaning (a vector plus a model) is a TypeError that says so.
"""

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from skillvec.checkpoint import Checkpoint, open_checkpoint, open_tensors
from skillvec.errors import IncompatibleError, UsageError, up_to_five
from skillvec.kernels import DTYPE_NAMES, FLOATS, HALVES, from_bytes, widen
from skillvec.merging import OPERATORS, Operator, check_parameters
from skillvec.patch import Patch, open_patch
from skillvec.rules import Recipe, Share, resolve
from skillvec.storage import (
    ITEMSIZE,
    TensorSpec,
    allocate,
    digest_bytes,
    digest_file_range,
    leaf_digests,
    read_into,
)
from skillvec.vectorfile import SCHEMA, SIDE, StoredDelta, VectorFile, find_vector

PROBE_TENSORS, PROBE_NBYTES = 256, 4096
SKETCH_TENSORS, SKETCH_NUMEL = 48, 288  # matrices, and values of all of them
FP32_MAX = 3.4028234e38


class PairDelta(NamedTuple):
    """A tensor's delta as two tensors to subtract into values of `dtype`.

    `exact` asks for exceptions and replacements; without, values are just rounded to `dtype`.
    """

    tuned: TensorSpec | Patch
    base: TensorSpec
    dtype: str
    exact: bool = True

    @property
    def spec(self) -> TensorSpec:
        return self.base

    @property
    def nbytes(self) -> int:
        return self.tuned.nbytes + self.base.nbytes


class MixDelta(NamedTuple):
    """A tensor's delta as several to merge by an operator; `known` is what its passes measured."""

    spec: TensorSpec
    sources: tuple[StoredDelta | PairDelta, ...]
    weights: tuple[float, ...]
    parameters: tuple[dict[str, Any], ...]
    operator: Operator
    streams: tuple[str, ...]  # identities, which address random numbers
    origins: tuple[str, ...]  # what tells these vectors from others in one run
    seed: int
    known: Any = None

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def scope(self) -> str:
        """What its measurements are summed over: the tensor, or all with the same parameters."""
        key = [self.operator.name, self.origins, self.seed, self.parameters]
        return json.dumps([*key, self.spec.name, self.weights] if self.per_tensor else key)

    @property
    def per_tensor(self) -> bool:
        return self.operator.scope(self.parameters) == "tensor"

    @property
    def by_value(self) -> bool:
        """Whether equal deltas are sure to give equal results, whatever the tensors are called."""
        return not getattr(self.operator, "random", True)


DeltaSource = StoredDelta | PairDelta | MixDelta


def value_dtype(tuned: str, base: str, dtype: str = "auto") -> tuple[str, bool]:
    """Return the storage dtype of a delta and whether it is kept exact.

    `auto` stores BF16 - BF16 as BF16 and F16 - F16 as F16 (exceptions in fp32), any F64 as F64,
    every other pair as F32.
    """
    if dtype == "auto":
        if "F64" in (tuned, base):
            return "F64", True
        return (tuned if tuned == base and tuned in HALVES else "F32"), True
    return dtype, dtype == "F32" and "F64" not in (tuned, base)


@dataclass(frozen=True)
class SkillVector:
    """A displacement tuned - base, or several of them merged, times `scale`.

    `deltas` maps tensor names to where the delta comes from. `manifest` is what the file says or
    will say. `parts` and `recipe` are those of a combination.
    """

    ref: str
    deltas: Mapping[str, DeltaSource]
    manifest: dict[str, Any]
    scale: float = 1.0
    stored: VectorFile | None = None
    tuned: Checkpoint | None = None
    base: Checkpoint | None = None
    parts: "tuple[SkillVector, ...]" = ()
    recipe: Recipe | None = None
    report: Any = field(default=None, compare=False)  # of the verb that wrote it

    @staticmethod
    def open(ref: "str | os.PathLike[str] | SkillVector", role: str = "vector") -> "SkillVector":
        """Open a vector file or folder, or "TUNED::BASE"; headers only.

        Raises IncompatibleError for a model.
        """
        if isinstance(ref, SkillVector):
            return ref
        if "::" in os.fspath(ref):
            tuned, _, base = os.fspath(ref).partition("::")
            return SkillVector.between(tuned, base)
        stored = find_vector(ref)
        if stored is None:
            opened = open_tensors(ref, role)
            raise IncompatibleError(
                f"{role} {opened.ref}: this is not a skill vector (no manifest in its header);"
                " skillvec diff makes one from two models"
            )
        return SkillVector(stored.ref, stored.deltas, stored.manifest, stored=stored)

    @staticmethod
    def between(
        tuned: str | os.PathLike[str] | Checkpoint,
        base: str | os.PathLike[str] | Checkpoint,
        dtype: str = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> "SkillVector":
        """Return tuned - base without computing it: every name and shape is checked here.

        `dtype` as of skillvec.diff. Raises UsageError for one that is unknown, IncompatibleError
        naming tensors that stand on one side only or differ in shape.
        """
        kept = "auto" if dtype == "auto" else dtype_of(dtype)
        if kept == "F64":
            raise UsageError("dtype fp64: auto keeps fp64 inputs in fp64")
        tuned, base = open_checkpoint(tuned, "tuned"), open_checkpoint(base, "base")
        matched = _match(tuned, base, include, exclude)
        deltas = {
            name: PairDelta(
                tuned[name], base[name], *value_dtype(tuned[name].dtype, base[name].dtype, kept)
            )
            for name in matched["deltas"]
        }
        globs = {"include": list(include), "exclude": list(exclude)}
        manifest = _pair_manifest(identity(tuned), identity(base), dtype, matched | globs)
        ref = f"{tuned.ref}::{base.ref}"
        return SkillVector(ref, deltas, manifest, tuned=tuned, base=base)

    @staticmethod
    def patched(
        patch: str | os.PathLike[str], base: str | os.PathLike[str] | Checkpoint
    ) -> "SkillVector":
        """Return what a patch (changed values of the exact base) adds, without computing it."""
        base = open_checkpoint(base, "base")
        patches, opened, digest = open_patch(patch, base)
        floats = {name: item for name, item in patches.items() if item.dtype in FLOATS}
        problems = [n for n, item in patches.items() if item.indices and n not in floats]
        if problems:
            raise IncompatibleError(f"patched tensors that are no floats:\n{up_to_five(problems)}")
        deltas = {
            name: PairDelta(item, item.base, *value_dtype(item.dtype, item.dtype))
            for name, item in floats.items()
        }
        ours = identity(base)
        theirs = ours | {"ref": os.fspath(patch), "revision": None, "probe": digest}
        integers = {n: [spec.dtype, None] for n, spec in base.items() if n not in floats}
        matched = {"integers": integers, "tied": {}, "excluded": [], "include": [], "exclude": []}
        manifest = _pair_manifest(theirs, ours, "auto", matched)
        return SkillVector(
            f"{os.fspath(patch)}::{base.ref}", deltas, manifest, tuned=opened, base=base
        )

    @staticmethod
    def combined(
        parts: "Sequence[SkillVector]", recipe: Recipe, operator: Operator | None = None
    ) -> "SkillVector":
        """Return vectors merged by the recipe's operator, without computing it.

        `operator` is one that is not in the table. Raises IncompatibleError for tensors that only
        some of the vectors have, unless they were left out there on purpose.
        """
        operator = operator or OPERATORS[recipe.op]
        recipe = replace(recipe, shares=tuple(map(_scaled, recipe.shares, parts)))
        parts = [replace(part, scale=1.0) for part in parts]
        names = _common_names(parts)
        shares = resolve(recipe, names)
        deltas: dict[str, DeltaSource] = {}
        known = recipe.op in OPERATORS and operator is OPERATORS[recipe.op]
        for name in names:
            held = [part.deltas.get(name) for part in parts]
            shape = next(delta.spec.shape for delta in held if delta is not None)
            absent = StoredDelta(TensorSpec(name, "F32", shape, "", 0, 0), "zero")
            sources = tuple(delta or absent for delta in held)
            weights, parameters = zip(*shares[name], strict=True)
            if known:
                parameters = tuple(check_parameters(recipe.op, given) for given in parameters)
            wide = any(_value_dtype(source) == "F64" for source in sources)
            deltas[name] = MixDelta(
                TensorSpec(name, "F64" if wide else "F32", shape, "", 0, 0),
                sources,  # type: ignore[arg-type]
                weights,
                parameters,
                operator,
                tuple(part.manifest["identity"] for part in parts),
                tuple(part.stored.digest if part.stored else part.ref for part in parts),
                recipe.seed,
            )
        manifest = _combined_manifest(parts, recipe)
        return SkillVector(manifest["formula"], deltas, manifest, parts=tuple(parts), recipe=recipe)

    def __mul__(self, factor: object) -> "SkillVector":
        if not isinstance(factor, Real) or not isfinite(factor):
            raise TypeError(
                f"vector * {type(factor).__name__}: a skill vector can be multiplied by a finite"
                " number only"
            )
        scale = self.scale * float(factor)
        if not isfinite(scale):
            raise UsageError(f"{self.scale:g} * {factor:g} * vector: the factor overflows")
        return replace(self, scale=scale)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> "SkillVector":
        if not isinstance(divisor, Real) or not divisor:
            raise TypeError(f"vector / {divisor!r:.40}: expected a number that is not 0")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> "SkillVector":
        return self * -1.0

    def __add__(self, other: object) -> "SkillVector":
        if isinstance(other, int) and other == 0:  # sum() begins with it
            return self
        if not isinstance(other, SkillVector):
            raise TypeError(
                f"vector + {type(other).__name__}: to add a vector to a model use"
                " skillvec.apply(model, vector, output)"
            )
        return _sum([*self.terms(), *other.terms()])

    __radd__ = __add__

    def __sub__(self, other: object) -> "SkillVector":
        if not isinstance(other, SkillVector):
            raise TypeError(f"vector - {type(other).__name__}: only a vector can be subtracted")
        return self + -other

    def unscaled(self) -> "SkillVector":
        """Return the same displacement with its factor, if any, taken into a plain sum."""
        return self if self.scale == 1 else _sum(self.terms())

    def terms(self) -> "list[tuple[SkillVector, float]]":
        """Return what a sum of vectors is made of: vectors with weights."""
        if not self.parts:
            return [(replace(self, scale=1.0), self.scale)]
        assert self.recipe is not None
        shares = self.recipe.shares
        plain = all(isinstance(share.weight, float) and not share.rules for share in shares)
        if self.recipe.op != "linear" or not plain:
            raise TypeError(
                f"{self.ref}: a combination that is not a plain sum can be neither part of another"
                " nor stored with a factor: save it as it is first"
            )
        return [
            (part, self.scale * float(share.weight))  # type: ignore[arg-type]
            for part, share in zip(self.parts, self.recipe.shares, strict=True)
        ]

    def save(self, output: str | os.PathLike[str], **options: Any) -> "SkillVector":
        """Write the vector to a file and open it; options as of skillvec.combine."""
        from skillvec import verbs

        return verbs.save(self, output, **options)

    @property
    def dtypes(self) -> str:
        """Dtype lineage in a word or two: of tuned and base, as BF16 - F32."""
        if self.parts:
            return ", ".join(dict.fromkeys(part.dtypes for part in self.parts))
        if self.manifest["tuned"] is None:
            return "+".join(self.manifest["base"]["dtypes"])
        sides = ("+".join(self.manifest[side]["dtypes"]) for side in ("tuned", "base"))
        return " - ".join(sides)

    def files(self) -> list[VectorFile]:
        """Return the vector files it is read from."""
        own = [self.stored] if self.stored else []
        return own + [file for part in self.parts for file in part.files()]

    def mixes(self) -> list[MixDelta]:
        """Return the deltas of a combination."""
        return [delta for delta in self.deltas.values() if isinstance(delta, MixDelta)]

    def inputs(self) -> list[Checkpoint | VectorFile]:
        """Return everything it is read from."""
        own = [side for side in (self.stored, self.tuned, self.base) if side is not None]
        return own + [side for part in self.parts for side in part.inputs()]

    def base_digest(self, name: str) -> str | None:
        """Return the digest of the base's tensor that the delta was taken from, if recorded."""
        if self.parts:
            found = {part.base_digest(name) for part in self.parts if name in part.deltas}
            return found.pop() if len(found) == 1 else None
        entry = self.manifest.get("tensors", {}).get(name)
        return entry["base"][1] if entry and entry["base"] else None

    def tuned_dtype(self, name: str) -> str:
        """Return the dtype of the tuned model's tensor, "" where there is none."""
        delta = self.deltas[name]
        if isinstance(delta, PairDelta):
            return delta.tuned.dtype
        entry = self.manifest.get("tensors", {}).get(name)
        return str(entry["tuned"][0]) if entry and entry["tuned"] else ""


def _pair_manifest(
    tuned: dict[str, Any], base: dict[str, Any], dtype: str, matched: dict[str, Any]
) -> dict[str, Any]:
    """Return what the manifest of tuned - base says before its data is read."""
    probes = [tuned["probe"], base["probe"], dtype, *matched["excluded"]]
    return {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": "tuned - base",
        "identity": digest_bytes(json.dumps(probes).encode()),
        "base": base,
        "tuned": tuned,
        "parents": [],
        "recipe": None,
        "training": {"method": None, "notes": None},
        "license": None,
        "equal": matched["integers"],
        "tied": matched["tied"],
        "excluded": matched["excluded"],
        "include": matched["include"],
        "exclude": matched["exclude"],
        "dtype": dtype,
    }


def _sum(terms: Sequence[tuple[SkillVector, float]]) -> SkillVector:
    shares = tuple(Share(vector.ref, weight) for vector, weight in terms)
    return SkillVector.combined([vector for vector, _ in terms], Recipe("linear", shares))


def dtype_of(name: str) -> str:
    """Return the safetensors dtype of a name such as bf16; UsageError for others."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name!r}: expected one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def _value_dtype(delta: DeltaSource) -> str:
    return delta.dtype if isinstance(delta, PairDelta) else delta.spec.dtype


def _scaled(share: Share, part: SkillVector) -> Share:
    """Return a share whose weights carry the vector's own factor."""

    def times(weight: Any) -> Any:
        if isinstance(weight, tuple):
            return tuple(part.scale * point for point in weight)
        return None if weight is None else part.scale * weight

    rules = tuple(replace(rule, weight=times(rule.weight)) for rule in share.rules)
    return replace(share, weight=times(share.weight), rules=rules)


def _common_names(parts: Sequence[SkillVector]) -> list[str]:
    """Return the names of all vectors, or refuse what does not match."""
    if any(part.parts for part in parts):
        raise TypeError("a combination cannot be combined again as it is: save it first")
    names = list(dict.fromkeys(name for part in parts for name in part.deltas))
    problems = []
    for name in names:
        shapes = [part.deltas[name].spec.shape for part in parts if name in part.deltas]
        if len(set(shapes)) > 1:
            problems.append(f"{name}: " + ", ".join(str(list(shape)) for shape in shapes))
        for part in parts:
            if name not in part.deltas and name not in part.manifest["excluded"]:
                problems.append(f"{name} {list(shapes[0])}: not in {part.ref}")
                break
    if problems:
        raise IncompatibleError(f"the vectors do not match:\n{up_to_five(problems)}")
    return names


def _combined_manifest(parts: Sequence[SkillVector], recipe: Recipe) -> dict[str, Any]:
    """Return what the manifest of a combination says before its data is read."""
    manifests = [part.manifest for part in parts]
    base = dict(manifests[0]["base"])
    names = {name for part in parts for name in part.deltas}
    bases = ({p.base_digest(name) for p in parts if name in p.deltas} - {None} for name in names)
    differ = len({m["base"]["probe"] for m in manifests}) > 1 or any(len(b) > 1 for b in bases)
    if differ:
        base["probe"] = None  # no model is the base of them all
    words = recipe.to_dict()
    identities = [m["identity"] for m in manifests]
    shares = zip(words["vectors"], identities, strict=True)
    said = words | {"vectors": [share | {"vector": who} for share, who in shares]}
    licenses = {m["license"] for m in manifests}
    tied = dict(manifests[0]["tied"])
    weights = " ".join(
        f"{share.vector}={share.weight:g}" if isinstance(share.weight, float) else share.vector
        for share in recipe.shares
    )
    return {
        "kind": "vector",
        "schema": SCHEMA,
        "formula": f"{recipe.op}({weights})",
        "identity": digest_bytes(json.dumps(said).encode()),
        "base": base,
        "tuned": None,
        "parents": [
            {
                "ref": part.ref,
                "identity": part.manifest["identity"],
                "manifest": part.stored.digest if part.stored else None,
                "base": part.manifest["base"]["ref"],
                "tuned": part.manifest["tuned"]["ref"] if part.manifest["tuned"] else None,
                **{key: part.manifest[key] for key in ("dtype", "include", "exclude")},
            }
            for part in parts
        ],
        "recipe": words,
        "training": {"method": None, "notes": None},
        "license": licenses.pop() if len(licenses) == 1 else None,
        "equal": {},
        "include": [],
        "exclude": [],
        "tied": {name: twin for name, twin in tied.items()
                 if all(m["tied"].get(name) == twin for m in manifests)},
        "excluded": [name for name in manifests[0]["excluded"]
                     if all(name in m["excluded"] for m in manifests)],
    }  # fmt: skip


# ----------------------------------------------------------------------------------- identity


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a manifest records of a checkpoint, short of its tensors."""
    # as written: a file in the Hub's cache is a link that leads out of its snapshot
    place = os.path.abspath(os.path.expanduser(checkpoint.ref))
    snapshot = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", f"{place}/{checkpoint.path}/")
    return {
        "ref": checkpoint.ref,
        "revision": snapshot.group(1) if snapshot else None,
        "model_type": checkpoint.model_type,
        "config": checkpoint.config_digest,
        "tokenizer": checkpoint.tokenizer_digest,
        "family": checkpoint.family_digest,
        "probe": probe_digest(checkpoint),
        "sketch": sketch(checkpoint),
        "dtypes": checkpoint.dtypes,
    }


def sketch(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Return a few weights of up to 48 matrices, in 32nds of the root mean square around them.

    Fine-tuning hardly moves weights, so two checkpoints of one origin have nearly the same sketch,
    whatever their dtypes; those of another training run have nothing in common.
    """
    floats = [spec for spec in checkpoint.values() if spec.dtype in FLOATS and spec.numel]
    matrices = [spec for spec in floats if len(spec.shape) > 1]
    matrices.sort(key=lambda spec: digest_bytes(spec.name.encode()))
    chosen = sorted(matrices[:SKETCH_TENSORS], key=lambda spec: spec.name)
    kept = min(64, SKETCH_NUMEL // max(1, len(chosen)))
    found = {}
    for spec in chosen:
        numel = min(64, spec.numel)
        content = bytearray(numel * ITEMSIZE[spec.dtype])
        middle = (spec.numel - numel) // 2 * ITEMSIZE[spec.dtype]
        read_into(spec.path, spec.start + middle, memoryview(content))
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = widen(from_bytes(content, spec.dtype), spec.dtype).astype(np.float64)
        values = np.nan_to_num(values, posinf=0, neginf=0)
        values /= np.abs(values).max() or 1.0
        if (values[:kept] != values[0]).any():  # constants say nothing
            size = np.sqrt(np.mean(values**2))
            steps = np.clip(np.rint(32 * values[:kept] / size), -127, 127)
            found[spec.name] = [int(step) for step in steps]
    return found


def relatedness(one: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> float | None:
    """Return the cosine of two sketches over the matrices they share, None where there is none."""
    shared = [
        steps for name in one if name in other
        for steps in zip(one[name], other[name], strict=False)
    ]  # fmt: skip
    norms = sum(a * a for a, _ in shared) * sum(b * b for _, b in shared)
    return sum(a * b for a, b in shared) / sqrt(norms) if norms else None


def probe_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of 4 KiB from the middle of up to 256 tensors.

    Tells two checkpoints apart in milliseconds; full digests, taken while tensors are read anyway,
    have the last word.
    """
    names = sorted(checkpoint)
    step = max(1, len(names) // PROBE_TENSORS)
    buffer = memoryview(allocate(PROBE_NBYTES))
    leaves = bytearray()
    for name in names[::step][:PROBE_TENSORS]:
        spec = checkpoint[name]
        nbytes = min(PROBE_NBYTES, spec.nbytes)
        read_into(spec.path, spec.start + (spec.nbytes - nbytes) // 2, buffer[:nbytes])
        leaves += leaf_digests(buffer[:nbytes])
    shapes = sorted((name, spec.dtype, list(spec.shape)) for name, spec in checkpoint.items())
    return digest_bytes(json.dumps(shapes).encode() + leaves)


# ----------------------------------------------------------------------------------- matching


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether globs keep a name: it matches an include (if any) and no exclude."""
    if include and not any(fnmatch.fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def refuse_idle_globs(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise IncompatibleError for a glob that matches no tensor: a typing error, not a wish."""
    idle = [g for g in (*include, *exclude) if not fnmatch.filter(names, g)]
    if idle:
        raise IncompatibleError(f"globs that match no tensor:\n{up_to_five(idle)}")


def find_tied(checkpoint: Checkpoint, name: str) -> str | None:
    """Return another tensor that holds the same bytes: evidence that `name` is a tied copy."""
    spec = checkpoint[name]
    if len(spec.shape) < 2 or not spec.nbytes:
        return None
    digest = None
    for other in checkpoint.values():
        if other.name != name and (other.dtype, other.shape) == (spec.dtype, spec.shape):
            first = min(spec.nbytes, PROBE_NBYTES)
            if digest_file_range(spec.path, spec.start, first) != digest_file_range(
                other.path, other.start, first
            ):
                continue
            digest = digest or digest_file_range(spec.path, spec.start, spec.nbytes)
            if digest_file_range(other.path, other.start, other.nbytes) == digest:
                return other.name
    return None


def _match(
    tuned: Checkpoint, base: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """Sort the names of two checkpoints into deltas, integers, tied and excluded, or refuse."""
    names = list(dict.fromkeys((*base, *tuned)))
    refuse_idle_globs(names, include, exclude)
    excluded = [name for name in names if not is_selected(name, include, exclude)]
    found: dict[str, Any] = {"deltas": [], "integers": {}, "tied": {}, "excluded": excluded}
    problems = []
    for name in names:
        if not is_selected(name, include, exclude):
            continue
        if name in SIDE:
            problems.append(f"{name}: this name is reserved for the vector file")
        elif name not in tuned or name not in base:
            here, there = (tuned, base) if name in tuned else (base, tuned)
            twin = find_tied(here, name) if there.ties_embeddings is not False else None
            if twin and twin in there and is_selected(twin, include, exclude):
                found["tied"][name] = twin
            else:
                hint = ""
                if here.ties_embeddings and name.endswith("lm_head.weight"):
                    hint = " (tied by its config, but its bytes are those of no other tensor)"
                problems.append(f"{name} {list(here[name].shape)}: only in {here.ref}{hint}")
        elif tuned[name].shape != base[name].shape:
            shapes = f"{list(tuned[name].shape)}, base {list(base[name].shape)}"
            problems.append(f"{name}: tuned {shapes}")
        else:
            dtypes = tuned[name].dtype, base[name].dtype
            if dtypes[0] in FLOATS and dtypes[1] in FLOATS:
                found["deltas"].append(name)
            elif dtypes[0] == dtypes[1]:
                found["integers"][name] = [dtypes[0], None]
            else:
                problems.append(f"{name}: tuned is {dtypes[0]}, base is {dtypes[1]}")
    if problems:
        raise IncompatibleError(
            f"{tuned.ref} and {base.ref} do not match (--exclude GLOB leaves tensors out):\n"
            + up_to_five(problems)
        )
    if not found["deltas"]:
        raise IncompatibleError(f"{tuned.ref} and {base.ref}: no tensor is left to subtract")
    return found
