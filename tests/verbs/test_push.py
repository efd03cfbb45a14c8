"""Push and pull with the real client, over HTTP, against the Hub of hubserver.py."""

import json
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from families import assert_same_bits, perturbed, save, toy
from hubserver import HubServer
from huggingface_hub import HfApi, ModelCard
from schemas import check_json

import skillvec
from skillvec.cli import main
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


# ------------------------------------------------------------------------------------- dry runs


def of(warnings: list[str], words: str) -> list[str]:
    return [text for text in warnings if words in text]


@pytest.mark.parametrize("what", [SKILL, "merged"])
def test_a_dry_run_shows_the_card_that_a_push_commits(what, server, slept, made):
    plan = push(made / what, "user/shown", dry_run=True)
    assert plan.facts["exists"] is False and "commit" not in plan.facts
    assert not of(plan.warnings, "the Hub was not asked") and not of(plan.warnings, "no token")
    done = push(made / what, "user/shown")
    card = server.files("user/shown")["README.md"].decode()
    assert plan.facts["card"] == done.facts["card"] == card
    assert plan.facts["files"]["README.md"] == len(card.encode())
    theirs = card + "\nwritten by its owner\n"
    server.commit("user/shown", {"README.md": theirs.encode()})
    assert push(made / what, "user/shown", dry_run=True).facts["card"] == theirs


@pytest.mark.parametrize("why", ["unreachable", "offline mode"])
def test_a_dry_run_without_the_hub_says_what_it_cannot_know(why, server, slept, made, monkeypatch):
    online = push(made / SKILL, "user/skill", dry_run=True)
    asked = len(server.requests)
    if why == "unreachable":
        server.close()
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = push(made / SKILL, "user/skill", dry_run=True)
    assert plan.facts["exists"] is None and len(server.requests) == asked
    assert {**plan.facts, "exists": False} == online.facts
    (told,) = of(plan.warnings, "the Hub was not asked")
    for words in ("other weights", "a card", "the licence", "the card for a new repository"):
        assert words in told
    assert ("offline mode is on" if why == "offline mode" else "cannot be reached") in told
    assert len(slept) <= 1  # a second of waiting, no more
    with pytest.raises(SkillvecError, match=r"cannot be reached|offline mode"):
        push(made / SKILL, "user/skill")


def test_a_dry_run_needs_no_token_and_says_so(server, made, monkeypatch, tmp_path):
    server.adopt(monkeypatch, tmp_path / "home", token=None)
    plan = push(made / SKILL, "user/skill", dry_run=True)
    (told,) = of(plan.warnings, "no token")
    assert "whether you may write to it" in told and "hf auth login" in told
    assert plan.facts["card"] and "user/skill" not in server.repos
    assert not of(push(made / SKILL, "user/skill", token="good", dry_run=True).warnings, "no token")


def test_a_licence_that_only_the_hub_knows_is_not_asked_for_without_it(
    server, slept, made, tmp_path
):
    server.add_repo("org/base", made / "base")
    v = tmp_path / SKILL
    skillvec.diff(made / "merged", "org/base", v)
    assert "license: mit" in push(v, "user/of-hub", dry_run=True).facts["card"]
    server.close()
    plan = push(v, "user/of-hub", dry_run=True)
    assert "license:" not in plan.facts["card"] and len(slept) <= 1
    assert not of(plan.warnings, "no licence was carried over")


def test_the_card_is_data_and_the_rest_is_talk(server, slept, made):
    server.close()
    words = ["push", str(made / SKILL), "user/skill", "--dry-run"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0
    card = push(made / SKILL, "user/skill", dry_run=True).facts["card"]
    assert shown.stdout == f"{card}\n"
    assert "push vector" in shown.stderr and "the Hub was not asked" in shown.stderr
    quiet = CliRunner().invoke(main, [*words, "-q"])
    assert quiet.stdout == f"{server.endpoint}/user/skill\n"
    said = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    check_json(said)
    assert said["card"] == card


# ---------------------------------------------------------------------------------- repositories


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
