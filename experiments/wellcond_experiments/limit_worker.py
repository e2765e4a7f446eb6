"""A training in a separate process, which does steps on request.

Each competitor has its own process, so that an old and a new wellcond can alternate in one run, and
competitors do not share caches, threads or allocators. Both sides exchange lines of JSON: a request
and its answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARM_UP = 3  # steps of a discarded network: torch does some work once per process


class WorkerError(Exception):
    """A competitor cannot take part; the message gives the reason."""


class Worker:
    """The client side of a process that trains with one method."""

    def __init__(
        self, case: str, method: str, data: str, threads: int, source: Path | None = None
    ) -> None:
        path = [str(source)] if source else []
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = dict(os.environ) | dict.fromkeys(variables, str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(path + [one for one in sys.path if one])
        arguments = [case, method, data, str(threads), *path]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        """Sends a request and returns the answer.

        Raises:
            WorkerError: if the request failed or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([request, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            *_, last = self._errors.read().strip().splitlines() or ["no message"]
            raise WorkerError(f"the process has ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def workers(methods: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Worker]]:
    """Starts a worker per method, with the arguments of `Worker`; all end with the block."""
    begun: dict[str, Worker] = {}
    try:
        for name, arguments in methods.items():
            begun[name] = Worker(*arguments)
        yield begun
    finally:
        for worker in begun.values():
            worker.close()


def main(case_name: str, method: str, data: str, threads: str, source: str = "") -> None:
    """The server side: answers requests until the input ends.

    Args:
        case_name: name of the case.
        method: name of the competitor.
        data: the value of `--data`.
        threads: number of threads of torch.
        source: the directory that wellcond must be imported from, if given.
    """
    # Other output must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    server: Any = None
    for line in sys.stdin:
        request, arguments = json.loads(line)
        try:
            if server is None:
                server = Server(case_name, method, data, int(threads), source)
            reply = {"answer": getattr(server, request)(**arguments)}
        except ImportError as error:
            reply = {"error": f"not installed: {error}"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    os._exit(0)  # a regular exit of torch takes seconds


class Server:
    """Its methods are the requests. Imports follow the path of this process."""

    def __init__(
        self, case_name: str, method: str, data: str, threads: int, source: str = ""
    ) -> None:
        import torch

        import wellcond as wc
        from wellcond_experiments.limit_cases import find_case

        if source and not Path(*wc.__path__).is_relative_to(source):
            raise RuntimeError(f"wellcond comes from {wc.__path__[0]}, not from {source}")
        torch.set_num_threads(threads)
        # Dead units leave subnormal numbers, on which processors work many times slower. This would
        # distort the measured cost.
        torch.set_flush_denormal(True)
        self.case, self.method = find_case(case_name), method
        self.source = self.case.source(data)
        self.warm = False

    def describe(self) -> dict[str, str]:
        """Returns the versions of wellcond and of the package of the method."""
        import wellcond as wc
        from wellcond_experiments.limit_competitors import version

        return {"wellcond": wc.__version__, "peer": version(self.method)}

    def start(self, seed: int, bound: float | None) -> list[str]:
        """Starts a new training and returns the names of the limited layers."""
        from wellcond_experiments.limit_training import Training

        if not self.warm:
            once = Training(self.case, self.source, self.method, bound, seed + 1000)
            for _ in range(WARM_UP):
                once.step()
            self.warm = True
        self.training = Training(self.case, self.source, self.method, bound, seed)
        return self.training.names

    def train(self, steps: int) -> list[list[float]]:
        """Trains; returns wall-clock and CPU seconds per step."""
        seconds = []
        for _ in range(steps):
            batch = self.training.draw()
            wall, processor = time.perf_counter(), time.process_time()
            self.training.step(batch)
            seconds.append([time.perf_counter() - wall, time.process_time() - processor])
        return seconds

    def measure(self, steps: int) -> list[list[float]]:
        """Trains; returns sigma_1 or kappa of each layer after each step."""
        values = []
        for _ in range(steps):
            self.training.step()
            values.append(self.training.spectra())
        return values

    def report(self) -> dict[str, Any]:
        """Returns the text of the regulariser and the accuracy in per cent, if available."""
        return {"printed": self.training.printed(), "accuracy": self.training.accuracy()}

    def enforce(self) -> dict[str, float]:
        """Returns the seconds of `enforce()` at twice the bound, and within the bound."""
        return self.training.time_enforce()


if __name__ == "__main__":
    main(*sys.argv[1:])
