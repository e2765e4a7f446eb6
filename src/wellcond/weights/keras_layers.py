"""The matrices in the variables of a Keras layer, by its class and its config.

Keras stores variables by number, so the class also determines their names. Kernels have their
inputs first: (in, out), and (height, width, in/groups, out) for a convolution, (height, width, in,
multiplier) for a depthwise one, (height, width, out, in) for a transposed one, (in, heads, size)
and (heads, size, out) for attention, (in, gates · units) for a recurrent cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wellcond.operators.views import Axes, InputsFirst
from wellcond.weights.fused import Views
from wellcond.weights.kernels import BY_NAME, KERAS_GATES, view_gates
from wellcond.weights.names import find_non_weights
from wellcond.weights.reasons import Reason, Skipped

_DIMENSIONS = (1, 2, 3)
_CONVOLUTIONS = {f"conv{n}d": n for n in _DIMENSIONS}
_TRANSPOSED = {f"conv{n}d_transpose": n for n in _DIMENSIONS}
_DEPTHWISE = {f"depthwise_conv{n}d": n for n in _DIMENSIONS}
_SEPARABLE = {f"separable_conv{n}d": n for n in _DIMENSIONS}
# The cell of a recurrent layer, and the gates of a cell.
_CELLS = {"lstm": "lstm_cell", "gru": "gru_cell", "simple_rnn": "simple_rnn_cell"}
_CELLS |= {f"conv_lstm{n}d": "conv_lstm_cell" for n in _DIMENSIONS}
_GATES = {**KERAS_GATES, "simple_rnn_cell": ""}
_ATTENTION = ("multi_head_attention", "group_query_attention", "grouped_query_attention")
# The number of input axes of a projection of attention.
_PROJECTIONS = {"query_dense": 1, "key_dense": 1, "value_dense": 1, "output_dense": 2}
_NAMES_OF_PROJECTIONS = {"query": "query_dense", "key": "key_dense", "value": "value_dense"}
_NAMES_OF_PROJECTIONS |= {"attention_output": "output_dense"}
_NORMALISATIONS = tuple(
    f"{kind}_normalization" for kind in ("batch", "layer", "group", "rms", "unit")
)
# The key of a layer's config that describes the layer in this attribute.
_PARTS = {"cell": "cell", "layer": "layer", "forward_layer": "layer"}
_PARTS |= {"backward_layer": "backward_layer"}
_WRAPPERS = ("bidirectional", "time_distributed", "spectral_normalization", "wrapper", "rnn")

_OF_KERNEL = ("kernel", "bias")
_VARIABLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dense", "einsum_dense", *_PROJECTIONS), _OF_KERNEL),
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE), _OF_KERNEL),
    **dict.fromkeys(_SEPARABLE, ("depthwise_kernel", "pointwise_kernel", "bias")),
    **dict.fromkeys(_GATES, ("kernel", "recurrent_kernel", "bias")),
    "embedding": ("embeddings",),
    "reversible_embedding": ("embeddings", "reverse_embeddings"),
    "spectral_normalization": ("kernel", "vector_u"),
}
# A setting can omit some of these variables, so numbers identify them only if all are present.
_OF_ALL = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "group_normalization": ("gamma", "beta"),
}
_KNOWN = {*_VARIABLES, *_OF_ALL, *_CELLS, *_ATTENTION, *_NORMALISATIONS, *_WRAPPERS}
_KNOWN -= {*_PROJECTIONS}

_UNKNOWN = "its layer is unknown, because there is no config.json: save the model as .keras, which "
_UNKNOWN += "contains one"
_NOT_DESCRIBED = "config.json does not describe it: reshape it to (inputs, outputs), and audit that"
_NO_EQUATION = "its equation is unknown, because there is no config.json: save the model as .keras"
_ASSUMED = "its layer is unknown: read as (inputs, outputs)"


@dataclass(frozen=True)
class Layer:
    """A layer, as far as a file describes it.

    Attributes:
        kind: its class in snake case, or the part of a layer that it is; "" for an unknown class.
        config: the config that Keras saved; empty if it is unknown.
        guess: whether its class is known only from its name.
        described: whether the file has a config of the model.
    """

    kind: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    guess: bool = False
    described: bool = False

    def part(self, attribute: str) -> Layer | None:
        """The layer in this attribute of a Keras layer; None if it is unknown."""
        own = attribute.lstrip("_")
        if self.kind in _ATTENTION and own in _PROJECTIONS:
            return Layer(own, described=self.described)
        if attribute == "cell" and self.kind in _CELLS:
            return Layer(_CELLS[self.kind], self.config, described=self.described)
        if self.kind in _WRAPPERS and attribute in _PARTS:
            inner = self.config.get(_PARTS[attribute]) or self.config.get("layer")
            if isinstance(inner, Mapping):
                return read_layer(inner)
        return None

    def inside(self, name: str) -> Layer:
        """The inner layer of this name, if only the name is known."""
        part: Layer | None = None
        if self.kind in _ATTENTION and name in _NAMES_OF_PROJECTIONS:
            part = self.part(_NAMES_OF_PROJECTIONS[name])
        elif self.kind in _WRAPPERS:
            way = name.partition("_")[0]
            part = self.part(f"{way}_layer" if way in ("forward", "backward") else "layer")
        kind = kind_of(name)
        return part or (Layer(kind, guess=True) if kind else self)

    @property
    def innermost(self) -> Layer:
        """Its cell if it is recurrent, otherwise the layer itself."""
        return self.part("cell") or self if self.kind in _CELLS else self

    def members(self, attribute: str) -> Iterable[Mapping[str, Any]]:
        """The configs of the layers in the container in this attribute."""
        listed = self.config.get(attribute)
        listed = listed if isinstance(listed, list) else []
        return [one for one in listed if isinstance(one, Mapping)]


def read_layer(saved: Mapping[str, Any]) -> Layer:
    """The layer with this serialised form. A class that is not from Keras has the kind ""."""
    config, module = saved.get("config"), str(saved.get("module") or "keras")
    kind = snake_case(str(saved.get("class_name")))
    of_keras = module.partition(".")[0] in ("keras", "tensorflow", "tf_keras", "keras_core")
    known = kind in _KNOWN and of_keras and not saved.get("registered_name")
    config = config if isinstance(config, Mapping) else {}
    return Layer(kind if known else "", config, described=True)


def snake_case(name: str) -> str:
    """The name that Keras gives to the group of a layer of this class."""
    name = re.sub(r"\W", "", name)
    return re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name).lower()


def kind_of(name: str) -> str:
    """The class of Keras whose layers and groups have such a name, or ""."""
    kind = re.sub(r"_\d+$", "", name)
    kind = re.sub(r"^(forward|backward)_", "", kind)
    return kind if kind in _KNOWN else ""


def name_of(layer: Layer, number: str, count: int) -> str:
    """The name that Keras gives to variable `number` of a layer with `count` variables."""
    names = _VARIABLES.get(layer.kind, ())
    if len(_OF_ALL.get(layer.kind, ())) == count:
        names = _OF_ALL[layer.kind]
    place = int(number) if number.isdecimal() and len(number) < 4 else len(names)
    return names[place] if place < len(names) else f"vars/{number}"


def is_trained(layer: Layer, name: str) -> bool:
    """Whether a variable is trained, by its name; moving statistics and parts of codes are not."""
    own, known = name.rpartition("/")[2], _VARIABLES.get(layer.kind, ())
    return not own.startswith("moving_") and (not known or own in known)


def find_views(layer: Layer, name: str, shape: tuple[int, ...]) -> Views | Skipped:
    """The matrices in a variable with at least two axes, or why it has none.

    Args:
        layer: the layer of the variable.
        name: the full path of the variable.
        shape: the shape of the variable.
    """
    found = _find_views(layer, name, shape)
    unsure = len(shape) > 2 or layer.kind in _GATES  # a transposed matrix has the same spectrum
    if layer.guess and unsure and isinstance(found, Views):
        return Views(found.views, BY_NAME.format(layer.kind))
    return found


def _find_views(layer: Layer, name: str, shape: tuple[int, ...]) -> Views | Skipped:
    kind, ndim = layer.kind, len(shape)
    own = name.rpartition("/")[2]
    if own == "embeddings":
        return Skipped(Reason.embedding)
    if own == "bias":
        return Skipped(Reason.vector, "a bias")
    if kind == "spectral_normalization":
        if own == "kernel":
            return Skipped(Reason.same, "the kernel of the wrapped layer")
        return Skipped(Reason.component, "part of the estimate of a norm")
    if kind in _NORMALISATIONS:
        return Skipped(Reason.normalisation)
    if kind == "dense" and own == "kernel" and ndim == 2:
        return _matrix(1)
    if kind in _PROJECTIONS and own == "kernel" and ndim > 2:
        return _matrix(_PROJECTIONS[kind])
    if kind == "einsum_dense" and own == "kernel":
        return _find_einsum(layer, ndim)
    if kind == "reversible_embedding" and own == "reverse_embeddings" and ndim == 2:
        return _matrix(1)
    if kind in _GATES and own in ("kernel", "recurrent_kernel"):
        return _find_gates(_GATES[kind], shape)
    dimensions = (_CONVOLUTIONS | _TRANSPOSED | _DEPTHWISE | _SEPARABLE).get(kind)
    if dimensions is not None and ndim == dimensions + 2:
        if kind in _DEPTHWISE or own == "depthwise_kernel":
            return Views({"kernel": InputsFirst(ndim - 2, groups=shape[-2])})
        groups = _read_groups(layer, shape) if kind in _CONVOLUTIONS else 1
        return Views({"kernel": InputsFirst(ndim - 1, groups)})
    if kind in _KNOWN:
        return Skipped(Reason.unknown_use)
    module = name.removesuffix(f"/{own}").removesuffix("/vars")
    by_name = find_non_weights({f"{module}/weight": (shape, "float32")})
    if by_name:
        return next(iter(by_name.values()))
    if ndim == 2:
        return Views({"": InputsFirst(1)}, _ASSUMED)
    return Skipped(Reason.unknown_use, _NOT_DESCRIBED if layer.described else _UNKNOWN)


def _matrix(inputs: int) -> Views:
    return Views({"": InputsFirst(inputs)})


def _read_groups(layer: Layer, shape: tuple[int, ...]) -> int | None:
    """The number of groups of a convolution; None if it is unknown."""
    groups = layer.config.get("groups", 1 if layer.config else None)
    if not isinstance(groups, int) or groups < 1 or shape[-1] % groups:
        return None
    return groups


def _find_gates(gates: str, shape: tuple[int, ...]) -> Views | Skipped:
    """One block of the last axis per gate; the other axes are the inputs."""
    if not gates:
        return Views({"": InputsFirst(len(shape) - 1)})
    if shape[-1] % len(gates):
        return Skipped(Reason.unknown_use, f"its columns are not {len(gates)} gates")
    return Views(view_gates(gates, shape))


def _find_einsum(layer: Layer, ndim: int) -> Views | Skipped:
    """The kernel of an einsum, whose columns are the axes that the input has and the output lacks.

    An axis that input, kernel and output share is a batch axis and gives a stack of matrices.
    """
    equation = layer.config.get("equation")
    if not isinstance(equation, str):
        return _matrix(1) if ndim == 2 else Skipped(Reason.unknown_use, _NO_EQUATION)
    match = re.fullmatch(r"([a-zA-Z]*),([a-zA-Z]*)->([a-zA-Z]*)", re.sub(r"[\s.]", "", equation))
    unknown = Skipped(Reason.unknown_use, "its equation is not that of a linear map")
    if match is None:
        return unknown
    given, kernel, output = match.groups()
    rows = tuple(i for i, axis in enumerate(kernel) if axis not in given and axis in output)
    columns = tuple(i for i, axis in enumerate(kernel) if axis in given and axis not in output)
    stack = tuple(i for i, axis in enumerate(kernel) if axis in given and axis in output)
    whole = len(rows) + len(columns) + len(stack) == ndim == len({*kernel}) == len(kernel)
    if not (whole and rows and columns):
        return unknown
    return Views({"": Axes(rows, columns, stack)})
