"""Which heads of attention a model holds, and the two linear maps that each of them is.

Of head h, W_Q,h^T W_K,h (`qk3` of head 3) is the form by which it compares two inputs, and
W_O,h W_V,h (`vo3`) what it carries from one to the other. Left out are biases, the factor
1/sqrt(d), and what is not linear; a note says what stands in between.

A module is known by its attributes and its numbers, not by its class: three projections for query,
key and value by one of some names, or a fused one, and an output projection (see `fused`). Where a
number is missing, or does not fit the matrices, there are no heads, but the reason. Of a file the
names of its tensors are those of the modules, and the numbers are those of the config.json beside
it.

Letters: H heads of d rows each; G of them for keys and values, and H/G queries to one of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from wellcond.operators.product import Product
from wellcond.operators.views import STORED, Part, View
from wellcond.text import joined
from wellcond.weights.fused import Cut, cut_of_attention
from wellcond.weights.projections import (
    HEADS,
    Module,
    Place,
    Projection,
    Stored,
    Unknown,
    has,
    number,
    part,
    projection,
    said,
    stored_modules,
)

# The value of a tensor at a `Place`.
Value = Callable[[Any, str], Tensor]

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),  # of DistilBERT
    ("q", "k", "v"),  # of T5
)
_OUTPUT = ("o_proj", "out_proj", "dense", "out_lin", "o", "proj")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_heads")
_SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_SIZE_CONFIG = ("head_dim", "d_kv")
# What the heads share; the second Qwen-VL says another width as hidden_size.
_WIDTH = ("embed_dim", "hidden_size")
# Whose heads are no comparisons of tokens: XCiT and EdgeNeXt, whose attention is over channels, and
# CaiT, which mixes heads; DaViT and CoaT by their classes.
_OTHER_ATTENTION = ("temperature", "proj_l")
_OTHER_CLASSES = ("Channel", "Factor")
_NORMS = ("q_norm", "k_norm", "query_norm", "q_layernorm", "norm_q", "norm_k", "q_ln")
_BETWEEN = ("v_norm", "sub_norm", "inner_attn_ln", "attn_sub_norm")
_BETWEEN_OF_TIMM = ("norm", "gate")  # elsewhere these may stand before the projections
_POOLED = ("pool_q", "pool_k"), ("pool_v",)  # of MViT: for comparing, and for carrying
_ROTATED = ("rotary_emb", "rotary_ndims", "rotary_dim", "rope")
_ROTATED_CONFIG = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim")


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
    """

    name: str
    heads: list[Head] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

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


def heads_by_name(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> list[Attention]:
    """The heads in a file of tensors of these shapes; the second of a `Place` is a tensor's name.

    Args:
        shapes: of the tensors that can be read.
        config: what config.json says; without it there are no heads, but reasons.
    """
    modules = stored_modules(shapes, config)
    found: list[Attention] = []
    for path, module in modules.items():
        beside = Stored(path, config)
        output = modules.get(f"{path.rpartition('.')[0]}.output")
        if output is not None:
            beside.parts["output"] = output
        found += _attention(path, module, beside)
    if not config:
        more = "there is no config.json beside it that says more"
        for attention in found:
            for view, why in attention.unknown.items():
                attention.unknown[view] = f"{why}; {more}"
    return found


@dataclass(frozen=True)
class _Rows:
    """Of a projection the rows with which each head begins; `step` lie between those of two."""

    place: Place
    view: View
    starts: tuple[int, ...]

    def block(self, head: int, size: int) -> Block:
        return Block(self.place, Part(self.view, self.starts[head], size))


@dataclass(frozen=True)
class _Layout:
    """Where the projections of a module are; `output` has so many columns a head."""

    q: _Rows
    k: _Rows
    v: _Rows
    output: Projection | str  # or why it is not known
    size: int  # d
    value_size: int
    note: str = ""


def _attention(name: str, module: Module, parent: Module | None) -> list[Attention]:
    """One, or none if the module is nothing that is known."""
    try:
        layout = _layout(module, parent)
    except Unknown as why:
        return [Attention(name, unknown={"heads": str(why)})]
    if layout is None:
        return []
    H, G = len(layout.q.starts), len(layout.k.starts)
    heads, unknown = [], {}
    for h in range(H):
        g = h // (H // G)
        shared = f"keys of head {g} of {G}" if G < H else ""
        note = joined(shared, layout.note, _of_comparing(module))
        left, right = layout.q.block(h, layout.size), layout.k.block(g, layout.size)
        heads.append(Head(f"qk{h}", left, right, note))
    if isinstance(layout.output, str):
        unknown["vo"] = layout.output
    else:
        for h in range(H):
            g, size = h // (H // G), layout.value_size
            shared = f"values of head {g} of {G}" if G < H else ""
            view = Part(layout.output.view, h * size, size, dim=-1)
            note = joined(shared, layout.note, _of_carrying(module))
            out = Block(layout.output.place, view)
            heads.append(Head(f"vo{h}", out, layout.v.block(g, size), note))
    return [Attention(name, heads, unknown)]


def _layout(module: Module, parent: Module | None) -> _Layout | None:
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module)
    for names in _SEPARATE:
        if all(has(module, name) for name in names):
            return _separate(module, parent, names)
    cut = cut_of_attention(module)
    return None if cut is None else _fused(module, cut)


