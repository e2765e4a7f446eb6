#!/usr/bin/env bash
# torch 2.13.0: torch.nn.utils.weight_norm on the out_proj of MultiheadAttention has no effect.
#
# The (deprecated) weight_norm recomputes `weight` from weight_g and weight_v in a forward pre-hook.
# MultiheadAttention reads out_proj.weight and never calls out_proj, so the weight keeps its value
# from the time of wrapping. The first backward pass gives weight_g and weight_v gradients, a step
# changes both, and a state dict loads with all keys matched, but the output does not change. The
# second backward pass raises a RuntimeError (backward through the graph a second time); loading for
# inference raises nothing. torch.nn.utils.parametrizations.weight_norm behaves as expected.
#
# Seen, largest change of the output (of a module with other values in out_proj for the load):
#     utils.weight_norm: after a step 0.00, after load_state_dict 0.00
#         second backward raises: True
#     utils.parametrizations.weight_norm: after a step 1.08, after load_state_dict 1.14
#         second backward raises: False
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore::FutureWarning - <<'PYTHON'
import torch
from torch.nn import utils


def attention(norm, seed: int) -> torch.nn.MultiheadAttention:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    torch.manual_seed(seed)
    torch.nn.init.xavier_uniform_(module.out_proj.weight)
    norm(module.out_proj)
    return module


def changes(norm) -> tuple[float, float, bool]:
    module, other = attention(norm, 0), attention(norm, 1)
    inputs = torch.randn(2, 5, 16)
    trained = [p for name, p in module.out_proj.named_parameters() if name != "bias"]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    start = module(inputs, inputs, inputs)[0]
    start.square().sum().backward()
    assert len(trained) == 2 and all(p.grad.any() for p in trained)
    optimizer.step()
    stepped = module(inputs, inputs, inputs)[0]
    try:
        stepped.square().sum().backward()
        raised = False
    except RuntimeError:
        raised = True
    assert not any(module.load_state_dict(other.state_dict()))
    loaded = module(inputs, inputs, inputs)[0]
    first, second = stepped - start, loaded - stepped
    return first.abs().max().item(), second.abs().max().item(), raised


found = {}
for name, norm in {
    "utils.weight_norm": utils.weight_norm,
    "utils.parametrizations.weight_norm": utils.parametrizations.weight_norm,
}.items():
    step, load, raised = found[name] = changes(norm)
    print(f"{name}: after a step {step:.2f}, after load_state_dict {load:.2f}")
    print(f"    second backward raises: {raised}")
old, new = found.values()
raise SystemExit(0 if old == (0, 0, True) and min(new[:2]) > 0.01 and not new[2] else 1)
PYTHON
