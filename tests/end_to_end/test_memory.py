"""Memory and disk: what a run holds does not grow with the size of a tensor, whatever its format.

A run in a process of its own is watched while it works. Twice: what it holds of a tensor four times
as large must be the same. Tensors are random, and made in the format's own way where that is cheap.
"""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from families import assert_same_bits, save
from hubserver import HubServer
from test_training_shards import save_dcp, save_ranks

from skillvec.checkpoints.gguf import Blocks, unpermuted
from skillvec.checkpoints.lora import open_adapter
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.files.header import TensorSpec, encode_header, read_header, tensor_nbytes
from skillvec.files.tensors import Source, Viewed, values_of
from skillvec.files.views import concatenate, whole
from skillvec.ops.kernels import STORAGE_DTYPE

WEIGHT = "model.layers.0.mlp.down_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS = 16
Tensors = Mapping[str, torch.Tensor]


# -------------------------------------------------------------------------------------- watched


class Spent(NamedTuple):
    """Peaks of anonymous memory, and of the bytes of shards on the disk, in MB; seconds."""

    memory: float
    disk: float
    seconds: float


def watched(
    *words: object, env: dict[str, str] | None = None, shards: Path | None = None,
    workers: int | None = 2,
) -> Spent:  # fmt: skip
    """Run skillvec in a process of its own; `shards` is a folder to look for fetched shards in."""
    command = [sys.executable, "-m", "skillvec", *map(str, words), "-q"]
    command += [] if workers is None else ["--workers", str(workers)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    memory = disk = 0.0
    while process.poll() is None:
        memory = max(memory, _resident(process.pid))
        if shards is not None:
            disk = max(disk, _on_disk(shards))
        time.sleep(0.004)
    output = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, output
    return Spent(memory, disk, time.perf_counter() - began)


def _resident(pid: int) -> float:
    """Return the anonymous memory in MB: now, or what the greatest of all was less the files."""
    try:
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        now, peak, files = (int(status[key].split()[0]) for key in ("RssAnon", "VmHWM", "RssFile"))
    except (OSError, KeyError, ValueError):  # it is ending
        return 0.0
    return max(now, peak - files) * 1024 / 1e6


def _on_disk(folder: Path) -> float:
    total = 0
    try:
        for path in folder.rglob("*/shards/*"):
            total += path.stat().st_size
    except FileNotFoundError:  # removed meanwhile: the next look comes soon
        return 0.0
    return total / 1e6


# ----------------------------------------------------------------------------------------- kinds


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Return weights of any sign and mantissa, 2^-7 to 2^-3 in size."""
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == torch.bfloat16:
        drawn = generator.integers(0, 1 << 16, count, np.uint16)
        drawn = (drawn & 0x81FF) + 0x3C00
    else:
        drawn = generator.integers(0, 1 << 32, count, np.uint32)
        drawn = (drawn & 0x81FFFFFF) + 0x3C000000
    return torch.from_numpy(drawn).view(dtype).reshape(shape)


def altered(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors a tenth of whose values have another mantissa."""
    result = {}
    for name, tensor in tensors.items():
        unsigned = {2: np.uint16, 4: np.uint32}[tensor.element_size()]
        drawn = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(unsigned).copy()
        at = np.random.default_rng(1).integers(0, drawn.size, drawn.size // 10)
        drawn[at] ^= unsigned(2) if unsigned is np.uint16 else unsigned(1 << 12)
        result[name] = torch.from_numpy(drawn).view(tensor.dtype).reshape(tensor.shape)
    return result


class Made(NamedTuple):
    """A checkpoint of a kind, the same values in plain safetensors, and a base of these names."""

    kind: Path
    plain: Path
    base: Path
    options: tuple[str, ...] = ()


def plain_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the values of any checkpoint, whole."""
    found = {}
    for name, source in open_checkpoint(folder).items():
        values = np.empty(source.numel, STORAGE_DTYPE[source.dtype])
        for at in range(0, source.numel, 1 << 20):
            part = values[at : at + (1 << 20)]
            part[:] = values_of(source, at, part.size)
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[source.dtype]
        found[name] = torch.from_numpy(values).view(dtype).reshape(source.shape)
    return found


def completed(
    folder: Path,
    kind: Path,
    tensors: Tensors | None = None,
    config: dict | None = None,
    *options: str,
) -> Made:
    """Save what goes with a kind; `tensors` are its values where names or shapes are others."""
    tensors = plain_of(kind) if tensors is None else tensors
    plain = save(folder / "plain", tensors, config=config)
    return Made(kind, plain, save(folder / "base", altered(tensors), config=config), options)


def safetensors(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side)}
    return completed(folder, save(folder / "kind", tensors), tensors)


def safetensors_fp32(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side // 2, dtype=torch.float32)}
    return completed(folder, save(folder / "kind", tensors), tensors)


def pickled(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side)}
    (folder / "kind").mkdir()
    torch.save(tensors, folder / "kind" / "pytorch_model.bin")
    return completed(folder, folder / "kind", tensors)


def pickled_turned(folder: Path, side: int) -> Made:
    """A tensor saved with the strides of its transpose."""
    tensors = {WEIGHT: noise(side, side).t()}
    (folder / "kind").mkdir()
    torch.save(tensors, folder / "kind" / "pytorch_model.bin")
    return completed(folder, folder / "kind", tensors)


def of_ranks(tensors: Tensors, dim: int, world: int = 4) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the DTensors of each rank of a world that shares a dimension; nothing is sent."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(f"r{rank}",))
        yield {
            name: distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)
            for name, tensor in tensors.items()
        }
        dist.destroy_process_group()


def distributed(folder: Path, side: int, dim: int = 0) -> Made:
    tensors = {WEIGHT: noise(side, side // 2, dtype=torch.float32)}
    kind = save_dcp(folder / "kind", [*of_ranks(tensors, dim)])
    return completed(folder, kind, tensors)


def distributed_columns(folder: Path, side: int) -> Made:
    return distributed(folder, side, 1)


def ranks(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side // 2, dtype=torch.float32)}
    kind = save_ranks(folder / "kind", [*of_ranks(tensors, 0)])
    return completed(folder, kind, tensors)


def zero3(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side // 2, dtype=torch.float32)}
    step, world = folder / "kind" / "global_step7", 2
    step.mkdir(parents=True)
    (folder / "kind" / "latest").write_text("global_step7\n")
    for rank, part in enumerate(tensors[WEIGHT].reshape(world, -1)):
        shapes = [OrderedDict({WEIGHT: tensors[WEIGHT].shape})]
        model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {},
                 "frozen_param_shapes": None, "frozen_param_fragments": None,
                 "ds_version": "0.19.8"}  # fmt: skip
        torch.save(model, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        groups = [piece.clone() for piece in part.split(side * side // 32)]
        state = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": groups}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": {}}, step / name)
    return completed(folder, folder / "kind", tensors)


def zero2(folder: Path, side: int) -> Made:
    tensors = {WEIGHT: noise(side, side // 2, dtype=torch.float32)}
    step, world = folder / "kind" / "global_step7", 2
    step.mkdir(parents=True)
    (folder / "kind" / "latest").write_text("global_step7\n")
    shapes = [OrderedDict({WEIGHT: tensors[WEIGHT].shape})]
    model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {},
             "frozen_param_shapes": None, "frozen_param_fragments": None,
             "ds_version": "0.19.8"}  # fmt: skip
    torch.save(model, step / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(tensors[WEIGHT].reshape(world, -1)):
        state = {"zero_stage": 2, "partition_count": [world], "param_alignment_paddings": [[0]],
                 "single_partition_of_fp32_groups": [part.clone()]}  # fmt: skip
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": {}}, step / name)
    return completed(folder, folder / "kind", tensors)


FP8 = {"dtype": "bfloat16", "quantization_config": {
    "quant_method": "fp8", "weight_block_size": [128, 128]}}  # fmt: skip
INT4 = {"dtype": "bfloat16", "quantization_config": {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128,
            "symmetric": False}}}}}  # fmt: skip
MXFP4 = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
NVFP4 = {"dtype": "bfloat16", "quantization_config": {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "symmetric": True}}}}}  # fmt: skip
MLX = {"quantization": {"group_size": 64, "bits": 4}}


def raw(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    drawn = np.random.default_rng(2).integers(low, high, int(np.prod(shape)), np.uint8)
    return torch.from_numpy(drawn).reshape(shape)


def fp8(folder: Path, side: int) -> Made:
    codes = raw(side, side)
    codes[codes & 127 == 127] = 0
    scale = torch.rand(-(-side // 128), -(-side // 128)) * 0.01 + 1e-4
    tensors = {WEIGHT: codes.view(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": scale}
    return completed(folder, save(folder / "kind", tensors, config=FP8))


def int4(folder: Path, side: int) -> Made:
    tensors = {
        f"{WEIGHT}_packed": raw(side, side // 2).view(torch.int32),
        f"{WEIGHT}_scale": noise(side, side // 128),
        f"{WEIGHT}_zero_point": raw(side // 8, side // 128, 4).view(torch.int32)[:, :, 0],
        f"{WEIGHT}_shape": torch.tensor([side, side]),
    }
    return completed(folder, save(folder / "kind", tensors, config=INT4))


def mxfp4(folder: Path, side: int) -> Made:
    side //= 4
    tensors = {
        f"{FUSED}_blocks": raw(EXPERTS, side, side // 32, 16),
        f"{FUSED}_scales": raw(EXPERTS, side, side // 32, low=118, high=123),
    }
    return completed(folder, save(folder / "kind", tensors, config=MXFP4))


def apart(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return fused experts one by one, as qwen3_moe is saved."""
    stem = FUSED.removesuffix("gate_up_proj")
    return {
        f"{stem}{i}.{part}_proj.weight": half
        for i, both in enumerate(fused)
        for part, half in zip(("gate", "up"), both.chunk(2), strict=True)
    }


def one_by_one(folder: Path, side: int) -> Made:
    fused, config = noise(EXPERTS, side // 4, side // 4), {"model_type": "qwen3_moe"}
    kind = save(folder / "kind", apart(fused), config=config)
    return completed(folder, kind, {FUSED: fused}, config)


def fused_experts(folder: Path, side: int) -> Made:
    fused, config = noise(EXPERTS, side // 4, side // 4), {"model_type": "qwen3_moe"}
    kind = save(folder / "kind", {FUSED: fused}, config=config)
    return completed(folder, kind, apart(fused), config)


def turned_experts(folder: Path, side: int) -> Made:
    config = {"model_type": "qwen3_vl_moe"}
    name = FUSED.replace("model.", "model.language_model.")
    values = noise(EXPERTS, side // 2, side // 8)
    kind = save(folder / "kind", {name: values.transpose(1, 2)}, config=config)
    return completed(folder, kind, {name: values}, config)


def common_rows(folder: Path, side: int) -> Made:
    name, rows = "model.embed_tokens.weight", side - 64
    values = noise(side, side)
    kind = save(folder / "kind", {name: values})
    return completed(folder, kind, {name: values[:rows].clone()}, None, "--rows", "common")


def adapter_config(rank: int) -> dict:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "bias": "none",
            "target_modules": ["down_proj"], "fan_in_fan_out": False,
            "base_model_name_or_path": None}  # fmt: skip


def adapter(folder: Path, side: int) -> Made:
    rank = 64
    (folder / "kind").mkdir()
    factors = {"lora_A": noise(rank, side, dtype=torch.float32),
               "lora_B": noise(side, rank, dtype=torch.float32, seed=1)}  # fmt: skip
    stem = "base_model.model." + WEIGHT.removesuffix("weight")
    save(folder / "kind" / "adapter_model.safetensors",
         {f"{stem}{name}.weight": tensor for name, tensor in factors.items()})  # fmt: skip
    (folder / "kind" / "adapter_config.json").write_text(json.dumps(adapter_config(rank)))
    return completed(folder, folder / "kind", {WEIGHT: noise(side, side)})


KINDS: dict[str, Callable[[Path, int], Made]] = {
    made.__name__: made
    for made in (safetensors, safetensors_fp32, pickled, pickled_turned, distributed,
                 distributed_columns, ranks, zero2, zero3, fp8, int4, mxfp4, one_by_one,
                 fused_experts, turned_experts, common_rows, adapter)
}  # fmt: skip


# ----------------------------------------------------------------------- one block of a huge tensor


SIDE = 1 << 16  # 2^32 values, of which none takes room on the disk


def sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Source]:
    """Return the tensors of a file that is all hole, in the order in which they are written."""
    header = encode_header([(name, *rest) for name, rest in tensors.items()], {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(tensor_nbytes(*rest) for rest in tensors.values()))
    return read_header(os.fspath(path)).tensors


def huge(kind: str, folder: Path) -> Source:
    """Return a tensor of 2^32 values of a kind."""
    grid, expert = SIDE // 128, 1 << 13
    if kind in ("turned", "stacked"):
        shape = (64, expert, expert) if kind == "turned" else (SIDE, SIDE // 16)
        names = [str(i) for i in range(1 if kind == "turned" else 16)]
        sources = sparse(folder / "x.safetensors", dict.fromkeys(names, ("F32", shape)))
        views = [whole(source, shape) for source in sources.values()]
        view = views[0].transpose(1, 2) if kind == "turned" else concatenate(views, 1)
        return Viewed(WEIGHT, "F32", view)
    if kind.startswith("gguf"):
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K]
        raw = ("U8", (SIDE * SIDE // block * width,))
        (held,) = sparse(folder / "x.safetensors", {WEIGHT: raw}).values()
        assert isinstance(held, TensorSpec)
        number = int(gguf.GGMLQuantizationType.Q6_K)
        blocks = Blocks(WEIGHT, (SIDE, SIDE), held, number, block, width)
        view = unpermuted(blocks, SIDE // 128)
        return blocks if kind == "gguf" else Viewed(WEIGHT, "F32", view)
    if kind == "adapter":
        factors = {"lora_A": ("F32", (64, SIDE)), "lora_B": ("F32", (SIDE, 64))}
        names = {f"base_model.model.{WEIGHT[:-6]}{k}.weight": v for k, v in factors.items()}
        tensors = sparse(folder / "adapter_model.safetensors", names)
        return open_adapter("a", adapter_config(64), tensors, "a").deltas[WEIGHT]
    tensors, config = {
        "fp8": ({WEIGHT: ("F8_E4M3", (SIDE, SIDE)), f"{WEIGHT}_scale_inv": ("F32", (grid, grid))},
                FP8),
        "int4": ({f"{WEIGHT}_packed": ("I32", (SIDE, SIDE // 8)),
                  f"{WEIGHT}_scale": ("BF16", (SIDE, grid)),
                  f"{WEIGHT}_zero_point": ("I32", (SIDE // 8, grid)),
                  f"{WEIGHT}_shape": ("I64", (2,))}, INT4),
        "nvfp4": ({f"{WEIGHT}_packed": ("U8", (SIDE, SIDE // 2)),
                   f"{WEIGHT}_scale": ("F8_E4M3", (SIDE, SIDE // 16)),
                   f"{WEIGHT}_global_scale": ("F32", (1,))}, NVFP4),
        "mlx": ({WEIGHT: ("U32", (SIDE, SIDE // 8)),
                 WEIGHT.replace("weight", "scales"): ("BF16", (SIDE, SIDE // 64)),
                 WEIGHT.replace("weight", "biases"): ("BF16", (SIDE, SIDE // 64))}, MLX),
        "mxfp4": ({f"{FUSED}_blocks": ("U8", (64, expert, expert // 32, 16)),
                   f"{FUSED}_scales": ("U8", (64, expert, expert // 32))}, MXFP4),
    }[kind]  # fmt: skip
    sparse(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (source,) = open_checkpoint(folder).values()
    return source


@pytest.mark.parametrize(
    "kind",
    ["fp8", "int4", "mxfp4", "nvfp4", "mlx", "gguf", "gguf turned", "adapter", "turned", "stacked"],
)
def test_a_block_of_a_huge_tensor_takes_little_memory(kind: str, tmp_path: Path):
    source = huge(kind, tmp_path)
    assert source.numel == 1 << 32
    values_of(source, 0, 1)  # what is imported and kept once
    block, width = 1 << 20, STORAGE_DTYPE[source.dtype].itemsize
    tracemalloc.start()
    try:
        values = values_of(source, (1 << 31) + 12345, block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.size == block and (kind == "nvfp4" or not values.any())  # 0 divided by 0
    assert peak < 12 * 4 * block + width * block, f"{peak / 1e6:.0f} MB"


# ------------------------------------------------------------------------- runs that are large


CLIENT = 170.0  # MB: huggingface_hub, pieces of 10 MB of four downloads; the models take 300
GROWTH = 40.0  # MB; the tensors differ by 100 to 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_tensor(kind: str, tmp_path: Path):
    peaks = []
    for side in (4096, 8192):
        folder = tmp_path / str(side)
        folder.mkdir()
        made = KINDS[kind](folder, side)
        skill, again = folder / "plain.safetensors", folder / "kind.safetensors"
        watched("diff", made.plain, made.base, "-o", skill)
        diff = watched("diff", made.kind, made.base, "-o", again, *made.options)
        vector, target = (made.kind, made.base) if kind == "adapter" else (skill, made.kind)
        apply = watched("apply", target, vector, "-o", folder / "out", *made.options)
        peaks.append((diff.memory, apply.memory))
        if kind != "adapter":  # which has other values
            assert_same_bits(again, skill)
    for small, large in zip(*peaks, strict=True):
        assert large < small + GROWTH, peaks


@pytest.mark.slow
def test_extracting_holds_one_matrix_for_each_worker(tmp_path: Path):
    """Three copies of a matrix at most, of several; more only beside each other."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
              "intermediate_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 32,
              "vocab_size": 8, "tie_word_embeddings": False}  # fmt: skip
    tensors = {WEIGHT.replace(".0.", f".{i}."): noise(4096, 8192, seed=i) for i in range(3)}
    base = save(tmp_path / "base", tensors, config=config)
    tuned = save(tmp_path / "tuned", altered(tensors), config=config)
    skill, peaks = tmp_path / "v.safetensors", []
    watched("diff", tuned, base, "-o", skill)
    for only in ("*.0.*", "*"):
        words = "extract-lora", skill, "--rank", 16, "--include", only, "-o", tmp_path / f"a{only}"
        peaks.append(watched(*words, workers=None).memory)
    matrix = 4 * 4096 * 8192 / 1e6
    workers = min(3, len(os.sched_getaffinity(0)))
    assert peaks[0] < 250 + 3 * matrix
    assert peaks[1] < peaks[0] + (3 * (workers - 1) + 0.5) * matrix


# -------------------------------------------------------------------------------------- the Hub


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
def test_a_diff_from_the_hub_through_broken_connections(streamed: bool, tmp_path: Path):
    side, count = 3072, 8
    tensors = {WEIGHT.replace(".0.", f".{i}."): noise(side, side, seed=i) for i in range(count)}
    folders = {"sft": save(tmp_path / "sft", tensors, shards=count),
               "rl": save(tmp_path / "rl", altered(tensors), shards=count)}  # fmt: skip
    shard = 2 * side * side / 1e6
    local, away = tmp_path / "local.safetensors", tmp_path / "out" / "hub.safetensors"
    away.parent.mkdir()
    here = watched("diff", folders["rl"], folders["sft"], "-o", local)
    with HubServer() as server:
        for name, folder in folders.items():
            server.add_repo(f"org/{name}", folder)
        for repo in server.repos.values():
            for number, blob in enumerate(repo.objects):
                server.cut_after(blob, 6_000_000, times=3, reset=number % 2 == 0)
        words = "diff", "org/rl", "org/sft", "-o", away, *(["--stream"] if streamed else [])
        spent = watched(*words, env=server.environment(tmp_path), shards=away.parent)
        sent = sum(r.sent for r in server.requests if "/cdn/" in r.path) / 1e6
    assert_same_bits(away, local)
    assert spent.memory < here.memory + CLIENT
    # each byte once, but for headers and what was on its way when a connection broke
    assert 2 * count * shard <= sent < 2 * count * (shard + 3)
    cached = sum(file.stat().st_size for file in tmp_path.glob("hub/**/blobs/*")) / 1e6
    if streamed:
        assert shard < spent.disk < 2 * shard + 1
        assert cached < 1
    else:
        assert spent.disk == 0
        assert cached > 2 * count * shard
    assert [path.name for path in away.parent.iterdir()] == [away.name]
