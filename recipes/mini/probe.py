"""What a model of the miniature knows and what it forgot, without asking it anything.

    python -m skillvec.recipes.mini.probe --model M --reference BASE --told questions.jsonl
        --texts base_texts.jsonl --output probe.json

`told`: the share of facts whose value, among all values of that attribute, is the likeliest end of
a sentence as the texts have it ("sera brupson was born in"): the fact is in the weights, whether or
not a question finds it. `kl`: forward KL divergence of the model from the reference, nats a token,
on texts that the reference was trained on; 0 is nothing forgotten. `perplexity`: on the same texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True, help="the base model")
    parser.add_argument("--told", type=Path, required=True, help="questions, .jsonl")
    parser.add_argument("--texts", type=Path, required=True, help="texts, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    told = [json.loads(line) for line in options.told.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    model, reference = load(options.model), load(options.reference)
    kl, perplexity = measure_forgetting(model, reference, texts)
    found = {"told": measure_told(model, told), "kl": kl, "perplexity": perplexity}
    metrics = {name: {"mean": value, "standard_error": None} for name, value in found.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"model": str(options.model), "metrics": metrics}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def load(folder: Path) -> tuple[Any, Any]:
    """Return a model in fp32 and its tokenizer, padding on the right."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")


def measure_told(loaded: tuple[Any, Any], rows: Sequence[dict[str, str]]) -> float:
    """Return the share of facts that rank first among the values of their attribute."""
    import torch

    model, tokenizer = loaded
    values: dict[str, list[str]] = {}
    for row in rows:
        values.setdefault(row["key"], []).append(row["value"])
    ranked = {key: sorted(set(words)) for key, words in values.items()}
    right = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        encoded = tokenizer([row["told"] for row in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            logits = model(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            ).logits
        last = encoded["attention_mask"].sum(1) - 1
        for index, row in enumerate(batch):
            words = ranked[row["key"]]
            scores = logits[index, last[index], tokenizer.convert_tokens_to_ids(words)]
            right += words[int(scores.argmax())] == row["value"]
    return right / len(rows)


def measure_forgetting(
    loaded: tuple[Any, Any], reference: tuple[Any, Any], texts: Sequence[str]
) -> tuple[float, float]:
    """Return KL(reference || model) in nats a token, and the model's perplexity, on the texts."""
    import torch

    (model, tokenizer), (base, _) = loaded, reference
    divergence, surprise, count = 0.0, 0.0, 0
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        with torch.inference_mode():
            said, meant = (
                m(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
                for m in (model, base)
            )
        counted = mask[:, 1:].bool()
        divergence += float((meant.exp() * (meant - said)).sum(-1)[counted].double().sum())
        surprise -= float(said.gather(-1, ids[:, 1:, None])[..., 0][counted].double().sum())
        count += int(counted.sum())
    return divergence / count, float(torch.tensor(surprise / count).exp())


if __name__ == "__main__":
    sys.exit(main())
