"""Diagonal Fisher information of a model's weights on texts, for `--op fisher`.

    python -m skillvec.recipes.fisher --model M --data prompts.jsonl -o fisher.safetensors
    skillvec combine A B --op fisher --param fisher=fisher_a.safetensors --param fisher=...

The file holds, for each tensor of the checkpoint that is one parameter, the mean over the texts of
the squared gradient of log p(text), in fp32: one backward pass a text, a batch of one, because the
square of a sum is no sum of squares. Rows of the .jsonl file are those of the recipe calibrate; all
tokens of a row but its first are predicted. That is the empirical Fisher information; --sample
draws each token from the model instead, as the definition says. docs/operators.md describes the
file.

Left out, and named: parameters that are no tensor of the checkpoint alone, such as fused experts.
Beside the model stand its gradients and the sums: 4 bytes a value each, which are looked for before
the first text. The same model, texts and machine give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillvec.errors import SkillvecError
from skillvec.recipes.calibrate import (
    check_place,
    encode,
    load_model,
    names_in_files,
    read_prompts,
    refuse_full,
    write_tensors,
)
from skillvec.recipes.evaluate import load_tokenizer

SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.fisher", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="texts, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".safetensors")
    parser.add_argument("--limit", type=int, help="only the first so many texts")
    parser.add_argument("--max-length", type=int, default=512, metavar="TOKENS",
                        help="of a text; what is longer is cut (%(default)s)")  # fmt: skip
    parser.add_argument("--sample", action="store_true", help="draw tokens from the model")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (%(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    try:
        about = estimate(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError, SkillvecError) as error:
        print(f"fisher: {error}", file=sys.stderr)
        return 2
    for name, why in about["left_out"].items():
        print(f"left out: {name}: {why}")
    return 0


def estimate(
    model: str | Path,
    data: Path,
    output: Path,
    *,
    limit: int | None = None,
    max_length: int = 512,
    sample: bool = False,
    seed: int = 0,
    device: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the Fisher information of a model's weights; return what the file says of itself.

    Raises ValueError for data and places that cannot be used, SkillvecError for checkpoints that
    cannot be read.
    """
    import torch

    check_place(output, force)
    if max_length < 2 or (limit is not None and limit < 1):
        raise ValueError("max_length is at least 2, limit at least 1")
    prompts = read_prompts(data, limit)
    loaded, folder = load_model(str(model), "float32", device)
    tokenizer = load_tokenizer(folder)
    texts = [encode(tokenizer, prompt)[:max_length] for prompt in prompts]
    if any(len(ids) < 2 for ids in texts):
        raise ValueError(f"{data}: a text of one token predicts nothing")

    stored = names_in_files(loaded, folder)
    left_out = {}
    weights = {}
    for name, weight in loaded.named_parameters():  # a tied one comes once
        if name in stored:
            weights[stored[name]] = weight
        else:
            weight.requires_grad_(False)
            left_out[name] = "no tensor of the checkpoint alone"
    if not weights:
        raise ValueError("no parameter of the model is a tensor of the checkpoint")
    nbytes = 4 * sum(weight.numel() for weight in weights.values())
    print(f"{len(weights)} tensors: ", end="")
    advice = "it takes a machine with more, or a smaller model"
    refuse_full(nbytes, 2 * nbytes, loaded.device, output, advice)
    generator = torch.Generator(loaded.device).manual_seed(seed) if sample else None
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for ids in texts:
        add_squares(loaded, ids, weights, sums, generator)
    norm = math.sqrt(sum(float(s.double().square().sum()) for s in sums.values())) / len(texts)
    about = {
        "kind": "fisher", "schema": SCHEMA, "model": str(model), "data": data.name,
        "texts": len(texts), "tokens": sum(map(len, texts)), "max_length": max_length,
        "sampled": sample, "norm": norm, "left_out": left_out,
    }  # fmt: skip
    write_tensors({name: s.div_(len(texts)).cpu() for name, s in sums.items()}, about, output)
    print(f"written: {output}, {len(texts)} texts, L2 norm {norm:.6g}", flush=True)
    return about


def add_squares(
    model: Any, ids: Sequence[int], weights: dict[str, Any], sums: dict[str, Any], generator: Any
) -> None:
    """Add the squares of the gradients of a text's log likelihood to sums, in place.

    With a generator its tokens are drawn from the model, each after those that the text has before.
    """
    import torch

    model.zero_grad(set_to_none=True)
    tokens = torch.tensor([ids], device=model.device)
    found = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    wanted = tokens[0, 1:]
    if generator is not None:
        wanted = torch.multinomial(found.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(found, wanted, reduction="sum").backward()
    for name, weight in weights.items():
        if weight.grad is not None:  # not every text meets every expert
            sums[name].addcmul_(weight.grad, weight.grad)


if __name__ == "__main__":
    sys.exit(main())
