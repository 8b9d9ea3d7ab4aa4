"""Runs the two generation scripts inside the process of the tests, as their command lines would."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import generate_search_queries
import generate_train_summaries
from semcse import command_line


class Outcome:
    """What a run left: its exit code, what it printed, and its files."""

    def __init__(self, code: int, said: str, output: Path) -> None:
        self.code, self.said, self.output = code, said, output
        self.error = said.strip().splitlines()[-1] if code else ""

    def path(self, suffix: str) -> Path:
        return Path(f"{self.output}{suffix}")

    def rows(self, suffix: str = "") -> list[dict[str, Any]]:
        content = self.path(suffix).read_bytes()
        content = gzip.decompress(content) if self.path(suffix).suffix == ".gz" else content
        return [json.loads(line) for line in content.splitlines()]

    def texts(self) -> list[tuple[str, int]]:
        """(paper, number of summaries) for each line of the output."""
        return [(row["id"], len(row["summaries"])) for row in self.rows()]

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.path(".report.json").read_text(encoding="utf-8")))


Generate = Callable[..., Outcome]
Papers = Callable[..., Path]


@pytest.fixture
def generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Generate]:
    """A function (input, *base URLs, **flags) that runs generate_train_summaries or, with
    `queries=True`, generate_search_queries. The pauses between retries are short.
    """
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    before, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)

    def run(
        source: Path, *urls: str, queries: bool = False, output: str = "out.jsonl", **flags: Any
    ) -> Outcome:
        path = tmp_path / "made" / output
        words = ["generate", "--input", str(source), "--output", str(path), "--model", "small"]
        words += [word for url in urls for word in ("--base-url", url)]
        for name, value in flags.items():
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
        monkeypatch.setattr(sys, "argv", words)
        script = generate_search_queries if queries else generate_train_summaries
        code = command_line.run_command(script.main)
        return Outcome(code, capsys.readouterr().err, path)

    yield run
    signal.signal(signal.SIGTERM, before)
    logging.root.handlers[:] = handlers
