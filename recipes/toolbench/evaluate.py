"""Evaluation on ToolBench: whole dialogues with the tools, judged three ways, several times.

    python -m skillvec.recipes.toolbench.evaluate --model M --data questions.jsonl -o scores.json

Hides dialogues and sums. Rows are those of skillvec.recipes.toolbench.prepare: `prompt` (messages),
`environment`, `api_list`, `question`. Invariants: every repetition holds its own dialogues, with
its own seed; a question's score is the mean over them; the standard error is over lists of APIs,
because queries about one list are not independent. Refuses rows without these columns, and starts
only after judge and tool server have answered. A failure of either ends the evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from skillvec.recipes.evaluate import load_model, load_tokenizer, summarize, write_scores
from skillvec.recipes.judges import JudgeError
from skillvec.recipes.toolbench.client import ToolServer, ToolServerError
from skillvec.recipes.toolbench.dialogue import hold_dialogues, speaker
from skillvec.recipes.toolbench.environment import classes_of
from skillvec.recipes.toolbench.judge import judge_from_environment
from skillvec.recipes.toolbench.reward import has_answer, judge_dialogues, read_turns, score, tell

COLUMNS = ("prompt", "environment", "api_list", "question")
METRICS = ("judge", "calls_ok", "finish", "reward")


def evaluate(
    model: str,
    data: Path,
    judge: Any,
    server: ToolServer,
    repetitions: int = 3,
    turns: int = 5,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch: int = 16,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Hold and judge the dialogues; return what `main` writes.

    `calls_ok` is the share of a dialogue's turns before the last that were calls and succeeded, 0
    where the first turn is the last; `finish` says whether it ended with an answer.

    Raises ValueError for rows and settings, JudgeError, ToolServerError.
    """
    if repetitions < 1 or turns < 1 or temperature < 0:
        raise ValueError("repetitions and turns: expected 1 or more; temperature: 0 or more")
    rows = read_rows(data)[:limit]
    tokenizer = load_tokenizer(model)
    if getattr(tokenizer, "response_template", None) is None:
        raise ValueError(f"{model}: the tokenizer has no response_template; make the model that "
                         "training starts from with skillvec.recipes.toolbench.react")  # fmt: skip
    classes = classes_of(rows, server, tokenizer)
    server.check()
    judge.score("Is anything there?", "Observation: no")  # a judge that is down is found out now
    import torch

    loaded, _ = load_model(model, device=device)
    speak = speaker(loaded, tokenizer, max_new_tokens, temperature, top_p, batch)
    room = loaded.config.max_position_embeddings - max_new_tokens
    answers: list[dict[str, Any]] = []
    for repetition in range(repetitions):
        torch.manual_seed(seed + repetition)
        environments = [classes[row["environment"]]() for row in rows]
        prompts = [row["prompt"] for row in rows]
        held = hold_dialogues(speak, tokenizer, prompts, environments, turns, room)
        said = [dialogue.messages for dialogue in held]
        judged = judge_dialogues(said, environments, [row["question"] for row in rows], judge)
        for row, messages, env, verdict in zip(rows, said, environments, judged, strict=True):
            kinds = read_turns(messages, env)
            answers.append({
                "question": row["question"], "environment": row["environment"],
                "repetition": repetition, "said": tell(messages), "turns": kinds,
                "judge": verdict, "finish": float(has_answer(messages)),
                "calls_ok": fmean([float(kind == "succeeded") for kind in kinds[:-1]] or [0.0]),
                "reward": score(kinds, verdict),
            })  # fmt: skip
    marks = {m: [fmean(a[m] for a in answers[i :: len(rows)]) for i in range(len(rows))]
             for m in METRICS}  # fmt: skip
    groups = [row["environment"] for row in rows]
    return {
        "model": model, "data": str(data),
        "metrics": {name: summarize(marks[name], groups) for name in METRICS},
        "repetitions": [fmean(a["judge"] for a in answers if a["repetition"] == i)
                        for i in range(repetitions)],
        "questions": len(rows), "groups": len(set(groups)),
        "settings": {
            "repetitions": repetitions, "turns": turns, "max_new_tokens": max_new_tokens,
            "temperature": temperature, "top_p": top_p, "batch": batch, "limit": limit,
            "seed": seed, "judge": f"{judge.model} at {judge.url}", "tools": server.url,
        },
        "answers": answers,
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; ValueError for columns that are missing or empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected rows in JSON, one a line: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    for number, row in enumerate(rows):
        missing = [name for name in COLUMNS if not row.get(name)]
        if missing:
            raise ValueError(f"{path}: row {number}: no {', '.join(missing)}; make the rows with "
                             "skillvec.recipes.toolbench.prepare")  # fmt: skip
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "skillvec.recipes.toolbench.evaluate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="questions, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="scores, .json")
    parser.add_argument("--judge-url", help="instead of JUDGE_URL in the environment")
    parser.add_argument("--judge-model", help="instead of JUDGE_MODEL in the environment")
    parser.add_argument("--tool-url", help="instead of TOOLBENCH_URL in the environment")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="in one turn")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for rows and settings that cannot be used; neither server is asked."""
    _, server = _servers(options.judge_url, options.judge_model, options.tool_url)
    classes_of(read_rows(options.data)[: options.limit], server, tokenizer=None)


def _servers(
    judge_url: str | None, judge_model: str | None, tool_url: str | None
) -> tuple[Any, ToolServer]:
    """Return the judge and the tool server, from the options or else from the environment."""
    asked = {"url": judge_url, "model": judge_model}
    judge = judge_from_environment(**{name: value for name, value in asked.items() if value})
    return judge, ToolServer.from_environment(**({"url": tool_url} if tool_url else {}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    output = given.pop("output")
    servers = [given.pop(name) for name in ("judge_url", "judge_model", "tool_url")]
    try:
        judge, server = _servers(*servers)
        scores = evaluate(judge=judge, server=server, **given)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (JudgeError, ToolServerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    write_scores(scores, output)
    for name, found in scores["metrics"].items():
        deviation = found["standard_error"]
        spread = "-" if deviation is None else f"{deviation:.3f}"
        print(f"{name:<10} {found['mean']:7.3f}  standard error {spread}")
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
