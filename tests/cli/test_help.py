"""Help that a person asks for, and what is said where one meant something else."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from skillvec.checkpoints import locate
from skillvec.cli import main
from skillvec.cli.group import GROUPS
from skillvec.cli.near import COMMANDS_ALSO, OPERATORS, OPTIONS_ALSO, ask_if, find_near
from skillvec.cli.options import SECTIONS
from skillvec.errors import UsageError
from skillvec.ops.merge_methods import OPERATORS as KNOWN

# words that no command takes: what a reader knows, and what stands in a path or name of a file
KNOWN_WORDS = {"CSV", "GPU", "JSON", "PEFT", "PNG", "RL", "SVD", "SVG", "URL", "YAML"}
KNOWN_WORDS |= {"NAME", "QUESTIONS", "TASK"}


def run(*words: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [*map(str, words)], prog_name="skillvec")


def spelled(*commands: str) -> set[str]:
    params = [option for name in commands for option in main.commands[name].params]
    return {text for option in params for text in option.opts if text.startswith("--")}


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", main.commands)
def test_help_of_a_command_is_what_its_option_shows(command: str):
    asked, shown = run("help", command), run(command, "--help")
    assert asked.exit_code == shown.exit_code == 0
    assert asked.stdout == shown.stdout
    assert asked.stdout.startswith(f"Usage: skillvec {command} ")


def test_help_alone_is_that_of_the_program():
    assert run("help").stdout == run("--help").stdout
    assert "There is no command 'aply'. Did you mean apply" in refused("help", "aply")


@pytest.mark.parametrize("command", main.commands)
def test_a_command_says_in_one_line_what_it_does(command: str):
    """And its options stand once each, in the section that they belong to."""
    short = main.commands[command].get_short_help_str(500)
    assert len(short) <= 61  # one line on a terminal of 80 columns
    assert re.search(rf"^  {command} +{re.escape(short)}$", run("help").stdout, re.MULTILINE)
    text = run("help", command).stdout
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert titles == [title for title in ("Options", *SECTIONS) if title in titles]
    sections = dict(zip(titles, re.split(r"^\w+:$", text, flags=re.MULTILINE)[1:], strict=True))
    listed = {title: re.findall(r"^  (?:-\w, )?--([\w-]+)", body, re.MULTILINE)
              for title, body in sections.items()}  # fmt: skip
    every = [name for names in listed.values() for name in names]
    assert sorted(every) == sorted({text[2:] for text in spelled(command)} | {"help"})
    for title, names in SECTIONS.items():
        assert {*listed.get(title, ())} == {*every} & {*names}


@pytest.mark.parametrize("command", main.commands)
def test_help_of_a_command_speaks_of_what_the_command_takes(command: str):
    """Options are its own; words in capitals are its arguments, or known without them."""
    asked = main.commands[command]
    context = click.Context(asked, info_name=command)
    helps = [asked.help or "", *(getattr(param, "help", None) or "" for param in asked.params)]
    said = " ".join(helps).replace("TUNED::BASE", "")
    assert {*re.findall(r"--\w[\w-]*", said)} <= spelled(command)
    taken = " ".join(param.make_metavar(context) for param in asked.params)
    words = {*re.findall(r"\b[A-Z]{2,}\b", said)} - {*re.findall(r"[A-Z]+", taken)}
    assert not words - KNOWN_WORDS


def test_every_command_stands_in_a_group_once():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(main.commands)


# ----------------------------------------------------------------------------------- near commands


@pytest.mark.parametrize(
    ("word", "near"),
    [("merge", "combine or apply"), ("aply", "apply"), ("dif", "diff"), ("Upload", "push"),
     ("evaluate", "sweep or search"), ("ties", "combine or apply"), ("slerp", "combine or apply"),
     ("export_patch", "export-patch?"), ("EXTRACT_LORA", "extract-lora?"), ("ls", "inspect"),
     ("compare", "orthogonality"), ("version", "--version")],
)  # fmt: skip
def test_a_word_that_is_no_command_gets_near_ones(word: str, near: str):
    said = refused(word, "a", "b")
    assert f"There is no command {word!r}. Did you mean {near}" in said
    assert "'skillvec help' lists all commands." in said
    if near in main.commands:
        assert main.commands[near].get_short_help_str(500) in said


def test_a_word_like_nothing_gets_none():
    said = refused("zzzzzz")
    assert "There is no command 'zzzzzz'." in said and "mean" not in said


def test_other_names_are_of_commands_and_options_that_there_are():
    commands = {name for names in COMMANDS_ALSO.values() for name in names}
    assert commands <= {*main.commands, "--version"}
    assert not {*COMMANDS_ALSO} & {*main.commands}
    options = {name for names in OPTIONS_ALSO.values() for name in names}
    assert options <= spelled(*main.commands)
    assert not {*OPTIONS_ALSO} & spelled(*main.commands)
    assert {*OPERATORS} == {*KNOWN} and [*OPERATORS] == [*KNOWN]


# ------------------------------------------------------------------------------------ near options


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [("diff", "--exlude", "diff has no option --exlude. Did you mean --exclude or --include?"),
     ("apply", "--scale", "Did you mean --lam?"), ("apply", "--lambda", "Did you mean --lam?"),
     ("combine", "--density", "Did you mean --param?"),
     ("inspect", "--lam", "inspect has no option --lam. --lam is an option of apply, sweep."),
     ("diff", "--zzzz", "diff has no option --zzzz.")],
)  # fmt: skip
def test_an_option_that_is_none_gets_near_ones(command: str, option: str, said: str):
    message = refused(command, "a", "b", option, "1")
    assert message.endswith(said) and f"Try 'skillvec {command} --help' for help." in message


def test_near_words():
    assert find_near("merge", ["combine", "diff"], {"merge": ("combine", "apply")}) == ["combine"]
    assert find_near("difff", ["combine", "diff"], {}) == ["diff"]
    assert ask_if(["a"]) == " Did you mean a?" and ask_if([]) == ""
    assert ask_if(["a", "b", "c"]) == " Did you mean a, b or c?"


# -------------------------------------------------------------------------------------- near paths


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("sft", "base", "models/rl/step_100"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "skill.safetensors").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("ref", "role", "said"),
    [("sft:base", "vector", "no such file or folder; did you mean sft::base?"),
     ("nowhere:base", "vector", "did you mean nowhere::base?"),
     ("nowhere:nothing", "vector", "vector nowhere:nothing: no such file or folder$"),
     ("sft:base", "target", "target sft:base: no such file or folder"),
     ("bse", "input", "did you mean base?"), ("./bse", "input", "did you mean base?"),
     ("skil.safetensors", "vector", "no such file; did you mean skill.safetensors?"),
     ("other.safetensors", "vector", "vector other.safetensors: no such file$"),
     ("model/rl/step_100", "base", "did you mean models/rl/step_100?"),
     ("skill", "vector", "did you mean skill.safetensors?"), ("lost", "base", "leads to is not"),
     ("models/rl/step_10/x", "base", "no such file or folder$"), ("zzzz", "base", "folder$")],
)  # fmt: skip
def test_a_path_that_is_not_there_gets_one_that_is(here: Path, ref: str, role: str, said: str):
    with pytest.raises(UsageError) as error:
        locate.locate(ref, role)
    message = str(error.value)
    assert message.endswith(said.removesuffix("$")) if said.endswith("$") else said in message
    assert role == "vector" or "::" not in message


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(here: Path, name: str):
    """It is what a variable of the shell is that was not set."""
    for words in (("inspect", name), ("diff", name, "base", "-o", "x"), ("norms", f"{name}::base")):
        assert "an empty name" in refused(*words)


def test_names_are_looked_for_in_folders_of_any_size(here: Path, monkeypatch):
    monkeypatch.setattr(locate, "MOST_NAMES", 0)
    with pytest.raises(UsageError, match=r"no such file or folder$"):
        locate.locate("bse", "input")


def test_the_command_line_says_it(here: Path):
    assert "did you mean sft::base?" in refused("orthogonality", "sft:base", "skill.safetensors")
    assert "did you mean base?" in refused("inspect", "bse")
