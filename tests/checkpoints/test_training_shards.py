"""Checkpoints of training runs: every tensor has the bits that the library itself puts together."""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pickles import CALLED, Runs, assert_same, called, raw_of

import skillvec
from skillvec.checkpoints import parts as parts_module
from skillvec.checkpoints.locate import locate
from skillvec.checkpoints.opened import Opened
from skillvec.checkpoints.opened_by import OPENERS, look_at
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.checkpoints.parts import MAX_CELLS, MAX_RANKS, as_shape, assemble, order_ranks
from skillvec.checkpoints.pickles import Stored
from skillvec.checkpoints.zero import Joined
from skillvec.errors import FormatError, IncompatibleError

TRAINING = tuple(f"skillvec.checkpoints.{name}" for name in ("dcp", "fsdp", "zero"))
DIST = pytest.mark.filterwarnings("ignore")  # torch warns of its own internals


def open_training(folder: Path, what: str) -> Opened | None:
    """Open a folder by the rows of training runs alone."""
    found = look_at(locate(folder, what), what)
    rows = [opener for opener in OPENERS if opener.open.__module__ in TRAINING]
    return next((opener.open(found) for opener in rows if opener.takes(found)), None)


def tensors(rows: int = 7) -> dict[str, torch.Tensor]:
    """Return tensors that four ranks cannot share evenly."""
    torch.manual_seed(3)
    return {
        "embed.weight": torch.randn(rows, 5),
        "layers.0.weight": torch.randn(8, 3, 2),
        "layers.0.bias": torch.randn(2),
        "norm.weight": torch.randn(1),
        "half.weight": torch.randn(rows, 4).bfloat16(),
    }


@pytest.fixture
def rank_of():
    """Make this process any rank of a world, one after the other; nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int, world: int) -> None:
        leave()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    yield become
    leave()


def sharded(become, rank: int, world: int, parts: dict) -> dict:
    """Return one rank's state dict of FSDP2 around modules that hold the tensors."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    become(rank, world)
    net = torch.nn.ParameterDict({k.replace(".", "_"): v for k, v in parts.items()})
    # torch keeps what it found out about a mesh, so the mesh of each rank has its own name
    fully_shard(net, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=(f"fsdp{rank}",)))
    return {name: net.state_dict()[name.replace(".", "_")] for name in parts}


# --------------------------------------------------------------- torch.distributed.checkpoint


def save_dcp(folder: Path, states: list[dict], writer: type | None = None, **options) -> Path:
    """Save the state dicts of all ranks with torch's own planner and writer, rank by rank."""
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

    planners = [DefaultSavePlanner() for _ in states]
    writers = [(writer or FileSystemWriter)(folder, **options) for _ in states]
    plans = []
    for rank, (planner, writer, state) in enumerate(zip(planners, writers, states, strict=True)):
        writer.reset(folder)
        planner.set_up_planner(state, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    results = []
    for plan, planner, writer in zip(
        writers[0].prepare_global_plan(plans), planners, writers, strict=True
    ):
        written = writer.write_data(planner.finish_plan(plan), planner)
        written.wait()
        results.append(written.value())
    writers[0].finish(metadata, results)
    return folder


def optimizer_state() -> dict:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@DIST
def test_a_checkpoint_of_one_process_loses_its_optimizer_with_a_note(tmp_path: Path):
    import torch.distributed.checkpoint as dcp

    model = tensors()
    model["turned"] = torch.randn(6, 4).t()
    model["scalar"] = torch.tensor(2.5)
    state = {"model": model, "optimizer": optimizer_state(), "step": torch.tensor(4), "epoch": 3}
    dcp.save(state, checkpoint_id=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    opened = open_training(tmp_path, "tuned")
    assert opened is not None and opened.format == "torch.distributed.checkpoint"
    assert opened.side == tmp_path
    assert_same(opened.tensors, model)
    assert opened.notes[1:] == ("optimizer: 6 tensors left out", "step: 1 tensors left out")
    assert "no tensors left out" in opened.notes[0]
    loaded = {"model": {name: torch.empty_like(tensor) for name, tensor in model.items()}}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert_same(opened.tensors, loaded["model"])


class App:
    """A stateful object, as the tutorial of torch.distributed.checkpoint saves it."""

    def state_dict(self) -> dict:
        return {"model": tensors(), "optim": optimizer_state()}

    def load_state_dict(self, state: dict) -> None:
        raise NotImplementedError


@DIST
@pytest.mark.parametrize("state", [{"app": App()}, tensors(), tensors() | {"optimizer": App()}])
def test_the_model_is_found_wherever_it_stands(tmp_path: Path, state: dict):
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=tmp_path)
    assert_same(open_training(tmp_path, "tuned").tensors, tensors())


@DIST
@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"model": tensors(), "module": tensors()}, "which of"),
        ({"optimizer": App()}, "no model beside"),
    ],
)
def test_checkpoints_without_one_model_are_refused(tmp_path: Path, state: dict, text: str):
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=tmp_path)
    with pytest.raises(IncompatibleError, match=text):
        open_training(tmp_path, "tuned")


