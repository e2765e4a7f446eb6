"""float32 means float32, whatever the settings of the process, the model or the default device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.operators.rounding import full_precision


@pytest.fixture
def coarse_products() -> Iterator[None]:
    """Settings with which trainers enable TF32, and bfloat16 on a CPU that has it."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def precisions() -> list[object]:
    """The settings that determine the precision of float32 products, without coarse products."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        return [backend.fp32_precision for backend in backends]
    return [torch.get_float32_matmul_precision()]


def test_full_precision_is_set_and_restored(coarse_products: None) -> None:
    before = precisions()
    with full_precision("cpu"):
        inside = precisions()
    assert set(inside) <= {"ieee", "none", "highest"}
    assert not set(before) & {"ieee", "none", "highest"}
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == "medium"


def test_precision_setting_is_restored_after_an_error(coarse_products: None) -> None:
    with pytest.raises(RuntimeError, match="here"), full_precision("cpu"):
        raise RuntimeError("here")
    assert torch.get_float32_matmul_precision() == "medium"


def test_precision_setting_of_one_backend_is_restored() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all backends")
    matmul.fp32_precision = "tf32"
    try:
        with full_precision("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"


def run(model: nn.Module) -> dict[str, Tensor]:
    """All results of a regulariser for a model."""
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
    reg().backward()
    reg.add_gradients()
    reg.proximal_step(0.1)
    found = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, estimate in reg.measure().items():
        found[f"sigma {name}"] = torch.tensor(estimate.sigma_max, device="cpu")
    for name, state in reg.state_dict().items():
        found |= {f"{name} {key}": value for key, value in state.items()}
    return found


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 200), nn.Linear(200, 200))
    return model


def test_results_do_not_depend_on_matmul_precision() -> None:
    expected = run(layers())
    model = layers()
    torch.set_float32_matmul_precision("medium")
    try:
        found = run(model)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_results_do_not_depend_on_the_default_device() -> None:
    """A tensor created without a device would be on meta, and fail."""
    expected = run(layers())
    model = layers()
    with torch.device("meta"):
        found = run(model)
        monitor = wc.Monitor(model, condition_numbers=True)
        kappas = [estimate.condition_number for estimate in monitor.measure().values()]
        reg = wc.Regularizer(model, wc.ConditionLimit(50.0))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reg.attach(optimizer, every=1)
        optimizer.step()
        reg.load_state_dict(reg.state_dict())
        wc.proximal_step(model[0].weight, 0.1)
        wc.condition_penalty(model[0].weight).backward()
    assert len(kappas) == 3
    for name, value in found.items():
        assert value.device.type == "cpu", name
        assert torch.equal(value, expected[name]), name
    for kappa in kappas:
        assert kappa is not None
        assert kappa > 1
    assert float(wc.condition_number(model[0].weight)) <= 50


@pytest.mark.parametrize("way", ["loss", "gradients", "proximal", "measure"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_dtype_changes_after_construction(dtype: torch.dtype, way: str) -> None:
    """Also when the subspace is already warm; float64 weights are processed in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 16))
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=16)
    for _ in range(4):
        reg.add_gradients()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg.attach(optimizer, every=1)
    model.to(dtype)
    model.zero_grad()
    match way:
        case "loss":
            reg().backward()
            assert model[0].weight.grad.dtype == dtype
        case "gradients":
            reg.add_gradients()
            assert model[0].weight.grad.dtype == dtype
        case "proximal":
            before = float(wc.condition_penalty(model[0].weight.double()))
            reg.proximal_step(1.0)
            optimizer.step()
            assert float(wc.condition_penalty(model[0].weight.double())) < before
        case "measure":
            assert not any(estimate.status for estimate in reg.measure().values())
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for state in reg._states:
        assert state.subspace.basis.dtype == working
    expected = float(torch.linalg.matrix_norm(model[0].weight.detach().double(), 2))
    found = reg.measure()["0.weight"].sigma_max
    assert found == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-4)
    again = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=16)
    again.load_state_dict(reg.state_dict())
    assert again.measure() == reg.measure()
