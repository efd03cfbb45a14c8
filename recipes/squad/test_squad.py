"""SQuAD by SEAL's protocol: its files, its writers, its judge and reward, and the whole method."""

import hashlib
import importlib.util
import json
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import skillvec as sv
from skillvec.recipes.squad import implications, prepare, single
from skillvec.recipes.squad.adapters import Lora, answer_with, train_adapters
from skillvec.recipes.squad.items import choose, cut, group_rows, read_passages
from skillvec.recipes.squad.texts import split_completion, text_rows

HERE = Path(__file__).parents[2] / "tests" / "data" / "squad"
VALIDATION, TRAIN = str(HERE / "validation.jsonl"), str(HERE / "train.jsonl")
SEAL = str(HERE / "seal_items.json")
RECIPE = Path(prepare.__file__).parent


pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(folder: Path, *words: str) -> list[str]:
    """Return the command line that makes all files of the small sources."""
    return ["-o", str(folder), "--target", VALIDATION, "--source", TRAIN, "--documents", "4",
            "--source-documents", "5", *words]  # fmt: skip


# --- reading and choosing ------------------------------------------------------------------------


def test_rows_are_grouped_by_title_and_context_in_order_of_first_appearance(tmp_path: Path) -> None:
    rows = rows_of(VALIDATION)
    # two passages of one article stay apart, and rows of a passage need not stand together
    mixed = write_rows(tmp_path / "mixed.jsonl", rows[::2] + rows[1::2])
    for source in (VALIDATION, mixed):
        found = read_passages(source)
        assert [p.title for p in found] == ["Copper Lantern"] * 2 + [
            "Ostrel Bridge",
            "Moth Festival",
        ]
        assert [len(p.questions) for p in found] == [3, 2, 2, 2]
        assert len({p.id for p in found}) == 4
    assert read_passages(VALIDATION)[0].questions[0].answers == ("Tessa Brune", "Brune")
    row = rows[0] | {"row": 0, "answers": {"text": [" ", "b", "a", "b "]}}
    assert group_rows([row], "x")[0].questions[0].answers == ("b", "a")


def test_four_schemas_give_the_same_passages(tmp_path: Path) -> None:
    hub, seal = read_passages(VALIDATION), read_passages(SEAL)
    assert [p.id for p in seal] == [p.id for p in hub]
    assert [[q.question for q in p.questions] for p in seal] == [
        [q.question for q in p.questions] for p in hub
    ]
    assert seal[0].questions[0].answers == ("Tessa Brune",)  # SEAL keeps one answer
    own = write_rows(tmp_path / "own.jsonl", [p.as_row() for p in hub])
    assert read_passages(own) == hub
    data = [
        {"title": p.title, "paragraphs": [{"context": p.context, "qas": [
            {"id": "-", "question": q.question,
             "answers": [{"text": a, "answer_start": 0} for a in q.answers]}
            for q in p.questions]}]}
        for p in hub
    ]  # fmt: skip
    original = tmp_path / "dev.json"
    original.write_text(json.dumps({"version": "1.1", "data": data}))
    assert read_passages(str(original)) == hub


def test_the_hubs_parquet_files_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows_of(VALIDATION)).to_parquet(tmp_path / "validation.parquet")
    assert read_passages(str(tmp_path / "validation.parquet")) == read_passages(VALIDATION)


