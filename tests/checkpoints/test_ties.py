"""Heads that a model ties to its embeddings: adapters against what PEFT itself merges and saves."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from families import assert_same_bits, bits, load, save, toy
from hubserver import HubServer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import skillvec as sv
from skillvec.cli.commands import main
from skillvec.errors import IncompatibleError
from skillvec.vectors.match import KEPT

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# vocabulary and intermediate size are the same: a projection of a layer has the shape of the head
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
}


def model_of(kind: str, tied: bool, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config, made = KINDS[kind]
    head_dim = {"head_dim": 8} if kind == "gemma" else {}
    model = made(config(**SIZES | head_dim | {"tie_word_embeddings": tied} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def opened(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def train(base: Path, folder: Path, load_it: Any = opened, ref: str = "", **lora: Any) -> None:
    """Save an adapter of the base with random values where PEFT trains; `ref` is its base then."""
    model = load_it(base)
    model.name_or_path = model.config._name_or_path = ref or str(base)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter += noise.to(parameter.dtype)
    tuned.save_pretrained(folder)


def merge(base: Path, adapter: Path, folder: Path, load_it: Any = opened) -> dict[str, Any]:
    """Save what PEFT merges, and return it."""
    merged = PeftModel.from_pretrained(load_it(base), adapter).merge_and_unload()
    merged.save_pretrained(folder)
    return load(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def config_of_adapter(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return opened(folder)(torch.arange(12)[None]).logits


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 2e-6) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)


def line_of(report: sv.Report, name: str) -> dict[str, Any]:
    (line,) = (line for line in report.ledger if line["name"] == name)
    return line


MODULES = (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])


def lora_of(how: str, modules: list[str], tying: bool) -> dict[str, Any]:
    targets = ["q_proj", *modules] if how == "factors" else ["q_proj"]
    saved = {"modules_to_save": list(modules)} if how == "whole" else {}
    return {"target_modules": targets, "ensure_weight_tying": tying} | saved


@pytest.mark.parametrize("tying", [False, True], ids=["loose", "tying"])
@pytest.mark.parametrize("modules", MODULES, ids=["embeddings", "head", "both"])
@pytest.mark.parametrize("how", ["whole", "factors"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_does_what_peft_merges(
    tied: bool, how: str, modules: list[str], tying: bool, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", tied).save_pretrained(base)
    train(base, adapter, **lora_of(how, modules, tying))
    expected = merge(base, adapter, tmp_path / "expected")
    straight = sv.apply(base, adapter, tmp_path / "straight")
    vector = sv.diff(adapter, base, tmp_path / "v.safetensors")
    stored = sv.apply(base, vector, tmp_path / "stored")
    for out in ("straight", "stored"):
        assert_close(load(tmp_path / out), expected)
        for name in ("tie_word_embeddings", "dtype"):
            found, right = (config_of(tmp_path / folder)[name] for folder in (out, "expected"))
            assert found == right, name
        torch.testing.assert_close(
            logits(tmp_path / out), logits(tmp_path / "expected"), rtol=0, atol=2e-5
        )
        assert sv.verify(tmp_path / out).facts["verified"]
    assert sv.verify(tmp_path / "v.safetensors").facts["verified"]
    # merged factors of a tied weight are not what was trained, and all that comes of them says so
    wrong = tied and how == "factors"
    for report in (straight, stored, vector.report, sv.inspect(tmp_path / "v.safetensors")):
        assert wrong == any("not the model that was trained" in said for said in report.warnings)


BOTH = {"embed_tokens": [3, 1], "lm_head": [1, 7]}
ROWS: dict[str, tuple[Any, bool]] = {  # what is trained, and whether a merge into one weight is it
    "a list": ([3, 1, 39], True),
    "embeddings": ({"embed_tokens": [3, 1]}, True),
    "one list for both": ({"embed_tokens": [3, 1], "lm_head": [3, 1]}, True),
    "head": ({"lm_head": [5]}, False),
    "other rows of both": ({"embed_tokens": [3, 1], "lm_head": [0, 7]}, False),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_tokens_are_put_where_peft_puts_them(tied: bool, rows: str, tmp_path: Path) -> None:
    """To the bit: rows are replaced, on a base in bf16 by what was rounded to it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", tied).bfloat16().save_pretrained(base)
    numbers, trained = ROWS[rows]
    train(base, adapter, target_modules=["q_proj"], trainable_token_indices=numbers)
    expected = merge(base, adapter, tmp_path / "expected")
    straight = sv.apply(base, adapter, tmp_path / "straight")
    sv.diff(adapter, base, tmp_path / "v.safetensors")
    sv.apply(base, tmp_path / "v.safetensors", tmp_path / "stored")
    for out in ("straight", "stored"):
        found = load(tmp_path / out)
        assert set(found) == set(expected)
        for name in (EMBED, HEAD):
            assert name not in expected or torch.equal(found[name], expected[name])
        assert config_of(tmp_path / out)["tie_word_embeddings"] is tied
        assert sv.verify(tmp_path / out).facts["verified"]
    wrong = any("not the model that was trained" in said for said in straight.warnings)
    assert wrong == (tied and not trained)


