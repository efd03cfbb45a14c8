#!/usr/bin/env bash
# scipy 1.17.1: subspace_angles gives 0 for a small angle between two subspaces as soon as another one is large.
#
# Two planes are turned against each other by 1e-9 in one direction and by 1.2 in another. Angles above pi/4 are taken from
# cosines, which do not tell small angles, and the others from sines. Which of the two counts is decided in the order of
# the cosines, the largest first, and used in the order of the angles, the largest first: so the small one comes from its
# cosine, and is exactly 0. Where both angles are on the same side of pi/4 all digits are right.
#
# Seen with scipy 1.17.1, numpy 2.4.6, Python 3.11:
#   1e-09 alone: [1.e-09]
#   1e-09 beside 0.5: [5.e-01 1.e-09]
#   1e-09 beside 1.2: [1.2 0. ]
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet scipy==1.17.1 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import numpy as np
from scipy.linalg import subspace_angles


def plane(*angles):
    axes = np.zeros((4, len(angles)))
    for i, angle in enumerate(angles):
        axes[2 * i : 2 * i + 2, i] = np.cos(angle), np.sin(angle)
    return axes


for what, angles in (("alone", (1e-9,)), ("beside 0.5", (1e-9, 0.5)), ("beside 1.2", (1e-9, 1.2))):
    print("1e-09", f"{what}:", subspace_angles(plane(*[0] * len(angles)), plane(*angles)))
PYTHON
"$place/venv/bin/python" "$place/show.py" | tee "$place/seen"
printf '%s\n' "1e-09 alone: [1.e-09]" "1e-09 beside 0.5: [5.e-01 1.e-09]" \
    "1e-09 beside 1.2: [1.2 0. ]" | diff "$place/seen" -
