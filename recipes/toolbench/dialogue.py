"""Dialogues of a model with the tools: turn after turn, in batches, as TRL holds them in training.

Hides generation and the bookkeeping of tokens. Invariants: a turn's tokens are kept as they were
generated, never written again; turns are read by TRL's own parser; a call that cannot be made gets
the message that TRL would give. Refuses prompts that do not fit the model. A dialogue that grows
too long ends there, without Finish, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from skillvec.recipes.toolbench.client import ToolServerError
from skillvec.recipes.toolbench.environment import ApiEnvironment

Speak = Callable[[list[list[int]]], list[list[int]]]  # token ids so far -> token ids of the turn


@dataclass
class Dialogue:
    """Messages after the prompt, the tokens so far, and the environment with its calls."""

    ids: list[int]
    environment: ApiEnvironment
    messages: list[dict[str, Any]] = field(default_factory=list)


def hold_dialogues(
    speak: Speak,
    tokenizer: Any,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    environments: Sequence[ApiEnvironment],
    turns: int,
    room: int,
    workers: int = 16,
) -> list[Dialogue]:
    """Let the model speak up to `turns` times in each dialogue, and answer its calls in between.

    `room` is the number of tokens after which a dialogue cannot go on.

    Raises ValueError for prompts beyond `room`, ToolServerError from the tools.
    """
    from trl.chat_template_utils import parse_response

    dialogues = []
    for prompt, environment in zip(prompts, environments, strict=True):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        environment.reset()
        dialogues.append(Dialogue(list(tokenizer(text)["input_ids"]), environment))
    long = [i for i, dialogue in enumerate(dialogues) if len(dialogue.ids) > room]
    if long:
        raise ValueError(f"{len(long)} prompts leave no room for a turn: at most {room} tokens, "
                         f"prompt {long[0]} has {len(dialogues[long[0]].ids)}")  # fmt: skip
    active = dialogues
    for turn in range(turns):
        for dialogue, said in zip(active, speak([d.ids for d in active]), strict=True):
            tools = tools_of(dialogue.environment)
            parsed = parse_response(tokenizer, said, prefix=dialogue.ids, tools=tools)
            dialogue.messages.append(parsed)
            dialogue.ids += said
        active = [dialogue for dialogue in active if dialogue.messages[-1].get("tool_calls")]
        if not active or turn + 1 == turns:
            break
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda d: answer_calls(d.environment, d.messages[-1]), active))
        going = []
        for dialogue, answers in zip(active, results, strict=True):
            extended = dialogue.ids + result_ids(tokenizer, answers)
            if len(extended) <= room:
                dialogue.messages += answers
                dialogue.ids = extended
                going.append(dialogue)
        active = going
        if not active:
            break
    return dialogues


def tools_of(environment: ApiEnvironment) -> list[Any]:
    """Return the bound methods from which transformers reads the tools' schemas."""
    return [getattr(environment, name) for name in environment._apis]


def answer_calls(environment: ApiEnvironment, message: Mapping[str, Any]) -> list[dict[str, str]]:
    """Make the calls of a turn and return the messages that TRL would add."""
    answers = []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            if name not in environment._apis:
                raise ValueError(f"Tool {name} not found.")
            content = getattr(environment, name)(**arguments)
        except ToolServerError:
            raise  # in training the reward raises it: there TRL catches everything
        except Exception as error:
            content = str({"error": str(error)})
        answers.append({"role": "tool", "name": name, "content": content})
    return answers


def result_ids(tokenizer: Any, answers: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens between the end of a turn and the model's next one."""
    spoken = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    before = tokenizer.apply_chat_template(spoken, tokenize=False)
    after = tokenizer.apply_chat_template(
        [*spoken, *answers], add_generation_prompt=True, tokenize=False
    )
    begin = before.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)  # the model wrote that
    return list(tokenizer(after[begin:], add_special_tokens=False)["input_ids"])


def speaker(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float, batch: int
) -> Speak:
    """Return a function that lets the model speak; temperature 0 is greedy."""
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
        **(how if temperature else {"do_sample": False}),
    )  # fmt: skip

    def speak(asked: list[list[int]]) -> list[list[int]]:
        said: list[list[int]] = []
        own, model.generation_config = model.generation_config, settings
        try:
            for start in range(0, len(asked), batch):
                part = asked[start : start + batch]
                width = max(map(len, part))
                ids = torch.tensor([[pad] * (width - len(one)) + one for one in part])
                mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
                with torch.inference_mode():
                    out = model.generate(
                        input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
                    )
                said += [_until_end(one, tokenizer.eos_token_id) for one in out[:, width:].tolist()]
        finally:
            model.generation_config = own
        return said

    return speak


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
