"""Checkpoints: which folders and files are taken as a model, and which are refused by name."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from click.testing import CliRunner
from families import assert_same_bits, load, perturbed, save, toy
from harm import NESTED, lowered
from safetensors.torch import load_file, save_file

import skillvec
from skillvec.checkpoints import opened_by
from skillvec.checkpoints.folder import INDEX
from skillvec.checkpoints.opened import Found, Opened, Opener
from skillvec.checkpoints.opening import open_checkpoint, open_tensors
from skillvec.cli.commands import main
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, UsageError
from skillvec.files.header import TensorSpec


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A model in three shards, fresh for every test so that it can be broken."""
    return save(tmp_path / "model", toy(), shards=3)


def rewrite_index(folder: Path, **changes: object) -> None:
    """Set (or with None remove) entries of the weight map."""
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def message_of(error: type[SkillvecError], ref: str | os.PathLike[str]) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(ref, "base")
    return str(caught.value)


# --------------------------------------------------------------------------- what is taken


def test_shards_single_file_and_folder_are_the_same_model(tmp_path: Path):
    tensors = toy()
    sharded = open_checkpoint(save(tmp_path / "sharded", tensors, shards=3))
    whole = open_checkpoint(save(tmp_path / "whole", tensors))
    file = open_checkpoint(save(tmp_path / "model.safetensors", tensors))
    for checkpoint in (sharded, whole, file):
        assert {name: spec.shape for name, spec in checkpoint.items()} == {
            name: tuple(t.shape) for name, t in tensors.items()
        }
        assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
        assert checkpoint.dtypes == {"BF16": len(tensors)}
    assert sharded.family_digest == whole.family_digest == file.family_digest
    assert [os.path.basename(f) for f in sharded.files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_one_safetensors_file_of_any_name_makes_a_folder_a_model(tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert set(open_checkpoint(folder)) == set(toy())


def test_model_safetensors_wins_over_other_files_beside_it(tmp_path: Path):
    # Mistral and Llama repositories hold consolidated.safetensors beside the transformers weights.
    folder = save(tmp_path / "model", toy())
    save(folder / "consolidated.safetensors", {"other": torch.zeros(2)})
    assert set(open_checkpoint(folder)) == set(toy())


def hub_cache(root: Path, source: Path) -> Path:
    """Lay a folder out as the Hub's cache does: blobs by hash, a snapshot of relative links."""
    blobs = root / "models--org--name" / "blobs"
    snapshot = root / "models--org--name" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_a_snapshot_of_links_works_as_the_folder_itself(shards: int, tmp_path: Path):
    tensors = toy()
    side = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}"}
    plain = save(tmp_path / "plain", tensors, shards=shards, side_files=side)
    tuned = save(tmp_path / "tuned", perturbed(tensors), shards=shards)
    snapshot = hub_cache(tmp_path / "cache", plain)
    skillvec.diff(tuned, snapshot, tmp_path / "v.safetensors")
    skillvec.apply(snapshot, tmp_path / "v.safetensors", tmp_path / "out")
    assert_same_bits(tmp_path / "out", tuned)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    names = {path.name for path in plain.iterdir()}
    assert made == names | {"README.md"}  # names, not hashes
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"


def test_a_file_linked_to_a_blob_works_by_its_own_name(tmp_path: Path):
    snapshot = hub_cache(tmp_path / "cache", save(tmp_path / "plain", toy()))
    checkpoint = open_checkpoint(snapshot / "model.safetensors")
    assert set(checkpoint) == set(toy())


def test_weights_that_a_trainer_rounded_are_taken_with_a_note_on_its_fp32_shards(
    tmp_path: Path, family, capsys
):
    for shards in (1, 3):
        folder = save(tmp_path / f"checkpoint-{shards}", toy(), shards=shards)
        for step in (5, 10, 9):
            (folder / f"global_step{step}").mkdir()
        (note,) = open_checkpoint(folder).facts["notes"]
        assert note.startswith("global_step10/") and "fp32" in note
    assert not open_checkpoint(family.base).facts["notes"]


# ------------------------------------------------------------------------ what is not there


def test_a_path_that_is_not_there_is_a_usage_error_with_role_and_path(tmp_path: Path):
    assert f"base {tmp_path}/absent" in message_of(UsageError, tmp_path / "absent")


def test_an_empty_folder_is_a_usage_error(tmp_path: Path):
    assert "model.safetensors" in message_of(UsageError, tmp_path)


def test_missing_shards_are_named(shards: Path):
    (shards / "model-00002-of-00003.safetensors").unlink()
    message = message_of(FormatError, shards)
    assert "model-00002-of-00003.safetensors" in message
    assert "model-00001-of-00003.safetensors" not in message


def test_a_broken_link_in_place_of_a_shard_is_a_missing_shard(shards: Path):
    # The cache of an interrupted download.
    shard = shards / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to("../../blobs/0123")
    assert shard.name in message_of(FormatError, shards)


def test_a_truncated_shard_is_named(shards: Path):
    shard = shards / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    message = message_of(FormatError, shards)
    assert str(shard) in message and "truncated" in message


def test_shards_without_their_index_are_refused(shards: Path):
    (shards / INDEX).unlink()
    message = message_of(FormatError, shards)
    assert "3 safetensors files" in message and INDEX in message


PARTS = [
    "model-00001-of-00002.safetensors", "model-rank-0-part-0.safetensors", "rank1.safetensors",
    "consolidated.00.safetensors", "shard_3.safetensors", "mp_rank_00_model_states.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_alone_is_no_model_unless_it_is_named(name: str, tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    (folder / "model.safetensors").rename(folder / name)
    message = message_of(FormatError, folder)
    assert f"{name} alone" in message and INDEX in message
    named = open_checkpoint(folder / name)
    assert set(named) == set(toy())
    (note,) = named.facts["notes"]
    assert note.startswith(f"{name}: by its name one part of several")


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00001.safetensors", "pytorch_lora_rank_64.safetensors", "epoch2.safetensors",
     "consolidated.safetensors", "mp3_classifier.safetensors", "shards.safetensors"],
)  # fmt: skip
def test_other_numbers_in_a_name_say_nothing(name: str, tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    (folder / "model.safetensors").rename(folder / name)
    assert set(open_checkpoint(folder)) == set(toy())
    assert not open_checkpoint(folder / name).facts["notes"]


def test_the_target_of_apply_is_shown_with_its_notes(tmp_path: Path, family):
    part = tmp_path / "model-00001-of-00002.safetensors"
    save(part, load(family.base))
    skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    words = ["apply", part, tmp_path / "v.safetensors", "-o", tmp_path / "o.safetensors"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0
    assert f"{part.name}: by its name one part" in " ".join(done.stderr.split())


# ----------------------------------------------------------------------------- hostile indexes


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "./x.safetensors", "", ".", "..",
     3, None, ["x"], True, "x/"],
)  # fmt: skip
def test_an_index_may_name_plain_files_of_its_folder_only(file: object, shards: Path):
    save(shards.parent / "x.safetensors", {"model.norm.weight": torch.zeros(2)})
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (shards / INDEX).write_text(json.dumps(index))
    message = message_of(FormatError, shards)
    assert "'model.norm.weight'" in message and repr(file) in message and INDEX in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}',
     b'{"weight_map": null}', b'{"weight_map": "model.safetensors"}', b"\xff\xfe\x00",
     b'{"weight_map":' + NESTED.encode()],
)  # fmt: skip
def test_a_broken_index_is_a_format_error(content: bytes, shards: Path):
    (shards / INDEX).write_bytes(content)
    with lowered():
        assert INDEX in message_of(FormatError, shards)