def test_rows_that_differ_in_one_weight_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", True).save_pretrained(base)
    train(base, adapter, target_modules=["q_proj"], trainable_token_indices=BOTH)
    with pytest.raises(IncompatibleError, match="two things of the one weight"):
        sv.apply(base, adapter, tmp_path / "out")
    held = load(adapter / "adapter_model.safetensors")
    rows = {name: weight for name, weight in held.items() if "trainable_tokens" in name}
    head, embeddings = sorted(rows)
    held[head][0] = held[embeddings][1]  # row 1 of both
    save(adapter / "adapter_model.safetensors", held)
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


@pytest.mark.parametrize("modules", MODULES, ids=["embeddings", "head", "both"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_dora_of_embeddings_and_heads(tied: bool, modules: list[str], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", tied).save_pretrained(base)
    train(base, adapter, target_modules=["q_proj", *modules], use_dora=True)
    if tied and len(modules) > 1:  # PEFT scales the one weight twice, in an order of its own
        with pytest.raises(IncompatibleError, match="two things of the one weight"):
            sv.apply(base, adapter, tmp_path / "out")
        return
    expected = merge(base, adapter, tmp_path / "expected")
    report = sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected, 4e-6)
    assert tied == any("not the model that was trained" in said for said in report.warnings)


DUMPED: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "one": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]},
}  # fmt: skip


def dumped(adapter: Path, base: Path, folder: Path, some: str = "") -> dict[str, Any]:
    """Save the state dict of a model with an adapter, as FSDP does of all it wraps; return it."""
    state = PeftModel.from_pretrained(opened(base), adapter).state_dict()
    state = {name: weight.clone() for name, weight in state.items() if some in name}
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    shutil.copy(adapter / "adapter_config.json", folder)
    return state


@pytest.mark.parametrize("kind", DUMPED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_state_dict_of_all_is_the_adapter_in_it(tied: bool, kind: str, tmp_path: Path) -> None:
    """Both names of a tied weight are in it, and the wrappers' copies and originals."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", tied).save_pretrained(base)
    train(base, adapter, **DUMPED[kind])
    state = dumped(adapter, base, tmp_path / "dump")
    names = [f"base_model.model.{name}" for name in (EMBED, HEAD)]
    assert all(any(key.startswith(name[:-6]) for key in state) for name in names)
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, tmp_path / "dump", tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected, 4e-6)
    if tied and kind == "embeddings":  # another weight under the head's name is not left away
        state[f"base_model.model.{HEAD}"] += 1
        torch.save(state, tmp_path / "dump" / "model_world_size_1_rank_0.pt")
        with pytest.raises(
            IncompatibleError, match="the adapter says two things of the one weight"
        ):
            sv.apply(base, tmp_path / "dump", tmp_path / "again")


def test_a_head_that_was_trained_and_did_not_move_is_apart_all_the_same(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", True).save_pretrained(base)
    train(base, adapter, target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    held = load(adapter / "adapter_model.safetensors")
    (head,) = (name for name in held if name.endswith("lm_head.weight"))
    held[head] = load(base)[EMBED].clone()
    save(adapter / "adapter_model.safetensors", held)
    expected = merge(base, adapter, tmp_path / "expected")
    assert not torch.equal(expected[HEAD], expected[EMBED])
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_that_are_not_there_are_missed(bias: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", False, attention_bias=True).save_pretrained(base)
    train(base, adapter, target_modules=["q_proj"], bias=bias)
    dumped(adapter, base, tmp_path / "factors", "lora_")
    with pytest.raises(
        IncompatibleError, match=rf"q_proj\.bias: trained \(bias: {bias}\), and not"
    ):
        sv.apply(base, tmp_path / "factors", tmp_path / "out")
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


def test_what_the_base_decides_needs_the_base(tmp_path: Path) -> None:
    """Rows and magnitudes are of the base: on another target they are its difference from it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", False).save_pretrained(base)
    other = model_of("llama", False)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.25
    other.save_pretrained(tmp_path / "other")
    train(base, adapter, target_modules=["q_proj"], use_dora=True, trainable_token_indices=[3])
    merged = merge(base, adapter, tmp_path / "merged")
    sv.apply(tmp_path / "other", adapter, tmp_path / "out")  # the config names the base
    start, found = load(base), load(tmp_path / "out")
    for name, weight in load(tmp_path / "other").items():
        expected = weight + (merged[name] - start[name])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=4e-6)
    config = config_of_adapter(adapter)
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match="replaces or scales weights and names no base"):
        sv.apply(tmp_path / "other", adapter, tmp_path / "again")


