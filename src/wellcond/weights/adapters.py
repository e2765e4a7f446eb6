"""Adapters that change a weight W to W + s B A, where their tensors determine B and A.

The forms in `changes` are LoRA, LoHa, LoKr, VeRA and RandLoRA.

PEFT calls the factors `lora_A` and `lora_B`, in the module that wraps W, or in a separate file with
the scale s in adapter_config.json. DoRA (Liu et al., arXiv 2402.09353) also rescales the rows of
the sum to stored lengths. Other libraries call A and B `lora_down` and `lora_up`, or `lora.down`
and `lora.up`, and store alpha = s r next to them.

The tensors of other adapters (OFT, IA3, ...) are not measured. `find_adapter_parameters` finds them
by the type in adapter_config.json and by their names.

Letters: W (m, n), or (n, m) if a module stores the transpose; B (m, r), A (r, n).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.linalg.product import Product
from wellcond.text import is_out_of_memory
from wellcond.weights.changes import FORMS, Form, Shape, UnknownAdapterError
from wellcond.weights.reasons import Reason, Skipped

Read = Callable[[], Tensor]

_WRAPPER, _WRAPPED = "base_model.model.", ".base_layer"
_FACTOR = re.compile(r"(.+)\.lora_([A-Za-z_]+?)(?:\.([^.]+))??(?:\.weight)?")
# X.lora_down.weight (kohya's scripts, LyCORIS and ComfyUI); X.lora.down.weight, X_lora.down.weight
# and X.lora_linear_layer.down.weight (older versions of diffusers); X_lora1.down (XLabs).
_DOWN_UP = re.compile(r"(.+?)[._]lora(?:_linear_layer|_layer|(\d*))[._](down|up|mid)\.weight")
_OTHER = re.compile(
    r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|vera_lambda_[bd]"
    r"|randlora_(?:lambda|gamma))(?:\.([^.]+))?"
)
_SHARED = re.compile(r"(?:.+\.)?((?:vera|randlora)_[AB])(?:\.[^.]+)?")
_BESIDE = re.compile(r"(.+)\.(alpha|dora_scale|scalar)")
_PARTS = {"down": "A", "up": "B"}
# Prefixes of the names in LyCORIS and kohya's scripts, for every kind of adapter.
_FOREIGN = re.compile(r"lycoris_|lora_(unet|te\d*|prior|transformer)_")
# PEFT types whose tensors are pairs of factors.
_OF_PAIRS = ("", "LORA", "ADALORA")
# Names of the tensors of other adapters, for files without a config.
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
_ANY_OTHER = re.compile("|".join(_OTHER_ADAPTERS.values()))
# A regular expression from a file must not repeat groups and can have at most two repeats, so that
# matching is fast.
_REPEATED_GROUP, _REPEATS, _LONG = re.compile(r"\)[*+?{]|\\\d|\(\?"), re.compile(r"[*+{]"), 300
# Initialisations that change the base so that W + s B A is the original W.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSCALED = "its scale is unknown, because no adapter_config.json in its folder gives one"
_STACK = "it adapts a stack of matrices, which is not supported"


@dataclass(frozen=True)
class AdapterSetting:
    """The properties of an adapter that its factors do not show.

    Attributes:
        scale: s; nan if it is unknown.
        transposed: W is stored as (n, m).
        unknown: why the added matrix is unknown; "" if it is known.
        note: a remark for the report.
        acts: whether it is added to W; False if it is inactive or already merged.
        no_sum: why W + s B A is not the effective weight; "" if it is.
    """

    scale: float = math.nan
    transposed: bool = False
    unknown: str = ""
    note: str = ""
    acts: bool = True
    no_sum: str = ""


Setting = Callable[[str, str, Form, int], AdapterSetting]


@dataclass(frozen=True)
class Adapter:
    """The matrix that is added to one weight.

    Attributes:
        module: the path of the adapted module.
        name: of the adapter; "" if there is only one.
        form: its kind, which computes two factors from its tensors.
        roles: the names of its tensors, by their roles in the form.
        reads: the functions that read its tensors, by their names.
        magnitude: reads the lengths of the rows (DoRA only).
        setting: its other properties.
    """

    module: str
    name: str
    form: Form
    roles: Mapping[str, str]
    reads: Mapping[str, Read]
    magnitude: Read | None
    setting: AdapterSetting

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(self.reads)

    @property
    def weight(self) -> str:
        """The name of W in a model without adapters."""
        return f"{self.module.removeprefix(_WRAPPER)}.weight"

    def rank(self, W: Tensor) -> int:
        """The number of singular values of B A that can be nonzero."""
        return self.product(self._shape_of(W)).nu

    def _shape_of(self, W: Tensor) -> Shape:
        m, n = W.flatten(1).shape
        return (n, m) if self.setting.transposed else (m, n)

    def product(self, shape: Shape | None = None) -> Product:
        """B A, which for some forms depends on the shape of W.

        Raises:
            UnknownAdapterError: B A is unknown, or the shapes of the tensors are incompatible.
        """
        if self.setting.unknown:
            raise UnknownAdapterError(self.setting.unknown)
        tensors = {role: self.reads[name]().detach() for role, name in self.roles.items()}
        try:
            B, A = self.form.factors(tensors, shape)
        except IndexError:
            raise UnknownAdapterError("one of its factors is a vector") from None
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(f"{role} {tuple(one.shape)}" for role, one in tensors.items())
            raise UnknownAdapterError(f"its tensors have incompatible shapes: {shapes}") from None
        if B.shape[1] != A.shape[0]:
            shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
            raise UnknownAdapterError(f"its factors {shapes} cannot be multiplied")
        return Product(B, A.mT)

    def change(self, W: Tensor) -> Tensor:
        """The effective weight minus W, in float64 on the CPU and in the shape of W.

        This is s B A, rescaled if there is a magnitude.

        Raises:
            UnknownAdapterError: the change is unknown, or the shapes of the factors and W are
                incompatible.
        """
        S, setting = self.product(self._shape_of(W)), self.setting
        if setting.no_sum:
            raise UnknownAdapterError(setting.no_sum)
        wide = W.detach().to("cpu", torch.float64).flatten(1)
        wide = wide.mT if setting.transposed else wide
        if S.shape != wide.shape:
            shapes = f"it adds {tuple(S.shape)} to a weight of {tuple(wide.shape)}"
            raise UnknownAdapterError(shapes)
        change: Tensor = setting.scale * (S.B.cpu().double() @ S.A.cpu().double().mT)
        if self.magnitude is not None:
            merged = wide + change
            factor = self.magnitude().detach().cpu().double().flatten() / merged.norm(dim=1)
            change = factor[:, None] * merged - wide
        return (change.mT if setting.transposed else change).reshape(W.shape)


def find_adapters(
    read: Mapping[str, Read],
    shapes: Mapping[str, tuple[int, ...]],
    setting: Setting,
) -> list[Adapter]:
    """The adapters that tensors with these names and shapes form.

    Args:
        read: the functions that read the tensors, by name.
        shapes: the shapes of the tensors, by name.
        setting: gives the setting for a module, the name of an adapter, its form and its rank;
            the rank is 0 if its tensors do not show it.
    """
    adapters = []
    shared = _find_shared(shapes)
    for (module, adapter), parts in _find_factors(shapes).items():
        form, roles = _choose_form(parts)
        if form is None or not {*roles.values()} <= read.keys():
            continue
        magnitude = roles.pop("magnitude_vector", None)
        others = {part: name for part, name in parts.items() if name not in roles.values()}
        alpha = others.pop("alpha", None)
        others.pop("magnitude_vector", None)
        rank = next((shapes[roles[role]][0] for role in form.ranked if role in roles), 0)
        known = setting(module, adapter, form, rank)
        if alpha and alpha in read and math.isnan(known.scale) and not known.unknown:
            known = _setting_of_alpha(read[alpha], rank)
        if missing := [role for role in form.shared if role not in shared]:
            known = AdapterSetting(
                unknown=f"{' and '.join(missing)}, which all layers share, were not saved with it"
            )
        roles |= {role: shared[role] for role in form.shared if role in shared}
        if others:
            other = min(others.values()).removesuffix(".weight").rpartition(".")[2]
            pair = "A and B" if form.name == "LoRA" else "its factors"
            known = AdapterSetting(
                unknown=f"with {other} in addition to {pair}, it is not a known {form.name}"
            )
        names = filter(None, (*roles.values(), magnitude, *others.values()))
        reads = {name: read[name] for name in names if name in read}
        lengths = read.get(magnitude) if magnitude else None
        adapters.append(Adapter(module, adapter, form, roles, reads, lengths, known))
    return adapters


def _choose_form(parts: Mapping[str, str]) -> tuple[Form | None, dict[str, str]]:
    """The form of tensors with these roles, and the names of the tensors that it uses."""
    for form in FORMS:
        if chosen := form.choose(parts):
            return form, {role: parts[role] for role in chosen}
    return None, {}


def is_shared_by_layers(name: str) -> bool:
    """Whether all layers of an adapter share a tensor of this name."""
    return _SHARED.fullmatch(name) is not None


def _find_shared(names: Iterable[str]) -> dict[str, str]:
    """The tensors that all layers share, by role; among copies, the one with the shortest name."""
    found: dict[str, str] = {}
    for name in names:
        if (match := _SHARED.fullmatch(name)) and len(name) < len(found.get(match[1], name + ".")):
            found[match[1]] = name
    return found


def _find_factors(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The names of the tensors of each adapter, by module and adapter name, and then by role."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    beside: list[tuple[str, str, str]] = []
    for name in names:
        if match := _DOWN_UP.fullmatch(name):
            module, part, adapter = match[1].replace(".processor.", "."), match[3], match[2] or ""
        elif (match := _FACTOR.fullmatch(name)) or (match := _OTHER.fullmatch(name)):
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


def _setting_of_alpha(read: Read, rank: int) -> AdapterSetting:
    if not rank:  # LyCORIS divides by the rank only if a factor has one
        return AdapterSetting(1.0, note="its scale is 1, because its factors are full matrices")
    alpha = read().flatten()
    scale = float(alpha[0]) / rank if alpha.numel() == 1 and rank else math.nan
    if not math.isfinite(scale):
        return AdapterSetting(note=_UNSCALED, no_sum=_UNSCALED)
    return AdapterSetting(scale, note="its scale is alpha/r, with the alpha in the file")


def find_adapter_parameters(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Skipped]:
    """The tensors of adapters that are not measured, and why.

    These are the parameters of adapters of unknown form, and factors whose counterpart is missing.

    Args:
        names: the names of all tensors of a file.
        config: the content of adapter_config.json in its folder; empty without that file.
    """
    names = list(names)
    kind = str(config.get("peft_type") or "").upper()
    found: dict[str, Skipped] = {}
    factors = _find_factors(names)
    shared = _find_shared(names)
    forms = [(parts, _choose_form(parts)[0]) for parts in factors.values()]
    paired = {name for parts, form in forms if form for name in parts.values()}
    paired |= {shared[role] for _, form in forms if form for role in form.shared if role in shared}
    for name in names:
        if name not in paired and (of := _identify_other(name, kind)):
            found[name] = Skipped(Reason.adapter, of)
    for parts in factors.values():
        alone = [parts[part] for part in ("A", "B") if part in parts]
        if len(alone) == 1:
            found[alone[0]] = Skipped(Reason.factor, "its other factor is missing")
    return found


def find_other_adapter(name: str, others: Mapping[str, Skipped]) -> str:
    """The kind of the other adapter that adapts the weight of this name; "" if none does."""
    module, inside, _ = name.rpartition(f"{_WRAPPED}.")
    found = (why.detail for other, why in others.items() if other.startswith(f"{module}."))
    return next(found, "") if inside else ""


def _identify_other(name: str, kind: str) -> str:
    """The kind of the other adapter that a tensor belongs to, or ""."""
    parts = re.split(r"[./]", name)
    if any(map(_ANY_OTHER.fullmatch, parts)):
        for known, pattern in _OTHER_ADAPTERS.items():
            if any(re.fullmatch(pattern, part) for part in parts):
                return known
    if _FOREIGN.match(name) and len(parts) > 1:
        return "LyCORIS"
    if kind in _OF_PAIRS:
        return ""
    # In PEFT the names of a type's parameters begin with the type. PEFT also saves trained copies
    # of entire layers, as weights and biases.
    own = parts[-1] not in ("weight", "bias")
    return kind if own or any(part.startswith(f"{kind.lower()}_") for part in parts) else ""


def read_settings_of_file(config: Mapping[str, Any]) -> Setting:
    """Settings from the content of adapter_config.json; if it is empty, most scales are unknown.

    s is alpha/r, or alpha/sqrt(r) with `use_rslora`; for VeRA it is 1.
    """
    method = str(config.get("init_lora_weights", "")).lower()
    note = no_sum = ""
    if method.startswith(_RESIDUAL):
        note = f"initialised by {method}, so it contains a part of the original weight"
        no_sum = (
            f"it was initialised by {method}, which changes the base. Load it with PEFT, and audit "
            "that model"
        )
    stacks = [str(parameter) for parameter in config.get("target_parameters") or ()]

    def setting(module: str, _: str, form: Form, rank: int) -> AdapterSetting:
        path = module.removeprefix(_WRAPPER)
        if stacks and (_is_in_stack(path, stacks) or rank not in _read_ranks(config)):
            return AdapterSetting(unknown=_STACK)
        transposed = bool(config.get("fan_in_fan_out"))
        if not form.alpha:
            return AdapterSetting(1.0, transposed)
        alpha, unknown = _read_by_pattern(config, path, "alpha", form.alpha)
        r, unknown_rank = (rank, "") if rank else _read_by_pattern(config, path, "rank", "r")
        if unknown or unknown_rank:
            return AdapterSetting(unknown=unknown or unknown_rank)
        if not (_is_number(alpha) and _is_number(r) and r >= 1):
            return AdapterSetting(note=_UNSCALED, no_sum=_UNSCALED)
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        return AdapterSetting(scale, transposed, note=note, no_sum=no_sum)

    return setting


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_in_stack(path: str, stacks: list[str]) -> bool:
    """Whether a module has one of these parameters: `mlp.experts` has `mlp.experts.down_proj`.

    A parameter without a path matches no module.
    """
    holders = (stack.rpartition(".")[0] for stack in stacks)
    inner = path
    while inner.endswith(_WRAPPED):  # one level per parameter of the same module
        inner = inner.removesuffix(_WRAPPED)
    return inner != path or any(holder and _ends_with(inner, holder) for holder in holders)


def _read_ranks(config: Mapping[str, Any]) -> list[Any]:
    patterns = config.get("rank_pattern") or {}
    return [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]


def _read_by_pattern(config: Mapping[str, Any], path: str, what: str, key: str) -> tuple[Any, str]:
    """alpha or the rank of a module, and why it is unknown, or ""."""
    patterns = config.get(f"{what}_pattern") or {}
    for pattern in patterns if isinstance(patterns, dict) else ():
        many = len(_REPEATS.findall(pattern)) > 2 or len(path) > _LONG
        if many or _REPEATED_GROUP.search(pattern):  # such a pattern could take hours to match
            return None, f"its scale is unknown, because {what}_pattern is too complex"
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except (re.error, OverflowError):
            why = f"{what}_pattern is not a regular expression"
            return None, f"its scale is unknown, because {why}"
        if found:
            return patterns[pattern], ""
    return config.get(key), ""


def read_settings_of_model(model: nn.Module) -> Setting:
    """Settings from the modules with which PEFT wraps the layers of a model."""
    modules = dict(model.named_modules())

    def setting(module: str, name: str, form: Form, _: int) -> AdapterSetting:
        wrapper = modules.get(module)
        if hasattr(wrapper, "parameter_name"):
            return AdapterSetting(unknown=_STACK)
        scaling = getattr(wrapper, "scaling", {}) if form.alpha else {name: 1.0}
        if name not in scaling:
            return AdapterSetting(unknown="its module has no scale")
        merged = name in getattr(wrapper, "merged_adapters", ())
        active = name in getattr(wrapper, "active_adapters", (name,))
        off = getattr(wrapper, "disable_adapters", False) or not active
        note = "already merged into the weight" if merged else "not active" if off else ""
        transposed = bool(getattr(wrapper, "fan_in_fan_out", False))
        return AdapterSetting(float(scaling[name]), transposed, note=note, acts=not (merged or off))

    return setting


def find_adapted_weight(
    adapter: Adapter, names: Collection[str], beside: bool = False
) -> str | None:
    """The name of the adapted weight among these names, or None if not exactly one fits.

    In the file of its adapter it is called `base_layer`. In a base it has the name of its module,
    or one of the two names ends with the other: `layers.0.q_proj.weight` of a body is
    `model.layers.0.q_proj.weight` in a model with a head.

    Args:
        adapter: the adapter of the weight.
        names: the names of tensors.
        beside: whether these are the names in the file of the adapter instead of those in a base.
    """
    if beside:
        inside = f"{adapter.module}{_WRAPPED}.weight"
        return inside if inside in names else None
    if adapter.weight in names:
        return adapter.weight
    if match := _FOREIGN.match(adapter.module):
        return _find_flat(adapter.module[match.end() :], names)
    if shorter := [name for name in names if _ends_with(adapter.weight, name)]:
        return max(shorter, key=len)
    longer = [name for name in names if _ends_with(name, adapter.weight)]
    return longer[0] if len(longer) == 1 else None


def _find_flat(module: str, names: Collection[str]) -> str | None:
    """The weight of a module whose path is written with underscores; None if it is ambiguous."""
    flat = {
        name: re.sub(r"[./]", "_", name.removesuffix(".weight"))
        for name in names
        if name.endswith(".weight")
    }
    whole = [name for name, path in flat.items() if path == module]
    ends = [name for name, path in flat.items() if path.endswith(f"_{module}")]
    found = whole or ends
    return found[0] if len(found) == 1 else None


def _ends_with(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
