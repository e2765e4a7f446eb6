"""A long training in which everything goes wrong now and then: does regularising lose anything?

Gradients turn infinite and the scaler skips the step; a weight turns NaN, regularising refuses it,
and the last saved state is loaded; everything is thrown away and made anew from the file. The steps
that the state of the regulariser has counted are compared with those that the optimizer made and
with those counted by hand, and memory at the end with memory after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.text import and_more, dump_json
from wellcond_experiments import _run
from wellcond_experiments.data import Images, load
from wellcond_experiments.methods import condition_numbers, seeded
from wellcond_experiments.tables import Table, number

PHASE = 500  # steps under one way of regularising, before the other; at most an eighth of the run
SAVE = 100  # steps from one file to the next
EVERY = 10  # for attach
BATCH = 32
LOST_GRADIENTS = 0.02  # the share of steps whose gradient is made infinite or NaN
SCALE = 2.0**16  # of the loss; kept, as a scaler halves it at every step that it skips
NAN_WEIGHT = 400  # steps from one weight that is made NaN to the next
RESTART = 2500  # steps from one restart to the next; at most a quarter of the run
MARGIN_BYTES = 20_000_000  # by which memory may grow: an allocator's noise, below a leak's
MARGIN_TENSORS = 50
SHOWN = 10  # failures in the table; the document has all
WEIGHTS = ("0.weight", "2.weight")


def configure(benchmarks: Any) -> None:
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "soak",
        help="a long training with failures: steps lost, memory gained",
        description="Trains a 64-32-10 net on the digits, by attach and by add_gradients in turn, "
        "with gradients that are not finite, weights that turn NaN and restarts from a file. Exit "
        "code 1 if memory grew or a step count does not agree.",
        epilog="example: wellcond bench soak --steps 20000",
    )
    parser.add_argument("--steps", type=_run.positive, default=20000, help="default 20000")
    _run.add_output(parser)
    parser.set_defaults(run=run)


class _Training:
    """Everything that a restart makes anew."""

    def __init__(self, phase: int) -> None:
        self.phase = phase
        self.model = seeded(
            lambda: nn.Sequential(nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10)), 0
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        # Through Adam 0.1 acts about as 100 does in a proximal step.
        self.ways = {
            "attach": wc.Regularizer(self.model, wc.ConditionPenalty(30.0), block_size=16),
            "add_gradients": wc.Regularizer(self.model, wc.ConditionPenalty(0.1), block_size=16),
        }
        self.done = 0  # steps of the loop up to here, skipped ones too; kept in the file
        self.applied = dict.fromkeys(self.ways, 0)  # of these, steps made under each way
        self.way = ""

    def parts(self) -> dict[str, Any]:
        own = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return own | self.ways

    def turn(self) -> None:
        """To the way of regularising whose turn it is."""
        way = list(self.ways)[self.done // self.phase % len(self.ways)]
        if way != self.way:
            self.way = way
            self.ways["attach"].detach()
            if way == "attach":
                self.ways[way].attach(self.optimizer, every=EVERY)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"done": self.done, "applied": dict(self.applied)}
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.done, self.applied = state["done"], state["applied"]

    def counts(self) -> list[dict[str, Any]]:
        """Per weight and way: steps in the state of the regulariser, and those it should be."""
        rows = []
        # add_gradients leaves nothing pending.
        pending = {"attach": self.applied["attach"] % EVERY, "add_gradients": 0}
        for way, reg in self.ways.items():
            for name, state in reg.state_dict().items():
                rows.append(
                    {"weight": name, "way": way}
                    | {"counted": int(state["step"]), "applied": self.applied[way]}
                    | {"pending": int(state["pending_steps"]), "due_pending": pending[way]}
                )
        return rows

    def optimizer_steps(self) -> int:
        state = self.optimizer.state[self.model.get_parameter(WEIGHTS[0])]
        return int(state["step"]) if state else 0


@dataclass
class _Events:
    """What happened, and what should not have."""

    skipped: int = 0
    refused: int = 0
    restarts: int = 0
    redone: int = 0  # steps since the last file, lost by loading it and made again
    unnoticed: list[str] = field(default_factory=list)  # NaN weights that no ValueError named
    unprovoked: list[str] = field(default_factory=list)  # gradients that turned NaN by themselves
    miscounts: list[str] = field(default_factory=list)
    unlike_the_file: list[str] = field(default_factory=list)  # states that loading did not restore


def _kappas(model: nn.Module) -> dict[str, float]:
    return dict(zip(WEIGHTS, condition_numbers(model).values(), strict=True))


def run(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    images = load("digits")
    with tempfile.TemporaryDirectory() as directory:
        document = _soak(images, arguments.steps, Path(directory) / "soak.pt")
    document["versions"] = _run.versions()
    events, memory = document["events"], document["memory"]
    failures = [f"{kind}: {what}" for kind in _FAULTS for what in events[kind]]
    for what, margin in (("bytes", MARGIN_BYTES), ("tensors", MARGIN_TENSORS)):
        grown = memory["end"][what] - memory["start"][what]
        if grown > margin:
            failures.append(f"memory grew by {grown} {what}, more than {margin}")
    document["failures"] = failures
    if arguments.json:
        print(dump_json(document), end="")
    else:
        _print(document)
    return 1 if failures else 0


_FAULTS = ("unnoticed", "unprovoked", "miscounts", "unlike_the_file")


def _soak(images: Images, steps: int, path: Path) -> dict[str, Any]:
    x = (images.x_train - images.mean) / images.x_train.std()
    rng, events = random.Random(0), _Events()
    phase = min(PHASE, max(1, steps // 8))
    training = _Training(phase)
    kappa_before = _kappas(training.model)
    training.save(path)
    restart = min(RESTART, max(1, steps // 4))
    warm = max(1, steps // 3)  # by then both ways have run, and a restart has been made
    spoil = False  # a NaN is due in a weight, at the next step that would see it
    start: dict[str, int] = {}
    with _run.progress(steps, "bench soak") as advance:
        for step in range(1, steps + 1):
            training.turn()
            spoil = spoil or step % NAN_WEIGHT == 0
            name = _spoiled(training, rng, spoil)
            if _step(training, x, images.y_train, rng, name, events):
                spoil = False
                events.redone += training.done + 1
                _reload(training, path, events)
                events.redone -= training.done
            else:
                training.done += 1
                if training.done % SAVE == 0:
                    _compare(training, events)
                    training.save(path)
            if step % restart == 0 and step < steps:
                events.restarts += 1
                events.redone += training.done
                training = _Training(phase)
                _reload(training, path, events)
                events.redone -= training.done
            if step == warm:
                start = _memory()
            advance(training.way)
    _compare(training, events)
    return {
        "benchmark": "soak",
        "settings": {"steps": steps, "net": "64-32-10", "batch": BATCH, "every": EVERY}
        | {"restart": restart, "save": SAVE, "phase": phase},
        "events": asdict(events),
        "steps_kept": training.done,
        "optimizer_steps": training.optimizer_steps(),
        "counts": training.counts(),
        "memory": {"start": start, "end": _memory(), "after": warm}
        | {"margin_bytes": MARGIN_BYTES, "margin_tensors": MARGIN_TENSORS},
        "condition_numbers": {"start": kappa_before, "end": _kappas(training.model)},
    }


def _spoiled(training: _Training, rng: random.Random, due: bool) -> str | None:
    """The weight to make NaN in this step, if it is one in which regularising looks at weights.

    With attach that is the last step before a proximal one: later the loss is NaN, the scaler skips
    every step, and no proximal step comes to see it.
    """
    if not due:
        return None
    if training.way == "attach" and training.applied["attach"] % EVERY != EVERY - 1:
        return None
    return rng.choice(WEIGHTS)


def _step(
    training: _Training,
    x: Tensor,
    y: Tensor,
    rng: random.Random,
    spoiled: str | None,
    events: _Events,
) -> bool:
    """One step of the loop; True if a weight was refused and the file has to be loaded."""
    optimizer, scaler = training.optimizer, training.scaler
    rows = torch.tensor([rng.randrange(len(x)) for _ in range(BATCH)])
    loss = nn.functional.cross_entropy(training.model(x[rows]), y[rows])
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
    # Before a step that the scaler is going to skip nothing is to be added, nor counted.
    finite = all(
        bool(p.grad.isfinite().all()) for p in training.model.parameters() if p.grad is not None
    )
    try:
        if training.way == "add_gradients" and finite:
            training.ways["add_gradients"].add_gradients()
        before = training.optimizer_steps()
        scaler.step(optimizer)
    except ValueError as refusal:
        if spoiled is None or f'"{spoiled}"' not in str(refusal):
            raise
        events.refused += 1
        scaler.update(SCALE)  # or it will not unscale again
        return True
    scaler.update(SCALE)
    if spoiled is not None:
        events.unnoticed.append(f"NaN in {spoiled} under {training.way} at step {training.done}")
        return True
    if not finite and not lost:
        events.unprovoked.append(f"under {training.way} at step {training.done}")
    made = training.optimizer_steps() - before
    events.skipped += not made
    if made != (not lost and finite):
        events.miscounts.append(f"the optimizer made {made} steps at step {training.done}")
    training.applied[training.way] += not lost and finite
    return False


def _reload(training: _Training, path: Path, events: _Events) -> None:
    """Loads the file, and sees that every tensor is then as it is in the file."""
    training.load(path)
    training.turn()
    state = torch.load(path, weights_only=True)
    for way, reg in training.ways.items():
        for name, own in reg.state_dict().items():
            for key, value in own.items():
                if not torch.equal(value, state[way][name][key]):
                    events.unlike_the_file.append(f"{way} {name} {key} at step {training.done}")
    for name, parameter in training.model.named_parameters():
        if not torch.equal(parameter, state["model"][name]):
            events.unlike_the_file.append(f"{name} at step {training.done}")


def _compare(training: _Training, events: _Events) -> None:
    for row in training.counts():
        if row["counted"] != row["applied"] or row["pending"] != row["due_pending"]:
            events.miscounts.append(f"at step {training.done}: {row}")
    made, applied = training.optimizer_steps(), sum(training.applied.values())
    if made != applied:
        events.miscounts.append(f"at step {training.done}: optimizer {made}, by hand {applied}")


def _memory() -> dict[str, int]:
    """Resident bytes of the process, and tensors that are alive."""
    gc.collect()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return {"bytes": _resident_bytes(), "tensors": tensors}


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, in bytes on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")


def _print(document: dict[str, Any]) -> None:
    events, memory, kappa = (document[key] for key in ("events", "memory", "condition_numbers"))
    start, end = memory["start"], memory["end"]
    rows = [
        ["steps", str(document["settings"]["steps"])],
        ["  skipped, gradient not finite", str(events["skipped"])],
        ["  made again after loading", str(events["redone"])],
        ["NaN weights refused by name", str(events["refused"])],
        ["NaN weights unnoticed", str(len(events["unnoticed"]))],
        ["gradients lost by themselves", str(len(events["unprovoked"]))],
        ["restarts from the file", str(events["restarts"])],
        ["states unlike the file", str(len(events["unlike_the_file"]))],
        ["counts that do not agree", str(len(events["miscounts"]))],
        ["optimizer steps", str(document["optimizer_steps"])],
        *(
            [f"  counted, {row['way']}, {row['weight']}", f"{row['counted']} of {row['applied']}"]
            for row in document["counts"]
        ),
        [f"resident MB after {memory['after']} steps", f"{start['bytes'] / 1e6:.1f}"],
        ["resident MB at the end", f"{end['bytes'] / 1e6:.1f}"],
        ["tensors alive, then and at the end", f"{start['tensors']}, {end['tensors']}"],
        *(
            [f"kappa of {name}, start and end", f"{number(before)}, {number(after)}"]
            for name, before, after in zip(
                WEIGHTS, kappa["start"].values(), kappa["end"].values(), strict=True
            )
        ),
    ]
    Table("A long training with failures", ["what", "number"], rows).print()
    if document["failures"]:
        print(f"FAILED {and_more(document['failures'], SHOWN, separator='; ')}")
