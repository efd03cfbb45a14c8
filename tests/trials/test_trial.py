"""One target at many points: what is evaluated, and what an evaluation may do to it."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import load
from safetensors.torch import save_file
from tried import World, make_world, weights_of

import skillvec
from skillvec.errors import IncompatibleError, OutputError, UsageError
from skillvec.trials import loading, trial
from skillvec.trials.evaluators import open_evaluator
from skillvec.trials.scores import ALL, HALVES, Scores, read_scores
from skillvec.trials.trial import (
    CHANGED,
    DONE,
    FAILED,
    NOT_A_NUMBER,
    TIMED_OUT,
    Outcome,
    Trials,
)
from skillvec.vectors.vector import SkillVector

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("world"))
    gc.freeze()  # before a model is loaded again garbage is collected, and other tests left much
    yield made
    gc.unfreeze()


@pytest.fixture(scope="module")
def vector(world: World) -> SkillVector:
    return SkillVector.open(world.vector)


class Called:
    """An evaluator that does what a test says, and remembers the weights that it was given."""

    metrics, splits, takes_folder, spec = None, HALVES, False, "called"

    def __init__(self, act: Callable[[Any], Any] = lambda model: {"x": 1.0}) -> None:
        self.act = act
        self.seen: list[dict[str, bytes]] = []

    def check(self, target: str) -> None:
        assert Path(target, "config.json").exists()

    def evaluate(self, model: Any, tokenizer: Any, split: str) -> Scores:
        self.seen.append(weights_of(model))
        return read_scores(self.act(model))


@pytest.fixture
def tries(world: World) -> Callable[..., Trials]:
    return lambda evaluator, **options: Trials(world.target, evaluator, device="cpu", **options)


def weights_in(folder: Path) -> dict[str, bytes]:
    from transformers import AutoModelForCausalLM

    return weights_of(AutoModelForCausalLM.from_pretrained(folder))


# ------------------------------------------------------------------------------------- points


def test_each_point_is_what_apply_writes_and_the_target_is_untouched(
    world: World, vector: SkillVector, tries: Any, tmp_path: Path
):
    called = Called()
    trials = tries(called)
    points = [None, (vector, 0.5), (2 * vector, 1.0), (vector, 1.0), None]
    found = [trials.run(*(point or (None,))) for point in points]
    assert [one.status for one in found] == [DONE] * 5 and found[0].is_done
    assert called.seen[0] == called.seen[4] == weights_in(world.target)
    assert called.seen[3] == weights_in(world.tuned)
    for at, (one, lam) in ((1, (vector, 0.5)), (2, (2 * vector, 1.0))):
        report = skillvec.apply(world.target, one, tmp_path / str(at), lam=lam)
        assert called.seen[at] == weights_in(tmp_path / str(at))
        assert found[at].gain == report.facts["gain"] and found[at].cosine == report.facts["cosine"]
        assert found[at].changed == report.facts["changed"] > 0
    assert (found[0].gain, found[0].changed) == (None, None) == (found[4].gain, found[4].changed)
    assert trials.load_seconds is not None and found[1].attach_seconds > 0


def test_without_torch_a_sentence_names_the_extra_that_is_enough(
    tries: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"^loading a model to evaluate .*skillvec\[hf\]"):
        tries(Called())


def test_the_model_is_loaded_once_and_at_the_first_point(
    vector: SkillVector, tries: Any, monkeypatch: pytest.MonkeyPatch
):
    loads = []
    load = trial.load_target
    monkeypatch.setattr(trial, "load_target", lambda *given: loads.append(1) or load(*given))
    trials = tries(Called())
    assert trials.target_digest and not loads and trials.load_seconds is None
    for lam in (0.5, 1.0):
        trials.run(vector, lam)
    assert loads == [1]


def test_stochastic_rounding_and_selection_are_those_of_apply(
    world: World, vector: SkillVector, tries: Any, tmp_path: Path
):
    called = Called()
    options = {"rounding": "stochastic", "seed": 3, "exclude": ["*embed*"]}
    tries(called, **options).run(vector, 0.3)
    skillvec.apply(world.target, vector, tmp_path / "out", lam=0.3, **options)
    assert called.seen[0] == weights_in(tmp_path / "out")


def test_a_dtype_other_than_the_targets(world: World, vector: SkillVector, tries: Any):
    called = Called(lambda model: {"bits": model.dtype.itemsize})
    assert tries(called, dtype="float32").run(vector).scores["bits"].mean == 4


def test_random_numbers_begin_anew_at_each_point_and_go_on_outside(tries: Any):
    def draw(model: Any) -> dict[str, float]:
        return {
            "python": random.random(),
            "numpy": np.random.rand(),
            "torch": torch.rand(()).item(),
        }

    def outside() -> list[float]:
        return [*draw(None).values()]

    trials = tries(Called(draw), seed=7)
    trials.run(None)  # what loads
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = outside() + outside()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first, between, second = trials.run(None), outside(), trials.run(None)
    assert first.scores == second.scores != tries(Called(draw), seed=8).run(None).scores
    assert between + outside() == expected


def test_the_digest_of_a_target_is_of_its_content(world: World, tmp_path: Path):
    first = Trials(world.target, Called()).target_digest
    copied = shutil.copytree(world.target, tmp_path / "copied")
    assert Trials(copied, Called()).target_digest == first
    assert Trials(world.tuned, Called()).target_digest != first
    (copied / "tokenizer.json").write_text((copied / "tokenizer.json").read_text() + " ")
    assert Trials(copied, Called()).target_digest != first


def test_a_vector_that_does_not_fit_is_the_users_to_mend(
    world: World, vector: SkillVector, tries: Any, tmp_path: Path
):
    from families import save

    save(tmp_path / "a.safetensors", {"other.weight": torch.ones(4, 4)})
    save(tmp_path / "b.safetensors", {"other.weight": torch.zeros(4, 4)})
    other = SkillVector.between(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    called = Called()
    trials = tries(called)
    trials.run(vector)
    with pytest.raises(IncompatibleError):
        trials.run(other)
    assert trials.run(None).is_done and called.seen[-1] == weights_in(world.target)


@pytest.fixture(scope="module")
def huge(world: World) -> SkillVector:
    """Return a vector that overflows bf16 at lambda 10."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(world.target / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e38
    save_file(tensors, world.folder / "huge.safetensors")
    return SkillVector.between(world.folder / "huge.safetensors", world.target)


