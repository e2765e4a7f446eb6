"""Several views of one parameter change together, and no view undoes the change of another."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from processes import run
from wellcond.operators import stored


class Experts(nn.Module):
    """Gate and up of each expert in one tensor, as in transformers: as blocks, or interleaved."""

    def __init__(self, is_concatenated: bool = True) -> None:
        super().__init__()
        self.is_concatenated = is_concatenated
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8, generator=generator).double())
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6, generator=generator).double())


def limited(is_concatenated: bool = True) -> Tensor:
    model = Experts(is_concatenated)
    wc.Regularizer(model, wc.ConditionLimit(1.7)).enforce()
    return model.gate_up_proj.detach()


def sharded_experts() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for dim, is_concatenated in product(range(3), (True, False)):
        model = Experts(is_concatenated)
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(model, name).detach()
            shards = distribute_tensor(parameter, mesh, [Shard(dim)])
            setattr(model, name, nn.Parameter(shards))
        wc.Regularizer(model, wc.ConditionLimit(1.7)).enforce()
        found = model.gate_up_proj.full_tensor().detach()  # type: ignore[operator]
        torch.testing.assert_close(found, limited(is_concatenated), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_gate_and_up_both_limited(tmp_path: Path) -> None:
    run(2, tmp_path, sharded_experts)


def test_views_written_back_separately_without_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "_NARROW_DEVICES", {"cpu"})
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # like a copy from another device
    for half in limited().chunk(2, dim=1):
        assert float(wc.condition_number(half).max()) <= 1.7
    found = limited(is_concatenated=False)
    for start in range(2):
        assert float(wc.condition_number(found[:, start::2]).max()) <= 1.7
