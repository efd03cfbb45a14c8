"""Patches: three forms out and in, names of the model in memory, and what is refused."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import TORCH_DTYPE, assert_same_bits, bits, from_bits, load, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import skillvec as sv
from skillvec.checkpoints import patch as patches
from skillvec.checkpoints import patch_effect, patch_lists, patch_writer
from skillvec.checkpoints.align import in_memory, layouts_of
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.patch import open_patch
from skillvec.checkpoints.patch_lists import Listed, Listing
from skillvec.engine import plan_vectors
from skillvec.errors import FormatError, IncompatibleError, NonfiniteError, UsageError
from skillvec.files.header import read_header
from skillvec.files.tensors import values_of

ROOT = Path(__file__).parents[2]
SENDERS = ROOT / "build" / "senders"
GOLDEN = Path(__file__).parents[1] / "golden" / "verl-0.9.1.safetensors"  # by senders_reference.py
SPEC, INDICES, VALUES = "__delta_spec__", "__positions__", "__values__"
Tensors = dict[str, torch.Tensor]


def scattered(numel: int, seed: int) -> np.ndarray:
    """Return 16 bits a position that no release of anything changes."""
    return (np.arange(1 + seed, numel + seed + 1, dtype=np.uint64) * 2654435761 >> 9).astype("<u2")


def made_of(seed: int, *shape: int) -> torch.Tensor:
    return from_bits(0x3C00 + scattered(math.prod(shape), seed) % 512, "BF16", shape)


def sides() -> tuple[Tensors, Tensors]:
    """Return base and tuned: two dtypes, a matrix, something that does not change, -0."""
    base = {
        "model.layers.0.q_proj.weight": made_of(1, 24, 20),
        "model.layers.0.gate.bias": made_of(2, 9).float() * 1.1,
        "model.layers.0.conv": made_of(3, 1000),
        "model.norm.weight": torch.ones(12).bfloat16(),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for seed, (name, step) in enumerate(
        {"model.layers.0.q_proj.weight": 3, "model.layers.0.gate.bias": 2,
         "model.layers.0.conv": 4}.items()
    ):  # fmt: skip
        flat = tuned[name].view(-1)
        flat[seed::step] *= 1.25
    tuned["model.layers.0.conv"][7] = -0.0
    return base, tuned


class Made:
    """Base, tuned, their vector, and a place for patches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.tuned = sides()
        for side, tensors in (("base", self.base), ("tuned", self.tuned)):
            save(folder / f"{side}.safetensors", tensors)
        sv.diff(folder / "tuned.safetensors", folder / "base.safetensors", folder / "v.safetensors")

    def exported(self, form: str) -> Path:
        path = self.folder / f"{form}.safetensors"
        sv.export_patch(self.folder / "v.safetensors", path, form=form, force=True)
        return path

    def imported(self, patch: Path) -> Tensors:
        """Return what the vector of a patch makes of the base, after it was proved."""
        vector = self.folder / "imported.safetensors"
        sv.import_patch(patch, self.folder / "base.safetensors", vector, force=True)
        assert sv.verify(vector).facts["claim"] == "VECTOR = PATCH - BASE"
        sv.apply(self.folder / "base.safetensors", vector, out := self.folder / "out.safetensors",
                 force=True)  # fmt: skip
        return load(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("patches"))


def lists_of(base: Tensors, tuned: Tensors) -> Tensors:
    """Return NAME.indices and NAME.values of what differs, as a trainer lists it."""
    found = {}
    for name, tensor in tuned.items():
        at = torch.from_numpy(np.flatnonzero(bits(tensor) != bits(base[name])).astype(np.int32))
        if len(at):
            found |= {f"{name}.indices": at, f"{name}.values": tensor.reshape(-1)[at].clone()}
    return found


def flush(
    entries: list[dict[str, Any]], indices: torch.Tensor, values: torch.Tensor, **said: Any
) -> Tensors:
    """Return the tensors of a flush of verl, with torch's own hash."""
    sums = [int(torch.hash_tensor(t).item()) if t.numel() else 0 for t in (indices, values)]
    spec = {"encoding": "indices", "params": entries, "checksum": sums[0] ^ sums[1] << 1} | said
    text = torch.frombuffer(bytearray(json.dumps(spec).encode()), dtype=torch.uint8)
    return {SPEC: text, INDICES: indices, VALUES: values}


def flushed(lists: Mapping[str, tuple[tuple[int, ...], list[int], torch.Tensor]]) -> Tensors:
    """Return a flush of name -> shape, positions, values."""
    entries, at = [], 0
    for name, (shape, positions, values) in lists.items():
        end = at + len(positions)
        entries.append({
            "name": name, "dtype": str(values.dtype).replace("torch.", ""), "shape": list(shape),
            "pos_start": 4 * at, "pos_end": 4 * end, "pos_width": 4, "val_start": at,
            "val_end": end,
        })  # fmt: skip
        at = end
    positions = torch.tensor([p for _, listed, _ in lists.values() for p in listed]).int()
    return flush(entries, positions.view(torch.uint8), torch.cat([v for *_, v in lists.values()]))


