"""The Hub from the command line, end to end, with the real client against a server on loopback."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import assert_same_bits, load, perturbed, save, toy
from hubserver import HubServer

import skillvec as sv
from skillvec.errors import IncompatibleError
from skillvec.files.file import remote_of

SHARDS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, rl and target with shards of .3 MB; rl in three, so that shards do not line up."""
    folder = tmp_path_factory.mktemp("models")
    base = toy(0, width=160, vocabulary=400)
    side = {"tokenizer.json": "{}", "README.md": "---\nlicense: mit\n---\nMine.\n"}
    save(folder / "base", base, shards=SHARDS, side_files=side)
    save(folder / "rl", perturbed(base, 1, density=0.3), shards=3)
    save(folder / "target", perturbed(base, 2), shards=SHARDS, side_files=side)
    save(folder / "other", toy(0, width=48, vocabulary=400), shards=SHARDS)
    sv.diff(folder / "rl", folder / "base", folder / "skill.safetensors")
    sv.apply(folder / "target", folder / "skill.safetensors", folder / "merged")
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for name in ("base", "rl", "target", "other"):
            server.add_repo(f"org/{name}", models / name)
        yield server


class Shell:
    """Runs skillvec as a user does, in a process of its own."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.environment = server.environment(home)
        self.home = home

    def __call__(self, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "skillvec", *map(str, words)]
        done = subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def shell(server: HubServer, tmp_path: Path) -> Shell:
    (tmp_path / "home").mkdir()
    return Shell(server, tmp_path / "home")


def weights_sent(server: HubServer) -> int:
    return sum(r.sent for r in server.requests if "/cdn/" in r.path)


def test_the_whole_way_from_one_repository_to_another(models, server, shell, tmp_path):
    skill = tmp_path / "skill.safetensors"
    done = shell("diff", "org/rl", "hf://org/base", "-o", skill, "--license", "apache-2.0")
    assert "from the Hub" in done.stderr and "bit for bit" in done.stdout
    vector, local = sv.SkillVector.open(skill), sv.SkillVector.open(models / "skill.safetensors")
    assert_same_bits(skill, models / "skill.safetensors")
    assert vector.manifest["tensors"] == local.manifest["tensors"]
    commit = server.repos["org/rl"].refs["refs/heads/main"]
    assert vector.manifest["tuned"]["revision"] == commit
    assert vector.manifest["tuned"]["ref"] == f"org/rl@{commit}"

    url = shell("push", skill, "org/skill", "-q").stdout.strip()
    assert "org/skill" in url
    card = server.files("org/skill")["README.md"].decode()
    assert "library_name: skillvec" in card and "license: apache-2.0" in card
    assert "org/base" in card and commit in card and "skillvec apply" in card
    assert str(tmp_path) not in card

    shell("apply", "org/target", "org/skill", "-o", tmp_path / "merged")
    assert_same_bits(tmp_path / "merged", models / "merged")
    shell("verify", tmp_path / "merged")
    shell("verify", "org/skill")
    said = (tmp_path / "merged" / "README.md").read_text()
    assert "Mine." in said and "org/skill" in said  # the target's own card is kept

    shell("push", tmp_path / "merged", "org/merged")
    assert "base_model_relation: merge" in server.files("org/merged")["README.md"].decode()
    assert shell("pull", "org/skill", "-o", tmp_path / "again.safetensors", "-q").stdout.strip()
    assert (tmp_path / "again.safetensors").read_bytes() == skill.read_bytes()


def test_a_pair_that_does_not_match_is_refused_before_a_weight_moves(models, server, shell):
    message = shell("diff", "org/other", "org/base", "-o", "v.safetensors", code=3).stderr
    assert "[400, 48]" in message and "[400, 160]" in message
    assert not (shell.home / "v.safetensors").exists()
    headers = SHARDS * 2
    ranges = [r for r in server.requests if "/cdn/" in r.path]
    assert len(ranges) <= headers and all(r.range for r in ranges)


def test_a_dry_run_says_what_would_be_fetched_and_fetches_nothing(server, shell):
    done = shell("diff", "org/rl", "org/base", "-o", "v.safetensors", "--dry-run", "--json")
    report = json.loads(done.stdout)
    assert report["fetched"] == 3 + SHARDS and report["nbytes_fetched"] > 1 << 20
    assert all(r.range for r in server.requests if "/cdn/" in r.path)


@pytest.mark.parametrize(
    ("words", "said"),
    [(("inspect", "org/absent"), "org/absent"), (("inspect", "org/base@nowhere"), "no such branch"),
     (("inspect", "hf://org/base/absent.safetensors"), "no such file"),
     (("apply", "org/target", "org/base", "-o", "x"), "not a skill vector")],
)  # fmt: skip
def test_what_is_not_there_is_said_in_a_line(words, said: str, shell):
    code = 3 if words[0] == "apply" else 2
    assert said in " ".join(shell(*words, code=code).stderr.split())


def watched(folder: Path, done: threading.Event) -> list[int]:
    """Return how many shards lay below a folder, seen often while a run is at work."""
    seen = [0]
    while not done.is_set():
        try:
            seen.append(sum("model-0" in p.name for p in folder.rglob("shards/*")))
        except FileNotFoundError:  # removed meanwhile
            continue
        time.sleep(0.001)
    return seen


@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_a_stream_keeps_two_shards_and_resumes_and_gives_the_same_bytes(
    verb: str, models, server, tmp_path, monkeypatch
):
    server.adopt(monkeypatch, tmp_path / "home")
    server.cut_after("/cdn/", 200_000, times=2)
    work = tmp_path / "work"
    work.mkdir()
    done, seen = threading.Event(), []
    watcher = threading.Thread(target=lambda: seen.extend(watched(work, done)))
    watcher.start()
    try:
        if verb == "diff":
            sv.diff("org/rl", "org/base", work / "v.safetensors", stream=True)
            plain = sv.diff("org/rl", "org/base", tmp_path / "plain.safetensors", dry_run=True)
            assert plain.report.facts["fetched"] == 3 + SHARDS  # nothing stayed in the cache
        else:
            vector = sv.SkillVector.open(models / "skill.safetensors")
            sv.apply("org/target", vector, work / "out", stream=True)
    finally:
        done.set()
        watcher.join()
    assert [path.name for path in work.iterdir()] in (["v.safetensors"], ["out"])
    assert 1 <= max(seen) <= 2
    if verb == "diff":
        sv.diff("org/rl", "org/base", tmp_path / "whole.safetensors")
        whole = (tmp_path / "whole.safetensors").read_bytes()
        assert (work / "v.safetensors").read_bytes() == whole
    else:
        assert_same_bits(work / "out", models / "merged")
    sizes = [
        os.path.getsize(path)
        for name in (("rl", "base") if verb == "diff" else ("target",))
        for path in (models / name).glob("*.safetensors")
    ]
    assert weights_sent(server) >= sum(sizes)


def test_weights_that_are_here_already_are_not_fetched_again(models, server, tmp_path, monkeypatch):
    server.adopt(monkeypatch, tmp_path / "home")
    sv.diff("org/rl", "org/base", tmp_path / "one.safetensors")
    sent = weights_sent(server)
    sv.diff("org/rl", "org/base", tmp_path / "two.safetensors")
    assert weights_sent(server) == sent
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


def test_wrong_bytes_of_the_right_size_are_refused(models, server, tmp_path, monkeypatch):
    server.adopt(monkeypatch, tmp_path / "home")
    server.corrupt("/cdn/")
    with pytest.raises((sv.SkillvecError, OSError)):
        sv.diff("org/rl", "org/base", tmp_path / "v.safetensors")
    assert not (tmp_path / "v.safetensors").exists()


def test_tied_heads_are_compared_by_small_ranges(models, server, tmp_path, monkeypatch):
    base = load(models / "base")
    config = {"model_type": "toy", "tie_word_embeddings": True}
    tied = {name: t for name, t in base.items() if name != "lm_head.weight"}
    server.add_repo("org/tied", save(tmp_path / "tied", tied, config=config))
    both = tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    server.add_repo("org/both", save(tmp_path / "both", both, config=config))
    server.adopt(monkeypatch, tmp_path / "home")
    vector = sv.diff("org/both", "org/tied", tmp_path / "v.safetensors")
    assert vector.manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert vector.report.facts["changed"] == 0


def test_a_vector_with_measuring_passes_cannot_be_streamed(models, server, tmp_path, monkeypatch):
    server.adopt(monkeypatch, tmp_path / "home")
    parts = ["org/rl::org/base", models / "skill.safetensors"]
    vector = sv.combine(*parts, op="sparsify", parameters={"density": 0.5})
    with pytest.raises(sv.UsageError, match="sparsify has to measure"):
        vector.save(tmp_path / "v.safetensors", stream=True)
    vector.save(tmp_path / "v.safetensors")
    local = sv.combine(
        f"{models / 'rl'}::{models / 'base'}", parts[1], op="sparsify", parameters={"density": 0.5}
    )
    local.save(tmp_path / "local.safetensors")
    assert_same_bits(tmp_path / "v.safetensors", tmp_path / "local.safetensors")


def test_a_target_of_another_shape_on_the_hub_is_refused(models, server, tmp_path, monkeypatch):
    server.adopt(monkeypatch, tmp_path / "home")
    with pytest.raises(IncompatibleError, match="incompatible"):
        sv.apply("org/other", models / "skill.safetensors", tmp_path / "out", stream=True)
    report = sv.inspect(models / "skill.safetensors", target="org/target")
    assert report.facts["verdict"] == "same family"
    addresses = sv.open_checkpoint("org/target").files
    assert all(remote_of(address).local is None for address in addresses)


def test_adapters_and_patches_on_the_hub(models, server, tmp_path, monkeypatch):
    pair = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 160),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(160, 2),
    }
    adapter = save(tmp_path / "adapter" / "adapter_model.safetensors", pair).parent
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    server.add_repo("org/adapter", adapter)
    server.adopt(monkeypatch, tmp_path / "home")
    vector = sv.diff("org/adapter", "org/base", tmp_path / "v.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert vector.report.facts["changed"] == 160 * 160
    sv.apply("org/base", vector, tmp_path / "out", dtype="fp32")
    before, after = (load(folder)[name].float() for folder in (models / "base", tmp_path / "out"))
    assert np.allclose((after - before).numpy(), 4.0, atol=1e-6)


def test_whole_modules_of_an_adapter_meet_the_base_of_its_revision(
    models, server, tmp_path, monkeypatch
):
    base = load(models / "base")
    first = server.repos["org/base"].refs["refs/heads/main"]
    server.commit("org/base", {"config.json": b'{"model_type": "other"}'})
    name = "model.layers.0.self_attn.q_proj"
    held = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, 160),
        f"base_model.model.{name}.lora_B.weight": torch.zeros(160, 2),
        "base_model.model.lm_head.weight": base["lm_head.weight"] + 1,
    }
    adapter = save(tmp_path / "adapter" / "adapter_model.safetensors", held).parent
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"], "base_model_name_or_path": "org/base", "revision": first,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    server.adopt(monkeypatch, tmp_path / "home")
    assert sv.SkillVector.open(adapter).manifest["base"]["revision"] == first
