"""Skips the scripts that write the data, which need libraries that the tests do not need."""

collect_ignore_glob = ["write_*.py"]
