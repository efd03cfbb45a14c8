"""The figures of docs/real.md: those of recipes/claims, and a curve to be read without the page."""

from __future__ import annotations

from typing import Any

from skillvec.recipes.claims.figures import Spec, colour, lambda_rows, quantity, specs
from skillvec.recipes.claims.results import Results
from skillvec.recipes.real.results import DOMAINS

ARMS = ("base", "SFT only", "random", "shuffled", "lambda -1", "lambda 0.5", "lambda 1", "K = 2",
        "pre-injection", "sequential", *(f"skill of {domain}" for domain in DOMAINS),
        "both skills", "bf16 vector", "all in bf16", "RL on the target")  # fmt: skip
PROBED = ("base", "SFT only", "lambda -1", "lambda 1", "lambda 2", "random", "shuffled",
          "pre-injection", "sequential", "RL on the target")  # fmt: skip

ROOM = {"left": 5, "top": 5, "right": 60, "bottom": 5}  # browsers without Arial draw wider letters


def list_specs(results: Results, model: str) -> dict[str, Spec]:
    """Return the figures of the page by name; `model` is named in the title of the first."""
    found = specs(results, ARMS, PROBED)
    if "lambda" in found:
        found["lambda"] = draw_curve(results, model)
    return {name: {**spec, "padding": ROOM} for name, spec in found.items()}


def draw_curve(results: Results, model: str) -> Spec:
    """Draw how many questions are answered by how much of the skill is added, in plain words.

    The band goes from the lowest seed to the highest, crosses are noise in the place of the skill.
    """
    rows, noise = lambda_rows(results)
    many = len(results.seeds)
    x = quantity("lam", "lambda: how much of the skill is added (0: none, 1: all of it)",
                 axis={"values": [-1, -0.5, 0, 0.5, 1, 1.5, 2]})  # fmt: skip
    y = quantity("exact", "questions answered exactly", axis={"format": "%"},
                 scale={"domain": [0, 1]})  # fmt: skip
    encoded = colour(results)
    encoded["legend"] |= {"title": "asked about"}
    ends: Spec = {"y": {**y, "aggregate": "min"}, "y2": {"field": "exact", "aggregate": "max"}}
    base: dict[str, Any] = {"data": {"values": rows}}
    band = {**base, "mark": {"type": "area", "opacity": 0.2},
            "encoding": {"x": x, "color": encoded, **ends}}  # fmt: skip
    return {
        "title": {
            "text": "What a skill learned by RL does to questions that RL never saw",
            "subtitle": [
                f"{model}: told about new {' and '.join(results.domains)}, plus lambda times a"
                " skill that RL learned on others.",
                (f"Line: mean of {many} seeds; band: lowest to highest. " if many > 1 else
                 "One seed. ") + "Crosses: noise of the skill's size in its place.",
            ],
        },
        "width": 460, "height": 260,
        "layer": [
            *([band] if many > 1 else []),
            {**base, "mark": {"type": "line", "point": True},
             "encoding": {"x": x, "y": {**y, "aggregate": "mean"}, "color": encoded}},
            {"data": {"values": noise},
             "mark": {"type": "point", "shape": "cross", "size": 90, "filled": True},
             "encoding": {"x": x, "y": y, "color": encoded}},
        ],
    }  # fmt: skip
