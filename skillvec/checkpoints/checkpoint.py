"""A checkpoint as a read-only mapping from tensor name to where its values come from.

Hides folders, shards, indexes, side files, the Hub, and in which format the weights lie. Reads
headers only. What skillvec cannot take is refused by name, before any work.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from skillvec.checkpoints.folder import INDEX, is_listed, read_json
from skillvec.checkpoints.opened import Opened
from skillvec.checkpoints.side_files import STATE, Made, left_behind
from skillvec.errors import FormatError, printable
from skillvec.files.file import (
    Place,
    digest_bytes,
    digest_file_range,
    file_nbytes,
    remote_of,
    shown,
)
from skillvec.files.header import TensorSpec
from skillvec.files.staging import STAGING_SUFFIX
from skillvec.files.tensors import Source, files_of

METADATA_KEY = "skillvec"  # header metadata: a vector's manifest or a merged model's recipe

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "added_tokens.json",
)  # fmt: skip
TIE = "tie_word_embeddings"
# words in the names of transformers' classes that have a head over the vocabulary
WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHead", "ForMaskedLM", "ForPreTraining")
# keys of config.json that say who wrote it, not what the model is
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
QUANTO = "quanto_qmap.json"  # of optimum-quanto: which module it quantised, and how


def family_of(shapes: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return the digest of names and shapes, in any order."""
    return digest_bytes(json.dumps(sorted((name, list(shape)) for name, shape in shapes)).encode())


