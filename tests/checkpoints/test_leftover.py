"""What one file holds and another leaves out: tied biases, and buffers that models compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import assert_same_bits, load, save, toy

import skillvec as sv
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.ties import VARIED, find_tied
from skillvec.errors import IncompatibleError
from skillvec.vectors.idle import recomputed

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 0}  # fmt: skip


def refusal(call: Any) -> str:
    with pytest.raises(IncompatibleError) as caught:
        call()
    return str(caught.value)


def line_of(report: sv.Report, name: str) -> dict[str, Any]:
    (line,) = (line for line in report.ledger if line["name"] == name)
    return line


# ------------------------------------------------------------------------------- tied vectors


def both_ways(folder: Path, kind: str, trained: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Save base and tuned, each as transformers 5 does and with every name; return these."""
    made = getattr(transformers, f"{kind}ForMaskedLM")
    torch.manual_seed(0)
    model, contents = made(made.config_class(**SIZES)), {}
    for side, moves in (("base", trained), ("tuned", True)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * moves * torch.randn(parameter.shape)
        model.save_pretrained(folder / f"new_{side}")
        contents[side] = {name: t.clone() for name, t in model.state_dict().items()}
        save(folder / f"old_{side}", contents[side], config=model.config.to_dict())
    return contents


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["Bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
        "Roberta", "Albert", "Camembert", "XLMRoberta", "MPNet", "Deberta", "DebertaV2", "Ernie",
        "BigBird", "Nystromformer", "Longformer", "SqueezeBert", "RoFormer", "Yoso", "FNet",
        "IBert", "Luke", "Data2VecText", "Tapas", "RobertaPreLayerNorm"))],
)  # fmt: skip
def test_a_bias_that_a_model_ties_may_be_saved_once(kind: str, trained: bool, tmp_path: Path):
    """Also where it is all zeros, as other biases of its length might be."""
    contents = both_ways(tmp_path, kind, trained)
    alone = set(contents["base"]) - set(load(tmp_path / "new_base"))
    assert any(contents["base"][name].dim() == 1 for name in alone)
    for tuned, base in (("new", "old"), ("old", "new")):
        vector = tmp_path / f"{tuned}.safetensors"
        report = sv.diff(tmp_path / f"{tuned}_tuned", tmp_path / f"{base}_base", vector)
        assert {line_of(report.report, name)["status"] for name in alone} == {"tied"}
        for target in ("new", "old"):
            out = tmp_path / f"{tuned}_{target}"
            sv.apply(tmp_path / f"{target}_base", vector, out)
            assert_same_bits(out, tmp_path / f"{target}_tuned")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_vectors_of_few_values_are_not_tied_because_they_are_alike(value: float, tmp_path: Path):
    """A norm or a bias that is missing is missing."""
    content = toy(0)
    content["model.layers.0.self_attn.q_proj.bias"].fill_(value)
    content["model.layers.1.self_attn.q_proj.bias"].fill_(value)
    base = save(tmp_path / "base", content, config={"model_type": "llama"})
    del content["model.layers.1.self_attn.q_proj.bias"]
    tuned = save(tmp_path / "tuned", content, config={"model_type": "llama"})
    for pair in ((tuned, base), (base, tuned)):
        told = refusal(lambda pair=pair: sv.diff(*pair))
        assert "model.layers.1.self_attn.q_proj.bias [24]: only in" in told


@pytest.mark.parametrize("values", [VARIED - 1, VARIED])
def test_the_bytes_of_a_vector_tell_where_they_vary(values: int, tmp_path: Path):
    bias = torch.arange(24).clamp(max=values - 1).float()
    content = {"a.bias": bias, "b.bias": bias.clone(), "c.bias": bias + 1, "s": torch.tensor(1.0)}
    model = open_checkpoint(save(tmp_path / "model.safetensors", content))
    assert find_tied(model, "a.bias") == (["b.bias"] if values == VARIED else [])
    assert find_tied(model, "c.bias") == find_tied(model, "s") == []


# ------------------------------------------------------------------- what models compute


def inv_freq(dim: int = 8) -> torch.Tensor:
    return 1.0 / 10_000.0 ** (torch.arange(0, dim, 2) / dim)


BUFFERS: Mapping[str, torch.Tensor] = {
    "embeddings.position_ids": torch.arange(20)[None],
    "model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq(),
    "model.rotary_emb.original_inv_freq": inv_freq().bfloat16(),
    "h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(),
    "h.1.attn.bias": torch.ones(1, 1, 12, 12).tril().bool(),
    "h.2.attention.bias": torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril(),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
}


