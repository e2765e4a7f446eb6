"""Weights under torch.nn.utils, compared entry by entry with torch in eval mode."""

import itertools
import random
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from recipes.support import build_all, content_from, reason_of
from wellcond.recipes.base import Content, Recipe, RecipeError
from wellcond.recipes.find import find_recipes
from wellcond.recipes.parametrizations import find_parametrizations

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ULP = {torch.float32: 2**-23, torch.float64: 1e-13}  # float64 is summed in another order


def old(name: str, module: nn.Module, *args: Any, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the functions are deprecated
        return getattr(nn.utils, name)(module, *args, **settings)


def recipe_of(tensors: Mapping[str, Tensor]) -> tuple[Recipe, Content]:
    """The only recipe."""
    content = content_from(tensors)
    (candidate,) = find_parametrizations(content)
    recipe = candidate.make()
    assert recipe.label == candidate.label
    assert set(recipe.parts) == set(candidate.parts)
    sizes = [tensors[name].numel() for name in recipe.parts]
    assert sizes[0] == max(sizes)
    return recipe, content


def built(tensors: Mapping[str, Tensor]) -> Tensor:
    recipe, content = recipe_of(tensors)
    W = build_all(recipe, content)
    assert tuple(W.shape) == recipe.shape
    assert W.dtype == (torch.float64 if recipe.dtype == "float64" else torch.float32)
    return W


def reason(tensors: Mapping[str, Tensor]) -> str:
    content = content_from(tensors)
    (candidate,) = find_parametrizations(content)
    assert len(set(candidate.parts)) == len(candidate.parts)
    return reason_of(candidate, content)


def names_of(tensors: Mapping[str, Tensor]) -> list[str]:
    return [candidate.label for candidate in find_parametrizations(content_from(tensors))]


def weight(module: nn.Module, name: str) -> Tensor:
    """The weight that the layer computes in eval mode."""
    module.eval()
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        return getattr(module, name).detach()


def assert_equals_torch(W: Tensor, module: nn.Module, name: str) -> None:
    """Equal to the float64 weight up to one rounding, and close to it in the module's dtype."""
    own = weight(module, name)
    wide = weight(module.double(), name)
    module.to(own.dtype)
    torch.testing.assert_close(W, wide.to(W.dtype), rtol=ULP[W.dtype], atol=0, equal_nan=True)
    eps = torch.finfo(own.dtype).eps
    scale = float(wide.abs().nan_to_num().max())
    torch.testing.assert_close(W.to(own.dtype), own, rtol=8 * eps, atol=eps * scale, equal_nan=True)


def spread(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    T = torch.randn(shape, dtype=torch.float64)
    for side, length in enumerate(shape):
        factors = 2.0 ** torch.linspace(-2, 2, length, dtype=torch.float64)
        T *= factors.reshape([-1 if i == side else 1 for i in range(len(shape))])
    return T.to(dtype)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread(*parameter.shape))


# --- weight_norm ----------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Linear": (lambda: nn.Linear(7, 5), "weight"),
    "Linear of one row": (lambda: nn.Linear(7, 1), "weight"),
    "Linear of one column": (lambda: nn.Linear(1, 6), "weight"),
    "square Linear": (lambda: nn.Linear(6, 6), "weight"),
    "Embedding": (lambda: nn.Embedding(9, 4), "weight"),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), "weight"),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 5), "weight"),
    "Conv2d": (lambda: nn.Conv2d(3, 5, (2, 3)), "weight"),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 2, 2), "weight"),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), "weight"),
    "LSTM": (lambda: nn.LSTM(3, 4), "weight_hh_l0"),
    "GRU": (lambda: nn.GRU(3, 4, bidirectional=True), "weight_ih_l0_reverse"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
}


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_norm_equals_torch_for_all_sides_and_names(layer: str, dtype: torch.dtype) -> None:
    make, name = LAYERS[layer]
    sides = getattr(make(), name).ndim
    for dim, new in itertools.product((*range(sides), None), (True, False)):
        torch.manual_seed(sides)
        module = make()
        if new:
            parametrizations.weight_norm(module, name, dim=dim)
        else:
            old("weight_norm", module, name, dim=dim)
        randomise(module.to(dtype))
        assert_equals_torch(built(module.state_dict()), module, name)


