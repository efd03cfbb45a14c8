#!/usr/bin/env bash
# sd-mecha 1.1.8: what subtract makes cannot be given to add_difference.
#
# A recipe says target + (tuned - base) by add_difference(target, subtract(tuned, base)). The space of a
# subtraction is not known before it is merged (merge_space is None), and add_difference compares it
# with the target's: an AttributeError when the recipe is made. Naming the spaces of the models does not help;
# the form of three arguments, which subtracts within, works. A difference that was merged into a file
# and is opened with merge_space="delta" works as well.
#
# Seen with torch 2.13.0 (CPU), safetensors 0.8.0, Python 3.11:
#   subtract, then add_difference: AttributeError 'NoneType' object has no attribute 'identifier'
#   the same, spaces named: AttributeError 'NoneType' object has no attribute 'identifier'
#   add_difference of three: 2.5
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 sd-mecha==1.1.8
cat > "$place/show.py" <<'PYTHON'
import sys

import sd_mecha
import torch
from safetensors.torch import save_file

VALUES = {"base": 1.0, "tuned": 1.5, "target": 2.0}
for name, value in VALUES.items():
    save_file({"layer.weight": torch.full((2, 2), value)}, f"{sys.argv[1]}/{name}.safetensors")


def models(**space):
    return [sd_mecha.model(f"{sys.argv[1]}/{name}.safetensors", **space) for name in VALUES]


def chained(base, tuned, target):
    return sd_mecha.add_difference(target, sd_mecha.subtract(tuned, base))


def of_three(base, tuned, target):
    return sd_mecha.add_difference(target, tuned, base)


def say(what, recipe, **space):
    try:
        merged = sd_mecha.merge(recipe(*models(**space)), output=None)
        print(f"{what}:", merged["layer.weight"][0, 0].item())
    except AttributeError as error:
        print(f"{what}: AttributeError", error)


say("subtract, then add_difference", chained)
say("the same, spaces named", chained, merge_space="weight")
say("add_difference of three", of_three)
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
error="AttributeError 'NoneType' object has no attribute 'identifier'"
printf '%s\n' "subtract, then add_difference: $error" "the same, spaces named: $error" \
    "add_difference of three: 2.5" | diff "$place/seen" -
