"""Run whole processes and measure them.

Hides the page cache, the clock and /proc. Invariants:

- A timed run starts from a settled state: its inputs read once, dirty pages written back, its last
  output gone. None of that is timed.
- Commands are run in turn within a round, so that a slow minute of the machine falls on all.
- Memory is sampled in runs of their own: sampling every 10 ms disturbs a run of half a second.
- Neither numpy nor torch is imported, since a child's peak memory starts from its parent's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.01
CHUNK_NBYTES = 1 << 20
RESIDENT = ("RssAnon", "RssFile")


@dataclass(frozen=True)
class Command:
    """A process, the files and folders it reads, and what it leaves behind."""

    argv: list[str]
    inputs: tuple[Path, ...] = ()
    out: Path | None = None


class Spent(NamedTuple):
    """Wall seconds, and user and system seconds of a process and its children."""

    seconds: float
    user: float
    system: float

    @property
    def cpu_seconds(self) -> float:
        return self.user + self.system


def files(places: Iterable[Path]) -> list[Path]:
    """Return the files of files and folders, sorted within each."""
    return [f for p in places for f in (sorted(p.iterdir()) if p.is_dir() else [p])]


def nbytes(places: Iterable[Path]) -> int:
    """Return the bytes of files and folders."""
    return sum(f.stat().st_size for f in files(places))


def remove(place: Path | None) -> None:
    """Delete a file or folder if it is there."""
    if place and place.is_dir():
        shutil.rmtree(place)
    elif place:
        place.unlink(missing_ok=True)


def settle(command: Command) -> None:
    """Bring the page cache to the state every timed run starts from."""
    remove(command.out)
    if command.inputs:
        os.sync()
    buffer = bytearray(CHUNK_NBYTES)
    for path in files(command.inputs):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def start(command: Command, log: Path) -> subprocess.Popen[bytes]:
    """Start the process with its output in `log`, kept away from the network."""
    with log.open("wb") as sink:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env |= {"HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command.argv, stdout=sink, stderr=subprocess.STDOUT, env=env)


def require_success(process: subprocess.Popen[bytes], command: Command, log: Path) -> None:
    """Raise RuntimeError with the end of the log unless the process exited with 0."""
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"exit {process.returncode}: {shlex.join(command.argv)}\n{tail}")


def timed(command: Command, work: Path) -> Spent:
    """Run once from a settled state and remove the output."""
    log = work / "log"
    settle(command)
    began = time.perf_counter()
    process = start(command, log)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    require_success(process, command, log)
    remove(command.out)
    return Spent(seconds, usage.ru_utime, usage.ru_stime)


def rounds(commands: dict[str, Command], number: int, work: Path) -> dict[str, list[Spent]]:
    """Run all commands in turn `number` times, every other round from the last to the first."""
    spent: dict[str, list[Spent]] = {name: [] for name in commands}
    for turn in range(1, number + 1):
        for name in [*commands][:: 1 if turn % 2 else -1]:
            spent[name].append(timed(commands[name], work))
        last = ", ".join(f"{name} {own[-1].seconds:.2f} s" for name, own in spent.items())
        print(f"round {turn}: {last}", file=sys.stderr)
    return spent


def tree(pid: int) -> list[int]:
    """Return a process and its descendants; those that end meanwhile are left out."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def resident_mb(pid: int) -> dict[str, float]:
    """Return RssAnon and RssFile of a process tree in MB (10^6 bytes)."""
    total = dict.fromkeys(RESIDENT, 0.0)
    for member in tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        for key, _, rest in (line.partition(":") for line in lines):
            if key in total:
                total[key] += int(rest.split()[0]) * 1024 / 1e6
    return total


def sampled(command: Command, work: Path) -> dict[str, float]:
    """Run once, untimed, and return the peaks of `resident_mb`; the output stays."""
    log = work / "log"
    settle(command)
    peaks = dict.fromkeys(RESIDENT, 0.0)
    process = start(command, log)
    while process.poll() is None:
        now = resident_mb(process.pid)
        peaks = {key: max(peaks[key], now[key]) for key in peaks}
        time.sleep(SAMPLE_SECONDS)
    require_success(process, command, log)
    return peaks
