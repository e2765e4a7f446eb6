"""Infers the view of a tensor in a file without module classes: a matrix, a stack, or a kernel.

Names decide first: a `kernel` is stored with the inputs first, as in Keras and Flax; "conv" in a
name means a convolution. The bias of the same layer shows the number of outputs. Otherwise the
shape decides, and a note states that this is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wellcond.operators.views import STORED, Axes, InputsFirst, Kernel, Part, Transposed, View
from wellcond.text import join_remarks
from wellcond.weights.architectures import KERNEL_OF_HEADS, KERNEL_OF_OUTPUT

Shapes = Mapping[str, tuple[int, ...]]
NamedViews = tuple[dict[str, View], str]  # views by their names, and a note

# Kernels of Keras and Flax; TensorFlow adds `:0`.
_INPUTS_FIRST = re.compile(r"(depthwise_|pointwise_|recurrent_)?kernel(:\d+)?")
_EXPERTS = r"experts?|moe|_exps\b"
_STACKED = re.compile(rf"{_EXPERTS}|lora", re.IGNORECASE)
_SCANNED = re.compile(rf"{_EXPERTS}|(^|[./])scan", re.IGNORECASE)  # nn.scan (Flax) stacks layers
# Attention of Haiku: (inputs, heads, size), and (heads, size, outputs).
_HAIKU = re.compile(r"//(query|key|value|gating|output)_w$")
# By default Flax numbers its classes. Keras has `conv2d_transpose`, with the inputs last.
_TRANSPOSED = re.compile(r"ConvTranspose(_\d+)?")
# The gates of the recurrent cells of Keras, in their order, with the names of torch.
KERAS_GATES = {"lstm_cell": "ifgo", "conv_lstm_cell": "ifgo", "gru_cell": "zrn"}
_CELL = re.compile(rf"({'|'.join(KERAS_GATES)})(_\d+)?")
_WINDOW, _SIDE = 64, 11  # the longest usual kernels with one axis, and with two

BY_NAME = "read as a Keras {} because of its name: no config.json describes it"
_ONE_GROUP = "read as one group, although it may be depthwise: audit the model"
_GROUPS = "read as one group, but its bias fits a transposed convolution of {}: audit the model"
_EITHER = "the kernel of a Conv1d or a ConvTranspose1d, given its bias: the matrix is the same"
_LONG = "a kernel, guessed from its bias: the weight of an nn.Bilinear also has a bias"
_BILINEAR = "the weight of an nn.Bilinear, guessed from its square slices"
_KERNEL = "a kernel, guessed from its shape"
_STACK = "a stack of matrices, guessed from its shape"
_HWIO = "stored as (…, in, out), guessed from its shape"
_OIHW = "stored as (out, in, …), guessed from its shape: a `kernel` usually has the inputs first"
_VOLUME = "read as the kernel of a 3-D convolution: in a scan over 2-D convolutions it is a stack"
_WINDOW_FIRST = "stored as (window, in, out), guessed from its name: it may be a stack"
_HEADS_FIRST = "stored as (in, heads, size), guessed from its name: it may be a stack"
_INPUTS_LAST = "stored as (…, in, out), which is a guess: `transpose_kernel` changes the order"
_GUESSES = (
    *(_LONG, _BILINEAR, _KERNEL, _STACK, _HWIO),
    *(_OIHW, _WINDOW_FIRST, _HEADS_FIRST, _INPUTS_LAST),
)


def describe_groups(kernels: int) -> str:
    """A remark on this number of kernels in a file, or ""."""
    if not kernels:
        return ""
    are = "1 kernel is" if kernels == 1 else f"{kernels} kernels are"
    return f"{are} read as one group, because a file does not state the groups: audit the model"


def infer_views(name: str, shapes: Shapes) -> NamedViews:
    """The matrices in the tensor with this name, given the shapes of all tensors of a file."""
    shape = shapes[name]
    *modules, own = re.split(r"[./]", name)
    if len(shape) > 1 and _INPUTS_FIRST.fullmatch(own):
        if cell := _view_cell(name, own, modules, shapes):
            return cell
        bias = shapes.get(f"{name[: -len(own)]}bias", ())
        return _view_inputs_first(name, modules[-1] if modules else "", shape, bias)
    if len(shape) < 3:
        return {"": STORED}, ""
    if haiku := _HAIKU.search(name):
        inputs, stacked = 1 + (haiku[1] == "output"), len(shape) > 3
        return {"": _inputs_first(shape, inputs, stacked)}, "" if len(shape) < 5 else _STACK
    bias = shapes.get(f"{name[: -len(own)]}bias", ()) if own == "weight" else ()
    if len(shape) == 3:
        return _view_three_axes(name, own, shape, bias)
    square = shape[-2] == shape[-1] <= _SIDE  # probably a window
    inputs_first = _is_spatial(shape[:-2], shape[-2:]) and not square
    if inputs_first and (own != "weight" or bias == shape[-1:]):
        return {"kernel": InputsFirst(len(shape) - 1)}, _HWIO
    return _view_kernel(shape, bias, "" if own == "weight" or _is_in_conv(name) else _KERNEL)


def guess_views(name: str, shapes: Shapes) -> NamedViews | None:
    """The matrices of a tensor in a file of any framework, if they are a guess; otherwise None.

    Its axes can be (height, width, in, out), (out, in, height, width) or a stack. The result is
    None if the name determines their order.
    """
    *_, own = re.split(r"[./]", name)
    views, note = infer_views(name, shapes)
    stack = len(shapes[name]) == 3 and _STACKED.search(name)
    ordered = own == "weight" or _INPUTS_FIRST.fullmatch(own) or _HAIKU.search(name) or stack
    if len(shapes[name]) < 3 or (ordered and not any(guess in note for guess in _GUESSES)):
        return None
    return views, note or _KERNEL


def view_by_bias(name: str, shapes: Shapes) -> NamedViews | None:
    """The matrices of a tensor whose bias fits only one order of axes; otherwise None.

    The bias of `conv1_W` is `conv1_b`; that of `conv/w` is `conv/b`.
    """
    shape, own = shapes[name], re.split(r"[./]", name)[-1]
    stem, axes = name.removesuffix(own), len(shape)
    beside = [f"{stem}{one}" for one in ("bias", "biases", "b")]
    beside.insert(0, re.sub(r"w$", "b", name, flags=re.IGNORECASE))
    bias = next((shapes[one] for one in beside if one != name and one in shapes), ())
    if axes == 3 and len(bias) == 2 and bias[0] == shape[0] and bias[1] in shape[1:]:
        return {"": STORED}, ""  # a stack, whatever the order in each
    places = [axis for axis, side in enumerate(shape) if (side,) == bias]
    if len(places) != 1:
        return None
    (place,) = places
    if place >= max(2, axes - 2):  # (…, in, out), or transposed (…, out, in)
        return {"kernel": InputsFirst(axes - 1)}, ""
    # (out, in, …), or transposed (in, out, …); with three axes this could be (window, out, in).
    return ({"": Kernel()}, "") if place == 0 or (place == 1 and axes > 3) else None


def view_groups(groups: int) -> dict[str, View]:
    """A kernel (out, in/groups, …) of a convolution whose number of groups is known."""
    return {"": Kernel(groups if groups > 1 else None)}


def view_gates(gates: str, shape: tuple[int, ...]) -> dict[str, View]:
    """One block of the last axis per gate; the other axes are the inputs."""
    whole, size = InputsFirst(len(shape) - 1), shape[-1] // len(gates)
    return {gate: Part(whole, i * size, size) for i, gate in enumerate(gates)}


def _view_cell(name: str, own: str, modules: list[str], shapes: Shapes) -> NamedViews | None:
    """The gates of a recurrent cell of Keras, if the shapes of both its kernels fit its name."""
    cell = _CELL.fullmatch(modules[-1]) if modules else None
    if cell is None or not own.startswith(("kernel", "recurrent_kernel")):
        return None
    kind, gates = cell[1], KERAS_GATES[cell[1]]
    stem, kernel = name.removesuffix(own), own.removeprefix("recurrent_")
    given, hidden = (shapes.get(f"{stem}{part}{kernel}", ()) for part in ("", "recurrent_"))
    alike = len(given) == len(hidden) > 1 and (len(given) > 2) == kind.startswith("conv")
    if not (alike and given[-1] == hidden[-1] == len(gates) * hidden[-2]):
        return None
    return view_gates(gates, shapes[name]), BY_NAME.format(kind)


def _view_inputs_first(
    name: str, module: str, shape: tuple[int, ...], bias: tuple[int, ...]
) -> NamedViews:
    axes = len(shape)
    if axes == 2:
        return {"": InputsFirst(1)}, ""
    if "depthwise_kernel" in name:
        note = _ONE_GROUP if shape[-2] > 1 else ""
        return {"kernel": InputsFirst(axes - 2)}, note
    if _TRANSPOSED.fullmatch(module):
        return _view_transposed(shape, bias)
    of_heads = bool(KERNEL_OF_HEADS.fullmatch(module.lower()))
    of_output = bool(KERNEL_OF_OUTPUT.fullmatch(module.lower()))
    if len(bias) > 1 and (seen := _view_by_bias(shape, bias, of_heads, of_output and axes == 4)):
        return seen
    scanned = bool(_SCANNED.search(name))
    if len(bias) != 1 and axes == 3 + scanned:
        if of_heads:
            stack = not scanned and shape[0] < min(shape[1:])
            return {"": _inputs_first(shape, 1, scanned)}, _HEADS_FIRST if stack else ""
        if of_output:
            return {"": _inputs_first(shape, 2, scanned)}, ""
    if axes == 3 and scanned:
        return {"": Transposed()}, ""
    if max(shape[:-2]) > _SIDE and _is_spatial(shape[2:], shape[:2]) and bias != shape[-1:]:
        return {"": Kernel()}, _OIHW
    known = bias == shape[-1:] or (
        _is_in_conv(name) if axes == 3 else max(shape[:-2]) <= _WINDOW and not scanned
    )
    note = "" if known else _WINDOW_FIRST
    if known and axes == 5 and not bias and "3d" not in name.lower():
        note = _VOLUME
    if shape[-2] == 1 < shape[-1]:
        note = join_remarks(note, _ONE_GROUP)
    return {"kernel": InputsFirst(axes - 1)}, note


def _view_transposed(shape: tuple[int, ...], bias: tuple[int, ...]) -> NamedViews:
    """A transposed convolution of Flax: (…, in, out), or (…, out, in) with transpose_kernel."""
    inputs, outputs = shape[-2:]
    if bias == (inputs,) != (outputs,):
        return {"kernel": InputsFirst(len(shape) - 1)}, ""
    known = bias == (outputs,) != (inputs,)
    *window, last = (axis for axis in range(len(shape)) if axis != len(shape) - 2)
    view = Axes(rows=(len(shape) - 2,), columns=(*window, last))
    return {"kernel": view}, "" if known else _INPUTS_LAST


def _view_by_bias(
    shape: tuple[int, ...], bias: tuple[int, ...], of_heads: bool, stacked: bool
) -> NamedViews | None:
    """A kernel whose bias has the shape of all outputs, or of the outputs of stacked layers."""
    outputs = len(bias)
    whole = bias == shape[-outputs:]
    layers = bias[0] == shape[0] and outputs < len(shape) and bias[1:] == shape[1 - outputs :]
    if whole and (of_heads or not layers):
        return {"": InputsFirst(len(shape) - outputs)}, ""
    if not layers:
        return None
    note = _STACK if whole and not stacked else ""
    if len(shape) == 3:
        return {"": Transposed()}, note
    return {"": _inputs_first(shape, len(shape) - outputs, stacked=True)}, note


def _inputs_first(shape: tuple[int, ...], inputs: int, stacked: bool) -> View:
    """The view whose first `inputs` axes are inputs, after a stack axis as in Flax's nn.scan."""
    if not stacked:
        return InputsFirst(inputs)
    columns, rows = range(1, 1 + inputs), range(1 + inputs, len(shape))
    return Axes(tuple(rows), tuple(columns), stack=(0,))


