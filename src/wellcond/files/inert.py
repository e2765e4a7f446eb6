"""Reads the pickles of torch.save and torch.jit without running any of their code.

A pickle is a program for a small stack machine. This machine pushes constants, builds lists, tuples
and dicts, and turns each class, function and object that the pickle names into an inert `Foreign`.
It calls only replacements of the functions that torch.save writes for tensors, and these only
describe a tensor.

The machine imports no name. It compares and hashes no objects of the file except strings, because a
few bytes can represent a tuple of 2^40 parts. It copies nothing, so each instruction adds at most
one small object.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import IO, Any

import torch

from wellcond.files.tensors import DamagedError

_DTYPES = {f"torch.{n}": v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
_OF_STORAGES = {
    **{"DoubleStorage": torch.double, "FloatStorage": torch.float, "HalfStorage": torch.half},
    **{"BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8},
    **{"LongStorage": torch.long, "IntStorage": torch.int, "ShortStorage": torch.short},
    **{"CharStorage": torch.int8, "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8},
    **{"QInt32Storage": torch.qint32, "ComplexFloatStorage": torch.complex64},
    **{"QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4},
    "ComplexDoubleStorage": torch.complex128,
}
_PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_END = 1 << 63
_INSTRUCTIONS = 30_000_000  # each may leave an object of 100 to 300 bytes
_NAME = 1000  # characters in the name of a class
_ARGUMENTS = 64  # of a function that torch.save writes
_PARTS, _LETTERS = 8, 200  # of a key that is not a string, within the name of a tensor

# NumPy arrays: their kind, the functions that make them, and their dtypes.
ARRAY = "numpy.ndarray"
_ARRAYS = ("_reconstruct", "_mareconstruct", "_reconstruct_array")
_OF_NUMPY = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "f16": torch.float64}
_OF_NUMPY |= {"c8": torch.complex64, "c16": torch.complex128, "c32": torch.complex128}


@dataclass(eq=False, repr=False, slots=True)
class Foreign:
    """A class, a function or an object that is not created, as the pickle describes it.

    Attributes:
        kind: the full name of the class, or of the function that would return the object.
        state: the attributes that the object would receive.
        items: the key-value pairs that would be added to the object.
        elements: the elements that would be appended to the object.
        arguments: the arguments of the call of the class or function.
    """

    kind: str
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)
    arguments: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        """Returns only the class: the text of a state with shared parts could be endless."""
        return f"<{self.kind}>"

    @property
    def name(self) -> str:
        """The last part of `kind`."""
        return self.kind.rpartition(".")[2]

    @property
    def states(self) -> tuple[Any, ...]:
        """The parts of the state, two for a class with `__slots__`."""
        return self.state if isinstance(self.state, tuple) else (self.state,)

    @property
    def attributes(self) -> dict[Any, Any]:
        """The attributes by name, including those of `__slots__`."""
        parts = (part for part in self.states if isinstance(part, Mapping))
        return {name: one for part in parts for name, one in part.items()}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle names: its key, its dtype and a range of its bytes."""

    key: str
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor whose entries are in a storage of the file, and are not read yet.

    Attributes:
        key: the storage.
        start: the byte of the storage at which the first entry begins.
        conj: whether the entries are conjugated on use.
        neg: whether the entries are negated on use.
    """

    key: str
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        """The number of bytes of all entries, as if none shared memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """The number of bytes from the first entry to the last."""
        if 0 in self.shape:
            return 0
        steps = zip(self.stride, self.shape, strict=True)
        return (1 + sum(step * (size - 1) for step, size in steps)) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the entries are stored in order and without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def floating(self) -> bool:
        """Whether the entries are floating point or complex numbers."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(eq=False, repr=False, slots=True)
class ForeignTensor(Foreign):
    """A tensor of a foreign class or of a layout that is not read.

    Attributes:
        shape: the shape of the dense tensor; () if it is unknown.
        dtype: its dtype, if torch has it.
        values: the stored entries as a plain tensor, if they are known.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    values: StoredTensor | None = None


