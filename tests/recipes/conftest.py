"""The scripts that write the data need libraries that the tests do not."""

collect_ignore_glob = ["write_*.py"]
