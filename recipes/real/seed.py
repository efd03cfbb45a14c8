"""The stages of one seed of the real model, planned: what is trained, added and asked.

Hides the design of the experiment: which arms there are, and what each is made of. Arms are named
as in the miniature (recipes/mini/seed.py). What costs a training of its own and says nothing about
a second domain is there for people alone: order, rounds, RL on the target, regimes, thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skillvec.recipes.mini.seed import LAMBDAS
from skillvec.recipes.past import refine
from skillvec.recipes.real.ask import TOKENS, read_arm
from skillvec.recipes.real.prepare import ROUNDS
from skillvec.recipes.stages import Pipeline, flags, flat

DOMAINS = ("people", "tools")
DEEP = "people"  # the domain with every arm
OF_ONE = ("regimes", "thinking")
PARTS = ("claims", "orders", *OF_ONE, "anatomy")
PROBED = ("base", "SFT only", "lambda -1", "lambda 1", "lambda 2", "random", "shuffled",
          "pre-injection", "sequential", "RL on the target")  # fmt: skip
THINKING = (16, 64)  # tokens that an answer may take, beside the few of the claims
REGIME_LAMBDAS = (0.25, 0.5, 1.0, 1.5, 2.0)
HALF = "copies/bf16"  # folder of what was saved as bf16
REGIMES = {  # skills of people: where each lies below a seed's folder
    "fp32": f"{DEEP}/round-1/skill.safetensors",
    "saved as bf16": f"{DEEP}/{HALF}/skill.safetensors",
    "trained in bf16": "regimes/trained_in_bf16/skill.safetensors",
    "low rate, fp32": "regimes/low_rate_fp32/skill.safetensors",
    "low rate, trained in bf16": "regimes/low_rate_trained_in_bf16/skill.safetensors",
}
SIDES = ("fp32", "bf16", "bf16, stochastic")  # targets that they are added to
LOW_RATE = 1e-6  # the paper's, and TRL's default
SETTINGS = Path(__file__).with_name("settings.yaml")


@dataclass(frozen=True)
class Settings:
    """What recipes/real/settings.yaml says.

    `base`: the folder of a model. `rl` of all domains, `answers` of each. `subjects` in S and in T,
    with so many `texts` each. `parts`: what is run of PARTS, where `claims` need no training beside
    those of v and of the target, and `orders` do. `limit`: questions of an arm of the regimes
    (none: all).
    """

    base: str
    training: Mapping[str, Any]
    sft: Mapping[str, Any]
    rl: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Any]]
    subjects: int
    texts: int
    environment: Mapping[str, str]
    domains: Sequence[str] = DOMAINS
    parts: Sequence[str] = PARTS
    limit: int | None = None


def read_settings(changes: Mapping[str, Any] | None = None, path: Path = SETTINGS) -> Settings:
    """Read a YAML file of Settings; TypeError for what is missing or unknown."""
    return Settings(**yaml.safe_load(path.read_text(encoding="utf-8")) | (changes or {}))


def plan_seed(out: Path, seed: int, settings: Settings) -> Pipeline:
    """List the stages of one seed below `out`."""
    design = Design(out, seed, settings)
    for domain in settings.domains:
        if domain == DEEP or {*settings.parts} - {*OF_ONE}:
            design.train(domain)
    if "claims" in settings.parts:
        for domain in settings.domains:
            design.add_claims(domain)
        design.compare()
    if "orders" in settings.parts:
        for domain in settings.domains:
            design.add_orders(domain)
    if "regimes" in settings.parts:
        design.add_regimes()
    if "thinking" in settings.parts:
        design.ask_lengths(DEEP)
    if "anatomy" in settings.parts:
        for domain in settings.domains:
            design.add_anatomy(domain)
    return design.line


class Design:
    """The stages of a seed; the methods add some to `line`, in the order they run in."""

    def __init__(self, out: Path, seed: int, settings: Settings) -> None:
        self.settings, self.seed = settings, seed
        # a seed in which RL never meets a reward counts: it is one of what a method may come to
        training = {**settings.training, "seed": seed}
        self.line = Pipeline(out, settings.base, training, allow_no_reward=True)
        options = {"base": settings.base, "seed": seed, "subjects": settings.subjects,
                   "texts": settings.texts}  # fmt: skip
        self.start = self.line.module("start", "skillvec.recipes.real.prepare", options)
        self.base = Path(settings.base)
        self.skills: dict[str, Path] = {}
        self.sources: dict[str, Path] = {}  # theta_sft_S
        self.targets: dict[str, Path] = {}  # theta_sft_T

    def train(self, domain: str) -> None:
        """Train theta_sft_S, theta_rl_S and theta_sft_T, and cut v out; save all as bf16 too."""
        self.skills[domain], self.sources[domain] = refine(
            self.line, f"{domain}/", self.base, [self.settings.sft], [self._rl(domain)],
            [self._part(domain, "s")],
        )  # fmt: skip
        self.targets[domain] = self._sft(f"{domain}/sft_t", domain, self.base)
        line, folder, unchanged = self.line, self._place(domain), {self.skills[domain]: 0.0}
        sides = {"rl": self._trained(domain), "sft": self.sources[domain],
                 "sft_t": self.targets[domain]}  # fmt: skip
        for name, model in sides.items():
            line.apply(f"{domain}/{HALF}/{name}", model, unchanged, "--dtype", "bf16")
        line.diff(f"{domain}/{HALF}/skill.safetensors", folder / "rl", folder / "sft", "grpo")

    def add_claims(self, domain: str) -> None:
        """Add the arms of the ten claims."""
        skill, target, line = self.skills[domain], self.targets[domain], self.line
        arms = {"SFT only": ""}
        arms |= {f"lambda {lam:g}": f"{lam:g}*{skill}" for lam in LAMBDAS}
        for kind in ("random", "shuffled"):
            noise = line.control(f"{domain}/{kind}.safetensors", skill, kind, self.seed)
            arms[kind] = f"1*{noise}"
        for other in self.settings.domains:
            if other != domain:
                arms[f"skill of {other}"] = f"1*{self.skills[other]}"
                arms["both skills"] = f"1*{skill}+1*{self.skills[other]}"
        half = self._place(domain) / "skill.safetensors"
        arms["bf16 vector"] = f"1*{half}"
        self._ask(domain, target, arms)
        self._ask(domain, self._place(domain) / "sft_t", {"all in bf16": f"1*{half}"})
        self._ask(domain, self.base, {"base": ""})
        for arm, model in (("SFT on S", self.sources[domain]), ("RL on S", self._trained(domain))):
            self._ask(domain, model, {arm: ""}, "s")

    def add_orders(self, domain: str) -> None:
        """Add what takes a training of its own: other orders, rounds, RL on the target."""
        skill, target, line = self.skills[domain], self.targets[domain], self.line
        injected = line.apply(f"{domain}/base_and_skill", self.base, {skill: 1.0})
        others = {"pre-injection": self._sft(f"{domain}/pre", domain, injected)}
        if domain == DEEP:
            start = self._trained(domain)
            others["sequential"] = self._sft(f"{domain}/sequential", domain, start)
            asked = self._part(domain, "t")["rl"]
            others["RL on the target"] = line.rl(f"{domain}/rl_t", target, self._rl(domain), asked)
        for arm, model in others.items():
            self._ask(domain, model, {arm: ""})
        if domain == DEEP:
            self._ask(domain, target, {"K = 2": f"1*{self._rounds(domain)}"})

    def compare(self) -> None:
        """Add the angles between every update, and between v and its bf16 copies."""
        deltas: list[str | Path] = []
        for domain in self.settings.domains:
            sides = (self.sources[domain], self.targets[domain])
            deltas += [self.skills[domain], *(f"{side}::{self.base}" for side in sides)]
        self.line.orthogonality("angles", deltas, {"control": "random", "figures": True})
        for domain in self.settings.domains:
            copies = [self.skills[domain], self._place(domain) / "skill.safetensors"]
            self.line.orthogonality(f"{domain}/copies/angles", copies, {"control": "random"})

    def add_regimes(self) -> None:
        """Add skills as 16 bits leave them, each at several lambdas on an fp32 and a bf16 target.

        v itself; v of checkpoints saved as bf16; trained in bf16; and at the paper's learning rate
        in fp32 and in bf16.
        """
        domain, line, low = DEEP, self.line, {"learning_rate": LOW_RATE}
        folder = self._place(domain)
        pure = {"dtype": "bfloat16", "bf16": False}
        runs = {
            "trained in bf16": (folder / "sft", pure),
            "low rate, fp32": (self.sources[domain], low),
            "low rate, trained in bf16": (folder / "sft", low | pure),
        }
        for name, (start, changes) in runs.items():
            at = REGIMES[name].rpartition("/")[0]
            asked = self._part(domain, "s")["rl"]
            trained = line.rl(f"{at}/rl", start, self._rl(domain) | changes, asked)
            line.diff(REGIMES[name], trained, start, "grpo")
        skills = {name: line.out / path for name, path in REGIMES.items()}
        for side, (target, rounding) in zip(SIDES, (
            (self.targets[domain], "nearest"),
            (folder / "sft_t", "nearest"),
            (folder / "sft_t", "stochastic"),
        ), strict=True):  # fmt: skip
            arms = {f"{name} lambda {lam:g}": f"{lam:g}*{skill}"
                    for name, skill in skills.items() for lam in REGIME_LAMBDAS}  # fmt: skip
            options = {"rounding": rounding, "limit": self.settings.limit}
            self._ask(f"regimes on {side}", target, {"SFT only": ""} | arms, **options)
        line.orthogonality("regimes/angles", [*skills.values()], {"control": "random"})

    def ask_lengths(self, domain: str) -> None:
        """Ask what v and skills of longer answers add, each in its own form."""
        few = self._rl(domain)["max_completion_length"]
        self._ask(f"thinking {few}", self.targets[domain], _list_shown(self.skills[domain]))
        for tokens in THINKING:
            self._think(domain, tokens)

    def _think(self, domain: str, tokens: int) -> None:
        """Add RL whose answers may take so many tokens, of which the last words count.

        Prompts begin the answer with the subject's name, so that a model may tell what it knows
        before it comes to what was asked for.
        """
        line, at, target = self.line, f"thinking/{tokens}", f"thinking {tokens}"
        settings = self._rl(domain) | {
            "rewards": ["skillvec.recipes.real.reward:ends"],
            "max_completion_length": tokens,
        }
        asked = self._part(domain, "s", "thoughts")["rl"]
        trained = line.rl(f"{at}/rl", self.sources[domain], settings, asked)
        skill = line.diff(f"{at}/skill.safetensors", trained, self.sources[domain], "grpo")
        options = {"kind": "thoughts", "max_new_tokens": tokens}
        self._ask(target, self.targets[domain], _list_shown(skill), **options)
        self._ask(target, trained, {"RL on S": ""}, "s", **options)

    def add_anatomy(self, domain: str) -> None:
        """Add the search for the smallest vector that keeps the gain."""
        questions = self._part(domain, "t")["rl"]
        options = {"target": str(self.targets[domain]), "vector": str(self.skills[domain]),
                   "questions": str(questions), "name": f"{domain}, seed {self.seed}",
                   "max_new_tokens": TOKENS, "seed": self.seed}  # fmt: skip
        self.line.module(f"anatomy/{domain}", "skillvec.recipes.real.anatomy", options)

    def _part(self, domain: str, title: str, kind: str = "questions") -> dict[str, Any]:
        data = self.start / domain
        return {"sft": [data / f"{title}_texts.jsonl"], "rl": data / f"{title}_{kind}.jsonl"}

    def _rl(self, domain: str) -> dict[str, Any]:
        return {**self.settings.rl, **self.settings.answers[domain]}

    def _sft(self, name: str, domain: str, model: Path) -> Path:
        return self.line.sft(name, model, [self.settings.sft], self._part(domain, "t")["sft"])

    def _trained(self, domain: str) -> Path:
        return self.line.out / domain / "round-1" / "rl"

    def _place(self, domain: str) -> Path:
        return self.line.out / domain / HALF

    def _rounds(self, domain: str) -> Path:
        """Add rounds of refinement on parts of S that share the steps of one; return the skill."""
        parts = [self._part(domain, f"s_{k + 1}_of_{ROUNDS}") for k in range(ROUNDS)]
        rl = self._rl(domain)
        shared = [rl | {"max_steps": rl["max_steps"] // ROUNDS}] * ROUNDS
        at = f"{domain}/rounds/"
        return refine(self.line, at, self.base, [self.settings.sft], shared, parts)[0]

    def _ask(
        self,
        target: str,
        model: Path,
        arms: Mapping[str, str],
        title: str = "t",
        *,
        kind: str = "questions",
        **options: Any,
    ) -> None:
        """Ask about the subjects of S or T; `options` are those of recipes/real/ask.py."""
        domain = target if target in DOMAINS else DEEP
        data = self.start / domain
        given: dict[str, Any] = {"model": model, "questions": data / f"{title}_{kind}.jsonl"}
        reads = [*given.values(), *(path for text in arms.values() for path in read_arm(text))]
        given |= {"arms": [f"{arm}={text}" for arm, text in arms.items()], **options}
        probed = [arm for arm in arms if arm in PROBED and target in DOMAINS]
        if probed:
            probes = [data / "t_told.jsonl", self.start / "known.jsonl", self.start / "said.jsonl"]
            given |= {"probed": probed, "probes": probes, "reference": self.base}
            reads += [*probes, self.base]
        name = f"scores/{flat(target)}/{flat(next(iter(arms)))}"
        words = ("skillvec.recipes.real.ask", "--output", self.line.out / name, *flags(given))
        folder = self.line.add(name, words, reads)
        for arm in arms:
            self.line.scores[target, arm] = folder / f"{arm}.json"
            if arm in probed:
                self.line.scores[f"{target} probe", arm] = folder / f"{arm}.probe.json"


def _list_shown(skill: Path) -> dict[str, str]:
    """Return the arms of a length of answers."""
    return {"SFT only": "", "lambda 0.5": f"0.5*{skill}", "lambda 1": f"1*{skill}"}
