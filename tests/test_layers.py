"""Imports point downward only, and heavy packages stay where they belong."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import skillvec

PACKAGE = Path(skillvec.__file__).parent
# Top to bottom: a module may import those behind it in this list, and no other.
ORDER = [
    "__main__", "cli", "display", "training", "publishing", "extraction", "holding", "verbs",
    "cards", "comparison", "provenance", "running", "engine_ray", "streaming", "summary",
    "outputs", "run", "engine", "plan", "jobs", "job", "fitting", "vector", "combining", "kinds",
    "displacement", "adapting", "pairs", "patching", "bridging", "lineage", "rules", "patch",
    "page", "analysis", "subspace", "measures", "vectorfile", "deltas", "manifest", "blocks",
    "checkpoint", "locate", "opened_by", "adapter_folder", "gguffile", "gguf_header", "layouts",
    "conversions", "configs", "dcp", "fsdp", "zero", "parts", "torch_files", "pickles",
    "folder", "opened", "adapters", "experts", "lowrank", "quantised", "unread", "objects", "hub",
    "sources", "merging", "operators", "codecs", "kernels", "staging", "sidefiles", "storage",
    "report", "errors", "__init__",
]  # fmt: skip
# (from, to): checkpoint - checkpoint is a vector, so the operator has to know its result;
# vector.save() is the verb.
UPWARD = {("checkpoint", "vector"), ("vector", "verbs")}
# third-party package -> the only modules that may import it
HOMES = {
    "click": {"cli"},
    "rich": {"display"},
    "numkong": {"kernels"},
    "xxhash": {"kernels", "storage", "staging", "jobs", "vectorfile", "merging"},
    "zstandard": {"codecs"}, "yaml": {"rules"}, "vl_convert": {"page"},
    "jinja2": {"page"}, "markupsafe": {"page"},
    "fsspec": {"objects"}, "ray": {"engine_ray"},
    "numpy": {
        "blocks", "deltas", "job", "jobs", "lineage",
        "kernels", "operators", "codecs", "merging", "engine", "vector", "vectorfile", "analysis",
        "summary", "patch", "measures", "comparison", "subspace", "sources", "quantised",
        "lowrank", "parts", "layouts", "conversions", "extraction",
        "storage", "engine_ray", "gguffile",
    },
    "gguf": {"gguffile"}, "safetensors": {"storage"},
    "torch": set(ORDER), "transformers": set(ORDER), "huggingface_hub": set(ORDER),
    "scipy": set(ORDER),
}  # fmt: skip
# Imported inside functions only: their import costs more than the work on a small model, and
# rich is not wanted by a quiet run.
LAZY = {
    "vl_convert",
    "jinja2",
    "markupsafe",
    "torch",
    "transformers",
    "huggingface_hub",
    "scipy",
    "rich",
    "numkong",
    "ray",
    "fsspec",
    "zstandard",
    "yaml",
    "gguf",
    "safetensors",
}


TRAINING = ("training", "transformers")  # its class has a base there, and no other imports it


class Import:
    """One imported module, with where it stands."""

    def __init__(self, path: Path, line: int, name: str, inside: bool) -> None:
        self.module, self.name, self.inside = path.stem, name, inside
        self.place = f"{path.name}:{line}: imports {name}"
        self.top, _, rest = name.partition(".")
        self.ours = (rest or "__init__") if self.top == "skillvec" else None


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(path: Path) -> Iterator[Import]:
    """Yield every import that can run, with `from skillvec import plan` as skillvec.plan."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, inside)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path.name}:{child.lineno}: relative import"
                if child.module == "skillvec":
                    for alias in child.names:
                        known = (PACKAGE / f"{alias.name}.py").exists()
                        name = f"skillvec.{alias.name}" if known else "skillvec"
                        yield Import(path, child.lineno, name, inside)
                else:
                    yield Import(path, child.lineno, child.module or "", inside)
            elif not for_types_only(child):
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside or function)

    yield from walk(ast.parse(path.read_text(), path.name), False)


EVERY = [found for path in sorted(PACKAGE.glob("*.py")) for found in imports_of(path)]


def test_the_list_of_layers_is_complete():
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py"))
    assert len(EVERY) > 50  # the parser sees imports at all


def test_imports_point_downward_only():
    wrong = [
        found.place
        for found in EVERY
        if found.ours is not None
        and ORDER.index(found.ours) <= ORDER.index(found.module)
        and not (found.inside and (found.module, found.ours) in UPWARD)
    ]
    assert not wrong, "upward imports:\n" + "\n".join(wrong)


def test_exceptions_are_in_use():
    used = {(found.module, found.ours) for found in EVERY}
    assert used >= UPWARD


def test_packages_are_imported_where_they_belong_only():
    wrong = []
    for found in EVERY:
        if found.ours is not None or found.top in sys.stdlib_module_names:
            continue
        if found.top not in HOMES:
            wrong.append(f"{found.place}: not a dependency with a home in this list")
        elif found.module not in HOMES[found.top]:
            wrong.append(f"{found.place}: only {sorted(HOMES[found.top])} may")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_inside_functions_only():
    wrong = [
        found.place
        for found in EVERY
        if found.top in LAZY and not found.inside and (found.module, found.top) != TRAINING
    ]
    assert not wrong, "at module level:\n" + "\n".join(wrong)


def test_mathematics_knows_no_paths_and_no_threads():
    held = ORDER[ORDER.index("measures") : ORDER.index("report")]
    foreign = {"os", "pathlib", "io", "shutil", "tempfile", "concurrent", "multiprocessing"}
    wrong = [
        found.place
        for found in EVERY
        if found.module in held
        and (found.ours not in (None, *held, "errors") or found.top in foreign
             or (found.top == "threading" and found.module != "codecs"))  # its zstd contexts
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)
    assert {found.module for found in EVERY} >= set(held) - {"block"}


def test_the_command_line_imports_verbs_inside_its_commands():
    wrong = [
        found.place
        for found in EVERY
        if found.module in ("cli", "display", "__main__")
        and not found.inside
        and found.ours not in (None, "cli", "display", "report", "errors", "__init__")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["cli", "verbs", "vector", "checkpoint", "storage"])
def test_each_way_in_can_be_imported_first(name: str):
    # A circle of imports shows only when the right module comes first.
    done = subprocess.run([sys.executable, "-c", f"import skillvec.{name}"], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_are_those_that_it_lists():
    for name in skillvec.__all__:
        assert getattr(skillvec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = skillvec.nonsense


@pytest.mark.parametrize(
    "module", ["engine", "blocks", "plan", "job", "jobs", "storage", "staging"]
)
def test_the_core_does_not_know_which_engine_runs_it(module: str):
    words = re.findall(r"\w+", (PACKAGE / f"{module}.py").read_text().lower())
    assert not {"ray", "engine_ray", "cluster"} & set(words)
