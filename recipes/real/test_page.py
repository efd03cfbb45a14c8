"""docs/real.md from seeds: what is said first, each seed by itself, what is left out."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from real_seeds import make_seed

from skillvec.recipes.claims.claims import table
from skillvec.recipes.claims.rules import Spread
from skillvec.recipes.claims.sections import judge_claims
from skillvec.recipes.real import page as module
from skillvec.recipes.real.claims import PLAIN, knowledge_is_not_enough, list_claims
from skillvec.recipes.real.figures import draw_curve
from skillvec.recipes.real.page import (
    list_commands,
    main,
    narrow,
    tell_first,
    tell_left_out,
    thinking,
    write_page,
)
from skillvec.recipes.real.results import gather, read_seeds, write_seed

SETTINGS = {"model": "SmolLM2-135M-Instruct", "subjects": 25}


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder docs/ with three seeds, the page of which is written."""
    pytest.importorskip("vl_convert")
    docs = tmp_path_factory.mktemp("docs")
    for seed in range(3):
        line = make_seed(docs / "runs" / str(seed), seed)
        write_seed(line, seed, SETTINGS, docs / "real" / f"seed-{seed}.json")
    assert main(["--page", str(docs / "real.md")]) == 0
    return docs


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the figures for drawn."""
    monkeypatch.setattr(module, "render", lambda _: [])


def one_page(
    folder: Path, *, seeds: int = 1, skip: Any = lambda name: False, **means: float
) -> str:
    """Return the page of seeds that are made for it."""
    files = [folder / "real" / f"seed-{seed}.json" for seed in range(seeds)]
    for seed, file in enumerate(files):
        line = make_seed(folder / str(seed), seed, skip if not seed else lambda _: False, **means)
        write_seed(line, seed, SETTINGS, file)
    write_page(files, folder / "real.md")
    return (folder / "real.md").read_text()


def test_the_page_of_three_seeds(docs: Path) -> None:
    text = (docs / "real.md").read_text()
    assert "{" not in text and "nan" not in text and str(docs) not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
    verdicts = tables[1][2:]
    assert len(verdicts) == 16 and all("**too few seeds**" in row for row in verdicts)
    assert all(re.search(r"\| [0-3] of 3 seeds \|$", row) for row in verdicts)
    assert [int(n) for n in re.findall(r"^## (\d+)\.", text, re.MULTILINE)] == [*range(1, 11)]
    assert "Every seed has finished all of its stages." in text
    assert "not to other trainings" in text and "needs 10 seeds. Here are 3" in text
    for name in ("lambda", "arms", "layers", "forgetting"):
        svg = (docs / "images" / f"real-{name}.svg").read_text()
        assert svg.startswith("<svg") and f"images/real-{name}.svg" in text


def test_the_first_five_lines_say_what_does_not_hold_and_then_what_does(docs: Path) -> None:
    lines = (docs / "real.md").read_text().splitlines()[:6]
    assert lines[0].startswith("# ") and lines[1] == "" == lines[5]
    assert lines[2].startswith("- **Does not show in every seed:**")
    assert "two rounds of RL beat one with as many steps (people: K = 2 less K = 1" in lines[2]
    assert lines[3].startswith("- **Found:** the model answers about people ")
    assert "the skill lifts answers about subjects that RL never saw;" in lines[3]
    assert "and not for other trainings" in lines[4] and "want 10 seeds" in lines[4]


def test_the_opposite_is_said_first(tmp_path: Path, drawn: None) -> None:
    first = one_page(tmp_path, **{"pre-injection": 0.95}).splitlines()[2]
    assert first.startswith(
        "- **The opposite shows in every seed of this:** adding the skill after"
    )
    assert "people: post-hoc less pre-injection -0." in first and "0 of 1 seeds)" in first


def test_a_seed_by_itself_is_shown_with_its_interval(docs: Path) -> None:
    seeds = read_seeds(sorted((docs / "real").glob("*.json")))
    found = gather(seeds)
    gap = found.exact("tools", "lambda 1") - found.exact("tools", "SFT only")
    text = (docs / "real.md").read_text()
    (row,) = re.findall(r"^\| over SFT only; tools: \+ v less SFT only \|.*$", text, re.MULTILINE)
    cells = row.strip("| ").split(" | ")[-4:]
    assert cells == [*(f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
                       for one in gap.within()), "3 of 3 seeds"]  # fmt: skip
    # what is no mean of questions stands alone
    (row,) = re.findall(r"^\| people: KL of \+ v less SFT only \|.*$", text, re.MULTILINE)
    assert row.endswith("| +0.000 | +0.000 | +0.000 | 3 of 3 seeds |")


def test_a_page_of_enough_seeds_has_verdicts(tmp_path: Path, drawn: None) -> None:
    one_page(tmp_path)
    whole = json.loads((tmp_path / "real" / "seed-0.json").read_text())
    files = [tmp_path / "real" / f"seed-{seed}.json" for seed in range(10)]
    for seed, file in enumerate(files):
        file.write_text(json.dumps(whole | {"seed": seed}))
    write_page(files, tmp_path / "real.md")
    text = (tmp_path / "real.md").read_text()
    assert "too few seeds" not in text and "corrected for all tests" in text.splitlines()[4]
    (row,) = re.findall(r"^\| \[2\].*over SFT only.*$", text, re.MULTILINE)
    assert "| **holds** |" in row and row.endswith("| 10 of 10 seeds |")
    assert "Here are 10." in text and "mean [95 % interval]" in text


def test_one_seed_with_stages_that_are_missing(tmp_path: Path, drawn: None) -> None:
    gone = ("people/asked-K_=_2", "people/asked-RL_on_the_target", "angles")
    text = one_page(tmp_path, skip=lambda name: name in gone)
    assert (
        "Left out, without numbers in any seed: 4. Two rounds of refinement beat one; 6. The RL"
        " and the SFT update are nearly orthogonal; 7. RL on the target is the upper bound."
    ) in text
    assert f"Seed 0 has not finished {', '.join((gone[1], gone[0], gone[2]))}." in text
    assert [int(n) for n in re.findall(r"^## (\d+)\.", text, re.MULTILINE)] == [
        1,
        2,
        3,
        5,
        8,
        9,
        10,
    ]
    assert "two rounds of RL" not in text and "| [6]" not in text


def test_a_claim_rests_on_the_seeds_that_have_its_numbers(tmp_path: Path, drawn: None) -> None:
    gone = ("people/asked-sequential", "people/asked-K_=_2")
    text = one_page(tmp_path, seeds=3, skip=lambda name: name in gone)
    assert "people, sequential: not in seed 0." in text
    assert "Claim 4 rests on seed 1, 2 alone." in text
    rounds, order = (text.split(f"\n## {n}. ")[1].split("\n## ")[0] for n in (4, 5))
    for section in (rounds, order):
        (head,) = (line for line in section.splitlines() if line.startswith("| test |"))
        assert ("| seed 0 |" in head) is (section is order) and "| seed 1 | seed 2 |" in head
    assert "against pre-injection" in order and "against sequential" not in order
    assert "| 0 of 2 seeds |" in rounds and "seeds pass" in order


def test_the_gain_is_cut_into_form_and_use(docs: Path) -> None:
    found = gather(read_seeds(sorted((docs / "real").glob("*.json"))))
    for arm, exact, contains in (("SFT only", 0.2, 0.5), ("lambda 1", 0.7, 0.75)):
        found.scores["people", arm, "exact"] = Spread((exact,) * 3)
        found.scores["people", arm, "contains"] = Spread((contains,) * 3)
    claim = knowledge_is_not_enough(found)
    assert "of the gain of v about people, +0.500, +0.250 (50% of it) is use and +0.250 form" in (
        claim.found
    )
    assert [part.name for part in claim.parts] == [
        "by facts that are told and not answered", "by what v adds beyond form",
    ]  # fmt: skip
    assert claim.parts[1].tests[0].spread.mean == pytest.approx(0.25)


def test_every_part_has_plain_words_but_one_that_another_says(docs: Path) -> None:
    found = gather(read_seeds(sorted((docs / "real").glob("*.json"))))
    judged = judge_claims([make(found) for make in list_claims(1280)])
    parts = {(n, v.part.name) for n, (_, verdicts) in judged.items() for v in verdicts}
    assert parts - {*PLAIN} == {(8, "within a domain")}
    assert tell_first(judged, found, 10).count("\n") == 2


def test_commands_are_cut_down_to_the_evidence(docs: Path) -> None:
    (seed, *_) = read_seeds(sorted((docs / "real").glob("*.json")))
    commands = list_commands((("people", "lambda 1"), ("people", "random"), "angles"), seed)
    assert [line.split("OUT/")[1].split()[0] for line in commands] == [
        "stages/people-sft_t.yaml", "rl", "people/asked", "rl", "stages/tools-sft_t.yaml",
        "people/round-1/skill.safetensors",
    ]  # fmt: skip
    assert commands[-1].startswith("skillvec orthogonality") and len({*commands}) == 6
    (asked,) = (line for line in commands if "real.ask" in line)
    assert "'lambda 1=1*OUT" in asked and "random=1*OUT" in asked and "lambda 0.5" not in asked
    assert narrow("ask --arms 'K = 2=1*v' c= --probed c 'K = 2' --limit 3", {"K = 2"}) == (
        "ask --arms 'K = 2=1*v' --probed 'K = 2' --limit 3"
    )
    assert list_commands((("people", "no such arm"), "no such stage"), seed) == []


def test_thinking_is_told_by_the_length_of_an_answer(docs: Path) -> None:
    seeds = read_seeds(sorted((docs / "real").glob("*.json")))
    assert thinking(seeds) == "Not measured yet."

    def add(seed: int, tokens: int, gain: float) -> None:
        marks = {"SFT only": "0" * 10, "lambda 1": "1" * round(10 * gain) + "0" * 10}
        arms = {arm: {"stage": "asked", "means": {"ends": mean}, "marks": {"ends": marks[arm][:10]}}
                for arm, mean in (("SFT only", 0.0), ("lambda 1", gain))}  # fmt: skip
        seeds[seed]["scores"][f"thinking {tokens}"] = {"groups": [["a", 5], ["b", 5]], "arms": arms}
        seeds[seed]["trainings"].setdefault("people/round-1/rl", {})["max_completion_length"] = 4

    for seed, tokens, gain in ((0, 64, 0.9), (0, 16, 0.8), (2, 16, 0.1)):
        add(seed, tokens, gain)
    gains = [(one := gather([seed])).exact("people", "lambda 1").mean
             - one.exact("people", "SFT only").mean for seed in seeds]  # fmt: skip
    text = thinking(seeds)
    assert f"in seed 0 at lambda 1 it is {gains[0]:+.3f} / +0.800 / +0.900 for 4 / 16 / 64" in text
    assert "64 tokens and grows; " in text and "in seed 1" not in text
    assert "for 4 / 16 tokens and does not grow with the length" in text
    (row,) = re.findall(r"^\| 16 \| ends \| lambda 1 \|.*$", text, re.MULTILINE)
    assert re.match(r"\| 16 \| ends \| lambda 1 \| 0.000 to 0.800: \+0.800 \[.*: \+0.100 \[", row)
    (row,) = re.findall(r"^\| 64 \|.*$", text, re.MULTILINE)
    assert row.endswith("| - |") and "marked alike" not in text
    add(0, 64, 0.8)
    assert (
        "+0.800 / +0.800 for 4 / 16 / 64 tokens and does not grow with the length, with every"
        " question marked alike at 16 and 64; " in thinking(seeds)
    )
    assert tell_left_out(seeds, [], {}) == "Every seed has finished all of its stages."


def test_a_seed_of_other_parts_alone_takes_no_claim_away(docs: Path, drawn: None) -> None:
    files = sorted((docs / "real").glob("*.json"))
    before = (docs / "real.md").read_text()
    other = json.loads(files[0].read_text()) | {"seed": 7, "angles": None}
    arms = {arm: {"stage": "asked", "means": {"ends": 0.5}} for arm in ("SFT only", "lambda 1")}
    other["scores"] = {"thinking 16": {"groups": [], "arms": arms}}
    alone = docs / "alone.json"
    alone.write_text(json.dumps(other))
    write_page([*files, alone], docs / "more.md")
    text = (docs / "more.md").read_text()
    assert "| 16 | ends | lambda 1 | 0.500 to 0.500: +0.000 |" in text
    head, _, _ = text.partition("## How long an answer may be")
    assert head == before.partition("## How long an answer may be")[0]
    with pytest.raises(ValueError, match=r"no claim has its numbers in any of the seeds \(7,\)"):
        write_page([alone], docs / "none.md")


def test_sections_of_other_modules_stand_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: None
) -> None:
    (tmp_path / "real").mkdir()
    for name in ("anatomy-0", "anatomy-1"):
        (tmp_path / "real" / f"{name}.json").write_text(json.dumps({"rank": 4}))
    other = SimpleNamespace(section=lambda files: f"Rank 4, from {len(files)} files.")
    own = "skillvec.recipes.real.anatomy"
    monkeypatch.setattr(module.importlib, "import_module", {own: other}.__getitem__)
    monkeypatch.setattr(module.importlib.util, "find_spec", {own: True}.get)
    text = one_page(tmp_path)
    assert "## Anatomy of the skill\n\nRank 4, from 2 files." in text
    assert "## Regimes of a bf16 skill\n\nNot measured yet." in text


def test_the_curve_is_read_without_its_page(docs: Path) -> None:
    seeds = read_seeds(sorted((docs / "real").glob("*.json")))
    spec = draw_curve(gather(seeds), "SmolLM2")
    subtitle = " ".join(spec["title"]["subtitle"])
    assert "SmolLM2" in subtitle and "mean of 3 seeds; band: lowest to highest" in subtitle
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["area", "line", "point"]
    alone = draw_curve(gather(seeds[:1]), "SmolLM2")  # one seed has no band
    assert [layer["mark"]["type"] for layer in alone["layer"]] == ["line", "point"]
    assert "One seed." in alone["title"]["subtitle"][1]


@pytest.mark.parametrize("kept", [("nothing",), ("people/asked-K",)])
def test_a_seed_that_has_only_begun_is_refused(
    kept: tuple[str, ...], tmp_path: Path, drawn: None
) -> None:
    with pytest.raises(ValueError, match=r"no claim has its numbers in any of the seeds \(0,\)"):
        one_page(tmp_path, skip=lambda name: not name.startswith(kept))


@pytest.mark.parametrize("kept", [("people/asked",), ("tools/asked", "angles"), ("angles",)])
def test_a_page_of_what_little_is_finished(
    kept: tuple[str, ...], tmp_path: Path, drawn: None
) -> None:
    text = one_page(tmp_path, skip=lambda name: not name.startswith((*kept, "tools/asked")))
    assert (" people in each of S and T" in text) is ("people/asked" in kept)
    assert "Left out, without numbers in any seed: " in text and "nan" not in text


def test_the_command_refuses_what_is_no_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--page", str(tmp_path / "real.md")]) == 2
    assert "expected files of different seeds, found none" in capsys.readouterr().err
    assert table(["a"], [["1"]]) == "| a |\n| --- |\n| 1 |"
