"""Marks all tests here as `experiments`; property tests use the same examples in every run."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# The same profile as in tests/, because a process has only one profile.
hypothesis.settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)

# Otherwise pytest would collect doctests from a second module named conftest.
collect_ignore = ["conftest.py"]


@pytest.hookimpl(tryfirst=True)  # before tests are selected by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("experiments")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """Returns the path of MNIST, or skips the test."""
    path = Path(os.environ.get("WELLCOND_DATA", ""))
    if not path.exists() or path == Path():
        pytest.skip("set WELLCOND_DATA to a directory or .npz that holds MNIST")
    return path
