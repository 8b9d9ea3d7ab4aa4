"""Whole runs of the two generation scripts: what they request, record, write and report.

Kills at random moments, full disks and damaged journals are in test_faults.py.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import fake_llm_server
import generating
import pytest
from conftest import run_script
from fake_llm_server import KINDS, Body, FakeServer, at_random
from fake_llm_server import sentence as made_up
from faults import asked, bare, misbehaviour, started, wait_for, whole_rows
from generating import Generate, Papers

import generate_train_summaries
from generate_train_summaries import VIEWS
from semcse import files

generate = generating.generate  # a fixture
NO_SERVER = "http://127.0.0.1:1/v1"


# What is requested and written


def test_every_paper_gets_its_texts_in_the_order_of_the_input(
    generate: Generate, papers_file: Papers
) -> None:
    rows = [bare(i, note={"kept": i}, summaries=["an old one", "and another"]) for i in (3, 1, 2)]
    with FakeServer() as server:
        done = generate(papers_file(rows), server.url, concurrency=2)
    assert done.code == 0
    for row, old in zip(done.rows(), rows, strict=True):
        answers = {made_up(body) for body in server.requests if asked(body)[0] == row["id"]}
        assert (len(answers), set(row["summaries"])) == (4, answers)
        assert row == old | {"summaries": row["summaries"]}
    assert done.report["accepted"] == done.report["texts"] == 12
    assert done.report["completion_tokens"] == 12 * 16
    left = {path.name for path in done.output.parent.iterdir()}
    assert left == {"out.jsonl", "out.jsonl.journal.jsonl", "out.jsonl.report.json"}


def test_the_requests_of_one_paper_share_all_but_their_task(
    generate: Generate, papers_file: Papers
) -> None:
    sampling = {"temperature": 0.3, "top_p": 0.5, "max_tokens": 99}
    with FakeServer() as server:
        generate(papers_file([bare(7)]), server.url, summaries_per_abstract=5, **sampling)
    head = f"Title: {bare(7)['title']}\n\nAbstract: {bare(7)['abstract']}\n\n"
    assert len({body.pop("seed") for body in server.requests}) == 5
    messages = [body.pop("messages") for body in server.requests]
    assert server.requests == [{"model": "small"} | sampling] * 5
    system = {"role": "system", "content": generate_train_summaries.SYSTEM}
    assert [message[0] for message in messages] == [system] * 5
    tasks = {message[1]["content"].removeprefix(head) for message in messages}
    assert tasks == set(VIEWS.values())


def test_a_rerun_requests_only_what_is_missing(generate: Generate, papers_file: Papers) -> None:
    rows = [bare(i) for i in range(3)]
    with FakeServer() as server:
        first = generate(papers_file(rows), server.url, summaries_per_abstract=2).rows()
        assert generate(papers_file(rows), server.url, summaries_per_abstract=2).rows() == first
        assert len(server.requests) == 6
        more = generate(papers_file(rows), server.url, summaries_per_abstract=3).rows()
        assert [row["summaries"][:2] for row in more] == [row["summaries"] for row in first]
        assert [asked(body)[1] for body in server.requests[6:]] == [2] * 3
        generate(papers_file([*rows, bare(9)]), server.url, summaries_per_abstract=3)
        assert [asked(body)[0] for body in server.requests[9:]] == ["paper-9"] * 3


def test_a_journal_of_an_earlier_version_counts(
    generate: Generate, papers_file: Papers, tmp_path: Path
) -> None:
    """The keys, which are hashes of prompts, parameters and paper, must never change."""
    keys = [4962307204958403475, 2651791477663607822]
    journal = tmp_path / "made" / "out.jsonl.journal.jsonl"
    journal.parent.mkdir()
    row = {"id": "paper-0", "prompt_tokens": 9, "completion_tokens": 9}
    lines = [row | {"key": key, "slot": i, "text": f"Text {i}."} for i, key in enumerate(keys)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = papers_file([bare(0)])
    done = generate(source, NO_SERVER, model="m", summaries_per_abstract=2)
    assert (done.code, done.rows()[0]["summaries"]) == (0, ["Text 0.", "Text 1."])


def test_queries_are_kept_unless_overwritten_and_gzip_is_read_and_written(
    generate: Generate, tmp_path: Path
) -> None:
    rows = [bare(0), bare(1, query="what I typed"), bare(2)]
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    options: dict[str, Any] = {"queries": True, "output": "out.jsonl.gz"}
    with FakeServer() as server:
        kept = [row["query"] for row in generate(source, server.url, **options).rows()]
        assert (len(server.requests), kept[1]) == (2, "what I typed")
        replaced = generate(source, server.url, overwrite=True, **options).rows()
    answers = set(map(made_up, server.requests))
    assert len(answers) == 3
    assert {row["query"] for row in replaced} == answers >= {kept[0], kept[2]}


def test_a_structured_request_asks_for_all_missing_texts(
    generate: Generate, papers_file: Papers
) -> None:
    def wanted(body: Body) -> tuple[int, int, bool]:
        texts = body["response_format"]["json_schema"]["schema"]["properties"]["texts"]
        n = texts["maxItems"]
        said = body["messages"][1]["content"]
        return n, body["max_tokens"], f"Write {n} different sentences" in said

    source = papers_file([bare(i) for i in range(3)])
    with FakeServer() as server:
        first = generate(source, server.url, structured=True).rows()
        assert [wanted(body) for body in server.requests] == [(4, 480, True)] * 3
        more = generate(source, server.url, structured=True, summaries_per_abstract=6)
        assert [wanted(body) for body in server.requests[3:]] == [(2, 240, True)] * 3
    assert [row["summaries"] for row in first] == [row["summaries"][:4] for row in more.rows()]
    assert more.texts() == [(f"paper-{i}", 6) for i in range(3)]
    tokens = [row["completion_tokens"] for row in more.rows(".journal.jsonl")]
    assert tokens == [4 * 16 + 1, 0, 0, 0] * 3 + [2 * 16 + 1, 0] * 3


def test_the_complete_texts_of_a_cut_list_are_kept(generate: Generate, papers_file: Papers) -> None:
    with FakeServer(misbehave=lambda body, number: "cut" if number == 0 else None) as server:
        done = generate(papers_file([bare(1)]), server.url, structured=True)
    texts = [made_up(body, i) for body in server.requests for i in (0, 1)]
    assert (len(server.requests), done.rows()[0]["summaries"]) == (2, texts)
    assert done.report["rejected"] == {"cut off": 2}


@pytest.mark.parametrize("shards, queries", [(3, False), (8, True)])
def test_merged_journals_of_shards_give_the_file_of_one_run(
    generate: Generate, papers_file: Papers, shards: int, queries: bool
) -> None:
    """Byte for byte, with seven papers and a bad line, and without another request."""
    rows = [bare(i, summaries=["an old one", "and another"]) for i in range(7)]
    source = papers_file([*rows[:2], {"id": "bad"}, *rows[2:]])
    flags: dict[str, Any] = {"queries": queries, "skip_invalid": True, "attempts": 9}
    with FakeServer(misbehave=misbehaviour(random.Random(0))) as server:
        one = generate(source, server.url, **flags, output="one.jsonl")
        names = [f"{i}/{shards}" for i in range(1, shards + 1)]
        for name in names:
            generate(source, server.url, **flags, shard=name)
        parts = [
            one.output.with_name(f"shard-{name.replace('/', '-of-')}.out.jsonl") for name in names
        ]
        ids = [[json.loads(line)["id"] for line in part.open()] for part in parts]
        assert ids == [[row["id"] for row in rows[i::shards]] for i in range(shards)]
        journals = [Path(f"{part}.journal.jsonl") for part in parts]
        merged = one.output.with_name("out.jsonl.journal.jsonl")
        merged.write_bytes(b"".join(path.read_bytes() for path in journals if path.exists()))
        sent = len(server.requests)
        done = generate(source, server.url, **flags)
        assert len(server.requests) == sent
    assert done.output.read_bytes() == one.output.read_bytes()


# What goes wrong with a request


def test_a_paper_without_an_answer_is_tried_again_by_the_next_run(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(1), bare(2)])
    with FakeServer() as server:
        server.misbehave = lambda body, _: "500" if asked(body) == ("paper-1", 0) else None
        done = generate(source, server.url, retries=3, summaries_per_abstract=2)
        assert (done.code, done.texts()) == (0, [("paper-2", 2)])
        assert sorted(Counter(map(asked, server.requests)).values()) == [1, 1, 1, 4]
        failed = {"id": "paper-1", "have": 1, "want": 2, "reasons": {"HTTP 500": 1}}
        assert done.rows(".failed.jsonl") == [failed]
        assert done.report["faults"] == {"HTTP 500": 4}
        server.misbehave = lambda body, _: None
        again = generate(source, server.url, summaries_per_abstract=2)
        assert [asked(body) for body in server.requests[7:]] == [("paper-1", 0)]
    assert again.texts() == [("paper-1", 2), ("paper-2", 2)]
    assert not again.path(".failed.jsonl").exists()


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("empty", "empty"),
        ("refusal", "refusal"),
        ("study", "speaks of the study"),
        ("cut", "cut off"),
    ],
)
def test_a_rejected_text_is_requested_again_with_another_seed(
    generate: Generate, papers_file: Papers, kind: str, reason: str
) -> None:
    source = papers_file([bare(1)])
    with FakeServer(misbehave=lambda body, _: kind if asked(body)[1] == 0 else None) as server:
        done = generate(source, server.url, attempts=3, summaries_per_abstract=3)
        failed = {"id": "paper-1", "have": 2, "want": 3, "reasons": {reason: 3}}
        assert done.rows(".failed.jsonl") == [failed]
        assert (done.report["rejected"], done.texts()) == ({reason: 3}, [("paper-1", 2)])
        server.misbehave = lambda body, _: None
        again = generate(source, server.url, attempts=3, summaries_per_abstract=3)
    seeds = {body["seed"] for body in server.requests if asked(body)[1] == 0}
    assert len(seeds) == 4
    assert (again.report["accepted"], again.texts()) == (1, [("paper-1", 3)])


def test_equal_answers_to_different_prompts_are_not_all_accepted(
    generate: Generate, papers_file: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = "Always the very same sentence comes out of such a model."
    monkeypatch.setattr(fake_llm_server, "sentence", lambda body, number=0: same)
    with FakeServer() as server:
        done = generate(papers_file([bare(1)]), server.url, attempts=2)
    assert len(server.requests) == 1 + 3 * 2
    assert done.report["rejected"] == {"near-duplicate": 6}
    assert (done.rows(), done.rows(".failed.jsonl")[0]["have"]) == ([], 1)


def test_a_revoked_key_ends_the_run_and_answers_are_kept(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(50)])
    with FakeServer(misbehave=lambda body, number: "401" if number >= 8 else None) as server:
        done = generate(source, server.url, concurrency=4)
        assert (done.code, done.output.exists()) == (1, False)
        assert done.error.startswith("error: a server refuses the key (HTTP 401); set OPENAI")
        assert len(server.requests) <= 8 + 4
        assert len(done.rows(".journal.jsonl")) == 8
        server.misbehave = lambda body, number: None
        assert generate(source, server.url, concurrency=4).code == 0
    assert server.kinds.count(None) == 200


def test_a_text_that_the_server_rejects_fails_only_its_paper(
    generate: Generate, papers_file: Papers
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    with FakeServer() as server:
        server.misbehave = lambda body, _: "400" if asked(body)[0] == "paper-1" else None
        done = generate(source, server.url, concurrency=1)
        assert done.texts() == [("paper-0", 4), ("paper-2", 4)]
        assert Counter(asked(body)[0] for body in server.requests)["paper-1"] == 1
        (failed,) = done.rows(".failed.jsonl")
        assert (failed["id"], "made-up 400" in next(iter(failed["reasons"]))) == ("paper-1", True)
        server.misbehave = lambda body, number: "400"
        none = generate(source, server.url, output="none.jsonl")
    assert (none.code, none.rows()) == (1, [])
    assert "see the reasons in" in none.error
    assert [row["have"] for row in none.rows(".failed.jsonl")] == [0, 0, 0]


def test_a_quarter_of_faults_leaves_texts_or_reasons(
    generate: Generate, papers_file: Papers
) -> None:
    """All kinds of faults at once."""
    rows = [bare(i) for i in range(40)]
    with FakeServer(misbehave=at_random(0.25), latency=0.005) as server:
        done = generate(papers_file(rows), server.url, timeout=1, attempts=1)
    assert (done.code, set(server.kinds)) == (0, {None, *KINDS})
    failed = {row["id"]: row for row in done.rows(".failed.jsonl")}
    assert all(row["reasons"] for row in failed.values())
    have = {row["id"]: failed.get(row["id"], {"have": 4})["have"] for row in rows}
    assert done.texts() == [(name, number) for name, number in have.items() if number >= 2]
    journal = done.rows(".journal.jsonl")
    good = Counter((row["id"], row["slot"]) for row in journal if "rejected" not in row)
    assert set(good.values()) == {1}
    reasons = Counter(row["rejected"] for row in journal if "rejected" in row)
    assert done.report["rejected"] == reasons


# Money and secrets


def test_the_estimate_is_the_sum_of_the_missing_requests(
    generate: Generate, papers_file: Papers
) -> None:
    rows = [bare(i) for i in range(3)]
    prices = {"price_in": 1000, "price_out": 10_000}
    with FakeServer() as server:
        generate(papers_file(rows[:1]), server.url)
        done = generate(papers_file(rows), server.url, estimate=True, **prices)
        assert (done.code, len(server.requests)) == (0, 4)
        generate(papers_file(rows), server.url)
    texts = [[one["content"] for one in body["messages"]] for body in server.requests[4:]]
    tokens = sum(len("".join(text)) // 4 for text in texts)
    assert "8 missing: 8 requests" in done.said
    assert f"about {tokens} tokens to read" in done.said
    assert f"at most {8 * 120} to write" in done.said
    assert f"{(tokens * 1000 + 8 * 120 * 10_000) / 1e6:.2f}" in done.said


def test_max_cost_stops_in_time_and_a_higher_one_continues(
    generate: Generate, papers_file: Papers
) -> None:
    """An answer of sixteen tokens costs 16."""
    source = papers_file([bare(i) for i in range(20)])
    with FakeServer(latency=0.01) as server:
        done = generate(source, server.url, concurrency=4, price_out=1e6, max_cost=16 * 20)
        sent = len(server.requests)
        assert (done.code, "--max-cost" in done.error) == (1, True)
        assert 20 <= sent <= 20 + 4
        assert done.report["cost"] == 16 * sent == 16 * len(done.rows(".journal.jsonl"))
        missing = sum(row["want"] - row["have"] for row in done.rows(".failed.jsonl"))
        assert (missing, len(done.rows()) in (5, 6)) == (80 - sent, True)
        assert generate(source, server.url, price_out=1e6, max_cost=16 * 20).code == 1
        assert len(server.requests) == sent
        done = generate(source, server.url, price_out=1e6, max_cost=16 * 1000)
    assert (done.code, len(server.requests), len(done.rows())) == (0, 80, 20)
    assert done.report["cost_of_all_runs"] == 16 * 80


KEY, TOKEN = "sk-planted-0123456789", "hf_planted0123456789"


def test_secrets_are_neither_printed_nor_written(
    generate: Generate, papers_file: Papers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a server sends them back in errors and answers, and openai logs everything."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    answer = made_up
    monkeypatch.setattr(fake_llm_server, "sentence", lambda *what: f"{KEY} {answer(*what)}")
    source, said = papers_file([bare(i) for i in range(3)]), ""
    for kind in (None, f"400 {KEY} {TOKEN}", f"401 {KEY}", f"500 {KEY}", "not json", "drop"):
        with FakeServer() as server:
            server.misbehave = lambda body, number, kind=kind: kind  # type: ignore[misc]
            done = generate(source, server.url, output=f"{str(kind)[:3]}.jsonl", retries=1)
        said += done.said
        assert server.keys == {f"bearer {KEY}"}
    with FakeServer() as server:
        words = ["--input", str(source), "--output", str(tmp_path / "log.jsonl")]
        words += ["--base-url", server.url, "--model", "m"]
        done_log = run_script("generate_train_summaries.py", *words, OPENAI_LOG="debug")
    assert done_log.returncode == 0, done_log.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "made-up 400 *** ***" in written
    assert not [s for s in (KEY, TOKEN) if s in said + done_log.stderr + written]


# How a run ends and continues


def test_damaged_rows_of_the_journal_are_requested_again(
    generate: Generate, papers_file: Papers
) -> None:
    """A changed letter, a rejected text that became an accepted one, rows of another shape, and a
    torn last line. Rows of early versions, which have no checksum, count.
    """
    source = papers_file([bare(i) for i in range(3)])
    with FakeServer(misbehave=lambda body, number: "refusal" if number == 0 else None) as server:
        first = generate(source, server.url, concurrency=1)
        rows = first.rows(".journal.jsonl")
        assert ["rejected" in row for row in rows] == [True] + [False] * 12
        rows[0].pop("rejected")
        rows[1]["text"] = rows[1]["text"].upper()
        rows[2]["key"] = str(rows[2]["key"])
        del rows[3]["completion_tokens"]
        del rows[4]["sum"]
        lines = [json.dumps(row) + "\n" for row in rows]
        first.path(".journal.jsonl").write_text("".join(lines)[:-20])
        again = generate(source, server.url, concurrency=1)
    damaged = [*rows[1:4], rows[12]]
    missing = Counter((row["id"], row["slot"]) for row in damaged)
    assert Counter(map(asked, server.requests[13:])) == missing
    assert "left out 5 torn or damaged rows" in again.said
    assert (again.code, len(again.rows(".journal.jsonl"))) == (0, 8 + 4)


def test_ctrl_c_waits_for_answers_in_flight_and_keeps_them(
    papers_file: Papers, tmp_path: Path
) -> None:
    source, output = papers_file([bare(i) for i in range(100)]), tmp_path / "out.jsonl"
    with (
        FakeServer(latency=0.3) as server,
        started(source, output, server.url, "--concurrency", "8") as process,
    ):
        wait_for(lambda: len(server.requests) >= 20, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, output.exists()) == (130, False)
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert len(server.requests) < 60
    recorded = Counter((row["id"], row["slot"]) for row in whole_rows(output))
    assert recorded == Counter(map(asked, server.requests))


# What cannot work


def test_two_runs_at_once_on_one_output_are_refused(
    generate: Generate, papers_file: Papers, tmp_path: Path
) -> None:
    with FakeServer() as server, files.lock(tmp_path / "made" / ".out.jsonl.lock"):
        done = generate(papers_file([bare(1)]), server.url)
    assert (done.code, server.requests) == (2, [])
    assert "in use by another run" in done.error


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"concurrency": 0}, "--concurrency"),
        ({"top_p": 0}, "--top-p"),
        ({"max_cost": math.nan, "price_in": 1.0}, "--max-cost"),
        ({"max_cost": -1.0, "price_in": 1.0}, "--max-cost"),
        ({"temperature": "nan"}, "--temperature"),
        ({"timeout": 0}, "--timeout"),
        ({"attempts": 0}, "--attempts"),
        ({"max_cost": 1}, "--price-in"),
        ({"summaries_per_abstract": 1}, "--summaries-per-abstract"),
        ({"shard": "3/2"}, "--shard"),
        ({"base_url": "ftp://a/v1"}, "--base-url"),
        ({"base_url": "http://a:port/v1"}, "--base-url"),
        ({"base_url": "http://me:secret@a/v1"}, "OPENAI_API_KEY"),
        ({"base_url": "http://a/v1?key=secret"}, "OPENAI_API_KEY"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(
    generate: Generate, papers_file: Papers, flags: dict[str, Any], word: str
) -> None:
    done = generate(papers_file([bare(1)]), *([] if "base_url" in flags else [NO_SERVER]), **flags)
    assert (done.code, done.said.count("\n")) == (2, 1)
    assert word in done.error
    assert "secret" not in done.said
    assert not done.output.parent.exists()


def test_bad_input_is_found_before_anything_is_sent(
    generate: Generate, papers_file: Papers, tmp_path: Path
) -> None:
    source = papers_file([bare(1), bare(2), {"id": "x", "title": "no abstract"}])
    circle, pipe = tmp_path / "circle.jsonl", tmp_path / "pipe.jsonl"
    circle.symlink_to(circle)
    os.mkfifo(pipe)
    with FakeServer() as server:
        bad = [generate(path, server.url) for path in (source, circle, pipe)]
        assert (server.requests, list(bad[0].output.parent.iterdir())) == ([], [])
        skipping = generate(source, server.url, skip_invalid=True)
        assert len(skipping.rows()) == 2
        bad.append(generate(skipping.output, server.url))
    assert [done.code for done in bad] == [2] * 4
    assert 'papers.jsonl:3: key "abstract" is missing' in bad[0].error
    assert "Too many levels of symbolic links" in bad[1].error
    assert "is a pipe or device, and papers are read three times" in bad[2].error
    assert "is a folder or the input" in bad[3].error


def test_openai_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, generate_train_summaries; print({'openai', 'torch'} & set(sys.modules))"
    done = run_script("-c", code)
    assert done.stdout.strip() == "set()", done.stderr