@pytest.mark.parametrize("kept", ["embeddings", "head"])
def test_factors_that_are_one_may_be_saved_once(kept: str, tmp_path: Path) -> None:
    """As a saver does that leaves out what shares its memory; PEFT loads them into both."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", True).save_pretrained(base)
    train(base, adapter, **lora_of("factors", ["embed_tokens"], True))
    held = load(adapter / "adapter_model.safetensors")
    left = "lm_head." if kept == "embeddings" else "embed_tokens."
    once = {name: weight for name, weight in held.items() if left not in name}
    assert len(once) == len(held) - 3
    save(adapter / "adapter_model.safetensors", once)
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
@pytest.mark.parametrize("how", ["whole", "factors"])
def test_other_families(kind: str, how: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of(kind, True).save_pretrained(base)
    train(base, adapter, **lora_of(how, ["embed_tokens"], False))
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is (how == "factors")


def test_a_config_that_holds_infinity_has_a_class_as_well(tmp_path: Path) -> None:
    """transformers writes {"__float__": "Infinity"} for it, as JSON has none."""
    sizes = {"num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4,
             "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
             "shared_intermediate_size": 40, "layer_types": ["mamba", "attention"]}  # fmt: skip
    config = transformers.GraniteMoeHybridConfig(
        **SIZES | sizes | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(base)
    assert config_of(base)["time_step_limit"][1] == {"__float__": "Infinity"}
    train(base, adapter, **lora_of("whole", ["embed_tokens"], False))
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)
    assert config_of(tmp_path / "out") == config_of(base) | {"tie_word_embeddings": False}
    vector = sv.diff(adapter, base, tmp_path / "v.safetensors")
    found = sv.extract_lora(vector, tmp_path / "lora", rank=2)
    assert line_of(found, HEAD)["note"].startswith("tied")


def test_the_trained_model_is_on_an_untied_copy_of_the_base(tmp_path: Path) -> None:
    """Which is what the warning says, and PEFT advises."""
    base, copy, adapter = (tmp_path / name for name in ("base", "copy", "adapter"))
    model = model_of("llama", True)
    model.save_pretrained(base)
    train(base, adapter, target_modules=["q_proj", "embed_tokens"])
    shutil.copytree(base, copy)
    weights = load(base)
    save_file(
        weights | {HEAD: weights[EMBED].clone()}, copy / "model.safetensors", {"format": "pt"}
    )
    (copy / "config.json").write_text(json.dumps(config_of(base) | {"tie_word_embeddings": False}))
    report = sv.apply(copy, f"{adapter}::{copy}", tmp_path / "out")
    assert not report.warnings
    with torch.no_grad():
        live = PeftModel.from_pretrained(opened(base), adapter).eval()(torch.arange(12)[None])
    torch.testing.assert_close(logits(tmp_path / "out"), live.logits, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base in bf16 and in shards, an adapter with whole embeddings, what PEFT makes of it,
    the stored vector, and the base trained otherwise."""
    folder = tmp_path_factory.mktemp("world")
    model = model_of("qwen2", True).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="3KB")
    train(folder / "base", folder / "adapter", **lora_of("whole", ["embed_tokens"], False))
    merge(folder / "base", folder / "adapter", folder / "expected")
    sv.diff(folder / "adapter", folder / "base", folder / "v.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.01 * torch.randn(parameter.shape)).to(torch.bfloat16)
    model.save_pretrained(folder / "other")
    sv.diff(folder / "other", folder / "base", folder / "w.safetensors")
    return folder


@pytest.mark.parametrize("given", ["adapter", "v.safetensors"])
def test_the_head_gets_a_tensor_of_its_own(world: Path, given: str, tmp_path: Path) -> None:
    out, base, expected = tmp_path / "out", load(world / "base"), load(world / "expected")
    report = sv.apply(world / "base", world / given, out)
    found = load(out)
    assert set(found) == set(expected) and HEAD not in base
    assert (bits(found[EMBED]) == bits(expected[EMBED])).all()
    assert (bits(found[HEAD]) == bits(base[EMBED])).all()
    line = line_of(report, HEAD)
    assert (line["status"], line["note"]) == ("unchanged", KEPT)
    assert KEPT == "untied: keeps the head of the target"
    # the index knows it, in the shard of the embeddings, behind what was there
    index, before = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (out, world / "base")
    )
    assert index["weight_map"] == before["weight_map"] | {HEAD: before["weight_map"][EMBED]}
    assert len(set(index["weight_map"].values())) > 2
    size = sum(weight.nbytes for weight in found.values())
    numel = sum(weight.numel() for weight in found.values())
    assert index["metadata"] == {"total_size": size, "total_parameters": numel}
    shard = (out / index["weight_map"][HEAD]).read_bytes()
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    assert header[HEAD]["data_offsets"][1] == len(shard) - 8 - int.from_bytes(shard[:8], "little")
    assert config_of(out) == config_of(world / "base") | {"tie_word_embeddings": False}
    assert opened(out).lm_head.weight.data_ptr() != opened(out).model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("stream", [False, True])
