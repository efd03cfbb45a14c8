"""Old import paths of public names."""

import subprocess
import sys
from importlib import import_module

import pytest

import skillvec
from skillvec.moved import MODULES

# where version 0.1 had its public names before modules lay in folders
OLD = {
    "errors": [name for name in skillvec.__all__ if name.endswith("Error")],
    "verbs": ["apply", "combine", "diff", "export_patch", "import_patch", "inspect", "verify"],
    "checkpoint": ["Checkpoint", "open_checkpoint"],
    "comparison": ["norms", "orthogonality"],
    "extraction": ["extract_lora"],
    "publishing": ["pull", "push"],
    "report": ["Report"],
    "training": ["SkillVectorCallback"],
    "vector": ["SkillVector"],
}
NEW = {"Live", "SkillVectorEvaluation", "attach", "search", "sweep"}  # since then


@pytest.mark.parametrize("module", OLD)
def test_public_names_are_found_where_they_were(module: str) -> None:
    for name in OLD[module]:
        found = getattr(import_module(f"skillvec.{module}"), name)
        assert found is getattr(skillvec, name)


def test_every_public_name_has_an_old_path() -> None:
    assert {name for names in OLD.values() for name in names} == set(skillvec.__all__) - NEW
    assert {f"skillvec.{module}" for module in OLD} >= set(MODULES)


def test_old_paths_import_nothing_before_a_name_is_asked_for() -> None:
    code = (
        f"import sys\nfor name in {[*MODULES]!r}: __import__(name)\n"
        "print('numpy' in sys.modules)\n"
        "from skillvec.vector import SkillVector\nprint('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("module", OLD)
def test_a_star_gives_the_public_names_of_an_old_module(module: str) -> None:
    names: dict[str, object] = {}
    exec(f"from skillvec.{module} import *", names)
    assert {name for name in skillvec.__all__ if name in names} >= set(OLD[module])
    assert set(OLD[module]) <= set(dir(import_module(f"skillvec.{module}")))
    if f"skillvec.{module}" in MODULES:
        assert {name for name in names if not name.startswith("__")} == set(OLD[module])


def test_an_old_module_is_no_package() -> None:
    """Otherwise files of the package could be loaded twice, with other error classes."""
    for module in MODULES:
        assert not hasattr(import_module(module), "__path__")
        with pytest.raises(ModuleNotFoundError, match="is not a package"):
            import_module(f"{module}.errors")


def test_a_reload_of_the_package_asks_no_one_twice() -> None:
    code = (
        "import importlib, sys, skillvec\nbefore = len(sys.meta_path)\n"
        "importlib.reload(skillvec)\nprint(len(sys.meta_path) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_modules_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        import_module("skillvec.nonsense")
