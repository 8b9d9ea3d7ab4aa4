"""Generation with batches: the results of single requests at half the price, and nothing is paid
twice, whatever fails or is killed.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import generating
import pytest
from batch_server import BatchServer
from conftest import ROOT
from fake_llm_server import FakeServer
from faults import asked, bare, wait_for
from generating import Generate, Outcome, Papers

from semcse import batch_api, files

generate = generating.generate  # a fixture


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_api, "POLL", 0)


def nothing_left(done: Outcome) -> bool:
    names = {path.name for path in done.output.parent.iterdir()}
    ours = {name.removeprefix(done.output.name) for name in names if done.output.name in name}
    return ours - {".failed.jsonl"} == {"", ".journal.jsonl", ".report.json"}


def paid_once(server: BatchServer, requests: int) -> bool:
    return len(server.paid) == requests and set(server.paid.values()) == {1}


def test_the_output_is_that_of_single_requests_at_half_the_price(
    generate: Generate, papers_file: Papers
) -> None:
    """One journal serves both kinds of runs, and its answers keep their price."""
    source = papers_file([bare(i) for i in range(5)])
    prices = {"price_in": 1000.0, "price_out": 10_000.0}
    with FakeServer() as server, BatchServer() as batches:
        live = generate(source, server.url, output="live.jsonl", **prices)
        done = generate(source, batches.url, batch=True, **prices)
        assert done.output.read_bytes() == live.output.read_bytes()
        keys = [{row["key"] for row in one.rows(".journal.jsonl")} for one in (done, live)]
        assert keys[0] == keys[1]
        assert sorted(map(str, batches.bodies)) == sorted(map(str, server.requests))
        assert (batches.uploads, nothing_left(done)) == ([20], True)
        paid = done.report["cost"]
        assert paid == live.report["cost"] / 2 > 0
        for name in ("prompt_tokens", "completion_tokens"):
            assert done.report[name] == live.report[name]
        more = generate(source, server.url, summaries_per_abstract=5, **prices)
        assert len(server.requests) == 20 + 5
    assert more.report["cost_of_all_runs"] == pytest.approx(paid + more.report["cost"])


def test_queries_and_structured_requests_use_batches_too(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    cut = BatchServer(lambda body, number: "cut" if number == 0 else None)
    with cut as server, FakeServer() as live:
        queries = generate(source, server.url, batch=True, queries=True, output="q.jsonl")
        assert [bool(row["query"]) for row in queries.rows()] == [True] * 3
        sent = len(server.bodies)
        done = generate(source, server.url, batch=True, structured=True)
        assert len(server.bodies) == sent + 3
        single = generate(source, live.url, structured=True, output="live.jsonl")
    assert done.output.read_bytes() == single.output.read_bytes()
    tokens = [row["completion_tokens"] for row in done.rows(".journal.jsonl")]
    assert tokens == [4 * 16 + 1, 0, 0, 0] * 3


def test_rejected_texts_are_requested_again_within_the_attempts(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    flags = {"batch": True, "attempts": 3, "summaries_per_abstract": 3}
    with BatchServer() as server:
        server.misbehave = lambda body, _: "refusal" if asked(body) == ("paper-1", 0) else None
        done = generate(source, server.url, **flags)
        assert server.uploads == [9, 1, 1]
        assert len({body["seed"] for body in server.bodies if asked(body) == ("paper-1", 0)}) == 3
        assert done.report["rejected"] == {"refusal": 3}
        failed = {"id": "paper-1", "have": 2, "want": 3, "reasons": {"refusal": 3}}
        assert done.rows(".failed.jsonl") == [failed]
        assert (done.report["accepted"], done.report["failed"]) == (8, 1)
        server.misbehave = lambda body, number: None
        again = generate(source, server.url, **flags)
    assert again.texts() == [("paper-0", 3), ("paper-1", 3), ("paper-2", 3)]
    assert max(server.paid.values()) == 1
    assert nothing_left(again)


@pytest.mark.parametrize(
    "kind, reason, times",
    [
        ("400", "made-up 400", 1),
        ("500", "HTTP 500", 3),
        ("unanswered", "batch_expired", 3),
        ("404", "HTTP 404", 1),
    ],
)
def test_requests_without_an_answer_end_with_a_reason_or_are_sent_again(
    generate: Generate, papers_file: Papers, kind: str, reason: str, times: int
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    with BatchServer(lambda body, number: kind if asked(body)[0] == "paper-1" else None) as server:
        done = generate(source, server.url, batch=True, retries=2, summaries_per_abstract=2)
    assert done.texts() == [("paper-0", 2), ("paper-2", 2)]
    assert Counter(asked(body)[0] for body in server.bodies)["paper-1"] == 2 * times
    (failed,) = done.rows(".failed.jsonl")
    ((said, number),) = failed["reasons"].items()
    assert (failed["id"], reason in said, number) == ("paper-1", True, 2 * times)


def test_the_missing_answers_of_an_expired_batch_are_requested_again(
    generate: Generate, papers_file: Papers
) -> None:
    """Of ten requests five expire and one has no line at all."""
    with BatchServer() as server:
        kinds = {7: "lost"} | dict.fromkeys(range(5), "unanswered")
        server.misbehave = lambda body, number: kinds.get(number)
        server.end = "expired"
        source = papers_file([bare(i) for i in range(5)])
        done = generate(source, server.url, batch=True, summaries_per_abstract=2)
    assert server.uploads == [10, 6]
    assert done.texts() == [(f"paper-{i}", 2) for i in range(5)]
    assert done.report["faults"] == {"batch_expired": 5, "no answer": 1}
    assert not done.path(".failed.jsonl").exists()


def test_files_stay_within_the_limits_of_the_server(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Papers with equal texts share their requests.
    source = papers_file([*(bare(i) for i in range(8)), bare(3, id="double")])
    with BatchServer() as server:
        monkeypatch.setattr(batch_api, "MAX_REQUESTS", 7)
        done = generate(source, server.url, batch=True)
        assert server.uploads == [7, 7, 7, 7, 4]
        assert paid_once(server, 32)
        assert done.texts() == [*((f"paper-{i}", 4) for i in range(8)), ("double", 4)]
        monkeypatch.setattr(batch_api, "MAX_BYTES", 5_000)
        generate(source, server.url, batch=True, output="again.jsonl")
        batches = list(server.batches.values())[5:]
        sizes = [len(server.files[batch["input_file_id"]]) for batch in batches]
    assert 3_000 < min(sizes[:-1]) <= max(sizes) <= 5_000


@pytest.mark.parametrize("queue", [3, 20, 25])
def test_a_full_queue_gets_as_much_as_it_accepts(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 10)
    with BatchServer() as server:
        server.queue = queue
        done = generate(papers_file([bare(i) for i in range(10)]), server.url, batch=True)
    assert done.texts() == [(f"paper-{i}", 4) for i in range(10)]
    assert paid_once(server, 40)


def test_a_batch_that_the_server_does_not_run_ends_the_run(
    generate: Generate, papers_file: Papers
) -> None:
    with BatchServer() as server:
        server.end = "cancelled"
        done = generate(papers_file([bare(1)]), server.url, batch=True)
        assert (done.code, "the status of a batch is cancelled" in done.error) == (1, True)
        assert len(done.rows(".journal.jsonl")) == 4
        source = papers_file([bare(2)], "more.jsonl")
        server.queue = 0
        done = generate(source, server.url, batch=True)
        assert (done.code, "Enqueued token limit reached" in done.error) == (1, True)
        server.faults["create"] = ["400"]
        done = generate(source, server.url, batch=True)
        assert (done.code, "made-up 400" in done.error) == (1, True)
        server.queue, server.end = 100, "completed"
        done = generate(source, server.url, batch=True)
    assert (done.code, set(server.paid.values()), nothing_left(done)) == (0, {1}, True)


# Kills and faults of the network


@pytest.mark.parametrize(
    "faults",
    [
        {"create": ["drop"]},
        {"create": ["500", "drop", "429"]},
        {"upload": ["drop", "500"]},
        {"retrieve": ["drop", "503"]},
        {"list": ["", "drop", "500"]},
        {"content": ["500", "drop", "cut"]},
    ],
)
def test_faults_of_the_network_cost_nothing(
    generate: Generate,
    papers_file: Papers,
    monkeypatch: pytest.MonkeyPatch,
    faults: dict[str, list[str]],
) -> None:
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 5)
    with BatchServer() as server:
        server.faults = faults
        done = generate(papers_file([bare(i) for i in range(3)]), server.url, batch=True)
    assert done.code == 0, done.said
    assert done.texts() == [(f"paper-{i}", 4) for i in range(3)]
    assert (server.uploads, paid_once(server, 12)) == ([5, 5, 2], True)
    assert not any(faults.values())


SCRIPT = """
import sys, generate_train_summaries
from semcse import batch_api, command_line
batch_api.POLL, batch_api.MAX_REQUESTS = 0.05, 5
sys.exit(command_line.run_command(generate_train_summaries.main))
"""


def start(source: Path, output: Path, url: str) -> subprocess.Popen[str]:
    words = ["--input", str(source), "--output", str(output), "--base-url", url]
    command = [sys.executable, "-c", SCRIPT, *words, "--model", "small", "--batch"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "call, number, created",
    [
        pytest.param("upload", 0, 0, marks=pytest.mark.slow),
        ("create", 0, 1),
        pytest.param("create", 1, 2, marks=pytest.mark.slow),
        pytest.param("retrieve", 5, 3, marks=pytest.mark.slow),
        ("content", 0, 3),
    ],
)
def test_a_kill_at_any_moment_costs_nothing(
    papers_file: Papers, tmp_path: Path, call: str, number: int, created: int
) -> None:
    """The server does what it is asked for, and the run is killed before it gets the response."""
    source, output = papers_file([bare(i) for i in range(3)]), tmp_path / "out" / "out.jsonl"
    with BatchServer() as server:
        server.looks, server.faults[call] = 3, [""] * number + ["hold"]
        first = start(source, output, server.url)
        wait_for(server.held.is_set, first)
        first.kill()
        first.communicate()
        assert (first.returncode, len(server.batches)) == (-9, created)
        second = start(source, output, server.url)
        _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert (server.uploads, paid_once(server, 12)) == ([5, 5, 2], True)
    done = Outcome(0, said, output)
    assert (done.texts(), nothing_left(done)) == ([(f"paper-{i}", 4) for i in range(3)], True)


@pytest.mark.parametrize("structured", [False, True])
def test_a_run_that_ends_while_it_records_answers_continues_there(
    generate: Generate, papers_file: Papers, structured: bool
) -> None:
    """The disk is full after some rows. Accepted and rejected answers are counted once."""
    source, append = papers_file([bare(i) for i in range(2)]), files.Journal.append
    flags: dict[str, Any] = {"batch": True, "price_out": 1e6}
    flags |= {"structured": True} if structured else {}
    kind = "cut" if structured else "refusal"
    with BatchServer(lambda body, number: kind if number == 1 else None) as server:
        for room in (0, 1, 2, 3, 5, 6, 8, 10):
            server.bodies.clear()
            server.paid.clear()
            flags["output"], left = f"{room}.jsonl", room

            def full(journal: files.Journal, row: dict[str, Any]) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return append(journal, row)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files.Journal, "append", full)
                first = generate(source, server.url, **flags)
            assert first.code == (left < 0)
            assert not first.code or first.error.startswith("error: No space left on device")
            done = generate(source, server.url, **flags)
            assert (done.code, done.texts()) == (0, [("paper-0", 4), ("paper-1", 4)])
            assert max(server.paid.values()) == 1
            written = [row["completion_tokens"] for row in done.rows(".journal.jsonl")]
            assert done.report["cost_of_all_runs"] == sum(written) / 2
            assert len([number for number in written if number]) == len(server.paid)


@pytest.mark.slow
def test_ctrl_c_leaves_the_batches_at_the_server(papers_file: Papers, tmp_path: Path) -> None:
    source, output = papers_file([bare(i) for i in range(3)]), tmp_path / "out.jsonl"
    with BatchServer() as server:
        server.looks = 10**9
        process = start(source, output, server.url)
        wait_for(lambda: server.calls["retrieve"] >= 6, process)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - begun < 10
        assert (process.returncode, output.exists()) == (130, False)
        assert "3 batches continue at the server" in said
        server.looks = 1
        assert start(source, output, server.url).wait(60) == 0
    assert (len(server.batches), paid_once(server, 12)) == (3, True)


def test_requests_in_progress_are_sent_by_no_other_command(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(1)])
    with BatchServer() as server, FakeServer() as live:
        server.looks = 10**9
        server.faults["retrieve"] = ["", "400"]
        assert generate(source, server.url, batch=True).code == 1
        refused = generate(source, live.url)
        assert (refused.code, live.requests) == (2, [])
        assert "run with --batch" in refused.error
        for change in ({"temperature": 0.1}, {"model": "other"}):
            other = generate(source, server.url, batch=True, **change)
            assert (other.code, len(server.batches)) == (2, 1)
            assert "4 requests in progress belong to another command" in other.error
        server.looks = 1
        assert generate(source, server.url, batch=True).code == 0
        assert generate(source, live.url).code == 0
    assert (live.requests, paid_once(server, 4)) == ([], True)


# Money, and what cannot work


def test_max_cost_counts_what_is_in_progress(generate: Generate, papers_file: Papers) -> None:
    """An answer of 16 tokens costs 8, and at most 60 (120 tokens) while it is in progress."""
    source = papers_file([bare(i) for i in range(20)])
    with BatchServer() as server:
        done = generate(source, server.url, batch=True, price_out=1e6, max_cost=300)
        assert server.uploads[:2] == [5, 5]
        assert (done.code, "--max-cost" in done.error) == (1, True)
        assert 300 <= done.report["cost"] == 8 * len(server.bodies) < 300 + 60
        more = generate(source, server.url, batch=True, price_out=1e6, max_cost=8 * 1000)
    assert (more.code, paid_once(server, 80)) == (0, True)
    assert more.report["cost_of_all_runs"] == 8 * 80


def test_the_estimate_is_half_of_that_for_single_requests(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    flags = {"estimate": True, "price_in": 1e6, "price_out": 1e6}
    said = [generate(source, "http://127.0.0.1:1/v1", **flags).said]
    said.append(generate(source, "http://127.0.0.1:1/v1", **flags, batch=True).said)
    single, batch = (float(one.rpartition("about ")[2]) for one in said)
    assert batch == single / 2 > 0


@pytest.mark.parametrize("kind", ["404", "401", "gone"])
def test_a_server_without_a_batch_api_is_refused_in_one_line(
    generate: Generate, papers_file: Papers, kind: str
) -> None:
    source = papers_file([bare(1)])
    with BatchServer() as server:
        server.faults["list"] = [kind] * 9
        url = "http://127.0.0.1:1/v1" if kind == "gone" else server.url
        done = generate(source, url, batch=True, retries=1)
    assert (done.code, server.files) == (2, {})
    assert f"--base-url {url} has no Batch API (" in done.error
    assert ("connection" if kind == "gone" else kind) in done.error
    assert not list(done.output.parent.iterdir())
    done = generate(source, url, "http://127.0.0.1:2/v1", batch=True)
    assert (done.code, "--batch works with one --base-url only" in done.error) == (2, True)
