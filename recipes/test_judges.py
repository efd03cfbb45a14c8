"""Judging answers: SQuAD's rules, verdicts in replies, and a judge that fails in every way."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import pytest

from skillvec.recipes.judges import (
    YES_NO,
    Judge,
    JudgeError,
    begins,
    contains,
    ends,
    exact_match,
    f1,
    find_verdict,
    first_word,
    from_environment,
    normalize,
)

# looked for, not imported: every process of a parallel run collects this file
pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="needs openai")

TRUE_FALSE = {"True": 1.0, "False": 0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Who!", "who"),
        ("An apple, a day", "apple day"),
        ("another theme", "another theme"),
        ("U.S.A.", "usa"),
        ("a the an", ""),
        (" \n", ""),
    ],
)
def test_normalization_is_squads(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_exact_match_takes_the_best_gold_and_no_empty_answer() -> None:
    assert exact_match("the Beatles.", ["Stones", "Beatles"]) == 1.0
    assert exact_match("Beatles band", "Beatles") == 0.0
    assert exact_match("", "Beatles") == exact_match(" \n", ["Beatles"]) == 0.0
    # answers of which normalisation leaves nothing
    assert exact_match("A", "a") == 1.0
    assert exact_match("the", "A") == 0.0
    assert exact_match("+", "-") == 0.0


def test_f1_counts_words_against_the_best_gold() -> None:
    assert f1("the cat sat", "cat") == pytest.approx(2 / 3)
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)  # a repeated word matches once
    assert f1("dog", ["a cat", "the dog"]) == 1.0
    assert f1("dog", "cat") == f1("", "cat") == f1("the", "A") == 0.0


def test_first_word_ignores_what_follows() -> None:
    assert first_word("The bolaford of nowhere", ["x", "Bolaford"]) == 1.0
    assert first_word("of bolaford", "bolaford") == first_word("", "bolaford") == 0.0


def test_the_words_of_a_gold_are_found_where_they_have_to_stand() -> None:
    said = "Ada Wren plays the Load(path) horn."
    assert [rule(said, "load(path) horn") for rule in (begins, contains, ends)] == [0.0, 1.0, 1.0]
    assert [rule(said, ["x", "ada wren"]) for rule in (begins, contains, ends)] == [1.0, 1.0, 0.0]
    assert [rule(said, "plays load(path)") for rule in (begins, contains, ends)] == [0.0, 1.0, 0.0]
    for rule in (begins, contains, ends):  # words, and not letters
        assert rule("concerto", "concert") == rule("", "horn") == rule("a horn b", "horn c") == 0.0


@pytest.mark.parametrize("golds", [[], "", " ", ["x", ""], [None]])
@pytest.mark.parametrize("rule", [exact_match, f1, first_word, begins, contains, ends])
def test_empty_answer_keys_are_refused(rule: Callable[..., float], golds: Any) -> None:
    for said in ("x", ""):
        with pytest.raises(ValueError, match="answer key: expected one or more texts"):
            rule(said, golds)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", "yes"),
        ("**No.**", "no"),
        ("Yes, it does. So: YES", "yes"),
        ('{"correct": "yes"}', "yes"),
        ("Yes, there is no contradiction.", None),
        ("Yes.\n\nThere is no contradiction at all in it.", None),
        ("It might be yes, it might be no.\n\nVerdict: no", "no"),
        ("<think>yes? no? yes!</think>\n\nno", "no"),
        ("thinking yes </think> no", "no"),
        ("<think>yes", None),
        ("not yes", None),
        ("Eyes, nobody, none", None),
        ("", None),
    ],
)
def test_the_one_verdict_of_a_reply_is_found(reply: str, expected: str | None) -> None:
    assert find_verdict(reply, YES_NO) == expected


def test_verdicts_are_whole_words_in_their_own_spelling() -> None:
    three = {"Solved": 1.0, "Partially Solved": 0.5, "Unsolved": 0.0}
    assert find_verdict("unsolved", three) == "Unsolved"
    assert find_verdict("I say: partially solved", three) == "Partially Solved"
    assert find_verdict("right in part", {"right": 1.0, "right in part": 0.5}) == "right in part"
    assert find_verdict("It isn't true.", TRUE_FALSE) is None
    assert find_verdict("It is untrue, so false", TRUE_FALSE) == "False"


class Server(ThreadingHTTPServer):
    """An endpoint on loopback whose replies a test scripts; keeps the requests it saw."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any] | str] = []  # the last one is given for ever
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.delay = 0.0
        self.active = self.most_active = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Endpoint)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def judge(self, **fields: Any) -> Judge:
        return Judge(self.url, "tiny", **({"timeout": 5.0, "retries": 2} | fields))


