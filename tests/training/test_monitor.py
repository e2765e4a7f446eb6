"""Logs and monitors: logged values, targets, cost, and no side effects."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from matrices import with_spectrum


def net(layers: int = 8) -> nn.Sequential:
    """Layers of condition numbers 2, 4, 8, ..."""
    model = nn.Sequential(*(nn.Linear(12, 9) for _ in range(layers)))
    with torch.no_grad():
        for index, layer in enumerate(model):
            sigma = torch.logspace(0, -(index + 1) * math.log10(2), 9, dtype=torch.float64)
            layer.weight.copy_(with_spectrum(sigma.flip(0) / sigma[-1], 9, 12, index))
    return model


def truth(model: nn.Sequential, index: int) -> tuple[float, float, float]:
    """sigma_1, the share of the stable rank, kappa."""
    sigma = torch.linalg.svdvals(model[index].weight.detach().double())
    share = float(sigma.square().sum() / sigma[0] ** 2 / 9)
    return float(sigma[0]), share, float(sigma[0] / sigma[-1])


@pytest.mark.parametrize("make", [wc.Regularizer, wc.Monitor])
def test_log_aggregates_and_five_worst(make: Any) -> None:
    model = net()
    what = make(model, wc.ConditionPenalty(0.1)) if make is wc.Regularizer else make(model)
    if make is wc.Regularizer:
        for _ in range(30):
            what()
    values = what.log(lambda values, step: None, step=0)
    expected = [truth(model, index) for index in range(8)]
    largest = max(sigma for sigma, _, _ in expected)
    assert math.isclose(values["wellcond/sigma_max/largest"], largest, rel_tol=1e-4)
    smallest = min(share for _, share, _ in expected)
    assert math.isclose(values["wellcond/stable_rank_share/smallest"], smallest, rel_tol=1e-4)
    worst = [name.split("/")[2] for name in values if "/worst/" in name]
    assert worst == ["7.weight", "6.weight", "5.weight", "4.weight", "3.weight"]
    assert "wellcond/not_measurable" not in values
    assert not any("/weights/" in name for name in values)
    every = what.log(lambda values, step: None, step=0, layers=True)
    assert sum("/weights/" in name for name in every) == 3 * 8


def test_monitor_measures_condition_numbers() -> None:
    model = net()
    monitor = wc.Monitor(model, ["3.*", "5.weight"], condition_numbers=True)
    assert monitor.names == ["3.weight", "5.weight"]
    assert monitor.skipped["0.weight"].reason is wc.report.Reason.unmatched
    estimates = monitor.measure()
    for index, name in ((3, "3.weight"), (5, "5.weight")):
        assert math.isclose(estimates[name].condition_number, truth(model, index)[2], rel_tol=1e-9)
    values = monitor.log(lambda values, step: None, step=0)
    assert math.isclose(values["wellcond/condition_number/largest"], truth(model, 5)[2])
    assert values["wellcond/worst/5.weight/condition_number"] > 60


def test_monitor_changes_nothing_and_estimates_improve() -> None:
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    monitor = wc.Monitor(model, "*", block_size=2)
    first = monitor.measure()["0.weight"].residual
    for _ in range(60):  # 30 sweeps: (sigma_3/sigma_1)^60
        last = monitor.measure()["0.weight"].residual
    assert last < 0.1 * first or last < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def sigma_max(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def is_estimate(found: float, exact: float) -> bool:
    """Whether it is at most 1 % below the exact value, and above it only by rounding."""
    return 0.99 * exact <= found <= exact * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (512, 128), (128, 512), (1024, 1024)])
@pytest.mark.parametrize("rule", [None, wc.ConditionPenalty(0.1), wc.ConditionLimit(10)])
def test_first_estimates_of_dense_spectra(shape: tuple[int, int], rule: Any) -> None:
    layer = nn.Linear(*shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[::-1], generator=torch.Generator().manual_seed(5)))
    what: Any = wc.Monitor(layer) if rule is None else wc.Regularizer(layer, rule)
    first, second = (what.measure()["weight"].sigma_max for _ in range(2))
    exact = sigma_max(layer.weight)
    assert is_estimate(first, exact)
    assert second >= first * (1 - 1e-5)
    if rule is None:
        assert second <= first * 1.01  # a constant weight does not seem to grow


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (512, 128), (1024, 1024)])
def test_documented_accuracy_of_first_estimates(shape: tuple[int, int]) -> None:
    """The figure of docs/plain.md, on 12 seeds."""
    for seed in range(3000, 3012):
        layer = nn.Linear(*shape, bias=False)
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(shape[::-1], generator=source))
        found = wc.Monitor(layer).measure()["weight"].sigma_max
        assert 0.995 <= found / sigma_max(layer.weight) <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3000, 3001])
def test_documented_accuracy_in_training(seed: int) -> None:
    """The other figure there, after the first report."""
    torch.manual_seed(seed)
    layers = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(256, 512), torch.randint(10, (256,))
    monitor = wc.Monitor(model)
    for step in range(301):
        for name, estimate in monitor.measure().items() if step % 50 == 0 else ():
            found = estimate.sigma_max / sigma_max(model.get_parameter(name))
            assert (0.998 if step else 0.995) <= found <= 1 + 1e-5
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("condition_numbers", [False, True])
def test_estimates_follow_training(condition_numbers: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(256, 256), torch.randint(10, (256,))
    monitor = wc.Monitor(model, condition_numbers=condition_numbers)
    for step in range(101):
        for name, estimate in monitor.measure().items() if step % 50 == 0 else ():
            sigma = torch.linalg.svdvals(model.get_parameter(name).detach().double())
            if condition_numbers:
                assert math.isclose(estimate.sigma_max, float(sigma[0]), rel_tol=1e-9)
                assert estimate.sigma_min is not None
                assert math.isclose(estimate.sigma_min, float(sigma[-1]), rel_tol=1e-6)
                rank = float((sigma / sigma[0]).square().sum())
                assert math.isclose(estimate.stable_rank, rank, rel_tol=1e-5)
            else:
                assert is_estimate(estimate.sigma_max, float(sigma[0]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def test_measured_extremes_are_logged() -> None:
    model = net(3)
    values = wc.Monitor(model, condition_numbers=True).log(lambda v, s: None, 0, layers=True)
    sigma = [torch.linalg.svdvals(layer.weight.detach().double()) for layer in model]
    assert values is not None
    largest = max(float(s[0]) for s in sigma)
    assert math.isclose(values["wellcond/sigma_max/largest"], largest, rel_tol=1e-9)
    smallest = min(float(s[-1]) for s in sigma)
    assert math.isclose(values["wellcond/sigma_min/smallest"], smallest, rel_tol=1e-9)
    assert math.isclose(values["wellcond/weights/1.weight/sigma_min"], float(sigma[1][-1]))


def logged_keys() -> set[str]:
    """The keys of a monitor, and of regularisers with each kind of rule, without names."""
    model = net(3)
    monitor = wc.Monitor(model, condition_numbers=True)
    values = dict(monitor.log(lambda v, s: None, 0, layers=True) or {})
    rules = [(wc.ConditionPenalty(0.1), None), (wc.ConditionLimit(2.0), None)]
    rules += [(wc.ConditionLimit(2.0), 1), (wc.SingularValueLimit(upper=0.1), None)]
    for rule, every in rules:
        model = net(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reg = wc.Regularizer(model, rule)
        reg.attach(optimizer, every=every)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(4):
            optimizer.step()
        values |= reg.log(lambda v, s: None, 0, layers=True) or {}
    with torch.no_grad():
        model[0].weight.zero_()
    values |= reg.log(lambda v, s: None, 0) or {}
    return {re.sub(r"\d\.weight", "NAME", key.removeprefix("wellcond/")) for key in values}


def test_page_lists_all_logged_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plain.md").read_text()
    rows = page.partition("| key, after `wellcond/`")[2].partition("\n\n")[0].splitlines()
    listed = set()
    for row in rows[2:]:
        for key in re.findall("`([^`]+)`", row.split("|")[1]):
            if not key.startswith("/"):
                base = key.rpartition("/")[0]
            listed.add(base + key if key.startswith("/") else key)
    assert logged_keys() == listed


def test_frozen_weights_are_watched() -> None:
    model = net(3).requires_grad_(False)
    assert wc.Monitor(model).names == ["0.weight", "1.weight", "2.weight"]
    model[1].requires_grad_(True)
    monitor = wc.Monitor(model, ["0.*", "1.*"])
    model[0].requires_grad_(True)
    assert list(monitor.measure()) == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match="at least one weight to watch"):
        wc.Monitor(nn.LayerNorm(8))
    with pytest.raises(ValueError, match="at least one weight to limit"):
        wc.enforce(nn.LayerNorm(8), wc.ConditionLimit(2))
    with pytest.raises(ValueError, match="at least one weight to regularise"):
        wc.Regularizer(nn.LayerNorm(8), wc.ConditionLimit(2))


@pytest.mark.parametrize("make", [wc.Monitor, lambda m: wc.Regularizer(m, wc.ConditionLimit(2.0))])
def test_a_warning_names_weights_that_are_not_finite_once(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(3)
    what = make(model)
    with torch.no_grad():
        model[0].weight.zero_()  # as of a new adapter: not an error
        model[1].weight[0, 0] = math.nan
    for step in (7, 8):
        values = what.log(lambda values, step: None, step, every=1)
        assert values["wellcond/not_measurable"] == 2
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    what.log(lambda values, step: None, 9, every=1)
    named = [text for text in caplog.messages if "NaN or infinity" in text]
    assert named == [
        '"1.weight" is not finite at step 7: NaN or infinity.',
        '"2.weight" is not finite at step 9: NaN or infinity.',
    ]


def test_log_interval_and_default_step() -> None:
    model = net(2)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg.attach(optimizer)
    steps = []
    for _ in range(10):
        optimizer.step()
        reg.log(lambda values, step: steps.append(step), every=4)
    assert steps == [4, 8]
    with pytest.raises(ValueError, match="`every` must be a positive integer"):
        reg.log(print, every=0)


def test_one_copy_to_the_host_per_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = wc.Monitor(net())
    # Only on the CPU the overflow of a sum of squares is checked: there is no copy.
    monkeypatch.setattr("wellcond.operators.norms._is_clear", lambda squares: True)
    copies = []
    for name in ("tolist", "item", "numpy", "__float__", "__bool__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, name: str = name, original: Any = original) -> Any:
            copies.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)
    monitor.log(lambda values, step: None, step=0)
    assert copies == ["tolist"]


def test_unmeasurable_weights_are_counted() -> None:
    model = net(3)
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[0, 0] = math.nan
    values = wc.Monitor(model, condition_numbers=True).log(lambda values, step: None, step=0)
    assert values["wellcond/not_measurable"] == 2
    assert math.isclose(values["wellcond/condition_number/largest"], truth(model, 2)[2])


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []


class Wandb(Recorder):
    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls += [(name, step) for name in values]


class LightningLogger(Recorder):
    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls += [(name, step) for name in values]


@pytest.mark.parametrize("target", [Wandb(), LightningLogger()])
def test_log_accepts_all_targets(target: Any) -> None:
    values = wc.Monitor(net(2)).log(target, 300)
    assert target.calls == [(name, 300) for name in values]


def test_tensorboard_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is missing")
    writer = tensorboard.SummaryWriter(str(tmp_path))
    wc.Monitor(net(2)).log(writer, 100)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "wellcond/sigma_max/largest" in events.Tags()["scalars"]
    assert events.Scalars("wellcond/sigma_max/largest")[0].step == 100


def test_log_rejects_other_targets() -> None:
    with pytest.raises(TypeError, match="add_scalar, log_metrics, log_dict or log"):
        wc.Monitor(net(2)).log(3, 0)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        wc.Monitor(3)
    with pytest.raises(ValueError, match="matches no parameter"):
        wc.Monitor(net(2), ["x*"])
