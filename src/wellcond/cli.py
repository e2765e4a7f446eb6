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
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import wellcond
from wellcond.text import dump_json, escape, is_out_of_memory, list_some, save_text

if TYPE_CHECKING:
    from wellcond.audits.baseline import Baseline, BaselineComparison
    from wellcond.audits.progress import Progress, ProgressCallback
    from wellcond.report.comparison import Comparison
    from wellcond.report.gate import Fault, Verdict
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
        "--compare, the exit code is about B. Several checkpoints are audited one by one, and the "
        "exit code is the largest of theirs.",
        epilog="example: wellcond audit model.safetensors --max-condition 1e4 --html report.html",
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help=f"{_INPUT}; or several of these"
    )
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
        help="of an adapter (LoRA) the model it adapts: measure the sum, and what is added",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write CSV; - prints it instead of the table"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, self-contained")
    parser.add_argument(
        "--sarif", type=Path, metavar="FILE", help="write SARIF 2.1.0, for code scanning"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="append a summary in Markdown, as to $GITHUB_STEP_SUMMARY; - prints it instead of the "
        "table",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of --csv, --html and --sarif"
    )
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
    inputs = [path for path in (*arguments.paths, arguments.compare) if path is not None]
    outputs: list[Path] = []
    for option in ("csv", "html", "sarif", "markdown"):
        path: Path | None = getattr(arguments, option)
        if path is None or (option in ("csv", "markdown") and path == Path("-")):
            continue
        option = f"--{option}"
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
            if option != "--markdown" and not arguments.overwrite:
                raise _exists(path, option)
        outputs.append(path)


def _exists(path: Path, option: str) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already and is not overwritten. Give --overwrite, or another {option}."
    )


def _check_combinations(arguments: argparse.Namespace) -> None:
    """Raises if options do not go together."""
    instead = _instead_of_table(arguments)
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
        raise ValueError("--max-rise must come with --baseline FILE, from which κ may rise.")
    if arguments.names is not None and arguments.compare is None:
        raise ValueError("--names must come with --compare B: these two are what it names.")
    if len(arguments.paths) > 1:
        for option in ("baseline", "compare", "base", "html"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option} must come with one PATH, but {len(arguments.paths)} are given. "
                    "Audit one at a time."
                )


class _Audited(NamedTuple):
    """What is the matter with a path, and what became of the baseline if there is one."""

    verdict: Verdict
    comparison: BaselineComparison | None = None


def _audit(arguments: argparse.Namespace) -> int:
    _check_combinations(arguments)
    _check_outputs(arguments)

    from wellcond.audits.baseline import read_baseline
    from wellcond.audits.compare import check_names
    from wellcond.report.gate import count_verdicts
    from wellcond.report.report import AuditReport

    check_names(arguments.names)
    _set_threads(arguments)
    baseline = read_baseline(arguments.baseline) if arguments.baseline is not None else None
    audited = [_audit_or_fail(path, arguments, baseline) for path in arguments.paths]
    verdicts = [one.verdict for one in audited]
    # Files first: whoever reads the output may go, as `head` does.
    _write_files(verdicts, arguments)
    _print_document(audited, arguments)
    several = len(audited) > 1
    is_table = not _instead_of_table(arguments)
    gap = ""
    for verdict, comparison in audited:
        if is_table and verdict.report is not None:
            if several:
                print(gap + escape(verdict.path))
                gap = "\n"
            print(verdict.report.table(top=arguments.top), end="")
            if arguments.roles and isinstance(verdict.report, AuditReport):
                print(f"\n{verdict.report.by_role()}", end="")
            if arguments.explain:
                print(f"\n{verdict.report.legend()}", end="")
        _print_faults(verdict, several)
        if comparison is not None:
            _print_comparison_with_baseline(comparison, arguments.baseline, _rise(arguments))
    code = max(verdict.exit_code for verdict in verdicts)
    if several and code:
        print(f"wellcond: {count_verdicts(verdicts)}", file=sys.stderr)
    return code


