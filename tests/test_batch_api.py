"""batch_api.py against a stand-in for the server: the results of live runs at half the price,
whatever fails or is killed, and nothing paid for twice.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_language_model
from batch_server import BatchServer
from conftest import ROOT
from fake_llm_server import FakeServer
from faults import asked, bare, wait_for
from test_language_model import Outcome

from semcse import batch_api, files

generate = test_language_model.generate  # a fixture
Generate = Callable[..., Outcome]
Papers = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_api, "POLL", 0)
    monkeypatch.setattr(batch_api, "AT_ONCE", 3)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def texts(done: Outcome) -> list[tuple[str, int]]:
    return [(row["id"], len(row["summaries"])) for row in done.rows()]


def nothing_left(done: Outcome) -> bool:
    left = {
        path.name.replace(done.output.name, "")
        for path in done.output.parent.iterdir()
        if done.output.name in path.name
    }
    return left - {".failed.jsonl"} == {"", ".journal.jsonl", ".report.json"}


def test_the_output_is_that_of_a_live_run_at_half_the_price(
    generate: Generate, papers_file: Papers
) -> None:
    """Answers come back in another order; one journal serves both roads, and what it holds costs
    what it cost.
    """
    source, prices = (
        papers_file([bare(i) for i in range(5)]),
        {"price_in": 1000.0, "price_out": 10_000.0},
    )
    with FakeServer() as server, BatchServer() as batches:
        live = generate(source, server.url, output="live.jsonl", **prices)
        done = generate(source, batches.url, batch=True, **prices)
        assert (done.code, done.output.read_bytes()) == (0, live.output.read_bytes())
        assert {row["key"] for row in done.rows(".journal.jsonl")} == {
            row["key"] for row in live.rows(".journal.jsonl")
        }
        assert sorted(map(str, batches.bodies)) == sorted(map(str, server.requests))
        assert nothing_left(done)
        paid = done.report["cost"]
        assert paid == live.report["cost"] / 2 > 0
        assert (done.report["prompt_tokens"], done.report["completion_tokens"]) == (
            live.report["prompt_tokens"],
            live.report["completion_tokens"],
        )
        more = generate(source, server.url, summaries_per_abstract=5, **prices)
        assert len(server.requests) == 20 + 5
    assert more.report["cost_of_all_runs"] == pytest.approx(paid + more.report["cost"])
    assert [len(upload) for upload in batches.uploads] == [20]


def test_queries_and_structured_requests_go_through_batches_too(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    with (
        BatchServer(lambda body, number: "cut" if number == 0 else None) as server,
        FakeServer() as live,
    ):
        queries = generate(
            source, server.url, batch=True, queries=True, output="q.jsonl", attempts=2
        )
        assert [bool(row["query"]) for row in queries.rows()] == [True] * 3
        sent = len(server.bodies)
        done = generate(source, server.url, batch=True, structured=True)
        assert len(server.bodies) == sent + 3
        assert (
            generate(source, live.url, structured=True, output="live.jsonl").output.read_bytes()
            == done.output.read_bytes()
        )
    assert [row["completion_tokens"] for row in done.rows(".journal.jsonl")] == [
        4 * 16 + 1,
        0,
        0,
        0,
    ] * 3


def test_what_the_gate_refuses_is_asked_again_within_the_attempts(
    generate: Generate, papers_file: Papers
) -> None:
    with BatchServer(
        lambda body, number: "refusal" if asked(body) == ("paper-1", 0) else None
    ) as server:
        done = generate(
            papers_file([bare(i) for i in range(3)]),
            server.url,
            batch=True,
            attempts=3,
            summaries_per_abstract=3,
        )
        assert [len(upload) for upload in server.uploads] == [9, 1, 1]
        assert len({body["seed"] for body in server.bodies if asked(body) == ("paper-1", 0)}) == 3
        assert done.report["rejected"] == {"refusal": 3}
        assert done.rows(".failed.jsonl") == [
            {"id": "paper-1", "have": 2, "want": 3, "reasons": {"refusal": 3}}
        ]
        assert (done.report["accepted"], done.report["failed"]) == (8, 1)
        server.misbehave = lambda body, number: None
        again = generate(
            papers_file([bare(i) for i in range(3)]),
            server.url,
            batch=True,
            attempts=3,
            summaries_per_abstract=3,
        )
    assert texts(again) == [("paper-0", 3), ("paper-1", 3), ("paper-2", 3)]
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
def test_requests_of_the_error_file_end_with_a_reason_or_are_asked_again(
    generate: Generate, papers_file: Papers, kind: str, reason: str, times: int
) -> None:
    with BatchServer(lambda body, number: kind if asked(body)[0] == "paper-1" else None) as server:
        done = generate(
            papers_file([bare(i) for i in range(3)]),
            server.url,
            batch=True,
            retries=2,
            summaries_per_abstract=2,
        )
    assert done.code == 0
    assert Counter(asked(body)[0] for body in server.bodies) == {
        "paper-0": 2,
        "paper-1": 2 * times,
        "paper-2": 2,
    }
    (failed,) = done.rows(".failed.jsonl")
    assert (failed["id"], failed["have"]) == ("paper-1", 0)
    ((said, number),) = failed["reasons"].items()
    assert (reason in said, number) == (True, 2 * times)


def test_an_expired_batch_gives_what_it_has_and_the_rest_is_asked_again(
    generate: Generate, papers_file: Papers
) -> None:
    """Of ten requests half expire and one has no line at all."""
    with BatchServer(
        lambda body, number: "lost" if number == 7 else "unanswered" if number < 5 else None
    ) as server:
        server.end = "expired"
        done = generate(
            papers_file([bare(i) for i in range(5)]),
            server.url,
            batch=True,
            summaries_per_abstract=2,
        )
    assert [len(upload) for upload in server.uploads] == [10, 6]
    assert texts(done) == [(f"paper-{i}", 2) for i in range(5)]
    assert done.report["faults"] == {"batch_expired": 5, "no answer": 1}
    assert not done.exists(".failed.jsonl")


def test_files_stay_within_the_limits_of_the_server(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [bare(i) for i in range(8)]
    source = papers_file([*rows, bare(3, id="double")])  # equal texts are one request
    with BatchServer() as server:
        monkeypatch.setattr(batch_api, "MAX_REQUESTS", 7)
        done = generate(source, server.url, batch=True)
        assert [len(upload) for upload in server.uploads] == [7, 7, 7, 7, 4]
        assert max(server.paid.values()) == 1
        assert texts(done) == [*((f"paper-{i}", 4) for i in range(8)), ("double", 4)]
        monkeypatch.setattr(batch_api, "MAX_BYTES", 5_000)
        generate(source, server.url, batch=True, output="again.jsonl")
    sizes = [
        len(server.files[batch["input_file_id"]]) for batch in list(server.batches.values())[5:]
    ]
    assert 3_000 < min(sizes[:-1]) <= max(sizes) <= 5_000


@pytest.mark.parametrize("queue", [3, 20, 25])
def test_a_full_queue_gets_as_much_as_it_takes(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch, queue: int
) -> None:
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 10)
    with BatchServer() as server:
        server.queue = queue
        done = generate(papers_file([bare(i) for i in range(10)]), server.url, batch=True)
    assert done.code == 0
    assert texts(done) == [(f"paper-{i}", 4) for i in range(10)]
    assert (len(server.paid), set(server.paid.values())) == (40, {1})


def test_a_batch_that_the_server_refuses_ends_the_run(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = papers_file([bare(1)])
    with BatchServer() as server:
        server.end = "cancelled"
        done = generate(source, server.url, batch=True)
        assert (done.code, "cancelled" in done.error) == (1, True)
        assert len(done.rows(".journal.jsonl")) == 4
        server.queue = 0
        done = generate(papers_file([bare(2)], "more.jsonl"), server.url, batch=True)
        assert (done.code, "Enqueued token limit reached" in done.error) == (1, True)
        server.faults["create"] = ["400"]
        done = generate(papers_file([bare(2)], "more.jsonl"), server.url, batch=True)
        assert (done.code, "made-up 400" in done.error) == (1, True)
        server.queue, server.end = 100, "completed"
        done = generate(papers_file([bare(2)], "more.jsonl"), server.url, batch=True)
    assert done.code == 0
    assert set(server.paid.values()) == {1}
    assert nothing_left(done)


# Killed and cut


@pytest.mark.parametrize(
    "faults",
    [
        {"create": ["drop"]},
        {"create": ["500", "drop", "429"]},
        {"upload": ["drop", "500"]},
        {"retrieve": ["drop", "503"]},
        {"list": ["", "drop", "500"]},
        {"content": ["cut"]},
        {"content": ["500", "drop", "cut"]},
    ],
)
def test_faults_of_the_line_cost_nothing(
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
    assert texts(done) == [(f"paper-{i}", 4) for i in range(3)]
    assert [len(upload) for upload in server.uploads] == [5, 5, 2]
    assert (len(server.paid), set(server.paid.values())) == (12, {1})
    assert not any(faults.values())


COMMAND = """
import sys, batch_api, files, generate_train_summaries
batch_api.POLL, batch_api.MAX_REQUESTS = 0.05, 5
sys.exit(files.run_command(generate_train_summaries.main))
"""


def start(source: Path, output: Path, url: str) -> subprocess.Popen[str]:
    words = (
        "--input",
        source,
        "--output",
        output,
        "--base-url",
        url,
        "--model",
        "small",
        "--batch",
    )
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "call, number, fault",
    [
        ("upload", 0, "hold"),
        ("upload", 1, "hold"),
        ("create", 0, "hold"),
        ("create", 1, "hold"),
        ("retrieve", 5, "hold"),
        ("content", 0, "hold"),
    ],
)
def test_kill_9_at_any_moment_pays_nothing_twice(
    papers_file: Papers, tmp_path: Path, call: str, number: int, fault: str
) -> None:
    """The server has done what it was asked for, and the run dies before it hears so."""
    source, output = papers_file([bare(i) for i in range(3)]), tmp_path / "out" / "out.jsonl"
    with BatchServer() as server:
        server.looks, server.faults[call] = 3, [""] * number + [fault]
        first = start(source, output, server.url)
        wait_for(server.held.is_set, first)
        first.kill()
        first.communicate()
        assert first.returncode == -9
        created = len(server.batches)
        second = start(source, output, server.url)
        _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert created == {"upload": 0, "create": number + 1}.get(call, 3)
    assert [len(upload) for upload in server.uploads] == [5, 5, 2]
    assert (len(server.paid), set(server.paid.values())) == (12, {1})
    assert [
        len(json.loads(line)["summaries"])
        for line in output.read_text(encoding="utf-8").splitlines()
    ] == [4, 4, 4]
    assert {path.name for path in output.parent.iterdir()} == {
        "out.jsonl",
        "out.jsonl.journal.jsonl",
        "out.jsonl.report.json",
    }


@pytest.mark.parametrize("structured", [False, True])
def test_a_run_that_ends_while_it_journals_answers_goes_on_there(
    generate: Generate, papers_file: Papers, structured: bool
) -> None:
    """A disk that is full after some rows, at each row; accepted and refused answers are counted
    and paid for once.
    """
    source, append = papers_file([bare(i) for i in range(2)]), files.Journal.append
    flags: dict[str, Any] = {"batch": True, "price_out": 1e6} | (
        {"structured": True} if structured else {}
    )
    with BatchServer(
        lambda body, number: (
            "refusal" if number == 1 and not structured else "cut" if number == 1 else None
        )
    ) as server:
        for room in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10):
            server.bodies.clear()
            server.paid.clear()
            name, left = f"{room}.jsonl", room

            def full(journal: files.Journal, row: dict[str, Any]) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return append(journal, row)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files.Journal, "append", full)
                first = generate(source, server.url, output=name, **flags)
            assert first.code == 1 or left >= 0
            if first.code:
                assert first.error.startswith(
                    "error: No space left on device; free some disk space"
                )
            done = generate(source, server.url, output=name, **flags)
            assert (done.code, texts(done)) == (0, [("paper-0", 4), ("paper-1", 4)])
            assert max(server.paid.values()) == 1
            written = [row["completion_tokens"] for row in done.rows(".journal.jsonl")]
            assert done.report["cost_of_all_runs"] == sum(written) / 2
            assert len([number for number in written if number]) == len(server.paid)


def test_ctrl_c_leaves_the_batches_running_and_says_so(papers_file: Papers, tmp_path: Path) -> None:
    source, output = papers_file([bare(i) for i in range(3)]), tmp_path / "out.jsonl"
    with BatchServer() as server:
        server.looks = 10**9
        process = start(source, output, server.url)
        wait_for(lambda: server.calls["retrieve"] >= 6, process)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - begun < 10
        assert process.returncode == 130
        assert (
            "3 batches go on at the server; the same command comes back for their answers" in said
        )
        assert not output.exists()
        server.looks = 1
        assert start(source, output, server.url).wait(60) == 0
    assert len(server.batches) == 3
    assert set(server.paid.values()) == {1}


def test_what_is_under_way_is_asked_for_by_no_other_command(
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
            assert "4 requests under way are not of this command" in other.error
        server.looks = 1
        assert generate(source, server.url, batch=True).code == 0
        assert generate(source, live.url).code == 0
    assert (live.requests, set(server.paid.values())) == ([], {1})


# Money, and what cannot work


def test_the_budget_holds_for_what_is_under_way(generate: Generate, papers_file: Papers) -> None:
    """An answer of sixteen tokens costs 8, and 60 at most (120 tokens) while it is under way."""
    source = papers_file([bare(i) for i in range(20)])
    with BatchServer() as server:
        done = generate(source, server.url, batch=True, price_out=1e6, max_cost=300)
        assert [len(upload) for upload in server.uploads][:2] == [5, 5]
        assert (done.code, "--max-cost" in done.error) == (1, True)
        assert 300 <= done.report["cost"] == 8 * len(server.bodies) < 300 + 60
        more = generate(source, server.url, batch=True, price_out=1e6, max_cost=8 * 1000)
    assert (more.code, len(server.paid), set(server.paid.values())) == (0, 80, {1})
    assert more.report["cost_of_all_runs"] == 8 * 80


def test_the_estimate_is_half_of_a_live_one(generate: Generate, papers_file: Papers) -> None:
    source, flags = (
        papers_file([bare(i) for i in range(3)]),
        {"estimate": True, "price_in": 1e6, "price_out": 1e6},
    )
    said = [
        generate(source, "http://127.0.0.1:1/v1", **flags).said,
        generate(source, "http://127.0.0.1:1/v1", **flags, batch=True).said,
    ]
    live, batch = (float(one.rpartition("about ")[2]) for one in said)
    assert batch == live / 2 > 0


@pytest.mark.parametrize("kind", ["404", "401", "gone"])
def test_a_server_without_batches_is_named_in_one_line(
    generate: Generate, papers_file: Papers, kind: str
) -> None:
    with BatchServer() as server:
        server.faults["list"] = [kind] * 9
        url = "http://127.0.0.1:1/v1" if kind == "gone" else server.url
        done = generate(papers_file([bare(1)]), url, batch=True, retries=1)
    assert (done.code, server.files) == (2, {})
    assert f"--base-url {url} has no Batch API (" in done.error
    assert ("connection" if kind == "gone" else kind) in done.error
    assert not list(done.output.parent.iterdir())
    done = generate(papers_file([bare(1)]), url, "http://127.0.0.1:2/v1", batch=True)
    assert (done.code, "--batch with several --base-url" in done.error) == (2, True)
