"""Pickled models: every value where torch finds it, no byte of data read, nothing foreign run."""

import io
import json
import math
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from families import toy

from skillvec.checkpoints import pickles, torch_files
from skillvec.checkpoints.pickles import Record, load_pickle
from skillvec.checkpoints.torch_files import load_archive, open_pickles
from skillvec.errors import FormatError, IncompatibleError
from skillvec.files.file import read_bytes
from skillvec.files.header import ITEMSIZE, TensorSpec
from skillvec.files.tensors import Viewed, read_values
from skillvec.ops.kernels import STORAGE_DTYPE


def raw_of(source, block: int = 7) -> bytes:
    """Return the bytes of a source, read in blocks of an odd size through a pickled copy."""
    source = pickle.loads(pickle.dumps(source))
    if source.dtype not in STORAGE_DTYPE:  # whoever reads these views bytes
        assert isinstance(source, TensorSpec)
        source = source._replace(dtype="U8", shape=(source.nbytes,))
    found = bytearray()
    for begin in range(0, source.numel, block):
        out = np.empty(min(block, source.numel - begin), STORAGE_DTYPE[source.dtype])
        read_values(source, begin, out)
        found += out.tobytes()
    return bytes(found)


def assert_same(found, expected) -> None:
    """Fail unless the sources have names, shapes, widths and bits of the torch tensors."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert ITEMSIZE[found[name].dtype] == tensor.element_size(), name
        assert (
            raw_of(found[name])
            == tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ), name


EXTRA = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16, torch.uint64]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.uint32, *EXTRA,
]  # fmt: skip


def model() -> OrderedDict:
    """Return tensors of every dtype and of every way to lie in a storage."""
    torch.manual_seed(0)
    tensors = OrderedDict(toy(dtype="F32", layers=1))
    for dtype in DTYPES:
        raw = torch.randint(0, 2 if dtype is torch.bool else 100, (6, 16), dtype=torch.uint8)
        tensors[str(dtype)] = raw.view(dtype)
    flat = torch.randn(100)
    tensors["turned"] = flat[10:34].view(4, 6).t()
    tensors["permuted"] = flat[:24].view(2, 3, 4).permute(2, 0, 1)
    tensors["stepped"] = flat[3:90:4]
    tensors["column"] = flat.view(10, 10)[:, 3:4]
    tensors["tied"] = flat
    tensors["half"] = torch.randn(8, 8).half()[::2, 1::3]
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(3, 0)
    tensors["parameter"] = torch.nn.Parameter(torch.randn(5))
    marked = torch.nn.Parameter(torch.randn(5))
    marked.note = "a parameter with attributes"
    tensors["marked"] = marked
    return tensors


def test_every_tensor_has_the_bits_that_torch_loads(tmp_path: Path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(model(), path)
    found = open_pickles([str(path)], "model")
    assert_same(found, torch.load(path, weights_only=True, mmap=True))
    assert list(found) == list(model())
    names = {str(dtype): found[str(dtype)].dtype for dtype in DTYPES}
    assert names["torch.bfloat16"] == "BF16" and names["torch.float8_e4m3fn"] == "F8_E4M3"
    assert len(set(names.values())) == len(DTYPES)
    assert isinstance(found["turned"], Viewed) and isinstance(found["tied"], TensorSpec)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict"])
def test_the_dict_of_tensors_is_found_under_its_wrapper(tmp_path: Path, wrapper: str):
    path = tmp_path / "epoch=1.ckpt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    rest = {"epoch": 3, "optimizer_states": [optimizer], "rng": torch.get_rng_state().tolist()[:9]}
    torch.save({"pytorch-lightning_version": "2", **rest, wrapper: toy(layers=1)}, path)
    assert_same(open_pickles([str(path)], "model"), toy(layers=1))


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"model": toy(layers=1), "state_dict": toy(layers=1)}, "which of"),
        ({"optimizer": {"exp_avg": torch.ones(2)}, "step": 3}, "'optimizer'"),
        ({"w": torch.ones(2), "config": {"a": 1}, "step": 3}, "'config': dict"),
        ({"w": torch.ones(2), 3: torch.ones(2)}, "3: Stored"),
        ([torch.ones(2)], "found:\n  list"),
        ({"a": torch.ones(2), "w": torch.ones(1).expand(4, 9)}, "'w': a tensor of .* repeats"),
        ({"w": torch.nn.Parameter(torch.ones(9).unfold(0, 4, 1))}, "'w': a tensor of .* rep"),
        ({"state_dict": toy(layers=1) | {"w": torch.ones(1).expand(3)}, "step": 3}, ": 'w': a te"),
        ({"w": toy(layers=1), "l": [torch.ones(2), torch.ones(1).expand(3)]}, ": 'l': a tensor of"),
        ([torch.ones(2), torch.ones(1).expand(3)], r"model.pt: a tensor of \[3\] that repeats"),
        ({"w": torch.eye(3).to_sparse()}, "not taken"),
        ({"w": torch.tensor([1 + 2j]).conj()}, "'w': a tensor without plain values: .*conj"),
        ({"w": torch.ones(2, device="meta")}, "not taken"),
    ],
)
def test_what_is_no_plain_model_is_refused(tmp_path: Path, tree, text: str):
    path = tmp_path / "model.pt"
    torch.save(tree, path)
    with pytest.raises(IncompatibleError, match=text) as caught:
        open_pickles([str(path)], "base")
    assert str(path) in str(caught.value)


def test_shards_of_accelerate_are_one_model(tmp_path: Path):
    from accelerate import Accelerator

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
            self.last.weight = self.first.weight

    net = Tied()
    Accelerator(cpu=True).save_model(net, tmp_path, max_shard_size="4KB", safe_serialization=False)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    files = sorted({str(tmp_path / file) for file in index["weight_map"].values()})
    assert len(files) > 1
    found = open_pickles(files, "model")
    expected = {}
    for file in files:
        expected |= torch.load(file, weights_only=True)
    assert_same(found, expected)
    assert {"first.weight", "first.bias"} <= set(found)
    with pytest.raises(FormatError, match="another shard"):
        open_pickles([files[0], files[0]], "model")


def test_opening_reads_neither_data_nor_whole_files(tmp_path: Path, monkeypatch):
    path = tmp_path / "big.bin"
    torch.save({f"w{i}": torch.full((1 << 19,), float(i)) for i in range(4)}, path)
    read = []

    def counted(file, offset, nbytes, real=read_bytes):
        read.append(nbytes)
        return real(file, offset, nbytes)

    monkeypatch.setattr(torch_files, "read_bytes", counted)
    found = open_pickles([str(path)], "model")
    assert path.stat().st_size > 8 << 20 and 0 < sum(read) < 64 << 10
    assert raw_of(found["w3"]._replace(shape=(2,), nbytes=8)) == struct.pack("<2f", 3, 3)


@pytest.mark.slow
def test_peak_memory_of_opening_does_not_grow_with_the_model(tmp_path: Path):
    path = tmp_path / "big.bin"
    torch.save({"w": torch.ones(200 << 20, dtype=torch.uint8), "v": torch.ones(3)}, path)
    script = (
        "import resource, sys\n"
        "from skillvec.checkpoints.torch_files import open_pickles\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); found = open_pickles([sys.argv[1]], 'm')\n"
        "print(peak() - before, len(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    grown, tensors = map(int, done.stdout.split())
    assert tensors == 2 and grown < 20 << 10  # KiB


# --------------------------------------------------------------------------- pickles of any kind


class Node:
    """A class of this module, so not one that is taken."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_trees_come_back_from_every_protocol(protocol: int):
    twice = "a text that is memoised and fetched " * 9
    tree = {
        "numbers": [1, -7, 300, 70000, 1 << 40, 1.5, True, False, None],
        "texts": [twice, twice, (twice, "ü\u20ac\U0001f600", ""), {twice: twice}],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "size": torch.Size([3, 4]),
        "ordered": OrderedDict(a=1, b=OrderedDict()),
        "long": "x" * 300,
    }
    tree["shared"] = tree["tuples"]
    assert load_pickle(pickle.dumps(tree, protocol), "here") == tree


