#!/usr/bin/env bash
# PEFT 0.21.2: merge_and_unload leaves LoRA in place below a module of which a parameter is wrapped.
#
# target_parameters wraps the module that has the parameter, here the mixer of a Mamba; target_modules
# wraps a layer in that mixer. merge_and_unload merges the outer one and passes over all below it:
# without an error the layer below is still LoRA, neither merged nor unloaded. The model computes the
# same, but what is saved of it has the weight under the name base_layer and the factors beside it, and
# from_pretrained initialises that weight anew. The report of that load says MISSING.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   left after merge_and_unload: x_proj.base_layer.weight
#   left after merge_and_unload: x_proj.lora_A.default.weight
#   left after merge_and_unload: x_proj.lora_B.default.weight
#   missing when what was saved is loaded: ['backbone.layers.0.mixer.x_proj.weight']
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
model = MambaForCausalLM(MambaConfig(**shape))
lora = LoraConfig(
    r=2, target_modules=["x_proj"], target_parameters=["mixer.A_log"], init_lora_weights=False
)
merged = get_peft_model(model, lora).merge_and_unload()
for name in merged.state_dict():
    if "lora" in name or "base_layer" in name:
        print("left after merge_and_unload:", name.removeprefix("backbone.layers.0.mixer."))
merged.save_pretrained(sys.argv[1])
_, told = MambaForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
print("missing when what was saved is loaded:", sorted(told["missing_keys"]))
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/merged" 2>/dev/null | tee "$place/seen"
left="left after merge_and_unload: x_proj"
printf '%s\n' "$left.base_layer.weight" "$left.lora_A.default.weight" "$left.lora_B.default.weight" \
    "missing when what was saved is loaded: ['backbone.layers.0.mixer.x_proj.weight']" |
    diff "$place/seen" -
