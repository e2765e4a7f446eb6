"""The options of every command, and checks of their combinations.

This module does not import torch, so help and error messages for misuse appear at once.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import wellcond
from wellcond.text import escape


class _Parser(argparse.ArgumentParser):
    """Prints one line for misuse."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wellcond: error: {escape(message)} (see {self.prog} --help)\n")


def make_parser(command: str) -> argparse.ArgumentParser:
    """The parser of all commands; imports the experiments only for `reproduce` and `bench`."""
    parser = _Parser(
        prog="wellcond",
        description="Measure and repair the condition numbers of neural network weights.",
        epilog="example: wellcond audit model.safetensors",
    )
    parser.add_argument("--version", action="version", version=f"wellcond {wellcond.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_repair(commands)

    reproduce = commands.add_parser(
        "reproduce",
        help="reproduce an experiment of the paper or of the documentation",
        description="Run an experiment. Writes results.json, a table and figures.",
        epilog="example: wellcond reproduce denoise --data digits",
    )
    benchmarks = commands.add_parser(
        "bench",
        help="measure the cost and the accuracy of regularisation and of audits",
        epilog="example: wellcond bench step",
    )
    if command == "reproduce":
        settings = _experiments("reproduce")
        names = reproduce.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
        settings.configure(names)
    if command == "bench":
        _experiments("bench").configure(benchmarks)
    return parser


def _experiments(module: str) -> Any:
    """A module of the experiments, which are a separate package and not part of the wheel."""
    try:
        return importlib.import_module(f"wellcond_experiments.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the experiments are not installed ({error.name} is missing). They are part of the "
            "repository: clone it and run `pip install ./experiments` there."
        ) from None


_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar"),
    *(".npz", ".npy", ".msgpack", ".gguf", ".keras", ".h5", ".hdf5", ".onnx"),
    *(".jit", ".torchscript", ".ptl", ".pt2", ".pt.tar"),
)
_INPUT = (
    "a .safetensors file, a *.safetensors.index.json file, a state dict saved by torch.save (.pt, "
    ".pth, .bin, .ckpt, .pth.tar), or a directory of these files"
)


def _limit(text: str) -> float:
    number = _number(text)
    if not number >= 1:
        raise argparse.ArgumentTypeError(f"must be a number >= 1, got {text}")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return number


