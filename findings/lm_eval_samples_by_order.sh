#!/usr/bin/env bash
# lm-eval 0.4.13: `samples` with an empty list asks all items, and doc_id is wrong for a list that is not sorted.
#
# simple_evaluate(samples={task: [...]}) asks the items whose numbers are in the list. An empty list counts as
# none given, so every item is asked. The items come in the order of the data, whatever the order of the list,
# and doc_id in the logged samples is taken from the list at that place: right for a sorted list alone.
#
# Seen with lm_eval 0.4.13, Python 3.11, items that are named by their numbers, 0 to 4:
#   samples [1, 3]: doc_id and item [(1, 1), (3, 3)]
#   samples [3, 1]: doc_id and item [(3, 1), (1, 3)]
#   samples []: doc_id and item [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet lm_eval==0.4.13
for item in 0 1 2 3 4; do echo "{\"item\": $item, \"question\": \"question $item\"}"; done > "$place/items.jsonl"
mkdir "$place/tasks"
cat > "$place/tasks/numbers.yaml" <<YAML
task: numbers
dataset_path: json
dataset_kwargs: {data_files: {test: $place/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
YAML
cat > "$place/show.py" <<'PYTHON'
import sys

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Model(LM):
    def loglikelihood(self, requests):
        return [(-1.0, False) for _ in requests]

    loglikelihood_rolling = generate_until = None


manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
for samples in ([1, 3], [3, 1], []):
    found = simple_evaluate(
        Model(), tasks=["numbers"], task_manager=manager, samples={"numbers": samples}
    )
    seen = [(one["doc_id"], one["doc"]["item"]) for one in found["samples"]["numbers"]]
    print(f"samples {samples}: doc_id and item {seen}")
PYTHON
HF_HOME="$place" HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/show.py" "$place/tasks" 2>/dev/null |
    grep "doc_id" | tee "$place/seen"
printf '%s\n' "samples [1, 3]: doc_id and item [(1, 1), (3, 3)]" \
    "samples [3, 1]: doc_id and item [(3, 1), (1, 3)]" \
    "samples []: doc_id and item [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]" | diff "$place/seen" -
