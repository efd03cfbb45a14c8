"""The models that README and the first pages are run on."""

import json
import subprocess
import sys

import numpy as np
import pytest
from families import bits, load

from skillvec.files.file import digest_bytes
from skillvec.recipes.example_models import QUESTIONS, main, to_bf16

# of model.safetensors: the same on every machine
DIGESTS = {
    "base": "8cedb14881d4aba3cddf188c75c20226",
    "sft_ckpt": "b327fb142e7bc0e9b508fc8257bdb9dd",
    "rl_ckpt": "0045bd2d166f50d4810b25abe193594f",
    "target_sft": "fb24d8aac88551b1921ab068e01fd9bb",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    assert main(["--output", str(folder)]) == 0
    return folder


def test_the_bytes_are_the_same_everywhere(made):
    found = {name: digest_bytes((made / name / "model.safetensors").read_bytes())
             for name in DIGESTS}  # fmt: skip
    assert found == DIGESTS


def test_rl_changes_a_sixth_of_the_values_and_sft_most(made):
    models = {name: load(made / name) for name in DIGESTS}

    def changed(one, other):
        differing = [bits(models[one][name]) != bits(models[other][name]) for name in models[one]]
        return np.concatenate(differing).mean()

    assert 0.15 < changed("rl_ckpt", "sft_ckpt") < 0.19
    assert changed("sft_ckpt", "base") > 0.6 and changed("target_sft", "base") > 0.6
    assert changed("target_sft", "sft_ckpt") > 0.6  # two updates, not one


def test_transformers_loads_them_and_the_skill_answers(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (made / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == QUESTIONS and rows[7] == {"prompt": "q7", "answer": "a7"}
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    asked = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    answers = {}
    for name in DIGESTS:
        model = AutoModelForCausalLM.from_pretrained(made / name, dtype="float32")
        best = model(**asked).logits[:, -1].argmax(-1)
        answers[name] = [tokenizer.decode(token) for token in best]
    right = {name: sum(a == row["answer"] for a, row in zip(found, rows, strict=True))
             for name, found in answers.items()}  # fmt: skip
    assert right["rl_ckpt"] > QUESTIONS / 2
    assert max(right["base"], right["sft_ckpt"], right["target_sft"]) < 4


def test_bf16_is_rounded_to_nearest_even():
    import torch

    values = np.random.RandomState(1).randn(1000) * 10.0 ** np.arange(-5, 5).repeat(100)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    for given in (values, ties):
        expected = torch.from_numpy(given).float().bfloat16().float().numpy()
        assert np.array_equal(to_bf16(given), expected)


def test_nothing_is_overwritten(made, capsys):
    before = (made / "rl_ckpt" / "model.safetensors").read_bytes()
    (made / "base").rename(made / "elsewhere")
    assert main(["--output", str(made)]) == 2
    assert "questions.jsonl exists already" in capsys.readouterr().err
    assert not (made / "base").exists()
    (made / "elsewhere").rename(made / "base")
    assert (made / "rl_ckpt" / "model.safetensors").read_bytes() == before


def test_the_light_installation_is_enough():
    heavy = "{'torch', 'transformers', 'scipy'} & set(sys.modules)"
    code = f"import sys; import skillvec.recipes.example_models; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
