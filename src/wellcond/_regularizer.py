"""The regulariser of a model: remembers a subspace per weight and applies penalties in three ways.

In the loss, to the gradients after backward, or as a lazy proximal step after the optimizer's. Each
way looks at all weights first, without changing anything, and only then acts: a weight that is not
finite stops it before anything is half done.

Letters: S (m, n) a weight, nu = min(m, n), k the width of its block, eta the length of a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from wellcond._attachment import Attachment
from wellcond._compiled import compiled_add_gradients_, compiled_penalty, register
from wellcond._estimates import Estimate, estimates
from wellcond._memory import Look, Memory, look, quietly
from wellcond._penalties import LowRankChange
from wellcond._report import check_interval, report, send
from wellcond._selection import Penalties, listed, select
from wellcond._sharded import operator_of, refuse_flat_parameters, replicas_of
from wellcond._weights import unwrapped

_Result = TypeVar("_Result")


def _quietly(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Outside of autograd, and in full precision under autocast."""

    @functools.wraps(method)
    def wrapped(self: Regularizer, *args: Any, **kwargs: Any) -> _Result:
        with quietly(self._entries):
            return method(self, *args, **kwargs)

    return wrapped


class Regularizer:
    """Applies penalties to the weights of a model, in the way that suits the training loop.

    1. In the loss: `loss = task_loss + reg()`. It is scaled by whatever the loss is scaled by.
    2. On the gradients: `reg.add_gradients_()` between backward and `optimizer.step()`.
    3. As a proximal step: `reg.attach(optimizer, every=10)` once, before the loop.

    Nothing of the model is touched but gradients (2) and weights (3). Per weight a block of `block`
    leading singular vectors is kept on both sides, (m + n) k numbers, and refined by one product
    with the weight per application, alternately from the right and from the left.

    Args:
        model: the model; its weights are found once, now, and tied ones counted once.
        penalties: one penalty for all weights, or a mapping of patterns (`fnmatch.fnmatchcase` on
            parameter names and view names) to a penalty, or to None to leave out. The first pattern
            that matches wins. Embeddings and parameters of unknown modules are taken only when a
            pattern is exactly their name.
        block: width k of the leading subspace, at most nu. Under a strong penalty many singular
            values meet at the top, and all of them must be in the block: with strength 1 kappa
            ended 71, 14, 4 and 2 % above that of an exact SVD in every step for a block of 8, 16,
            32 and 64 (`wellcond bench fidelity --block 8,16,32,64`, 784-512-10 net on digits).

    Raises:
        ValueError: no weight is left to regularise, a pattern matches nothing, block < 1, or a
            pattern asks for something that is no matrix.
        TypeError: penalties is neither a penalty nor a mapping to penalties.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
        >>> reg = wc.Regularizer(model, {"0.*": wc.Condition(1e-2), "*": None})
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
        penalties: Penalties,
        *,
        block: int = 32,
        process_group: Any = None,
        check_replicas: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"`block` must be a whole number of at least 1, got {block!r}.")
        refuse_flat_parameters(model)
        self.block = block
        self.check_replicas = check_replicas
        self._attachments: list[Attachment[Memory]] = []
        self._flags: tuple[list[str], Tensor, Any] | None = None
        chosen, self._skipped = select(unwrapped(model), penalties)
        self._entries = [Memory(weight, penalty, block) for weight, penalty in chosen]
        slots: dict[tuple[int, str], int] = {}
        for entry in self._entries:
            parameter = id(entry.weight.owner), entry.weight.attribute
            entry.slot = slots.setdefault(parameter, len(slots))
        self._replicas = replicas_of(model, process_group)
        if self._replicas is not None:
            costs = [math.prod(entry.operator().shape) * entry.width for entry in self._entries]
            for entry, owner in zip(self._entries, self._replicas.owners(costs), strict=True):
                entry.owner = owner
        self._key = register(self)

    # --- the three ways ---------------------------------------------------------------------------

    def __call__(self) -> Tensor:
        """The sum of strength * penalty over the weights, a scalar to add to the loss.

        A lower estimate of the true sum. Its gradient with respect to every weight is that of
        `add_gradients_`. Under `torch.no_grad()` nothing is remembered.

        Raises:
            ValueError: a weight holds NaN or infinity; it is named. On the CPU at once, elsewhere
                at the next call, where reading costs no waiting.
        """
        _refuse_without_gradient(self._entries)
        parameters = self._parameters()
        remember = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return compiled_penalty(parameters, self._key, remember)
        total, factors = self.total_(parameters, remember)
        result: Tensor = _Total.apply(self, total, len(factors), *factors, *parameters)  # type: ignore[no-untyped-call]
        return result

    @_quietly
    def total_(
        self, parameters: Sequence[Tensor], remember: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalties of these parameters, and of each weight its gradient's c, U and V.

        For the compiler; call the regulariser itself.
        """
        active = self._active()
        first = self._entries[0].strength
        total = torch.zeros((), dtype=first.dtype, device=first.device)
        changes: dict[str, LowRankChange] = {}
        for seen in self._look(active, self._given(active, parameters), remember):
            penalty = seen.memories[0].penalty
            change = _masked(seen, penalty.gradient(seen.S, seen.product), identity=0.0)
            strength = _strengths(seen)
            total = total + (strength * penalty.value(seen.S, seen.product)).sum().to(total)
            scaled = (strength * change.c, _wide(strength) * change.U, change.V)
            for memory, one in zip(seen.memories, seen.each(*scaled), strict=True):
                changes[memory.name] = LowRankChange(*one)
                if remember:
                    memory.step += 1
        return total, [factor for memory in active for factor in changes[memory.name]]

    def shapes_of_total(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes of what `total_` returns, for the compiler."""
        first = self._entries[0].strength
        shapes = [parameters[0].new_empty((), dtype=first.dtype)]
        for memory in self._active():
            *stack, m, n = memory.shape
            r, dtype = memory.penalty.gradient_rank, memory.strength.dtype
            for shape in (stack, (*stack, m, r), (*stack, n, r)):
                shapes.append(parameters[0].new_empty(shape, dtype=dtype))
        return shapes

    @_quietly
    def gradients(
        self, weight: Tensor, factors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """weight times the gradient of `total_` with respect to each of the parameters.

        For the compiler; call backward.
        """
        active = self._active()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        at = self._positions(active)
        cs, Us = (list(torch._foreach_mul(list(factors[i::3]), weight)) for i in (0, 1))
        for memory, c, U, V in zip(active, cs, Us, factors[2::3], strict=True):
            S = memory.operator(parameters[at[memory.slot]])
            G = operator_of(memory.weight.view, gradients[at[memory.slot]])
            G.add_(c, S, U, V)
        return gradients

    def add_gradients_(self) -> None:
        """Adds strength * gradient to the .grad of every weight: after backward, before step.

        Once per optimizer step, whatever the accumulation of gradients. With a GradScaler, after
        `scaler.unscale_(optimizer)`; with gradient clipping, before or after it as you mean it. Not
        in an optimizer's pre-hook: frameworks that run backward inside `step(closure)` erase it.
        A weight without .grad gets one.

        Raises:
            ValueError: a weight holds NaN or infinity; it is named, and no gradient has changed.
        """
        _refuse_without_gradient(self._entries)
        _refuse_sparse_gradients(self._entries)
        parameters = self._parameters()
        gradients = [_gradient(parameter) for parameter in parameters]
        if torch.compiler.is_compiling():
            compiled_add_gradients_(gradients, parameters, self._key)
        else:
            self.add_gradients_to_(gradients, parameters)

    @_quietly
    def add_gradients_to_(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Adds strength * gradient at these parameters to these gradients.

        For the compiler; call `add_gradients_`.
        """
        active = self._active()
        at = self._positions(active)
        for seen in self._look(active, self._given(active, parameters)):
            penalty = seen.memories[0].penalty
            change = _masked(seen, penalty.gradient(seen.S, seen.product), identity=0.0)
            strength = _strengths(seen)
            scaled = (strength * change.c, _wide(strength) * change.U, change.V)
            parts = zip(seen.memories, seen.operators, seen.each(*scaled), strict=True)
            for memory, S, (c, U, V) in parts:
                G = operator_of(memory.weight.view, gradients[at[memory.slot]])
                G.add_(c, S, U, V)
                memory.step += 1

    @_quietly
    def proximal_step_(self, lr: float | Tensor, steps: int = 1) -> None:
        """One proximal step of length eta = lr * strength * steps on every weight, by hand.

        One step of steps * eta is as good as many of eta: the step is implicit. `attach` does this
        by itself after every few optimizer steps.

        Args:
            lr: the learning rate of the optimizer, a number or a tensor of one.
            steps: how many optimizer steps it stands for.

        Raises:
            ValueError: lr is negative, steps < 1, or a weight holds NaN or infinity; nothing has
                changed.
        """
        if not isinstance(lr, Tensor) and not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"`lr` must be finite and not negative, got {lr}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a whole number of at least 1, got {steps!r}.")
        entries = self._active()
        self._shrink(entries, [lr * steps] * len(entries))
        for entry in entries:
            entry.step += steps

    def attach(self, optimizer: Optimizer, every: int = 10) -> Attachment[Memory]:
        """Takes a proximal step after every so many steps of the optimizer; returns a handle.

        eta = strength * the sum of the learning rates of the weight's own parameter group since the
        last proximal step, so warm-up and schedules count as they should. Steps that a GradScaler
        skips do not count. `handle.remove()` or `detach()` ends it.

        The regulariser is kept alive by the optimizer, not the other way round. A copy or an
        unpickled optimizer carries no hooks; when the attached one is gone and another one steps
        the weights, a warning says so once.

        Args:
            optimizer: a torch optimizer that holds at least one of the weights.
            every: proximal step after every so many optimizer steps. kappa was within 1.3 % of an
                exact proximal step in every step for 5 and for 10 (`wellcond bench fidelity
                --every 5,10,20`); steps at the end that do not fill an interval stay pending.

        Raises:
            ValueError: every < 1, no common weight, or a weight that is attached already.
            TypeError: not a torch optimizer.
        """
        # A wrapper may call itself an optimizer and yet have no hooks.
        hooked = hasattr(optimizer, "_optimizer_step_post_hooks")
        if not (isinstance(optimizer, Optimizer) and hooked):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "If it wraps one, attach to that: accelerate's is `optimizer.optimizer`."
            )
        check_interval(every)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        entries = [entry for entry in self._entries if id(entry.weight.parameter) in held]
        if not entries:
            raise ValueError(
                "`optimizer` must hold a regularised weight, but has none of "
                f"{listed(self.names)}. Attach the optimizer that was made from this model."
            )
        taken = [e.name for a in self.attachments for e in a.entries if e in entries]
        if taken:
            raise ValueError(
                f"`optimizer` must not be attached twice, but {listed(taken)} is attached already. "
                "Call detach() first."
            )
        attachment = Attachment(optimizer, entries, every, self._step_pending)
        self._attachments = [*self.attachments, attachment]
        return attachment

    def detach(self) -> None:
        """Ends all attachments; optimizer steps since the last proximal step stay pending."""
        for attachment in self._attachments:
            attachment.remove()

    @property
    def attachments(self) -> list[Attachment[Memory]]:
        """The attachments that have not been removed."""
        return [attachment for attachment in self._attachments if not attachment.removed]

    @_quietly
    def _step_pending(self, entries: list[Memory]) -> None:
        entries = [entry for entry in entries if entry.active]
        self._shrink(entries, [entry.pending_lr for entry in entries])
        for entry in entries:
            entry.pending_lr, entry.pending_steps = 0.0, 0

    def _shrink(self, entries: list[Memory], rates: Iterable[float | Tensor]) -> None:
        rate_of = dict(zip((entry.name for entry in entries), rates, strict=True))
        for seen in self._look(entries):
            penalty = seen.memories[0].penalty
            if not penalty.has_gradient:
                self._limit(seen)
                continue
            eta = _lengths(seen, [rate_of[memory.name] for memory in seen.memories])
            change, shortened = penalty.proximal_step(seen.S, seen.product, eta)
            assert isinstance(change, LowRankChange)
            changes = seen.each(*_masked(seen, change, identity=1.0), shortened)
            parts = zip(seen.memories, seen.operators, changes, strict=True)
            for memory, S, (c, U, V, short) in parts:
                S.update_(c, U, V)
                memory.shortened += short.sum()
        if self.check_replicas:
            self._compare_replicas(entries)

    def _limit(self, seen: Look) -> None:
        """A hard limit gives the values to store; of replicas, one finds them."""
        (memory,), (S,) = seen.memories, seen.operators
        if self._replicas is None or self._replicas.rank == memory.owner:
            values, _ = memory.penalty.proximal_step(S, None, memory.strength)
            assert isinstance(values, Tensor)
            values = values.contiguous()
        else:
            values = torch.empty(S.shape, dtype=S.dense().dtype, device=S.device)
        if self._replicas is not None:
            self._replicas.exchange_([(memory.owner, values)])
        S.store_(values)

    def _compare_replicas(self, entries: list[Memory]) -> None:
        if self._replicas is None:
            return
        parameters = [entry.weight.parameter for entry in entries]
        names = [entries[index].name for index in self._replicas.differing(parameters)]
        if names:
            raise RuntimeError(
                f"{listed(names)} is not the same on all processes of the group. Look for a step "
                "that not all of them take, or for numbers drawn from another seed."
            )

    # --- looking at the weights -------------------------------------------------------------------

    def _active(self) -> list[Memory]:
        return [entry for entry in self._entries if entry.active]

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters of the active weights, those of several views once."""
        first = {entry.slot: entry for entry in reversed(self._active())}
        return [first[slot].weight.parameter for slot in sorted(first)]

    @staticmethod
    def _positions(active: list[Memory]) -> dict[int, int]:
        """Where in `_parameters()` that of a slot is."""
        return {slot: index for index, slot in enumerate(sorted({e.slot for e in active}))}

    def _given(self, active: list[Memory], parameters: Sequence[Tensor]) -> list[Tensor]:
        at = self._positions(active)
        return [parameters[at[entry.slot]] for entry in active]

    def _look(
        self,
        entries: list[Memory],
        parameters: Sequence[Tensor] | None = None,
        remember: bool = True,
    ) -> list[Look]:
        """One product with every weight; raises before anything is remembered or changed."""
        self._raise_earlier()
        looks = look(entries, parameters, self._replicas if remember else None)
        self._check(looks)
        if remember:
            for seen in looks:
                seen.remember()
        return looks

    def _check(self, looks: list[Look]) -> None:
        """Raises for weights that are not finite: now on the CPU, elsewhere at the next call."""
        if not looks:
            return
        names = [memory.name for seen in looks for memory in seen.memories]
        flags = torch.cat([seen.finite.reshape(len(seen.memories), -1).all(-1) for seen in looks])
        if flags.is_cpu:
            _raise_not_finite(names, flags)
            return
        copied = flags.to("cpu", non_blocking=True)
        event = torch.Event(flags.device)
        event.record()
        self._flags = names, copied, event

    def _raise_earlier(self) -> None:
        if self._flags is not None and self._flags[2].query():
            names, flags, _ = self._flags
            self._flags = None
            _raise_not_finite(names, flags)

    @_quietly
    def measure(self) -> dict[str, Estimate]:
        """An estimate for every weight: two products each, no SVD, nothing remembered.

        Returns:
            Per weight name an `Estimate`; a stack has one entry a matrix, `name:0`, `name:1`, ...
            A weight that is zero or not finite is reported by its status.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8, bias=False), wc.Condition(0.1))
            >>> reg.measure()["weight"].shortened_steps
            0
        """
        return estimates(self._entries, self.block)

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
        sum of the penalties at strength 1, the smallest and the median share of the stable rank,
        ||S||_F^2/(nu sigma_max^2), which is 1 exactly for kappa = 1, shortened steps, and how many
        weights could not be measured. One copy from the device.

        Args:
            target: TensorBoard's SummaryWriter, a run of wandb, a logger of Lightning, a
                LightningModule, an Accelerator, or a callable (values, step).
            step: of the training; by default the number of applications so far.
            every: report when the step is a multiple of it.
            layers: also the series of every weight.
            prefix: before every name.

        Returns:
            What was logged by name, or None at a step without a report.

        Raises:
            ValueError: every < 1.
            TypeError: a target that is none of these.

        Example:
            >>> import torch, wellcond as wc
            >>> reg = wc.Regularizer(torch.nn.Linear(8, 8), wc.Condition(0.1))
            >>> values = reg.log(lambda values, step: None, step=200)
            >>> 0 < values["wellcond/stable_rank_share/smallest"] <= 1
            True
        """
        check_interval(every)
        step = max(entry.step for entry in self._entries) if step is None else step
        if step % every:
            return None
        values = report(self.measure(), layers, prefix)
        send(values, target, step)
        return values

    # --- what is regularised ----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the regularised weights, the keys of `measure` and of the state."""
        return [entry.name for entry in self._entries]

    @property
    def skipped(self) -> dict[str, str]:
        """Every other parameter, and why it is left out."""
        return dict(self._skipped)

    def __repr__(self) -> str:
        lines = [f"Regularizer of {len(self._entries)} weights, block={self.block}"]
        width = max(len(name) for name in (*self.names, *self._skipped))
        for entry in self._entries:
            shape = "x".join(map(str, entry.operator().shape))
            frozen = "" if entry.active else "  frozen since: not regularised"
            lines.append(f"  {entry.name:{width}}  {shape:>10}  {entry.penalty!r}{frozen}")
            if shortened := int(entry.shortened):
                lines.append(
                    f"  {'':{width}}  {shortened} proximal steps were shortened: {entry.width} "
                    f"singular triplets do not reach further; raise block={self.block}"
                )
        if self._skipped:
            lines.append(f"  left out ({len(self._skipped)}):")
            lines += [f"  {name:{width}}  {reason}" for name, reason in self._skipped.items()]
        lines += [f"  {attachment!r}" for attachment in self.attachments]
        return "\n".join(lines)

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The memory per weight name, as tensors of fixed shape; copies, safe to keep."""
        return {e.name: {k: v.clone() for k, v in e.state().items()} for e in self._entries}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `state_dict()`: training goes on bit for bit as it would have.

        Raises:
            ValueError: other weights, other shapes or another width of the block; nothing changed.
        """
        missing, extra = set(self.names) - set(state), set(state) - set(self.names)
        if missing or extra:
            raise ValueError(
                "`state` must hold the weights of this regulariser, but "
                f"lacks {listed(missing)} and has {listed(extra)} besides. "
                "Make the Regularizer with the patterns with which the state was saved."
            )
        for entry in self._entries:
            for key, own in entry.state().items():
                saved = state[entry.name].get(key)
                if saved is None or saved.shape != own.shape:
                    found = "none" if saved is None else tuple(saved.shape)
                    raise ValueError(
                        f'`state["{entry.name}"]["{key}"]` must have shape {tuple(own.shape)}, got '
                        f"{found}. Make the Regularizer with the model and the block with which "
                        "the state was saved."
                    )
                if saved.is_floating_point() != own.is_floating_point():
                    kind = "floating point" if own.is_floating_point() else "whole numbers"
                    raise ValueError(
                        f'`state["{entry.name}"]["{key}"]` must be {kind}, got {saved.dtype}.'
                    )
        for entry in self._entries:
            entry.restore(state[entry.name])


