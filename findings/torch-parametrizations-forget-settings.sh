#!/usr/bin/env bash
# torch 2.13.0: state dicts of orthogonal and spectral_norm do not determine the weight.
#
# torch.nn.utils.parametrizations.orthogonal stores `original` and `0.base`, but not its map
# (matrix_exp, cayley or householder). spectral_norm stores `original`, `0._u` and `0._v`, but not
# its dim. A state dict loads into a layer with another map, or with another dim if the weight is
# square, with all keys matched, but gives a different weight. Convolutions have dim 0 and
# transposed convolutions dim 1, so a file does not determine the scale of a square kernel.
#
# Seen, largest difference of the weights after load_state_dict:
#     orthogonal, householder into the default: all keys matched, 1.05
#     orthogonal, cayley into the default: all keys matched, 0.22
#     spectral_norm, dim 1 into the default: all keys matched, 2.34
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm


def difference(norm, **settings) -> tuple[bool, float]:
    torch.manual_seed(0)
    saved, loaded = norm(nn.Linear(6, 6), **settings), norm(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        saved(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    keys = loaded.load_state_dict(saved.state_dict())
    gap = saved.eval().weight - loaded.eval().weight
    return not any(keys), gap.abs().max().item()


found = {
    "orthogonal, householder": difference(orthogonal, orthogonal_map="householder"),
    "orthogonal, cayley": difference(orthogonal, orthogonal_map="cayley"),
    "spectral_norm, dim 1": difference(spectral_norm, dim=1),
}
for name, (matched, gap) in found.items():
    print(f"{name} into the default: {'all keys matched' if matched else 'refused'}, {gap:.2f}")
raise SystemExit(0 if all(matched and gap > 0.01 for matched, gap in found.values()) else 1)
PYTHON
