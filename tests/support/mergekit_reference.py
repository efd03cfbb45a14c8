"""What mergekit makes of given deltas: run by an interpreter that has mergekit 0.1.5 and torch.

    python mergekit_reference.py IN.npz OUT.npz

IN holds `cases`, a JSON list, and for case i the array `deltas_i`, float32 of shape (vectors,
values). OUT holds `out_i`. A case with `method` is merged by mergekit's own method on a base of
zeros; lists in `parameters` hold one value a vector. A case with `sparsify` is given to
mergekit.sparsify `draws` times, without rescaling: the result counts how often each value was kept.
A case with `signs` gives mergekit's mask of the values that agree with the elected sign, one with
`slerp`, which is t, what mergekit's function makes of two vectors.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from mergekit.merge_methods.api import merge_tensors
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.slerp import slerp
from mergekit.sparsify import SparsificationMethod, sparsify


def merged(deltas: torch.Tensor, method: str, parameters: dict[str, Any]) -> torch.Tensor:
    """Return method(base, base + deltas) - base with a base of zeros, so that nothing rounds."""
    ids = ["base", *range(len(deltas))]
    given = {
        name: dict(enumerate(value)) if isinstance(value, list) else value
        for name, value in parameters.items()
    }
    tensors = [torch.zeros_like(deltas[0]), *deltas]
    return merge_tensors(tensors, method, parameters=given, ids=ids, base_index=0)


def kept(delta: torch.Tensor, method: str, parameters: dict[str, Any], draws: int) -> torch.Tensor:
    """Return how often each value survives mergekit's sparsification."""
    torch.manual_seed(0)
    how = SparsificationMethod(method)
    return sum(
        (sparsify(delta, method=how, rescale_norm=None, **parameters) != 0).to(torch.int64)
        for _ in range(draws)
    )


def main(source: str, target: str) -> None:
    """Run the cases of one file."""
    found = {}
    with np.load(source) as arrays:
        for i, case in enumerate(json.loads(str(arrays["cases"]))):
            deltas = torch.from_numpy(arrays[f"deltas_{i}"])
            if "method" in case:
                result = merged(deltas, case["method"], case["parameters"])
            elif "sparsify" in case:
                result = kept(deltas[0], case["sparsify"], case["parameters"], case["draws"])
            elif "slerp" in case:
                result = slerp(torch.tensor(case["slerp"]), deltas[:1], deltas[1:])[0]
            else:
                result = get_mask(deltas, method=case["signs"])
            found[f"out_{i}"] = result.numpy()
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
