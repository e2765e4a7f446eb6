"""The meaning of numbers: comparisons with random matrices, unusual facts, column texts."""

import csv
import io
import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.audits.compare import compare
from wellcond.linalg.gaussian import exceedance, gaussian_stable_rank


def linear(S: Tensor) -> nn.Linear:
    layer = nn.Linear(S.shape[1], S.shape[0], bias=False).to(S.dtype)
    with torch.no_grad():
        layer.weight.copy_(S)
    return layer


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()


def changed(m: int, n: int, *smallest: float) -> nn.Linear:
    """A Gaussian matrix with new smallest singular values, relative to the next larger one."""
    U, sigma, Vh = torch.linalg.svd(gaussian(m, n), full_matrices=False)
    count = len(smallest)
    sigma[-count:] = sigma[-count - 1] * torch.tensor(smallest, dtype=torch.float64)
    return linear((U * sigma) @ Vh)


def one(layer: nn.Module) -> tuple[wc.report.Finding, list[str]]:
    report = wc.audit(layer)
    (finding,) = report.findings
    return finding, report.unusual()


# --- facts ----------------------------------------------------------------------------------------


def test_finding_is_compared_with_random_matrices() -> None:
    finding, lines = one(linear(gaussian(30, 20)))
    assert finding.exceedance == exceedance((30, 20), finding.condition_number)
    assert finding.random_stable_rank == gaussian_stable_rank((30, 20))
    assert finding.stable_rank == pytest.approx(finding.random_stable_rank, rel=0.2)
    assert lines == []


@pytest.mark.parametrize(
    ("layer", "view"),
    [
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), "kernel"),
        (nn.Linear(5, 1, bias=False), ""),
    ],
)
def test_other_distributions_are_not_compared(layer: nn.Module, view: str) -> None:
    finding, lines = one(layer)
    assert finding.view == view
    assert math.isnan(finding.exceedance)
    assert math.isnan(finding.random_stable_rank)
    assert finding.largest_entry == float(layer.get_parameter("weight").detach().abs().max())
    assert lines == []


def test_operators_and_heads_are_not_compared() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    acting = wc.audit(convolution, example=torch.zeros(1, 2, 5, 5))
    heads = wc.audit(nn.MultiheadAttention(8, 2, bias=False), heads=True)
    by_label = {finding.label: finding for finding in (*acting.findings, *heads.findings)}
    others = [by_label[label] for label in ("weight:operator", "qk0", "vo1")]
    for finding in others:
        assert math.isnan(finding.exceedance)
        assert math.isnan(finding.largest_entry)
    assert not math.isnan(by_label["in_proj_weight:q"].exceedance)
    cells = {line.split()[0]: line for line in heads.table().splitlines()}
    assert not re.search("usual|top|bottom", cells["qk0"])
    assert re.search("usual|top|bottom", cells["in_proj_weight:q"])


def test_entries_are_compared_with_dtype_ranges() -> None:
    S = torch.tensor([[7e4, 1e-8, 0.0], [3e-8, 6e-8, 1e-42]])  # float16: half of 2^-24 is 2.98e-8
    finding, lines = one(linear(S))
    assert finding.largest_entry == pytest.approx(7e4)
    assert finding.subnormal_share == pytest.approx(1 / 6)
    assert finding.float16_zero_share == pytest.approx(2 / 6)
    as_float16 = int(((S.half() == 0) & (S != 0)).sum()) / 6
    assert finding.float16_zero_share == pytest.approx(as_float16)
    (line,) = lines
    assert "the largest entry, 7e+04, overflows in float16" in line.replace("7e4", "7e+04")
    assert "33 % of the entries underflow to zero in float16" in line
    assert "17 % of the entries are subnormal in float32" in line
    (half, said) = one(linear(torch.full((2, 2), 1e-5).half() + torch.eye(2).half()))
    assert (half.subnormal_share, half.float16_zero_share) == (0.5, 0.0)
    assert said[0].startswith("weight: 50 % of the entries are subnormal in float16. ")


def test_float16_bounds() -> None:
    smallest = 2.0**-25
    for size, gone in ((smallest, True), (smallest * (1 + 2**-20), False)):
        finding, _ = one(linear(torch.eye(3) * size))
        assert (torch.tensor(size).half() == 0) == gone
        assert finding.float16_zero_share == (1 / 3 if gone else 0.0)
    for largest, infinite in ((65504.0, False), (65520.0, True)):
        _, lines = one(linear(torch.eye(3) * largest))
        assert torch.tensor(largest).half().isinf() == infinite
        assert any("overflows in float16" in line for line in lines) == infinite


@pytest.mark.parametrize("S", [torch.zeros(3, 3), torch.full((3, 3), math.nan)])
def test_undefined_kappa_is_not_compared(S: Tensor) -> None:
    torch.manual_seed(0)
    report = wc.audit(nn.ModuleDict({"fine": nn.Linear(9, 9), "odd": linear(S)}))
    odd = next(finding for finding in report.findings if finding.name == "odd.weight")
    assert math.isnan(odd.exceedance)
    kinds = [flag.kind for flag in report.flags.get("odd.weight", ())]
    assert kinds == (["not_finite"] if S.isnan().any() else [])


