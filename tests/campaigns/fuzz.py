"""The long run over hostile files: every target of hostile.py, each in a process of its own.

    python tests/campaigns/fuzz.py [--cases N] [--target NAME] [--seed N] [--out FOLDER]

With atheris (`pip install atheris==3.0.0`) cases are led by coverage of skillvec's own code;
without it they are harmed seeds, and the table says so. Of the cases that are taken, every eighth
goes on to the verbs. Memory is limited; sockets, processes and opens outside the folder are
findings. FOLDER gets results.json and every case that is a finding. Exits with 1 if there is one.
"""

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

DEEP = 8
ROOM = 2 << 30  # bytes of addresses that a target may take beyond what its imports took
LONGEST = 1 << 16  # bytes of a case


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def where(error: BaseException) -> str:
    """Return the kind of a finding: its type, and the last line of skillvec that it went by."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{os.sep}skillvec{os.sep}" in f.filename] or list(frames)
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:120]}"


class Run:
    """Counts what one target's cases came to."""

    def __init__(self, target: Any, name: str, cases: int, out: Path) -> None:
        self.target, self.name, self.cases, self.out = target, name, cases, out
        self.before = peak_mb()
        self.counts = {"cases": 0, "taken": 0, "refused": 0, "deep": 0}
        self.findings: dict[str, int] = {}
        self.slowest = 0.0

    def one(self, data: bytes) -> None:
        if self.counts["cases"] == self.cases:
            return
        self.counts["cases"] += 1
        deep = self.counts["taken"] % DEEP == 0
        begun = time.monotonic()
        try:
            taken = self.target.once(data, deep)
            self.counts["taken" if taken else "refused"] += 1
            self.counts["deep"] += deep and taken
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kind = where(error)
            if kind not in self.findings:
                (self.out / f"{self.name}-{len(self.findings)}").write_bytes(data)
            self.findings[kind] = self.findings.get(kind, 0) + 1
        self.slowest = max(self.slowest, time.monotonic() - begun)
        if self.counts["cases"] % 100 == 0 or self.counts["cases"] == self.cases:
            self.write()

    def write(self) -> None:
        said = {
            **self.counts, "findings": self.findings, "slowest_seconds": round(self.slowest, 2),
            "peak_mb": peak_mb(), "peak_mb_before": self.before,
        }  # fmt: skip
        (self.out / f"{self.name}.json").write_text(json.dumps(said))


