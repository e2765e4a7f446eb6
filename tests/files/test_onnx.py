"""ONNX models: compares the matrices of nodes with the output of the nodes."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from torch import nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError
from wellcond.weights.onnx_graph import find_constants
from wellcond.weights.reasons import Reason, Skipped

DATA = Path(__file__).with_name("data")
FLOAT = TensorProto.FLOAT


def randn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: list[Any],
    weights: dict[str, Any],
    given: tuple[int, ...] = (1,),
    functions: Any = (),
    output: int = FLOAT,
) -> Any:
    """Makes a model from X to Y; weights are arrays or TensorProtos."""
    tensors = [
        one if isinstance(one, TensorProto) else numpy_helper.from_array(one, name)
        for name, one in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("X", FLOAT, given)],
        [helper.make_tensor_value_info("Y", output, None)],
        tensors,
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=versions, functions=functions, ir_version=10)


def node(kind: str, inputs: str, output: str = "Y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), output.split(), f"the {kind}", **attributes)


def saved(path: Path, *arguments: Any, **options: Any) -> Path:
    onnx.save(model(*arguments, **options), path)
    return path


def action(one: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the matrix of a linear map, column by column."""
    evaluator = ReferenceEvaluator(one)
    columns = []
    for at in range(int(np.prod(shape))):
        X = np.zeros(shape, np.float32)
        X.flat[at] = 1
        (Y,) = evaluator.run(None, {"X": X})
        columns.append(Y.flatten())
    return torch.tensor(np.stack(columns, 1)).double()


def found(path: Path) -> dict[str, torch.Tensor]:
    """Returns the matrices of a model by their labels."""
    return {
        f"{one.name}:{view}".rstrip(":"): matrix.double()
        for one in Checkpoint(path).matrices()
        for view, matrix in one.views(one.read()).items()
    }


def values(*matrices: torch.Tensor) -> torch.Tensor:
    stacks = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices]
    blocks = [block for stack in stacks for block in stack]
    return torch.cat([torch.linalg.svdvals(block) for block in blocks]).sort().values


SHAPE = np.array([3, 5], np.int64)
# Nodes from X to Y, the weights, and the shape of X: linear maps that use every block once.
ACTIONS: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...]]] = {
    "Gemm": ([node("Gemm", "X W")], {"W": randn(3, 5)}, (1, 3)),
    "Gemm, transposed": ([node("Gemm", "X W", transB=1)], {"W": randn(5, 3)}, (1, 3)),
    "Gemm, from the left": ([node("Gemm", "W X")], {"W": randn(5, 3)}, (3, 1)),
    "Gemm, from the left, transposed": (
        [node("Gemm", "W X", transA=1)],
        {"W": randn(3, 5)},
        (3, 1),
    ),
    "MatMul": ([node("MatMul", "X W")], {"W": randn(3, 5)}, (1, 3)),
    "MatMul, from the left": ([node("MatMul", "W X")], {"W": randn(5, 3)}, (3, 1)),
    "MatMul of a stack": ([node("MatMul", "X W")], {"W": randn(4, 3, 5)}, (4, 1, 3)),
    "MatMul of a stack with four axes": (
        [node("MatMul", "X W")],
        {"W": randn(2, 2, 3, 5)},
        (2, 2, 1, 3),
    ),
    "MatMul with an axis of 1": ([node("MatMul", "X W")], {"W": randn(1, 3, 5)}, (1, 1, 3)),
    "a transposed weight": (
        [node("Transpose", "W", "T"), node("MatMul", "X T")],
        {"W": randn(5, 3)},
        (1, 3),
    ),
    "a reshaped weight": (
        [node("Reshape", "W S", "T"), node("MatMul", "X T")],
        {"W": randn(15), "S": SHAPE},
        (1, 3),
    ),
    "a flattened weight": (
        [node("Flatten", "W", "T", axis=-1), node("MatMul", "X T")],
        {"W": randn(3, 5)},
        (1, 3),
    ),
    "a permuted stack": (
        [node("Transpose", "W", "T", perm=[1, 0, 2]), node("MatMul", "X T")],
        {"W": randn(3, 4, 5)},
        (4, 1, 3),
    ),
    "parts of a weight": (
        [
            node("Split", "W", "A B", axis=1, num_outputs=2),
            node("MatMul", "X A", "C"),
            node("MatMul", "X B", "D"),
            node("Concat", "C D", axis=1),
        ],
        {"W": randn(3, 6)},
        (1, 3),
    ),
    "Conv": ([node("Conv", "X W")], {"W": randn(5, 3, 2, 2)}, (1, 3, 2, 2)),
    "Conv in groups": ([node("Conv", "X W", group=2)], {"W": randn(6, 2, 3)}, (1, 4, 3)),
    "Conv, depthwise": ([node("Conv", "X W", group=4)], {"W": randn(4, 1, 3)}, (1, 4, 3)),
    "Conv, depthwise with a multiplier": (
        [node("Conv", "X W", group=4)],
        {"W": randn(8, 1, 3)},
        (1, 4, 3),
    ),
    "ConvTranspose": ([node("ConvTranspose", "X W")], {"W": randn(3, 5, 2)}, (1, 3, 1)),
    "ConvTranspose in groups": (
        [node("ConvTranspose", "X W", group=2)],
        {"W": randn(4, 2, 3)},
        (1, 4, 1),
    ),
    "Einsum": ([node("Einsum", "X W", equation="bi,io->bo")], {"W": randn(3, 5)}, (1, 3)),
    "Einsum of heads": (
        [node("Einsum", "X W", equation="bi,hoi->bho")],
        {"W": randn(2, 3, 5)},
        (1, 5),
    ),
    "Einsum of a stack": (
        [node("Einsum", "X W", equation="hi,iho->ho")],
        {"W": randn(3, 2, 4)},
        (2, 3),
    ),
}


