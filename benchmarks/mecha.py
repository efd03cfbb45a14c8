"""sd-mecha as the benchmarks call it: its Python API, fp32 arithmetic, bf16 out, its own threads.

It opens single files, so the members are joined before (see contenders.py).

    mecha.py diff TUNED BASE OUT             OUT is a file of differences
    mecha.py apply TARGET DELTA LAM OUT
    mecha.py sum TARGET TUNED BASE OUT       target + (tuned - base), in one recipe

A verb that ends in -fp32 writes fp32.
"""

from __future__ import annotations

import sys

import sd_mecha
import torch


def main(verb: str, first: str, second: str, *rest: str) -> None:
    """Merge by the recipe of a verb; the last argument is the output."""
    verb, _, wide = verb.partition("-")
    space = "delta" if verb == "apply" else "weight"
    one, other = sd_mecha.model(first), sd_mecha.model(second, merge_space=space)
    if verb == "diff":
        recipe, space = sd_mecha.subtract(one, other), "delta"
    elif verb == "sum":
        recipe, space = sd_mecha.add_difference(one, other, sd_mecha.model(rest[0])), "weight"
    else:
        recipe, space = sd_mecha.add_difference(one, other, alpha=float(rest[0])), "weight"
    sd_mecha.merge(
        recipe, merge_dtype=torch.float32, output_dtype=torch.float32 if wide else torch.bfloat16,
        strict_merge_space=space, check_finite_output=False, output=rest[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
