"""A convolution as a linear map on inputs of one size, with stride, padding and groups.

Letters: K (o, i/g, *k) the kernel; s, d, p stride, dilation and padding of an axis; N its input
size; S (m, n) the map from i prod(N) inputs to the outputs, both in the order (channel, *position).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Padding modes, as PyTorch names them.
ZEROS, CIRCULAR = "zeros", "circular"
_CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


@dataclass(frozen=True)
class Geometry:
    """The parameters of a convolution other than its kernel, one entry per axis.

    Attributes:
        size: the size of the input; () if it is unknown.
        stride: the distance between two positions of the kernel.
        dilation: the distance between two taps of the kernel.
        padding: the amounts before and after the input; a negative amount crops it.
        mode: the padding mode: zeros, circular, reflect or replicate.
        groups: the number of groups of channels.
        transposed: whether the layer is the adjoint of this map, as in ConvTranspose. `size` is
            then the size of its output.
        also: other sizes on which the same layer acts.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = ZEROS
    groups: int = 1
    transposed: bool = False
    also: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        if not self.size:
            return f"{'outputs' if self.transposed else 'inputs'} of every size"
        size, *others = ("x".join(map(str, size)) for size in (self.size, *self.also))
        also = f", but not of {', '.join(others)}, on which it also acts" if others else ""
        return f"{'outputs' if self.transposed else 'inputs'} of {size}{also}"

    @classmethod
    def of(
        cls,
        layer: nn.modules.conv._ConvNd,
        size: tuple[int, ...] = (),
        positions: tuple[int, ...] | None = None,
    ) -> Geometry:
        """Returns the geometry of a layer for inputs (..., *size), or of unspecified size.

        Args:
            layer: the convolution.
            size: the size of the inputs, or of the outputs if it is transposed; () if it is
                unspecified.
            positions: the size of the inputs of a transposed layer, to exclude outputs that no
                input reaches; None if all are reached.
        """
        before_after = layer._reversed_padding_repeated_twice
        padding = tuple(zip(before_after[::2], before_after[1::2], strict=True))[::-1]
        if layer.transposed:
            # PyTorch lists the padding that it needs internally; p crops the output.
            padding = tuple((int(p), int(p)) for p in layer.padding)
            if positions is not None:
                padding = _pad_to_positions(layer, size, positions, padding)
        padded = any(amount for pair in padding for amount in pair)
        return cls(
            size,
            tuple(layer.stride),
            tuple(layer.dilation),
            padding,
            layer.padding_mode if padded else ZEROS,
            layer.groups,
            bool(layer.transposed),
        )