def test_index_and_shards_must_tell_the_same(shards: Path):
    rewrite_index(shards, **{"lm_head.weight": None, "phantom": "model-00001-of-00003.safetensors"})
    message = message_of(FormatError, shards)
    assert "lm_head.weight: found in" in message and "not in the index" in message
    assert "phantom: not in model-00001-of-00003.safetensors" in message


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(shards: Path):
    index = json.loads((shards / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    rewrite_index(shards, **{name: other})
    message = message_of(FormatError, shards)
    assert f"{name}: found in {file}, index: {other}" in message


def test_a_tensor_in_two_shards_is_refused(shards: Path):
    extra = load(shards / "model-00001-of-00003.safetensors")
    last = shards / "model-00003-of-00003.safetensors"
    save(last, load(last) | dict(list(extra.items())[:1]))
    assert next(iter(extra)) in message_of(FormatError, shards)


def test_many_problems_are_told_as_five_and_a_count(shards: Path):
    names = [f"phantom.{i}" for i in range(12)]
    rewrite_index(shards, **dict.fromkeys(names, "model-00001-of-00003.safetensors"))
    message = message_of(FormatError, shards)
    assert message.count("phantom.") == 5 and "and 7 more" in message


def test_a_single_file_beside_an_index_over_others_is_refused(shards: Path):
    save(shards / "model.safetensors", toy())
    message = message_of(FormatError, shards)
    assert "model.safetensors" in message and INDEX in message


def test_an_index_over_the_single_file_is_taken(tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    weight_map = dict.fromkeys(toy(), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(folder)) == set(toy())


# ---------------------------------------------------------------------- kinds that are not taken


@pytest.mark.parametrize(
    ("file", "word"),
    [("model-Q4_K_M.gguf", "convert_hf_to_gguf"), ("model.onnx", "ONNX"),
     ("tf_model.h5", "from_tf"), ("flax_model.msgpack", "Flax"), ("model.nemo", "NeMo"),
     ("weights.npz", "numpy")],
)  # fmt: skip
@pytest.mark.parametrize("as_folder", [True, False])
def test_weights_in_other_formats_are_refused_by_name(
    file: str, word: str, as_folder: bool, tmp_path: Path
):
    (tmp_path / file).write_bytes(b"\x80\x02PK")
    (tmp_path / "config.json").write_text("{}")
    message = message_of(IncompatibleError, tmp_path if as_folder else tmp_path / file)
    assert file in message and word in message


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_what_is_no_pickle_of_torch_is_refused(file: str, as_folder: bool, tmp_path: Path):
    (tmp_path / file).write_bytes(b"\x80\x02PK")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((IncompatibleError, FormatError), match=file.replace(".", r"\.")):
        open_checkpoint(tmp_path if as_folder else tmp_path / file, "base")


def test_an_adapter_is_refused_as_one(tmp_path: Path):
    save(tmp_path / "adapter" / "adapter_model.safetensors", {"lora_A": torch.zeros(2, 2)})
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter" in message_of(IncompatibleError, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("quantization", "word"),
    [({"quant_method": "gptq"}, "gptq"), ({"quant_method": "awq"}, "awq"),
     ({"bits": 4}, "quantization_config"), ("int8", "quantization_config")],
)  # fmt: skip
def test_a_quantised_model_is_refused_by_its_method(
    quantization: object, word: str, tmp_path: Path
):
    config = {"model_type": "toy", "quantization_config": quantization}
    message = message_of(IncompatibleError, save(tmp_path / "model", toy(), config=config))
    assert word in message and "dequantise" in message


def test_a_quantised_text_model_inside_a_larger_one_is_refused(tmp_path: Path):
    config = {
        "model_type": "toy_vl",
        "text_config": {"quantization_config": {"quant_method": "gptq"}},
    }
    assert "gptq" in message_of(IncompatibleError, save(tmp_path / "model", toy(), config=config))


def test_a_quantised_model_that_is_not_taken_is_described_with_a_warning(tmp_path: Path):
    config = {"model_type": "toy", "quantization_config": {"quant_method": "gptq"}}
    folder = save(tmp_path / "model", toy(), config=config)
    report = skillvec.inspect(folder)
    assert {line["name"] for line in report.ledger} == set(toy())
    assert report.facts["model_type"] == "toy"
    (warning,) = report.warnings
    assert "gptq" in warning and "dequantise" in warning


def test_a_dtype_that_no_arithmetic_is_for_is_refused_naming_tensors(tmp_path: Path):
    phases = torch.zeros(3, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    folder = save(tmp_path / "model", toy() | {"phases": phases})
    assert "phases: F8_E8M0" in message_of(IncompatibleError, folder)
    assert len(skillvec.inspect(folder).ledger) == len(toy()) + 1


def test_fp8_weights_with_scales_are_refused_naming_tensors(tmp_path: Path):
    # No quantization_config: a single file has no config, and some stacks write none.
    weights = {f"layers.{i}.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn) for i in range(7)}
    scales = {f"layers.{i}.weight_scale_inv": torch.ones(1, 1) for i in range(7)}
    message = message_of(IncompatibleError, save(tmp_path / "m.safetensors", weights | scales))
    assert "layers.0.weight: F8_E4M3" in message and "and 2 more" in message


def test_a_vector_is_no_model_and_a_model_is_no_vector(tmp_path: Path, family):
    vector = tmp_path / "skill.safetensors"
    skillvec.diff(family.tuned, family.base, vector)
    for role, call in {
        "tuned": lambda: skillvec.diff(vector, family.base, tmp_path / "x.safetensors"),
        "base": lambda: skillvec.diff(family.tuned, vector, tmp_path / "x.safetensors"),
        "target": lambda: skillvec.apply(vector, vector, tmp_path / "x.safetensors"),
    }.items():
        with pytest.raises(
            IncompatibleError, match=f"{role} .*is a skill vector, expected a model"
        ):
            call()
    with pytest.raises(IncompatibleError, match="not a skill vector"):
        skillvec.apply(family.target, family.tuned, tmp_path / "x")
    with pytest.raises(IncompatibleError, match="not a skill vector"):
        skillvec.orthogonality(vector, family.tuned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["skill.safetensors"]


def test_a_folder_holding_only_a_vector_is_no_model(tmp_path: Path, family):
    (tmp_path / "folder").mkdir()
    skillvec.diff(family.tuned, family.base, tmp_path / "folder" / "skill.safetensors")
    assert "is a skill vector" in message_of(IncompatibleError, tmp_path / "folder")


# -------------------------------------------------------------------------------- broken configs


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"toy"', b"\xff\xfe", b'{"a":' + NESTED.encode()]
)
def test_a_broken_config_is_a_format_error(content: bytes, tmp_path: Path):
    folder = save(tmp_path / "model", toy())
    (folder / "config.json").write_bytes(content)
    with lowered():
        assert str(folder / "config.json") in message_of(FormatError, folder)


@pytest.mark.parametrize(
    "config",
    [{"model_type": 3}, {"model_type": ["toy"]}, {"text_config": []}, {"text_config": "x"},
     {"tie_word_embeddings": "no"}, {"quantization_config": None}, {"é": "\ud800"}],
)  # fmt: skip
def test_odd_values_in_a_config_do_no_harm(config: dict, tmp_path: Path):
    base = save(tmp_path / "base", toy(), config=config)
    tuned = save(tmp_path / "tuned", perturbed(toy()), config=config)
    skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    skillvec.inspect(tmp_path / "v.safetensors")
    skillvec.inspect(base)


# --------------------------------------------------------------------------- tied embeddings

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def model_of(kind: str, **keys: bool | None):
    """Return a small model; `outer` and `inner` are tie_word_embeddings of it and of its text."""
    import transformers

    outer = {} if keys.get("outer") is None else {"tie_word_embeddings": keys["outer"]}
    inner = {} if keys.get("inner") is None else {"tie_word_embeddings": keys["inner"]}
    config: dict = TEXT | outer
    if kind == "Qwen3VL":
        config = {"text_config": TEXT | inner, "vision_config": VISION, **outer}
    elif kind == "Qwen2_5_VL":
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                  "out_hidden_size": 32}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        text = TEXT | inner | {"rope_parameters": rope}
        config = {"text_config": text, "vision_config": vision, **outer}
    elif kind == "Llava":
        text = TEXT | inner | {"model_type": "llama"}
        vision = TOWER | {"model_type": "clip_vision_model"}
        config = {"text_config": text, "vision_config": vision, **outer}
    elif kind == "GPT2":
        config = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, **outer}
    kinds = {"GPT2": "GPT2LMHeadModel", "Bert": "BertModel"}
    tail = "ForConditionalGeneration" if "text_config" in config else "ForCausalLM"
    made = getattr(transformers, kinds.get(kind, f"{kind}{tail}"))
    torch.manual_seed(0)
    return made(getattr(transformers, f"{kind}Config")(**config))


KEYS = [(outer, inner) for outer in (None, True, False) for inner in (None, True, False)]
VISION_LANGUAGE = ["Qwen3VL", "Qwen2_5_VL", "Llava"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "outer", "inner"),
    [*((kind, *keys) for kind in VISION_LANGUAGE for keys in KEYS),
     *((kind, outer, None) for kind in ("GPT2", "Llama", "Gemma", "Bert")
       for outer in (None, True, False))],
)  # fmt: skip
def test_embeddings_are_tied_where_transformers_ties_them(
    tmp_path: Path, kind: str, outer: bool | None, inner: bool | None
):
    model = model_of(kind, outer=outer, inner=inner)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, key in ((config, outer), (config.get("text_config", {}), inner)):
        if key is None:  # as those have it who leave defaults out
            part.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path)
    head, embeddings = again.get_output_embeddings(), again.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    facts = skillvec.inspect(tmp_path).facts
    assert facts["ties_embeddings"] is tied
    if head is not None:
        assert open_checkpoint(tmp_path).ties_embeddings in (tied, None)


def test_a_head_that_is_stored_though_the_config_ties_it_is_not_judged_by_its_header(
    tmp_path: Path,
):
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 64}
    config["architectures"] = ["LlamaForCausalLM"]
    table = torch.ones(64, 4)
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save(tmp_path / "both", both, config=config)
    assert skillvec.inspect(tmp_path / "both").facts["ties_embeddings"] is None
    renamed = {"model.embed_tokens.weight": table, "output.weight": table.clone()}
    save(tmp_path / "renamed", renamed, config=config)
    assert skillvec.inspect(tmp_path / "renamed").facts["ties_embeddings"] is None
    save(tmp_path / "one", {"model.embed_tokens.weight": table}, config=config)
    assert skillvec.inspect(tmp_path / "one").facts["ties_embeddings"] is True
    words = CliRunner().invoke(main, ["inspect", str(tmp_path / "both")]).output
    assert "embeddings tied: unknown" in words


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": None}, {"tie_word_embeddings": "yes"}, {"tie_word_embeddings": []},
        {"text_config": {"tie_word_embeddings": True}}, {"text_config": 3},
        {"model_type": "no such model"}, {"architectures": 3}, {"architectures": [None]},
        {"vocab_size": "64"}, {"vocab_size": True}, {"num_hidden_layers": 1 << 40},
        {"model_type": "qwen3_vl", "text_config": {"num_hidden_layers": 1 << 40}},
        {"model_type": "vision-encoder-decoder"}, {"model_type": "gemma", "head_dim": "x"},
    ],
)  # fmt: skip
def test_odd_configs_tell_nothing_of_ties_and_do_no_harm(tmp_path: Path, config: dict):
    save(tmp_path, {"embed.weight": torch.ones(64, 4)}, config={"model_type": "llama"} | config)
    report = skillvec.inspect(tmp_path)
    assert report.facts["ties_embeddings"] in (None, False)


