"""semcse/run_folder.py: which runs are finished, what resumed runs may change, what kills leave."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from disk_states import put_file, put_folder, states_of, tree

from semcse import files, run_folder
from semcse.errors import UserError
from semcse.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "metric": "euclidean",
    "margin": 1.0,
    "seed": 0,
    "log_every": 5,  # free on resume
    "encoder": "tiny",
}


def begin(output: Path, resume: bool = False, overwrite: bool = False, **changes: Any) -> RunFolder:
    folder = RunFolder(output)
    folder.begin(SETTINGS | changes, {"device": "cpu"}, resume, overwrite)
    return folder


def result_of(output: Path) -> str | None:
    """The result of a run that counts as finished, else None."""
    is_finished = (output / "settings.json").exists() and not (output / "UNFINISHED").exists()
    return (output / "benchmark.json").read_text() if is_finished else None


def test_a_run_is_unfinished_until_it_finishes(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "one"
    folder = begin(output)
    assert folder.path == output
    assert (output / "UNFINISHED").exists()
    assert files.read_json(output / "settings.json") == {"settings": SETTINGS, "device": "cpu"}
    put_folder(output / "checkpoints", "weights")
    put_file(output / "benchmark.json", "result")
    folder.finish()
    assert sorted(os.listdir(output)) == ["benchmark.json", "settings.json"]
    assert os.listdir(output.parent) == ["one"]
    with pytest.raises(UserError, match=r"one: holds no unfinished run; leave --resume out"):
        begin(output, resume=True)


def test_an_unfinished_run_is_refused_without_resume_and_continued_with_it(tmp_path: Path) -> None:
    output = tmp_path / "one"
    begin(output)
    put_file(output / "metrics.jsonl", "so far")
    before = tree(output)
    with pytest.raises(UserError, match=r"one: holds an unfinished run; continue it with --resume"):
        begin(output)
    assert begin(output, resume=True).path == output
    assert begin(output, resume=True, log_every=1).path == output
    assert tree(output) == before


@pytest.mark.parametrize(
    "changes, named, not_named",
    [
        ({"seed": 1}, ["seed was 0, is 1"], ["metric", "margin"]),
        (
            {"metric": "cosine", "margin": 0.2, "log_every": 1},
            ["metric was 'euclidean', is 'cosine'", "margin was 1.0, is 0.2"],
            ["log_every", "seed"],
        ),
        ({"new_setting": 3}, ["new_setting was None, is 3"], ["seed"]),
    ],
)
def test_resume_refuses_changed_settings_by_name(
    tmp_path: Path, changes: dict[str, Any], named: list[str], not_named: list[str]
) -> None:
    output = tmp_path / "one"
    begin(output)
    before = tree(output)
    with pytest.raises(UserError) as caught:
        begin(output, resume=True, **changes)
    assert all(words in str(caught.value) for words in named)
    assert not any(words in str(caught.value) for words in not_named)
    assert tree(output) == before


def test_resume_refuses_changed_inputs(tmp_path: Path) -> None:
    """What was read, and by how many processes, is named like a setting."""
    folder, inputs = RunFolder(tmp_path / "one"), {"train_file (SHA-256)": "ab", "processes": 2}
    folder.begin(SETTINGS, {"inputs": inputs}, False)
    folder.begin(SETTINGS, {"inputs": inputs, "device": "cuda"}, True)
    changed = {"train_file (SHA-256)": "cd", "processes": 1}
    said = r"\(train_file \(SHA-256\) was 'ab', is 'cd'; processes was 2, is 1\)"
    with pytest.raises(UserError, match=said):
        folder.begin(SETTINGS, {"inputs": changed}, True)


@pytest.mark.parametrize("content", ["[]", "7", '{"settings": []}', "{}", '{"inputs": null}', "{"])
def test_resume_refuses_a_settings_file_that_no_run_wrote(tmp_path: Path, content: str) -> None:
    begin(tmp_path / "one")
    put_file(tmp_path / "one/settings.json", content)
    with pytest.raises(UserError):
        begin(tmp_path / "one", resume=True)


def test_resume_removes_what_killed_processes_were_writing(tmp_path: Path) -> None:
    """Otherwise half-written checkpoints, which may be gigabytes, would stay forever."""
    output = tmp_path / "one"
    begin(output)
    (output / "checkpoints").mkdir()
    put_file(output / "checkpoints/step-1.safetensors", "whole")
    put_file(output / "checkpoints/.step-2.safetensors.4711.partial", "half")
    put_folder(output / ".model.4711.partial", "half")
    begin(output, resume=True)
    assert sorted(os.listdir(output)) == ["UNFINISHED", "checkpoints", "settings.json"]
    assert os.listdir(output / "checkpoints") == ["step-1.safetensors"]


def test_resume_without_any_run_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no unfinished run"):
        begin(tmp_path / "one", resume=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_run_is_replaced_only_with_overwrite(tmp_path: Path, is_finished: bool) -> None:
    output = tmp_path / "one"
    first = begin(output)
    put_file(output / "benchmark.json", "first")
    if is_finished:
        first.finish()
    before = tree(output)
    kind = "a finished" if is_finished else "an unfinished"
    with pytest.raises(UserError, match=f"one: holds {kind} run; .*--overwrite.*--output-dir"):
        begin(output, seed=1)
    assert tree(output) == before
    second = begin(output, overwrite=True, seed=1)
    assert sorted(os.listdir(output)) == ["UNFINISHED", "settings.json"]
    second.finish()
    assert files.read_json(output / "settings.json")["settings"]["seed"] == 1
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("content", ["thesis.tex", "UNFINISHED.txt"])
def test_a_folder_with_other_files_is_refused_and_not_touched(tmp_path: Path, content: str) -> None:
    output = tmp_path / "papers"
    output.mkdir()
    with RunFolder.locked(output) as folder:
        assert folder.path == output
    put_file(output / content, "mine")
    for path, said in (
        (output, "papers: holds files that are not a run's; name another folder"),
        (output / content, f"{content}: is a file; name a folder"),
        (output / content / "below", f"{content}: is a file; name a folder"),
    ):
        with pytest.raises(UserError, match=said), RunFolder.locked(path) as folder:
            folder.begin(SETTINGS, {}, resume=False, overwrite=True)
    assert tree(tmp_path) == {f"papers/{content}": "mine"}


OPEN = """
import sys
from pathlib import Path
from semcse.command_line import run_command
from semcse.run_folder import RunFolder
def command():
    with RunFolder.locked(Path(sys.argv[1])) as folder:
        folder.begin({}, {}, resume=False)
