"""Closed-book evaluation: answers of a model to a file of questions, scored.

    python -m skillvec.recipes.evaluate --model M --data questions.jsonl --output scores.json

Hides generation and the sums. Rows of the .jsonl file hold `prompt` (text, or messages for the chat
template) and `answer` (text, or a list of acceptable texts), and may hold `question` (what a judge
is shown) and `group` (the document: the standard error is over groups, because questions about one
document are not independent). Invariants: decoding is greedy, or from the whole distribution at the
temperature that is asked for, whatever generation_config the model has; one seed, batch and device
give one set of samples; an empty answer is wrong; scores are written whole or not at all. Refuses
rows without a prompt or an answer, groups on some rows only, unknown metrics, and prompts too long
for the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from skillvec.recipes.judges import (
    JudgeError,
    begins,
    contains,
    ends,
    exact_match,
    f1,
    first_word,
)
from skillvec.trials.loading import load_tokenizer, load_whole
from skillvec.trials.scores import score_of

METRICS: dict[str, Callable[[str, Any], float]] = {
    "exact": exact_match,
    "f1": f1,
    "first_word": first_word,
    "begins": begins,
    "contains": contains,
    "ends": ends,
}
JUDGE = "judge"
JUDGE_FROM_ENVIRONMENT = "skillvec.recipes.judges:from_environment"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="questions, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="scores, .json")
    parser.add_argument("--metrics", nargs="+", default=["exact", "f1"], metavar="NAME",
                        help=f"{', '.join((*METRICS, JUDGE))} (default: exact f1)")  # fmt: skip
    parser.add_argument("--judge", default=JUDGE_FROM_ENVIRONMENT, metavar="MODULE:FUNCTION",
                        help="makes the judge (default: %(default)s)")  # fmt: skip
    parser.add_argument("--judge-url", help="instead of JUDGE_URL in the environment")
    parser.add_argument("--judge-model", help="instead of JUDGE_MODEL in the environment")
    parser.add_argument("--answer", metavar="MODULE:FUNCTION", help="finds the answer in a reply")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="%(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="prompts at a time (%(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--dtype", default="auto", help="auto: as stored; or float32, bfloat16")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(build_parser().parse_args(arguments))
    output: Path = options.pop("output")
    here = {"JUDGE_URL": options.pop("judge_url"), "JUDGE_MODEL": options.pop("judge_model")}
    try:
        with environment(here):
            scores = evaluate(**options)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except JudgeError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    write_scores(scores, output)
    _show(scores, output)
    return 0


def evaluate(
    model: str | Path,
    data: Path,
    *,
    metrics: Sequence[str] = ("exact", "f1"),
    judge: str = JUDGE_FROM_ENVIRONMENT,
    answer: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 64,
    limit: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Ask a model every question of a file and return what `main` writes.

    Raises:
        ValueError: for rows, metrics or names that cannot be used; before the model is loaded.
        JudgeError: where the judge gives no verdict.
    """
    asked = prepare(data, metrics, judge, answer, limit, temperature)
    rows, find_answer, grader = asked.rows, asked.find_answer, asked.grader
    if grader:  # a judge that is down should be found out before the model has answered for hours
        grader.score_all([_item(rows[0], _key(rows[0])[0])])

    loaded, tokenizer = load_model(str(model), dtype, device)
    replies, said, marks = mark_answers(
        loaded, tokenizer, asked, max_new_tokens, batch, temperature, seed
    )
    groups = [row.get("group", number) for number, row in enumerate(rows)]
    kept = ("prompt", "question", "answer", "group")
    return {
        "model": str(model),
        "data": str(data),
        "metrics": {name: summarize(marks[name], groups) for name in metrics},
        "questions": len(rows),
        "groups": len(set(groups)),
        "settings": {
            "max_new_tokens": max_new_tokens, "batch": batch, "limit": limit, "answer": answer,
            "dtype": str(loaded.dtype), "device": str(loaded.device),
            "decoding": f"temperature {temperature:g}" if temperature else "greedy",
            "seed": seed if temperature else None,
            "judge": f"{grader.model} at {grader.url}, by {judge}" if grader else None,
        },
        "answers": [
            {key: row[key] for key in kept if key in row}
            | ({"reply": replies[i]} if find_answer else {})
            | {"said": said[i]}
            | {name: marks[name][i] for name in metrics}
            for i, row in enumerate(rows)
        ],
    }  # fmt: skip


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for rows, metrics, names and a judge that cannot be used; asks nobody."""
    here = {"JUDGE_URL": options.judge_url, "JUDGE_MODEL": options.judge_model}
    wanted = [getattr(options, name) for name in ("data", "metrics", "judge", "answer", "limit")]
    with environment(here):
        prepare(*wanted, options.temperature)


class Asked(NamedTuple):
    """Questions, and how answers to them are marked: what an evaluation knows without a model.

    `find_answer` finds the answer in a reply (none: the reply is it), `grader` is the judge (none:
    no metric asks for it).
    """

    rows: list[dict[str, Any]]
    metrics: tuple[str, ...]
    find_answer: Callable[[str], Any] | None
    answer: str | None  # its name
    grader: Any


def prepare(
    data: Path,
    metrics: Sequence[str] = ("exact", "f1"),
    judge: str = JUDGE_FROM_ENVIRONMENT,
    answer: str | None = None,
    limit: int | None = None,
    temperature: float = 0.0,
) -> Asked:
    """Read and check what an evaluation needs beside its model; ValueError for what is wrong."""
    from skillvec.recipes.training import load_function  # not for --help

    unknown = [name for name in metrics if name not in (*METRICS, JUDGE)]
    if unknown or not metrics:
        raise ValueError(
            f"metrics: expected one or more of {', '.join((*METRICS, JUDGE))}, found "
            f"{', '.join(unknown) or 'none'}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {temperature}")
    rows = read_questions(data, limit)
    find_answer = load_function(answer) if answer else None
    grader = load_function(judge)() if JUDGE in metrics else None
    return Asked(rows, tuple(metrics), find_answer, answer, grader)


def mark_answers(
    model: Any,
    tokenizer: Any,
    asked: Asked,
    max_new_tokens: int = 64,
    batch: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[str], list[str], dict[str, list[float]]]:
    """Ask a loaded model all questions; return replies, the answers in them, and marks by metric.

    Raises:
        ValueError: for prompts that cannot be asked, and where no text is found in a reply.
        JudgeError: where the judge gives no verdict.
    """
    prompts = [row["prompt"] for row in asked.rows]
    replies = answer_all(model, tokenizer, prompts, max_new_tokens, batch, temperature, seed)
    said = [asked.find_answer(reply) for reply in replies] if asked.find_answer else replies
    if wrong := [text for text in said if not isinstance(text, str)]:
        raise ValueError(f"{asked.answer}: expected a text for every reply, found {wrong[0]!r}")
    answered = [*zip(said, asked.rows, strict=True)]
    marks = {
        name: [METRICS[name](text, row["answer"]) for text, row in answered]
        for name in asked.metrics
        if name != JUDGE
    }
    if asked.grader:
        marks[JUDGE] = asked.grader.score_all(list(map(_item, asked.rows, said)))
    return replies, said, marks


def read_questions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file of questions; ValueError names the lines that are wrong."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"{path}: expected an existing .jsonl file of questions")
    rows, numbers = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            numbers.append(number)
    for what, is_good in (
        ("an object", lambda row: isinstance(row, dict)),
        ("`prompt`: a text, or messages with role and content", lambda row: _is_prompt(row)),
        ("`answer`: a text, or a list of texts, none empty", lambda row: _is_key(row)),
    ):
        bad = [number for number, row in zip(numbers, rows, strict=True) if not is_good(row)]
        if bad:
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise ValueError(f"{path}: {len(bad)} rows lack {what}; lines {shown}")
    with_group = sum("group" in row for row in rows)
    if with_group not in (0, len(rows)):
        raise ValueError(f"{path}: {with_group} of {len(rows)} rows have a `group`; all or none")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected 1 or more, found {limit}")
    if not rows:
        raise ValueError(f"{path}: no questions")
    return rows[:limit]


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Return a model in eval mode and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_whole(AutoModelForCausalLM, name, name, dtype=dtype).to(device).eval()
    return model, load_tokenizer(name)


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 64,
    batch: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Go on after every prompt; messages go through the chat template.

    Temperature 0 is greedy. Above 0 every token is drawn from the whole distribution (no top-k, no
    top-p), by torch's generator, seeded once: the batch is part of what a sample depends on.

    Raises:
        ValueError: for messages without a chat template, and prompts that do not fit the model.
    """
    import torch
    from transformers import GenerationConfig

    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    room = getattr(model.config, "max_position_embeddings", None)
    long = [i for i, ids in enumerate(encoded) if room and len(ids) + max_new_tokens > room]
    if long:
        raise ValueError(
            f"{len(long)} prompts and {max_new_tokens} new tokens do not fit the model's {room} "
            f"positions; the first has {len(encoded[long[0]])} tokens: {prompts[long[0]]!r:.200}"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    said: list[str] = []
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = sampled if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    try:
        # generate() fills what we leave out from here: a repetition penalty is not greedy decoding
        model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
        for start in range(0, len(encoded), batch):
            part = encoded[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([[pad or 0] * (width - len(one)) + one for one in part])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    **how,
                )
            said += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    finally:
        model.generation_config = own
    return said


def summarize(marks: Sequence[float], groups: Sequence[Any]) -> dict[str, float | None]:
    """Return the mean over questions and its standard error over groups (null below two)."""
    score = score_of(marks, groups)
    return {"mean": score.mean, "standard_error": score.standard_error}


def write_scores(scores: dict[str, Any], output: Path) -> None:
    """Write JSON under a temporary name and rename it, so that a file is always whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(output)


def _encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("prompts are messages, but the model's tokenizer has no chat template")
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_prompt(row: dict[str, Any]) -> bool:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(part), str) and message[part].strip() for part in ("role", "content")
    )


def _is_key(row: dict[str, Any]) -> bool:
    key = _key(row)
    return bool(key) and all(isinstance(gold, str) and gold.strip() for gold in key)


def _key(row: dict[str, Any]) -> list[Any]:
    answer = row.get("answer")
    return answer if isinstance(answer, list) else [answer]


def _item(row: dict[str, Any], said: str) -> tuple[str, str, list[str]]:
    """Return what a judge is asked; without a `question`, the prompt's text (the last message)."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return row.get("question") or text, said, _key(row)


@contextmanager
def environment(values: dict[str, str | None]) -> Iterator[None]:
    """Set environment variables, those with a value, for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _show(scores: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("metric", "mean", "standard error"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, score in scores["metrics"].items():
        error = score["standard_error"]
        table.add_row(name, f"{score['mean']:.3f}", "-" if error is None else f"{error:.3f}")
    title = f"{scores['model']}: {scores['questions']} questions, {scores['groups']} groups"
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"written: {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
