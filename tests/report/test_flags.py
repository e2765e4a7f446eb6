"""Flags of wrong or unusual weights, and their advice."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from matrices import with_spectrum
from wellcond.report.flags import KINDS, find_flags, stand


def linear(S: Tensor) -> nn.Linear:
    layer = nn.Linear(S.shape[1], S.shape[0], bias=False).to(S.dtype)
    with torch.no_grad():
        layer.weight.copy_(S)
    return layer


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """A random matrix with entries of standard deviation 1/sqrt(n)."""
    S = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
    return S / math.sqrt(n)


def changed(m: int, n: int, *smallest: float) -> nn.Linear:
    """A Gaussian matrix with other smallest singular values, relative to the one before them."""
    U, sigma, Vh = torch.linalg.svd(gaussian(m, n), full_matrices=False)
    count = len(smallest)
    sigma[-count:] = sigma[-count - 1] * torch.tensor(smallest, dtype=torch.float64)
    return linear((U * sigma) @ Vh)


class Net(nn.Module):
    """Layers of attention and MLP with random weights."""

    def __init__(self, layers: int = 6, width: int = 32) -> None:
        super().__init__()
        seeds = iter(range(1000))
        block = {"q": (width, width), "o": (width, width), "fc1": (4 * width, width)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: linear(gaussian(*s, next(seeds))) for name, s in block.items()})
            for _ in range(layers)
        )


def kinds(model: nn.Module) -> dict[str, list[str]]:
    report = wc.audit(model)
    return {label: [flag.kind for flag in flags] for label, flags in report.flags.items()}


def weight(model: Net, name: str) -> Tensor:
    return model.get_parameter(name).data


def test_random_weights_have_no_flags() -> None:
    assert kinds(Net()) == {}
    shapes = [(40, 40), (40, 30), (64, 16), (10, 50), (20, 21)]
    layers = [linear(gaussian(*shape, seed)) for seed, shape in enumerate(shapes * 6)]
    report = wc.audit(nn.ModuleList(layers))
    assert report.unusual() == []
    assert "Flags" not in report.to_html()


# --- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layers.2.q.weight", "layers.5.fc1.weight"])
def test_one_scaled_layer_flags_siblings(name: str) -> None:
    model = Net()
    weight(model, name).mul_(200)
    flagged = kinds(model)
    assert list(flagged) == [name]
    assert flagged[name][0] == "siblings"
    (line,) = wc.audit(model).unusual()
    assert re.search(r"σ_max = \S+ is \S+ times the median of its siblings", line)
    assert "SingularValueLimit(upper=" in line


def test_one_scaled_kind_flags_scale() -> None:
    model = Net()
    names = [f"layers.{layer}.fc1.weight" for layer in range(6)]
    for name in names:
        weight(model, name).mul_(200)
    flagged = kinds(model)
    assert sorted(flagged) == names
    assert all(found[0] == "scale" for found in flagged.values())


def test_grown_sigma_max_in_all_weights_flags_network() -> None:
    model = Net(3, 128)
    for name, parameter in model.named_parameters():
        U, sigma, Vh = torch.linalg.svd(parameter.data, full_matrices=False)
        sigma[0] *= 20 if "fc1" in name else 16
        parameter.data.copy_((U * sigma) @ Vh)
    report = wc.audit(model)
    first = report.findings[0]
    assert report.flags[first.label][0].kind == "network"
    assert "9 of 9 weights" in report.table().splitlines()[0]
    assert "SingularValueLimit(upper=" in report.table().splitlines()[0]


def test_advice_does_not_bound_at_an_exploded_norm() -> None:
    model = Net(2, 64)
    W = weight(model, "layers.1.fc1.weight")
    W.add_(1e3 * torch.outer(torch.randn(len(W)), torch.randn(W.shape[1])))
    flags = [flag for found in wc.audit(model).flags.values() for flag in found]
    bounds = [re.search(r"upper=([^)]+)", flag.advice) for flag in flags]
    assert any(bounds)
    assert all(float(bound[1]) < 10 for bound in bounds if bound)


def test_advice_for_an_adapter_is_about_its_training() -> None:
    finding = replace(wc.audit(linear(gaussian(64, 64))).findings[0], sigma_max=1e6)
    for view in ("", "merged"):
        (flags,) = find_flags([replace(finding, view=view)]).values()
        (advice,) = {flag.advice for flag in flags if flag.kind == "scale"}
        assert ("lora_alpha" in advice) == (view == "merged")
        assert ("SingularValueLimit" in advice) == (view == "")


def test_huge_entry_flags_dominant_entry() -> None:
    model = Net()
    weight(model, "layers.1.o.weight")[3, 4] = 1e30
    assert kinds(model)["layers.1.o.weight"][:2] == ["dominant_entry", "float16"]


@pytest.mark.parametrize("name", ["layers.1.q.weight", "layers.1.fc1.weight"])
def test_zero_and_equal_rows_are_flagged(name: str) -> None:
    model = Net()
    weight(model, name)[7] = 0
    assert kinds(model)[name][0] == "zero_rows"
    model = Net()
    weight(model, name)[7] = weight(model, name)[9]
    assert "equal_rows" in kinds(model)[name]
    assert "rows 7 and 9 are equal" in wc.audit(model).unusual()[0]


@pytest.mark.parametrize("name", ["layers.1.q.weight", "layers.1.fc1.weight"])
def test_rank_one_is_flagged(name: str) -> None:
    model = Net()
    S = weight(model, name)
    u, v = (torch.randn(side, dtype=torch.float64) for side in S.shape)
    S.copy_(torch.outer(u, v) / S.shape[1] ** 0.5)
    assert "rank" in kinds(model)[name]


def test_nan_and_infinity_are_flagged() -> None:
    model = Net()
    weight(model, "layers.1.q.weight")[3, 4] = math.nan
    weight(model, "layers.2.q.weight")[3, 4] = math.inf
    assert kinds(model) == {
        "layers.1.q.weight": ["not_finite"],
        "layers.2.q.weight": ["not_finite"],
    }


# --- sound weights --------------------------------------------------------------------------------


def test_head_of_two_classes_not_flagged() -> None:
    w = torch.randn(64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    head = linear(torch.stack([w, -w]) * 0.1 + 1e-4 * noise)
    assert wc.audit(head).findings[0].condition_number > 100
    assert kinds(head) == {}
    same = linear(torch.stack([w, w]) * 0.1 + 1e-6 * noise)
    assert kinds(same)["weight"] == ["rank"]


def test_zero_weight_not_flagged() -> None:
    assert kinds(linear(torch.zeros(16, 16))) == {}


def test_half_precision_does_not_flag_rank() -> None:
    assert kinds(linear(gaussian(64, 64)).bfloat16()) == {}
    assert kinds(linear(gaussian(64, 64)).half()) == {}


# --- small singular values ------------------------------------------------------------------------


def test_collapsed_direction_has_repair_advice() -> None:
    layer = changed(60, 60, 1e-7)
    (line,) = wc.audit(layer).unusual()
    moved = wc.nearest(layer.weight.detach(), 1e4) - layer.weight.detach()
    distance = float(moved.norm() / layer.weight.detach().norm())
    found = re.fullmatch(
        r"weight: one direction has collapsed: σ_min is 1e-7 times the next singular value\. "
        r"Train with `ConditionLimit\(1e4\)`, or run `wellcond repair --max-condition 1e4`, which "
        r"changes the weight by (\S+) of its norm \(symptoms.html#rank\)",
        line,
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(distance, rel=0.5)


def test_collapsed_directions_are_counted() -> None:
    (line,) = wc.audit(changed(60, 50, 1e-5, 1e-5, 1e-5)).unusual()
    assert "3 directions have collapsed, to at most 1e-5 times the next" in line


def test_rank_deficiency_is_flagged() -> None:
    S = gaussian(40, 40)
    S[:, 0] = S[:, 1:].sum(1)
    (line,) = wc.audit(linear(S.float())).unusual()
    assert line.startswith("weight: rank 39 of 40")


def test_large_kappa_is_flagged() -> None:
    layer = linear(with_spectrum(torch.logspace(0, -5, 60).double(), 240, 60))
    found = kinds(layer)["weight"]
    assert "condition_number" in found


def test_random_square_kappa_not_flagged() -> None:
    for seed in range(40):
        assert kinds(linear(gaussian(48, 48, seed))) == {}


# --- order, words and counts ----------------------------------------------------------------------


def test_flagged_weights_first_and_five_named() -> None:
    model = Net(12)
    for layer in range(7):
        weight(model, f"layers.{layer}.q.weight")[layer] = 0
    weight(model, "layers.11.o.weight").mul_(200)
    report = wc.audit(model)
    assert [f.label in report.flags for f in report.findings] == [True] * 8 + [False] * 28
    lines = report.unusual()
    assert lines[0].startswith("layers.11.o.weight")
    assert lines[-1] == "3 more weights are flagged"
    assert sum("unused class" in line for line in lines) == 1  # advice once per kind
    assert report.table().startswith(lines[0])
    kappas = [f.condition_number for f in report.sort("kappa").findings]
    assert kappas == sorted(kappas, reverse=True)
    assert report.sort("kappa").sort() == report
    with pytest.raises(ValueError, match=r"`by` must be one of standing, kappa, got \"r\""):
        report.sort("r")


def test_standing_words() -> None:
    (usual,) = wc.audit(linear(gaussian(64, 64))).findings
    assert stand(usual).words == "usual"
    assert stand(usual).usual is not None
    (large,) = wc.audit(linear(1e6 * gaussian(64, 64))).findings
    assert re.fullmatch(r"(σ_max|gain): top 0\.1 %", stand(large).words)
    (vector,) = wc.audit(nn.Linear(5, 1)).findings
    assert (stand(vector).words, stand(vector).usual) == ("", None)


def test_each_kind_has_documentation() -> None:
    from pathlib import Path

    page = Path(__file__).parents[2].joinpath("docs/symptoms.md").read_text("utf-8")
    for kind in KINDS:
        assert f'<a id="{kind.replace("_", "-")}"></a>' in page
