"""A checkpoint as a read-only mapping from tensor name to where its values come from.

Hides folders, shards, indexes, side files, the Hub, and in which format the weights lie. Reads
headers only. What skillvec cannot take is refused by name, before any work.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from skillvec.adapter_folder import FACTOR
from skillvec.adapter_folder import is_adapter as is_adapter
from skillvec.errors import FormatError, IncompatibleError, printable, up_to_five
from skillvec.folder import INDEX as INDEX
from skillvec.folder import SINGLE as SINGLE
from skillvec.folder import STEP, find_inside, find_steps, is_listed
from skillvec.folder import VECTOR_INDEX as VECTOR_INDEX
from skillvec.folder import is_away as is_away
from skillvec.folder import is_there as is_there
from skillvec.folder import read_index as read_index
from skillvec.folder import read_json as read_json
from skillvec.kernels import FLOATS
from skillvec.locate import locate as locate
from skillvec.locate import relocate as relocate
from skillvec.opened import Opened as Opened
from skillvec.opened_by import open_place
from skillvec.quantised import dequantised
from skillvec.sidefiles import ADAPTER_CONFIG as ADAPTER_CONFIG
from skillvec.sidefiles import STATE, Made, left_behind
from skillvec.sources import Source, files_of
from skillvec.staging import STAGING_SUFFIX
from skillvec.storage import (
    Place,
    TensorSpec,
    digest_bytes,
    digest_file_range,
    file_nbytes,
    refuse_stale,
    remote_of,
    shown,
    witnessed,
)
from skillvec.unread import LeftOut, nothing_left_out, unexplained

LORA_META = "lora_train_meta.json"  # of verl: the rank and alpha of a run
NOT_TEXT = re.compile("[\ud800-\udfff]")  # lone surrogates, which no file can hold
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
        from skillvec.vector import SkillVector

        if not isinstance(base, Checkpoint):
            raise TypeError(
                f"checkpoint - {type(base).__name__}: only a checkpoint can be subtracted from a"
                " checkpoint, which gives a skill vector"
            )
        return SkillVector.between(self, base)

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
        from skillvec.conversions import can_tie, ties

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
        shapes = sorted((name, list(spec.shape)) for name, spec in self.items())
        return digest_bytes(json.dumps(shapes).encode())

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


def open_checkpoint(
    ref: str | os.PathLike[str] | Place | Checkpoint,
    role: str = "model",
    left_out: LeftOut = nothing_left_out,
) -> Checkpoint:
    """Open a model: a folder or file of this disk, or a reference to the Hub (docs/checkpoints.md).

    Reads headers only; quantised weights are dequantised when they are read. `role` names the
    input in errors. Tensors of a dtype that is not taken, and weights of integers that no config
    explains, are refused unless `left_out` says of each that it will not be used. Raises
    UsageError for a path that is not there, FormatError for a broken file, IncompatibleError for
    what is not taken.
    """
    if isinstance(ref, Checkpoint):
        refuse_stale(ref.opened.seen)
        return ref
    return as_model(open_tensors(ref, role), role, left_out)


def as_model(opened: Checkpoint, role: str, left_out: LeftOut = nothing_left_out) -> Checkpoint:
    """Return what was opened as a model, or refuse what is none; quantised weights are read plain.

    `left_out` and errors as of `open_checkpoint`.
    """
    if kind_of_file(opened.metadata) in ("vector", "vector shard"):
        raise IncompatibleError(f"{role} {opened.ref}: this is a skill vector, expected a model")
    if is_adapter(opened.place):
        raise IncompatibleError(
            f"{role} {opened.ref}: this is a PEFT adapter, a displacement and no model: use it in"
            " place of a vector, or as the TUNED of diff with its base model as BASE"
        )
    if ADAPTER_CONFIG in opened.place.files and opened.place.member is None:
        opened = _noting(
            opened,
            f"{ADAPTER_CONFIG} beside the weights: these are read as they are, and the adapter is"
            " not added, which from_pretrained does where PEFT is installed",
        )
    empty = find_placeholders(opened)
    weights = [opened[name].shape for name in opened if name.endswith(".weight")]
    if (0,) in weights and (2 * weights.count((0,)) > len(weights) or max(map(len, weights)) < 2):
        raise IncompatibleError(f"{role} {explain_placeholders(opened, empty)}")
    if empty:
        note = f"{len(empty)} tensors are empty ([0]), such as {empty[0]}: are they meant to be?"
        opened = _noting(opened, note)
    headers = {key: said for file in opened.opened.labels.values() for key, said in file.items()}
    config, what = opened.config, f"{role} {opened.ref}"
    if opened.is_folder and QUANTO in opened.place.files and "quantization_config" not in config:
        said = {"quant_method": "quanto", "map": read_json(opened.place.files[QUANTO])}
        config = config | {"quantization_config": said}

    def shapes() -> dict[str, tuple[int, ...]]:
        from skillvec.conversions import shapes_of

        return shapes_of(opened.config, len(opened)) or {}

    tensors, formats = dequantised(opened, config, what, left_out, headers, shapes)
    model = opened.with_tensors(tensors, formats) if formats else opened
    unread = list(unexplained(tensors))
    if not unread:
        return model
    return _noting(
        model,
        f"{len(unread)} tensors stay as they are, because no config says how to read them, such as"
        f" {unread[0]}; scales that their method folded into other tensors are not undone",
    )


def _noting(model: Checkpoint, note: str) -> Checkpoint:
    """Return a model with one more note."""
    opened = replace(model.opened, notes=(*model.opened.notes, note))
    return Checkpoint(model.place, opened, model.formats)


def find_placeholders(model: Mapping[str, Source]) -> list[str]:
    """Return the names of floating-point tensors of shape [0], which stand for weights elsewhere.

    ZeRO-3 leaves them in a state dict that was not gathered.
    """
    return [name for name, spec in model.items() if spec.shape == (0,) and spec.dtype in FLOATS]


def explain_placeholders(opened: Checkpoint, names: Sequence[str]) -> str:
    """Return what to say of a checkpoint whose weights are placeholders, and where they may be."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    steps = find_steps([*os.listdir(folder), *opened.place.files])
    if not steps and not STEP.match(folder.name):  # of an adapter in a folder below the run's
        steps = [f"../{name}" for name in find_steps(os.listdir(folder.parent))]
    if is_adapter(opened.place) and steps:
        where = f"lie in {steps[-1]}/: copy {ADAPTER_CONFIG} into it and name that folder"
    elif steps or folder.name.startswith("global_step"):
        where = f"lie in {steps[-1] if steps else folder.name}/: name that folder"
    else:
        where = "lie in the global_step folder of the run: name that, or save them again, gathered"
    return (
        f"{opened.ref}: {len(names)} of {len(opened)} tensors are empty, as DeepSpeed's ZeRO-3"
        " leaves them where weights are saved without being gathered"
        f" (stage3_gather_16bit_weights_on_model_save); the weights {where}:\n"
        + up_to_five([f"{name}: {opened[name].dtype} [0]" for name in names])
    )


