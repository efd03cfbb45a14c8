"""The command line: exit codes, streams, refusals, the same words as in Python, quick imports."""

import functools
import importlib.metadata
import inspect as python_inspect
import json
import os
import platform
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors
import torch
from click.testing import CliRunner, Result
from families import load, perturbed, save, toy
from safetensors import safe_open
from schemas import check_all_shown

import skillvec
from skillvec import verbs
from skillvec.cli.commands import main
from skillvec.cli.group import OF_PROGRAM
from skillvec.ops import compiled, philox

# push and pull: tests/cli/test_hub_cli.py; of the program: test_help.py, test_completion.py
COMMANDS = sorted(set(main.commands) - {"push", "pull", *OF_PROGRAM})


def run(*arguments: object) -> Result:
    """Run the command line in this process; anything but a clean exit is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def spawn(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "skillvec", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _reports_are_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    check_all_shown(monkeypatch)


@pytest.fixture(scope="module")
def vector(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vector") / "skill.safetensors"
    skillvec.diff(family.tuned, family.base, path)
    return path


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [(">&-", 0, ""), ("| head -n 1", 0, ""),
     ("> /dev/full", 1, "error: No space left on device\n")],
)  # fmt: skip
def test_a_standard_output_that_is_closed_full_or_cut_off(vector, where: str, code: int, said: str):
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m skillvec inspect -v "$1" {where}', sys.executable, vector],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, said)


@pytest.fixture(scope="module")
def other(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another vector of the same base."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    skillvec.diff(family.sft, family.base, path)
    return path


@pytest.fixture(scope="module")
def patch(vector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "patch.safetensors"
    skillvec.export_patch(vector, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(result: Result, code: int, *words: str) -> str:
    """Check a refusal: its code, nothing on stdout, one message on stderr that holds the words."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    assert message.count("rror:") == 1 and "Traceback" not in message
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------------- exit codes and streams


def test_exit_codes_and_streams_of_a_real_process(tmp_path: Path, family, vector):
    done = spawn("apply", family.target, vector, "-o", tmp_path / "out")
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"short")
    failed = spawn("inspect", tmp_path / "broken")
    misused = spawn("apply", family.target, vector, "-o", tmp_path / "out")
    other = save(tmp_path / "other", toy(0, width=16))
    unfit = spawn("diff", other, family.base, "-o", tmp_path / "x.safetensors")
    assert [failed.returncode, misused.returncode, unfit.returncode] == [1, 2, 3]
    for process in (failed, misused, unfit):
        assert process.stdout == "" and process.stderr.startswith("error: ")
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["diff"], ["diff", "a"], ["diff", "a", "b"],
     ["apply", "t", "-o", "x", "--lam", "z"],
     ["apply", "t", "v", "-o", "x", "--rounding", "up"], ["diff", "a", "b", "-o", "x", "--bogus"],
     ["orthogonality"], ["inspect"], ["inspect", "a", "b"], ["verify"],
     ["diff", "a", "b", "-o", "x.safetensors", "--workers", "many"],
     ["diff", "a", "b", "-o", "x.safetensors", "--codec", "zip"], ["combine", "a", "b"],
     ["combine", "a", "b", "-o", "x.safetensors", "--include", "*"],
     ["combine", "a", "b", "-o", "x.safetensors", "--param"], ["import-patch", "a", "-o", "x"],
     ["export-patch", "a"], ["export-patch", "a", "b", "-o", "x"]],
)  # fmt: skip
def test_what_click_refuses_is_usage(arguments: list[str]):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""


def test_usage_errors_exit_2(tmp_path: Path, family, vector, other):
    out = tmp_path / "out"
    base, tuned, target = family.base, family.tuned, family.target
    shard = target / "model-00001-of-00003.safetensors"
    v = tmp_path / "v.safetensors"
    for words, arguments in {
        "no such file": ("diff", tmp_path / "absent", base, "-o", v),
        "ends in .safetensors": ("diff", tuned, base, "-o", tmp_path / "v.bin"),
        "must not be called": ("diff", tuned, base, "-o", tmp_path / "model.safetensors"),
        "does not exist": ("diff", tuned, base, "-o", tmp_path / "no" / "v.safetensors"),
        "expected one of": ("diff", tuned, base, "-o", v, "--dtype", "int8"),
        "auto keeps": ("diff", tuned, base, "-o", v, "--dtype", "fp64"),
        "at least 1": ("apply", target, vector, "-o", out, "--workers", "0"),
        "expected a finite": ("apply", target, vector, "-o", out, "--lam", "nan"),
        "finite number": ("apply", target, vector, "-o", out, "--lam", "-inf"),
        "either a vector": ("apply", target, "-o", out),
        "or both": ("apply", target, vector, "-o", out, "--tuned", tuned, "--base", base),
        "both tuned and base": ("apply", target, "-o", out, "--tuned", tuned),
        "at least two": ("orthogonality", vector),
        "nothing to verify": ("verify", target),
        "either a vector or": ("apply", target, vector, other, "-o", out, "--tuned", tuned,
                               "--base", base),
        "there are none": ("apply", target, "-o", out, "--tuned", tuned, "--base", base,
                           "--op", "ties"),
        "at least one vector": ("combine", "-o", v),
        "expected one of linear": ("combine", vector, other, "-o", v, "--op", "average"),
        "expected one of bf16": ("combine", vector, other, "-o", v, "--dtype", "int8"),
        "a size such as 5GB": ("diff", tuned, base, "-o", v, "--max-shard-size", "5 apples"),
        "workers -1: expected at least 1": ("combine", vector, other, "-o", v, "--workers", "-1"),
        "workers 3: engine serial is the calling thread alone": (
            "verify", vector, "--engine", "serial", "--workers", "3"),
        "only a vector has a verdict": ("inspect", target, "--target", base),
        "is made of a stored": ("export-patch", f"{tuned}::{base}", "-o", v),
        "one .safetensors file": ("apply", shard, vector, "-o", out,
                                  "--include", "model.embed_tokens.weight"),
    }.items():  # fmt: skip
        refused(run(*arguments), 2, words)
    assert list(tmp_path.iterdir()) == []


