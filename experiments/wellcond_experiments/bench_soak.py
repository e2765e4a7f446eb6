"""A long training with injected failures: does the regulariser lose steps or memory?

Gradients become infinite and the scaler skips the step. A weight becomes NaN, the regulariser
raises, and the last saved state is loaded. All objects are discarded and restored from the file.
The benchmark compares the steps counted by the regulariser with those of the optimizer and with its
own count, and the memory at the end with the memory after a warm-up.

It is a benchmark, not a test, because the memory measurement needs its own process.
"""

from __future__ import annotations

import gc
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments.benchmark import Benchmark, count
from wellcond_experiments.command import Advance, replacing
from wellcond_experiments.data import load
from wellcond_experiments.methods import condition_numbers, run_seeded
from wellcond_experiments.tables import Table, number

PHASE = 500  # steps under one mode before the other; at most an eighth of the run
SAVE = 100  # steps between two saves
EVERY = 10  # for attach
BATCH = 32
LOST_GRADIENTS = 0.02  # share of the steps whose gradient is made infinite or NaN
SCALE = 2.0**16  # of the loss; reset, because a scaler halves it at every skipped step
NAN_WEIGHT = 400  # steps between two weights that are made NaN
RESTART = 2500  # steps between two restarts; at most a quarter of the run
MARGIN_BYTES = 20_000_000  # allowed growth: above allocator noise, below a leak
MARGIN_TENSORS = 50
WEIGHTS = ("0.weight", "2.weight")


