"""The options of every command, and which of them go together.

Nothing here waits for torch: help is shown, and misuse answered, before it is imported.
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
    """Answers misuse with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wellcond: error: {escape(message)} (see {self.prog} --help)\n")


def make_parser(command: str) -> argparse.ArgumentParser:
    """All commands; the experiments are imported only for `reproduce` and `bench`."""
    parser = _Parser(
        prog="wellcond",
        description="Condition numbers of neural network weights: audits, repairs, experiments.",
        epilog="example: wellcond audit model.safetensors",
    )
    parser.add_argument("--version", action="version", version=f"wellcond {wellcond.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_repair(commands)

    reproduce = commands.add_parser(
        "reproduce",
        help="run an experiment from the paper or beyond it",
        description="Run an experiment; writes results.json, a table and pictures.",
        epilog="example: wellcond reproduce denoise --data digits",
    )
    benchmarks = commands.add_parser(
        "bench",
        help="measure what regularising and auditing cost and how exact they are",
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
    """A module of the experiments, a package of its own that is not part of the wheel."""
    try:
        return importlib.import_module(f"wellcond_experiments.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the experiments are not installed ({error.name} is missing). They come with the "
            "repository: in a clone of it run `pip install ./experiments`."
        ) from None


_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar"),
    *(".npz", ".npy", ".msgpack", ".gguf", ".keras", ".h5", ".hdf5", ".onnx"),
    *(".jit", ".torchscript", ".ptl", ".pt2", ".pt.tar"),
)
_INPUT = (
    "a .safetensors file, a *.safetensors.index.json, a state dict of torch.save (.pt, .pth, .bin, "
    ".ckpt, .pth.tar), or a directory of these"
)


def _limit(text: str) -> float:
    number = _number(text)
    if not number >= 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text}")
    return number


