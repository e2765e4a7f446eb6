"""The benchmarks measure every method and print a document. Times are not checked."""

import json

import pytest
import torch

import wellcond as wc
from wellcond import cli
from wellcond_experiments import bench_audit, bench_step, bench_train
from wellcond_experiments.bench_step import Step


def wellcond(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_step_measures_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert wellcond("bench", "step", "--rounds", 1, "--hidden", 32, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {"benchmark", "settings", "versions", "ways"} == document.keys()
    methods = {row["way"] for row in document["ways"]}
    assert {"none", "attach(every=10)", "add_gradients", "in the loss"} <= methods
    assert all(row["ratio"] > 0 for row in document["ways"])
    table = Step().table(document)
    assert [row[0] for row in table.rows] == [row["way"] for row in document["ways"]]
    assert all(len(row) == len(table.header) for row in table.rows)


def test_memory_of_the_methods_of_a_step() -> None:
    step = Step()
    ways = {}
    for method in step.methods():
        training = bench_step.Training(step, method)
        if training.reg:
            method.act(training.reg)  # the first call allocates more
        ways[method.name] = training.measure_memory()
    assert ways["none"]["temporary"] == ways["none"]["state"] == 0
    for name in ("attach(every=10)", "add_gradients"):
        # The blocks of k singular vectors; the state contains both.
        assert 0 < ways[name]["temporary"] <= 0.06
        assert 0 < ways[name]["state"] <= 0.06
    for name in ("in the loss", "TikhonovPenalty, in the loss"):
        assert ways[name]["temporary"] == 1  # autograd makes a gradient before it adds it
    # A copy of the weight, in case rounding requires another margin.
    assert ways["limit kept up, every=10"]["temporary"] <= 1
    assert ways["TikhonovPenalty, add_gradients"]["temporary"] < 1e-3
    assert ways["TikhonovPenalty, add_gradients"]["state"] < 1e-3
    assert ways["spectral_norm of torch"]["temporary"] == 1
    assert ways["exact SVD in the loss"]["temporary"] >= 1


def test_exact_gradient_equals_the_public_function() -> None:
    S = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix in (S, S.mT.contiguous()):
        torch.testing.assert_close(
            bench_train.exact_gradient(matrix), wc.condition_penalty_gradient(matrix)
        )


def test_fidelity_compares_with_an_exact_decomposition(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "SIDE", 8)
    assert wellcond("bench", "fidelity", "--epochs", 1, "--block", "4,32", "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == 12
    wide = [run["ratio"] for run in runs if run["block"] == 32 and run["how"] == "gradient"]
    assert len(wide) == 2
    assert all(abs(ratio - 1) < 0.1 for ratio in wide)


@pytest.mark.slow
def test_stronger_penalties_end_at_lower_condition_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "SIDE", 8)
    monkeypatch.setattr(bench_train, "GRID", {"gradient": (0.1, 1.0), "proximal": (10.0, 1000.0)})
    assert wellcond("bench", "strength", "--epochs", 2, "--json") == 0
    kappa = [run["condition_number"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert kappa[0] > kappa[1] > kappa[2]
    assert kappa[0] > kappa[3] > kappa[4]
    assert wellcond("bench", "strength", "--epochs", 1) == 0
    assert "proximal" in capsys.readouterr().out


def test_a_limit_is_kept_in_the_strength_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "SIDE", 8)
    monkeypatch.setattr(bench_train, "GRID", {})
    monkeypatch.setattr(bench_train, "LIMITS", (2.0, 1.5))
    assert wellcond("bench", "strength", "--epochs", 1, "--json") == 0
    none, *limited = json.loads(capsys.readouterr().out)["runs"]
    assert none["condition_number"] > 2
    assert [(run["how"], run["strength"]) for run in limited] == [
        ("limit", limit) for limit in (2.0, 1.5)
    ]
    for run in limited:
        # A watched weight is projected to 1 + (K - 1)/1.5.
        assert 0.8 * run["strength"] < run["condition_number"] <= run["strength"]


def test_audit_is_compared_with_svdvals(capsys: pytest.CaptureFixture[str]) -> None:
    assert wellcond("bench", "audit", "--sizes", "4x4,70x300,300x300", "--rounds", 1, "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["matrix"], run["size"]) for run in runs] == [
        ("gaussian", "4x4"),
        *((kind, size) for size in ("70x300", "300x300") for kind in bench_audit.KINDS),
    ]
    assert all(run["seconds"] > 0 and run["seconds_svdvals"] > 0 for run in runs)
    assert all(run["error"] < 1e-6 and run["error_sigma_max"] < 1e-12 for run in runs)
    assert wellcond("bench", "audit", "--sizes", "4x4", "--rounds", 1) == 0
    assert "gaussian" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["4", "4x", "0x4", "4x4,axb"])
def test_invalid_sizes_are_refused(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wellcond("bench", "audit", "--sizes", sizes) == 2
    assert "--sizes must be of the form 64x64,4096x4096" in capsys.readouterr().err


@pytest.mark.slow
def test_transformer_needs_no_host_synchronisation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--model", "transformer", "--blocks", 2, "--width", 16, "--rounds", 1)
    assert wellcond("bench", "step", *arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    # Per block: three matrices of attention, its output, and two of the MLP; plus the head.
    assert document["settings"]["weights"] == 2 * 6 + 1
    rows = {row["way"]: row for row in document["ways"]}
    for way in ("add_gradients", "in the loss"):
        assert rows[way]["synchronisations"] == 0
    assert rows["attach(every=10)"]["synchronisations"] < 1


def test_operations_per_added_weight_are_few() -> None:
    """An additional weight adds its product, two terms of the update, and copies for the stack."""

    def operations(name: str, blocks: int) -> float:
        step = Step(model="transformer", blocks=blocks, width=16)
        (method,) = (one for one in step.methods() if one.name == name)
        return step.count_operations(method)["operations"]

    for name, steps, most in [("add_gradients", 1, 3), ("attach(every=10)", 10, 5.1)]:
        added = steps * (operations(name, 9) - operations(name, 3))
        assert 0 < added <= most * 6 * 6


def test_host_synchronisations_are_counted() -> None:
    x = torch.ones(3, 3, device="meta")
    with bench_step.on_a_device() as device:
        torch.linalg.eigh(x)
        x.to("cpu")
        x.to("cpu", non_blocking=True)
        with pytest.raises(RuntimeError):
            x.sum().item()
    assert device.synchronisations == 3
