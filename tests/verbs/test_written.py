"""What lies beside and around the weights that apply writes is true of them: config.json, the
index, header metadata. Loading goes by transformers, with no dtype given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import load, perturbed, save, toy
from safetensors import safe_open

import skillvec as sv
from skillvec.checkpoints.configs import DEPTH, Written, retyped_config, untied_config

Config = dict[str, Any]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64,
          "bf16": torch.bfloat16}  # fmt: skip
LAYER = ["*layers.0*"]


def named(folder: Path) -> Config:
    return dict(json.loads((folder / "config.json").read_text()))


def rewrite(folder: Path, change: Callable[[Config], Any]) -> Path:
    config = named(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> tuple[torch.dtype, bool]:
    """Return the dtype in which transformers loads a model, and whether no bit is lost."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    held, stored = model.state_dict(), load(folder)
    same = (torch.equal(held[name].double(), stored[name].double()) for name in stored)
    return model.dtype, all(same)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, one trained from it, and their vector."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    ).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.01 * torch.randn(parameter.shape)).to(torch.bfloat16)
    model.save_pretrained(folder / "rl")
    sv.diff(folder / "rl", folder / "base", folder / "v.safetensors")
    return folder


@pytest.fixture
def target(world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(world / "base", tmp_path / "target")


def moved(config: Config) -> None:
    config["torch_dtype"] = config.pop("dtype")


SAYINGS: dict[str, Callable[[Config], Any]] = {
    "dtype": lambda config: None,
    "torch_dtype": moved,
    "both": lambda config: config.update(torch_dtype="bfloat16"),
    "null and torch_dtype": lambda config: config.update(dtype=None, torch_dtype="bfloat16"),
    "by part": lambda config: config.update(dtype={"": "bfloat16", "vision_config": "bfloat16"}),
    "nothing": lambda config: config.pop("dtype"),
}


@pytest.mark.parametrize("include", [[], LAYER], ids=["all", "some"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64", "bf16", None])
@pytest.mark.parametrize("how", SAYINGS)
def test_a_model_is_loaded_in_the_dtype_it_was_written_in(
    how: str, dtype: str | None, include: list[str], world: Path, target: Path, tmp_path: Path
) -> None:
    rewrite(target, SAYINGS[how])
    report = sv.apply(
        target, world / "v.safetensors", tmp_path / "out", dtype=dtype, include=include
    )
    assert not report.warnings
    wanted = FLOATS[dtype or "bf16"]
    if include and dtype == "fp16":  # neither holds the other
        wanted = torch.float32
    assert loaded(tmp_path / "out") == (wanted, True)
    texts = [(folder / "config.json").read_bytes() for folder in (target, tmp_path / "out")]
    if dtype in (None, "bf16"):
        assert texts[0] == texts[1]
    keys = [key for key in named(tmp_path / "out") if key in ("dtype", "torch_dtype")]
    if how not in ("nothing", "null and torch_dtype"):
        said = {named(tmp_path / "out")[key] for key in keys} if how != "by part" else set()
        assert said <= {str(wanted).removeprefix("torch.")}
    assert sv.verify(tmp_path / "out").facts["verified"]


def test_all_else_of_a_config_stays_in_its_order(world: Path, target: Path, tmp_path: Path) -> None:
    rewrite(target, lambda c: c.update(own={"dtype": 7, "map": {"dtype": "word"}}, last="ä"))
    sv.apply(target, world / "v.safetensors", tmp_path / "out", dtype="fp32")
    before = named(target)
    assert list(named(tmp_path / "out").items()) == list((before | {"dtype": "float32"}).items())


def test_what_was_asked_for_is_said_also_where_the_file_had_it(
    world: Path, target: Path, tmp_path: Path
) -> None:
    """A file in fp32 whose config says bf16: as it was where nothing is asked, and told of."""
    weights = {name: weight.float() for name, weight in load(target).items()}
    save(target, weights, config=named(target))
    report = sv.apply(target, world / "v.safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (target / "config.json").read_bytes()
    assert any("a dtype that no tensor has" in said for said in report.warnings)
    report = sv.apply(target, world / "v.safetensors", tmp_path / "asked", dtype="fp32")
    assert loaded(tmp_path / "asked") == (torch.float32, True) and not report.warnings


def test_tensors_that_were_wider_before_are_the_exceptions_they_were(
    world: Path, target: Path, tmp_path: Path
) -> None:
    """As a router in fp32, which transformers keeps so whatever the config says."""
    weights = load(target)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save(target, weights, config=named(target))
    sv.apply(target, world / "v.safetensors", tmp_path / "out", include=LAYER, dtype="bf16")
    assert named(tmp_path / "out")["dtype"] == "bfloat16"
    sv.apply(target, world / "v.safetensors", tmp_path / "wide", include=LAYER, dtype="fp32")
    assert loaded(tmp_path / "wide") == (torch.float32, True)


@pytest.mark.parametrize("kind", ["pickle", "distributed"])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_a_config_of_weights_in_another_format(
    kind: str, stored: str, world: Path, target: Path, tmp_path: Path
) -> None:
    from torch.distributed import checkpoint

    weights = load(target)
    if stored == "F32":
        weights = {name: weight.float() + 1e-4 for name, weight in weights.items()}
    (target / "model.safetensors").unlink()
    if kind == "pickle":
        torch.save(weights, target / "pytorch_model.bin")
    else:
        checkpoint.save(weights, checkpoint_id=target)
    report = sv.apply(target, world / "v.safetensors", tmp_path / "out")
    wanted = torch.float32 if stored == "F32" else torch.bfloat16
    assert loaded(tmp_path / "out") == (wanted, True)
    assert not any("dtype" in said for said in report.warnings)
    texts = [(folder / "config.json").read_bytes() for folder in (target, tmp_path / "out")]
    assert (texts[0] == texts[1]) == (stored == "BF16")


def test_exceptions_in_pickled_weights_leave_their_config_as_it_was(
    world: Path, target: Path, tmp_path: Path
) -> None:
    weights = load(target)
    (target / "model.safetensors").unlink()
    weights |= {n: w.float() + 1e-4 for n, w in weights.items() if "layers.1" in n}
    torch.save(weights, target / "pytorch_model.bin")
    sv.apply(target, world / "v.safetensors", tmp_path / "out")
    assert named(tmp_path / "out")["dtype"] == "bfloat16"


def test_the_masters_of_a_training_decide_over_what_was_frozen(
    world: Path, target: Path, tmp_path: Path
) -> None:
    from torch.distributed import checkpoint

    weights = load(target)
    (target / "model.safetensors").unlink()
    weights |= {n: w.float() + 1e-4 for n, w in weights.items() if "layers.1" in n}
    checkpoint.save(weights, checkpoint_id=target)
    sv.apply(target, world / "v.safetensors", tmp_path / "out")
    assert loaded(tmp_path / "out") == (torch.float32, True)


def test_a_quantised_target_says_the_dtype_it_is_written_in(tmp_path: Path) -> None:
    codes = torch.arange(1024).remainder(120).to(torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"a.weight": codes.reshape(32, 32), "a.weight_scale_inv": torch.ones(2, 2)}
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    config = {"model_type": "toy", "dtype": "bfloat16", "quantization_config": said}
    target = save(tmp_path / "target", tensors, config=config)
    base = {"a.weight": torch.zeros(32, 32, dtype=torch.bfloat16)}
    vector = sv.diff(save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base))
    for dtype, name in ((None, "bfloat16"), ("fp32", "float32")):
        sv.apply(target, vector, tmp_path / name, dtype=dtype)
        assert named(tmp_path / name) == {"model_type": "toy", "dtype": name}


def test_the_parts_of_a_model_say_it_too(tmp_path: Path) -> None:
    """Classes for the text alone go by the text part's dtype."""
    text = {"head_dim": 8, **SIZES, "dtype": "bfloat16"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    kind = transformers.Gemma3ForConditionalGeneration
    model = kind(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    assert named(base)["text_config"]["dtype"] == "bfloat16"
    rl = save(tmp_path / "rl", perturbed(load(base)), config=named(base))
    vector = sv.diff(rl, base, tmp_path / "v.safetensors")
    sv.apply(base, vector, tmp_path / "out", dtype="fp32")
    made = named(tmp_path / "out")
    assert made["dtype"] == made["text_config"]["dtype"] == "float32"
    expected = load(tmp_path / "out")
    found = kind.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.float32
    embeddings = found.get_input_embeddings().weight
    assert torch.equal(embeddings, expected["language_model.model.embed_tokens.weight"])


def test_an_index_that_names_the_dtype_is_true_as_well(
    world: Path, target: Path, tmp_path: Path
) -> None:
    """transformers goes by it where the config says nothing."""
    rewrite(target, lambda config: config.pop("dtype"))
    weights = load(target)
    (target / "model.safetensors").unlink()
    save(target, weights, shards=2, config=named(target))
    file = "model.safetensors.index.json"
    index = json.loads((target / file).read_text())
    index["metadata"]["dtype"] = "bfloat16"
    (target / file).write_text(json.dumps(index))
    for dtype, name in (("fp32", "float32"), (None, "bfloat16")):
        sv.apply(target, world / "v.safetensors", tmp_path / name, dtype=dtype)
        made = json.loads((tmp_path / name / file).read_text())
        size = sum(weight.nbytes for weight in load(tmp_path / name).values())
        assert made == index | {"metadata": {"total_size": size, "dtype": name}}
        assert loaded(tmp_path / name) == (getattr(torch, name), True)
    assert (tmp_path / "bfloat16" / file).read_bytes() == (target / file).read_bytes()


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_folder_without_a_config_gets_none(dtype: str | None, tmp_path: Path) -> None:
    base = toy()
    folders = save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base)
    (folders[1] / "config.json").unlink()
    sv.apply(folders[1], tuned=folders[0], base=folders[1], output=tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out" / "config.json").exists()


def test_configs_far_within_are_left_alone() -> None:
    config: Config = {"dtype": "bfloat16"}
    for _ in range(2 * DEPTH):
        config = {"dtype": "bfloat16", "part": config}
    made = retyped_config(config, Written(frozenset([("BF16", "F32")])))
    said = []
    while made:
        said.append(made["dtype"])
        made = made.get("part", {})
    assert said == ["float32"] * (DEPTH + 1) + ["bfloat16"] * DEPTH


def test_no_quantisation_is_described_anew() -> None:
    config = {"dtype": "half", "quantization_config": {"dtype": "bfloat16"}}
    made = retyped_config(config, Written(frozenset([("BF16", "F32")])))
    assert made == config | {"dtype": "float32"}
    assert retyped_config({"dtype": "float8"}, Written(frozenset([("", "F16")]))) == {
        "dtype": "float16"
    }


def test_ties_are_undone_wherever_they_are_said() -> None:
    inner = {"text_config": {"tie_word_embeddings": True}, "vision_config": {}}
    config = {"tie_embedding": True, "text_config": {"a": 1}, "thinker": inner}
    text = {"tie_word_embeddings": False}
    assert untied_config(config) == {
        "tie_embedding": False, "text_config": {"a": 1} | text,
        "thinker": {"text_config": text, "vision_config": {}}, "tie_word_embeddings": False,
    }  # fmt: skip


# ------------------------------------------------------------------------------------- headers


# of one rank that held every tensor whole
WHOLE = json.dumps({name: {"saved_offsets": [0] * t.dim()} for name, t in toy().items()})


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as content:
        return dict(content.metadata() or {})


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"format": "pt"}, {"format": "pt"}),
        ({"format": "mlx"}, {"format": "mlx"}),
        ({"format": "pt", "note": "mine"}, {"format": "pt", "note": "mine"}),
        ({"note": "mine"}, {"format": "pt", "note": "mine"}),
        ({}, {"format": "pt"}),
        ({"format": "pt", "skillvec": "old"}, {"format": "pt"}),
        ({"format": "pt", "DCP_VERSION": "1", "DCP_SHARDING_INFO": WHOLE}, {"format": "pt"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", [True, False])
def test_the_metadata_of_a_target_is_kept(
    own: dict[str, str], kept: dict[str, str], folder: bool, tmp_path: Path
) -> None:
    base = toy()
    rl = save(tmp_path / "rl", perturbed(base))
    vector = sv.diff(rl, save(tmp_path / "base", base), tmp_path / "v.safetensors")
    name = "target" if folder else "target.safetensors"
    target, out = save(tmp_path / name, base, metadata=own), tmp_path / f"out-{name}"
    sv.apply(target, vector, out)
    found = metadata_of(out / "model.safetensors" if folder else out)
    recipe = json.loads(found.pop("skillvec"))
    assert found == kept and recipe["kind"] == "merged"
    assert sv.verify(out).facts["verified"]
    # a recipe is replaced by the next one
    sv.apply(out, vector, tmp_path / f"again-{name}", lam=0.5)
    again = tmp_path / f"again-{name}"
    found = metadata_of(again / "model.safetensors" if folder else again)
    assert json.loads(found.pop("skillvec"))["lam"] == 0.5 and found == kept


def test_each_shard_keeps_its_own_metadata(tmp_path: Path) -> None:
    base = toy()
    target = save(tmp_path / "target", base, shards=3)
    for number, file in enumerate(sorted(target.glob("*.safetensors"))):
        save(file, load(file), metadata={"format": "mlx", "part": str(number)})
    rl = save(tmp_path / "rl", perturbed(base))
    vector = sv.diff(rl, save(tmp_path / "base", base), tmp_path / "v.safetensors")
    sv.apply(target, vector, tmp_path / "out")
    for number, file in enumerate(sorted((tmp_path / "out").glob("*.safetensors"))):
        found = metadata_of(file)
        assert (found["format"], found["part"]) == ("mlx", str(number))
        assert json.loads(found["skillvec"])["kind"] == "merged"


def test_weights_of_another_format_are_written_as_pt(tmp_path: Path) -> None:
    base = toy()
    (tmp_path / "target").mkdir()
    torch.save(base, tmp_path / "target" / "pytorch_model.bin")
    rl = save(tmp_path / "rl", perturbed(base))
    sv.apply(tmp_path / "target", tuned=rl, base=save(tmp_path / "base", base),
             output=tmp_path / "out")  # fmt: skip
    found = metadata_of(tmp_path / "out" / "model.safetensors")
    assert {**found, "skillvec": ""} == {"format": "pt", "skillvec": ""}


def test_the_header_of_an_ordinary_target_has_the_bytes_it_had(tmp_path: Path) -> None:
    base = toy()
    folders = save(tmp_path / "rl", perturbed(base)), save(tmp_path / "base", base)
    sv.apply(folders[1], tuned=folders[0], base=folders[1], output=tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()[8:]
    assert raw.startswith(b'{"__metadata__":{"format":"pt","skillvec":"{\\"kind\\":\\"merged\\",')