def test_a_lambda_that_overflows_is_a_failed_point(
    world: World, vector: SkillVector, huge: SkillVector, tries: Any
):
    called = Called()
    trials = tries(called)
    found = trials.run(huge, 10)
    assert found.status == FAILED and "finite" in found.message and not called.seen
    assert trials.run(vector).is_done and called.seen == [weights_in(world.tuned)]


# ---------------------------------------------------------------------- what an evaluation does


def raise_error(model: Any) -> None:
    raise RuntimeError("no room on the device")


def raise_lines(model: Any) -> None:
    raise GeneratorExit("one\n  two")


@pytest.mark.parametrize(
    ("act", "status", "message"),
    [
        (raise_error, FAILED, "RuntimeError: no room on the device"),
        (lambda model: sys.exit(2), FAILED, "SystemExit: 2"),
        (raise_lines, FAILED, "GeneratorExit: one two"),
        (
            lambda model: 0.5,
            FAILED,
            'expected metrics by name, such as {"accuracy": 0.5}, found 0.5',
        ),
        (lambda model: {"x": float("nan")}, NOT_A_NUMBER, "not finite: x"),
        (lambda model: {"x": [1.0, float("inf")]}, NOT_A_NUMBER, "not finite: x"),
    ],
)
def test_what_goes_wrong_marks_the_point_and_the_next_goes_on(
    world: World, vector: SkillVector, tries: Any, act: Any, status: str, message: str
):
    called = Called(act)
    trials = tries(called)
    found = trials.run(vector)
    assert (found.status, found.message, found.scores) == (status, message, {})
    assert found.changed and not found.is_done
    called.act = lambda model: {"x": 1}
    assert trials.run(None).is_done and called.seen[-1] == weights_in(world.target)


