"""Pairs of independent deltas by the structure that updates have, of which nulls must hold.

A structure draws the update A and the update B of one base model, independent of each other but for
what it says that they share (where values change, how large they are in a row). So every cosine
between A and B is chance, however far it lies from 0. `planted` makes pairs that are related by a
cosine of known size. numpy alone; the same generator gives the same values.

The model is a language model in small: two layers under the names that transformers gives Llama,
hidden size 64, 115 thousand values. Structures that live on the residual axis find it by the names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Model = dict[str, Array]  # tensors by name
Generator = np.random.Generator
Draw = Callable[[Generator, Model], tuple[Model, Model]]

HIDDEN, VOCABULARY, LAYERS = 64, 320, 2
IN_LAYER = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
    "mlp.up_proj": (2 * HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{f"model.layers.{layer}.{name}.weight": shape
       for layer in range(LAYERS) for name, shape in IN_LAYER.items()},
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}  # fmt: skip
WRITERS = ("o_proj.weight", "down_proj.weight")  # their rows are the residual axis
SIZE = 1e-3  # root mean square of an update; of the weights .02
DENSITY = 0.1


def weights(rng: Generator) -> Model:
    """Return the base: bf16 numbers, held as fp32."""
    made = {name: rng.normal(0, 0.02, shape) for name, shape in SHAPES.items()}
    made |= {name: 1 + value for name, value in made.items() if value.ndim == 1}
    return {name: to_bf16(value.astype(np.float32)) for name, value in made.items()}


def to_bf16(values: Array) -> Array:
    """Return fp32 values rounded to bf16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    upper = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (upper & np.uint32(0xFFFF0000)).view(np.float32)


def norm(model: Model) -> float:
    squares = (float((value.astype(np.float64) ** 2).sum()) for value in model.values())
    return float(np.sqrt(sum(squares)))


def cosine(one: Model, other: Model) -> float:
    inner = sum(float(np.vdot(one[name].astype(np.float64), other[name])) for name in one)
    return inner / (norm(one) * norm(other))


def along(name: str, value: Array, residual: Array, other: Array) -> Array:
    """Return the outer product of a vector of the residual axis and one of the other axis."""
    if value.ndim == 1:
        return residual
    return np.outer(residual, other) if name.endswith(WRITERS) else np.outer(other, residual)


def turned(model: Model, rotation: Array) -> Model:
    """Return a model whose residual axis is rotated in every tensor by one orthogonal matrix."""
    return {
        name: rotation.T @ value if name.endswith(WRITERS) or value.ndim == 1 else value @ rotation
        for name, value in model.items()
    }


