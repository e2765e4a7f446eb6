"""The promised properties of rules, for every rule: a table of rules times properties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wellcond as wc
from wellcond.testing import PROPERTIES, check_rule, matrix_with_spectrum, never_raises_kappa


class Decay(wc.Penalty):
    """The example of docs/penalty.md."""

    needs = frozenset()

    def evaluate(self, S: Any, image: Any) -> tuple[Tensor, wc.rules.Gradient]:
        value = S.squared_frobenius_norm() / 2
        return value, wc.rules.Gradient(self.multiple(S, torch.ones_like(value)))

    def proximal_step(self, S: Any, image: Any, eta: Tensor) -> tuple[wc.rules.NewWeight, Tensor]:
        c = (1 / (1 + eta)).expand(S.shape[:-2])
        return wc.rules.NewWeight(self.multiple(S, c)), torch.zeros_like(c, dtype=torch.bool)

    def multiple(self, S: Any, c: Tensor) -> wc.rules.LowRank:
        *stack, m, n = S.shape
        return wc.rules.LowRank(c, c.new_zeros(*stack, m, 0), c.new_zeros(*stack, n, 0))


class NoLargeEntry(wc.Limit):
    """The example of docs/penalty.md."""

    def apply(self, S: Tensor) -> Tensor:
        return S.clamp(-1, 1)


# Each rule with its degree of homogeneity, and whether it never raises kappa.
RULES: list[tuple[wc.rules.Rule, float | None, bool]] = [
    (wc.ConditionPenalty(0.3), 2, True),
    (wc.TikhonovPenalty(0.3), 2, True),
    (wc.StableRankPenalty(0.3), 0, True),
    (wc.SpectralNormPenalty(0.3, target=0.5), None, True),
    (wc.OrthogonalityPenalty(0.3, scale=0.7), None, True),
    (wc.IsometryStep(), 1, True),
    (wc.ConditionLimit(3.0), 1, True),
    (wc.ConditionLimit(3.0, upper=1.5), None, True),
    (wc.SingularValueLimit(upper=1.5), None, True),
    (wc.SingularValueLimit(lower=0.5, upper=1.5), None, True),
    (Decay(0.3), 2, True),
    (NoLargeEntry(), None, False),
]


@pytest.mark.parametrize(("rule", "degree", "lowers"), RULES, ids=lambda x: type(x).__name__)
def test_rule_has_the_promised_properties(
    rule: wc.rules.Rule, degree: float | None, lowers: bool
) -> None:
    check_rule(rule, degree=degree, never_raises_kappa=lowers)


class Doubles(wc.Limit):
    """Raises kappa, forgets the dtype, and hides NaN."""

    def apply(self, S: Tensor) -> Tensor:
        return S * torch.linspace(1, 2, S.shape[-1], dtype=S.dtype)


class Explodes(Decay):
    def proximal_step(self, S: Any, image: Any, eta: Tensor) -> tuple[wc.rules.NewWeight, Tensor]:
        c = torch.full(S.shape[:-2], torch.inf, dtype=S.dtype)
        return wc.rules.NewWeight(self.multiple(S, c)), torch.zeros_like(c, dtype=torch.bool)


class Draws(Decay):
    def proximal_step(self, S: Any, image: Any, eta: Tensor) -> tuple[wc.rules.NewWeight, Tensor]:
        c = torch.rand(S.shape[:-2], dtype=S.dtype)
        return wc.rules.NewWeight(self.multiple(S, c)), torch.zeros_like(c, dtype=torch.bool)


class FirstOnly(Decay):
    """Does not support a stack."""

    def proximal_step(self, S: Any, image: Any, eta: Tensor) -> tuple[wc.rules.NewWeight, Tensor]:
        c = S.squared_frobenius_norm().flatten()[0].expand(S.shape[:-2]) / 100
        return wc.rules.NewWeight(self.multiple(S, c)), torch.zeros_like(c, dtype=torch.bool)


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (Explodes(0.1), "survives"),
        (Draws(0.1), "resumes"),
        (FirstOnly(0.1), "treats_a_stack_as_its_matrices"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_check_rule_detects_broken_property(rule: wc.rules.Rule, broken: str) -> None:
    S = matrix_with_spectrum(torch.tensor([3.0, 2.0, 1.0]), 5, 3)
    with pytest.raises((AssertionError, ValueError)):
        PROPERTIES[broken](rule, S)
    with pytest.raises(AssertionError, match="must hold for"):
        check_rule(rule)


def test_never_raises_kappa_detects_violation() -> None:
    S = matrix_with_spectrum(torch.tensor([3.0, 2.0, 1.0]), 5, 3)
    with pytest.raises(AssertionError):
        never_raises_kappa(Doubles(), S)


def _parts(rule: wc.rules.Rule) -> dict[str, Callable[..., Any]]:
    return {name: getattr(rule, name) for name in ("step", "project", "watch", "learn")}


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=lambda x: type(x).__name__)
def test_rule_implements_the_protocol(rule: wc.rules.Rule) -> None:
    assert all(map(callable, _parts(rule).values()))
    state = rule.init(torch.Size([2, 5, 3]))
    assert all(isinstance(one, Tensor) for one in state.values())
    restored = rule.restore(state, {})
    assert restored.keys() == state.keys()
    assert hash(rule.group_key()) == hash(rule.group_key())
    assert rule.describe(state) == ""
