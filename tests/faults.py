"""Harms generation and embedding on purpose and runs them again; test_faults.py runs these trials.

Each trial harms a run at a moment or place drawn from its `seed`, gives the same command again, and
asserts that the harmed run ended as documented (exit code, one error line), that the output is that
of an undisturbed run, byte by byte, and that no kept answer was asked for again. All trials of one
process share the writable `folder`. BAD lists every kind of bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT, make_paper
from fake_llm_server import TEXTS, WIRE, Body, FakeServer
from hostile import BAD_FILES, BAD_LINES, BAD_PLACES, Place, jsonl, made
from killing import damage, on_full_disk, world_of

from generate_train_summaries import VIEWS

PAPERS = 30
# Hardly any pause between retries.
QUICK = """
import sys, openai, generate_train_summaries
from semcse import command_line
openai._base_client.INITIAL_RETRY_DELAY = 0.001
sys.exit(command_line.run_command(generate_train_summaries.main))
"""
PERSISTENT = ("--concurrency", "16", "--attempts", "30", "--retries", "30")


def command(source: Path, output: Path, url: str, *flags: str) -> list[str]:
    """The command that generates summaries."""
    files = ["--input", str(source), "--output", str(output)]
    return [sys.executable, "-c", QUICK, *files, "--base-url", url, "--model", "small", *flags]


@contextlib.contextmanager
def started(source: Path, output: Path, url: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A process that generates summaries; it is killed at the end."""
    with subprocess.Popen(
        command(source, output, url, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120
) -> None:
    """Wait until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def whole_rows(output: Path) -> list[dict[str, Any]]:
    """The whole rows of a journal that may be growing."""
    path = Path(f"{output}.journal.jsonl")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def accepted(output: Path) -> set[tuple[str, int]]:
    """(paper, slot) of every accepted answer in the journal of `output`."""
    return {(row["id"], row["slot"]) for row in whole_rows(output) if "rejected" not in row}


def asked(body: Body) -> tuple[str, int]:
    """(paper, slot) of a request of generate_train_summaries."""
    text = body["messages"][1]["content"]
    number = text.partition("\n")[0].rpartition(" ")[2]
    slots = [slot for slot, task in enumerate(VIEWS.values()) if text.endswith(task)]
    return f"paper-{number}", slots[0]


def bare(number: int, **changes: Any) -> dict[str, Any]:
    """A paper without generated texts."""
    paper = {k: v for k, v in make_paper(number).items() if k not in ("summaries", "query")}
    return paper | changes


def misbehaviour(draw: random.Random) -> Callable[[Body, int], str | None]:
    """Faults in a quarter of the requests: on the wire at random, and in the text as a function of
    the request, so that equal requests get equal texts.
    """

    def kind(body: Body, number: int) -> str | None:
        by_request = random.Random(json.dumps(body, sort_keys=True))
        if by_request.random() < 0.12:
            return by_request.choice([*TEXTS, "cut", "preamble"])
        on_the_wire = draw.choice([name for name in WIRE if name != "stall"])
        return on_the_wire if draw.random() < 0.12 else None

    return kind


class Generation:
    """Papers, and the output that an undisturbed run makes of them on a server that misbehaves."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        world = folder / "generation"
        world.mkdir(exist_ok=True)
        self.draw = random.Random(seed)
        self.source, self.whole = world / "papers.jsonl", world / "whole.jsonl"
        self.output = world / f"{name}-{seed}.jsonl"
        if not self.whole.exists():
            self.source.write_bytes(jsonl(*map(bare, range(PAPERS))))
            self.run_to_end(self.whole)

    def server(self) -> FakeServer:
        return FakeServer(0.01, misbehaviour(self.draw))

    def run_to_end(self, output: Path) -> list[Body]:
        """Run to the end on a new server; returns the requests that it got."""
        with (
            self.server() as server,
            started(self.source, output, server.url, *PERSISTENT) as process,
        ):
            _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-500:]
        return server.requests

    def check(self, kept: set[tuple[str, int]], requests: list[Body]) -> None:
        """Compare the output, and see that no `kept` answer is among the later `requests`."""
        assert not kept & set(map(asked, requests))
        assert self.output.read_bytes() == self.whole.read_bytes()
        names = [path.name for path in self.output.parent.iterdir()]
        assert not [name for name in names if name.endswith((".failed.jsonl", ".partial"))]


