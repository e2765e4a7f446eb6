"""The attention heads in a model or a file, and the two linear maps of each head.

For head h, W_Q,h^T W_K,h (`qk3` for head 3) is the bilinear form that compares two inputs, and
W_O,h W_V,h (`vo3`) maps one input to the output at the other. The maps omit biases, the factor
1/sqrt(d) and nonlinear layers; a note names the layers between the factors.

A module is recognised by its attributes and settings, not by its class (see `architectures`). If a
setting is missing or contradicts the matrices, there is a reason instead of heads. For a file the
attributes are the names of its tensors, and config.json in its folder has the settings.

Letters: H query heads of d rows each; G heads for keys and values, each for H/G queries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from wellcond.linalg.product import Product
from wellcond.operators.views import STORED, Part, View
from wellcond.text import join_remarks
from wellcond.weights import architectures as arch
from wellcond.weights.fused import Cut, cut_attention
from wellcond.weights.projections import (
    Module,
    Place,
    Projection,
    StoredModule,
    UnknownLayoutError,
    find_stored_modules,
    get_part,
    get_projection,
    has_part,
    read_count,
    read_setting,
)

# The value of a tensor at a `Place`.
Value = Callable[[Any, str], Tensor]
# The place of a tensor, and the view of the rows or columns of one head.
Factor = tuple[Place, View]


@dataclass(frozen=True)
class Head:
    """One of the two maps of a head: its view name, its factors and a note."""

    view: str
    left: Factor
    right: Factor
    note: str = ""


@dataclass(frozen=True)
class Attention:
    """The heads of one module.

    Attributes:
        name: the name of the module.
        heads: the "qk" map of each head, then the "vo" map of each head.
        unknown: why maps are missing, by view: "qk", "vo", or "heads" for both.
    """

    name: str
    heads: list[Head] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    def names(self, view: str) -> tuple[str, ...]:
        """The names that a pattern can match: that of the module and that of the row."""
        return (self.name, f"{self.name}:{view}") if self.name else (view,)

    def products(
        self, value: Value, wanted: Callable[[str], bool]
    ) -> Iterator[tuple[Head, Product]]:
        """The maps of the wanted views. Each parameter is read once."""
        read: dict[Place, Tensor] = {}
        for head in self.heads:
            if not wanted(head.view):
                continue
            for place, _ in (head.left, head.right):
                if place not in read:
                    read[place] = value(*place)
            left, right = (view(read[place]) for place, view in (head.left, head.right))
            yield head, Product(left.mT if head.view.startswith("qk") else left, right.mT)


def find_heads(model: nn.Module, wrapped: tuple[str, ...] = ()) -> list[Attention]:
    """All modules of a model that are recognised as attention.

    Args:
        model: the model.
        wrapped: the names of wrapper modules, which paths omit.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        parts = path.split(".")
        name = ".".join(part for part in parts if part not in wrapped)
        while parts and parts[-1] in wrapped:
            parts.pop()
        parent = modules.get(".".join(parts[:-1])) if path else None
        found += _find_attention(name, module, parent)
    return found


