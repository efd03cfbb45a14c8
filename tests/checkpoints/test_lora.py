"""LoRA adapters against PEFT itself: what merge_and_unload makes of real tiny models."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from harm import lowered
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import skillvec as sv
from skillvec.checkpoints import lora_fit, lora_settings
from skillvec.checkpoints.lora import Adapter, open_adapter
from skillvec.checkpoints.lora_deltas import (
    TILE,
    Dora,
    Joined,
    LowRank,
    Pair,
    RowsPut,
    Summed,
    Woven,
    product,
)
from skillvec.checkpoints.lora_fit import fit_adapter
from skillvec.checkpoints.lora_ties import AdapterEffect
from skillvec.errors import FormatError, IncompatibleError, NonfiniteError
from skillvec.files.header import read_header
from skillvec.files.tensors import Source, Viewed, values_of
from skillvec.files.views import Box, View, whole

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Weights = dict[str, torch.Tensor]
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def llama(**changes: Any) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, **changes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(**sizes, **ends, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt_oss() -> transformers.PreTrainedModel:
    config = transformers.GptOssConfig(
        **SIZES | {"num_hidden_layers": 1}, head_dim=8, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def trained(folder: Path, model: Callable[[], Any], **lora: Any) -> tuple[Path, Weights, Weights]:
    """Save an adapter with random factors by PEFT; return it, the base and what PEFT merges."""
    torch.manual_seed(0)
    base = model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = get_peft_model(base, LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(folder)
    if lora.get("alpha_pattern"):  # saved sorted, so what is loaded may be another
        tuned = loaded(before, model, folder)
    merged = tuned.merge_and_unload().state_dict()
    return folder, before, {name: tensor.clone() for name, tensor in merged.items()}


def loaded(before: Weights, model: Callable[[], Any], folder: Path) -> Any:
    base = model()
    base.load_state_dict(before)
    return PeftModel.from_pretrained(base, folder)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def opened(folder: Path, **changes: Any) -> Adapter:
    tensors = read_header(folder / "adapter_model.safetensors").tensors
    return open_adapter(str(folder), config_of(folder) | changes, tensors, f"adapter {folder.name}")


def stored(weights: Weights, path: Path) -> Mapping[str, Source]:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return read_header(path).tensors


def values(source: Source) -> np.ndarray:
    return values_of(source, 0, source.numel).reshape(source.shape)


def check(effect: AdapterEffect, before: Weights, after: Weights) -> None:
    """Compare base + effect with PEFT's merged weights, which it adds up in fp32."""
    for name, weight in after.items():
        expected, found = weight.numpy(), before[name].numpy()
        if name in effect.whole:
            np.testing.assert_array_equal(values(effect.whole[name]), expected, name)
            continue
        if name in effect.deltas:
            delta = values(effect.deltas[name])
            assert delta.dtype == np.float32 and np.abs(delta).max() > 1e-3, name
            found = found + delta
        scaled = isinstance(effect.deltas.get(name), Dora)  # by PEFT in fp32
        slack = {"rtol": 2e-6, "atol": 2e-6} if scaled else {"rtol": 0, "atol": 3e-7}
        np.testing.assert_allclose(found, expected, err_msg=name, **slack)
        assert name in effect.deltas or (found == expected).all(), name
    assert set(effect.deltas) | set(effect.whole) <= set(after)