class OtherKey:
    """A key that is not a string. Equal keys remain separate, because keys are never compared."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key

    def __str__(self) -> str:
        return _key_text(self.key)


def _key_text(key: Any, depth: int = 2) -> str:
    """Returns a short form of `repr`, because a small file can contain an endless key."""
    if isinstance(key, list | dict) or (isinstance(key, tuple) and not depth):
        return "..."
    if isinstance(key, tuple):
        parts = [_key_text(one, depth - 1) for one in key[:_PARTS]]
        more = ", ..." if len(key) > _PARTS else "," if len(key) == 1 else ""
        return f"({', '.join(parts)}{more})"
    return repr(key[:_LETTERS] if isinstance(key, str | bytes | bytearray) else key)


def _as_key(key: Any) -> Any:
    return key if isinstance(key, str) else OtherKey(key)


# --- replacements of functions --------------------------------------------------------------------


def is_shape(shape: Any, dimensions: int = 64) -> bool:
    """Returns whether `shape` is a tuple of lengths whose product is a valid number of entries."""
    if not isinstance(shape, tuple) or len(shape) > dimensions:
        return False
    return all(type(n) is int and 0 <= n < _END for n in shape) and math.prod(shape) < _END


def rebuild_tensor(
    storage: Storage, offset: Any, size: Any, stride: Any, *more: Any
) -> StoredTensor:
    """Replaces `torch._utils._rebuild_tensor_v2`, and checks the bounds."""
    # `more` contains requires_grad and hooks, the dtype in v3, and the conjugate and negative bits.
    dtype = next((one for one in more if isinstance(one, torch.dtype)), storage.dtype)
    if not (is_shape(size, 1000) and isinstance(stride, tuple) and len(stride) == len(size)):
        raise DamagedError("a tensor must have a shape and strides")
    if not all(type(n) is int and 0 <= n < _END for n in (offset, *stride)):
        raise DamagedError("the offset and the strides of a tensor must be non-negative integers")
    bits = more[-1] if more and isinstance(more[-1], Mapping) else {}
    start = storage.start + offset * dtype.itemsize
    conj, neg = bits.get("conj") is True, bits.get("neg") is True
    tensor = StoredTensor(storage.key, dtype, start, size, stride, conj, neg)
    if start + tensor.span > storage.stop and tensor.span:
        raise DamagedError("a tensor extends beyond its storage")
    return tensor


def _subclass(
    function: Any, kind: Any, arguments: tuple[Any, ...], state: Any = None, *more: Any
) -> Any:
    """Replaces `torch._tensor._rebuild_from_type_v2`; a foreign class becomes a record."""
    if function.kind in _CALLS:
        data = _call(function, arguments)
        if kind.kind in _PLAIN or not isinstance(data, StoredTensor):
            return data
        return ForeignTensor(
            kind.kind, state=state, shape=data.shape, dtype=data.dtype, values=data
        )
    if function.name == "_rebuild_wrapper_subclass":
        _, dtype, shape, *_ = arguments
        if is_shape(shape) and isinstance(dtype, torch.dtype):
            return ForeignTensor(kind.kind, state=state, shape=shape, dtype=dtype)
    return ForeignTensor(kind.kind, state=state)


def _sparse(layout: Any, data: tuple[Any, ...]) -> ForeignTensor:
    """Replaces `torch._utils._rebuild_sparse_tensor` for COO and compressed layouts."""
    (name,) = layout.arguments if isinstance(layout, Foreign) else ("",)
    values = data[1 if name == "torch.sparse_coo" else 2]
    shape = next((one for one in data[:4] if isinstance(one, tuple)), ())
    if not (isinstance(name, str) and isinstance(values, StoredTensor) and is_shape(shape)):
        raise DamagedError("a sparse tensor must have a layout, values and a shape")
    kind = name.removeprefix("torch.")
    return ForeignTensor(kind, shape=shape, dtype=values.dtype, values=values)


def _nested(first: Any, *more: Any) -> ForeignTensor:
    """Replaces `torch._utils._rebuild_nested_tensor` and `_rebuild_njt`; keeps only the dtype."""
    values = first.get("values") if isinstance(first, Mapping) else first
    return ForeignTensor("nested", dtype=getattr(values, "dtype", None))


def _without_values(dtype: Any, size: Any, *more: Any) -> ForeignTensor:
    """Replaces `torch._utils._rebuild_meta_tensor_no_storage`; drops the strides."""
    if not is_shape(size) or not isinstance(dtype, torch.dtype):
        raise DamagedError("a tensor must have a shape and a dtype")
    return ForeignTensor("meta", shape=size, dtype=dtype)


def _first(data: Any, *more: Any) -> Any:
    return data


def _encoded(text: Any, encoding: Any = "") -> Any:
    """Replaces `_codecs.encode`, with which protocol 2 writes bytes, for short strings only."""
    if isinstance(text, str) and len(text) <= _LETTERS and encoding == "latin1":
        return text.encode(encoding)
    return Foreign("_codecs.encode")


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """Makes an OrderedDict. Python 2 wrote its pairs as a list, which is emptied, not copied."""
    made = OrderedDict((_as_key(key), value) for key, value in pairs)
    if isinstance(pairs, list):
        pairs.clear()
    elif made:
        raise DamagedError("an OrderedDict must be made from a list")
    return made


# The functions that wrap lists and dicts of a TorchScript program.
_OF_SCRIPT = ["build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"]
_OF_SCRIPT += ["restore_type_tag"]
# The only functions that are ever called, by the names that torch writes.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor,
    "torch._utils._rebuild_qtensor": rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch.nested._internal.nested_tensor._rebuild_njt": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_values,
    "torch.Size": _first,
    "torch.device": _first,
    **dict.fromkeys((f"torch.jit._pickle.{name}" for name in _OF_SCRIPT), _first),
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _ordered,
}
SCRIPT = "__torch__."  # the beginning of the names of classes of a TorchScript program
# Functions that create an object of the class in their first argument, from two other arguments.
_MAKERS = {"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj_ex__"}


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Foreign) and function.kind.startswith(SCRIPT):
        # The value of an enum is written in the place of the arguments.
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if not isinstance(arguments, tuple) or not isinstance(function, Foreign):
        raise DamagedError("its pickle calls a non-function, or passes no tuple of arguments")
    if (make := _CALLS.get(function.kind)) is not None:
        if len(arguments) > _ARGUMENTS:
            raise DamagedError("its pickle calls a function with too many arguments")
        return make(*arguments)
    if function.kind in _MAKERS and len(arguments) == 3 and isinstance(arguments[0], Foreign):
        function, *rest = arguments
        arguments = tuple(rest)
    # The call of a partial function keeps the state of the function.
    return Foreign(function.kind, state=function.state, arguments=arguments)


def array_of(one: Foreign) -> ForeignTensor | None:
    """Returns shape and dtype of a floating point array of NumPy or JAX; None for other objects.

    The dtype is a call of `numpy.dtype` with a code such as "f8", or a class such as
    ml_dtypes.bfloat16.
    """
    module, _, function = one.kind.rpartition(".")
    state, arguments = one.states, one.arguments
    if module.startswith("jax.") and function == "_reconstruct_array" and len(arguments) > 2:
        state = arguments[2]
    elif not module.startswith("numpy."):
        return None
    if function == "_frombuffer" and len(arguments) > 2:  # since protocol 5
        dtype, shape = arguments[1:3]
    elif function in _ARRAYS and isinstance(state, tuple) and len(state) > 4:
        shape, dtype = state[1:3]
    else:
        return None
    first = dtype.arguments[0] if isinstance(dtype, Foreign) and dtype.arguments else ""
    name = first.name if isinstance(first, Foreign) else first
    known = _OF_NUMPY.get(name) or _DTYPES.get(f"torch.{name}") if isinstance(name, str) else None
    if known is None or not (known.is_floating_point or known.is_complex) or not is_shape(shape):
        return None
    return ForeignTensor(ARRAY, shape=shape, dtype=known)


# --- the machine ----------------------------------------------------------------------------------

# The instructions that push the constant that follows them in the file.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}


class Unpickler:
    """The stack machine, over a file that may contain several pickles in a row.

    Attributes:
        storages: the storages that the pickles named so far, by their keys, which begin with
            `folder`. For several storages with one key, the longest.
    """

    def __init__(self, file: IO[bytes], folder: str = "") -> None:
        self._folder = folder
        # The object has no `tell`, which pickletools would call for each instruction.
        self._file: Any = SimpleNamespace(read=file.read, readline=file.readline)
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """Returns the content of the next pickle. Any exception means that it is damaged."""
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack under each mark
        self._memo: dict[int, Any] = {}
        for number, (instruction, argument, _) in enumerate(pickletools.genops(self._file)):
            if number > _INSTRUCTIONS:
                raise DamagedError(f"its pickle has more than {_INSTRUCTIONS:,} instructions")
            if instruction.name in _LITERALS:
                self._stack.append(argument)
            else:
                self._execute(instruction.name, argument)
        return self._stack.pop()

    def _execute(self, instruction: str, argument: Any) -> None:
        stack = self._stack
        match instruction:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[argument])
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                self._push(tuple(self._pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._pop(int(instruction[-1]))))
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction == "NEWTRUE")
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*self._pop(2)))
            case "NEWOBJ_EX":
                function, arguments, keywords = self._pop(3)
                both = (arguments, keywords) if arguments else (keywords,)
                stack.append(_call(function, both if keywords else arguments))
            case "OBJ":
                function, *rest = self._pop_mark()
                self._push(_call(function, tuple(rest)))
            case "BUILD":
                made, state = self._pop(2)
                stack.append(_with_state(made, state))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._add_items(self._pop(2))
            case "SETITEMS":
                self._add_items(self._pop_mark())
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self._add_elements(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._add_elements(self._pop_mark())
            case "EMPTY_SET":
                stack.append(Foreign("builtins.set"))
            case "FROZENSET":
                self._push(Foreign("builtins.frozenset", elements=self._pop_mark()))
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self._pop_mark()
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:  # such as EXT1, a number in a registry of the process instead of a name
                raise DamagedError(
                    f"its pickle contains {instruction}, which torch.save never writes"
                )

    def _push(self, value: Any) -> None:
        """Pushes to the current stack, because `_pop_mark` exchanges it."""
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise DamagedError("its pickle pops more values than its stack contains")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def _add_items(self, pairs: list[Any]) -> None:
        made = self._stack[-1]
        items = made.items if isinstance(made, Foreign) else made
        if not isinstance(items, dict):
            raise DamagedError("its pickle adds items to an object that is not a dict")
        items.update(
            (_as_key(key), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True)
        )

    def _add_elements(self, values: list[Any]) -> None:
        made = self._stack[-1]
        elements = made.elements if isinstance(made, Foreign) else made
        if not isinstance(elements, list):
            raise DamagedError("its pickle appends to an object that is not a list")
        elements.extend(values)

    def _storage(self, saved: Any) -> Any:
        """Returns the storage that a tuple names, regardless of its device."""
        if not isinstance(saved, tuple) or len(saved) > _ARGUMENTS:
            raise DamagedError("a storage must be named by a tuple")
        if saved[0] in ("module", b"module"):  # torch before 1.6 saved models with their source
            return saved[1]
        _, kind, key, _, count, *views = saved
        dtype = _OF_STORAGES.get(kind.name, torch.uint8)  # UntypedStorage consists of bytes
        if not (isinstance(key, str) and is_shape((count,)) and len(views) < 2):
            raise DamagedError("a storage must have a name and a length")
        key = self._folder + key
        whole = Storage(key, dtype, 0, count * dtype.itemsize)
        self.storages[key] = max(self.storages.get(key, whole), whole, key=lambda one: one.stop)
        if views in ([], [None]):
            return whole
        ((_, first, length),) = views  # a part of a storage, as torch before 0.4 saved it
        if not is_shape((first, length)) or first + length > count:
            raise DamagedError("a part of a storage extends beyond the storage")
        start, stop = first * dtype.itemsize, (first + length) * dtype.itemsize
        return Storage(key, dtype, start, stop)


def _named(module: Any, name: Any) -> Any:
    if not all(isinstance(part, str) and len(part) <= _NAME for part in (module, name)):
        raise DamagedError("its pickle contains an invalid name of a class or function")
    known = f"{module}.{name}"
    return _DTYPES.get(known) or Foreign(known)


def _with_state(made: Any, state: Any) -> Any:
    if isinstance(made, Foreign):
        made.state = state
    elif not isinstance(made, OrderedDict):  # its attributes are ignored
        raise DamagedError("its pickle sets the state of a value that is not an object")
    return made
