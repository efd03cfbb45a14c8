"""A page as html.parser reads it: in which order it stands, what is folded, tables and headings."""

import itertools
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "link", "img", "hr"}
Attributes = dict[str, str | None]


@dataclass
class Table:
    """A table: its class, its caption, and its rows of (tag, attributes, text)."""

    attributes: Attributes
    caption: str = ""
    rows: list[list[tuple[str, Attributes, str]]] = field(default_factory=list)
    row_attributes: list[Attributes] = field(default_factory=list)


class Parsed(HTMLParser):
    """Tags with their attributes, text outside of scripts, and what scripts and styles hold.

    `shown` is the text that stands unfolded; `ids` are those of elements in their order, with
    whether they are folded; `headings` are (level, text); `folded` are the summaries.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Attributes]] = []
        self.raw: dict[str, str] = {}
        self.text = self.shown = ""
        self.ids: dict[str, bool] = {}
        self.headings: list[tuple[int, str]] = []
        self.folded: list[str] = []
        self.tables: list[Table] = []
        self._open: list[tuple[str, Attributes]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open  # every element is closed

    def _is_in(self, tag: str) -> bool:
        return any(name == tag for name, _ in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.append((tag, held))
        if name := held.get("id"):
            assert name not in self.ids, name
            self.ids[name] = self._is_in("details")
        if tag not in VOID:
            self._open.append((tag, held))
        if tag == "table":
            self.tables.append(Table(held))
        elif tag == "tr":
            self.tables[-1].rows.append([])
            self.tables[-1].row_attributes.append(held)
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].append((tag, held, ""))
        elif tag == "summary":
            self.folded.append("")
        elif tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, (tag, self._open[-1:])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        tag, held = self._open[-1] if self._open else ("", {})
        if tag in ("script", "style"):
            name = held.get("id") or f"{tag} {len(self.raw)}"
            self.raw[name] = self.raw.get(name, "") + data
            return
        self.text += data
        if not self._is_in("details"):
            self.shown += data
        if self._is_in("caption"):
            self.tables[-1].caption += data
        elif self._is_in("td") or self._is_in("th"):
            name, attributes, text = self.tables[-1].rows[-1][-1]
            self.tables[-1].rows[-1][-1] = (name, attributes, text + data)
        if self._is_in("summary"):
            self.folded[-1] += data
        if any(name in ("h1", "h2", "h3", "h4") for name, _ in self._open):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def json(self, name: str) -> Any:
        return json.loads(self.raw[name])

    def find(self, tag: str, **attributes: str) -> list[Attributes]:
        """Return the attributes of elements of a tag that have these among them."""
        return [held for name, held in self.tags
                if name == tag and attributes.items() <= held.items()]  # fmt: skip


def check_structure(page: Parsed) -> None:
    """Check what every page has: the answer, its picture, its numbers, and the rest folded."""
    places = list(page.ids)
    wanted = [name for name in places if name in ("answer", "carried", "more")]
    assert wanted == ["answer", "carried", "more"]
    assert not any(page.ids[name] for name in wanted)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    for table in page.tables:
        assert table.caption.strip(), table
        for row in table.rows:
            assert all(held.get("scope") for tag, held, _ in row if tag == "th"), row
    # what is set apart by a dotted line says what it means, and leads to it in this page
    for held in page.find("a", **{"class": "term"}):
        assert (held["title"] or "").strip() and (held["href"] or "")[1:] in page.ids, held
    for held in page.find("abbr"):
        assert (held["title"] or "").strip()
    for tag, held in page.tags:
        if held.get("role") == "img" or (held.get("tabindex") and tag == "div"):
            assert (held.get("aria-label") or "").strip(), held
    main = page.shown.partition("Everything else")
    assert main[1] and not main[2].strip(), main[2]  # below it all is folded


def check_stands_alone(page: Parsed) -> None:
    """Check that a page loads nothing, from anywhere, and that its own policy forbids it."""
    loads = {"src", "srcset", "action", "data", "poster", "background"}
    assert not [(tag, held) for tag, held in page.tags if loads & held.keys()]
    assert not {"link", "img", "iframe", "base", "object"} & {tag for tag, _ in page.tags}
    assert all((held["href"] or "").startswith("#") for _, held in page.tags if "href" in held)
    style = "".join(text for name, text in page.raw.items() if name.startswith("style"))
    assert "@import" not in style and "url(" not in style
    (policy,) = [held["content"] for _, held in page.tags if held.get("http-equiv")]
    assert policy and "default-src 'none'" in policy
    assert "http" not in policy and "eval" not in policy
