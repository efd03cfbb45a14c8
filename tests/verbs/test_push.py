"""Push and pull with the real client, over HTTP, against the Hub of hubserver.py."""

import json
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import assert_same_bits, perturbed, save, toy
from hubserver import HubServer
from huggingface_hub import HfApi, ModelCard

import skillvec
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, UsageError
from skillvec.remote import files as files_module
from skillvec.remote.files import time
from skillvec.verbs._publish import pull, push

SKILL = "skill.safetensors"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def slept(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    slept = server.adopt(monkeypatch, tmp_path / "home")
    clock = types.SimpleNamespace(**vars(time))
    clock.sleep = slept.append
    monkeypatch.setattr(files_module, "time", clock)
    return slept


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a vector, the same in shards, another vector, and a merged model."""
    folder = tmp_path_factory.mktemp("made")
    base = toy(0)
    save(folder / "base", base, side_files={"README.md": "---\nlicense: mit\n---\n# The base\n"})
    for seed, name in enumerate(("skill", "other"), 1):
        save(folder / "tuned", perturbed(base, seed, density=0.3))
        skillvec.diff(folder / "tuned", folder / "base", folder / f"{name}.safetensors")
    skillvec.SkillVector.open(folder / SKILL).save(
        folder / "shards.safetensors", max_shard_size="4KB", codec="dense"
    )
    skillvec.apply(folder / "base", folder / SKILL, folder / "merged")
    return folder


def puts(server: HubServer) -> list[int]:
    return [request.received for request in server.requests if request.method == "PUT"]


def test_a_vector_goes_there_and_back(server, slept, made, tmp_path):
    plan = push(made / SKILL, "user/skill", private=True, dry_run=True)
    assert not plan.facts["exists"] and "user/skill" not in server.repos
    done = push(made / SKILL, "user/skill", private=True, license="Apache-2.0")
    files = server.files("user/skill")
    assert files[SKILL] == (made / SKILL).read_bytes()
    assert server.repos["user/skill"].private
    assert done.facts["commit"] == HfApi().model_info("user/skill").sha
    assert done.facts["url"] == f"{server.endpoint}/user/skill"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "skillvec")
    assert str(made) not in files["README.md"].decode()
    assert any(str(made) in text for text in done.warnings)
    commits = len(server.repos["user/skill"].log)
    assert commits == 2  # that of create, and one

    asked = len(server.requests)
    back = pull("user/skill", tmp_path / "back.safetensors")
    assert Path(back.facts["output"]).read_bytes() == (made / SKILL).read_bytes()
    assert back.facts["revision"] == done.facts["commit"]
    assert os.listdir(tmp_path / "back.safetensors".replace("back.safetensors", "")) != []
    assert not list(tmp_path.glob(".*unfinished"))
    assert any(request.range for request in server.requests[asked:])
    with pytest.raises(UsageError, match="exists already"):
        pull("user/skill", tmp_path / "back.safetensors")
    pull("user/skill", tmp_path / "back.safetensors", force=True)
    cached = pull("user/skill").facts["output"]
    assert Path(cached).read_bytes() == (made / SKILL).read_bytes()
    assert str(tmp_path / "home") in cached


def test_shards_and_merged_models_are_folders(server, slept, made, tmp_path):
    push(made / "shards.safetensors", "user/shards")
    back = pull("user/shards", tmp_path / "back.safetensors")
    assert {"vector.safetensors.index.json", "README.md"} < set(back.facts["files"])
    opened = skillvec.SkillVector.open(tmp_path / "back.safetensors")
    assert opened.manifest == skillvec.SkillVector.open(made / "shards.safetensors").manifest

    push(made / "merged", "user/merged")
    card = ModelCard(server.files("user/merged")["README.md"].decode())
    assert card.data.license == "mit" and "# The base" in card.text
    assert card.data.library_name == "transformers"
    back = pull("user/merged", tmp_path / "back")
    assert_same_bits(tmp_path / "back", made / "merged")
    assert skillvec.verify(tmp_path / "back").facts["verified"]
    for repo in ("user/shards", "user/merged"):
        assert Path(pull(repo).facts["output"]).is_dir()


def test_nothing_is_sent_twice_and_a_readers_text_stays(server, slept, made):
    first = push(made / SKILL, "user/skill").facts["commit"]
    assert len(puts(server)) == 1
    again = push(made / SKILL, "user/skill").facts["commit"]
    assert again == first and len(puts(server)) == 1
    card = server.files("user/skill")["README.md"].decode()
    theirs = card.replace("---\n", "---\nlicense: mit # ours\n", 1) + "\n## Mine\n\r\ntext \n"
    server.commit("user/skill", {"README.md": theirs.encode(), "notes.md": b"mine"})
    HfApi().create_branch("user/skill", branch="old")
    push(made / "other.safetensors", "user/skill", revision="old", license="apache-2.0")
    files = server.files("user/skill", "old")
    text = files["README.md"].decode()
    assert "license: mit # ours\n" in text and text.endswith("\n## Mine\n\r\ntext \n")
    other = skillvec.SkillVector.open(made / "other.safetensors").manifest["identity"]
    assert other in text and other not in theirs
    assert set(files) == {".gitattributes", "README.md", "notes.md", "other.safetensors"}


def test_a_vector_of_zeros_is_told_before_it_is_public(server, slept, made, tmp_path):
    skillvec.diff(made / "base", made / "base", tmp_path / "zero.safetensors")
    for vector, warnings in ((tmp_path / "zero.safetensors", 1), (made / SKILL, 0)):
        report = push(vector, "user/zero", dry_run=True)
        assert len([text for text in report.warnings if "vector is zero" in text]) == warnings


def test_a_repository_holds_one_vector(server, slept, made):
    push(made / SKILL, "user/skill")
    before = server.files("user/skill")
    with pytest.raises(UsageError, match="holds other weights"):
        push(made / "other.safetensors", "user/skill")
    assert server.files("user/skill") == before
    done = push(made / "other.safetensors", "user/skill", create_pr=True, commit_message="see")
    assert done.facts["pull_request"] == done.facts["url"]
    assert SKILL not in server.files("user/skill", "refs/pr/1")
    assert server.files("user/skill") == before
    done = push(made / "other.safetensors", "user/skill", revision="v2/new")
    assert done.facts["url"].endswith("/tree/v2%2Fnew")
    assert pull("user/skill", revision="v2/new").facts["revision"] == done.facts["commit"]
    with pytest.raises(UsageError, match="is public"):
        push(made / SKILL, "user/skill", private=True)


def test_what_is_not_ours_is_refused(server, slept, made, tmp_path):
    with pytest.raises(IncompatibleError, match="neither"):
        push(made / "base", "user/base")
    os.link(made / SKILL, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="from_pretrained"):
        push(tmp_path / "model.safetensors", "user/skill")
    for repo in ("skill", "user/a/b", "https://localhost/y"):
        with pytest.raises(UsageError, match="expected org/name"):
            push(made / SKILL, repo)
    with pytest.raises(UsageError, match="no such file"):
        push(made / "none", "user/skill")
    broken = bytearray((made / SKILL).read_bytes())
    broken[-1] ^= 1  # the side table: the header alone would not tell
    (tmp_path / "broken.safetensors").write_bytes(broken)
    with pytest.raises(FormatError):
        push(tmp_path / "broken.safetensors", "user/skill")
    server.add_repo("org/base", made / "base")
    with pytest.raises(IncompatibleError, match="neither"):
        pull("org/base", tmp_path / "out")
    assert not server.repos.keys() & {"user/skill", "user/base"}


def test_who_may_not(server, slept, made, monkeypatch, tmp_path):
    server.owners["org"] = {"other"}
    with pytest.raises(UsageError, match="write access"):
        push(made / SKILL, "org/skill")
    with pytest.raises(UsageError, match="write access"):
        push(made / SKILL, "user/skill", token="wrong-token")
    push(made / SKILL, "user/skill", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="write access") as caught:
        push(made / SKILL, "user/skill")
    assert "good" not in str(caught.value)
    with pytest.raises(UsageError, match="private"):
        pull("user/skill", tmp_path / "out.safetensors")
    assert pull("user/skill", tmp_path / "out.safetensors", token="good")
    with pytest.raises(UsageError, match="no such branch"):
        pull("user/skill", revision="none", token="good")


def test_a_busy_hub_and_broken_connections(server, slept, made, tmp_path):
    server.fail("/api/repos/create", 429, headers={"Retry-After": "7"})
    server.fail("/preupload/", 503)
    server.fail("/commit/", 500)
    server.cut_after("/upload/", 100)
    push(made / SKILL, "user/skill")
    assert 7 in slept
    assert puts(server)[0] == 100 and len(puts(server)) == 2
    assert server.files("user/skill")[SKILL] == (made / SKILL).read_bytes()
    server.fail("/commit/", 503, times=99)
    with pytest.raises(SkillvecError, match="503"):
        push(made / "other.safetensors", "user/skill", create_pr=True)
    server.heal()

    server.cut_after(SKILL, 300)
    pull("user/skill", tmp_path / "cut.safetensors")
    assert (tmp_path / "cut.safetensors").read_bytes() == (made / SKILL).read_bytes()
    server.corrupt(SKILL)
    for output in (tmp_path / "wrong.safetensors", None):
        with pytest.raises(FormatError, match="digest"):
            pull("user/skill", output)
    assert not (tmp_path / "wrong.safetensors").exists()
    assert not list(tmp_path.glob(".*unfinished"))


def test_a_change_meanwhile_is_not_overwritten(server, slept, made, monkeypatch):
    push(made / SKILL, "user/skill")
    preupload = HfApi.preupload_lfs_files

    def and_someone_else(*args, **options):
        server.commit("user/skill", {"README.md": b"theirs\n"})
        return preupload(*args, **options)

    server.commit("user/skill", {"README.md": b"mine\n"})
    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_someone_else)
    with pytest.raises(SkillvecError, match="meanwhile"):
        push(made / SKILL, "user/skill")
    assert server.files("user/skill")["README.md"] == b"theirs\n"


def test_the_licence_of_the_base_is_carried_over(server, slept, made, tmp_path):
    license = "---\nlicense: other\nlicense_name: big\nlicense_link: LICENSE\n---\n"
    server.add_repo("org/base", {"README.md": license.encode()})
    sha = HfApi().model_info("org/base").sha
    raw = (made / SKILL).read_bytes()
    nbytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + nbytes])
    manifest = json.loads(header["__metadata__"]["skillvec"])
    manifest["base"] |= {"ref": "org/base", "revision": sha}
    from skillvec.vectors.manifest import encode_manifest

    header["__metadata__"] = encode_manifest(manifest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / SKILL
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + nbytes :])
    push(path, "user/skill")
    card = ModelCard(server.files("user/skill")["README.md"].decode())
    assert (card.data.license, card.data.license_name) == ("other", "big")
    assert card.data.base_model == ["org/base"]
    assert card.data["base_model_relation"] == "adapter"
    assert f"org/base@{sha}" in card.text


def test_what_arrives_is_what_the_header_said(server, slept, made, tmp_path):
    push(made / "merged", "user/merged")
    at = (made / "merged" / "model.safetensors").read_bytes().index(b"skillvec 0.")
    server.corrupt("model.safetensors", at=at, times=1)  # the first range request alone
    with pytest.raises(IncompatibleError, match="not what its header said"):
        pull("user/merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
