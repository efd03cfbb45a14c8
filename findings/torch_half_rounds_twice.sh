#!/usr/bin/env bash
# torch 2.13.0: float64 is rounded twice on its way to float16 and to bfloat16, the first time to float32.
#
# 1 + 2^-11 + 2^-40 lies just above the middle of the two float16 numbers 1 and 1 + 2^-10, so the nearer one is
# the upper. Rounded to float32 first it is the middle itself, and the tie goes to the even neighbour, which is
# the lower. numpy rounds once. The same happens on the way to bfloat16, a few bits further up.
#
# Seen with torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11:
#   float16 of 1 + 2^-11 + 2^-40, torch: 1.0
#   float16 of 1 + 2^-11 + 2^-40, numpy: 1.0009765625
#   bfloat16 of 1 + 2^-8 + 2^-40, torch: 1.0, and the nearest is 1.0078125
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import numpy as np
import torch

value = 1 + 2**-11 + 2**-40
given = torch.tensor([value], dtype=torch.float64)
print("float16 of 1 + 2^-11 + 2^-40, torch:", given.to(torch.float16).item())
print("float16 of 1 + 2^-11 + 2^-40, numpy:", float(np.float64(value).astype(np.float16)))
given = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
near = min((1.0, 1 + 2**-7), key=lambda one: abs(one - given.item()))
print(f"bfloat16 of 1 + 2^-8 + 2^-40, torch: {given.bfloat16().item()}, and the nearest is {near}")
PYTHON
"$place/venv/bin/python" "$place/show.py" | tee "$place/seen"
printf '%s\n' "float16 of 1 + 2^-11 + 2^-40, torch: 1.0" \
    "float16 of 1 + 2^-11 + 2^-40, numpy: 1.0009765625" \
    "bfloat16 of 1 + 2^-8 + 2^-40, torch: 1.0, and the nearest is 1.0078125" | diff "$place/seen" -
