"""What is on the disk at every moment at which a process can be killed, and processes to kill."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT

_at_file_event: Callable[[], None] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _at_file_event and event.split(".")[0] in ("open", "os", "shutil"):
        _at_file_event()


sys.addaudithook(_audit)


def states_of(folder: Path, act: Callable[[], object], copies: Path) -> list[Path]:
    """Copies of `folder` before each file operation of `act`, and after the last one.

    A kill loses nothing that the kernel has already got, so each copy is what a kill at that moment
    leaves. The copies are below `copies`, each under the folder's own name.
    """
    global _at_file_event
    states: list[Path] = []

    def copy() -> None:
        global _at_file_event
        _at_file_event = None  # the operations of the copy itself do not count
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
    """Relative name -> text of every file in a folder."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put_file(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def put_folder(path: Path, text: str) -> None:
    """A folder with three files, one of them in a subfolder and one named `text`."""
    (path / "inner").mkdir(parents=True)
    for name in ("a", "inner/b", text):
        put_file(path / name, text)


@contextlib.contextmanager
def started(code: str, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` in the repository; it is killed at the end."""
    command = [sys.executable, "-u", "-c", code, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
