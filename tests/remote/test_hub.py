"""Reading from the Hub, with the real client over real HTTP against a server on loopback."""

import hashlib
import json
import os
import struct
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from hubserver import HubServer

from skillvec.errors import FormatError, OutputError, SkillvecError, UsageError
from skillvec.files.file import file_nbytes, local_path, read_bytes, read_into, remote_of
from skillvec.files.header import read_header
from skillvec.remote import files as files_module
from skillvec.remote import hub, hub_client, references

MiB = 1 << 20


def weights(numel: int, seed: int = 0, tensors: int = 1) -> bytes:
    """Return a safetensors file of random bytes."""
    header = {
        f"layer.{i}": {
            "dtype": "U8",
            "shape": [numel],
            "data_offsets": [i * numel, (i + 1) * numel],
        }
        for i in range(tensors)
    }
    raw = json.dumps(header).encode()
    noise = np.random.default_rng(seed).integers(0, 256, tensors * numel, np.uint8)
    return struct.pack("<Q", len(raw)) + raw + noise.tobytes()


WEIGHTS = weights(3 * MiB)
MODEL = {
    "config.json": b'{"model_type": "toy"}',
    "tokenizer.json": b"{}",
    "README.md": b"card",
    "notes/log.txt": b"below the root",
    "model.safetensors": WEIGHTS,
}


class Hub(NamedTuple):
    server: HubServer
    slept: list[float]
    home: Path

    def sent(self, where: str = "/cdn/") -> list[Any]:
        """Return the requests for contents; the server notes one when it is through with it."""
        held = -1
        while held != len(self.server.requests):
            held = len(self.server.requests)
            time.sleep(0.02)
        return [request for request in self.server.requests if where in request.path]

    def forget(self) -> None:
        self.sent()
        self.server.requests.clear()


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with HubServer() as server:
        slept = server.adopt(monkeypatch, tmp_path / "home")
        clock = types.SimpleNamespace(sleep=slept.append)
        monkeypatch.setattr(files_module, "time", clock)
        yield Hub(server, slept, tmp_path / "home")


def remote(loopback: Hub, name: str = "model.safetensors", files: Any = MODEL) -> hub.HubFile:
    """Return a weight file of a fresh repository, its requests forgotten."""
    loopback.server.add_repo("org/name", files)
    found = remote_of(hub.locate("org/name", "base").files[name])
    assert isinstance(found, hub.HubFile)
    loopback.forget()
    return found


# ------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(
    "text", ["hf://name", "hf://org/name@a%2F..%2Fb", "hf://org/name/../x", "hf://org/name@x/a\\b"]
)
def test_broken_references_are_refused_before_any_request(text: str, loopback: Hub):
    assert references.is_of_hub(text)
    with pytest.raises(UsageError, match=r"base hf://.*expected org/name"):
        hub.locate(text, "base")
    assert not loopback.server.requests


def test_only_models_are_read(loopback: Hub):
    with pytest.raises(UsageError, match="only repositories of models"):
        hub.locate("hf://datasets/org/name", "base")


# ---------------------------------------------------------------------------------------- places


def test_revisions_become_commits(loopback: Hub):
    server = loopback.server
    first = server.add_repo("org/name", MODEL)
    second = server.commit("org/name", {"config.json": b'{"now": 2}'})
    third = server.commit("org/name", {"config.json": b'{"now": 3}'}, branch="feature/x")
    for ref, commit, config in (
        ("org/name", second, b'{"now": 2}'),
        (f"org/name@{first}", first, MODEL["config.json"]),
        ("org/name@feature/x", third, b'{"now": 3}'),
        ("hf://org/name@feature%2Fx", third, b'{"now": 3}'),
    ):
        place = hub.locate(ref, "base")
        assert place.ref == f"org/name@{commit}"
        assert (place.revision, place.path.name) == (commit, commit)
        assert (place.path / "config.json").read_bytes() == config
        assert place.files["model.safetensors"] == f"hf://org/name@{commit}/model.safetensors"


