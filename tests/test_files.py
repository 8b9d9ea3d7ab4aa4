"""files.py: what is on disk after every kill, who holds a lock, and how each failure becomes one
line and an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from semcse import command_line, errors, files, run_folder
from semcse.command_line import StopSignal, run_command
from semcse.errors import RunError, Terminated, UserError
from semcse.files import Journal, atomic_path, lock, replace_folder, restore_folder
from semcse.run_folder import RunFolder
from settings import Settings

_at_file_event: Callable[[], None] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _at_file_event and event.split(".")[0] in ("open", "os", "shutil"):
        _at_file_event()


sys.addaudithook(_audit)


def states_of(folder: Path, act: Callable[[], object], copies: Path) -> list[Path]:
    """What a kill -9 before each file operation of `act` leaves of `folder`, and what the whole
    `act` leaves: copies of `folder` under its own name.

    A kill loses nothing that was given to the kernel, so the disk at that moment is the state after
    it.
    """
    global _at_file_event
    states: list[Path] = []

    def copy() -> None:
        global _at_file_event
        _at_file_event = None  # the copy's own operations do not count
        states.append(copies / str(len(states)) / folder.name)
        shutil.copytree(folder, states[-1])
        _at_file_event = copy

    try:
        _at_file_event = copy
        act()
    finally:
        _at_file_event = None
    copy()
    _at_file_event = None
    assert len(states) > 2, "nothing was observed"
    return states


def tree(folder: Path) -> dict[str, str]:
    """Relative name -> text of every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def started(code: str, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` in the repository; killed at the end."""
    command = [sys.executable, "-u", "-c", code, *map(str, words)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Atomic writes


class Stop(BaseException):
    """Like KeyboardInterrupt, but pytest does not end on it."""


def put_file(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def put_folder(path: Path, text: str) -> None:
    (path / "inner").mkdir(parents=True)
    for name in ("a", "inner/b", text):
        put_file(path / name, text)


@pytest.mark.parametrize("put", [put_file, put_folder])
@pytest.mark.parametrize("has_old", [False, True])
def test_atomic_path_shows_the_new_content_only_when_the_block_ends(
    tmp_path: Path, put: Callable[[Path, str], None], has_old: bool
) -> None:
    path = tmp_path / "made" / "too" / "target"
    if has_old:
        path.parent.mkdir(parents=True)
        put(path, "old")
    before = tree(tmp_path)
    with atomic_path(path) as partial:
        assert partial.parent == path.parent
        put(partial, "new")
        assert path.exists() == has_old
        assert {
            name: text for name, text in tree(tmp_path).items() if ".partial" not in name
        } == before
    put(tmp_path / "expected", "new")
    assert (
        (path.read_text() == "new")
        if path.is_file()
        else (tree(path) == tree(tmp_path / "expected"))
    )
    assert os.listdir(path.parent) == ["target"]


@pytest.mark.parametrize("put", [put_file, put_folder])
@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), Stop()])
def test_atomic_path_leaves_the_old_content_and_no_partial_after_an_exception(
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
    """In a container every run may have the same process number, hence the same partial name.
    Guards against: the leftover is written into, not replaced.
    """
    with contextlib.suppress(Stop), atomic_path(tmp_path / "model") as leftover:
        raise Stop
    put_folder(leftover, "left")
    with atomic_path(tmp_path / "model") as partial:
        partial.mkdir(exist_ok=True)
        put_file(partial / "weights", "new")
    assert tree(tmp_path / "model") == {"weights": "new"}


def test_write_text_is_whole_at_every_kill(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    old, new = "old äöü\n" * 20_000, "new ∑\n" * 20_000
    put_file(folder / "file", old)
    found = [
        (state / "file").read_text(encoding="utf-8")
        for state in states_of(
            folder, lambda: files.write_text(folder / "file", new), tmp_path / "states"
        )
    ]
    assert set(found) == {old, new}
    assert (found[0], found[-1]) == (old, new)


@pytest.mark.parametrize("has_old", [False, True])
def test_a_replaced_folder_is_whole_at_every_kill(tmp_path: Path, has_old: bool) -> None:
    """After `restore_folder` the old folder or the new one stands there; a second replacement then
    works as ever.
    """
    folder = tmp_path / "folder"
    folder.mkdir()
    if has_old:
        put_folder(folder / "runs", "old")
    put_folder(folder / "new", "new")
    old, new = tree(folder / "runs"), tree(folder / "new")
    states = states_of(
        folder, lambda: replace_folder(folder / "new", folder / "runs"), tmp_path / "states"
    )
    found = []
    for state in states:
        restore_folder(state / "runs")
        found.append(tree(state / "runs"))
        with atomic_path(state / "runs") as partial:
            put_folder(partial, "third")
        assert "third" in tree(state / "runs")
        assert not (state / ".runs.old").exists()
    assert found[0] == old
    assert found[-1] == new
    assert all(one in (old, new) for one in found)


def test_restore_folder_leaves_a_folder_in_its_place_alone(tmp_path: Path) -> None:
    put_folder(tmp_path / "runs", "new")
    put_folder(tmp_path / ".runs.old", "old")
    before = tree(tmp_path / "runs")
    restore_folder(tmp_path / "runs")
    restore_folder(tmp_path / "never there")
    assert tree(tmp_path / "runs") == before
    assert not (tmp_path / "never there").exists()


def test_a_real_kill_in_the_middle_of_a_write_leaves_a_whole_file(tmp_path: Path) -> None:
    """First a process that stops half-way, then one that writes without end and is killed at a
    random moment.
    """
    path = tmp_path / "file"
    put_file(path, "old")
    half_way = """
import sys, files, pathlib, time
with files.atomic_path(pathlib.Path(sys.argv[1])) as partial, partial.open("w") as handle:
    handle.write("new " * 100_000); handle.flush(); print("half", flush=True); time.sleep(60)
"""
    without_end = """
import sys, files, pathlib
print("go", flush=True)
for i in range(10**9):
    files.write_text(pathlib.Path(sys.argv[1]), f"{i}," * 50_000)
"""
    with started(half_way, path) as process:
        assert first_line(process) == "half"
        process.kill()
        process.wait()
    assert path.read_text() == "old"
    with started(without_end, path) as process:
        assert first_line(process) == "go"
        time.sleep(random.uniform(0.2, 0.4))
        process.kill()
        process.wait()
    numbers = path.read_text().split(",")
    assert len(numbers) == 50_001
    assert len(set(numbers[:-1])) == 1


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
    # the last: RecursionError must not pass
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


@given(
    st.lists(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.text(st.characters(exclude_categories=["Cs"])),
            max_size=2,
        ),
        max_size=4,
    )
)
@settings(deadline=None, max_examples=100)
def test_a_journal_gives_back_every_row_also_after_opening_it_again(
    scratch: Path, rows: list[dict[str, str]]
) -> None:
    """Whatever the texts hold. Guards against: rows with U+0085, U+2028 or U+2029, which
    str.splitlines takes for line ends, are lost.
    """
    scratch.unlink(missing_ok=True)
    for row in rows:
        with contextlib.closing(Journal(scratch)) as journal:
            journal.append(row)
    assert Journal.rows(scratch) == rows if rows else not scratch.exists()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file name that the property tests write to again and again."""
    return tmp_path_factory.mktemp("scratch") / "journal.jsonl"


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
def test_a_journal_drops_a_torn_last_line_and_goes_on(tmp_path: Path, torn: bytes) -> None:
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


def test_a_journal_keeps_the_wanted_rows_in_their_order_and_is_whole_at_every_kill(
    tmp_path: Path,
) -> None:
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


def test_a_row_is_there_for_other_readers_at_once_and_a_refused_row_leaves_nothing(
    tmp_path: Path,
) -> None:
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
import sys, files, pathlib
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
import sys, files, pathlib, time
def hold():
    with files.lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True); sys.stdin.readline()
sys.exit(files.run_command(hold))
"""


def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "runs" / ".quickstart.lock"
    with started(HOLD, path) as holder:
        assert first_line(holder) == "held"
        second = run_script("-c", HOLD, path)
        assert (second.returncode, second.stdout) == (2, "")
        assert (
            second.stderr
            == f"error: {path.parent / 'quickstart'} is in use by another run; wait for it or"
            " choose another output\n"
        )
        with pytest.raises(UserError, match="in use by another run"), lock(path):
            pass
        with lock(path.with_name(".other.lock")):
            pass
        holder.kill()
        holder.wait()
    with lock(path):
        refused = run_script("-c", HOLD, path)
        assert refused.returncode == 2
    with started(HOLD, path) as holder:
        assert first_line(holder) == "held"
        _, errors = holder.communicate("\n")
        assert (holder.returncode, errors) == (0, "")
    with contextlib.suppress(Stop), lock(path):
        raise Stop
    with lock(path):
        pass


# Exit codes and the one line


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """Puts the handlers back that a test changes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raiser(fault: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise fault

    return command


def fill_the_disk() -> None:
    with open("/dev/full", "w") as handle:
        handle.write("x" * 100_000)


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize(
    "command, code, line",
    [
        (lambda: None, 0, None),
        (
            raiser(UserError("papers.jsonl:3: is not JSON", "write one")),
            2,
            "papers.jsonl:3: is not JSON; write one",
        ),
        (
            raiser(UserError("file \n with\r\nbreaks: x\n", "mend\n\nit")),
            2,
            "file with breaks: x ; mend it",
        ),
        (
            raiser(RunError("step 7: loss nan", "lower --learning-rate")),
            1,
            "step 7: loss nan; lower --learning-rate",
        ),
        (fill_the_disk, 1, "No space left on device; free some disk space and run again"),
        (
            raiser(PermissionError(errno.EACCES, "Permission denied", "runs/x")),
            1,
            "Permission denied (runs/x); check the permissions",
        ),
        (
            raiser(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
            1,
            "Connection refused; mend that and run again",
        ),
        (raiser(KeyboardInterrupt()), 130, "interrupted; what was done is kept"),
        (raiser(Terminated()), 143, "terminated; what was done is kept"),
    ],
)
def test_each_failure_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], command: Callable[[], None], code: int, line: str | None
) -> None:
    assert run_command(command) == code
    written = capsys.readouterr()
    assert written.err == ("" if line is None else f"error: {line}\n")
    assert written.out == ""


def test_what_is_said_cannot_garble_a_terminal_or_tell_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-planted-01 \n")
    monkeypatch.setenv("HF_TOKEN", "short")
    nasty = "\x1b[2J\u202eab\u2028\udcff sk-planted-01 short \u6771\u00e9"
    safe = r"\x1b[2J\u202eab\u2028\udcff *** short" + " \u6771\u00e9"
    assert errors.printable(nasty) == safe
    before = list(logging.root.handlers)
    command_line.log_to_stderr(tmp_path / "run.log")
    logging.getLogger("any").warning("one\n%s", nasty)
    written = capsys.readouterr().err
    logging.root.handlers[:] = before
    assert written[20:] == rf"one\n{safe}" + "\n"
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == written


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize(
    "fault", [TypeError("ours"), ValueError("ours"), OSError("ours, without a number")]
)
def test_our_own_faults_keep_their_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault), match="ours"):
        run_command(raiser(fault))


@pytest.mark.parametrize(
    "number, code, line", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_runs_the_clean_up_and_ends_with_its_exit_code(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    work = """
import sys, files, pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as this suite may be, inherits that it is ignored
def work():
    with files.atomic_path(pathlib.Path(sys.argv[1])) as partial:
        partial.write_text("half"); print("ready", flush=True); time.sleep(60)
sys.exit(files.run_command(work))
"""
    with started(work, tmp_path / "file") as process:
        assert first_line(process) == "ready"
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (
        code,
        "",
        f"error: {line}; what was done is kept\n",
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, 1_000_000])
@pytest.mark.parametrize("target, code", [("/dev/full", 1), ("| true", 1)])
def test_an_output_that_cannot_be_written_is_no_python_error(
    size: int, target: str, code: int
) -> None:
    """A full disk or a reader that went away, also if it shows only when the buffer is emptied at
    the end.

    Guards against: what still stands in stdout's buffer when `run_command` returns fails at exit,
    with code 120 and "Exception ignored in".
    """
    work = (
        "import sys, time, files; time.sleep(0.3); sys.exit(files.run_command(lambda: print('x' *"
        f" {size})))"
    )
    redirection = f"> {target}" if target.startswith("/") else target
    shell = [
        "bash",
        "-c",
        f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}',
        sys.executable,
        work,
    ]
    done = subprocess.run(
        shell,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    assert done.stderr == (
        "error: No space left on device; free some disk space and run again\n"
        if target == "/dev/full"
        else ""
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nonsense"], "Unrecognized options: --nonsense"),
        (["--max-stesp", "3"], "Unrecognized options: --max-stesp, 3"),
        (["stray"], "Unrecognized options: stray"),
        (["--resume", "yes"], "Unrecognized options: yes"),
        (["--no-resume"], "Unrecognized options: --no-resume"),
        (
            ["--metric", "manhattan"],
            (
                "invalid choice 'manhattan' for argument '--metric'. Expected one of ('euclidean',"
                " 'cosine')"
            ),
        ),
        (
            ["--max-steps", "many"],
            "Error parsing --max-steps: invalid literal for int() with base 10: 'many'",
        ),
        (
            ["--max-steps", "1.5"],
            "Error parsing --max-steps: invalid literal for int() with base 10: '1.5'",
        ),
        (
            ["--learning-rate", "small"],
            "Error parsing --learning-rate: could not convert string to float: 'small'",
        ),
        (["--max-steps"], "Missing value for argument '--max-steps'. Expected 1 values"),
        (
            ["--encoder", "--metric", "cosine"],
            "Missing value for argument '--encoder'. Expected 1 values",
        ),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_bad_command_line_is_one_line_whatever_the_terminal(
    monkeypatch: pytest.MonkeyPatch, words: list[str], said: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["folder/main.py"])
    with pytest.raises(UserError) as caught:
        command_line.parse_command_line(Settings, words, Settings())
    assert str(caught.value) == f"{said}; see main.py --help"


@pytest.mark.parametrize(
    "words",
    [
        ["--nonsense"],
        ["--metric", "manhattan"],
        ["--batch-size", "1"],
        ["--output-dir", "a file"],
        ["--train-file", "missing.jsonl"],
    ],
)
def test_bad_usage_of_the_script_exits_2_with_one_line_and_writes_nothing(
    tmp_path: Path, words: list[str]
) -> None:
    """The last two guard against a lock file left where nothing shall be written."""
    put_file(tmp_path / "a file", "mine")
    done = run_script(
        ROOT / "main.py", "--eval-file", ROOT / "data/sample_test.jsonl", *words, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", done.stderr)
    assert tree(tmp_path) == {"a file": "mine"}


def test_the_working_folder_is_refused_as_an_output_folder(tmp_path: Path) -> None:
    """Guards against: "." has no last name to make the lock's name of, which ends in a traceback."""
    put_file(tmp_path / "thesis.tex", "mine")
    data = ROOT / "data"
    done = run_script(
        ROOT / "main.py",
        "--output-dir",
        ".",
        "--train-file",
        data / "sample_train.jsonl",
        "--eval-file",
        data / "sample_test.jsonl",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: --output-dir [^\n]+; [^\n]+", done.stderr.splitlines()[-1])
    assert tree(tmp_path) == {"thesis.tex": "mine"}


# Run folders

SETTINGS: dict[str, Any] = {
    "metric": "euclidean",
    "margin": 1.0,
    "seed": 0,
    "log_every": 5,
    "encoder": "tiny",
}
FREE = frozenset({"log_every"})


def begin(output: Path, resume: bool = False, **changes: Any) -> RunFolder:
    folder = RunFolder(output)
    folder.begin(SETTINGS | changes, {"device": "cpu"}, resume, FREE)
    return folder


def finished_run(output: Path, result: str) -> RunFolder:
    folder = begin(output)
    put_file(folder.path / "benchmark.json", result)
    folder.finish()
    return folder


def result_of(output: Path) -> str | None:
    """The result of a run that counts as finished, else None."""
    finished = (output / "settings.json").exists() and not (output / "UNFINISHED").exists()
    return (output / "benchmark.json").read_text() if finished else None


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


def test_resume_refuses_changed_inputs_and_a_record_of_another_kind(tmp_path: Path) -> None:
    """What was read, and by how many processes, is named like a setting; a settings.json that is no
    run's is an error, not a traceback.
    """
    folder, inputs = RunFolder(tmp_path / "one"), {"train_file (SHA-256)": "ab", "processes": 2}
    folder.begin(SETTINGS, {"inputs": inputs}, False, FREE)
    folder.begin(SETTINGS, {"inputs": inputs, "device": "cuda"}, True, FREE)
    with pytest.raises(
        UserError, match=r"\(train_file \(SHA-256\) was 'ab', is 'cd'; processes was 2, is 1\)"
    ):
        folder.begin(
            SETTINGS, {"inputs": {"train_file (SHA-256)": "cd", "processes": 1}}, True, FREE
        )
    for content in ("[]", "7", '{"settings": []}', "{}", '{"inputs": null}'):
        (tmp_path / "one/settings.json").write_text(content)
        with pytest.raises(UserError):
            folder.begin(SETTINGS, {"inputs": inputs}, True, FREE)


def test_resume_removes_what_killed_processes_were_writing(tmp_path: Path) -> None:
    """A checkpoint half written by a killed process would stay for ever, and gigabytes of them fill
    a disk.
    """
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


def test_a_finished_run_is_replaced_only_when_the_next_one_finishes(tmp_path: Path) -> None:
    output = tmp_path / "one"
    finished_run(output, "first")
    before = tree(output)
    second = begin(output, seed=1)
    assert second.path != output
    assert second.path.parent == output.parent
    put_file(second.path / "benchmark.json", "second")
    assert tree(output) == before
    assert RunFolder(output).path == second.path
    assert begin(output, resume=True, seed=1).path == second.path
    with pytest.raises(UserError, match="seed was 1, is 0"):
        begin(output, resume=True)
    assert tree(output) == before
    second.finish()
    assert result_of(output) == "second"
    assert files.read_json(output / "settings.json")["settings"]["seed"] == 1
    assert os.listdir(tmp_path) == ["one"]


def test_the_refusal_names_the_folder_to_delete(tmp_path: Path) -> None:
    """Guards against: over a finished run it names that run's folder, which is not the one to
    delete, and deleting it loses results and helps nothing.
    """
    output = tmp_path / "one"
    finished_run(output, "first")
    second = begin(output)
    with pytest.raises(UserError, match="holds an unfinished run") as caught:
        begin(output)
    assert str(second.path) in str(caught.value)


@pytest.mark.parametrize("content", ["thesis.tex", "UNFINISHED.txt"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    output = tmp_path / "papers"
    output.mkdir()
    assert RunFolder(output).path == output
    put_file(output / content, "mine")
    with pytest.raises(
        UserError, match=r"papers: holds files that are not a run's; name another folder"
    ):
        RunFolder(output)
    with pytest.raises(UserError, match=rf"{content}: is a file; name a folder"):
        RunFolder(output / content)
    assert tree(tmp_path) == {f"papers/{content}": "mine"}


def test_a_run_killed_while_it_begins_never_looks_finished_and_can_be_started_again(
    tmp_path: Path,
) -> None:
    """Guards against: settings.json is written before UNFINISHED, and a folder that holds the one
    without the other counts as a finished run.
    """
    (tmp_path / "runs").mkdir()
    states = states_of(
        tmp_path / "runs", lambda: begin(tmp_path / "runs" / "one"), tmp_path / "states"
    )
    for state in states:
        output = state / "one"
        assert RunFolder(output).path == output, f"counts as finished: {sorted(os.listdir(output))}"
        with contextlib.suppress(UserError):
            begin(output)
        assert begin(output, resume=True).path == output


@pytest.mark.parametrize("has_old", [False, True])
def test_a_run_killed_while_it_finishes_loses_nothing(tmp_path: Path, has_old: bool) -> None:
    """At every moment either the old results (if any) stand there and the new run can be continued
    from its checkpoints, or the new results do.

    Guards against: the checkpoints are dropped while the run still counts as unfinished; and
    between the end of UNFINISHED and the second rename a run over an older one is neither finished
    nor unfinished, and the next `begin` deletes it.
    """
    runs = tmp_path / "runs"
    if has_old:
        finished_run(runs / "one", "old")
    new = begin(runs / "one")
    put_file(new.path / "benchmark.json", "new")
    put_folder(new.path / "checkpoints", "weights")
    checkpoints = tree(new.path / "checkpoints")
    seen = set()
    for state in states_of(runs, new.finish, tmp_path / "states"):
        opened = RunFolder(state / "one")
        result = result_of(state / "one")
        seen.add(result)
        if result != "new":
            assert result == ("old" if has_old else None)
            opened.begin(SETTINGS, {}, resume=True, free=FREE)
            assert (opened.path / "benchmark.json").read_text() == "new"
            assert tree(opened.path / "checkpoints") == checkpoints
            opened.finish()
        assert result_of(state / "one") == "new"
        assert not (state / "one/checkpoints").exists()
        assert not list(state.glob(".one.old"))
    assert seen == {"old" if has_old else None, "new"}


def test_opening_a_run_folder_brings_back_the_run_that_a_kill_left_under_its_second_name(
    tmp_path: Path,
) -> None:
    finished_run(tmp_path / "one", "old")
    (tmp_path / "one").rename(tmp_path / ".one.old")
    opened = RunFolder(tmp_path / "one")
    assert result_of(tmp_path / "one") == "old"
    assert opened.path != opened.output


# Full disks and short memory as libraries report them


def test_a_library_s_own_error_for_a_full_disk_is_the_system_s(tmp_path: Path) -> None:
    """safetensors and tokenizers raise exceptions of their own kind; the user gets the one line of
    a full disk, and the file's old content stays.
    """
    path = tmp_path / "weights"
    path.write_text("old")

    def save(message: str) -> None:
        with atomic_path(path) as partial:
            partial.write_text("half")
            raise Exception(message)

    with pytest.raises(OSError, match="No space left on device") as caught:
        save("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert tree(tmp_path) == {"weights": "old"}
    with pytest.raises(Exception, match=r"^another error$"):
        save("another error")


def torch_asks_for_too_much() -> None:
    import torch

    torch.empty(2**50)


def gpu_is_full() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def python_asks_for_too_much() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("ask", [torch_asks_for_too_much, gpu_is_full, python_asks_for_too_much])
def test_short_memory_names_the_settings_to_lower(
    ask: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's CPU allocator, a GPU's and Python's own: exit 1, one line, never a traceback; any
    other RuntimeError stays what it is.
    """
    with (
        pytest.raises(RunError, match=r"^out of memory .*--batch-size"),
        errors.memory_named("--batch-size"),
    ):
        ask()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_command(ask) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (")
    assert said.count("\n") == 1
    assert "--max-length" in said
    with pytest.raises(RuntimeError, match="shape mismatch"), errors.memory_named("--batch-size"):
        raise RuntimeError("shape mismatch")


# Signals held back


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize(
    "number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_held_back_until_the_loop_has_ended_its_step(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    steps = 0
    with StopSignal() as stop:
        assert stop.received is None
        stop.raise_received()
        while stop.received is None and steps < 5:
            if steps == 2:
                os.kill(os.getpid(), number)
            steps += 1
        assert steps == 3
        assert stop.received == number
        with pytest.raises(raised):
            stop.raise_received()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "second, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_second_signal_ends_at_once_as_what_it_is(
    first: signal.Signals, second: signal.Signals, raised: type[BaseException]
) -> None:
    """Guards against: a second SIGTERM ends as Ctrl-C would, with exit code 130."""
    with StopSignal():
        os.kill(os.getpid(), first)
        with pytest.raises((KeyboardInterrupt, Terminated)) as caught:
            os.kill(os.getpid(), second)
    assert caught.type is raised


def test_versions_say_what_a_result_was_made_with() -> None:
    found = run_folder.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert json.loads(json.dumps(found)) == found
