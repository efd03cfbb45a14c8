"""What a training left behind is opened and compared with its start: every kind of fault."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import perturbed, save, toy

from skillvec.recipes.training import RecipeError
from skillvec.recipes.weights import check_saved, keep_whole

Tensors = dict[str, torch.Tensor]


def wide(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("start") / "base", wide(toy()))


def test_a_whole_model_in_fp32_passes(start: Path, tmp_path: Path) -> None:
    check_saved(save(tmp_path / "out", wide(perturbed(toy(), 1))), start, "float32")
    half = save(tmp_path / "half", toy())  # a base of the Hub, trained in fp32 and in its own dtype
    check_saved(tmp_path / "out", half, "float32")
    check_saved(save(tmp_path / "again", perturbed(toy(), 1)), half, "auto")


def lose(tensors: Tensors, name: str) -> None:
    del tensors[name]


def empty(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.zeros(0)


def halve(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:1].clone()


def spoil(tensors: Tensors, name: str) -> None:
    tensors[name].view(-1)[-1] = float("nan")


def round_one(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose, "left no whole model"),
        (empty, "left no whole model"),
        (halve, "left no whole model"),
        (spoil, "1 tensors hold values that are not finite"),
        (round_one, "1 tensors are not in F32"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_name(
    start: Path, tmp_path: Path, harm: Any, words: str
) -> None:
    tensors = wide(perturbed(toy(), 1))
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    harm(tensors, name)
    with pytest.raises(RecipeError, match=words) as error:
        check_saved(save(tmp_path / "out", tensors), start, "float32")
    assert name in str(error.value)


def test_no_weights_and_weights_that_did_not_move_are_refused(start: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="left no whole model"):
        check_saved(tmp_path / "out", start, "float32")
    with pytest.raises(RecipeError, match="so v = 0"):
        check_saved(start, start, "float32")
    check_saved(start, start, "float32", moves=False)
    one = wide(toy())  # the least that a training can do
    last = list(one.values())[-1].view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    check_saved(save(tmp_path / "moved", one), start, "float32")


def test_deepspeed_computes_in_bf16_and_keeps_the_weights_that_it_starts_from() -> None:
    plugin = SimpleNamespace(deepspeed_config={"bf16": {"enabled": True}}, told=0)
    plugin.set_deepspeed_weakref = lambda: setattr(plugin, "told", 1)
    settings = SimpleNamespace(
        deepspeed_plugin=plugin, bf16=True, fp16=False, mixed_precision="bf16"
    )
    keep_whole(settings, "bfloat16")
    assert plugin.deepspeed_config == {"bf16": {"enabled": True}}
    keep_whole(settings, "float32")
    assert plugin.told and plugin.deepspeed_config["bf16"] == {"enabled": False}
    assert plugin.deepspeed_config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert settings.bf16 is False and settings.mixed_precision == "no"
    with pytest.raises(RecipeError, match="set bf16"):
        keep_whole(SimpleNamespace(deepspeed_plugin=plugin, bf16=False, fp16=True), "float32")
    with pytest.raises(RecipeError, match="say float32 or bfloat16"):
        keep_whole(settings, "auto")
