"""What 16 bits leave of a skill: a section of docs/real.md, from the files of seeds.

Hides how its numbers lie in these files (recipes/real/results.py). A regime is a way in which the
checkpoints of RL and SFT were trained and saved, planned in recipes/real/seed.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from skillvec.recipes.claims.results import find_pair
from skillvec.recipes.claims.sections import table
from skillvec.recipes.real.results import read_seeds
from skillvec.recipes.real.seed import REGIME_LAMBDAS, REGIMES, SIDES

TEXT = """\
Five skills of {domain}, of the same questions and steps, of {seeds}: v itself; v of the same two
checkpoints saved as bf16; RL whose weights are bf16 all along; and RL at the learning rate of the
paper, in fp32 and in bf16. Bits a weight are those of the vector's file. The cosine and the norm
are against v. The gain is what rounding left of lambda 1 on an fp32 target, and on a bf16 target
with rounding to nearest / stochastic.

{kept}

Exact match on {asked} questions about T, by target and lambda. Lambda 0 is SFT only.

{scores}
"""


def section(files: Sequence[Path]) -> str:
    """Return the section in Markdown; nothing where no seed has its numbers."""
    seeds = [seed for seed in read_seeds(files) if seed["regimes"]]
    if not seeds:
        return ""
    numbers = ", ".join(str(seed["seed"]) for seed in seeds)
    asked = {len(marks) for seed in seeds for side in SIDES for marks in _marks(seed, side)}
    return TEXT.format(
        domain="people",
        seeds=f"seed{'s' * (len(seeds) > 1)} {numbers}",
        kept=_kept(seeds),
        asked=" / ".join(map(str, sorted(asked))),
        scores=_scores(seeds),
    )


def _marks(seed: Mapping[str, Any], side: str) -> list[str]:
    arms = seed["scores"].get(f"regimes on {side}", {}).get("arms", {})
    return [arm["marks"]["exact"] for arm in arms.values()]


def _kept(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what is left of the update itself."""
    rows = []
    for name, stage in REGIMES.items():
        pairs = [_pair(seed, stage) for seed in seeds]
        alone = stage == REGIMES["fp32"]
        bits = [8 * seed["nbytes"][stage] / pair["numel"]
                for seed, pair in zip(seeds, pairs, strict=True)]  # fmt: skip
        changed = [pair["density_a" if alone else "density_b"] for pair in pairs]
        cosines = [1.0 if alone else pair["cosine"] for pair in pairs]
        norms = [pair["norm_a" if alone else "norm_b"] / pair["norm_a"] if pair["norm_a"] else None
                 for pair in pairs]  # fmt: skip
        gains = [_show([_mean(seed, side, f"{name} lambda 1", "realised") for seed in seeds], ".2f")
                 for side in SIDES]  # fmt: skip
        rows.append([name, _show(changed, ".1%"), _show(bits, ".2f"), _show(cosines, ".3f"),
                     _show(norms, ".2f"), f"{gains[0]}, {gains[1]} / {gains[2]}"])  # fmt: skip
    heads = ["skill", "values changed", "bits a weight", "cosine", "norm",
             "gain: fp32, bf16 nearest / stochastic"]  # fmt: skip
    return table(heads, rows)


def _pair(seed: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """Return the numbers of v and another skill; of v itself those beside any other."""
    first, *others = REGIMES.values()
    other = others[0] if stage == first else stage
    found = find_pair(
        seed["regimes"], first.removesuffix(".safetensors"), other.removesuffix(".safetensors")
    )
    row: Mapping[str, Any] = found["overall"]
    return row


def _scores(seeds: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for side in SIDES:
        for name in REGIMES:
            arms = ["SFT only", *(f"{name} lambda {lam:g}" for lam in REGIME_LAMBDAS)]
            cells = [_show([_mean(seed, side, arm, "exact") for seed in seeds], ".3f")
                     for arm in arms]  # fmt: skip
            rows.append([side, name, *cells])
    heads = ["target", "skill", "0", *(f"{lam:g}" for lam in REGIME_LAMBDAS)]
    return table(heads, rows)


def _mean(seed: Mapping[str, Any], side: str, arm: str, metric: str) -> float | None:
    found: float | None = seed["scores"][f"regimes on {side}"]["arms"][arm]["means"][metric]
    return found


def _show(values: Sequence[float | None], form: str) -> str:
    """Return the mean of what there is: a skill that is zero has no angle and no gain."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if known else "-"
