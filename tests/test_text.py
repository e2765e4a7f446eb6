"""Text, numbers and tables have the same format everywhere."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import wellcond
from wellcond.text import (
    dump_json,
    escape,
    format_duration,
    format_table,
    list_some,
    quote_names,
    quote_subject,
    read_versions,
    save_text,
    suggest_patterns,
)


def test_list_some_names_five_and_counts_the_rest() -> None:
    assert list_some([]) == "none"
    assert list_some("abcde") == "a, b, c, d, e"
    assert list_some("abcdefg") == "a, b, c, d, e and 2 more"
    assert list_some("abcd", limit=2, separator="; ") == "a; b and 2 more"
    assert quote_names(["b", "a"]) == '"a", "b"'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (59.4, "59 s"), (61, "1 min"), (3570, "1 h 0 min"), (5000, "1 h 23 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


HOSTILE = "a\x1b[2J\r\nb\x00\u202ec\ud800\x9b"
ESCAPED = r"a\x1b[2J\r\nb\x00\u202ec\ud800\x9b"


def test_escape_control_characters() -> None:
    assert escape(HOSTILE) == ESCAPED
    assert escape(ESCAPED) == ESCAPED
    assert escape("größe κ 重み") == "größe κ 重み"
    assert list_some([HOSTILE]) == ESCAPED
    assert quote_names([HOSTILE]) == f'"{ESCAPED}"'
    assert format_table(["weight"], [[HOSTILE]]) == f"weight\n{ESCAPED}\n"
    assert json.loads(dump_json({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}
    assert dump_json(HOSTILE).isascii()


def test_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    save_text("\ud800", tmp_path / "x")
    assert (tmp_path / "x").read_text() == r"\ud800"


def test_json_writes_infinite_numbers_as_strings() -> None:
    text = dump_json({"a": [math.inf, (-math.inf, math.nan)], "b": 1.0, "c": Path("p")})
    assert json.loads(text) == {"a": ["inf", ["-inf", "nan"]], "b": 1.0, "c": "p"}


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    save_text("old", path)

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_text("new", path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_versions_agree() -> None:
    assert read_versions()["wellcond"] == wellcond.__version__


def test_table_is_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert format_table(["weight", "κ"], [["a", "1"]]).split() == ["weight", "κ", "a", "1"]


def test_subject_agrees_with_verb() -> None:
    assert quote_subject(["a"]) == '"a" is'
    assert quote_subject(["b", "a"]) == '"a", "b" are'


@pytest.mark.parametrize(
    ("pattern", "wider"),
    [("h.1", "h.1.*"), ("1.q.*", "*1.q.*"), ("q", "*q.*"), (".q.", "*.q.*"), ("v", "")],
)
def test_suggested_pattern_matches(pattern: str, wider: str) -> None:
    names = ["h.0.q.weight", "h.1.q.weight"]
    found = suggest_patterns([pattern], names)
    assert found == (f' A pattern matches an entire name: write "{wider}".' if wider else "")
