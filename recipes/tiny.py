"""A model of some hundred thousand weights, without training, to try a recipe out on a CPU.

    python -m skillvec.recipes.tiny --texts FILE [FILE ...] --output BASE

Hides how its tokenizer is made: byte pairs of the given files, so that their words are short, with
ChatML's marks and chat template, as instruct models of Qwen have them. Invariants: the same files
give the same bytes; weights are fp32. Such a model knows nothing: what a recipe makes of it shows
that the recipe runs, and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(texts: Sequence[str], output: Path, size: int = 48, seed: int = 0) -> None:
    """Write a two-layer Llama with hidden states of `size` and a tokenizer made of the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet,
                                  special_tokens=list(SPECIAL), show_progress=False)  # fmt: skip
    pairs.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pairs, eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, intermediate_size=2 * size,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a tiny model without training, and its tokenizer."""
    parser = argparse.ArgumentParser("skillvec.recipes.tiny", description=main.__doc__)
    parser.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FILE",
                        help="whose words the tokenizer knows")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--size", type=int, default=48, help="of hidden states (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        texts = [file.read_text(encoding="utf-8") for file in given.texts]
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    make_model(texts, given.output, given.size, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
