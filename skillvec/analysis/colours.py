"""The look of charts and pages: colours for both schemes, and shades for cells of heat maps.

Files of charts are light. On a page charts have the names of its CSS variables instead, so that one
drawing follows the scheme. Categories are those of Okabe and Ito; ramps have one hue a side.
"""

from collections.abc import Sequence
from typing import Any

Two = tuple[str, str]  # a colour in the light and in the dark scheme

COLOURS: dict[str, Two] = {
    "paper": ("#ffffff", "#15171b"), "ink": ("#1c1d1f", "#e6e6e3"), "soft": ("#55585e", "#a9adb5"),
    "line": ("#d9dadd", "#3a3f48"), "band": ("#f5f5f4", "#1d2025"), "warn": ("#8a4b00", "#ffc46b"),
    "warnband": ("#fff6e5", "#2c2415"), "link": ("#0b5394", "#8cc8ff"),
}  # fmt: skip
CATEGORIES = (
    ("#0072b2", "#56b4e9"), ("#d55e00", "#e69f00"), ("#009e73", "#3fc6a0"),
    ("#cc79a7", "#d88fb8"), ("#8a6d00", "#f0e442"), ("#56b4e9", "#ff8552"),
)  # fmt: skip
RAMPS = {  # what is near 0 recedes into the page
    "diverging": ("#0b4a8f #4d93c9 #b3d3e8 #f4f4f2 #f6c3ac #d9694f #9a1026",
                  "#8cc8ff #3f87c9 #244a6b #24272d #74382f #d0604b #ffb09c"),
    "heatmap": ("#eef2f6 #b9d2e8 #6ba4d0 #2a6ca8 #08306b",
                "#1e242c #27486b #3b7cb8 #7fbdf0 #d6ecff"),
}  # fmt: skip
SHADES = {"diverging": 11, "heatmap": 9}  # of a heat map that is a table


def look_of(font: str, on_page: bool = False) -> dict[str, Any]:
    """Return the configuration of charts: light, or `on_page` by the variables of `list_styles`."""
    ink, soft, line = (f"var(--{name})" if on_page else COLOURS[name][0]
                       for name in ("ink", "soft", "line"))  # fmt: skip
    category = [f"var(--c{i})" if on_page else two[0] for i, two in enumerate(CATEGORIES)]
    # Fonts of readers may be wider than the one that the drawing is measured with.
    ramps = {name: two[0].split() for name, two in RAMPS.items()}
    return {
        "background": "transparent" if on_page else COLOURS["paper"][0], "font": font, "padding": 4,
        "aria": False, "range": {"category": category, **ramps},
        "view": {"stroke": None, "continuousWidth": 380, "discreteWidth": 380,
                 "continuousHeight": 180},
        "title": {"anchor": "start", "frame": "group", "fontSize": 13, "fontWeight": 600,
                  "color": ink, "subtitleColor": soft, "subtitleFontSize": 11,
                  "subtitlePadding": 3, "offset": 8},
        "axis": {"labelColor": soft, "titleColor": soft, "labelFontSize": 10, "titleFontSize": 11,
                 "titleFontWeight": "normal", "domainColor": line, "tickColor": line,
                 "gridColor": line, "labelLimit": 220, **({"titlePadding": 12} if on_page else {})},
        "axisDiscrete": {"ticks": False, "domain": False, "labelPadding": 4},
        "axisX": {"grid": False},
        "legend": {"orient": "top", "labelColor": soft, "labelFontSize": 11, "labelLimit": 300,
                   "gradientLength": 200, "gradientThickness": 8, "columns": 1,
                   "symbolType": "square", **({"columnPadding": 30} if on_page else {})},
    }  # fmt: skip


def list_styles() -> str:
    """Return the CSS of colours: variables by name, `.diverging .s0` and so on for shades."""
    named = {f"--{name}": two for name, two in COLOURS.items()}
    named |= {f"--c{i}": two for i, two in enumerate(CATEGORIES)}
    lines = [f"{name}: light-dark({light}, {dark});" for name, (light, dark) in named.items()]
    rules = [f":root {{ color-scheme: light dark; {' '.join(lines)} }}"]
    for ramp, count in SHADES.items():
        for i, (light, dark) in enumerate(zip(*list_shades(ramp, count), strict=True)):
            text = f"light-dark({readable(light)}, {readable(dark)})"
            rules.append(
                f".{ramp} .s{i} {{ background: light-dark({light}, {dark}); color: {text} }}"
            )
    return "\n".join(rules)


def list_shades(ramp: str, count: int) -> tuple[list[str], list[str]]:
    """Return the shades of a ramp from its low end to its high one, light and dark."""
    light, dark = (_divide(ends.split(), count) for ends in RAMPS[ramp])
    return light, dark


def _divide(stops: Sequence[str], count: int) -> list[str]:
    """Return `count` colours evenly along some stops, straight in sRGB."""
    found = []
    for i in range(count):
        at = i * (len(stops) - 1) / (count - 1)
        left = min(int(at), len(stops) - 2)
        low, high = (_channels(stops[left + n]) for n in (0, 1))
        mixed = [round(x + (y - x) * (at - left)) for x, y in zip(low, high, strict=True)]
        found.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return found


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb as WCAG defines it."""
    parts = [channel / 255 for channel in _channels(colour)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def readable(colour: str) -> str:
    """Return black or white, whichever stands out more: 4.5 to 1 or better on any colour."""
    return "#000000" if luminance(colour) > 0.179 else "#ffffff"