def test_small_root_files_come_at_once_and_nothing_else(loopback: Hub):
    loopback.server.add_repo("org/name", MODEL)
    place = hub.locate("org/name", "base")
    assert set(place.files) == set(MODEL)
    here = {name for name, address in place.files.items() if not address.startswith("hf://")}
    assert here == {"config.json", "tokenizer.json", "README.md"}
    for name in here:
        assert Path(place.files[name]).read_bytes() == MODEL[name]
        assert Path(place.files[name]).parent == place.path
    assert not loopback.sent()
    below = place.files["notes/log.txt"]  # where it is wanted it can be read
    assert read_bytes(below, 0, file_nbytes(below)) == MODEL["notes/log.txt"]


def test_a_branch_that_moves_meanwhile_is_said(loopback: Hub, monkeypatch: pytest.MonkeyPatch):
    loopback.server.add_repo("org/name", MODEL)
    download = huggingface_hub.snapshot_download

    def late(*args: Any, **options: Any) -> str:
        loopback.server.commit("org/name", {"config.json": b"{}"})
        return download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", late)
    with pytest.raises(SkillvecError, match="main moved while it was read"):
        hub.locate("org/name", "base")


def test_a_repository_of_one_weight_file_has_a_folder(loopback: Hub):
    loopback.server.add_repo("org/name", {"skill.safetensors": WEIGHTS})
    place = hub.locate("hf://org/name/skill.safetensors", "vector")
    assert place.path.is_dir() and place.member == "skill.safetensors"


def test_headers_are_one_range_request(loopback: Hub):
    loopback.server.add_repo("org/name", MODEL)
    address = hub.locate("org/name", "base").files["model.safetensors"]
    header = read_header(address)
    assert header.tensors["layer.0"].shape == (3 * MiB,)
    assert [(r.range, r.status, r.sent) for r in loopback.sent()] == [
        (f"bytes=0-{MiB - 1}", 206, MiB)
    ]
    spec = header.tensors["layer.0"]
    values = bytearray(100)
    read_into(spec.path, spec.start + 2 * MiB, memoryview(values))
    assert bytes(values) == WEIGHTS[spec.start + 2 * MiB :][:100]
    assert [r.sent for r in loopback.sent()[1:]] == [100]


def test_long_headers_are_two_requests(loopback: Hub):
    file = remote(loopback, files={"model.safetensors": weights(1, tensors=16_000)})
    assert len(read_header(file.address).tensors) == 16_000
    assert len(loopback.sent()) == 2


def test_ranges_are_those_of_the_file(loopback: Hub):
    file = remote(loopback)
    size = len(WEIGHTS)
    for begin, end in ((0, 8), (5, 5), (MiB - 3, MiB + 3), (MiB, MiB + 1), (size - 1, size)):
        assert file.read_range(begin, end - begin) == WEIGHTS[begin:end]
    for begin, nbytes in ((0, size + 1), (-1, 2), (size + 1, 0), (5, -1)):
        with pytest.raises(FormatError, match="bytes"):
            file.read_range(begin, nbytes)


def test_weights_in_the_cache_are_used(loopback: Hub):
    path = remote(loopback).fetch()
    loopback.forget()
    place = hub.locate("org/name", "base")
    assert os.path.samefile(local_path(place.files["model.safetensors"]), path)
    read_header(place.files["model.safetensors"])
    assert not loopback.sent()


# --------------------------------------------------------------------------- listings of others


def listing(**changes: Any) -> Any:
    entry = {"rfilename": "a.safetensors", "size": 5, "lfs": None, "blob_id": "0" * 40} | changes
    return types.SimpleNamespace(sha="a" * 40, siblings=[types.SimpleNamespace(**entry)])


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (listing(rfilename="../x"), "no relative path"),
        (listing(rfilename="/x"), "no relative path"),
        (listing(rfilename="a\\b"), "no relative path"),
        (listing(rfilename="a\x1b[0m"), "no relative path"),
        (listing(rfilename=7), "no relative path"),
        (listing(size=None), "no size"),
        (listing(size=-1), "no size"),
        (listing(size=True), "no size"),
        (listing(lfs=types.SimpleNamespace(size=6, sha256="0" * 64)), "no size"),
        (listing(lfs=types.SimpleNamespace(size=5, sha256="x")), "no digest"),
        (listing(blob_id="zz"), "no digest"),
        (types.SimpleNamespace(sha="main", siblings=[]), "names no commit"),
    ],
)
def test_hostile_listings_are_refused(
    info: Any, message: str, loopback: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: info)
    with pytest.raises(FormatError, match=message):
        hub.locate("org/name", "base")


