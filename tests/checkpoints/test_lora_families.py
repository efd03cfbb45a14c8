"""Adapters on models of many families against PEFT: trained on the model that transformers holds,
applied to the files that it saves, and to those of other layouts of the same model."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import assert_same_bits, load, save
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, build, save_memory

import skillvec as sv
from skillvec.errors import IncompatibleError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
FEW = (  # what `make test` runs: each a way of its own to name or to lay tensors
    "GPT2LMHeadModel", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM",
    "Qwen3NextForCausalLM", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "T5ForConditionalGeneration",
)  # fmt: skip
SEEING = tuple(name for name in ZOO if "text_config" in ZOO[name])


def cases(names: Iterable[str], few: Iterable[str] = FEW) -> list[Any]:
    """Return names as parameters, all but a few of them slow."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def linears(model: nn.Module) -> list[str]:
    """Return the last names of the linear layers of a model, heads and towers apart.

    Those of Mamba's that PEFT does not take are left out.
    """
    apart = re.compile("head|visual|vision|classifier|score|qa_outputs")
    found = {
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not apart.search(name)
    }  # fmt: skip
    return sorted(found - ({"out_proj"} if "A_log" in str([*model.state_dict()]) else set()))


def train(model: Any, folder: Path, **lora: Any) -> Any:
    """Save an adapter with random values by PEFT; return the model with it merged."""
    experts = sorted({
        ".".join(name.split(".")[-2:]) for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    })  # fmt: skip
    settings = {"r": 2, "lora_alpha": 6, "target_parameters": experts or None} | lora
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def edit(folder: Path, rename: Any = None, **said: Any) -> None:
    """Change the names of an adapter's tensors, and its config."""
    file = folder / "adapter_model.safetensors"
    if rename:
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text()) | said
    (folder / "adapter_config.json").write_text(json.dumps(config))


def assert_merged(out: Path, want: Path, base: Path, least: int = 1) -> None:
    """Fail unless a model is another within fp32 rounding, and not the base's in `least` tensors.

    PEFT rounds s B A, and then the sum; here the sum is rounded once.
    """
    found, expected, before = load(out), load(want), load(base)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-7, msg=name)
    assert sum(not torch.equal(expected[name], before[name]) for name in before) >= least


# ------------------------------------------------------------------------- models of every family


