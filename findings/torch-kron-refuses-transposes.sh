#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.kron raises a RuntimeError if one operand is a transpose.
#
# torch.kron(A, B) works for two row-major matrices and for two transposes. For a row-major matrix
# and a transpose, in either order, it raises "view size is not compatible with input tensor's size
# and stride". Its documentation states no condition on strides, and numpy.kron accepts all four
# combinations. A transpose works after .contiguous(), except with a single column or row: its
# strides count as contiguous, so nothing is copied.
#
# Seen:
#     rows, rows: as numpy
#     rows, transpose: RuntimeError
#     transpose, rows: RuntimeError
#     transpose, transpose: as numpy
#     rows, transpose after contiguous(): as numpy
#     one row of a transpose after contiguous(), transpose: RuntimeError
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import torch

X = torch.arange(12.0).reshape(4, 3)
cases = {
    "rows, rows": (X, X),
    "rows, transpose": (X, X.T),
    "transpose, rows": (X.T, X),
    "transpose, transpose": (X.T, X.T),
    "rows, transpose after contiguous()": (X, X.T.contiguous()),
    "one row of a transpose after contiguous(), transpose": (X[:, :1].T.contiguous(), X.T),
}
found = []
for name, (A, B) in cases.items():
    try:
        equal = numpy.array_equal(torch.kron(A, B).numpy(), numpy.kron(A.numpy(), B.numpy()))
        found.append("as numpy" if equal else "not as numpy")
    except RuntimeError:
        found.append("RuntimeError")
    print(f"{name}: {found[-1]}")
seen = ["as numpy", "RuntimeError", "RuntimeError", "as numpy", "as numpy", "RuntimeError"]
raise SystemExit(0 if found == seen else 1)
PYTHON
