"""The page that an audit writes: what it says, and how it looks on a phone and on a desk."""

import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.report.findings import sort_key

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
LONG = "encoder_" * 15
HOSTILE = [
    "<script>alert(1)</script>",
    "layers.0.\"'><b>&",
    "a\x1b[2J\n\x00\u202e",
    "&amp;",
    "y" * 300,
]
VOID = {"meta", "wbr"}
SHOWN = {"td", "th", "a"}


def diagonal(*entries: float) -> nn.Linear:
    layer = nn.Linear(len(entries), len(entries))
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(entries)))
    return layer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            LONG: diagonal(1e3, 10.0, 1.0),
            "flat": diagonal(1.0, 0.0),
            "fine": nn.Linear(40, 30),
            "some.where.a.table.with.a.long.name".replace(".", "_"): nn.Embedding(9, 4),
        }
    )


def finding(label: str, kappa: float, **others: Any) -> wc.report.Finding:
    """One that was computed, unless kappa is nan: then it could not be."""
    name, _, view = label.partition(":")
    if math.isnan(kappa):
        others = {"status": wc.report.Status.not_finite, "detail": "1 of 64 entries"} | others
        return wc.report.Finding(name, view, (8, 8), "float32", **others)
    status = wc.report.Status.rank_deficient if math.isinf(kappa) else wc.report.Status.ok
    numbers = {
        "sigma_max": 2.0,
        "sigma_min": 2 / kappa,
        "condition_number": kappa,
        "stable_rank": 3.0,
        "rank": 8,
        "penalty": 0.5,
        "grade": wc.report.Grade.computed,
        "status": status,
    }
    return wc.report.Finding(name, view, (8, 8), "float32", **(numbers | others))


def report(
    kappas: dict[str, float],
    findings: Sequence[wc.report.Finding] = (),
    skipped: dict[str, wc.report.Skipped] | None = None,
) -> wc.AuditReport:
    found = sorted([*findings, *(finding(*item) for item in kappas.items())], key=sort_key)
    coverage = wc.report.Coverage(len(found), 0, skipped or {}, 1.0)
    return wc.AuditReport(found, coverage, "model.safetensors", {"wellcond": "0"})


