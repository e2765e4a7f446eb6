"""The command line: arguments in, text and exit code out.

Exit codes: 0 done; 1 a limit that the user set is exceeded; 2 no answer (misuse, an unreadable or
damaged file, output that exists or cannot be written); 130 interrupted; 141 nobody reads the output
any more, as after `| head`: what a shell says of any program that the signal SIGPIPE ended.

What computes is imported by the command that needs it: help is not to wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import wellcond
from wellcond.text import dump_json, escape, is_out_of_memory, list_some, save_text

if TYPE_CHECKING:
    from wellcond.audits.baseline import BaselineComparison
    from wellcond.audits.progress import Progress, ProgressCallback
    from wellcond.report.comparison import Comparison
    from wellcond.report.report import AuditReport


class _Parser(argparse.ArgumentParser):
    """Answers misuse with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"wellcond: error: {escape(message)} (see {self.prog} --help)\n")


def _parser(command: str) -> argparse.ArgumentParser:
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
        help="run an experiment, of the paper or beyond it",
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


_LOUD = 0.5  # a smaller share of the parameters is said even if nobody asks
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
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
    """nan if it is none."""
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
    parser.add_argument("--json", action="store_true", help="print one JSON document alone")


def _add_audit(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "audit",
        help="measure every weight of a checkpoint",
        description="Condition number, extreme singular values, ranks and penalty of every weight "
        "of a checkpoint, one tensor in memory at a time. With --max-condition, exit code 1 if a "
        "weight exceeds it; one whose condition number is infinite, undefined or unknown does. "
        "With --min-coverage, exit code 1 if less than that share of the parameters is measured. "
        "With --baseline, exit code 1 if a condition number or σ_max has risen, a stable rank has "
        "fallen, or a weight is not there. "
        "With any of these, exit code 1 if a tensor holds NaN or infinity or cannot be read. With "
        "--compare, the exit code is about B.",
        epilog="example: wellcond audit model.safetensors --max-condition 1e4 --html report.html",
    )
    parser.add_argument("path", type=Path, help=_INPUT)
    parser.add_argument("--certify", action="store_true", help="enclose every number by intervals")
    parser.add_argument("--top", type=_positive, metavar="N", help="only the worst N in the table")
    parser.add_argument(
        "--sort",
        choices=("standing", "kappa"),
        default="standing",
        help="rows by flags and standing among trained weights (the default), or by κ",
    )
    parser.add_argument(
        "--roles",
        action="store_true",
        help="show beneath the table the worst weight of each role: q, k, v, o, up, gate, down",
    )
    parser.add_argument("--max-condition", type=_limit, metavar="K", help="exit 1 above K")
    parser.add_argument(
        "--min-coverage", type=_share, metavar="SHARE", help="exit 1 below that share, 0 to 1"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="what --json printed before: exit 1 if κ or σ_max of a weight has risen since, its "
        "stable rank has fallen, or it is gone",
    )
    parser.add_argument(
        "--max-rise",
        type=_limit,
        metavar="TIMES",
        help="by how much κ and σ_max may rise and the stable rank fall, default: 2 times; κ of "
        "square weights 10 times as much",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="B",
        help="how weights moved from PATH to B; module. and the like in names are passed over",
    )
    parser.add_argument(
        "--names",
        nargs=2,
        metavar=("NAME", "NAME_B"),
        help="with --compare: what PATH and B are called",
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="measure the heads of attention besides, by the config.json beside the file",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="of an adapter (LoRA) the model it adapts: measure W, W + s B A and s B A",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write CSV; - prints it instead of the table"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, self-contained")
    parser.add_argument("--overwrite", action="store_true", help="replace such files")
    parser.add_argument(
        "--explain", action="store_true", help="say beneath the table what its columns mean"
    )
    _add_common(parser)
    parser.set_defaults(run=_audit)


def _add_repair(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "repair",
        help="write a checkpoint whose weights obey a limit",
        description="Copy a checkpoint with every weight above the limit replaced by a nearest one "
        "that obeys it as stored; all else stays as it is. Nothing is overwritten.",
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
        "--max-condition inf they are not changed otherwise",
    )
    _add_common(parser)
    parser.set_defaults(run=_repair)


def _set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)


