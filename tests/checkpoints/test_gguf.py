"""GGUF files against transformers' own reading of them, bit for bit."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import from_bits
from safetensors.torch import save_file

import skillvec
from skillvec.checkpoints import gguf as gguf_module
from skillvec.checkpoints import gguf_header
from skillvec.checkpoints.gguf import TILE, Blocks
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.errors import FormatError, IncompatibleError, SkillvecError, UsageError
from skillvec.files.header import TensorSpec
from skillvec.files.tensors import Source, values_of

TYPES = gguf.GGMLQuantizationType
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama one head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama narrow heads": ("llama", {"head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen2moe": ("qwen2_moe", EXPERTS),
    "qwen3moe": ("qwen3_moe", EXPERTS),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", {}),
}


def tiny(kind: str, more: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"tie_word_embeddings": False} | more)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k as llama.cpp's converter does (LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(model: Any, arch: str) -> dict[str, np.ndarray]:
    """Return a model's weights as llama.cpp's converter writes them, in fp32."""
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    made: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("gate_up_proj") and value.ndim == 3:
            for half, part in zip(("gate", "up"), np.split(value, 2, axis=1), strict=True):
                stem = name.removesuffix("gate_up_proj")
                made[f"{names.get_name(f'{stem}{half}_proj')}.weight"] = part
            continue
        stem, _, last = name.rpartition(".")
        if last not in ("weight", "bias"):
            stem, last = name, "weight"
        if arch == "llama" and ".q_proj" in name:
            value = permuted(value, config.num_attention_heads)
        if arch == "llama" and ".k_proj" in name:
            value = permuted(value, config.num_key_value_heads)
        if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            value = value + 1
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        made[f"{names.get_name(stem)}.{last}"] = value
    return made


def write(
    path: Path, arch: str, config: Any, tensors: dict[str, np.ndarray],
    kinds: dict[str, Any] | None = None, **more: Any,
) -> Path:  # fmt: skip
    """Write a GGUF with matrices of the kinds of `kinds`, by ends of names; the rest in fp32."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("toy")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or 16
    writer.add_rope_dimension_count(width)
    if width == 16:  # else as of old
        writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_pad_token_id(0)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    if "moe" in arch:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for key, value in more.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, value in tensors.items():
        kind = next((k for end, k in (kinds or {}).items() if name.endswith(end)), None)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            raw = gguf.quantize(np.ascontiguousarray(value), kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_of(source: Source, block: int = 1 << 20) -> torch.Tensor:
    starts = range(0, source.numel, block)
    parts = [values_of(source, at, min(block, source.numel - at)) for at in starts]
    return from_bits(np.concatenate(parts), source.dtype, source.shape)


def loaded(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """Return the weights that transformers reads of a GGUF, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )
    return dict(model.state_dict())


KINDS = {"attn_q.weight": TYPES.Q8_0, "attn_k.weight": TYPES.F16, "ffn_down.weight": TYPES.BF16,
         "ffn_up.weight": TYPES.Q4_0, "attn_v.weight": TYPES.Q5_1, "token_embd.weight": TYPES.Q8_0,
         "ffn_down_exps.weight": TYPES.Q4_1, "ffn_gate_exps.weight": TYPES.Q8_0,
         "ffn_up_exps.weight": TYPES.Q8_0}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_is_what_transformers_reads_of_it(tmp_path: Path, name: str):
    arch, (kind, more) = name.split()[0], MODELS[name]
    model = tiny(kind, more)
    path = write(tmp_path / "m.gguf", arch, model.config, converted(model, arch), KINDS)
    found = open_checkpoint(path)
    expected = loaded(path, model.config)
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor_of(found[key]).float(), tensor), key
        assert torch.equal(tensor_of(found[key], 33).float(), tensor), key
    assert set(found.formats.values()) >= {"Q8_0"}


BLOCKS = [k for k in TYPES if k in gguf.quants._type_traits and gguf.GGML_QUANT_SIZES[k][0] > 1]


@pytest.mark.parametrize("kind", BLOCKS, ids=[kind.name for kind in BLOCKS])
def test_blocks_of_every_type_are_those_of_the_package(tmp_path: Path, kind, monkeypatch):
    block, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * width), np.uint8)
    file = tmp_path / "blocks"
    file.write_bytes(b"12345" + raw.tobytes())
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind).reshape(-1)
    spec = TensorSpec("a", "U8", (raw.size,), str(file), 5, raw.size)
    source = Blocks("a", (3, 2 * block), spec, int(kind), block, width)
    for tile in (TILE, 40):
        monkeypatch.setattr(gguf_module, "TILE", tile)
        assert values_of(source, 0, source.numel).tobytes() == expected.tobytes()
        part = values_of(source, block - 3, 2 * block + 1)
        assert part.tobytes() == expected[block - 3 :][: 2 * block + 1].tobytes()


# ------------------------------------------------------------------------------ what it is used for


def plain(path: Path, model: skillvec.Checkpoint, config: Any) -> Path:
    """Write what was opened as a folder of safetensors."""
    path.mkdir()
    save_file({name: tensor_of(source) for name, source in model.items()},
              path / "model.safetensors", {"format": "pt"})  # fmt: skip
    (path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return path


def weights(path: Path) -> dict[str, bytes]:
    found = open_checkpoint(path)
    return {name: values_of(source, 0, source.numel).tobytes() for name, source in found.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_gguf_is_base_tuned_and_target(tmp_path: Path, name: str):
    arch, (kind, more) = name, MODELS[name]
    model = tiny(kind, more)
    folder = tmp_path / "target"
    folder.mkdir()
    write(folder / "m.gguf", arch, model.config, converted(model, arch), KINDS)
    twin = plain(tmp_path / "twin", open_checkpoint(folder / "m.gguf"), model.config)
    (folder / "config.json").write_bytes((twin / "config.json").read_bytes())
    tuned = tmp_path / "tuned"
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(tuned)  # experts one by one
    made = []
    for number, base in enumerate((folder, twin)):
        vector, out = tmp_path / f"{number}.safetensors", tmp_path / f"out{number}"
        skillvec.diff(tuned, base, vector)
        skillvec.apply(base, vector, out)
        skillvec.verify(out)
        made.append(weights(out))
        back = tmp_path / f"back{number}.safetensors"
        skillvec.diff(base, tuned, back)
        skillvec.apply(tuned, back, tmp_path / f"there{number}")
        made.append(weights(tmp_path / f"there{number}"))
    assert made[0] == made[2] and made[1] == made[3] and made[0] != made[1]
    assert not list((tmp_path / "out0").glob("*.gguf"))
    said = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert said["dtype"] == "float32"
    seen = skillvec.inspect(folder)
    assert seen.facts["format"] == "GGUF"
    assert {"Q8_0", "Q5_1"} <= {line.get("note", "") for line in seen.ledger}


def test_a_gguf_by_its_name_gives_one_file(tmp_path: Path):
    model = tiny("qwen2", {"tie_word_embeddings": True})
    path = write(tmp_path / "m.gguf", "qwen2", model.config, converted(model, "qwen2"), KINDS)
    zero = tmp_path / "zero.safetensors"
    skillvec.diff(path, path, zero)
    skillvec.apply(path, zero, tmp_path / "out.safetensors")
    skillvec.verify(tmp_path / "out.safetensors")
    assert weights(tmp_path / "out.safetensors") == weights(path)
    said = skillvec.inspect(path)
    assert said.facts["kind"] == "model" and len(said.ledger) == len(open_checkpoint(path))
    skillvec.apply(path, f"{path}::{path}", tmp_path / "again.safetensors")
    skillvec.verify(tmp_path / "again.safetensors")
    for use in (skillvec.SkillVector.open, skillvec.norms):
        with pytest.raises(SkillvecError, match=r"m\.gguf"):
            use(path)


def test_what_turns_positions_is_left_out_and_listed(tmp_path: Path):
    model = tiny("llama", {})
    tensors = converted(model, "llama") | {"rope_freqs.weight": np.ones(8, np.float32)}
    found = open_checkpoint(write(tmp_path / "m.gguf", "llama", model.config, tensors))
    assert len(found) == len(model.state_dict())
    assert found.formats == {"rope_freqs.weight": "not a weight: how positions turn"}


# ------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, np.ndarray], bytes]:
    model = tiny("llama", {})
    tensors = converted(model, "llama")
    path = write(tmp_path_factory.mktemp("toy") / "m.gguf", "llama", model.config, tensors)
    return model.config, tensors, path.read_bytes()


def refused(path: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s)^model .*m.gguf: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, {}, "blk.0.attn_q.bias: a tensor that"),
        ({"blk.0.attn_q.weight": None}, {}, "layers.0.self_attn.q_proj.weight: not in the file"),
        ({"blk.0.attn_q.weight": np.ones((64, 32), np.float32)}, {}, "found .64, 32., expected"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 4, 4), np.float32)}, {}, "gate_exps.weight: a"),
        ({"output.weight": None, "blk.7.attn_q.weight": np.ones(3, np.float32)}, {}, "blk.7"),
        ({}, {"split__count": 3}, "one of 3 parts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_named(tmp_path: Path, toy, changes, more, message):
    config, tensors, _ = toy
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    write(tmp_path / "m.gguf", "llama", config, tensors, **more)
    refused(tmp_path / "m.gguf", IncompatibleError, message)


def header(*parts: Any) -> bytes:
    """Return a GGUF of version 3 with counts and values: texts, (format, number) pairs, bytes."""
    made = b"GGUF" + struct.pack("<I", 3)
    for part in parts:
        if isinstance(part, str):
            made += struct.pack("<Q", len(part)) + part.encode()
        else:
            made += part if isinstance(part, bytes) else struct.pack(f"<{part[0]}", part[1])
    return made


ONE, NONE = ("Q", 1), ("Q", 0)
TENSOR = ("t", ("I", 1), ("Q", 4))  # name, dimensions, size; then type and offset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "the file ends"),
        (b"GGUF" + struct.pack("<I", 1), "version 1: 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3), "other byte order"),
        (header(("Q", 1 << 60), NONE), "the file ends"),
        (header(NONE, ("Q", 1 << 60)), "the file ends"),
        (header(NONE, ONE, ("Q", 1 << 60)), "the file ends"),
        (header(NONE, ONE, ("Q", 1), b"\xff", bytes(40)), "no UTF-8"),
        (header(NONE, ONE, "a", ("I", 99)), "unknown type 99"),
        (header(NONE, ONE, "a", ("I", 9), ("I", 4), ("Q", 1 << 60)), "the file ends"),
        (header(NONE, ONE, "a", ("I", 9), ("I", 8), ("Q", 1 << 60), "b"), "the file ends"),
        (header(NONE, ONE, "a", ("I", 9), ("I", 9), ONE), "unknown type 9"),
        (header(NONE, ("Q", 2), "a", ("I", 0), b"\1", "a", ("I", 0), b"\1"), "a twice"),
        (header(NONE, ONE, "general.alignment", ("I", 4), ("I", 0)), "general.alignment 0"),
        (header(ONE, NONE, "t", ("I", 5)), "t of 5 dimensions"),
        (header(ONE, NONE, "t", ("I", 0)), "t of 0 dimensions"),
        (header(ONE, NONE, *TENSOR, ("I", 99), NONE), "t is of unknown type 99"),
        (header(ONE, NONE, *TENSOR, ("I", 2), NONE, bytes(64)), "no rows of blocks of 32"),
        (header(ONE, NONE, *TENSOR, ("I", 0), NONE, bytes(16)), "t ends behind the end"),
        (header(ONE, NONE, *TENSOR, ("I", 0), ("Q", 1 << 63), bytes(64)), "t ends behind the end"),
        (header(("Q", 2), NONE, *TENSOR, ("I", 0), NONE, *TENSOR), "t twice"),
        (
            header(NONE, ONE, "general.architecture", ("I", 8), "llama"),
            "0 tensors, llama.block_count None",
        ),
        (
            header(("Q", 2), NONE, *TENSOR, ("I", 0), NONE, "u", *TENSOR[1:], ("I", 0), ("Q", 8),
                   bytes(64)),
            "t and u overlap",
        ),
    ],
)  # fmt: skip
def test_a_broken_header_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", FormatError, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(NONE, NONE), "architecture 'None'"),
        (header(NONE, ONE, "general.architecture", ("I", 8), "bloom"), "'bloom'.*llama, qwen2"),
        (b"PK", "no GGUF, although.*convert_hf_to_gguf"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", IncompatibleError, message)


def test_a_cap_on_headers(tmp_path: Path, toy, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(toy[2])
    assert open_checkpoint(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_header, "AHEAD", 7)  # read in short pieces
    assert open_checkpoint(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_header, "MAX_HEADER_NBYTES", 1000)
    refused(tmp_path / "m.gguf", FormatError, "over 1000 bytes")


def test_a_truncated_file_is_named(tmp_path: Path, toy):
    (tmp_path / "m.gguf").write_bytes(toy[2][:-100])
    refused(tmp_path / "m.gguf", FormatError, "output.weight ends behind the end")


def test_heads_that_divide_no_rows_are_refused(tmp_path: Path, toy):
    config, tensors, _ = toy
    for heads, error, message in (
        (0, FormatError, "makes no llama"),
        (64, IncompatibleError, "q_proj"),
    ):
        said = {"num_attention_heads": heads, "num_key_value_heads": heads or 1}
        write(tmp_path / "m.gguf", "llama", SimpleNamespace(**config.to_dict() | said), tensors)
        refused(tmp_path / "m.gguf", error, message)


def test_blocks_without_arithmetic_are_refused(tmp_path: Path, toy, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(toy[2])

    def dequantize(data: np.ndarray, kind: Any) -> np.ndarray:
        raise NotImplementedError(kind)

    config, tensors, _ = toy
    write(tmp_path / "m.gguf", "llama", config, tensors, {"ffn_up.weight": TYPES.Q8_0})
    monkeypatch.setattr(gguf, "dequantize", dequantize)
    refused(tmp_path / "m.gguf", IncompatibleError, "blk.0.ffn_up.weight: Q8_0")


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path, toy, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(toy[2])
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(tmp_path / "m.gguf", UsageError, r'pip install "skillvec\[gguf\]"')


def test_of_several_in_a_folder_one_is_named(tmp_path: Path, toy):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(toy[2])
    with pytest.raises(UsageError, match=r"(?s)name the GGUF that is meant.*a.gguf.*b.gguf"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "a.gguf")
