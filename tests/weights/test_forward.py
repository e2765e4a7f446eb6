"""Layers with their own forward: audit measures the effective weight or notes that it cannot."""

from __future__ import annotations

import copy
import functools
import logging
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wellcond as wc
from wellcond.weights.forward import COMPUTED, UNKNOWN, find_effective_weight, has_own_forward


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (2 * self.weight).T + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 25 * F.linear(x, self.weight) + self.bias


class ScaledBefore(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(3 * x, self.weight, self.bias)


class Adapted(nn.Linear):
    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.A, self.B = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.randn(m, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.A.T @ self.B.T


class Einsum(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, 2 * self.weight) + self.bias


class Entrywise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * self.weight * 3).sum(-1)


class Clipped(nn.Linear):
    """Changes its parameter in `forward`, like the constraints of EEG networks."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class ThreeDimensional(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        _, _, n = x.shape
        return F.linear(x, self.weight * torch.arange(1, n + 1))


class Normalised(nn.Linear):
    """A cosine head."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


LINEAR = [Masked, Doubled, Scaled, ScaledBefore, Adapted, Einsum, Entrywise, Clipped]


def seeded(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **kwargs)


def map_of(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of an affine layer on inputs of this shape, in float64."""
    layer = copy.deepcopy(layer).double().eval()
    n = torch.Size(shape).numel()
    with torch.no_grad():
        origin = layer(torch.zeros(1, *shape, dtype=torch.float64))
        images = layer(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
    return (images - origin).flatten(1).mT


def only(report: wc.AuditReport) -> wc.report.Finding:
    (finding,) = report.findings
    return finding


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("shape", [(10, 10), (9, 6), (6, 9)], ids=str)
def test_singular_values_are_those_of_the_layer_map(
    kind: type[nn.Linear], shape: tuple[int, int]
) -> None:
    layer = seeded(kind, *shape)
    found = only(wc.audit(layer))
    sigma = torch.linalg.svdvals(map_of(layer, shape[:1]))
    assert found.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
    assert found.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-3)
    assert (found.detail, found.entries) == (COMPUTED, layer.weight.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_own_forward_in_other_dtypes(dtype: torch.dtype) -> None:
    for kind in (Masked, Scaled):
        layer = seeded(kind, 8, 8).to(dtype)
        sigma = torch.linalg.svdvals(map_of(layer, (8,)))
        assert only(wc.audit(layer)).sigma_max == pytest.approx(float(sigma[0]), rel=0.02)


def test_weight_of_product_counts_if_input_is_normalised() -> None:
    layer = seeded(Normalised, 12, 5)
    expected = wc.condition_number(F.normalize(layer.weight.detach()))
    assert only(wc.audit(layer)).condition_number == pytest.approx(float(expected), rel=1e-6)


def test_three_dimensional_inputs_are_tried() -> None:
    layer = seeded(ThreeDimensional, 6, 6)
    expected = wc.condition_number(layer.weight.detach() * torch.arange(1, 7))
    assert only(wc.audit(layer)).condition_number == pytest.approx(float(expected), rel=1e-6)


class Logs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return F.dropout(super().forward(x), 0.5, self.training)


class Wide(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight.double()).to(x.dtype) + self.bias


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Softmax(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Joined(nn.Linear):
    """Outputs for added tokens have a separate weight, as in Idefics."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.more = nn.Linear(n, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.more(x)], dim=-1)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class ChannelsLast(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


HARMLESS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    *((kind, (7, 5)) for kind in (Logs, Wide, Activated, Softmax, Router, Joined)),
    (Same, (3, 4, 3)),
    (ChannelsLast, (6, 5, 1)),
]


@pytest.mark.parametrize(("kind", "sizes"), HARMLESS)
def test_forward_that_keeps_the_weight_adds_no_note(
    kind: type[nn.Module], sizes: tuple[int, ...]
) -> None:
    layer = seeded(kind, *sizes)
    assert has_own_forward(layer)
    found = next(f for f in wc.audit(layer).findings if f.name == "weight")
    expected = wc.condition_number(layer.weight.detach().flatten(1))
    assert found.detail == ""
    assert found.condition_number == pytest.approx(float(expected), rel=1e-9)


class Dynamic(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean())


class Sampled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + torch.randn_like(self.weight))


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.linear(x + y, self.weight)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * F.linear(x, self.weight.abs()).sigmoid()


class Raises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not on this machine")


class ScaledConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class ScaledInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x)


NOT_KNOWN: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    *((kind, (7, 5)) for kind in (Dynamic, Sampled, TwoInputs, Gated, Raises)),
    *((kind, (3, 4, 3)) for kind in (ScaledConvolution, ScaledInput)),
]


