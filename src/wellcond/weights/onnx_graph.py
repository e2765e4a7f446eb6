"""The matrices by which the nodes of an ONNX graph multiply, constant by constant.

A node determines how it uses a constant: Gemm and MatMul the orientation, Conv the groups, LSTM and
GRU the order of the gates. Nodes between a constant and its use that only rearrange the constant
become part of the view; DequantizeLinear is also handled. Graphs in nodes (If, Loop) and functions
of the model are followed.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from wellcond.operators.views import (
    STORED,
    Blocks,
    Kernel,
    Member,
    Part,
    Permuted,
    Reshaped,
    Transposed,
    View,
)
from wellcond.weights.fused import Views
from wellcond.weights.reasons import Reason, Skipped

# The gates of recurrent cells in the order of ONNX, with the letters of torch.
_GATES = {"LSTM": ("i", "o", "f", "g"), "GRU": ("z", "r", "n"), "RNN": ("",)}
_STANDARD = ("", "ai.onnx")
_MICROSOFT = "com.microsoft"  # operators of ONNX Runtime
_SAME = ("Identity", "Cast", "Dropout")
# Functions can call functions, so a small file can expand to more nodes than any real graph has.
_NODES, _DEPTH = 250_000, 40
_STEPS = 50  # rearrangements of one constant; exporters leave a few
# If a constant has several reasons, the first of these is reported.
_ORDER = (
    *(
        Reason.not_dense,
        Reason.in_graph,
        Reason.quantised,
        Reason.embedding,
        Reason.one_row,
        Reason.scales,
    ),
    *(Reason.vector, Reason.dimensions, Reason.unknown_use, Reason.unmultiplied),
)
# Operators by which ONNX Runtime replaces standard ones, with the same weights.
_FUSED = {"FusedConv": "Conv", "FusedMatMul": "FusedMatMul", "FusedGemm": "Gemm"}
# Standard operators that can multiply by their inputs in a way that is not followed.
_OPAQUE = ("Attention", "If", "Loop", "Scan", "SequenceMap")


class EndlessGraphError(ValueError):
    """Graphs and functions are nested deeper, or have more nodes, than in any real model."""


@dataclass(frozen=True)
class Scales:
    """The names of the tensors by which codes are dequantised as (code - zero) scale.

    Attributes:
        scale: a scalar, one number per index of `axis`, or one per block of `block` along `axis`.
        zero: a tensor of the same shape; None stands for 0.
    """

    scale: str
    zero: str | None
    axis: int
    block: int = 0


class _Use(NamedTuple):
    """How one node uses a constant: as these matrices, or as none, for a reason."""

    node: str
    views: dict[str, View]
    skipped: Skipped | None = None
    note: str = ""
    scales: Scales | None = None


@dataclass
class Constant:
    """A tensor in the graph.

    Attributes:
        tensor: the TensorProto of the file.
        shape: the shape of the tensor.
        initializer: whether it is an initializer and not the value of a node.
    """

    tensor: Any
    shape: tuple[int, ...]
    initializer: bool
    uses: list[_Use] = field(default_factory=list)

    @property
    def scales(self) -> Scales | None:
        """How its codes are dequantised; None if it has none, or if nodes use different scales."""
        found = {use.scales for use in self.uses if use.views}
        return next(iter(found)) if len(found) == 1 else None

    @property
    def views(self) -> Views | None:
        """The matrices as which nodes use it; None if no node does."""
        taken = [use for use in self.uses if use.views]
        if not taken or len({use.scales for use in taken}) > 1:
            return None
        views = taken[0].views
        distinct: dict[View, View] = {}  # keyed by a view with the same singular values
        for view in (view for use in taken for view in use.views.values()):
            distinct.setdefault(self._untransposed(view), view)
        if len(distinct) > len(views):  # different nodes use different parts of the tensor
            views = {f"{at}": view for at, view in enumerate(distinct.values())}
        notes = [use.note for use in taken if use.note]
        reasons = [use.skipped.reason for use in self.uses if use.skipped]
        if Reason.embedding in reasons:
            notes.append("also an embedding")
        return Views(views, "; ".join(dict.fromkeys(notes)))

    def _untransposed(self, view: View) -> View:
        return STORED if len(self.shape) == 2 and view == Transposed() else view

    @property
    def node(self) -> str:
        """The node that uses it as a matrix; "" if no node does."""
        return next((use.node for use in self.uses if use.views), "")

    @property
    def skipped(self) -> Skipped | None:
        """Why no node uses it as a matrix; None if a node does."""
        if self.views is not None:
            return None
        if any(use.views for use in self.uses):
            return Skipped(Reason.quantised, "nodes dequantise it with different scales")
        found = [use.skipped for use in self.uses if use.skipped]
        if not found:
            return Skipped(Reason.unmultiplied, "no node uses it")
        return min(found, key=lambda why: _ORDER.index(why.reason))


@dataclass(frozen=True)
class _Given:
    """A value of the graph that is a view of a constant.

    Attributes:
        name: the name of the constant.
        steps: functions that turn a view of the value into a view of the value before each step.
        cut: if it is a block of another value: that value, the side, and the block (start, size).
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[Callable[[View], View], ...] = ()
    scales: Scales | None = None
    cut: tuple[_Given, int, tuple[int, int]] | None = None

    def then(self, step: Callable[[View], View], shape: Iterable[int]) -> _Given:
        return replace(self, shape=tuple(shape), steps=(*self.steps, step), cut=None)

    def reshape(self, shape: Sequence[int]) -> _Given:
        shape = tuple(shape)
        return self if shape == self.shape else self.then(lambda v: Reshaped(v, shape), shape)

    def permute(self, order: Sequence[int]) -> _Given:
        order = tuple(order)
        if order == tuple(range(len(order))):
            return self
        if len(order) == 2:
            if self.steps and self.steps[-1] is _transpose:  # back again
                return replace(self, shape=self.shape[::-1], steps=self.steps[:-1], cut=None)
            return self.then(_transpose, self.shape[::-1])
        return self.then(lambda v: Permuted(v, order), (self.shape[i] for i in order))

    def pick(self, dim: int, *blocks: tuple[int, int]) -> _Given:
        """These blocks (start, size) along a side, one after the other."""
        if blocks == ((0, self.shape[dim]),):
            return self
        size = sum(length for _, length in blocks)
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        picked = self.then(lambda v: Blocks(v, dim, blocks), shape)
        return replace(picked, cut=(self, dim, blocks[0])) if len(blocks) == 1 else picked

    def seen(self, view: View) -> View:
        """A view of the value as a view of the constant."""
        for step in reversed(self.steps):
            view = step(view)
        return view


