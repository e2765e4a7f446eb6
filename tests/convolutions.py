"""Convolutions with dense twins that are built tap by tap, without convolutions of PyTorch."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.operators.convolution import Geometry


def seen(index: int, n: int, mode: str) -> int | None:
    """The input at an index of the padded axis; None for a zero."""
    if 0 <= index < n:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % n
    if mode == "replicate":
        return min(max(index, 0), n - 1)
    return -index if index < 0 else 2 * (n - 1) - index  # reflect


def dense(kernel: Tensor, geometry: Geometry) -> Tensor:
    """The matrix of the operator, with rows and columns in the order (channel, *position)."""
    K = kernel.double().numpy()
    outputs, per_group, *taps = K.shape
    inputs = per_group * geometry.groups
    axes = list(
        zip(
            taps,
            geometry.size,
            *(geometry.stride, geometry.dilation, geometry.padding),
            strict=True,
        )
    )
    positions = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for k, n, s, d, p in axes]
    S = np.zeros((outputs, *positions, inputs, *geometry.size))
    for place in itertools.product(*map(range, positions)):
        for tap in itertools.product(*map(range, taps)):
            at = [
                seen(s * q + d * t - p[0], n, geometry.mode)
                for q, t, (_, n, s, d, p) in zip(place, tap, axes, strict=True)
            ]
            if None in at:
                continue
            for out in range(outputs):
                first = out * geometry.groups // outputs * per_group
                S[(out, *place, slice(first, first + per_group), *at)] += K[
                    (out, slice(None), *tap)
                ]
    matrix = torch.from_numpy(S).reshape(outputs * int(np.prod(positions)), -1)
    return matrix.mT if geometry.transposed else matrix


def layer(kind: type[nn.Module], *arguments: object, seed: int = 0, **options: object) -> nn.Module:
    """A convolution in float64, without bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*arguments, bias=False, **options).double()  # type: ignore[arg-type]


MODES = ("zeros", "circular", "reflect", "replicate")
# Kernel, stride, padding, dilation, groups.
SHAPES = [
    *((3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (5, 2, 2, 1, 1), (3, 1, "same", 2, 1)),
    *((4, 1, "same", 1, 1), (2, 2, 0, 1, 1), (1, 2, 0, 1, 1), (1, 1, 0, 1, 1)),
    *((3, 1, "valid", 1, 2), (3, 3, 0, 1, 1), (3, 1, 2, 1, 1)),
]
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    f"{kind.__name__} {shape} {mode} {channels}": (
        layer(kind, *channels, *shape, padding_mode=mode),
        size,
    )
    for kind, size in ((nn.Conv1d, (9,)), (nn.Conv2d, (6, 5)))
    for channels in ((4, 6), (6, 2))
    for mode in MODES
    for shape in SHAPES
}
CASES |= {
    "Conv3d": (layer(nn.Conv3d, 2, 3, 3, padding=1), (3, 4, 3)),
    "circular, even turns": (
        layer(nn.Conv2d, 2, 3, 3, 2, 1, padding_mode="circular"),
        (6, 8),
    ),
    "circular, dilated": (
        layer(nn.Conv2d, 2, 3, (3, 5), (2, 1), (1, 4), (1, 2), padding_mode="circular"),
        (6, 8),
    ),
    "transposed": (layer(nn.ConvTranspose2d, 4, 6, 3, 2, 1, 1), (6, 8)),
    "transposed, disjoint": (layer(nn.ConvTranspose2d, 4, 6, 2, 2), (4, 6)),
    "transposed, groups": (layer(nn.ConvTranspose1d, 4, 6, 4, 2, 1, groups=2), (8,)),
    "transposed, dilated": (layer(nn.ConvTranspose2d, 2, 3, 3, 1, 1, dilation=2), (7, 8)),
}
