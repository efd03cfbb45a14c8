"""The examples run as they are, as scripts, and show what they say they show."""

import ast
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

import skillvec as sv
from skillvec.analysis import sweep_page

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ran(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the names that a script leaves, run where nothing of the repository lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # the page of a sweep takes longer to draw than the sweep; tests/trials/test_sweep.py draws it
    monkeypatch.setattr(sweep_page, "html", lambda content: "a page")
    monkeypatch.setattr(sweep_page, "figures", lambda content: [("curve.svg", b"a curve")])
    return runpy.run_path(str(FOLDER / f"{request.param}.py"), run_name="__main__")


@pytest.mark.parametrize("ran", ["make_a_vector"], indirect=True)
def test_a_vector_is_made_added_and_proved(ran: Any) -> None:
    assert ran["proof"].facts["verified"] is True
    assert ran["applied"].facts["gain"] > 0.9
    assert sv.SkillVector.open(ran["VECTOR"]).manifest["exactness"]["claim"] == "bitwise"
    assert ran["merged"].num_parameters() == 45_344


@pytest.mark.parametrize("ran", ["choose_lambda"], indirect=True)
def test_a_sweep_finds_that_the_skill_helps(ran: Any) -> None:
    facts = ran["report"].facts
    assert facts["found"] is True and facts["best"]["lam"] > 0
    assert [one["beaten"] for one in facts["beside"]] == [True]
    assert ran["before"] == ran["after"] != ran["inside"]
    assert (ran["WORK"] / "curve" / "index.html").is_file()


@pytest.mark.parametrize("ran", ["measure"], indirect=True)
def test_two_updates_are_measured_beside_chance(ran: Any) -> None:
    overall = ran["pair"]["overall"]
    assert abs(overall["cosine"]) < 0.3 and overall["cosine_sd"] > 0
    assert overall["control_cosine"] is not None
    assert (ran["WORK"] / "angles" / "report.html").is_file()


def test_every_example_is_run_and_told_of() -> None:
    run = set(re.findall(r'parametrize\("ran", \["(\w+)"\]', Path(__file__).read_text()))
    said = (FOLDER / "README.md").read_text()
    assert run == {*SCRIPTS} and len(SCRIPTS) == 3
    assert {*re.findall(r"examples/(\w+)\.py", said)} == {*SCRIPTS}
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.py").read_text()
        assert "# ## YOUR MODELS" in text and text.startswith("# %% [markdown]\n# # ")
        assert not re.search(r"https?://|from_pretrained\(\"", text)  # nothing is fetched


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_cells_of_an_example_are_whole(name: str) -> None:
    """What opens a script as a notebook cuts it at these lines, and runs one cell at a time."""
    text = (FOLDER / f"{name}.py").read_text()
    cells = re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", text, re.M)
    assert sum(len(head) + len(body) + len("# %%\n") for head, body in cells) == len(text)
    kinds = ["[markdown]" in head for head, _ in cells]
    assert kinds.count(True) > 3 and kinds.count(False) > 3
    for is_text, (_, body) in zip(kinds, cells, strict=True):
        lines = [line for line in body.splitlines() if line]
        assert lines and all(line.startswith("#") for line in lines) == is_text
        assert is_text or ast.parse(body).body
