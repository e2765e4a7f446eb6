"""The callbacks for Lightning: a fit equals a plain loop and resumes bit for bit.

The tests run Lightning's Trainer on small images on the CPU.
"""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_hand import (
    BATCH,
    BLOCK,
    EVERY,
    PENALTIES,
    RELATIVES,
    assert_same,
    cross_entropy,
    images,
    net,
    optimizer_of,
    scheduler_of,
    train_by_hand,
    train_in_two_processes,
)
from torch import Tensor, nn

import wellcond as wc
from foreign import ScheduleFree, Swapping

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from lightning.pytorch import callbacks as lightning_callbacks  # noqa: E402
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DeepSpeedStrategy  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from wellcond.integrations.lightning import MonitorCallback, RegularizerCallback  # noqa: E402

# Lightning's advice for larger jobs, and functions that it uses and torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]

WAYS = ["proximal", "gradients"]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.lr = 1e-2
        self.fail_at = -1

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == self.fail_at:
            raise RuntimeError("on purpose")
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self)
        return [optimizer], [{"scheduler": scheduler_of(optimizer), "interval": "step"}]


class Validated(Module):
    def validation_step(self, batch: Any, index: int) -> None:
        assert not self.net.training


class TwoOptimizers(Module):
    """One optimizer per weight, for which Lightning requires manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), 0.1) for index in (0, 2)]

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def loader(count: int = 96) -> Any:
    return DataLoader(TensorDataset(*images(count)), BATCH)


def trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{"devices": 1, "max_epochs": 2, **quiet, **options},
    )


def callback(way: str) -> RegularizerCallback:
    return RegularizerCallback(PENALTIES[way], mode=way, every=EVERY, block_size=BLOCK)


# --- a fit equals the plain loop ------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 0.2], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])  # with 4 of 6 batches the last cycle is short
@pytest.mark.parametrize("way", WAYS)
def test_fit_equals_plain_loop(
    tmp_path: Path, way: str, accumulate: int, clip: float, bf16: bool
) -> None:
    """In mode "gradients", the penalty is added before the gradients are clipped."""
    module, added = Module(), callback(way)
    trainer(
        tmp_path,
        added,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision="bf16-mixed" if bf16 else "32-true",
    ).fit(module, loader(48))
    expected = Module()
    reg = train_by_hand(
        expected.net,
        way,
        count=48,
        accumulate=accumulate,
        clip=clip,
        penalty_is_clipped=True,
        bf16=bf16,
        named=expected,
    )
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(added.regularizer.state_dict(), reg.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_fit_with_other_rules_equals_plain_loop(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PENALTIES, way, RELATIVES[way])
    test_fit_equals_plain_loop(tmp_path, way, 1, 0.0, False)


@pytest.mark.parametrize("way", WAYS)
def test_penalty_and_its_order_with_clipping_change_weights(way: str) -> None:
    """Otherwise the comparisons above would be meaningless."""
    results = []
    for penalty_is_clipped, given in ((True, way), (False, way), (True, None)):
        model = net()
        train_by_hand(model, given, clip=0.2, penalty_is_clipped=penalty_is_clipped)
        results.append(model[0].weight.detach())
    clipped, unclipped, without = results
    assert (clipped - without).abs().max() > 1e-3
    assert torch.equal(clipped, unclipped) == (way == "proximal")


@pytest.mark.parametrize("way", WAYS)
def test_validation_and_sanity_check_change_nothing(tmp_path: Path, way: str) -> None:
    module, added = Validated(), callback(way)
    trainer(tmp_path, added, num_sanity_val_steps=2).fit(module, loader(), loader(16))
    expected = Module()
    train_by_hand(expected.net, way, named=expected)
    assert_same(module.state_dict(), expected.state_dict())


def in_float16(scale: float) -> MixedPrecision:
    """Mixed precision in float16, which Lightning does not choose on a CPU, although it works."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_scaler_does_not_scale_the_penalty(tmp_path: Path, way: str) -> None:
    """Steps that the scaler skips do not count; at this scale it skips some."""
    scale = 2.0**24
    module, added = Module(), callback(way)
    used = trainer(tmp_path, added, plugins=[in_float16(scale)], gradient_clip_val=0.2)
    used.fit(module, loader())
    expected = Module()
    optimizer = optimizer_of(expected)
    scheduler = scheduler_of(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    reg = wc.Regularizer(expected, PENALTIES[way], block_size=BLOCK)
    if way == "proximal":
        reg.attach(optimizer, every=EVERY)
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(expected.net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if way == "gradients":
                reg.add_gradients()
            nn.utils.clip_grad_norm_(expected.parameters(), 0.2)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(added.regularizer.state_dict(), reg.state_dict())
    if way == "proximal":
        assert 0 < added.regularizer.measure()["net.0.weight"].step < 24


def train_two_by_hand(module: TwoOptimizers, attached: bool) -> None:
    optimizers = module.configure_optimizers()
    way = "proximal" if attached else "gradients"
    reg = wc.Regularizer(module, PENALTIES[way], block_size=BLOCK)
    if attached:
        for optimizer in optimizers:
            reg.attach(optimizer, every=EVERY)
    for x, y in loader():
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(module.net, x, y, bf16=False).backward()
        if not attached:
            reg.add_gradients()
        for optimizer in optimizers:
            optimizer.step()


def test_proximal_steps_follow_every_optimizer_with_a_regularised_weight(tmp_path: Path) -> None:
    module, added = TwoOptimizers(), callback("proximal")
    trainer(tmp_path, added, max_epochs=1).fit(module, loader())
    expected = TwoOptimizers()
    train_two_by_hand(expected, attached=True)
    assert_same(module.state_dict(), expected.state_dict())


def test_gradients_with_several_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a single optimizer.*but there are 2"):
        trainer(tmp_path, callback("gradients")).fit(TwoOptimizers(), loader())


def test_one_callback_per_optimizer_adds_to_the_gradients_of_each(tmp_path: Path) -> None:
    module = TwoOptimizers()
    callbacks = [
        RegularizerCallback({pattern: penalty, "*": None}, mode="gradients", block_size=BLOCK)
        for pattern, penalty in PENALTIES["gradients"].items()
    ]
    assert callbacks[0].state_key != callbacks[1].state_key
    trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader())
    expected = TwoOptimizers()
    train_two_by_hand(expected, attached=False)
    assert_same(module.state_dict(), expected.state_dict())


class Finder(LearningRateFinder):
    """Searches during training, as Lightning's documentation proposes, and changes nothing."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=4, update_attr=False)

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_step == 12:
            self.lr_find(trainer, pl_module)


class Count(Callback):  # type: ignore[misc]
    """Counts training batches, except those of a finder, which calls no callbacks."""

    trained = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.trained += 1


def test_learning_rate_finder_during_training_is_undone(tmp_path: Path) -> None:
    """The finder steps the attached optimizer, then restores the checkpoint that it has written."""
    module, added, finder = Module(), callback("proximal"), Finder()
    trainer(tmp_path, added, finder, max_epochs=3).fit(module, loader())
    assert finder.optimal_lr.results["lr"]  # the finder has trained
    expected = Module()
    reg = train_by_hand(expected.net, "proximal", epochs=3, named=expected)
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(added.regularizer.state_dict(), reg.state_dict())


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_learning_rate_finder_before_training_changes_nothing(tmp_path: Path, first: bool) -> None:
    """The finder trains and restores within on_fit_start, in either order of the callbacks."""
    finder, added, batches = LearningRateFinder(num_training_steps=4), callback("proximal"), Count()
    callbacks = [added, finder] if first else [finder, added]
    module = Module()
    trainer(tmp_path, *callbacks, batches, max_epochs=1).fit(module, loader())
    assert batches.trained in (12, 8)  # the finder of Lightning 2.4 consumes four of them
    assert added.regularizer.measure()["net.0.weight"].step == batches.trained


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    """With DistributedDataParallel, in both modes. The names have no prefix."""
    written = train_in_two_processes("lightning", tmp_path)
    assert written.count("['net.0.weight', 'net.2.weight']") == 4


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_resumed_fit_equals_uninterrupted_fit(tmp_path: Path, way: str) -> None:
    """Twelve batches in cycles of two give six steps. With every=4, two of them are pending."""

    def make() -> RegularizerCallback:
        return RegularizerCallback(PENALTIES[way], mode=way, every=4, block_size=BLOCK)

    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    whole, added = Module(), make()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, added, keep, **options).fit(whole, loader())
    module, resumed = Module(), make()
    trainer(tmp_path, resumed, **options).fit(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(module.state_dict(), whole.state_dict())
    assert_same(resumed.regularizer.state_dict(), added.regularizer.state_dict())
    assert resumed.regularizer.measure()["net.0.weight"].step == 18


def test_checkpoint_of_finished_fit_resumes(tmp_path: Path) -> None:
    """The checkpoint also contains the state of a detached regulariser."""
    whole, added = Module(), callback("proximal")
    trainer(tmp_path, added, max_epochs=2).fit(whole, loader(80))
    module, first = Module(), callback("proximal")
    short = trainer(tmp_path, first, max_epochs=1)
    short.fit(module, loader(80))
    short.save_checkpoint(tmp_path / "one.ckpt")
    # This fit has no epochs left, and keeps the state.
    idle = trainer(tmp_path, callback("proximal"), max_epochs=1)
    idle.fit(Module(), loader(80), ckpt_path=tmp_path / "one.ckpt")
    idle.save_checkpoint(tmp_path / "again.ckpt")
    second, resumed = Module(), callback("proximal")
    trainer(tmp_path, resumed, max_epochs=2).fit(
        second, loader(80), ckpt_path=tmp_path / "again.ckpt"
    )
    assert_same(second.state_dict(), whole.state_dict())
    assert_same(resumed.regularizer.state_dict(), added.regularizer.state_dict())


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(Module(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="`ckpt_path` must contain the state of this callback"):
        trainer(tmp_path, callback("proximal")).fit(
            Module(), loader(), ckpt_path=tmp_path / "plain.ckpt"
        )
    # Validation does not need the state.
    trainer(tmp_path, callback("proximal")).validate(
        Validated(), loader(), ckpt_path=tmp_path / "plain.ckpt"
    )


def test_state_that_does_not_fit_leaves_nothing_attached(tmp_path: Path) -> None:
    first = trainer(tmp_path, callback("proximal"), max_epochs=1)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    wider = RegularizerCallback(PENALTIES["proximal"], every=EVERY, block_size=BLOCK + 1)
    optimizers = Optimizers()
    with pytest.raises(ValueError, match="with the model, the rules and the block_size with which"):
        trainer(tmp_path, optimizers, wider).fit(
            Module(), loader(), ckpt_path=tmp_path / "one.ckpt"
        )
    assert not optimizers.seen[0]._optimizer_step_post_hooks


def test_validating_a_checkpoint_does_not_affect_next_fit(tmp_path: Path) -> None:
    first = trainer(tmp_path, callback("proximal"), max_epochs=1)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    added = callback("proximal")
    trainer(tmp_path, added).validate(Validated(), loader(), ckpt_path=tmp_path / "one.ckpt")
    module = Module()
    trainer(tmp_path, added, max_epochs=1).fit(module, loader())
    assert added.regularizer.measure()["net.0.weight"].step == 12


def test_strengths_may_change_when_a_training_resumes() -> None:
    weak = RegularizerCallback({"net.0.*": wc.ConditionPenalty(1.0), "*": None})
    strong = RegularizerCallback({"net.0.*": wc.ConditionPenalty(10.0), "*": None})
    assert weak.state_key == strong.state_key


# --- state after a fit ----------------------------------------------------------------------------


class Optimizers(Callback):
    """Keeps the optimizers, which the Trainer drops at the end."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = list(trainer.optimizers)


@pytest.mark.parametrize("way", WAYS)
def test_second_fit_starts_with_new_state(tmp_path: Path, way: str) -> None:
    added, optimizers = callback(way), Optimizers()
    for _ in range(2):
        module = Module()
        trainer(tmp_path, optimizers, added).fit(module, loader())
        assert added.regularizer.attachments == []
        assert not optimizers.seen[0]._optimizer_step_post_hooks
        expected = Module()
        reg = train_by_hand(expected.net, way, named=expected)
        assert_same(module.state_dict(), expected.state_dict())
        assert_same(added.regularizer.state_dict(), reg.state_dict())


def test_second_fit_of_same_module_and_trainer(tmp_path: Path) -> None:
    module, added = Module(), callback("proximal")
    again = trainer(tmp_path, added, max_epochs=1)
    again.fit(module, loader())
    again.fit_loop.max_epochs = 2
    again.fit(module, loader())
    assert added.regularizer.measure()["net.0.weight"].step == 12


def test_exception_detaches(tmp_path: Path) -> None:
    module, added, optimizers = Module(), callback("proximal"), Optimizers()
    module.fail_at = 5
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, optimizers, added).fit(module, loader())
    assert added.regularizer.measure()["net.0.weight"].step == 5
    assert added.regularizer.attachments == []
    assert not optimizers.seen[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("way", WAYS)
def test_only_weights_change(tmp_path: Path, way: str) -> None:
    """Keys, modes, hooks and random numbers equal those of a fit without the callback."""
    seen = []
    for callbacks in ([], [callback(way)]):
        module = Module()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trainer(tmp_path, *callbacks, max_epochs=1).fit(module, loader())
            state = torch.get_rng_state()
        hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
        modes = [m.training for m in module.modules()]
        seen.append((list(module.state_dict()), modes, hooks, state.tolist()))
    assert seen[0] == seen[1]
    assert list(tmp_path.iterdir()) == []


# --- errors ---------------------------------------------------------------------------------------


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r'`mode` must be "proximal" or "gradients", got \'loss\''):
        RegularizerCallback(wc.ConditionPenalty(1.0), mode="loss")
    for limit in (
        wc.ConditionLimit(10),
        {"*weight": wc.ConditionPenalty(1.0), "*": wc.IsometryStep()},
    ):
        with pytest.raises(ValueError, match=r'`mode` must be "proximal" for .*no gradient'):
            RegularizerCallback(limit, mode="gradients")


