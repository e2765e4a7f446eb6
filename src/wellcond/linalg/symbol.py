"""Convolutions on a torus, whose singular values follow exactly from their frequencies.

With stride s, an axis of N points splits into s phases of N/s points, x_r[q] = x[s q + r]. At each
coarse frequency w, the map is the matrix (o, i prod(s)) of the Fourier coefficients of the phases
of the kernel. The singular values of these matrices over all w are those of the periodic
convolution.

Letters: K (o, i, *k) the kernel; s, d stride and dilation of an axis; N the size of the input; w
frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond.linalg.lapack import singular_values


def _place_taps(K: Tensor, dilation: Sequence[int], size: Sequence[int]) -> Tensor:
    """The taps on a torus of this size, in float64; coinciding taps are added."""
    laid = K.to(torch.float64).flatten(2)
    places = torch.zeros(1, dtype=torch.int64)
    for k, d, n in zip(K.shape[2:], dilation, size, strict=True):
        places = (places[:, None] * n + (d * torch.arange(k)) % n).flatten()
    torus = laid.new_zeros(*K.shape[:2], math.prod(size))
    torus.index_add_(2, places.to(K.device), laid)
    return torus.reshape(*K.shape[:2], *size)


def symbol_matrices(
    K: Tensor, stride: Sequence[int], dilation: Sequence[int], size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The matrices (f, o, i prod(s)) at half of the coarse frequencies, and their multiplicities.

    A frequency and its negative have the same singular values, because K is real.
    """
    torus = _place_taps(K, dilation, size)
    axes = len(stride)
    coarse = [n // s for n, s in zip(size, stride, strict=True)]
    phases = torus.reshape(
        *torus.shape[:2], *(x for pair in zip(coarse, stride, strict=True) for x in pair)
    )
    positions = [2 + 2 * a for a in range(axes)]
    symbol = torch.fft.fftn(phases, dim=positions)
    rest = [3 + 2 * a for a in range(axes)]
    matrices = symbol.permute(*positions, 0, 1, *rest).reshape(math.prod(coarse), len(K), -1)
    index = torch.arange(math.prod(coarse)).reshape(coarse)
    mirrored = index
    for a, n in enumerate(coarse):
        mirrored = mirrored.index_select(a, (-torch.arange(n)) % n)
    index, mirrored = index.flatten(), mirrored.flatten()
    kept = index <= mirrored
    counts = torch.where(index == mirrored, 1, 2)[kept]
    return matrices[kept.to(K.device)], counts


def periodic_singular_values(
    K: Tensor, stride: Sequence[int], dilation: Sequence[int], size: Sequence[int]
) -> Tensor:
    """All nu singular values of the periodic convolution on a torus, descending, float64.

    Args:
        K: the kernel (o, i, *k).
        stride: per axis; it divides the size.
        dilation: per axis.
        size: of the input.
    """
    matrices, counts = symbol_matrices(K, stride, dilation, size)
    sigma = singular_values(matrices)
    return (
        sigma.repeat_interleave(counts.to(sigma.device), 0).flatten().sort(descending=True).values
    )