@pytest.mark.parametrize("protocol", [2, 4])
def test_named_objects_become_records_and_are_never_made(protocol: int):
    from argparse import Namespace
    from pathlib import PosixPath

    raw = pickle.dumps({"a": Namespace(lr=3), "b": PosixPath("c/d")}, protocol)
    found = load_pickle(raw, "here")
    assert {key: value.name for key, value in found.items()} == {
        "a": "argparse.Namespace", "b": "pathlib.PosixPath",
    }  # fmt: skip
    assert found["a"].get("lr") == 3
    with pytest.raises(FormatError, match="has no nothing"):
        found["a"].get("nothing")


class Runs:
    def __init__(self, function, *args) -> None:
        self.made = function, args

    def __reduce__(self):
        return self.made


CALLED: list[tuple] = []


def called(*args) -> None:
    """What a pickle of these tests has called: all that it does is to be noted."""
    CALLED.append(args)


@pytest.fixture(autouse=True)
def nothing_is_called():
    CALLED.clear()
    yield
    assert not CALLED


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "args"),
    [
        (called, ("x",)), (len, ("x",)), (math.sqrt, (4.0,)), (Counter, ("x",)), (Node, ()),
    ],
)  # fmt: skip
def test_a_pickle_that_names_functions_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, function, args
):
    path = tmp_path / "model.bin"
    tree = {"w": torch.ones(2), "x": Runs(function, *args)}
    torch.save(tree, path, pickle_protocol=protocol)
    with pytest.raises(IncompatibleError, match=r"nothing was run") as caught:
        open_pickles([str(path)], "model")
    assert str(path) in str(caught.value) and function.__name__ in str(caught.value)
    with pytest.raises(IncompatibleError, match=r"^here: .*nothing was run"):
        load_pickle(pickle.dumps(Runs(function, *args), protocol), "here")


