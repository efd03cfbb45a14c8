#!/usr/bin/env bash
# transformers 5.23.0: a model of a GGUF cannot be saved, though all its weights are plain float32.
#
# from_pretrained(gguf_file=...) of a Llama unpacks the blocks of the file into parameters of float32. It
# calls the model quantised all the same, and save_pretrained refuses it as not serialisable, also where no
# tensor of the file had blocks. With quantization_config=GgufConfig(dequantize=True) the parameters are the
# same, and they are saved.
#
# Seen with torch 2.13.0 (CPU), transformers 5.23.0, gguf 0.19.0, without kernels, Python 3.11:
#   Q8_0, plain call: parameters of ['torch.float32'], ValueError when saved
#   Q8_0, dequantize=True: parameters of ['torch.float32'], saved
#   F32, plain call: parameters of ['torch.float32'], ValueError when saved
#   F32, dequantize=True: parameters of ['torch.float32'], saved
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat > "$place/show.py" <<'PYTHON'
import sys

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, GgufConfig

WIDTH, INNER, WORDS = 32, 64, 40
place = sys.argv[1]
shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
shapes |= {f"blk.0.{norm}_norm": (WIDTH,) for norm in ("attn", "ffn")}
shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")}
shapes["blk.0.ffn_down"] = (WIDTH, INNER)


def write(kind):
    writer = gguf.GGUFWriter(f"{place}/{kind.name}.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"t{i}" for i in range(WORDS)])
    values = np.random.default_rng(0)
    for name, shape in shapes.items():
        tensor = values.standard_normal(shape, np.float32)
        as_kind = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor, as_kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(model):
    try:
        model.save_pretrained(f"{place}/saved")
    except ValueError as error:
        assert "not serializable" in str(error)
        return "ValueError when saved"
    return "saved"


for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32):
    write(kind)
    for what in ("plain call", "dequantize=True"):
        given = {"gguf_file": f"{kind.name}.gguf"}
        if what != "plain call":
            given["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(place, **given)
        dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
        print(f"{kind.name}, {what}: parameters of {dtypes}, {save(model)}")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place" 2>/dev/null | tee "$place/seen"
printf '%s\n' "Q8_0, plain call: parameters of ['torch.float32'], ValueError when saved" \
    "Q8_0, dequantize=True: parameters of ['torch.float32'], saved" \
    "F32, plain call: parameters of ['torch.float32'], ValueError when saved" \
    "F32, dequantize=True: parameters of ['torch.float32'], saved" | diff "$place/seen" -
