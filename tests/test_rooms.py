"""The rooms of the package: imports point downward, and heavy packages stay where they belong."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache

import pytest
import rooms

import skillvec
from skillvec import moved

FILES = rooms.paths()
# third-party package -> the rooms, or the only files, that may import it
HOMES = {
    "click": {"cli"},
    "rich": {"cli"},
    "zstandard": {"ops.codecs"},
    "xxhash": {"ops", "files", "vectors", "engine", "trials.controls"},
    "numpy": {"ops", "files", "checkpoints", "vectors", "engine", "analysis", "verbs",
              "trials"},
    "yaml": {"vectors.recipe", "trials"}, "vl_convert": {"analysis"},
    "jinja2": {"analysis.page"}, "markupsafe": {"analysis.page"},
    "fsspec": {"remote.object_store"}, "huggingface_hub": {"remote", "verbs"},
    "ray": {"engine.ray_cluster"}, "threadpoolctl": {"engine.threads"},
    "gguf": {"checkpoints.gguf"},
    "safetensors": {"files"},
    "torch": {"ops.activations", "ops.device", "ops.svd", "checkpoints", "verbs", "trials"},
    "scipy": {"ops.svd"},
    "transformers": {"checkpoints", "verbs", "trials"},
    "lm_eval": {"trials"}, "optuna": {"trials"}, "cmaes": {"trials"},
    "sqlalchemy": {"trials"},
}  # fmt: skip
# Imported inside functions only: their import costs more than the work on a small model, and
# rich is not wanted by a quiet run.
LAZY = set(HOMES) - {"click", "numpy", "xxhash"}
TRAINING = ("verbs.training", "transformers")  # its class has a base there
# What mathematics does not know: paths, files, threads, other machines.
WORLDLY = {"os", "io", "pathlib", "shutil", "tempfile", "concurrent", "subprocess", "socket",
           "logging"}  # fmt: skip


@cache
def real_imports() -> list[rooms.Import]:
    """Return what is imported not for types alone."""
    return [found for found in rooms.every_import() if not found.for_types]


def test_the_rooms_are_those_of_the_plan():
    here = {rooms.room_of(file) for file in FILES}
    assert here == {*rooms.ROOMS, *rooms.GROUND, "__main__", "moved"}
    assert len(real_imports()) > 50  # the parser sees imports at all


def floor(file: str) -> int:
    order = ("__main__", *rooms.ROOMS, *rooms.GROUND, "moved")
    return order.index(rooms.room_of(file))


def test_imports_point_downward_only():
    wrong = [
        found.place
        for found in real_imports()
        if found.ours and floor(found.ours) < floor(found.by)
    ]
    assert not wrong, "upward imports:\n" + "\n".join(wrong)


def test_no_files_import_each_other_in_a_ring():
    arrows: dict[str, set[str]] = {file: set() for file in FILES}
    for found in real_imports():
        if found.ours:
            arrows[found.by].add(found.ours)
    assert not rooms.circles(arrows)
    arrows["errors"].add("cli.screen")
    assert rooms.circles(arrows)  # one is found


def test_packages_are_imported_where_they_belong_only():
    wrong = []
    for found in real_imports():
        top = found.name.partition(".")[0]
        if found.ours is not None or top in sys.stdlib_module_names:
            continue
        if top not in HOMES:
            wrong.append(f"{found.place}: not a dependency with a home in this list")
        elif not {found.by, rooms.room_of(found.by)} & HOMES[top]:
            wrong.append(f"{found.place}: only {sorted(HOMES[top])} may")
        elif top in LAZY and not found.inside and (found.by, top) != TRAINING:
            wrong.append(f"{found.place}: at module level")
    assert not wrong, "\n".join(wrong)


def test_mathematics_knows_no_paths_and_no_threads():
    wrong = [
        found.place
        for found in real_imports()
        if rooms.room_of(found.by) == "ops"
        and (found.by, found.name) != ("ops.compiled", "os")  # SKILLVEC_KERNELS
        and (found.name.partition(".")[0] in WORLDLY or found.ours == "report")
    ]
    assert not wrong, "\n".join(wrong)
    said = [FILES[f].read_text() for f in FILES if rooms.room_of(f) == "ops"]
    used = {name for text in said for name in re.findall(r"threading\.(\w+)", text)}
    assert used == {"local"}  # zstd's contexts serve one thread each


def test_the_command_line_imports_verbs_inside_its_commands():
    wrong = [
        found.place
        for found in real_imports()
        if rooms.room_of(found.by) in ("cli", "__main__")
        and not found.inside
        and rooms.room_of(found.ours or "cli") not in ("cli", *rooms.GROUND)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["cli", "verbs", "vectors", "checkpoints", "files"])
def test_each_room_can_be_imported_first(room: str):
    # A circle of imports shows only when the right file comes first.
    files = [file for file in FILES if rooms.room_of(file) == room and file != TRAINING[0]]
    names = [f"skillvec.{file}" for file in files]
    code = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_imports_nothing_heavy():
    code = ("import sys, skillvec.cli\n"
            "print(*sorted({name.partition('.')[0] for name in sys.modules}))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {*done.stdout.split()} & (LAZY | {"numpy"})


def test_names_of_the_package_are_those_that_it_lists():
    for name in skillvec.__all__:
        assert getattr(skillvec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = skillvec.nonsense


@pytest.mark.parametrize(
    "file", ["engine.threads", "engine.plan", "vectors.block_reader", "files.staging"]
)
def test_the_core_does_not_know_which_engine_runs_it(file: str):
    words = re.findall(r"\w+", FILES[file].read_text().lower())
    assert not {"ray", "ray_cluster", "cluster"} & set(words)


def prose_of(text: str) -> str:
    """Return the comments and docstrings of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT
        or (token.type == tokenize.STRING and token.string.startswith('"""'))
    )


