"""Limits on usual architectures cause no warning about masks, zeros or quantisation."""

import logging

import pytest
import torch

import wellcond as wc

pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import of_transformers

pytestmark = pytest.mark.frameworks


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Bloom", "Mixtral", "BERT", "T5", "BART"])
def test_no_warning_for_limit_on_usual_architecture(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = of_transformers(name)
    reg = wc.Regularizer(model, wc.ConditionLimit(1e6))
    with caplog.at_level(logging.WARNING, "wellcond"):
        reg.attach(torch.optim.SGD(model.parameters(), 1e-3))
        reg.enforce()
        wc.enforce(model, wc.ConditionLimit(1e6))
    assert [record for record in caplog.records if record.name == "wellcond"] == []
