# %% [markdown]
# # Choose lambda: a sweep with a function of yours
#
# How much of a vector should be added? `sweep` loads the target once, attaches `lam * v` to it
# in memory for each lambda, and asks your function what it thinks of the model. A control,
# noise of the vector's size, tells whether any change of that size would do the same.
#
# The models are tiny Llamas. The "skill" is counting: after token n comes token n + 1.

# %%
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skillvec as sv

WORK = Path(mkdtemp(prefix="skillvec-"))
CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip


def count_up(seed: int, rows: int, length: int = 8) -> torch.Tensor:
    """Return rows of numbers that count up from a random start."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(CONFIG.vocab_size, (rows, 1), generator=draw)
    return (starts + torch.arange(length)) % CONFIG.vocab_size


def train(model: LlamaForCausalLM, steps: int, skill: bool, seed: int) -> LlamaForCausalLM:
    """Return the model after some steps on counting, or on noise."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(steps):
        noise = torch.randint(CONFIG.vocab_size, (32, 8), generator=draw)
        text = count_up(1000 * seed + step, 32) if skill else noise
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# %% [markdown]
# ## YOUR MODELS
# Put your own in place of what is made here: the target that lacks the skill, and a vector (a
# file that `diff` wrote, `"RL::SFT"`, or a `SkillVector`).

# %%
SFT, RL, TARGET = WORK / "sft", WORK / "rl", WORK / "target"
torch.manual_seed(0)
model = train(LlamaForCausalLM(CONFIG), steps=10, skill=False, seed=1)
model.save_pretrained(SFT)
train(model, steps=40, skill=True, seed=2).save_pretrained(RL)
target = train(LlamaForCausalLM.from_pretrained(SFT), steps=5, skill=False, seed=3)
target.save_pretrained(TARGET)
v = sv.diff(RL, SFT)
print(v)

# %% [markdown]
# ## YOUR EVALUATION
# A function of model and tokenizer that returns metrics. Give the values of all items, in the
# same order for every model: then points are compared item by item, and the report knows the
# noise. (A mean, or a mean with its standard error, is taken too.) These models have no
# tokenizer: it is None.


# %%
def score(model: LlamaForCausalLM, tokenizer: object) -> dict[str, list[float]]:
    """Return for each of 60 rows the share of numbers that were guessed right."""
    text = count_up(seed=7, rows=60).to(model.device)
    with torch.no_grad():
        guessed = model(input_ids=text).logits[:, :-1].argmax(-1)
    return {"accuracy": (guessed == text[:, 1:]).float().mean(1).tolist()}


# %% [markdown]
# ## The sweep
# Lambda 0, the target itself, always comes first. Points that are done are kept in the journal
# of the folder: the same call goes on from there. The folder gets `report.json`, `points.csv`
# and a page.

# %%
report = sv.sweep(
    TARGET, v, eval=score, lam="0.25:1.5:0.25", control="random", output=WORK / "curve"
)
print(report)
for point in report.facts["points"]:
    print(f"{point['curve']:8} {point['lam']:5.2f}  {point['scores']['accuracy']['mean']:.3f}")

# %% In a notebook, a report as the last line of a cell is its answer and its curve.
report

# %% [markdown]
# ## The same, by hand
# `attach` changes a model that is loaded, bit for bit as `apply` would write it. Behind the
# block the model has its own bits again.

# %%
best = report.facts["best"]["lam"]
model = LlamaForCausalLM.from_pretrained(TARGET)
before = score(model, None)
with sv.attach(model, v, lam=best) as live:
    print(live)
    inside = score(model, None)
    live.set(lam=best / 2)  # goes from the original weights again, not from the changed ones
after = score(model, None)
for name, found in (("target", before), (f"lambda {best}", inside), ("afterwards", after)):
    print(f"{name:12} {sum(found['accuracy']) / len(found['accuracy']):.3f}")
