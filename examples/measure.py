# %% [markdown]
# # Measure: how do an RL update and an SFT update lie to each other?
#
# PaST (arXiv 2601.11258) rests on an observation: what RL changes is nearly orthogonal to what
# SFT changes, so one can be added without disturbing the other. `orthogonality` measures that,
# and says what a cosine is worth: unrelated updates of the same structure have a cosine too, by
# chance.
#
# The models are tiny Llamas; "SFT" and "RL" are a few steps of AdamW on two different made-up
# tasks.

# %%
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skillvec as sv

WORK = Path(mkdtemp(prefix="skillvec-"))
CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip


def train(model: LlamaForCausalLM, step_size: int, seed: int) -> LlamaForCausalLM:
    """Return the model after some steps on rows that count up by `step_size`."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(10):
        starts = torch.randint(CONFIG.vocab_size, (16, 1), generator=draw)
        text = (starts + step_size * torch.arange(8)) % CONFIG.vocab_size
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# %% [markdown]
# ## YOUR MODELS
# Put your own three in place of what is made here: the base, the model after SFT, the model
# after RL. Checkpoints in fp32 show the whole update. In bf16 what was smaller than a step of
# its grid is gone; the report says where that decides a number.

# %%
BASE, SFT, RL = WORK / "base", WORK / "sft", WORK / "rl"
torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG)
model.save_pretrained(BASE)
train(model, step_size=1, seed=1).save_pretrained(SFT)
train(model, step_size=5, seed=2).save_pretrained(RL)
rl, sft = sv.diff(RL, SFT), sv.diff(SFT, BASE)
print(rl)
print(sft)

# %% [markdown]
# ## Angles, beside what chance gives
# `control="random"` measures a second time with the signs of the first vector's channels drawn
# anew: a pair that shares nothing but its structure. With `output`, the folder gets
# `report.html`, a page with a map of all layers and modules, and all numbers as JSON and CSV.

# %%
report = sv.orthogonality(rl, sft, control="random", output=WORK / "angles")
print(report)

# %% In a notebook, a report as the last line of a cell is its answer, its map and its numbers.
report

# %% [markdown]
# ## What it says
# - `cosine`: of the two updates, over all values.
# - `cosine_sd`: how far cosines of unrelated updates of this structure lie from 0. A cosine within
#   two of these says nothing.
# - `z` and `p`: the cosine in these units, and how often chance gives one at least as large.
# - `control_cosine`: of the control. Where it is as large as the cosine, structure explains both.
#
# The page of `docs/orthogonality.md` explains every number, and when not to trust it.

# %%
(pair,) = report.facts["pairs"]
for key in ("cosine", "cosine_sd", "z", "p", "control_cosine"):
    print(f"{key:15} {pair['overall'][key]:+.4g}")
print(pair["sentence"])
print(pair["forecast"]["sentence"])

# %% The layers in which the two lie closest to each other.
layers = [row for row in pair["layers"] if row["cosine"] is not None]
for row in sorted(layers, key=lambda row: -abs(row["cosine"]))[:3]:
    print(f"{row['name']:20} {row['cosine']:+.4f}")

# %% [markdown]
# ## One vector alone
# `norms` says where an update is: by module, by layer, by tensor.

# %%
print(sv.norms(rl))