class Checkpoint(Mapping[str, Source]):
    """A model: tensor name -> Source in file order, with its config and side files.

    `ref` is what the user wrote, `path` the resolved folder or file, `metadata` the header
    metadata of the first weight file. `format` names the format, `formats` how tensors are stored
    that are computed when they are read.
    """

    def __init__(self, place: Place, opened: Opened, formats: Mapping[str, str] = {}) -> None:
        self.place, self.opened, self.formats = place, opened, formats
        self.ref, self.path, self.metadata = place.ref, place.path, opened.metadata
        self._tensors = opened.tensors

    def with_tensors(
        self, tensors: Mapping[str, Source], formats: Mapping[str, str] = {}
    ) -> "Checkpoint":
        """Return the same model with its tensors seen otherwise."""
        opened = replace(self.opened, tensors=tensors)
        return Checkpoint(self.place, opened, {**self.formats, **formats})

    def __getitem__(self, name: str) -> Source:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.ref!r}, {len(self)} tensors)"

    def __sub__(self, base: object) -> Any:
        if not isinstance(base, Checkpoint):
            raise TypeError(
                f"checkpoint - {type(base).__name__}: only a checkpoint can be subtracted from a"
                " checkpoint, which gives a skill vector"
            )
        package: Any = sys.modules["skillvec"]  # sugar: its face knows the rooms above
        return package.SkillVector.between(self, base)

    def __add__(self, other: object) -> Any:
        raise TypeError(
            f"checkpoint + {type(other).__name__}: two checkpoints have no sum; to add a vector use"
            " skillvec.apply(checkpoint, vector, output)"
        )

    __radd__ = __add__

    @property
    def format(self) -> str:
        """The name of the format, as reports say it."""
        return self.opened.format

    @property
    def kind(self) -> str:
        """What `format` was called before."""
        return self.format

    @property
    def is_plain(self) -> bool:
        """Whether every tensor lies in a safetensors file as it is."""
        return self.opened.is_safetensors and all(
            isinstance(spec, TensorSpec) for spec in self.values()
        )

    @property
    def is_folder(self) -> bool:
        return self.place.member is None and self.path.is_dir()

    @cached_property
    def folder(self) -> Path:
        """The folder that holds config and tokenizer."""
        if self.opened.side is not None:
            return self.opened.side
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> list[str]:
        """The weight files, in name order."""
        return sorted({path for spec in self.values() for path in files_of(spec)})

    @property
    def real_files(self) -> list[Path]:
        """The weight files of this disk that links lead to."""
        return [Path(file).resolve() for file in self.files if remote_of(file) is None]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype: the lineage that every result is shown with."""
        return dict(sorted(Counter(spec.dtype for spec in self.values()).items()))

    @property
    def facts(self) -> dict[str, Any]:
        """What a plan says of it: where it lies, its dtypes, and how its weights are stored."""
        stored = [f"{n} {what}" for what, n in sorted(Counter(self.formats.values()).items())]
        return {
            "ref": self.ref, "path": shown(self.ref, self.path), "dtypes": self.dtypes,
            "revision": self.place.revision, "format": self.format, "stored": stored,
            "notes": list(self.opened.notes),
        }  # fmt: skip

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json, empty where there is none (a single file has none)."""
        file = self.folder / "config.json"
        return read_json(os.fspath(file)) if self.is_folder and file.is_file() else {}

    @property
    def model_type(self) -> str | None:
        model_type = self.config.get("model_type")
        return printable(model_type) if isinstance(model_type, str) else None

    @property
    def ties_embeddings(self) -> bool | None:
        """What config.json alone says of tied input and output embeddings.

        The outer key goes. None where there is none, or where it says no and that of a model within
        says yes, which some classes follow: then the bytes decide (or `tied_in_transformers`).
        """
        own = self.config.get(TIE)
        within = [inner.get(TIE) for inner in self.config.values() if isinstance(inner, dict)]
        return own if isinstance(own, bool) and (own or True not in within) else None

    @cached_property
    def tied_in_transformers(self) -> bool | None:
        """Whether transformers 5 ties the head to the embeddings; None where that is not known.

        From config and headers. Imports transformers (UsageError where it is missing) where the
        default of a class decides, or what it makes of configs within. A head that is stored
        although the config ties it stays its own if its values differ: headers do not tell.
        """
        said, own = self.ties_embeddings, "lm_head.weight" in self
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and names and type(names[0]) is str else ""
        heads = any(word in name for word in WITH_HEAD)
        nested = any(isinstance(c, dict) and "model_type" in c for c in self.config.values())
        if said is False and (own or (self._stores_head and not nested)):
            return False
        if said and self._stores_head:
            return None
        if said and not nested and name.endswith(("ForCausalLM", "LMHeadModel")):
            return True
        from skillvec.checkpoints.model_classes import can_tie, ties

        found = ties(self.config)
        if found is None:  # a config that says yes may be of a model without a head
            return None if said and name and not heads else said
        outside, within = found
        if not outside:
            return None if within and not own else False
        able = can_tie(name)
        if self._stores_head or able is None or (within and not able):
            return None
        return (True if heads else None) if able else False

    @property
    def _stores_head(self) -> bool:
        """Whether there is a head beside the embeddings, tied or not: by its name or its rows."""
        inner = [self.config, *(c for c in self.config.values() if isinstance(c, dict))]
        sizes = {config["vocab_size"] for config in inner
                 if type(config.get("vocab_size")) is int}  # fmt: skip
        rows = [n for n, s in self.items() if len(s.shape) == 2 and s.shape[0] in sizes]
        return len(rows) > 1 or any(name.endswith("lm_head.weight") for name in self)

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
        if not self.is_folder:
            return None
        parts = [
            [name, digest_file_range(file := os.fspath(self.folder / name), 0, file_nbytes(file))]
            for name in TOKENIZER_FILES
            if (self.folder / name).is_file()
        ]
        return digest_bytes(json.dumps(parts).encode()) if parts else None

    @property
    def family_digest(self) -> str:
        """Digest of the sorted names and shapes."""
        return family_of((name, spec.shape) for name, spec in self.items())

    def side_files(
        self, made: Collection[str] = (), indexed: bool = False
    ) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return address and name of each file to copy; name and reason of each left behind.

        `made` are the weight files of the output, `indexed` says whether it has the target's index.
        What the weights were read from, and its index, are neither.
        """
        ours = {*self.files, *map(os.fspath, self.real_files)}
        sources = {INDEX, self.opened.index}
        sources |= {QUANTO} if self.formats else set()
        beside = {
            name: address
            for name, address in self._beside()
            if name not in sources and not {address, os.path.realpath(address)} & ours
        }
        left = left_behind(beside, Made(self.keys(), made, indexed))
        copied = [(at, name) for name, at in beside.items() if name not in left]
        if self.path in self.folder.parents:  # config and tokenizer in a folder below the shards
            above = set(self.place.files) - {self.folder.relative_to(self.path).parts[0]}
            left |= {n: STATE for n in sorted(above) if self.place.files[n] not in ours}
        return copied, list(left.items())

    def _beside(self) -> Iterator[tuple[str, str]]:
        """Yield name and address of every file in the folder, and below it in a plain one."""
        if is_listed(self.place):
            yield from sorted(self.place.files.items())
            return
        seen: set[str] = set()

        def refuse(error: OSError) -> None:
            raise error

        for folder, subfolders, names in os.walk(self.folder, onerror=refuse, followlinks=True):
            if os.path.realpath(folder) in seen:
                raise FormatError(f"{folder}: a link back into the checkpoint; it cannot be copied")
            seen.add(os.path.realpath(folder))
            subfolders[:] = sorted(
                name
                for name in subfolders
                if name not in (".git", ".cache") and not name.endswith(STAGING_SUFFIX)
            )
            for name in sorted(names):
                full = os.path.join(folder, name)
                if not os.path.isfile(full):
                    raise FormatError(f"{full}: a broken link or not a file; it cannot be copied")
                yield os.path.relpath(full, self.folder), full
