"""GGUF files: a model of llama.cpp, read under the names of transformers.

Hides the `gguf` package, which dequantises blocks and knows what llama.cpp calls a tensor; and what
its converter did to the values: rows of q and k in another order (llama), 1 added to norms (gemma,
nemotron), experts stacked. The values are those of transformers' from_pretrained(gguf_file=...),
bit for bit: floats stay as they are stored, blocks become F32. The names are those of transformers'
model class, made of what the header says of sizes; each of its weights has to be there, in its
shape, and every tensor has to be used. Architectures that are not in ARCHITECTURES are refused by
name, because nobody can tell from a file what its converter reordered.

Never written. Nothing is held whole: blocks are dequantised as they are read, up to 2^20 values at
a time.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

from skillvec.checkpoints.folder import GGUF, SINGLE
from skillvec.checkpoints.gguf_header import MAGIC, BrokenError, GgufHeader, read_gguf_header
from skillvec.checkpoints.model_classes import model_of
from skillvec.checkpoints.opened import Found, Opened
from skillvec.errors import FormatError, IncompatibleError, UsageError, needs, printable, up_to_five
from skillvec.files.file import file_nbytes, read_bytes, remote_of
from skillvec.files.fingerprints import witness
from skillvec.files.header import TensorSpec, tensor_nbytes
from skillvec.files.tensors import Derived, Source, Viewed, read_values, values_of
from skillvec.files.views import Box, Index, View, concatenate, whole
from skillvec.ops.kernels import Array, widen

TILE = 1 << 20  # values dequantised at a time
PLAIN = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")  # called so here as well
# what llama.cpp calls an architecture, and transformers a model type
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3",
    "starcoder2": "starcoder2", "nemotron": "nemotron",
}  # fmt: skip
NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
# keys of a header that decide about shapes, and what transformers' configs call them; the last of
# two for one counts
SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
SIZES_OF = {
    "llama": {"rope.dimension_count": "head_dim"} | SIZES
}  # elsewhere a part of it may turn
# made of the config when a model is loaded: how positions turn
COMPUTED = re.compile(r"rope_(freqs|factors_(long|short))\.weight|blk\.\d+\.attn_rot_embd\.weight")
INSTEAD = (
    "diff and apply the safetensors that it was made from, then convert the result (llama.cpp:"
    " convert_hf_to_gguf.py)"
)


@dataclass(frozen=True)
class Blocks(Derived):
    """A tensor of GGUF blocks, dequantised by the gguf package when it is read.

    `raw` are its bytes; a block of `block` values takes `nbytes_of_block` of them. `kind` is the
    number of a GGMLQuantizationType.
    """

    name: str
    shape: Index
    raw: TensorSpec
    kind: int
    block: int
    nbytes_of_block: int
    dtype: str = "F32"

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.raw,)

    def read(self, begin: int, out: Array) -> None:
        quants, kind = _gguf().quants, _gguf().GGMLQuantizationType(self.kind)
        at = 0
        while at < out.size:
            first = (begin + at) // self.block
            skipped = begin + at - first * self.block
            count = min(out.size - at, TILE)
            last = -(-(begin + at + count) // self.block)
            held = np.empty((last - first) * self.nbytes_of_block, np.uint8)
            read_values(self.raw, first * self.nbytes_of_block, held)
            # one row: the package takes rows in groups of 16, one after the other
            with np.errstate(all="ignore"):
                values = quants.dequantize(held.reshape(1, -1), kind).reshape(-1)
            out[at : at + count] = values[skipped : skipped + count]
            at += count


@dataclass(frozen=True)
class LessOne(Derived):
    """A norm to which llama.cpp added 1, without it again, in fp32."""

    name: str
    source: Source
    dtype: str = "F32"

    @property
    def shape(self) -> Index:  # type: ignore[override]
        return self.source.shape

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.source,)

    def read(self, begin: int, out: Array) -> None:
        out[:] = widen(values_of(self.source, begin, out.size), self.source.dtype) - np.float32(1)


def open_gguf(found: Found) -> Opened:
    """Return the model in a GGUF file, or in the one of a folder. Reads the header only.

    Imports gguf, torch and transformers. Raises IncompatibleError for what is not taken,
    FormatError for a file that is broken; UsageError where there are several, and where a package
    is missing.
    """
    names = found.names if found.is_file else found.ending(GGUF)
    if len(names) > 1:
        several = f"no {SINGLE}; name the GGUF that is meant:\n{up_to_five(names)}"
        raise UsageError(f"{found.what}: {several}")
    address = found.files[names[0]]
    what = found.what if found.is_file else f"{found.what}: {names[0]}"
    remote = remote_of(address)
    if remote is not None and remote.local is None:
        raise IncompatibleError(f"{what}: a GGUF file that is not on this disk: download it first")
    witness(address)
    begin = read_bytes(address, 0, 4)
    if begin != MAGIC:
        raise IncompatibleError(
            f"{what}: no GGUF, although its name says so: it begins with {begin!r}; {INSTEAD}"
        )
    with needs("gguf", f"{what}: reading GGUF"):
        for package in ("gguf", "torch", "transformers"):
            import_module(package)
    try:
        header = read_gguf_header(address)
        stored = _sources(address, header)
    except BrokenError as error:
        raise FormatError(f"{what}: {error}: copy or download it again, whole") from None
    return _named(stored, header, what)


def _gguf() -> Any:
    return import_module("gguf")


# ---------------------------------------------------------------------------------------- tensors


def _sources(address: str, header: GgufHeader) -> dict[str, Source]:
    """Return the tensors under their own names; those of unknown types are refused."""
    gguf, nbytes = _gguf(), file_nbytes(address)
    alignment = header.said.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise BrokenError(f"general.alignment {alignment!r:.40}")
    start = -(-header.nbytes // alignment) * alignment
    found: dict[str, Source] = {}
    ends: list[tuple[int, int, str]] = []
    for name, (kind, shape, offset) in header.tensors.items():
        source = _source(gguf, name, kind, shape, address, start + offset)
        raw = source if isinstance(source, TensorSpec) else source.raw
        if raw.start + raw.nbytes > nbytes:
            raise BrokenError(f"the tensor {printable(name):.200} ends behind the end of the file")
        ends.append((raw.start, raw.start + raw.nbytes, name))
        found[name] = source
    ends.sort()
    for (_, end, one), (begin, _, other) in pairwise(ends):
        if begin < end:
            both = f"{printable(one):.200} and {printable(other):.200}"
            raise BrokenError(f"the tensors {both} overlap")
    return found


def _source(
    gguf: Any, name: str, kind: int, shape: Index, address: str, start: int
) -> TensorSpec | Blocks:
    try:
        form = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise BrokenError(f"the tensor {printable(name):.200} is of unknown type {kind}") from None
    if form.name in PLAIN:
        return TensorSpec(name, form.name, shape, address, start, tensor_nbytes(form.name, shape))
    block, width = gguf.GGML_QUANT_SIZES[form]
    if shape[-1] % block:
        raise BrokenError(f"{printable(name):.200} {list(shape)}: no rows of blocks of {block}")
    nbytes = math.prod(shape) // block * width
    raw = TensorSpec(name, "U8", (nbytes,), address, start, nbytes)
    return Blocks(name, shape, raw, kind, block, width)


# ------------------------------------------------------------------------------------------ names


def _config(header: GgufHeader, stored: Mapping[str, Source], arch: str) -> dict[str, Any]:
    """Return what decides about names and shapes in transformers, of what the header says."""
    config: dict[str, Any] = {
        key: header.said[f"{arch}.{said}"]
        for said, key in SIZES_OF.get(arch, SIZES).items()
        if f"{arch}.{said}" in header.said
    }
    config |= {
        "model_type": ARCHITECTURES[arch],
        "tie_word_embeddings": "output.weight" not in stored,
    }
    config["pad_token_id"] = None  # some classes have one that small vocabularies have not
    if "token_embd.weight" in stored:
        config["vocab_size"] = stored["token_embd.weight"].shape[0]
    return config


def _named(stored: dict[str, Source], header: GgufHeader, what: str) -> Opened:
    """Return the tensors as transformers' model has them; errors as of `open_gguf`."""
    arch = header.said.get("general.architecture")
    if header.said.get("split.count") not in (None, 0, 1):
        raise IncompatibleError(
            f"{what}: one of {header.said['split.count']} parts: put them together first"
            " (llama-gguf-split --merge)"
        )
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise IncompatibleError(
            f"{what}: GGUF of the architecture {str(arch)[:40]!r}, of which it is not known what"
            f" llama.cpp reordered; expected one of {', '.join(ARCHITECTURES)}: {INSTEAD}"
        )
    _refuse_types(stored, what)
    config = _config(header, stored, arch)
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 <= layers <= len(stored):  # classes make lists as long
        raise FormatError(f"{what}: {len(stored)} tensors, {arch}.block_count {str(layers)[:40]}")
    try:
        model = model_of(config, len(stored))
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        tied = set(model.all_tied_weights_keys)
    except Exception as error:  # whatever a model's code raises on sizes that make no sense
        raise FormatError(
            f"{what}: transformers makes no {ARCHITECTURES[arch]} of its header: {error!r:.300}"
        ) from None
    made, used = _matched(stored, shapes, arch, layers, header.said)
    kind = ARCHITECTURES[arch]
    lines = [f"{name}: not in the file" for name in shapes if name not in made and name not in tied]
    lines += [
        f"{printable(name)}: a tensor that it has not"
        for name in stored
        if name not in used and not COMPUTED.fullmatch(name)
    ]
    lines += [
        f"{name}: found {list(source.shape)}, expected {list(shapes[name])}"
        for name, source in made.items()
        if source.shape != shapes[name]
    ]
    if lines:
        raise IncompatibleError(
            f"{what}: its tensors are not those of transformers' {kind}; {INSTEAD}:\n"
            f"{up_to_five(lines)}"
        )
    formats = {name: form for name, source in made.items() if (form := _stored_as(source))}
    formats |= {name: "not a weight: how positions turn" for name in stored if name not in used}
    return Opened(made, format="GGUF", formats=formats)


