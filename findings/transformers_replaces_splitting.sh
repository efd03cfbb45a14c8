#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer splits text by the model's type, and not as the tokenizer.json beside it says.
#
# A tokenizer of whole words, saved with save_pretrained, is loaded as it was beside a config of a Llama. Beside the config
# of a Qwen2 it keeps its words and gets byte-level splitting in place of its own, and finds none of them in the same text.
# Nothing is said.
#
# Seen with transformers 5.23.0, tokenizers 0.23.3, without torch, Python 3.11:
#   model_type llama: ['one', 'two']
#   model_type qwen2: []
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cat > "$place/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
for kind in ("llama", "qwen2"):
    folder = Path(sys.argv[1], kind)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    print(f"model_type {kind}:", AutoTokenizer.from_pretrained(folder).tokenize("one two"))
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "model_type llama: ['one', 'two']" "model_type qwen2: []" | diff "$place/seen" -
