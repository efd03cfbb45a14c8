"""The page of `make reproduce`: a summary of the claims, and each with its evidence."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from skillvec.recipes.mini.claims import CLAIMS, table
from skillvec.recipes.mini.figures import draw
from skillvec.recipes.mini.results import Results
from skillvec.recipes.mini.seed import DOMAINS


def write_page(results: Results, larger: Results | None, seeds: Sequence[int], page: Path) -> None:
    """Write the page, and its figures into images/ beside it."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in draw(results):
        (images / name).write_bytes(content)
    claims = [make(results) for make in CLAIMS]
    summary = table(
        ["", "claim", "the paper", "here", "found"],
        [[str(n), f"[{c.title}](#{n}-{_anchor(c.title)})", c.paper, f"**{c.verdict}**", c.found]
         for n, c in enumerate(claims, 1)],
    )  # fmt: skip
    sections = "\n\n".join(
        f"## {n}. {c.title}\n\n**{c.verdict[0].upper() + c.verdict[1:]}.** The paper: {c.paper}."
        f" Here: {c.found}.\n\n{c.evidence}"
        for n, c in enumerate(claims, 1)
    )
    template = Path(__file__).with_name("page.txt").read_text(encoding="utf-8")
    text = template.format(
        count=len(seeds), seeds=", ".join(map(str, seeds)), machine=platform.machine(),
        torch=version("torch").partition("+")[0], transformers=version("transformers"),
        trl=version("trl"), summary=summary, sections=sections, larger=_larger(larger),
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


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
