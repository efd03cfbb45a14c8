"""The part of a vector that LoRA of a rank can hold, as a vector.

    python -m skillvec.recipes.mini.low_rank --vector V --rank 4 --output low.safetensors

The best factors of every linear layer by `skillvec extract-lora`, multiplied out again; embeddings
and norms are not in it. A vector of zeros, of which no adapter can be made, is its own part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import skillvec as sv


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vector", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    vector = sv.SkillVector.open(options.vector)
    with tempfile.TemporaryDirectory() as folder:
        if sv.inspect(options.vector).facts["changed"]:
            sv.extract_lora(vector, Path(folder) / "adapter", rank=options.rank)
            vector = sv.SkillVector.open(Path(folder) / "adapter")
        vector.save(options.output, force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
