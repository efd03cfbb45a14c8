"""Make, apply and take back a vector of real weights with skillvec and with its peers.

Hides the schedule, the counting and the table. Invariants as in run.py: contenders run in turn
within a round, every other round backwards; a ratio is taken within a round; this skillvec is
installed by pip into a venv of its own; what is made besides builds and stand-ins is deleted at the
end; no numpy or torch in this process. exact.py compares every output with the exact result.
README.md says what each row is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from contenders import HERE, NOW, OTHERS, PYTHON, SYNCED, Job, folder
from measure import Command, Spent, nbytes, remove, rounds, sampled
from real_peers import PEERS, TASKS, WAYS, WHATS, Trio, Way, ways_of
from run import about, builds_of, kernels_of, prepare, ratios, save, show

PACKAGES = ("numpy", "zstandard", "safetensors", "torch", "transformers", "peft")
THEIRS = ("mergekit", "sd_mecha", "reminis", "deltatensors", "torch", "transformers")
SEED = Path("runs/real/seed-0/people")  # what `make real` leaves
MODELS = (SEED / "round-1/sft", SEED / "round-1/rl", SEED / "sft_t")
START = Path("runs/smollm2/base")
ROLES = Trio._fields[:3]  # base, tuned, target
PARTS = ("*.safetensors", "*.safetensors.index.json", "*config.json", "token*", "chat_template*")


@dataclass
class Row:
    """One line of the table; `counts` are those of exact.py."""

    job: str
    who: str
    note: str = ""
    spent: list[Spent] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)  # wall time over the floor's, by round
    own: list[float] = field(default_factory=list)  # over that of skillvec, by round
    anon_mb: float | None = None
    output_mb: float | None = None
    counts: dict[str, float] | None = None

    def __str__(self) -> str:
        text = f"{self.job:<14} {self.who:<20}"
        for values in (self.floor, self.own):
            text += f"{statistics.median(values):8.2f}" if values else " " * 8
        seconds = [spent.seconds for spent in self.spent]
        text += f"{statistics.median(seconds):8.2f}" if seconds else " " * 8
        text += f"{f'{min(seconds):.2f}-{max(seconds):.2f}':>14}" if seconds else " " * 14
        for number in (self.anon_mb, self.output_mb):
            text += f"{number:8.0f}" if number is not None else " " * 8
        text += f"{told(self.counts)}  {self.note}"
        return text.rstrip()


HEADING = f"{'task, models':<14} {'who':<20}{'x floor':>8}{'x own':>8}{'wall s':>8}" + (
    f"{'least-most':>14}{'anonMB':>8}{'outMB':>8}{'wrong':>13}{'of all':>9}{'lost':>9}  note"
)


def told(counts: dict[str, float] | None) -> str:
    """Return the columns of the counts: wrong values, their share, what they lose of v."""
    if counts is None:
        return " " * 31
    text = f"{counts['wrong']:13,.0f}{counts['wrong'] / counts['values']:9.2%}{counts['lost']:9.1e}"
    more = {"missing": "tensors missing", "extra": "tensors more", "other_dtype": "other dtype"}
    return text + "".join(f"  {counts[key]} {what};" for key, what in more.items() if counts[key])


def count(task: str, way: Way, trio: Trio) -> dict[str, float]:
    """Return what exact.py says of the output that lies there."""
    assert way.command and way.command.out
    output = way.result or way.command.out
    if way.values:
        sampled(way.values, trio.work)
        assert way.values.out
        output = way.values.out
    argv = [PYTHON, str(HERE / "exact.py"), str(output), "--what", WHATS[task]]
    roles = ("tuned", "base", "target") if task == "apply" else ("tuned", "base")
    argv += [word for role in roles for word in (f"--{role}", str(getattr(trio, role)))]
    found: dict[str, float] = json.loads(
        subprocess.run(argv, check=True, capture_output=True).stdout
    )
    remove(way.values.out if way.values else None)
    if task == "vector":  # may have any dtype, and is judged in it
        found["other_dtype"] = 0
    return found


def look(task: str, who: str, way: Way, trio: Trio) -> Row:
    """Run a way once, untimed unless it runs once: its memory, what it wrote, and what is wrong.

    The stored delta of the task vector is kept for the other tasks. What fails is told in the note.
    """
    row = Row(f"{task}, {trio.dtype}", who, way.note)
    if way.command is None:
        return row
    began = time.perf_counter()
    try:
        row.anon_mb = sampled(way.command, trio.work)["RssAnon"]
    except RuntimeError as error:
        row.note = f"failed: {str(error).strip().splitlines()[-1]}"
        remove(way.command.out)
        return row
    if way.once:
        row.spent = [Spent(time.perf_counter() - began, 0.0, 0.0)]
    out = way.command.out
    assert out
    row.output_mb = nbytes([out]) / 1e6
    if way.counted:
        row.counts = count(task, way, trio)
    if task == "vector" and who != SYNCED:
        remove(trio.stored(who))
        out.replace(trio.stored(who))
    remove(out)
    return row


def measure(task: str, trio: Trio, peers: list[str], number: int, quick: bool) -> list[Row]:
    """Return the rows of a task: first a look at each way, then the rounds of those that work.

    What runs once is divided by the medians of the floor and of skillvec.
    """
    prepare(Job(trio.setup(), {}), trio.work)
    ways = ways_of(task, trio, peers)
    if quick and "mergekit LoRA" in ways:
        ways["mergekit LoRA"] = Way(None, "not asked for: --quick")
    rows = {who: look(task, who, way, trio) for who, way in ways.items()}
    timed: dict[str, Command] = {}
    for who, way in ways.items():
        if way.command and rows[who].anon_mb is not None and not way.once:
            timed[who] = way.command
    spent = rounds(timed, number, trio.work)
    for who, row in rows.items():
        row.spent = spent.get(who, row.spent)
        for place, beside in ((row.floor, SYNCED), (row.own, NOW)):
            if who in timed:
                place += ratios(row.spent, spent[beside])
            elif row.spent:
                usual = statistics.median(s.seconds for s in spent[beside])
                place.append(row.spent[0].seconds / usual)
    return [*rows.values()]


# --------------------------------------------------------------------------------------- models


def dtype_of(model: Path) -> str:
    """Return fp32 or bf16; ends with a sentence where a folder has anything else."""
    found = set()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    known = {frozenset({"F32"}): "fp32", frozenset({"BF16"}): "bf16"}
    if frozenset(found) not in known or not (model / "config.json").exists():
        raise SystemExit(
            f"{model}: expected config.json and safetensors, all F32 or all BF16;"
            f" found tensors of {', '.join(sorted(found)) or 'no dtype'}"
        )
    return known[frozenset(found)]


def models_of(given: list[str] | None) -> tuple[list[Path], str]:
    """Return base, tuned and target, and what they are; stand-ins until `make real` has run."""
    root = HERE.parent
    if given:
        return [Path(place).resolve() for place in given], "as given"
    if all((root / place).is_dir() for place in MODELS):
        return [root / place for place in MODELS], "trained, of make real, seed 0"
    if not (root / START).is_dir():
        raise SystemExit(f"neither {SEED} nor {START}: make real, or --models BASE TUNED TARGET")
    made = folder("real-stand-ins")
    script = [PYTHON, str(HERE / "real_models.py"), "stand-in", str(root / START), str(made)]
    subprocess.run(script, check=True)
    return [made / role for role in ROLES], "STAND-INS: real weights and noise"


def trios(models: list[Path], work: Path, program: Path, quick: bool) -> dict[str, Trio]:
    """Return copies of the models as they are, and of fp32 ones in bf16; those alone if quick.

    What else lies in the folders, such as the states of a training, is left out.
    """
    dtypes = {dtype_of(model) for model in models}
    if len(dtypes) > 1:
        raise SystemExit(f"the models differ in dtype: {', '.join(sorted(dtypes))}")
    own, found = work / "models", {}
    for role, model in zip(ROLES, models, strict=True):
        (own / role).mkdir(parents=True)
        for path in [p for pattern in PARTS for p in sorted(model.glob(pattern))]:
            shutil.copy(path, own / role)
    for dtype in dict.fromkeys((*dtypes, "bf16")):
        (place := work / dtype).mkdir()
        here = [own / role for role in ROLES]
        if dtype not in dtypes:
            here = [work / "models-bf16" / role for role in ROLES]
            for role in ROLES:
                argv = [PYTHON, str(HERE / "real_models.py"), "bf16", str(own / role)]
                subprocess.run([*argv, str(work / "models-bf16" / role)], check=True)
        found[dtype] = Trio(here[0], here[1], here[2], dtype, place, program)
    return {"bf16": found["bf16"]} if quick else found


def versions() -> dict[str, str]:
    """Return the versions in the peers' venvs, as far as these are there."""
    said = {}
    for venv in (OTHERS, PEERS):
        for path in venv.glob("../lib/*/site-packages/*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
            if name in THEIRS:
                said[f"{name} beside" if name in PACKAGES else name] = version
    return said


def main() -> None:
    """Run what the command line asks for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models", nargs=3, metavar=("BASE", "TUNED", "TARGET"),
        help="folders; by default those of make real, or stand-ins for them",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=[*WAYS], help=f"of {','.join(WAYS)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each task")
    parser.add_argument("--quick", action="store_true",
                        help="one round, in bf16 alone, without the adapter")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()
    if unknown := sorted(set(given.peers) - WAYS.keys()):
        parser.error(f"no peer {', '.join(unknown)}: of {', '.join(WAYS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the work folder is deleted as well
    models, origin = models_of(given.models)
    place = folder("builds")
    place.mkdir(parents=True, exist_ok=True)
    program = builds_of((), place)[NOW]
    work = Path(tempfile.mkdtemp(prefix="real-", dir=place.parent))
    rows: list[Row] = []
    try:
        facts = about(work, PACKAGES) | {"kernels": kernels_of(program)} | versions()
        facts["models"] = f"{', '.join(model.name for model in models)}: {origin}"
        for trio in trios(models, work, program, given.quick).values():
            for task in TASKS:
                number = 1 if given.quick else given.rounds
                made = measure(task, trio, given.peers, number, given.quick)
                print(*made, sep="\n", file=sys.stderr)
                rows += made
            shutil.rmtree(trio.work)
        facts["load at the end"] = f"{os.getloadavg()[0]:.1f}"
    finally:
        shutil.rmtree(work)
    show(facts, HEADING, rows, "job")
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
