"""Layouts: every view is filled and compared, bit for bit, with what transformers itself holds."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from math import prod

import numpy as np
import peft
import pytest
import transformers
from families import assert_same_bits, bits, load, save
from harm import DIGITS, lowered
from safetensors.torch import save_file
from zoo import ZOO, build

from skillvec.checkpoints import layouts, renaming, transformers_layouts
from skillvec.checkpoints.layouts import Bridge, bridge, viewed_specs
from skillvec.checkpoints.model_classes import classes_of
from skillvec.errors import IncompatibleError, UsageError
from skillvec.files import gather, views
from skillvec.files.header import read_header
from skillvec.files.tensors import Viewed, values_of
from skillvec.files.views import Box, View

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
    "patch_size": 4,
}  # fmt: skip


def model_of(kind: str):
    """Return a tiny random model of transformers; more than 10 experts, so that order shows."""
    import torch
    import transformers

    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 12, "num_experts": 11, "num_experts_per_tok": 2}
    text = SMALL | {"rope_parameters": ROPE}
    clip = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    deep = VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    arguments = {
        "Mixtral": SMALL | {"num_local_experts": 11},
        "Qwen3Moe": SMALL | experts,
        "Gte": SMALL,
        "HrmText": SMALL,
        "OlmoHybrid": SMALL | {"layer_types": ["linear_attention", "full_attention"]},
        "Llava": {"text_config": {"model_type": "llama"} | SMALL, "vision_config": clip},
        "Qwen2_5_VL": {"text_config": text, "vision_config": VISION},
        "Qwen3VLMoe": {"text_config": text | experts, "vision_config": deep},
    }[kind]
    heads = ("ForConditionalGeneration", "ForCausalLM", "Model")
    classes = (getattr(transformers, kind + head, None) for head in heads)
    return next(filter(None, classes))(getattr(transformers, f"{kind}Config")(**arguments))


def shapes(tensors: Mapping) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fill(view: View, tensors: Mapping, block: int | None = None) -> np.ndarray:
    """Return the values of a view over named tensors, as bit patterns, block by block."""
    patterns = {name: bits(tensors[name]) for name in {box.source for box in view.boxes}}
    dtype = next(iter(patterns.values())).dtype

    def read(name: str, begin: int, out: np.ndarray) -> None:
        out[:] = patterns[name][begin : begin + out.size]

    out = np.full(prod(view.shape), 77, dtype)
    for at in range(0, out.size, block or out.size or 1):
        view.fill(at, out[at : at + (block or out.size)], read)
    return out


def assert_made(found: Bridge, mine: Mapping, wanted: Mapping) -> None:
    """Fail unless every wanted tensor is made of mine, bit for bit, and all of mine is used."""
    assert set(found.views) == set(wanted)
    assert not found.unused and not found.hints and not found.skipped and not found.rows_differ
    for name, tensor in wanted.items():
        view = found.views[name]
        assert view.shape == tuple(tensor.shape), name
        for block in (None, 97):
            assert np.array_equal(fill(view, mine, block), bits(tensor)), name


def numbers(layout: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return tensors of a layout, each value another."""
    ends = np.cumsum([0, *map(prod, layout.values())])
    return {
        name: np.arange(begin, begin + prod(shape), dtype=np.float32).reshape(shape)
        for begin, (name, shape) in zip(ends, layout.items(), strict=False)
    }


# ------------------------------------------------------------------------------- real models


KINDS = [
    "Mixtral",
    "Qwen3Moe",
    "Gte",  # fused qkv and mlp
    "Llava",  # prefixes
    "Qwen2_5_VL",
    pytest.param("HrmText", marks=pytest.mark.slow),
    pytest.param("OlmoHybrid", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_models_in_memory_are_bridged_both_ways(kind: str, tmp_path):
    model = model_of(kind)
    memory = model.state_dict()
    model.save_pretrained(tmp_path)
    files = load(tmp_path)
    assert set(files) != set(memory)
    for mine, wanted in ((files, memory), (memory, files), (files, files), (memory, memory)):
        found = bridge(shapes(mine), shapes(wanted), configs=[model.config.to_dict()])
        assert_made(found, mine, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ZOO)
def test_shapes_rule_out_no_family_between_files_and_memory(family: str):
    kind = getattr(transformers, family)
    config = kind.config_class(**json.loads(json.dumps(ZOO[family])), architectures=[family])
    said = json.loads(config.to_json_string())
    made = next(classes_of(said, 10**3))
    assert made.name == family
    files, memory = made.saved(), made.shapes
    for mine, wanted in ((files, memory), (memory, files)):
        found = bridge(mine, wanted, configs=[said])
        assert found.views.keys() == wanted.keys() and not found.unused
        apart = [{n: s for n, s in one.items() if other.get(n) != s}
                 for one, other in ((mine, wanted), (wanted, mine))]  # fmt: skip
        assert not all(apart) or layouts._may_share_values(*apart)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_parameters_are_in_the_order_in_which_peft_wraps_them(family: str):
    model = build(family)
    shapes = next(classes_of(model.config.to_dict(), 10**3)).shapes
    names = [name for name in shapes if ".0.mlp.experts." in name and len(shapes[name]) == 3]
    module = names[0].rpartition(".")[0]
    targets = sorted(name.removeprefix("model.") for name in names)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=targets))
    outer, found = model.get_submodule(module), []
    while isinstance(outer, peft.tuners.lora.layer.ParamWrapper):
        found.append(f"{module}.{outer.parameter_name}")
        outer = outer.base_layer
    assert found == names[::-1] and len(names) == 2 and names != sorted(names)


