"""The kinds of vectors: each holds what it is made of, and answers for it.

A stored file, a pair of checkpoints, a patch or an adapter on its base, a combination. Another kind
is a class here, and one in skillvec.vectors.vector that gives it arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.fingerprint import RELATED, relatedness
from skillvec.checkpoints.renaming import numbered, renamed
from skillvec.checkpoints.ties import same_bytes
from skillvec.errors import UsageError
from skillvec.files.tensors import Source, digest_values
from skillvec.report import Line
from skillvec.vectors.deltas.base import DeltaSource
from skillvec.vectors.deltas.computed import ComputedDelta
from skillvec.vectors.displacement import Displacement, ledger_line
from skillvec.vectors.manifest import CHOSEN, TensorEntry, TensorSide
from skillvec.vectors.reader import VectorFile
from skillvec.vectors.recipe import Recipe, flags

if TYPE_CHECKING:
    from skillvec.checkpoints.lora import Adapter

TAKEN = ("dtype", *CHOSEN)  # what who subtracts may choose, in records


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stored(Displacement):
    """A vector in a file, which its manifest describes."""

    stored: VectorFile

    def describe(self) -> dict[str, Any]:
        return {"ref": self.ref, "digest": self.digest}

    def to_command(self) -> tuple[str, list[str]]:
        return "combine", [self.ref]

    def inputs(self) -> list[Checkpoint | VectorFile]:
        return [self.stored]

    @property
    def digest(self) -> str:
        return self.stored.digest

    @property
    def lists_tuned(self) -> bool:
        return self.scale == 1 and self.manifest["tuned"] is not None

    def nonfinite(self) -> dict[str, int]:
        entries = self.manifest["tensors"].items()
        return {name: e["nonfinite"] for name, e in entries if e.get("nonfinite")}

    def untransferred(self) -> list[str]:
        return list(self.manifest["differing"])

    def find_entry(self, name: str) -> TensorEntry | None:
        return self.manifest["tensors"].get(name)

    def conclude(
        self, equal: dict[str, TensorSide], differing: list[str], unrestored: int
    ) -> tuple[dict[str, TensorSide], list[str], str]:
        said = self.manifest
        return said["equal"], said["differing"], said["exactness"]["claim"]

    def find_alike(self, name: str) -> set[str]:
        if self.deltas[name].is_relaid:
            return set()
        entries = self.manifest["tensors"]
        known = entries[name]["base"] is not None

        def key(entry: TensorEntry) -> list[Any]:
            if known:
                return [entry["base"], entry["tuned"]]
            return [entry["dtype"], entry["shape"], entry["codec"], entry["digest"]]

        mine = key(entries[name])
        same = (n for n, entry in entries.items() if n != name and key(entry) == mine)
        return {
            n for n in same if n in self.deltas and (known or numbered(n) == numbered(name))
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pair(Displacement):
    """Two checkpoints that are subtracted as they are read."""

    tuned: Checkpoint
    base: Checkpoint

    def describe(self) -> dict[str, Any]:
        chosen = {key: self.manifest.get(key) for key in TAKEN if key in self.manifest}
        sides = {"tuned": self.tuned.ref, "base": self.base.ref}
        return sides | {key: value for key, value in chosen.items() if value not in ("auto", [])}

    def to_command(self) -> tuple[str, list[str]]:
        chosen = {key: self.manifest.get(key) for key in TAKEN if key in self.manifest}
        return "diff", [*self._refs(), *flags(**chosen)]

    def _refs(self) -> list[str]:
        tuned, base = self.manifest["tuned"], self.manifest["base"]
        return [side["ref"] for side in (tuned, base) if side]

    def inputs(self) -> list[Checkpoint | VectorFile]:
        return [self.tuned, self.base]

    def sides(self) -> dict[str, Checkpoint]:
        return {"tuned": self.tuned, "base": self.base}

    def untransferred(self) -> list[str]:
        sides = self.pair_integers().items()
        return [name for name, pair in sides if digest_values(pair[0]) != digest_values(pair[1])]

    def pair_integers(self) -> dict[str, tuple[Source, Source]]:
        return {name: (self.tuned[name], self.base[name]) for name in self.manifest["equal"]}

    def list_left_out(self) -> list[Line]:
        told = [(name, "excluded", self.notes.get(name, "")) for name in self.manifest["excluded"]]
        told += [(name, "tied", f"copy of {of}") for name, of in self.manifest["tied"].items()]
        return [
            ledger_line(self.base.get(name) or self.tuned[name], status, note)
            for name, status, note in told
        ]

    def conclude(
        self, equal: dict[str, TensorSide], differing: list[str], unrestored: int
    ) -> tuple[dict[str, TensorSide], list[str], str]:
        claim = "partial" if unrestored or differing else "bitwise"
        if self.manifest["dtype"] != "auto" and unrestored:
            claim = "rounded"
        return equal, differing, claim

    def find_alike(self, name: str) -> set[str]:
        if (mine := self.deltas[name].pair) is None:  # of another layout
            return set()
        return {
            other for other, delta in self.deltas.items()
            if other != name and (pair := delta.pair) is not None
            and same_bytes(mine.base, pair.base) and same_bytes(mine.tuned, pair.tuned)
        }  # fmt: skip


class Patched(Pair):
    """A patch (changed values of the exact base) and that base: `tuned` is the base, patched."""

    is_sparse: ClassVar[bool] = True

    def to_command(self) -> tuple[str, list[str]]:
        return "import-patch", self._refs()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Adapted(Displacement):
    """What an adapter adds to its base; without one (None) it is fitted to the target it meets."""

    is_partial: ClassVar[bool] = True

    adapter: "Adapter"
    origin: Checkpoint  # its own files
    base: Checkpoint | None = None

    def describe(self) -> dict[str, Any]:
        renamed_by = {"rename": self.manifest["rename"]} if "rename" in self.manifest else {}
        return {"ref": self.ref, "digest": self.manifest["identity"], **renamed_by}

    def to_command(self) -> tuple[str, list[str]]:
        return "diff", [self.manifest["parents"][0]["ref"], self.manifest["base"]["ref"]]

    def inputs(self) -> list[Checkpoint | VectorFile]:
        return [side for side in (self.base, self.origin) if side is not None]

    def open_base(self) -> Checkpoint | None:
        return self.base

    def choose_dtype(self, dtype: str) -> str:
        if self.base is None:
            raise UsageError(f"{self.ref}: an adapter alone cannot be stored: diff ADAPTER BASE")
        return super().choose_dtype(dtype)

    def part_problem(self) -> Exception | None:
        if self.base is not None:
            return None
        return UsageError(
            f"{self.ref}: an adapter without its base cannot be combined: skillvec diff ADAPTER"
            " BASE -o makes a vector of it"
        )

    def drop_applied(self, rename: Sequence[str]) -> Sequence[str]:
        return () if list(rename) == self.manifest.get("rename") else rename

    def make_for(self, target: Checkpoint, rename: Sequence[str]) -> Self | None:
        if self.base is not None:
            if not rename or self.adapter.needs_base:
                return None
            try:
                renamed({name: delta.spec.shape for name, delta in self.deltas.items()}, rename)
            except UsageError:  # rules for the adapter's own names, of a model in memory
                pass
            else:
                return None
        from skillvec.checkpoints.adapter_effect import effect_on  # adapters are rare

        effect = effect_on(self.adapter, target, rename)
        deltas = {name: ComputedDelta(d, self.ref) for name, d in effect.deltas.items()}
        return replace(self, deltas=deltas, warnings=tuple(effect.warnings))

    def find_alike(self, name: str) -> set[str]:
        mine = self.deltas[name]
        return {
            other for other, delta in self.deltas.items()
            if other != name and numbered(other) == numbered(name) and _is_same(mine, delta)
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Combined(Displacement):
    """Several vectors merged by an operator as they are read."""

    recipe: Recipe
    beside: tuple[Checkpoint, ...] = ()  # what else it is read from

    def inputs(self) -> list[Checkpoint | VectorFile]:
        return [*super().inputs(), *self.beside]

    def terms(self) -> list[tuple[Displacement, float]]:
        shares = self.recipe.shares
        plain = all(isinstance(share.weight, float) and not share.rules for share in shares)
        if self.recipe.op != "linear" or not plain:
            raise TypeError(
                f"{self.ref}: a combination that is not a plain sum can be neither part of another"
                " nor stored with a factor: save it as it is first"
            )
        return [
            (part, self.scale * float(share.weight))  # type: ignore[arg-type]
            for part, share in zip(self.parts, shares, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        parts = [part.describe() for part in self.parts]
        return {"recipe": self.recipe.to_dict(), "parts": parts}

    def to_command(self) -> tuple[str, list[str]]:
        recipe = self.recipe
        if any(share.rules or share.parameters or not isinstance(share.weight, float)
               for share in recipe.shares):  # fmt: skip
            return "combine", ["--recipe", "RECIPE"]  # the manifest holds it
        words = [f"{share.vector}={share.weight!r}" for share in recipe.shares]
        params = [f"{name}={value}" for name, value in recipe.parameters.items()]
        return "combine", [*words, *flags(op=recipe.op, param=params, seed=recipe.seed)]

    def conclude(
        self, equal: dict[str, TensorSide], differing: list[str], unrestored: int
    ) -> tuple[dict[str, TensorSide], list[str], str]:
        return equal, differing, "lossy" if self.recipe.op == "coarsen" else "combined"

    @property
    def dtypes(self) -> str:
        return ", ".join(dict.fromkeys(part.dtypes for part in self.parts))

    def list_warnings(self) -> list[str]:
        own = [warning for part in (self, *self.parts) for warning in part.warnings]
        return [*dict.fromkeys(own), *_kinship_warnings(self.parts)]

    def nonfinite(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for part in self.parts:
            for name, count in part.nonfinite().items():
                found[name] = min(found.get(name, 0) + count, part.deltas[name].spec.numel)
        return found

    def base_digest(self, name: str) -> str | None:
        found = {part.base_digest(name) for part in self.parts if name in part.deltas}
        return found.pop() if len(found) == 1 else None

    def choose_dtype(self, dtype: str) -> str:
        return dtype

    def part_problem(self) -> Exception | None:
        return TypeError("a combination cannot be combined again as it is: save it first")

    def find_alike(self, name: str) -> set[str]:
        """Return the tensors to which every part does the same, or nothing."""
        mine = self.deltas[name]
        if mine.way is None:
            return set()
        found = {n for n, delta in self.deltas.items() if n != name and delta.way == mine.way}
        for part in self.parts:
            if name in part.deltas:
                found &= part.find_same(name)
            else:
                found -= set(part.deltas)
        return found


def _kinship_warnings(parts: Sequence[Displacement]) -> list[str]:
    """Return what to say of vectors that were taken from bases that are not related."""
    sketches = [part.manifest["base"]["sketch"] for part in parts]
    cosines = [relatedness(sketches[0], other) for other in sketches[1:]]
    if not any(cosine is not None and cosine < RELATED for cosine in cosines):
        return []
    refs = ", ".join(dict.fromkeys(part.manifest["base"]["ref"] for part in parts))
    return [f"the vectors were taken from bases that are not related: {refs}"]


def _is_same(one: DeltaSource, other: DeltaSource) -> bool:
    """Return whether an adapter does the same to two tensors: nothing, or the very same thing."""
    if one.spec.shape != other.spec.shape:
        return False
    if one.way is not None and other.way is not None:
        return bool(one.way == other.way)
    if (mine := one.pair) is not None and (pair := other.pair) is not None:
        return mine.tuned == pair.tuned and same_bytes(mine.base, pair.base)
    return one.is_zero and other.is_zero
