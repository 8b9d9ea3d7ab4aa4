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
FREE_ON_RESUME = {"resume", "output_dir", "log_every", "skip_invalid", "keep_checkpoints"}


def check_output_folder(output: Path) -> None:
    """Raise a UserError that names --output-dir if `output` is a file or is below a file."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file", "name a folder")


class RunFolder:
    """The output folder of one run, which works in `path`, and is unfinished while the file
    UNFINISHED is there. If `output` already holds a finished run, the new run works in a hidden
    folder next to it, which replaces `output` when the new run finishes.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        files.restore_folder(output)
        if output.is_dir() and any(output.iterdir()) and not (output / "settings.json").exists():
            what = f"--output-dir {output}: holds files that are not a run's"
            raise UserError(what, "name another folder")
        successor = output.with_name(f".{output.name}.next")
        if _is_finished(successor):  # killed inside `finish`, before it moved the folder
            files.replace_folder(successor, output)
        self.path = successor if _is_finished(output) else output
        if _is_finished(output):  # killed inside `finish`, before it removed the checkpoints
            files.remove(output / "checkpoints")

    @classmethod
    @contextlib.contextmanager
    def locked(cls, output: Path) -> Iterator[Self]:
        """Open the run folder `output` and hold its lock, so that no other process uses it."""
        output = output.resolve()
        check_output_folder(output)
        with files.lock(output.with_name(f".{output.name}.lock")):
            yield cls(output)

    def begin(self, settings: dict[str, Any], facts: dict[str, Any], resume: bool) -> None:
        """Start a run, or continue the unfinished one if `resume` is true.

        Both `settings` and `facts` are written to settings.json. A resumed run must have the same
        settings, except for those in FREE_ON_RESUME, and the same `facts["inputs"]`; otherwise a
        UserError names the changes.
        """
        mark, record = self.path / "UNFINISHED", self.path / "settings.json"
        if resume:
            if not mark.exists():
                raise UserError(f"{self.output}: holds no unfinished run", "leave --resume out")
            self._refuse_changes(files.read_json(record), settings, facts)
            # A killed process left these; nobody else writes in this folder.
            for leftover in list(self.path.rglob(".*.partial")):
                files.remove(leftover)
        elif mark.exists():
            fix = "continue it with --resume, or delete that folder, or name another --output-dir"
            raise UserError(f"{self.path}: holds an unfinished run", fix)
        else:
            note = "This run is unfinished. Continue it with --resume, or delete this folder.\n"
            with files.atomic_path(self.path) as partial:
                files.write_text(partial / mark.name, note)
                files.write_json(partial / record.name, {"settings": settings, **facts})

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
            what = f"{self.output}: settings or data have changed ({'; '.join(changed)})"
            raise UserError(what, "use the same settings and data, or another --output-dir")

    def finish(self) -> None:
        """Mark the run as finished, move it to `output`, and remove its checkpoints."""
        (self.path / "UNFINISHED").unlink()
        if self.path != self.output:
            files.replace_folder(self.path, self.output)
        files.remove(self.output / "checkpoints")


def _is_finished(run: Path) -> bool:
    return (run / "settings.json").exists() and not (run / "UNFINISHED").exists()


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
    """The git commit of this code, with "+" after it if files were changed; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
