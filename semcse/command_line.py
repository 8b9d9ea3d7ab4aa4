"""TODO: say what this file is for: semcse.command_line."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from semcse.errors import Terminated, UserError, memory_named, printable, without_secrets

Command = TypeVar("Command")


def run_command(command: Callable[[], None]) -> int:
    """Run a script's `command` and turn every failure into one line on stderr and an exit code (see
    the module's first lines).

    Faults of our own making (a TypeError, say) are not user errors: they keep their traceback,
    without secrets.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    sys.excepthook = lambda *fault: print(
        without_secrets("".join(traceback.format_exception(*fault))), end="", file=sys.stderr
    )
    try:
        with memory_named("--max-length or the size of a batch, where the script has one"):
            command()
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; what was done is kept", 130)
    except Terminated:
        return _fail("terminated; what was done is kept", 143)
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        _drop_output()
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; {_mend_of(error)}", 1)


def _drop_output() -> None:
    """Send what still stands in stdout's buffer nowhere, or Python fails on it once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # no real file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_terminated(signum: int, frame: object) -> None:
    raise Terminated


def _fail(message: str, code: int) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


class _OneLine(logging.Formatter):
    """Log lines that no text in them can garble."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _mend_of(error: OSError) -> str:
    full = "free some disk space and run again"
    mends = {
        errno.ENOSPC: full,
        errno.EDQUOT: full,
        errno.EACCES: "check the permissions",
        errno.EROFS: "choose a writable folder",
    }
    return mends.get(error.errno or 0, "mend that and run again")


def parse_command_line(
    kind: type[Command], args: Sequence[str] | None, default: Command
) -> Command:
    """Command line -> a `kind` dataclass, by tyro. Its framed errors become our one line; `--help`
    prints and exits 0.

    Args:
        kind: the dataclass whose fields are the flags.
        args: the words after the script's name; None means sys.argv's.
        default: an instance that holds the defaults.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                kind,
                args=args,
                default=default,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(
            _first_words_of(box.getvalue()), f"see {Path(sys.argv[0]).name} --help"
        ) from None


def _first_words_of(box: str) -> str:
    """tyro's message without its frame, its advice and its line breaks."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("╭")), -1)
    body = lines[start + 1 :]
    end = next((i for i, line in enumerate(body) if line.startswith(("─", "╰"))), len(body))
    return " ".join(body[:end]).rstrip(".") or "bad command line"


class StopSignal:
    """Ctrl-C and SIGTERM held back inside a `with` block, for loops that must end between two
    steps; a second Ctrl-C ends at once, unless `patient`.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received: int | None = None
        self.patient = patient  # launchers and schedulers pass the same signal on twice

    def __enter__(self) -> StopSignal:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: object) -> None:
        if self.received is not None and not self.patient:
            raise KeyboardInterrupt if signum == signal.SIGINT else Terminated
        self.received = signum

    def raise_received(self) -> None:
        """Raise what was held back: KeyboardInterrupt or Terminated. Does nothing when nothing
        came.
        """
        if self.received is not None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated


def log_to_stderr(also: Path | None = None) -> None:
    """Send the scripts' log to stderr, and to the file `also` (appended). Called by entry scripts
    only.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if also:
        handlers.append(logging.FileHandler(also, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.raiseExceptions = False  # a full disk is reported once, not by every line of the log
    for noisy in ("httpx", "httpx2", "huggingface_hub", "transformers", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for handler in handlers:
        handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
