"""Time skillvec against plain copying, a naive script and mergekit; print one table.

Hides the schedule, the goals and the table. Invariants: ratios are taken within a round; a goal is
judged on the median ratio; whatever is made besides the families is deleted at the end; no numpy or
torch in this process (see measure.py). README.md says what each row is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contenders import (
    CODECS,
    HERE,
    MERGEKIT,
    PYTHON,
    SKILLVEC,
    TIMED_CODECS,
    Job,
    apply,
    diff,
    jobs_of,
    prepare,
    repeated,
    stored,
)
from measure import Command, Spent, nbytes, remove, rounds, sampled

CONTENDERS = ("floor", "floor+sync", "skillvec", "naive", "mergekit")
CODEC_JOBS = tuple(f"{verb}-{codec}" for verb in ("diff", "apply") for codec in TIMED_CODECS)
WEIGHT_JOBS = ("diff", "apply", "apply-lam1", "fused", "orthogonality", *CODEC_JOBS)
JOBS = (*WEIGHT_JOBS, "check", "size", "linearity", "startup")
PACKAGES = ("numpy", "zstandard", "torch", "safetensors", "skillvec")
STARTUP_ROUNDS = 20
# skillvec's time over the copy floor's, at most; the others' time over skillvec's, at least.
CEILINGS = {"diff": 0.8, "apply": 0.8, "apply-lam1": 0.8, "fused": 1.4, "orthogonality": 3.0}
CEILINGS |= {"diff-sparse": 0.9, "apply-sparse": 0.9, "diff-packed": 2.0, "apply-packed": 1.2}
SPEEDUPS = {"naive": 8.0, "mergekit": 15.0}
SPEEDUP_JOBS = ("diff", "apply", "apply-lam1")
SIZE_PERCENT = {"packed": 11.0}  # of the dense bf16 values
DURABLE, LINEAR, STARTUP = 0.5, 1.2, 1.5
MEMORY_MB = {"RssAnon": 150.0, "RssFile": 300.0}


@dataclass(frozen=True)
class Row:
    """One line of the table: `values` are one a round, `goal` is ("<=" or ">=", limit)."""

    what: str
    who: str
    values: list[float] = field(default_factory=list)
    unit: str = ""
    goal: tuple[str, float] | None = None
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.what:<21} {self.who:<24} "
        if not self.values:
            return text + self.note
        middle = statistics.median(self.values)
        edges = [
            f"{x:.2f}" if len(self.values) > 1 else "" for x in (min(self.values), max(self.values))
        ]
        text += f"{edges[0]:>8}{middle:>9.2f}{edges[1]:>9} {self.unit:<4}{self.note}"
        if self.goal:
            sign, limit = self.goal
            reached = middle <= limit if sign == "<=" else middle >= limit
            text += f"{sign} {limit:<5g} {'yes' if reached else 'NO'}"
        return text.rstrip()


def ratios(own: list[Spent], other: list[Spent]) -> list[float]:
    """Divide the wall seconds round by round."""
    return [a.seconds / b.seconds for a, b in zip(own, other, strict=True)]


def time_row(what: str, who: str, spent: list[Spent]) -> Row:
    """Show wall seconds, and the median of CPU seconds, which a busy machine changes less."""
    cpu = statistics.median(s.cpu_seconds for s in spent)
    return Row(what, who, [s.seconds for s in spent], "s", note=f"cpu {cpu:.2f} s")


def timing_rows(what: str, job: str, spent: dict[str, list[Spent]]) -> list[Row]:
    """Turn one job's rounds into rows: seconds, ratios to the floor, skillvec's advantage."""
    rows = [time_row(what, who, own) for who, own in spent.items()]
    for who in (w for w in spent if w != "floor" and "floor" in spent):
        goal = ("<=", CEILINGS[job]) if who == "skillvec" else None
        rows.append(Row(what, f"{who} / floor", ratios(spent[who], spent["floor"]), "x", goal))
    for who in (w for w in SPEEDUPS if w in spent and "skillvec" in spent):
        goal = (">=", SPEEDUPS[who]) if job in SPEEDUP_JOBS else None
        values = ratios(spent[who], spent["skillvec"])
        rows.append(Row(what, f"{who} / skillvec", values, "x", goal))
    return rows


def memory_rows(what: str, who: str, peaks: dict[str, float]) -> list[Row]:
    """Turn sampled peaks into rows; only skillvec has goals."""
    own = who == "skillvec"
    return [
        Row(what, f"{who} {key}", [peak], "MB", ("<=", MEMORY_MB[key]) if own else None)
        for key, peak in peaks.items()
    ]


def compared(what: str, who: str, out: Path, reference: list[str], *, exact: bool = False) -> Row:
    """Compare an output with its reference by check.py; `exact` has the goal of the same bits."""
    argv = [PYTHON, str(HERE / "check.py"), str(out), *reference]
    found = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    if exact:
        return Row(what, f"{who}, unlike", [found["unequal_bits"]], "", ("<=", 0))
    note = "{differ:,} differ, {beyond_one_step:,} by > 1 step, worst {worst_steps:,}"
    return Row(what, who, note=note.format(**found))


def check_rows(what: str, job: Job, work: Path) -> list[Row]:
    """Sample every contender's memory and compare the outputs; nothing here is timed."""
    rows = []
    for who, command in job.commands.items():
        if who.startswith("floor"):
            continue
        print(f"checking {what}, {who}", file=sys.stderr)
        rows += memory_rows(what, who, sampled(command, work))
        if job.reference and command.out:
            rows.append(compared(what, f"{who} : fp32", command.out, job.reference))
        for other, (label, reference) in job.against.items() if who == "skillvec" else ():
            assert command.out
            kept = command.out.rename(work / "kept")
            sampled(reference, work)
            against = ["--against", str(reference.out)]
            pair = f"skillvec : {label}"
            rows.append(compared(what, pair, kept, against, exact=other == who))
            remove(reference.out)
            kept.rename(command.out)
        remove(command.out)
    return rows


