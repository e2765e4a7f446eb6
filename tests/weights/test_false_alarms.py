"""Fresh models of every kind have no non-finite tensors, in memory and as files."""

from pathlib import Path

import pytest
import torch
from architectures import TIMM, TRANSFORMERS

import wellcond as wc


@pytest.mark.frameworks
@pytest.mark.parametrize("name", [*TRANSFORMERS, *TIMM])
def test_fresh_model_has_no_nonfinite_tensors(name: str, tmp_path: Path) -> None:
    if name in TIMM:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, num_classes=7, **TIMM[name])
    else:
        transformers = pytest.importorskip("transformers")
        kind, options = TRANSFORMERS[name]
        made = getattr(transformers, kind)
        model = made(made.config_class(**options))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for what in (model, tmp_path / "model.pt"):
        assert wc.audit(what).not_finite == {}
