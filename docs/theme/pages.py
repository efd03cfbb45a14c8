"""What the site is made of, a hook of MkDocs: docs/, and whatever a page links outside it.

Pages are written for a reader of the repository: their links are paths in it. Here they become
pages of the site: README.md its front page, other pages outside docs/ pages like those in it, and
sources pages that show their text. So no page stands in two places, and no link leads off the site
because of where a file lies. A link to what is not there is left as it is, and the strict build
refuses it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r'(?<=\]\()[^)\s]+|(?<= src=")[^"]+|(?<= href=")[^"]+')
NAMED = re.compile(r"(?<=\[)[\w-]+\.md(?=\]\(([^)\s]+))")  # a link whose text is the file's name
ITEM = r"([-*+]|\d+\.) "  # of a list
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".sh": "bash", ".yaml": "yaml",
             ".yml": "yaml", ".toml": "toml", ".json": "json", ".jinja": "jinja"}  # fmt: skip
origins: dict[str, str] = {}  # of pages from outside docs/: their paths in the repository


def is_within(path: str) -> bool:
    """Return whether MkDocs itself takes a file into the site: its programs are left out."""
    return path.startswith("docs/") and not path.endswith(".py") and (ROOT / path).is_file()


def place(path: str) -> str:
    """Return where a path of the repository is on the site: `docs/x.md` is `x.md`."""
    folder, _, name = path.rpartition("/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    if path == "README.md":
        return "index.md"
    if is_within(path):
        return path.removeprefix("docs/")
    if not name.endswith(".md"):
        return f"source/{path}.md"
    return path if folder else f"project/{name}"


def find_links(text: str, page: str) -> dict[str, str]:
    """Return the links of a page to what is in the repository, with its path there."""
    found = {}
    for link in LINK.findall(text):
        target = link.partition("#")[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if target and ":" not in target and not path.startswith("../") and (ROOT / path).exists():
            found[link] = path
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, other pages outside docs/, and what any page links, each once."""
    origins.clear()
    outside = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md")]
    unread = [file.relative_to(ROOT).as_posix() for file in outside]
    unread += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(unread)
    while unread:
        path = unread.pop()
        is_page = path.endswith(".md")
        if not is_within(path):
            origins[place(path)] = path
            listed = InclusionLevel.UNDEFINED if is_page else InclusionLevel.NOT_IN_NAV
            text = (ROOT / path).read_text() if is_page else ""
            files.append(File.generated(config, place(path), content=text, inclusion=listed))
        if is_page:
            goals = set(find_links((ROOT / path).read_text(), path).values()) - seen
            seen |= goals
            unread += sorted(goals)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository, and GitHub's dialect of Markdown, into those of the site."""
    here = page.file.src_uri
    origin = origins.get(here, f"docs/{here}")
    if here.startswith("source/"):
        page.meta |= {"title": origin, "search": {"exclude": True}, "hide": ["toc"]}
        return show_source(origin, files)
    goals = find_links(markdown, origin)

    def as_in_nav(match: re.Match[str]) -> str:
        path = goals.get(match[1])
        goal = files.get_file_from_path(place(path)) if path else None
        return str(goal.page.title) if goal and goal.page else match.group()

    def on_site(match: re.Match[str]) -> str:
        link = match.group()
        if link not in goals:
            return link
        goal = posixpath.relpath(place(goals[link]), posixpath.dirname(here) or ".")
        return "".join((goal, *link.partition("#")[1:]))

    return as_python_markdown(LINK.sub(on_site, NAMED.sub(as_in_nav, markdown)))


def as_python_markdown(text: str) -> str:
    """Give a list the blank line before it, and code in a table its bars, as GitHub does."""
    lines: list[str] = []
    fence = begins = ""  # the fence that is open, the first line of a block
    for line in text.splitlines():
        if re.match(r" *```", line):
            fence = "" if fence else line
        elif not fence and line.startswith("|"):
            line = re.sub(r"`[^`]+`", lambda code: code.group().replace("\\|", "|"), line)
        elif not fence and begins and re.match(ITEM, line) and not re.match(" *" + ITEM, begins):
            lines.append("")
            begins = ""
        begins = (begins or line) if line.strip() else ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def show_source(path: str, files: Files) -> str:
    """Return a page with the text of a file, or with what is in a folder."""
    file = ROOT / path
    if file.is_file():
        language, fence = LANGUAGES.get(file.suffix, "text"), "`" * 6
        return f"# `{path}`\n\n{fence}{language}\n{file.read_text()}\n{fence}\n"
    lines = [f"# `{path}/`\n"]
    for inner in sorted(file.iterdir()):
        if inner.name.startswith((".", "__")) or inner.suffix == ".so":
            continue
        goal = place(f"{path}/{inner.name}")
        link = posixpath.relpath(goal, posixpath.dirname(place(path)))
        name = f"[`{inner.name}`]({link})" if files.get_file_from_path(goal) else f"`{inner.name}`"
        said = (
            re.match('"""(.+?)("""|$)', inner.read_text(), re.M) if inner.suffix == ".py" else None
        )
        lines.append(f"- {name}: {said[1]}" if said else f"- {name}")
    return "\n".join(lines) + "\n"
