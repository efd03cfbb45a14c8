"""The command lines of every contender for every job, and the files they need beforehand.

Hides how each program is told to do the same work. Invariants: a job's commands read the same
weights and write the same number of bf16 values; what a program needs besides the family (its own
form of a stored delta) is made outside the timing.

mergekit has no stored delta. Its diff is `linear` with weights 1 and -1, its apply `linear` over
the target and the folder that its diff wrote, and the fused job is `task_arithmetic`:
sft + 1 (target - sft) + lam (rl - sft).
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import CHUNK_NBYTES, Command, files, sampled

HERE = Path(__file__).parent
PYTHON = sys.executable
SKILLVEC = Path(PYTHON).parent / "skillvec"
MERGEKIT = HERE.parent / ".venv-mergekit" / "bin" / "mergekit-yaml"
LAM = "0.7"
# How `skillvec diff` may store a delta. The plain job names are of dense; a codec that is timed too
# has jobs of its own. auto takes the smallest for each tensor.
CODECS = ("dense", "sparse", "packed", "auto")
TIMED_CODECS = ("sparse", "packed")


@dataclass(frozen=True)
class Job:
    """One task as each contender does it.

    `reference` are check.py's arguments for the outputs. `against` maps a contender to a label and
    the command whose output check.py compares with skillvec's: mergekit's at full precision, or
    skillvec's own from the dense delta.
    """

    commands: dict[str, Command]
    reference: list[str] = field(default_factory=list)
    against: dict[str, tuple[str, Command]] = field(default_factory=dict)


def copy(inputs: tuple[Path, ...], out: Path | None, *, synced: bool = False) -> Command:
    """Read every input but the last with dd and copy the last; without `out`, read all."""
    read = inputs[:-1] if out else inputs
    steps = [
        shlex.join(["dd", "bs=1M", "of=/dev/null", "status=none", f"if={f}"]) for f in files(read)
    ]
    if out:
        steps.append(shlex.join(["cp", "-r", str(inputs[-1]), str(out)]))
    if synced:
        steps.append(f"sync {shlex.quote(str(out))}/*")
    return Command(["sh", "-c", " && ".join(steps)], inputs, out)


def skillvec(
    verb: str, *places: Path, out: Path | None = None, options: Sequence[str] = ()
) -> Command:
    """Return a skillvec command; `places` are its positional inputs."""
    output = ["-o", str(out), "-q", "--force"] if out else []
    return Command([str(SKILLVEC), verb, *map(str, places), *output, *options], places, out)


def diff(tuned: Path, base: Path, out: Path, codec: str = "dense") -> Command:
    """Return skillvec's diff with the codec named."""
    return skillvec("diff", tuned, base, out=out, options=["--codec", codec])


def apply(target: Path, vector: Path, out: Path, lam: str = LAM) -> Command:
    """Return skillvec's apply of a stored delta."""
    return skillvec("apply", target, vector, out=out, options=["--lam", lam])


def stored(work: Path, codec: str = "dense", pair: str = "rl-sft") -> Path:
    """Return where `prepare` stores skillvec's delta."""
    return work / f"{pair}.{codec}.safetensors"


def naive(verb: str, *arguments: Path | str, out: Path | None = None) -> Command:
    """Return a command of the naive script."""
    argv = [
        PYTHON,
        str(HERE / "naive.py"),
        verb,
        *map(str, arguments),
        *([str(out)] if out else []),
    ]
    return Command(argv, tuple(a for a in arguments if isinstance(a, Path)), out)


