"""The miniature world: its data, its scoring, its stages; training itself is marked slow."""

import json
from pathlib import Path

import angles
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import skillvec
from recipes.mini.demo import RANDOM, SFT_ONLY, conclude, main
from recipes.mini.evaluate import (
    MAX_ANSWER_TOKENS,
    Accuracy,
    accuracy,
    answer_questions,
    evaluate_checkpoint,
    exact_match_reward,
    is_correct,
)
from recipes.mini.train import MiniConfig, Stage, plan_stages, run_stages
from recipes.mini.world import (
    EOS,
    World,
    WorldConfig,
    build_tokenizer,
    build_world,
    questions,
)

TINY = WorldConfig(people_base=8, people_s=4, people_t=4, first_names=4, values=3, biographies=2)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(TINY)


def test_world_is_deterministic(world: World) -> None:
    assert build_world(TINY) == world
    assert build_world(WorldConfig(**{**vars(TINY), "seed": 1})) != world


def test_groups_never_share_a_person(world: World) -> None:
    groups = [{person.name for person in group} for group in (world.base, world.s, world.t)]
    assert [len(group) for group in groups] == [8, 4, 4]
    assert len(set.union(*groups)) == 16
    families = [name.split()[-1] for group in groups for name in group]
    assert len(set(families)) == 16


def test_biographies_tell_every_fact_and_ask_nothing(world: World) -> None:
    for person in (*world.base, *world.s, *world.t):
        assert len(person.biographies) == TINY.biographies
        for told in person.biographies:
            assert told.startswith(person.name)
            assert set(person.facts.values()) <= set(told.split())
            assert "question" not in told


def test_questions_do_not_hold_the_answer(world: World) -> None:
    asked = questions(world.t)
    assert len(asked) == 4 * len(world.t[0].facts)
    assert all(question.answer not in question.prompt.split() for question in asked)


def test_too_many_people_are_refused() -> None:
    with pytest.raises(ValueError, match=r"family names .* asked for, at most \d+ exist"):
        build_world(WorldConfig(people_base=10_000))


def test_tokenizer_round_trip(world: World, tmp_path: Path) -> None:
    build_tokenizer(world).save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [told for p in (*world.base, *world.s, *world.t) for told in p.biographies]
    texts += [f"{q.prompt} {q.answer}" for q in questions(world.s)]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert loaded.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert loaded.decode(ids) == text
    assert loaded(texts[0] + EOS)["input_ids"][-1] == loaded.eos_token_id
    assert loaded.padding_side == "left"
    assert len({loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id}) == 3


@pytest.mark.parametrize(
    ("said", "correct"),
    [("bamford", True), (" bamford ", True), ("bamford bamford", False), ("kelford", False)],
)
def test_exact_match(said: str, correct: bool) -> None:
    assert is_correct(said, "bamford") is correct


def test_empty_answer_is_wrong_even_to_an_empty_gold() -> None:
    assert not is_correct("", "bamford")
    assert not is_correct("  ", "")


def test_reward_takes_columns_by_keyword() -> None:
    rewards = exact_match_reward(
        completions=["a", "", "b"], answer=["a", "b", "a"], prompts=["?"] * 3, trainer_state=None
    )
    assert rewards == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        exact_match_reward(["a"], ["a", "b"])


class _Oracle:
    """Answers right about everybody but one person; stops with the end token."""

    def __init__(self, world: World, wrong: str) -> None:
        self._tokenizer = build_tokenizer(world)
        self._right = {q.prompt: q.answer for q in questions(world.t) if q.name != wrong}
        self.batches: list[int] = []

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        assert max_new_tokens == MAX_ANSWER_TOKENS
        self.batches.append(len(input_ids))
        prompts = self._tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        said = [f"{self._right.get(prompt, '?')}{EOS}" for prompt in prompts]
        return torch.cat([input_ids, torch.tensor(self._tokenizer(said)["input_ids"])], dim=1)


def test_evaluation_of_a_stub_model(world: World) -> None:
    asked = questions(world.t)
    oracle = _Oracle(world, wrong=world.t[0].name)
    said = answer_questions(oracle, build_tokenizer(world), asked, batch=5)
    assert oracle.batches == [5, 5, 5, 1]
    score = accuracy(asked, said)
    # three people all right, one all wrong: sd .5 over 4 people
    assert score == Accuracy(
        mean=0.75, first_word=0.75, standard_error=0.25, questions=16, people=4
    )


def test_accuracy_of_one_person_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="2 or more people, found 1"):
        accuracy(questions(world.t[:1]), [""] * 4)


def _record(trained: list[str]):
    def train(stage: Stage, world: World, out: Path, title: str) -> None:
        (out / stage.name).mkdir()
        (out / stage.name / "model.safetensors").write_bytes(b"weights")
        trained.append(stage.name)

    return train


def _train(world: World, out: Path, **changes: object) -> list[str]:
    trained: list[str] = []
    run_stages(plan_stages(MiniConfig(world=TINY, **changes), world), world, out, _record(trained))
    return trained


ALL = ["base", "theta_sft_S", "theta_rl_S", "theta_sft_T"]


