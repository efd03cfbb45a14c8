"""What is fed to skillvec by the tests of hostile files and by their long run (fuzz.py).

A `Target` is one function from bytes to whether they were taken. It may raise SkillvecError (they
were refused) and nothing else. Seeds are valid files made with skillvec or with the official
libraries. A vector's digests are put right after the harm, as a forger would.
"""

import contextlib
import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from families import perturbed, save, toy
from harm import (
    SECONDS,
    Pairs,
    Tensors,
    guarded,
    harm_archive,
    harm_bytes,
    harm_file,
    harm_in_place,
    harm_json,
    harm_pickle,
    harm_tensors,
    harm_text,
    join,
    json_text,
    split,
)
from xxhash import xxh3_128

import skillvec
from skillvec.checkpoints import layouts, patch
from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import open_checkpoint, open_tensors
from skillvec.checkpoints.patch_effect import touched_by
from skillvec.checkpoints.pickles import load_pickle
from skillvec.errors import SkillvecError
from skillvec.files.file import digest_bytes, forget_open_files
from skillvec.files.header import read_header, tensor_nbytes
from skillvec.files.tensors import read_values, values_of
from skillvec.ops import codecs
from skillvec.ops.block import BLOCK_NUMEL, block_count
from skillvec.ops.kernels import STORAGE_DTYPE
from skillvec.vectors import provenance
from skillvec.vectors.manifest import manifest_digest
from skillvec.vectors.reader import BLOCKS, PARTS, BlockReader, find_vector
from skillvec.vectors.recipe import read_recipe, resolve
from skillvec.vectors.vector import SkillVector
from skillvec.verbs import card_file, cards


class Target:
    """A kind of bytes: valid `seeds`, how they are harmed, and what reads them.

    `run` returns whether bytes were taken; with `deep` it goes on to the verbs where they were.
    """

    looks = True  # whether opens are watched; a recipe names files that verify must open

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.seeds = self.make()

    def make(self) -> list[bytes]:
        """Make what stands around the bytes; return valid ones."""
        raise NotImplementedError

    def harm(self, rng: Random, data: bytes) -> bytes:
        raise NotImplementedError

    def run(self, data: bytes, deep: bool = False) -> bool:
        raise NotImplementedError

    def once(self, data: bytes, deep: bool = False, seconds: float = SECONDS) -> bool:
        """Run one case: True if taken, False if refused; what else is raised is a finding."""
        try:
            with guarded(self.folder, seconds, self.looks):
                return self.run(data, deep)
        except SkillvecError as error:
            assert 0 < len(str(error)) < 20_000, "an error that quotes the file at length"
            return False

    def fresh(self) -> Path:
        """Return a path that no case before had."""
        self.count += 1
        return self.folder / f"out{self.count}"


def read_all(model: Checkpoint) -> None:
    """Read the ends of every tensor that arithmetic can be done with."""
    for source in model.values():
        if source.dtype in STORAGE_DTYPE:
            numel = source.numel
            for begin in {0, max(0, numel - 64)}:
                read_values(source, begin, np.empty(min(64, numel), STORAGE_DTYPE[source.dtype]))


def confirmed(path: Path, **given: Any) -> None:
    """Verify what was just written; a result that does not hold is a finding, no refusal."""
    try:
        skillvec.verify(path, **given)
    except SkillvecError as error:
        raise AssertionError(f"verify does not confirm it: {error}") from error


def used(model: Path, base: Path, output: Path) -> None:
    """Do with a model what a user does; what was written must be what verify finds."""
    skillvec.inspect(model)
    skillvec.diff(model, base, output.with_suffix(".safetensors"))
    confirmed(output.with_suffix(".safetensors"), tuned=model, base=base)
    skillvec.apply(model, output.with_suffix(".safetensors"), output, lam=0.5)
    confirmed(output)