def test_where_config_keys_disagree_the_bytes_decide(tmp_path: Path):
    # A head that only the tuned model stores, as a copy of its embeddings: the base ties it.
    config = {"model_type": "toy", "vocab_size": 64, "text_config": {"tie_word_embeddings": True}}
    table = torch.arange(256.0).reshape(64, 4)
    sides = {"model.embed.weight": table, "model.norm.weight": torch.ones(4)}
    for own, refused in ((None, False), (True, False), (False, False), ("alone", True)):
        said = config | ({} if own is None else {"tie_word_embeddings": own})
        if own == "alone":  # nothing speaks against it
            said = {"model_type": "toy", "tie_word_embeddings": False}
        base = save(tmp_path / f"base {own}", sides, config=said)
        head = {"lm_head.weight": table + 1, "model.embed.weight": table + 1}
        tuned = save(tmp_path / f"tuned {own}", sides | head, config=said)
        if refused:
            with pytest.raises(IncompatibleError, match=r"lm_head.weight .*: only in"):
                skillvec.diff(tuned, base)
        else:
            assert skillvec.diff(tuned, base).manifest["tied"] == {
                "lm_head.weight": "model.embed.weight"
            }


def test_config_identity_ignores_who_wrote_it(tmp_path: Path):
    one = save(tmp_path / "one", toy(), config={"a": 1, "transformers_version": "4.51.0"})
    other = save(tmp_path / "other", toy(), config={"transformers_version": "5.0", "a": 1})
    third = save(tmp_path / "third", toy(), config={"a": 2})
    digests = [open_checkpoint(folder).config_digest for folder in (one, other, third)]
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------------ side files

