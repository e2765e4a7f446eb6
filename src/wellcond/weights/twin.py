"""A copy of a layer, to run forward passes without changing the layer.

The copy is in eval mode, has no bias and no hooks of users, and shares no tensor, module or state
with the layer. A layer that cannot be copied reliably is not run.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import io
import random
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wellcond.operators.rounding import full_precision

# The position of the weight among the arguments of each product; the input precedes it.
_PRODUCTS = {"linear": 1, "matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}
_PRODUCTS |= {f"conv{kind}{d}d": 1 for kind in ("", "_transpose") for d in (1, 2, 3)}
_OTHER_PRODUCTS = {"bmm", "einsum", "tensordot", "bilinear", "baddbmm", "addbmm", "mv", "addmv"}

# A copy takes at most _RATIO times the bytes of the parameters and buffers of the layer plus one
# MiB, and at most _MOST_OBJECTS objects.
_RATIO, _MIB = 4, 2**20
_MOST_OBJECTS = 100_000

# These hooks compute a weight from parameters of the module, and change nothing in eval mode.
_PURE_HOOKS = SpectralNorm, WeightNorm, BasePruningMethod
_CONSTANT = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...)),
    *(type, enum.Enum, types.ModuleType, torch.dtype, torch.device),
)


class NotTried(Exception):
    """The forward pass cannot be run without risk to the layer or its model."""


class Call(NamedTuple):
    """A product in a forward pass, with copies of its tensors at that time.

    Attributes:
        name: the name of the function.
        weight: the argument in the position of the weight.
        x: its input.
        y: its output.
        added: the tensor that the product adds, such as a bias, or None.
    """

    name: str
    weight: Tensor
    x: Tensor
    y: Tensor
    added: Tensor | None = None


class Run(NamedTuple):
    """A forward pass: its products, its output, and whether it drew random numbers."""

    calls: list[Call]
    y: Any
    draws: bool


class Twin:
    """A copy of a layer whose weight has the value `stored` when a forward pass begins."""

    def __init__(self, layer: nn.Module, stored: Tensor) -> None:
        owned = [*layer.parameters(), *layer.buffers(), stored]
        size = sum(tensor.numel() * tensor.element_size() for tensor in owned)
        copier = _Copier(_RATIO * size + _MIB)
        self._forward = type(layer).forward
        self._layer: nn.Module = copier.copy_module(layer, leave_out=("forward",))
        self._copier = copier  # keeps objects alive to which the copy has weak references
        any_global_hook: Any = torch.nn.modules.module._has_any_global_hook
        if copier.modules > 1 and any_global_hook():
            raise NotTried("global hooks would run")
        if "weight" in vars(self._layer):  # computed by a hook of the layer
            vars(self._layer)["weight"] = stored.clone()
        if isinstance(bias := self._layer._parameters.get("bias"), Tensor):
            bias.data.zero_()

    def run(self, x: Tensor, seed: int) -> Run:
        """A forward pass on a copy of the input, after seeding the global generators."""
        _seed_generators(seed, x)
        before = torch.get_rng_state(), random.getstate()
        record = _Record()
        # The first dispatch mode takes seconds, because torch then imports its compiler.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        refuse: Any = _NoCommunication() if distributed else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        with record, refuse:
            y = self._forward(self._layer, x.clone())
        draws = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
        return Run(record.calls, y, draws)

    @property
    def normalises(self) -> bool:
        """Whether the layer contains a normalisation, whose statistics change during training."""
        kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        return any(isinstance(module, kinds) for module in self._layer.modules())


@contextlib.contextmanager
def isolate(like: Tensor) -> Iterator[None]:
    """Disables gradients and autocast, isolates random states, and suppresses output.

    If the default device is "meta", which has no values, the forward pass creates tensors on the
    device of the weight.
    """
    devices = [like.device] if like.is_cuda else []
    numpy, state = sys.modules.get("numpy"), random.getstate()
    state_of_numpy = numpy.random.get_state() if numpy else None
    no_values = torch.get_default_device().type == "meta"
    try:
        with (
            full_precision(like.device.type),
            torch.random.fork_rng(devices=devices),
            like.device if no_values else contextlib.nullcontext(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(state_of_numpy)


def _seed_generators(seed: int, x: Tensor) -> None:
    """Seeds the generators whose states are restored."""
    torch.default_generator.manual_seed(seed)
    if x.is_cuda:
        torch.cuda.default_generators[x.get_device()].manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


class _Record(TorchFunctionMode):
    """Records the products of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _OTHER_PRODUCTS or (name in _PRODUCTS and {"alpha", "beta", "out"} & {*kwargs}):
            result = func(*args, **kwargs)
            self.calls.append(Call("", result, result, result))  # its shape is not that of a weight
            return result
        if name not in _PRODUCTS:
            return func(*args, **kwargs)
        at = _PRODUCTS[name]
        weight = args[at] if len(args) > at else kwargs.get("weight", kwargs.get("other"))
        x = args[at - 1] if len(args) >= at else kwargs.get("input")
        if name == "addmm":
            added = args[0] if args else kwargs.get("input")
        else:
            added = args[2] if len(args) > 2 else kwargs.get("bias")
        # Copies, because later operations may change the tensors in place.
        before = [one.clone() if isinstance(one, Tensor) else None for one in (weight, x, added)]
        result = func(*args, **kwargs)
        if before[0] is not None and before[1] is not None:
            self.calls.append(Call(name, before[0], before[1], result.clone(), before[2]))
        return result


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses communication, because other processes might not take part."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise NotTried("the forward pass communicates with other processes")
        return func(*args, **(kwargs or {}))