def test_lightning_refuses_two_callbacks_with_equal_patterns_and_mode(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Found more than one stateful callback"):
        trainer(tmp_path, callback("proximal"), callback("proximal"))


def test_error_of_regularizer_stops_fit(tmp_path: Path) -> None:
    added = RegularizerCallback({"head.*": wc.ConditionPenalty(1.0), "*": None})
    with pytest.raises(ValueError, match=r'the pattern "head\.\*" matches no parameter'):
        trainer(tmp_path, added).fit(Module(), loader())


def test_an_optimizer_without_a_regularised_weight_is_refused(tmp_path: Path) -> None:
    class Biases(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net[0].bias], 0.1)

    for way in WAYS:
        with pytest.raises(ValueError, match=r"none of its 1 optimizers has any of net\.0\.weight"):
            trainer(tmp_path, callback(way)).fit(Biases(), loader())


def test_mode_gradients_refuses_fused_optimizer_with_scaler(tmp_path: Path) -> None:
    class Fused(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    plugins = [in_float16(2.0**10)]
    with pytest.raises(ValueError, match="a fused AdamW unscales them within its step"):
        trainer(tmp_path, callback("gradients"), plugins=plugins).fit(Fused(), loader())
    added = callback("proximal")
    trainer(tmp_path, added, max_epochs=1, plugins=plugins).fit(Fused(), loader())
    assert added.regularizer.measure()["net.0.weight"].step == 12


def test_deepspeed_is_refused() -> None:
    fake: Any = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match="`strategy` must not be DeepSpeed"):
        callback("proximal").on_train_start(fake, Module())


