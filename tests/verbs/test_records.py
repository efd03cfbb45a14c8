"""What a record says of where things lay: a folder of the disk is never asked of the Hub.

A relative path such as m/sft is also how a model on the Hub is called, and whoever re-opens a
record from another folder must not ask for the model of a stranger. What was read of the Hub is
recorded with its commit, so the record alone decides.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from families import load, perturbed, save, toy
from hubserver import HubServer
from safetensors import safe_open
from safetensors.torch import save_file

import skillvec as sv
from skillvec.checkpoints import locate
from skillvec.cli.commands import main
from skillvec.errors import UsageError
from skillvec.remote import hub, references
from skillvec.verbs.cards import hub_model

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
SHA = "a" * 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve strangers' models under the very names of the folders."""
    with HubServer() as server:
        for name in ("base", "tuned", "target", "ad", "v.safetensors", "w.safetensors"):
            stranger = {name: tensor + 5 for name, tensor in toy(7).items()}
            server.add_repo(
                f"m/{name}", save(tmp_path / "strangers" / name.split(".")[0], stranger)
            )
        server.adopt(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def work(tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of models and what was made of them, by relative paths."""
    folder = tmp_path / "models"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    )
    model.save_pretrained(folder / "m" / "base")
    base = load(folder / "m" / "base")
    config = json.loads((folder / "m" / "base" / "config.json").read_text())
    save(folder / "m" / "tuned", perturbed(base, 1), config=config)
    save(folder / "m" / "target", perturbed(base, 2), config=config)
    monkeypatch.chdir(folder)
    sv.diff("m/tuned", "m/base", "m/v.safetensors")
    sv.diff("m/target", "m/base", "m/w.safetensors")
    sv.combine("m/v.safetensors", "m/w.safetensors", output="c.safetensors")
    pair = sv.SkillVector.between("m/tuned", "m/base")
    sv.combine(pair, "m/w.safetensors", output="d.safetensors")
    sv.apply("m/target", "m/v.safetensors", "merged")
    sv.apply("m/target", None, "merged_pair", tuned="m/tuned", base="m/base")
    sv.apply("m/target", sv.combine("m/v.safetensors", "m/w.safetensors"), "merged_sum")
    sv.extract_lora("m/v.safetensors", "m/ad", rank=2)
    sv.diff("m/ad", "m/base", "ad.safetensors")
    sv.apply("m/target", "m/ad::m/base", "merged_ad")
    for name in ("c", "d", "ad"):
        assert sv.verify(f"{name}.safetensors").facts["verified"]
    for name in ("merged", "merged_pair", "merged_sum", "merged_ad"):
        assert sv.verify(name).facts["verified"]
    assert not server.requests
    return folder


ELSEWHERE = {
    "vector": ("verify ../models/m/v.safetensors", "tuned m/tuned", "--tuned"),
    "its base": (
        "verify ../models/m/v.safetensors --tuned ../models/m/tuned", "base m/base", "--base",
    ),
    "combination": ("verify ../models/c.safetensors", "vector m/v.safetensors", ""),
    "difference in one": ("verify ../models/d.safetensors", "tuned m/tuned", ""),
    "again": (
        "combine --recipe ../models/c.safetensors -o x.safetensors", "vector m/v.safetensors", "",
    ),
    "adapter": ("verify ../models/ad.safetensors", "tuned m/ad", "--tuned"),
    "its base too": (
        "verify ../models/ad.safetensors --tuned ../models/m/ad", "base m/base", "--base",
    ),
    "merged": ("verify ../models/merged", "vector m/v.safetensors", "--vector"),
    "its target": (
        "verify ../models/merged --vector ../models/m/v.safetensors", "target m/target", "--target",
    ),
    "merged of a pair": ("verify ../models/merged_pair", "tuned m/tuned", "--tuned"),
    "its base as well": (
        "verify ../models/merged_pair --tuned ../models/m/tuned", "base m/base", "--base",
    ),
    "merged of a sum": ("verify ../models/merged_sum", "vector m/v.safetensors", "--vector"),
    "merged of an adapter": ("verify ../models/merged_ad", "tuned m/ad", "--vector"),
    "patch": ("export-patch ../models/m/v.safetensors -o x.safetensors", "base m/base", "--base"),
    "LoRA": ("extract-lora ../models/m/v.safetensors --rank 2 -o x", "base m/base", "--base"),
}  # fmt: skip


def test_nothing_local_is_asked_of_the_hub(work: Path, server: HubServer, monkeypatch) -> None:
    (work.parent / "elsewhere").mkdir()
    monkeypatch.chdir(work.parent / "elsewhere")
    for command, what, option in ELSEWHERE.values():
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 2, (command, result.output, result.exception)
        said = " ".join(result.stderr.split())
        assert f"{what}: no such file or folder" in said, said
        assert "seen from the folder in which that command ran" in said
        assert (f"say with {option} where it is now" if option else "put it there again") in said
        assert "Hub" not in said
    assert not server.requests


def test_what_the_error_asks_for_is_enough(work: Path, server: HubServer, monkeypatch) -> None:
    (work.parent / "elsewhere").mkdir()
    monkeypatch.chdir(work.parent / "elsewhere")
    at = "../models/m"
    pair = {"tuned": f"{at}/tuned", "base": f"{at}/base"}
    assert sv.verify(f"{at}/v.safetensors", **pair).facts["verified"]
    assert sv.verify("../models/merged_pair", target=f"{at}/target", **pair).facts["verified"]
    for name, vector in (
        ("merged", f"{at}/v.safetensors"),
        ("merged_ad", f"{at}/ad::{at}/base"),
        ("merged_sum", sv.combine(f"{at}/v.safetensors", f"{at}/w.safetensors")),
    ):
        report = sv.verify(f"../models/{name}", target=f"{at}/target", vector=vector)
        assert report.facts["verified"]
    report = sv.verify("../models/ad.safetensors", tuned=f"{at}/ad", base=f"{at}/base")
    assert report.facts["verified"]
    with pytest.raises(UsageError, match="does not take it"):
        sv.verify("../models/c.safetensors", **pair)
    sv.export_patch(f"{at}/v.safetensors", "patch.safetensors", base=f"{at}/base")
    sv.extract_lora(f"{at}/v.safetensors", "lora", rank=2, base=f"{at}/base")
    assert not server.requests


def test_an_absolute_path_is_said_as_it_is(work: Path, server: HubServer) -> None:
    sv.diff(work / "m" / "tuned", work / "m" / "base", "abs.safetensors")
    shutil.move(work / "m" / "base", work / "moved")
    with pytest.raises(UsageError) as caught:
        sv.verify("abs.safetensors")
    said = str(caught.value)
    assert f"base {work}/m/base: no such file" in said and "--base" in said
    assert "seen from" not in said
    assert sv.verify("abs.safetensors", base="moved").facts["verified"] and not server.requests


def test_bytes_do_not_know_of_this(work: Path) -> None:
    """References stand in records as they were given."""
    manifest = sv.SkillVector.open("m/v.safetensors").manifest
    assert (manifest["tuned"]["ref"], manifest["base"]["ref"]) == ("m/tuned", "m/base")
    parents = sv.SkillVector.open("c.safetensors").manifest["parents"]
    assert [parent["ref"] for parent in parents] == ["m/v.safetensors", "m/w.safetensors"]
    with safe_open("merged/model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["skillvec"])
    assert recipe["target"] == {"ref": "m/target"}
    assert recipe["vector"]["ref"] == "m/v.safetensors"


# ------------------------------------------------------------------------------ of the Hub


def test_what_was_read_of_the_hub_is_read_there_again(server: HubServer, tmp_path, monkeypatch):
    """Its record names the commit, whatever lies in the folder under its name."""
    vector = sv.diff("m/tuned", "m/base", tmp_path / "v.safetensors")
    ref = vector.manifest["tuned"]["ref"]
    assert references.pinned(ref) == ("m/tuned", server.repos["m/tuned"].refs["refs/heads/main"])
    sv.combine(vector, vector, output=tmp_path / "c.safetensors")
    sv.apply("m/target", vector, tmp_path / "merged")
    (tmp_path / "elsewhere" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    save(Path("m/tuned"), toy(1))
    for name in ("v.safetensors", "c.safetensors", "merged"):
        assert sv.verify(tmp_path / name).facts["verified"]


def test_a_recipe_that_names_the_hub_is_recorded_with_the_commit(
    server: HubServer, work: Path, tmp_path: Path
) -> None:
    """The words of a recipe stay; its parents tell which vectors they were."""
    server.add_repo("m/skill", {"v.safetensors": (work / "m" / "v.safetensors").read_bytes()})
    recipe = {"vectors": [{"vector": "m/skill"}, {"vector": "m/w.safetensors", "weight": 0.5}]}
    made = sv.combine(recipe=recipe, output=tmp_path / "c.safetensors")
    assert made.manifest["recipe"]["vectors"][0]["vector"] == "m/skill"
    (tmp_path / "models" / "m" / "skill").mkdir()
    assert sv.verify(tmp_path / "c.safetensors").facts["verified"]
    again = sv.combine(recipe=tmp_path / "c.safetensors", output=tmp_path / "again.safetensors")
    assert again.manifest["identity"] == made.manifest["identity"]


@pytest.mark.parametrize("name", [f"m/base@{SHA}", f"hf:/m/base@{SHA}"])
def test_a_folder_that_is_called_like_a_commit_is_recorded_as_a_folder(
    name: str, work: Path, server: HubServer
) -> None:
    os.makedirs(os.path.dirname(name), exist_ok=True)
    shutil.copytree("m/base", name)
    typed = name.replace("hf:/", "hf://")
    made = sv.diff("m/tuned", typed, "x.safetensors")
    assert made.manifest["base"]["ref"] == f"./{typed}"
    assert sv.verify("x.safetensors").facts["verified"]
    shutil.rmtree(name)
    with pytest.raises(UsageError, match="--base"):
        sv.verify("x.safetensors")
    assert not server.requests


# ------------------------------------------------------------------------------- adapters


def adapter_with_head(folder: Path, base: str | None, **config: Any) -> Path:
    """Write an adapter that holds a head whole, for whose difference the base is needed."""
    rows = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(16, 2),
        "base_model.model.lm_head.weight": torch.ones(40, 16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rows, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"], "base_model_name_or_path": base}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


def test_the_base_of_an_adapter_is_not_asked_for_where_it_may_have_been_a_folder(
    work: Path, server: HubServer, monkeypatch
) -> None:
    adapter = adapter_with_head(work / "head", "m/base")
    assert sv.SkillVector.open(adapter).base.path == (work / "m" / "base").resolve()
    (work.parent / "elsewhere").mkdir()
    monkeypatch.chdir(work.parent / "elsewhere")
    with pytest.raises(UsageError) as caught:
        sv.apply("../models/m/target", "../models/head", "out")
    said = str(caught.value)
    assert "../models/head::BASE" in said and "hf://m/base" in said and not server.requests
    report = sv.apply("../models/m/target", "../models/head::../models/m/base", "out")
    assert report.facts["verdict"] and not server.requests


@pytest.mark.parametrize("known", ["revision", "adapter of the Hub", "cache", "scheme"])
def test_the_base_of_an_adapter_is_asked_for_where_it_is_known_to_be_of_the_hub(
    known: str, work: Path, server: HubServer, monkeypatch, tmp_path: Path
) -> None:
    commit = server.add_repo("org/base", work / "m" / "base")
    config = {"revision": commit} if known == "revision" else {}
    name = "hf://org/base" if known == "scheme" else "org/base"
    adapter: Any = adapter_with_head(tmp_path / "head", name, **config)
    if known == "adapter of the Hub":
        server.add_repo("org/head", adapter)
        adapter = "org/head"
    elif known == "cache":
        hub.locate("org/base", "base")
    opened = sv.SkillVector.open(adapter)
    assert references.pinned(opened.base.ref) == ("org/base", commit)


def test_extracted_adapters_name_their_base_so_that_peft_finds_it(
    work: Path, server: HubServer, monkeypatch, tmp_path: Path
) -> None:
    """A folder is no name on the Hub, and a commit stands in a key of its own."""
    from peft import AutoPeftModelForCausalLM

    def config_of(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / "adapter_config.json").read_text()))

    assert config_of(work / "m" / "ad")["base_model_name_or_path"] == "./m/base"
    AutoPeftModelForCausalLM.from_pretrained("m/ad")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises((OSError, ValueError)):
        AutoPeftModelForCausalLM.from_pretrained("../models/m/ad")
    with pytest.raises(UsageError, match=r"base of the adapter \./m/base: no such"):
        adapter = adapter_with_head(tmp_path / "head", "./m/base")
        sv.apply(work / "m" / "target", adapter, "out")
    assert not [request for request in server.requests if "m/base" in request.path]
    commit = server.add_repo("org/base", work / "m" / "base")
    server.add_repo("org/tuned", work / "m" / "tuned")
    sv.extract_lora(sv.diff("org/tuned", "org/base"), "pair", rank=2)
    sv.diff("org/tuned", "org/base", "v.safetensors")
    sv.extract_lora("v.safetensors", "stored", rank=2)
    for name in ("pair", "stored"):
        said = config_of(Path(name))
        found = said["base_model_name_or_path"], said["revision"]
        assert found == ("org/base", commit), name
        assert sv.SkillVector.open(name).manifest["base"]["ref"] == "org/base"
    loaded = AutoPeftModelForCausalLM.from_pretrained("stored")
    torch.testing.assert_close(
        loaded.get_base_model().lm_head.weight.detach(), load(work / "m" / "base")["lm_head.weight"]
    )


# ------------------------------------------------------------------------------------ typed


@pytest.mark.parametrize(
    "name", ["m/v.safetensors", "m/rank0.pt", "m/model.gguf", "m/pytorch_model.bin"]
)
def test_the_name_of_a_file_that_is_not_there_is_no_repository(
    name: str, server: HubServer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: sv.SkillVector.open(name),
        lambda: sv.diff(name, save(tmp_path / "base", toy(0))),
        lambda: sv.inspect(name),
    ):
        with pytest.raises(UsageError, match=r": no such file$"):
            call()
    assert not server.requests
    assert references.pinned(sv.open_checkpoint("hf://m/base").ref)


def test_links_into_the_cache_are_local_in_records_and_on_cards(
    work: Path, server: HubServer, monkeypatch
) -> None:
    snapshot = work / "models--org--base" / "snapshots" / SHA
    shutil.copytree("m/base", snapshot)
    os.symlink(snapshot, "m/linked")
    vector = sv.diff("m/tuned", "m/linked", "x.safetensors")
    base = vector.manifest["base"]
    assert (base["ref"], base["revision"]) == ("./m/linked", SHA)
    assert hub_model(base["ref"], base["revision"]) is None
    assert sv.verify("x.safetensors").facts["verified"] and not server.requests


def test_hostile_references_of_a_record_are_errors_of_ours() -> None:
    for ref in ("a\0b", "x" * 5000, "~nobody/m", "\ud800", "a\nb"):
        with pytest.raises(UsageError) as caught:
            locate.relocate(ref, "base", "--base")
        assert len(str(caught.value)) < 700 and "\0" not in str(caught.value)
