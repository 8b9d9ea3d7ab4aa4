"""The parts that every script shares: flags, log, signals and exit codes (semcse/errors.py)."""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from semcse.errors import Terminated, UserError, memory_named, printable, without_secrets

T = TypeVar("T")

FIXES = {
    errno.ENOSPC: "free some disk space and run again",
    errno.EDQUOT: "free some disk space and run again",
    errno.EACCES: "check the permissions",
    errno.EROFS: "choose a writable folder",
}


def run_command(command: Callable[[], None]) -> int:
    """Run `command`, report a failure as one line on stderr, and return the exit code. Bugs, such
    as a TypeError, keep their traceback, but without secrets.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    sys.excepthook = lambda *fault: print(
        without_secrets("".join(traceback.format_exception(*fault))), end="", file=sys.stderr
    )
    try:
        with memory_named("--max-length or the size of a batch, if the script has one"):
            command()
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; everything done so far is kept", 130)
    except Terminated:
        return _fail("terminated; everything done so far is kept", 143)
    except OSError as error:
        if error.errno is None:
            raise
        # Discard what is left in stdout's buffer; otherwise Python fails again when it exits.
        with contextlib.suppress(OSError, ValueError):  # stdout may not be a real file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has ended, as in `script | head`
            return 1
        where = f" ({error.filename})" if error.filename else ""
        fix = FIXES.get(error.errno, "remove the cause and run again")
        return _fail(f"{error.strerror or error}{where}; {fix}", 1)


def _fail(message: str, code: int) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


def _raise_terminated(signum: int, frame: object) -> None:
    raise Terminated


def parse_command_line(kind: type[T], args: Sequence[str] | None, default: T) -> T:
    """Parse `args` (None: those of `sys.argv`) into the dataclass `kind`, whose fields are the
    flags and whose default values `default` holds. A bad command line exits with code 2.
    """
    import tyro

    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
    return tyro.cli(kind, args=args, default=default, config=config)


class StopSignal:
    """Delays Ctrl-C and SIGTERM inside a `with` block, so that a loop can finish its step. A second
    signal ends the block at once, unless `patient` is true: launchers send a signal twice.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received: int | None = None
        self._patient = patient

    def __enter__(self) -> Self:
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: object) -> None:
        again, self.received = self.received is not None, signum
        if again and not self._patient:
            self.raise_received()

    def raise_received(self) -> None:
        """Raise KeyboardInterrupt or Terminated if a signal was received."""
        if self.received is not None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated


class _OneLine(logging.Formatter):
    """Escapes every character that could garble a line of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def log_to_stderr(also: Path | None = None) -> None:
    """Send the log to stderr, and append it to the file `also`. Only scripts call this."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if also:
        handlers.append(logging.FileHandler(also, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.raiseExceptions = False  # report a full disk once, not for every line of the log
    for noisy in ("httpx", "httpx2", "huggingface_hub", "transformers", "sentence_transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
