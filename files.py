"""How this project treats files and errors: atomic writes, append-and-flush journals, locks,
one-line errors, exit codes.

Everything here is ours and knows nothing of papers or models. Exit codes of every script (DESIGN):
0 done, 2 bad usage or input (UserError, nothing written), 1 a fault at run time (RunError, a full
disk: what was done is kept), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

Command = TypeVar("Command")

# environment variables whose values nothing that we write may hold
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class UserError(Exception):
    """Bad usage or input: exit 2. `what` names the file, line or setting; `mend` says what to do
    about it.
    """

    exit_code = 2

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what


class RunError(UserError):
    """A fault at run time (non-finite loss, a server gone): exit 1, everything done so far is kept."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, like KeyboardInterrupt, so that no `except Exception`
    swallows it.
    """


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


@contextlib.contextmanager
def memory_named(settings: str) -> Iterator[None]:
    """Turn a lack of memory in the block, the machine's or a GPU's, into a RunError that names the
    `settings` to lower.
    """
    try:
        yield
    # torch raises RuntimeErrors, of which OutOfMemoryError is only one
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error)
        ):
            raise
        raise RunError(
            f"out of memory ({str(error)[:200]})",
            f"free some and continue, or start again with a lower {settings}",
        ) from None


def _drop_output() -> None:
    """Send what still stands in stdout's buffer nowhere, or Python fails on it once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # no real file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_terminated(signum: int, frame: object) -> None:
    raise Terminated


def _fail(message: str, code: int) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


def without_secrets(text: str) -> str:
    """`text` with stars for the values of SECRETS, which a server may have sent back; words of
    fewer than eight characters ("EMPTY") are no secrets.
    """
    for value in (os.environ.get(name, "").strip() for name in SECRETS):
        text = text.replace(value, "***") if len(value) >= 8 else text
    return text


