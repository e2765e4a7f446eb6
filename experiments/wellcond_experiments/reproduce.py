"""`wellcond reproduce NAME`: runs an experiment, or fills the pages from its results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from joblib import cpu_count

from wellcond_experiments import evidence, figures, grid, prediction
from wellcond_experiments.command import positive, write_text
from wellcond_experiments.evidence import Compared, Evidence
from wellcond_experiments.grid import Runner, Setting
from wellcond_experiments.methods import METHODS
from wellcond_experiments.prediction import Case
from wellcond_experiments.settings import SETTINGS

PAGES = ("README.md", "docs/*.md", "docs/evidence/*.md")
PICTURES = Path("docs", "evidence")


def configure(names: Any) -> None:
    """Adds a subcommand per experiment."""
    for setting in SETTINGS.values():
        parser: argparse.ArgumentParser = names.add_parser(
            setting.name,
            help=setting.help,
            description=f"{setting.protocol} Every run is saved to its own file in --out, so an "
            "interrupted experiment resumes where it stopped.",
            epilog=f"example: wellcond reproduce {setting.name} --quick",
        )
        if setting.default_data:
            parser.add_argument(
                "--data",
                default="",
                metavar="digits|mnist|cifar10|PATH",
                help=f"default {setting.default_data}; {setting.quick_data} with --quick",
            )
        parser.add_argument(
            "--seeds",
            type=positive,
            help=f"number of reported seeds (default {setting.default_seeds}; 2 with --quick)",
        )
        parser.add_argument(
            "--quick",
            action="store_true",
            help="a short run that only checks that the experiment works",
        )
        if setting.workers is None:
            parser.add_argument(
                "--workers",
                type=positive,
                help="number of processes, of one thread each (default: one per core)",
            )
        parser.add_argument("--out", type=Path, help=f"default runs/{setting.name}")
        parser.add_argument("--overwrite", action="store_true", help="replace existing results")
        only = "print one JSON document instead of tables"
        parser.add_argument("--json", action="store_true", help=only)
        parser.add_argument(
            "--report",
            type=Path,
            nargs="?",
            const=Path("results"),
            metavar="FOLDER",
            help="run no training: write the tables and pictures of FOLDER/NAME.json (default "
            "results/NAME.json) into README.md and docs/ of the current directory",
        )
        parser.set_defaults(run=run, data="", workers=None)


def run(arguments: argparse.Namespace) -> int:
    kind = SETTINGS[arguments.experiment]
    if arguments.report is not None:
        return _report(kind, arguments.report / f"{kind.name}.json", Path())
    setting = kind(arguments.data, arguments.quick, arguments.seeds)
    folder = arguments.out or Path("runs", kind.name)
    workers = kind.workers or arguments.workers or cpu_count()
    document = Runner(setting, folder, workers, arguments.overwrite).results()
    found = Evidence(document)
    tables = setting.tables(found)
    parts = [setting.note(found), *(f"{t.title}:\n\n{t.markdown()}" for t in tables.values())]
    write_text(folder / "table.md", "\n".join(parts))
    pictures = [
        figures.save(drawing, folder / f"{name}.png")
        for name, drawing in setting.figures(found).items()
    ]
    if arguments.json:
        print(grid.dump_results(document), end="")
    else:
        print(setting.note(found), end="\n\n")
        for table in tables.values():
            table.print()
        names = ", ".join(["results.json", "table.md", *(path.name for path in pictures)])
        print(f"Written to {folder}: {names}")
    return int(setting.failed(found))


def _report(kind: type[Setting], results: Path, root: Path) -> int:
    """Writes the tables and pictures of the documentation in root."""
    if not (root / PICTURES.parent).is_dir():
        raise ValueError(
            "--report writes into docs/ of a clone. Run it in the directory that contains docs/."
        )
    document = grid.read(results)
    setting = kind.of(document)
    found = Evidence(document)
    pages = [page for pattern in PAGES for page in sorted(root.glob(pattern))]
    changed = evidence.fill_pages(pages, kind.name, setting.tables(found))
    verdicts, cases = _compared(results.parent)
    changed += evidence.fill_pages(pages, "early", prediction.tabulate(cases))
    changed += evidence.fill_pages(pages, "winners", {"table": evidence.list_winners(verdicts)})
    changed += evidence.fill_pages(pages, "methods", {"table": evidence.list_methods([*METHODS])})
    pictures = setting.figures(found) | {"winners": evidence.draw_winners(verdicts)}
    for name, drawing in pictures.items():
        changed.append(figures.save(drawing, root / PICTURES / f"{name}.svg"))
    print(f"Written: {', '.join(map(str, dict.fromkeys(changed))) or 'nothing'}")
    return 0


def _compared(folder: Path) -> tuple[Compared, list[Case]]:
    """Returns the verdicts and the cases with early measurements of all available results."""
    verdicts: Compared = {}
    cases: list[Case] = []
    for kind in SETTINGS.values():
        path = folder / f"{kind.name}.json"
        if path.exists():
            document = grid.read(path)
            setting, found = kind.of(document), Evidence(document)
            verdicts |= {(kind.name, what): v for what, v in setting.verdicts(found).items()}
            cases += setting.early(found)
    return verdicts, cases
