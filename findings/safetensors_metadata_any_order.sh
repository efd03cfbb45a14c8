#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata give another file each time.
#
# The metadata of a header is written in the order of a hash table that is seeded anew for every call. With two keys or
# more, equal calls of one process give files that differ in their headers, so that a digest of such a file says nothing
# about whether its content is the same. With one key, or none, the bytes are always the same.
#
# Seen with safetensors 0.8.0, numpy 2.4.6, Python 3.11:
#   20 files with one key: 1 kind of bytes
#   20 files with three keys: more than one kind of bytes
#   their lengths and tensors are the same: True
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import numpy as np
from safetensors.numpy import load, save

tensors = {"w": np.arange(3, dtype=np.float32)}


def files(metadata):
    return {save(tensors, metadata) for _ in range(20)}


one, three = files({"a": "1"}), files({"a": "1", "b": "2", "c": "3"})
kinds = {True: "1 kind", False: "more than one kind"}
print(f"20 files with one key: {kinds[len(one) == 1]} of bytes")
print(f"20 files with three keys: {kinds[len(three) == 1]} of bytes")
alike = {(len(file), load(file)["w"].tobytes()) for file in three}
print("their lengths and tensors are the same:", len(alike) == 1)
PYTHON
"$place/venv/bin/python" "$place/show.py" | tee "$place/seen"
printf '%s\n' "20 files with one key: 1 kind of bytes" "20 files with three keys: more than one kind of bytes" \
    "their lengths and tensors are the same: True" | diff "$place/seen" -
