"""The warm-started subspace: Ritz values are lower bounds, converge, and handle hard matrices."""

import pytest
import torch

from wellcond.linalg.symmetric import power_eigenvector, top_eigenvector
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import (
    Subspace,
    align_sides,
    cold_start,
    refine,
    residual,
    warm_up,
)


def with_spectrum(sigma: list[float], m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return U * torch.tensor(sigma, dtype=torch.float64) @ V.mT


SPECTRA = {
    "gap": [10.0] + [1.0] * 11,
    "no gap": [1 - 0.01 * i for i in range(12)],
    "cluster at the top": [1.0, 1 - 1e-9, 1 - 2e-9, 1 - 3e-9, 0.9] + [0.5] * 7,
    "all tied": [1.0] * 12,
    "rank one": [3.0] + [0.0] * 11,
    "graded": [2.0**-i for i in range(12)],
    "scale 1e30": [1e30 * 0.8**i for i in range(12)],
    "scale 1e-30": [1e-30 * 0.8**i for i in range(12)],
}


def sweep(S: torch.Tensor, width: int, products: int) -> tuple[StoredMatrix, Subspace]:
    operator = StoredMatrix(S)
    subspace = cold_start(operator, width, "weight")
    for _ in range(products):
        _, subspace = refine(operator, subspace)
    return operator, subspace


@pytest.mark.parametrize("products", [4, 5], ids=["from the right", "from the left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_ritz_values_lower_bounds_and_bases_orthonormal(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype, products: int
) -> None:
    """Cauchy interlacing: sigma_i of S V is at most sigma_i of S, for orthonormal V."""
    S = with_spectrum(SPECTRA[spectrum], *shape).to(dtype)
    sigma = torch.linalg.svdvals(S.double() / S.abs().max()) * S.abs().max().double()
    operator, subspace = sweep(S, 4, products)
    image, after = refine(operator, subspace)
    rounding = 40 * torch.finfo(dtype).eps * sigma[0]
    assert (image.triplets.sigma.double() <= sigma[:4] + rounding).all()
    assert image.top.sigma[0].double() <= sigma[0] + rounding
    basis = after.basis
    torch.testing.assert_close(
        basis.mT @ basis, torch.eye(4, dtype=dtype), rtol=0, atol=50 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("products", [40, 41])
def test_ritz_triplets_converge_to_singular_triplets(spectrum: str, products: int) -> None:
    S = with_spectrum(SPECTRA[spectrum], 30, 12)
    operator, subspace = sweep(S, 6, products)
    image, _ = refine(operator, subspace)
    triplets = image.triplets
    left, right, sigma = triplets.left, triplets.right, triplets.sigma
    truth = torch.linalg.svdvals(S)
    # Simultaneous iteration converges like (sigma_7/sigma_i)^80. Here sigma_1 is exact up to
    # rounding, unless the block cuts a cluster that decays by 1 % per value.
    tolerance = 1e-3 if spectrum == "no gap" else 1e-8
    torch.testing.assert_close(sigma[0], truth[0], rtol=tolerance, atol=0)
    # left_i right_i^T = sigma_i u_i v_i^T acts on the range of S.
    torch.testing.assert_close(
        torch.linalg.svdvals(left @ right.mT)[:6], sigma, rtol=1e-8, atol=1e-12 * float(truth[0])
    )
    distance = (truth - sigma[0]).abs().min()
    assert distance <= residual(operator, image) + 1e-12 * truth[0]


def test_zero_and_nan_matrices_flagged_and_restarted() -> None:
    stack = torch.stack([torch.zeros(5, 4), torch.full((5, 4), torch.nan), torch.eye(5, 4)])
    stack[1, 0] = 1.0
    operator = StoredMatrix(stack)
    image, after = refine(operator, cold_start(operator, 2, "weight"))
    assert image.usable.tolist() == [False, False, True]
    assert image.finite.tolist() == [True, False, True]
    assert not after.from_right
    torch.testing.assert_close(after.basis.mT @ after.basis, torch.eye(2).expand(3, 2, 2))
    # Once the weight is sound again, two sweeps find its subspace.
    stack[:2] = 3 * torch.eye(5, 4)
    image, _ = refine(operator, warm_up(operator, after))
    torch.testing.assert_close(image.top.sigma[:, 0], torch.tensor([3.0, 3.0, 1.0]))


def test_subspace_recovers_after_orthogonal_jump() -> None:
    """Its image is zero once; the next basis must be a new one."""
    S = torch.zeros(6, 6)
    S[:2, :2] = torch.eye(2)
    operator = StoredMatrix(S)
    subspace = warm_up(operator, cold_start(operator, 2, "weight"))
    S.zero_()
    S[4:, 4:] = 2 * torch.eye(2)
    image, subspace = refine(operator, subspace)
    assert not image.usable
    image, _ = refine(operator, warm_up(operator, subspace))
    torch.testing.assert_close(image.top.sigma[0], torch.tensor(2.0))


def test_align_sides_with_one_product() -> None:
    S = with_spectrum(SPECTRA["gap"], 30, 12)
    operator = StoredMatrix(S)
    start = cold_start(operator, 3, "weight")
    _, other = refine(operator, start)
    same, turned = align_sides([operator, operator], [other, start])
    assert same is other
    assert turned.from_right is other.from_right is False
    assert torch.equal(turned.basis, other.basis)


def test_cold_start_depends_only_on_name() -> None:
    operator = StoredMatrix(torch.zeros(6, 5))
    state = torch.get_rng_state()
    first, again = (cold_start(operator, 3, "a") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, cold_start(operator, 3, "b").basis)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("eigenvalues", [[1.0, 0.9, 0.1], [1.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
def test_power_eigenvector_finds_top_eigenvector(eigenvalues: list[float], scale: float) -> None:
    basis = with_spectrum([1.0, 1.0, 1.0], 3, 3)
    gram = scale * (basis * torch.tensor(eigenvalues, dtype=torch.float64) @ basis.mT)
    vectors = power_eigenvector(gram, 14), top_eigenvector(gram)
    for vector in vectors:
        torch.testing.assert_close(
            vector @ gram @ vector, gram.new_tensor(scale), rtol=1e-9, atol=0
        )
        torch.testing.assert_close(vector.norm(), gram.new_tensor(1.0))


def test_power_eigenvector_of_zero_finite() -> None:
    assert torch.isfinite(power_eigenvector(torch.zeros(2, 3, 3), 14)).all()
