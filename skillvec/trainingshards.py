"""Checkpoints of training runs, put together from the files of all ranks without loading one.

Takes torch.distributed.checkpoint folders, the safetensors that its HuggingFaceStorageWriter leaves
of each rank, one file a rank of FSDP and verl (DTensor or ShardedTensor), DeepSpeed ZeRO 1, 2 and 3
(the fp32 master weights, by the arithmetic of its zero_to_fp32). Every tensor comes out in the
dtype it is stored in. Files are parsed for addresses (skillvec.pickles); the parts of a tensor must
tile it exactly. Optimizer state is left out and counted in notes. Refused by name: missing ranks,
flat FSDP parameters, strided shards over uneven meshes, partial sums, compressed streams, tensor
and pipeline parallelism and experts of DeepSpeed, its universal checkpoints.
"""

import json
import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from skillvec.errors import (
    FormatError,
    IncompatibleError,
    SkillvecError,
    up_to_five,
    up_to_five_each,
)
from skillvec.kernels import Array
from skillvec.opened import Found, Opened
from skillvec.pickles import (
    ADVICE,
    MAX_PICKLE_NBYTES,
    WRAPPERS,
    Record,
    Stored,
    load_archive,
    load_pickle,
    open_pickles,
    state_dict,
)
from skillvec.sources import (
    Derived,
    Index,
    Source,
    View,
    Viewed,
    digest_values,
    read_values,
    row_major,
)
from skillvec.storage import (
    ITEMSIZE,
    MAX_DIMENSIONS,
    MAX_SIZE,
    Header,
    TensorSpec,
    is_plain_name,
    read_bytes,
    refuse_duplicates,
)

