#!/bin/sh
# Makes what benchmarks/real.py measures beside skillvec; once it is there, it only says the versions.
#
# mergekit and sd-mecha have .venv-mergekit, with bounds and a torch of their own. reminis and deltatensors
# have .venv-peers, which takes torch, safetensors, transformers and PEFT from .venv by a .pth file: a second
# torch would cost minutes, and none of them may come into .venv.
set -eu
cd "$(dirname "$0")/.."
test -x .venv/bin/python || { echo "no .venv: make test makes it" >&2; exit 1; }
test -x .venv-mergekit/bin/mergekit-yaml || benchmarks/mergekit_setup.sh
venv=.venv-peers
pinned="reminis==0.34.0 deltatensors==0.2.0 peft==0.21.2 torch==2.13.0"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
test -x "$venv/bin/python" || .venv/bin/python -m venv "$venv"
site .venv/bin/python > "$(site "$venv/bin/python")/project.pth"
# shellcheck disable=SC2086 # four words
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt $pinned
"$venv/bin/reminis" --version
"$venv/bin/python" -m pip list 2>/dev/null |
    grep -E '^(reminis|deltatensors|peft|torch|transformers|safetensors|numpy|zstandard) '
.venv-mergekit/bin/python -m pip list 2>/dev/null |
    grep -E '^(mergekit|sd-mecha|torch|transformers|safetensors|numpy) '