def test_what_is_a_number_beside_one_that_is_none_is_kept(tries: Any):
    found = tries(Called(lambda model: {"x": float("nan"), "y": 2})).run(None)
    assert found.status == NOT_A_NUMBER and {k: v.mean for k, v in found.scores.items()} == {"y": 2}


def test_an_interruption_by_the_user_is_no_outcome(world: World, vector: SkillVector, tries: Any):
    def stop(model: Any) -> None:
        raise KeyboardInterrupt

    called = Called(stop)
    trials = tries(called)
    with pytest.raises(KeyboardInterrupt):
        trials.run(vector)
    called.act = lambda model: {"x": 1}
    assert trials.run(None).is_done and called.seen[-1] == weights_in(world.target)


def write_a_value(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] += 1.0  # in no sample, but counted


def write_around_the_counter(model: Any) -> None:
    model.model.norm.weight.data.mul_(2.0)


def add_a_parameter(model: Any) -> None:
    model.extra = torch.nn.Parameter(torch.zeros(2))


def take_one_away(model: Any) -> None:
    del model.lm_head


def raise_after_a_write(model: Any) -> None:
    write_a_value(model)
    raise RuntimeError("late")


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (write_a_value, "model.embed_tokens.weight: other values"),
        (write_around_the_counter, "model.norm.weight: other values"),
        (lambda model: model.float(), "norm.weight: bfloat16 [16] on cpu before, float32 [16]"),
        (add_a_parameter, "extra: new"),
        (take_one_away, "lm_head.weight: gone"),
    ],
)
def test_an_evaluation_that_changes_the_model_is_marked_and_the_model_loaded_again(
    world: World, vector: SkillVector, tries: Any, act: Any, named: str
):
    called = Called(lambda model: {"x": 1, "y": act(model) is not None})
    trials = tries(called)
    found = trials.run(vector)
    assert (found.status, found.scores) == (CHANGED, {})
    assert named in found.message and "is loaded again" in found.message
    called.act = lambda model: {"x": 1}
    assert trials.run(None).is_done and called.seen[-1] == weights_in(world.target)


def test_a_failed_evaluation_that_changed_the_model_says_both(
    world: World, vector: SkillVector, tries: Any
):
    called = Called(raise_after_a_write)
    trials = tries(called)
    found = trials.run(vector)
    assert found.status == FAILED and found.message.startswith("RuntimeError: late; the evaluation")
    assert "embed_tokens.weight: other values" in found.message
    called.act = lambda model: {"x": 1}
    assert trials.run(vector).is_done and called.seen[-1] == weights_in(world.tuned)


def test_a_change_that_no_sample_shows_is_found_at_the_next_point(
    world: World, vector: SkillVector, tries: Any
):
    def act(model: Any) -> dict[str, int]:
        model.model.embed_tokens.weight.data[7, 3] += 1.0
        return {"x": 1}

    called = Called(act)
    trials = tries(called)
    assert trials.run(vector).is_done  # a few values of each tensor are looked at, not all
    for one, source in ((vector, world.tuned), (None, world.target)):
        assert trials.run(one).is_done
        if one is not None:
            assert called.seen[-1] == weights_in(source)


def test_modes_and_settings_are_put_back(vector: SkillVector, tries: Any):
    def act(model: Any) -> dict[str, Any]:
        seen = {
            "training": model.training or model.model.layers[0].training,
            "cache": model.config.use_cache,
            "own": model.generation_config is kept,
            "penalty": model.generation_config.repetition_penalty or 0,
        }
        model.train()
        model.config.use_cache = False
        model.config.invented = 3
        model.generation_config.repetition_penalty = 2.0
        model.generation_config = type(model.generation_config)()
        return seen

    called = Called(act)
    trials = tries(called)
    kept = trials._loaded().generation_config
    before, after = trials.run(vector), trials.run(vector)
    assert before.status == after.status == DONE
    assert before.scores == after.scores
    assert (after.scores["cache"].mean, after.scores["own"].mean) == (1, 1)
    called.act = lambda model: {"invented": hasattr(model.config, "invented")}
    assert trials.run(None).scores["invented"].mean == 0


