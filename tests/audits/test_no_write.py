"""Measuring does not change its inputs: weights, buffers, modes, arrays and files."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wellcond as wc


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.inner.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 6))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "grouped and transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(5, 3)),
    "new spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(5, 3)),
    "new weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Dropout()),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "stack": Experts,
    "tied": Tied,
    "recurrent": lambda: nn.LSTM(4, 3),
}

Snapshot = dict[str, Any]


def digest(tensor: Tensor) -> str:
    """A digest of the bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def snapshot(model: nn.Module) -> Snapshot:
    """The state that a measurement could change: values, versions, gradients, modes, hooks."""
    found: Snapshot = {"random": digest(torch.get_rng_state())}
    for name, module in model.named_modules():
        found[name] = (type(module), module.training, len(module._forward_pre_hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} tensor"] = (
            *(id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad),
            *(tensor.grad, digest(tensor)),
        )
    return found


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param()
    return made


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_audit_does_not_change_the_model(model: nn.Module, training: bool) -> None:
    model.train(training)
    before = snapshot(model)
    report = wc.audit(model, certify=True)
    assert report.findings
    assert snapshot(model) == before


MATRICES: dict[str, Tensor] = {
    "plain": torch.randn(5, 3),
    "transposed": torch.randn(3, 5, dtype=torch.float64).T,
    "half": torch.randn(4, 4).half(),
    "parameter": nn.Parameter(torch.randn(4, 6)),
    "complex": torch.randn(4, 3, dtype=torch.complex64),
    "singular": torch.ones(3, 3),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("measure", [wc.condition_number, wc.certify])
def test_measurement_does_not_change_the_matrix(
    measure: Callable[[Tensor], object], matrix: Tensor
) -> None:
    before = (digest(matrix), matrix._version, matrix.data_ptr(), matrix.requires_grad)
    measure(matrix)
    assert (digest(matrix), matrix._version, matrix.data_ptr(), matrix.requires_grad) == before


def test_audit_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.randn(4, 3)}, path)
    path.chmod(0o444)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert wc.audit(path).findings
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [*tmp_path.iterdir()] == [path]
