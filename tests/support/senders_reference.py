"""What verl 0.9.1 and vLLM 0.33.0 make of patches: their own functions, over their sources.

    python senders_reference.py SOURCES FOLDER

SOURCES holds what benchmarks/senders_setup.sh takes out of their wheels. FOLDER holds base and
tuned, and the patches verl and vllm that skillvec has exported (.safetensors each). Written there:
`flush`, the patch from base to tuned as verl's trainer assembles it, and what readers make of base
and a patch: `verl.sglang` and `verl.vllm` (verl's own for SGLang and for vLLM), `vllm.vllm`. What a
trainer sends over a network and a server receives from it is handed over here; the rest is theirs.
"""

import __future__

import ast
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class Model:
    """The least that their loaders load weights into."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)


def taken(path: Path, names: set[str], known: dict[str, Any]) -> types.SimpleNamespace:
    """Run functions and classes of a file whose other imports are not here."""
    known |= {"torch": torch, "json": json, "dataclass": dataclass}
    flags = __future__.annotations.compiler_flag
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            node.decorator_list = [d for d in node.decorator_list if "static" not in ast.unparse(d)]
            exec(compile(ast.Module([node], []), path.name, "exec", flags), known)
    return types.SimpleNamespace(**known)


def verl(sources: Path, module: str) -> Any:
    """Import a module of verl without what its packages import."""
    parts = f"verl.{module}".split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if package not in sys.modules and package != "verl.checkpoint_engine.delta_sync":
            sys.modules[package] = made = types.ModuleType(package)
            made.__path__ = [str(sources.joinpath(*parts[:end]))]
    return importlib.import_module(f"verl.{module}")


def flush(sources: Path, base: Tensors, tuned: Tensors) -> Tensors:
    """Return the patch as verl's trainer assembles it: matrices as two row-parallel ranks send
    them, one after the other; lists of over 100 values in two entries."""
    encode = verl(sources, "checkpoint_engine.delta_sync.encode")
    gather = verl(sources, "checkpoint_engine.delta_sync.sparse_gather")
    known = {"DeltaParam": encode.DeltaParam, "DeltaFlush": encode.DeltaFlush,
             "_checksum": encode.checksum}  # fmt: skip
    known["DeltaShardedCheckpointEngine"] = types.SimpleNamespace(MAX_ENTRY_ELEMS=100)
    engine = taken(
        sources / "verl/checkpoint_engine/delta_checkpoint_engine.py",
        {"_prodshape", "_FlushPiece", "_assemble_flush", "_bucket_sliced"},
        known,
    )
    pieces: list[Any] = []
    bucket = types.SimpleNamespace(add=lambda piece, nbytes: pieces.append(piece))
    for name, before in base.items():
        places = torch.arange(before.numel()).reshape(before.shape)
        halves = places.chunk(2, dim=1) if before.dim() == 2 else (places,)
        found = []
        for half in (half.reshape(-1) for half in halves):
            new, old = tuned[name].reshape(-1)[half], before.reshape(-1)[half]
            at, values = gather.shard_delta_indices(new, old, 0)
            found.append((half[at], values))
        dtype = str(before.dtype).replace("torch.", "")
        indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        engine._bucket_sliced(bucket, name, dtype, before.shape, indices, values)
    sent = engine._assemble_flush(types.SimpleNamespace(encoding="indices"), pieces)
    said = {"encoding": sent.encoding, "params": [vars(param) for param in sent.params],
            "checksum": int(sent.checksum)}  # fmt: skip
    text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    return {"__delta_spec__": text, "__positions__": sent.positions_cpu,
            "__values__": sent.values_gpu}  # fmt: skip


def main(sources: Path, folder: Path) -> None:
    """Write what their functions make of the files in the folder."""
    base, tuned = (load_file(folder / f"{side}.safetensors") for side in ("base", "tuned"))
    save_file(flush(sources, base, tuned), folder / "flush.safetensors")
    path = next(sources.rglob("checkpoint_weight_patch.py"))
    spec = importlib.util.spec_from_file_location("checkpoint_weight_patch", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = vllm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vllm)
    sent = load_file(folder / "verl.safetensors")

    model = Model(base)
    loader = verl(sources, "workers.rollout.sglang_rollout.delta_loader")
    loader.apply_delta(model, sent.items())
    save_file(model.tensors, folder / "verl.sglang.safetensors")

    model = Model(base)
    api = vllm.CheckpointWeightPatch, vllm.load_checkpoint_weight_patches
    adapter = taken(sources / "verl/workers/rollout/vllm_rollout/delta_weight_transfer.py",
                    {"decode_delta_payload"}, {"_checkpoint_patch_api": lambda: api})  # fmt: skip
    _, patches = adapter.decode_delta_payload(sent.items())
    vllm.load_checkpoint_weight_patches(model, patches)
    save_file(model.tensors, folder / "verl.vllm.safetensors")

    model = Model(base)
    nccl = taken(next(sources.rglob("sparse_nccl_engine.py")),
                 {"SparseWeightPatch", "SparseNCCLWeightTransferUpdateInfo", "_validate_patch"},
                 {"WeightTransferUpdateInfo": object})  # fmt: skip
    with safe_open(folder / "vllm.safetensors", "pt") as file:
        info = nccl.SparseNCCLWeightTransferUpdateInfo(**json.loads(file.metadata()["update_info"]))
        patches = []
        for name, dtype, shape, count in zip(
            info.names, info.dtype_names, info.shapes, info.num_updates_list, strict=True
        ):
            lists = file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values")
            nccl._validate_patch(nccl.SparseWeightPatch(name, *lists, tuple(shape)))
            assert lists[0].numel() == count
            indices, values = lists
            patches.append(vllm.CheckpointWeightPatch(
                name, tuple(shape), getattr(torch, dtype), values, indices
            ))  # fmt: skip
    vllm.load_checkpoint_weight_patches(model, patches)
    save_file(model.tensors, folder / "vllm.vllm.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
