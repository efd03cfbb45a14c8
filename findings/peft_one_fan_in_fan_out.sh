#!/usr/bin/env bash
# PEFT 0.21.2: an adapter on modules that lie both ways says of all of them how the last one lies.
#
# A Conv1D of transformers holds its weight as (in, out), a Linear as (out, in). PEFT sets fan_in_fan_out of the one LoRA
# config anew for every module that it wraps, with a warning, and adapter_config.json keeps what the last of them needed.
# PEFT itself asks the class of each module again when it loads; who has the files alone, and a square weight, cannot tell.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, Python 3.11:
#   Conv1D, then Linear: modules wrapped with [True, False], saved as false
#   Linear, then Conv1D: modules wrapped with [False, True], saved as true
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
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

folder = Path(sys.argv[1], "adapter")
KINDS = {"Conv1D": lambda: Conv1D(8, 8), "Linear": lambda: torch.nn.Linear(8, 8)}


class Model(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = KINDS[first](), KINDS[second]()


for first, second in (("Conv1D", "Linear"), ("Linear", "Conv1D")):
    adapted = get_peft_model(Model(first, second), LoraConfig(r=2, target_modules=["first", "second"]))
    wrapped = [getattr(adapted.base_model.model, name).fan_in_fan_out for name in ("first", "second")]
    adapted.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
    print(f"{first}, then {second}: modules wrapped with {wrapped}, saved as {json.dumps(saved)}")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "Conv1D, then Linear: modules wrapped with [True, False], saved as false" \
    "Linear, then Conv1D: modules wrapped with [False, True], saved as true" | diff "$place/seen" -
