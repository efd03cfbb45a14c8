"""The published JSON Schemas (docs/schemas), held against what the command line says."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from skillvec.cli.screen import FORMAT_VERSION, Screen
from skillvec.report import Report

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"


@cache
def validator(name: str) -> Draft202012Validator:
    schema = json.loads((FOLDER / f"{name}.json").read_text())
    return Draft202012Validator(schema)


def find_problem(said: dict[str, Any]) -> str | None:
    """Return where a document is not what the schema of its verb says, None where it is."""
    name = "error" if "error" in said else said["verb"]
    found = best_match(validator(name).iter_errors(said))
    if found is None:
        return None
    return f"{name}: {'.'.join(map(str, found.absolute_path)) or 'report'}: {found.message:.400}"


def check_json(said: dict[str, Any]) -> None:
    assert find_problem(said) is None, find_problem(said)


def check_all_shown(patch: pytest.MonkeyPatch) -> None:
    """Check every report that commands show from now on, whether they print it as JSON or not."""
    show = Screen.show

    def checked(screen: Screen, report: Report, last_line: str | None = None) -> None:
        said = report.to_dict() | report.now
        check_json(json.loads(json.dumps({"format_version": FORMAT_VERSION} | said)))
        show(screen, report, last_line)

    patch.setattr(Screen, "show", checked)