def mergekit(
    out: Path, weights: dict[Path, float], base: Path | None = None, dtype: str = "bfloat16"
) -> Command:
    """Return a mergekit command, linear without a base; its configuration lies beside `out`."""
    config: dict[str, object] = {
        "merge_method": "task_arithmetic" if base else "linear",
        "models": [{"model": str(p), "parameters": {"weight": w}} for p, w in weights.items()],
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    if base:
        config["base_model"] = str(base)
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    inputs = (*weights, base) if base else tuple(weights)
    return Command([str(MERGEKIT), str(path), str(out)], inputs, out)


def prepare(family: Path, work: Path, contenders: list[str]) -> None:
    """Store the deltas that apply and orthogonality read, in each contender's own form."""
    base, sft, rl = (family / member for member in ("base", "sft", "rl"))
    commands = []
    for tuned, of in ((rl, sft), (sft, base)):
        pair = f"{tuned.name}-{of.name}"
        if "skillvec" in contenders:
            for codec in CODECS if tuned is rl else ("dense",):
                commands.append(diff(tuned, of, stored(work, codec, pair), codec))
        if "naive" in contenders or "skillvec" not in contenders:
            commands.append(naive("diff", tuned, of, out=work / f"naive-{pair}.safetensors"))
    if "mergekit" in contenders:
        commands.append(mergekit(work / "mergekit-delta", {rl: 1.0, sft: -1.0}))
    for command in commands:
        sampled(command, work)


def jobs_of(family: Path, work: Path, contenders: list[str]) -> dict[str, Job]:
    """Return the jobs on weights by name, with the contenders asked for."""
    sft, rl, target = (family / member for member in ("sft", "rl", "target"))
    plain = tuple(work / f"naive-{pair}.safetensors" for pair in ("rl-sft", "sft-base"))
    dense = tuple(stored(work, pair=pair) for pair in ("rl-sft", "sft-base"))
    if "skillvec" not in contenders:
        dense = plain
    out, file = work / "out", work / "out.safetensors"
    delta = ["--tuned", str(rl), "--base", str(sft)]
    whole = [*delta, "--target", str(target), "--lam"]

    commands = {
        "floor": copy((sft, rl), out),
        "floor+sync": copy((sft, rl), out, synced=True),
        "skillvec": diff(rl, sft, file),
        "naive": naive("diff", rl, sft, out=file),
        "mergekit": mergekit(work / "out-diff", {rl: 1.0, sft: -1.0}),
    }
    jobs = {"diff": Job(commands, delta)}
    for name, lam in (("apply", LAM), ("apply-lam1", "1.0")):
        weights = {target: 1.0, work / "mergekit-delta": float(lam)}
        commands = {
            "floor": copy((dense[0], target), out),
            "floor+sync": copy((dense[0], target), out, synced=True),
            "skillvec": apply(target, dense[0], out, lam),
            "naive": naive("apply", target, plain[0], lam, out=out),
            "mergekit": mergekit(work / f"out-{name}", weights),
        }
        float32 = mergekit(work / f"out-{name}-float32", weights, dtype="float32")
        jobs[name] = Job(commands, [*whole, lam], {"mergekit": ("mergekit fp32", float32)})
    for codec in TIMED_CODECS if "skillvec" in contenders else ():
        own = {
            "diff": diff(rl, sft, file, codec),
            "apply": apply(target, stored(work, codec), out),
        }
        for name, command in own.items():
            # the floors stay those of the dense job: all that a small delta saves is skillvec's
            dense_job = jobs[name].commands
            commands = {**dense_job, "skillvec": command}
            against = {"skillvec": ("dense", dense_job["skillvec"])} if name == "apply" else {}
            asked = {who: c for who, c in commands.items() if who not in ("naive", "mergekit")}
            jobs[f"{name}-{codec}"] = Job(asked, against=against)
    weights = {target: 1.0, rl: float(LAM)}
    fused = skillvec("apply", target, out=out, options=[*delta, "--lam", LAM])
    commands = {
        "floor": copy((sft, rl, target), out),
        "floor+sync": copy((sft, rl, target), out, synced=True),
        "skillvec": Command(fused.argv, (target, rl, sft), out),
        "naive": naive("fused", target, rl, sft, LAM, out=out),
        "mergekit": mergekit(work / "out-fused", weights, sft),
    }
    float32 = mergekit(work / "out-fused-float32", weights, sft, "float32")
    jobs["fused"] = Job(commands, [*whole, LAM], {"mergekit": ("mergekit fp32", float32)})
    commands = {
        "floor": copy(dense, None),
        "skillvec": skillvec("orthogonality", *dense, options=["--json"]),
        "naive": naive("orthogonality", *plain),
    }
    jobs["orthogonality"] = Job(commands)
    for name, job in jobs.items():
        asked = {who: job.commands[who] for who in contenders if who in job.commands}
        against = {who: job.against[who] for who in contenders if who in job.against}
        jobs[name] = Job(asked, job.reference, against)
    return jobs


def repeated(source: Path, out: Path, times: int) -> Path:
    """Copy a model `times` times into one folder, its tensors renamed x0.NAME, x1.NAME, ...

    The bytes are copied rather than linked, since a shard's header holds its tensors' names.
    """
    out.mkdir()
    shards = sorted(source.glob("*.safetensors"))
    for side in (f for f in source.iterdir() if "safetensors" not in f.name):
        shutil.copy(side, out)
    weight_map: dict[str, str] = {}
    total = 0
    for number, (copy, shard) in enumerate(itertools.product(range(times), shards), 1):
        name = f"model-{number:05d}-of-{times * len(shards):05d}.safetensors"
        with shard.open("rb") as old, (out / name).open("wb") as new:
            header = json.loads(old.read(*struct.unpack("<Q", old.read(8))))
            metadata = header.pop("__metadata__")
            renamed = {f"x{copy}.{key}": entry for key, entry in header.items()}
            text = json.dumps({"__metadata__": metadata, **renamed}).encode()
            text += b" " * (-len(text) % 8)
            new.write(struct.pack("<Q", len(text)) + text)
            total += shard.stat().st_size - old.tell()
            shutil.copyfileobj(old, new, CHUNK_NBYTES)
        weight_map |= dict.fromkeys(renamed, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out
