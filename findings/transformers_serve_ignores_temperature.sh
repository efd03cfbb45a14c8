#!/usr/bin/env bash
# transformers 5.23.0: the temperature of a request to `transformers serve` changes nothing, unless the model samples anyway.
#
# The server puts temperature into the generation config of the model and leaves do_sample as it is there, which is false
# for a model whose generation_config.json does not say otherwise. So requests with temperature 2 are answered greedily,
# always with the same text. With do_sample in the file beside the weights, the same requests get different texts.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, Python 3.11:
#   no generation_config.json: 1 text in 4 answers at temperature 2
#   do_sample in generation_config.json: more than one text in 4 answers at temperature 2
set -eu
place=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 "transformers[serving]==5.23.0" accelerate==1.15.0
cat > "$place/make.py" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder, samples = sys.argv[1], sys.argv[2] == "True"
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2").save_pretrained(folder)
shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, eos_token_id=1, bos_token_id=0, pad_token_id=2))
if samples:
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=2)
model.save_pretrained(folder)
PYTHON
cat > "$place/ask.py" <<'PYTHON'
import json
import sys
import time
import urllib.request

port, folder = sys.argv[1:]


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


for _ in range(900):
    try:
        call("/health")
        break
    except OSError:
        time.sleep(1)
else:
    sys.exit("no server")
body = {"model": folder, "prompt": "w3 w4", "temperature": 2.0, "max_tokens": 8}
texts = {call("/v1/completions", body)["choices"][0]["text"] for _ in range(4)}
print("1 text" if len(texts) == 1 else "more than one text", "in 4 answers at temperature 2")
PYTHON
for samples in False True; do
    "$place/venv/bin/python" "$place/make.py" "$place/model$samples" "$samples" >/dev/null 2>&1
    port=$("$place/venv/bin/python" -c "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1])")
    "$place/venv/bin/python" -m transformers.cli.transformers serve "$place/model$samples" --host 127.0.0.1 --port "$port" \
        --device cpu >"$place/said" 2>&1 &
    server=$!
    if [ "$samples" = True ]; then printf 'do_sample in'; else printf 'no'; fi
    printf ' generation_config.json: '
    "$place/venv/bin/python" "$place/ask.py" "$port" "$place/model$samples"
    kill "$server"
    wait "$server" || true
    server=
done > "$place/seen"
cat "$place/seen"
printf '%s\n' "no generation_config.json: 1 text in 4 answers at temperature 2" \
    "do_sample in generation_config.json: more than one text in 4 answers at temperature 2" | diff "$place/seen" -
