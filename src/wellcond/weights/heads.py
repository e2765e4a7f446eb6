"""Which heads of attention a model holds, and the two linear maps that each of them is.

Of head h, W_Q,h^T W_K,h (`qk3` of head 3) is the form by which it compares two inputs, and
W_O,h W_V,h (`vo3`) what it carries from one to the other. Left out are biases, the factor
1/sqrt(d), and what is not linear; a note says what stands in between.

A module is known by its attributes and its numbers, not by its class: q_proj, k_proj, v_proj with
o_proj or out_proj; query, key, value with a dense after them; qkv with proj; c_attn with c_proj;
query_key_value with dense; and torch's MultiheadAttention. Where a number is missing, or does not
fit the matrices, there are no heads, but the reason. Of a file the names of its tensors are those
of the modules, and the numbers are those of the config.json beside it.

Letters: H heads of d rows each; G of them for keys and values, and H/G queries to one of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

from torch import Tensor, nn

from wellcond.operators.product import Product
from wellcond.operators.views import STORED, Part, Transposed, View

# The value of a parameter: of this module, by this name.
Value = Callable[[nn.Module, str], Tensor]

# Where a projection is read from.
Place = tuple[nn.Module, str]

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_FUSED = (("qkv", "proj"), ("c_attn", "c_proj"), ("query_key_value", "dense"))
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_SIZE = ("head_dim", "attention_head_size", "head_size")
# What only modules have whose rows are cut otherwise: TinyViT and EfficientFormer, whose values are
# larger; Falcon and GPTBigCode, by a setting.
_OTHERWISE = ("key_dim", "new_decoder_architecture", "multi_query")
# Whose heads are no comparisons of tokens: XCiT and EdgeNeXt, whose attention is over channels, and
# CaiT, which mixes heads; DaViT and CoaT by their classes.
_OTHER_ATTENTION = ("temperature", "proj_l")
_OTHER_CLASSES = ("Channel", "Factor")
_NORMS = ("q_norm", "k_norm", "query_norm", "q_layernorm", "norm_q", "norm_k", "q_ln")
_BETWEEN = ("v_norm", "sub_norm", "inner_attn_ln", "attn_sub_norm")
_BETWEEN_OF_TIMM = ("norm", "gate")  # elsewhere these may stand before the projections
_ROTATED = ("rotary_emb", "rotary_ndims", "rotary_dim", "rope")
_ROTATED_CONFIG = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim")


class _Unknown(Exception):
    """Why heads are not known."""


@dataclass(frozen=True)
class Block:
    """The rows, or of the output the columns, of a projection that belong to one head."""

    place: Place
    view: View


@dataclass(frozen=True)
class Head:
    """One of the two maps of a head: `view` is its name, `note` what is to be known of it."""

    view: str
    left: Block
    right: Block
    note: str = ""


@dataclass(frozen=True)
class Attention:
    """The heads of one module.

    Attributes:
        name: of the module.
        heads: of the first head what it compares, of all others, then what they carry.
        unknown: by their view, "qk", "vo" or "heads" for both, why some are not here.
        fused: for a parameter that holds several projections the blocks of rows that they are.
    """

    name: str
    heads: list[Head] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    fused: dict[Place, dict[str, View]] = field(default_factory=dict)

    def names(self, view: str) -> tuple[str, ...]:
        """What a pattern may match: the name of the module, and that of one of its rows."""
        return (self.name, f"{self.name}:{view}") if self.name else (view,)

    def products(
        self, value: Value, wanted: Callable[[str], bool]
    ) -> Iterator[tuple[Head, Product]]:
        """The maps that are wanted; every parameter is read once."""
        read: dict[Place, Tensor] = {}
        for head in self.heads:
            if not wanted(head.view):
                continue
            for block in (head.left, head.right):
                if block.place not in read:
                    read[block.place] = value(*block.place)
            left, right = (block.view(read[block.place]) for block in (head.left, head.right))
            yield head, Product(left.mT if head.view.startswith("qk") else left, right.mT)


def find_heads(model: nn.Module, wrapped: tuple[str, ...] = ()) -> list[Attention]:
    """All modules of a model that are known to be attention.

    `wrapped` are names of modules that hold another, and no part of a path.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        parts = path.split(".")
        name = ".".join(part for part in parts if part not in wrapped)
        while parts and parts[-1] in wrapped:
            parts.pop()
        parent = modules.get(".".join(parts[:-1])) if path else None
        found += _attention(name, module, parent)
    return found


