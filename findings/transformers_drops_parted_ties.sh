#!/usr/bin/env bash
# transformers 5.23.0: save_pretrained drops a tensor that the reload does not tie any more.
#
# A BERT ties two pairs to each other: the weights of the word embeddings and of the decoder, and the
# biases of the head and of the decoder. An adapter whose modules_to_save has the embeddings parts the
# weights when PEFT 0.21.2 merges it, and PEFT sets tie_word_embeddings to false; the biases still
# share their memory. save_pretrained asks the memory, not the config, and drops one of the biases;
# from_pretrained asks the config, ties nothing, and initialises that bias anew. Its report says MISSING.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   tie_word_embeddings of the merged model: False
#   not saved: ['cls.predictions.decoder.bias']
#   missing when it is loaded: ['cls.predictions.decoder.bias']
#   logits of the model that was loaded are those of the merged one: False
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

torch.manual_seed(0)
shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
model = BertForMaskedLM(BertConfig(**shape, num_attention_heads=2))
with torch.no_grad():
    model.cls.predictions.bias += torch.randn(40)  # it is zero until it is trained
lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"])
adapted = get_peft_model(model, lora)
for parameter in adapted.parameters():
    if parameter.requires_grad:
        parameter.data += 0.3 * torch.randn(parameter.shape)
merged = adapted.merge_and_unload().eval()
print("tie_word_embeddings of the merged model:", merged.config.tie_word_embeddings)
merged.save_pretrained(sys.argv[1])
saved = load_file(f"{sys.argv[1]}/model.safetensors")
print("not saved:", sorted(set(merged.state_dict()) - set(saved)))
loaded, told = BertForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True)
print("missing when it is loaded:", sorted(told["missing_keys"]))
ids = torch.arange(6)[None]
with torch.no_grad():
    same = torch.allclose(merged(ids).logits, loaded.eval()(ids).logits, atol=1e-4)
print("logits of the model that was loaded are those of the merged one:", same)
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/merged" 2>/dev/null | tee "$place/seen"
printf '%s\n' "tie_word_embeddings of the merged model: False" \
    "not saved: ['cls.predictions.decoder.bias']" \
    "missing when it is loaded: ['cls.predictions.decoder.bias']" \
    "logits of the model that was loaded are those of the merged one: False" | diff "$place/seen" -
