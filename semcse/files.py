"""How this project treats files and errors: atomic writes, append-and-flush journals, locks,
one-line errors, exit codes.

Everything here is ours and knows nothing of papers or models. Exit codes of every script (DESIGN):
0 done, 2 bad usage or input (UserError, nothing written), 1 a fault at run time (RunError, a full
disk: what was done is kept), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from semcse.errors import UserError


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
