#!/usr/bin/env bash
# safetensors 0.8.0: a numpy array in Fortran's order is saved with its values in other places, without a word.
#
# The writer of safetensors.numpy takes the bytes as they lie in memory and the shape as numpy says it. A transposed
# matrix, or one that numpy.asfortranarray made, is dense and contiguous, but lies column by column, and is read back row
# by row. Version 0.7.0 wrote it right, and the writer for torch refuses a tensor that lies otherwise.
#
# Seen with numpy 2.4.6, Python 3.11:
#   safetensors 0.7.0, in order: right
#   safetensors 0.7.0, transposed: right
#   safetensors 0.7.0, Fortran's order: right
#   safetensors 0.8.0, in order: right
#   safetensors 0.8.0, transposed: wrong values
#   safetensors 0.8.0, Fortran's order: wrong values
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
cat > "$place/show.py" <<'PYTHON'
import numpy as np
import safetensors
from safetensors.numpy import load, save

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {"in order": rows, "transposed": rows.T, "Fortran's order": np.asfortranarray(rows)}
for name, array in arrays.items():
    right = np.array_equal(load(save({"w": array}))["w"], array)
    print(f"safetensors {safetensors.__version__}, {name}: {'right' if right else 'wrong values'}")
PYTHON
for version in 0.7.0 0.8.0; do
    "$place/venv/bin/pip" install --quiet "safetensors==$version" numpy==2.4.6
    "$place/venv/bin/python" "$place/show.py"
done | tee "$place/seen"
printf '%s\n' "safetensors 0.7.0, in order: right" "safetensors 0.7.0, transposed: right" \
    "safetensors 0.7.0, Fortran's order: right" "safetensors 0.8.0, in order: right" \
    "safetensors 0.8.0, transposed: wrong values" \
    "safetensors 0.8.0, Fortran's order: wrong values" | diff "$place/seen" -
