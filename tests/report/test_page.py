"""The pages of audits and comparisons: text, structure and layout."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.report import Coverage, Finding, Grade, Reason, Skipped, Status
from wellcond.report.findings import sort_key

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
LONG = "encoder_" * 15
HOSTILE = [
    "<script>alert(1)</script>",
    "layers.0.\"'><b>&",
    "a\x1b[2J\n\x00\u202e",
    "&amp;",
    "{{ 7 * 7 }}</style>",
    "y" * 300,
]
KINDS = [f"mlp.part_{k}.weight" for k in range(21)]
INF, NAN = math.inf, math.nan


def finding(label: str, kappa: float, **others: Any) -> Finding:
    """A computed finding, or one that contains NaN if kappa is nan."""
    name, _, view = label.partition(":")
    if math.isnan(kappa):
        others = {"status": Status.not_finite, "detail": "1 of 64 entries"} | others
        return Finding(name, view, (8, 8), "float32", **others)
    numbers = {
        "sigma_max": 2.0,
        "sigma_min": 2 / kappa,
        "condition_number": kappa,
        "stable_rank": 3.0,
        "rank": 8,
        "penalty": 0.5,
        "grade": Grade.computed,
        "status": Status.rank_deficient if math.isinf(kappa) else Status.ok,
    }
    return Finding(name, view, (8, 8), "float32", **(numbers | others))


def report(
    kappas: dict[str, float],
    findings: Sequence[Finding] = (),
    skipped: dict[str, Skipped] | None = None,
) -> wc.AuditReport:
    found = sorted([*findings, *(finding(*item) for item in kappas.items())], key=sort_key)
    coverage = Coverage(len(found), 0, skipped or {}, 1.0)
    return wc.AuditReport(found, coverage, "model.safetensors", {"wellcond": "0"})


def deep(layers: int, *kinds: str) -> dict[str, float]:
    """A different kappa below 1e5 for each kind in each layer, and one other weight."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return {name: 10 + 1e4 * ((7919 * i) % 997) / 997 for i, name in enumerate(names)} | {
        "head": 50.0
    }


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = {LONG: nn.Linear(3, 3), "flat": nn.Linear(2, 2), "fine": nn.Linear(40, 30)}
    with torch.no_grad():
        layers[LONG].weight.copy_(torch.diag(torch.tensor([1e3, 10.0, 1.0])))
        layers["flat"].weight.copy_(torch.diag(torch.tensor([1.0, 0.0])))
    return nn.ModuleDict(layers | {"a_table_with_a_long_name": nn.Embedding(9, 4)})


# --- reading a page -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A weight in a table: cells by column, and widths of bars in percent."""

    label: str
    cells: dict[str, str]
    bars: list[float]
    is_folded: bool
    is_marked: bool


