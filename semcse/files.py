"""Files that survive a kill: atomic writes, journals that grow by whole rows, and file locks."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from semcse.errors import UserError

Row = dict[str, Any]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, to which the block writes a file or a folder that replaces `path`. If
    the block raises, `path` keeps its old content and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    remove(partial)  # a killed process with the same id may have left it
    try:
        yield partial
        if partial.is_dir():
            old = path.with_name(f".{path.name}.old")
            remove(old)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            remove(old)
        else:
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(partial, path)
    except Exception as error:
        # safetensors and tokenizers report a full disk by exceptions that are not OSErrors.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code and not isinstance(error, OSError):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON atomically. Raise a ValueError if it holds NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote. Raise a UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file", "check the path") from None
    except (ValueError, OSError, RecursionError) as error:
        what = f"{path}: not readable as JSON ({error})"
        raise UserError(what, "delete it or put back a good copy") from None


class Journal:
    """A JSONL file that grows by whole rows. Opening it drops torn lines (without a line end, or
    not JSON), which a kill or a full disk can leave. A journal may be larger than memory.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool] = lambda row: True) -> None:
        """Open `path` for appending, and drop the existing rows for which `keep` returns False."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with atomic_path(path) as partial, partial.open("wb") as kept:
                kept.writelines(_line(row) for _, row in self.scan(path) if keep(row))
        self._handle = path.open("a+b")

    @staticmethod
    def scan(path: Path) -> Iterator[tuple[int, Row]]:
        """Yield (byte offset, row) of every whole row of a journal file."""
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
    def rows(cls, path: Path) -> list[Row]:
        """Return all whole rows of a journal file."""
        return [row for _, row in cls.scan(path)]

    def append(self, row: Row) -> int:
        """Write one row, flush it, and return its byte offset."""
        offset = self._handle.seek(0, os.SEEK_END)
        self._handle.write(_line(row))
        self._handle.flush()
        return offset

    def sync(self) -> None:
        """Wait until the rows are on the disk, so that they survive a power failure."""
        os.fsync(self._handle.fileno())

    def row_at(self, offset: int) -> Row:
        """Return the row at a byte offset that `append` or `scan` gave."""
        self._handle.seek(offset)
        return dict(json.loads(self._handle.readline()))

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, named `.NAME.lock`. Raise a UserError if another process holds it.
    The kernel releases the lock when the process ends, even if it is killed.
    """
    held = filelock.FileLock(path)
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        what = f"{path.with_name(path.stem[1:])} is in use by another run"
        raise UserError(what, "wait for it or choose another output") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.release()