def test_a_bridged_checkpoint_is_read_through_its_files(tmp_path):
    model = model_of("Qwen3Moe").bfloat16()
    memory = model.state_dict()
    model.save_pretrained(tmp_path)
    specs = read_header(tmp_path / "model.safetensors").tensors
    layout = {name: spec.shape for name, spec in specs.items()}
    found = bridge(layout, shapes(memory), configs=[{"model_type": "qwen3_moe"}])
    made = viewed_specs(found, specs)
    for name, tensor in memory.items():
        source = made[name]
        assert (source.name, source.dtype, source.shape) == (name, "BF16", tuple(tensor.shape))
        assert np.array_equal(values_of(source, 0, tensor.numel()), bits(tensor)), name
    joined = made["model.layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(joined, Viewed) and pickle.loads(pickle.dumps(joined)) == joined
    assert made["lm_head.weight"] is specs["lm_head.weight"]
    note = found.notes["model.layers.1.mlp.experts.gate_up_proj"]
    assert note == (
        "22 tensors, model.layers.1.mlp.experts.0.gate_proj.weight to"
        " model.layers.1.mlp.experts.10.up_proj.weight, joined by transformers' mapping of"
        " qwen3_moe"
    )


def test_experts_stored_transposed_are_turned_as_transformers_turns_them(tmp_path):
    model = model_of("Qwen3VLMoe")
    old = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    memory = type(model).from_pretrained(tmp_path).state_dict()
    assert_same_bits(memory, model.state_dict())
    config = model.config.to_dict()
    assert_made(bridge(shapes(old), shapes(memory), configs=[config]), old, memory)
    assert_made(bridge(shapes(memory), shapes(old), configs=[config]), memory, old)


def test_names_of_a_class_come_from_its_own_mapping():
    # a shape that both towers have: prefixes alone would leave a choice
    layers = [f"layers.{i}.mlp.weight" for i in range(2)]
    mine = dict.fromkeys([f"{p}.{x}" for p in ("model", "visual") for x in layers], (3, 3))
    wanted = dict.fromkeys(
        [f"model.{p}.{x}" for p in ("language_model", "visual") for x in layers], (3, 3)
    )
    mine |= {"visual.odd.weight": (1,), "model.odd.weight": (2,)}
    wanted |= {"model.visual.other.weight": (3,), "model.language_model.other.weight": (4,)}
    config = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    for names, other, back in ((mine, wanted, False), (wanted, mine, True)):
        found = bridge(names, other, configs=[config])
        assert len(found.views) == 4 and len(found.unused) == 2
        for x in layers:
            pair = f"model.{x}", f"model.language_model.{x}"
            assert found.views[pair[not back]].boxes[0].source == pair[back]
    assert not bridge(mine, wanted).views
    # of the base model: its names begin below "model."
    mine = dict.fromkeys(["model.text_model.model.layers.0.w", "model.vq.layers.0.w"], (3,))
    found = bridge(mine, {"model.text_model.layers.0.w": (3,)}, configs=[{"model_type": "emu3"}])
    assert set(found.unused) == {"model.vq.layers.0.w"} and len(found.views) == 1


# ------------------------------------------------------------------------------ hand-made ones


EXPERT = "model.layers.0.mlp.experts"


def per_expert(count: int = 3, prefix: str = EXPERT) -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    for i in range(count):
        layout[f"{prefix}.{i}.gate_proj.weight"] = layout[f"{prefix}.{i}.up_proj.weight"] = (2, 5)
        layout[f"{prefix}.{i}.down_proj.weight"] = (5, 2)
    return layout


def fused(count: int = 3, prefix: str = EXPERT) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.gate_up_proj": (count, 4, 5), f"{prefix}.down_proj": (count, 5, 2)}


QWEN = [{"model_type": "qwen3_moe"}]


def test_a_missing_expert_or_half_is_not_bridged():
    layout = per_expert()
    del layout[f"{EXPERT}.1.up_proj.weight"]
    found = bridge(layout, fused(), configs=QWEN)
    assert set(found.views) == {f"{EXPERT}.down_proj"}
    assert set(found.unused) == {n for n in layout if "down" not in n}
    assert any("numbered from 0" in hint for hint in found.hints)
    back = bridge(fused(), layout, configs=QWEN)
    assert set(back.views) == {n for n in layout if "down" in n}
    assert back.unused == {f"{EXPERT}.gate_up_proj": ""}
    # one expert less, but two in all: as many as are wanted
    layout = {n.replace(".2.", ".3."): s for n, s in per_expert().items()}
    assert not bridge(layout, fused(), configs=QWEN).views
    assert not bridge(per_expert(2), fused(3), configs=QWEN).views


def test_a_part_that_goes_nowhere_is_told():
    mine = {"layers.0.attn.qkv.weight": (6, 4)}
    found = bridge(
        {"encoder.layer.0.attention.qkv_proj.weight": (6, 4)},
        {f"layers.0.self_attn.{p}_proj.weight": (2, 4) for p in "qk"},
        configs=[{"model_type": "gte"}],
    )
    assert set(found.views) == {f"layers.0.self_attn.{p}_proj.weight" for p in "qk"}
    assert found.unused == {"encoder.layer.0.attention.qkv_proj.weight": "16 of 24 values are used"}
    # a fused tensor of which the registry knows nothing
    found = bridge(
        mine,
        {f"layers.0.attn.{p}.weight": (2, 4) for p in "qkv"},
        configs=[{"model_type": "phi3"}],
    )
    assert not found.views and found.unused == {"layers.0.attn.qkv.weight": ""}
    assert any("no mapping for phi3" in hint for hint in found.hints)
    assert any("--rename" in hint for hint in found.hints)


def test_pieces_cut_differently_on_both_sides():
    def shards(rows: list[int]) -> dict[str, tuple[int, ...]]:
        return {f"model.ngram_embedding.shard_{i}.weight": (n, 3) for i, n in enumerate(rows)}

    config = {"model_type": "qwen4_exp_text"}
    for mine, wanted in (([5, 4, 3], [1, 7, 2, 2]), ([1] * 12, [6, 6])):
        found = bridge(shards(mine), shards(wanted), configs=[config])
        values = numbers(shards(mine))
        rows = np.split(np.concatenate(list(values.values())), np.cumsum(wanted)[:-1])
        assert_made(found, values, dict(zip(shards(wanted), rows, strict=True)))
    # one of equal name and shape is no longer there to be cut: nothing is made of the rest
    found = bridge(shards([8, 4]), shards([4, 4, 4]), configs=[config])
    assert list(found.views) == ["model.ngram_embedding.shard_1.weight"]


def test_experts_apart_on_both_sides_under_different_names():
    def experts(prefix: str, shape: tuple[int, int] = (2, 3)) -> dict[str, tuple[int, ...]]:
        names = [f"{prefix}.experts.{i}.w{j}.weight" for i in range(300) for j in (1, 2, 3)]
        return dict.fromkeys(names, shape)

    mine, wanted = (experts(f"model.layers.0.{p}") for p in ("block_sparse_moe", "mlp"))
    found = bridge(mine, wanted, configs=[{"model_type": "mixtral"}])
    assert_made(found, numbers(mine), numbers(wanted))
    mine, wanted = (experts(f"layers.0.{p}", (2, 0)) for p in ("block_sparse_moe", "mlp"))
    assert not bridge(mine, wanted, configs=[{"model_type": "mixtral"}]).views  # no values


def test_unequal_parts_are_cut_by_the_shapes_on_the_other_side():
    fused = {"layers.0.self_attn.att_proj.weight": (16, 3)}
    sizes = {"q": 8, "k": 4, "v": 4}
    apart = {f"layers.0.self_attn.{p}_proj.weight": (n, 3) for p, n in sizes.items()}
    config = {"model_type": "molmo2", "architectures": ["Molmo2TextModel"]}
    assert_made(bridge(fused, apart, configs=[config]), numbers(fused), numbers(apart))
    assert_made(bridge(apart, fused, configs=[config]), numbers(apart), numbers(fused))
    for rows in (7, 9):
        apart["layers.0.self_attn.q_proj.weight"] = (rows, 3)
        assert not bridge(fused, apart, configs=[config]).views


def test_a_transpose_is_one_also_where_the_shape_does_not_show_it():
    mine = {"model.layers.0.mixer.experts.down_projs": (2, 3, 3)}
    wanted = {"model.layers.0.mixer.experts.down_proj": (2, 3, 3)}
    values = numbers(mine)
    turned = {next(iter(wanted)): next(iter(values.values())).transpose(0, 2, 1)}
    config = {"model_type": "nemo_speechlm"}
    assert_made(bridge(mine, wanted, configs=[config]), values, turned)
    assert_made(bridge(wanted, mine, configs=[config]), turned, values)


def test_what_becomes_one_or_lacks_a_part_is_not_taken():
    name = "c.0.parametrizations.weight.original0"
    mine = {"c.0.weight_g": (3, 4), name: (9, 9)}
    found = bridge(mine, {name: (3, 4)}, configs=[{"model_type": "mixtral"}])
    assert not found.views and set(found.unused) == set(mine)
    mine = {f"layers.0.self_attn.{p}_proj.weight": (2, 4) for p in "qk"}
    wanted = {"encoder.layer.0.attention.qkv_proj.weight": (6, 4)}
    found = bridge(mine, wanted, configs=[{"model_type": "gte"}])
    assert not found.views and set(found.unused) == set(mine)


def test_shapes_and_numbers_that_no_operation_fits():
    for shape in ((), (0,), (4,), (0, 5), (2, 5, 1)):
        layout = dict.fromkeys(per_expert(), shape)
        assert not bridge(layout, fused(), configs=QWEN).views
        assert not bridge(fused(), layout, configs=QWEN).views
        empty = {f"{EXPERT}.gate_up_proj": (3, 0, 5), f"{EXPERT}.down_proj": (3, 0, 5)}
        assert not bridge(layout, empty, configs=QWEN).views
    with lowered():
        found = bridge(
            {f"model.llm.attn_res.attn_queries.{DIGITS}": (2,), "attn_res.attn_queries.3": (2,)},
            {"layers.4.attention_input.query": (2,)},
            configs=[{"model_type": "inkling2_text"}],
        )
    assert set(found.views) == {"layers.4.attention_input.query"}


def test_more_pieces_than_are_looked_at(monkeypatch):
    mine, wanted = (
        {f"ngram_embedding.shard_{i}.weight": (rows, 3) for i in range(8 // rows)}
        for rows in (1, 2)
    )
    assert bridge(mine, wanted, configs=[{"model_type": "qwen4_exp_text"}]).views.keys() == {
        *wanted
    }
    assert transformers_layouts.PAIRS == 1 << 16
    monkeypatch.setattr(transformers_layouts, "PAIRS", 31)  # of 8 pieces and 4
    assert not bridge(mine, wanted, configs=[{"model_type": "qwen4_exp_text"}]).views


def test_names_of_old_and_models_within_models():
    mine = {"bert.LayerNorm.gamma": (3,), "bert.LayerNorm.beta": (3,)}
    wanted = {"bert.LayerNorm.weight": (3,), "bert.LayerNorm.bias": (3,)}
    assert_made(bridge(mine, wanted, configs=[{"model_type": "x"}]), numbers(mine), numbers(wanted))
    inner = {"model_type": "unknown", "text_config": {"model_type": "qwen3_moe"}}
    assert set(bridge(per_expert(), fused(), configs=[{}, inner]).views) == set(fused())


def test_without_a_registry_a_sentence_says_so(monkeypatch):
    assert any("no config.json" in hint for hint in bridge(per_expert(), fused()).hints)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    found = bridge(per_expert(), fused(), configs=QWEN)
    assert not found.views and any("no registry" in hint for hint in found.hints)


def test_a_prefix_and_fused_experts_at_once():
    rest = {"norm.weight": (5,), "embed_tokens.weight": (9, 5)}
    mine = per_expert() | {f"model.{n}": s for n, s in rest.items()}
    mine["model.layers.0.mlp.gate.weight"] = (3, 5)
    inner = "model.language_model"
    wanted = fused(prefix=f"{inner}.layers.0.mlp.experts")
    wanted |= {f"{inner}.{n}": s for n, s in rest.items()}
    wanted[f"{inner}.layers.0.mlp.gate.weight"] = (3, 5)
    values = numbers(mine)
    expected = {
        name: values[name.replace(f"{inner}.", "model.")]
        for name in wanted
        if "experts" not in name
    }
    for which, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
        expected[f"{inner}.layers.0.mlp.experts.{which}_proj"] = np.stack(
            [
                np.concatenate([values[f"{EXPERT}.{i}.{part}_proj.weight"] for part in parts])
                for i in range(3)
            ]
        )
    found = bridge(mine, wanted, configs=QWEN)
    assert_made(found, values, expected)
    back = bridge(wanted, mine, configs=QWEN)
    assert_made(back, expected, values)


def test_operations_that_reorder_rows_are_refused_by_name():
    found = bridge(
        {"vision_tower.encoder.blocks.0.wqkv.weight": (24, 8)},
        {f"model.vision_tower.layers.0.attn.{p}_proj.weight": (8, 8) for p in "qkv"},
        configs=[{"model_type": "kimi_k25"}],
    )
    assert not found.views and any("PermuteForRope is not taken" in hint for hint in found.hints)
    found = bridge(
        {"model.layers.0.mlp.experts.w13_weight": (2, 6, 4)},
        {"model.layers.0.mlp.experts.gate_up_proj": (2, 6, 4)},
        configs=[{"model_type": "inkling_mm_model"}],
    )
    assert not found.views and any("Interleave is not taken" in hint for hint in found.hints)


def test_norms_that_change_their_numbers_are_not_taken_for_each_other():
    # kimi_k25: norm0 -> norm1 and norm1 -> norm2; norm1 is in both and means two things
    block = "vision_tower.encoder.blocks.0"
    mine = {f"{block}.norm{i}.weight": (4,) for i in (0, 1)}
    wanted = {f"{block}.norm{i}.weight": (4,) for i in (1, 2)}
    found = bridge(mine, wanted, configs=[{"model_type": "kimi_k25"}])
    assert f"{block}.norm2.weight" not in found.views
    assert f"{block}.norm0.weight" in found.unused


# ---------------------------------------------------------------------------------- prefixes


TREE = {"embed.weight": (9, 4), "layers.0.a.weight": (4, 4), "layers.1.a.weight": (4, 4),
        "norm.weight": (4,)}  # fmt: skip


def under(prefix: str, tree: Mapping[str, tuple[int, ...]] = TREE) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in tree.items()}


@pytest.mark.parametrize(
    "one, other",
    [
        ("model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
        ("", "transformer."),
        ("a.b.", "c."),
    ],
)
def test_one_prefix_stands_for_another(one: str, other: str):
    for mine, wanted in ((one, other), (other, one)):
        found = bridge(under(mine), under(wanted))
        assert_made(found, numbers(under(mine)), numbers(under(wanted)))
        assert found.notes[f"{wanted}norm.weight"] == f"from {mine}norm.weight"


def test_prefixes_of_several_subtrees_each_found_by_what_lies_in_them():
    vision = {"patch.weight": (4, 7), "blocks.0.w.weight": (4, 4), "norm.weight": (4,)}
    mine = under("model.") | under("visual.", vision) | {"lm_head.weight": (9, 4)}
    wanted = under("model.language_model.") | under("model.visual.", vision)
    wanted["lm_head.weight"] = (9, 4)
    assert_made(bridge(mine, wanted), numbers(mine), numbers(wanted))
    # a tensor more on one side: the prefixes hold for the rest all the same
    extra = mine | {"model.layers.0.rotary.inv_freq": (2,)}
    found = bridge(extra, wanted)
    assert set(found.views) == set(wanted)
    assert found.unused == {"model.layers.0.rotary.inv_freq": ""}


def test_no_prefix_is_guessed():
    # two towers alike
    found = bridge(under("a.") | under("b."), under("c.") | under("d."))
    assert not found.views and any("may stand for" in hint for hint in found.hints)
    found = bridge(under("a."), under("c.") | under("d."))
    assert not found.views and len(found.unused) == len(TREE)
    assert not bridge(under("c.") | under("d."), under("a.")).views
    layer = {"layers.0.w.weight": (4, 4)}
    mine = under("model.", layer) | under("visual.", layer)
    found = bridge(mine, under("model.language_model.", layer) | under("model.visual.", layer))
    assert set(found.unused) == {"model.layers.0.w.weight"}  # not by elimination
    same = {"m.mlp.gate.weight": (9, 9)}  # the wanted name, of another shape
    assert not bridge(
        under("m.old.", {"gate.weight": (2, 3)}) | same, {"m.mlp.gate.weight": (2, 3)}
    ).views
    # two names that the prefixes found would make one
    one, two = {"x.p.weight": (3,), "x.q.weight": (4,)}, {"y.p.weight": (5,), "y.q.weight": (6,)}
    last = {"last.weight": (2,)}
    mine = under("a.", one | last) | under("b.", two | last)
    found = bridge(mine, under("m.", one | two | last))
    assert set(found.views) == set(under("m.", one | two))
    assert set(found.unused) == {"a.last.weight", "b.last.weight"}
    mine = under("a.", one | last) | {"m.last.weight": (9, 9)}
    assert set(bridge(mine, under("m.", one | last)).views) == set(under("m.", one))
    # nor one module for another of the same shape, nor one layer for another
    assert not bridge({"up_proj.weight": (4, 4)}, {"gate_proj.weight": (4, 4)}).views
    assert not bridge({"x.q.weight": (4, 4)}, {"x.k.weight": (4, 4)}).views
    assert not bridge(under("layers.0.a."), under("layers.1.a.")).views
    # nor where one shape differs in more than rows
    assert not bridge(under("a."), under("b.", dict.fromkeys(TREE, (5, 5)))).views


def test_what_lies_in_a_found_subtree_leaves_no_choice_elsewhere():
    norm = {"norm.weight": (4,)}
    mine = under("model.") | under("visual.", norm | {"odd.weight": (1,)})
    found = bridge(mine, under("language.") | under("tower.", norm))
    assert found.views["tower.norm.weight"].boxes[0].source == "visual.norm.weight"
    assert found.unused == {"visual.odd.weight": ""}


def test_equal_towers_keep_their_last_name():
    mine = under("model.text.") | under("model.image.")
    wanted = under("text.") | under("image.")
    assert_made(bridge(mine, wanted), numbers(mine), numbers(wanted))


def test_prefixes_over_more_tensors_alike_than_are_looked_at(monkeypatch):
    mine, wanted = (
        {f"{f'm{i}.' * moved}a{i}.b.weight": (2, 2) for i in range(3)} for moved in (False, True)
    )
    assert set(bridge(mine, wanted).views) == set(wanted)
    assert layouts.ALIKE == 32
    monkeypatch.setattr(layouts, "ALIKE", 2)
    found = bridge(mine, wanted)
    assert not found.views and set(found.unused) == set(mine)


def test_prefixes_of_more_parts_than_are_looked_at(monkeypatch):
    mine, wanted = {"a.b.c.m.weight": (2, 3)}, {"m.weight": (2, 3)}
    assert set(bridge(mine, wanted).views) == set(wanted)
    assert renaming.DEPTH == 16
    monkeypatch.setattr(renaming, "DEPTH", 2)
    assert not bridge(mine, wanted).views


def test_names_of_every_kind():
    odd = {DIGITS: (1,), "²": (0,), "": (), ".": (2,), "..1..": (3, 0), "a" * 700: (1,)}
    with lowered():
        names = bridge(odd, under("m.", odd), configs=[*QWEN, {"model_type": "²"}])
        assert set(names.views) <= set(under("m.", odd))
        config = {"model_type": "²", "architectures": [{}]}
        assert not bridge(odd, {"w": (7, 7)}, configs=[config]).views


# ------------------------------------------------------------------------------------ rename


def test_rename_rules_go_before_everything_else():
    mine = {"h.0.attn.weight": (2, 2), "h.1.attn.weight": (2, 2), "wte": (3, 2)}
    wanted = {"layers.0.attention.w": (2, 2), "layers.1.attention.w": (2, 2), "embed": (3, 2)}
    rules = [r"^h\.(\d+)=layers.\1", r"attn\.weight(?=$)=attention.w", "^wte$=embed"]
    found = bridge(mine, wanted, rename=rules)
    assert_made(found, numbers(mine), numbers(wanted))
    assert found.notes["embed"] == "from wte"


def test_rename_rules_that_cannot_be_meant():
    mine = {"a.w": (1,), "b.w": (1,)}
    for rule in ("a.w", "=x", "(=x", r"a=\7", r"c\.w=d"):
        with pytest.raises(UsageError, match="--rename"):
            bridge(mine, mine, rename=[rule])
    with pytest.raises(IncompatibleError, match=r"(?s)become one.*a\.w: x\.w.*b\.w: x\.w"):
        bridge(mine, mine, rename=["^[ab]=x"])
    with pytest.raises(UsageError, match="--rows some"):
        bridge(mine, mine, rows="some")


# -------------------------------------------------------------------------------------- rows


def vocabulary(rows: int) -> dict[str, tuple[int, ...]]:
    return {"model.embed.weight": (rows, 4), "head.weight": (rows, 4), "head.bias": (rows,)} | {
        "model.norm.weight": (4,)
    }


@pytest.mark.parametrize("have, want", [(9, 6), (6, 9)])
def test_rows_of_different_vocabularies(have: int, want: int):
    mine, wanted = numbers(vocabulary(have)), vocabulary(want)
    strict = bridge(shapes(mine), wanted)
    assert strict.rows_differ == [n for n in wanted if n != "model.norm.weight"]
    assert set(strict.views) == {"model.norm.weight"}
    assert strict.unused["head.bias"] == f"[{have}], expected [{want}]"
    common = bridge(shapes(mine), wanted, rows="common")
    expected = {}
    for name, shape in wanted.items():
        expected[name] = np.zeros(shape, np.float32)
        least = min(len(mine[name]), shape[0])
        expected[name][:least] = mine[name][:least]
    assert_made(common, mine, expected)
    assert common.notes["head.bias"] == (
        f"first {want} of {have} rows" if have > want else f"{have} rows, then zeros"
    )
    skip = bridge(shapes(mine), wanted, rows="skip")
    assert set(skip.views) == {"model.norm.weight"} and not skip.rows_differ
    assert set(skip.skipped) == set(skip.unused) == set(strict.rows_differ)
    assert set(skip.unused.values()) == {"rows differ: skipped"}


def test_rows_differ_under_another_prefix_too():
    mine = under("model.")
    wanted = under("model.language_model.", TREE | {"embed.weight": (7, 4)})
    found = bridge(mine, wanted, rows="common")
    view = found.views["model.language_model.embed.weight"]
    assert view.shape == (7, 4) and view.boxes[0].source == "model.embed.weight"
    assert set(found.views) == set(wanted)


def test_rows_differ_under_a_name_of_the_registry_too():
    mine = {"model.word_embeddings.weight": (7, 4)}
    wanted = {"model.embed_tokens.weight": (9, 4)}
    config = {"model_type": "bailing_hybrid"}
    found = bridge(mine, wanted, configs=[config], rows="common")
    assert found.views["model.embed_tokens.weight"].boxes[0].source == next(iter(mine))
    assert bridge(mine, wanted, configs=[config]).rows_differ == list(wanted)


def test_what_is_no_vocabulary_stays_unmatched():
    for rows in ("strict", "common", "skip"):
        for one, other in (
            ({"e.weight": (5, 4), "f.weight": (6, 4)}, {"e.weight": (7, 4), "f.weight": (7, 4)}),
            ({"e.weight": (5, 4)}, {"e.weight": (5, 3)}),
            ({"e.weight": (5, 4, 1)}, {"e.weight": (6, 4, 1)}),
            ({"e.weight": (5, 4)}, {"e.weight": (5,)}),
            ({"layers.0.k.weight": (8, 4)}, {"layers.0.k.weight": (4, 4)}),  # heads
        ):
            found = bridge(one, other, rows=rows)
            assert not found.views and not found.rows_differ and not found.skipped
            assert set(found.unused) == set(one)


# ----------------------------------------------------------------------------------- sources


def test_parts_of_different_dtypes_are_refused(tmp_path):
    import torch

    tensors = {name: torch.zeros(shape) for name, shape in per_expert().items()}
    odd = f"{EXPERT}.2.up_proj.weight"
    tensors[odd] = tensors[odd].bfloat16()
    file = save(tmp_path / "x.safetensors", tensors)
    specs = read_header(file).tensors
    found = bridge(shapes(tensors), fused(), configs=QWEN)
    with pytest.raises(
        IncompatibleError, match=r"gate_up_proj: made of .*F32, and .*2\.up_proj.*BF16"
    ):
        viewed_specs(found, specs)
    eight = {name: spec._replace(dtype="F8_E4M3") for name, spec in specs.items()}
    with pytest.raises(IncompatibleError, match=r"F8_E4M3.*dequantise"):
        viewed_specs(found, eight)


def test_whole_tensors_stay_what_they_are(tmp_path):
    import torch

    file = save(tmp_path / "x.safetensors", {"a.b.w": torch.ones(2, 3), "a.c.w": torch.ones(0)})
    specs = read_header(file).tensors
    found = bridge({n: s.shape for n, s in specs.items()}, {"b.w": (2, 3), "c.w": (0,)},
                   rename=[r"^a\.="])  # fmt: skip
    made = viewed_specs(found, specs)
    assert made == {"b.w": specs["a.b.w"]._replace(name="b.w"),
                    "c.w": specs["a.c.w"]._replace(name="c.w")}  # fmt: skip
    derived = {n: Viewed(n, "F32", View(s.shape, (Box((0,) * len(s.shape), s.shape, s, 0,
               views.row_major(s.shape)),))) for n, s in specs.items()}  # fmt: skip
    again = viewed_specs(found, derived)
    assert again["b.w"].name == "b.w" and again["b.w"].parts == (derived["a.b.w"],)
    assert values_of(again["b.w"], 0, 6).tolist() == [1] * 6


def test_a_scalar_has_no_rows_that_could_differ():
    for mine, wanted in (((), (3,)), ((3,), ())):
        found = bridge({"a": mine}, {"a": wanted}, rows="common")
        assert not found.views and not found.rows_differ


# --------------------------------------------------------------------------- unrelated models


def shapes_of(kind: str, hidden: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of two layers as transformers has them in files."""
    if kind == "bert":
        stem, name = "bert.encoder.layer.{}.", "bert.embeddings.word_embeddings.weight"
        layer = {"attention.self.query.weight": (hidden, hidden),
                 "attention.self.query.bias": (hidden,),
                 "intermediate.dense.weight": (inner, hidden),
                 "output.LayerNorm.weight": (hidden,)}  # fmt: skip
        outer = {"bert.embeddings.token_type_embeddings.weight": (2, hidden),
                 "cls.predictions.bias": (vocabulary,)}  # fmt: skip
    else:
        stem, name, outer = "model.layers.{}.", "model.embed_tokens.weight", {}
        layer = {"self_attn.q_proj.weight": (hidden, hidden),
                 "self_attn.k_proj.weight": (hidden // 4, hidden),
                 "mlp.down_proj.weight": (hidden, inner),
                 "input_layernorm.weight": (hidden,)}  # fmt: skip
        outer = {"lm_head.weight": (vocabulary, hidden)}
    layers = {stem.format(i) + part: shape for i in range(2) for part, shape in layer.items()}
    return {name: (vocabulary, hidden), **layers, **outer}


@pytest.mark.parametrize("vocabularies", [(30522, 32000), (512, 512)])
@pytest.mark.parametrize("turned", [False, True])
def test_unrelated_models_are_told_apart_without_transformers(vocabularies, turned, monkeypatch):
    one = shapes_of("bert", 768, 3072, vocabularies[0])
    other = shapes_of("llama", 960, 2560, vocabularies[1])
    pair = (other, one) if turned else (one, other)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    configs = [{"model_type": "bert"}, {"model_type": "llama"}]
    found = bridge(*pair, configs=configs)
    assert not found.views
    assert found.hints[0] == layouts.UNRELATED and "--rename" in found.hints[1]
    same = bridge(pair[0], {f"x.{n}.y": s for n, s in pair[0].items()}, configs=configs)
    assert any("no registry" in hint for hint in same.hints)  # so it was asked for


def test_unrelated_checkpoints_are_refused_without_importing_transformers(tmp_path):
    for kind, hidden, inner in (("bert", 24, 60), ("llama", 32, 72)):
        layout = shapes_of(kind, hidden, inner, 40)
        content = {name: np.zeros(shape, np.float32) for name, shape in layout.items()}
        save(tmp_path / kind, content, config={"model_type": kind})
    code = (
        "import sys, skillvec\n"
        "for make in (lambda: skillvec.diff('bert', 'llama'), lambda: skillvec.apply(\n"
        "        'llama', skillvec.diff('bert', 'bert', 'v.safetensors'), 'out')):\n"
        "    try:\n"
        "        make()\n"
        "    except skillvec.IncompatibleError as error:\n"
        "        print(error)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert done.stdout.count(layouts.UNRELATED) == 2
    assert "bert and llama do not match" in done.stdout and "only in llama" in done.stdout


@pytest.mark.parametrize(
    ("mine", "wanted", "may"),
    [
        ([(6, 8)] * 3, [(18, 8)], True),  # joined
        ([(6, 8)] * 3, [(8, 18)], True),  # and turned
        ([(6, 8)] * 3, [(3, 8, 6)], True),  # stacked and turned
        ([(12, 8)] * 3, [(3, 6, 8)] * 2, True),  # cut, and stacked again
        ([(5,)] * 4, [(4, 5)], True),  # biases of experts
        ([(7, 8)], [(3, 8), (4, 8)], True),
        ([(7, 8)], [(9, 8)], True),  # of other vocabularies
        ([(8, 7)], [(8, 3), (8, 4)], True),
        ([(8, 7)], [(8, 3), (8, 5)], False),
        ([(6, 8)] * 3, [(18, 9)], False),
        ([(6, 8), (6,)], [(48,)], False),
        ([(40, 24), (40,)], [(40, 32)], False),  # of the same vocabulary
        ([(1 << 23, 3)], [(1 << 24, 3)], True),  # too many to look at
    ],
)
def test_what_shapes_allow(mine, wanted, may: bool):
    sides = [{str(i): shape for i, shape in enumerate(side)} for side in (mine, wanted)]
    for one, other in (sides, reversed(sides)):
        assert layouts._may_share_values(one, other) is may


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_turned_experts_take_the_same_bytes_from_any_thread(
    workers: int, special: bool, tmp_path, monkeypatch
):
    """Of a stored vector, of a pair, onto pickles that lie turned, and what is not finite counted
    once: groups that cut an expert, and blocks that lie across them.
    """
    import torch

    import skillvec as sv

    monkeypatch.setattr(gather, "GATHERED_NBYTES", 1 << 21)
    name, config = "model.language_model.layers.0.mlp.experts.gate_up_proj", "qwen3_vl_moe"
    torch.manual_seed(0)
    base = torch.randn(3, 700, 1030).bfloat16()
    noise = (torch.rand(base.shape) < 0.1) * 0.01 * torch.randn(base.shape)
    tuned = (base + noise).bfloat16()
    if special:
        tuned[1, 300, 1000] = tuned[2, 699, 1029] = float("inf")
    for side, content in (("base", base), ("tuned", tuned)):
        save(tmp_path / side, {name: content}, config={"model_type": config})
    save(tmp_path / "turned", {name: base.transpose(1, 2)}, config={"model_type": config})
    (tmp_path / "pickle").mkdir()
    pickled = base.transpose(1, 2).contiguous().transpose(1, 2)
    torch.save({name: pickled}, tmp_path / "pickle" / "pytorch_model.bin")
    pair = f"{tmp_path}/tuned::{tmp_path}/base"
    if special:
        with pytest.raises(sv.SkillvecError, match=f"{name}: 2 of {base.numel()}"):
            sv.apply(tmp_path / "turned", pair, output=tmp_path / "out", workers=workers)
        return
    vector = tmp_path / "v.safetensors"
    sv.diff(tmp_path / "tuned", tmp_path / "pickle", vector, workers=workers)
    for number, given in enumerate((vector, pair)):
        for target, dims in (("turned", (1, 2)), ("pickle", (1, 1))):
            out = tmp_path / f"{target}{number}"
            sv.apply(tmp_path / target, given, output=out, workers=workers)
            expected = tuned.transpose(*dims).contiguous()
            assert_same_bits(out, {name: expected})
