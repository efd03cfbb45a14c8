"""Crash campaign: runs are killed, starved and unplugged at every moment, then given once more.

Every attempt is a process forked from one that has imported everything. In it, what touches the
output's folder goes through a `Tap`: it counts the calls, makes one of them fail, kill or lie, and
keeps beside the folder what a power failure would leave of it (`Disk`). After each attempt the
output is the old one, the new one or none; the same command then gives the bytes of a run that
nothing disturbed, or refuses by name what was tampered with.

`python tests/campaigns/torture.py --points 10000` runs the long form; test_torture.py has a short
one.
"""

import argparse
import builtins
import errno
import io
import json
import os
import pickle
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # forks lose threads

import numpy as np

from skillvec import verbs
from skillvec.engine import runner, threads
from skillvec.engine.jobs.measure import MeasureJob
from skillvec.errors import SkillvecError
from skillvec.files import staging
from skillvec.files.journal import JOURNAL, OWNER

UNFINISHED, NEIGHBOUR = ".skillvec-unfinished", "neighbour.txt"
# What puts bytes or names on the disk, and what only looks; a mount that is lost refuses both.
WRITES = ("mkdir", "open", "posix_fallocate", "pwrite", "ftruncate", "fsync", "rename", "exchange",
          "unlink", "rmdir", "chmod")  # fmt: skip
LOOKS = ("close", "read", "preadv", "stat", "lstat", "fstat", "scandir", "listdir")
SECONDS = 120  # for one attempt: beyond, it hangs


# ------------------------------------------------------------------------- what power loss leaves


class File:
    """The bytes of a file that are on the disk, and what was written since, not yet fsynced."""

    def __init__(self, kept: bytes = b"") -> None:
        self.kept = kept
        self.pending: list[tuple[int, bytes | None]] = []  # offset and bytes; a size and None

    def sync(self) -> None:
        content = bytearray(self.kept)
        for at, data in self.pending:
            _put(content, at, data)
        self.kept, self.pending = bytes(content), []

    def left(self, rng: random.Random, how: str) -> bytes:
        """Return what a power failure leaves: of sectors not yet on the disk none, all or some."""
        content, sector = bytearray(self.kept), rng.choice((512, 4096))
        for at, data in self.pending if how != "none" else ():
            if how == "all" or data is None:
                if how == "all" or rng.random() < 0.5:
                    _put(content, at, data)
                continue
            for begin in range(at - at % sector, at + len(data), sector):
                low, high = max(begin, at), min(begin + sector, at + len(data))
                if rng.random() < 0.5:
                    _put(content, low, data[low - at : high - at])
                elif rng.random() < 0.3 and high > len(self.kept):  # allocated, never written
                    _put(content, low, rng.randbytes(high - low))
        return bytes(content)


def _put(content: bytearray, at: int, data: bytes | None) -> None:
    """Write `data` at an offset, or without any set the size."""
    if data is None:
        del content[at:]
    content.extend(bytes(max(at - len(content), 0)))
    if data is not None:
        content[at : at + len(data)] = data


class Folder:
    """The names of a folder that are on the disk, and those that are there now."""

    def __init__(self) -> None:
        self.kept: dict[str, File | Folder] = {}
        self.live: dict[str, File | Folder] = {}


Node = File | Folder


class Change(NamedTuple):
    """A change of names that is not on the disk before `folder` is fsynced; whole or not at all."""

    folder: Folder
    effects: list[tuple[Folder, str, Node, bool]]  # where, name, what, whether it is there then

    def apply(self) -> None:
        for folder, name, node, there in self.effects:
            if there:
                folder.kept[name] = node
            elif folder.kept.get(name) is node:
                del folder.kept[name]


class Disk:
    """What of a folder would survive a power failure.

    POSIX promises bytes after fsync of their file and names after fsync of their folder, and no
    order between them. A rename is taken as atomic, as file systems with journals make it.
    """

    def __init__(self, place: str) -> None:
        self.root, self.changes = self._scanned(place), list[Change]()

    def _scanned(self, path: str) -> Folder:
        folder = Folder()
        for entry in os.scandir(path):
            node = self._scanned(entry.path) if entry.is_dir() else File(_content(entry.path))
            folder.kept[entry.name] = folder.live[entry.name] = node
        return folder

    def find(self, parts: Sequence[str]) -> Node | None:
        node: Node | None = self.root
        for part in parts:
            node = node.live.get(part) if isinstance(node, Folder) else None
        return node

    def folder(self, parts: Sequence[str]) -> Folder:
        found = self.find(parts)
        assert isinstance(found, Folder), parts
        return found

    def change(self, at: Folder, *effects: tuple[Folder, str, Node, bool]) -> None:
        for folder, name, node, there in effects:
            if there:
                folder.live[name] = node
            elif folder.live.get(name) is node:
                del folder.live[name]
        self.changes.append(Change(at, list(effects)))

    def sync(self, node: Node) -> None:
        if isinstance(node, File):
            node.sync()
            return
        for number, change in enumerate(self.changes):
            if change.folder is node:
                change.apply()
                for earlier in self.changes[:number]:  # a name that is gone does not come back
                    for effect in change.effects:
                        if not effect[3] and (*effect[:3], True) in earlier.effects:
                            earlier.effects.remove((*effect[:3], True))
        self.changes = [change for change in self.changes if change.folder is not node]

    def cut(self, place: str, rng: random.Random) -> None:
        """Leave in `place` what would be there after the power came back."""
        names, count = rng.choice(("none", "first", "some", "all")), len(self.changes)
        first = rng.randrange(count + 1)
        for number, change in enumerate(self.changes):
            there = {"none": False, "all": True, "first": number < first}
            if there.get(names, rng.random() < 0.5):
                change.apply()
        for entry in list(os.scandir(place)):
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        how = rng.choice(("none", "all", "torn", "torn"))

        def restore(folder: Folder, path: str) -> None:
            for name, node in folder.kept.items():
                if isinstance(node, Folder):
                    os.mkdir(f"{path}/{name}")
                    restore(node, f"{path}/{name}")
                else:
                    Path(f"{path}/{name}").write_bytes(node.left(rng, how))

        restore(self.root, place)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# ------------------------------------------------------------------------------------ the faults