def test_shape_of_norms_determines_sides() -> None:
    v = spread(3, 4)
    for norms, W in {
        (): v / v.norm(),
        (1,): v / v.norm(),
        (1, 1): v / v.norm(),
        (3, 1): v / v.norm(dim=1, keepdim=True),
        (1, 4): v / v.norm(dim=0, keepdim=True),
    }.items():
        tensors = {"weight_g": torch.ones(norms, dtype=torch.float64), "weight_v": v}
        torch.testing.assert_close(built(tensors), W, rtol=1e-14, atol=0)


def test_zero_row_under_weight_norm_is_nan() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        module.parametrizations.weight.original1[1] = 0.0
    W = built(module.state_dict())
    assert W[1].isnan().all()
    assert not W[[0, 2]].isnan().any()
    assert_equals_torch(W, module, "weight")


def test_weight_norm_reads_large_weights_in_ranges_of_rows() -> None:
    for shape, norms in (((3000, 800), (3000, 1)), ((3000, 800), (1, 800)), ((2, 1 << 21), (2, 1))):
        v, g = torch.randn(shape), torch.randn(norms)
        sides = tuple(side for side, length in enumerate(norms) if length == 1)
        W = v.double() * (g / v.double().norm(dim=sides, keepdim=True))
        found = built({"weight_g": g, "weight_v": v})
        torch.testing.assert_close(found, W.float(), rtol=2**-23, atol=0)


def after_store(tensors: Mapping[str, Tensor], W: Tensor) -> dict[str, Tensor]:
    """The tensors of the file after W is stored."""
    recipe, content = recipe_of(tensors)
    assert not recipe.keeps
    new = recipe.store(W, content.read)
    for name, tensor in new.items():
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
    return {**tensors, **new}


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_norm_stores_weight_up_to_two_roundings(layer: str, dtype: torch.dtype) -> None:
    make, name = LAYERS[layer]
    sides = getattr(make(), name).ndim
    eps = torch.finfo(dtype).eps
    for dim in (*range(sides), None):
        torch.manual_seed(1)
        module = parametrizations.weight_norm(make(), name, dim=dim).to(dtype)
        W = spread(*getattr(module, name).shape)
        if dtype is not torch.float64:
            W = W.float()
        stored = after_store(module.state_dict(), W)
        again = built(stored)
        # Half an eps for v and half for g; float16 entries below 2^-14 lose more.
        bound = 1.05 * max(eps, 2**-22 if W.dtype == torch.float32 else 0)
        tiny = torch.finfo(dtype).tiny * eps * (dtype == torch.float16)
        torch.testing.assert_close(again, W, rtol=bound, atol=2 * tiny)
        module.load_state_dict(stored)
        assert_equals_torch(again, module, name)


def test_zero_row_is_stored_as_zero_norm() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 3)).half()
    W = torch.randn(3, 4)
    W[1], W[2] = 0.0, 1e-9  # float16 rounds 1e-9 to zero
    stored = after_store(module.state_dict(), W)
    again = built(stored)
    torch.testing.assert_close(again, W, rtol=1e-3, atol=1e-8)
    assert not again[1:].any()
    kept = stored["parametrizations.weight.original1"]
    assert torch.equal(kept[1:], module.parametrizations.weight.original1[1:])


# --- spectral_norm --------------------------------------------------------------------------------

SPECTRAL: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(7, 12),
    "Linear of one row": lambda: nn.Linear(7, 1),
    "square Linear": lambda: nn.Linear(16, 16),
    "Embedding": lambda: nn.Embedding(9, 4),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "square Conv2d": lambda: nn.Conv2d(16, 16, (2, 3)),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(6, 4, 5),
    "square ConvTranspose1d": lambda: nn.ConvTranspose1d(16, 16, 5),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(3, 2, 2),
}