def _progress(verb: str) -> ProgressCallback | None:
    """A line on standard error that is written over, if that is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(step: Progress) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = f"{verb} {step}"[:width]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    return show


def _finish_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises, before anything is measured, if a file cannot be written or must not be."""
    inputs = [path for path in (arguments.path, arguments.compare) if path is not None]
    outputs: list[Path] = []
    for option, path in (("--csv", arguments.csv), ("--html", arguments.html)):
        if path is None or (option == "--csv" and path == Path("-")):
            continue
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{option} must lie in a directory, but {path.parent} is none. Create it first."
            )
        if path.is_dir():
            raise IsADirectoryError(f"{option} must be a file, but {path} is a directory.")
        if any(path.resolve() == other.resolve() for other in inputs + outputs):
            raise ValueError(f"{option} must be a file of its own, but {path} is given twice.")
        if os.path.lexists(path):
            if any(path.name.endswith(suffix) for suffix in _WEIGHTS):
                raise ValueError(f"{option} must not replace weights, as {path} may be.")
            if not arguments.overwrite:
                raise _exists(path, option)
        outputs.append(path)


def _exists(path: Path, option: str) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already and is not overwritten. Give --overwrite, or another {option}."
    )


def _audit(arguments: argparse.Namespace) -> int:
    to_stdout = arguments.csv == Path("-")
    if to_stdout and arguments.json:
        raise ValueError("--csv - and --json must not be given together. Write one into a file.")
    if arguments.explain and (to_stdout or arguments.json):
        other = "--json" if arguments.json else "--csv -"
        raise ValueError(f"--explain and {other} must not be given together: there is no table.")
    if arguments.baseline is not None and arguments.compare is not None:
        raise ValueError("--baseline and --compare must not be given together: one at a time.")
    if arguments.max_rise is not None and arguments.baseline is None:
        raise ValueError("--max-rise must come with --baseline FILE, from which κ may rise.")
    if arguments.names is not None and arguments.compare is None:
        raise ValueError("--names must come with --compare B: these two are what it names.")
    _check_outputs(arguments)

    from wellcond.audits.audit import audit
    from wellcond.audits.baseline import compare_with_baseline, read_baseline
    from wellcond.audits.compare import check_names, measure_changes
    from wellcond.audits.sources import source_of
    from wellcond.report.comparison import compare_reports
    from wellcond.report.page import CURVES

    names = check_names(arguments.names)
    _set_threads(arguments)

    def look(path: Path) -> AuditReport:
        try:
            report = audit(
                path,
                certify=arguments.certify,
                include=arguments.include,
                exclude=arguments.exclude,
                curves=CURVES if arguments.html and not arguments.compare else 0,
                progress=_progress("measuring"),
                heads=arguments.heads,
                base=arguments.base,
            )
            return report if arguments.sort == "standing" else report.sort(arguments.sort)
        finally:
            _finish_progress()

    limit, rise = arguments.max_condition, arguments.max_rise or 2.0
    baseline = read_baseline(arguments.baseline) if arguments.baseline is not None else None
    paths = [path for path in (arguments.path, arguments.compare) if path is not None]
    reports = [look(path) for path in paths]
    *earlier, later = reports
    result: AuditReport | Comparison = later
    if earlier:
        before, after = (source_of(path, base=arguments.base) for path in paths)
        result = compare_reports(earlier[0], later, names)
        try:
            result = measure_changes(result, before, after, progress=_progress("comparing"))
        finally:
            _finish_progress()
    comparison = compare_with_baseline(reports[0], baseline, rise) if baseline is not None else None
    if arguments.json:
        compared = (
            {"max_rise": rise, "baseline": asdict(comparison)} if comparison is not None else {}
        )
        text = dump_json(result.to_dict(limit) | compared)
    else:
        text = result.to_csv() if to_stdout else result.table(top=arguments.top)
        if arguments.roles and not to_stdout and not earlier:
            text += f"\n{later.by_role()}"
        if arguments.explain:
            text += f"\n{result.legend()}"
    # Files first: whoever reads the output may go, as `head` does.
    if arguments.csv is not None and not to_stdout:
        _write(result.to_csv(), arguments.csv, "--csv", arguments.overwrite)
    if arguments.html is not None:
        _write(result.to_html(max_condition=limit), arguments.html, "--html", arguments.overwrite)
    print(text, end="")
    for report in earlier:
        _enough(report, None)
    enough, sound = _enough(later, arguments.min_coverage), _sound(later)
    gated = any(gate is not None for gate in (limit, arguments.min_coverage, baseline))
    exceeding = [] if limit is None else result.exceeding(limit)
    if exceeding:
        worst = list_some(f"{f.label} ({f.condition_number:.4g})" for f in exceeding)
        unknown = any(math.isnan(f.condition_number) for f in exceeding)
        text = f"{len(exceeding)} of {len(later.findings)} matrices exceed {limit:g}"
        print(f"wellcond: {text}{' or have no κ' * unknown}: {worst}", file=sys.stderr)
    if comparison is not None:
        _print_comparison_with_baseline(comparison, arguments.baseline, rise)
    risen = comparison is not None and (comparison.risen or comparison.missing)
    return 1 if exceeding or risen or not enough or (gated and not sound) else 0


