"""Output in notebooks: cells, short reprs, DataFrames and plots."""

import io
import math
import sys
from html.parser import HTMLParser
from typing import Any

import matplotlib
import matplotlib.pyplot
import pandas
import pytest
import torch
from torch import nn

import wellcond as wc

matplotlib.use("agg")
HOSTILE = "<script>alert(1)</script>&\x1b[31m.weight"


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    state = {f"{k}.weight": torch.randn(6 + k, 5) for k in range(24)}
    state["3.weight"] = torch.zeros(9, 5)
    state["4.weight"][0, 0] = math.nan
    state["5.weight"][:, 1] = state["5.weight"][:, 0]
    return {**state, HOSTILE: torch.randn(5, 5)}


class Reader(HTMLParser):
    """The texts of all cells by row; it checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag != "wbr":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data.strip()


def reports(state: dict[str, Any]) -> list[Any]:
    report = wc.audit(state)
    return [report, wc.compare(report, wc.audit({**state, "0.weight": torch.randn(6, 5)}))]


def test_cell_shows_first_rows_without_colors(state: dict[str, Any]) -> None:
    for report in reports(state):
        html = report._repr_html_()
        cell = Reader(html)
        assert cell.tags == {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "wbr"} - (
            {"b"} if "<b>" not in html else set()
        )
        assert "\x1b" not in html
        labels = [row[0] for row in cell.rows if len(row) > 1]
        whole = report.to_dataframe()
        assert labels[1:] == [label for label in whole.index if label in labels][:20]
        assert len(labels) == 21
        assert f"{len(whole) - 20} more rows" in html
        assert "background:#" not in html.replace(" ", "")  # no color that fits only one theme
        assert len(html) < 60_000


def test_cell_shows_numbers_of_table(state: dict[str, Any]) -> None:
    report = wc.audit({"w": state["0.weight"]})
    head, row = Reader(report._repr_html_()).rows
    shown = dict(zip(head, row, strict=True))
    assert shown["weight"] == "w"
    assert shown["κ"] == f"{report.findings[0].condition_number:.4g}"


def test_repr_is_one_line_and_str_is_table(state: dict[str, Any]) -> None:
    report, comparison = reports(state)
    for one in (report, comparison, *report.findings, wc.certify(torch.eye(3))):
        assert len(repr(one).splitlines()) == 1
        assert len(repr(one)) < 200
        assert "\x1b" not in repr(one)
    assert str(report) == report.table()
    assert str(comparison) == comparison.table()
    share = f"{100 * report.coverage.parameter_share:.1f}"
    start = f"<AuditReport of state dict: 25 matrices, {share} % of the parameters, "
    assert repr(report) == f"{start}{len(report.flags)} flagged, largest κ inf>"
    sound = next(
        one
        for one in report.findings
        if math.isfinite(one.condition_number) and one.name != HOSTILE
    )
    for part in (sound.label, f"κ {sound.condition_number:.4g}", f"{sound.sigma_max:.4g}"):
        assert part in repr(sound)
    assert "contains NaN" in repr(next(f for f in report.findings if f.name == "4.weight"))


def test_certificate_repr_states_uncertified() -> None:
    assert "not certified" in repr(wc.certify(torch.ones(3, 3)))
    sound = wc.certify(torch.diag(torch.tensor([2.0, 1.0])))
    assert f"κ in {sound.condition_number}, σ_max in {sound.sigma_max}" in repr(sound)
    assert "not certified" not in repr(sound)


def test_dataframe_equals_csv(state: dict[str, Any]) -> None:

    report, comparison = reports(state)
    frame = report.to_dataframe()
    assert list(frame.index) == [one.label.replace("\x1b", "\\x1b") for one in report.findings]
    assert frame["condition_number"].tolist() == pytest.approx(
        [one.condition_number for one in report.findings], nan_ok=True
    )
    saved = pandas.read_csv(io.StringIO(report.to_csv()))
    assert list(saved.columns) == list(frame.columns)
    numbers = ["sigma_max", "sigma_min", "stable_rank"]
    assert saved[numbers].to_numpy() == pytest.approx(frame[numbers].to_numpy(), nan_ok=True)
    both = comparison.to_dataframe()
    assert both.loc["0.weight", "ratio"] == comparison.pairs[0].ratio
    assert len(both) == len(comparison.pairs)


def test_plot_draws_spectra_and_condition_numbers(state: dict[str, Any]) -> None:
    report = wc.audit({name: one for name, one in state.items() if name != HOSTILE})
    left, right = report.plot(top=8)
    assert left.figure is right.figure
    drawn = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    measured = [f for f in report.findings[:8] if math.isfinite(f.sigma_max) and f.sigma_max]
    assert set(drawn) == {one.label for one in measured}
    for one in measured:
        assert list(drawn[one.label]) == pytest.approx(list(one.singular_values), nan_ok=True)
    widths = [bar.get_width() for bar in right.patches]
    finite = [f.condition_number for f in report.findings[:8] if math.isfinite(f.condition_number)]
    assert widths[-len(finite) :] == finite
    assert len(widths) == len(finite) + 1  # one bar for an infinite condition number
    left.figure.savefig(io.BytesIO())


def test_plot_escapes_names() -> None:
    names = ["_hidden.weight", "a$b$.weight", "$\\frac{.weight", "x" * 100]
    left, _ = wc.audit({name: torch.randn(4, 3) for name in names}).plot()
    assert len(left.get_legend().get_texts()) == 4
    left.figure.canvas.draw()


def test_a_plot_on_given_axes() -> None:
    _, axes = matplotlib.pyplot.subplots(2, 1)
    found = wc.audit(nn.Linear(3, 2)).plot(axes=axes)
    assert list(found) == list(axes)


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_missing_package_is_named(
    module: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = wc.audit(nn.Linear(3, 2))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{method}.. needs {module}: pip install {module}"):
        getattr(report, method)()
