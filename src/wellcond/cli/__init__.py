"""The command line: arguments in, text and exit code out.

Exit codes: 0 done; 1 a limit that the user set is exceeded; 2 no answer (misuse, an unreadable or
damaged file, output that exists or cannot be written); 130 interrupted; 141 nobody reads the output
any more, as after `| head`: what a shell says of any program that the signal SIGPIPE ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from wellcond.cli.options import check_combinations, check_outputs, make_parser
from wellcond.cli.terminal import describe_error
from wellcond.text import escape


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter it lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    # torch warns of it at every start where NumPy is missing, which nothing here needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            # Here, where it is answered in one line: at its end, the interpreter shows a traceback.
            print(end="", flush=True)
    except BrokenPipeError:
        code, message = 141, ""
    except KeyboardInterrupt as interrupt:
        code, message = (
            130,
            f"wellcond: interrupted. {escape(interrupt)}".rstrip() + "\n",
        )
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        code, message = 2, f"wellcond: error: {describe_error(error)}\n"
    with contextlib.suppress(OSError):
        print(message, end="", file=sys.stderr)
    _drop_unwritten()
    return code


def _run(argv: Sequence[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), "")
    parser = make_parser(command)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog += f" {arguments.command}"  # whose help has the options that there are
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # A command is imported when it runs, and with it torch, for which help and misuse do not wait.
    if arguments.command == "audit":
        check_combinations(arguments)
        check_outputs(arguments)
        from wellcond.cli.audit import run_audit as run
    elif arguments.command == "repair":
        from wellcond.cli.repair import run_repair as run
    else:
        run = arguments.run
    return run(arguments)


def _drop_unwritten() -> None:
    """Lets go of what cannot be written, or the interpreter would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
