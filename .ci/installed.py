"""Tests an installed wheel without extras and without the repository.

`make release-check` runs it with the Python of a clean environment, in an empty directory.
"""

import doctest
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import torch

import wellcond as wc

EXTRAS = ("joblib", "matplotlib", "pandas", "scipy", "sklearn", "lightning", "transformers")
COMMAND = Path(sys.executable).with_name("wellcond")


def run(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    # A successful command prints nothing on standard error, such as warnings of libraries.
    assert code or not done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def train() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    reg = wc.Regularizer(model, wc.ConditionLimit(10))
    reg.attach(optimizer)
    for _ in range(50):
        x, y = torch.randn(32, 32), torch.randint(10, (32,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    reg.enforce()
    return model


def main() -> None:
    assert Path(wc.__file__).is_relative_to(sys.prefix), wc.__file__
    found = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not found, f"the environment must not have extras, but it has {found}"

    model = train()
    assert all(wc.condition_number(model[i].weight) <= 10 for i in (0, 2))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights["0.weight"] = weights["0.weight"].clone()
    weights["0.weight"][:, 0] = 0
    torch.save(weights, "model.pt")
    report = json.loads(run("audit", "model.pt", "--json"))
    assert report["findings"][0]["condition_number"] == "inf", report["findings"][0]
    run("audit", "model.pt", "--max-condition", "1e6", "--html", "report.html", code=1)
    assert Path("report.html").stat().st_size > 5000
    run("repair", "model.pt", "fixed.pt", "--max-condition", "100")
    run("audit", "fixed.pt", "--max-condition", "100")
    assert wc.__version__ in run("--version")
    assert importlib.util.find_spec("wellcond_experiments") is None
    for command in (("reproduce", "denoise", "--quick"), ("reproduce",), ("bench", "step")):
        for arguments in (command, (*command, "--help")):
            assert "pip install ./experiments" in run(*arguments, code=2), arguments

    tried = 0
    for module in pkgutil.walk_packages(wc.__path__, "wellcond."):
        if module.name.split(".")[1] in ("integrations", "__main__"):
            continue
        loaded = importlib.import_module(module.name)
        failed, examples = doctest.testmod(loaded, optionflags=doctest.ELLIPSIS)
        assert not failed, module.name
        tried += examples
    for name, extra in (("lightning", "lightning"), ("transformers", "transformers")):
        try:
            importlib.import_module(f"wellcond.integrations.{name}")
        except ImportError as error:
            assert f"wellcond[{extra}]" in str(error), error  # noqa: PT017
        else:
            raise AssertionError(f"wellcond.integrations.{name} was imported without {name}")
    print(f"wellcond {wc.__version__} with torch {torch.__version__}: passed, {tried} examples")


if __name__ == "__main__":
    main()
