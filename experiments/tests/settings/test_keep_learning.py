"""Permuted MNIST: online accuracy, permutations per task, and data of the search."""

import pytest
import torch
from torch import Tensor, nn

from wellcond_experiments.grid import FINAL, SEARCH, Cell
from wellcond_experiments.settings.keep_learning import KeepLearning


def cell(seed: int = 0, search: bool = False, lr: float = 1e-3) -> Cell:
    return Cell("", "none", 0.0, lr, seed, search)


class Seen:
    """A stand-in for a training that records its inputs and returns a given output."""

    def __init__(self, answer: Tensor) -> None:
        self.answer, self.batches, self.steps = answer, [], 0

    def model(self, x: Tensor) -> Tensor:
        self.batches.append(x)
        return self.answer.expand(len(x), -1).clone().requires_grad_()

    def step(self, loss: Tensor) -> bool:
        self.steps += 1
        return True


def test_every_task_permutes_the_pixels_and_uses_every_image_once() -> None:
    setting = KeepLearning(quick=True)
    x, y = setting.material(cell())
    always_three = nn.functional.one_hot(torch.tensor(3), 10).float()
    training, source = Seen(always_three), torch.Generator().manual_seed(0)
    right = setting.learn(training, source, x, y)  # type: ignore[arg-type]
    shown = torch.cat(training.batches)
    assert len(shown) == setting.per_task == 16 * training.steps
    # All images of a task share a permutation, which keeps the set of their pixel values.
    expected = {tuple(row) for row in x.sort(1).values.tolist()}
    assert {tuple(row) for row in shown.sort(1).values.tolist()} <= expected
    assert {tuple(row) for row in shown.tolist()}.isdisjoint({tuple(r) for r in x.tolist()})
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(shown)]
    assert right == pytest.approx(100 * float((y[order] == 3).double().mean()))
    again = Seen(always_three)
    setting.learn(again, source, x, y)  # type: ignore[arg-type]
    assert not torch.equal(torch.cat(again.batches).sort(1).values, shown.sort(1).values)


def test_the_search_has_separate_images_and_a_shorter_first_round() -> None:
    setting = KeepLearning(quick=True)
    searched, _ = setting.material(cell(SEARCH, search=True))
    reported, _ = setting.material(cell())
    assert len(searched) + len(reported) == len(setting.images.x_train)
    normalised = setting.images.normalise(setting.images.x_train)
    assert torch.equal(torch.cat([reported, searched]), normalised)
    tasks = [
        len(setting.run(one).curves["accuracies"])
        for one in (cell(SEARCH, True), cell(FINAL, True), cell())
    ]
    assert tasks == [2, 4, 4]


def test_diverged_network_gets_chance_accuracy() -> None:
    assert KeepLearning(quick=True).run(cell(lr=1e38)).metrics["accuracy"] == 10