def random_rotation(rng: Generator, size: int) -> Array:
    """Return an orthogonal matrix, uniform in the sense of Haar (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


# ------------------------------------------------------------------------------ structures


def twice(one: Callable[[Generator, Model], Model]) -> Draw:
    """Return what draws two updates one after the other."""
    return lambda rng, base: (one(rng, base), one(rng, base))


def iid(rng: Generator, base: Model) -> Model:
    return {name: rng.standard_normal(value.shape) for name, value in base.items()}


def heavy_tails(rng: Generator, base: Model) -> Model:
    degrees = rng.uniform(2, 3)
    return {name: rng.standard_t(degrees, value.shape) for name, value in base.items()}


def sparse(rng: Generator, base: Model) -> Model:
    return {
        name: rng.standard_normal(value.shape) * (rng.random(value.shape) < DENSITY)
        for name, value in base.items()
    }


def tied_supports(rng: Generator, base: Model) -> Model:
    """Return an update of small weights: each power of two halves the chance, from .9 on."""
    made = {}
    for name, value in base.items():
        exponents = np.frexp(np.abs(value))[1]
        chance = 0.9 * 2.0 ** -np.clip(exponents + 8, 0, 12)
        made[name] = rng.standard_normal(value.shape) * (rng.random(value.shape) < chance)
    return made


def of_one_size(one: Callable[[Generator, Model], Model]) -> Draw:
    """Return what draws two updates and gives their rows and channels the same magnitudes.

    Lognormal ones; four channels of the residual axis are twice as large in every tensor.
    """

    def draw(rng: Generator, base: Model) -> tuple[Model, Model]:
        channels = rng.permutation(np.where(np.arange(HIDDEN) < 4, 2.0, 1.0))
        channels *= rng.lognormal(0, 0.2, HIDDEN)
        sizes = {name: along(name, value, channels, rng.lognormal(0, 0.5, value.size // HIDDEN))
                 for name, value in base.items()}  # fmt: skip
        first, second = one(rng, base), one(rng, base)
        return ({name: sizes[name] * first[name] for name in base},
                {name: sizes[name] * second[name] for name in base})  # fmt: skip

    return draw


def rank_one(rng: Generator, base: Model) -> Model:
    """Return an update of which .8 of the energy of each matrix is one outer product."""
    made = iid(rng, base)
    for name, value in base.items():
        if value.ndim == 2:
            rows, columns = (rng.standard_normal(size) for size in value.shape)
            made[name] = np.sqrt(0.8) * np.outer(rows, columns) + np.sqrt(0.2) * made[name]
    return made


def shared_direction(share: float) -> Callable[[Generator, Model], Model]:
    """Return what draws an update of which `share` of the energy moves all rows alike.

    One direction of the residual axis is added to every row of embeddings, head and layers, and to
    every column of what writes to that axis, as large everywhere.
    """

    def draw(rng: Generator, base: Model) -> Model:
        direction = rng.standard_normal(HIDDEN)
        made = {}
        for name, noise in iid(rng, base).items():
            if noise.ndim == 2:
                alike = along(name, noise, direction, np.ones(noise.size // HIDDEN))
                noise = np.sqrt(share) * alike + np.sqrt(1 - share) * noise
            made[name] = noise
        return made

    return draw


def row_signs(rng: Generator, base: Model) -> Model:
    """Return an update in which the values of a row have one sign, that of each row by chance."""
    made = {}
    for name, value in iid(rng, base).items():
        signs = np.where(rng.random(value.shape[:-1]) < 0.5, -1.0, 1.0)
        made[name] = np.abs(value) * signs[..., None] if value.ndim == 2 else value
    return made


STRUCTURES: dict[str, Draw] = {
    "iid": twice(iid),
    "heavy tails": twice(heavy_tails),
    "sparse": twice(sparse),
    "tied supports": twice(tied_supports),
    "shared magnitudes": of_one_size(iid),
    "rank 1": twice(rank_one),
    "shared direction, 20 %": twice(shared_direction(0.2)),
    "shared direction, 60 %": twice(shared_direction(0.6)),
    "shared direction, 100 %": twice(shared_direction(1.0)),
    "shared direction and magnitudes": of_one_size(shared_direction(0.6)),
    "signs of rows": twice(row_signs),
    "bf16": twice(iid),
}
BF16 = "bf16"  # updates that are rounded with the weights
BF16_SIZE = 2e-5  # about a quarter of the bf16 weights change
BF16_KEPT = 0.65  # of a cosine of a hundredth, when both updates are rounded
REAL = "real, rotated"
SPARSE = ("sparse", "tied supports", BF16)  # whose supports say something


class Pairs:
    """Draws pairs of one structure: models base, base + A and base + B.

    `folder` holds the miniature of `make demo` for the structure REAL: A is its skill with the
    residual axis rotated at random, B its SFT update.
    """

    def __init__(self, structure: str, folder: Path | None = None) -> None:
        self.structure = structure
        if structure == REAL:
            assert folder is not None
            self.base, self.tuned, self.skilled = read_miniature(folder)

    def draw(self, rng: Generator, cosine: float = 0.0) -> tuple[Model, Model, Model]:
        """Return base, base + A and base + B, where B holds so much of A as gives the cosine.

        All are fp32, in the structure BF16 with values that bf16 has.
        """
        if self.structure == REAL:
            base = self.base
            other = {name: self.tuned[name] - base[name] for name in base}
            skill = {name: self.skilled[name] - self.tuned[name] for name in base}
            one = turned(skill, random_rotation(rng, len(base["model.norm.weight"])))
            one, other = planted(other, one, cosine)[::-1]
            return base, added(base, one), added(base, other)
        base = weights(rng)
        one, other = STRUCTURES[self.structure](rng, base)
        one, other = planted(one, other, cosine / (BF16_KEPT if self.structure == BF16 else 1))
        size = BF16_SIZE if self.structure == BF16 else SIZE
        numel = sum(value.size for value in base.values())
        models = [added(base, model, size * np.sqrt(numel) / norm(model)) for model in (one, other)]
        if self.structure == BF16:
            models = [{name: to_bf16(value) for name, value in model.items()} for model in models]
        return base, models[0], models[1]


def planted(one: Model, other: Model, cosine: float) -> tuple[Model, Model]:
    """Return both, the second with as much of the first as moves their cosine by `cosine`."""
    if not cosine:
        return one, other
    factor = cosine / np.sqrt(1 - cosine * cosine) * norm(other) / norm(one)
    return one, {name: other[name] + factor * one[name] for name in one}


def added(base: Model, update: Model, factor: float = 1.0) -> Model:
    return {name: (base[name] + factor * update[name]).astype(np.float32) for name in base}


def read_miniature(folder: Path) -> tuple[Model, Model, Model]:
    """Return base, SFT and RL model of the miniature; FileNotFoundError where there is none."""
    from safetensors.numpy import load_file

    found = []
    for part in ("base", "round-1/sft", "round-1/rl"):
        path = folder / part / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: run `make demo` first, which trains the miniature")
        found.append(load_file(path))
    return found[0], found[1], found[2]
