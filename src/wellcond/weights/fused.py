"""Several matrices in one tensor, and which rows of it each of them is.

Query, key and value of attention (`qkv.weight:q`), gate and up of a gated layer
(`gate_up_proj.weight:gate`), of experts as a stack, and the gates of a recurrent cell. Names alone
say nothing: the shapes must fit those of the projection that takes what these give, and of `qkv`
and `qkv_proj` a known class or config must say the order of the rows. What lies head by head, or in
an order that is not known, stays whole; a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from wellcond.operators.views import STORED, Part, Transposed, View
from wellcond.weights.kernels import view_by_shape
from wellcond.weights.projections import (
    Module,
    Place,
    Projection,
    Stored,
    StoredTensor,
    Unknown,
    has,
    projection,
    said,
    stored_modules,
)

# A fused projection of attention, and what its output projection may be called.
_QKV = {
    "qkv": ("proj", "projection"),
    "c_attn": ("c_proj",),
    "query_key_value": ("dense",),
    "qkv_proj": ("o_proj",),  # with out_proj, as CodeGen and MiniMax have it, cut otherwise
    "Wqkv": ("out_proj", "Wo"),
    "in_proj_weight": ("out_proj",),
}
# Of these names rows are in any order: by head, by channel as in EDM, or one part after the other.
# Known are classes and models with `qkv` and `qkv_proj` part after part, `query_key_value` by head.
_ANY_ORDER = ("qkv", "qkv_proj", "query_key_value")
_LIBRARIES = ("timm", "torchvision", "transformers")
_MODEL_TYPES = re.compile(
    r"(blip(_2)?|bloom|cohere_compass|deepseek_ocr2|dots3_note|ernie4_5_vl_moe|exaone4_5|falcon"
    r"|florence2?|gpt_neox(_japanese)?|persimmon|refinedweb(model)?|glm(4v|4v_moe|5_next|_image|_ocr)|got_ocr2|hiera|instructblip(video)?|mgp_str|phi3"
    r"|phi4_multimodal|pp_formulanet|pp_ocrv[56]_(mobile|server|small)_rec|qwen(2|2_5|3)_vl(_moe)?"
    r"|qwen3_5(_moe)?|qwen3_omni_moe|qwen4_exp|sam2?|sam_hq|seggpt|slanext|timesformer"
    r"|unlimited_ocr|vitdet)(_.*)?",
    re.DOTALL,
)
# Of these keys and values may be fewer than queries, and still follow one after the other.
_GROUPED = ("qkv_proj", "Wqkv")
# What only modules have whose rows are cut otherwise: TinyViT and EfficientFormer by key_dim and,
# as in LeViT, attention_biases; ChatGLM.
_OTHERWISE = ("key_dim", "attention_biases", "multi_query_attention")
# Of MaxViT, whose heads come first unless a setting says otherwise that no file tells.
_PERHAPS_HEADS_FIRST = ("attn_block", "attn_grid")

_GATED = {
    "gate_up_proj": "down_proj",
    "input_linear": "output_linear",  # of Granite
    "weights_in": "weights_out",  # of the second DINO
    "w12": "w3",
}

# By how many there are, the gates of recurrent cells of torch.
GATES = {4: "ifgo", 3: "rzn"}

_BY_HEAD = "holds query, key and value head by head, and so no block of rows is one of them"
_INTERLEAVED = "holds gate and up in turns, and so no block of rows is one of them"


@dataclass(frozen=True)
class Views:
    """The matrices in a tensor by the name of their view, "" if it is one; what is to be known."""

    views: Mapping[str, View] = field(default_factory=lambda: {"": STORED})
    note: str = ""


@dataclass(frozen=True)
class Cut:
    """A fused projection of attention.

    Attributes:
        name: by which its module has it.
        whole: the tensor.
        output: the projection that takes the values of all heads.
        sizes: the rows of what it holds, "q", "k" and "v" or the last two, in this order.
        by_head: the rows of one head, or group of heads that share a key, follow those of another.
    """

    name: str
    whole: Projection
    output: str
    sizes: Mapping[str, int]
    by_head: bool

    def views(self) -> Views:
        """The blocks, or the whole where they are none."""
        if self.by_head:
            return Views({"": self.whole.view}, f"`{self.name}` {_BY_HEAD}")
        return Views(_blocks(self.sizes, self.whole.view))


def _blocks(sizes: Mapping[str, int], view: View = STORED) -> dict[str, View]:
    """One after the other."""
    starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
    parts = zip(sizes.items(), starts, strict=True)
    return {name: Part(view, start, size) for (name, size), start in parts}


def equal_blocks(names: str, rows: int) -> dict[str, View]:
    """Equal blocks of rows, one a letter."""
    return _blocks(dict.fromkeys(names, rows // len(names)))


def cut_of_attention(module: Module) -> Cut | None:
    """How a module cuts its fused projection of query, key and value; None if it has none.

    Raises:
        Unknown: it has one, but how it is cut is not known.
    """
    for name, outputs in _QKV.items():
        output = next((one for one in outputs if has(module, one)), None)
        if has(module, name) and output is not None:
            return _cut(module, name, output)
    return None


def _cut(module: Module, name: str, output: str) -> Cut:
    whole, width = projection(module, name), projection(module, output).columns
    if len(whole.shape) != 2:
        raise Unknown(f"`{name}` is no matrix")
    other = [one for one in _OTHERWISE if has(module, one) or said(module, one) is not None]
    if other:
        raise Unknown(f"`{other[0]}` says that its `{name}` is cut in a way that is not known")
    parts = module.path.split(".") if isinstance(module, Stored) else ()
    if any(part in _PERHAPS_HEADS_FIRST for part in parts):
        raise Unknown(f"whether `{name}` is cut head by head is not known")
    shared = said(module, "multi_query")  # one key and one value for all heads
    grouped = said(module, "new_decoder_architecture")  # of Falcon
    of_falcon = shared is not None or grouped is not None
    if name in _ANY_ORDER and not of_falcon and not _order_is_known(module):
        raise Unknown(f"`{name}` is one matrix: no known class or model_type says how it is cut")
    rows = whole.rows
    if name == "c_attn" and has(module, "q_attn"):  # of GPT-2, with keys and values of another
        if rows != 2 * width:
            raise Unknown(f"the {rows} rows of `{name}` are no two blocks of {width}")
        return Cut(name, whole, output, {"k": width, "v": width}, by_head=False)
    each, rest = divmod(rows - width, 2)
    equal = each == width and not rest
    if not (equal or ((name in _GROUPED or shared or grouped) and 0 < each < width and not rest)):
        raise Unknown(
            f"the {rows} rows of `{name}` are no three equal blocks of {width}, the columns of "
            f"`{output}`"
        )
    by_head = bool(getattr(module, "head_first", False))
    if name == "query_key_value":
        by_head = bool(grouped) or not shared
    if name == "c_attn" and shared is False:  # of GPTBigCode
        by_head = True
    return Cut(name, whole, output, {"q": width, "k": each, "v": each}, by_head)


def _order_is_known(module: Module) -> bool:
    """Whether its class or its config is one of which the order of rows is known."""
    if not isinstance(module, Stored):
        return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(module).__mro__)
    config = module.said
    if "architecture" in config and "pretrained_cfg" in config:  # of timm
        return True
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    kinds = (str(part.get("model_type", "")).lower().replace("-", "_") for part in parts)
    return any(map(_MODEL_TYPES.fullmatch, kinds))


def _of_gated(module: Module) -> Iterator[tuple[Place, Views]]:
    """Gate and up of a layer, or of a stack of experts in one tensor."""
    for name, output in _GATED.items():
        if not (has(module, name) and has(module, output)):
            continue
        try:
            both, down = projection(module, name), projection(module, output)
        except Unknown:
            continue
        if len(both.shape) != len(down.shape) or both.shape[:-2] != down.shape[:-2]:
            continue
        if len(both.shape) == 3 and not _fit(both, down):  # of Llama 4: stored as (inputs, outputs)
            both, down = _transposed(both), _transposed(down)
        if not _fit(both, down):
            continue
        yield down.place, Views({"": down.view})
        if has(module, f"{name}_bias"):  # of gpt-oss
            yield both.place, Views({"": both.view}, f"`{name}` {_INTERLEAVED}")
        else:
            size = both.rows // 2
            yield both.place, Views(_blocks({"gate": size, "up": size}, both.view))


def _fit(both: Projection, down: Projection) -> bool:
    return both.rows == 2 * down.columns and both.columns == down.rows


def _transposed(one: Projection) -> Projection:
    return replace(one, view=Transposed(), shape=(*one.shape[:-2], one.columns, one.rows))


def fused_in(module: Module) -> Iterator[tuple[Place, Views]]:
    """The tensors of a module that hold several matrices, or stay whole with a note."""
    yield from _of_gated(module)
    try:
        cut = cut_of_attention(module)
    except Unknown as why:
        for name in _QKV:
            if has(module, name):
                yield from _whole(module, name, str(why))
        return
    if cut is not None:
        yield cut.whole.place, cut.views()
        if isinstance(cut.whole.view, Transposed):
            out = projection(module, cut.output)
            yield out.place, Views({"": out.view})


def _whole(module: Module, name: str, why: str) -> Iterator[tuple[Place, Views]]:
    try:
        whole = projection(module, name)
    except Unknown:
        return
    if len(whole.shape) == 2:
        yield whole.place, Views({"": whole.view}, why)


def fused_projections(model: nn.Module) -> dict[Place, Views]:
    """The parameters of a model that hold several matrices."""
    return {place: views for module in model.modules() for place, views in fused_in(module)}


def views_by_name(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> dict[str, Views]:
    """The matrices in the tensors of a file, by the names of the tensors.

    Args:
        shapes: of all its tensors.
        config: what config.json says; empty if there is none.
    """
    found: dict[str, Views] = {}
    for module in stored_modules(shapes, config).values():
        for layer in module.parts.values():
            if isinstance(layer, StoredTensor) and isinstance(layer.view, Transposed):
                found[layer.name] = Views({"": layer.view})
        found |= {name: views for (_, name), views in fused_in(module)}
        found |= dict(_of_recurrent(module))
    return {name: found.get(name) or Views(*view_by_shape(name, shapes)) for name in shapes}


def _of_recurrent(module: Stored) -> Iterator[tuple[str, Views]]:
    """The gates of an LSTM or a GRU of torch, or of their cells."""
    layers = {name: one for name, one in module.parts.items() if isinstance(one, StoredTensor)}
    for name, hidden in layers.items():
        kind, _, suffix = name.partition("weight_hh")
        given = layers.get(f"weight_ih{suffix}")
        if kind or given is None or not len(given.shape) == len(hidden.shape) == 2:
            continue
        projected = layers.get(f"weight_hr{suffix}")
        size = hidden.shape[1] if projected is None else projected.shape[-1]
        gates, rest = divmod(hidden.shape[0], max(size, 1))
        if rest or gates not in GATES or given.shape[0] != hidden.shape[0]:
            continue
        for one in (given, hidden):
            yield one.name, Views(equal_blocks(GATES[gates], hidden.shape[0]))