class _Copier:
    """Copies of everything that a layer refers to, each made once, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes
        self._made: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps their ids unique
        self.modules = 0

    def copy(self, value: Any) -> Any:
        """The copy of a value; the value itself if it is immutable."""
        if isinstance(value, _CONSTANT):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if len(self._originals) > _MOST_OBJECTS:
            raise NotTried("the layer refers to too many objects")
        if isinstance(value, Tensor):
            return self._keep(value, self._copy_tensor(value))
        if isinstance(value, nn.Module):
            return self.copy_module(value)
        if isinstance(value, dict):
            return self._copy_dict(value)
        if isinstance(value, list | collections.deque):
            own = self._keep(value, copy.copy(value))
            for i, item in enumerate(value):
                own[i] = self.copy(item)
            return own
        if isinstance(value, tuple | set | frozenset):
            items = [self.copy(item) for item in value]
            make = getattr(type(value), "_make", type(value))
            return self._keep(value, make(items))
        if callable(value) and (own := self._copy_callable(value)) is not None:
            return self._keep(value, own)
        return self._copy_object(value)

    def copy_module(self, module: nn.Module, leave_out: tuple[str, ...] = ()) -> Any:
        """The copy of a module, in eval mode. No method is called, because it may have effects."""
        own = self._keep(module, object.__new__(type(module)))
        self.modules += 1
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                pure = ((k, v) for k, v in value.items() if isinstance(v, _PURE_HOOKS))
                vars(own)[name] = type(value)(pure)
            elif name not in leave_out:
                vars(own)[name] = self.copy(value)
        vars(own)["training"] = False
        return own

    def _keep(self, value: Any, own: Any) -> Any:
        self._originals.append(value)
        self._made[id(value)] = own
        return own

    def _copy_tensor(self, value: Tensor) -> Tensor:
        self._left -= value.numel() * value.element_size()
        if self._left < 0:
            raise NotTried("the layer refers to tensors that are much larger than its own")
        own = value.detach().clone()
        if isinstance(value, nn.Parameter):
            own = nn.Parameter(own, requires_grad=value.requires_grad)
        return own

    def _copy_dict(self, value: dict[Any, Any]) -> Any:
        usual = type(value) in (dict, collections.OrderedDict)  # copy.copy is slow
        own = self._keep(value, value.copy() if usual else copy.copy(value))
        for key, item in value.items():
            own[key] = self.copy(item)
        return own

    def _copy_callable(self, value: Any) -> Any:
        """A method, partial, closure or weak reference, with a copy of what it is bound to."""
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if isinstance(value, types.BuiltinFunctionType):
            bound = value.__self__
            fixed = isinstance(bound, _CONSTANT)
            return value if fixed else getattr(self.copy(bound), value.__name__)
        if isinstance(value, functools.partial):
            words = {key: self.copy(item) for key, item in value.keywords.items()}
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **words)
        if isinstance(value, types.FunctionType):
            return self._copy_function(value)
        if isinstance(value, weakref.ref):
            target = value()
            return value if target is None else weakref.ref(self.copy(target))
        return None

    def _copy_function(self, value: types.FunctionType) -> types.FunctionType:
        cells = value.__closure__ or ()
        references = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        references += [cell.cell_contents for cell in cells]
        if all(isinstance(one, _CONSTANT) for one in references):
            return value
        closure = tuple(types.CellType() for _ in cells)
        own = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, None, closure or None
        )
        self._keep(value, own)  # it may refer to itself
        for new, old in zip(closure, cells, strict=True):
            new.cell_contents = self.copy(old.cell_contents)
        own.__defaults__, own.__kwdefaults__ = map(
            self.copy, (value.__defaults__, value.__kwdefaults__)
        )
        own.__dict__.update(self.copy(vars(value)))
        return own

    def _copy_object(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.Generator):
            generator = torch.Generator(value.device)
            generator.set_state(value.get_state())
            return self._keep(value, generator)
        if hasattr(value, "__dict__") and _is_plain(kind):
            new: Any = kind.__new__
            own = self._keep(value, new(kind))
            slots = {s for k in kind.__mro__ for s in vars(k).get("__slots__", ())}
            for name in slots - {"__dict__", "__weakref__"}:
                if hasattr(value, name):
                    object.__setattr__(own, name, self.copy(getattr(value, name)))
            vars(own).update({name: self.copy(item) for name, item in vars(value).items()})
            return own
        try:
            return self._keep(value, copy.deepcopy(value))
        except Exception as error:
            if hasattr(value, "__next__") or hasattr(value, "__dict__"):
                raise NotTried(f"a {kind.__name__} cannot be copied") from error
            return self._keep(value, value)  # such as a lock or a process group


def _is_plain(kind: type) -> bool:
    """Whether objects of this class consist only of their attributes, without hooks for copies."""
    special = any(
        getattr(kind, name, None) is not getattr(object, name, None)
        for name in ("__new__", "__reduce__", "__reduce_ex__", "__deepcopy__")
    )
    return not special or issubclass(kind, types.SimpleNamespace)
