#!/usr/bin/env bash
# reminis 0.34.0: export writes config.json beside the file it was asked for, over the one that lies there.
#
# `reminis export one.db -o models/one.safetensors` also writes models/config.json, without a word under -q and
# without a question: where the folder holds another model, that model has the wrong shapes afterwards. An
# export into a folder of its own is safe.
#
# Seen with numpy 2.4.6, Python 3.11:
#   hidden_size before: 8
#   hidden_size after: 4
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0 reminis==0.34.0
mkdir "$place/small" "$place/models"
cat > "$place/make.py" <<'PYTHON'
import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

for name, size in (("small", 4), ("models", 8)):
    folder = pathlib.Path(sys.argv[1], name)
    save_file({"layer.weight": np.zeros((size, size), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": size}) + "\n")
PYTHON
"$place/venv/bin/python" "$place/make.py" "$place"
say() { sed -n "s/.*\"hidden_size\": \([0-9]*\).*/hidden_size $1: \1/p" "$place/models/config.json"; }
say before | tee "$place/seen"
"$place/venv/bin/reminis" convert "$place/small" -o "$place/small.db" -q
"$place/venv/bin/reminis" export "$place/small.db" -o "$place/models/small.safetensors" -q
say after | tee -a "$place/seen"
sed -n 's/^#   //p' "$0" | diff "$place/seen" -