def _positive(text: str) -> int:
    number = _number(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(number)


def _number(text: str) -> float:
    """The text as a number; nan if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _add_common(parser: argparse.ArgumentParser) -> None:
    for name, what in (("include", "select only weights"), ("exclude", "skip weights")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="GLOB",
            help=f"{what} whose name matches GLOB; can be given several times",
        )
    parser.add_argument("--threads", type=_positive, metavar="N", help="number of CPU threads")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON document instead of the table"
    )


def _add_audit(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "audit",
        help="measure every weight of a checkpoint",
        description="Measure the condition number κ, the extreme singular values, the ranks and "
        "the penalty of every weight of a checkpoint, with one tensor in memory at a time. The "
        "exit code is 1 if one of the gates --max-condition, --min-coverage and --baseline fails, "
        "and 2 if a checkpoint cannot be audited. With any gate, the exit code is also 1 if a "
        "tensor contains NaN or infinity or cannot be read. With --compare, the gates apply to B. "
        "Several checkpoints are audited one by one, and the exit code is the largest of theirs. "
        "Several processes started by torchrun or srun share the work.",
        epilog="example: wellcond audit model.safetensors --max-condition 1e4 --html report.html",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help=f"{_INPUT}; or a Keras, Flax, NumPy, ONNX, GGUF, TorchScript or torch.export file",
    )
    parser.add_argument(
        "--certify", action="store_true", help="compute proven intervals for σ_max, σ_min and κ"
    )
    parser.add_argument(
        "--top", type=_positive, metavar="N", help="show only the N worst weights in the table"
    )
    parser.add_argument(
        "--sort",
        choices=("standing", "kappa"),
        default="standing",
        help="standing: flagged weights first, then those most unusual among trained weights (the "
        "default); kappa: by κ",
    )
    parser.add_argument(
        "--roles",
        action="store_true",
        help="show the worst weight of each role (q, k, v, o, up, gate, down) below the table",
    )
    parser.add_argument(
        "--max-condition",
        type=_limit,
        metavar="K",
        help="exit with code 1 if κ of a weight exceeds K, or is infinite, undefined or unknown",
    )
    parser.add_argument(
        "--min-coverage",
        type=_share,
        metavar="SHARE",
        help="exit with code 1 if less than this share of the parameters (0 to 1) is measured",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="compare with FILE, an earlier output of --json: exit with code 1 if κ or σ_max of a "
        "weight has risen, its stable rank has fallen, or the weight is missing",
    )
    parser.add_argument(
        "--max-rise",
        type=_limit,
        metavar="TIMES",
        help="with --baseline: the factor by which κ and σ_max may rise and the stable rank may "
        "fall (default: 2); for κ of square weights, 10 times this factor",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="B",
        help="show how the weights changed from PATH to B; name prefixes such as module. are "
        "ignored",
    )
    parser.add_argument(
        "--names",
        nargs=2,
        metavar=("NAME", "NAME_B"),
        help="with --compare: names to show for PATH and B",
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="also measure the attention heads, which config.json in the same folder describes",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the base model of the adapter (such as LoRA) in PATH: measure the adapted weights "
        "and the size of the change",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="append each measured weight to FILE; after an interruption, measure only the "
        "weights that are not in FILE",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="compute the singular values of matrices on this device (default: cpu); several "
        "processes use one GPU each",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a CSV file; - prints CSV instead of the table",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a self-contained HTML page"
    )
    parser.add_argument(
        "--sarif", type=Path, metavar="FILE", help="write a SARIF 2.1.0 file for code scanning"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="append a Markdown summary, for example to $GITHUB_STEP_SUMMARY; - prints it instead "
        "of the table",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing files of --csv, --html and --sarif",
    )
    parser.add_argument(
        "--explain", action="store_true", help="explain the columns below the table"
    )
    _add_common(parser)


def _add_repair(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "repair",
        help="write a copy of a checkpoint whose weights satisfy a limit on κ",
        description="Write a copy of a checkpoint in which κ of every weight is at most K. Each "
        "weight with a larger condition number is replaced by a nearest matrix that satisfies the "
        "limit in the stored dtype. Everything else is copied unchanged. No file is overwritten.",
        epilog="example: wellcond repair model.safetensors fixed.safetensors --max-condition 1000",
    )
    parser.add_argument("path", type=Path, metavar="IN", help=_INPUT)
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the file or directory to write, in the format of IN; must not exist",
    )
    parser.add_argument(
        "--max-condition",
        type=_limit,
        required=True,
        metavar="K",
        help="the upper limit on κ of every weight, at least 1",
    )
    parser.add_argument(
        "--dequantise",
        "--dequantize",
        action="store_true",
        help="write quantised weights as plain tensors in safetensors format; with "
        "--max-condition inf, change nothing else",
    )
    _add_common(parser)


def check_combinations(arguments: argparse.Namespace) -> None:
    """Raises ValueError if options cannot be combined."""
    instead = instead_of_table(arguments)
    if len(instead) > 1:
        raise ValueError(
            f"{instead[0]} and {instead[1]} cannot be combined, because both print to standard "
            "output. Write one of them to a file."
        )
    if arguments.explain and instead:
        raise ValueError(
            f"--explain cannot be combined with {instead[0]}, which replaces the table. Leave out "
            "one of them."
        )
    if arguments.baseline is not None and arguments.compare is not None:
        raise ValueError("--baseline and --compare cannot be combined. Run one at a time.")
    if arguments.max_rise is not None and arguments.baseline is None:
        raise ValueError("--max-rise requires --baseline FILE.")
    if arguments.resume is not None and arguments.compare is not None:
        raise ValueError(
            "--resume and --compare cannot be combined. Audit each checkpoint with its own "
            "--resume."
        )
    if arguments.names is not None and arguments.compare is None:
        raise ValueError("--names requires --compare B, because it names PATH and B.")
    if len(arguments.paths) > 1:
        for option in ("baseline", "compare", "base", "html", "resume"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option} requires exactly one PATH, got {len(arguments.paths)}. Audit one "
                    "checkpoint at a time."
                )


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raises if an output file cannot or must not be written; runs before the measurements."""
    inputs = [path for path in (*arguments.paths, arguments.compare) if path is not None]
    outputs: list[Path] = []
    for option in ("csv", "html", "sarif", "markdown", "resume"):
        path: Path | None = getattr(arguments, option)
        if path is None or (option in ("csv", "markdown") and path == Path("-")):
            continue
        option = f"--{option}"
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{option} must be in an existing directory, but {path.parent} is not one. Create "
                "it first."
            )
        if path.is_dir():
            raise IsADirectoryError(f"{option} must be a file, but {path} is a directory.")
        if any(path.resolve() == other.resolve() for other in inputs + outputs):
            raise ValueError(f"{option} must be a separate file, but {path} is given twice.")
        if os.path.lexists(path):
            if any(path.name.endswith(suffix) for suffix in _WEIGHTS):
                raise ValueError(
                    f"{option} must not replace a checkpoint, but by its name {path} may be one."
                )
            if option not in ("--markdown", "--resume") and not arguments.overwrite:
                raise error_of_existing(path, option)
        outputs.append(path)


def error_of_existing(path: Path, option: str) -> FileExistsError:
    return FileExistsError(
        f"{path} already exists and is not overwritten. Use --overwrite, or another {option}."
    )


def instead_of_table(arguments: argparse.Namespace) -> list[str]:
    """The options that print something other than a table."""
    printed = [option for option in ("csv", "markdown") if getattr(arguments, option) == Path("-")]
    return [f"--{option} -" for option in printed] + ["--json"] * arguments.json


def max_rise(arguments: argparse.Namespace) -> float:
    """The value of --max-rise, or its default."""
    rise: float | None = arguments.max_rise
    return rise or 2.0
