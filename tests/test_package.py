"""What the package says of itself: how it is cited, which Pythons, where flaws are reported."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import skillvec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (said["cff-version"], said["type"]) == ("1.2.0", "software")
    assert said["version"] == skillvec.__version__ and said["license"] == PROJECT["license"]
    assert said["authors"] == [{"name": "The skillvec authors"}]
    assert said["keywords"] == PROJECT["keywords"]
    (paper,) = said["references"]
    assert paper["doi"].endswith("arXiv.2601.11258") and paper["url"].endswith("abs/2601.11258")
    assert len(paper["authors"]) == 3 and all("family-names" in name for name in paper["authors"])


def test_the_pythons_that_are_named_go_up_from_the_least_that_is_needed() -> None:
    named = [row.rpartition(" ")[2] for row in PROJECT["classifiers"] if " 3." in row]
    assert named == [f"3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert not [row for row in PROJECT["classifiers"] if row.startswith("License")]  # PEP 639


@pytest.mark.parametrize("folder", ["skillvec", "recipes"])
def test_sources_are_of_the_least_python(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 11))


def test_the_security_policy_names_a_private_way_and_no_address() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in text and "docs/security.md" in text
    assert not re.search(r"\S+@\S+\.\w+", text)
