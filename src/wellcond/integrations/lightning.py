"""Callbacks for Lightning: a `Regularizer` or a `Monitor` in `Trainer.fit`.

Works with `lightning`, and with `pytorch_lightning` where that alone is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel

import wellcond as wc
from wellcond.integrations._modes import Rules, checked_mode, has_modes, rules_in
from wellcond.integrations._watcher import Watcher

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
else:
    try:
        from lightning.pytorch import Callback
        from lightning.pytorch.strategies import DeepSpeedStrategy
    except ImportError:
        try:
            from pytorch_lightning import Callback
            from pytorch_lightning.strategies import DeepSpeedStrategy
        except ImportError:
            raise ImportError(
                "this callback needs Lightning: pip install 'wellcond[lightning]'."
            ) from None


class MonitorCallback(Watcher, Callback):
    """Watches the weights of a LightningModule while it is trained, and changes nothing.

    The loggers of the Trainer get a few aggregates and the worst five weights by name, see
    `Regularizer.log`.

    Args:
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`.
        block_size: how many leading singular vectors are followed.
        condition_numbers: measure kappa as well, which takes about an SVD per weight.
        layers: also the series of every weight.
        log_every: every so many steps of the optimizers.

    Attributes:
        monitor: the `Monitor`; None before training starts, kept when it ends.

    Raises:
        ValueError: when training starts: a pattern matches nothing, or DeepSpeed.

    Example:
        >>> from wellcond.integrations.lightning import MonitorCallback
        >>> callback = MonitorCallback(condition_numbers=True, log_every=500)
        >>> callback.monitor is None  # trainer = Trainer(callbacks=[callback]) comes next
        True
    """

    def __init__(
        self,
        patterns: Sequence[str] = ("*",),
        *,
        block_size: int = 8,
        condition_numbers: bool = False,
        layers: bool = False,
        log_every: int = 100,
    ) -> None:
        super().__init__(patterns, block_size, condition_numbers, layers)
        self.log_every = log_every
        self._seen_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_deepspeed(trainer)
        self._watch(pl_module)
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        # While gradients are accumulated a step lasts for several batches.
        if trainer.loggers and step != self._seen_step:
            self._seen_step = step
            self._measure(_to_all(trainer), step, every=self.log_every)


class RegularizerCallback(Callback):
    """Regularises the weights of a LightningModule while it is trained.

    Two ways:

    - "proximal": a proximal step after every few steps of the optimizers that hold a regularised
      weight, by `Regularizer.attach`. It comes after the optimizer's step: neither clipping nor
      the scaling of the loss touches it. Steps that a GradScaler skips do not count.
    - "gradients": `Regularizer.add_gradients` in `on_before_optimizer_step`, once per optimizer
      step: after the gradients are accumulated and unscaled, before they are clipped. What is
      clipped is the sum of both gradients.

    There is no third way for the penalty in the loss: `loss + reg()` belongs into `training_step`,
    with a `Regularizer` of your own. Lightning divides that loss by `accumulate_grad_batches`, so
    the penalty counts once over full cycles, and less in a short one at the end of an epoch.

    The weights are chosen when training starts, after the sanity check, under the names that the
    module gives them. What is frozen then stays without a penalty. Every `fit` starts afresh,
    unless it resumes: the state is in Lightning's checkpoints, and `fit(..., ckpt_path=...)` goes
    on bit for bit. Two callbacks may be used together if they differ in patterns or mode.

    Hard limits hold in what is validated and saved and at the end of training, whatever `every` is:
    they are applied before. An optimizer with eval(), as those of schedulefree, evaluates other
    weights than it steps, and Lightning calls neither eval() nor train(): under a limit the
    callback calls eval() before it applies the limits, and train() before the next batch. Limits
    are applied too to the averages that Lightning's WeightAveraging, EMAWeightAveraging and
    StochasticWeightAveraging keep, which are saved, and left in the module, in place of the weights
    that are trained.

    Args:
        rules: one penalty, or patterns to penalties, as for `Regularizer`.
        mode: "proximal" or "gradients".
        every: for "proximal": a step after every so many optimizer steps; by default 10 for
            penalties, and hard limits when they are due, as for `attach`.
        block_size: the width of the leading subspace, as for `Regularizer`.
        log_every: every so many steps the loggers of the Trainer get a few aggregates and the worst
            five weights by name, see `Regularizer.log`; 0 for never.

    Attributes:
        regularizer: the `Regularizer`; None before training starts, kept when it ends.

    Raises:
        TypeError: the rules are neither a rule nor a mapping.
        ValueError: another mode, or "gradients" for a limit or IsometryStep. When training
            starts: what `Regularizer` and `attach` refuse; no optimizer that holds a regularised
            weight; for "gradients" several of them, or a GradScaler with an optimizer that unscales
            for itself; DeepSpeed. When it resumes: a checkpoint without the state of this callback.

    Example:
        >>> import wellcond as wc
        >>> from wellcond.integrations.lightning import RegularizerCallback
        >>> callback = RegularizerCallback({"head.*": wc.ConditionPenalty(100)}, every=5)
        >>> callback.regularizer is None  # trainer = Trainer(callbacks=[callback]) comes next
        True
    """

    def __init__(
        self,
        rules: Rules,
        *,
        mode: str = "proximal",
        every: int | str | None = None,
        block_size: int = 32,
        log_every: int = 100,
    ) -> None:
        self.rules = rules
        self.mode = checked_mode(mode, rules)
        self.every = every
        self.block_size = block_size
        self.log_every = log_every
        self.regularizer: wc.Regularizer | None = None
        self._training = False
        self._seen_step = 0
        self._holders: list[Optimizer] = []
        self._of_averages: dict[nn.Module, wc.Regularizer] = {}
        self._evaluating = True  # whether train() is due before the next batch
        self._obeys = False  # whether limits were applied, and no batch has begun since
        # Lightning restores callbacks before there is a Regularizer.
        self._loaded: dict[str, Any] | None = None
        self._ignore_next = False

    @property
    def state_key(self) -> str:
        """Patterns and mode, not strengths: those may change when a training resumes."""
        patterns = list(self.rules) if isinstance(self.rules, Mapping) else ["*"]
        return self._generate_state_key(mode=self.mode, patterns=patterns)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end()
            self.regularizer = None

    # Not on_fit_start: learning rate finders run there, and DeepSpeed and FSDP restore after it.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_deepspeed(trainer)
        # Of DistributedDataParallel, whose processes share the work.
        group = getattr(trainer.model, "process_group", None)
        regularizer = wc.Regularizer(
            pl_module, self.rules, block_size=self.block_size, process_group=group
        )
        holders = _holders(regularizer, pl_module, trainer.optimizers)
        if not holders:
            raise ValueError(
                "`configure_optimizers` must return an optimizer that holds a regularised weight, "
                f"but none of its {len(trainer.optimizers)} holds any of "
                f"{', '.join(regularizer.names)}. Choose other weights with patterns."
            )
        if self.mode == "gradients":
            _refuse_gradients(trainer, holders)
        if self._loaded is not None:
            regularizer.load_state_dict(self._loaded)
            self._loaded = None
        # From here on on_exception detaches what is attached.
        self.regularizer = regularizer
        self._training = True
        self._seen_step = trainer.global_step
        self._holders = holders
        self._evaluating, self._obeys = True, False
        if self.mode == "proximal":
            for optimizer in holders:
                regularizer.attach(optimizer, every=self.every)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._obeys = False
        if self._evaluating:
            self._evaluating = False
            for optimizer in self._switched():
                optimizer.train()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Other optimizers step weights without a penalty.
        held = any(optimizer is holder for holder in self._holders)
        if self.mode == "gradients" and held and self.regularizer is not None:
            self.regularizer.add_gradients()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step, loggers = trainer.global_step, trainer.loggers
        # While gradients are accumulated a step lasts for several batches.
        if self.regularizer is None or step == self._seen_step:
            return
        self._seen_step = step
        if loggers and self.log_every:
            self.regularizer.log(_to_all(trainer), step, every=self.log_every)
        for saver in trainer.checkpoint_callbacks:
            # Before the states are collected; and callbacks are not told of weights alone.
            after = getattr(saver, "_every_n_train_steps", 0)
            if after and step % after == 0:
                self._enforce(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enforce(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is measured, and perhaps saved as the best, obeys.
        self._enforce(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module may have switched an optimizer to train mode.
        if self._switched():
            self._enforce(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The weights in the checkpoint share their memory with those of the module.
        self._enforce(trainer)
        # The states have been collected before, and applications and modes are part of them.
        if self._training and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = self.state_dict()
        if self._switched():
            states = [trainer.strategy.optimizer_state(one) for one in trainer.optimizers]
            checkpoint["optimizer_states"] = states

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._obeys = False  # an average may have taken the place of the weights
        self._enforce(trainer)
        self._end()

    def _enforce(self, trainer: Trainer) -> None:
        """Hard limits hold in whatever is validated and saved from here on."""
        if not self._training or self.regularizer is None:
            return
        switched = self._switched()
        for optimizer in switched:
            optimizer.eval()
        self._evaluating = bool(switched)
        if switched or not self._obeys:
            self.regularizer.enforce()
            self._obeys = True
        if self._has_limits():
            for average in _averages(trainer):
                if average not in self._of_averages:
                    self._of_averages[average] = wc.Regularizer(average, self.rules)
                self._of_averages[average].enforce()

    def _switched(self) -> list[Any]:
        """The optimizers with two modes whose limits are to hold in what eval() makes."""
        return list(filter(has_modes, self._holders)) if self._has_limits() else []

    def _has_limits(self) -> bool:
        return any(rule.enforceable for rule in rules_in(self.rules))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._training = False
        self._holders = []
        self._of_averages = {}
        if self.regularizer is not None:
            self.regularizer.detach()

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the Regularizer; never empty, as Lightning drops what is."""
        if self.regularizer is None:
            return {"regularizer": self._loaded}
        return {"regularizer": self.regularizer.state_dict()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks whether the state is there; Lightning hands it to `load_state_dict` next."""
        # Testing a checkpoint must not change what a later fit starts from.
        self._ignore_next = trainer.state.fn != "fit"
        saved = checkpoint.get("callbacks", {})
        if not self._ignore_next and self.state_key not in saved:
            raise ValueError(
                f'`ckpt_path` must hold the state of this callback, "{self.state_key}", but has '
                f"{list(saved)}. Resume with the patterns and the mode with which it was saved; to "
                "start the penalty now, load only the weights and call fit without ckpt_path."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._ignore_next:
            self._ignore_next = False
        elif self._training and self.regularizer is not None:
            self.regularizer.load_state_dict(state_dict["regularizer"])
        else:
            self._loaded = state_dict["regularizer"]


def _refuse_deepspeed(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "`strategy` must not be DeepSpeed, which steps copies of the weights that wellcond "
            "does not see. Train with another strategy."
        )


def _to_all(trainer: Trainer) -> Callable[[dict[str, float], int], None]:
    """Logs to every logger of the Trainer."""

    def log(values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    return log


def _holders(
    regularizer: wc.Regularizer, module: LightningModule, optimizers: list[Optimizer]
) -> list[Optimizer]:
    """The optimizers that step a regularised weight."""
    # A name is that of a parameter, or of a part of one after a colon.
    weights = {id(module.get_parameter(name.partition(":")[0])) for name in regularizer.names}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"])
    ]


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averages of the module that callbacks of Lightning keep; no public name leads there."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kept = [getattr(callback, "_average_model", None) for callback in callbacks]
    models = [one.module if isinstance(one, AveragedModel) else one for one in kept]
    return [model for model in models if isinstance(model, nn.Module)]


def _refuse_gradients(trainer: Trainer, holders: list[Optimizer]) -> None:
    """Where a penalty on the gradients would count more than once, or at the wrong scale."""
    if len(holders) > 1:
        raise ValueError(
            '`mode="gradients"` needs a single optimizer that holds regularised weights, but '
            f"{len(holders)} do, and each would add the penalty of all. "
            'Take mode="proximal", or one callback per optimizer with patterns for its weights.'
        )
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(holders[0], "_step_supports_amp_scaling", False):
        raise ValueError(
            '`mode="gradients"` must see unscaled gradients, but a fused '
            f"{type(holders[0]).__name__} unscales them within its step. "
            'Take mode="proximal", or an optimizer with fused=False.'
        )
