"""Files of second moments, as docs/format.md has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import save

TOKENS = 50


def write_moments(
    path: Path, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any], **other: Any
) -> Path:
    """Write second moments of inputs (tokens x values, by entry) to a file."""
    tensors = {}
    for entry, x in inputs.items():
        tensors[f"{entry}.moment"] = torch.tensor(x.T @ x / len(x)).float()
        tensors[f"{entry}.mean"] = torch.tensor(x.mean(0)).float()
    about = {"kind": "moments", "schema": 1, "model": "toy", "tokens": TOKENS, "weights": weights}
    return save(path, tensors, {"format": "pt", "skillvec": json.dumps(about | other)})