@pytest.mark.parametrize("name", cases(ZOO))
def test_what_peft_merges_is_what_comes_out(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    save_memory(model, tmp_path / "memory")
    targets = linears(model)
    if name.startswith("Gemma4"):  # PEFT does not wrap its tower's layers
        targets = rf".*language_model\..*\.({'|'.join(targets)})"
    merged = train(model, tmp_path / "lora", target_modules=targets)
    merged.save_pretrained(tmp_path / "want")
    save_memory(merged, tmp_path / "want-memory")
    least = 2 if "experts" not in str(load(tmp_path / "base")) else 8
    sv.apply(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", least)
    assert sv.verify(tmp_path / "out").facts["verified"]
    sv.apply(tmp_path / "memory", tmp_path / "lora", tmp_path / "out-memory")
    assert_merged(tmp_path / "out-memory", tmp_path / "want-memory", tmp_path / "memory", 2)


def test_a_stored_vector_of_an_adapter_of_another_layout(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path / "base")
    train(model, tmp_path / "lora", target_modules=["q_proj"]).save_pretrained(tmp_path / "want")
    vector = sv.diff(tmp_path / "lora", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "base", vector, tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 20)
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]


# ---------------------------------------------------------------- language models within others


def language_model(model: Any) -> Any:
    for path in ("model.language_model", "model.text_model", "language_model.model"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError


def with_text(name: str, folder: Path, text: Any) -> Path:
    """Save a model that sees with the weights of another language model in it."""
    whole = build(name)
    language_model(whole).load_state_dict(text.state_dict())
    whole.save_pretrained(folder)
    return folder


FEW_SEEING = (
    "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
)  # fmt: skip


@pytest.mark.parametrize("name", cases(SEEING, FEW_SEEING))
def test_the_language_model_of_a_model_that_sees(name: str, tmp_path: Path) -> None:
    """Trained on the whole or on the text alone, and applied to the whole and to the text alone."""
    model = build(name)
    model.save_pretrained(tmp_path / "whole")
    language_model(model).save_pretrained(tmp_path / "text")
    targets = "|".join(linears(language_model(model)))
    merged = train(
        model, tmp_path / "a", target_modules=rf".*(language_model|text_model)\..*\.({targets})",
        target_parameters=None,
    )  # fmt: skip
    merged.save_pretrained(tmp_path / "want-whole")
    language_model(merged).save_pretrained(tmp_path / "want-text")
    edit(tmp_path / "a", base_model_name_or_path="gone")
    for side in ("whole", "text"):
        sv.apply(tmp_path / side, tmp_path / "a", tmp_path / f"a-{side}")
        assert_merged(tmp_path / f"a-{side}", tmp_path / f"want-{side}", tmp_path / side, 8)
    try:
        text, told = AutoModelForCausalLM.from_pretrained(
            tmp_path / "text", output_loading_info=True
        )
    except ValueError:  # transformers has no language model of it alone
        return
    if set(told["missing_keys"]) - {"lm_head.weight"}:  # nor does it load Llama 4's
        return
    merged = train(
        text, tmp_path / "b", target_modules=linears(text), target_parameters=None
    ).model  # fmt: skip
    with_text(name, tmp_path / "want-whole", merged)
    language_model(build(name)).__class__.save_pretrained(merged, tmp_path / "want-text")
    edit(tmp_path / "b", base_model_name_or_path="gone")
    for side in ("whole", "text"):
        sv.apply(tmp_path / side, tmp_path / "b", tmp_path / f"b-{side}")
        assert_merged(tmp_path / f"b-{side}", tmp_path / f"want-{side}", tmp_path / side, 8)


def test_the_class_that_reads_a_language_model_out_of_a_model_that_sees(tmp_path: Path) -> None:
    name = "Qwen3_5ForConditionalGeneration"
    build(name).save_pretrained(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    merged = train(text, tmp_path / "lora", target_modules=linears(text))
    with_text(name, tmp_path / "want", merged.model)
    vector = sv.diff(tmp_path / "lora", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "base", vector, tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 8)


# ------------------------------------------------------------------------------ heads and old names


@pytest.mark.parametrize("lora", [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "embed_tokens"]},
])  # fmt: skip
def test_heads_that_files_call_otherwise(lora: dict[str, Any], tmp_path: Path) -> None:
    """A tied head that is parted gets the name by which transformers finds it."""
    model = build("Gemma3ForConditionalGeneration", tied=True)
    model.save_pretrained(tmp_path / "base")
    merged = train(model, tmp_path / "lora", **{"target_modules": ["q_proj"]} | lora)
    sv.diff(tmp_path / "lora", tmp_path / "base", tmp_path / "v.safetensors")
    for vector in (f"{tmp_path}/lora::{tmp_path}/base", tmp_path / "v.safetensors"):
        sv.apply(tmp_path / "base", vector, tmp_path / "out", force=True)
        loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=5e-7, msg=name)
    parted = "modules_to_save" in lora and "ensure_weight_tying" not in lora
    assert ("language_model.lm_head.weight" in load(tmp_path / "out")) == parted