def test_a_target_on_the_hub(world: Path, stream: bool, tmp_path: Path, monkeypatch: Any) -> None:
    sv.apply(world / "base", world / "v.safetensors", tmp_path / "here")
    with HubServer() as server:
        server.add_repo("org/base", world / "base")
        server.adopt(monkeypatch, tmp_path / "home")
        sv.apply("org/base", world / "v.safetensors", tmp_path / "there", stream=stream)
    assert_same_bits(tmp_path / "there", tmp_path / "here")
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_proof_reads_the_new_head(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sv.apply(world / "base", world / "adapter", out)
    assert sv.verify(out).facts["verified"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][HEAD]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the head, which comes last
    file.write_bytes(content)
    with pytest.raises(sv.VerificationError, match=r"lm_head\.weight: 1 of 640 values differ"):
        sv.verify(out)


def test_the_vector_on_other_targets(world: Path, tmp_path: Path) -> None:
    vector = world / "v.safetensors"
    plan = sv.diff(world / "adapter", world / "base", tmp_path / "v.safetensors", dry_run=True)
    assert line_of(plan.report, HEAD)["note"] == f"untied from {EMBED}"
    assert sv.inspect(vector).facts["untied"] == {HEAD: EMBED}
    delta = load(world / "expected")[EMBED].float() - load(world / "base")[EMBED].float()
    # one that is tied as well keeps its own head
    assert sv.inspect(vector, target=world / "other").facts["verdict"] == "same family"
    before = load(world / "other")
    sv.apply(world / "other", vector, tmp_path / "out", dtype="fp32")
    after = load(tmp_path / "out")
    torch.testing.assert_close(after[EMBED], before[EMBED].float() + delta, rtol=0, atol=1e-6)
    assert torch.equal(after[HEAD], before[EMBED].float())
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert sv.verify(tmp_path / "out").facts["verified"]
    # one that is not has its head in a file, and its config stays as it is
    model_of("qwen2", False).to(torch.bfloat16).save_pretrained(tmp_path / "untied")
    before = load(tmp_path / "untied")
    sv.apply(tmp_path / "untied", vector, tmp_path / "o")
    after = load(tmp_path / "o")
    assert torch.equal(after[HEAD], before[HEAD]) and not torch.equal(after[EMBED], before[EMBED])
    texts = [(tmp_path / folder / "config.json").read_bytes() for folder in ("o", "untied")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("chosen", "is_untied", "status"),
    [
        ({"exclude": ["lm_head*"]}, True, "excluded"),
        ({"include": ["*embed_tokens*"]}, True, "excluded"),
        ({"exclude": ["*embed_tokens*"]}, False, "tied"),
        ({"exclude": ["*embed_tokens*", "lm_head*"]}, False, "tied"),
    ],
)
def test_a_head_that_is_left_out_stays_what_it_was(
    world: Path, chosen: dict[str, Any], is_untied: bool, status: str, tmp_path: Path
) -> None:
    report = sv.apply(world / "base", world / "v.safetensors", tmp_path / "out", **chosen)
    found, base = load(tmp_path / "out"), load(world / "base")
    assert (HEAD in found) == is_untied
    assert torch.equal(found.get(HEAD, found[EMBED]), base[EMBED])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is not is_untied
    assert line_of(report, HEAD)["status"] == status
    assert sv.verify(tmp_path / "out").facts["verified"]


def test_combined_with_a_vector_that_moves_both(world: Path, tmp_path: Path) -> None:
    base = load(world / "base")[EMBED].float()
    whole = load(world / "expected")[EMBED].float() - base
    other = load(world / "other")[EMBED].float() - base
    pair = [world / "v.safetensors", world / "w.safetensors"]
    made = sv.combine(*pair, weights=[0.5, 2.0])
    stored = sv.combine(*pair, weights=[0.5, 2.0], output=tmp_path / "c.safetensors")
    for vector, out in ((made, "straight"), (stored, "stored")):
        sv.apply(world / "base", vector, tmp_path / out, dtype="fp32")
        found = load(tmp_path / out)
        expected = {EMBED: base + 0.5 * whole + 2 * other, HEAD: base + 2 * other}
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
        assert sv.verify(tmp_path / out).facts["verified"]
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]
    # measuring takes no such liberty
    for one in (pair[0], made, stored):
        with pytest.raises(sv.IncompatibleError, match=r"lm_head\.weight \[40, 16\]: not in"):
            sv.orthogonality(one, pair[1])
        sv.orthogonality(one, pair[1], exclude=["lm_head*"])