def test_run_errors_exit_1(tmp_path: Path, family, vector):
    broken = save(tmp_path / "broken.safetensors", toy())
    os.truncate(broken, broken.stat().st_size - 1)
    refused(run("inspect", broken), 1, "broken.safetensors", "truncated")
    (tmp_path / "made").mkdir()
    skillvec.apply(family.target, vector, tmp_path / "made" / "out")
    shard = tmp_path / "made" / "out" / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40
    shard.write_bytes(content)
    name = "does not hold"
    message = refused(run("verify", tmp_path / "made" / "out"), 1, name, "flat position")
    assert any(tensor in message for tensor in toy())


def test_incompatible_inputs_exit_3(tmp_path: Path, family, vector, other, patch):
    small = save(tmp_path / "small", toy(0, layers=1))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    before = contents(tmp_path)
    v = tmp_path / "v.safetensors"
    for words, arguments in {
        "only in": ("diff", family.tuned, small, "-o", v),
        "verdict: incompatible": ("apply", small, vector, "-o", tmp_path / "out"),
        "this is a skill vector": ("apply", vector, vector, "-o", tmp_path / "out"),
        "not a skill vector": ("apply", family.target, family.base, "-o", tmp_path / "out"),
        "not in": ("orthogonality", vector, f"{small}::{small}"),
        "do not match": ("combine", vector, f"{small}::{small}", "-o", v),
        "(no manifest in its header)": ("combine", vector, family.base, "-o", v),
        "does not fit": ("inspect", vector, "--target", small),
        "exact base": ("export-patch", vector, "--base", family.sft, "-o", v),
        "model of another shape": ("import-patch", patch, small, "-o", v),
        "pickled": ("diff", tmp_path / "pickled", family.base, "-o", v),
        "match no tensor": ("diff", family.tuned, family.base, "-o", v, "--include", "nothing*"),
    }.items():
        refused(run(*arguments), 3, words)
    assert contents(tmp_path) == before


def test_up_to_five_names_with_both_shapes_and_a_count_of_the_rest(tmp_path: Path, family, vector):
    wide = save(tmp_path / "wide", toy(0, width=16))
    for arguments in (
        ("diff", wide, family.base, "-o", tmp_path / "v.safetensors"),
        ("apply", wide, vector, "-o", tmp_path / "out"),
        ("orthogonality", vector, f"{wide}::{wide}"),
    ):
        message = refused(run(*arguments), 3)
        assert "model.embed_tokens.weight" in message
        assert "[40, 16]" in message and "[40, 24]" in message
        shown = [name for name in toy() if f" {name}" in message]
        assert len(shown) == 5 and f"and {len(toy()) - 5} more" in message


def test_a_name_on_one_side_only_is_named_with_its_side(tmp_path: Path, family, vector):
    more = save(tmp_path / "more", toy(0) | {"model.extra.weight": torch.zeros(3, 5)})
    for arguments, words in (
        (("diff", more, family.base, "-o", tmp_path / "v.safetensors"), f"only in {more}"),
        (("diff", family.tuned, more, "-o", tmp_path / "v.safetensors"), f"only in {more}"),
        (("apply", more, vector, "-o", tmp_path / "out"), "only in the target"),
    ):
        refused(run(*arguments), 3, "model.extra.weight [3, 5]", words, "--exclude")
    skillvec.diff(more, save(tmp_path / "base", load(more)), tmp_path / "more.safetensors")
    arguments = ("apply", family.target, tmp_path / "more.safetensors", "-o", tmp_path / "out")
    refused(run(*arguments), 3, "model.extra.weight [3, 5]", "only in the vector")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_exits_1_and_says_that_nothing_was_published(monkeypatch, family, tmp_path: Path):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "diff", interrupted)
    result = run("diff", family.tuned, family.base, "-o", tmp_path / "v.safetensors")
    assert result.exit_code == 1 and "nothing was published" in result.stderr


# --------------------------------------------------------------------------------- json and quiet


def strict(text: str) -> dict:
    """Parse JSON as every other language does: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


Verbs = Callable[[Path], dict[str, list[object]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base again, with a config of which transformers makes a model."""
    config = {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 48, "vocab_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "attention_bias": True,
    }  # fmt: skip
    return save(tmp_path_factory.mktemp("llama") / "base", toy(0), config=config)


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that transformers loads, and a vector that fits it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("loadable")
    LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=16, vocab_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )).save_pretrained(folder / "model")  # fmt: skip
    save(folder / "tuned", perturbed(load(folder / "model"), 1))
    skillvec.diff(folder / "tuned", folder / "model", folder / "v.safetensors")
    return folder / "model", folder / "v.safetensors"


@pytest.fixture(scope="module")
def every_verb(family, vector, other, patch, llama, loadable) -> Verbs:
    """Return what gives a good command line of every command, by the folder to write to."""
    return lambda folder: {
        "diff": ["diff", family.tuned, family.base, "-o", folder / "v.safetensors"],
        "combine": ["combine", f"{vector}=0.7", f"{other}=-0.3", "-o", folder / "v.safetensors"],
        "apply": ["apply", family.target, vector, "-o", folder / "out"],
        "import-patch": ["import-patch", patch, family.base, "-o", folder / "v.safetensors"],
        "export-patch": ["export-patch", vector, "-o", folder / "v.safetensors"],
        "extract-lora": [
            "extract-lora",
            vector,
            "--rank",
            3,
            "--base",
            llama,
            "-o",
            folder / "adapter",
        ],
        "orthogonality": ["orthogonality", vector, f"{family.sft}::{family.base}"],
        "norms": ["norms", f"{family.sft}::{family.base}"],
        "inspect": ["inspect", vector],
        "verify": ["verify", vector],
        "sweep": ["sweep", *loadable, "--lam", 1, *TRIED, folder / "sweep"],
        "search": ["search", *loadable, "--budget", 1, *TRIED, folder / "search"],
    }


TRIED = ["--eval", "loaded:weigh", "-o"]


