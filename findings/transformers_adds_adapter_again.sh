#!/usr/bin/env bash
# transformers 5.23.0: weights merged into the folder of their adapter get the adapter once more.
#
# PEFT merges an adapter, and the merged model is saved into the adapter's own folder, as it is done
# where one folder holds all of a run. from_pretrained reads the merged weights there, sees
# adapter_config.json beside them and, where PEFT is installed, puts the adapter on top of them.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   q_proj of the model that was loaded is of peft.tuners.lora.layer
#   model that was loaded - base = 1 * delta: False
#   model that was loaded - base = 2 * delta: True
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

base, folder = (f"{sys.argv[1]}/{name}" for name in ("base", "adapter"))


def load(name):
    return AutoModelForCausalLM.from_pretrained(name)


def projection(model):
    return model.model.layers[0].self_attn.q_proj


torch.manual_seed(0)
shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(base)
lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(load(base), lora).save_pretrained(folder)
PeftModel.from_pretrained(load(base), folder).merge_and_unload().save_pretrained(folder)

layer = projection(load(folder))
print("q_proj of the model that was loaded is of", type(layer).__module__)
with torch.no_grad():
    moved = layer(torch.eye(16)).T - projection(load(base)).weight
    delta = layer.get_delta_weight("default")
for times in (1, 2):
    same = torch.allclose(moved, times * delta, atol=1e-5)
    print(f"model that was loaded - base = {times} * delta:", same)
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "q_proj of the model that was loaded is of peft.tuners.lora.layer" \
    "model that was loaded - base = 1 * delta: False" \
    "model that was loaded - base = 2 * delta: True" | diff "$place/seen" -
