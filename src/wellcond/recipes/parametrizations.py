"""Weights that torch.nn.utils computes from other tensors by normalising, masking or a map.

The module supports `weight_norm` and `spectral_norm` under their old names (`X_g`, `X_v`;
`X_orig`, `X_u`, `X_v`) and under the names of torch.nn.utils.parametrizations
(`parametrizations.X.original0`), `prune` (`X_orig`, `X_mask`), and `orthogonal` while its map makes
no difference. Every weight is the one that the layer computes in eval mode, with sums in float64. A
row of zeros under weight_norm therefore becomes NaN, and spectral_norm divides by the sigma of its
u and v, whether or not they have converged.

Letters: W a weight of any shape, M (h, w) the matrix whose rows are one side of W and whose columns
are all others; g, v the norms and directions of weight_norm; u, v the singular vectors of
spectral_norm, sigma = u^T M v.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wellcond.recipes.base import SMALL, Candidate, Content, Read, Recipe, RecipeError
from wellcond.weights.matrices import entries
from wellcond.weights.parametrized import find_parametrized
from wellcond.weights.quantised import FLOATING

_BLOCK = 1 << 20  # entries that are in float64 at once
# A file does not store the side of W to which u of spectral_norm belongs. For the right side, u is
# close to M v / ||M v||, because every forward pass in training sets it to this value. For a wrong
# side, the cosine is that of random directions: above 0.99 once in a million in 8 dimensions.
_CLOSE, _APART, _SIDE = 0.99, 0.9, 8
_MAP_UNKNOWN = (
    "torch's orthogonal does not store whether its map is matrix_exp, cayley or householder"
)


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightNorm(Recipe):
    """W = g v / ||v||, with norms over the sides on which g has length 1.

    Attributes:
        norms: the shape of g, with as many sides as W.
    """

    keeps: str = ""
    norms: tuple[int, ...] = ()

    def build(self, read: Read, index: int) -> Tensor:
        v, g = self.parts
        W = _load(self, v, read)
        scales = read(g).to(torch.float64).reshape(self.norms) / self._norms(W)
        for rows, scale in _by_rows(W, scales):
            rows.copy_(rows.to(torch.float64) * scale)
        return W

    def store(self, W: Tensor, read: Read) -> dict[str, Tensor]:
        """Returns v = W and its norms g. Where v would be zero, its old value stays and g is 0."""
        v, g = self.parts
        old_v, old_g = read(v), read(g)
        new = W.to(old_v.dtype)
        lost = self._norms(new) == 0
        norms = self._norms(W).masked_fill(lost, 0.0)
        return {
            v: torch.where(lost, old_v, new),
            g: norms.to(old_g.dtype).reshape(old_g.shape),
        }

    def _norms(self, W: Tensor) -> Tensor:
        sides = tuple(side for side, length in enumerate(self.norms) if length == 1)
        return _sums(W, W, sides).sqrt()


@dataclass(frozen=True)
class SpectralNorm(Recipe):
    """W = orig / sigma, whose spectral norm is about 1 for any scale of orig.

    Attributes:
        sides: the sides of W that might be the rows of M. The file does not store which one is.
    """

    keeps: str = ""
    sides: tuple[int, ...] = (0,)

    def build(self, read: Read, index: int) -> Tensor:
        W = _load(self, self.parts[0], read)
        _, sigma = self._read_scale(W, read)
        for rows, divisor in _by_rows(W, sigma.expand(self.shape)):
            rows.copy_(rows.to(torch.float64) / divisor)
        return W

    def store(self, W: Tensor, read: Read) -> dict[str, Tensor]:
        """Returns orig = |sigma| W with the old sigma, and u, v as its leading singular vectors.

        `build` gives W / ||M||_2 from these: the division undoes a change of scale.
        """
        orig, u, v = self.parts
        side, sigma = self._read_scale(_load(self, orig, read), read)
        dtypes = [read(name).dtype for name in self.parts]
        new = (W.to(torch.float64) * sigma.abs()).to(dtypes[0])
        if not torch.isfinite(new).all() or not new.any():
            raise RecipeError("spectral_norm cannot divide zero, NaN or infinity by its norm")
        left, right = _leading_vectors(new.movedim(side, 0).flatten(1).to(torch.float64))
        return {orig: new, u: left.to(dtypes[1]), v: right.to(dtypes[2])}

    def _read_scale(self, W: Tensor, read: Read) -> tuple[int, Tensor]:
        """The side of W that is the rows of M, and sigma.

        Raises:
            RecipeError: several sides are possible and give different results, and u fits none or
                several of them.
        """
        u, v = (read(name).to(torch.float64) for name in self.parts[1:])
        found: list[tuple[float, int, Tensor]] = []
        for side in self.sides:
            others = tuple(i for i in range(W.ndim) if i != side)
            behind = [1 if i == side else length for i, length in enumerate(W.shape)]
            image = _sums(W, v.reshape(behind), others).flatten()  # M v
            sigma = u @ image
            found.append((float(sigma.abs() / (u.norm() * image.norm())), side, sigma))
        (cosine, side, sigma), *rest = sorted(found, key=lambda reading: -reading[0])
        same = all(torch.isclose(sigma, other, rtol=1e-12, atol=0.0) for *_, other in rest)
        surely = cosine > _CLOSE and all(other < _APART for other, *_ in rest)
        if same or (surely and len(u) >= _SIDE):
            return side, sigma
        raise RecipeError(
            f"spectral_norm does not store to which side of {self.shape} {self.parts[1]} belongs, "
            "and its values do not determine it"
        )


@dataclass(frozen=True)
class Masked(Recipe):
    """W = orig * mask."""

    keeps: str = "pruned, and a change would undo its mask"

    def build(self, read: Read, index: int) -> Tensor:
        orig, mask = self.parts
        W = _load(self, orig, read)
        for start, stop in _ranges(W):
            W[start:stop] *= read(mask, (start, stop)).to(getattr(torch, self.dtype))
        return W


@dataclass(frozen=True)
class Orthogonal(Recipe):
    """W = the first columns of base Q(orig), or their transpose if W is wide.

    Q is one of three maps, and the file does not store which one. All of them map the initial value
    of orig, which is zero below the diagonal and -1 on it, to the identity.
    """

    keeps: str = "orthogonal by its parametrization"

    def build(self, read: Read, index: int) -> Tensor:
        base, orig = self.parts
        if not _is_start(read(orig), self.shape):
            raise RecipeError(_MAP_UNKNOWN)
        m, n = self.shape[-2:]
        W = read(base)[..., : min(m, n)].to(_wide(self.dtype))
        return (W if m >= n else W.mT).contiguous()


# --- from names and shapes ------------------------------------------------------------------------


def find_parametrizations(content: Content) -> Iterator[Candidate]:
    """The weights for which the file stores only the parts of a parametrization."""
    for label, parts in find_parametrized(content.tensors):
        names = sorted(parts.values(), key=lambda name: -entries(content.shape(name)))
        shape = content.shape(names[0])
        if len(shape) > 1 and 0 not in shape:
            yield Candidate(label, tuple(names), partial(_make, content, label, parts))


def _make(content: Content, label: str, parts: Mapping[str, str]) -> Recipe:
    """Builds the recipe of a weight.

    Raises:
        RecipeError: the parts do not belong to exactly one known parametrization, or do not fit.
    """
    for roles, make in _KINDS.items():
        if parts.keys() == set(roles):
            return make(content, label, [parts[role] for role in roles])
    for roles in _KINDS:
        if parts.keys() < set(roles) and parts.keys() != {"original"}:
            (missing, *_) = (role for role in roles if role not in parts)
            raise RecipeError(f"its {missing} is missing")
    listed = ", ".join(sorted(parts))
    if "orig" in parts or any(re.match(r"[1-9]|(orig|v|g)_", part) for part in parts):
        raise RecipeError(f"several methods compute it from {listed}")
    raise RecipeError(f"the file does not store which parametrization computes it from {listed}")


def _make_weight_norm(content: Content, label: str, names: list[str]) -> Recipe:
    v, g = names
    shape, norms = content.shape(v), content.shape(g)
    _check(content, names, shape)
    sides = (1,) * len(shape) if entries(norms) == 1 else norms
    fits = len(sides) == len(shape) and entries(sides) == max(sides)
    if not fits or any(n not in (1, side) for n, side in zip(sides, shape, strict=True)):
        raise RecipeError(f"{g} of shape {norms} does not fit norms of {v} of shape {shape}")
    note = "computed by weight_norm"
    return WeightNorm(label, (v, g), shape, note, content.dtype(v), norms=sides)


def _make_spectral_norm(content: Content, label: str, names: list[str]) -> Recipe:
    orig, u, v = names
    shape, left, right = (content.shape(name) for name in names)
    _check(content, names, shape)
    fitting = tuple(i for i, side in enumerate(shape) if left == (side,))
    # By default, torch uses side 1 of transposed layers and side 0 of others.
    sides = tuple(side for side in fitting if side < 2) or fitting
    if not sides or len(right) != 1 or left[0] * right[0] != entries(shape):
        raise RecipeError(f"{u} of shape {left} and {v} of {right} do not fit {orig} of {shape}")
    note = "computed by spectral_norm, which sets its scale"
    return SpectralNorm(label, (orig, u, v), shape, note, content.dtype(orig), sides=sides)


def _make_masked(content: Content, label: str, names: list[str]) -> Recipe:
    orig, mask = names
    shape, kind = content.shape(orig), content.dtype(mask)
    binary = re.fullmatch(r"bool|u?int\d+", kind)
    _check(content, names[:1] if binary else names, shape)
    if content.shape(mask) != shape:
        raise RecipeError(f"{mask} has the shape {content.shape(mask)}, but {orig} has {shape}")
    return Masked(label, (orig, mask), shape, "pruned: its mask is applied", content.dtype(orig))


def _make_orthogonal(content: Content, label: str, names: list[str]) -> Recipe:
    base, orig = names
    shape = content.shape(orig)
    _check(content, names, shape)
    *stack, m, n = shape
    if content.shape(base) != (*stack, max(m, n), max(m, n)):
        raise RecipeError(f"{base} of shape {content.shape(base)} does not fit {orig} of {shape}")
    # The first rows show whether the weight was trained.
    if not stack and 2 * n <= SMALL and not _is_start(content.read(orig, (0, min(m, 2))), shape):
        raise RecipeError(_MAP_UNKNOWN)
    note = "the base of torch's orthogonal, from which training has not moved it"
    return Orthogonal(label, (base, orig), shape, note, content.dtype(base))


def _check(content: Content, names: list[str], shape: tuple[int, ...]) -> None:
    """Raises unless the shape has at least two sides and the parts are real floating point."""
    if len(shape) < 2 or 0 in shape:
        raise RecipeError(f"a tensor of shape {shape} is not a matrix")
    for name in names:
        dtype = content.dtype(name)
        if dtype not in FLOATING or dtype.startswith("complex"):
            raise RecipeError(f"{name} has the dtype {dtype}, not real floating point")


# The recipes by the names of their parts, the part with most entries first.
_KINDS: dict[tuple[str, ...], Callable[[Content, str, list[str]], Recipe]] = {
    ("v", "g"): _make_weight_norm,
    ("original1", "original0"): _make_weight_norm,
    ("orig", "u", "v"): _make_spectral_norm,
    ("original", "0._u", "0._v"): _make_spectral_norm,
    ("orig", "mask"): _make_masked,
    ("0.base", "original"): _make_orthogonal,
}


# --- arithmetic -----------------------------------------------------------------------------------


def _is_start(X: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether orthogonal maps a tensor of this shape with the first rows X to the identity."""
    beyond = X.tril(-1) if shape[-2] >= shape[-1] else X.triu(1)
    return not bool(beyond.any()) and bool((X.diagonal(dim1=-2, dim2=-1) == -1).all())


