"""A stored matrix does what its dense float64 twin does, in every dtype and layout."""

import pytest
import torch

from wellcond.operators.stored import StoredMatrix

SHAPES = [(7, 5), (5, 7), (1, 6), (6, 1), (40, 33), (3, 7, 5), (2, 1, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_equals_its_dense_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *stack, m, n = shape
    S = normal(*shape, dtype=dtype)
    operator = StoredMatrix(S)
    V, U = (normal(*stack, rows, 3).to(operator.dtype) for rows in (n, m))
    twin = S.double()
    # The matrix is exact in the working dtype; what is left is the rounding of the products.
    close = {"rtol": 1e-5, "atol": 1e-5} if operator.dtype == torch.float32 else {}
    compare = torch.testing.assert_close
    compare(operator.matmat(V).double(), twin @ V.double(), **close)
    compare(operator.rmatmat(U).double(), twin.mT @ U.double(), **close)
    compare(operator.squared_frobenius_norm().double(), twin.square().sum((-2, -1)), **close)
    compare(operator.dense().double(), twin, rtol=0, atol=0)
    assert operator.nu == min(m, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_their_dense_twins(
    shape: tuple[int, ...], columns: int, dtype: torch.dtype
) -> None:
    *stack, m, n = shape
    S, G = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype).flip(-1).contiguous()
    operator = StoredMatrix(S)
    U, V = (normal(*stack, rows, columns).to(operator.dtype) for rows in (m, n))
    c = torch.linspace(0.5, 2, max(1, len(stack) and stack[0]), dtype=operator.dtype)
    c = c if stack else c[0]
    added = c[..., None, None].double() * S.double() + U.double() @ V.double().mT
    gradient = G.double() + added
    StoredMatrix(G).add_(c, operator, U, V)
    operator.update_(c, U, V)
    # One rounding to the storage dtype after arithmetic in float32 or wider.
    rtol = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(G.double(), gradient, rtol=rtol, atol=10 * rtol)
    torch.testing.assert_close(S.double(), added, rtol=rtol, atol=10 * rtol)


def test_a_transposed_view_is_updated_in_place() -> None:
    stored = normal(4, 6)
    before = stored.clone()
    U, V = normal(6, 2), normal(4, 2)
    StoredMatrix(stored.mT).update_(torch.tensor(2.0, dtype=torch.float64), U, V)
    torch.testing.assert_close(stored, 2 * before + V @ U.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_a_matrix_that_is_not_finite_only_these_entries_reach_a_gradient(
    dtype: torch.dtype,
) -> None:
    """On a device its factors are zero; the entries that stay are NaN in the weight already."""
    S = normal(20, 4, dtype=dtype)
    S[3, 1] = torch.nan
    G = normal(20, 4, dtype=dtype)
    expected = G.clone()
    expected[3, 1] = torch.nan
    for c in (torch.zeros(()), torch.zeros(1)):
        one = G.clone()
        if c.ndim:
            StoredMatrix(one[None]).add_(
                c, StoredMatrix(S[None]), torch.zeros(1, 20, 1), torch.zeros(1, 4, 1)
            )
        else:
            StoredMatrix(one).add_(c, StoredMatrix(S), torch.zeros(20, 1), torch.zeros(4, 1))
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)
