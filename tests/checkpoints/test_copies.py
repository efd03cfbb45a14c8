"""Weights that a model ties under more than two names, and tensors that are alike and not tied."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import assert_same_bits, load, perturbed, save, toy
from zoo import build, save_memory

import skillvec as sv
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.ties import VARIED, find_tied
from skillvec.errors import IncompatibleError

UDOP = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "image_size": 8, "patch_size": 4, "max_2d_position_embeddings": 16,
        "decoder_start_token_id": 0}  # fmt: skip
SHARED, HEAD = "shared.weight", "lm_head.weight"


def refusal(call: Any) -> str:
    with pytest.raises(IncompatibleError) as caught:
        call()
    return str(caught.value)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def lines_of(report: sv.Report, status: str) -> set[str]:
    return {line["name"] for line in report.ledger if line["status"] == status}


def model_of(kind: str) -> transformers.PreTrainedModel:
    if kind == "Udop":
        torch.manual_seed(0)
        return transformers.UdopForConditionalGeneration(transformers.UdopConfig(**UDOP))
    return build(f"{kind}ForConditionalGeneration", tied=True)


def moved(model: transformers.PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)


def kept_twice(folder: Path, kind: str, drop: tuple[str, ...] = ()) -> set[str]:
    """Save base and tuned as transformers does ("once") and with all names ("all").

    Keys in `drop` are taken from the configs. Returns the names that only the second have.
    """
    model, names = model_of(kind), set[str]()
    for side in ("base", "tuned"):
        model.save_pretrained(folder / f"once_{side}")
        config = {k: v for k, v in config_of(folder / f"once_{side}").items() if k not in drop}
        (folder / f"once_{side}" / "config.json").write_text(json.dumps(config))
        contents = {name: t.clone() for name, t in model.state_dict().items()}
        save(folder / f"all_{side}", contents, config=config)
        names = set(contents) - set(load(folder / f"once_{side}"))
        moved(model)
    return names


@pytest.mark.parametrize("kind", ["T5", "Bart", "Udop"])
def test_files_may_differ_by_any_number_of_tied_copies(kind: str, tmp_path: Path) -> None:
    """Udop ties tensors of its numbered layers, too, and a bias."""
    names = kept_twice(tmp_path, kind)
    assert len(names) > 2 and (kind != "Udop" or any(".0." in name for name in names))
    for tuned, base in (("all", "once"), ("once", "all"), ("all", "all")):
        vector = tmp_path / f"{tuned}_{base}.safetensors"
        made = sv.diff(tmp_path / f"{tuned}_tuned", tmp_path / f"{base}_base", vector)
        tied = set() if tuned == base else names
        assert lines_of(made.report, "tied") == tied
        pair = f"{tmp_path}/{tuned}_tuned::{tmp_path}/{base}_base"
        for target in ("once", "all"):
            for given in (vector, pair) if tuned == base else (vector,):
                report = sv.apply(tmp_path / f"{target}_base", given, tmp_path / "out", force=True)
                assert_same_bits(tmp_path / "out", tmp_path / f"{target}_tuned")
                if tuned == base and target == "once":
                    assert lines_of(report, "tied") == names
    vectors = [tmp_path / f"all_{base}.safetensors" for base in ("all", "once")]
    assert lines_of(sv.orthogonality(*vectors), "tied") == names


# as released before transformers wrote the key: the class ties
OLD = ("tie_word_embeddings", "scale_decoder_outputs")


@pytest.mark.parametrize("drop", [(), OLD], ids=["said", "default"])
def test_copies_that_move_alike_stay_tied(drop: tuple[str, ...], tmp_path: Path) -> None:
    """T5 scales what goes into its head where the config ties it: untied, it is another model."""
    kept_twice(tmp_path, "T5", drop)
    base, vector = tmp_path / "all_base", tmp_path / "v.safetensors"
    sv.diff(tmp_path / "all_tuned", base, vector)
    sv.combine(vector, vector, output=tmp_path / "sum.safetensors", weights=[0.5, 0.5])
    pair = f"{tmp_path}/all_tuned::{base}"
    for number, given in enumerate((vector, pair, tmp_path / "sum.safetensors")):
        out = tmp_path / f"out{number}"
        sv.apply(base, given, out)
        assert config_of(out).get("tie_word_embeddings") is (None if drop else True)
        assert_same_bits(out, tmp_path / "all_tuned")
    contents = load(tmp_path / "all_tuned")
    contents[HEAD] += 1
    save(tmp_path / "apart", contents, config=config_of(tmp_path / "all_tuned"))
    sv.diff(tmp_path / "apart", base, tmp_path / "w.safetensors")
    sv.apply(base, tmp_path / "w.safetensors", tmp_path / "untied")
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False


# ------------------------------------------------------------------------------------- patches


def lists(names: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return a patch that puts a value at position 3 of each tensor."""
    at = {f"{name}.indices": torch.tensor([3], dtype=torch.int32) for name in names}
    return at | {f"{name}.values": torch.tensor([value]) for name, value in names.items()}