def _pad_to_positions(
    layer: nn.modules.conv._ConvNd,
    size: tuple[int, ...],
    positions: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> tuple[tuple[int, int], ...]:
    """Returns the padding with this number of positions; output_padding can enlarge the output."""
    axes = zip(
        *(size, layer.kernel_size, layer.stride, layer.dilation, padding, positions), strict=True
    )
    found = []
    for n, k, s, d, (before, after), wanted in axes:
        fitting = (n + before + after - d * (k - 1) - 1) // s + 1
        found.append((before, after - s * (fitting - wanted)))
    return tuple(found)


class Convolution:
    """S as a linear map that is never formed as a matrix.

    Args:
        kernel: (o, i/g, *k); for a transposed layer (i, o/g, *k), the kernel of the adjoint.
        geometry: the other parameters of the convolution.
    """

    def __init__(self, kernel: Tensor, geometry: Geometry) -> None:
        self.kernel, self.geometry = kernel, geometry
        self.dtype, self.device = kernel.dtype, kernel.device
        channels = kernel.shape[1] * geometry.groups
        self._input = (channels, *geometry.size)

    @cached_property
    def _output(self) -> tuple[int, ...]:
        sizes = zip(
            self.geometry.size,
            self.kernel.shape[2:],
            *(self.geometry.stride, self.geometry.dilation, self.geometry.padding),
            strict=True,
        )
        positions = ((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in sizes)
        return (len(self.kernel), *positions)

    @property
    def positions(self) -> tuple[int, ...]:
        """The number of positions of the kernel, per axis."""
        return self._output[1:]

    @property
    def disjoint(self) -> bool:
        """Whether no input is used twice, so that S acts as the flattened kernel per position."""
        geometry = self.geometry
        steps = zip(self.kernel.shape[2:], geometry.stride, geometry.dilation, strict=True)
        unpadded = not any(amount for pair in geometry.padding for amount in pair)
        return unpadded and all(s >= d * (k - 1) + 1 for k, s, d in steps)

    @property
    def periodic(self) -> bool:
        """Whether padding is circular and the positions cover the torus exactly once."""
        geometry = self.geometry
        turns = zip(self.positions, geometry.stride, geometry.size, strict=True)
        return geometry.mode == CIRCULAR and all(p * s == n for p, s, n in turns)

    @property
    def shape(self) -> torch.Size:
        m, n = math.prod(self._output), math.prod(self._input)
        return torch.Size([n, m] if self.geometry.transposed else [m, n])

    @property
    def nu(self) -> int:
        return min(self.shape)

    def group(self, index: int) -> Convolution:
        """Returns the convolution of one group, a block of S."""
        geometry, rows = self.geometry, len(self.kernel) // self.geometry.groups
        one = Geometry(**{**vars(geometry), "groups": 1})
        return Convolution(self.kernel[index * rows : (index + 1) * rows], one)

    def matmat(self, V: Tensor) -> Tensor:
        return self._adjoint(V) if self.geometry.transposed else self._forward(V)

    def rmatmat(self, U: Tensor) -> Tensor:
        return self._forward(U) if self.geometry.transposed else self._adjoint(U)

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """‖S‖_F² = Σ ⟨K_t, K_u⟩ Π_a C_a[t_a, u_a] over pairs t, u of taps.

        C_a counts the positions along an axis at which both taps use the same input.
        """
        K = self.kernel.to(dtype or self.dtype).flatten(0, 1)
        total = K
        for axis, indices in enumerate(self._input_indices(), start=1):
            same = (indices[:, :, None] == indices[:, None, :]) & (indices >= 0)[:, :, None]
            C = same.sum(0).to(K)
            total = (total.movedim(axis, -1) @ C).movedim(-1, axis)
        return (total * K).sum()

    def _input_indices(self) -> list[Tensor]:
        """Returns the index of the input per axis, (positions, taps); -1 for a padded zero."""
        geometry, found = self.geometry, []
        for axis, n in enumerate(geometry.size):
            inputs = torch.arange(1.0, n + 1)[None]
            if any(geometry.padding[axis]):
                mode = "constant" if geometry.mode == ZEROS else geometry.mode
                inputs = pad(inputs[None], geometry.padding[axis], mode)[0]
            positions = geometry.stride[axis] * torch.arange(self.positions[axis])
            taps = geometry.dilation[axis] * torch.arange(self.kernel.shape[2 + axis])
            found.append(inputs[0].long()[positions[:, None] + taps] - 1)
        return found

    def dense(self) -> Tensor:
        """Returns S as a matrix, from products with the smaller identity."""
        m, n = self.shape
        eye = torch.eye(self.nu, dtype=self.dtype, device=self.device)
        return self.matmat(eye) if n <= m else self.rmatmat(eye).mT

    def _forward(self, V: Tensor) -> Tensor:
        return self._slide(V.mT.reshape(-1, *self._input)).flatten(1).mT

    def _adjoint(self, U: Tensor) -> Tensor:
        """Returns S^T U by autograd, because the map is linear for every padding mode."""
        x = U.new_zeros(U.shape[1], *self._input, requires_grad=True)
        with torch.enable_grad():
            y = self._slide(x)
        (result,) = torch.autograd.grad(y, x, U.mT.reshape(y.shape))
        return result.flatten(1).mT

    def _slide(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        around = [amount for pair in reversed(geometry.padding) for amount in pair]
        if any(around):
            mode = "constant" if geometry.mode == ZEROS else geometry.mode
            x = pad(x, around, mode)
        convolve = _CONVOLVE[len(geometry.size)]
        result: Tensor = convolve(
            x, self.kernel, None, geometry.stride, 0, geometry.dilation, geometry.groups
        )
        return result