def test_half_of_it_and_its_opposite_keep_the_head(world: Path, tmp_path: Path) -> None:
    sv.apply(world / "base", -0.5 * sv.SkillVector.open(world / "v.safetensors"), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[HEAD], load(world / "base")[EMBED])


def test_the_command_line_says_it(world: Path, tmp_path: Path) -> None:
    words = ["apply", world / "base", world / "adapter", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0 and f"{HEAD}: {KEPT}" in done.output
    model_of("llama", True).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "lora", **lora_of("factors", ["embed_tokens"], False))
    words = ["apply", tmp_path / "base", tmp_path / "lora", "-o", tmp_path / "o"]
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0
    assert "PEFT's merge" in done.stderr and "not the model that was trained" in done.stderr


# --------------------------------------------------------------------------- both in the file


@pytest.mark.parametrize("stored", ["safetensors", "pickle"])
@pytest.mark.parametrize("how", ["whole", "factors", "tying"])
def test_a_base_that_stores_what_it_ties(stored: str, how: str, tmp_path: Path) -> None:
    """As pickles always do, and some tools in safetensors: one weight under two names."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = model_of("llama", True)
    model.save_pretrained(base)
    weights = load(base)
    if stored == "pickle":
        (base / "model.safetensors").unlink()
        torch.save(weights | {HEAD: weights[EMBED]}, base / "pytorch_model.bin")
    else:
        both = weights | {HEAD: weights[EMBED].clone()}
        save_file(both, base / "model.safetensors", {"format": "pt"})
    lora = lora_of("factors" if how == "factors" else "whole", ["embed_tokens"], how == "tying")
    train(base, adapter, **lora)
    expected = merge(base, adapter, tmp_path / "expected")
    expected.setdefault(HEAD, expected[EMBED])
    tie = config_of(tmp_path / "expected")["tie_word_embeddings"]
    assert tie is (how != "whole")
    vector = sv.diff(adapter, base, tmp_path / "v.safetensors")
    for given, out in ((adapter, "straight"), (vector, "stored")):
        sv.apply(base, given, tmp_path / out)
        assert_close(load(tmp_path / out), expected)
        assert config_of(tmp_path / out)["tie_word_embeddings"] is tie
        assert sv.verify(tmp_path / out).facts["verified"]


def test_an_adapter_without_its_base_on_a_target_that_stores_both(tmp_path: Path) -> None:
    base, adapter, target = (tmp_path / name for name in ("base", "adapter", "target"))
    model_of("llama", True).save_pretrained(base)
    train(base, adapter, **lora_of("factors", ["lm_head"], True))
    expected = merge(base, adapter, tmp_path / "expected")
    weights, config = load(base), config_of(base)
    save(target, weights | {HEAD: weights[EMBED].clone()}, config=config)
    shutil.rmtree(base)
    assert sv.SkillVector.open(adapter).base is None
    report = sv.apply(target, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected | {HEAD: expected[EMBED]})
    assert config_of(tmp_path / "out") == config
    assert any("not the model that was trained" in said for said in report.warnings)


@pytest.mark.parametrize("apart", [True, False])
def test_a_difference_that_parts_a_stored_pair_unties_it(apart: bool, tmp_path: Path) -> None:
    """Whatever the vector is: a config that ties two tensors of the file which differ is untrue."""
    base = toy()
    base |= {EMBED: torch.randn(40, 24).bfloat16()}
    base |= {HEAD: base[EMBED].clone()}
    moved = {EMBED: base[EMBED] * 2, HEAD: base[HEAD] * (1 if apart else 2)}
    config = {"model_type": "toy", "tie_word_embeddings": True, "text_config": {}}
    folders = [
        save(tmp_path / name, weights, config=config)
        for name, weights in (("rl", base | moved), ("base", base))
    ]
    vector = sv.diff(*folders, tmp_path / "v.safetensors")
    straight = sv.SkillVector.between(*folders)
    for given, out in ((vector, "stored"), (straight, "straight")):
        sv.apply(folders[1], given, tmp_path / out)
        untied = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
        assert config_of(tmp_path / out) == config | (untied if apart else {})
    # where the config says nothing its class does
    for kind, tying in (("gemma", True), ("llama", False)):
        silent = {"model_type": kind, "architectures": [KINDS[kind][1].__name__]} | SIZES
        (folders[1] / "config.json").write_text(json.dumps(silent))
        sv.apply(folders[1], vector, tmp_path / kind)
        untied = {"tie_word_embeddings": False} if apart and tying else {}
        assert config_of(tmp_path / kind) == silent | untied


# --------------------------------------------------------------------------- what nothing tells


def test_a_head_is_not_taken_for_a_layer_that_stays_as_well(tmp_path: Path) -> None:
    """An untied base, whose head the adapter leaves alone, and a target that ties its own."""
    model_of("llama", False).save_pretrained(tmp_path / "base")
    model_of("llama", True).save_pretrained(tmp_path / "target")
    adapter = tmp_path / "adapter"
    train(tmp_path / "base", adapter, **lora_of("whole", ["embed_tokens"], False))
    vector = sv.diff(adapter, tmp_path / "base", tmp_path / "v.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    assert vector.deltas[HEAD].codec == vector.deltas[up].codec == "zero"
    assert vector.deltas[HEAD].spec.shape == vector.deltas[up].spec.shape
    for given in (adapter, vector):
        with pytest.raises(sv.IncompatibleError, match=r"lm_head\.weight \[40, 16\]: only in"):
            sv.apply(tmp_path / "target", given, tmp_path / "out")


def test_a_switch_for_more_than_one_weight_is_left_alone(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40
    )
    kind = transformers.T5ForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "whole", kind.from_pretrained,
          target_modules=["q"], modules_to_save=["lm_head"])  # fmt: skip
    with pytest.raises(sv.IncompatibleError, match=r"encoder\.embed_tokens.*cannot part it alone"):
        sv.apply(tmp_path / "base", tmp_path / "whole", tmp_path / "out")
    lora = {"target_modules": ["q", "shared"]}
    train(tmp_path / "base", tmp_path / "factors", kind.from_pretrained, **lora)
    folders = tmp_path / "base", tmp_path / "factors", tmp_path / "expected"
    expected = merge(*folders, kind.from_pretrained)
    sv.apply(*folders[:2], tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


SWITCHES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "bert, head": (
        transformers.BertConfig, transformers.BertForMaskedLM, "query",
        {"modules_to_save": ["decoder"], "bias": "all"},
    ),
    "bert, embeddings": (
        transformers.BertConfig, transformers.BertForMaskedLM, "query",
        {"modules_to_save": ["word_embeddings"]},
    ),
    "bart, embeddings": (
        transformers.BartConfig, transformers.BartForConditionalGeneration, "q_proj",
        {"modules_to_save": ["shared"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_switch_for_more_than_one_weight_parts_them_all(kind: str, tmp_path: Path) -> None:
    """What is not trained keeps its values in a tensor of its own, as in what PEFT merges.

    Not as that saves itself: transformers leaves away what still shares memory, and what it then
    loads is drawn at random.
    """
    made, model, module, lora = SWITCHES[kind]
    sizes = {"vocab_size": 40, "max_position_embeddings": 32}
    own = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
           "num_attention_heads": 2} if "bert" in kind else {
           "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    model(made(**sizes, **own)).save_pretrained(base)
    train(base, adapter, model.from_pretrained, target_modules=[module], **lora)
    merged = PeftModel.from_pretrained(model.from_pretrained(base), adapter).merge_and_unload()
    sv.diff(adapter, base, tmp_path / "v.safetensors")
    for vector in (adapter, tmp_path / "v.safetensors"):
        out = tmp_path / f"out of {vector.name}"
        sv.apply(base, vector, out)
        assert config_of(out)["tie_word_embeddings"] is False
        assert_close(model.from_pretrained(out).state_dict(), merged.state_dict())
        assert sv.verify(out).facts["verified"]


def test_the_head_of_tinker_is_what_the_base_ties_it_to(tmp_path: Path) -> None:
    base, raw = tmp_path / "base", tmp_path / "raw"
    model_of("llama", True).save_pretrained(base)
    torch.manual_seed(1)
    factors = {"lora_A": torch.randn(2, 16), "lora_B": torch.randn(40, 2)}
    name = "base_model.model.model.unembed_tokens"
    save(raw / "adapter_model.safetensors", {f"{name}.{k}.weight": w for k, w in factors.items()})
    (raw / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    report = sv.apply(base, raw, tmp_path / "out")
    expected = load(base)
    expected[EMBED] = expected[EMBED] + 2 * factors["lora_B"] @ factors["lora_A"]
    assert_close(load(tmp_path / "out"), expected)
    assert any("not the model that was trained" in said for said in report.warnings)


def test_a_weight_under_rows_is_the_base(tmp_path: Path) -> None:
    """PEFT cannot save what it makes of rows in the embeddings and a whole head tied to them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", True).save_pretrained(base)
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}
    train(base, adapter, **lora, modules_to_save=["lm_head"])
    with pytest.raises(RuntimeError, match="shared tensors"):
        merge(base, adapter, tmp_path / "expected")
    with pytest.raises(
        IncompatibleError, match=r"lm_head\.weight: a delta and a weight that is not"
    ):
        sv.apply(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("ties", "said"),
    [
        ([{HEAD: EMBED}, {HEAD: EMBED}], "the target's config cannot part it alone"),
        ([{HEAD: EMBED}, None], "the target's config cannot part it alone"),
        ([{HEAD: EMBED, "other.bias": "one.bias"}, {}], "the target's config cannot part it alone"),
        ([{"other.weight": EMBED}, {}], "the target's model does not tie it to"),
        ([{}, {}], "the target's model does not tie it to"),
    ],
)
def test_a_target_whose_config_cannot_say_it(
    ties: list[Any], said: str, world: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Classes that tie whatever they are told, or more than the head by the one switch."""
    now, untied = ties
    monkeypatch.setattr("skillvec.vectors.match.tied_names", lambda *given: now)
    monkeypatch.setattr("skillvec.vectors.match.tied_weights", lambda *given: untied)
    with pytest.raises(sv.IncompatibleError, match=rf"lm_head\.weight \[40, 16\]: {said}"):
        sv.apply(world / "base", world / "v.safetensors", tmp_path / "out")


def test_a_target_with_embeddings_of_another_length(world: Path, tmp_path: Path) -> None:
    target = model_of("qwen2", True, vocab_size=44).to(torch.bfloat16)
    target.save_pretrained(tmp_path / "target")
    said = r"lm_head\.weight \[40, 16\]: model\.embed_tokens\.weight is BF16 \[44, 16\] in the"
    given = tmp_path / "target", world / "v.safetensors"
    for rows, match in (("strict", r"target \[44, 16\], vector \[40, 16\]"), ("common", said)):
        with pytest.raises(sv.IncompatibleError, match=match):
            sv.apply(*given, tmp_path / "out", rows=rows)
    sv.apply(*given, tmp_path / "out", rows="skip")
    assert HEAD not in load(tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "target")


def test_a_base_that_stores_the_head_alone(world: Path, tmp_path: Path) -> None:
    """transformers ties to the one that is there; PEFT goes by what it loaded."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    weights = load(world / "base")
    weights[HEAD] = weights.pop(EMBED)
    save(base, weights, config=config_of(world / "base"))
    train(base, adapter, **lora_of("whole", ["embed_tokens"], False))
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected, atol=0.02)
    assert (bits(load(tmp_path / "out")[EMBED]) == bits(expected[EMBED])).all()
    assert sv.verify(tmp_path / "out").facts["verified"]
    # its vector fits a target that stores the embeddings instead
    vector = sv.diff(adapter, base, tmp_path / "v.safetensors")
    sv.apply(world / "base", vector, tmp_path / "other")
    assert_same_bits(tmp_path / "other", tmp_path / "out")