QKV = ["q_proj", "k_proj", "v_proj"]
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], int, int]] = {
    "linear": (llama, {"r": 4, "lora_alpha": 6, "target_modules": [*QKV, "down_proj"]}, 8, 0),
    "rslora": (llama, {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": QKV}, 6, 0),
    "patterns": (
        llama,
        {"r": 4, "lora_alpha": 6, "target_modules": QKV,
         "rank_pattern": {"k_proj": 2, "^model.layers.1.self_attn.q_proj": 3},
         "alpha_pattern": {r"layers\.0\..*v_proj": 1, "q_proj": 20}},
        6, 0,
    ),
    "embedding": (llama, {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}, 2, 0),
    "whole head": (
        llama, {"r": 4, "target_modules": QKV, "modules_to_save": ["lm_head", "norm"]}, 6, 6
    ),
    "turned": (
        gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 3, 0
    ),
    "unsaid, turned": (gpt2, {"r": 4, "target_modules": ["c_attn", "wte", "lm_head"]}, 3, 0),
    "biases": (gpt2, {"r": 4, "target_modules": ["c_attn"], "bias": "lora_only"}, 1, 1),
    "experts": (
        mixtral,
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 3},
         "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        6, 0,
    ),
    "experts, odd patterns": (
        mixtral,
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"],
         "rank_pattern": {"experts.gate_up_proj": 3, r"layers\.1\.mlp\.experts\.down_proj": 1},
         "alpha_pattern": {"down_proj": 9, "experts": 70, r"gate_up_proj|q_proj": 5},
         "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        6, 0,
    ),
    "odd patterns": (
        llama,
        {"r": 4, "target_modules": [*QKV, "down_proj"],
         "rank_pattern": {"k_proj|v_proj": 2, ".*1.*q_proj": 3, "layers.0": 9, "Q_PROJ": 9},
         "alpha_pattern": {"proj": 30, "v_proj": 7, "model.layers.0.*": 5, "": 8, "^q_proj": 9}},
        8, 0,
    ),
    "router": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}, 4, 0),
    "whole router": (mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, 2, 2),
    "a plain parameter": (
        llama, {"r": 2, "target_modules": [], "target_parameters": ["q_proj.weight"]}, 2, 0
    ),
    "dora": (llama, {"r": 4, "use_dora": True, "target_modules": [*QKV, "down_proj"]}, 8, 0),
    "dora of embeddings": (
        llama, {"r": 3, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}, 2, 0
    ),
    "dora, turned": (
        gpt2,
        {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["c_attn", "c_proj"],
         "fan_in_fan_out": True},
        3, 0,
    ),
    "dora, unsaid, turned": (gpt2, {"use_dora": True, "target_modules": ["c_fc", "wte"]}, 2, 0),
    "biases of factors": (
        gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "lora_bias": True}, 2, 0
    ),
    "rows": (llama, {"target_modules": QKV, "trainable_token_indices": [7, 2, 39]}, 6, 1),
    "rows by name": (
        llama,
        {"target_modules": QKV,
         "trainable_token_indices": {"embed_tokens": [0], "lm_head": [5, 6]}},
        6, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    model, lora, deltas, wholes = KINDS[kind]
    folder, before, after = trained(tmp_path / "lora", model, **lora)
    effect = fit_adapter(opened(folder), stored(before, tmp_path / "base.safetensors"))
    check(effect, before, after)
    assert (len(effect.deltas), len(effect.whole)) == (deltas, wholes)
    assert len(effect.notes) == {
        "embedding": 2, "unsaid, turned": 2, "dora of embeddings": 2
    }.get(kind, 0)  # fmt: skip


def test_patterns_that_were_sorted_are_doubted(tmp_path: Path) -> None:
    """PEFT 0.21.2 saves patterns by name and takes the first: an alpha of training may be lost."""
    lora = {"r": 2, "target_modules": ["q_proj"], "lora_alpha": 3}
    patterns = {"q_proj": 6, r"layers\.0.*": 24}  # the first is the last once it is saved
    torch.manual_seed(0)
    tuned = get_peft_model(llama(), LoraConfig(**lora, alpha_pattern=patterns))
    tuned.save_pretrained(tmp_path / "ad")
    assert list(config_of(tmp_path / "ad")["alpha_pattern"]) == sorted(patterns)
    name = "model.layers.0.self_attn.q_proj"
    base = stored(llama().state_dict(), tmp_path / "base")
    again = loaded(llama().state_dict(), llama, tmp_path / "ad")
    scalings = [
        model.base_model.model.get_submodule(name).scaling["default"] for model in (tuned, again)
    ]
    effect = fit_adapter(opened(tmp_path / "ad"), base)
    delta = effect.deltas[f"{name}.weight"]
    assert isinstance(delta, LowRank) and scalings == [3.0, 12.0] and delta.scaling == 12.0
    (said,) = effect.warnings
    assert f"match {name}: PEFT takes the first" in said
    other = fit_adapter(
        opened(tmp_path / "ad", alpha_pattern={"q_proj": 6, r"layers\.0.*": 6}), base
    )
    assert not other.warnings


def test_experts_that_lie_turned(tmp_path: Path) -> None:
    names = ["experts.gate_up_proj"]
    lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": names}
    folder, before, after = trained(tmp_path / "lora", gpt_oss, **lora)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert before[name].shape == (3, 16, 48)
    effect = fit_adapter(opened(folder), stored(before, tmp_path / "base.safetensors"))
    check(effect, before, after)
    assert effect.deltas[name].shape == (3, 16, 48)


def test_deltas_of_peft_itself_and_names_with_the_adapter(tmp_path: Path) -> None:
    """A dump that names its adapter, as trainers write, is the same; get_delta_weight agrees."""
    lora = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    folder, before, _ = trained(tmp_path / "lora", llama, **lora)
    content = load_file(folder / "adapter_model.safetensors")
    dump = {
        name.replace(".weight", ".default.weight") if "lora_A" in name or "lora_B" in name
        else f"{name}.default" if "lora_embedding" in name else name: tensor
        for name, tensor in content.items()
    }  # fmt: skip
    save_file(dump, folder / "adapter_model.safetensors")
    base = stored(before, tmp_path / "base.safetensors")
    effect = fit_adapter(opened(folder), base)
    save_file(content, folder / "adapter_model.safetensors")
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(llama(), folder).base_model.model.model
    theirs = {
        "model.embed_tokens.weight": model.embed_tokens,
        "model.layers.1.self_attn.q_proj.weight": model.layers[1].self_attn.q_proj,
    }
    for name, module in theirs.items():
        expected = module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(values(effect.deltas[name]), expected, rtol=3e-7, atol=1e-7)


# ------------------------------------------------------------------------------------- experts

OUT, IN = 5, 8  # of gates and ups; downs are turned
PREFIX = "model.layers.0.mlp.experts"
LAYOUTS: dict[str, tuple[str | None, dict[str, tuple[int, ...]]]] = {  # model type, base
    "one by one": (None, {
        f"{PREFIX}.{e}.{leaf}_proj.weight": (IN, OUT) if leaf == "down" else (OUT, IN)
        for e in range(3) for leaf in ("gate", "up", "down")
    }),
    "one by one, as Mixtral": (None, {
        f"{PREFIX}.{e}.{leaf}.weight": (IN, OUT) if leaf == "w2" else (OUT, IN)
        for e in range(3) for leaf in ("w1", "w2", "w3")
    }),
    "fused": (
        None, {f"{PREFIX}.gate_up_proj": (3, 2 * OUT, IN), f"{PREFIX}.down_proj": (3, IN, OUT)}
    ),
    "in turns": (
        "gpt_oss",
        {f"{PREFIX}.gate_up_proj": (3, IN, 2 * OUT), f"{PREFIX}.down_proj": (3, OUT, IN)},
    ),
    "turned": (
        "llama4",
        {f"{PREFIX}.gate_up_proj": (3, IN, 2 * OUT), f"{PREFIX}.down_proj": (3, OUT, IN)},
    ),
}  # fmt: skip


def raw(folder: Path, shared: bool, leaves: Sequence[str] = ("w1", "w2", "w3")) -> Path:
    """Save an adapter as it comes from Tinker: 3-D factors of experts, and the head's own name."""
    torch.manual_seed(0)
    content = {}
    for leaf in leaves:
        out, inner = (IN, OUT) if leaf == "w2" else (OUT, IN)
        one_a, one_b = shared and leaf != "w2", shared and leaf == "w2"
        name = f"base_model.model.{PREFIX}.{leaf}"
        content[f"{name}.lora_A.weight"] = torch.randn(1 if one_a else 3, 2, inner)
        content[f"{name}.lora_B.weight"] = torch.randn(1 if one_b else 3, out, 2)
    for name, out in (("unembed_tokens", 6), ("layers.0.attn.q_proj", IN)):
        content[f"base_model.model.model.{name}.lora_A.weight"] = torch.randn(2, IN)
        content[f"base_model.model.model.{name}.lora_B.weight"] = torch.randn(out, 2)
    folder.mkdir()
    save_file(content, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expert_deltas(folder: Path, leaf: str) -> np.ndarray:
    held = load_file(folder / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{PREFIX}.{leaf}.lora_{x}.weight"].numpy() for x in "AB")
    return np.stack([1.5 * (b[e % len(b)] @ a[e % len(a)]) for e in range(3)])


def as_laid(
    layout: str, gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> dict[str, np.ndarray]:
    """Lay what is added to experts as a base has them."""
    if layout.startswith("one by one"):
        names = ("w1", "w3", "w2") if "Mixtral" in layout else ("gate_proj", "up_proj", "down_proj")
        return {f"{PREFIX}.{e}.{leaf}.weight": delta[e] for e in range(3)
                for leaf, delta in zip(names, (gate, up, down), strict=True)}  # fmt: skip
    both = np.concatenate([gate, up], 1)
    if layout != "fused":
        down, both = down.swapaxes(1, 2), both.swapaxes(1, 2)
    if layout == "in turns":
        both = np.stack([gate, up], 2).reshape(3, 2 * OUT, IN).swapaxes(1, 2)
    return {f"{PREFIX}.gate_up_proj": both, f"{PREFIX}.down_proj": down}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_adapters_of_tinker_fit_experts_however_they_lie(
    layout: str, shared: bool, tmp_path: Path
) -> None:
    model_type, shapes = LAYOUTS[layout]
    folder = raw(tmp_path / "raw", shared)
    others = {"lm_head.weight": (6, IN), "model.layers.0.self_attn.q_proj.weight": (IN, IN)}
    weights = {name: torch.zeros(shape) for name, shape in (shapes | others).items()}
    adapter = opened(folder)
    deltas = fit_adapter(adapter, stored(weights, tmp_path / "base"), {}, model_type).deltas
    w1, w2, w3 = (expert_deltas(folder, leaf) for leaf in ("w1", "w2", "w3"))
    expected = as_laid(layout, w1, w3, w2)
    assert set(deltas) == set(expected) | set(others)
    for name, delta in expected.items():
        np.testing.assert_allclose(values(deltas[name]), delta, rtol=1e-6, atol=1e-6)
    with pytest.raises(IncompatibleError, match="3-D factors of experts: only the base tells"):
        _ = adapter.deltas


def test_a_config_of_tinker_may_say_rank_and_alpha_alone(tmp_path: Path) -> None:
    folder = raw(tmp_path / "raw", False)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3}))
    assert opened(folder).settings.of("x") == (2, 1.5)
    for less in ({"r": 2}, {"lora_alpha": 3}):  # of these PEFT has defaults, and Tinker none
        (folder / "adapter_config.json").write_text(json.dumps(less))
        with pytest.raises(IncompatibleError, match="peft_type None"):
            opened(folder)


def test_experts_without_gates_have_w1_for_up(tmp_path: Path) -> None:
    """Nemotron's, whose w3 is empty in what Tinker saves."""
    folder = raw(tmp_path / "raw", False, ("w1", "w2"))
    held = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.{PREFIX}.w3"
    empty = {
        f"{name}.lora_A.weight": torch.zeros(3, 0, 0),
        f"{name}.lora_B.weight": torch.zeros(3, 0, 0),
    }
    save_file(held | empty, folder / "adapter_model.safetensors")
    others = {"lm_head.weight": (6, IN), "model.layers.0.self_attn.q_proj.weight": (IN, IN)}
    for shapes in (
        {f"{PREFIX}.{e}.{leaf}.weight": side for e in range(3)
         for leaf, side in (("up_proj", (OUT, IN)), ("down_proj", (IN, OUT)))},
        {f"{PREFIX}.up_proj": (3, OUT, IN), f"{PREFIX}.down_proj": (3, IN, OUT)},
    ):  # fmt: skip
        weights = {name: torch.zeros(shape) for name, shape in (shapes | others).items()}
        adapter = opened(folder)
        effect = fit_adapter(adapter, stored(weights, tmp_path / "base"))
        assert effect.notes == [f"{PREFIX}.w3: empty factors, left out"]
        assert set(effect.deltas) == set(weights)
        up = [delta for name, delta in effect.deltas.items() if "up_proj" in name]
        found = np.stack([values(delta) for delta in up]).reshape(3, OUT, IN)
        np.testing.assert_allclose(found, expert_deltas(folder, "w1"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("one by one", {f"{PREFIX}.3.gate_proj.weight": (OUT, IN)}, r"3\.gate_proj.*\[5, 8\]"),
        ("one by one", {f"{PREFIX}.2.up_proj.weight": (OUT, 9)}, r"2\.up_proj\.weight: \[5, 9\]"),
        ("one by one", {f"{PREFIX}.2.up_proj.weight": None}, r"2\.up_proj\.weight: not in"),
        ("fused", {f"{PREFIX}.down_proj": None}, r"experts\.down_proj: not in the base"),
        ("fused", {f"{PREFIX}.down_proj": (4, IN, OUT)}, r"w2: 0 ways to fit \[3, 8, 5\]"),
        ("fused", {f"{PREFIX}.gate_up_proj": (3, OUT, IN)}, "w1: 0 ways to fit"),
        ("turned", {}, "nothing tells how gate and up lie"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_are_named(
    layout: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    others = {"lm_head.weight": (6, IN), "model.layers.0.self_attn.q_proj.weight": (IN, IN)}
    shapes = {n: s for n, s in (LAYOUTS[layout][1] | others | changes).items() if s}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    adapter = opened(raw(tmp_path / "raw", False))
    with pytest.raises(IncompatibleError, match=said):
        fit_adapter(adapter, stored(weights, tmp_path / "base"))


@pytest.mark.parametrize("only", [None, "up_proj", "down_proj"])
def test_adapters_of_experts_one_by_one_are_what_peft_makes_of_them(
    only: str | None, tmp_path: Path
) -> None:
    """As they were saved before transformers 5, which fuses experts; PEFT takes no half alone."""
    config = transformers.Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 1}, head_dim=8, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=OUT, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    leaves = ["gate_proj", "up_proj", "down_proj"] if only is None else [only]
    content, name = {}, f"base_model.model.{PREFIX}"
    for leaf in leaves:
        out, inner = (16, OUT) if leaf == "down_proj" else (OUT, 16)
        for e in range(3):
            content[f"{name}.{e}.{leaf}.lora_A.weight"] = torch.randn(2, inner)
            content[f"{name}.{e}.{leaf}.lora_B.weight"] = torch.randn(out, 2)
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    content[f"{q_proj}.lora_A.weight"] = torch.randn(2, 16)
    content[f"{q_proj}.lora_B.weight"] = torch.randn(16, 2)
    save_file(content, tmp_path / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *leaves]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora))
    effect = fit_adapter(opened(tmp_path), stored(before, tmp_path / "base"))
    if only == "up_proj":
        with pytest.raises(ValueError, match="Cannot convert"):
            PeftModel.from_pretrained(model, tmp_path)
        found = values(effect.deltas[f"{PREFIX}.gate_up_proj"])
        assert not found[:, :OUT].any() and found[:, OUT:].all()
        return
    after = PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    for key, weight in after.items():  # values up to 10 here
        delta = values(effect.deltas[key]) if key in effect.deltas else 0
        np.testing.assert_allclose(before[key].numpy() + delta, weight, rtol=1e-6, atol=2e-6)
    assert len(effect.deltas) == (3 if only is None else 2)
    # as it was trained: PEFT's conversion makes gate and up sqrt(2) too large with rsLoRA
    scaled = fit_adapter(opened(tmp_path, use_rslora=True), stored(before, tmp_path / "base"))
    for key, delta in effect.deltas.items():
        np.testing.assert_allclose(
            values(scaled.deltas[key]), values(delta) * np.sqrt(2), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("leaves", "fused", "rows", "said"),
    [
        ("in_proj_q in_proj_k in_proj_v", "in_proj_qkv", 12, None),
        ("in_proj_q in_proj_k in_proj_v", "in_proj_qkv", 13, r"in_proj_q \[3, 8\], in_proj_k"),
        ("in_proj_q in_proj_v", "in_proj_qkv", 12, "without in_proj_k nothing tells the rows of"),
        ("gate_proj x_proj", "in_proj", 9, None),
        ("gate_proj x_proj", "in_proj", 6, r"in_proj\.weight \[6, 8\]: gate_proj \[3, 8\]"),
        ("gate_proj x_proj", "other", 9, "gate_proj.weight: only in the adapter"),
    ],
)
def test_projections_that_are_rows_of_one(
    leaves: str, fused: str, rows: int, said: str | None, tmp_path: Path
) -> None:
    """As Tinker trains those of Qwen3.5's linear attention and of Nemotron's Mamba layers."""
    torch.manual_seed(0)
    content, at = {}, []
    for out, leaf in enumerate(leaves.split(), 3):
        content[f"base_model.model.l.{leaf}.lora_A.weight"] = torch.randn(2, 8)
        content[f"base_model.model.l.{leaf}.lora_B.weight"] = torch.randn(out, 2)
        at.append(2 * content[f"base_model.model.l.{leaf}.lora_B.weight"]
                  @ content[f"base_model.model.l.{leaf}.lora_A.weight"])  # fmt: skip
    save_file(content, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    base = stored({f"l.{fused}.weight": torch.zeros(rows, 8)}, tmp_path / "base")
    if said:
        with pytest.raises(IncompatibleError, match=said):
            fit_adapter(opened(tmp_path), base)
        return
    effect = fit_adapter(opened(tmp_path), base)
    found = values(effect.deltas[f"l.{fused}.weight"])
    expected = torch.cat([*at, torch.zeros(rows - sum(map(len, at)), 8)])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(IncompatibleError, match="factors of rank 2, config 3"):
        fit_adapter(opened(tmp_path, r=3), base)


def test_which_way_square_experts_lie_is_asked_of_their_class(tmp_path: Path) -> None:
    """Where in and out are as long, files alone leave two ways; the class says which PEFT takes."""

    def turned() -> transformers.PreTrainedModel:
        sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 16}
        moe = {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **moe))

    for model in (turned, mixtral_square):
        lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
        torch.manual_seed(0)
        base, (folder, before, after) = model(), trained(tmp_path / model.__name__, model, **lora)
        base.load_state_dict(before)
        base.save_pretrained(tmp_path / "base")
        assert before["model.layers.0.mlp.experts.down_proj"].shape == (3, 16, 16)
        sv.apply(tmp_path / "base", folder, tmp_path / "out", force=True)
        found = type(base).from_pretrained(tmp_path / "out").state_dict()
        for name, tensor in after.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-7, msg=name)
        with pytest.raises(IncompatibleError, match="2 ways to fit its factors"):
            fit_adapter(opened(folder), stored(before, tmp_path / "base.safetensors"))


