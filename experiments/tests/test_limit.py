"""`wellcond bench limit`: trainings, measurements and output. Times are not checked."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wellcond import cli
from wellcond_experiments import bench_limit, limit_training
from wellcond_experiments.bench_limit import Limit, Trial, judge
from wellcond_experiments.limit_cases import CASES, Case, find_case
from wellcond_experiments.limit_competitors import PEERS
from wellcond_experiments.limit_training import Training
from wellcond_experiments.limit_worker import Server, Worker, WorkerError

SLOW = {"gpt", "conv", "critic-1024"}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
MARKS = dict.fromkeys(SLOW, pytest.mark.slow) | {
    name: needs_muon for name in CASES if name.endswith("muon")
}
BY_COST = [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES]


class Here(Server):
    """A worker in this process."""

    def ask(self, request: str, **arguments: Any) -> Any:
        return getattr(self, request)(**arguments)


def begin(name: str, method: str, seed: int = 0) -> Training:
    case = find_case(name)
    return Training(case, case.source("digits"), method, case.bound or 1.0, seed)


def run_case(case: Case, methods: list[str], steps: int) -> Trial:
    trial = Trial(case, steps, {m: Here(case.name, m, "digits", 1) for m in methods}, {})  # type: ignore[misc]
    trial.begin()
    trial.time(0, lambda label: None)
    trial.measure(0, lambda label: None)
    return trial


@pytest.mark.parametrize("name", BY_COST)
def test_every_case_trains_all_methods_on_the_same_data(name: str) -> None:
    plain, other = begin(name, "plain"), begin(name, "every=1" if name != "conv" else "kernel")
    before = plain.weights()
    for _ in range(2):
        torch.testing.assert_close(plain.draw(), batch := other.draw())
        plain.step(batch)
        other.step(batch)
    assert plain.names == other.names == plain.case.limited(plain.model)
    several = {"gpt": 144, "critic-784": 2, "critic-1024": 1}
    assert len(plain.names) == several.get(name, 3 if name.startswith("critic") else 1)
    assert all(not torch.equal(*pair) for pair in zip(before, plain.weights(), strict=True))
    assert all(0 < value < math.inf for value in plain.spectra())


@pytest.mark.parametrize("name", ["critic-default", "critic-orthogonal", "mnist-k3"])
def test_an_exact_limit_holds_after_every_step(name: str) -> None:
    training = begin(name, "every=1")
    for _ in range(8):
        training.step()
        assert max(training.spectra()) <= 1.002 * training.case.bound


@needs_muon
def test_the_optimizer_of_the_matrices_is_muon() -> None:
    muon, adam = begin("critic-muon", "plain").optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert {p.ndim for p in muon.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in adam.param_groups[0]["params"]} == {1}


@pytest.mark.parametrize("method", PEERS)
def test_peers_bound_the_weights_that_eval_uses(method: str) -> None:
    try:
        training = begin("critic-default", method)
    except ImportError:
        pytest.skip(f"{method} is not installed")
    for _ in range(5):
        training.step()
    state = copy.deepcopy(training.model.state_dict())
    values = training.spectra()
    for name, value in zip(training.names, values, strict=True):
        weight = training.model.eval().get_submodule(name).weight.detach().double()
        assert value == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))
        assert 0.9 < value < 1.5
    assert training.spectra() == values
    # Measuring is not training: power iterations run only in training mode.
    torch.testing.assert_close(training.model.state_dict(), state, rtol=0, atol=0)


def test_a_peer_is_scaled_to_another_bound() -> None:
    case = find_case("critic-default")
    training = Training(case, case.source("digits"), "orthogonal", 2.5, 0)
    training.step()
    assert training.spectra() == pytest.approx([2.5] * 3, rel=1e-5)


def test_spectra_are_exact_in_float64() -> None:
    for name in ("critic-default", "mnist-k10"):
        training = begin(name, "plain")
        expected = []
        for weight in training.weights():
            sigma = torch.linalg.svdvals(weight.double())
            expected.append(float(sigma[0] / (sigma[-1] if name == "mnist-k10" else 1)))
        assert training.spectra() == pytest.approx(expected, rel=1e-12)
    training.model.get_submodule("0").weight.data[0, 0] = math.nan
    assert math.isnan(training.spectra()[0])


def test_operator_norm_equals_that_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_training, "SIDE", 6)
    training = begin("conv", "plain")
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    fields = torch.eye(3 * 36, dtype=torch.float64).reshape(-1, 3, 6, 6)
    dense: Tensor = nn.functional.conv2d(fields, kernel, padding=1).flatten(1)
    expected = float(torch.linalg.matrix_norm(dense, 2))
    for _ in range(2):  # without start vectors, and with those of the last call
        assert training._map_norm("2", kernel) == pytest.approx(expected, rel=1e-5)


def test_a_pilot_run_chooses_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def ask(self, request: str, **arguments: Any) -> Any:
            return [[1.0, 5.0, 3.0, 1.0], [4.0, 2.0, 2.0, 1.0]] if request == "measure" else {}

    trial = Trial(CASES["gpt"], 2, {"plain": Fixed()}, {})  # type: ignore[dict-item]
    trial.begin()
    assert trial.bound == 4.0  # the largest values are 4, 5, 3 and 1


def test_a_row_contains_ratios_and_excesses() -> None:
    case = find_case("mnist-k3")
    trial = Trial(case, 30, {}, {}, bound=2.0)
    trial.workers = dict.fromkeys(("plain", "watched", "before-auto"))  # type: ignore[assignment]
    trial.described = {method: {"peer": ""} for method in trial.workers}
    for method, factor in {"plain": 1.0, "watched": 3.0, "before-auto": 2.0}.items():
        # The median over the seeds; each is the mean of 1 and 3 times the factor.
        trial.seconds[method] = [[[factor, 1.0], [3 * factor, 1.0]]] * 3
    kappa = [4.0] * 19 + [2.06, 2.14, math.pi / 3] + [2.0] * 8
    trial.values["watched"] = [[[1.0, x] for x in kappa]]
    row = trial.summarise("watched")
    assert (row["ratio"], row["to_reference"], row["to_reference_processor"]) == (3.0, 1.5, 1.0)
    assert (row["early"], row["late"], row["beyond"]) == (2.0, 1.07, 1)
    assert (row["weights"], row["share_at_bound"]) == (2, 0.5)
    assert row["met"] == "EXCEEDED, TOO SLOW"
    assert "late" not in trial.summarise("plain")
    trial.values["watched"][0][25][0] = math.nan
    assert math.isnan(trial.summarise("watched")["late"])
    assert trial.summarise("watched")["beyond"] == 2
    assert judge({"late": math.nan}, case) == "EXCEEDED"
    assert judge({"late": 1.05, "to_reference": 1.4}, case) == "holds, in time"
    assert judge({"late": 1.0, "to_reference": 0.7}, find_case("mnist-k10")) == "holds, goal"


def test_spectra_come_from_a_separate_run() -> None:
    trial = run_case(find_case("critic-default"), ["plain", "every=1", "spectral_norm"], 21)
    for method in trial.present:
        assert [len(run) for run in trial.seconds[method]] == [21]
        row = trial.summarise(method)
        assert row["ratio"] > 0
        assert row["late"] > 0.9
    assert trial.summarise("every=1")["late"] < 1.01 < trial.summarise("plain")["late"]
    assert trial.summarise("plain")["ratio"] == 1


def test_accuracy_is_measured_after_training() -> None:
    trial = run_case(find_case("mnist-k10"), ["plain", "every=1"], 40)
    assert 50 < trial.summarise("every=1")["accuracy"] <= 100


def older(directory: Path) -> Path:
    """Makes a source tree of a wellcond whose limits have no effect."""
    package = directory / "src" / "wellcond"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        '__version__ = "0.0"\n'
        "class ConditionLimit:\n    def __init__(self, K): ...\n"
        "SingularValueLimit = ConditionLimit\n"
        "class Regularizer:\n"
        "    def __init__(self, model, rules): self.rules = rules\n"
        "    def attach(self, optimizer, every): self.every = every\n"
        "    def __repr__(self): return f'older, {self.every}'\n"
    )
    return directory


@pytest.mark.slow
def test_the_document_of_two_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    methods = "watched,every=1,before-every=10"
    argv = ["bench", "limit", "--case", "critic-default,mnist-k10", "--competitors", methods]
    argv += ["--steps", "21", "--seeds", "1", "--data", "digits", "--against"]
    argv.append(str(older(tmp_path)))
    # The limit of the older tree has no argument upper=.
    assert cli.main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    keys = {"benchmark", "settings", "versions", "runs", "notes", "failures"}
    assert keys == document.keys()
    assert not document["failures"]
    assert document["settings"] == {"seeds": 1, "threads": 1, "data": "digits"}
    rows = {(row["case"], row["competitor"]): row for row in document["runs"]}
    assert [method for case, method in rows if case == "mnist-k10"] == [
        "plain",
        *methods.split(","),
    ]
    assert "TypeError" in rows["critic-default", "before-every=10"]["reason"]
    older_row = rows["mnist-k10", "before-every=10"]
    assert older_row["printed"] == ["older, 10"] * 2
    assert older_row["wellcond"] == "0.0" != rows["mnist-k10", "watched"]["wellcond"]
    for row in rows.values():
        if "reason" not in row:
            assert row["ratio"] > 0
            assert row["competitor"] == "plain" or 0 < row["early"] < 100
    assert rows["critic-default", "every=1"]["late"] < 1.01
    assert rows["mnist-k10", "every=1"]["late"] <= 1 + 1e-5
    table = Limit().table(document)
    assert all(len(row) == len(table.header) for row in table.rows)
    assert any(
        "critic-default, watched: target excess ≤ 1.01" in note for note in document["notes"]
    )


@pytest.mark.slow
def test_a_case_that_cannot_be_trained_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "limit", "--case", "mnist-k3", "--data", "/nowhere", "--seeds", "1"]
    assert cli.main([*argv, "--competitors", "watched"]) == 1
    assert "FAILED mnist-k3: ValueError: no such file or directory" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_reports_a_failure_and_continues() -> None:
    worker = Worker("mnist-k10", "every=1", "digits", 1)
    try:
        with pytest.raises(WorkerError, match=r"TypeError: .*'seeds'"):
            worker.ask("start", seeds=0)
        assert worker.ask("start", seed=0, bound=10.0) == ["0"]
        assert len(worker.ask("train", steps=2)) == 2
    finally:
        worker.close()
    ended = Worker("mnist-k10", "plain", "digits", 1, Path("/nowhere"))
    try:
        with pytest.raises(WorkerError, match="RuntimeError: wellcond comes from"):
            ended.ask("describe")
        ended._process.kill()
        ended._process.wait()
        with pytest.raises(WorkerError, match="the process has ended"):
            ended.ask("describe")
    finally:
        ended.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "mnist"), "--case must be all, or names from critic-default,"),
        (
            ("--competitors", "watched,everything"),
            "--competitors must be names from plain,",
        ),
        (("--against", "/nowhere"), "--against must be a source tree of wellcond"),
    ],
)
def test_unknown_arguments_are_refused(
    arguments: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "limit", "--data", "digits", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_any_condition_number_is_a_case() -> None:
    assert find_case("square-k2.5").bound == 2.5
    assert find_case("mnist-k30").target.at_most is None
    assert str(find_case("square-k10").target) == (
        "excess ≤ 1.05; ≤ 0.8, goal 0.65 of the time of before-every=10"
    )
    assert str(find_case("square-k100").target) == "excess ≤ 1.05; no requirement on time"


def test_the_benchmark_uses_one_thread() -> None:
    assert bench_limit.Limit.threads == 1