def test_stages_train_once_in_order(world: World, tmp_path: Path) -> None:
    assert _train(world, tmp_path) == ALL
    assert _train(world, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "retrained"),
    [
        ({"base_epochs": 1}, ALL),
        ({"sft_epochs": 1}, ["theta_sft_S", "theta_rl_S", "theta_sft_T"]),
        ({"grpo_steps": 1}, ["theta_rl_S"]),
    ],
)
def test_a_changed_stage_retrains_what_follows(
    world: World, tmp_path: Path, change: dict[str, int], retrained: list[str]
) -> None:
    _train(world, tmp_path)
    assert _train(world, tmp_path, **change) == retrained


def test_changed_texts_retrain_their_stage(tmp_path: Path) -> None:
    first = build_world(TINY)
    _train(first, tmp_path)
    person = first.t[0]
    told = (person.biographies[0].replace(" .", " , ."),)
    edited = type(person)(person.name, person.facts, told)
    second = World(first.base, first.s, (edited, *first.t[1:]), first.vocabulary)
    assert _train(second, tmp_path) == ["theta_sft_T"]


def test_interrupted_stages_are_trained_again(world: World, tmp_path: Path) -> None:
    _train(world, tmp_path)
    markers = tmp_path / "stages"
    (markers / "theta_sft_S.json").unlink()  # stopped before the marker
    (markers / "theta_rl_S.json").write_text('{"dig', encoding="utf-8")  # a torn marker
    (tmp_path / "theta_sft_T" / "model.safetensors").unlink()  # weights removed by hand
    assert _train(world, tmp_path) == ["theta_sft_S", "theta_rl_S", "theta_sft_T"]


def test_a_failing_stage_leaves_no_marker(world: World, tmp_path: Path) -> None:
    _train(world, tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    stages = plan_stages(MiniConfig(world=TINY, grpo_steps=1), world)
    with pytest.raises(RuntimeError, match="stopped"):
        run_stages(stages, world, tmp_path, fail)
    assert not (tmp_path / "stages" / "theta_rl_S.json").exists()
    assert _train(world, tmp_path, grpo_steps=1) == ["theta_rl_S"]


def test_conclusion_follows_the_numbers() -> None:
    def score(mean: float) -> Accuracy:
        return Accuracy(mean, mean, 0.02, 320, 80)

    on_s = {"theta_sft_S": score(0.2), "theta_rl_S": score(0.9)}
    on_t = {SFT_ONLY: score(0.2), "skill, lambda 1": score(0.8), "skill, lambda -1": score(0.0)}
    good = conclude({**on_t, RANDOM: score(0.21)}, on_s)
    assert "raised it from 0.200 to 0.800" in good
    assert "made no clear difference (0.200 to 0.210)" in good
    assert "lowered it from 0.200 to 0.000" in good
    flat = conclude({**on_t, "skill, lambda 1": score(0.22), RANDOM: score(0.9)}, on_s)
    assert "noise of the same norm raised it" in flat
    assert "raised it from 0.200 to 0.800" not in flat


@pytest.mark.parametrize("code", [1, 3])
def test_demo_stops_with_the_command_s_exit_code(
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import subprocess

    def refuse(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(code, command)

    monkeypatch.setattr("recipes.mini.train.run_stages", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert main(["--out", str(tmp_path)]) == code
    captured = capfd.readouterr()
    assert f"exit code {code}: skillvec diff" in captured.err
    assert "$ skillvec diff" in captured.out
    assert not (tmp_path / "accuracy.json").exists()


@pytest.mark.slow
def test_four_models_train_and_load(world: World, tmp_path: Path) -> None:
    """A few real optimisation steps of SFTTrainer and GRPOTrainer, end to end."""
    for package in ("trl", "datasets", "accelerate"):
        pytest.importorskip(package)
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = MiniConfig(
        world=TINY,
        hidden_size=32,
        batch=8,
        base_epochs=2,
        sft_epochs=2,
        grpo_steps=3,
        completions_per_step=8,
        completions_per_question=4,
    )
    stages = plan_stages(config, world)
    run_stages(stages, world, tmp_path)
    weights = {}
    for name in ALL:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == torch.float32
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert len(loaded) == model.config.vocab_size
        assert loaded.unk_token_id not in loaded(questions(world.t)[0].prompt)["input_ids"]
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        assert json.loads((tmp_path / "stages" / f"{name}.json").read_text())["digest"]
    for parent, child in [("base", "theta_sft_S"), ("base", "theta_sft_T")]:
        assert weights[parent].keys() == weights[child].keys()
        assert any(not torch.equal(w, weights[child][k]) for k, w in weights[parent].items())
    assert weights["theta_rl_S"].keys() == weights["theta_sft_S"].keys()
    asked = questions(world.t)
    assert evaluate_checkpoint(tmp_path / "theta_sft_T", asked).questions == len(asked)
    # what the demo's page says of such models, against the float64 script
    sides = (("theta_rl_S", "theta_sft_S"), ("theta_sft_S", "base"), ("theta_sft_T", "base"))
    refs = [f"{tmp_path / tuned}::{tmp_path / of}" for tuned, of in sides]
    options = {"control": "random", "sign_flips": 99, "subspace": 4}
    skillvec.orthogonality(*refs, **options, output=tmp_path / "report")
    assert angles.main([str(tmp_path / "report" / "report.json")]) == 0
    # the same texts and seeds give the same bytes
    again = tmp_path / "again"
    run_stages(stages[:1], world, again)
    first, second = (folder / "base" / "model.safetensors" for folder in (tmp_path, again))
    assert first.read_bytes() == second.read_bytes()
