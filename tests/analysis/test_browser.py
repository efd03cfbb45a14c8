"""The pages in a real Chromium, on a desk and on a phone, in both schemes: what it makes of them.

Slow: needs Chromium on PATH and the extra `browser`; without them it fails and says so.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import Row, fake_report, hostile
from test_sweep_report import HEIGHTS, content, tried

from skillvec.analysis import angle_page, sweep_page

pytestmark = pytest.mark.slow

DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
LAYERS = 20  # 223 tensors: more than the 200 rows that the table shows at first
SERIOUS = {"serious", "critical"}
PAGES = ("orthogonality", "three", "norms", "sweep", "hostile")
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(part =>
  part.getBoundingClientRect().right > innerWidth + 1 &&
  !part.closest(".wide, .board, svg, .unseen")
).map(part => part.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Open Chromium, which may reach nothing."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if (found := next(filter(None, paths), None)) is None:
        pytest.fail("no Chromium on PATH: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail('playwright is missing: pip install "skillvec[browser]"')
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        chromium = playwright.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "orthogonality": angle_page.html(fake_report(LAYERS, ("models/rl::base", "b"))),
        "three": angle_page.html(fake_report(40)),
        "norms": angle_page.html(fake_report(2, ("a",), verb="norms")),
        "sweep": sweep_page.html(content(tried(HEIGHTS, control=["random"], failed=[2.0]))),
        "hostile": angle_page.html(hostile(LAYERS)),
    }
    assert tuple(texts) == PAGES
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


class Visit:
    """A page that is open, with what it complained of and what it asked for."""

    def __init__(self, browser: Any, path: Path, size: Row, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def unfold(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")

    def ground(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")],
                         ids=["desk", "phone"])  # fmt: skip
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_can_be_used_by_everybody(
    name: str, scheme: str, size: Row, browser: Any, files: dict[str, Path]
) -> None:
    """No error, no request, nothing past the window, and no serious finding of axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    with Visit(browser, files[name], size, scheme) as visit:
        assert visit.ground() == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 27)")
        assert visit.page.evaluate(OVERFLOWING) == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        visit.unfold()
        assert visit.page.evaluate(OVERFLOWING) == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        found = Axe().run(visit.page).response
        assert found["passes"]  # it ran
        bad = [(one["impact"], one["id"], one["nodes"][0]["html"][:200])
               for one in found["violations"] if one["impact"] in SERIOUS]  # fmt: skip
        assert bad == []
        assert visit.errors == [] and visit.requests == [files[name].as_uri()]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_answer_and_picture_are_seen_at_once(
    size: Row, browser: Any, files: dict[str, Path]
) -> None:
    with Visit(browser, files["orthogonality"], size) as visit:
        lead, cell, card = (visit.page.locator(css).first.bounding_box()
                            for css in (".lead", ".map td", ".cards > div"))  # fmt: skip
        assert lead["y"] < 120 and lead["y"] < cell["y"] < size["height"] < card["y"] + 400
        assert cell["width"] >= 20 and cell["height"] >= 20  # can be read, and touched
        first, last = (visit.page.locator("#map-cosine-1 tbody tr").nth(i) for i in (0, LAYERS - 1))
        boxes = [one.locator("td").first.bounding_box() for one in (first, last)]
        beside = boxes[1]["x"] > boxes[0]["x"] + 200  # on a desk layers stand beside each other
        assert beside == (size is DESK)
        if beside:
            assert boxes[1]["x"] + boxes[1]["width"] > 0.85 * size["width"]


def test_one_map_is_shown_and_another_can_be_chosen(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["three"], DESK) as visit:
        shown = ".map >> visible=true"
        names = (
            "[...document.querySelectorAll('#picture .heat')].filter(m => !m.hidden).map(m => m.id)"
        )
        assert visit.page.locator(shown).count() == 1
        visit.page.locator("#of").select_option("B and C")
        visit.page.locator("[name=key][value=z]").check()
        assert visit.page.evaluate(names) == ["map-z-3"]


