#!/usr/bin/env bash
# torch 2.13.0, CPU: the result of torch.linalg.eigh for a NaN depends on the size of the matrix.
#
# For a symmetric float32 matrix whose first entry is NaN, it returns finite eigenvalues for size 2
# and NaN for sizes 1 and 32, and raises a LinAlgError for sizes 3, 8, 16 and 24. For a stack, this
# error also prevents the results of the other matrices. Neither an exception nor the eigenvalues
# therefore show whether the input was finite. The documentation does not mention NaN.
#
# Seen:
#     size  1: NaN
#     size  2: finite
#     size  3: error
#     size  8: error
#     size 16: error
#     size 24: error
#     size 32: NaN
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
found = {}
for size in (1, 2, 3, 8, 16, 24, 32):
    X = torch.randn(2, size, size)
    A = X @ X.mT
    A[1, 0, 0] = torch.nan
    try:
        values = torch.linalg.eigh(A).eigenvalues[1]
        found[size] = "NaN" if values.isnan().any() else "finite"
    except torch.linalg.LinAlgError:
        found[size] = "error"
    print(f"size {size:2}: {found[size]}")
seen = ["NaN", "finite", "error", "error", "error", "error", "NaN"]
raise SystemExit(0 if list(found.values()) == seen else 1)
PYTHON
