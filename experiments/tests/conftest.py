"""Every test here is marked `experiments`; property tests draw the same examples in every run."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("experiments", deadline=None, derandomize=True)
hypothesis.settings.load_profile("experiments")
torch.set_num_threads(1)


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
