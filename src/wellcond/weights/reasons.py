"""The reasons why wellcond skips a tensor, as the sentences that reports print."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why wellcond skips a parameter of a model or a tensor of a file; its value is a sentence."""

    number = "not a matrix: a number"
    vector = "not a matrix: a vector"
    empty = "not a matrix: it has no entries"
    dimensions = "not a matrix: its dimensions have no known meaning"
    embedding = "an embedding: its rows are looked up, not multiplied"
    added = "looks like a token, position or bias parameter (by name)"
    constant = "looks like a fixed transform, table or mask, which is not trained (by name)"
    buffer = "not a parameter of the program, so it is not trained"
    exponentiated = "looks like a parameter that is exponentiated or acts entrywise (by name)"
    layout = (
        "neither its name nor the file states the order of its axes; to measure it as its shape "
        "suggests, include its exact name"
    )
    normalisation = "parameter of a normalisation over several axes, which acts entrywise"
    unknown_use = "a parameter whose use is unknown"
    unmultiplied = "a constant that no matrix multiplication uses"
    in_graph = "a constant from which the graph computes a weight that is not measured"
    one_row = "one row per group, so each group is well-conditioned"
    uninitialised = "not initialised yet: run the model once first"
    not_real = "not real floating point"
    complex = "complex: measured, but not repaired"
    kept = "measured, but not repaired"
    codes = (
        "codes, which mean nothing without their scales: dequantise first, or audit the saved model"
    )
    packed = "not real floating point: packed, quantised or not a weight"
    quantised = "quantised, and cannot be dequantised here"
    undecoded = "stored as codes that cannot be decoded here"
    perhaps_codes = (
        "possibly quantised, because a scale of matching shape is stored next to it; if it is not "
        "quantised, include its exact name"
    )
    scales = "part of a quantised weight, such as its scales or zero points"
    not_dense = "not a dense tensor"
    replaced = "not in effect: PEFT uses a trained copy instead"
    factor = "a factor of an adapter, of which only the product is used: merge it first"
    adapter = "a parameter of an adapter, which is not a matrix until it is merged"
    component = "a parameter from which the effective weight is computed"
    uncomputed = "computed before each forward pass by an unknown method"
    own_forward = (
        "a convolution whose class or instance overrides forward, so how it uses stride and "
        "padding is unknown"
    )
    scripted = "part of a TorchScript program, whose layers have no classes: use the eager model"
    parametrized = "parametrized: the stored tensor is not the effective weight"
    slice = "a slice of a tensor that is split across several files: join the slices first"
    flat = "a flat parameter of FSDP, which concatenates all weights of a unit"
    sharded = "sharded across processes: audit a checkpoint or an unsharded model"
    same = "tied to another tensor"
    part = "part of another tensor, so not measured or repaired separately"
    no_values = "a tensor without values"
    beside = "a file that the index in its folder does not list"
    unread = "a file in another format, which is not read"
    absent = "a file of this model that is not read: audit the folder that contains all its files"
    missing = "not in the file, although config.json says that it is not tied to the embedding"
    optimizer = "the state of an optimizer"
    regularizer = "the state of a Regularizer"
    trainer = "the state of a trainer"
    no_tensors = "a file without tensors"
    objects = "not read, because loading it could run code"
    unnamed = "numbers of a type that the file does not name or that torch does not support"
    array = "a NumPy array, which is not read: save it as a tensor"
    torchao = "quantised by torchao"
    tensor_class = "a tensor of a class that wellcond does not load"
    frozen = "frozen: requires_grad is False"
    excluded = "excluded by a pattern"
    unmatched = "matched by no pattern"

    @property
    def no_matrix(self) -> bool:
        """Whether the tensor is not a matrix, so that a report without it is complete."""
        return self in (
            *(Reason.number, Reason.vector, Reason.empty, Reason.dimensions),
            Reason.unmultiplied,
            # The weight that is computed from these is counted instead.
            *(Reason.component, Reason.scales),
        )

    @property
    def of_adapter(self) -> bool:
        """Whether the tensor is a trained parameter of an adapter."""
        return self in (Reason.factor, Reason.adapter)

    @property
    def by_name(self) -> bool:
        """Whether only names support the reason, so that including the exact name overrides it."""
        return self in (
            Reason.embedding,
            Reason.added,
            Reason.constant,
            Reason.buffer,
            Reason.exponentiated,
            Reason.layout,
            Reason.normalisation,
            Reason.perhaps_codes,
        )

    @property
    def no_tensor(self) -> bool:
        """Whether the reason is about a file or the state of a trainer instead of a tensor."""
        return self in (
            *(Reason.beside, Reason.unread, Reason.optimizer, Reason.regularizer, Reason.trainer),
            *(Reason.no_tensors, Reason.objects, Reason.absent),
        )


@dataclass(frozen=True)
class Skipped:
    """Why a tensor is skipped. Its text is the sentence of the reason, followed by the detail.

    Attributes:
        reason: the kind of reason.
        detail: further information, such as the dtype, or "".

    Example:
        >>> import torch, wellcond as wc
        >>> reg = wc.Regularizer(torch.nn.Linear(3, 2), wc.ConditionPenalty(0.1))
        >>> reg.skipped["bias"].reason, str(reg.skipped["bias"])
        (<Reason.vector: 'not a matrix: a vector'>, 'not a matrix: a vector')
    """

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value
