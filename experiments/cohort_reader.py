"""Converts weights of formats that wellcond does not read: FILE OUT.safetensors.

Runs in a separate environment with onnx, h5py, numpy and safetensors, and runs no code of a file.
Matrices are written in the layout of PyTorch: outputs first, and the gates of an LSTM in the order
i, f, g, o, those of a GRU in the order r, z, n. Names end like those of PyTorch modules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Named = Iterator[tuple[str, np.ndarray]]
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}  # ONNX gates in the order of PyTorch


def read_onnx(path: Path) -> Named:
    """Yields the weights of convolutions, matrix products and recurrent layers only."""
    import onnx

    yield from _read_graph(onnx.load(path).graph, {})


def _read_graph(graph: Any, outer: dict[str, np.ndarray]) -> Named:
    from onnx import numpy_helper

    known = outer | {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        options = {one.name: one for one in node.attribute}
        if node.op_type == "Constant" and "value" in options:
            known[node.output[0]] = numpy_helper.to_array(options["value"].t)
        elif node.op_type in ("Identity", "Cast") and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
        for one in options.values():
            for inner in [one.g] if one.HasField("g") else one.graphs:
                yield from _read_graph(inner, known)
        weights = [known.get(name) for name in node.input]
        names = dict(enumerate(node.input))
        if node.op_type in ("Conv", "ConvTranspose") and weights[1] is not None:
            yield f"{names[1]}.{node.op_type.lower()}.weight", weights[1]
        elif node.op_type == "Gemm" and weights[1] is not None:
            turned = "transB" in options and options["transB"].i
            yield f"{names[1]}.linear.weight", weights[1] if turned else weights[1].T
        elif node.op_type == "MatMul":
            for side, weight in enumerate(weights):
                if weight is not None and weight.ndim == 2:
                    yield f"{names[side]}.linear.weight", weight.T if side else weight
        elif node.op_type in _GATES:
            order = _GATES[node.op_type]
            for weight, name in zip(weights[1:3], ("ih", "hh"), strict=True):
                for direction, W in enumerate(() if weight is None else weight):
                    gates = np.split(W, len(order))
                    end = "_reverse" if direction else ""
                    stem = f"{names[1]}.{node.op_type.lower()}.weight_{name}_l0{end}"
                    yield stem, np.concatenate([gates[gate] for gate in order])


def read_h5(path: Path) -> Named:
    """Yields the kernels of Keras, in which outputs are the last dimension."""
    import h5py

    arrays: list[tuple[str, np.ndarray]] = []

    def visit(name: str, item: Any) -> None:
        of_model = not name.startswith("optimizer_weights")
        if of_model and isinstance(item, h5py.Dataset) and item.ndim > 1:
            arrays.append((name, item[()]))

    with h5py.File(path) as file:
        file.visititems(visit)
    for name, W in arrays:
        kind = "linear" if W.ndim == 2 else "conv"
        yield f"{name}.{kind}.weight", np.moveaxis(W, (-1, -2), (0, 1))


def read_npz(path: Path) -> Named:
    for name, W in np.load(path, allow_pickle=False).items():
        if W.ndim == 2:
            recurrent = re.sub(r"_w_([ih]h)$", r".weight_\1_l0", name)
            yield f"{name}.weight" if recurrent == name else recurrent, W


READERS = {".onnx": read_onnx, ".h5": read_h5, ".hdf5": read_h5, ".npz": read_npz}


def main() -> None:
    from safetensors.numpy import save_file

    source, target = map(Path, sys.argv[1:])
    found: dict[str, np.ndarray] = {}
    for name, W in READERS[source.suffix](source):
        if W.dtype.kind == "f" and W.ndim > 1 and name not in found:
            found[name] = np.ascontiguousarray(W, dtype=np.float32)
    save_file(found, target)
    print(len(found))


if __name__ == "__main__":
    main()
