"""Copies in bf16 of fp32 models, and stand-ins for trained ones, for real.py.

Hides how the folders are written. Invariants: numpy only; one block in memory; every other file of
a folder is copied, and `config.json` says the dtype of the copy. The bytes of a stand-in depend on
those of its base and on the numpy version only.

    real_models.py bf16 FOLDER OUT        the weights of FOLDER, rounded to bf16
    real_models.py stand-in BASE OUT      OUT/tuned, OUT/base and OUT/target, for a trained triple

A stand-in imitates one history, with the sizes that family.py takes: base is BASE plus a dense
update as of supervised training, tuned is that plus an update of its fp32 weights so small that one
bf16 value in six changes, as of reinforcement learning, and target is BASE plus another dense
update. Norms stay as they are.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from family import BLOCK, DENSE_UPDATE_RMS, RL_UPDATE_RMS, SEED, to_bf16

INDEX = "model.safetensors.index.json"
Change = Callable[[str, int, np.ndarray], np.ndarray]  # name, block, its values


def rewrite(source: Path, out: Path, change: Change, dtype: str = "F32") -> None:
    """Write the model of `source` with each block changed; the file of an fp32 model is checked."""
    out.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            rewrite_file(path, out / path.name, change, dtype)
        elif path.is_file():
            shutil.copy2(path, out / path.name)
    if dtype == "BF16":
        config = json.loads((out / "config.json").read_text())
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        (out / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "bfloat16")))
        if (out / INDEX).exists():
            index = json.loads((out / INDEX).read_text())
            index["metadata"] = {"total_size": index["metadata"]["total_size"] // 2}
            (out / INDEX).write_text(json.dumps(index))


def rewrite_file(source: Path, out: Path, change: Change, dtype: str) -> None:
    """Write one file; raises ValueError for tensors that are not fp32."""
    with source.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        other = [name for name, entry in entries.items() if entry["dtype"] != "F32"]
        if other:
            raise ValueError(f"{source}: {other[0]} is {entries[other[0]]['dtype']}; expected F32")
        part = 1 if dtype == "F32" else 2
        for entry in entries.values():
            entry["dtype"] = dtype
            entry["data_offsets"] = [at // part for at in entry["data_offsets"]]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with out.open("wb") as made:
            made.write(struct.pack("<Q", len(text)) + text)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                numel = int(np.prod(entry["shape"]))
                for first in range(0, numel, BLOCK):
                    count = min(BLOCK, numel - first)
                    values = np.frombuffer(file.read(4 * count), "<f4", count)
                    made.write(change(name, first // BLOCK, values).tobytes())


def update(member: str, rms: float) -> Change:
    """Return what adds a normal update of this size to every matrix."""

    def add(name: str, block: int, values: np.ndarray) -> np.ndarray:
        if name.endswith("norm.weight"):
            return values
        keys = np.random.SeedSequence([SEED, block, *f"{member} {name}".encode()])
        normal = np.random.Generator(np.random.SFC64(keys)).standard_normal
        moved: np.ndarray = values + normal(values.size, np.float32) * np.float32(rms)
        return moved

    return add


def stand_in(start: Path, out: Path) -> None:
    """Write a triple of stand-ins; a folder that is whole, as `made` tells, is left alone."""
    recipe = f"{start.resolve()} {(start / 'config.json').stat().st_mtime_ns} {np.__version__}"
    if (out / "made").exists() and (out / "made").read_text() == recipe:
        return
    shutil.rmtree(out, ignore_errors=True)
    rewrite(start, out / "base", update("base", DENSE_UPDATE_RMS))
    rewrite(out / "base", out / "tuned", update("tuned", RL_UPDATE_RMS))
    rewrite(start, out / "target", update("target", DENSE_UPDATE_RMS))
    (out / "made").write_text(recipe)


def main(verb: str, source: str, out: str) -> None:
    """Make what the command line asks for."""
    if verb == "bf16":
        rewrite(Path(source), Path(out), lambda _name, _block, values: to_bf16(values), "BF16")
    else:
        stand_in(Path(source), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
