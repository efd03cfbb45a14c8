"""ToolBench: documents, environments, rewards, the tool server, and training on a tiny model."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from skillvec.recipes import tiny
from skillvec.recipes.judges import Judge, JudgeError
from skillvec.recipes.toolbench import evaluate, prepare, react
from skillvec.recipes.toolbench.apis import (
    function_name,
    read_api,
    read_apis,
    read_items,
    standard_name,
)
from skillvec.recipes.toolbench.client import ToolServer, ToolServerError
from skillvec.recipes.toolbench.environment import (
    OBSERVATION,
    classes_of,
    environment_class,
    environments,
    first_tokens,
)
from skillvec.recipes.toolbench.judge import VERDICTS
from skillvec.recipes.toolbench.reward import has_answer, judge_dialogues, read_turns, score, tell
from skillvec.recipes.toolbench.server import OfflineServer

DATA = Path(__file__).parents[2] / "tests" / "data" / "toolbench"
QUERIES = DATA / "G1_query.json"
QUICK = {"retries": 2, "pause": 0.01, "timeout": 5.0}
SEARCH, FILM, SHOWINGS = (
    "search_films_for_film_index",
    "film_id_for_film_index",
    "get_2day_for_cinema_times",
)


class Served(ThreadingHTTPServer):
    """A server whose answers a test writes: `answer` maps (path, JSON asked) to (status, text)."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, Any], tuple[int, str]]) -> None:
        self.answer, self.asked = answer, []
        super().__init__(("127.0.0.1", 0), _Request)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    server: Served

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        status, text = self.server.answer(self.path, asked)
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client has given up on a slow answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    servers = []

    def start(answer: Callable[[str, Any], tuple[int, str]]) -> Served:
        servers.append(Served(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def grade(path: str, asked: Any) -> tuple[int, str]:
    """Judge as the rubric says, by what stands in the dialogue."""
    told = asked["messages"][0]["content"].split("Assistant:\n")[1]
    word = "solved" if "42 films" in told else "partial" if "some films" in told else "unsolved"
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": word},
    }
    return 200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                            "choices": [choice]})  # fmt: skip


@pytest.fixture(scope="module")
def tools() -> Iterator[OfflineServer]:
    """The offline server over the small instruction file."""
    with OfflineServer(read_items([QUERIES])) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def judged(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> Served:
    server = serve(grade)
    monkeypatch.setenv("JUDGE_URL", f"{server.url}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    return server


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"offset_mapping": [(at, at + 1) for at in range(len(text))]}


def films(server: ToolServer) -> Any:
    """Return an environment with the three film functions, and a tokenizer of letters."""
    documents = read_items([QUERIES])[4].documents
    return environment_class(read_apis(documents), server, Letters())()


# ---------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("api", "tool", "name"),
    [
        ("Search Films", "Film Index", SEARCH),
        ("/film/:id", "Film Index", FILM),
        ("2day", "Cinema Times!", SHOWINGS),
        ("id", "from", "is_id_for_is_from"),
        ("查询", "--", "unnamed_for_unnamed"),
    ],
)
def test_functions_are_named_as_in_toolbench(api: str, tool: str, name: str) -> None:
    assert function_name(api, tool) == name
    assert standard_name(name) == name  # named once, named for good


def test_documents_become_definitions() -> None:
    item = read_items([QUERIES])[4]
    apis = read_apis(item.documents)
    assert list(apis) == [SEARCH, FILM, SHOWINGS]
    told = apis[SHOWINGS].definition()["parameters"]
    assert {name: p["type"] for name, p in told["properties"].items()} == {
        "lat": "number", "lon": "number", "is_from": "string", "get_3d": "boolean",
    }  # fmt: skip
    assert told["required"] == ["lat", "lon", "is_from"]
    assert [p.example() for p in apis[SHOWINGS].parameters] == [48.1, 1, "text", False]
    assert item.category == "Movies" and read_items([QUERIES])[11].category is None
    assert item.environment != read_items([QUERIES])[0].environment


def test_bad_instruction_files_are_refused_by_item(tmp_path: Path) -> None:
    good = json.loads(QUERIES.read_text())[:2]
    document = good[0]["api_list"][0]
    for broken, words in (
        ({"query": "q"}, "item 2: expected 'api_list'"),
        ({"query": " ", "api_list": [document]}, "item 2: expected a query in words"),
        ({"query": "q", "api_list": []}, "item 2: expected one or more APIs"),
        ({"query": "q", "api_list": [{"api_name": "a"}]}, "item 2: expected 'tool_name'"),
    ):
        path = tmp_path / "G1.json"
        path.write_text(json.dumps([*good, broken]))
        with pytest.raises(ValueError, match=words):
            read_items([path])
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a list of items"):
        read_items([path])
    with pytest.raises(ValueError, match=r"absent\.json: expected ToolBench's JSON"):
        read_items([tmp_path / "absent.json"])


def test_schemas_are_what_transformers_builds() -> None:
    schema = pytest.importorskip("transformers.utils").get_json_schema
    environment = films(ToolServer("http://localhost:1"))
    for name, api in environment._apis.items():
        told = schema(getattr(environment, name))["function"]
        definition = api.definition()
        assert told["name"] == name
        for parameter, about in definition["parameters"]["properties"].items():
            found = told["parameters"]["properties"][parameter]
            assert found["type"] == about["type"]
            assert found["description"] == (about["description"] or parameter)
        assert told["parameters"].get("required", []) == definition["parameters"]["required"]
    assert "Returns its cast" in schema(getattr(environment, FILM))["function"]["description"]


