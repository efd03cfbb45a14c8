"""The answer of a report of orthogonality or norms: one plain sentence and the few numbers of it.

Terminal and page begin with it. Vectors have letters, in the order in which they were named; what
is said of a pair in report.json has A and B for its two sides.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from skillvec.analysis.angle_report import PairEntry, Row, VectorEntry
from skillvec.analysis.chance import is_related
from skillvec.analysis.statistics_table import (
    PAIRS,
    SPREAD,
    VECTORS,
    Statistic,
    Table,
    pick,
    select_known,
    select_shown,
    write_number,
    write_numbers,
    write_spread,
)
from skillvec.analysis.wording import human_count
from skillvec.ops.names import NO_LAYER

NORMS = ("norm_a", "norm_b")
ORTHOGONAL, ALIGNED = 0.1, 0.5  # sizes of a cosine: below, and from there on


ZERO, APART, TOO_LARGE = "one is zero", "nothing in common", "squares leave fp64"
UNJUDGED = {ZERO: "a vector is zero", APART: "no weight is changed by both", TOO_LARGE: TOO_LARGE}


class Headline(NamedTuple):
    """One of the few numbers: what it is, its value, and what to hold it against."""

    number: Statistic
    value: str
    beside: str


def letter_of(i: int) -> str:
    """Return A to Z, then AA to ZZ and so on."""
    return (letter_of(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def letter_pairs(count: int) -> list[tuple[str, str]]:
    """Return the letters of all pairs of some vectors, in the order of a report."""
    return list(combinations(map(letter_of, range(count)), 2))


def in_letters(text: str, own: tuple[str, str]) -> str:
    """Return what is said of a pair's sides A and B with the letters of its vectors."""
    return re.sub(r"\b[AB]\b", lambda found: own["AB".index(found[0])], text)


# -------------------------------------------------------------------------------------- sentences


def say_answer(facts: Mapping[str, Any]) -> str:
    """Return what a report of orthogonality or norms says, in one plain sentence."""
    pairs: Sequence[PairEntry] = facts["pairs"]
    if not pairs:
        return _say_vector(facts["norms"][0])
    names = letter_pairs(len(facts["vectors"]))
    if len(pairs) == 1:
        return _say_pair(names[0], pairs[0]["overall"])
    return _say_pairs(names, [pair["overall"] for pair in pairs])


def say_relation(row: Row) -> str:
    """Return in a word or two how the two sides of a pair are related."""
    if why := _why_unjudged(row):
        return "not known" if why == TOO_LARGE else why
    if not is_related(row):
        return "as by chance"
    if abs(row["cosine"]) < ORTHOGONAL:
        return "nearly orthogonal"
    degree = "aligned" if row["cosine"] > 0 else "opposed"
    return degree if abs(row["cosine"]) >= ALIGNED else f"partly {degree}"


def _say_pair(names: tuple[str, str], row: Row) -> str:
    both = " and ".join(names)
    why, cosine = _why_unjudged(row), write_number(row["cosine"], "+.3g")
    if why == ZERO:
        zero = [name for name, key in zip(names, NORMS, strict=True) if row[key] == 0]
        verb = "is" if len(zero) == 1 else "are"
        return f"There is no angle between {both}: {' and '.join(zero)} {verb} zero."
    if why == APART:
        return f"{both} are exactly orthogonal: no weight is changed by both of them."
    if why:
        known = (
            "has no value" if row["cosine"] is None else f"is {cosine}, and nothing can judge it"
        )
        return f"The cosine of {both} {known}: {TOO_LARGE}."
    relation, chance = say_relation(row), f"±{write_spread(row)}"
    if relation == "as by chance" and abs(row["z"]) > SPREAD:
        return (
            f"{both} are not clearly more alike than unrelated updates: their cosine is {cosine},"
            f" where chance alone gives {chance} in 19 of 20 cases."
        )
    said = {
        "as by chance": "are no more alike than unrelated updates",
        "nearly orthogonal": "are nearly orthogonal, but not unrelated",
    }.get(relation, f"are {relation}")
    return f"{both} {said}: their cosine is {cosine}, where chance alone gives {chance}."


def _why_unjudged(row: Row) -> str:
    """Return why chance cannot judge a pair, "" where it can."""
    if None not in (row["cosine"], row["z"]):
        return ""
    if any(row.get(key) == 0 for key in NORMS):
        return ZERO
    return APART if row["cosine"] == 0 and row.get("jaccard") == 0 else TOO_LARGE


def _say_pairs(names: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    related = [(row, own) for own, row in zip(names, rows, strict=True)
               if not _why_unjudged(row) and say_relation(row) != "as by chance"]  # fmt: skip
    whys = [why for row in rows if (why := _why_unjudged(row))]
    reasons = " or ".join(UNJUDGED[why] for why in dict.fromkeys(whys))
    if len(whys) == len(rows):
        return f"None of the {len(rows)} pairs can be judged: {reasons}."
    without = f"; {len(whys)} cannot be judged, as {reasons}" if whys else ""
    if not related:
        return f"None of the {len(rows)} pairs is more alike than unrelated updates{without}."
    related.sort(key=lambda one: -abs(one[0]["cosine"]))
    said = ", ".join(f"{' and '.join(own)} (cosine {write_number(row['cosine'], '+.3g')})"
                     for row, own in related[:3])  # fmt: skip
    more = f" and {len(related) - 3} more" if len(related) > 3 else ""
    few, verb = ("One", "is") if len(related) == 1 else (str(len(related)), "are")
    count = "All" if len(related) == len(rows) else f"{few} of"
    return f"{count} {len(rows)} pairs {verb} related by more than chance: {said}{more}{without}."


def _say_vector(vector: VectorEntry) -> str:
    row = vector["overall"]
    norm, density = write_numbers(row, pick(VECTORS, "norm", "density"))
    count = human_count(row["numel"])
    if row["norm"] == 0:
        return f"A is zero: it changes none of its {count} values."
    said = f"A changes {density} of its {count} values"
    if density == "-":
        said = f"A is an update of {count} values with a norm of {norm}"
    places = [
        max(known, key=lambda row: row["rms"])["name"].removesuffix(".weight")
        for level in (vector["kinds"], vector["layers"])
        if len(known := [r for r in level if r["rms"] and r["name"] != NO_LAYER]) > 1
    ]
    return said + (f", most per value in {' and in '.join(places)}." if places else ".")


# ---------------------------------------------------------------------------------------- numbers


def list_headlines(rows: Sequence[Row], table: Table = PAIRS) -> list[list[Headline]]:
    """Return the few numbers of some pairs, or of vectors with that table; the same of each."""
    known = select_known(select_shown(table, "answer"), rows)
    if any(number.key == "lift_weights" for number in known):
        known = [number for number in known if number.key != "lift"]
    return [
        [Headline(number, value, _beside(row, number.key))
         for number, value in zip(known, write_numbers(row, known), strict=True)]
        for row in rows
    ]  # fmt: skip


def _beside(row: Row, key: str) -> str:
    """Return what a number is held against, "" for nothing."""
    if key == "cosine" and row.get("cosine_sd") is not None:
        return f"chance ±{write_spread(row)}"
    if key == "z" and row.get("p") is not None:
        return f"p {write_numbers(row, pick(PAIRS, 'p'))[0]}"
    if key in ("lift", "lift_weights"):
        return "chance 1"
    if key == "a_in_b" and row.get("in_chance") is not None:
        return f"chance {write_number(row['in_chance'], '%')}"
    return ""