def mixtral_square() -> transformers.PreTrainedModel:
    sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


# ---------------------------------------------------------------------------------- arithmetic


def in_order(left: np.ndarray, right: np.ndarray, scaling: float) -> np.ndarray:
    """The definition: fp64 sums in the order of the ranks, one rounding."""
    total = np.zeros((left.shape[0], right.shape[1]))
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[k]
    return (total * scaling).astype(np.float32) + np.float32(0)


def halves(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(float)


@pytest.mark.parametrize("rank", [1, 7, 64])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "cancelling", "small whole numbers", "zero"])
def test_products_are_the_ordered_sum(kind: str, rank: int) -> None:
    draw = np.random.default_rng(rank)
    left, right = draw.standard_normal((40, rank)), draw.standard_normal((rank, 500))
    left, right = (x.astype(np.float32).astype(float) for x in (left, right))
    if kind == "bf16":
        left, right = halves(left), halves(right)
    elif kind == "cancelling":  # sums of 0 up to rounding, and exact ones
        left, right = np.hstack([left, -left]), np.vstack([right, right])
        left[:20, 0] += 1e-12
    elif kind == "small whole numbers":  # exact ties in fp32
        left, right = np.rint(4096 * left) + 0.5, np.rint(4096 * right)
    elif kind == "zero":
        left[:] = 0
    found = product(left, right, -2 / 3)
    np.testing.assert_array_equal(
        found.view(np.uint32), in_order(left, right, -2 / 3).view(np.uint32)
    )


