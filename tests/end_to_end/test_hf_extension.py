"""`hf skillvec`: what wheels/hf-skillvec holds, as huggingface_hub's own command runs it."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub.cli import extensions
from test_wheel import ROOT, build

import skillvec

EXTENSION = ROOT / "wheels" / "hf-skillvec"
PROJECT = tomllib.loads((EXTENSION / "pyproject.toml").read_text())["project"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A home folder in which hf finds the extension, run by this Python."""
    folder = tmp_path / ".local/share/hf/extensions/hf-skillvec"
    program = folder / "hf-skillvec"
    manifest = extensions.ExtensionManifest(
        owner="org", repo="hf-skillvec", repo_id="org/hf-skillvec", short_name="skillvec",
        executable_path=str(program), type="python", installed_at=datetime.now(UTC),
        description=PROJECT["description"],
    )  # fmt: skip
    manifest.save(folder)
    module, _, function = PROJECT["scripts"]["hf-skillvec"].partition(":")
    lines = ["import sys", f"sys.path[:0] = [{str(EXTENSION)!r}, {str(ROOT)!r}]",
             f"from {module} import {function}", f"{function}()"]  # fmt: skip
    program.write_text("\n".join([f"#!{sys.executable}", *lines]))
    program.chmod(0o755)
    return tmp_path


def hf(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


def test_hf_runs_every_verb_under_its_name_and_passes_the_exit_code_on(
    installed: Path, family: Any
) -> None:
    models = (str(family.tuned), str(family.base))
    done = hf(installed, "skillvec", "diff", *models, "-o", "v.safetensors")
    assert done.returncode == 0, done.stderr
    done = hf(installed, "skillvec", "verify", "v.safetensors", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)
    done = hf(installed, "skillvec", "apply", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: hf skillvec apply [OPTIONS]")
    done = hf(installed, "skillvec", "apply", "nowhere", "v.safetensors", "-o", "out")
    assert done.returncode == 2 and "nowhere: no such file or folder" in done.stderr
    assert "skillvec" in hf(installed, "--help").stdout


def test_the_extension_asks_for_this_version_and_its_readme_says_how() -> None:
    assert PROJECT["version"] == skillvec.__version__
    (needed,) = PROJECT["dependencies"]
    assert needed == f"skillvec>={skillvec.__version__.rpartition('.')[0]}"
    commands = re.findall(r"`?(hf extensions \w+)", (EXTENSION / "README.md").read_text())
    known = {f"hf extensions {name.split()[0]}" for name in extensions.extensions_cli.commands}
    assert {*commands} <= known and "hf extensions install" in commands


@pytest.mark.slow
def test_hf_extensions_install_makes_a_command_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for GitHub: no program of that name there, and this folder as its archive."""
    wheel, archive = build(tmp_path), tmp_path / "HEAD.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for path in EXTENSION.iterdir():
            if path.is_file():
                written.write(path, f"hf-skillvec-HEAD/{path.name}")
    asked: list[str] = []

    def github(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        if request.url.path.endswith("/info/refs"):
            return httpx2.Response(200, text=f"{'a' * 40} HEAD\0")
        if request.url.path.endswith("/pyproject.toml"):
            return httpx2.Response(200, text=(EXTENSION / "pyproject.toml").read_text())
        return httpx2.Response(200 if request.method == "HEAD" else 404)

    run = subprocess.run

    def from_here(words: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        source = "https://github.com/org/hf-skillvec/archive/HEAD.zip"
        here = [str(archive) if word == source else word for word in words]
        return run([*here, str(wheel)] if source in words else here, **options)

    monkeypatch.setattr(subprocess, "run", from_here)
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path / "extensions")
    transport = httpx2.MockTransport(github)
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=transport))
    try:
        done = CliRunner().invoke(extensions.extensions_cli, ["install", "org/hf-skillvec"])
    finally:
        huggingface_hub.set_client_factory(httpx2.Client)
    assert done.exit_code == 0, done.output
    assert any(url.endswith("/hf-skillvec") for url in asked)
    manifest = extensions.ExtensionManifest.load(tmp_path / "extensions" / "hf-skillvec")
    assert manifest.type == "python" and manifest.description == PROJECT["description"]
    words = [manifest.executable_path, "--version"]
    said = run(words, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said == f"skillvec, version {skillvec.__version__}\n"
