"""Charts as they stand in a page: drawn once, by vl-convert, in the colours of the page.

Hides Vega-Lite. A page needs no script for a chart: it holds the drawing, whose colours are the
page's variables. The drawing is read again and only what draws is kept of it, so that text of
strangers in it stays text. Charts have their title, note and numbers beside them, as HTML.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from math import isfinite
from typing import Any

from skillvec.analysis.colours import look_of
from skillvec.errors import needs

SILENT = ("aria", "class", "font-family", "href", "on", "pointer-events", "role", "{")  # beginnings
DRAWING = {"svg", "g", "path", "rect", "text", "tspan", "line", "circle", "defs", "clipPath"}
WIDTHS = {"desk": 1090, "phone": 290}  # of the one chart of a sweep or a search
SMALL = 290  # width of one of several


def draw_svg(spec: Mapping[str, Any], name: str, width: int = SMALL) -> str:
    """Return the SVG element of a spec for a page, without its title; `name` marks its ids.

    Raises UsageError where vl_convert is missing.
    """
    with needs("report", "the page"):
        import vl_convert

    look = look_of("system-ui, sans-serif", on_page=True)
    look["view"] |= {"continuousWidth": width, "discreteWidth": width}
    bare = {key: value for key, value in spec.items() if key != "title"}
    root = ET.fromstring(vl_convert.vegalite_to_svg(rounded(bare), config=look,
                                                    allowed_base_urls=[]))  # fmt: skip
    return ET.tostring(clean(root, name), encoding="unicode", short_empty_elements=True)


def clean(root: ET.Element, name: str) -> ET.Element:
    """Return a drawing with what draws alone, ids of its own and no namespace."""
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag.rpartition("}")[2] not in DRAWING:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [*element.attrib]:
            value = element.attrib.pop(key)
            if key.startswith(SILENT) or (key, value) == ("opacity", "1"):
                continue
            value = re.sub(r"url\(#(\w+)\)", rf"url(#{name}-\1)", value)
            if key in ("d", "transform"):
                value = re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", value)
            element.set(key, f"{name}-{value}" if key == "id" else value)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("style", f"max-width:{root.get('viewBox', '').split()[2]}px")
    root.set("aria-hidden", "true")
    return root


def rounded(value: Any) -> Any:
    """Return plain data with floats at six digits, and null where JSON has no number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    return value
