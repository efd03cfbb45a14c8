#!/usr/bin/env bash
# transformers 5.23.0: a GGUF of a Mixtral is loaded as a dense Llama whose MLPs are random.
#
# llama.cpp gives a Mixtral the architecture llama; expert_count in the header and tensors such as
# ffn_gate_exps tell it from a Llama. from_pretrained makes a Llama of it all the same, leaves the
# experts and their router out, and initialises the MLPs anew, other ones with each call. Nothing is
# raised: the report that it logs says MISSING of the MLPs, and nothing of the experts.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0, Python 3.11:
#   class of the model: LlamaForCausalLM
#   up_proj is the same when the file is loaded twice: False
#   q_proj is the same when the file is loaded twice: True
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat > "$place/show.py" <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

WIDTH, INNER, WORDS, EXPERTS = 32, 48, 40, 4
place = sys.argv[1]
writer = gguf.GGUFWriter(f"{place}/experts.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(INNER)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_expert_count(EXPERTS)
writer.add_expert_used_count(2)
writer.add_token_list([f"t{i}" for i in range(WORDS)])
shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
shapes |= {f"blk.0.{norm}_norm": (WIDTH,) for norm in ("attn", "ffn")}
shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{part}_exps": (EXPERTS, INNER, WIDTH) for part in ("gate", "up")}
shapes |= {"blk.0.ffn_gate_inp": (EXPERTS, WIDTH), "blk.0.ffn_down_exps": (EXPERTS, WIDTH, INNER)}
values = np.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", values.standard_normal(shape, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
one, other = (
    AutoModelForCausalLM.from_pretrained(place, gguf_file="experts.gguf") for _ in range(2)
)
print("class of the model:", type(one).__name__)
for name in ("mlp.up_proj", "self_attn.q_proj"):
    first, second = (model.model.layers[0].get_submodule(name).weight for model in (one, other))
    leaf = name.rpartition(".")[2]
    print(f"{leaf} is the same when the file is loaded twice:", torch.equal(first, second))
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "class of the model: LlamaForCausalLM" \
    "up_proj is the same when the file is loaded twice: False" \
    "q_proj is the same when the file is loaded twice: True" | diff "$place/seen" -