def test_buffers_that_one_side_holds_pass_with_a_note(tmp_path: Path):
    """Either side, more of them than there may be ties, and a tied head beside them."""
    many = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inv_freq() for i in range(20)}
    plain = {"base": toy(0), "tuned": toy(1)}
    for side in plain.values():
        side["lm_head.weight"] = side["model.embed_tokens.weight"].clone()
    for side, content in plain.items():
        save(tmp_path / side, content)
        content = {name: t for name, t in content.items() if name != "lm_head.weight"}
        save(tmp_path / f"{side}_more", content | BUFFERS | many)
    for tuned, base in (("tuned", "base_more"), ("tuned_more", "base")):
        vector = tmp_path / f"{tuned}.safetensors"
        report = sv.diff(tmp_path / tuned, tmp_path / base, vector).report
        for name in (*BUFFERS, *many):
            line = line_of(report, name)
            assert line["status"] == "excluded" and "the model computes: only in" in line["note"]
        sv.verify(vector)
        for target in ("base", "base_more"):
            out = tmp_path / f"{tuned}_{target}"
            applied = sv.apply(tmp_path / target, vector, out)
            assert_same_bits(out, tmp_path / target.replace("base", "tuned"))
            if target == "base_more":
                assert line_of(applied, next(iter(many)))["status"] == "passed through"


def test_a_vector_that_holds_buffers_fits_models_that_do_not(tmp_path: Path):
    """The deltas of both are zero; combine and orthogonality leave them out as well."""
    plain = {"base": toy(0), "tuned": toy(1), "other": toy(2)}
    for side, content in plain.items():
        save(tmp_path / side, content)
        save(tmp_path / f"{side}_more", content | BUFFERS)
    vector, second = tmp_path / "v.safetensors", tmp_path / "w.safetensors"
    sv.diff(tmp_path / "tuned_more", tmp_path / "base_more", vector)
    sv.diff(tmp_path / "other", tmp_path / "base", second)
    pair = f"{tmp_path}/tuned_more::{tmp_path}/base_more"
    for given in (vector, pair):
        report = sv.apply(tmp_path / "base", given, tmp_path / "out", force=True)
        assert_same_bits(tmp_path / "out", tmp_path / "tuned")
        assert line_of(report, "h.0.attn.bias")["status"] == "left out"
        sv.orthogonality(given, second)
        sv.combine(given, second, output=tmp_path / "sum.safetensors", force=True)
    sv.apply(tmp_path / "base_more", tmp_path / "sum.safetensors", tmp_path / "sum")
    assert torch.equal(load(tmp_path / "sum")["h.0.attn.bias"], BUFFERS["h.0.attn.bias"])
    merged = sv.combine(vector, vector, weights=[0.5, 0.5])  # as it is read
    report = sv.apply(tmp_path / "base", merged, tmp_path / "out", force=True)
    assert_same_bits(tmp_path / "out", tmp_path / "tuned")
    assert line_of(report, "h.0.attn.bias")["status"] == "left out"


def test_a_buffer_that_was_changed_is_no_buffer(tmp_path: Path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(tmp_path / "base", toy(0) | {name: inv_freq()})
    save(tmp_path / "tuned", toy(1) | {name: inv_freq() / 2})
    save(tmp_path / "plain", toy(0))
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    for given in (tmp_path / "v.safetensors", f"{tmp_path}/tuned::{tmp_path}/base"):
        told = refusal(lambda given=given: sv.apply(tmp_path / "plain", given, tmp_path / "out"))
        assert f"{name} [4]: only in the vector" in told


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("embeddings.position_ids", torch.arange(1, 21)[None]),
        ("embeddings.position_ids", torch.arange(20)[None].float()),
        ("embeddings.position_ids", torch.arange(20).expand(2, 20)),
        ("embeddings.my_position_ids", torch.arange(20)),
        ("rotary_emb.inv_freq", inv_freq().flip(0)),
        ("rotary_emb.inv_freq", inv_freq() - 0.5),
        ("rotary_emb.inv_freq", torch.ones(4)),
        ("rotary_emb.inv_freq", inv_freq()[None]),
        ("rotary_emb.freqs", inv_freq()),
        ("h.0.attn.bias", torch.ones(1, 1, 12, 12)),
        ("h.0.attn.bias", torch.ones(12, 12).tril()),
        ("h.0.attn.bias", torch.zeros(12)),
        ("h.0.mlp.bias", torch.ones(1, 1, 12, 12).tril()),
        ("h.0.attn.masked_bias", torch.tensor(0.5)),
        ("h.0.attn.masked_bias", torch.full((2,), -1e4)),
    ],
)
def test_a_weight_under_such_a_name_is_a_weight(name: str, tensor: torch.Tensor, tmp_path: Path):
    base = save(tmp_path / "base", toy(0) | {name: tensor.contiguous()})
    tuned = save(tmp_path / "tuned", toy(1))
    assert name in refusal(lambda: sv.diff(tuned, base))
    assert name in refusal(lambda: sv.diff(base, tuned))


@pytest.mark.parametrize("kind", ["Bert", "CLIPText", "Llama"])
def test_what_is_taken_for_a_buffer_is_one_of_transformers(kind: str, tmp_path: Path):
    """Buffers that a model of this version computes and does not save, under names of old files."""
    made = getattr(transformers, f"{kind}Model")
    model = made(made.config_class(**SIZES))
    held = {name: t.detach() for name, t in model.named_buffers() if "token_type" not in name}
    assert held and not set(held) & set(model.state_dict())
    held = {name: np.ascontiguousarray(t.numpy()) for name, t in held.items()}
    for source in open_checkpoint(save(tmp_path / "b.safetensors", held)).values():
        assert recomputed(source), source