def _refuse_types(stored: Mapping[str, Source], what: str) -> None:
    """Refuse blocks that the installed gguf package does not dequantise."""
    gguf, refused = _gguf(), dict[int, str]()
    for source in stored.values():
        if isinstance(source, Blocks) and source.kind not in refused:
            kind = gguf.GGMLQuantizationType(source.kind)
            try:
                gguf.dequantize(np.zeros((1, source.nbytes_of_block), np.uint8), kind)
                refused[source.kind] = ""
            except NotImplementedError:
                refused[source.kind] = f"{printable(source.name)}: {kind.name}"
    lines = [line for line in refused.values() if line]
    if lines:
        raise IncompatibleError(
            f"{what}: blocks that the gguf package does not dequantise: {INSTEAD}:\n"
            + up_to_five(lines)
        )


def _stored_as(source: Source) -> str:
    """Return how a tensor is stored, nothing where its values are."""
    if isinstance(source, Blocks):
        return str(_gguf().GGMLQuantizationType(source.kind).name)
    if isinstance(source, LessOne):
        return "norm + 1"
    parts = source.parts if isinstance(source, Viewed) else ()
    return ", ".join(dict.fromkeys(form for part in parts if (form := _stored_as(part))))


def _matched(
    stored: Mapping[str, Source], shapes: Mapping[str, Index], arch: str, layers: int,
    said: Mapping[str, Any],
) -> tuple[dict[str, Source], set[str]]:  # fmt: skip
    """Return transformers' weights of those in the file, and the names of those that they take."""
    gguf = _gguf()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, layers)
    made: dict[str, Source] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        parts = [part for part in _parts(name, names) if part in stored]
        used.update(parts)
        if parts and (len(parts) == 2) == name.endswith(".gate_up_proj"):
            made[name] = _undone(name, [stored[part] for part in parts], arch, shape, said)
    return made, used


