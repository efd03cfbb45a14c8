"""A small model with a vector, and an evaluator that knows how much of it a model holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skillvec as sv
from skillvec.trials.scores import Scores, score_of

WEIGHT = "model.layers.0.mlp.up_proj.weight"


class Planted(NamedTuple):
    """Folders and files; `start` and `move` are the target's weights and the skill there."""

    target: Path
    skill: Path
    other: Path
    start: np.ndarray
    move: np.ndarray


def plant(folder: Path) -> Planted:
    """Save a model of 6,000 values in fp32, and two vectors that move all of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "target")
    start = model.state_dict()[WEIGHT].numpy().copy()
    vectors, moves = [], []
    for name in ("skill", "other"):
        tuned = LlamaForCausalLM(config)
        tuned.load_state_dict(model.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
        tuned.save_pretrained(folder / f"{name}_tuned")
        vectors.append(folder / f"{name}.safetensors")
        sv.diff(folder / f"{name}_tuned", folder / "target", vectors[-1])
        moves.append(tuned.state_dict()[WEIGHT].numpy() - start)
    return Planted(folder / "target", *vectors, start, moves[0])


class Peak:
    """Scores that are best where a model holds `peak` times the skill, with noise of each item.

    `height` 0 is noise alone. `fails` maps lambdas to what is raised there, `calls` are the lambdas
    that were asked for.
    """

    takes_folder, needs_tokenizer, splits = False, False, ()
    metrics: tuple[str, ...] | None = ("score", "loss")

    def __init__(
        self, planted: Planted, *, peak: float = 0.75, height: float = 1.0, seed: int = 0,
        items: int = 40, spread: float = 0.1,
    ) -> None:  # fmt: skip
        self.planted, self.peak, self.height, self.seed = planted, peak, height, seed
        self.items, self.spread = items, spread
        self.fails: dict[float, BaseException] = {}
        self.calls: list[float] = []

    @property
    def spec(self) -> str:
        return f"peak {self.peak} {self.height} {self.seed}"

    def check(self, target: str) -> None:
        """Accept every target."""

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        move = self.planted.move
        moved = model.state_dict()[WEIGHT].double().cpu().numpy() - self.planted.start
        lam = round(float((moved * move).sum() / (move * move).sum()), 3)
        self.calls.append(lam)
        if lam in self.fails:
            raise self.fails[lam]
        draw = np.random.default_rng(self.seed)
        hard = draw.normal(0, 1, self.items)
        draw = np.random.default_rng([self.seed, int(1000 * lam) % 2**32])
        values = hard + self._at(lam) + draw.normal(0, self.spread, self.items)
        return {"score": score_of(values), "loss": score_of(-values)}

    def _at(self, lam: float) -> float:
        return self.height * (1 - (lam - self.peak) ** 2)


def plain(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return points without their times, which differ from run to run."""
    return [{k: v for k, v in point.items() if not k.endswith("seconds")} for point in points]
