"""What the terminal shows of a report of orthogonality or norms: sentences and tables of words."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from skillvec.analysis.angle_answers import (
    in_letters,
    letter_of,
    letter_pairs,
    list_headlines,
    say_answer,
    say_relation,
)
from skillvec.analysis.angle_report import PairEntry, Row, VectorEntry
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

LEVELS = ("parts", "modules", "kinds", "layers", "tensors")


def say_comparison(facts: Mapping[str, Any], verbose: bool) -> list[str | Grid]:
    """Return one screen: the answer, who was compared, the few numbers; all levels if verbose."""
    pairs: list[PairEntry] = facts["pairs"]
    own = letter_pairs(len(facts["vectors"]))
    names = [", ".join(two) for two in own]
    said: list[str | Grid] = [f"{wrap(say_answer(facts))}\n", *_say_legend(facts)]
    said.append(_tabulate(pairs, names, facts) if verbose else _tabulate_few(pairs, names))
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
    for two, name, pair in zip(own, names, pairs, strict=True):
        forecast = in_letters(pair["forecast"]["sentence"], two)
        forecast = f"{forecast[0].upper()}{forecast[1:]}."
        if verbose:
            said.append(wrap(f"{name}: {pair['sentence']}. {forecast}"))
        elif len(pairs) == 1:
            said.append(wrap(forecast))
    return said if verbose else [*said, _say_more(facts)]


def _say_legend(facts: Mapping[str, Any]) -> list[str]:
    """Return whom the letters stand for, a line each."""
    lines = []
    for i, vector in enumerate(facts["norms"]):
        line = wrap(f"{letter_of(i)}\xa0=\xa0{_say_vector(vector)}")
        lines.append(line.replace("\xa0", " "))  # a long path stays behind its letter
    return lines


def _say_more(facts: Mapping[str, Any]) -> str:
    """Return where the other numbers are."""
    page = "" if facts.get("output") else "; -o FOLDER writes a page, a table and report.json"
    return wrap(f"-v shows every number, by module, kind, layer and tensor{page}")


def _tabulate_few(pairs: Sequence[PairEntry], names: Sequence[str]) -> Grid:
    """Return the few numbers of every pair, and whether they are more than chance."""
    overall = [pair["overall"] for pair in pairs]
    rows, titles = [], [""]
    for name, row, found in zip(names, overall, list_headlines(overall), strict=True):
        kept = [one for one in found if one.number not in PAIR_SUBSPACE + PAIR_OUTPUTS]
        if any(one.number.key == "control_cosine" for one in kept):  # room for it
            kept = [one for one in kept if one.number.key != "norm_ratio"]
        values = {one.number.title: one.value for one in kept}
        cells = {"cosine": "-", "chance ±": write_spread(row)} | values
        titles = ["", *cells, "relation"]
        rows.append([name, *cells.values(), say_relation(row)])
    return Grid(titles, rows)


def _tabulate(pairs: Sequence[PairEntry], names: Sequence[str], facts: Mapping[str, Any]) -> Grid:
    """Return every pair with its rows of all levels."""
    left_out = {"null", "lift"}  # room for names; the report has them all
    left_out |= {"norm_ratio", "sign_agreement"} if facts["control"] else {"control_cosine"}
    inside = {number.key for number in PAIR_SUBSPACE + PAIR_OUTPUTS}
    if all(pair["overall"]["lift_weights"] is None for pair in pairs):
        left_out.add("lift_weights")
    shown = [n for n in select_shown(PAIRS, "screen") if n.key not in left_out | inside]
    rows = []
    for name, pair in zip(names, pairs, strict=True):
        rows.append([name, *_write_cells(pair["overall"], shown)])
        for level in _levels(pair):
            rows += [[""] * (1 + len(shown))]
            rows += [[_indent(row), *_write_cells(row, shown)] for row in level]
    return Grid(["", *map(_head, shown)], rows)


def say_norms(facts: Mapping[str, Any], verbose: bool) -> list[str | Grid]:
    """Return the answer and norms by kind, with bars of the root mean square of the values.

    If verbose by part, module, layer and tensor too.
    """
    vector: VectorEntry
    (vector,) = facts["norms"]
    shown = select_shown(VECTORS, "screen")
    after = 1 + [number.key for number in shown].index("rms")  # where the bars stand
    rows = []
    levels = dict(zip(LEVELS, _levels(vector), strict=True))
    for name in LEVELS if verbose else ("kinds",):
        most = max((row["rms"] or 0 for row in levels[name]), default=0)
        rows.append([name, *[""] * (1 + len(shown))])
        for row in levels[name]:
            filled = round(16 * (row["rms"] or 0) / most) if 0 < most < inf else 0
            cells = write_numbers(row, shown)
            rows.append([_indent(row), *cells[:after], "█" * filled, *cells[after:]])
    titles = [number.title for number in shown]
    heads = ["", *titles[:after], "(rms)", *titles[after:]]
    said: list[str | Grid] = [f"{wrap(say_answer(facts))}\n", *_say_legend(facts)]
    said.append(Grid(heads, rows, "(rms)"))
    return said if verbose else [*said, _say_more(facts)]


def _levels(held: Mapping[str, Any]) -> list[Sequence[Row]]:
    return [held[level] for level in LEVELS]


def _indent(row: Row) -> str:
    return f"  {row['name'].removesuffix('.weight')}"


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
