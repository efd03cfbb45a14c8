"""What a user writes without a tool: load whole models with torch, compute, save in one piece.

The yardstick of the "naive" rows, so it stays as plain as such scripts are: bf16 arithmetic on the
stored dtype (so apply rounds twice), everything in memory, no streaming, no checks.

    naive.py diff RL SFT OUT          OUT is a vector file
    naive.py apply TARGET VECTOR LAM OUT     OUT is a folder, as below
    naive.py fused TARGET RL SFT LAM OUT
    naive.py orthogonality A B        prints the cosine
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def load(folder: str) -> Weights:
    """Load every shard of a model folder."""
    weights: Weights = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(shard)
    return weights


def save(weights: Weights, out: str, like: str) -> None:
    """Save a model folder with the side files of the folder `like`."""
    Path(out).mkdir()
    for side in Path(like).iterdir():
        if "safetensors" not in side.name:
            shutil.copy(side, out)
    save_file(weights, Path(out) / "model.safetensors", metadata={"format": "pt"})


def diff(tuned: str, base: str, out: str) -> None:
    """Save tuned - base."""
    a, b = load(tuned), load(base)
    save_file({name: a[name] - b[name] for name in a}, out, metadata={"format": "pt"})


def apply(target: str, vector: str, lam: str, out: str) -> None:
    """Save target + lam * vector."""
    t, v = load(target), load_file(vector)
    save({name: t[name] + float(lam) * v[name] for name in t}, out, like=target)


def fused(target: str, tuned: str, base: str, lam: str, out: str) -> None:
    """Save target + lam * (tuned - base)."""
    t, a, b = load(target), load(tuned), load(base)
    save({name: t[name] + float(lam) * (a[name] - b[name]) for name in t}, out, like=target)


def orthogonality(a: str, b: str) -> None:
    """Print the cosine of two vectors, summed tensor by tensor in float32."""
    x, y = load_file(a), load_file(b)
    dot = norm_x = norm_y = torch.zeros(())
    for name in x:
        u, w = x[name].float().flatten(), y[name].float().flatten()
        dot, norm_x, norm_y = dot + u @ w, norm_x + u @ u, norm_y + w @ w
    print(float(dot / (norm_x * norm_y).sqrt()))


if __name__ == "__main__":
    jobs: dict[str, Callable[..., None]] = {
        "diff": diff,
        "apply": apply,
        "fused": fused,
        "orthogonality": orthogonality,
    }
    jobs[sys.argv[1]](*sys.argv[2:])
