"""What the host concludes from checks: the products of the next one, and when to decompose."""

import pytest

from wellcond.rules.watch import TopWatch
from wellcond.training.record import Record


def judge(record: Record, watch: TopWatch, least: float, most: float) -> bool:
    """A step and its check, which estimates these singular values."""
    record.count(1e-3)
    record.judge(watch.judge([[least**2, most**2]], False), watch)
    return record.due


def followed() -> Record:
    """The record of a weight that was decomposed, after its first steps."""
    record, watch = Record(known=True), TopWatch(1.0, 128)
    for _ in range(30):
        judge(record, watch, 0.5, 1.0)
    return record


def test_jump_is_decomposed_and_steady_move_is_not() -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    assert judge(record, watch, 0.5, 1.8)
    record.decompose(1.8, 2.0, moved=True, known=True)
    assert not judge(record, watch, 0.5, 1.85)
    assert judge(record, watch, 0.5, 2.5)


@pytest.mark.parametrize(("least", "most"), [(0.95, 1.0), (0.5, TopWatch.FAR)])
def test_blind_check_is_decomposed(least: float, most: float) -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    for _ in range(3):
        assert judge(record, watch, least, most)


@pytest.mark.parametrize(("least", "most"), [(0.5, 1.2), (0.88, 1.0)])
def test_next_check_takes_more_products_after_an_alert(least: float, most: float) -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    assert record.count(1e-3) == 1
    judge(record, watch, least, most)
    assert record.count(1e-3) == 2
    judge(record, watch, 0.5, 1.0)
    assert record.count(1e-3) == 1


def test_block_starts_on_the_short_side_after_a_decomposition() -> None:
    record = followed()
    record.products = 3
    record.decompose(1.0, 2.0, moved=False, known=True)
    assert record.products == 0


def test_record_tensor_round_trip() -> None:
    record = followed()
    record.closeness, record.products = 2, 5
    assert Record.from_tensor(record.to_tensor()) == record
