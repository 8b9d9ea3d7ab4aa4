"""Throughput of the language-model client against a bare AsyncOpenAI gather with the same cap, both
on a local server that answers after 200 ms.

python bench/llm_client.py     prints one row of figures: under a minute

Ours does the whole of a run's middle part: keys, prompts, judging, journal, progress bar. The peer
only sends the same bodies and reads the texts.
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
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from generate_train_summaries import SYSTEM, VIEWS
from semcse.command_line import StopSignal
from semcse.generation import Answers, Run
from semcse.llm import Flags
from semcse.quality_gate import Job, Prompt

CONCURRENCY, LATENCY = 256, 0.2
OURS, THEIRS = 40 * CONCURRENCY, 6 * CONCURRENCY  # requests; the peer is slower and needs fewer


@contextlib.contextmanager
def fake_server() -> Any:
    """The base URL of a local server in a process of its own."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "fake_llm_server.py"),
        "--latency",
        str(LATENCY),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def make_run(folder: Path, url: str, requests: int) -> Run:
    """A run of four summaries each for made-up papers of 200 words."""
    papers = (
        {
            "id": str(i),
            "title": f"Title number {i}",
            "abstract": " ".join(f"word{i + j}" for j in range(200)),
        }
        for i in range(requests // 4)
    )
    (folder / "papers.jsonl").write_text(
        "".join(json.dumps(paper) + "\n" for paper in papers), encoding="utf-8"
    )
    flags = Flags(
        folder / "papers.jsonl", folder / "out.jsonl", (url,), "m", concurrency=CONCURRENCY
    )
    prompts = tuple(Prompt(name, SYSTEM, task) for name, task in VIEWS.items())
    return Run(flags, Job("summaries", prompts, 4, 2, (6, 80)), Answers(folder / "journal.jsonl"))


def timed(
    work: Callable[[], Coroutine[Any, Any, None]], requests: int
) -> tuple[float, float, float]:
    """(seconds, processor seconds, MiB of additional peak memory) per 1,000 requests."""
    seconds, processor, memory = (
        time.perf_counter(),
        time.process_time(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    asyncio.run(work())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return tuple(
        value * 1000 / requests
        for value in (time.perf_counter() - seconds, time.process_time() - processor, grown)
    )  # type: ignore[return-value]


async def bare_gather(url: str, bodies: list[dict[str, Any]]) -> None:
    """The peer: one task for each request, a semaphore as the cap."""
    client, cap = (
        openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0),
        asyncio.Semaphore(CONCURRENCY),
    )

    async def ask(body: dict[str, Any]) -> str:
        async with cap:
            answer = await client.chat.completions.create(**body)
            return str(answer.choices[0].message.content)

    texts = await asyncio.gather(*map(ask, bodies))
    assert len(texts) == len(bodies)
    await client.close()


def measure() -> dict[str, Any]:
    """One row of the benchmark's results; `ratio` above 1 means that ours is faster."""
    with fake_server() as url, tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), url, OURS)
        run.survey()
        with contextlib.closing(run.answers), StopSignal() as stop:
            ours = timed(lambda: run.send(stop), OURS)
        assert run.count["accepted"] == OURS
        bodies = [
            run.body(paper, [0, 1, 2, 3], [slot]) for paper in run.papers() for slot in range(4)
        ][:THEIRS]
        theirs = timed(lambda: bare_gather(url, bodies), THEIRS)
    return {
        "operation": "llm_client_vs_async_openai",
        "peer": "asyncio.gather over AsyncOpenAI().chat.completions.create",
        "peer_version": openai.__version__,
        "ours_s": ours[0],
        "theirs_s": theirs[0],
        "ratio": theirs[0] / ours[0],
        "goal": 1.0,
        "share_of_gemm_peak": None,
        "agreement": f"{OURS} of {OURS} answers accepted and journalled",
        "unit": "seconds per 1,000 requests",
        "share_of_ideal": LATENCY / CONCURRENCY * 1000 / ours[0],
        "share_of_ideal_goal": 0.95,
        "ours_cpu_s": ours[1],
        "theirs_cpu_s": theirs[1],
        "ours_mib": ours[2],
        "theirs_mib": theirs[2],
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.write(json.dumps(measure(), indent=2) + "\n")