# ------------------------------------------------------------------------------- forms, both ways


@pytest.mark.parametrize("form", patch_lists.FORMS)
def test_every_form_comes_back_bit_for_bit(form: str, made: Made):
    path = made.exported(form)
    assert sv.inspect(path).facts["kind"] == "patch"
    assert sv.inspect(path).facts["form"] == form
    assert_same_bits(made.imported(path), made.tuned)


def test_a_flush_is_what_verl_reads(made: Made):
    """As its loader decodes it: slices of bytes viewed as int32, values cast to the dtype."""
    held = load(made.exported("verl"))
    said = json.loads(bytes(held[SPEC].numpy()))
    hashes = [int(torch.hash_tensor(held[name]).item()) for name in (INDICES, VALUES)]
    assert said["checksum"] == hashes[0] ^ hashes[1] << 1
    assert said["encoding"] == "indices"
    found = {name: tensor.clone() for name, tensor in made.base.items()}
    for entry in said["params"]:
        at = held[INDICES][entry["pos_start"] : entry["pos_end"]].view(torch.int32).long()
        values = held[VALUES][entry["val_start"] : entry["val_end"]]
        assert (entry["pos_width"], len(at)) == (4, len(values))
        tensor = found[entry["name"]]
        assert (entry["shape"], entry["dtype"]) == (
            list(tensor.shape), str(tensor.dtype).replace("torch.", "")
        )  # fmt: skip
        tensor.view(-1).index_copy_(0, at, values.to(tensor.dtype))
    assert_same_bits(found, made.tuned)
    assert held[VALUES].dtype == torch.float32  # of bf16 and fp32, as torch.cat makes it


