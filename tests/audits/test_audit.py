"""Audits of models and files: correct numbers, no silently skipped weights, no side effects."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import oracles
import wellcond as wc
import wellcond.audits.rows as measuring
import wellcond.linalg.spectrum as spectrum_module
from matrices import with_spectrum
from wellcond.audits.compare import compare
from wellcond.linalg.spectrum import Method, Spectrum, compute_spectrum
from wellcond.report.findings import Status


def linear(S: Tensor) -> nn.Linear:
    layer = nn.Linear(S.shape[1], S.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(S)
    return layer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5), nn.Linear(5, 5))


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_match_their_definitions(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    for finding in wc.audit(model).findings:
        S = model.get_parameter(finding.name).detach().double()
        sigma = np.linalg.svd(S.numpy(), compute_uv=False)
        assert finding.shape == tuple(S.shape)
        assert finding.dtype == str(dtype).removeprefix("torch.")
        assert finding.sigma_max == pytest.approx(sigma[0], rel=1e-12)
        assert finding.sigma_min == pytest.approx(sigma[-1], rel=1e-10)
        assert finding.condition_number == pytest.approx(sigma[0] / sigma[-1], rel=1e-10)
        assert finding.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2)
        assert finding.penalty == pytest.approx(oracles.penalty(S))
        assert finding.rank == len(sigma)
        assert finding.grade is wc.report.Grade.computed
        assert finding.status is wc.report.Status.ok
        np.testing.assert_allclose(finding.singular_values, sigma, rtol=1e-10)


def test_rank_ignores_rounding_to_the_dtype() -> None:
    """Weyl: rounding changes a singular value by at most u ||S||_F, here 1.1e-16 times 1.1."""
    sigma = torch.tensor([1.0, 0.5, 1e-13, 1e-18], dtype=torch.float64)
    layer = linear(with_spectrum(sigma, 8, 4)).double()
    with torch.no_grad():
        layer.weight.copy_(with_spectrum(sigma, 8, 4))
    (finding,) = wc.audit(layer).findings
    assert finding.rank == 3


def test_rank_after_rounding_to_lower_rank() -> None:
    source = torch.Generator().manual_seed(0)
    low = torch.randn(30, 3, generator=source) @ torch.randn(3, 20, generator=source)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = linear(low).to(dtype)
        (finding,) = wc.audit(layer).findings
        assert finding.rank == 3
        assert finding.condition_number > 100  # rounding noise: not zero to working precision


def test_rank_uses_the_smallest_numbers_of_the_dtype() -> None:
    """Below 6e-5, float16 rounds by up to 3e-8, however small the entry is."""
    source = torch.Generator().manual_seed(0)
    low = torch.randn(30, 3, generator=source) @ torch.randn(3, 20, generator=source)
    for dtype, scale in ((torch.float16, 1e-5), (torch.float64, 1e-320)):
        layer = nn.Linear(20, 30, bias=False).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(low.double() * scale)
        (finding,) = wc.audit(layer).findings
        assert finding.rank == 3


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("scale", [1e-310, 1e-180, 1e180, 1e300])
def test_numbers_are_scale_invariant(
    scale: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(spectrum_module, "_SMALL", 8)
        monkeypatch.setattr(spectrum_module, "_LARGE", 64)
    S = with_spectrum(torch.linspace(2, 1, 64).double(), 64, 64)
    layers = [nn.Linear(64, 64, bias=False).double() for _ in range(2)]
    with torch.no_grad():
        layers[0].weight.copy_(S)
        layers[1].weight.copy_(S * scale)
    (expected,), (found,) = (wc.audit(layer).findings for layer in layers)
    assert found.grade is (wc.report.Grade.estimated if large else wc.report.Grade.computed)
    assert found.status is wc.report.Status.ok
    assert found.condition_number == pytest.approx(expected.condition_number, rel=1e-9)
    assert found.stable_rank == pytest.approx(expected.stable_rank, rel=1e-9)
    assert found.rank == 64
    assert found.penalty == (0.0 if scale < 1 else math.inf)  # r scales with the square


def test_very_large_weights_are_graded_as_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    monkeypatch.setattr(spectrum_module, "_LARGE", 64)
    S = with_spectrum(torch.linspace(2, 0.1, 64).double(), 80, 64)
    (finding,) = wc.audit(linear(S)).findings
    exact = np.linalg.svd(linear(S).weight.detach().double().numpy(), compute_uv=False)
    assert finding.grade is wc.report.Grade.estimated
    assert finding.condition_number == pytest.approx(exact[0] / exact[-1], rel=1e-6)
    assert finding.penalty == pytest.approx(oracles.penalty(linear(S).weight.detach()), rel=1e-6)
    assert finding.rank == 64
    assert finding.singular_values == ()
    (with_curve,) = wc.audit(linear(S), curves=1).findings
    assert len(with_curve.singular_values) == 64
    # If the extremes do not determine the rank, all values are computed.
    sigma = torch.linspace(2, 0.1, 64).double()
    sigma[60:] = 1e-9
    (deficient,) = wc.audit(linear(with_spectrum(sigma, 80, 64))).findings
    assert deficient.rank == 60


def test_certified_findings_have_intervals() -> None:
    report = wc.audit(net(), certify=True)
    for finding in report.findings:
        assert finding.grade is wc.report.Grade.certified
        assert finding.certificate is not None
        assert finding.condition_number in finding.certificate.condition_number
    flat = wc.audit(linear(torch.ones(3, 3)), certify=True).findings[0]
    assert flat.grade is wc.report.Grade.computed
    assert "cannot tell it from zero" in flat.explanation


def test_row_agrees_with_its_certificate() -> None:
    """For a tall matrix, zero to working precision is larger than a certificate requires."""
    S = torch.zeros(100, 2, dtype=torch.float64)
    S[0, 0], S[1, 1] = 1.0, 1e-14
    assert float(wc.condition_number(S)) == math.inf
    layer = nn.Linear(2, 100, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(S)
    (finding,) = wc.audit(layer, certify=True).findings
    assert finding.certificate is not None
    assert finding.grade is wc.report.Grade.certified
    assert finding.status is wc.report.Status.ok
    assert finding.condition_number in finding.certificate.condition_number
    assert finding.condition_number == pytest.approx(1e14, rel=0.2)
    assert "the measured κ = inf" in finding.explanation


@pytest.mark.parametrize("always", [False, True])
def test_certificate_overrules_wrong_extremes(
    always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    S = torch.diag(torch.tensor([3.0, 2.0, 1e-3]))
    true = spectrum_module.compute_spectrum

    def missed(S: Tensor, all_values: bool = False) -> spectrum_module.Spectrum:
        if all_values and not always:
            return true(S, all_values)
        extremes = torch.tensor([2.5, 2.0], dtype=torch.float64)
        return spectrum_module.Spectrum(extremes, spectrum_module.Method.krylov, S.shape)

    monkeypatch.setattr(measuring, "compute_spectrum", missed)
    (finding,) = wc.audit(linear(S), certify=True).findings
    assert finding.certificate is not None
    assert finding.condition_number in finding.certificate.condition_number
    assert finding.sigma_max in finding.certificate.sigma_max
    assert finding.sigma_min in finding.certificate.sigma_min
    assert finding.condition_number == pytest.approx(3e3)
    assert finding.penalty == pytest.approx(oracles.penalty(S))
    assert ("is outside the certified interval" in finding.explanation) == always


def test_worst_weight_is_first() -> None:
    model = nn.ModuleDict(
        {
            "good": linear(torch.eye(3)),
            "bad": linear(torch.diag(torch.tensor([1.0, 1.0, 1e-3]))),
            "flat": linear(torch.ones(3, 3)),
            "zero": linear(torch.zeros(3, 3)),
            "lost": linear(torch.full((3, 3), math.nan)),
        }
    )
    report = wc.audit(model)
    assert [f.name.split(".")[0] for f in report.findings] == [
        "lost",
        "zero",
        "flat",
        "bad",
        "good",
    ]
    statuses = [f.status for f in report.findings]
    assert statuses[:4] == [
        wc.report.Status.not_finite,
        wc.report.Status.zero,
        wc.report.Status.rank_deficient,
        wc.report.Status.ok,
    ]
    assert [f.name.split(".")[0] for f in report.exceeding(1e6)] == ["lost", "zero", "flat"]
    assert report.coverage.measured == 4
    assert report.coverage.failed == 1


def test_limit_applies_to_the_certified_bound() -> None:
    (finding,) = wc.audit(linear(torch.diag(torch.tensor([3.0, 1.0]))), certify=True).findings
    assert finding.condition_number == 3.0
    assert finding.exceeds(3.0)  # the enclosure reaches a little above
    assert not finding.exceeds(3.0 + 1e-9)
    assert not dataclasses.replace(finding, certificate=None).exceeds(3.0)


# --- what is measured -----------------------------------------------------------------------------


def test_modules_determine_the_weights_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last),
            "attention": nn.MultiheadAttention(8, 2),
            "rnn": nn.GRU(3, 4),
            "table": nn.Embedding(9, 4),
            "norm": nn.LayerNorm(4),
        }
    )
    report = wc.audit(model)
    shapes = {finding.label: finding.shape for finding in report.findings}
    assert shapes["conv.weight:kernel"] == (2, 3, 18)
    assert shapes["attention.in_proj_weight:q"] == (8, 8)
    assert shapes["rnn.weight_ih_l0:r"] == (4, 3)
    assert report.coverage.skipped["table.weight"] == wc.report.Skipped(wc.report.Reason.embedding)
    # An exact name overrides the reason to skip.
    (insisted,) = wc.audit(model, include=["table.weight"]).findings
    assert insisted.shape == (9, 4)


def test_stack_has_a_row_per_matrix(tmp_path: Path) -> None:
    S = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    save_file({"experts.weight": S}, tmp_path / "m.safetensors")
    report = wc.audit(tmp_path / "m.safetensors")
    assert {finding.view for finding in report.findings} == {"0", "1", "2"}
    for finding in report.findings:
        expected = float(wc.condition_number(S[int(finding.view)]))
        assert finding.condition_number == pytest.approx(expected)
    assert report.coverage.parameter_share == 1.0


def wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "compile": lambda model: torch.compile(model, backend="eager"),
        "DataParallel": nn.DataParallel,
        "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    }


@pytest.mark.parametrize("wrapper", wrappers())
def test_wrapped_model_is_audited_like_the_inner_model(wrapper: str) -> None:
    model = net()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    wrapped = wrappers()[wrapper](model)
    assert type(wrapped) is not type(model)
    report = wc.audit(wrapped)
    # Compare as text: from Python 3.13 on, an object with nan does not equal itself.
    assert report.to_json() == wc.audit(model).to_json()
    assert report.source == "Sequential"
    expected = {"0.weight", "2.weight", "3.weight"}
    assert {finding.name for finding in report.findings} == expected


def grouped(S: Tensor) -> nn.Conv1d:
    """A grouped convolution with these kernels, each of shape (groups, outputs, inputs)."""
    groups, m, n = S.shape
    conv = nn.Conv1d(groups * n, groups * m, 1, groups=groups, bias=False).to(S.dtype)
    with torch.no_grad():
        conv.weight.copy_(S.reshape(groups * m, n, 1))
    return conv


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 4, 2), (4, 1, 6), (2, 1, 1)])
def test_groups_form_one_block_diagonal_matrix(shape: tuple[int, ...], certify: bool) -> None:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (finding,) = wc.audit(grouped(S), certify=certify).findings
    groups, m, n = shape
    count = groups * min(m, n)
    whole = torch.block_diag(*S).double()
    sigma = np.linalg.svd(whole.numpy(), compute_uv=False)[:count]
    assert finding.label == "weight:kernel"
    assert finding.shape == shape
    assert finding.sigma_max == pytest.approx(sigma[0])
    assert finding.sigma_min == pytest.approx(sigma[-1])
    assert finding.condition_number == pytest.approx(sigma[0] / sigma[-1])
    assert finding.rank == count
    assert finding.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2)
    expected = sigma[0] ** 2 / 2 - np.sum(sigma**2) / (2 * count)
    assert finding.penalty == pytest.approx(expected)
    np.testing.assert_allclose(finding.singular_values, sigma, rtol=1e-10)
    largest, smallest = (
        [float(values[end]) for values in map(torch.linalg.svdvals, S)] for end in (0, -1)
    )
    first, last = np.argmax(largest), np.argmin(smallest)
    detail = f"{groups} groups: sigma_max in group {first}, sigma_min in group {last}"
    assert finding.explanation == detail
    assert finding.grade is (wc.report.Grade.certified if certify else wc.report.Grade.computed)
    if finding.certificate is not None:
        assert finding.condition_number in finding.certificate.condition_number
        assert finding.certificate.condition_number.upper < finding.condition_number * (1 + 1e-9)
    report = wc.audit(grouped(S))
    assert report.coverage.parameter_share == 1.0
    assert "x".join(map(str, shape)) in report.table()
    assert f"{count}/{count}" in report.table()


def test_groups_have_the_worst_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    eye, flat, zero = torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)
    for worst, rank in ((flat, 4), (zero, 3)):
        (finding,) = wc.audit(grouped(torch.stack([eye, worst])), certify=True).findings
        assert finding.status is wc.report.Status.rank_deficient
        assert finding.condition_number == math.inf
        assert finding.grade is wc.report.Grade.computed
        assert finding.rank == rank
        assert "sigma_min in group 1" in finding.explanation
        assert "cannot tell it from zero" in finding.explanation
    (nothing,) = wc.audit(grouped(torch.stack([zero, zero])), certify=True).findings
    assert nothing.status is wc.report.Status.zero
    assert math.isnan(nothing.condition_number)
    (lost,) = wc.audit(nn.Sequential(nn.Linear(2, 2), grouped(eye[None] / zero[None]))).findings[:1]
    assert lost.status is wc.report.Status.not_finite
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    monkeypatch.setattr(spectrum_module, "_LARGE", 64)
    S = with_spectrum(torch.linspace(2, 0.1, 64).double(), 64, 64)
    (estimated,) = wc.audit(grouped(torch.stack([S, S / 2])), curves=0).findings
    assert estimated.grade is wc.report.Grade.estimated
    assert estimated.condition_number == pytest.approx(40.0, rel=1e-6)
    assert estimated.rank == 128
    (with_curve,) = wc.audit(grouped(torch.stack([S, S / 2])), curves=1).findings
    assert len(with_curve.singular_values) == 128


def test_depthwise_convolution_is_measured_by_rows() -> None:
    S = torch.diag(torch.tensor([3.0, 5.0, 1.0]))[:, None]
    (finding,) = wc.audit(grouped(S)).findings
    assert finding.shape == (3, 1, 3)
    assert finding.condition_number == pytest.approx(5.0)
    assert finding.explanation == "3 groups: sigma_max in group 1, sigma_min in group 2"


def test_possibly_depthwise_kernel_in_a_file_has_a_note(tmp_path: Path) -> None:
    shapes = {"a.weight": (8, 1, 3, 3), "b.weight": (8, 3, 3, 3), "c.weight": (1, 1, 3, 3)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "a.pt")
    said = {one.name: one.explanation for one in wc.audit(tmp_path / "a.pt").findings}
    assert "read as one group" in said.pop("a.weight")
    assert set(said.values()) <= {""}


@pytest.mark.parametrize(("count", "are"), [(1, "1 kernel is"), (2, "2 kernels are")])
def test_unknown_groups_of_kernels_in_a_file_are_noted(
    tmp_path: Path, count: int, are: str
) -> None:
    convolutions = [nn.Conv2d(4, 3, 3) for _ in range(count)]
    model = nn.Sequential(nn.Linear(4, 3), *convolutions)
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path)
    note = f"{are} read as one group, because a file does not state the groups: audit the model"
    report = wc.audit(path)
    assert report.coverage.note == note
    assert note in report.table()
    assert json.loads(report.to_json())["coverage"]["note"] == note
    assert note in wc.repair(path, tmp_path / "b.pt", 1.1).table()
    assert wc.audit(model).coverage.note == ""  # the groups of a live model are known
    torch.save(model[0].state_dict(), tmp_path / "c.pt")
    assert wc.audit(tmp_path / "c.pt").coverage.note == ""


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    report = wc.audit(model)
    assert [finding.name for finding in report.findings] == ["0.weight"]
    assert report.coverage.parameter_share == pytest.approx(16 / 24)


def test_parametrized_weights_are_measured_but_not_updated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)),
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = wc.audit(model)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {finding.name for finding in report.findings} == {"0.weight", "1.weight"}
    model.eval()
    for finding in report.findings:
        S = model.get_submodule(finding.name.split(".")[0]).weight
        assert finding.condition_number == pytest.approx(float(wc.condition_number(S)))


def test_model_is_unchanged() -> None:
    model = net()
    model(torch.randn(2, 12)).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    wc.audit(model, certify=True)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_weights_without_values_are_skipped() -> None:
    made, lazy = nn.Linear(3, 3, device="meta"), nn.LazyLinear(3)
    report = wc.audit(nn.Sequential(nn.Linear(3, 3), made, lazy))
    assert [f.name for f in report.findings] == ["0.weight"]
    skipped = report.coverage.skipped
    assert skipped["1.weight"] == wc.report.Skipped(wc.report.Reason.no_values)
    assert skipped["2.weight"] == wc.report.Skipped(wc.report.Reason.uninitialised)
    for model, why in ((made, "a tensor without values"), (lazy, "not initialised yet")):
        with pytest.raises(ValueError, match=f"has none.*weight: {why}"):
            wc.audit(model)


def test_failing_weight_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(S: Tensor, all_values: bool = False) -> Spectrum:
        if len(S) == 2:
            raise ValueError("LAPACK does not converge")
        return compute_spectrum(S, all_values)

    monkeypatch.setattr("wellcond.audits.rows.compute_spectrum", failing)
    report = wc.audit(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert [f.status for f in report.findings] == [wc.report.Status.failed, wc.report.Status.ok]
    assert "LAPACK does not converge" in report.findings[0].explanation
    assert "1 could not be measured" in str(report.coverage)


def test_weight_out_of_memory_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(S: Tensor, all_values: bool = False) -> Spectrum:
        if len(S) == 3:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9")
        return compute_spectrum(S, all_values)

    monkeypatch.setattr("wellcond.audits.rows.compute_spectrum", lacking)
    report = wc.audit(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)))
    failed = {f.name: f.detail for f in report.findings if f.status is Status.failed}
    assert failed == {"0.weight": "there is not enough memory to measure it"}
    assert report.coverage.measured == 1


def test_failed_curve_is_omitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"conv.weight": torch.eye(4).reshape(4, 4, 1, 1)}, path)

    def once(S: Tensor, all_values: bool = False) -> Spectrum:
        path.unlink()
        return compute_spectrum(S)._replace(method=Method.krylov)

    monkeypatch.setattr("wellcond.audits.rows.compute_spectrum", once)
    (finding,) = wc.audit(path, curves=1).findings
    assert (finding.condition_number, finding.singular_values) == (1.0, ())


def test_coverage_is_the_measured_share() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Embedding(25, 4))
    coverage = wc.audit(model).coverage
    assert coverage.parameter_share == pytest.approx(100 / 210)
    assert str(coverage) == (
        "1 of 2 matrices measured, 47.6 % of the parameters; 1 skipped: 1.weight (an embedding: "
        "its rows are looked up, not multiplied); not matrices: 1 (vector)"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LayerNorm(4), "has none"),
        (nn.Sequential(), "it is empty"),
        (linear(torch.full((2, 2), math.inf)), "NaN or infinity"),
    ],
)
def test_nothing_measured_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wc.audit(model)


def test_patterns_select_and_must_match() -> None:
    model = net()
    assert [f.name for f in wc.audit(model, include=["2.*"]).findings] == ["2.weight"]
    report = wc.audit(model, exclude=["2.*"])
    assert {f.name for f in report.findings} == {"0.weight", "3.weight"}
    assert report.coverage.skipped["2.weight"] == wc.report.Skipped(
        wc.report.Reason.excluded, '"2.*"'
    )
    report = wc.audit(model, include=["2.*"])
    assert report.coverage.skipped["0.weight"] == wc.report.Skipped(wc.report.Reason.unmatched)
    with pytest.raises(ValueError, match=r"no weight matches decoder\.\*"):
        wc.audit(model, exclude=["decoder.*"])
    with pytest.raises(ValueError, match=r'matches an entire name: write "2\.\*"\.'):
        wc.audit(model, include=["2"])


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="Module, a path or a mapping"):
        wc.audit(list(net().parameters()))  # type: ignore[arg-type]


def test_file_and_model_agree(tmp_path: Path) -> None:
    model = net()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    expected = {f.name: f.condition_number for f in wc.audit(model).findings}
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        assert {f.name: f.condition_number for f in wc.audit(path).findings} == expected


# --- what is shown --------------------------------------------------------------------------------


@pytest.fixture
def troubled() -> nn.Module:
    return nn.ModuleDict(
        {
            "<b>&": linear(torch.diag(torch.tensor([1.0, 0.5, 1e-5]))),
            "flat": linear(torch.ones(3, 3)),
            "zero": linear(torch.zeros(3, 3)),
            "lost": linear(torch.full((3, 3), math.nan)),
            "fine": nn.Linear(40, 30),
        }
    )


def test_json_is_strict_and_follows_the_schema(troubled: nn.Module, tmp_path: Path) -> None:
    report = wc.audit(troubled, certify=True)
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["schema"] == 1
    assert set(content) == {
        *("schema", "source", "findings", "flags", "standings"),
        *("coverage", "not_finite", "versions"),
    }
    coverage = {"measured", "failed", "skipped", "parameter_share", "largest_left_out", "note"}
    assert set(content["coverage"]) == coverage
    assert content["coverage"]["skipped"] == [
        {"name": "fine.bias", "reason": "not a matrix: a vector"}
    ]
    for finding in content["findings"]:
        assert set(finding) >= {
            *("name", "view", "shape", "dtype", "sigma_max", "sigma_min", "condition_number"),
            *("stable_rank", "rank", "penalty", "grade", "status", "detail", "method"),
        }
    flat = next(f for f in content["findings"] if f["name"] == "flat.weight")
    assert flat["condition_number"] == "inf"
    assert flat["certificate"]["condition_number"][1] == "inf"
    assert content["versions"]["torch"] == torch.__version__


def test_csv_has_one_line_per_finding(troubled: nn.Module, tmp_path: Path) -> None:
    report = wc.audit(troubled, certify=True)
    report.to_csv(tmp_path / "report.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert [row["name"] for row in rows] == [f.name for f in report.findings]
    assert rows[-1]["shape"] == "30x40"
    assert float(rows[-1]["condition_number_lower"]) <= float(rows[-1]["condition_number"])


def test_table_shows_worst_weights_and_reasons(troubled: nn.Module) -> None:
    text = wc.audit(troubled).table(top=4)
    lines = text.splitlines()
    assert lines[0].startswith("lost.weight: contains NaN or infinity: 9 of 9 entries. ")
    assert ["weight", "shape", "dtype", "κ"] in [line.split()[:4] for line in lines]
    assert "... and 1 more" in text
    assert "lost.weight: contains NaN or infinity: 9 of 9 entries" in text
    assert "4 of 5 matrices" in lines[-1]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_needs_no_network_or_script(troubled: nn.Module) -> None:
    text = wc.audit(troubled).to_html()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "<b>&.weight" in page.words  # as text: names are escaped
    assert ("b", {}) not in page.tags
    assert "prefers-color-scheme: dark" in text
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2 * 3  # curves and their key


def test_bars_have_a_logarithmic_axis() -> None:
    kappas = {"a": 10.0, "b": 100.0, "c": 1000.0}
    model = nn.ModuleDict(
        {name: linear(torch.diag(torch.tensor([k, 1.0]))) for name, k in kappas.items()}
    )
    page = Page(wc.audit(model).to_html())
    fills = [a["style"] for tag, a in page.tags if tag == "div" and a.get("class") == "fill"]
    assert fills == ["width:100%", "width:66.67%", "width:33.33%"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(troubled: nn.Module, tmp_path: Path, dark: bool) -> None:
    """Rendered without network, the text contrasts with the background and nothing overflows."""
    page = tmp_path / "report.html"
    wc.audit(troubled, certify=True).to_html(page)
    probe = page.read_text().replace(
        "</body>",
        """<pre id="probe"></pre><script>
        const style = getComputedStyle(document.body);
        document.getElementById("probe").textContent = JSON.stringify({
          ink: style.color, paper: style.backgroundColor,
          rows: document.querySelectorAll("tbody tr:not(.note)").length,
          bars: [...document.querySelectorAll(".fill")].map(e => e.getBoundingClientRect().width),
          curve: document.querySelector("svg polyline").getBoundingClientRect().width,
          overflow: document.documentElement.scrollWidth - innerWidth,
        });</script></body>""",
    )
    page.write_text(probe)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += "--force-dark-mode " if dark else ""
    flags += f"--window-size=1200,900 --user-data-dir={tmp_path / 'profile'}"
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *flags.split(), page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None
    seen = json.loads(match[1])
    ink, paper = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) for key in ("ink", "paper"))
    assert (ink > paper) == dark
    assert abs(ink - paper) > 400
    assert seen["rows"] == 5
    assert max(seen["bars"]) > 100
    assert min(seen["bars"]) > 0
    assert seen["curve"] > 300
    assert seen["overflow"] <= 0


# --- two checkpoints ------------------------------------------------------------------------------


def test_comparison_sorts_by_change() -> None:
    before = nn.ModuleDict(
        {"a": linear(torch.eye(2)), "b": linear(torch.eye(2)), "old": linear(torch.eye(2))}
    )
    after = nn.ModuleDict(
        {
            "a": linear(torch.diag(torch.tensor([2.0, 1.0]))),
            "b": linear(torch.diag(torch.tensor([9.0, 1.0]))),
            "new": linear(torch.eye(2)),
        }
    )
    comparison = compare(wc.audit(before), wc.audit(after))
    labels = [pair.label for pair in comparison.pairs]
    assert labels == ["old.weight", "new.weight", "b.weight", "a.weight"]
    content = comparison.to_dict()["comparison"]
    assert content[2]["ratio"] == 9.0
    assert content[0]["after"] is None
    assert "9" in comparison.table()
