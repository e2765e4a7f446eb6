"""The critic: distances match theory, bounds hold, and the search uses other data."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wellcond.cli import main
from wellcond_experiments import grid
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import SEARCH, Cell
from wellcond_experiments.methods import COMPARED, METHODS, GradientPenalty, evaluation
from wellcond_experiments.settings import critic
from wellcond_experiments.settings.critic import Critic


def points(count: int, seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(count, *(shape or (2,)), generator=torch.Generator().manual_seed(seed))


# --- distances ------------------------------------------------------------------------------------


def test_distance_of_equal_samples_is_zero() -> None:
    x = points(60)
    assert critic.measure_sliced(x.flip(0), x) == 0
    assert critic.measure_sliced(x.repeat(3, 1), x) == 0
    assert critic.measure_sliced(points(60, 1), x) > 0


def test_the_distance_of_a_shift_is_its_mean_projection() -> None:
    x, shift = points(50), torch.tensor([3.0, -4.0])
    expected = (critic._directions(2) @ shift).abs().mean()
    assert critic.measure_sliced(x + shift, x) == pytest.approx(float(expected), rel=1e-5)
    # The directions are uniform: the mean of |cos| is 2/pi, with about 3 % error for 128.
    assert float(expected) == pytest.approx(5 * 2 / math.pi, rel=0.1)


def test_a_generator_of_the_mean_has_distance_one_at_any_scale() -> None:
    x = points(80, 0, 1, 8, 8)
    for factor in (1.0, 100.0):
        y = factor * x
        assert critic.measure_distance(y.mean(0).expand_as(y), y) == pytest.approx(1)
    near = x + 0.1 * points(80, 1, 1, 8, 8)
    assert critic.measure_distance(near, x) < 0.2


def test_modes_are_counted() -> None:
    for case, count in (("ring", 8), ("grid", 25)):
        samples = critic.draw_mixture(case, 2000, 5)
        means, deviation = critic.centres(case)
        assert len(means) == count
        assert critic.count_modes(case, samples) == count
        assert critic.count_modes(case, means[:1].expand(2000, 2)) == 1
        assert critic.count_modes(case, samples + 5 * deviation) == 0


# --- measurements of a critic ---------------------------------------------------------------------


@pytest.mark.parametrize("sorts", [False, True])
def test_operator_norm_equals_that_of_the_jacobian(sorts: bool) -> None:
    torch.manual_seed(0)
    net = critic.build_critic(images=True, sorts=sorts)
    found = critic.acting_norms(net, torch.Size((1, 8, 8)))
    exact, x = [], torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for layer in copy.deepcopy(net).double():
        if not isinstance(layer, nn.LeakyReLU | critic.GroupSort2 | nn.Flatten):
            jacobian = torch.autograd.functional.jacobian(layer, x)
            matrix = jacobian.reshape(layer(x).numel(), x.numel())
            exact.append(float(torch.linalg.svdvals(matrix)[0]))
        x = layer(x).detach()
    assert found == pytest.approx(exact, rel=1e-5)


def test_gradient_norm_of_a_linear_critic_is_its_norm() -> None:
    linear = nn.Linear(2, 1)
    slope = critic.estimate_lipschitz(linear, points(40), points(80, 1))
    assert slope == pytest.approx(float(linear.weight.detach().norm()), rel=1e-6)


def test_group_sort_sorts_pairs_and_keeps_the_norm_of_gradients() -> None:
    x = torch.tensor([[1.0, 2.0, 5.0, -3.0]])
    assert critic.GroupSort2()(x).tolist() == [[2.0, 1.0, 5.0, -3.0]]
    images = points(3, 0, 4, 5, 5).requires_grad_()
    upstream = points(3, 1, 4, 5, 5)
    (gradient,) = torch.autograd.grad((critic.GroupSort2()(images) * upstream).sum(), images)
    assert float(gradient.norm()) == pytest.approx(float(upstream.norm()), rel=1e-6)


# --- methods --------------------------------------------------------------------------------------


def trained(method: str, strength: float, images: bool, steps: int = 30) -> nn.Module:
    """Trains a critic to separate data and noise as far as possible."""
    kind = METHODS[method]
    training = kind(lambda norm: critic.build_critic(images, kind.sorts), strength, 1e-2, seed=2)
    shape = (1, 8, 8) if images else (2,)
    real, fake = 2 + points(64, 0, *shape), points(64, 1, *shape)
    for _ in range(steps):
        of_real, of_fake = training.model(torch.cat([real, fake])).split(64)
        assert training.step(of_fake.mean() - of_real.mean())
    return training.model


def test_clipping_bounds_every_entry() -> None:
    bound = max(float(p.detach().abs().max()) for p in trained("none", 0.0, False).parameters())
    assert bound > 0.1
    clipped = trained("weight-clipping", 0.05, False)
    assert max(float(p.detach().abs().max()) for p in clipped.parameters()) == pytest.approx(0.05)


def test_gradient_penalty_of_a_linear_critic() -> None:
    training = METHODS["gradient-penalty"](lambda norm: nn.Linear(2, 1), 10.0, 1e-3, seed=0)
    assert isinstance(training, GradientPenalty)
    penalty = training.penalty(points(20), points(20, 1))
    weight = training.model.weight
    assert isinstance(weight, Tensor)
    norm = weight.norm()
    assert float(penalty.detach()) == pytest.approx(10 * (float(norm.detach()) - 1) ** 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, (20 * (norm - 1) * weight / norm).detach())


@pytest.mark.parametrize("method", ["upper-limit", "upper-limit-sort", "spectral-norm-all"])
def test_every_layer_is_limited(method: str) -> None:
    free = critic.acting_norms(trained("none", 0.0, False), torch.Size((2,)))
    net = trained(method, 0.5, False)
    with evaluation(net):
        norms = critic.acting_norms(net, torch.Size((2,)))
    assert min(free) > 0.7
    # torch does one power iteration per step, which lags behind at such a high rate.
    assert max(norms) < (0.505 if METHODS[method].ours else 0.6)


@pytest.mark.parametrize("method", ["upper-limit-acting", "upper-limit-acting-sort", "torchlip"])
def test_convolutions_are_limited_as_operators(method: str) -> None:
    if method == "torchlip":
        pytest.importorskip("deel.torchlip")
    shape = torch.Size((1, 8, 8))
    kernels = critic.acting_norms(trained("upper-limit", 1.0, True), shape)
    assert max(kernels) > 1.2
    net = trained(method, 1.0, True)
    with evaluation(net):
        assert max(critic.acting_norms(net, shape)) < 1.02


def test_methods_of_critics_are_used_only_here() -> None:
    assert COMPARED[-1] == "layer-norm-upper-limit"
    assert set(COMPARED) & set(critic.STRENGTHS | critic.ACTING) == {"none", "upper-limit"}


# --- the setting ----------------------------------------------------------------------------------


def test_search_and_report_use_different_held_out_data() -> None:
    for case in Critic.cases:
        (train, validated), (same, tested) = (critic.draw_data(case, s) for s in (True, False))
        assert torch.equal(train, same)
        parts = [{tuple(x.flatten().tolist()) for x in data} for data in (train, validated, tested)]
        assert all(len(part) > 200 for part in parts)
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert all(cell.seed >= SEARCH for cell in Critic().search_cells())


def test_methods_of_every_case() -> None:
    chosen = Critic().report_cells({})
    for case in Critic.cases:
        methods = {cell.method for cell in chosen if cell.case == case}
        assert methods == set(critic.STRENGTHS) | (
            set(critic.ACTING) if case == "digits" else set()
        )
    assert all(1.0 in critic.STRENGTHS[m] for m in ("upper-limit", "spectral-norm-all", "torchlip"))


def test_diverged_training_gets_the_distance_of_an_untrained_generator() -> None:
    quick = Critic(quick=True)
    found = quick.run(Cell("ring", "none", 0.0, 1e30, 3)).metrics
    still = quick.run(Cell("ring", "none", 0.0, 0.0, 3)).metrics
    assert (found["diverged"], still["diverged"]) == (1, 0)
    assert found["distance"] == pytest.approx(still["distance"], rel=1e-6)
    assert found["quality"] == -found["distance"]
    assert found["modes"] == 0


def test_the_version_of_torchlip_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(critic, "version", lambda name: "0.9")
    with pytest.raises(ValueError, match=r"torchlip 1\.0\.5; installed: 0\.9"):
        Critic().run(Cell("ring", "none", 0.0, 1e-3, 0))


def test_a_quick_run_writes_all_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "reproduce",
                "critic",
                "--quick",
                "--seeds",
                "1",
                "--workers",
                "1",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "Distance between two sets of data" in capsys.readouterr().out
    assert (tmp_path / "critic.png").is_file()
    document = grid.read(tmp_path / "results.json")
    found, setting = Evidence(document), Critic.of(document)
    assert {c["method"] for c in document["chosen"]} == {"upper-limit"}
    for case, table in setting.tables(found).items():
        assert len(table.rows) == 3
        distances = [float(row[3].split()[0]) for row in table.rows]
        assert distances == sorted(distances)
        costs = found.where(case=case, method="spectral-norm-all")["cost"]
        assert costs.mean() == pytest.approx(1)
    assert len(setting.verdicts(found)) == 2
    limited = found.where(method="upper-limit")
    for _, run in limited.iterrows():
        assert run["sigma_max"] <= 1.01 * run["strength"]
        assert 0 < run["lipschitz"] <= run["strength"] ** 4 * 3.1  # √9 for a 3x3 kernel
        assert run["distance"] > run["floor"]
        assert not math.isnan(run["early_sigma"])
