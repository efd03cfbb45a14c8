"""A Llama-shaped bf16 model family for the benchmarks: base, sft, rl and target.

Hides the shapes, the HF folder layout and the arithmetic that makes related weights. Invariants:

- The bytes depend on the size and the numpy version only: every block of a tensor has its own
  generator, keyed by (seed, tensor, block), so threads and block order do not matter.
- Memory is bounded by the block: each thread holds one block of every member.
- `family.json` is written last, so a folder with the right one is whole and is used again.

The members imitate one history. Training keeps an fp32 master copy of the weights, and a
checkpoint is its rounding to bf16, so an update smaller than half a step still moves some values:

- base: N(0, .02), norm weights about 1
- sft: base plus a dense update of about one bf16 step, so most values change
- rl: sft plus an update calibrated to change 17 % of the values, or another share; norm weights
  untouched
- target: base plus another dense update

Needs numpy alone, so that it runs where torch does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

MEMBERS = ("base", "sft", "rl", "target")
SEED = 20_240_917
BLOCK = 1 << 18
WEIGHT_RMS = 0.02
DENSE_UPDATE_RMS = 1e-4
# With weights of rms .02, this rms makes 17 % of the rounded values change.
RL_UPDATE_RMS = 8.15e-6
NORM_RMS = 0.1


@dataclass(frozen=True)
class Size:
    """The shapes of one family; `shard_nbytes` is the most a shard may hold.

    `rl_update_rms` decides which share of the values rl changes.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    shard_nbytes: int
    rl_update_rms: float = RL_UPDATE_RMS
    experts: int = 0  # of each layer; without, it has one MLP


SIZES = {
    "big": Size(128_256, 2048, 16, 32, 8, 8192, 530_000_000),  # 1.24 billion values
    "middle": Size(32_064, 2048, 4, 32, 8, 8192, 530_000_000),  # .31 billion
    "small": Size(32_064, 1024, 8, 16, 4, 4096, 170_000_000),  # .15 billion
    "tiny": Size(512, 128, 8, 4, 4, 160, 530_000_000),  # 2 MB
    "many": Size(256, 64, 64, 4, 4, 32, 530_000_000, experts=102),  # 20,000 tensors of 2,048 values
}


@dataclass(frozen=True)
class Tensor:
    """One tensor: `index` is the generator's key, `start` its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    index: int
    start: int = 0

    @property
    def numel(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def is_norm(self) -> bool:
        """Whether the tensor is a norm weight."""
        return len(self.shape) == 1


def folder(size: str) -> Path:
    """Return where the family of `size` lives."""
    default = Path(tempfile.gettempdir()) / "skillvec-bench"
    return Path(os.environ.get("SKILLVEC_BENCH_DIR", default)) / size


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) in the order of a Llama state dict; the output head is tied."""
    hidden, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocab, hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        for place in [f".experts.{e}" for e in range(size.experts)] or [""]:
            yield f"{prefix}.mlp{place}.gate_proj.weight", (size.intermediate, hidden)
            yield f"{prefix}.mlp{place}.up_proj.weight", (size.intermediate, hidden)
            yield f"{prefix}.mlp{place}.down_proj.weight", (hidden, size.intermediate)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def shards(size: Size) -> list[tuple[bytes, list[Tensor], int]]:
    """Return (header, tensors, file nbytes) of every shard, filled in state-dict order."""
    groups: list[list[Tensor]] = [[]]
    room = size.shard_nbytes
    for index, (name, shape) in enumerate(shapes(size)):
        tensor = Tensor(name, shape, index)
        if groups[-1] and 2 * tensor.numel > room:
            groups.append([])
            room = size.shard_nbytes
        groups[-1].append(tensor)
        room -= 2 * tensor.numel
    return [lay_out(group) for group in groups]


def lay_out(tensors: list[Tensor]) -> tuple[bytes, list[Tensor], int]:
    """Return (header, placed tensors, file nbytes) of one file, sorted by name as writers do."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    ordered = sorted(tensors, key=lambda t: t.name)
    for t in ordered:
        end = begin + 2 * t.numel
        entries[t.name] = {"dtype": "BF16", "shape": t.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = []
    start = len(header)
    for t in ordered:
        placed.append(Tensor(t.name, t.shape, t.index, start))
        start += 2 * t.numel
    return header, placed, start


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to the nearest bf16, ties to even; returns uint16 bits."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def blocks(
    tensor: Tensor, block: int, numel: int, rl_update_rms: float = RL_UPDATE_RMS
) -> dict[str, np.ndarray]:
    """Return every member's uint16 bits for one block of `tensor`."""
    keys = np.random.SeedSequence([SEED, tensor.index, block])
    normal = np.random.Generator(np.random.SFC64(keys)).standard_normal
    master = normal(numel, np.float32)
    if tensor.is_norm:
        base = to_bf16(1 + NORM_RMS * master)
        return dict.fromkeys(MEMBERS, base)
    master *= np.float32(WEIGHT_RMS)
    sft = master + normal(numel, np.float32) * np.float32(DENSE_UPDATE_RMS)
    rl = sft + normal(numel, np.float32) * np.float32(rl_update_rms)
    target = master + normal(numel, np.float32) * np.float32(DENSE_UPDATE_RMS)
    return {name: to_bf16(v) for name, v in zip(MEMBERS, (master, sft, rl, target), strict=True)}


