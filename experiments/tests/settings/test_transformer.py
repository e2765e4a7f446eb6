"""The transformer on images: the weights that rules by role select, and the tables."""

from pathlib import Path

import pytest

from wellcond.cli import main
from wellcond_experiments import grid
from wellcond_experiments.methods import METHODS, spectral_norms
from wellcond_experiments.settings.transformer import CASE, Transformer


@pytest.mark.parametrize(
    ("method", "limited"),
    [
        ("upper-limit-attention", {"attention"}),
        ("upper-limit-blocks", {"attention", "mlp"}),
        ("upper-limit", {"attention", "mlp", "embedding", "head"}),
    ],
)
def test_a_limit_by_role_selects_the_weights_of_this_role(method: str, limited: set[str]) -> None:
    setting = Transformer("digits", quick=True)
    training = METHODS[method](lambda norm: setting.build(CASE, norm), 0.1, 1e-3, seed=0)
    training.finish()
    norms = spectral_norms(training.model)
    for name, norm in norms.items():
        kind = next(k for k in ("attention", "mlp", "embedding", "head") if k in name)
        assert (norm <= 0.1 * (1 + 1e-5)) == (kind in limited), name


@pytest.mark.slow
def test_it_writes_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_settings", {})
    argv = ["reproduce", "transformer", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "SingularValueLimit, upper, of attention" in capsys.readouterr().out
    assert (tmp_path / "transformer.png").stat().st_size > 10_000
