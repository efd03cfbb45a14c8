"""Models in memory as checkpoints: named and cut as files are, and what cannot be changed.

The reference is what `skillvec.apply` makes of the folder that save_pretrained writes, loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import TORCH_DTYPE, assert_same_bits, load, perturbed, save, toy
from loaded import held_by, module_of
from torch import nn
from zoo import ZOO, build

import skillvec as sv
from skillvec.checkpoints.live_model import see_model
from skillvec.checkpoints.live_tensors import Kept, LiveTensor, Spot
from skillvec.files.file import leaf_digests
from skillvec.files.tensors import values_of
from skillvec.files.views import Box, View, concatenate

pytestmark = pytest.mark.usefixtures("one_thread")

# fused experts, layers that lie turned, what ties; slow ones: towers that see, states, convolutions
FEW = ("MixtralForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration")
MANY = tuple(name for name in ZOO if name not in FEW)


def check_family(name: str, tied: bool, folder: Path) -> None:
    """Attach to a loaded model, and compare it with what is loaded from apply's folder."""
    kind = getattr(transformers, name)
    start = build(name, tied).to(torch.bfloat16)
    start.save_pretrained(folder / "start")
    model = kind.from_pretrained(folder / "start")
    before = held_by(model)
    model.save_pretrained(folder / "base")
    weights = load(folder / "base")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in weights.items()} == {
        n: (TORCH_DTYPE.get(spec.dtype, torch.int64), spec.shape)
        for n, spec in see_model(model).items()
    }
    tuned = save(folder / "tuned.safetensors", perturbed(weights, 1, 0.02, density=0.4))
    vector = sv.diff(tuned, folder / "base", folder / "v.safetensors")
    options = {"lam": 0.5, "rounding": "stochastic", "seed": 5}
    sv.apply(folder / "base", vector, folder / "out", **options)
    expected = held_by(kind.from_pretrained(folder / "out"))
    with sv.attach(model, vector, **options) as live:
        assert_same_bits(held_by(model), expected)
        assert live.report.facts["verdict"] == "exact base"
    assert_same_bits(held_by(model), before)
    assert any(not torch.equal(before[n], expected[n]) for n in before)


