"""The weight by which a layer with a `forward` of its own multiplies.

A subclass of Linear or of a convolution may mask, scale or standardise its weight in `forward`, so
that what is stored is not what acts. Forward passes of a copy of the layer, in eval mode, show
which weight is handed to the product, and whether the layer is that product: then it is what acts.
A product is believed only if its input is that of the layer and the output of the layer is its
output, perhaps with a constant added, a border cut off, or a known activation applied. Any scale
before or after is part of what acts; of vectors it is found from the images of unit vectors.

Letters: W the weight that acts, of the shape of the stored one; x a random input, y the output.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.operators.convolution import Convolution, Geometry
from wellcond.weights.comparison import are_equal, arrangements, differ_alike, is_rearranged
from wellcond.weights.projections import is_conv1d
from wellcond.weights.twin import Call, Run, Twin, isolate

COMPUTED = "the weight that acts, which the layer's own forward computes from what is stored"
UNKNOWN = "as stored: what the layer's own forward makes of it is not known"
# Up to this nu a map of vectors is found from its images of unit vectors, so many at a time.
_LARGEST, _CHUNK = 4096, 256
# Relative to sums of absolute values: float32 evaluations of one linear map differ by far less.
_LINEAR = 1e-4
# How often a forward pass that draws random numbers must give the same.
_DRAWS = 8

# What may follow the product: no part of the weight. Factors per channel are not among them.
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(F.relu, F.relu6, F.gelu, partial(F.gelu, approximate="tanh"), F.silu, F.mish),
    *(torch.sigmoid, torch.tanh, torch.sin, torch.square, torch.abs, torch.exp),
    *(F.elu, F.selu, F.softplus, F.softsign, F.logsigmoid, F.hardswish, F.hardsigmoid, F.hardtanh),
    *(partial(F.leaky_relu, negative_slope=slope) for slope in (0.01, 0.1, 0.2, 0.3)),
    *(partial(f, dim=dim) for f in (F.softmax, F.log_softmax, F.normalize) for dim in (-1, 1)),
    *(partial(F.glu, dim=dim) for dim in (-1, 1)),
    lambda y: y * torch.sigmoid(1.702 * y),
    lambda y: F.relu(y).square(),
)


class Acting(NamedTuple):
    """What acts in place of a stored weight.

    Attributes:
        weight: W where it differs from what is stored; None where it does not, or is not known.
        note: what a reader must know; "" if the stored weight acts.
    """

    weight: Tensor | None = None
    note: str = ""


class _Look(NamedTuple):
    """A forward pass with one product: its weight in the layout of the stored one, and inputs."""

    x: Tensor
    y: Tensor
    weight: Tensor
    call: Call


def acting_weight(layer: nn.Module, stored: Tensor, thorough: bool = True) -> Acting:
    """What acts in a layer whose `weight` has this value when its forward pass begins.

    Unit vectors, one forward pass for each, are tried only where it is to be `thorough`.
    """
    if not has_own_forward(layer):
        return Acting()
    if _is_replaced(layer) or stored.is_meta:
        return Acting(note=UNKNOWN)
    try:
        with isolate(stored):
            W = _acting(layer, stored, thorough)
    except (Exception, SystemExit):  # it needs other arguments, other inputs, or other processes
        W = None
    if W is None:
        return Acting(note=UNKNOWN)
    return Acting() if are_equal(W, stored) else Acting(W, COMPUTED)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether it is a Linear, a Conv1D of the transformers library or a convolution with one."""
    kind = type(layer)
    if kind.__module__.startswith("torch.nn.modules."):
        own = False
    elif isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or is_conv1d(layer):
        base = next(
            one
            for one in kind.__mro__
            if one.__module__.startswith("torch.nn.modules.") or one.__name__ == "Conv1D"
        )
        methods = ("forward", "_conv_forward")
        own = any(getattr(kind, m, None) is not getattr(base, m, None) for m in methods)
    else:
        return False
    if own or "forward" not in vars(layer):
        return own
    return isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and _is_replaced(layer)


def slides_as(layer: nn.Module, kernel: Tensor, geometry: Geometry, whole: bool) -> bool:
    """Whether the output of a convolution on a random input is that of this map, and a constant.

    That of the whole layer; or of the product in it, which a known activation may follow.
    """
    S = Convolution(kernel, geometry)
    bound = Convolution(kernel.abs(), geometry)
    try:
        with isolate(kernel):
            sizes = S.positions if geometry.transposed else geometry.size
            x = _random((1, layer.in_channels, *sizes), kernel)  # type: ignore[arg-type]
            twin = Twin(layer, kernel)
            run = twin.run(x, 0)
            y, origin = (_output(one) for one in (run, twin.run(torch.zeros_like(x), 1)))
            outputs = [y - origin]
            if not whole and len(run.calls) == 1 and run.calls[0].y.numel() == y.numel():
                outputs.append(run.calls[0].y)
            expected = S.matmat(x.flatten()[:, None]).flatten()
            error = max(_LINEAR, 4 * torch.finfo(kernel.dtype).eps)
            room = error * bound.matmat(x.abs().flatten()[:, None]).flatten()
            same_size = [one.flatten() for one in outputs if one.numel() == len(expected)]
            return any(bool(((one - expected).abs() <= room).all()) for one in same_size)
    except (Exception, SystemExit):
        return False


