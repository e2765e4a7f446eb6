"""The programs on the pages of docs/ run unchanged in an empty directory."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

import processes
import wellcond as wc
from processes import needs_fsdp2_on_the_cpu
from programs import fresh_process, run_python, run_shell
from wellcond.report.gate import Rule

DOCS = Path(__file__).parents[1] / "docs"
# The packages that a page needs in addition to wellcond and its experiments.
NEEDS = {
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "loss-spikes": "transformers",
    "lora": "peft",
}
DISTRIBUTED = DOCS / "distributed.md"
BLOCK = re.compile(
    r"^```(?:python|\{code-block\} python)\n(?::[^\n]*\n)*(.*?)^```$", re.DOTALL | re.MULTILINE
)


def program(page: Path) -> str:
    """All programs that a page asks the reader to run."""
    return "\n".join(BLOCK.findall(page.read_text()))


def pages() -> Iterator[Any]:
    for page in sorted([*DOCS.glob("*.md"), *DOCS.glob("reference/*.md")]):
        if not program(page):
            continue
        marks = [pytest.mark.slow] if page.stem == "compile" else []
        if page.stem in NEEDS:
            marks.append(pytest.mark.frameworks)
        if page.stem == "distributed":
            marks += [pytest.mark.distributed, needs_fsdp2_on_the_cpu]
        yield pytest.param(page, id=str(page.relative_to(DOCS).with_suffix("")), marks=marks)


def test_programs_are_found() -> None:
    assert {page.id for page in pages()} >= {"index", "plain", "audit", "limits", "distributed"}


@pytest.mark.parametrize("page", list(pages()))
def test_program_of_page_runs(page: Path, tmp_path: Path) -> None:
    need = NEEDS.get(page.stem)
    if need and importlib.util.find_spec(need) is None:
        pytest.skip(f"{need} is not installed")
    if page == DISTRIBUTED:  # its process groups would outlive it
        printed = processes.run_program(program(page), tmp_path)
    else:
        torch._dynamo.reset()
        with fresh_process(tmp_path) as names:
            printed = run_python(program(page), names)
    # The indented text directly below a program is its output.
    for output in re.findall(r"^```\n\n((?:    .*\n)+)", page.read_text(), flags=re.MULTILINE):
        assert textwrap.dedent(output) in printed


@pytest.mark.slow
@pytest.mark.distributed
@needs_fsdp2_on_the_cpu
def test_example_matches_the_page_and_runs_under_torchrun(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    script = root / "examples" / "fsdp2.py"
    assert f"```python\n{script.read_text()}```" in (root / "docs" / "distributed.md").read_text()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script)),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Regularizer of 2 weights" in done.stdout
    assert (tmp_path / "one" / ".metadata").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_replicas_of_the_page_train_under_torchrun(tmp_path: Path) -> None:
    (example,) = [
        code for code in BLOCK.findall(DISTRIBUTED.read_text()) if "DataParallel(" in code
    ]
    script = tmp_path / "ddp.py"
    script.write_text(example)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("['0.weight', '2.weight']") == 2


def test_gate_hook_and_workflow_pass_and_fail(tmp_path: Path) -> None:
    """An unchanged model passes; a model with a collapsed weight and half a file fail."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    root = Path(__file__).parents[1]
    page = (root / "docs" / "gate.md").read_text()
    blocks = dict.fromkeys(("python", "bash", "yaml"), "")
    for language in blocks:
        found = re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
        blocks[language] = "---\n".join(found)
    shared, local, workflow, with_action = yaml.safe_load_all(blocks["yaml"])
    (entry,) = [one["entry"] for one in local["repos"][0]["hooks"]]
    steps = [step.get("run", "") for step in workflow["jobs"]["audit"]["steps"]]
    (step,) = [run for run in steps if run.startswith("wellcond")]

    hooks = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())
    assert {one["id"] for one in shared["repos"][0]["hooks"]} <= {hook["id"] for hook in hooks}
    action = yaml.safe_load((root / "action.yml").read_text())
    (use,) = [step for step in with_action["jobs"]["audit"]["steps"] if step.get("id") == "audit"]
    assert set(use["with"]) <= set(action["inputs"])

    def run(command: str) -> tuple[int, str]:
        with fresh_process(tmp_path):
            os.environ["GITHUB_STEP_SUMMARY"] = "summary.md"
            return run_shell(command)

    exec(blocks["python"].replace('"model.pt"', repr(str(tmp_path / "model.pt"))))
    code, printed = run(blocks["bash"])
    assert code == 0, printed
    weights = torch.load(tmp_path / "model.pt")
    kappa = wc.condition_number(weights["0.weight"])
    assert f"0.weight (κ {kappa:.4g} to" in page
    for command in (entry, step):
        assert run(command)[0] == 0
        torch.save(weights | {"0.weight": torch.ones(32, 64)}, tmp_path / "model.pt")
        code, printed = run(command)
        assert code == 1
        assert "1 weight got worse by more than a factor of 2" in printed
        assert f"0.weight (κ {kappa:.4g} to inf)" in printed
        (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:900])
        assert run(command)[0] == 2
        torch.save(weights, tmp_path / "model.pt")
    assert (tmp_path / "report.html").stat().st_size > 5000
    summary = (tmp_path / "summary.md").read_text()
    verdicts = re.findall(r"^## <code>model.pt</code>: (.*)$", summary, flags=re.MULTILINE)
    assert verdicts == ["passed", "failed", "not audited"]
    (found,) = json.loads((tmp_path / "wellcond.sarif").read_text())["runs"]
    assert [result["ruleId"] for result in found["results"]] == ["not-audited"]


def test_gate_page_lists_all_rules() -> None:
    page = (DOCS / "gate.md").read_text()
    (sentence,) = re.findall(r"^The rules are (.*?)\.", page, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", sentence) == [rule.id for rule in Rule]
