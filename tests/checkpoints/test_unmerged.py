"""What cannot be read as it lies: placeholders, factors without a config, folders above others.

Every refusal says what is there and gives advice that can be followed; what PEFT cannot load or
merge is not sent to merge_and_unload. Whoever follows the advice gets what PEFT merges.
"""

import dataclasses
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from families import load, save, toy
from hubserver import HubServer
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import skillvec as sv
from skillvec.checkpoints.lora_settings import UNMERGED, UNMERGED_KINDS
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.cli.commands import main
from skillvec.errors import IncompatibleError, SkillvecError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    )


def trained(folder: Path, **lora: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a base, and in ad/ an adapter with random factors; return both as PEFT merges them."""
    base = llama()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, **lora))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(folder / "ad")
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    torch.save(state, folder / "state.pt")
    merged = tuned.merge_and_unload().state_dict()
    return folder, {name: tensor.clone() for name, tensor in merged.items()}


def assert_merged(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-7)


def refusal(error: type[SkillvecError], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------- advice


def config_for(kind: Any, config: Any) -> Any:
    """Return a config of a kind of adapter for the tiny model."""
    fields = {field.name for field in dataclasses.fields(config)}
    wanted: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    wanted |= {"target_modules": ["q_proj"], "num_virtual_tokens": 3, "block_size": 8,
               "n_frequency": 8, "group_size": 8, "vector_length": 8}  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "IA3": {"feedforward_modules": []}, "ADALORA": {"total_step": 10},
        "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1]},
        "LN_TUNING": {"target_modules": ["input_layernorm"]}, "SHIRA": {"r": 2}, "MISS": {"r": 4},
        "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
    }  # fmt: skip
    given = {k: v for k, v in wanted.items() if k in fields} | own.get(kind.value, {})
    return config(**given)


def peft_merges(kind: Any, config: Any) -> bool | None:
    """Return whether PEFT merges a kind of adapter; None where this one cannot be made here."""
    try:
        model = get_peft_model(llama(), config_for(kind, config))
    except Exception:  # a package that it needs, shapes that it does not take
        return None
    try:
        model.merge_and_unload()
    except ValueError:  # this model has no biases
        return None
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def test_only_what_peft_merges_is_sent_to_be_merged(tmp_path: Path) -> None:
    content = {"base_model.model.x.weight": torch.ones(2, 2)}
    save(tmp_path / "ad" / "adapter_model.safetensors", content)
    tried = {}
    for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        merges = peft_merges(kind, config)
        if merges is None or kind.value == "LORA":
            continue
        tried[kind.value] = merges
        said = {"peft_type": kind.value}
        (tmp_path / "ad" / "adapter_config.json").write_text(json.dumps(said))
        told = refusal(IncompatibleError, lambda: sv.SkillVector.open(tmp_path / "ad"))
        assert kind.value in told and ("merge_and_unload" in told) == merges, told
        assert (UNMERGED in told) != merges
    assert {True, False} == set(tried.values()) and len(tried) > 20
    assert not {kind for kind, merges in tried.items() if merges} & set(UNMERGED_KINDS)


@pytest.mark.parametrize(
    ("lora", "merges"),
    [
        ({"kasa_config": KasaConfig()}, True),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, False),
    ],
)
def test_lora_that_is_not_merged_is_not_sent_to_be(
    lora: dict[str, Any], merges: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "ad"
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], **lora)).save_pretrained(
        folder
    )
    loaded = PeftModel.from_pretrained(llama(), folder)
    if merges:
        loaded.merge_and_unload()
    else:
        with pytest.raises(NotImplementedError):
            loaded.merge_and_unload()
    told = refusal(IncompatibleError, lambda: sv.SkillVector.open(folder))
    assert ("merge_and_unload" in told) == merges and (UNMERGED in told) != merges


def test_replicated_layers_are_not_sent_to_be_merged(tmp_path: Path) -> None:
    """Their copies share weights: PEFT merges without a word, and its model is another one."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 2], [1, 2]])
    tuned = get_peft_model(llama(), lora).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
        tuned.save_pretrained(tmp_path / "ad")
        tokens = torch.arange(6)[None]
        live = tuned(tokens).logits
        merged = tuned.merge_and_unload()(tokens).logits
    assert (live - merged).abs().max() > 0.01 * live.abs().max()
    told = refusal(IncompatibleError, lambda: sv.SkillVector.open(tmp_path / "ad"))
    assert "layer_replication" in told and UNMERGED in told and "merge_and_unload" not in told


def test_ranks_that_the_config_has_lost_are_mended_there(tmp_path: Path) -> None:
    """add_weighted_adapter keeps the factors of a rank_pattern, and not the pattern."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}
    )
    tuned = get_peft_model(base, config, "one")
    tuned.add_adapter("two", config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    tuned.add_weighted_adapter(["one", "two"], [0.7, 0.3], "mix", combination_type="linear")
    tuned.save_pretrained(tmp_path / "ad", selected_adapters=["mix"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path / "ad" / "mix")

    def apply(adapter: str) -> Any:
        return sv.apply(tmp_path / "base", tmp_path / adapter, tmp_path / "out", force=True)

    told = refusal(IncompatibleError, lambda: apply("ad/mix"))
    assert "factors of rank 2, config 4" in told and "rank_pattern" in told
    assert "merge_and_unload" not in told and "another one" not in told
    file = tmp_path / "ad" / "mix" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(
        json.dumps(said | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}})
    )
    expected = PeftModel.from_pretrained(llama(), tmp_path / "ad" / "mix").merge_and_unload()
    apply("ad/mix")
    assert_merged(tmp_path / "out", expected.state_dict())


def test_an_adapter_of_another_base_shows_names_of_both(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj", "v_proj"])
    other = {name.replace("layers.", "layers.7."): t for name, t in load(folder / "base").items()}
    save(tmp_path / "other", other)
    shutil.rmtree(folder / "base")
    told = refusal(
        IncompatibleError, lambda: sv.apply(tmp_path / "other", folder / "ad", tmp_path / "out")
    )
    assert "layers.0.self_attn.q_proj.weight: only in the adapter" in told
    assert "layers.7.0.self_attn.q_proj.weight: only in the base" in told
    assert "another one" in told and "merge_and_unload" not in told


# ------------------------------------------------------------------------------ placeholders


def save_zero3(folder: Path, tensors: dict[str, torch.Tensor], world: int = 2) -> None:
    """Write what DeepSpeed's ZeRO-3 would: each rank holds an even part of every parameter."""
    folder.mkdir(parents=True)
    shapes = OrderedDict((name, tensor.shape) for name, tensor in tensors.items())
    for rank in range(world):
        parts = []
        for tensor in tensors.values():
            size = -(-tensor.numel() // world)
            padded = torch.zeros(size * world)
            padded[: tensor.numel()] = tensor.float().reshape(-1)
            parts.append(padded[rank * size : (rank + 1) * size])
        model = {"module": {name: torch.zeros(0) for name in tensors}, "buffer_names": [],
                 "param_shapes": [shapes], "ds_version": "0.19.8"}  # fmt: skip
        state = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": [torch.cat(parts)]}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(
            {"optimizer_state_dict": state},
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def test_what_is_empty_on_both_sides_stands_for_nothing(tmp_path: Path) -> None:
    plain = {"w": torch.ones(3), "e": torch.zeros(0)}
    sides = [save(tmp_path / side, plain | more) for side, more in
             (("tuned", {"x": torch.ones(2)}), ("base", {}))]  # fmt: skip
    told = refusal(IncompatibleError, lambda: sv.diff(*sides))
    assert "x [2]: only in" in told and "are empty" not in told


def emptied(file: Path, keep: Any = lambda tensor: False) -> None:
    """Put placeholders in place of a file's tensors, as a state dict that was not gathered has."""
    content = load_file(file)
    content = {name: t if keep(t) else torch.zeros(0) for name, t in content.items()}
    save_file(content, file, {"format": "pt"})


@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_an_empty_adapter_is_read_from_where_its_weights_are(verb: str, tmp_path: Path) -> None:
    folder, expected = trained(tmp_path, target_modules=["q_proj"])
    state = torch.load(folder / "state.pt")
    emptied(folder / "ad" / "adapter_model.safetensors")
    for step in (5, 10):  # the later one, not the later name
        factors = {name: t * step / 10 for name, t in state.items() if "lora_" in name}
        save_zero3(folder / "ad" / f"global_step{step}", factors)

    def run(adapter: Path) -> Any:
        if verb == "diff":
            sv.diff(adapter, folder / "base", folder / "v.safetensors")
            return sv.apply(folder / "base", folder / "v.safetensors", folder / "out")
        return sv.apply(folder / "base", adapter, folder / "out")

    told = refusal(IncompatibleError, lambda: run(folder / "ad"))
    assert "4 of 4 tensors are empty" in told and "merge_and_unload" not in told
    assert "lie in global_step10/: copy adapter_config.json into it" in told
    shutil.copy(folder / "ad" / "adapter_config.json", folder / "ad" / "global_step10")
    run(folder / "ad" / "global_step10")
    assert_merged(folder / "out", expected)


def test_an_empty_adapter_without_its_shards_says_what_to_save(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    emptied(folder / "ad" / "adapter_model.safetensors", lambda tensor: tensor.shape[0] == 4)
    told = refusal(IncompatibleError, lambda: sv.SkillVector.open(folder / "ad"))
    assert "2 of 4 tensors are empty" in told and "save them again, gathered" in told


@pytest.mark.parametrize("vectors", ["empty too", "whole"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_empty_model_is_refused_and_its_shards_are_named(
    suffix: str, vectors: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    tuned = {name: tensor + 1 for name, tensor in load(tmp_path / "base").items()}
    save_zero3(tmp_path / "run" / "global_step5", tuned)
    held = {
        name: tensor if tensor.dim() < 2 and vectors == "whole" else torch.zeros(0)
        for name, tensor in tuned.items()
    }
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "run")
    if suffix == ".bin":
        torch.save(held, tmp_path / "run" / "pytorch_model.bin")
    else:
        save_file(held, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    for call in (
        lambda: sv.diff(tmp_path / "run", tmp_path / "base"),
        lambda: sv.diff(tmp_path / "base", tmp_path / "run"),
        lambda: sv.diff(tmp_path / "run", tmp_path / "run"),
    ):
        told = refusal(IncompatibleError, call)
        assert "tensors are empty" in told and "lie in global_step5/: name that folder" in told
        assert "--rename" not in told
    sv.diff(tmp_path / "run" / "global_step5", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "base", tmp_path / "v.safetensors", tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        assert torch.equal(tensor, tuned[name]), name
    one = tmp_path / "run" / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert "lie in global_step5/" in refusal(IncompatibleError, lambda: open_checkpoint(one))


def test_some_empty_tensors_are_refused_where_the_other_side_has_weights(tmp_path: Path) -> None:
    save(tmp_path / "base", toy(0))
    some = {name: torch.zeros(0).bfloat16() if "mlp" in name else t for name, t in toy(0).items()}
    save(tmp_path / "tuned", some)
    sv.diff(tmp_path / "base", tmp_path / "base", tmp_path / "v.safetensors")
    for call in (
        lambda: sv.diff(tmp_path / "tuned", tmp_path / "base"),
        lambda: sv.diff(tmp_path / "base", tmp_path / "tuned"),
        lambda: sv.apply(tmp_path / "tuned", tmp_path / "v.safetensors", tmp_path / "out"),
    ):
        told = refusal(IncompatibleError, call)
        assert "2 of 11 tensors are empty" in told and "mlp.up_proj.weight: BF16 [0]" in told
    both = open_checkpoint(tmp_path / "tuned")  # perhaps they are meant: said, and taken
    assert "2 tensors are empty" in " ".join(both.facts["notes"])
    assert sv.diff(both, both, tmp_path / "same.safetensors").report.facts["changed"] == 0


# --------------------------------------------------------------------- factors without a config


def test_factors_of_ranks_are_no_model_and_with_the_config_what_peft_merges(tmp_path: Path) -> None:
    folder, expected = trained(tmp_path, target_modules=["q_proj", "v_proj"])
    ranks = tmp_path / "actor"
    ranks.mkdir()
    state = torch.load(folder / "state.pt")
    torch.save(state, ranks / "model_world_size_1_rank_0.pt")
    for call in (
        lambda: sv.diff(ranks, folder / "base"),
        lambda: sv.diff(folder / "base", ranks),
        lambda: sv.diff(folder / "state.pt", folder / "base"),
    ):
        told = refusal(IncompatibleError, call)
        assert "factors of LoRA" in told and "adapter_config.json" in told
        assert "--exclude" not in told and "--rename" not in told
        assert "q_proj.lora_A.default.weight" in told
        assert "the rank (r) and lora_alpha of the training" in told and "train_meta" not in told
    (ranks / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 6}')  # as verl 0.9.1 does
    for verb in (lambda: sv.diff(ranks, folder / "base"), lambda: sv.SkillVector.open(ranks)):
        assert "lora_train_meta.json beside them says both" in refusal(IncompatibleError, verb)
    shutil.copytree(folder / "ad", ranks / "lora_adapter")  # as verl saves it
    told = refusal(IncompatibleError, lambda: sv.diff(ranks, folder / "base"))
    assert "name lora_adapter/, which holds an adapter" in told
    for number, adapter in enumerate((ranks / "lora_adapter", ranks)):
        if adapter == ranks:
            shutil.copy(folder / "ad" / "adapter_config.json", ranks)
        sv.diff(adapter, folder / "base", tmp_path / f"v{number}.safetensors")
        sv.apply(folder / "base", tmp_path / f"v{number}.safetensors", tmp_path / f"out{number}")
        assert_merged(tmp_path / f"out{number}", expected)


def test_factors_in_a_target_are_no_weights(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    sv.diff(folder / "base", folder / "base", tmp_path / "v.safetensors")
    told = refusal(
        IncompatibleError,
        lambda: sv.apply(
            folder / "state.pt", tmp_path / "v.safetensors", tmp_path / "o.safetensors"
        ),
    )
    assert "target" in told and "factors of LoRA" in told


def test_a_model_whose_own_weights_are_called_so_is_a_model(tmp_path: Path) -> None:
    """Phi-4-multimodal ships its factors as weights of the model: both sides have them."""
    more = {
        "model.layers.0.mlp.up_proj.lora_A.vision.weight": torch.ones(2, 16).bfloat16(),
        "model.layers.0.mlp.up_proj.lora_B.vision.weight": torch.ones(24, 2).bfloat16(),
    }
    save(tmp_path / "base", toy(0) | more)
    save(tmp_path / "tuned", toy(1) | {name: tensor * 3 for name, tensor in more.items()})
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    sv.apply(tmp_path / "base", tmp_path / "v.safetensors", tmp_path / "out")
    tuned = load(tmp_path / "tuned")
    assert all(torch.equal(t, tuned[name]) for name, t in load(tmp_path / "out").items())


# ------------------------------------------------------------------- a model beside an adapter


def put_weights(kind: str, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Save a model into a folder that holds an adapter, as a kind of files."""
    model = llama()
    model.load_state_dict(weights)
    if kind == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
        model.config.save_pretrained(folder)
        return
    model.save_pretrained(folder, max_shard_size="5KB" if kind == "shards" else "1GB")
    if kind == "another name":
        os.rename(folder / "model.safetensors", folder / "merged.safetensors")


@pytest.mark.parametrize("kind", ["single", "shards", "pickle", "another name"])
def test_merged_weights_beside_an_adapter_are_a_model(kind: str, tmp_path: Path) -> None:
    folder, expected = trained(tmp_path, target_modules=["q_proj"])
    put_weights(kind, folder / "ad", expected)
    sv.diff(folder / "ad", folder / "base", folder / "v.safetensors")
    sv.apply(folder / "base", folder / "v.safetensors", folder / "tuned")
    found = load(folder / "tuned")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    (note,) = open_checkpoint(folder / "ad").opened.notes
    assert note.startswith("adapter_config.json beside the weights") and "not added" in note


@pytest.mark.parametrize("kind", ["single", "shards", "pickle"])
def test_what_apply_makes_of_them_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    """With the adapter's files beside it, from_pretrained would add the adapter once more."""
    folder, expected = trained(tmp_path, target_modules=["q_proj"])
    put_weights(kind, folder / "ad", expected)
    tuned = {name: tensor + 1 for name, tensor in load(folder / "base").items()}
    save(folder / "more", tuned)
    vector = sv.diff(folder / "more", folder / "base")
    report = sv.apply(folder / "ad", vector, folder / "out")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert report.facts["adapter_files"] == files
    assert set(files) <= set(report.facts["left_behind"])
    assert any("adapter_config.json" in text for text in report.warnings)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor + 1, rtol=0, atol=1e-6)
    for file in files:  # so it is not for nothing that they stay behind
        shutil.copy(folder / "ad" / file, folder / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert any("lora_A" in name for name in again)


def test_an_adapter_in_a_folder_of_the_model_comes_along(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    shutil.copytree(folder / "ad", folder / "base" / "speech-lora")
    report = sv.apply(folder / "base", sv.diff(folder / "base", folder / "base"), folder / "out")
    assert report.facts["adapter_files"] == [] == report.facts["left_behind"]
    assert (folder / "out" / "speech-lora" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "more", ["optimizer.safetensors", "copy.safetensors", "merged.safetensors"]
)
def test_other_safetensors_beside_an_adapter(more: str, tmp_path: Path) -> None:
    """State of a training and factors are no model; a model in parts, or two, are refused."""
    folder, expected = trained(tmp_path, target_modules=["q_proj"])
    if more == "merged.safetensors":
        put_weights("another name", folder / "ad", expected)
        shutil.copy(folder / "ad" / more, folder / "ad" / "other.safetensors")
        told = refusal(SkillvecError, lambda: sv.diff(folder / "ad", folder / "base"))
        assert "2 safetensors files and no model.safetensors.index.json" in told
        return
    shutil.copy(folder / "ad" / "adapter_model.safetensors", folder / "ad" / more)
    sv.apply(folder / "base", folder / "ad", folder / "out")
    assert_merged(folder / "out", expected)


def test_an_empty_adapter_below_the_run_is_sent_to_the_run(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    empty = {name: torch.zeros(0) for name in load_file(folder / "ad/adapter_model.safetensors")}
    below = folder / "checkpoint-5" / "default"
    below.mkdir(parents=True)
    shutil.copy(folder / "ad" / "adapter_config.json", below)
    torch.save(empty, below / "adapter_model.bin")
    (folder / "checkpoint-5" / "global_step5").mkdir()
    told = refusal(IncompatibleError, lambda: sv.SkillVector.open(below))
    assert "4 of 4 tensors are empty" in told
    assert "lie in ../global_step5/: copy adapter_config.json into it" in told


# ------------------------------------------------------------------------------ folders below


def test_an_adapter_two_levels_below_is_named(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    shutil.copytree(folder / "ad", tmp_path / "run" / "actor" / "lora_adapter")
    (tmp_path / "run" / ".cache" / "x").mkdir(parents=True)
    shutil.copy(folder / "ad" / "adapter_config.json", tmp_path / "run" / ".cache" / "x")
    told = refusal(UsageError, lambda: sv.SkillVector.open(tmp_path / "run"))
    assert told.splitlines()[1:] == ["  actor/lora_adapter/: a PEFT adapter"]


@pytest.mark.parametrize(
    "kind", ["a PEFT adapter", "a model", "a model of ranks", "a skill vector"]
)
def test_the_folder_above_names_what_is_in_it(kind: str, tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    above = tmp_path / "above"
    if kind == "a PEFT adapter":
        shutil.copytree(folder / "ad", above / "mix")
    elif kind == "a model":
        shutil.copytree(folder / "base", above / "mix")
    elif kind == "a model of ranks":
        (above / "mix").mkdir(parents=True)
        torch.save(toy(0), above / "mix" / "model_world_size_1_rank_0.pt")
    else:
        save(above / "tuned.safetensors", {"a": torch.ones(9, 9), "b": torch.ones(9, 9)})
        save(above / "base.safetensors", {"a": torch.zeros(9, 9), "b": torch.zeros(9, 9)})
        pair = above / "tuned.safetensors", above / "base.safetensors"
        sv.diff(*pair, above / "mix.safetensors", max_shard_size=500)
        os.rename(above / "mix.safetensors", above / "mix")
        for file in pair:
            file.unlink()
    (above / "logs").mkdir()
    torch.save({"lr": 1e-5}, above / "training_args.bin")
    for words in (
        ["apply", folder / "base", above, "-o", tmp_path / "out"],
        ["diff", above, folder / "base", "-o", tmp_path / "v.safetensors"],
        ["inspect", above],
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 2, result.output
        told = f"  mix/: {kind.removesuffix(' of ranks')}"
        assert told in result.stderr.splitlines(), result.stderr
        assert "logs" not in result.stderr and "training_args" not in result.stderr


def test_a_folder_below_that_may_not_be_read_is_passed_over(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").write_text("")
    real = os.listdir

    def listdir(path: Any) -> Any:
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    told = refusal(UsageError, lambda: open_checkpoint(tmp_path))
    assert told.endswith("in this folder")


def test_an_adapter_below_a_repository_is_named(tmp_path: Path, monkeypatch) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    shutil.copytree(folder / "ad", tmp_path / "repo" / "mix")
    with HubServer() as server:
        server.add_repo("org/adapters", tmp_path / "repo")
        server.adopt(monkeypatch, tmp_path / "home")
        told = refusal(UsageError, lambda: sv.SkillVector.open("org/adapters"))
    assert "download and name the one" in told and "  mix/: a PEFT adapter" in told.splitlines()


def test_a_config_without_weights_is_said(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, target_modules=["q_proj"])
    (folder / "ad" / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "ad" / "training_args.bin")
    told = refusal(UsageError, lambda: sv.SkillVector.open(folder / "ad"))
    assert told.endswith("adapter_config.json, but no adapter_model.safetensors beside it")
