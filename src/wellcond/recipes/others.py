"""Formats that are recognised by the names of their tensors, but that no recipe builds.

Their layouts are those of GPU kernels, or need tables that only their libraries contain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from wellcond.recipes.base import Candidate, Content, Recipe, RecipeError


class Format(NamedTuple):
    """A format and the names of its tensors in a layer.

    Attributes:
        name: the name of the format.
        way_out: how to obtain a checkpoint that can be measured.
        required: the names that identify the format together, the codes first. A dtype follows
            after a colon where the name is not sufficient.
        more: the names of optional tensors.
    """

    name: str
    way_out: str
    required: str
    more: str = ""


_DEQUANTISE = "dequantise it with {} and save it"
_AGAIN = "use the checkpoint from which it was quantised"

FORMATS = (
    Format("AQLM", _DEQUANTISE.format("aqlm"), "codes codebooks scales"),
    Format(
        "VPTQ",
        _DEQUANTISE.format("vptq"),
        "indices centroids.weight",
        "res_centroids.weight res_indices outlier_centroids.weight outlier_indices weight_scale "
        "weight_bias perm",
    ),
    Format("QuIP#", _AGAIN, "Qidxs SU SV", "Wscale codebook_id fuse_scales"),
    Format(
        "EXL3 or QTIP",
        _AGAIN,
        "trellis",
        "suh svh su sv SU SV mcg mul1 tlut rcp tp_rank scale",
    ),
    Format(
        "EXL2",
        _AGAIN,
        "q_weight q_scale q_groups",
        "q_invperm q_perm q_scale_max q_group_map",
    ),
    Format("QQQ", _AGAIN, "B:int32 s_channel", "s_group"),
    Format("Marlin", _AGAIN, "B:int32 s"),
    Format("SpQR", _AGAIN, "dense_weights row_offsets col_vals", "in_perm"),
    Format("HIGGS", _DEQUANTISE.format("transformers"), "weight:int16 scales tables tables2"),
    Format("EETQ", _AGAIN, "weight:int8 weight_scales"),
    Format("EETQ", _AGAIN, "qweight:int8 weight_scales"),
    Format(
        "FP-Quant",
        _AGAIN,
        "qweight dqweight",
        "weight scales weight_global_scale act_global_scale forward_hadamard_matrix "
        "backward_hadamard_matrix",
    ),
    Format(
        "SVDQuant",
        _AGAIN,
        "qweight wscales",
        "proj_down proj_up smooth_factor smooth_factor_orig wtscale wcscales wzeros lora_down "
        "lora_up smooth smooth_orig",
    ),
    Format("ParoQuant", _AGAIN, "qweight theta pairs", "qzeros scales channel_scales"),
)


def find_others(content: Content) -> Iterator[Candidate]:
    """The weights in known formats that cannot be built."""
    needs = [(one, [need.partition(":") for need in one.required.split()]) for one in FORMATS]
    layers: dict[str, list[str]] = {}
    for name in content.tensors:
        stem, _, own = name.rpartition(".")
        # The weight can belong to a submodule of the layer, such as `centroids.weight`.
        for layer in (stem, stem.rpartition(".")[0]) if own == "weight" else (stem,):
            layers.setdefault(layer, []).append(name)
    for layer, names in layers.items():
        dot = f"{layer}." if layer else ""
        own_names = {name.removeprefix(dot): name for name in names}
        for one, required in needs:
            if all(
                name in own_names and (not dtype or content.dtype(own_names[name]) == dtype)
                for name, _, dtype in required
            ):
                known = [name for name, *_ in required] + one.more.split()
                parts = tuple(own_names[name] for name in known if name in own_names)

                def make(name: str = one.name, way_out: str = one.way_out) -> Recipe:
                    raise RecipeError(
                        f"it is stored as {name}, which wellcond does not decode: {way_out}"
                    )

                yield Candidate(f"{dot}weight", parts, make)
                break
