"""A report as one HTML page, and its figures as files.

Hides jinja2 and the templates beside this file. The page loads nothing from anywhere, and its own
policy forbids it; without JavaScript only the table of all rows is missing. Labels and tensor names
come from files that strangers wrote: they reach the page as escaped text or as JSON without "<",
never as markup.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from typing import Any, NamedTuple

from skillvec.analysis.charts import draw_svg, rounded
from skillvec.analysis.colours import SHADES, list_styles, look_of
from skillvec.analysis.figures import Figure, draw_figures
from skillvec.errors import needs, printable

LEAST_NBYTES = 25_000  # of a page: its styles, its script and what numbers mean


class Entry(NamedTuple):
    """A number of a page, or the head of a column: what it is called, what it means, its value.

    `anchor` is where the page explains it, "" for a word; `beside` is what to hold it against.
    """

    anchor: str
    title: str
    meaning: str
    value: str
    beside: str = ""


class Chart(NamedTuple):
    """A drawing of a page: its title, what to know of it, and its SVG by the width of the window.

    One width alone, "", is for all windows.
    """

    title: str
    note: str
    drawings: Mapping[str, str]


def check_available() -> None:
    """Raise UsageError where a package that draws the page is missing."""
    with needs("report", "the page"):
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401


def render(
    template: str, report: Mapping[str, Any], names: Mapping[str, str] | None = None, **shown: Any
) -> str:
    """Return a template of this folder as a page: what it shows, and `report` for its script.

    `names` says of short names whose they are, wherever one points at them in a text. Raises
    UsageError where jinja2 or vl_convert are missing.
    """
    check_available()
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup, escape

    def finish(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if plain else value

    def lettered(text: str) -> Markup:
        def name(found: re.Match[str]) -> str:
            whose = (names or {}).get(found[0])
            return (
                f'<abbr title="{escape(printable(whose))}">{found[0]}</abbr>' if whose else found[0]
            )

        return Markup(re.sub(r"\b[A-Z]+\b", name, str(escape(printable(text)))))

    def load(name: str) -> str:
        return files("skillvec.analysis").joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, finalize=finish, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, loader=FunctionLoader(load),
    )  # fmt: skip
    text = json.dumps(rounded(report), separators=(",", ":"), allow_nan=False)
    return environment.get_template(template).render(
        shown,
        report=Markup(text.replace("<", "\\u003c")),
        styles=Markup(list_styles()),
        drawn=Markup,
        lettered=lettered,
        docs=find_docs(),
        shades=SHADES,
    )


def draw_chart(figure: Figure, widths: Mapping[str, int] | None = None) -> Chart:
    """Return a figure for a page, of one small width or of one for each kind of window."""
    title = figure.spec["title"]["text"]
    if widths is None:
        return Chart(title, figure.note, {"": draw_svg(figure.spec, figure.name)})
    drawings = {
        window: draw_svg(figure.spec | {"width": width}, f"{figure.name}-{window}")
        for window, width in widths.items()
    }
    return Chart(title, figure.note, drawings)


def find_docs() -> str:
    """Return the address of the documentation as the installed package states it, "" for none."""
    try:
        stated = metadata("skillvec").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    urls = dict(line.partition(", ")[::2] for line in stated)
    return str(urls.get("Documentation", "")).rstrip("/")


def figures(report: Any) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of every figure of the page, as SVG and as PNG at 2.5 times scale.

    White background. Raises UsageError without vl_convert.
    """
    return draw(draw_figures(report))


def draw(drawn: Iterable[Figure]) -> Iterator[tuple[str, bytes]]:
    """Yield file name and bytes of figures, as `figures` does."""
    check_available()
    import vl_convert

    config = look_of("Helvetica, Arial, sans-serif")
    for name, spec, _ in drawn:
        svg = vl_convert.vegalite_to_svg(rounded(spec), config=config, allowed_base_urls=[])
        yield f"{name}.svg", svg.encode()
        yield f"{name}.png", vl_convert.svg_to_png(svg, scale=2.5)
