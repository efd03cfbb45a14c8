#!/usr/bin/env bash
# mergekit 0.1.5: the adapter that mergekit-extract-lora writes puts the tuned model's embeddings and norms
# in place of those of any model that it is merged into.
#
# By default embeddings, head and norms are no differences but saved whole (modules_to_save), and PEFT takes
# them in place of the model's own. On the base that is what was asked for. On another model of the family, which is
# what an update is extracted for, its own embeddings are gone without a word, and tied embeddings are stored twice.
# `--embed-lora` makes factors of the embeddings, of tied ones twice, and both are merged: the update comes twice.
#
# Seen with PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11; the update adds 1 to every value,
# and the target is base + 100:
#   on the base: embeddings 1, norm 2, projection 1
#   on the target: embeddings 1, norm 2, projection 101
#   with --embed-lora, on the target: embeddings 102, norm 2, projection 101
#   embeddings in the adapter: 2 of 1
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet mergekit==0.1.5 peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$place/make.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
)
for name, value in {"base": 0.0, "tuned": 1.0, "target": 100.0}.items():
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, values in model.named_parameters():
            values.fill_(value + ("norm" in key))
    model.save_pretrained(f"{sys.argv[1]}/{name}")
PYTHON
cat > "$place/show.py" <<'PYTHON'
import sys

from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def say(what, model, adapter):
    loaded = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{model}")
    merged = PeftModel.from_pretrained(loaded, f"{sys.argv[1]}/{adapter}").merge_and_unload().model
    found = (merged.embed_tokens.weight, merged.norm.weight, merged.layers[0].mlp.up_proj.weight)
    embeddings, norm, projection = (value.mean().item() for value in found)
    print(f"{what}: embeddings {embeddings:.0f}, norm {norm:.0f}, projection {projection:.0f}")


say("on the base", "base", "lora")
say("on the target", "target", "lora")
say("with --embed-lora, on the target", "target", "lora-embed")
with safe_open(f"{sys.argv[1]}/lora/adapter_model.safetensors", "pt") as held:
    shapes = [held.get_slice(name).get_shape() for name in held.keys()]
print("embeddings in the adapter:", shapes.count([16, 8]), "of 1")
PYTHON
export HF_HUB_OFFLINE=1
"$place/venv/bin/python" "$place/make.py" "$place" 2>/dev/null
for option in "" --embed-lora; do
    "$place/venv/bin/mergekit-extract-lora" --model "$place/tuned" --base-model "$place/base" \
        --out-path "$place/lora${option#--}" $option >/dev/null 2>&1
done
mv "$place/loraembed-lora" "$place/lora-embed"
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
sed -n 's/^#   //p' "$0" | diff "$place/seen" -
