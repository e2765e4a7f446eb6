"""One of two processes: trains in both modes and compares its weights with the other process.

Run by test_lightning.py and test_transformers.py, under `python -m torch.distributed.run`.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1]))  # for modules that tests share


def assert_alike(weight: torch.Tensor) -> None:
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight.detach().clone())
    assert torch.equal(*both)


def lightning(way: str, path: Path) -> None:
    import test_lightning as t
    from lightning.pytorch import Callback

    class Alike(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            assert_alike(pl_module.net[0].weight)

    added = t.callback(way)
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "max_epochs": 1}
    t.trainer(path, added, Alike(), **options).fit(t.Module(), t.loader(96))
    assert {one.step for one in added.regularizer.measure().values()} == {3}
    # The processes divide the work.
    assert {state.owner for state in added.regularizer._states} == {0, 1}
    print(added.regularizer.names, file=sys.stderr)


def transformers(way: str, path: Path) -> None:
    import test_transformers as t

    model, added = t.Classifier(), t.callback(way)
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
    options |= {"save_strategy": "steps", "save_steps": 2}
    used = t.trainer(path, model, added, ddp_backend="gloo", **options)
    used.train()
    assert_alike(model.net[0].weight)
    assert t.steps(added) == {3}
    assert {state.owner for state in added.regularizer._states} == {0, 1}
    print(added.regularizer.names, file=sys.stderr)
    if used.args.device.index is not None:
        return  # before version 5 the CPU of each process has an index, to which torch cannot load
    again = t.Classifier()
    used = t.trainer(path, again, t.callback(way), ddp_backend="gloo", **options)
    used.train(resume_from_checkpoint=str(path / "checkpoint-2"))
    assert torch.equal(again.net[0].weight, model.net[0].weight)
    assert type(used.model_wrapped).__name__ == "DistributedDataParallel"


if __name__ == "__main__":
    library, directory = sys.argv[1:]
    for way in ("proximal", "gradients"):
        {"lightning": lightning, "transformers": transformers}[library](way, Path(directory, way))
    dist.barrier()
    # Threads of gloo that are still running when the interpreter exits would abort it.
    sys.stderr.flush()
    os._exit(0)
