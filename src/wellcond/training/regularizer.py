"""The regulariser of a model: remembers a subspace per weight and applies penalties in three ways.

In the loss, to the gradients after backward, or as a lazy proximal step after the optimizer's.

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
from wellcond.text import escape, list_some, quote_names, quote_subject
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

_SHOWN = 5  # weights in the text of a Regularizer


class Regularizer:
    """Applies penalties to the weights of a model, in the way that suits the training loop.

    1. In the loss: `loss = task_loss + reg()`. It is scaled by whatever the loss is scaled by.
    2. On the gradients: `reg.add_gradients()` between backward and `optimizer.step()`.
    3. As a proximal step: `reg.attach(optimizer, every=10)` once, before the loop.

    Nothing of the model is touched but gradients (2) and weights (3). Per weight a block of
    `block_size` leading singular vectors is kept, at most max(m, n) k numbers, and refined by one
    product with the weight per application, alternately from the right and from the left.

    Args:
        model: the model; its weights are found once, now, and tied ones counted once.
        rules: one penalty for all weights, or a mapping of patterns (`fnmatch.fnmatchcase` on
            parameter names and view names) to a penalty, or to None to leave out. The first pattern
            that matches wins. Embeddings and parameters of unknown modules are taken only when a
            pattern is exactly their name. The keys "attention", "mlp", "head" and "embedding" stand
            for the weights of that role by their names, unless a parameter has that name.
        block_size: width k of the leading subspace, at most nu. Under a strong penalty many
            singular values meet at the top, and all of them must be in the block: with strength 1
            kappa ended 71, 14, 4 and 2 % above that of an exact SVD in every step for a block of 8,
            16, 32 and 64 (`wellcond bench fidelity --block 8,16,32,64`, 784-512-10 net on digits).
        process_group: processes that hold the same model. Each refines a share of the weights and
            hands the results to the others, so that all stay identical. By default that of
            DistributedDataParallel, if the model is wrapped by it, else none. Weights that are
            DTensors need no group.
        check_replicas: before every application, raise a RuntimeError that names the weights that
            are not the same on all of these processes. Only processes that hold the same model are
            compared: the weights of DTensors are not.

    Raises:
        ValueError: no weight is left to regularise, a pattern matches nothing, block_size < 1, a
            pattern asks for something that is no matrix, the first FSDP wraps a part of the model,
            or replicas are to be checked where nothing says which processes they are on.
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
        self._can_step = False  # until it has been looked whether all penalties have a step
        chosen, self._skipped = select(unwrapped(model), rules)
        self._states = [WeightState(weight, rule, self.block_size) for weight, rule in chosen]
        replicas = replicas_of(model, process_group, check_replicas)
        self._engine = Engine(self._states, replicas, check_replicas)
        self._compilable = Compilable(self._engine)
        self._oversights = Oversights(unwrapped(model), self._states)
        warn_of_stored(self._states)

    # --- the three ways ---------------------------------------------------------------------------

    def __call__(self) -> Tensor:
        """The sum of strength * penalty over the weights, a scalar to add to the loss.

        A lower estimate of the true sum. Its gradient with respect to every weight is that of
        `add_gradients`. Under `torch.no_grad()` nothing is remembered.

        Raises:
            ValueError: a weight holds NaN or infinity; it is named. On the CPU at once, elsewhere
                at the next call, where reading costs no waiting.
        """
        _refuse_without_gradient(self._states)
        if torch.is_grad_enabled():
            self._oversights.check_application(self.attachments, "reg()")
        return self._compilable.penalty()

    def add_gradients(self) -> None:
        """Adds strength * gradient to the .grad of every weight: after backward, before step.

        Once per optimizer step, whatever the accumulation of gradients. With a GradScaler, after
        `scaler.unscale_(optimizer)`; with gradient clipping, before or after it as you mean it. Not
        in an optimizer's pre-hook: frameworks that run backward inside `step(closure)` erase it.
        A weight without .grad gets one.

        Raises:
            ValueError: a weight holds NaN or infinity; it is named, and no gradient has changed.
        """
        _refuse_without_gradient(self._states)
        _refuse_sparse_gradients(self._states)
        self._oversights.check_application(self.attachments, "add_gradients()")
        self._compilable.add_gradients()

    def proximal_step(self, lr: float | Tensor, *, steps: int = 1) -> None:
        """One proximal step of length eta = lr * strength * steps on every weight, by hand.

        One step of steps * eta is as good as many of eta: the step is implicit. `attach` does this
        by itself after every few optimizer steps.

        Args:
            lr: the learning rate of the optimizer, a number or a tensor of one.
            steps: how many optimizer steps it stands for.

        Raises:
            ValueError: lr is negative or steps < 1; nothing has changed. A weight holds NaN or
                infinity: no penalty has taken a step, and hard limits were applied to all others.
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

        eta = strength * the sum of the learning rates of the weight's own parameter group since the
        last proximal step, so warm-up and schedules count as they should. Steps that a GradScaler
        skips do not count. `handle.remove()` or `detach()` ends it.

        The regulariser is kept alive by the optimizer, not the other way round. A copy or an
        unpickled optimizer carries no hooks; when the attached one is gone and another one steps
        the weights, a warning says so once.

        Args:
            optimizer: a torch optimizer that holds at least one of the weights. If it is a
                wrapper whose `step` is not called, as SAM in two steps, give the optimizer inside:
                `base_optimizer`.
            every: after every so many optimizer steps; steps at the end that do not fill an
                interval stay pending, and limits are applied exactly. By default 10 for penalties:
                kappa was within 1.3 % of an exact proximal step in every step for 5 and for 10
                (`wellcond bench fidelity --every 5,10,20`), and for `IsometryStep`, of which a step
                is as long whatever the interval is. By default limits of singular values are
                watched: a look at blocks of singular vectors, at every step or every few, tells
                when a weight is to be projected, so that its limit holds at every step. A weight
                that cannot be watched is decomposed at every step, and `print(reg)` names it. With
                "auto" such a weight is due by its learning rates instead: after the first step, and
                then whenever the sum of the rates is as large as the one after which its limit was
                exceeded by about a fifth; at least 1, 2, 4 and 8 steps apart, then at least 10 and
                at most 1,000, weights of different shapes in turn. So are limits of your own, which
                derive from `Limit`, and weights of more than 4,096 singular values.
            resume: "bitwise" to save all that the watch remembers, also where it is as large as a
                square weight; by default that is saved for weights of up to 1,024 singular values,
                and others are decomposed once after the state is loaded.

        Raises:
            ValueError: every < 1, "auto" for a penalty, no common weight, or a weight that is
                attached already; no learning rate for a weight under a penalty; an optimizer whose
                `step` runs no hooks. A step of the optimizer raises one for weights that hold NaN
                or infinity, after all other limits that are due were applied.
            TypeError: not a torch optimizer.
        """
        check_optimizer(optimizer)
        steps = None if every is None or every == "auto" else as_count(every, "`every`")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        states = [s for s in self._states if all(id(p) in held for p in s.weight.parameters)]
        if not states:
            raise ValueError(
                "`optimizer` must hold a regularised weight, but has none of "
                f"{quote_names(self.names)}. Attach the optimizer that was made from this model."
            )
        refuse_without_proximal_step(states)
        check_rates(optimizer, states)
        taken = [s.name for a in self.attachments for s in a.states if s in states]
        if taken:
            raise ValueError(
                f"`optimizer` must not be attached twice, but {quote_subject(taken)} attached "
                "already. Call detach() first."
            )
        if resume not in (None, "bitwise"):
            raise ValueError(f'`resume` must be None or "bitwise", got {resume!r}.')
        soft = [s.name for s in states if s.rule.default_schedule.every is not None]
        if every == "auto" and soft:
            raise ValueError(
                f'`every` must be a number, got "auto", which only hard limits can have: '
                f"{quote_subject(soft)} under another rule. Leave `every` out for 10 for "
                'penalties and "auto" for limits.'
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
        """Ends all attachments; optimizer steps since the last proximal step stay pending."""
        for attachment in self._attachments:
            attachment.remove()

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments that have not been removed."""
        return [attachment for attachment in self._attachments if not attachment.removed]

    def _step_pending(self, states: list[WeightState]) -> None:
        states = [state for state in states if state.active]
        self._oversights.check_application(self.attachments, "")
        # Whether zeros are filled shows at once: later there is nothing to count.
        first = [state for state in states if state.pace.applications == 0]
        with self._oversights.watch_zeros(first):
            rates = [state.pending_lr for state in states]
            self._engine.proximal_step(states, rates, due=True, done=WeightState.settle)

    def _watch(self, states: list[WeightState], rates: list[float]) -> list[WeightState]:
        if states[0].step % 10 == 1:
            self._oversights.check_application(self.attachments, "")
        return self._engine.watch(states, rates)

    def _project(self, states: list[WeightState]) -> None:
        # Whether zeros are filled shows at once: later there is nothing to count.
        first = [state for state in states if state.record.decompositions == 0]
        with self._oversights.watch_zeros(first):
            self._engine.project(states)

    def enforce(self) -> None:
        """Applies all hard limits, now: before weights are saved, and at the end of training.

        Penalties take no step, and for limits no step of the optimizer is pending afterwards.
        Frozen weights stay as they are, and a warning names them; `enforce` takes those of an
        averaged copy too. So does a warning name an attached optimizer in train mode, whose eval()
        makes other weights: call that first. Without a hard limit it does nothing.

        Raises:
            ValueError: a weight holds NaN or infinity, or cannot obey in its dtype, see
                `ConditionLimit`. It names all such weights; the limits of all others hold.

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
        """An estimate for every weight: a few products each, no SVD, nothing remembered.

        Five products with the vectors of the block; thirteen for a weight under a rule that keeps
        none, as a hard limit, since the vectors are found anew each time.

        Returns:
            Per weight name an `Estimate`; a stack has one entry a matrix, `name:0`, `name:1`, ...
            A weight that is zero or not finite is reported by its status.

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
        """Logs estimates at every so many steps; at the others it costs nothing.

        By default a few aggregates and the worst five weights by name: the largest sigma_max, the
        sum of the penalties at strength 1, if there are any, the smallest and the median share of
        the stable rank, ||S||_F^2/(nu sigma_max^2), which is 1 exactly for kappa = 1, shortened
        steps, blocks that are too narrow for gradients, how far hard limits were exceeded before
        they were last applied, and how many weights could not be measured, if there are any. One
        copy from the device.

        Args:
            target: TensorBoard's SummaryWriter, a run of wandb, a logger of Lightning, a
                LightningModule, an Accelerator, or a callable (values, step).
            step: of the training; by default the number of steps that it has taken or watched.
            every: report when the step is a multiple of it.
            layers: also the series of every weight.
            prefix: before every name.

        Returns:
            What was logged by name, or None at a step without a report.

        Raises:
            ValueError: every < 1.
            TypeError: another kind of target.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8), wc.ConditionPenalty(0.1))
            >>> values = reg.log(lambda values, step: None, step=200)
            >>> 0 < values["wellcond/stable_rank_share/smallest"] <= 1
            True
        """
        step = self._steps() if step is None else step
        self._oversights.check_log(self._attachments, step % as_count(every, "`every`") == 0)
        values = log(self.measure, target, step, every, layers, prefix)
        if values is not None:
            for state in self._states:
                state.record.largest = math.nan  # since the last report
        return values

    # --- what is regularised ----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the regularised weights, the keys of `measure` and of the state."""
        return [state.name for state in self._states]

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Every other parameter, and why it is left out; `str()` of a reason is the sentence."""
        return dict(self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to no optimizer: hooks are not copied with one either."""
        self._engine.settle()
        return {**self.__dict__, "_attachments": []}

    def __repr__(self) -> str:
        """About ten lines for any model: what all weights share, the worst of them, the rest."""
        count = len(self._states)
        lines = [f"Regularizer of {count} weight{'s' * (count != 1)}, block_size={self.block_size}"]
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
            lines.append(f"  and {len(hidden)} more, in reg.names{counts}")
        if self._skipped:
            groups: dict[str, list[str]] = {}
            for name, why in self._skipped.items():
                groups.setdefault(str(why), []).append(name)
            if len(groups) > _SHOWN:
                groups = {}
                for name, why in self._skipped.items():
                    groups.setdefault(why.reason.value, []).append(name)
            listed = "; ".join(f"{list_some(some, 2)} ({why})" for why, some in groups.items())
            lines.append(f"  left out {len(self._skipped)}, in reg.skipped: {listed}")
        lines += [f"  {attachment!r}" for attachment in self.attachments]
        if not self.attachments and any(state.rule.enforceable for state in self._states):
            steps = self._steps()
            lines.append(
                f"  detached after {steps} steps: enforce() applies the limits when it is called"
                if steps
                else "  attached to no optimizer: only enforce() applies the limits"
            )
        return "\n".join(lines)

    def _steps(self) -> int:
        """How many steps it has taken or watched."""
        return max(state.step for state in self._states)

    def _remarks(self, state: WeightState) -> list[str]:
        """Why a rule does not act on a weight as it could."""
        remarks = []
        attached = [id(one) for attachment in self.attachments for one in attachment.states]
        if not state.active:
            remarks.append("frozen since: not regularised")
        elif attached and id(state) not in attached:
            remarks.append("held by no optimizer that is attached: no step is taken")
        if state.caution:
            remarks.append(f"{state.caution}: the rule acts on that, not on the effective weight")
        if not state.shortened.is_meta and (shortened := int(state.shortened)):
            remarks.append(
                f"{shortened} proximal steps were shortened: {state.width} singular triplets do "
                f"not reach further; raise block_size={self.block_size}"
            )
        if not state.crowded.is_meta and bool(state.crowded):
            remarks.append(
                f"the {state.width} singular values that are followed are all near the largest: "
                f"more may be, without a gradient; raise block_size={self.block_size}"
            )
        return remarks

    def _facts(self, state: WeightState, remarks: list[str]) -> list[str]:
        """What there is to say of a weight, its rule first."""
        text = state.describe(any(one.is_paced(state) for one in self.attachments))
        return [repr(state.rule), *remarks, *text.splitlines()]

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered per weight name, as tensors of fixed shape; copies, safe to keep."""
        self._engine.settle()
        return {state.name: state.state() for state in self._states}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `state_dict()`: training goes on bit for bit as it would have.

        Raises:
            ValueError: other weights, other shapes or another width of the block; nothing changed.
            TypeError: not a mapping of names to mappings of tensors.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                "`state` must be what state_dict() returns, a mapping of names of weights, got "
                f"{type(state).__name__}."
            )
        missing, extra = set(self.names) - set(state), set(state) - set(self.names)
        if missing or extra:
            raise ValueError(
                "`state` must hold the weights of this regulariser, but "
                f"lacks {quote_names(missing)} and has {quote_names(extra)} besides. "
                "Make the Regularizer with the patterns with which the state was saved."
            )
        for own_state in self._states:
            own_state.check(state[own_state.name])
        for own_state in self._states:
            own_state.restore(state[own_state.name])

    def checksums(self) -> dict[str, Tensor]:
        """The bits of every parameter that is regularised, added up, by its name and dtype.

        To tell whether a checkpoint has restored the very weights that were saved with it. Sharded
        weights are left out.

        Raises:
            ValueError: a weight is a meta tensor, which has no values; it is named.

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
    """How many times its limit a weight was before it was applied; 0 if that is not known."""
    record = state.record
    known = [record.largest, record.excess, state.pace.excess]
    return next((number for number in known if not math.isnan(number)), 0.0)