@dataclass(frozen=True)
class Soak(Benchmark):
    name = "soak"
    help = "a long training with injected failures: lost steps and growth of memory"
    description = (
        "Trains a 64-32-10 network on the digits, alternately with attach and add_gradients, with "
        "non-finite gradients, weights that become NaN, and restarts from a file. The exit code "
        "is 1 if memory grew or step counts differ."
    )
    example = "--steps 20000"

    steps: int = count(20000, "steps of the optimizer")

    @property
    def total(self) -> int:
        return self.steps

    def measure(self, advance: Advance) -> dict[str, Any]:
        restart = min(RESTART, max(1, self.steps // 4))
        warm = max(1, self.steps // 3)  # by then both modes have run, and one restart has happened
        start: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as directory:
            run = Run(Path(directory) / "soak.pt", phase=min(PHASE, max(1, self.steps // 8)))
            kappa = run.kappas()
            for step in range(1, self.steps + 1):
                run.step(spoil=step % NAN_WEIGHT == 0)
                if step % restart == 0 and step < self.steps:
                    run.restart()
                if step == warm:
                    start = memory()
                advance(run.training.mode)
            run.compare_counts()
        training, events, end = run.training, run.events, memory()
        failures = [f"{kind}: {what}" for kind, what in events.faults()]
        for what, margin in (("bytes", MARGIN_BYTES), ("tensors", MARGIN_TENSORS)):
            if (grown := end[what] - start[what]) > margin:
                failures.append(f"memory grew by {grown} {what}, more than {margin}")
        return {
            "settings": {"steps": self.steps, "net": "64-32-10", "batch": BATCH, "every": EVERY}
            | {"restart": restart, "save": SAVE, "phase": training.phase},
            "events": asdict(events),
            "steps_kept": training.done,
            "optimizer_steps": training.optimizer_steps,
            "counts": training.counts(),
            "memory": {"start": start, "end": end, "after": warm}
            | {"margin_bytes": MARGIN_BYTES, "margin_tensors": MARGIN_TENSORS},
            "condition_numbers": {"start": kappa, "end": run.kappas()},
            "failures": failures,
        }

    def title(self, document: dict[str, Any]) -> str:
        return "A long training with injected failures"

    def table(self, document: dict[str, Any]) -> Table:
        """Returns the table of all numbers; failures are counted."""
        rows = []
        for part in ("events", "memory", "condition_numbers"):
            for key, value in flatten(document[part], part):
                rows.append([key, number(len(value) if isinstance(value, list) else value)])
        for row in document["counts"]:
            name = f"steps counted, {row['way']}, {row['weight']}"
            rows.append([name, f"{row['counted']} of {row['applied']}"])
        return Table(self.title(document), ["quantity", "number"], rows)


@dataclass
class Events:
    """Counts of events, and lists of failures."""

    skipped: int = 0
    refused: int = 0
    restarts: int = 0
    redone: int = 0  # steps repeated after loading a file
    unnoticed: list[str] = field(default_factory=list)  # NaN weights without a ValueError
    unprovoked: list[str] = field(default_factory=list)  # NaN gradients that were not injected
    miscounts: list[str] = field(default_factory=list)
    unlike_the_file: list[str] = field(default_factory=list)  # states that loading did not restore

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yields kind and description of every failure."""
        for kind, found in asdict(self).items():
            if isinstance(found, list):
                yield from ((kind, what) for what in found)


class Training:
    """All objects that a restart creates again."""

    def __init__(self, phase: int) -> None:
        self.phase = phase
        self.model = run_seeded(
            lambda: nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10)), 0
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        # Because of Adam, 0.1 in the gradient has about the effect of 100 in a proximal step.
        self.regs = {
            "attach": wc.Regularizer(self.model, wc.ConditionPenalty(30.0), block_size=16),
            "add_gradients": wc.Regularizer(self.model, wc.ConditionPenalty(0.1), block_size=16),
        }
        self.done = 0  # finished steps of the loop, including skipped ones; saved in the file
        self.applied = dict.fromkeys(self.regs, 0)  # applied steps under each mode
        self.mode = ""

    def parts(self) -> dict[str, Any]:
        """Returns all objects with a state."""
        own = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return own | self.regs

    def choose_mode(self) -> None:
        """Switches to the mode whose turn it is."""
        mode = list(self.regs)[self.done // self.phase % len(self.regs)]
        if mode != self.mode:
            self.mode = mode
            self.regs["attach"].detach()
            if mode == "attach":
                self.regs[mode].attach(self.optimizer, every=EVERY)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts().items()}
        with replacing(path) as part:
            torch.save(state | {"done": self.done, "applied": dict(self.applied)}, part)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.done, self.applied = state["done"], state["applied"]
        self.choose_mode()

    def unlike(self, path: Path) -> Iterator[str]:
        """Yields the tensors that differ from the file."""
        state = torch.load(path, weights_only=True)
        for mode, reg in self.regs.items():
            for name, own in reg.state_dict().items():
                for key, value in own.items():
                    if not torch.equal(value, state[mode][name][key]):
                        yield f"{mode} {name} {key} at step {self.done}"
        for name, parameter in self.model.named_parameters():
            if not torch.equal(parameter, state["model"][name]):
                yield f"{name} at step {self.done}"

    def counts(self) -> list[dict[str, Any]]:
        """Returns, per weight and mode, the counted and the expected steps."""
        # add_gradients leaves nothing pending.
        pending = {"attach": self.applied["attach"] % EVERY, "add_gradients": 0}
        return [
            {"weight": name, "way": mode}
            | {"counted": int(state["step"]), "applied": self.applied[mode]}
            | {"pending": int(state["pending_steps"]), "due_pending": pending[mode]}
            for mode, reg in self.regs.items()
            for name, state in reg.state_dict().items()
        ]

    @property
    def optimizer_steps(self) -> int:
        state = self.optimizer.state[self.model.get_parameter(WEIGHTS[0])]
        return int(state["step"]) if state else 0

    @property
    def looks_at_weights(self) -> bool:
        """Whether the regulariser checks the weights in the next step.

        With attach, this is the last step before a proximal step. After a NaN in an earlier step,
        the loss would be NaN, the scaler would skip every step, and no proximal step would follow.
        """
        return self.mode != "attach" or self.applied["attach"] % EVERY == EVERY - 1


class Run:
    """The training loop, its file, and its events."""

    def __init__(self, path: Path, phase: int) -> None:
        images = load("digits")
        self.x = (images.x_train - images.mean) / images.x_train.std()
        self.y = images.y_train
        self.path, self.rng, self.events = path, random.Random(0), Events()
        self.training = Training(phase)
        self.training.save(path)
        self.spoil = False  # whether the next step that checks the weights gets a NaN weight

    def kappas(self) -> dict[str, float]:
        return dict(zip(WEIGHTS, condition_numbers(self.training.model).values(), strict=True))

    def step(self, spoil: bool) -> None:
        """Does one step, and loads or saves the file if necessary."""
        training = self.training
        training.choose_mode()
        self.spoil |= spoil
        if self.spoil and training.looks_at_weights:
            self.spoil = False
            self._train(self.rng.choice(WEIGHTS))
            self.events.redone += 1
            self._reload()
            return
        self._train(None)
        training.done += 1
        if training.done % SAVE == 0:
            self.compare_counts()
            training.save(self.path)

    def restart(self) -> None:
        """Creates all objects again and loads their state."""
        self.events.restarts += 1
        done = self.training.done
        self.training = Training(self.training.phase)
        self.training.done = done
        self._reload()

    def _reload(self) -> None:
        before = self.training.done
        self.training.load(self.path)
        self.events.redone += before - self.training.done
        self.events.unlike_the_file += self.training.unlike(self.path)

    def compare_counts(self) -> None:
        """Compares the step counts of the regularisers, the optimizer and this loop."""
        training, miscounts = self.training, self.events.miscounts
        for row in training.counts():
            if row["counted"] != row["applied"] or row["pending"] != row["due_pending"]:
                miscounts.append(f"at step {training.done}: {row}")
        made, applied = training.optimizer_steps, sum(training.applied.values())
        if made != applied:
            miscounts.append(f"at step {training.done}: optimizer {made}, by hand {applied}")

    def _train(self, spoiled: str | None) -> None:
        """Does one step of the optimizer; `spoiled` names a weight to make NaN before it."""
        training, events, rng = self.training, self.events, self.rng
        optimizer, scaler = training.optimizer, training.scaler
        rows = torch.tensor([rng.randrange(len(self.x)) for _ in range(BATCH)])
        loss = nn.functional.cross_entropy(training.model(self.x[rows]), self.y[rows])
        optimizer.zero_grad()
        lost = spoiled is None and rng.random() < LOST_GRADIENTS
        if lost:
            loss = loss * rng.choice([math.nan, math.inf])
        torch.autograd.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        if spoiled is not None:
            weight = training.model.get_parameter(spoiled)
            with torch.no_grad():
                weight.view(-1)[rng.randrange(weight.numel())] = math.nan
        # The regulariser must not act before a step that the scaler will skip.
        finite = all(
            bool(p.grad.isfinite().all()) for p in training.model.parameters() if p.grad is not None
        )
        before = training.optimizer_steps
        try:
            if training.mode == "add_gradients" and finite:
                training.regs["add_gradients"].add_gradients()
            scaler.step(optimizer)
        except ValueError as refusal:
            if spoiled is None or f'"{spoiled}"' not in str(refusal):
                raise
            events.refused += 1
            return
        finally:
            scaler.update(SCALE)  # required before the next unscale_
        where = f"under {training.mode} at step {training.done}"
        if spoiled is not None:
            events.unnoticed.append(f"NaN in {spoiled} {where}")
            return
        if not finite and not lost:
            events.unprovoked.append(where)
        made = training.optimizer_steps - before
        events.skipped += not made
        if made != (not lost and finite):
            events.miscounts.append(f"the optimizer made {made} steps at step {training.done}")
        training.applied[training.mode] += not lost and finite


def memory() -> dict[str, int]:
    """Returns the resident bytes of the process and the number of live tensors."""
    gc.collect()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return {"bytes": resident_bytes(), "tensors": tensors}


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, in bytes on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")


def flatten(values: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yields nested values with their joined keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{name}, {key}")
        else:
            yield f"{name}, {key}", value
