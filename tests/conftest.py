"""Makes property tests draw the same examples in every run, and runs long tests first."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)
collect_ignore_glob = ["*/write_*.py"]  # scripts that need other libraries to write test data


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds marks by folder, and moves long tests to the front, so that none is last in a worker."""
    for item in items:
        if item.path.parent.name == "integrations":
            item.add_marker("frameworks")
    items.sort(key=lambda item: not {"slow", "distributed"} & {m.name for m in item.iter_markers()})


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The path of MNIST, which no test downloads."""
    path = os.environ.get("WELLCOND_DATA")
    if path is None:
        pytest.skip("set WELLCOND_DATA to a directory or .npz file that holds MNIST")
    return Path(path)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns the messages that wellcond has logged so far."""
    caplog.set_level(logging.WARNING, "wellcond")
    return lambda: [record.getMessage() for record in caplog.records]