@pytest.mark.parametrize(("kind", "sizes"), NOT_KNOWN)
def test_unknown_effective_weight_is_noted(kind: type[nn.Module], sizes: tuple[int, ...]) -> None:
    layer = seeded(kind, *sizes)
    found = only(wc.audit(layer))
    assert found.detail == UNKNOWN
    expected = wc.condition_number(layer.weight.detach().flatten(1))
    assert found.condition_number == pytest.approx(float(expected), rel=1e-9)


class Counts(nn.Linear):
    """Changes everything that a layer can contain."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.register_buffer("u", torch.randn(m))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.plain, self.seen = torch.zeros(3), [torch.zeros(2)]
        self.norm, self.count = nn.BatchNorm1d(m), 0

    def forward(self, x: Tensor) -> Tensor:
        self.u.copy_(F.normalize(self.weight @ (self.weight.T @ self.u), dim=0))
        self.steps += 1
        self.plain += 1
        self.seen.append(x)
        self.seen[0].add_(1)
        self.count += 1
        self.norm.running_mean.add_(1)
        with torch.enable_grad():
            (self.weight.sum() * torch.rand(())).backward()
        return F.linear(x, self.weight / (self.u @ self.weight).norm())


@pytest.mark.parametrize(
    "kind", [*LINEAR, Logs, Dynamic, Sampled, TwoInputs, Raises, Counts, ThreeDimensional]
)
@pytest.mark.parametrize("training", [True, False])
def test_audit_does_not_change_the_layer(kind: type[nn.Module], training: bool) -> None:
    layer = seeded(kind, 7, 5).train(training)
    layer.weight.requires_grad_(kind is not Raises)
    called = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    plain, flags = copy.deepcopy(vars(layer)), [m.training for m in layer.modules()]
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    wc.audit(layer)
    assert not called
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in layer.modules()] == flags
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in layer.parameters())
    assert layer.weight.requires_grad == (kind is not Raises)
    if kind is Counts:
        assert torch.equal(layer.plain, torch.zeros(3))
        assert torch.equal(layer.seen[0], torch.zeros(2))
        assert len(layer.seen) == 1
        assert layer.count == 0
    assert vars(layer).keys() == plain.keys()


class MaskedConvolution(nn.Conv2d):
    """An autoregressive convolution, in raster order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mask = torch.ones(3, 3)
        mask[2:], mask[1, 2:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean, std = (f(weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return super()._conv_forward(x, (weight - mean) / std, bias)


class DoubledTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, int], tuple[int, ...]]] = [
    (MaskedConvolution, (4, 4, 3), {"padding": 1}, (4, 6, 6)),
    (MaskedConvolution, (4, 6, 3), {"padding": 1, "groups": 2, "stride": 2}, (4, 7, 7)),
    (Standardised, (3, 4, 3), {"padding": 1}, (3, 6, 6)),
    (Standardised, (3, 5, 3), {"dilation": 2}, (3, 7, 7)),
    (DoubledTransposed, (3, 4, 2), {"stride": 2}, (3, 4, 4)),
]


@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), CONVOLUTIONS)
def test_operator_of_convolution_uses_kernel_of_its_forward(
    kind: type[nn.Module],
    sizes: tuple[int, ...],
    options: dict[str, int],
    shape: tuple[int, ...],
) -> None:
    layer = seeded(kind, *sizes, **options)
    found = only(wc.audit(layer, example=torch.zeros(1, *shape)))
    assert found.label == "weight:operator"
    assert COMPUTED in found.detail
    sigma = torch.linalg.svdvals(map_of(layer, shape))
    assert found.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
    assert found.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-4, abs=1e-6)


def test_standardised_kernel_is_measured() -> None:
    layer = seeded(Standardised, 3, 4, 3)
    W = layer.weight.detach()
    mean, std = W.mean((1, 2, 3), keepdim=True), W.std((1, 2, 3), keepdim=True)
    expected = wc.condition_number(((W - mean) / std).flatten(1))
    assert only(wc.audit(layer)).condition_number == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", [Same, ScaledConvolution])
def test_convolution_with_other_geometry_has_no_operator_row(kind: type[nn.Module]) -> None:
    """The operator with the padding of its options would be wrong."""
    layer = seeded(kind, 3, 4, 3)
    found = only(wc.audit(layer, example=torch.zeros(1, 3, 8, 8)))
    assert found.label == "weight:kernel"
    assert "how the layer's own forward applies it is unknown" in found.detail


