"""The regulariser of a model: remembers a subspace per weight and applies penalties in three ways.

In the loss, to the gradients after backward, or as a lazy proximal step after the optimizer's. Each
way looks at all weights first, without changing anything, and only then acts: a weight that is not
finite stops it before anything is half done.

Letters: S (m, n) a weight, nu = min(m, n), k the width of its block, eta the length of a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from wellcond._attachment import Attachment
from wellcond._leading import Product, Subspace, cold_start, refine, residual, top_pair, warmed
from wellcond._operators import StoredMatrix
from wellcond._penalties import LowRankChange, Penalty, with_gradient
from wellcond._selection import Penalties, listed, select
from wellcond._weights import Weight

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Estimate:
    """What one product with a weight tells of it; numbers are estimates, in float32 or wider.

    Attributes:
        sigma_max: ||S v|| for a unit vector v: a lower bound of the spectral norm sigma_1.
        residual: ||S^T u - sigma_max v||; some singular value lies this close to sigma_max.
        penalty: the penalty at strength 1, from below, for that vector.
        strength: the strength that was or would be applied at this step.
        step: how many applications (optimizer steps when attached) the weight has seen.
        shortened_steps: proximal steps that the width of the block cut short.
        status: "" when all is well, else what is the matter with the weight.
    """

    sigma_max: float
    residual: float
    penalty: float
    strength: float
    step: int
    shortened_steps: int
    status: str = ""


class _Entry:
    """A regularised weight and its memory."""

    def __init__(self, weight: Weight, penalty: Penalty, block: int) -> None:
        self.weight = weight
        self.penalty = penalty
        S = self.operator()
        self.width = min(block, S.nu) if penalty.needs_subspace else 0
        # Cold until first used: the weights may be loaded after the regulariser is made.
        self.subspace = cold_start(S, self.width, weight.name)
        self.warm = False
        device = S.S.device
        self.strength = torch.zeros((), dtype=S.dtype, device=device)
        self.shortened = torch.zeros((), dtype=torch.int64, device=device)
        self.step = 0
        # Since the last proximal step: optimizer steps, and the sum of their learning rates.
        self.pending_steps = 0
        self.pending_lr: float | Tensor = 0.0

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def active(self) -> bool:
        return self.weight.parameter.requires_grad

    def operator(self) -> StoredMatrix:
        return StoredMatrix(self.weight.view(self.weight.parameter.detach()))

    def refined(self, S: StoredMatrix) -> tuple[Product, Subspace]:
        """One product with the weight, after a few more if it is the first."""
        return refine(S, self.subspace if self.warm else warmed(S, self.subspace))

    def follow(self, device: torch.device) -> None:
        """Moves the memory to where the weight is now."""
        if self.strength.device != device:
            left, right, from_right = self.subspace
            self.subspace = Subspace(left.to(device), right.to(device), from_right)
            self.strength = self.strength.to(device)
            self.shortened = self.shortened.to(device)

    def strength_now(self) -> Tensor:
        """The strength at this step, on the device; filling asks nothing of the host."""
        return self.strength.fill_(self.penalty.strength_at(self.step))

    def state(self) -> dict[str, Tensor]:
        """The memory as tensors of fixed shape."""
        lr = self.pending_lr
        return {
            "left": self.subspace.left,
            "right": self.subspace.right,
            "from_right": torch.tensor(self.subspace.from_right),
            "warm": torch.tensor(self.warm),
            "step": torch.tensor(self.step),
            "shortened_steps": self.shortened,
            "pending_steps": torch.tensor(self.pending_steps),
            "pending_lr": torch.as_tensor(lr, dtype=torch.float64).detach().cpu(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device, dtype = self.strength.device, self.strength.dtype
        left, right = (state[side].to(device, dtype, copy=True) for side in ("left", "right"))
        self.subspace = Subspace(left, right, bool(state["from_right"]))
        self.warm = bool(state["warm"])
        self.shortened = state["shortened_steps"].to(device, copy=True)
        self.step = int(state["step"])
        self.pending_steps = int(state["pending_steps"])
        self.pending_lr = float(state["pending_lr"])


class _Look(NamedTuple):
    """What was seen of a weight, before anything is done to it."""

    entry: _Entry
    S: StoredMatrix
    product: Product | None
    subspace: Subspace
    finite: Tensor


_Result = TypeVar("_Result")


def _quietly(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Outside of autograd, and in full precision under autocast."""

    @functools.wraps(method)
    def wrapped(self: Regularizer, *args: Any, **kwargs: Any) -> _Result:
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):
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

    def __init__(self, model: nn.Module, penalties: Penalties, *, block: int = 32) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"`block` must be a whole number of at least 1, got {block!r}.")
        self.block = block
        self._attachments: list[Attachment[_Entry]] = []
        self._flags: tuple[list[str], Tensor, Any] | None = None
        chosen, self._skipped = select(model, penalties)
        self._entries = [_Entry(weight, penalty, block) for weight, penalty in chosen]

    @property
    def _device_type(self) -> str:
        return self._entries[0].weight.parameter.device.type

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
        remember = torch.is_grad_enabled()
        terms = self._terms(remember)
        first = self._entries[0].operator()
        total = torch.zeros((), dtype=first.dtype, device=first.S.device)
        for entry, value, strength, change in terms:
            parameter = entry.weight.parameter
            S = entry.weight.view(parameter)
            with torch.autocast(self._device_type, enabled=False):
                term = strength * with_gradient(S, value, change).sum()
                total = total + term.to(total)
        return total

    @_quietly
    def _terms(self, remember: bool) -> list[tuple[_Entry, Tensor, Tensor, LowRankChange]]:
        terms = []
        for look in self._look(self._active(), remember):
            entry, S, product, _, _ = look
            value = entry.penalty.value(S, product)
            change = _masked(look, entry.penalty.gradient(S, product), identity=0.0)
            # A strength of its own: the loss may be differentiated after the next fill.
            terms.append((entry, value, entry.strength_now().clone(), change))
            if remember:
                entry.step += 1
        return terms

    @_quietly
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
        for look in self._look(self._active()):
            entry, S, product, _, _ = look
            change = _masked(look, entry.penalty.gradient(S, product), identity=0.0)
            strength = entry.strength_now()
            G = StoredMatrix(entry.weight.view(_gradient(entry.weight.parameter)))
            G.add_(strength * change.c, S, strength * change.U, change.V)
            entry.step += 1

    @_quietly
    def proximal_step_(self, lr: float | Tensor, steps: int = 1) -> None:
        """One proximal step of length eta = lr * strength * steps on every weight, by hand.

        One step of steps * eta is as good as many of eta: the step is implicit. `attach` does this
        by itself after every few optimizer steps.

        Args:
            lr: the learning rate of the optimizer, a number or a tensor of one.
            steps: how many optimizer steps it stands for.

        Raises:
            ValueError: lr is negative, steps < 1, a weight is stored in half precision, or one
                holds NaN or infinity; nothing has changed.
        """
        if not isinstance(lr, Tensor) and not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"`lr` must be finite and not negative, got {lr}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a whole number of at least 1, got {steps!r}.")
        entries = self._active()
        _refuse_half(entries)
        self._shrink(entries, [lr * steps] * len(entries))
        for entry in entries:
            entry.step += steps

    def attach(self, optimizer: Optimizer, every: int = 10) -> Attachment[_Entry]:
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
            ValueError: every < 1, no common weight, a weight that is attached already, or one in
                half precision, where so small a step would vanish in rounding.
            TypeError: not a torch optimizer.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "If it wraps one, attach to that: accelerate's is `optimizer.optimizer`."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be a whole number of at least 1, got {every!r}.")
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
        _refuse_half(entries)
        attachment = Attachment(optimizer, entries, every, self._step_pending)
        self._attachments = [*self.attachments, attachment]
        return attachment

    def detach(self) -> None:
        """Ends all attachments; optimizer steps since the last proximal step stay pending."""
        for attachment in self._attachments:
            attachment.remove()

    @property
    def attachments(self) -> list[Attachment[_Entry]]:
        """The attachments that have not been removed."""
        return [attachment for attachment in self._attachments if not attachment.removed]

    @_quietly
    def _step_pending(self, entries: list[_Entry]) -> None:
        entries = [entry for entry in entries if entry.active]
        self._shrink(entries, [entry.pending_lr for entry in entries])
        for entry in entries:
            entry.pending_lr, entry.pending_steps = 0.0, 0

    def _shrink(self, entries: list[_Entry], rates: Iterable[float | Tensor]) -> None:
        for look, rate in zip(self._look(entries), rates, strict=True):
            entry, S, product, _, _ = look
            eta = entry.strength_now() * rate
            change, shortened = entry.penalty.proximal_step(S, product, eta)
            if isinstance(change, Tensor):
                S.S.copy_(change)
            else:
                S.update_(*_masked(look, change, identity=1.0))
            entry.shortened += shortened.sum()

    # --- looking at the weights -------------------------------------------------------------------

    def _active(self) -> list[_Entry]:
        return [entry for entry in self._entries if entry.active]

    def _look(self, entries: list[_Entry], remember: bool = True) -> list[_Look]:
        """One product with every weight; raises before anything is remembered or changed."""
        self._raise_earlier()
        looks = []
        for entry in entries:
            S = entry.operator()
            entry.follow(S.S.device)
            if entry.penalty.needs_subspace:
                product, subspace = entry.refined(S)
                looks.append(_Look(entry, S, product, subspace, product.finite))
            else:
                largest = torch.linalg.vector_norm(S.S, math.inf, dim=(-2, -1))
                looks.append(_Look(entry, S, None, entry.subspace, torch.isfinite(largest)))
        self._check(looks)
        if remember:
            for look in looks:
                look.entry.subspace, look.entry.warm = look.subspace, True
        return looks

    def _check(self, looks: list[_Look]) -> None:
        """Raises for weights that are not finite: now on the CPU, elsewhere at the next call."""
        if not looks:
            return
        names = [look.entry.name for look in looks]
        device = looks[0].finite.device
        flags = torch.stack([look.finite.all().to(device) for look in looks])
        if device.type == "cpu":
            _raise_not_finite(names, flags)
            return
        copied = flags.to("cpu", non_blocking=True)
        event = torch.Event(device)
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
        estimates: dict[str, Estimate] = {}
        for entry in self._entries:
            S = entry.operator()
            entry.follow(S.S.device)
            # Tikhonov keeps no subspace; for a report a fresh one is good enough.
            if entry.penalty.needs_subspace:
                product, _ = entry.refined(S)
            else:
                cold = cold_start(S, min(self.block, S.nu), entry.name)
                product, _ = refine(S, warmed(S, cold))
            numbers = torch.stack(
                [
                    top_pair(product).sigma[..., 0],
                    residual(S, product),
                    entry.penalty.value(S, product),
                    product.finite.to(S.dtype),
                ],
                dim=-1,
            )
            rows = numbers.reshape(-1, 4).tolist()
            shortened, strength = int(entry.shortened), entry.penalty.strength_at(entry.step)
            for index, (sigma, error, value, finite) in enumerate(rows):
                status = "" if sigma > 0 else "zero: every singular value is 0"
                if not finite:
                    sigma = error = value = math.nan
                    status = "not finite: it holds NaN or infinity"
                name = entry.name if numbers.ndim == 1 else f"{entry.name}:{index}"
                estimates[name] = Estimate(
                    sigma, error, value, strength, entry.step, shortened, status
                )
        return estimates

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


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient in the memory layout of its parameter, so that one view serves both."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise ValueError(f"a gradient must be dense, got {parameter.grad.layout}.")
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return parameter.grad


