"""A training that resumes from a file equals the uninterrupted one, bit for bit.

Saved by torch.save, by torch.distributed.checkpoint, and by a script that is killed.
"""

import copy
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_flatten_with_path

import wellcond as wc

WAYS = ["loss", "add_gradients", "attach"]
STEPS = 12


class Training(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    reg: wc.Regularizer
    way: str

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            x = torch.randn(6, 20, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            (loss + self.reg() if self.way == "loss" else loss).backward()
            if self.way == "add_gradients":
                self.reg.add_gradients()
            self.optimizer.step()
            self.schedule.step()

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "reg")}

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def start(way: str, tensor_lr: bool = False) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    penalties = {
        "0.*": wc.ConditionPenalty(lambda step: 2.0 + step),
        "2.*": wc.TikhonovPenalty(0.3),
    }
    reg = wc.Regularizer(model, penalties, block_size=4)
    if way == "attach":
        reg.attach(optimizer, every=5)
    return Training(model, optimizer, schedule, reg, way)


def assert_bitwise(one: Any, other: Any) -> None:
    """Equal structures, keys, shapes, types and bits."""
    leaves, structure = tree_flatten_with_path(one)
    others, other_structure = tree_flatten_with_path(other)
    assert structure == other_structure
    assert any(isinstance(leaf, Tensor) for _, leaf in leaves)
    for (path, leaf), (_, twin) in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            assert leaf.dtype == twin.dtype, path
            assert torch.equal(leaf, twin), path
        else:
            assert leaf == twin, path


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("at", [0, 1, 5, 8])
@pytest.mark.parametrize("way", WAYS)
def test_resume_from_torch_save_is_bitwise(
    way: str, at: int, tensor_lr: bool, tmp_path: Path
) -> None:
    """Before the first step, after it, at a proximal step, and with some pending."""
    whole = start(way, tensor_lr)
    whole.run(0, at)
    torch.save(whole.state(), tmp_path / "state.pt")
    whole.run(at, STEPS)
    resumed = start(way, tensor_lr)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.run(at, STEPS)
    assert_bitwise(resumed.state(), whole.state())
    assert int(whole.reg.state_dict()["0.weight"]["step"]) == STEPS
    assert not torch.equal(whole.model[0].weight, start(way).model[0].weight)


def test_loading_over_a_continued_training_is_bitwise(tmp_path: Path) -> None:
    """Like a loop that goes back to its last good state, and loads over newer state."""
    whole = start("attach")
    whole.run(0, 7)
    torch.save(whole.state(), tmp_path / "state.pt")
    ends = []
    for last in (STEPS, 9, STEPS):
        whole.run(7, last)
        ends.append(copy.deepcopy(whole.state()))
        whole.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_bitwise(ends[0], ends[2])


@pytest.mark.parametrize("at", [1, 8])
@pytest.mark.parametrize("way", WAYS)
def test_resume_from_a_distributed_checkpoint_is_bitwise(way: str, at: int, tmp_path: Path) -> None:
    """The regulariser is passed directly, because it is Stateful."""
    whole = start(way)
    assert isinstance(whole.reg, Stateful)
    whole.run(0, at)
    saved = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}
    dcp.save(saved | {"reg": whole.reg}, checkpoint_id=tmp_path / "checkpoint")
    schedule = whole.schedule.state_dict()
    whole.run(at, STEPS)

    resumed = start(way)
    resumed.run(0, 2)  # the state of the optimizer must exist to be loaded into
    parts = {"model": resumed.model.state_dict(), "optimizer": resumed.optimizer.state_dict()}
    dcp.load(parts | {"reg": resumed.reg}, checkpoint_id=tmp_path / "checkpoint")
    resumed.model.load_state_dict(parts["model"])
    resumed.optimizer.load_state_dict(parts["optimizer"])
    resumed.schedule.load_state_dict(schedule)
    resumed.run(at, STEPS)
    assert_bitwise(resumed.state(), whole.state())


@pytest.mark.parametrize("shape", [(16, 20), (30, 70), (70, 30)], ids=["16x20", "30x70", "70x30"])
def test_resume_is_bitwise_for_any_memory_layout(
    shape: tuple[int, int],
) -> None:
    """torch.save keeps strides; safetensors and torch.distributed.checkpoint do not."""
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False)
    weight = model.weight.detach().clone()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.3), block_size=5)
    for at in (7, 8):  # the next product is from the right, and from the left
        for _ in range(at):
            reg.add_gradients()
        state = reg.state_dict()
        ends = []
        for layout in (lambda x: x, Tensor.contiguous, lambda x: x.mT.contiguous().mT):
            reg.load_state_dict(
                {
                    n: {k: layout(v) if v.ndim > 1 else v for k, v in s.items()}
                    for n, s in state.items()
                }
            )
            model.weight.grad = None
            for _ in range(4):
                reg.add_gradients()
            ends.append({"grad": model.weight.grad.clone(), "reg": reg.state_dict()})
        assert_bitwise(ends[1], ends[0])
        assert_bitwise(ends[2], ends[0])
    assert torch.equal(model.weight, weight)


