"""Weights in the formats of GPTQ, as auto-gptq, optimum, gptqmodel and AutoRound store them.

`X.qweight` (rows of words, m) is stored with `X.qzeros` (g, columns of words), `X.scales` (g, m)
and `X.g_idx` (n), the group of each input.

Letters: W (m, n) a weight, W[i, j] = s[g, i] (q[i, j] - z[g, i]); q its codes, s and z the scales
and the zero points of its groups of inputs g.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, zeros
from wellcond.recipes.codes import row_ranges, unpack, unpack_stream
from wellcond.recipes.settings import Settings, read_settings
from wellcond.recipes.transposed import as_in_plain

_CONFIG = "quantize_config.json"  # the config of auto-gptq
_STEP = 1 << 20  # entries that are converted at once
_WRITERS = 8  # entries of the list of writers in a config that are read
_FLOATS = ("float16", "bfloat16", "float32")
# The bit widths of the planes of codes, the low bits first; other codes have only one plane.
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
# The formats of AutoRound, and the formats that store zero points minus one.
_OF_AUTO_ROUND = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round", "auto_round:gptqmodel")
_MINUS_ONE = ("gptq", "auto_round:auto_gptq", "auto_round:gptq")
_EMBEDDING = re.compile(r"(.*_)?(embed(dings?|_tokens|_in|_positions)?|wte|wpe)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Gptq(Recipe):
    """W from codes that are packed along the inputs.

    Attributes:
        bits: the number of bits per code.
        version: 1 if the zero points are stored minus one, 2 if not.
        planar: whether the low and the high bits of 32 codes are stored in separate words.
        group_size: the number of inputs per group of consecutive inputs; 0 if `g_idx` gives the
            groups.
        borrows: how the writer subtracted one from a zero point of 0: "words", from the entire
            word, which changed its other zero points; "codes", from each code; "" if unknown.
        symmetric: whether all zero points must be half of the range.
    """

    bits: int
    version: int
    planar: bool
    group_size: int
    borrows: str
    symmetric: bool

    def build(self, read: Read, index: int) -> Tensor:
        m, n = self.shape
        codes, offsets, scales = self.parts[:3]
        s = read(scales).to(torch.float32).T
        z = self._read_zeros(read, offsets, m).T
        group = self._read_groups(read, s.shape[1])
        W = zeros(self.shape)
        step = max(32, _STEP // m // 32 * 32)  # inputs; 32 of them fill complete words
        for start, stop in row_ranges(n, step):
            words = (start * self.bits // 32, -(-stop * self.bits // 32))
            q = self._unpack(read(codes, words).T, stop - start)
            g = group[start:stop]
            W[:, start:stop] = (q - z[:, g]) * s[:, g]
        return W

    def _read_groups(self, read: Read, count: int) -> Tensor:
        if self.group_size:
            return torch.arange(self.shape[1], device="cpu") // self.group_size
        group = read(self.parts[3]).to(torch.int64)
        if int(group.min()) < 0 or int(group.max()) >= count:
            raise RecipeError(
                f"{self.parts[3]} has groups {int(group.min())} to {int(group.max())}, but there "
                f"are {count} groups"
            )
        return group

    def _read_zeros(self, read: Read, name: str, m: int) -> Tensor:
        words, top = read(name), (1 << self.bits) - 1
        if self.version == 1 and self.borrows == "words":
            words = words + int("1".rjust(self.bits, "0") * (32 // self.bits), 2)
        z = self._unpack(words, m)
        if self.version == 1 and self.borrows != "words":
            if not self.borrows and bool((z == top).any()):
                raise RecipeError(
                    f"{name} has zero points of 0, which programs store differently as 0 - 1: "
                    "config.json does not name the program that wrote it"
                )
            z = (z + 1) & top
        if self.symmetric and not bool((z == (top + 1) // 2).all()):
            raise RecipeError(
                f"{name} has other zero points than {(top + 1) // 2}, but sym is true in the config"
            )
        return z

    def _unpack(self, words: Tensor, size: int) -> Tensor:
        if self.planar:
            return unpack_planes(words, self.bits, size)
        return (unpack_stream if 32 % self.bits else unpack)(words, self.bits, size)


def unpack_planes(words: Tensor, bits: int, size: int) -> Tensor:
    """Unpacks codes from planes. Of each 32 codes, the words with their lowest bits come first.

    Args:
        words: int32 (..., w), w a multiple of bits.
        bits: the number of bits per code.
        size: the number of codes along the last side.

    Returns:
        (..., size), int16.
    """
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes = torch.zeros((*blocks.shape[:-1], 32), dtype=torch.int16, device=words.device)
    row = 0
    for width in _PLANES[bits]:
        codes |= unpack(blocks[..., row : row + width], width, 32) << row
        row += width
    return codes.flatten(-2)[..., :size]


def find_gptq(content: Content) -> Iterator[Candidate]:
    """The weights with codes in `qweight`."""
    settings = read_settings(content, _CONFIG)
    for name in content.tensors:
        stem, dot, own = name.rpartition(".")
        if own != "qweight":
            continue
        beside = [f"{stem}{dot}{part}" for part in ("qzeros", "scales", "g_idx")]
        parts = (name, *(one for one in beside if one in content.tensors))
        label = f"{stem}{dot}weight"

        def make(label: str = label, parts: tuple[str, ...] = parts) -> Recipe:
            return as_in_plain(_make(content, settings, label, parts), content)

        yield Candidate(label, parts, make)


def _make(content: Content, settings: Settings, label: str, parts: tuple[str, ...]) -> Recipe:
    if not settings.sources:
        raise RecipeError(
            f"the format of its codes is unknown: neither config.json nor {_CONFIG} gives it"
        )
    kind = _read_format(settings)
    version, planar = (1 if kind in _MINUS_ONE else 2), kind == "gptq_p"
    if _EMBEDDING.fullmatch(label.removesuffix(".weight").rpartition(".")[2]):
        raise RecipeError("it is an embedding, which gptqmodel packs along the other side")
    stem = parts[0].removesuffix("qweight")
    codes, offsets, scales = parts[0], f"{stem}qzeros", f"{stem}scales"
    groups = f"{stem}g_idx"
    for one, dtypes in ((codes, ("int32",)), (offsets, ("int32",)), (scales, _FLOATS)):
        if len(content.shape(one)) != 2 or 0 in content.shape(one):
            raise RecipeError(f"{one} has the shape {content.shape(one)}")
        if content.dtype(one) not in dtypes:
            raise RecipeError(f"{one} has the dtype {content.dtype(one)}")
    count, m = content.shape(scales)
    n = _read_inputs(content, groups)
    bits, n = _find_bits(content, settings, (codes, offsets), (m, n))
    if bits in (5, 6, 7) and kind in ("gptq", "gptq_v2"):
        raise RecipeError(f"it has {bits} bits, which gptqmodel stores only in the format gptq_p")
    planar = planar and bits in _PLANES
    if 32 % bits and (n % 32 or m % 32):
        raise RecipeError(f"{bits} bits need sides that are multiples of 32, not {m} and {n}")
    group_size = 0 if groups in parts else _read_group_size(settings, n, count)
    writer = _read_writer(settings)
    symmetric = settings.get("sym") is True and not _has_own_settings(settings)
    if version == 1 and bits == 3 and 0 < writer < 7 and not symmetric:
        raise RecipeError(
            f"gptqmodel {writer} might have subtracted one from bits outside its zero points"
        )
    return Gptq(
        label=label,
        parts=parts,
        shape=(m, n),
        note=f"dequantised from {bits}-bit GPTQ with {count} groups of inputs",
        dtype=content.dtype(scales),
        stored_as=f"int{bits}",
        bits=bits,
        version=version,
        planar=planar,
        group_size=group_size,
        borrows=("codes" if bits == 3 else "words") if writer else "",
        symmetric=symmetric,
    )


def _read_format(settings: Settings) -> str:
    """The format by its name in gptqmodel, or in AutoRound, whose names contain a colon."""
    method = settings.word("quant_method", "method")
    if method in ("auto-round", "intel/auto-round"):
        kind = settings.word("packing_format")
        if kind not in _OF_AUTO_ROUND:
            raise RecipeError(f"the layout of its packing_format {kind} is unknown")
        return kind
    if method not in ("", "gptq", "gptqmodel"):
        raise RecipeError(f"the layout of its quant_method {method} is unknown")
    if settings.get("is_marlin_format") is True:
        raise RecipeError(
            "its layout is that of the GPU kernel Marlin: quantise it again in the format gptq"
        )
    kind = settings.word("checkpoint_format", "format") or "gptq"  # the default of all libraries
    if kind not in ("gptq", "gptq_v2", "gptq_p"):
        raise RecipeError(f"its format is {kind}: quantise it again in the format gptq")
    return kind


def _has_own_settings(settings: Settings) -> bool:
    """Whether the config can have separate settings for some layers."""
    return bool(settings.get("dynamic") or settings.get("extra_config"))


def _read_inputs(content: Content, groups: str) -> int:
    """The number of inputs, from the length of `g_idx`; 0 if `g_idx` is not stored."""
    if groups not in content.tensors:
        return 0
    shape = content.shape(groups)
    if len(shape) != 1 or 0 in shape or content.dtype(groups) not in ("int32", "int64"):
        raise RecipeError(f"{groups} has the shape {shape} and the dtype {content.dtype(groups)}")
    return shape[0]


def _find_bits(
    content: Content, settings: Settings, words: tuple[str, str], sides: tuple[int, int]
) -> tuple[int, int]:
    """The number of bits per code and the number of inputs."""
    (m, n), (codes, offsets) = sides, words
    rows, outputs = content.shape(codes)
    count, columns = content.shape(offsets)
    if outputs != m or count != content.shape(codes.removesuffix("qweight") + "scales")[0]:
        raise RecipeError(f"{codes} and {offsets} do not fit scales of {m} outputs")
    told = settings.integer("bits", "wbits", "w_bit")
    dynamic = _has_own_settings(settings)
    fitting = [
        (bits, n or rows * 32 // bits)
        for bits in range(2, 9)
        if columns == -(-m * bits // 32)
        and rows == -(-(n or rows * 32 // bits) * bits // 32)
        and (dynamic or told in (None, bits))
    ]
    if len(fitting) != 1:
        raise RecipeError(
            f"{codes} {content.shape(codes)} and {offsets} {content.shape(offsets)} do not fit "
            f"{told if told and not dynamic else 'any number of'} bits with {m} outputs"
            + (f" and {n} inputs" if n else "")
        )
    return fitting[0]


def _read_group_size(settings: Settings, n: int, count: int) -> int:
    if settings.get("desc_act") is True or settings.get("dynamic"):
        raise RecipeError("g_idx, the groups of its inputs, is missing")
    size = settings.integer("group_size", "q_group_size")
    told = [size, *settings.of_layers("extra_config", "group_size")]
    known = [n if one == -1 else min(one, n) for one in told if type(one) is int]
    fitting = {one for one in known if one > 0 and -(-n // one) == count}
    if len(fitting) != 1:
        raise RecipeError(
            f"it has {count} groups of {n} inputs, but the group_size in the config is "
            + str(size)
            + (", with other values for some layers" if len(told) > 1 else "")
        )
    return fitting.pop()


def _read_writer(settings: Settings) -> int:
    """The major version of gptqmodel if it wrote the checkpoint; 0 for other programs."""
    meta = settings.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    for writer in writers[:_WRITERS] if isinstance(writers, list) else [writers]:
        if isinstance(writer, str) and (found := re.match(r"gptqmodel:(\d{1,3})\b", writer)):
            return int(found[1]) or 1
    return 0
