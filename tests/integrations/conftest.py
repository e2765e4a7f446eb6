"""Gives every test the environment that it would have if it ran alone."""

import pytest


@pytest.fixture(autouse=True)
def _precision_of_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets the precision that a Trainer of transformers before 5 leaves in the environment.

    The next Trainer would use this precision if its arguments do not set one.
    """
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