sys.exit(run_command(command))
"""
# Numbers of the Linux kernel: the right to override permissions, and the request to drop a right.
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


def obey_permissions() -> None:
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.parametrize(
    "output, code, said",
    [
        # Regression: "." has no last name from which to make the name of the lock.
        (".", 2, r"error: --output-dir [^\n]+; name another folder\n"),
        ("locked/run", 1, r"error: Permission denied \([^\n]+\); check the permissions\n"),
    ],
)
def test_a_folder_that_cannot_be_used_is_reported_in_one_line(
    tmp_path: Path, output: str, code: int, said: str
) -> None:
    put_file(tmp_path / "thesis.tex", "mine")
    (tmp_path / "locked").mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, output],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=obey_permissions,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(said, done.stderr)
    assert tree(tmp_path) == {"thesis.tex": "mine"}


def test_a_run_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        RunFolder.locked(tmp_path / "one"),
        pytest.raises(UserError, match="one is in use by another run"),
        RunFolder.locked(tmp_path / "one"),
    ):
        pass
    with RunFolder.locked(tmp_path / "one"):
        pass
    assert os.listdir(tmp_path) == []


# Kills


def test_a_run_killed_while_it_begins_never_looks_finished_and_can_be_started_again(
    tmp_path: Path,
) -> None:
    """Regression: settings.json was written before UNFINISHED, so the run looked finished."""
    runs = tmp_path / "runs"
    runs.mkdir()
    for state in states_of(runs, lambda: begin(runs / "one"), tmp_path / "states"):
        output = state / "one"
        assert result_of(output) is None
        with contextlib.suppress(UserError):
            begin(output)
        assert begin(output, resume=True).path == output


def test_a_run_killed_while_it_finishes_loses_nothing(tmp_path: Path) -> None:
    """At every moment the run is finished, or it can be resumed from its checkpoints."""
    runs = tmp_path / "runs"
    new = begin(runs / "one")
    put_file(new.path / "benchmark.json", "new")
    put_folder(new.path / "checkpoints", "weights")
    checkpoints = tree(new.path / "checkpoints")
    seen = set()
    for state in states_of(runs, new.finish, tmp_path / "states"):
        result = result_of(state / "one")
        seen.add(result)
        if result is None:
            opened = begin(state / "one", resume=True)
            assert tree(opened.path / "checkpoints") == checkpoints
            opened.finish()
        assert result_of(state / "one") == "new"
    assert seen == {None, "new"}


def test_versions_say_what_a_result_was_made_with() -> None:
    found = run_folder.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert json.loads(json.dumps(found)) == found
