"""The site of the docs: built strictly, whole without a network, true to pages and public names."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from theme import pages

import skillvec

ROOT = Path(__file__).parent.parent
SHOWN = {"li", "td", "th", "tr", "pre", "code", "h1", "h2", "h3", "h4", "strong", "em"}
BLOCKS = {"p", "blockquote", "br"}  # a space, and no more: an item of a list has one or none


class Reader(HTMLParser):
    """What a page shows, what it asks for, and what can be linked in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []  # with marks of what it stands in
        self.asked: list[str] = []  # loaded with the page
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._unread = ""
        self.feed(html)

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in given}
        if "headerlink" in said.get("class", "") or tag in ("script", "style"):
            self._unread = tag
        self.text += [f" <{tag}> " if tag in SHOWN else " "] if tag in BLOCKS | SHOWN else []
        self.ids |= {said["id"]} if "id" in said else set()
        self.asked += [said["src"]] if "src" in said else []
        links = self.asked if tag == "link" and said.get("rel") != "canonical" else self.links
        links += [said["href"]] if "href" in said else []

    def handle_endtag(self, tag: str) -> None:
        if tag == self._unread:
            self._unread = ""

    def handle_data(self, text: str) -> None:
        if not self._unread:
            self.text.append(text)

    @property
    def words(self) -> list[str]:
        return "".join(self.text).split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Reader]:
    """Every page but those of sources, whose few links are MkDocs' own and checked by it."""
    written = [f for f in site.rglob("*.html") if site / "source" not in f.parents]
    return {file: Reader(file.read_text()) for file in written}


def built(site: Path, path: str) -> Path:
    """Return the HTML of a page of the repository."""
    page = site / pages.place(path)
    return page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html")


def test_every_public_name_stands_on_one_page_of_the_api(site: Path, read: dict[Path, Reader]):
    named: list[str] = []
    for page in (ROOT / "docs" / "api").glob("*.md"):
        names = re.findall(r"^::: skillvec\.(\w+)$", page.read_text(), re.MULTILINE)
        shown = read[built(site, f"docs/api/{page.name}")].ids
        assert {f"skillvec.{name}" for name in names} <= shown, page.name
        named += names
    assert sorted(named) == sorted(skillvec.__all__)


def test_what_a_docstring_says_stands_on_the_site(site: Path, read: dict[Path, Reader]):
    names = re.findall(r"^::: skillvec\.(\w+)", (ROOT / "docs/api/functions.md").read_text(), re.M)
    page = " ".join(read[built(site, "docs/api/functions.md")].words)
    assert len(names) > 10
    for name in names:
        said = inspect.cleandoc(getattr(skillvec, name).__doc__)
        assert " ".join(Reader(MarkdownIt().render(said)).words) in page, name


def test_no_page_asks_another_host(site: Path, read: dict[Path, Reader]):
    for file, page in read.items():
        assert page.asked, file
        foreign = [asked for asked in page.asked if urlsplit(asked).netloc]
        assert not foreign, (file, foreign)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//|@import", style.read_text()), style


def test_every_link_and_picture_is_there(site: Path, read: dict[Path, Reader]):
    seen = 0
    for file, page in read.items():
        if file.name == "404.html":  # its links begin at the root of a server
            continue
        for link in page.asked + page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            goal = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert goal.exists(), (file, link)
            if parts.fragment and goal in read:
                assert unquote(parts.fragment) in read[goal].ids, (file, link)
            seen += 1
    assert seen > 1000


PAGES = [f.relative_to(ROOT).as_posix()
         for f in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md"),
                   *ROOT.glob("recipes/*/README.md")]]  # fmt: skip


def with_titles(path: str) -> str:
    """Return a page whose links named after a file are named as in the navigation."""
    listed = re.findall(r"^ +- (.+): (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    titles = {place: title for title, place in listed}

    def titled(match: re.Match[str]) -> str:
        goal = (ROOT / path).parent / match[1].partition("#")[0]
        return f"[{titles[pages.place(goal.resolve().relative_to(ROOT).as_posix())]}]({match[1]})"

    return re.sub(r"\[[\w-]+\.md\]\((\S+?)\)", titled, (ROOT / path).read_text())


def test_a_link_named_after_a_file_has_the_title_of_its_page(site: Path):
    page = built(site, "docs/verbs.md").read_text()
    assert '<a href="cli.html">Command line</a> has every option' in page


@pytest.mark.parametrize("path", PAGES)
def test_a_page_reads_on_the_site_as_in_the_repository(path: str, site: Path):
    """Two dialects of Markdown: lists, tables and code are the same in both."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    (article,) = re.findall(r"<article.*?</article>", built(site, path).read_text(), re.DOTALL)
    here = Reader(markdown.render(with_titles(path))).words
    there = Reader(article).words
    pairs = enumerate(zip(here, there, strict=False))
    first = next((number for number, (a, b) in pairs if a != b), 0)
    about = slice(max(0, first - 5), first + 15)
    assert here == there, f"{' '.join(here[about])}\non the site: {' '.join(there[about])}"


def test_a_link_of_the_repository_becomes_one_of_the_site():
    assert pages.place("README.md") == "index.md"
    assert pages.place("docs/format.md") == "format.md"
    assert pages.place("recipes/README.md") == "recipes/README.md"
    assert pages.place("CHANGELOG.md") == "project/CHANGELOG.md"
    assert pages.place("docs/rooms.py") == "source/docs/rooms.py.md"
    assert pages.place("skillvec/errors.py") == "source/skillvec/errors.py.md"
    assert pages.place("skillvec/ops") == "source/skillvec/ops/index.md"
    found = pages.find_links("[a](../README.md#x) [b](gone.md) [c](https://doi.org) [d](#e)",
                             "docs/format.md")  # fmt: skip
    assert found == {"../README.md#x": "README.md"}  # what is not there is left to the strict build


def test_what_github_reads_as_a_list_is_one_on_the_site():
    assert pages.as_python_markdown("a\n- b\n  c\n- d") == "a\n\n- b\n  c\n- d\n"
    assert pages.as_python_markdown("a\n1. b\n2. c") == "a\n\n1. b\n2. c\n"
    within = "- a\n\n  b\n"
    assert pages.as_python_markdown(f"{within}- c") == f"{within}\n- c\n"
    kept = "```text\na\n- b\n```\n"
    assert pages.as_python_markdown(kept) == kept
    assert pages.as_python_markdown("| `a\\|b` | c \\| d |") == "| `a|b` | c \\| d |\n"
