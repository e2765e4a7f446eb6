"""The weights of a checkpoint: their names, their stored parts, and a copy with other values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from wellcond.files.built import Built
from wellcond.files.collection import Files
from wellcond.files.formats import other_folder
from wellcond.files.joined import join
from wellcond.files.slices import (
    OF_RANK,
    REPEATED,
    find_missing_processes,
    one_of_ranks,
    repeated_in_shards,
    slice_at,
)
from wellcond.files.tensors import (
    Entry,
    Holder,
    Rows,
    TensorFile,
    UnreadableError,
    explain_non_weight,
)
from wellcond.recipes.base import Content, Recipe, TensorClass, find_quantization
from wellcond.recipes.find import find_recipes
from wellcond.text import join_remarks, last_part
from wellcond.weights.adapters import find_adapter_parameters
from wellcond.weights.fused import find_views_in_file
from wellcond.weights.matrices import Matrices, ViewsByName, entries
from wellcond.weights.names import find_non_weights
from wellcond.weights.quantised import count_logical_entries, read_bits
from wellcond.weights.reasons import Reason, Skipped

# Reasons found by shape and dtype, which names and neighbouring tensors make more precise.
_REFINED = (Reason.packed, Reason.quantised, Reason.scales, Reason.layout)
_OF_CODES = (Reason.quantised, Reason.scales, Reason.perhaps_codes)
# The names of the head of a language model.
_HEAD = re.compile(r"(head|output|output_layer|embed_out|unembed\w*)\.[^.]+$")
# Tensors whose values are missing or incomplete, so that no recipe can use them.
NO_PARTS = (
    *(Reason.slice, Reason.no_values, Reason.not_dense, Reason.array, Reason.tensor_class),
    Reason.undecoded,
)


class Checkpoint(Files):
    """The tensors of a file, of a sharded checkpoint, or of all files of a directory.

    If there are several files and no index, names begin with the name of the file, such as
    `step1.pt/0.weight`. `damaged` contains the damaged files, each with the reason. Slices of one
    tensor have one name: if they tile the tensor, `where` contains the tensor; otherwise `where`
    contains the last slice, and `slices` all of them. A weight that is built from several tensors
    is in `where` under the name that it has in a plain checkpoint, and in `recipes`. `stored`
    contains only stored tensors.
    """

    def __init__(self, path: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        super().__init__(path)
        self.where: dict[str, tuple[Holder, Entry]] = {}
        self.stored: dict[str, tuple[Holder, Entry]] = {}
        self.recipes: dict[str, Recipe] = {}
        self.classes: dict[str, TensorClass] = {}  # weights that a foreign class stores in parts
        self.overlapping: list[tuple[str, str]] = []
        self.slices: dict[str, list[tuple[TensorFile, Entry]]] = {}
        self._collect()
        refused = self._build()
        empty = not any(entry.matrix for _, entry in self.where.values())
        known = self.path.is_dir() and not self.slices  # a folder whose format may be known
        if empty and known and (other := other_folder(self.path)):
            raise UnreadableError(other)
        self._leave_out()
        self._explain(refused)
        if self.index is not None:
            self._check_index(self.index)
        if self._lacks_head():
            self.others["lm_head.weight"] = Skipped(Reason.missing)

    def _collect(self) -> None:
        """Names the tensors of all files."""
        holding = [
            file
            for file in self.files.values()
            if any(entry.skipped is None for entry in file.entries.values())
        ]
        listed = {file: _names_of_slices(file) for file in self.files.values()}
        sliced: set[str] = set().union(*listed.values())
        repeated: set[str] = set()
        if self.index is None:
            repeated = repeated_in_shards({name: one.entries for name, one in self.files.items()})
        for file_name, file in self.files.items():
            united = self.index is not None or len(self.files) == 1 or holding == [file]
            prefix = "" if united else f"{file_name}/"
            of_rank = one_of_ranks(file.path)
            for name, entry in file.entries.items():
                if entry.skipped is None and (of_rank or name in repeated):
                    entry = replace(entry, skipped=OF_RANK if of_rank else REPEATED)
                if listed[file] and name in sliced and name not in listed[file]:
                    entry = replace(entry, skipped=slice_at([]))
                if entry.skipped is not None and entry.skipped.reason is Reason.slice:
                    self.slices.setdefault(name, []).append((file, entry))
                    continue
                # Two shards may contain the same name: the index selects one of them.
                elsewhere = self.index is not None and self.index.get(name, file_name) != file_name
                taken = elsewhere or prefix + name in self.where
                self.where[f"{file_name}/{name}" if taken else prefix + name] = file, entry
            self.others |= {prefix + name: skipped for name, skipped in file.others.items()}
            for name, one in file.classes.items():
                parts = {key: prefix + part for key, part in one.parts.items()}
                self.classes[prefix + name] = replace(one, parts=parts)
            self.overlapping += [(prefix + one, prefix + two) for one, two in file.overlapping]
        self._join_slices()

    def _build(self) -> dict[str, tuple[str, ...]]:
        """Replaces the parts of each weight that a recipe builds by the weight.

        Returns:
            For the main part of each weight that cannot be built, the reason and the other parts.
        """
        self.stored = stored = dict(self.where)

        def read(name: str, rows: Rows | None = None) -> Tensor:
            holder, entry = stored[name]
            return holder.read(entry.name, rows)

        usable = {
            name: (entry.shape, entry.dtype)
            for name, (_, entry) in stored.items()
            if not (entry.skipped is not None and entry.skipped.reason in NO_PARTS)
            and not self.of_graph
        }
        content = Content(usable, read, cache(self.beside), self.classes)
        self.recipes, refused = find_recipes(content)
        for label, recipe in self.recipes.items():
            part = Skipped(Reason.component, label)
            for name in recipe.parts:
                holder, entry = stored[name]
                self.where[name] = holder, replace(entry, parameter=False, skipped=part)
        for label, recipe in self.recipes.items():
            aliases = stored[label][1].aliases if label in stored else ()
            skipped = explain_non_weight(recipe.shape, "float32")
            entry = Entry(label, recipe.shape, "float32", True, skipped, aliases)
            self.where[label] = Built(recipe, stored), entry
        self._parts = {name for one in self.recipes.values() for name in one.parts}
        self._parts -= self.recipes.keys()
        return refused

    def _explain(self, refused: dict[str, tuple[str, ...]]) -> None:
        """States for codes, and for other parts of a weight, why the weight cannot be built."""
        if self.of_graph:  # the graph has given the reasons
            return
        unknown = "in an unknown layout"
        config = self.beside("config.json")
        if not (find_quantization(config) or config.get("quantization")):
            unknown = "and no config.json in the same folder describes the layout"
        reasons = [entry.skipped for _, entry in self.where.values() if entry.skipped]
        scaled = {why.detail for why in reasons if why.reason is Reason.scales}
        for name, (file, entry) in self.where.items():
            if entry.skipped is not None and entry.skipped.reason is Reason.quantised:
                why = unknown if name in scaled else "and its scales are not in the file"
                skipped = Skipped(Reason.quantised, f"{entry.skipped.detail}, {why}")
                self.where[name] = file, replace(entry, skipped=skipped)
        for name, (why, *others) in refused.items():
            for part in (name, *others):
                file, entry = self.where[part]
                known = entry.skipped or Skipped(Reason.quantised)
                if part != name:
                    keeps = entry.skipped and known.reason is not Reason.torchao
                    known = known if keeps else Skipped(Reason.scales, name)
                elif known.reason not in (Reason.vector, Reason.number):
                    keeps = known.reason is Reason.parametrized
                    known = Skipped(known.reason if keeps else Reason.quantised, why)
                self.where[part] = file, replace(entry, skipped=known)

    def _leave_out(self) -> None:
        """Finds the tensors that are not weights, by their names and by neighbouring tensors."""
        # A head tied to an embedding is an embedding, no matter which of the names was kept.
        self._called = called = {name: name for name in self.where if name not in self._parts}
        for name in list(called):
            for alias in self._aliases(name):
                called.setdefault(alias, name)
        named = ((alias, self.where[name][1]) for alias, name in called.items())
        self._kinds = {alias: (entry.shape, entry.dtype) for alias, entry in named}
        for alias, skipped in find_non_weights(self._kinds, self._begins_with_codes).items():
            name = called[alias]
            file, entry = self.where[name]
            if name in self.recipes and skipped.reason in _OF_CODES:
                continue  # the codes belong to another weight of the module
            of_layers = isinstance(file, TensorFile) and file.of_layers
            if of_layers and entry.views is not None and skipped.reason.by_name:
                continue  # the layers of the file are more reliable than the name
            if self.of_graph and skipped.reason is not Reason.constant:
                continue  # the graph defines what a tensor is
            if entry.skipped is None or entry.skipped.reason in _REFINED:
                detail = skipped.detail or ("" if alias == name else f"tied to {alias}")
                self.where[name] = file, replace(entry, skipped=replace(skipped, detail=detail))
            elif skipped.reason is Reason.flat:
                self.where[name] = file, replace(entry, skipped=skipped)
        config = self.beside("adapter_config.json")
        if self.of_graph:
            return
        for name, skipped in find_adapter_parameters(called.values(), config).items():
            file, entry = self.where[name]
            if entry.skipped is None or not entry.skipped.reason.no_matrix:
                self.where[name] = file, replace(entry, skipped=skipped)

    def _lacks_head(self) -> bool:
        """Returns whether a complete language model lacks the head that config.json requires."""
        if not self.path.is_dir() and self.index is None:  # one shard lacks many tensors
            return False
        config = self.beside("config.json")
        kinds = config.get("architectures")
        of_words = isinstance(kinds, list) and any(
            str(kind).endswith("ForCausalLM") for kind in kinds
        )
        if not of_words or config.get("tie_word_embeddings") is not False:
            return False
        embeds = any(
            entry.skipped is not None and entry.skipped.reason is Reason.embedding
            for _, entry in self.where.values()
        )
        return embeds and not any(_HEAD.search(name) for name in self.where)

    def _join_slices(self) -> None:
        """Joins the slices of each tensor, or records why they cannot be joined."""
        slices, self.slices = self.slices, {}
        read = {file.path for file in self.files.values()}
        missing = find_missing_processes(read) if slices else {}
        for name, parts in slices.items():
            file, entry = next((part for part in parts if part[1].offsets is None), parts[-1])
            called = f"{file.path.name}/{name}" if name in self.where else name
            offsets = [one.offsets for _, one in parts if one.offsets is not None]
            if len(offsets) == len(parts):
                why = next((missing[one.path] for one, _ in parts if one.path in missing), "")
                joined = why or join(parts)
                if not isinstance(joined, str):
                    self.where[called] = joined
                    continue
                entry = replace(entry, skipped=slice_at(offsets, joined))
            self.where[called], self.slices[called] = (file, entry), parts

    def _begins_with_codes(self, name: str) -> bool:
        """Returns whether the first entries of a tensor are integers or numbers of float8."""
        file, entry = self.where[self._called[name]]
        built = isinstance(file, Built) or entry.stored_as  # already dequantised
        if built or entry.skipped is not None or entry.dtype.startswith("complex"):
            return False
        row = file.first_row(entry.name).float()
        narrow = row.to(torch.float8_e4m3fn).float()
        return bool((row == row.round()).all() or (row == narrow).all())

    def _aliases(self, name: str) -> list[str]:
        """Returns the other names of a tensor."""
        _, entry = self.where[name]
        return [name.removesuffix(entry.name) + alias for alias in entry.aliases]

    def _check_index(self, index: dict[str, str]) -> None:
        for name, shard in index.items():
            if name not in self.files[shard].entries:
                raise UnreadableError(
                    f"{self.path} lists {name} in {shard}, but {shard} does not contain it. The "
                    "shards belong to another checkpoint, or one is incomplete: fetch the index "
                    "and all shards again."
                )

    @property
    def sizes(self) -> dict[str, int]:
        """The number of entries of each parameter; for a quantised weight, after dequantisation.

        Fixed transforms, tables and masks are not parameters, and neither are scales of codes.
        """
        bits = read_bits(self.beside("config.json"))
        sizes = {}
        for name, (_, entry) in self.where.items():
            reason = None if entry.skipped is None else entry.skipped.reason
            if reason is Reason.slice:
                sizes[name] = sum(entries(one.shape) for _, one in self.slices[name])
            elif _holds_codes(name, entry):
                sizes[name] = count_logical_entries(name, self._kinds, self._read_small, bits)
            elif entry.parameter and reason not in (Reason.constant, Reason.scales):
                sizes[name] = entries(entry.shape)
        return sizes

    @property
    def constants(self) -> dict[str, int]:
        """The number of entries of each tensor that is not a parameter, but can be measured.

        A pattern with its exact name includes such a tensor.
        """
        return {
            name: entries(entry.shape)
            for name, (_, entry) in self.where.items()
            if entry.skipped is not None
            and entry.skipped.reason in (Reason.constant, Reason.buffer)
        }

    def _read_small(self, name: str) -> Tensor:
        file, entry = self.where[self._called[name]]
        return file.read(entry.name)

    def matrices(self) -> Iterator[Matrices]:
        """Yields the tensors that contain matrices, one after the other.

        These include embeddings, which an audit skips unless a pattern is their exact name.
        """
        where = {n: found for n, found in self.where.items() if n not in self._parts}
        shapes = {name: entry.shape for name, (_, entry) in where.items()}
        views = find_views_in_file(shapes, self.beside("config.json"))
        for name, (holder, entry) in where.items():
            if not entry.matrix:
                continue
            names, seen = (name, *self._aliases(name)), entry.views or views[name]
            one = Matrices(
                name,
                names,
                entry.shape,
                ViewsByName(seen.views),
                partial(holder.read, entry.name),
                note=seen.note,
                stored=not entry.stored_as,
                stored_as=entry.stored_as,
                grouped=seen.grouped,
            )
            if isinstance(holder, Built):
                recipe = holder.recipe
                one = replace(
                    one,
                    aliases=(*names, recipe.parts[0]),
                    read=holder.matrices,
                    note=join_remarks(recipe.note, seen.note),
                    stored=not recipe.keeps,
                    parts=recipe.parts,
                    stored_as=recipe.stored_as or self.stored[recipe.parts[0]][1].dtype,
                )
            yield one

    def skipped(self) -> dict[str, Skipped]:
        """Returns all other tensors except parts of weights that are built, and the reasons."""
        where = {n: found for n, found in self.where.items() if n not in self._parts}
        entries = {name: entry.skipped for name, (_, entry) in where.items()}
        return {name: why for name, why in entries.items() if why is not None} | self.others

    def copy_with(self, change: Callable[[str], Tensor | None], target: Path) -> None:
        """Copies all files, with new values for the tensors that `change` returns.

        The copy of a single file is a file. The copy of a directory or a sharded checkpoint is a
        directory with all its files. `change` is called for one tensor after the other.
        """
        with self.copy(target) as write:
            for name, (holder, entry) in self.where.items():
                if entry.matrix and (new := change(name)) is not None:
                    for file, stored, values in holder.split(entry.name, new):
                        write[file](stored, values)


def _names_of_slices(file: TensorFile) -> set[str]:
    """Returns the tensors that a file declares as slices with known offsets."""
    return {name for name, entry in file.entries.items() if entry.offsets is not None}


def _holds_codes(name: str, entry: Entry) -> bool:
    """Returns whether the integers of a tensor are the codes of a quantised weight."""
    reason = entry.skipped.reason if entry.skipped is not None else None
    packed = reason is Reason.packed and last_part(name) == "weight"
    return reason is Reason.quantised or packed
