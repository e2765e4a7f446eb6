"""Files of torch.save with objects of foreign classes beside the tensors, read without the classes.

Each class and each function that the pickle names, other than those of which plain tensors and
dicts consist, becomes an inert `Foreign`. No name is imported, and nothing of the file is called.
"""

from __future__ import annotations

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from wellcond.files.archive import data_start, dtype_of_storage, is_archive

_DTYPES = {f"torch.{n}": v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
_PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_DIMENSIONS, _END = 64, 1 << 63

# Arrays of NumPy: their kind, the functions that make them, and their dtypes.
ARRAY = "numpy.ndarray"
_ARRAYS = ("_reconstruct", "_mareconstruct", "_reconstruct_array")
_OF_NUMPY = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "f16": torch.float64}
_OF_NUMPY |= {"c8": torch.complex64, "c16": torch.complex128, "c32": torch.complex128}

Storage = Callable[[str, int], torch.UntypedStorage]


@dataclass(eq=False, repr=False)
class Foreign:
    """A class, a function or an object that is not made: what the pickle says of it.

    Attributes:
        kind: the full name of the class, or of the function that would return the object.
        state: what the object would get as its attributes.
        items: what would be added to it with keys.
        elements: what would be appended to it.
        arguments: what the class or the function would be called with.
    """

    kind: str
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)
    arguments: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        """The class alone: what is shared in the state may be written out without end."""
        return f"<{self.kind}>"

    @property
    def name(self) -> str:
        """The last part of `kind`."""
        return self.kind.rpartition(".")[2]

    @property
    def states(self) -> tuple[Any, ...]:
        """The parts of the state: of a class with `__slots__` there are two."""
        return self.state if isinstance(self.state, tuple) else (self.state,)

    @property
    def attributes(self) -> dict[Any, Any]:
        """The attributes by name, those of `__slots__` included."""
        parts = (part for part in self.states if isinstance(part, Mapping))
        return {name: one for part in parts for name, one in part.items()}


