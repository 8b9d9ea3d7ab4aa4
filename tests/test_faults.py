"""A short form of the torture harness: each fault of killing.py once, on real processes, and
folders that cannot be written to.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
from conftest import ROOT

# numbers of the kernel: root's right to write where the permissions forbid it, and how a process
# gives up a right
CAP_DAC_OVERRIDE, CAPBSET_DROP = 1, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


# Seeds of trials that reach their fault when a checkpoint stands. Kills are in test_training.py.
@pytest.mark.parametrize("name, seed", [("corrupt", 0), ("full", 0), ("dead", 0)])
def test_a_fault_loses_nothing(folder: Path, name: str, seed: int) -> None:
    outcome = killing.ALL[name](folder, seed)
    assert outcome["recovered"], outcome
    assert "resumed from step" in outcome["detail"]


def test_where_nothing_can_be_mounted_a_limit_stands_for_the_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "can_mount", lambda: False)
    outcome = killing.disk_full(folder, 1)
    assert outcome["recovered"], outcome
    assert "File too large" in outcome["detail"]


def test_the_harness_sees_what_is_lost(folder: Path) -> None:
    """Its comparison is worth something: other weights, rows or scores, and an unfinished run, are
    told apart.
    """
    expected = killing.reference(killing.world_of(folder))
    other = folder / "other"
    subprocess.run(["cp", "-r", expected, other], check=True)
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


def give_up_override() -> None:
    """Root obeys permissions from here on, as other users do anyway."""
    ctypes.CDLL(None).prctl(CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_folder_that_cannot_be_written_to_is_one_line(folder: Path) -> None:
    """Nothing is written, and what stood there stays."""
    world = killing.world_of(folder)
    (world / "locked").mkdir()
    (world / "locked/thesis.txt").write_text("precious", encoding="utf-8")
    (world / "locked").chmod(0o555)
    command = [sys.executable, str(ROOT / "main.py"), *killing.WORDS, "--output-dir", "locked/run"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=give_up_override,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Permission denied" in lines[0]
    assert "check the permissions" in lines[0]
    assert "Traceback" not in done.stderr
    assert os.listdir(world / "locked") == ["thesis.txt"]