# --- output formats -------------------------------------------------------------------------------


def test_json_and_html_have_the_same_facts() -> None:
    report = wc.audit(nn.ModuleDict({"odd": changed(40, 40, 1e-7), "vector": nn.Linear(5, 1)}))
    finding = next(f for f in report.findings if f.name == "odd.weight")
    by_name = {f["name"]: f for f in json.loads(report.to_json())["findings"]}
    assert by_name["odd.weight"]["exceedance"] == finding.exceedance
    assert by_name["vector.weight"]["exceedance"] == "nan"
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(report.to_csv()))}
    for key in ("exceedance", "random_stable_rank", "largest_entry", "subnormal_share"):
        assert float(rows["odd.weight"][key]) == getattr(finding, key)
    (line,) = report.unusual()
    assert report.table().startswith(f"{line}\n")
    page = report.to_html()
    assert "<h2>Flags</h2>" in page
    assert line.removeprefix("odd.weight") in page
    assert re.search(r'data-label="among trained">κ: top 1 %</td>', page)
    flags = json.loads(report.to_json())["flags"]
    assert [(one["weight"], one["kind"]) for one in flags] == [("odd.weight", "rank")]


def test_every_column_is_explained() -> None:
    for certify in (False, True):
        report = wc.audit(nn.Linear(4, 3), certify=certify)
        columns = re.split(r"\s{2,}", report.table().splitlines()[0].strip())
        assert list(report.columns()) == columns
        legend = report.legend()
        assert max(map(len, legend.splitlines())) <= 100
        for name in columns:
            assert re.search(rf"^{re.escape(name)}  +\S", legend, re.MULTILINE)
        for grade in wc.report.Grade:
            assert f'"{grade.name}"' in legend
    both = compare(wc.audit(nn.Linear(4, 3)), wc.audit(nn.Linear(4, 3)))
    assert set(both.columns()) <= set(re.split(r"\s{2,}", both.table().splitlines()[0].strip()))
    assert "κ before" in both.legend()
    assert "<dt>movement</dt>" in both.to_html()


# --- zero rows, and a dominant entry --------------------------------------------------------------


def lines(layer: nn.Module) -> str:
    return "\n".join(wc.audit(layer).unusual())


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "said"),
    [
        ((21, 32), [20], [], "row 20 is zero"),
        ((64, 32), [], [0], "column 0 is zero"),
        ((24, 24), [3, 5], [], "2 rows are zero: 3, 5"),
        ((24, 24), [3], [7], "row 3 is zero; column 7 is zero"),
        ((64, 32), [9], [], "row 9 is zero"),  # more rows than columns: the rank is full
    ],
)
def test_zero_rows_and_columns_are_not_a_collapse(
    shape: tuple[int, int], rows: list[int], columns: list[int], said: str
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.weight[:, columns] = 0
    (finding,) = wc.audit(layer).findings
    assert (list(finding.zero_rows), list(finding.zero_columns)) == (rows, columns)
    assert said in lines(layer)
    assert "collapsed" not in lines(layer)
    assert "`repair" not in lines(
        layer
    )  # a class that never occurs would get outputs from a repair


def test_collapse_in_addition_to_zero_rows() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 21, bias=False)
    with torch.no_grad():
        layer.weight[20] = 0
        layer.weight[3] = layer.weight[4]
    assert "row 20 is zero; rows 3 and 4 are equal; " in lines(layer)
    assert "2 directions have collapsed" in lines(layer)


def test_zero_filter_index_spans_all_groups() -> None:
    layer = nn.Conv2d(8, 16, 3, groups=2)
    with torch.no_grad():
        layer.weight[9] = 0
    assert "row 9 is zero" in lines(layer)


def test_zero_matrix_names_no_zero_rows() -> None:
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    (finding,) = wc.audit(layer).findings
    assert (finding.zero_rows, finding.zero_columns, finding.dominant_entry) == ((), (), ())


@pytest.mark.parametrize("entry", [1e30, -1e30, 3e38])
def test_dominant_entry_is_named(entry: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 64, bias=False)
    with torch.no_grad():
        layer.weight[20, 4] = entry
    (finding,) = wc.audit(layer).findings
    assert finding.dominant_entry == (20, 4)
    assert "at (20, 4), contributes more than 99.9 % of ‖S‖²" in lines(layer)
    assert "`repair" not in lines(layer)
    assert "collapsed" not in lines(layer)


def test_large_entry_is_not_dominant() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 64, bias=False)
    with torch.no_grad():
        layer.weight[20, 4] = 10 * layer.weight.norm()
    assert wc.audit(layer).findings[0].dominant_entry == ()
    assert wc.audit(nn.Linear(1, 4)).findings[0].dominant_entry == ()


def test_repair_is_not_suggested_for_computed_weights() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.tril())

    torch.manual_seed(0)
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        parametrized.weight = parametrized.weight.tril()
    for layer in (Masked(32, 32, bias=False), parametrized):
        assert "ConditionLimit" in lines(layer)
        assert "repair" not in lines(layer)