@dataclass(eq=False, repr=False)
class ForeignTensor(Foreign):
    """A tensor of a foreign class, or of a layout that is not read: its shape and its dtype.

    Attributes:
        shape: the shape of the dense tensor; () if it is not known.
        dtype: its dtype, if torch has it.
        values: the entries that are stored, as a plain tensor, if that is known.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Inert:
    """The content of a file, and the address at which the file is mapped; 0 if it is not."""

    content: Any
    address: int = 0


def load_inert(path: Path, mapped: bool) -> Inert:
    """The content of a file that `check_pickle` has passed.

    Whatever it raises says that the pickle is damaged.
    """
    if not is_archive(path):
        return Inert(_load_legacy(path))
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = {r.filename.partition("/")[2].lower(): r for r in archive.infolist()}
        order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
        if order.decode() != sys.byteorder:
            raise ValueError("its numbers have the byte order of another machine")
        size = path.stat().st_size
        whole = torch.UntypedStorage.from_file(str(path), False, size) if mapped else None
        made: dict[str, torch.UntypedStorage] = {}

        def storage(key: str, length: int) -> torch.UntypedStorage:
            if key in made:
                return made[key]
            record = records[f"data/{key}".lower()]
            start = data_start(file, record)
            if whole is None:
                made[key] = _untyped(bytearray(archive.read(record)), length)
            elif start + length <= size:
                made[key] = whole[start : start + length]
            else:
                raise ValueError("it ends before its storages do")
            return made[key]

        with archive.open(records["data.pkl"]) as pickled:
            content = _Unpickler(pickled, storage).load()
    return Inert(content, whole.data_ptr() if whole is not None else 0)


def _load_legacy(path: Path) -> Any:
    """Of the format before torch 1.6: four pickles, the keys of the storages, and these."""
    made: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, length: int) -> torch.UntypedStorage:
        if key not in made:
            made[key] = _untyped(bytearray(length), length)
        return made[key]

    with path.open("rb") as file:
        unpickler = _Unpickler(file, storage)
        for _ in range(4):
            content = unpickler.load()
        for key in unpickler.load():
            length = int.from_bytes(file.read(8), sys.byteorder) * unpickler.itemsizes[key]
            if length != made[key].nbytes():
                raise ValueError("the length of a storage is not that of its tensors")
            made[key].copy_(_untyped(bytearray(file.read(length)), length))
    return content


def _untyped(data: bytearray, length: int) -> torch.UntypedStorage:
    if len(data) != length:
        raise ValueError("the length of a storage is not that of its tensors")
    as_bytes = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, device="cpu")
    return as_bytes.untyped_storage()


@dataclass(frozen=True)
class _Stored:
    """A storage with its dtype."""

    storage: torch.UntypedStorage
    dtype: torch.dtype


def _tensor(
    stored: _Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
) -> Tensor | ForeignTensor:
    """`torch._utils._rebuild_tensor_v2` with a check of the bounds."""
    # Then requires_grad and hooks; of v3 the dtype; and the bits of a lazy conjugate or negative.
    dtype = next((one for one in more if isinstance(one, torch.dtype)), stored.dtype)
    if not _is_shape(size) or not _is_shape((offset, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor must have a shape and strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > stored.storage.nbytes():
        raise ValueError("a tensor goes beyond its storage")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(stored.storage, offset, size, stride)
    bits = more[-1] if more and isinstance(more[-1], dict) else {}
    tensor = tensor.conj() if bits.get("conj") else tensor
    return torch._neg_view(tensor) if bits.get("neg") else tensor


def _first(data: Any, *more: Any) -> Any:
    return data


def _subclass(function: Any, kind: Any, arguments: tuple[Any, ...], *more: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: of a plain class the tensor, of another a record."""
    if not isinstance(function, Foreign):
        data = function(*arguments) if function in _CALLABLE else None
        if kind.kind in _PLAIN or not isinstance(data, Tensor):
            return data
        return ForeignTensor(kind.kind, shape=tuple(data.shape), dtype=data.dtype, values=data)
    if function.name == "_rebuild_wrapper_subclass":
        _, dtype, shape, *_ = arguments
        if _is_shape(shape) and isinstance(dtype, torch.dtype):
            return ForeignTensor(kind.kind, shape=shape, dtype=dtype)
    return ForeignTensor(kind.kind)


def _sparse(layout: Any, data: tuple[Any, ...]) -> ForeignTensor:
    """`torch._utils._rebuild_sparse_tensor`: of COO indices, values and shape; or compressed."""
    (name,) = layout.arguments if isinstance(layout, Foreign) else ("",)
    values = data[1 if name == "torch.sparse_coo" else 2]
    shape = next((one for one in data if isinstance(one, tuple)), None)
    if not (isinstance(name, str) and isinstance(values, Tensor) and _is_shape(shape)):
        raise ValueError("a sparse tensor must have a layout, values and a shape")
    kind = name.removeprefix("torch.")
    return ForeignTensor(kind, shape=shape or (), dtype=values.dtype, values=values)


