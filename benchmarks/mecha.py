"""sd-mecha as the benchmark calls it: its Python API, fp32 arithmetic, bf16 out, its own threads.

It opens single files, so the members are joined before (see contenders.py).

    mecha.py diff TUNED BASE OUT             OUT is a file of differences
    mecha.py apply TARGET DELTA LAM OUT
"""

from __future__ import annotations

import sys

import sd_mecha
import torch


def main(verb: str, first: str, second: str, *rest: str) -> None:
    """Merge by the recipe of a verb; the last argument is the output."""
    space = "delta" if verb == "apply" else "weight"
    one, other = sd_mecha.model(first), sd_mecha.model(second, merge_space=space)
    if verb == "diff":
        recipe, space = sd_mecha.subtract(one, other), "delta"
    else:
        recipe, space = sd_mecha.add_difference(one, other, alpha=float(rest[0])), "weight"
    sd_mecha.merge(
        recipe, merge_dtype=torch.float32, output_dtype=torch.bfloat16, strict_merge_space=space,
        check_finite_output=False, output=rest[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
