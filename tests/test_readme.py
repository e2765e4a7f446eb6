"""What the README shows runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

import wellcond as wc

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_loops_run_with_their_added_lines() -> None:
    limited, penalised = blocks("diff")
    for diff, lines in ((limited, 4), (penalised, 3)):
        assert sum(line.startswith("+") for line in diff.splitlines()) == lines
        names: dict[str, Any] = {}
        with torch.random.fork_rng():
            exec("\n".join(line[1:] for line in diff.splitlines()), names)
        assert names["reg"].measure()["0.weight"].step == 100
        if diff == limited:
            assert float(wc.condition_number(names["model"][0].weight)) <= 10


def test_python_blocks_run_and_print_what_they_show(capsys) -> None:
    for block in blocks("python"):
        exec(block, {})
    shown = re.search(r"\n    Regularizer of.*?\n\n", README, flags=re.DOTALL)
    assert shown is not None
    text = "\n".join(line[4:] for line in shown.group().strip("\n").splitlines())
    assert text in capsys.readouterr().out
