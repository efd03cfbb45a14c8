#!/usr/bin/env bash
# PEFT 0.21.2: merging an adapter with layer_replication gives another model, without a word.
#
# layer_replication repeats layers of the base, which share their weights, each copy with factors of
# its own. merge_and_unload adds the factors of all copies to the one weight that they share. PEFT has
# a check against merging such an adapter, but it asks the dict of adapters for the setting instead of
# an adapter's config, so it never fires.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   merged without an error: True
#   logits of the merged model are those of the live one: False
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=False))
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 2], [1, 2]])
adapted = get_peft_model(model, lora).eval()
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight += 0.1 * torch.randn(weight.shape)
    ids = torch.arange(6)[None]
    live = adapted(ids).logits
    merged = adapted.merge_and_unload()(ids).logits
print("merged without an error:", True)
same = torch.allclose(live, merged, atol=1e-4)
print("logits of the merged model are those of the live one:", same)
PYTHON
"$place/venv/bin/python" "$place/show.py" 2>/dev/null | tee "$place/seen"
printf '%s\n' "merged without an error: True" \
    "logits of the merged model are those of the live one: False" | diff "$place/seen" -
