"""Closed-book evaluation with models whose answers are known word by word."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from skillvec.recipes import evaluate
from skillvec.recipes.evaluate import answer_all, load_model, read_questions, summarize
from skillvec.recipes.judges import JudgeError

PAD, UNK, EOS = "[PAD]", "[UNK]", "[EOS]"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_tokenizer(words: list[str], template: str | None = TEMPLATE) -> Any:
    """Make one token of every word between spaces; the first three are PAD, UNK and EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((PAD, UNK, EOS, *dict.fromkeys(words)))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, unk_token=UNK, eos_token=EOS
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(tokenizer: Any, hidden_size: int = 16, room: int = 128, spread: float = 0.02) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=room, pad_token_id=0, eos_token_id=2,
        initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_chain(after: Mapping[str, str], folder: Path, **options: Any) -> Path:
    """Save a Llama that follows every word by the word that `after` gives, at once, else by EOS.

    Its layers add nothing, its embeddings are the unit vectors, and its head permutes them.
    """
    words = [*after, *after.values(), "user", "assistant"]
    tokenizer = make_tokenizer([word for word in words if word != EOS], **options)
    model = make_model(tokenizer, hidden_size=len(tokenizer))
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer)))
        model.lm_head.weight.zero_()
        for word, token in tokenizer.get_vocab().items():
            follower = tokenizer.convert_tokens_to_ids(after.get(word, EOS))
            model.lm_head.weight[follower, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "paris" after "france", "rome today" after "italy", nothing after "oz"."""
    after = {"france": "paris", "italy": "rome", "rome": "today", "capital": "of", "loop": "loop",
             "greece": "<answer>", "<answer>": "athens", "athens": "</answer>"}  # fmt: skip
    return make_chain(after, tmp_path_factory.mktemp("chain"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"prompt": "capital of france", "answer": "Paris", "group": "a", "question": "France's?"},
        {"prompt": "the capital of italy", "answer": ["Milan", "Rome"], "group": "a"},
        {"prompt": "capital of oz", "answer": "Emerald City", "group": "b"},
    ]
    return write_rows(tmp_path / "questions.jsonl", rows)


def run(chain: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ["--model", str(chain), "--data", str(data), "--output", str(out / "s" / "scores.json")]
    assert evaluate.main([*words, *more]) == 0
    return json.loads((out / "s" / "scores.json").read_text())


def test_answers_are_scored_and_written(
    chain: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["exact", "f1", "first_word"]
    scores = run(chain, questions, tmp_path, "--metrics", *names, "--device", "cpu")
    assert [row["said"] for row in scores["answers"]] == ["paris", "rome today", ""]
    assert [row["exact"] for row in scores["answers"]] == [1.0, 0.0, 0.0]
    assert [row["f1"] for row in scores["answers"]] == [1.0, pytest.approx(2 / 3), 0.0]
    assert [row["first_word"] for row in scores["answers"]] == [1.0, 1.0, 0.0]
    assert {name: score["mean"] for name, score in scores["metrics"].items()} == pytest.approx(
        {"exact": 1 / 3, "f1": 5 / 9, "first_word": 2 / 3}
    )
    assert (scores["questions"], scores["groups"]) == (3, 2)
    assert scores["settings"]["max_new_tokens"] == 64
    assert scores["settings"]["dtype"] == "torch.float32"
    assert scores["answers"][1]["answer"] == ["Milan", "Rome"]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["scores.json"]
    shown = capsys.readouterr().out
    assert "3 questions, 2 groups" in shown and "0.333" in shown


def test_limit_tokens_and_an_answer_function(chain: Path, questions: Path, tmp_path: Path) -> None:
    scores = run(chain, questions, tmp_path, "--limit", "2", "--max-new-tokens", "1",
                 "--answer", "skillvec.recipes.test_evaluate:shout", "--batch", "1")  # fmt: skip
    assert [row["said"] for row in scores["answers"]] == ["PARIS", "ROME"]
    assert [row["reply"] for row in scores["answers"]] == ["paris", "rome"]
    assert scores["metrics"]["exact"] == {"mean": 1.0, "standard_error": None}  # one group
    assert scores["settings"]["answer"] == "skillvec.recipes.test_evaluate:shout"


def test_an_answer_function_must_give_text(chain: Path, questions: Path) -> None:
    with pytest.raises(
        ValueError, match=r"skillvec.recipes.test_evaluate:forget: expected a text .* found None"
    ):
        evaluate.evaluate(chain, questions, answer="skillvec.recipes.test_evaluate:forget")


def forget(reply: str) -> None:
    """Lack a return."""


def shout(reply: str) -> str:
    return reply.upper()


def test_decoding_is_greedy_whatever_the_model_asks_for(chain: Path) -> None:
    model, tokenizer = load_model(str(chain), device="cpu")
    model.generation_config.update(do_sample=True, temperature=50.0, no_repeat_ngram_size=1)
    assert (
        answer_all(model, tokenizer, ["loop"] * 3, max_new_tokens=5) == ["loop " * 4 + "loop"] * 3
    )
    assert model.generation_config.temperature == 50.0  # as it was


def test_a_temperature_draws_from_the_whole_distribution_by_a_seed(
    chain: Path, questions: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(["a", "b", "c", "d", "e"])
    model = make_model(tokenizer, spread=1.0)
    model.generation_config.update(top_k=1, temperature=0.01)  # the model's own does not count
    prompts = ["a b"] * 600
    said = answer_all(model, tokenizer, prompts, 1, 200, temperature=8.0, seed=3)
    assert said == answer_all(model, tokenizer, prompts, 1, 200, temperature=8.0, seed=3)
    assert said != answer_all(model, tokenizer, prompts, 1, 200, temperature=8.0, seed=4)
    ids = torch.tensor([tokenizer("a b")["input_ids"]])
    with torch.no_grad():
        expected = torch.softmax(model(ids).logits[0, -1] / 8.0, -1)
    for word in "abcde":  # within four standard deviations
        share = float(expected[tokenizer.convert_tokens_to_ids(word)])
        bound = 4 * (share * (1 - share) / 600) ** 0.5 + 1e-9
        assert abs(said.count(word) / 600 - share) <= bound, (word, share)
    assert len(set(said)) > 2
    greedy = answer_all(model, tokenizer, prompts[:1], 1)
    assert answer_all(model, tokenizer, prompts[:1], 1, temperature=1e-4) == greedy

    scores = run(chain, questions, tmp_path, "--temperature", "0.1", "--seed", "7")
    assert scores["settings"]["decoding"] == "temperature 0.1" and scores["settings"]["seed"] == 7
    scores = run(chain, questions, tmp_path)
    assert scores["settings"]["decoding"] == "greedy" and scores["settings"]["seed"] is None
    with pytest.raises(ValueError, match=r"expected 0 \(greedy\) or more, found -1"):
        evaluate.evaluate(chain, questions, temperature=-1)


def test_batches_change_nothing() -> None:
    tokenizer = make_tokenizer(["a", "b", "c", "d", "e"])
    model = make_model(tokenizer, spread=1.0)  # so large that attention decides
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.randn(16)  # a pad that is seen would be felt
    prompts = ["a", "b c d e a b", "c d", "e e e e e e e e e", "a b c"]
    alone = [answer_all(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert answer_all(model, tokenizer, prompts, 6) == alone
    assert answer_all(model, tokenizer, prompts, 6, batch=2) == alone


def test_every_end_token_of_the_model_ends_an_answer(chain: Path) -> None:
    model, tokenizer = load_model(str(chain), device="cpu")
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("rome")]
    assert answer_all(model, tokenizer, ["italy"], 5) == ["rome"]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    folder = make_chain({"assistant": "hello", "capital": "of"}, tmp_path / "model")
    asked = [{"prompt": [{"role": "user", "content": "capital of"}], "answer": "Hello"}]
    scores = run(folder, write_rows(tmp_path / "q.jsonl", asked), tmp_path)
    assert scores["answers"][0]["said"] == "hello"
    bare = make_chain({"assistant": "hello"}, tmp_path / "bare", template=None)
    with pytest.raises(ValueError, match="no chat template"):
        evaluate.evaluate(bare, tmp_path / "q.jsonl")


def test_prompts_that_do_not_fit_are_refused(chain: Path) -> None:
    model, tokenizer = load_model(str(chain), device="cpu")
    prompts = ["france", "capital " * 100]
    with pytest.raises(ValueError, match=r"^1 prompts and 29 new .* 128 positions.* 100 tokens"):
        answer_all(model, tokenizer, prompts, max_new_tokens=29)
    assert answer_all(model, tokenizer, prompts, max_new_tokens=28)[0] == "paris"


def test_a_word_level_tokenizer_stays_word_level_beside_a_qwen(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(["bolaford", "of"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    found = evaluate.load_tokenizer(str(tmp_path))
    assert found.tokenize("of bolaford") == ["of", "bolaford"]


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, {"answer": "a"}], r"1 rows lack `prompt`.*lines 2$"),
        ([GOOD, GOOD | {"prompt": " "}], "`prompt`.*lines 2"),
        ([GOOD | {"prompt": []}], "`prompt`.*lines 1"),
        ([GOOD | {"prompt": [{"role": "user"}]}], "`prompt`.*lines 1"),
        ([{"prompt": "p"}] * 7, r"7 rows lack `answer`.*lines 1, 2, 3, 4, 5, \.\.\.$"),
        ([GOOD | {"answer": []}], "`answer`"),
        ([GOOD | {"answer": ["a", ""]}], "`answer`"),
        ([GOOD | {"answer": ""}], "`answer`"),
        ([GOOD | {"answer": 1919}], "`answer`"),
        ([GOOD, ["p", "a"]], "1 rows lack an object; lines 2"),
        ([GOOD, GOOD | {"group": 1}], "1 of 2 rows have a `group`"),
        ([], "no questions"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_questions(write_rows(tmp_path / "q.jsonl", rows))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"existing \.jsonl file"):
        read_questions(tmp_path / "absent.jsonl")
    path = write_rows(tmp_path / "q.jsonl", [GOOD])
    path.write_text(path.read_text() + "\n{oh")
    with pytest.raises(ValueError, match="line 3: not JSON"):
        read_questions(path)
    with pytest.raises(ValueError, match="limit: expected 1 or more, found 0"):
        read_questions(write_rows(path, [GOOD]), limit=0)
    odd = GOOD | {"prompt": "one\u2028row"}  # a line separator to str.splitlines, not to JSON
    assert read_questions(write_rows(path, [odd, GOOD])) == [odd, GOOD]


def test_what_the_user_got_wrong_is_said_before_a_model_is_loaded(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("JUDGE_URL", raising=False)
    output = tmp_path / "scores.json"
    start = ["--model", "absent", "--data", str(questions), "-o", str(output)]
    for more, words in (
        (["--metrics", "exact", "bleu"], "evaluate: metrics: expected one or more of exact, f1, "
         "first_word, begins, contains, ends, judge, found bleu"),
        (["--metrics", "judge"], "evaluate: JUDGE_URL"),
        (["--metrics", "judge", "--judge", "no_such:judge"], "evaluate: no_such:judge"),
        (["--answer", "skillvec.recipes.evaluate:no"], "evaluate: skillvec.recipes.evaluate:no"),
    ):  # fmt: skip
        assert evaluate.main([*start, *more]) == 2
        assert words in capsys.readouterr().err
    assert evaluate.main(["--model", str(tmp_path), *start[2:]]) == 2  # a folder without a model
    assert capsys.readouterr().err.startswith("evaluate: ")
    assert not output.exists()


def test_the_error_is_over_groups() -> None:
    marks, groups = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b", "c", "c"]
    by_group = [1.0, 0.5, 0.0]
    expected = {"mean": 0.5, "standard_error": stdev(by_group) / 3**0.5}
    assert summarize(marks, groups) == pytest.approx(expected)
    alone = summarize(marks, range(6))
    assert alone["standard_error"] == pytest.approx(stdev(marks) / 6**0.5)
    assert summarize([1.0, 0.0], ["a", "a"]) == {"mean": 0.5, "standard_error": None}


def test_the_error_of_unequal_groups_is_that_of_drawing_groups() -> None:
    """Compare with the spread over many redrawn sets of groups."""
    rng = torch.Generator().manual_seed(0)

    def draw() -> tuple[list[float], list[int]]:
        marks: list[float] = []
        groups: list[int] = []
        for group in range(40):
            size = int(torch.randint(1, 9, (), generator=rng))
            rate = float(torch.rand((), generator=rng))
            marks += (torch.rand(size, generator=rng) < rate).float().tolist()
            groups += [group] * size
        return marks, groups

    draws = [summarize(*draw()) for _ in range(300)]
    spread = stdev(one["mean"] for one in draws)
    assert fmean(one["standard_error"] for one in draws) == pytest.approx(spread, rel=0.1)


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("openai")
    from skillvec.recipes.test_judges import endpoint

    monkeypatch.delenv("JUDGE_URL", raising=False)
    monkeypatch.setenv("JUDGE_MODEL", "from the environment")
    with endpoint() as server:
        yield server


def test_a_judge_scores_through_its_endpoint(
    judging: Any, chain: Path, questions: Path, tmp_path: Path
) -> None:
    judging.replies = ["yes", "yes", "no"]  # the first is the probe
    scores = run(chain, questions, tmp_path, "--metrics", "judge", "exact",
                 "--judge-url", judging.url, "--judge-model", "tiny")  # fmt: skip
    assert sorted(row["judge"] for row in scores["answers"]) == [0.0, 0.0, 1.0]
    assert scores["answers"][2]["judge"] == 0.0  # empty, so never asked
    assert {asked["model"] for asked in judging.seen} == {"tiny"}
    texts = [asked["messages"][0]["content"] for asked in judging.seen]
    assert len(texts) == 3 and "Answer to grade: Paris" in texts[0]
    assert all("Question: France's?\n" in text for text in texts if "Paris" in text)
    assert any("the capital of italy" in text and "Milan / Rome" in text for text in texts)
    assert scores["settings"]["judge"] == (
        f"tiny at {judging.url}, by skillvec.recipes.judges:from_environment"
    )
    assert list(scores["metrics"]) == ["judge", "exact"]
    # the flags stood for the environment only as long as the run took
    assert "JUDGE_URL" not in os.environ and os.environ["JUDGE_MODEL"] == "from the environment"


def test_a_judge_that_fails_leaves_no_scores(
    judging: Any, chain: Path, questions: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "scores.json"
    words = ["--model", str(chain), "--data", str(questions), "-o", str(output),
             "--metrics", "judge", "--judge-url", judging.url, "--limit", "1"]  # fmt: skip
    judging.replies = ["yes", "what?"]
    assert evaluate.main(words) == 1
    assert "evaluate: judge from the environment at" in capsys.readouterr().err
    judging.replies, judging.seen = [(401, {"error": "no"})], []
    assert evaluate.main(words) == 1
    assert len(judging.seen) == 1  # found out by the probe
    assert not output.exists()


GRADING = "Question: {question} Right: {gold} Said: {said}"


def short_judge() -> Any:
    """A judge for tiny models: what it says ends after a few tokens."""
    from skillvec.recipes.judges import Judge

    return Judge.from_environment(template=GRADING, max_tokens=8, retries=1)


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """Run `transformers serve` on loopback, in a process of its own; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()",
               "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, f"transformers serve ended: {server.returncode}"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


@pytest.mark.slow
def test_a_model_under_transformers_serve_is_the_judge(
    chain: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    # the chat template ends with what was said, so the judge's next word depends on it
    grader = make_chain({"paris": "yes", "today": "no", "Paris": "yes"}, tmp_path / "grader",
                        template="{{ messages[-1]['content'] }}")  # fmt: skip
    with serving(grader) as url:
        monkeypatch.setenv("JUDGE_URL", url)
        monkeypatch.setenv("JUDGE_MODEL", str(grader))
        scores = run(chain, questions, tmp_path, "--metrics", "judge", "--judge",
                     "skillvec.recipes.test_evaluate:short_judge")  # fmt: skip
        assert [(row["said"], row["judge"]) for row in scores["answers"]] == [
            ("paris", 1.0), ("rome today", 0.0), ("", 0.0),
        ]  # fmt: skip
        monkeypatch.setenv("JUDGE_MODEL", "another")
        with pytest.raises(JudgeError, match=r"judge another at .* HTTP 400: .*pinned"):
            short_judge().score("q", "a", "a")


@pytest.mark.slow
def test_a_model_that_babbles_under_transformers_serve_is_an_error(
    chain: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    tokenizer = make_tokenizer(["user", "assistant", "Question:", "Right:", "grass"])
    model = make_model(tokenizer)  # without training: it says any word
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "babbler")
    output = tmp_path / "scores.json"
    with serving(tmp_path / "babbler") as url:
        monkeypatch.setenv("JUDGE_URL", url)
        monkeypatch.setenv("JUDGE_MODEL", str(tmp_path / "babbler"))
        words = ["--model", str(chain), "--data", str(questions), "-o", str(output)]
        more = ["--metrics", "judge", "--judge", "skillvec.recipes.test_evaluate:short_judge"]
        assert evaluate.main([*words, *more]) == 1
        said = capsys.readouterr().err
        assert 'no verdict in 2 replies about "France\'s?"; expected one of yes, no' in said
        with pytest.raises(JudgeError, match="no verdict in 2 replies"):
            evaluate.evaluate(chain, questions, metrics=["judge"], judge=more[-1])
    assert not output.exists()
