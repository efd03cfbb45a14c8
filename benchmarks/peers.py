"""deltatensors and PEFT as real.py calls them: their Python APIs, in the venv that has them.

    peers.py deltatensors-diff STRATEGY TUNED BASE OUT
    peers.py deltatensors-apply MODEL DELTA OUT      MODEL has to be the base of DELTA
    peers.py unchecked-deltatensors-apply MODEL DELTA OUT
    peers.py peft-merge MODEL ADAPTER OUT

deltatensors returns float32 arrays, whatever the model has, and writes no model: they are rounded
to the dtype of the model's tensors and saved here. PEFT merges into the model that transformers
loads, in its own dtype, and saves it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def deltatensors_diff(strategy: str, tuned: str, base: str, out: str) -> None:
    """Write a .wdelta; `sparse` keeps every value, as far as its options go, others by default."""
    import deltatensors

    options = {"sparsity": 0.0} if strategy == "sparse" else {}
    deltatensors.save_delta_from_paths(out, tuned, base, strategy=strategy, **options)


def deltatensors_apply(model: str, delta: str, out: str, verify: bool = True) -> None:
    """Write MODEL with a .wdelta added, as a folder like MODEL's."""
    import deltatensors
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    arrays = deltatensors.load_delta_from_paths(delta, model, verify=verify)
    Path(out).mkdir()
    for path in sorted(Path(model).iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
            continue
        tensors = {}
        with safe_open(path, "pt") as held:
            for name in list(held.keys()):
                values = torch.from_numpy(arrays.pop(name))
                tensors[name] = values.to(held.get_tensor(name).dtype)
        save_file(tensors, Path(out) / path.name, {"format": "pt"})


def peft_merge(model: str, adapter: str, out: str) -> None:
    """Write MODEL with an adapter merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(out)


def main(verb: str, *rest: str) -> None:
    """Do what the command line asks for."""
    if verb == "deltatensors-diff":
        deltatensors_diff(*rest)
    elif verb == "peft-merge":
        peft_merge(*rest)
    else:
        model, delta, out = rest
        deltatensors_apply(model, delta, out, verify=not verb.startswith("unchecked-"))


if __name__ == "__main__":
    main(*sys.argv[1:])
