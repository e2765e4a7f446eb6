"""The base class of reports: printing, and export to JSON, CSV, HTML and pandas."""

from __future__ import annotations

import abc
import csv
import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from wellcond.report.cell import render_cell
from wellcond.report.findings import Finding
from wellcond.report.page import Page, render
from wellcond.report.rows import Column, Row, visible_columns
from wellcond.text import dump_json, escape, format_table, list_some, save_text

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA = 1
# Printing more rows is slow (1 ms per row) and unreadable.
ROWS = 1000
WAY_TO_ALL = "; --csv FILE writes all rows"


class Report(abc.ABC):
    """The base class of audits and comparisons."""

    _COLUMNS: ClassVar[Sequence[Column[Any]]]
    _MEANINGS: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Returns plain data; numbers can be inf or nan."""

    @abc.abstractmethod
    def table(self, *, top: int | None = None) -> str:
        """Returns at most `top` rows as text, 1,000 by default, and a summary."""

    @abc.abstractmethod
    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        """Returns the first `top` rows, or all, in the order of the table."""

    @abc.abstractmethod
    def _records(self) -> list[dict[str, Any]]:
        """Returns the numbers of each row as in the CSV, and its unique label as "weight"."""

    @abc.abstractmethod
    def _page(self, max_condition: float | None) -> Page:
        """Returns the content of the page."""

    def columns(self) -> dict[str, str]:
        """Returns the meaning of each column of the table, by its header."""
        columns = visible_columns(self._COLUMNS, self._rows())
        return {one.header: self._MEANINGS[one.key] for one in columns if one.key in self._MEANINGS}

    def legend(self) -> str:
        """Returns `columns` as text, to be printed below the table."""
        meanings = self.columns()
        width = max(map(len, meanings)) + 2
        lines = (
            textwrap.fill(f"{name:<{width}}{meaning}", 100, subsequent_indent=" " * width)
            for name, meaning in meanings.items()
        )
        return "".join(f"{line}\n" for line in lines)

    def _text(self, rows: Sequence[Row]) -> str:
        columns = visible_columns(self._COLUMNS, rows)
        cells = ([row.cells[column.key] for column in columns] for row in rows)
        return format_table([column.header for column in columns], cells)

    def to_json(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """Returns `to_dict` as strict JSON, and writes it to `path` if one is given.

        inf and nan become the strings "inf" and "nan".
        """
        return save_text(dump_json(self.to_dict(max_condition)), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """Returns one HTML page without scripts and external files, and writes it to `path`.

        The page marks the weights above `max_condition`. The page of a comparison has two bars per
        weight, and its map shows `Pair.movement`.
        """
        return save_text(render(self._page(max_condition)), path)

    def to_dataframe(self) -> DataFrame:
        """Returns a pandas DataFrame with one row per weight and the columns of the CSV.

        The index contains the labels of the weights.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_dataframe() needs pandas: pip install pandas.") from None
        records = [
            {key: escape(cell) if isinstance(cell, str) else cell for key, cell in one.items()}
            for one in self._records()
        ]
        return pandas.DataFrame(records).set_index("weight")

    def _repr_html_(self) -> str:
        return render_cell(self._page(None))

    def __str__(self) -> str:
        return self.table()


def format_remarks(rows: Iterable[Row]) -> str:
    """Returns one line per note, with the weights to which it applies."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            labels.setdefault(row.note, []).append(row.label)
    return "".join(f"{list_some(names, 3)}: {escape(note)}\n" for note, names in labels.items())


def format_csv(columns: Iterable[str], records: Iterable[dict[str, Any]]) -> str:
    """Returns the records as CSV, with names escaped.

    An apostrophe precedes a text that a spreadsheet would evaluate as a formula.
    """

    def harmless(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        return f"'{escape(cell)}" if cell.startswith(("=", "+", "-", "@")) else escape(cell)

    text = io.StringIO()
    sheet = csv.DictWriter(text, list(columns), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows({key: harmless(cell) for key, cell in one.items()} for one in records)
    return text.getvalue()


def list_exceeding(
    findings: Iterable[tuple[str, Finding | None]], max_condition: float | None
) -> dict[str, Any]:
    """Returns the limit and the labels of the findings above it; {} without a limit."""
    if max_condition is None:
        return {}
    above = [label for label, finding in findings if finding and finding.exceeds(max_condition)]
    return {"max_condition": max_condition, "exceeding": above}
