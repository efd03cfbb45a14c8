"""False alarms and power of the statements about a pair, measured: docs/calibration.md.

Draws pairs of updates that are independent of each other, in the structures of structures.py,
writes them as models and compares them by `skillvec.orthogonality`, as a user would. Of
independent pairs one in twenty may have p < .05, and z must have a standard deviation of 1; what a
relation of known size adds to that is the power. Relations are planted as cosines of 2, 4 and 6
times the standard deviation that independent pairs of the structure have.

    python benchmarks/calibration.py                        # what `make calibration` does
    python benchmarks/calibration.py --structure iid --pairs 50   # one structure, shown only

Pairs are addressed by structure and number, so one gives the same numbers in every run, whatever
the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from structures import BF16, REAL, SPARSE, STRUCTURES, Pairs

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "calibration.md"
RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
MINIATURE = ROOT / "runs" / "mini"
SIZES = (2, 4, 6)  # planted cosines, in standard deviations of the structure
NULLS = ("z_isotropic", "z_groups", "z_rows", "z_channels", "z_rotation")
MOST = 0.95  # of a planted cosine
LEVEL = 0.05
DIRECTIONS = 4  # singular directions that are compared
AT_ONCE = 10  # pairs a task
CLAIM = "not by chance"  # in the sentence of a pair that is related


class Task(NamedTuple):
    """Some pairs of one structure."""

    structure: str
    numbers: tuple[int, ...]
    cosine: float = 0.0
    subspace: int = 0
    miniature: Path = MINIATURE


Measured = dict[str, Any]  # numbers of one pair


def measure(task: Task) -> list[Measured]:
    """Compare the pairs of a task; return the overall numbers of each, and its sentence."""
    import torch
    from safetensors.torch import save_file

    import skillvec

    pairs, found = draws(task.structure, task.miniature), []
    dtype = torch.bfloat16 if task.structure == BF16 else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.safetensors" for name in ("base", "one", "other")]
        for number in task.numbers:
            seed = [zlib.crc32(task.structure.encode()), number]
            models = pairs.draw(np.random.default_rng(seed), task.cosine)
            for path, model in zip(paths, models, strict=True):
                save_file({n: torch.from_numpy(t).to(dtype) for n, t in model.items()}, path)
            report = skillvec.orthogonality(
                f"{paths[1]}::{paths[0]}", f"{paths[2]}::{paths[0]}",
                engine="serial", subspace=task.subspace,
            )  # fmt: skip
            (pair,) = report.facts["pairs"]
            row = {key: value for key, value in pair["overall"].items()
                   if value is None or isinstance(value, float | str)}  # fmt: skip
            found.append(row | {"claimed": CLAIM in pair["sentence"]})
    return found


@cache
def draws(structure: str, miniature: Path) -> Pairs:
    return Pairs(structure, miniature)


class Workers:
    """Processes that measure tasks, and lines that say how far they are."""

    def __init__(self, processes: int) -> None:
        self.pool = ProcessPoolExecutor(processes)

    def measure(
        self, structure: str, numbers: range, cosine: float = 0.0, subspace: int = 0
    ) -> list[Measured]:
        tasks = [Task(structure, tuple(numbers[at : at + AT_ONCE]), cosine, subspace)
                 for at in range(0, len(numbers), AT_ONCE)]  # fmt: skip
        return [row for rows in self.pool.map(measure, tasks) for row in rows]


# ------------------------------------------------------------------------------ what is said


def interval(count: int, of: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927)."""
    share, z = count / of, 1.96
    middle, width = share + z * z / (2 * of), z * sqrt(share * (1 - share) / of + (z / of / 2) ** 2)
    return max(0.0, (middle - width) / (1 + z * z / of)), (middle + width) / (1 + z * z / of)


