"""Runs the programs of pages in this process, which has imported torch, as in a new process."""

import contextlib
import io
import os
import random
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wellcond import cli

_SEED = 67280421310721  # the seed of torch's generator in a new process
_SHELL = set("|&;<>$`\n")  # a command with one of these needs a shell


@contextlib.contextmanager
def fresh_process(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the names of a new `__main__` in `folder`, and restores the state of this process.

    The state consists of the working directory, `__main__`, random generators, the default dtype,
    the grad mode, warnings and the environment.
    """
    main = types.ModuleType("__main__")
    before, where, environment = sys.modules["__main__"], Path.cwd(), dict(os.environ)
    dtype, threads, grad = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    sys.modules["__main__"] = main
    os.chdir(folder)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("default")
            torch.manual_seed(_SEED)
            yield main.__dict__
    finally:
        os.chdir(where)
        os.environ.clear()
        os.environ.update(environment)
        sys.modules["__main__"] = before
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def run_python(code: str, names: dict[str, Any]) -> str:
    """Runs the program; returns its standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<program>", "exec"), names)
    return printed.getvalue()


def run_shell(command: str) -> tuple[int, str]:
    """Runs the command; returns its exit code, standard output and standard error.

    A single wellcond command runs in this process, other commands in a shell.
    """
    words = shlex.split(command)
    if words[0] != "wellcond" or _SHELL & set(command.strip()):
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": tools},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = cli.main(words[1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, printed.getvalue()
