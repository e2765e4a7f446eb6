"""The regulariser of a model, which keeps a subspace per weight and applies rules.

It adds penalties to the loss or to the gradients, or takes proximal steps after those of the
optimizer, and it applies limits.

Letters: S (m, n) a weight, nu = min(m, n), k the width of its block, eta the length of a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from wellcond.linalg.checks import as_count, as_number
from wellcond.operators.base import Dense, Updatable
from wellcond.operators.rounding import full_precision
from wellcond.operators.sharded import is_sharded
from wellcond.report.estimate import Estimate
from wellcond.rules.base import Need
from wellcond.text import escape, format_count, list_some, quote_names, quote_subject
from wellcond.training.attachment import (
    Actions,
    Attachment,
    check_optimizer,
    check_rates,
    has_modes,
    own_changes,
)
from wellcond.training.compiled import Compilable
from wellcond.training.engine import Engine
from wellcond.training.estimates import estimate_weights
from wellcond.training.log import log
from wellcond.training.oversights import Oversights, warn_of_stored
from wellcond.training.replicas import checksum, replicas_of
from wellcond.training.selection import Rules, select
from wellcond.training.state import WeightState, name_meta_weights
from wellcond.weights.discover import refuse_flat_parameters, unwrapped
from wellcond.weights.reasons import Skipped

_SHOWN = 5  # weights listed by repr()


class Regularizer:
    """Applies penalties and limits to the weights of a model during training.

    A penalty can act in three places of a training loop:

    1. In the loss: `loss = task_loss + reg()`. Loss scaling applies to it too.
    2. On the gradients: `reg.add_gradients()` between backward and `optimizer.step()`.
    3. As a proximal step: `reg.attach(optimizer, every=10)` once, before the loop.

    Limits are applied by `attach`, `proximal_step` and `enforce`.

    Place 2 changes gradients, place 3 changes weights, and the regulariser changes nothing else.
    Per weight (m, n) it keeps a block of k leading singular vectors, at most max(m, n) k numbers,
    where k is `block_size` or min(m, n) if that is smaller. Each application refines the block by
    one product with the weight, alternately from the right and from the left.

    Args:
        model: the model. Its weights are collected once, now. Tied weights count once.
        rules: one rule for all weights, or a mapping of patterns (`fnmatch.fnmatchcase` on
            parameter names and view names) to a rule, or to None to skip the weights. The first
            pattern that matches wins. An embedding or a parameter of an unknown module is selected
            only by a pattern that is exactly its name. The keys "attention", "mlp", "head" and
            "embedding" select all weights of that role. wellcond determines the role from the name
            of a weight. If a parameter has the name "head", the key "head" selects only it.
        block_size: the width k of the block. Under a strong penalty many singular values gather at
            the top, and the block must contain all of them: with strength 1 and blocks of 8, 16, 32
            and 64, the final kappa was 71, 14, 4 and 2 % above the kappa of a run with an exact SVD
            at every step (`wellcond bench fidelity --block 8,16,32,64`, 784-512-10 network on
            digits).
        process_group: processes that have the same model. Each refines a share of the weights and
            sends the results to the others, so that all remain identical. Defaults to the group of
            DistributedDataParallel if it wraps the model, else to None. Weights that are DTensors
            need no group.
        check_replicas: before every application, raise a RuntimeError that names the weights that
            differ between these processes. Weights that are DTensors are not compared.

    Raises:
        ValueError: no weight is left to regularise, a pattern matches nothing, block_size < 1, a
            pattern selects only parameters that are not matrices, FSDP1 wraps a part of the model,
            or check_replicas is True but the group of processes is unknown.
        TypeError: rules is neither a rule nor a mapping to rules.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
        >>> reg = wc.Regularizer(model, {"0.*": wc.ConditionPenalty(1e-2)})
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> loss = model(torch.ones(4, 64)).square().mean() + reg()
        >>> loss.backward()
        >>> optimizer.step()
        >>> list(reg.measure())
        ['0.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        *,
        block_size: int = 32,
        process_group: Any = None,
        check_replicas: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        refuse_flat_parameters(model)
        self.block_size = as_count(block_size, "`block_size`")
        self._attachments: list[Attachment] = []
        self._can_step = False  # whether all rules are known to have a proximal step
        chosen, self._skipped = select(unwrapped(model), rules)
        self._states = [WeightState(weight, rule, self.block_size) for weight, rule in chosen]
        replicas = replicas_of(model, process_group, check_replicas)
        self._engine = Engine(self._states, replicas, check_replicas)
        self._compilable = Compilable(self._engine)
        self._oversights = Oversights(unwrapped(model), self._states)
        self._named: set[str] = set()  # the weights that a warning of `log` has named
        warn_of_stored(self._states)

    # --- application ------------------------------------------------------------------------------

    def __call__(self) -> Tensor:
        """Returns the sum of strength * penalty over the weights, a scalar to add to the loss.

        The value is a lower estimate of the true sum. Its gradient with respect to every weight is
        the one that `add_gradients` adds. Under `torch.no_grad()` the blocks are not updated.

        Raises:
            ValueError: a weight contains NaN or infinity; the error names it. On the CPU this call
                raises the error. On other devices the next call raises it, so that the host never
                waits.
        """
        _refuse_without_gradient(self._states)
        if torch.is_grad_enabled():
            self._oversights.check_application(self.attachments, "reg()")
        return self._compilable.penalty()

    def add_gradients(self) -> None:
        """Adds strength * gradient to the .grad of every weight: after backward, before step.

        Call it once per optimizer step, also when you accumulate gradients. With a GradScaler, call
        it after `scaler.unscale_(optimizer)`. With gradient clipping, call it before the clipping
        to include the penalty in the norm, else after it. Do not call it in a step pre-hook of the
        optimizer: frameworks that run backward inside `step(closure)` erase the gradients after it.
        A weight without .grad gets one.

        Raises:
            ValueError: a weight contains NaN or infinity; the error names it, and no gradient has
                changed.
        """
        _refuse_without_gradient(self._states)
        _refuse_sparse_gradients(self._states)
        self._oversights.check_application(self.attachments, "add_gradients()")
        self._compilable.add_gradients()

    def proximal_step(self, lr: float | Tensor, *, steps: int = 1) -> None:
        """Takes one proximal step of length eta = lr * strength * steps on every weight.

        The step is implicit, so one step of length steps * eta is as good as many of length eta.
        After `attach`, the regulariser takes these steps itself.

        Args:
            lr: the learning rate of the optimizer, a number or a tensor with one element.
            steps: the number of optimizer steps that this step stands for.

        Raises:
            ValueError: lr is negative or steps < 1; nothing has changed. Or a weight contains NaN
                or infinity: no penalty has taken a step, and the limits of all other weights were
                applied.
        """
        lr = self._checked_rate(lr)
        steps = as_count(steps, "`steps`")
        states = self._engine.active()
        if not self._can_step:
            refuse_without_proximal_step(self._states)
            self._can_step = True
        self._oversights.check_application([], "proximal_step()")
        with own_changes(self.attachments):
            self._engine.proximal_step(
                states,
                [lr * steps] * len(states),
                due=False,
                done=lambda state: state.advance(steps),
            )

    def _checked_rate(self, lr: float | Tensor) -> float | Tensor:
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"`lr` must be one number, got shape {tuple(lr.shape)}.")
            if not lr.is_cpu:
                return self._engine.check_rates(lr.detach().reshape(()))
        number = as_number(lr if not isinstance(lr, Tensor) else lr.reshape(()), "`lr`")
        if not 0 <= number < math.inf:
            raise ValueError(f"`lr` must be finite and not negative, got {float(number)}.")
        return lr.detach() if isinstance(lr, Tensor) else number

    def attach(
        self,
        optimizer: Optimizer,
        *,
        every: int | str | None = None,
        resume: str | None = None,
    ) -> Attachment:
        """Takes proximal steps and applies limits after steps of the optimizer; returns a handle.

        A proximal step has the length eta = strength * the sum of the learning rates of the
        weight's own parameter group since the last one. This takes warm-up and schedules into
        account. Steps that a GradScaler skips do not count. `handle.remove()` or `detach()` ends
        the attachment.

        The optimizer keeps the regulariser alive, not the reverse. A copied or unpickled optimizer
        has no hooks. If the attached optimizer is deleted and another one steps the weights, the
        regulariser logs one warning.

        Args:
            optimizer: a torch optimizer that has at least one of the weights. If you do not call
                its own `step`, as with SAM in two steps, give the optimizer that it wraps:
                `base_optimizer`.
            every: the number of optimizer steps between applications. Limits are then applied
                exactly, and the steps of an incomplete last interval remain pending. Defaults to 10
                for penalties and for `IsometryStep`. With 5 and with 10, kappa was within 1.3 % of
                the kappa of a run with an exact proximal step at every step (`wellcond bench
                fidelity --every 5,10,20`). The length of a step of `IsometryStep` does not depend
                on the interval.
                By default wellcond watches limits of singular values: at every step, or every few
                steps, it estimates singular values from blocks of singular vectors and projects the
                weight when needed. From the 20th step on, sigma_1 was at most 1.01 times its bound
                and kappa at most 1.05 K at every step (measured, not proven). A weight that cannot
                be watched is decomposed at every step, and `print(reg)` names it. With "auto" such
                a weight is projected after the first step. After that, wellcond adds up its
                learning rates since the last projection, and projects it again at the sum at which
                it expects the weight to exceed its limit by about a fifth. These projections are at
                least 1, 2, 4 and 8 steps apart, then at least 10 and at most 1,000, and weights of
                different shapes take turns. This also applies by default to subclasses of `Limit`
                that you write, and to weights of more than 4,096 singular values.
            resume: "bitwise" saves the complete state of the watch, even where it is as large as a
                square weight. By default it is saved for weights of up to 1,024 singular values,
                and other weights are decomposed once after the state is loaded.

        Raises:
            ValueError: every < 1, "auto" for a penalty, no common weight, a weight that is already
                attached, no learning rate for a weight under a penalty, or an optimizer whose
                `step` runs no hooks. A step of the optimizer raises one for weights that contain
                NaN or infinity, after all other limits that are due were applied.
            TypeError: optimizer is not a torch optimizer.
        """
        check_optimizer(optimizer)
        steps = None if every is None or every == "auto" else as_count(every, "`every`")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        states = [s for s in self._states if all(id(p) in held for p in s.weight.parameters)]
        if not states:
            raise ValueError(
                "`optimizer` must have at least one regularised weight, but has none of "
                f"{quote_names(self.names)}. Attach to the optimizer of this model's parameters."
            )
        refuse_without_proximal_step(states)
        check_rates(optimizer, states)
        taken = [s.name for a in self.attachments for s in a.states if s in states]
        if taken:
            raise ValueError(
                f"`optimizer` must not be attached twice, but {quote_subject(taken)} already "
                "attached. Call detach() first."
            )
        if resume not in (None, "bitwise"):
            raise ValueError(f'`resume` must be None or "bitwise", got {resume!r}.')
        soft = [s.name for s in states if s.rule.default_schedule.every is not None]
        if every == "auto" and soft:
            raise ValueError(
                f'`every` must be an integer, got "auto", which works only for hard limits: '
                f"{quote_subject(soft)} under another rule. Omit `every` to apply penalties every "
                "10 steps and to watch limits."
            )
        if steps is None and not has_modes(optimizer):
            for state in states:
                state.start_watch(bitwise=resume == "bitwise")
        actions = Actions(
            self._step_pending,
            self._watch,
            self._project,
            self._oversights.warn_of_undone,
        )
        attachment = Attachment(optimizer, states, steps or every, actions)
        self._attachments = [*self.attachments, attachment]
        self._oversights.check_attachment(attachment)
        return attachment

    def detach(self) -> None:
        """Ends all attachments; optimizer steps since the last proximal step remain pending."""
        for attachment in self._attachments:
            attachment.remove()

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments that have not been removed."""
        return [attachment for attachment in self._attachments if not attachment.removed]

    def _step_pending(self, states: list[WeightState]) -> None:
        states = [state for state in states if state.active]
        self._oversights.check_application(self.attachments, "")
        # The first application fills the zeros: after it there is nothing to count.
        first = [state for state in states if state.pace.applications == 0]
        with self._oversights.watch_zeros(first):
            rates = [state.pending_lr for state in states]
            self._engine.proximal_step(states, rates, due=True, done=WeightState.settle)

    def _watch(self, states: list[WeightState], rates: list[float]) -> list[WeightState]:
        if states[0].step % 10 == 1:
            self._oversights.check_application(self.attachments, "")
        return self._engine.watch(states, rates)

    def _project(self, states: list[WeightState]) -> None:
        # The first application fills the zeros: after it there is nothing to count.
        first = [state for state in states if state.record.decompositions == 0]
        with self._oversights.watch_zeros(first):
            self._engine.project(states)

    def enforce(self) -> None:
        """Applies all hard limits exactly. Call it before you save weights, and after training.

        Penalties take no step. Afterwards no optimizer step is pending for limits. Frozen weights
        remain unchanged, and a warning names them; the function `wellcond.enforce` also projects
        frozen weights, such as those of an averaged copy. A warning also names an attached
        optimizer in train mode whose eval() replaces the weights: call eval() first. Without a hard
        limit this does nothing.

        Raises:
            ValueError: a weight contains NaN or infinity, or cannot satisfy its limit in its dtype,
                see `ConditionLimit`. The error names all such weights; the limits of all others
                hold.

        Example:
            >>> import torch, wellcond as wc
            >>> layer = torch.nn.Linear(8, 8, bias=False)
            >>> reg = wc.Regularizer(layer, wc.ConditionLimit(2.0))
            >>> reg.enforce()
            >>> bool(wc.condition_number(layer.weight) <= 2.0)
            True
        """
        limited = [s for s in self._engine.active() if s.rule.enforceable]
        self._oversights.check_enforcement(self.attachments)
        if limited:
            refuse_without_proximal_step(limited)
            self._oversights.check_limits(limited)
            with own_changes(self.attachments), self._oversights.watch_zeros(limited):
                self._engine.enforce(limited)

    def measure(self) -> dict[str, Estimate]:
        """Estimates the singular values of every weight by a few products, without an SVD.

        The stored blocks do not change. An estimate takes about 16 products with a block of 32
        vectors, and 25 with a narrower one. Under a rule that keeps no block, such as a hard limit,
        a new block of 8 vectors is used each time. sigma_max is estimated from below: it was at
        most 0.5 % too low for Gaussian matrices from 64x64 to 1024x1024, and less in training.

        Returns:
            An `Estimate` per weight name. A stack has one entry per matrix: `name:0`, `name:1`, ...
            The status of an estimate tells whether the weight is zero or not finite.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8, bias=False), wc.ConditionPenalty(0.1))
            >>> reg.measure()["weight"].shortened_steps
            0
        """
        with full_precision(self._states[0].weight.parameters[0].device.type):
            return estimate_weights(self._states, self.block_size)

    def log(
        self,
        target: Any,
        step: int | None = None,
        *,
        every: int = 100,
        layers: bool = False,
        prefix: str = "wellcond",
    ) -> dict[str, float] | None:
        """Logs estimates every `every` steps; at other steps it costs nothing.

        By default it logs a few aggregates and the five worst weights with their names: the largest
        sigma_max; the sum of the penalties at strength 1; the smallest and the median stable rank
        share, ||S||_F^2/(nu sigma_max^2), which is 1 exactly if kappa = 1; the number of shortened
        steps; the number of blocks that are too narrow for gradients; the largest singular values
        and kappa of limited weights relative to their limits; and the number of weights that could
        not be measured. Values that do not apply to the model are omitted. The call takes one copy
        from the device.

        Args:
            target: TensorBoard's SummaryWriter, a run of wandb, a logger of Lightning, a
                LightningModule, an Accelerator, or a callable (values, step).
            step: the step of the training. Defaults to the number of steps that the regulariser has
                taken or watched.
            every: log when the step is a multiple of this number.
            layers: also log the series of every weight.
            prefix: prepended to every name.

        Returns:
            The logged values by name, or None at a step without a report.

        Raises:
            ValueError: every < 1.
            TypeError: the target is of another kind.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8), wc.ConditionPenalty(0.1))
            >>> values = reg.log(lambda values, step: None, step=200)
            >>> 0 < values["wellcond/stable_rank_share/smallest"] <= 1
            True
        """
        step = self._steps() if step is None else step
        self._oversights.check_log(self._attachments, step % as_count(every, "`every`") == 0)
        values = log(self.measure, target, step, every, layers, prefix, self._named)
        if values is not None:
            for state in self._states:
                state.record.largest = math.nan  # since the last report
        return values

    # --- the regularised weights ------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the regularised weights, the keys of `measure` and of the state."""
        return [state.name for state in self._states]

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Every other parameter and why it is skipped; `str()` of a reason is a sentence."""
        return dict(self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        """Drops the attachments: a copy of an optimizer has no hooks either."""
        self._engine.settle()
        return {**self.__dict__, "_attachments": []}

    def __repr__(self) -> str:
        """About ten lines for any model: common facts, the worst weights, counts of the rest."""
        count = len(self._states)
        weights = format_count(count, "weight")
        lines = [f"Regularizer of {weights}, block_size={self.block_size}"]
        remarks = {state.name: self._remarks(state) for state in self._states}
        facts = {state.name: self._facts(state, remarks[state.name]) for state in self._states}
        first, *others = facts.values()
        shared = [fact for fact in first if others and all(fact in one for one in others)]
        lines += [f"  all: {'; '.join(shared)}"] if shared else []
        shown, hidden = self._states, []
        if count > _SHOWN:
            worst = sorted(self._states, key=lambda one: (not remarks[one.name], -_excess(one)))
            shown, hidden = worst[:_SHOWN], worst[_SHOWN:]
        width = max(len(escape(state.name)) for state in shown)
        for state in shown:
            shape = "x".join(map(str, state.shape))
            own = "; ".join(fact for fact in facts[state.name] if fact not in shared)
            lines.append(f"  {escape(state.name):{width}}  {shape:>10}  {own}".rstrip())
        if hidden:
            more = Counter(remark for state in hidden for remark in remarks[state.name])
            counts = "".join(f"; {number} {remark}" for remark, number in more.items())
            lines.append(f"  and {len(hidden)} more, see reg.names{counts}")
        if self._skipped:
            groups: dict[str, list[str]] = {}
            for name, why in self._skipped.items():
                groups.setdefault(str(why), []).append(name)
            if len(groups) > _SHOWN:
                groups = {}
                for name, why in self._skipped.items():
                    groups.setdefault(why.reason.value, []).append(name)
            listed = "; ".join(f"{list_some(some, 2)} ({why})" for why, some in groups.items())
            lines.append(f"  skipped {len(self._skipped)}, see reg.skipped: {listed}")
        lines += [f"  {attachment!r}" for attachment in self.attachments]
        if not self.attachments and any(state.rule.enforceable for state in self._states):
            steps = self._steps()
            lines.append(
                f"  detached after {format_count(steps, 'step')}: only enforce() applies the limits"
                if steps
                else "  not attached to an optimizer: only enforce() applies the limits"
            )
        return "\n".join(lines)

    def _steps(self) -> int:
        """The number of steps that the regulariser has taken or watched."""
        return max(state.step for state in self._states)

    def _remarks(self, state: WeightState) -> list[str]:
        """Why a rule does not act on a weight, or acts on it incompletely."""
        remarks = []
        attached = [id(one) for attachment in self.attachments for one in attachment.states]
        if not state.active:
            remarks.append("now frozen: not regularised")
        elif attached and id(state) not in attached:
            remarks.append("not in an attached optimizer: no rule is applied in training")
        if state.caution:
            remarks.append(f"{state.caution}: the rule acts on that, not on the effective weight")
        if not state.shortened.is_meta and (shortened := int(state.shortened)):
            remarks.append(
                f"{format_count(shortened, 'proximal step')} {'was' if shortened == 1 else 'were'} "
                "shortened, because the block has only "
                f"{state.width} singular triplets; raise block_size={self.block_size}"
            )
        if not state.crowded.is_meta and bool(state.crowded):
            remarks.append(
                f"all {state.width} singular values of the block are near the largest, so others "
                f"near it may get no gradient; raise block_size={self.block_size}"
            )
        return remarks

    def _facts(self, state: WeightState, remarks: list[str]) -> list[str]:
        """The facts about a weight that repr() shows, its rule first."""
        text = state.describe(any(one.is_paced(state) for one in self.attachments))
        return [repr(state.rule), *remarks, *text.splitlines()]

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the state per weight name: copies, as tensors of fixed shape."""
        self._engine.settle()
        return {state.name: state.state() for state in self._states}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `state_dict()`: training continues bit for bit.

        Raises:
            ValueError: the weights, their shapes or the width of the block differ; nothing has
                changed.
            TypeError: state is not a mapping of names to mappings of tensors.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                "`state` must be a mapping of weight names, as state_dict() returns it, got "
                f"{type(state).__name__}."
            )
        missing, extra = set(self.names) - set(state), set(state) - set(self.names)
        if missing or extra:
            raise ValueError(
                "`state` must have exactly the weights of this regulariser, but "
                f"lacks {quote_names(missing)} and additionally has {quote_names(extra)}. "
                "Create the Regularizer with the patterns with which the state was saved."
            )
        for own_state in self._states:
            own_state.check(state[own_state.name])
        for own_state in self._states:
            own_state.restore(state[own_state.name])

    def checksums(self) -> dict[str, Tensor]:
        """Returns a checksum of the bits of every regularised parameter, by its name and dtype.

        A trainer can check with it that a checkpoint has restored the weights that were saved with
        it. Sharded weights are skipped.

        Raises:
            ValueError: a weight is a meta tensor, which has no values; the error names it.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8), wc.ConditionPenalty(0.1))
            >>> list(reg.checksums())
            ['weight torch.float32']
        """
        with name_meta_weights(self._states):
            return {
                f"{state.weight.aliases[0]} {parameter.dtype}": checksum(parameter).cpu()
                for state in self._states
                for parameter in state.weight.parameters
                if not is_sharded(parameter)
            }