def _is_replaced(layer: nn.Module) -> bool:
    """Whether this one has another `forward` than its class, and no mere wrapper around that."""
    forward = vars(layer).get("forward")
    inner = None if forward is None else inspect.unwrap(forward)
    return forward is not None and getattr(inner, "__func__", inner) is not type(layer).forward


def _acting(layer: nn.Module, stored: Tensor, thorough: bool) -> Tensor | None:
    for x in _inputs(layer, stored):
        try:
            twin = Twin(layer, stored)
            first = twin.run(x, 0)
        except (Exception, SystemExit):
            continue
        break
    else:
        return None
    other = _random(x.shape, stored, seed=1)
    second = twin.run(other, 1)
    if (first.draws or second.draws) and not _is_repeated(twin, x, first):
        return None
    convolves = isinstance(layer, nn.modules.conv._ConvNd)
    if convolves and twin.normalises:
        return None
    looks = [_look(layer, stored, *one) for one in ((x, first), (other, second))]
    if all(looks) and _is_the_product(layer, stored, twin, [one for one in looks if one]):
        return looks[0].weight  # type: ignore[union-attr]
    if convolves:
        return None
    if _begins_with_stored(layer, stored, x, first):
        return stored  # it has outputs of another weight besides
    if not thorough:
        return stored if _agrees_with(layer, stored, twin, [x, other]) else None
    return _from_unit_vectors(layer, twin, x, stored)


def _is_repeated(twin: Twin, x: Tensor, first: Run) -> bool:
    """Whether the random numbers that a forward pass draws change nothing."""
    again = (twin.run(x, seed) for seed in range(2, 2 + _DRAWS))
    return all(are_equal(_output(run), _output(first)) for run in again)


