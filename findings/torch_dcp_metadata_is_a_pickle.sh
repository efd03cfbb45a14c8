#!/usr/bin/env bash
# torch 2.13.0: a checkpoint of torch.distributed.checkpoint cannot be read without unpickling its .metadata.
#
# Which tensors there are, their shapes and where their bytes lie stands in one pickle, of protocol 4. torch's own
# weights-only unpickler reads no protocol but 2 and refuses it; dcp.load, of tensors alone, unpickles it with Python's
# plain unpickler, which imports every class that the file names. load has no weights_only.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   the first bytes of .metadata: 8004
#   torch.load(weights_only=True) of .metadata: UnpicklingError
#   dcp.load of one tensor of fp32: [1.0, 1.0, 1.0]
#   classes that .metadata had imported for it: 12
#   among them: pathlib.PosixPath, torch.distributed.checkpoint.metadata.Metadata
#   dcp.load takes weights_only: False
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import inspect
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

folder, found = Path(sys.argv[1], "checkpoint"), set()


def note(event, arguments):
    if event == "pickle.find_class":
        found.add(".".join(arguments[:2]))


dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
print("the first bytes of .metadata:", (folder / ".metadata").read_bytes()[:2].hex())
try:
    torch.load(folder / ".metadata", weights_only=True)
except pickle.UnpicklingError as error:
    print("torch.load(weights_only=True) of .metadata:", type(error).__name__)
state = {"w": torch.zeros(3)}
sys.addaudithook(note)
dcp.load(state, checkpoint_id=folder)
print("dcp.load of one tensor of fp32:", state["w"].tolist())
print("classes that .metadata had imported for it:", len(found))
named = ("pathlib.PosixPath", "torch.distributed.checkpoint.metadata.Metadata")
print("among them:", ", ".join(name for name in named if name in found))
print("dcp.load takes weights_only:", "weights_only" in inspect.signature(dcp.load).parameters)
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "the first bytes of .metadata: 8004" \
    "torch.load(weights_only=True) of .metadata: UnpicklingError" \
    "dcp.load of one tensor of fp32: [1.0, 1.0, 1.0]" \
    "classes that .metadata had imported for it: 12" \
    "among them: pathlib.PosixPath, torch.distributed.checkpoint.metadata.Metadata" \
    "dcp.load takes weights_only: False" | diff "$place/seen" -
