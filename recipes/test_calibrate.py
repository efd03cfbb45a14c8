"""Second moments of inputs: against what the layers are given, prompt by prompt without padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from zoo import build

import skillvec as sv
from skillvec.recipes import calibrate
from skillvec.recipes.test_evaluate import make_tokenizer

WORDS = [f"w{i}" for i in range(37)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w2 w2", "w3 w1", "w30 w31 w32 w33"]
CONV1D = ("c_attn", "c_proj", "c_fc")  # transformers' layer of GPT-2


def save_model(name: str, folder: Path, tied: bool = False) -> Path:
    model = build(name, tied)
    model.save_pretrained(folder)
    make_tokenizer(WORDS).save_pretrained(folder)
    return folder


def write_prompts(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def collect(folder: Path) -> dict[str, torch.Tensor]:
    """Return what every layer is given on the prompts, one by one: tokens x values, by module."""
    model, tokenizer = build_again(folder), make_tokenizer(WORDS)
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head", *CONV1D)):
            module.register_forward_hook(
                lambda _, given, __, name=name: found.setdefault(name, []).append(given[0][0])
            )
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([tokenizer(prompt)["input_ids"]]))
    return {name: torch.cat(pieces).double() for name, pieces in found.items()}


def build_again(folder: Path) -> Any:
    import transformers

    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()


def read_about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["skillvec"])
    return found


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_moments_and_outputs_are_those_of_the_prompts(name: str, tmp_path: Path) -> None:
    base = save_model(name, tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    output = tmp_path / "moments.safetensors"
    said = calibrate.calibrate(base, data, output, batch=3, device="cpu")
    inputs, tensors, weights = (
        collect(base),
        load_file(output),
        load_file(base / "model.safetensors"),
    )
    assert set(said["weights"]) == {f"{module}.weight" for module in inputs}
    assert said["tokens"] == 17 and not said["left_out"]
    assert {*tensors} == {f"{entry['entry']}.{part}" for entry in said["weights"].values()
                          for part in ("moment", "mean")}  # fmt: skip
    for weight, place in said["weights"].items():
        x = inputs[weight.removesuffix(".weight")]
        turned = weight.endswith(tuple(f"{end}.weight" for end in CONV1D))
        assert place["input"] == ("rows" if turned else "columns")
        moment, mean = (tensors[f"{place['entry']}.{part}"] for part in ("moment", "mean"))
        torch.testing.assert_close(moment.double(), x.T @ x / 17, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
    if name == "LlamaForCausalLM":
        shared = {said["weights"][f"model.layers.1.self_attn.{part}_proj.weight"]["entry"]
                  for part in "qkv"}  # fmt: skip
        assert shared == {"model.layers.1.self_attn.q_proj"} and len(tensors) == 2 * (2 * 4 + 1)

    # the verb, on updates of this model, against what the layers put out
    updates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tuned = {key: value + 0.01 * torch.randn_like(value) for key, value in weights.items()}
        updates.append({key: tuned[key].double() - weights[key].double() for key in tuned})
        from safetensors.torch import save_file

        save_file(tuned, tmp_path / f"{seed}.safetensors")
    pair = [f"{tmp_path}/{seed}.safetensors::{base}" for seed in (1, 2)]
    report = sv.orthogonality(*pair, activations=output, device="cpu")
    added: list[list[torch.Tensor]] = [[], []]
    for number, update in enumerate(updates):
        for weight, place in said["weights"].items():
            matrix = update[weight].T if place["input"] == "columns" else update[weight]
            added[number].append((inputs[weight.removesuffix(".weight")] @ matrix).reshape(-1))
    one, other = (torch.cat(pieces) for pieces in added)
    overall = report.facts["pairs"][0]["overall"]
    expected = float(one @ other / one.norm() / other.norm())
    assert overall["cosine_outputs"] == pytest.approx(expected, abs=1e-5)
    left = report.facts["activations"]["without"]
    assert left == (1 if name == "LlamaForCausalLM" else 2)  # embeddings, of positions too


def test_the_same_bytes_again_and_without_padding(tmp_path: Path) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in PROMPTS])
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file, batch in zip(files, (5, 5, 1), strict=True):
        calibrate.calibrate(base, data, file, batch=batch, device="cpu")
    assert files[0].read_bytes() == files[1].read_bytes()
    for name, value in load_file(files[2]).items():
        torch.testing.assert_close(load_file(files[0])[name], value, rtol=1e-4, atol=1e-6)


def test_a_tied_head_goes_by_the_name_that_is_stored(tmp_path: Path) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base", tied=True)
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in PROMPTS])
    said = calibrate.calibrate(base, data, tmp_path / "m.safetensors", include=["*embed*"])
    assert said["weights"] == {
        "model.embed_tokens.weight": {"entry": "model.embed_tokens", "input": "columns"}
    }


def test_what_is_not_covered_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Mixtral's experts lie in memory as two fused parameters; what routes them is a layer."""
    base = save_model("MixtralForCausalLM", tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in PROMPTS])
    words = ["--model", str(base), "--data", str(data), "-o", str(tmp_path / "m.safetensors")]
    assert calibrate.main([*words, "--exclude", "*lm_head*"]) == 0
    names = read_about(tmp_path / "m.safetensors")["weights"]
    assert not [name for name in names if "expert" in name or "lm_head" in name]
    said = capsys.readouterr().out
    assert "layers," in said and "of the disk" in said and "of memory" in said
    assert calibrate.main(words) == 2 and "--force" in capsys.readouterr().err


def test_layers_that_get_part_of_the_tokens_are_left_out(tmp_path: Path) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base")
    model = build_again(base)
    whole = model.model.layers[0].mlp

    class Half(torch.nn.Module):
        """Gives its layers every other token, as a router may."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                whole.gate_proj, whole.up_proj, whole.down_proj)  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            out[:, ::2] = whole(x[:, ::2])
            return out

    model.model.layers[0].mlp = Half()
    layers, _ = calibrate.find_layers(model, str(base), ["*layers.0.*"], [])
    left_out = calibrate.Inputs(layers).trace(model, [[3, 4, 5, 6]], 0)
    assert {name.split(".")[-2] for name in left_out} == {"gate_proj", "up_proj", "down_proj"}
    assert set(left_out.values()) == {"its input is not one vector a token"}


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = make_tokenizer([*WORDS, "user", "assistant"])
    message = [{"role": "user", "content": "w1"}]
    one, other = (calibrate.encode(tokenizer, (key, message)) for key in ("prompt", "messages"))
    assert one == [*other, tokenizer.convert_tokens_to_ids("assistant")]
    with pytest.raises(ValueError, match="no chat template"):
        calibrate.encode(make_tokenizer(WORDS, template=None), ("prompt", message))


@pytest.mark.parametrize(("rows", "words"), [
    ([], "no prompts"), ([{"prompt": ""}, {"answer": "x"}], "2 rows have none.*lines 1, 2"),
    ([{"text": 3}], "1 rows"),
])  # fmt: skip
def test_rows_without_a_prompt_are_refused(rows: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate.read_prompts(write_prompts(tmp_path / "p.jsonl", rows))


def test_there_must_be_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model("LlamaForCausalLM", tmp_path / "base")
    data = write_prompts(tmp_path / "p.jsonl", [{"text": text} for text in PROMPTS])
    with monkeypatch.context() as patch:
        patch.setattr("skillvec.files.output_file.available_memory_nbytes", lambda: 100)
        with pytest.raises(ValueError, match=r"of memory wanted, 100 B free.*--include"):
            calibrate.calibrate(base, data, tmp_path / "m.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
