"""The command line: arguments in, text and exit code out.

Exit codes: 0 done; 1 a limit that the user set is exceeded; 2 no answer (misuse, an unreadable or
damaged file, output that exists); 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import wellcond


class _Parser(argparse.ArgumentParser):
    """Answers misuse with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wellcond: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from wellcond.experiments import bench, classify, denoise, least_squares

    parser = _Parser(
        prog="wellcond",
        description="Condition numbers of neural network weights: experiments and benchmarks.",
        epilog="example: wellcond reproduce denoise --data digits",
    )
    parser.add_argument("--version", action="version", version=f"wellcond {wellcond.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    reproduce = commands.add_parser(
        "reproduce",
        help="run an experiment of the paper",
        description="Run an experiment of the paper; writes results.json, a table and pictures.",
        epilog="example: wellcond reproduce denoise --data mnist --epochs 4",
    )
    experiments = reproduce.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for experiment in (denoise, classify, least_squares):
        experiment.configure(experiments)

    bench.configure(
        commands.add_parser(
            "bench",
            help="measure what regularising costs and how exact it is",
            epilog="example: wellcond bench step",
        )
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except KeyboardInterrupt as interrupt:
        print(f"wellcond: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"wellcond: error: {error}", file=sys.stderr)
        return 2
