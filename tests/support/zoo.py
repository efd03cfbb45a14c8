"""Tiny models of many families, made by transformers itself: class name -> sizes of its config."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TOKENS | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = LLAMA | {"head_dim": 4}
ROPE = SMALL | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
}
MOE = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
SHARED = MOE | {"shared_expert_intermediate_size": 12}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MLA = ROUTED | {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}  # fmt: skip
EYE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
    "patch_size": 4,
}  # fmt: skip
DEEP = QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
SEQ2SEQ = TOKENS | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "vocab_size": 60,
}  # fmt: skip


def seeing(text: str, eye: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the config of a model that sees: a language model of a type, and a tower."""
    inner = SMALL | {"model_type": text}
    return {"text_config": inner, "vision_config": eye, "tie_word_embeddings": False} | more


def qwen(text: dict[str, Any], eye: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": text, "vision_config": eye, "tie_word_embeddings": False}


ZOO: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SMALL,
    "MistralForCausalLM": SMALL,
    "Qwen2ForCausalLM": SMALL,
    "Qwen3ForCausalLM": SMALL,
    "Gemma2ForCausalLM": SMALL,
    "Gemma3ForCausalLM": SMALL,
    "Phi3ForCausalLM": SMALL,
    "Olmo2ForCausalLM": SMALL,
    "Starcoder2ForCausalLM": SMALL,
    "StableLmForCausalLM": SMALL,
    "Glm4ForCausalLM": SMALL,
    "Cohere2ForCausalLM": SMALL,
    "GraniteForCausalLM": SMALL,
    "GPTNeoXForCausalLM": SMALL,
    "FalconForCausalLM": LLAMA,
    "GPT2LMHeadModel": {
        "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    },
    "OPTForCausalLM": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {
        "hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40,
        "tie_word_embeddings": False,
    },
    "MixtralForCausalLM": SMALL | MIXTRAL,
    "MiniMaxM2ForCausalLM": SMALL | MIXTRAL,
    "GptOssForCausalLM": SMALL | MIXTRAL,
    "GraniteMoeForCausalLM": SMALL | MIXTRAL,
    "Qwen2MoeForCausalLM": SMALL | SHARED,
    "Qwen3MoeForCausalLM": SMALL | MOE,
    "OlmoeForCausalLM": SMALL | {"num_experts": 3, "num_experts_per_tok": 2},
    "Ernie4_5_MoeForCausalLM": SMALL | {
        "moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 12,
        "moe_layer_start_index": 0, "moe_layer_interval": 1, "moe_num_shared_experts": 1,
    },
    "DeepseekV2ForCausalLM": SMALL | MLA,
    "DeepseekV3ForCausalLM": SMALL | MLA,
    "DeepseekV4ForCausalLM": SMALL | MLA,
    "Glm4MoeForCausalLM": SMALL | ROUTED,
    "Llama4ForCausalLM": SMALL | {
        "num_local_experts": 3, "intermediate_size_mlp": 24, "moe_layers": [1],
    },
    "Qwen3NextForCausalLM": SMALL | SHARED | LINEAR,
    "JambaForCausalLM": SMALL | {
        "num_experts": 3, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "LlavaForConditionalGeneration": seeing("llama", EYE | {"model_type": "clip_vision_model"}),
    "LlavaNextForConditionalGeneration": seeing(
        "llama", EYE | {"model_type": "clip_vision_model"}
    ),
    "Idefics3ForConditionalGeneration": seeing(
        "llama", EYE | {"model_type": "idefics3_vision"}, pad_token_id=0
    ),
    "Mistral3ForConditionalGeneration": seeing("mistral", EYE | {"model_type": "pixtral"}),
    "InternVLForConditionalGeneration": seeing(
        "qwen2",
        EYE | {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [4, 4]},
    ),
    "PaliGemmaForConditionalGeneration": seeing(
        "gemma", EYE | {"model_type": "siglip_vision_model", "projection_dim": 16},
        projection_dim=16,
    ),
    "AyaVisionForConditionalGeneration": seeing(
        "cohere2", EYE | {"model_type": "siglip_vision_model"}
    ),
    "Gemma3ForConditionalGeneration": seeing(
        "gemma3_text", EYE | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4
    ),
    "Gemma4ForConditionalGeneration": seeing(
        "gemma4_text",
        EYE | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8},
        audio_config=None,
    ),
    "Qwen2VLForConditionalGeneration": qwen(
        ROPE,
        {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
         "mlp_ratio": 2},
    ),
    "Qwen2_5_VLForConditionalGeneration": qwen(ROPE, QWEN),
    "Qwen3VLForConditionalGeneration": qwen(ROPE, DEEP),
    "Qwen3VLMoeForConditionalGeneration": qwen(ROPE | MOE, DEEP),
    "Qwen3_5ForConditionalGeneration": qwen(ROPE | LINEAR, DEEP),
    "Qwen3_5MoeForConditionalGeneration": qwen(ROPE | LINEAR | SHARED, DEEP),
    "T5ForConditionalGeneration": {
        "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 2, "vocab_size": 40,
        "tie_word_embeddings": False, "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": SEQ2SEQ | {"max_position_embeddings": 32},
    "WhisperForConditionalGeneration": SEQ2SEQ | {
        "num_mel_bins": 8, "decoder_start_token_id": 1, "max_source_positions": 16,
        "max_target_positions": 16,
    },
    "BertForMaskedLM": SMALL,
    "BertForSequenceClassification": SMALL,
    "BertForTokenClassification": SMALL,
    "BertForQuestionAnswering": SMALL,
    "RobertaForSequenceClassification": SMALL,
    "LlamaModel": SMALL,
    "PhimoeForCausalLM": LLAMA | MIXTRAL,
    "HunYuanMoEV1ForCausalLM": SMALL | MOE | {"moe_topk": 2},
    "Qwen3_5ForCausalLM": SMALL | LINEAR,
    "Qwen3_5MoeForCausalLM": SMALL | LINEAR | SHARED,
    "Llama4ForConditionalGeneration": {
        "vision_config": EYE | {"vision_output_dim": 16, "projector_input_dim": 16,
                                "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
        "text_config": SMALL | {
            "intermediate_size_mlp": 24, "num_local_experts": 3, "moe_layers": [1]},
    },
    "FalconH1ForCausalLM": SMALL | {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_expand": 2,
    },
    "Mamba2ForCausalLM": {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4,
        "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2,
    },
}  # fmt: skip
ZOO["Gemma4ForConditionalGeneration"]["text_config"] |= {
    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 40, "num_kv_shared_layers": 0,
}  # fmt: skip


def build(name: str, tied: bool = False) -> transformers.PreTrainedModel:
    """Return a model of a class with random weights, untied if nothing else is said."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    said = json.loads(json.dumps(ZOO[name]))
    if tied:
        said["tie_word_embeddings"] = True
        said.get("text_config", {})["tie_word_embeddings"] = True
    model = kind(kind.config_class(**said))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def save_memory(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Save a model under the names, and in the shapes, that it has in memory."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