def _positive(text: str) -> int:
    number = _number(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(number)


def _number(text: str) -> float:
    """The number in a text; nan if there is no number in it."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _add_common(parser: argparse.ArgumentParser) -> None:
    for name, what in (("include", "only the weights"), ("exclude", "leave out the weights")):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="GLOB", help=f"{what} that match"
        )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads to compute with")
    parser.add_argument("--json", action="store_true", help="print only a JSON document")


def _add_audit(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "audit",
        help="measure every weight of a checkpoint",
        description="Condition number, extreme singular values, ranks and penalty of every weight "
        "of a checkpoint, one tensor in memory at a time. With --max-condition, exit code 1 if a "
        "weight exceeds it; one whose condition number is infinite, undefined or unknown does. "
        "With --min-coverage, exit code 1 if less than that share of the parameters is measured. "
        "With --baseline, exit code 1 if a condition number or σ_max has risen, a stable rank has "
        "fallen, or a weight is missing. "
        "With any of these, exit code 1 if a tensor holds NaN or infinity or cannot be read. With "
        "--compare, the exit code applies to B. Several checkpoints are audited one by one; the "
        "exit code is the largest of theirs. Several processes share the work where torchrun or "
        "srun starts them.",
        epilog="example: wellcond audit model.safetensors --max-condition 1e4 --html report.html",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help=f"{_INPUT}; a file of Keras, Flax, NumPy, ONNX, GGUF, TorchScript or torch.export; "
        "or several of these",
    )
    parser.add_argument("--certify", action="store_true", help="enclose each number in an interval")
    parser.add_argument("--top", type=_positive, metavar="N", help="only the worst N in the table")
    parser.add_argument(
        "--sort",
        choices=("standing", "kappa"),
        default="standing",
        help="order rows by flags and standing among trained weights (the default), or by κ",
    )
    parser.add_argument(
        "--roles",
        action="store_true",
        help="show the worst weight of each role (q, k, v, o, up, gate, down) beneath the table",
    )
    parser.add_argument("--max-condition", type=_limit, metavar="K", help="exit 1 if κ exceeds K")
    parser.add_argument(
        "--min-coverage",
        type=_share,
        metavar="SHARE",
        help="exit 1 if less than this share of the parameters is measured, from 0 to 1",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="what --json printed before: exit 1 if κ or σ_max of a weight has risen since, its "
        "stable rank has fallen, or the weight is missing",
    )
    parser.add_argument(
        "--max-rise",
        type=_limit,
        metavar="TIMES",
        help="by how much κ and σ_max may rise and the stable rank may fall, default: 2 times; κ "
        "of square weights may rise 10 times as much",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="B",
        help="show how weights moved from PATH to B; prefixes such as module. in names are ignored",
    )
    parser.add_argument(
        "--names",
        nargs=2,
        metavar=("NAME", "NAME_B"),
        help="with --compare: the names to show for PATH and B",
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="also measure the heads of attention, which the config.json beside the file describes",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the model that an adapter (LoRA) adapts: measure the sum, and what is added",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="append every weight to FILE once it is measured, and take what an audit that was "
        "killed has left there",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write CSV; - prints it instead of the table"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")
    parser.add_argument(
        "--sarif", type=Path, metavar="FILE", help="write SARIF 2.1.0, for code scanning"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="append a summary in Markdown, for example to $GITHUB_STEP_SUMMARY; - prints it "
        "instead of the table",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of --csv, --html and --sarif"
    )
    parser.add_argument(
        "--explain", action="store_true", help="explain the columns beneath the table"
    )
    _add_common(parser)


def _add_repair(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "repair",
        help="write a checkpoint whose weights obey a limit",
        description="Copy a checkpoint with every weight above the limit replaced by a nearest "
        "matrix that obeys it as stored; everything else is copied. No file is overwritten.",
        epilog="example: wellcond repair model.safetensors fixed.safetensors --max-condition 1000",
    )
    parser.add_argument("path", type=Path, metavar="IN", help=_INPUT)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="where to write, in the format of IN; must not exist"
    )
    parser.add_argument(
        "--max-condition", type=_limit, required=True, metavar="K", help="the limit"
    )
    parser.add_argument(
        "--dequantise",
        "--dequantize",
        action="store_true",
        help="write weights that are stored as codes as plain tensors of safetensors; with "
        "--max-condition inf nothing else changes",
    )
    _add_common(parser)


def check_combinations(arguments: argparse.Namespace) -> None:
    """Raises if options do not go together."""
    instead = instead_of_table(arguments)
    if len(instead) > 1:
        raise ValueError(
            f"{instead[0]} and {instead[1]} must not be given together. Write one into a file."
        )
    if arguments.explain and instead:
        raise ValueError(
            f"--explain and {instead[0]} must not be given together: there is no table."
        )
    if arguments.baseline is not None and arguments.compare is not None:
        raise ValueError("--baseline and --compare must not be given together: one at a time.")
    if arguments.max_rise is not None and arguments.baseline is None:
        raise ValueError("--max-rise must come with --baseline FILE, with which it compares.")
    if arguments.resume is not None and arguments.compare is not None:
        raise ValueError(
            "--resume and --compare must not be given together: audit each with its own --resume."
        )
    if arguments.names is not None and arguments.compare is None:
        raise ValueError("--names must come with --compare B: it names PATH and B.")
    if len(arguments.paths) > 1:
        for option in ("baseline", "compare", "base", "html", "resume"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option} must come with one PATH, but {len(arguments.paths)} are given. "
                    "Audit one at a time."
                )


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raises, before anything is measured, if a file cannot be written or must not be."""
    inputs = [path for path in (*arguments.paths, arguments.compare) if path is not None]
    outputs: list[Path] = []
    for option in ("csv", "html", "sarif", "markdown", "resume"):
        path: Path | None = getattr(arguments, option)
        if path is None or (option in ("csv", "markdown") and path == Path("-")):
            continue
        option = f"--{option}"
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{option} must lie in a directory, but {path.parent} is not one. Create it."
            )
        if path.is_dir():
            raise IsADirectoryError(f"{option} must be a file, but {path} is a directory.")
        if any(path.resolve() == other.resolve() for other in inputs + outputs):
            raise ValueError(f"{option} must be a file of its own, but {path} is given twice.")
        if os.path.lexists(path):
            if any(path.name.endswith(suffix) for suffix in _WEIGHTS):
                raise ValueError(f"{option} must not replace weights, but {path} may hold some.")
            if option not in ("--markdown", "--resume") and not arguments.overwrite:
                raise error_of_existing(path, option)
        outputs.append(path)


def error_of_existing(path: Path, option: str) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already and is not overwritten. Give --overwrite, or another {option}."
    )


def instead_of_table(arguments: argparse.Namespace) -> list[str]:
    """The options that print something else than a table."""
    printed = [option for option in ("csv", "markdown") if getattr(arguments, option) == Path("-")]
    return [f"--{option} -" for option in printed] + ["--json"] * arguments.json


def max_rise(arguments: argparse.Namespace) -> float:
    """The value of --max-rise, or its default."""
    rise: float | None = arguments.max_rise
    return rise or 2.0
