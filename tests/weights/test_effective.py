"""Models whose weights are not plain parameters: programs, codes, complex numbers, no values."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.weights.reasons import Reason

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def programs() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 2)).eval()
    linear = nn.Sequential(nn.Linear(4, 4))
    scripted, file = torch.jit.script(model), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return {
        "script": scripted,
        "load": torch.jit.load(file),
        "trace": torch.jit.trace(linear, torch.zeros(1, 4)),
        "freeze": torch.jit.freeze(scripted),
        "layer": torch.jit.script(nn.Linear(3, 3)),
    }


@pytest.mark.parametrize("kind", ["script", "load", "trace", "freeze", "layer"])
@pytest.mark.parametrize(
    "use", [wc.audit, lambda m: wc.Regularizer(m, wc.ConditionLimit(2.0)), wc.Monitor]
)
def test_torchscript_program_is_refused_with_a_remedy(kind: str, use: Any, tmp_path: Any) -> None:
    program = programs()[kind]
    message = r"eager model|must be an eager module, got a TorchScript program"
    with pytest.raises(ValueError, match=message) as caught:
        use(program)
    assert "torch.save(model.state_dict()" in str(caught.value)
    if kind != "freeze":  # a frozen program has no parameters left
        torch.save(program.state_dict(), tmp_path / "weights.pt")
        assert wc.audit(tmp_path / "weights.pt").findings


def test_program_within_a_model_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    report = wc.audit(model)
    assert [f.label for f in report.findings] == ["0.weight"]
    assert report.coverage.skipped["1.0.weight"].reason is Reason.scripted
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0))
    assert reg.names == ["0.weight"]
    assert reg.skipped["1.0.weight"].reason is Reason.scripted


def test_fx_graph_is_measured_like_its_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found, expected = (
        {f.label: f.condition_number for f in wc.audit(m).findings}
        for m in (torch.fx.symbolic_trace(model), model)
    )
    assert found == expected


@pytest.mark.parametrize("dynamic", [True, False])
def test_quantised_layers_of_torch_are_skipped(dynamic: bool) -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised layers")
    layers = [quantized.Linear(4, 4), quantized.Conv2d(2, 3, 2)]
    names = {"1.weight": 16, "2.weight": 24}
    if dynamic:
        layers = [quantized.dynamic.Linear(4, 4), quantized.dynamic.LSTM(4, 3)]
        names = {"1.weight": 16, "2.weight_ih_l0": 48, "2.weight_hh_l0": 36}
    model = nn.Sequential(nn.Linear(5, 5, bias=False), *layers)
    report = wc.audit(model)
    for name in names:
        assert str(report.coverage.skipped[name]).endswith("audit the saved model: qint8")
    assert report.coverage.parameter_share == pytest.approx(25 / (25 + sum(names.values())))
    assert set(names) <= set(wc.Regularizer(model, wc.ConditionLimit(2.0)).skipped)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_narrow_weights_are_skipped_as_codes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    codes = model[0].weight.detach().to(dtype)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    report = wc.audit(model)
    assert [f.label for f in report.findings] == ["1.weight"]
    assert report.coverage.skipped["0.weight"].reason is Reason.codes
    assert wc.Regularizer(model, wc.ConditionLimit(2.0)).skipped["0.weight"].reason is Reason.codes


def test_torchao_weights_are_skipped_with_their_class_name() -> None:
    class AffineQuantizedTensor(Tensor):
        """A class whose module name is that of torchao."""

    AffineQuantizedTensor.__module__ = "torchao.dtypes.affine_quantized_tensor"
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    codes = model[0].weight.detach().as_subclass(AffineQuantizedTensor)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    report = wc.audit(model)
    assert [f.label for f in report.findings] == ["1.weight"]
    why = report.coverage.skipped["0.weight"]
    assert (why.reason, why.detail) == (Reason.codes, "AffineQuantizedTensor")
    assert wc.Regularizer(model, wc.ConditionLimit(2.0)).skipped["0.weight"] == why


def test_complex_weights_are_measured_but_not_limited() -> None:
    model = nn.Sequential(
        nn.Linear(4, 3, dtype=torch.complex64), nn.Conv2d(2, 3, 3, dtype=torch.complex128)
    )
    report = wc.audit(model, certify=True)
    found = {f.label: f for f in report.findings}
    for label, weight in (("0.weight", model[0].weight), ("1.weight:kernel", model[1].weight)):
        S = weight.detach().flatten(1).to(torch.complex128)
        sigma = torch.linalg.svdvals(S)
        row = found[label]
        assert row.condition_number == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-6)
        assert row.stable_rank == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=1e-6)
        assert row.penalty == pytest.approx(float(wc.condition_penalty(S)), rel=1e-6)
        assert row.dtype == str(weight.dtype).removeprefix("torch.")
        assert row.rank == 3
        assert row.grade is wc.report.Grade.certified
        assert row.largest_entry == pytest.approx(float(torch.view_as_real(S).abs().max()))
        assert row.exceedance != row.exceedance  # complex Gaussian matrices follow another law
    assert report.coverage.measured == 2
    with pytest.raises(ValueError, match=r"0.weight: not real floating point: complex64"):
        wc.Regularizer(model, wc.ConditionLimit(2.0))
    both = nn.Sequential(model[0], nn.Linear(3, 3))
    reg = wc.Regularizer(both, wc.ConditionLimit(2.0))
    assert str(reg.skipped["0.weight"]) == "not real floating point: complex64"


def test_zero_row_and_dominant_entry_of_complex_weight() -> None:
    layer = nn.Linear(4, 5, dtype=torch.complex64)
    layer.weight.data[2] = 0
    (found,) = wc.audit(layer).findings
    assert (found.zero_rows, found.zero_columns) == ((2,), ())
    layer.weight.data[3, 1] = 1e6j
    (found,) = wc.audit(layer).findings
    assert found.dominant_entry == (3, 1)


def test_complex_kernel_has_no_operator_row() -> None:
    """An operator of its real part would be wrong."""
    layer = nn.Conv2d(2, 3, 2, dtype=torch.complex64)
    (found,) = wc.audit(layer, example=torch.zeros(1, 2, 4, 4, dtype=torch.complex64)).findings
    assert found.label == "weight:kernel"


def test_complex_weight_with_nan_is_not_finite() -> None:
    layer = nn.Linear(3, 3, dtype=torch.complex64)
    layer.weight.data[0, 0] = complex(1, float("nan"))
    (found,) = wc.audit(nn.Sequential(layer, nn.Linear(3, 2))).findings[:1]
    assert (found.status, found.detail) == (wc.report.Status.not_finite, "1 of 9 entries")


def test_meta_weights_are_reported() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    report = wc.audit(nn.Sequential(model, nn.Linear(3, 2)))
    assert report.coverage.skipped["0.0.weight"].reason is Reason.no_values
    with pytest.raises(ValueError, match=r"0.weight: a tensor without values"):
        wc.audit(model)
    limited = wc.Regularizer(model, wc.ConditionLimit(2.0))  # allowed before values are loaded
    soft = wc.Regularizer(model, wc.ConditionPenalty(1.0))
    uses = [limited.enforce, limited.measure, soft.measure, soft, soft.add_gradients]
    uses += [lambda: soft.proximal_step(0.1), wc.Monitor(model).measure]
    for use in uses:
        with pytest.raises(ValueError, match=r'must have values, but "0.weight" is a meta tensor'):
            use()


LIVE_NOTES = ("stores query, key and value interleaved by head",)
LIVE_REASONS = {Reason.embedding, Reason.number, Reason.vector, Reason.empty, Reason.unknown_use}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_transformers_models_have_no_notes_and_no_skipped_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In untrained models every effective weight is a stored tensor."""
    from architectures import TRANSFORMERS, of_transformers

    for name in TRANSFORMERS:
        model = of_transformers(name)
        report = wc.audit(model)
        for found in report.findings:
            assert not found.detail or any(note in found.detail for note in LIVE_NOTES), name
        for parameter, why in report.coverage.skipped.items():
            assert why.reason in LIVE_REASONS, (name, parameter)
        with caplog.at_level(logging.WARNING, logger="wellcond"):
            reg = wc.Regularizer(model, wc.ConditionLimit(10.0))
        assert not [r.getMessage() for r in caplog.records if r.name == "wellcond"], name
        assert "the rule acts on that, not on the effective weight" not in repr(reg)
