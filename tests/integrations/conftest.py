"""Every test begins with the environment that it would have alone."""

import pytest


@pytest.fixture(autouse=True)
def _precision_of_no_other_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of transformers before 5 leave theirs in the environment, where the next one that
    asks for none takes it up."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
