"""The view of a tensor in a file that no module explains: a matrix, a stack, or a kernel.

A file has no classes, so names decide first: `kernel` is stored with the inputs first, as in Keras
and Flax; "conv" is a convolution. A bias beside a weight shows the number of its outputs. Otherwise
the shape decides, and a note calls a guess a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wellcond.operators.views import STORED, InputsFirst, Kernel, Transposed, View
from wellcond.text import join_remarks
from wellcond.weights.architectures import KERNEL_OF_HEADS, KERNEL_OF_OUTPUT

Shapes = Mapping[str, tuple[int, ...]]
NamedViews = tuple[dict[str, View], str]  # views by their names, and a note

# Kernels of Keras and Flax; TensorFlow adds `:0`.
_INPUTS_FIRST = re.compile(r"(depthwise_|pointwise_|recurrent_)?kernel(:\d+)?")
_EXPERTS = r"experts?|moe"
_STACKED = re.compile(rf"{_EXPERTS}|lora", re.IGNORECASE)
_SCANNED = re.compile(rf"{_EXPERTS}|(^|[./])scan", re.IGNORECASE)  # nn.scan (Flax) stacks layers
_WINDOW, _SIDE = 64, 11  # the longest usual kernels with one axis, and with two

_ONE_GROUP = "read as one group, because no file says whether it is depthwise: audit the model"
_GROUPS = "read as one group, but its bias fits a transposed convolution of {}: audit the model"
_EITHER = "by its bias the kernel of a Conv1d or of a ConvTranspose1d: the same matrix in both"
_LONG = "by its bias a kernel, which is a guess: the weight of an nn.Bilinear has a bias too"
_BILINEAR = "by its square slices the weight of an nn.Bilinear, which is a guess"
_KERNEL = "a kernel only by its shape, which is a guess"
_STACK = "a stack of matrices only by its shape, which is a guess"
_HWIO = "stored as (…, in, out) by its shape, which is a guess"
_OIHW = "stored as (out, in, …) by its shape, which is a guess: a `kernel` has the inputs first"
_WINDOW_FIRST = "stored as (window, in, out) by its name, which is a guess: it may be a stack"


def describe_groups(kernels: int) -> str:
    """A sentence on this number of kernels in a file; "" if there are none."""
    if not kernels:
        return ""
    are = "1 kernel is" if kernels == 1 else f"{kernels} kernels are"
    return f"{are} read as one group, because a file does not say how many: audit the model"


def infer_views(name: str, shapes: Shapes) -> NamedViews:
    """The matrices in the tensor of this name, among the tensors of a file."""
    shape = shapes[name]
    *modules, own = re.split(r"[./]", name)
    if len(shape) > 1 and _INPUTS_FIRST.fullmatch(own):
        bias = shapes.get(f"{name[: -len(own)]}bias", ())
        return _view_inputs_first(name, modules[-1] if modules else "", shape, bias)
    if len(shape) < 3:
        return {"": STORED}, ""
    bias = shapes.get(f"{name[: -len(own)]}bias", ()) if own == "weight" else ()
    if len(shape) == 3:
        return _view_three_axes(name, own, shape, bias)
    square = shape[-2] == shape[-1] <= _SIDE  # probably a window
    inputs_first = _is_spatial(shape[:-2], shape[-2:]) and not square
    if inputs_first and (own != "weight" or bias == shape[-1:]):
        return {"kernel": InputsFirst(len(shape) - 1)}, _HWIO
    return _view_kernel(shape, bias, "" if own == "weight" or _is_in_conv(name) else _KERNEL)


def _view_inputs_first(
    name: str, module: str, shape: tuple[int, ...], bias: tuple[int, ...]
) -> NamedViews:
    if len(shape) == 2:
        return {"": InputsFirst(1)}, ""
    if "depthwise_kernel" in name:
        note = _ONE_GROUP if shape[-2] > 1 else ""
        return {"kernel": InputsFirst(len(shape) - 2)}, note
    if KERNEL_OF_HEADS.fullmatch(module.lower()):
        return {"": InputsFirst(1)}, ""
    all_but_one = InputsFirst(len(shape) - 1)
    if len(shape) == 3 and KERNEL_OF_OUTPUT.fullmatch(module.lower()):
        return {"": all_but_one}, ""
    if len(shape) == 3 and (_SCANNED.search(name) or len(bias) == 2):
        return {"": Transposed()}, ""
    if max(shape[:-2]) > _SIDE and _is_spatial(shape[2:], shape[:2]) and bias != shape[-1:]:
        return {"": Kernel()}, _OIHW
    known = len(shape) != 3 or _is_in_conv(name) or bias == shape[-1:]
    return {"kernel": all_but_one}, "" if known else _WINDOW_FIRST


def _is_spatial(sides: tuple[int, ...], channels: tuple[int, ...]) -> bool:
    """Whether these sides are a window rather than channels; a 1x1 window does not count."""
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
    """Whether the last side is the window of a kernel rather than a side of a matrix."""
    return window <= _WINDOW and 2 * window <= m and (2 * window <= n or n <= 4)


def _view_kernel(shape: tuple[int, ...], bias: tuple[int, ...], note: str = "") -> NamedViews:
    """A kernel as stored, (out, in, …) or transposed (in, out, …), which both have this view."""
    groups = _count_groups(shape, bias)
    if groups:
        note = join_remarks(note, _GROUPS.format(f"{groups} groups"))
    elif shape[1] == 1 < shape[0]:
        note = join_remarks(note, _ONE_GROUP)
    return {"": Kernel()}, note


def _count_groups(shape: tuple[int, ...], bias: tuple[int, ...]) -> int:
    """The groups of a transposed convolution (in, out/groups, …), by its bias; 0 if unknown."""
    if len(bias) != 1 or bias[0] == shape[0] or not shape[1]:
        return 0
    groups, rest = divmod(bias[0], shape[1])
    return groups if 1 < groups < shape[0] and not rest and shape[0] % groups == 0 else 0
