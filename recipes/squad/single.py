"""SQuAD one passage at a time: an adapter learns it, with and without the skill beside it.

    python -m skillvec.recipes.squad.single --base Qwen/Qwen2.5-7B --skill skill.safetensors \\
        --data runs/squad/data/target_questions.jsonl \\
        --texts implications=runs/squad/data/target.jsonl -o runs/squad/single

Hides the order of the work. All adapters are trained first, on the base; then the base answers,
alone and with each adapter; then base + lambda * v does. That is theta_T + lambda * v, because
(base + s*BA) + lambda * v = (base + lambda * v) + s*BA: the skill is added once, in fp32, and every
adapter stays valid. Invariants: the skill takes no part in training; each arm stands beside its
SFT-only control; what is finished is not done again. Refuses questions without a group, a group
without texts, and a skill that does not fit the base.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import skillvec as sv
from skillvec.recipes.judges import JudgeError
from skillvec.recipes.squad.adapters import SETTINGS, Lora, answer_with, stamp, train_adapters
from skillvec.recipes.training import fetch_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.squad.single", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id")
    add("--skill", type=Path, help="vector file; without it, the SFT-only controls alone")
    add("--lam", type=float, default=1.0, help="lambda (%(default)s)")
    add("--data", type=Path, required=True, help="target_questions.jsonl of prepare")
    add("--texts", nargs="+", default=[], metavar="NAME=FILE", help="an arm: its target.jsonl")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER")
    add("--limit", type=int, help="only the first so many passages")
    add("--lora-r", type=int, default=Lora.r, help="%(default)s")
    add("--lora-alpha", type=int, default=Lora.alpha, help="%(default)s")
    add("--lora-target-modules", nargs="+", default=list(Lora.targets), help="%(default)s")
    add("--epochs", type=float, default=Lora.epochs, help="%(default)s")
    add("--learning-rate", type=float, default=Lora.learning_rate, help="%(default)s")
    add("--train-batch", type=int, default=Lora.batch, help="%(default)s")
    add("--seed", type=int, default=Lora.seed, help="%(default)s")
    add("--dtype", default="float32", help="of loaded weights; bfloat16 rounds the skill")
    add("--metrics", nargs="+", default=["exact", "f1"], help="exact f1 first_word judge")
    add("--judge", default="skillvec.recipes.squad.judge:judge", metavar="MODULE:FUNCTION")
    add("--max-new-tokens", type=int, default=64, help="%(default)s")
    add("--batch", type=int, default=64, help="prompts at a time (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, answer, score; return 2 where an input is refused, 1 where the judge fails."""
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, JudgeError) as error:
        print(f"single: {error}", file=sys.stderr)
        return 1 if isinstance(error, JudgeError) else 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Train all adapters, answer with the base, then with the skill, then score."""
    from skillvec.recipes.squad.arms import ALONE, named_files, read_rows, read_texts
    from skillvec.recipes.squad.scores import Scoring, show, write_arm

    scoring = Scoring.check(options.metrics, options.judge)
    rows = read_rows(options.data, options.limit)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    arms = {name: read_texts(file, groups) for name, file in named_files(options.texts).items()}
    base, out = fetch_model(options.base), options.output
    lora = Lora(
        options.lora_r, options.lora_alpha, tuple(options.lora_target_modules), options.epochs,
        options.learning_rate, options.train_batch, seed=options.seed,
    )  # fmt: skip
    adapters = {name: {group: out / "adapters" / name / group for group in groups} for name in arms}
    jobs = {adapters[name][group]: arms[name][group] for name in arms for group in groups}
    # streamed in minutes, and a skill that does not fit should be found out before the training
    injected = inject(base, options.skill, options.lam, out / "injected") if options.skill else None
    train_adapters(base, jobs, lora, options.dtype)

    answers = answer_arms(base, "", rows, {ALONE: {}} | adapters, options)
    if injected:
        answers |= answer_arms(injected, "+skill", rows, {ALONE: {}} | adapters, options)
    settings = json.loads(json.dumps(vars(options) | {"decoding": "greedy"}, default=str))
    scores = {}
    for name in [arm + added for arm in (ALONE, *arms) for added in ("", "+skill")]:
        if name in answers:
            facts = {"model": f"{options.base}: {name}", "data": str(options.data),
                     "settings": settings}  # fmt: skip
            file = out / "scores" / f"{name}.json"
            scores[name] = write_arm(file, rows, answers[name], scoring, facts)
    show(scores, scoring.metrics)


def inject(base: str, skill: Path, lam: float, folder: Path) -> str:
    """Write base + lambda * v in fp32 with skillvec, unless it is there already."""
    if not skill.exists():
        raise ValueError(f"--skill {skill}: no such file")
    wanted = json.dumps([stamp(base), stamp(skill), lam])
    mark = folder.with_name(f"{folder.name}.json")
    if not (folder.is_dir() and mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        folder.parent.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        sv.apply(base, skill, folder, lam=lam, dtype="fp32", force=True)
        mark.write_text(wanted, encoding="utf-8")
    return str(folder)


def answer_arms(
    model: str,
    added: str,
    rows: Sequence[dict[str, Any]],
    arms: dict[str, dict[str, Path]],
    options: argparse.Namespace,
) -> dict[str, list[str]]:
    """Return arm -> answers; arms whose answers are on the disk are read from there."""
    from skillvec.recipes.evaluate import load_model, write_scores

    prompts = [row["prompt"] for row in rows]
    by_group: dict[str, list[Any]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row["prompt"])
    said: dict[str, list[str]] = {}
    loaded: tuple[Any, Any] | None = None
    for name, adapters in arms.items():
        made = [(path / SETTINGS).read_text(encoding="utf-8") for path in adapters.values()]
        follows = [stamp(model), made, prompts, options.max_new_tokens, options.dtype]
        key = hashlib.sha256(json.dumps(follows).encode()).hexdigest()
        file = options.output / "answers" / f"{name}{added}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("key") != key:
            loaded = loaded or load_model(model, options.dtype)
            asked = [(adapters.get(group), part) for group, part in by_group.items()]
            asked = asked if adapters else [(None, prompts)]
            found = answer_with(*loaded, asked, options.max_new_tokens, options.batch)
            kept = {"key": key, "said": found}
            write_scores(kept, file)
        said[name + added] = kept["said"]
    return said


if __name__ == "__main__":
    sys.exit(main())