def _excess(state: WeightState) -> float:
    """By what factor a weight exceeded its limit before the last application; 0 if unknown."""
    record = state.record
    known = [record.largest, record.excess, state.pace.excess]
    return next((number for number in known if not math.isnan(number)), 0.0)


def _refuse_without_gradient(states: list[WeightState]) -> None:
    bare = [state.name for state in states if not state.rule.differentiable]
    if bare:
        raise ValueError(
            f"{quote_subject(bare)} under a hard limit or IsometryStep, which has no gradient. "
            "Use attach(optimizer) or proximal_step(lr). If other weights have a penalty in the "
            "loss or on the gradients, create a separate Regularizer for them."
        )


def refuse_without_proximal_step(states: list[WeightState]) -> None:
    for state in states:
        rule, S = state.rule, state.operator()
        if not rule.steppable:
            raise ValueError(
                f'"{state.name}" is under {rule!r}, which has no proximal step. Use reg() in the '
                "loss or add_gradients(), or give the penalty a `proximal_step` method."
            )
        if Need.whole in rule.needs and isinstance(S, Dense):
            try:
                S.dense()
            except ValueError as error:
                raise ValueError(f'"{state.name}": {error}') from None
        if not isinstance(S, Updatable):
            raise ValueError(
                f'"{state.name}" cannot be changed in place, because it is computed from '
                "several parameters. Use reg() in the loss or add_gradients()."
            )


def _refuse_sparse_gradients(states: list[WeightState]) -> None:
    grads = [(state.name, p.grad) for state in states for p in state.weight.parameters]
    sparse = [name for name, grad in grads if grad is not None and grad.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"Gradients must be dense, but the gradient of {quote_names(sparse)} is sparse. "
            "Exclude the weight with a pattern, create the layer with sparse=False, or use "
            "attach(optimizer)."
        )
