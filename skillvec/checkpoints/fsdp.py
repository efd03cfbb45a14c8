"""FSDP's state dicts: one file a rank, as verl saves them, or accelerate's full one.

Takes DTensor and ShardedTensor. Refused by name: missing ranks, flat parameters, strided shards
over uneven meshes, partial sums.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from skillvec.checkpoints.opened import Found, Opened
from skillvec.checkpoints.parts import as_shape, assemble, find_side, of_training, order_ranks
from skillvec.checkpoints.pickles import ADVICE, Record, Stored
from skillvec.checkpoints.torch_files import load_archive, open_pickles, state_dict
from skillvec.errors import FormatError, IncompatibleError, up_to_five_each
from skillvec.files.tensors import Source, digest_values
from skillvec.files.views import Index

RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
FLAT_FILE = re.compile(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin")  # accelerate's LOCAL_STATE_DICT


def has_rank_files(found: Found) -> bool:
    return found.folder is not None and any(map(RANK_FILE.fullmatch, found.files))


@of_training
def open_rank_files(folder: Path, what: str) -> Opened:
    """Open model_world_size_W_rank_R.pt files: FSDP's sharded state dicts as verl saves them."""
    names = sorted(os.listdir(folder))
    found = [match for match in map(RANK_FILE.fullmatch, names) if match]
    worlds = sorted({int(match[1]) for match in found})
    if len(worlds) != 1:
        raise IncompatibleError(f"{folder}: files of worlds of {worlds} ranks: which are meant?")
    files = order_ranks([(int(match[2]), folder / match[0]) for match in found], worlds[0])
    ranks = [state_dict(load_archive(os.fspath(file)), os.fspath(file)) for file in files]
    every, lacking = dict.fromkeys(name for rank in ranks for name in rank), defaultdict(list)
    for name in every:
        owner = next(number for number, rank in enumerate(ranks) if name in rank)
        missing = next((number for number, rank in enumerate(ranks) if name not in rank), None)
        if missing is not None:
            kind = f"in rank {owner}, not in rank {missing}"
            lacking[kind].append(f"{name}: {kind}")
    if lacking:
        raise FormatError(f"{folder}: tensors that not every rank has:\n{up_to_five_each(lacking)}")
    tensors = {name: join_ranks(name, [rank[name] for rank in ranks]) for name in ranks[0]}
    left = [name for name in names if re.match(r"(optim|extra_state)_world_size_", name)]
    notes = [f"{len(left)} files of optimizer and other state left out"] if left else []
    side = find_side(folder / "huggingface", folder)
    return Opened(tensors, format="FSDP rank files", side=side, notes=tuple(notes))


def join_ranks(name: str, values: Sequence[Any]) -> Source:
    """Return a tensor from what each rank holds of it."""
    kinds = {value.name if isinstance(value, Record) else "" for value in values}
    if len(kinds) != 1:
        raise FormatError(f"tensor {name!r}: of different kinds in different ranks")
    kind = kinds.pop()
    if not kind:
        return _same(name, values)
    if kind.endswith(".ShardedTensor"):
        shards = [shard for value in values for shard in value.state[0]]
        offsets = [as_shape(shard.get("metadata").get("shard_offsets")) for shard in shards]
        parts = zip(offsets, [shard.get("tensor") for shard in shards], strict=True)
        return assemble(name, as_shape(values[0].state[1].get("size")), list(parts))
    specs = [value.get("_spec") for value in values]
    shape = as_shape(specs[0].get("tensor_meta").get("shape", 0))
    places = [spec.get("mesh").get("_coordinate_on_dim") for spec in specs]
    known = [as_shape(place) for place in places if place is not None]
    mesh = [max(along) + 1 for along in zip(*known, strict=True)]
    pieces: dict[Index, Stored] = {}
    for value, spec, place in zip(values, specs, places, strict=True):
        if place is not None:  # else the rank has no part in this tensor
            offset, sizes = _local(name, shape, spec.get("placements"), mesh, place)
            local = value.get("_local_tensor")
            if local.shape != sizes and (prod(sizes) or prod(local.shape)):
                raise FormatError(
                    f"tensor {name!r}: the rank at {list(place)} of {mesh} holds"
                    f" {list(local.shape)} of {list(shape)}, expected {list(sizes)}"
                )
            pieces.setdefault(offset, local)  # replicas are the same
    return assemble(name, shape, list(pieces.items()))


def _same(name: str, values: Sequence[Stored]) -> Source:
    """Return a tensor that every rank holds whole, such as a buffer: their bytes are compared."""
    if "flat_param" in name:
        raise IncompatibleError(
            f"tensor {name!r} is a flat parameter of FSDP, whose layout the files do not hold: save"
            " a sharded or full state dict"
        )
    sources = [value.source(name) for value in values]
    if len({(s.dtype, s.shape, digest_values(s)) for s in sources}) > 1:
        raise IncompatibleError(
            f"tensor {name!r}: plain in every rank, with other values in each: how they belong"
            " together is not said"
        )
    return sources[0]


def _local(
    name: str, shape: Index, placements: Sequence[Record], mesh: Sequence[int], place: Sequence[int]
) -> tuple[Index, Index]:
    """Return offset and sizes of the part at `place` of a mesh, by the rule of DTensor.

    Mesh dimensions cut one after the other as torch.chunk does; strided shards (FSDP over tensor
    parallelism) cut what the plain ones to their right have left.
    """
    offset, sizes = [0] * len(shape), list(shape)
    kinds = [placement.name.rpartition(".")[2] for placement in placements]
    dims = [p.get("dim") if "Shard" in k else None for p, k in zip(placements, kinds, strict=True)]
    strided = [kind == "_StridedShard" for kind in kinds]
    for i in sorted(range(len(kinds)), key=lambda i: (strided[i], -i if strided[i] else i)):
        dim, right = dims[i], prod(n for j, n in enumerate(mesh) if j > i and dims[j] == dims[i])
        if kinds[i] not in ("Replicate", "Shard", "_StridedShard") or (
            strided[i] and placements[i].get("split_factor") != right
        ):
            raise IncompatibleError(f"tensor {name!r} is {kinds[i]} over its ranks: {ADVICE}")
        if dim is not None:
            chunk = -(-sizes[dim] // mesh[i])
            begin = min(chunk * place[i], sizes[dim])
            offset[dim] += begin
            sizes[dim] = min(chunk, sizes[dim] - begin)
    return tuple(offset), tuple(sizes)


# ------------------------------------------------------------------------------- FSDP in one


def has_fsdp(found: Found) -> bool:
    named = "pytorch_model_fsdp.bin" in found.files or any(map(FLAT_FILE.fullmatch, found.files))
    return found.folder is not None and named


@of_training
def open_fsdp(folder: Path, what: str) -> Opened:
    """Open accelerate's full FSDP state dict; its local ones are flat parameters."""
    file = folder / "pytorch_model_fsdp.bin"
    if not file.is_file():
        raise IncompatibleError(
            f"{folder}: flat FSDP parameters of each rank (LOCAL_STATE_DICT), whose layout the"
            " files do not hold: save with SHARDED_STATE_DICT or FULL_STATE_DICT"
        )
    tensors = open_pickles([os.fspath(file)], what)
    return Opened(tensors, format="FSDP full state dict", side=find_side(folder))
