"""Several processes that audit one checkpoint together, by torch.distributed on the CPU.

Each process watches process 0, and process 0 all others, by a connection on which nothing is sent
before the end. So the end of one, also a violent one, ends all within seconds, and only one of them
says why.
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
_FOR_EVER = datetime.timedelta(days=365)  # one matrix may take hours
_PATIENCE = 3.0  # seconds in which the watch learns whose end it was
_TEXT = 1 << 16  # bytes of the last message
# What a process may meet that the others do not; all else is a mistake of the program.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError, RuntimeError, TypeError)


class ProcessError(Exception):
    """One of the processes cannot go on, and so none can."""


class Group:
    """All processes, of which this is one; it waits until all have come.

    Args:
        rank: which it is; process 0 reports.
        size: how many there are.
        meeting: where they meet, as `torch.distributed` has it: env:// or tcp://...

    Raises:
        OSError: they do not come.
    """

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        self.rank, self.size = rank, size
        try:
            store, *_ = next(rendezvous(meeting, self.rank, self.size, timeout=_MEETING))
            dist.init_process_group(
                "gloo",
                # A job that this command runs in may have a store there, with names of its own.
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
                f"{self.size} processes must meet within {_MEETING.seconds // 60} minutes, but did "
                f"not ({first}). Start them with torchrun; or for one process unset RANK and "
                "WORLD_SIZE, or SLURM_PROCID."
            ) from None
        self._ending = threading.Lock()
        for other in range(1, self.size) if self.rank == 0 else (0,):
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_later, daemon=True).start()

    # --- while all goes well ----------------------------------------------------------------------

    def exchange(self, what: str, value: T) -> list[T]:
        """The values of all processes, in their order.

        Raises:
            ProcessError: another process does something else, as after an error of its own.
        """
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, (what, value), group=self._work)
        except RuntimeError as error:
            time.sleep(_PATIENCE)  # the watch ends this process, and knows more
            raise ProcessError(f"the connection between the processes is lost: {error}") from None
        for rank, (done, _) in enumerate(found):
            if done != what:
                raise ProcessError(f"process {rank} of {self.size} is at {done}, and not at {what}")
        return [one for _, one in found]

    def together(self, compute: Callable[[], T], state: Callable[[T], Mapping[str, Any]]) -> T:
        """What it returns, if that succeeds on all processes, and its state is the same on all.

        Raises:
            ValueError: it does not; of an error of this process the error itself.
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
                    f"for process {rank} than for process 0. Put it on storage that they share."
                )
        return value

    @contextlib.contextmanager
    def fatal(self) -> Iterator[None]:
        """Within, an error ends all processes at once, instead of the audit of one path."""
        try:
            yield
        except _EXPECTED as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ProcessError(
                f"process {self.rank} of {self.size} cannot go on: {type(error).__name__}: {first}"
            ) from error

    # --- the end ----------------------------------------------------------------------------------

    def end(self, code: int, message: str = "") -> NoReturn:
        """Ends all processes with this exit code; process 0 prints the message.

        The others wait for process 0, which may still have to write what they know too. An error
        does not wait: it is a message.
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
        with self._ending:  # and never lets go
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
                f"wellcond: error: process {other} of {self.size} has ended without an answer, as "
                "if killed. Look for a lack of memory; --resume FILE keeps what is measured.\n",
            )
        if self.rank == 0:
            self._end_all(code, message)
        if self.rank == 1:  # one is enough
            _say(message)
        os._exit(code)


def _end_later() -> NoReturn:
    """Delays the end by SIGTERM, which torchrun sends as soon as another process ends.

    In the meantime the watch prints why that process ended.
    """
    signal.sigwait({signal.SIGTERM})
    time.sleep(_PATIENCE)
    os._exit(128 + signal.SIGTERM)


def _say(message: str) -> None:
    """Prints it on standard error, also where that is silenced, over a line of progress."""
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