def unknown(folder: Path, whole: str, **config: Any) -> tuple[Path, Path]:
    """Return a tied base that transformers has no class for, and an adapter with a whole module."""
    weights = {**toy(dtype="F32"), EMBED: torch.randn(40, 24)}
    weights.pop(HEAD, None)
    said = {"model_type": "toy", "vocab_size": 40, "tie_word_embeddings": True} | config
    base = save(folder / "base", weights, config=said)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    held = {f"{name}.lora_A.weight": torch.eye(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2),
            f"base_model.model.{whole}": torch.randn(40, 24)}  # fmt: skip
    adapter = folder / "adapter"
    save(adapter / "adapter_model.safetensors", held)
    lora = {"peft_type": "LORA", "r": 2, "modules_to_save": [whole.split(".")[-2]]}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return base, adapter


def test_without_a_class_the_adapter_itself_may_name_the_head(tmp_path: Path) -> None:
    base, adapter = unknown(tmp_path, HEAD)
    sv.apply(base, f"{adapter}::{base}", tmp_path / "out")
    found, before = load(tmp_path / "out"), load(base)
    whole = load(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    torch.testing.assert_close(found[HEAD], whole, rtol=0, atol=1e-6)
    assert torch.equal(found[EMBED], before[EMBED])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_without_a_class_the_name_of_a_head_is_not_guessed(tmp_path: Path) -> None:
    base, adapter = unknown(tmp_path, EMBED)
    with pytest.raises(sv.IncompatibleError, match=r"model\.embed_tokens\.weight: the config of"):
        sv.apply(base, f"{adapter}::{base}", tmp_path / "out")
    other = unknown(tmp_path / "other", EMBED, tie_word_embeddings=False)
    assert not sv.apply(other[0], f"{other[1]}::{other[0]}", tmp_path / "out").warnings


def test_without_a_config_it_is_said_that_nothing_tells(tmp_path: Path) -> None:
    base, adapter = unknown(tmp_path, EMBED)
    file = base / "model.safetensors"
    report = sv.apply(file, f"{adapter}::{file}", tmp_path / "out.safetensors")
    assert any("no config.json says whether the base ties" in said for said in report.warnings)


@pytest.mark.parametrize("said", [["lm_head.weight"], {"lm_head.weight": 1}, None])
def test_what_a_manifest_says_of_ties_is_checked(world: Path, said: Any, tmp_path: Path) -> None:
    content = (world / "v.safetensors").read_bytes()
    at = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:at])
    manifest = json.loads(header["__metadata__"]["skillvec"]) | {"untied": said}
    header["__metadata__"]["skillvec"] = json.dumps(manifest)
    raw = json.dumps(header).encode()
    (tmp_path / "v.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + content[at:])
    with pytest.raises(sv.FormatError, match=r"manifest\.untied"):
        sv.inspect(tmp_path / "v.safetensors")


# --------------------------------------------------------------------------- resized vocabularies


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=["nothing whole", "embeddings", "both", "tying"],
)
def test_embeddings_that_were_resized_are_saved_however_they_are(
    tied: bool, lora: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT saves them where the vocabulary differs from its base's, under up to three names."""
    model_of("llama", tied, vocab_size=36).save_pretrained(tmp_path / "small")
    model = opened(tmp_path / "small")
    model.resize_token_embeddings(40)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    train(base, adapter, ref=str(tmp_path / "small"), **lora)
    assert f"base_model.model.{EMBED}" in load(adapter / "adapter_model.safetensors")
    expected = merge(base, adapter, tmp_path / "expected")
    sv.apply(base, f"{adapter}::{base}", tmp_path / "out")
    assert_close(load(tmp_path / "out"), expected)


def test_two_versions_of_a_whole_module_are_refused(tmp_path: Path) -> None:
    base, adapter = unknown(tmp_path, EMBED, tie_word_embeddings=False)
    file = adapter / "adapter_model.safetensors"
    held = load(file)
    name = f"base_model.model.{EMBED}"
    copy = name.replace(".weight", ".modules_to_save.weight")
    save(file, held | {copy: held[name] + 1})
    with pytest.raises(sv.IncompatibleError, match=r"modules_to_save\.weight: another weight"):
        sv.apply(base, f"{adapter}::{base}", tmp_path / "out")
    save(file, held | {copy: held[name].clone()})
    sv.apply(base, f"{adapter}::{base}", tmp_path / "out")


# -------------------------------------------------------------------- modules that hold others


def test_a_head_inside_a_module_that_is_saved_whole_is_no_tied_weight(tmp_path: Path) -> None:
    """BERT's `cls` holds the tied decoder: taken for the one weight it would be the embeddings."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    transformers.BertForMaskedLM(config).save_pretrained(base)
    kind = transformers.BertForMaskedLM.from_pretrained
    train(base, adapter, kind, target_modules=["query"], modules_to_save=["cls"])
    merged = PeftModel.from_pretrained(kind(base), adapter).merge_and_unload().state_dict()
    embedding = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(merged[embedding], load(base)[embedding])
    assert not torch.equal(merged["cls.predictions.decoder.weight"], merged[embedding])
    sv.diff(adapter, base, tmp_path / "v.safetensors")
    for vector in (adapter, tmp_path / "v.safetensors"):
        sv.apply(base, vector, tmp_path / "out", force=True)
        assert_close(kind(tmp_path / "out").state_dict(), merged)


def test_embeddings_inside_a_module_that_is_saved_whole_leave_the_head(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama", True).save_pretrained(base)
    train(base, adapter, target_modules=["lm_head"], modules_to_save=["model"])
    merged = merge(base, adapter, tmp_path / "peft")
    sv.apply(base, adapter, tmp_path / "out")
    assert_close(load(tmp_path / "out"), merged)
    assert not torch.equal(merged[EMBED], merged[HEAD])
