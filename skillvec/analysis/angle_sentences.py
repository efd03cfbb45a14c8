"""What the terminal shows of a report of orthogonality or norms: sentences and tables of words."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import inf
from typing import Any

from skillvec.analysis.angle_report import Levels, PairEntry, Row, VectorEntry
from skillvec.analysis.outputs import say_activations
from skillvec.analysis.statistics_table import (
    PAIR_OUTPUTS,
    PAIR_SUBSPACE,
    PAIRS,
    VECTORS,
    Statistic,
    Table,
    pick,
    select_shown,
    write_numbers,
    write_spread,
)
from skillvec.analysis.wording import Grid, wrap


def say_comparison(facts: Mapping[str, Any], verbose: bool) -> list[str | Grid]:
    """Return one screen: who was compared, every pair, what it means; all levels if verbose."""
    letters = [_letter(i) for i in range(len(facts["vectors"]))]
    pairs: list[PairEntry] = facts["pairs"]
    names = [", ".join(two) for two in combinations(letters, 2)]
    said: list[str | Grid] = []
    for letter, vector in zip(letters, facts["norms"], strict=True):
        line = wrap(f"{letter}\xa0=\xa0{_say_vector(vector)}")
        said.append(line.replace("\xa0", " "))  # a long path stays behind its letter
    left_out = {"null", "lift"} if verbose else set()  # room for names; the report has them all
    left_out |= {"norm_ratio", "sign_agreement"} if facts["control"] else {"control_cosine"}
    by_weight = any(pair["overall"]["lift_weights"] is not None for pair in pairs)
    left_out |= {"lift"} if by_weight else {"lift_weights"}
    inside = {number.key for number in PAIR_SUBSPACE + PAIR_OUTPUTS}
    shown = [n for n in select_shown(PAIRS, "screen") if n.key not in left_out | inside]
    rows = []
    for name, pair in zip(names, pairs, strict=True):
        rows.append([name, *_write_cells(pair["overall"], shown)])
        for level in _levels(pair) if verbose else [pair["kinds"]]:
            if not verbose and (len(pairs) > 1 or len(level) > 14):
                continue
            rows += [[""] * (1 + len(shown))] if verbose else []
            rows += [[_indent(row), *_write_cells(row, shown)] for row in level]
    said.append(Grid(["", *map(_head, shown)], rows))
    parts: list[tuple[str, Table]] = []
    if facts["subspace"]:
        parts.append((f"top {facts['subspace']['k']} singular directions", PAIR_SUBSPACE))
    if facts["activations"]:
        parts.append((f"outputs, {say_activations(facts['activations'])}", PAIR_OUTPUTS))
    for heading, table in parts:
        shown = select_shown(table, "screen")
        rows = [[name, *_write_cells(pair["overall"], shown)]
                for name, pair in zip(names, pairs, strict=True)]  # fmt: skip
        said += [f"\n{wrap(heading)}", Grid(["", *map(_head, shown)], rows)]
    for name, pair in zip(names, pairs, strict=True):
        own = dict(zip("AB", name.split(", "), strict=True))
        sentence = pair["forecast"]["sentence"]
        forecast = re.sub(r"\b[AB]\b", lambda found: own[found[0]], sentence)  # noqa: B023
        said.append(wrap(f"{name}: {pair['sentence']}. {forecast[0].upper()}{forecast[1:]}."))
    return said


def say_norms(facts: Mapping[str, Any], verbose: bool) -> list[str | Grid]:
    """Return norms by kind and layer, with bars of the root mean square of the values."""
    vector: VectorEntry
    (vector,) = facts["norms"]
    shown = select_shown(VECTORS, "screen")
    after = 1 + [number.key for number in shown].index("rms")  # where the bars stand
    rows = []
    levels = _levels(vector) if verbose else _levels(vector)[:-1]
    for name, level in zip(
        ("parts", "modules", "kinds", "layers", "tensors"), levels, strict=False
    ):
        most = max((row["rms"] or 0 for row in level), default=0)
        rows.append([name, *[""] * (1 + len(shown))])
        for row in level:
            filled = round(16 * (row["rms"] or 0) / most) if 0 < most < inf else 0
            cells = write_numbers(row, shown)
            rows.append([_indent(row), *cells[:after], "█" * filled, *cells[after:]])
    titles = [number.title for number in shown]
    heads = ["", *titles[:after], "(rms)", *titles[after:]]
    return [wrap(_say_vector(vector)), Grid(heads, rows, "(rms)")]


def _levels(held: Levels) -> list[Sequence[Row]]:
    return [held["parts"], held["modules"], held["kinds"], held["layers"], held["tensors"]]


def _indent(row: Row) -> str:
    return f"  {row['name'].removesuffix('.weight')}"


def _letter(i: int) -> str:
    """Return A to Z, then AA to ZZ and so on."""
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _say_vector(vector: VectorEntry) -> str:
    """Return label, dtype lineage, norm and density of a vector."""
    row = vector["overall"]
    norm, density, half = write_numbers(row, pick(VECTORS, "norm", "density", "below_half_step"))
    words = f"{vector['label']} ({vector['lineage']}), norm {norm}"
    if row["density"] is not None:
        words += f", {density} changed"
    if row["below_half_step"] is not None:
        words += f", {half} by under half a 16-bit step"
    return words


def _head(number: Statistic) -> str:
    return "chance ±" if number.key == "cosine_sd" else number.title


def _write_cells(row: Row, shown: Table) -> list[str]:
    cells = write_numbers(row, shown)
    return [write_spread(row) if number.key == "cosine_sd" else cell
            for number, cell in zip(shown, cells, strict=True)]  # fmt: skip
