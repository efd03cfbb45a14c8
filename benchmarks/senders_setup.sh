#!/bin/sh
# Puts what verl 0.9.1 and vLLM 0.33.0 have of sparse weights into build/senders, for the slow tests.
#
# Their sources alone: the functions that write and read lists of changed values run without the
# rest, on a CPU. vLLM's wheel has some 340 MB, of which two files are kept.
set -eu
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$place" \
    --platform manylinux_2_28_x86_64 --only-binary :all: "verl==0.9.1" "vllm==0.33.0"
mkdir -p build/senders
"${PYTHON:-python3}" - "$place" <<'PYTHON'
import pathlib
import sys
import zipfile

wanted = ("verl/checkpoint_engine/", "verl/workers/rollout/", "checkpoint_weight_patch.py",
          "sparse_nccl_engine.py")
for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        archive.extractall("build/senders", [n for n in names if any(w in n for w in wanted)])
PYTHON