def _leading_vectors(M: Tensor) -> tuple[Tensor, Tensor]:
    """u and v of the largest singular value of a float64 matrix, with u^T M v > 0."""
    if M.shape[0] > M.shape[1]:
        right, left = _leading_vectors(M.mT)
        return left, right
    M = M / M.abs().max()
    right = M.mT @ torch.linalg.eigh(M @ M.mT).eigenvectors[:, -1]
    left = M @ (right / right.norm())
    return left / left.norm(), right / right.norm()


def _load(recipe: Recipe, name: str, read: Read) -> Tensor:
    """Loads a part with the shape of the weight into a new tensor, which becomes the weight."""
    W = torch.empty(recipe.shape, dtype=_wide(recipe.dtype), device="cpu")
    for start, stop in _ranges(W):
        W[start:stop] = read(name, (start, stop))
    return W


def _wide(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def _ranges(W: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows to convert at once."""
    step = max(1, _BLOCK * len(W) // W.numel())
    for start in range(0, len(W), step):
        yield start, min(start + step, len(W))


def _by_rows(W: Tensor, factor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of W at a time with the rows of `factor`, which broadcasts to W."""
    for start, stop in _ranges(W):
        yield W[start:stop], factor if len(factor) == 1 else factor[start:stop]


def _sums(W: Tensor, factor: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Sums of W * factor over some sides, in float64. These sides remain with length 1."""
    parts = [
        (rows.to(torch.float64) * other).sum(sides, keepdim=True)
        for rows, other in _by_rows(W, factor)
    ]
    return torch.stack(parts).sum(0) if 0 in sides else torch.cat(parts)
