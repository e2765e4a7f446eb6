"""Weights of bitsandbytes, compared entry by entry with those that it dequantises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import check_mutated
from support import content_from, content_of, load_expected, reason_of, weights_of
from torch import Tensor

from wellcond.recipes import bitsandbytes
from wellcond.recipes.base import Content
from wellcond.recipes.bitsandbytes import find_bitsandbytes

DATA = Path(__file__).parent / "data"
FOLDERS = ("bitsandbytes_nf4", "bitsandbytes_int8", "bitsandbytes_layers")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    weights = weights_of(content_of(DATA / folder), find_bitsandbytes)
    expected = load_expected(DATA / folder)
    assert weights.keys() == expected.keys()
    # For int8, the library multiplies by 1/127, which is rounded.
    rtol = 2**-23 if folder == "bitsandbytes_int8" else 0
    for label, W in weights.items():
        torch.testing.assert_close(W, expected[label], rtol=rtol, atol=0)


@pytest.mark.parametrize("step", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("folder", FOLDERS)
def test_ranges_of_entries_begin_anywhere(
    folder: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(DATA / folder)
    whole = weights_of(content, find_bitsandbytes)
    monkeypatch.setattr(bitsandbytes, "_STEP", step)
    for label, W in weights_of(content, find_bitsandbytes).items():
        assert torch.equal(W, whole[label])


def test_a_matrix_of_a_stack_is_built_from_its_own_bytes() -> None:
    content = content_of(DATA / "bitsandbytes_layers")
    recipe = next(one.make() for one in find_bitsandbytes(content) if one.label == "experts.stack")
    assert recipe.shape == (3, 5, 9)
    assert recipe.count == 3
    read: list[tuple[str, tuple[int, int] | None]] = []

    def spy(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        read.append((name, rows))
        return content.read(name, rows)

    recipe.build(spy, 1)
    assert ("experts.stack", (22, 45)) in read  # the entries 45 to 90, two per byte


def test_conv1d_has_the_shape_of_the_plain_checkpoint() -> None:
    content = content_of(DATA / "bitsandbytes_nf4")
    shapes = {one.label: one.make().shape for one in find_bitsandbytes(content)}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (12, 36)
    other = Content(content.tensors, content.read, lambda name: {})
    shapes = {one.label: one.make().shape for one in find_bitsandbytes(other)}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (36, 12)


def test_note_and_dtype_describe_the_stored_parts() -> None:
    made = {one.label: one.make() for one in find_bitsandbytes(content_of(DATA / FOLDERS[0]))}
    recipe = made["transformer.h.0.mlp.c_fc.weight"]
    assert recipe.note == (
        "dequantised from NF4 of bitsandbytes with a scale per block of 64, itself quantised"
    )
    assert recipe.dtype == "bfloat16"
    assert recipe.keeps


# --- contradictions -------------------------------------------------------------------------------

NAME = "odd.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def load(folder: str, label: str) -> dict[str, Tensor]:
    content = content_of(DATA / folder)
    (candidate,) = (one for one in find_bitsandbytes(content) if one.label == label)
    return {part: content.read(part) for part in candidate.parts}


def describe(tensors: dict[str, Tensor], state: str, **changes: Any) -> None:
    described = json.loads(bytes(tensors[state].tolist())) | changes
    tensors[state] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def pop(tensors: dict[str, Tensor], *names: str) -> None:
    for name in names:
        del tensors[name]


FOUR_BITS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda t: pop(t, STATE), f"no {STATE} describes it"),
    (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE]}),
        f"{STATE} and {STATE.replace('nf4', 'fp4')} describe it",
    ),
    (lambda t: pop(t, f"{NAME}.absmax"), f"{NAME}.absmax is missing"),
    (lambda t: pop(t, f"{NAME}.quant_map"), f"{NAME}.quant_map is missing"),
    (lambda t: pop(t, NAME), f"{NAME} is missing"),
    (lambda t: t.update({NAME: t[NAME][:-1]}), "does not contain 77 codes of 4 bits"),
    (lambda t: t.update({NAME: t[NAME].T}), "does not contain 77 codes of 4 bits"),
    (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:1]}), "has the shape (1,)"),
    (lambda t: t.update({f"{NAME}.quant_map": -t[f"{NAME}.quant_map"]}), "the 16 values of NF4"),
    (lambda t: t.update({STATE: t[STATE][:-3]}), "is not a description in JSON"),
    (lambda t: t.update({STATE: torch.zeros(5000, dtype=torch.uint8)}), "is too large for"),
    (lambda t: t.update({f"{NAME}.nested_absmax": torch.ones(1)}), "absmax has the dtype float32"),
    (lambda t: describe(t, STATE, quant_type="fp4"), f"its type in {STATE} is fp4"),
    (lambda t: describe(t, STATE, shape=[7, 12]), "does not contain 84 codes of 4 bits"),
    (lambda t: describe(t, STATE, shape=[7, -11]), f"its shape in {STATE} is [7, -11]"),
    (lambda t: describe(t, STATE, shape=[1 << 70, 1 << 70]), "does not contain"),
    (lambda t: describe(t, STATE, shape=[77]), "has 1 sides"),
    (lambda t: describe(t, STATE, shape=[1] * 99 + [77]), "has 100 sides"),
    (lambda t: describe(t, STATE, shape=None), f"its shape in {STATE} is None"),
    (lambda t: describe(t, STATE, blocksize=1 << 62), f"its blocksize in {STATE} is 461"),
    (lambda t: describe(t, STATE, blocksize=0), f"its blocksize in {STATE} is 0"),
    (lambda t: describe(t, STATE, blocksize=True), f"its blocksize in {STATE} is True"),
    (lambda t: describe(t, STATE, blocksize=32), "has the shape (2,), not (3,)"),
    (lambda t: describe(t, STATE, nested_blocksize=256), "absmax has the dtype float32"),
]


@pytest.mark.parametrize(("change", "reason"), FOUR_BITS)
def test_contradictory_parts_of_four_bits_give_a_reason(
    change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    tensors = load("bitsandbytes_layers", NAME)
    change(tensors)
    content = content_from(tensors)
    (candidate,) = find_bitsandbytes(content)
    assert reason in reason_of(candidate, content)
    assert set(candidate.parts) == set(tensors)


NESTED = "column.weight"
NESTED_STATE = f"{NESTED}.quant_state.bitsandbytes__fp4"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: pop(t, f"{NESTED}.nested_absmax"), "nested_absmax is missing"),
        (lambda t: pop(t, f"{NESTED}.nested_quant_map"), "nested_quant_map is missing"),
        (
            lambda t: t.update({f"{NESTED}.nested_quant_map": torch.ones(16)}),
            "has the shape (16,), not (256,)",
        ),
        (
            lambda t: t.update({f"{NESTED}.nested_absmax": torch.ones(2)}),
            "has the shape (2,), not (1,)",
        ),
        (lambda t: describe(t, NESTED_STATE, nested_offset="1"), "__fp4 is '1'"),
        (
            lambda t: describe(t, NESTED_STATE, nested_blocksize=3),
            f"its nested_blocksize in {NESTED_STATE} is 3",
        ),
    ],
)
def test_contradictory_nested_scales_give_a_reason(
    change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    tensors = load("bitsandbytes_layers", NESTED)
    change(tensors)
    content = content_from(tensors)
    (candidate,) = find_bitsandbytes(content)
    assert reason in reason_of(candidate, content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"SCB": torch.ones(1)}, "l.SCB has the shape (1,), not (2,)"),
        ({"SCB": torch.ones(2, dtype=torch.int64)}, "l.SCB has the dtype int64"),
        ({"weight": torch.ones(2, 3)}, "l.weight has the dtype float32"),
        ({"weight": torch.ones(2, 3, 1, dtype=torch.int8)}, "has the dtype int8 and the shape"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "it has the layout col_turing"),
        ({"weight_format": torch.tensor(9, dtype=torch.uint8)}, "it has the layout [9]"),
        ({"weight_format": torch.zeros(2, dtype=torch.uint8)}, "it has the layout [0, 0]"),
    ],
)
def test_contradictory_parts_of_eight_bits_give_a_reason(
    change: dict[str, Tensor], reason: str
) -> None:
    tensors = {"weight": torch.ones(2, 3, dtype=torch.int8), "SCB": torch.ones(2)} | change
    content = content_from({f"l.{name}": one for name, one in tensors.items()})
    (candidate,) = find_bitsandbytes(content)
    assert reason in reason_of(candidate, content)
    assert set(candidate.parts) == set(content.tensors)


@pytest.mark.parametrize("folder", FOLDERS)
@given(draw=st.data())
def test_random_changes_give_a_weight_or_a_reason(folder: str, draw: st.DataObject) -> None:
    content = content_of(DATA / folder)
    config = {"config": dict(content.beside("config.json"))}
    check_mutated(draw, content, config, find_bitsandbytes)