def size_rows(what: str, family: Path, work: Path) -> list[Row]:
    """Show the whole file of each codec in percent of the dense bf16 values."""
    whole = 2 * json.loads((family / "family.json").read_text())["parameters"]
    rows = []
    for codec in CODECS:
        limit = SIZE_PERCENT.get(codec)
        percent = 100 * nbytes([stored(work, codec)]) / whole
        rows.append(Row(what, f"{codec} / bf16 values", [percent], "%", limit and ("<=", limit)))
    return rows


def linearity_rows(jobs: dict[str, dict[str, Job]], number: int, work: Path) -> list[Row]:
    """Compare skillvec's time a byte, read or written, on the two sizes."""
    rows = []
    for name in ("diff", "apply"):
        commands = {size: jobs[size][name].commands["skillvec"] for size in ("big", "small")}
        moved = {}
        for size, command in commands.items():
            sampled(command, work)
            moved[size] = nbytes([*command.inputs, *filter(None, [command.out])])
        spent = rounds(commands, number, work)
        scale = moved["small"] / moved["big"]
        values = [scale * ratio for ratio in ratios(spent["big"], spent["small"])]
        rows.append(Row("linearity", f"{name}, big / small", values, "x", ("<=", LINEAR)))
    return rows


def startup_rows(work: Path) -> list[Row]:
    """Compare `skillvec --help` with importing the packages that any such command line needs."""
    own, other = "skillvec --help", "import click, rich"
    commands = {
        own: Command([str(SKILLVEC), "--help"]),
        other: Command([PYTHON, "-c", other]),
    }
    spent = rounds(commands, STARTUP_ROUNDS, work)
    rows = [time_row("startup", who, took) for who, took in spent.items()]
    values = ratios(spent[own], spent[other])
    return [*rows, Row("startup", "help / import", values, "x", ("<=", STARTUP))]


def durable_rows(family: Path, number: int, work: Path) -> list[Row]:
    """Apply to a model four times as large and wait until the output is on the disk."""
    sft, rl = (repeated(family / member, work / f"{member}-x4", 4) for member in ("sft", "rl"))
    vector, out = work / "x4.safetensors", work / "out"
    sampled(diff(rl, sft, vector), work)
    remove(sft)
    remove(rl)
    target = repeated(family / "target", work / "target-x4", 4)
    own = apply(target, vector, out)
    copy = Command(["cp", "-r", str(target), str(out)], (target,), out)
    commands = {
        who: Command(["sh", "-c", f'{shlex.join(c.argv)} && sync "{out}"/*'], c.inputs, out)
        for who, c in (("cp -r, sync", copy), ("skillvec, sync", own))
    }
    spent = rounds(commands, number, work)
    rows = [time_row("durable", who, own) for who, own in spent.items()]
    values = ratios(spent["skillvec, sync"], spent["cp -r, sync"])
    rows.append(Row("durable", "skillvec / cp", values, "x", ("<=", DURABLE)))
    return rows + memory_rows("durable", "skillvec", sampled(own, work))


