"""If LAPACK does not converge, another method is used, or the error says so."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import wellcond as wc
from matrices import with_spectrum
from wellcond.linalg.spectrum import Method, compute_spectrum
from wellcond.rules.spectral import limit_condition_number

SOLVERS = ["svd", "svdvals", "eigh", "eigvalsh"]


def failing(solver: Callable[..., Any], times: float) -> Callable[..., Any]:
    """The solver, which does not converge the first `times` calls."""
    left = times

    def fails(S: Tensor, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return solver(S, **options)

    return fails


@contextlib.contextmanager
def fail(*names: str, times: float = math.inf) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.linalg, name, failing(getattr(torch.linalg, name), times))
        yield


def kappa_10(m: int, n: int) -> Tensor:
    return with_spectrum(torch.linspace(1, 0.1, min(m, n), dtype=torch.float64), m, n)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (300, 280)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_failure_changes_nothing(shape: tuple[int, int], solver: str) -> None:
    S = kappa_10(*shape)
    nearest, stored = wc.nearest(S, 3.0), limit_condition_number(S, 3.0).S
    with fail(solver, times=1):
        assert compute_spectrum(S).condition_number == pytest.approx(10.0)
    with fail(solver, times=1):
        assert float(wc.condition_number(S[None])) == pytest.approx(10.0)
    with fail(solver, times=1):
        certificate = wc.certify(S)
    assert certificate.certified
    assert certificate.computed == pytest.approx(10.0)
    with fail(solver, times=1):
        torch.testing.assert_close(wc.nearest(S, 3.0), nearest)
    with fail(solver, times=1):
        torch.testing.assert_close(limit_condition_number(S, 3.0).S, stored)


def test_without_eigenvalues_an_svd_decides() -> None:
    with fail("eigh", "eigvalsh"):
        found = compute_spectrum(kappa_10(300, 280))
    assert found.method is Method.svd
    assert found.condition_number == pytest.approx(10.0)


def test_permanent_failure_raises() -> None:
    S = kappa_10(6, 4)
    for call in (
        wc.condition_number,
        lambda S: wc.condition_number(S[None]),
        compute_spectrum,
        lambda S: wc.nearest(S, 2.0),
        lambda S: limit_condition_number(S, 2.0),
    ):
        with fail(*SOLVERS), pytest.raises(ValueError, match="LAPACK does not converge"):
            call(S)


@pytest.mark.parametrize("n", [4, 280])
def test_a_certificate_without_lapack_says_so(n: int) -> None:
    with fail(*SOLVERS):
        certificate = wc.certify(kappa_10(n, n))
    assert not certificate.certified
    assert 1.0 in certificate.sigma_max
    assert 0.1 in certificate.sigma_min
    assert "no singular value decomposition" in certificate.reason