def _refuse_without_gradient(states: list[WeightState]) -> None:
    bare = [state.name for state in states if not state.rule.differentiable]
    if bare:
        raise ValueError(
            f"{quote_subject(bare)} under a hard limit or isometry steps, which have no gradient. "
            "Use attach(optimizer) or proximal_step(lr); for a penalty in the loss or on the "
            "gradients of other weights make a Regularizer of its own."
        )


def refuse_without_proximal_step(states: list[WeightState]) -> None:
    for state in states:
        rule, S = state.rule, state.operator()
        if not rule.steppable:
            raise ValueError(
                f'"{state.name}" is under {rule!r}, which has no proximal step. Use reg() in the '
                "loss or add_gradients(), or give the penalty a method proximal_step."
            )
        if Need.whole in rule.needs and isinstance(S, Dense):
            try:
                S.dense()
            except ValueError as error:
                raise ValueError(f'"{state.name}": {error}') from None
        if not isinstance(S, Updatable):
            raise ValueError(
                f'"{state.name}" cannot be changed where it lies, because it rests on '
                "several parameters. Use reg() in the loss or add_gradients()."
            )


def _refuse_sparse_gradients(states: list[WeightState]) -> None:
    grads = [(state.name, p.grad) for state in states for p in state.weight.parameters]
    sparse = [name for name, grad in grads if grad is not None and grad.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"A gradient must be dense, but that of {quote_names(sparse)} is sparse. Leave the "
            "weight out with a pattern, make the layer with sparse=False, or use attach(optimizer)."
        )
