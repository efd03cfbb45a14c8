"""The published JSON Schemas: those of the program, closed, and what every command prints.

Reports of every option of every command are held against them in tests/cli/test_options.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_schemas
import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator
from schemas import FOLDER, check_json, find_problem, validator

from skillvec import errors, verbs
from skillvec.cli.commands import main
from skillvec.cli.group import OF_PROGRAM

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def printed(result: Result) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(result.stdout)
    return said


@pytest.fixture(scope="module")
def reports(family: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Reports of several commands, as they are printed."""
    folder = tmp_path_factory.mktemp("reports")
    lines = {
        "diff": ["diff", family.tuned, family.base, "-o", folder / "v.safetensors"],
        "inspect": ["inspect", folder / "v.safetensors"],
        "model": ["inspect", family.base, "--digest"],
        "apply": ["apply", family.target, folder / "v.safetensors", "-o", folder / "out"],
        "verify": ["verify", folder / "out"],
        "norms": ["norms", folder / "v.safetensors"],
        "planned": ["norms", folder / "v.safetensors", "--dry-run"],
    }
    found = {}
    for name, words in lines.items():
        result = run(*words, "--json")
        assert result.exit_code == 0, result.output
        found[name] = printed(result)
    return found


# ------------------------------------------------------------------------------------- the schemas


def test_the_schemas_are_those_of_the_program(tmp_path: Path) -> None:
    json_schemas.write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    held = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert made == held, "run `python docs/json_schemas.py`"


def test_every_command_has_a_schema_and_every_schema_a_command() -> None:
    assert sorted([*{*main.commands} - {*OF_PROGRAM}, "error"]) == NAMES
    found = [json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES]
    assert len({schema["$id"] for schema in found}) == len(NAMES)


def forms(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every form of an object in a schema, and where it stands."""
    if isinstance(schema, dict):
        if "properties" in schema or schema.get("type") == "object":
            yield where, schema
        for key, inner in schema.items():
            yield from forms(inner, f"{where}/{key}")
    elif isinstance(schema, list):
        for i, inner in enumerate(schema):
            yield from forms(inner, f"{where}/{i}")


# recipes that a user writes, choices of a search, and what a newer manifest may say of a side
OPEN = ("recipe", "point", "start", "base", "tuned", "parents/items", "numbers_of_vector",
        "numbers_of_pair")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_its_forms_are_closed(name: str) -> None:
    schema = json.loads((FOLDER / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    for where, form in forms(schema):
        if name == "inspect" and (where == "" or where.endswith("/if")):
            continue  # one of closed forms, by `kind`
        shut = "additionalProperties" in form or "unevaluatedProperties" in form
        opened = form.get("additionalProperties") is True or not shut
        place = where.removesuffix("/anyOf/0")
        assert not opened or place.endswith(OPEN), f"{name}{where}: open"
        assert {*form.get("required", ())} <= {*form.get("properties", ())}


# -------------------------------------------------------------------------------- what they refuse


def test_reports_are_what_the_schemas_say(reports: dict[str, dict[str, Any]]) -> None:
    for said in reports.values():
        check_json(said)


@pytest.mark.parametrize("name", ["diff", "inspect", "model", "apply", "verify", "norms"])
def test_a_schema_refuses_what_no_command_prints(
    name: str, reports: dict[str, dict[str, Any]]
) -> None:
    said = reports[name]
    for key in ("format_version", "counts", "warnings", "tensors"):
        assert find_problem({k: v for k, v in said.items() if k != key}), key
    assert "new" in (find_problem(said | {"new": 1}) or "")
    assert find_problem(said | {"format_version": 2})
    assert find_problem(said | {"warnings": "text"})
    first, *others = said["tensors"]
    for change in ({"status": "unheard of"}, {"new": 1}, {"name": None}, {"shape": [1, -1]},
                   {"dtype": "bfloat16"}):  # fmt: skip
        assert find_problem(said | {"tensors": [first | change, *others]}), change


def test_what_only_the_work_tells_comes_together(reports: dict[str, dict[str, Any]]) -> None:
    """A report has all of it or, of a dry run, none."""
    for name, key in {"diff": "exactness", "apply": "cosine", "norms": "pairs"}.items():
        assert find_problem({k: v for k, v in reports[name].items() if k != key}), name
    planned = reports["planned"]
    assert "norms" not in planned and "nbytes_free" not in planned  # nothing is written
    assert find_problem(planned | {"norms": []})


def test_kinds_of_inspect_do_not_mix(reports: dict[str, dict[str, Any]]) -> None:
    assert find_problem(reports["model"] | {"kind": "vector"})
    assert find_problem(reports["inspect"] | {"kind": "model"})
    assert find_problem(reports["model"] | {"digest": "0" * 31})


# ------------------------------------------------------------------------------------------ errors


def failure(result: Result, code: int) -> dict[str, Any]:
    said = printed(result)
    check_json(said)
    assert result.exit_code == code == said["error"]["exit_code"]
    assert " ".join(said["error"]["message"].split())[:60] in " ".join(result.stderr.split())
    return said


def test_an_error_is_a_document_too(tmp_path: Path, family: Any) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"short")
    out = tmp_path / "v.safetensors"
    wrong: dict[str, list[object]] = {
        "UsageError": ["diff", tmp_path / "absent.safetensors", family.base, "-o", out],
        "FormatError": ["inspect", tmp_path / "broken.safetensors"],
        "IncompatibleError": ["apply", family.base, family.base, "-o", tmp_path / "out"],
    }
    for kind, words in wrong.items():
        said = failure(run(*words, "--json"), getattr(errors, kind).exit_code)
        assert (said["error"]["type"], said["verb"]) == (kind, words[0])
        quiet = run(*words)
        assert quiet.stdout == "" and quiet.stderr == run(*words, "--json").stderr
    assert not {*tmp_path.iterdir()} - {tmp_path / "broken.safetensors"}


@pytest.mark.parametrize(
    "words", [["diff", "a"], ["diff", "a", "b", "--codec", "zip"], ["nothing"]]
)
def test_what_click_refuses_is_a_document_too(words: list[str]) -> None:
    said = failure(run(*words, "--json"), 2)
    assert said["error"]["type"] == "UsageError"
    assert said["verb"] == (None if words == ["nothing"] else "diff")
    assert run(*words).stdout == ""


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(KeyboardInterrupt(), "Interrupted"), (OSError(28, "No space left", "disk"), "OSError")],
)
def test_what_breaks_a_run_off_is_a_document_too(
    raised: BaseException, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(verbs, "inspect", broken)
    assert failure(run("inspect", "x", "--json"), 1)["error"]["type"] == kind


def test_the_schema_of_errors_knows_every_type() -> None:
    known = validator("error").schema["properties"]["error"]["properties"]["type"]["enum"]
    assert {*known} == {"OSError", "Interrupted"} | {
        name for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }  # fmt: skip
    assert find_problem({"verb": None, "format_version": 1, "error": {"type": "New"}})