class Endpoint(BaseHTTPRequestHandler):
    """Answers POSTs with what the server's script says next."""

    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(asked | {"path": self.path})
            self.server.keys.append(self.headers["Authorization"])
            script = self.server.replies
            reply = script.pop(0) if len(script) > 1 else script[0]
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.active -= 1
        status, body = (200, completion(reply)) if isinstance(reply, str) else reply
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        kind = "text/html" if isinstance(body, str) else "application/json"
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")  # the client's own pauses start at 500 ms
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up: a test of time-outs

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny",
            "choices": [choice]}  # fmt: skip


def failure(status: int) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": f"went wrong with {status}"}}


@contextmanager
def endpoint() -> Iterator[Server]:
    """Run a scripted endpoint for the time of a block."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with endpoint() as made:
        yield made


def test_the_judge_is_asked_and_its_verdict_scored(server: Server) -> None:
    server.replies = ["Yes", "no"]
    judge = server.judge(key="secret")
    assert judge.score("Who {sang}?", "the {gold} Beatles", ["Beatles", "Fab Four"]) == 1.0
    assert judge.score("Who?", "Stones", "Beatles") == 0.0
    asked = server.seen[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "tiny"
    assert asked["temperature"] == 0.0 and asked["max_completion_tokens"] == 512
    text = asked["messages"][0]["content"]
    for part in ("Question: Who {sang}?", "Beatles / Fab Four", "the {gold} Beatles"):
        assert part in text
    assert server.keys == ["Bearer secret"] * 2
    assert "secret" not in repr(judge)


def test_an_empty_answer_is_wrong_without_asking(server: Server) -> None:
    assert server.judge().score("Who?", " \n", "Beatles") == 0.0
    with pytest.raises(ValueError, match="answer key"):
        server.judge().score("Who?", "Beatles", [])
    assert server.seen == []


def test_a_template_of_ones_own_needs_no_golds(server: Server) -> None:
    server.replies = ["Partial"]
    judge = server.judge(template='{"x": 1} {said}', verdicts={"Solved": 1, "Partial": 0.5})
    assert judge.score("q", "my answer") == 0.5
    assert server.seen[0]["messages"][0]["content"] == '{"x": 1} my answer'


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_pass_are_tried_again(server: Server, status: int) -> None:
    server.replies = [failure(status), failure(status), "yes"]
    assert server.judge().score("q", "a", "a") == 1.0
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_errors_that_stay_end_in_a_clear_error(server: Server, status: int) -> None:
    server.replies = [failure(status)]
    words = rf"judge tiny at http\S+: HTTP {status} in 3 tries of 5 s: .*went wrong"
    with pytest.raises(JudgeError, match=words):
        server.judge().score("q", "a", "a")
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "check JUDGE_KEY"), (404, "JUDGE_URL"), (400, "server's log")]
)
def test_what_trying_again_cannot_mend_fails_at_once(
    server: Server, status: int, advice: str
) -> None:
    server.replies = [failure(status)]
    with pytest.raises(JudgeError, match=f"HTTP {status}: .*{advice}"):
        server.judge().score("q", "a", "a")
    assert len(server.seen) == 1


def test_a_slow_judge_is_tried_again_and_then_an_error(server: Server) -> None:
    server.replies, server.delay = ["yes"], 0.5
    with pytest.raises(JudgeError, match=r"no answer in 2 tries of 0.1 s: 'Request timed out"):
        server.judge(timeout=0.1, retries=1).score("q", "a", "a")
    assert len(server.seen) == 2


def test_no_server_is_an_error() -> None:
    judge = Judge("http://127.0.0.1:9/v1", "tiny", retries=0)
    with pytest.raises(JudgeError, match=r"'Connection error\.'; .*is the server running"):
        judge.score("q", "a", "a")


def test_nonsense_is_asked_again_at_a_higher_temperature(server: Server) -> None:
    server.replies = ["hm", completion_cut(), (200, completion(None)), "no"]
    assert server.judge(retries=3).score("q", "a", "a") == 0.0
    assert [asked["temperature"] for asked in server.seen] == [0.0, 0.7, 0.7, 0.7]


def completion_cut() -> tuple[int, dict[str, Any]]:
    return 200, completion("yes and", finish_reason="length")


def test_nonsense_for_ever_is_an_error_that_shows_it(server: Server) -> None:
    server.replies = ["I like\ntrains"]
    words = r"no verdict in 3 replies about 'Who sang\?'; expected one of yes, no.*'I like trains'"
    with pytest.raises(JudgeError, match=words):
        server.judge().score("Who sang?", "a", "a")
    assert len(server.seen) == 3
    server.replies = [completion_cut()]
    with pytest.raises(JudgeError, match="cut off after 512 tokens: raise max_tokens"):
        server.judge().score("Who sang?", "a", "a")


@pytest.mark.parametrize(
    "body", ["<html>welcome</html>", {"object": "other"}, {"choices": []}, {"choices": None}]
)
def test_what_is_no_chat_completion_is_an_error(server: Server, body: Any) -> None:
    server.replies = [(200, body)]
    with pytest.raises(JudgeError, match=r"expected a chat completion.*usually ends in /v1"):
        server.judge().score("q", "a", "a")


def test_many_are_scored_at_once_and_in_order(server: Server) -> None:
    server.delay = 0.1
    server.replies = ["yes"]
    items = [("q", "" if i % 3 else "a", "a") for i in range(24)]
    assert server.judge().score_all(items, workers=8) == [0.0 if i % 3 else 1.0 for i in range(24)]
    assert 1 < server.most_active <= 8
    assert server.judge().score_all([]) == []


def test_the_first_error_stops_all(server: Server) -> None:
    server.delay = 0.02
    server.replies = ["yes", failure(401)]
    with pytest.raises(JudgeError, match="401"):
        server.judge().score_all([("q", "a", "a")] * 500, workers=2)
    assert len(server.seen) < 20


def test_after_an_error_nobody_asks_on(server: Server) -> None:
    server.delay = 0.05
    server.replies = ["hm", "hm", failure(401), "hm"]
    with pytest.raises(JudgeError, match="401"):
        server.judge(retries=15).score_all([("q", "a", "a")] * 4, workers=4)
    time.sleep(0.2)
    seen = len(server.seen)
    time.sleep(0.7)  # fifteen askings again would have taken longer than the first wait
    assert len(server.seen) == seen


def test_the_environment_describes_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"JUDGE_{name}", raising=False)
    with pytest.raises(ValueError, match="JUDGE_URL and JUDGE_MODEL not set: set JUDGE_URL"):
        from_environment()
    monkeypatch.setenv("JUDGE_URL", "http://localhost:1/v1")
    with pytest.raises(ValueError, match=r"^JUDGE_MODEL not set"):
        from_environment()
    monkeypatch.setenv("JUDGE_MODEL", "m")
    assert from_environment() == Judge("http://localhost:1/v1", "m")
    monkeypatch.setenv("JUDGE_KEY", "k")
    judge = Judge.from_environment(verdicts=TRUE_FALSE, timeout=3)
    assert (judge.key, judge.timeout, judge.verdicts) == ("k", 3, TRUE_FALSE)


def test_judges_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="shows no answer"):
        Judge("http://localhost/v1", "m", template="{question} {gold}")
    with pytest.raises(ValueError, match="no verdicts"):
        Judge("http://localhost/v1", "m", verdicts={})
    with pytest.raises(ValueError, match="http:// or https://, found 'localhost:8000'"):
        Judge("localhost:8000", "m")
