"""Clips of small blocks, against singular value decompositions in float64."""

import math

import pytest
import torch
from torch import Tensor

from matrices import with_spectrum
from wellcond.linalg.symmetric import Clip, _clip_factor_by_products, clip_blocks

MOST, FLAT = 3.0, 1e-2


def clip(Z: Tensor) -> Clip:
    (one,) = clip_blocks([Z], MOST, FLAT)
    return one


def clipped(Z: Tensor) -> Tensor:
    """Z with its singular values clipped to 1, by an SVD."""
    U, sigma, Vh = torch.linalg.svd(Z.double(), full_matrices=False)
    return (U * sigma.clamp_max(1)[..., None, :]) @ Vh


def block(m: int, *sigma: float) -> Tensor:
    return with_spectrum(torch.tensor(sigma, dtype=torch.float64), m, len(sigma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sigma", [(2.9, 1.5, 1.5, 1.0, 0.3), (1.001, 1e-3), (2.0,), (1.2, 0.0, 0.0), (2.0, 2.0)]
)
def test_clip_matches_svd(sigma: tuple[float, ...], dtype: torch.dtype) -> None:
    Z = block(40, *sigma).to(dtype)
    factor, _, extremes = clip(Z)
    assert factor is not None
    torch.testing.assert_close(Z + Z @ factor, clipped(Z).to(dtype), atol=3e-6, rtol=0)
    ends = torch.tensor([min(sigma), max(sigma)], dtype=dtype).square()
    torch.testing.assert_close(extremes, ends, atol=1e-5, rtol=1e-5)


def test_batched_blocks_match_single_blocks() -> None:
    blocks = [
        block(40, 2.0, 1.1, 0.5),
        block(9, 1.7),
        torch.stack([block(12, 1.5, 0.2), block(12, 0.9, 0.8)]),
        block(7, 0.9, 0.5),
    ]
    for Z, one in zip(blocks, clip_blocks(blocks, MOST, FLAT), strict=True):
        by_itself = clip(Z)
        assert (one.factor is None) == (by_itself.factor is None) == (Z is blocks[3])
        if one.factor is not None and by_itself.factor is not None:
            assert one.factor.shape == by_itself.factor.shape
            torch.testing.assert_close(one.factor, by_itself.factor, atol=1e-12, rtol=0)
        torch.testing.assert_close(one.extremes[..., 1], by_itself.extremes[..., 1])


def test_root_orthonormalises_a_block_or_is_none() -> None:
    for Z in (block(40, 2.0, 1.1, 0.05).float(), torch.stack([block(9, 5.0, 0.1).float()] * 2)):
        root = clip(Z).root
        assert root is not None
        U = Z @ root
        eye = torch.eye(Z.shape[-1]).expand(*Z.shape[:-2], -1, -1)
        torch.testing.assert_close(U.mT @ U, eye, atol=1e-3, rtol=0)
    assert clip(block(40, 2.0, 1e-3)).root is None
    assert clip(torch.zeros(5, 2)).root is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_block_is_marked_and_others_unaffected(bad: float) -> None:
    good = block(12, 2.0, 0.5)
    broken = good.clone()
    broken[3, 1] = bad
    stacked, single, zero = clip_blocks(
        [torch.stack([good, broken]), broken, torch.zeros(3, 1).double()], MOST, FLAT
    )
    assert stacked.factor is not None
    torch.testing.assert_close(good + good @ stacked.factor[0], clipped(good))
    assert not stacked.factor[1].any()
    assert stacked.root is None
    assert stacked.extremes[1].isnan().all()
    assert stacked.extremes[0].isfinite().all()
    assert single.factor is None
    assert single.extremes.isnan().all()
    assert zero.factor is None
    assert zero.extremes.tolist() == [0.0, 0.0]


def test_block_above_most_is_unchanged() -> None:
    far, near = block(12, 3.1, 1.5), block(12, 2.9, 1.5)
    factor = clip(torch.stack([far, near])).factor
    assert factor is not None
    assert not factor[0].any()
    torch.testing.assert_close(near + near @ factor[1], clipped(near))
    assert clip(far).factor is None


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_block_far_from_the_bound_needs_no_clip(scale: float) -> None:
    found = clip((block(12, 1.0, 0.5) * scale).float())
    assert found.factor is None
    assert (float(found.extremes[1]) > 1) == (scale > 1)


@pytest.mark.parametrize("k", [1, 2, 16])
def test_products_clip_to_1e_3(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    sigma = 0.2 + 2.6 * torch.rand(k, generator=generator, dtype=torch.float64)
    Z = block(40, *sigma.tolist())
    factor = _clip_factor_by_products((Z.mT @ Z).float()).double()
    torch.testing.assert_close(Z + Z @ factor, clipped(Z), atol=2e-3, rtol=0)


def test_products_give_zero_for_nonfinite_and_zero_matrices() -> None:
    G = torch.zeros(2, 3, 3)
    G[1, 0, 0] = math.nan
    assert not _clip_factor_by_products(G)[1].any()
    torch.testing.assert_close(_clip_factor_by_products(G)[0], torch.zeros(3, 3), atol=1e-4, rtol=0)