@DIST
@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_many_ranks_are_one_tensor(tmp_path: Path, rank_of, world: int):
    states = [{"model": sharded(rank_of, rank, world, tensors())} for rank in range(world)]
    save_dcp(tmp_path, states)
    opened = open_training(tmp_path, "tuned")
    assert_same(opened.tensors, tensors())
    assert len({str(path) for path in tmp_path.glob("*.distcp")}) == world
    os.unlink(next(tmp_path.glob("__1_*.distcp")))
    with pytest.raises(FormatError, match=r"__1_0\.distcp is missing"):
        open_training(tmp_path, "tuned")


@DIST
def test_chunks_in_two_dimensions_tile_the_tensor(tmp_path: Path, rank_of):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    states = []
    for rank in range(4):
        rank_of(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", f"b{rank}"))
        places = [Shard(1), Shard(0)]
        states.append({
            name: distribute_tensor(tensor, mesh, places, src_data_rank=None)
            for name, tensor in tensors().items() if tensor.ndim > 1
        })  # fmt: skip
    save_dcp(tmp_path, states)
    expected = {name: tensor for name, tensor in tensors().items() if tensor.ndim > 1}
    assert_same(open_training(tmp_path, "tuned").tensors, expected)


def changed(folder: Path, change) -> None:
    """Rewrite the metadata of a checkpoint with a change by hand."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def first_info(metadata):
    return next(info for index, info in metadata.storage_data.items() if "embed" in index.fqn)


def first_entry(metadata):
    return metadata.state_dict_metadata["embed.weight"]


@DIST
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(first_info(m), "relative_path", "../out.distcp"), "no plain file name"),
        (lambda m: setattr(first_info(m), "relative_path", 3), "no plain file name"),
        (lambda m: setattr(first_info(m), "offset", 10**6), "truncated"),
        (lambda m: setattr(first_info(m), "offset", -1), "not a shape"),
        (lambda m: setattr(first_info(m), "transform_descriptors", ("zstd",)), "through.*zstd"),
        (lambda m: setattr(first_entry(m), "size", torch.Size([8, 5])), "do not tile"),
        (lambda m: setattr(first_entry(m), "chunks", []), "parts of"),
        (lambda m: setattr(first_entry(m), "chunks", first_entry(m).chunks * 2), "do not tile"),
        (
            lambda m: setattr(first_entry(m).chunks[0], "sizes", torch.Size([7, 4])),
            "a part of",
        ),
        (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "not laid out"),
        (lambda m: setattr(m, "state_dict_metadata", []), "not laid out"),
        (lambda m: setattr(m, "planner_data", Runs(called, "x")), "nothing was run"),
        (lambda m: m.planner_data.update({"embed.weight": (["embed"],)}), "not a path"),
    ],
)
def test_hostile_metadata_is_refused(tmp_path: Path, monkeypatch, change, text: str):
    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ckpt"
    dcp.save(tensors(), checkpoint_id=folder)
    shutil.copy(folder / "__0_0.distcp", tmp_path / "out.distcp")
    changed(folder, change)
    with pytest.raises((FormatError, IncompatibleError), match=text) as caught:
        open_training(folder, "tuned")
    assert str(caught.value).startswith("tuned")
    assert not CALLED


@DIST
def test_swapped_and_shifted_chunks_are_refused(tmp_path: Path, rank_of):
    save_dcp(tmp_path, [sharded(rank_of, rank, 2, tensors(8)) for rank in range(2)])

    def shift(metadata) -> None:
        one, two = first_entry(metadata).chunks
        two.offsets = one.offsets

    changed(tmp_path, shift)
    with pytest.raises(FormatError, match="do not tile"):
        open_training(tmp_path, "tuned")


# ------------------------------------------------- safetensors of HuggingFaceStorageWriter


def save_shards(folder: Path, become, parts: dict, world: int, **options) -> Path:
    """Have torch write the safetensors of every rank of a world that shares the tensors."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    states = [sharded(become, rank, world, parts) for rank in range(world)]
    return save_dcp(folder, states, HuggingFaceStorageWriter, save_distributed=True, **options)


def said_offsets(file: Path, change) -> None:
    """Write a shard again with other offsets, tensors or metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    content, said = load_file(file), json.loads(metadata["DCP_SHARDING_INFO"])
    said = change(content, said) or said
    save_file(content, file, metadata | {"DCP_SHARDING_INFO": json.dumps(said)})


@DIST
@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_safetensors_of_ranks_are_put_together(tmp_path: Path, rank_of, world: int, files: int):
    names = {name: 1 + i % files for i, name in enumerate(tensors())}
    save_shards(tmp_path, rank_of, tensors(), world, fqn_to_index_mapping=names)
    shards = sorted(path.name for path in tmp_path.iterdir())
    assert shards[0] == f"shard-00001-model-00001-of-0000{files}.safetensors"
    opened = open_checkpoint(tmp_path, "tuned")
    assert_same(opened, tensors())
    assert opened.format == "DCP safetensors" and not opened.is_plain
    assert opened.metadata == {"format": "pt"}  # what is written of it is no part
    (note,) = opened.facts["notes"]
    assert f"shards of {world} ranks" in note
    # an index cannot say in which files a tensor is, but it can say which files there are
    where = {name: next(f for f in shards if f.endswith(f"{i:05}-of-{files:05}.safetensors"))
             for name, i in names.items()}  # fmt: skip
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises((FormatError, IncompatibleError), match="what one rank wrote"):
        open_checkpoint(tmp_path, "tuned")  # of the first rank alone
    if len(shards) <= len(names):  # each file is named
        where = {name: shards[i % len(shards)] for i, name in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        assert_same(open_checkpoint(tmp_path, "tuned"), tensors())


@DIST
def test_a_model_of_ranks_is_subtracted_and_applied_to(tmp_path: Path, rank_of):
    shards = save_shards(tmp_path / "tuned", rank_of, tensors(), 3)
    base = {name: tensor * 2 for name, tensor in tensors().items()}
    save_file(base, tmp_path / "base.safetensors")
    skillvec.diff(shards, tmp_path / "base.safetensors", tmp_path / "v.safetensors")
    skillvec.apply(
        tmp_path / "base.safetensors", tmp_path / "v.safetensors", tmp_path / "o.safetensors"
    )
    made = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors().items())
    skillvec.apply(shards, tmp_path / "v.safetensors", tmp_path / "out", lam=-1.0)
    assert [path.name for path in tmp_path.glob("out/*.safetensors")] == ["model.safetensors"]
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[name], base[name]) for name in base)


@DIST
@pytest.mark.parametrize("gone", [1, 2])
def test_a_rank_that_is_missing_is_a_gap(tmp_path: Path, rank_of, gone: int):
    save_shards(tmp_path, rank_of, tensors(), 4)
    (tmp_path / f"shard-{gone:05}-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model .*: tensor 'embed.weight': 3 parts.*missing"):
        open_checkpoint(tmp_path)


@DIST
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("as_folder", [True, False])
def test_the_shard_of_one_rank_is_no_model(tmp_path: Path, rank_of, rank: int, as_folder: bool):
    save_shards(tmp_path / "all", rank_of, tensors(8), 2)
    shard = tmp_path / "all" / f"shard-0000{rank}-model-00001-of-00001.safetensors"
    (tmp_path / "one").mkdir()
    alone = shutil.copy(shard, tmp_path / "one")
    with pytest.raises(IncompatibleError, match=f"{shard.name}: what one rank wrote"):
        open_checkpoint(tmp_path / "one" if as_folder else alone)
    renamed = tmp_path / "one" / "weights.safetensors"
    os.rename(alone, renamed)
    if rank == 2:  # offsets tell, whatever it is called
        with pytest.raises(IncompatibleError, match="what one rank wrote"):
            open_checkpoint(tmp_path / "one" if as_folder else renamed)


@DIST
def test_a_run_of_one_rank_is_whole_under_the_name_of_a_model(tmp_path: Path, rank_of):
    save_shards(tmp_path, rank_of, tensors(), 1)
    (shard,) = tmp_path.iterdir()
    with pytest.raises(IncompatibleError, match=r"rename the file to model\.safetensors"):
        open_checkpoint(tmp_path)
    shard.rename(tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert_same(opened, tensors())
    assert opened.is_plain


@DIST
def test_shards_beside_a_model_are_not_guessed_between(tmp_path: Path, rank_of):
    save_shards(tmp_path, rank_of, tensors(), 2)
    other = tmp_path / "consolidated.safetensors"
    save_file(tensors(), other, {"format": "pt"})
    with pytest.raises(FormatError, match=r"shards of ranks.*which.*\n  ?consolidated.safetensors"):
        open_checkpoint(tmp_path)
    other.rename(tmp_path / "model.safetensors")  # the one that every library takes
    opened = open_checkpoint(tmp_path)
    assert_same(opened, tensors())
    assert opened.format == "safetensors"


@DIST
def test_what_torch_consolidated_is_a_model_like_any(tmp_path: Path, rank_of):
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files,
    )

    save_shards(tmp_path / "sharded", rank_of, tensors(), 2)
    consolidate_safetensors_files(
        str(tmp_path / "sharded"), str(tmp_path), fqn_to_index_mapping=dict.fromkeys(tensors(), 1)
    )
    opened = open_checkpoint(tmp_path)
    assert_same(opened, tensors())
    assert opened.format == "safetensors"


@DIST
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda held, said: said["embed.weight"].update(saved_offsets=[3, 0]), "do not tile"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=[5, 0]), "do not tile"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=[4, 1]), "do not tile"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=[1 << 62, 0]), "not tile"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=[4]), "other dimensions"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=[-4, 0]), "no readable"),
        (lambda held, said: said["embed.weight"].update(saved_offsets=None), "no readable"),
        (lambda held, said: said.pop("embed.weight") and None, "no readable DCP_SHARDING_INFO"),
        (lambda held, said: [1], "no readable"),
        (
            lambda held, said: held.update({"embed.weight": held["embed.weight"].half()}),
            r"parts of \['F16', 'F32'\]",
        ),
        (
            lambda held, said: held.update({"embed.weight": held["embed.weight"][:, :4].clone()}),
            "do not tile",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path, rank_of, change, text: str):
    save_shards(tmp_path, rank_of, tensors(), 2)
    said_offsets(tmp_path / "shard-00002-model-00001-of-00001.safetensors", change)
    with pytest.raises(FormatError, match=text):
        open_checkpoint(tmp_path)


# ----------------------------------------------------------------------------- files of ranks


def save_ranks(folder: Path, states: list[dict]) -> Path:
    """Write files as verl's FSDP checkpoint manager names and lays them out."""
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "config.json").write_text("{}")
    for rank, state in enumerate(states):
        torch.save(state, folder / f"model_world_size_{len(states)}_rank_{rank}.pt")
        torch.save({"lr": 1}, folder / f"optim_world_size_{len(states)}_rank_{rank}.pt")
    return folder


