"""What every vector is, whatever it is made of, and what others may ask of it.

The kinds (skillvec.vectors.kinds) answer where the answer is not this one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import reopen
from skillvec.errors import UsageError
from skillvec.files.tensors import Source
from skillvec.report import Folded, Line, Shown
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.mix import MixDelta, mixes_in
from skillvec.vectors.manifest import Manifest, TensorEntry, TensorSide
from skillvec.vectors.reader import VectorFile


def ledger_line(spec: Source, status: str, note: str = "") -> Line:
    """Return a line of the ledger for a tensor that needs no job."""
    line = {"name": spec.name, "status": status, "dtype": spec.dtype, "shape": list(spec.shape)}
    return line | ({"note": note} if note else {})


@dataclass(frozen=True, eq=False, repr=False)
class Displacement(Shown, ABC):
    """A displacement tuned - base, or several of them merged, times `scale`.

    `deltas` maps tensor names to where the delta comes from. `manifest` is what the file says or
    will say, `notes` how tensors were found. `parts` are those of a combination.
    """

    is_partial: ClassVar[bool] = False  # what it lacks of a target stays, as with an adapter
    is_sparse: ClassVar[bool] = False  # so much that a probe of a few values tells nothing

    ref: str
    deltas: Mapping[str, DeltaSource]
    manifest: Manifest
    scale: float = 1.0
    parts: "tuple[Displacement, ...]" = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    report: Any = field(default=None, compare=False)  # of the verb that wrote it

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifest", Folded(self.manifest))

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a recipe says of it: refs and digests, and how it is combined."""

    @abstractmethod
    def to_command(self) -> tuple[str, list[str]]:
        """Return the verb and the words that give this vector, short of how it is stored."""

    @abstractmethod
    def find_alike(self, name: str) -> set[str]:
        """Return the other tensors that get what `name` gets, going by where deltas come from."""

    def inputs(self) -> list[Checkpoint | VectorFile]:
        """Return everything it is read from."""
        return [side for part in self.parts for side in part.inputs()]

    def files(self) -> list[VectorFile]:
        """Return the vector files it is read from."""
        return [side for side in self.inputs() if isinstance(side, VectorFile)]

    def sides(self) -> dict[str, Checkpoint]:
        """Return the checkpoints that are subtracted as they are read: tuned and base, or none."""
        return {}

    def open_base(self) -> Checkpoint | None:
        """Return the base, where it is open."""
        return self.sides().get("base")

    def reopen_base(self, given: Any) -> Checkpoint:
        """Return the base that is given, or else the vector's own, opened where it was."""
        base = self.open_base() if given is None else None
        excluded = set(self.manifest["excluded"]).__contains__
        ref = self.manifest["base"]["ref"]
        return reopen(given, ref, "base", excluded) if base is None else base

    @property
    def digest(self) -> str | None:
        """The digest of the manifest in its file, None of what is in none."""
        return None

    @property
    def dtypes(self) -> str:
        """Dtype lineage in a word or two: of tuned and base, as BF16 - F32."""
        tuned, base = self.manifest["tuned"], self.manifest["base"]
        return " - ".join("+".join(side["dtypes"]) for side in (tuned, base) if side)

    @property
    def untied(self) -> dict[str, str]:
        """Heads that its base ties, and it does not -> the embedding whose values they had."""
        return dict(self.manifest.get("untied", {}))

    @property
    def lists_tuned(self) -> bool:
        """Whether a patch can be made of it: a stored tuned - base, of which digests are known."""
        return False

    def mixes(self) -> list[MixDelta]:
        """Return the deltas of a combination."""
        return mixes_in(self.deltas.values())

    def list_warnings(self) -> list[str]:
        """Return the warnings of a vector and its parts."""
        return list(dict.fromkeys(self.warnings))

    def nonfinite(self) -> dict[str, int]:
        """Return how many values of tensors have no finite delta, at most: as manifests say."""
        return {}

    def untransferred(self) -> list[str]:
        """Return the integer tensors in which tuned differs from base, which no delta carries.

        Of a pair they are read: they are few, and small.
        """
        return list(dict.fromkeys(name for part in self.parts for name in part.untransferred()))

    def pair_integers(self) -> dict[str, tuple[Source, Source]]:
        """Return tuned and base of the tensors that a delta cannot carry, where they are open."""
        return {}

    def list_left_out(self) -> list[Line]:
        """Return lines of the ledger for tensors of its models that give no delta."""
        return [{"name": name, "status": "excluded"} for name in self.manifest["excluded"]]

    def find_entry(self, name: str) -> TensorEntry | None:
        """Return what a file says of a tensor's delta, None of what is in no file."""
        return None

    def base_digest(self, name: str) -> str | None:
        """Return the digest of the base's tensor that the delta was taken from, if recorded."""
        entry = self.find_entry(name)
        return entry["base"][1] if entry and entry["base"] else None

    def tuned_dtype(self, name: str, own: str | None = None) -> str:
        """Return the dtype of the tuned model's tensor, "" where there is none.

        `own` is its name in the manifest, where its delta goes by another one.
        """
        if (pair := self.deltas[name].pair) is not None:
            return pair.tuned.dtype
        entry = self.find_entry(own or name)
        return str(entry["tuned"][0]) if entry and entry["tuned"] else ""

    def find_same(self, name: str) -> set[str]:
        """Return the other tensors with the very same delta, by names of the manifest.

        Where only the deltas tell, they are none of the numbered layers if the tensor is not: those
        may have the shape of a head and not change either.
        """
        delta = self.deltas[name]
        source = delta.spec.name
        if source != name and self.deltas.get(source) is delta:  # lent to a head
            return {source, *self.find_same(source)} - {name}
        lent = {other for other, of in self.deltas.items() if of is delta and other != name}
        return lent | self.find_alike(name)

    def conclude(
        self, equal: dict[str, TensorSide], differing: list[str], unrestored: int
    ) -> tuple[dict[str, TensorSide], list[str], str]:
        """Return what its manifest says in the end of integers, and what base + 1 * v restores.

        `equal` and `differing` are what was found of them now.
        """
        return equal, differing, "combined"

    def choose_dtype(self, dtype: str) -> str:
        """Return the dtype to store it in if `dtype` is asked for; UsageError if it has its own."""
        own = self.manifest["dtype"]
        if dtype not in ("auto", own):
            raise UsageError(
                f"dtype {dtype}: {self.ref} has its own; diff --dtype chooses that of a difference"
            )
        return own

    def part_problem(self) -> Exception | None:
        """Return what to raise where it cannot be a part of a combination."""
        return None

    def drop_applied(self, rename: Sequence[str]) -> Sequence[str]:
        """Return the rules that its names have not changed by yet."""
        return rename

    def make_for(self, target: Checkpoint, rename: Sequence[str]) -> Self | None:
        """Return the vector computed for a target itself, None where its deltas are moved there."""
        return None

    def terms(self) -> "list[tuple[Displacement, float]]":
        """Return what a sum of vectors is made of: vectors with weights."""
        return [(replace(self, scale=1.0), self.scale)]
