"""The role of a weight in its network, by its name: q, k, v, o, up, gate, down, embedding or head.

The names are those of transformers, timm, torch, fairseq, GPT-NeoX, GPT-2, BERT, T5, Llama and
llama.cpp. A name that does not determine a role has none: a guess would mislead.
"""

from __future__ import annotations

import re

GROUPS = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("up", "gate", "down"),
    "embedding": ("embedding",),
    "head": ("head",),
}
ROLES = tuple(role for roles in GROUPS.values() for role in roles)
_GROUP_OF = {role: group for group, roles in GROUPS.items() for role in roles}
# Patterns for names without their last part, "weight"; the first match decides.
_PATTERNS = tuple(
    (role, re.compile(rf"(?:^|\.)(?:{'|'.join(patterns)})(?:\.\d+)?$"))
    for role, patterns in (
        (
            "head",
            ("lm_head", "head", "classifier", "score", "embed_out", "logits", r"(?<!\.)output"),
        ),
        (
            "qkv",
            (
                "c_attn",
                "qkv",
                "Wqkv",
                "qkv_proj",
                "attn_qkv",
                "query_key_value",
                r"\w*(?i:attn|attention)\w*\.in_proj",
                "in_proj_weight",
            ),
        ),
        (
            "q",
            (
                "q",
                "wq",
                r"(?:cross_)?attn_q(?:_[ab])?",
                "to_q",
                "q_lin",
                "linear_q",
                "query(?:_proj)?",
                "q(?:_[ab])?_proj",
            ),
        ),
        (
            "k",
            (
                "k",
                "wk",
                r"(?:cross_)?attn_k",
                "to_k",
                "k_lin",
                "linear_k",
                "key(?:_proj)?",
                "k_proj",
            ),
        ),
        (
            "v",
            (
                "v",
                "wv",
                r"(?:cross_)?attn_v",
                "to_v",
                "v_lin",
                "linear_v",
                "value(?:_proj)?",
                "v_proj",
            ),
        ),
        (
            "o",
            (
                "o_proj",
                "(?:cross_)?attn_o(?:ut(?:put)?)?",
                "to_out",
                "out_lin",
                r"\w*(?i:attn|attention)\w*\.(?:o|wo|proj|c_proj|out_proj|dense|output\.dense)",
            ),
        ),
        (
            "gate",
            (
                "gate_proj",
                "ffn_gate(?:_exps|_shexp|_chexps)?",
                "wi_0",
                r"(?:mlp|ffn|feed_forward|experts\.\d+)\.w1",
            ),
        ),
        (
            "up",
            (
                "up_proj",
                "ffn_up(?:_exps|_shexp|_chexps)?",
                "c_fc",
                r"[^.]+\.fc_?1",
                "fc_in",
                "lin1",
                r"[^.]+\.linear1",
                "wi",
                "wi_1",
                "dense_h_to_4h",
                r"intermediate\.dense",
                r"(?:mlp|ffn|feed_forward|experts\.\d+)\.w3",
            ),
        ),
        (
            "down",
            (
                "down_proj",
                "ffn_down(?:_exps|_shexp|_chexps)?",
                r"[^.]+\.fc_?2",
                "fc_out",
                "lin2",
                r"[^.]+\.linear2",
                "dense_4h_to_h",
                r"output\.dense",
                r"(?:mlp|ffn|feed_forward|experts\.\d+|DenseReluDense)\.(?:w2|wo|c_proj)",
            ),
        ),
        ("embedding", (r"(?:\w+_)?embed(?:ding)?s?(?:_tokens)?", "w[tp]e", r"(?:\w+_)?embd")),
    )
)


def find_role(name: str, view: str = "") -> str:
    """The role of a weight, one of `ROLES`; "" if its name does not determine one.

    Args:
        name: the name of the parameter.
        view: the name of the matrix within it, such as "q" of a fused projection.

    Example:
        >>> from wellcond.weights.roles import find_role
        >>> find_role("h.0.attn.c_attn.weight", "v"), find_role("h.0.mlp.c_proj.weight")
        ('v', 'down')
    """
    first = view.partition(":")[0]
    if first in ROLES:
        return first
    module = re.sub(r"(?:\.|^)(?:weight|kernel)$", "", name)
    return next((role for role, pattern in _PATTERNS if pattern.search(module)), "")


def find_group(name: str, view: str = "") -> str:
    """The group of the role: a key of `GROUPS`, or ""."""
    return _GROUP_OF.get(find_role(name, view), "")
