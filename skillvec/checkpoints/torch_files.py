"""Files of torch.save as addresses: zip archives of an object tree and its storages.

Every address is checked to lie in its record of the archive; data is never read here. Refused:
files of torch before 1.6 (no archive), TorchScript, compressed or encrypted records, big-endian
data. A model is a dict of tensors, itself or wrapped, in one file or the shards of an index.
"""

import io
import struct
from collections.abc import Sequence
from typing import Any

from skillvec.checkpoints.folder import PICKLES, list_shards, read_index
from skillvec.checkpoints.opened import PICKLED, Found, Opened
from skillvec.checkpoints.pickles import (
    ADVICE,
    MAX_PICKLE_NBYTES,
    STORAGES,
    Record,
    Storage,
    Stored,
    brief,
    load_pickle,
)
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    only_here,
    printable,
    up_to_five,
    up_to_five_each,
)
from skillvec.files.file import file_nbytes, read_bytes, remote_of
from skillvec.files.header import ITEMSIZE, seems
from skillvec.files.tensors import Source

STORED = 0  # of zip: not compressed
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
IN_FOLDERS = (PICKLED, "adapter_model.bin")  # whose names say that they are what is meant
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # around a model's tensors


def has_pickles(found: Found) -> bool:
    return PICKLES[1] in found.files or any(name in found.names for name in IN_FOLDERS)


def open_pickled(found: Found) -> Opened:
    """Open a pickled model: one file, or the shards that an index lists.

    Raises FormatError for broken files, IncompatibleError for what is not taken.
    """
    if found.is_file or PICKLES[1] not in found.files:
        name = next((name for name in IN_FOLDERS if name in found.names), found.names[0])
        return _open_files(found, [name], found.notes)
    weight_map, _ = read_index(found.files[PICKLES[1]])
    opened = _open_files(found, list_shards(found.files, weight_map, found.what), ())
    alone = only_here(opened.tensors, weight_map, "the shards")
    alone |= only_here(weight_map, opened.tensors, "the index")
    if any(alone.values()):
        raise FormatError(f"{found.what}: index and shards disagree:\n{up_to_five_each(alone)}")
    return opened


def _open_files(found: Found, names: Sequence[str], notes: tuple[str, ...]) -> Opened:
    addresses = [found.files[name] for name in names]
    remotes = [remote_of(address) for address in addresses]
    if any(remote is not None and remote.local is None for remote in remotes):
        raise IncompatibleError(
            f"{found.what}: pickled weights that are not on this disk: a pickle has no header to"
            " read ahead; download it first (`hf download`, `aws s3 cp`), then name the folder"
        )
    tensors = open_pickles(addresses, found.what)
    return Opened(tensors, format=PICKLED, notes=notes, index=PICKLES[1])


def open_pickles(paths: Sequence[str], what: str) -> dict[str, Source]:
    """Open a pickled model, one file or all its shards, as name -> source in file order.

    `what` names the model in errors. Takes a dict of tensors, also under one of `WRAPPERS`. Raises
    FormatError for a broken file, IncompatibleError for what is not taken.
    """
    tensors: dict[str, Source] = {}
    for path in paths:
        for name, value in state_dict(load_archive(path), f"{what}: {path}").items():
            if not isinstance(value, Stored):
                raise IncompatibleError(
                    f"{what}: {path}: {name!r} is a shard of a tensor ({value.name}): give the"
                    " folder that holds the files of all ranks"
                )
            if name in tensors:
                raise FormatError(f"{what}: {path}: tensor {name!r} stands in another shard too")
            tensors[name] = value.source(name)
    return tensors


def is_tensor(value: Any) -> bool:
    """Return whether a value of a tree is a tensor, or a shard of a distributed one."""
    return isinstance(value, Stored) or (
        isinstance(value, Record) and value.name.endswith((".DTensor", ".ShardedTensor"))
    )


def state_dict(tree: Any, where: str) -> dict[str, Any]:
    """Return the one dict of tensors in a tree: the tree itself, or what `WRAPPERS` lead to."""
    for _ in range(4):
        if not isinstance(tree, dict):
            break
        if any(map(is_tensor, tree.values())):
            wrong = [
                f"{key!r}: {getattr(value, 'name', type(value).__name__)}"
                for key, value in tree.items()
                if type(key) is not str or not is_tensor(value)
            ]
            if wrong:
                what = "entries beside the tensors that are none"
                raise IncompatibleError(f"{where}: {what}:\n{up_to_five(wrong)}\n{ADVICE}")
            return tree
        inner = [key for key in WRAPPERS if isinstance(tree.get(key), dict) and tree[key]]
        if len(inner) > 1:
            raise IncompatibleError(f"{where}: which of {inner} is the model? {ADVICE}")
        if not inner:
            break
        tree = tree[inner[0]]
    found = [repr(key) for key in tree] if isinstance(tree, dict) else [type(tree).__name__]
    raise IncompatibleError(
        f"{where}: expected a dict of tensors, itself or under one of {', '.join(WRAPPERS)};"
        f" found:\n{printable(up_to_five(found))}"
    )


