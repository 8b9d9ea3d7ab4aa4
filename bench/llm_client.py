"""Throughput of the language-model client next to a plain asyncio.gather over AsyncOpenAI with the
same concurrency, both on a local server that answers after one second.

python bench/llm_client.py     prints one row of figures, after about a minute

Ours does everything that a run does between survey and output: keys, prompts, quality gate,
journal, progress bar. The peer only sends the same bodies and reads the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from generate_train_summaries import SYSTEM, VIEWS
from semcse.command_line import StopSignal
from semcse.generation import AnswerJournal, GenerationFlags, GenerationRun, GenerationTask

CONCURRENCY, LATENCY = 256, 1.0
REQUESTS = 24 * CONCURRENCY


@contextlib.contextmanager
def fake_server() -> Iterator[str]:
    """Start a local server in another process, and yield its base URL."""
    script = ROOT / "tests" / "fake_llm_server.py"
    command = [sys.executable, str(script), "--latency", str(LATENCY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def make_run(folder: Path, url: str) -> GenerationRun:
    """Return a run that requests four summaries each of made-up papers of 200 words."""
    source = folder / "papers.jsonl"
    with source.open("w", encoding="utf-8") as lines:
        for i in range(REQUESTS // 4):
            abstract = " ".join(f"word{i + j}" for j in range(200))
            row = {"id": str(i), "title": f"Title number {i}", "abstract": abstract}
            lines.write(json.dumps(row) + "\n")
    flags = GenerationFlags(source, folder / "out.jsonl", (url,), "m", concurrency=CONCURRENCY)
    task = GenerationTask("summaries", SYSTEM, VIEWS, texts=4, min_texts=2, words=(6, 80))
    return GenerationRun(flags, task, AnswerJournal(folder / "journal.jsonl"))


class Cost(NamedTuple):
    """The resources that 1,000 requests need."""

    seconds: float
    processor_seconds: float
    mib: float  # of additional peak memory


def measure_cost(work: Callable[[], Coroutine[Any, Any, None]]) -> Cost:
    """Run a coroutine that sends REQUESTS requests, and return its cost."""

    def state() -> tuple[float, float, float]:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return time.perf_counter(), time.process_time(), memory

    before = state()
    asyncio.run(work())
    pairs = zip(before, state(), strict=True)
    return Cost(*((after - earlier) * 1000 / REQUESTS for earlier, after in pairs))


async def plain_gather(url: str, bodies: list[dict[str, Any]]) -> None:
    """Send all requests as the peer: one task for each, and a semaphore limits the concurrency."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    semaphore = asyncio.Semaphore(CONCURRENCY)

    async def ask(body: dict[str, Any]) -> str:
        async with semaphore:
            answer = await client.chat.completions.create(**body)
            return str(answer.choices[0].message.content)

    texts = await asyncio.gather(*map(ask, bodies))
    assert len(texts) == len(bodies)
    await client.close()


def measure() -> dict[str, Any]:
    """Return one row of the benchmark's results; a `ratio` above 1 means that ours is faster."""
    with fake_server() as url, tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), url)
        run.survey()
        run.connect()
        with contextlib.closing(run.answers), StopSignal() as stop:
            ours = measure_cost(lambda: run.send(stop))
            assert run.count["accepted"] == REQUESTS
            bodies = [
                run.body(paper, [0, 1, 2, 3], [i]) for paper, _ in run.papers() for i in range(4)
            ]
        theirs = measure_cost(lambda: plain_gather(url, bodies))
    return {
        "operation": "llm_client_vs_async_openai",
        "peer": "asyncio.gather over AsyncOpenAI().chat.completions.create",
        "peer_version": openai.__version__,
        "ours_s": ours.seconds,
        "theirs_s": theirs.seconds,
        "ratio": theirs.seconds / ours.seconds,
        "goal": 1.0,
        "share_of_gemm_peak": None,
        "agreement": f"{REQUESTS} of {REQUESTS} answers accepted and journalled",
        "unit": "seconds per 1,000 requests",
        "share_of_ideal": LATENCY / CONCURRENCY * 1000 / ours.seconds,
        "share_of_ideal_goal": 0.95,
        "ours_cpu_s": ours.processor_seconds,
        "theirs_cpu_s": theirs.processor_seconds,
        "ours_mib": ours.mib,
        "theirs_mib": theirs.mib,
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.write(json.dumps(measure(), indent=2) + "\n")
