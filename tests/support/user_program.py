"""What a user writes, with every public name: `mypy --strict` reads it, nobody runs it.

A name that is misspelt has to be an error: an ignored error that is none is one itself.
"""

from collections.abc import Iterator
from typing import Any, assert_type

import numpy as np

import skillvec as sv
from skillvec import (
    Checkpoint,
    FormatError,
    IncompatibleError,
    Live,
    NonfiniteError,
    OutputError,
    Report,
    SkillvecError,
    SkillVector,
    UsageError,
    VerificationError,
)

sv.dif("rl", "sft")  # type: ignore[attr-defined]


def make() -> SkillVector:
    v = sv.diff("rl", "sft", "skill.safetensors", method="grpo", exclude=["lm_head.*"])
    assert_type(v, SkillVector)
    assert_type(v["model.norm.weight"].shape, tuple[Any, ...])
    assert_type(v["model.norm.weight", 0:3].astype(np.float32).nbytes, int)
    names: Iterator[str] = iter(v)
    print(*names, len(v), repr(v))
    w = SkillVector.open("other.safetensors")
    mixed: SkillVector = 0.7 * v - w / 2
    assert_type(sv.combine(v, w, weights=[1.0, -0.5], op="ties"), SkillVector)
    assert_type(mixed.save("mixed.safetensors"), SkillVector)
    assert_type(sv.import_patch("patch.safetensors", "sft", "v.safetensors"), SkillVector)
    return mixed


def use(v: SkillVector) -> None:
    target: Checkpoint = sv.open_checkpoint("other")
    print(target.nbytes, [spec.shape for spec in target.values()])
    applied = sv.apply(target, v, "merged", lam=0.7, watcher=Watching())
    assert_type(applied, Report)
    gain: float = applied.facts["gain"]
    proved, seen = sv.verify("merged"), sv.inspect("skill.safetensors")
    print(gain, proved.counts, seen.to_dict(), applied.warnings)
    assert_type(sv.export_patch(v, "patch.safetensors"), Report)
    assert_type(sv.extract_lora(v, "adapter", rank=8), Report)
    assert_type(sv.push("skill.safetensors", "org/skill", dry_run=True), Report)
    assert_type(sv.pull("org/skill", "pulled.safetensors"), Report)


def measure(v: SkillVector) -> None:
    assert_type(sv.orthogonality(v, "sft::base", control="random", output="angles"), Report)
    assert_type(sv.norms(v), Report)


def score(model: Any, tokenizer: Any) -> dict[str, list[float]]:
    return {"accuracy": [0.0, 1.0]}


def choose(v: SkillVector, model: object) -> None:
    assert_type(sv.sweep("other", v, eval=score, output="curve", lam="0:2:0.5"), Report)
    assert_type(sv.search("other", "skill.safetensors", eval="my:score", output="found"), Report)
    with sv.attach(model, v, lam=0.5) as live:
        assert_type(live, Live)
        assert_type(live.set(lam=(0.3)), Report)
        live.detach()


def train(trainer: Any) -> None:
    trainer.add_callback(sv.SkillVectorCallback("sft", method="grpo"))
    trainer.add_callback(sv.SkillVectorEvaluation(trainer, "skill.safetensors", lam=0.5))


class Watching:
    def planned(self, report: Report) -> None:
        print(report)

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        print(done_nbytes / total_nbytes)


def careful() -> int:
    try:
        use(make())
    except (UsageError, IncompatibleError, NonfiniteError) as error:
        return error.exit_code
    except (FormatError, OutputError, VerificationError) as error:
        print(error)
    except SkillvecError:
        raise
    print(sv.__version__)
    return 0