class _Stored(nn.Module):
    """What the names of a file say of a module."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


class _Tensor(nn.Module):
    """What a file says of a Linear: the name of its weight, and the shape."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.view: View = STORED

    def transpose(self) -> None:
        self.shape, self.view = self.shape[::-1], Transposed()


def heads_by_name(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> list[Attention]:
    """The heads in a file of tensors of these shapes; the second of a `Place` is a tensor's name.

    Args:
        shapes: of the tensors that can be read.
        config: what config.json says; without it there are no heads, but reasons.
    """
    modules: dict[str, _Stored] = {}
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        above, _, child = path.rpartition(".")
        if own == "weight":
            if above not in modules:
                modules[above] = _Stored(config)
            modules[above]._modules[child] = _Tensor(name, shape)
    found: list[Attention] = []
    for path, module in modules.items():
        fused = module._modules.get("c_attn")
        if isinstance(fused, _Tensor) and fused.shape[0] < fused.shape[-1]:  # of GPT-2: (in, out)
            for child in ("c_attn", "c_proj", "q_attn"):
                if isinstance(tensor := module._modules.get(child), _Tensor):
                    tensor.transpose()
        parent = _Stored(config)
        parent._modules["output"] = modules.get(f"{path.rpartition('.')[0]}.output")
        found += _attention(path, module, parent)
    if not config:
        more = "there is no config.json beside it that says more"
        for attention in found:
            for view, why in attention.unknown.items():
                attention.unknown[view] = f"{why}; {more}"
    return found


def fused_projections(model: nn.Module) -> dict[Place, dict[str, View]]:
    """The parameters that hold query, key and value, and which rows these are."""
    places = (attention.fused for attention in find_heads(model))
    return {place: views for one in places for place, views in one.items()}


@dataclass(frozen=True)
class _Rows:
    """A projection with `count` rows of which those of head h begin at start + h step."""

    place: Place
    view: View
    count: int
    start: int = 0
    step: int = 0  # as many as a head has

    def block(self, head: int, size: int) -> Block:
        start = self.start + head * (self.step or size)
        return Block(self.place, Part(self.view, start, size))


@dataclass(frozen=True)
class _Layout:
    """Where the projections of a module are; `output` has a row an output, `width` columns."""

    q: _Rows
    k: _Rows
    v: _Rows
    output: tuple[Place, View, int] | str  # or why it is not known
    numbers: tuple[int, int, int]  # H, G, d
    value_size: int
    note: str = ""
    fused: Mapping[Place, dict[str, View]] = field(default_factory=dict)


def _attention(name: str, module: nn.Module, parent: nn.Module | None) -> list[Attention]:
    """One, or none if the module is nothing that is known."""
    try:
        layout = _layout(module, parent)
    except _Unknown as why:
        return [Attention(name, unknown={"heads": str(why)})]
    if layout is None:
        return []
    H, G, d = layout.numbers
    heads, unknown = [], {}
    for h in range(H):
        g = h // (H // G)
        shared = f"keys of head {g} of {G}" if G < H else ""
        note = _joined(shared, layout.note, _of_comparing(module))
        heads.append(Head(f"qk{h}", layout.q.block(h, d), layout.k.block(g, d), note))
    if isinstance(layout.output, str):
        unknown["vo"] = layout.output
    else:
        place, view, _ = layout.output
        for h in range(H):
            g, size = h // (H // G), layout.value_size
            shared = f"values of head {g} of {G}" if G < H else ""
            out = Block(place, Part(view, h * size, size, dim=-1))
            note = _joined(shared, layout.note, _of_carrying(module))
            heads.append(Head(f"vo{h}", out, layout.v.block(g, size), note))
    return [Attention(name, heads, unknown, dict(layout.fused))]


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _layout(module: nn.Module, parent: nn.Module | None) -> _Layout | None:
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module)
    children = module._modules
    for names in _SEPARATE:
        if all(children.get(name) is not None for name in names):
            return _separate(module, parent, names)
    for fused, output in _FUSED:
        if children.get(fused) is not None and children.get(output) is not None:
            return _fused(module, fused, output)
    return None