def _look(layer: nn.Module, stored: Tensor, x: Tensor, run: Run) -> _Look | None:
    """The only product, if the shape of its weight is that stored."""
    if len(run.calls) != 1:
        return None
    (call,) = run.calls
    W, y = _as_stored(layer, call), _output(run)
    if W.shape != stored.shape:
        return None
    if not isinstance(layer, nn.modules.conv._ConvNd):  # the channels are last, and remain all
        y, call = _rows(y), call._replace(x=_rows(call.x), y=_rows(call.y))
    return _Look(x, y, W, call)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _as_stored(layer: nn.Module, call: Call) -> Tensor:
    """The weight in the layout in which the layer stores its own."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return call.weight
    by_rows = call.name == "linear"  # else the product is with (inputs, outputs)
    return call.weight if by_rows != is_conv1d(layer) else call.weight.mT


def _output(run: Run) -> Tensor:
    """Of several outputs the one that is that of a product."""
    if not isinstance(run.y, tuple | list):
        y: Tensor = run.y
        return y
    outputs = [one for one in run.y if isinstance(one, Tensor) and one.is_floating_point()]
    of_product = (one for one in outputs if any(is_rearranged(one, c.y) for c in run.calls))
    return next(of_product, outputs[0])


def _is_the_product(layer: nn.Module, stored: Tensor, twin: Twin, looks: list[_Look]) -> bool:
    """Whether a layer with one product multiplies by its weight, whatever the input."""
    first, second = looks
    added = first.call.added, second.call.added
    if not are_equal(first.weight, second.weight) or not (
        added[0] is added[1] or (None not in added and are_equal(*added))  # type: ignore[arg-type]
    ):
        return False
    if all(is_rearranged(one.x, one.call.x) and _is_result(one.y, one.call.y) for one in looks):
        return is_rearranged(first.y, first.call.y) or _is_activation(layer, stored, twin, first)
    if not bool(first.weight.isfinite().all()):
        return False
    x = torch.zeros_like(first.x)
    origin = _look(layer, stored, x, twin.run(x, 2))
    if origin is None or not are_equal(origin.weight, first.weight):
        return False
    takes = (
        all(is_rearranged(one.x, one.call.x) for one in looks)
        or all(_is_shifted(one.x, one.call.x, origin.call.x) for one in looks)
        or all(_is_normalised(layer, stored, twin, one) for one in looks)
    )
    if not takes:
        return False
    if all(_is_result(one.y, one.call.y) for one in looks):
        return is_rearranged(first.y, first.call.y) or _is_activation(layer, stored, twin, first)
    return all(differ_alike(one.y, origin.y, one.call.y, origin.call.y) for one in looks)


def _is_result(y: Tensor, product: Tensor) -> bool:
    """Whether it is the output of the product or a known activation of that."""
    return is_rearranged(y, product) or any(_activations(y, product))


def _activations(y: Tensor, product: Tensor) -> Iterator[bool]:
    """For each known activation whether it is that of the product."""
    for activation in () if product.is_complex() else _ACTIVATIONS:
        try:
            yield _is_activated(y, activation(product), product)
        except (RuntimeError, IndexError):  # of odd sides none is a gate
            yield False


def _is_activated(y: Tensor, activated: Tensor, product: Tensor) -> bool:
    """Whether it is that, up to rounding relative to the product too, as of gelu(-9)."""
    if activated.shape != product.shape or torch.finfo(y.dtype).eps > 1e-6:
        return is_rearranged(y, activated)
    both = zip(arrangements(activated, y), arrangements(product, y), strict=True)
    rounding = 4 * torch.finfo(y.dtype).eps
    return any(
        bool(((y - a.view_as(y)).abs() <= rounding * (a.abs() + b.abs()).view_as(y)).all())
        for a, b in both
    )


def _is_activation(layer: nn.Module, stored: Tensor, twin: Twin, look: _Look) -> bool:
    """Whether one activation also fits where the product is about 3: near 0 many look alike."""
    x = look.x * (3 / look.call.y.abs().max())
    again = _look(layer, stored, x, twin.run(x, 3))
    if again is None:
        return False
    fits = (_activations(one.y, one.call.y) for one in (look, again))
    return any(map(all, zip(*fits, strict=True)))


def _is_shifted(x: Tensor, there: Tensor, origin: Tensor) -> bool:
    """Whether it is the input of the layer and a constant."""
    return differ_alike(x, torch.zeros_like(x), there, origin)


def _is_normalised(layer: nn.Module, stored: Tensor, twin: Twin, look: _Look) -> bool:
    """Whether it has the direction of the input of the layer, and not its length."""
    x, there = look.x, look.call.x
    if there.numel() != x.numel():
        return False
    x = x.view_as(there)
    again = _look(layer, stored, x, twin.run(4 * look.x, 4))
    if again is None or not bool(there.any()):
        return False
    change = (again.call.x - there).abs().max() / there.abs().max()  # 0, but for an eps, not 3
    turn = (there / there.norm() - x / x.norm()).abs() / (x / x.norm()).abs()
    return bool(change < 0.01) and bool(turn.max() < 32 * torch.finfo(x.dtype).eps)


def _begins_with_stored(layer: nn.Module, stored: Tensor, x: Tensor, run: Run) -> bool:
    """Whether the first outputs are those of a product with the stored weight."""
    y, m = _output(run), stored.numel() // x.shape[-1]
    return y.shape[-1] > m and any(
        are_equal(_as_stored(layer, call), stored)
        and call.added is None
        and is_rearranged(x, call.x)
        and is_rearranged(y[..., :m], call.y)
        for call in (one._replace(added=_nonzero(one.added)) for one in run.calls)
    )


def _nonzero(added: Tensor | None) -> Tensor | None:
    """None for a bias of zeros."""
    return added if added is not None and bool(added.any()) else None


def _agrees_with(layer: nn.Module, stored: Tensor, twin: Twin, inputs: list[Tensor]) -> bool:
    """Whether the output is that of the stored weight, and a constant, on random inputs."""
    W = stored if is_conv1d(layer) else stored.mT
    origin = _output(twin.run(torch.zeros_like(inputs[0]), 2))
    return all(_is_image(_output(twin.run(x, 3)), origin, x, W) for x in inputs)


def _is_image(y: Tensor, origin: Tensor, x: Tensor, W: Tensor) -> bool:
    """Whether y is x W and a constant, up to rounding."""
    if y.numel() != x.numel() // len(W) * W.shape[1]:
        return False
    eps = torch.finfo(W.dtype).eps
    error = max(_LINEAR, 4 * eps) * (x.abs() @ W.abs()) + 4 * eps * origin.abs().view(
        -1, W.shape[1]
    )
    difference = (y - origin).reshape(error.shape) - x @ W
    return bool((difference.abs() <= error).all())


def _from_unit_vectors(layer: nn.Module, twin: Twin, x: Tensor, stored: Tensor) -> Tensor | None:
    """W column by column, checked on inputs of two scales and both signs."""
    n = x.shape[-1]
    m = stored.numel() // n
    if min(m, n) > _LARGEST:
        return None

    def image(rows: Tensor) -> Tensor:
        return _output(twin.run(rows.reshape(-1, *x.shape[1:]), 0)).reshape(len(rows), m)

    origin = image(x.new_zeros(1, n))
    columns = []
    for start in range(0, n, _CHUNK):
        unit = x.new_zeros(min(_CHUNK, n - start), n)
        unit[:, start:].fill_diagonal_(1)
        columns.append(image(unit) - origin)
    W = torch.cat(columns)  # (n, m)
    for scale in (1, -1, 100, -100):
        row = scale * _random((1, n), stored, seed=1)
        if not _is_image(image(row), origin, row, W):
            return None
    W = W if is_conv1d(layer) else W.mT
    if not bool(W.isfinite().all()):
        return None
    size = max(float(stored.abs().max()), 4 * float(origin.abs().max()))
    rounding = torch.finfo(stored.dtype).eps * size
    return stored if bool(((W - stored).abs() <= rounding).all()) else W


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
