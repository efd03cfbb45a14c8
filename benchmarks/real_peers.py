"""What skillvec and its peers are told to do with three models of real weights, for real.py.

Hides the command lines and what lies between them. Invariants: the ways of a task read the same
models; what a program keeps between two tasks (its form of a delta, its databases, single files) is
made by that program, outside the timing of the second; lambda is 1.

- vector: tuned - base, stored
- apply: target + (tuned - base), as a model
- restore: base + what the task vector stored, which should be tuned again

What a program cannot do is a way without a command, which says why.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import contenders
from contenders import HERE, NOW, OTHERS, SYNCED, join
from measure import Command

PEERS = HERE.parent / ".venv-peers" / "bin"  # reminis, deltatensors, PEFT
TASKS = ("vector", "apply", "restore")
WHATS = {"vector": "vector", "apply": "sum", "restore": "tuned"}  # in the words of exact.py
FULL = {"fp32": "float32", "bf16": "bfloat16"}
ABSENT = "not here: benchmarks/real_setup.sh"
SUFFIXES = {  # of stored deltas; the others are folders
    NOW: ".safetensors", "sd-mecha": ".safetensors", "reminis": ".db",
    "deltatensors int4": ".wdelta", "deltatensors sparse": ".wdelta",
}  # fmt: skip
VALUES = (  # of a vector of skillvec, by its Python API
    "import sys, safetensors.numpy as st, skillvec\n"
    "st.save_file(dict(skillvec.SkillVector.open(sys.argv[1]).items()), sys.argv[2])"
)


class Way(NamedTuple):
    """How a program does a task, or in `note` why it does not.

    `result` is where the output is that exact.py reads, by default all that the command wrote;
    `values` makes plain values of it first. What needs minutes runs `once`.
    """

    command: Command | None
    note: str = ""
    result: Path | None = None
    values: Command | None = None
    counted: bool = True
    once: bool = False


class Trio(NamedTuple):
    """Three models of one dtype, the folder for what is made of them, skillvec's command.

    The folders of the models are named by their roles, and the dtype is fp32 or bf16.
    """

    base: Path
    tuned: Path
    target: Path
    dtype: str
    work: Path
    program: Path

    def stored(self, who: str) -> Path:
        """Return where the delta of a program lies, once the task vector has made it."""
        return self.work / f"stored-{who.replace(' ', '-')}{SUFFIXES.get(who, '')}"

    def database(self, model: Path) -> Path:
        """Return where the database of reminis is, of a model."""
        return self.work / f"reminis-{model.name}.db"

    def single(self, model: Path) -> Path:
        """Return the one file of a model, or where it is joined."""
        found = sorted(model.glob("*.safetensors"))
        return found[0] if len(found) == 1 else self.work / f"joined-{model.name}.safetensors"

    def setup(self) -> list[Command]:
        """Return what makes the databases and the joined files."""
        steps, models = [], (self.base, self.tuned, self.target)
        if (PEERS / "reminis").exists():
            steps += [convert(model, self.database(model)) for model in models]
        if (OTHERS / "python").exists():
            steps += [join(m, self.single(m)) for m in models if self.single(m).parent != m]
        return steps


def convert(model: Path, out: Path) -> Command:
    """Return how reminis makes a database of a model."""
    return Command([str(PEERS / "reminis"), "convert", str(model), "-o", str(out), "-q"],
                   (model,), out)  # fmt: skip


def out_of(task: str, trio: Trio, who: str) -> Path:
    """Return what a program writes, which has its own name in each task."""
    models = {"sd-mecha": ".safetensors", "reminis": ".db"}
    suffix = (SUFFIXES if task == "vector" else models).get(who, "")
    return trio.work / f"{task}-{who.replace(' ', '-').replace(',', '')}{suffix}"


def skillvec(task: str, trio: Trio) -> dict[str, Way]:
    """Return the floor and the ways of skillvec; the floor copies the last input, and syncs it."""
    base, tuned, target, out = trio.base, trio.tuned, trio.target, out_of(task, trio, NOW)
    inputs = {"vector": (base, tuned), "apply": (tuned, base, target), "restore": (base,)}[task]
    copied = contenders.copy(inputs, trio.work / f"{task}-floor", synced=True)
    ways = {SYNCED: Way(copied, "reads all inputs, copies the last, sync", counted=False)}
    vector = trio.stored(NOW)

    def apply(model: Path) -> Command:
        return contenders.apply(model, vector, out, "1", trio.program)

    if task == "vector":
        python, plain = trio.program.with_name("python"), trio.work / "values.safetensors"
        values = Command([str(python), "-c", VALUES, str(out), str(plain)], (out,), plain)
        made = contenders.diff(tuned, base, out, "auto", trio.program)
        ways[NOW] = Way(made, "exact, packed", values=values)
    elif task == "apply":
        delta = ["--tuned", str(tuned), "--base", str(base), "--lam", "1"]
        fused = contenders.skillvec("apply", target, out=out, options=delta, program=trio.program)
        ways[NOW] = Way(Command(fused.argv, inputs, out), "one pass, nothing stored between")
        ways["skillvec stored"] = Way(apply(target), "of the stored vector")
    else:
        ways[NOW] = Way(apply(base))
    return ways


def mergekit(task: str, trio: Trio) -> dict[str, Way]:
    """Return the ways of mergekit: fp32 arithmetic, and for bf16 also bf16 arithmetic."""
    found = {}
    for arithmetic in dict.fromkeys(("fp32", trio.dtype)):
        who = "mergekit" if arithmetic == "fp32" else "mergekit in bf16"
        if not (OTHERS / "mergekit-yaml").exists():
            found[who] = Way(None, ABSENT)
            continue
        out, method, extra = out_of(task, trio, who), "linear", {}
        weights = {trio.tuned: 1.0, trio.base: -1.0}
        note = "linear 1, -1"
        if task == "apply":
            method, extra = "task_arithmetic", {"base_model": str(trio.base)}
            weights, note = {trio.target: 1.0, trio.tuned: 1.0}, "task_arithmetic"
        elif task == "restore":
            weights, note = {trio.base: 1.0, trio.stored(who): 1.0}, "linear 1, 1"
        config = {
            "merge_method": method, **extra,
            "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in weights.items()],
            "parameters": {"normalize": False},
            "dtype": FULL[arithmetic], "out_dtype": FULL[trio.dtype],
        }  # fmt: skip
        path = out.with_suffix(".yml")
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
        inputs = (*weights, trio.base) if task == "apply" else tuple(weights)
        found[who] = Way(
            Command([str(OTHERS / "mergekit-yaml"), str(path), str(out)], inputs, out),
            f"{note}, dtype {FULL[arithmetic]}",
        )
    return found


def sd_mecha(task: str, trio: Trio) -> dict[str, Way]:
    """Return the way of sd-mecha: its Python API, fp32 arithmetic, single files."""
    if not list(OTHERS.glob("../lib/*/site-packages/sd_mecha")):
        return {"sd-mecha": Way(None, ABSENT)}
    base, tuned, target = (trio.single(m) for m in (trio.base, trio.tuned, trio.target))
    verb, inputs, rest = {
        "vector": ("diff", (tuned, base), []),
        "apply": ("sum", (target, tuned, base), []),
        "restore": ("apply", (base, trio.stored("sd-mecha")), ["1"]),
    }[task]
    verb += "-fp32" if trio.dtype == "fp32" else ""
    out = out_of(task, trio, "sd-mecha")
    argv = [str(OTHERS / "python"), str(HERE / "mecha.py"), verb, *map(str, inputs), *rest]
    return {"sd-mecha": Way(Command([*argv, str(out)], inputs, out), "in fp32, single files")}


def reminis(task: str, trio: Trio) -> dict[str, Way]:
    """Return the ways of reminis: between its databases, and from files to files."""
    if not (PEERS / "reminis").exists():
        return {"reminis": Way(None, ABSENT)}
    program, models = str(PEERS / "reminis"), (trio.base, trio.tuned, trio.target)
    base, tuned, target = map(trio.database, models)
    out, pack = out_of(task, trio, "reminis"), trio.stored("reminis")

    def argv(base: Path, tuned: Path, target: Path, out: Path) -> Sequence[str]:
        asked = {
            "vector": ["diff", base, tuned, "-o", out, "-q"],
            "apply": ["merge", target, tuned, "--base", base, "--method", "task-arithmetic",
                      "-o", out, "-q"],
            "restore": ["apply", base, pack, "-o", out],
        }[task]  # fmt: skip
        return [program, *(str(word) for word in asked)]

    inputs = {"vector": (base, tuned), "apply": (target, tuned, base), "restore": (base, pack)}
    notes = {"vector": "differing bits, between databases", "apply": "task-arithmetic, databases",
             "restore": "databases, hashes checked"}  # fmt: skip
    ways = {"reminis": Way(Command([*argv(base, tuned, target, out)], inputs[task], out),
                           notes[task], counted=task != "vector")}  # fmt: skip
    folder = out_of(task, trio, "reminis, files")
    held = {model: folder / f"{model.name}.db" for model in models}
    used = models if task == "apply" else models[:2] if task == "vector" else models[:1]
    made = folder / ("pack.db" if task == "vector" else "out.db")
    steps = [["mkdir", str(folder)], *(convert(model, held[model]).argv for model in used)]
    steps.append([*argv(held[trio.base], held[trio.tuned], held[trio.target], made)])
    result = made if task == "vector" else folder / "model.safetensors"
    if task != "vector":
        steps.append([program, "export", str(made), "-o", str(result), "-q"])
    steps.append(["rm", "-f", *(str(p) for p in (*held.values(), made) if p != result)])
    text = " && ".join(shlex.join(step) for step in steps)
    given = (*used, pack) if task == "restore" else used
    ways["reminis, files"] = Way(Command(["sh", "-c", text], given, folder),
                                 "the same, databases made on the way", result,
                                 counted=task != "vector")  # fmt: skip
    return ways


def deltatensors(task: str, trio: Trio) -> dict[str, Way]:
    """Return the ways of deltatensors: 4 bits, and the strategy that can keep every value."""
    if not list(PEERS.glob("../lib/*/site-packages/deltatensors")):
        return {"deltatensors": Way(None, ABSENT)}
    found = {}
    for strategy, kept in (("int4", "4 bits, 1 % in fp16"), ("sparse", "sparsity 0: all in fp32")):
        who = f"deltatensors {strategy}"
        out = out_of(task, trio, who)
        if task == "vector":
            verb, words, inputs = "deltatensors-diff", [strategy], (trio.tuned, trio.base)
        else:
            unchecked = "unchecked-" if task == "apply" else ""
            model = trio.target if task == "apply" else trio.base
            verb, words, inputs = f"{unchecked}deltatensors-apply", [], (model, trio.stored(who))
            kept = "another base, so verify=False" if unchecked else "hash checked"
        argv = [str(PEERS / "python"), str(HERE / "peers.py"), verb, *words, *map(str, inputs)]
        slow = strategy == "sparse"
        found[who] = Way(Command([*argv, str(out)], inputs, out), kept + "; one run" * slow,
                         counted=task != "vector", once=slow)  # fmt: skip
    return found


def lora(task: str, trio: Trio) -> dict[str, Way]:
    """Return an adapter that mergekit extracts by default, and that PEFT merges."""
    if task == "vector":
        ways = {"PEFT": Way(None, "makes no adapter of two models; mergekit-extract-lora does")}
        if not (OTHERS / "mergekit-extract-lora").exists():
            return ways | {"mergekit LoRA": Way(None, ABSENT)}
        out = out_of(task, trio, "mergekit LoRA")
        argv = [str(OTHERS / "mergekit-extract-lora"), "--model", str(trio.tuned),
                "--base-model", str(trio.base), "--out-path", str(out)]  # fmt: skip
        made = Command(argv, (trio.tuned, trio.base), out)
        note = "rank 128; embeddings, head and norms of tuned whole; one run"
        return ways | {"mergekit LoRA": Way(made, note, counted=False, once=True)}
    adapter, out = trio.stored("mergekit LoRA"), out_of(task, trio, "PEFT")
    if not (PEERS / "python").exists():
        return {"PEFT": Way(None, ABSENT)}
    if not adapter.exists():
        return {"PEFT": Way(None, "no adapter was made by mergekit-extract-lora")}
    model = trio.target if task == "apply" else trio.base
    argv = [str(PEERS / "python"), str(HERE / "peers.py"), "peft-merge", str(model), str(adapter)]
    return {"PEFT": Way(Command([*argv, str(out)], (model, adapter), out),
                        "merges that adapter")}  # fmt: skip


WAYS = {
    "mergekit": mergekit,
    "sd-mecha": sd_mecha,
    "reminis": reminis,
    "deltatensors": deltatensors,
    "PEFT": lora,
}


def ways_of(task: str, trio: Trio, peers: Sequence[str]) -> dict[str, Way]:
    """Return how skillvec and these peers, keys of `WAYS`, do a task; the floor comes first."""
    ways = skillvec(task, trio)
    for peer in peers:
        ways |= WAYS[peer](task, trio)
    return ways
