"""Wheel and sdist: what is in them, and that they work in an environment that has nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import yaml

import skillvec

ROOT = Path(__file__).parents[2]
WITH_KERNELS = (ROOT / "skillvec/ops/_native.abi3.so").exists()

pytestmark = pytest.mark.slow


def build(folder: Path, **environment: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True, env=os.environ | environment)
    (wheel,) = folder.glob("skillvec-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip builds of this checkout."""
    return build(tmp_path_factory.mktemp("wheel"))


def use(package: Path, folder: Path, base: str = sys.executable) -> str:
    """Install into an empty environment and return what wheels/try_wheel.py prints there."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([base, "-m", "venv", folder], check=True, env=clean)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True, env=clean)
    done = subprocess.run([python, ROOT / "wheels" / "try_wheel.py"], check=True, cwd=folder,
                          stdout=subprocess.PIPE, text=True, env=clean)  # fmt: skip
    return done.stdout


def check_names(wheel: Path, compiled: bool) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {"skillvec/py.typed", "skillvec/analysis/angle_page.html.jinja"} <= {*names}
    assert all(name.startswith("skillvec/") for name in names)
    assert ("skillvec/ops/_native.abi3.so" in names) == compiled
    assert not any(name.endswith((".c", ".h")) for name in names)
    assert wheel.stat().st_size < 2_000_000


def test_a_wheel_with_kernels_works_in_an_empty_environment(wheel: Path, tmp_path: Path):
    kind = "cp311-abi3" if WITH_KERNELS else "py3-none-any"
    assert wheel.name.startswith(f"skillvec-{skillvec.__version__}-{kind}")
    check_names(wheel, WITH_KERNELS)
    assert ("(installed without a C compiler)" in use(wheel, tmp_path / "it")) != WITH_KERNELS


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_the_same_wheel_works_on_every_python(version: str, wheel: Path, tmp_path: Path):
    """With pyenv, PYENV_VERSION=3.11.7:3.12.1:3.13.0 puts several on the path."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    said = use(wheel, tmp_path / "it", python)
    assert re.search(rf"^python +{re.escape(version)}\.", said, re.MULTILINE)
    assert ("(installed without a C compiler)" in said) != WITH_KERNELS


def test_the_sources_make_a_package_that_works(tmp_path: Path):
    """What `make dist` puts beside the wheel, built and installed by pip alone."""
    code = f"import backend; backend.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": str(ROOT / "wheels")})  # fmt: skip
    (sources,) = tmp_path.glob("*.tar.gz")
    assert sources.name == f"skillvec-{skillvec.__version__}.tar.gz"
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "SECURITY.md", "CITATION.cff", "CMakeLists.txt", "wheels/backend.py",
                 "skillvec/ops/native/module.c", "recipes/mini/past.yaml"):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {".git", ".venv", "runs", "dist", "build"}
    assert sources.stat().st_size < 6_000_000
    said = use(sources, tmp_path / "it")
    assert ("(installed without a C compiler)" in said) != WITH_KERNELS


def test_the_pipeline_runs_from_an_installed_package(wheel: Path, tmp_path: Path):
    """From an empty folder, with what the recipes need and without a clone."""
    assert not any("/test_" in name for name in zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "it", with_pip=True)
    python = tmp_path / "it" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, env=environment)
    (site,) = (tmp_path / "it").glob("lib/python*/site-packages")
    # its .pth files do not count there, so skillvec is that of the wheel
    (site / "rest.pth").write_text(str(Path(numpy.__file__).parents[1]))
    here = tmp_path / "empty"
    here.mkdir()

    def call(*words: str) -> str:
        words = (python, "-m", "skillvec.recipes", *words)
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "23 stages" in call("mini", "--dry-run")
    for name in ("mini", "squad", "loogle", "toolbench"):
        shown = yaml.safe_load(call(name, "--show"))
        assert shown["source"] and shown["out"] == f"runs/{name}"
    assert not [*here.iterdir()]
    origin = [python, "-c", "import skillvec.recipes.launch as it; print(it.CONFIGS)"]
    done = subprocess.run(origin, check=True, cwd=here, env=environment, stdout=subprocess.PIPE)
    accelerate = Path(done.stdout.decode().strip())
    assert accelerate.is_relative_to(site) and (accelerate / "fsdp2.yaml").is_file()


def test_without_a_compiler_there_is_a_wheel_that_works(tmp_path: Path):
    wheel = build(tmp_path, CC="false")
    assert wheel.name == f"skillvec-{skillvec.__version__}-py3-none-any.whl"
    check_names(wheel, False)
    assert "kernels       numpy (installed without a C compiler)" in use(wheel, tmp_path / "it")
