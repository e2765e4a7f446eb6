"""The effective weight of a layer that defines its own `forward` method.

A subclass of Linear or of a convolution may mask, scale or standardise its weight in `forward`, so
that the effective weight differs from the stored one. Forward passes of a copy of the layer, in
eval mode, show the weight that `forward` passes to the product, and whether the layer computes only
that product. A product counts only if its input is the input of the layer and its output is the
output of the layer, possibly plus a constant, without a border, or after a known activation. Any
scale before or after belongs to the effective weight; for maps of vectors it is computed from the
images of unit vectors.

Letters: W the effective weight, in the shape of the stored one; x a random input, y the output.
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
from torch.nn.modules.conv import _ConvNd

from wellcond.operators.convolution import Convolution, Geometry
from wellcond.weights.comparison import are_equal, arrangements, differ_alike, is_rearranged
from wellcond.weights.projections import is_conv1d
from wellcond.weights.twin import Call, NotTried, Run, Twin, isolate

COMPUTED = "the effective weight, which the layer's own forward computes from the stored one"
UNKNOWN = "as stored: how the layer's own forward changes it is unknown"
# Up to this nu a map of vectors is computed from its images of unit vectors, chunk by chunk.
_LARGEST, _CHUNK = 4096, 256
# Relative to sums of absolute values: float32 evaluations of one linear map differ by far less.
_LINEAR = 1e-4
# How often a forward pass that draws random numbers must give the same output.
_DRAWS = 8

# Activations that can follow the product and are not part of the weight. Factors per channel are
# part of it.
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


class EffectiveWeight(NamedTuple):
    """The effective weight of a layer.

    Attributes:
        weight: W if it differs from the stored weight; None if it does not, or is unknown.
        note: a remark for the report; "" if the stored weight is the effective one.
    """

    weight: Tensor | None = None
    note: str = ""


def find_effective_weight(
    layer: nn.Module, stored: Tensor, thorough: bool = True
) -> EffectiveWeight:
    """The effective weight of a layer whose `weight` has this value before its forward pass.

    Args:
        layer: any module.
        stored: the value.
        thorough: also try unit vectors, with one forward pass for each.
    """
    if not has_own_forward(layer):
        return EffectiveWeight()
    if _is_replaced(layer) or stored.is_meta:
        return EffectiveWeight(note=UNKNOWN)
    try:
        with isolate(stored):
            W = _Trial(layer, stored).find_weight(thorough)
    except (Exception, SystemExit):  # forward needs other arguments, inputs or processes
        W = None
    if W is None:
        return EffectiveWeight(note=UNKNOWN)
    return EffectiveWeight() if are_equal(W, stored) else EffectiveWeight(W, COMPUTED)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a Linear, a convolution or a Conv1D of transformers has a `forward` of its own."""
    of_torch = isinstance(layer, nn.Linear | _ConvNd)
    if not (of_torch or is_conv1d(layer)):
        return False
    kind = type(layer)
    base = next(
        one
        for one in kind.__mro__
        if one.__module__.startswith("torch.nn.modules.") or one.__name__ == "Conv1D"
    )
    methods = ("forward", "_conv_forward")
    own = any(getattr(kind, name, None) is not getattr(base, name, None) for name in methods)
    return own or (of_torch and _is_replaced(layer))


def _is_replaced(layer: nn.Module) -> bool:
    """Whether the instance replaces the `forward` of its class by anything but a wrapper of it."""
    forward = vars(layer).get("forward")
    inner = None if forward is None else inspect.unwrap(forward)
    return forward is not None and getattr(inner, "__func__", inner) is not type(layer).forward