def kill_generation(folder: Path, seed: int, name: str) -> None:
    """Send generate_train_summaries.py the signal `name` at a random moment."""
    work = Generation(folder, name, seed)
    moment = work.draw.randrange(4 * PAPERS - 15)
    with (
        work.server() as server,
        started(work.source, work.output, server.url, *PERSISTENT) as process,
    ):
        wait_for(lambda: len(accepted(work.output)) >= moment, process)
        time.sleep(work.draw.uniform(0, 0.02))
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=60)
    assert process.returncode in {"SIGKILL": (-9,), "SIGTERM": (143, -15)}[name], said[-500:]
    if process.returncode == 143:
        assert said.strip().splitlines()[-1].startswith("error: terminated")
    kept = accepted(work.output)
    work.check(kept, work.run_to_end(work.output))


def corrupt_journal(folder: Path, seed: int) -> None:
    """Damage the journal of a finished generation."""
    work = Generation(folder, "corrupt", seed)
    whole, journal = (Path(f"{path}.journal.jsonl") for path in (work.whole, work.output))
    shutil.copy(whole, journal)
    damage(journal, work.draw)
    lines = [set(path.read_bytes().splitlines(keepends=True)) for path in (whole, journal)]
    rows = map(json.loads, lines[0] & lines[1])
    kept = {(row["id"], row["slot"]) for row in rows if "rejected" not in row}
    work.check(kept, work.run_to_end(work.output))


def full_disk_generation(folder: Path, seed: int) -> None:
    """Generate on a disk that fills up while answers come, and go on when it has more room."""
    work = Generation(folder, "full", seed)
    disk = work.output.with_suffix("")
    size = work.draw.randrange(8_000, 32_000)
    with work.server() as server, work.server() as later:
        first, second = (
            command(work.source, disk / "out.jsonl", one.url, *PERSISTENT)
            for one in (server, later)
        )
        script = on_full_disk(disk, size, first, shlex.join(second))
        done = subprocess.run(
            script, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )
    assert done.returncode == 1, (done.stdout + done.stderr)[-500:]
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1
    assert re.search("No space left on device|File too large", errors[0])
    shutil.copy(f"{disk}.after/out.jsonl", work.output)
    work.check(accepted(Path(f"{disk}.before/out.jsonl")), later.requests)


def kill_embedding(folder: Path, seed: int) -> None:
    """Kill embed_papers.py at a random moment."""
    world, draw = world_of(folder), random.Random(seed)
    source, whole, output = world / "embed.jsonl", world / "whole.npy", world / f"killed-{seed}.npy"
    source.write_bytes(jsonl(*map(make_paper, range(400))))
    words = [sys.executable, "embed_papers.py", "--model", str(world / "bert")]
    words += ["--input", str(source), "--chunk", "4", "--device", "cpu", "--output"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*words, str(path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    def run_to_end(path: Path) -> None:
        process = run(path)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-500:]

    if not whole.exists():
        run_to_end(whole)
    moment, process = draw.randrange(100), run(output)
    wait_for(lambda: len(list(world.glob(f"*{output.stem}*/*.npz"))) >= moment, process)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.communicate()
    assert process.returncode == -9
    run_to_end(output)
    for end in ("", ".ids.jsonl"):
        assert Path(f"{output}{end}").read_bytes() == Path(f"{whole}{end}").read_bytes()
    left = [path for path in world.glob(f"*{output.stem}*") if path.is_dir()]
    assert not left


def _written(content: bytes | Callable[[], bytes]) -> Place:
    """A place with a papers file of this content, which a function may make when it is needed."""

    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content())

    return lambda folder: made(folder, write)


def _with_line(line: bytes) -> Place:
    return _written(jsonl(make_paper(1)) + b"\n" + line + b"\n" + jsonl(make_paper(2)))


# (name, what makes it in an empty folder, what the error line says)
BAD: list[tuple[str, Place, str]] = [
    *((f"line: {name}", _with_line(line), what) for name, line, what, _ in BAD_LINES),
    *((f"file: {name}", _written(content), what) for name, content, what, _ in BAD_FILES),
    *((f"place: {name}", place, what) for name, place, what, _ in BAD_PLACES),
]