class Page(HTMLParser):
    """A parsed page; parsing fails if the page is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tree = TreeBuilder()
        self.feed(text)
        self.close()
        assert not self.open
        self.root = self.tree.close()
        (body,) = self.root.iter("body")
        self.text = text_of(body)
        self.folds = {
            text_of(fold[0]): [text_of(cell) for cell in fold.iterfind(".//td[@id]")]
            for fold in self.root.iter("details")
        }
        folded = set(self.root.iterfind(".//details//tr"))
        self.rows = {  # by their ids
            first.get("id"): Row(
                text_of(first),
                {cell.get("data-label", ""): text_of(cell) for cell in node[1:]},
                [percent_of(bar) for bar in node.iter("div") if "fill" in bar.get("class", "")],
                node in folded,
                node.get("class") == "over",
            )
            for node in self.root.iter("tr")
            for first in node.iterfind("td[@id]")
        }
        self.labels = [row.label for row in self.rows.values()]
        self.opened = [row.label for row in self.rows.values() if not row.is_folded]
        self.marked = [row.label for row in self.rows.values() if row.is_marked]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), "an attribute twice"
        self.open.append(tag)
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        if tag in ("meta", "wbr"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        self.tree.data(data)

    def all(self, path: str) -> list[Element]:
        return self.root.findall(f".//{path}")

    def texts(self, path: str) -> list[str]:
        return [text_of(node) for node in self.all(path)]

    def column(self, name: str) -> dict[str, str]:
        return {row.label: row.cells[name] for row in self.rows.values()}

    @property
    def map(self) -> dict[str, tuple[str, str, str]]:
        """The color, symbol and title of each cell of the maps, by label."""
        found = {}
        for cell in self.root.iterfind(".//table[@class='heat']//td[a]"):
            label = self.rows[cell[0].get("href", "").removeprefix("#")].label
            assert label not in found
            title = cell[0].get("title", "").removeprefix(f"{label}: ")
            found[label] = (cell.get("class", ""), text_of(cell), title)
        return found


def text_of(node: Element) -> str:
    return re.sub(r"[ \n]+", " ", "".join(node.itertext())).strip()


def percent_of(node: Element) -> float:
    """The percentage of a style such as width:25% or left:25%."""
    return float(node.get("style", "").split(":")[1].removesuffix("%"))


def pages() -> list[str]:
    everything = deep(12, *KINDS) | dict.fromkeys(HOSTILE, 5.0)
    some = {f"h.{i}.x{k}": 10.0 ** (i + k) for i in range(4) for k in range(2)}
    before, after = report(everything), report(deep(13, *KINDS))
    return [
        wc.audit(model(), certify=True, curves=6).to_html(max_condition=100.0),
        before.to_html(max_condition=5e3),
        hostile().to_html(),
        wc.compare(before, after).to_html(max_condition=9e3),
        wc.compare(hostile(), hostile()).to_html(),
        wc.compare(report(some), report(some)).to_html(),
    ]


def hostile() -> wc.AuditReport:
    """A report whose texts are all hostile."""
    harm = HOSTILE[0] + HOSTILE[1] + HOSTILE[2]
    kappas = {f"layers.{i}.{name}": 2.0 + i for i in range(4) for name in HOSTILE}
    others = [
        Finding(name, harm, (8, 8), harm, detail=harm, status=Status.failed, method=harm)
        for name in HOSTILE
    ]
    drawn = finding(harm, 1e12, dominant_entry=(0, 0), singular_values=(2.0, 1.0), detail=harm)
    skipped = {name: Skipped(Reason.unread, harm) for name in HOSTILE}
    coverage = Coverage(1, 0, skipped, 1.0, note=harm)
    found = [*report(kappas).findings, *others, drawn]
    not_finite = {harm: wc.report.NotFinite(1, 0, 2)}
    return wc.AuditReport(found, coverage, harm, {harm: harm}, not_finite)


# --- safety and self-containment ------------------------------------------------------------------


def test_pages_are_well_formed_and_need_nothing_else() -> None:
    for text in pages():
        page = Page(text)
        nodes = list(page.root.iter())
        tags = {node.tag for node in nodes}
        assert not tags & {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
            "b",
        }
        assert len(page.all("style")) == 1
        assert not re.search(r"https?:|url\(|@import|javascript:", text)
        assert not [name for node in nodes for name in node.attrib if name.startswith("on")]
        ids = [node.attrib["id"] for node in nodes if "id" in node.attrib]
        assert len(ids) == len(set(ids))
        assert {node.attrib["href"] for node in page.all("*[@href]")} <= {
            f"#{name}" for name in ids
        }
        assert all(line.isprintable() for line in text.split("\n"))


def test_names_are_escaped_everywhere() -> None:
    kappas = {f"layers.{i}.{name}": 2.0 + i for i in range(4) for name in HOSTILE}
    page = Page(report(kappas).to_html(max_condition=3.0))
    shown = {name.encode("unicode_escape").decode() if "\n" in name else name for name in HOSTILE}
    expected = {f"layers.{i}.{name}" for i in range(4) for name in shown}
    assert set(page.labels) == set(page.map) == expected
    assert {head.attrib["title"] for head in page.all("th[@title]")} == shown


def test_names_break_between_words() -> None:
    """In the table and in the legend of the curves."""
    page = wc.audit(model(), curves=6).to_html()
    assert page.count(">fine.<wbr>weight<") == 2


@pytest.mark.parametrize(
    "rule", ["screen and (max-width", "print", "screen and (prefers-color-scheme: dark)"]
)
def test_style_has_media_rules(rule: str) -> None:
    (style,) = Page(report({"a": 2.0}).to_html()).all("style")
    assert f"@media {rule}" in text_of(style)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 5, 48])
def test_page_has_each_weight_once(layers: int) -> None:
    kappas = deep(layers, *KINDS)
    page = Page(report(kappas).to_html())
    assert Counter(page.labels) == Counter(list(kappas))
    assert page.column("κ") == {name: f"{kappa:.4g}" for name, kappa in kappas.items()}
    assert set(page.column("rank").values()) == {"8/8"}


def test_comparison_page_has_each_weight_once() -> None:
    before, after = {"a": 2.0, "b": 8.0, "old": 3.0}, {"a": 2.0, "b": 4.0, "new": 5.0}
    page = Page(wc.compare(report(before), report(after)).to_html())
    assert page.labels[:2] == ["b", "a"]
    assert page.column("κ before") == {"a": "2", "b": "8", "old": "3", "new": "-"}
    assert page.column("κ after") == {"a": "2", "b": "4", "old": "-", "new": "5"}
    assert page.column("moved most") == {"a": "", "b": "κ ×0.5", "old": "", "new": ""}
    moved = f"{math.log(2) / 0.9:.3g}"  # a square
    assert page.column("movement") == {"a": "0", "b": moved, "old": "-", "new": "-"}


def test_a_page_has_all_columns_of_the_table_and_explains_them() -> None:
    found = wc.audit(model(), certify=True)
    page = Page(found.to_html())
    heads = {head for head in page.texts("th") if "log scale" not in head}
    assert heads == set(found.columns())
    terms = set(page.texts("dt"))
    assert set(found.columns()) - {"grade"} <= terms
    assert {grade.name for grade in Grade} <= terms
    for name in ("κ certified", "dtype", "among trained"):
        assert set(page.column(name)) == {one.label for one in found.findings}


def test_bars_are_on_one_logarithmic_scale() -> None:
    page = Page(report({"a": 1e4, "b": 10.0, "c": 1.0, "d": INF, "e": NAN}).to_html())
    widths = {row.label: row.bars for row in page.rows.values()}
    assert widths == {"a": [100], "b": [25], "c": [0], "d": [100], "e": []}
    assert len(page.all("div[@class='fill infinite']")) == 1


def test_weights_with_equal_labels_are_both_shown() -> None:
    twice = [finding("a:q", 2.0), Finding("a:q", "", (2, 2), "float32", detail="the other")]
    page = Page(report({}, twice).to_html())
    assert page.labels == ["a:q", "a:q"]
    assert "the other" in page.text
    assert len(wc.compare(report({}, twice), report({}, twice)).pairs) == 2


def test_worst_rows_open_and_others_folded_by_layer() -> None:
    kappas = deep(48, *KINDS)
    text = report(kappas).to_html()
    page = Page(text)
    assert page.opened == sorted(kappas, key=kappas.__getitem__, reverse=True)[:30]
    assert len(page.folds) == 49
    *folds, (last, rest) = page.folds.items()
    for layer, (summary, labels) in enumerate(folds):
        assert {name.split(".mlp")[0] for name in labels} == {f"model.layers.{layer}"}
        assert labels == sorted(labels, key=kappas.__getitem__, reverse=True)
        worst = f"{kappas[labels[0]]:.4g}"
        assert summary == f"model.layers.{layer}: {len(labels)} more, κ up to {worst}"
    assert (last, rest) == ("No repeated layer: 1 more, κ up to 50", ["head"])
    assert len(text) < 1.2e6
    hundred = Page(report(deep(9, *KINDS[:11])).to_html())
    assert len(hundred.opened) == 100


def test_fold_titles_without_known_number() -> None:
    kappas = deep(12, *KINDS)
    part = {name: kappa for name, kappa in kappas.items() if "layers.11" not in name}
    half = Page(wc.compare(report(part), report(kappas)).to_html()).folds
    assert "model.layers.11: 21 more" in half
    assert [t for t in half if re.fullmatch(r"model.layers.10: \d+ more, movement up to 0", t)]
    lost = Page(report(dict.fromkeys(kappas, NAN)).to_html()).folds
    assert "model.layers.10: 21 more" in lost


def test_shared_note_is_printed_once() -> None:
    heads = [
        finding(f"h.{i}.attn:qk{h}", 3.0, detail="of 4 values") for i in range(3) for h in range(4)
    ]
    found = report({"fine": 2.0}, [*heads, finding("odd", INF)])
    page = Page(found.to_html())
    assert page.text.count("of 4 values") == 1
    assert sum(name.endswith(" [1]") for name in page.labels) == 12
    assert [text[:12] for text in page.texts("tr[@class='note']")] == ["the smallest"]
    assert len(page.all("*[@class='wrong']")) == 1
    assert found.table().count("of 4 values") == 1
    assert "h.0.attn:qk0, h.0.attn:qk1, h.0.attn:qk2 and 9 more: of 4 values" in found.table()


# --- limits ---------------------------------------------------------------------------------------


def test_limit_has_sentence_marks_and_line() -> None:
    found = wc.audit(model())
    page = Page(found.to_html(max_condition=100.0))
    assert page.marked == ["flat.weight", f"{LONG}.weight"]
    assert (
        f"2 of 3 weights exceed κ = 100, marked ▲: flat.weight, {LONG}.weight; "
        "the line across the bars marks this limit." in page.text
    )
    lines = [percent_of(node) for node in page.all("div[@class='limit']")]
    assert lines == pytest.approx([200 / 3] * 3, rel=1e-3)
    unlimited = Page(found.to_html())
    assert "exceed" not in unlimited.text.split("Flags")[0]
    assert not unlimited.marked + unlimited.all("div[@class='limit']")
    endless = Page(found.to_html(max_condition=INF))
    assert "1 of 3 weights exceed κ = inf, marked ▲: " in endless.text
    assert not endless.all("div[@class='limit']")
    harmless = Page(report({"a": 2.0}).to_html(max_condition=3.0))
    assert "0 of 1 weights exceed κ = 3; the line" in harmless.text
    assert not harmless.marked


def test_a_comparison_marks_each_side_that_exceeds_the_limit() -> None:
    before, after = (
        {"a": 9.0, "b": 2.0, "c": 9.0, "d": 2.0},
        {"a": 9.0, "b": 9.0, "c": 2.0, "d": 2.0},
    )
    page = Page(wc.compare(report(before), report(after)).to_html(max_condition=5.0))
    assert "3 of 4 weights exceed κ = 5" in page.text
    assert page.column("κ before") == {"a": "▲ 9", "b": "2", "c": "▲ 9", "d": "2"}
    assert page.column("κ after") == {"a": "▲ 9", "b": "▲ 9", "c": "2", "d": "2"}


def test_limit_is_marked_in_map_and_folds() -> None:
    kappas = deep(12, *KINDS)
    above = {name for name, kappa in kappas.items() if kappa > 2000}
    page = Page(report(kappas).to_html(max_condition=2000.0))
    assert {name for name, (_, symbol, _) in page.map.items() if symbol == "▲"} == above - {"head"}
    assert "▲above κ = 2000" in page.text
    assert set(page.marked) == above
    assert len(page.opened) == 100 < len(above)
    for summary, labels in page.folds.items():
        count = sum(label in above for label in labels)
        assert summary.endswith(f", {count} ▲") if count else "▲" not in summary


def test_json_names_limit_and_exceeding() -> None:
    found = wc.audit(model())
    content = json.loads(found.to_json(max_condition=100.0))
    assert content["max_condition"] == 100.0
    assert content["exceeding"] == ["flat.weight", f"{LONG}.weight"]
    assert "exceeding" not in found.to_dict()


# --- maps -----------------------------------------------------------------------------------------


def test_a_map_has_a_cell_for_every_weight_of_a_layer() -> None:
    kappas = deep(6, *KINDS)
    page = Page(report(kappas).to_html())
    said = {label: title for label, (_, _, title) in page.map.items()}
    assert said == {name: f"κ = {kappa:.4g}" for name, kappa in kappas.items() if name != "head"}
    assert "1 weight is in no repeated layer and only in the table." in page.text


def test_colors_are_in_the_order_of_kappa() -> None:
    kappas = {f"h.{i}.w{k}": 10.0 ** (2 * i + k) for i in range(4) for k in range(2)}
    cells = Page(report(kappas).to_html()).map
    steps = [int(cells[label][0][1:]) for label in sorted(kappas, key=kappas.__getitem__)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1], len(set(steps))) == (0, 10, 8)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.7, 5.7, [2, 5, 10]),
        (1.0, 1.0, [1, 2]),
        (1.0, 1e7, [10.0**k for k in range(8)]),
        (30.0, 1e16, [1e1, 1e3, 1e5, 1e7, 1e9, 1e11, 1e13, 1e15]),
        (15.0, 170.0, [10, 20, 50, 100, 200]),
    ],
)
def test_scale_covers_values_and_places_ticks(
    low: float, high: float, expected: list[float]
) -> None:
    kappas = {f"h.{i}.w{k}": high if (i, k) == (0, 0) else low for i in range(4) for k in range(2)}
    ticks = Page(report(kappas).to_html()).all("div[@class='scale']//span")
    assert [float(text_of(tick)) for tick in ticks] == pytest.approx(expected)
    lefts = [percent_of(tick) for tick in ticks]
    assert lefts[0] == 0
    assert max(lefts) <= 100
    decades = [math.log10(tick / expected[0]) for tick in expected]
    assert lefts == pytest.approx([x / decades[-1] * lefts[-1] for x in decades], rel=1e-3)


@pytest.mark.parametrize("limit", [None, 100.0])
def test_special_cells_differ_from_large_values(
    limit: float | None,
) -> None:
    kappas = {f"h.{i}.{kind}": 9.0 for i in range(4) for kind in ("a", "b", "c")}
    kappas |= {"h.0.a": INF, "h.1.a": NAN, "h.2.a": 1e9}
    del kappas["h.3.c"]
    bounded = finding("h.3.c", 8.0, grade=Grade.bounded)
    page = Page(report(kappas, [bounded]).to_html(max_condition=limit))
    cells = {label: cell[:2] for label, cell in page.map.items()}
    assert cells["h.0.a"] == ("positive", "∞")
    assert cells["h.1.a"] == ("unknown", "?")
    assert cells["h.2.a"] == ("s10", "▲" if limit else "")
    assert cells["h.3.c"] == ("s1", "≥")
    assert cells["h.0.b"] == ("s1", "")
    for meaning in ("∞infinite", "?no κ: the weight is zero", "≥a lower bound of κ"):
        assert meaning in page.text
    assert "no weight" not in page.text
    page = Page(report(kappas).to_html(max_condition=limit))
    assert "no weight" in page.text
    assert sum(not len(cell) for cell in page.all("table[@class='heat']/tbody//td")) == 1


def test_map_shows_worst_of_many_heads() -> None:
    kappas = {
        f"h.{i}.attn:{x}{h}": 2.0 + (5 * h + i) % 12
        for i in range(3)
        for x in ("qk", "vo")
        for h in range(12)
    }
    page = Page(report(kappas).to_html())
    assert page.map.keys() == {
        max((name for name in kappas if name.startswith(f"h.{i}.attn:{x}")), key=kappas.__getitem__)
        for i in range(3)
        for x in ("qk", "vo")
    }
    assert all(title.endswith(", worst of 12") for _, _, title in page.map.values())
    assert "Where * replaces a number, a cell shows the worst weight." in page.text
    assert "attn:qk*" in page.text
    assert len(page.labels) == 72


@pytest.mark.parametrize(
    "labels",
    [
        ["0.weight", "2.weight", "4.weight"],
        ["a", "b", "c"],
        [f"h.{i}.x{i}{j}" for i in range(6) for j in "abc"],
    ],
    ids=["one kind", "no layers", "nothing in common"],
)
def test_no_map_without_repeated_layers(labels: list[str]) -> None:
    page = Page(report(dict.fromkeys(labels, 2.0)).to_html())
    assert not page.all("table[@class='heat']")
    assert "Layers" not in page.text


def test_a_map_of_a_comparison_shows_the_movement() -> None:
    before = {f"h.{i}.{kind}": 10.0 for i in range(4) for kind in ("a", "b", "c")}
    after = before | {"h.0.a": 1000.0, "h.1.a": 1.0, "h.2.a": 10.01}
    after |= {"h.0.b": INF, "h.1.b": NAN, "h.4.a": 5.0}
    before |= {"h.2.b": INF, "h.3.b": INF}
    after |= {"h.2.b": 4.0, "h.3.b": INF}
    del after["h.3.c"]
    page = Page(wc.compare(report(before), report(after)).to_html(max_condition=100.0))
    cells = {label: cell[:2] for label, cell in page.map.items()}
    # log(100)/0.9 = 5.1 and log(10)/0.9 = 2.6, of a scale from 0 to 6.
    assert cells["h.0.a"] == ("s9", "▲")
    assert cells["h.1.a"] == ("s4", "")  # a fall as far as a rise
    assert cells["h.2.a"] == ("s0", "")
    ticks = page.texts("div[@class='scale']//span")
    assert ticks == ["0", "1", "2", "3", "4", "5", "6"]
    assert "Two trainings of a network usually differ by a movement of up to 2." in page.text
    assert cells["h.0.b"] == ("positive", "∞")
    assert cells["h.2.b"] == ("negative", "↓")
    assert cells["h.3.b"] == ("s0", "▲")
    assert cells["h.1.b"] == ("unknown", "?")
    assert cells["h.4.a"] == ("unknown", "+")
    assert cells["h.3.c"] == ("unknown", "−")
    assert page.map["h.0.a"][2] == "κ ×100, movement 5.12"
    assert page.map["h.2.a"][2] == "moved by less than 1 %"
    assert page.map["h.4.a"][2] == "κ - → 5"
    assert "▲above κ = 100 after" in page.text
    same = Page(wc.compare(report(before), report(before)).to_html()).map
    assert {color for color, _, _ in same.values()} == {"s0"}


def test_comparison_colors_follow_table_order() -> None:
    before = {f"h.{i}.{kind}": 10.0 for i in range(4) for kind in ("a", "b")}
    after = {label: 10 * 1.9 ** (-i if i % 2 else i) for i, label in enumerate(before)}
    later = [replace(f, sigma_max=2.0 + 40.0 * i) for i, f in enumerate(report(after).findings)]
    page = Page(wc.compare(report(before), report({}, later)).to_html())
    steps = [int(page.map[label][0][1:]) for label in page.labels]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]
    moves = [float(move) for move in page.column("movement").values()]
    assert moves == sorted(moves, reverse=True)


# --- curves ---------------------------------------------------------------------------------------


def test_curves_fall_from_one_to_the_last_singular_value() -> None:
    drawn = [
        finding("a", 1e3, singular_values=(10.0, 1.0, 0.01)),
        finding("b", INF, singular_values=(1e300, 1e-300, 0.0)),
        finding("one", 1.0, singular_values=(1.0,)),
        finding("zero", NAN, singular_values=(0.0, 0.0)),
    ]
    page = Page(report({}, drawn).to_html())
    assert page.texts("figure//li") == ["b", "a"]
    lines = [line.attrib["points"] for line in page.all("g/polyline")]
    curves = [[float(n) for n in re.split("[ ,]", points)] for points in lines]
    assert curves[1] == pytest.approx([0, 0, 0.5, 1 / 17, 1, 3 / 17], rel=1e-3)
    assert curves[0] == [0, 0, 0.5, 1, 1, 1]
    assert not Page(report({"a": 2.0}).to_html()).all("figure")


# --- skipped tensors ------------------------------------------------------------------------------


def test_tensors_without_matrices_are_folded() -> None:
    page = Page(wc.audit(model()).to_html())
    assert page.texts("summary") == ["Not matrices: 3 (vector)"]
    folded = page.texts("details//dt")
    assert sorted(folded) == sorted(["flat.bias", "fine.bias", f"{LONG}.bias"])
    # An embedding is a matrix, so the page lists it as skipped.
    assert "a_table_with_a_long_name.weight" in page.texts("dt")


def test_many_skipped_tensors_are_folded() -> None:
    skipped = {f"n{i}": Skipped(Reason.vector) for i in range(1000)}
    skipped |= {f"e{i}": Skipped(Reason.empty, f"shape (0, {i})") for i in range(500)}
    skipped |= {f"q{i}": Skipped(Reason.packed, f"int{i}") for i in range(300)}
    page = Page(report({"a": 2.0}, skipped=skipped).to_html())
    summaries = [f"300 {Reason.packed.value}", "Not matrices: 1000 (vector), 500 (empty)"]
    assert page.texts("summary") == summaries
    reasons = dict(zip(page.texts("details//dt"), page.texts("details//dd"), strict=True))
    assert reasons == {name: str(why) for name, why in skipped.items()}
    few = dict(list(skipped.items())[-5:])
    assert not Page(report({"a": 2.0}, skipped=few).to_html()).all("details")


# --- in a browser ---------------------------------------------------------------------------------


def look(page: Path, measure: str, *widths: int) -> list[Any]:
    """Measures a page in frames of these widths, because windows are at least 500 wide."""
    text = page.read_text().replace(
        "</body>",
        f"<script>parent.postMessage(JSON.stringify({measure}), '*')</script></body>",
    )
    (page.parent / "inner.html").write_text(text)
    outer = page.parent / "outer.html"
    outer.write_text(
        '<pre id="probe"></pre><script>onmessage = e => probe.append(e.data + "\\n")</script>'
        + "".join(f'<iframe src="inner.html" width="{w}" frameborder="0"></iframe>' for w in widths)
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += f"--window-size=1500,900 --user-data-dir={page.parent / 'profile'}"
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *flags.split(), outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(page.parent)},
    )
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None
    return [json.loads(line) for line in match[1].splitlines()]


SEEN = """{
  screen: innerWidth,
  width: document.documentElement.scrollWidth,
  right: Math.max(...[...document.querySelectorAll(
    "td, th, dt, dd, p, li, h1, h2, h3, figure, .steps, summary, .ticks span, .rows")]
    .filter(e => !e.closest(".heat")).map(e => e.getBoundingClientRect().right)),
  kappa: [...document.querySelectorAll('.scroll:not(details *) [data-label="κ"]')]
    .map(e => e.getBoundingClientRect().right),
  label: Math.min(...[...document.querySelectorAll("figure text")]
    .map(e => e.getBoundingClientRect().height)),
  cells: [...document.querySelectorAll(".heat tbody a")].map(e => e.getBoundingClientRect())
    .map(box => Math.min(box.width, box.height)),
  colors: [...new Set([...document.querySelectorAll(".steps i")]
    .map(e => getComputedStyle(e).backgroundColor))],
  folded: document.querySelectorAll("details").length,
}"""


def whole_page() -> str:
    """A page with many layers and kinds, hostile names, infinite and unknown κ, and curves."""
    kappas = deep(48, *KINDS, *(f"self_attn:qk{h}" for h in range(32)))
    kappas |= {f"{name}.{LONG}": 5.0 for name in HOSTILE}
    kappas |= {f"layers.{i}.{name}": 2.0 for i in range(3) for name in HOSTILE}
    kappas |= {"model.layers.3.mlp.part_2.weight": INF}
    kappas |= {"model.layers.4.mlp.part_2.weight": NAN}
    curves = finding("drawn", 1e3, singular_values=(10.0, 1.0, 0.01), detail="x" * 200)
    skipped = {f"{name}{LONG * 3}": Skipped(Reason.vector) for name in HOSTILE}
    skipped |= {f"q{i}": Skipped(Reason.packed, "int32") for i in range(300)}
    return report(kappas, [curves], skipped).to_html(max_condition=5e3)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
@pytest.mark.parametrize("kind", ["small", "large", "comparison", "changes"])
def test_page_fits_screen_width(kind: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    if kind == "small":
        wc.audit(model(), certify=True).to_html(page, max_condition=100.0)
    elif kind == "large":
        page.write_text(whole_page())
    elif kind == "changes":  # all columns, with the widths of a transformer
        names = [f"transformer.h.{i}.attn.c_attn.weight" for i in range(12) for _ in range(7)]
        names = [f"{name}{k}" for k, name in enumerate(names)]
        before = {name: torch.randn(48, 96) / 9 for name in names}
        after = {name: (W - W[:1]).bfloat16() for name, W in before.items()}
        wc.compare(before, after).to_html(page, max_condition=10.0)
    else:
        one = report(deep(12, *KINDS) | dict.fromkeys(HOSTILE, 5.0))
        wc.compare(one, report(deep(13, *KINDS))).to_html(page, max_condition=9e3)
    frames = look(page, SEEN, 390, 1400)
    assert sorted(seen["screen"] for seen in frames) == [390, 1400]
    for seen in frames:
        assert seen["width"] <= seen["screen"]
        assert seen["right"] <= seen["screen"]
        if kind == "small":
            assert len(seen["kappa"]) == 3
        if kind in ("small", "large"):
            assert max(seen["kappa"]) <= seen["screen"]
            assert seen["label"] >= 10  # pixels, to be legible
        if kind in ("large", "comparison"):
            assert min(seen["cells"]) >= 12  # pixels, to be visible
            assert len(seen["colors"]) == 11
            assert seen["folded"] > 10


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
def test_map_link_opens_folded_row(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(whole_page())
    (seen,) = look(
        page,
        """(() => {
          const link = [...document.querySelectorAll(".heat a")].find(
            a => document.querySelector(a.getAttribute("href")).closest("details"));
          const row = document.querySelector(link.getAttribute("href"));
          const before = row.closest("details").open;
          link.click();
          return [before, row.closest("details").open];
        })()""",
        390,
    )
    assert seen == [False, True]