def _transpose(view: View) -> View:
    if view == STORED:
        return Transposed()
    return STORED if view == Transposed() else Permuted(view, (1, 0))


@dataclass(frozen=True, eq=False)
class _Made:
    """A value that a node computes only from constants."""

    of: tuple[_Given | _Made, ...]
    by: str


_Value: TypeAlias = _Given | _Made | None  # None: depends on the inputs of the model
_Scope: TypeAlias = ChainMap[str, _Value]


def find_constants(
    model: Any, read_integers: Callable[[Any], list[int] | None]
) -> dict[str, Constant]:
    """The constants of a model by name, with the nodes that use them.

    Args:
        model: a ModelProto.
        read_integers: reads the entries of a small TensorProto of integers.

    Raises:
        EndlessGraphError: graphs and functions are nested without end.
    """
    walk = _Walk(model, read_integers)
    walk.follow(model.graph, _Scope(), "", {})
    return walk.constants


class _Walk:
    def __init__(self, model: Any, read_integers: Callable[[Any], list[int] | None]) -> None:
        self.constants: dict[str, Constant] = {}
        self._read_integers = read_integers
        self._functions = {(one.domain, one.name): one for one in model.functions}
        self._repeats: dict[str, int] = {}  # how often a name was given to several constants
        self._left: set[_Made] = set()
        self._nodes = 0
        self._depth = 0

    # --- graphs, functions, nodes -----------------------------------------------------------------

    def follow(self, graph: Any, scope: _Scope, path: str, given: Mapping[str, Any]) -> None:
        """Follows the nodes of a graph.

        Args:
            graph: the graph.
            scope: the values by name.
            path: the path of the nodes that contain the graph.
            given: the attributes with which the function that contains the graph is called.
        """
        for one in graph.input:
            scope[one.name] = None
        for tensor in graph.initializer:
            scope[tensor.name] = self._add(tensor, tensor.name, path, initializer=True)
        for sparse in graph.sparse_initializer:
            name, sides = sparse.values.name, tuple(sparse.dims)
            value = self._add(sparse.values, name, path, initializer=True, shape=sides)
            self._leave(value, "", Skipped(Reason.not_dense))
        self._follow_nodes(graph.node, scope, path, given)

    def _follow_nodes(self, nodes: Any, scope: _Scope, path: str, given: Mapping[str, Any]) -> None:
        self._nodes += len(nodes)
        self._depth += 1
        if self._nodes > _NODES or self._depth > _DEPTH:
            raise EndlessGraphError("its graphs and functions are nested too deeply or too often")
        for proto in nodes:
            node = _Node(proto, [scope.get(name) for name in proto.input], given)
            values = self._apply(node, nodes, scope, path)
            scope |= zip(proto.output, values, strict=False)
        self._depth -= 1

    def _apply(self, node: _Node, nodes: Any, scope: _Scope, path: str) -> list[_Value]:
        """Records how a node uses its inputs; returns its outputs."""
        own = f"{path}{node.name}/"
        for key, graph in node.graphs():
            self.follow(graph, scope.new_child(), f"{own}{key}/", node.given)
        function = self._functions.get((node.proto.domain, node.proto.op_type))
        if function is not None:
            inside = _Scope(dict(zip(function.input, node.inputs, strict=False)))
            defaults = {one.name: one for one in function.attribute_proto}
            self._follow_nodes(function.node, inside, own, defaults | node.attributes)
            return [inside.get(name) for name in function.output]
        if node.kind == "Constant":
            return [self._constant(node, path)]
        moved = self._rearranged(node)
        if moved is not None and all(len(one.steps) <= _STEPS for one in moved):
            return [*moved]
        constant = [value for value in node.inputs if value is not None]
        present = [name for name in node.proto.input if name]
        if present and len(constant) == len(present):
            for one in constant:
                self._leave(one, node.label, node.why_not)
            return [_Made(tuple(constant), node.label)] * len(node.proto.output)
        takes = _takes(node)
        for slot, value in enumerate(node.inputs):
            if isinstance(value, _Made) and slot in takes:
                self._leave_origins(value, node.label)
            elif isinstance(value, _Given) and slot in takes:
                use = takes[slot](value)._replace(scales=value.scales)
                if use.views and node.kind in _INTEGER:
                    use = self._scaled(use, node, nodes, scope, value, slot)
                self.constants[value.name].uses.append(use)
            elif isinstance(value, _Given):
                self._leave(value, node.label, node.why_not)
        return [None] * len(node.proto.output)

    def _add(
        self,
        tensor: Any,
        name: str,
        path: str,
        initializer: bool,
        shape: tuple[int, ...] | None = None,
    ) -> _Given:
        own = name if name not in self.constants else f"{path}{name}"
        while own in self.constants:
            self._repeats[own] = number = self._repeats.get(own, 1) + 1
            own = f"{own}'{number}"
        name = own
        shape = tuple(tensor.dims) if shape is None else shape
        self.constants[name] = Constant(tensor, shape, initializer)
        return _Given(name, shape)

    def _leave(self, value: _Value, node: str, skipped: Skipped) -> None:
        if isinstance(value, _Given):
            self.constants[value.name].uses.append(_Use(node, {}, skipped))

    def _leave_origins(self, value: _Made, node: str) -> None:
        """Skips the constants from which a value is computed; visits each shared value once."""
        why = Skipped(Reason.in_graph, f"by {value.by}")
        waiting: list[_Given | _Made] = [value]
        while waiting:
            one = waiting.pop()
            self._leave(one, node, why)
            if isinstance(one, _Made) and one not in self._left:
                self._left.add(one)
                waiting += one.of

    def _constant(self, node: _Node, path: str) -> _Value:
        attribute = node.attributes.get("value")
        output = node.proto.output[0] if node.proto.output else ""
        if attribute is not None and attribute.HasField("t"):
            return self._add(attribute.t, output, path, initializer=False)
        attribute = node.attributes.get("value_ints", node.attributes.get("value_int"))
        if attribute is None:
            return _Made((), node.label)
        ints = list(attribute.ints) or [attribute.i]
        tensor = type(attribute.t)(dims=[len(ints)], data_type=7, int64_data=ints)
        return self._add(tensor, output, path, initializer=False)

    def _integers(self, value: _Value) -> list[int] | None:
        """The entries of a constant vector of integers; None for all other values."""
        if not isinstance(value, _Given) or value.steps or len(value.shape) > 1:
            return None
        return self._read_integers(self.constants[value.name].tensor)

    # --- rearranged constants ---------------------------------------------------------------------

    def _rearranged(self, node: _Node) -> list[_Given] | None:
        """The outputs of a node that only rearranges a constant; None for all other nodes."""
        value, *others = node.inputs or [None]
        if not isinstance(value, _Given) or not node.standard:
            return None
        shape, kind = value.shape, node.kind
        if kind in _SAME:
            return [value]
        if kind == "Transpose":
            order = node.integers("perm") or range(len(shape))[::-1]
            return [value.permute(order)] if sorted(order) == [*range(len(shape))] else None
        if kind == "DequantizeLinear":
            return self._dequantised(node, value)
        if kind == "Flatten":
            axis = node.integer("axis", 1)
            if not -len(shape) <= axis <= len(shape):
                return None
            axis += len(shape) * (axis < 0)
            return [value.reshape((math.prod(shape[:axis]), math.prod(shape[axis:])))]
        if kind == "Concat":
            return _concatenated(node)
        ints = [self._integers(other) for other in others]
        if kind == "Reshape":
            target = ints[0] if ints else node.integers("shape")
            found = _reshaped(shape, target, bool(node.integer("allowzero", 0)))
            return None if found is None else [value.reshape(found)]
        axes = ints[0] if ints else node.integers("axes")
        if kind == "Squeeze":
            squeezed = _squeezed(shape, axes)
            return None if squeezed is None else [value.reshape(squeezed)]
        if kind == "Unsqueeze" and axes:
            rank = len(shape) + len(axes)
            new, sides = {axis % rank for axis in axes if -rank <= axis < rank}, iter(shape)
            if len(new) < len(axes):
                return None
            return [value.reshape([1 if i in new else next(sides) for i in range(rank)])]
        if kind == "Split" and -len(shape) <= node.integer("axis", 0) < len(shape):
            axis = node.integer("axis", 0) % len(shape)
            count = max(1, node.integer("num_outputs", len(node.proto.output)))
            each = -(-shape[axis] // count)
            sizes = (ints[0] if ints else node.integers("split")) or [
                min(each, shape[axis] - at * each) for at in range(count)
            ]
            if sum(sizes) != shape[axis] or min(sizes) < 0:
                return None
            starts = [sum(sizes[:at]) for at in range(len(sizes))]
            return [value.pick(axis, part) for part in zip(starts, sizes, strict=True)]
        if kind == "Slice" and len(ints) >= 2 and all(one and len(one) == 1 for one in ints):
            (start,), (stop,), *rest = (one for one in ints if one)
            axis, step = (*(one[0] for one in rest), *(0, 1)[len(rest) :])
            if step == 1 and -len(shape) <= axis < len(shape):
                first, last, _ = slice(start, stop).indices(shape[axis])
                return [value.pick(axis % len(shape), (first, max(0, last - first)))]
        return None

    def _dequantised(self, node: _Node, value: _Given) -> list[_Given] | None:
        scale, zero = (*node.inputs[1:], None)[:2]
        axis = node.integer("axis", 1)
        scales = self._scales(scale, zero, axis, node.integer("block_size", 0))
        if scales is None or value.steps or value.scales or not value.shape:
            return None
        if zero is None and node.has(2):
            return None
        return [replace(value, scales=scales)]

    def _scales(self, scale: _Value, zero: _Value, axis: int, block: int = 0) -> Scales | None:
        """The scales of codes if they are stored constants; None otherwise."""
        if not isinstance(scale, _Given) or scale.steps:
            return None
        if isinstance(zero, _Made) or (isinstance(zero, _Given) and zero.steps):
            return None
        for one in (scale, zero):
            self._leave(one, "", Skipped(Reason.scales))
        return Scales(scale.name, zero.name if zero else None, axis, block)

    def _scaled(
        self, use: _Use, node: _Node, nodes: Any, scope: _Scope, value: _Given, slot: int
    ) -> _Use:
        """The use of integers by which a node multiplies, with their scales."""
        axis = 0 if "Conv" in node.kind else len(value.shape) - (1 if slot else 2)
        inputs = (*node.inputs, *[None] * 8)
        after = inputs[4] if node.kind.startswith("QLinear") else None
        if after is None:
            after = _scale_after(node.proto, nodes, scope)
        zero = inputs[slot + 2]
        scales = None if value.steps or value.scales else self._scales(after, zero, axis)
        if scales is None or (zero is None and node.has(slot + 2)):
            why = Skipped(Reason.quantised, f"{node.label} has no known scale for it")
            return use._replace(views={}, skipped=why)
        return use._replace(scales=scales)


def _scale_after(node: Any, nodes: Any, scope: _Scope) -> _Value:
    """The constant `scale` that multiplies the integers of a product: Cast(node) (a_scale scale).

    ONNX Runtime's dynamic quantisation writes this pattern.
    """
    result = node.output[0]
    after = [one for one in nodes if result in one.input]
    if len(after) == 1 and after[0].op_type == "Cast":
        result = after[0].output[0]
        after = [one for one in nodes if result in one.input]
    if len(after) != 1 or after[0].op_type != "Mul":
        return None
    other = next((name for name in after[0].input if name != result), "")
    made = next((one for one in nodes if other in one.output), None)
    if made is None or made.op_type != "Mul":
        return None
    known = [scope.get(name) for name in made.input]
    given = [value for value in known if isinstance(value, _Given)]
    return given[0] if len(given) == 1 and None in known else None


class _Node:
    """A node, its inputs, and its attributes, with references to those of a function resolved."""

    def __init__(self, proto: Any, inputs: list[_Value], given: Mapping[str, Any]) -> None:
        self.proto, self.inputs, self.given = proto, inputs, given
        self.attributes: dict[str, Any] = {}
        for one in proto.attribute:
            known = given.get(one.ref_attr_name) if one.ref_attr_name else one
            if known is not None:
                self.attributes[one.name] = known
        self.standard = proto.domain in _STANDARD
        self.kind = proto.op_type if self.standard else ""
        if proto.domain == _MICROSOFT:
            self.kind = _FUSED.get(proto.op_type, "")

    @property
    def name(self) -> str:
        outputs = [name for name in self.proto.output if name]
        return str(self.proto.name or next(iter(outputs), ""))

    @property
    def label(self) -> str:
        name = self.name.partition(";")[0]  # TensorFlow lists all fused nodes
        return f"{self.proto.op_type} {name}".rstrip()

    @property
    def why_not(self) -> Skipped:
        """Why a constant among its inputs is not a matrix."""
        known = self.standard and self.kind not in _OPAQUE
        domain = "" if self.standard else f" of {self.proto.domain}"
        reason = Reason.unmultiplied if known else Reason.unknown_use
        return Skipped(reason, f"{self.proto.op_type}{domain} uses it")

    def has(self, at: int) -> bool:
        """Whether an optional input is present, constant or not."""
        return bool(self.proto.input[at : at + 1] and self.proto.input[at])

    def graphs(self) -> Iterator[tuple[str, Any]]:
        for name, one in self.attributes.items():
            if one.HasField("g"):
                yield name, one.g
            yield from ((f"{name}{at}", graph) for at, graph in enumerate(one.graphs))

    def integer(self, name: str, default: int) -> int:
        one = self.attributes.get(name)
        return default if one is None else int(one.i)

    def integers(self, name: str) -> list[int] | None:
        one = self.attributes.get(name)
        return None if one is None else list(one.ints)

    def number(self, name: str, default: float) -> float:
        one = self.attributes.get(name)
        return default if one is None else float(one.f)

    def text(self, name: str, default: str) -> str:
        one = self.attributes.get(name)
        return default if one is None else one.s.decode("utf-8", "replace")


# --- the operators: how each uses a constant ------------------------------------------------------

_Take = Callable[[_Given], _Use]
_INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


def _takes(node: _Node) -> dict[int, _Take]:
    """How a node uses the inputs that it multiplies by or looks up, by the index of the input."""
    kind, label = node.kind, node.label
    left, right = (partial(_product, label, transposed=flag) for flag in (False, True))
    kernel = partial(_kernel, label, node.integer("group", 1))
    if kind in ("MatMul", "MatMulInteger"):
        return {0: left, 1: right}
    if kind == "QLinearMatMul":
        return {3: right}
    if kind in ("Gemm", "FusedMatMul"):
        alpha = node.number("alpha", 1.0)
        note = "" if alpha == 1 else f"{kind} multiplies it by {alpha:g}"
        flags = bool(node.integer("transA", 0)), not node.integer("transB", 0)
        return {
            at: partial(_product, label, transposed=flag, note=note)
            for at, flag in enumerate(flags)
        }
    if kind in ("Conv", "ConvTranspose", "ConvInteger", "DeformConv"):
        return {1: kernel}
    if kind == "QLinearConv":
        return {3: kernel}
    if kind in _GATES:
        weights, vectors = partial(_gates, label, _GATES[kind]), partial(_leave, label)
        return {1: weights, 2: weights, 3: vectors, 7: vectors}  # biases and peepholes
    if kind == "Gather" and node.integer("axis", 0) == 0:
        return {0: partial(_looked_up, label)}
    if kind == "Einsum":
        equation = node.text("equation", "")
        return {at: partial(_summed, label, equation, at) for at in range(len(node.inputs))}
    return {}


def _leave(node: str, value: _Given, reason: Reason = Reason.vector) -> _Use:
    return _Use(node, {}, Skipped(reason, f"of {node}"))


def _looked_up(node: str, value: _Given) -> _Use:
    if len(value.shape) != 2:
        return _leave(node, value, Reason.unmultiplied)
    return _Use(node, {}, Skipped(Reason.embedding))


def _product(node: str, value: _Given, transposed: bool, note: str = "") -> _Use:
    """A matrix or a stack of matrices, multiplied from the left or (transposed) from the right."""
    if len(value.shape) < 2:
        return _leave(node, value)
    *batch, m, n = value.shape
    count = math.prod(batch)
    flat = value.reshape((m, n) if count == 1 else (count, m, n))
    if transposed and count == 1:
        flat, transposed = flat.permute((1, 0)), False
    return _Use(node, {"": flat.seen(Transposed() if transposed else STORED)}, note=note)


def _kernel(node: str, groups: int, value: _Given) -> _Use:
    """A kernel (out, in/groups, ...), or (in, out/groups, ...) of a transposed convolution."""
    shape = value.shape
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        return _leave(node, value, Reason.dimensions)
    return _Use(node, {"": value.seen(Kernel(groups if groups > 1 else None))})


def _gates(node: str, gates: Sequence[str], value: _Given) -> _Use:
    """The gates of a recurrent layer, stored as (directions, gates · hidden, inputs)."""
    shape = value.shape
    if len(shape) != 3 or shape[1] % len(gates) or not 1 <= shape[0] <= 2:
        return _leave(node, value, Reason.dimensions)
    size = shape[1] // len(gates)
    views: dict[str, View] = {}
    for direction in range(shape[0]):
        layer: View = Member(STORED, direction)
        path = ("forward", "reverse")[direction] if shape[0] == 2 else ""
        for at, gate in enumerate(gates):
            view = layer if len(gates) == 1 else Part(layer, at * size, size)
            views[f"{path}:{gate}".strip(":")] = value.seen(view)
    return _Use(node, views)


def _summed(node: str, equation: str, slot: int, value: _Given) -> _Use:
    """The matrix (batch, rows, columns) of an operand of Einsum, which sums over the columns."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != 2 or slot >= 2:
        return _leave(node, value, Reason.unknown_use)
    mine, other = terms[slot], terms[1 - slot]
    if not arrow:
        letters = given.replace(",", "")
        result = "".join(letter for letter in letters if letters.count(letter) == 1)
    parts = ["", "", ""]  # of a batch, of rows, of columns
    for letter in mine:
        if mine.count(letter) > 1 or not (letter in result or letter in other):
            return _leave(node, value, Reason.unknown_use)
        parts[2 if letter not in result else 0 if letter in other else 1] += letter
    if len(mine) != len(value.shape) or not parts[2]:
        reason = Reason.unknown_use if len(mine) != len(value.shape) else Reason.unmultiplied
        return _leave(node, value, reason)
    moved = value.permute([mine.index(letter) for letter in "".join(parts)])
    sizes = [math.prod(value.shape[mine.index(letter)] for letter in part) for part in parts]
    if sizes[0] > 1 and sizes[1] == 1:
        return _Use(node, {}, Skipped(Reason.one_row, f"{sizes[0]} groups"))
    return _Use(node, {"": moved.reshape(sizes if sizes[0] > 1 else sizes[1:]).seen(STORED)})


def _concatenated(node: _Node) -> list[_Given] | None:
    """Blocks of one constant in another order; None for all other inputs."""
    cuts = [value.cut for value in node.inputs if isinstance(value, _Given) and value.cut]
    if len(cuts) < len(node.inputs):
        return None
    whole, dim, _ = cuts[0]
    axis, rank = node.integer("axis", 0), len(whole.shape)
    own = {axis + rank if axis < 0 else axis}
    if any(value != whole or side not in own for value, side, _ in cuts):
        return None
    return [whole.pick(dim, *(block for _, _, block in cuts))]


# --- shapes ---------------------------------------------------------------------------------------


def _reshaped(
    shape: tuple[int, ...], target: list[int] | None, keeps_zero: bool
) -> tuple[int, ...] | None:
    """The shape after Reshape; None if the target does not fit a tensor of this shape."""
    if target is None or any(side < -1 for side in target) or target.count(-1) > 1:
        return None
    if not keeps_zero:
        target = [
            shape[at] if not side and at < len(shape) else side for at, side in enumerate(target)
        ]
    known, total = math.prod(side for side in target if side >= 0), math.prod(shape)
    if -1 in target:
        if not known or total % known:
            return None
        target = [total // known if side < 0 else side for side in target]
    return tuple(target) if math.prod(target) == total else None


def _squeezed(shape: tuple[int, ...], axes: list[int] | None) -> tuple[int, ...] | None:
    """The shape after Squeeze; None if one of the axes does not have length 1."""
    if not axes:
        return tuple(side for side in shape if side != 1)
    rank = len(shape)
    if any(not -rank <= axis < rank or shape[axis] != 1 for axis in axes):
        return None
    gone = {axis % rank for axis in axes}
    return tuple(side for at, side in enumerate(shape) if at not in gone)