def _rise(arguments: argparse.Namespace) -> float:
    rise: float | None = arguments.max_rise
    return rise or 2.0


def _audit_or_fail(
    path: Path, arguments: argparse.Namespace, baseline: Baseline | None
) -> _Audited:
    """What is the matter with one path, also if that is that there is no answer."""
    from wellcond.report.gate import Fault, Rule, Verdict

    try:
        return _audit_one(path, arguments, baseline)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        return _Audited(Verdict(path, None, [Fault(Rule.not_audited, _describe(error))]))


def _audit_one(path: Path, arguments: argparse.Namespace, baseline: Baseline | None) -> _Audited:
    from wellcond.audits.audit import audit
    from wellcond.audits.baseline import compare_with_baseline
    from wellcond.audits.compare import check_names, measure_changes
    from wellcond.audits.sources import source_of
    from wellcond.report.comparison import compare_reports
    from wellcond.report.gate import (
        Verdict,
        find_exceeding,
        find_low_coverage,
        find_unsound,
    )
    from wellcond.report.page import CURVES

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

    limit, min_coverage = arguments.max_condition, arguments.min_coverage
    before = look(path) if arguments.compare is not None else None
    later = look(arguments.compare or path)
    result: AuditReport | Comparison = later
    if before is not None:
        old, new = (source_of(one, base=arguments.base) for one in (path, arguments.compare))
        result = compare_reports(before, later, check_names(arguments.names))
        try:
            result = measure_changes(result, old, new, progress=_progress("comparing"))
        finally:
            _finish_progress()
    comparison = None
    if baseline is not None:
        comparison = compare_with_baseline(later, baseline, _rise(arguments))
    is_gated = any(gate is not None for gate in (limit, min_coverage, baseline))
    exceeding = [] if limit is None else result.exceeding(limit)
    faults = [
        *find_low_coverage(later, min_coverage),
        *find_unsound(later, is_gated),
        *find_exceeding(exceeding, len(later.findings), limit),
        *(_faults_of(comparison, _rise(arguments)) if comparison is not None else ()),
    ]
    for fault in find_low_coverage(before, None) if before is not None else ():
        print(f"wellcond: warning: {fault.text}", file=sys.stderr)
    return _Audited(Verdict(arguments.compare or path, result, faults, is_gated), comparison)


def _instead_of_table(arguments: argparse.Namespace) -> list[str]:
    """The options that print something else than a table."""
    printed = [option for option in ("csv", "markdown") if getattr(arguments, option) == Path("-")]
    return [f"--{option} -" for option in printed] + ["--json"] * arguments.json


def _write_files(verdicts: Sequence[Verdict], arguments: argparse.Namespace) -> None:
    from wellcond.report.gate import format_markdown, format_sarif

    limit = arguments.max_condition
    if arguments.sarif is not None:
        text = format_sarif(verdicts, Path.cwd())
        _write(text, arguments.sarif, "--sarif", arguments.overwrite)
    if arguments.markdown not in (None, Path("-")):
        with arguments.markdown.open("a", encoding="utf-8") as file:
            file.write(format_markdown(verdicts, limit))
    reports = [verdict.report for verdict in verdicts if verdict.report is not None]
    if reports and arguments.csv not in (None, Path("-")):
        _write(_csv(verdicts), arguments.csv, "--csv", arguments.overwrite)
    if reports and arguments.html is not None:
        page = reports[0].to_html(max_condition=limit)
        _write(page, arguments.html, "--html", arguments.overwrite)