WRITERS = ["diff", "combine", "apply", "import-patch", "export-patch", "extract-lora"]
REPORTS = ["orthogonality", "norms"]  # which write where they are told to
TRIALS = ["search", "sweep"]  # which load a model, and write a folder
PLANNED = [*WRITERS, *REPORTS]  # those that plan before they work
SELECTIVE = ["diff", "apply", "extract-lora", *REPORTS, *TRIALS]  # those that take globs


def test_every_command_is_tried_here(tmp_path: Path, every_verb: Verbs):
    assert sorted(every_verb(tmp_path)) == COMMANDS
    for verb in COMMANDS:
        spelled = {text for p in main.commands[verb].params for text in p.opts}
        assert ("--output" in spelled) == (verb in [*WRITERS, *REPORTS, *TRIALS])
        assert ("--include" in spelled) == (verb in SELECTIVE)


@pytest.mark.parametrize("verb", [*WRITERS, "verify"])
def test_what_the_official_reader_does_not_find_is_not_published(
    verb: str, tmp_path: Path, every_verb: Verbs, monkeypatch: pytest.MonkeyPatch
):
    class Blind:
        """The reader of the safetensors package, which misses the first tensor."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = safe_open(*arguments, **options)

        def __enter__(self) -> "Blind":
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._file.keys())[1:]

        def get_slice(self, name: str) -> Any:
            return self._file.get_slice(name)

    monkeypatch.setattr(safetensors, "safe_open", Blind)
    result = run(*every_verb(tmp_path)[verb])
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    said = " ".join(result.stderr.split())
    assert re.search("the safetensors package reads other tensors:.*found nothing", said)


@pytest.mark.parametrize("verb", COMMANDS)
def test_json_is_one_document_with_every_tensor(verb: str, tmp_path: Path, every_verb: Verbs):
    result = run(*every_verb(tmp_path)[verb], "--json")
    assert result.exit_code == 0
    report = strict(result.stdout)
    assert report["verb"] == verb
    names = set() if verb in TRIALS else set(toy())  # these name points
    assert {line["name"] for line in report["tensors"]} == names
    assert all(line["status"] for line in report["tensors"])
    assert sum(report["counts"].values()) == len(report["tensors"]) == len(names)


def test_json_lists_every_tensor_of_every_input_whatever_became_of_it(tmp_path: Path):
    base, tuned = toy(), perturbed(toy())
    # one side only, yet tied; integers equal and not; excluded; a target's own integer
    del base["lm_head.weight"]
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    base |= {"equal": torch.arange(3), "differs": torch.arange(3), "empty": torch.zeros(0, 2)}
    tuned |= {"equal": torch.arange(3), "differs": torch.arange(3) + 1, "empty": torch.zeros(0, 2)}
    config = {"model_type": "toy", "tie_word_embeddings": True}
    left = save(tmp_path / "tuned", tuned, config=config)
    right = save(tmp_path / "base", base, config=config)
    v = tmp_path / "v.safetensors"
    made = strict(run("diff", left, right, "-o", v, "--exclude", "*.bias", "--json").stdout)
    lines = {line["name"]: line["status"] for line in made["tensors"]}
    assert set(lines) == set(base) | set(tuned)
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert lines["lm_head.weight"] == "tied" and lines[bias] == "excluded"
    assert lines["equal"] == "equal" and lines["differs"] == "differs"
    applied = strict(run("apply", left, v, "-o", tmp_path / "out", "--json").stdout)
    lines = {line["name"]: line["status"] for line in applied["tensors"]}
    assert set(lines) == set(tuned)
    assert lines[bias] == lines["equal"] == "passed through"
    assert lines["lm_head.weight"] == "applied"
    verified = strict(run("verify", tmp_path / "out", "--json").stdout)
    assert {line["name"] for line in verified["tensors"]} == set(tuned)
    inspected = strict(run("inspect", v, "--json").stdout)
    told = {line["name"] for line in inspected["tensors"]} | {*inspected["tied"]}
    assert told | {*inspected["excluded"], *inspected["differing"]} == set(base) | set(tuned)


def test_json_stays_json_where_numbers_are_not_finite(tmp_path: Path):
    base, tuned = toy(), perturbed(toy())
    tuned["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    left, right = save(tmp_path / "tuned", tuned), save(tmp_path / "base", base)
    v = tmp_path / "v.safetensors"
    for arguments in (
        ("diff", left, right, "-o", v), ("inspect", v), ("apply", right, v, "-o", tmp_path / "out"),
        ("orthogonality", v, v), ("verify", v), ("verify", tmp_path / "out"),
    ):  # fmt: skip
        if arguments[0] in ("diff", "apply", "orthogonality"):
            refused = run(*arguments, "--json")
            assert refused.exit_code == 3 and "3 of 24 values" in refused.output, refused.output
            arguments = (*arguments, "--allow-nonfinite")
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        strict(result.stdout)


@pytest.mark.parametrize("verb", COMMANDS)
def test_quiet_prints_one_line_alone(verb: str, tmp_path: Path, vector, every_verb: Verbs):
    arguments = every_verb(tmp_path)[verb]
    result = run(*arguments, "-q")
    assert result.exit_code == 0
    said = re.sub("\n +", " ", result.stderr)  # a warning may take several lines
    assert all(line.startswith("warning: ") for line in said.splitlines())
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    if verb in [*WRITERS, *TRIALS]:
        assert lines == [str(arguments[-1])]
    elif verb in ("inspect", "verify"):
        assert lines == [str(vector)]
    else:
        assert -1 <= float(lines[0]) <= (1 if verb == "orthogonality" else 1e3)


def test_quiet_and_relative_paths_print_the_resolved_path(tmp_path: Path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("diff", family.tuned, family.base, "-o", "v.safetensors", "-q")
    assert result.stdout == f"{tmp_path}/v.safetensors\n"
    assert run("verify", "v.safetensors", "-q").stdout == f"{tmp_path}/v.safetensors\n"


@pytest.mark.parametrize("verb", PLANNED)
def test_talk_goes_to_stderr_and_data_to_stdout(verb: str, tmp_path: Path, every_verb: Verbs):
    result = run(*every_verb(tmp_path)[verb])
    talk, answer = {
        "diff": (["v = TUNED - BASE", "output"], "values changed"),
        "combine": (["v = linear(", "=0.7", "=-0.3)", "output"], "values changed"),
        "apply": (["OUT = TARGET + LAM * V", "output"], "realised gain"),
        "import-patch": (["v = TUNED - BASE", "output"], "values changed"),
        "export-patch": (["output"], "values listed"),
        "extract-lora": (["s B A ~ V at rank 3", "output"], "of the vector's squared norm"),
        "orthogonality": (["warning: "], "cosine"),
        "norms": (["warning: "], "changed"),
    }[verb]
    for words in talk:
        assert words in result.stderr and words not in result.stdout
    assert answer in result.stdout


def test_diff_prints_the_formula_and_both_resolved_paths(tmp_path: Path, family, monkeypatch):
    monkeypatch.chdir(family.base.parent)
    result = run("diff", "tuned", "base", "-o", tmp_path / "v.safetensors")
    assert "v = TUNED - BASE" in result.stderr
    assert str(family.tuned) in result.stderr and str(family.base) in result.stderr


def test_verbose_shows_every_tensor(tmp_path: Path, family, vector):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        main, ["apply", str(family.target), str(vector), "-o", str(tmp_path / "out"), "-v"]
    )
    for name in toy():
        assert name in result.stdout


# --------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize("verb", PLANNED)
def test_a_dry_run_writes_nothing_and_says_what_would_be(
    verb: str, tmp_path: Path, family, vector, other, patch, every_verb: Verbs
):
    arguments = every_verb(tmp_path)[verb]
    result = run(*arguments, "--dry-run", "--json")
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    report = strict(result.stdout)
    nbytes = sum(tensor.nbytes for tensor in toy().values())
    first, second = (
        sum(line["nbytes"] for line in skillvec.inspect(path).ledger) for path in (vector, other)
    )
    beside = sum(len(content) for name, content in contents(family.target).items()
                 if not name.endswith(".safetensors"))  # fmt: skip
    lists = sum(tensor.nbytes for tensor in load(patch).values())
    reads = {
        "diff": 2 * nbytes, "combine": first + second, "apply": nbytes + first + beside,
        "import-patch": 2 * nbytes + lists, "export-patch": nbytes + first,
        "orthogonality": first + 2 * nbytes, "norms": 2 * nbytes, "extract-lora": first,
    }[verb]  # fmt: skip
    assert {line["name"] for line in report["tensors"]} == set(toy())
    assert report["workers"] >= 1 and report["memory_nbytes"] > 0
    if verb == "apply":
        assert report["files"] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert {"config.json", "notes.txt"} < set(report["side_files"])
        assert report["verdict"] == "same family"
    assert (report["nbytes_written"] > 0) == (verb in WRITERS)
    assert report["nbytes_read"] == reads  # headers and side tables apart
    text = run(*arguments, "--dry-run")
    words = " ".join(text.stdout.split())
    assert "reads" in words and "writes" in words and "memory" in words
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_states_the_bytes_that_a_run_then_writes(tmp_path: Path, every_verb: Verbs):
    arguments = every_verb(tmp_path)["apply"]
    planned = strict(run(*arguments, "--dry-run", "--json").stdout)
    run(*arguments)
    made = contents(tmp_path / "out")
    del made["README.md"]  # the card holds what only the run tells
    written = sum(len(content) for content in made.values())
    index = (tmp_path / "out" / "model.safetensors.index.json").stat().st_size
    assert abs(written - planned["nbytes_written"]) <= index
    assert set(planned["files"]) | set(planned["side_files"]) | {
        "model.safetensors.index.json"
    } == set(made)


@pytest.mark.parametrize("verb", WRITERS)
def test_a_dry_run_refuses_what_a_run_refuses(verb: str, tmp_path: Path, every_verb: Verbs):
    arguments = every_verb(tmp_path)[verb]
    arguments[arguments.index("-o") + 1] = tmp_path / "absent" / "out.safetensors"
    refused(run(*arguments, "--dry-run"), 2, "does not exist")
    arguments[arguments.index("-o") + 1] = existing = tmp_path / "out.safetensors"
    existing.write_bytes(b"mine")
    refused(run(*arguments, "--dry-run"), 2, "exists")
    assert existing.read_bytes() == b"mine"


# ---------------------------------------------------------------------- places for the output


@pytest.mark.parametrize("verb", WRITERS)
def test_an_existing_output_needs_force(verb: str, tmp_path: Path, every_verb: Verbs):
    arguments = every_verb(tmp_path)[verb]
    assert run(*arguments).exit_code == 0
    before = contents(tmp_path)
    refused(run(*arguments), 2, "exists already", "--force", str(arguments[-1]))
    assert contents(tmp_path) == before
    (tmp_path / "extra").write_bytes(b"beside")
    assert run(*arguments, "--force").exit_code == 0
    assert contents(tmp_path) == before | {"extra": b"beside"}


def test_force_replaces_a_folder_whole(tmp_path: Path, family, vector):
    old = save(tmp_path / "out", toy(7), shards=2, side_files={"stale.json": "{}"})
    run("apply", family.target, vector, "-o", old, "--force")
    assert "stale.json" not in contents(old)
    assert not list(old.glob("*-of-00002*"))
    skillvec.verify(old)


def test_force_on_a_link_replaces_the_link_or_refuses_before_the_work(
    tmp_path: Path, family, vector
):
    real = save(tmp_path / "real", toy(7))
    before = contents(real)
    (tmp_path / "out").symlink_to(real)
    result = run("apply", family.target, vector, "-o", tmp_path / "out", "--force")
    if result.exit_code == 0:
        skillvec.verify(tmp_path / "out")
    else:
        refused(result, 2, "link")
    assert contents(real) == before


@pytest.mark.parametrize("content", [{"thesis.tex": b"years"}, {"sub/model.safetensors": b""}])
def test_force_never_replaces_a_folder_that_holds_no_model(
    content: dict[str, bytes], tmp_path: Path, family, vector
):
    for name, text in content.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(text)
    result = run("apply", family.target, vector, "-o", tmp_path / "out", "--force")
    refused(result, 2, "no model")
    assert contents(tmp_path / "out") == content


def test_force_onto_an_empty_folder_is_taken(tmp_path: Path, family, vector):
    (tmp_path / "out").mkdir()
    refused(run("apply", family.target, vector, "-o", tmp_path / "out"), 2, "exists")
    assert run("apply", family.target, vector, "-o", tmp_path / "out", "--force").exit_code == 0


@pytest.mark.parametrize("verb", ["diff", "combine", "import-patch", "export-patch"])
def test_force_never_replaces_a_folder_that_holds_no_vector(
    verb: str, tmp_path: Path, every_verb: Verbs
):
    (tmp_path / "v.safetensors").mkdir()
    (tmp_path / "v.safetensors" / "thesis.tex").write_bytes(b"years")
    refused(run(*every_verb(tmp_path)[verb], "--force"), 2, "folder")
    assert (tmp_path / "v.safetensors" / "thesis.tex").exists()


def test_an_output_inside_or_around_an_input_is_refused_even_with_force(tmp_path: Path, family):
    base, tuned = save(tmp_path / "all" / "base", toy()), save(tmp_path / "all" / "tuned", toy(1))
    vector = tmp_path / "v.safetensors"
    skillvec.diff(tuned, base, vector)
    skillvec.export_patch(vector, tmp_path / "p.safetensors")
    (tmp_path / "link").symlink_to(base)
    before = contents(tmp_path)
    for arguments in (
        ("diff", tuned, base, "-o", base / "v.safetensors"),
        ("diff", tuned, base, "-o", tuned / "sub" / "v.safetensors"),
        ("apply", base, vector, "-o", base),
        ("apply", base, vector, "-o", base / "out"),
        ("apply", base, vector, "-o", tmp_path / "all"),
        ("apply", base, vector, "-o", tmp_path),
        ("apply", base, "--tuned", tuned, "--base", base, "-o", tuned / "out"),
        ("apply", base / "model.safetensors", vector, "-o", base / "model.safetensors"),
        ("apply", base / "model.safetensors", vector, "-o", vector),
        ("apply", base, vector, f"{tuned}::{base}", "-o", tuned / "out"),
        ("combine", vector, f"{tuned}::{base}=0.5", "-o", vector),
        ("combine", vector, f"{tuned}::{base}=0.5", "-o", tuned / "v.safetensors"),
        ("combine", vector, "-o", vector),
        ("import-patch", tmp_path / "p.safetensors", base, "-o", base / "v.safetensors"),
        ("import-patch", tmp_path / "p.safetensors", base, "-o", tmp_path / "p.safetensors"),
        ("export-patch", vector, "-o", vector),
        ("export-patch", vector, "-o", base / "v.safetensors"),
        ("diff", tuned, base, "-o", tmp_path / "link" / "v.safetensors"),
        ("apply", base, vector, "-o", tmp_path / "link" / "out"),
        ("apply", base, vector, "-o", tmp_path / "link"),
    ):
        message = refused(run(*arguments, "--force"), 2, "output")
        assert "inside the input" in message or "holds the input" in message, message
    assert contents(tmp_path) == before


def test_an_output_that_holds_the_files_an_input_links_to_is_refused(
    tmp_path: Path, family, vector
):
    # A folder of links (as the Hub's cache makes them) loses its weights with the files linked to.
    real = save(tmp_path / "real", toy(3))
    (tmp_path / "links").mkdir()
    for file in real.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    result = run("apply", tmp_path / "links", vector, "-o", real, "--force")
    refused(result, 2, "holds the input")
    assert (tmp_path / "links" / "model.safetensors").exists()


def test_an_output_that_appears_during_the_run_is_not_overwritten(tmp_path: Path, family, vector):
    class Meddler:
        """Another run publishes between our check of the headers and our writing."""

        def planned(self, report: object) -> None:
            (tmp_path / "v.safetensors").write_bytes(b"of another run")
            save(tmp_path / "out", {"other": torch.zeros(1)})

        def advanced(self, done_nbytes: int, total_nbytes: int) -> None: ...

    with pytest.raises(skillvec.SkillvecError, match="exists"):
        skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors", watcher=Meddler())
    assert (tmp_path / "v.safetensors").read_bytes() == b"of another run"
    with pytest.raises(skillvec.SkillvecError, match="exists"):
        skillvec.apply(family.target, vector, tmp_path / "out", watcher=Meddler())
    assert "other" in load(tmp_path / "out")


# --------------------------------------------------------------------------------------- globs


def test_include_and_exclude_choose_tensors(tmp_path: Path, family, vector):
    globs = ["--include", "*.layers.*", "--include", "lm_head.*", "--exclude", "*.bias"]
    result = run("apply", family.target, vector, "-o", tmp_path / "out", "--json", *globs)
    lines = {line["name"]: line["status"] for line in strict(result.stdout)["tensors"]}
    for name in toy():
        chosen = (".layers." in name or name.startswith("lm_head")) and not name.endswith(".bias")
        assert (lines[name] == "excluded") == (not chosen), name
    merged, target = load(tmp_path / "out"), load(family.target)
    for name, status in lines.items():
        assert status != "excluded" or torch.equal(merged[name], target[name])


@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("verb", SELECTIVE)
def test_a_glob_that_matches_nothing_is_refused(
    option: str, verb: str, tmp_path: Path, every_verb: Verbs
):
    arguments = every_verb(tmp_path)[verb]
    refused(run(*arguments, option, "model.layer.*"), 3, "match no tensor", "model.layer.*")
    assert list(tmp_path.iterdir()) == []


def test_excluding_everything_is_refused(tmp_path: Path, every_verb: Verbs):
    for verb in SELECTIVE:
        arguments = every_verb(tmp_path)[verb]
        result = run(*arguments, "--exclude", "*")
        assert result.exit_code in (2, 3) and "no tensor" in " ".join(result.stderr.split()), verb
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------- the same words on the command line, in Python

SHOWN_ONLY = {"json", "quiet", "verbose", "help"}  # how to print, not what to do
PYTHON_ONLY = {"watcher"}  # an object
SPELLED = {"param": "parameters", "eval_option": "eval_options"}  # of one NAME=VALUE each
MERGING = {"vectors", "op", "parameters", "recipe"}  # what makes one vector of several words


def words_of(verb: str) -> dict[str, click.Parameter]:
    """Return the options and arguments of a command under the names they have in Python."""
    words: dict[str, click.Parameter] = {}
    for parameter in main.commands[verb].params:
        name = parameter.name
        if isinstance(parameter, click.Option):
            (long,) = [text for text in parameter.opts if text.startswith("--")]
            name = long[2:].replace("-", "_")
        words[SPELLED.get(name, name)] = parameter
    return {name: word for name, word in words.items() if name not in SHOWN_ONLY}


def parameters_of(verb: str) -> dict[str, python_inspect.Parameter]:
    """Return the parameters of the Python function, those that it hands on to `save` included."""
    found = dict(python_inspect.signature(getattr(skillvec, verb.replace("-", "_"))).parameters)
    if found.pop("options", None) is not None:
        saved = python_inspect.signature(verbs.save).parameters
        found |= {name: saved[name] for name in saved if name not in ("vector", "output")}
    return {name: item for name, item in found.items() if name not in PYTHON_ONLY}


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_is_a_parameter_and_every_parameter_an_option(verb: str):
    words, parameters = words_of(verb), parameters_of(verb)
    if verb in ("combine", "sweep"):
        del parameters["weights"]  # VECTOR=WEIGHT
    if verb == "apply":  # its words make the vector as combine would, with the same defaults
        merging = {name: words.pop(name) for name in MERGING}
        del parameters["vector"]
        for name, option in merging.items():
            other = words_of("combine")[name]
            assert (option.default, option.opts) == (other.default, other.opts), name
    if verb == "import-patch":
        del parameters["dtype"]  # the base's
    assert set(words) == set(parameters)
    for name, option in words.items():
        default = parameters[name].default
        if isinstance(option, click.Option) and not option.required and not option.multiple:
            given = option.get_default(click.Context(main.commands[verb]))
            given = None if "UNSET" in repr(given).upper() else given
            assert given == default, name


def test_options_are_spelled_as_users_of_merge_tools_expect():
    for verb in COMMANDS:
        spelled = {text for p in main.commands[verb].params for text in p.opts}
        assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= spelled
        if verb in WRITERS:
            assert {"-o", "--output", "--force", "--dry-run"} <= spelled
            assert ("--workers" in spelled) == ("--engine" in spelled) == (verb != "extract-lora")
        if verb in SELECTIVE:
            assert {"--include", "--exclude", "--dry-run"} <= spelled
        if verb in ("diff", "combine", "apply"):
            assert "--dtype" in spelled
        if verb in ("diff", "combine"):
            assert {"--codec", "--max-shard-size"} <= spelled


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_has_help_for_every_option(verb: str):
    for flag in ("--help", "-h"):
        result = run(verb, flag)
        assert result.exit_code == 0 and result.stderr == ""
        assert result.stdout.startswith(f"Usage: main {verb}")
    for parameter in main.commands[verb].params:
        if isinstance(parameter, click.Option):
            assert parameter.help and parameter.help.endswith("."), parameter.name
    assert main.commands[verb].help
    assert "\n  Example" in result.stdout and f"    skillvec {verb} " in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_help_names_every_command_and_the_exit_codes():
    text = run("--help").stdout
    for verb in COMMANDS:
        assert re.search(rf"^  {verb} ", text, re.MULTILINE)
    assert "Exit codes: 0 done, 1 the run failed, 2 the command is wrong, 3 the inputs" in " ".join(
        text.split()
    )


def test_version():
    assert run("--version").stdout == f"skillvec, version {skillvec.__version__}\n"


def test_version_says_what_it_runs_on():
    code = ("import sys; from skillvec.cli import main; main(sys.argv[1:], standalone_mode=False)\n"
            "sys.exit(bool({'torch', 'safetensors'} & {*sys.modules}))")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "-v", "--version"], capture_output=True, text=True,
        check=True, env=os.environ | {"SKILLVEC_KERNELS": "numpy"},
    )  # fmt: skip
    said = dict(re.findall(r"(\w+) +(.*)", done.stdout))
    assert said["kernels"] == "numpy (SKILLVEC_KERNELS says so)"
    assert said["python"].startswith(platform.python_version())
    assert said["torch"] == importlib.metadata.version("torch")


def test_the_version_tries_the_kernels_that_it_names(monkeypatch: pytest.MonkeyPatch):
    def refused() -> None:
        compiled._refused.append("draw")

    ask = functools.cache(refused)
    monkeypatch.setattr(philox, "_kernel", ask)
    monkeypatch.setattr(compiled, "_refused", [])
    said = run("--version", "-v").stdout
    assert "numpy for draw (kernels that gave other bytes than numpy" in said


def test_kernels_that_nobody_knows_are_a_usage_error():
    done = spawn("--version", "-v", SKILLVEC_KERNELS="mmx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: SKILLVEC_KERNELS=mmx: expected numpy, or one of avx512")


def test_verbose_needs_something_to_be_verbose_about():
    done = run("-v", "inspect", "nothing")
    assert done.exit_code == 2 and "after the command, or beside --version" in done.stderr


# ------------------------------------------------------------------------------------- imports

HEAVY = ("torch", "transformers", "huggingface_hub", "scipy", "pandas")
PROBE = """
import json, sys
from skillvec.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, end.code
    print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