def low_rank(folder: Path, m: int, n: int, rank: int, dtype: torch.dtype) -> LowRank:
    torch.manual_seed(m)
    prefix = "base_model.model.x"
    save_file({f"{prefix}.lora_A.weight": torch.randn(rank, n).to(dtype),
               f"{prefix}.lora_B.weight": torch.randn(m, rank).to(dtype)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    base = stored({"x.weight": torch.zeros(m, n)}, folder / "base")
    return fit_adapter(opened(folder), base).deltas["x.weight"]


@pytest.mark.parametrize("turned", [False, True])
def test_any_block_and_thread_gives_the_same_bytes(
    turned: bool, tmp_path: Path, monkeypatch
) -> None:
    delta = low_rank(tmp_path, 70, 90, 12, torch.bfloat16)
    if turned:
        flat = delta.right.transpose(1, 2), delta.left.transpose(1, 2)
        delta = LowRank("x.weight", (90, 70), *flat, delta.scaling)
    delta = pickle.loads(pickle.dumps(delta))
    content = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (content[f"base_model.model.x.lora_{side}.weight"].double().numpy() for side in "AB")
    expected = in_order(b, a, 8 / 12)
    expected = (expected.T if turned else expected).reshape(-1)
    monkeypatch.setattr("skillvec.checkpoints.lora_deltas.TILE", 400)  # many tiles
    draw = np.random.default_rng(0)
    cuts = np.sort(draw.choice(delta.numel, 60, replace=False))
    spans = [(0, 0), (5, 6), (89, 91), (0, delta.numel), *pairwise(cuts)]
    with ThreadPoolExecutor(4) as pool:
        for (begin, end), found in zip(
            spans, pool.map(lambda span: values_of(delta, span[0], span[1] - span[0]), spans),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(found.view("u4"), expected[begin:end].view("u4"))


def test_blocks_begin_and_end_within_experts(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 5), torch.randn(7, 6)
    keys = [f"base_model.model.x.lora_{side}.weight" for side in "AB"]
    save_file(dict(zip(keys, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["x.p"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = stored({"x.p": torch.zeros(3, 7, 5)}, tmp_path / "base")
    delta = fit_adapter(opened(tmp_path), base).deltas["x.p"]
    expected = torch.einsum("ore,eri->eoi", b.reshape(7, 2, 3), a.reshape(3, 2, 5)) * 4
    whole = values(delta)
    np.testing.assert_allclose(whole, expected.numpy(), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr("skillvec.checkpoints.lora_deltas.TILE", 11)
    for begin in range(0, 105, 4):
        for end in range(begin, 106, 9):
            found = values_of(delta, begin, end - begin)
            np.testing.assert_array_equal(found, whole.reshape(-1)[begin:end])


Cut = Callable[[View], View]
BOXES: dict[str, tuple[Cut, bool]] = {  # of 3 x 6 x 10: a cut, and whether it is a product
    "all": (lambda view: view, True),
    "one expert": (lambda view: view.slice(0, 2, 3).squeeze(), True),
    "one expert of many": (lambda view: view.slice(0, 1, 2), True),
    "two of the experts": (lambda view: view.slice(0, 1, 3), True),
    "every other expert, turned": (lambda view: view.slice(0, 0, 3, 2).transpose(1, 2), True),
    "rows of one": (lambda view: view.slice(0, 1, 2).squeeze().slice(0, 3, 6), True),
    "columns": (lambda view: view.slice(2, 4, 9), True),
    "every other column": (lambda view: view.slice(2, 1, 10, 2), True),
    "every other row from an odd one, turned": (
        lambda view: view.slice(0, 1, 2).squeeze().slice(0, 1, 6, 2).transpose(0, 1), True
    ),
    "a row": (lambda view: view.slice(0, 2, 3).squeeze().slice(0, 5, 6), True),
    "a column, turned": (
        lambda view: view.slice(0, 2, 3).squeeze().slice(1, 9, 10).transpose(0, 1), True
    ),
    "one value": (lambda view: view.slice(0, 1, 2).slice(1, 2, 3).slice(2, 7, 8), True),
    "a row of every expert": (lambda view: view.slice(1, 2, 3), True),
    "rows first": (lambda view: view.transpose(0, 1), False),
    "columns first": (lambda view: view.transpose(0, 2), False),
    "a row as one dimension": (
        lambda view: view.slice(0, 1, 2).squeeze().slice(0, 1, 2).squeeze(), False
    ),
    "other shape": (lambda view: whole(view.sources[0], (3, 10, 6)), False),
    "past the end of a row": (lambda view: whole(view.sources[0], (2, 3, 8)), False),
    "the same row again": (
        lambda view: View((2, 10), (Box((0, 0), (2, 10), view.sources[0], 10, (0, 1)),)), False
    ),
}  # fmt: skip


def test_boxes_of_a_product_are_products(tmp_path: Path) -> None:
    """Any range of experts, rows and columns, turned or not, gives the values of the box itself."""
    torch.manual_seed(0)
    keys = [f"base_model.model.x.lora_{side}.weight" for side in "AB"]
    pair = torch.randn(6, 10), torch.randn(6, 6)
    save_file(dict(zip(keys, pair, strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["x.p"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = stored({"x.p": torch.zeros(3, 6, 10)}, tmp_path / "base")
    delta = fit_adapter(opened(tmp_path), base).deltas["x.p"]
    (tmp_path / "one").mkdir()
    one = low_rank(tmp_path / "one", 6, 10, 3, torch.bfloat16)
    for kind, (cut, product_of_its_own) in BOXES.items():
        view = cut(whole(delta, delta.shape))
        part = delta.part("y", view.shape, view.boxes[0])
        assert (part is not None) == product_of_its_own, kind
        if part is not None:
            assert (part.name, part.shape) == ("y", view.shape)
            expected = values(Viewed("y", "F32", view))
            np.testing.assert_array_equal(values(part), expected, kind)
    for two in (lambda view: view.transpose(0, 1).slice(0, 2, 9), lambda view: view.unsqueeze()):
        view = two(whole(one, one.shape))
        part = one.part("y", view.shape, view.boxes[0])
        assert part is not None and part.path.endswith("adapter_model.safetensors")
        again = part.part("z", view.shape, whole(part, part.shape).boxes[0])
        expected = values(Viewed("y", "F32", view))
        np.testing.assert_array_equal(values(part), expected)
        assert again is not None
        np.testing.assert_array_equal(values(again), expected)


def pieces(folder: Path) -> tuple[LowRank, LowRank]:
    """Two products of 3 experts, 4 x 6, of 3-D factors: in one of them A is shared."""
    torch.manual_seed(0)
    shapes = {"a": (3, 2, 6), "b": (3, 4, 2), "c": (1, 5, 6), "d": (3, 4, 5)}
    held = stored({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "factors")
    one = Pair(held["a"], held["b"], False).stacked("one", 0.5)
    return one, Pair(held["c"], held["d"], False).stacked("other", -2.0)


def test_factors_of_all_experts_may_share_a_side(tmp_path: Path) -> None:
    one, other = pieces(tmp_path)
    held = {name: t.double().numpy() for name, t in load_file(tmp_path / "factors").items()}
    for delta, b, a, scaling in ((one, "b", "a", 0.5), (other, "d", "c", -2.0)):
        expected = np.matmul(held[b], held[a]) * scaling
        np.testing.assert_allclose(values(delta), expected, rtol=1e-6, atol=1e-6)


def test_products_side_by_side_and_in_turns(tmp_path: Path) -> None:
    one, other = pieces(tmp_path)
    boxes = [Box((0, 4 * i, 0), (3, 4, 6), p, 0, (24, 6, 1)) for i, p in enumerate((one, other))]
    joined = Joined("x", View((3, 9, 6), tuple(boxes)))  # a row that none covers
    expected = np.concatenate([values(one), values(other), np.zeros((3, 1, 6))], 1)
    np.testing.assert_array_equal(values(joined), expected)
    view = whole(joined, joined.shape)
    for kind, cut, alone in (
        ("one", view.slice(1, 0, 4), True),
        ("other of one expert", view.slice(0, 2, 3).squeeze().slice(0, 4, 8), True),
        ("turned", view.slice(0, 1, 3).slice(1, 5, 8).transpose(1, 2), True),
        ("of both", view.slice(0, 1, 2).squeeze().slice(0, 3, 5), False),
        ("what is 0", view.slice(0, 1, 2).squeeze().slice(0, 8, 9), False),
    ):
        part = joined.part("y", cut.shape, cut.boxes[0])
        assert (part is not None) == alone, kind
        if part is not None:
            np.testing.assert_array_equal(values(part), values(Viewed("y", "F32", cut)), kind)
    turned = [
        p.part("t", (3, 6, 4), Box((0,) * 3, (3, 6, 4), p, 0, (24, 1, 6))) for p in (one, other)
    ]
    for first, second in (turned, (turned[0], None), (None, turned[1])):
        woven = Woven("x", (3, 6, 8), (first, second))
        expected = np.zeros((3, 6, 8))
        for which, piece in enumerate((first, second)):
            expected[:, :, which::2] = 0 if piece is None else values(piece)
        for begin in range(0, 144, 5):
            for end in range(begin, 145, 7):
                found = values_of(woven, begin, end - begin)
                np.testing.assert_array_equal(found, expected.reshape(-1)[begin:end])
        assert woven.parts and woven.part("y", (1,), Box((0,), (1,), woven, 0, (1,))) is None


def test_memory_is_bounded_by_tiles(tmp_path: Path) -> None:
    import tracemalloc

    delta = low_rank(tmp_path, 600, 3000, 500, torch.float32)
    out = np.empty(1 << 20, np.float32)
    tracemalloc.start()
    delta.read(1000, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * TILE


def test_the_sum_of_several_deltas_takes_one_block_more(tmp_path: Path) -> None:
    import tracemalloc

    delta = low_rank(tmp_path, 600, 3000, 50, torch.float32)
    both = Summed("x.weight", (delta, replace(delta, scaling=-0.5)))
    out = np.empty(1 << 20, np.float32)
    tracemalloc.start()
    both.read(1000, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * TILE + out.nbytes
    parts = [values_of(part, 1000, out.size) for part in both.summands]
    np.testing.assert_array_equal(out, parts[0] + parts[1])
    huge = Summed("x.weight", (replace(delta, scaling=3e37),) * 3)
    assert not np.isfinite(values_of(huge, 0, 1000)).all()  # counted and refused by who reads it


def test_dora_that_fp32_holds_exactly_is_that_of_peft_to_the_bit(tmp_path: Path) -> None:
    """Rows of lengths 5 and 10 times powers of two, magnitudes likewise: nothing is rounded."""
    aim = torch.tensor([[3.0, 4, 0], [0, -6, 8], [4, 0, -3], [0, 0, 5]])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    tuned = get_peft_model(
        model, LoraConfig(r=1, lora_alpha=2, target_modules=["0"], use_dora=True)
    )
    with torch.no_grad():
        layer = tuned.base_model.model[0]
        layer.lora_A["default"].weight[:] = torch.tensor([[1.0, -2, 0.5]])
        layer.lora_B["default"].weight[:] = torch.tensor([[1.0], [2], [-1], [0]])
        factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        layer.base_layer.weight[:] = aim - 2 * factors
        layer.lora_magnitude_vector["default"].weight[:] = torch.tensor([10.0, 5, 1.25, -5])
    before = {"0.weight": layer.base_layer.weight.detach().clone()}
    tuned.save_pretrained(tmp_path / "ad")
    expected = tuned.merge_and_unload()[0].weight.detach()
    assert torch.equal(expected, aim * torch.tensor([[2.0], [0.5], [0.25], [-1]]))
    delta = fit_adapter(opened(tmp_path / "ad"), stored(before, tmp_path / "base")).deltas[
        "0.weight"
    ]
    assert torch.equal(before["0.weight"] + torch.from_numpy(values(delta)), expected)


@pytest.mark.parametrize("kind", ["linear", "turned"])
def test_dora_on_a_base_of_16_bits_is_one_rounding_from_peft(kind: str, tmp_path: Path) -> None:
    """PEFT divides and multiplies in fp32 and rounds once; few values lie near a boundary."""
    model = llama if kind == "linear" else gpt2
    modules = ["q_proj", "embed_tokens"] if kind == "linear" else ["c_attn", "wte"]
    lora = {"r": 4, "use_dora": True, "target_modules": modules}
    folder, before, _ = trained(tmp_path / "lora", model, **lora)
    before = {name: tensor.bfloat16() for name, tensor in before.items()}
    content = load_file(folder / "adapter_model.safetensors")
    rounded = {k: t.bfloat16() if "base_layer" in k else t for k, t in content.items()}
    save_file(rounded, folder / "adapter_model.safetensors")
    base = model().bfloat16()
    base.load_state_dict(before)
    after = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    effect = fit_adapter(opened(folder), stored(before, tmp_path / "base.safetensors"))
    assert len(effect.deltas) == (3 if kind == "linear" else 2)
    for name, delta in effect.deltas.items():
        assert after[name].dtype == torch.bfloat16
        found = (before[name].float() + torch.from_numpy(values(delta))).bfloat16()
        steps = (found.view(torch.int16) - after[name].view(torch.int16)).abs()
        assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01


@pytest.mark.parametrize("dim", [0, 1])
def test_any_block_of_dora_gives_the_same_bytes(dim: int, tmp_path: Path, monkeypatch) -> None:
    delta = low_rank(tmp_path, 70, 90, 12, torch.bfloat16)
    weights = {"w": torch.randn(70, 90).half(), "m": torch.randn((70, 90)[dim]).bfloat16()}
    held = stored(weights, tmp_path / "weights")
    dora = Dora("x.weight", held["w"], delta, held["m"], dim)
    whole = values(dora)
    summed = weights["w"].double() + torch.from_numpy(values(delta)).double()
    lengths = summed.norm(dim=1 - dim)
    factor = (weights["m"].double() / lengths).unsqueeze(1 - dim)
    expected = factor * summed - weights["w"].double()
    np.testing.assert_allclose(whole, expected.numpy(), rtol=1e-6, atol=1e-7)
    for tile in (40, 400, 4000):  # less than a row, a few rows, many
        monkeypatch.setattr("skillvec.checkpoints.lora_deltas.TILE", tile)
        read = partial(values_of, pickle.loads(pickle.dumps(replace(dora))))
        draw = np.random.default_rng(0)
        cuts = np.sort(draw.choice(dora.numel, 40, replace=False))
        spans = [(0, 0), (5, 6), (89, 91), (0, dora.numel), *pairwise(cuts)]
        with ThreadPoolExecutor(4) as pool:
            for (begin, end), found in zip(
                spans, pool.map(lambda span, read=read: read(span[0], span[1] - span[0]), spans),
                strict=True,
            ):  # fmt: skip
                np.testing.assert_array_equal(found, whole.reshape(-1)[begin:end])


def test_memory_of_dora_is_bounded_by_tiles(tmp_path: Path) -> None:
    import tracemalloc

    delta = low_rank(tmp_path, 1200, 3000, 50, torch.float32)
    held = stored({"w": torch.randn(1200, 3000), "m": torch.ones(3000)}, tmp_path / "weights")
    dora = Dora("x.weight", held["w"], delta, held["m"], 1)
    out = np.empty(1 << 20, np.float32)
    tracemalloc.start()
    dora.read(1000, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * TILE + 8 * 4 * TILE


def test_rows_are_put_wherever_a_block_begins(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"w": torch.randn(9, 7).bfloat16(), "rows": torch.randn(3, 7)}
    held = stored(weights, tmp_path / "weights")
    places = tuple((number, (held["rows"], at)) for number, at in ((1, 2), (4, 0), (8, 1)))
    put = pickle.loads(pickle.dumps(RowsPut("w", held["w"], places)))
    expected = weights["w"].index_copy(0, torch.tensor([4, 8, 1]), weights["rows"].bfloat16())
    bits = expected.view(torch.int16).reshape(-1).numpy().view(np.uint16)
    for begin in range(63):
        for end in range(begin, 64, 5):
            np.testing.assert_array_equal(values_of(put, begin, end - begin), bits[begin:end])


@pytest.mark.parametrize(
    "config", [{"modules_to_save": "lm_head"}, {"modules_to_save": [1]}, {"ensure_weight_tying": 1}]
)
def test_what_decides_over_ties_is_checked(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{next(iter(config))}: expected"):
        made(tmp_path, FACTORS, **config)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """A row of products that are NaN for that of A: read as they are, refused where they are used.

    With leave they count as no change.
    """
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    delta = low_rank(adapter, 4, 5, 2, torch.float32)
    content = load_file(adapter / "adapter_model.safetensors")
    a, b = (content[f"base_model.model.x.lora_{side}.weight"].double().numpy() for side in "AB")
    finite = in_order(b, a, 8 / 2).reshape(-1)
    content["base_model.model.x.lora_A.weight"][1, 2] = float("nan")
    save_file(content, adapter / "adapter_model.safetensors")
    wrong = np.arange(20) % 5 == 2
    np.testing.assert_array_equal(values_of(delta, 0, 20), np.where(wrong, np.nan, finite))
    base = tmp_path / "b.safetensors"
    stored({"x.weight": torch.zeros(4, 5)}, base)
    places = adapter, base, tmp_path / "v.safetensors"
    with pytest.raises(NonfiniteError, match=r"x\.weight: 4 of 20 values"):
        sv.diff(*places)
    vector = sv.diff(*places, allow_nonfinite=True)
    assert vector.manifest["tensors"]["x.weight"]["nonfinite"] == 4
    sv.apply(base, vector, tmp_path / "out.safetensors", allow_nonfinite=True)
    merged = load_file(tmp_path / "out.safetensors")["x.weight"].numpy().reshape(-1)
    np.testing.assert_array_equal(merged, np.where(wrong, 0, finite))


# ------------------------------------------------------------------------------------- refused

FACTORS = {"lora_A.weight": (2, 6), "lora_B.weight": (8, 2)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def made(folder: Path, tensors: Mapping[str, tuple[int, ...]], **config: Any) -> Adapter:
    folder.mkdir(exist_ok=True)
    content = {
        key if "base_model" in key else f"base_model.model.x.{key}": torch.ones(shape)
        for key, shape in tensors.items()
    }
    save_file(content, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return opened(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": None}, "peft_type None"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_dora": True, "target_parameters": ["x.p"]}, "use_dora with target_parameters"),
        ({"lora_bias": True, "target_parameters": ["x.p"]}, "lora_bias with target_parameters"),
        ({"lora_bias": True, "use_dora": True}, "use_dora with lora_bias, which PEFT"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"init_lora_weights": "loftq"}, "the base that it was made with"),
        ({"init_lora_weights": "novel"}, "novel: not known"),
        ({"use_novel": 1}, r"perhaps it changes what is added.*\n.*use_novel: 1"),
        (
            {"novel": True, "peft_version": "9.1"},
            r"written by PEFT 9\.1: not known here.*\n.*novel",
        ),
        ({"novel_config": {"x": 1}}, r"\n.*novel_config: "),
        ({"enable_lora": [True, False]}, r"\n.*enable_lora: \[True"),
    ],
)
def test_other_kinds_are_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=said):
        made(tmp_path, FACTORS, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0}, {"r": True}, {"r": "8"}, {"lora_alpha": float("nan")},
        {"lora_alpha": None}, {"lora_alpha": 1e31}, {"rank_pattern": [1]}, {"use_rslora": "yes"},
        {"rank_pattern": {"x": 0}}, {"alpha_pattern": {"x": float("inf")}},
        {"alpha_pattern": {"(": 1}}, {"alpha_pattern": {"(a)+b": 1}}, {"fan_in_fan_out": 1},
        {"target_parameters": "x"}, {"use_dora": 1}, {"lora_bias": "all"},
        {"trainable_token_indices": 3}, {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"x": [1, 1]}}, {"trainable_token_indices": [True]},
        {"trainable_token_indices": [1]},
        {"base_model_name_or_path": 7}, {"revision": ["main"]}, {"bias": "some"},
    ],
)  # fmt: skip
def test_broken_configs(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"adapter .*{next(iter(config))}|{next(iter(config))}"):
        made(tmp_path, FACTORS, **config)


@pytest.mark.parametrize(
    ("limit", "most", "config", "said"),
    [
        ("MOST_RANK", 1, {}, "r: expected a rank from 1 to 1, found 2"),
        ("MOST_ALPHA", 4.0, {}, "lora_alpha: expected a number below 4, found 4"),
        ("MOST_SIGNS", 3, {"rank_pattern": {"a.*b": 2}}, "rank_pattern: expected a short pattern"),
        ("MOST_REPEATS", 1, {"alpha_pattern": {"a*b+": 2}}, "pattern of at most 1 repeats"),
        (
            "MOST_STEPS",
            3,
            {"rank_pattern": {"ab?": 2}},
            "too many wildcards for 1 names of up to 1",
        ),
    ],
)
def test_limits_of_a_config(
    limit: str, most: float, config: dict[str, Any], said: str, tmp_path: Path, monkeypatch
) -> None:
    made(tmp_path, FACTORS, **config)
    monkeypatch.setattr(lora_settings, limit, most)
    with pytest.raises(FormatError, match=said):
        made(tmp_path, FACTORS, **config)


def test_a_pattern_of_groups_in_each_other_too_deep_is_refused(tmp_path: Path) -> None:
    one, other = ("(" * 190 + name + ")" * 190 for name in "xy")  # what was compiled is kept
    made(tmp_path, FACTORS, rank_pattern={one: 2})
    with lowered(), pytest.raises(FormatError, match="rank_pattern: expected a short pattern"):
        made(tmp_path, FACTORS, rank_pattern={other: 2})


def test_limits_are_above_what_adapters_have() -> None:
    assert (lora_settings.MOST_RANK, lora_settings.MOST_ALPHA, lora_fit.MOST_NESTED) == (
        1 << 20,
        1e30,
        4,
    )
    assert (lora_settings.MOST_SIGNS, lora_settings.MOST_REPEATS, lora_settings.MOST_STEPS) == (
        400,
        4,
        10**10,
    )


def test_the_ways_to_try_a_pattern_are_bounded_from_above() -> None:
    """A bound that grows with the name, the repeats and the forks."""
    assert lora_settings._steps("ab", 10) == 11
    assert lora_settings._steps("a*b", 10) == 55 and lora_settings._steps("a*b+", 10) == 165
    assert lora_settings._steps("a?b|c", 10) == 44


def test_more_wrappers_in_each_other_than_are_tried(tmp_path: Path, monkeypatch) -> None:
    model, lora, deltas, _ = KINDS["experts"]
    folder, before, _ = trained(tmp_path / "lora", model, **lora)
    base = stored(before, tmp_path / "base.safetensors")
    assert len(fit_adapter(opened(folder), base).deltas) == deltas
    monkeypatch.setattr(lora_fit, "MOST_NESTED", 1)
    with pytest.raises(IncompatibleError, match="experts: 0 ways to fit"):
        fit_adapter(opened(folder), base)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_A.weight": (2, 6)}, "x: lora_A without the other"),
        ({"lora_A.weight": (2, 6), "lora_embedding_B": (8, 2)}, "without the other"),
        ({"lora_A.weight": (3, 6), "lora_B.weight": (8, 2)}, r"A \[3, 6\], B \[8, 2\]"),
        (FACTORS | {"lora_A.other.weight": (2, 6)}, "second tensor for the same"),
        ({"lora_A.one.weight": (2, 6), "lora_B.one.weight": (8, 2),
          "base_model.model.y.lora_A.other.weight": (2, 6),
          "base_model.model.y.lora_B.other.weight": (8, 2)}, r"two adapters in one \(one, other\)"),
        ({"lora_A.one.weight": (2, 6), "lora_B.one.weight": (8, 2),
          "base_model.model.y.lora_embedding_A.other": (2, 6)}, r"in one \(one, other\)"),
        (FACTORS | {"modules_to_save.bias": (8,), "original_module.weight": (8, 6)}, "known here"),
        (FACTORS | {"lora_magnitude_vector": (8,)}, "use_dora is false, but lora_magnitude_vector"),
        (FACTORS | {"lora_B.bias": (8,)}, r"lora_bias is false, but lora_B\.bias"),
        (FACTORS | {"lora_magnitude_vector": (8, 1)}, "no list"),
        (FACTORS | {"lora_A.bias": (2,)}, "known here"),
        (FACTORS | {"token_adapter.trainable_tokens_delta": (1, 6)}, "x.weight: 0 lists of"),
        (FACTORS | {"base_layer.base_layer.lora_A.weight": (2, 6),
                    "base_layer.base_layer.lora_B.weight": (8, 2)}, "inside others"),
        ({"lora_A.weight": (2, 6, 3, 3), "lora_B.weight": (8, 2, 1, 1)}, "a convolution"),
        ({"lora_A.weight": (6,), "lora_B.weight": (8, 2)}, "no matrix"),
        ({"lora_A.weight": (0, 6), "lora_B.weight": (8, 0)}, "no matrix"),
        ({"base_model.x.lora_A.weight": (2, 6)}, "begins with base_model.model"),
        ({"base_model.model.x.weight": (2, 6)}, "no factors"),
    ],
)  # fmt: skip
def test_broken_tensors(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    with pytest.raises((FormatError, IncompatibleError), match=said):
        made(tmp_path, tensors)


@pytest.mark.parametrize(
    ("base", "config", "said"),
    [
        ({"y.weight": (8, 6)}, {}, "x.weight: only in the adapter"),
        ({"x.weight": (8, 7)}, {}, r"adapter \[8, 6\], base \[8, 7\]"),
        ({"x.weight": (8, 6)}, {"r": 3}, "factors of rank 2, config 3"),
        ({"x.weight": (8, 6), "x.p": (2, 8, 6)}, {"r": 1, "target_parameters": ["y.p"]}, "rank 2"),
        ({"x.p": (2, 8, 7)}, {"r": 1, "target_parameters": ["x.p"]}, "0 ways"),
        ({"x.p": (1, 6, 8)}, {"target_parameters": ["x.p"]}, "0 ways"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_base(
    base: dict[str, tuple[int, ...]], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    weights = {name: torch.zeros(shape) for name, shape in base.items()}
    adapter = made(tmp_path, FACTORS, **config)
    with pytest.raises(IncompatibleError, match=said):
        fit_adapter(adapter, stored(weights, tmp_path / "base"))


def test_an_alpha_of_0_is_one_that_nobody_wrote_down(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"lora_alpha is 0.*\n.* x"):
        made(tmp_path, FACTORS, lora_alpha=0)
    adapter = made(tmp_path, FACTORS, lora_alpha=0, alpha_pattern={"x": 2})
    assert adapter.settings.of("x") == (2, 1.0)


@pytest.mark.parametrize(
    "wrapped",
    [
        "base_model.model._fsdp_wrapped_module.m.x.",
        "base_model.model.m._checkpoint_wrapped_module.x.",
        "_orig_mod.base_model.model.m.x.", "module._fsdp_wrapped_module.base_model.model.m.x.",
    ],
)  # fmt: skip
def test_names_of_wrappers_are_no_names_of_modules(wrapped: str, tmp_path: Path) -> None:
    tensors = {f"{wrapped}{key}": shape for key, shape in FACTORS.items()}
    assert list(made(tmp_path, tensors).pairs) == ["m.x"]
    twice = tensors | {f"base_model.model.m.x.{key}": (3, 6) for key in list(FACTORS)[:1]}
    with pytest.raises(FormatError, match=r"a second tensor for base_model\.model\.m\.x\.lora_A"):
        made(tmp_path, twice)


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {"use_dora": True}, "use_dora is true, no lora_magnitude_vector"),
        ({}, {"lora_bias": True}, r"lora_bias is true, no lora_B\.bias"),
        ({"lora_magnitude_vector": (6,)}, {"use_dora": True}, r"vector \[6\], expected \[8\]"),
        ({"lora_B.bias": (6,)}, {"lora_bias": True}, r"bias \[6\], expected \[8\]"),
        ({"token_adapter.trainable_tokens_delta": (2, 6)}, {"trainable_token_indices": [1]},
         "2 rows, 1 numbers"),
        ({"token_adapter.trainable_tokens_delta": (1, 6)},
         {"trainable_token_indices": {"x": [1], "model.x": [2]}}, None),
        ({"base_model.model.model.x.token_adapter.trainable_tokens_delta": (1, 6)},
         {"trainable_token_indices": {"x": [1], "model.x": [2]}}, "2 lists of"),
    ],
)  # fmt: skip
def test_what_lies_beside_factors_is_what_the_config_says(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    if said is None:
        assert made(tmp_path, FACTORS | tensors, **config).rows["x.weight"][1] == [1]
        return
    with pytest.raises(FormatError, match=said):
        made(tmp_path, FACTORS | tensors, **config)


@pytest.mark.parametrize(
    ("base", "numbers", "said"),
    [
        ({"y.weight": (4, 5)}, [3], None),
        ({"y.weight": (3, 5)}, [3], "row 3 is trained, and the base has 3"),
        ({"y.weight": (4, 6)}, [3], r"adapter \[1, 5\], base \[4, 6\]"),
        ({"z.weight": (4, 5)}, [3], r"y\.weight: only in the adapter"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_the_base(
    base: dict[str, tuple[int, ...]], numbers: list[int], said: str | None, tmp_path: Path
) -> None:
    rows = {"base_model.model.y.token_adapter.trainable_tokens_delta": (1, 5)}
    weights = {name: torch.zeros(shape) for name, shape in (base | {"x.weight": (8, 6)}).items()}
    adapter = made(tmp_path, FACTORS | rows, trainable_token_indices=numbers)
    if said is None:
        whole = fit_adapter(adapter, stored(weights, tmp_path / "base")).whole["y.weight"]
        assert values(whole).tolist() == [[0.0] * 5] * 3 + [[1.0] * 5]
        return
    with pytest.raises(IncompatibleError, match=said):
        fit_adapter(adapter, stored(weights, tmp_path / "base"))


def test_rows_and_another_change_of_one_weight_are_refused(tmp_path: Path) -> None:
    rows = {"token_adapter.trainable_tokens_delta": (1, 6)}
    base = stored({"x.weight": torch.zeros(8, 6)}, tmp_path / "base")
    adapter = made(tmp_path, FACTORS | rows, trainable_token_indices=[1])
    with pytest.raises(
        IncompatibleError, match=r"x\.weight: rows of it are trained, and all of it"
    ):
        fit_adapter(adapter, base)


def test_a_list_of_rows_is_of_one_weight(tmp_path: Path) -> None:
    """PEFT puts them into the input embeddings, and nothing tells which of two these are."""
    rows = {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta": (1, 5) for name in "yz"
    }
    weights = {
        "x.weight": torch.zeros(8, 6),
        "y.weight": torch.zeros(4, 5),
        "z.weight": torch.zeros(4, 5),
    }
    adapter = made(tmp_path, FACTORS | rows, trainable_token_indices=[2])
    base = stored(weights, tmp_path / "base")
    with pytest.raises(IncompatibleError, match=r"z\.weight: of which trained rows belong to one"):
        fit_adapter(adapter, base)
    effect = fit_adapter(
        adapter, base, {"z.weight": "y.weight"}
    )  # equal rows of what is one weight
    assert sorted(effect.whole) == ["y.weight", "z.weight"] and not effect.warnings


def test_a_bias_of_a_layer_without_one_is_refused_as_by_peft(tmp_path: Path) -> None:
    adapter = made(tmp_path, FACTORS | {"lora_B.bias": (8,)}, lora_bias=True)
    base = stored({"x.weight": torch.zeros(8, 6)}, tmp_path / "base")
    with pytest.raises(IncompatibleError, match=r"PEFT cannot merge it either.*\n.*x\.bias"):
        fit_adapter(adapter, base)


def test_what_only_shapes_can_tell_is_not_guessed(tmp_path: Path) -> None:
    square = {
        "base_model.model.y.lora_A.weight": (2, 6),
        "base_model.model.y.lora_B.weight": (6, 2),
    }
    weights = {"x.weight": torch.zeros(6, 8), "y.weight": torch.zeros(6, 6)}
    base = stored(weights, tmp_path / "base")
    adapter = made(tmp_path, FACTORS | square)
    with pytest.raises(IncompatibleError, match=r"y\.weight: square, and nothing tells whether"):
        fit_adapter(adapter, base, guess=False)
    assert set(fit_adapter(adapter, base).deltas) == {
        "x.weight",
        "y.weight",
    }  # as x, which lies turned
    mixed = stored(
        weights | {"z.weight": torch.zeros(3, 5), "z.bias": torch.zeros(3)}, tmp_path / "mixed"
    )
    with pytest.raises(IncompatibleError, match=r"y\.weight: square, and nothing tells whether"):
        fit_adapter(adapter, mixed)
    experts = stored({"y.p": torch.zeros(2, 6, 6)}, tmp_path / "experts")
    with pytest.raises(IncompatibleError, match="y: 2 ways to fit"):
        fit_adapter(made(tmp_path, square, r=1, target_parameters=["y.p"]), experts)


def test_layers_below_a_module_of_which_a_parameter_is_wrapped(tmp_path: Path) -> None:
    """As the adapter was trained; PEFT's merge of it leaves the layers below as they were."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}

    def mamba() -> transformers.PreTrainedModel:
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))

    lora = {"r": 2, "target_modules": ["x_proj"], "target_parameters": ["mixer.A_log"]}
    folder, before, after = trained(tmp_path / "lora", mamba, **lora)
    effect = fit_adapter(opened(folder), stored(before, tmp_path / "base.safetensors"))
    layer = "backbone.layers.0.mixer"
    assert set(effect.deltas) == {f"{layer}.x_proj.weight", f"{layer}.A_log"}
    whole = f"{layer}.A_log"
    np.testing.assert_allclose(
        before[whole].numpy() + values(effect.deltas[whole]), after[whole].numpy(), atol=3e-7
    )
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (next(t for n, t in factors.items() if f"x_proj.lora_{x}" in n) for x in "AB")
    np.testing.assert_allclose(
        values(effect.deltas[f"{layer}.x_proj.weight"]), 4 * (b @ a).numpy(), rtol=1e-5, atol=1e-6
    )


def test_without_a_base_the_config_tells(tmp_path: Path) -> None:
    for kind in ("patterns", "turned", "biases"):
        model, lora, _, _ = KINDS[kind]
        folder, before, _ = trained(tmp_path / kind, model, **lora)
        adapter = opened(folder)
        expected = fit_adapter(adapter, stored(before, tmp_path / f"{kind}.safetensors")).deltas
        assert adapter.deltas == expected
    for kind in ("embedding", "experts"):
        model, lora, _, _ = KINDS[kind]
        with pytest.raises(IncompatibleError, match="only the base tells"):
            _ = opened(trained(tmp_path / kind, model, **lora)[0]).deltas
    with pytest.raises(FormatError, match="x: 2 ranks, config 3"):
        _ = made(tmp_path / "other", FACTORS, r=3).deltas


def test_a_weight_saved_with_its_delta_must_be_the_base(tmp_path: Path) -> None:
    base = stored({"x.weight": torch.zeros(8, 6)}, tmp_path / "base")
    adapter = made(tmp_path, FACTORS | {"base_layer.weight": (8, 6)})
    with pytest.raises(IncompatibleError, match=r"x\.weight: a delta and a weight that is not"):
        fit_adapter(adapter, base)


def test_what_an_adapter_says_of_itself(tmp_path: Path) -> None:
    said = {"base_model_name_or_path": "org/name", "revision": "main", "novel": 3, "other": None}
    adapter = made(tmp_path, FACTORS | {"base_model.model.head.weight": (3, 4)}, **said)
    assert (adapter.base_ref, adapter.revision) == ("org/name", "main")
    assert adapter.notes == ["adapter_config.json: novel: not known, ignored"]
    assert list(adapter.whole) == ["head.weight"]
    base = {"x.weight": torch.zeros(8, 6), "head.weight": torch.zeros(3, 4)}
    assert made(tmp_path / "other", FACTORS, base_model_name_or_path="").base_ref is None
    effect = fit_adapter(adapter, stored(base, tmp_path / "base"))
    assert effect.deltas["x.weight"].path.endswith("adapter_model.safetensors")
    np.testing.assert_array_equal(values(effect.deltas["x.weight"]), np.full((8, 6), 4.0))
