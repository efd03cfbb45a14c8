"""Compare what stores a delta in fewer bytes, over the share of values that the delta changes.

Hides the search for an update that changes a given share, the schedule and the table. Invariants:
one dense bf16 delta a share, the same for all; all run in turn within a round; medians; skillvec's
output from every codec has the same bits, else RuntimeError; the files made are deleted at the end.
README.md says what each row is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import check
import family
import numpy as np
from contenders import CODECS, HERE, PYTHON, Command, apply, skillvec, stored
from in_memory import CODECS as IN_MEMORY
from measure import nbytes, sampled, timed
from run import PACKAGES, about, save, show

# An update that changes 70 % is as large as family.py's sft; a normal one never changes all.
PERCENTS = (1.0, 5.0, 17.0, 30.0, 70.0, 99.5)
NUMEL = 128_000_000
SHAPES = replace(family.SIZES["small"], vocab=8192, layers=1)
SAMPLE_NUMEL = 1 << 20
# Stored as bf16 like the peers' values; the last is skillvec's default, with what makes it exact.
OPTIONS = {codec: ["--codec", codec, "--dtype", "bf16"] for codec in CODECS} | {"exact": []}


@dataclass
class Row:
    """One contender at one share: seconds are one a round, `nbytes` the whole of what it stores."""

    percent: float
    who: str
    numel: int
    nbytes: int = 0
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        dense = 2 * self.numel
        sizes = f"{8 * self.nbytes / self.numel:7.2f} {dense / self.nbytes:7.1f}x"
        text = f"{self.percent:6.1f} % {self.who:<29}{sizes}"
        for seconds in (self.encode, self.decode):
            low, middle, high = (dense / 1e9 / f(seconds) for f in (max, statistics.median, min))
            edges = f"({low:.2f}-{high:.2f})" if len(seconds) > 1 else ""
            text += f"  {middle:6.2f} {edges:<13}"
        return text.rstrip()


def update_rms(share: float) -> float:
    """Return the rms of an update of fp32 weights that changes `share` of their bf16 roundings."""
    normal = np.random.Generator(np.random.SFC64(family.SEED)).standard_normal
    master = normal(SAMPLE_NUMEL, np.float32) * np.float32(family.WEIGHT_RMS)
    update = normal(SAMPLE_NUMEL, np.float32)
    before = family.to_bf16(master)
    low, high = 1e-9, 1.0
    for _ in range(30):
        middle = float(np.sqrt(low * high))
        after = family.to_bf16(master + update * np.float32(middle))
        low, high = (low, middle) if np.mean(after != before) > share else (middle, high)
    return low


def shapes(numel: int) -> family.Size:
    """Return Llama shapes of about `numel` values, one layer (24 million) or more, in a shard."""
    one, two = (
        sum(int(np.prod(shape)) for _, shape in family.shapes(replace(SHAPES, layers=layers)))
        for layers in (1, 2)
    )
    layers = max(1, 1 + round((numel - one) / (two - one)))
    return replace(SHAPES, layers=layers, shard_nbytes=4 * numel + 4 * one)


def commands_of(members: Path, work: Path) -> dict[str, tuple[Command, Command]]:
    """Store skillvec's deltas in `work` and return its (diff, apply) by codec."""
    sft, rl, target = (members / member for member in ("sft", "rl", "target"))
    commands = {}
    for codec, options in OPTIONS.items():
        diffs = [
            skillvec("diff", rl, sft, out=out, options=options)
            for out in (stored(work, codec), work / "out.safetensors")
        ]
        sampled(diffs[0], work)
        commands[codec] = diffs[1], apply(target, stored(work, codec), work / "out")
    return commands


def require_same_output(commands: dict[str, tuple[Command, Command]], work: Path) -> None:
    """Raise RuntimeError unless apply writes the same bits from every codec as from dense."""
    kept = work / "from-dense"
    sampled(commands["dense"][1], work)
    (work / "out").rename(kept)
    for codec in CODECS[1:]:
        sampled(commands[codec][1], work)
        found = check.compare(work / "out", {"against": kept}, 1.0)
        if found["unequal_bits"]:
            raise RuntimeError(f"apply from {codec} differs from apply from dense: {found}")
        shutil.rmtree(work / "out")
    shutil.rmtree(kept)


def in_memory(codec: str, delta: Path) -> dict[str, float]:
    """Run in_memory.py once."""
    argv = [PYTHON, str(HERE / "in_memory.py"), codec, str(delta)]
    found: dict[str, float] = json.loads(
        subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout
    )
    return found


def measured(
    percent: float, given: argparse.Namespace, peers: dict[str, str], work: Path
) -> list[Row]:
    """Return the rows of one share; `work` is an empty folder."""
    size = replace(shapes(given.numel), rl_update_rms=update_rms(percent / 100))
    members = family.make(size, work / "members")
    made = json.loads((members / "family.json").read_text())
    numel, percent = made["parameters"], 100 * made["changed_share"]["rl"]
    commands = commands_of(members, work)
    require_same_output(commands, work)
    rows = {codec: Row(percent, f"skillvec {codec}, command", numel) for codec in commands}
    for codec, row in rows.items():
        row.nbytes = nbytes([stored(work, codec)])
    memory = {who: Row(percent, label, numel) for who, label in peers.items()}
    for turn in range(1, given.rounds + 1):
        print(f"{percent:.1f} %, round {turn}", file=sys.stderr)
        for codec, (diff, own) in commands.items():
            rows[codec].encode.append(timed(diff, work).seconds)
            rows[codec].decode.append(timed(own, work).seconds)
        for who, row in memory.items():
            found = in_memory(who, stored(work, "dense"))
            row.nbytes = int(found["nbytes"])
            row.encode.append(found["encode"])
            row.decode.append(found["decode"])
    return [*rows.values(), *memory.values()]


def main() -> None:
    """Measure the shares asked for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def numbers(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    parser.add_argument("--percent", type=numbers, default=list(PERCENTS), help="values changed")
    parser.add_argument("--numel", type=int, default=NUMEL, help="about so many values")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()

    peers = {who: f"{'skillvec ' * (who in CODECS)}{who}, memory" for who in IN_MEMORY}
    if not find_spec("zipnn"):
        print("zipnn is not installed: its rows are left out", file=sys.stderr)
        del peers["zipnn"]
    # A terminated run must delete its work folder as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parent = family.folder("codecs")
    parent.mkdir(parents=True, exist_ok=True)
    facts = about(parent, (*PACKAGES, "zipnn"))
    rows = []
    for percent in given.percent:
        with tempfile.TemporaryDirectory(prefix="work-", dir=parent) as work:
            rows += measured(percent, given, peers, Path(work))
    heading = (
        f"{'':38}{'bits a':>7} {'dense /':>8}  {'encode':>6} {'':<13}  {'decode':>6}\n"
        f"{'changed':<9}{'who':<29}{'value':>7} {'stored':>8}  {'GB/s':>6} {'':<13}  {'GB/s':>6}"
    )
    show(facts, heading, rows, "percent")
    save(given.json, given, facts, rows)


if __name__ == "__main__":
    main()
