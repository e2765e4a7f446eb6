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
# Under this key trainer_state.json says which file belongs to it. Not the name of a class: the
# Trainer may make a callback anew from what lies under its name.
_KEY = "wellcond"


class _First(TrainerCallback):
    """Stands before the callbacks that report, and adds numbers to the logs that they get."""

    def __init__(self, owner: _Logging) -> None:
        self.owner = owner

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.owner.add_to_logs(state, kwargs.get("logs"))


class _Logging(TrainerCallback, abc.ABC):
    """Adds numbers to the logs of the Trainer whenever it logs the loss."""

    log: Any
    _logged: tuple[int, int] = -1, -1

    @abc.abstractmethod
    def _report(self, target: Any, step: int) -> dict[str, float] | None:
        """Measures, logs to the target, and returns what was logged."""

    def add_to_logs(self, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Adds to the logs of this step, once; other logs are those of evaluations and the end."""
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
        """Puts a callback before those of TensorBoard and wandb, which come before this one.

        The Trainer does not tell callbacks of each other, so the list is that of the handler that
        is calling. The handler goes on through its old list.
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
    """Watches the weights of a model while a transformers Trainer trains it, and changes nothing.

    Whenever the Trainer logs the loss, `Monitor.measure` adds a few aggregates and the worst five
    weights by name to its logs: see `Regularizer.log`. They are printed, kept in
    `trainer.state.log_history`, and sent to what `report_to` names, such as TensorBoard and wandb.

    Args:
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`.
        block_size: how many leading singular vectors are followed.
        condition_numbers: measure kappa as well, which takes about an SVD per weight.
        layers: also the series of every weight.
        log: a SummaryWriter, a run of wandb or a callable (values, step) to log there as well.

    Attributes:
        monitor: the `Monitor`; None before training begins, kept when it ends.

    Raises:
        ValueError: when training begins: a pattern matches nothing, or DeepSpeed.

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
    """Regularises the weights of a model while a transformers Trainer trains it.

    Two ways:

    - "proximal": a proximal step after every few steps of the optimizer, by `Regularizer.attach`.
      It comes after the optimizer's step: neither clipping nor the scaling of the loss touches it.
      Steps that a GradScaler skips do not count.
    - "gradients": `Regularizer.add_gradients` in `on_pre_optimizer_step`, once per optimizer step:
      after the gradients are accumulated, unscaled and clipped. What is clipped is the gradient of
      the loss alone, and the norm that the Trainer logs does not contain the penalty.

    There is no third way for the penalty in the loss: `loss + reg()` belongs into `compute_loss`,
    with a `Regularizer` of your own. The Trainer divides that loss by the number of batches in a
    cycle, unless the model has divided by the number of items in the whole cycle, as most models of
    transformers do: then the penalty counts once per batch, not once per step.

    The weights are chosen when training begins, under the names of the model without wrappers. What
    is frozen then stays without a penalty. Every `train` starts afresh, unless it resumes. Take one
    callback per Trainer; several penalties go into one mapping of patterns.

    The state goes to `wellcond.pt` in every checkpoint, and training resumes bit for bit. It is
    looked for in `TrainingArguments(resume_from_checkpoint=...)`, then in
    `output_dir/checkpoint-<step>`, and taken only if it belongs to the very checkpoint that the
    Trainer has loaded, and if the weights are those that were saved. In a hyperparameter search no
    state is saved.

    The Trainer does not tell callbacks of an exception: after one, the optimizer stays attached
    until the next `train`, or `callback.regularizer.detach()`.

    Hard limits hold in what is evaluated and saved and at the end of training, whatever `every` is:
    they are applied before. Under an optimizer with eval(), as those of schedulefree, that is what
    eval() makes: the callback calls it first, and the Trainer its train() before the next step.

    Args:
        rules: one penalty, or patterns to penalties, as for `Regularizer`.
        mode: "proximal" or "gradients".
        every: for "proximal": a step after every so many optimizer steps; by default 10 for
            penalties, and hard limits when they are due, as for `attach`.
        block_size: the width of the leading subspace, as for `Regularizer`.
        log: True adds a few aggregates and the worst five weights by name (see `Regularizer.log`)
            to the logs of the Trainer, whenever it logs the loss: they are printed, kept in
            `trainer.state.log_history`, and sent to what `report_to` names, such as TensorBoard and
            wandb. A SummaryWriter, a run of wandb or a callable gets them as well. False logs
            nothing.

    Attributes:
        regularizer: the `Regularizer`; None before training begins, kept when it ends.

    Raises:
        TypeError: the rules are neither a rule nor a mapping.
        ValueError: another mode, or "gradients" for a limit or IsometryStep. When training
            begins: what `Regularizer` and `attach` refuse; DeepSpeed; a second callback;
            "gradients" with fp16 and no clipping. When it resumes: a checkpoint without a
            `wellcond.pt` of its own, or a damaged one; weights that the Trainer has not restored.

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
        # Of DistributedDataParallel, whose processes share the work.
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
        # Two runs may write the same checkpoint-<step>: this says which file is whose.
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
        # What is evaluated, and perhaps saved as the best, obeys.
        if control.should_save or control.should_evaluate:
            self._enforce(state, kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            self._enforce(state, kwargs.get("optimizer"))

    def _enforce(self, state: TrainerState, optimizer: Any) -> None:
        """Hard limits hold in what is evaluated and saved at this step.

        An optimizer with eval(), as those of schedulefree, evaluates other weights than it steps.
        The Trainer calls its train() before the next step.
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
        # A search saves into directories of which callbacks know nothing.
        if self.regularizer is None or state.is_hyper_param_search:
            return
        if self._obeys_since != state.global_step and self._has_limits():
            logger.warning(
                "The weights were saved at step %s before the hard limits were applied: a callback "
                "after this one asked for it. Put RegularizerCallback last.",
                state.global_step,
            )
        # In every process, as sharded weights may need them all; then one writes.
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
                "%s is not there, so the state of the regulariser was not saved: training cannot "
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
        # The best model may just have been loaded: it was evaluated as it is.
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
                '`mode="gradients"` must see unscaled gradients, but with fp16 and '
                f"max_grad_norm={args.max_grad_norm} they may still be scaled. "
                'Take mode="proximal", bf16, or a max_grad_norm above 0.'
            )


def _refuse_deepspeed(args: TrainingArguments) -> None:
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "`deepspeed` must be off: it steps copies of the weights that wellcond does not "
            "see. Train without it."
        )


def _stored(state: TrainerState) -> dict[str, Any]:
    """What trainer_state.json holds of callbacks by name; its annotation says another thing."""
    return cast(dict[str, Any], state.stateful_callbacks)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _refuse_other_weights(saved: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """The Trainer only warns where it has not restored a weight, as names differ in the file."""
    other = [key for key in found if key in saved and not torch.equal(found[key], saved[key])]
    if other:
        raise ValueError(
            f"`resume_from_checkpoint` must restore the weights, but {len(other)} are not what was "
            f"saved, {other[0].split()[0]} among them. Some versions of transformers save a model "
            "under other names than those from which they resume, and only warn of missing keys. "
            "Make the model by from_pretrained(checkpoint), then resume from that checkpoint."
        )


def _resumed(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """What `on_save` has written where a training resumes; None where it starts.

    The Trainer does not say which directory it resumes from. It has loaded the trainer state of
    that checkpoint, though, and in there lies the mark of the file that was written with it.
    """
    mark = _stored(state).get(_KEY)
    if state.global_step == 0:
        if mark is not None:
            raise ValueError(
                "`callbacks` must hold one RegularizerCallback, but there is a second. "
                "Put the penalties of both into one mapping of patterns."
            )
        return None
    if mark is None:
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint with {FILE}, but the one of step "
            f"{state.global_step} was saved without this callback. To start the penalty now, load "
            "only its weights and train without resuming."
        )
    run = mark["attributes"]["run"]
    # Not used by the Trainer itself; the place to say where a checkpoint outside output_dir lies.
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
        "checkpoint. A run that is killed while saving leaves none: resume from the checkpoint "
        "before. If the checkpoint lies outside output_dir, give its directory as "
        "TrainingArguments(resume_from_checkpoint=...) too."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("run", "global_step", "checksums", "regularizer")}
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Resume from the checkpoint before."
        ) from None
