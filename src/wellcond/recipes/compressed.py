"""Weights as compressed-tensors stores them: packed integers, int8, float8, float6 and float4.

The library selects one of the `config_groups` for each weight by the names and classes of modules,
but a file does not store the classes. This reader compares the names, shapes and dtypes of the
tensors instead: exactly one group must fit.

Letters: W (m, n) a weight, or one matrix of a stack (b, m, n); s (p, q) its scales.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show
from wellcond.recipes.codes import unpack, unpack_stream
from wellcond.recipes.scaled import (
    Float4,
    Float6,
    Scaled,
    check_one,
    check_scales,
    sides_of,
)
from wellcond.weights.matrices import entries
from wellcond.weights.quantised import FLOATING

_FLOATS = ("float32", "bfloat16", "float16")
_PARTS = (
    *("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape"),
    *("scale_packed", "meta", "bitmask", "row_offsets", "shape"),
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "output_global_scale"),
)
# Formats by the storage of their codes. Those of _OF_ALL do not determine how codes are stored.
_PACKED, _NARROW = "pack-quantized", "naive-quantized"
_OF_INTEGERS = ("int-quantized", _NARROW)
_OF_ALL = ("mixed-precision", "dense", "fakequant")
_SPARSE = "it is stored in a sparse form, which compressed-tensors no longer reads"
_MOST = 64  # different settings to try for a weight
_VERSION = r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})"
_FIRST_DENSE = (0, 18, 0)  # the first version whose codes can cross from one word to the next


class Args(NamedTuple):
    """The settings of one group for its weights, completed by the defaults of the library."""

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]
    order: bool
    exponents: bool  # whether scales are stored as exponents of two
    format: str


@dataclass(frozen=True)
class Groups:
    """The different settings in a config, each with an error in its place if it is invalid.

    Attributes:
        config: the complete config.
        all: the settings of all groups.
        by_target: the settings of groups that give the full name of a module, by that name.
        fitting: a cache of the settings that fitted a weight, or the first one that failed, by the
            shapes and dtypes of its parts.
    """

    config: Mapping[str, Any]
    all: list[Args | RecipeError]
    by_target: dict[str, list[Args | RecipeError]]
    fitting: dict[Hashable, list[Args | RecipeError]] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Groups:
        groups = cls(config, [], {})
        for group in config["config_groups"].values():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                continue
            try:
                args: Args | RecipeError = _read_args(config, group)
            except RecipeError as why:
                args = why
            targets = group["targets"] if isinstance(group.get("targets"), list) else ()
            names = [one for one in targets if isinstance(one, str)]
            for known in (groups.all, *(groups.by_target.setdefault(one, []) for one in names)):
                if args not in known:
                    known.append(args)
            if len(groups.all) > _MOST:
                many = RecipeError(f"config.json has more than {_MOST} different config_groups")
                return cls(config, [many], {})
        return groups


@dataclass(frozen=True)
class Integers(Scaled):
    """Integers in int8.

    Attributes:
        bits: the number of bits that the integers can have, 1 to 8.
    """

    bits: int = 8

    def decode(self, codes: Tensor) -> Tensor:
        low, high = codes.aminmax()
        if int(low) < -(1 << self.bits - 1) or int(high) >= 1 << self.bits - 1:
            raise RecipeError(
                f"{self.parts[0]} ranges from {int(low)} to {int(high)}, more than {self.bits} bits"
            )
        return codes


@dataclass(frozen=True)
class Packed(Scaled):
    """Integers in 32-bit words, where the code 0 represents -2^(bits - 1).

    Attributes:
        bits: the number of bits per code, 1 to 8.
        dense: whether codes can cross from one word to the next.
    """

    bits: int = 4
    dense: bool = True

    def decode(self, codes: Tensor) -> Tensor:
        return self._unpack(codes, self.sides[1])

    def read_zeros(self, read: Read, index: int) -> Tensor | None:
        if not self.zeros or self.symmetric:
            return super().read_zeros(read, index)
        stored = self._read_part(read, self.zeros, index)
        if stored.dtype != torch.int32:  # before version 0.9
            return super().read_zeros(read, index)
        return self._unpack(stored.mT, self.sides[0]).mT

    def _used_bits(self, words: int, size: int) -> Tensor:
        """Masks of the bits of each word that belong to codes; the other bits must be zero."""
        width = 32 if self.dense else 32 // self.bits * self.bits
        last = size * self.bits - (words - 1) * width
        used = [(1 << width) - 1] * (words - 1) + [(1 << last) - 1]
        return torch.tensor(used, device="cpu").to(torch.int32)

    def _unpack(self, words: Tensor, size: int) -> Tensor:
        """Unpacks codes (..., size) from words along the last side, the lowest bits first."""
        if bool((words & ~self._used_bits(words.shape[-1], size)).any()):
            raise RecipeError(
                f"its words contain more than {size} codes of {self.bits} bits: the unused bits "
                "are not zero"
            )
        in_turn = unpack_stream if self.dense and 32 % self.bits else unpack
        codes = in_turn(words, self.bits, size)
        return codes.to(torch.float32) - (1 << self.bits - 1)


def find_compressed(content: Content) -> Iterator[Candidate]:
    """The weights in formats of compressed-tensors, found by their names and config.json."""
    config = content.quantization()
    ours = isinstance(config.get("config_groups"), Mapping) and config.get("quant_method") in (
        None,
        "compressed-tensors",
        "sparseml",
    )
    groups = Groups.read(config) if ours else None
    for name in content.tensors:
        prefix, own = re.fullmatch(r"(?s)(.*\.)?(.*)", name).groups("")  # type: ignore[union-attr]
        plain = own == "weight" and ours and f"{name}_scale" in content.tensors
        plain = plain and f"{name}_packed" not in content.tensors
        sparse = own == "compressed" and f"{prefix}bitmask" in content.tensors
        if own == "weight_packed" or plain or sparse:
            others = (prefix + part for part in (*_PARTS, *(() if plain else ("weight",))))
            parts = (name, *(part for part in others if part in content.tensors))
            make = partial(_make, content, groups, prefix, parts)
            yield Candidate(f"{prefix}weight", parts, make)


def _make(content: Content, groups: Groups | None, prefix: str, parts: tuple[str, ...]) -> Recipe:
    if any(f"{prefix}{part}" in parts for part in ("bitmask", "meta", "scale_packed")):
        raise RecipeError(_SPARSE)
    if f"{prefix}weight" in parts[1:]:
        raise RecipeError(f"{prefix}weight is also stored")
    if groups is None:
        raise RecipeError("config.json has no quantization_config of compressed-tensors")
    config = groups.config
    transforms = config.get("transform_config")
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups")):
        raise RecipeError("its entries are transformed, according to transform_config")
    module = prefix[:-1]
    own = groups.by_target.get(module)
    shapes = tuple((part.removeprefix(prefix), content.tensors[part]) for part in parts)
    like = (module if own else "", shapes, _read_sides(content, prefix))
    fitting: list[Args | RecipeError] = []
    found: list[Recipe] = []
    reasons: list[str] = []
    tried = groups.fitting.get(like) or own or groups.all
    for args in tried:
        try:
            if isinstance(args, RecipeError):
                raise RecipeError(str(args))
            recipe = _fit(content, config, args, prefix, parts)
        except RecipeError as why:
            reasons.append(str(why))
            continue
        if recipe not in found:
            found.append(recipe)
            fitting.append(args)
        if len(found) > 1:
            break
    groups.fitting[like] = fitting or tried[:1]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError("several config_groups in config.json fit its tensors")
    raise RecipeError(reasons[0] if reasons else "config.json has no config_groups with weights")


def _read_sides(content: Content, prefix: str) -> tuple[float, ...]:
    """The shape of a weight that is stored with its packed codes; () if no shape is stored."""
    name = f"{prefix}weight_shape"
    stored = content.read_small(name) if name in content.tensors else torch.zeros(0)
    return () if stored.is_complex() else tuple(stored.flatten().tolist())


def _read_args(config: Mapping[str, Any], group: Mapping[str, Any]) -> Args:
    args = group["weights"]
    bits, size = args.get("num_bits", 8), args.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise RecipeError(f"num_bits must be 1 to 8, but is {show(bits)}")
    if size is not None and (type(size) is not int or not -1 <= size < 1 << 40):
        raise RecipeError(f"group_size must be a positive integer, but is {show(size)}")
    kind, strategy = args.get("type", "int"), args.get("strategy")
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in ("int", "float"):
        raise RecipeError(f"type must be int or float, but is {show(kind)}")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = strategy.lower() if isinstance(strategy, str) else strategy
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise RecipeError(f"the strategy {show(strategy)} is unknown for weights")
    grouped = strategy in ("group", "tensor_group")
    if grouped != ((size or -1) > 0):
        raise RecipeError(f"the strategy {strategy} contradicts the group_size {size}")
    block = sides_of(args, "block_structure")
    if (strategy == "block") != (block is not None):
        raise RecipeError(f"the strategy {strategy} contradicts the block_structure {block}")
    symmetric = args.get("symmetric", True)
    if type(symmetric) is not bool:
        raise RecipeError("symmetric must be true or false")
    stored = group.get("format") or config.get("format") or ""
    if not isinstance(stored, str):
        raise RecipeError(f"the format must be a word, but is {show(stored)}")
    return Args(
        bits,
        kind == "float",
        symmetric,
        strategy,
        size or 0 if grouped else 0,
        block or (0, 0),
        args.get("actorder") in ("group", "dynamic", True),
        args.get("scale_dtype") in ("torch.uint8", "uint8"),
        "" if stored in _OF_ALL else stored,
    )


def _fit(
    content: Content, config: Mapping[str, Any], args: Args, prefix: str, parts: tuple[str, ...]
) -> Recipe:
    """Builds the recipe of a weight with these settings.

    Raises:
        RecipeError: the settings do not fit the tensors.
    """
    codes, scales = parts[0], f"{prefix}weight_scale"
    stored, dtype = content.shape(codes), content.dtype(codes)
    content.shape(scales)
    if 0 in stored or len(stored) not in ((2, 3) if dtype == "int32" else (2,)):
        raise RecipeError(f"{codes} has the shape {stored}")
    if dtype in FLOATING:
        status = show(config.get("quantization_status"))
        raise RecipeError(
            f"it is stored in {dtype} with scales and the quantization_status {status}: a forward "
            "pass first rounds it to codes"
        )
    recipe, formats = _read_codes(content, config, args, prefix, parts)
    if args.format and args.format not in formats:
        raise RecipeError(f"the format {show(args.format)} does not fit {codes} of {dtype}")
    *_, m, n = recipe.shape
    g = args.group
    if g and g < n and n % g:
        raise RecipeError(f"the group_size {g} does not divide its {n} columns")
    blocks = {"tensor": (m, n), "channel": (1, n), "block": args.block}
    h, w = blocks.get(args.strategy, (1, g))
    recipe = replace(recipe, block=(min(h, m), min(w, n)))
    exponents = formats[0].startswith("mx")
    check_scales(content, scales, ("uint8",) if exponents else (*_FLOATS, "float8_e4m3fn"))
    s, lead = content.shape(scales), recipe.shape[:-2]
    if s != (*lead, *recipe.blocks) and not (args.strategy == "tensor" and entries(s) == 1):
        raise RecipeError(f"{scales} of shape {s} does not fit the {args.strategy} strategy")
    each = (scales,) if lead and len(s) == 3 else ()
    kind = content.dtype(scales)
    recipe = replace(recipe, dtype=kind if kind in _FLOATS[1:] else "", each=each)
    recipe = recipe.explain(recipe.note)
    recipe = _add_zeros(content, args, recipe, f"{prefix}weight_zero_point", scales)
    recipe = _add_factor(content, args, recipe, f"{prefix}weight_global_scale")
    return _add_order(content, args, recipe, f"{prefix}weight_g_idx")


def _read_codes(
    content: Content, config: Mapping[str, Any], args: Args, prefix: str, parts: tuple[str, ...]
) -> tuple[Scaled, tuple[str, ...]]:
    """A recipe without scales, by the dtype of the codes, and the formats to which it belongs."""
    codes, label = parts[0], f"{prefix}weight"
    *_, m, width = content.shape(codes)
    dtype = content.dtype(codes)
    if codes == label:
        whole = partial(Scaled, label, parts, (m, width))
        if dtype == "int8" and not args.floating:
            note = "integers in int8"
            return Integers(label, parts, (m, width), note, bits=args.bits), _OF_INTEGERS
        if dtype == "float8_e4m3fn" and args.floating and args.bits == 8:
            if args.exponents or args.format == "mxfp8-quantized":
                return whole("MXFP8 (E4M3)"), ("mxfp8-quantized",)
            return whole("FP8 (E4M3)"), ("float-quantized", _NARROW)
    elif dtype == "int32" and not args.floating:
        return _read_packed(content, config, args, prefix, parts), (_PACKED,)
    elif dtype == "uint8" and args.floating and args.bits == 4 and args.group == 32:
        return Float4(label, parts, (m, 2 * width), "MXFP4"), ("mxfp4-pack-quantized",)
    elif dtype == "uint8" and args.floating and args.bits == 4 and args.group == 16:
        return Float4(label, parts, (m, 2 * width), "NVFP4"), ("nvfp4-pack-quantized",)
    elif dtype == "uint8" and args.floating and (args.bits, args.group, width % 3) == (6, 32, 0):
        six = Float6(label, parts, (m, width // 3 * 4), "MXFP6 (E2M3)")
        return six, ("mxfp6-pack-quantized",)
    kind = "float" if args.floating else "int"
    raise RecipeError(f"{codes} of {dtype} does not fit {args.bits} bits of type {kind}")


def _read_packed(
    content: Content, config: Mapping[str, Any], args: Args, prefix: str, parts: tuple[str, ...]
) -> Packed:
    (*lead, m, words), bits = content.shape(parts[0]), args.bits
    name = f"{prefix}weight_shape"
    content.shape(name)
    sides = _read_sides(content, prefix)
    if sides[:-1] != (*lead, m) or type(sides[-1]) is not int or sides[-1] < 1:
        shape = list(sides[:4])
        raise RecipeError(f"{name} is {shape}, but the codes have {[*lead, m]} rows")
    n = sides[-1]
    ways = [dense for dense in (True, False) if words == _count_words(n, bits, dense)]
    if not ways:
        raise RecipeError(f"{n} codes of {bits} bits do not fit the {words} words of a row")
    zeros, longest = f"{prefix}weight_zero_point", n
    if content.dtype(zeros) == "int32" and not args.symmetric:
        found, longest = content.shape(zeros), max(m, n)
        ways = [one for one in ways if _count_words(m, bits, one) in found[-2:-1]]
        if not ways:
            raise RecipeError(f"{zeros} of shape {found} does not fit {m} rows of {bits} bits")
    dense = ways[0]
    if 32 % bits and longest > 32 // bits:
        text = config.get("version")
        version = re.fullmatch(_VERSION, text) if isinstance(text, str) else None
        newer = version and tuple(int(part) for part in version.groups()) >= _FIRST_DENSE
        if len(ways) > 1 and version is None:
            raise RecipeError(
                f"its shape fits both layouts of {bits} bits, and config.json has no version"
            )
        if ways == [True] and newer is False:
            raise RecipeError(
                f"its {words} words for {n} codes of {bits} bits are the layout of version 0.18 "
                f"and later, but the version in config.json is {text}"
            )
        dense = bool(newer) if len(ways) > 1 else dense
    note = f"integers of {bits} bits"
    label = f"{prefix}weight"
    return Packed(
        label,
        parts,
        (*lead, m, n),
        note,
        stored_as=f"int{bits}",
        stacked=bool(lead),
        bits=bits,
        dense=dense,
    )


def _count_words(codes: int, bits: int, dense: bool) -> int:
    """The number of 32-bit words for this number of codes."""
    return -(-codes * bits // 32) if dense else -(-codes // (32 // bits))


def _add_zeros(content: Content, args: Args, recipe: Scaled, zeros: str, scales: str) -> Scaled:
    if zeros not in recipe.parts:
        if not args.symmetric:
            raise RecipeError(f"{zeros} is missing, but symmetric is false in config.json")
        return recipe
    z, dtype = content.shape(zeros), content.dtype(zeros)
    if not args.symmetric and args.floating:
        raise RecipeError("floating-point codes with zero points are not supported")
    packed = dtype == "int32" and args.strategy in ("group", "channel") and not args.symmetric
    if isinstance(recipe, Packed) and packed:
        lead = recipe.shape[:-2]
        fits = len(z) == len(lead) + 2 and (*z[:-2], z[-1]) == (*lead, recipe.blocks[1])
    else:
        fits = z == content.shape(scales) and (args.symmetric or dtype == "int8")
    if not fits:
        raise RecipeError(f"{zeros} of {dtype} and shape {z} does not fit {scales}")
    each = (*recipe.each, zeros) if recipe.stacked and len(z) == 3 else recipe.each
    return replace(recipe, zeros=zeros, symmetric=args.symmetric, each=each)


def _add_factor(content: Content, args: Args, recipe: Scaled, factor: str) -> Scaled:
    if args.strategy != "tensor_group" and factor not in recipe.parts:
        return recipe
    if args.strategy != "tensor_group":
        raise RecipeError(f"{factor} contradicts the {args.strategy} strategy")
    check_one(content, factor)
    return replace(recipe, factor=factor, divides=True)


def _add_order(content: Content, args: Args, recipe: Scaled, order: str) -> Scaled:
    if order not in recipe.parts:
        if args.order:
            raise RecipeError(f"{order} is missing, but config.json sets actorder")
        return recipe
    if args.strategy != "group" or recipe.stacked:
        raise RecipeError(f"{order} contradicts the {args.strategy} strategy")
    if content.shape(order) != (recipe.shape[-1],) or content.dtype(order) not in (
        "int32",
        "int64",
    ):
        raise RecipeError(f"{order} is not one number per column")
    return replace(recipe, order=order)