class Share(NamedTuple):
    """How many of how many."""

    count: int
    of: int

    @classmethod
    def below(cls, rows: Iterable[Measured], key: str) -> Share | None:
        """Return how many of the rows that have the number have it under LEVEL."""
        known = [row[key] for row in rows if row.get(key) is not None]
        return cls(sum(p < LEVEL for p in known), len(known)) if known else None

    def show(self) -> str:
        low, high = interval(*self)
        return f"{self.count / self.of:.3f} ({low:.3f} to {high:.3f})"


def spread(rows: Sequence[Measured], key: str) -> float | None:
    """Return the root of the mean square of a number that has mean 0 by chance."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if known else None


def mean(rows: Sequence[Measured], key: str) -> float | None:
    known = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(known)) if known else None


def run(
    structure: str, pairs: int, planted: int, decomposed: int, workers: Workers
) -> dict[str, Any]:
    """Return what is found of one structure, as it is written to the JSON file.

    Of `pairs` independent pairs `decomposed` have their subspaces compared; `planted` pairs of
    each size are related.
    """
    both = workers.measure(structure, range(decomposed), subspace=DIRECTIONS)
    rows = both + workers.measure(structure, range(decomposed, pairs))
    cosine = spread(rows, "cosine")
    assert cosine is not None
    found: dict[str, Any] = {
        "pairs": pairs,
        "cosine": cosine,
        "p": Share.below(rows, "p"),
        "z": spread(rows, "z"),
        "nulls": {key: spread(rows, key) for key in NULLS},
        "headline": Counter(row["null"] for row in rows if row.get("null")),
        "claimed": Share(sum(row["claimed"] for row in rows), pairs),
        "planted": [],
    }
    for size in SIZES:
        held = workers.measure(structure, range(planted), cosine=min(size * cosine, MOST))
        claimed = Share(sum(row["claimed"] for row in held), planted)
        found["planted"].append({"size": size, "p": Share.below(held, "p"), "claimed": claimed})
    if structure in SPARSE:
        found["supports"] = {
            key: mean(rows, key) for key in ("density_a", "lift", "lift_weights")
        } | {
            "p_overlap": Share.below(rows, "p_overlap"),
            "overlap_z": spread(rows, "overlap_z"),
            "sign_z": spread(rows, "sign_z"),
        }
    found["subspaces"] = {key: spread(both, key) for key in ("overlap_left_z", "overlap_right_z")}
    return found


# ------------------------------------------------------------------------------ written


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def share(held: Sequence[int] | None) -> str:
    return "-" if held is None else Share(*held).show()


def percent(held: Sequence[int]) -> str:
    return f"{100 * held[0] / held[1]:.0f} %"


def answer(structures: dict[str, Any]) -> str:
    """Return in two sentences what is worst over all structures: alarms, verdict, power."""
    shares = [hits / pairs for hits, pairs in (held["p"] for held in structures.values())]
    claimed = max((held["claimed"] for held in structures.values()), key=lambda x: x[0] / x[1])
    planted = [held["planted"][1] for held in structures.values()]
    found = min((row["p"] for row in planted), key=lambda x: x[0] / x[1])
    return (
        f"In every structure below, between {min(shares):.3f} and {max(shares):.3f} of the"
        " independent pairs have p < .05, where .05 is right, and the report says *not by chance*"
        f" of at most {percent(claimed)} of them. A relation of {planted[0]['size']} standard"
        f" deviations gets p < .05 in at least {percent(found)} of pairs."
    )


def alarms(structures: dict[str, Any]) -> str:
    """Return the table of false alarms: the headline p and the verdict of independent pairs."""
    rows = [
        [name, share(held["p"]), number(held["z"]), percent(held["claimed"]),
         ", ".join(f"{null} {percent((count, held['pairs']))}"
                   for null, count in sorted(held["headline"].items(), key=lambda x: -x[1])) or "-"]
        for name, held in structures.items()
    ]  # fmt: skip
    return table(["structure", "p < .05", "sd of z", '"not by chance"', "null of z"], rows)


def power(structures: dict[str, Any]) -> str:
    """Return the table of planted cosines: how often p < .05, and of the largest the verdict."""
    rows = [
        [name, number(held["cosine"], ".2g"), *(percent(row["p"]) for row in held["planted"]),
         percent(held["planted"][-1]["claimed"])]
        for name, held in structures.items()
    ]  # fmt: skip
    sizes = [f"at {size} sd" for size in SIZES]
    return table(
        ["structure", "sd of the cosine", *sizes, f'"not by chance" at {SIZES[-1]} sd'], rows
    )


def nulls(structures: dict[str, Any]) -> str:
    """Return the table of the null models beside the headline: the spread of the z of each."""
    rows = [[name, *(number(held["nulls"][key]) for key in NULLS)]
            for name, held in structures.items()]  # fmt: skip
    return table(["structure", *(f"`{key}`" for key in NULLS)], rows)


def supports(structures: dict[str, Any]) -> str:
    rows = [
        [name, f"{100 * held['density_a']:.0f} %", number(held["lift"]),
         number(held["lift_weights"]), share(held["p_overlap"]),
         number(held["overlap_z"]), number(held["sign_z"])]
        for name, held in ((n, s["supports"]) for n, s in structures.items() if "supports" in s)
    ]  # fmt: skip
    heads = [
        "structure",
        "density",
        "lift",
        "given weights",
        "`p_overlap` < .05",
        "sd of `overlap_z`",
        "sd of `sign_z`",
    ]
    return table(heads, rows)


def subspaces(structures: dict[str, Any]) -> str:
    keys = "overlap_left_z", "overlap_right_z"
    rows = [[name, *(number(held["subspaces"][key]) for key in keys)]
            for name, held in structures.items()]  # fmt: skip
    return table(["structure", *(f"sd of `{key}`" for key in keys)], rows)


def page(results: dict[str, Any]) -> str:
    """Return docs/calibration.md, from what the JSON file holds."""
    held = results["structures"]
    template = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return template.format(
        facts="; ".join(f"{key} {value}" for key, value in results["facts"].items()),
        pairs=results["pairs"], planted=results["planted"], directions=DIRECTIONS,
        decomposed=results["decomposed"],
        answer=answer(held), alarms=alarms(held), power=power(held), nulls=nulls(held),
        supports=supports(held), subspaces=subspaces(held),
    )  # fmt: skip


def facts() -> dict[str, str]:
    """Return machine and versions by name."""
    from importlib.metadata import version

    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            **{name: version(name) for name in ("skillvec", "numpy", "torch")}}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structure", action="append", choices=[*STRUCTURES, REAL], default=[],
                        help="Only this one, which writes no page.")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=400, help="Independent pairs a structure.")
    parser.add_argument("--planted", type=int, default=100, help="Related pairs a size.")
    parser.add_argument("--decomposed", type=int, default=40,
                        help="Independent pairs of which subspaces are compared.")  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--page", action="store_true", help="From the JSON file of the last run.")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")
        return 0
    if REAL in (given.structure or [REAL]):
        try:
            Pairs(REAL, MINIATURE)
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the processes
    workers, found = Workers(given.processes), {}
    for structure in given.structure or [*STRUCTURES, REAL]:
        found[structure] = run(structure, given.pairs, given.planted, given.decomposed, workers)
        held = found[structure]
        spreads = " ".join(f"{key} {number(value)}" for key, value in held["nulls"].items())
        print(f"{structure:24} p < .05 {share(held['p'])}, sd of z {number(held['z'])}; {spreads}",
              flush=True)  # fmt: skip
    counts = {key: getattr(given, key) for key in ("pairs", "planted", "decomposed")}
    results = {"facts": facts(), **counts, "structures": found}
    written = json.loads(json.dumps(results))
    print(
        "", alarms(found), power(found), nulls(found), supports(found), subspaces(found), sep="\n\n"
    )
    if not given.structure:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")
        PAGE.write_text(page(written), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
