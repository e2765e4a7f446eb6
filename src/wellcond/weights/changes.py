"""The change that an adapter adds to a weight, as a product of two factors B A, times a scale.

LoRA (Hu et al., arXiv 2106.09685) stores B and A; LoCon also stores a core between them. The
factors of the others are computed from their tensors, in float64:

- LoHa (arXiv 2108.06098): the entrywise product of B1 A1 and B2 A2. The rows of B are the Kronecker
  products of the rows of B1 and B2, and the columns of A those of the columns of A1 and A2;
- LoKr (LyCORIS, arXiv 2309.14859): kron(W1, W2), where each W is a full matrix or a product;
- VeRA (arXiv 2310.11454): diag(b) B diag(d) A, where B and A are slices of projections that all
  layers share;
- RandLoRA (arXiv 2502.00987): a sum of such products, with diagonals on the shorter side.

With a core T (r, r, k, ...) between the factors of a kernel, A is T times the second factor.

Letters: W (m, n), or a kernel flattened to this shape; B (m, k), A (k, n); r the rank by which a
scale is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # by their roles, such as "hada_w1_a"
Shape = tuple[int, int]
Factors = tuple[Tensor, Tensor]


class UnknownAdapterError(ValueError):
    """The matrix that an adapter adds is unknown; the message is the reason."""


@dataclass(frozen=True)
class Form:
    """How to compute the change from the tensors of one kind of adapter.

    Attributes:
        name: the name of the kind.
        required: the roles of its tensors: for each tuple, all roles of one of its choices.
        optional: the roles of optional tensors.
        shared: the roles of tensors that all layers share.
        alpha: the key of alpha in adapter_config.json; "" if the scale is 1.
        ranked: roles; r is the first dimension of the first tensor of these that is present.
        factors: computes B and A from the tensors by role and the shape of W, or None if that is
            unknown.
    """

    name: str
    required: tuple[tuple[tuple[str, ...], ...], ...]
    factors: Callable[[Tensors, Shape | None], Factors]
    alpha: str = "alpha"
    optional: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    ranked: tuple[str, ...] = ()

    def choose(self, roles: Collection[str]) -> tuple[str, ...]:
        """The roles among these that it uses, without `shared`; () if a required one is missing."""
        chosen: list[str] = []
        for choices in self.required:
            found = next((choice for choice in choices if {*choice} <= {*roles}), None)
            if found is None:
                return ()
            chosen += found
        return (*chosen, *(role for role in self.optional if role in roles))


def _of_lora(tensors: Tensors, _: Shape | None) -> Factors:
    B, A, core = tensors["B"].flatten(1), tensors["A"], tensors.get("mid")
    if core is None:
        return B, A.flatten(1)
    if core.ndim < 3 or A.shape[1] != A.flatten(1).shape[1]:
        raise UnknownAdapterError("with lora_mid in addition to A and B, it is not a known LoRA")
    return B.double(), _apply_core(core, A.flatten(1))


def _apply_core(core: Tensor, A: Tensor) -> Tensor:
    """(r, n) from a core (r, q, k, ...) and a factor (q, channels)."""
    return torch.einsum("pq...,qi->pi...", core.double(), A.double()).flatten(1)


def _of_pair(tensors: Tensors, stem: str, core: str) -> Factors:
    """The factors `stem`_a and `stem`_b; the first is stored transposed if there is a core."""
    a, b = tensors[f"{stem}_a"].double(), tensors[f"{stem}_b"].double()
    if core in tensors:
        return a.mT, _apply_core(tensors[core], b)
    return a.flatten(1), b.flatten(1)


def _of_loha(tensors: Tensors, _: Shape | None) -> Factors:
    (B1, A1), (B2, A2) = (_of_pair(tensors, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
    B = torch.einsum("mi,mj->mij", B1, B2).flatten(1)
    return B, torch.einsum("in,jn->ijn", A1, A2).flatten(0, 1)


def _of_lokr(tensors: Tensors, _: Shape | None) -> Factors:
    (B1, A1), (B2, A2) = (_of_part(tensors, f"lokr_w{i}", f"lokr_t{i}") for i in (1, 2))
    return _kron(B1, B2), _kron(A1, A2)


def _kron(one: Tensor, other: Tensor) -> Tensor:
    # torch.kron refuses some transposed matrices.
    sides = (one.shape[i] * other.shape[i] for i in (0, 1))
    return torch.einsum("ab,cd->acbd", one, other).reshape(*sides)


def _of_part(tensors: Tensors, stem: str, core: str) -> Factors:
    if stem not in tensors:
        return _of_pair(tensors, stem, core)
    whole = tensors[stem].double().flatten(1)
    one = torch.eye(min(whole.shape), dtype=torch.float64, device=whole.device)
    return (one, whole) if len(one) == len(whole) else (whole, one)


def _of_vera(tensors: Tensors, shape: Shape | None) -> Factors:
    m, n = _need(shape)
    b, d = (tensors[f"vera_lambda_{one}"].double() for one in "bd")
    B, A = (tensors[f"vera_{one}"].double() for one in "BA")
    return b[:, None] * B[:m], d[:, None] * A[:, :n]


def _of_randlora(tensors: Tensors, shape: Shape | None) -> Factors:
    m, n = _need(shape)
    scales, gains = tensors["randlora_lambda"].double(), tensors["randlora_gamma"].double()
    bases = scales.shape[1]
    short = tensors["randlora_A"].double()[:, :bases, : min(m, n)]
    # PEFT flattens the two in different orders, so it pairs their vectors differently.
    short = (scales[..., None] * short * gains).flatten(0, 1)
    long = tensors["randlora_B"].double()[: max(m, n), :bases].flatten(1)
    return (long, short) if n <= m else (short.mT, long.mT)


def _need(shape: Shape | None) -> Shape:
    if shape is None:
        raise UnknownAdapterError(
            "its tensors do not give its number of inputs: pass the model that it adapts as `base`"
        )
    return shape


_LOKR_1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_LOKR_2 = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
FORMS = (
    Form(
        "LoRA",
        ((("B", "A"),),),
        _of_lora,
        "lora_alpha",
        optional=("magnitude_vector", "mid"),
        ranked=("A",),
    ),
    Form(
        "LoHa",
        ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
        _of_loha,
        optional=("hada_t1", "hada_t2"),
        ranked=("hada_w1_b",),
    ),
    Form(
        "LoKr",
        (_LOKR_1, _LOKR_2),
        _of_lokr,
        optional=("lokr_t2",),
        ranked=("lokr_w1_b", "lokr_w2_b"),
    ),
    Form(
        "VeRA",
        ((("vera_lambda_b", "vera_lambda_d"),),),
        _of_vera,
        "",
        shared=("vera_A", "vera_B"),
        ranked=("vera_lambda_d",),
    ),
    Form(
        "RandLoRA",
        ((("randlora_lambda", "randlora_gamma"),),),
        _of_randlora,
        "randlora_alpha",
        shared=("randlora_A", "randlora_B"),
        ranked=("randlora_lambda",),
    ),
)
