"""The reward of a dialogue, turn by turn, with a language model that judges the end.

    rewards: [skillvec.recipes.toolbench.reward:reward]     # in the configuration of GRPO

| turn | reward |
|---|---|
| a call that succeeds | .4 |
| a call that reads well but fails: an unknown function, arguments that do not fit, an error | -.1 |
| no readable action, or an input that is no JSON object | -.2 |
| the last turn, Finish | 5 x judge: solved 1, partial .5, unsolved 0 |
| the last turn, without Finish | -.2 |
| Finish as the first turn | -10 |

Hides how a dialogue's messages are read. Invariants: the last turn earns its own line only, never a
call's; a dialogue that gives up, or finishes without an answer, is unsolved without the judge being
asked. Refuses to go on after a failure of the tool server or of the judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from skillvec.recipes.judges import Judge
from skillvec.recipes.toolbench.environment import ApiEnvironment
from skillvec.recipes.toolbench.judge import judge_from_environment

CALLS = {"succeeded": 0.4, "failed": -0.1, "malformed": -0.2}
SOLVED, WITHOUT_FINISH, FINISH_FIRST = 5.0, -0.2, -10.0
UNREADABLE = "(no JSON object)"  # what the arguments are under that could not be read
Message = Mapping[str, Any]


def reward(
    completions: Sequence[Sequence[Message]],
    environments: Sequence[ApiEnvironment],
    question: Sequence[str],
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """Return the reward of every dialogue; TRL passes environments and columns by keyword.

    Afterwards the messages hold arguments as JSON text, for TRL's `log_completions`: name this
    reward last if there are others.

    Raises ToolServerError and JudgeError: both stop the training.
    """
    judged = judge_dialogues(completions, environments, question, judge_from_environment())
    if log_metric is not None:
        log_metric("toolbench/judge", sum(judged) / len(judged))
    dialogues = zip(completions, environments, judged, strict=True)
    rewards = [score(read_turns(said, env), verdict) for said, env, verdict in dialogues]
    for messages in completions:
        _make_printable(messages)
    return rewards


def judge_dialogues(
    completions: Sequence[Sequence[Message]],
    environments: Sequence[ApiEnvironment],
    question: Sequence[str],
    judge: Judge,
) -> list[float]:
    """Return the judge's score of every dialogue, 0.0 for one without an answer to judge.

    Raises ToolServerError if the tool server failed in any of them, before the judge is asked.
    """
    for environment in environments:
        if environment.failure is not None:
            raise environment.failure
    items = [
        (asked, tell(messages) if has_answer(messages) else "", ())
        for asked, messages in zip(question, completions, strict=True)
    ]
    return judge.score_all(items)


def read_turns(messages: Sequence[Message], environment: ApiEnvironment) -> list[str]:
    """Return what each turn was: a key of CALLS, "finish", or "pending" (a call not executed)."""
    calls = iter(environment.calls)
    turns = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        executed = position + 1 < len(messages) and messages[position + 1]["role"] == "tool"
        if "finish" in message:
            turns.append("finish")
        elif asked := message.get("tool_calls"):
            kinds = [_kind(call["function"], environment, executed, calls) for call in asked]
            worst = sorted(kinds, key=["malformed", "failed", "pending", "succeeded"].index)
            turns.append(worst[0])
        else:
            turns.append("malformed")
    return turns


def _make_printable(messages: Sequence[Message]) -> None:
    # TRL prints calls whose arguments are an object or its text, and writes columns of one type
    for message in messages:
        asked = [call["function"] for call in message.get("tool_calls") or []]
        for function in [*asked, *([message["finish"]] if "finish" in message else [])]:
            given = function["arguments"]
            given = given if isinstance(given, Mapping) else {UNREADABLE: given}
            function["arguments"] = json.dumps(given, ensure_ascii=False)


def _kind(
    function: Message, environment: ApiEnvironment, executed: bool, calls: Iterator[Any]
) -> str:
    if not function["name"] or not isinstance(function["arguments"], Mapping):
        return "malformed"  # never reached the environment, like an unknown name
    if function["name"] not in environment._apis:
        return "failed"
    if not executed:
        return "pending"
    return "failed" if next(calls).error else "succeeded"


def score(turns: Sequence[str], judged: float) -> float:
    """Return the reward of the turns; `judged` counts only after a Finish."""
    if not turns:
        return WITHOUT_FINISH  # cut off before anything could be read
    total = sum(CALLS[turn] for turn in turns[:-1])
    if turns[-1] != "finish":
        return total + WITHOUT_FINISH
    return total + (FINISH_FIRST if len(turns) == 1 else SOLVED * judged)


def has_answer(messages: Sequence[Message]) -> bool:
    """Say whether the dialogue ends with Finish and an answer, after at least one other turn."""
    spoken = [message for message in messages if message["role"] == "assistant"]
    arguments = spoken[-1].get("finish", {}).get("arguments") if len(spoken) > 1 else None
    if not isinstance(arguments, Mapping):
        return False
    if str(arguments.get("return_type")).startswith("give_up"):
        return False
    return bool(str(arguments.get("final_answer") or "").strip())


def tell(messages: Sequence[Message]) -> str:
    """Return the dialogue as the judge reads it."""
    lines = []
    for message in messages:
        if message["role"] == "tool":
            lines.append(f"Observation: {message['content']}")
            continue
        lines += [message["content"]] if message.get("content") else []
        asked = [call["function"] for call in message.get("tool_calls") or []]
        asked += [{"name": "Finish"} | message["finish"]] if "finish" in message else []
        for function in asked:
            given = json.dumps(function["arguments"], ensure_ascii=False)
            lines.append(f"Action: {function['name']}\nAction Input: {given}")
    return "\n".join(lines)
