"""semcse/files.py: what is on the disk after every kill, and who holds a lock."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_script
from disk_states import first_line, put_file, put_folder, started, states_of, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from semcse import files
from semcse.errors import UserError
from semcse.files import Journal, atomic_path, lock


class Stop(BaseException):
    """Like KeyboardInterrupt, but pytest does not end on it."""


# Atomic writes


@pytest.mark.parametrize("put", [put_file, put_folder])
@pytest.mark.parametrize("has_old", [False, True])
def test_atomic_path_shows_the_new_content_only_when_the_block_ends(
    tmp_path: Path, put: Callable[[Path, str], None], has_old: bool
) -> None:
    path, expected = tmp_path / "made" / "too" / "target", tmp_path / "expected"
    if has_old:
        path.parent.mkdir(parents=True)
        put(path, "old")
    put(expected, "new")
    before = tree(tmp_path)
    with atomic_path(path) as partial:
        assert partial.parent == path.parent
        put(partial, "new")
        assert path.exists() == has_old
        seen = {name: text for name, text in tree(tmp_path).items() if ".partial" not in name}
        assert seen == before
    assert path.is_dir() == expected.is_dir()
    assert tree(path) == tree(expected)
    assert path.is_dir() or path.read_text() == "new"
    assert os.listdir(path.parent) == ["target"]


@pytest.mark.parametrize("put", [put_file, put_folder])
@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), Stop()])
def test_atomic_path_keeps_the_old_content_after_an_exception(
    tmp_path: Path, put: Callable[[Path, str], None], has_old: bool, fault: BaseException
) -> None:
    path = tmp_path / "target"
    if has_old:
        put(path, "old")
    before = tree(tmp_path)

    def write() -> None:
        with atomic_path(path) as partial:
            put(partial, "new")
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == (["target"] if has_old else [])


def test_what_a_killed_process_left_does_not_get_into_a_new_folder(tmp_path: Path) -> None:
    """In a container every run may have the same process number, and so the same partial name."""
    with contextlib.suppress(Stop), atomic_path(tmp_path / "model") as leftover:
        raise Stop
    put_folder(leftover, "left")
    with atomic_path(tmp_path / "model") as partial:
        partial.mkdir(exist_ok=True)
        put_file(partial / "weights", "new")
    assert tree(tmp_path / "model") == {"weights": "new"}


def test_a_full_disk_that_a_library_reports_is_an_os_error(tmp_path: Path) -> None:
    """safetensors and tokenizers raise exceptions of other kinds."""
    path = tmp_path / "weights"
    put_file(path, "old")

    def save(message: str) -> None:
        with atomic_path(path) as partial:
            put_file(partial, "half")
            raise Exception(message)

    with pytest.raises(OSError, match="No space left on device") as caught:
        save("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert tree(tmp_path) == {"weights": "old"}
    with pytest.raises(Exception, match=r"^another error$"):
        save("another error")


def test_write_text_is_whole_at_every_kill(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    old, new = "old äöü\n" * 20_000, "new ∑\n" * 20_000
    put_file(folder / "file", old)
    states = states_of(folder, lambda: files.write_text(folder / "file", new), tmp_path / "states")
    found = [(state / "file").read_text(encoding="utf-8") for state in states]
    assert set(found) == {old, new}
    assert (found[0], found[-1]) == (old, new)


def test_a_replaced_folder_is_the_old_or_the_new_one_at_every_kill(tmp_path: Path) -> None:
    """Between its two renames it is missing for a moment, and can be written again."""
    folder = tmp_path / "folder"
    folder.mkdir()
    put_folder(folder / "runs", "old")
    old = tree(folder / "runs")

    def replace(path: Path, content: str) -> None:
        with atomic_path(path) as partial:
            put_folder(partial, content)

    found = []
    for state in states_of(folder, lambda: replace(folder / "runs", "new"), tmp_path / "states"):
        found.append(tree(state / "runs"))
        replace(state / "runs", "third")
        assert "third" in tree(state / "runs")
        assert not (state / ".runs.old").exists() or not found[-1]
    new = tree(folder / "runs")
    assert (found[0], found[-1]) == (old, new)
    assert all(one in (old, new, {}) for one in found)


def test_json_files_are_read_back_and_hold_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"a": [1, 2.5, None, True], "ä": "\u2028 \U0001f600"}
    files.write_json(path, value)
    assert files.read_json(path) == value
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(path, {"loss": float("nan")})
    assert files.read_json(path) == value
    assert os.listdir(tmp_path) == ["value.json"]


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\xfe{}", pytest.param(b"[" * 100_000, id="nested too deep")],
)
def test_read_json_names_a_file_it_cannot_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path)


# Journals


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the property test writes again and again."""
    return tmp_path_factory.mktemp("scratch") / "journal.jsonl"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.dictionaries(TEXTS, TEXTS, max_size=2), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_a_journal_gives_back_every_row_after_it_is_opened_again(
    scratch: Path, rows: list[dict[str, str]]
) -> None:
    """Regression: rows with U+0085 or U+2028, at which str.splitlines cuts, were lost."""
    scratch.unlink(missing_ok=True)
    offsets = []
    for row in rows:
        with contextlib.closing(Journal(scratch)) as journal:
            offsets.append(journal.append(row))
    assert list(Journal.scan(scratch)) == list(zip(offsets, rows, strict=True))
    assert Journal.rows(scratch) == rows
    with contextlib.closing(Journal(scratch)) as journal:
        assert [journal.row_at(offset) for offset in offsets] == rows
        assert journal.row_at(journal.append({"more": ""})) == {"more": ""}


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 3',
        b'{"step": 3}',
        b'{"step": 3\n',
        b'{"text": "\xc3',
        b"\x00\x00\x00",
        b"\x00\x00\n",
        b"3\n",
        b"null\n",
        b"\n",
    ],
)
def test_a_journal_drops_a_torn_last_line_and_continues(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "folder" / "metrics.jsonl"
    with contextlib.closing(Journal(path)) as journal:
        journal.append({"step": 1})
        journal.append({"step": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert Journal.rows(path) == [{"step": 1}, {"step": 2}]
    with contextlib.closing(Journal(path)) as journal:
        assert path.read_bytes() == whole
        journal.append({"step": 3})
    assert path.read_bytes() == whole + b'{"step": 3}\n'


def test_a_journal_drops_unwanted_rows_and_is_whole_at_every_kill(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with contextlib.closing(Journal(path)) as journal:
        for step in (1, 2, 2, 3, 4):
            journal.append({"step": step})

    def reopen() -> None:
        with contextlib.closing(Journal(path, keep=lambda row: row["step"] <= 2)) as journal:
            journal.append({"step": 3, "again": True})

    states = states_of(path.parent, reopen, tmp_path / "states")
    found = [Journal.rows(state / "metrics.jsonl") for state in states]
    kept = [{"step": 1}, {"step": 2}, {"step": 2}]
    assert found[0] == [*kept, {"step": 3}, {"step": 4}]
    assert all(rows in (found[0], kept) for rows in found[:-1])
    assert kept in found
    assert found[-1] == [*kept, {"step": 3, "again": True}]


def test_other_readers_see_a_row_at_once_and_nothing_of_a_refused_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(Journal(path)) as journal:
        for step in range(3):
            journal.append({"step": step})
            assert Journal.rows(path) == [{"step": i} for i in range(step + 1)]
        for refused in (float("nan"), float("inf"), object()):
            with pytest.raises((ValueError, TypeError)):
                journal.append({"step": 3, "loss": refused})
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_kill_loses_no_row_that_was_appended(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from semcse import files
journal = files.Journal(pathlib.Path(sys.argv[1]))
for i in range(10**9):
    journal.append({"i": i, "text": "x" * 1000}); print(i, flush=True)
"""
    path = tmp_path / "journal.jsonl"
    with started(code, path) as process:
        said = [int(first_line(process)) for _ in range(200)]
        process.kill()
        process.wait()
    numbers = [row["i"] for row in Journal.rows(path)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= len(said) == said[-1] + 1


# Locks

HOLD = """
import sys, pathlib
from semcse import command_line, files
def hold():
    with files.lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True); sys.stdin.readline()
sys.exit(command_line.run_command(hold))
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    """Whether the first one ends by itself, raises or is killed. No lock file stays behind."""
    path = tmp_path / "runs" / ".quickstart.lock"
    with started(HOLD, path) as holder:
        assert first_line(holder) == "held"
        second = run_script("-c", HOLD, path)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr == (
            f"error: {path.parent / 'quickstart'} is in use by another run; wait for it or choose"
            " another output\n"
        )
        with pytest.raises(UserError, match="in use by another run"), lock(path):
            pass
        with lock(path.with_name(".other.lock")):
            pass
        holder.kill()
        holder.wait()
    with lock(path):
        assert run_script("-c", HOLD, path).returncode == 2
    with started(HOLD, path) as holder:
        assert first_line(holder) == "held"
        _, errors = holder.communicate("\n")
        assert (holder.returncode, errors) == (0, "")
    with contextlib.suppress(Stop), lock(path):
        raise Stop
    with lock(path):
        pass
    assert os.listdir(path.parent) == []


def test_many_processes_never_hold_a_lock_at_once(tmp_path: Path) -> None:
    """Although the lock file is removed and made again all the time."""
    code = """
import sys, pathlib, time
from semcse import files
from semcse.errors import UserError
path, end, held = pathlib.Path(sys.argv[1]), time.monotonic() + 0.5, 0
while time.monotonic() < end:
    try:
        with files.lock(path.with_name(".x.lock")):
            path.touch(exist_ok=False); held += 1; path.unlink()
    except UserError:
        pass
print(held)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(code, tmp_path / "held")) for _ in range(3)]
        ended = [process.communicate(timeout=60) for process in processes]
    assert [errors for _, errors in ended] == [""] * 3
    assert sum(int(held) for held, _ in ended) > 30