@DIST
@pytest.mark.parametrize("world", [1, 4])
def test_files_of_ranks_are_one_model(tmp_path: Path, rank_of, world: int):
    buffer = {"inv_freq": torch.arange(6.0)}
    states = [sharded(rank_of, rank, world, tensors()) | buffer for rank in range(world)]
    folder = save_ranks(tmp_path / "actor", states)
    opened = open_training(folder, "tuned")
    assert_same(opened.tensors, tensors() | buffer)
    assert opened.format == "FSDP rank files" and opened.side == folder / "huggingface"
    assert list(opened.notes) == [f"{world} files of optimizer and other state left out"]


@DIST
def test_replicas_of_shards_count_once(tmp_path: Path, rank_of):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    states = []
    for rank in range(4):
        rank_of(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", f"fsdp{rank}"))
        states.append({
            name: distribute_tensor(tensor, mesh, [Replicate(), Shard(0)], src_data_rank=None)
            for name, tensor in tensors().items()
        })  # fmt: skip
    assert_same(open_training(save_ranks(tmp_path / "a", states), "tuned").tensors, tensors())


@DIST
@pytest.mark.parametrize("factor", [2, 3])
def test_strided_shards_are_parts_of_what_the_others_have_left(
    tmp_path: Path, rank_of, factor: int
):
    """FSDP over tensor parallelism: each of two shards of rows is cut in two."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard

    tensor, states = torch.randn(7, 3), []
    for rank in range(4):
        rank_of(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", f"tp{rank}"))
        local = tensor.chunk(2)[rank % 2].chunk(2)[rank // 2].clone()
        placements = [_StridedShard(0, split_factor=factor), Shard(0)]
        states.append({"w": DTensor.from_local(
            local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )})  # fmt: skip
    folder = save_ranks(tmp_path / "actor", states)
    if factor == 2:
        assert_same(open_training(folder, "tuned").tensors, {"w": tensor})
    else:
        with pytest.raises(IncompatibleError, match="'w' is _StridedShard over its ranks"):
            open_training(folder, "tuned")


def test_every_rank_has_one_file():
    one, two, other = Path("one"), Path("two"), Path("other")
    assert order_ranks([(1, two), (0, one)], 2) == [one, two]
    for found in ([(0, one), (1, two), (1, other)], [(0, one), (1, two), (2, other)], [(0, one)]):
        with pytest.raises(IncompatibleError, match="expected the files of 2 ranks"):
            order_ranks(found, 2)


@DIST
def test_missing_ranks_and_unclear_files_are_refused_by_name(tmp_path: Path, rank_of):
    states = [sharded(rank_of, rank, 4, tensors()) for rank in range(4)]
    folder = save_ranks(tmp_path / "a", states)
    os.unlink(folder / "model_world_size_4_rank_2.pt")
    with pytest.raises(IncompatibleError, match=r"4 ranks, found 3; ranks missing:\n  2$"):
        open_training(folder, "tuned")
    torch.save(states[0], folder / "model_world_size_3_rank_0.pt")
    with pytest.raises(IncompatibleError, match=r"worlds of \[3, 4\]"):
        open_training(folder, "tuned")
    del states[1]["norm.weight"]
    with pytest.raises(FormatError, match=r"not every rank has:\n  norm\.weight"):
        open_training(save_ranks(tmp_path / "b", states), "tuned")
    alone = tmp_path / "c"
    alone.mkdir()
    torch.save(states[0], alone / "model_world_size_99999999999_rank_0.pt")
    with pytest.raises(IncompatibleError, match="99999999999 ranks, found 1"):
        open_training(alone, "tuned")


@DIST
def test_a_rank_that_holds_another_part_is_refused(tmp_path: Path, rank_of):
    states = [sharded(rank_of, rank, 2, tensors(9)) for rank in range(2)]
    folder = save_ranks(tmp_path / "a", states[::-1])  # names of files are not believed
    assert_same(open_training(folder, "tuned").tensors, tensors(9))
    states[1] = states[0]
    with pytest.raises(FormatError, match=r"do not tile|expected"):
        open_training(save_ranks(tmp_path / "b", states), "tuned")


@DIST
def test_ranks_whose_parts_have_no_known_place_are_refused(tmp_path: Path, rank_of):
    from torch.distributed.tensor import DTensor, Partial, init_device_mesh

    states = [{"w": torch.ones(3)}, {"w": torch.zeros(3)}]
    with pytest.raises(IncompatibleError, match="other values in each"):
        open_training(save_ranks(tmp_path / "a", states), "tuned")
    states = [{"_flat_param": torch.ones(3)}, {"_flat_param": torch.zeros(3)}]
    with pytest.raises(IncompatibleError, match="flat parameter"):
        open_training(save_ranks(tmp_path / "b", states), "tuned")
    rank_of(0, 1)
    mesh = init_device_mesh("cpu", (1,))
    part = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    with pytest.raises(IncompatibleError, match="is Partial over its ranks"):
        open_training(save_ranks(tmp_path / "c", [{"w": part}]), "tuned")


def test_other_folders_are_none_of_these(tmp_path: Path):
    torch.save(toy(layers=1), tmp_path / "pytorch_model.bin")
    assert open_training(tmp_path, "tuned") is None
    torch.save(toy(layers=1), tmp_path / "pytorch_model_fsdp.bin")
    opened = open_training(tmp_path, "tuned")
    assert opened.format == "FSDP full state dict"
    assert_same(opened.tensors, toy(layers=1))
    os.rename(tmp_path / "pytorch_model_fsdp.bin", tmp_path / "pytorch_model_fsdp_rank0.bin")
    with pytest.raises(IncompatibleError, match="LOCAL_STATE_DICT"):
        open_training(tmp_path, "tuned")
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(IncompatibleError, match=r"without \.metadata"):
        open_training(tmp_path, "tuned")


# ------------------------------------------------------------------------------ DeepSpeed ZeRO


def flat(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1).float() for value in values])


def save_zero(folder: Path, stage: int, world: int, subgroup: int = 1 << 60) -> dict:
    """Write what DeepSpeed would, made up here; return the tensors that belong in it."""
    groups = [
        {"embed.weight": torch.randn(5, 3), "a.weight": torch.randn(4, 7)},
        {"a.bias": torch.randn(4), "norm.weight": torch.randn(1)},
    ]
    frozen = {"f.weight": torch.randn(5, 2).bfloat16()}
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")

    def cut(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        part = -(-tensor.numel() // world)
        padded = torch.nn.functional.pad(tensor.reshape(-1), (0, part * world - tensor.numel()))
        return padded[rank * part : (rank + 1) * part].clone()

    for rank in range(world):
        model = {
            "module": {"scale": torch.tensor([1.5, 2.5])}, "buffer_names": ["scale"],
            "param_shapes": [OrderedDict((n, t.shape) for n, t in g.items()) for g in groups],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": {
                name: cut(tensor, rank) if stage == 3 else tensor for name, tensor in frozen.items()
            },
            "shared_params": {"head.weight": "embed.weight"}, "ds_version": "0.19.8",
        }  # fmt: skip
        state: dict = {"zero_stage": stage, "partition_count": world if stage == 3 else [1, world]}
        if stage == 3:
            own = torch.cat([cut(tensor, rank) for group in groups for tensor in group.values()])
            state["fp32_flat_groups"] = list(own.split(min(subgroup, own.numel())))
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        else:
            state["param_alignment_paddings"] = [[1, 2], [4, 0]]
            state["single_partition_of_fp32_groups"] = []
            for group, pads in zip(groups, state["param_alignment_paddings"], strict=True):
                pieces: list[torch.Tensor] = []
                for tensor, count in zip(group.values(), pads, strict=True):
                    pieces += [tensor, torch.full((count,), 9.0)]
                vector = flat(pieces)
                state["single_partition_of_fp32_groups"].append(cut(vector, rank))
            name = "mp_rank_00_model_states.pt"
        torch.save(model, step / name)
        torch.save(
            {"optimizer_state_dict": state, "ds_config": {}},
            step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    tensors = {"scale": torch.tensor([1.5, 2.5]), **frozen, **groups[0], **groups[1]}
    return tensors | {"head.weight": groups[0]["embed.weight"]}


@pytest.mark.parametrize(
    ("stage", "world", "subgroup"),
    [
        (1, 1, 9),
        (1, 2, 9),
        (2, 3, 9),
        (2, 11, 9),
        (3, 1, 7),
        (3, 3, 5),
        (3, 3, 99),
        (3, 11, 1),
    ],
)
def test_master_weights_come_back_in_fp32(tmp_path: Path, stage: int, world: int, subgroup: int):
    expected = save_zero(tmp_path, stage, world, subgroup)
    (tmp_path / "config.json").write_text("{}")
    opened = open_training(tmp_path, "tuned")
    assert_same(opened.tensors, expected)
    assert opened.format == f"DeepSpeed ZeRO-{stage}" and opened.side == tmp_path
    assert {s.dtype for n, s in opened.tensors.items() if n != "f.weight"} == {"F32"}
    assert opened.tensors["head.weight"].name == "head.weight"
    inner = open_training(tmp_path / "global_step7", "tuned")
    assert_same(inner.tensors, expected)
    assert inner.side == tmp_path


def test_joined_pieces_are_read_across_their_ends(tmp_path: Path):
    expected = save_zero(tmp_path, 3, 3, 5)["a.weight"]
    found = open_training(tmp_path, "tuned").tensors["a.weight"]
    assert isinstance(found, Joined) and len(found.pieces) > 3
    for block in (1, 3, 28):
        assert raw_of(found, block) == expected.numpy().tobytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_missing_and_foreign_ranks_are_refused_by_name(tmp_path: Path, stage: int):
    save_zero(tmp_path, stage, 3)
    step = tmp_path / "global_step7"
    file = step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    kept = file.read_bytes()
    os.unlink(file)
    with pytest.raises(IncompatibleError, match=r"3 ranks, found 2; ranks missing:\n  1$"):
        open_training(tmp_path, "tuned")
    file.write_bytes(kept)
    for name in (
        "layer_00-model_00-model_states.pt", "zero", "expp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    ):  # fmt: skip
        (step / name).touch()
        with pytest.raises(IncompatibleError, match=rf"parallelism(.|\n)*  {name}"):
            open_training(tmp_path, "tuned")
        os.unlink(step / name)
    for name in step.glob("*optim_states.pt"):
        os.unlink(name)
    with pytest.raises(IncompatibleError, match=r"no \*_optim_states\.pt"):
        open_training(tmp_path, "tuned")
    (tmp_path / "latest").write_text("../global_step7")
    with pytest.raises(FormatError, match="no folder in it"):
        open_training(tmp_path, "tuned")


def edited(file: Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def first_group(state: dict, value: torch.Tensor) -> None:
    state["single_partition_of_fp32_groups"][0] = value


@pytest.mark.parametrize(
    ("stage", "change", "text"),
    [
        (2, lambda s: s.pop("zero_stage"), "BF16_Optimizer"),
        (2, lambda s: s.update(zero_stage=4), "ZeRO stage 4"),
        (2, lambda s: s.update(zero_stage=0), "ZeRO stage 0"),
        (2, lambda s: s.update(partition_count=[5]), "5 ranks, found 1"),
        (2, lambda s: s.update(partition_count=9), r"9 ranks, found 1; .*\n  1\n  2\n  3$"),
        (2, lambda s: s["single_partition_of_fp32_groups"].pop(), "not laid out"),
        (
            2,
            lambda s: first_group(s, torch.ones(60)),
            "hold 60",
        ),
        (
            2,
            lambda s: first_group(s, torch.ones(9)),
            "9 values",
        ),
        (3, lambda s: s["fp32_flat_groups"].append(torch.ones(1)), "partitions hold"),
        (3, lambda s: s["fp32_flat_groups"].__setitem__(0, Runs(called, "x")), "nothing was run"),
        (3, lambda s: s.update(fp32_flat_groups=3), "not laid out"),
    ],
)
def test_broken_optimizer_files_are_refused(
    tmp_path: Path, monkeypatch, stage: int, change, text: str
):
    monkeypatch.chdir(tmp_path)
    save_zero(tmp_path, stage, 1)
    file = tmp_path / "global_step7" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    edited(file, lambda content: change(content["optimizer_state_dict"]))
    assert MAX_RANKS == 1 << 17
    monkeypatch.setattr(parts_module, "MAX_RANKS", 4)  # ranks that are looked for
    with pytest.raises((FormatError, IncompatibleError), match=text):
        open_training(tmp_path, "tuned")
    assert not CALLED


def test_parts_that_form_too_fine_a_grid_are_refused(monkeypatch):
    given = [((i,), Stored("F32", (1,), (1,), "", 4 * i)) for i in range(4)]
    assert assemble("w", (4,), given).shape == (4,)
    assert MAX_CELLS == 1 << 24
    monkeypatch.setattr(parts_module, "MAX_CELLS", 4)
    with pytest.raises(IncompatibleError, match="'w': 4 parts that form no grid"):
        assemble("w", (4,), given)


def test_shapes_of_other_files_have_limits(monkeypatch):
    assert as_shape([2, 3]) == (2, 3)
    for limit, most in (("MAX_DIMENSIONS", 1), ("MAX_SIZE", 2)):
        with monkeypatch.context() as patch, pytest.raises(FormatError, match="not a shape"):
            patch.setattr(parts_module, limit, most)
            as_shape([2, 3])


def test_what_no_optimizer_holds_comes_from_the_model_file(tmp_path: Path):
    expected = save_zero(tmp_path, 1, 2)
    file = tmp_path / "global_step7" / "mp_rank_00_model_states.pt"
    more = torch.randn(3).bfloat16()
    edited(file, lambda content: content["module"].update(more=more))
    opened = open_training(tmp_path, "tuned")
    assert_same(opened.tensors, expected | {"more": more})
    assert list(opened.notes) == ["1 tensors that no optimizer holds, in the model's dtype"]


# ----------------------------------------------------- real runs of several processes (slow)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Linear(12, 5, bias=False))


def work(rank: int, world: int, kind: str, folder: str) -> None:
    """Be one process of a run on CPU: train a step, save, and let rank 0 save the whole model."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
    from torch.distributed.tensor import init_device_mesh, parallel

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    net, out = small(), Path(folder, "out")
    out.mkdir(exist_ok=True)
    file = out / f"model_world_size_{world}_rank_{rank}.pt"
    if kind == "2d":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
        parallel.parallelize_module(net, mesh["tp"], plan)
        fully_shard(net, mesh=mesh["dp"])
    elif kind == "fsdp1" or kind.endswith(("SHARDED_STATE_DICT", "LOCAL_STATE_DICT")):
        net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2, 6) + rank).square().sum().backward()
    optimizer.step()
    if kind in ("2d", "ranks"):
        torch.save(net.state_dict(), file)
    elif kind == "fsdp1":
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.SHARDED_STATE_DICT):
            torch.save(net.state_dict(), file)
    elif kind.startswith("accelerate"):
        save_with_accelerate(net, out, kind.partition(" ")[2], rank, world)
    else:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.save(state, checkpoint_id=out)
    if isinstance(net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(net):
            whole = {name: p.detach().clone() for name, p in net.module.named_parameters()}
    else:
        whole = {name: value.full_tensor() for name, value in net.state_dict().items()}
    if rank == 0:
        torch.save(whole, Path(folder, "whole.pt"))
    dist.barrier()
    dist.destroy_process_group()


def save_with_accelerate(net, out: Path, kind: str, rank: int, world: int) -> None:
    """Call accelerate's own function; its Accelerator does not run FSDP without an accelerator."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import save_fsdp_model
    from torch.distributed.fsdp import FullyShardedDataParallel

    PartialState(cpu=True)  # its logger asks for one
    second = not isinstance(net, FullyShardedDataParallel)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1 + second, state_dict_type=kind)
    plugin.set_state_dict_type(kind)
    stand_in = SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=rank == 0, is_fsdp2=second,
        wait_for_everyone=torch.distributed.barrier,
    )  # fmt: skip

    save_fsdp_model(plugin, stand_in, net, str(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("dcp", 2), ("ranks", 2), ("fsdp1", 2), ("2d", 4), ("accelerate SHARDED_STATE_DICT", 2),
        ("accelerate FULL_STATE_DICT", 2), ("accelerate LOCAL_STATE_DICT", 2),
    ],
)  # fmt: skip
def test_a_real_run_of_several_processes(tmp_path: Path, kind: str, world: int):
    torch.multiprocessing.spawn(work, (world, kind, str(tmp_path)), nprocs=world)
    if "LOCAL" in kind:
        with pytest.raises(IncompatibleError, match="LOCAL_STATE_DICT"):
            open_training(tmp_path / "out", "tuned")
        return
    opened = open_training(tmp_path / "out", "tuned")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert_same(opened.tensors, whole)
    assert not torch.equal(whole["0.weight"], small().state_dict()["0.weight"])


def train_zero(rank: int, world: int, stage: int, folder: str) -> None:
    """Be one process of a DeepSpeed run on CPU with frozen, tied and uneven parameters."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "LOCAL_SIZE": str(world), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({
        "emb": torch.nn.Embedding(11, 5), "a": torch.nn.Linear(5, 7), "f": torch.nn.Linear(7, 7),
        "n": torch.nn.LayerNorm(7), "b": torch.nn.Linear(7, 5, False),
        "head": torch.nn.Linear(5, 11, False),
    })  # fmt: skip
    net["head"].weight = net["emb"].weight
    net["f"].requires_grad_(False)
    net.register_buffer("scale", torch.tensor([1.5, 2.5]))
    net.forward = lambda x: [x := net[name](x) for name in net][-1].float().square().sum()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if (p.ndim > 1) == wide]} for wide in (True, False)],
        lr=0.01,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                              "sub_group_size": 40},
    }  # fmt: skip
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    for _ in range(2):
        engine.backward(engine(torch.arange(4) + rank))
        engine.step()
    engine.save_checkpoint(f"{folder}/out", tag="global_step2")
    torch.distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_real_deepspeed_run(tmp_path: Path, stage: int):
    pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed")
    torch.multiprocessing.spawn(train_zero, (2, stage, str(tmp_path)), nprocs=2)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    opened = open_training(tmp_path / "out", "tuned")
    expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    left = {"f.weight", "f.bias"} - set(expected)  # frozen, of ZeRO 1: the library forgets them
    assert_same({n: s for n, s in opened.tensors.items() if n not in left}, expected)
    assert bool(left) == (stage == 1) and left <= set(opened.tensors)
    assert "head.weight" in expected
