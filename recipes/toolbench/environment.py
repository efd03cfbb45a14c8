"""TRL's environments: one class for each list of APIs, one method for each function.

    environments: skillvec.recipes.toolbench.environment:environments  # in GRPO's configuration

Hides how an API document becomes a Python method from whose signature and docstring TRL takes the
tool's schema. Invariants: `calls` holds every call that reached the environment, in order; a call
whose arguments do not fit the document fails without the server being asked; a server's failure is
kept in `failure`, because TRL turns the exception into a message, and the reward raises it; what
the model sees of a result is its beginning, of at most OBSERVATION tokens of its own. Refuses to
start without a judge, or with a tool server that does not answer.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillvec.recipes.evaluate import load_tokenizer
from skillvec.recipes.toolbench.apis import Api, read_apis
from skillvec.recipes.toolbench.client import ToolServer, ToolServerError

OBSERVATION = 2000  # tokens of one result, the authors' limit
PYTHON_TYPES = {"string": str, "number": float, "integer": int, "boolean": bool}


@dataclass(frozen=True)
class Call:
    """One call that reached the environment; `error` is empty where it succeeded."""

    name: str
    arguments: Mapping[str, Any]
    error: str
    response: str


class ApiEnvironment:
    """What the classes share; `_apis`, `_server` and `_tokenizer` are set on each class."""

    _apis: Mapping[str, Api]
    _server: ToolServer
    _tokenizer: Any

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.failure: ToolServerError | None = None

    def reset(self, **row: Any) -> None:
        """Forget the calls of the dialogue before; TRL passes the row's columns."""
        self.calls, self.failure = [], None

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Call the function and return {error, response} as the model sees it."""
        api = self._apis[name]
        error, response = _misfit(api, arguments), ""
        if not error:
            try:
                error, response = self._server.call(api, arguments)
            except ToolServerError as failure:
                self.failure = failure
                raise
        self.calls.append(Call(name, dict(arguments), error, response))
        shown = json.dumps({"error": error, "response": response}, ensure_ascii=False)
        return first_tokens(shown, self._tokenizer, OBSERVATION)


def first_tokens(text: str, tokenizer: Any, limit: int) -> str:
    """Return the longest beginning of at most `limit` tokens, all whole, and of whole characters.

    Tokenized anew, as it will be in a dialogue, it has the tokens that it was cut to: no merge of
    byte pairs crosses the cut.
    """
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = spans["offset_mapping"]
    if len(places) <= limit:
        return text
    # a character of several tokens has one span for all of them: it goes if one of them does
    return text[: min(places[limit - 1][1], places[limit][0])]


def environment_class(
    apis: Mapping[str, Api], server: ToolServer, tokenizer: Any
) -> type[ApiEnvironment]:
    """Return a class with one method for each function."""
    members: dict[str, Any] = {"_apis": dict(apis), "_server": server, "_tokenizer": tokenizer}
    return type("Apis", (ApiEnvironment,), members | {a.name: _method(a) for a in apis.values()})


def environments(rows: Any, model: str) -> dict[str, type[ApiEnvironment]]:
    """Return the environments of a dataset by name: TRL's factories.

    `rows` has the columns `environment`, a name, and `api_list`, ToolBench's documents as JSON;
    `model` is the folder or Hub id of the model in training, whose tokenizer counts.

    Raises ValueError for columns that are missing or at odds, and without a judge;
    ToolServerError where no tool server answers.
    """
    from skillvec.recipes.toolbench.judge import judge_from_environment

    judge_from_environment()  # its settings are checked now, not after the first dialogues
    missing = {"environment", "api_list", "question"} - set(rows.column_names)
    if missing:
        raise ValueError(f"ToolBench rows: no column {', '.join(sorted(missing))}; "
                         f"found {', '.join(rows.column_names)}; make them with "
                         "skillvec.recipes.toolbench.prepare")  # fmt: skip
    server = ToolServer.from_environment()
    server.check()
    return classes_of(rows, server, load_tokenizer(model))


def classes_of(rows: Any, server: ToolServer, tokenizer: Any) -> dict[str, type[ApiEnvironment]]:
    """Return one class for each name; ValueError where `api_list` is unreadable."""
    texts: dict[str, str] = {}
    for number, row in enumerate(rows):
        name, text = row["environment"], row["api_list"]
        if texts.setdefault(name, text) != text:
            raise ValueError(f"row {number}: environment {name!r} has another api_list before; "
                             "give each list a name of its own")  # fmt: skip
    classes = {}
    for name, text in texts.items():
        try:
            classes[name] = environment_class(read_apis(json.loads(text)), server, tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"environment {name!r}: api_list: expected ToolBench's documents as "
                             f"JSON: {error}") from None  # fmt: skip
    return classes


def _misfit(api: Api, arguments: Mapping[str, Any]) -> str:
    """Return what is wrong with the arguments, or nothing."""
    missing = [p.name for p in api.parameters if p.required and p.name not in arguments]
    unknown = sorted(set(arguments) - {p.name for p in api.parameters})
    if missing:
        return f"missing required parameters: {', '.join(missing)}"
    return f"unknown parameters: {', '.join(unknown)}" if unknown else ""


def _method(api: Api) -> Any:
    """Return a method with the name, signature and docstring of the function."""

    def call(self: ApiEnvironment, /, **arguments: Any) -> str:
        return self._call(api.name, arguments)

    kinds = {p.name: PYTHON_TYPES[p.kind] for p in api.parameters}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for p in api.parameters:
        default = inspect.Parameter.empty if p.required else None
        parameters.append(
            inspect.Parameter(
                p.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[p.name]
            )
        )
    call.__name__ = call.__qualname__ = api.name
    call.__annotations__ = {**kinds, "return": str}
    call.__signature__ = inspect.Signature(parameters, return_annotation=str)  # type: ignore[attr-defined]
    lines = [f"    {p.name}: {_plain(p.description) or p.name}" for p in api.parameters]
    call.__doc__ = "\n".join([_plain(api.description) or api.name, "", "Args:", *lines])
    if not lines:
        call.__doc__ = _plain(api.description) or api.name
    return call


def _plain(text: str) -> str:
    """Drop what transformers reads as a heading of the docstring, or as a list of choices."""
    return re.sub(r"(Args|Returns|Raises):|\(choices:", r"\1", text).strip()
