#!/usr/bin/env bash
# TRL 1.16.0: SFTTrainer logs its own metrics as eval_* whatever metric_key_prefix an evaluation has.
#
# Trainer.evaluate(metric_key_prefix="eval_other") names its metrics eval_other_loss and so on. SFTTrainer
# adds what it has measured itself, such as the accuracy over tokens, in its own `log`, which knows nothing of
# the prefix and puts "eval_" before all of them. So whoever evaluates twice, each time with its prefix,
# finds the second accuracy under the name of the first.
#
# Seen with torch 2.13.0 (CPU), trl 1.16.0, transformers 5.23.0, Python 3.11:
#   loss is logged as ['eval_other_loss']
#   mean_token_accuracy is logged as ['eval_mean_token_accuracy']
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$place/show.py" <<'PYTHON'
import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({"<end>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
shape = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, pad_token_id=0))
rows = Dataset.from_dict({"text": ["one two three", "three two one"]})
settings = SFTConfig(sys.argv[1], report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
trainer = SFTTrainer(
    model, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
)
trainer.evaluate(metric_key_prefix="eval_other")
logged = trainer.state.log_history[-1]
for metric in ("loss", "mean_token_accuracy"):
    print(metric, "is logged as", [name for name in logged if name.endswith(f"_{metric}")])
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/run" 2>/dev/null | grep "is logged as" | tee "$place/seen"
printf '%s\n' "loss is logged as ['eval_other_loss']" \
    "mean_token_accuracy is logged as ['eval_mean_token_accuracy']" | diff "$place/seen" -