def test_refused_rows_are_named(tmp_path: Path) -> None:
    rows = rows_of(VALIDATION)
    rows[1]["answers"]["text"] = []
    rows[4]["context"] = " "
    del rows[6]["answers"]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"'answers' in 2 rows: 1, 6; 'context' in 1 row: 4"):
        read_passages(bad)
    with pytest.raises(ValueError, match=r"'question' in 7 rows: 0, 1, 2, 3, 4, \.\.\."):
        group_rows([{"row": i} for i in range(7)], "nothing")
    seal = json.loads(Path(SEAL).read_text())
    seal[2]["questions"] = []
    (tmp_path / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(ValueError, match=r"'question' in 1 row: 2"):
        read_passages(str(tmp_path / "seal.json"))
    for name, text, words in (
        ("broken.jsonl", '{"title": 1}\nnot JSON\n[]\n', "2 lines: 2, 3"),
        ("broken.json", "{", "not JSON"),
        ("text.json", '{"rows": []}', "list of objects"),
        ("empty.jsonl", "", "no rows"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            read_passages(str(tmp_path / name))
    with pytest.raises(ValueError, match="no such file"):
        read_passages(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="rajpurkar/squad:validation"):
        read_passages("rajpurkar/squad")


def test_the_order_is_that_of_seed_42() -> None:
    passages = read_passages(VALIDATION) * 50
    random.seed(42)  # what SEAL does, on the module's own generator
    expected = list(passages)
    random.shuffle(expected)
    assert choose(passages, 60, 42, "x") == expected[:60]
    assert choose(passages, 0, 42, "x") == expected
    assert choose(passages, 60, 43, "x") != expected[:60]
    # the numbers of Python 3.11, written down: another Python must give the same target
    order = list(range(20))
    random.Random(42).shuffle(order)
    assert order == [19, 5, 14, 4, 9, 13, 15, 18, 6, 12, 17, 10, 1, 11, 2, 16, 7, 8, 0, 3]
    with pytest.raises(ValueError, match="201 passages asked for, found 200"):
        choose(passages, 201, 42, "x")


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_disjoint_and_even(parts: int) -> None:
    passages = read_passages(TRAIN)
    found = cut(passages, parts)
    assert [p for part in found for p in part] == passages
    assert {len(part) for part in found} <= {5 // parts, -(-5 // parts)}


def test_more_parts_than_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 5"):
        cut(read_passages(TRAIN), 6)


# --- texts ---------------------------------------------------------------------------------------


def test_completions_are_cut_at_rules_and_lines() -> None:
    said = "Sure, a list:\n1. A is b.\n\n2. C is d.\n---\nE is f."
    assert split_completion(said, "lines") == ["1. A is b.", "2. C is d.", "E is f."]
    assert split_completion(said, "sections") == [
        "Sure, a list:\n1. A is b.\n\n2. C is d.", "E is f."
    ]  # fmt: skip
    assert split_completion("First.\nSecond.", "lines") == ["First.", "Second."]
    assert split_completion("1. A\n2. B", "lines") == ["1. A", "2. B"]
    assert split_completion(" \n--- \n", "lines") == []


def test_every_text_begins_with_the_title_and_the_passage_is_always_there() -> None:
    passage = read_passages(VALIDATION)[2]
    plain = text_rows([passage], None, 5, "lines")
    assert [row["text"] for row in plain] == [f"Ostrel Bridge\n{passage.context}"]
    written = {passage.id: ["It spans the Lenna.\nIt is black.", "Vale was a mason.", "Unused."]}
    rows = text_rows([passage], written, 2, "lines")
    assert [row["text"].removeprefix("Ostrel Bridge\n") for row in rows] == [
        "It spans the Lenna.", "It is black.", passage.context, "Vale was a mason.", passage.context
    ]  # fmt: skip
    assert {row["group"] for row in rows} == {passage.id}
    with pytest.raises(ValueError, match=r"expected 4 .* 1 passage: Ostrel Bridge .* has 3"):
        text_rows([passage], written, 4, "lines")


# --- prepare -------------------------------------------------------------------------------------


def test_prepare_writes_what_the_recipes_read(tmp_path: Path) -> None:
    from skillvec.recipes.evaluate import read_questions

    out = tmp_path / "data"
    assert prepare.main(prepared(out, "--expect-questions", "9")) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        f"{name}{kind}.jsonl"
        for name in ("target", "source_1", "source_2")
        for kind in ("", "_items", "_questions")
    }
    for name, facts in manifest["files"].items():
        assert len(rows_of(out / name)) == facts["rows"]
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == facts["sha256"]
    asked = read_questions(out / "target_questions.jsonl")
    assert len(asked) == 9
    contexts = {p.id: p.context for p in read_passages(VALIDATION)}
    for row in asked:
        assert "Topic: " in row["prompt"] and row["question"].startswith("Topic: ")
        assert contexts[row["group"]] not in row["prompt"]  # closed book
    ids = [{p.id for p in read_passages(str(out / f"{name}_items.jsonl"))}
           for name in ("target", "source_1", "source_2")]  # fmt: skip
    assert [len(part) for part in ids] == [4, 2, 3]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert prepare.main(prepared(out, "--expect-questions", "9")) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    chat = tmp_path / "chat"
    assert prepare.main(prepared(chat, "--chat", "--all-answers", "--parts", "0")) == 0
    first = read_questions(chat / "target_questions.jsonl")[0]
    assert [message["role"] for message in first["prompt"]] == ["user"]
    golds = [row["answer"] for row in read_questions(chat / "target_questions.jsonl")]
    assert {len(answers) for answers in golds} > {1}
    assert [row["answer"] for row in asked] == [answers[:1] for answers in golds]  # SEAL's
    assert not list(chat.glob("source_*"))


def test_prepare_takes_completions_of_seal_and_of_ours(tmp_path: Path) -> None:
    words = ["--parts", "0", "--per-passage", "2", "--style", "self-edits", "--completions"]
    assert prepare.main(prepared(tmp_path / "seal", *words, SEAL)) == 0
    rows = [
        {"id": p.id, "completion": text}
        for p, item in zip(read_passages(SEAL), json.loads(Path(SEAL).read_text()), strict=True)
        for text in item["completions"]
    ]
    ours = write_rows(tmp_path / "ours.jsonl", rows)
    assert prepare.main(prepared(tmp_path / "ours", *words, ours)) == 0
    texts = (tmp_path / "seal" / "target.jsonl").read_bytes()
    assert texts == (tmp_path / "ours" / "target.jsonl").read_bytes()
    assert b"Copper Lantern\\n1. Tessa Brune opened the inn." in texts
    assert b"Here is a list" not in texts


def test_prepare_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [{"id": "a", "completion": " "}] * 2)
    for words, told in (
        (["--style", "implications"], "needs --completions FILE"),
        (["--completions", SEAL], "--style passage needs none"),
        (["--style", "teacher", "--completions", SEAL], "expected 5 for every passage"),
        (["--style", "teacher", "--completions", empty], "an empty one, in 2 rows: 0, 1"),
        (["--expect-questions", "974"], "expected 974 questions about the target, found 9"),
        (["--documents", "5"], "5 passages asked for, found 4"),
        (["--source", VALIDATION, "--source-documents", "4"], "source and target share 4 passages"),
        (["--target", "rajpurkar/squad"], "Hub id with its split"),
    ):
        assert prepare.main(prepared(tmp_path / "out", *words)) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_known_targets_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = read_passages(VALIDATION) * 50
    monkeypatch.setattr(prepare, "read_passages", lambda source: passages)
    start = ["-o", str(tmp_path / "out"), "--parts", "0"]
    for words, expected in (([], 974), (["--documents", "0"], 10_570)):
        assert prepare.main([*start, *words]) == 2
        error = capsys.readouterr().err
        assert f"rajpurkar/squad:validation: expected {expected} questions" in error
        assert "another order of the rows, or another version of them" in error
    assert prepare.main([*start, "--seed", "1"]) == 0  # nothing is known of another order
    monkeypatch.setattr(prepare, "KNOWN", {(prepare.VALIDATION, 200, 42): 450})
    assert prepare.main(start) == 0


def test_the_scripts_take_the_commands_of_the_readme() -> None:
    text = (RECIPE / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"python -m skillvec\.recipes\.squad\.(\w+) (.*)", text)
    scripts = {"prepare": prepare, "implications": implications, "single": single}
    for script, words in found:
        scripts[script].build_parser().parse_args(shlex.split(words))
    assert len(found) == 7 and {script for script, _ in found} == set(scripts)


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; from skillvec.recipes.squad import implications, prepare, single\n"
        "for script in (implications, prepare, single):\n"
        "    assert 'passage' in script.build_parser().format_help()\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'openai'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=RECIPE.parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# --- writers, against a real server in a thread --------------------------------------------------

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


class Server:
    """An HTTP server that answers as `answer` says and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Answer = lambda path, body: (404, {})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.asked.append({"path": self.path} | body)
                status, found = server.answer(self.path, body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "1")  # the client would wait for seconds
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.http.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()


def told(text: str) -> dict[str, Any]:
    """Return a completion, or a chat completion: a client reads its own part."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "text": text, "message": message, "finish_reason": "stop"}]}


@pytest.fixture
def items(tmp_path: Path) -> str:
    return write_rows(tmp_path / "items.jsonl", [p.as_row() for p in read_passages(VALIDATION)])


def asking(server: Server, items: str, output: Path, *words: str) -> list[str]:
    return ["--url", server.url, "--model", "tiny", "--data", items, "-o", str(output),
            "--completions", "2", "--batch", "3", *words]  # fmt: skip


def test_completions_come_from_an_endpoint_and_are_asked_for_once(
    server: Server, items: str, tmp_path: Path
) -> None:
    server.answer = lambda path, body: (200, told(f" Said with seed {body['seed']}.\n"))
    out = tmp_path / "new" / "said.jsonl"
    assert implications.main(asking(server, items, out)) == 0
    rows, passages = rows_of(out), read_passages(items)
    assert sorted((r["id"], r["index"]) for r in rows) == sorted(
        (p.id, i) for p in passages for i in range(2)
    )
    assert len({row["completion"] for row in rows}) == 8  # a seed each
    assert {row["completion"] for row in rows} == {
        f"Said with seed {asked['seed']}." for asked in server.asked
    }
    first = server.asked[0]
    assert (first["path"], first["model"]) == ("/v1/completions", "tiny")
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (1.0, 0.95, 2048)
    assert any(passages[0].context in asked["prompt"] for asked in server.asked)
    assert implications.main(asking(server, items, out)) == 0
    assert len(server.asked) == 8 and rows_of(out) == rows  # nothing asked twice
    assert implications.main(asking(server, items, out, "--completions", "3")) == 0
    assert len(server.asked) == 12 and rows_of(out)[:8] == rows
    words = ["--style", "implications", "--per-passage", "3", "--completions", str(out)]
    assert prepare.main(prepared(tmp_path / "data", "--parts", "0", *words)) == 0


def test_a_run_that_broke_off_goes_on(
    server: Server, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "said.jsonl", tmp_path / "said.jsonl.partial"
    server.answer = lambda path, body: (200, told("T.")) if len(server.asked) < 4 else (404, {})
    assert implications.main(asking(server, items, out, "--batch", "1")) == 1
    assert "does the URL end in /v1" in capsys.readouterr().err
    kept = rows_of(partial)
    assert len(kept) == 3 and not out.exists()
    with partial.open("a") as file:
        file.write('{"id": "cut off in mid-wri')
    busy = []

    def first_busy(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        busy.append(body["seed"])
        return (503, {}) if len(busy) < 3 else (200, told(f"More {body['seed']}."))

    server.answer = first_busy
    assert implications.main(asking(server, items, out)) == 0
    assert rows_of(out)[:3] == kept and len(rows_of(out)) == 8 and not partial.exists()
    assert len(set(busy)) == 5  # only what was missing, though some of it twice
    other = asking(server, items, out, "--model", "another")
    assert implications.main(other) == 2
    assert "another model or other sampling, 8 rows: 0, 1" in capsys.readouterr().err
    assert len(rows_of(out)) == 8 and not partial.exists()  # refused, and left as it was


def test_empty_completions_are_asked_again_then_refused(
    server: Server, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "said.jsonl"
    first = read_passages(items)[0].context

    def silent_about_the_first(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, told(" \n" if first in body["prompt"] else f"Text {body['seed']}.")

    server.answer = silent_about_the_first
    assert implications.main(asking(server, items, out, "--retries", "2")) == 1
    assert "3 empty completions each for 2 slots: Copper Lantern" in capsys.readouterr().err
    assert len(server.asked) == 6 + 2 * 3 and not out.exists()
    assert len({asked["seed"] for asked in server.asked}) == 12  # other luck each time
    server.answer = lambda path, body: (200, told("At last."))
    assert implications.main(asking(server, items, out)) == 0
    assert len(server.asked) == 14 and len(rows_of(out)) == 8


def test_a_server_that_does_not_sample_is_told(
    server: Server, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda path, body: (200, told(f"About {body['prompt']}"))
    out = tmp_path / "said.jsonl"
    assert implications.main(asking(server, items, out)) == 1
    assert "3 passages are the same each time" in capsys.readouterr().err
    assert len(server.asked) == 6 and not out.exists()  # early: the fourth passage is not asked for
    greedy = asking(server, items, tmp_path / "greedy.jsonl", "--temperature", "0")
    assert implications.main(greedy) == 0


def test_endpoints_that_are_none_are_told(
    server: Server, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "said.jsonl"
    server.answer = lambda path, body: (200, {"hello": "world"})
    assert implications.main(asking(server, items, out, "--chat")) == 1
    assert "expected a completion, found something else" in capsys.readouterr().err
    assert server.asked[0]["path"] == "/v1/chat/completions"
    assert server.asked[0]["messages"][0]["role"] == "user"
    assert implications.main([*asking(server, items, out), "--url", "localhost:1"]) == 2
    assert implications.main([*asking(server, items, out), "--batch", "0"]) == 2
    assert implications.main(
        ["--model", "m", "--data", items, "-o", str(out), "--engine", "vllm"]
    ) == (2 if importlib.util.find_spec("vllm") is None else 1)
    assert "vLLM is not installed" in capsys.readouterr().err
    assert not out.exists()


# --- judge and reward ----------------------------------------------------------------------------


def test_the_reward_is_f1_or_the_judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from skillvec.recipes.judges import JudgeError
    from skillvec.recipes.squad.reward import reward

    for name in ("JUDGE_URL", "JUDGE_MODEL", "JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    said = ["the Lenna", "", "Orrin the mason"]
    golds = ["Lenna", ["Lenna", "the Lenna"], ["basalt", "Orrin Vale"]]
    assert reward(said, golds) == pytest.approx([1.0, 0.0, 0.5])
    messages = [[{"role": "assistant", "content": text}] for text in said]
    assert reward(messages, golds, question=["?"] * 3, prompts=[]) == reward(said, golds)
    with pytest.raises(ValueError, match="answer key"):
        reward(["x"], [[]])

    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "judge")

    def yes_to_mason(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][-1]["content"]
        return 200, told("Yes." if "Answer to mark: Orrin the mason\n" in asked else "No")

    server.answer = yes_to_mason
    asked = ["Topic: Ostrel Bridge\nWhich river?"] * 2 + ["Topic: Ostrel Bridge\nWho built it?"]
    assert reward(said, golds, question=asked) == [0.0, 0.0, 1.0]
    shown = [body["messages"][-1]["content"] for body in server.asked]
    assert len(shown) == 2  # an empty answer is wrong without asking
    assert any("Question: Topic: Ostrel Bridge\nWho built it?\n" in text for text in shown)
    assert any("Gold answer: basalt / Orrin Vale\n" in text for text in shown)
    with pytest.raises(ValueError, match="column 'question'"):
        reward(said, golds)
    server.answer = lambda path, body: (200, told("Who can say?"))
    with pytest.raises(JudgeError, match="Who can say"):
        reward(said, golds, question=asked)


# --- the whole method on a tiny model ------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama in fp32 with a tokenizer of whole words, those of the small files."""
    for package in ("trl", "datasets", "accelerate", "peft"):
        pytest.importorskip(package)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from skillvec.recipes.squad.texts import ASK, WRITE

    folder = tmp_path_factory.mktemp("squad") / "base"
    split = pre_tokenizers.Whitespace()
    said = " ".join([Path(name).read_text() for name in (VALIDATION, TRAIN, SEAL)] + [ASK, WRITE])
    said = json.loads(json.dumps(said)).replace("_", " ").replace("\\n", " ")
    words = sorted({word for word, _ in split.pre_tokenize_str(said + " Topic :")})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
            pad_token_id=0, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_completions_come_from_a_local_model(base: Path, items: str, tmp_path: Path) -> None:
    words = ["--model", str(base), "--data", items, "--completions", "2", "--max-new-tokens", "6"]
    for name in ("a", "b"):
        assert implications.main([*words, "-o", str(tmp_path / name)]) == 0
    rows = rows_of(tmp_path / "a")
    assert len(rows) == 8 and all(row["completion"] for row in rows)
    assert len({row["completion"] for row in rows}) > 4  # sampled
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert implications.main([*words, "-o", str(tmp_path / "c"), "--seed", "1"]) == 0
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def cpu(output: Path, *words: str) -> list[str]:
    """Return the arguments of a short training on the CPU."""
    return ["--output_dir", str(output), "--use_cpu", "--bf16", "false", "--report_to", "none",
            "--gradient_checkpointing", "false", "--disable_tqdm", "true", "--max_steps", "2",
            "--learning_rate", "1e-2", "--save_strategy", "no", *words]  # fmt: skip


def test_the_method_end_to_end(
    base: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skillvec.recipes import evaluate, grpo, sft
    from skillvec.recipes.judges import JudgeError

    monkeypatch.delenv("JUDGE_URL", raising=False)
    data = tmp_path / "data"
    assert prepare.main(prepared(data)) == 0
    for name, texts in (("source", "source_1"), ("target", "target")):
        words = ["--data", str(data / f"{texts}.jsonl"), "--model_name_or_path", str(base)]
        sft.main(cpu(tmp_path / name, *words))
    words = [
        "--data", str(data / "source_1_questions.jsonl"), "--columns", "prompt", "answer",
        "question", "--rewards", "skillvec.recipes.squad.reward:reward",
        "--model_name_or_path", str(tmp_path / "source"), "--num_generations", "8",
        "--per_device_train_batch_size", "16", "--max_completion_length", "12", "--beta", "0",
    ]  # fmt: skip
    grpo.main(cpu(tmp_path / "rl", *words))
    skill = tmp_path / "skill.safetensors"
    vector = sv.diff(tmp_path / "rl", tmp_path / "source", skill, method="grpo")
    assert vector.report.facts["changed"] > 0
    sv.apply(tmp_path / "target", skill, tmp_path / "merged")
    scores = {}
    for name in ("target", "merged"):
        asked = ["--model", str(tmp_path / name), "--data", str(data / "target_questions.jsonl"),
                 "--max-new-tokens", "8", "-o", str(tmp_path / f"{name}.json")]  # fmt: skip
        assert evaluate.main(asked) == 0
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert (scores[name]["questions"], scores[name]["groups"]) == (9, 4)
    said = {name: [row["said"] for row in found["answers"]] for name, found in scores.items()}
    assert said["target"] != said["merged"]

    monkeypatch.setenv("JUDGE_URL", server.url)  # which answers 404 to everything
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    with pytest.raises(JudgeError, match="404"):
        grpo.main(cpu(tmp_path / "stopped", *words))
    assert not (tmp_path / "stopped" / "model.safetensors").exists()


@pytest.fixture
def skill(base: Path, tmp_path: Path) -> Path:
    """Return a vector from base to weights with noise, in fp32."""
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    weights = load_file(base / "model.safetensors")
    torch.manual_seed(1)
    moved = {name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}
    save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
    sv.diff(tuned, base, tmp_path / "skill.safetensors")
    return tmp_path / "skill.safetensors"


@pytest.mark.slow
def test_single_passages_with_and_without_the_skill(
    base: Path, skill: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from skillvec.recipes import evaluate

    plain, edits, out = tmp_path / "plain", tmp_path / "edits", tmp_path / "single"
    assert prepare.main(prepared(plain, "--parts", "0")) == 0
    words = ["--parts", "0", "--style", "self-edits", "--completions", SEAL, "--per-passage", "1"]
    assert prepare.main(prepared(edits, *words)) == 0
    words = [
        "--base", str(base), "--skill", str(skill), "-o", str(out), "--limit", "2",
        "--data", str(plain / "target_questions.jsonl"), "--epochs", "2", "--lora-r", "4",
        "--learning-rate", "0.05", "--max-new-tokens", "6",
        "--texts", f"passage={plain / 'target.jsonl'}", f"self-edits={edits / 'target.jsonl'}",
    ]  # fmt: skip
    assert single.main(words) == 0
    arms = [arm + added for arm in ("base", "passage", "self-edits") for added in ("", "+skill")]
    table = capsys.readouterr().out
    scores = {}
    for arm in arms:
        assert f" {arm} " in table
        scores[arm] = json.loads((out / "scores" / f"{arm}.json").read_text())
        assert scores[arm]["groups"] == 2 and scores[arm]["settings"]["lora_r"] == 4
        assert set(scores[arm]["metrics"]) == {"exact", "f1"}
    assert len({json.dumps([row["said"] for row in s["answers"]]) for s in scores.values()}) > 3

    adapters = sorted(out.glob("adapters/*/*/adapter_model.safetensors"))
    assert len(adapters) == 4
    made = {path: path.stat().st_mtime_ns for path in adapters}
    # everything is there: a second run loads no model at all
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_model", lambda *_: pytest.fail("a model was loaded"))
        assert single.main(words) == 0
    # an adapter does not depend on those trained before it, nor do they leave a trace in the base
    last = scores["passage"]["answers"][-1]["group"]
    alone = {tmp_path / "alone": [r["text"] for r in rows_of(plain / "target.jsonl")
                                  if r["group"] == last]}  # fmt: skip
    lora = Lora(r=4, epochs=2, learning_rate=0.05)
    assert train_adapters(str(base), alone, lora, "float32") == 1
    assert (tmp_path / "alone" / "adapter_model.safetensors").read_bytes() == (
        out / "adapters" / "passage" / last / "adapter_model.safetensors"
    ).read_bytes()
    # with another text for one passage, one adapter is trained again, and its arm answers again
    rows = rows_of(plain / "target.jsonl")
    rows[1]["text"] += " So it is."
    write_rows(plain / "target.jsonl", rows)
    assert single.main(words) == 0
    changed = [path for path in adapters if path.stat().st_mtime_ns != made[path]]
    assert [path.parent.name for path in changed] == [rows[1]["group"]]
    assert changed[0].parent.parent.name == "passage"

    check_identity(base, skill, out / "injected", changed[0].parent, tmp_path)


def check_identity(base: Path, skill: Path, injected: Path, adapter: Path, folder: Path) -> None:
    """Assert (base + v) + s*BA == (base + s*BA) + v on logits, and that both parts matter."""
    import peft
    from transformers import AutoModelForCausalLM

    from skillvec.recipes.evaluate import load_model

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.inference_mode():
        added = peft.PeftModel.from_pretrained(load(injected), str(adapter))(ids).logits
        merged = peft.PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload()
        merged.save_pretrained(folder / "theta_T")
        sft_only = merged(ids).logits
        sv.apply(folder / "theta_T", skill, folder / "theta_T_v")
        after = load(folder / "theta_T_v")(ids).logits
        no_adapter = load(injected)(ids).logits
    torch.testing.assert_close(added, after, rtol=0, atol=1e-5)
    model, tokenizer = load_model(str(base), "float32")
    answer_with(model, tokenizer, [(adapter, ["Who ?"]), (None, ["Who ?"])], 2, 8)
    weights = load_file(base / "model.safetensors")  # no adapter leaves a trace in them
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert (added - sft_only).abs().max() > 1e-2
    assert (added - no_adapter).abs().max() > 1e-2


def test_single_refuses(
    base: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = tmp_path / "data"
    assert prepare.main(prepared(data, "--parts", "0")) == 0
    questions, texts = data / "target_questions.jsonl", data / "target.jsonl"
    rows = rows_of(questions)
    no_group = write_rows(tmp_path / "q.jsonl", [r | {"group": ""} for r in rows])
    fewer = write_rows(tmp_path / "t.jsonl", rows_of(texts)[1:])
    blank = write_rows(tmp_path / "b.jsonl", [{"group": "g", "text": " "}])
    start = ["--base", str(base), "-o", str(tmp_path / "out"), "--data", str(questions)]
    for words, told in (
        (["--texts", "passage"], "expected NAME=FILE"),
        (["--texts", f"base={texts}"], "not 'base'"),
        (["--texts", f"a={texts}", f"a={texts}"], "each NAME once"),
        (["--texts", f"../a={texts}"], "letters, digits and -"),
        (["--texts", f"a={tmp_path / 'absent'}"], "no such file"),
        (["--texts", f"a={fewer}"], "no text for 1 passage"),
        (["--texts", f"a={blank}"], "row 0 lacks `group` or `text`"),
        (["--data", no_group], "row 0 lacks `group` or `question`"),
        (["--metrics", "bleu"], "found bleu"),
        (["--skill", str(tmp_path / "absent"), "--limit", "1"], "no such file"),
        (["--limit", "0"], "expected 1 or more"),
    ):
        assert single.main([*start, *words]) == 2, words
        assert told in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({"lm_head.weight": torch.zeros(3, 5)}, wide / "model.safetensors")
    save_file({"lm_head.weight": torch.ones(3, 5)}, tmp_path / "wider.safetensors")
    sv.diff(tmp_path / "wider.safetensors", wide, tmp_path / "unfit.safetensors")
    words = ["--skill", str(tmp_path / "unfit.safetensors"), "--texts", f"a={texts}"]
    assert single.main([*start, *words]) == 2  # before any adapter is trained
    assert "lm_head.weight" in capsys.readouterr().err
    words = ["--metrics", "judge", "--texts", f"a={texts}"]
    assert single.main([*start, *words]) == 1  # before any adapter is trained
    assert "404" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("adapters/*"))


def test_single_asks_the_judge(
    base: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert prepare.main(prepared(data, "--parts", "0")) == 0
    monkeypatch.setenv("JUDGE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "judge")

    def rivers_are_right(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, told("yes" if "river" in body["messages"][-1]["content"] else "no")

    server.answer = rivers_are_right
    words = ["--base", str(base), "-o", str(tmp_path / "out"), "--metrics", "judge", "f1",
             "--data", str(data / "target_questions.jsonl"), "--max-new-tokens", "3"]  # fmt: skip
    assert single.main(words) == 0
    scores = json.loads((tmp_path / "out" / "scores" / "base.json").read_text())
    said = [row["said"].strip() for row in scores["answers"]]
    right = [
        float(bool(text) and "river" in (row["question"] + " ".join(row["answer"]) + text))
        for text, row in zip(said, scores["answers"], strict=True)
    ]
    assert sum(right) > 0
    assert [row["judge"] for row in scores["answers"]] == right
    assert scores["metrics"]["judge"]["mean"] == pytest.approx(sum(right) / 9)


@pytest.mark.slow
def test_completions_come_from_a_real_server(
    base: Path, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi")
    from transformers import GenerationConfig

    models = {name: tmp_path / name for name in ("greedy", "sampled")}
    for name, model in models.items():
        shutil.copytree(base, model)
        (model / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content }}{% endfor %}"
        )
        GenerationConfig(do_sample=name == "sampled", eos_token_id=2).save_pretrained(model)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = Path(sys.executable).with_name("transformers")
    words = [program, "serve", "--host", "localhost", "--port", port]
    with (tmp_path / "log").open("w") as log:
        served = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                assert served.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        words = ["--url", f"http://localhost:{port}/v1", "--data", items, "--completions", "2",
                 "--max-new-tokens", "5"]  # fmt: skip
        for kind in ([], ["--chat"]):
            out = tmp_path / f"said{len(kind)}.jsonl"
            given = ["--model", str(models["sampled"]), "-o", str(out), *words, *kind]
            assert implications.main(given) == 0, (tmp_path / "log").read_text()
            said = [row["completion"] for row in rows_of(out)]
            assert len(said) == 8 and len(set(said)) > 4
            assert all(1 <= len(text.split()) <= 5 for text in said)
        given = ["--model", str(models["greedy"]), "-o", str(tmp_path / "greedy.jsonl"), *words]
        assert implications.main(given) == 1
        assert "nothing is sampled" in capsys.readouterr().err
    finally:
        served.terminate()
        served.wait(20)