def test_documents_that_would_break_a_docstring_keep_their_schema() -> None:
    schema = pytest.importorskip("transformers.utils").get_json_schema
    api = read_api({
        "category_name": "C", "tool_name": "t", "api_name": "a",
        "api_description": "Args: Raises: x",
        "required_parameters": [
            {"name": "self", "type": "NUMBER", "description": "_Returns: (choices: z)"}
        ],
        "optional_parameters": [{"name": "class", "type": "BOOLEAN", "description": "b: c"}],
    })  # fmt: skip
    environment = environment_class({api.name: api}, ToolServer("http://localhost:1"), None)()
    told = schema(environment.a_for_t)["function"]["parameters"]
    assert {name: p["type"] for name, p in told["properties"].items()} == {
        "is_self": "number", "is_class": "boolean",
    }  # fmt: skip
    assert told["required"] == ["is_self"]


# -------------------------------------------------------------------------------- preparation


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_and_targets_share_nothing_that_is_asked(tmp_path: Path) -> None:
    words = ["--instructions", str(QUERIES), "--targets", "Weather", "Logistics",
             "--questions", "1", "--output"]  # fmt: skip
    assert prepare.main([*words, str(tmp_path / "a")]) == 0
    assert prepare.main([*words, str(tmp_path / "b")]) == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["left_out"]["source queries across parts"] == 1
    assert manifest["left_out"]["queries across categories"] == 1
    for name in manifest["rows"]:
        for kind, count in manifest["rows"][name].items():
            file = f"{name}_{kind}.jsonl"
            assert len(rows_of(tmp_path / "a" / file)) == count
            assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()
    asked = {n: {r["question"] for r in rows_of(tmp_path / "a" / f"{n}_questions.jsonl")}
             for n in manifest["rows"]}  # fmt: skip
    assert not asked["source_1"] & asked["source_2"]
    for name in ("target_weather", "target_logistics"):
        trained = rows_of(tmp_path / "a" / f"{name}_format.jsonl")
        assert not asked[name] & {row["prompt"][1]["content"] for row in trained}
    row = rows_of(tmp_path / "a" / "target_weather_questions.jsonl")[0]
    assert "current_for_sky_now" not in json.dumps(row["prompt"])  # closed book
    assert [api["api_name"] for api in json.loads(row["api_list"])] == ["Current"]
    told = rows_of(tmp_path / "a" / "target_weather_apis.jsonl")
    assert all("current_for_sky_now" in r["completion"][0]["content"] for r in told)
    assert len(told) == 4


def test_first_turns_come_from_answers_that_worked(tmp_path: Path) -> None:
    words = ["--instructions", str(QUERIES), "--target-count", "2", "--parts", "1",
             "--test", str(DATA / "test_G1_category.json"),
             "--answers", str(DATA / "G1_answer"), "-o", str(tmp_path)]  # fmt: skip
    assert prepare.main(words) == 0
    turns = [row["completion"][0]["content"] for row in rows_of(tmp_path / "source_1_format.jsonl")]
    assert turns == [
        f'Thought: I look the title up.\nAction: {SEARCH}\nAction Input: {{"title": "Heat"}}',
        f"Thought: I ask for showings.\nAction: {SHOWINGS}\nAction Input: "
        '{"lat": 48.1, "lon": 11.6, "is_from": "18"}',
    ]  # the others failed, have no thought or no JSON, or call what is not in their list
    asked = rows_of(tmp_path / "target_weather_questions.jsonl")
    assert [row["question"] for row in asked] == [
        "How hot is Cairo today?",
        "Do I need a coat in Bern?",
    ]
    for name, query in (
        ("weather", "How warm is it in Oslo?"),
        ("logistics", "Where is parcel A1?"),
    ):
        trained = rows_of(tmp_path / f"target_{name}_format.jsonl")
        assert [row["prompt"][1]["content"] for row in trained] == [query]


def test_a_prompt_shows_what_is_asked_for() -> None:
    apis = read_apis(read_items([QUERIES])[0].documents)
    assert SEARCH not in react.system_text(apis)
    assert SEARCH in react.system_text(apis, show="names")
    assert "Words of the title" not in react.system_text(apis, show="names")
    assert "Words of the title" in react.system_text(apis, show="documents")
    assert "You have 3 turns" in react.system_text(apis, turns=3)
    with pytest.raises(ValueError, match="expected one of nothing, names, documents"):
        react.system_text(apis, show="all")


def test_what_cannot_be_prepared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--instructions", str(QUERIES), "--questions", "1", "-o", str(tmp_path / "out")]
    for more, message in (
        (["--source", "Music"], "no such category; queries by category: Logistics 3, Movies 5"),
        (["--targets", "Weather", "Music"], "targets: 1 cannot be used: Music"),
        (["--targets", "Movies"], "targets: 1 cannot be used: Movies"),
        (["--targets", "Weather", "Weather"], "expected 2 different ones"),
        ([], "expected 20 different ones, found 2"),
        (["--targets", "Weather", "--parts", "9"], "nothing for source_"),
        (["--targets", "Weather", "--questions", "3"], "nothing for target_weather_format"),
        (["--targets", "Weather", "--answers", str(tmp_path)], r"answers, \*.json, found none"),
    ):
        assert prepare.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("skillvec.recipes.toolbench.prepare: ")
        assert message.replace("\\", "") in error


