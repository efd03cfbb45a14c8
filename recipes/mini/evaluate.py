"""Closed-book evaluation: greedy answers, exact match, and the reward that is the same rule.

Hides generation and scoring. Invariants: the prompt holds the question alone, never the biography;
an empty answer is wrong; the GRPO reward and the reported accuracy call the same `is_correct`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recipes.mini.world import Question

# one word and the end token; a third token lets a run-on answer be seen, and be wrong
MAX_ANSWER_TOKENS = 3


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered exactly, with its standard error over people.

    The questions about one person share that person's biographies, so people are the independent
    units. The error covers the choice of people, not the seed of the training. `first_word` is the
    share of answers that begin rightly, whatever follows: facts found, form aside.
    """

    mean: float
    first_word: float
    standard_error: float
    questions: int
    people: int


def is_correct(answer: str, gold: str) -> bool:
    """Compare after stripping spaces; an empty answer is wrong."""
    return bool(answer.strip()) and answer.strip() == gold.strip()


def exact_match_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward 1 for an exact answer, else 0; TRL passes the dataset's columns by keyword."""
    return [float(is_correct(said, gold)) for said, gold in zip(completions, answer, strict=True)]


@torch.inference_mode()
def answer_questions(
    model: Any, tokenizer: Any, asked: Sequence[Question], batch: int = 256
) -> list[str]:
    """Generate greedily for every question; `tokenizer` must pad on the left."""
    said: list[str] = []
    for start in range(0, len(asked), batch):
        prompts = [question.prompt for question in asked[start : start + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        width = encoded["input_ids"].shape[1]
        said += tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return said


def accuracy(asked: Sequence[Question], said: Sequence[str]) -> Accuracy:
    """Score answers, person by person; needs at least two people."""
    scores: dict[str, list[float]] = {}
    first_words = [
        answer.split()[:1] == [question.answer]
        for question, answer in zip(asked, said, strict=True)
    ]
    for question, answer in zip(asked, said, strict=True):
        scores.setdefault(question.name, []).append(float(is_correct(answer, question.answer)))
    if len(scores) < 2:
        raise ValueError(
            f"accuracy: expected questions about 2 or more people, found {len(scores)}"
        )
    by_person = [fmean(marks) for marks in scores.values()]
    return Accuracy(
        mean=fmean(mark for marks in scores.values() for mark in marks),
        first_word=fmean(first_words),
        standard_error=stdev(by_person) / len(by_person) ** 0.5,
        questions=len(asked),
        people=len(by_person),
    )


def evaluate_checkpoint(folder: Path, asked: Sequence[Question]) -> Accuracy:
    """Load a model and its tokenizer from a folder and score it on the questions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # AutoTokenizer would see model_type qwen2 and put Qwen's byte-level splitting over our words
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return accuracy(asked, answer_questions(model, tokenizer, asked))
