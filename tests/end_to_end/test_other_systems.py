"""Where calls of Linux are missing, as on macOS: which they are, and that the bytes are the same.

What each system has is read from typeshed's stubs, which come with mypy.
"""

import ast
import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mypy
import pytest
from click.testing import CliRunner

from skillvec.cli.commands import main
from skillvec.files import output_file

ROOT = Path(__file__).parents[2]
STUBS = Path(mypy.__file__).parent / "typeshed" / "stdlib"
# what skillvec calls and macOS lacks: each has to be done without, and is taken away below
MISSING = [
    "mmap.MADV_HUGEPAGE", "os.POSIX_FADV_DONTNEED", "os.copy_file_range", "os.posix_fadvise",
    "os.posix_fallocate", "os.sched_getaffinity", "os.waitid",  # the last until Python 3.13
]  # fmt: skip
COMMANDS = """
diff tuned base -o v.safetensors
diff sft base -o w.safetensors --codec dense --max-shard-size 20KB
apply target v.safetensors -o out
apply target v.safetensors -o out --lam 0.5 --force
combine v.safetensors w.safetensors --op ties -o c.safetensors
verify v.safetensors
verify out
verify c.safetensors
"""


@cache
def names_on(platform: str, module: str) -> set[str]:
    """Return the names that a module of Python's library has on a platform."""
    known = {"sys": SimpleNamespace(platform=platform, version_info=(3, 11))}
    known |= {"TYPE_CHECKING": False}
    names: set[str] = set()

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                test = compile(ast.Expression(node.test), module, "eval")
                walk(node.body if eval(test, known) else node.orelse)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(target.id for target in targets if isinstance(target, ast.Name))

    stub = STUBS / f"{module}.pyi"
    walk(ast.parse((stub if stub.exists() else STUBS / module / "__init__.pyi").read_text()).body)
    return names


def used_by(path: Path) -> set[tuple[str, str]]:
    """Return the attributes of modules that a source file names, each with its module."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    imports = [node for node in nodes if isinstance(node, ast.Import)]
    modules = {alias.name for node in imports for alias in node.names}
    return {
        (node.value.id, node.attr) for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in modules
    }  # fmt: skip


def test_what_macos_lacks_is_known_and_fsync_stands_in_one_place() -> None:
    sources = [path for folder in ("skillvec", "recipes") for path in (ROOT / folder).rglob("*.py")
               if not path.name.startswith("test_")]  # fmt: skip
    uses = {path: used_by(path) for path in sources}
    used = set().union(*uses.values())
    of_python = {m for m, _ in used if (STUBS / f"{m}.pyi").exists() or (STUBS / m).is_dir()}
    assert {"os", "fcntl", "mmap", "errno", "signal"} <= of_python
    missing = {
        f"{module}.{name}" for module, name in used if module in of_python
        and name in names_on("linux", module) - names_on("darwin", module)
    }  # fmt: skip
    assert sorted(missing) == MISSING
    # macOS needs more than fsync: `put_on_disk` of that file knows
    syncing = {path.name for path, found in uses.items() if ("os", "fsync") in found}
    assert syncing == {"output_file.py"}


def take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see what it would see on macOS: no such calls, no /proc, no renameat2."""
    for name in MISSING:
        module, _, attribute = name.partition(".")
        monkeypatch.delattr(import_module(module), attribute)
    library, opened = ctypes.CDLL, open

    def library_without(name: str | None, *rest: Any, **options: Any) -> Any:
        return SimpleNamespace() if name is None else library(name, *rest, **options)

    def no_proc(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return opened(path, *rest, **options)

    monkeypatch.setattr(ctypes, "CDLL", library_without)
    monkeypatch.setattr(output_file, "open", no_proc, raising=False)


def written(folder: Path) -> dict[str, bytes]:
    """Return what commands have written; of safetensors what is behind the header with its date."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and path.is_file():
            raw = path.read_bytes()
            found[str(path.relative_to(folder))] = raw[8 + int.from_bytes(raw[:8], "little") :]
        elif path.suffix != ".json" and path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_the_same_bytes_are_written_without_the_calls_of_linux(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for system in ("linux", "other"):
        folder = tmp_path / system
        folder.mkdir()
        for name in ("base", "tuned", "sft", "target"):
            (tmp_path / system / name).symlink_to(getattr(family, name))
        with monkeypatch.context() as patch:
            if system == "other":
                take_away(patch)
                assert output_file.available_memory_nbytes() == 8 << 30
            patch.chdir(folder)
            for line in COMMANDS.strip().splitlines():
                done = CliRunner().invoke(main, line.split())
                assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
        for name in ("base", "tuned", "sft", "target"):
            (tmp_path / system / name).unlink()
        assert not list(folder.rglob(".*unfinished*"))
        found.append(written(folder))
    assert {"v.safetensors", "c.safetensors"} < {*found[0]} and len(found[0]) > 6
    assert found[0] == found[1]
