"""Completion by the shell: what is completed, by what, and where its script is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from skillvec.cli import main
from skillvec.cli.completion import BEGIN, MARK, SHELLS, find_place
from skillvec.cli.near import OPERATORS


def complete(*words: str) -> dict[str, str]:
    """Return what the last word may become, with its type."""
    of_shell = ShellComplete(main, {}, "skillvec", "_SKILLVEC_COMPLETE")
    found = of_shell.get_completions([*words[:-1]], words[-1])
    return {item.value: item.type for item in found}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, with the files that a user of bash and zsh has."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'")  # without a newline at its end
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------- completing


def test_commands_options_operators_and_codecs_are_completed():
    assert set(complete("")) == {*main.commands}
    assert set(complete("in")) == {"inspect"}
    assert set(complete("help", "ex")) == {"export-patch", "extract-lora"}
    assert {"--lam", "--op", "--json"} <= set(complete("apply", "t", "--"))
    assert set(complete("combine", "a", "--op", "dare")) == {"dare_linear", "dare_ties"}
    assert set(complete("combine", "a", "--op", "")) == {*OPERATORS}
    assert set(complete("diff", "a", "b", "--codec", "")) == {"auto", "dense", "sparse", "packed"}
    assert set(complete("diff", "a", "b", "--dtype", "b")) == {"bf16"}
    assert set(complete("completion", "")) == {*SHELLS}


@pytest.mark.parametrize(
    "words",
    [("diff", "mod"), ("apply", "t", "v"), ("inspect", ""), ("verify", "m", "--base", "mod"),
     ("norms", "v", "--against", "b"), ("combine", "--recipe", "r"), ("diff", "a", "b", "-o", "o"),
     ("sweep", "t", "v", "--scratch", "s"), ("orthogonality", "a", "b"), ("push", "v")],
)  # fmt: skip
def test_the_shell_completes_paths(words: tuple[str, ...]):
    assert complete(*words) == {words[-1]: "file"}


def test_completing_imports_nothing_heavy():
    code = """if True:
        import atexit, sys
        from skillvec.cli import main
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        main(prog_name="skillvec")
    """
    asked = {"_SKILLVEC_COMPLETE": "bash_complete", "COMP_WORDS": "skillvec combine a --op dare",
             "COMP_CWORD": "4"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | asked)  # fmt: skip
    assert not {"torch", "numpy", "rich", "safetensors"} & {*done.stderr.split()}
    assert "skillvec.cli.commands" in done.stderr
    assert done.stdout.split() == ["plain,dare_linear", "plain,dare_ties"]


# -------------------------------------------------------------------------------------- installing


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed_and_nothing_written(shell: str, home: Path):
    before = contents(home)
    printed = run("completion", shell)
    assert printed.exit_code == 0 and "_SKILLVEC_COMPLETE" in printed.stdout
    assert contents(home) == before


def test_the_shell_of_the_user_is_the_default(home: Path, monkeypatch):
    assert "compdef" in run("completion").stdout
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    refused = run("completion", "--install")
    assert refused.exit_code == 2 and "shell 'tcsh': name one" in refused.stderr
    monkeypatch.delenv("SHELL")
    assert "SHELL is not set" in run("completion").stderr
    assert set(contents(home)) == {".bashrc"}


@pytest.mark.parametrize("shell", SHELLS)
def test_installing_says_which_files_it_wrote_and_does_it_once(shell: str, home: Path):
    first = run("completion", shell, "--install")
    assert first.exit_code == 0, first.output
    script, reader = find_place(shell)
    assert f"wrote: {script}" in first.stdout and script.read_text().startswith(MARK)
    if reader is not None:
        assert f"to the end of: {reader}" in first.stdout
        assert reader.read_text().count(BEGIN) == 1 and str(script) in reader.read_text()
    assert "alias ll='ls -l'\n" in (home / ".bashrc").read_text() + "\n"
    written = contents(home)
    again = run("completion", shell, "--install")
    assert contents(home) == written and f"was there already: {script}" in again.stdout
    script.write_text(f"{MARK}\nof an older version\n")
    assert f"wrote: {script}" in run("completion", shell, "--install").stdout
    assert contents(home) == written


@pytest.mark.parametrize("shell", SHELLS)
def test_a_file_of_somebody_else_is_left_alone(shell: str, home: Path):
    script, _ = find_place(shell)
    script.parent.mkdir(parents=True)
    script.write_text("mine")
    before = contents(home)
    refused = run("completion", shell, "--install")
    assert refused.exit_code == 2 and "skillvec did not write it" in refused.stderr
    assert contents(home) == before


def test_a_block_that_was_changed_is_not_written_beside(home: Path):
    (home / ".zshrc").write_text(f"{BEGIN}\nmine\n")
    refused = run("completion", "zsh", "--install")
    assert refused.exit_code == 2 and "remove them" in refused.stderr
    assert (home / ".zshrc").read_text() == f"{BEGIN}\nmine\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_file_in_any_encoding_is_added_to(shell: str, home: Path):
    script, reader = find_place(shell)
    assert reader is not None
    reader.write_bytes(b"# caf\xe9\n")
    for _ in range(2):
        assert run("completion", shell, "--install").exit_code == 0
        assert reader.read_bytes().startswith(b"# caf\xe9\n\n" + BEGIN.encode())
        assert reader.read_bytes().count(BEGIN.encode()) == 1
    script.write_bytes(b"\xff\n")
    assert "skillvec did not write it" in run("completion", shell, "--install").stderr


def test_what_cannot_be_written_is_an_error(home: Path):
    (home / ".local").write_text("a file where a folder should be")
    failed = run("completion", "bash", "--install")
    assert failed.exit_code == 1 and failed.stderr.startswith("error: ")


def test_folders_that_the_user_chose_are_taken(home: Path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("ZDOTDIR", str(home / "z"))
    assert find_place("bash").script == home / "data" / "skillvec" / "completion.bash"
    assert find_place("zsh").reader == home / "z" / ".zshrc"
    assert find_place("fish") == (home / "config" / "fish" / "completions" / "skillvec.fish", None)


def test_bash_completes_with_what_was_installed(home: Path):
    bash = shutil.which("bash")
    if bash is None:
        assert sys.platform == "win32", "bash is part of what this project runs on"
        return
    assert run("completion", "bash", "--install").exit_code == 0
    program = home / "bin" / "skillvec"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:] = {sys.path!r}\n"
                       "from skillvec.cli import main\nmain()\n")  # fmt: skip
    program.chmod(0o755)
    ask = ('. "$HOME/.bashrc"\nCOMP_WORDS=(skillvec combine a --op dare)\nCOMP_CWORD=4\n'
           '_skillvec_completion skillvec\nprintf "%s\\n" "${COMPREPLY[@]}"')  # fmt: skip
    done = subprocess.run(
        [bash, "--norc", "-c", ask], capture_output=True, text=True, timeout=120,
        env={"HOME": str(home), "PATH": f"{program.parent}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.split() == ["dare_linear", "dare_ties"], done.stderr