def spectral(make: Callable[[], nn.Module], new: bool, steps: int = 40, **settings: Any) -> Any:
    """A layer after some training steps."""
    torch.manual_seed(0)
    module = make()
    randomise(module)
    if new:
        parametrizations.spectral_norm(module, **settings)
    else:
        old("spectral_norm", module, **settings)
    advance(module, steps)
    return module.eval()


def advance(module: nn.Module, steps: int) -> None:
    """Advances the vectors of spectral_norm as forward passes in training do."""
    module.train()
    with torch.no_grad():
        for _ in range(steps):
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
            assert (
                module.weight is not None
            )  # computing it advances the vectors under the new names


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("layer", SPECTRAL)
def test_spectral_norm_equals_torch_for_all_sides(layer: str, new: bool) -> None:
    for settings in ({}, {"dim": 0}, {"dim": 1}):
        module = spectral(SPECTRAL[layer], new, **settings)
        W = built(module.state_dict())
        assert_equals_torch(W, module, "weight")
        wide = module.double().state_dict()
        assert_equals_torch(built(wide), module, "weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
def test_spectral_norm_in_half_precision_uses_rounded_tensors(
    new: bool, dtype: torch.dtype
) -> None:
    module = spectral(SPECTRAL["Conv1d"], new).to(dtype)
    W = built(module.state_dict())
    expected = weight(module.double(), "weight").float()
    torch.testing.assert_close(W, expected, rtol=2**-23, atol=0)


def test_spectral_norm_divides_by_sigma_of_stored_vectors() -> None:
    """This also holds before they converge, when the spectral norm of the weight is not 1."""
    for make in (SPECTRAL["Linear"], SPECTRAL["ConvTranspose1d"]):
        module = spectral(make, new=False, steps=0)
        W = built(module.state_dict())
        torch.testing.assert_close(W, weight(module, "weight"), rtol=1e-4, atol=0)
        u, v = module.weight_u.double(), module.weight_v.double()
        side = 0 if isinstance(module, nn.Linear) else 1
        M = module.weight_orig.detach().double().movedim(side, 0).flatten(1)
        expected = module.weight_orig.detach().double() / (u @ M @ v)
        torch.testing.assert_close(W, expected.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("layer", ["square Linear", "square Conv2d", "square ConvTranspose1d"])
def test_untrained_vectors_that_fit_two_sides_give_a_reason(layer: str) -> None:
    module = spectral(SPECTRAL[layer], new=False, steps=0)
    assert "does not store to which side of (16, 16" in reason(module.state_dict())


def test_two_possible_sides_with_equal_weight_are_accepted() -> None:
    S = spread(5, 5).mT @ spread(5, 5)
    S = S + S.mT
    u, v = torch.randn(5).double(), torch.randn(5).double()
    for left, right in ((u, u), (u, v)):
        tensors = {"weight_orig": S, "weight_u": left, "weight_v": right}
        torch.testing.assert_close(built(tensors), S / (left @ S @ right), rtol=1e-11, atol=0)


def test_side_of_outputs_is_first_or_second() -> None:
    """Another side is used only if neither the first nor the second fits."""
    module = spectral(lambda: nn.Conv2d(5, 3, 3), new=True)
    assert_equals_torch(built(module.state_dict()), module, "weight")
    module = spectral(lambda: nn.Conv2d(5, 3, (4, 2)), new=True, dim=2)
    assert_equals_torch(built(module.state_dict()), module, "weight")


def test_short_vectors_do_not_determine_side() -> None:
    module = spectral(lambda: nn.Conv1d(4, 4, 2), new=True)
    assert "its values do not determine it" in reason(module.state_dict())


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("layer", SPECTRAL)
def test_stored_weight_under_spectral_norm_has_norm_one(layer: str, new: bool) -> None:
    module = spectral(SPECTRAL[layer], new)
    torch.manual_seed(2)
    W = spread(*module.weight.shape).float()
    stored = after_store(module.state_dict(), W)
    again = built(stored)
    side = 1 if "Transpose" in layer else 0
    M = W.double().movedim(side, 0).flatten(1)
    top = torch.linalg.matrix_norm(M, 2)
    torch.testing.assert_close(again, (W / top).float(), rtol=1e-6, atol=0)
    module.load_state_dict(stored)
    assert_equals_torch(again, module, "weight")
    # A forward pass in training does not change converged vectors.
    advance(module, 1)
    torch.testing.assert_close(weight(module, "weight"), again, rtol=1e-5, atol=1e-6)


def test_store_under_spectral_norm_keeps_sign_and_scale() -> None:
    module = spectral(SPECTRAL["Linear"], new=False, steps=0)
    state = module.state_dict()
    W = built(state)
    sigma = state["weight_orig"][0, 0] / W[0, 0]
    state["weight_u"] = state["weight_u"] * -sigma.sign()  # sigma is negative
    W = built(state)
    stored = after_store(state, W)
    torch.testing.assert_close(stored["weight_orig"], -state["weight_orig"])
    again = built(stored)
    torch.testing.assert_close(again, W / torch.linalg.matrix_norm(W, 2), rtol=1e-5, atol=0)


def test_zero_cannot_be_stored_under_spectral_norm() -> None:
    state = spectral(SPECTRAL["Linear"], new=True).state_dict()
    recipe, content = recipe_of(state)
    with pytest.raises(ValueError, match="cannot divide zero"):
        recipe.store(torch.zeros(recipe.shape), content.read)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_store_under_spectral_norm_keeps_shape_of_spectrum(dtype: torch.dtype) -> None:
    """The largest singular values are equal, as after a limit of the condition number."""
    module = parametrizations.spectral_norm(nn.Linear(12, 8)).to(dtype)
    U, V = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (8, 12))
    values = torch.tensor([3.0, 3, 3, 3, 2, 1, 0.5, 0.5]).double()
    W = U * values @ V[:8]
    again = built(after_store(module.state_dict(), W.to(built_dtype(dtype))))
    eps = torch.finfo(dtype).eps
    found = torch.linalg.svdvals(again.double())
    torch.testing.assert_close(found, values / 3, rtol=8 * eps + 1e-12, atol=4 * eps)


def built_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(
    "layer", ["Linear", "Conv2d", "ConvTranspose1d", "LSTM", "Embedding", "Linear of one column"]
)
def test_pruned_weights_equal_torch(layer: str, dtype: torch.dtype) -> None:
    make, name = LAYERS[layer]
    torch.manual_seed(3)
    module = make().to(dtype)
    randomise(module)
    prune.random_unstructured(module, name, 0.3)
    prune.ln_structured(module, name, 1, n=2, dim=1)  # a second one, joined to the first
    W = built(module.state_dict())
    assert torch.equal(W.to(dtype), weight(module, name))
    recipe, _ = recipe_of(module.state_dict())
    assert recipe.keeps


def test_masks_of_other_dtypes_equal_torch() -> None:
    orig = spread(6, 4).bfloat16()
    for mask in (torch.rand(6, 4) > 0.5, (torch.rand(6, 4) > 0.5).to(torch.uint8)):
        found = built({"a.weight_orig": orig, "a.weight_mask": mask})
        assert torch.equal(found, (mask.to(torch.bfloat16) * orig).float())
    soft = torch.rand(6, 4)
    found = built({"a.weight_orig": orig, "a.weight_mask": soft})
    assert torch.equal(found, orig.float() * soft.bfloat16().float())


def test_nan_under_mask_is_nan() -> None:
    orig = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    found = built({"weight_orig": orig, "weight_mask": torch.zeros(2, 2)})
    assert torch.equal(found.isnan(), torch.tensor([[False, True], [True, False]]))


# --- orthogonal -----------------------------------------------------------------------------------

MAPS = ("matrix_exp", "cayley", "householder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 5), (7, 4), (3, 6), (1, 4), (4, 1), (1, 1), (2, 5, 3)], ids=str
)
@pytest.mark.parametrize("way", MAPS)
def test_untrained_orthogonal_weight_equals_torch(
    way: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    parametrizations.orthogonal(module, orthogonal_map=way)
    assert torch.equal(built(module.state_dict()), weight(module, "weight"))
    module.weight = torch.linalg.qr(torch.randn(*shape[:-2], 7, 7, dtype=dtype))[0][
        ..., : shape[-2], : shape[-1]
    ]
    assert torch.equal(built(module.state_dict()), weight(module, "weight"))
    recipe, _ = recipe_of(module.state_dict())
    assert recipe.keeps


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 6), (1, 4), (4, 1), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("way", MAPS)
def test_trained_orthogonal_weight_gives_a_reason(way: str, shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    parametrizations.orthogonal(module, orthogonal_map=way)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    (module.weight * torch.randn(shape)).sum().backward()
    optimizer.step()
    assert "matrix_exp, cayley or householder" in reason(module.state_dict())
    assert not find_recipes(content_from(module.state_dict()))[0] or len(shape) > 2


def test_changed_diagonal_of_orthogonal_weight_gives_a_reason() -> None:
    module = parametrizations.orthogonal(nn.Linear(4, 6))
    state = module.state_dict()
    original = state["parametrizations.weight.original"]
    original[5, 3] = 1e-3
    assert "householder" in reason(state)  # in a row that only `build` reads
    original[5, 3] = 0
    original[0, 3] = 1e-3  # above the diagonal, which no map reads
    built(state)
    original[3, 3] = -0.99
    assert "householder" in reason(state)


def test_orthogonal_weight_without_base_gives_a_reason() -> None:
    module = parametrizations.orthogonal(nn.Linear(4, 6), use_trivialization=False)
    expected = UNKNOWN + "original"
    assert reason(module.state_dict()) == expected


# --- several or unknown ones ----------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * X


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(3, 4))

    def forward(self, X: Tensor) -> Tensor:
        return X + self.shift


class Product(nn.Module):
    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        return A @ B

    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return W[:, :2].clone(), W[:2].clone()


def several(*ways: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    module = nn.Linear(4, 3)
    for way in ways:
        way(module)
    return dict(module.state_dict())


def put(one: nn.Module) -> Callable[[nn.Module], object]:
    return lambda module: parametrize.register_parametrization(module, "weight", one)


def prune_part(name: str) -> Callable[[nn.Module], object]:
    return lambda module: prune.random_unstructured(module, name, 0.3)


SEVERAL = "several methods compute it from "
UNKNOWN = "the file does not store which parametrization computes it from "
norm = parametrizations.weight_norm
unit = parametrizations.spectral_norm


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ([norm, unit], SEVERAL + "1._u, 1._v, original0, original1"),
        ([unit, put(Shifted())], SEVERAL + "0._u, 0._v, 1.shift, original"),
        ([put(Double())], UNKNOWN + "original"),
        ([put(Shifted())], UNKNOWN + "0.shift, original"),
        (
            [lambda m: old("weight_norm", m), prune_part("weight_v")],
            SEVERAL + "g, v_mask, v_orig",
        ),
        (
            [lambda m: old("weight_norm", m), prune_part("weight_g")],
            SEVERAL + "g_mask, g_orig, v",
        ),
        (
            [lambda m: old("spectral_norm", m), prune_part("weight_orig")],
            SEVERAL + "orig_mask, orig_orig, u, v",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_or_unknown_parametrizations_give_a_reason(
    ways: list[Callable[[nn.Module], object]], expected: str
) -> None:
    state = several(*ways)
    assert names_of(state) == ["weight"]
    assert reason(state) == expected
    assert set(state) - {"bias"} == {
        part for one in find_parametrizations(content_from(state)) for part in one.parts
    }


def test_pruned_norms_and_directions_give_a_reason() -> None:
    module = old("weight_norm", nn.Linear(4, 3))
    for part in ("weight_v", "weight_g"):
        prune.random_unstructured(module, part, 0.3)
    recipes, refused = find_recipes(content_from(module.state_dict()))
    assert not recipes
    assert all(why[0].startswith(SEVERAL) for why in refused.values())
    assert {"weight_v_orig", "weight_g_orig"} <= refused.keys()


def test_tensors_without_norms_give_a_reason() -> None:
    module = nn.Linear(4, 3)
    parametrize.register_parametrization(module, "weight", Product(), unsafe=True)
    assert "original0 of shape (3, 2) does not fit norms" in reason(module.state_dict())


def test_pruning_within_new_parametrization_gives_a_reason() -> None:
    module = parametrizations.spectral_norm(nn.Linear(4, 3))
    prune.random_unstructured(module.parametrizations.weight, "original", 0.3)
    assert reason(module.state_dict()).startswith(UNKNOWN + "0._u")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "step1.pt/layer.", "flow/~/block.", "a\nb."])
def test_names_equal_plain_checkpoint(prefix: str) -> None:
    for module in (
        parametrizations.weight_norm(nn.Linear(4, 3)),
        parametrizations.spectral_norm(nn.Linear(4, 3)),
        old("weight_norm", nn.Linear(4, 3)),
        old("spectral_norm", nn.Linear(4, 3)),
        prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5),
        parametrizations.orthogonal(nn.Linear(4, 3)),
    ):
        state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
        assert names_of(state) == [f"{prefix}weight"]
        assert torch.equal(built(state), built(module.state_dict()))


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm"])
def test_stored_plain_weight_has_no_recipe(way: str) -> None:
    for module in (getattr(parametrizations, way)(nn.Linear(4, 3)), old(way, nn.Linear(4, 3))):
        assert names_of(module.state_dict() | {"weight": torch.randn(3, 4)}) == []