def test_what_is_on_the_list_becomes_a_record_and_is_not_made():
    raw = pickle.dumps(Runs(torch.UntypedStorage, 3), 2)
    assert isinstance(pickle.loads(raw), torch.UntypedStorage)
    found = load_pickle(raw, "here")
    assert type(found).__mro__[1] is pickles.Record and found.args == (3,)


def test_names_are_refused_by_name_and_counted():
    raw = pickle.dumps([Runs(getattr(math, name), 1.0) for name in (
        "sqrt", "exp", "sin", "cos", "tan", "ceil", "floor")])  # fmt: skip
    with pytest.raises(IncompatibleError, match=r"nothing was run(.|\n)*  math\.(.|\n)*2 more"):
        load_pickle(raw, "here")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b".", b"\x80\x02", b"\x80\x02}", b"\x80\x04\x93.",
        b"\x80\x02cmath\nsqrt\n(K\x04tR.",
        b"\x80\x02q\xff.", b"\x80\x02h\x05.", b"(i__main__\nNode\n.", b"\x80\x02c_codecs\nencode\n"
        b"(X\x01\0\0\0xX\x03\0\0\0hextR.",
        b"\x80\x02cbuiltins\ngetattr\n(X\x01\0\0\0xX\x01\0\0\0ytR.",
        b"\x80\x02ca b\nc\n.", b"\x80\x04\x8c\x04math\x94K\x01\x93.", b"\x80\x02X\x09\0\0\0ab.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nN)NtR.",
    ],
)  # fmt: skip
def test_broken_pickles_are_errors_with_their_place(raw: bytes):
    with pytest.raises((FormatError, IncompatibleError), match=r"^here: "):
        load_pickle(raw, "here")


@pytest.mark.parametrize("words", [
    b"X\x28\0\0\0" + b"x" * 40,  # a string
    b"(" + b"K\1" * 20 + b"t",  # a tuple, of whose items a hash or a text is made wherever it is
])  # fmt: skip
def test_what_is_fetched_again_counts_again(words: bytes, monkeypatch):
    def fetched(count: int) -> list:
        raw = b"\x80\x02]q\0(" + words + b"q\x01" + b"h\x01" * count + b"e."
        return load_pickle(raw, "here")

    assert len(fetched(50)) == 51
    monkeypatch.setattr(pickles, "MAX_TREE_NBYTES", 4000)
    assert len(fetched(1)) == 2
    with pytest.raises(FormatError, match=r"^here: .*unfolds to more than 4000 bytes"):
        fetched(50)