def _refuse_sparse_gradients(entries: list[Memory]) -> None:
    grads = [(entry.name, entry.weight.parameter.grad) for entry in entries]
    sparse = [name for name, grad in grads if grad is not None and grad.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"A gradient must be dense, but that of {listed(sparse)} is sparse. Leave the weight "
            "out with a pattern, make the layer with sparse=False, or use attach(optimizer)."
        )


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient in the memory layout of its parameter, so that one view serves both."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return parameter.grad


def _masked(seen: Look, change: LowRankChange, identity: float) -> LowRankChange:
    """The change, or none where the weight is not finite; without asking the host.

    On the CPU such a weight has been refused already.
    """
    finite = seen.finite
    if finite.is_cpu:
        return change
    c = torch.where(finite, change.c, identity)
    U, V = (torch.where(_wide(finite), x, 0.0) for x in (change.U, change.V))
    return LowRankChange(c, U, V)


def _wide(x: Tensor) -> Tensor:
    return x[..., None, None]


def _strengths(seen: Look) -> Tensor:
    """The strengths of the weights at their steps, on the device."""
    return _lengths(seen, [1.0] * len(seen.memories))


def _lengths(seen: Look, rates: Sequence[float | Tensor]) -> Tensor:
    """strength * rate: one number if all are equal, else one a weight. Asks nothing of the host."""
    memories = seen.memories
    strengths = [memory.penalty.strength_at(memory.step) for memory in memories]
    rates = [rate.reshape(()) if isinstance(rate, Tensor) else rate for rate in rates]
    keys = [id(rate) if isinstance(rate, Tensor) else rate for rate in rates]
    if len(set(zip(strengths, keys, strict=True))) == 1:
        return memories[0].strength.fill_(strengths[0]) * rates[0]
    each = [m.strength.fill_(s) * r for m, s, r in zip(memories, strengths, rates, strict=True)]
    return torch.stack(each).reshape(-1, *[1] * (seen.finite.ndim - 1))


class _Total(torch.autograd.Function):
    """The total of the penalties, whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, reg: Regularizer, total: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.reg, ctx.count = reg, count
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        factors, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        gradients = ctx.reg.gradients(weight, factors, parameters)
        return None, None, None, *[None] * ctx.count, *gradients


def _raise_not_finite(names: list[str], finite: Tensor) -> None:
    bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(
            f"{listed(bad)} holds NaN or infinity and was left as it is. "
            "Restore the last good checkpoint, or lower the learning rate."
        )


def _refuse_without_gradient(entries: list[Memory]) -> None:
    hard = [entry.name for entry in entries if not entry.penalty.has_gradient]
    if hard:
        raise ValueError(
            f"{listed(hard)} is under a hard limit, which has no gradient. "
            "Use attach(optimizer) or proximal_step_(lr); for a penalty in the loss or on the "
            "gradients of other weights make a Regularizer of its own."
        )
