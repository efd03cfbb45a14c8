#!/usr/bin/env bash
# PEFT 0.21.2: an adapter that is saved and loaded can have another scaling than it was trained with.
#
# Of the patterns in alpha_pattern that match a module the first counts. save_pretrained writes
# adapter_config.json with its keys sorted, those of alpha_pattern too, so that another pattern may be
# the first one when the adapter is loaded: here 24 / 2 where 6 / 2 was trained.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   scaling of q_proj in training: 3.0
#   scaling of q_proj after save_pretrained and from_pretrained: 12.0
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import sys

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
folder = f"{sys.argv[1]}/adapter"


def base():
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))


def scaling(adapted):
    return adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]


patterns = {"q_proj": 6, r"layers\.0.*": 24}
lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], alpha_pattern=patterns)
trained = get_peft_model(base(), lora)
trained.save_pretrained(folder)
print("scaling of q_proj in training:", scaling(trained))
loaded = PeftModel.from_pretrained(base(), folder)
print("scaling of q_proj after save_pretrained and from_pretrained:", scaling(loaded))
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "scaling of q_proj in training: 3.0" \
    "scaling of q_proj after save_pretrained and from_pretrained: 12.0" | diff "$place/seen" -
