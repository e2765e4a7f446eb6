"""Every operator equals its dense float64 twin, in every dtype and layout."""

import pytest
import torch
from torch import Tensor, nn

from registry import OPERATORS, normal
from wellcond.operators.base import Dense, Gradient, HasGram, LowRank, NewWeight, Updatable
from wellcond.operators.stacked import StackedMatrices
from wellcond.operators.stored import StoredMatrix

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STORED = [name for name, case in OPERATORS.items() if len(case.parameters()) == 1]
RESTING = [
    name
    for name, case in OPERATORS.items()
    if not isinstance(case.operator(case.parameters()), StackedMatrices)
]


def given(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The parameters of a case in another dtype, with the same gaps and memory order."""
    parameters = OPERATORS[name].parameters()
    for index, one in enumerate(parameters):
        room = torch.zeros(one.untyped_storage().size() // 8, dtype=dtype)
        copy = room.as_strided(one.shape, one.stride(), one.storage_offset())
        parameters[index] = copy.copy_(one)
    return parameters


def factors(shape: torch.Size, columns: int, dtype: torch.dtype) -> LowRank:
    *stack, m, n = shape
    c = torch.linspace(0.5, 2, max(1, stack[0] if stack else 1), dtype=dtype)
    U, V = (normal(*stack, rows, columns, dtype=dtype, seed=7) for rows in (m, n))
    return LowRank(c if stack else c[0], U, V)


def dense(form: LowRank, S: Tensor) -> Tensor:
    c, U, V = (one.double() for one in form)
    return c[..., None, None] * S + U @ V.mT


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One rounding to the storage dtype after arithmetic in float32 or wider."""
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    return {"rtol": rtol, "atol": 10 * rtol}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_products_and_norms_equal_dense_twin(name: str, dtype: torch.dtype) -> None:
    if dtype in DTYPES[2:] and "product" in name:
        pytest.skip("a product of the registry works in the dtype of its factors")
    parameters = given(name, dtype)
    S, twin = OPERATORS[name].operator(parameters), OPERATORS[name].twin(*parameters).double()
    assert S.shape == twin.shape
    assert S.nu == min(twin.shape[-2:])
    _, U, V = factors(S.shape, 3, S.dtype)
    # The matrix is exact in the working dtype; only the products are rounded.
    close = tolerance(S.dtype)
    torch.testing.assert_close(S.matmat(V).double(), twin @ V.double(), **close)
    torch.testing.assert_close(S.rmatmat(U).double(), twin.mT @ U.double(), **close)
    norm = twin.square().sum((-2, -1))
    torch.testing.assert_close(S.squared_frobenius_norm().double(), norm, **close)
    assert S.finite().all()
    if isinstance(S, StoredMatrix):
        torch.testing.assert_close(S.dense().double(), twin, rtol=0, atol=0)
        smaller = twin @ twin.mT if twin.shape[-2] < twin.shape[-1] else twin.mT @ twin
        torch.testing.assert_close(S.gram(torch.float64), smaller, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(S.gram().double(), smaller, **close)


@pytest.mark.parametrize("columns", [0, 1, 3, None], ids=lambda k: f"{k} columns")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORED)
def test_update_changes_only_the_viewed_entries(
    name: str, dtype: torch.dtype, columns: int | None
) -> None:
    """This includes views that are copies, such as those of kernels with gaps."""
    (parameter,) = given(name, dtype)
    S, before = OPERATORS[name].operator([parameter]), parameter.clone()
    assert isinstance(S, Updatable)
    twin = OPERATORS[name].twin(before).double()
    if columns is None:
        new = normal(*S.shape, dtype=dtype, seed=3)
        expected = new.double()
        S.update_(NewWeight(new))
    else:
        form = factors(S.shape, columns, S.dtype)
        expected = dense(form, twin)
        S.update_(NewWeight(form))
    after = OPERATORS[name].twin(parameter).double()
    torch.testing.assert_close(after, expected, **tolerance(dtype))
    torch.testing.assert_close(S.dense().double(), after, rtol=0, atol=0)
    # The rest of the parameter and of the storage around it is unchanged.
    touched = torch.zeros_like(before)
    OPERATORS[name].operator([touched]).update_(NewWeight(torch.ones(S.shape, dtype=dtype)))
    assert torch.equal(parameter[touched == 0], before[touched == 0])
    stored = torch.ones_like(
        torch.as_strided(
            parameter, (parameter.untyped_storage().size() // parameter.element_size(),), (1,), 0
        )
    )
    torch.as_strided(stored, parameter.shape, parameter.stride()).zero_()
    around = torch.as_strided(parameter, stored.shape, (1,), 0)[stored.bool()]
    assert not around.any()


@pytest.mark.parametrize("columns", [0, 1, 3, None], ids=lambda k: f"{k} columns")
@pytest.mark.parametrize("name", RESTING)
def test_pullback_equals_autograd(name: str, columns: int | None) -> None:
    """For the twin S(p), the gradient of <G, S(p)> is the pullback of G."""
    parameters = given(name)
    S = OPERATORS[name].operator(parameters)
    leaves = [one.detach().requires_grad_() for one in parameters]
    twin = OPERATORS[name].twin(*leaves)
    form = normal(*S.shape, seed=5) if columns is None else factors(S.shape, columns, S.dtype)
    G = dense(form, twin.detach()) if isinstance(form, LowRank) else form
    expected = torch.autograd.grad((G * twin).sum(), leaves)
    into = [torch.ones_like(one) for one in parameters]
    S.pullback_(Gradient(form), into)
    for added, one in zip(into, expected, strict=True):
        torch.testing.assert_close(added, 1 + one)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_gradients_added_in_float32(dtype: torch.dtype) -> None:
    S, G = normal(40, 33, dtype=dtype), normal(40, 33, dtype=dtype, seed=1)
    form = factors(S.shape, 2, torch.float32)
    expected = G.double() + dense(form, S.double())
    StoredMatrix(S).pullback_(Gradient(form), [G])
    torch.testing.assert_close(G.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pullback_of_nonfinite_matrix_changes_only_nonfinite_entries(
    dtype: torch.dtype,
) -> None:
    """On a device, its factors are zero; the NaN entries come from the weight itself."""
    S = normal(20, 4, dtype=dtype)
    S[3, 1] = torch.nan
    G = normal(20, 4, dtype=dtype, seed=1)
    expected = G.clone()
    expected[3, 1] = torch.nan
    for lead in ((), (1,)):
        form = LowRank(torch.zeros(lead), torch.zeros(*lead, 20, 1), torch.zeros(*lead, 4, 1))
        one = G.clone()
        StoredMatrix(S.reshape(*lead, 20, 4)).pullback_(Gradient(form), [one.view(*lead, 20, 4)])
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_forms_equal_dense_under_times_and_where(form: str) -> None:
    """Unchosen gradients are 0, and unchosen new weights are the old weights."""
    S = normal(3, 5, 4)
    low = factors(S.shape, 2, torch.float64)
    change = low if form == "low rank" else dense(low, S)
    of = lambda one: dense(one, S) if isinstance(one, LowRank) else one  # noqa: E731
    factor = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    chosen = torch.tensor([True, False, True])
    wide = chosen[:, None, None]
    torch.testing.assert_close(
        of(Gradient(change).times(factor).form), factor[:, None, None] * dense(low, S)
    )
    torch.testing.assert_close(
        of(Gradient(change).where(chosen).form), torch.where(wide, dense(low, S), 0.0)
    )
    torch.testing.assert_close(
        of(NewWeight(change).where(chosen, StoredMatrix(S)).form),
        torch.where(wide, dense(low, S), S),
    )
    again = Gradient.from_tensors(Gradient(change).code, Gradient(change).tensors)
    torch.testing.assert_close(of(again.form), dense(low, S))


def test_wider_values_rounded_stochastically_to_half_precision() -> None:
    """Rounding to nearest would always lose a quarter of the spacing."""
    S = torch.ones(400, 400, dtype=torch.bfloat16)
    step = torch.finfo(torch.bfloat16).eps / 4
    StoredMatrix(S, seed=1).update_(NewWeight(torch.full((400, 400), 1 + step)))
    # The mean of 160,000 draws is within 5 standard deviations, 4.3e-3 of a step each.
    assert abs(float(S.double().mean()) - 1 - step) < 5 * 4.4e-3 * step


def test_capabilities_by_isinstance() -> None:
    stored = OPERATORS["tall"].operator(given("tall"))
    product = OPERATORS["product"].operator(given("product"))
    for capability in (Updatable, Dense, HasGram):
        assert isinstance(stored, capability)
        assert not isinstance(product, capability)


def test_stack_expands_single_factor() -> None:
    """Such as the identity in a custom penalty, which does not know the number of weights."""
    weights = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    stack = StackedMatrices([StoredMatrix(weight) for weight in weights])
    V, U = torch.randn(2, 2), torch.randn(3, 3)
    torch.testing.assert_close(stack.matmat(V), torch.stack([W @ V for W in weights]))
    torch.testing.assert_close(stack.rmatmat(U), torch.stack([W.mT @ U for W in weights]))
