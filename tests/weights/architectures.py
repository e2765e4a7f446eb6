"""Small models of transformers and timm, one for each storage layout of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
_SMALL |= {"intermediate_size": 20}
_TEXT = _SMALL | {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = _GROUPED | {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
_EXPERTS |= {"moe_intermediate_size": 14, "shared_expert_intermediate_size": 10}
_IMAGES = _SMALL | {"image_size": 8, "patch_size": 4, "num_attention_heads": 3}
_GPT = {"n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": 31}
_FALCON = _TEXT | {"alibi": False}
_SIDES = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 31}
_SIDES |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "pad_token_id": 0}
_SIDES |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = _SIDES | {"encoder_attention_heads": 4, "decoder_attention_heads": 3}
_WHISPER = _SIDES | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_WHISPER |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
_QWEN = _TEXT | {"num_key_value_heads": 2, "rope_parameters": _ROPE}

# The class, and the options of its config.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", _GPT | {"add_cross_attention": True}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _TEXT),
    "Bloom": ("BloomForCausalLM", {"hidden_size": 24, "n_head": 4, "n_layer": 2, "vocab_size": 31}),
    "Falcon, one key": ("FalconForCausalLM", _FALCON | {"multi_query": True}),
    "Falcon, groups": (
        "FalconForCausalLM",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "Falcon, all keys": ("FalconForCausalLM", _FALCON | {"multi_query": False}),
    "GPTBigCode, one key": ("GPTBigCodeForCausalLM", _GPT | {"multi_query": True}),
    "GPTBigCode, all keys": ("GPTBigCodeForCausalLM", _GPT | {"multi_query": False}),
    "MPT": (
        "MptForCausalLM",
        {"d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 31, "expansion_ratio": 2},
    ),
    "Phi-3": ("Phi3ForCausalLM", _TEXT | {"num_key_value_heads": 2}),
    "GLM": ("Glm4ForCausalLM", _GROUPED),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Mistral": ("MistralForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "Gemma": ("GemmaForCausalLM", _GROUPED),
    "Mixtral": ("MixtralForCausalLM", _EXPERTS),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", _EXPERTS),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", _EXPERTS),
    "Granite-MoE": ("GraniteMoeForCausalLM", _EXPERTS),
    "gpt-oss": ("GptOssForCausalLM", _EXPERTS),
    "Privacy Filter": ("OpenAIPrivacyFilterForTokenClassification", _EXPERTS),
    "Llama 4": (
        "Llama4ForCausalLM",
        _EXPERTS | {"intermediate_size_mlp": 16, "interleave_moe_layer_step": 1},
    ),
    "CodeGen": ("CodeGenForCausalLM", _GPT | {"n_embd": 32, "rotary_dim": 4}),
    "BERT": ("BertForMaskedLM", _TEXT),
    "ModernBERT": ("ModernBertForMaskedLM", _TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        {"dim": 24, "n_heads": 4, "n_layers": 2, "hidden_dim": 20, "vocab_size": 31},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 24, "d_kv": 5, "d_ff": 20, "num_heads": 4, "num_layers": 2, "vocab_size": 31},
    ),
    "BART": ("BartForConditionalGeneration", _BART),
    "Whisper": ("WhisperForConditionalGeneration", _WHISPER),
    "ViT": ("ViTForImageClassification", _IMAGES),
    "DINOv2": (
        "Dinov2Model",
        {k: v for k, v in _IMAGES.items() if k != "intermediate_size"} | {"use_swiglu_ffn": True},
    ),
    "CLIP": ("CLIPModel", {"text_config": _TEXT, "vision_config": _IMAGES}),
    "BLIP": (
        "BlipModel",
        {"text_config": _TEXT | {"encoder_hidden_size": 24}, "vision_config": _IMAGES},
    ),
    "Llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": _GROUPED | {"model_type": "llama"},
            "vision_config": _IMAGES | {"model_type": "clip_vision_model"},
        },
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _QWEN,
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 24,
                "num_heads": 2,
                "patch_size": 4,
            },
        },
    ),
}

TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 12,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "img_size": 64,
        "window_size": 2,
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "vit_base_patch16_siglip_224": {"depth": 1, "embed_dim": 24, "num_heads": 3},
}


def randomised(model: nn.Module) -> nn.Module:
    """Fills every parameter with random numbers, because some are zero or equal at first."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.eval()


def of_transformers(name: str) -> Any:
    import transformers

    kind, options = TRANSFORMERS[name]
    made = getattr(transformers, kind)
    return randomised(made(made.config_class(**options)))
