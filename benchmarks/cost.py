"""What a diff or an apply of a larger model costs: bytes over bandwidth, measured here once.

Method. Of a family (see family.py) this measures, warm, in turn: the wall and processor seconds of
`diff` (packed) and `apply`, and the seconds that `dd` needs to read what they read. That gives
processor seconds per GB read and the size of the vector; nothing else is taken from this machine.
The time of a larger job is then the largest of three quotients, as reading, computing and writing
go on at once:

    bytes read / bandwidth,   bytes written / bandwidth,   processor seconds / (cores x efficiency)

`--check` is the same formula with this machine's own bandwidth (dd) and cores, against the wall
time measured: how far the model is from the truth where it can be tried. The machines of the table
are assumptions, printed with it; change them with `--machine NAME:READ:WRITE:CORES[:COPIES]` (GB/s
of all nodes together; COPIES is how often a vector's bytes are written and read again, as the Ray
engine does once). No numpy or torch in this process (see measure.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from contenders import apply, diff, stored
from measure import Command, nbytes, rounds, sampled
from run import about, families_of, save, show

MODELS = {"70B": 70e9, "700B": 700e9, "1T": 1e12}
EFFICIENCY = 0.8  # of cores that share memory and, with threads, an interpreter


class Machine(NamedTuple):
    """Bandwidths in GB/s and cores, of all nodes together."""

    name: str
    read: float
    write: float
    cores: int
    copies: int = 0


MACHINES = (
    Machine("one NVMe machine, 32 cores", 6.0, 4.0, 32),
    Machine("8 nodes, shared storage", 40.0, 20.0, 8 * 32, 1),
    Machine("the Hub, 10 Gbit/s, 32 cores", 1.1, 4.0, 32),
)


@dataclass(frozen=True)
class Row:
    """One line: the job, what was measured or foreseen, and in which unit."""

    job: str
    where: str
    values: list[float] = field(default_factory=list)
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        middle = statistics.median(self.values)
        spread = f"{min(self.values):.3g} .. {max(self.values):.3g}" if self.values[1:] else ""
        return f"{self.job:14} {self.where:30} {middle:9.3g} {self.unit:8} {spread:14} {self.note}"


class Cost(NamedTuple):
    """Of one job: GB read and written, of which `vector` GB are a vector's, and CPU seconds."""

    read: float
    written: float
    vector: float
    cpu_seconds: float

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * value for value in self))

    def on(self, machine: Machine) -> tuple[float, str]:
        """Return seconds, and what they are spent on."""
        again = machine.copies * self.vector
        quotients = {
            "reading": (self.read + again) / machine.read,
            "writing": (self.written + again) / machine.write,
            "computing": self.cpu_seconds / (machine.cores * EFFICIENCY),
        }
        most = max(quotients, key=lambda key: quotients[key])
        return quotients[most], most


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def measured(family: Path, number: int, work: Path) -> tuple[list[Row], dict[str, Cost]]:
    """Return what was measured here, and the cost of both jobs on this family."""
    sampled(diff(family / "rl", family / "sft", stored(work, "packed"), "packed"), work)
    out = work / "out.safetensors"
    jobs = {
        "diff": diff(family / "rl", family / "sft", out, "packed"),
        "apply": apply(family / "target", stored(work, "packed"), work / "out"),
    }
    rows, costs = [], {}
    vector = nbytes([stored(work, "packed")]) / 1e9
    for name, job in jobs.items():
        paths = [str(file) for place in job.inputs for file in sorted(place.rglob("*.safetensors"))]
        paths = paths or [str(place) for place in job.inputs]
        script = "; ".join(f"dd bs=1M if='{path}' of=/dev/null status=none" for path in paths)
        spent = rounds({"read": Command(["sh", "-c", script], job.inputs), name: job}, number, work)
        read = nbytes(job.inputs) / 1e9
        written = vector if name == "diff" else nbytes([family / "target"]) / 1e9
        cpu = [own.cpu_seconds / read for own in spent[name]]
        rows.append(Row(name, "processor", cpu, "CPU s/GB"))
        costs[name] = Cost(
            read, written, vector if name == "diff" else 0.0, statistics.median(cpu) * read
        )
        walls = [own.seconds for own in spent[name]]
        bandwidth = read / statistics.median(own.seconds for own in spent["read"])
        here = Machine("this machine", bandwidth, bandwidth, len(os.sched_getaffinity(0)))
        foreseen, why = costs[name].on(here)
        rows.append(Row(name, "wall time here", walls, "s"))
        ratios = [wall / foreseen for wall in walls]
        rows.append(Row(name, "wall / model, here", ratios, "x", f"({why}, {duration(foreseen)})"))
    rows.append(Row("diff", "vector / 2 bytes a value", [vector * 1e9 / nbytes([family / "rl"])]))
    return rows, costs


def foreseen(costs: dict[str, Cost], parameters: float, machines: list[Machine]) -> list[Row]:
    """Return the table: every job of every model on every machine."""
    rows = []
    for name, cost in costs.items():
        for model, numel in MODELS.items():
            large = cost.times(numel / parameters)
            for machine in machines:
                seconds, why = large.on(machine)
                note = f"{why}; reads {large.read:.0f} GB, writes {large.written:.0f} GB"
                unit, value = ("s", seconds) if seconds < 120 else ("min", seconds / 60)
                rows.append(Row(f"{name} {model}", machine.name, [value], unit, note))
    return rows


def machine_of(text: str) -> Machine:
    name, read, write, cores, *copies = text.split(":")
    return Machine(name, float(read), float(write), int(cores), *map(int, copies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="of the family: small, big")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", type=machine_of, action="append", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    family = families_of([given.size])[given.size]
    work = Path(tempfile.mkdtemp(prefix="cost-", dir=family.parent))
    try:
        rows, costs = measured(family, given.rounds, work)
        facts = about(work)
    finally:
        shutil.rmtree(work)
    parameters = nbytes([family / "rl"]) / 2
    rows += foreseen(costs, parameters, [*MACHINES, *given.machine])
    facts |= {
        m.name: f"{m.read:g} GB/s read, {m.write:g} written, {m.cores} cores" for m in MACHINES
    }
    show(
        facts,
        "job            where                             median unit     spread",
        rows,
        "job",
    )
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