def removed(*paths: Path) -> None:
    forget_open_files()
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class HeaderTarget(Target):
    """A safetensors file as a model: the header, then diff, apply and verify."""

    def make(self) -> list[bytes]:
        tensors = toy(0, layers=1, width=8, vocabulary=10)
        self.base = save(self.folder / "base", tensors)
        tuned = perturbed(tensors, 1)
        self.model = save(self.folder / "model", tuned)
        mixed = {
            "a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.int64),
            "c": torch.zeros(0, 4), "d": torch.ones(9, dtype=torch.bool),
            "e": torch.ones(3, dtype=torch.float64),
        }  # fmt: skip
        other = save(self.folder / "mixed.safetensors", mixed)
        return [(self.model / "model.safetensors").read_bytes(), other.read_bytes()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_file(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        path = self.model / "model.safetensors"
        path.write_bytes(data)
        header = read_header(path)
        at = header.data_start
        for name, spec in header.tensors.items():
            assert (spec.name, spec.start) == (name, at)
            assert spec.nbytes == tensor_nbytes(spec.dtype, spec.shape)
            at += spec.nbytes
        assert at == len(data), "tensors do not end where the file does"
        read_all(open_checkpoint(self.model))
        if deep:
            output = self.fresh()
            try:
                used(self.model, self.base, output)
            finally:
                removed(output, output.with_suffix(".safetensors"))
        return True


class IndexTarget(Target):
    """model.safetensors.index.json over three valid shards, pickled shards and a config."""

    def make(self) -> list[bytes]:
        self.model = save(self.folder / "model", toy(0, layers=1, width=8, vocabulary=10), shards=3)
        return [(self.model / "model.safetensors.index.json").read_bytes()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        (self.model / "model.safetensors.index.json").write_bytes(data)
        read_all(open_checkpoint(self.model))
        if deep:
            skillvec.inspect(self.model)
        return True


def sealed(manifest: Any, text: str, files: list[Tensors]) -> str:
    """Return the text of a manifest with its digests put right, as far as they can be."""
    swaps: list[tuple[str, str]] = []
    with contextlib.suppress(Exception):
        for said, tensors in zip(manifest["side"], files, strict=True):
            swaps += [(said[n], digest_bytes(c)) for n, _, _, c in tensors if n in said]
    for tensors in files:
        held = {name: content for name, _, _, content in tensors}
        for name, entry in manifest["tensors"].items():
            with contextlib.suppress(Exception):
                parts = [held[name + part] for part in PARTS[entry["codec"]]]
                if parts:
                    swaps.append((entry["digest"], _delta_digest(entry, parts, held[BLOCKS])))
    for old, new in swaps:
        text = text.replace(old, new)
    digest = manifest_digest(json.loads(text))
    return re.sub(r'("digest":\s*")[0-9a-f]{32}("\s*}\s*)$', rf"\g<1>{digest}\2", text)


def _delta_digest(entry: Any, parts: list[bytes], table: bytes) -> str:
    at, leaves, row = 0, b"", entry["block"]
    for block in range(block_count(int(np.prod(entry["shape"])))):
        (nbytes,) = struct.unpack_from("<I", table, 12 * (row + block))
        hashed = xxh3_128(b"".join(p[block * (BLOCK_NUMEL // 8) :][: BLOCK_NUMEL // 8]
                                   for p in parts[1:]))  # fmt: skip
        hashed.update(parts[0][at : at + nbytes])
        leaves += hashed.digest()
        at += nbytes
    return xxh3_128(leaves).hexdigest()


def read_vector(path: Path) -> bool:
    """Open a vector and read all its blocks; False where it is none."""
    vector = find_vector(path)
    if vector is None:
        return False
    reader = BlockReader(vector)
    scratch = np.empty(BLOCK_NUMEL * 9, np.uint8)
    for delta in vector.deltas.values():
        numel = delta.spec.numel
        for block in {0, block_count(numel) - 1} if numel else ():
            out = np.empty(min(BLOCK_NUMEL, numel - block * BLOCK_NUMEL),
                           STORAGE_DTYPE[delta.spec.dtype])  # fmt: skip
            reader.read(delta, block, out, scratch)
    return True


class VectorTarget(Target):
    """A vector file of each codec, its digests put right after the harm."""

    def make(self) -> list[bytes]:
        tensors = toy(0, layers=1, width=8, vocabulary=10)
        tensors["odd"] = torch.full((300,), 3e38).bfloat16()
        tuned = perturbed(tensors, 1, density=0.3)
        tuned["odd"][::7] = -0.0  # exceptions and replacements
        tuned["model.norm.weight"][0] = -0.0
        self.base = save(self.folder / "base", tensors)
        self.tuned = save(self.folder / "tuned", tuned)
        self.near = save(self.folder / "near", perturbed(tensors, 3))
        self.path = self.folder / "v.safetensors"
        seeds = []
        for codec in ("packed", "sparse", "dense"):
            skillvec.diff(self.tuned, self.base, self.path, codec=codec, force=True)
            seeds.append(self.path.read_bytes())
        parts = self.folder / "parts.safetensors"
        one = SkillVector.open(self.path)
        (0.5 * one + 0.25 * one).save(parts)
        return [*seeds, parts.read_bytes()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        try:
            metadata, tensors = split(data)
            text = metadata["skillvec"]
        except Exception:
            return harm_file(rng, data)
        if not isinstance(text, str):  # harmed before
            return harm_file(rng, data)
        kind = rng.randrange(8)
        if kind == 0:
            return harm_file(rng, data)
        if kind < 4:
            with contextlib.suppress(UnicodeDecodeError):
                text = harm_json(rng, text.encode()).decode("utf-8", "surrogatepass")
        if kind >= 3:
            with contextlib.suppress(TypeError):  # a shape that was harmed before is none
                tensors = harm_tensors(rng, tensors)
        with contextlib.suppress(Exception):
            if rng.randrange(12):
                text = sealed(json.loads(text), text, [tensors])
        try:
            return join(metadata | {"skillvec": text}, tensors)
        except Exception:
            return harm_bytes(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        self.path.write_bytes(data)
        if not read_vector(self.path):
            return False
        if deep:
            self.use(self.path)
        return True

    def use(self, vector: Path) -> None:
        """Apply, and verify what was written; the vector itself need not be true."""
        with contextlib.suppress(SkillvecError):
            skillvec.inspect(vector, target=self.near)
        with contextlib.suppress(SkillvecError):
            skillvec.verify(vector, tuned=self.tuned, base=self.base)
        for target in (self.base, self.near):
            output = self.fresh()
            try:
                skillvec.apply(target, vector, output)
                confirmed(output, target=target, vector=vector)
            finally:
                removed(output)


class VectorIndexTarget(VectorTarget):
    """vector.safetensors.index.json over valid shards, the manifest's digest put right."""

    def make(self) -> list[bytes]:
        super().make()
        self.shards = self.folder / "shards.safetensors"
        skillvec.diff(self.tuned, self.base, self.shards, codec="sparse", max_shard_size=1500)
        assert self.shards.is_dir()
        return [(self.shards / "vector.safetensors.index.json").read_bytes()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        with contextlib.suppress(Exception):
            index = json.loads(data, object_pairs_hook=Pairs)
            metadata = dict(index)["metadata"]
            if rng.randrange(2):
                text = dict(metadata)["skillvec"]
                text = harm_json(rng, text.encode()).decode()
                with contextlib.suppress(Exception):
                    text = sealed(json.loads(text), text, [])
                metadata[:] = [(k, text if k == "skillvec" else v) for k, v in metadata]
                return json_text(index).encode()
        return harm_json(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        (self.shards / "vector.safetensors.index.json").write_bytes(data)
        if not read_vector(self.shards):
            return False
        if deep:
            self.use(self.shards)
        return True


class BlockTarget(Target):
    """One encoded block: a byte for codec and width, two for the number of values, the payload."""

    WIDTHS = (np.uint16, np.float32, np.float64)

    def make(self) -> list[bytes]:
        rng, seeds = np.random.default_rng(0), []
        for i, dtype in enumerate(self.WIDTHS):
            for share in (0.01, 0.3, 1.0):
                values = (rng.random(700) < share).astype(dtype) * dtype(3)
                for codec in ("packed", "sparse"):
                    made = codecs.encode_block(values, codec)
                    head = bytes([i * 2 + (codec == "sparse")]) + struct.pack("<H", values.size)
                    seeds.append(head + bytes(made.bitmap) + bytes(made.payload))
        drawn = np.minimum(rng.geometric(0.02, 6000), 400).astype(np.uint16)
        made = codecs.encode_block(drawn, "packed")
        assert made.ranked
        return [*seeds, b"\0" + struct.pack("<H", drawn.size) + bytes(made.payload)]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return bytes(harm_in_place(rng, data)) if rng.randrange(3) else harm_bytes(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        data = data.ljust(3, b"\0")
        kind, numel = data[0] % 6, struct.unpack("<H", data[1:3])[0]
        out = np.full(numel, 77, self.WIDTHS[kind // 2])
        codec = "sparse" if kind % 2 else "packed"
        cut = -(-numel // 8) if kind % 2 else 0
        bitmap = np.frombuffer(data[3 : 3 + cut], np.uint8)
        payload = np.frombuffer(data[3 + cut :], np.uint8)
        if codec == "packed" and payload.size > out.nbytes:
            return False  # a reader refuses it before
        try:
            codecs.decode_block(codecs.Encoded(payload, bitmap), codec, out)
        except ValueError:
            return False
        again = codecs.encode_block(out, codec)
        back = np.empty_like(out)
        codecs.decode_block(again, codec, back)
        assert back.tobytes() == out.tobytes(), "what was decoded does not come back"
        return True


class PatchTarget(Target):
    """A patch of any form on a base."""

    def make(self) -> list[bytes]:
        tensors = toy(0, layers=1, width=8, vocabulary=10)
        self.base = save(self.folder / "base", tensors)
        tuned = save(self.folder / "tuned", perturbed(tensors, 1, density=0.3))
        self.path = self.folder / "patch.safetensors"
        vector = self.folder / "v.safetensors"
        skillvec.diff(tuned, self.base, vector)
        skillvec.export_patch(vector, self.path)
        plain = {
            f"{name}.{part}": value
            for name in ("model.norm.weight", "lm_head.weight")
            for part, value in (("indices", torch.tensor([0, 3, 7])),
                                ("values", torch.ones(3).bfloat16()))
        }  # fmt: skip
        save(self.folder / "plain.safetensors", plain)
        made = [self.path.read_bytes(), (self.folder / "plain.safetensors").read_bytes()]
        for form in ("verl", "vllm"):
            skillvec.export_patch(vector, self.path, form=form, force=True)
            made.append(self.path.read_bytes())
        return made

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_file(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        self.path.write_bytes(data)
        touched, _ = touched_by(patch.open_patch(self.path), open_checkpoint(self.base))
        for name, made in touched.items():
            for begin in range(0, made.numel, BLOCK_NUMEL):
                values_of(made, begin, min(BLOCK_NUMEL, made.numel - begin))
            assert name
        if deep:
            output = self.fresh().with_suffix(".safetensors")
            try:
                skillvec.import_patch(self.path, self.base, output)
                confirmed(output, tuned=self.path, base=self.base)
            finally:
                removed(output)
        return True


class AdapterTarget(Target):
    """An adapter: its config where the bytes are JSON, else its tensors."""

    def make(self) -> list[bytes]:
        tensors = toy(0, layers=2, width=8, vocabulary=10)
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 4, 6).bfloat16()
        self.base = save(self.folder / "base", tensors)
        self.adapter = self.folder / "adapter"
        factors = {}
        for layer in range(2):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            factors[f"{stem}.lora_A.weight"] = torch.randn(2, 8)
            factors[f"{stem}.lora_B.weight"] = torch.randn(8, 2)
        stem = "base_model.model.model.layers.0.mlp.experts"
        factors[f"{stem}.lora_A.weight"] = torch.randn(6, 6)
        factors[f"{stem}.lora_B.weight"] = torch.randn(4, 6)
        factors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(2, 10)
        factors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(8, 2)
        factors["base_model.model.lm_head.weight"] = torch.randn(10, 8)
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base",
            "revision": None, "use_rslora": False, "fan_in_fan_out": False, "use_dora": False,
            "rank_pattern": {"model.layers.1.self_attn.q_proj": 2}, "init_lora_weights": True,
            "alpha_pattern": {r".*layers\.\d+\.self_attn.q_proj": 3.5}, "bias": "none",
            "target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["lm_head"],
        }  # fmt: skip
        save(self.adapter / "adapter_model.safetensors", factors)
        self.parts = {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": (self.adapter / "adapter_model.safetensors").read_bytes(),
        }
        return list(self.parts.values())

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data) if data[:1] == b"{" else harm_file(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        config = data[:1] in (b"{", b"[", b"n")
        written = "adapter_config.json" if config else "adapter_model.safetensors"
        for name, content in (self.parts | {written: data}).items():
            (self.adapter / name).write_bytes(content)
        opened = SkillVector.between(self.adapter, self.base)
        for delta in opened.deltas.values():
            source = delta.spec
            if hasattr(source, "left"):
                read_values(source, 0, np.empty(min(64, source.numel), np.float32))
        with contextlib.suppress(SkillvecError):  # what only the base can tell
            SkillVector.open(self.adapter)
        if deep:
            output = self.fresh()
            try:
                skillvec.apply(self.base, tuned=self.adapter, base=self.base, output=output)
                confirmed(output)
            finally:
                removed(output)
        return True


class QuantisedTarget(Target):
    """A quantised model: its config.json where the bytes are JSON, else its tensors.

    The first seeds are configs; the tensors beside one are those of the kind that it names.
    """

    def make(self) -> list[bytes]:
        e4m3 = torch.zeros(16, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
        ct: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8,
                   "symmetric": False}  # fmt: skip
        kinds: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
            "fp8": (
                {"a.weight": e4m3, "a.weight_scale_inv": torch.ones(2, 2), "n": torch.ones(3)},
                {"quant_method": "fp8", "weight_block_size": [8, 8]},
            ),
            "compressed-tensors": (
                {"a.weight_packed": torch.zeros(16, 4, dtype=torch.int32),
                 "a.weight_scale": torch.ones(16, 4), "a.weight_shape": torch.tensor([16, 32]),
                 "a.weight_zero_point": torch.zeros(2, 4, dtype=torch.int32)},
                ct | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}},
            ),
            "mxfp4": (
                {"a_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8),
                 "a_scales": torch.full((2, 4, 3), 127, dtype=torch.uint8)},
                {"quant_method": "mxfp4"},
            ),
        }  # fmt: skip
        self.model = self.folder / "model"
        self.files: dict[str, bytes] = {}
        self.configs: dict[str, bytes] = {}
        for kind, (tensors, settings) in kinds.items():
            config = {"model_type": "toy", "dtype": "bfloat16", "quantization_config": settings}
            save(self.model, tensors, config=config)
            self.files[kind] = (self.model / "model.safetensors").read_bytes()
            self.configs[kind] = (self.model / "config.json").read_bytes()
        return [*self.configs.values(), *self.files.values()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data) if data[:1] == b"{" else harm_file(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        """Pair the bytes with what they were made from: the kind that they, or names, mention."""
        if data[:1] in (b"{", b"[", b"n"):
            kind = next((kind for kind in self.files if kind.encode() in data), "fp8")
            pair = {"config.json": data, "model.safetensors": self.files[kind]}
        else:
            kind = "mxfp4" if b"_blocks" in data else "fp8"
            kind = "compressed-tensors" if b"_packed" in data else kind
            pair = {"config.json": self.configs[kind], "model.safetensors": data}
        for name, content in pair.items():
            (self.model / name).write_bytes(content)
        model = open_checkpoint(self.model)
        read_all(model)
        assert model.config_digest is None or len(model.config_digest) == 32
        if deep:
            output = self.fresh()
            try:
                used(self.model, self.model, output)
            finally:
                removed(output, output.with_suffix(".safetensors"))
        return True


class GgufTarget(Target):
    """A GGUF file; harm is done to its header."""

    def make(self) -> list[bytes]:
        from test_gguf import KINDS, MODELS, converted, tiny, write

        self.file = self.folder / "model" / "m.gguf"
        self.file.parent.mkdir()
        seeds = []
        for arch in ("llama", "qwen3moe"):
            model = tiny(*MODELS[arch])
            write(self.file, arch, model.config, converted(model, arch), KINDS)
            open_checkpoint(self.file)  # imports what it needs
            seeds.append(self.file.read_bytes())
        return seeds

    def harm(self, rng: Random, data: bytes) -> bytes:
        end = data.rfind(b".weight") + 40
        return harm_bytes(rng, data[:end]) + data[end:]

    def run(self, data: bytes, deep: bool = False) -> bool:
        self.file.write_bytes(data)
        read_all(open_checkpoint(self.file))
        if deep:
            output = self.fresh()
            try:
                used(self.file.parent, self.file, output)
            finally:
                removed(output, output.with_suffix(".safetensors"))
        return True


RECIPE = {
    "op": "ties", "parameters": {"density": 0.2, "trim": "tensor"}, "seed": 3,
    "vectors": [
        {"vector": "a.safetensors", "weight": 0.5, "parameters": {"density": 0.1}},
        {"vector": "b.safetensors", "weight": [0, 1, 0.5],
         "rules": [{"match": "model.layers.*", "weight": 0.1, "density": [0.3, 1]},
                   {"match": "*", "weight": 1}]},
    ],
}  # fmt: skip
NAMES = [*(f"model.layers.{i}.w" for i in range(4)), "model.norm.weight"]


class RecipeTarget(Target):
    """A recipe file: YAML, or JSON where the bytes begin with a brace."""

    def make(self) -> list[bytes]:
        import yaml

        text: bytes = yaml.safe_dump(RECIPE, sort_keys=False).encode()
        return [text, json.dumps(RECIPE).encode()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data) if data[:1] == b"{" else harm_text(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        path = self.folder / ("recipe.json" if data[:1] == b"{" else "recipe.yaml")
        path.write_bytes(data)
        recipe = read_recipe(path)
        json.dumps(recipe.to_dict(), allow_nan=False, ensure_ascii=False).encode()
        resolved = resolve(recipe, NAMES)
        assert set(resolved) == set(NAMES)
        assert all(np.isfinite(w) for shares in resolved.values() for w, _ in shares)
        return True


class MergedTarget(Target):
    """The recipe in a merged model's header."""

    looks = False  # verify opens what the recipe names

    def make(self) -> list[bytes]:
        tensors = toy(0, layers=1, width=8, vocabulary=10)
        base = save(self.folder / "base", tensors)
        tuned = save(self.folder / "tuned", perturbed(tensors, 1))
        vector, self.out = self.folder / "v.safetensors", self.folder / "out"
        skillvec.diff(tuned, base, vector)
        seeds = []
        one = SkillVector.open(vector)
        vectors = [vector, skillvec.diff(tuned, base), 0.5 * one + 0.5 * one]
        for given in vectors:
            skillvec.apply(base, given, self.out, force=True)
            forget_open_files()
            self.metadata, self.tensors = split((self.out / "model.safetensors").read_bytes())
            seeds.append(self.metadata["skillvec"].encode())
        return seeds

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        text = data.decode("utf-8", "replace")
        content = join(self.metadata | {"skillvec": text}, self.tensors)
        (self.out / "model.safetensors").write_bytes(content)
        said = provenance.read_merged(open_tensors(self.out, "input"))
        provenance.digests_of(said["vector"])
        if deep:
            skillvec.inspect(self.out)
            skillvec.verify(self.out)
        return True


class PickleTarget(Target):
    """A pickle without tensors, such as DCP's metadata."""

    def make(self) -> list[bytes]:
        import pickle
        from collections import OrderedDict

        tree = {"a": [1, 2.5, None, True, "x", (1, (2,))], "b": OrderedDict(c=1 << 40),
                "size": torch.Size([2, 3]), "dtype": torch.float32}  # fmt: skip
        old = pickle.dumps(tree | {"raw": b"bytes", "set": {3}}, 2)
        return [old, *(pickle.dumps(tree, protocol) for protocol in (3, 4, 5))]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_pickle(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        load_pickle(data, "toy")
        return True


class ArchiveTarget(Target):
    """What torch.save wrote, as a pickled model."""

    def make(self) -> list[bytes]:
        self.path = self.folder / "pytorch_model.bin"
        shared = torch.arange(12.0).reshape(3, 4)
        trees: list[Any] = [
            {"a": torch.ones(2, 3), "b": torch.zeros(5).bfloat16(), "s": torch.tensor(3)},
            {"state_dict": {"w": shared, "t": shared.T, "part": shared[1:, ::2]}, "epoch": 3},
            {"model": {"p": torch.nn.Parameter(torch.ones(4)), "e": torch.zeros(0, 3)}},
        ]
        seeds = []
        for tree in trees:
            torch.save(tree, self.path)
            seeds.append(self.path.read_bytes())
        return seeds

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_archive(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        self.path.write_bytes(data)
        model = open_checkpoint(self.path)
        for name, source in model.items():
            read_ends(name, source, len(data))
        if deep:
            output = self.fresh().with_suffix(".safetensors")
            skillvec.diff(self.path, self.path, output)
            confirmed(output, tuned=self.path, base=self.path)
            removed(output)
        return True


def read_ends(name: str, source: Any, nbytes: int) -> None:
    assert isinstance(name, str) and source.nbytes <= nbytes
    if source.dtype in STORAGE_DTYPE and source.numel:
        out = np.empty(min(64, source.numel), STORAGE_DTYPE[source.dtype])
        read_values(source, 0, out)
        read_values(source, source.numel - out.size, out)


class TrainingTarget(Target):
    """A training checkpoint of which one file is harmed: the first byte says which."""

    def make(self) -> list[bytes]:
        import torch.distributed.checkpoint as dcp

        warnings.simplefilter("ignore")  # of torch's own internals
        self.places: list[tuple[Path, Path]] = []
        folder = self.folder / "dcp"
        dcp.save({"model": {"w": torch.randn(7, 5), "b": torch.ones(3)}, "step": 3},
                 checkpoint_id=folder)  # fmt: skip
        self.places += [(folder, folder / ".metadata"), (folder, folder / "__0_0.distcp")]
        folder = self.folder / "ranks"
        folder.mkdir()
        for rank in range(2):
            file = folder / f"model_world_size_2_rank_{rank}.pt"
            torch.save({"w": torch.ones(3, 2), "b": torch.zeros(2)}, file)
        self.places.append((folder, file))
        for stage in (2, 3):
            folder = self.folder / f"zero{stage}"
            _save_zero(folder, stage)
            self.places += [(folder, file) for file in sorted(folder.rglob("*.pt"))]
            self.places.append((folder, folder / "latest"))
        self.valid = [file.read_bytes() for _, file in self.places]
        return [bytes([i]) + content for i, content in enumerate(self.valid)]

    def harm(self, rng: Random, data: bytes) -> bytes:
        content = data[1:]
        if content[:2] == b"PK":
            return data[:1] + harm_archive(rng, content)
        return data[:1] + (harm_pickle if content[:1] == b"\x80" else harm_bytes)(rng, content)

    def run(self, data: bytes, deep: bool = False) -> bool:
        which = data[0] % len(self.places) if data else 0
        folder, file = self.places[which]
        file.write_bytes(data[1:])
        try:
            for name, source in open_checkpoint(folder).items():
                read_ends(name, source, 1 << 20)
            if deep:
                skillvec.diff(folder, folder, output := self.fresh().with_suffix(".safetensors"))
                confirmed(output, tuned=folder, base=folder)
                removed(output)
        finally:
            file.write_bytes(self.valid[which])
        return True


def _save_zero(folder: Path, stage: int) -> None:
    """Write what DeepSpeed would of two tensors on one rank."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    one, two = torch.randn(5, 3), torch.randn(4)
    model = {
        "module": {"scale": torch.ones(2)}, "buffer_names": ["scale"],
        "param_shapes": [{"a.weight": one.shape, "b.weight": two.shape}],
        "frozen_param_shapes": {}, "frozen_param_fragments": {},
        "shared_params": {"head.weight": "a.weight"},
    }  # fmt: skip
    flat = torch.cat([one.reshape(-1), two])
    state: dict[str, Any] = {"zero_stage": stage, "partition_count": 1}
    if stage == 3:
        state["fp32_flat_groups"] = [flat]
    else:
        state |= {"single_partition_of_fp32_groups": [flat], "param_alignment_paddings": [[0, 0]]}
    torch.save(model, step / ("zero_pp_rank_0_" * (stage == 3) + "mp_rank_00_model_states.pt"))
    torch.save({"optimizer_state_dict": state},
               step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")  # fmt: skip


class CardTarget(Target):
    """A README.md with metadata and a generated part, renewed."""

    def make(self) -> list[bytes]:
        said = {"license": "mit", "base_model": ["org/base"], "tags": ["x"]}
        self.made = card_file.make_card(said, "# t")
        mine = self.made.replace("# t", "# mine\n\nfree text").replace("license: mit", "license: x")
        plain = "---\nlanguage: [en, de]\nlicense: apache-2.0\n---\n\n# Hand made\n"
        return [mine.encode(), self.made.encode(), plain.encode(), b"# no metadata\n"]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_text(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return False  # whoever reads the file says so
        made = cards.renewed(text, self.made)
        again = cards.renewed(made, self.made)  # keys may change their order
        assert sorted(again.splitlines()) == sorted(made.splitlines()), "renewed twice is another"
        return True


class LayoutTarget(Target):
    """Names and shapes of two models, a config and rename rules."""

    def make(self) -> list[bytes]:
        shapes = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": [4, 6]
                  for i in range(2) for e in range(2)}  # fmt: skip
        there = {f"language_model.{name}": shape for name, shape in shapes.items()}
        fused = {f"model.layers.{i}.mlp.experts.up_proj": [2, 4, 6] for i in range(2)}
        case = {"mine": shapes, "wanted": there, "config": {"model_type": "qwen3_moe"},
                "rename": [], "rows": "common"}  # fmt: skip
        other = case | {"wanted": fused, "rename": [r"^model\.=x.", "a=b"], "rows": "strict"}
        return [json.dumps(case).encode(), json.dumps(other).encode()]

    def harm(self, rng: Random, data: bytes) -> bytes:
        return harm_json(rng, data)

    def run(self, data: bytes, deep: bool = False) -> bool:
        """Take only what a checked header and the command line can hold."""
        try:
            case = json.loads(data)
            mine, wanted = ({str(name): tuple(shape) for name, shape in case[key].items()
                             if all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
                             and len(shape) <= 64} for key in ("mine", "wanted"))  # fmt: skip
            config, rename = dict(case["config"]), [str(rule) for rule in case["rename"]]
            if any(re.search(r"[*+?{]", rule) for rule in rename):
                return False  # a user's own patterns take what time they take
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False
        found = layouts.bridge(mine, wanted, configs=[config], rename=rename, rows="common")
        for name, view in found.views.items():
            assert view.shape == wanted[name]
        return True


TARGETS: dict[str, Callable[[Path], Target]] = {
    "header": HeaderTarget, "index": IndexTarget, "vector": VectorTarget,
    "vector index": VectorIndexTarget, "block": BlockTarget, "patch": PatchTarget,
    "adapter": AdapterTarget, "quantised": QuantisedTarget, "recipe": RecipeTarget,
    "merged": MergedTarget, "pickle": PickleTarget, "archive": ArchiveTarget,
    "gguf": GgufTarget, "training": TrainingTarget, "card": CardTarget, "layout": LayoutTarget,
}  # fmt: skip