@pytest.mark.parametrize("name", FEW)
def test_families(name: str, tmp_path: Path) -> None:
    check_family(name, name in ("GPT2LMHeadModel", "T5ForConditionalGeneration"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MANY)
def test_many_families(name: str, tied: bool, tmp_path: Path) -> None:
    check_family(name, tied, tmp_path)


def test_names_of_a_model_that_was_loaded_from_other_names(tmp_path: Path) -> None:
    """A vector in the layout of memory fits as one in that of files does."""
    model = build("MixtralForCausalLM").to(torch.bfloat16)
    base = held_by(model)
    save(tmp_path / "base.safetensors", base)
    tuned = perturbed(base, 1, 0.02)
    save(tmp_path / "tuned.safetensors", tuned)
    vector = sv.SkillVector.open(f"{tmp_path}/tuned.safetensors::{tmp_path}/base.safetensors")
    with sv.attach(model, vector) as live:
        assert_same_bits(held_by(model), tuned)
        assert live.report.facts["layout"]
    assert_same_bits(held_by(model), base)


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = build("LlamaForCausalLM").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lora.save_pretrained(tmp_path / "adapter")
    for wrapped in (lora, lora.get_base_model()):
        with pytest.raises(sv.IncompatibleError, match="adapter"):
            sv.attach(wrapped, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    sv.apply(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", lam=0.5)
    expected = held_by(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with sv.attach(base, tmp_path / "adapter", lam=0.5):
        assert_same_bits(held_by(base), expected)
    assert_same_bits(load(tmp_path / "base"), held_by(base))


def test_a_head_that_moves_apart_from_what_it_is_tied_to(tmp_path: Path) -> None:
    """apply unties it; in memory it is one parameter."""
    from peft import LoraConfig, get_peft_model

    model = build("LlamaForCausalLM", tied=True)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora = get_peft_model(build("LlamaForCausalLM", tied=True), config)
    with torch.no_grad():
        lora.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.add_(0.1)
    lora.save_pretrained(tmp_path / "adapter")
    vector = sv.SkillVector.open(f"{tmp_path}/adapter::{tmp_path}/base")
    assert sv.apply(tmp_path / "base", vector, tmp_path / "out", dry_run=True).facts["verdict"]
    before = held_by(model)
    with pytest.raises(
        sv.IncompatibleError, match=r"(?s)tie_word_embeddings=False.*lm_head.weight"
    ):
        sv.attach(model, vector)
    assert_same_bits(held_by(model), before)


# ------------------------------------------------------------------------------ how tensors may lie


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> sv.SkillVector:
    folder = tmp_path_factory.mktemp("lie")
    base = toy(0, "F32")
    save(folder / "base.safetensors", base)
    save(folder / "tuned.safetensors", perturbed(base, 1, 0.01))
    sides = folder / "tuned.safetensors", folder / "base.safetensors"
    return sv.diff(*sides, folder / "v.safetensors")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def place(model: nn.Module, name: str, parameter: Any) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


def test_tensors_that_lie_turned_strided_shared_or_made_for_inference(
    vector: sv.SkillVector,
) -> None:
    base = toy(0, "F32")
    tuned = perturbed(base, 1, 0.01)
    model = module_of(base)
    q = "model.layers.0.self_attn.q_proj.weight"
    place(model, q, nn.Parameter(base[q].t().contiguous().t()))
    room = torch.zeros(40, 48)
    room[:, ::2], room[:, 1::2] = base[EMBED], base[HEAD]
    place(model, EMBED, nn.Parameter(room[:, ::2]))
    place(model, HEAD, nn.Parameter(room[:, 1::2], requires_grad=False))
    bias = "model.layers.0.self_attn.q_proj.bias"
    with torch.inference_mode():
        place(model, bias, nn.Parameter(base[bias].clone(), requires_grad=False))
    norm = "model.norm.weight"
    model.get_submodule("model.norm")._parameters.clear()
    model.get_submodule("model.norm").register_buffer("weight", base[norm].clone())
    assert not model.get_parameter(EMBED).is_contiguous()
    with sv.attach(model, vector):
        assert_same_bits(held_by(model), tuned)
        assert torch.equal(room[:, ::2], tuned[EMBED])
    assert_same_bits(held_by(model), base)


def test_buffers_that_are_not_saved_and_masks_stay(vector: sv.SkillVector) -> None:
    model = module_of(toy(0, "F32"))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    model.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    assert "cache" not in see_model(model) and "mask" in see_model(model)
    with sv.attach(model, vector) as live:
        assert {line["name"]: line["status"] for line in live.report.ledger}["mask"] == (
            "passed through"
        )


def test_a_parameter_under_two_names_is_changed_once(
    vector: sv.SkillVector, tmp_path: Path
) -> None:
    base = toy(0, "F32")
    model = module_of(base)
    model.second = model.get_submodule("model.norm")
    with sv.attach(model, vector):
        expected = perturbed(base, 1, 0.01)
        found = held_by(model)
        assert torch.equal(found.pop("second.weight"), expected["model.norm.weight"])
        assert_same_bits(found, expected)


# ------------------------------------------------------------------------------ one block of one


def halves_of(values: torch.Tensor) -> LiveTensor:
    """Return a tensor that lies in two parameters."""
    model = module_of(dict(zip("ab", values.chunk(2), strict=True)))
    spots = [Spot(name, model, name, "") for name in "ab"]
    views = [View((4,), (Box((0,), (4,), spot, 0, (1,)),)) for spot in spots]
    return LiveTensor("w", "F32", concatenate(views, 0), Kept())


def change(held: LiveTensor, *sides: np.ndarray) -> None:
    old, new = (side.view("<u4") for side in sides)
    held.change(0, old ^ new, old, new, leaf_digests(new.view("u1").data))


def test_a_write_that_fails_leaves_the_original_of_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = np.arange(8, dtype=np.float32)
    held = halves_of(torch.from_numpy(before.copy()))
    writes = Spot.patterns
    calls = []

    def fail_once(spot: Spot, box: Box) -> Any:
        calls.append(spot.name)
        if len(calls) == 2:
            raise MemoryError
        return writes(spot, box)

    monkeypatch.setattr(Spot, "patterns", fail_once)
    after = before + 1
    with pytest.raises(MemoryError):
        change(held, before, after)
    assert calls == ["a", "b", "a", "b"] and not held.kept.records
    assert np.array_equal(values_of(held, 0, 8), before)


def test_nothing_is_written_once_originals_were_put_back() -> None:
    """A thread that was left behind may come late."""
    before = np.arange(8, dtype=np.float32)
    held = halves_of(torch.from_numpy(before.copy()))
    after = before + 1
    change(held, before, after)
    assert [int(spot.tensor()[0]) for spot in held.view.sources] == [1, 5]
    assert np.array_equal(values_of(held, 2, 4), before[2:6])
    assert held.put_back()
    with pytest.raises(sv.SkillvecError, match="written to after"):
        change(held, before, after)
    assert [int(spot.tensor()[0]) for spot in held.view.sources] == [0, 4]


# --------------------------------------------------------------------------------- what is refused


def expanded(model: nn.Module) -> None:
    place(model, EMBED, nn.Parameter(torch.zeros(1, 24).expand(40, 24)))


def overlapping(model: nn.Module) -> None:
    room = torch.zeros(41, 24)
    place(model, EMBED, nn.Parameter(room[:40]))
    place(model, HEAD, nn.Parameter(room[1:]))


def on_meta(model: nn.Module) -> None:
    place(model, EMBED, nn.Parameter(torch.zeros(40, 24, device="meta")))


def offloaded(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model.get_submodule("model.embed_tokens"), torch.device("cpu"))


def lazy(model: nn.Module) -> None:
    place(model, EMBED, nn.parameter.UninitializedParameter())


def sparse(model: nn.Module) -> None:
    place(model, EMBED, nn.Parameter(torch.eye(40, 24).to_sparse()))


def quantized(model: nn.Module) -> None:
    values = torch.quantize_per_tensor(torch.zeros(40, 24), 0.1, 0, torch.qint8)
    place(model, EMBED, nn.Parameter(values, requires_grad=False))


def of_another_library(model: nn.Module) -> None:
    """A parameter whose class says so: it is not installed here."""
    kind = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    place(model, EMBED, kind(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False))


def of_a_class_of_its_own(model: nn.Module) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    place(model, EMBED, nn.Parameter(TwoTensor(torch.zeros(40, 24), torch.zeros(40, 24))))


def distributed(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    place(
        model, EMBED, nn.Parameter(DTensor.from_local(torch.zeros(40, 24), MESH[0], [Replicate()]))
    )


def of_zero3(model: nn.Module) -> None:
    parameter: Any = nn.Parameter(torch.zeros(0))
    parameter.ds_status = "NOT_AVAILABLE"
    place(model, EMBED, parameter)


def complex_double(model: nn.Module) -> None:
    place(model, EMBED, nn.Parameter(torch.zeros(40, 24, dtype=torch.complex128)))


MESH: list[Any] = []
REFUSED: dict[Callable[[nn.Module], None], str] = {
    expanded: "expanded: several of its values are one in memory",
    overlapping: "shares a part of its memory with another",
    on_meta: "on the meta device: it has no values",
    offloaded: "offloaded: it is on its device only while it is used",
    lazy: "not initialised yet",
    sparse: "torch.float32, torch.sparse_coo, expected plain values",
    quantized: "torch.qint8, torch.strided, expected plain values",
    of_another_library: "quantised by bitsandbytes (Params4bit)",
    of_a_class_of_its_own: "a tensor of class torch.testing._internal.two_tensor.TwoTensor",
    distributed: "a DTensor, of which every process holds a part",
    of_zero3: "of ZeRO-3, of which every process holds a part",
    complex_double: "torch.complex128, expected a dtype that files hold",
}


@pytest.fixture()
def mesh(tmp_path: Path) -> Any:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    MESH[:] = [init_device_mesh("cpu", (1,))]
    yield
    MESH.clear()
    dist.destroy_process_group()


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_changed_is_refused_by_name(
    spoil: Callable[[nn.Module], None], vector: sv.SkillVector, request: pytest.FixtureRequest
) -> None:
    if spoil is distributed:
        request.getfixturevalue("mesh")
    base = toy(0, "F32")
    model = module_of(base)
    spoil(model)
    with pytest.raises(sv.IncompatibleError) as error:
        sv.attach(model, vector)
    assert f"  {EMBED}: {REFUSED[spoil]}" in str(error.value)
    names = [name for name in base if name not in (EMBED, HEAD)]
    held = {name: model.get_parameter(name).detach() for name in names}
    assert_same_bits(held, {name: base[name] for name in names})
    live = sv.attach(model, vector, exclude=[EMBED, HEAD])  # what is left out may be anything
    assert live.report.facts["changed"] > 1000


def test_weights_that_nothing_says_how_to_read_are_refused(vector: sv.SkillVector) -> None:
    base = toy(0, "F32")
    model = module_of(base | {HEAD: torch.zeros(40, 24, dtype=torch.int8)})
    model.get_submodule("lm_head").register_buffer("weight_scale", torch.ones(40, 1))
    with pytest.raises(sv.IncompatibleError, match=f"{HEAD}: .*nothing says how to read it"):
        sv.attach(model, vector)
    model = module_of(base)
    model.is_quantized = True
    with pytest.raises(sv.IncompatibleError, match="the model is quantised"):
        sv.attach(model, vector)


def test_the_folder_that_a_model_came_from_is_not_read(tmp_path: Path) -> None:
    """It may be gone; and its files do not change with the model, which may be mapped from them."""
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    tuned = perturbed(load(tmp_path / "base"), 1, 0.01)
    save(tmp_path / "tuned" / "model.safetensors", tuned)
    vector = sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "v.safetensors")
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with sv.attach(loaded, vector):
        assert_same_bits(held_by(loaded), tuned)
        assert file.read_bytes() == content
        file.unlink()
    assert_same_bits(held_by(loaded), held_by(model))
