"""Tensors that contain several matrices, and the rows of each matrix.

These are query, key and value of attention (`qkv.weight:q`), gate and up of a gated layer or of a
stack of experts (`gate_up_proj.weight:gate`), and the gates of a recurrent cell. A name is not
sufficient: the shapes must fit the projection that takes the result, and where the order of the
rows differs between libraries, a known class or config must determine it. Rows of gate and up can
alternate. A tensor that is stored head by head or in an unknown order remains one matrix, with a
note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from wellcond.operators.views import STORED, Part, Strided, Transposed, View
from wellcond.weights.architectures import (
    FUSED,
    GATED,
    GATED_BLOCKS,
    GATED_TURNS,
    LIBRARIES,
    MODEL_TYPES,
    OTHER_ORDER,
    PERHAPS_BY_HEAD,
)
from wellcond.weights.kernels import infer_views
from wellcond.weights.projections import (
    Module,
    Place,
    Projection,
    StoredModule,
    UnknownLayoutError,
    find_stored_modules,
    get_projection,
    has_part,
    read_setting,
)

# The gates of recurrent cells of torch, by their number.
GATES = {4: "ifgo", 3: "rzn"}

_BY_HEAD = "is one matrix: it stores query, key and value interleaved by head"
_GATED_ORDER = (
    "is one matrix: no known class or model_type determines whether rows of gate and up are blocks "
    "or alternate"
)


@dataclass(frozen=True)
class Views:
    """The matrices in a tensor, by view name ("" for a single one), and a note.

    `grouped` states whether the number of groups of a kernel is known, also if it is one.
    """

    views: Mapping[str, View] = field(default_factory=lambda: {"": STORED})
    note: str = ""
    grouped: bool = False


@dataclass(frozen=True)
class Cut:
    """A fused projection of attention.

    Attributes:
        name: the name of the projection in its module.
        whole: the projection.
        output: the name of the projection that takes the values of all heads.
        sizes: the numbers of rows of "q", "k" and "v", or of the last two, in this order.
        by_head: whether all rows of one head, or of a group of heads with one key, precede those
            of the next.
    """

    name: str
    whole: Projection
    output: str
    sizes: Mapping[str, int]
    by_head: bool

    def views(self) -> Views:
        """The blocks, or the entire projection if it is stored by head or by group."""
        if self.by_head:
            return Views({"": self.whole.view}, f"`{self.name}` {_BY_HEAD}")
        return Views(_cut_rows(self.sizes, self.whole.view))


def _cut_rows(sizes: Mapping[str, int], view: View = STORED) -> dict[str, View]:
    """Consecutive blocks of rows of these sizes."""
    blocks: dict[str, View] = {}
    start = 0
    for name, size in sizes.items():
        blocks[name] = Part(view, start, size)
        start += size
    return blocks


def cut_equally(names: str, rows: int) -> dict[str, View]:
    """Consecutive blocks of equal size, one per letter."""
    return _cut_rows(dict.fromkeys(names, rows // len(names)))


def cut_attention(module: Module) -> Cut | None:
    """The layout of the fused projection of query, key and value, or None.

    Raises:
        UnknownLayoutError: there is one, but its layout is unknown.
    """
    for name, kind in FUSED.items():
        output = next((one for one in kind.outputs if has_part(module, one)), None)
        if has_part(module, name) and output is not None:
            return _cut(module, name, output)
    return None


def _cut(module: Module, name: str, output: str) -> Cut:
    whole = get_projection(module, name, ndim=2)
    width, rows = get_projection(module, output).columns, whole.rows
    _check_order(module, name)
    if name == "c_attn" and has_part(module, "q_attn"):  # cross-attention of GPT-2
        if rows != 2 * width:
            raise UnknownLayoutError(f"the {rows} rows of `{name}` are not two blocks of {width}")
        return Cut(name, whole, output, {"k": width, "v": width}, by_head=False)
    shared = read_setting(module, "multi_query")  # one key and one value for all heads
    grouped = read_setting(module, "new_decoder_architecture")  # Falcon
    each, rest = divmod(rows - width, 2)
    may_be_fewer = FUSED[name].grouped or shared or grouped
    if rest or not (each == width or (may_be_fewer and 0 < each < width)):
        raise UnknownLayoutError(
            f"the {rows} rows of `{name}` are not three blocks of {width}, the number of columns "
            f"of `{output}`"
        )
    by_head = bool(getattr(module, "head_first", False))
    if name == "query_key_value":
        by_head = bool(grouped) or not shared
    if name == "c_attn" and shared is False:  # GPTBigCode
        by_head = True
    return Cut(name, whole, output, {"q": width, "k": each, "v": each}, by_head)


def _check_order(module: Module, name: str) -> None:
    """Raises UnknownLayoutError unless the order of the rows of a fused projection is known."""
    for other in OTHER_ORDER:
        if has_part(module, other) or read_setting(module, other) is not None:
            raise UnknownLayoutError(f"`{other}` means that the order of `{name}` is unknown")
    path = module.path.split(".") if isinstance(module, StoredModule) else ()
    if any(part in PERHAPS_BY_HEAD for part in path):
        raise UnknownLayoutError(f"it is unknown whether `{name}` is stored head by head")
    falcon = ("multi_query", "new_decoder_architecture")
    if not FUSED[name].any_order or any(read_setting(module, one) is not None for one in falcon):
        return
    if isinstance(module, StoredModule):
        known = _is_known_config(module.model_config)
    else:
        kinds = type(module).__mro__
        known = any(kind.__module__.partition(".")[0] in LIBRARIES for kind in kinds)
    if not known:
        raise UnknownLayoutError(
            f"`{name}` is one matrix: no known class or model_type determines the order of its rows"
        )


def _is_known_config(config: Mapping[str, object]) -> bool:
    """Whether a config is that of timm, or the config or a part of it has a known model_type."""
    if "architecture" in config and "pretrained_cfg" in config:
        return True
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    kinds = (str(part.get("model_type", "")).lower().replace("-", "_") for part in parts)
    return any(f"{kind}_".startswith(tuple(f"{one}_" for one in MODEL_TYPES)) for kind in kinds)


def _find_gated(module: Module) -> Iterator[tuple[Place, Views]]:
    """Gate and up of a layer, or of a stack of experts in one tensor."""
    for name, output in GATED.items():
        if not (has_part(module, name) and has_part(module, output)):
            continue
        try:
            both, down = get_projection(module, name), get_projection(module, output)
        except UnknownLayoutError:
            continue
        if len(both.shape) == 3 and not _fit(both, down):  # Llama 4, stored (inputs, outputs)
            both, down = both.transpose(), down.transpose()
        if not _fit(both, down):
            continue
        yield down.place, Views({"": down.view})
        in_turns = _takes_turns(module, name)
        if in_turns is None:
            yield both.place, Views({"": both.view}, f"`{name}` {_GATED_ORDER}")
        elif in_turns:
            turns = {one: Strided(both.view, i, 2) for i, one in enumerate(("gate", "up"))}
            yield both.place, Views(turns)
        else:
            size = both.rows // 2
            yield both.place, Views(_cut_rows({"gate": size, "up": size}, both.view))


def _takes_turns(module: Module, name: str) -> bool | None:
    """Whether rows of gate and up alternate, as in gpt-oss; None if this is unknown."""
    concatenated = getattr(module, "is_concatenated", None)  # experts of transformers 5
    if isinstance(concatenated, bool):
        return not concatenated
    kinds = [kind.__name__ for kind in type(module).__mro__]
    kind = str(read_setting(module, "model_type")).lower().replace("-", "_")
    if "GptOssExperts" in kinds or kind.startswith(GATED_TURNS):
        return True
    # Models with a bias have either order; all models without a bias have blocks.
    return None if has_part(module, f"{name}_bias") and not kind.startswith(GATED_BLOCKS) else False


def _fit(both: Projection, down: Projection) -> bool:
    """Whether the second projection takes the product of gate and up."""
    return both.shape == (*down.shape[:-2], 2 * down.columns, down.rows)


def _find_fused(module: Module) -> Iterator[tuple[Place, Views]]:
    """The tensors of a module that contain several matrices, or remain one matrix with a note."""
    yield from _find_gated(module)
    try:
        cut = cut_attention(module)
    except UnknownLayoutError as why:
        for name in FUSED:
            try:
                whole = get_projection(module, name, ndim=2)
            except UnknownLayoutError:
                continue
            yield whole.place, Views({"": whole.view}, str(why))
        return
    if cut is not None:
        yield cut.whole.place, cut.views()
        if isinstance(cut.whole.view, Transposed):
            out = get_projection(module, cut.output)
            yield out.place, Views({"": out.view})


def find_fused_projections(model: nn.Module) -> dict[Place, Views]:
    """The parameters of a model that contain several matrices."""
    return {place: views for module in model.modules() for place, views in _find_fused(module)}


def find_views_in_file(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> dict[str, Views]:
    """The matrices in the tensors of a file, by the names of the tensors.

    Args:
        shapes: the shapes of all its tensors, by name.
        config: the content of config.json; empty without that file.
    """
    found: dict[str, Views] = {}
    for module in find_stored_modules(shapes, config).values():
        for layer in module.parts.values():
            if isinstance(layer, Projection) and isinstance(layer.view, Transposed):
                found[layer.place[1]] = Views({"": layer.view})
        found |= {name: views for (_, name), views in _find_fused(module)}
        found |= dict(_find_recurrent(module))
    return {name: found.get(name) or Views(*infer_views(name, shapes)) for name in shapes}


def _find_recurrent(module: StoredModule) -> Iterator[tuple[str, Views]]:
    """The gates of an LSTM or a GRU of torch, or of their cells."""
    layers = {name: one for name, one in module.parts.items() if isinstance(one, Projection)}
    for name, hidden in layers.items():
        kind, _, suffix = name.partition("weight_hh")
        given = layers.get(f"weight_ih{suffix}")
        if kind or given is None or not len(given.shape) == len(hidden.shape) == 2:
            continue
        projected = layers.get(f"weight_hr{suffix}")
        size = hidden.columns if projected is None else projected.shape[-1]
        gates, rest = divmod(hidden.rows, max(size, 1))
        if rest or gates not in GATES or given.rows != hidden.rows:
            continue
        for one in (given, hidden):
            yield one.place[1], Views(cut_equally(GATES[gates], hidden.rows))
