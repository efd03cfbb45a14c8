"""The picture of the rooms, drawn from the imports, and the table of their lines.

    python docs/rooms.py            # writes docs/images/rooms.svg
    python docs/rooms.py --lines    # prints lines by room, as `make check` does

A room is a folder of skillvec/; what it is for is the first line of its __init__.py.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "skillvec"
PICTURE = HERE / "images" / "rooms.svg"
# Top to bottom: a file may import files of its own room and of the rooms below.
ROOMS = (
    "cli", "trials", "verbs", "analysis", "engine", "vectors", "checkpoints", "remote", "files",
    "ops",
)  # fmt: skip
# What everything may import: what can go wrong, what happened, the version.
GROUND = ("report", "errors", "__init__")
CORE = ("ops", "files", "vectors", "engine")
CORE_VERBS = ("_diff", "_apply", "_combine", "_inspect", "_verify")


class Import(NamedTuple):
    """One imported module: by which file, at which line, inside a function or not."""

    by: str  # "engine.plan"
    line: int
    name: str  # "numpy" or "skillvec.ops.codecs"
    inside: bool
    for_types: bool

    @property
    def place(self) -> str:
        return f"skillvec/{self.by.replace('.', '/')}.py:{self.line}: imports {self.name}"

    @property
    def ours(self) -> str | None:
        """The file of this package that is imported, as "ops.codecs"."""
        top, _, rest = self.name.partition(".")
        return (rest or "__init__") if top == "skillvec" else None


def room_of(file: str) -> str:
    """Return "engine" for "engine.plan", and a file's own name where it lies in no folder."""
    return file.partition(".")[0]


def paths() -> dict[str, Path]:
    """Return every file of the package by its name with dots."""
    found = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in found}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(file: str, path: Path) -> Iterator[Import]:
    """Yield every import, with `from skillvec.ops import codecs` as skillvec.ops.codecs."""

    def walk(node: ast.AST, inside: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, inside, for_types)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: relative import"
                module = child.module or ""
                folder = PACKAGE.joinpath(*module.split(".")[1:])
                for alias in child.names if module.startswith("skillvec") else ():
                    known = (folder / f"{alias.name}.py").exists()
                    name = f"{module}.{alias.name}" if known else module
                    yield Import(file, child.lineno, name, inside, for_types)
                if not module.startswith("skillvec"):
                    yield Import(file, child.lineno, module, inside, for_types)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from walk(child, inside or function, for_types or typed)

    yield from walk(parse(path), False, False)


