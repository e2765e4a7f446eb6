"""Callbacks for the Trainer of transformers: a `Regularizer` or a `Monitor` in `Trainer.train`."""

from __future__ import annotations

import abc
import inspect
import logging
import os
import pickle
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import wellcond as wc
from wellcond.integrations._modes import Rules, checked_mode, has_modes, rules_in
from wellcond.integrations._watcher import Watcher

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers.trainer_callback import CallbackHandler, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError:
    raise ImportError(
        "this callback needs the Trainer of transformers: pip install 'wellcond[transformers]'."
    ) from None

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("wellcond")

FILE = "wellcond.pt"
# The key in trainer_state.json that identifies the file of this checkpoint. It is not the name of a
# class, because the Trainer can recreate a callback from the entry with its class name.
_KEY = "wellcond"


class _First(TrainerCallback):
    """Adds values to the logs before the callbacks that report the logs are called."""

    def __init__(self, owner: _Logging) -> None:
        self.owner = owner

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.owner.add_to_logs(state, kwargs.get("logs"))


class _Logging(TrainerCallback, abc.ABC):
    """Adds values to the logs of the Trainer whenever it logs the loss."""

    log: Any
    _logged: tuple[int, int] = -1, -1

    @abc.abstractmethod
    def _report(self, target: Any, step: int) -> dict[str, float] | None:
        """Measures, logs to the target, and returns the logged values."""

    def add_to_logs(self, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Adds values to the logs of a training step, once; skips other logs, as of evaluations."""
        if not self.log or logs is None or "loss" not in logs:
            return
        which = state.global_step, id(logs)
        if which == self._logged:
            return
        self._logged = which
        target = self.log if self.log is not True else lambda values, step: None
        values = self._report(target, state.global_step) or {}
        logs |= values
        if state.log_history:
            state.log_history[-1] |= values

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.add_to_logs(state, kwargs.get("logs"))

    def _reach_reports(self) -> None:
        """Inserts a callback before those of TensorBoard and wandb, which precede this one.

        The Trainer does not give callbacks access to each other, so the list is taken from the
        handler that is calling. The handler finishes this call with its old list.
        """
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler):
                others = [
                    one
                    for one in handler.callbacks
                    if not (isinstance(one, _First) and one.owner is self)
                ]
                handler.callbacks = [_First(self), *others]
                return
            frame = frame.f_back


class MonitorCallback(Watcher, _Logging):
    """Monitors the weights of a model during training with a transformers Trainer.

    The callback does not change the weights. Whenever the Trainer logs the loss, the callback adds
    a few aggregates and the values of the worst five weights; see `Regularizer.log`. The Trainer
    prints them, keeps them in `trainer.state.log_history`, and sends them to the services in
    `report_to`, such as TensorBoard and wandb.

    Args:
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`.
        block_size: the number of leading singular vectors to track per weight.
        condition_numbers: also measure condition numbers, at the cost of about one SVD per weight.
        layers: also log one series per weight.
        log: True, or a SummaryWriter, a run of wandb or a callable (values, step) that also
            receives the values. False disables logging.

    Attributes:
        monitor: the `Monitor`. It is None before training starts and is kept after training ends.

    Raises:
        ValueError: when training starts, if a pattern matches nothing or DeepSpeed is used.

    Example:
        >>> from wellcond.integrations.transformers import MonitorCallback
        >>> callback = MonitorCallback(condition_numbers=True)
        >>> callback.monitor is None  # trainer = Trainer(..., callbacks=[callback]) comes next
        True
    """

    def __init__(
        self,
        patterns: Sequence[str] = ("*",),
        *,
        block_size: int = 8,
        condition_numbers: bool = False,
        layers: bool = False,
        log: Any = True,
    ) -> None:
        super().__init__(patterns, block_size, condition_numbers, layers)
        self.log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_deepspeed(args)
        self._watch(kwargs["model"])
        self._reach_reports()

    def _report(self, target: Any, step: int) -> dict[str, float] | None:
        return self._measure(target, step)


class RegularizerCallback(_Logging):
    """Regularises the weights of a model during training with a transformers Trainer.

    There are two modes:

    - "proximal" attaches a `Regularizer` to the optimizer; see `Regularizer.attach`. It takes a
      proximal step after every few optimizer steps. Because the proximal step follows the optimizer
      step, gradient clipping and loss scaling do not affect it. Steps that a GradScaler skips do
      not count.
    - "gradients" calls `Regularizer.add_gradients` in `on_pre_optimizer_step`, once per optimizer
      step. At that point the gradients are accumulated, unscaled and clipped. Clipping therefore
      acts only on the gradient of the loss, and the gradient norm that the Trainer logs does not
      include the penalty.

    For a penalty in the loss, create a `Regularizer` and return `loss + reg()` from `compute_loss`.
    The Trainer divides this loss by the number of batches in an accumulation cycle, unless the
    model has divided it by the number of items in the cycle, as most models of transformers do. In
    that case the penalty counts once per batch, not once per step.

    The callback selects the weights when training starts, by their names in the model without
    wrappers. It does not regularise weights that are frozen at that time. Every `train` starts with
    a new state unless it resumes. Use one callback per Trainer; pass several rules as one mapping
    of patterns.

    The callback saves its state to `wellcond.pt` in every checkpoint, and training resumes bit for
    bit. It looks for the file in `TrainingArguments(resume_from_checkpoint=...)`, then in
    `output_dir/checkpoint-<step>`. It accepts the file only if it belongs to the checkpoint that
    the Trainer has loaded and if the weights equal the saved ones. In a hyperparameter search it
    saves no state.

    The Trainer does not notify callbacks of an exception. After an exception the regulariser
    remains attached to the optimizer until the next `train` or `callback.regularizer.detach()`.

    For any value of `every`, the callback applies hard limits before evaluation, before a
    checkpoint is saved, and at the end of training. If the optimizer has an `eval()` method, as
    those of schedulefree do, the callback calls it first, so the limits hold for the weights that
    are evaluated. The Trainer calls `train()` before the next step.

    Args:
        rules: a rule, or a mapping of patterns to rules, as for `Regularizer`.
        mode: "proximal" or "gradients".
        every: the number of optimizer steps between two proximal steps, for mode "proximal". By
            default 10 for penalties; hard limits are applied when due, as for `attach`.
        block_size: the width of the leading subspace, as for `Regularizer`.
        log: True adds a few aggregates and the values of the worst five weights to the logs of the
            Trainer whenever it logs the loss; see `Regularizer.log`. The Trainer prints them, keeps
            them in `trainer.state.log_history`, and sends them to the services in `report_to`, such
            as TensorBoard and wandb. A SummaryWriter, a run of wandb or a callable (values, step)
            also receives them. False disables logging.

    Attributes:
        regularizer: the `Regularizer`. It is None before training starts and is kept after training
            ends.

    Raises:
        TypeError: `rules` is neither a rule nor a mapping.
        ValueError: if the mode is unknown, or is "gradients" for a limit or IsometryStep. When
            training starts, if `Regularizer` or `attach` raises it, if DeepSpeed is used, if the
            Trainer has a second RegularizerCallback, or if the mode is "gradients" with fp16 and
            without clipping. When training resumes, if `wellcond.pt` is missing, damaged or belongs
            to another checkpoint, or if the Trainer has not restored the weights.

    Example:
        >>> import wellcond as wc
        >>> from wellcond.integrations.transformers import RegularizerCallback
        >>> callback = RegularizerCallback({"*.query.weight": wc.ConditionPenalty(100)})
        >>> callback.regularizer is None  # trainer = Trainer(..., callbacks=[callback]) comes next
        True
    """

    def __init__(
        self,
        rules: Rules,
        *,
        mode: str = "proximal",
        every: int | str | None = None,
        block_size: int = 32,
        log: Any = True,
    ) -> None:
        self.rules = rules
        self.mode = checked_mode(mode, rules)
        self.every = every
        self.block_size = block_size
        self.log = log
        self._obeys_since = -1
        self.regularizer: wc.Regularizer | None = None
        self._run = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        self.regularizer = None
        self._refuse(args)
        # The processes of DistributedDataParallel divide the work.
        shared = args.parallel_mode.value == "distributed" and not args.fsdp
        group = torch.distributed.group.WORLD if shared else None
        regularizer = wc.Regularizer(
            kwargs["model"], self.rules, block_size=self.block_size, process_group=group
        )
        saved = _resumed(args, state)
        if saved is not None:
            _refuse_other_weights(saved["checksums"], regularizer.checksums())
            regularizer.load_state_dict(saved["regularizer"])
        if self.mode == "proximal":
            optimizer = kwargs["optimizer"]
            if isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            regularizer.attach(optimizer, every=self.every)
        self.regularizer = regularizer
        # Two runs can write the same checkpoint-<step>; the identifier tells their files apart.
        self._run = uuid.uuid4().hex
        _stored(state)[_KEY] = {"args": {}, "attributes": {"run": self._run}}
        self._reach_reports()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mode == "gradients" and self.regularizer is not None:
            self.regularizer.add_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The weights that are evaluated, and maybe saved as the best, must satisfy the limits.
        if control.should_save or control.should_evaluate:
            self._enforce(state, kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            self._enforce(state, kwargs.get("optimizer"))

    def _enforce(self, state: TrainerState, optimizer: Any) -> None:
        """Applies the hard limits to the weights that are evaluated or saved at this step.

        An optimizer with an `eval()` method, such as those of schedulefree, evaluates other weights
        than it steps. The Trainer calls `train()` before the next step.
        """
        if self.regularizer is not None and self._obeys_since != state.global_step:
            if self._has_limits() and has_modes(optimizer):
                optimizer.eval()
            self.regularizer.enforce()
            self._obeys_since = state.global_step

    def _report(self, target: Any, step: int) -> dict[str, float] | None:
        return None if self.regularizer is None else self.regularizer.log(target, step, every=1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A hyperparameter search saves to directories that callbacks do not know.
        if self.regularizer is None or state.is_hyper_param_search:
            return
        if self._obeys_since != state.global_step and self._has_limits():
            logger.warning(
                "The weights were saved at step %s before the hard limits were applied, because a "
                "callback after this one requested the save. Put RegularizerCallback last.",
                state.global_step,
            )
        # Every process takes part because sharded weights can need all of them; one process writes.
        saved = {
            "run": self._run,
            "global_step": state.global_step,
            "checksums": self.regularizer.checksums(),
            "regularizer": self.regularizer.state_dict(),
        }
        if not args.should_save:
            return
        directory = _checkpoint(args, state)
        if not directory.is_dir():
            logger.warning(
                "%s does not exist, so the state of the regulariser was not saved. Training cannot "
                "resume from this checkpoint.",
                directory,
            )
            return
        path = directory / FILE
        part = path.with_name(f"{FILE}.{os.getpid()}")
        try:
            torch.save(saved, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        # If the best model has just been loaded, it was evaluated in its current form.
        loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._obeys_since = -1
        self._enforce(state, None if loaded else kwargs.get("optimizer"))

    def _has_limits(self) -> bool:
        return any(rule.enforceable for rule in rules_in(self.rules))

    def _end(self) -> None:
        if self.regularizer is not None:
            self.regularizer.detach()

    def _refuse(self, args: TrainingArguments) -> None:
        _refuse_deepspeed(args)
        if self.mode == "gradients" and args.fp16 and not args.max_grad_norm > 0:
            # Some versions of the Trainer unscale only in order to clip.
            raise ValueError(
                '`mode="gradients"` needs unscaled gradients, but with fp16 and '
                f"max_grad_norm={args.max_grad_norm} they may still be scaled. "
                'Use mode="proximal", bf16, or a max_grad_norm above 0.'
            )


def _refuse_deepspeed(args: TrainingArguments) -> None:
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "`deepspeed` must be off: it steps copies of the weights that wellcond does not "
            "see. Train without it."
        )


def _stored(state: TrainerState) -> dict[str, Any]:
    """The entries of callbacks in trainer_state.json; the annotation of the attribute is wrong."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _refuse_other_weights(saved: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuses to resume if a weight was not restored, of which the Trainer only warns."""
    other = [key for key in found if key in saved and not torch.equal(found[key], saved[key])]
    if other:
        raise ValueError(
            f"`resume_from_checkpoint` must restore the weights, but {len(other)} differ from the "
            f"saved weights, including {other[0].split()[0]}. Some versions of transformers save "
            "a model under names that they do not find when they resume, and only warn of missing "
            "keys. Create the model with from_pretrained(checkpoint), then resume from that "
            "checkpoint."
        )


def _resumed(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """The saved state of `on_save` if the training resumes, None if it starts.

    The Trainer does not give the directory from which it resumes. It has loaded the trainer state
    of that checkpoint, however, which contains the identifier of the file written with it.
    """
    mark = _stored(state).get(_KEY)
    if state.global_step == 0:
        if mark is not None:
            raise ValueError(
                "`callbacks` must contain only one RegularizerCallback, but has a second. "
                "Merge the rules of both into one mapping of patterns."
            )
        return None
    if mark is None:
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint with {FILE}, but the checkpoint of "
            f"step {state.global_step} was saved without this callback. To start regularising now, "
            "load only its weights and train without resuming."
        )
    run = mark["attributes"]["run"]
    # The Trainer ignores this argument. With it the user gives a checkpoint outside output_dir.
    given = args.resume_from_checkpoint
    places = [Path(given)] if isinstance(given, str) else []
    places.append(_checkpoint(args, state))
    for path in (place / FILE for place in places):
        if path.is_file():
            saved = _read(path)
            if (saved["run"], saved["global_step"]) == (run, state.global_step):
                return saved
    raise ValueError(
        f"`resume_from_checkpoint` must be a checkpoint with {FILE}, but "
        f"{' and '.join(str(place / FILE) for place in places)} is missing or belongs to another "
        "checkpoint. If the run was killed while saving, resume from the previous checkpoint. If "
        "the checkpoint is outside output_dir, also pass its directory as "
        "TrainingArguments(resume_from_checkpoint=...)."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("run", "global_step", "checksums", "regularizer")}
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Resume from the previous checkpoint."
        ) from None
