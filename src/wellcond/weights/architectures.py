"""The names that libraries use for the parts and settings of attention and of gated layers.

A module is recognised by its attributes and not by its class, so that a file, which has no classes,
is read like a model. A name is not sufficient: the shapes must also fit, see `fused` and `heads`.
The tests check these names against the installed libraries.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Separate projections of query, key and value, and the output projection of the same module.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5
    ("attn_q", "attn_k", "attn_v"),  # GGUF
)
OUTPUTS = (
    *("o_proj", "out_proj", "dense", "out_lin", "o", "proj"),
    *("attn_output", "attn_out", "attn_o"),  # GGUF
)


class Fused(NamedTuple):
    """A fused projection of query, key and value.

    Attributes:
        outputs: the possible names of the output projection in the same module.
        any_order: whether the order of the rows differs between libraries, so that a known class
            or model_type must determine it.
        grouped: whether there can be fewer keys and values than queries, stored part after part.
    """

    outputs: tuple[str, ...]
    any_order: bool = False
    grouped: bool = False


FUSED = {
    "qkv": Fused(("proj", "projection"), any_order=True),
    "c_attn": Fused(("c_proj",)),
    "query_key_value": Fused(("dense",), any_order=True),
    # CodeGen and MiniMax have an out_proj instead and a different order.
    "qkv_proj": Fused(("o_proj",), any_order=True, grouped=True),
    "Wqkv": Fused(("out_proj", "Wo"), grouped=True),
    "in_proj_weight": Fused(("out_proj",)),
    # GGUF: converters bring the layers of all libraries into this order.
    "attn_qkv": Fused(("attn_output", "attn_out"), grouped=True),
}

# Libraries whose classes store `qkv` and `qkv_proj` part after part, and `query_key_value` by head,
# and the model types for which this is known, also with a suffix such as `_text`.
LIBRARIES = ("timm", "torchvision", "transformers")
MODEL_TYPES = tuple(
    """
    blip bloom cohere_compass deepseek_ocr2 dots3_note ernie4_5_vl_moe exaone4_5 falcon florence
    florence2 glm4v glm5_next glm_image glm_ocr got_ocr2 gpt_neox hiera instructblip
    instructblipvideo mgp_str persimmon phi3 phi4_multimodal pp_formulanet pp_ocrv5_mobile_rec
    pp_ocrv5_server_rec pp_ocrv6_small_rec qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 qwen3_omni_moe
    qwen4_exp refinedweb refinedwebmodel sam sam2 seggpt slanext timesformer unlimited_ocr vitdet
    """.split()  # noqa: SIM905 - as a list the names would take a page
)
# Attributes of modules that order the rows of a fused projection differently: TinyViT and
# EfficientFormer have key_dim and, like LeViT, attention_biases; ChatGLM.
OTHER_ORDER = ("key_dim", "attention_biases", "multi_query_attention")
# Modules of MaxViT, where a setting that no file contains decides whether heads come first.
PERHAPS_BY_HEAD = ("attn_block", "attn_grid")
# Attention over channels (XCiT, EdgeNeXt) or with mixed heads (CaiT), recognised by an attribute,
# or by a part of the name of the class (DaViT, CoaT).
NO_TOKENS, NO_TOKENS_CLASSES = ("temperature", "proj_l"), ("Channel", "Factor")

# Attention of Keras and Flax: kernels (inputs, heads, size), and (heads, size, outputs).
KERNEL_OF_HEADS = re.compile(r"(query|key|value|qkv?|[kv])(_dense|_proj)?")
KERNEL_OF_OUTPUT = re.compile(r"out(put)?(_dense|_proj)?|attention_output")

# Gate and up of a gated layer in one projection, and the projection that takes their product.
GATED = {
    "gate_up_proj": "down_proj",
    "input_linear": "output_linear",  # Granite
    "weights_in": "weights_out",  # DINOv2
    "w12": "w3",
    "ffn_up": "ffn_down",  # GGUF, like the next one
    "ffn_gate_up_exps": "ffn_down_exps",
}
# Model types in which rows of gate and up alternate, and types with a bias of gate and up in which
# gate and up are blocks.
GATED_TURNS, GATED_BLOCKS = ("gpt_oss",), ("openai_privacy_filter",)

# Settings of a module, or of its config.
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
HEADS_OF_SIDES = ("encoder_attention_heads", "decoder_attention_heads")  # Bart and Whisper
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_heads")
SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
SIZE_IN_CONFIG = ("head_dim", "d_kv")
WIDTH = ("embed_dim", "hidden_size")  # in this order: hidden_size of Qwen2-VL is another width
ROTATED = ("rotary_emb", "rotary_ndims", "rotary_dim", "rope")
ROTATED_IN_CONFIG = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim")

# Layers that change the maps of a head, with the note that states what the maps omit.
NORMS = (
    *("q_norm", "k_norm", "query_norm", "q_layernorm", "norm_q", "norm_k", "q_ln"),
    *("attn_q_norm", "attn_k_norm"),
)
NOT_COMPARED = (
    (("pool_q", "pool_k"), "without `{}` between the two factors"),  # MViT
    # logit_scale multiplies the cosines of the second Swin.
    (("logit_scale", *NORMS), "without the norms of queries and keys (`{}`)"),
)
NOT_CARRIED = ("pool_v", "v_norm", "sub_norm", "inner_attn_ln", "attn_sub_norm")
NOT_CARRIED_IN_TIMM = ("norm", "gate")  # in other libraries these can precede the projections
