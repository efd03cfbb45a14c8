"""Object stores: the real s3fs client over real HTTP against a real S3 server on loopback."""

import hashlib
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
from fsspec.registry import known_implementations
from hubserver import HubServer
from objectserver import ObjectServer

import skillvec
from skillvec.checkpoints import locate, opening
from skillvec.checkpoints.folder import is_away, is_there
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, UsageError
from skillvec.files.file import read_bytes, read_into, remote_of
from skillvec.files.header import read_header
from skillvec.remote import files as files_module
from skillvec.remote import object_store
from skillvec.vectors import reader

MiB = 1 << 20


def weights(numel: int, seed: int, names: tuple[str, ...] = ("a", "b")) -> bytes:
    """Return a safetensors file of random float32."""
    header: dict[str, Any] = {}
    for at, name in enumerate(names):
        ends = [4 * numel * at, 4 * numel * (at + 1)]
        header[name] = {"dtype": "F32", "shape": [numel], "data_offsets": ends}
    raw = json.dumps(header).encode()
    values = np.random.default_rng(seed).standard_normal(numel * len(names), np.float32)
    return struct.pack("<Q", len(raw)) + raw + values.tobytes()


NUMEL = 300_000
BASE, TUNED = weights(NUMEL, 1), weights(NUMEL, 2)
MODEL = {
    "config.json": b'{"model_type": "toy"}',
    "tokenizer.json": b"{}",
    "notes/log.txt": b"below the root",
    "model.safetensors": BASE,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as running:
        yield running


@pytest.fixture
def s3(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectServer]:
    """Yield the server with an empty bucket, the client pointed at it, its waits not waited for."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files_module, "time", types.SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own waits are real
    waits.clear()
    server.faults.clear()
    if "<Name>bucket</Name>" in server.ask("GET", "").decode():
        for key in server.keys("bucket"):
            server.ask("DELETE", f"bucket/{key}")
    else:
        server.ask("PUT", "bucket")
    server.requests.clear()
    yield server


waits: list[float] = []


def opened(s3: ObjectServer, name: str = "model.safetensors") -> object_store.ObjectFile:
    """Return a file of a model in the bucket, its requests forgotten."""
    s3.put("bucket/m", MODEL)
    found = remote_of(object_store.locate("s3://bucket/m", "base").files[name])
    assert isinstance(found, object_store.ObjectFile)
    s3.requests.clear()
    return found


def folder_of(files: dict[str, bytes], at: Path) -> Path:
    for name, content in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)
    return at


# ------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://b/x", "nonsense://b/x: expected hf:// or one of s3, gs"),
        ("file:///b/x", "file:///b/x: expected"),
        ("az://b::s3://c/x", "az://b::s3://c/x: expected"),
        (
            "gs://b/x",
            "gs://b/x needs the extra gcs, which cannot be imported (install the-package):"
            ' pip install "skillvec[gcs]"',
        ),
        ("s3://me:secret@host/x", "s3://host/x: a password or a query in a URL would be kept"),
        ("s3://b/x?signature=secret", "s3://b/x: a password or a query"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(url: str, said: str, monkeypatch: pytest.MonkeyPatch):
    entry = {"class": "no_such_package.Store", "err": "install the-package"}
    monkeypatch.setitem(known_implementations, "gs", entry)
    with pytest.raises(UsageError) as caught:
        object_store.locate(url, "base")
    assert str(caught.value).startswith(said)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/nothing", "s3://nobucket/x", "s3://bucket/m/none.bin"]
)
def test_what_is_not_there_is_said(s3: ObjectServer, url: str):
    s3.put("bucket/m", MODEL)
    with pytest.raises(UsageError, match=f"base {url}: no such bucket or object"):
        locate.locate(url, "base")
    assert not waits


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_no_permission_is_said_without_secrets_or_another_try(s3: ObjectServer, code: str):
    s3.fault("GET", "prefix=m", times=9, status=403, code=code)
    with pytest.raises(UsageError, match="base s3://bucket/m: may not be used with the cred") as e:
        object_store.locate("s3://bucket/m", "base")
    assert "very-secret-key" not in str(e.value) and len(s3.asked("GET")) == 1


def test_no_credentials_are_said(s3: ObjectServer):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_") or "FILE" in k}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    code = "from skillvec.remote import object_store; object_store.locate('s3://bucket/m', 'base')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert b"UsageError: base s3://bucket/m: may not be used with the credentials" in done.stderr


# ---------------------------------------------------------------------------------------- places


def test_describing_files_come_and_the_others_are_addressed(s3: ObjectServer):
    s3.put("bucket/m", MODEL)
    s3.put("bucket/model-next-to-it", {"config.json": b"no"})
    s3.ask("PUT", "bucket/m/")  # how consoles make a folder
    place = locate.locate("s3://bucket/m/", "base")
    assert (place.ref, place.revision, place.member) == ("s3://bucket/m/", None, None)
    assert set(place.files) == set(MODEL)
    for name in ("config.json", "tokenizer.json"):
        assert Path(place.files[name]).parent == place.path
        assert Path(place.files[name]).read_bytes() == MODEL[name]
    assert place.files["model.safetensors"] == "s3://bucket/m/model.safetensors"
    assert sorted(os.listdir(place.path)) == ["config.json", "tokenizer.json"]
    assert not s3.asked("GET", "model.safetensors")
    model = opening.open_checkpoint("s3://bucket/m")
    assert model.model_type == "toy" and model.is_folder and list(model) == ["a", "b"]
    place = model.place
    assert model.side_files() == (
        [(place.files["config.json"], "config.json"),
         ("s3://bucket/m/notes/log.txt", "notes/log.txt"),
         (place.files["tokenizer.json"], "tokenizer.json")], [],
    )  # fmt: skip


def test_the_cache_is_used_and_never_stale(s3: ObjectServer):
    s3.put("bucket/m", MODEL)
    first = object_store.locate("s3://bucket/m", "base")
    s3.requests.clear()
    assert object_store.locate("s3://bucket/m", "base").path == first.path
    assert not s3.asked("GET", "/m/")  # the listing only
    s3.put("bucket/m", {"config.json": b'{"model_type": "toi"}'})  # of the same size
    second = object_store.locate("s3://bucket/m", "base")
    assert (second.path / "config.json").read_bytes() == b'{"model_type": "toi"}'
    assert (first.path / "config.json").read_bytes() == MODEL["config.json"]


def test_a_describing_file_that_breaks_off_is_not_kept(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/m", MODEL)
    s3.fault("GET", "config.json", times=99, after=5)
    with pytest.raises(SkillvecError, match=r"config.json: the store cannot be reached or keeps"):
        object_store.locate("s3://bucket/m", "base")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left in ([], ["tokenizer.json"])


def test_a_store_without_versions_is_asked_every_time(monkeypatch: pytest.MonkeyPatch, s3: Any):
    store = fsspec.filesystem("memory")
    store.pipe({"/plain/config.json": b"{}", "/plain/x.safetensors": BASE})
    monkeypatch.setattr(object_store, "VERSIONS", ())
    assert (object_store.locate("memory://plain", "m").path / "config.json").read_bytes() == b"{}"
    store.pipe({"/plain/config.json": b"[]"})
    assert (object_store.locate("memory://plain", "m").path / "config.json").read_bytes() == b"[]"
    store.rm("/plain", recursive=True)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a%0Ab", "a\\b", ".."])
def test_hostile_names_in_a_listing_are_refused(s3: ObjectServer, name: str, tmp_path: Path):
    s3.put("bucket/m", {"evil": b"{}"})
    s3.fault("GET", "prefix=m", rewrite=lambda body: body.replace(b"m/evil", b"m/" + name.encode()))
    with pytest.raises(
        FormatError, match=r"base s3://bucket/m: an object named .* no relative path"
    ):
        object_store.locate("s3://bucket/m", "base")
    assert not list(tmp_path.rglob("*"))


def test_objects_outside_the_prefix_are_refused(s3: ObjectServer):
    s3.put("bucket/m", {"evil": b"{}"})
    s3.fault("GET", "prefix=m", rewrite=lambda body: body.replace(b"m/evil", b"more/evil"))
    with pytest.raises(FormatError, match="no relative path"):
        object_store.locate("s3://bucket/m", "base")


def test_sizes_that_cannot_be_are_refused(s3: ObjectServer):
    s3.put("bucket/m", {"x": b"{}"})
    s3.fault("GET", "prefix=m", rewrite=lambda body: body.replace(b"<Size>2<", b"<Size>-2<"))
    with pytest.raises(FormatError, match="base s3://bucket/m: x: the store says no size that"):
        object_store.locate("s3://bucket/m", "base")


def test_pickles_are_refused_by_name(s3: ObjectServer):
    s3.put("bucket/m", {"pytorch_model.bin": b"PK"})
    with pytest.raises(IncompatibleError, match="pickled weights that are not on this disk"):
        opening.open_checkpoint("s3://bucket/m")


# ----------------------------------------------------------------------------------------- reads


def test_only_what_is_asked_for_is_read(s3: ObjectServer):
    file = opened(s3)
    assert read_header(file.url).tensors["a"].shape == (NUMEL,)
    buffer = bytearray(1000)
    for offset in (len(BASE) - 1000, MiB - 500, 0):
        read_into(file.url, offset, memoryview(buffer))
        assert bytes(buffer) == BASE[offset : offset + 1000]
    gets = [(r.range, r.status, r.sent) for r in s3.asked("GET")]
    assert gets == [
        (f"bytes=0-{MiB - 1}", 206, MiB),
        (f"bytes={len(BASE) - 1000}-{len(BASE) - 1}", 206, 1000),
        (f"bytes={MiB}-{MiB + 499}", 206, 500),
    ]
    assert not is_away(file.url) and is_there(file.url)
    assert len(s3.asked("HEAD")) == 1  # one a file, not one a read
    with pytest.raises(FormatError, match=f"bytes 5 to {len(BASE) + 1} of {len(BASE)}"):
        file.read_range(5, len(BASE) - 4)


def test_an_empty_object_needs_no_request(s3: ObjectServer):
    s3.put("bucket", {"empty.safetensors": b""})
    place = object_store.locate("s3://bucket/empty.safetensors", "base")
    s3.requests.clear()
    assert read_bytes(place.files["empty.safetensors"], 0, 0) == b""
    assert not s3.requests


def test_a_single_object_is_a_model_and_a_vector(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/m", {"base.safetensors": BASE})
    model = opening.open_checkpoint("s3://bucket/m/base.safetensors")
    assert list(model) == ["a", "b"] and not model.is_folder
    (tmp_path / "b.safetensors").write_bytes(BASE)
    (tmp_path / "t.safetensors").write_bytes(TUNED)
    made = tmp_path / "v.safetensors"
    skillvec.diff(tmp_path / "t.safetensors", tmp_path / "b.safetensors", made)
    s3.put("bucket/m", {"v.safetensors": made.read_bytes()})
    s3.requests.clear()
    vector = reader.find_vector("s3://bucket/m/v.safetensors")
    assert vector is not None and set(vector.deltas) == {"a", "b"}
    assert sum(r.sent for r in s3.asked("GET", "/v.saf")) <= MiB < made.stat().st_size


def test_an_object_replaced_between_header_and_data_is_noticed(s3: ObjectServer):
    file = opened(s3)
    file.read_range(0, 100)
    before = file.identity()
    assert file.current_identity() == before == (len(BASE), before[1])
    s3.put("bucket/m", {"model.safetensors": TUNED})
    with pytest.raises(
        SkillvecError, match=r"m/model.safetensors: has changed since it was opened"
    ):
        file.read_range(2 * MiB, 100)
    assert [r.status for r in s3.asked("GET")] == [206, 412] and not waits
    with pytest.raises(
        SkillvecError, match=r"m/model.safetensors: has changed since it was opened"
    ):
        file.current_identity()


def test_an_object_replaced_between_listing_and_header_is_noticed(s3: ObjectServer):
    file = opened(s3)
    s3.put("bucket/m", {"model.safetensors": TUNED})
    with pytest.raises(SkillvecError, match="has changed since it was opened"):
        file.read_range(0, 8)


def test_an_object_deleted_meanwhile_is_noticed(s3: ObjectServer):
    file = opened(s3)
    file.read_range(0, 8)
    s3.ask("DELETE", "bucket/m/model.safetensors")
    with pytest.raises(UsageError, match=r"model.safetensors: no such bucket or object"):
        file.read_range(2 * MiB, 8)


def test_google_is_asked_for_the_generation_that_was_listed(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def cat_file(url: str, begin: int, end: int, **pin: str) -> bytes:
        asked.append((url, begin, end, pin))
        return bytes(end - begin)

    store = types.SimpleNamespace(cat_file=cat_file, protocol=("gs", "gcs"))
    monkeypatch.setattr(object_store, "_store", lambda url: store)
    entry = {"etag": "x", "generation": "17", "mtime": 1, "size": 3 * MiB}
    file = object_store.ObjectFile("gs://b/x", 3 * MiB, object_store._version(entry))
    assert file.read_range(2 * MiB, 5) == bytes(5)
    assert asked == [("gs://b/x", 2 * MiB, 2 * MiB + 5, {"generation": "17"})]


class HttpError(Exception):
    code = 401


@pytest.mark.parametrize("error", [HttpError("who?"), OSError("Forbidden: https://example.com/x")])
def test_google_denies_in_its_own_way(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def cat_file(*args: Any, **options: Any) -> bytes:
        raise error

    store = types.SimpleNamespace(cat_file=cat_file, protocol=("gs", "gcs"))
    monkeypatch.setattr(object_store, "_store", lambda url: store)
    with pytest.raises(UsageError, match="gs://b/x: may not be used with the cred") as caught:
        object_store.ObjectFile("gs://b/x", 5, ("", "")).read_range(0, 5)
    assert "signed" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 503])
def test_a_busy_server_is_asked_again_and_given_up(s3: ObjectServer, status: int):
    file = opened(s3)
    file.read_range(0, 8)
    s3.fault("GET", "model.safetensors", times=2, status=status, code="Oops")
    assert file.read_range(2 * MiB, 100) == BASE[2 * MiB :][:100]
    assert waits == [1, 2]
    s3.fault("GET", "model.safetensors", times=99, status=status, code="Oops")
    with pytest.raises(SkillvecError, match=r"keeps failing \(OSError after 4 tries\)") as caught:
        file.read_range(2 * MiB, 100)
    assert type(caught.value) is SkillvecError and waits == [1, 2, 1, 2, 4]


def test_a_body_that_breaks_off_is_read_again_and_never_taken(s3: ObjectServer):
    file = opened(s3)
    s3.fault("GET", "model.safetensors", times=1, after=MiB // 2)
    assert file.read_range(0, 100) == BASE[:100]
    assert [r.sent for r in s3.asked("GET")] == [MiB // 2, MiB]


def test_a_short_answer_is_not_taken(s3: ObjectServer):
    file = opened(s3)
    s3.fault("GET", "model.safetensors", times=99, rewrite=lambda body: body[:-1])
    with pytest.raises(SkillvecError, match=r"keeps failing \(ConnectionError after 4 tries\)"):
        file.read_range(0, 100)


def test_threads_share_a_file(s3: ObjectServer):
    file, wrong = opened(s3), []

    def read(begin: int) -> None:
        for offset in range(begin, len(BASE) - 999, 100_000):
            if file.read_range(offset, 999) != BASE[offset : offset + 999]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(n * 777,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def read_elsewhere(file: object_store.ObjectFile | str) -> bytes:
    found = remote_of(file) if isinstance(file, str) else file
    assert found is not None
    return found.read_range(2 * MiB, 100)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_a_file(s3: ObjectServer, method: str):
    file = opened(s3)
    assert read_elsewhere(file) == BASE[2 * MiB :][:100]  # a client is at work here before the fork
    assert b"very-secret-key" not in pickle.dumps(file)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_elsewhere, (file,)) == BASE[2 * MiB :][:100]
        if method == "fork":  # which finds the file, and its client, as they are here
            assert pool.apply(read_elsewhere, (file.url,)) == BASE[2 * MiB :][:100]


def test_any_store_of_fsspec_is_read(s3: ObjectServer):
    store = fsspec.filesystem("memory")
    store.pipe({f"/any/{name}": content for name, content in MODEL.items()})
    model = opening.open_checkpoint("memory://any")
    assert model.model_type == "toy"
    file = remote_of("memory://any/model.safetensors")
    assert isinstance(file, object_store.ObjectFile)
    assert file.read_range(2 * MiB, 100) == BASE[2 * MiB :][:100]
    before = file.current_identity()
    assert before == file.identity() and before[1]
    single = object_store.locate("memory://any/model.safetensors", "base")
    assert single.files == {"model.safetensors": file.url}
    store.pipe({"/any/model.safetensors": BASE})
    with pytest.raises(SkillvecError, match=r"any/model.safetensors: has changed"):
        file.current_identity()
    store.rm("/any", recursive=True)


# --------------------------------------------------------------------------------------- outputs

SHARDS = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": weights(1000, 3, ("a",)),
    "model-00002-of-00002.safetensors": weights(1000, 4, ("b",)),
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors",'
    b' "b": "model-00002-of-00002.safetensors"}}',
    "sub/note.txt": b"below",
}


def puts(s3: ObjectServer) -> list[str]:
    """Return the keys in the order in which they were there."""
    whole = [r for r in s3.requests if r.method == "PUT" and not r.query and r.status == 200]
    joined = [r for r in s3.requests if r.method == "POST" and "uploadId" in r.query]
    return [r.path.removeprefix("/bucket/") for r in s3.requests if r in [*whole, *joined]]


def test_a_folder_is_put_with_its_manifest_last(s3: ObjectServer, tmp_path: Path):
    told: list[int] = []
    assert object_store.names("s3://bucket/out") is None
    object_store.upload(folder_of(SHARDS, tmp_path / "made"), "s3://bucket/out/", told.append)
    assert object_store.names("s3://bucket/out") == {name.split("/")[0] for name in SHARDS}
    order = puts(s3)
    assert order[0] == "out/.skillvec-unfinished" and s3.keys("bucket") == sorted(order[1:])
    assert sorted(order[1:]) == sorted(f"out/{name}" for name in SHARDS)
    assert order[-1] == "out/model.safetensors.index.json"
    assert told == sorted(told) and told[-1] == sum(map(len, SHARDS.values()))
    for name, content in SHARDS.items():
        assert s3.ask("GET", f"bucket/out/{name}") == content
    assert list(opening.open_checkpoint("s3://bucket/out")) == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (("config.json", "model.safetensors", "z.json"), "model.safetensors"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapter_model.safetensors"),
        (("v-00001-of-00001.safetensors", "vector.safetensors.index.json", "z.md"),
         "vector.safetensors.index.json"),
        (("index.html", "report.json", "z.svg"), "report.json"),
    ],
)  # fmt: skip
def test_the_manifest_of_every_kind_is_last(
    s3: ObjectServer, tmp_path: Path, names: tuple[str, ...], last: str
):
    object_store.upload(folder_of(dict.fromkeys(names, b"x"), tmp_path / "made"), "s3://bucket/out")
    assert puts(s3)[-1] == f"out/{last}" and len(s3.keys("bucket")) == len(names)


def test_a_large_file_goes_in_parts_which_come_back_together(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "PART_NBYTES", 5 * MiB)  # the least that S3 takes
    source = tmp_path / "v.safetensors"
    source.write_bytes(os.urandom(12 * MiB))
    told: list[int] = []
    object_store.upload(source, "s3://bucket/out/v.safetensors", told.append)
    parts = s3.asked("PUT", "uploadId")
    assert sorted(r.query.split("partNumber=")[1][0] for r in parts) == ["1", "2", "3"]
    assert puts(s3) == ["out/v.safetensors"] and told[-1] == 12 * MiB
    assert s3.ask("GET", "bucket/out/v.safetensors") == source.read_bytes()
    assert not s3.unfinished("bucket")


@pytest.mark.parametrize(
    ("files", "nbytes", "most"),
    [(1, 4_800, 4), (1, 153_000, 4), (1, 191_000, 3), (1, 5 << 20, 1), (2, 4_800, 2),
     (9, 4_800, 1)],
)  # fmt: skip
def test_parts_are_few_enough_and_fit_memory(
    files: int, nbytes: int, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With a byte in place of each MiB: files of 5 GB to 5 TB, which is the most S3 takes."""
    for name in ("PART_NBYTES", "IN_FLIGHT_NBYTES"):
        monkeypatch.setattr(object_store, name, getattr(object_store, name) // MiB)
    monkeypatch.setattr(object_store, "MiB", 1)
    seen = []

    def put_file(
        source: str, url: str, callback: Any, chunksize: int, max_concurrency: int
    ) -> None:
        seen.append((chunksize, max_concurrency))

    store = types.SimpleNamespace(
        put_file=put_file, info=lambda url: {"size": nbytes}, find=lambda url, detail: {},
        pipe_file=lambda url, content: None, rm_file=lambda url: None, protocol="s3",
        _strip_protocol=lambda url: url,
    )  # fmt: skip
    monkeypatch.setattr(object_store, "_store", lambda url: store)
    made = tmp_path / "made"
    made.mkdir()
    for number in range(files):
        (made / str(number)).write_bytes(bytes(nbytes))
    object_store.upload(made / "0" if files == 1 else made, "s3://bucket/x")
    assert len(seen) == files and len(set(seen)) == 1
    part, at_once = seen[0]
    assert -(-nbytes // part) <= 10_000
    assert at_once == most and min(files, 4) * at_once * part <= max(64, part)


def test_an_upload_that_breaks_off_leaves_no_model_and_no_parts(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "PART_NBYTES", 5 * MiB)
    made = folder_of(SHARDS, tmp_path / "made")
    (made / "model-00002-of-00002.safetensors").write_bytes(bytes(12 * MiB))
    s3.fault("PUT", "partNumber=3", times=99, status=500, code="InternalError")
    with pytest.raises(SkillvecError, match="output s3://bucket/out/model-00002-of-00002"):
        object_store.upload(made, "s3://bucket/out")
    assert "out/model.safetensors.index.json" not in s3.keys("bucket")
    assert "out/model-00002-of-00002.safetensors" not in s3.keys("bucket")
    assert not s3.unfinished("bucket")
    assert object_store.names("s3://bucket/out") is None  # no --force is needed for the next try
    with pytest.raises(FormatError, match="m s3://bucket/out: is being written, or an upload bro"):
        object_store.locate("s3://bucket/out", "m")
    s3.faults.clear()
    object_store.upload(made, "s3://bucket/out")  # the same again is whole
    assert sorted(s3.keys("bucket")) == sorted(f"out/{name}" for name in SHARDS)


def test_an_interrupt_ends_the_other_files_and_their_parts(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "PART_NBYTES", 5 * MiB)
    made = folder_of(SHARDS, tmp_path / "made")
    (made / "model-00001-of-00002.safetensors").write_bytes(bytes(22 * MiB))
    sent = threading.Event()
    s3.fault("PUT", "partNumber=2", before=lambda: interrupted.wait(10))
    interrupted = threading.Event()

    def told(nbytes: int) -> None:
        if nbytes >= 5 * MiB:
            interrupted.set()
            sent.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        object_store.upload(made, "s3://bucket/out", told)
    assert sent.is_set() and not s3.unfinished("bucket")
    assert "out/model-00001-of-00002.safetensors" not in s3.keys("bucket")
    assert not s3.asked("PUT", "index.json") and not s3.asked("PUT", "partNumber=4")


def test_a_size_that_is_wrong_after_all_is_noticed(s3: ObjectServer, tmp_path: Path):
    made = folder_of({"config.json": b"{}", "model.safetensors": BASE}, tmp_path / "made")
    s3.fault("HEAD", "config.json", before=lambda: s3.put("bucket/out", {"config.json": b"other"}))
    with pytest.raises(SkillvecError, match=r"config.json: 2 bytes were sent, the store says 5"):
        object_store.upload(made, "s3://bucket/out")
    assert not s3.asked("PUT", "model.safetensors")


def test_no_bucket_to_write_to_is_said(s3: ObjectServer, tmp_path: Path):
    for call in (object_store.names, lambda url: object_store.upload(tmp_path, url)):
        with pytest.raises(UsageError, match="output s3://nobucket/x: no such bucket or object"):
            call("s3://nobucket/x")


OLD = {
    "model.safetensors": BASE, "tokenizer.json": b"{}", "config.json": b"[]", ".hidden": b"",
    "picture.png": b"", "deep/config.json": b"", "old.safetensors": b"",
}  # fmt: skip
STAYS = ["out/.hidden", "out/deep/config.json", "out/picture.png"]


def test_replacing_takes_the_old_manifests_first_and_the_rest_last(
    s3: ObjectServer, tmp_path: Path
):
    s3.put("bucket/out", OLD)
    s3.put("bucket/outer", {"model.safetensors": b"another's"})
    s3.requests.clear()
    object_store.upload(folder_of(SHARDS, tmp_path / "made"), "s3://bucket/out")
    steps = [
        (r.method, r.path.removeprefix("/bucket/out/"))
        for r in s3.requests if r.method in ("PUT", "DELETE")
    ]  # fmt: skip
    assert steps[0] == ("PUT", ".skillvec-unfinished")
    assert steps.pop() == ("DELETE", steps.pop(0)[1])
    assert sorted(steps[:2]) == [("DELETE", "config.json"), ("DELETE", "model.safetensors")]
    last = steps.index(("PUT", "model.safetensors.index.json"))
    assert {method for method, _ in steps[2 : last + 1]} == {"PUT"}
    gone = [("DELETE", "old.safetensors"), ("DELETE", "tokenizer.json")]
    assert sorted(steps[last + 1 :]) == gone
    new = [f"out/{name}" for name in SHARDS]
    assert sorted(s3.keys("bucket")) == sorted([*new, *STAYS, "outer/model.safetensors"])


def test_replacing_that_breaks_off_leaves_neither_old_nor_new(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/out", OLD)
    s3.fault("PUT", "00002-of", times=99, status=500, code="InternalError")
    with pytest.raises(SkillvecError):
        object_store.upload(folder_of(SHARDS, tmp_path / "made"), "s3://bucket/out")
    assert not set(object_store.MANIFESTS[:4]) & {
        key.removeprefix("out/") for key in s3.keys("bucket")
    }


def test_a_file_and_a_folder_replace_each_other(s3: ObjectServer, tmp_path: Path):
    folder = folder_of({"vector.safetensors.index.json": b"{}", "v1.safetensors": b"x"},
                       tmp_path / "made")  # fmt: skip
    single = tmp_path / "v.safetensors"
    single.write_bytes(BASE)
    object_store.upload(single, "s3://bucket/v.safetensors")
    object_store.upload(single, "s3://bucket/v.safetensors")  # in one step: it is never missing
    assert s3.keys("bucket") == ["v.safetensors"] and not s3.asked("DELETE")
    assert object_store.names("s3://bucket/v.safetensors") == {""}
    object_store.upload(folder, "s3://bucket/v.safetensors")
    assert s3.keys("bucket") == [f"v.safetensors/{path.name}" for path in sorted(folder.iterdir())]
    object_store.upload(single, "s3://bucket/v.safetensors")
    assert s3.keys("bucket") == ["v.safetensors"]


def test_any_store_of_fsspec_is_written(tmp_path: Path):
    object_store.upload(folder_of(SHARDS, tmp_path / "made"), "memory://written")
    store = fsspec.filesystem("memory")
    assert {name: store.cat(f"/written/{name}") for name in SHARDS} == SHARDS
    assert "sub" in (object_store.names("memory://written") or "")
    assert object_store.names("memory://writ") is None
    store.rm("/written", recursive=True)


# --------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        slept = running.adopt(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(files_module, "time", types.SimpleNamespace(sleep=slept.append))
        yield running


def test_a_folder_goes_to_the_hub_in_one_commit(loopback: HubServer, tmp_path: Path):
    loopback.add_repo("org/name", {"README.md": b"card", ".gitattributes": b"x"})
    made = folder_of(SHARDS, tmp_path / "made")
    assert object_store.names("hf://org/name") is None
    object_store.upload(made, "hf://org/name")
    assert object_store.names("hf://org/name") == set(SHARDS) - {"sub/note.txt"}
    assert set(loopback.files("org/name")) == {*SHARDS, "README.md", ".gitattributes"}
    assert len(loopback.repos["org/name"].log) == 2
    object_store.upload(folder_of({"model.safetensors": BASE}, tmp_path / "next"), "hf://org/name")
    left = {"model.safetensors", "sub/note.txt", "README.md", ".gitattributes"}
    assert set(loopback.files("org/name")) == left and len(loopback.repos["org/name"].log) == 3


def test_a_file_goes_to_the_hub_and_leaves_the_others(loopback: HubServer, tmp_path: Path):
    loopback.add_repo("org/name", MODEL)
    made = tmp_path / "made"
    made.write_bytes(TUNED)
    assert object_store.names("hf://org/name@main/skills/v.safetensors") is None
    object_store.upload(made, "hf://org/name@main/skills/v.safetensors")
    assert object_store.names("hf://org/name@main/skills/v.safetensors") == {""}
    assert loopback.files("org/name") == {**MODEL, "skills/v.safetensors": TUNED}


@pytest.mark.parametrize(
    ("ref", "said"),
    [("hf://org/none", "no repository of a model"), ("hf://name", "expected hf://org/name"),
     ("hf://datasets/org/name", "expected hf://org/name"),
     ("hf://org/name/v.safetensors", "a folder goes to hf://org/name, a single file to")],
)  # fmt: skip
def test_what_cannot_be_written_on_the_hub_is_refused(
    loopback: HubServer, tmp_path: Path, ref: str, said: str
):
    loopback.add_repo("org/name", MODEL)
    with pytest.raises(UsageError, match=f"output {ref}: .*{said}"):
        object_store.upload(folder_of(SHARDS, tmp_path / "made"), ref)
    assert loopback.files("org/name") == MODEL


def test_a_commit_that_fails_changes_nothing_on_the_hub(loopback: HubServer, tmp_path: Path):
    loopback.add_repo("org/name", MODEL)
    loopback.fail("/commit/main", 412)
    with pytest.raises(SkillvecError, match="output hf://org/name: was changed by someone else"):
        object_store.upload(folder_of(SHARDS, tmp_path / "made"), "hf://org/name")
    assert loopback.files("org/name") == MODEL


# ------------------------------------------------------------------------------------ end to end


def digests(folder: Path) -> dict[str, str]:
    """Return digests of the weights: headers name inputs, so only the data is compared."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            header = read_header(path)
            found[path.name] = hashlib.sha256(path.read_bytes()[header.data_start :]).hexdigest()
        elif path.is_file() and path.name != "README.md":
            found[path.relative_to(folder).as_posix()] = path.read_bytes().decode()
    return found


def test_diff_and_apply_give_the_same_bytes_as_from_this_disk(s3: ObjectServer, tmp_path: Path):
    sides = {"base": MODEL, "tuned": {**MODEL, "model.safetensors": TUNED}}
    for side, files in sides.items():
        s3.put(f"bucket/{side}", files)
        folder_of(files, tmp_path / side)
    here, away = tmp_path / "here.safetensors", tmp_path / "away.safetensors"
    skillvec.diff(tmp_path / "tuned", tmp_path / "base", here)
    s3.requests.clear()
    skillvec.diff("s3://bucket/tuned", "s3://bucket/base", away)
    read = sum(r.sent for r in s3.asked("GET", "model.safetensors"))
    assert read <= 2 * (len(BASE) + 3 * MiB)  # each object once, and what the probes look at
    assert all(r.range for r in s3.asked("GET", "model.safetensors"))
    assert digests(tmp_path)["here.safetensors"] == digests(tmp_path)["away.safetensors"]
    s3.put("bucket", {"v.safetensors": away.read_bytes()})
    skillvec.apply(tmp_path / "base", here, tmp_path / "one")
    skillvec.apply("s3://bucket/base", "s3://bucket/v.safetensors", tmp_path / "two")
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert (tmp_path / "two" / "notes" / "log.txt").read_bytes() == b"below the root"


def test_outputs_go_to_a_store_and_come_back_as_inputs(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/base", MODEL)
    base, tuned = folder_of(MODEL, tmp_path / "base"), tmp_path / "tuned.safetensors"
    tuned.write_bytes(TUNED)
    skillvec.diff(tuned, base / "model.safetensors", tmp_path / "v.safetensors")
    skillvec.apply(base, tmp_path / "v.safetensors", tmp_path / "here")
    skillvec.diff(tuned, base / "model.safetensors", "s3://bucket/made/v.safetensors")
    made = s3.ask("GET", "bucket/made/v.safetensors")
    assert made == (tmp_path / "v.safetensors").read_bytes()
    s3.requests.clear()
    skillvec.apply("s3://bucket/base", "s3://bucket/made/v.safetensors", "s3://bucket/out")
    assert puts(s3)[-1] == "out/model.safetensors"
    for key in s3.keys("bucket"):
        if key.startswith("out/"):
            path = tmp_path / "away" / key.removeprefix("out/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(s3.ask("GET", f"bucket/{key}"))
    assert digests(tmp_path / "away") == digests(tmp_path / "here")
    left = (tmp_path / "cache" / "skillvec" / "outputs").iterdir()
    assert not list(left)
    with pytest.raises(UsageError, match="output s3://bucket/out: exists already; --force"):
        skillvec.apply("s3://bucket/base", tmp_path / "v.safetensors", "s3://bucket/out")
    skillvec.apply("s3://bucket/base", tmp_path / "v.safetensors", "s3://bucket/out", force=True)
    assert list(opening.open_checkpoint("s3://bucket/out")) == ["a", "b"]
    with pytest.raises(UsageError, match="output s3://bucket/base: in or around the input"):
        skillvec.apply("s3://bucket/base", tmp_path / "v.safetensors", "s3://bucket/base")


def test_weights_beside_a_model_come_along_and_go_with_the_model_that_had_them(
    s3: ObjectServer, tmp_path: Path
):
    beside = {"spk_dict.pt": b"voices", "2_Dense/model.safetensors": b"dense"}
    s3.put("bucket/one", {**MODEL, **beside, "optimizer.pt": b"state", "tf_model.h5": b"old"})
    s3.put("bucket/two", MODEL)
    (tmp_path / "t.safetensors").write_bytes(TUNED)
    vector = tmp_path / "v.safetensors"
    skillvec.diff(tmp_path / "t.safetensors", "s3://bucket/two/model.safetensors", vector)
    report = skillvec.apply("s3://bucket/one", vector, "s3://bucket/out")
    assert set(report.facts["left_behind"]) == {"optimizer.pt", "tf_model.h5"}
    assert not s3.asked("GET", "optimizer.pt") and not s3.asked("GET", "tf_model.h5")
    assert {name: s3.ask("GET", f"bucket/out/{name}") for name in beside} == beside
    s3.put("bucket/out", {"mine.gguf": b"of the old model"})
    skillvec.apply("s3://bucket/two", vector, "s3://bucket/out", force=True)
    held = {key.removeprefix("out/") for key in s3.keys("bucket") if key.startswith("out/")}
    assert held == {*MODEL, "README.md", "2_Dense/model.safetensors"}  # what lies deeper stays


def test_the_command_line_takes_urls(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/base", MODEL)
    s3.put("bucket/tuned", {**MODEL, "model.safetensors": TUNED})
    command = ["diff", "s3://bucket/tuned", "s3://bucket/base", "-o", "s3://bucket/v.safetensors"]
    done = subprocess.run([sys.executable, "-m", "skillvec", *command], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert reader.find_vector("s3://bucket/v.safetensors") is not None


def test_an_upload_that_broke_off_is_made_good_by_the_same_command(
    s3: ObjectServer, tmp_path: Path
):
    s3.put("bucket/base", MODEL)
    (tmp_path / "t.safetensors").write_bytes(TUNED)
    vector = tmp_path / "v.safetensors"
    skillvec.diff(tmp_path / "t.safetensors", "s3://bucket/base/model.safetensors", vector)
    s3.fault("PUT", "out/model.safetensors", times=99, status=503, code="SlowDown")
    with pytest.raises(SkillvecError, match=r"output s3://bucket/out/model.safetensors: the store"):
        skillvec.apply("s3://bucket/base", vector, "s3://bucket/out")
    assert "out/config.json" in s3.keys("bucket") and "out/model.safetensors" not in s3.keys(
        "bucket"
    )
    s3.faults.clear()
    skillvec.apply("s3://bucket/base", vector, "s3://bucket/out")
    skillvec.apply("s3://bucket/base", vector, tmp_path / "here")
    written = (tmp_path / "here" / "model.safetensors").read_bytes()
    assert s3.ask("GET", "bucket/out/model.safetensors") == written


@pytest.mark.parametrize("output", ["s3://bucket/base/x.safetensors", "s3://bucket/"])
def test_an_output_inside_or_around_an_input_is_refused(s3: ObjectServer, output: str):
    s3.put("bucket/base", MODEL)
    s3.put("bucket/tuned", MODEL)
    with pytest.raises(UsageError, match="in or around the input s3://bucket/"):
        skillvec.diff("s3://bucket/tuned", "s3://bucket/base", output, force=True)


def test_reports_name_urls_and_no_cache(s3: ObjectServer, tmp_path: Path):
    s3.put("bucket/base", MODEL)
    report = skillvec.diff(
        "s3://bucket/base", "s3://bucket/base", "s3://bucket/v.safetensors"
    ).report
    assert report is not None
    assert [report.facts[s]["path"] for s in ("tuned", "base")] == ["s3://bucket/base"] * 2
    assert skillvec.inspect("s3://bucket/v.safetensors").facts["path"] == report.facts["output"]
    assert skillvec.inspect("s3://bucket/base").facts["path"] == "s3://bucket/base"


def test_a_file_takes_the_place_of_a_folder_that_was_never_whole(s3: ObjectServer, tmp_path: Path):
    """What marks the broken upload goes with it: nobody could read the file behind it."""
    (tmp_path / "file").write_bytes(BASE)
    s3.put("bucket/v.safetensors", {object_store.UNFINISHED: b"", "vector-1.safetensors": b"half"})
    assert object_store.names("s3://bucket/v.safetensors") is None
    object_store.upload(tmp_path / "file", "s3://bucket/v.safetensors")
    assert object_store.names("s3://bucket/v.safetensors") == {""}
    assert list(opening.open_checkpoint("s3://bucket/v.safetensors")) == ["a", "b"]


def test_ctrl_c_behind_the_upload_says_that_all_is_there(
    s3: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from skillvec.files.staging import Staging

    publish = Staging.publish

    def late(stage: Staging, source: Path) -> None:
        publish(stage, source)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "publish", late)
    s3.put("bucket/base", MODEL)
    with pytest.raises(KeyboardInterrupt, match="whole and in place"):
        skillvec.diff("s3://bucket/base", "s3://bucket/base", "s3://bucket/v.safetensors")
    assert not list((tmp_path / "cache" / "skillvec" / "outputs").iterdir())