MAX_RANKS = 1 << 17
MAX_CELLS = 1 << 24  # of the grid that the parts of one tensor cut it into
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FLAT_FILE = re.compile(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin")  # accelerate's LOCAL_STATE_DICT
SHARDING = "DCP_SHARDING_INFO"  # header metadata: where in its tensor each part of a file begins
WHOLE = "model.safetensors"
SHARD_FILE = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")  # by rank, from 1 on
OPTIMIZERS = ("optimizer", "optim", "optimizers", "lr_scheduler", "scheduler", "dataloader")
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


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


def of_training(open_folder: Callable[[Path, str], Opened]) -> Callable[[Found], Opened]:
    """Return an opener of folders that a training run saved, whose errors name the model.

    It reads metadata and pickles alone, and compares the values of what ranks hold in common.
    """

    @wraps(open_folder)
    def open_found(found: Found) -> Opened:
        folder, what = found.folder or Path(), found.what
        try:
            return open_folder(folder, what)
        except SkillvecError as error:
            text = str(error)
            raise type(error)(text if text.startswith(what) else f"{what}: {text}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                RecursionError) as error:  # fmt: skip
            raise FormatError(
                f"{what}: {folder} is not laid out as its kind of checkpoint: {error!r:.200}"
            ) from None

    return open_found


def _side(*folders: Path) -> Path | None:
    """Return the first folder that holds a config or tokenizer."""
    return next((f for f in folders if any((f / name).is_file() for name in SIDE_FILES)), None)


def _shape(value: Any) -> Index:
    """Return a shape or offset of a pickle, checked."""
    shape = tuple(value)
    if len(shape) > MAX_DIMENSIONS or any(
        type(n) is not int or not 0 <= n <= MAX_SIZE for n in shape
    ):
        raise FormatError(f"not a shape: {str(value)[:80]}")
    return shape


def _assemble(name: str, shape: Index, parts: Sequence[tuple[Index, Stored]]) -> Source:
    """Return a tensor made of parts at offsets, which must tile it: no gap and no overlap."""
    dtypes = sorted({part.dtype for _, part in parts})
    ranks = {len(shape), *(len(o) for o, _ in parts), *(len(part.shape) for _, part in parts)}
    if len(dtypes) != 1 or len(ranks) != 1:
        raise FormatError(f"tensor {name!r}: parts of {dtypes}, of {sorted(ranks)} dimensions")
    parts = [(offset, part) for offset, part in parts if prod(part.shape)]
    cuts = [
        sorted({0, n, *(o[d] for o, _ in parts), *(o[d] + part.shape[d] for o, part in parts)})
        for d, n in enumerate(shape)
    ]
    if prod(map(len, cuts)) > MAX_CELLS:
        raise IncompatibleError(f"tensor {name!r}: {len(parts)} parts that form no grid: {ADVICE}")
    covered = np.zeros([len(cut) - 1 for cut in cuts], np.bool_)
    places = [{value: i for i, value in enumerate(cut)} for cut in cuts]
    for offset, part in parts:
        corners = zip(places, offset, part.shape, strict=True)
        covered[tuple(slice(at[o], at[o + n]) for at, o, n in corners)] = True
    numel = sum(prod(part.shape) for _, part in parts)
    inside = all(cut[-1] == n for cut, n in zip(cuts, shape, strict=True))
    if not inside or numel != prod(shape) or not covered.all():
        raise FormatError(
            f"tensor {name!r}: {len(parts)} parts of {numel} values do not tile {list(shape)}"
        )
    if len(parts) == 1:
        return parts[0][1].source(name)
    view = View(shape, tuple(part.box(name, offset) for offset, part in parts))
    return Viewed(name, dtypes[0], view)


# --------------------------------------------------------------- torch.distributed.checkpoint


def _dcp_folders(folder: Path) -> list[Path]:
    """Return the folder, or accelerate's folders of models in it, where a .metadata lies."""
    inner = sorted(folder.glob("pytorch_model_fsdp_*/.metadata"))
    return [file.parent for file in (folder / ".metadata", *inner) if file.is_file()]


def has_dcp(found: Found) -> bool:
    if found.folder is None:
        return False
    return bool(_dcp_folders(found.folder)) or any(n.endswith(".distcp") for n in found.files)


@of_training
def open_dcp(folder: Path, what: str) -> Opened:
    """Open a folder of .metadata and .distcp files, or accelerate's folder around one."""
    inner = _dcp_folders(folder)
    if len(inner) != 1:
        found = [path.name for path in inner] or ["*.distcp without .metadata: saved to the end?"]
        raise IncompatibleError(f"{folder}: expected one checkpoint, found:\n{up_to_five(found)}")
    file = os.fspath(inner[0] / ".metadata")
    metadata = load_pickle(read_bytes(file, 0, MAX_PICKLE_NBYTES + 1), file)
    entries: dict[str, Record] = metadata.get("state_dict_metadata")
    planned = metadata.get("planner_data")
    places = {}
    for index, info in metadata.get("storage_data").items():
        offset = index.state.get("offset")
        places[index.get("fqn"), None if offset is None else _shape(offset)] = info
    paths = {
        fqn: tuple(map(str, planned[fqn])) if isinstance(planned, dict) else (fqn,)
        for fqn, entry in entries.items()
        if entry.name.endswith(".TensorStorageMetadata")
    }
    notes = []
    if len(paths) < len(entries):
        notes.append(f"{len(entries) - len(paths)} entries that are no tensors left out")
    tensors: dict[str, Source] = {}
    for fqn, name in _model_of(paths, notes).items():
        shape, parts = _shape(entries[fqn].get("size")), []
        for chunk in entries[fqn].get("chunks"):
            offset, sizes = _shape(chunk.get("offsets")), _shape(chunk.get("sizes"))
            info = places.get((fqn, offset)) or places[fqn, None]
            parts.append((offset, _chunk(inner[0], info, fqn, sizes)))
        if name in tensors:
            raise FormatError(f"{file}: two tensors called {name!r}")
        tensors[name] = _assemble(name, shape, parts)
    side = _side(folder, folder / "huggingface", inner[0])
    return Opened(tensors, format="torch.distributed.checkpoint", side=side, notes=tuple(notes))


def _model_of(paths: dict[str, tuple[str, ...]], notes: list[str]) -> dict[str, str]:
    """Return fqn -> name of the model's tensors; add to notes what is left out."""
    while True:
        heads = {path[0] for path in paths.values() if len(path) > 1}
        roots = [head for head in ("app", *WRAPPERS) if head in heads]
        if len(roots) > 1:
            raise IncompatibleError(f"which of {roots} is the model? {ADVICE}")
        left = {
            fqn: path[0]
            for fqn, path in paths.items()
            if (path[0] not in roots or len(path) == 1 if roots else path[0] in OPTIMIZERS)
        }
        counts = Counter(left.values()).items()
        notes += [f"{head}: {count} tensors left out" for head, count in counts]
        paths = {fqn: path[len(roots) :] for fqn, path in paths.items() if fqn not in left}
        if not paths:
            raise IncompatibleError(f"no model beside other state:\n{up_to_five(notes)}")
        if not roots:
            return {fqn: ".".join(path) for fqn, path in paths.items()}


def _chunk(folder: Path, info: Record, name: str, sizes: Index) -> Stored:
    """Return the address of one chunk, an archive of torch.save of its own in a .distcp file."""
    file, transforms = info.get("relative_path"), info.state.get("transform_descriptors")
    if not is_plain_name(file):
        raise FormatError(f"tensor {name!r} is said to lie in {file!r}, no plain file name")
    if transforms:
        raise IncompatibleError(f"tensor {name!r} is stored through {list(transforms)}: {ADVICE}")
    begin, nbytes = _shape((info.get("offset"), info.get("length")))
    path = os.fspath(folder / file)
    if not os.path.isfile(path):
        raise FormatError(f"{folder}: {file} is missing (tensor {name!r})")
    stored = load_archive(path, begin, nbytes)
    if not isinstance(stored, Stored) or stored.shape != sizes:
        raise FormatError(f"{path}: expected a part of {list(sizes)} of {name!r} at byte {begin}")
    return stored


# ------------------------------------------------- safetensors of HuggingFaceStorageWriter


def is_of_ranks(headers: Mapping[str, Header]) -> bool:
    """Return whether files, by name, hold parts of tensors: shards that a rank wrote."""
    found = {name: header for name, header in headers.items() if SHARDING in header.metadata}
    return any(
        SHARD_FILE.fullmatch(name) or any(map(any, _offsets(name, header).values()))
        for name, header in found.items()
    )


def of_ranks(headers: Mapping[str, Header], what: str) -> Opened:
    """Return the model that safetensors files of ranks hold together, by the offsets they name.

    `what` names the model in errors. How many ranks there were stands nowhere: the first one's
    shard alone is refused, a rank between others shows as a gap. Raises FormatError,
    IncompatibleError.
    """
    other = [name for name, header in headers.items() if SHARDING not in header.metadata]
    if other:
        raise FormatError(
            f"{what}: shards of ranks ({SHARDING}) beside other safetensors: which are the model?"
            f" Name the file, or move the others away:\n{up_to_five(other)}"
        )
    ranks = sorted({int(match[1]) for match in map(SHARD_FILE.fullmatch, headers) if match})
    if len(ranks) == 1 or len(headers) == 1:
        raise IncompatibleError(
            f"{what}: {min(headers)}: what one rank wrote by torch's HuggingFaceStorageWriter, a"
            " part of every tensor: name a folder that holds the shards of all ranks (of a run of"
            f" one rank: rename the file to {WHOLE}, or have torch consolidate it)"
        )
    parts: dict[str, list[tuple[Index, Stored]]] = {}
    for file, header in headers.items():
        for name, begin in _offsets(file, header).items():
            spec = header.tensors[name]
            if spec.dtype not in ITEMSIZE:
                raise IncompatibleError(f"{what}: {name}: parts of {spec.dtype}: {ADVICE}")
            strides = row_major(spec.shape)
            stored = Stored(spec.dtype, spec.shape, strides, spec.path, spec.start)
            parts.setdefault(name, []).append((begin, stored))
    tensors: dict[str, Source] = {}
    said = f"shards of {len(ranks) or len(headers)} ranks"
    for name, found in parts.items():
        ends = [[a + n for a, n in zip(at, part.shape, strict=False)] for at, part in found]
        try:
            tensors[name] = _assemble(name, tuple(map(max, *ends, ends[0])), found)
        except SkillvecError as error:
            raise type(error)(f"{what}: {error}; {said} are here: is one missing?") from None
    notes = [f"put together from {said}; how many there were is not recorded"]
    return Opened(tensors, format="DCP safetensors", notes=tuple(notes))


def _offsets(file: str, header: Header) -> dict[str, Index]:
    """Return where the tensors of a file begin in those that they are parts of."""
    try:
        said = json.loads(header.metadata[SHARDING], object_pairs_hook=refuse_duplicates)
        found = {name: _shape(said[name]["saved_offsets"]) for name in header.tensors}
    except (ValueError, LookupError, TypeError, RecursionError, FormatError) as error:
        raise FormatError(f"{file}: no readable {SHARDING}: {error!r:.200}") from None
    wrong = [name for name, at in found.items() if len(at) != len(header.tensors[name].shape)]
    if wrong:
        raise FormatError(f"{file}: offsets of other dimensions:\n{up_to_five(wrong)}")
    return found


# ----------------------------------------------------------------------------- files of ranks


def has_rank_files(found: Found) -> bool:
    return found.folder is not None and any(map(RANK_FILE.fullmatch, found.files))


def _ranks(found: Sequence[tuple[int, Path]], world: int) -> list[Path]:
    """Return the files of ranks 0.. in order; raise IncompatibleError naming those missing."""
    files = dict(found)
    missing = [str(rank) for rank in range(min(world, MAX_RANKS)) if rank not in files]
    if missing or not len(found) == len(files) == world:
        raise IncompatibleError(
            f"expected the files of {world} ranks, found {len(found)}; ranks missing:\n"
            + up_to_five(missing)
        )
    return [files[rank] for rank in range(world)]


@of_training
def open_rank_files(folder: Path, what: str) -> Opened:
    """Open model_world_size_W_rank_R.pt files: FSDP's sharded state dicts as verl saves them."""
    names = sorted(os.listdir(folder))
    found = [match for match in map(RANK_FILE.fullmatch, names) if match]
    worlds = sorted({int(match[1]) for match in found})
    if len(worlds) != 1:
        raise IncompatibleError(f"{folder}: files of worlds of {worlds} ranks: which are meant?")
    files = _ranks([(int(match[2]), folder / match[0]) for match in found], worlds[0])
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
    tensors = {name: _of_ranks(name, [rank[name] for rank in ranks]) for name in ranks[0]}
    left = [name for name in names if re.match(r"(optim|extra_state)_world_size_", name)]
    notes = [f"{len(left)} files of optimizer and other state left out"] if left else []
    side = _side(folder / "huggingface", folder)
    return Opened(tensors, format="FSDP rank files", side=side, notes=tuple(notes))


def _of_ranks(name: str, values: Sequence[Any]) -> Source:
    """Return a tensor from what each rank holds of it."""
    kinds = {value.name if isinstance(value, Record) else "" for value in values}
    if len(kinds) != 1:
        raise FormatError(f"tensor {name!r}: of different kinds in different ranks")
    kind = kinds.pop()
    if not kind:
        return _same(name, values)
    if kind.endswith(".ShardedTensor"):
        shards = [shard for value in values for shard in value.state[0]]
        offsets = [_shape(shard.get("metadata").get("shard_offsets")) for shard in shards]
        parts = zip(offsets, [shard.get("tensor") for shard in shards], strict=True)
        return _assemble(name, _shape(values[0].state[1].get("size")), list(parts))
    specs = [value.get("_spec") for value in values]
    shape = _shape(specs[0].get("tensor_meta").get("shape", 0))
    places = [spec.get("mesh").get("_coordinate_on_dim") for spec in specs]
    known = [_shape(place) for place in places if place is not None]
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
    return _assemble(name, shape, list(pieces.items()))


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


# ------------------------------------------------------------------------------ DeepSpeed ZeRO


def has_zero(found: Found) -> bool:
    if found.folder is None:
        return False
    suffixes = ("_optim_states.pt", "_model_states.pt")
    return (found.folder / "latest").is_file() or any(n.endswith(suffixes) for n in found.files)


@of_training
def open_zero(folder: Path, what: str) -> Opened:
    """Open the fp32 master weights of a ZeRO checkpoint, the arithmetic that of zero_to_fp32."""
    step = folder
    if (folder / "latest").is_file():
        tag = read_bytes(os.fspath(folder / "latest"), 0, 256).decode().strip()
        if not is_plain_name(tag) or not (folder / tag).is_dir():
            raise FormatError(f"{folder}: latest names {tag[:80]!r}, which is no folder in it")
        step = folder / tag
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
        raise IncompatibleError(f"{step}: ZeRO stage {stage!r}: {ADVICE}")
    files = _ranks(numbered, max(world) if isinstance(world, list) else world)
    states = [load_archive(os.fspath(file))["optimizer_state_dict"] for file in files]
    prefixes = [f"zero_pp_rank_{rank}_" for rank in range(len(files))] if stage == 3 else [""]
    models = [load_archive(os.fspath(step / f"{p}mp_rank_00_model_states.pt")) for p in prefixes]
    model, module = models[0], models[0]["module"]
    if "autoep_layers" in model or "ds_autoep_layers" in model:
        raise IncompatibleError(f"{step}: experts of DeepSpeed's AutoEP: {ADVICE}")
    buffers = [name for name in model["buffer_names"] if name in module]
    tensors: dict[str, Source] = {name: module[name].source(name) for name in buffers}
    for name, size in (model.get("frozen_param_shapes") or {}).items():
        whole = [m["frozen_param_fragments"][name] for m in models]
        tensors[name] = _join(name, _shape(size), _cut(whole, 0, prod(_shape(size))))
    shapes = [{name: _shape(shape) for name, shape in d.items()} for d in model["param_shapes"]]
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
    side = _side(folder, folder / "huggingface", folder.parent if step == folder else folder)
    return Opened(tensors, format=f"DeepSpeed ZeRO-{stage}", side=side, notes=tuple(notes))


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
    return Opened(tensors, format="FSDP full state dict", side=_side(folder))
