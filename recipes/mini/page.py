"""The page of `make reproduce`: verdicts in a table, the rules, each claim's evidence."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from skillvec.recipes.claims.claims import table
from skillvec.recipes.claims.figures import render, specs
from skillvec.recipes.claims.results import Results
from skillvec.recipes.claims.rules import ALPHA, COSINE, FORGETTING, MARGIN, least_seeds
from skillvec.recipes.claims.sections import judge_claims, section, summary
from skillvec.recipes.mini.claims import CLAIMS, what_carries
from skillvec.recipes.mini.seed import BITS, DOMAINS, PROBED, TWICE

ARMS = ("base", "SFT only", "random", "shuffled", "lambda -1", "lambda 1", "K = 2",
        f"K = 1, {TWICE}", f"K = 2, {TWICE}", "pre-injection", "sequential", "bf16 vector",
        *(f"bits {bits}" for bits in BITS), "layers", "embeddings", "rank 4", "rank 1",
        "residual", "RL on the target")  # fmt: skip


def write_page(results: Results, larger: Results | None, seeds: Sequence[int], page: Path) -> None:
    """Write the page, and its figures into images/ beside it."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in render(specs(results, ARMS, PROBED)):
        (images / name).write_bytes(content)
    judged = judge_claims([make(results) for make in CLAIMS])
    parts = sum(len(verdicts) for _, verdicts in judged.values())
    template = Path(__file__).with_name("page.txt").read_text(encoding="utf-8")
    text = template.format(
        count=len(seeds), seeds=", ".join(map(str, seeds)), machine=platform.machine(),
        torch=version("torch").partition("+")[0], transformers=version("transformers"),
        trl=version("trl"), margin=MARGIN, forgetting=FORGETTING, cosine=COSINE, alpha=ALPHA,
        parts=parts, least=least_seeds(parts), summary=summary(judged),
        sections="\n\n".join(section(n, *each) for n, each in judged.items()),
        carries=what_carries(results), larger=_larger(larger),
    )  # fmt: skip
    page.write_text(text, encoding="utf-8")


def _larger(results: Results | None) -> str:
    if results is None:
        return (
            "Not run for this page: it needs a GPU."
            " `python -m skillvec.recipes.mini.reproduce --size larger` runs it and adds its"
            " row here."
        )
    rows = [[d, *(results.exact(d, arm).show() for arm in
                  ("SFT only", "lambda 1", "random", "lambda -1", "RL on the target"))]
            for d in DOMAINS]  # fmt: skip
    heads = ["target", "SFT only", "+ v", "+ random", "- v", "RL on the target"]
    return table(heads, rows)