@pytest.mark.parametrize(("dtypes", "common"), [
    (("BF16",), "BF16"), (("F64", "BF16"), "F64"), (("BF16", "F16"), "F32"), (("F16",), "F16"),
])  # fmt: skip
def test_a_flush_has_the_dtype_and_the_places_that_torch_needs(
    dtypes: tuple[str, ...], common: str, tmp_path: Path
):
    """The dtype of torch.cat; an odd count of halves leaves positions where int32 can be viewed."""
    base = {dtype: torch.ones(5, dtype=TORCH_DTYPE[dtype]) for dtype in dtypes}
    tuned = {dtype: tensor * torch.tensor([2, 1, 2, 1, 2]) for dtype, tensor in base.items()}
    for side, tensors in (("base", base), ("tuned", tuned)):
        save(tmp_path / f"{side}.safetensors", tensors)
    sv.diff(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors",
            vector := tmp_path / "v.safetensors")  # fmt: skip
    sv.export_patch(vector, patch := tmp_path / "p.safetensors", form="verl")
    specs = read_header(patch).tensors
    assert load(patch)[VALUES].dtype == torch.cat(list(tuned.values())).dtype == TORCH_DTYPE[common]
    start = min(spec.start for spec in specs.values())
    assert (specs[INDICES].start - start) % 4 == 0
    assert (specs[VALUES].start - start) % (torch.finfo(TORCH_DTYPE[common]).bits // 8) == 0
    again = sv.SkillVector.patched(patch, tmp_path / "base.safetensors").tuned
    for dtype in dtypes:
        assert np.array_equal(bits(tuned[dtype]), values_of(again[dtype], 0, 5).view(
            bits(tuned[dtype]).dtype))  # fmt: skip


def test_long_lists_are_cut_into_entries(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch_writer, "ENTRY", 100)
    said = json.loads(bytes(load(made.exported("verl"))[SPEC].numpy()))
    sizes = [entry["val_end"] - entry["val_start"] for entry in said["params"]]
    assert max(sizes) == 100 and len(sizes) > 3
    assert_same_bits(made.imported(made.folder / "verl.safetensors"), made.tuned)


def test_lists_for_vllm_say_what_it_is_told(made: Made):
    """The fields of its SparseNCCLWeightTransferUpdateInfo, in one order; int32, 1-D, floats."""
    with safe_open(made.exported("vllm"), "pt") as file:
        said = json.loads(file.metadata()["update_info"])
        assert list(said) == ["names", "dtype_names", "shapes", "num_updates_list"]
        for name, dtype, shape, count in zip(*said.values(), strict=True):
            indices, values = (file.get_tensor(f"{name}.{part}") for part in ("indices", "values"))
            assert (indices.dtype, indices.shape) == (torch.int32, values.shape) == (
                torch.int32, (count,)
            )  # fmt: skip
            assert (values.dtype, shape) == (getattr(torch, dtype), list(made.base[name].shape))
    held = load(made.folder / "vllm.safetensors")
    assert_same_bits(held, lists_of(made.base, made.tuned))


def test_what_verl_wrote_is_taken(made: Made):
    """A flush by verl 0.9.1's own functions: ranks one after the other, entries cut, a common
    dtype."""
    said = json.loads(bytes(load(GOLDEN)[SPEC].numpy()))
    assert len(said["params"]) > len({entry["name"] for entry in said["params"]})
    matrix = open_patch(GOLDEN).laid_over(made_sources(made))["model.layers.0.q_proj.weight"]
    assert max(len(listed.starts) for listed in matrix.lists) > 1  # the ranks
    assert_same_bits(made.imported(GOLDEN), made.tuned)


def made_sources(made: Made):
    return read_header(made.folder / "base.safetensors").tensors


def test_a_seed_of_verl_holds_all_values(made: Made, tmp_path: Path):
    """Its first flush, "dense": no positions, whole tensors; the others stay."""
    entries, at = [], 0
    names = ["model.layers.0.q_proj.weight", "model.layers.0.conv"]
    for name in names:
        end = at + made.tuned[name].numel()
        entries.append({
            "name": name, "dtype": "bfloat16", "shape": list(made.tuned[name].shape),
            "pos_start": 0, "pos_end": 0, "pos_width": 4, "val_start": at, "val_end": end,
        })  # fmt: skip
        at = end
    values = torch.cat([made.tuned[name].reshape(-1) for name in names])
    held = flush(entries, torch.zeros(0).byte(), values, encoding="dense")
    del held[INDICES]
    save_file(held, tmp_path / "seed.safetensors")
    expected = made.base | {name: made.tuned[name] for name in names}
    assert_same_bits(made.imported(tmp_path / "seed.safetensors"), expected)
    entries[0]["shape"] = [24, 21]
    save_file(flush(entries, torch.zeros(0).byte(), values, encoding="dense"), tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"480 values, expected \[24, 21\]"):
        open_patch(tmp_path / "x.safetensors")


def test_flushes_of_one_update_lie_in_one_folder(made: Made, tmp_path: Path):
    """A sync is as many flushes as it takes: no position is in two of them."""
    listed = lists_of(made.base, made.tuned)
    for number in range(2):
        part = {}
        for name, tensor in made.base.items():
            if f"{name}.indices" in listed:
                at = listed[f"{name}.indices"][number::2].tolist()
                part[name] = tensor.shape, at, listed[f"{name}.values"][number::2]
        save_file(flushed(part), tmp_path / f"flush-{number}.safetensors")
    assert_same_bits(made.imported(tmp_path), made.tuned)
    save_file(flushed(part), tmp_path / "again.safetensors")
    with pytest.raises(FormatError, match="listed twice"):
        made.imported(tmp_path)
    save_file(listed, tmp_path / "again.safetensors")
    with pytest.raises(IncompatibleError, match="files of several forms: lists, verl"):
        open_patch(tmp_path)


def test_a_patch_stands_where_a_tuned_model_does(made: Made):
    """PATCH::BASE is added as it is read, verify proves the output, and diff takes it for TUNED."""
    patch, base = made.exported("verl"), made.folder / "base.safetensors"
    sv.apply(base, f"{patch}::{base}", made.folder / "out.safetensors", force=True)
    assert_same_bits(load(made.folder / "out.safetensors"), made.tuned)
    assert sv.verify(made.folder / "out.safetensors").facts["verified"]
    vector = sv.diff(patch, base, made.folder / "w.safetensors")
    assert sv.verify(vector.ref).facts["claim"] == "VECTOR = PATCH - BASE"
    both = sv.combine(vector, f"{patch}::{base}", output=made.folder / "c.safetensors")
    assert sv.verify(both.ref).facts["verified"]
    with pytest.raises(UsageError, match="a patch is taken whole"):
        sv.diff(patch, base, made.folder / "x.safetensors", include=["*conv"])


@pytest.mark.slow
def test_their_own_readers_and_writer(made: Made):
    """verl 0.9.1 and vLLM 0.33.0, in a process of its own (tests/support/senders_reference.py)."""
    if not SENDERS.exists():
        pytest.fail("no build/senders: run benchmarks/senders_setup.sh")
    for form in ("verl", "vllm"):
        made.exported(form)
    script = Path(__file__).parents[1] / "support" / "senders_reference.py"
    done = subprocess.run([sys.executable, script, SENDERS, made.folder], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for reader in ("verl.sglang", "verl.vllm", "vllm.vllm"):
        assert_same_bits(load(made.folder / f"{reader}.safetensors"), made.tuned)
    assert_same_bits(load(made.folder / "flush.safetensors"), load(GOLDEN))
    assert_same_bits(made.imported(made.folder / "flush.safetensors"), made.tuned)


# --------------------------------------------------------------------------- what no form carries


def test_nan_has_no_place_where_it_means_unchanged(tmp_path: Path):
    base = {"w": torch.ones(9), "x": torch.ones(3)}
    tuned = {"w": torch.ones(9), "x": torch.full((3,), 2.0)}
    tuned["w"][4] = math.nan
    for side, tensors in (("base", base), ("tuned", tuned)):
        save(tmp_path / f"{side}.safetensors", tensors)
    sv.diff(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors",
            vector := tmp_path / "v.safetensors", allow_nonfinite=True)  # fmt: skip
    for form in ("verl", "vllm"):
        with pytest.raises(NonfiniteError, match="w: 1 of 1 listed values are NaN"):
            sv.export_patch(vector, tmp_path / "p.safetensors", form=form, allow_nonfinite=True)
        assert not (tmp_path / "p.safetensors").exists()
    sv.export_patch(vector, tmp_path / "p.safetensors", allow_nonfinite=True)


def test_a_multiple_of_a_vector_is_no_list_of_tuned(made: Made):
    half = 0.5 * sv.SkillVector.open(made.folder / "v.safetensors")
    with pytest.raises(UsageError, match="a patch is made of a stored tuned - base"):
        sv.export_patch(half, made.folder / "half.safetensors")


def test_a_patch_of_many_long_names_takes_no_more_than_its_plan_says(tmp_path: Path):
    base = {f"{number}{'x' * 200}": torch.ones(4) for number in range(60)}
    for side, tensors in (("base", base), ("tuned", {name: t + 1 for name, t in base.items()})):
        save(tmp_path / f"{side}.safetensors", tensors)
    vector = tmp_path / "v.safetensors"
    sv.diff(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", vector)
    for form in ("lists", "verl", "vllm"):
        output = tmp_path / f"{form}.safetensors"
        plan = sv.export_patch(vector, output, form=form, dry_run=True)
        assert not output.exists()
        made = sv.export_patch(vector, output, form=form)
        assert made.facts["nbytes"] == output.stat().st_size <= plan.facts["nbytes_written"]


def test_forms_with_narrow_positions_refuse_large_tensors(
    made: Made, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan_vectors, "NARROW", 1000)
    for form in ("verl", "vllm"):
        with pytest.raises(IncompatibleError, match=r"conv: 1000 values, and .* 32 bits"):
            made.exported(form)
    made.exported("lists")
    with pytest.raises(UsageError, match="expected one of lists, verl, vllm"):
        made.exported("trl")


# ------------------------------------------------------------------------------ any range of them


@settings(max_examples=60)
@given(data=st.data())
def test_any_range_is_the_listed_values_over_the_base(made: Made, data: st.DataObject):
    """Of several lists, in several runs, read in pieces of any size."""
    base = made_sources(made)["model.layers.0.conv"]
    names = st.lists(st.integers(0, 999), unique=True, max_size=60)
    lists = data.draw(st.lists(names, min_size=1, max_size=3))
    taken: set[int] = set()
    lists = [[at for at in one if not (at in taken or taken.add(at))] for one in lists]
    expected, tensors = made.base["model.layers.0.conv"].clone(), {}
    for number, one in enumerate(lists):
        values = torch.arange(len(one)).bfloat16() + 100 * number
        expected[torch.tensor(one, dtype=torch.long)] = values
        tensors |= {f"{number}.indices": torch.tensor(one).int(), f"{number}.values": values}
    save(made.folder / "drawn.safetensors", tensors)
    specs = read_header(made.folder / "drawn.safetensors").tensors
    listing = Listing("BF16", None, tuple(
        Listed(specs[f"{n}.indices"], specs[f"{n}.values"]) for n in range(len(lists))
    ), runs=100)  # fmt: skip
    overlaid = listing.over(base)
    begin = data.draw(st.integers(0, 999))
    count = data.draw(st.integers(1, 1000 - begin))
    assert np.array_equal(values_of(overlaid, begin, count), bits(expected)[begin : begin + count])
    assert np.array_equal(values_of(overlaid, 0, 1000), bits(expected))


# -------------------------------------------------------------------------------- what is refused


def plain(**changed: Any) -> Tensors:
    held = {"w.indices": torch.tensor([0, 3]).int(), "w.values": torch.ones(2).bfloat16()}
    return {name: t for name, t in (held | changed).items() if t is not None}


def entry(**changed: Any) -> dict[str, Any]:
    return {"name": "w", "dtype": "bfloat16", "shape": [6], "pos_start": 0, "pos_end": 8,
            "pos_width": 4, "val_start": 0, "val_end": 2} | changed  # fmt: skip


def sent(*entries: dict[str, Any], at: tuple[int, ...] = (0, 3), **said: Any) -> Tensors:
    indices = torch.tensor(at).int().view(torch.uint8)
    return flush(list(entries) or [entry()], indices, torch.ones(len(at)).bfloat16(), **said)


def told(**changed: Any) -> dict[str, str]:
    said = {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[6]], "num_updates_list": [2]}
    return {"update_info": json.dumps(said | changed)}


REFUSED: dict[str, tuple[Callable[[], Tensors], dict[str, str], str]] = {
    "no pair": (lambda: plain(**{"w.values": None}), {}, "expected pairs of NAME.indices"),
    "not rising": (lambda: plain(**{"w.indices": torch.tensor([3, 0]).int()}), {},
                   "w.indices: positions do not rise within the tensor's 6 values: 0 stands at 1"),
    "twice": (lambda: plain(**{"w.indices": torch.tensor([3, 3]).int()}), {}, "3 stands at 1"),
    "outside": (lambda: plain(**{"w.indices": torch.tensor([3, 6]).int()}), {}, "6 stands at 1"),
    "negative": (lambda: plain(**{"w.indices": torch.tensor([-1, 3])}), {}, "-1 stands at 0"),
    "positions of floats": (lambda: plain(**{"w.indices": torch.ones(2)}), {},
                            r"w.indices: F32 \[2\], expected I32 or I64"),
    "one more value": (lambda: plain(**{"w.values": torch.ones(3).bfloat16()}), {},
                       r"w.values: \[3\], expected \[2\]"),
    "another dtype": (lambda: plain(**{"w.values": torch.ones(2)}), {},
                      "w: values in F32, expected BF16"),
    "unknown": (lambda: plain(**{"x.indices": torch.zeros(0).int(),
                                 "x.values": torch.zeros(0).bfloat16()}), {}, "x: not in the base"),
    "integers": (lambda: {"i.indices": torch.tensor([0]).int(), "i.values": torch.tensor([7])}, {},
                 "i: I64, no floats"),
    "two forms": (lambda: plain() | sent(), {}, "in one file: which of them"),
    "told of more": (plain, told(num_updates_list=[3]),
                     "differ in these:\n  w: bfloat16 3, but bfloat16 2 are listed"),
    "told of others": (plain, told(names=["x"]),
                       "\n  x: bfloat16 2, but no values are listed\n  w: listed, and not told"),
    "told of nothing": (plain, told(names=[], dtype_names=[], shapes=[], num_updates_list=[]),
                        "of 0 tensors, 1 are listed; they differ in these:\n  w: listed, and not"),
    "told of fewer": (lambda: plain() | {"x.indices": torch.zeros(1).int(),
                                         "x.values": torch.zeros(1).bfloat16()}, told(),
                      "of 1 tensors, 2 are listed; they differ in these:\n  x: listed, and"),
    "told twice": (plain, told(names=["w"] * 2, dtype_names=["bfloat16"] * 2, shapes=[[6]] * 2,
                               num_updates_list=[2] * 2),
                   "of 2 tensors, 1 are listed; they differ in these:\n  w: told 2 times"),
    "told in part": (plain, told(names=[]), "argument 2 is longer"),
    "told of another shape": (plain, told(shapes=[[2, 3]]), r"w: \[2, 3\], expected \[6\]"),
    "no text": (lambda: sent() | {SPEC: torch.tensor([123]).byte()}, {}, "__: Expecting property"),
    "no spec": (lambda: sent(params="w"), {}, "params: expected a list"),
    "a text of floats": (lambda: sent() | {SPEC: torch.ones(3)}, {}, r"F32 \[3\], expected U8"),
    "no values": (lambda: {n: t for n, t in sent().items() if n != VALUES}, {},
                  "__values__: none, expected floats"),
    "no positions": (lambda: {n: t for n, t in sent().items() if n != INDICES}, {},
                     "encoding indices with no bytes of positions"),
    "positions of a seed": (lambda: sent(encoding="dense"), {}, "encoding dense with 8 bytes"),
    "another encoding": (lambda: sent(encoding="bitmap"), {}, "encoding bitmap with 8 bytes"),
    "altered": (lambda: sent(checksum=1), {}, "the checksum in __delta_spec__"),
    "beyond": (lambda: sent(entry(pos_end=12, val_end=3)), {}, "w: its entry in .* goes beyond"),
    "a gap": (lambda: sent(entry(pos_start=4, val_start=1)), {}, "does not go on where"),
    "apart": (lambda: sent(entry(pos_end=4)), {}, "does not go on where"),
    "a rest": (lambda: sent(entry(pos_end=4, val_end=1)), {}, "goes on behind the entries"),
    "two bytes": (lambda: sent(entry(pos_width=2)), {}, "positions of 2 bytes"),
    "codes": (lambda: sent(entry(dtype="float8_e4m3fn")), {}, "float8_e4m3fn, positions of 4"),
    "another shape": (lambda: sent(entry(shape=[3, 2])), {}, r"w: \[3, 2\], expected \[6\]"),
    "two shapes": (lambda: sent(entry(pos_end=4, val_end=1),
                                entry(shape=[6, 1], pos_start=4, val_start=1)), {},
                   "two dtypes or shapes"),
    "outside of w": (lambda: sent(at=(0, 6)), {}, "6 stands at 1"),
    "twice in two runs": (lambda: sent(at=(3, 3)), {}, "w: positions that are listed twice"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    save(folder / "base.safetensors", {"w": torch.zeros(6).bfloat16(), "i": torch.arange(3)})
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, small: Path):
    tensors, metadata, said = REFUSED[case]
    save_file(tensors(), small / "p.safetensors", metadata or None)
    made = small / "v.safetensors"
    with pytest.raises((IncompatibleError, FormatError), match=said):
        sv.import_patch(small / "p.safetensors", small / "base.safetensors", made)
    assert not made.exists()


def test_values_that_their_dtype_does_not_hold(small: Path):
    """A flush of fp32 for a tensor of bf16 is taken where torch.cat made it, and not else."""
    indices = torch.tensor([0, 3]).int().view(torch.uint8)
    for values, right in ((torch.tensor([1.5, -2]), True), (torch.tensor([1.5, 0.1]), False)):
        save_file(flush([entry()], indices, values), small / "p.safetensors")
        if right:
            overlaid = open_patch(small / "p.safetensors").laid_over(sources := read_header(
                small / "base.safetensors").tensors)["w"]  # fmt: skip
            expected = torch.tensor([1.5, 0, 0, -2, 0, 0]).bfloat16()
            assert np.array_equal(values_of(overlaid, 0, 6), bits(expected))
            continue
        with pytest.raises(FormatError, match="values in F32 that BF16"):
            values_of(open_patch(small / "p.safetensors").laid_over(sources)["w"], 0, 6)


def test_runs_are_bounded(small: Path, monkeypatch: pytest.MonkeyPatch):
    """Positions of many ranks are runs; each of them is held in memory."""
    save_file(sent(entry(pos_end=12, val_end=3), at=(5, 3, 1)), small / "p.safetensors")
    base = read_header(small / "base.safetensors").tensors
    assert open_patch(small / "p.safetensors").laid_over(base)["w"].lists[0].starts == (0, 1, 2)
    monkeypatch.setattr(patches, "RUNS", 2)
    with pytest.raises(FormatError, match=r"do not rise within .* 6 values: 1 stands at 2"):
        open_patch(small / "p.safetensors").laid_over(base)
    monkeypatch.setattr(patches, "RUNS", 3)
    monkeypatch.setattr(patches, "ALL_RUNS", 2)
    with pytest.raises(FormatError, match="positions in over 2 runs"):
        open_patch(small / "p.safetensors").laid_over(base)


def test_lists_are_searched_and_checked_in_steps(made: Made, monkeypatch: pytest.MonkeyPatch):
    """Checksums, order and copies, a few positions at a time."""
    monkeypatch.setattr(patch_lists, "STEP", 7)
    for form in patch_lists.FORMS:
        assert_same_bits(made.imported(made.exported(form)), made.tuned)
    save_file(plain(**{"w.indices": torch.arange(20).roll(-10).int(),
                       "w.values": torch.ones(20).bfloat16()}),
              made.folder / "p.safetensors")  # fmt: skip
    save(made.folder / "w.safetensors", {"w": torch.zeros(20).bfloat16()})
    base = read_header(made.folder / "w.safetensors").tensors
    with pytest.raises(FormatError, match="0 stands at 10"):
        open_patch(made.folder / "p.safetensors").laid_over(base)


# ------------------------------------------------------------------- names of the model in memory

TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def experts() -> Any:
    config = transformers.Qwen3MoeConfig(
        **TEXT, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def tied() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))


def seeing() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), tie_word_embeddings=False,
        vision_config=transformers.CLIPVisionConfig(**VISION),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


class Trained:
    """A model that was saved, trained a step and saved again; what changed, as memory has it."""

    def __init__(self, folder: Path, model: Any, part: str = "") -> None:
        self.folder = folder
        model = model.bfloat16()
        model.save_pretrained(folder / "base")
        held = model.get_submodule(part) if part else model
        before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        for parameter in held.parameters():
            kept = torch.rand(parameter.shape, generator=generator) < 0.8
            parameter.data = torch.where(kept, parameter.data, parameter.data * 1.5 + 0.01)
        model.tie_weights()
        model.save_pretrained(folder / "tuned")
        self.lists = lists_of(before, held.state_dict())
        sv.diff(folder / "tuned", folder / "base", folder / "d.safetensors")

    def brings(self, lists: Tensors, metadata: dict[str, str] | None = None) -> sv.SkillVector:
        """Return the vector of a patch, which leads to tuned and is that of the two checkpoints."""
        save_file(lists, self.folder / "p.safetensors", metadata)
        vector = sv.import_patch(self.folder / "p.safetensors", self.folder / "base",
                                 self.folder / "v.safetensors", force=True)  # fmt: skip
        sv.apply(self.folder / "base", vector, self.folder / "out", force=True)
        assert_same_bits(self.folder / "out", load(self.folder / "tuned"))
        sides = self.folder / "v.safetensors", self.folder / "d.safetensors"
        mine, theirs = (
            {name: entry["tuned"] for name, entry in held.manifest["tensors"].items()}
            for held in map(sv.SkillVector.open, sides)
        )
        assert mine == theirs  # digests of tuned
        assert sv.verify(self.folder / "v.safetensors").facts["claim"] == "VECTOR = PATCH - BASE"
        return vector

    def refused(self, lists: Tensors, metadata: dict[str, str] | None = None) -> str:
        save_file(lists, self.folder / "p.safetensors", metadata)
        with pytest.raises(IncompatibleError) as caught:
            sv.import_patch(self.folder / "p.safetensors", self.folder / "base",
                            self.folder / "w.safetensors")  # fmt: skip
        return str(caught.value)


def renamed(lists: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1): tensor for name, tensor in lists.items()}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("moe"), experts())