# ---------------------------------------------------------------------------- the tool server


def test_calls_reach_the_server_by_its_protocol(serve: Callable[..., Served]) -> None:
    server = serve(lambda path, asked: (200, '{"error": "", "response": {"films": [1]}}'))
    environment = films(ToolServer(f"{server.url}/virtual/", key="k", **QUICK))
    seen = getattr(environment, SEARCH)(title="Heat")
    assert json.loads(seen) == {"error": "", "response": '{"films": [1]}'}
    assert server.asked == [
        {"category": "Movies", "tool_name": "Film Index", "api_name": "Search Films",
         "tool_input": {"title": "Heat"}, "strip": "truncate", "toolbench_key": "k"}
    ]  # fmt: skip
    assert [(c.name, c.arguments, c.error) for c in environment.calls] == [
        (SEARCH, {"title": "Heat"}, "")
    ]
    environment.reset(prompt=[], question="q")
    assert environment.calls == []


def test_arguments_that_do_not_fit_fail_without_a_call(serve: Callable[..., Served]) -> None:
    server = serve(lambda path, asked: (200, '{"error": "", "response": ""}'))
    environment = films(ToolServer(server.url, **QUICK))
    assert "missing required parameters: title" in getattr(environment, SEARCH)(page=1)
    assert "unknown parameters: name" in getattr(environment, SEARCH)(title="a", name="b")
    assert not server.asked and all(call.error for call in environment.calls)


def test_long_results_are_cut(serve: Callable[..., Served]) -> None:
    server = serve(lambda path, asked: (200, json.dumps({"error": "", "response": "x" * 5000})))
    environment = films(ToolServer(server.url, **QUICK))
    whole = json.dumps({"error": "", "response": "x" * 5000})
    assert OBSERVATION == 2000
    assert getattr(environment, FILM)(is_id="1") == whole[:2000]
    assert environment.calls[0].response == "x" * 5000


def test_results_are_cut_at_tokens_and_at_whole_characters(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tiny.make_model(["the film is long. the films are longer!"], tmp_path)  # others are bytes
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rng = random.Random(0)
    pieces = ["film", "the", " ", "  ", "\n", "é", "查", "🎬", "!", "1", "'s"]
    split = 0
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=12))
        for limit in range(1, count(text)):
            cut = first_tokens(text, tokenizer, limit)
            assert text.startswith(cut) and count(cut) <= limit < count(text[: len(cut) + 1])
            split += count(cut) < limit  # the next character has more tokens than there is room
        assert first_tokens(text, tokenizer, count(text)) == text
    assert split > 50


def test_the_server_is_asked_again_and_then_answers(serve: Callable[..., Served]) -> None:
    tries = iter([(503, ""), (429, ""), (200, '{"error": "no such film", "response": ""}')])
    server = serve(lambda path, asked: next(tries))
    environment = films(ToolServer(server.url, **QUICK))
    assert "no such film" in getattr(environment, FILM)(is_id="1")
    assert len(server.asked) == 3 and environment.calls[0].error == "no such film"


def test_a_slow_server_is_a_failure_that_stays(serve: Callable[..., Served]) -> None:
    def slow(path: str, asked: Any) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, "{}"

    server = ToolServer(serve(slow).url, timeout=0.05, retries=1, pause=0.01)
    environment = films(server)
    with pytest.raises(ToolServerError, match=r"no answer in 2 tries of 0.05 s \(.*timed out"):
        getattr(environment, FILM)(is_id="1")
    assert environment.failure is not None and environment.calls == []
    began = time.monotonic()
    with pytest.raises(ToolServerError, match="timed out"):
        getattr(films(server), FILM)(is_id="2")
    assert time.monotonic() - began < 0.05  # nobody waits for it again
    with pytest.raises(ToolServerError, match="timed out"):
        judge_dialogues([[]], [environment], ["q"], Judge("http://localhost:1", "m"))


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, "nothing", "HTTP 404, 'nothing'; is it StableToolBench's"),
        (422, "field", "HTTP 422"),
        (429, "", r"no answer in 3 tries of 5 s \(HTTP 429\)"),
        (200, "<html>", "expected JSON with error and response, found '<html>'"),
        (200, '{"response": ""}', "expected JSON with error and response"),
        (200, "[]", "expected JSON with error and response"),
    ],
)
def test_nonsense_from_the_server_is_an_error(
    status: int, text: str, words: str, serve: Callable[..., Served]
) -> None:
    server = ToolServer(serve(lambda path, asked: (status, text)).url, **QUICK)
    with pytest.raises(ToolServerError, match=words):
        getattr(films(server), FILM)(is_id="1")