def test_names_of_old(tmp_path: Path) -> None:
    """What transformers called modules before: its own registry says what they are now."""
    model = build("LlavaForConditionalGeneration")
    model.save_pretrained(tmp_path / "base")
    merged = train(model, tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    merged.save_pretrained(tmp_path / "want")
    pairs = {
        "model.model.language_model.": "model.language_model.model.",
        "model.lm_head.": "model.language_model.lm_head.",
        "model.model.vision_tower.": "model.vision_tower.vision_model.",
    }

    def old(name: str) -> str:
        end = next(end for end in pairs if name.startswith(f"base_model.{end}"))
        return name.replace(end, pairs[end], 1)

    edit(tmp_path / "lora", old)
    sv.apply(tmp_path / "base", f"{tmp_path}/lora::{tmp_path}/base", tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 5)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_that_were_modules(name: str, tmp_path: Path) -> None:
    """Adapters made before experts were fused: on files that have them apart, and fused ones."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    save_memory(model, tmp_path / "memory")
    before, generator = load(tmp_path / "base"), torch.Generator().manual_seed(1)
    factors, want = {}, dict(before)
    for weight, tensor in before.items():
        if ".experts." in weight or "q_proj" in weight:
            a = 0.1 * torch.randn(2, tensor.shape[1], generator=generator)
            b = 0.1 * torch.randn(tensor.shape[0], 2, generator=generator)
            module = f"base_model.model.{weight.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            want[weight] = tensor + 3 * (b @ a)
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "base", tmp_path / "want")
    save_file(want, tmp_path / "want/model.safetensors", {"format": "pt"})
    sv.apply(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 20)
    sv.apply(tmp_path / "memory", tmp_path / "lora", tmp_path / "fused")
    loaded = type(model).from_pretrained(tmp_path / "fused").state_dict()
    for key, tensor in type(model).from_pretrained(tmp_path / "want").state_dict().items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=5e-7, msg=key)


# -------------------------------------------------------------------------------- other prefixes


def test_a_prefix_that_could_be_two_is_asked_for(tmp_path: Path) -> None:
    """Two towers of one shape: which is meant is said with --rename, and recorded."""
    left, name = (f"model.{side}.layers.0.proj.weight" for side in ("left", "right"))
    tensors = {left: torch.randn(8, 8), name: torch.randn(8, 8)}
    for side in ("target", "base"):
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors", {"format": "pt"})
    lora = tmp_path / "lora"
    lora.mkdir()
    module = "base_model.model.tower.layers.0.proj"
    factors = {"A": torch.randn(2, 8), "B": torch.randn(8, 2)}
    save_file(
        {f"{module}.lora_{side}.weight": factor for side, factor in factors.items()},
        lora / "adapter_model.safetensors",
    )
    base = {"base_model_name_or_path": str(tmp_path / "base")}
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    for named in ({}, base):
        (lora / "adapter_config.json").write_text(json.dumps(said | named))
        with pytest.raises(IncompatibleError, match=r"2 ways: say which with --rename") as caught:
            sv.apply(tmp_path / "target", lora, tmp_path / "out")
        assert "model.left.layers" in str(caught.value)
        rules = ["^tower=model.right"]
        sv.apply(tmp_path / "target", lora, tmp_path / "out", rename=rules, force=True)
        found = load(tmp_path / "out")
        torch.testing.assert_close(found[name], tensors[name] + factors["B"] @ factors["A"])
        assert torch.equal(found[left], tensors[left])
        assert sv.verify(tmp_path / "out").facts["verified"]
    sv.diff(lora, tmp_path / "base", tmp_path / "v.safetensors", rename=rules)
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    vector = sv.SkillVector.open(tmp_path / "v.safetensors")
    assert vector.manifest["parents"][0]["rename"] == rules
    sv.apply(tmp_path / "target", vector, tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")[name], found[name])
    with pytest.raises(sv.UsageError, match="matches none"):
        sv.diff(lora, tmp_path / "base", tmp_path / "w.safetensors", rename=["^model=x"])


def test_rules_that_an_adapter_was_fitted_by_are_not_applied_to_it_again(tmp_path: Path) -> None:
    name, rules = "model.lefft.proj.weight", ["ft=fft"]
    save(tmp_path / "base", {name: torch.zeros(8, 8)})
    (tmp_path / "lora").mkdir()
    factors = {side: torch.ones((2, 8) if side == "A" else (8, 2)) for side in "AB"}
    save_file(
        {f"base_model.model.left.proj.lora_{side}.weight": t for side, t in factors.items()},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(said))
    pair = sv.SkillVector.between(tmp_path / "lora", tmp_path / "base", rename=rules)
    assert pair.manifest["rename"] == rules
    sv.apply(tmp_path / "base", pair, tmp_path / "out", rename=rules)
    assert torch.equal(load(tmp_path / "out")[name], factors["B"] @ factors["A"])


def test_an_adapter_of_another_model_is_refused_by_the_names_of_both(tmp_path: Path) -> None:
    build("Qwen3MoeForCausalLM").save_pretrained(tmp_path / "base")
    other = build("LlavaForConditionalGeneration")
    train(other, tmp_path / "lora", target_modules=["q_proj", "fc1"])
    with pytest.raises(IncompatibleError, match="only in the adapter") as caught:
        sv.apply(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert "only in the base" in str(caught.value)


# --------------------------------------------------------------- what only a class of models tells


def conv1d(name: str) -> Any:
    """Return a model that has linear layers beside GPT-2's Conv1D, whose weights lie turned."""
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = transformers.GPT2Config(**sizes)
    if name == "VisionEncoderDecoderModel":
        eye = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
               "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
        config.add_cross_attention = config.is_decoder = True
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**eye), config
        )
    config.architectures = [name]
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("VisionEncoderDecoderModel", ["q_proj", "c_attn"]),
        ("VisionEncoderDecoderModel", ["q_proj", "attn.c_proj"]),
        ("GPT2ForSequenceClassification", "all-linear"),
    ],
)
def test_square_weights_beside_those_that_lie_turned(
    name: str, targets: Any, tmp_path: Path
) -> None:
    """fan_in_fan_out is that of PEFT's last module alone: of a square weight the class tells."""
    model = conv1d(name)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    merged = train(model, tmp_path / "lora", target_modules=targets)
    merged.save_pretrained(tmp_path / "want")
    sv.apply(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 3)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("LlamaForCausalLM", {"target_modules": r".*\.embed_tokens"}),  # a pattern ties nothing
        ("LlamaForCausalLM", {"target_modules": ["embed_tokens"]}),
        ("Gemma3ForConditionalGeneration", {"target_modules": ["lm_head"]}),
        ("LlavaForConditionalGeneration", {"target_modules": ["linear_1", "linear_2"]}),
    ],
)
def test_what_ensure_weight_tying_ties(name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    model = build(name, tied=True)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    merged = train(model, tmp_path / "lora", **lora, ensure_weight_tying=True)
    given = f"{tmp_path}/lora::{tmp_path}/base"
    sv.apply(tmp_path / "base", given, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_experts_that_are_saved_whole(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    merged = train(
        model, tmp_path / "lora", target_modules=["q_proj"], target_parameters=None,
        modules_to_save=["experts"],
    )  # fmt: skip
    merged.save_pretrained(tmp_path / "want")
    sv.apply(tmp_path / "base", f"{tmp_path}/lora::{tmp_path}/base", tmp_path / "out")
    assert_merged(tmp_path / "out", tmp_path / "want", tmp_path / "base", 10)


def test_an_adapter_of_a_text_model_that_is_at_hand(tmp_path: Path) -> None:
    """That its base is on this disk changes nothing of where it fits."""
    whole = build("LlavaForConditionalGeneration")
    whole.save_pretrained(tmp_path / "whole")
    language_model(whole).save_pretrained(tmp_path / "text")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    train(text, tmp_path / "lora", target_modules=["q_proj"])
    sv.apply(tmp_path / "whole", tmp_path / "lora", tmp_path / "near")
    edit(tmp_path / "lora", base_model_name_or_path="gone")
    sv.apply(tmp_path / "whole", tmp_path / "lora", tmp_path / "far")
    assert_same_bits(tmp_path / "near", tmp_path / "far")
