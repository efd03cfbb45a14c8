"""The commands of the first pages: each is run, and prints what its page shows.

`python tests/support/console.py` writes into the pages what they print now.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from console import FOLDER, PAGES, Command, commands, run_page, with_outputs

from skillvec.recipes import example_models

EXAMPLE = "python -m skillvec.recipes.example_models"
WROTE = "wrote base, sft_ckpt, rl_ckpt, target_sft and questions.jsonl"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_run_and_print_what_it_shows(page: Path, one_thread: None):
    shown = page.read_text().splitlines()
    assert run_page(page).splitlines() == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_holds_no_command_that_nothing_runs(page: Path):
    blocks = r"^```(console|shell|python)\n.*?^```$"
    rest = re.sub(blocks, "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert "```" not in rest
    indented = re.findall(r"^    (.*)", rest, re.MULTILINE)
    assert all("runs/mini" in line or line in ("make demo",) or "evaluate:mini" in line
               for line in indented)  # fmt: skip


def test_the_light_installation_is_enough_for_the_readme(tmp_path):
    """Without torch and what else the extras bring."""
    assert example_models.main(["--output", str(tmp_path / "w")]) == 0
    texts = [command.text for command in commands(PAGES[0].read_text())]
    lines = [text.removeprefix("skillvec ") for text in texts if text.startswith("skillvec ")]
    assert len(lines) == 4
    script = Path(__file__).parent / "support" / "light_install.py"
    heavy = ("torch", "transformers", "scipy", "jinja2", "vl_convert", "optuna", "trl", "peft")
    done = subprocess.run(
        [sys.executable, script, *heavy],
        input="\n".join(lines), cwd=tmp_path / "w", capture_output=True, text=True, check=True,
    )  # fmt: skip
    results, _, imported = json.loads(done.stdout)
    assert [code for code, _ in results] == [0] * 4, results
    assert imported == []


def test_commands_are_found_in_their_order_with_what_is_shown():
    text = (
        "```shell\nmake demo  # all\n```\n```console\n$ skillvec diff a \\\n    b\nline\n\nlast\n"
        "$ skillvec verify c\n```\n```python\nmake test\n```\n"
    )
    assert commands(text) == [
        Command("make demo  # all", None),
        Command("skillvec diff a      b", ["line", "", "last"]),
        Command("skillvec verify c", []),
    ]


@pytest.mark.parametrize("shown", ["", "what nobody prints\n", f"{WROTE}\nand more\n"])
def test_another_output_is_seen_and_replaced(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = with_outputs(f"Before\n```console\n$ {EXAMPLE} \\\n  -o a\n{shown}```\nbehind\n")
    assert found == f"Before\n```console\n$ {EXAMPLE} \\\n  -o a\n{WROTE}\n```\nbehind\n"
    assert (tmp_path / "a" / "base" / "model.safetensors").is_file()


def test_the_folder_of_this_run_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = with_outputs(f"```console\n$ {EXAMPLE}\n$ skillvec inspect -q base\n```\n")
    assert f"\n{FOLDER}/base\n" in found


def test_an_output_is_cut_where_the_page_cuts_it_and_counts_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_outputs(f"```shell\n{EXAMPLE}\n```\n")
    whole = with_outputs("```console\n$ skillvec inspect base\n```\n").splitlines()[2:-1]
    cut = with_outputs("```console\n$ skillvec inspect base\none\ntwo\n[... 1 more lines]\n```\n")
    assert cut.splitlines()[2:-1] == [*whole[:2], f"[... {len(whole) - 2} more lines]"]


@pytest.mark.parametrize(
    "command",
    ["ls", "make nothing", "pip install skillvec[nothing]", "pip install numpy",
     "skillvec inspect nowhere", f"{EXAMPLE} -o .", "python -m this"],
)  # fmt: skip
def test_a_command_that_fails_or_that_nothing_tries_is_refused(command, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        with_outputs(f"```shell\n{command}\n```\n")
