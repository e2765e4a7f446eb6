"""Weights in the formats of AWQ, as autoawq, gptqmodel and AutoRound store them.

Letters: W (m, n) a weight, W[i, j] = s[i, g] (q[i, j] - z[i, g]); q its 4-bit codes, s and z the
scales and the zero points of its groups of inputs g.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, zeros
from wellcond.recipes.codes import row_ranges, unpack
from wellcond.recipes.settings import Settings, read_settings

_CONFIG = "quant_config.json"  # older versions of autoawq wrote it instead of config.json
_OF_AUTO_ROUND = ("auto_round:auto_awq", "auto_round:awq")
_STEP = 1 << 20  # entries that are converted at once
# The order of the codes in a word: the lowest 4 bits belong to column 0, the next 4 to column 2.
_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, kw_only=True)
class Gemm(Recipe):
    """W from codes (n, m/8 words) that are packed along the outputs, in the order `_COLUMNS`."""

    group_size: int

    def build(self, read: Read, index: int) -> Tensor:
        m, n = self.shape
        codes, offsets, scales = self.parts[:3]
        s, z = read(scales).to(torch.float32), _unpack_in_order(read(offsets), m)
        W = zeros(self.shape)
        for start, stop in row_ranges(n, max(1, _STEP // m)):
            q = _unpack_in_order(read(codes, (start, stop)), m)
            g = torch.arange(start, stop, device="cpu") // self.group_size
            W[:, start:stop] = ((q - z[g]) * s[g]).T
        return W


def _unpack_in_order(words: Tensor, size: int) -> Tensor:
    codes = unpack(words, 4, size)
    return codes.reshape(len(codes), -1, 8)[..., _COLUMNS].flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Gemv(Recipe):
    """W from codes (m, n/8 words) that are packed along the inputs."""

    group_size: int

    def build(self, read: Read, index: int) -> Tensor:
        m, n = self.shape
        codes, offsets, scales = self.parts[:3]
        g = torch.arange(n, device="cpu") // self.group_size
        W = zeros(self.shape)
        for rows in row_ranges(m, max(1, _STEP // n)):
            q = unpack(read(codes, rows), 4, n)
            z = unpack(read(offsets, rows), 4, n // self.group_size)
            s = read(scales, rows).to(torch.float32)
            W[slice(*rows)] = (q - z[:, g]) * s[:, g]
        return W


def _count_words(count: int, group_size: int) -> int:
    """The number of words that `count` zero points occupy in the version gemv, which pads them.

    It is a multiple of 2 for groups of 64 inputs, and of 4 for groups of 32, the smallest size.
    """
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    if group_size < 128 and multiple == 1:
        raise RecipeError(f"the version gemv does not support groups of {group_size} inputs")
    return -(-count // (8 * multiple)) * multiple


def find_awq(content: Content) -> Iterator[Candidate]:
    """The weights with codes in `qweight`, if the config names AWQ as the format."""
    settings = read_settings(content, _CONFIG)
    sources = settings.sources.values()
    methods, packings = (
        [value.lower() if isinstance(value := one.get(key), str) else "" for one in sources]
        for key in ("quant_method", "packing_format")
    )
    if any(method.endswith("auto-round") for method in methods):
        if not any(packing in _OF_AUTO_ROUND for packing in packings):
            return
    elif "awq" not in methods and (any(methods) or _CONFIG not in settings.sources):
        return
    for name in content.tensors:
        stem, dot, own = name.rpartition(".")
        if own != "qweight":
            continue
        beside = [f"{stem}{dot}{part}" for part in ("qzeros", "scales")]
        parts = (name, *(one for one in beside if one in content.tensors))
        label = f"{stem}{dot}weight"

        def make(label: str = label, parts: tuple[str, ...] = parts) -> Recipe:
            return _make(content, settings, label, parts)

        yield Candidate(label, parts, make)


def _make(content: Content, settings: Settings, label: str, parts: tuple[str, ...]) -> Recipe:
    # The default of autoawq and of transformers is gemm.
    version = settings.word("version", "checkpoint_format", "format") or "gemm"
    if settings.word("backend") == "llm-awq":
        version = "llm-awq"
    if version not in ("gemm", "gemv"):
        raise RecipeError(
            f"its version is {version}, whose layout is that of a GPU kernel: quantise it again "
            "in the version gemm"
        )
    bits = settings.integer("bits", "w_bit")
    if bits != 4:
        raise RecipeError(f"it has {bits} bits, but the layout is known only for 4")
    stem = parts[0].removesuffix("qweight")
    names = [parts[0], f"{stem}qzeros", f"{stem}scales"]
    for one, dtypes in zip(
        names, (("int32",), ("int32",), ("float16", "bfloat16", "float32")), strict=True
    ):
        if len(content.shape(one)) != 2 or 0 in content.shape(one):
            raise RecipeError(f"{one} has the shape {content.shape(one)}")
        if content.dtype(one) not in dtypes:
            raise RecipeError(f"{one} has the dtype {content.dtype(one)}")
    codes, offsets, scales = (content.shape(one) for one in names)
    m, n = (8 * codes[1], codes[0]) if version == "gemm" else (codes[0], 8 * codes[1])
    size = settings.integer("group_size", "q_group_size")
    group_size = n if size == -1 else size
    if not group_size or group_size < 1 or n % group_size:
        raise RecipeError(f"its group_size in the config is {size}, but it has {n} inputs")
    count = n // group_size
    if version == "gemm":
        fits = offsets == (count, m // 8) and scales == (count, m)
    else:
        words = _count_words(count, group_size)
        fits = offsets == (m, words) and scales == (m, 8 * words)
    if not fits:
        raise RecipeError(
            f"{names[1]} {offsets} and {names[2]} {scales} do not fit {m} outputs and {count} "
            f"groups of {group_size} inputs"
        )
    return (Gemm if version == "gemm" else Gemv)(
        label=label,
        parts=parts,
        shape=(m, n),
        note=f"dequantised from 4-bit AWQ with groups of {group_size} inputs",
        stored_as="int4",
        dtype=content.dtype(names[2]),
        group_size=group_size,
    )
