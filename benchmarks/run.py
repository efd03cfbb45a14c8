"""Time this build of skillvec beside an older one, plain copying, mergekit and sd-mecha.

Hides the schedule, the goals and the table. Invariants: contenders run in turn within a round,
every other round backwards; a ratio is taken within a round, a goal judged on the median; every
build is installed by pip into a venv of its own; whatever is made besides families and builds is
deleted at the end; no numpy or torch in this process (see measure.py). README.md says what each
row is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contenders import (
    FLOOR,
    HERE,
    NOW,
    OTHERS,
    PYTHON,
    SYNCED,
    Job,
    apply,
    diff,
    floors,
    folder,
    others_on,
    repeated,
    verbs_on,
)
from measure import Command, Spent, nbytes, remove, rounds, sampled

PACKAGES = ("numpy", "zstandard", "torch", "safetensors")
GROUPS = {  # of jobs, by the family that they use
    "weights": ("big", ("diff", "apply", "one-pass", "diff-packed", "apply-packed", "diff-sparse",
                        "apply-sparse", "orthogonality", "verify")),
    "combine": ("middle", ("combine-linear", "combine-ties", "combine-dare_linear")),
    "many": ("many", ("diff", "apply", "orthogonality", "inspect")),
    "start": ("tiny", ("help", "diff", "apply", "verify", "inspect", "orthogonality")),
    "others": ("small", ("diff", "apply")),
    "durable": ("big", ("apply",)),
}  # fmt: skip
# At most, by the kernels in use: wall time over the copy floor's, and user CPU seconds (AVX-512).
FLOORS = {
    "diff": 0.95, "apply": 1.1, "one-pass": 0.85, "diff-packed": 0.6, "apply-packed": 0.95,
    "diff-sparse": 0.4, "apply-sparse": 0.6, "orthogonality": 1.8, "verify": 1.1,
    "combine-linear": 2, "combine-ties": 5, "combine-dare_linear": 4,
}  # fmt: skip
BEFORE = {  # what numpy and NumKong took, which is the goal without kernels
    "diff": 2.52, "apply": 2.85, "one-pass": 2.04, "diff-packed": 1.27, "apply-packed": 3.39,
    "diff-sparse": 1.69, "apply-sparse": 1.46, "orthogonality": 9.4, "verify": 1.32,
    "combine-linear": 11.2, "combine-ties": 42, "combine-dare_linear": 22.5,
}  # fmt: skip
USER = {"diff": 0.45, "apply": 0.42, "one-pass": 0.8, "orthogonality": 0.5, "diff-packed": 1.1,
        "apply-packed": 0.75}  # fmt: skip
AVX2 = 1.25  # of the figures for AVX-512
SYNC = {"diff": 0.58, "apply": 0.58}  # of floor+sync
START = {"help": 0.043, "orthogonality": 0.2}  # CPU seconds; .15 of the other verbs
DURABLE, OTHER = 0.35, 40.0  # of cp + sync at most; of skillvec's time at least
MEMORY_MB, EACH_MS, EACH_KB = 150.0, 0.1, 2.0  # anonymous; a tensor


@dataclass
class Row:
    """One line of the table: what a contender took, by round, and what was to be reached."""

    job: str
    who: str
    spent: list[Spent] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)  # wall time over the copy floor's, by round
    anon_mb: float | None = None
    output_mb: float | None = None
    goals: list[tuple[str, float, str, float]] = field(default_factory=list)  # name, is, <= or >=

    def __str__(self) -> str:
        text = f"{self.job:<24} {self.who:<12}"
        text += f"{spread(self.floor):>20}" + f"{spread([s.seconds for s in self.spent]):>20}"
        for part in ("user", "cpu_seconds"):
            values = [getattr(s, part) for s in self.spent]
            text += f"{statistics.median(values):8.3f}{min(values):8.3f}" if values else " " * 16
        for number in (self.anon_mb, self.output_mb):
            text += f"{number:8.0f}" if number is not None else " " * 8
        for name, value, sign, limit in self.goals:
            reached = value <= limit if sign == "<=" else value >= limit
            text += f"  {name} {value:.3g} {sign} {limit:.3g} {'yes' if reached else 'NO'};"
        return text.rstrip(" ;")


HEADING = f"{'job':<24} {'who':<12}{'x floor: min med max':>20}{'wall s: min med max':>20}" + (
    f"{'user':>8}{'min':>8}{'u+sys':>8}{'min':>8}{'anonMB':>8}{'outMB':>8}  goals"
)


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return " ".join(f"{x:.2f}" for x in (min(values), statistics.median(values), max(values)))


def ratios(own: list[Spent], other: list[Spent]) -> list[float]:
    """Divide the wall seconds round by round."""
    return [a.seconds / b.seconds for a, b in zip(own, other, strict=True)]


# --------------------------------------------------------------------------------------- builds


def install(source: Path, place: Path) -> Path:
    """Install a source tree and what it needs into a venv; return its command."""
    subprocess.run([PYTHON, "-m", "venv", "--clear", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pins = source / "constraints.txt"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([*pip, "-c", str(pins), str(source)], check=True, env=env)
    return place / "bin" / "skillvec"


def builds_of(revisions: Sequence[str], place: Path) -> dict[str, Path]:
    """Return the commands of this tree and of commits by name; installed where they changed."""
    root, mark = HERE.parent, place / "now" / ".whole"
    held = [path for path in (root / "skillvec").rglob("*") if path.suffix in (".py", ".c", ".h")]
    newest = max(path.stat().st_mtime for path in [*held, root / "pyproject.toml"])
    found = {NOW: place / "now" / "bin" / "skillvec"}
    if not mark.exists() or mark.read_text() != str(root) or mark.stat().st_mtime < newest:
        install(root, place / "now")
        mark.write_text(str(root))
    for revision in revisions:
        ask = ["git", "-C", str(root), "rev-parse", "--short=9", f"{revision}^{{commit}}"]
        name = subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        venv, tree = place / name, place / f"{name}.tree"
        found[name] = venv / "bin" / "skillvec"
        if not (venv / ".whole").exists():
            shutil.rmtree(tree, ignore_errors=True)
            tree.mkdir(parents=True)
            packed = subprocess.run(
                ["git", "-C", str(root), "archive", name], check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", str(tree)], input=packed.stdout, check=True)
            install(tree, venv)
            (venv / ".whole").touch()
    return found


def kernels_of(program: Path) -> str:
    """Return whose kernels a build uses on this machine."""
    code = (
        "try:\n from skillvec.ops.kernels import kernels_in_use as say\n"  # before version 0.2
        "except ImportError:\n from skillvec.ops.compiled import in_use as say\n"
        "print(say())"
    )
    argv = [str(program.with_name("python")), "-I", "-c", code]  # not what lies here
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


# ----------------------------------------------------------------------------------------- jobs


def job_of(group: str, verb: str, size: str, work: Path, builds: dict[str, Path]) -> Job:
    """Return a job with all that take part in it, the floors first."""
    mine = {who: verbs_on(size, work / who, program) for who, program in builds.items()}
    own = mine[NOW][verb]
    setup = [step for jobs in mine.values() for step in jobs[verb].setup]
    commands: dict[str, Command] = {}
    if group in ("weights", "combine"):
        dense = mine[NOW][verb.removesuffix("-packed").removesuffix("-sparse")]
        inputs, out = dense.commands[NOW].inputs, own.commands[NOW].out
        inputs = inputs[::-1] if verb.startswith("apply") else inputs
        commands = floors(inputs, out and work / "floor")
        setup = [*dense.setup, *setup]
    commands |= {who: jobs[verb].commands[NOW] for who, jobs in mine.items()}
    if group == "many":  # a run of few tensors beside, which is subtracted
        few = {who: verbs_on("tiny", work / who, program)[verb] for who, program in builds.items()}
        setup += [step for job in few.values() for step in job.setup]
        commands |= {f"{who}, few": job.commands[NOW] for who, job in few.items()}
    if group == "others":
        there = others_on(size, work).get(verb, Job([], {}))
        setup, commands = [*setup, *there.setup], commands | there.commands
    return Job(setup, commands)


def durable(size: str, work: Path, program: Path) -> Job:
    """Return an apply to a model four times as large, until the output is on the disk."""
    sft, rl, target = (folder(size) / member for member in ("sft", "rl", "target"))
    large = {place: work / f"{place.name}-x4" for place in (sft, rl, target)}
    vector, out = work / "x4.safetensors", work / "out"
    setup = [partial(repeated, place, made, 4) for place, made in large.items()]
    setup += [diff(large[rl], large[sft], vector, program=program)]
    setup += [partial(remove, large[rl]), partial(remove, large[sft])]
    commands = {SYNCED: floors((large[target],), out)[SYNCED]}
    return Job(setup, commands | {NOW: apply(large[target], vector, out, program=program)})


def prepare(job: Job, work: Path) -> None:
    """Make what a job needs, unless an earlier one has made it."""
    for step in job.setup:
        if callable(step):
            step()
        elif step.out and not step.out.exists():
            sampled(step, work)


def measure(group: str, verb: str, job: Job, number: int, work: Path) -> list[Row]:
    """Run the rounds of a job, then each contender once more to see its memory."""
    spent = rounds(job.commands, number, work)
    name = verb if group in ("weights", "combine") else f"{group}: {verb}"
    rows = {who: Row(name, who, own) for who, own in spent.items()}
    for who, row in rows.items():
        if FLOOR in spent:
            row.floor = ratios(row.spent, spent[FLOOR])
        if who in (FLOOR, SYNCED):
            continue
        command = job.commands[who]
        row.anon_mb = sampled(command, work)["RssAnon"]
        if command.out and command.out.exists():
            row.output_mb = nbytes([command.out]) / 1e6
        remove(command.out)
    return [*rows.values()]


def same_bits(work: Path, size: str, commands: Iterable[Command]) -> list[str]:
    """Return what check.py says of applied models beside the one made of the dense delta."""
    said = []
    for command in commands:
        assert command.out
        sampled(command, work)
        places = ["--against", str(work / NOW / size / "applied")]
        argv = [PYTHON, str(HERE / "check.py"), str(command.out), *places]
        found = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
        remove(command.out)
        text = f"{found['unequal_bits']} of {found['values']:,} values differ"
        said.append(f"check: {' '.join(command.argv[1:4])}: {text}")
    return said


def set_goals(group: str, verb: str, rows: list[Row], kernels: str, tensors: int) -> None:
    """Write the goals of a job beside skillvec's row, or a contender's where it is theirs."""
    by = {row.who: row for row in rows}
    own = by[NOW]
    scale = 1.0 if "avx512" in kernels else AVX2
    compiled = "avx" in kernels or "neon" in kernels
    cpu = statistics.median(s.cpu_seconds for s in own.spent)
    if group in ("weights", "combine"):
        limit = FLOORS[verb] * scale if compiled else BEFORE[verb]
        own.goals.append(("x floor", statistics.median(own.floor), "<=", limit))
        if verb in SYNC:
            values = statistics.median(ratios(own.spent, by[SYNCED].spent))
            own.goals.append(("x floor+sync", values, "<=", SYNC[verb] * scale))
        if verb in USER and compiled:
            user = statistics.median(s.user for s in own.spent)
            own.goals.append(("user s", user, "<=", USER[verb] * scale))
    if group == "start":
        own.goals.append(("CPU s", cpu, "<=", START.get(verb, 0.15)))
    if group == "many":
        few = by[f"{NOW}, few"]
        each = cpu - statistics.median(s.cpu_seconds for s in few.spent)
        limit = 0.02 if verb == "inspect" else EACH_MS
        own.goals.append(("CPU ms a tensor", 1e3 * each / tensors, "<=", limit))
        assert own.anon_mb is not None and few.anon_mb is not None
        grown = 1e3 * (own.anon_mb - few.anon_mb) / tensors
        own.goals.append(("kB a tensor", grown, "<=", EACH_KB))
    for who in ("mergekit", "sd-mecha"):
        if who in by:
            times = statistics.median(ratios(by[who].spent, own.spent))
            by[who].goals.append(("x skillvec", times, ">=", OTHER))
    if group == "durable":
        times = statistics.median(ratios(own.spent, by[SYNCED].spent))
        own.goals.append(("x cp+sync", times, "<=", DURABLE))
    if group != "start" and own.anon_mb is not None:
        own.goals.append(("anon MB", own.anon_mb, "<=", MEMORY_MB))


# ---------------------------------------------------------------------------------------- table


def about_others() -> dict[str, str]:
    """Return the versions in the other programs' venv, if it is there."""
    site = next(OTHERS.glob("../lib/*/site-packages"), None)
    found = [] if site is None else site.glob("*.dist-info")
    kept = (path.name.removesuffix(".dist-info").rpartition("-") for path in found)
    return {name: v for name, _, v in kept if name in ("mergekit", "sd_mecha", "torch")}


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
        if before and getattr(before, group, None) != getattr(row, group, None):
            print()
        print(row)


