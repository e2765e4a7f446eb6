"""The role of a weight is read from its name."""

import pytest

from wellcond.weights.roles import GROUPS, ROLES, find_group, find_role


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "q",
            [
                "model.layers.0.self_attn.q_proj.weight",
                "encoder.layer.0.attention.self.query.weight",
            ],
        ),
        ("k", ["layers.0.attention.wk.weight", "h.0.attn.c_attn.weight:k"]),
        ("v", ["block.0.layer.0.SelfAttention.v.weight", "attn.qkv.weight:v", "attn:v:merged"]),
        ("qkv", ["self_attn.in_proj_weight", "in_proj_weight", "blocks.0.attn.qkv.weight"]),
        ("o", ["self_attn.out_proj.weight", "blocks.0.attn.proj.weight", "h.0.attn.c_proj.weight"]),
        ("o", ["encoder.layer.0.attention.output.dense.weight", "attn1.to_out.0.weight"]),
        (
            "o",
            ["block.0.layer.0.SelfAttention.o.weight", "gpt_neox.layers.0.attention.dense.weight"],
        ),
        ("up", ["h.0.mlp.c_fc.weight", "layers.0.linear1.weight", "mlp.up_proj.weight"]),
        ("up", ["encoder.layer.0.intermediate.dense.weight", "experts.gate_up_proj:up:1"]),
        ("gate", ["mlp.gate_proj.weight", "block_sparse_moe.experts.0.w1.weight"]),
        (
            "down",
            ["h.0.mlp.c_proj.weight", "encoder.layer.0.output.dense.weight", "layers.0.fc2.weight"],
        ),
        ("embedding", ["wte.weight", "model.embed_tokens.weight", "word_embeddings.weight"]),
        ("head", ["lm_head.weight", "classifier.weight", "head.weight"]),
        (
            "",
            [
                "block_sparse_moe.gate.weight",
                "mixer.in_proj.weight",
                "features.0.weight",
                "fc1.weight",
            ],
        ),
        ("", ["weight", "0.weight", "conv1.weight:kernel", "self_attn:qk3", "q_norm.weight"]),
    ],
)
def test_roles_are_read_from_names(role: str, names: list[str]) -> None:
    for name in names:
        assert find_role(*name.split(":", 1)) == role, name


def test_every_role_is_in_one_group() -> None:
    assert len(set(ROLES)) == len(ROLES)
    assert find_group("h.0.attn.c_attn.weight", "q") == "attention"
    assert find_group("features.0.weight") == ""
    assert set(GROUPS) == {"attention", "mlp", "embedding", "head"}