def test_parts_of_a_stored_part_are_ignored() -> None:
    state = old("weight_norm", nn.Linear(4, 3)).state_dict()
    built_of_two = built(state)
    more = {"weight_v_orig": torch.randn(3, 4), "weight_v_mask": torch.ones(3, 4)}
    assert names_of(state | more) == ["weight"]
    assert torch.equal(built(state | more), built_of_two)


def test_old_names_take_precedence_as_in_torch() -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 3))
    state = module.state_dict() | old("weight_norm", nn.Linear(4, 3)).state_dict()
    recipes, refused = find_recipes(content_from(state))
    assert recipes["weight"].parts == ("weight_v", "weight_g")
    assert not refused
    module.load_state_dict(state)
    found = recipes["weight"].build(content_from(state).read, 0)
    torch.testing.assert_close(found, module.weight.detach())


@pytest.mark.parametrize(
    "shapes",
    [
        {"attn.w_v": (4, 4), "attn.w_g": (4, 1)},
        {"l.weight_v": (4, 4), "l.weight_g": (4, 4)},
        {"l.weight_v": (4, 4)},
        {"l.weight_orig": (4, 4)},
        {"l.weight_orig": (4, 4), "l.weight_g": (4, 1)},
        {"l.attn_mask": (4, 4), "l.attn_u": (4,)},
        {"bias_orig": (4,), "bias_mask": (4,)},
        {"weight_v": (0, 4), "weight_g": (0, 1)},
        {"_v": (3, 4), "_g": (3, 1), "a._orig": (3, 4), "a._mask": (3, 4)},
        {"parametrizations.weight": (3, 4), "parametrizations": (3, 4)},
    ],
    ids=str,
)
def test_similar_names_are_not_candidates(shapes: dict[str, tuple[int, ...]]) -> None:
    assert names_of({name: torch.zeros(shape) for name, shape in shapes.items()}) == []