def child(name: str, cases: int, seed: int, out: Path) -> None:
    """Run one target in this process."""
    logging.disable(logging.WARNING)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # half of the time, and no news
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        atheris = None
    if atheris is None:
        hostile = importlib.import_module("hostile")
    else:
        with atheris.instrument_imports(include=["skillvec"]):
            hostile = importlib.import_module("hostile")
    importlib.import_module("transformers.conversion_mapping")
    importlib.import_module("huggingface_hub")
    with tempfile.TemporaryDirectory() as folder:
        target = hostile.TARGETS[name](Path(folder) / "files")
        for valid in target.seeds:
            target.once(valid, deep=True)  # lazy imports belong to what was before
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        run = Run(target, name, cases, out)
        if atheris is None:
            rng = Random(seed)
            for _ in range(cases):
                run.one(target.harm(rng, rng.choice(target.seeds)))
            return
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, valid in enumerate(target.seeds):
            (corpus / str(i)).write_bytes(valid)

        def mutate(data: bytes, most: int, number: int) -> bytes:
            rng = Random(number)
            chosen = rng.choice(target.seeds) if rng.randrange(2) else data
            if rng.randrange(6) == 0:
                return bytes(atheris.Mutate(chosen, most))
            return bytes(target.harm(rng, chosen)[:most])

        # two runs more than cases: libFuzzer tries the empty input and the corpus first
        flags = [f"-runs={cases + len(target.seeds) + 2}", f"-seed={seed}", f"-max_len={LONGEST}",
                 "-timeout=0", "-rss_limit_mb=0", "-len_control=0", str(corpus)]  # fmt: skip
        atheris.Setup([name, *flags], run.one, custom_mutator=mutate)
        try:
            atheris.Fuzz()
        except BaseException:  # of the campaign itself; leaving in the usual way, libFuzzer hangs
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def parent(names: list[str], cases: int, seed: int, out: Path) -> int:
    """Run every target, print the table, return how many kinds of findings there are."""
    out.mkdir(parents=True, exist_ok=True)
    results, begun = {}, time.monotonic()
    for name in names:
        log = out / f"{name}.log"
        (out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--child", name, "--cases", str(cases),
                   "--seed", str(seed), "--out", str(out)]  # fmt: skip
        started = time.monotonic()
        with log.open("wb") as file:
            status = subprocess.run(command, stdout=file, stderr=file).returncode
        made = out / f"{name}.json"
        said = json.loads(made.read_text()) if made.exists() else {"cases": 0, "findings": {}}
        if said["cases"] < cases:
            said["findings"][f"ended with {status} after {said['cases']} cases (see {log})"] = 1
        text = log.read_text(errors="replace")
        for key, word in (("edges", "cov"), ("features", "ft")):
            found = re.findall(rf"\b{word}: (\d+)", text)
            said[key] = int(found[-1]) if found else None
        said["seconds"] = round(time.monotonic() - started, 1)
        results[name] = said
        print(row(name, said) if len(results) > 1 else f"{HEAD}\n{row(name, said)}", flush=True)
    total = {key: sum(said.get(key) or 0 for said in results.values())
             for key in ("cases", "taken", "refused", "deep", "edges", "features")}  # fmt: skip
    total |= {key: max(said.get(key) or 0 for said in results.values())
              for key in ("slowest_seconds", "peak_mb", "peak_mb_before")}  # fmt: skip
    kinds = [f"{name}: {kind} ({n} cases)" for name, said in results.items()
             for kind, n in said["findings"].items()]  # fmt: skip
    print(row("total", total | {"findings": kinds}))
    packages = {}
    for package in ("atheris", "numpy", "torch", "safetensors", "zstandard", "pyyaml"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not there"
    led = "cases led by coverage" if packages["atheris"] != "not there" else "harmed seeds only"
    versions = ", ".join(f"{key} {value}" for key, value in packages.items())
    seconds = round(time.monotonic() - begun)
    print(f"{led}; seed {seed}; {seconds} s; Python {platform.python_version()}, {versions}")
    print("\n".join(f"finding: {kind}" for kind in kinds) or "no findings")
    report = {"targets": results, "total": total, "seed": seed, "seconds": seconds,
              "packages": packages}  # fmt: skip
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    return len(kinds)


COLUMNS = {"cases": 8, "taken": 8, "refused": 8, "deep": 6, "edges": 6, "features": 9,
           "findings": 9, "slowest_seconds": 9, "peak_mb": 8}  # fmt: skip
TITLES = {"slowest_seconds": "slowest s", "peak_mb": "peak MB"}
HEAD = f"{'target':<13}" + "".join(f"{TITLES.get(c, c):>{w + 1}}" for c, w in COLUMNS.items())


def row(name: str, said: dict[str, Any]) -> str:
    cells = said | {"findings": len(said["findings"])}
    shown = ("-" if cells.get(c) is None else str(cells[c]) for c in COLUMNS)
    return f"{name:<13}" + "".join(
        f"{s:>{w + 1}}" for s, w in zip(shown, COLUMNS.values(), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of each target")
    parser.add_argument("--target", action="append", help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.cases, given.seed, given.out)
        return
    names = given.target or list(importlib.import_module("hostile").TARGETS)
    sys.exit(1 if parent(names, given.cases, given.seed, given.out.resolve()) else 0)


if __name__ == "__main__":
    main()
