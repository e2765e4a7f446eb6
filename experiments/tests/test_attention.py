"""Small transformers: their inputs, attention logits and weight names."""

import math

import pytest
import torch

from wellcond.weights.roles import find_group
from wellcond_experiments.attention import Attention, ImageTransformer, TextTransformer
from wellcond_experiments.methods import matrices, run_seeded


@pytest.mark.parametrize(("side", "norm"), [(8, False), (28, True)])
def test_output_depends_on_all_pixels_of_its_image_only(side: int, norm: bool) -> None:
    model = run_seeded(lambda: ImageTransformer(side, norm), 0)
    x = torch.rand(2, side**2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x)[0, 0].backward()
    assert x.grad is not None
    assert bool((x.grad[0] != 0).all())
    assert not x.grad[1].any()  # another image


@pytest.mark.parametrize("norm", [False, True])
def test_text_attention_is_causal(norm: bool) -> None:
    model = run_seeded(lambda: TextTransformer(5, 6, norm, width=8), 0)
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])
    before = model(x)
    for place in range(6):
        changed = x.clone()
        changed[0, place] = (x[0, place] + 1) % 5
        differs = (model(changed) != before).any(-1)[0]
        assert differs.tolist() == [other >= place for other in range(6)]


@pytest.mark.parametrize("causal", [False, True])
def test_largest_logit_equals_direct_computation(causal: bool) -> None:
    attention = run_seeded(lambda: Attention(8, False, causal), 0)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    query, key = attention.q_proj(x).detach(), attention.k_proj(x).detach()
    products = [
        abs(float(query[b, i, h : h + 2] @ key[b, j, h : h + 2])) / 2**0.5
        for b in range(2)
        for h in range(0, 8, 2)
        for i in range(5)
        for j in range(5)
        if j <= i or not causal
    ]
    assert float(attention.largest_logit(x).detach()) == pytest.approx(max(products), rel=1e-5)


def test_largest_logit_of_a_model_covers_its_blocks() -> None:
    model = run_seeded(lambda: TextTransformer(5, 6, False, width=8), 0)
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])
    first = model.blocks[0]
    one = first.attention.largest_logit(first.before_attention(model.embed(x)))
    assert model.largest_logit(x) >= float(one.detach())
    with torch.no_grad():
        first.attention.q_proj.weight.fill_(torch.nan)
    assert math.isnan(model.largest_logit(x))


def test_weight_names_give_their_roles() -> None:
    model = run_seeded(lambda: TextTransformer(5, 6, False, width=8, blocks=1), 0)
    groups = {name: find_group(f"{name}.weight") for name, _ in matrices(model)}
    assert groups == {
        **{f"blocks.0.attention.{one}_proj": "attention" for one in "qkvo"},
        **{f"blocks.0.mlp.{one}_proj": "mlp" for one in ("up", "down")},
        "head": "head",
    }
