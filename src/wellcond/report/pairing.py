"""Which weight of one audit is which of another: by name, whatever wraps the model."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from wellcond.report.findings import Finding, Grade
from wellcond.text import join_remarks

# What torch.compile, checkpointing and FSDP put into names; DataParallel puts "module" before all.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PARTS = 4  # of a prefix, at most: model.language_model.
# A weight by itself, and as one block of a fused one or one expert of a stack: transformers writes
# some classes in the first form and holds them in the second, under other names of the module.
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
    )
]


class Pair(NamedTuple):
    """A weight before and after, None on the side that lacks it; `label` is what they share."""

    label: str
    before: Finding | None
    after: Finding | None

    @property
    def ratio(self) -> float:
        """kappa after over kappa before, 1 if both are infinite.

        nan if a side is missing, has no kappa, or has only a bound of it.
        """
        return self.quotient(lambda finding: finding.condition_number)

    def quotient(self, number: Callable[[Finding], float]) -> float:
        """A number after over that before; nan as of `ratio`."""
        if not (self.before and self.after):
            return math.nan
        if Grade.bounded in (self.before.grade, self.after.grade):
            return math.nan
        return _quotient(number(self.after), number(self.before))

    @property
    def change(self) -> float:
        """|log| of the apparent ratio, to sort by; inf where something appears or goes."""
        if not (self.before and self.after):
            return math.inf
        old, new = (side.condition_number for side in (self.before, self.after))
        if math.isnan(old) and math.isnan(new):
            return 0.0
        ratio = _quotient(new, old)
        return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf

    @property
    def note(self) -> str:
        """Another dtype, and what there is to say of each side; "" if nothing."""
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
    """The findings by their label. A tensor "a:q" of a strange file has that of the view q of a."""
    found: dict[str, Finding] = {}
    for finding in findings:
        label = finding.label
        while label in found:
            label += "'"
        found[label] = finding
    return found


class Names(NamedTuple):
    """The names of the weights that both sides have.

    Attributes:
        paired: the common name of each weight, and its names before and after.
        prefix: the prefix without which names of one side are equal to those of the other; or "".
        side: the side that has the prefix, "before" or "after"; or "".
    """

    paired: list[tuple[str, str, str]]
    prefix: str = ""
    side: str = ""


def pair_names(before: Iterable[str], after: Iterable[str]) -> Names:
    """Pairs the names that mean the same weight; only one side has each of the others.

    Equal names are paired first, then names that are equal without wrappers and with each block of
    a fused weight and each expert of a stack under a name of its own, then names that are equal
    without a prefix that one side has. That is the prefix that pairs most names, provided that
    these are at least half of the names left on a side, and that no other prefix pairs as many.
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
    """The names without wrappers, and with `_SAME_NAMES` replaced, where that is of one alone."""
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
    """The name in two, after its first dots."""
    end = name.find(".") + 1
    for _ in range(_PARTS):
        if not end:
            return
        yield name[:end], name[end:]
        end = name.find(".", end) + 1
