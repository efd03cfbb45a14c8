"""The text format of a turn, and the tokenizer that writes and reads it.

    python -m skillvec.recipes.toolbench.react --model Qwen/Qwen2.5-7B-Instruct -o BASE

Hides how Thought / Action / Action Input becomes a tool call for TRL: react.jinja renders it, and
RESPONSE_TEMPLATE tells transformers' parser to read it back. Invariants: one turn is one call, for
whatever follows the Action Input belongs to it; a turn without a readable action is a call without
a name, so that TRL answers with an error and the dialogue goes on; Finish is no tool call, because
after a tool call TRL lets the model speak again. Both are kept in the tokenizer's files, which
every stage hands on. Refuses a tokenizer without ChatML's tokens or with another end of turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.toolbench.apis import Api
from skillvec.recipes.training import fetch_model

SHOWN = ("nothing", "names", "documents")
SYSTEM = """You solve the user's task by calling functions, one at a time.

Write every turn in exactly this form:
Thought: what is known, and what to do next
Action: the name of one function, nothing else
Action Input: its arguments, one JSON object

The result comes back as an Observation. You have {turns} turns; the last must be Finish.

The functions are those whose documentation you have learnt; recall their names and parameters, and
invent none. One function is always there:
Finish: ends the task. Arguments: return_type ("give_answer", or "give_up" when the task cannot be
done) and final_answer (all that the user will see; needed with give_answer)."""
SHOW_NAMES = "\n\nFunctions for this task: {names}"
SHOW_DOCUMENTS = "\n\nFunctions for this task:\n{documents}"

_ACTION = r"(?:\A|\n)[ \t]*Action:[ \t]*{name}[ \t]*\n+[ \t]*Action Input:[ \t]*"
_CALL = _ACTION.format(name=r"(?P<name>(?!Finish\s)\S+)")
_NO_ACTION = r"\A(?!(?s:.*?)" + _ACTION.format(name=r"\S+") + r")(?P<name>)"
_REST = {
    "close_pattern": r"<\|im_end\|>\s*",
    "content": "json",
    "content_args": {"allow_non_json": True},
}
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": _REST
        | {
            "open_pattern": f"{_CALL}|{_NO_ACTION}",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "finish": _REST
        | {
            "open_pattern": _ACTION.format(name="Finish"),
            "transform": {"arguments": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def system_text(apis: Mapping[str, Api], turns: int = 5, show: str = "nothing") -> str:
    """Return the system message; `show` is one of SHOWN, what it tells of the task's functions."""
    if show not in SHOWN:
        raise ValueError(f"show: expected one of {', '.join(SHOWN)}, found {show!r}")
    text = SYSTEM.format(turns=turns)
    if show == "names":
        text += SHOW_NAMES.format(names=", ".join(apis))
    if show == "documents":
        listed = (json.dumps(api.definition(), ensure_ascii=False) for api in apis.values())
        text += SHOW_DOCUMENTS.format(documents="\n".join(listed))
    return text


def turn_text(thought: str, action: str, arguments: Mapping[str, Any] | str) -> str:
    """Return what the model writes in one turn."""
    given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"Thought: {' '.join(thought.split())}\nAction: {action}\nAction Input: {given}"


def install(tokenizer: Any) -> Any:
    """Set the chat template and the response template; ValueError where ChatML is missing."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in vocabulary]
    if missing or tokenizer.eos_token != "<|im_end|>":
        raise ValueError(
            "tokenizer: expected ChatML, with <|im_start|> and <|im_end|> as tokens and <|im_end|> "
            f"as end of text; missing {', '.join(missing) or 'none'}, end of text is "
            f"{tokenizer.eos_token!r}; use an instruct model such as Qwen/Qwen2.5-7B-Instruct"
        )
    tokenizer.chat_template = Path(__file__).with_name("react.jinja").read_text(encoding="utf-8")
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def write_model(model: str, output: Path) -> None:
    """Write a folder with the model's own files, as links, and the tokenizer for this format."""
    from transformers import AutoTokenizer

    folder = Path(fetch_model(model))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{model}: expected a folder or Hub id with *.safetensors")
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output}: is the model itself; choose another folder")
    tokenizer = install(AutoTokenizer.from_pretrained(folder))
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    for file in sorted(folder.iterdir()):
        link = output / file.name
        written = link.exists() and not link.is_symlink()
        if file.is_file() and not written and file.suffix != ".md":
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "skillvec.recipes.toolbench.react", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True, help="Folder or Hub id of a ChatML model.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        write_model(given.model, given.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
