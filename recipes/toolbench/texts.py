"""What the two stages of supervised fine-tuning read: function by function, first turn by turn.

Hides the wording, and ToolBench's answer files. Invariants: every function is told in words and as
JSON, asked for by name and by purpose, once each; a first turn is taken from ToolBench's answers
where they hold one for the query that did not fail, and else, if there are no answers at all, made
from the API's document. Refuses folders without answers and answer files that cannot be read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.toolbench.apis import Api, Item, function_name, read_apis, standard_name
from skillvec.recipes.toolbench.react import system_text, turn_text

BY_NAME = ("How is `{name}` called?", "What does the function `{name}` do, and what does it take?",
           "Explain `{name}` and its parameters.")  # fmt: skip
BY_PURPOSE = (
    "Which function does this, and how is it called: {purpose}",
    "I need this done: {purpose} What do I call?",
    "Name the function for this task and its parameters: {purpose}",
)
Turn = tuple[str, str, Mapping[str, Any]]  # thought, function, arguments
RESPONSE = 600  # characters of a template response that are told
AS_JSON = " Answer with its definition in JSON."


def knowledge_rows(items: Iterable[Item], rng: random.Random) -> list[dict[str, Any]]:
    """Return prompts and completions about every function of the items, shuffled."""
    apis: dict[str, Api] = {}
    for item in items:
        for api in read_apis(item.documents).values():
            apis.setdefault(api.name, api)
    rows = []
    for api in apis.values():
        told, definition = in_words(api), json.dumps(api.definition(), ensure_ascii=False)
        purpose = api.description or f"what `{api.api}` of {api.tool} offers."
        for templates in (BY_NAME, BY_PURPOSE):
            for answer, wish in ((told, ""), (definition, AS_JSON)):
                asked = rng.choice(templates).format(name=api.name, purpose=purpose) + wish
                rows.append(_row([{"role": "user", "content": asked}], answer))
    rng.shuffle(rows)
    return rows


def in_words(api: Api) -> str:
    """Return a function's document as sentences."""
    told = [f"`{api.name}` is a function of the tool {api.tool} ({api.category})."]
    told += [f"What it does: {api.description}"] if api.description else []
    for p in api.parameters:
        need = "required" if p.required else "optional"
        about = f": {p.description}" if p.description else ""
        default = f" (default {p.default})" if str(p.default or "").strip() else ""
        told.append(f"- {p.name}, {p.kind}, {need}{about}{default}")
    if not api.parameters:
        told.append("It takes no arguments: {}.")
    if api.response:
        data = api.response
        data = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        told.append(f"It returns data such as {data[:RESPONSE]}")
    example = json.dumps({p.name: p.example() for p in api.parameters if p.required})
    return "\n".join([*told, f"Action: {api.name}", f"Action Input: {example}"])


def format_row(
    item: Item, turn_of: Mapping[str, Turn] | None, show: str, turns: int
) -> dict[str, Any] | None:
    """Return a query with its first turn, or None where the answers have none for it.

    `turn_of` maps queries to turns; None makes the turn from the documents.
    """
    apis = read_apis(item.documents)
    turn = _made_turn(item, apis) if turn_of is None else turn_of.get(item.query)
    if turn is None or turn[1] not in apis:
        return None
    system, said = system_text(apis, turns, show), turn_text(*turn)
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": item.query}]
    return _row(prompt, said)


def read_answers(folders: Sequence[str]) -> dict[str, Turn] | None:
    """Return the first turn of every query in ToolBench's answer folders (G1_answer, ...).

    Left out are turns without a thought, that speak of an error, whose arguments are no JSON
    object, or whose call failed.
    None where no folder is given.
    """
    if not folders:
        return None
    turns: dict[str, Turn] = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.json"))
        if not files:
            raise ValueError(f"{folder}: expected ToolBench's answers, *.json, found none")
        for file in files:
            try:
                query, turn = _first_turn(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}: expected an answer of ToolBench: {error}") from None
            if turn is not None:
                turns.setdefault(query, turn)
    if not turns:
        raise ValueError(f"{', '.join(map(str, folders))}: no first turn that can be used")
    return turns


def _first_turn(answer: Mapping[str, Any]) -> tuple[str, Turn | None]:
    generation = answer["answer_generation"]
    query = generation["query"]
    query = (query[0] if isinstance(query, list) else query).strip()
    # one list of messages for each step, each longer by what came before; only the second and
    # later ones hold the result of the first call
    chain = max(generation.get("train_messages") or [[]], key=len)
    thought, turn = "", None
    for message in chain:
        if message["role"] == "function" and turn is not None:
            failed = json.loads(message["content"]).get("error")
            return query, None if failed else turn
        if message["role"] != "assistant" or turn is not None:
            continue
        thought = message.get("content") or thought
        call = message.get("function_call")
        if call:
            turn = _told_turn(thought, call)
            if turn is None:
                break
    return query, turn


def _told_turn(thought: str, call: Mapping[str, str]) -> Turn | None:
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        return None
    usable = thought.strip() and "error" not in thought.lower() and isinstance(arguments, dict)
    return (thought, standard_name(call["name"]), arguments) if usable else None


def _made_turn(item: Item, apis: Mapping[str, Api]) -> Turn:
    wanted = [function_name(api, tool) for tool, api in item.relevant]
    api = next((apis[name] for name in wanted if name in apis), next(iter(apis.values())))
    given = {p.name: p.example() for p in api.parameters if p.required}
    thought = f"The task needs data from {api.tool}; I call {api.name} for it."
    return thought, api.name, given


def _row(prompt: list[dict[str, str]], answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
