"""The weight by which a layer with a `forward` of its own multiplies.

A subclass of Linear or of a convolution may mask, scale or standardise its weight in `forward`, so
that what is stored is not what acts. One forward pass of a copy of the layer, in eval mode, shows
which weight is handed to the product. Nothing of the layer, and no random state, is changed.

Letters: W the weight that acts, of the shape of the stored one; x a random input, y the output.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wellcond.operators.convolution import Convolution, Geometry
from wellcond.operators.rounding import full_precision
from wellcond.weights.projections import is_conv1d

COMPUTED = "the weight that acts, which the layer's own forward computes from what is stored"
UNKNOWN = "as stored: what the layer's own forward makes of it is not known"
# Up to this nu a map of vectors is found from its images of unit vectors, so many at a time.
_LARGEST, _CHUNK = 4096, 256
# Relative to the largest entry: float32 evaluations of one linear map differ by far less.
_LINEAR = 1e-3

# Where the weight stands among the arguments of each product.
_LINEAR_PRODUCTS = {"linear": 1, "matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}
_CONVOLUTIONS = [f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)]
_PRODUCTS = _LINEAR_PRODUCTS | dict.fromkeys(_CONVOLUTIONS, 1)
_OTHER_PRODUCTS = {"bmm", "einsum", "tensordot", "bilinear", "baddbmm", "addbmm", "mv", "addmv"}

_Call = tuple[str, Tensor, Tensor, Tensor]  # the name of a product, its weight, input and output


class Acting(NamedTuple):
    """What acts in place of a stored weight.

    Attributes:
        weight: W where it differs from what is stored; None where it does not, or is not known.
        note: what a reader must know; "" if the stored weight acts.
    """

    weight: Tensor | None = None
    note: str = ""


def acting_weight(layer: nn.Module, stored: Tensor) -> Acting:
    """What acts in a layer whose `weight` has this value when its forward pass begins."""
    if not has_own_forward(layer):
        return Acting()
    if _is_replaced(layer) or stored.is_meta:
        return Acting(note=UNKNOWN)
    try:
        with _undisturbed(stored):
            W = _acting(layer, stored)
    except Exception:  # it needs other arguments, other inputs, or other processes
        W = None
    if W is None:
        return Acting(note=UNKNOWN)
    return Acting() if _same(W, stored) else Acting(W, COMPUTED)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether it is a Linear, a Conv1D of the transformers library or a convolution with one."""
    if not (isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or is_conv1d(layer)):
        return False
    base = next(
        kind
        for kind in type(layer).__mro__
        if kind.__module__.startswith("torch.nn.modules.") or kind.__name__ == "Conv1D"
    )
    methods = ("forward", "_conv_forward")
    own = any(getattr(type(layer), m, None) is not getattr(base, m, None) for m in methods)
    return own or _is_replaced(layer)


def slides_as(layer: nn.Module, kernel: Tensor, geometry: Geometry, whole: bool) -> bool:
    """Whether the output of a convolution on a random input is that of this map.

    That of the whole layer; or of the product in it, which an activation may follow.
    """
    S = Convolution(kernel, geometry)
    try:
        with _undisturbed(kernel):
            sizes = S.positions if geometry.transposed else geometry.size
            x = _random((1, layer.in_channels, *sizes), kernel)  # type: ignore[arg-type]
            calls, y = _run(layer, x, kernel)
            outputs = [y] if whole or len(calls) != 1 else [y, calls[0][-1]]
            expected = S.matmat(x.flatten()[:, None]).flatten()
            same_size = [one for one in outputs if one.numel() == len(expected)]
            return any(_close(one.flatten(), expected) for one in same_size)
    except Exception:
        return False


def _is_replaced(layer: nn.Module) -> bool:
    """Whether this one has another `forward` than its class, and no mere wrapper around that."""
    forward = vars(layer).get("forward")
    inner = None if forward is None else inspect.unwrap(forward)
    return forward is not None and getattr(inner, "__func__", inner) is not type(layer).forward