"""


def probed(commands: Iterable[Sequence[object]]) -> Iterator[tuple[set[str], str]]:
    """Run commands in one process; of each, return all imported so far and what it showed."""
    words = json.dumps([[*map(str, arguments)] for arguments in commands])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=120, env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    shown = ""
    for line in done.stdout.splitlines(keepends=True):
        if line.startswith("MODULES "):
            yield {*line.split()[1:]}, shown
            shown = ""
        else:
            shown += line


def test_what_a_command_imports_and_shows_off_a_terminal(tmp_path: Path, every_verb: Verbs):
    """Nothing that it does not need; no bar and no colours, whatever TERM says."""
    verbs = {
        verb: [*arguments, *(["--force"] if verb in WRITERS else [])]
        for verb, arguments in every_verb(tmp_path).items()
        if verb not in TRIALS  # they load a model by transformers; what they show: tests/trials
    }
    allowed = {"apply": {"huggingface_hub"}, "extract-lora": {*HEAVY}}  # the card; SVD, layers
    order = sorted(verbs, key=lambda verb: len(allowed.get(verb, ())))
    found = list(probed(verbs[verb] for verb in order))
    for verb, (modules, shown) in zip(order, found, strict=True):
        assert "numpy" in modules  # the probe sees modules at all
        assert not modules & {*HEAVY} - allowed.get(verb, set()), verb
        assert shown and "\x1b" not in shown and "\r" not in shown, verb


@pytest.mark.parametrize("arguments", [["--help"], ["diff", "--help"], ["--version"]])
def test_help_imports_no_numbers(arguments: list[str]):
    [(found, _)] = probed([arguments])
    assert "click" in found
    assert not found & {*HEAVY, "numpy", "rich", "safetensors"}


# ------------------------------------------------------------------------------------ terminals


# Slows every read down, so that a small job lasts as long as a big one.
SLOW = """
import os, sys, time
read = os.preadv
def slow(*arguments):
    time.sleep(0.02)
    return read(*arguments)
