"""The benchmark of several processes, with sizes divided by 64."""

import json

import pytest

from wellcond import cli


@pytest.mark.distributed
def test_one_process_and_two_report_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--measured", "1", "--shrink", "64", "--json"]
    assert cli.main(["bench", "processes", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["processes"] for run in document["runs"]] == [1, 2]
    for run in document["runs"]:
        assert len(run["peak_bytes"]) == run["processes"]
        assert min(run["peak_bytes"]) > 0
        assert run["same"] == "True"