def _acting(layer: nn.Module, stored: Tensor) -> Tensor | None:
    for x in _inputs(layer, stored):
        try:
            calls, y = _run(layer, x, stored)
        except Exception:
            continue
        break
    else:
        return None
    found = _handed(layer, stored, calls)
    other = _handed(layer, stored, _run(layer, _random(x.shape, stored, seed=1), stored)[0])
    if found is not None and other is not None and _same(found[0], other[0]):
        weight, x_there, y_there = found
        result = _is_result(y, y_there)
        if result and _is_input(x_there, x):
            return weight
        # An activation after the product, or a norm of x before it, is no part of the weight.
        if (result or _same(weight, stored)) and not _is_homogeneous(layer, x, y, stored):
            return weight
    if isinstance(layer, nn.modules.conv._ConvNd):
        return None
    if any(_begins_with(y, call[-1]) and _is_stored(layer, stored, call) for call in calls):
        return stored  # it has outputs of another weight besides
    return _from_unit_vectors(layer, x, stored)


def _handed(
    layer: nn.Module, stored: Tensor, calls: list[_Call]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The weight, the input and the output of the only product, if the shape is that stored."""
    if len(calls) != 1:
        return None
    ((name, weight, x, y),) = calls
    if not isinstance(layer, nn.modules.conv._ConvNd):
        by_rows = name == "linear"  # else the product is with (inputs, outputs)
        weight = weight if by_rows != is_conv1d(layer) else weight.mT
    return (weight, x, y) if weight.shape == stored.shape else None


def _is_stored(layer: nn.Module, stored: Tensor, call: _Call) -> bool:
    handed = _handed(layer, stored, [call])
    return handed is not None and _same(handed[0], stored)


def _begins_with(y: Tensor, product: Tensor) -> bool:
    m = product.shape[-1]
    return y.shape[-1] > m and _same(y[..., :m].flatten(), product.flatten())


def _from_unit_vectors(layer: nn.Module, x: Tensor, stored: Tensor) -> Tensor | None:
    """W column by column, checked on inputs of two scales and both signs."""
    n = x.shape[-1]
    m = stored.numel() // n
    if min(m, n) > _LARGEST:
        return None

    def image(rows: Tensor) -> Tensor:
        _, y = _run(layer, rows.reshape(-1, *x.shape[1:]), stored)
        return y.reshape(len(rows), m)

    origin = image(x.new_zeros(1, n))
    columns = []
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        unit = x.new_zeros(count, n)
        unit[torch.arange(count), torch.arange(start, start + count)] = 1
        columns.append(image(unit) - origin)
    W = torch.cat(columns)  # (n, m)
    for scale in (1, -1, 100, -100):
        row = scale * _random((1, n), stored, seed=1)
        if not _close(image(row) - origin, row @ W):
            return None
    W = W if is_conv1d(layer) else W.mT
    return stored if _close(W, stored, torch.finfo(stored.dtype).eps) else W


def _is_homogeneous(layer: nn.Module, x: Tensor, y: Tensor, stored: Tensor) -> bool:
    """Whether f(c x) = c f(x) for a positive and a negative c, up to rounding."""
    return all(_close(_run(layer, c * x, stored)[1], c * y) for c in (4.0, -1.0))


def _is_result(y: Tensor, product: Tensor) -> bool:
    """Whether it is the output of the product, with its channels last, or after a ReLU."""
    results = [product] if product.is_complex() else [product, product.relu()]
    return any(_same(y.flatten(), one.flatten()) for r in results for one in (r, _last(r)))


def _is_input(there: Tensor, x: Tensor) -> bool:
    """Whether it is x, with a border perhaps."""
    if there.numel() == x.numel():
        return any(_same(one.flatten(), x.flatten()) for one in (there, _last(there)))
    return bool(there.abs().max() == x.abs().max())


def _last(x: Tensor) -> Tensor:
    """With its channels last."""
    return x.movedim(1, -1) if x.ndim > 2 else x


def _same(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.shape == b.shape and torch.equal(a.to(dtype), b.to(dtype))


def _close(a: Tensor, b: Tensor, error: float | None = None) -> bool:
    """Whether they differ by rounding alone, or relatively by this error at most."""
    error = error or max(_LINEAR, 4 * torch.finfo(a.dtype).eps)
    dtype = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.cpu().to(dtype), b.cpu().to(dtype)
    return bool((a - b).abs().max() <= error * b.abs().max()) and bool(b.isfinite().all())


def _inputs(layer: nn.Module, stored: Tensor) -> Iterator[Tensor]:
    """Random inputs of the shapes that such layers take."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        size = _smallest_size(layer)
        yield _random((1, layer.in_channels, *size), stored)
        yield _random((1, *size, layer.in_channels), stored)
    else:
        n = stored.shape[0] if is_conv1d(layer) else stored.shape[1]
        yield _random((1, n), stored)
        yield _random((1, 1, n), stored)


def _smallest_size(layer: nn.modules.conv._ConvNd) -> list[int]:
    """Of inputs on which every axis has at least two outputs."""
    sizes = []
    for axis, (k, s, d) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        reach = d * (k - 1)
        p = reach // 2 if layer.padding == "same" else 0
        p = int(layer.padding[axis]) if not isinstance(layer.padding, str) else p
        if layer.transposed:
            sizes.append(2 + math.ceil(2 * p / s))
        else:
            sizes.append(max(reach + 1 + s - 2 * p, p + 1, 2))
    return sizes


def _random(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    source = torch.Generator("cpu").manual_seed(seed)
    dtype = torch.complex64 if like.is_complex() else torch.float32
    x = torch.randn(shape, generator=source, dtype=dtype, device="cpu")
    return x.to(like.device, like.dtype)


class _Record(TorchFunctionMode):
    """The products of a forward pass: name, weight, input and output of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            at = _PRODUCTS[name]
            weight = args[at] if len(args) > at else kwargs.get("weight", kwargs.get("other"))
            x = args[at - 1] if len(args) >= at else kwargs.get("input")
            if isinstance(weight, Tensor) and isinstance(x, Tensor):
                self.calls.append((name, weight, x, result))
        elif name in _OTHER_PRODUCTS:
            self.calls.append((name, result, result, result))  # no weight has its shape: not known
        return result


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No communication: other processes may not take part."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("a forward pass that communicates")
        return func(*args, **(kwargs or {}))


def _run(layer: nn.Module, x: Tensor, stored: Tensor) -> tuple[list[_Call], Tensor]:
    """The products of a forward pass of a copy without a bias, and the output."""
    twin = _copy(layer, {})
    if "weight" in vars(twin):  # computed by a hook of the layer
        vars(twin)["weight"] = stored.clone()
    if isinstance(bias := twin._parameters.get("bias"), Tensor):
        bias.data.zero_()
    record = _Record()
    # To enter such a mode takes seconds at first, as torch then imports its compiler.
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    alone: Any = _Alone() if together else contextlib.nullcontext()  # type: ignore[no-untyped-call]
    with record, alone:
        y = type(layer).forward(twin, x)
    if isinstance(y, tuple | list):  # the product itself may be one of several
        outputs = [one for one in y if isinstance(one, Tensor) and one.is_floating_point()]
        of_product = (one for one in outputs if any(_is_result(one, c[-1]) for c in record.calls))
        y = next(of_product, outputs[0])
    return record.calls, y


@contextlib.contextmanager
def _undisturbed(like: Tensor) -> Iterator[None]:
    """Without gradients and autocast, in full precision, and with a random state of its own."""
    devices = [like.device] if like.is_cuda else []
    with full_precision(like.device.type), torch.random.fork_rng(devices=devices):
        yield


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in eval mode with tensors of its own, without the hooks of users."""
    if id(module) in memo:
        twin: nn.Module = memo[id(module)]
        return twin
    twin = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            own: Any = copy.copy(value)
            own.update({k: v if v is None else _copy(v, memo) for k, v in value.items()})
        elif name.endswith("_hooks") and isinstance(value, dict):
            own = type(value)((k, v) for k, v in value.items() if isinstance(v, _PURE_HOOKS))
        else:
            own = _own(value, memo)
        vars(twin)[name] = own
    twin.training = False
    return twin


# They compute a weight from parameters of the module, and in eval mode change nothing.
_PURE_HOOKS = SpectralNorm, WeightNorm, BasePruningMethod


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of tensors, also of those in lists and dicts; anything else as it is."""
    if not isinstance(value, Tensor | dict | list | set):
        return value
    if id(value) in memo:
        return memo[id(value)]
    own: Any = value
    if isinstance(value, Tensor):
        own = value.detach().clone()
        if isinstance(value, nn.Parameter):
            own = nn.Parameter(own, requires_grad=value.requires_grad)
    elif isinstance(value, dict):
        own = memo[id(value)] = copy.copy(value)
        own.update({k: _own(v, memo) for k, v in value.items()})
    elif isinstance(value, list):
        own = memo[id(value)] = copy.copy(value)
        own[:] = [_own(v, memo) for v in value]
    elif isinstance(value, set):
        own = copy.copy(value)
    memo[id(value)] = own
    return own
