"""Callbacks for Lightning: a `Regularizer` or a `Monitor` in `Trainer.fit`.

Works with `lightning`, and with `pytorch_lightning` if only that is installed.
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
    """Monitors the weights of a LightningModule during training, without changing them.

    The loggers of the Trainer receive a few aggregates and the values of the worst five weights;
    see `Regularizer.log`.

    Args:
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`.
        block_size: the number of leading singular vectors to track per weight.
        condition_numbers: also measure condition numbers, at the cost of about one SVD per weight.
        layers: also log one series per weight.
        log_every: the number of optimizer steps between two measurements.

    Attributes:
        monitor: the `Monitor`. It is None before training starts and is kept after training ends.

    Raises:
        ValueError: when training starts, if a pattern matches nothing or the strategy is
            DeepSpeed.

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
        # With gradient accumulation, one step spans several batches.
        if trainer.loggers and step != self._seen_step:
            self._seen_step = step
            self._measure(_to_all(trainer), step, every=self.log_every)


class RegularizerCallback(Callback):
    """Regularises the weights of a LightningModule during training.

    There are two modes:

    - "proximal" attaches a `Regularizer` to every optimizer that has a regularised weight; see
      `Regularizer.attach`. It takes a proximal step after every few optimizer steps. Because the
      proximal step follows the optimizer step, gradient clipping and loss scaling do not affect it.
      Steps that a GradScaler skips do not count.
    - "gradients" calls `Regularizer.add_gradients` in `on_before_optimizer_step`, once per
      optimizer step. At that point the gradients are accumulated and unscaled, but not yet clipped.
      Clipping therefore acts on the sum of both gradients.

    For a penalty in the loss, create a `Regularizer` and return `loss + reg()` from
    `training_step`. Lightning divides this loss by `accumulate_grad_batches`, so the penalty counts
    once per full accumulation cycle, and less in a shorter cycle at the end of an epoch.

    The callback selects the weights when training starts, after the sanity check, by their names in
    the module. It does not regularise weights that are frozen at that time. Every `fit` starts with
    a new state unless it resumes: the state is part of Lightning's checkpoints, and
    `fit(..., ckpt_path=...)` continues bit for bit. A Trainer can have two of these callbacks if
    they differ in patterns or mode.

    For any value of `every`, the callback applies hard limits before validation, before a
    checkpoint is saved, and at the end of training. An optimizer with an `eval()` method, such as
    those of schedulefree, evaluates other weights than it steps, and Lightning calls neither
    `eval()` nor `train()`. Under a hard limit the callback calls `eval()` before it applies the
    limit, and `train()` before the next batch. It also applies the limits to the averages of
    Lightning's WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging. These averages
    replace the trained weights in checkpoints and, at the end, in the module.

    Args:
        rules: a rule, or a mapping of patterns to rules, as for `Regularizer`.
        mode: "proximal" or "gradients".
        every: the number of optimizer steps between two proximal steps, for mode "proximal". By
            default 10 for penalties; hard limits are applied when due, as for `attach`.
        block_size: the width of the leading subspace, as for `Regularizer`.
        log_every: the number of steps after which the loggers of the Trainer receive a few
            aggregates and the values of the worst five weights; see `Regularizer.log`. 0 disables
            logging.

    Attributes:
        regularizer: the `Regularizer`. It is None before training starts and is kept after training
            ends.

    Raises:
        TypeError: `rules` is neither a rule nor a mapping.
        ValueError: if the mode is unknown, or is "gradients" for a limit or IsometryStep. When
            training starts, if `Regularizer` or `attach` raises it, if no optimizer has a
            regularised weight, or if the strategy is DeepSpeed; in mode "gradients" also if several
            optimizers have regularised weights, or if a GradScaler is used with an optimizer that
            unscales the gradients itself. When training resumes, if the checkpoint does not contain
            the state of this callback.

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
        self._obeys = False  # whether limits were applied and no batch has started since
        # Lightning restores callbacks before the Regularizer exists.
        self._loaded: dict[str, Any] | None = None
        self._ignore_next = False

    @property
    def state_key(self) -> str:
        """Contains patterns and mode, not strengths: a resumed training can use other strengths."""
        patterns = list(self.rules) if isinstance(self.rules, Mapping) else ["*"]
        return self._generate_state_key(mode=self.mode, patterns=patterns)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end()
            self.regularizer = None

    # Not on_fit_start: learning rate finders run there, and DeepSpeed and FSDP restore after it.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_deepspeed(trainer)
        # The process group of DistributedDataParallel, whose processes divide the work.
        group = getattr(trainer.model, "process_group", None)
        regularizer = wc.Regularizer(
            pl_module, self.rules, block_size=self.block_size, process_group=group
        )
        holders = _holders(regularizer, pl_module, trainer.optimizers)
        if not holders:
            raise ValueError(
                "`configure_optimizers` must return an optimizer with a regularised weight, but "
                f"none of its {len(trainer.optimizers)} optimizers has any of "
                f"{', '.join(regularizer.names)}. Select other weights with patterns."
            )
        if self.mode == "gradients":
            _refuse_gradients(trainer, holders)
        if self._loaded is not None:
            regularizer.load_state_dict(self._loaded)
            self._loaded = None
        # From here on, on_exception detaches the regularizer.
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
        # Skip optimizers without a regularised weight.
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
        # With gradient accumulation, one step spans several batches.
        if self.regularizer is None or step == self._seen_step:
            return
        self._seen_step = step
        if loggers and self.log_every:
            self.regularizer.log(_to_all(trainer), step, every=self.log_every)
        for saver in trainer.checkpoint_callbacks:
            # Enforce before Lightning collects the states of callbacks. It does not call
            # on_save_checkpoint of callbacks if it saves only weights.
            after = getattr(saver, "_every_n_train_steps", 0)
            if after and step % after == 0:
                self._enforce(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enforce(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The weights that are validated, and maybe saved as the best, must satisfy the limits.
        self._enforce(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module might have switched an optimizer to train mode.
        if self._switched():
            self._enforce(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The weights in the checkpoint share memory with those of the module.
        self._enforce(trainer)
        # Lightning has already collected the states, which enforcing has changed.
        if self._training and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = self.state_dict()
        if self._switched():
            states = [trainer.strategy.optimizer_state(one) for one in trainer.optimizers]
            checkpoint["optimizer_states"] = states

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._obeys = False  # an average might have replaced the weights
        self._enforce(trainer)
        self._end()

    def _enforce(self, trainer: Trainer) -> None:
        """Applies the hard limits to the weights that will be validated or saved."""
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
        """The optimizers whose weights must satisfy the limits in eval mode."""
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
        """The state of the Regularizer; never empty, because Lightning drops empty states."""
        if self.regularizer is None:
            return {"regularizer": self._loaded}
        return {"regularizer": self.regularizer.state_dict()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks that the state exists; Lightning passes it to `load_state_dict` next."""
        # Testing a checkpoint must not change the state in which a later fit starts.
        self._ignore_next = trainer.state.fn != "fit"
        saved = checkpoint.get("callbacks", {})
        if not self._ignore_next and self.state_key not in saved:
            raise ValueError(
                f'`ckpt_path` must contain the state of this callback, "{self.state_key}", but '
                f"contains {list(saved)}. Resume with the patterns and the mode with which it was "
                "saved. To start regularising now, load only the weights and call fit without "
                "ckpt_path."
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
    """Returns a function that logs to every logger of the Trainer."""

    def log(values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    return log


def _holders(
    regularizer: wc.Regularizer, module: LightningModule, optimizers: list[Optimizer]
) -> list[Optimizer]:
    """The optimizers that step a regularised weight."""
    # A name is the name of a parameter, for a part of one followed by a colon and the part.
    weights = {id(module.get_parameter(name.partition(":")[0])) for name in regularizer.names}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"])
    ]


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averages that Lightning's callbacks keep of the module, in a private attribute."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kept = [getattr(callback, "_average_model", None) for callback in callbacks]
    models = [one.module if isinstance(one, AveragedModel) else one for one in kept]
    return [model for model in models if isinstance(model, nn.Module)]


def _refuse_gradients(trainer: Trainer, holders: list[Optimizer]) -> None:
    """Refuses setups where the penalty would count more than once or with the wrong scale."""
    if len(holders) > 1:
        raise ValueError(
            '`mode="gradients"` needs a single optimizer with regularised weights, but '
            f"there are {len(holders)}, and each would add the penalties of all weights. "
            'Use mode="proximal", or one callback per optimizer with patterns for its weights.'
        )
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(holders[0], "_step_supports_amp_scaling", False):
        raise ValueError(
            '`mode="gradients"` needs unscaled gradients, but a fused '
            f"{type(holders[0]).__name__} unscales them within its step. "
            'Use mode="proximal", or an optimizer with fused=False.'
        )
