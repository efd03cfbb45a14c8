"""attach: bit for bit what apply writes, in memory; and exactly the original afterwards.

The reference is `skillvec.apply` on the model as it is saved, which the tests of apply hold against
their own oracle.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TORCH_DTYPE, assert_same_bits, load, perturbed, save, toy
from loaded import Weights, held_by, module_of
from torch import nn

import skillvec as sv
from skillvec.engine.runner import measure_plan
from skillvec.engine.threads import on_block
from skillvec.ops.block import BLOCK_NUMEL
from skillvec.vectors.recipe import Recipe, Share
from skillvec.verbs._apply import plan_request

pytestmark = pytest.mark.usefixtures("one_thread")

RECORD = "model.embed_tokens.weight"


def make(folder: Path, base: Weights, tuned: Weights, **options: Any) -> sv.SkillVector:
    """Save two models, base and tuned, and return the vector between them, each in a file."""
    save(folder / "base.safetensors", base)
    save(folder / "tuned.safetensors", tuned)
    sides = folder / "tuned.safetensors", folder / "base.safetensors"
    return sv.diff(*sides, folder / "v.safetensors", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base with a sparse vector v and a dense one w, and integers that no vector moves."""
    place = tmp_path_factory.mktemp("live")
    base = toy(0) | {"steps": torch.arange(6)}
    make(place, base, perturbed(base, 1, 0.01, density=0.2))
    make(place / "other", base, perturbed(base, 2, 0.01))
    return place


@pytest.fixture()
def model(folder: Path) -> nn.Module:
    return module_of(load(folder / "base.safetensors"))


def assert_holds(model: nn.Module, expected: Path | Weights) -> None:
    assert_same_bits(held_by(model), expected if isinstance(expected, dict) else load(expected))