def test_an_api_that_breaks_fails_but_a_broken_server_stops(serve: Callable[..., Served]) -> None:
    broken = serve(lambda path, asked: (500, "Internal Server Error"))
    server = ToolServer(broken.url, retries=1, pause=0.01, tolerated=3)
    environment = films(server)
    for number in (1, 2):
        assert f"HTTP 500 from {FILM} in 2 tries" in getattr(environment, FILM)(is_id=str(number))
    with pytest.raises(ToolServerError, match="3 such calls in a row"):
        getattr(environment, FILM)(is_id="3")
    assert len(environment.calls) == 2 and len(broken.asked) == 6


def test_settings_of_the_server_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOOLBENCH_URL", raising=False)
    with pytest.raises(ValueError, match="TOOLBENCH_URL is not set: start StableToolBench"):
        ToolServer.from_environment()
    with pytest.raises(ValueError, match=r"expected a URL with http://, found 'localhost'"):
        ToolServer("localhost")
    with pytest.raises(ToolServerError, match=r"no answer .*is it running"):
        ToolServer("http://127.0.0.1:9", timeout=1).check()


def test_the_offline_server_answers_from_documents_and_cache(
    tools: OfflineServer, tmp_path: Path
) -> None:
    environment = films(ToolServer(tools.url, **QUICK))
    environment._server.check()
    assert json.loads(getattr(environment, FILM)(is_id="7")) == {
        "error": "", "response": '{"title": "str", "cast": ["str"]}',
    }  # fmt: skip
    kept = tmp_path / "Movies" / "film_index_for_Movies" / "film_id.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"{'is_id': '7'}": {"error": "", "response": "Heat"}}))
    asked = {"category": "Movies", "tool_name": "Film Index", "api_name": "/film/:id"}
    offline = OfflineServer(read_items([QUERIES]), cache=tmp_path)
    try:
        assert offline.respond(asked | {"tool_input": '{"is_id": "7"}'})["response"] == "Heat"
        assert "missing: is_id" in offline.respond(asked | {"tool_input": ""})["error"]
        assert "no JSON" in offline.respond(asked | {"tool_input": "{"})["error"]
        assert "no API 'x'" in offline.respond(asked | {"tool_input": {}, "api_name": "x"})["error"]
    finally:
        offline.server_close()


# --------------------------------------------------------------------------------- the reward


def call(name: str, arguments: Any) -> dict[str, Any]:
    asked = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "Thought: so", "tool_calls": [asked]}


def seen(text: str = "{}") -> dict[str, str]:
    return {"role": "tool", "name": "f", "content": text}


def finish(answer: Any = "42 films", kind: str = "give_answer") -> dict[str, Any]:
    arguments = {"return_type": kind, "final_answer": answer}
    return {"role": "assistant", "content": "Thought: done", "finish": {"arguments": arguments}}


GOOD, BAD = call(FILM, {"is_id": "1"}), call(FILM, {"id": "1"})
UNKNOWN, UNREADABLE, NAMELESS = call("film", {}), call(FILM, "{"), call("", "So I will")


@pytest.mark.parametrize(
    ("messages", "judge", "expected"),
    [
        ([GOOD, seen(), finish()], 1.0, 0.4 + 5),
        ([GOOD, seen(), finish()], 0.5, 0.4 + 2.5),
        ([GOOD, seen(), finish()], 0.0, 0.4),
        ([BAD, seen(), finish()], 1.0, -0.1 + 5),
        ([UNKNOWN, seen(), finish()], 1.0, -0.1 + 5),
        ([UNREADABLE, seen(), finish()], 1.0, -0.2 + 5),
        ([NAMELESS, seen(), finish()], 1.0, -0.2 + 5),
        ([call(FILM, [1]), seen(), finish()], 1.0, -0.2 + 5),
        ([GOOD, seen(), BAD, seen(), UNKNOWN, seen(), NAMELESS, seen(), finish()], 1.0, 5.0),
        ([GOOD, seen(), GOOD], 1.0, 0.4 - 0.2),
        ([GOOD, seen(), NAMELESS], 1.0, 0.4 - 0.2),
        ([GOOD, seen(), GOOD, seen()], 1.0, 0.4 - 0.2),
        ([finish()], 1.0, -10),
        ([finish(kind="give_up")], 1.0, -10),
        ([{"role": "assistant", "content": "", "finish": {"arguments": "no"}}], 1.0, -10),
        ([NAMELESS], 1.0, -0.2),
        ([{"role": "assistant", "content": ""}], 1.0, -0.2),
        ([], 1.0, -0.2),
    ],
)
def test_every_turn_earns_its_line(
    messages: list[dict[str, Any]], judge: float, expected: float, tools: OfflineServer
) -> None:
    environment = films(ToolServer(tools.url, **QUICK))
    for message, after in pairwise(messages):
        for asked in message.get("tool_calls", []):
            name, arguments = asked["function"].values()
            if name in environment._apis and isinstance(arguments, dict) and after == seen():
                getattr(environment, name)(**arguments)
    assert score(read_turns(messages, environment), judge) == pytest.approx(expected)