def find_heads_in_file(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> list[Attention]:
    """The heads in a file; the second element of a `Place` is the name of a tensor.

    Args:
        shapes: the shapes of the tensors that can be read, by name.
        config: the content of config.json; if it is empty there are reasons instead of heads.
    """
    modules = find_stored_modules(shapes, config)
    found: list[Attention] = []
    for path, module in modules.items():
        parent = StoredModule(path, config)
        output = modules.get(f"{path.rpartition('.')[0]}.output")
        if output is not None:
            parent.parts["output"] = output
        found += _find_attention(path, module, parent)
    if not config:
        for attention in found:
            for view, why in attention.unknown.items():
                attention.unknown[view] = f"{why}; there is no config.json in its folder"
    return found


class _Slices(NamedTuple):
    """The rows of a projection that belong to each head, or the columns if `dim` is -1."""

    projection: Projection
    size: int
    starts: tuple[int, ...]
    dim: int = -2

    def factor(self, head: int) -> Factor:
        view = Part(self.projection.view, self.starts[head], self.size, self.dim)
        return self.projection.place, view


def _slice(projection: Projection, heads: int, size: int, start: int = 0, dim: int = -2) -> _Slices:
    """The slices of heads that are stored one after another."""
    return _Slices(projection, size, tuple(start + h * size for h in range(heads)), dim)


class _Layout(NamedTuple):
    """The slices of query, key, value and output of each head, or why the output is unknown."""

    q: _Slices
    k: _Slices
    v: _Slices
    output: _Slices | str
    note: str = ""


def _find_attention(name: str, module: Module, parent: Module | None) -> list[Attention]:
    """The module as attention; [] if it is not recognised."""
    try:
        layout = _find_layout(module, parent)
    except UnknownLayoutError as why:
        return [Attention(name, unknown={"heads": str(why)})]
    if layout is None:
        return []
    *inputs, output, note = layout
    slices = inputs if isinstance(output, str) else [*inputs, output]
    if any(one.projection.adapted for one in slices):
        note = join_remarks(note, "without what PEFT adds to the projections")
    compared = join_remarks(note, _describe_not_compared(module))
    heads = _pair("qk", layout.q, layout.k, "keys", compared)
    if isinstance(output, str):
        return [Attention(name, heads, {"vo": output})]
    carried = join_remarks(note, _describe_not_carried(module))
    return [Attention(name, heads + _pair("vo", output, layout.v, "values", carried))]


def _pair(kind: str, left: _Slices, right: _Slices, shared: str, note: str) -> list[Head]:
    """One map per head; several heads can share their right factor."""
    heads = []
    H, G = len(left.starts), len(right.starts)
    for h in range(H):
        g = h // (H // G)
        of_group = f"{shared} of head {g} of {G}" if G < H else ""
        heads.append(
            Head(f"{kind}{h}", left.factor(h), right.factor(g), join_remarks(of_group, note))
        )
    return heads


def _find_layout(module: Module, parent: Module | None) -> _Layout | None:
    if isinstance(module, nn.MultiheadAttention):
        return _layout_of_torch(module)
    for names in arch.SEPARATE:
        if all(has_part(module, name) for name in names):
            return _layout_of_separate(module, parent, names)
    cut = cut_attention(module)
    return None if cut is None else _layout_of_fused(module, cut)


def _layout_of_torch(module: nn.MultiheadAttention) -> _Layout:
    H, E = module.num_heads, module.embed_dim
    d = E // H
    if module._qkv_same_embed_dim:
        whole = Projection((module, "in_proj_weight"), STORED, (3 * E, E))
        q, k, v = (_slice(whole, H, d, i * E) for i in range(3))
    else:
        widths = {"q": E, "k": module.kdim, "v": module.vdim}
        q, k, v = (
            _slice(Projection((module, f"{x}_proj_weight"), STORED, (E, width)), H, d)
            for x, width in widths.items()
        )
    return _Layout(q, k, v, _slice(get_projection(module, "out_proj"), H, d, dim=-1))


def _layout_of_separate(module: Module, parent: Module | None, names: tuple[str, ...]) -> _Layout:
    query, key, value = (get_projection(module, name, ndim=2) for name in names)
    H, G, d = _count_heads(module, query.rows, key.rows, names[0])
    size, rest = divmod(value.rows, G)
    if rest:
        raise UnknownLayoutError(f"the {value.rows} rows of `{names[2]}` are not {G} heads")
    output: _Slices | str
    try:
        output = _slice(_find_output(module, parent, H * size), H, size, dim=-1)
    except UnknownLayoutError as why:
        output = str(why)
    return _Layout(_slice(query, H, d), _slice(key, G, d), _slice(value, G, size), output)


def _find_output(module: Module, parent: Module | None, width: int) -> Projection:
    """The output projection in a module, or in its sibling `output` as in BERT."""
    owner: object = module
    names = [name for name in arch.OUTPUTS if has_part(module, name)]
    if not names and parent is not None:
        owner, names = get_part(parent, "output"), ["dense"]
    if not (isinstance(owner, Module) and names and has_part(owner, names[0])):
        raise UnknownLayoutError("its output projection is unknown")
    found = get_projection(owner, names[0], ndim=2)
    if found.columns != width:
        raise UnknownLayoutError(
            f"the {found.columns} columns of `{names[0]}` are not the {width} rows of the values"
        )
    return found


def _layout_of_fused(module: Module, cut: Cut) -> _Layout:
    kind = type(module).__name__
    other_attention = any(word in kind for word in arch.NO_TOKENS_CLASSES) or any(
        getattr(module, name, None) is not None for name in arch.NO_TOKENS
    )
    if other_attention:
        raise UnknownLayoutError(f"heads of a {kind} do not compare one token with another")
    whole, output = cut.whole, get_projection(module, cut.output)
    queries, keys = cut.sizes.get("q", output.columns), cut.sizes["k"]
    H, G, d = _count_heads(module, queries, keys, cut.name)
    if cut.by_head:
        n = H // G  # each group has n queries, one key and one value
        group = (n + 2) * d
        q = _Slices(whole, d, tuple(h // n * group + h % n * d for h in range(H)))
        k, v = (
            _Slices(whole, d, tuple(g * group + (n + i) * d for g in range(G))) for i in range(2)
        )
        order = "query, key and value of one head after the other"
        if G < H:
            order = f"{n} queries, key and value of one group after the other"
    else:
        has_q = "q" in cut.sizes
        q = _slice(whole if has_q else get_projection(module, "q_attn", ndim=2), H, d)
        first = queries if has_q else 0
        k, v = (_slice(whole, G, d, first + i * keys) for i in range(2))
        order = ", ".join(cut.sizes)
    return _Layout(q, k, v, _slice(output, H, d, dim=-1), f"`{cut.name}` read as {order}")


def _count_heads(module: Module, queries: int, keys: int, name: str) -> tuple[int, int, int]:
    """H, G and d, for these numbers of rows of queries and keys."""
    config = getattr(module, "config", None)
    H = read_count(module, arch.HEADS) or read_count(config, arch.HEADS)
    if H is None:
        raise UnknownLayoutError("the number of its heads is unknown")
    size = read_count(module, arch.SIZE) or read_count(config, arch.SIZE_IN_CONFIG)
    if size is None and (width := read_count(config, arch.WIDTH)):
        size = width // H  # as in every model of the transformers library
    d = size or queries // H
    if H * d != queries:
        of_size = f" of {size} rows" if size else ""
        raise UnknownLayoutError(
            f"the {queries} rows of its queries in `{name}` are not {H} equal heads{of_size}"
        )
    groups = read_count(module, ("num_key_value_groups",))
    G = read_count(module, arch.KEY_HEADS)
    G = G or (H // groups if groups else read_count(config, arch.KEY_HEADS))
    if read_setting(module, "multi_query") and not read_setting(module, "new_decoder_architecture"):
        G = 1
    if G is None:
        if keys != queries:
            raise UnknownLayoutError("the number of its key heads is unknown")
        G = H
    if G * d != keys or H % G:
        raise UnknownLayoutError(
            f"the {keys} rows of its keys are not {G} heads of {d} for {H} heads of queries"
        )
    return H, G, d


def _describe_not_compared(module: Module) -> str:
    """A remark on what a module does to queries and keys after their projections."""
    rotation = "without the rotation by position (RoPE)" if _is_rotated(module) else ""
    if isinstance(module, StoredModule) and not rotation:  # an old config may lack the setting
        rotation = "without a rotation by position, if any"
    layers = ((_find_layer(module, names), note) for names, note in arch.NOT_COMPARED)
    return join_remarks(rotation, *(note.format(layer) for layer, note in layers if layer))


def _describe_not_carried(module: Module) -> str:
    """A remark on what a module does to values after their projection."""
    names: tuple[str, ...] = arch.NOT_CARRIED
    if has_part(module, "qkv"):
        names += arch.NOT_CARRIED_IN_TIMM
    layer = _find_layer(module, names)
    return f"without `{layer}` between the two factors" if layer else ""


def _find_layer(module: Module, names: tuple[str, ...]) -> str | None:
    """The first of these names that is a part of the module and not an `nn.Identity`."""
    parts = ((name, get_part(module, name)) for name in names)
    return next((n for n, one in parts if one is not None and type(one) is not nn.Identity), None)


def _is_rotated(module: Module) -> bool:
    """Whether the module or its config indicates a rotary position embedding."""
    if not getattr(module, "use_rope", True):  # some layers of SmolLM3
        return False
    config = getattr(module, "config", None)
    if getattr(config, "alibi", False):  # Falcon, in addition to settings of a rotation
        return False
    by_config = any(getattr(config, name, None) for name in arch.ROTATED_IN_CONFIG)
    here = any(getattr(module, name, None) is not None for name in arch.ROTATED)
    return by_config or here or (isinstance(module, nn.Module) and _mentions_rotation(module))


def _mentions_rotation(module: nn.Module) -> bool:
    """Whether the code of its `forward` names a rotation, or takes one as an argument."""
    forward = inspect.unwrap(module.forward)
    code = getattr(forward, "__code__", None)
    arguments = inspect.signature(forward).parameters
    return "rope" in arguments or (
        code is not None and any("rotary" in name for name in code.co_names)
    )
