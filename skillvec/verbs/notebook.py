"""What a notebook shows of an object: a small table, and of what was measured the picture.

A fragment of HTML without script or style sheet, which loads nothing. Its colours are those of the
notebook, light or dark; a picture has its own paper. Names come from files that others wrote: all
text gets into the fragment through `_text`.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import hypot, isfinite
from typing import Any, cast

from skillvec.analysis.angle_report import AngleReport
from skillvec.analysis.figures import Figure, draw_figures, is_map
from skillvec.analysis.report_csv import tell_apart
from skillvec.analysis.wording import Grid, human_bytes, human_count
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.errors import UsageError
from skillvec.ops.names import NO_LAYER, layer_of, natural_order
from skillvec.report import Folded, Report
from skillvec.vectors.displacement import Displacement
from skillvec.vectors.kinds import Stored
from skillvec.verbs.reprs import (
    count_values,
    cut,
    name_vector,
    say_dtypes,
    say_exactness,
    say_some,
)
from skillvec.verbs.sentences import ANSWERS, DONE, TRIALS, say_answer

MOST_ROWS = 24  # of a table
MOST_SVG_NBYTES = 400_000  # of a picture in a notebook; the page has any
MOST_TEXT = 400  # characters of a cell
# what the terminal's last line points to; a notebook has the report itself
OPTIONS = re.compile(r"(; |^)-v (or --json has all|shows every number.*)$", re.DOTALL)
SPOKEN = {*DONE, *ANSWERS, *TRIALS, "orthogonality", "norms", "verify"}  # verbs with sentences
FACE = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5;max-width:60em"
CELL = "padding:2px 12px 2px 0;vertical-align:top;border:0;background:none;color:inherit"
TABLE = "border-collapse:collapse;color:inherit;font-size:inherit"  # some pages' tables inherit not
WORDS, NUMBERS = f"{CELL};text-align:left", f"{CELL};text-align:right;white-space:nowrap"
Rows = Sequence[tuple[str, str]]


def write_html(held: object) -> str:
    """Return the fragment for a vector, a checkpoint, a manifest or a report."""
    for kind, show in KINDS.items():
        if isinstance(held, kind):
            return f'<div style="{FACE}">{show(held)}</div>'
    raise TypeError(f"{type(held).__name__}: no table is known for it")


def _text(said: object, most: int = MOST_TEXT) -> str:
    """Return text as HTML shows it, very long ones without their middle."""
    return escape(cut(said, most))


def _head(said: str) -> str:
    return f'<div style="font-weight:600;margin:4px 0">{_text(said)}</div>'


def _list_rows(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and what they are; those without are left out."""
    lines = [
        f'<tr><th scope="row" style="{WORDS};font-weight:400;opacity:.7">{_text(name)}</th>'
        f'<td style="{WORDS};overflow-wrap:anywhere">{_text(said)}</td></tr>'
        for name, said in rows if said not in (None, "")
    ]  # fmt: skip
    return f'<table style="{TABLE}">{"".join(lines)}</table>'


def _table(grid: Grid) -> str:
    """Return a table of words: the first column is text, all others are numbers but bars."""
    styles = [WORDS if i == 0 or head == grid.bars != "" else NUMBERS
              for i, head in enumerate(grid.heads)]  # fmt: skip
    line = "border-bottom:1px solid rgba(128,128,128,.5);font-weight:600"
    cells = [
        f'<th scope="col" style="{style};{line}">{_text(head)}</th>'
        for head, style in zip(grid.heads, styles, strict=True)
    ]
    rows = ["".join(cells)]
    for row in grid.rows[:MOST_ROWS]:
        cells = [f'<td style="{s}">{_text(one)}</td>' for one, s in zip(row, styles, strict=True)]
        rows.append("".join(cells))
    more = len(grid.rows) - MOST_ROWS
    note = f"<div>… and {more} more rows</div>" if more > 0 else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table style="{TABLE}">{body}</table></div>{note}'


# ------------------------------------------------------------------------------- vectors and models


def _show_vector(vector: Displacement) -> str:
    manifest, entries = vector.manifest, vector.manifest.get("tensors", {})
    numel, training = count_values(vector), manifest["training"]
    norm = abs(vector.scale) * hypot(*(entry["norm"] for entry in entries.values()))
    held = f"{human_count(numel)} in {len(vector.deltas)} tensors"
    if entries:
        changed = sum(entry["changed"] for entry in entries.values())
        held += f", {100 * changed / max(numel, 1):.3g} % changed, norm {norm:.5g}"
    stored = "not stored: computed where it is used"
    if isinstance(vector, Stored):
        codecs = Grid([], [[delta.codec] for delta in vector.stored.deltas.values()])
        kinds = say_some(sorted({codec for (codec,) in codecs.rows}))
        stored = f"{human_bytes(vector.stored.nbytes)} ({kinds}) in {vector.stored.path}"
    rows = [
        ("tuned", _say_side(manifest["tuned"])),
        ("base", _say_side(manifest["base"])),
        ("made of", say_some([cut(part.ref, 80) for part in vector.parts], 6)),
        ("dtypes", vector.dtypes),
        ("values", held if vector.deltas else "those of the model that it meets"),
        ("stored", stored),
        ("restores tuned" if manifest["tuned"] else "kind", say_exactness(vector)),
        ("method", training["method"]),
        ("notes", training["notes"]),
        ("licence", manifest["license"]),
        *(("warning", warning) for warning in vector.list_warnings()[:5]),
    ]
    factor = "" if vector.scale == 1 else f"{vector.scale:g} * "
    head = _head(f"SkillVector {factor}{name_vector(vector)}")
    return head + _list_rows(rows) + _draw_layers(entries, abs(vector.scale))