def printable(text: str) -> str:
    """`text` for one line of a terminal or log: no secrets; line breaks, control and direction
    characters and half surrogate pairs as escapes.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode()
        for one in without_secrets(text)
    )


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


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` (file or folder) to write to; it takes `path`'s place when the
    block ends well, and vanishes otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(partial)  # of a killed process with the same number
    try:
        yield partial
        if partial.is_dir():
            replace_folder(partial, path)
        else:
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(partial, path)
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        # safetensors and tokenizers have exceptions of their own for a full disk
        if code and not isinstance(error, OSError):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Put folder `new` where folder `path` is or shall be. `restore_folder(path)` mends a kill
    between the two renames.
    """
    old = _old_of(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Bring back the folder that a kill inside `replace_folder(_, path)` left under its second
    name, or remove what is left of it.
    """
    if path.exists():
        _remove(_old_of(path))
    elif _old_of(path).exists():
        _old_of(path).rename(path)


def _old_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, UTF-8."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON atomically. NaN and infinity are refused: no other reader
    would take them.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON file of ours. UserError: missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file", "check the path") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error})", "delete it or put back a good copy"
        ) from None


class Journal:
    """A JSONL file that grows by whole rows: each `append` is written and flushed at once, so that
    a kill loses at most the row being written.

    Opening an existing journal drops torn lines (no newline, or not JSON), which only a kill or a
    full disk can have left. Journals may be larger than memory.
    """

    def __init__(
        self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda row: True
    ) -> None:
        """Open `path` for appending; existing rows for which `keep` is false are dropped (a resumed
        run drops rows after its checkpoint).
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with atomic_path(path) as partial, partial.open("wb") as kept:
                kept.writelines(self._line(row) for _, row in self.scan(path) if keep(row))
        self._handle = path.open("a+b")
        self._end = self._handle.seek(0, os.SEEK_END)

    @staticmethod
    def scan(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset, row) of every whole row of a journal file, one at a time."""
        offset = 0
        with path.open("rb") as handle:
            for line in handle:
                row = None
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                if isinstance(row, dict) and line.endswith(b"\n"):
                    yield offset, row
                offset += len(line)

    @classmethod
    def rows(cls, path: Path) -> list[dict[str, Any]]:
        """All whole rows of a journal file."""
        return [row for _, row in cls.scan(path)]

    def append(self, row: dict[str, Any]) -> int:
        """Write one row, flush it, and return the byte offset where it stands."""
        line = self._line(row)
        offset, self._end = self._end, self._end + len(line)
        self._handle.write(line)
        self._handle.flush()
        return offset

    def sync(self) -> None:
        """Make sure that the rows outlive a power cut too."""
        os.fsync(self._handle.fileno())

    def row_at(self, offset: int) -> dict[str, Any]:
        """The row at a byte offset that `append` or `scan` gave."""
        self._handle.seek(offset)
        return dict(json.loads(self._handle.readline()))

    def close(self) -> None:
        """Close the file; rows are on disk already."""
        self._handle.close()

    @staticmethod
    def _line(row: dict[str, Any]) -> bytes:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` (a small side file, `.NAME.lock`) for this process alone; the kernel frees it
    when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its last holder has just removed it
            if not (path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat())):
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(
                f"{path.with_name(path.stem[1:])} is in use by another run",
                "wait for it or choose another output",
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_output_folder(output: Path) -> None:
    """Refuse an output folder that is a file, or would stand below one. UserError: names
    --output-dir.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file", "name a folder")


class RunFolder:
    """The output folder of one run, from which a reader can always tell whether the run is
    finished.

    A run works in `path` and is unfinished while UNFINISHED stands in it. Over a finished run the
    next one works in a hidden sibling and takes the place of the old one when it is done, so that
    the old results stay whole until then.
    """

    def __init__(self, output: Path) -> None:
        check_output_folder(output)
        self.output = output
        restore_folder(output)
        if output.is_dir() and any(output.iterdir()) and not (output / "settings.json").exists():
            raise UserError(
                f"--output-dir {output}: holds files that are not a run's", "name another folder"
            )
        successor = output.with_name(f".{output.name}.next")
        if _is_finished(successor):  # a kill at the very end of `finish`
            replace_folder(successor, output)
        self.path = successor if _is_finished(output) else output
        if _is_finished(output):
            _remove(output / "checkpoints")  # a kill within `finish`

    @classmethod
    @contextlib.contextmanager
    def locked(cls, output: Path) -> Iterator[RunFolder]:
        """The run folder `output`, held for this process alone."""
        output = output.resolve()
        check_output_folder(output)
        with lock(output.with_name(f".{output.name}.lock")):
            yield cls(output)

    def begin(
        self, settings: dict[str, Any], facts: dict[str, Any], resume: bool, free: Collection[str]
    ) -> None:
        """Start a run, or with `resume` check that the unfinished one has the same settings (those
        in `free` may differ) and facts["inputs"].

        Raises:
            UserError: an unfinished run without `resume`, `resume` without an unfinished run, or
                changed settings or inputs (named).
        """
        mark, record = self.path / "UNFINISHED", self.path / "settings.json"
        if resume:
            if not mark.exists():
                raise UserError(f"{self.output}: holds no unfinished run", "leave --resume out")
            self._refuse_changes(read_json(record), settings, facts, free)
            for stale in list(self.path.rglob(".*.partial")):
                _remove(stale)  # of killed processes: only the lock's holder writes here
        elif mark.exists():
            raise UserError(
                f"{self.path}: holds an unfinished run",
                "continue it with --resume, or delete that folder, or name another --output-dir",
            )
        else:
            with atomic_path(self.path) as partial:
                write_text(
                    partial / mark.name,
                    "This run has not ended. Continue it with --resume, or delete this folder.\n",
                )
                write_json(partial / record.name, {"settings": settings, **facts})

    def _refuse_changes(
        self, before: Any, settings: dict[str, Any], facts: dict[str, Any], free: Collection[str]
    ) -> None:
        """Raise a UserError that names what differs from the record of an earlier start."""
        changed = []
        for part, now in (("settings", settings), ("inputs", facts.get("inputs", {}))):
            was = before.get(part, {}) if isinstance(before, dict) else None
            if not isinstance(was, dict):
                raise UserError(
                    f"{self.path / 'settings.json'}: is not what a run writes",
                    "delete the run's folder, or use another --output-dir",
                )
            changed += [
                f"{key} was {was.get(key)!r}, is {value!r}"
                for key, value in now.items()
                if key not in free and was.get(key) != value
            ]
        if changed:
            raise UserError(
                f"{self.output}: cannot resume with changed settings or data"
                f" ({'; '.join(changed)})",
                "use the same, or another --output-dir",
            )

    def finish(self) -> None:
        """Mark the run as finished, drop its checkpoints, and put it in the place of an earlier
        one.
        """
        (self.path / "UNFINISHED").unlink()
        if self.path != self.output:
            replace_folder(self.path, self.output)
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)


def _is_finished(run: Path) -> bool:
    return (run / "settings.json").exists() and not (run / "UNFINISHED").exists()


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


def versions() -> dict[str, str | None]:
    """What a result was made with: this code's commit, Python, the libraries that compute, and the
    processor.
    """
    found: dict[str, str | None] = {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
    }
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The git commit of this code with "+" after it if files were changed since; None outside a
    checkout.
    """
    where = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")