@pytest.mark.parametrize("drop", [(), OLD], ids=["said", "default"])
def test_a_patch_of_one_tied_copy_changes_all(drop: tuple[str, ...], tmp_path: Path) -> None:
    names = {SHARED, *kept_twice(tmp_path, "T5", drop)}
    start = load(tmp_path / "all_base")[SHARED]
    for sent in ([SHARED], [HEAD], [SHARED, HEAD], sorted(names)):
        patch = save(tmp_path / "p.safetensors", lists(dict.fromkeys(sent, 5.0)))
        vector = sv.import_patch(
            patch, tmp_path / "all_base", tmp_path / "v.safetensors", force=True
        )
        sv.apply(tmp_path / "all_base", vector, tmp_path / "out", force=True)
        found = load(tmp_path / "out")
        for name in names:
            changed = (found[name] != start).flatten().nonzero().flatten()
            assert changed.tolist() == [3] and found[name].flatten()[3] == 5, name
        assert config_of(tmp_path / "out").get("tie_word_embeddings") is (None if drop else True)
    patch = save(tmp_path / "p.safetensors", lists({SHARED: 5.0, HEAD: 6.0}))
    told = refusal(
        lambda: sv.import_patch(patch, tmp_path / "all_base", tmp_path / "w.safetensors")
    )
    assert "one weight with" in told and "different lists" in told


def test_a_patch_by_names_in_memory_changes_the_stored_head(tmp_path: Path) -> None:
    model = build("Gemma3ForConditionalGeneration", tied=True)
    model.save_pretrained(tmp_path / "base")
    (embedding,) = (n for n in load(tmp_path / "base") if n.endswith("embed_tokens.weight"))
    head = "language_model.lm_head.weight"
    stored = load(tmp_path / "base")
    stored[head] = stored[embedding].clone()
    base = save(tmp_path / "both", stored, config=config_of(tmp_path / "base"))
    memory = {"model.language_model.embed_tokens.weight": 5.0}
    assert not set(memory) & set(stored)
    patch = save(tmp_path / "p.safetensors", lists(memory))
    sv.apply(base, sv.import_patch(patch, base, tmp_path / "v.safetensors"), tmp_path / "out")
    found = load(tmp_path / "out")
    assert found[embedding].flatten()[3] == 5 and torch.equal(found[head], found[embedding])


# ------------------------------------------------------------------------------ alike, not tied

LAYERED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24,
           "intermediate_size": 48, "vocab_size": 40, "num_attention_heads": 2,
           "tie_word_embeddings": True}  # fmt: skip


