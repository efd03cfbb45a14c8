"""What comes along with merged weights: every other file, but states and the weights as they were.

Folders are made by the libraries that make them in real life where there is one.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from families import assert_same_bits, load, save, save_int4, toy
from hubserver import HubServer
from test_training_shards import save_dcp

import skillvec
from skillvec.checkpoints.folder import INDEX
from skillvec.cli.commands import main
from skillvec.files.weight_files import is_weight_file
from skillvec.verbs._publish import pull, push

# what loaders of other parts of a model look for, and what people put beside one
WEIGHTS = (
    "spk_dict.pt", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/model.onnx",
    "model.gguf", "original/consolidated.00.pth", "adapter_model.safetensors", "head.bin",
    "model-mtp-of-00005.safetensors", "vae/diffusion_pytorch_model.safetensors", "epoch=3.ckpt",
)  # fmt: skip
OTHERS = (
    "1_Pooling/config.json", "training_args.bin", "trainer_state.json", ".gitattributes",
    "additional_chat_templates/tool_use.jinja", ".hidden/notes", "latest",
    "schedulers/scheduler.json",
)  # fmt: skip
STATES = (
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "rng_state_1.pth", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin",
    "optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata",
    "pytorch_model_fsdp_0/__0_0.distcp", "global_step20/mp_rank_00_model_states.pt",
    "global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt", "checkpoint-20/model.safetensors",
    "checkpoint-20/config.json", "checkpoint-20/trainer_state.json", "checkpoint-20/a/b.txt",
    "optim_world_size_2_rank_0.pt", "extra_state_world_size_2_rank_0.pt", ".metadata",
)  # fmt: skip
OLD = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
    "consolidated.safetensors", "consolidated.00.pth", "model.fp16.safetensors",
    "consolidated.safetensors.index.json",
)  # fmt: skip


def put(folder: Path, *names: str) -> dict[str, bytes]:
    """Write files of different content; return it by name."""
    contents = {}
    for name in names:
        contents[name] = f"content of {name}\r\n".encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents[name])
    return contents


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def run(*words: object) -> tuple[str, str]:
    """Run skillvec; return its talk, on one line, and its answer."""
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return " ".join(done.stderr.split()), done.stdout


def merged(target: Path, out: Path, family) -> skillvec.report.Report:
    return skillvec.apply(target, skillvec.diff(family.tuned, family.base), out)


@pytest.mark.parametrize("shards", [1, 3])
def test_whatever_is_no_shard_of_the_model_is_copied_byte_for_byte(
    shards: int, tmp_path: Path, family
):
    target = save(tmp_path / "target", toy(3), shards=shards)
    written = put(target, *WEIGHTS, *OTHERS)
    report = merged(target, tmp_path / "out", family)
    made = files_of(tmp_path / "out")
    assert {name: made.get(name) for name in written} == written
    assert set(made) == set(files_of(target)) | {"README.md"}
    facts = report.facts
    assert (facts["left_behind"], facts["old_weights"]) == ([], [])
    assert sorted(facts["copied_weights"]) == sorted(WEIGHTS)
    (warning,) = (text for text in report.warnings if "look like weights" in text)
    assert "without the vector" in warning and "and 6 more" in warning
    assert len([name for name in WEIGHTS if f"  {name}\n" in warning + "\n"]) == 5
    copied = sum(map(len, written.values()))
    plain = save(
        tmp_path / "theirs", toy(3), shards=shards
    )  # as long a path, which the header holds
    alone = merged(plain, tmp_path / "plainer", family).facts["nbytes_written"]
    assert facts["nbytes_written"] == alone + copied


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--json"]])
def test_states_of_a_training_stay_behind_and_are_named(more: list[str], tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3), shards=2)
    put(target, *STATES, "latest")
    words = ("apply", target, "--tuned", family.tuned, "--base", family.base, "-o", tmp_path / "o")
    talk, answer = run(*words, *more)
    assert "left behind, not copied: .metadata, extra_state_world_size_2_rank_0.pt" in talk
    assert "and 2 like it" in talk or "more" in talk
    if "--json" in more:
        assert sorted(json.loads(answer)["left_behind"]) == sorted([*STATES, "latest"])
        assert json.loads(answer)["old_weights"] == []
    if "--dry-run" not in more:
        plain = {"config.json", INDEX, "README.md"}
        plain |= {path.name for path in target.glob("model-0*")}
        assert set(files_of(tmp_path / "o")) == plain


def test_few_states_are_all_named(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3))
    put(target, *(f"rng_state_{i}.pth" for i in range(8)))
    put(target, "optimizer.pt", "scheduler.pt", "scaler.pt")
    words = ("--tuned", family.tuned, "--base", family.base, "-o", tmp_path / "out")
    talk, _ = run("apply", target, *words)
    assert "optimizer.pt, rng_state_0.pth and 7 like it, scaler.pt, scheduler.pt" in talk


def test_a_folder_that_accelerate_saved_keeps_its_model_alone(tmp_path: Path, family):
    accelerate = pytest.importorskip("accelerate")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=16,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.utils.data.DataLoader(range(4), shuffle=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    accelerator.prepare(model, optimizer, data, schedule)
    accelerator.save_state(tmp_path / "state")
    saved = set(files_of(tmp_path / "state"))
    assert len(saved) >= 4
    model.config.save_pretrained(tmp_path / "state")
    target = skillvec.open_checkpoint(tmp_path / "state")
    copied, left = target.side_files(["model.safetensors"])
    assert {name for name, _ in left} == saved - {"model.safetensors"}
    assert [name for _, name in copied] == ["config.json"]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_weights_as_they_were_stay_behind_and_are_named(shards: int, tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3), shards=shards)
    put(target, *OLD)
    talk, answer = run(
        "apply", target, "--tuned", family.tuned, "--base", family.base, "-o", tmp_path / "o",
        "--json",
    )  # fmt: skip
    report = json.loads(answer)
    assert sorted(report["old_weights"]) == sorted(report["left_behind"]) == sorted(OLD)
    assert any("would miss the vector" in text and "and 6 more" in text
               for text in report["warnings"])  # fmt: skip
    assert not set(files_of(tmp_path / "o")) & set(OLD)
    assert "left behind" not in talk  # the warning names them


@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_no_variant_of_transformers_loads_the_weights_as_they_were(size: str, tmp_path: Path):
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    for variant in ("fp16", "ema_only"):
        model.save_pretrained(tmp_path / "base", max_shard_size=size, variant=variant)
    names = set(files_of(tmp_path / "base"))
    variants = {name for name in names if "fp16" in name or "ema_only" in name}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    model.save_pretrained(tmp_path / "tuned")
    report = skillvec.apply(
        tmp_path / "base", output=tmp_path / "out", tuned=tmp_path / "tuned",
        base=tmp_path / "base",
    )  # fmt: skip
    assert len(variants) == 2 if size == "5GB" else len(variants) > 4
    assert set(report.facts["left_behind"]) == variants
    opened = transformers.AutoModelForCausalLM.from_pretrained
    assert (opened(tmp_path / "base", variant="fp16").lm_head.weight != model.lm_head.weight).all()
    for variant in ("fp16", "ema_only"):
        with pytest.raises(OSError, match=variant):
            opened(tmp_path / "out", variant=variant)
    assert_same_bits(opened(tmp_path / "out").state_dict(), model.state_dict())


def test_without_an_index_all_safetensors_at_the_top_are_a_model_to_some_loaders(
    tmp_path: Path, family
):
    """vLLM and others take every file then: a second copy must not be among them."""
    old = toy(3)
    other = {"mtp.fc.weight": torch.ones(3, 3)}
    for shards in (1, 2):
        target = save(tmp_path / f"target{shards}", old, shards=shards)
        save(target / "model-00001-of-00009.safetensors", dict(list(old.items())[:3]))
        save(target / "extra.safetensors", other)
        save(target / "both.safetensors", other | dict(list(old.items())[:1]))
        report = merged(target, tmp_path / f"out{shards}", family)
        strays = ["model-00001-of-00009.safetensors"] if shards == 1 else []  # an index tells
        assert report.facts["left_behind"] == strays
        made = files_of(tmp_path / f"out{shards}")
        for name in ("extra.safetensors", "both.safetensors"):
            assert made[name] == (target / name).read_bytes()
        skillvec.verify(tmp_path / f"out{shards}")


def test_an_index_that_is_copied_names_what_is_there(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3), shards=2)
    put(target, "vae/a.safetensors", "pytorch_model-00001-of-00001.bin")
    for name, file in {
        "vae/a.safetensors.index.json": "a.safetensors",
        "vae/b.safetensors.index.json": "b.safetensors",
        "copy.index.json": "model-00001-of-00002.safetensors",
        "other.index.json": "pytorch_model-00001-of-00001.bin",
    }.items():
        (target / name).write_text(json.dumps({"weight_map": {"w": file}}))
    (target / "faiss.index.json").write_text('{"weight_map": 3}')
    report = merged(target, tmp_path / "out", family)
    assert sorted(report.facts["left_behind"]) == [
        "other.index.json", "pytorch_model-00001-of-00001.bin", "vae/b.safetensors.index.json"
    ]  # fmt: skip
    made = set(files_of(tmp_path / "out"))
    assert {"vae/a.safetensors.index.json", "copy.index.json", "faiss.index.json"} < made


def test_pickles_that_were_read_are_no_files_beside_the_model(tmp_path: Path, family):
    target, tensors = tmp_path / "target", toy(3)
    target.mkdir()
    names = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        torch.save(part, target / name)
        weight_map |= dict.fromkeys(part, name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    put(target, "config.json", "spk_dict.pt", "optimizer.pt", "2_Dense/pytorch_model.bin")
    (target / "config.json").write_text('{"model_type": "toy"}')
    report = merged(target, tmp_path / "out", family)
    assert set(files_of(tmp_path / "out")) == {
        "model.safetensors", "config.json", "README.md", "spk_dict.pt", "2_Dense/pytorch_model.bin"
    }  # fmt: skip
    assert report.facts["left_behind"] == ["optimizer.pt"] and not report.facts["old_weights"]


@pytest.mark.filterwarnings("ignore")
def test_shards_of_a_training_that_were_read_stay_and_the_rest_comes(tmp_path: Path, family):
    tensors = toy(3)
    target = save_dcp(tmp_path / "target", [{"model": tensors, "optimizer": {"s": torch.ones(3)}}])
    put(target, "spk_dict.pt", "2_Dense/model.safetensors", "optimizer_0/__0_0.distcp", "notes.txt")
    (target / "config.json").write_text('{"model_type": "toy"}')
    save(target / "x", toy(3))  # a folder below, whole
    report = merged(target, tmp_path / "out", family)
    assert set(files_of(tmp_path / "out")) == {
        "model.safetensors", "config.json", "README.md", "spk_dict.pt", "notes.txt",
        "2_Dense/model.safetensors", "x/model.safetensors", "x/config.json",
    }  # fmt: skip
    assert set(report.facts["left_behind"]) == {".metadata", "optimizer_0/__0_0.distcp"}


@pytest.mark.filterwarnings("ignore")
def test_rounded_weights_beside_the_shards_that_were_read_stay_behind(tmp_path: Path, family):
    """Config and tokenizer of shards may lie in a folder that also holds them rounded."""
    folder = tmp_path / "step"
    save_dcp(folder / "pytorch_model_fsdp_0", [toy(3)])
    save(folder / "huggingface", toy(4), shards=2)
    save(folder / "huggingface" / "mtp.safetensors", {"mtp": torch.ones(2)})
    put(folder, "optimizer.pt", "fsdp_config.json")
    target = skillvec.open_checkpoint(folder)
    assert target.format == "torch.distributed.checkpoint" and target.folder.name == "huggingface"
    report = merged(folder, tmp_path / "out", family)
    assert set(files_of(tmp_path / "out")) == {
        "model.safetensors", "config.json", "README.md", "mtp.safetensors"
    }  # fmt: skip
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert set(report.facts["old_weights"]) == shards
    assert set(report.facts["left_behind"]) == {
        *shards, "optimizer.pt", "fsdp_config.json", "pytorch_model_fsdp_0"
    }  # fmt: skip


def test_a_file_never_takes_the_name_of_a_shard_that_is_made(tmp_path: Path, family, monkeypatch):
    monkeypatch.setattr("skillvec.engine.plan_models.SHARD_NBYTES", 4000)
    target, tensors = tmp_path / "target", toy(3)
    target.mkdir()
    torch.save(tensors, target / "pytorch_model.bin")
    (target / "config.json").write_text('{"model_type": "toy"}')
    copied, left = skillvec.open_checkpoint(target).side_files()
    assert [name for _, name in copied] == ["config.json"] and not left
    put(target, "a.txt", "made-1.safetensors.txt")
    copied, left = skillvec.open_checkpoint(target).side_files(["a.txt"])
    assert dict(left).keys() == {"a.txt"}
    merged(target, tmp_path / "out", family)
    assert (tmp_path / "out" / INDEX).exists()
    assert_same_bits(skillvec_tensors(tmp_path / "out"), expected(tensors, family))


def skillvec_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    return {n: t for f in set(weight_map.values()) for n, t in load_file(folder / f).items()}


def expected(tensors: dict[str, torch.Tensor], family) -> dict[str, torch.Tensor]:
    tuned, base = load(family.tuned), load(family.base)
    return {
        name: (tensor.float() + (tuned[name].float() - base[name].float())).bfloat16()
        for name, tensor in tensors.items()
    }


def test_what_a_git_client_or_the_hub_keeps_beside_is_not_of_the_model(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3))
    put(target, ".git/HEAD", ".cache/huggingface/x.lock", ".gitignore")
    merged(target, tmp_path / "out", family)
    made = set(files_of(tmp_path / "out"))
    assert made == {"model.safetensors", "config.json", "README.md", ".gitignore"}


def test_links_are_copied_as_what_they_lead_to(tmp_path: Path, family):
    target = save(tmp_path / "target", toy(3), shards=2)
    blobs = put(tmp_path / "blobs", "1", "2/x.pt")
    (target / "spk_dict.pt").symlink_to(tmp_path / "blobs" / "1")
    (target / "speakers").symlink_to(tmp_path / "blobs" / "2")
    shard = target / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "blobs" / "shard")
    shard.symlink_to(tmp_path / "blobs" / "shard")  # as the Hub's cache has it
    merged(target, tmp_path / "out", family)
    for name, content in (("spk_dict.pt", blobs["1"]), ("speakers/x.pt", blobs["2/x.pt"])):
        made = tmp_path / "out" / name
        assert made.read_bytes() == content and not made.is_symlink()
    assert not (tmp_path / "out" / shard.name).is_symlink()
    skillvec.verify(tmp_path / "out")


def test_one_file_as_target_has_nothing_beside_it(tmp_path: Path, family):
    save(tmp_path / "in" / "model.safetensors", toy(3))
    put(tmp_path / "in", "spk_dict.pt", "pytorch_model.bin")
    report = merged(tmp_path / "in" / "model.safetensors", tmp_path / "out.safetensors", family)
    assert os.listdir(tmp_path) != [] and not report.facts["left_behind"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_what_lies_on_the_hub_comes_along_and_goes_there_and_back(
    tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch
):
    target = save(tmp_path / "target", toy(3), shards=2)
    written = put(target, "spk_dict.pt", "2_Dense/model.safetensors", "a/deep/file.txt")
    put(target, "optimizer.pt", "pytorch_model.bin", "global_step9/x.pt")
    with HubServer() as server:
        server.add_repo("org/target", target)
        server.adopt(monkeypatch, tmp_path / "home")
        vector = skillvec.diff(family.tuned, family.base, tmp_path / "v.safetensors")
        report = skillvec.apply("org/target", vector, tmp_path / "out")
        assert set(report.facts["left_behind"]) == {
            "optimizer.pt", "pytorch_model.bin", "global_step9/x.pt"
        }  # fmt: skip
        here = files_of(tmp_path / "out")
        assert {name: here[name] for name in written} == written
        asked = [r.path for r in server.requests if "optimizer.pt" in r.path]
        assert not asked  # nor is it fetched

        push(tmp_path / "out", "user/merged")
        there = server.files("user/merged")
        assert {name: there[name] for name in written} == written
        pull("user/merged", tmp_path / "back")
        back = files_of(tmp_path / "back")
        assert {name: back[name] for name in written} == written
        assert set(back) == set(here) | {"README.md"}


def test_names_that_look_like_weights():
    assert all(map(is_weight_file, WEIGHTS))
    assert not any(map(is_weight_file, OTHERS))
    assert all(map(is_weight_file, ("a/b.safetensors", "x.bin.index.json", "m.onnx_data")))


def test_shards_of_a_quantised_model_are_written_anew_and_the_rest_comes(tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=48,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    plain = save_int4(model, tmp_path / "target")
    held = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    shards = reshard(tmp_path / "target")
    put(tmp_path / "target", "spk_dict.pt", "optimizer.pt", "pytorch_model.bin")
    mtp = save(tmp_path / "target" / "model-mtp.safetensors", {"mtp.w": torch.ones(2)})
    base = save(tmp_path / "base", held)
    tuned = save(tmp_path / "tuned", {name: tensor + 1 for name, tensor in held.items()})
    report = skillvec.apply(tmp_path / "target", output=tmp_path / "out", tuned=tuned, base=base)
    made = files_of(tmp_path / "out")
    assert "model.safetensors" in made and not set(made) & {*shards, INDEX}
    assert made["model-mtp.safetensors"] == mtp.read_bytes() and "spk_dict.pt" in made
    assert set(report.facts["left_behind"]) == {"optimizer.pt", "pytorch_model.bin"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_bits(loaded.state_dict(), load(tuned))


def reshard(folder: Path) -> set[str]:
    """Split model.safetensors into two shards with an index; return their names."""
    tensors, weight_map = load(folder), {}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        save(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return set(names)
