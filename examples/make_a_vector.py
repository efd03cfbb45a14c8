# %% [markdown]
# # Make a vector, look at it, add it to another model, prove the result
#
# A skill vector is what reinforcement learning changed: `v = theta_rl - theta_sft` (PaST, arXiv
# 2601.11258). Here the models are tiny Llamas with random weights, and "training" is a few
# steps of AdamW on made-up text, so that the whole script takes seconds.

# %%
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skillvec as sv

WORK = Path(mkdtemp(prefix="skillvec-"))
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip


def train(model: LlamaForCausalLM, seed: int, steps: int, rate: float) -> LlamaForCausalLM:
    """Return the model after some steps on random text: the same seed gives the same text."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        text = torch.randint(CONFIG.vocab_size, (8, 16), generator=draw)
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# %% [markdown]
# ## YOUR MODELS
# Put three folders (or names on the Hub, `org/name@revision`) in place of what is made here: a
# model before RL, the same model after RL, and another fine-tune of the same base that lacks
# the skill.

# %%
SFT, RL, TARGET = WORK / "sft", WORK / "rl", WORK / "target"
torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG)
start = {name: weight.clone() for name, weight in model.state_dict().items()}
train(model, seed=1, steps=4, rate=1e-3).to(torch.bfloat16).save_pretrained(SFT)
rl = LlamaForCausalLM.from_pretrained(SFT, dtype=torch.float32)
train(rl, seed=2, steps=4, rate=1e-4).to(torch.bfloat16).save_pretrained(RL)
model = LlamaForCausalLM(CONFIG)
model.load_state_dict(start)
train(model, seed=3, steps=4, rate=1e-3).to(torch.bfloat16).save_pretrained(TARGET)

# %% [markdown]
# ## The vector
# `diff` reads the headers of both models, checks every name and shape, and only then subtracts.
# What it writes is exact: `sft + 1 * v` is `rl`, bit for bit, also in 16 bits.

# %%
VECTOR = WORK / "skill.safetensors"
v = sv.diff(RL, SFT, VECTOR, method="a toy", notes="random text")
print(v)

# %% In a notebook, a vector as the last line of a cell is a table with the norms of its layers.
v

# %% One tensor is a numpy array of fp32; a slice reads only the rows that it names.
name = "model.layers.0.mlp.up_proj.weight"
print(name, v[name].shape, v[name].dtype, "changed:", (v[name] != 0).mean())
print(v["model.embed_tokens.weight", 10:12].shape)

# %% Vectors are added and scaled as formulas say. Nothing is read before it is used.
print(0.5 * v)
print(v - sv.diff(TARGET, SFT))

# %% [markdown]
# ## Add it to another model
# The report says what arrived: in bf16 a small update can be rounded away, and the realised
# gain tells how much of `lam * v` the written model holds.

# %%
MERGED = WORK / "merged"
applied = sv.apply(TARGET, v, MERGED, lam=0.7)
print(applied)
print("realised gain:", applied.facts["gain"], "cosine:", applied.facts["cosine"])

# %% [markdown]
# ## Prove it
# `verify` reads the merged model, the target and the vector from the disk and computes
# everything again; it raises `skillvec.VerificationError` where one bit differs.

# %%
proof = sv.verify(MERGED)
print(proof)

# %% The merged folder is an ordinary model.
merged = LlamaForCausalLM.from_pretrained(MERGED)
print(f"{merged.num_parameters():,} parameters in {MERGED}")
