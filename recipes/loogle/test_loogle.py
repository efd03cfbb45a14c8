"""LooGLE: both schemas, the split, the reward, and the whole method on a tiny model."""

import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from skillvec.recipes.judges import JudgeError
from skillvec.recipes.loogle import pairs as writing
from skillvec.recipes.loogle import reward as scoring
from skillvec.recipes.loogle.documents import Asked, Document, group, read_documents, read_questions
from skillvec.recipes.loogle.pairs import Pair, find_pairs
from skillvec.recipes.loogle.prepare import RECALL, main, passages_of, prepare, question_rows
from skillvec.recipes.squad.items import Passage
from skillvec.recipes.stand_in import StandIn

pytest.importorskip("datasets")

DATA = Path(__file__).parents[2] / "tests" / "data" / "loogle"
SMALL: dict[str, Any] = {
    "source": 2, "target": 2, "parts": 2, "chunk_words": 20, "overlap_words": 5,
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_schemas_give_the_same_files(tmp_path: Path) -> None:
    made = {
        name: prepare(tmp_path / name, data=str(DATA / f"{name}.jsonl"), **SMALL)
        for name in ("old", "new")
    }
    names = sorted(path.name for path in (tmp_path / "old").iterdir())
    assert names == [
        "manifest.json", "source_1.jsonl", "source_1_passages.jsonl", "source_1_questions.jsonl",
        "source_2.jsonl", "source_2_passages.jsonl", "source_2_questions.jsonl", "target.jsonl",
        "target_passages.jsonl", "target_questions.jsonl",
    ]  # fmt: skip
    for name in names[1:]:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    for key in made["old"].keys() - {"data", "data_sha256"}:
        assert made["old"][key] == made["new"][key]
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest == made["new"]
    assert manifest["data"] == "new.jsonl" and manifest["documents"] == 4


def test_target_is_first_source_is_last_and_nothing_is_in_two_sets(tmp_path: Path) -> None:
    sets = prepare(tmp_path, data=str(DATA / "old.jsonl"), **SMALL)["sets"]
    titles = {name: [one["title"] for one in chosen["documents"]] for name, chosen in sets.items()}
    assert titles == {
        "target": ["Harbour of Veldt", "Ansel Brück"],
        "source_1": ["The Long Fence (film)"],
        "source_2": ["Order of the Green Reed"],
    }
    for name, chosen in sets.items():
        texts, asked = (
            rows_of(tmp_path / f"{name}.jsonl"),
            rows_of(tmp_path / f"{name}_questions.jsonl"),
        )
        assert (len(texts), len(asked)) == (chosen["passages"], chosen["questions"])
        assert (chosen["pairs"], chosen["passages_without_pairs"]) == (0, len(texts))
        numbers = {one["number"] for one in chosen["documents"]}
        assert {row["group"] for row in asked} == numbers
    harbour = rows_of(tmp_path / "target_questions.jsonl")[:3]
    assert [row["answer"] for row in harbour] == ["Maren Toll", "1871", "Forty boats."]
    quoted = rows_of(tmp_path / "target_questions.jsonl")[4]
    assert quoted["answer"] == '"Old Grey"'


def test_questions_are_closed_book_and_name_their_document(tmp_path: Path) -> None:
    prepare(tmp_path, data=str(DATA / "old.jsonl"), **SMALL)
    rows = rows_of(tmp_path / "target_questions.jsonl")
    told = "Please answer the question below. \nQuestion: Who dug the harbour of Veldt?\nAnswer: "
    assert rows[0] == {
        "prompt": [{"role": "system", "content": RECALL}, {"role": "user", "content": told}],
        "answer": "Maren Toll",
        "question": "Who dug the harbour of Veldt?",
        "group": 0,
    }  # fmt: skip
    assert RECALL.index("sentences of the document") < RECALL.index("<answer>")  # evidence first
    assert rows[4]["question"] == "What was the largest bell called?"  # the question only
    prepare(tmp_path, data=str(DATA / "old.jsonl"), topic="missing", **SMALL)
    rows = rows_of(tmp_path / "target_questions.jsonl")
    # "largest bell" says nothing of Brück; "harbour" is a word of the title
    assert rows[4]["question"] == "Topic: Ansel Brück\nWhat was the largest bell called?"
    assert rows[1]["question"] == "When was the harbour dug?"
    documents, _ = read_documents(str(DATA / "old.jsonl"))
    for topic, count in (("always", 3), ("never", 0), ("missing", 1)):
        asked = question_rows(documents[1], topic)
        assert sum(row["question"].startswith("Topic: Ansel Brück\n") for row in asked) == count


@pytest.mark.parametrize("words", [3, 10, 20, 47, 48, 1000])
def test_chunks_cover_every_word_in_order(words: int) -> None:
    for count in (1, 2, 9, 47, 48, 49):
        text = " \n".join(f"w{i}" for i in range(count))
        made = passages_of(Document(0, "The title", text, ()), words, overlap=2)
        assert {piece.title for piece in made} == {"The title"}
        bodies = [piece.context.split() for piece in made]
        assert all(len(body) <= words for body in bodies)
        joined = bodies[0] + [word for body in bodies[1:] for word in body[2:]]
        assert joined == text.split()
        assert all(body[:2] == before[-2:] for before, body in zip(bodies, bodies[1:]))  # noqa: B905, RUF007
        assert bodies[-1][2:] or len(bodies) == 1  # the last one adds something
    assert passages_of(Document(0, "t", "w0 \nw1", ()), 5, 0)[0].context == "w0 \nw1"


SAID = """1. **Question:** Who cast ninety bells?
**Evidence:** He cast ninety bells, the largest
 of them "Old Grey".
**Answer:** Ansel Brück

Question: A question without an answer?
Evidence: None.

Question: Where was the crew?
Evidence: the crew lived in tents.
Answer: In tents.
- Question: Who cast ninety bells?
- Evidence: Nobody.
- Answer: Nobody."""


def test_pairs_are_found_in_what_a_model_wrote() -> None:
    assert find_pairs(SAID) == [
        Pair("Who cast ninety bells?", 'He cast ninety bells, the largest of them "Old Grey".',
             "Ansel Brück"),
        Pair("Where was the crew?", "the crew lived in tents.", "In tents."),
        Pair("Who cast ninety bells?", "Nobody.", "Nobody."),
    ]  # fmt: skip
    for text in ("", "Question: a\nEvidence: b", "Question: a\nAnswer: b", "Answer: x\nQuestion: y",
                 "Question: a\nEvidence: \nAnswer: b"):  # fmt: skip
        assert find_pairs(text) == []


def test_a_question_counts_once_in_a_passage(tmp_path: Path) -> None:
    passages = [Passage("T", f"Text {i}.", ()) for i in range(2)]
    rows = [{"id": passages[0].id, "completion": SAID}] * 2
    found = writing.pairs_of(Path(write_rows(tmp_path / "w.jsonl", rows)), passages)
    asked = [pair.question for pair in found[passages[0].id]]
    assert asked == ["Who cast ninety bells?", "Where was the crew?"]
    assert found[passages[0].id][0].answer == "Ansel Brück"  # the first counts
    assert found[passages[1].id] == []  # half of the passages may have none


def test_pairs_become_texts_of_stage_1_and_answers_of_stage_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    prepare(first, data=str(DATA / "old.jsonl"), **SMALL)
    files = [str(file) for file in sorted(first.glob("*_passages.jsonl"))]
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        words = ["--url", server.url, "--model", "rules", "--chat", "-o", str(tmp_path / "w.jsonl")]
        assert writing.main([*words, "--data", *files]) == 0
        assert writing.main([*words, "--data", *files]) == 0  # nothing is asked again
        server.shutdown()
    row = rows_of(tmp_path / "w.jsonl")[0]
    assert (row["sampling"]["temperature"], row["sampling"]["max_new_tokens"]) == (0.7, 1024)
    made = prepare(tmp_path, data=str(DATA / "old.jsonl"), pairs=tmp_path / "w.jsonl", **SMALL)
    whole = made["sets"]["source_1"]
    assert whole["pairs"] > whole["passages_without_pairs"]
    texts = [row["text"] for row in rows_of(tmp_path / "source_1.jsonl")]
    passages = rows_of(tmp_path / "source_1_passages.jsonl")
    assert texts[: len(passages)] == [f"{p['title']}\n{p['context']}" for p in passages]
    assert len(texts) == whole["passages"] + whole["pairs"]
    form = rows_of(tmp_path / "source_1_form.jsonl")
    assert len(form) == whole["pairs"]
    for text, shown in zip(texts[len(passages) :], form, strict=True):
        title, question, evidence, answer = text.split("\n")
        assert (title, evidence in " ".join(p["context"].replace("\n", " ") for p in passages)) == (
            "The Long Fence (film)", True,
        )  # fmt: skip
        question, answer = question.removeprefix("Question: "), answer.removeprefix("Answer: ")
        assert shown["prompt"][1]["content"].endswith(f"Question: {question}\nAnswer: ")
        said = shown["completion"][0]["content"]
        assert said == f"{evidence}\n<answer>{answer}</answer>"
        assert scoring.answer_of(said) == answer
    # what was written about other stretches, or is no pair, is refused
    with pytest.raises(ValueError, match="without a completion of one of these passages"):
        prepare(first, data=str(DATA / "old.jsonl"), pairs=tmp_path / "w.jsonl",
                **(SMALL | {"chunk_words": 30}))  # fmt: skip
    rows = [row | {"completion": "Well."} for row in rows_of(tmp_path / "w.jsonl")]
    write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match="no pair of question, evidence and answer for"):
        prepare(first, data=str(DATA / "old.jsonl"), pairs=tmp_path / "bad.jsonl", **SMALL)
    assert (first / "manifest.json").is_file()  # refused before anything is removed
    write_rows(tmp_path / "none.jsonl", [{"title": "", "context": "x"}])
    assert writing.main([*words, "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "expected title and context; 1 row: 0" in capsys.readouterr().err


def test_a_second_run_leaves_no_file_of_the_first(tmp_path: Path) -> None:
    prepare(tmp_path, data=str(DATA / "old.jsonl"), **SMALL)
    prepare(tmp_path, data=str(DATA / "old.jsonl"), **(SMALL | {"parts": 1}))
    assert not (tmp_path / "source_2.jsonl").exists()


OLD = {"input": "Text.", "title": "T", "qa_pairs": "[{'Q': 'q?', 'A': 'a', 'S': 's'}]"}
NEW = {"context": "Text.", "title": "T", "question": "q?", "answer": "a", "doc_id": "1"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([OLD, OLD | {"qa_pairs": "none"}], r"row 1: qa_pairs is no Python literal"),
        ([OLD | {"qa_pairs": "[{'Q': 'q?'"}], r"row 0: qa_pairs is no Python literal"),
        ([OLD | {"qa_pairs": "len('q')"}], "no Python literal"),
        ([OLD | {"qa_pairs": "[]"}], r"row 0: qa_pairs: expected a list of \{Q, A\}, found '\[\]'"),
        ([OLD | {"qa_pairs": "[{'Q': 'q?'}]"}], "expected a list of"),
        ([OLD | {"qa_pairs": "[{'Q': 'q?', 'A': ' '}]"}], r"1 questions .*row 0, pair 0; --skip"),
        ([NEW | {"answer": ""}] * 7, r"7 questions .*row 4; \.\.\.; --skip-empty"),
        ([NEW, NEW | {"question": None}], r"1 questions .*row 1"),
        ([NEW | {"context": " "}], "row 0: the document's title or text is empty"),
        ([NEW, NEW | {"context": "Other."}], "row 1: doc_id '1' had another title or text"),
        ([{"input": "x", "question": "q"}], "expected columns input, title, qa_pairs or context, "
         "title, question, answer; found input, question"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_by_row(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_documents(write_rows(tmp_path / "rows.jsonl", rows))


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"input": "x"\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: cannot be read: .*JSON"):
        read_documents(str(broken))


def test_lists_of_pairs_and_numbers_are_read() -> None:
    pairs = [{"Q": "q?", "A": 3}, {"Q": "p?", "A": True}]
    asked = list(read_questions([OLD | {"qa_pairs": pairs}], list(OLD), "x"))
    assert [one.answer for one in asked] == ["3", ""]  # true is no answer: counted as empty


def test_empty_questions_are_left_out_only_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(DATA / "new.jsonl")
    rows[1]["answer"] = ""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["-o", str(tmp_path / "out"), "--data", data, "--source", "2", "--target", "2"]
    assert main(words) == 2
    assert "1 questions are empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--skip-empty"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped_questions"] == 1 and manifest["sets"]["target"]["questions"] == 5


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"source": 3}, "4 documents; the first 2 and the last 3 overlap"),
        ({"parts": 3}, "found 2 target and 2 source documents in 3 parts"),
        ({"target": 0}, "found 0 target"),
        ({"overlap_words": 20}, "found 20 and 20"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / "out", data=str(DATA / "old.jsonl"), **(SMALL | change))


def test_one_text_under_two_titles_is_found(tmp_path: Path) -> None:
    rows = [NEW | {"title": f"T{i}", "doc_id": i, "context": f"Text {i % 3}."} for i in range(4)]
    with pytest.raises(ValueError, match="share 1 texts: 'T3'"):
        prepare(tmp_path / "out", data=write_rows(tmp_path / "rows.jsonl", rows), **SMALL)


def test_questions_of_one_document_are_gathered_wherever_they_stand() -> None:
    asked = [Asked("", title, "x", question, "a") for title, question in ("Ap", "Bq", "Ar")]
    assert [one.questions for one in group(asked)] == [(("p", "a"), ("r", "a")), (("q", "a"),)]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("I think <answer> Maren\nToll </answer>.", "Maren\nToll"),
        ("It was <b>Toll</b>. <Answer>a</ANSWER> no, <answer>b</answer>", "a"),
        ("<answer>cut o", "cut o"),
        ("<answer></answer>", ""),
        (" plain ", "plain"),
        ("", ""),
    ],
)
def test_the_answer_is_in_the_first_tag(reply: str, answer: str) -> None:
    assert scoring.answer_of(reply) == answer


def test_without_a_judge_the_reward_is_f1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("JUDGE_URL", raising=False)
    scoring._say_f1.cache_clear()
    said = [[{"role": "assistant", "content": "<answer>toll</answer>"}], "Maren Toll", "x", ""]
    with caplog.at_level(logging.WARNING):
        got = scoring.reward(said, answer=["Maren Toll"] * 4, question=["q"] * 4, prompts=["p"])
        scoring.reward(said[:1], answer=["a"], question=["q"])
    assert got == pytest.approx([2 / 3, 1.0, 0.0, 0.0])
    assert [record.message for record in caplog.records] == [
        "JUDGE_URL is not set: answers are rewarded by F1"
    ]


def test_with_a_judge_its_verdict_is_the_reward_and_its_failure_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openai")
    from skillvec.recipes.test_judges import endpoint

    with endpoint() as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        monkeypatch.setenv("JUDGE_MODEL", "tiny")
        server.replies = ["True", "False", "what?"]
        asked = {"answer": ["Toll"], "question": ["Who dug it?"]}
        assert scoring.reward(["<answer>Maren Toll</answer>"], **asked) == [1.0]
        assert scoring.reward(["Piet"], **asked) == [0.0]
        assert scoring.reward(["<answer> </answer>"], **asked) == [0.0]  # not asked
        assert len(server.seen) == 2
        shown = server.seen[0]["messages"][0]["content"]
        assert shown.startswith(
            "Question: Who dug it?\nReference answer: Toll\nPredicted answer: Maren Toll\n"
        )
        with pytest.raises(JudgeError, match=r"expected one of true, false.*'what\?'"):
            scoring.reward(["Piet"], **asked)


def test_the_whole_method_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare, SFT, GRPO, cut out the skill, add it to the target's model, ask it: real steps."""
    for package in ("trl", "accelerate"):
        pytest.importorskip(package)
    import skillvec as sv
    from skillvec.recipes import evaluate, grpo, sft
    from skillvec.recipes.test_evaluate import make_model, make_tokenizer

    monkeypatch.delenv("JUDGE_URL", raising=False)
    data, base = tmp_path / "data", tmp_path / "base"
    words = ["--output", str(data), "--data", str(DATA / "new.jsonl"), "--source", "2", "--target",
             "2", "--parts", "1", "--chunk-words", "20", "--overlap-words", "5"]  # fmt: skip
    assert main(words) == 0

    told = " ".join(path.read_text() for path in data.glob("*.jsonl"))
    golds = " ".join(row["answer"] for row in rows_of(data / "source_1_questions.jsonl"))
    # few other words, so that words of the answers come up in random completions
    tokenizer = make_tokenizer(
        ["user", "assistant", *golds.split(), *sorted(set(re.findall(r"\w{7,}", told)))]
    )
    tokenizer.save_pretrained(base)
    make_model(tokenizer, hidden_size=16, room=256).save_pretrained(base)
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 2,
              "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0,
              "learning_rate": 1e-3, "per_device_train_batch_size": 8, "seed": 0}  # fmt: skip

    def train(recipe: Any, start: Path, name: str, file: str, **more: Any) -> Path:
        settings = common | more | {"model_name_or_path": str(start), "data": str(data / file),
                                    "output_dir": str(tmp_path / name)}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
        recipe.main(["--config", str(tmp_path / f"{name}.yaml")])
        return tmp_path / name

    learnt = train(sft, base, "sft", "source_1.jsonl", max_length=64)
    skilled = train(grpo, learnt, "rl", "source_1_questions.jsonl", num_generations=4,
                    rewards=["skillvec.recipes.loogle.reward:reward"], max_completion_length=16,
                    learning_rate=1e-2, columns=["prompt", "answer", "question"])  # fmt: skip
    target = train(sft, base, "target", "target.jsonl", max_length=64)

    vector = sv.diff(skilled, learnt, tmp_path / "skill.safetensors", method="grpo")
    assert vector.report.facts["changed"] > 0  # some completion earned more than another
    sv.apply(target, vector, tmp_path / "merged", lam=1.0)
    words = ["--data", str(data / "target_questions.jsonl"), "--metrics", "exact", "f1",
             "--answer", "skillvec.recipes.loogle.reward:answer_of",
             "--max-new-tokens", "8"]  # fmt: skip
    said: dict[str, list[str]] = {}
    for model in (target, tmp_path / "merged"):
        output = tmp_path / f"{model.name}.json"
        assert evaluate.main(["--model", str(model), "-o", str(output), *words]) == 0
        scores = json.loads(output.read_text())
        assert (scores["questions"], scores["groups"]) == (6, 2)
        assert scores["metrics"]["f1"]["standard_error"] is not None
        said[model.name] = [row["reply"] for row in scores["answers"]]
    assert all(said["target"]) and said["merged"] != said["target"]  # the vector does something
