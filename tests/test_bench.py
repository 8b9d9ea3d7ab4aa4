"""The published speed figures: results.json is whole and consistent, and the README shows the table
that the same run wrote.
"""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

ROWS = json.loads((ROOT / "bench" / "results.json").read_text(encoding="utf-8"))
KEYS = {
    "operation",
    "peer",
    "peer_version",
    "ours_s",
    "theirs_s",
    "ratio",
    "goal",
    "share_of_gemm_peak",
    "agreement",
    "cpu",
    "threads",
    "versions",
    "date",
}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "ratio" in row], ids=lambda row: str(row["operation"])
)
def test_a_row_says_what_was_measured_and_its_ratio_is_theirs_over_ours(
    row: dict[str, object],
) -> None:
    assert row.keys() >= KEYS
    assert row["theirs_s"] / row["ours_s"] == pytest.approx(row["ratio"], rel=0.01)  # type: ignore[operator]


def test_the_readme_shows_the_table_of_the_run() -> None:
    assert (ROOT / "bench" / "results.md").read_text(encoding="utf-8").strip() in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")
