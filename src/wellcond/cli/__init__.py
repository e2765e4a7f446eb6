"""The command line: arguments in, text and exit code out.

Exit codes: 0 success; 1 a gate failed; 2 no result (misuse, an unreadable or damaged file, output
that exists or cannot be written); 130 interrupted; 141 the reader of the output closed the pipe, as
`| head` does (the code that a shell reports for a program ended by the signal SIGPIPE).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from wellcond.cli.options import check_combinations, check_outputs, make_parser
from wellcond.cli.place import find_place
from wellcond.cli.terminal import describe_error
from wellcond.text import escape

if TYPE_CHECKING:
    from wellcond.audits.processes import Group


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # do not fail on unencodable characters
            stream.reconfigure(errors="backslashreplace")
    # Without NumPy, torch warns at every start. Nothing here needs NumPy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    code, message = _outcome(partial(_start, sys.argv[1:] if argv is None else argv))
    with contextlib.suppress(OSError):
        print(message, end="", file=sys.stderr)
    _drop_unwritten()
    return code


def _outcome(run: Callable[[], int]) -> tuple[int, str]:
    """The exit code and the error message, which is empty without an error."""
    try:
        try:
            return run(), ""
        finally:
            # Flush here, where an error becomes one line. The interpreter would flush at its end
            # and print a traceback.
            print(end="", flush=True)
    except BrokenPipeError:
        return 141, ""
    except KeyboardInterrupt as interrupt:
        return 130, f"wellcond: interrupted. {escape(interrupt)}".rstrip() + "\n"
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        return 2, f"wellcond: error: {describe_error(error)}\n"


def _start(argv: Sequence[str]) -> int:
    """Runs a command. If it is one of several processes, only the first prints and writes."""
    place = find_place(os.environ)
    if place is None:
        return _run(argv)
    from wellcond.audits.processes import Group, ProcessError

    group = Group(*place)

    def run() -> int:
        try:
            return _run(argv, group)
        except ProcessError as error:
            raise OSError(str(error)) from error
        except SystemExit as misuse:  # the parser has printed its message
            return int(misuse.code or 0)

    with contextlib.ExitStack() as silence:
        if group.rank:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        group.end(*_outcome(run))


def _run(argv: Sequence[str], group: Group | None = None) -> int:
    command = next((word for word in argv if not word.startswith("-")), "")
    parser = make_parser(command)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog += f" {arguments.command}"  # the help of this command lists the valid options
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # The command, and with it torch, is imported only now: help and misuse do not wait for torch.
    if arguments.command == "audit":
        check_combinations(arguments)
        if group is None or group.rank == 0:
            check_outputs(arguments)
        from wellcond.cli.audit import run_audit

        return run_audit(arguments, group)
    if group is not None:
        raise ValueError(
            f"`wellcond {arguments.command}` must run as a single process, but {group.size} were "
            "started. Start it without torchrun or srun."
        )
    if arguments.command == "repair":
        from wellcond.cli.repair import run_repair as run
    else:
        run = arguments.run
    return run(arguments)


def _drop_unwritten() -> None:
    """Discards output that cannot be written; the interpreter would try again when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