@dataclass(frozen=True)
class Fault:
    """What goes wrong: at call number `at` of those that `kind` strikes, or all the time."""

    kind: str  # none, kill, power, error, fsync, lost, read, change; short, timer; time, small
    at: int = 0
    code: int = 0
    lasting: bool = False
    power: bool = False  # and the power fails when the run has ended
    seed: int = 0


class Tap:
    """Stands between a run and the system, in a process of its own."""

    def __init__(self, place: Path, fault: Fault, disk: Disk, say: Callable[..., None]) -> None:
        self._place, self._fault, self.disk, self._say = os.fspath(place), fault, disk, say
        self.rng = random.Random(fault.seed)
        self._lock, self._alone = threading.RLock(), 0  # the thread whose calls go past all this
        self.struck, self.reading, self.moments = False, False, 0
        self._fds: dict[int, Node] = {}
        self._inputs: dict[int, str] = {}
        self.outside: list[str] = []

    # which calls are struck

    def _strikes(self, name: str, ours: bool) -> bool:
        kind, kinds = self._fault.kind, WRITES
        if kind == "read":
            return not ours and name in ("preadv", "read")
        if kind == "change":  # before that, it is another input and not one that changed
            return self.reading and not ours and name == "preadv"
        if kind == "fsync":
            kinds = ("fsync",)
        elif kind == "lost":
            kinds = WRITES + LOOKS
        elif kind in ("kill", "power"):
            kinds = (*WRITES, "close")
        return kind in ("kill", "power", "error", "fsync", "lost") and ours and name in kinds

    def _meet(self, name: str, path: str, ours: bool, half: Callable[[], None]) -> None:
        """Count a call that is about to be made; strike if it is the one."""
        if not self._strikes(name, ours):
            return
        fault, number = self._fault, self.moments
        self.moments += 1
        if number < fault.at or (number > fault.at and not fault.lasting):
            return
        self.struck = True
        if fault.kind in ("kill", "power"):
            half()
            self.end(fault.kind == "power")
        if fault.kind == "change":
            with self._real():
                alter(path, self.rng)
            return
        raise OSError(fault.code, os.strerror(fault.code), path or None)

    @contextmanager
    def _real(self) -> Iterator[None]:
        before, self._alone = self._alone, threading.get_ident()
        yield
        self._alone = before

    @property
    def _off(self) -> bool:
        return self._alone == threading.get_ident()

    def end(self, power: bool) -> None:
        """End the process as a kill does, or as a power failure does."""
        with self._real():
            if power:
                self.disk.cut(self._place, self.rng)
                self.disk = Disk(self._place)
            self._say("killed", disk=self.disk)
            os.kill(os.getpid(), signal.SIGKILL)

    # where a call goes

    def _parts(self, path: Any, dir_fd: int | None = None) -> list[str] | None:
        """Return the names below the watched folder that lead to a path; None if it is outside."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        if text != self._place and not text.startswith(self._place + os.sep):
            return None
        return text[len(self._place) :].split(os.sep)[1:]

    def _is_cache(self, path: Any) -> bool:
        """Return whether a path is the Hub client's own."""
        home = os.environ.get("HF_HOME")
        return home is not None and f"{os.fsdecode(path)}/".startswith(f"{home}/")

    def _on_path(self, name: str, real: Callable[..., Any], after: Callable[..., None]) -> Any:
        def wrapped(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            named = named if dir_fd is None else {**named, "dir_fd": dir_fd}
            if self._off:
                return real(path, *rest, **named)
            with self._lock:
                parts = self._parts(path, dir_fd)
                if parts is None:
                    if name in WRITES and not self._is_cache(path):
                        self.outside.append(f"{name} {path}")
                    return real(path, *rest, **named)
                node = self.disk.find(parts)
                self._meet(name, os.path.join(self._place, *parts), True, lambda: None)
                result = real(path, *rest, **named)
                after(parts, node)
                return result

        return wrapped

    def _on_fd(self, name: str, real: Callable[..., Any], after: Callable[..., None]) -> Any:
        def wrapped(fd: int, *rest: Any) -> Any:
            node = self._fds.get(fd)
            if self._off or node is None:
                return real(fd, *rest)
            with self._lock:

                def half() -> None:
                    if name == "pwrite" and self.rng.random() < 0.5:
                        part = rest[0][: len(rest[0]) // 2]
                        real(fd, part, rest[1])
                        after(fd, node, len(part), part, rest[1])

                self._meet(name, "", True, half)
                if name == "pwrite" and self._fault.kind == "short":
                    rest = (rest[0][: self.rng.randint(1, max(len(rest[0]), 1))], rest[1])
                result = real(fd, *rest)
                after(fd, node, result, *rest)
                return result

        return wrapped

    # what the calls do

    def _made(self, parts: list[str], node: Node | None, made: Node) -> None:
        if node is None:
            at = self.disk.folder(parts[:-1])
            self.disk.change(at, (at, parts[-1], made, True))

    def _gone(self, parts: list[str], node: Node | None) -> None:
        assert node is not None, parts
        at = self.disk.folder(parts[:-1])
        self.disk.change(at, (at, parts[-1], node, False))

    def _open(self, real: Callable[..., int]) -> Any:
        def wrapped(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            named = {} if dir_fd is None else {"dir_fd": dir_fd}
            if self._off:
                return real(path, flags, mode, **named)
            with self._lock:
                parts, writes = self._parts(path, dir_fd), flags & (os.O_WRONLY | os.O_RDWR)
                if parts is None:
                    if writes and not self._is_cache(path):
                        self.outside.append(f"open {path}")
                    fd = real(path, flags, mode, **named)
                    self._inputs[fd] = os.fsdecode(path)
                    return fd
                self._meet("open" if writes else "read", os.fsdecode(path), True, lambda: None)
                fd = real(path, flags, mode, **named)
                if flags & os.O_CREAT:
                    self._made(parts, self.disk.find(parts), File())
                node = self.disk.find(parts)
                assert node is not None, parts
                self._fds[fd] = node
                if flags & os.O_TRUNC and isinstance(node, File):
                    node.pending.append((0, None))
                return fd

        return wrapped

    def _close(self, real: Callable[[int], None]) -> Any:
        def wrapped(fd: int) -> None:
            with self._lock:
                node = self._fds.pop(fd, None)
                self._inputs.pop(fd, None)
                lost = self._fault.kind == "lost"
                if node is not None and not self._off and not lost:
                    self._meet("close", "", True, lambda: None)
                real(fd)
                if isinstance(node, File) and not self._off and lost:  # as NFS does; it is closed
                    self._meet("close", "", True, lambda: None)

        return wrapped

    def _fsync(self) -> Any:
        def wrapped(fd: int) -> None:  # the real one would only take time: `disk` says what it does
            node = self._fds.get(fd)
            if self._off or node is None:
                return
            with self._lock:
                try:
                    self._meet("fsync", "", True, lambda: None)
                except OSError:  # the kernel then takes the pages for clean, and never writes them
                    if isinstance(node, File):
                        node.pending = []
                    raise
                self.disk.sync(node)

        return wrapped

    def _preadv(self, real: Callable[..., int]) -> Any:
        def wrapped(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if self._off:
                return real(fd, buffers, offset)
            with self._lock:
                ours = fd in self._fds
                self._meet("preadv", self._inputs.get(fd, ""), ours, lambda: None)
                if self._fault.kind == "short" and len(buffers[0]) > 1:
                    buffers = [buffers[0][: self.rng.randint(1, len(buffers[0]))]]
                return real(fd, buffers, offset)

        return wrapped

    def _builtin_open(self, real: Callable[..., Any]) -> Any:
        def wrapped(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if not self._off and not isinstance(path, int):
                with self._lock:
                    parts = self._parts(path)
                    if mode == "wb" and parts is not None:
                        return _Writing(path)
                    if set(mode) & set("wax+") and not self._is_cache(path):
                        self.outside.append(f"open({path}, {mode})")
                    self._meet("read", os.fsdecode(path), parts is not None, lambda: None)
            return real(path, mode, *rest, **named)

        return wrapped

    def _pair(self, name: str, real: Callable[..., Any]) -> Any:
        def wrapped(source: Any, output: Any) -> Any:
            with self._lock:
                here, there = self._parts(source), self._parts(output)
                if self._is_cache(source) and self._is_cache(output):
                    return real(source, output)
                assert here is not None and there is not None, (source, output)
                self._meet(name, os.fspath(source), True, lambda: None)
                result = real(source, output)
                if name == "exchange" and not result:
                    return result
                one, other = self.disk.find(here), self.disk.find(there)
                assert one is not None
                left, right = self.disk.folder(here[:-1]), self.disk.folder(there[:-1])
                effects = [(left, here[-1], one, False), (right, there[-1], one, True)]
                if name == "exchange":
                    assert other is not None
                    effects.append((left, here[-1], other, True))
                self.disk.change(right, *effects)
                return result

        return wrapped

    def _unwatched(self, name: str, real: Callable[..., Any]) -> Any:
        def wrapped(one: Any, *rest: Any, **named: Any) -> Any:
            if not self._off and not self._is_cache(rest[0] if name == "symlink" else one):
                raise AssertionError(f"os.{name} is not watched here")
            return real(one, *rest, **named)

        return wrapped

    def install(self) -> None:
        """Put everything in place; for a process that ends with the run."""

        def nothing(*arguments: Any) -> None:
            pass

        def written(fd: int, node: Node, count: int, data: Any, offset: int) -> None:
            assert isinstance(node, File)
            node.pending.append((offset, bytes(data[:count])))

        def sized(fd: int, node: Node, result: None, size: int) -> None:
            assert isinstance(node, File)
            node.pending.append((size, None))

        def allocated(fd: int, node: Node, result: None, offset: int, nbytes: int) -> None:
            assert isinstance(node, File)
            node.pending.append((offset + nbytes, b""))

        def made(parts: list[str], node: Node | None) -> None:
            self.reading = True  # the staging folder is there: fingerprints are taken
            self._made(parts, node, Folder())

        for name, after in (("mkdir", made), ("unlink", self._gone), ("rmdir", self._gone)):
            setattr(os, name, self._on_path(name, getattr(os, name), after))
        for name in ("chmod", "stat", "lstat", "scandir", "listdir"):
            setattr(os, name, self._on_path(name, getattr(os, name), nothing))
        for name, after in (("pwrite", written), ("ftruncate", sized),
                            ("posix_fallocate", allocated), ("fstat", nothing)):  # fmt: skip
            setattr(os, name, self._on_fd(name, getattr(os, name), after))
        os.fsync, os.preadv = self._fsync(), self._preadv(os.preadv)
        os.open, os.close = self._open(os.open), self._close(os.close)
        for name in ("replace", "link", "symlink", "truncate"):  # nobody uses them on the output
            setattr(os, name, self._unwatched(name, getattr(os, name)))
        os.rename = self._pair("rename", os.rename)
        staging._exchange = self._pair("exchange", staging._exchange)
        builtins.open = io.open = self._builtin_open(open)
        # these write in C, out of sight: the same with the calls above
        shutil.copyfile = lambda source, output: _written(output, _content(source))
        Path.write_bytes = lambda path, content: _written(path, content)
        Path.write_text = lambda path, text: _written(path, text.encode())


class _Writing:
    """A file open for writing from its beginning, all calls in sight."""

    def __init__(self, path: Any) -> None:
        self._fd, self._at = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 0

    def write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            count = os.pwrite(self._fd, view, self._at)
            self._at, view = self._at + count, view[count:]

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def _written(path: Any, content: bytes) -> None:
    with _Writing(path) as file:
        file.write(content)


def alter(path: str, rng: random.Random, how: str | None = None) -> None:
    """Change a file: its time alone, its size, or a byte with size and time as they were."""
    stat, how = os.stat(path), how or rng.choice(("time", "size", "byte"))
    if how == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    elif how == "size":
        with open(path, "ab") as file:
            file.write(b"\n")
    else:
        with open(path, "r+b") as file:
            file.seek(-rng.randint(1, min(stat.st_size, 64)), os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# --------------------------------------------------------------------------------- the scenarios


class Scenario(NamedTuple):
    """A command: `old` lies at the output before; `other` are options that make it another one."""

    run: Callable[..., Any]  # inputs, output, options
    reads: tuple[str, ...]
    output: str = "out"
    old: str | None = None
    other: Mapping[str, Any] = {}
    exchange: bool = True  # whether two folders can change places in one step


def _diff(inputs: Path, output: Path, **options: Any) -> None:
    verbs.diff(inputs / "tuned", inputs / "base", output, **options)


def _shards(inputs: Path, output: Path, **options: Any) -> None:
    options = {"codec": "sparse", "max_shard_size": "3KB"} | options
    verbs.diff(inputs / "sparse", inputs / "base", output, **options)


def _wide(inputs: Path, output: Path, **options: Any) -> None:
    verbs.diff(inputs / "wide-tuned", inputs / "wide-base", output, **options)


def _combine(inputs: Path, output: Path, **options: Any) -> None:
    vectors = [inputs / "v.safetensors", inputs / "w.safetensors"]
    weights = options.pop("weights", [0.7, 0.5])
    verbs.combine(*vectors, weights=weights, op="ties", output=output, **options)


def _apply(inputs: Path, output: Path, **options: Any) -> None:
    options = {"lam": 0.7, "dtype": "fp32"} | options
    verbs.apply(inputs / "target", inputs / "v.safetensors", output, **options)


def _fused(inputs: Path, output: Path, **options: Any) -> None:
    base = inputs / "wide-base"  # the target too: blocks with replacements wait for its digest
    verbs.apply(base, None, output, tuned=inputs / "wide-tuned", base=base, **options)


def _export(inputs: Path, output: Path, **options: Any) -> None:
    verbs.export_patch(inputs / "v.safetensors", output, base=inputs / "base", **options)


def _import(inputs: Path, output: Path, **options: Any) -> None:
    verbs.import_patch(inputs / "patch.safetensors", inputs / "base", output, **options)


def _stream(inputs: Path, output: Path, **options: Any) -> None:
    options = {"codec": "sparse", "max_shard_size": "3KB"} | options
    verbs.diff("org/tuned", "org/base", output, stream=True, **options)


def _extract(inputs: Path, output: Path, **options: Any) -> None:
    options = {"rank": 2} | {k: v for k, v in options.items() if k not in ("engine", "workers")}
    verbs.extract_lora(inputs / "llama.safetensors", output, base=inputs / "llama", **options)


FILE = "v.safetensors"
PAIR = ("tuned", "base")
SCENARIOS = {
    "diff": Scenario(_diff, PAIR, FILE, other={"codec": "dense"}),
    "diff-over": Scenario(_diff, PAIR, FILE, old="old.safetensors", other={"codec": "sparse"}),
    "shards": Scenario(_shards, ("sparse", "base"), FILE, other={"max_shard_size": "5KB"}),
    "shards-over": Scenario(_shards, ("sparse", "base"), FILE, old="v.safetensors",
                            other={"codec": "dense"}),
    "wide": Scenario(_wide, ("wide-tuned", "wide-base"), FILE, other={"dtype": "bf16"}),
    "combine": Scenario(_combine, ("v.safetensors", "w.safetensors"), FILE,
                        other={"weights": [0.7, 0.6]}),
    "apply": Scenario(_apply, ("target", "v.safetensors"), other={"lam": 0.8}),
    "apply-over": Scenario(_apply, ("target", "v.safetensors"), old="base", other={"dtype": None}),
    "apply-moved": Scenario(_apply, ("target", "v.safetensors"), old="base", exchange=False,
                            other={"rounding": "stochastic"}),
    "fused": Scenario(_fused, ("wide-tuned", "wide-base"), other={"lam": 0.5}),
    "export-patch": Scenario(_export, ("v.safetensors", "base"), FILE),
    "import-patch": Scenario(_import, ("patch.safetensors", "base"), FILE,
                             other={"codec": "dense"}),
    "stream": Scenario(_stream, (), FILE, other={"codec": "dense"}),
    "extract-lora": Scenario(_extract, ("llama.safetensors", "llama"), "adapter"),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Write the models and vectors that the scenarios read; for a process that then ends."""
    from families import perturbed, save, toy

    base = toy(0, layers=1, width=16, vocabulary=24)
    wide = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in wide.values():  # of these no difference restores tuned
        tensor.view(-1)[::16] *= 2.0**40
    save(folder / "base", base)
    save(folder / "tuned", perturbed(base, size=0.05))
    save(folder / "sparse", perturbed(base, 2, density=0.2))
    save(folder / "wide-base", wide, shards=2)
    save(folder / "wide-tuned", perturbed(base, 3, size=0.02))
    files = {"tokenizer.json": "{}", "README.md": "A model.\n", "notes.txt": "kept\n"}
    target = save(folder / "target", perturbed(base, 4), shards=3, side_files=files)
    (target / "deep" / "er").mkdir(parents=True)
    (target / "deep" / "er" / "file.txt").write_text("below\n")
    verbs.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    verbs.diff(folder / "sparse", folder / "base", folder / "w.safetensors")
    verbs.diff(folder / "sparse", folder / "base", folder / "old.safetensors", max_shard_size="3KB")
    verbs.export_patch(folder / "w.safetensors", folder / "patch.safetensors")
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 24,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    save(folder / "llama", base, config=config)
    verbs.diff(folder / "tuned", folder / "llama", folder / "llama.safetensors")
    for name, seed in (("hub-base", 0), ("hub-tuned", 5)):
        save(folder / name, perturbed(base, 5) if seed else base, shards=3 if seed else 2)


# ------------------------------------------------------------------------------- one after another


@dataclass
class Attempt:
    """How one run ended: killed, done, error (one of ours), crash (any other), hang."""

    end: str
    error: str = ""
    ran: int = 0  # jobs that were not taken from a journal
    moments: int = 0
    struck: bool = False
    outside: list[str] = field(default_factory=list)
    over: bool = False  # whether it had come to its end before the power failed
    disk: Disk | None = None


@dataclass
class Found:
    """What became of one point."""

    row: str
    scenario: str
    faults: list[Fault]
    outcome: str = ""  # resumed, anew, published, endured, refused
    interrupted: int = 0
    wrong: list[str] = field(default_factory=list)


def contents(path: Path) -> dict[str, bytes] | None:
    """Return the bytes of a file (as ""), or of every file of a folder; None for nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    if not path.is_dir():
        return None
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


class Bench:
    """Runs scenarios in processes of their own and looks at what they leave."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.place, self.inputs = folder / "place", inputs
        self.place.mkdir()
        files = sorted(p for p in inputs.rglob("*") if p.is_file())
        self._pristine = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
        self._wanted: dict[str, dict[str, bytes]] = {}
        self._jobs: dict[str, int] = {}
        self._moments: dict[tuple[str, str, bool], int] = {}
        self.seconds: dict[str, float] = {}

    # one attempt

    def attempt(
        self, name: str, fault: Fault, serial: bool = True, disk: Disk | None = None,
        after: float | None = None, tapped: bool = True, **options: Any,
    ) -> Attempt:  # fmt: skip
        """Run a scenario in a child with a fault; `after` so many seconds it is killed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            try:
                self._child(name, fault, serial, disk, writer, tapped, options)
            finally:
                os._exit(9)
        os.close(writer)
        if after is not None and not select.select([reader], [], [], after)[0]:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        if told:
            return Attempt(**pickle.loads(told))
        code = os.waitstatus_to_exitcode(status)
        ends = {-signal.SIGKILL: "killed", -signal.SIGALRM: "hang"}
        return Attempt(ends.get(code, "crash"), f"exit {code}")

    def _child(
        self, name: str, fault: Fault, serial: bool, disk: Disk | None, writer: int,
        tapped: bool, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        signal.alarm(SECONDS)
        facts: dict[str, Any] = {"ran": 0}
        write, leave = os.write, os._exit

        def say(end: str, **more: Any) -> None:
            told = pickle.dumps({"end": end, **facts, **more})
            while told:
                told = told[write(writer, told) :]

        runner.CLAIM_SECONDS = 0.0
        scenario, run, join = SCENARIOS[name], threads.Threads.run, threading.Thread.join
        if not scenario.exchange:
            staging._exchange = lambda source, output: False
        os.fsync = lambda fd: None  # a killed process loses nothing; `Disk` knows what power takes
        tap = Tap(self.place, fault, disk or Disk(os.fspath(self.place)), say)

        def counted(self: threads.Threads, plan: Any, *rest: Any, **named: Any) -> Any:
            facts["ran"] += sum(not isinstance(job, MeasureJob) for job in plan.jobs)
            return run(self, plan, *rest, **named)

        threads.Threads.run = counted
        # a claim at every look of the main thread, and many looks
        threading.Thread.join = lambda self, timeout=None: join(self, timeout and 0.0005)
        how = {"engine": "serial"} if serial else {"engine": "threads", "workers": 2}
        if fault.kind == "timer":
            signal.signal(signal.SIGALRM, lambda number, at: None)
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        if tapped:
            tap.install()
        end, error = "done", ""
        try:
            scenario.run(self.inputs, self.place / scenario.output, **how, **options)
        except SkillvecError as caught:
            end, error = "error", f"{type(caught).__name__}: {caught}"
        except OSError as caught:  # before the work and behind it; it has to name the file
            named = fault.kind in ("read", "lost") and caught.filename
            end, error = (
                "error" if named else "crash",
                "".join(traceback.format_exception(caught)[-6:]),
            )
        except BaseException as caught:
            end, error = "crash", "".join(traceback.format_exception(caught)[-6:])
        facts |= {"moments": tap.moments, "struck": tap.struck, "outside": tap.outside,
                  "error": error}  # fmt: skip
        if fault.power and end != "crash":
            facts |= {"struck": True, "over": end == "done"}
            tap.end(power=True)
        say(end, disk=tap.disk if tapped else None)
        leave(0)

    # what is known of a scenario

    def wanted(self, name: str) -> dict[str, bytes]:
        """Return what it gives when nothing disturbs it."""
        if name not in self._wanted:
            self.clean(name)
            # here, so that the children find everything imported
            SCENARIOS[name].run(self.inputs, self.place / "warm.safetensors", engine="serial")
            self.clean(name)
            begin = time.monotonic()
            done = self.attempt(name, Fault("none"), tapped=False, **self.forced(name))
            self.seconds[name] = time.monotonic() - begin
            made = contents(self.place / SCENARIOS[name].output)
            assert done.end == "done" and made is not None, done
            self._wanted[name], self._jobs[name] = made, done.ran
        return self._wanted[name]

    def moments(self, name: str, kind: str, serial: bool) -> int:
        """Return how many calls there are that a kind of fault strikes."""
        key = name, kind, serial
        if key not in self._moments:
            self.clean(name)
            kept = replace(Fault(kind), at=1 << 60)
            done = self.attempt(name, kept, serial, **self.forced(name))
            assert done.end == "done", done
            self._moments[key] = done.moments
        return self._moments[key]

    def old(self, name: str) -> dict[str, bytes] | None:
        old = SCENARIOS[name].old
        return None if old is None else contents(self.inputs / old)

    def forced(self, name: str) -> dict[str, Any]:
        return {"force": SCENARIOS[name].old is not None}

    def unfinished(self, name: str) -> Path:
        return self.place / f".{SCENARIOS[name].output}{UNFINISHED}"

    def claimed(self, name: str) -> bool:
        journal = self.unfinished(name) / JOURNAL
        return journal.exists() and journal.stat().st_size > 0

    def clean(self, name: str) -> None:
        """Empty the place, but for a neighbour and what the scenario finds at its output."""
        for entry in os.scandir(self.place):
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        (self.place / NEIGHBOUR).write_text("not ours")
        scenario = SCENARIOS[name]
        if scenario.old is not None:
            old, output = self.inputs / scenario.old, self.place / scenario.output
            (shutil.copytree if old.is_dir() else shutil.copyfile)(old, output)

    def restore_inputs(self) -> list[str]:
        """Put every input back as it was; return those that were not."""
        changed = []
        for path, (content, mtime) in self._pristine.items():
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (len(content), mtime) or (
                path.read_bytes() != content
            ):
                changed.append(path.name)
                path.write_bytes(content)
                os.utime(path, ns=(mtime, mtime))
        return changed

    # what is looked at

    def look(self, name: str, attempt: Attempt, lasting: bool = False) -> list[str]:
        """Return what is wrong after an attempt, however it ended, and whether the fault lasts."""
        scenario, wrong = SCENARIOS[name], []
        now, new, old = contents(self.place / scenario.output), self.wanted(name), self.old(name)
        replaced = contents(self.unfinished(name) / "replaced")
        aside = now is None and not scenario.exchange and replaced == old
        aside &= attempt.end == "killed" or lasting
        if attempt.end in ("crash", "hang"):
            wrong.append(f"{attempt.end}: {attempt.error}")
        if attempt.outside:
            wrong.append(f"touched {attempt.outside}")
        if now not in (old, new) and not aside:
            wrong.append(f"the output is neither the old nor the new one: {_named(now)}")
        lies = "nothing was published" in attempt.error or "goes on from it" in attempt.error
        if attempt.end == "error" and now == new != old and lies:
            wrong.append(f"published, but said: {attempt.error}")
        if (attempt.end == "done" or attempt.over) and now != new:
            wrong.append("done, but not published" + " for good" * attempt.over)
        left = set(os.listdir(self.place)) - {NEIGHBOUR, scenario.output}
        if left - {self.unfinished(name).name}:
            wrong.append(f"left {left}")
        if (self.place / NEIGHBOUR).read_text() != "not ours":
            wrong.append("touched the neighbour")
        return wrong

    def published(self, name: str) -> bool:
        return contents(self.place / SCENARIOS[name].output) == self.wanted(name)

    def finish(self, found: Found, serial: bool, may_refuse: bool = False) -> None:
        """Give the command once more, undisturbed: the same bytes, and nothing left over."""
        name, options = found.scenario, self.forced(found.scenario)
        output = SCENARIOS[name].output
        published = self.published(name)
        again = self.attempt(name, Fault("none"), serial, **options)
        if published and not options["force"]:  # it is there: the command says so
            if again.end != "error" or "exists already" not in again.error:
                found.wrong.append(f"published, then {again.end}: {again.error}")
            again = self.attempt(name, Fault("none"), serial, force=True)
        elif may_refuse and again.end == "error":
            if self.unfinished(name).name not in again.error:
                found.wrong.append(f"refused without naming its folder: {again.error}")
            found.wrong += self.look(name, again)
            found.outcome = "refused"
            if self.unfinished(name).exists() == ("was removed" in again.error):
                found.wrong.append(f"removed or not, it does not say so: {again.error}")
            shutil.rmtree(self.unfinished(name), ignore_errors=True)
            again = self.attempt(name, Fault("none"), serial, **options)
        found.wrong += self.look(name, again)
        if again.end != "done":
            found.wrong.append(f"the next run ended with {again.end}: {again.error}")
        if set(os.listdir(self.place)) != {NEIGHBOUR, output}:
            found.wrong.append(f"the next run left {os.listdir(self.place)}")
        if not found.outcome:
            restored = self._jobs[name] - again.ran
            found.outcome = "published" if published else "resumed" if restored else "anew"

    # one point of each kind

    def point(self, row: str, name: str, rng: random.Random, serial: bool, at: int) -> Found:
        """Do one point; `at` is the call that is struck, where the row strikes one."""
        self.wanted(name)
        self.clean(name)
        found = Found(row, name, [])
        faults, tamper = ROWS[row].faults(self, name, rng, serial, at), ROWS[row].between
        small = ROWS[row].kind == "small"
        if small:
            pages = sum(len(old) // 4096 + 2 for old in (self.old(name) or {}).values())
            self._mount(f"size={4 * (pages + rng.randint(4, 30))}k")
            self.clean(name)
        try:
            self._trouble(found, faults, tamper, rng, serial, small)
        finally:
            if small:
                subprocess.run(["umount", self.place], check=True, timeout=20)
        found.wrong += [f"input {file} has changed" for file in self.restore_inputs()]
        return found

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "skillvec-test", os.fspath(self.place)]
        subprocess.run(command, check=True, timeout=20, capture_output=True)

    def may_mount(self) -> bool:
        try:
            self._mount("size=64k")
        except (OSError, subprocess.SubprocessError):
            return False
        subprocess.run(["umount", self.place], check=True, timeout=20)
        return True

    def _trouble(
        self, found: Found, faults: Iterator[Fault], tamper: Any, rng: random.Random, serial: bool,
        small: bool,
    ) -> None:  # fmt: skip
        row, name = found.row, found.scenario
        self._faulted(found, faults, rng, serial)
        if small:
            self._mount("remount,size=64m")
        if found.interrupted and tamper is not None and self.claimed(name):
            tamper(self, found, rng, serial)
        if ROWS[row].kind == "change":
            self.restore_inputs()
        if found.interrupted:
            # with either engine: the journal knows nothing of it
            self.finish(found, rng.random() < 0.5, may_refuse=tamper is damaged)
        else:
            found.outcome = "endured"

    def _faulted(
        self, found: Found, faults: Iterator[Fault], rng: random.Random, serial: bool
    ) -> None:
        name, disk = found.scenario, None
        for fault in faults:
            after = rng.uniform(0, 1.2 * self.seconds[name]) if fault.kind == "time" else None
            tapped = fault.kind not in ("time", "small")
            done = self.attempt(name, fault, serial, disk, after, tapped, **self.forced(name))
            found.faults.append(fault)
            found.wrong += self.look(name, done, fault.lasting)
            if fault.kind == "change" and done.struck and done.end == "done":
                found.wrong.append("an input changed and nobody noticed")
            if fault.kind in ("short", "timer") and done.end != "done":
                found.wrong.append(f"{done.end}: {done.error}")
            if done.end == "done" and not self.unfinished(name).exists():
                return
            found.interrupted += 1
            disk = done.disk
            if self.published(name):
                return


def _named(content: dict[str, bytes] | None) -> str:
    return "nothing" if content is None else ", ".join(sorted(content)) or "an empty folder"


# ------------------------------------------------------------------------------------- the rows

# What is done between an interrupted run and the next one.


def damaged(bench: Bench, found: Found, rng: random.Random, serial: bool) -> None:
    """Damage the journal, or anything that was staged."""
    folder = bench.unfinished(found.scenario)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != OWNER)
    journal = folder / JOURNAL
    path = journal if rng.random() < 0.5 else rng.choice(files)
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "append", "zeros", "gone", "lines"))
    if how == "gone":
        path.unlink()
        return
    if how == "lines" and path == journal:
        lines = content.splitlines(keepends=True)
        rng.choice((lambda: lines.append(rng.choice(lines)), lambda: lines.pop(1 % len(lines)),
                    lambda: lines.sort(), lambda: lines.reverse()))()  # fmt: skip
        content = bytearray(b"".join(lines))
    elif how == "cut":
        del content[rng.randrange(len(content) + 1) :]
    elif how == "append":
        content += rng.randbytes(rng.randint(1, 5000))
    elif content:
        for _ in range(rng.choice((1, 1, 5))):
            at = rng.randrange(len(content))
            length = 1 if how == "flip" else min(512, len(content) - at)
            piece = bytes([content[at] ^ 1 << rng.randrange(8)]) if how == "flip" else bytes(length)
            content[at : at + length] = piece
    path.write_bytes(content)


def _refused(bench: Bench, found: Found, said: Sequence[str], serial: bool, **options: Any) -> None:
    name, folder = found.scenario, bench.unfinished(found.scenario)
    before = contents(folder)
    tried = bench.attempt(name, Fault("none"), serial, **bench.forced(name) | options)
    after = contents(folder)
    found.wrong += bench.look(name, tried)
    if tried.end != "error" or not any(text in tried.error for text in said):
        found.wrong.append(f"not refused but {tried.end}: {tried.error}")
    elif before != after:
        found.wrong.append("the refused run changed what the other one had left")
    found.outcome = "refused"


def other_command(bench: Bench, found: Found, rng: random.Random, serial: bool) -> None:
    """Give another command with the same output."""
    other = SCENARIOS[found.scenario].other
    if other:
        _refused(bench, found, ["of another command"], serial, **other)


def other_inputs(bench: Bench, found: Found, rng: random.Random, serial: bool) -> None:
    """Change an input, and give the same command."""
    roots = [bench.inputs / read for read in SCENARIOS[found.scenario].reads]
    if not roots:  # those of the Hub are commits
        return
    files = [p for root in roots for p in (root, *root.rglob("*")) if p.is_file()]
    weights = [p for p in sorted(files) if p.suffix == ".safetensors"]
    how = rng.choice(("time", "size", "byte"))
    alter(os.fspath(rng.choice(weights)), rng, how)
    # of another size it is no safetensors file any more, and vectors have digests of their own
    _refused(bench, found, [": expected", "changed since", "was altered"], serial)
    bench.restore_inputs()


class Row(NamedTuple):
    """A kind of trouble: what it strikes, its faults, what happens before the next run."""

    told: str
    kind: str
    faults: Callable[[Bench, str, random.Random, bool, int], Iterator[Fault]]
    between: Callable[[Bench, Found, random.Random, bool], None] | None = None
    weight: int = 2


def _one(kind: str, codes: Sequence[int] = (0,), lasting: Sequence[bool] = (False,),
         power: Sequence[bool] = (False,)) -> Any:  # fmt: skip
    def faults(
        bench: Bench, name: str, rng: random.Random, serial: bool, at: int
    ) -> Iterator[Fault]:
        yield Fault(kind, at, rng.choice(codes), rng.choice(lasting), rng.choice(power),
                    rng.randrange(1 << 30))  # fmt: skip

    return faults


def _several(bench: Bench, name: str, rng: random.Random, serial: bool, at: int) -> Iterator[Fault]:
    for number in range(rng.randint(2, 3)):
        kind = rng.choice(("kill", "power"))
        most = max(bench.moments(name, "kill", serial), 1)
        yield Fault(kind, rng.randrange(most) if number else at, seed=rng.randrange(1 << 30))


FULL = (errno.ENOSPC, errno.EDQUOT)
ONCE_OR_ON = (False, True)
ROWS = {
    "kill": Row("SIGKILL at a call", "kill", _one("kill"), weight=12),
    "time": Row("SIGKILL at any time", "", _one("time")),
    "small": Row("a real disk (tmpfs) that is too small", "small", _one("small")),
    "power": Row("power loss at a call", "power", _one("power"), weight=14),
    "after": Row("power loss at the end", "", _one("none", power=(True,)), weight=1),
    "full": Row("disk full from a call on, or once", "error", _one("error", FULL, ONCE_OR_ON)),
    "error": Row("EIO at a call, once or from then on", "error",
                 _one("error", (errno.EIO,), ONCE_OR_ON, ONCE_OR_ON), weight=3),
    "fsync": Row("fsync fails, and what it was for is lost", "fsync",
                 _one("fsync", (errno.EIO,), ONCE_OR_ON, ONCE_OR_ON)),
    "lost": Row("the mount is gone from a call on", "lost",
                _one("lost", (errno.EIO, errno.ENOTCONN, errno.ESTALE), (True,))),
    "read": Row("an input cannot be read", "read",
                _one("read", (errno.EIO, errno.ESTALE), ONCE_OR_ON)),
    "short": Row("reads and writes of a part of what was asked", "", _one("short"), weight=1),
    "timer": Row("a signal every 0.2 ms", "", _one("timer"), weight=1),
    "several": Row("killed or without power two or three times", "kill", _several, weight=6),
    "damage": Row("killed, then journal or staged files damaged", "kill", _one("kill"), damaged, 5),
    "command": Row("killed, then another command", "kill", _one("kill"), other_command),
    "inputs": Row("killed, then an input changed", "kill", _one("kill"), other_inputs),
    "change": Row("an input changes while it is read", "change", _one("change")),
}  # fmt: skip


def points(bench: Bench, row: str, name: str, count: int, seed: int) -> Iterator[Found]:
    """Do so many points of a row in a scenario: every call in turn, if there are enough."""
    rng = random.Random(f"{seed} {row} {name}")
    for serial, share in ((True, count - count // 4), (False, count // 4)):
        kind = ROWS[row].kind
        most = bench.moments(name, kind, serial) if kind else 1
        most = max(most, 1)  # "small" strikes where it will
        order: list[int] = []
        for _ in range(share):
            order = order or rng.sample(range(most), most)
            yield bench.point(row, name, random.Random(rng.random()), serial, order.pop())


# ---------------------------------------------------------------------------------- the long form

COLUMNS = ("points", "interrupted", "resumed", "anew", "published", "refused", "endured", "wrong")


def campaign(folder: Path, inputs: Path, rows: Sequence[str], names: Sequence[str], total: int,
             seed: int) -> list[Found]:  # fmt: skip
    """Do about `total` points, shared out over rows and scenarios; at least one of each."""
    bench, found = Bench(folder, inputs), list[Found]()
    rows = [row for row in rows if row != "small" or bench.may_mount()]
    weights = sum(ROWS[row].weight for row in rows) * len(names)
    for name in names:
        for row in rows:
            found += points(bench, row, name, max(1, total * ROWS[row].weight // weights), seed)
    return found


def table(found: Sequence[Found], key: Callable[[Found], str]) -> list[str]:
    """Return a table in Markdown: what became of the points, by `key`."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        line = counts.setdefault(key(one), Counter())
        line.update(["points", one.outcome])
        line["interrupted"] += bool(one.interrupted)
        line["wrong"] += bool(one.wrong)
    counts["all"] = sum(counts.values(), Counter())
    text = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, line in counts.items():
        text.append(f"| {name} | {' | '.join(f'{line[column]:,}' for column in COLUMNS)} |")
    return text


def machine() -> str:
    """Return where this ran: no host name, but what matters."""
    with open("/proc/cpuinfo") as info:
        models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, Linux"
        f" {platform.release().split('-')[0]}, Python {platform.python_version()},"
        f" numpy {np.__version__}"
    )


@contextmanager
def hub(inputs: Path, home: Path) -> Iterator[None]:
    """Serve the Hub's models from another process, and point the client of this one there."""
    serve = "from torture import serve_hub; serve_hub()"
    command = [sys.executable, "-c", serve, str(inputs), str(home)]
    server = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdin is not None
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ |= json.loads(server.stdout.readline())
    try:
        yield
    finally:
        server.stdin.close()
        server.wait(20)


def serve_hub() -> None:
    """Serve two models until stdin ends; print how to find them."""
    from hubserver import HubServer

    inputs, home = map(Path, sys.argv[1:])
    with HubServer() as server:
        for name in ("base", "tuned"):
            server.add_repo(f"org/{name}", inputs / f"hub-{name}")
        found = server.environment(home)
        wanted = {key: value for key, value in found.items() if key.startswith(("HF_", "NO_"))}
        print(json.dumps(wanted), flush=True)
        sys.stdin.read()


def run(asked: argparse.Namespace, folder: Path) -> list[Found]:
    """Run the campaign that is asked for; with several processes, one for each scenario."""
    rows, names = asked.rows.split(","), asked.scenarios.split(",")
    inputs = asked.inputs or folder / "inputs"
    if asked.inputs is None:  # elsewhere, so that torch is not in what is forked
        inputs.mkdir()
        make = "import sys; from pathlib import Path; from torture import make_inputs;"
        make += "make_inputs(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", make, str(inputs)], check=True, cwd=HERE)
    if asked.processes == 1:
        if "stream" not in names:
            return campaign(folder, inputs, rows, names, asked.points, asked.seed)
        with hub(inputs, folder / "home"):
            return campaign(folder, inputs, rows, names, asked.points, asked.seed)

    def one(name: str) -> list[Found]:
        mine = folder / name
        shutil.copytree(inputs, mine, copy_function=shutil.copy2)
        command = [sys.executable, __file__, "--points", str(asked.points // len(names))]
        command += ["--seed", str(asked.seed), "--rows", asked.rows, "--scenarios", name]
        command += ["--inputs", str(mine), "--json", f"{mine}.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not Path(f"{mine}.json").exists():
            raise RuntimeError(f"{name}: {done.stderr}")
        lines = json.loads(Path(f"{mine}.json").read_text())
        return [Found(**line | {"faults": [Fault(**f) for f in line["faults"]]}) for line in lines]

    with ThreadPoolExecutor(asked.processes) as pool:
        return [found for part in pool.map(one, names) for found in part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--inputs", type=Path, help="a folder that make_inputs has filled")
    parser.add_argument("--json", type=Path, help="where to write every point")
    asked = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skillvec-torture-") as scratch:
        found = run(asked, Path(scratch))
    print("\n".join(table(found, lambda one: ROWS[one.row].told)), end="\n\n")
    print("\n".join(table(found, lambda one: one.scenario)))
    print(f"\nseed {asked.seed}, {time.monotonic() - begin:.0f} s, {machine()}")
    if "small" in asked.rows and not any(one.row == "small" for one in found):
        print("no real disk that is too small: mounting is not permitted here")
    wrong = [one for one in found if one.wrong]
    for one in wrong[:20]:
        print(f"\n{one.row} {one.scenario} {one.faults}:\n  " + "\n  ".join(one.wrong))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    return bool(wrong)


HERE = Path(__file__).parents[1]

if __name__ == "__main__":
    sys.exit(main())