# --- imports --------------------------------------------------------------------------------------

WITHOUT = """
import sys, types
sys.modules["lightning"] = sys.modules["lightning.pytorch"] = None
for name in ("pytorch_lightning", "pytorch_lightning.strategies"):
    sys.modules[name] = types.ModuleType(name) if {old} else None
    if {old}:
        sys.modules[name].Callback = sys.modules[name].DeepSpeedStrategy = type(name, (), {{}})
try:
    from wellcond.integrations.lightning import RegularizerCallback
    print(RegularizerCallback.__base__.__name__)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("old", [True, False], ids=["pytorch_lightning", "neither"])
def test_import_falls_back_to_pytorch_lightning(old: bool) -> None:
    code = [sys.executable, "-c", WITHOUT.format(old=old)]
    out = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    assert ("pytorch_lightning" if old else "pip install 'wellcond[lightning]'") in out


# --- hard limits, logs ----------------------------------------------------------------------------


def kappas(state: dict[str, Tensor]) -> list[float]:
    found = [float(wc.condition_number(w)) for name, w in state.items() if name.endswith("weight")]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "weights alone"])
@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 5}, {"every_n_epochs": 1}], ids=["steps", "epochs"]
)
def test_hard_limits_hold_in_every_checkpoint_and_at_the_end(
    when: dict[str, int], alone: bool, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_weights_only=alone, **when)
    module = Validated()
    added = RegularizerCallback(wc.ConditionLimit(3.0), every=10**6)
    trainer(tmp_path, added, saver).fit(module, loader(), loader(16))
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) >= 2
    for path in saved:
        assert max(kappas(torch.load(path, weights_only=True)["state_dict"])) <= 3.0, path.name
    assert max(kappas(module.state_dict())) <= 3.0


def test_loggers_receive_aggregates_and_worst_weights(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logged: list[tuple[int, dict[str, float]]] = []

    class Recorder(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("wellcond/") for name in metrics):
                assert step is not None
                logged.append((step, metrics))

    added = RegularizerCallback(PENALTIES["proximal"], every=EVERY, block_size=BLOCK, log_every=4)
    options = {"logger": Recorder(tmp_path), "accumulate_grad_batches": 2, "max_epochs": 2}
    trainer(tmp_path, added, **options).fit(Module(), loader())
    assert [step for step, _ in logged] == [4, 8, 12]
    for _, values in logged:
        assert values["wellcond/sigma_max/largest"] > 0
        assert "wellcond/worst/net.0.weight/stable_rank_share" in values


def test_monitor_logs_and_changes_nothing(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    added = MonitorCallback("*.weight", condition_numbers=True, log_every=4)
    modules = [Module(), Module()]
    modules[1].load_state_dict(modules[0].state_dict())
    options: dict[str, Any] = {"max_epochs": 2}
    trainer(tmp_path, **options).fit(modules[0], loader())
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, added, logger=logger, **options).fit(modules[1], loader())
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, other)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    logged = events.Scalars("wellcond/condition_number/largest")
    assert [one.step for one in logged] == list(range(4, 25, 4))
    assert logged[-1].value == pytest.approx(max(kappas(modules[1].state_dict())), rel=1e-4)


class Evaluated(Validated):
    """A module that does not switch the modes of its optimizer."""

    def __init__(self, kind: Any = ScheduleFree) -> None:
        super().__init__()
        self.kind, self.seen = kind, []

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.1)

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen += [float(wc.condition_number(self.net[i].weight.detach())) for i in (0, 2)]


class Switching(Evaluated):
    """A module that switches the modes of its optimizer, and back before checkpoints are saved."""

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()

    def on_validation_epoch_end(self) -> None:
        self.optimizers().optimizer.train()


def real(name: str) -> Any:
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    return getattr(schedulefree, name)


MODES = [
    pytest.param(lambda: ScheduleFree, id="ScheduleFree"),
    pytest.param(lambda: Swapping, id="Swapping"),
    *(
        pytest.param(functools.partial(real, f"{name}ScheduleFree"), id=name, marks=mark)
        for name, mark in (("AdamW", ()), ("SGD", pytest.mark.slow), ("RAdam", pytest.mark.slow))
    ),
]


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "weights alone"])
@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 5}, {"every_n_epochs": 1}], ids=["steps", "epochs"]
)
@pytest.mark.parametrize("module", [Evaluated, Switching])
@pytest.mark.parametrize("kind", MODES)
def test_limits_hold_for_weights_in_eval_mode_of_optimizer(
    kind: Any,
    module: type[Evaluated],
    when: dict[str, int],
    alone: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = module(kind())
    added = RegularizerCallback(wc.ConditionLimit(3.0), every=10**6)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_weights_only=alone, **when)
    used = trainer(tmp_path, added, saver, num_sanity_val_steps=0)
    used.fit(trained, loader(), loader(32))
    assert len(trained.seen) == 2 * 2 * len(loader(32))
    assert max(trained.seen) <= 3.0
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=False)
        assert max(kappas(saved["state_dict"])) <= 3.0, path.name
        if not alone:
            (state,) = saved["optimizer_states"]
            assert not state["param_groups"][0]["train_mode"]
    assert max(kappas(trained.state_dict())) <= 3.0
    assert "train mode" not in caplog.text


@pytest.mark.parametrize("kind", MODES)
def test_fit_with_two_mode_optimizer_resumes(kind: Any, tmp_path: Path) -> None:
    """Training that was saved in eval mode resumes in train mode, bit for bit."""

    def fit(folder: str, epochs: int, **options: Any) -> dict[str, Tensor]:
        module = Evaluated(kind())
        saver = ModelCheckpoint(tmp_path / folder, save_top_k=-1, every_n_epochs=1)
        added = RegularizerCallback(wc.ConditionLimit(3.0))
        trainer(tmp_path, added, saver, max_epochs=epochs).fit(module, loader(), **options)
        return module.state_dict()

    whole = fit("whole", 2)
    fit("half", 1)
    (half,) = (tmp_path / "half").glob("*.ckpt")
    resumed = fit("resumed", 2, ckpt_path=half, weights_only=False)
    assert_same(whole, resumed)


def test_penalties_do_not_switch_modes_of_optimizer(tmp_path: Path) -> None:
    module = Switching(ScheduleFree)
    added = RegularizerCallback(wc.ConditionPenalty(1.0), every=EVERY)
    seen = []

    class Modes(Callback):  # type: ignore[misc]
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["train_mode"])

    trainer(tmp_path, added, Modes(), num_sanity_val_steps=0).fit(module, loader(), loader(16))
    assert seen == [True, True]


def averaging(name: str) -> Any:
    kind = getattr(lightning_callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    if name == "StochasticWeightAveraging":
        return kind(swa_lrs=0.5, swa_epoch_start=1, annealing_epochs=1)
    return kind() if name == "WeightAveraging" else kind(decay=0.95)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "name",
    [
        "EMAWeightAveraging",
        pytest.param("WeightAveraging", marks=pytest.mark.slow),
        pytest.param("StochasticWeightAveraging", marks=pytest.mark.slow),
    ],
)
def test_limits_hold_for_averages_of_lightning(name: str, first: bool, tmp_path: Path) -> None:
    """All trained weights satisfy the limit, but without the callback their average exceeds it."""

    class Fast(Evaluated):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=2.0)

    def fit(limited: bool) -> tuple[Fast, list[float]]:
        folder = tmp_path / str(limited)
        module = Fast()
        added = RegularizerCallback(wc.ConditionLimit(1.2), every=1)
        average = averaging(name)
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1)
        attached = [added] if limited else [ByHand(1.2)]
        both = [*attached, average] if first else [average, *attached]
        options = {"max_epochs": 4, "num_sanity_val_steps": 0}
        trainer(tmp_path, *both, saver, **options).fit(module, loader(), loader(16))
        saved = [torch.load(p, weights_only=False) for p in sorted(folder.glob("*.ckpt"))]
        assert len(saved) == 4
        return module, [max(kappas(one["state_dict"])) for one in saved]

    class ByHand(Callback):  # type: ignore[misc]
        """Applies the same limit only to the trained weights."""

        def __init__(self, limit: float) -> None:
            self.limit = limit

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.reg = wc.Regularizer(pl_module, wc.ConditionLimit(self.limit))
            self.reg.attach(trainer.optimizers[0], every=1)

    loose, _ = fit(limited=False)
    assert max(kappas(loose.state_dict())) > 1.2
    module, saved = fit(limited=True)
    assert max(module.seen) <= 1.2
    assert max(kappas(module.state_dict())) <= 1.2
    assert max(saved) <= 1.2


def test_invalid_rules_are_refused_in_constructor() -> None:
    for nothing in (None, 10, "*"):
        with pytest.raises(TypeError, match=r"`rules` must be a rule or map.*MonitorCallback"):
            RegularizerCallback(nothing)  # type: ignore[arg-type]
