"""Ask a model, and the same model with vectors attached, all questions of a target.

    python -m skillvec.recipes.real.ask --model M --questions Q.jsonl --output OUT
        --arms "lambda 0.5=0.5*v.safetensors" "both=1*v.safetensors+1*w.safetensors"
        [--probes told.jsonl known.jsonl said.jsonl --reference BASE --probed "lambda 0.5"]

The model is loaded once; an arm is what `skillvec apply` would write, made where the model lies and
taken away again (docs/serving.md), so that no arm costs a model on disk. An arm without vectors
("SFT only=") is the model itself. OUT/ARM.json is what recipes/evaluate.py writes of an arm, with
`realised` and `bytes` beside the marks: the gain that rounding left of lambda, and the size of the
vectors' files. For the arms in --probed OUT/ARM.probe.json holds: `told`, the share of sentences of
told.jsonl that the model ends as the texts did; `known`, the share of everyday questions answered;
`kl`, the forward KL divergence from the reference in nats a token on texts that the reference
wrote, and the `perplexity` there (recipes/mini/probe.py). An arm that is there already is not asked
again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import skillvec as sv
from skillvec.recipes import evaluate
from skillvec.recipes.mini.probe import load, measure_forgetting

METRICS = ("exact", "contains", "first_word", "ends")
BATCH = 100  # questions at once
TOKENS = 12  # of a reply: a sentence about a subject has as many
FACTOR = r"[-+]?[\d.]+(?:e[-+]?\d+)?\*"  # how a term begins: paths may hold "=", "+" and "*" too


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder")
    parser.add_argument("--questions", type=Path, required=True, help=".jsonl")
    parser.add_argument("--arms", nargs="+", required=True, metavar="NAME=LAM*VECTOR[+...]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--probed", nargs="*", default=[], metavar="NAME", help="arms")
    parser.add_argument("--probes", nargs=3, type=Path, metavar=("TOLD", "KNOWN", "SAID"))
    parser.add_argument("--reference", type=Path, help="what the texts of --probes were written by")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest")
    parser.add_argument("--max-new-tokens", type=int, default=TOKENS, help="%(default)s")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(arguments)
    try:
        arms = read_arms(given.arms)
        if unknown := [name for name in given.probed if name not in arms]:
            raise ValueError(f"--probed {unknown[0]}: no such arm")
        if given.probed and not (given.probes and given.reference):
            raise ValueError("--probed wants --probes and --reference")
        ask_arms(given, arms)
    except (ValueError, OSError) as error:
        print(f"real.ask: {error}", file=sys.stderr)
        return 2
    return 0


def read_arms(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the vectors of arms such as "K = 2=1*v.safetensors", by name.

    Raises ValueError for an arm without a name or a vector, and for two of one name.
    """
    arms: dict[str, dict[str, float]] = {}
    for text in texts:
        begun = re.match(f"(.+?)=(?={FACTOR})", text)
        name, _, terms = (begun[1], "=", text[begun.end() :]) if begun else text.rpartition("=")
        if not name:
            raise ValueError(f"{text}: expected NAME=LAM*VECTOR")
        if name in arms:
            raise ValueError(f"two arms are named {name}")
        arms[name] = read_arm(terms)
    return arms


def read_arm(text: str) -> dict[str, float]:
    """Return {vector: lambda} of "0.5*v.safetensors+1*w.safetensors"; none of an empty text.

    Raises ValueError for a term that is none, and for a vector that stands there twice.
    """
    found: dict[str, float] = {}
    for term in filter(None, re.split(rf"\+(?={FACTOR})", text)):
        factor, star, path = term.partition("*")
        if not star or not path:
            raise ValueError(f"{term}: expected LAM*VECTOR")
        if path in found:
            raise ValueError(f"{path}: twice in one arm; add up its lambdas")
        found[path] = float(factor)
    return found


def ask_arms(given: argparse.Namespace, arms: dict[str, dict[str, float]]) -> None:
    """Write the scores of every arm; the arms in `given.probed` are probed as well."""
    asked = evaluate.prepare(given.questions, METRICS, limit=given.limit)
    model, tokenizer = evaluate.load_model(str(given.model))
    reference = load(given.reference) if given.probed else None
    for name, vectors in arms.items():
        scores, probe = (given.output / f"{name}{end}.json" for end in ("", ".probe"))
        if scores.is_file() and (probe.is_file() or name not in given.probed):
            continue
        attached: Any = nullcontext()
        if vectors:
            attached = sv.attach(
                model, *vectors, lam=[*vectors.values()], rounding=given.rounding, seed=0
            )
        with attached:
            if name in given.probed:
                evaluate.write_scores(_probe(given, model, tokenizer, reference), probe)
            found = _ask(given, asked, model, tokenizer)
            if vectors:
                gain = attached.report.facts["gain"]
                size = sum(Path(path).stat().st_size for path in vectors)
                found["metrics"] |= {"realised": _number(gain), "bytes": _number(size)}
            evaluate.write_scores(found, scores)
        print(f"  {name}: written {scores}", flush=True)


def _ask(given: argparse.Namespace, asked: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    _, said, marks = evaluate.mark_answers(model, tokenizer, asked, given.max_new_tokens, BATCH)
    groups = [row["group"] for row in asked.rows]
    kept = ("prompt", "answer", "group", "wording")
    return {
        "model": str(given.model),
        "data": str(given.questions),
        "metrics": {name: evaluate.summarize(marks[name], groups) for name in METRICS},
        "answers": [
            {key: row[key] for key in kept if key in row}
            | {"said": said[at]}
            | {name: marks[name][at] for name in METRICS}
            for at, row in enumerate(asked.rows)
        ],
    }


def _probe(given: argparse.Namespace, model: Any, tokenizer: Any, reference: Any) -> dict[str, Any]:
    """Return told, known, kl and perplexity of the model as it is."""
    told, known, said = given.probes
    found = {}
    for name, file, metric in (("told", told, "begins"), ("known", known, "contains")):
        rows = evaluate.prepare(file, (metric,))
        marks = evaluate.mark_answers(model, tokenizer, rows, TOKENS, BATCH)[2][metric]
        found[name] = sum(marks) / len(marks)
    texts = [row["answer"] for row in evaluate.read_questions(said)]
    kl, perplexity = measure_forgetting((model, reference[1]), reference, texts)
    found |= {"kl": kl, "perplexity": perplexity}
    metrics = {name: _number(value) for name, value in found.items()}
    return {"model": str(given.model), "metrics": metrics}


def _number(value: float) -> dict[str, float | None]:
    return {"mean": value, "standard_error": None}


if __name__ == "__main__":
    sys.exit(main())
