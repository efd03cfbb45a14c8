"""Fisher information of tiny models, against gradients taken weight by weight on the spot."""

from pathlib import Path

import pytest
import torch
from families import perturbed, save
from safetensors.torch import load_file

import skillvec as sv
from skillvec.recipes import fisher
from skillvec.recipes.test_calibrate import (
    PROMPTS,
    WORDS,
    build_again,
    read_about,
    save_model,
    write_prompts,
)
from skillvec.recipes.test_evaluate import make_tokenizer

TEXTS = [text for text in PROMPTS if " " in text]


def squares(folder: Path) -> dict[str, torch.Tensor]:
    """Return the means of squared gradients of log p, token by token through torch.autograd."""
    model, tokenizer = build_again(folder).float(), make_tokenizer(WORDS)
    names, weights = zip(*model.named_parameters(), strict=True)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float64)
            for name, weight in zip(names, weights, strict=True)}  # fmt: skip
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        chances = model(ids).logits[0].log_softmax(-1)
        likelihood = sum(chances[at, ids[0, at + 1]] for at in range(ids.shape[1] - 1))
        for name, gradient in zip(names, torch.autograd.grad(likelihood, weights), strict=True):
            sums[name] += gradient.double() ** 2 / len(TEXTS)
    return sums


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_mean_of_squared_gradients(tmp_path: Path, tied: bool) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base", tied)
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in TEXTS])
    output = tmp_path / "f.safetensors"
    about = fisher.estimate(base, data, output, device="cpu")
    found, wanted = load_file(output), squares(base)
    assert {*found} == {*wanted} == {*load_file(base / "model.safetensors")}
    for name, values in found.items():
        assert values.dtype == torch.float32 and (values >= 0).all()
        torch.testing.assert_close(values.double(), wanted[name], rtol=1e-3, atol=1e-12)
    norm = torch.cat([values.reshape(-1) for values in wanted.values()]).norm()
    assert about["norm"] == pytest.approx(float(norm), rel=1e-4) and about["texts"] == len(TEXTS)
    assert read_about(output)["kind"] == "fisher"

    # another time the same bytes; drawn tokens give other values, and a seed the same again
    drawn = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file, seed in zip(drawn, (1, 1, 2), strict=True):
        fisher.estimate(base, data, file, device="cpu", sample=True, seed=seed)
    fisher.estimate(base, data, output, device="cpu", force=True)
    assert load_file(output)["model.norm.weight"].equal(found["model.norm.weight"])
    one, again, other = (load_file(file)["model.norm.weight"] for file in drawn)
    assert one.equal(again) and not one.equal(other) and not one.equal(found["model.norm.weight"])


def test_combine_takes_what_it_makes(tmp_path: Path) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in TEXTS])
    weights = load_file(base / "model.safetensors")
    pairs, files = [], []
    for seed in (1, 2):
        tuned = save(tmp_path / f"{seed}.safetensors", perturbed(weights, seed))
        pairs.append(f"{tuned}::{base}")
        files.append(tmp_path / f"f{seed}.safetensors")
        words = ["--model", str(base), "--data", str(data), "-o", str(files[-1]),
                 "--sample", "--seed", str(seed), "--device", "cpu"]  # fmt: skip
        assert fisher.main(words) == 0
    out = tmp_path / "c.safetensors"
    sv.combine(*pairs, op="fisher", parameters={"fisher": files}, output=out, codec="dense")
    name = "model.layers.0.mlp.up_proj.weight"
    deltas = [load_file(pair.partition("::")[0])[name].double() - weights[name].double()
              for pair in pairs]  # fmt: skip
    f = [load_file(file)[name].double() for file in files]
    expected = (f[0] * deltas[0] + f[1] * deltas[1]) / (f[0] + f[1])
    known = f[0] + f[1] > 0
    assert known.float().mean() > 0.5
    torch.testing.assert_close(load_file(out)[name].double()[known], expected[known])


def test_what_cannot_be_estimated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model("MixtralForCausalLM", tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"text": "w1 w2"}])
    words = ["--model", str(base), "--data", str(data), "-o", str(tmp_path / "f.safetensors")]
    assert fisher.main([*words, "--max-length", "1"]) == 2
    assert "max_length is at least 2" in capsys.readouterr().err
    assert fisher.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("left out: ") == 4 and "experts" in said  # two fused tensors a layer
    assert not any("experts" in name for name in load_file(tmp_path / "f.safetensors"))
    assert fisher.main(words) == 2 and "--force" in capsys.readouterr().err
    write_prompts(data, [{"text": "w1"}])
    assert fisher.main([*words, "--force"]) == 2
    assert "one token predicts nothing" in capsys.readouterr().err
    write_prompts(data, [{"text": "w1 w2"}])
    monkeypatch.setattr("skillvec.files.output_file.available_memory_nbytes", lambda: 1000)
    assert fisher.main([*words, "--force"]) == 2
    assert "of memory wanted, 1" in capsys.readouterr().err