def write_shard(
    paths: dict[str, Path],
    header: bytes,
    tensors: list[Tensor],
    nbytes: int,
    rl_update_rms: float,
    pool: ThreadPoolExecutor,
) -> tuple[int, int, int]:
    """Write one shard of all members; returns (values, changed by sft, changed by rl)."""
    files = {name: os.open(path, os.O_CREAT | os.O_WRONLY, 0o644) for name, path in paths.items()}

    def fill(job: tuple[Tensor, int]) -> tuple[int, int, int]:
        tensor, block = job
        first = block * BLOCK
        bits = blocks(tensor, block, min(BLOCK, tensor.numel - first), rl_update_rms)
        for name, fd in files.items():
            os.pwrite(fd, bits[name].data, tensor.start + 2 * first)
        by_sft = np.count_nonzero(bits["sft"] != bits["base"])
        by_rl = np.count_nonzero(bits["rl"] != bits["sft"])
        return bits["base"].size, int(by_sft), int(by_rl)

    try:
        for fd in files.values():
            os.posix_fallocate(fd, 0, nbytes)
            os.pwrite(fd, header, 0)
        jobs = [(t, block) for t in tensors for block in range(-(-t.numel // BLOCK))]
        totals = [sum(column) for column in zip(*pool.map(fill, jobs), strict=True)]
    finally:
        for fd in files.values():
            os.close(fd)
    return totals[0], totals[1], totals[2]


def side_files(size: Size) -> dict[str, object]:
    """Return the JSON side files of a member by name."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1]},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }


def make(size: Size, root: Path) -> Path:
    """Return `root`, making the family there unless a whole one is there."""
    marker = root / "family.json"
    fields = asdict(size)
    updates = {"dense": DENSE_UPDATE_RMS, "rl": fields.pop("rl_update_rms"), "norm": NORM_RMS}
    if not size.experts:
        del fields["experts"]
    recipe = {"seed": SEED, "block": BLOCK, "numpy": np.__version__, **fields, **updates}
    if marker.exists() and json.loads(marker.read_text())["recipe"] == recipe:
        return root
    shutil.rmtree(root, ignore_errors=True)
    for member in MEMBERS:
        (root / member).mkdir(parents=True)
    plan = shards(size)
    weight_map: dict[str, str] = {}
    counts = [0, 0, 0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (header, tensors, nbytes) in enumerate(plan, 1):
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            weight_map |= {t.name: file for t in tensors}
            paths = {member: root / member / file for member in MEMBERS}
            written = write_shard(paths, header, tensors, nbytes, size.rl_update_rms, pool)
            counts = [a + b for a, b in zip(counts, written, strict=True)]
    index = {
        "metadata": {"total_size": 2 * counts[0]},
        "weight_map": dict(sorted(weight_map.items())),
    }
    for file, content in (side_files(size) | {"model.safetensors.index.json": index}).items():
        for member in MEMBERS:
            (root / member / file).write_text(json.dumps(content, indent=2) + "\n")
    share = {"sft": counts[1] / counts[0], "rl": counts[2] / counts[0]}
    summary = {"recipe": recipe, "parameters": counts[0], "changed_share": share}
    summary["tensors"] = sum(len(tensors) for _, tensors, _ in plan)
    marker.write_text(json.dumps(summary, indent=2) + "\n")
    return root


def main() -> None:
    """Make the families named on the command line; prints their folders."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "sizes", nargs="*", default=list(SIZES), metavar="SIZE", help=", ".join(SIZES)
    )
    for name in parser.parse_args().sizes:
        began = time.perf_counter()
        root = make(SIZES[name], folder(name))
        summary = json.loads((root / "family.json").read_text())
        share = ", ".join(f"{k} {v:.1%} changed" for k, v in summary["changed_share"].items())
        seconds = time.perf_counter() - began
        print(f"{summary['parameters']:,} parameters, {share} ({seconds:.1f} s)", file=sys.stderr)
        print(root)


if __name__ == "__main__":
    main()