def explain_factors(model: Checkpoint, names: Iterable[str]) -> str | None:
    """Return what to say where some of the `names` of a model are factors of LoRA, else None."""
    factors = [name for name in names if FACTOR.search(name)]
    if not factors:
        return None
    inner = [name for name, kind in find_inside(model.place) if kind == "a PEFT adapter"]
    saved = f" (name {inner[0]}/, which holds an adapter)" if inner else ""
    said = f" ({LORA_META} beside them says both)" if LORA_META in model.place.files else ""
    return (
        f"{model.ref}: factors of LoRA, which are no weights of a model, and no {ADAPTER_CONFIG}"
        f" beside them, without which nobody knows how they are scaled: put it there, with the rank"
        f" (r) and lora_alpha of the training{said}, or take the adapter that PEFT saved{saved}:\n"
        f"{up_to_five(factors)}"
    )


def kind_of_file(metadata: Mapping[str, Any]) -> str | None:
    """Return what skillvec wrote: "vector", "vector shard", "merged"; None for files of others."""
    try:
        entry = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, RecursionError, TypeError):
        return None
    kind = entry.get("kind") if isinstance(entry, dict) else None
    return kind if isinstance(kind, str) else None


def reopen(
    given: str | os.PathLike[str] | Checkpoint | None,
    ref: str,
    role: str,
    left_out: LeftOut = nothing_left_out,
) -> Checkpoint:
    """Open the model that is given, else the one that a record names; errors as of `relocate`."""
    place = relocate(ref, role, f"--{role}") if given is None else given
    return open_checkpoint(place, role, left_out)


def open_tensors(ref: str | os.PathLike[str] | Place, role: str) -> Checkpoint:
    """Open files of any meaning: a model, an adapter or a vector; nothing is dequantised."""
    place = ref if isinstance(ref, Place) else locate(ref, role)
    what = f"{role} {place.ref}"
    opened = open_place(place, what)
    if not opened.is_safetensors:  # a pickle may call a tensor what no header can
        for name in opened.tensors:
            if type(name) is not str or name == "__metadata__" or NOT_TEXT.search(name):
                raise FormatError(f"{what}: a tensor is called {name!r:.80}, which is no name")
    files = {path for spec in opened.tensors.values() for path in files_of(spec)}
    return Checkpoint(place, replace(opened, seen=witnessed(files)), opened.formats)