def deep(layers: int, *kinds: str) -> dict[str, float]:
    """A kappa of its own for each kind in each layer, below 1e5, and one weight besides."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return {name: 10 + 1e4 * ((7919 * i) % 997) / 997 for i, name in enumerate(names)} | {
        "head": 50.0
    }


KINDS = [f"mlp.part_{k}.weight" for k in range(21)]


class Parsed(HTMLParser):
    """What a page says to a browser; fails if it is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[tuple[str, dict[str, str], str]] = []  # with their text
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        assert len(attrs) == len(dict(attrs)), "an attribute twice"
        if tag in SHOWN:
            self.cells.append((tag, self.tags[-1][1], ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline")
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data
        if self.cells and not SHOWN.isdisjoint(self.open):
            *kept, text = self.cells[-1]
            self.cells[-1] = (*kept, text + data)

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def rows(self) -> dict[str, str]:
        """The names in the tables by their ids."""
        named = [(a["id"], text) for tag, a, text in self.cells if tag == "td" and "id" in a]
        assert len(named) == len(dict(named))
        return dict(named)

    def map_cells(self) -> dict[str, tuple[str, str, str]]:
        """Of each cell of a map by the label in its title: class, symbol, link."""
        found = {}
        for (tag, outer, _), (inner, link, symbol) in zip(self.cells, self.cells[1:], strict=False):
            if tag == "td" and inner == "a" and "title" in link:
                label = re.split(": (?=κ|it|every)", link["title"])[0]
                assert label not in found
                found[label] = (outer["class"], symbol, link["href"])
        return found


def pages() -> dict[str, str]:
    everything = deep(12, *KINDS) | dict.fromkeys(HOSTILE, 5.0)
    some = {f"h.{i}.x{k}": 10.0 ** (i + k) for i in range(4) for k in range(2)}
    return {
        "small": wc.audit(model(), certify=True, curves=6).to_html(max_condition=100.0),
        "deep": report(everything).to_html(max_condition=5e3),
        "hostile": report(
            {f"layers.{i}.{name}": 2.0 for i in range(4) for name in HOSTILE}
        ).to_html(),
        "comparison": wc.compare(report(everything), report(deep(13, *KINDS))).to_html(
            max_condition=9e3
        ),
        "both": wc.compare(report(some), report(some)).to_html(),
    }


# --- markup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages())
def test_a_page_is_well_formed_and_whole_in_itself(name: str) -> None:
    text = pages()[name]
    page = Parsed(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "b"}
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    assert len(page.ids) == len(set(page.ids))
    links = {a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"}
    assert links <= set(page.ids)
    assert all(line.isprintable() for line in text.split("\n"))


def test_names_are_text_wherever_they_stand() -> None:
    kappas = {f"layers.{i}.{name}": 2.0 + i for i in range(4) for name in HOSTILE}
    page = Parsed(report(kappas).to_html(max_condition=3.0))
    shown = {name.encode("unicode_escape").decode() if "\n" in name else name for name in HOSTILE}
    expected = {f"layers.{i}.{name}" for i in range(4) for name in shown}
    assert set(page.rows().values()) == expected
    assert set(page.map_cells()) == expected
    assert {a["title"] for tag, a, _ in page.cells if tag == "th" and "title" in a} == shown


def test_names_break_between_words() -> None:
    page = wc.audit(model()).to_html()
    assert 'class="text">fine.<wbr>weight</td>' in page
    assert "</svg>fine.<wbr>weight</li>" in page


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 5, 48])
def test_every_weight_is_there_once_with_its_numbers(layers: int) -> None:
    kappas = deep(layers, *KINDS)
    page = Parsed(report(kappas).to_html())
    rows = page.rows()
    assert Counter(rows.values()) == Counter(list(kappas))
    found = {}
    for number, (tag, attributes, text) in enumerate(page.cells):
        if tag == "td" and attributes.get("data-label") == "κ":
            found[page.cells[number - 1][2]] = text
    assert found == {name: f"{kappa:.4g}" for name, kappa in kappas.items()}


def test_two_weights_of_one_label_are_both_there() -> None:
    twice = [
        finding("a:q", 2.0),
        wc.report.Finding("a:q", "", (2, 2), "float32", detail="the other"),
    ]
    text = report({}, twice).to_html()
    assert list(Parsed(text).rows().values()) == ["a:q", "a:q"]
    assert "the other" in text
    both = wc.compare(report({}, twice), report({}, twice))
    assert len(both.pairs) == 2


def test_of_many_weights_the_worst_are_open_and_the_others_folded_by_layer() -> None:
    kappas = deep(48, *KINDS)
    text = report(kappas).to_html()
    opened, *folds = text.split("<details>")
    worst = sorted(kappas, key=kappas.__getitem__, reverse=True)[:30]
    assert list(Parsed(f"{opened}</body></html>").rows().values()) == worst
    summaries = re.findall("<summary>(.*?)</summary>", text)
    assert len(summaries) == len(folds) == 49
    for layer, fold in enumerate(folds[:48]):
        names = re.findall(r'<td id="w\d+" class="text">(.*?)</td>', fold)
        assert {name.replace("<wbr>", "").split(".mlp")[0] for name in names} == {
            f"model.layers.{layer}"
        }
        labels = [name.replace("<wbr>", "") for name in names]
        assert labels == sorted(labels, key=kappas.__getitem__, reverse=True)
        said = summaries[layer].replace("<wbr>", "")
        assert said == f"model.layers.{layer}: {len(names)} more, κ up to {kappas[labels[0]]:.4g}"
    assert summaries[48].startswith("No layer that repeats:<wbr> 1 more")
    assert len(text) < 1.2e6


def test_titles_of_what_is_folded_say_no_number_that_is_none() -> None:
    kappas = deep(12, *KINDS)
    part = {name: kappa for name, kappa in kappas.items() if "layers.11" not in name}
    half = wc.compare(report(part), report(kappas)).to_html()
    assert "model.<wbr>layers.<wbr>11:<wbr> 21 more</summary>" in half
    assert re.search(r"layers.<wbr>10:<wbr> \d+ more, 1 times</summary>", half)
    lost = report(dict.fromkeys(kappas, math.nan)).to_html()
    assert "model.<wbr>layers.<wbr>10:<wbr> 21 more</summary>" in lost


def test_a_hundred_weights_are_not_folded() -> None:
    text = report(deep(9, *KINDS[:11])).to_html()
    assert len(Parsed(text).rows()) == 100
    assert "<details>" not in text


def test_a_remark_of_many_is_made_once() -> None:
    heads = [
        finding(f"h.{i}.attn:qk{h}", 3.0, detail="of 4 values") for i in range(3) for h in range(4)
    ]
    odd = finding("odd", math.inf)
    page = report({"fine": 2.0}, [*heads, odd])
    text = page.to_html()
    assert text.count("of 4 values") == 1
    assert text.count('href="#n1">[1]</a>') == 12
    assert text.count('<tr class="note">') == 1
    assert text.count('class="wrong"') == 1  # what is wrong alone is red
    assert len(re.findall("of 4 values", page.table())) == 1
    assert "h.0.attn:qk0, h.0.attn:qk1, h.0.attn:qk2 and 9 more: of 4 values" in page.table()


# --- what exceeds a limit -------------------------------------------------------------------------


def test_a_limit_is_a_sentence_marked_rows_and_a_line() -> None:
    found = wc.audit(model())
    page = found.to_html(max_condition=100.0)
    (said,) = re.findall("<p><strong>(.*?)</p>", page)
    assert re.sub("<.*?>", "", said) == (
        f"2 of 3 exceed κ = 100, marked ▲: flat.weight, {LONG}.weight; "
        "the line across the bars is that limit."
    )
    assert page.count('<tr class="over">') == 2
    assert page.count('<span class="mark"') == 2
    lines = re.findall(r'class="limit" style="left:(.*?)%"', page)
    assert [float(left) for left in lines] == pytest.approx([200 / 3] * 3, rel=1e-3)
    unlimited = found.to_html()
    for trace in ("<strong>", "▲", 'class="over"', 'class="limit"'):
        assert trace not in unlimited
    endless = found.to_html(max_condition=float("inf"))
    assert "<strong>1 of 3 exceed κ = inf</strong>, marked ▲: " in endless
    assert 'class="limit"' not in endless


def test_a_limit_that_none_exceeds_is_said_too() -> None:
    page = report({"a": 2.0}).to_html(max_condition=3.0)
    assert "<strong>0 of 1 exceed κ = 3</strong>; the line" in page
    assert "▲" not in page


def test_a_limit_is_marked_in_the_map_and_in_what_is_folded() -> None:
    kappas = deep(12, *KINDS)
    limit = 2000.0
    above = {name for name, kappa in kappas.items() if kappa > limit}
    assert len(above) > 100
    text = report(kappas).to_html(max_condition=limit)
    marked = {label for label, (_, symbol, _) in Parsed(text).map_cells().items() if symbol == "▲"}
    assert marked == above - {"head"}
    assert "above κ = 2000</li>" in text
    opened, *folds = text.split("<details>")
    assert opened.count('<tr class="over">') == 100
    counts = [int(n) for n in re.findall(r"(\d+) ▲</summary>", text)]
    assert sum(counts) == sum(fold.count('<tr class="over">') for fold in folds)
    assert sum(counts) == len(above) - 100


def test_json_names_the_limit_and_what_exceeds_it() -> None:
    found = wc.audit(model())
    content = json.loads(found.to_json(max_condition=100.0))
    assert content["max_condition"] == 100.0
    assert content["exceeding"] == ["flat.weight", f"{LONG}.weight"]
    assert "exceeding" not in found.to_dict()


# --- maps -----------------------------------------------------------------------------------------


def test_a_map_has_a_cell_for_every_weight_of_a_layer_and_leads_to_its_row() -> None:
    kappas = deep(6, *KINDS)
    page = Parsed(report(kappas).to_html())
    cells, rows = page.map_cells(), page.rows()
    assert cells.keys() == kappas.keys() - {"head"}
    titles = {a["title"] for tag, a, _ in page.cells if tag == "a" and "title" in a}
    for label, (_, _, link) in cells.items():
        assert rows[link.removeprefix("#")] == label
        assert f"{label}: κ = {kappas[label]:.4g}" in titles
    assert "1 weight is in no layer that repeats, and in the table alone." in page.words


def test_colours_are_in_the_order_of_kappa() -> None:
    kappas = {f"h.{i}.w{k}": 10.0 ** (2 * i + k) for i in range(4) for k in range(2)}
    page = Parsed(report(kappas).to_html())
    steps = {label: int(kind[1:]) for label, (kind, _, _) in page.map_cells().items()}
    ordered = [steps[label] for label in sorted(kappas, key=kappas.__getitem__)]
    assert ordered == sorted(ordered)
    assert (ordered[0], ordered[-1]) == (0, 10)
    assert len(set(ordered)) == 8


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
def test_the_scale_spans_all_and_its_ticks_stand_where_they_belong(
    low: float, high: float, expected: list[float]
) -> None:
    kappas = {f"h.{i}.w{k}": high if (i, k) == (0, 0) else low for i in range(4) for k in range(2)}
    text = report(kappas).to_html()
    scale = text[text.index('<div class="scale">') :].split("</div></div>")[0]
    ticks = re.findall(r'style="left:(.*?)%">(.*?)<', scale)
    assert [float(tick) for _, tick in ticks] == pytest.approx(expected)
    lefts = [float(left) for left, _ in ticks]
    assert lefts[0] == 0
    assert max(lefts) <= 100
    decades = [math.log10(tick / expected[0]) for tick in expected]
    assert lefts == pytest.approx([x / decades[-1] * lefts[-1] for x in decades], rel=1e-3)


def test_infinite_unknown_bounded_and_missing_cells_are_told_apart_from_large_ones() -> None:
    kappas = {f"h.{i}.{kind}": 9.0 for i in range(4) for kind in ("a", "b", "c")}
    kappas |= {"h.0.a": math.inf, "h.1.a": math.nan, "h.2.a": 1e9}
    del kappas["h.3.c"]
    bounded = finding("h.3.c", 8.0, grade=wc.report.Grade.bounded)
    for limit in (None, 100.0):
        text = report(kappas, [bounded]).to_html(max_condition=limit)
        cells = Parsed(text).map_cells()
        assert cells["h.0.a"][:2] == ("positive", "∞")
        assert cells["h.1.a"][:2] == ("unknown", "?")
        assert cells["h.2.a"][:2] == ("s10", "▲" if limit else "")
        assert cells["h.3.c"][:2] == ("s1", "≥")
        assert cells["h.0.b"][:2] == ("s1", "")
        for meaning in ("infinite", "no κ: it is zero", "a lower bound of κ"):
            assert f"</i>{meaning}" in text
        assert "there is none" not in text
    text = report(kappas).to_html()
    assert "there is none" in text
    assert text.count("<td></td>") == 2  # the corner, and h.3.c


def test_of_many_heads_the_worst_stands_for_its_layer() -> None:
    kappas = {
        f"h.{i}.attn:{x}{h}": 2.0 + (5 * h + i) % 12
        for i in range(3)
        for x in ("qk", "vo")
        for h in range(12)
    }
    text = report(kappas).to_html()
    cells = Parsed(text).map_cells()
    assert cells.keys() == {
        max((name for name in kappas if name.startswith(f"h.{i}.attn:{x}")), key=kappas.get)
        for i in range(3)
        for x in ("qk", "vo")
    }
    assert text.count(", of 12") == 6
    assert "Of several, where * stands for a number, the one that is the worst." in text
    assert "attn:qk*" in text
    assert len(Parsed(text).rows()) == 72


@pytest.mark.parametrize(
    "labels",
    [
        ["0.weight", "2.weight", "4.weight"],
        ["a", "b", "c"],
        [f"h.{i}.x{i}{j}" for i in range(6) for j in "abc"],
    ],
    ids=["one kind", "no layers", "nothing in common"],
)
def test_there_is_no_map_where_nothing_repeats(labels: list[str]) -> None:
    text = report(dict.fromkeys(labels, 2.0)).to_html()
    assert "Layers" not in text
    assert 'class="heat"' not in text


def test_a_map_of_a_comparison_shows_the_ratio() -> None:
    before = {f"h.{i}.{kind}": 10.0 for i in range(4) for kind in ("a", "b", "c")}
    after = before | {"h.0.a": 1000.0, "h.1.a": 0.1 * 10 + 0.0, "h.2.a": 10.01}
    after |= {"h.0.b": math.inf, "h.1.b": math.nan, "h.4.a": 5.0}
    before |= {"h.2.b": math.inf, "h.3.b": math.inf}
    after |= {"h.2.b": 4.0, "h.3.b": math.inf}
    del after["h.3.c"]
    comparison = wc.compare(report(before), report(after))
    text = comparison.to_html(max_condition=100.0)
    cells = {label: cell[:2] for label, cell in Parsed(text).map_cells().items()}
    assert cells["h.0.a"] == ("d10", "▲")
    assert cells["h.1.a"][0] in ("d2", "d3")
    assert cells["h.2.a"] == ("d5", "")
    assert cells["h.0.b"] == ("positive", "∞")
    assert cells["h.2.b"] == ("negative", "↓")
    assert cells["h.3.b"] == ("d5", "▲")
    assert cells["h.1.b"] == ("unknown", "?")
    assert cells["h.4.a"] == ("unknown", "+")
    assert cells["h.3.c"] == ("unknown", "−")
    assert "above κ = 100 after" in text
    assert "h.0.a: κ 10 → 1000, 100 times" in text
    same = wc.compare(report(before), report(before)).to_html()
    assert {kind for kind, _, _ in Parsed(same).map_cells().values()} == {"d5"}


# --- what is left out -----------------------------------------------------------------------------


def test_what_is_no_matrix_is_one_line_that_unfolds() -> None:
    page = wc.audit(model()).to_html()
    folded = re.search(r"<details><summary>(.*?)</summary>(.*?)</details>", page)
    assert folded is not None
    assert folded[1] == "No matrices: 3 (vector)"
    assert "<dt>flat.bias</dt>" in folded[2]
    assert "table" not in folded[2]  # an embedding is one that the report lacks


def test_hundreds_that_are_skipped_are_a_line_too() -> None:
    skipped = {f"n{i}": wc.report.Skipped(wc.report.Reason.vector) for i in range(1000)}
    skipped |= {
        f"e{i}": wc.report.Skipped(wc.report.Reason.empty, f"shape (0, {i})") for i in range(500)
    }
    skipped |= {f"q{i}": wc.report.Skipped(wc.report.Reason.packed, f"int{i}") for i in range(300)}
    text = report({"a": 2.0}, skipped=skipped).to_html()
    packed, none = re.findall(r"<details><summary>(.*?)</summary>", text)
    assert packed == f"300 {wc.report.Reason.packed.value}"
    assert none == "No matrices: 1000 (vector), 500 (empty)"
    terms = re.findall("<dt>(.*?)</dt>", text)
    assert set(skipped) <= set(terms)
    few = dict(list(skipped.items())[-5:])
    assert "<details>" not in report({"a": 2.0}, skipped=few).to_html()


# --- in a browser ---------------------------------------------------------------------------------
def look(page: Path, width: int, measure: str) -> Any:
    """What a script sees in a frame of that width: headless windows are at least 500 wide."""
    text = page.read_text().replace(
        "</body>",
        f"<script>parent.postMessage(JSON.stringify({measure}), '*')</script></body>",
    )
    (page.parent / "inner.html").write_text(text)
    outer = page.parent / "outer.html"
    outer.write_text(
        f'<pre id="probe"></pre><script>onmessage = e => probe.textContent = e.data</script>'
        f'<iframe src="inner.html" style="width:{width}px;height:800px;border:0"></iframe>'
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += f"--window-size={width + 100},900 --user-data-dir={page.parent / 'profile'}"
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
    return json.loads(match[1])


SEEN = """{
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
  colours: [...new Set([...document.querySelectorAll(".steps i")]
    .map(e => getComputedStyle(e).backgroundColor))],
  folded: document.querySelectorAll("details").length,
}"""


def whole_page() -> str:
    """Many layers, many kinds, names of strangers, infinite and unknown ones, notes and curves."""
    kappas = deep(48, *KINDS, *(f"self_attn:qk{h}" for h in range(32)))
    kappas |= {f"{name}.{LONG}": 5.0 for name in HOSTILE}
    kappas |= {f"layers.{i}.{name}": 2.0 for i in range(3) for name in HOSTILE}
    kappas |= {"model.layers.3.mlp.part_2.weight": math.inf}
    kappas |= {"model.layers.4.mlp.part_2.weight": math.nan}
    curves = finding("drawn", 1e3, singular_values=(10.0, 1.0, 0.01), detail="x" * 200)
    skipped = {f"{name}{LONG * 3}": wc.report.Skipped(wc.report.Reason.vector) for name in HOSTILE}
    skipped |= {f"q{i}": wc.report.Skipped(wc.report.Reason.packed, "int32") for i in range(300)}
    return report(kappas, [curves], skipped).to_html(max_condition=5e3)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("kind", ["small", "large", "comparison"])
def test_nothing_is_wider_than_the_screen(kind: str, width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    if kind == "small":
        wc.audit(model(), certify=True).to_html(page, max_condition=100.0)
    elif kind == "large":
        page.write_text(whole_page())
    else:
        one = report(deep(12, *KINDS) | dict.fromkeys(HOSTILE, 5.0))
        wc.compare(one, report(deep(13, *KINDS))).to_html(page, max_condition=9e3)
    seen = look(page, width, SEEN)
    assert seen["width"] <= width
    assert seen["right"] <= width
    if kind == "small":
        assert len(seen["kappa"]) == 3
    if kind != "comparison":
        assert max(seen["kappa"]) <= width
        assert seen["label"] >= 10  # pixels: to be read
    if kind != "small":
        assert min(seen["cells"]) >= 12  # pixels: to be seen
        assert len(seen["colours"]) == 11
        assert seen["folded"] > 10


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
def test_a_cell_leads_to_a_row_that_is_folded(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(whole_page())
    seen = look(
        page,
        390,
        """(() => {
          const link = [...document.querySelectorAll(".heat a")].find(
            a => document.querySelector(a.getAttribute("href")).closest("details"));
          const row = document.querySelector(link.getAttribute("href"));
          const before = row.closest("details").open;
          link.click();
          return [before, row.closest("details").open];
        })()""",
    )
    assert seen == [False, True]
