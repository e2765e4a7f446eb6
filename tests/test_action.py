"""Tests of the pre-commit hook and the GitHub action, run by bash without a runner."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wellcond import cli
from wellcond.cli.options import make_parser

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).parents[1]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


# --- the hook -------------------------------------------------------------------------------------

WEIGHTS = [
    "model.safetensors",
    "a b/model-00001-of-00002.safetensors",
    "x.pt",
    "x.pth",
    "x.pth.tar",
    "runs/last.ckpt",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
]
NO_WEIGHTS = ["data.bin", "x.pt.txt", "ckpt/optimizer.pt", "rng_state_0.pth", "training_args.bin"]


def test_hooks_are_commands_and_match_weight_files() -> None:
    hooks = {hook["id"]: hook for hook in load(".pre-commit-hooks.yaml")}
    languages = {name: hook["language"] for name, hook in hooks.items()}
    assert languages == {"wellcond-audit": "python", "wellcond-audit-system": "system"}
    for hook in hooks.values():
        program, *command = hook["entry"].split()
        assert program == "wellcond"
        arguments = make_parser("audit").parse_args([*command, *hook["args"], *WEIGHTS])
        assert arguments.paths == [Path(name) for name in WEIGHTS]
        assert arguments.max_condition == float("inf")
        chosen = [
            name
            for name in WEIGHTS + NO_WEIGHTS
            if re.search(hook["files"], name) and not re.search(hook["exclude"], name)
        ]
        assert chosen == WEIGHTS


# --- the action -----------------------------------------------------------------------------------


def step() -> dict[str, Any]:
    (one,) = [step for step in load("action.yml")["runs"]["steps"] if step.get("id") == "audit"]
    return dict(one)


def test_action_passes_inputs_only_as_variables() -> None:
    action = load("action.yml")
    assert action["runs"]["using"] == "composite"
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(action["runs"])))
    assert used == set(action["inputs"])
    for one in action["runs"]["steps"]:
        assert one["shell"] == "bash"
        assert "${{" not in one["run"]
    for one in action["inputs"].values():
        assert one["description"]
        assert one.get("required") or isinstance(one["default"], str)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with one weight of kappa 2 and two weights of kappa 100."""
    for name, kappa in (("fine", 2.0), ("deep/bad one", 100.0), ("-dash", 100.0)):
        path = tmp_path / "models" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.diag(torch.tensor([kappa, 1.0]))}, path)
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("inputs", "code", "failed"),
    [
        pytest.param(
            {"PATHS": "models/fine.pt", "MIN_COVERAGE": "1"}, 0, [], marks=pytest.mark.slow
        ),
        ({"PATHS": "models/deep/bad one.pt", "ARGUMENTS": "--top 1 --max-condition 200"}, 0, []),
        (
            {"PATHS": "models/**/*.pt\n\n", "MAX_CONDITION": "10"},
            1,
            ["models/-dash.pt", "models/deep/bad%20one.pt"],
        ),
        pytest.param(
            {"PATHS": "models/fine.pt", "BASELINE": "before.json"},
            1,
            ["models/fine.pt"],
            marks=pytest.mark.slow,
        ),
        (
            {"PATHS": "$(touch x);`touch x`\nmodels/*.pt"},
            2,
            ["%24%28touch%20x%29%3B%60touch%20x%60"],
        ),
    ],
)
def test_action_audits(
    checkout: Path, inputs: dict[str, str], code: int, failed: list[str], capsys: Any
) -> None:
    fine = checkout / "models" / "fine.pt"
    if "BASELINE" in inputs:
        assert cli.main(["audit", str(fine), "--json"]) == 0
        (checkout / "before.json").write_text(capsys.readouterr().out)
        torch.save({"w": torch.diag(torch.tensor([50.0, 1.0]))}, fine)
    (checkout / "wellcond.sarif").write_text("of the run before")
    (checkout / "summary.md").write_text("of the step before\n")
    empty = dict.fromkeys(step()["env"], "") | {"SARIF": "wellcond.sarif"}
    files = {"GITHUB_STEP_SUMMARY": "summary.md", "GITHUB_OUTPUT": "output"}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step()["run"]],  # like runners
        cwd=checkout,
        env=os.environ | empty | inputs | files | {"PATH": tools, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert not (checkout / "x").exists()
    assert (checkout / "output").read_text() == "sarif=wellcond.sarif\n"
    (run,) = json.loads((checkout / "wellcond.sarif").read_text())["runs"]
    places = [
        result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for result in run["results"]
    ]
    assert sorted(places) == failed
    summary = (checkout / "summary.md").read_text()
    assert summary.startswith("of the step before\n## ")
    words = re.findall(r"^#+ <code>.*</code>: ([\w ]+)$", summary, flags=re.MULTILINE)
    assert len(words) >= 1
    assert sum(word in ("failed", "not audited") for word in words) == len(failed)
