#!/usr/bin/env bash
# transformers 5.23.0: which tie_word_embeddings goes, the outer or the text model's, depends on the class.
#
# The outer config says false, the text config says true. For Qwen2.5-VL and LLaVA the config that comes
# of it says true, for Qwen3-VL false. So whether the head of a vision-language model is tied cannot be
# told from the two keys without the class.
#
# Seen with transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11:
#   Qwen2_5_VLConfig True
#   Qwen3VLConfig False
#   LlavaConfig True
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$place/show.py" <<'PYTHON'
import transformers

for kind, more in (
    ("Qwen2_5_VLConfig", {}),
    ("Qwen3VLConfig", {}),
    ("LlavaConfig", {"model_type": "llama"}),
):
    text = {"tie_word_embeddings": True, **more}
    config = getattr(transformers, kind)(text_config=text, tie_word_embeddings=False)
    print(kind, config.tie_word_embeddings)
PYTHON
"$place/venv/bin/python" "$place/show.py" 2>/dev/null | tee "$place/seen"
printf '%s\n' "Qwen2_5_VLConfig True" "Qwen3VLConfig False" "LlavaConfig True" | diff "$place/seen" -