@contextmanager
def stopping(at: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Raise an error before block `at` of the runs within, counted from 0."""
    seen: list[int] = []
    lock = threading.Lock()

    def stop(plan: Any, number: int, index: int, again: bool) -> None:
        with lock:
            seen.append(number)
            if len(seen) == at + 1:
                raise error("stopped")

    with on_block(stop):
        yield seen


# ------------------------------------------------------------------------------ the bits of apply


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_parameters_are_what_apply_writes_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    """By every codec, at three lambdas and with both roundings; each goes from the original."""
    base = toy(0, dtype, layers=1, width=12)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0])
    base["special"] = special.to(TORCH_DTYPE[dtype])
    tuned = perturbed(base, 1, 0.01, density=0.4)
    model = module_of(base)
    expected = {}
    vectors = {
        codec: make(tmp_path / codec, base, tuned, codec=codec)
        for codec in ("dense", "sparse", "packed")
    }
    target = tmp_path / "dense" / "base.safetensors"
    for lam, rounding in product((1.0, 0.5, -1.0), ("nearest", "stochastic")):
        out = {"lam": lam, "rounding": rounding, "seed": 3}
        report = sv.apply(target, vectors["dense"], tmp_path / "o.safetensors", force=True, **out)
        expected[lam, rounding] = out, report.facts, load(tmp_path / "o.safetensors")
    for vector in vectors.values():
        live = sv.Live(model)
        for out, facts, held in expected.values():
            found = live.set(vector, **out).facts
            assert_holds(model, held)
            for key in ("lam", "changed", "numel", "verdict", "nonfinite"):
                assert found[key] == facts[key], key
            for key in ("gain", "cosine"):  # sums of tensors in another order
                assert found[key] == pytest.approx(facts[key], rel=1e-12), key
        live.detach()
        assert_holds(model, base)


def test_replacements_are_for_the_exact_base_alone(tmp_path: Path) -> None:
    """Also where the guess about it is wrong, and blocks are done again."""
    base = {"a.weight": torch.ones(90, 90), "b.weight": 1 + torch.rand(90, 90)}
    tuned = {name: tensor * 1.02 for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor[::7] = 1e-9
    vector = make(tmp_path, base, tuned)
    assert vector.manifest["exactness"]["replacements"] > 1000
    near = {name: tensor.clone() for name, tensor in base.items()}
    near["a.weight"][0, 0] += 1  # the probe does not see it
    save(tmp_path / "near.safetensors", near)
    for name, held, verdict in (("base", base, "exact base"), ("near", near, "same family")):
        model = module_of(held)
        sv.apply(tmp_path / f"{name}.safetensors", vector, tmp_path / f"{name}-out.safetensors")
        seen: list[bool] = []
        note = seen.append
        with on_block(lambda plan, number, index, again, note=note: note(again)):
            live = sv.attach(model, vector)
        assert any(seen) == (name == "near")
        assert live.report.facts["verdict"] == verdict
        assert_holds(model, tmp_path / f"{name}-out.safetensors")
        assert_same_bits({"b": held_by(model)["b.weight"]}, {"b": tuned["b.weight"]})
        live.detach()
        assert_holds(model, held)


def test_every_kind_of_vector(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    """A pair, a path, scaled ones, a sum, several with their own lambda, operators with passes."""
    v, w = (sv.SkillVector.open(folder / name) for name in ("v.safetensors", "other/v.safetensors"))
    pair = sv.SkillVector.open(f"{folder}/tuned.safetensors::{folder}/base.safetensors")
    shares = (Share(v.ref, 1.0, parameters={"density": 0.3}),
              Share(w.ref, 0.5, parameters={"density": 0.6}))  # fmt: skip
    ties = sv.SkillVector.combined([v, w], Recipe("ties", shares))
    live = sv.Live(model)
    given: list[tuple[list[Any], float, sv.SkillVector]] = [
        ([pair], 1.0, pair),
        ([str(folder / "v.safetensors")], 0.5, v),
        ([-2.0 * v], 0.25, -2.0 * v),
        ([0.7 * v - 0.3 * w], 1.0, 0.7 * v - 0.3 * w),
        ([v, w], 0.5, v + w),
        ([ties], 0.8, ties),
    ]
    for vectors, lam, same in given:
        sv.apply(
            folder / "base.safetensors", same, tmp_path / "out.safetensors", lam=lam, force=True
        )
        live.set(*vectors, lam=lam)
        assert_holds(model, tmp_path / "out.safetensors")
    live.set(v, w, lam=(0.7, -0.3))
    sv.apply(
        folder / "base.safetensors", 0.7 * v - 0.3 * w, tmp_path / "out.safetensors", force=True
    )
    assert_holds(model, tmp_path / "out.safetensors")
    assert live.weights() == {v.ref: 0.7, w.ref: -0.3}
    live.set(lam=0.5)
    assert live.weights() == {v.ref: 0.5, w.ref: 0.5}
    live.set(2.0 * v)
    assert live.weights() == {v.ref: 2.0}
    with pytest.raises(
        sv.UsageError, match="lam: 3 numbers, expected one, or 2: one for each vector"
    ):
        live.set(v, w, lam=(1, 2, 3))
    live.detach()
    assert live.weights() == {}
    assert_holds(model, folder / "base.safetensors")


def test_a_vector_of_fewer_tensors_after_one_of_more(folder: Path, tmp_path: Path) -> None:
    base = load(folder / "base.safetensors")
    model = module_of(base)
    sides = folder / "tuned.safetensors", folder / "base.safetensors"
    less = sv.diff(*sides, tmp_path / "less.safetensors", exclude=["*layers*", "*norm*"])
    sv.apply(folder / "base.safetensors", less, tmp_path / "out.safetensors")
    live = sv.attach(model, folder / "v.safetensors")
    live.set(less)
    assert_holds(model, tmp_path / "out.safetensors")
    live.set(folder / "v.safetensors")
    assert_holds(model, folder / "tuned.safetensors")
    live.detach()
    assert_holds(model, base)


def test_options_are_those_of_apply(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    options = {"exclude": ["*embed*"], "include": ["*layers.0*", "*embed*"]}
    sv.apply(
        folder / "base.safetensors",
        folder / "v.safetensors",
        tmp_path / "out.safetensors",
        **options,
    )
    with sv.attach(model, folder / "v.safetensors", **options) as live:
        assert_holds(model, tmp_path / "out.safetensors")
        excluded = [line["name"] for line in live.report.ledger if line["status"] == "excluded"]
        assert RECORD in excluded and live.is_attached
    renamed = {f"net.{name}": tensor for name, tensor in load(folder / "base.safetensors").items()}
    other = module_of({n.replace("layers", "blocks"): t for n, t in renamed.items()})
    live = sv.attach(other, folder / "v.safetensors", rename=["layers=blocks"])
    expected = load(folder / "tuned.safetensors")
    assert all(torch.equal(t, expected[n[4:].replace("blocks", "layers")])
               for n, t in held_by(other).items())  # fmt: skip
    assert live.report.facts["layout"]


def test_verdict_and_refusals_come_before_anything_moves(
    folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    told = []

    class Watcher:
        def planned(self, report: sv.Report) -> None:
            told.append(dict(report.facts))
            if len(told) == 1:
                assert_holds(model, folder / "base.safetensors")

        def advanced(self, done_nbytes: int, total_nbytes: int) -> None: ...

    live = sv.attach(model, folder / "v.safetensors", watcher=Watcher())
    facts = live.report.facts
    assert told[0]["verdict"] == "exact base" and "kept_nbytes" not in told[0]
    assert 0 < facts["kept_nbytes"] <= told[0]["most_kept_nbytes"] <= facts["touched_nbytes"] * 1.1
    live.set(lam=0.5)  # seen on the original, not on what it was changed to
    assert told[1]["verdict"] == live.report.facts["verdict"] == "exact base"
    strange = sv.attach(module_of(toy(7)), folder / "v.safetensors")
    assert strange.report.facts["verdict"] == "same shapes, unknown lineage"
    with pytest.raises(sv.IncompatibleError, match=r"target \[40, 16\], vector \[40, 24\]"):
        sv.attach(module_of(toy(0, width=16)), folder / "v.safetensors")
    with pytest.raises(sv.IncompatibleError):  # nothing has moved: it stays as it was
        live.set(make(tmp_path, toy(0, width=16), toy(1, width=16)))
    assert live.is_attached and live.weights() == {str(folder / "v.safetensors"): 0.5}
    live.detach()
    assert_holds(model, folder / "base.safetensors")


def test_an_operator_measures_once_while_it_is_attached(
    folder: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it finds holds at every lambda; after a detach the vector's files may be others."""
    ties = sv.combine(folder / "v.safetensors", folder / "other" / "v.safetensors", op="ties",
                      parameters={"density": 0.5})  # fmt: skip
    measured = []

    def measure(*args: Any) -> Any:
        measured.append(args)
        return measure_plan(*args)

    monkeypatch.setattr("skillvec.verbs.live.measure_plan", measure)
    live = sv.attach(model, ties, lam=0.4)
    live.set(lam=0.8)
    sv.apply(folder / "base.safetensors", ties, tmp_path / "out.safetensors", lam=0.8)
    assert_holds(model, tmp_path / "out.safetensors")
    assert len(measured) == 1
    live.detach()
    live.set(lam=0.8)
    assert_holds(model, tmp_path / "out.safetensors")
    assert len(measured) == 2


def test_a_vector_is_planned_once_while_it_is_attached(
    folder: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lambda and rounding need no new plan; other weights do, after a detach."""
    vector, planned = sv.SkillVector.open(folder / "v.safetensors"), []

    def plan(*args: Any) -> Any:
        planned.append(args)
        return plan_request(*args)

    monkeypatch.setattr("skillvec.verbs.live.plan_request", plan)
    live = sv.attach(model, vector)
    live.set(vector, lam=0.5, rounding="stochastic", seed=3)
    sv.apply(
        folder / "base.safetensors", vector, tmp_path / "out.safetensors", lam=0.5,
        rounding="stochastic", seed=3,
    )  # fmt: skip
    assert_holds(model, tmp_path / "out.safetensors")
    assert live.report.facts["lam"] == 0.5 and live.report.facts["seed"] == 3
    for options in ({"lam": float("nan")}, {"rounding": "up"}):
        with pytest.raises(sv.UsageError, match="expected"):
            live.set(**options)
    assert len(planned) == 1 and live.report.facts["verdict"] == "exact base"
    live.detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "steps":
                parameter.mul_(1.5)
    live.set(lam=1.0, rounding="nearest")
    assert len(planned) == 2 and live.report.facts["verdict"] != "exact base"
    live.set(folder / "v.safetensors")
    assert len(planned) == 3


# ----------------------------------------------------------------------------- back to the original


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_at_any_block_leaves_the_original(
    error: type[BaseException], folder: Path, model: nn.Module
) -> None:
    """Of attach and of set; and what is attached afterwards is right."""
    vector = sv.SkillVector.open(folder / "v.safetensors")
    with stopping(-2, error) as seen:
        sv.attach(model, vector).detach()
    count = len(seen)
    assert count > 10
    for at in range(0, count, 5):
        with stopping(at, error), pytest.raises(error):
            sv.attach(model, vector)
        assert_holds(model, folder / "base.safetensors")
        live = sv.attach(model, vector)
        assert_holds(model, folder / "tuned.safetensors")
        with stopping(at, error), pytest.raises(error):
            live.set(folder / "other/v.safetensors", lam=0.5)
        assert not live.is_attached and live.weights() == {}
        assert_holds(model, folder / "base.safetensors")
        live.set(lam=1.0)  # of what was attached last
        assert_holds(model, folder / "tuned.safetensors")
        live.detach()
    assert_holds(model, folder / "base.safetensors")


def test_tensors_of_several_blocks_and_few_threads(tmp_path: Path) -> None:
    """An error in the third block finds the others written, or not."""
    base = {"w": torch.randn(3 * BLOCK_NUMEL + 5).to(torch.bfloat16)}
    tuned = {"w": base["w"].clone()}
    tuned["w"][::7] *= 1.5
    vector = make(tmp_path, base, tuned)
    model = module_of(base)
    for workers in (1, 3):
        live = sv.attach(model, vector, workers=workers)
        assert_holds(model, tuned)
        with stopping(2, RuntimeError), pytest.raises(RuntimeError):
            live.set(lam=0.5)
        assert_holds(model, base)


def test_errors_at_the_end_leave_the_original(folder: Path, tmp_path: Path) -> None:
    """A file that was altered, and values that are not finite, show when all blocks are written."""
    base = toy(0)
    vector = make(tmp_path, base, perturbed(base, 1, 0.01), codec="dense")
    model = module_of(base)
    huge = {name: (tensor.float() * 3e38).to(torch.bfloat16) for name, tensor in base.items()}
    large = make(tmp_path / "large", base, huge, allow_nonfinite=True)
    live = sv.attach(model, vector)
    with pytest.raises(sv.NonfiniteError):
        live.set(large, lam=50.0)
    assert not live.is_attached
    assert_holds(model, base)
    content = bytearray((tmp_path / "v.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(content)
    with pytest.raises(sv.FormatError, match="altered"):
        sv.attach(model, tmp_path / "altered.safetensors")
    assert_holds(model, base)


def test_what_something_else_changed_is_named_and_the_rest_restored(
    folder: Path, model: nn.Module
) -> None:
    base, changed = load(folder / "base.safetensors"), model.get_parameter(RECORD)
    live = sv.attach(model, folder / "v.safetensors")
    with torch.no_grad():
        changed.add_(1)
    held = changed.detach().clone()
    with pytest.raises(sv.VerificationError, match=f"(?s)load the model again.*  {RECORD}$"):
        live.detach()
    assert_same_bits({"one": changed.detach()}, {"one": held})
    found = held_by(model)
    assert_same_bits({**found, RECORD: base[RECORD]}, base)
    assert not live.is_attached
    with torch.no_grad():
        changed.copy_(base[RECORD])
    live = sv.attach(model, folder / "v.safetensors")
    other = "model.norm.weight"
    with torch.no_grad():
        changed.add_(1)
        model.get_parameter(other).add_(1)
    with pytest.raises(sv.VerificationError, match=f"(?s)load the model again.*{RECORD}.*{other}"):
        live.set(lam=0.5)  # not from what the sum would give
    assert_same_bits({**held_by(model), RECORD: base[RECORD], other: base[other]}, base)
    with torch.no_grad():
        model.get_parameter(other).copy_(base[other])
    model.float()
    live = sv.attach(model, folder / "v.safetensors")
    model.half()
    with pytest.raises(sv.VerificationError):
        live.detach()


def test_an_error_within_the_with_statement(folder: Path, model: nn.Module) -> None:
    with pytest.raises(KeyError), sv.attach(model, folder / "v.safetensors"):
        raise KeyError
    assert_holds(model, folder / "base.safetensors")


def test_a_model_has_one_live_at_a_time(folder: Path, model: nn.Module) -> None:
    live = sv.attach(model, folder / "v.safetensors", lam=0.5)
    held = held_by(model)
    for one in (model, model.get_submodule("model.layers")):
        with pytest.raises(sv.UsageError, match="attached to it already"):
            sv.attach(one, folder / "v.safetensors")
        assert sv.Live.of(one) is live
    assert_holds(model, held)
    again = copy.deepcopy(model)  # a copy knows nothing of it
    assert sv.Live.of(again) is None
    sv.attach(again, folder / "v.safetensors", lam=-0.5)
    assert_holds(model, held)
    live.detach()
    live.detach()  # of nothing
    assert_holds(model, folder / "base.safetensors")
    with pytest.raises(sv.UsageError, match="set needs a vector"):
        sv.Live(model).set()
    with pytest.raises(sv.UsageError, match="attach needs a vector"):
        sv.attach(model)
    with pytest.raises(sv.UsageError, match="a dict, expected"):
        sv.attach({}, folder / "v.safetensors")


def test_two_threads_do_not_attach_at_once(folder: Path, model: nn.Module) -> None:
    meet, found = threading.Barrier(3), list[object]()

    def attach() -> None:
        meet.wait()
        try:
            found.append(sv.attach(model, folder / "v.safetensors"))
        except sv.UsageError as error:
            found.append(str(error))

    before = held_by(model)
    threads = [threading.Thread(target=attach) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (live,) = [one for one in found if isinstance(one, sv.Live)]
    assert sum("attached to it already" in str(one) for one in found) == 2
    live.detach()
    assert_holds(model, before)


@pytest.mark.parametrize("lam", [True, "1", b"1", None, 10**400, 1j, np.ones((2, 1)), ["1"]])
def test_what_is_no_lambda_is_refused(folder: Path, model: nn.Module, lam: Any) -> None:
    with sv.attach(model, folder / "v.safetensors", lam=np.float32(0.5)) as live:
        assert live.weights() == {live.report.facts["name"]: 0.5}
        with pytest.raises(sv.UsageError, match=r"lam"):
            live.set(folder / "v.safetensors", lam=[None] if lam is None else lam)
        assert live.is_attached


def test_a_copy_of_a_model_that_had_a_vector_takes_another(folder: Path, model: nn.Module) -> None:
    live = sv.attach(model, folder / "v.safetensors")
    shallow = copy.copy(model)
    assert sv.Live.of(shallow) is live
    live.detach()
    sv.attach(shallow, folder / "v.safetensors").detach()


def test_parameters_change_while_the_lock_is_held(folder: Path, model: nn.Module) -> None:
    live = sv.attach(model, folder / "v.safetensors")
    free = []

    def try_lock() -> None:
        free.append(live.lock.acquire(blocking=False))
        if free[-1]:
            live.lock.release()

    def ask(*block: Any) -> None:
        other = threading.Thread(target=try_lock)
        other.start()
        other.join()

    with on_block(ask):
        live.set(lam=0.5)
    assert free and not any(free)
    try_lock()
    assert free[-1]


# ------------------------------------------------------------------------------------ what it costs


def test_what_is_kept_of_a_vector_of_rl_is_a_seventh_of_the_weights(tmp_path: Path) -> None:
    """17 % of bf16 values move by one step of their grid, some by two."""
    draw = np.random.default_rng(0)
    values = torch.from_numpy(draw.normal(size=BLOCK_NUMEL + 77) * 0.02).to(torch.bfloat16)
    steps = draw.choice([0, 1, 2], values.numel(), p=[0.83, 0.145, 0.025])
    patterns = values.view(torch.int16) + torch.from_numpy(steps.astype(np.int16))
    vector = make(tmp_path, {"w": values}, {"w": patterns.view(torch.bfloat16)})
    live = sv.attach(module_of({"w": values}), vector)
    facts = live.report.facts
    assert abs(facts["changed"] / values.numel() - 0.17) < 0.01
    assert facts["touched_nbytes"] == 2 * values.numel()
    assert 0.02 < facts["kept_nbytes"] / facts["touched_nbytes"] < 0.15
    assert facts["kept_nbytes"] < facts["most_kept_nbytes"] < 0.25 * facts["touched_nbytes"]
    live.set(lam=0.0)
    assert live.report.facts["kept_nbytes"] == 0


def test_graphs_of_autograd_from_before_are_refused(folder: Path, model: nn.Module) -> None:
    weight = model.get_parameter(RECORD)
    loss = (weight * weight).sum()
    with sv.attach(model, folder / "v.safetensors"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        (weight * weight).sum().backward()
    assert weight.requires_grad and weight.is_leaf
