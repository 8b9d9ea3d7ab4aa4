"""Faults done on purpose to generating, embedding and reading, for the tests and for
tools/torture.py; killing.py does those to training.

Each trial takes a writable folder (what trials share is made in it once, so give all trials the
same one, not at once) and a seed, and returns {"fault": str, "recovered": bool, "detail": str}, as
those of killing.py. Recovered means: the faulty run ended as documented (exit code, one error
line), the same command then went on to the end, its output is that of a run left alone, byte by
byte, and no kept answer was asked for again.
"""

from __future__ import annotations

import contextlib
import functools
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

from conftest import ROOT, make_paper, run_script
from fake_llm_server import TEXTS, WIRE, Body, FakeServer
from hostile import (
    BAD_FILES,
    BAD_LINES,
    BAD_PLACES,
    NASTY,
    NEEDED,
    Place,
    jsonl,
    made,
    nasty_papers,
)

from generate_train_summaries import VIEWS
from semcse import errors
from semcse.papers import read_papers

Trial = dict[str, Any]
PAPERS = 30
QUICK = """
import sys, files, language_model, generate_train_summaries
language_model.BACKOFF = (0.001, 0.01)
sys.exit(files.run_command(generate_train_summaries.main))
"""
PERSISTENT = ("--concurrency", "16", "--attempts", "30", "--retries", "30")


def trial(fault: str, wrong: str, detail: str) -> Trial:
    return {
        "fault": fault,
        "recovered": not wrong,
        "detail": f"{detail}; {wrong}" if wrong else detail,
    }


# Generating


def command(source: Path, output: Path, url: str, *flags: str) -> list[str]:
    """The words that start generate_train_summaries.py with hardly a pause between retries."""
    return [
        sys.executable,
        "-c",
        QUICK,
        "--input",
        str(source),
        "--output",
        str(output),
        "--base-url",
        url,
        "--model",
        "small",
        *flags,
    ]


@contextlib.contextmanager
def started(source: Path, output: Path, url: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A process that generates summaries; killed at the end."""
    with subprocess.Popen(
        command(source, output, url, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def whole_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of a journal that may be growing."""
    path = Path(f"{output}.journal.jsonl")
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if path.exists()
        else []
    )


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120
) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def bare(number: int, **changes: Any) -> dict[str, Any]:
    """A paper without generated texts."""
    paper = make_paper(number, **changes)
    return {
        key: value
        for key, value in paper.items()
        if key not in ("summaries", "query") or key in changes
    }


def asked(body: Body) -> tuple[str, int]:
    """(paper, slot) that a request of generate_train_summaries is about."""
    text = body["messages"][1]["content"]
    number = text.partition("\n")[0].rpartition(" ")[2]
    return f"paper-{number}", next(
        slot for slot, task in enumerate(VIEWS.values()) if text.endswith(task)
    )


def misbehaviour(draw: random.Random) -> Callable[[Body, int], str | None]:
    """A quarter of the requests meet a fault: on the wire by chance, in the text by the request
    itself, so that equal requests get equal texts.
    """

    def kind(body: Body, number: int) -> str | None:
        own = random.Random(json.dumps(body, sort_keys=True))
        if own.random() < 0.12:
            return own.choice([*TEXTS, "cut", "preamble"])
        return (
            draw.choice([name for name in WIRE if name != "stall"])
            if draw.random() < 0.12
            else None
        )

    return kind


def accepted(output: Path) -> set[tuple[str, int]]:
    return {(row["id"], row["slot"]) for row in whole_rows(output) if "rejected" not in row}


class Generation:
    """A misbehaving server, and a run of the generator on it that is to be harmed."""

    def __init__(self, folder: Path, name: str, draw: random.Random) -> None:
        world = folder / "generation"
        world.mkdir(exist_ok=True)
        self.draw, self.source, self.output, self.whole = (
            draw,
            world / "papers.jsonl",
            world / f"{name}.jsonl",
            world / "whole.jsonl",
        )
        self.server = FakeServer(0.01, misbehaviour(draw))
        self.source.write_bytes(jsonl(*map(bare, range(PAPERS))))
        if not self.whole.exists():
            with self.server:
                assert self.run(self.whole) == ""
            self.server = FakeServer(0.01, misbehaviour(draw))

    def run(self, output: Path) -> str:
        """Run to the end; what went wrong."""
        with started(self.source, output, self.server.url, *PERSISTENT) as process:
            _, said = process.communicate(timeout=300)
        return "" if process.returncode == 0 else f"exit {process.returncode}: {said[-200:]}"

    def finish(self, kept: set[tuple[str, int]]) -> str:
        """Go on to the end after a fault that left the answers `kept`; what is wrong with the
        result.
        """
        sent = len(self.server.requests)
        return self.run(self.output) or self.difference(kept, sent)

    def difference(self, kept: set[tuple[str, int]], sent: int) -> str:
        """What of the output differs from that of a run left alone; which kept answers were asked
        for after request `sent`.
        """
        again = kept & set(map(asked, self.server.requests[sent:]))
        if again:
            return f"{len(again)} kept answers were asked for again"
        if self.output.read_bytes() != self.whole.read_bytes():
            return "the output differs from that of a run left alone"
        left = [
            path.name
            for path in self.output.parent.glob("*")
            if path.name.endswith((".failed.jsonl", ".partial"))
        ]
        return f"left behind: {left}" if left else ""