os.preadv = slow
from skillvec.cli import main
main(sys.argv[1:])
"""


def on_a_terminal(command: list[str], columns: int = 80) -> tuple[str, int]:
    """Run a command on a pseudo-terminal; return what it showed and its exit code."""
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, close_fds=True
    )
    os.close(terminal)
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        ready, _, _ = select.select([controller], [], [], 0.2)
        if ready:
            try:
                piece = os.read(controller, 65536)
            except OSError:  # the other side is closed
                break
            shown += piece
            if not piece:
                break
    os.close(controller)
    return shown.decode(), process.wait(10)


def test_a_bar_with_speed_and_time_left_on_a_terminal(tmp_path: Path, family, vector):
    command = [sys.executable, "-c", SLOW, "apply", str(family.target), str(vector), "-o"]
    shown, code = on_a_terminal([*command, str(tmp_path / "out"), "--workers", "1"])
    assert code == 0
    assert "\x1b[" in shown and re.search(r"\d+\.\d/\d+\.\d kB|\d+/\d+ (bytes|kB)", shown)
    assert re.search(r"(kB|bytes)/s", shown) and re.search(r"\d:\d\d:\d\d", shown)
    assert "realised gain" in shown  # the answer is left standing
    shown, code = on_a_terminal([*command, str(tmp_path / "quiet"), "--workers", "1", "-q"])
    assert code == 0 and "/s" not in shown


NARROW = {
    "diff": ["diff", "t", "b", "-o", "w.safetensors"],
    "combine": ["combine", "v.safetensors=0.7", "u.safetensors=-0.3", "-o", "w.safetensors"],
    "combine by ties": ["combine", "v.safetensors", "u.safetensors=-0.3", "--op", "ties",
                        "--param", "density=0.25", "-o", "w.safetensors"],
    "apply": ["apply", "b", "v.safetensors", "-o", "o"],
    "apply several": ["apply", "b", "v.safetensors=0.7", "t::b=-0.3", "--op", "dare_ties", "-o",
                      "o"],
    "import-patch": ["import-patch", "p.safetensors", "b", "-o", "w.safetensors"],
    "export-patch": ["export-patch", "v.safetensors", "-o", "w.safetensors"],
    "orthogonality": ["orthogonality", "v.safetensors", "t::b", "c.safetensors"],
    "orthogonality of two": ["orthogonality", "v.safetensors", "c.safetensors", "--control",
                             "random", "--subspace", "2"],
    "norms": ["norms", "v.safetensors", "--subspace", "2"],
    "inspect": ["inspect", "v.safetensors"],
    "inspect combination": ["inspect", "c.safetensors", "--target", "b"],
    "inspect merged": ["inspect", "m"],
    "inspect patch": ["inspect", "p.safetensors"],
    "verify": ["verify", "v.safetensors"],
    "verify combination": ["verify", "c.safetensors"],
    "verify merged": ["verify", "m"],
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models with long tensor names, as real models have them."""
    folder = tmp_path_factory.mktemp("narrow")
    deep = "model.language_model.layers.0.mlp.experts.127.shared_expert_gate_up_projection.weight"
    base = toy() | {deep: torch.ones(3, 4096).to(torch.bfloat16)}
    save(folder / "b", base)
    save(folder / "t", perturbed(base))
    save(folder / "s", perturbed(base, 4))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        skillvec.diff("t", "b", "v.safetensors", method="grpo", license="apache-2.0")
        skillvec.diff("s", "b", "u.safetensors")
        skillvec.export_patch("v.safetensors", "p.safetensors")
        words = ("v.safetensors=0.7", "u.safetensors=-0.3", "--op", "ties", "-o")
        assert run("combine", *words, "c.safetensors").exit_code == 0
        assert run("apply", "b", *words, "m").exit_code == 0
    return folder


