"""semcse/command_line.py and semcse/errors.py: how each failure becomes one line and an exit code,
what the command line refuses, and what signals do.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from disk_states import first_line, put_file, started, tree

from semcse import command_line, errors
from semcse.command_line import StopSignal, parse_command_line, run_command
from semcse.errors import RunError, Terminated, UserError


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Restore what `run_command` and `log_to_stderr` set for the whole process."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, handlers = sys.excepthook, list(logging.root.handlers)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    sys.excepthook, logging.root.handlers[:] = hook, handlers


# Exit codes and error lines


def raiser(fault: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise fault

    return command


def fill_the_disk() -> None:
    with open("/dev/full", "w") as handle:
        handle.write("x" * 100_000)


@pytest.mark.parametrize(
    "command, code, line",
    [
        (lambda: None, 0, None),
        (
            raiser(UserError("papers.jsonl:3: is bad", "fix it")),
            2,
            "papers.jsonl:3: is bad; fix it",
        ),
        (
            raiser(UserError("file \n with\r\nbreaks: x\n", "fix\n\nit")),
            2,
            "file with breaks: x ; fix it",
        ),
        (raiser(RunError("step 7: loss nan", "lower it")), 1, "step 7: loss nan; lower it"),
        (fill_the_disk, 1, "No space left on device; free some disk space and run again"),
        (
            raiser(PermissionError(errno.EACCES, "Permission denied", "runs/x")),
            1,
            "Permission denied (runs/x); check the permissions",
        ),
        (
            raiser(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
            1,
            "Connection refused; remove the cause and run again",
        ),
        (raiser(KeyboardInterrupt()), 130, "interrupted; everything done so far is kept"),
        (raiser(Terminated()), 143, "terminated; everything done so far is kept"),
    ],
)
def test_each_failure_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], command: Callable[[], None], code: int, line: str | None
) -> None:
    assert run_command(command) == code
    written = capsys.readouterr()
    assert written.err == ("" if line is None else f"error: {line}\n")
    assert written.out == ""


def test_a_user_error_has_its_parts() -> None:
    error = UserError("--seed is negative", fix="give 0 or more")
    assert (error.what, error.fix) == ("--seed is negative", "give 0 or more")


@pytest.mark.parametrize(
    "fault", [TypeError("a bug"), ValueError("a bug"), OSError("a bug, without a number")]
)
def test_bugs_keep_their_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault), match="a bug"):
        run_command(raiser(fault))


def test_a_traceback_holds_no_secrets() -> None:
    code = (
        "import sys; from semcse import command_line as c; c.run_command(lambda: {}[sys.argv[1]])"
    )
    done = run_script("-c", code, "sk-planted-01", OPENAI_API_KEY="sk-planted-01")
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: '***'\n")


def test_messages_and_logs_cannot_garble_a_terminal_or_tell_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-planted-01 \n")
    monkeypatch.setenv("HF_TOKEN", "short")
    nasty = "\x1b[2J\u202eab\u2028\udcff sk-planted-01 short \u6771\u00e9"
    safe = r"\x1b[2J\u202eab\u2028\udcff *** short" + " \u6771\u00e9"
    assert errors.printable(nasty) == safe
    command_line.log_to_stderr(tmp_path / "run.log")
    logging.getLogger("any").warning("one\n%s", nasty)
    written = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)\n", written)
    assert written[20:] == rf"one\n{safe}" + "\n"
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("size", [1, 1_000_000])
@pytest.mark.parametrize("target, code", [("/dev/full", 1), ("| true", 1)])
def test_an_output_that_cannot_be_written_is_no_python_error(
    size: int, target: str, code: int
) -> None:
    """A full disk, or a reader that went away; also if it shows only when the buffer is flushed.

    Regression: what was left in stdout's buffer failed at exit, with code 120 and a traceback.
    """
    work = (
        "import sys, time; from semcse import command_line; time.sleep(0.3);"
        f" sys.exit(command_line.run_command(lambda: print('x' * {size})))"
    )
    redirection = f"> {target}" if target.startswith("/") else target
    script = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, work],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    full = "error: No space left on device; free some disk space and run again\n"
    assert done.returncode == code
    assert done.stderr == (full if target == "/dev/full" else "")


def torch_asks_for_too_much() -> None:
    import torch

    torch.empty(2**50)


def gpu_is_full() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def python_asks_for_too_much() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("ask", [torch_asks_for_too_much, gpu_is_full, python_asks_for_too_much])
def test_a_lack_of_memory_names_the_settings_to_lower(
    ask: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(RunError, match=r"^out of memory .*--batch-size"),
        errors.memory_named("--batch-size"),
    ):
        ask()
    assert run_command(ask) == 1
    assert re.fullmatch(
        r"error: out of memory \([^\n]*--max-length[^\n]*\n", capsys.readouterr().err
    )


def test_other_runtime_errors_are_no_lack_of_memory() -> None:
    with (
        pytest.raises(RuntimeError, match=r"^shape mismatch$"),
        errors.memory_named("--batch-size"),
    ):
        raise RuntimeError("shape mismatch")


# Command lines


@dataclass(frozen=True)
class Command:
    """Flags of three kinds."""

    steps: int = 3
    name: str = "a"
    verbose: bool = False


def test_a_command_line_becomes_the_fields_of_a_dataclass() -> None:
    words = ["--steps", "7", "--verbose", "--steps", "8"]
    assert parse_command_line(Command, words, Command(name="b")) == Command(8, "b", True)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nonsense"], "--nonsense"),
        (["--stesp", "3"], "--stesp"),
        (["stray"], "stray"),
        (["--no-verbose"], "--no-verbose"),
        (["--steps", "many"], "'many'"),
        (["--steps", "1.5"], "'1.5'"),
        (["--steps"], "--steps"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_names_the_word(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(Command, words, Command())
    written = capsys.readouterr()
    assert caught.value.code == 2
    assert said in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nonsense"], "--nonsense"),
        (["--concurrency", "many"], "'many'"),
        (["--concurrency", "0"], "error: --concurrency"),
        (["--input", "missing.jsonl"], "error: missing.jsonl"),
        (["--output", "a folder"], "error: --output a folder"),
    ],
)
def test_bad_usage_of_a_script_exits_2_and_writes_nothing(
    tmp_path: Path, words: list[str], said: str
) -> None:
    """Nothing on stdout, and no file, not even a lock file."""
    (tmp_path / "a folder").mkdir()
    put_file(tmp_path / "a folder/a file", "mine")
    flags = ["--input", "in.jsonl", "--output", "out.jsonl", "--model", "m"]
    flags += ["--base-url", "http://127.0.0.1:9/v1"]
    done = run_script(ROOT / "generate_train_summaries.py", *flags, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if said.startswith("error: "):
        assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", done.stderr)
    assert tree(tmp_path) == {"a folder/a file": "mine"}


# Signals

WORK = """
import sys, pathlib, signal, time
from semcse import command_line, files
# A background job of a shell, which these tests may be, ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
def work():
    with files.atomic_path(pathlib.Path(sys.argv[1])) as partial:
        partial.write_text("half"); print("ready", flush=True); time.sleep(60)
sys.exit(command_line.run_command(work))
"""


@pytest.mark.parametrize(
    "number, code, line", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_cleans_up_and_ends_with_its_exit_code(
    tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    with started(WORK, tmp_path / "file") as process:
        assert first_line(process) == "ready"
        process.send_signal(number)
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert said == f"error: {line}; everything done so far is kept\n"
    assert os.listdir(tmp_path) == []


KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.mark.parametrize("number, raised", KINDS)
def test_a_signal_is_held_back_until_the_loop_has_finished_its_step(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    steps = 0
    with StopSignal() as stop:
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


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second, raised", KINDS)
def test_a_second_signal_ends_the_block_at_once_unless_it_is_patient(
    first: signal.Signals, second: signal.Signals, raised: type[BaseException]
) -> None:
    """Regression: a second SIGTERM ended like Ctrl-C, with exit code 130."""
    with StopSignal():
        os.kill(os.getpid(), first)
        with pytest.raises((KeyboardInterrupt, Terminated)) as caught:
            os.kill(os.getpid(), second)
    assert caught.type is raised
    with StopSignal(patient=True) as stop:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), first)
    assert stop.received == first
