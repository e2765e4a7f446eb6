"""In the checkpoint of a training run, only weights are repaired; other state is unchanged."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.reasons import Reason, Skipped


def trained() -> tuple[nn.Module, torch.optim.Optimizer, wc.Regularizer]:
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    optimizer = torch.optim.Adam(model.parameters())
    regularizer = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    (model(torch.ones(1, 6)).sum() + regularizer()).backward()
    optimizer.step()
    return model, optimizer, regularizer


def test_directory_of_a_trainer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    model, optimizer, regularizer = trained()
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 5, "base_lrs": [0.1]}, folder / "scheduler.pt")
    torch.save({"run": 1, "regularizer": regularizer.state_dict()}, folder / "wellcond.pt")
    torch.save({"arguments": Path("x")}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")
    report = wc.audit(folder)
    assert [(finding.name, finding.measured) for finding in report.findings] == [("weight", True)]
    skipped = report.coverage.skipped
    assert skipped["scheduler.pt"] == Skipped(Reason.no_tensors)
    assert skipped["wellcond.pt/regularizer.weight"] == Skipped(Reason.regularizer)
    assert skipped["training_args.bin"] == Skipped(Reason.no_tensors)
    wc.repair(folder, tmp_path / "fixed", 2.0)
    for path in folder.iterdir():
        same = path.read_bytes() == (tmp_path / "fixed" / path.name).read_bytes()
        assert same == (path.name != "model.safetensors")
    assert wc.audit(tmp_path / "fixed").findings[0].condition_number <= 2.0


def test_lightning_checkpoint(tmp_path: Path) -> None:
    model, optimizer, regularizer = trained()
    content = {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "callbacks": {
            "RegularizerCallback{}": {"regularizer": regularizer.state_dict()},
            "Averaging": {"average": torch.eye(3)},
        },
        "loops": {"state": torch.eye(3)},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
    }
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    checkpoint = Checkpoint(path)
    assert [one.name for one in checkpoint.matrices()] == ["state_dict.weight"]
    assert checkpoint.skipped() == {
        "state_dict.bias": Skipped(Reason.vector),
        "callbacks": Skipped(Reason.trainer),
        "loops": Skipped(Reason.trainer),
        "optimizer_states.0": Skipped(Reason.optimizer),
    }
    wc.repair(path, tmp_path / "fixed.ckpt", 2.0)
    after = torch.load(tmp_path / "fixed.ckpt")
    assert torch.equal(after["callbacks"]["Averaging"]["average"], torch.eye(3))


def test_regularizer_state_next_to_weights(tmp_path: Path) -> None:
    model, _, regularizer = trained()
    content = {"model": model.state_dict(), "regularizer": regularizer.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert [finding.name for finding in wc.audit(tmp_path / "a.pt").findings] == ["model.weight"]


def test_shards_without_weights_are_copied(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"w": torch.diag(torch.tensor([1.0, 1e-3]))}, folder / "a.safetensors")
    save_file({"bias": torch.ones(3)}, folder / "b.safetensors")
    index = folder / "x.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "a.safetensors", "bias": "b.safetensors"}}')
    wc.repair(index, tmp_path / "out", 2.0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        index.name,
        "a.safetensors",
        "b.safetensors",
    }