COPIED = {
    "tokenizer.json": b"{}", "tokenizer_config.json": b"{ }\n",
    "chat_template.jinja": b"{{ x }}\r\n", "generation_config.json": b'{"eos_token_id": [1]}',
    "README.md": b"# model\n",
    "modeling_toy.py": b"class Toy: ...\n", "tokenizer.model": bytes(range(256)), "empty.txt": b"",
    "additional_chat_templates/tool_use.jinja": b"{% if tools %}", "1_Pooling/config.json": b"{}",
    ".gitattributes": b"*.safetensors lfs", "training_args.bin": b"\x80",
    "model.gguf": b"", "2_Dense/model.safetensors": b"", "onnx/model.onnx": b"",
}  # fmt: skip
LEFT = {
    "consolidated.safetensors": b"", "pytorch_model.bin": b"",
    "pytorch_model-00001-of-00002.bin": b"",
    "pytorch_model.bin.index.json": b"{}", "optimizer.pt": b"", "rng_state.pth": b"",
    "tf_model.h5": b"", "flax_model.msgpack": b"",
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
def test_side_files_are_copied_byte_for_byte_and_states_and_old_weights_are_listed(
    shards: int, tmp_path: Path, family
):
    target = save(tmp_path / "target", toy(3), shards=shards)
    for name, content in (COPIED | LEFT).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    (target / "tool.sh").write_text("#!/bin/sh\n")
    (target / "tool.sh").chmod(0o755)
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    vector = skillvec.diff(family.tuned, family.base)
    report = skillvec.apply(target, vector, tmp_path / "out")
    for name, content in COPIED.items():
        written = (tmp_path / "out" / name).read_bytes()
        if name == "README.md":  # a card is written above it
            assert written.endswith(b"\n" + content) and b"skillvec apply" in written
        else:
            assert written == content, name
    assert (tmp_path / "out" / "tool.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "config.json").read_bytes() == (target / "config.json").read_bytes()
    for name in (*LEFT, ".git"):
        assert not (tmp_path / "out" / name).exists(), name
    assert sorted(report.facts["left_behind"]) == sorted(LEFT)
    written = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    weights = {path.name for path in target.glob("model*")} - {"model.gguf"}
    assert written == {*COPIED, *weights, "config.json", "tool.sh"}


def test_the_index_is_kept_byte_for_byte_where_sizes_stay(tmp_path: Path, family):
    skillvec.apply(family.target, skillvec.diff(family.tuned, family.base), tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (family.target / INDEX).read_bytes()


def test_the_index_of_another_dtype_states_the_new_size(tmp_path: Path, family):
    vector = skillvec.diff(family.tuned, family.base)
    skillvec.apply(family.target, vector, tmp_path / "out", dtype="fp32")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == json.loads((family.target / INDEX).read_text())["weight_map"]
    total = sum(t.nbytes for t in load(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == total


def test_a_linked_subfolder_is_not_lost(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3))
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool.jinja").write_text("{{ tool }}")
    (target / "templates").symlink_to(tmp_path / "templates")
    vector = skillvec.diff(family.tuned, family.base)
    try:
        skillvec.apply(target, vector, tmp_path / "out")
    except SkillvecError as error:
        assert "templates" in str(error)  # refusing is right too; losing it silently is not
    else:
        assert (tmp_path / "out" / "templates" / "tool.jinja").read_text() == "{{ tool }}"


def test_a_linked_subfolder_that_leads_in_a_circle_ends(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3))
    (target / "self").symlink_to(target)
    try:
        skillvec.apply(target, skillvec.diff(family.tuned, family.base), tmp_path / "out")
    except SkillvecError as error:
        assert "self" in str(error)


def test_a_broken_link_among_the_side_files_is_named(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3))
    (target / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        skillvec.apply(target, skillvec.diff(family.tuned, family.base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_file_target_writes_one_file_alone(tmp_path: Path, family):
    target = save(tmp_path / "folder" / "target.safetensors", toy(3))
    (tmp_path / "folder" / "notes.txt").write_text("not mine to copy")
    vector = skillvec.diff(family.tuned, family.base)
    skillvec.apply(target, vector, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out.safetensors"]


# ---------------------------------------------------------------------------------- mapping laws


def test_a_checkpoint_is_a_read_only_mapping(family):
    checkpoint = open_checkpoint(family.target)
    assert len(checkpoint) == len(list(checkpoint)) == len(toy())
    assert "lm_head.weight" in checkpoint and "absent" not in checkpoint
    with pytest.raises(TypeError):
        checkpoint["x"] = 1  # type: ignore[index]
    assert str(len(checkpoint)) in repr(checkpoint)


def test_every_spec_points_at_the_bytes_of_its_tensor(family):
    official = load(family.target)
    for name, spec in open_checkpoint(family.target).items():
        with Path(spec.path).open("rb") as file:
            file.seek(spec.start)
            content = file.read(spec.nbytes)
        assert content == official[name].view(torch.uint8).numpy().tobytes()


def test_metadata_of_others_under_our_key_is_not_a_vector(tmp_path: Path):
    for i, text in enumerate(["", "null", "[]", "{}", '{"kind": 3}', "{", NESTED, "NaN"]):
        file = save(tmp_path / f"{i}.safetensors", {"w": torch.zeros(2)}, {"skillvec": text})
        with lowered():
            assert set(open_checkpoint(file)) == {"w"}
            assert skillvec.inspect(file).facts["kind"] == "model"


def test_names_with_odd_characters_are_carried(tmp_path: Path):
    names = ["", " ", "a/b", "a/../b", "größe", "日本.weight", 'q"\\', "a\tb", "*", "[a]"]
    tensors = {name: np.full((3,), i, np.float32) for i, name in enumerate(names)}
    base = save(tmp_path / "base", tensors)
    tuned = save(tmp_path / "tuned", {name: t + 1 for name, t in tensors.items()})
    skillvec.diff(tuned, base, tmp_path / "v.safetensors")
    skillvec.apply(base, tmp_path / "v.safetensors", tmp_path / "out")
    assert_same_bits(tmp_path / "out", tuned)
    with safetensors.safe_open(tmp_path / "v.safetensors", "np") as file:
        assert set(names) <= set(file.keys())


def test_open_tensors_takes_both_kinds(tmp_path: Path, family):
    skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
    assert "skillvec.blocks" in open_tensors(tmp_path / "v.safetensors", "input")
    assert "lm_head.weight" in open_tensors(family.base, "input")


def adapter_beside(folder: Path, **files: dict[str, torch.Tensor]) -> Path:
    """Return a folder with an adapter of a base of one matrix, and other files."""
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    factors = {f"base_model.model.q.lora_{side}.weight": torch.ones(*shape)
               for side, shape in (("A", (1, 3)), ("B", (2, 1)))}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter_model.safetensors")
    for name, tensors in files.items():
        path = folder / name
        (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return folder


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_head_of_values_beside_an_adapter_is_no_model(name: str, tmp_path: Path):
    head = {"v_head.summary.weight": torch.ones(1, 3), "v_head.summary.bias": torch.ones(1)}
    base = tmp_path / "base.safetensors"
    save_file({"q.weight": torch.zeros(2, 3)}, base)
    folder = adapter_beside(tmp_path / "lora", **{name: head})
    skillvec.apply(base, folder, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["q.weight"], torch.ones(2, 3))
    report = skillvec.inspect(folder)
    assert report.facts["kind"] == "adapter" and len(report.ledger) == 2
    notes = open_tensors(folder, "input").facts["notes"]
    assert notes == [f"{name}: a head of values beside the adapter, left out"]
    # with one more weight it is a model, if it has the name of one
    more = adapter_beside(tmp_path / "more", **{name: head | {"q.weight": torch.ones(2, 3)}})
    kind = skillvec.inspect(more).facts["kind"]
    assert kind == ("adapter" if name == "value_head.bin" else "model")


def test_several_files_beside_an_adapter_are_named_with_it(tmp_path: Path):
    files = {f"{name}.safetensors": {f"{name}.weight": torch.ones(2)} for name in ("one", "two")}
    folder = adapter_beside(tmp_path / "lora", **files)
    said = "which tensors are the model? adapter_config.json lies there too: an adapter is used"
    with pytest.raises(FormatError, match=re.escape(said) + r".* name it:\n  one.safetensors"):
        open_checkpoint(folder)


# --------------------------------------------------------------------------- the table of openers


def test_a_format_is_one_row_of_the_table(tmp_path: Path, monkeypatch):
    """What a newcomer adds: a test by names, a function from Found to Opened, and a row."""
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "a.toy", tmp_path / "folder" / "b.toy", tmp_path / "folder" / "c.bin"):
        file.write_bytes(bytes(8))

    def open_toy(found: Found) -> Opened:
        (name,) = found.names if found.is_file else found.ending(".toy")
        spec = TensorSpec("w", "F32", (2,), found.files[name], 0, 8)
        return Opened({"w": spec}, format="toy", notes=(f"of {found.what}",))

    toy_row = Opener("toy", (".toy",), lambda found: bool(found.ending(".toy")), open_toy)
    for place in (tmp_path / "a.toy", tmp_path / "folder"):
        with pytest.raises((FormatError, IncompatibleError)):
            open_tensors(place, "input")
        with monkeypatch.context() as patch:
            patch.setattr(opened_by, "OPENERS", (toy_row, *opened_by.OPENERS))
            opened = open_tensors(place, "input")
            assert (opened.format, list(opened), opened.is_plain) == ("toy", ["w"], False)
            assert opened.opened.notes == (f"of input {place}",)
            assert opened.facts["format"] == "toy"


def test_endings_of_files_that_openers_take_are_never_names_of_the_hub(monkeypatch):
    def asked(ref: str, role: str) -> None:
        raise AssertionError(f"the Hub is asked for {ref}")

    monkeypatch.setattr("skillvec.remote.hub.locate", asked)
    names = {row.name for row in opened_by.OPENERS}
    assert len(names) == len(opened_by.OPENERS) and len(opened_by.SUFFIXES) > 8
    for suffix in opened_by.SUFFIXES:
        with pytest.raises(UsageError, match=r"no such file$"):
            open_checkpoint(f"org/model{suffix}")
