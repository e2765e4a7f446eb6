"""Quantised weights in files: the tensors that are codes or scales, and the number of entries.

If a scale belongs to a tensor, of any dtype, the effective weight is their product, so the values
of the tensor are not those of a weight. Packed codes count as the entries that they unpack to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from wellcond.text import last_part
from wellcond.weights.matrices import entries
from wellcond.weights.reasons import Reason, Skipped

Tensors = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype by name

FLOATING = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
# float8_e4m3fn, or F6_E2M3, for which torch has no name; tensors of powers of two are scales.
_NARROW = re.compile(r"(F|float)[864](_|$)")
_POWERS = re.compile(r"(F|float)8_e8m0(fnu)?", re.IGNORECASE)
# int64 is used for positions and counters and bool for masks, but hardly for codes of a weight.
_CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_NO_CODES = re.compile(
    r"ids?|ind(ex|ices)|mask|bias|positions?|counts?|lengths?|buckets?"
    r"|tril|triu|causal|faces|edges|adj(acency)?|neighbou?rs|connectivity"
)
# Tensors that only a quantised weight has, and tensors that other layers can also have.
_SCALES = re.compile(
    r"(weight|input|output|activation|act|[kvq])_(scales?(_inv|_\d)?|(global|channel)_scale|zero(s|_points?)?)"
    r"|(nested_)?(absmax|quant_map)|SCBt?|scales?_(inv|and_zeros?)|qscales?|qzeros"
)
_PERHAPS_SCALES = re.compile(
    r"(.*_)?(scales?|scalings?|zeros?|zero_points?|codebooks?|luts?|lookup_tables?|biases)"
)
# Scales of codes that are stored in a wide dtype as `weight`, or as X with the scale X_scale.
_SURELY_OF_WEIGHT = re.compile(
    r"weight_(scales?(_inv|_\d)?|(global|channel)_scale)|absmax|SCBt?|qscales?|scale_(inv|weight)"
)
_ZEROS = ("zeros", "zero", "zero_points", "zero_point", "biases")  # next to `scale` and `scales`
_FILE = re.compile(r".*\.(safetensors|pt|pth|bin|ckpt|tar)/")
_OF_NAME = re.compile(r"(.+)_((?:scales?|qscales?|absmax)(?:_inv)?)")


def is_narrow(dtype: str) -> bool:
    """Whether a dtype is floating point with fewer than 16 bits, used for codes."""
    return bool(_NARROW.match(dtype))


def is_power(dtype: str) -> bool:
    """Whether a dtype contains only powers of two, used for scales."""
    return bool(_POWERS.fullmatch(dtype))


def find_codes_and_scales(
    tensors: Tensors, holds_codes: Callable[[str], bool]
) -> dict[str, Skipped]:
    """The tensors that are codes or scales of a quantised weight, and why they are skipped."""
    return _find_beside_packed(tensors) | _find_in_wide_dtype(tensors, holds_codes)


def _find_beside_packed(tensors: Tensors) -> dict[str, Skipped]:
    """The tensors that belong to a weight of integers or float8, with the name of that weight.

    These are tensors whose name extends that of the weight (`weight.absmax` for `weight`), scales
    in the same module, and other tensors of the module whose names do not end in weight or bias. A
    packed tensor to which more than a bias or a scalar belongs is certainly quantised, and is also
    found.
    """
    named = {
        name
        for name, (_, dtype) in tensors.items()
        if any(p.fullmatch(name.rpartition(".")[2]) for p in (_SCALES, _PERHAPS_SCALES))
        or is_power(dtype)
    }
    first: dict[str, str] = {}  # the first quantised weight per module
    stems: dict[str, str] = {}  # quantised weights by the prefix of their names
    for name, (shape, dtype) in tensors.items():
        module, _, own = name.rpartition(".")
        packed = dtype in _CODES and not any(map(_NO_CODES.fullmatch, own.lower().split("_")))
        if len(shape) > 1 and name not in named and (packed or is_narrow(dtype)):
            first.setdefault(module, name)
            stems |= {name: name, re.sub(r"_(packed|blocks|q|int\d)$", "", name): name}

    def find_owner(name: str) -> str | None:
        module, _, own = name.rpartition(".")
        if module in stems:  # weight.absmax
            return stems[module]
        unowned = "" if _SCALES.fullmatch(own) or is_power(tensors[name][1]) else None
        if _PERHAPS_SCALES.fullmatch(own):
            stem = name.rpartition("_")[0]  # of weight_scale: weight
            return stems.get(stem, first.get(module, unowned))
        if module in first and module and not re.search(r"weight$|bias$", own.lower()):
            return first[module]
        return unowned

    found: dict[str, Skipped] = {}
    for name, (shape, dtype) in tensors.items():
        of = find_owner(name) if dtype in FLOATING or name in named else None
        if of is not None:
            found[name] = Skipped(Reason.scales, of)
            surely = len(shape) > 1 or _SCALES.fullmatch(name.rpartition(".")[2])
            if of and (surely or (shape and name in named)):
                found[of] = Skipped(Reason.quantised, tensors[of][1])
    return found


def _find_in_wide_dtype(tensors: Tensors, holds_codes: Callable[[str], bool]) -> dict[str, Skipped]:
    """The codes in a dtype that could also store a weight, found by their scale, and that scale.

    The scale can be in another file of the same checkpoint. Names such as `scale` and `scales` have
    other uses: their shape must fit, and for a scalar scale the values must be codes.
    """
    named: dict[str, list[str]] = {}  # full names by the name within a file
    for name in tensors:
        named.setdefault(_split_file(name)[1], []).append(name)
    found: dict[str, Skipped] = {}
    for scale, (shape, _) in tensors.items():
        file, name = _split_file(scale)
        for of, surely in find_scaled(name):
            here = f"{file}{of}"
            for weight in [here] if here in tensors else named.get(of, []):
                size, kind = tensors[weight]
                if len(size) < 2 or 0 in size or kind not in FLOATING:
                    continue
                if not surely and not _fits(shape, size):
                    continue
                if not surely and entries(shape) == 1 and not holds_codes(weight):
                    continue
                reason = Reason.quantised if surely else Reason.perhaps_codes
                detail = f"codes in {kind} with {scale}" if surely else scale
                found[weight] = Skipped(reason, detail)
                offsets = (re.sub(r"scales?(_inv)?$", zero, scale) for zero in _ZEROS)
                for part in (scale, *(offset for offset in offsets if offset in tensors)):
                    found[part] = Skipped(Reason.scales, weight)
    return found


def _split_file(name: str) -> tuple[str, str]:
    """Splits a name into the file (`step1.pt/`, or "") and the name in that file."""
    found = _FILE.match(name)
    end = found.end() if found else 0
    return name[:end], name[end:]


def find_scaled(name: str) -> Iterable[tuple[str, bool]]:
    """The names of the tensors that a tensor of this name can scale, and whether it surely does."""
    own = last_part(name)
    module = name.removesuffix(own)
    if _SURELY_OF_WEIGHT.fullmatch(own):
        yield f"{module}weight", True
        yield f"{module}qweight", True
    elif own in ("scale", "scales"):
        yield f"{module}weight", False
        yield f"{module}qweight", True
        yield f"{module}W_q", True  # HQQ
    elif own == "_scale":
        yield f"{module}_data", True  # quanto
    if module[:-1].endswith("weight") and re.fullmatch(r"absmax|scales?|SCB|quant_map", own):
        yield module[:-1], True
    if found := _OF_NAME.fullmatch(own):
        of_weight = found[1].endswith("weight")
        surely = of_weight or found[2].endswith(("inv", "absmax", "qscale"))
        yield f"{module}{found[1]}", surely
        if of_weight and found[1] != "weight":  # a stack of experts of ModelOpt
            yield f"{module}{found[1].removesuffix('_weight')}", True


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale has one number, or one per row, column or block of the weight."""
    if len(scale) < 2 and entries(scale) == 1:
        return True
    if len(scale) == 1:
        return scale[0] in weight

    def per_block(counts: tuple[int, ...]) -> bool:
        sides = zip(counts, weight, strict=True)
        return all(1 <= n <= side and n == -(-side // -(-side // n)) for n, side in sides)

    swapped = (*scale[:-2], scale[-1], scale[-2])  # GPTQ has (groups, outputs)
    return len(scale) == len(weight) and (per_block(scale) or per_block(swapped))


_SMALL = 4096  # bytes of a description that is read


def count_logical_entries(
    name: str, tensors: Tensors, read: Callable[[str], Tensor], bits: int
) -> int:
    """The number of entries of the weight that these codes encode, at least the number of codes.

    Args:
        name: the name of the codes.
        tensors: shape and dtype by name.
        read: reads a tensor; called for shapes and descriptions of at most 4 kB.
        bits: the bits per code, used if the other tensors do not determine it; 0 if unknown.
    """
    shape, dtype = tensors[name]
    stored, word = entries(shape), 8 if is_narrow(dtype) else int(re.sub(r"\D", "", dtype) or 1)
    try:
        count = _read_entries(name, tensors, read) or _derive_entries(name, tensors, word, bits)
    except Exception:  # a damaged description must not hide the codes
        count = 0
    # A code has at least one bit.
    return count if stored <= count <= stored * word else stored


def _read_entries(name: str, tensors: Tensors, read: Callable[[str], Tensor]) -> int:
    """The number of entries from a shape that is stored with the codes, or 0."""
    for kind in ("nf4", "fp4"):
        state = f"{name}.quant_state.bitsandbytes__{kind}"
        if state in tensors and entries(tensors[state][0]) <= _SMALL:
            return _multiply(json.loads(bytes(read(state).tolist()))["shape"])
    lengths = f"{name.removesuffix('_packed')}_shape"  # compressed-tensors
    if lengths in tensors and entries(tensors[lengths][0]) <= _SMALL // 8:
        return _multiply(read(lengths).tolist())
    return 0


def _multiply(sides: list[int]) -> int:
    known = bool(sides) and all(type(side) is int and 0 < side < 1 << 31 for side in sides)
    return math.prod(sides) if known and len(sides) < 8 else 0


def _derive_entries(name: str, tensors: Tensors, word: int, bits: int) -> int:
    """The number of entries from the shapes of related tensors or from the bits; 0 if unknown."""
    shape, dtype = tensors[name]
    module, dot, own = name.rpartition(".")

    def shape_beside(other: str) -> tuple[int, ...]:
        return tensors.get(f"{module}{dot}{other}", ((), ""))[0]

    scales, zeros = shape_beside("scales"), shape_beside("qzeros")
    if own == "qweight" and len(scales) == len(shape) == 2:
        outputs = scales[1]
        if shape[1] < outputs:  # AWQ packs along the outputs
            return shape[0] * outputs
        if index := shape_beside("g_idx"):  # GPTQ, one per input
            return index[0] * outputs
        if len(zeros) == 2 and zeros[1]:
            return shape[0] * outputs * outputs // zeros[1]
    stem = own.removesuffix("_blocks").removesuffix("_packed")
    scale = shape_beside(f"{stem}_scale") or shape_beside(f"{stem}_scales")
    in_blocks = own.endswith("_blocks") and bool(scale)  # MXFP4
    by_16 = bool(scale) and 16 * scale[-1] == 2 * shape[-1]  # NVFP4
    by_maximum = f"{name}.absmax" in tensors  # bitsandbytes
    if dtype == "uint8" and (in_blocks or by_16 or by_maximum):
        return 2 * entries(shape)
    return entries(shape) * word // bits if word == 32 and bits else 0


def read_bits(config: Mapping[str, Any]) -> int:
    """Bits per code in the config of GPTQ, AWQ, compressed-tensors or MLX; 0 if unknown."""
    settings = config.get("quantization_config") or config.get("quantization")
    groups = settings.get("config_groups") if isinstance(settings, Mapping) else None
    each = groups.values() if isinstance(groups, Mapping) else ()
    weights = (group.get("weights") for group in each if isinstance(group, Mapping))
    for one in (settings, *weights):
        for key in ("bits", "num_bits", "w_bit"):
            bits = one.get(key) if isinstance(one, Mapping) else None
            if type(bits) is int and 0 < bits <= 32:
                return bits
    return 0