def _print_document(audited: Sequence[_Audited], arguments: argparse.Namespace) -> None:
    """What is asked for instead of a table; of one path without a report nothing."""
    from wellcond.report.gate import format_markdown

    verdicts = [verdict for verdict, _ in audited]
    limit = arguments.max_condition
    if arguments.markdown == Path("-"):
        print(format_markdown(verdicts, limit), end="")
    if arguments.csv == Path("-"):
        print(_csv(verdicts), end="")
    if not arguments.json:
        return
    documents = []
    for verdict, comparison in audited:
        if verdict.report is not None:
            compared = (
                {"max_rise": _rise(arguments), "baseline": asdict(comparison)} if comparison else {}
            )
            documents.append(verdict.report.to_dict(limit) | compared)
    if len(audited) > 1:
        failed = [
            {"source": str(verdict.path), "error": fault.text}
            for verdict in verdicts
            if verdict.report is None
            for fault in verdict.faults
        ]
        print(dump_json({"schema": 1, "reports": documents, "not_audited": failed}), end="")
    elif documents:
        print(dump_json(documents[0]), end="")


def _csv(verdicts: Sequence[Verdict]) -> str:
    from wellcond.report.gate import format_csv_of_all
    from wellcond.report.report import AuditReport

    reports = [verdict.report for verdict in verdicts if verdict.report is not None]
    if len(verdicts) > 1:
        return format_csv_of_all(one for one in reports if isinstance(one, AuditReport))
    return "".join(report.to_csv() for report in reports)


def _faults_of(comparison: BaselineComparison, rise: float) -> list[Fault]:
    """What became worse since a baseline."""
    from wellcond.report.gate import Fault, Rule
    from wellcond.report.pairing import QUANTITIES

    faults = []
    if comparison.risen:
        quantities = [QUANTITIES[one.quantity] for one in comparison.risen]
        weights = {
            one.label: f"{quantity} was {one.before:.4g} in the baseline and is {one.after:.4g}"
            for one, quantity in zip(comparison.risen, quantities, strict=True)
        }
        text = _describe_risen(comparison, rise)
        faults.append(Fault(Rule.baseline, text, weights))
    if comparison.missing:
        text = f"{_count_weights(comparison.missing)} of the baseline not there"
        weights = dict.fromkeys(comparison.missing, "it is in the baseline, and not there")
        faults.append(Fault(Rule.missing, f"{text}: {list_some(comparison.missing)}", weights))
    return faults


def _print_faults(verdict: Verdict, several: bool) -> None:
    """On standard error, after the path if there are several."""
    from wellcond.report.gate import Rule

    for fault in verdict.faults:
        if fault.rule in (Rule.baseline, Rule.missing):  # printed with what is new
            continue
        kind = "error: " if verdict.report is None else "" if fault.is_error else "warning: "
        path, text = escape(verdict.path), escape(fault.text)
        is_named = text.startswith(path) or fault.rule is Rule.min_coverage
        which = f"{path}: " if several and not is_named else ""
        print(f"wellcond: {kind}{which}{text}", file=sys.stderr)


def _describe_risen(comparison: BaselineComparison, rise: float) -> str:
    from wellcond.audits.baseline import SQUARES
    from wellcond.report.pairing import QUANTITIES

    worst = list_some(
        f"{one.label} ({QUANTITIES[one.quantity]} {one.before:.4g} to {one.after:.4g})"
        for one in comparison.risen
    )
    count, squares = _count_weights(comparison.risen), SQUARES * rise
    moved = f"{count} moved by more than {rise:g} times, κ of square weights {squares:g} times"
    return f"{moved}: {worst}"


def _print_comparison_with_baseline(
    comparison: BaselineComparison, path: Path, rise: float
) -> None:
    """What became of the weights of a baseline, on standard error."""
    if comparison.risen:
        print(f"wellcond: {_describe_risen(comparison, rise)}", file=sys.stderr)
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
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        code, message = 2, f"wellcond: error: {_describe(error)}\n"
    with contextlib.suppress(OSError):
        print(message, end="", file=sys.stderr)
    _drop_unwritten()
    return code


def _describe(error: Exception) -> str:
    """What the user reads of an error; raises it if it is a mistake of the program."""
    if isinstance(error, MemoryError | RuntimeError):
        if not is_out_of_memory(error):
            raise error
        own = isinstance(error, MemoryError) and str(error)
        return escape(own or "there is not enough memory")
    return escape(error)


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