class Application:
    """As the tutorial of torch.distributed.checkpoint has it."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.training.model,
            self.training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


@pytest.mark.parametrize("way", WAYS)
def test_resume_with_torch_state_dict_helpers_is_bitwise(way: str, tmp_path: Path) -> None:
    """They step a new optimizer once, at learning rate 0, to make its state; an attached
    regulariser counts that step, and forgets it as its own state is loaded."""
    whole = start(way)
    whole.run(0, 8)
    dcp.save({"app": Application(whole), "reg": whole.reg}, checkpoint_id=tmp_path / "checkpoint")
    schedule = whole.schedule.state_dict()
    whole.run(8, STEPS)
    resumed = start(way)
    dcp.load(
        {"app": Application(resumed), "reg": resumed.reg}, checkpoint_id=tmp_path / "checkpoint"
    )
    resumed.schedule.load_state_dict(schedule)
    resumed.run(8, STEPS)
    assert_bitwise(resumed.state(), whole.state())


# --- killed ---------------------------------------------------------------------------------------

SCRIPT = '''
import io, os, sys, time
from pathlib import Path

import torch
import wellcond as wc

path, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
rules = {"0.*": wc.ConditionPenalty(2.0), "2.*": wc.ConditionPenalty(0.1)}
reg = wc.Regularizer(model, rules, block_size=4)
reg.attach(optimizer, every=7)
parts = {"model": model, "optimizer": optimizer, "reg": reg}


def save(step):
    """Slowly, so that there is time to be killed in; another name first, then all at once."""
    buffer = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, buffer)
    content = buffer.getvalue()
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as file:
        for start in range(0, len(content), 1 + len(content) // 20):
            file.write(content[start : start + 1 + len(content) // 20])
            file.flush()
            time.sleep(0.002)
        os.fsync(file.fileno())
    os.replace(temporary, path)


first = 0
if path.exists():
    state = torch.load(path, weights_only=True)
    first = state["step"]
    for name, part in parts.items():
        part.load_state_dict(state[name])
for step in range(first, steps):
    optimizer.zero_grad()
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    reg.add_gradients()
    optimizer.step()
    time.sleep(0.002)
    if (step + 1) % 10 == 0:
        save(step + 1)
'''


@contextmanager
def running(script: Path, path: Path, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    source = Path(wc.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(path), str(steps)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the script ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_killed_script_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 150
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    rng, during, between = random.Random(0), 0, 0
    killed = tmp_path / "killed.pt"
    part = killed.with_suffix(".part")
    reached = []
    while not (during and between):  # a busy machine may miss the moment
        when = "between" if during else "during"
        part.unlink(missing_ok=True)
        saved = killed.stat().st_mtime_ns if killed.exists() else 0
        with running(script, killed, steps) as process:
            # Some progress first, then the moment.
            wait_for(lambda s=saved: killed.exists() and killed.stat().st_mtime_ns > s, process)
            wait_for(lambda w=when: part.exists() == (w == "during"), process)
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        during += part.exists()
        between += not part.exists()
        reached.append(torch.load(killed, weights_only=True)["step"])
    with running(script, killed, steps) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    whole = tmp_path / "whole.pt"
    monkeypatch.setattr(sys, "argv", [str(script), str(whole), str(steps)])
    runpy.run_path(str(script))
    assert reached == sorted(set(reached))
    assert reached[0] > 0
    assert reached[-1] < steps
    one, other = (torch.load(file, weights_only=True) for file in (killed, whole))
    assert other["step"] == steps
    assert int(other["reg"]["0.weight"]["step"]) == 2 * steps  # both outcomes count
    assert int(other["reg"]["0.weight"]["pending_steps"]) == steps % 7
    assert_bitwise(one, other)


# --- states that do not fit -----------------------------------------------------------------------


def stack(matrices: int) -> nn.Module:
    return nn.Bilinear(6, 5, matrices, bias=False)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        pytest.param(
            lambda: (nn.Linear(9, 12), wc.ConditionPenalty(1.0)),
            lambda: (nn.Linear(9, 13), wc.ConditionPenalty(1.0)),
            id="more rows",
        ),
        pytest.param(
            lambda: (nn.Linear(9, 12), wc.ConditionPenalty(1.0)),
            lambda: (nn.Linear(12, 9), wc.ConditionPenalty(1.0)),
            id="transposed",
        ),
        pytest.param(
            lambda: (nn.Linear(9, 12), wc.ConditionPenalty(1.0)),
            lambda: (nn.Linear(9, 12), wc.TikhonovPenalty(1.0)),
            id="a penalty that needs no vectors",
        ),
        pytest.param(
            lambda: (stack(3), wc.ConditionPenalty(1.0)),
            lambda: (stack(4), wc.ConditionPenalty(1.0)),
            id="a longer stack",
        ),
    ],
)
def test_file_of_another_model_is_rejected_without_changes(
    own: Callable[[], tuple[nn.Module, Any]],
    other: Callable[[], tuple[nn.Module, Any]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    foreign = wc.Regularizer(*other(), block_size=4)
    torch.save(foreign.state_dict(), tmp_path / "reg.pt")
    model, penalty = own()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, penalty, block_size=4)
    attachment = reg.attach(optimizer, every=3)
    for _ in range(4):
        reg.add_gradients()
        optimizer.step()
    before = copy.deepcopy([reg.state_dict(), model.state_dict()])
    with pytest.raises(ValueError, match=r"`state.*must"):
        reg.load_state_dict(torch.load(tmp_path / "reg.pt", weights_only=True))
    assert_bitwise([reg.state_dict(), model.state_dict()], before)
    assert reg.attachments == [attachment]
    optimizer.step()
    (state,) = reg.state_dict().values()
    assert int(state["pending_steps"]) == 2
