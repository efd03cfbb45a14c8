"""The colours of pages: what stands on a shade can be read, in both schemes."""

import re

import pytest

from skillvec.analysis.colours import (
    COLOURS,
    RAMPS,
    SHADES,
    list_shades,
    list_styles,
    look_of,
    luminance,
    readable,
)


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_luminance_is_that_of_wcag() -> None:
    assert luminance("#ffffff") == pytest.approx(1) and luminance("#000000") == 0
    assert luminance("#ff0000") == pytest.approx(0.2126)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("ramp", SHADES)
def test_numbers_can_be_read_on_every_shade(ramp: str) -> None:
    styles = list_styles()
    for i, shades in enumerate(zip(*list_shades(ramp, SHADES[ramp]), strict=True)):
        rule = re.search(rf"\.{ramp} \.s{i} {{ background: light-dark\((\S+), (\S+)\);"
                         rf" color: light-dark\((\S+), (\S+)\) }}", styles)  # fmt: skip
        assert rule and rule.groups()[:2] == shades
        for shade, text in zip(shades, rule.groups()[2:], strict=True):
            assert contrast(shade, text) >= 4.5 and text == readable(shade)
    assert list_shades(ramp, SHADES[ramp])[0][0] == RAMPS[ramp][0].split()[0]
    assert list_shades(ramp, SHADES[ramp])[1][-1] == RAMPS[ramp][1].split()[-1]


@pytest.mark.parametrize("scheme", [0, 1])
def test_words_can_be_read_on_the_page(scheme: int) -> None:
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "band"):
            assert contrast(COLOURS[text][scheme], COLOURS[ground][scheme]) >= 4.5, (text, ground)
    assert contrast(COLOURS["ink"][scheme], COLOURS["warnband"][scheme]) >= 4.5


def test_charts_of_a_page_follow_its_scheme() -> None:
    on_page, in_file = (str(look_of("x", on_page=is_page)) for is_page in (True, False))
    assert "var(--ink)" in on_page and "'var(--c0)'" in on_page and "var(" not in in_file
    for name in re.findall(r"var\(--(\w+)\)", on_page):
        assert f"--{name}: light-dark(" in list_styles()
