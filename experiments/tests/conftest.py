"""Every test here is marked `experiments`; property tests draw the same examples in every run."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# The same profile as in tests/, because one is for all tests of a process.
hypothesis.settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)

# Or its doctests would be looked for in a second module of this name beside that of tests/.
collect_ignore = ["conftest.py"]


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("experiments")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The path of MNIST, or a skip."""
    path = Path(os.environ.get("WELLCOND_DATA", ""))
    if not path.exists() or path == Path():
        pytest.skip("set WELLCOND_DATA to a directory or .npz that holds MNIST")
    return path
