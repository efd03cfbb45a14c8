#!/bin/sh
# Makes .venv-mergekit beside .venv, for the benchmark's rows of mergekit and sd-mecha.
#
# A venv of its own, because mergekit bounds the versions of transformers, click and pydantic, and
# those bounds must not decide what skillvec is tested with.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-mergekit
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/pip" install --quiet "mergekit==0.1.5" "sd-mecha==1.1.8" "torch==2.13.0"
"$venv/bin/mergekit-yaml" --help >/dev/null
"$venv/bin/pip" list 2>/dev/null | grep -E '^(mergekit|sd-mecha|torch|transformers|safetensors|numpy) '
