#!/usr/bin/env bash
# safetensors 0.6.2: shapes of all tensors of a file, by safe_open and get_slice, take time that grows
# with the square of their number; 0.7.0 does not.
#
# A checkpoint of unfused experts has tens of thousands of tensors. Only headers are read here.
#
# Seen with numpy 2.4.6, Python 3.11:
#   safetensors 0.6.2: 1000 tensors 0.1422 s, 4000 2.4172 s, ratio 17.0
#   safetensors 0.7.0: 1000 tensors 0.0019 s, 4000 0.0108 s, ratio 5.7
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/show.py" <<'PYTHON'
import sys
import time

import numpy as np
import safetensors
from safetensors import safe_open
from safetensors.numpy import save_file


def seconds(count):
    path = f"{sys.argv[1]}/{count}.safetensors"
    save_file({f"layers.{i}.weight": np.zeros(1, np.float32) for i in range(count)}, path)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        best = min(best, time.perf_counter() - begin)
    assert len(shapes) == count
    return best


few, many = seconds(1000), seconds(4000)
print(f"safetensors {safetensors.__version__}: 1000 tensors {few:.4f} s, 4000 {many:.4f} s, "
      f"ratio {many / few:.1f}")
is_square = many > 9 * few
sys.exit(is_square != (safetensors.__version__ == "0.6.2"))
PYTHON
for version in 0.6.2 0.7.0; do
    python3 -m venv "$place/$version"
    "$place/$version/bin/pip" install --quiet numpy==2.4.6 "safetensors==$version"
    "$place/$version/bin/python" "$place/show.py" "$place"
done
