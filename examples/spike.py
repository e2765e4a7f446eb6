"""The loss does not decrease: which weight is responsible, and what helps?

A small GPT-2 learns the characters of Python's help texts in 250 steps of AdamW, with a learning
rate of 2e-2, which is too high, and without clipping. The script then audits the model and compares
it with its initial weights. It needs transformers.

    python examples/spike.py --save spike
    wellcond audit spike/before --compare spike/after
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import wellcond as wc

TEXT = "".join(topics.values())[:300_000]
LETTERS = sorted(set(TEXT))
WIDTH, LENGTH, BATCH, STEPS, RATE = 128, 64, 16, 250, 2e-2


def make_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(LETTERS),
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, rules: wc.Limit | None = None) -> float:
    """Trains and returns the mean loss of the last five steps.

    The learning rate decreases linearly, as in the Trainer of transformers.
    """
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    if rules is not None:
        reg = wc.Regularizer(model, rules)
        reg.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.mean(losses[-5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=10, help="the first seed")
    parser.add_argument("--save", help="a folder for the models of the first seed")
    arguments = parser.parse_args()
    answered = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        model = make_model(seed)
        before = copy.deepcopy(model)
        loss = train(model)
        if arguments.save and seed == arguments.first:
            before.save_pretrained(f"{arguments.save}/before")
            model.save_pretrained(f"{arguments.save}/after")
        limited = train(make_model(seed), wc.SingularValueLimit(upper=1.5))
        report = wc.audit(model)
        comparison = wc.compare(before, model, names=("before", "after"))
        first = str(report).splitlines()[:3]
        name = first[0].partition(":")[0]
        start = {finding.label: finding.sigma_max for finding in wc.audit(before).findings}
        end = {finding.label: finding.sigma_max for finding in report.findings}
        growth = end[name] / start[name] if name in start else 1.0
        moved = comparison.pairs[0].label
        good = growth > 10 and "SingularValueLimit" in first[0] and end[moved] > 10 * start[moved]
        answered += good
        print(f"seed {seed}: loss {loss:.2f}, with SingularValueLimit(upper=1.5) {limited:.2f}")
        print(*(f"    {line[:150]}" for line in first), sep="\n")
        print(f"    the flagged σ_max has grown {growth:.0f} times")
        print(f"    comparison: {comparison.summary()[0][:150]}")
    print(f"answered on {answered} of {arguments.seeds} seeds")


if __name__ == "__main__":
    main()
