"""`wc.audit(device=)`: the device computes what the CPU computes, or the audit refuses it.

Without a GPU a tensor on the meta device stands for one on a GPU: it holds no data, so that the
tests supply its singular values.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import wellcond as wc
from wellcond.audits import device as module
from wellcond.audits import rows
from wellcond.audits.device import CPU, as_device
from wellcond.linalg.spectrum import Spectrum, compute_spectrum

GPU = torch.device("meta")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 300), torch.nn.Linear(300, 320), torch.nn.Conv2d(4, 8, 3)]
    return torch.nn.Sequential(*layers)


def numbers(report: wc.AuditReport) -> dict[str, tuple[float, ...]]:
    return {
        f.label: (f.sigma_max, f.sigma_min, f.condition_number, f.stable_rank, float(f.rank))
        for f in report.findings
    }


@contextlib.contextmanager
def gpu(compute: Callable[[Tensor], Spectrum]) -> Iterator[None]:
    """Within, audits find a GPU, and this function computes the spectra of its matrices."""
    matrices: list[Tensor] = []
    to = Tensor.to

    def remember(S: Tensor, *args: object, **options: object) -> Tensor:
        if args == (GPU,):
            matrices.append(S)
        return to(S, *args, **options)  # type: ignore[call-overload, no-any-return]

    def spectrum(S: Tensor, all_values: bool = False) -> Spectrum:
        return compute(matrices[-1]) if S.device == GPU else compute_spectrum(S, all_values)

    with (
        mock.patch("wellcond.audits.audit.as_device", return_value=GPU),
        mock.patch.object(rows, "compute_spectrum", spectrum),
        mock.patch.object(Tensor, "to", remember),
    ):
        yield


def test_method_names_the_device() -> None:
    expected = wc.audit(model())
    with gpu(compute_spectrum):
        found = wc.audit(model(), device="cuda")
    assert numbers(found) == numbers(expected)
    assert all(f.method.endswith(" on meta") for f in found.findings)
    assert not any(" on " in f.method for f in expected.findings)


def test_matrices_too_large_for_the_device_are_computed_on_the_cpu() -> None:
    def refuse(S: Tensor) -> Spectrum:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = wc.audit(model())
    with gpu(refuse):
        found = wc.audit(model(), device="cuda")
    assert found.findings == expected.findings


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_cpu_needs_no_check(name: str | torch.device) -> None:
    with mock.patch.object(module, "_check_arithmetic", side_effect=AssertionError):
        assert as_device(name) == CPU


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", 'because an audit needs float64 and LAPACK, got "mps"'),
        ("gpu", "got 'gpu'"),
        ("", "got ''"),
    ],
)
def test_other_devices_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wc.audit(model(), device=name)


def test_missing_gpu_is_refused() -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        pytest.raises(ValueError, match='torch finds no GPU for "cuda"'),
    ):
        wc.audit(model(), device="cuda")


def test_each_process_of_a_machine_has_its_own_gpu() -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch.object(module, "_check_arithmetic") as check,
    ):
        assert as_device("cuda") == torch.device("cuda:0")
        assert as_device("cuda", local_rank=1) == torch.device("cuda:1")
        assert [call.args for call in check.call_args_list] == [
            (torch.device("cuda:0"),),
            (torch.device("cuda:1"),),
        ]
        assert as_device("cuda:0", local_rank=1) == torch.device("cuda:0")
        with pytest.raises(ValueError, match='"cuda:2" is not one of the 2'):
            as_device("cuda", local_rank=2)


@pytest.mark.parametrize("error", [1e-6, float("nan")])
def test_device_with_other_numbers_is_refused(error: float) -> None:
    found: list[Spectrum] = []

    def compute(S: Tensor, all_values: bool) -> Spectrum:
        if S.device == CPU:
            found.append(compute_spectrum(S, all_values))
            return found[0]
        scaled = found[0].scaled.clone()
        scaled[-1] *= 1 + error
        return found[0]._replace(scaled=scaled)

    with (
        mock.patch.object(module, "compute_spectrum", compute),
        pytest.raises(ValueError, match='"meta" found κ = '),
    ):
        module._check_arithmetic(GPU)


def test_equal_arithmetic_passes() -> None:
    module._check_arithmetic(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    expected = wc.audit(model())
    found = wc.audit(model(), device="cuda")
    assert all(f.method.endswith(" on cuda") for f in found.findings)
    for label, values in numbers(expected).items():
        assert numbers(found)[label] == pytest.approx(values, rel=1e-9)