def _parts(name: str, names: Any) -> Iterator[str]:
    """Yield what llama.cpp calls a weight, or the two halves of one, where it has a name for it."""
    stem, _, last = name.rpartition(".")
    if name.endswith(".experts.gate_up_proj"):
        stems, last = [f"{stem}.gate_proj", f"{stem}.up_proj"], "weight"
    else:
        stems, last = ([stem], last) if last in ("weight", "bias") else ([name], "weight")
    for given in map(names.get_name, stems):
        if given is not None:
            yield f"{given}.{last}"


def _undone(
    name: str, parts: list[Source], arch: str, shape: Index, said: Mapping[str, Any]
) -> Source:
    """Return a weight as transformers has it, of one or two in the file."""
    own, dtype = parts[0].name, parts[0].dtype
    if len(parts) == 2:
        if parts[1].dtype != dtype or len({part.shape for part in parts}) > 1:
            return parts[0]  # of another shape than the whole, so that it is refused
        return Viewed(name, dtype, concatenate([whole(part, part.shape) for part in parts], 1))
    if arch in NORMS_PLUS_ONE and own.endswith("norm.weight"):
        return LessOne(name, parts[0])
    if arch == "llama" and ".attn_q." in own:
        return Viewed(name, dtype, unpermuted(parts[0], said.get("llama.attention.head_count")))
    if arch == "llama" and ".attn_k." in own:
        heads = said.get("llama.attention.head_count_kv", said.get("llama.attention.head_count"))
        return Viewed(name, dtype, unpermuted(parts[0], heads))
    if shape == (1, *parts[0].shape):
        return Viewed(name, dtype, whole(parts[0], parts[0].shape).unsqueeze())
    if isinstance(parts[0], TensorSpec):
        return parts[0]._replace(name=name)
    assert isinstance(parts[0], Blocks)
    return replace(parts[0], name=name)


def unpermuted(source: Source, heads: Any) -> View:
    """Return q or k with the halves of each head one after the other, which llama.cpp interleaves.

    What no heads divide gives a view of another shape, which is refused.
    """
    rows, cols = source.shape[0], math.prod(source.shape[1:])
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        return View((), ())
    half, rest = rows // heads // 2, source.shape[1:]
    boxes = [
        Box(
            ((2 * head + part) * half, *(0 for _ in rest)), (half, *rest), source,
            (2 * half * head + part) * cols, (2 * cols, *(1 for _ in rest)),
        )
        for head in range(heads)
        for part in (0, 1)
    ]  # fmt: skip
    return View(source.shape, tuple(boxes))
