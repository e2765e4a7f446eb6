#!/usr/bin/env bash
# peft 0.21.2: by default, the matrix R of OFT is not a rotation.
#
# OFT is described as a multiplication by an orthogonal matrix, which keeps all singular values of
# the weight. By default, with `use_cayley_neumann=True`, PEFT truncates the Neumann series of the
# Cayley transform after five terms. If the entries of the skew-symmetric matrix are of order 0.1,
# merging makes an orthogonal weight non-orthogonal. With `use_cayley_neumann=False`, the weight
# stays orthogonal.
#
# Seen with torch 2.13.0, condition number of an orthogonal weight after the merge:
#     use_cayley_neumann=True   entries 0.02: 1.000   entries 0.1: 1.5
#     use_cayley_neumann=False  entries 0.02: 1.000   entries 0.1: 1.000
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch


def condition_number(exact: bool, scale: float) -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    torch.nn.init.orthogonal_(model[0].weight)
    config = peft.OFTConfig(
        oft_block_size=16, r=0, target_modules=["0"], use_cayley_neumann=not exact
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "oft_R" in name:
                parameter.copy_(scale * torch.randn_like(parameter))
    merged = adapted.merge_and_unload()
    return float(torch.linalg.cond(merged[0].weight.detach().double()))


found = {(e, s): condition_number(e, s) for e in (False, True) for s in (0.02, 0.1)}
for (exact, scale), kappa in found.items():
    print(f"use_cayley_neumann={not exact}  entries {scale}: {kappa:.4f}")
rotations = all(kappa < 1.002 for (exact, scale), kappa in found.items() if exact or scale < 0.1)
raise SystemExit(0 if rotations and found[False, 0.1] > 1.2 else 1)
PYTHON
