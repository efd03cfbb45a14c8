"""A seed of the real model as its stages leave it: markers, scores and reports, without a model."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.recipes.real.results import DOMAINS
from skillvec.recipes.stages import Pipeline, flat

LAMBDAS = (-1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SUBJECTS, EACH = 25, 8  # questions
MEANS = {
    "base": 0.02, "SFT only": 0.3, "random": 0.3, "shuffled": 0.28, "pre-injection": 0.5,
    "sequential": 0.4, "RL on the target": 0.8, "K = 2": 0.66, "both skills": 0.6,
    "bf16 vector": 0.64, "all in bf16": 0.64, "lambda -1": 0.0, "lambda -0.5": 0.1,
    "lambda 0.25": 0.5, "lambda 0.5": 0.68, "lambda 0.75": 0.7, "lambda 1": 0.65,
    "lambda 1.25": 0.6, "lambda 1.5": 0.5, "lambda 2": 0.3,
}  # fmt: skip
PEOPLE_ONLY = ("sequential", "RL on the target", "K = 2")
PROBED = ("base", "SFT only", "lambda 1", "random", "lambda -1")
TRAINING = {"max_steps": 40, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-5, "report_to": "none"}  # fmt: skip
LAYERS = 30


def make_seed(
    out: Path, seed: int, skip: Callable[[str], bool] = lambda name: False, **means: float
) -> Pipeline:
    """Return a pipeline below `out` of which every stage is done but those whose name `skip` takes.

    `means`: exact match of arms, as lambda_1=.8, in place of MEANS.
    """
    named = MEANS | {key.replace("_", " "): mean for key, mean in means.items()}
    line = Pipeline(out, str(out / "base"), TRAINING)
    random = np.random.default_rng(seed)
    for domain, other in (DOMAINS, DOMAINS[::-1]):
        sft_t = line.sft(f"{domain}/sft_t", line.base, [{"num_train_epochs": 3}], ["texts.jsonl"])
        skill = line.diff(f"{domain}/round-1/skill.safetensors", out / "rl", out / "sft", "grpo")
        if domain == "people":
            line.rl(f"{domain}/rl_t", sft_t, {}, "questions.jsonl")
            line.rl(f"{domain}/round-1/rl", out / "sft", {"max_completion_length": 4}, "s.jsonl")
        arms = {f"skill of {other}": 0.32} | {
            arm: mean for arm, mean in named.items()
            if domain == "people" or arm not in PEOPLE_ONLY
        }  # fmt: skip
        folders = {arm: f"{domain}/asked" for arm in arms if arm not in PEOPLE_ONLY}
        vectors = [f"{arm}={1:g}*{skill}" for arm in folders]
        apart = {arm: f"{domain}/asked-{flat(arm)}" for arm in arms if arm not in folders}
        for folder, each in ((f"{domain}/asked", vectors), *((one, []) for one in apart.values())):
            line.module(folder, "skillvec.recipes.real.ask",
                        {"model": str(sft_t), "arms": each or ["itself="],
                         "probed": [arm for arm in PROBED if each]})  # fmt: skip
        for arm, folder in (folders | apart).items():
            if not skip(folder):
                _answers(line, folder, random, domain, arm, arms[arm], f"{domain} T")
        for arm in () if skip(f"{domain}/asked") else ("SFT on S", "RL on S"):
            _answers(line, f"{domain}/asked", random, domain, arm, 0.7, f"{domain} S")
        for arm in () if skip(f"{domain}/asked") else PROBED:
            kl = 0.02 if arm == "base" else 0.4
            _means(line, f"{domain}/asked", f"{domain} probe", arm,
                   {"told": 0.05 if arm == "base" else 0.95, "kl": kl, "perplexity": 9 + kl,
                    "known": 0.8}, end=".probe")  # fmt: skip
        copies = [f"{domain}/round-1/skill.safetensors", f"{domain}/copies/bf16/skill.safetensors"]
        _report(line, f"{domain}/copies/angles", copies, random)
    deltas = [f"{domain}/{name}" for domain in DOMAINS
              for name in ("round-1/skill.safetensors", "round-1/sft", "sft_t")]  # fmt: skip
    _report(line, "angles", deltas, random)
    for stage in line.stages:
        marker = out / "stages" / f"{flat(stage.name)}.json"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"finished": not skip(stage.name), "seconds": 2.5}))
    return line


def _answers(line: Pipeline, folder: str, random: np.random.Generator, domain: str, arm: str,
             mean: float, group: str) -> None:  # fmt: skip
    """Write marks of questions about subjects that are hard or easy, the same for every arm."""
    hard = np.random.default_rng(7).normal(0, 0.1, SUBJECTS).repeat(EACH)
    drawn = random.random(SUBJECTS * EACH)
    exact = drawn < np.clip(mean + hard, 0, 1)
    contains = drawn < np.clip(mean + hard + 0.15, 0, 1)
    answers = [
        {"prompt": "?", "group": f"{group} {k // EACH}", "said": "x", "exact": float(exact[k]),
         "contains": float(contains[k]), "f1": 0.5}
        for k in range(SUBJECTS * EACH)
    ]  # fmt: skip
    metrics = {name: float(np.mean([answer[name] for answer in answers]))
               for name in ("exact", "contains", "f1")}  # fmt: skip
    _means(line, folder, domain, arm, metrics, answers)


def _means(line: Pipeline, folder: str, target: str, arm: str, metrics: Mapping[str, float],
           answers: Sequence[Mapping[str, Any]] = (), end: str = "") -> None:  # fmt: skip
    path = line.out / folder / f"{arm}{end}.json"
    line.scores[target, arm] = path
    path.parent.mkdir(parents=True, exist_ok=True)
    means = {name: {"mean": mean, "standard_error": None} for name, mean in metrics.items()}
    path.write_text(json.dumps({"metrics": means, "answers": [*answers]}))


def _report(line: Pipeline, name: str, labels: list[str], random: np.random.Generator) -> None:
    folder = line.orthogonality(name, [line.out / label for label in labels], {})
    folder.mkdir(parents=True)
    modules = (*(f"self_attn.{one}_proj" for one in "qkvo"), "input_layernorm",
               *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
               "post_attention_layernorm")  # fmt: skip
    tensors = ["model.embed_tokens.weight", "model.norm.weight"]
    tensors += [f"model.layers.{k}.{one}.weight" for k in range(LAYERS) for one in modules]

    def row(name: str = "") -> dict[str, Any]:
        return {"name": name, "cosine": float(random.normal(0, 0.01)), "p": 0.3, "z": 0.1,
                "control_cosine": 0.0001, "density_a": 0.99, "density_b": 0.22, "norm_a": 2.0,
                "norm_b": 4.0, "norm_ratio": 0.5}  # fmt: skip

    pairs = [
        {"a": f"{line.out / a}", "b": f"{line.out / b}::/elsewhere/base", "overall": row(),
         "parts": [row("layers"), row("outside")], "tensors": [row(one) for one in tensors],
         "layers": [row(f"model.layers.{k}") for k in range(LAYERS)]}
        for a, b in itertools.combinations(labels, 2)
    ]  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"pairs": pairs}))