def kill_generation(folder: Path, seed: int, number: signal.Signals = signal.SIGKILL) -> Trial:
    """generate_train_summaries.py killed at a random moment, on a server that misbehaves."""
    draw = random.Random(seed)
    moment, work = (
        draw.randrange(4 * PAPERS - 15),
        Generation(folder, f"killed-{seed}-{number}", draw),
    )
    with work.server:
        with started(work.source, work.output, work.server.url, *PERSISTENT) as process:
            wait_for(lambda: len(accepted(work.output)) >= moment, process)
            time.sleep(draw.uniform(0, 0.02))
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        kept, detail = (
            accepted(work.output),
            f"{number.name} after {moment} of {4 * PAPERS} answers",
        )
        expected = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}[number]
        if process.returncode not in expected or (
            process.returncode > 0
            and not said.strip().splitlines()[-1].startswith("error: terminated")
        ):
            return trial("", f"exit {process.returncode}: {said[-200:]}", detail)
        return trial(
            f"{number.name} in generation", work.finish(kept), f"{detail}, {len(kept)} kept"
        )


def corrupt_journal(folder: Path, seed: int) -> Trial:
    """The journal of a finished generation damaged in a random way."""
    from killing import damage

    draw = random.Random(seed)
    work = Generation(folder, f"corrupt-{seed}", draw)
    whole, journal = (Path(f"{output}.journal.jsonl") for output in (work.whole, work.output))
    shutil.copy(whole, journal)
    way = damage(journal, draw)
    good = set(journal.read_bytes().splitlines(keepends=True)) & set(
        whole.read_bytes().splitlines(keepends=True)
    )
    rows = [json.loads(line) for line in good]
    with work.server:
        wrong = work.finish({(row["id"], row["slot"]) for row in rows if "rejected" not in row})
    return trial(
        "corrupt journal",
        wrong,
        f"{way}: {len(good)} rows whole, {len(work.server.requests)} requests",
    )


