"""Pairs the weights of two audits by their names, and measures how far they moved."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from wellcond.report.findings import Finding, Grade
from wellcond.text import join_remarks

# Parts that torch.compile, checkpointing and FSDP insert into names. DataParallel adds "module".
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PARTS = 4  # the most parts of a prefix, such as the two of "model.language_model."
# A separate weight, and the same weight as a block of a fused projection or an expert of a stack:
# transformers saves some classes in the first form and uses the second in memory.
_SAME_NAMES = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"(.*)\bblock_sparse_moe\b(.*)", r"\1mlp\2"),
        (r"(.*\bexperts\.\d+)\.w1\.weight", r"\1.gate_proj.weight"),
        (r"(.*\bexperts\.\d+)\.w2\.weight", r"\1.down_proj.weight"),
        (r"(.*\bexperts\.\d+)\.w3\.weight", r"\1.up_proj.weight"),
        (r"(.*\bexperts)\.gate_up_proj:(gate|up):(\d+)", r"\1.\3.\2_proj.weight"),
        (r"(.*\bexperts)\.down_proj:(\d+)", r"\1.\2.down_proj.weight"),
        (r"(.*)\bqkv_proj\.weight:([qkv])", r"\1\2_proj.weight"),
        (r"(.*)\bgate_up_proj\.weight:(gate|up)", r"\1\2_proj.weight"),
        # Models such as Llama in GGUF files.
        (r"(.*)\bblk\.(\d+)\.attn_([qkv])\.weight", r"\1layers.\2.self_attn.\3_proj.weight"),
        (r"(.*)\bblk\.(\d+)\.attn_qkv\.weight:([qkv])", r"\1layers.\2.self_attn.\3_proj.weight"),
        (r"(.*)\bblk\.(\d+)\.attn_output\.weight", r"\1layers.\2.self_attn.o_proj.weight"),
        (r"(.*)\bblk\.(\d+):([qv][ko]\d+)", r"\1layers.\2.self_attn:\3"),
        (r"(.*)\bblk\.(\d+)\.ffn_(gate|up|down)\.weight", r"\1layers.\2.mlp.\3_proj.weight"),
        (r"(.*)\bblk\.(\d+)\.ffn_up\.weight:(gate|up)", r"\1layers.\2.mlp.\3_proj.weight"),
        (r"(.*)\bblk\.(\d+)\.ffn_gate_inp\.weight", r"\1layers.\2.mlp.gate.weight"),
        (
            r"(.*)\bblk\.(\d+)\.ffn_(gate|up|down)_exps\.weight:(\d+)",
            r"\1layers.\2.mlp.experts.\4.\3_proj.weight",
        ),
        (r"output\.weight", "lm_head.weight"),
    )
]


# The compared quantities and their displayed symbols. If two move equally, the first is named.
QUANTITIES = {"sigma_max": "σ_max", "stable_rank": "stable rank", "condition_number": "κ"}
# Standard deviations of the logarithms between trainings of one network. The medians over the
# matrices of networks that were trained 3 to 15 times are 0.07 to 0.19 for σ_max and the stable
# rank, 0.07 to 0.17 for κ of rectangular matrices, and 0.84 to 1.2 for κ of square matrices.
_SPREAD, _SPREAD_OF_SQUARES = 0.15, 0.9
_SQUARE = 1.2
# The number of standard deviations by which two trainings usually differ at most.
USUAL = 2.0
# Smaller relative changes are ignored. The error of a measured kappa is far smaller.
SAME = 0.01


def is_square(shape: Sequence[int]) -> bool:
    """Returns whether the sides are within a factor of 1.2, so that sigma_min varies strongly."""
    return max(shape[-2:]) <= _SQUARE * min(shape[-2:])


@dataclass(frozen=True)
class Change:
    """The change dW of a weight W, computed from both matrices; nan if a number is unknown.

    Attributes:
        relative: ||dW||_F/||W||_F, where W is the matrix before.
        sqnr: 20 log10(||W||_F/||dW||_F) in dB, the signal-to-quantization-noise ratio; inf if dW
            is zero.
        directions: k, the stable rank of W rounded up, at most 32.
        leading_share: the share of ||dW||_F^2 in the span of the k leading left singular vectors
            (directions of the outputs) of W, 0 to 1.
        random_share: k/m, the expected share for a random change with m rows.
        leading_turn: the root-mean-square principal angle, arccos sqrt(mean cos^2 theta_i), between
            the spans of the k leading right singular vectors (directions of the inputs) before and
            after, in degrees. Its squared sine is the share of the old span outside the new one.
        trailing_turn: the same for the k right singular vectors of the smallest singular values.
        largest_leading_turn: the largest principal angle of the leading spans. It is near 90
            degrees as soon as one direction has turned.
        largest_trailing_turn: the largest principal angle of the trailing spans.
        random_turn: arccos sqrt(k/n), the angle of two random k-dimensional spans of n inputs.
        reasons: the reasons why numbers are nan, by the names of these numbers.
    """

    relative: float = math.nan
    sqnr: float = math.nan
    directions: int = 0
    leading_share: float = math.nan
    random_share: float = math.nan
    leading_turn: float = math.nan
    trailing_turn: float = math.nan
    largest_leading_turn: float = math.nan
    largest_trailing_turn: float = math.nan
    random_turn: float = math.nan
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data; numbers can be inf or nan, and `reason` explains nan."""
        numbers = {key: value for key, value in vars(self).items() if key != "reasons"}
        return numbers | {"reason": self.reason}

    @property
    def reason(self) -> str:
        """Why numbers are nan, each reason once; "" if all are known."""
        return "; ".join(dict.fromkeys(self.reasons.values()))