def _each(place: Place, view: View, heads: int, size: int, start: int = 0) -> _Rows:
    """Heads one after the other."""
    return _Rows(place, view, tuple(start + h * size for h in range(heads)))


def _of_torch(module: nn.MultiheadAttention) -> _Layout:
    H, E = module.num_heads, module.embed_dim
    d = E // H
    if module._qkv_same_embed_dim:
        place = (module, "in_proj_weight")
        q, k, v = (_each(place, STORED, H, d, i * E) for i in range(3))
    else:
        q, k, v = (_each((module, f"{name}_proj_weight"), STORED, H, d) for name in "qkv")
    return _Layout(q, k, v, projection(module, "out_proj"), d, d)


def _separate(module: Module, parent: Module | None, names: tuple[str, ...]) -> _Layout:
    given = [_matrix(module, name) for name in names]
    H, G, d = _numbers(module, given[0].rows, given[1].rows, names[0])
    size, rest = divmod(given[2].rows, G)
    if rest:
        raise Unknown(f"the {given[2].rows} rows of `{names[2]}` are no {G} heads")
    owner: object = module
    known = [name for name in _OUTPUT if has(module, name)]
    if not known and parent is not None:  # BertSelfOutput stands beside BertSelfAttention
        owner, known = part(parent, "output"), ["dense"]
    output: Projection | str = "its output projection is not known"
    if isinstance(owner, Module) and known and has(owner, known[0]):
        try:
            output = _output(owner, known[0], H * size)
        except Unknown as why:
            output = str(why)
    there = [*given, output] if isinstance(output, Projection) else given
    sizes = ((H, d), (G, d), (G, size))
    q, k, v = (_each(p.place, p.view, *n) for p, n in zip(given, sizes, strict=True))
    return _Layout(q, k, v, output, d, size, _adapted(*there))