def disk_full_generation(folder: Path, seed: int) -> Trial:
    """A disk that fills up while answers come, and is then given more room. Where nothing can be
    mounted, a limit on the size of files stands for it.
    """
    from killing import can_mount

    draw = random.Random(seed)
    work, size = Generation(folder, f"full-{seed}", draw), draw.randrange(8_000, 32_000)
    disk, journal = work.output.with_suffix(""), Path(f"{work.output}.journal.jsonl")
    disk.mkdir()
    with work.server:
        words = shlex.join(command(work.source, disk / "out.jsonl", work.server.url, *PERSISTENT))
        small, more = (
            f"mount -t tmpfs -o size={size} none {disk} || exit 99",
            f"mount -o remount,size=64m none {disk}",
        )
        if not can_mount():  # in blocks of 1,024 bytes
            small, more = (
                f"limit() {{ ulimit -S -f {size // 1024}; }}; limit",
                "ulimit -S -f unlimited",
            )
        copy = f"cp {disk}/out.jsonl.journal.jsonl {journal}; echo SENT"
        script = (
            f"{small}\n{words}; code=$?\n{more}\n{copy}; sleep 0.1\n{words} || exit 98\ncp"
            f" {disk}/out.jsonl {work.output}; exit $code"
        )
        before = ["unshare", "-rm"] if can_mount() else []
        with subprocess.Popen(
            [*before, "bash", "-c", script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            sent, kept = len(work.server.requests), accepted(work.output)
            _, said = process.communicate(timeout=300)
    errors = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if (
        process.returncode != 1
        or len(errors) != 1
        or not re.search("No space left on device|File too large", errors[0])
    ):
        return trial(
            "disk full in generation",
            f"exit {process.returncode}: {said[-300:]}",
            f"disk of {size} bytes",
        )
    return trial(
        "disk full in generation",
        work.difference(kept, sent),
        f"disk of {size} bytes, {len(kept)} answers kept",
    )


# Embedding


def kill_embedding(folder: Path, seed: int) -> Trial:
    """embed_papers.py killed at a random moment."""
    from killing import world_of

    world, draw = world_of(folder), random.Random(seed)
    source, whole, output = world / "embed.jsonl", world / "whole.npy", world / f"killed-{seed}.npy"
    source.write_bytes(jsonl(*map(make_paper, range(400))))
    words = [
        sys.executable,
        "embed_papers.py",
        "--model",
        world / "bert",
        "--input",
        source,
        "--chunk",
        "4",
        "--device",
        "cpu",
        "--output",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = functools.partial(
        subprocess.Popen, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    if not whole.exists():
        done = start([*words, whole])
        done.communicate(timeout=300)
        assert done.returncode == 0
    moment, process = draw.randrange(100), start([*words, output])
    wait_for(lambda: len(list(world.glob(f"*{output.stem}*/*.npz"))) >= moment, process)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.communicate()
    detail, again = f"SIGKILL after {moment} of 100 chunks", start([*words, output])
    _, said = again.communicate(timeout=300)
    if process.returncode != -9 or again.returncode:
        return trial(
            "kill -9 in embedding",
            f"exit {process.returncode}, then {again.returncode}: {said[-200:]}",
            detail,
        )
    equal = all(
        Path(f"{output}{end}").read_bytes() == Path(f"{whole}{end}").read_bytes()
        for end in ("", ".ids.jsonl")
    )
    left = [
        path.name
        for path in world.glob(f"*{output.stem}*")
        if path.name.startswith(".") or path.is_dir()
    ]
    return trial(
        "kill -9 in embedding",
        "" if equal and not left else f"other vectors or ids, or left behind: {left}",
        detail,
    )


# Reading


def _written(content: bytes) -> Place:
    return lambda folder: made(folder, lambda path: path.write_bytes(content))


def _line(line: bytes) -> Place:
    return _written(jsonl(make_paper(1)) + b"\n" + line + b"\n" + jsonl(make_paper(2)))


BAD: list[tuple[str, Place, str]] = [
    *((f"line: {name}", _line(line), what) for name, line, what, _ in BAD_LINES),
    *(
        (
            f"file: {name}",
            lambda folder, c=c: _written(c if isinstance(c, bytes) else c())(folder),
            what,
        )
        for name, c, what, _ in BAD_FILES
    ),
    *((f"place: {name}", place, what) for name, place, what, _ in BAD_PLACES),
]


def bad_input(folder: Path, number: int) -> Trial:
    """One kind of bad input, given to the reader and to a script: one line that says what it is,
    exit code 2, and nothing is written.
    """
    name, place, what = BAD[number]
    inside = folder / f"bad-{number}"
    inside.mkdir()
    wrong = ""
    with place(inside) as path:
        try:
            papers = list(read_papers(path, NEEDED))
            wrong = f"{len(papers)} papers were read"
        except errors.UserError as error:
            wrong = "" if what in str(error) else f"the reader said: {error}"
        # As another user the script could not start; without a title or summaries the generators
        # do.
        if (
            not wrong
            and os.geteuid() == os.getuid()
            and not re.match('key "(title|summaries)" is (missing|blank)', what)
        ):
            words = (
                "--input",
                path,
                "--output",
                folder / "out" / "x.jsonl",
                "--base-url",
                "http://127.0.0.1:9/v1",
                "--model",
                "m",
                "--estimate",
            )
            done = run_script("generate_train_summaries.py", *words)
            wrong = complaint(done, what) or (
                "something was written" if list((folder / "out").glob("*")) else ""
            )
    return trial(name, wrong, what.strip(": "))


def complaint(done: subprocess.CompletedProcess[str], what: str) -> str:
    """What is wrong with how a script refused its input."""
    line = done.stderr.removesuffix("\n")
    known = what in line or "is a pipe or device" in line
    return (
        ""
        if done.returncode == 2 and line.startswith("error: ") and line.isprintable() and known
        else f"exit {done.returncode}: {done.stderr[-300:]!r}"
    )


def nasty_paper(folder: Path, number: int) -> Trial:
    """One of the strange but right papers: summaries are generated for it, and it is written as it
    was.
    """
    source, output = folder / "nasty.jsonl", folder / "nasty-out.jsonl"
    if not output.exists():
        source.write_bytes(jsonl(*nasty_papers()))
        with FakeServer() as server, started(source, output, server.url) as process:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    paper, row = nasty_papers()[number], json.loads(output.read_bytes().split(b"\n")[number])
    same = {key: value for key, value in paper.items() if key != "summaries"} == {
        key: value for key, value in row.items() if key != "summaries"
    }
    return trial(
        list(NASTY)[number],
        "" if same and len(row["summaries"]) == 4 else f"was written as {row}",
        "",
    )
