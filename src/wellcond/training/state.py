"""The state of each regularised weight: its block, its counts and the state of its rule.

Letters: S (..., m, n) a weight; k the width of its block.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wellcond.linalg.checks import lacks_values
from wellcond.linalg.projection import GramDecomposition
from wellcond.operators.base import WeightOperator
from wellcond.operators.convolution import Geometry
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import Subspace, by_columns, cold_start
from wellcond.operators.views import is_kernel
from wellcond.rules.base import Movement, Need, Rule, RuleState
from wellcond.rules.outcome import Worst
from wellcond.rules.pace import Pace
from wellcond.rules.watch import LARGEST, EndsWatch, Watch
from wellcond.text import format_count, format_times, quote_names
from wellcond.training.record import Record
from wellcond.weights.discover import Weight

_WATCH = "watch."  # prefix of the keys of the state of a watch
_OFTEN = 0.2  # share of the steps above which a limit works against the optimizer
_SMALL = 1024  # largest number of singular values for which large tensors of a watch are saved


class WeightState:
    """A weight under a rule, and its state."""

    def __init__(self, weight: Weight, rule: Rule, block_size: int) -> None:
        self.weight = weight
        self.caution = weight.caution  # what the stored tensor is, if not the effective weight
        self.rule = rule = _bind(rule, weight)
        self._operator: StoredMatrix | None = None
        self.step = 0  # applications: optimizer steps when attached
        try:
            S = self.operator()
        except ValueError as error:
            raise ValueError(f'"{weight.name}": {error}') from None
        self.shape = S.shape
        self.is_one_map = bool(getattr(S, "is_one_map", False))
        self.width = min(block_size, S.nu) if Need.subspace in rule.needs else 0
        self._start(S)
        self.owner = 0  # the process that refines it, among replicas
        self.slots: tuple[int, ...] = ()  # the numbers of its parameters, which weights can share
        # Since the last proximal step: optimizer steps, and the sum of their learning rates.
        self.pending_steps = 0
        self.pending_lr: float | Tensor = 0.0
        # How it is watched, or why it cannot be; None if it is not attached or has no limit.
        self.watch: Watch | str | None = None
        self.record = Record(mark=rule.mark)
        self.sight: RuleState = {}  # the state of the watch
        self._saves_large = False
        self._saved: Mapping[str, Tensor] = {}  # the loaded state of a watch that has not started
        self.memory: RuleState = {}
        own = self.state().keys()
        self.memory = rule.init(self.shape)  # of the rule
        if taken := own & self.memory.keys():
            raise ValueError(
                f"`{type(rule).__name__}.init` must return keys of its own, but {sorted(taken)} "
                "are reserved. Choose other names."
            )
        self.failed = False  # whether the last step or limit could not be applied

    def _start(self, S: WeightOperator) -> None:
        """Sets up a cold block: the weights can still be loaded before its first use."""
        self.subspace = cold_start(S, self.width, self.weight.name)
        self.warm = False
        self.strength = torch.zeros((), dtype=S.dtype, device=S.device)
        self.shortened = torch.zeros((), dtype=torch.int64, device=S.device)
        self.crowded = torch.zeros((), dtype=torch.bool, device=S.device)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def active(self) -> bool:
        """Whether it is trained: frozen weights are skipped."""
        return self.weight.trained

    @property
    def follows_subspace(self) -> bool:
        """Whether a block of leading singular vectors is kept."""
        return self.width > 0

    def operator(self, parameters: Sequence[Tensor] | None = None) -> WeightOperator:
        """The weight as a linear map, with `parameters` in place of its own if given."""
        if parameters is None and (S := self._operator) is not None:
            (parameter,) = self.weight.parameters
            if S.shows(parameter):
                return S
        tensors = self.weight.parameters if parameters is None else parameters
        seed = (zlib.crc32(self.name.encode()) << 31) + self.step
        made = self.weight.operator(tensors, seed)
        # Cached, because creating one costs as much as a product with a small weight.
        if parameters is None:
            self._operator = made if type(made) is StoredMatrix and made.is_lasting else None
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which is not attached; once it is, its watch continues from here."""
        saved = {**self._saved, **self._watch_state()}
        return {**self.__dict__, "_operator": None, "watch": None, "sight": {}, "_saved": saved}

    def follow(self, S: WeightOperator) -> None:
        """Moves the state to the current device and dtype of the weight."""
        if self.strength.is_meta and S.device.type != "meta":
            self._start(S)  # created for a model without values: there is nothing to move
        elif (self.strength.device, self.strength.dtype) != (S.device, S.dtype):
            self.strength = self.strength.to(S.device, S.dtype)
            self.subspace = self._convert(self.subspace)
            self.shortened = self.shortened.to(S.device)
            self.crowded = self.crowded.to(S.device)
            self.sight = {
                key: own if own.is_meta else own.to(S.device, S.dtype, copy=True)
                for key, own in self.sight.items()
            }
        if S.device.type != "meta" and any(own.is_meta for own in self.sight.values()):
            self._start_sight(S)

    def _convert(self, subspace: Subspace) -> Subspace:
        """A copy on the device and in the dtype of the weight, orthonormal in that dtype."""
        basis = by_columns(subspace.basis.to(self.strength, copy=True))
        if basis.dtype != subspace.basis.dtype:
            basis = torch.linalg.qr(basis).Q
        return Subspace(basis, subspace.from_right)

    def remember(self, subspace: Subspace) -> None:
        self.subspace, self.warm = subspace, True

    def advance(self, steps: int = 1) -> None:
        """Counts applications of the penalty."""
        self.step += steps

    def gather(self, lr: float | Tensor) -> None:
        """Counts a step of the optimizer, at this learning rate, towards the next proximal step."""
        self.advance()
        self.pending_steps += 1
        self.pending_lr = self.pending_lr + lr

    @property
    def pace(self) -> Pace:
        """The statistics of the rule's applications."""
        return self.rule.pace(self.memory)

    @property
    def movement(self) -> Movement:
        """How far the weight might have moved since the last application."""
        return Movement(self.pending_steps, self.pending_lr)

    @property
    def due(self) -> bool:
        """Whether the rule is due."""
        return self.rule.is_due(self.memory, self.movement)

    def learn(self, outcome: Worst, due: bool) -> None:
        """Updates the state of the rule with an application; `due`: by the movement, not a call."""
        movement = self.movement if due else None
        self.memory = self.rule.learn(self.memory, outcome, movement)

    def start_watch(self, bitwise: bool) -> None:
        """Starts to watch it, or continues from the loaded state."""
        self.watch = self.rule.watch(min(self.shape[-2:]))
        if self.is_one_map and isinstance(self.watch, EndsWatch):
            self.watch = "its groups are the blocks of one map"
        self._start_sight(self.operator())
        self._saves_large = bitwise
        saved, self._saved = self._saved, {}
        self._restore_watch(saved)

    def _start_sight(self, S: WeightOperator) -> None:
        if isinstance(self.watch, Watch):
            self.sight = self.watch.init(S)

    def end_watch(self) -> None:
        """Stops watching it and discards the state of the watch."""
        self.watch, self.sight, self._saved = None, {}, {}

    @property
    def is_too_large(self) -> bool:
        """Whether it is too large to be decomposed at every step."""
        return isinstance(self.watch, str) and min(self.shape[-2:]) > LARGEST

    @property
    def is_followed(self) -> bool:
        """Whether estimates decide when it is projected; else it is decomposed at every step."""
        return isinstance(self.watch, Watch) and not self.record.is_blind

    def judge(self, numbers: Sequence[Sequence[float]]) -> None:
        """Updates the record with the numbers of a check."""
        assert isinstance(self.watch, Watch)
        self.record.judge(self.watch.judge(numbers, self.is_one_map), self.watch)

    def renew(self, outcome: Worst, moved: bool, spectrum: GramDecomposition | None) -> None:
        """Updates the record and the blocks with the result of a decomposition."""
        excess, kappa = outcome.excess, outcome.condition_number
        new = None
        if isinstance(self.watch, Watch):
            new = self.watch.renew(None if math.isnan(excess) else spectrum)
        known = new is not None
        if new is not None:
            self.sight |= {key: own.to(self.sight[key], copy=True) for key, own in new.items()}
        self.record.decompose(excess, kappa, moved, known)

    def describe(self, paced: bool) -> str:
        """Describes the applications of its rule to the user; `paced`: due by learning rates."""
        if self.watch is None:
            return self.rule.describe(self.memory)
        record = self.record
        if self.is_followed:
            lines = [f"watched: {self.rule.describe_watch()}"]
        else:
            blind = "its small singular vectors turn too fast for this K"
            why = self.watch if isinstance(self.watch, str) else blind
            how = "scheduled by its learning rates" if paced else "decomposed at every step"
            lines = [f"not watched, because {why}: {how}"]
            if paced:
                return "\n".join([*lines, *filter(None, [self.rule.describe(self.memory)])])
        if record.steps:
            projected, decomposed = map(format_times, (record.applications, record.decompositions))
            steps = format_count(record.steps, "step")
            lines.append(f"projected {projected} in {steps}, decomposed {decomposed}")
        if not math.isnan(record.largest):
            lines.append(f"at most {record.largest:.4g} times its limit since the last report")
        if record.recent > _OFTEN:
            lines.append(
                "projected in more than one step in five: the learning rate is too high for this "
                "limit"
            )
        return "\n".join(lines)

    def _saved_sight(self) -> RuleState:
        """The state of the watch to save: all tensors or none, because they belong together."""
        if not isinstance(self.watch, Watch):
            return {}
        large = bool(self.watch.large & self.sight.keys())
        if large and min(self.shape[-2:]) > _SMALL and not self._saves_large:
            return {}
        return self.sight

    def _restore_watch(self, saved: Mapping[str, Tensor]) -> None:
        self.record = Record(mark=self.rule.mark)
        if self.watch is None:
            self._saved = {key: own.clone() for key, own in saved.items() if key.startswith(_WATCH)}
            return
        numbers = saved.get(f"{_WATCH}record")
        if numbers is None or numbers.shape != self.record.to_tensor().shape:
            return
        record = Record.from_tensor(numbers)
        if record.mark != self.record.mark:
            return
        self.record = record
        found = {key: saved.get(_WATCH + key) for key in self.sight}
        if all(own is not None and own.shape == self.sight[k].shape for k, own in found.items()):
            self.sight = {
                key: own.to(self.strength, copy=True)
                for key, own in found.items()
                if own is not None
            }
        else:
            self.record.due = True  # the blocks are unknown: decompose it at the next step

    def settle(self) -> None:
        """Resets the pending steps and learning rates."""
        self.pending_steps, self.pending_lr = 0, 0.0

    def state(self) -> dict[str, Tensor]:
        """The state as tensors of fixed shape; the basis fills the first rows of its tensor."""
        basis, from_right = self.subspace
        *stack, rows, width = basis.shape
        padded = basis.new_zeros(*stack, max(self.shape[-2:]), width)
        padded[..., :rows, :] = basis
        return {
            "shape": torch.tensor(self.shape, device="cpu"),
            "basis": padded,
            "from_right": torch.tensor(from_right, device="cpu"),
            "warm": torch.tensor(self.warm, device="cpu"),
            "step": torch.tensor(self.step, device="cpu"),
            "shortened_steps": self.shortened.clone(),
            "pending_steps": torch.tensor(self.pending_steps, device="cpu"),
            "pending_lr": torch.as_tensor(self.pending_lr, dtype=torch.float64, device="cpu"),
            **{key: own.clone() for key, own in self.memory.items()},
            **self._saved,
            **self._watch_state(),
        }

    def _watch_state(self) -> dict[str, Tensor]:
        if self.watch is None:
            return {}
        saved = {_WATCH + key: own.clone() for key, own in self._saved_sight().items()}
        return {f"{_WATCH}record": self.record.to_tensor(), **saved}

    def check(self, saved: Mapping[str, Tensor]) -> None:
        """Raises unless `saved` is the state of a weight of this kind."""
        remedy = (
            "Create the Regularizer with the model, the rules and the block_size with which the "
            "state was saved."
        )
        if not isinstance(saved, Mapping):
            raise TypeError(
                f'`state["{self.name}"]` must be a mapping of tensors, got {type(saved).__name__}.'
            )
        for key, own in saved.items():
            if key.startswith(_WATCH) and not isinstance(own, Tensor):
                at = f'`state["{self.name}"]["{key}"]`'
                raise TypeError(f"{at} must be a tensor, got {type(own).__name__}.")
        for key, own in self.state().items():
            if key.startswith(_WATCH) or (key in self.memory and key not in saved):
                continue  # saved by a version or a rule without this key: it starts anew
            at, found = f'`state["{self.name}"]["{key}"]`', saved.get(key)
            if not isinstance(found, Tensor | None):
                raise TypeError(f"{at} must be a tensor, got {type(found).__name__}.")
            if found is None or found.shape != own.shape:
                shape = "none" if found is None else tuple(found.shape)
                raise ValueError(f"{at} must have shape {tuple(own.shape)}, got {shape}. {remedy}")
            if found.is_floating_point() != own.is_floating_point():
                kind = "floating point" if own.is_floating_point() else "integers"
                raise ValueError(f"{at} must be {kind}, got {found.dtype}.")
            if key == "shape" and found.tolist() != own.tolist():
                raise ValueError(f"{at} must be {own.tolist()}, got {found.tolist()}. {remedy}")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.strength.is_meta:  # keep the values on the CPU until the weight has values
            self.strength, self.shortened = (
                torch.zeros((), dtype=one.dtype, device="cpu")
                for one in (self.strength, self.shortened)
            )
        from_right = bool(state["from_right"])
        rows = self.shape[-1] if from_right else self.shape[-2]
        self.subspace = self._convert(Subspace(state["basis"][..., :rows, :], from_right))
        self.warm = bool(state["warm"])
        self.shortened = state["shortened_steps"].to(self.shortened, copy=True)
        self.step = int(state["step"])
        self.pending_steps = int(state["pending_steps"])
        self.pending_lr = float(state["pending_lr"])
        self.memory = self.rule.restore(self.rule.init(self.shape), state)
        self._restore_watch(state)


def _bind(rule: Rule, weight: Weight) -> Rule:
    """The rule of a weight; for a convolution with acting=True, the rule for that operator."""
    if not rule.acting or not is_kernel(weight.view):
        return rule
    geometry = weight.geometry
    if not isinstance(geometry, Geometry):
        raise ValueError(
            f'"{weight.name}" cannot be limited as a convolution: {geometry}. Use '
            "acting=False, which limits the kernel as a matrix."
        )
    return rule.on_convolution(geometry)


@contextlib.contextmanager
def name_meta_weights(states: Sequence[WeightState]) -> Iterator[None]:
    """If reading a value fails, raises an error that names the weights on the meta device."""
    try:
        yield
    except RuntimeError as error:  # or NotImplementedError, which is one
        raise_meta_weights(states, error)
        raise


def raise_meta_weights(states: Sequence[WeightState], error: RuntimeError) -> None:
    """Raises an error that names the weights on the meta device, if there are any."""
    names = [s.name for s in states if any(map(lacks_values, s.weight.parameters))]
    if names:
        raise ValueError(
            f"A weight must have values, but {quote_names(names)} is a meta tensor, which has "
            "none. Load the weights first: call model.to_empty(device=...) and load_state_dict."
        ) from error
