"""A second reader of vector files, from docs/format.md alone: numpy, safetensors and zstandard."""

import json
from pathlib import Path

import numpy as np
import zstandard
from safetensors import deserialize, safe_open

BLOCK, NONE = 1048576, np.zeros(0, np.uint8)
SUFFIX = {"sparse": ".values", "packed": ".packed", "factors": ".factors"}
FLOAT = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # BF16 as its bit patterns
RECORDS = {"skillvec.exceptions": "<u4,<f4", "skillvec.replacements": "<u4,<u8"}


def decode(codec, payload, bitmap, out):
    """Write one block's values, all zero until now, from its bytes."""

    def expanded(piece, nbytes):
        assert piece.size == nbytes or zstandard.frame_content_size(piece) == nbytes
        return piece if piece.size == nbytes else np.frombuffer(zstandard.decompress(piece), "u1")

    if codec == "packed" and payload.size not in (0, out.nbytes):
        width, ranked = out.itemsize, payload[3] > 127
        begin, end = (4, 20) if ranked else (0, 4 + 4 * width)
        ends = np.cumsum([end, *payload[begin:end].view("<u4")])
        bitmap, *planes = np.split(payload, ends)[1:-1]
        bitmap = expanded(bitmap, -(-out.size // 8)) if bitmap.size else NONE
        count = np.unpackbits(bitmap).sum() if bitmap.size else out.size
        if ranked:
            ranks, size = expanded(planes.pop(0), count), payload[0]
            count = size + (ranks == 255).sum()
        turned = np.stack([expanded(p, count) for p in planes], 1).ravel().view(f"<u{width}")
        payload = turned >> 1 | turned << (8 * width - 1)
        if ranked:
            table, escapes = np.split(payload, [size])
            assert (table[1:] > table[:-1]).all() and (ranks[ranks < 255] < size).all()
            payload = np.append(table, np.zeros(256, "<u2"))[ranks]
            payload[ranks == 255] = escapes
    if payload.size:
        marks = np.unpackbits(bitmap, bitorder="little") if bitmap.size else np.ones(out.size)
        out[np.flatnonzero(marks)] = payload.view(out.dtype)  # raises where counts differ


def multiplied(stack, shape, rank):
    """Return the product of the factors of matrices."""
    m, n = shape[-2:]
    sides = np.split(stack.astype("f8").reshape(-1, rank * (m + n)), [rank * m], axis=1)
    left, right = sides[0].reshape(-1, m, rank), sides[1].reshape(-1, n, rank)
    total = np.zeros((len(left), m, n))
    for c in range(rank):
        total += left[:, :, c, None] * right[:, None, :, c]
    return (total.astype("<f4") + np.float32(0)).reshape(shape)


def read_vector(path):
    """Return the manifest, and name -> exact delta, positions and bits of its replacements."""
    index, files, deltas = Path(path, "vector.safetensors.index.json"), [Path(path)], {}
    if index.exists():
        files, said = sorted(index.parent.glob("*.safetensors")), json.loads(index.read_bytes())
    said = said["metadata"] if index.exists() else safe_open(path, "np").metadata()
    files = [dict(deserialize(file.read_bytes())) for file in files]
    for name, entry in json.loads(said["skillvec"])["tensors"].items():
        stored, first = name + SUFFIX.get(entry["codec"], ""), entry["block"]
        held = next((file for file in files if stored in file), {})
        held = {tensor: np.frombuffer(t["data"], "u1") for tensor, t in held.items()}
        shape, rank = entry["shape"], entry.get("rank")
        count = np.prod(shape[:-2], dtype=int) * rank * sum(shape[-2:]) if rank else shape
        found, raw = [], np.zeros(count, FLOAT[entry["dtype"]]).ravel()
        rows = held.get("skillvec.blocks", NONE).view("<u4").reshape(-1, 3)
        own = rows[first:][: -(-raw.size // BLOCK)]
        bitmap = held[f"{name}.bitmap"] if entry["codec"] == "sparse" else NONE
        pieces = np.split(held.get(stored, NONE), np.cumsum(own[:, 0]))
        for at, piece in zip(range(0, BLOCK * len(own), BLOCK), pieces, strict=False):
            codec = "packed" if rank else entry["codec"]
            decode(codec, piece, bitmap[at // 8 :][: BLOCK // 8], raw[at : at + BLOCK])
        wide = (raw.astype("<u4") << 16).view("<f4") if raw.dtype == "<u2" else raw * np.float32(1)
        for column, kind in enumerate(RECORDS, 1):
            records = held.get(kind, NONE).view(RECORDS[kind])[rows[:first, column].sum() :]
            block = np.repeat(np.arange(len(own)), own[:, column])
            found += [BLOCK * block + records["f0"][: block.size], records["f1"][: block.size]]
        wide[found[0]] = found[1]
        wide = multiplied(wide, shape, rank) if rank else wide.reshape(shape)
        deltas[name] = wide, *found[2:]
    return json.loads(said["skillvec"]), deltas