def _masked(look: _Look, change: LowRankChange, identity: float) -> LowRankChange:
    """The change, or none where the weight is not finite; without asking the host.

    On the CPU such a weight has been refused already.
    """
    finite = look.finite
    if finite.is_cpu:
        return change
    c = torch.where(finite, change.c, identity)
    U, V = (torch.where(finite[..., None, None], x, 0.0) for x in (change.U, change.V))
    return LowRankChange(c, U, V)


def _raise_not_finite(names: list[str], finite: Tensor) -> None:
    bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(
            f"{listed(bad)} holds NaN or infinity and was left as it is. "
            "Restore the last good checkpoint, or lower the learning rate."
        )


def _refuse_without_gradient(entries: list[_Entry]) -> None:
    hard = [entry.name for entry in entries if not entry.penalty.has_gradient]
    if hard:
        raise ValueError(
            f"{listed(hard)} is under a hard limit, which has no gradient. "
            "Use attach(optimizer) or proximal_step_(lr); for a penalty in the loss or on the "
            "gradients of other weights make a Regularizer of its own."
        )


def _refuse_half(entries: list[_Entry]) -> None:
    half = [
        entry.name
        for entry in entries
        if entry.weight.parameter.dtype in _HALF and not entry.penalty.takes_half_precision
    ]
    if half:
        raise ValueError(
            f"A proximal step needs float32 weights, but {listed(half)} is stored in half "
            "precision, where a step of 1e-3 is rounded away. Keep the weights in float32 and "
            "compute under autocast, or use add_gradients_() instead."
        )
