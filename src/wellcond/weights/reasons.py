"""Why a tensor is left out, in the words that the user reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a parameter of a model or a tensor of a file is left out; its value is the sentence."""

    number = "not a matrix: a number"
    vector = "not a matrix: a vector"
    empty = "not a matrix: it has no entries"
    dimensions = "not a matrix: more dimensions than are known to mean one"
    embedding = "an embedding: its rows are looked up, it is no linear map"
    added = "by its name a token, a position or a bias, and no linear map"
    constant = "by its name a fixed transform, a table or a mask, which is not trained"
    exponentiated = "by its name a parameter that is exponentiated or acts entrywise, no linear map"
    normalisation = "weight and bias of a normalisation over several axes, which act entrywise"
    unknown_use = "a parameter whose use is not known"
    one_row = "one row in each group, which is well-conditioned by itself"
    uninitialised = "not initialised yet: run the model once first"
    not_real = "not real floating point"
    complex = "complex: it is measured, but not repaired"
    codes = "codes, which mean nothing without their scales: dequantise first"
    packed = "not real floating point, packed or quantised perhaps, or no weight"
    quantised = "quantised: it can be measured only after it is dequantised"
    perhaps_codes = (
        "perhaps quantised, because a scale of fitting shape is stored beside it; if it is not, "
        "include its exact name"
    )
    scales = "belongs to a quantised weight, as its scales or zeros do, and is none itself"
    not_dense = "not a dense tensor"
    replaced = "not what acts: PEFT has put a trained copy in its place"
    factor = "a factor of an adapter, which acts as a product: merge it first"
    adapter = "a parameter of an adapter that is no LoRA, and no matrix that acts before a merge"
    component = "a part, from which the weight that acts is computed"
    uncomputed = "computed before each forward pass, in a way that is not known"
    scripted = "of a TorchScript program, whose layers have no classes: use the eager model"
    parametrized = "parametrized: what is stored is not the matrix that acts"
    slice = "a slice of a tensor that is split over several files, which must be joined first"
    flat = "a flat parameter of FSDP, which holds all weights of a unit end to end"
    sharded = "sharded over processes: audit a checkpoint, or a model that is whole"
    same = "the same tensor as another"
    part = "a part of another tensor, and neither measured nor repaired by itself"
    no_values = "a tensor without values"
    beside = "a file that the index beside it does not name"
    unread = "a file of another format, which is not read"
    missing = "not in the file, though config.json says that it is not tied to the embedding"
    optimizer = "the state of an optimizer"
    regularizer = "the state of a Regularizer"
    trainer = "the state of a trainer"
    no_tensors = "a file without tensors"
    objects = "not read, because to load them could run code"
    array = "an array of NumPy, which is not read: save it as a tensor"
    torchao = "quantised by torchao"
    tensor_class = "a tensor of a class that is not loaded"
    program = "a file that holds more than tensors"
    frozen = "frozen: requires_grad is False"
    excluded = "left out by a pattern"
    unmatched = "matched by no pattern"

    @property
    def no_matrix(self) -> bool:
        """Whether this is no matrix at all, and so nothing that a report could lack."""
        return self in (
            *(Reason.number, Reason.vector, Reason.empty, Reason.dimensions),
            Reason.component,  # what is computed from it counts
        )

    @property
    def of_adapter(self) -> bool:
        """Whether it is a trained parameter of an adapter."""
        return self in (Reason.factor, Reason.adapter)

    @property
    def by_name(self) -> bool:
        """Whether only its name or what is stored beside it says so; its exact name takes it."""
        return self in (
            Reason.embedding,
            Reason.added,
            Reason.constant,
            Reason.exponentiated,
            Reason.normalisation,
            Reason.perhaps_codes,
        )

    @property
    def no_tensor(self) -> bool:
        """Whether it is about no tensor, but a file or the state of a trainer."""
        return self in (
            *(Reason.beside, Reason.unread, Reason.optimizer, Reason.regularizer, Reason.trainer),
            *(Reason.no_tensors, Reason.program, Reason.objects),
        )


@dataclass(frozen=True)
class Skipped:
    """What is left out and why; as text, the sentence of the reason and the detail.

    Attributes:
        reason: the kind of reason.
        detail: what there is to say besides, such as the dtype; "" if nothing.

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
