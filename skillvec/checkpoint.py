"""Points: a checkpoint as a read-only mapping from tensor name to where its bytes lie.

Hides folders, shards, indexes and side files. Reads headers only. What skillvec cannot take
(quantised weights, adapters, pickles) is refused here by name, before any work.
"""

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from skillvec.errors import FormatError, IncompatibleError, UsageError, up_to_five
from skillvec.storage import SUBBYTE, TensorSpec, digest_bytes, read_header

INDEX = "model.safetensors.index.json"
VECTOR_INDEX = "vector.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA_KEY = "skillvec"  # header metadata: a vector's manifest or a merged model's recipe

# files that hold or index weights (or optimiser state): never copied beside merged weights
WEIGHT_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json",
    "adapter_model.bin", "optimizer.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "tf_model*.h5",
    "flax_model*.msgpack", "*.onnx", "*.onnx_data",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "added_tokens.json",
)  # fmt: skip
# keys of config.json that say who wrote it, not what the model is
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
FOREIGN = {
    ".gguf": "GGUF holds quantised blocks: convert it to safetensors first",
    ".bin": "pickled PyTorch weights: load and save_pretrained them as safetensors first",
    ".pt": "pickled PyTorch weights: load and save_pretrained them as safetensors first",
    ".pth": "pickled PyTorch weights: load and save_pretrained them as safetensors first",
}


class Checkpoint(Mapping[str, TensorSpec]):
    """A model on the disk: name -> TensorSpec in file order, with its config and side files.

    `ref` is what the user wrote, `path` the resolved folder or file, `metadata` the header
    metadata of the first weight file.
    """

    def __init__(
        self, ref: str, path: Path, tensors: dict[str, TensorSpec], metadata: dict[str, str]
    ) -> None:
        self.ref, self.path, self.metadata = ref, path, metadata
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorSpec:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.ref!r}, {len(self)} tensors)"

    def __sub__(self, base: object) -> Any:
        from skillvec.vector import SkillVector

        if not isinstance(base, Checkpoint):
            raise TypeError(
                f"checkpoint - {type(base).__name__}: only a checkpoint can be subtracted from a"
                " checkpoint, which gives a skill vector"
            )
        return SkillVector.between(self, base)

    def __add__(self, other: object) -> Any:
        raise TypeError(
            f"checkpoint + {type(other).__name__}: two points have no sum; to add a vector use"
            " skillvec.apply(checkpoint, vector, output)"
        )

    __radd__ = __add__

    @property
    def folder(self) -> Path:
        """The folder that holds config, tokenizer and weights."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return [Path(path) for path in sorted({spec.path for spec in self.values()})]

    @property
    def real_files(self) -> list[Path]:
        """The weight files that links lead to."""
        return [file.resolve() for file in self.files]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype: the lineage that every result is shown with."""
        return dict(sorted(Counter(spec.dtype for spec in self.values()).items()))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json, empty where there is none (a single file has none)."""
        file = self.path / "config.json"
        if not self.path.is_dir() or not file.is_file():
            return {}
        try:
            config = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise FormatError(f"{file}: expected a JSON object, found {type(config).__name__}")
        return config

    @property
    def model_type(self) -> str | None:
        model_type = self.config.get("model_type")
        return model_type if isinstance(model_type, str) else None

    @property
    def ties_embeddings(self) -> bool | None:
        """What the config says of tied input and output embeddings; None if it says nothing."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return None

    @property
    def config_digest(self) -> str | None:
        """Digest of the config without the keys that only say who wrote it."""
        if not self.config:
            return None
        kept = {key: value for key, value in self.config.items() if key not in VOLATILE_CONFIG}
        return digest_bytes(json.dumps(kept, sort_keys=True).encode())

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer's vocabulary files, None where there are none."""
        if not self.path.is_dir():
            return None
        parts = [
            [name, digest_bytes((self.path / name).read_bytes())]
            for name in TOKENIZER_FILES
            if (self.path / name).is_file()
        ]
        return digest_bytes(json.dumps(parts).encode()) if parts else None

    @property
    def family_digest(self) -> str:
        """Digest of the sorted names and shapes."""
        shapes = sorted((name, list(spec.shape)) for name, spec in self.items())
        return digest_bytes(json.dumps(shapes).encode())

    def side_files(self) -> tuple[list[str], list[str]]:
        """Return the relative names of files to copy, and of other weight files left behind."""
        copied: list[str] = []
        left: list[str] = []
        ours = {os.fspath(file) for file in self.real_files}
        seen: set[str] = set()

        def refuse(error: OSError) -> None:
            raise error

        for folder, subfolders, names in os.walk(self.path, onerror=refuse, followlinks=True):
            if os.path.realpath(folder) in seen:
                raise FormatError(f"{folder}: a link back into the checkpoint; it cannot be copied")
            seen.add(os.path.realpath(folder))
            subfolders[:] = sorted(name for name in subfolders if name not in (".git", ".cache"))
            for name in sorted(names):
                full = os.path.join(folder, name)
                relative = os.path.relpath(full, self.path)
                if not os.path.isfile(full):
                    raise FormatError(f"{full}: a broken link or not a file; it cannot be copied")
                if not any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES):
                    copied.append(relative)
                elif os.path.realpath(full) not in ours and relative != INDEX:
                    left.append(relative)
        return copied, left


