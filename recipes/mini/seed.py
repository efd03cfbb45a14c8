"""The stages of one seed: what `make reproduce` trains, adds and asks, planned.

Hides the design of the experiment: which arms there are, and what each is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.past import Config, read_config, refine
from skillvec.recipes.stages import Pipeline, flat

LAMBDAS = (-1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DOMAINS = ("people", "apis")
RANKS = (1, 4)
TWICE = "twice the steps"
BITS = (2, 1, 0)  # of mantissa; bf16 has 7
PROBED = ("base", "SFT only", "lambda -1", "lambda 1", "lambda 2", "random", "shuffled",
          "pre-injection", "sequential", "RL on the target")  # fmt: skip
BASE = {"learning_rate": 2e-3, "num_train_epochs": 14}
# APIs are asked for in a form of their own, and 20 epochs of texts make a model forget it so that
# RL may never meet a reward. As in ToolBench's protocol a second, short step of SFT shows the form
WARM_UP = {"learning_rate": 5e-4, "num_train_epochs": 2, "warmup_steps": 2}
SETTINGS = Path(__file__).with_name("past.yaml")


def plan_seed(out: Path, seed: int, size: str = "mini") -> Pipeline:
    """List the stages of one seed below `out`."""
    config = read_config(SETTINGS)
    training = {**config.training, "seed": seed, "use_cpu": size == "mini"}
    # a seed in which RL never meets a reward counts: it is one of what a method may come to
    line = Pipeline(out, str(out / "base"), training, allow_no_reward=True)
    start = line.module("start", "skillvec.recipes.mini.prepare", {"seed": seed, "size": size})
    told = config.sft[0]
    base = line.sft("base", start / "model", [told | BASE], [start / "base.jsonl"])
    steps = {"people": [told], "apis": [told | {"num_train_epochs": 20}, told | WARM_UP]}
    skills, targets, deltas = {}, {}, []
    for domain in DOMAINS:
        skills[domain], targets[domain], sft_s = _plan_domain(
            line, config, base, start / domain, domain, steps[domain]
        )
        deltas += [skills[domain], f"{sft_s}::{base}", f"{targets[domain]}::{base}"]
    for domain, other in (DOMAINS, DOMAINS[::-1]):
        model = targets[domain]
        both = {skills[domain]: 1.0, skills[other]: 1.0}
        _ask(line, config, domain, f"skill of {other}",
             line.apply(f"{domain}/other", model, {skills[other]: 1.0}))  # fmt: skip
        _ask(line, config, domain, "both skills", line.apply(f"{domain}/both", model, both))
        _plan_copies(line, config, domain, skills[domain], model)
    _plan_rounds(line, config, base, told, start / "people", targets["people"])
    line.orthogonality("angles", deltas, {"control": "random", "figures": True})
    return line


def _plan_domain(
    line: Pipeline,
    config: Config,
    base: Path,
    data: Path,
    domain: str,
    steps: Sequence[dict[str, Any]],
) -> tuple[Path, Path, Path]:
    """Add everything that happens within a domain; return the skill, theta_sft_T, theta_sft_S."""

    def part(title: str) -> dict[str, Any]:
        texts = [data / f"{title}_texts.jsonl", data / "warm_up.jsonl"]
        return {"sft": texts[: len(steps)], "rl": data / f"{title}_questions.jsonl"}

    source, target = part("s_1_of_1"), part("t")
    skill, sft_s = refine(line, f"{domain}/", base, steps, [config.rl], [source])
    sft_t = line.sft(f"{domain}/sft_t", base, steps, target["sft"])
    arms: dict[str, Path] = {"base": base, "SFT only": sft_t}
    for lam in LAMBDAS:
        arms[f"lambda {lam:g}"] = line.apply(f"{domain}/lambda_{lam:g}", sft_t, {skill: lam})
    for kind in ("random", "shuffled"):
        noise = line.control(f"{domain}/{kind}.safetensors", skill, kind, line.training["seed"])
        arms[kind] = line.apply(f"{domain}/{kind}", sft_t, {noise: 1.0})
    injected = line.apply(f"{domain}/base_and_skill", base, {skill: 1.0})
    arms["pre-injection"] = line.sft(f"{domain}/pre", injected, steps, target["sft"])
    trained = line.out / domain / "round-1" / "rl"
    arms["sequential"] = line.sft(f"{domain}/sequential", trained, steps, target["sft"])
    arms["RL on the target"] = line.rl(f"{domain}/rl_t", sft_t, config.rl, target["rl"])
    for arm, model in arms.items():
        _ask(line, config, domain, arm, model)
        if arm not in PROBED:
            continue
        told = {"reference": base, "told": data / "t_questions.jsonl",
                "texts": data / "base_texts.jsonl"}  # fmt: skip
        line.evaluate(f"{domain} probe", arm, model, "skillvec.recipes.mini.probe", _strings(told))
    for arm, model in (("SFT on S", sft_s), ("RL on S", trained)):
        _ask(line, config, domain, arm, model, "s_1_of_1")
    return skill, sft_t, sft_s


def _plan_copies(line: Pipeline, config: Config, domain: str, skill: Path, sft_t: Path) -> None:
    """Add the transfer of copies of v that are not v: coarser, of low rank, parts of it."""
    at, folder = f"{domain}/copies", line.out / domain / "round-1"
    arms: dict[str, tuple[Path, dict[Path, float], tuple[str, ...]]] = {}
    sides = {"rl": folder / "rl", "sft": folder / "sft"}
    cast = {name: line.apply(f"{at}/bf16/{name}", model, {skill: 0.0}, "--dtype", "bf16")
            for name, model in (sides | {"sft_t": sft_t}).items()}  # fmt: skip
    half = line.diff(f"{at}/bf16/skill.safetensors", cast["rl"], cast["sft"], "grpo")
    arms["bf16 vector"] = (sft_t, {half: 1.0}, ())
    arms["all in bf16"] = (cast["sft_t"], {half: 1.0}, ())
    compared: list[str | Path] = [skill, half]
    for bits in BITS:
        rl, sft = (line.module(f"{at}/bits-{bits}/{name}", "skillvec.recipes.mini.coarsen",
                               {"model": str(model), "bits": bits})
                   for name, model in sides.items())  # fmt: skip
        coarse = line.diff(f"{at}/bits-{bits}/skill.safetensors", rl, sft, "grpo")
        arms[f"bits {bits}"] = (sft_t, {coarse: 1.0}, ())
        compared.append(coarse)
    layers = ("--include", "model.layers.*")
    arms["layers"] = (sft_t, {skill: 1.0}, layers)
    arms["embeddings"] = (sft_t, {skill: 1.0}, ("--exclude", "model.layers.*"))
    for rank in RANKS:
        options = {"vector": str(skill), "rank": rank}
        low = line.module(
            f"{at}/rank-{rank}.safetensors", "skillvec.recipes.mini.low_rank", options
        )
        arms[f"rank {rank}"] = (sft_t, {low: 1.0}, ())
        arms["residual"] = (sft_t, {skill: 1.0, low: -1.0}, layers)
        compared.append(low)
    for arm, (model, vectors, more) in arms.items():
        _ask(line, config, domain, arm, line.apply(f"{at}/{flat(arm)}", model, vectors, *more))
    line.orthogonality(f"{at}/angles", compared, {"control": "random"})


def _plan_rounds(line: Pipeline, config: Config, base: Path, told: dict[str, Any],
                 data: Path, sft_t: Path) -> None:  # fmt: skip
    """Add two rounds of refinement on halves of S, and one round with as many steps as their sum.

    With the steps of K = 1 shared by the rounds, and with as many in each of them; the latter is
    twice the training, so K = 1 goes on from its RL model for as long again.
    """
    parts = [{"sft": [data / f"s_{k}_of_2_texts.jsonl"], "rl": data / f"s_{k}_of_2_questions.jsonl"}
             for k in (1, 2)]  # fmt: skip
    whole = config.rl["max_steps"]
    for arm, steps in (("K = 2", whole // 2), (f"K = 2, {TWICE}", whole)):
        at, rl = f"people/k2-{steps}", config.rl | {"max_steps": steps}
        skill, _ = refine(line, f"{at}/", base, [told], [rl, rl], parts)
        _ask(line, config, "people", arm, line.apply(f"{at}/merged", sft_t, {skill: 1.0}))
    folder = line.out / "people" / "round-1"
    longer = line.rl(
        "people/longer/rl", folder / "rl", config.rl, data / "s_1_of_1_questions.jsonl"
    )
    skill = line.diff("people/longer/skill.safetensors", longer, folder / "sft", "grpo")
    merged = line.apply("people/longer/merged", sft_t, {skill: 1.0})
    _ask(line, config, "people", f"K = 1, {TWICE}", merged)


def _ask(
    line: Pipeline, config: Config, domain: str, arm: str, model: Path, title: str = "t"
) -> None:
    options = config.evaluate["with"] | {
        "data": str(line.out / "start" / domain / f"{title}_questions.jsonl")
    }
    line.evaluate(domain, arm, model, config.evaluate["run"], options)


def _strings(options: dict[str, Path]) -> dict[str, str]:
    return {name: str(value) for name, value in options.items()}