def about(place: Path, packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the machine and the versions by name."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")]
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(at), kind) for at, kind in mounts if place.resolve().is_relative_to(at)]
    facts = {
        "cpu": f"{models[0] if models else os.uname().machine}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "kernel": os.uname().release,
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "filesystem": max(holding)[1],
        "python": sys.version.split()[0],
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def about_mergekit() -> dict[str, str]:
    """Return the versions in mergekit's own venv, if it is there."""
    if not MERGEKIT.exists():
        return {}
    ask = "from importlib.metadata import version as v; print(*map(v, ('mergekit', 'torch')))"
    argv = [str(MERGEKIT.parent / "python"), "-c", ask]
    answer = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"mergekit": "{} with torch {}".format(*answer.split())}


def show(facts: dict[str, str], heading: str, rows: Sequence[Any], group: str) -> None:
    """Print the facts and the table, a blank line where the rows' attribute `group` changes."""
    line = ""
    for fact in (f"{key} {value}" for key, value in facts.items()):
        if len(line) + len(fact) > 95:
            print(line)
            line = ""
        line += f"{fact}; "
    print(line.rstrip("; "))
    print(f"\n{heading}")
    for before, row in zip([None, *rows], rows, strict=False):
        if before and getattr(before, group) != getattr(row, group):
            print()
        print(row)


def save(path: Path | None, given: argparse.Namespace, facts: dict[str, str], rows: Any) -> None:
    """Write the results as JSON, by default under results/ with the time in the name."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    path = path or HERE / "results" / f"{Path(sys.argv[0]).stem}-{now}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in vars(given).items() if k != "json"}
    result = {"made": now, "options": options, "facts": facts, "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


def families_of(sizes: list[str]) -> dict[str, Path]:
    """Make the families that are not there and return their folders."""
    folders = {}
    for size in sizes:
        argv = [PYTHON, str(HERE / "family.py"), size]
        folders[size] = Path(
            subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        )
    return folders


def measured(given: argparse.Namespace, contenders: list[str], works: dict[str, Path]) -> list[Row]:
    """Run the jobs asked for; `works` maps a size to an empty folder inside its family's."""
    jobs, rows = {}, []
    for size, work in works.items():
        own = contenders if size in given.sizes else ["skillvec"]
        prepare(work.parent, work, own)
        jobs[size] = jobs_of(work.parent, work, own)
    if "check" in given.jobs:
        for size in works:
            for name in (n for n in jobs[size] if n in given.jobs):
                rows += check_rows(f"{name}, {size}", jobs[size][name], works[size])
    for size in given.sizes:
        if "size" in given.jobs and "skillvec" in contenders:
            rows += size_rows(f"size, {size}", works[size].parent, works[size])
        for name in (n for n in jobs[size] if n in given.jobs):
            print(f"{name}, {size}", file=sys.stderr)
            spent = rounds(jobs[size][name].commands, given.rounds, works[size])
            rows += timing_rows(f"{name}, {size}", name, spent)
    if "skillvec" in contenders:
        work = works[given.sizes[0]]
        if "linearity" in given.jobs:
            rows += linearity_rows(jobs, given.rounds, work)
        if "startup" in given.jobs:
            rows += startup_rows(work)
        if given.durable:
            rows += durable_rows(work.parent, given.rounds, work)
    return rows


def main() -> None:
    """Run what the command line asks for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--jobs", type=names, default=list(JOBS), help=f"of {','.join(JOBS)}")
    parser.add_argument("--sizes", type=names, default=["big"], help="families of the timed jobs")
    parser.add_argument("--contenders", type=names, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--durable", action="store_true", help="add a 10 GB apply (45 GB of disk)")
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()

    # an editable install is not byte-compiled as an installed package is; start-up would pay for it
    subprocess.run(
        [str(PYTHON), "-m", "compileall", "-q", str(HERE.parent / "skillvec")], check=True
    )
    there = {"skillvec": SKILLVEC.exists(), "mergekit": MERGEKIT.exists()}
    contenders = [c for c in given.contenders if there.get(c, True)]
    for absent in sorted(set(given.contenders) - set(contenders)):
        print(f"{absent} is not installed: its rows are left out", file=sys.stderr)
    linear = "skillvec" in contenders and "linearity" in given.jobs
    both = ["big", "small"] if linear else []
    # A terminated run must delete its work folders as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    families = families_of(list(dict.fromkeys([*given.sizes, *both])))
    works = {s: Path(tempfile.mkdtemp(prefix="work-", dir=f)) for s, f in families.items()}
    try:
        facts = about(works[given.sizes[0]]) | about_mergekit()
        rows = measured(given, contenders, works)
    finally:
        for work in works.values():
            shutil.rmtree(work)
    heading = f"{'job':<21} {'who':<24} {'min':>8}{'median':>9}{'max':>9} {'':<4}goal"
    show(facts, heading, rows, "what")
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
