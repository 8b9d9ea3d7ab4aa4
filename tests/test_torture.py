"""The short form of `make torture`: one or two trials of each kind of fault, and how the table
counts them.

Bad input of every kind is in test_load_data.py and test_hostile.py; what else can happen to
training is in its own tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
torture: Any = importlib.import_module("torture")
WANTED = {  # the least that docs/reliability.md must show
    "kill-training": 30,
    "kill-generation": 30,
    "kill-embedding": 10,
    "sigterm-training": 5,
    "sigterm-generation": 5,
    "disk-full-training": 5,
    "disk-full-generation": 5,
    "corrupt-checkpoint": 5,
    "corrupt-journal": 5,
    "dead-rank": 5,
    "bad-input": 60,
    "nasty-paper": 20,
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trials share."""
    return tmp_path_factory.mktemp("torture")


@pytest.mark.parametrize(
    "name", [name for name in WANTED if name not in ("bad-input", "dead-rank")]
)
def test_a_fault_is_recovered_from(scratch: Path, name: str) -> None:
    outcome = torture.kinds()[name].trial(scratch, 3)
    assert outcome["recovered"], outcome


def test_every_kind_is_tried_often_enough() -> None:
    assert set(torture.kinds()) == set(WANTED)
    for name, least in WANTED.items():
        assert torture.kinds()[name].times >= least


def test_the_kinds_of_bad_input_have_names_of_their_own() -> None:
    import faults

    names = [name for name, _, _ in faults.BAD]
    assert len(set(names)) == len(names) >= 60


def test_a_lost_trial_is_counted_and_named(tmp_path: Path) -> None:
    def fails(folder: Path, seed: int) -> dict[str, Any]:
        if seed == 2:
            raise KeyError(seed)
        return {"fault": "x", "recovered": seed != 1, "detail": f"number {seed}"}

    kind = torture.Kind("falls over", 3, fails)
    tried = [torture.attempt(kind, tmp_path, seed) for seed in range(3)]
    lines = torture.table({"falls over": tried})
    assert lines[2] == "| falls over | 3 | 2 | 1 |"
    assert lines[-2:] == ["- falls over: x: number 1", "- falls over: falls over: KeyError: 2"]
