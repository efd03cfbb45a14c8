#!/usr/bin/env bash
# PEFT 0.21.2: LoRA on tied embeddings with ensure_weight_tying, merged, has the delta twice.
#
# A Llama with tied embeddings gets LoRA on embed_tokens, and ensure_weight_tying gives the head the
# same factors. The live model adds the delta once in each place. merge_and_unload visits both
# modules and adds it to the one weight that they share each time, so that the merged model is
# neither the one that was trained nor base + delta.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   merged - base = 1 * delta: False
#   merged - base = 2 * delta: True
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
shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True))
base = model.model.embed_tokens.weight.detach().clone()
lora = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
adapted = get_peft_model(model, lora)
for parameter in adapted.parameters():
    if parameter.requires_grad:
        parameter.data += 0.3 * torch.randn(parameter.shape)
embedding = adapted.base_model.model.model.embed_tokens
delta = embedding.get_delta_weight("default").detach()
moved = adapted.merge_and_unload().model.embed_tokens.weight.detach() - base
for times in (1, 2):
    print(f"merged - base = {times} * delta:", torch.allclose(moved, times * delta, atol=1e-5))
PYTHON
"$place/venv/bin/python" "$place/show.py" 2>/dev/null | tee "$place/seen"
printf '%s\n' "merged - base = 1 * delta: False" "merged - base = 2 * delta: True" | diff "$place/seen" -
