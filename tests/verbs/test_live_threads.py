"""A model that answers in one thread while another sets the lambda: under the lock, never torn."""

import threading
from pathlib import Path

import pytest
import torch
from families import load, perturbed, save

import skillvec as sv

LAMBDAS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("threads")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    save(folder / "tuned", perturbed(load(folder / "base"), 5, size=0.3))
    sv.diff(folder / "tuned", folder / "base", folder / "v.safetensors")
    return folder


def answer(model: torch.nn.Module) -> bytes:
    """Return the bits of all logits of a greedy answer of 12 tokens."""
    found = model.generate(
        torch.arange(1, 9)[None], max_new_tokens=12, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(found.logits).numpy().tobytes()


def test_every_answer_is_that_of_one_lambda(skill: Path, one_thread: None) -> None:
    """Of six answers each is that of one of the lambdas, bit for bit, whatever is set meanwhile."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(skill / "base")
    with sv.attach(model, skill / "v.safetensors", workers=1) as live:
        expected = []
        for lam in LAMBDAS:
            live.set(lam=lam)
            expected.append(answer(model))
        assert len(set(expected)) == len(LAMBDAS)
        answers: list[bytes] = []
        done, was_set = threading.Event(), threading.Semaphore(0)

        def serve() -> None:
            try:
                for _ in range(6):
                    was_set.acquire()
                    with live.lock:
                        answers.append(answer(model))
            finally:
                done.set()

        server = threading.Thread(target=serve)
        server.start()
        count = 0
        while not done.is_set():
            live.set(lam=LAMBDAS[count % len(LAMBDAS)])
            was_set.release()
            count += 1
        server.join()
    assert len(answers) == 6 and count >= 6
    assert set(answers) <= set(expected)
    assert answer(model) == expected[0]
