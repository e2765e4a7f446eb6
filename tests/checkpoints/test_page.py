"""The page that an audit writes: what it says, and how it looks on a phone and on a desk."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wellcond as wc

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
LONG = "encoder_" * 15


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


def test_what_is_no_matrix_is_one_line_that_unfolds() -> None:
    page = wc.audit(model()).to_html()
    folded = re.search(r"<details><summary>(.*?)</summary>(.*?)</details>", page)
    assert folded is not None
    assert folded[1] == "3 not a matrix: a vector"
    assert "<dt>flat.bias</dt>" in folded[2]
    assert "table" not in folded[2]  # an embedding is one that the report lacks


def test_names_break_between_words() -> None:
    page = wc.audit(model()).to_html()
    assert '<td class="text">fine.<wbr>weight</td>' in page
    assert "</svg>fine.<wbr>weight</li>" in page


def test_a_limit_is_a_sentence_marked_rows_and_a_line() -> None:
    report = wc.audit(model())
    page = report.to_html(max_condition=100.0)
    assert "<p>2 of 3 exceed κ = 100, marked ▲; the line across the bars is that limit.</p>" in page
    assert page.count('<tr class="over">') == 2
    assert page.count('<span class="mark"') == 2
    lines = re.findall(r'class="limit" style="left:(.*?)%"', page)
    assert [float(left) for left in lines] == pytest.approx([200 / 3] * 3, rel=1e-3)
    unlimited = report.to_html()
    assert "of 3 exceed" not in unlimited
    assert 'class="over"' not in unlimited
    assert 'class="limit"' not in unlimited
    endless = report.to_html(max_condition=float("inf"))
    assert "1 of 3 exceed κ = inf, marked ▲.</p>" in endless
    assert 'class="limit"' not in endless


def test_json_names_the_limit_and_what_exceeds_it() -> None:
    report = wc.audit(model())
    content = json.loads(report.to_json(max_condition=100.0))
    assert content["max_condition"] == 100.0
    assert content["exceeding"] == ["flat.weight", f"{LONG}.weight"]
    assert "exceeding" not in report.to_dict()


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: Debian's package chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    wc.audit(model(), certify=True).to_html(page, max_condition=100.0)
    measure = """{
      width: document.documentElement.scrollWidth,
      scroll: document.querySelector(".scroll").scrollWidth,
      right: Math.max(...[...document.querySelectorAll("td, dt, dd, p, svg, summary")]
        .map(e => e.getBoundingClientRect().right)),
      kappa: [...document.querySelectorAll('[data-label="κ"]')]
        .map(e => e.getBoundingClientRect().right),
      label: Math.min(...[...document.querySelectorAll("figure text")]
        .map(e => e.getBoundingClientRect().height)),
    }"""
    seen = look(page, width, measure)
    assert seen["width"] <= width
    assert seen["scroll"] <= width
    assert seen["right"] <= width
    assert len(seen["kappa"]) == 3
    assert max(seen["kappa"]) <= width
    assert seen["label"] >= 10  # pixels: to be read
