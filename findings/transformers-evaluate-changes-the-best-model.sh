#!/usr/bin/env bash
# transformers 5.24.0: Trainer.evaluate() changes a schedule-free model that was loaded as the best.
#
# With `optim="schedule_free_adamw"`, an evaluation calls `optimizer.eval()`, which replaces the
# training weights by the averaged ones if the optimizer is in training mode.
# `load_best_model_at_end` loads the averaged weights of the best checkpoint but does not change the
# mode. If a callback stops training (control.should_training_stop) after a step without an
# evaluation, the optimizer is in training mode, and the next `evaluate()` transforms the loaded
# weights again. They then differ from those of the checkpoint, and the loss is not the best one. A
# run that ends at max_steps evaluates its last step and keeps the loaded weights.
#
# Seen with torch 2.13.0 and schedulefree 1.4.1, evaluation every 10 steps:
#     stopped after step 15: best loss 7.28, evaluate() of the loaded: 8.33, weights kept: False
#     stopped after step 30: best loss 0.97, evaluate() of the loaded: 0.97, weights kept: True
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 accelerate==1.15.0 schedulefree==1.4.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 1, bias=False)

    def forward(self, inputs, labels):
        return {"loss": (self.linear(inputs)[:, 0] - labels).square().mean()}


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def kept_by_evaluate(stop: int) -> bool:
    torch.manual_seed(0)
    inputs = torch.randn(64, 16)
    rows = [{"inputs": row, "labels": row.sum()} for row in inputs]
    args = TrainingArguments(
        f"run-{stop}",
        optim="schedule_free_adamw",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=30,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows, callbacks=[Stop(stop)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")["linear.weight"]
    assert torch.equal(trainer.model.linear.weight, best)
    loss = trainer.evaluate()["eval_loss"]
    kept = torch.equal(trainer.model.linear.weight, best)
    print(
        f"stopped after step {stop}: best loss {trainer.state.best_metric:.2f}, "
        f"evaluate() of the loaded: {loss:.2f}, weights kept: {kept}"
    )
    return kept


raise SystemExit(0 if (kept_by_evaluate(15), kept_by_evaluate(30)) == (False, True) else 1)
PYTHON