def test_activation_after_convolution_keeps_its_operator() -> None:
    class ActivatedConvolution(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.elu(super().forward(x))

    layer, plain = seeded(ActivatedConvolution, 3, 4, 3), seeded(nn.Conv2d, 3, 4, 3)
    example = torch.zeros(1, 3, 6, 6)
    found, expected = (only(wc.audit(one, example=example)) for one in (layer, plain))
    assert found.label == "weight:operator"
    assert found.condition_number == expected.condition_number
    assert found.detail == expected.detail


def test_only_wrappers_of_the_class_forward_are_unwrapped() -> None:
    """accelerate wraps the forward of a layer; LoRA trainers replace it."""
    wrapped, replaced = seeded(nn.Linear, 5, 4), seeded(nn.Linear, 5, 4)
    inner = wrapped.forward
    wrapped.forward = functools.update_wrapper(functools.partial(lambda x: inner(x)), inner)
    outer = replaced.forward
    replaced.forward = lambda x: 2 * outer(x)
    bound = seeded(nn.Linear, 5, 4)
    function = functools.wraps(nn.Linear.forward)(lambda self, x: nn.Linear.forward(self, x))
    bound.forward = types.MethodType(function, bound)
    for layer in (wrapped, bound):
        assert only(wc.audit(layer)).detail == ""
    assert only(wc.audit(replaced)).detail == UNKNOWN


def test_own_forward_of_transposed_conv1d() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.ones(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class MaskedConv1D(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight.tril())

    plain, layer = seeded(Conv1D, 5, 5), seeded(MaskedConv1D, 5, 5)
    assert not has_own_forward(plain)
    found = only(wc.audit(layer))
    expected = float(wc.condition_number(layer.weight.detach().tril()))
    assert found.condition_number == pytest.approx(expected, rel=1e-6)


def test_parametrized_weight_passes_through_own_forward() -> None:
    layer = seeded(Masked, 6, 6)
    nn.utils.parametrizations.spectral_norm(layer)
    before = copy.deepcopy(layer.state_dict())
    found = only(wc.audit(layer))
    layer.eval()
    expected = float(wc.condition_number(layer.weight.detach().tril()))
    assert found.condition_number == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_heads_use_effective_weights() -> None:
    class Attention(nn.Module):
        def __init__(self, kind: type[nn.Linear]) -> None:
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj = kind(8, 8), nn.Linear(8, 8)
            self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    masked, plain = seeded(Attention, Masked), seeded(Attention, nn.Linear)
    plain.q_proj.weight.data.tril_()
    found, expected = (
        {f.label: f.sigma_max for f in wc.audit(m, heads=True).findings} for m in (masked, plain)
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_communicating_layer_is_not_run(tmp_path: Any) -> None:
    """A layer that communicates would wait forever if only one process audits it."""

    class Parallel(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            torch.distributed.all_reduce(y)
            return y

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert only(wc.audit(seeded(Parallel, 5, 4))).detail == UNKNOWN
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rule", [wc.ConditionLimit(4.0), wc.ConditionPenalty(0.1)], ids=repr)
def test_rule_on_changed_weight_warns_once(rule: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(seeded(Masked, 6, 6), seeded(Logs, 6, 6), seeded(Dynamic, 6, 6))
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        reg = wc.Regularizer(model, rule)
        reg.measure()
    said = [record.getMessage() for record in caplog.records]
    assert [text.split()[0] for text in said] == ['"0.weight"', '"2.weight"']
    assert "which the layer's own forward changes" in said[0]
    assert "which the layer's own forward may change" in said[1]
    assert "the rule acts on that, not on the effective weight" in repr(reg)
    reg = wc.Regularizer(model, {"1.*": rule, "*": None})
    assert "the rule acts on that, not on the effective weight" not in repr(reg)


def test_fake_quantised_layer_uses_quantised_weight() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    from torch.ao.nn import qat

    config = quantization.get_default_qat_qconfig("fbgemm")
    layer = seeded(qat.Linear, 16, 8, qconfig=config)
    layer(torch.randn(4, 16))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    found = only(wc.audit(layer))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with torch.no_grad():
        W = layer.weight_fake_quant(layer.weight)
    assert not torch.equal(W, layer.weight)
    assert found.condition_number == pytest.approx(float(wc.condition_number(W)), rel=1e-6)


def test_reference_layer_uses_rounded_weight() -> None:
    reference = pytest.importorskip("torch.ao.nn.quantized.reference")
    kind = {"dtype": torch.qint8, "qscheme": torch.per_tensor_affine}
    layer = seeded(reference.Linear, 6, 4, weight_qparams=kind | {"scale": 0.1, "zero_point": 0})
    found = only(wc.audit(layer))
    expected = float(wc.condition_number(layer.get_weight().detach()))
    assert found.condition_number == pytest.approx(expected, rel=1e-6)


def test_layers_without_own_forward_are_not_run() -> None:
    kinds = (nn.Linear(3, 2), nn.Conv1d(2, 3, 2), nn.ConvTranspose3d(2, 3, 2), nn.Bilinear(2, 3, 4))
    attention = nn.MultiheadAttention(4, 2)
    for layer in (*kinds, attention.out_proj, nn.Embedding(3, 2)):
        assert not has_own_forward(layer)
        assert find_effective_weight(layer, layer.weight.detach()) == (None, "")