def test_only_an_answer_is_judged(judged: Served) -> None:
    environment = films(ToolServer("http://localhost:1"))
    said = [
        [GOOD, seen('{"n": 42}'), finish()],
        [GOOD, seen(), finish("some films")],
        [GOOD, seen(), finish("none")],
        [GOOD, seen(), finish(kind="give_up")],
        [GOOD, seen(), finish(" ")],
        [GOOD, seen(), finish(kind="give_up_and_restart")],
        [GOOD, seen(), finish() | {"finish": {"arguments": "42 films"}}],
        [GOOD, seen(), finish(None)],
        [GOOD, seen()],
        [finish()],
    ]
    judge = Judge(
        f"{judged.url}/v1", "m", template="{question} Assistant:\n{said}", verdicts=VERDICTS
    )
    found = judge_dialogues(said, [environment] * len(said), ["q?"] * len(said), judge)
    assert found == [1.0, 0.5] + [0.0] * 8
    assert len(judged.asked) == 3
    assert [has_answer(messages) for messages in said] == [True] * 3 + [False] * 7
    assert tell(said[0]) == (
        f'Thought: so\nAction: {FILM}\nAction Input: {{"is_id": "1"}}\nObservation: {{"n": 42}}\n'
        'Thought: done\nAction: Finish\nAction Input: {"return_type": "give_answer", '
        '"final_answer": "42 films"}'
    )


# ------------------------------------------------------------------------- training, for real


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prepared data and a tiny model that speaks the format."""
    for package in ("trl", "datasets", "accelerate"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("toolbench")
    words = ["--instructions", str(QUERIES), "--targets", "Weather", "--questions", "2",
             "--output", str(folder / "data")]  # fmt: skip
    assert prepare.main(words) == 0
    texts = [file.read_text() for file in sorted((folder / "data").glob("*.jsonl"))]
    tiny.make_model(texts, folder / "plain", size=32)
    words = ["--model", str(folder / "plain"), "--output", str(folder / "base")]
    assert react.main(words) == 0
    return folder


def config(path: Path, **entries: Any) -> list[str]:
    """Write a configuration for the CPU and return the command line that takes it."""
    entries |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False,
                "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
                "warmup_steps": 0}  # fmt: skip
    path.write_text(json.dumps(entries))  # JSON is YAML
    return ["--config", str(path)]


def reinforce(start: Path, tmp_path: Path, model: Path, **entries: Any) -> list[str]:
    """Return the command line of one step of GRPO on a source part."""
    return config(
        tmp_path / "grpo.yaml", columns=["prompt", "environment", "api_list", "question"],
        environments="skillvec.recipes.toolbench.environment:environments",
        rewards=[f"{__name__}:kept_reward"],
        model_name_or_path=str(model),
        output_dir=str(tmp_path / "rl"), num_generations=2, per_device_train_batch_size=2,
        max_steps=1, learning_rate=1e-2, beta=1e-3, max_tool_calling_iterations=4,
        allow_no_reward=True,
        **{"data": str(start / "data" / "source_1_questions.jsonl"),
           "max_completion_length": 24} | entries,
    )  # fmt: skip


REWARDED: list[float] = []


def kept_reward(*arguments: Any, **columns: Any) -> list[float]:
    """Keep what the recipe's reward gives, for the tests."""
    from skillvec.recipes.toolbench.reward import reward

    REWARDED.extend(reward(*arguments, **columns))
    return REWARDED[-len(columns["question"]) :]


