#!/usr/bin/env bash
# safetensors 0.8.0: a tensor named __metadata__ is saved without a word, into a file that nothing opens.
#
# The header holds the metadata under that key, beside the names of the tensors, and the writer does not keep the two
# apart. So the file is written, and its reader takes the tensor's entry for metadata whose values are no text. With
# metadata beside it the key stands twice. Every other name is taken, the empty one too.
#
# Seen with safetensors 0.8.0, numpy 2.4.6, Python 3.11:
#   tensor 'weight': saved, loaded
#   tensor '': saved, loaded
#   tensor '__metadata__': saved, SafetensorError when loaded
#   tensor '__metadata__' with metadata: saved, SafetensorError when loaded
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save


def loaded(file):
    try:
        load(file)
    except SafetensorError:
        return "SafetensorError when loaded"
    return "loaded"


for name, metadata in (("weight", None), ("", None), ("__metadata__", None), ("__metadata__", {"format": "np"})):
    file = save({name: np.ones(2, np.float32)}, metadata)
    print(f"tensor {name!r}{' with metadata' if metadata else ''}: saved, {loaded(file)}")
PYTHON
"$place/venv/bin/python" "$place/show.py" | tee "$place/seen"
printf '%s\n' "tensor 'weight': saved, loaded" "tensor '': saved, loaded" \
    "tensor '__metadata__': saved, SafetensorError when loaded" \
    "tensor '__metadata__' with metadata: saved, SafetensorError when loaded" | diff "$place/seen" -
