"""What the host concludes from looks: how close the next one is, and when to decompose."""

import pytest

from wellcond.rules.watch import TopWatch
from wellcond.training.record import Record


def judge(record: Record, watch: TopWatch, least: float, most: float) -> bool:
    """A step and its look, which shows these singular values."""
    record.count(1e-3)
    record.judge(watch.judge([[least**2, most**2]], False), watch)
    return record.due


def followed() -> Record:
    """Of a weight that was decomposed, after its first steps."""
    record, watch = Record(known=True), TopWatch(1.0, 128)
    for _ in range(30):
        judge(record, watch, 0.5, 1.0)
    return record


def test_a_jump_is_decomposed_and_a_steady_move_as_far_is_followed() -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    assert judge(record, watch, 0.5, 1.8)
    record.decompose(1.8, 2.0, moved=True, known=True)
    assert not judge(record, watch, 0.5, 1.85)
    assert judge(record, watch, 0.5, 2.5)


@pytest.mark.parametrize(("least", "most"), [(0.95, 1.0), (0.5, TopWatch.FAR)])
def test_what_a_block_cannot_tell_is_decomposed_however_steady(least: float, most: float) -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    for _ in range(3):
        assert judge(record, watch, least, most)


@pytest.mark.parametrize(("least", "most"), [(0.5, 1.2), (0.88, 1.0)])
def test_a_look_is_closer_after_one_that_shows_a_swift_or_crowded_block(
    least: float, most: float
) -> None:
    record, watch = followed(), TopWatch(1.0, 128)
    assert record.count(1e-3) == 1
    judge(record, watch, least, most)
    assert record.count(1e-3) == 2
    judge(record, watch, 0.5, 1.0)
    assert record.count(1e-3) == 1


def test_a_block_begins_on_the_short_side_after_a_decomposition() -> None:
    record = followed()
    record.products = 3
    record.decompose(1.0, 2.0, moved=False, known=True)
    assert record.products == 0


def test_a_record_survives_its_tensor() -> None:
    record = followed()
    record.closeness, record.products = 2, 5
    assert Record.from_tensor(record.to_tensor()) == record