def test_a_cell_says_its_numbers_to_pointer_and_keys(browser: Any, files: dict[str, Path]) -> None:
    row = fake_report(LAYERS, ("models/rl::base", "b"))["pairs"][0]["tensors"][9]
    with Visit(browser, files["orthogonality"], DESK) as visit:
        readout = visit.page.locator("#picture .readout")
        assert "arrow keys" in readout.inner_text()
        line = visit.page.locator(f'#map-cosine-1 tr[data-layer="{row["layer"]}"] td')
        line.nth(9).hover()
        said = readout.inner_text()
        assert row["name"] in said and f"{row['cosine']:.3g}".replace("-", "−") in said
        assert said.startswith(f"A and B, layer {row['layer'].rpartition('.')[2]}, ")
        visit.page.locator("#map-cosine-1 .board").first.focus()
        visit.page.keyboard.press("ArrowRight")  # layers stand side by side here
        assert row["name"].replace("layers.0", "layers.1") in readout.inner_text()
        visit.page.keyboard.press("ArrowUp")
        assert "layers.1.self_attn.q_norm" in readout.inner_text()
        assert readout.get_attribute("aria-live") == "polite"
        assert visit.errors == []


def test_a_term_leads_to_what_it_means(browser: Any, files: dict[str, Path]) -> None:
    with Visit(browser, files["orthogonality"], PHONE) as visit:
        meaning = visit.page.locator("#pair-cosine")
        assert not meaning.is_visible()
        term = visit.page.locator(".cards a.term").first
        term.focus()
        bubble = "getComputedStyle(document.activeElement, '::after').content"
        visit.page.keyboard.press("Shift+Tab")
        visit.page.keyboard.press("Tab")  # as a keyboard comes to it
        assert "How far two updates point the same way" in visit.page.evaluate(bubble)
        visit.page.keyboard.press("Enter")
        meaning.wait_for(state="visible")


def test_the_scheme_is_the_systems_until_the_reader_chooses(
    browser: Any, files: dict[str, Path]
) -> None:
    with Visit(browser, files["sweep"], PHONE, "dark") as visit:
        axis = "getComputedStyle(document.querySelector('.chart.phone svg text')).fill"
        dark = visit.page.evaluate(axis)
        visit.page.get_by_role("button", name="Light").click()
        assert visit.ground() == "rgb(255, 255, 255)" and visit.page.evaluate(axis) != dark
        visit.page.reload()
        assert visit.ground() == "rgb(255, 255, 255)"  # it is remembered


def test_rows_are_sorted_and_filtered(browser: Any, files: dict[str, Path]) -> None:
    rows = hostile(LAYERS)["pairs"][0]["tensors"]
    with Visit(browser, files["hostile"], DESK) as visit:
        visit.unfold()
        names = (
            "[...document.querySelectorAll('#rows tbody tr')].map(row => row.cells[0].textContent)"
        )
        counts = {}
        for level in ("modules", "kinds", "layers", "tensors"):
            visit.page.locator("#level").select_option(level)
            counts[level] = len(visit.page.evaluate(names))
        assert counts == {"modules": 7, "kinds": 17, "layers": LAYERS + 1, "tensors": 200}
        head = visit.page.locator("#rows th").filter(has_text="cosine").first
        known = sorted((r for r in rows if r["cosine"] is not None), key=lambda r: r["cosine"])
        for order, way in ((known, "ascending"), (known[::-1], "descending")):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == way
            assert visit.page.evaluate(names)[:100] == [row["name"] for row in order[:100]]
        visit.page.evaluate("document.querySelector('.rows').scrollTop = 1e6")
        visit.page.locator("#rows tbody tr").nth(200).wait_for(state="attached")
        visit.page.locator("#filter").fill("Layers.1.MLP")
        visit.page.locator("#rows tbody tr").nth(3).wait_for(state="detached")
        assert visit.page.locator("#rows tbody tr").count() == 3
        visit.page.locator("#source").select_option("A")
        visit.page.locator("#filter").fill("")
        heads = visit.page.locator("#rows thead th").all_inner_texts()
        assert "density" in heads and "cosine" not in heads
        assert visit.page.locator("mark").count() == 0 and visit.errors == []


def test_without_scripts_all_but_the_rows_can_be_read(browser: Any, files: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=DESK)
    page = context.new_page()
    page.goto(files["three"].as_uri())
    assert page.locator("#picture .map >> visible=true").count() == 6  # every pair, cosine and z
    page.locator("#table summary").click()
    assert page.get_by_text("report.csv has the same rows").is_visible()
    assert not page.locator("#source").is_visible()
    context.close()
