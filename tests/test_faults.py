"""Kills, full disks, damaged files and bad input, on real processes: nothing is lost.

Each kind of fault is tried a few times by `make test-slow`; TRIALS=30 makes thirty trials of each,
as docs/reliability.md counts them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import killing
import pytest
from conftest import ROOT, run_script
from fake_llm_server import FakeServer
from hostile import NASTY, NEEDED, Place, jsonl, nasty_papers

from semcse.errors import UserError
from semcse.papers import read_papers

TRIALS = int(os.environ.get("TRIALS", "3"))
FAULTS: dict[str, Callable[[Path, int], Any]] = {
    "kill -9 in generation": functools.partial(faults.kill_generation, name="SIGKILL"),
    "SIGTERM in generation": functools.partial(faults.kill_generation, name="SIGTERM"),
    "full disk in generation": faults.full_disk_generation,
    "damaged journal of a generation": faults.corrupt_journal,
    "kill -9 in embedding": faults.kill_embedding,
    "kill -9 in training": functools.partial(killing.kill_training, name="SIGKILL"),
    "SIGTERM in training": functools.partial(killing.kill_training, name="SIGTERM"),
    "Ctrl-C in training": functools.partial(killing.kill_training, name="SIGINT"),
    "full disk in training": killing.full_disk,
    "damaged checkpoints": killing.corrupt_checkpoint,
    "one of two training processes killed": killing.dead_rank,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trials share."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(TRIALS))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_nothing(folder: Path, fault: str, seed: int) -> None:
    FAULTS[fault](folder, seed)


def test_a_killed_generation_loses_nothing(folder: Path) -> None:
    faults.kill_generation(folder, 100, "SIGKILL")


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "can_mount", lambda: False)
    killing.full_disk(folder, 100)


@pytest.mark.slow
def test_the_comparison_of_two_runs_notices_what_is_lost(folder: Path) -> None:
    expected = killing.undisturbed(killing.world_of(folder))
    other = folder / "other"
    shutil.copytree(expected, other)
    assert killing.difference(other, expected) == ""
    for path, what in (
        ("metrics.jsonl", "other metrics.jsonl"),
        ("benchmark.json", "other benchmark.json"),
        ("model/model.safetensors", "other weights"),
    ):
        content = (other / path).read_bytes()
        (other / path).write_bytes(content.replace(b"7", b"8"))
        assert killing.difference(other, expected) == what
        (other / path).write_bytes(content)
    (other / "UNFINISHED").touch()
    assert killing.difference(other, expected) == "not finished"


def test_the_kinds_of_bad_input_have_different_names() -> None:
    names = [name for name, _, _ in faults.BAD]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, what", [pytest.param(*case[1:], id=case[0]) for case in faults.BAD]
)
def test_the_reader_and_a_script_refuse_bad_input(tmp_path: Path, place: Place, what: str) -> None:
    """One printable line, exit code 2, and nothing is written."""
    inside, output = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    with place(inside) as path:
        with pytest.raises(UserError, match=re.escape(what)):
            list(read_papers(path, NEEDED))
        # A process of another user cannot start here; the script needs no title and no summaries.
        if os.geteuid() != os.getuid() or re.match('key "(title|summaries)" is (miss|blank)', what):
            return
        server = ("--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--estimate")
        files = ("--input", path, "--output", output / "x.jsonl")
        done = run_script(ROOT / "generate_train_summaries.py", *files, *server)
    line = done.stderr.removesuffix("\n")
    assert done.returncode == 2, done.stderr
    assert line.startswith("error: ")
    assert line.isprintable()
    assert what in line or "is a pipe or device" in line
    assert not list(output.glob("*"))


def test_summaries_are_generated_for_strange_papers(tmp_path: Path) -> None:
    """The papers are written as they were read."""
    source, output = tmp_path / "papers.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(*nasty_papers()))
    with FakeServer() as server, faults.started(source, output, server.url) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert len(rows) == len(NASTY)
    for paper, row in zip(nasty_papers(), rows, strict=True):
        assert len(row.pop("summaries")) == 4
        assert row == {key: value for key, value in paper.items() if key != "summaries"}