WORDS = {
    "numbers": b"J\1\2\3\4", "long": b"\x8a\x08" + b"\x7f" * 8, "float": b"G" + b"\1" * 8,
    "dicts": b"}", "lists": b"]", "sets": b"\x8f", "tuples": b"N\x85", "filled": b"}NNs",
    "appended": b"]Na", "noted": b"]\x94", "text": b"X\6\0\0\0ab\xf0\x9f\x98\x80",
    "records": b"h\0)\x81", "made": b"h\0)R", "built": b"h\0)\x81}b", "ordered": b"h\1)R",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_the_tree_takes_no_more_memory_than_is_counted(words: str, monkeypatch):
    count, head = 500, b"\x80\4cbuiltins\nlist\n\x94ccollections\nOrderedDict\n\x94\x85]("
    raw = head + WORDS[words] * count + b"e\x86."
    load_pickle(raw, "here")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tree = load_pickle(raw, "here")
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert len(tree[1]) == count
    monkeypatch.setattr(pickles, "MAX_TREE_NBYTES", peak)
    with pytest.raises(FormatError, match="unfolds to more than"):
        load_pickle(raw, "here")


def test_places_in_the_memo_count_as_the_table_that_they_need(monkeypatch):
    raw = b"\x80\x02Kaq\xf0."
    assert load_pickle(raw, "here") == 97
    monkeypatch.setattr(pickles, "MAX_TREE_NBYTES", 16 * 0xF0)
    assert load_pickle(b"\x80\x02Kaq\0.", "here") == 97
    with pytest.raises(FormatError, match="unfolds to more than 3840 bytes"):
        load_pickle(raw, "here")


def test_objects_in_each_other_are_no_deeper_than_the_limit(monkeypatch):
    tree: tuple = ()
    for _ in range(9):
        tree = (tree,)
    raw = pickle.dumps([{tree: 1}, *([i] for i in range(30))], 2)
    monkeypatch.setattr(pickles, "MAX_NESTED", 9)
    assert load_pickle(raw, "here")[0] == {tree: 1}
    monkeypatch.setattr(pickles, "MAX_NESTED", 8)
    with pytest.raises(FormatError, match="here: objects in each other, more than 8 deep"):
        load_pickle(raw, "here")


@pytest.mark.parametrize("word", [
    b"(cmath\nsqrt\nK\4o", b"(K\4imath\nsqrt\n", b"\x82\1", b"P1\n", b"K\4\x320", b"(K\4l", b"(NNd",
    b"cbuiltins\nlist\n)}\x92", b"(K\4\x91", b"\x8f(K\4\x90", b"C\1a", b"\x97", b"I4\n", b"S'a'\n",
])  # fmt: skip
def test_words_that_pickles_of_weights_do_not_have_are_refused(word: bytes):
    with pytest.raises(FormatError, match=r"^here: the word [A-Z0-9_]*, which pickles of weights"):
        load_pickle(b"\x80\4" + word + b".", "here")


@pytest.mark.parametrize("stated", [0, 1, 3, 6, 10, 1000])
def test_frames_hide_no_words(stated: int):
    """What a frame states of its length changes nothing of what is read, wherever it stands."""
    frame = b"\x95" + struct.pack("<Q", stated)
    raw = b"\x80\4" + frame + b"](K\1" + frame + b"\x8c\4K\2K\3" + frame + b"e." + bytes(9)
    assert load_pickle(raw, "here") == [1, "K\2K\3"]


def test_no_word_changes_an_address_or_a_stand_in(archive: Path):
    """What is written over an address would be read as weights, from any file."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", 12)
    made = Runs(torch._utils._rebuild_tensor_v2, storage, 0, (12,), (1,), False, {})
    file = io.BytesIO()
    Hostile(file, protocol=2).dump(made)
    tensor, state = file.getvalue()[2:-1], b"}U\5startK\1s"
    for words in (tensor + b"q\x20\x30", b"cbuiltins\nlist\n", b"ccollections\nOrderedDict\n"):
        for word in (state + b"b", b"N" + state + b"\x86b", b"U\5startK\1s", b"K\1a"):
            raw = b"\x80\2" + words.removesuffix(b"\x30") + word + b"."
            path = rewritten(archive, lambda name, c, raw=raw: raw if name == "data.pkl" else c)
            with pytest.raises(FormatError):
                load_archive(path)
    assert Record.state is None and not Record.args


def test_attributes_of_a_dict_hide_none_of_its_methods():
    raw = b"\x80\2ccollections\nOrderedDict\n)R(U\1aK\1u}U\6valuesK\1sb."
    tree = load_pickle(raw, "here")
    assert tree == {"a": 1} and list(tree.values()) == [1]


def test_arguments_that_one_function_hands_to_another_are_few():
    head = b"\x80\2ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass"
    raw = head + b"\ncbuiltins\nlist\n(cbuiltins\nlist\n%stNtR."
    assert load_pickle(raw % (b"K\1" * 15), "here").args == (1,) * 15
    with pytest.raises(FormatError, match="a tensor made by"):
        load_pickle(raw % (b"K\1" * 16), "here")


def test_pickles_are_read_without_torch(archive: Path):
    code = "import sys; from skillvec.checkpoints.torch_files import open_pickles\n"
    code += "print(len(open_pickles("
    code += "[sys.argv[1]], 'm')), [n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, archive], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "[]"]


def test_pickles_over_the_cap_are_not_read(tmp_path: Path, monkeypatch):
    raw, path = pickle.dumps("x" * 10_000), tmp_path / "m.bin"
    torch.save("x" * 10_000, path)
    assert load_pickle(raw, "here") == load_archive(str(path)) == "x" * 10_000
    assert pickles.MAX_PICKLE_NBYTES == 1 << 29
    for module in (pickles, torch_files):
        monkeypatch.setattr(module, "MAX_PICKLE_NBYTES", 9999)
    with pytest.raises(FormatError, match="here: a pickle over the cap of 9999 bytes"):
        load_pickle(raw, "here")
    with pytest.raises(FormatError, match=r"data\.pkl of 10\d\d\d bytes, over 9999"):
        load_archive(str(path))


def test_a_directory_over_the_cap_is_not_read(tmp_path: Path, monkeypatch):
    path = tmp_path / "m.bin"
    torch.save({f"tensor {i}": torch.ones(1) for i in range(300)}, path)
    assert len(load_archive(str(path))) == 300
    monkeypatch.setattr(torch_files, "MAX_PICKLE_NBYTES", 9999)
    with pytest.raises(FormatError, match=r"m\.bin: not a readable archive: a directory of 16384"):
        load_archive(str(path))


def test_addresses_with_numbers_over_the_limits_are_refused(archive: Path, monkeypatch):
    assert len(load_archive(str(archive))) == 2
    for limit, most in (("MAX_DIMENSIONS", 1), ("MAX_SIZE", 3)):
        with monkeypatch.context() as patch, pytest.raises(FormatError, match=r"shape \(3, 4\)"):
            patch.setattr(pickles, limit, most)
            load_archive(str(archive))


def test_a_record_that_stands_twice_is_refused(archive: Path):
    with warnings.catch_warnings(), zipfile.ZipFile(archive, "a") as again:
        warnings.simplefilter("ignore")
        again.writestr("m/data/0", again.read("m/data/0"))
    with pytest.raises(FormatError, match="no record twice"):
        load_archive(str(archive))


# ------------------------------------------------------------------------------------- archives


def rewritten(path: Path, change, method: int = zipfile.ZIP_STORED) -> str:
    """Write an archive anew with records changed: change(name, content) -> content or None."""
    other = path.with_suffix(".other")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", method) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return str(other)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(12.0).view(3, 4), "v": torch.arange(5)}, tmp_path / "m.bin")
    return tmp_path / "m.bin"


def test_archives_are_read_wherever_they_begin(archive: Path, tmp_path: Path):
    plain = rewritten(archive, lambda name, content: content)
    expected = torch.load(archive, weights_only=True)
    assert_same(open_pickles([plain], "m"), expected)
    inside = tmp_path / "inside"
    content = archive.read_bytes()
    inside.write_bytes(b"x" * 1001 + content + b"y" * 77)
    found = load_archive(str(inside), 1001, len(content))
    assert raw_of(found["w"].source("w")) == expected["w"].numpy().tobytes()
    with pytest.raises(FormatError, match="truncated"):
        load_archive(str(inside), 1001, len(content) + 78)


def test_archives_of_other_kinds_are_refused(archive: Path, tmp_path: Path):
    legacy, script = tmp_path / "legacy.bin", tmp_path / "script.pt"
    torch.save({"w": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(script)
    deflated = rewritten(archive, lambda name, content: content, zipfile.ZIP_DEFLATED)
    for path, text in (
        (legacy, "before 1.6"),
        (script, r"TorchScript.*state_dict\(\)"),
        (deflated, "compressed"),
    ):
        with pytest.raises(IncompatibleError, match=text):
            load_archive(str(path))
    big = rewritten(archive, lambda name, content: b"big" if name == "byteorder" else content)
    with pytest.raises(IncompatibleError, match="big-endian"):
        load_archive(big)


def test_broken_archives_are_errors(archive: Path, tmp_path: Path):
    content = archive.read_bytes()
    for i, (raw, text) in enumerate([
        (b"", "not an archive"), (b"\x02\0\0\0\0\0\0\0{}", "perhaps safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a pointer of Git LFS"),
        (b"GGUF\3\0\0\0" + bytes(9), "but GGUF"), (b"<html>", "text that begins with"),
        (content[:-9], "archive"),
        (content[: len(content) // 2], "truncated"), (content[:64] + content[128:], "archive"),
    ]):  # fmt: skip
        path = tmp_path / f"broken{i}.bin"
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=text):
            load_archive(str(path))
    gone = rewritten(archive, lambda name, content: None if name == "data/0" else content)
    with pytest.raises(FormatError, match="no record 'data/0'"):
        load_archive(gone)
    cut = rewritten(archive, lambda name, content: content[:8] if name == "data/0" else content)
    with pytest.raises(FormatError, match="12 x F32 in 8 bytes"):
        load_archive(cut)
    at = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)  # the directory of "data/0" too
    long = bytearray(content)
    while at >= 0:  # records that are said to reach beyond the archive
        long[at + 20 : at + 28] = struct.pack("<2I", len(content), len(content))
        at = content.find(b"PK\1\2", at + 1)
    (tmp_path / "long.bin").write_bytes(long)
    with pytest.raises(FormatError, match="does not lie in the archive"):
        load_archive(str(tmp_path / "long.bin"))
    locked = bytearray(content)
    at = content.index(b"PK\1\2")
    while at >= 0:
        locked[at + 8] |= 1
        at = content.find(b"PK\1\2", at + 1)
    (tmp_path / "locked.bin").write_bytes(locked)
    with pytest.raises(IncompatibleError, match="compressed or encrypted"):
        load_archive(str(tmp_path / "locked.bin"))
    two = rewritten(archive, lambda name, content: None if name == "data.pkl" else content)
    with pytest.raises(FormatError, match=r"one data\.pkl"):
        load_archive(two)


class Hostile(pickle.Pickler):
    """Pickles a tensor whose address is made up: (storage dtype, numel, offset, shape, strides)."""

    def persistent_id(self, value):
        is_storage = isinstance(value, tuple) and value[:1] == ("storage",)
        return value if is_storage else None


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (3, 4), (4, 1)), (0, (3, 4), (5, 1)), (0, (13,), (1,)), (-1, (2,), (1,)),
        (0, (2,), (-1,)), (0, (2, 2), (1,)), (0, (True,), (1,)), (0, ("2",), (1,)),
        (99, (2,), (1,)), (0, (9, 9), (0, 0)), (0, [3], (1,)), (0, (2.0,), (1,)),
        (13, (0,), (1,)),
    ],
)  # fmt: skip
def test_addresses_outside_their_storage_are_refused(
    archive: Path, offset: int, shape: tuple, strides: tuple
):
    storage = ("storage", torch.FloatStorage, "0", "cpu", 12)
    made = Runs(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, {})
    file = io.BytesIO()
    Hostile(file, protocol=2).dump({"w": made})
    path = rewritten(archive, lambda name, c: file.getvalue() if name == "data.pkl" else c)
    with pytest.raises((FormatError, IncompatibleError), match="other"):
        load_archive(path)


def test_an_address_at_the_very_end_is_taken(archive: Path):
    storage = ("storage", torch.FloatStorage, "0", "cpu", 12)
    made = Runs(torch._utils._rebuild_tensor_v2, storage, 8, (2, 2), (2, 1), False, {})
    file = io.BytesIO()
    Hostile(file, protocol=2).dump({"w": made})
    path = rewritten(archive, lambda name, c: file.getvalue() if name == "data.pkl" else c)
    found = open_pickles([path], "m")["w"]
    assert raw_of(found) == struct.pack("<4f", 8, 9, 10, 11)
