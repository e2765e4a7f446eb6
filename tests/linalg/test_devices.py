"""Functions of one matrix work on any device and with any default device."""

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from elsewhere import Elsewhere, There
from torch import Tensor

import wellcond as wc
from wellcond.linalg.scaling import frobenius_norm
from wellcond.linalg.spectrum import Method, compute_spectrum
from wellcond.rules.spectral import limit_condition_number


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(4, 3), (1, 5), (300, 320), (2, 4, 3)])
def test_condition_number_is_on_the_device_of_the_matrix(shape: tuple[int, ...]) -> None:
    """For nu > 256, the iterations start from a block drawn on the CPU."""
    S = gaussian(*shape)
    with Elsewhere():
        found = wc.condition_number(There(S))
    assert isinstance(found, There)
    torch.testing.assert_close(found.held, wc.condition_number(S), rtol=1e-12, atol=0)


def test_nearest_is_on_the_device_of_the_matrix() -> None:
    S = gaussian(6, 4)
    with Elsewhere():
        found = wc.nearest(There(S), 1.5)
    assert isinstance(found, There)
    torch.testing.assert_close(found.held, wc.nearest(S, 1.5))


class Narrow(Tensor):
    """A tensor on a device without float64, such as Apple's GPUs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        wanted = (*args[1:], *kwargs.values())
        if func is Tensor.double or torch.float64 in wanted:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        return result.as_subclass(Tensor if func is Tensor.cpu else cls)


def test_device_without_float64_uses_the_cpu() -> None:
    S = gaussian(300, 320)
    there = S.as_subclass(Narrow)
    with pytest.raises(TypeError):
        there.double()
    for one, other in ((S, there), (S[None], there[None]), (S[:4], there[:4])):
        torch.testing.assert_close(wc.condition_number(other), wc.condition_number(one))
    torch.testing.assert_close(wc.nearest(there[:4], 1.5), wc.nearest(S[:4], 1.5))
    torch.testing.assert_close(
        limit_condition_number(there[:4], 1.5).S, limit_condition_number(S[:4], 1.5).S
    )
    assert wc.certify(there[:4]) == wc.certify(S[:4])
    assert frobenius_norm(there) == frobenius_norm(S)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.6 fails with this None in `get_default_device`, which other tests call.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


META = [lambda: torch.device("meta"), lambda: default_device("meta")]


@pytest.mark.parametrize("meta", META, ids=["device", "set_default_device"])
@pytest.mark.parametrize("n", [4, 300])
def test_the_default_device_changes_nothing(
    meta: Callable[[], contextlib.AbstractContextManager[object]], n: int
) -> None:
    S = gaussian(n, n + 20)
    S[0] *= 1e-4
    expected = (
        wc.condition_number(S),
        wc.certify(S),
        wc.nearest(S, 2.0),
        limit_condition_number(S, 2.0).S,
    )
    batch = wc.condition_number(S[None])
    with meta():
        assert torch.empty(1).device.type == "meta"
        found = (
            wc.condition_number(S),
            wc.certify(S),
            wc.nearest(S, 2.0),
            limit_condition_number(S, 2.0).S,
        )
        assert torch.equal(wc.condition_number(S[None]), batch)
    assert found[1] == expected[1]
    for index in (0, 2, 3):
        assert torch.equal(found[index], expected[index])


def test_the_default_device_changes_no_certificate_by_cholesky() -> None:
    S = torch.linalg.qr(gaussian(300, 300)).Q
    with torch.device("meta"):
        certificate = wc.certify(S)
    assert certificate.method == "verified Cholesky"
    assert certificate == wc.certify(S)


def test_the_default_device_changes_no_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wellcond.linalg.spectrum._LARGE", 64)
    S = gaussian(280, 400)
    with torch.device("meta"):
        found = compute_spectrum(S)
    assert found.method is Method.krylov
    assert found.condition_number == compute_spectrum(S).condition_number
    assert math.isfinite(found.condition_number)
