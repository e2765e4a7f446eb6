"""Classes of weights by name and shape, and the committed table of quantiles."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.report.usual import ALL, COHORT, QUANTITIES, Usual, classify, usual_of

SQUARE = usual_of("layers.0.fc.weight", "", (64, 64))
UNIFORM = Usual("a", 9, 1, (0.0, 0.5, 1.0), dict.fromkeys(QUANTITIES, (1.0, 10.0, 1000.0)))
POSITIVE = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(
    ("name", "view", "shape", "expected"),
    [
        ("fc.weight", "", (64, 64), "linear, square"),
        ("fc.weight", "q", (64, 96), "linear, up to 1.5"),
        ("fc.weight", "", (97, 64), "linear, 1.5 to 3"),
        ("fc.weight", "", (64, 192), "linear, 1.5 to 3"),
        ("fc.weight", "", (64, 384), "linear, 3 to 6"),
        ("fc.weight", "", (1000, 10), "linear, above 6"),
        ("conv.weight", "kernel", (64, 64), "convolution, square"),
        ("conv.weight", "kernel", (4, 16, 144), "convolution, above 6"),
        ("conv.weight", "operator", (100, 200), "convolution, 1.5 to 3"),
        ("lstm.weight_ih_l0", "i", (64, 64), "recurrent, square"),
        ("encoder.rnn.cell", "", (64, 64), "recurrent, square"),
        ("tok_embeddings.weight", "", (1000, 64), "embedding, above 6"),
        ("wte.weight", "", (1000, 64), "embedding, above 6"),
        ("fc.weight", "", (0, 64), "linear, above 6"),
        ("fc.weight", "", (0, 0), "linear, above 6"),
    ],
)
def test_classify(name: str, view: str, shape: tuple[int, ...], expected: str) -> None:
    assert classify(name, view, shape) == expected


@given(st.text(), st.text(), st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_classify_ignores_transposition(name: str, view: str, shape: tuple[int, int]) -> None:
    assert classify(name, view, shape) == classify(name, view, shape[::-1])


def test_share_below_interpolates_in_logarithm() -> None:
    values = (0.5, 1, math.sqrt(10), 10, 100, 1000, 2000, math.inf, 0.0, -1.0)
    shares = [UNIFORM.share_below("gain", value) for value in values]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0])
    assert math.isnan(UNIFORM.share_below("gain", math.nan))


@pytest.mark.parametrize("quantity", QUANTITIES)
@given(st.lists(POSITIVE, min_size=2))
def test_share_below_is_monotonic(quantity: str, values: list[float]) -> None:
    shares = [SQUARE.share_below(quantity, value) for value in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_share_below_stored_quantile_is_level(quantity: str) -> None:
    for level in SQUARE.levels:
        value = SQUARE.quantile(quantity, level)
        assert SQUARE.share_below(quantity, value) == pytest.approx(level, abs=1e-12)


def test_quantile_refuses_other_levels() -> None:
    with pytest.raises(ValueError, match=r"`level` must be one of .*, got 0\.42"):
        SQUARE.quantile("gain", 0.42)


def test_small_class_uses_all_classes() -> None:
    assert SQUARE.name == "linear, square"
    pooled = usual_of("embed.weight", "", (9, 10))
    assert pooled.name == ALL
    assert pooled.count > SQUARE.count >= 200
    assert f"{pooled.count:,} matrices of {pooled.packages} packages" in COHORT


def test_share_below_of_usual_and_extreme_values() -> None:
    assert 0.2 < SQUARE.share_below("condition_number", 2.7) < 0.8
    assert SQUARE.share_below("condition_number", 1e6) > 0.99
    assert SQUARE.share_below("sigma_max", 500.0) > 0.99
    assert SQUARE.share_below("stable_rank", 1e-3) < 0.01
