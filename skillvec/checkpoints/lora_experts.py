"""Factors in another layout than the base's: of experts, and of projections that are rows of one.

Adapters made before transformers 5 hold factors of every expert's linear layers, and raw ones of
Tinker 3-D factors of all experts (w1 gate, w3 up, w2 down), of which one side may be shared. A base
holds experts one by one, or fused into parameters experts x out x in, gate above up, or turned with
gate beside up, or (GPT-OSS) with the two taking turns. What neither names nor shapes tell is
refused.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from skillvec.checkpoints.lora_deltas import Joined, LoraDelta, LowRank, Woven
from skillvec.files.tensors import Source
from skillvec.files.views import Box, View, row_major

ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # as Tinker and Mixtral call them
# model types whose experts lie as in x out, gates and ups taking turns, or side by side
WOVEN = ("gpt_oss",)
BESIDE = ("aria", "aria_text", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
ROWS = {  # projections that Tinker trains apart and transformers has as rows of one, in this order
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"), "in_proj": ("gate_proj", "x_proj"),
}  # fmt: skip
NAME = re.compile(rf"(.+\.experts)(?:\.(\d+))?\.({'|'.join((*ROLES, *ROLES.values()))})")


class ExpertModule(NamedTuple):
    """A module of experts: of those below `experts` which one (None: all), and which projection."""

    experts: str
    number: int | None
    leaf: str

    @property
    def role(self) -> str:
        return ROLES.get(self.leaf, self.leaf)


def parse_expert(module: str) -> ExpertModule | None:
    """Return what the name of a module of experts says, None for any other module."""
    found = NAME.fullmatch(module)
    if not found or len(found[2] or "") > 6:
        return None
    return ExpertModule(found[1], None if found[2] is None else int(found[2]), found[3])


def fused_of(module: str, base: Mapping[str, Source]) -> str | None:
    """Return the weight of a base that may have a module, which it lacks, as some of its rows."""
    parent, _, leaf = module.rpartition(".")
    names = (f"{parent}.{fused}.weight" for fused, leaves in ROWS.items() if leaf in leaves)
    return next((name for name in names if name in base), None)


def under_each_other(name: str, given: Mapping[str, LowRank], shape: tuple[int, ...]) -> Joined:
    """Return the delta of a weight that has those of several modules under each other.

    Raises ValueError where one is missing, so that nothing tells where the others begin, or where
    they do not fit.
    """
    leaves = ROWS[name.split(".")[-2]]
    boxes, at = [], 0
    for leaf in leaves:
        if leaf not in given:
            raise ValueError(f"{name}: without {leaf} nothing tells the rows of {', '.join(given)}")
        sizes = given[leaf].shape
        boxes.append(Box((at, 0), sizes, given[leaf], 0, row_major(sizes)))
        at += sizes[0]
    fits = at == shape[0] if leaves == ROWS["in_proj_qkv"] else at <= shape[0]
    if len(shape) != 2 or not fits or {box.sizes[1] for box in boxes} != {shape[1]}:
        sides = ", ".join(f"{leaf} {list(given[leaf].shape)}" for leaf in leaves)
        raise ValueError(f"{name} {list(shape)}: {sides}")
    return Joined(name, View(shape, tuple(boxes)))


def are_turned(experts: str, base: Mapping[str, Source]) -> bool | None:
    """Return whether fused experts lie as in x out; None where their shapes do not tell.

    gate_up is 2 I x H and down H x I, or both are turned.
    """
    gate_up, down = (base.get(f"{experts}.{name}") for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or not len(gate_up.shape) == len(down.shape) == 3:
        return None
    (a, b), (c, d) = gate_up.shape[1:], down.shape[1:]
    ways = [
        turned
        for turned, fits in ((False, a == 2 * d and b == c), (True, b == 2 * c and a == d))
        if fits
    ]
    return ways[0] if len(ways) == 1 else None


def on_experts(
    experts: str,
    given: Mapping[ExpertModule, LowRank],
    base: Mapping[str, Source],
    model_type: str | None,
) -> dict[str, LoraDelta]:
    """Return what factors add to the experts of a base: `given` are of all, or out x in of one.

    Raises ValueError that says what does not fit.
    """
    if any(f"{experts}.{name}" in base for name in ("gate_up_proj", *ROLES.values())):
        return _on_fused(experts, given, base, model_type)
    deltas: dict[str, LoraDelta] = {}
    for place, factors in given.items():
        if place.number is not None:
            raise ValueError(f"{experts}.{place.number}.{place.leaf}: not in the base")
        leaf = _leaf_of(place, base)
        count, out, inner = factors.shape
        names = [f"{experts}.{number}.{leaf}.weight" for number in range(count)]
        wrong = [name for name in names if name not in base or base[name].shape != (out, inner)]
        if wrong or f"{experts}.{count}.{leaf}.weight" in base:
            name = wrong[0] if wrong else f"{experts}.{count}.{leaf}.weight"
            there = list(base[name].shape) if name in base else "not in the base"
            raise ValueError(f"{experts}.{place.leaf}: {list(factors.shape)}, {name}: {there}")
        for number, name in enumerate(names):
            box = Box((0, 0), (out, inner), factors, number * out * inner, (inner, 1))
            part = factors.part(name, (out, inner), box)
            assert part is not None
            deltas[name] = part
    return deltas


def _leaf_of(place: ExpertModule, base: Mapping[str, Source]) -> str:
    """Return what a base calls a projection of experts that it holds one by one.

    Experts without a gate have w1 for up (Nemotron).
    """
    there = [
        leaf for leaf in (place.leaf, place.role) if f"{place.experts}.0.{leaf}.weight" in base
    ]
    if not there and place.leaf == "w1":
        there = ["up_proj"] if f"{place.experts}.0.up_proj.weight" in base else []
    return next(iter(there), place.role)


def _on_fused(
    experts: str,
    given: Mapping[ExpertModule, LowRank],
    base: Mapping[str, Source],
    model_type: str | None,
) -> dict[str, LoraDelta]:
    known = are_turned(experts, base)
    pieces: dict[
        str, dict[int, list[tuple[ExpertModule, LowRank]]]
    ] = {}  # by parameter and half of it
    for place, factors in given.items():
        role = place.role
        if place.leaf == "w1" and not any(
            f"{experts}.{n}_proj" in base for n in ("gate_up", "gate")
        ):
            role = "up_proj"
        both = role != "down_proj" and f"{experts}.{role}" not in base
        name = f"{experts}.{'gate_up_proj' if both else role}"
        halves = pieces.setdefault(name, {})
        halves.setdefault(int(both and role == "up_proj"), []).append((place, factors))
    deltas: dict[str, LoraDelta] = {}
    for name, halves in pieces.items():
        if name not in base or len(base[name].shape) != 3:
            raise ValueError(f"{name}: not in the base")
        count = 2 if name.endswith(".gate_up_proj") else 1
        shape, held = base[name].shape, [piece for half in halves.values() for piece in half]
        ways = {_lies(shape, place, factors, count) for place, factors in held}
        fits = [way for way in (False, True) if all(way in lies for lies in ways)]
        fits = [way for way in fits if known in (None, way)]
        if len(fits) != 1:
            place, factors = held[0]
            shapes = f"{list(factors.shape)}, {name} {list(shape)}"
            raise ValueError(f"{experts}.{place.leaf}: {len(fits)} ways to fit {shapes}")
        deltas[name] = _fused(name, shape, halves, fits[0], model_type)
    return deltas


def _lies(
    shape: tuple[int, ...], place: ExpertModule, factors: LowRank, count: int
) -> frozenset[bool]:
    """Return in which ways, turned or not, factors fit a half or all of a fused parameter."""
    out, inner = factors.shape[-2:]
    experts, low, high = shape
    there = factors.shape[0] == experts if place.number is None else place.number < experts
    sides = {False: (count * out, inner), True: (inner, count * out)}
    return frozenset(way for way, side in sides.items() if there and side == (low, high))


def _fused(
    name: str,
    shape: tuple[int, ...],
    halves: Mapping[int, list[tuple[ExpertModule, LowRank]]],
    turned: bool,
    model_type: str | None,
) -> LoraDelta:
    """Return the delta of a fused parameter: halves lie under each other, or take turns."""
    joined = name.endswith(".gate_up_proj")
    alone = all(place.number is None for pieces in halves.values() for place, _ in pieces)
    if turned and (not alone or (joined and model_type not in (*WOVEN, *BESIDE))):
        raise ValueError(f"{name} {list(shape)}: nothing tells how gate and up lie in it")
    if turned:
        made = {half: _turned(name, pieces[0][1]) for half, pieces in halves.items()}
        if not joined:
            return made[0]
        if model_type in WOVEN:
            return Woven(name, shape, (made.get(0), made.get(1)))
        beside = (
            Box((0, 0, half * piece.shape[2]), piece.shape, piece, 0, row_major(piece.shape))
            for half, piece in made.items()
        )
        return Joined(name, View(shape, tuple(beside)))
    boxes = []
    for half, pieces in halves.items():
        for place, factors in pieces:
            out, inner = factors.shape[-2:]
            experts = shape[0] if place.number is None else 1
            offset = (place.number or 0, half * out, 0)
            strides = (out * inner, *row_major((out, inner)))
            boxes.append(Box(offset, (experts, out, inner), factors, 0, strides))
    if not joined and len(boxes) == 1 and alone:
        return halves[0][0][1].named(name)
    return Joined(name, View(shape, tuple(boxes)))


def _turned(name: str, factors: LowRank) -> LowRank:
    experts, out, inner = factors.shape
    box = Box((0, 0, 0), (experts, inner, out), factors, 0, (out * inner, 1, inner))
    part = factors.part(name, box.sizes, box)
    assert part is not None
    return part
