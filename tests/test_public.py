"""The face of the package: names, help, types; that nothing heavy is imported for it."""

import inspect
import os
import pydoc
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import skillvec as sv

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "support" / "user_program.py"
FUNCTIONS = [name for name in sv.__all__ if name.islower()]
ERRORS = [name for name in sv.__all__ if name.endswith("Error")]
# What mypy does not follow: the types of these packages are in no public signature, and reading
# them takes minutes.
UNFOLLOWED = (
    "torch", "transformers", "ray", "lm_eval", "optuna", "sqlalchemy", "huggingface_hub", "fsspec",
    "rich", "click", "jinja2", "yaml", "scipy", "gguf", "cmaes", "safetensors", "vl_convert",
    "zstandard", "threadpoolctl", "xxhash", "markupsafe",
)  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_dir_lists_the_public_names_and_nothing_else() -> None:
    assert dir(sv) == sorted([*sv.__all__, "__version__"])
    assert len({*sv.__all__}) == len(sv.__all__)
    told = run("import sys, skillvec; print(*dir(skillvec)); print('numpy' in sys.modules)")
    names, has_numpy = told.splitlines()
    assert names.split() == dir(sv) and has_numpy == "False"


def test_help_and_import_star_work_without_the_packages_of_the_callbacks() -> None:
    """They ask for every name, and an error that is no AttributeError would end them."""
    told = run(
        "import sys; sys.modules['transformers'] = None\n"
        "import skillvec\nfrom skillvec import *\nprint(*dir(skillvec))\nprint(diff.__name__)"
    )
    names, found = told.splitlines()
    left = {*sv.__all__, "__version__"} - {*names.split()}
    assert left == {"SkillVectorCallback", "SkillVectorEvaluation"} and found == "diff"


def test_help_of_the_package_begins_with_the_five_calls() -> None:
    page = pydoc.plain(pydoc.render_doc(sv))
    head = page[: page.index("PACKAGE CONTENTS")]
    calls = re.findall(r"sv\.(\w+)\(", head)
    assert calls[:5] == ["diff", "apply", "verify", "orthogonality", "sweep"]
    assert {*calls} <= {*sv.__all__}
    assert max(map(len, head.splitlines())) <= 105  # the text, four in
    for name in ERRORS:
        assert name in head, name
    for name in FUNCTIONS:
        assert re.search(rf"^    {name}\(", page, re.M), name


def shared_options() -> set[str]:
    """Return the options that the help of the package explains, once for all."""
    assert sv.__doc__ is not None
    part = sv.__doc__.partition("Options that many calls share")[2].partition("Whatever is")[0]
    words = re.findall(r"^    (\w+(?:, \w+)*)  ", part, re.M)
    return {name for line in words for name in line.split(", ")}


def test_the_shared_options_are_some_of_several_calls() -> None:
    taken = [{*inspect.signature(getattr(sv, name)).parameters} for name in FUNCTIONS]
    assert shared_options() >= {"include", "exclude", "workers", "force", "watcher"}
    for option in shared_options():
        assert sum(option in names for names in taken) > 1, option


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_of_a_function_explains_every_parameter(name: str) -> None:
    function = getattr(sv, name)
    text = inspect.getdoc(function)
    assert text is not None
    first, _, rest = text.partition("\n")
    assert first.endswith(".") and rest.startswith("\n")
    names = [one for one in inspect.signature(function).parameters if one not in shared_options()]
    assert not [one for one in names if f"`{one}`" not in text]
    assert "Raises " in text or "errors" in text
    for error in re.findall(r"\b\w+Error\b", text):
        assert error in sv.__all__, error


@pytest.mark.parametrize("name", [name for name in sv.__all__ if not name.islower()])
def test_every_class_says_what_it_is(name: str) -> None:
    assert (vars(getattr(sv, name)).get("__doc__") or "").strip().split("\n")[0].endswith(".")


def test_a_program_with_every_public_name_passes_mypy_strict(tmp_path: Path) -> None:
    text = PROGRAM.read_text()
    unused = [name for name in sv.__all__ if not re.search(rf"\bsv\.{name}\b", text)]
    assert not [name for name in unused if not re.search(rf"(?<!\.)\b{name}\b.*[:(,]", text)]
    assert files("skillvec").joinpath("py.typed").is_file()
    config = tmp_path / "mypy.ini"
    packages = ",".join(f"mypy-{name}.*" if i == 0 else f"{name}.*"
                        for i, name in enumerate(UNFOLLOWED))  # fmt: skip
    config.write_text(
        "[mypy]\nstrict = true\npython_version = 3.11\n"
        "[mypy-skillvec.*]\nfollow_imports = silent\n"
        f"[{packages}]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"
        "ignore_missing_imports = true\n"
    )
    cache = ROOT / ".mypy_cache" / "user_program"
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", cache, PROGRAM]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