class Pair(NamedTuple):
    """The findings of a weight before and after, None on a side without it, and their label.

    `change` is None if it was not computed: when reports are compared, and for matrices that are
    not stored.
    """

    label: str
    before: Finding | None
    after: Finding | None
    change: Change | None = None

    @property
    def ratio(self) -> float:
        """kappa after over kappa before; 1 if both are infinite.

        nan if a side is missing, has no kappa, or has only a lower bound of kappa.
        """
        return self.quotient(lambda finding: finding.condition_number)

    def quotient(self, number: Callable[[Finding], float]) -> float:
        """Returns a number after over the number before; nan as for `ratio`."""
        if not (self.before and self.after):
            return math.nan
        if Grade.bounded in (self.before.grade, self.after.grade):
            return math.nan
        return _quotient(number(self.after), number(self.before))

    @property
    def moves(self) -> dict[str, float]:
        """|log(after/before)| of each quantity over its standard deviation between trainings.

        The standard deviation is 0.15 (a factor of 1.16), and 0.9 (2.5) for kappa of a weight whose
        sides are within a factor of 1.2. inf if a number appears, disappears or becomes infinite,
        and if a side is missing.
        """
        return {key: self._move(key) for key in QUANTITIES}

    def _move(self, key: str) -> float:
        if not (self.before and self.after):
            return math.inf
        number = attrgetter(key)
        ratio = self.quotient(number)
        if math.isnan(ratio):
            appears = math.isnan(number(self.before)) != math.isnan(number(self.after))
            return math.inf if appears else 0.0
        square = key == "condition_number" and is_square(self.after.shape)
        spread = _SPREAD_OF_SQUARES if square else _SPREAD
        return abs(math.log(ratio)) / spread if 0 < ratio < math.inf else math.inf

    @property
    def movement(self) -> float:
        """The largest of `moves`, to sort by."""
        return max(self.moves.values())

    @property
    def moved(self) -> str:
        """The key of the quantity with the largest of `moves`; "" if none has moved by 1 %."""
        if not (self.before and self.after):
            return ""
        moves = self.moves
        key = max(moves, key=moves.__getitem__)
        ratio = self.quotient(attrgetter(key))
        return "" if 1 - SAME <= ratio <= 1 + SAME or not moves[key] else key

    @property
    def is_stored_differently(self) -> bool:
        """Whether the sides have different dtypes or parts, as a quantised copy has."""
        if not (self.before and self.after):
            return False
        return (self.before.dtype, self.before.parts) != (self.after.dtype, self.after.parts)

    @property
    def note(self) -> str:
        """Different dtypes, and the explanations of both sides, or ""."""
        old, new = self.before, self.after
        said = []
        if old and new:
            if old.dtype != new.dtype:
                said.append(f"{old.dtype} before, {new.dtype} after")
            if old.explanation == new.explanation:
                return join_remarks(*said, old.explanation)
        sides = (("before", old), ("after", new))
        said += [f"{when}: {f.explanation}" for when, f in sides if f and f.explanation]
        return "; ".join(said)


