"""What pages of claims share: the table of all verdicts, and each claim with its tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from skillvec.recipes.claims.claims import Claim, table
from skillvec.recipes.claims.rules import Test, Verdict, judge, show_p

Judged = Mapping[int, tuple[Claim, Sequence[Verdict]]]
# the heads of more columns, and their cells for the tests of a row
More = tuple[Sequence[str], Callable[[Sequence[Test]], Sequence[str]]]
NOTHING: More = ((), lambda tests: ())


def judge_claims(claims: Sequence[Claim]) -> Judged:
    """Return the claims that have something to test by their numbers, with their verdicts.

    Claims are numbered as the paper's, and verdicts are corrected over all parts of all claims.
    """
    verdicts = iter(judge([part for claim in claims for part in claim.parts]))
    return {number: (claim, [next(verdicts) for _ in claim.parts])
            for number, claim in enumerate(claims, 1) if claim.parts}  # fmt: skip


def summary(judged: Judged, more: More = NOTHING) -> str:
    """Return the table of all verdicts: of a part with several tests the one that decides."""
    rows = []
    for n, (claim, verdicts) in judged.items():
        link = f"[{n}](#{n}-{_anchor(claim.title)})"
        for verdict in verdicts:
            test, count = verdict.part.weakest, len(verdict.part.tests)
            title = f"{claim.title}, {verdict.part.name}".removesuffix(", ")
            rows.append([link, title, f"**{verdict.word}**", test.name,
                         test.spread.show_interval(), show_p(verdict.p_for),
                         show_p(verdict.p_against), _rule(verdict.part.rule, count),
                         *more[1](verdict.part.tests)])  # fmt: skip
    heads = ["", "claim", "verdict", "the number that decides", "mean [95 % interval]",
             "p, holds", "p, opposite", "rule", *more[0]]  # fmt: skip
    return table(heads, rows)


def _rule(rule: str, count: int) -> str:
    return rule if count == 1 else f"all {count} {rule}"


def section(
    n: int, claim: Claim, verdicts: Sequence[Verdict], more: More = NOTHING, said: str = ""
) -> str:
    """Return a claim's heading, verdicts, what was found, its tests and its evidence.

    `said` stands in place of the verdicts.
    """
    said = said or "; ".join(
        f"{v.word} {v.part.name}" if len(verdicts) > 1 else v.word for v in verdicts
    )
    rows = [
        [f"{verdict.part.name}; {test.name}".removeprefix("; "), test.spread.show_interval(),
         verdict.part.rule, show_p(test.p_for),
         show_p(min(1.0, min(test.p_against) * len(test.p_against))), *more[1]([test])]
        for verdict in verdicts
        for test in verdict.part.tests
    ]  # fmt: skip
    heads = ["test", "mean [95 % interval]", "rule", "its p, holds", "its p, opposite"]
    tests = table([*heads, *more[0]], rows)
    return (
        f"## {n}. {claim.title}\n\n**{said[0].upper()}{said[1:]}.** The paper: {claim.paper}."
        f" Here: {claim.found}.\n\n{tests}\n\n{claim.evidence}"
    )


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