# ------------------------------------------------------------------------------------ archives


class _Range(io.RawIOBase):
    """A range of a file as a file: archives of torch stand inside others."""

    def __init__(self, path: str, begin: int, nbytes: int) -> None:
        self.path, self.begin, self.nbytes, self.at = path, begin, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.nbytes)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        if len(buffer) > MAX_PICKLE_NBYTES:  # zipfile reads a directory of any size at once
            raise ValueError(f"a directory of {len(buffer)} bytes")
        wanted = max(0, min(len(buffer), self.nbytes - self.at))
        content = read_bytes(self.path, self.begin + self.at, wanted)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


class _Archive:
    """The records of a zip archive in a range of a file, each checked to lie in it as it is."""

    def __init__(self, path: str, begin: int, nbytes: int) -> None:
        import zipfile

        self.path, self.begin, self.nbytes = path, begin, nbytes
        try:
            with zipfile.ZipFile(io.BufferedReader(_Range(path, begin, nbytes))) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile lets struct's errors and others through
            raise FormatError(f"{path}: not a readable archive: {error}; truncated?") from None
        names = [entry.filename for entry in entries]
        roots = [n[:-8] for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(roots) != 1 or len(set(names)) != len(names):
            raise FormatError(f"{path}: expected one data.pkl and no record twice in the archive")
        self.records = {entry.filename.removeprefix(roots[0]): entry for entry in entries}

    def place(self, name: str) -> tuple[int, int]:
        """Return where a record begins in the file and its bytes."""
        entry = self.records.get(name)
        if entry is None:
            raise FormatError(f"{self.path}: the archive has no record {name!r}")
        if entry.compress_type != STORED or entry.flag_bits & 0x41:
            raise IncompatibleError(f"{self.path}: {name} is compressed or encrypted: {ADVICE}")
        local = read_bytes(self.path, self.begin + max(0, entry.header_offset), 30)
        if len(local) == 30 and local[:4] == b"PK\3\4":
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
            if entry.header_offset >= 0 and start + entry.file_size <= self.nbytes:
                return self.begin + start, entry.file_size
        raise FormatError(f"{self.path}: {name} does not lie in the archive: truncated?")

    def content(self, name: str) -> bytes:
        """Return a small record."""
        start, nbytes = self.place(name)
        if nbytes > MAX_PICKLE_NBYTES:
            raise FormatError(f"{self.path}: {name} of {nbytes} bytes, over {MAX_PICKLE_NBYTES}")
        return read_bytes(self.path, start, nbytes)

    def storage(self, pid: Any) -> Storage:
        """Return where the storage of a persistent id lies."""
        word, kind, key, _, numel = pid
        dtype = STORAGES.get(getattr(kind, "name", ""))
        if word != "storage" or dtype is None or type(key) is not str or type(numel) is not int:
            raise FormatError(f"{self.path}: a storage of an unknown kind: {brief(pid)}")
        start, nbytes = self.place(f"data/{key}")
        if not 0 <= numel * ITEMSIZE[dtype] <= nbytes:
            raise FormatError(f"{self.path}: storage {key}: {numel} x {dtype} in {nbytes} bytes")
        return Storage(dtype, self.path, start, numel * ITEMSIZE[dtype])


def load_archive(path: str, begin: int = 0, nbytes: int | None = None) -> Any:
    """Return the object tree of what torch.save wrote, to a file or to a range of one.

    dicts, lists, tuples, numbers and strings as they are; a tensor is a `Stored` with its absolute
    address, any other object a `Record`. Reads the pickle and the archive's directory alone.
    Raises FormatError, IncompatibleError; OSError where the file cannot be read.
    """
    size = file_nbytes(path)
    nbytes = size - begin if nbytes is None else nbytes
    if not 0 <= begin <= begin + nbytes <= size:
        raise FormatError(f"{path}: bytes {begin} to {begin + nbytes} of {size}: truncated")
    magic = read_bytes(path, begin, min(4, nbytes))
    if magic[:1] == b"\x80":
        raise IncompatibleError(
            f"{path}: a pickle without an archive (torch before 1.6, or"
            f" _use_new_zipfile_serialization=False): {ADVICE}"
        )
    if magic != b"PK\3\4":
        found = None if begin else seems(path, nbytes)
        what = f", but {found}" if found else f": it begins with {magic!r}"
        if not begin and read_bytes(path, 8, 1) == b"{":
            what = ", but perhaps safetensors: then its name has to end in .safetensors"
        raise FormatError(f"{path}: not an archive of torch.save{what}")
    archive = _Archive(path, begin, nbytes)
    if "constants.pkl" in archive.records:
        raise IncompatibleError(
            f"{path}: a TorchScript module, code with its weights (torch.jit.save): load it with"
            " torch.jit.load and save its state_dict() as safetensors"
        )
    if "byteorder" in archive.records and archive.content("byteorder") != b"little":
        raise IncompatibleError(f"{path}: big-endian data: {ADVICE}")
    return load_pickle(archive.content("data.pkl"), path, archive.storage)
