"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_loop_runs_with_its_added_lines() -> None:
    (diff,) = blocks("diff")
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 3
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        exec("\n".join(line[1:] for line in diff.splitlines()), names)
    assert names["reg"].measure()["0.weight"].step == 100  # type: ignore[attr-defined]


def test_python_blocks_run_and_print_what_they_show(capsys) -> None:
    for block in blocks("python"):
        exec(block, {})
    shown = re.search(r"\n    Regularizer of.*?\n\n", README, flags=re.DOTALL)
    assert shown is not None
    text = "\n".join(line[4:] for line in shown.group().strip("\n").splitlines())
    assert text in capsys.readouterr().out