def _is_spatial(sides: tuple[int, ...], channels: tuple[int, ...]) -> bool:
    """Whether these sides are a window and not channels; a 1x1 window does not count."""
    if len(sides) < 2 or max(sides) > _SIDE or set(sides) == {1}:
        return False
    return max(sides) < min(channels)


def _view_three_axes(
    name: str, own: str, shape: tuple[int, ...], bias: tuple[int, ...]
) -> NamedViews:
    """Conv1d (out, in, window), ConvTranspose1d (in, out, window), or a stack of matrices."""
    m, n, window = shape
    if _is_in_conv(name):
        return _view_kernel(shape, bias)
    if "bilinear" in name.lower():
        return {"": STORED}, ""
    if len(bias) == 1 and bias[0] in (m, n):
        if n == window > _SIDE and bias[0] == m:
            return {"": STORED}, _BILINEAR
        if bias[0] == m != n and window > 1:
            return _view_kernel(shape, bias, _LONG)
        return _view_kernel(shape, bias, _EITHER if m == n else "")
    if _STACKED.search(name) or len(bias) == 2:
        return {"": STORED}, ""
    small = own == "weight" and _is_small(window, m, n)
    if small or _count_groups(shape, bias) or (m > 1 and 1 in (n, window)):
        return _view_kernel(shape, bias, _KERNEL)
    return {"": STORED}, _STACK if m > 1 else ""


def _is_in_conv(name: str) -> bool:
    return "conv" in name.lower()


def _is_small(window: int, m: int, n: int) -> bool:
    """Whether the last side is the window of a kernel and not a side of a matrix."""
    return window <= _WINDOW and 2 * window <= m and (2 * window <= n or n <= 4)


def _view_kernel(shape: tuple[int, ...], bias: tuple[int, ...], note: str = "") -> NamedViews:
    """The view of a kernel (out, in, …), or of a transposed one (in, out, …)."""
    groups = _count_groups(shape, bias)
    if groups:
        note = join_remarks(note, _GROUPS.format(f"{groups} groups"))
    elif shape[1] == 1 < shape[0]:
        note = join_remarks(note, _ONE_GROUP)
    return {"": Kernel()}, note


def _count_groups(shape: tuple[int, ...], bias: tuple[int, ...]) -> int:
    """The groups of a transposed convolution (in, out/groups, …), from its bias; 0 if unknown."""
    if len(bias) != 1 or bias[0] == shape[0] or not shape[1]:
        return 0
    groups, rest = divmod(bias[0], shape[1])
    return groups if 1 < groups < shape[0] and not rest and shape[0] % groups == 0 else 0
