#!/usr/bin/env bash
# DeepSpeed 0.19.8: with bf16 the fp32 weights of the optimiser are made of weights that were already rounded.
#
# A model in fp32 is given to DeepSpeed with "bf16": {"enabled": true} and ZeRO-3. The fp32 copies that the
# optimiser trains are those of the bf16 weights, so training starts at another model: every weight is off by
# up to 2^-9 of itself before the first step. The difference of the trained model and its start holds that
# rounding, which is larger than many an update. "torch_autocast" computes in bf16 and leaves the weights alone.
#
# Seen with torch 2.13.0 (CPU), deepspeed 0.19.8, Python 3.11:
#   bf16: 1024 of 1024 weights differ before the first step, by up to 0.0038 of themselves
#   torch_autocast: 0 of 1024 weights differ before the first step, by up to 0.0000 of themselves
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 setuptools
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet deepspeed==0.19.8
cat > "$place/show.py" <<'PYTHON'
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(0)
model = torch.nn.Linear(32, 32, bias=False)
start = model.weight.detach().clone()
precision = {"bf16": {"enabled": True}}
if sys.argv[1] != "bf16":
    precision = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
adam = torch.optim.AdamW(model.parameters(), lr=1e-6)
settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
trained = safe_get_full_fp32_param(engine.module.weight)
off = ((trained - start) / start).abs()
print(f"{sys.argv[1]}: {int((off > 0).sum())} of {off.numel()} weights differ before the first step,"
      f" by up to {off.max():.4f} of themselves")
PYTHON
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=29517
for precision in bf16 torch_autocast; do
    "$place/venv/bin/python" "$place/show.py" "$precision" 2>"$place/log" | grep "before the first step" ||
        { cat "$place/log"; exit 1; }
done | tee "$place/seen"
grep -q "^bf16: [1-9]" "$place/seen"
grep -q "^torch_autocast: 0 of" "$place/seen"
