#!/usr/bin/env bash
# TRL 1.16.0: a tool that cannot work does not stop GRPO: whatever it raises becomes a message to the model.
#
# Every exception of a tool, a NameError of the tool's own code as well, is caught and told to the model as the result of
# its call. Nothing is printed or raised; the training goes on, learns from such answers, and ends with exit code 0. What
# shows it is the metric tools/failure_frequency.
#
# Seen with torch 2.13.0 (CPU), trl 1.16.0, transformers 5.23.0, Python 3.11 (the model's turns are given, not generated):
#   the tool's code names what is not there; the model is told: {'error': "name 'PAGES' is not defined"}
#   the training ended after step 1, tools/failure_frequency: 1.0
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
cat > "$place/show.py" <<'PYTHON'
import sys
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "sea"}}\n</tool_call><|im_end|>'
MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]

letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
letters.add_special_tokens(MARKS)
letters.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=MARKS[1], pad_token=MARKS[2])
tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()


def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: The word.
    """
    return PAGES[word]  # noqa: F821


class Given(GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *rest, **named):
        answered = ["<tool_response>" in tokenizer.decode(ids) for ids in prompt_ids]
        said = ["It is water.<|im_end|>" if done else CALL for done in answered]
        return [tokenizer.encode(text) for text in said], None


def reward(completions, **_):
    told = next(message["content"] for message in completions[0] if message["role"] == "tool")
    print("the tool's code names what is not there; the model is told:", told)
    return [float(i) for i in range(len(completions))]


shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id))
asked = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is the sea?"}]] * 2})
settings = GRPOConfig(
    output_dir=sys.argv[1], per_device_train_batch_size=2, num_generations=2, max_steps=1, logging_steps=1,
    max_completion_length=400, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
)
trainer = Given(model, reward, settings, train_dataset=asked, processing_class=tokenizer, tools=[look_up])
trainer.train()
(failed,) = (row["tools/failure_frequency"] for row in trainer.state.log_history if "tools/failure_frequency" in row)
print(f"the training ended after step {trainer.state.global_step}, tools/failure_frequency: {failed}")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/out" 2>"$place/said" | grep "^the t" | tee "$place/seen"
printf '%s\n' "the tool's code names what is not there; the model is told: {'error': \"name 'PAGES' is not defined\"}" \
    "the training ended after step 1, tools/failure_frequency: 1.0" | diff "$place/seen" -