@cache
def every_import() -> list[Import]:
    return [found for file, path in paths().items() for found in imports_of(file, path)]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of files that import each other in a ring (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in sorted(arrows.get(file, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == index[file]:
            ring = stack[stack.index(file) :]
            del stack[stack.index(file) :]
            if len(ring) > 1:
                found.append(sorted(ring))

    for file in sorted(arrows):
        if file not in index:
            visit(file)
    return found


# ---------------------------------------------------------------------------------- lines


@cache
def count_lines(path: Path) -> tuple[int, int]:
    """Return all lines of a source file, and those with code: no blanks, comments, docstrings."""
    text = path.read_text()
    prose: set[int] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                prose |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)  # fmt: skip
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(text.splitlines()), len(code - prose)


def is_core(file: str) -> bool:
    room, _, name = file.partition(".")
    return room in CORE or (room == "verbs" and name in CORE_VERBS)


def lines_by_room() -> list[tuple[str, int, int, int]]:
    """Return (room, files, lines, lines with code), top to bottom, then the core, then all."""
    counts = {file: count_lines(path) for file, path in paths().items()}

    def total(name: str, files: Sequence[str]) -> tuple[str, int, int, int]:
        lines, code = (sum(counts[file][i] for file in files) for i in (0, 1))
        return name, len(files), lines, code

    rows = [total(f"{room}/", [f for f in counts if room_of(f) == room]) for room in ROOMS]
    rows.append(total("core", [f for f in counts if is_core(f)]))
    return [*rows, total("all", list(counts))]


def print_lines() -> None:
    print(f"{'room':14}{'files':>6}{'lines':>8}{'code':>8}")
    for name, files, lines, code in lines_by_room():
        print(f"{name:14}{files:6}{lines:8,}{code:8,}")
    print("core: ops, files, vectors, engine and the verbs diff, apply, combine, inspect, verify")
    print("code: lines that are not blank, comment or docstring")


# ---------------------------------------------------------------------------------- picture

WIDTH, LEFT, BAND = 1000, 20, 800  # of the picture; a room's left edge and its width
STYLE = """
svg { background: #fff; font: 13px Helvetica, Arial, sans-serif; fill: #222 }
.room { fill: #f4f6f9; stroke: #c3cad5 } .name { font-weight: 700; font-size: 16px }
.question { fill: #556 } .file { fill: #fff; stroke: #d7dce4 } .label { font-size: 12px }
.arrow { fill: none; stroke: #2a6fb0; stroke-width: 1.5; opacity: .55 }
"""


def draw() -> str:
    """Return the picture as SVG: a band a room with its files, an arc for imports across rooms."""
    files: dict[str, list[str]] = {room: [] for room in ROOMS}
    for file in paths():
        room, _, rest = file.partition(".")
        if room in files and not rest.endswith("__init__"):
            files[room].append(rest.replace(".", "/"))
    parts, middle, top = [], {}, 20
    for room in ROOMS:
        chips, height = _chips(files[room], top + 42)
        parts += [
            f'<rect class="room" x="{LEFT}" y="{top}" width="{BAND}" height="{height + 52}"'
            ' rx="8"/>',
            f'<text class="name" x="{LEFT + 14}" y="{top + 26}">{room}/</text>',
            f'<text class="question" x="{LEFT + 130}" y="{top + 26}">'
            f"{escape(_question(room))}</text>",
            *chips,
        ]
        middle[room] = top + (height + 52) // 2
        top += height + 52 + 14
    arcs = "\n".join(_arcs(middle))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}"'
        f' height="{top}" role="img"><title>The rooms of skillvec and the imports between them'
        "</title>"
    )
    marker = (
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3.5" orient="auto"'
        ' markerUnits="userSpaceOnUse"><path d="M0,0 L7,3.5 L0,7 z" fill="#2a6fb0"/></marker>'
        "</defs>"
    )
    return "\n".join([head, f"<style>{STYLE}</style>", marker, *parts, arcs, "</svg>", ""])


def _question(room: str) -> str:
    doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    return doc.partition("\n")[0]


def _chips(names: Sequence[str], top: int) -> tuple[list[str], int]:
    parts, x, y = [], LEFT + 14, top
    for name in names:
        width = 14 + round(6.6 * len(name))
        if x + width > LEFT + BAND - 14:
            x, y = LEFT + 14, y + 28
        parts.append(f'<rect class="file" x="{x}" y="{y}" width="{width}" height="22" rx="4"/>')
        parts.append(f'<text class="label" x="{x + 7}" y="{y + 15}">{name}</text>')
        x += width + 8
    return parts, y - top + 22


def _arcs(middle: dict[str, int]) -> Iterator[str]:
    pairs = {
        (room_of(found.by), room_of(found.ours))
        for found in every_import()
        if found.ours is not None and not found.for_types
    }
    for above, below in sorted(pairs):
        if above == below or above not in middle or below not in middle:
            continue
        start = middle[above] + 8
        end = middle[below] - 8
        far = LEFT + BAND + 12 + 20 * (ROOMS.index(below) - ROOMS.index(above))
        x = LEFT + BAND + 2
        yield (
            f'<path class="arrow" marker-end="url(#tip)"'
            f' d="M{x},{start} C{far},{start} {far},{end} {x},{end}">'
            f"<title>{above} imports {below}</title></path>"
        )


if __name__ == "__main__":
    if "--lines" in sys.argv[1:]:
        print_lines()
    else:
        PICTURE.write_text(draw(), encoding="utf-8")