def test_the_whole_benchmark_runs(
    start: Path, tmp_path: Path, tools: OfflineServer, judged: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two steps of SFT, GRPO with tools and judge, an evaluation: all for real, on a tiny model."""
    from safetensors.torch import load_file

    from skillvec.recipes import grpo, sft

    monkeypatch.setenv("TOOLBENCH_URL", tools.url)
    model = start / "base"
    for step, kind in enumerate(("apis", "format")):
        data = str(start / "data" / f"source_1_{kind}.jsonl")
        words = config(tmp_path / "sft.yaml", data=data, columns=["prompt", "completion"],
                       model_name_or_path=str(model), output_dir=str(tmp_path / f"sft{step}"),
                       max_steps=1, learning_rate=1e-2, per_device_train_batch_size=2)  # fmt: skip
        assert not sft.main(words)
        model = tmp_path / f"sft{step}"
    REWARDED.clear()
    assert not grpo.main(reinforce(start, tmp_path, model))
    assert REWARDED and set(REWARDED) == {-0.2}
    weights = [load_file(f / "model.safetensors") for f in (start / "base", model, tmp_path / "rl")]
    moved = [any((a[n] != b[n]).any() for n in a) for a, b in pairwise(weights)]
    assert moved[0]  # rewards that are all alike leave GRPO's model where it was
    words = ["--model", str(tmp_path / "rl"), "--output", str(tmp_path / "scores.json"),
             "--data", str(start / "data" / "target_weather_questions.jsonl"),
             "--max-new-tokens", "8", "--repetitions", "2", "--device", "cpu"]  # fmt: skip
    assert evaluate.main(words) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["questions"] == 2 and len(scores["answers"]) == 4 and scores["groups"] == 1
    assert set(scores["metrics"]) == {"judge", "calls_ok", "finish", "reward"}
    assert scores["metrics"]["reward"]["mean"] == pytest.approx(
        -1.0
    )  # 4 malformed turns, no Finish
    assert all(a["turns"] == ["malformed"] * 5 for a in scores["answers"])


TURNS = (
    react.turn_text("I look.", SEARCH, {"title": "Heat", "page": "2"}),
    react.turn_text("I look again.", "no_such_function", {}),
    "I would rather talk.",
    react.turn_text(
        "I know.", "Finish", {"return_type": "give_answer", "final_answer": "42 films"}
    ),
    react.turn_text("Bored.", "Finish", {"return_type": "give_up"}),
)


def scripted(plays: Sequence[Sequence[str]]) -> Callable[..., Any]:
    """Return what stands in for TRL's sampling: dialogue i says plays[i], turn by turn."""
    spoken = [0] * len(plays)

    def generate(self: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        going = [i for i, play in enumerate(plays) if spoken[i] < len(play)]
        assert len(prompt_ids) == len(going)  # Finish ends a dialogue, and nothing else does
        tokens = []
        for i in going:
            said = f"{plays[i][spoken[i]]}<|im_end|>"
            tokens.append(self.processing_class(said)["input_ids"])
            spoken[i] += 1
        return tokens, None

    return generate


def test_dialogues_run_through_trl_and_are_rewarded(
    start: Path, tmp_path: Path, judged: Served, serve: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """TRL parses, calls, observes and ends as the format says; only the sampling is scripted."""
    import trl
    from safetensors.torch import load_file

    from skillvec.recipes import grpo

    server = serve(lambda path, asked: (200, '{"error": "", "response": "a list"}'))
    monkeypatch.setenv("TOOLBENCH_URL", server.url)
    look, unknown, talk, answer, _ = TURNS
    plays = [[look, unknown, talk, look, answer], [f"{look[:-1]}]", answer]]  # and a "]" for a "}"
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", scripted(plays))
    REWARDED.clear()
    words = reinforce(start, tmp_path, start / "base", max_completion_length=700, logging_steps=1,
                      log_completions=True)  # fmt: skip
    assert not grpo.main(words)
    expected = [0.4 - 0.1 - 0.2 + 0.4 + 5, -0.2 + 5]
    assert pytest.approx(expected) == REWARDED
    assert [asked["tool_input"] for asked in server.asked] == [{"title": "Heat", "page": 2}] * 2
    assert list((tmp_path / "rl" / "completions").glob("*.parquet"))  # and TRL could write them
    told = sorted((asked["messages"][0]["content"] for asked in judged.asked), key=len)
    assert "Tool no_such_function not found." in told[1] and "a list" in told[1]
    before, after = (load_file(f / "model.safetensors") for f in (start / "base", tmp_path / "rl"))
    assert any((before[name] != after[name]).any() for name in before)


def test_a_server_that_goes_down_stops_the_training(
    start: Path, tmp_path: Path, judged: Served, serve: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import trl

    from skillvec.recipes import grpo

    server = serve(lambda path, asked: (404, "gone"))
    monkeypatch.setenv("TOOLBENCH_URL", server.url)
    look, *_, answer, _ = TURNS
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", scripted([[look, answer]] * 2))
    with pytest.raises(ToolServerError, match="HTTP 404, 'gone'"):
        grpo.main(reinforce(start, tmp_path, start / "base", max_completion_length=700))
    assert len(server.asked) == 1 and not judged.asked


def test_training_does_not_start_without_judge_and_tools(
    start: Path, judged: Served, tools: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(rows_of(start / "data" / "source_1_questions.jsonl"))
    monkeypatch.setenv("TOOLBENCH_URL", "http://127.0.0.1:9")
    with pytest.raises(ToolServerError, match="no answer"):
        environments(rows, "base")
    monkeypatch.setenv("TOOLBENCH_URL", tools.url)
    base = str(start / "base")
    assert set(environments(rows, base)) == set(rows["environment"])
    with pytest.raises(ValueError, match="no column api_list"):
        environments(rows.remove_columns("api_list"), base)
    monkeypatch.delenv("JUDGE_URL")
    with pytest.raises(ValueError, match="JUDGE_URL not set"):
        environments(rows, base)
    server = ToolServer(tools.url)
    one = {"environment": "a", "api_list": "[]"}
    with pytest.raises(ValueError, match="row 1: environment 'a' has another api_list"):
        classes_of([one, one | {"api_list": "[{}]"}], server, None)
    with pytest.raises(ValueError, match="environment 'a': api_list: expected ToolBench's"):
        classes_of([one | {"api_list": "[{}]"}], server, None)


def test_evaluation_refuses_and_fails_clearly(
    start: Path, tmp_path: Path, judged: Served, tools: OfflineServer,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    questions = start / "data" / "target_weather_questions.jsonl"

    def run(**changed: str) -> tuple[int, str]:
        words = {"model": str(start / "base"), "data": str(questions), "device": "cpu",
                 "output": str(tmp_path / "scores.json"), "tool-url": tools.url,
                 "max-new-tokens": "4"}  # fmt: skip
        given = [word for k, v in (words | changed).items() for word in (f"--{k}", v)]
        return evaluate.main(given), capsys.readouterr().err

    row = rows_of(questions)[0]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row) + "\n" + json.dumps(row | {"question": ""}) + "\n")
    code, error = run(data=str(bad))
    assert code == 2 and "row 1: no question" in error
    code, error = run(model=str(start / "plain"))
    assert code == 2 and "no response_template" in error
    code, error = run(repetitions="0")
    assert code == 2 and "expected 1 or more" in error
    code, error = run(**{"max-new-tokens": "4000"})
    assert code == 2 and "2 prompts leave no room" in error
    code, error = run(**{"tool-url": "http://127.0.0.1:9"})
    assert code == 1 and "tool server at http://127.0.0.1:9: no answer" in error
    code, error = run(**{"judge-url": f"{tools.url}/v1"})
    assert code == 1 and "404" in error
    monkeypatch.delenv("JUDGE_URL")
    code, error = run()
    assert code == 2 and "JUDGE_URL" in error
    assert not (tmp_path / "scores.json").exists()


def test_the_model_folder_keeps_the_format(start: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer
    from trl.chat_template_utils import (
        is_chat_template_prefix_preserving,
        is_chat_template_stop_token_trained,
        supports_tool_calling,
    )

    assert (start / "base" / "model.safetensors").is_symlink()
    tokenizer = AutoTokenizer.from_pretrained(start / "base")
    assert tokenizer.response_template == react.RESPONSE_TEMPLATE
    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)
    plain = AutoTokenizer.from_pretrained(start / "plain")
    assert getattr(plain, "response_template", None) is None
    plain.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"expected ChatML.*end of text is '<\|endoftext\|>'"):
        react.install(plain)
    assert react.main(["--model", str(start / "data"), "-o", str(tmp_path / "x")]) == 2
    assert "expected a folder or Hub id with *.safetensors" in capsys.readouterr().err
    assert react.main(["--model", str(start / "base"), "-o", str(start / "base")]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TURNS[0], ("Thought: I look.", SEARCH, {"title": "Heat", "page": 2})),
        ("Action: f\nAction Input: {}", ("", "f", {})),
        ('Thought: a\nAction: f\nAction Input: {"a": 1', ("Thought: a", "f", '{"a": 1')),
        ("Thought: a\nAction: Finishes\nAction Input: {}", ("Thought: a", "Finishes", {})),
        ("Thought: a\nAction: f", ("", "", "Thought: a\nAction: f")),
        ("So I will", ("", "", "So I will")),
        (
            'Thought: a\nAction: f\nAction Input: {}\nAction: Finish\nAction Input: {"x": 1}',
            ("Thought: a", "f", '{}\nAction: Finish\nAction Input: {"x": 1}'),
        ),
        (TURNS[4], ("Thought: Bored.", None, {"return_type": "give_up"})),
    ],
)
def test_turns_are_read_back(start: Path, text: str, message: Any) -> None:
    from transformers import AutoTokenizer
    from trl.chat_template_utils import parse_response

    from skillvec.recipes.toolbench.dialogue import tools_of

    tokenizer = AutoTokenizer.from_pretrained(start / "base")
    prompt = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False)
    asked = tokenizer.apply_chat_template(prompt[:1], tokenize=False, add_generation_prompt=True)
    assert rendered == f"{asked}{text}<|im_end|>\n"
    prefix, said = (tokenizer(t)["input_ids"] for t in (asked, f"{text}<|im_end|>"))
    tools = tools_of(films(ToolServer("http://localhost:1")))
    parsed = parse_response(tokenizer, said, prefix=prefix, tools=tools)
    content, name, arguments = message
    assert parsed["content"] == content
    if name is None:
        assert parsed["finish"] == {"arguments": arguments} and "tool_calls" not in parsed
        return
    (asked_call,) = parsed["tool_calls"]
    assert asked_call["function"] == {"name": name, "arguments": arguments}
    if (
        name and text != TURNS[0] and isinstance(arguments, dict)
    ):  # a message renders as it was read
        again = tokenizer.apply_chat_template([prompt[0], parsed], tokenize=False)
        assert again == rendered


