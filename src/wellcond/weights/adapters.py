"""Low-rank adapters: a weight W that acts as W + s B A (Hu et al., arXiv 2106.09685).

They are known as PEFT names them: `lora_A` and `lora_B` in the module that wraps W, or in a file of
their own, of which adapter_config.json says the scale s. With DoRA (Liu et al., arXiv 2402.09353)
the rows of the sum are brought to lengths that are stored. Other libraries call A and B
`lora_down` and `lora_up`, or `lora.down` and `lora.up`, and store alpha = s r beside them.

The tensors of other adapters (OFT, VeRA, LoHa, ...) are parameters of maps, and no matrices that
act: `adapter_parameters` finds them by the type that adapter_config.json names, and by their names.

Letters: W (m, n), or (n, m) where a module stores it so; B (m, r), A (r, n).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.operators.product import Product
from wellcond.weights.reasons import Reason, Skipped

Read = Callable[[], Tensor]

_WRAPPER, _WRAPPED = "base_model.model.", ".base_layer"
_FACTOR = re.compile(r"(.+)\.lora_([A-Za-z_]+?)(?:\.([^.]+))??(?:\.weight)?")
# Of kohya's scripts, LyCORIS and ComfyUI: X.lora_down.weight; of older versions of diffusers:
# X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight; of XLabs X_lora1.down.
_DOWN_UP = re.compile(r"(.+?)[._]lora(?:_linear_layer|_layer|(\d*))[._](down|up|mid)\.weight")
_BESIDE = re.compile(r"(.+)\.(alpha|dora_scale)")
_PARTS = {"down": "A", "up": "B"}
# So begin the names of LyCORIS and of kohya's scripts, whatever the adapter is.
_FOREIGN = re.compile(r"lycoris_|lora_(unet|te\d*|prior|transformer)_")
# Types of PEFT whose tensors are pairs of factors.
_OF_PAIRS = ("", "LORA", "ADALORA")
# What other adapters call their tensors, where no config names the type.
_OTHER_ADAPTERS = {
    "BOFT": r"boft_[Rs]",
    "C3A": r"c3a_kernel",
    "DeLoRA": r"delora_\w+",
    "FourierFT": r"fourierft_spectrum",
    "GraLoRA": r"gralora_\w+",
    "HiRA": r"hira_[AB]",
    "HRA": r"hra_u",
    "IA3": r"ia3_l",
    "LN tuning": r"ln_tuning_layers",
    "LoRA of an embedding": r"lora_embedding_[AB]",
    "LoHa": r"hada_(w[12](_[ab])?|t[12])",
    "LoKr": r"lokr_(w[12](_[ab])?|t2)",
    "MiSS": r"miss_block",
    "OFT": r"oft_([rR]|blocks|diag)",
    "Poly": r"poly_lora_[AB]",
    "RandLoRA": r"randlora_(A|B|lambda|gamma)",
    "SHiRA": r"shira_(weight|indices)",
    "VB-LoRA": r"vblora_(logits_[AB]|vector_bank)",
    "VeRA": r"p?vera_(A|B|lambda_[bd])",
}
# Of a regular expression no group may be repeated, and little else: matching takes no time then.
_REPEATED_GROUP, _REPEATS, _LONG = re.compile(r"\)[*+?{]|\\\d|\(\?"), re.compile(r"[*+{]"), 300
# They change the base at first, so that W + s B A is what W was.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSCALED = "its scale is not known, as no adapter_config.json beside it says one"
_STACK = "it adapts a stack of matrices, which is not known"


class UnknownAdapterError(ValueError):
    """Why it cannot be said what an adapter adds."""


@dataclass(frozen=True)
class Setting:
    """What is not in the factors.

    Attributes:
        scale: s; nan if it is not known.
        transposed: W is stored as (n, m).
        unknown: why it is not known what is added; "" if it is.
        note: what a reader must know of it.
        acts: whether it is added: not if it is not active, or part of W already.
        no_sum: why W + s B A is not what acts, if so.
    """

    scale: float = math.nan
    transposed: bool = False
    unknown: str = ""
    note: str = ""
    acts: bool = True
    no_sum: str = ""


@dataclass(frozen=True)
class Adapter:
    """What is added to one weight.

    Attributes:
        module: that is adapted, by its path.
        name: of the adapter; "" if there is one alone.
        parts: the names of its tensors.
        B: reads that factor, of a convolution a kernel.
        A: reads that factor likewise.
        magnitude: reads the lengths of the rows, with DoRA.
        setting: the rest.
    """

    module: str
    name: str
    parts: tuple[str, ...]
    B: Read
    A: Read
    magnitude: Read | None
    setting: Setting

    @property
    def weight(self) -> str:
        """The name of W in a model that was not adapted."""
        return f"{self.module.removeprefix(_WRAPPER)}.weight"

    def product(self) -> Product:
        """B A.

        Raises:
            UnknownAdapterError: it is not known, or the factors do not fit.
        """
        if self.setting.unknown:
            raise UnknownAdapterError(self.setting.unknown)
        B, A = self.B().flatten(1), self.A().flatten(1)
        if B.shape[1] != A.shape[0]:
            shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
            raise UnknownAdapterError(f"there is no product of its factors {shapes}")
        return Product(B, A.mT)

    def change(self, W: Tensor) -> Tensor:
        """What acts less W, in float64 on the CPU and of its shape: s B A, and what DoRA adds.

        Raises:
            UnknownAdapterError: it is not known, the factors do not fit, or not W.
        """
        S, setting = self.product(), self.setting
        if setting.no_sum:
            raise UnknownAdapterError(setting.no_sum)
        wide = W.detach().to("cpu", torch.float64).flatten(1)
        wide = wide.mT if setting.transposed else wide
        if S.shape != wide.shape:
            shapes = f"{tuple(S.shape)} is added, but the weight is {tuple(wide.shape)}"
            raise UnknownAdapterError(shapes)
        added = setting.scale * (S.B.cpu().double() @ S.A.cpu().double().mT)
        if self.magnitude is not None:
            merged = wide + added
            factor = self.magnitude().detach().cpu().double().flatten() / merged.norm(dim=1)
            added = factor[:, None] * merged - wide
        return (added.mT if setting.transposed else added).reshape(W.shape)


def find_adapters(
    read: Mapping[str, Read],
    shapes: Mapping[str, tuple[int, ...]],
    setting: Callable[[str, str, int], Setting],
) -> list[Adapter]:
    """All that tensors of these names are; the setting is that of a module, a name and a rank."""
    adapters = []
    for (module, adapter), named in _factors(shapes).items():
        B, A, alpha, magnitude = (
            named.pop(part, None) for part in ("B", "A", "alpha", "magnitude_vector")
        )
        if B is None or A is None or not {A, B} <= read.keys():
            continue
        known = setting(module, adapter, shapes[A][0])
        if alpha and alpha in read and math.isnan(known.scale) and not known.unknown:
            known = _setting_of_alpha(read[alpha], shapes[A][0])
        if named:
            why = (
                f"with {_own_name(min(named.values()))} beside A and B, it is no LoRA that is known"
            )
            known = Setting(unknown=why)
        lengths = read.get(magnitude) if magnitude else None
        names = tuple(filter(None, (B, A, magnitude, *named.values())))
        adapters.append(Adapter(module, adapter, names, read[B], read[A], lengths, known))
    return adapters


def _factors(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The tensors of each pair of factors by module and adapter: what each is, and its name."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    beside: list[tuple[str, str, str]] = []
    for name in names:
        if match := _DOWN_UP.fullmatch(name):
            module, part, adapter = match[1].replace(".processor.", "."), match[3], match[2] or ""
        elif match := _FACTOR.fullmatch(name):
            module, part, adapter = match[1], match[2], match[3] or ""
        elif match := _BESIDE.fullmatch(name):
            beside.append((match[1], match[2], name))
            continue
        else:
            continue
        found.setdefault((module, adapter), {})[_PARTS.get(part, part)] = name
    for module, part, name in beside:
        if (module, "") in found:
            found[module, ""][part] = name
    return found


def _setting_of_alpha(read: Read, rank: int) -> Setting:
    alpha = read().flatten()
    scale = float(alpha[0]) / rank if alpha.numel() == 1 and rank else math.nan
    if not math.isfinite(scale):
        return Setting(note=_UNSCALED, no_sum=_UNSCALED)
    return Setting(scale, note="its scale is alpha/r, by the alpha in the file")


def adapter_parameters(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Skipped]:
    """The tensors of adapters that are not measured, and why.

    These are the parameters of an adapter that is no LoRA, and a factor without its other.

    Args:
        names: of all tensors of a file.
        config: what the adapter_config.json beside it says; empty if there is none.
    """
    names = list(names)
    kind = str(config.get("peft_type") or "").upper()
    found: dict[str, Skipped] = {}
    factors = _factors(names)
    pairs = [parts for parts in factors.values() if {"A", "B"} <= parts.keys()]
    paired = {name for parts in pairs for name in parts.values()}
    for name in names:
        if name not in paired and (of := _other_adapter(name, kind)):
            found[name] = Skipped(Reason.adapter, of)
    for parts in factors.values():
        alone = [parts[part] for part in ("A", "B") if part in parts]
        if len(alone) == 1:
            found[alone[0]] = Skipped(Reason.factor, "its other factor is not there")
    return found


def find_other_adapter(name: str, others: Mapping[str, Skipped]) -> str:
    """What adapts the weight of this name, by the tensors of other adapters; "" if nothing does."""
    module, inside, _ = name.rpartition(f"{_WRAPPED}.")
    found = (why.detail for other, why in others.items() if other.startswith(f"{module}."))
    return next(found, "") if inside else ""


def _other_adapter(name: str, kind: str) -> str:
    """The adapter other than LoRA that a tensor is a parameter of, or "" if there is no such."""
    parts = re.split(r"[./]", name)
    for known, pattern in _OTHER_ADAPTERS.items():
        if any(re.fullmatch(pattern, part) for part in parts):
            return known
    if _FOREIGN.match(name) and len(parts) > 1:
        return "LyCORIS"
    if kind in _OF_PAIRS:
        return ""
    # PEFT begins the names of a type's parameters with the type, and saves trained copies of whole
    # layers beside them, as weights and biases.
    own = parts[-1] not in ("weight", "bias")
    return kind if own or any(part.startswith(f"{kind.lower()}_") for part in parts) else ""


def _own_name(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def setting_of_file(config: Mapping[str, Any]) -> Callable[[str, str, int], Setting]:
    """By adapter_config.json; of one that is empty no scale is known.

    s is alpha/r, or alpha/sqrt(r) with `use_rslora`.
    """
    begun = str(config.get("init_lora_weights", "")).lower()
    note = no_sum = ""
    if begun.startswith(_RESIDUAL):
        note = f"begun by {begun}, so that it holds a part of the weight from the beginning"
        no_sum = (
            f"it was begun by {begun}, which changes the base first. Load it with PEFT, and audit "
            "that model"
        )
    stacks = [str(parameter) for parameter in config.get("target_parameters") or ()]

    def setting(module: str, _: str, rank: int) -> Setting:
        path = module.removeprefix(_WRAPPER)
        if stacks and (_in_stack(path, stacks) or rank not in _ranks(config)):
            return Setting(unknown=_STACK)
        alpha, unknown = _alpha(config, path)
        if unknown:
            return Setting(unknown=unknown)
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and rank > 0
        if not number or not math.isfinite(alpha):
            return Setting(note=_UNSCALED, no_sum=_UNSCALED)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return Setting(scale, bool(config.get("fan_in_fan_out")), note=note, no_sum=no_sum)

    return setting


def _in_stack(path: str, stacks: list[str]) -> bool:
    """Whether a module holds one of these parameters, as `mlp.experts.down_proj` of `mlp.experts`.

    Of one without a path any module may.
    """
    holders = (stack.rpartition(".")[0] for stack in stacks)
    inner = path
    while inner.endswith(_WRAPPED):  # one for each parameter of the same module
        inner = inner.removesuffix(_WRAPPED)
    return inner != path or any(holder and _ends(inner, holder) for holder in holders)


def _ranks(config: Mapping[str, Any]) -> list[Any]:
    patterns = config.get("rank_pattern") or {}
    return [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]


def _alpha(config: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """alpha of a module, and why it is not known, if so."""
    patterns = config.get("alpha_pattern") or {}
    for pattern in patterns if isinstance(patterns, dict) else ():
        many = len(_REPEATS.findall(pattern)) > 2 or len(path) > _LONG
        if many or _REPEATED_GROUP.search(pattern):  # as one from a file it could run for hours
            return None, "its scale is not known, as alpha_pattern is too complex an expression"
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except (re.error, OverflowError):
            return None, "its scale is not known, as alpha_pattern is no regular expression"
        if found:
            return patterns[pattern], ""
    return config.get("lora_alpha"), ""


def setting_of_model(model: nn.Module) -> Callable[[str, str, int], Setting]:
    """By what the modules say that PEFT puts around others."""
    modules = dict(model.named_modules())

    def setting(module: str, name: str, _: int) -> Setting:
        wrapper = modules.get(module)
        if hasattr(wrapper, "parameter_name"):
            return Setting(unknown=_STACK)
        scaling = getattr(wrapper, "scaling", {})
        if name not in scaling:
            return Setting(unknown="its module says no scale")
        merged = name in getattr(wrapper, "merged_adapters", ())
        active = name in getattr(wrapper, "active_adapters", (name,))
        off = getattr(wrapper, "disable_adapters", False) or not active
        note = "part of the weight already" if merged else "not active" if off else ""
        transposed = bool(getattr(wrapper, "fan_in_fan_out", False))
        return Setting(float(scaling[name]), transposed, note=note, acts=not (merged or off))

    return setting


def weight_of(adapter: Adapter, names: Collection[str], beside: bool = False) -> str | None:
    """What they call the weight that is adapted, of the same file or of that of a base.

    Beside its adapter it is called `base_layer`. In a base it has the name of its module, or one is
    the end of the other: a model with a head calls `model.layers.0.q_proj.weight` what its body
    calls `layers.0.q_proj.weight`. None if there is none, or no single one.
    """
    if beside:
        inside = f"{adapter.module}{_WRAPPED}.weight"
        return inside if inside in names else None
    if adapter.weight in names:
        return adapter.weight
    if shorter := [name for name in names if _ends(adapter.weight, name)]:
        return max(shorter, key=len)
    longer = [name for name in names if _ends(name, adapter.weight)]
    return longer[0] if len(longer) == 1 else None


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