def patch(model: Any) -> None:
    """Change all of a module that is no weight."""
    norm = model.model.norm
    norm.forward = lambda *given: given[0] * 0
    norm.variance_epsilon = 3.0
    norm.names.append("b")
    norm.table.mul_(2)
    norm.register_forward_hook(lambda *given: None)
    norm.register_buffer("more", torch.ones(1), persistent=False)
    norm.weight.grad = torch.ones_like(norm.weight)
    norm.weight.requires_grad_(False)
    del norm.left
    model.model.layers[0].mlp.act_fn = torch.nn.Identity()
    for buffer in model.buffers():
        buffer.mul_(3)


def state_of_modules(model: Any) -> list[Any]:
    norm = model.model.norm
    buffers = [buffer.tolist() for buffer in model.buffers()]
    own = {name: str(value) for name, value in vars(norm).items()}
    act = type(model.model.layers[0].mlp.act_fn)
    return [own, norm.weight.grad, norm.weight.requires_grad, buffers, act]


def test_what_modules_hold_beside_weights_is_put_back(vector: SkillVector, tries: Any):
    def prepare(model: Any) -> None:
        vars(model.model.norm).update(names=["a"], left=1, table=torch.ones(2))

    states = []
    trials = tries(Called(lambda model: states.append(state_of_modules(model)) or {"x": 1}))
    prepare(trials._loaded())
    called = trials._evaluator
    look, called.act = called.act, lambda model: look(model) and (patch(model), {"x": 1})[1]
    assert [trials.run(vector).status for _ in range(2)] == [DONE, DONE]
    called.act = look
    assert trials.run(vector).is_done and states[0] == states[1] == states[2]


def change_surroundings(folder: Path) -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    os.chdir(folder)
    os.environ["SKILLVEC_TEST_LEFT"] = "1"
    del os.environ["SKILLVEC_TEST_KEPT"]


def test_what_a_process_has_one_of_is_put_back(
    tries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def state() -> list[Any]:
        from torch.nn.modules import module

        hooks = dict(module._global_forward_hooks)
        numbers = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
        return [numbers, hooks, os.getcwd(), dict(os.environ)]

    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("SKILLVEC_TEST_KEPT", "1")
    trials = tries(Called(lambda model: change_surroundings(tmp_path) or {"x": 1}))
    before = state()
    try:
        assert trials.run(None).is_done and state() == before
    finally:
        torch.set_grad_enabled(True), torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        torch.nn.modules.module._global_forward_hooks.clear()


def test_a_tokenizer_is_put_back(tries: Any, monkeypatch: pytest.MonkeyPatch):
    trials, seen = tries(Called()), []

    def evaluate(model: Any, tokenizer: Any, split: str) -> Scores:
        seen.append((len(tokenizer), tokenizer.padding_side, tokenizer.sep_token))
        tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
        tokenizer.sep_token = tokenizer.eos_token
        if len(seen) == 2:
            tokenizer.add_tokens(["entirely-new"])
        return read_scores({"x": 1})

    monkeypatch.setattr(trials._evaluator, "evaluate", evaluate)
    assert all(trials.run(None).is_done for _ in range(3))
    assert seen[0] == seen[1] == seen[2]


def test_a_child_process_that_comes_out_of_an_evaluator_ends(tries: Any):
    def fork(model: Any) -> dict[str, int]:
        child = os.fork()
        return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0}

    here, trials = os.getpid(), tries(Called(fork))
    trials._loaded()
    found = trials.run(None)
    if os.getpid() != here:
        os._exit(3)  # it has come as far as this
    assert found.scores["code"].mean == 0