def open_checkpoint(ref: str | os.PathLike[str] | Checkpoint, role: str = "model") -> Checkpoint:
    """Open a folder (single file or shards with an index) or one .safetensors file.

    Reads headers only. `role` names the input in errors. Raises UsageError for a path that is not
    there, FormatError for a broken file, IncompatibleError for what is not taken.
    """
    if isinstance(ref, Checkpoint):
        return ref
    opened = open_tensors(ref, role)
    if kind_of_file(opened.metadata) in ("vector", "vector shard"):
        raise IncompatibleError(f"{role} {opened.ref}: this is a skill vector, expected a model")
    _refuse_quantised(opened, role)
    return opened


def kind_of_file(metadata: Mapping[str, Any]) -> str | None:
    """Return what skillvec wrote: "vector", "vector shard", "merged"; None for files of others."""
    try:
        entry = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, RecursionError, TypeError):
        return None
    kind = entry.get("kind") if isinstance(entry, dict) else None
    return kind if isinstance(kind, str) else None


def open_tensors(ref: str | os.PathLike[str], role: str) -> Checkpoint:
    """Open safetensors files of any meaning: a model or a vector."""
    text = os.fspath(ref)
    path = Path(text).expanduser()
    if not path.exists():
        hint = ""
        if text.startswith("hf://") or (text.count("/") == 1 and text[0] not in "./~"):
            hint = " (references to the Hub are not read yet: download it first)"
        raise UsageError(f"{role} {text}: no such file or folder{hint}")
    resolved = path.resolve()
    if path.is_dir():
        tensors, metadata = _open_folder(resolved, f"{role} {text}")
    else:
        if path.suffix in FOREIGN:
            raise IncompatibleError(f"{role} {text}: {FOREIGN[path.suffix]}")
        # a link's own name tells nothing: Hub caches link to blobs named by hash
        header = read_header(resolved)
        tensors, metadata = header.tensors, header.metadata
    return Checkpoint(text, resolved, tensors, metadata)


def _open_folder(folder: Path, what: str) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    index, single = folder / INDEX, folder / SINGLE
    if (folder / VECTOR_INDEX).is_file():
        raise IncompatibleError(f"{what}: this is a skill vector, expected a model")
    if index.is_file():
        weight_map, _ = read_index(index)
        if single.is_file() and SINGLE not in weight_map.values():
            raise FormatError(f"{what}: holds both {SINGLE} and {INDEX} over other files: which?")
        return _open_shards(folder, weight_map)
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file():
        raise IncompatibleError(
            f"{what}: a PEFT adapter is not read yet: merge it into its base model first"
        )
    if len(files) == 1:
        header = read_header(files[0])
        return header.tensors, header.metadata
    if files:
        raise FormatError(
            f"{what}: {len(files)} safetensors files and no {INDEX}: which tensors are the model?"
        )
    for suffix, advice in FOREIGN.items():
        found = sorted(folder.glob(f"*{suffix}"))
        if found:
            raise IncompatibleError(f"{what}: no safetensors, but {found[0].name}: {advice}")
    raise UsageError(f"{what}: no {SINGLE} and no {INDEX} in this folder")


def read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the weight map, tensor name to plain file name, and the metadata of an index."""
    try:
        content = json.loads(index.read_bytes())
        weight_map, metadata = content["weight_map"], content.get("metadata")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{index}: no readable weight_map: {error!r}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is not a map of tensor names to files")
    for name, file in weight_map.items():
        if type(file) is not str or file != os.path.basename(file) or file in ("", ".", ".."):
            raise FormatError(
                f"{index}: tensor {name!r} is said to lie in {file!r}, which is not a plain file"
                " name in this folder"
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _open_shards(
    folder: Path, weight_map: dict[str, str]
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, str] | None = None
    missing = sorted({f for f in weight_map.values() if not (folder / f).is_file()})
    if missing:
        raise FormatError(
            f"{folder}: shards named by the index are missing:\n{up_to_five(missing)}"
        )
    problems = []
    for file in sorted(set(weight_map.values())):
        header = read_header(folder / file)
        metadata = header.metadata if metadata is None else metadata
        for name, spec in header.tensors.items():
            if weight_map.get(name) != file:
                said = weight_map.get(name, "not in the index")
                problems.append(f"{name}: found in {file}, index: {said}")
            tensors[name] = spec
    problems += [f"{name}: not in {f}" for name, f in weight_map.items() if name not in tensors]
    if problems:
        raise FormatError(f"{folder}: index and shards disagree:\n{up_to_five(problems)}")
    return tensors, metadata or {}


def _refuse_quantised(checkpoint: Checkpoint, role: str) -> None:
    nested = [value for value in checkpoint.config.values() if isinstance(value, dict)]
    found = (config.get("quantization_config") for config in (checkpoint.config, *nested))
    quantization = next((entry for entry in found if entry), None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise IncompatibleError(
            f"{role} {checkpoint.ref}: quantised ({method or 'quantization_config'}): quantised"
            " weights cannot be subtracted or added to; dequantise the model first"
        )
    packed = [
        f"{spec.name}: {spec.dtype}"
        for spec in checkpoint.values()
        if spec.dtype.startswith("F8") or spec.dtype in SUBBYTE or spec.dtype == "C64"
    ]
    if packed:
        raise IncompatibleError(
            f"{role} {checkpoint.ref}: tensors of a dtype that is not taken; dequantise first:\n"
            + up_to_five(packed)
        )
