"""The output folder of a training run: locked, resumable, and visibly unfinished until it ends."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from semcse import files
from semcse.errors import UserError

# Settings that may change when a run is resumed, because they do not change its result.
FREE_ON_RESUME = set("resume overwrite output_dir log_every skip_invalid keep_checkpoints".split())


def check_output_folder(output: Path) -> None:
    """Raise a UserError that names --output-dir if `output` is a file or is below a file."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file", "name a folder")


class RunFolder:
    """The output folder of one run, which is unfinished while the file UNFINISHED is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark, self._record = path / "UNFINISHED", path / "settings.json"

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path) -> Iterator[Self]:
        """Open the run folder `path` and hold its lock, so that no other process uses it."""
        path = path.resolve()
        check_output_folder(path)
        with files.lock(path.with_name(f".{path.name}.lock")):
            yield cls(path)

    def begin(
        self, settings: dict[str, Any], facts: dict[str, Any], resume: bool, overwrite: bool = False
    ) -> None:
        """Start a run, continue the unfinished one with `resume`, or replace one with `overwrite`.

        Both `settings` and `facts` are written to settings.json. A resumed run must have the same
        settings, except for those in FREE_ON_RESUME, and the same `facts["inputs"]`; otherwise a
        UserError names the changes.
        """
        if resume:
            if not self._mark.exists():
                raise UserError(f"{self.path}: holds no unfinished run", "leave --resume out")
            self._refuse_changes(files.read_json(self._record), settings, facts)
            # A killed process left these. No other process writes in this folder.
            for leftover in list(self.path.rglob(".*.partial")):
                files.remove(leftover)
            return
        if self.path.is_dir() and any(self.path.iterdir()) and not self._record.exists():
            what = f"--output-dir {self.path}: holds files that are not a run's"
            raise UserError(what, "name another folder")
        if self._record.exists() and not overwrite:
            run, fix = ("an unfinished run", "continue it with --resume, replace it")
            if not self._mark.exists():
                run, fix = ("a finished run", "replace it")
            fix += " with --overwrite, or name another --output-dir"
            raise UserError(f"{self.path}: holds {run}", fix)
        note = "This run is unfinished. Continue it with --resume, or delete this folder.\n"
        with files.atomic_path(self.path) as partial:
            files.write_text(partial / self._mark.name, note)
            files.write_json(partial / self._record.name, {"settings": settings, **facts})

    def _refuse_changes(self, record: Any, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Raise a UserError that names what differs from the `record` of the run's start."""
        changed = []
        for part, now in (("settings", settings), ("inputs", facts.get("inputs", {}))):
            before = (record.get(part) if isinstance(record, dict) else None) or {}
            changed += [
                f"{key} was {before.get(key)!r}, is {value!r}"
                for key, value in now.items()
                if key not in FREE_ON_RESUME and before.get(key) != value
            ]
        if changed:
            what = f"{self.path}: settings or data have changed ({'; '.join(changed)})"
            raise UserError(what, "use the same settings and data, or another --output-dir")

    def finish(self) -> None:
        """Mark the run as finished, and remove its checkpoints."""
        self._mark.unlink()
        files.remove(self.path / "checkpoints")


def versions() -> dict[str, str | None]:
    """Return what a result was made with: the code's commit, Python, the libraries, the machine."""
    libraries = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _commit() -> str | None:
    """Return the git commit of this code, with "+" if files were changed; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