def measured_action(name: str) -> torch.Tensor:
    """Returns the action of the model, or of each part of a weight."""
    nodes, weights, shape = ACTIONS[name]
    if name == "ConvTranspose in groups":  # the reference evaluator of ONNX lacks this operator
        X, W = torch.eye(4)[..., None], torch.tensor(weights["W"])
        return torch.nn.functional.conv_transpose1d(X, W, groups=2).flatten(1).mT.double()
    A = action(model(nodes, weights, shape), shape)
    return torch.block_diag(*A.split(3)) if name == "parts of a weight" else A


@pytest.mark.parametrize("name", ACTIONS)
def test_singular_values_equal_those_of_action(tmp_path: Path, name: str) -> None:
    nodes, weights, shape = ACTIONS[name]
    path = saved(tmp_path / "a.onnx", nodes, weights, shape)
    A, mine = measured_action(name), found(path)
    assert all(label.startswith("W") for label in mine)
    torch.testing.assert_close(values(*mine.values()), values(A)[-len(values(*mine.values())) :])
    rest = values(A)[: -len(values(*mine.values()))]
    assert rest.numel() == 0 or float(rest.max()) < 1e-6
    assert wc.audit(path).coverage.parameter_share == pytest.approx(
        sum(one.numel() for one in mine.values()) / weights["W"].size
    )
    # Rows are outputs, if the file defines them.
    if "ConvTranspose" not in name:
        assert sum(one.numel() // one.shape[-1] for one in mine.values()) == A.shape[0]


def test_matrix_equals_action(tmp_path: Path) -> None:
    """Compares entries, not only singular values."""
    for name in ("Gemm", "Gemm, from the left, transposed", "MatMul", "a transposed weight"):
        path = saved(tmp_path / "a.onnx", *ACTIONS[name])
        torch.testing.assert_close(found(path)["W"], measured_action(name))


def test_scaled_product_has_note(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.onnx", [node("Gemm", "X W", alpha=0.5)], {"W": randn(3, 5)})
    assert wc.audit(path).findings[0].explanation == "Gemm multiplies it by 0.5"


# --- exports of torch -----------------------------------------------------------------------------

# The gates of torch: i, f, g, o and r, z, n.
GATES = {"lstm": "ifgo", "gru": "rzn"}


def test_torch_export_has_values_of_weights() -> None:
    weights = load_file(DATA / "exported.safetensors")
    mine = found(DATA / "exported.onnx")
    shapes = {"val_119": "ih", "val_120": "hh", "val_160": "ih", "val_161": "hh"}
    matched = 0
    for label, matrix in mine.items():
        name, *view = label.split(":")
        if name in shapes:
            layer = "lstm" if name in ("val_119", "val_120") else "gru"
            suffix = "_reverse" if view[0] == "reverse" else ""
            whole = weights[f"{layer}.weight_{shapes[name]}_l0{suffix}"]
            gates = GATES[layer]
            expected = whole.chunk(len(gates))[gates.index(view[-1])]
        elif name == "val_0":
            expected = weights["lift.weight"]
        elif name == "merged.weight":
            assert not torch.allclose(matrix, weights[name].flatten(1).double(), rtol=0.01)
            continue
        else:
            expected = weights[name].flatten(1)
            expected = expected.reshape(matrix.shape)
        torch.testing.assert_close(matrix, expected.double(), rtol=0, atol=0)
        matched += 1
    assert matched == 16 + 6 + 6  # including the embedding
    report = wc.audit(DATA / "exported.onnx")
    notes = {finding.name: finding.explanation for finding in report.findings}
    assert notes["val_0"].startswith("a folded constant of MatMul ")
    assert notes["head.weight"] == ""
    skipped = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert skipped["words.weight"] is Reason.embedding
    model = nn.Conv1d(4, 4, 3, groups=4)
    model.weight = nn.Parameter(weights["depthwise.weight"])
    (alone,) = wc.audit(model).findings
    (inside,) = (one for one in report.findings if one.name == "depthwise.weight")
    assert inside.shape == alone.shape == (4, 1, 3)
    assert inside.condition_number == alone.condition_number > 1
    assert report.coverage.note == ""  # the file contains the number of groups


@pytest.mark.parametrize("turned", [False, True])
def test_compare_export_with_checkpoint_is_refused(
    tmp_path: Path, turned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [DATA / "exported.onnx", DATA / "exported.safetensors"][:: -1 if turned else 1]
    with pytest.raises(ValueError, match=r"is an exported graph, and .* is not"):
        wc.compare(*pair)
    baseline = tmp_path / "baseline.json"
    baseline.write_text(wc.audit(pair[0]).to_json())
    assert main(["audit", str(pair[1]), "--baseline", str(baseline)]) == 2
    assert "Compare two exports, or two checkpoints." in capsys.readouterr().err
    assert main(["audit", str(pair[0]), "--baseline", str(baseline)]) == 0


def test_compare_two_exports() -> None:
    path = DATA / "exported.onnx"
    assert all(pair.ratio == 1 for pair in wc.compare(path, path, names=("a", "b")).pairs)


def test_repair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Repair the checkpoint that was exported"):
        wc.repair(DATA / "exported.onnx", tmp_path / "out.onnx", 3.0)
    assert not (tmp_path / "out.onnx").exists()


# --- subgraphs ------------------------------------------------------------------------------------


def branch(name: str, weights: dict[str, Any], nodes: list[Any]) -> Any:
    tensors = [numpy_helper.from_array(one, key) for key, one in weights.items()]
    value = helper.make_tensor_value_info("Z", FLOAT, None)
    return helper.make_graph(nodes, name, [], [value], tensors)


def test_branches_have_separate_weights_with_one_name(tmp_path: Path) -> None:
    one, two = randn(3, 4), randn(3, 5, seed=1)
    outer = randn(3, 6, seed=2)
    then = branch("then", {"W": one}, [node("MatMul", "X W", "A"), node("MatMul", "X V", "Z")])
    other = branch("other", {"W": two}, [node("MatMul", "X W", "Z")])
    nodes = [node("If", "C", then_branch=then, else_branch=other)]
    path = saved(tmp_path / "a.onnx", nodes, {"C": np.array(True), "V": outer}, (1, 3))
    mine = found(path)
    assert {label: tuple(one.shape) for label, one in mine.items()} == {
        "V": (6, 3),
        "W": (5, 3),
        "the If/then_branch/W": (4, 3),
    }


def test_functions_are_expanded(tmp_path: Path) -> None:
    body = [node("MatMul", "x w", "m"), node("Gemm", "m v", "y")]
    reference = onnx.AttributeProto(name="transB", ref_attr_name="flag", type="INT")
    body[1].attribute.append(reference)
    function = helper.make_function(
        "local", "Two", ["x", "w", "v"], ["y"], body, [helper.make_opsetid("", 21)], ["flag"]
    )
    call = helper.make_node("Two", ["X", "W", "V"], ["Y"], "call", domain="local", flag=1)
    weights = {"W": randn(3, 4), "V": randn(5, 4)}
    path = saved(tmp_path / "a.onnx", [call], weights, (1, 3), functions=[function])
    mine = found(path)
    torch.testing.assert_close(mine["W"], torch.tensor(weights["W"]).double().mT)
    torch.testing.assert_close(mine["V"], torch.tensor(weights["V"]).double())


def test_gates_reordered_in_graph(tmp_path: Path) -> None:
    """The TorchScript exporter reorders gates if it folds no constants."""
    W, R = randn(8, 3), randn(8, 2, seed=1)
    nodes = []
    for name in ("W", "R"):
        for part, (start, stop) in enumerate([(0, 2), (6, 8), (2, 6)]):
            nodes.append(node("Slice", f"{name} n{start} n{stop} n0 n1", f"{name}{part}"))
        parts = " ".join(f"{name}{part}" for part in range(3))
        nodes.append(node("Concat", parts, f"{name}c", axis=0))
        nodes.append(node("Unsqueeze", f"{name}c n0", f"{name}u"))
    nodes.append(node("LSTM", "X Wu Ru", hidden_size=2))
    numbers = {f"n{one}": np.array([one], np.int64) for one in (0, 1, 2, 6, 8)}
    path = saved(tmp_path / "a.onnx", nodes, {"W": W, "R": R} | numbers, (1, 1, 3))
    mine = found(path)
    for name, whole in (("W", W), ("R", R)):
        for gate, block in zip("ifgo", torch.tensor(whole).double().chunk(4), strict=True):
            torch.testing.assert_close(mine[f"{name}:{gate}"], block)


def test_weight_looked_up_and_multiplied_is_measured_with_note(
    tmp_path: Path,
) -> None:
    nodes = [
        node("Cast", "X", "I", to=TensorProto.INT64),
        node("Gather", "W I", "E"),
        node("Transpose", "W", "T"),
        node("MatMul", "E T"),
    ]
    path = saved(tmp_path / "tied.onnx", nodes, {"W": randn(7, 4)})
    (finding,) = wc.audit(path).findings
    assert (finding.shape, finding.explanation) == ((7, 4), "also an embedding")


def test_weight_rearranged_many_times_is_skipped(tmp_path: Path) -> None:
    """Nested views would be as deep as the chain of nodes is long."""
    shapes = ("S", "T")
    turns = [node("Reshape", f"V{at} {shapes[at % 2]}", f"V{at + 1}") for at in range(2000)]
    nodes = [node("Identity", "W", "V0"), *turns, node("MatMul", "X V2000")]
    weights = {"W": randn(5, 3), "S": SHAPE, "T": SHAPE[::-1].copy(), "U": randn(5, 2)}
    path = saved(tmp_path / "a.onnx", [*nodes, node("MatMul", "X U", "Z")], weights, (1, 5))
    assert reasons(path)["W"] is Reason.in_graph
    assert [one.name for one in wc.audit(path).findings] == ["U"]


def test_one_matrix_per_distinct_part(tmp_path: Path) -> None:
    """With many nodes, comparing each with all others would require hours."""
    count = 3000
    parts = [node("Slice", f"W n{at} n{at + 1} n1", f"W{at}") for at in range(count)]
    uses = [node("MatMul", f"X W{at}", f"Y{at}") for at in (*range(count), *range(count))]
    numbers = {f"n{one}": np.array([one], np.int64) for one in range(count + 1)}
    path = saved(tmp_path / "a.onnx", parts + uses, {"W": randn(2, count)} | numbers, (1, 2))
    started = time.perf_counter()
    assert len(found(path)) == count
    assert time.perf_counter() - started < 20


def test_nested_sums_need_proportional_memory(tmp_path: Path) -> None:
    count = 2000
    nodes = [node("Add", f"S{at} W{at}", f"S{at + 1}") for at in range(count)]
    nodes = [node("Identity", "W", "S0"), *nodes, node("MatMul", f"X S{count}")]
    weights = {f"W{at}": randn(2, 2) for at in range(count)} | {"W": randn(2, 2)}
    one = model(nodes, weights, (1, 2))
    constants = find_constants(one, lambda _: None)
    assert {why.reason for c in constants.values() if (why := c.skipped)} == {Reason.in_graph}
    assert sum(len(c.uses) for c in constants.values()) <= 4 * count


# Invalid models with weights that a lenient reader would treat as matrices.
FORBIDDEN: dict[str, dict[str, Any]] = {
    "Flatten": {"axis": 5},
    "Split": {"axis": 4, "num_outputs": 1},
    "Squeeze": {"axes": [1]},
    "Unsqueeze": {"axes": [7]},
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_invalid_axis_gives_no_number(tmp_path: Path, kind: str) -> None:
    nodes = [node(kind, "W", "T", **FORBIDDEN[kind]), node("MatMul", "X T")]
    path = saved(tmp_path / "a.onnx", nodes, {"W": randn(3, 5)}, (1, 3))
    assert reasons(path) == {"W": Reason.in_graph}


def test_constants_with_one_name_are_distinguished(tmp_path: Path) -> None:
    body = [node("Constant", "", "W", value=numpy_helper.from_array(randn(3, 3)))]
    body.append(node("MatMul", "x W", "y"))
    function = helper.make_function("local", "F", ["x"], ["y"], body, [])
    values = ["X", "A", "B", "Y"]
    calls = [helper.make_node("F", [x], [y], domain="local") for x, y in pairwise(values)]
    for call in calls:
        call.name = "the call"
    path = saved(tmp_path / "a.onnx", calls, {}, (1, 3), functions=[function])
    assert list(found(path)) == ["W", "the call/W", "the call/W'2"]


# --- other constants ------------------------------------------------------------------------------


def reasons(path: Path) -> dict[str, Reason]:
    return {name: why.reason for name, why in Checkpoint(path).skipped().items()}


def test_other_constants_skipped_with_reason(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "X W", "A"),
        node("Add", "A position", "B"),
        node("Mul", "g v", "made"),
        node("MatMul", "B made", "C"),
        helper.make_node("Odd", ["C", "odd"], ["D"], domain="local"),
        node("Loop", "n c D carried", "E F", body=branch("body", {}, [node("Identity", "D", "Z")])),
        node("Reshape", "D shape"),
    ]
    weights = {
        "W": randn(3, 5),
        "position": randn(4, 5),
        "g": randn(5, 1),
        "v": randn(5, 5),
        "odd": randn(2, 2),
        "carried": randn(2, 3),
        "free": randn(3, 3),
        "shape": SHAPE,
        "n": np.array(3),
        "c": np.array(True),
        "table": np.ones((2, 2), np.int64),
    }
    path = saved(tmp_path / "a.onnx", nodes, weights, (4, 3))
    assert reasons(path) == {
        "position": Reason.unmultiplied,
        "g": Reason.in_graph,
        "v": Reason.in_graph,
        "odd": Reason.unknown_use,
        "carried": Reason.unknown_use,
        "free": Reason.unmultiplied,
        "shape": Reason.vector,
        "n": Reason.number,
        "c": Reason.number,
        "table": Reason.packed,
    }
    skipped = Checkpoint(path).skipped()
    assert str(skipped["v"]) == (
        "a constant from which the graph computes a weight that is not measured: by Mul the Mul"
    )
    assert str(skipped["odd"]) == "a parameter whose use is unknown: Odd of local uses it"


def test_nodes_override_names(tmp_path: Path) -> None:
    """By their names, the tensors would be an adapter, an embedding or part of a layer."""
    weights = {
        "q.lora_A.weight": randn(3, 2),
        "q.lora_B.weight": randn(2, 5),
        "tokens.weight": randn(5, 4),
        "p.weight_v": randn(4, 3),
        "p.weight_g": randn(4, 1),
    }
    nodes = [
        node("MatMul", "X q.lora_A.weight", "A"),
        node("MatMul", "A q.lora_B.weight", "B"),
        node("MatMul", "B tokens.weight", "C"),
        node("MatMul", "C p.weight_v", "D"),
        node("Mul", "D p.weight_g"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, weights, (4, 3))
    assert {finding.label for finding in wc.audit(path).findings} == weights.keys() - {"p.weight_g"}


def test_fixed_transforms_skipped_by_name(tmp_path: Path) -> None:
    """A graph does not state which constants are trained; folding removes their names."""
    weights = {
        "stft.forward_basis_buffer": randn(6, 1, 4),
        "onnx::Conv_7": randn(5, 6, 1),
        "onnx::Conv_8": randn(5, 5, 1),
        "stft_encoder.weight": randn(5, 5, 1),
    }
    nodes = [
        helper.make_node("Conv", ["X", "stft.forward_basis_buffer"], ["A"], "/front/Conv"),
        helper.make_node("Conv", ["A", "onnx::Conv_7"], ["B"], "net/cq_t2010v2_1/conv1d"),
        helper.make_node("Conv", ["B", "onnx::Conv_8"], ["C"], "net/head/conv1d"),
        helper.make_node("Conv", ["C", "stft_encoder.weight"], ["Y"], "/stft_encoder/Conv"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, weights, (1, 1, 9))
    report = wc.audit(path)
    assert {finding.name for finding in report.findings} == {"onnx::Conv_8", "stft_encoder.weight"}
    assert report.coverage.skipped == {
        "stft.forward_basis_buffer": Skipped(Reason.constant),
        "onnx::Conv_7": Skipped(Reason.constant, "of Conv net/cq_t2010v2_1/conv1d"),
    }
    wanted = {"stft.forward_basis_buffer": (6, 4), "onnx::Conv_7": (5, 6)}
    for finding in wc.audit(path, include=[*wanted]).findings:
        matrix = weights[finding.name].reshape(wanted.pop(finding.name)).astype(float)
        assert finding.condition_number == pytest.approx(np.linalg.cond(matrix), rel=1e-6)
    assert not wanted


def test_heads_not_guessed_by_names(tmp_path: Path) -> None:
    names = [f"attn.{one}_proj.weight" for one in "qkvo"]
    nodes = [node("MatMul", f"X {name}", f"Y{at or ''}") for at, name in enumerate(names)]
    path = saved(tmp_path / "a.onnx", nodes, {name: randn(4, 4) for name in names}, (1, 4))
    with pytest.raises(ValueError, match="`heads` requires attention layers"):
        wc.audit(path, heads=True)


# --- dtypes and external data ---------------------------------------------------------------------

KINDS = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
KINDS |= {"COMPLEX64": "complex64", "COMPLEX128": "complex128"}


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_read_like_onnx(tmp_path: Path, kind: str, raw: bool) -> None:
    number = getattr(TensorProto, kind)
    W = randn(3, 5) if "COMPLEX" not in kind else randn(3, 5) + 1j * randn(3, 5, seed=1)
    wide = helper.tensor_dtype_to_np_dtype(number)
    cast = W.astype(wide)
    data = cast.tobytes() if raw else cast.flatten()
    tensor = helper.make_tensor("W", number, (3, 5), data, raw=raw)
    path = saved(tmp_path / "a.onnx", [node("MatMul", "X W")], {"W": tensor}, (1, 3))
    expected = numpy_helper.to_array(tensor)
    expected = expected.astype(np.complex128 if "COMPLEX" in kind else np.float64)
    ((file, _),) = Checkpoint(path).where.values()
    W = file.read("W")
    torch.testing.assert_close(W.to(torch.tensor(expected).dtype), torch.tensor(expected))
    assert str(W.dtype)[6:] == KINDS[kind]
    torch.testing.assert_close(file.read("W", (1, 3)), W[1:3], rtol=0, atol=0)
    torch.testing.assert_close(file.first_row("W"), W[0], rtol=0, atol=0)


CODES: dict[str, tuple[int, tuple[int, ...], dict[str, int], bool]] = {
    # dtype of the codes, shape of the scales, attributes, with or without zero points
    "one scale": (TensorProto.INT8, (), {}, False),
    "one scale and zero point": (TensorProto.UINT8, (), {}, True),
    "per row": (TensorProto.INT8, (6,), {"axis": 0}, True),
    "per column": (TensorProto.INT8, (8,), {"axis": 1}, False),
    "16 bits": (TensorProto.INT16, (8,), {"axis": -1}, True),
    "blocks": (TensorProto.INT8, (6, 2), {"axis": 1, "block_size": 4}, True),
    "blocks of 4 bits": (TensorProto.INT4, (6, 2), {"axis": 1, "block_size": 4}, True),
    "unsigned blocks of 4 bits": (TensorProto.UINT4, (2, 8), {"axis": 0, "block_size": 3}, True),
    "float8": (TensorProto.FLOAT8E4M3FN, (), {}, False),
}


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", CODES)
def test_codes_dequantised_like_operator(tmp_path: Path, name: str, raw: bool) -> None:
    kind, shape, attributes, zeros = CODES[name]
    source = np.random.default_rng(1)
    wide = helper.tensor_dtype_to_np_dtype(kind)
    low, high = (0, 15) if kind == TensorProto.UINT4 else (-8, 7)
    codes = source.integers(low, high, (6, 8)).astype(wide)
    tensor = numpy_helper.from_array(codes, "W")
    if not raw:
        tensor = helper.make_tensor("W", kind, (6, 8), codes.flatten())
    weights = {"W": tensor, "s": source.uniform(0.1, 1, shape).astype(np.float32)}
    if zeros:
        weights["z"] = numpy_helper.from_array(source.integers(0, 4, shape).astype(wide), "z")
    given = "W s z" if zeros else "W s"
    nodes = [node("DequantizeLinear", given, "D", **attributes), node("MatMul", "X D")]
    path = saved(tmp_path / "a.onnx", nodes, weights, (1, 6))
    (finding,) = wc.audit(path).findings
    assert finding.dtype == str(Checkpoint(path).where["W"][1].stored_as) != "float32"
    torch.testing.assert_close(found(path)["W"], action(model(nodes, weights, (1, 6)), (1, 6)))
    why = reasons(path)
    assert set(why.values()) <= {Reason.number, Reason.vector, Reason.scales}
    assert wc.audit(path).coverage.measured == 1


def dynamic(scale: str) -> list[Any]:
    """Dynamic quantisation writes an integer product, followed by both scales."""
    return [
        node("DynamicQuantizeLinear", "X", "q a z"),
        node("MatMulInteger", "q W z w", "i"),
        node("Cast", "i", "f", to=FLOAT),
        node("Mul", f"a {scale}", "s"),
        node("Mul", "f s"),
    ]


def test_integer_product_uses_following_scale(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-9, 9, (3, 5)).astype(np.int8)
    scale, zero = np.linspace(0.1, 1, 5).astype(np.float32), np.array([1, 0, 2, 0, 3], np.int8)
    weights = {"W": codes, "w": zero, "scale": scale}
    path = saved(tmp_path / "a.onnx", dynamic("scale"), weights, (1, 3))
    expected = (codes.astype(np.float64) - zero) * scale
    torch.testing.assert_close(found(path)["W"], torch.tensor(expected.T), rtol=1e-6, atol=0)
    path = saved(tmp_path / "b.onnx", dynamic("a"), weights, (1, 3))
    assert reasons(path)["W"] is Reason.quantised
    assert str(Checkpoint(path).skipped()["W"]) == (
        "quantised, and cannot be dequantised here: MatMulInteger the MatMulInteger has no known "
        "scale for it"
    )


def test_left_integer_product_uses_own_zero_point(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 9, (5, 3)).astype(np.uint8)
    scale, zero = np.float32(0.25), np.uint8(3)
    nodes = [
        node("DynamicQuantizeLinear", "X", "a x z"),
        node("MatMulInteger", "W a w z", "b"),
        node("Cast", "b", "c", to=FLOAT),
        node("Mul", "scale x", "s"),
        node("Mul", "c s"),
    ]
    weights = {"W": codes, "w": np.array(zero), "scale": np.array(scale)}
    path = saved(tmp_path / "a.onnx", nodes, weights, (3, 1))
    expected = (codes.astype(np.float64) - zero) * scale
    torch.testing.assert_close(found(path)["W"], torch.tensor(expected), rtol=1e-6, atol=0)


def test_codes_with_computed_zero_point_are_skipped(tmp_path: Path) -> None:
    first, product, *others = dynamic("scale")
    product = node("MatMulInteger", "q W z z", "i")
    weights = {"W": np.ones((3, 5), np.int8), "scale": np.ones(5, np.float32)}
    path = saved(tmp_path / "a.onnx", [first, product, *others], weights, (1, 3))
    assert reasons(path)["W"] is Reason.quantised


def test_quantised_convolution_is_dequantised(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-9, 9, (4, 3, 2)).astype(np.int8)
    scale = np.linspace(0.1, 1, 4).astype(np.float32)
    nodes = [
        node("QuantizeLinear", "X s u", "q"),
        node("QLinearConv", "q s u W scale zero s u", "r"),
        node("DequantizeLinear", "r s u"),
    ]
    one, unsigned = np.array(0.1, np.float32), np.array(128, np.uint8)
    weights = {"W": codes, "scale": scale, "zero": np.zeros(4, np.int8), "s": one, "u": unsigned}
    path = saved(tmp_path / "a.onnx", nodes, weights, (1, 3, 2))
    expected = codes.reshape(4, 6).astype(np.float64) * scale[:, None]
    torch.testing.assert_close(found(path)["W:kernel"], torch.tensor(expected), rtol=1e-6, atol=0)


def beside(folder: Path, change: Callable[[Any], object] = lambda tensor: None) -> Path:
    """Saves a model with external data that begins at byte 4,096."""
    folder.mkdir(exist_ok=True)
    one = model([node("MatMul", "X W")], {"V": randn(9), "W": randn(30, 50, seed=1)}, (1, 30))
    path = folder / "a.onnx"
    onnx.save(one, path, save_as_external_data=True, location="a.data", size_threshold=0)
    one = onnx.load(path, load_external_data=False)
    change(one.graph.initializer[1])
    path.write_bytes(one.SerializeToString())
    return path


def set_external(tensor: Any, key: str, value: str) -> None:
    for one in list(tensor.external_data):
        if one.key == key:
            tensor.external_data.remove(one)
    tensor.external_data.add(key=key, value=value)


def test_external_data_read_by_rows(tmp_path: Path) -> None:
    path = beside(tmp_path / "a")
    expected = torch.tensor(randn(30, 50, seed=1))
    file, _ = Checkpoint(path).where["W"]
    torch.testing.assert_close(file.read("W"), expected, rtol=0, atol=0)
    torch.testing.assert_close(file.read("W", (3, 9)), expected[3:9], rtol=0, atol=0)
    assert wc.audit(path).findings[0].condition_number == pytest.approx(
        float(torch.linalg.cond(expected.double())), rel=1e-5
    )
    assert wc.audit(path.parent).findings[0].name == "W"  # the path of the folder
    data = path.with_name("a.data")
    data.write_bytes(data.read_bytes() + b"\0")
    with pytest.raises(UnreadableError, match="has changed while it was read"):
        file.read("W")


def test_links_in_cache_are_followed(tmp_path: Path) -> None:
    """A hub stores all files in one folder under other names, and links to them."""
    path = beside(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    (links / "model.onnx").symlink_to(path)
    (links / "a.data").symlink_to(path.with_name("a.data"))
    assert len(wc.audit(links / "model.onnx").findings) == 1


EXTERNAL: dict[str, tuple[Callable[[Any], object], str]] = {
    "no name": (lambda t: set_external(t, "location", ""), "must name a file within"),
    "above": (lambda t: set_external(t, "location", "../secret"), "must name a file within"),
    "absolute": (lambda t: set_external(t, "location", "/etc/passwd"), "must name a file within"),
    "backslash": (lambda t: set_external(t, "location", "..\\secret"), "must name a file within"),
    "a link that leads out": (
        lambda t: set_external(t, "location", "link"),
        "is not a file within",
    ),
    "a folder": (lambda t: set_external(t, "location", "."), "is not a file within"),
    "not there": (lambda t: set_external(t, "location", "b.data"), "external data 'b.data', but"),
    "nul": (lambda t: set_external(t, "location", "b\0"), "this file cannot be read"),
    "too far": (lambda t: set_external(t, "offset", "99999999"), "ends beyond the end of a.data"),
    "negative": (lambda t: set_external(t, "offset", "-4"), "ends beyond the end"),
    "no number": (lambda t: set_external(t, "offset", "four"), "the offset and the length of"),
    "other length": (lambda t: set_external(t, "length", "4"), "must have 6,000 bytes in a.data"),
    "huge": (lambda t: t.dims.__setitem__(0, 1 << 40), "must have 219,902,325,555,200 bytes"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_outside_folder_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, what = EXTERNAL[name]
    (tmp_path / "secret").write_bytes(bytes(6000))
    path = beside(tmp_path / "a", change)
    (path.parent / "link").symlink_to(tmp_path / "secret")
    assert main(["audit", str(path)]) == 2
    err = capsys.readouterr().err
    assert what in err
    assert err.count("\n") == 1


def recursive() -> Any:
    body = [
        helper.make_node("Twice", ["x"], ["z"], domain="local"),
        helper.make_node("Twice", ["z"], ["y"], domain="local"),
    ]
    function = helper.make_function("local", "Twice", ["x"], ["y"], body, [])
    call = helper.make_node("Twice", ["X"], ["Y"], domain="local")
    return model([call], {"W": randn(2, 2)}, functions=[function])


def doubled(times: int) -> Any:
    """Functions that each call the previous one twice: 2^times nodes."""
    functions = []
    for at in range(times):
        kind = "Identity" if not at else f"F{at - 1}"
        body = [
            helper.make_node(kind, ["x"], ["z"], domain="local" if at else ""),
            helper.make_node(kind, ["z"], ["y"], domain="local" if at else ""),
        ]
        functions.append(helper.make_function("local", f"F{at}", ["x"], ["y"], body, []))
    call = helper.make_node(f"F{times - 1}", ["X"], ["Y"], domain="local")
    return model([call], {"W": randn(2, 2)}, functions=functions)


def nested(times: int) -> bytes:
    """Nests graphs in attributes of nodes."""
    graph = b""
    for _ in range(times):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size = bytes([len(graph) & 127 | 128, len(graph) >> 7])
            graph = bytes([field << 3 | 2]) + size + graph
    return b"\x3a" + bytes([len(graph) & 127 | 128, len(graph) >> 7]) + graph


def changed(**fields: Any) -> Any:
    one = model([node("MatMul", "X W")], {"W": randn(3, 5)}, (1, 3))
    tensor = one.graph.initializer[0]
    for name, value in fields.items():
        if isinstance(value, list):
            tensor.ClearField(name)
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return one


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "no graph": (lambda: onnx.ModelProto(ir_version=8), "it has no graph"),
    "too few bytes": (lambda: changed(raw_data=b"1234"), r"W of shape \[3, 5\] must have 60 bytes"),
    "no data": (lambda: changed(raw_data=b""), "must have 60 bytes, but has 0"),
    "huge": (lambda: changed(dims=[1 << 62, 1 << 62]), "must have"),
    "negative": (lambda: changed(dims=[-3, -5]), "has the invalid shape"),
    "recursive functions": (recursive, "are nested too deeply or too often"),
    "functions that call functions": (lambda: doubled(39), "are nested too deeply or too often"),
    "no weights": (lambda: model([node("Identity", "X")], {}), "must contain a weight matrix"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_model_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, what = BROKEN[name]
    path = tmp_path / "a.onnx"
    path.write_bytes(make().SerializeToString())
    assert main(["audit", str(path)]) == 2
    err = capsys.readouterr().err
    assert re.search(what, err)
    assert err.count("\n") == 1


def test_empty_weight_reported_with_own_shape(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.onnx", [node("MatMul", "X W")], {"W": randn(3, 0)}, (1, 3))
    assert str(Checkpoint(path).skipped()["W"]).endswith("it has no entries: shape (3, 0)")


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    data = (DATA / "exported.onnx").read_bytes()
    cases = (b"", b"\xff" * 99, data[:1000], b"\x08\x07\x12\x07pytorch", nested(60))
    for at, bad in enumerate(cases):
        path = tmp_path / f"{at}.onnx"
        path.write_bytes(bad)
        with pytest.raises(UnreadableError, match="is not a valid ONNX model"):
            wc.audit(path)


def test_error_without_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnreadableError, match="Run `pip install onnx`"):
        wc.audit(shutil.copy(DATA / "exported.onnx", tmp_path))