def _sound(report: AuditReport) -> bool:
    """Whether all could be read and is finite; says on standard error what is not."""
    from wellcond.report.findings import Status
    from wellcond.report.not_finite import describe_not_finite

    failed = [one for one in report.findings if one.status is Status.failed]
    if failed:
        named = list_some((f"{one.label} ({one.detail})" for one in failed), limit=3)
        print(f"wellcond: warning: {len(failed)} could not be measured: {named}", file=sys.stderr)
    if report.not_finite:
        print(f"wellcond: warning: {describe_not_finite(report.not_finite)}", file=sys.stderr)
    return not (failed or report.not_finite)


def _print_comparison_with_baseline(
    comparison: BaselineComparison, path: Path, rise: float
) -> None:
    """What became of the weights of a baseline, on standard error."""
    from wellcond.audits.baseline import SQUARES
    from wellcond.report.pairing import QUANTITIES

    if comparison.risen:
        worst = list_some(
            f"{one.label} ({QUANTITIES[one.quantity]} {one.before:.4g} to {one.after:.4g})"
            for one in comparison.risen
        )
        count, squares = _count_weights(comparison.risen), SQUARES * rise
        text = f"{count} moved by more than {rise:g} times, κ of square weights {squares:g} times"
        print(f"wellcond: {text}: {worst}", file=sys.stderr)
    others = (("of the baseline not there", comparison.missing), ("not in it", comparison.new))
    if words := [
        f"{_count_weights(names)} {where}: {list_some(names)}" for where, names in others if names
    ]:
        print(f"wellcond: {escape(path)}: {'; '.join(words)}", file=sys.stderr)


def _count_weights(weights: Sequence[object]) -> str:
    return f"{len(weights)} weight{'s' * (len(weights) != 1)}"


def _write(text: str, path: Path, option: str, overwrite: bool) -> None:
    try:
        save_text(text, path, overwrite)
    except FileExistsError:  # since it was looked for
        raise _exists(path, option) from None


def _enough(report: AuditReport, min_coverage: float | None) -> bool:
    """Whether it covers the share that is asked for; says on standard error what it lacks."""
    share = report.coverage.parameter_share
    if share >= (_LOUD if min_coverage is None else min_coverage):
        return True
    text = f"only {100 * share:.3g} % of the parameters of {escape(report.source)} were measured"
    if min_coverage is not None:
        text += f", less than {100 * min_coverage:.3g} %"
    if largest := report.coverage.largest_left_out:
        why = report.coverage.skipped
        named = (f"{escape(name)} ({size:,} entries, {why[name]})" for name, size in largest)
        text += f"; the largest that were left out: {', '.join(named)}"
    print(f"wellcond: {'warning: ' if min_coverage is None else ''}{text}", file=sys.stderr)
    return min_coverage is None


def _repair(arguments: argparse.Namespace) -> int:
    from wellcond.audits.repair import repair
    from wellcond.report.repairs import describe_kept

    _set_threads(arguments)
    try:
        report = repair(
            arguments.path,
            arguments.out,
            arguments.max_condition,
            include=arguments.include,
            exclude=arguments.exclude,
            dequantise=arguments.dequantise,
            progress=_progress("repairing"),
        )
    finally:
        _finish_progress()
    print(report.to_json() if arguments.json else report.table(), end="")
    if arguments.json and (kept := describe_kept(report.skipped)):
        print(f"wellcond: warning: {kept}", file=sys.stderr)
    if report.not_finite:
        from wellcond.report.not_finite import describe_not_finite

        print(
            f"wellcond: warning: copied: {describe_not_finite(report.not_finite)}", file=sys.stderr
        )
    return 0


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
    except (ValueError, OSError, ImportError) as error:
        code, message = 2, f"wellcond: error: {escape(error)}\n"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        own = isinstance(error, MemoryError) and str(error)
        code, message = (
            2,
            f"wellcond: error: {escape(own or 'there is not enough memory')}\n",
        )
    with contextlib.suppress(OSError):
        print(message, end="", file=sys.stderr)
    _drop_unwritten()
    return code


def _run(argv: Sequence[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), "")
    parser = _parser(command)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog += f" {arguments.command}"  # whose help has the options that there are
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    code: int = arguments.run(arguments)
    return code


def _drop_unwritten() -> None:
    """Lets go of what cannot be written, or the interpreter would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
