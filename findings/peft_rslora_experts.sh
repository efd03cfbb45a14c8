#!/usr/bin/env bash
# PEFT 0.21.2: an older adapter of experts with rsLoRA is loaded with gate and up sqrt(2) too large.
#
# Before transformers 5 each expert had its own gate_proj, up_proj and down_proj, and an adapter has
# factors for each. transformers 5 keeps gate and up of all experts in one parameter, and PEFT
# converts the factors: of gate and up it makes one pair of twice the rank, and doubles lora_alpha, so
# that alpha / r stays. With use_rslora it is alpha / sqrt(r) that scales, and that grows by sqrt(2).
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   use_rslora False, merged by what was trained: gate 1.000, up 1.000, down 1.000
#   use_rslora True, merged by what was trained: gate 1.414, up 1.414, down 1.000
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

WIDTH, INNER, RANK, ALPHA = 16, 4, 2, 4
EXPERTS = "model.layers.0.mlp.experts"
folder = Path(sys.argv[1], "adapter")
folder.mkdir()
shape = {"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": INNER}
sizes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
torch.manual_seed(0)
factors = {}
for number in range(2):
    for leaf, (out, inner) in sizes.items():
        module = f"base_model.model.{EXPERTS}.{number}.{leaf}_proj"
        factors[f"{module}.lora_A.weight"] = torch.randn(RANK, inner)
        factors[f"{module}.lora_B.weight"] = torch.randn(out, RANK)
save_file(factors, folder / "adapter_model.safetensors")
for rslora in (False, True):
    names = [f"{leaf}_proj" for leaf in sizes]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **moe))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    both, down = (
        (after[name] - before[name])[0]
        for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    )
    ratios = []
    for leaf, moved in (("gate", both[:INNER]), ("up", both[INNER:]), ("down", down)):
        module = f"base_model.model.{EXPERTS}.0.{leaf}_proj"
        product = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        trained = product * ALPHA / (RANK**0.5 if rslora else RANK)
        ratios.append(f"{leaf} {moved.norm() / trained.norm():.3f}")
    print(f"use_rslora {rslora}, merged by what was trained:", ", ".join(ratios))
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "use_rslora False, merged by what was trained: gate 1.000, up 1.000, down 1.000" \
    "use_rslora True, merged by what was trained: gate 1.414, up 1.414, down 1.000" |
    diff "$place/seen" -
