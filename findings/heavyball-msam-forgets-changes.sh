#!/usr/bin/env bash
# heavyball 3.2.1: MSAMLaProp discards every change of the weights between its steps.
#
# Its state contains a second copy of the weights, made at the first step. Each step updates this
# copy and overwrites the weights with it. `optimizer.eval()`, which according to its documentation
# swaps in the evaluation weights and must be called before validation, also copies it to the
# weights. Neither reads the weights; only the gradient depends on them. A projection, a clamp or a
# loaded state dict after the first step is therefore lost. AdamW of the same package keeps it.
#
# Seen with torch 2.13.0, condition number of a 64 x 64 weight that is set to 10 after each step:
#     MSAMLaProp  as set: 10   after the next step: 1.8e+04   or after eval(): 1.8e+03
#     AdamW       as set: 10   after the next step: 10
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 heavyball==3.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import heavyball
import torch
from heavyball import utils

utils.compile_mode = None


class Task:
    def __init__(self, kind: type) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(64, 64) / 8)
        self.inputs, self.targets = torch.randn(256, 64), torch.randn(256, 64)
        self.optimizer = kind([self.weight], lr=1e-3)

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.inputs @ self.weight - self.targets).square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def set_to_10(self) -> None:
        u, s, vh = torch.linalg.svd(self.weight)
        self.weight.copy_(u * s.clamp(min=s.max() / 10) @ vh)

    def kappa(self) -> float:
        return float(torch.linalg.cond(self.weight.detach().double()))


def changed(kind: type) -> tuple[Task, float]:
    task = Task(kind)
    for _ in range(10):
        task.step()
        task.set_to_10()
    return task, task.kappa()


found = []
for kind in (heavyball.MSAMLaProp, heavyball.AdamW):
    task, as_set = changed(kind)
    task.step()
    line = f"{kind.__name__:<10}  as set: {as_set:.2g}   after the next step: {task.kappa():.2g}"
    found += [as_set, task.kappa()]
    if kind is heavyball.MSAMLaProp:
        task, _ = changed(kind)
        task.optimizer.eval()
        line += f"   or after eval(): {task.kappa():.2g}"
        found.append(task.kappa())
    print(line)
set_1, stepped, evaluated, set_2, kept = found
lost = min(stepped, evaluated) > 100
raise SystemExit(0 if lost and max(set_1, set_2) < 10.1 and kept < 12 else 1)
PYTHON
