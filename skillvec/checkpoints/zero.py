"""DeepSpeed ZeRO 1, 2 and 3: the fp32 master weights, by the arithmetic of its zero_to_fp32.

Refused by name: missing ranks, tensor and pipeline parallelism, experts, universal checkpoints.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from skillvec.checkpoints.opened import Found, Opened
from skillvec.checkpoints.parts import as_shape, find_side, of_training, order_ranks
from skillvec.checkpoints.pickles import ADVICE, Record, Stored, brief
from skillvec.checkpoints.torch_files import load_archive
from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.files.file import is_plain_name, read_bytes
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.tensors import Derived, Source, read_values
from skillvec.files.views import Index
from skillvec.ops.kernels import Array

OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class Joined(Derived):
    """A tensor whose values, in row-major order, are those of flat pieces end to end."""

    name: str
    dtype: str
    shape: Index
    pieces: tuple[TensorSpec, ...]

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.pieces

    def read(self, begin: int, out: Array) -> None:
        ends = list(accumulate(piece.numel for piece in self.pieces))
        done = 0
        while done < out.size:
            at = bisect_right(ends, begin + done)
            first = begin + done - (ends[at] - self.pieces[at].numel)
            count = min(self.pieces[at].numel - first, out.size - done)
            read_values(self.pieces[at], first, out[done : done + count])
            done += count


def has_zero(found: Found) -> bool:
    if found.folder is None:
        return False
    suffixes = ("_optim_states.pt", "_model_states.pt")
    return (found.folder / "latest").is_file() or any(n.endswith(suffixes) for n in found.files)


@of_training
def open_zero(folder: Path, what: str) -> Opened:
    """Open the fp32 master weights of a ZeRO checkpoint, the arithmetic that of zero_to_fp32."""
    step = _step_of(folder)
    states = _read_states(step)
    first = states[0]
    stage = first["zero_stage"]
    prefixes = [f"zero_pp_rank_{rank}_" for rank in range(len(states))] if stage == 3 else [""]
    models = [load_archive(os.fspath(step / f"{p}mp_rank_00_model_states.pt")) for p in prefixes]
    model, module = models[0], models[0]["module"]
    if "autoep_layers" in model or "ds_autoep_layers" in model:
        raise IncompatibleError(f"{step}: experts of DeepSpeed's AutoEP: {ADVICE}")
    buffers = [name for name in model["buffer_names"] if name in module]
    tensors: dict[str, Source] = {name: module[name].source(name) for name in buffers}
    for name, size in (model.get("frozen_param_shapes") or {}).items():
        whole = [m["frozen_param_fragments"][name] for m in models]
        tensors[name] = _join(name, as_shape(size), _cut(whole, 0, prod(as_shape(size))))
    shapes = [{name: as_shape(shape) for name, shape in d.items()} for d in model["param_shapes"]]
    if stage == 3:
        tensors |= _zero3([state["fp32_flat_groups"] for state in states], shapes)
    else:
        groups = [state["single_partition_of_fp32_groups"] for state in states]
        tensors |= _zero2(groups, shapes, first.get("param_alignment_paddings"))
    for name, other in (model.get("shared_params") or {}).items():
        if other in tensors:
            same: Any = tensors[other]
            renamed = same._replace if isinstance(same, TensorSpec) else partial(replace, same)
            tensors[name] = renamed(name=name)
    left = [name for name in module if name not in tensors and stage < 3]  # 3 has placeholders
    tensors |= {name: module[name].source(name) for name in left}
    notes = [f"{len(left)} tensors that no optimizer holds, in the model's dtype"] if left else []
    side = find_side(folder, folder / "huggingface", folder.parent if step == folder else folder)
    return Opened(tensors, format=f"DeepSpeed ZeRO-{stage}", side=side, notes=tuple(notes))


def _step_of(folder: Path) -> Path:
    """Return the folder of the step that `latest` names, or the folder itself without one."""
    if not (folder / "latest").is_file():
        return folder
    tag = read_bytes(os.fspath(folder / "latest"), 0, 256).decode().strip()
    if not is_plain_name(tag) or not (folder / tag).is_dir():
        raise FormatError(f"{folder}: latest names {tag[:80]!r}, which is no folder in it")
    return folder / tag


def _read_states(step: Path) -> list[dict[str, Any]]:
    """Return the optimizer states of all ranks in order, of a stage that is taken."""
    names = sorted(os.listdir(step))
    found = [match for match in map(OPTIM_FILE.fullmatch, names) if match]
    foreign = [name for name in names if re.match(r"layer_\d|expp_rank_|zero$|.*expert_\d", name)]
    foreign += [match[0] for match in found if int(match[2])]
    if foreign:
        raise IncompatibleError(
            f"{step}: tensor or pipeline parallelism, experts, or a universal checkpoint of"
            f" DeepSpeed or Megatron: {ADVICE}; found:\n{up_to_five(foreign)}"
        )
    if not found:
        raise IncompatibleError(
            f"{step}: no *_optim_states.pt, which hold the fp32 weights of ZeRO; without ZeRO, name"
            " mp_rank_00_model_states.pt itself"
        )
    numbered = [(int(match[1]), step / match[0]) for match in found]
    first = load_archive(os.fspath(min(numbered)[1]))["optimizer_state_dict"]
    if "zero_stage" not in first:
        raise IncompatibleError(f"{step}: of BF16_Optimizer, not of ZeRO: {ADVICE}")
    stage, world = first["zero_stage"], first["partition_count"]
    stage = stage.args[0] if isinstance(stage, Record) else stage
    if stage not in (1, 2, 3):
        raise IncompatibleError(f"{step}: ZeRO stage {brief(stage)}: {ADVICE}")
    files = order_ranks(numbered, max(world) if isinstance(world, list) else world)
    states = [load_archive(os.fspath(file))["optimizer_state_dict"] for file in files]
    states[0]["zero_stage"] = stage
    return states


def _cut(flats: Sequence[Stored], begin: int, numel: int) -> list[TensorSpec]:
    """Return the pieces of a range of tensors, flat and laid end to end, as far as they go."""
    pieces, at = [], 0
    for flat in flats:
        size, width = prod(flat.shape), ITEMSIZE[flat.dtype]
        low, high = max(begin - at, 0), min(begin + numel - at, size)
        if low < high:
            spec = flat.source("")
            if not isinstance(spec, TensorSpec):
                raise FormatError(f"{flat.path}: a partition of strides {list(flat.strides)}")
            start, nbytes = spec.start + low * width, (high - low) * width
            pieces.append(spec._replace(shape=(high - low,), start=start, nbytes=nbytes))
        at += size
    return pieces


def _join(name: str, shape: Index, pieces: Sequence[TensorSpec]) -> Source:
    """Return flat pieces as a tensor, which they must fill."""
    dtypes, numel = {piece.dtype for piece in pieces}, sum(piece.numel for piece in pieces)
    if numel != prod(shape) or len(dtypes) != 1:
        raise FormatError(f"tensor {name!r}: {numel} values of {dtypes} for {list(shape)}")
    if len(pieces) == 1:
        return pieces[0]._replace(name=name, shape=shape)
    return Joined(name, dtypes.pop(), shape, tuple(pieces))


def _zero2(
    ranks: Sequence[Sequence[Stored]], shapes: Sequence[dict[str, Index]], paddings: Any
) -> dict[str, Source]:
    """Return the parameters of ZeRO 1 and 2: each group is one vector, cut evenly over ranks."""
    tensors: dict[str, Source] = {}
    align = 2 * len(ranks)
    for group, named in enumerate(shapes):
        flats, at = [rank[group] for rank in ranks], 0
        for i, (name, shape) in enumerate(named.items()):
            tensors[name] = _join(name, shape, _cut(flats, at, prod(shape)))
            at += prod(shape) + (paddings[group][i] if paddings else 0)
        held = sum(prod(flat.shape) for flat in flats)
        if -(-at // align) != -(-held // align):
            raise FormatError(f"group {group}: parameters take {at} values, partitions hold {held}")
    return tensors


def _zero3(
    ranks: Sequence[Sequence[Stored]], shapes: Sequence[dict[str, Index]]
) -> dict[str, Source]:
    """Return the parameters of ZeRO 3: each is cut evenly over ranks, the last part padded."""
    tensors: dict[str, Source] = {}
    at = 0
    for name, shape in ((name, shape) for named in shapes for name, shape in named.items()):
        part, left, pieces = -(-prod(shape) // len(ranks)), prod(shape), list[TensorSpec]()
        for flats in ranks:
            pieces += _cut(flats, at, min(part, left))
            left -= min(part, left)
        tensors[name] = _join(name, shape, pieces)
        at += part
    held = {sum(prod(flat.shape) for flat in flats) for flats in ranks}
    if held != {at}:
        raise FormatError(f"parameters take {at} values of each rank, partitions hold {held}")
    return tensors