def test_dialogues_keep_tokens_and_end_where_they_should(start: Path, tools: OfflineServer) -> None:
    """What the model sees is the conversation as the template renders it, turn by turn."""
    from transformers import AutoTokenizer

    from skillvec.recipes.toolbench.dialogue import hold_dialogues

    tokenizer = AutoTokenizer.from_pretrained(start / "base")
    look, unknown, talk, answer, _ = TURNS
    plays = [[look, answer], [unknown, talk, look], [answer]]
    prompt = [{"role": "user", "content": "x"}]

    def hold(room: int) -> tuple[list[Any], list[list[list[int]]]]:
        heard: list[list[list[int]]] = []

        def speak(asked: list[list[int]]) -> list[list[int]]:
            going = [play[len(heard)] for play in plays if len(play) > len(heard)]
            heard.append([list(ids) for ids in asked])
            return [tokenizer(f"{said}<|im_end|>")["input_ids"] for said in going[: len(asked)]]

        places = [films(ToolServer(tools.url, **QUICK)) for _ in plays]
        return hold_dialogues(speak, tokenizer, [prompt] * 3, places, turns=3, room=room), heard

    held, heard = hold(10_000)
    assert [len(asked) for asked in heard] == [3, 2, 1]
    kinds = [read_turns(dialogue.messages, dialogue.environment) for dialogue in held]
    assert kinds == [["succeeded", "finish"], ["failed", "malformed", "pending"], ["finish"]]
    said = [{"role": "assistant", "content": look}, held[0].messages[1]]
    assert said[1]["role"] == "tool" and "films" in said[1]["content"]
    seen_text = tokenizer.apply_chat_template(
        prompt + said, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(heard[1][0]) == seen_text
    held, heard = hold(len(heard[0][0]) + 5)
    assert [len(asked) for asked in heard] == [3]  # no room for a result
    assert [m["role"] for m in held[0].messages] == ["assistant"]
    with pytest.raises(ValueError, match=r"3 prompts leave no room for a turn: at most 3 tokens"):
        hold(3)


def test_scores_are_means_over_repetitions_then_questions(
    start: Path, tmp_path: Path, judged: Served, tools: OfflineServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    current = react.turn_text("I look.", "current_for_sky_now", {"city": "Oslo"})
    some = TURNS[3].replace("42", "some")
    # two questions in two repetitions: solved and talk; then partial and talk
    spoken = iter(
        [[current, "no"], [TURNS[3], "no"], ["no"], [current, "no"], [some, "no"], ["no"]]
    )

    def speaker(model: Any, tokenizer: Any, *_: Any) -> Callable[..., Any]:
        return lambda asked: [
            tokenizer(f"{said}<|im_end|>")["input_ids"]
            for said, _ in zip(next(spoken), asked, strict=True)
        ]

    monkeypatch.setattr(evaluate, "speaker", speaker)
    words = ["--model", str(start / "base"), "--output", str(tmp_path / "scores.json"),
             "--data", str(start / "data" / "target_weather_questions.jsonl"), "--turns", "3",
             "--max-new-tokens", "9", "--repetitions", "2", "--tool-url", tools.url,
             "--device", "cpu"]  # fmt: skip
    assert evaluate.main(words) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    found = {name: score["mean"] for name, score in scores["metrics"].items()}
    assert found["judge"] == pytest.approx((1.0 + 0.5) / 4)
    assert found["finish"] == 0.5 and found["calls_ok"] == 0.5
    assert found["reward"] == pytest.approx((5.4 + 2.9 - 0.6 - 0.6) / 4)
    assert scores["repetitions"] == [0.5, 0.25]
    assert [a["judge"] for a in scores["answers"]] == [1.0, 0.0, 0.5, 0.0]


@pytest.mark.slow
def test_a_model_that_learnt_one_dialogue_solves_it(
    start: Path, tmp_path: Path, judged: Served, serve: Callable[..., Served],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Train on whole dialogues, then evaluate greedily with the tools and the judge."""
    from skillvec.recipes import grpo, sft

    server = serve(lambda path, asked: (200, '{"error": "", "response": "2 degrees"}'))
    rows = rows_of(start / "data" / "target_weather_questions.jsonl")
    look = react.turn_text("I look.", "current_for_sky_now", {"city": "Oslo"})
    shown = json.dumps({"error": "", "response": "2 degrees"})
    dialogues = [row["prompt"] + [
        {"role": "assistant", "content": look}, {"role": "tool", "content": shown},
        {"role": "assistant", "content": TURNS[3]},
    ] for row in rows]  # fmt: skip
    data = tmp_path / "dialogues.jsonl"
    data.write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogues))
    words = config(tmp_path / "sft.yaml", data=str(data), columns=["messages"],
                   assistant_only_loss=True, model_name_or_path=str(start / "base"),
                   output_dir=str(tmp_path / "sft"), max_steps=120, learning_rate=5e-3,
                   per_device_train_batch_size=2, logging_steps=50)  # fmt: skip
    assert not sft.main(words)
    words = ["--model", str(tmp_path / "sft"), "--output", str(tmp_path / "scores.json"),
             "--data", str(start / "data" / "target_weather_questions.jsonl"), "--temperature", "0",
             "--max-new-tokens", "60", "--repetitions", "1", "--tool-url", server.url,
             "--device", "cpu"]  # fmt: skip
    assert evaluate.main(words) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [a["turns"] for a in scores["answers"]] == [["succeeded", "finish"]] * 2
    assert scores["metrics"]["judge"]["mean"] == 1.0
    assert scores["metrics"]["reward"]["mean"] == pytest.approx(5.4)
    assert scores["metrics"]["finish"]["mean"] == scores["metrics"]["calls_ok"]["mean"] == 1.0
    monkeypatch.setenv("TOOLBENCH_URL", server.url)
    REWARDED.clear()  # and the same dialogues in TRL's own loop
    words = reinforce(start, tmp_path, tmp_path / "sft", max_completion_length=200,
                      data=str(start / "data" / "target_weather_questions.jsonl"),
                      temperature=0.05)  # fmt: skip
    assert not grpo.main(words)
    assert pytest.approx([5.4, 5.4]) == REWARDED


def test_a_judge_that_talks_nonsense_stops_the_reward(serve: Callable[..., Served]) -> None:
    def mumble(path: str, asked: Any) -> tuple[int, str]:
        status, text = grade(path, {"messages": [{"content": "Assistant:\n"}]})
        return status, text.replace("unsolved", "hm")

    judge = Judge(f"{serve(mumble).url}/v1", "m", retries=1, template="{said}", verdicts=VERDICTS)
    environment = films(ToolServer("http://localhost:1"))
    with pytest.raises(JudgeError, match="no verdict in 2 replies about 'q'"):
        judge_dialogues([[GOOD, seen(), finish()]], [environment], ["q"], judge)
