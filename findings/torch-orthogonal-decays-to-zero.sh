#!/usr/bin/env bash
# torch 2.13.0: with the householder map of orthogonal, weight decay makes the weight zero in one
# step.
#
# torch.nn.utils.parametrizations.orthogonal uses the map "householder" by default for every real
# matrix that is not square. The diagonal of the parameter is 1 or -1 and receives no gradient. The
# map multiplies the columns by this diagonal, converted to int. Weight decay moves an entry to
# -0.99999, and the conversion makes it 0. The entire weight is zero after the first step, without a
# warning. A state dict that is saved then also gives a zero weight. matrix_exp and cayley do not
# read the diagonal.
#
# Seen, singular values of a Linear(4, 6) after one step of AdamW with its default decay:
#     default: 0, 0, 0, 0
#     matrix_exp: 1, 1, 1, 1
#     cayley: 1, 1, 1, 1
#     default without decay: 1, 1, 1, 1
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal


def values_after_a_step(decay: float, **settings: str) -> list[float]:
    torch.manual_seed(0)
    layer = orthogonal(nn.Linear(4, 6), **settings)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=decay)
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return torch.linalg.svdvals(layer.weight.detach()).tolist()


found = {
    "default": values_after_a_step(0.01),
    "matrix_exp": values_after_a_step(0.01, orthogonal_map="matrix_exp"),
    "cayley": values_after_a_step(0.01, orthogonal_map="cayley"),
    "default without decay": values_after_a_step(0.0),
}
for name, values in found.items():
    print(f"{name}: {', '.join(f'{value:.4g}' for value in values)}")
zero, *others = found.values()
one = all(abs(value - 1) < 1e-5 for values in others for value in values)
raise SystemExit(0 if not any(zero) and one else 1)
PYTHON