def _fused(module: Module, cut: Cut) -> _Layout:
    kind = type(module).__name__
    named = any(word in kind for word in _OTHER_CLASSES)
    if named or any(getattr(module, name, None) is not None for name in _OTHER_ATTENTION):
        raise Unknown(f"heads of a {kind} do not compare one token with another")
    whole, output = cut.whole, projection(module, cut.output)
    queries = cut.sizes.get("q", output.columns)
    H, G, d = _numbers(module, queries, cut.sizes["k"], cut.name)
    if cut.by_head:
        n = H // G  # of a group of heads n are for queries, then there is one key and one value
        group = (n + 2) * d
        starts = (
            tuple(h // n * group + h % n * d for h in range(H)),
            *(tuple(g * group + (n + i) * d for g in range(G)) for i in range(2)),
        )
        note = f"`{cut.name}` taken as query, key and value of one head after the other"
        if G < H:
            note = f"`{cut.name}` taken as {n} queries, key and value of one group after the other"
        q, k, v = (_Rows(whole.place, whole.view, one) for one in starts)
    else:
        views = cut.views().views
        count = {"q": H, "k": G, "v": G}
        parts = {name: _each(whole.place, view, count[name], d) for name, view in views.items()}
        if "q" not in parts:
            other = _matrix(module, "q_attn")
            parts["q"] = _each(other.place, other.view, H, d)
        note = f"`{cut.name}` taken as {', '.join(views)}"
        q, k, v = (parts[name] for name in "qkv")
    return _Layout(q, k, v, output, d, d, joined(note, _adapted(whole, output)))


def _adapted(*projections: Projection) -> str:
    return "without what PEFT adds to them" if any(one.adapted for one in projections) else ""


def _matrix(module: Module, name: str) -> Projection:
    found = projection(module, name)
    if len(found.shape) != 2:
        raise Unknown(f"`{name}` is no matrix")
    return found


def _output(module: Module, name: str, width: int) -> Projection:
    found = _matrix(module, name)
    if found.columns != width:
        columns = found.columns
        raise Unknown(f"the {columns} columns of `{name}` are not the {width} rows of the values")
    return found


def _numbers(module: Module, queries: int, keys: int, name: str) -> tuple[int, int, int]:
    """H, G and d, of so many rows of queries and keys."""
    config = getattr(module, "config", None)
    H = number(module, HEADS) or number(config, HEADS)
    if H is None:
        raise Unknown("how many heads it has is not known")
    size = number(module, _SIZE) or number(config, _SIZE_CONFIG)
    if size is None and (width := number(config, _WIDTH)):
        size = width // H  # as every model of the transformers library has it
    d = size or queries // H
    if H * d != queries:
        each = f"of {size} " if size else ""
        raise Unknown(f"the {queries} rows of its queries in `{name}` are no {H} heads {each}each")
    groups = number(module, ("num_key_value_groups",))
    G = number(module, _KEY_HEADS) or (H // groups if groups else number(config, _KEY_HEADS))
    if said(module, "multi_query") and not said(module, "new_decoder_architecture"):
        G = 1
    if G is None:
        if keys != queries:
            raise Unknown("how many heads its keys have is not known")
        G = H
    if G * d != keys or H % G:
        raise Unknown(f"the {keys} rows of its keys are no {G} heads of {d} for {H} of queries")
    return H, G, d


def _of_comparing(module: Module) -> str:
    rotation = "without the rotation by position (RoPE)" if _rotated(module) else ""
    if isinstance(module, Stored) and not rotation:  # an old config may not say so
        rotation = "without a rotation by position, if there is one"
    normed = _acts(module, _NORMS)
    if has(module, "logit_scale"):  # of the cosines in the second Swin
        normed = "logit_scale"
    pooled = _acts(module, _POOLED[0])
    return joined(
        rotation,
        f"without `{pooled}`, which stands between" if pooled else "",
        f"without the norms of queries and keys (`{normed}`)" if normed else "",
    )


def _of_carrying(module: Module) -> str:
    names = _POOLED[1] + _BETWEEN + (_BETWEEN_OF_TIMM if has(module, "qkv") else ())
    between = _acts(module, names)
    return f"without `{between}`, which stands between" if between else ""


def _acts(module: Module, names: tuple[str, ...]) -> str | None:
    """The first of these that is there, and more than a placeholder."""
    there = ((name, part(module, name)) for name in names)
    return next((n for n, one in there if one is not None and type(one) is not nn.Identity), None)


def _rotated(module: Module) -> bool:
    """Whether positions rotate queries and keys, as far as the module or its config says."""
    if not getattr(module, "use_rope", True):  # single layers of SmolLM3
        return False
    config = getattr(module, "config", None)
    if getattr(config, "alibi", False):  # of Falcon, beside numbers of a rotation
        return False
    by_config = any(getattr(config, name, None) for name in _ROTATED_CONFIG)
    here = any(getattr(module, name, None) is not None for name in _ROTATED)
    return by_config or here or (isinstance(module, nn.Module) and _rotates(module))


def _rotates(module: nn.Module) -> bool:
    """Whether its own code speaks of a rotation, or it takes one."""
    forward = inspect.unwrap(module.forward)
    code = getattr(forward, "__code__", None)
    given = inspect.signature(forward).parameters
    return "rope" in given or (code is not None and any("rotary" in n for n in code.co_names))
