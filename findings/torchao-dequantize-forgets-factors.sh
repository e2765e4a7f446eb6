#!/usr/bin/env bash
# torchao 0.18.0: after SmoothQuant, `dequantize` does not return the matrix by which the layer
# multiplies.
#
# SmoothQuant divides the inputs of a layer by factors and multiplies the columns of its weight by
# them before it quantises. The Int8Tensor stores the inverse factors as `act_pre_scale`, and the
# layer multiplies its input by them. `Int8Tensor.dequantize()` omits them. Its result is therefore
# not close to the weight that was quantised, and has other singular values.
#
# Seen with torch 2.13.0:
#     weight that was quantised: kappa 3.89
#     dequantize(): kappa 13.49, distance 7.8324 of the norm
#     dequantize() * act_pre_scale: kappa 3.80, distance 0.0333 of the norm
#     error of the layer 0.0068, of a layer with dequantize() 17.4143
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from torch import nn
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 16, bias=False))
W = model[0].weight.detach().clone()
x = torch.randn(64, 32) * torch.logspace(-1.5, 1.5, 32)
base = Int8DynamicActivationInt8WeightConfig()
quantize_(model, SmoothQuantConfig(base, "prepare"))
model(x)
quantize_(model, SmoothQuantConfig(base, "convert"))
weight = model[0].weight
plain = weight.dequantize()
acts = plain * weight.act_pre_scale


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def kappa(one: torch.Tensor) -> float:
    return float(torch.linalg.cond(one))


print(f"weight that was quantised: kappa {kappa(W):.2f}")
print(f"dequantize(): kappa {kappa(plain):.2f}, distance {distance(plain, W):.4f} of the norm")
print(
    f"dequantize() * act_pre_scale: kappa {kappa(acts):.2f}, "
    f"distance {distance(acts, W):.4f} of the norm"
)
y = x @ W.mT
layer, by_plain = distance(model(x), y), distance(x @ plain.mT, y)
print(f"error of the layer {layer:.4f}, of a layer with dequantize() {by_plain:.4f}")
raise SystemExit(0 if distance(plain, W) > 1 and distance(acts, W) < 0.1 and layer < 0.1 else 1)
PYTHON