def _quotient(new: float, old: float) -> float:
    if new == old > 0:
        return 1.0
    return new / old if old else math.nan


def by_label(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Returns the findings by unique labels.

    A tensor named "a:q" has the same label as the view q of "a"; the second one gets a "'".
    """
    found: dict[str, Finding] = {}
    for finding in findings:
        label = finding.label
        while label in found:
            label += "'"
        found[label] = finding
    return found


class Names(NamedTuple):
    """The names of the weights on both sides.

    Attributes:
        paired: the common name of each weight, and its names before and after.
        prefix: the prefix that only the names of one side have, or "".
        side: the side that has the prefix, "before" or "after"; or "".
    """

    paired: list[tuple[str, str, str]]
    prefix: str = ""
    side: str = ""


def pair_names(before: Iterable[str], after: Iterable[str]) -> Names:
    """Pairs the names that mean the same weight.

    It first pairs equal names. Then it pairs names that are equal without wrappers, where blocks of
    fused weights and experts of stacks have names of their own. Then it pairs names that are equal
    without a prefix on one side. The prefix is the one that pairs most names, if these are at least
    half of the remaining names of a side, and if no other prefix pairs as many.
    """
    old, new = dict.fromkeys(before), dict.fromkeys(after)
    paired = [(name, name, name) for name in old if name in new]
    same = {name for name, _, _ in paired}
    plain_old, plain_new = (
        _plain(name for name in names if name not in same) for names in (old, new)
    )
    wrapped = plain_old.keys() & plain_new.keys() - same
    paired += [(name, plain_old[name], plain_new[name]) for name in plain_old if name in wrapped]
    rest_old, rest_new = (
        {name: whole for name, whole in plain.items() if name not in wrapped}
        for plain in (plain_old, plain_new)
    )
    sides = {"before": (rest_old, rest_new), "after": (rest_new, rest_old)}
    prefixes = Counter(
        (side, prefix)
        for side, (longer, shorter) in sides.items()
        for name in longer
        for prefix, rest in _cuts(name)
        if rest in shorter
    )
    (side, prefix), count = max(prefixes.items(), key=lambda item: item[1], default=(("", ""), 0))
    if not count or list(prefixes.values()).count(count) > 1:
        return Names(paired)
    longer, shorter = sides[side]
    if 2 * count < min(len(longer), len(shorter)):
        return Names(paired)
    for name in shorter:
        if prefix + name in longer:
            both = longer[prefix + name], shorter[name]
            paired.append((name, *(both if side == "before" else both[::-1])))
    return Names(paired, prefix, side)


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Maps names without wrappers, and with `_SAME_NAMES` replaced, to the original names.

    It omits names that result from several originals.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        parts = list(itertools.dropwhile("module".__eq__, parts))
        plain = ".".join(parts)
        for pattern, replacement in _SAME_NAMES:
            if match := pattern.fullmatch(plain):
                plain = match.expand(replacement)
        found.setdefault(plain, []).append(name)
    return {plain: wholes[0] for plain, wholes in found.items() if len(wholes) == 1}


def _cuts(name: str) -> Iterable[tuple[str, str]]:
    """Yields the name split after each of its first dots."""
    end = name.find(".") + 1
    for _ in range(_PARTS):
        if not end:
            return
        yield name[:end], name[end:]
        end = name.find(".", end) + 1
