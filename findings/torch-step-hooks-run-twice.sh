#!/usr/bin/env bash
# torch 2.13.0: step hooks of a subclass of SGD run twice per step once a plain SGD was created.
#
# An optimizer runs the hooks of register_step_post_hook in a wrapper around `step`, which the first
# instance of a class adds to that class. If `step` of a subclass calls `super().step()`, both are
# wrapped as soon as the process has created one plain SGD. The hooks of the subclass then run twice
# per step, even those of an optimizer that was created before. Without a plain SGD they run once.
# Pre hooks and the hooks of register_optimizer_step_post_hook behave in the same way.
#
# Seen:
#     before a plain SGD was made: hooks per step: 1 pre, 1 post, 1 global
#     after a plain SGD was made: hooks per step: 2 pre, 2 post, 2 global
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from collections import Counter

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Logged(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def made(cls: type[torch.optim.SGD]) -> torch.optim.SGD:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    return cls([parameter], lr=0.1)


def hooks_of_a_step(optimizer: torch.optim.SGD) -> dict[str, int]:
    calls.clear()
    optimizer.step()
    return dict(calls)


calls: Counter[str] = Counter()
optimizer = made(Logged)
optimizer.register_step_pre_hook(lambda *_: calls.update(["pre"]))
optimizer.register_step_post_hook(lambda *_: calls.update(["post"]))
register_optimizer_step_post_hook(lambda *_: calls.update(["global"]))
found = {"before": hooks_of_a_step(optimizer)}
made(torch.optim.SGD)
found["after"] = hooks_of_a_step(optimizer)
for when, counts in found.items():
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{when} a plain SGD was made: hooks per step: {listed}")
once, twice = ({kind: n for kind in ("pre", "post", "global")} for n in (1, 2))
raise SystemExit(0 if found == {"before": once, "after": twice} else 1)
PYTHON
