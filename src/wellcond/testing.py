"""Tests for custom rules, and matrices with a prescribed spectrum.

A property is a function of a rule and a weight that raises an AssertionError if it does not hold.
`check_rule` checks all `PROPERTIES` on weights of many shapes and spectra.

Letters: S (..., m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc

Property = Callable[[wc.rules.Rule, Tensor], None]


def matrix_with_spectrum(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """U diag(sigma) V^T with random orthonormal U (m, nu) and V (n, nu), in float64.

    Args:
        sigma: the singular values (nu,), in any order.
        m: the number of rows.
        n: the number of columns.
        seed: the seed of the generator that draws U and V.

    Example:
        >>> import torch, wellcond as wc
        >>> from wellcond.testing import matrix_with_spectrum
        >>> S = matrix_with_spectrum(torch.tensor([6.0, 2.0]), m=5, n=2)
        >>> round(wc.condition_number(S).item(), 6)
        3.0
    """
    source = torch.Generator().manual_seed(seed)
    U, V = (_orthonormal(size, len(sigma), source) for size in (m, n))
    product: Tensor = U * sigma @ V.mT
    return product


def _orthonormal(rows: int, columns: int, source: torch.Generator) -> Tensor:
    Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=source, dtype=torch.float64)).Q
    return Q


# Functions of nu. Each comment states why the spectrum is difficult.
SPECTRA: Mapping[str, Callable[[int], Tensor]] = {
    "gap": lambda nu: torch.linspace(1, 2, nu).flip(0) + 3 * (torch.arange(nu) == 0),  # easy
    "no gap": lambda nu: 1 - 0.1 * torch.arange(nu) / nu,  # vectors are ill-defined
    "cluster": lambda nu: 1 - 1e-9 * torch.arange(nu) * (torch.arange(nu) < 3),  # nearly tied
    "tied": lambda nu: torch.where(torch.arange(nu) < 2, 2.0, 1.0),  # no gradient exists
    "semi-orthogonal": lambda nu: torch.ones(nu),  # r = 0, all tied
    "graded": lambda nu: 10.0 ** -torch.arange(nu),  # kappa grows with nu
    "rank-deficient": lambda nu: (torch.arange(nu) < max(1, nu - 1)) * 1.5,  # sigma_nu = 0
    "rank-one": lambda nu: (torch.arange(nu) == 0) * 2.0,  # the stable rank is 1
    "zero": lambda nu: torch.zeros(nu),  # kappa is nan
    "large": lambda nu: 1e30 * (1 + torch.arange(nu)).flip(0),  # squares overflow in float32
    "small": lambda nu: 1e-30 * (1 + torch.arange(nu)).flip(0),  # squares vanish in float32
}
# Tall, wide, square, 1xn and nx1, and a stack.
SHAPES = ((6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (3, 5, 4))
_EVERYWHERE = ("gap", "tied", "zero", "large")  # the other spectra use only the first shape
_LR = 0.1
# The tolerance for the margin that a limit leaves for rounding, whatever the dtype.
_MARGIN = 1e-6


def weights(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[tuple[str, Tensor]]:
    """Named weights of these shapes, with all `SPECTRA` that are finite in the dtype."""
    for *stack, m, n in shapes:
        for name, spectrum in SPECTRA.items():
            if (*stack, m, n) != SHAPES[0] and name not in _EVERYWHERE:
                continue
            sigma = spectrum(min(m, n)).double()
            each = [matrix_with_spectrum(sigma, m, n, seed) for seed in range(*stack or [1])]
            S = (torch.stack(each) if stack else each[0]).to(dtype)
            if bool(torch.isfinite(S).all()):
                yield f"{name} {tuple(S.shape)} {dtype}", S


def check_rule(
    rule: wc.rules.Rule, *, degree: float | None = None, never_raises_kappa: bool = False
) -> None:
    """Raises an AssertionError unless a custom rule satisfies the contract of wellcond's rules.

    - A step keeps a finite weight finite and preserves its shape and dtype.
    - An error names a weight that contains NaN, and the weight remains unchanged.
    - The matrices of a stack and the weights of a batch are treated independently.
    - Enforcing a limit a second time changes nothing.
    - float32 agrees with float64.
    - Training resumes bit for bit.
    - A sharded weight gets the same result as an unsharded one, on the initialised process group,
      or on one process if no group is initialised.

    Args:
        rule: a penalty, a step or a limit.
        degree: the degree of homogeneity. The value at c S must be c^degree times the value at S.
            A rule without a value must be homogeneous of degree 1: its result for c S must be c
            times its result for S.
        never_raises_kappa: also check that no step raises the condition number.

    Raises:
        AssertionError: a property does not hold; names the property, the rule and the weight.

    Example:
        >>> import wellcond as wc
        >>> from wellcond.testing import check_rule
        >>> check_rule(wc.ConditionLimit(3.0), degree=1, never_raises_kappa=True)
    """
    properties: dict[str, Property] = dict(PROPERTIES)
    if degree is not None:
        properties["scales"] = lambda rule, S: scales(rule, S, degree)
    if never_raises_kappa:
        properties["never_raises_kappa"] = globals()["never_raises_kappa"]
    with _mesh():
        for weight, S in itertools.chain(weights(), weights(torch.float32, SHAPES[:1])):
            for name, holds in properties.items():
                try:
                    holds(rule, S)
                except Exception as error:
                    raise AssertionError(
                        f"`{name}` must hold for {rule!r}, but fails for {weight}: {error}"
                    ) from error


# --- properties -----------------------------------------------------------------------------------


def survives(rule: wc.rules.Rule, S: Tensor) -> None:
    """Steps and gradients of a finite weight are finite and have its shape and dtype."""
    weight, reg = _regularize(rule, S)
    if rule.differentiable:
        reg.add_gradients()
        assert weight.grad is not None
        _assert_kept(weight.grad, S)
    if rule.steppable:
        for _ in range(2):
            reg.proximal_step(_LR)
        _assert_kept(weight.detach(), S)


def names_what_is_not_finite(rule: wc.rules.Rule, S: Tensor) -> None:
    """A ValueError names a weight that contains NaN, and the weight remains unchanged."""
    if not rule.steppable:
        return
    lost = S.clone()
    lost[..., -1, -1] = torch.nan
    weight, reg = _regularize(rule, lost)
    message = ""
    try:
        reg.proximal_step(_LR)
    except ValueError as error:
        message = str(error)
    assert '"weight" contains NaN' in message, f"no error names the weight: {message!r}"
    assert torch.equal(weight.detach().nan_to_num(), lost.nan_to_num()), "it was changed"


def treats_a_stack_as_its_matrices(rule: wc.rules.Rule, S: Tensor) -> None:
    """Each matrix of a stack gets the same result as on its own."""
    if wc.rules.Need.whole in rule.needs or S.ndim > 2:
        return
    result = _step if rule.steppable else _gradient
    other = S.flip(-1) / 2
    both = _spectrum(result(rule, torch.stack([S, other])))
    for together, alone in zip(both, (S, other), strict=True):
        _assert_near(together, _spectrum(result(rule, alone)), S)


def treats_weights_as_if_alone(rule: wc.rules.Rule, S: Tensor) -> None:
    """Weights of one shape under one rule form a batch; each gets the same result as on its own."""
    if not rule.steppable:
        return
    each = (S, S.flip(-1) / 2)
    model = nn.ModuleList([_Holder(X.clone()) for X in each])
    wc.Regularizer(model, {"0.weight": rule, "1.weight": rule}).proximal_step(_LR)
    for holder, X in zip(model, each, strict=True):
        _assert_near(_spectrum(holder.weight.detach()), _spectrum(_step(rule, X)), S)  # type: ignore[operator]


def holds_once_enforced(rule: wc.rules.Rule, S: Tensor) -> None:
    """Enforcing a hard limit a second time changes nothing."""
    if not rule.enforceable:
        return
    weight, reg = _regularize(rule, S)
    reg.enforce()
    before = weight.detach().clone()
    reg.enforce()
    assert torch.equal(weight, before), "it was changed again"


def agrees_with_float64(rule: wc.rules.Rule, S: Tensor) -> None:
    """The singular values after a step do not depend on the dtype, up to rounding."""
    if rule.steppable and S.dtype != torch.float64:
        _assert_near(_spectrum(_step(rule, S)), _spectrum(_step(rule, S.double())), S)


def resumes(rule: wc.rules.Rule, S: Tensor) -> None:
    """Training that is resumed from its state continues bit for bit."""
    if not rule.steppable:
        return
    weight, reg = _regularize(rule, S)
    reg.proximal_step(_LR)
    copy, other = _regularize(rule, weight.detach())
    other.load_state_dict(reg.state_dict())
    for one in (reg, other):
        one.proximal_step(_LR)
    assert torch.equal(weight, copy), "weights differ"
    for key, tensor in reg.state_dict()["weight"].items():
        assert torch.equal(tensor, other.state_dict()["weight"][key]), f"{key} differs"


def treats_shards_as_the_whole(rule: wc.rules.Rule, S: Tensor) -> None:
    """A weight that is sharded over processes gets the same result as on one process."""
    if not rule.steppable or wc.rules.Need.whole in rule.needs:
        return
    from torch.distributed.tensor import Shard, distribute_tensor

    with _mesh() as mesh:
        sharded = distribute_tensor(S.clone(), mesh, [Shard(0)])
        weight, reg = _regularize(rule, sharded)
        reg.proximal_step(_LR)
        whole: Any = weight.detach()
        _assert_near(_spectrum(whole.full_tensor()), _spectrum(_step(rule, S)), S)


# The properties that `check_rule` demands of every rule.
PROPERTIES: Mapping[str, Property] = {
    one.__name__: one
    for one in (
        survives,
        names_what_is_not_finite,
        treats_a_stack_as_its_matrices,
        treats_weights_as_if_alone,
        holds_once_enforced,
        agrees_with_float64,
        resumes,
        treats_shards_as_the_whole,
    )
}


def scales(rule: wc.rules.Rule, S: Tensor, degree: float) -> None:
    """The value is homogeneous of this degree; without a value, the step is of degree 1."""
    for c in (0.5, 4.0):
        if rule.differentiable:
            value, other = (_regularize(rule, X)[1]().item() for X in (S, c * S))
            expected = value * c**degree
            tolerance = 1e-3 * max(abs(expected), 1e-30) + 1e-6 * abs(c**degree)
            near = other == expected or abs(other - expected) <= tolerance
            assert near or math.isinf(other), (other, expected)
        else:
            _assert_near(_spectrum(_step(rule, c * S)), c * _spectrum(_step(rule, S)), c * S)


def never_raises_kappa(rule: wc.rules.Rule, S: Tensor) -> None:
    """No step raises the condition number of a weight of full rank."""
    sigma = _spectrum(S)
    if rule.steppable and bool((sigma[..., -1] > 1e-5 * sigma[..., 0]).all()):
        after = _spectrum(_step(rule, S))
        room = 1 + _MARGIN + 1e3 * torch.finfo(S.dtype).eps * sigma[..., 0] / sigma[..., -1]
        before = sigma[..., 0] / sigma[..., -1]
        assert bool((after[..., 0] / after[..., -1] <= before * room).all()), (before, after)


# --- helpers --------------------------------------------------------------------------------------


class _Holder(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _regularize(rule: wc.rules.Rule, S: Any) -> tuple[nn.Parameter, wc.Regularizer]:
    model = _Holder(S.detach().clone())
    return model.weight, wc.Regularizer(model, {"weight": rule})


def _step(rule: wc.rules.Rule, S: Tensor) -> Tensor:
    weight, reg = _regularize(rule, S)
    reg.proximal_step(_LR)
    return weight.detach()


def _gradient(rule: wc.rules.Rule, S: Tensor) -> Tensor:
    weight, reg = _regularize(rule, S)
    reg.add_gradients()
    assert weight.grad is not None
    return weight.grad


def _spectrum(S: Tensor) -> Tensor:
    sigma: Tensor = torch.linalg.svdvals(S.double())
    return sigma


def _assert_kept(X: Tensor, S: Tensor) -> None:
    assert (X.shape, X.dtype) == (S.shape, S.dtype), (X.shape, X.dtype)
    assert bool(torch.isfinite(X).all()), "it is not finite"


def _assert_near(sigma: Tensor, expected: Tensor, S: Tensor) -> None:
    """Asserts equality up to rounding in the dtype of S, relative to the largest value."""
    unit = max(float(expected.max()), float(_spectrum(S).max()), torch.finfo(S.dtype).tiny)
    error = float((sigma - expected).abs().max()) / unit
    assert error <= max(1e5 * torch.finfo(S.dtype).eps, _MARGIN), (sigma, expected)


@contextlib.contextmanager
def _mesh() -> Iterator[Any]:
    """Yields a mesh of all processes of the initialised group, or of this process only."""
    distributed = torch.distributed
    own = not distributed.is_initialized()
    if own:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        size = distributed.get_world_size()
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (size,))
    finally:
        if own:
            distributed.destroy_process_group()