def _say_side(side: Any) -> str:
    """Return a model of which a vector is the difference."""
    if not side:
        return ""
    revision = side["revision"] or ""
    at = f"@{revision[:12]}" if revision not in side["ref"] else ""
    return f"{side['ref']}{at} ({side['model_type'] or 'no config'}, {'+'.join(side['dtypes'])})"


def _draw_layers(entries: Any, scale: float) -> str:
    """Return norms by layer as bars in the colour of the text; nothing for fewer than two."""
    layers: dict[str, float] = {}
    for name in sorted(entries, key=natural_order):
        layer = layer_of(name) or NO_LAYER
        layers[layer] = hypot(layers.get(layer, 0.0), scale * entries[name]["norm"])
    most = max(layers.values(), default=0.0)
    if len(layers) < 2 or not isfinite(most) or most <= 0:
        return ""
    step = max(3, min(16, 640 // len(layers)))
    bars = []
    for i, (layer, norm) in enumerate(layers.items()):
        high = max(1.0, 48 * norm / most)
        bars.append(
            f'<rect x="{i * step}" y="{48 - high:.1f}" width="{step - 1}" height="{high:.1f}">'
            f"<title>{_text(layer, 80)}: {norm:.4g}</title></rect>"
        )
    highest = max(layers, key=lambda layer: layers[layer])
    caption = f"norm by layer; the largest is that of {cut(highest)}: {most:.4g}"
    return (
        f'<svg role="img" aria-label="{_text(caption)}" width="{step * len(layers)}" height="48"'
        f' fill="currentColor" fill-opacity=".6" style="max-width:100%">{"".join(bars)}</svg>'
        f'<div style="opacity:.7">{_text(caption)}</div>'
    )


def _show_checkpoint(model: Checkpoint) -> str:
    numel = sum(spec.numel for spec in model.values())
    rows = [
        ("model", model.model_type or "no config"),
        ("values", f"{human_count(numel)} in {len(model)} tensors"),
        ("dtypes", say_dtypes(model)),
        ("size", human_bytes(model.nbytes)),
        ("format", model.format),
        *(("note", note) for note in model.facts["notes"]),
    ]
    return _head(f"Checkpoint {cut(model.ref)}") + _list_rows(rows)


def _show_manifest(manifest: Folded) -> str:
    rows = [(key, _fold(value)) for key, value in manifest.items() if value or value == 0]
    return _head("Manifest of a skill vector") + _list_rows(rows)


def _fold(value: object) -> object:
    """Return a value of a dict as a cell shows it: large ones by their number of keys."""
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{len(value)} {'keys' if isinstance(value, dict) else 'items'}"
    return value


# ----------------------------------------------------------------------------------------- reports


def _show_report(report: Report) -> str:
    """Return the sentences of the terminal, then the picture, then the numbers."""
    if report.verb not in SPOKEN:
        rows = [(key, _fold(value)) for key, value in report.facts.items()]
        return _head(f"Report of {report.verb}") + _list_rows(rows)
    said = say_answer(report, False)
    words = [OPTIONS.sub("", one) for one in said if isinstance(one, str)]
    texts = [_say_lines(one) for one in words if one]
    if words != [one for one in said if isinstance(one, str)]:
        texts.append(_say_lines("The report's facts and ledger hold all numbers."))
    tables = [_table(one) for one in said if isinstance(one, Grid)]
    warnings = [_say_lines(f"warning: {one}") for one in report.warnings[:5]]
    head = _head(f"Report of {report.verb}")
    return head + "".join([*texts, _picture(report), *tables, *warnings])


def _say_lines(text: str) -> str:
    """Return a text of the terminal: lines that go on, with two spaces, are joined again."""
    lines = re.sub(r"\n {2,}", " ", text).split("\n")
    return f'<div style="margin:4px 0">{"<br>".join(_text(line, 2000) for line in lines)}</div>'


def _picture(report: Report) -> str:
    """Return the picture as an image, or what is missing to draw it."""
    from skillvec.analysis import page

    figure = find_figure(report)
    if figure is None:
        return ""
    try:
        ((_, drawn), *_) = page.draw([figure])
    except UsageError as error:  # an extra that is not installed
        return f'<div style="opacity:.7">{_text(error)}</div>'
    if len(drawn) > MOST_SVG_NBYTES:
        return '<div style="opacity:.7">the picture is too large for a notebook: output=...</div>'
    code = b64encode(drawn).decode()
    return (
        f'<img alt="{_text(figure.note)}" src="data:image/svg+xml;base64,{code}" style="max-width:'
        '100%;background:#fff;border-radius:6px;padding:4px">'
    )


def find_figure(report: Report) -> Figure | None:
    """Return the first picture of a report: map, curve or history; None where there is none."""
    from skillvec.analysis import search_page, sweep_page

    for key, draw in (("points", sweep_page.curve), ("history", search_page.history)):
        if key in report.facts:
            return draw(report.to_dict())
    if "norms" not in report.facts:
        return None
    content = tell_apart(cast(AngleReport, report.to_dict()))
    return next((figure for figure in draw_figures(content) if is_map(figure)), None)


KINDS: dict[type, Callable[[Any], str]] = {
    Displacement: _show_vector, Checkpoint: _show_checkpoint, Report: _show_report,
    Folded: _show_manifest,
}  # fmt: skip