def test_experts_of_the_model_in_memory(moe: Trained):
    """Fused there, one by one in the files; what the patch does not touch needs no detour."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert f"{name}.indices" in moe.lists and name not in load(moe.folder / "base")
    vector = moe.brings(moe.lists)
    seen = vector.report.facts["layout"]
    assert seen["model.layers.0.mlp.experts.1.up_proj.weight"] == (
        f"patched as {name} of Qwen3MoeForCausalLM in memory"
    )
    assert all(".experts." in name for name in seen)


def test_positions_of_experts_are_checked_all_the_same(moe: Trained):
    name = "model.layers.0.mlp.experts.gate_up_proj.indices"
    for wrong in (moe.lists[name].flip(0), moe.lists[name] + 3 * 24 * 16):
        with pytest.raises(FormatError, match=r"gate_up_proj\.indices: positions do not rise"):
            moe.brings(moe.lists | {name: wrong.clone()})
    assert "model.layers.0.mlp.experts.gate: not in the base" in moe.refused(
        renamed(moe.lists, "experts.gate_up_proj", "experts.gate")
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapper_puts_a_prefix_before_all_names(prefix: str, moe: Trained):
    moe.brings({f"{prefix}{name}": tensor for name, tensor in moe.lists.items()})


def test_a_text_model_of_one_that_sees(tmp_path: Path):
    """model.layers.* of the language model alone, over a checkpoint that has a vision tower."""
    model = seeing()
    made = Trained(tmp_path, model, "model.language_model")
    stored = load(tmp_path / "base")
    lists = {f"model.{name}": tensor for name, tensor in made.lists.items()}
    assert not any(name.rpartition(".")[0] in stored for name in lists)
    made.brings(lists)


def test_tied_weights_may_stand_under_either_name(tmp_path: Path):
    """A state dict has both, with one list; a trainer that lists parameters has the embedding."""
    made = Trained(tmp_path, tied())
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in load(tmp_path / "base") and f"{head}.indices" in made.lists
    made.brings(made.lists)
    made.brings({n: t for n, t in made.lists.items() if not n.startswith(head)})
    made.brings({n: t for n, t in made.lists.items() if not n.startswith(embedding)})
    other = made.lists | {f"{head}.values": made.lists[f"{head}.values"] + 1}
    assert "lm_head.weight: not in the base" in made.refused(other)


def test_a_base_that_stores_both_tied_copies_changes_in_both(tmp_path: Path):
    """The list of the embedding is that of the head, which would be one of its own else."""
    embedding = torch.arange(24).bfloat16().reshape(6, 4)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    lists = {"model.embed_tokens.weight.indices": torch.tensor([2]).int(),
             "model.embed_tokens.weight.values": torch.tensor([9]).bfloat16()}  # fmt: skip
    save(tmp_path / "p.safetensors", lists)
    for ties in (True, False):
        config = {"model_type": "toy", "tie_word_embeddings": ties}
        base = save(tmp_path / f"base{ties}", tensors, config=config)
        vector = sv.import_patch(tmp_path / "p.safetensors", base, tmp_path / f"{ties}.safetensors")
        changed = {n: e["changed"] for n, e in vector.manifest["tensors"].items()}
        assert changed == {"model.embed_tokens.weight": 1, "lm_head.weight": int(ties)}


def test_a_list_that_two_layouts_read_differently(tmp_path: Path):
    """Experts that transformers turns in loading keep their name: shapes tell, or nobody."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = TEXT | {"moe_intermediate_size": 4, "num_experts": 2, "num_experts_per_tok": 1,
                   "rope_scaling": rope}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
              "intermediate_size": 8, "patch_size": 4, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    held = model.state_dict()[name]
    stored = load(tmp_path / "base")
    as_released = {n: t.transpose(1, 2).contiguous() if t.shape == held.shape else t
                   for n, t in stored.items()}  # fmt: skip
    save_file(as_released, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    new = held.clone()
    new.view(-1)[[3, 100]] += 1
    lists = lists_of({name: held}, {name: new})
    made = sv.SkillVector.patched
    save_file(lists, tmp_path / "p.safetensors")
    with pytest.raises(IncompatibleError, match="two layouts read differently") as caught:
        made(tmp_path / "p.safetensors", tmp_path / "base")
    assert f"{name}: [2, 16, 8] in the files and [2, 8, 16] in Qwen3VLMoeFor" in str(caught.value)
    for shape, expected in (
        ((2, 8, 16), new.transpose(1, 2)),
        ((2, 16, 8), as_released[name].view(-1).index_copy(
            0, torch.tensor([3, 100]), new.view(-1)[[3, 100]]
        )),
    ):  # fmt: skip
        said = {"names": [name], "dtype_names": ["bfloat16"], "shapes": [shape],
                "num_updates_list": [2]}  # fmt: skip
        save_file(lists, tmp_path / "p.safetensors", {"update_info": json.dumps(said)})
        tuned = made(tmp_path / "p.safetensors", tmp_path / "base").tuned
        found = values_of(tuned[name], 0, held.numel())
        assert np.array_equal(found, bits(expected))
    vector = sv.import_patch(
        tmp_path / "p.safetensors", tmp_path / "base", tmp_path / "v.safetensors"
    )
    for names in ("memory", "files"):  # the header of what skillvec writes tells
        sv.export_patch(vector, tmp_path / "own.safetensors", names=names, force=True)
        tuned = made(tmp_path / "own.safetensors", tmp_path / "base").tuned
        assert np.array_equal(values_of(tuned[name], 0, held.numel()), bits(expected))


def test_what_goes_back_in_part_is_refused(moe: Trained, monkeypatch: pytest.MonkeyPatch):
    """A tensor in memory of which the files hold one half has values that lead nowhere."""
    layout = next(layouts_of(open_checkpoint(moe.folder / "base")))
    gone = "model.layers.0.mlp.experts.2.gate_proj.weight"
    half = {name: view for name, view in layout.back.items() if name != gone}
    made = SimpleNamespace(label=layout.label, model=layout.model, tied={}, back=half)
    monkeypatch.setattr(patch_effect, "layouts_of", lambda base: [made])
    said = moe.refused(moe.lists)
    assert "model.layers.0.mlp.experts.gate_up_proj: 960 of 1152 values" in said


def test_without_transformers_other_names_and_fused_tensors_are_refused(
    moe: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Lists of a fused tensor may be of a turned one in memory; those of matrices are plain."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'pip install "skillvec\[hf\]"'):
        sv.SkillVector.patched(save(tmp_path / "moe.safetensors", moe.lists), moe.folder / "base")
    for shape, place in (((2, 3, 4), "fused"), ((6, 4), "plain")):
        base = save(tmp_path / place, {"w": torch.zeros(shape)})
        lists = {"w.indices": torch.tensor([5]), "w.values": torch.ones(1)}
        patch = save(tmp_path / f"{place}.safetensors", lists)
        if place == "fused":
            with pytest.raises(UsageError, match=r'pip install "skillvec\[hf\]"'):
                sv.SkillVector.patched(patch, base)
        else:
            tuned = sv.SkillVector.patched(patch, base).tuned
            assert values_of(tuned["w"], 0, 24).nonzero()[0].tolist() == [5]


# -------------------------------------------------------------------- lists for the model in memory


@pytest.mark.parametrize("make", [experts, seeing, tied])
def test_lists_for_the_model_in_memory(make: Callable[[], Any], tmp_path: Path):
    """Under its names, and with its fused experts: what changed there, and it comes back."""
    made = Trained(tmp_path, model := make())
    report = sv.export_patch(tmp_path / "d.safetensors", patch := tmp_path / "memory.safetensors",
                             names="memory")  # fmt: skip
    lists, expected = load(patch), made.lists
    expected = {n: t for n, t in expected.items() if not n.startswith(tuple(
        model.all_tied_weights_keys))}  # fmt: skip
    assert_same_bits(lists, expected)
    assert report.facts["changed"] == sum(len(t) for n, t in lists.items() if ".indices" in n)
    assert {line["name"] for line in report.ledger if line["status"] == "listed"} == {
        name.removesuffix(".indices") for name in lists if ".indices" in name
    }
    with safe_open(patch, "pt") as file:
        metadata = file.metadata()
    made.brings(lists, metadata)
    said = json.loads(metadata["skillvec"]) | {"family": "0" * 32}
    assert "a model of another shape" in made.refused(lists, {"skillvec": json.dumps(said)})


def test_lists_of_another_layout_hold_on_the_exact_base(moe: Trained, tmp_path: Path):
    """The base's own tensors are read, whose digests the vector knows."""
    config = json.loads((moe.folder / "base" / "config.json").read_text())
    other = load(moe.folder / "base")
    other["model.layers.0.mlp.experts.1.up_proj.weight"][0, 0] += 1
    for base, said in (
        (save(tmp_path / "other", other, config=config), r"exact base [^*]*experts\.1\.up_proj"),
        (save(tmp_path / "toy", other), "transformers makes no model of its config"),
    ):
        with pytest.raises(IncompatibleError, match=said):
            sv.export_patch(moe.folder / "d.safetensors", tmp_path / "p.safetensors", base=base,
                            names="memory")  # fmt: skip
        assert not (tmp_path / "p.safetensors").exists()


def test_a_base_in_another_layout_than_the_vector(moe: Trained, tmp_path: Path):
    """A state dict saved as it lies in memory is the exact base too: lists have its names."""
    fused = in_memory(open_checkpoint(moe.folder / "base"))
    held = {n: from_bits(values_of(s, 0, s.numel), s.dtype, s.shape) for n, s in fused.items()}
    base = save(tmp_path / "base", held, config=fused.config)
    sv.export_patch(moe.folder / "d.safetensors", tmp_path / "p.safetensors", base=base)
    assert_same_bits(load(tmp_path / "p.safetensors"), moe.lists)


def test_what_no_difference_restores_stands_in_one_layout(tmp_path: Path):
    """-0 for another value of fp32 is kept beside the difference, by place in its own tensor."""
    Trained(tmp_path, experts())
    tuned = load(tmp_path / "tuned")
    tuned["model.layers.0.mlp.experts.0.up_proj.weight"][0, 0] = -0.0
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "w.safetensors")
    assert vector.manifest["exactness"]["replacements"] == 1
    with pytest.raises(IncompatibleError, match="1 values that no difference restores"):
        sv.export_patch(vector, tmp_path / "p.safetensors", names="memory")
    sv.export_patch(vector, tmp_path / "p.safetensors")
    with pytest.raises(UsageError, match="expected files or memory"):
        sv.export_patch(vector, tmp_path / "q.safetensors", names="trainer")
