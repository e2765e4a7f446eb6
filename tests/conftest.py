"""Property tests draw the same examples in every run."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist() -> Path:
    """Where MNIST lies, or a skip."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "mnist.npz"
    path = Path(os.environ.get("WELLCOND_DATA", beside))
    if not path.exists():
        pytest.skip("MNIST is not here: set WELLCOND_DATA to a directory or .npz that holds it")
    return path
