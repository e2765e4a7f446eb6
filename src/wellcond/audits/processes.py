"""Several processes that audit one checkpoint together, with torch.distributed on the CPU.

Each process watches process 0, and process 0 watches all others, on a connection that carries no
data before the end. If one process ends, even by a kill, all processes end within seconds, and only
one of them prints the reason.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_MEETING = datetime.timedelta(minutes=5)
_FOR_EVER = datetime.timedelta(days=365)  # one matrix can take hours
_PATIENCE = 3.0  # seconds for the watch to learn which process ended
_TEXT = 1 << 16  # bytes of the last message
# Errors that can occur in only one process; all other errors are bugs in wellcond.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError, RuntimeError, TypeError)


class ProcessError(Exception):
    """One of the processes cannot continue, so no process can."""


class Group:
    """The group of all processes, including this one; waits until all have connected.

    Args:
        rank: the rank of this process; process 0 reports.
        size: the number of processes.
        meeting: the address where they meet, as in `torch.distributed`: env:// or tcp://...
        local_rank: the number of this process on its machine.

    Raises:
        OSError: the processes do not connect.
    """

    def __init__(self, rank: int, size: int, meeting: str, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        try:
            store, *_ = next(rendezvous(meeting, self.rank, self.size, timeout=_MEETING))
            dist.init_process_group(
                "gloo",
                # The job that runs this command may use the same store with its own names.
                store=dist.PrefixStore("wellcond", store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
                timeout=_MEETING,
            )
            self._work = dist.new_group(backend="gloo", timeout=_FOR_EVER)
            self._ends = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        except (RuntimeError, OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"{self.size} processes must connect within {_MEETING.seconds // 60} minutes, but "
                f"did not ({first}). Start them with torchrun. For a single process, unset RANK "
                "and WORLD_SIZE, or SLURM_PROCID."
            ) from None
        self._ending = threading.Lock()
        for other in range(1, self.size) if self.rank == 0 else (0,):
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_later, daemon=True).start()

    # --- normal operation -------------------------------------------------------------------------

    def exchange(self, what: str, value: T) -> list[T]:
        """The values of all processes, in their order.

        Raises:
            ProcessError: another process is at another exchange, for example after an error.
        """
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, (what, value), group=self._work)
        except RuntimeError as error:
            time.sleep(_PATIENCE)  # the watch ends this process and gives a better reason
            raise ProcessError(f"the connection between the processes is lost: {error}") from None
        for rank, (done, _) in enumerate(found):
            if done != what:
                raise ProcessError(f"process {rank} of {self.size} is at {done}, not at {what}")
        return [one for _, one in found]

    def together(self, compute: Callable[[], T], state: Callable[[T], Mapping[str, Any]]) -> T:
        """Returns the result of `compute`, which must succeed on all processes with equal state.

        Raises:
            ValueError: another process failed, or the states differ. An error of this process is
                raised as it is.
        """
        value: T | None = None
        error: Exception | None = None
        try:
            value = compute()
            own = state(value)
        except _EXPECTED as raised:
            error, own = raised, {}
        found = self.exchange("files", (f"{type(error).__name__}: {error}" if error else "", own))
        if error is not None or value is None:
            raise error or ValueError
        for rank, (why, _) in enumerate(found):
            if why:
                raise ValueError(f"{why} (process {rank} of {self.size})")
        _, first = found[0]
        for rank, (_, other) in enumerate(found):
            if other != first:
                name = next(n for n in {**first, **other} if other.get(n) != first.get(n))
                raise ValueError(
                    f"all processes must read the same files, but {name} has another size or time "
                    f"on process {rank} than on process 0. Put it on shared storage."
                )
        return value

    @contextlib.contextmanager
    def fatal(self) -> Iterator[None]:
        """Within this context, an error ends all processes, not only the audit of one path."""
        try:
            yield
        except _EXPECTED as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ProcessError(
                f"process {self.rank} of {self.size} failed: {type(error).__name__}: {first}"
            ) from error

    # --- the end ----------------------------------------------------------------------------------

    def end(self, code: int, message: str = "") -> NoReturn:
        """Ends all processes with this exit code; process 0 prints the message.

        The other processes wait for process 0, which may still have to write the results. They send
        the message of an error to process 0 at once.
        """
        if self.rank == 0:
            self._end_all(code, message)
        if message:
            with contextlib.suppress(RuntimeError):
                dist.send(_pack(code, message), dst=0, group=self._ends)
        while True:  # until the watch hears from process 0
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_PATIENCE)

    def _end_all(self, code: int, message: str) -> NoReturn:
        with self._ending:  # never released
            _say(message)
            for other in range(1, self.size):
                with contextlib.suppress(RuntimeError):
                    dist.send(_pack(code, ""), dst=other, group=self._ends)
            os._exit(code)

    def _watch(self, other: int) -> NoReturn:
        last = torch.zeros(_TEXT, dtype=torch.uint8, device="cpu")
        try:
            dist.recv(last, src=other, group=self._ends)
            code, message = _unpack(last)
        except RuntimeError:  # the connection is closed
            code, message = (
                2,
                f"wellcond: error: process {other} of {self.size} ended without a message, as if "
                "it was killed. Check whether memory ran out. --resume FILE keeps measured "
                "weights.\n",
            )
        if self.rank == 0:
            self._end_all(code, message)
        if self.rank == 1:  # one is enough
            _say(message)
        os._exit(code)


def _end_later() -> NoReturn:
    """Delays the end by SIGTERM, which torchrun sends as soon as another process ends.

    In the meantime, the watch prints why the other process ended.
    """
    signal.sigwait({signal.SIGTERM})
    time.sleep(_PATIENCE)
    os._exit(128 + signal.SIGTERM)


def _say(message: str) -> None:
    """Prints on standard error, even if that is silenced, and overwrites a line of progress."""
    error = sys.__stderr__
    clear = "\r\x1b[K" if message and error is not None and error.isatty() else ""
    for stream, text in ((sys.stdout, ""), (sys.stderr, ""), (error, clear + message)):
        with contextlib.suppress(OSError):
            print(text, end="", file=stream, flush=True)


def _pack(code: int, message: str) -> torch.Tensor:
    text = message.encode()[: _TEXT - 2]
    return torch.tensor([code, *text.ljust(_TEXT - 1, b"\0")], dtype=torch.uint8, device="cpu")


def _unpack(last: torch.Tensor) -> tuple[int, str]:
    code, *text = last.tolist()
    return code, bytes(text).rstrip(b"\0").decode(errors="replace")
