"""Points: a checkpoint as a read-only mapping from tensor name to where its values come from.

Hides folders, shards, indexes, side files, the Hub, and in which format the weights lie. Reads
headers only. What skillvec cannot take is refused here by name, before any work.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from skillvec.errors import (
    FormatError,
    IncompatibleError,
    SkillvecError,
    UsageError,
    only_here,
    printable,
    up_to_five,
    up_to_five_each,
)
from skillvec.kernels import FLOATS
from skillvec.quantised import LeftOut, dequantised, nothing_left_out, unexplained
from skillvec.sidefiles import ADAPTER_CONFIG as ADAPTER_CONFIG
from skillvec.sidefiles import ADAPTER_WEIGHTS, STATE, STATE_FILE, Made, left_behind
from skillvec.sources import Source, files_of
from skillvec.staging import STAGING_SUFFIX
from skillvec.storage import (
    MAX_HEADER_NBYTES,
    Header,
    Place,
    TensorSpec,
    digest_bytes,
    digest_file_range,
    file_nbytes,
    is_plain_name,
    read_bytes,
    read_header,
    refuse_duplicates,
    refuse_stale,
    remote_of,
    shown,
    witnessed,
)

INDEX = "model.safetensors.index.json"
VECTOR_INDEX = "vector.safetensors.index.json"
SINGLE = "model.safetensors"
LORA_META = "lora_train_meta.json"  # of verl: the rank and alpha of a run
STEP = re.compile(r"global_step(\d{1,18})(?=/|$)")  # a folder of DeepSpeed's
FACTOR = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")  # of LoRA, in a tensor's name
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARDS = (".metadata", "*_optim_states.pt", "model_world_size_*.pt")  # of a training's checkpoint
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# what calls a file a part: `i-of-N`, which is whole where N is 1, and files of ranks
PART = re.compile(
    r"-of-(\d{1,9})\b|^(?:model[-_.])?(?:rank|shard|part|tp|pp)[-_]?\d+(?=[-_.])"
    r"|(?:^|_)[mtp]p_rank_\d|^consolidated\.\d"
)
DEEP, MANY = 3, 1000  # levels below a folder, and folders there, that are looked into for a model
VALUE_HEAD = re.compile(r"(^|\.)(v_head|value_head)\.")
MAX_HEAD_NBYTES = 1 << 24  # of a pickle that is looked into for no more than a head of values
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
FOREIGN = {
    ".h5": "TensorFlow weights: load them with transformers (from_tf=True), then save_pretrained",
    ".msgpack": "Flax weights: load them with transformers (from_flax=True), then save_pretrained",
    ".onnx": "an ONNX graph for inference: use the checkpoint that it was exported from",
    ".npz": "numpy arrays: save them by safetensors.numpy.save_file under the model's names",
    ".nemo": "a NeMo archive: export it to Hugging Face format with NeMo first",
}
GGUF = ".gguf"
QUANTO = "quanto_qmap.json"  # of optimum-quanto: which module it quantised, and how
# how names of files end, not of repositories
FILES = (".safetensors", GGUF, *PICKLE_SUFFIXES, *FOREIGN)


@dataclass(frozen=True)
class Opened:
    """What lies behind a reference: tensors, where from, and what there is to say of it."""

    tensors: Mapping[str, Source]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "safetensors"
    side: Path | None = None  # the folder of config and tokenizer, where it is not the place itself
    notes: tuple[str, ...] = ()
    seen: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # states of its files
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # metadata by file
    formats: Mapping[str, str] = field(default_factory=dict)  # how tensors are stored, as notes say


class Checkpoint(Mapping[str, Source]):
    """A model: tensor name -> Source in file order, with its config and side files.

    `ref` is what the user wrote, `path` the resolved folder or file, `metadata` the header
    metadata of the first weight file. `kind` names the format, `formats` how tensors are stored
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
            f"checkpoint + {type(other).__name__}: two points have no sum; to add a vector use"
            " skillvec.apply(checkpoint, vector, output)"
        )

    __radd__ = __add__

    @property
    def kind(self) -> str:
        return self.opened.kind

    @property
    def is_plain(self) -> bool:
        """Whether every tensor lies in a safetensors file as it is."""
        return self.kind == "safetensors" and all(
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
            "revision": self.place.revision, "format": self.kind, "stored": stored,
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

        From config and headers. Imports transformers, if it is installed, where the default of a
        class decides, or what it makes of configs within. A head that is stored although the config
        ties it stays its own if its values differ: that is not known from headers.
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
        sources = {INDEX, PICKLES[1]} if self.kind == PICKLES[0] else {INDEX}
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
        if _is_listed(self.place):
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


def _parsed(file: str) -> Any:
    """Return what a JSON file holds; ValueError where it is none, or longer than any header."""
    nbytes = file_nbytes(file)
    if nbytes > MAX_HEADER_NBYTES:
        raise ValueError(f"{nbytes} bytes, over the cap of {MAX_HEADER_NBYTES}")
    return json.loads(read_bytes(file, 0, nbytes), object_pairs_hook=refuse_duplicates)


def read_json(file: str) -> dict[str, Any]:
    """Return a JSON object; FormatError where the file holds something else."""
    try:
        content = _parsed(file)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


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
    empty = placeholders(opened)
    weights = [opened[name].shape for name in opened if name.endswith(".weight")]
    if (0,) in weights and (2 * weights.count((0,)) > len(weights) or max(map(len, weights)) < 2):
        raise IncompatibleError(f"{role} {empty_weights(opened, empty)}")
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


def is_adapter(place: Place) -> bool:
    """Return whether a folder holds a PEFT adapter, and no weights of a model beside it."""
    if place.member is not None or ADAPTER_CONFIG not in place.files:
        return False
    return not (SINGLE in place.files or INDEX in place.files or _model_beside(place))


def _model_beside(place: Place) -> list[str]:
    """Return files beside an adapter's that hold a model: pickles, other safetensors, by name.

    Other safetensors without a factor of LoRA; an adapter may lie in a file of another name. A head
    of values alone, which trainers of PPO keep beside the adapter, is no model.
    """
    own = [name for name in ADAPTER_WEIGHTS if name in place.files]
    heads = heads_beside(place)
    found = [name for name in PICKLES if name in place.files and own and name not in heads]
    for name, address in sorted(place.files.items()):
        other = name.endswith(".safetensors") and "/" not in name and name not in own
        if other and name not in heads and not STATE_FILE.fullmatch(name):
            with contextlib.suppress(FormatError):
                found += [] if any(map(FACTOR.search, read_header(address).tensors)) else [name]
    return found


def heads_beside(place: Place) -> list[str]:
    """Return the files at the top of an adapter's folder that hold heads of values and no more.

    TRL saved one as pytorch_model.bin, LLaMA-Factory does as value_head.safetensors or .bin.
    """
    found = []
    for name, address in place.files.items():
        tensors: Iterable[str] = ()
        with contextlib.suppress(SkillvecError):
            if name.endswith(".safetensors") and "/" not in name:
                tensors = read_header(address).tensors
            elif (
                name in (PICKLES[0], "value_head.bin")
                and not is_away(address)
                and _is_small(address)
            ):
                tensors = _open_pickles([address], name).tensors
        names = [tensor for tensor in tensors if type(tensor) is str]
        found += [name] if names and all(map(VALUE_HEAD.search, names)) else []
    return sorted(found)


def _is_small(address: str) -> bool:
    return file_nbytes(address) <= MAX_HEAD_NBYTES


def placeholders(model: Mapping[str, Source]) -> list[str]:
    """Return the names of floating-point tensors of shape [0], which stand for weights elsewhere.

    ZeRO-3 leaves them in a state dict that was not gathered.
    """
    return [name for name, spec in model.items() if spec.shape == (0,) and spec.dtype in FLOATS]


def empty_weights(opened: Checkpoint, names: Sequence[str]) -> str:
    """Return what to say of a checkpoint whose weights are placeholders, and where they may be."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    steps = _steps([*os.listdir(folder), *opened.place.files])
    if not steps and not STEP.match(folder.name):  # of an adapter in a folder below the run's
        steps = [f"../{name}" for name in _steps(os.listdir(folder.parent))]
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


def lone_factors(model: Checkpoint, names: Iterable[str]) -> str | None:
    """Return what to say where some of the `names` of a model are factors of LoRA, else None."""
    factors = [name for name in names if FACTOR.search(name)]
    if not factors:
        return None
    inner = [name for name, kind in _inside(model.place) if kind == "a PEFT adapter"]
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


def locate(ref: str | os.PathLike[str], role: str) -> Place:
    """Return where a reference leads; what exists on this disk comes before the Hub.

    URLs but hf:// are those of object stores.
    """
    from skillvec import hub, objects

    text = os.fspath(ref)
    try:
        text.encode()
    except UnicodeEncodeError:  # it could not stand in a manifest
        raise UsageError(f"{role} {text!r}: a path that is no valid UTF-8: rename it") from None
    if objects.is_reference(text):
        return objects.locate(text, role)
    try:
        path = Path(text).expanduser()
        there = path.exists()
    except (RuntimeError, OSError) as error:  # ~ of nobody; a name longer than the system takes
        raise UsageError(f"{role} {text:.200}: {str(error)[:200]}") from None
    if there:
        path = path.resolve()
        files = {entry.name: entry.path for entry in os.scandir(path)} if path.is_dir() else {}
        # written as a commit of the Hub, and none: a record must not say that it is
        return Place(f"./{text}" if hub.is_recorded(text) else text, path, files)
    if Path(text).suffix in FILES and not text.startswith(hub.SCHEME):
        raise UsageError(f"{role} {text}: no such file")
    if not hub.is_reference(text):
        raise UsageError(f"{role} {text}: no such file or folder")
    try:
        return hub.locate(text, role)
    except SkillvecError as error:
        if text.startswith("hf://"):
            raise
        raise type(error)(f"{error}\n(nor is {text} a file or folder of this disk)") from None


def relocate(ref: str, role: str, option: str = "") -> Place:
    """Return where a reference leads that stands in a record: a manifest, a recipe.

    What was read of the Hub is recorded with its commit; what names none was of this disk, and the
    Hub is never asked for it: `runs/sft` may be the name of a stranger's model. `option` is how to
    say where it is now. Raises UsageError where it is not there, else as `locate`.
    """
    from skillvec import hub, objects

    if hub.is_recorded(ref):
        return hub.locate(ref, role)
    path = os.path.expanduser(ref)
    if objects.is_reference(ref) or os.path.exists(path):
        return locate(ref, role)
    seen = "" if os.path.isabs(path) else ", seen from the folder in which that command ran"
    advice = f"say with {option} where it is now" if option else "put it there again"
    raise UsageError(
        f"{role} {printable(ref):.300}: no such file or folder; it was recorded as one of the disk"
        f"{seen}: {advice}"
    )


def reopen(
    given: str | os.PathLike[str] | Checkpoint | None,
    ref: str,
    role: str,
    left_out: LeftOut = nothing_left_out,
) -> Checkpoint:
    """Open the model that is given, else the one that a record names; errors as of `relocate`."""
    place = relocate(ref, role, f"--{role}") if given is None else given
    return open_checkpoint(place, role, left_out)


def _is_listed(place: Place) -> bool:
    """Return whether `files` is all that a place holds: on the Hub, in an object store."""
    from skillvec import objects

    return place.revision is not None or objects.is_reference(place.ref)


def open_tensors(ref: str | os.PathLike[str] | Place, role: str) -> Checkpoint:
    """Open files of any meaning: a model, an adapter or a vector; nothing is dequantised."""
    place = ref if isinstance(ref, Place) else locate(ref, role)
    what = f"{role} {place.ref}"
    if place.member is not None:
        opened = _open_file(place.files[place.member], place.member, what)
    elif place.path.is_dir():
        opened = _open_folder(place, what)
    else:
        opened = _open_file(os.fspath(place.path), os.fspath(place.ref), what)
    if opened.kind != "safetensors":  # a pickle may call a tensor what no header can
        for name in opened.tensors:
            if type(name) is not str or name == "__metadata__" or NOT_TEXT.search(name):
                raise FormatError(f"{what}: a tensor is called {name!r:.80}, which is no name")
    files = {path for spec in opened.tensors.values() for path in files_of(spec)}
    return Checkpoint(place, replace(opened, seen=witnessed(files)), opened.formats)


def _open_file(address: str, name: str, what: str) -> Opened:
    # a link's own name tells nothing: Hub caches link to blobs named by hash
    short, suffix = Path(name).name, Path(name).suffix
    if suffix in PICKLE_SUFFIXES:
        return replace(_open_pickles([address], what), notes=_one_of_several(short))
    if suffix == GGUF:
        return _open_gguf(address, what)
    if suffix in FOREIGN:
        raise IncompatibleError(f"{what}: {FOREIGN[suffix]}")
    return _of_headers({short: read_header(address)}, what, _one_of_several(short))


def _of_headers(headers: Mapping[str, Header], what: str, notes: tuple[str, ...] = ()) -> Opened:
    """Return what safetensors files hold, by name: tensors, or the parts of ranks put together."""
    from skillvec.trainingshards import is_of_ranks, of_ranks

    metadata = next(iter(headers.values())).metadata
    if is_of_ranks(headers):
        made = of_ranks(headers, what)
        metadata = {key: said for key, said in metadata.items() if not key.startswith("DCP_")}
        return Opened(made.tensors, metadata, made.kind, notes=(*notes, *made.notes))
    tensors: dict[str, Source] = {}
    labels: dict[str, dict[str, str]] = {}
    for header in headers.values():
        tensors |= header.tensors
        labels |= {spec.path: header.metadata for spec in header.tensors.values()}
    return Opened(tensors, metadata, notes=notes, labels=labels)


def _one_of_several(name: str) -> tuple[str, ...]:
    """Return a note where the name of a file says that it is a part of a model."""
    found = PART.search(name)
    if found is None or (found[1] and int(found[1]) < 2):
        return ()
    return (f"{name}: by its name one part of several: what lies in the others is left out",)


def _open_pickles(addresses: list[str], what: str) -> Opened:
    from skillvec.pickles import open_pickles

    remotes = [remote_of(address) for address in addresses]
    if any(remote is not None and remote.local is None for remote in remotes):
        raise IncompatibleError(
            f"{what}: pickled weights that are not on this disk: a pickle has no header to read"
            " ahead; download it first (`hf download`, `aws s3 cp`), then name the folder"
        )
    return Opened(open_pickles(addresses, what), kind=PICKLES[0])


def _open_gguf(address: str, what: str) -> Opened:
    from skillvec.gguffile import open_gguf

    found = open_gguf(address, what)
    return Opened(found.tensors, kind="GGUF", formats=found.formats)


def is_away(address: str) -> bool:
    """Return whether a file has to be fetched before it is read; ranged ones need not."""
    remote = remote_of(address)
    return remote is not None and remote.local is None and not remote.ranged


def _open_folder(place: Place, what: str) -> Opened:
    files = place.files
    if VECTOR_INDEX in files:
        raise IncompatibleError(f"{what}: this is a skill vector, expected a model")
    if INDEX in files:
        weight_map, _ = read_index(files[INDEX])
        if SINGLE in files and SINGLE not in weight_map.values():
            raise FormatError(f"{what}: holds both {SINGLE} and {INDEX} over other files: which?")
        return _open_shards(files, weight_map, what)
    single, notes = [SINGLE] if SINGLE in files else [], _finer(files)
    here = sorted(name for name in files if "/" not in name)  # not in folders below, as on a disk
    if ADAPTER_CONFIG in files:
        own = [name for name in here if name in ADAPTER_WEIGHTS]
        adapter = is_adapter(place) and own
        here = own if adapter else [name for name in here if name not in own]
        beside = heads_beside(place) if adapter else []
        notes += tuple(f"{name}: a head of values beside the adapter, left out" for name in beside)
    single = single or [name for name in here if name.endswith(".safetensors")]
    if len(single) == 1:
        opened = _of_headers({single[0]: read_header(files[single[0]])}, what, notes)
        if _one_of_several(single[0]):
            raise FormatError(
                f"{what}: {single[0]} alone, by its name one part of several, and no {INDEX}: copy"
                " or download the model whole; if this part is what is meant, name the file"
            )
        return opened
    if single:
        opened = _of_headers({name: read_header(files[name]) for name in single}, what)
        if opened.kind != "safetensors":
            return opened
        also = f" {ADAPTER_CONFIG} lies there too: an adapter is" if ADAPTER_CONFIG in files else ""
        also = also and f"{also} used where no model is beside {ADAPTER_WEIGHTS[0]}."
        raise FormatError(
            f"{what}: {len(single)} safetensors files and no {INDEX}: which tensors are the model?"
            f"{also}\n{up_to_five(single)}"
        )
    from skillvec.trainingshards import open_training

    training = None if _is_listed(place) else open_training(place.path, what)
    if training is not None:
        return Opened(
            training.tensors, kind=training.kind, side=training.side, notes=tuple(training.notes)
        )
    if PICKLES[1] in files:
        weight_map, _ = read_index(files[PICKLES[1]])
        return _open_pickle_shards(files, weight_map, what)
    found = [name for name in here if name.endswith(PICKLE_SUFFIXES)]
    if PICKLES[0] in found or "adapter_model.bin" in found:
        name = PICKLES[0] if PICKLES[0] in found else "adapter_model.bin"
        return replace(_open_pickles([files[name]], what), notes=notes)
    gguf = [name for name in here if name.endswith(GGUF)]
    if len(gguf) == 1:
        return _open_gguf(files[gguf[0]], f"{what}: {gguf[0]}")
    if gguf:
        raise UsageError(f"{what}: no {SINGLE}; name the GGUF that is meant:\n{up_to_five(gguf)}")
    for name in here:
        if Path(name).suffix in FOREIGN:
            raise IncompatibleError(
                f"{what}: no safetensors, but {name}: {FOREIGN[Path(name).suffix]}"
            )
    inner = [f"{name}/: {kind}" for name, kind in _inside(place)]
    if inner:
        raise UsageError(
            f"{what}: no {SINGLE} and no {INDEX} in this folder; "
            + ("download and name" if _is_listed(place) else "name")
            + f" the one in it that is meant:\n{up_to_five(inner)}"
        )
    if ADAPTER_CONFIG in files:
        raise UsageError(f"{what}: {ADAPTER_CONFIG}, but no adapter_model.safetensors beside it")
    if found:
        raise IncompatibleError(f"{what}: no {SINGLE}, but {found[0]}: name the file that is meant")
    raise UsageError(f"{what}: no {SINGLE} and no {INDEX} in this folder")


def _inside(place: Place) -> list[tuple[str, str]]:
    """Return the folders in a folder that hold an adapter, a vector or a model, and which it is."""
    held: dict[str, list[str]] = defaultdict(list)
    for name in place.files:  # of the Hub and of stores: names with slashes
        folder, slash, file = name.rpartition("/")
        if slash and folder.count("/") < DEEP:
            held[folder].append(file)
    if not _is_listed(place) and place.path.is_dir():
        held |= _folders_of(place.path)
    kinds = {ADAPTER_CONFIG: "a PEFT adapter", VECTOR_INDEX: "a skill vector"}
    kinds |= dict.fromkeys((SINGLE, INDEX, *PICKLES, *SHARDS), "a model")
    found = [(name, [k for g, k in kinds.items() if fnmatch.filter(held[name], g)])
             for name in held]  # fmt: skip
    return sorted((name, kind[0]) for name, kind in found if kind)


def _folders_of(path: Path) -> dict[str, list[str]]:
    """Return what lies in the folders below one, by their names; not hidden ones, nor very many."""
    held: dict[str, list[str]] = {}
    level = [""]
    for _ in range(DEEP):
        inner = []
        for above in level:
            with os.scandir(path / above) as entries:
                names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
            for name in sorted(names)[: MANY - len(held)]:
                folder = f"{above}/{name}" if above else name
                with contextlib.suppress(OSError):  # not to be read
                    held[folder] = os.listdir(path / folder)
                    inner.append(folder)
        level = inner
    return held


def _steps(names: Iterable[str]) -> list[str]:
    """Return the folders of DeepSpeed's steps among names of files, the last step last."""
    found = {match[0]: int(match[1]) for name in names if (match := STEP.match(name))}
    return sorted(found, key=lambda name: found[name])


def _finer(files: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note where a trainer kept fp32 weights beside those that it rounded."""
    shards = _steps(files)
    return tuple(
        f"{name}/ holds DeepSpeed's fp32 weights, which keep what this model's dtype rounds away:"
        " name that folder to read them"
        for name in shards[-1:]
    )


def _shard_names(files: Mapping[str, str], weight_map: Mapping[str, str], what: str) -> list[str]:
    """Return the names of the shards that an index lists; FormatError where some are missing."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in files or not is_there(files[name])]
    if missing:
        raise FormatError(
            f"{what}: shards named by the index are missing; copy or download the model again,"
            f" whole:\n{up_to_five(missing)}"
        )
    return names


def _open_pickle_shards(
    files: Mapping[str, str], weight_map: Mapping[str, str], what: str
) -> Opened:
    opened = _open_pickles([files[name] for name in _shard_names(files, weight_map, what)], what)
    alone = only_here(opened.tensors, weight_map, "the shards")
    alone |= only_here(weight_map, opened.tensors, "the index")
    if any(alone.values()):
        raise FormatError(f"{what}: index and shards disagree:\n{up_to_five_each(alone)}")
    return opened


def read_index(index: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the weight map, tensor name to plain file name, and the metadata of an index."""
    try:
        content = _parsed(index)
        weight_map, metadata = content["weight_map"], content.get("metadata")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{index}: no readable weight_map: {error!r:.200}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is not a map of tensor names to files")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise FormatError(
                f"{index}: tensor {name!r:.200} is said to lie in {file!r:.200}, no plain file"
                " name in this folder"
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _open_shards(files: Mapping[str, str], weight_map: Mapping[str, str], what: str) -> Opened:
    headers = {name: read_header(files[name]) for name in _shard_names(files, weight_map, what)}
    opened = _of_headers(headers, what, _finer(files))
    problems = defaultdict(list)
    for file, header in headers.items():
        for name in header.tensors:
            apart = name in weight_map and opened.kind != "safetensors"  # in the file of each rank
            if weight_map.get(name) == file or apart:
                continue
            said = weight_map.get(name, "not in the index")
            kind = "of another file" if name in weight_map else said
            problems[kind].append(f"{name}: found in {file}, index: {said}")
    for name, file in weight_map.items():
        if name not in opened.tensors:
            problems["not in the shards"].append(f"{name}: not in {file}")
    if problems:
        raise FormatError(f"{what}: index and shards disagree:\n{up_to_five_each(problems)}")
    return opened


def is_there(address: str) -> bool:
    return remote_of(address) is not None or os.path.isfile(address)