# ------------------------------------------------------------------------------------- time


def sleep(seconds: float) -> dict[str, float]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)
    return {"x": 1.0}


def sleep_and_catch(model: Any) -> dict[str, float]:
    try:
        return sleep(30)
    except BaseException:
        return {"x": 1.0}


@pytest.mark.parametrize("act", [lambda model: sleep(30), sleep_and_catch])
def test_an_evaluation_without_end_is_ended(
    world: World, vector: SkillVector, tries: Any, act: Any
):
    called = Called(act)
    trials = tries(called, timeout=0.2)
    trials._loaded()
    found = trials.run(vector)
    assert (found.status, found.scores) == (TIMED_OUT, {})
    assert found.message == "the evaluation took longer than 0.2 s" and found.seconds < 20
    called.act = lambda model: {"x": 1}
    assert trials.run(None).is_done and called.seen[-1] == weights_in(world.target)


def test_an_evaluation_that_catches_what_ends_it_is_ended_later(
    tries: Any, monkeypatch: pytest.MonkeyPatch
):
    came_through = []

    def swallow(model: Any) -> dict[str, int]:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                while time.monotonic() < until:
                    time.sleep(1)
            except BaseException:
                pass
        came_through.append(True)
        return {"x": 1}

    monkeypatch.setattr(trial, "AGAIN_SECONDS", 0.1)
    trials = tries(Called(swallow), timeout=0.1)
    trials._loaded()
    assert trials.run(None).status == TIMED_OUT and not came_through
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_timeout_needs_seconds_and_the_main_thread(tries: Any):
    with pytest.raises(UsageError, match="timeout 0: expected seconds, more than 0"):
        tries(Called(), timeout=0)
    trials, found = tries(Called(), timeout=5), []

    def run() -> None:
        try:
            trials.run(None)
        except UsageError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["a timeout needs the main thread, which alone gets the signal of it"]


