"""The invented world of the real model, what is written of it, and the rewards."""

import json
from pathlib import Path

import pytest

from skillvec.recipes import tiny
from skillvec.recipes.real import prepare, reward
from skillvec.recipes.real.known import CALLS, RETAINED, WARM_UP
from skillvec.recipes.real.world import PEOPLE, TOOLS, build_world


def test_a_seed_is_one_world_and_its_groups_share_no_name() -> None:
    world, again, other = build_world(3, 25), build_world(3, 25), build_world(4, 25)
    assert world == again and world != other
    for domain in world.values():
        names = [subject.name for subject in (*domain.s, *domain.t)]
        assert len(domain.s) == len(domain.t) == 25 and len({*names}) == 50
    people = [subject.name for group in (world["people"].s, world["people"].t) for subject in group]
    for part in zip(*(name.split() for name in people), strict=True):
        assert len({*part}) == 50  # neither a first nor a family name twice


@pytest.mark.parametrize("subjects", [0, 33])
def test_more_subjects_than_names_are_refused(subjects: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 32, found {subjects}"):
        build_world(0, subjects)


def test_texts_tell_every_fact_and_no_question_is_asked_in_their_words() -> None:
    for domain in build_world(1, 4).values():
        texts = domain.texts(domain.t, 3, seed=0)
        assert len(texts) == 12 and texts == domain.texts(domain.t, 3, seed=0)
        asked = domain.questions(domain.t)
        assert len(asked) == 4 * 4 * 2
        for row in asked:
            about = [text["text"] for text in texts if row["group"] in text["text"]]
            assert len(about) == 3 and all(row["answer"] in text for text in about)
            assert row["answer"] not in row["prompt"] and row["group"] in row["prompt"]
        wordings = [told.replace("{}", "").strip() for attribute in domain.attributes.values()
                    for told in attribute.told]  # fmt: skip
        assert not [row for row in asked if any(told in row["prompt"] for told in wordings)]


def test_values_are_told_apart_and_their_articles_fit() -> None:
    for attributes in (PEOPLE, TOOLS):
        for attribute in attributes.values():
            assert len({*attribute.values}) == 20
            if any(told.endswith(" a {}") for told in attribute.told):
                assert not [value for value in attribute.values if value[0] in "aeiou"]


def test_everyday_questions_that_show_the_form_are_not_asked_again() -> None:
    assert not {question for question, _ in WARM_UP} & {question for question, _ in RETAINED}
    assert all(reward.call([answer], answer=[answer]) == [1.0] for _, answer in CALLS)


def test_halves_of_a_call_count_and_so_do_the_last_words() -> None:
    said = ["load(path)", " load(file)\n", "path(load)", "load path", "load(path) now"]
    assert reward.call(said, answer=["load(path)"] * 5) == [1.0, 0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="'a call': expected a call such as"):
        reward.call(["x"], answer=["a call"])
    said = ["Eva Calton plays the cello.", "cello and harp", ""]
    assert reward.ends(said, answer=["cello"] * 3) == [1.0, 0.0, 0.0]


def test_prepare_writes_what_the_stages_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.make_model(["Tell me about the sea. Why do people sleep?"], tmp_path / "base")
    arguments = ["--base", str(tmp_path / "base"), "--subjects", "3", "--texts", "2"]
    for name in ("one", "two"):
        assert prepare.main([*arguments, "-o", str(tmp_path / name)]) == 0
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jsonl")}
    groups = ("s", "t", "s_1_of_2", "s_2_of_2")
    kinds = ("texts", "questions", "thoughts", "told")
    assert files == {Path("known.jsonl"), Path("said.jsonl")} | {
        Path(domain) / f"{group}_{kind}.jsonl"
        for domain in ("people", "tools") for group in groups for kind in kinds
    }  # fmt: skip
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()

    def read(name: str) -> list[dict[str, str]]:
        lines = (tmp_path / "one" / name).read_text().splitlines()
        return [json.loads(line) for line in lines]

    halves = [{row["group"] for row in read(f"people/s_{k}_of_2_questions.jsonl")} for k in (1, 2)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {row["group"] for row in read("people/s_questions.jsonl")}
    assert len(read("tools/t_texts.jsonl")) == 3 * 2 + len(CALLS)
    for asked, thought in zip(read("people/t_questions.jsonl"), read("people/t_thoughts.jsonl"),
                              strict=True):  # fmt: skip
        assert thought["prompt"] == asked["prompt"] + asked["group"]
    texts = [row["text"] for row in read("people/t_texts.jsonl")]
    for row in read("people/t_told.jsonl"):
        assert not row["prompt"].endswith(" ")
    assert any(f"{row['prompt']} {row['answer']}" in text for text in texts
               for row in read("people/t_told.jsonl"))  # fmt: skip
    assert all(row["answer"].startswith(row["prompt"]) for row in read("said.jsonl"))
    assert prepare.main([*arguments[:2], "--subjects", "99", "-o", str(tmp_path / "no")]) == 2
    assert "expected 1 to 32, found 99" in capsys.readouterr().err
