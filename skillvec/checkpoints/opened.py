"""What every checkpoint format gives: the contract between openers and those who use checkpoints.

An opener sees a place as `Found` and returns `Opened`; `checkpoints.opened_by` lists all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from skillvec.files.tensors import Source

SAFETENSORS, PICKLED, PATCHED = "safetensors", "pytorch_model.bin", "patch"  # names of formats


@dataclass(frozen=True)
class Opened:
    """What lies behind a reference: tensors, where from, and what there is to say of it."""

    tensors: Mapping[str, Source]
    metadata: dict[str, str] = field(default_factory=dict)
    format: str = SAFETENSORS  # as reports name it
    side: Path | None = None  # the folder of config and tokenizer, where it is not the place itself
    notes: tuple[str, ...] = ()
    seen: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # states of its files
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # metadata by file
    formats: Mapping[str, str] = field(default_factory=dict)  # how tensors are stored, as notes say
    index: str | None = None  # the index of its files, where it is not that of safetensors

    @property
    def is_safetensors(self) -> bool:
        """Whether every file is safetensors, and holds tensors as the model has them."""
        return self.format == SAFETENSORS

    @property
    def is_loadable(self) -> bool:
        """Whether it lies in files that from_pretrained loads, so that a config is of them."""
        return self.format in (SAFETENSORS, PICKLED)


@dataclass(frozen=True)
class Found:
    """What an opener sees of a place; `what` names the model in errors.

    `files` are all files by name, on the Hub and in stores also those below, with slashes. `names`
    are those at the top that may hold the weights that are meant; of one file its own. `folder` is
    None of one file, and of what does not lie on this disk.
    """

    what: str
    files: Mapping[str, str]
    names: list[str]
    folder: Path | None = None
    is_file: bool = False
    notes: tuple[str, ...] = ()

    def ending(self, *suffixes: str) -> list[str]:
        """Return those of `names` that end so."""
        return [name for name in self.names if name.endswith(suffixes)]


class Opener(NamedTuple):
    """A checkpoint format: by which names it is known, and what opens it.

    `suffixes` are those of its single files; `is_in` says whether a folder holds it. `open` reads
    headers, indexes and pickles alone. It raises FormatError for what is broken,
    IncompatibleError for what is not taken, UsageError where a choice is the user's.
    """

    name: str
    suffixes: tuple[str, ...]
    is_in: Callable[[Found], bool]
    open: Callable[[Found], Opened]

    def takes(self, found: Found) -> bool:
        if found.is_file:
            return Path(found.names[0]).suffix in self.suffixes
        return self.is_in(found)