# --- damaged files --------------------------------------------------------------------------------

NEW = "l.parametrizations.weight."


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"weight_v": (3, 4), "weight_g": (4,)}, "does not fit norms"),
        ({"weight_v": (3, 4), "weight_g": (3,)}, "does not fit norms"),
        ({"weight_v": (3, 4), "weight_g": (4, 1)}, "does not fit norms"),
        ({"weight_v": (3, 4), "weight_g": (3, 1, 1)}, "does not fit norms"),
        ({"weight_v": (3, 4), "weight_g": (0,)}, "does not fit norms"),
        ({NEW + "original1": (3, 4), NEW + "original0": (3, 4)}, "does not fit norms"),
        ({NEW + "original1": (3, 4)}, "its original0 is missing"),
        ({NEW + "original0": (3, 1)}, "its original1 is missing"),
        ({NEW + "original": (3, 4), NEW + "0._u": (3,)}, "its 0._v is missing"),
        ({NEW + "0._u": (3,), NEW + "0.base": (3, 4)}, "does not store which"),
        ({"weight_orig": (3, 4), "weight_u": (3,)}, "its v is missing"),
        ({"weight_orig": (3, 4), "weight_v": (4,)}, "its u is missing"),
        ({"weight_orig": (3, 4), "weight_u": (4,), "weight_v": (4,)}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_u": (5,), "weight_v": (4,)}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_u": (3, 1), "weight_v": (4,)}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_u": (3,), "weight_v": (4, 1)}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_u": (3,), "weight_v": ()}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_u": (0,), "weight_v": (4,)}, "do not fit"),
        ({"weight_orig": (3, 4), "weight_mask": (4, 3)}, "has the shape (4, 3)"),
        ({"weight_orig": (3, 4), "weight_mask": (4,)}, "has the shape (4,)"),
        ({"weight_orig": (3, 4), "weight_mask": (3, 4), "weight_u": (3,)}, "several methods"),
        ({NEW + "original": (3, 4), NEW + "0.base": (3, 3)}, "does not fit"),
        ({NEW + "original": (3, 4), NEW + "0.base": (4,)}, "does not fit"),
        ({NEW + "original": (4,), NEW + "0.base": (4, 4)}, "is not a matrix"),
        ({NEW + "original": (), NEW + "0.base": (4, 4)}, "is not a matrix"),
        ({"weight_v": (0, 4), "weight_g": (1, 1)}, "is not a matrix"),
        ({"weight_orig": (4, 0), "weight_mask": (3, 4)}, "is not a matrix"),
        ({NEW + "0.base": (4, 4)}, "its original is missing"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_give_a_reason(
    shapes: dict[str, tuple[int, ...]], expected: str
) -> None:
    assert expected in reason({name: torch.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "pruning", "orthogonal"])
def test_weights_of_other_dtypes_give_a_reason(way: str, dtype: torch.dtype) -> None:
    module = nn.Linear(4, 3)
    if way == "pruning":
        prune.random_unstructured(module, "weight", 0.5)
    else:
        getattr(parametrizations, way)(module)
    state = dict(module.state_dict())
    for name in state:
        wrong = state | {name: torch.ones(state[name].shape).to(dtype)}
        if name == "bias" or (name == "weight_mask" and dtype == torch.int8):
            built(wrong)
        else:
            assert re.search(
                rf"{re.escape(name)} has the dtype {str(dtype)[6:]}, not", reason(wrong)
            )


def test_complex_masks_give_a_reason() -> None:
    tensors = {"weight_orig": torch.ones(3, 4), "weight_mask": torch.ones(3, 4).to(torch.cfloat)}
    assert "weight_mask has the dtype complex64" in reason(tensors)


def test_values_that_are_not_finite_equal_torch() -> None:
    module = spectral(SPECTRAL["Conv1d"], new=True)
    for value in (torch.nan, torch.inf, 0.0):
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        state["parametrizations.weight.original"].fill_(value)
        module.load_state_dict(state)
        torch.testing.assert_close(built(state), weight(module, "weight"), equal_nan=True)
    square = spectral(SPECTRAL["square Linear"], new=True).state_dict()
    square["parametrizations.weight.original"].fill_(torch.nan)
    assert "its values do not determine it" in reason(square)


FAMILIES: list[dict[str, tuple[int, ...]]] = [
    {"weight_v": (3, 4), "weight_g": (3, 1)},
    {"weight_v": (2, 3, 4), "weight_g": (1, 3, 1)},
    {"weight_orig": (3, 4), "weight_u": (3,), "weight_v": (4,)},
    {"weight_orig": (3, 4), "weight_mask": (3, 4)},
    {NEW + "original0": (), NEW + "original1": (3, 4)},
    {NEW + "original": (2, 3, 4), NEW + "0._u": (3,), NEW + "0._v": (8,)},
    {NEW + "original": (3, 4), NEW + "0.base": (4, 4)},
    {"weight_g": (3, 1), "weight_v_orig": (3, 4), "weight_v_mask": (3, 4)},
    {NEW + "original": (3, 4), NEW + "0.parametrizations.base.original": (4, 4)},
]


def test_damaged_parts_give_a_weight_or_a_reason() -> None:
    """Parts are randomly missing, have other shapes or dtypes, or are mixed with other parts."""
    shapes = [(), (1,), (3,), (4,), (12,), (3, 4), (3, 1), (1, 4), (1, 1), (4, 4), (0, 4), (1,) * 9]
    dtypes = [*REAL, torch.complex64, torch.int64, torch.bool, torch.float8_e5m2]
    draw = random.Random(0)
    numbers = sentences = 0
    for _ in range(1000):
        family = dict(draw.choice(FAMILIES))
        if draw.random() < 0.2:
            family |= draw.choice(FAMILIES)
        for name in list(family):
            if draw.random() < 0.1:
                del family[name]
            elif draw.random() < 0.2:
                family[name] = draw.choice(shapes)
        tensors = {
            name: torch.ones(shape).to(draw.choice(dtypes) if draw.random() < 0.1 else REAL[0])
            for name, shape in family.items()
        }
        content = content_from(tensors)
        for candidate in find_parametrizations(content):
            try:
                recipe = candidate.make()
                assert build_all(recipe, content).shape == recipe.shape
                numbers += 1
            except RecipeError:
                sentences += 1
    assert min(numbers, sentences) > 200


# --- complete networks ----------------------------------------------------------------------------


def assert_all_equal(module: nn.Module, least: int) -> None:
    """Compares every parametrized weight of a network with torch."""
    state = module.state_dict()
    content = content_from(state)
    recipes, refused = find_recipes(content)
    assert not refused
    plain = {name for name, _ in module.named_parameters() if "parametrizations" not in name}
    assert len(recipes) >= least
    assert not plain & recipes.keys()
    for label, recipe in recipes.items():
        owner, _, name = label.rpartition(".")
        assert_equals_torch(recipe.build(content.read, 0), module.get_submodule(owner), name)
    stored = {part for recipe in recipes.values() for part in recipe.parts}
    assert stored | plain >= {name for name, _ in module.named_parameters()}


def test_critic_under_spectral_norm() -> None:
    torch.manual_seed(5)
    for norm in (parametrizations.spectral_norm, lambda module: old("spectral_norm", module)):
        critic = nn.Sequential(
            *(norm(nn.Conv2d(3, 16, 3, 1, 1)), nn.LeakyReLU(0.1)),
            *(norm(nn.Conv2d(16, 16, 4, 2, 1)), nn.LeakyReLU(0.1)),
            *(norm(nn.ConvTranspose2d(16, 16, 4, 2, 1)), nn.LeakyReLU(0.1)),
            *(norm(nn.Conv2d(16, 32, 3, 1, 1)), nn.Flatten()),
            *(norm(nn.Linear(32 * 64, 1)),),
        )
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(12):
            optimizer.zero_grad()
            critic(torch.randn(4, 3, 8, 8)).relu().sum().backward()
            optimizer.step()
        assert_all_equal(critic, 5)


@pytest.mark.frameworks
def test_vocoders_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    vocoder = transformers.SpeechT5HifiGan(config)
    vocoder.apply_weight_norm()
    assert_all_equal(vocoder, 8)
    vits = transformers.VitsModel(
        transformers.VitsConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=8,
            flow_size=8,
            spectrogram_bins=9,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            posterior_encoder_num_wavenet_layers=2,
            prior_encoder_num_wavenet_layers=2,
            wavenet_kernel_size=3,
            duration_predictor_filter_channels=8,
            depth_separable_num_layers=1,
            prior_encoder_num_flows=2,
            duration_predictor_num_flows=2,
        )
    )
    vits.decoder.apply_weight_norm()
    assert_all_equal(vits, 20)


@pytest.mark.frameworks
def test_positional_convolution_of_wav2vec2() -> None:
    """It has one norm per position of the kernel, which is the last side."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(4, 4),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.Wav2Vec2Model(config)
    assert_all_equal(model, 1)
    (recipe,) = find_recipes(content_from(model.state_dict()))[0].values()
    assert recipe.norms == (1, 1, 4)
