#!/usr/bin/env bash
# transformers 5.23.0: an evaluation between two steps changes what dropout draws in the steps after it.
#
# Every iterator of a torch DataLoader draws a seed for its workers from torch's global generator, also
# where it has none, and Trainer makes an iterator for every evaluation. Dropout draws from the same
# generator. So two runs that differ in nothing but how often they evaluate end at other weights.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, Python 3.11, weights after four steps:
#   with dropout, an evaluation after each step changes them: True
#   with dropout, the same with torch's generator put back after each: False
#   without dropout, an evaluation after each step changes them: False
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$place/show.py" <<'PYTHON'
import sys

import torch
from transformers import Trainer, TrainingArguments, set_seed


class Model(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(64, 1), torch.nn.Dropout(dropout)

    def forward(self, x, labels):
        return {"loss": ((self.layer(self.dropout(x)).squeeze(-1) - labels) ** 2).mean()}


class PutsBack(Trainer):
    def evaluate(self, *given, **more):
        with torch.random.fork_rng():
            return super().evaluate(*given, **more)


def train(dropout, evaluate, trainer=Trainer):
    set_seed(0)
    rows = [{"x": torch.randn(64), "labels": torch.randn(())} for _ in range(8)]
    arguments = TrainingArguments(
        sys.argv[1], max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, seed=0,
        eval_strategy="steps" if evaluate else "no", eval_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )
    ours = trainer(Model(dropout), arguments, train_dataset=rows, eval_dataset=rows)
    ours.train()
    return ours.model.layer.weight


torch.set_num_threads(1)
plain, dense = train(0.5, False), train(0.0, False)
assert torch.equal(plain, train(0.5, False))  # what is compared repeats
changes = [
    ("with dropout, an evaluation after each step changes them", plain, train(0.5, True)),
    ("with dropout, the same with torch's generator put back after each", plain,
     train(0.5, True, PutsBack)),
    ("without dropout, an evaluation after each step changes them", dense, train(0.0, True)),
]
for what, one, other in changes:
    print(f"{what}: {not torch.equal(one, other)}")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/run" 2>/dev/null | grep "dropout" | tee "$place/seen"
printf '%s\n' "with dropout, an evaluation after each step changes them: True" \
    "with dropout, the same with torch's generator put back after each: False" \
    "without dropout, an evaluation after each step changes them: False" | diff "$place/seen" -
