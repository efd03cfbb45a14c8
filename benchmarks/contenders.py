"""The command lines of every contender for every job, and what has to be there beforehand.

Hides how each program is told to do the same work. Invariants: a job's commands read the same
weights and write the same number of bf16 values; what a program needs besides the family (its own
form of a stored delta) is made outside the timing, by that program.

mergekit has no stored delta. Its diff is `linear` with weights 1 and -1, its apply `linear` over
the target and the folder that its diff wrote. sd-mecha opens single files: its members are joined.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from measure import CHUNK_NBYTES, Command, files

HERE = Path(__file__).parent
PYTHON = sys.executable
SKILLVEC = Path(PYTHON).parent / "skillvec"
OTHERS = HERE.parent / ".venv-mergekit" / "bin"  # mergekit and sd-mecha
LAM = "0.7"
# How `skillvec diff` may store a delta; auto takes the smallest for each tensor.
CODECS = ("dense", "sparse", "packed", "auto")
NOW, FLOOR, SYNCED = "skillvec", "floor", "floor+sync"  # names of contenders
OPERATORS = {"linear": [], "ties": ["density=0.3"], "dare_linear": ["density=0.3"]}


class Job(NamedTuple):
    """One task as each contender does it: what is made before, and what is timed."""

    setup: Sequence[Command | Callable[[], object]]
    commands: dict[str, Command]


def folder(size: str) -> Path:
    """Return where the family of a size is, or will be made by family.py."""
    default = Path(tempfile.gettempdir()) / "skillvec-bench"
    return Path(os.environ.get("SKILLVEC_BENCH_DIR", default)) / size


def copy(inputs: tuple[Path, ...], out: Path | None, *, synced: bool = False) -> Command:
    """Read every input but the last with dd and copy the last; without `out`, read all."""
    read = inputs[:-1] if out else inputs
    steps = [
        shlex.join(["dd", "bs=1M", "of=/dev/null", "status=none", f"if={f}"]) for f in files(read)
    ]
    if out:
        steps.append(shlex.join(["cp", "-r", str(inputs[-1]), str(out)]))
    if synced:
        steps.append(f"find {shlex.quote(str(out))} -type f -exec sync {{}} +")
    return Command(["sh", "-c", " && ".join(steps)], inputs, out)


def floors(inputs: tuple[Path, ...], out: Path | None) -> dict[str, Command]:
    """Return what only copies, without and with a wait for the disk."""
    both = {FLOOR: copy(inputs, out)}
    return both | {SYNCED: copy(inputs, out, synced=True)} if out else both


def skillvec(
    verb: str, *places: Path, out: Path | None = None, options: Sequence[str] = (),
    program: Path = SKILLVEC,
) -> Command:  # fmt: skip
    """Return a skillvec command; `places` are its positional inputs."""
    output = ["-o", str(out), "-q", "--force"] if out else ["-q"]
    return Command([str(program), verb, *map(str, places), *output, *options], places, out)


def diff(
    tuned: Path, base: Path, out: Path, codec: str = "dense", program: Path = SKILLVEC
) -> Command:
    """Return skillvec's diff with the codec named."""
    return skillvec("diff", tuned, base, out=out, options=["--codec", codec], program=program)


def apply(
    target: Path, vector: Path, out: Path, lam: str = LAM, program: Path = SKILLVEC
) -> Command:
    """Return skillvec's apply of a stored delta."""
    return skillvec("apply", target, vector, out=out, options=["--lam", lam], program=program)


def stored(work: Path, codec: str = "dense", pair: str = "rl-sft") -> Path:
    """Return where skillvec's delta is stored."""
    return work / f"{pair}.{codec}.safetensors"


