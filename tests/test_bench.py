"""The README shows the table that the last run of `make bench` wrote."""

from __future__ import annotations

from conftest import ROOT


def test_the_readme_shows_the_table_of_the_last_run() -> None:
    table = (ROOT / "bench" / "results.md").read_text(encoding="utf-8").strip()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