@cache
def words_of(file: str) -> set[str]:
    return set(re.findall(r"\w+", FILES[file].read_text()))


FOLDERS = {file.rpartition(".")[0] for file in FILES}


def lost_names(prose: str) -> list[str]:
    """Return the names in prose that lead nowhere: skillvec.room.file, file.Name and file.py."""
    lost = []
    for name in re.findall(r"\bskillvec\.([\w.]*\w)", prose):
        public = name.partition(".")[0] in skillvec.__all__ or f"skillvec.{name}" in moved.MODULES
        if not public and not {name, name.rpartition(".")[0]} & {*FILES} and name not in FOLDERS:
            lost.append(f"skillvec.{name}")
    for file, name in re.findall(r"(?<![\w./])([a-z_]+)\.([A-Z]\w+)", prose):
        if not any(name in words_of(f) for f in FILES if file in f.split(".")):
            lost.append(f"{file}.{name}")
    for file in re.findall(r"(?<![\w./])(\w+)\.py\b", prose):
        if not any(f.split(".")[-1] == file for f in FILES):
            lost.append(f"{file}.py")
    return lost


def test_names_in_comments_and_docstrings_lead_somewhere():
    """A file that moves takes along what is said of it elsewhere."""
    wrong = [f"{f}: {name}" for f in FILES for name in lost_names(prose_of(FILES[f].read_text()))]
    assert not wrong, "\n".join(wrong)
    assert lost_names("as in skillvec.pickles, by engine.Nothing of rules.py") == [
        "skillvec.pickles", "engine.Nothing", "rules.py",
    ]  # fmt: skip
    assert not lost_names("skillvec.diff, skillvec.checkpoints.pickles, quantized.FORMATS")


# ---------------------------------------------------------------------------------- sizes


def test_no_file_is_longer_than_a_sitting():
    long = {file: rooms.count_lines(path)[0] for file, path in FILES.items()}
    assert not {file: lines for file, lines in long.items() if lines > 450}


def test_functions_fit_a_screen_and_take_few_arguments():
    wrong = []
    for file, path in FILES.items():
        for node in ast.walk(rooms.parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno >= 80:
                wrong.append(f"{file}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
            count = len(node.args.args) + len(node.args.kwonlyargs)
            if count > 12 and node.name not in skillvec.__all__ and node.name != "save":
                wrong.append(f"{file}.{node.name}: {count} arguments")
    assert not wrong, "\n".join(wrong)


def test_the_core_does_not_grow():
    """A step above what it has: who adds takes something away (docs/log.md, 2026-11-30)."""
    rows = {name: code for name, _, _, code in rooms.lines_by_room()}
    assert 5_000 < rows["core"] <= 10_760


def test_the_picture_is_that_of_the_imports():
    drawn = rooms.PICTURE.read_text(encoding="utf-8")
    assert drawn == rooms.draw(), "run `python docs/rooms.py`"
    for room in rooms.ROOMS:
        assert f">{room}/<" in drawn
