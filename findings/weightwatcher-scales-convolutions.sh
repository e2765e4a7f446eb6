#!/usr/bin/env bash
# weightwatcher 0.7.7 (torch 2.13.0): analyze() divides the singular values of a convolution by
# sqrt(2), for every kernel size, and does not divide those of a linear layer.
#
# A 1x1 convolution multiplies each pixel by the same matrix as a linear layer with these weights.
# With the default settings (conv2d_norm=True) sv_max and sv_min of the convolution are smaller by a
# factor of sqrt(2), so that rows of one table cannot be compared. For a larger kernel the library
# decomposes the matrix of each tap separately, with the same factor.
#
# Seen, for a matrix with singular values from 2 to 0.5:
#     linear 2 0.5; 1x1 convolution 1.414214 0.3535534; 3x3 with one nonzero tap 1.414214
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 weightwatcher==0.7.7 setuptools
"$folder/venv/bin/python" - <<'PROGRAM'
import logging

import torch
import weightwatcher

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
U = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
V = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
W = (U * torch.linspace(2, 0.5, 64, dtype=torch.float64)) @ V
linear = torch.nn.Linear(64, 64, bias=False)
point = torch.nn.Conv2d(64, 64, 1, bias=False)
tap = torch.nn.Conv2d(64, 64, 3, bias=False)
with torch.no_grad():
    linear.weight.copy_(W)
    point.weight.copy_(W[:, :, None, None])
    tap.weight.zero_()
    tap.weight[:, :, 1, 1] = W
found = []
for layer in (linear, point, tap):
    table = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer)).analyze(min_evals=10)
    found.append((float(table.sv_max[0]), float(table.sv_min[0])))
(a, b), (c, d), (e, _) = found
print(f"linear {a:.7g} {b:.7g}; 1x1 convolution {c:.7g} {d:.7g}; 3x3 with one nonzero tap {e:.7g}")
root = 2**0.5
assert abs(a - 2) < 1e-5 and abs(b - 0.5) < 1e-5
assert abs(c - 2 / root) < 1e-5 and abs(d - 0.5 / root) < 1e-5 and abs(e - 2 / root) < 1e-5
PROGRAM
