"""The page of `make reproduce`: verdicts in a table, the rules, each claim's evidence."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from skillvec.recipes.mini.claims import CLAIMS, Claim, table, what_carries
from skillvec.recipes.mini.figures import draw
from skillvec.recipes.mini.results import Results
from skillvec.recipes.mini.rules import (
    ALPHA,
    COSINE,
    FORGETTING,
    MARGIN,
    Verdict,
    judge,
    least_seeds,
    show_p,
)
from skillvec.recipes.mini.seed import DOMAINS


def write_page(results: Results, larger: Results | None, seeds: Sequence[int], page: Path) -> None:
    """Write the page, and its figures into images/ beside it."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in draw(results):
        (images / name).write_bytes(content)
    claims = [make(results) for make in CLAIMS]
    verdicts = iter(judge([part for claim in claims for part in claim.parts]))
    judged = {n: (claim, [next(verdicts) for _ in claim.parts])
              for n, claim in enumerate(claims, 1)}  # fmt: skip
    parts = sum(len(claim.parts) for claim in claims)
    template = Path(__file__).with_name("page.txt").read_text(encoding="utf-8")
    text = template.format(
        count=len(seeds), seeds=", ".join(map(str, seeds)), machine=platform.machine(),
        torch=version("torch").partition("+")[0], transformers=version("transformers"),
        trl=version("trl"), margin=MARGIN, forgetting=FORGETTING, cosine=COSINE, alpha=ALPHA,
        parts=parts, least=least_seeds(parts), summary=_summary(judged),
        sections="\n\n".join(_section(n, *each) for n, each in judged.items()),
        carries=what_carries(results), larger=_larger(larger),
    )  # fmt: skip
    page.write_text(text, encoding="utf-8")


def _summary(judged: dict[int, tuple[Claim, list[Verdict]]]) -> str:
    """Return the table of all verdicts: of a part with several tests the one that decides."""
    rows = []
    for n, (claim, verdicts) in judged.items():
        link = f"[{n}](#{n}-{_anchor(claim.title)})"
        for verdict in verdicts:
            test, count = verdict.part.weakest, len(verdict.part.tests)
            title = f"{claim.title}, {verdict.part.name}".removesuffix(", ")
            rows.append([link, title, f"**{verdict.word}**", test.name,
                         test.spread.show_interval(), show_p(verdict.p_for),
                         show_p(verdict.p_against), _rule(verdict.part.rule, count)])  # fmt: skip
    heads = ["", "claim", "verdict", "the number that decides", "mean [95 % interval]",
             "p, holds", "p, opposite", "rule"]  # fmt: skip
    return table(heads, rows)


def _rule(rule: str, count: int) -> str:
    return rule if count == 1 else f"all {count} {rule}"


def _section(n: int, claim: Claim, verdicts: Sequence[Verdict]) -> str:
    """Return a claim's heading, verdicts, what was found, its tests and its evidence."""
    said = "; ".join(f"{v.word} {v.part.name}" if len(verdicts) > 1 else v.word for v in verdicts)
    rows = [
        [f"{verdict.part.name}; {test.name}".removeprefix("; "), test.spread.show_interval(),
         verdict.part.rule, show_p(test.p_for),
         show_p(min(1.0, min(test.p_against) * len(test.p_against)))]
        for verdict in verdicts
        for test in verdict.part.tests
    ]  # fmt: skip
    tests = table(["test", "mean [95 % interval]", "rule", "its p, holds", "its p, opposite"], rows)
    return (
        f"## {n}. {claim.title}\n\n**{said[0].upper()}{said[1:]}.** The paper: {claim.paper}."
        f" Here: {claim.found}.\n\n{tests}\n\n{claim.evidence}"
    )


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
