"""The benchmark of large files, with sizes divided by 32."""

import json

import pytest

from wellcond import cli


def test_both_formats_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--measured", "1", "--shrink", "32", "--json"]
    assert cli.main(["bench", "file", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["format"] for run in document["runs"]] == ["FP8", "bfloat16"]
    for run in document["runs"]:
        assert run["matrices"] == 7
        assert run["peak_bytes"] > 0
        assert 0 < run["gigabytes"] < 0.1
