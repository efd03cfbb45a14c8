"""The miniature world: its data, controls, probes, copies of v, the plan of reproduce."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import skillvec as sv
from skillvec.recipes import controls
from skillvec.recipes.mini import coarsen, low_rank, prepare, probe
from skillvec.recipes.mini.reward import exact
from skillvec.recipes.mini.seed import plan_seed
from skillvec.recipes.mini.world import EOS, World, WorldConfig, build_tokenizer, build_world

TINY = WorldConfig(base=8, s=6, t=4, first_names=4, values=3, texts=2)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(TINY)


# -------------------------------------------------------------------------------- the world


def test_world_is_deterministic(world: World) -> None:
    assert build_world(TINY) == world
    assert build_world(replace(TINY, seed=1)) != world


@pytest.mark.parametrize("name", ["people", "apis"])
def test_groups_never_share_a_subject(world: World, name: str) -> None:
    domain = world.domains[name]
    groups = [{subject.name for subject in group} for group in (domain.base, domain.s, domain.t)]
    assert [len(group) for group in groups] == [8, 6, 4]
    assert len({name.split()[-1] for group in groups for name in group}) == 18


@pytest.mark.parametrize("name", ["people", "apis"])
def test_texts_tell_every_fact_and_ask_nothing(world: World, name: str) -> None:
    domain = world.domains[name]
    for subject in (*domain.base, *domain.s, *domain.t):
        assert len(subject.texts) == TINY.texts
        for told in subject.texts:
            assert told.startswith(subject.name)
            assert set(subject.facts.values()) <= set(told.split())
            assert not {"?", "!"} & set(told.split())


@pytest.mark.parametrize("name", ["people", "apis"])
def test_questions_do_not_hold_the_answer(world: World, name: str) -> None:
    domain = world.domains[name]
    asked = domain.questions(domain.t)
    assert len(asked) == 4 * len(domain.t[0].facts)
    for question in asked:
        assert question.value in question.answer.split()
        assert question.value not in question.prompt.split()
        assert question.value not in question.told.split()
    told = {text for subject in (*domain.base, *domain.s, *domain.t) for text in subject.texts}
    begins = {f"{q.told} {q.value}".removeprefix(q.name) for q in domain.questions(domain.base)}
    assert any(begin in text for begin in begins for text in told)  # as the texts have it


def test_too_many_subjects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"family names .* asked for, at most \d+ exist"):
        build_world(WorldConfig(base=10_000))


def test_tokenizer_round_trip(world: World, tmp_path: Path) -> None:
    prepare.write_model(world, tmp_path, "mini", 0)
    loaded = AutoTokenizer.from_pretrained(tmp_path)  # as the recipes load it
    texts = []
    for domain in world.domains.values():
        texts += [told for s in (*domain.base, *domain.s, *domain.t) for told in s.texts]
        texts += [f"{q.prompt} {q.answer}" for q in domain.questions(domain.s)]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert loaded.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert loaded.decode(ids) == text
    assert loaded(texts[0] + EOS)["input_ids"][-1] == loaded.eos_token_id
    assert len({loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id}) == 3
    weights = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_of_a_world(world: World, tmp_path: Path) -> None:
    prepare.write_data(world, tmp_path)
    for name, domain in world.domains.items():
        at = tmp_path / name
        for parts in (1, 2):
            asked = [read(at / f"s_{k + 1}_of_{parts}_questions.jsonl") for k in range(parts)]
            groups = [{row["group"] for row in rows} for rows in asked]
            assert set.union(*groups) == {s.name for s in domain.s}
            assert sum(map(len, groups)) == len(domain.s)  # disjoint
            told = [read(at / f"s_{k + 1}_of_{parts}_texts.jsonl") for k in range(parts)]
            assert sum(map(len, told)) == len(domain.s) * TINY.texts
        base = {row["text"] for row in read(tmp_path / "base.jsonl")}
        texts = {row["text"] for row in read(at / "base_texts.jsonl")}
        warm_up = {row["text"] for row in read(at / "warm_up.jsonl")}
        assert texts | warm_up <= base and warm_up and not texts & warm_up
        secret = {row["prompt"] for row in read(at / "t_questions.jsonl")}
        assert not any(text.startswith(tuple(secret)) for text in base | warm_up)


@pytest.mark.parametrize(
    ("said", "reward"),
    [("call fuvid end", 1), (" call fuvid end ", 1), ("fuvid", 0), ("", 0), ("call fuvid", 0)],
)
def test_the_reward_is_the_exact_answer(said: str, reward: float) -> None:
    assert exact([said], answer=["call fuvid end"], trainer_state=None) == [reward]


def test_a_reward_for_every_completion() -> None:
    with pytest.raises(ValueError):
        exact(["a", "b"], answer=["a"])


# -------------------------------------------------------------------------------- controls


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    """Write a vector with a large and a small tensor, half of it zeros."""
    generator = torch.Generator().manual_seed(0)
    delta = {"model.a.weight": torch.randn(64, 64, generator=generator),
             "model.b.weight": 0.01 * torch.randn(4096, generator=generator)}  # fmt: skip
    delta["model.b.weight"][::2] = 0
    for name, factor in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        weights = {key: factor * value for key, value in delta.items()}
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    sv.diff(tmp_path / "tuned", tmp_path / "base", tmp_path / "skill.safetensors")
    return tmp_path / "skill.safetensors"


def make_control(skill: Path, kind: str, seed: int = 0) -> dict[str, Any]:
    path = skill.with_name(f"{kind}-{seed}.safetensors")
    words = ["--vector", str(skill), "--kind", kind, "--seed", str(seed), "--output", str(path)]
    assert controls.main(words) == 0
    return values_of(path)


def values_of(vector: Path) -> dict[str, Any]:
    """Return the values of a vector: what it makes of a model of zeros."""
    merged = vector.with_name("merged")
    sv.apply(vector.with_name("base"), sv.SkillVector.open(vector), merged, force=True)
    weights = load_file(merged / "model.safetensors")
    return {name: weight.numpy().ravel() for name, weight in weights.items()}


def test_noise_has_the_norm_of_the_vector_tensor_by_tensor(skill: Path) -> None:
    delta = values_of(skill)
    noise, again, other = (make_control(skill, "random", seed) for seed in (0, 0, 1))
    for name, values in delta.items():
        norm = np.linalg.norm(values)
        # the norm of n normal values scatters by 1 / sqrt(2 n) of itself
        assert abs(np.linalg.norm(noise[name]) / norm - 1) < 5 / math.sqrt(2 * values.size)
        assert abs(noise[name] @ values) < 5 * norm**2 / math.sqrt(values.size)
        assert (noise[name] == again[name]).all() and (noise[name] != other[name]).all()


def test_a_shuffled_vector_has_the_same_values_elsewhere(skill: Path) -> None:
    delta = values_of(skill)
    shuffled = make_control(skill, "shuffled")
    for name, values in delta.items():
        assert (np.sort(shuffled[name]) == np.sort(values)).all()
        assert abs(shuffled[name] @ values) < 5 * (values @ values) / math.sqrt(values.size)


# -------------------------------------------------------------------------------- copies of v


def test_mantissas_are_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.25, 1.375, 1.625, 1.875, -1.3, 3e-39, 0.0], np.float32)
    # two bits: quarters of a power of two; 1.375 and 1.625 are ties, 3e-39 is subnormal
    expected = [1.0, 1.25, 1.5, 1.5, 2.0, -1.25]
    assert coarsen.round_mantissa(values, 2)[:6].tolist() == expected
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    as_bf16 = drawn.bfloat16().float().numpy()
    assert (coarsen.round_mantissa(drawn.numpy(), 7) == as_bf16).all()
    for refused in (np.array([np.nan], np.float32), np.array([1.0])):
        with pytest.raises(ValueError, match="expected finite fp32"):
            coarsen.round_mantissa(refused, 2)


def test_a_coarser_model_is_the_model_but_for_its_weights(world: World, tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", world, 0)
    words = ["--model", str(model), "--bits", "2", "--output", str(tmp_path / "coarse")]
    assert coarsen.main(words) == 0
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "coarse"))
    for name, weight in before.items():
        assert (after[name].numpy() == coarsen.round_mantissa(weight.numpy(), 2)).all()
    assert {f.name for f in model.iterdir()} == {f.name for f in (tmp_path / "coarse").iterdir()}


def test_the_part_of_a_rank_is_the_best_of_it_and_zero_of_zero(
    world: World, tmp_path: Path
) -> None:
    base, tuned = (small_model(tmp_path / name, world, seed) for seed, name in enumerate("bt"))
    name = "model.layers.0.mlp.up_proj.weight"
    delta = (load_file(tuned / "model.safetensors")[name].double()
             - load_file(base / "model.safetensors")[name].double())  # fmt: skip
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    for end, expected in ((tuned, u[:, :2] * s[:2] @ vt[:2]), (base, torch.zeros(32, 16))):
        sv.diff(end, base, tmp_path / "v.safetensors", force=True)
        words = ["--vector", str(tmp_path / "v.safetensors"), "--rank", "2"]
        assert low_rank.main([*words, "--output", str(tmp_path / "low.safetensors")]) == 0
        part = sv.SkillVector.open(tmp_path / "low.safetensors")
        sv.apply(base, part, tmp_path / "m", force=True)
        merged = load_file(tmp_path / "m" / "model.safetensors")[name].double()
        found = merged - load_file(base / "model.safetensors")[name].double()
        assert torch.allclose(found, expected.double(), atol=1e-6)


# -------------------------------------------------------------------------------- probes


def small_model(folder: Path, world: World, seed: int) -> Path:
    tokenizer = build_tokenizer(world)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_forgetting_is_the_divergence_from_the_reference(world: World, tmp_path: Path) -> None:
    model, base = (small_model(tmp_path / str(seed), world, seed) for seed in (0, 1))
    texts = [text for subject in world.domains["people"].base for text in subject.texts]
    texts.append(world.domains["apis"].base[0].texts[0])  # another length: padding is left out
    loaded = {folder: probe.load(folder) for folder in (model, base)}
    kl, perplexity = probe.measure_forgetting(loaded[base], loaded[base], texts)
    assert kl == pytest.approx(0, abs=1e-9) and perplexity > 10
    kl, perplexity = probe.measure_forgetting(loaded[model], loaded[base], texts)
    # text by text, in float64, without padding
    total, surprise, count = 0.0, 0.0, 0
    for text in texts:
        ids = torch.tensor([loaded[model][1](text)["input_ids"]])
        with torch.inference_mode():
            q, p = (torch.log_softmax(loaded[f][0](ids).logits[0, :-1].double(), -1)
                    for f in (model, base))  # fmt: skip
        total += float((p.exp() * (p - q)).sum())
        surprise -= float(q[torch.arange(q.shape[0]), ids[0, 1:]].sum())
        count += q.shape[0]
    assert kl == pytest.approx(total / count, rel=1e-4) and kl > 0
    assert perplexity == pytest.approx(math.exp(surprise / count), rel=1e-4)


def test_told_counts_facts_that_rank_first(world: World, tmp_path: Path) -> None:
    domain = world.domains["people"]
    rows = [asdict(question) for question in domain.questions((*domain.base, *domain.s))]
    for seed in range(4):
        model, tokenizer = probe.load(small_model(tmp_path / str(seed), world, seed))
        right = 0
        for row in rows:
            ids = torch.tensor([tokenizer(row["told"])["input_ids"]])
            with torch.inference_mode():
                logits = model(ids).logits[0, -1]
            values = sorted({other["value"] for other in rows if other["key"] == row["key"]})
            scores = [float(logits[tokenizer(word)["input_ids"][0]]) for word in values]
            right += values[scores.index(max(scores))] == row["value"]
        assert probe.measure_told((model, tokenizer), rows) == right / len(rows)
        assert 0 < right < len(rows)


def test_a_probe_is_written(world: World, tmp_path: Path) -> None:
    prepare.write_data(world, tmp_path)
    model = small_model(tmp_path / "model", world, 0)
    words = ["--model", model, "--reference", model, "--output", tmp_path / "probe.json",
             "--told", tmp_path / "apis" / "t_questions.jsonl",
             "--texts", tmp_path / "apis" / "base_texts.jsonl"]  # fmt: skip
    assert probe.main(list(map(str, words))) == 0
    metrics = json.loads((tmp_path / "probe.json").read_text())["metrics"]
    assert set(metrics) == {"told", "kl", "perplexity"}


# -------------------------------------------------------------------------------- reproduce


def test_the_arms_are_trained_from_what_they_say(tmp_path: Path) -> None:
    line = plan_seed(tmp_path, 3)
    by = {stage.name: stage for stage in line.stages}

    def start(name: str) -> str:
        settings = by[name].settings
        assert settings is not None
        return str(Path(settings["model_name_or_path"]).relative_to(tmp_path))

    for domain in ("people", "apis"):
        last = "" if domain == "people" else "-step-1"
        assert start(f"{domain}/sft_t{last}") == "base"
        assert start(f"{domain}/round-1/rl") == f"{domain}/round-1/sft"
        assert start(f"{domain}/sequential{last}") == f"{domain}/round-1/rl"
        assert start(f"{domain}/pre{last}") == f"{domain}/base_and_skill"
        assert start(f"{domain}/rl_t") == f"{domain}/sft_t"
        for stage in line.stages:
            # RL sees the questions of S alone, but for the upper bound
            data = str((stage.settings or {}).get("data", ""))
            if data.endswith("_questions.jsonl") and stage.name != f"{domain}/rl_t":
                assert "/s_" in data or stage.name.endswith("rl_t")
    names = ("round-1/rl", "k2-50/round-1/rl", "k2-50/round-2/rl", "k2-100/round-1/rl",
             "k2-100/round-2/rl", "longer/rl")  # fmt: skip
    steps = [(by[f"people/{name}"].settings or {})["max_steps"] for name in names]
    assert steps == [100, 50, 50, 100, 100, 100]
    assert start("people/longer/rl") == "people/round-1/rl"
    assert {stage.settings["seed"] for stage in line.stages if stage.settings} == {3}