def test_an_answer_of_another_shape_is_an_error_of_ours(
    loopback: Hub, monkeypatch: pytest.MonkeyPatch
):
    loopback.server.fail("/api/models/org/name", 200)  # JSON, but no model
    with pytest.raises(FormatError, match="not understood"):
        hub.locate("org/name", "base")


# ---------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_taken_up_where_it_broke(reset: bool, loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    loopback.server.cut_after("model.safetensors", MiB, reset=reset)
    loopback.server.cut_after("model.safetensors", MiB, reset=reset)
    told: list[int] = []
    path = file.fetch(tmp_path, told.append)
    assert Path(path).read_bytes() == WEIGHTS and file.local == path
    sent = loopback.sent()
    starts = [int(request.range.removeprefix("bytes=").split("-")[0]) for request in sent]
    if reset:  # the server may note a request late
        starts.sort()
    assert len(sent) == 3 and starts == sorted(set(starts))
    if not reset:  # a reset may take what was under way
        assert starts == [0, MiB, 2 * MiB]
        assert sum(request.sent for request in sent) == len(WEIGHTS)
    assert told == sorted(told) and told[-1] == len(WEIGHTS)
    assert len(loopback.slept) == 2


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_does_not_stop_a_download_into_the_cache(reset: bool, loopback: Hub):
    file = remote(loopback)
    loopback.server.cut_after("model.safetensors", MiB, reset=reset)
    path = file.fetch()
    assert Path(path).read_bytes() == WEIGHTS
    assert path.startswith(str(loopback.home))


