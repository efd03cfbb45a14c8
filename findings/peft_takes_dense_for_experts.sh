#!/usr/bin/env bash
# PEFT 0.21.2: target_modules with the full names of a dense MLP wraps the experts of other layers.
#
# A Qwen3-MoE may have dense layers (mlp_only_layers). Any target that ends in gate_proj, up_proj or
# down_proj is taken for experts as they were before transformers 5, whatever stands before it, and is
# replaced by the parameters of fused experts, in all layers that have them. So the layer that was
# named gets no factors, and a layer that was not gets them. No warning says so: those that come are of
# patterns that PEFT has set itself.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   asked for: model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj
#   wrapped: model.layers.1.mlp.experts (down_proj), model.layers.1.mlp.experts (gate_up_proj)
#   warnings that tell of layers or of down_proj: 0
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/show.py" <<'PYTHON'
import warnings

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads, **moe, mlp_only_layers=[0]))
dense = [f"model.layers.0.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")]
assert all(hasattr(model.get_submodule(name), "weight") for name in dense)
print("asked for:", ", ".join(dense))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=dense)).base_model.model
wrapped = []
for name, module in adapted.named_modules():
    if isinstance(module, LoraLayer):
        parameter = getattr(module, "parameter_name", "weight")
        wrapped.append(f"{name.replace('.base_layer', '')} ({parameter})")
print("wrapped:", ", ".join(sorted(wrapped)))
about = [one for one in told if "layers" in str(one.message) or "down_proj" in str(one.message)]
print("warnings that tell of layers or of down_proj:", len(about))
PYTHON
"$place/venv/bin/python" "$place/show.py" 2>/dev/null | tee "$place/seen"
dense=model.layers.0.mlp experts=model.layers.1.mlp.experts
printf '%s\n' "asked for: $dense.down_proj, $dense.gate_proj, $dense.up_proj" \
    "wrapped: $experts (down_proj), $experts (gate_up_proj)" \
    "warnings that tell of layers or of down_proj: 0" | diff "$place/seen" -