def deeper(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with a third layer that is a copy of the second."""
    more = {n.replace(".1.", ".2."): t.clone() for n, t in tensors.items() if ".1." in n}
    return tensors | more


def test_a_layer_that_is_a_copy_is_no_tied_weight(tmp_path: Path) -> None:
    """However often a file has it: a model with another number of layers is another model."""
    base = toy(0)
    del base[HEAD]
    for side, tensors in (("base", base), ("tuned", perturbed(base))):
        save(tmp_path / side, tensors, config=LAYERED | {"num_hidden_layers": 2})
        deep = deeper(tensors)
        save(tmp_path / f"deep_{side}", deep, config=LAYERED | {"num_hidden_layers": 3})
    name = "model.layers.2.self_attn.q_proj.weight"
    for sides in (("deep_tuned", "base"), ("tuned", "deep_base")):
        told = refusal(lambda sides=sides: sv.diff(*(tmp_path / side for side in sides)))
        assert f"{name} [24, 24]: only in" in told
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    sv.diff(tmp_path / "deep_tuned", tmp_path / "deep_base", tmp_path / "w.safetensors")
    pairs = [f"{tmp_path}/{mark}tuned::{tmp_path}/{mark}base" for mark in ("", "deep_")]
    for flat, deep in ((tmp_path / "v.safetensors", tmp_path / "w.safetensors"), pairs):
        for target, vector in (("deep_base", flat), ("base", deep)):
            told = refusal(
                lambda target=target, vector=vector: sv.apply(
                    tmp_path / target, vector, tmp_path / "out"
                )
            )
            assert f"{name} [24, 24]: only in the" in told
        for two in ((flat, deep), (deep, flat)):
            assert f"{name} [24, 24]: not in" in refusal(lambda two=two: sv.orthogonality(*two))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_matrices_of_few_values_are_not_tied_because_they_are_alike(
    value: float, tmp_path: Path
) -> None:
    """A classifier that begins at zero, as token types do, is none of them."""
    config = {"model_type": "bert", "architectures": ["BertForPreTraining"],
              "tie_word_embeddings": True}  # fmt: skip
    same, more = torch.full((2, 24), value), torch.full((2, 24), value)
    types, lost = "bert.embeddings.token_type_embeddings.weight", "cls.seq_relationship.weight"
    base = {types: same, "bert.x.weight": torch.randn(24, 24)}
    tuned = {name: t + 0.25 for name, t in base.items()}
    for side, tensors, also in (("base", base, more), ("tuned", tuned, tuned[types])):
        save(tmp_path / side, tensors, config=config)
        save(tmp_path / f"{side}_", tensors | {lost: also.clone()}, config=config)
    for sides in (("tuned", "base_"), ("tuned_", "base")):
        told = refusal(lambda sides=sides: sv.diff(*(tmp_path / side for side in sides)))
        assert f"{lost} [2, 24]: only in" in told
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    sv.diff(tmp_path / "tuned_", tmp_path / "base_", tmp_path / "w.safetensors")
    for target, vector in (("base_", "v"), ("base", "w")):
        told = refusal(
            lambda target=target, vector=vector: sv.apply(
                tmp_path / target, tmp_path / f"{vector}.safetensors", tmp_path / "out"
            )
        )
        assert f"{lost} [2, 24]: only in the" in told


def test_bytes_tell_of_matrices_of_many_values_wherever_they_stand(tmp_path: Path) -> None:
    """Rows of padding, and the unused end of a vocabulary, are all zeros."""
    embedding = torch.zeros(60, 100)
    embedding[30, :VARIED] = torch.arange(VARIED)
    few = torch.zeros(60, 100).index_fill_(0, torch.tensor([30]), 1)
    content = {"a": embedding, "b": embedding.clone(), "c": embedding.clone(), "x": few,
               "y": few.clone(), "m.0.w": embedding.clone()}  # fmt: skip
    model = open_checkpoint(save(tmp_path / "model.safetensors", content))
    assert find_tied(model, "a") == ["b", "c"]
    assert find_tied(model, "a", {"c", "x"}) == ["c"]
    assert find_tied(model, "x") == find_tied(model, "m.0.w") == []


def test_an_ordinary_head_is_told_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toy(0)
    base[HEAD] = base["model.embed_tokens.weight"].clone()
    tuned = perturbed(base)
    tuned[HEAD] = tuned["model.embed_tokens.weight"].clone()
    for side, tensors in (("base", base), ("tuned", tuned)):
        once = {name: t for name, t in tensors.items() if name != HEAD}
        save(tmp_path / side, tensors, config=LAYERED | {"num_hidden_layers": 2})
        save(tmp_path / f"once_{side}", once, config=LAYERED | {"num_hidden_layers": 2})
    monkeypatch.setattr("skillvec.checkpoints.ties._class_of", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for tuned, base, target in (("tuned", "once_base", "base"), ("tuned", "base", "once_base")):
        vector = tmp_path / f"{base}.safetensors"
        sv.diff(tmp_path / tuned, tmp_path / base, vector)
        sv.apply(tmp_path / target, vector, tmp_path / f"{target}_out")
        assert_same_bits(tmp_path / f"{target}_out", tmp_path / target.replace("base", "tuned"))


# ------------------------------------------------------------------------- under other names


def test_heads_that_are_stored_in_another_layout(tmp_path: Path) -> None:
    """A head that the files of one side have under their name, the other has not or in memory's."""
    model, head = (
        build("Gemma3ForConditionalGeneration", tied=True),
        "language_model.lm_head.weight",
    )
    for side in ("base", "tuned"):
        model.save_pretrained(tmp_path / side)
        save_memory(model, tmp_path / f"memory_{side}")
        for folder, name in ((side, head), (f"memory_{side}", HEAD)):
            tensors = load(tmp_path / folder)
            (embedding,) = (n for n in tensors if n.endswith("embed_tokens.weight"))
            tensors[name] = tensors[embedding].clone()
            save(tmp_path / f"{folder}_h", tensors, config=config_of(tmp_path / folder))
        moved(model)
    for tuned, base in (("tuned_h", "base_h"), ("memory_tuned_h", "base"), ("tuned", "base")):
        vector = tmp_path / f"{tuned}.safetensors"
        sv.diff(tmp_path / tuned, tmp_path / base, vector)
        for target in ("base", "base_h", "memory_base", "memory_base_h"):
            sv.apply(tmp_path / target, vector, tmp_path / "out", force=True)
            expected = tmp_path / target.replace("base", "tuned")
            assert_same_bits(tmp_path / "out", expected)
            assert config_of(tmp_path / "out")["text_config"]["tie_word_embeddings"] is True


def test_a_combination_moves_alike_what_each_of_its_parts_does(tmp_path: Path) -> None:
    """One part leaves the head out: it moves by the other alone, and is no copy any more."""
    base = toy(0)
    base[HEAD] = base["model.embed_tokens.weight"].clone()
    config = LAYERED | {"num_hidden_layers": 2}
    save(tmp_path / "base", base, config=config)
    for number in (1, 2):
        tuned = perturbed(base, number)
        tuned[HEAD] = tuned["model.embed_tokens.weight"].clone()
        save(tmp_path / f"tuned{number}", tuned, config=config)
    sv.diff(tmp_path / "tuned1", tmp_path / "base", tmp_path / "v.safetensors")
    for number, exclude in enumerate(([], ["lm_head*"])):
        second = tmp_path / f"w{number}.safetensors"
        sv.diff(tmp_path / "tuned2", tmp_path / "base", second, exclude=exclude)
        both = sv.SkillVector.open(tmp_path / "v.safetensors") + sv.SkillVector.open(second)
        sv.apply(tmp_path / "base", both, tmp_path / f"out{number}")
        found = load(tmp_path / f"out{number}")
        same = torch.equal(found[HEAD], found["model.embed_tokens.weight"])
        tied = config_of(tmp_path / f"out{number}")["tie_word_embeddings"]
        assert same is tied is (not exclude)
