#!/usr/bin/env bash
# TRL 1.16.0: TrlParser neither converts nor checks values of a configuration file that are no text.
#
# They become defaults of an argparse parser, and argparse converts a default only where it is text.
# So a list passes for a number, a fraction for a whole number, and false, which is what YAML reads
# in `save_strategy: no`, for a text. A text passes for a list of texts too, whose letters are then
# what a loop over it sees. Nothing is said before something fails on the value, or does not.
#
# Seen with torch 2.13.0 (CPU), trl 1.16.0, transformers 5.23.0, Python 3.11:
#   steps: [1] for a whole number
#   every: 2.5 for a whole number
#   strategy: False for a text
#   rewards: 'module:function' for a list of texts
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$place/config.yaml" <<'YAML'
steps: [1]
every: 2.5
strategy: no
rewards: module:function
YAML
cat > "$place/show.py" <<'PYTHON'
import sys
from dataclasses import dataclass, field

from trl import TrlParser


@dataclass
class Arguments:
    steps: int = 1
    every: int = 1
    strategy: str = "no"
    rewards: list[str] = field(default_factory=list)


(taken,) = TrlParser(Arguments).parse_args_and_config(["--config", sys.argv[1]])
print(f"steps: {taken.steps} for a whole number")
print(f"every: {taken.every} for a whole number")
print(f"strategy: {taken.strategy} for a text")
print(f"rewards: {taken.rewards!r} for a list of texts")
assert taken == Arguments([1], 2.5, False, "module:function")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/config.yaml"
