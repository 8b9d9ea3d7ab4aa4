"""TODO: say what this file is for: semcse.run_folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semcse.errors import UserError
from semcse.files import (
    _remove,
    atomic_path,
    lock,
    read_json,
    replace_folder,
    restore_folder,
    write_json,
    write_text,
)

# Settings that may differ between a run and its continuation: they do not change what is computed.
FREE_ON_RESUME = frozenset(
    {"resume", "output_dir", "log_every", "skip_invalid", "keep_checkpoints"}
)


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

    def begin(self, settings: dict[str, Any], facts: dict[str, Any], resume: bool) -> None:
        """Start a run, or with `resume` check that the unfinished one has the same settings (those
        in FREE_ON_RESUME may differ) and facts["inputs"].

        Raises:
            UserError: an unfinished run without `resume`, `resume` without an unfinished run, or
                changed settings or inputs (named).
        """
        mark, record = self.path / "UNFINISHED", self.path / "settings.json"
        if resume:
            if not mark.exists():
                raise UserError(f"{self.output}: holds no unfinished run", "leave --resume out")
            self._refuse_changes(read_json(record), settings, facts)
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

    def _refuse_changes(self, before: Any, settings: dict[str, Any], facts: dict[str, Any]) -> None:
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
                if key not in FREE_ON_RESUME and was.get(key) != value
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
