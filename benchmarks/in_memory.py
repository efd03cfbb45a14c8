"""Encode and decode a stored dense bf16 delta in memory on one thread; print bytes and seconds.

Hides how each codec is called. Invariants: a tensor at a time, from its raw bf16 bits and back to
them; the input is in memory and the code has run once before the clock starts; what comes back is
compared bit for bit, and a difference is a RuntimeError. No file is written.

density.py starts it once a round for each codec, so that every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from check import tensors

BLOCK_NUMEL = 1 << 20  # skillvec's, docs/format.md


class Codec(NamedTuple):
    """Functions: uint16 bits to what is stored, that and the numel back to bits, its bytes."""

    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any, int], Any]
    nbytes: Callable[[Any], int] = len


def skillvec(name: str) -> Codec:
    """Return skillvec's own functions, block by block as its engine calls them."""
    from skillvec.ops.codecs import decode_block, encode_block

    def encode(bits: np.ndarray) -> list[Any]:
        blocks = range(0, bits.size, BLOCK_NUMEL)
        return [encode_block(bits[at : at + BLOCK_NUMEL], name) for at in blocks]

    def decode(blocks: list[Any], numel: int) -> np.ndarray:
        out = np.empty(numel, np.uint16)
        for number, block in enumerate(blocks):
            first = number * BLOCK_NUMEL
            decode_block(block, name, out[first : first + BLOCK_NUMEL])
        return out

    return Codec(encode, decode, lambda blocks: sum(b.payload.size + b.bitmap.size for b in blocks))


def zipnn() -> Codec:
    """Return zipnn with its default choice of method for bf16 bytes."""
    from zipnn import ZipNN

    codec = ZipNN(bytearray_dtype="bfloat16", threads=1)
    return Codec(
        lambda bits: codec.compress(bits.view(np.uint8).data),
        lambda blob, _: codec.decompress(blob),
    )


def zstd(level: int) -> Codec:
    """Return zstd over the values as they lie."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=level)
    decompressor = zstandard.ZstdDecompressor()
    return Codec(compressor.compress, lambda blob, _: decompressor.decompress(blob))


def indexed() -> Codec:
    """Return int32 indices and the values there, as a safetensors file in memory."""
    from safetensors.numpy import load, save

    def encode(bits: np.ndarray) -> bytes:
        at = np.flatnonzero(bits)
        return save({"x.indices": at.astype(np.int32), "x.values": bits[at]})

    def decode(blob: bytes, numel: int) -> np.ndarray:
        found = load(blob)
        out = np.zeros(numel, np.uint16)
        out[found["x.indices"]] = found["x.values"]
        return out

    return Codec(encode, decode)


CODECS: dict[str, Callable[[], Codec]] = {
    "sparse": lambda: skillvec("sparse"),
    "packed": lambda: skillvec("packed"),
    "zipnn": zipnn,
    "zstd-1": lambda: zstd(1),
    "zstd-3": lambda: zstd(3),
    "int32 + values": indexed,
}


def measure(codec: Codec, deltas: list[np.ndarray]) -> dict[str, float]:
    """Return bytes and seconds of encoding and decoding every tensor."""
    sample = deltas[0][:BLOCK_NUMEL].copy()
    codec.decode(codec.encode(sample), sample.size)
    # zipnn turns the bits of its input in place
    inputs = [bits.copy() for bits in deltas]
    began = time.perf_counter()
    stored = [codec.encode(bits) for bits in inputs]
    encoded = time.perf_counter()
    decoded = [codec.decode(s, bits.size) for s, bits in zip(stored, inputs, strict=True)]
    ended = time.perf_counter()
    for bits, back in zip(deltas, decoded, strict=True):
        if not np.array_equal(np.frombuffer(back, np.uint16), bits):
            raise RuntimeError("what was decoded is not what was encoded")
    nbytes = sum(map(codec.nbytes, stored))
    return {"nbytes": nbytes, "encode": encoded - began, "decode": ended - encoded}


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("codec", choices=CODECS)
    parser.add_argument("delta", type=Path, help="a vector file in the dense codec")
    given = parser.parse_args()
    deltas = [
        np.frombuffer(os.pread(fd, 2 * numel, start), np.uint16)
        for fd, start, numel in tensors(given.delta).values()
    ]
    print(json.dumps(measure(CODECS[given.codec](), deltas)))


if __name__ == "__main__":
    main()