def _of_torch(module: nn.MultiheadAttention) -> _Layout:
    H, E = module.num_heads, module.embed_dim
    if module._qkv_same_embed_dim:
        place = (module, "in_proj_weight")
        q, k, v = (_Rows(place, STORED, E, i * E) for i in range(3))
    else:
        q, k, v = (_Rows((module, f"{name}_proj_weight"), STORED, E) for name in "qkv")
    output = _projection(module, "out_proj")
    return _Layout(q, k, v, (output.place, output.view, E), (H, H, E // H), E // H)


def _separate(module: nn.Module, parent: nn.Module | None, names: tuple[str, ...]) -> _Layout:
    q, k, v = (_projection(module, name) for name in names)
    H, G, d = _numbers(module, q.count, k.count, names[0])
    size, rest = divmod(v.count, G)
    if rest:
        raise _Unknown(f"the {v.count} rows of `{names[2]}` are no {G} heads")
    owner: nn.Module | None = module
    known = [name for name in ("o_proj", "out_proj", "dense") if module._modules.get(name)]
    if not known and parent is not None:  # BertSelfOutput stands beside BertSelfAttention
        owner, known = parent._modules.get("output"), ["dense"]
    output: tuple[Place, View, int] | str = "its output projection is not known"
    if owner is not None and known and owner._modules.get(known[0]) is not None:
        try:
            output = _output(owner, known[0], H * size)
        except _Unknown as why:
            output = str(why)
    return _Layout(q, k, v, output, (H, G, d), size)


def _fused(module: nn.Module, fused: str, output: str) -> _Layout:
    whole = _projection(module, fused)
    holders = (module, getattr(module, "config", None))
    other = [n for n in _OTHERWISE if any(getattr(one, n, None) is not None for one in holders)]
    if other:
        raise _Unknown(f"`{other[0]}` says that its `{fused}` is cut in a way that is not known")
    kind = type(module).__name__
    named = any(word in kind for word in _OTHER_CLASSES)
    if named or any(getattr(module, name, None) is not None for name in _OTHER_ATTENTION):
        raise _Unknown(f"heads of a {kind} do not compare one token with another")
    cross = "q_attn" in module._modules  # of GPT-2, whose c_attn has the keys and values of another
    rows, rest = divmod(whole.count, 2 if cross else 3)
    if rest:
        raise _Unknown(f"the {whole.count} rows of `{fused}` are no three equal blocks")
    H, G, d = _numbers(module, rows, rows, fused)
    if G != H:
        raise _Unknown(f"{G} heads for keys are said, but `{fused}` has as many as for queries")
    views: dict[str, View] = {}
    if fused == "query_key_value" or getattr(module, "head_first", False):
        parts = [_Rows(whole.place, whole.view, rows, i * d, 3 * d) for i in range(3)]
        note = f"`{fused}` taken as query, key and value of one head after the other"
    else:
        kept = "kv" if cross else "qkv"
        views = {one: Part(whole.view, i * rows, rows) for i, one in enumerate(kept)}
        parts = [_Rows(whole.place, whole.view, rows, i * rows) for i in range(len(kept))]
        note = f"`{fused}` taken as {', '.join(kept)}"
        if cross:
            parts.insert(0, _projection(module, "q_attn"))
    q, k, v = parts
    fits = {whole.place: views} if views else {}
    return _Layout(q, k, v, _output(module, output, H * d), (H, G, d), d, note, fits)


def _projection(module: nn.Module, name: str) -> _Rows:
    """One that is a Linear, or a Conv1D of the transformers library, by what it says of itself."""
    layer = module._modules[name]
    if isinstance(layer, _Tensor):
        if len(layer.shape) != 2:
            raise _Unknown(f"`{name}` is no matrix")
        return _Rows((layer, layer.name), layer.view, layer.shape[0])
    if isinstance(layer, nn.Linear):
        if not layer.in_features:
            raise _Unknown(f"`{name}` is not initialised yet: run the model once first")
        return _Rows((layer, "weight"), STORED, layer.out_features)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return _Rows((layer, "weight"), Transposed(), int(layer.nf))  # type: ignore[arg-type, union-attr]
    kind = type(layer)
    raise _Unknown(f"`{name}` is no Linear, but a {kind.__name__} of {kind.__module__}")


def _output(module: nn.Module, name: str, width: int) -> tuple[Place, View, int]:
    rows = _projection(module, name)
    layer = module._modules[name]
    columns = getattr(layer, "nx", width)
    if isinstance(layer, nn.Linear | _Tensor):
        columns = layer.shape[1] if isinstance(layer, _Tensor) else layer.in_features
    if columns != width:
        raise _Unknown(f"the {columns} columns of `{name}` are not the {width} rows of the values")
    return rows.place, rows.view, width


def _numbers(module: nn.Module, queries: int, keys: int, name: str) -> tuple[int, int, int]:
    """H, G and d, of so many rows of queries and keys."""
    config = getattr(module, "config", None)
    H = _number(module, _HEADS) or _number(config, _HEADS)
    if H is None:
        raise _Unknown("how many heads it has is not known")
    said = _number(module, _SIZE) or _number(config, ("head_dim",))
    if said is None and (width := _number(config, ("hidden_size",))):
        said = width // H  # as every model of the transformers library has it
    d = said or queries // H
    if H * d != queries:
        size = f"of {said} " if said else ""
        raise _Unknown(f"the {queries} rows of its queries in `{name}` are no {H} heads {size}each")
    each = _number(module, ("num_key_value_groups",))
    G = _number(module, _KEY_HEADS) or (H // each if each else _number(config, _KEY_HEADS))
    if G is None:
        if keys != queries:
            raise _Unknown("how many heads its keys have is not known")
        G = H
    if G * d != keys or H % G:
        raise _Unknown(f"the {keys} rows of its keys are no {G} heads of {d} for {H} of queries")
    return H, G, d


def _number(holder: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((v for v in values if type(v) is int and v > 0), None)


def _of_comparing(module: nn.Module) -> str:
    rotation = "without the rotation by position (RoPE)" if _rotated(module) else ""
    if isinstance(module, _Stored) and not rotation:  # an old config may not say so
        rotation = "without a rotation by position, if there is one"
    normed = _acts(module, _NORMS)
    if "logit_scale" in module._parameters:  # of the cosines in the second Swin
        normed = "logit_scale"
    return _joined(
        rotation,
        f"without the norms of queries and keys (`{normed}`)" if normed else "",
    )


def _of_carrying(module: nn.Module) -> str:
    names = _BETWEEN + (_BETWEEN_OF_TIMM if "qkv" in module._modules else ())
    between = _acts(module, names)
    return f"without `{between}`, which stands between" if between else ""


def _acts(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of these that is there, and more than a placeholder."""
    there = ((name, module._modules.get(name)) for name in names)
    return next((n for n, one in there if one is not None and type(one) is not nn.Identity), None)


def _rotated(module: nn.Module) -> bool:
    """Whether positions rotate queries and keys, as far as the module or its config says."""
    if not getattr(module, "use_rope", True):  # single layers of SmolLM3
        return False
    config = getattr(module, "config", None)
    said = any(getattr(config, name, None) for name in _ROTATED_CONFIG)
    here = any(getattr(module, name, None) is not None for name in _ROTATED)
    return said or here or "rope" in inspect.signature(module.forward).parameters