@pytest.mark.parametrize("name", NARROW)
def test_no_line_is_wider_than_the_terminal(name: str, narrow: Path, monkeypatch):
    # Paths of inputs are the user's own, and a command that can be copied is not cut.
    monkeypatch.chdir(narrow)
    words = NARROW[name]
    planned = ["--dry-run"] if words[0] not in ("inspect",) else []
    for width, more in (
        (80, []), (80, ["-v"]), (80, [*planned, "-v"]), (80, planned), (60, ["-v"]), (120, ["-v"]),
    ):  # fmt: skip
        monkeypatch.setenv("COLUMNS", str(width))
        result = run(*words, *more, *(["--force"] if words[0] in WRITERS else []))
        assert result.exit_code == 0, result.output
        for line in result.output.splitlines():
            if str(narrow) not in line and not line.startswith("  skillvec "):
                assert len(line) <= width and line == line.rstrip(), line


def test_what_programs_and_hands_take_is_not_folded(narrow: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.chdir(narrow)
    strict(run("inspect", "v.safetensors", "--json").stdout)
    place = tmp_path / "a folder whose name has many words, and is long"
    place.mkdir()
    made = place / "p.safetensors"
    assert run(*NARROW["export-patch"][:-1], made, "-q").stdout == f"{made}\n"
    command = next(line for line in run("inspect", "v.safetensors").stdout.split("\n")
                   if line.startswith("  skillvec diff"))  # fmt: skip
    assert len(command) > 40 and command.endswith("--license apache-2.0")


def test_off_a_terminal_names_are_whole(narrow: Path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(narrow)
    shown = run("inspect", "v.safetensors", "-v").stdout
    assert "\u2026" not in shown and all(f"{name} " in shown for name in load("b"))
    assert "..." not in shown and "... and " in run("inspect", "v.safetensors").stdout


def test_a_terminal_without_the_characters_of_tables_gets_others(narrow: Path):
    done = spawn("norms", narrow / "v.safetensors", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert done.returncode == 0 and done.stdout.isascii() and "???" in done.stdout


def test_names_too_long_do_not_hide_the_terminal_s_edge(narrow: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(narrow)
    shown = run("inspect", "c.safetensors", "--target", "b").stdout
    for words in ("ties(v.safetensors=0.7 u.safetensors=-0.3)", "parent   v.safetensors (",
                  "parent   u.safetensors (", "identity ", "packed", "verdict  on b: exact base",
                  "\u2026"):  # fmt: skip
        assert words in shown, words
    assert "v = ties(v.safetensors=0.7 u.safetensors=-0.3)" in run(
        *NARROW["combine by ties"], "--force"
    ).stderr.replace("=1 ", "=0.7 ")
    talk = run(*NARROW["apply several"], "--force").stderr
    assert "vector  dare_ties(0.7*v.safetensors, -0.3*t::b)" in talk
    assert "verdict exact base" in talk
    shown = run("inspect", "v.safetensors").stdout
    assert "method   grpo" in shown and "licence  apache-2.0" in shown
    assert "b + 1 * ties(0.7*v.safetensors, -0.3*u.safetensors)" in run("inspect", "m").stdout


def test_control_characters_of_a_file_never_reach_the_terminal(tmp_path: Path, family):
    # A tensor may be called anything; a terminal would obey. These do nothing there.
    name = "w\x1b[0m\x02\r\nof two lines"
    hostile = save(tmp_path / "hostile.safetensors", {name: torch.zeros(2)})
    for result in (
        run("inspect", hostile),
        run("inspect", "-v", hostile),
        run("diff", hostile, family.base, "-o", tmp_path / "v.safetensors"),
    ):
        assert "\x1b" not in result.output and "\x02" not in result.output
    strict(run("inspect", hostile, "--json").stdout)


# --------------------------------------------------------------------------------- single answers


def test_the_verdict_is_said_before_the_work(tmp_path: Path, family, vector):
    for target, verdict in ((family.target, "same family"), (family.base, "exact base")):
        result = run("apply", target, vector, "-o", tmp_path / verdict)
        assert f"verdict {verdict}" in result.stderr


def test_a_hostile_recipe_is_an_error_of_ours(tmp_path: Path, family, vector):
    skillvec.apply(family.base, vector, tmp_path / "out")
    true = json.loads(skillvec.open_checkpoint(tmp_path / "out").metadata["skillvec"])
    tensors = load(tmp_path / "out")
    request = true["request"]
    hostile = [
        None, [], "merged", {}, {"kind": "merged"}, true | {"schema": 2}, true | {"lam": "1"},
        true | {"lam": None}, true | {"target": {}}, true | {"target": {"ref": 3}},
        true | {"target": {"ref": None}}, true | {"target": None}, true | {"vector": {}},
        true | {"vector": None}, true | {"vector": {"ref": 3}}, true | {"vector": {"ref": [1]}},
        true | {"vector": {"tuned": 3, "base": 4}}, true | {"request": request | {"lam": "x"}},
        true | {"request": request | {"lam": None}}, true | {"request": request | {"dtype": 3}},
        true | {"request": request | {"rounding": []}}, true | {"request": None},
        true | {"request": request | {"include": 3}},
        true | {"request": request | {"exclude": [3]}},
    ]  # fmt: skip
    part, share = true["vector"], {"vector": true["vector"]["ref"]}
    hostile += [
        true | {"vector": {"recipe": recipe, "parts": parts}}
        for recipe, parts in (
            ({"vectors": []}, []), ({"vectors": [share]}, []), ({"vectors": [share]}, [part, part]),
            ({"vectors": [share] * 2}, [part]), ({"vectors": [share], "op": "nope"}, [part]),
            ({"vectors": [share], "op": 3}, [part]), ({"vectors": 3}, [part]), (3, [part]),
            ({"vectors": [share]}, [3]), ({"vectors": [share]}, [{"ref": 3, "digest": ""}]),
            ({"vectors": [share], "seed": 1 << 99}, [part]),
            ({"vectors": [share | {"weight": "x"}]}, [part]),
            ({"vectors": [share | {"weight": [1, 2]}]}, [part]),
            ({"vectors": [share | {"rules": [{"match": "*", "d": 2}]}], "op": "ties"}, [part]),
            ({"vectors": [share]}, [{"recipe": {"vectors": [share]}, "parts": [part]}]),
            ({"vectors": [share]}, [{"tuned": "nowhere", "base": "nowhere"}]),
        )
    ]  # fmt: skip
    failures = []
    for number, recipe in enumerate(hostile):
        metadata = {"format": "pt", "skillvec": json.dumps(recipe)}
        path = save(tmp_path / str(number), tensors, metadata)
        for verb, codes in (("inspect", (0,)), ("verify", (1, 2, 3))):
            try:
                code = run(verb, path).exit_code
            except Exception as error:  # collected, so that one run shows them all
                code = repr(error)
            if code not in codes:
                failures.append(f"{verb}, recipe {number}: {code}")
    assert not failures, "\n".join(failures)