@pytest.mark.parametrize("whole", [False, True], ids=["range", "cache"])
def test_tries_are_bounded(whole: bool, loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    loopback.server.cut_after("model.safetensors", 1000, times=float("inf"), reset=True)
    with pytest.raises(SkillvecError, match="kept breaking"):
        file.fetch(None if whole else tmp_path)
    assert len(loopback.sent()) == hub_client.TRIES
    assert not [path for path in tmp_path.glob("*") if path != loopback.home]
    assert file.local is None


def test_progress_renews_the_tries(loopback: Hub, tmp_path: Path):
    files = {"model.safetensors": weights(8 * MiB)}
    file = remote(loopback, files=files)
    loopback.server.cut_after("model.safetensors", MiB + 1000, times=6)
    path = file.fetch(tmp_path)
    assert Path(path).read_bytes() == files["model.safetensors"]
    assert set(loopback.slept) == {1.0}


def test_wrong_bytes_are_deleted(loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    loopback.server.corrupt("model.safetensors", at=2 * MiB)
    with pytest.raises(FormatError, match=r"model\.safetensors: expected .* deleted"):
        file.fetch(tmp_path)
    with pytest.raises(FormatError, match=r"model\.safetensors: expected .* deleted"):
        file.fetch()
    assert file.local is None
    left = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert not [path for path in left if os.path.getsize(path) == len(WEIGHTS)]
    loopback.server.heal()
    assert Path(file.fetch()).read_bytes() == WEIGHTS


def test_wrong_small_files_are_deleted(loopback: Hub):
    loopback.server.add_repo("org/name", MODEL)
    loopback.server.corrupt("config.json", at=0)
    with pytest.raises(FormatError, match=r"config\.json: expected"):
        hub.locate("org/name", "base")
    loopback.server.heal()
    place = hub.locate("org/name", "base")
    assert (place.path / "config.json").read_bytes() == MODEL["config.json"]


def test_an_answer_without_the_range_is_refused(loopback: Hub):
    file = remote(loopback)
    file.read_range(0, 1)
    loopback.server.fail("/cdn/", 200)
    with pytest.raises(FormatError, match="not served by range"):
        file.read_range(2 * MiB, 10)


def test_a_file_of_another_size_is_refused(loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    file.nbytes -= 1
    with pytest.raises(FormatError, match=f"expected {len(WEIGHTS) - 1} bytes, found"):
        file.fetch(tmp_path)


def test_a_full_disk_is_said(loopback: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = remote(loopback)
    with pytest.raises(OutputError, match="No such file or directory"):
        file.fetch(tmp_path / "absent")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OutputError, match="No space left"):
        file.fetch()
    assert not loopback.slept


class Watching:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def planned(self, report: Any) -> None:
        raise AssertionError

    def advanced(self, done_nbytes: int, total_nbytes: int) -> None:
        self.seen.append((done_nbytes, total_nbytes))


def test_all_files_are_fetched_each_once(loopback: Hub, tmp_path: Path):
    contents = {f"model-{i}.safetensors": weights(MiB, i) for i in range(6)}
    loopback.server.add_repo("org/name", contents)
    files = hub.locate("org/name", "base").files
    here = tmp_path / "here"
    here.write_bytes(b"of this disk")
    watching = Watching()
    hub.fetch_all([os.fspath(here), *files.values(), *files.values()], watching)
    for name, address in files.items():
        assert Path(local_path(address)).read_bytes() == contents[name]
    assert sorted(r.path[-19:] for r in loopback.sent()) == sorted(contents)
    assert watching.seen[-1] == (sum(map(len, contents.values())),) * 2
    hub.fetch_all(files.values())
    assert len(loopback.sent()) == 6


def test_one_bad_file_stops_all(loopback: Hub):
    contents = {f"model-{i:02}.safetensors": weights(1000, i) for i in range(40)}
    loopback.server.add_repo("org/name", contents)
    files = hub.locate("org/name", "base").files
    loopback.server.corrupt("model-01.safetensors")
    with pytest.raises(FormatError, match=r"model-01\.safetensors"):
        hub.fetch_all(files.values())
    assert len(loopback.sent()) < 40


def test_other_downloads_are_given_up_in_the_middle(loopback: Hub, monkeypatch: pytest.MonkeyPatch):
    loopback.server.add_repo("org/name", {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS})
    files = hub.locate("org/name", "base").files
    begun, ended = threading.Event(), threading.Event()

    def download(repo: str, name: str, tqdm_class: Any, **options: Any) -> str:
        if name == "a.safetensors":
            begun.wait(5)
            raise OSError(5, "Input/output error")
        with tqdm_class(total=10**4) as bar:
            for _ in range(10**4):
                begun.set()
                bar.update(1)
                time.sleep(0.001)
        ended.set()
        return ""

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OutputError, match=r"a\.safetensors: cannot be kept: Input/output error"):
        hub.fetch_all(files.values())
    assert begun.is_set() and not ended.is_set()


# ------------------------------------------------------------------------------ errors of the Hub


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/absent", "base org/absent: no repository of a model on the Hub"),
        ("org/name@absent", "no such branch, tag or commit"),
        ("hf://org/name/absent", r"no such file:\n  README.md"),
        ("hf://org/name/notes", r"notes is a folder.*:\n  notes/log.txt"),
        ("org/private", "no repository.*if it is private, give a token"),
        ("org/na--me", "not a name|no repository"),
    ],
)
def test_what_is_not_there_is_said(
    ref: str, message: str, loopback: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    loopback.server.add_repo("org/name", MODEL)
    loopback.server.add_repo("org/private", MODEL, private=True)
    with pytest.raises(UsageError, match=message) as caught:
        hub.locate(ref, "base")
    error = caught.value
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert not loopback.slept


def test_tokens_open_private_repositories_and_are_never_shown(
    loopback: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("HF_TOKEN")
    server = loopback.server
    server.tokens["secret-token"] = "user"
    server.add_repo("org/private", MODEL, private=True)
    server.add_repo("org/gated", MODEL, gated=True)
    place = hub.locate("org/private", "base", token="secret-token")
    file = remote_of(place.files["model.safetensors"])
    assert isinstance(file, hub.HubFile)
    assert file.read_range(0, 9) == WEIGHTS[:9]
    assert {r.authorization for r in loopback.sent("/resolve/")} == {"Bearer secret-token"}
    assert not [r for r in loopback.sent() if r.authorization]  # not to another host
    with pytest.raises(UsageError, match="gated: ask for access") as gated:
        hub.locate("org/gated", "base", token="secret-token")
    server.fail("model.safetensors", 403)
    with pytest.raises(UsageError, match="forbids") as forbidden:
        file.fetch(tmp_path)
    for text in (repr(file), str(place), str(gated.value), str(forbidden.value)):
        assert "secret" not in text and "signature" not in text


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status: int, loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    loopback.server.fail("/cdn/", status, times=2, headers={"Retry-After": "7"})
    assert Path(file.fetch(tmp_path)).read_bytes() == WEIGHTS
    assert loopback.slept == [7, 7]
    loopback.server.fail("/api/models", status, times=1, headers={"Retry-After": "9"})
    hub.locate("org/name", "base")
    assert loopback.slept == [7, 7, 9]


def test_limits_of_requests_are_waited_for(loopback: Hub):
    file = remote(loopback)
    loopback.server.fail("/cdn/", 429, headers={"ratelimit": '"resolvers";r=0;t=33'})
    assert file.read_range(0, 4) == WEIGHTS[:4]
    assert loopback.slept == [33]


def test_too_many_requests_end_in_an_error(loopback: Hub, tmp_path: Path):
    file = remote(loopback)
    loopback.server.fail("/cdn/", 429, times=float("inf"))
    with pytest.raises(SkillvecError, match="answered 429 after 5 tries"):
        file.fetch(tmp_path)
    assert len(loopback.sent()) == hub_client.TRIES
    assert loopback.slept == [1, 2, 4, 8]
    with pytest.raises(SkillvecError, match="answered 429"):
        file.fetch()
    assert len(loopback.sent()) < 3 * hub_client.TRIES
    loopback.server.heal()
    loopback.slept.clear()
    loopback.server.fail("/cdn/", 429, headers={"Retry-After": "86400"})
    with pytest.raises(SkillvecError, match="answered 429"):
        file.fetch(tmp_path)
    assert not loopback.slept


def test_no_server_is_said(loopback: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = remote(loopback)
    loopback.server.__exit__(None, None, None)
    for call in (lambda: hub.locate("org/name", "base"), lambda: file.fetch(tmp_path), file.fetch):
        with pytest.raises(SkillvecError, match=r"cannot be reached.*HF_HUB_OFFLINE=1"):
            call()


def test_offline_mode_reads_the_cache(loopback: Hub, monkeypatch: pytest.MonkeyPatch):
    server = loopback.server
    commit = server.add_repo("org/name", MODEL)
    online = hub.locate("org/name", "base")
    address = online.files["model.safetensors"]
    loopback.forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = hub.locate("org/name", "base")
    assert (place.path, place.revision) == (online.path, commit)
    assert set(place.files) == {"config.json", "tokenizer.json", "README.md"}
    assert hub.locate(f"org/name@{commit}", "base").files == place.files
    with pytest.raises(UsageError, match="offline mode: in the cache"):
        hub.locate("hf://org/name/model.safetensors", "base")
    with pytest.raises(UsageError, match="offline mode is on"):
        hub.fetch_all([address])
    for ref in ("org/other", "org/name@v1"):
        with pytest.raises(UsageError, match="offline mode is on"):
            hub.locate(ref, "base")
    assert not server.requests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.fetch_all([address])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = hub.locate("org/name", "base").files["model.safetensors"]
    assert hashlib.sha256(Path(kept).read_bytes()).digest() == hashlib.sha256(WEIGHTS).digest()