# ----------------------------------------------------------------------- before the model loads


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "load_target", lambda *given: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("no_load")
def test_a_target_that_cannot_work_is_refused_before_it_is_loaded(world: World, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((world.target / name).read_bytes())
    with pytest.raises(UsageError, match=r"bare: no tokenizer that transformers reads"):
        Trials(bare, Called())
    (bare / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config.json in .*bare"):
        Trials(bare, Called())
    with pytest.raises(UsageError, match="no such file or folder"):
        Trials(tmp_path / "nowhere", Called())
    with pytest.raises(UsageError, match="a model is loaded from a folder: download it first"):
        Trials("s3://bucket/model", Called())
    with pytest.raises(UsageError, match="name the one that it lies in"):
        Trials(world.target / "model.safetensors", Called())
    with pytest.raises(UsageError, match="dtype int8: expected auto, bfloat16"):
        Trials(world.target, Called(), dtype="int8")
    with pytest.raises(UsageError, match="device 'cuda:99': torch finds"):
        Trials(world.target, Called(), device="cuda:99")
    with pytest.raises(UsageError, match="'dev'"):
        Trials(world.target, Called()).run(None, split="dev")


def test_a_function_may_do_without_a_tokenizer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((world.target / name).read_bytes())
    (tmp_path / "needs_no_words.py").write_text(
        "def count(model, tokenizer):\n    return {'words': tokenizer is not None}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with Trials(bare, open_evaluator("needs_no_words:count"), device="cpu") as trials:
        assert trials.run(None).scores["words"].mean == 0


def test_a_config_that_transformers_does_not_know_is_named(world: World, tmp_path: Path):
    odd = shutil.copytree(world.target, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"odd: transformers does not load it: .*odd"):
        loading.load_target(loading.open_target(str(odd)), device="cpu")


def test_parameters_that_would_be_drawn_at_random_are_refused(world: World, tmp_path: Path):
    part = shutil.copytree(world.target, tmp_path / "part")
    tensors = load(part)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, part / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(IncompatibleError, match=rf"lacks parameters(.|\n)*{name}"):
        loading.load_target(loading.open_target(str(part)), device="cpu")


def test_the_class_is_the_one_that_the_config_names(world: World, tmp_path: Path):
    part = shutil.copytree(world.target, tmp_path / "part")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    model = loading.load_target(loading.open_target(str(part)), device="cpu")
    assert type(model).__name__ == "LlamaModel" and not model.training


# ------------------------------------------------------------------------------------ folders


def folder_evaluator(words: str = "pass") -> Any:
    text = (
        "import json, os, sys; m = sys.argv[1]; size = os.path.getsize(m + '/model.safetensors');"
        f"{words}; print(json.dumps({{'size': size, 'merged': m.endswith('merged')}}))"
    )
    return open_evaluator(f'command: {sys.executable} -c "{text}" {{model}}')


def test_a_folder_is_written_for_each_point_and_removed(
    world: World, vector: SkillVector, tmp_path: Path
):
    with Trials(world.target, folder_evaluator(), scratch=tmp_path) as trials:
        found, alone = trials.run(vector, 0.5), trials.run(None)
    assert found.is_done and alone.is_done
    assert (found.scores["merged"].mean, alone.scores["merged"].mean) == (1, 0)
    assert found.changed and found.gain and found.attach_seconds > 0 and alone.gain is None
    assert [*tmp_path.iterdir()] == [] and trials.load_seconds is None


@pytest.mark.parametrize(
    ("words", "timeout", "status"),
    [("sys.exit(3)", None, FAILED), ("import time; time.sleep(30)", 1.0, TIMED_OUT)],
)
def test_a_folder_is_removed_after_an_error(
    world: World, huge: SkillVector, tmp_path: Path, words: str, timeout: Any, status: str
):
    with Trials(world.target, folder_evaluator(words), scratch=tmp_path, timeout=timeout) as trials:
        assert trials.run(huge, 0.5).status == status
        assert [*tmp_path.iterdir()] == []
        assert trials.run(huge, 10).status == FAILED  # it overflows while it is written
    assert [*tmp_path.iterdir()] == []


def test_the_merged_folder_is_what_apply_writes(world: World, vector: SkillVector, tmp_path: Path):
    (tmp_path / "scratch").mkdir()
    copying = f"import shutil; shutil.copytree(m, '{tmp_path}/kept')"
    options = {"rounding": "stochastic", "seed": 3, "exclude": ["*norm*"]}
    evaluator = folder_evaluator(copying)
    with Trials(world.target, evaluator, scratch=tmp_path / "scratch", **options) as trials:
        assert trials.run(vector, 0.5).is_done
    skillvec.apply(world.target, vector, tmp_path / "out", lam=0.5, **options)
    assert weights_in(tmp_path / "kept") == weights_in(tmp_path / "out")
    with Trials(world.target, evaluator, scratch=tmp_path / "scratch", dtype="float32") as trials:
        shutil.rmtree(tmp_path / "kept")
        assert trials.run(vector, 0.5).is_done
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "float32"


def test_scratch_without_room_or_there_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        Trials(world.target, folder_evaluator(), scratch=tmp_path / "nowhere")
    monkeypatch.setattr(trial, "free_nbytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="bytes does not fit: 1,000 are free there"):
        Trials(world.target, folder_evaluator(), scratch=tmp_path)


def test_what_a_killed_run_left_in_scratch_is_removed(world: World, tmp_path: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    start = f"{trial.SCRATCH}-{socket.gethostname()}"
    names = [f"{start}-{ended.pid}-abc", f"{start}-{os.getpid()}-abc",
             f"{trial.SCRATCH}-elsewhere-{ended.pid}-abc", "other"]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    Trials(world.target, folder_evaluator(), scratch=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:]}


def test_an_outcome_without_scores_has_the_contracts_defaults():
    assert Outcome(DONE) == Outcome(DONE, "", {}, 0.0, None, None, None, 0.0)
    assert ALL == "all"
