"""`make demo`: train the miniature, move the skill by the skillvec command line, score it.

Hides nothing of the method: every diff, apply, orthogonality and verify below is the command line a
user would type, run as its own process. The one piece of arithmetic here is the control's noise.
Stops with a command's own exit code as soon as one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.mini.evaluate import Accuracy

LAMBDAS = (0.5, 1.0, 1.5, -1.0)
SFT_ONLY = "SFT only"
RANDOM = "random vector, same norm"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the world and the training")
    options = parser.parse_args(arguments)

    # read by the libraries when they are imported, so set before; nothing is downloaded here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from recipes.mini.evaluate import evaluate_checkpoint
    from recipes.mini.progress import say
    from recipes.mini.train import MiniConfig, plan_stages, run_stages
    from recipes.mini.world import WorldConfig, build_world, questions

    out: Path = options.out
    config = MiniConfig(world=WorldConfig(seed=options.seed), seed=options.seed)
    world = build_world(config.world)

    say("1. Train four small models on the CPU (once; a second run reuses them)\n")
    run_stages(plan_stages(config, world), world, out)

    say("\n2. Cut out the skill, look at it, add it to the model that RL never touched")
    try:
        merged = transfer(out)
        say("\n3. A control: noise with the norm of the skill, tensor by tensor")
        write_noisy_checkpoint(out, options.seed)
        merged[RANDOM] = transfer_noise(out)
    except subprocess.CalledProcessError as error:
        print(f"demo: stopped, exit code {error.returncode}: {show(error.cmd)}", file=sys.stderr)
        return error.returncode

    say("\n4. Ask about the people of T, closed book\n")
    on_t = {
        name: evaluate_checkpoint(folder, questions(world.t))
        for name, folder in {SFT_ONLY: out / "theta_sft_T", **merged}.items()
    }
    on_s = {
        name: evaluate_checkpoint(out / name, questions(world.s))
        for name in ("theta_sft_S", "theta_rl_S")
    }
    conclusion = conclude(on_t, on_s)
    report(on_t, conclusion)
    result = out / "accuracy.json"
    scores = {
        "seed": options.seed,
        "on_T": {name: asdict(score) for name, score in on_t.items()},
        "on_S": {name: asdict(score) for name, score in on_s.items()},
        "conclusion": conclusion,
    }
    result.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    say(f"\nwritten: {result}")
    return 0


def transfer(out: Path) -> dict[str, Path]:
    """Make the vectors, compare them, apply the skill; return row title -> merged folder."""
    skill, sft_s, sft_t = (out / f"{name}.safetensors" for name in ("skill", "sft_S", "sft_T"))
    run("diff", out / "theta_rl_S", out / "theta_sft_S", "-o", skill, "--method", "grpo", "--force")
    run("inspect", skill)
    run("diff", out / "theta_sft_S", out / "base", "-o", sft_s, "--force")
    run("diff", out / "theta_sft_T", out / "base", "-o", sft_t, "--force")
    angles = ("--control", "random", "--sign-flips", "999", "--subspace", "8")
    written = ("--against", out / "base", "-o", out / "report", "--figures", "--force")
    run("orthogonality", skill, sft_s, sft_t, *angles, *written)
    merged = {}
    for lam in LAMBDAS:
        folder = out / f"merged_lam_{lam:g}"
        run("apply", out / "theta_sft_T", skill, "-o", folder, "--lam", f"{lam:g}", "--force")
        merged[f"skill, lambda {lam:g}"] = folder
    run("verify", out / "merged_lam_1")
    return merged


def transfer_noise(out: Path) -> Path:
    """Treat the noisy checkpoint as if RL had made it: same diff, same apply."""
    vector, folder = out / "random.safetensors", out / "merged_random"
    run("diff", out / "noisy_S", out / "theta_sft_S", "-o", vector, "--force")
    run("apply", out / "theta_sft_T", vector, "-o", folder, "--lam", "1", "--force")
    return folder


def write_noisy_checkpoint(out: Path, seed: int) -> None:
    """Save theta_sft_S plus Gaussian noise that has, tensor by tensor, the norm of the skill."""
    import torch
    from transformers import AutoModelForCausalLM

    tuned = AutoModelForCausalLM.from_pretrained(out / "theta_rl_S", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(out / "theta_sft_S", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    goals = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += noise * ((goals[name] - weight).norm() / noise.norm())
    model.save_pretrained(out / "noisy_S")


def run(*arguments: str | Path) -> None:
    """Run one skillvec command, showing it as typed.

    Raises:
        subprocess.CalledProcessError: with the command's exit code.
    """
    command = [sys.executable, "-m", "skillvec", *map(str, arguments)]
    print(f"\n$ {show(command)}", flush=True)
    subprocess.run(command, check=True)


def show(command: Sequence[str]) -> str:
    """Spell a command as a user would type it."""
    return shlex.join(["skillvec", *command[3:]])


def conclude(on_t: dict[str, Accuracy], on_s: dict[str, Accuracy]) -> str:
    """Say in words what the numbers are, and what they cannot tell."""
    before, after = on_t[SFT_ONLY], on_t["skill, lambda 1"]
    minus, noise = on_t["skill, lambda -1"], on_t[RANDOM]
    return (
        f"On S, where it was trained, RL moved accuracy from {on_s['theta_sft_S'].mean:.3f} to "
        f"{on_s['theta_rl_S'].mean:.3f}. On T, which RL never saw, adding that difference "
        f"{_moved(before, after)}; noise of the same norm {_moved(before, noise)}; subtracting it "
        f"{_moved(before, minus)}. This is one seed of one small invented world: the errors are "
        "over people, not over trainings, and nothing here speaks for large models."
    )


def _moved(before: Accuracy, after: Accuracy) -> str:
    change = after.mean - before.mean
    error = (before.standard_error**2 + after.standard_error**2) ** 0.5
    if abs(change) <= 2 * error:
        return f"made no clear difference ({before.mean:.3f} to {after.mean:.3f})"
    return f"{'raised' if change > 0 else 'lowered'} it from {before.mean:.3f} to {after.mean:.3f}"


def report(on_t: dict[str, Accuracy], conclusion: str) -> None:
    """Print the closing table and what it says."""
    from rich.console import Console
    from rich.table import Table

    score = on_t[SFT_ONLY]
    table = Table(
        title=f"Closed-book accuracy on T: {score.questions} questions, {score.people} people",
        title_justify="left",
    )
    table.add_column("theta_sft_T +")
    table.add_column("exact match", justify="right")
    table.add_column("std. error", justify="right")
    table.add_column("first word right", justify="right")
    for name, row in on_t.items():
        table.add_row(name, f"{row.mean:.3f}", f"{row.standard_error:.3f}", f"{row.first_word:.3f}")
    console = Console()
    console.print(table)
    console.print(conclusion, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