def save(path: Path | None, given: argparse.Namespace, facts: dict[str, str], rows: Any) -> None:
    """Write the results as JSON, by default under results/ with the time in the name."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    path = path or HERE / "results" / f"{Path(sys.argv[0]).stem}-{now}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in vars(given).items() if k != "json"}
    result = {
        "made": now,
        "options": options,
        "facts": facts,
        "rows": [r if isinstance(r, str) else asdict(r) for r in rows],
    }
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


def asked_jobs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return group and verb of jobs: a group, a verb of the group weights, or GROUP:VERB."""
    found = []
    for name in names:
        group, _, verb = name.rpartition(":")
        if name in GROUPS:
            found += [(name, verb) for verb in GROUPS[name][1]]
        else:
            group = group or ("combine" if verb.startswith("combine") else "weights")
            if verb not in GROUPS.get(group, ("", ()))[1]:
                raise SystemExit(f"no job {name}: of {', '.join(GROUPS)}, or GROUP:VERB")
            found.append((group, verb))
    return found


def run_jobs(
    given: argparse.Namespace, builds: dict[str, Path], kernels: dict[str, str], work: Path
) -> list[Row | str]:
    """Run the jobs asked for; a family is made when its first job comes."""
    rows: list[Row | str] = []
    for group, verb in asked_jobs(given.jobs):
        size = given.size or GROUPS[group][0] if group == "weights" else GROUPS[group][0]
        families_of([size, *(["tiny"] if group == "many" else [])])
        print(f"{group}: {verb}, {size}", file=sys.stderr)
        if group == "durable":
            job = durable(size, work, builds[NOW])
            prepare(job, work)
        else:
            prepare(job_of(group, verb, size, work, builds), work)
            job = job_of(group, verb, size, work, builds)  # the floors list what is there now
        number = max(given.rounds, 15) if group == "start" else given.rounds
        if group in ("durable", "others"):
            number = min(number, 3)
        made = measure(group, verb, job, number, work)
        tensors = json.loads((folder(size) / "family.json").read_text()).get("tensors", 0)
        if size == GROUPS[group][0]:  # the goals are of that family
            set_goals(group, verb, made, kernels[NOW], tensors)
        rows += made
        for row in made:
            print(row, file=sys.stderr)
        if given.check and group == "weights" and verb.startswith(("apply", "one-pass")):
            prepare(job_of(group, "verify", size, work, {NOW: builds[NOW]}), work)
            rows += same_bits(work, size, [job.commands[NOW]])
        if given.tidy:
            shutil.rmtree(work)
            work.mkdir()
    return rows


def main() -> None:
    """Run what the command line asks for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def names(text: str) -> list[str]:
        return text.split(",")

    usual = [group for group in GROUPS if group != "durable"]
    parser.add_argument(
        "--jobs",
        type=names,
        default=usual,
        help=f"groups of {','.join(GROUPS)}, or diff, many:apply, start:help ...",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="REV",
        help="also time this commit, in the same rounds; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of a job; 15 at least of start")
    parser.add_argument("--size", help="another family for the group weights, such as small")
    parser.add_argument("--check", action="store_true", help="compare applied models bit for bit")
    parser.add_argument("--tidy", action="store_true", help="make stored deltas anew for each job,"
                        " which takes less disk and more time")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # work folders are deleted as well
    place = folder("builds")
    place.mkdir(parents=True, exist_ok=True)
    builds = builds_of(given.against, place)
    kernels = {who: kernels_of(program) for who, program in builds.items()}
    work = Path(tempfile.mkdtemp(prefix="work-", dir=place.parent))
    try:
        facts = about(work) | {f"kernels of {who}": said for who, said in kernels.items()}
        facts |= about_others()
        rows = run_jobs(given, builds, kernels, work)
    finally:
        shutil.rmtree(work)
    show(facts, HEADING, rows, "job")
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
