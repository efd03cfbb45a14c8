"""The loopback Hub against the real client: what the other tests of the Hub rely on."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import huggingface_hub as hub
import pytest
from hubserver import HubServer
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/deep/notes.txt": b"notes"}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def slept(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    return server.adopt(monkeypatch, tmp_path / "home")


def test_a_repository_is_listed_and_downloaded(server: HubServer, slept: list[float]) -> None:
    sha = server.add_repo("org/name", FILES)
    info = hub.HfApi().model_info("org/name", files_metadata=True)
    assert info.sha == sha
    lfs = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    assert lfs == {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    server.page = 2
    tree = [entry.path for entry in hub.HfApi().list_repo_tree("org/name", recursive=True)]
    assert tree == ["config.json", "model.safetensors", "sub", "sub/deep", "sub/deep/notes.txt"]
    folder = hub.snapshot_download("org/name")
    assert {name: (Path(folder) / name).read_bytes() for name in FILES} == FILES
    of_cdn = [request for request in server.requests if request.path.startswith("/cdn/")]
    assert [request.sent for request in of_cdn] == [len(WEIGHTS)]
    assert of_cdn[0].authorization is None
    assert slept == []


def test_revisions_and_ranges(server: HubServer, slept: list[float]) -> None:
    first = server.add_repo("org/name", FILES)
    second = server.commit("org/name", {"model.safetensors": b"x" * 99, "config.json": None})
    api = hub.HfApi()
    assert api.model_info("org/name").sha == second
    assert api.model_info("org/name", revision=first).sha == first
    api.create_branch("org/name", branch="old/one", revision=first)
    api.create_tag("org/name", tag="v1", revision=first)
    old = api.get_paths_info("org/name", ["model.safetensors", "sub", "no"], revision="old/one")
    assert [getattr(entry, "size", None) for entry in old] == [len(WEIGHTS), None]
    refs = api.list_repo_refs("org/name")
    assert {ref.name for ref in refs.branches + refs.tags} == {"main", "old/one", "v1"}
    files = hub.HfFileSystem()
    with files.open(f"org/name@{first}/model.safetensors", block_size=64) as file:
        file.seek(100)
        assert file.read(7) == WEIGHTS[100:107]
    assert any(request.range and request.status == 206 for request in server.requests)
    assert len(api.list_repo_commits("org/name")) == 2


def test_who_may_read_and_write(server: HubServer, slept: list[float], tmp_path: Path) -> None:
    server.add_repo("org/private", FILES, private=True)
    server.add_repo("org/gated", FILES, gated=True)
    server.owners["org"] = {"other"}
    server.tokens["theirs"] = "other"
    api = hub.HfApi()
    assert api.model_info("org/private", token="good").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/private", token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.model_info("org/private", token="bad")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/private", revision="none")
    with pytest.raises(EntryNotFoundError):
        hub.hf_hub_download("org/private", "none.json")
    with pytest.raises(GatedRepoError):
        hub.hf_hub_download("org/gated", "config.json")
    server.grant("org/gated", "user")
    assert hub.hf_hub_download("org/gated", "config.json")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("org/new")
    assert api.create_repo("org/new", token="theirs", private=True) == f"{server.endpoint}/org/new"
    assert api.create_repo("org/new", token="theirs", exist_ok=True).repo_id == "org/new"
    assert api.whoami()["name"] == "user"


@pytest.mark.parametrize("part_nbytes", [2**30, 1000])
def test_uploads(server: HubServer, slept: list[float], tmp_path: Path, part_nbytes: int) -> None:
    server.part_nbytes = part_nbytes
    api = hub.HfApi()
    api.create_repo("user/name")
    path = tmp_path / "a.safetensors"
    path.write_bytes(WEIGHTS)

    def commit(name: str, content: Path | bytes, **options: object) -> hub.CommitInfo:
        operation = hub.CommitOperationAdd(name, content)
        return api.create_commit("user/name", [operation], commit_message="m", **options)

    server.cut_after("/upload/", 500)
    done = commit("a.safetensors", path)
    assert done.oid == api.model_info("user/name").sha
    assert server.files("user/name")["a.safetensors"] == WEIGHTS
    puts = [request for request in server.requests if request.method == "PUT"]
    assert puts[0].received == 500 and sum(put.received for put in puts[1:]) == len(WEIGHTS)
    before = len(server.requests)
    assert commit("b.safetensors", path).oid != done.oid
    assert not [request for request in server.requests[before:] if request.method == "PUT"]
    pull = commit("c.txt", b"text", create_pr=True)
    assert pull.pr_revision == "refs/pr/1"
    assert "c.txt" in server.files("user/name", "refs/pr/1")
    assert "c.txt" not in server.files("user/name")
    with pytest.raises(HfHubHTTPError, match="412"):
        commit("d.txt", b"text", parent_commit=done.oid)
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit("README.md", b"---\nbase_model_relation: cousin\n---\n")


def test_faults(server: HubServer, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("org/name", FILES)
    # what was received of an unfinished piece (10 MB) is dropped by the client
    monkeypatch.setattr(hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    server.cut_after("model.safetensors", 1050)
    path = hub.hf_hub_download("org/name", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    of_cdn = [request for request in server.requests if request.path.startswith("/cdn/")]
    assert [request.sent for request in of_cdn] == [1050, len(WEIGHTS) - 1000]
    assert of_cdn[1].range == "bytes=1000-"
    assert slept == [1]
    server.fail("tree", 429, headers={"Retry-After": "7"})
    server.fail("tree", 503)
    assert len(list(hub.HfApi().list_repo_tree("org/name"))) == 3
    assert slept == [1, 8, 2]
    server.corrupt("model.safetensors", at=3)
    path = hub.hf_hub_download("org/name", "model.safetensors", force_download=True)
    wrong = Path(path).read_bytes()
    assert [at for at in range(len(WEIGHTS)) if wrong[at] != WEIGHTS[at]] == [3]
    server.heal()
    server.cut_after("model.safetensors", 1000, reset=True)
    with pytest.raises(httpx2.ReadError, match="reset"):
        hub.hf_hub_download("org/name", "model.safetensors", force_download=True)
    server.fail("/api/models/org/name", 500, method="GET")
    with pytest.raises(HfHubHTTPError, match="500"):
        hub.HfApi().model_info("org/name")


def test_a_subprocess_talks_to_the_server(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("org/name", FILES, private=True)
    code = "import huggingface_hub as h; print(h.hf_hub_download('org/name', 'config.json'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=server.environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).read_bytes() == b"{}"
    assert {request.authorization for request in server.requests} == {"Bearer good"}
