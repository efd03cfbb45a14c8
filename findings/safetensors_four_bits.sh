#!/usr/bin/env bash
# safetensors 0.8.0: tensors of four bits are saved, and then each way to read them knows another part of them.
#
# torch holds two values of float4_e2m1fn_x2 in a byte and counts bytes; the file counts values, so that a shape (2, 2) is
# written as [2, 4]. load_file gives the tensor back. load, for the same bytes in memory, has no such dtype (nor the 8-bit
# one of powers of two), a slice of the open file takes the file's shape for torch's, and numpy knows neither dtype.
# torch.int4 cannot be saved at all: the format has no integers of four bits.
#
# Seen with torch 2.13.0 (CPU), safetensors 0.8.0, numpy 2.4.6, Python 3.11:
#   float4_e2m1fn_x2 (2, 2): saved as F4 [2, 4]; load_file (2, 2), load KeyError, slice RuntimeError, numpy AttributeError
#   float8_e8m0fnu (4,): saved as F8_E8M0 [4]; load_file (4,), load KeyError, slice (1,), numpy AttributeError
#   int4 (4,): not saved, KeyError
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

path = f"{sys.argv[1]}/tensors.safetensors"


def told(call):
    try:
        return tuple(call().shape)
    except (AttributeError, KeyError, RuntimeError) as error:
        return type(error).__name__


for dtype, shape in ((torch.float4_e2m1fn_x2, (2, 2)), (torch.float8_e8m0fnu, (4,)), (torch.int4, (4,))):
    tensor = torch.zeros(shape, dtype=torch.uint8).view(dtype)
    what = f"{str(dtype).removeprefix('torch.')} {shape}"
    try:
        file = save({"w": tensor})
    except KeyError:
        print(f"{what}: not saved, KeyError")
        continue
    entry = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["w"]
    save_file({"w": tensor}, path)
    print(f"{what}: saved as {entry['dtype']} {entry['shape']}; load_file {told(lambda: load_file(path)['w'])},",
          f"load {told(lambda: load(file)['w'])},",
          f"slice {told(lambda: safe_open(path, 'pt').get_slice('w')[:1])},",
          f"numpy {told(lambda: safe_open(path, 'np').get_tensor('w'))}")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' \
    "float4_e2m1fn_x2 (2, 2): saved as F4 [2, 4]; load_file (2, 2), load KeyError, slice RuntimeError, numpy AttributeError" \
    "float8_e8m0fnu (4,): saved as F8_E8M0 [4]; load_file (4,), load KeyError, slice (1,), numpy AttributeError" \
    "int4 (4,): not saved, KeyError" | diff "$place/seen" -