def has_geometry(layer: nn.Module, kernel: Tensor, geometry: Geometry, whole: bool) -> bool:
    """Whether a convolution computes this map plus a constant, tested on a random input.

    The output is that of the layer. If `whole` is False, the output of the only product in the
    layer, which a known activation can follow, is also accepted.
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
            tolerance = error * bound.matmat(x.abs().flatten()[:, None]).flatten()
            same_size = [one.flatten() for one in outputs if one.numel() == len(expected)]
            return any(bool(((one - expected).abs() <= tolerance).all()) for one in same_size)
    except (Exception, SystemExit):
        return False


class _Look(NamedTuple):
    """A forward pass with one product, whose weight is in the layout of the stored one."""

    x: Tensor
    y: Tensor
    weight: Tensor
    call: Call


class _Trial:
    """Forward passes of a copy of a layer, the first of them on the first input that it accepts."""

    def __init__(self, layer: nn.Module, stored: Tensor) -> None:
        self.layer, self.stored = layer, stored
        self.transposed = is_conv1d(layer)
        for self.x in _inputs(layer, stored):
            try:
                self.twin = Twin(layer, stored)
                self.first = self.twin.run(self.x, 0)
            except (Exception, SystemExit):
                continue
            return
        raise NotTried("it accepts none of the usual inputs")

    def find_weight(self, thorough: bool) -> Tensor | None:
        """W; None if it is unknown."""
        other = _random(self.x.shape, self.stored, seed=1)
        second = self.twin.run(other, 1)
        if (self.first.draws or second.draws) and not self._is_deterministic():
            return None
        convolves = isinstance(self.layer, _ConvNd)
        if convolves and self.twin.normalises:
            return None
        first_look, second_look = self._look(self.x, self.first), self._look(other, second)
        if first_look and second_look and self._is_product(first_look, second_look):
            return first_look.weight
        if convolves:
            return None
        if self._begins_with_stored():
            return self.stored  # the layer also has outputs of another weight
        if not thorough:
            return self.stored if self._agrees_with_stored([self.x, other]) else None
        return self._from_unit_vectors()

    def _is_deterministic(self) -> bool:
        """Whether the random numbers that a forward pass draws change nothing."""
        again = (self.twin.run(self.x, seed) for seed in range(2, 2 + _DRAWS))
        return all(are_equal(_output(run), _output(self.first)) for run in again)

    def _look(self, x: Tensor, run: Run) -> _Look | None:
        """The forward pass, if it has exactly one product, with a weight of the stored shape."""
        if len(run.calls) != 1:
            return None
        (call,) = run.calls
        W, y = self._as_stored(call), _output(run)
        if W.shape != self.stored.shape:
            return None
        if not isinstance(self.layer, _ConvNd):  # the channels are last; the other axes are one
            y, call = (
                y.flatten(0, -2),
                call._replace(x=call.x.flatten(0, -2), y=call.y.flatten(0, -2)),
            )
        return _Look(x, y, W, call)

    def _as_stored(self, call: Call) -> Tensor:
        """The weight of a product in the layout in which the layer stores its own."""
        if isinstance(self.layer, _ConvNd):
            return call.weight
        by_rows = call.name == "linear"  # other products take (inputs, outputs)
        return call.weight if by_rows != self.transposed else call.weight.mT

    def _is_product(self, first: _Look, second: _Look) -> bool:
        """Whether the layer multiplies by the weight of its only product, whatever the input."""
        looks = first, second
        added = first.call.added, second.call.added
        if not are_equal(first.weight, second.weight) or not (
            added[0] is added[1] or (None not in added and are_equal(*added))  # type: ignore[arg-type]
        ):
            return False
        takes_input = all(is_rearranged(one.x, one.call.x) for one in looks)
        if takes_input and all(_is_result(one.y, one.call.y) for one in looks):
            return self._has_known_output(first)
        if not bool(first.weight.isfinite().all()):
            return False
        zeros = torch.zeros_like(first.x)
        origin = self._look(zeros, self.twin.run(zeros, 2))
        if origin is None or not are_equal(origin.weight, first.weight):
            return False
        if not takes_input:
            shifted = all(differ_alike(one.x, zeros, one.call.x, origin.call.x) for one in looks)
            if not (shifted or all(map(self._is_normalised, looks))):
                return False
            if all(_is_result(one.y, one.call.y) for one in looks):
                return self._has_known_output(first)
        return all(differ_alike(one.y, origin.y, one.call.y, origin.call.y) for one in looks)

    def _has_known_output(self, look: _Look) -> bool:
        """Whether the output is that of the product, possibly after one known activation.

        The activation must also fit a product of about 3, because many are alike near 0.
        """
        if is_rearranged(look.y, look.call.y):
            return True
        x = look.x * (3 / look.call.y.abs().max())
        again = self._look(x, self.twin.run(x, 3))
        if again is None:
            return False
        fits = (_match_activations(one.y, one.call.y) for one in (look, again))
        return any(map(all, zip(*fits, strict=True)))

    def _is_normalised(self, look: _Look) -> bool:
        """Whether the input of the product has the direction of x but not its length."""
        x, there = look.x, look.call.x
        if there.numel() != x.numel():
            return False
        x = x.view_as(there)
        again = self._look(x, self.twin.run(4 * look.x, 4))
        if again is None or not bool(there.any()):
            return False
        change = (again.call.x - there).abs().max() / there.abs().max()  # 0 up to an eps, not 3
        turn = (there / there.norm() - x / x.norm()).abs() / (x / x.norm()).abs()
        return bool(change < 0.01) and bool(turn.max() < 32 * torch.finfo(x.dtype).eps)

    def _begins_with_stored(self) -> bool:
        """Whether the first outputs are those of a product with the stored weight."""
        x, y = self.x, _output(self.first)
        m = self.stored.numel() // x.shape[-1]
        return y.shape[-1] > m and any(
            are_equal(self._as_stored(call), self.stored)
            and (call.added is None or not bool(call.added.any()))
            and is_rearranged(x, call.x)
            and is_rearranged(y[..., :m], call.y)
            for call in self.first.calls
        )

    def _agrees_with_stored(self, inputs: list[Tensor]) -> bool:
        """Whether the output is that of the stored weight plus a constant, on random inputs."""
        W = self.stored if self.transposed else self.stored.mT
        origin = _output(self.twin.run(torch.zeros_like(self.x), 2))
        return all(_is_image(_output(self.twin.run(x, 3)), origin, x, W) for x in inputs)

    def _from_unit_vectors(self) -> Tensor | None:
        """W, computed column by column and checked on inputs of two scales and both signs."""
        n = self.x.shape[-1]
        m = self.stored.numel() // n
        if min(m, n) > _LARGEST:
            return None

        def image(rows: Tensor) -> Tensor:
            x = rows.reshape(-1, *self.x.shape[1:])
            return _output(self.twin.run(x, 0)).reshape(len(rows), m)

        origin = image(self.x.new_zeros(1, n))
        columns = []
        for start in range(0, n, _CHUNK):
            unit = self.x.new_zeros(min(_CHUNK, n - start), n)
            unit[:, start:].fill_diagonal_(1)
            columns.append(image(unit) - origin)
        W = torch.cat(columns)  # (n, m)
        for scale in (1, -1, 100, -100):
            row = scale * _random((1, n), self.stored, seed=1)
            if not _is_image(image(row), origin, row, W):
                return None
        W = W if self.transposed else W.mT
        if not bool(W.isfinite().all()):
            return None
        size = max(float(self.stored.abs().max()), 4 * float(origin.abs().max()))
        rounding = torch.finfo(self.stored.dtype).eps * size
        return self.stored if bool(((W - self.stored).abs() <= rounding).all()) else W


def _output(run: Run) -> Tensor:
    """The output of a forward pass; if there are several, the output of a product."""
    if not isinstance(run.y, tuple | list):
        y: Tensor = run.y
        return y
    outputs = [one for one in run.y if isinstance(one, Tensor) and one.is_floating_point()]
    of_product = (one for one in outputs if any(is_rearranged(one, c.y) for c in run.calls))
    return next(of_product, outputs[0])


def _is_result(y: Tensor, product: Tensor) -> bool:
    """Whether y is the output of the product, possibly after a known activation."""
    return is_rearranged(y, product) or any(_match_activations(y, product))


def _match_activations(y: Tensor, product: Tensor) -> Iterator[bool]:
    """For each known activation, whether y is this activation of the product."""
    for activation in () if product.is_complex() else _ACTIVATIONS:
        try:
            yield _is_activated(y, activation(product), product)
        except (RuntimeError, IndexError):  # a gate of an odd side
            yield False


def _is_activated(y: Tensor, activated: Tensor, product: Tensor) -> bool:
    """Whether y is `activated` up to rounding, relative to the product for cases like gelu(-9)."""
    if activated.shape != product.shape or torch.finfo(y.dtype).eps > 1e-6:
        return is_rearranged(y, activated)
    both = zip(arrangements(activated, y), arrangements(product, y), strict=True)
    rounding = 4 * torch.finfo(y.dtype).eps
    return any(
        bool(((y - a.view_as(y)).abs() <= rounding * (a.abs() + b.abs()).view_as(y)).all())
        for a, b in both
    )


def _is_image(y: Tensor, origin: Tensor, x: Tensor, W: Tensor) -> bool:
    """Whether y is x W plus a constant, up to rounding."""
    m = W.shape[1]
    if y.numel() != x.numel() // len(W) * m:
        return False
    eps = torch.finfo(W.dtype).eps
    error = max(_LINEAR, 4 * eps) * (x.abs() @ W.abs()) + 4 * eps * origin.abs().view(-1, m)
    difference = (y - origin).reshape(error.shape) - x @ W
    return bool((difference.abs() <= error).all())


def _inputs(layer: nn.Module, stored: Tensor) -> Iterator[Tensor]:
    """Random inputs of the shapes that such layers accept."""
    if isinstance(layer, _ConvNd):
        size = _smallest_size(layer)
        yield _random((1, layer.in_channels, *size), stored)
        yield _random((1, *size, layer.in_channels), stored)
    else:
        n = stored.shape[0] if is_conv1d(layer) else stored.shape[1]
        yield _random((1, n), stored)
        yield _random((1, 1, n), stored)


def _smallest_size(layer: _ConvNd) -> list[int]:
    """The smallest input size for which every axis has at least two outputs."""
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