def verbs_on(size: str, work: Path, program: Path) -> dict[str, Job]:
    """Return what one build of skillvec does with a family, by name; each job under NOW."""
    base, sft, rl, target = (folder(size) / name for name in ("base", "sft", "rl", "target"))
    work = work / size
    work.mkdir(parents=True, exist_ok=True)
    out, file, applied = work / "out", work / "out.safetensors", work / "applied"
    dense, other = stored(work), stored(work, pair="sft-base")
    made = [diff(rl, sft, dense, program=program), diff(sft, base, other, program=program)]
    jobs = {"help": Job([], {NOW: Command([str(program), "--help"])})}
    for name, codec in (("", "dense"), ("-packed", "auto"), ("-sparse", "sparse")):
        vector = stored(work, codec)
        setup = [diff(rl, sft, vector, codec, program)]
        jobs[f"diff{name}"] = Job([], {NOW: diff(rl, sft, file, codec, program)})
        jobs[f"apply{name}"] = Job(setup, {NOW: apply(target, vector, out, program=program)})
    delta = ["--tuned", str(rl), "--base", str(sft), "--lam", LAM]
    fused = skillvec("apply", target, out=out, options=delta, program=program)
    jobs["one-pass"] = Job([], {NOW: Command(fused.argv, (rl, sft, target), out)})
    angles = skillvec("orthogonality", dense, other, program=program)
    jobs["orthogonality"] = Job(made, {NOW: angles})
    jobs["inspect"] = Job(made[:1], {NOW: skillvec("inspect", dense, program=program)})
    proof = skillvec("verify", applied, program=program)
    setup = [made[0], apply(target, dense, applied, program=program)]
    jobs["verify"] = Job(setup, {NOW: Command(proof.argv, (dense, target, applied))})
    for operator, given in OPERATORS.items():
        options = ["--codec", "dense", "--dtype", "bf16", "--op", operator]
        options += [word for parameter in given for word in ("--param", parameter)]
        merge = skillvec("combine", dense, other, out=file, options=options, program=program)
        jobs[f"combine-{operator}"] = Job(made, {NOW: merge})
    return jobs


def mergekit(work: Path, name: str, weights: Mapping[Path, float]) -> Command:
    """Return a linear merge by mergekit; its configuration lies beside the output."""
    config = {
        "merge_method": "linear",
        "models": [{"model": str(p), "parameters": {"weight": w}} for p, w in weights.items()],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    path, out = work / f"{name}.yml", work / name
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return Command([str(OTHERS / "mergekit-yaml"), str(path), str(out)], tuple(weights), out)


def others_on(size: str, work: Path) -> dict[str, Job]:
    """Return the jobs of the programs in the other venv, as far as it is there."""
    jobs: dict[str, Job] = {"diff": Job([], {}), "apply": Job([], {})}
    sft, rl, target = (folder(size) / name for name in ("sft", "rl", "target"))
    if (OTHERS / "mergekit-yaml").exists():
        delta = mergekit(work, "mergekit-delta", {rl: 1.0, sft: -1.0})
        jobs["diff"].commands["mergekit"] = mergekit(work, "mergekit-diff", {rl: 1.0, sft: -1.0})
        jobs["apply"].commands["mergekit"] = mergekit(
            work, "mergekit-apply", {target: 1.0, work / "mergekit-delta": float(LAM)}
        )
        jobs["apply"] = jobs["apply"]._replace(setup=[delta])
    if list(OTHERS.glob("../lib/*/site-packages/sd_mecha")):
        single = {place: work / f"mecha-{place.name}.safetensors" for place in (sft, rl, target)}
        joined = [join(place, file) for place, file in single.items()]
        made = mecha(work / "mecha-delta.safetensors", "diff", single[rl], single[sft])
        out = work / "mecha-out.safetensors"
        jobs["diff"].commands["sd-mecha"] = mecha(out, "diff", single[rl], single[sft])
        assert made.out
        apply_it = mecha(out, "apply", single[target], made.out)
        jobs["apply"].commands["sd-mecha"] = apply_it
        jobs["diff"] = jobs["diff"]._replace(setup=joined)
        jobs["apply"] = jobs["apply"]._replace(setup=[*jobs["apply"].setup, *joined, made])
    return jobs


def mecha(out: Path, verb: str, *inputs: Path) -> Command:
    """Return a merge by sd-mecha."""
    lam = [LAM] if verb == "apply" else []
    argv = [str(OTHERS / "python"), str(HERE / "mecha.py"), verb, *map(str, inputs), *lam]
    return Command([*argv, str(out)], inputs, out)


def join(source: Path, out: Path) -> Command:
    """Return a command that writes the shards of a model into one file."""
    code = (
        "import sys, safetensors.torch as st; from pathlib import Path\n"
        "files = [st.load_file(f) for f in sorted(Path(sys.argv[1]).glob('*.safetensors'))]\n"
        "st.save_file({k: v for held in files for k, v in held.items()}, sys.argv[2])"
    )
    return Command([str(OTHERS / "python"), "-c", code, str(source), str(out)], (source,), out)


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