def array_of(one: Foreign) -> ForeignTensor | None:
    """Shape and dtype of a floating point array of NumPy or JAX; None of any other object.

    Its dtype is a `numpy.dtype` called with "f8", say, or with a class such as ml_dtypes.bfloat16.
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
    name = first.name if isinstance(first, Foreign) else str(first)
    known = _OF_NUMPY.get(name) or _DTYPES.get(f"torch.{name}")
    if known is None or not (known.is_floating_point or known.is_complex) or not _is_shape(shape):
        return None
    return ForeignTensor(ARRAY, shape=shape, dtype=known)


def _is_shape(shape: Any) -> bool:
    lengths = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    return lengths and len(shape) <= _DIMENSIONS and math.prod(shape) < _END


def _without_values(dtype: Any, size: Any, *more: Any) -> ForeignTensor:
    """`torch._utils._rebuild_meta_tensor_no_storage`, without its strides."""
    if not _is_shape(size) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor must have a shape and a dtype")
    return ForeignTensor("meta", shape=size, dtype=dtype)


def _layout(name: str) -> Callable[..., ForeignTensor]:
    return lambda *arguments: ForeignTensor(name)


# All that is ever called, by the names that torch.save writes.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _layout("quantised"),
    "torch._utils._rebuild_nested_tensor": _layout("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _without_values,
    "torch.Size": tuple,
    "torch.device": _first,
    "builtins.set": set,
    "__builtin__.set": set,
    "collections.OrderedDict": OrderedDict,
}
_CALLABLE = frozenset(_CALLS.values())
# Functions that make an object of their first argument.
_MAKERS = {"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj_ex__"}


class _Unpickler(pickle._Unpickler):
    """Calls what is in `_CALLS` alone. In Python, as is that of `check_pickle`, and why."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], storage: Storage) -> None:
        super().__init__(file)
        self.storage = storage
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}"
        return _CALLS.get(known) or _DTYPES.get(known) or Foreign(known)

    def persistent_load(self, saved: Any) -> Any:
        if saved[0] in ("module", b"module"):  # of a whole model, before torch 1.6: with its source
            return saved[1]
        kind, key, _, count, *view = saved[1:]
        if any(one is not None for one in view):
            raise pickle.UnpicklingError("a storage must be no part of another")
        dtype = dtype_of_storage(kind.name)
        self.itemsizes[key] = dtype.itemsize
        return _Stored(self.storage(key, count * dtype.itemsize), dtype)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("arguments must be a tuple")
        if isinstance(function, Foreign):
            made = function
            if function.kind in _MAKERS and arguments and isinstance(arguments[0], Foreign):
                made, *rest = arguments
                arguments = tuple(rest)
            # What a partial function holds is passed on by its call.
            return Foreign(made.kind, state=made.state, arguments=arguments)
        if function in _CALLABLE:
            return function(*arguments)
        raise pickle.UnpicklingError("what is called must be a class or a function")

    def _reduce(self: Any) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _new_with_names(self: Any) -> None:
        named = self.stack.pop()
        self.stack[-1] = (*self.stack[-1], named)
        self.dispatch[pickle.REDUCE[0]](self)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("names must be written out")

    def _instantiate(self: Any, kind: Any, arguments: Any) -> None:
        self.append(self._call(kind, tuple(arguments)))

    def _build(self: Any) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Foreign):
            made.state = state
        elif not isinstance(made, OrderedDict):  # of which the attributes are of no use
            raise pickle.UnpicklingError("what gets a state must be an object")

    def _set_item(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._items_of(self.stack[-1])[key] = value

    def _set_items(self: Any) -> None:
        pairs = self.pop_mark()
        self._items_of(self.stack[-1]).update(zip(pairs[::2], pairs[1::2], strict=True))

    def _items_of(self, made: Any) -> dict[Any, Any]:
        if isinstance(made, Foreign):
            return made.items
        if isinstance(made, dict):
            return made
        raise pickle.UnpicklingError("what gets items must be a dict")

    def _append(self: Any) -> None:
        value = self.stack.pop()
        self._elements_of(self.stack[-1]).append(value)

    def _appends(self: Any) -> None:
        values = self.pop_mark()
        self._elements_of(self.stack[-1]).extend(values)

    def _add(self: Any) -> None:
        values = self.pop_mark()
        made = self.stack[-1]
        if isinstance(made, set):
            made.update(values)
        else:
            self._elements_of(made).extend(values)

    def _elements_of(self, made: Any) -> list[Any]:
        if isinstance(made, Foreign):
            return made.elements
        if isinstance(made, list):
            return made
        raise pickle.UnpicklingError("what is appended to must be a list")

    for _code, _instruction in (
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _reduce),
        (pickle.NEWOBJ_EX, _new_with_names),
        (pickle.BUILD, _build),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_items),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.ADDITEMS, _add),
    ):
        dispatch[_code[0]] = _instruction
