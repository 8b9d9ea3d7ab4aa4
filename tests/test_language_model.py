"""language_model.py and the two generators: the gate by hand-written and generated texts, the
client against a misbehaving server, the run against signals.

Kills, full disks and damaged journals are in test_torture.py.
"""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_llm_server
import pytest
from conftest import run_script
from fake_llm_server import FORMS, KINDS, Body, FakeServer, at_random
from fake_llm_server import sentence as made_up
from faults import asked, bare, misbehaviour, started, wait_for, whole_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_search_queries
import generate_train_summaries
from generate_train_summaries import VIEWS
from semcse import command_line, files, llm
from semcse.llm import Flags, read_answer, retry_after
from semcse.papers import Paper, normalise
from semcse.quality_gate import Job, Prompt, alike, clean, judge, parse_texts

TASK = "Write one sentence about the main result: as concretely as it can be told."
JOB = Job(
    "summaries",
    (Prompt("p", "Answer with the sentence only.", TASK),),
    texts=4,
    least=2,
    words=(6, 80),
)
ABSTRACT = (
    "Zebra mussels clog the water intakes of power plants along large rivers. Regular heat"
    " treatment of the intake pipes at 40 degrees kills nine of ten mussels within an hour. Costs"
    " fell by half in three plants."
)
PAPER = Paper("a", "Heat against zebra mussels in power plants", ABSTRACT)
GOOD = (
    "Warming the pipes that feed river power stations removes most invasive bivalves and halves the"
    " expense."
)


# The gate


@pytest.mark.parametrize(
    "raw",
    [
        GOOD,
        f"  {GOOD}\n",
        f'"{GOOD}"',
        f"\u201c{GOOD}\u201d",
        f"'{GOOD}'.",
        f"Summary: {GOOD}",
        f"**Summary:** {GOOD}",
        f"One-sentence summary 1: {GOOD}",
        f"Sure, here is a one-sentence summary of the abstract: {GOOD}",
        f"Sure! Here's the sentence:\n\n> {GOOD}",
        f"Certainly:\n\n```text\n{GOOD}\n```",
        f"### Answer:\n**{GOOD}**",
        f"1. {GOOD}",
        f"- *{GOOD}*",
        f"\u2022 `{GOOD}`",
        f"<think>The user wants one sentence.\nSo:</think>\n{GOOD}",
        f"Here is a summary:\n\n1) **\u201c{GOOD}\u201d**",
        GOOD.replace(" ", " \t\x00 "),
        f"This study shows that {GOOD[0].lower()}{GOOD[1:]}",
        f"The main finding of the paper is that {GOOD}",
        f"Summary: The authors also found that {GOOD}",
    ],
)
def test_clean_leaves_the_text_alone_of_an_answer(raw: str) -> None:
    assert clean(raw) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "1.5 million plants of 2 * 3 kinds and 5 * 7 others grew.",
        "Invasive species: their spread is rapid.",
        '"Open" and "closed" habitats differ in plant cover.',
        "Gene p53* is expressed in 2 of 3 cells.",
        "Two lines\nof text stay two lines",
        "A <b> tag and a_name_with_underscores stay.",
        "The work function of metals that oxidise is low.",
        "Paper is a material that burns.",
        "Plants of the study region suggest that rain matters.",
    ],
)
def test_clean_leaves_alone_what_belongs_to_the_text(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    "raw", ["", " \n\t", "<think>never ends", "```\n```", '""', "Summary:", "- "]
)
def test_clean_of_nothing_is_judged_empty(raw: str) -> None:
    text = clean(raw)
    assert judge(text, PAPER, [], JOB) in ("empty", "too short")


@pytest.mark.parametrize(
    "layer",
    [
        "- ",
        "* ",
        "1. ",
        "__",
        "**",
        "Summary: ",
        '"',
        "`",
        "<think>",
        "</think>",
        "this ",
        "as an ",
        '"\\',
        '{"\\"',
        "a\u0301\u0316",
        "\u202e",
    ],
)
def test_an_endless_answer_is_refused_in_no_time(layer: str) -> None:
    """Guards against: what is stripped layer by layer, or searched anew from every quote, takes
    minutes for an answer that a server never ends.
    """
    for raw in (layer * 100_000, "{" + layer * 100_000, GOOD + layer * 100_000):
        start = time.process_time()
        assert all(judge(clean(text), PAPER, [GOOD], JOB) for text in [raw, *parse_texts(raw)[:4]])
        assert time.process_time() - start < 10


@given(
    st.text(max_size=50),
    st.sampled_from(
        [
            f"{GOOD}%s",
            f"%s{GOOD}",
            f"%s{ABSTRACT}%s",
            '{"texts": ["%s", "%s"]}',
            "%s\n%s",
            "<think>%s</think>%s",
        ]
    ),
)
@settings(deadline=None, max_examples=300)
def test_the_gate_takes_any_answer_and_lets_only_texts_through_that_can_be_written(
    noise: str, form: str
) -> None:
    raw = form.replace("%s", noise)
    for text in map(clean, [raw, *parse_texts(raw)]):
        if judge(text, PAPER, [], JOB) is None:
            assert JOB.words[0] <= len(text.split()) <= JOB.words[1]
            assert text == " ".join(text.split())
            assert text.encode().decode() == text


@given(st.text() | st.text(alphabet="ab \"'`*_#-1.:\n\\[]{}<think>/Sumary"))
@settings(deadline=None, max_examples=300)
def test_clean_takes_any_text_and_finds_no_more_to_do_the_second_time(raw: str) -> None:
    text = clean(raw)
    assert clean(text) == text
    assert all(line == " ".join(line.split()) != "" for line in text.split("\n") if text)


def test_half_a_surrogate_pair_does_not_get_through() -> None:
    assert clean("a \ud83d b") == "a ? b"


@pytest.mark.parametrize(
    "text, reason",
    [
        (GOOD, None),
        ("", "empty"),
        ("...", "empty"),
        ("I'm sorry, but I can't summarise this text for you.", "refusal"),
        ("Not applicable to this kind of text, which has no result.", "refusal"),
        ("N/A.", "refusal"),
        ("As an AI language model I have no access to the paper itself.", "refusal"),
        ("Sadly, as a language model I have no access to it.", "refusal"),
        ("None of the heated mussels in river pipes lived longer than a day.", None),
        (f"{GOOD}\n{GOOD}", "several lines"),
        ("Heat kills most mussels quickly.", "too short"),
        (" ".join(f"word{i}" for i in range(81)), "too long"),
        (" ".join(f"word{i}" for i in range(80)), None),
        ("Seven long words are no summary either: " + "x" * 3_200, "too long"),
        (
            "This study shows that warm water removes most bivalves from pipes.",
            "speaks of the study",
        ),
        (
            "Warm water, the authors say, removes most bivalves from river pipes.",
            "speaks of the study",
        ),
        ("Warm water removes most bivalves from pipes, as we could show.", "speaks of the study"),
        ("A recent paper says warm water frees pipes from most bivalves.", "speaks of the study"),
        ("Does warm water remove most bivalves from the pipes of power stations?", "a question"),
        (
            "Write one sentence about the main result, as concretely as it can be told.",
            "repeats the prompt",
        ),
        ("As concretely as it can be told.", "repeats the prompt"),
        (
            "A one-sentence account of warm water that frees pipes from most bivalves.",
            "speaks of the study",
        ),
        (
            "The scientific abstract says warm water frees pipes from most bivalves.",
            "speaks of the study",
        ),
        (
            "The subject is an example of how warm water can free pipes from bivalves.",
            "speaks of the study",
        ),
        (
            "This is a fact about the warm water that frees pipes from bivalves.",
            "speaks of the study",
        ),
        (
            "The finding above means that warm water frees pipes from bivalves.",
            "speaks of the study",
        ),
        ("Bivalves are the subject of control by warm water in river pipes.", None),
        ("The abstract theory of groups explains how warm water frees pipes.", None),
        ("Studies of rivers need warm water; the US Army removes bivalves.", None),
        ("Heat against zebra mussels in power plants", "copies the title"),
        ("heat against Zebra mussels, in power plants!", "copies the title"),
        (
            "Zebra mussels clog the water intakes of power plants along large rivers.",
            "copies the abstract",
        ),
        ("Costs fell by half in three plants.", "copies the abstract"),
        (
            "In truth, zebra mussels clog the water intakes of power plants along large rivers.",
            "copies the abstract",
        ),
        (
            (
                "Regular heat treatment of the intake pipes at 40 degrees kills nine of ten mussels"
                " within an hour and halves costs"
            ),
            "copies the abstract",
        ),
        (
            (
                "Mussels die when pipes are heated to 40 degrees for an hour, at half the earlier"
                " cost."
            ),
            None,
        ),
    ],
)
def test_judge_names_the_reason(text: str, reason: str | None) -> None:
    assert judge(text, PAPER, [], JOB) == reason


def test_judge_compares_with_the_other_texts_of_the_paper_and_knows_cut_answers() -> None:
    other = (
        "Warming pipes that feed river power stations removes most invasive bivalves and halves the"
        " whole expense."
    )
    words, others = set(normalise(GOOD).split()), set(normalise(other).split())
    assert len(words & others) / len(words | others) >= 0.8
    assert judge(GOOD, PAPER, [other], JOB) == "near-duplicate"
    assert judge(GOOD, PAPER, ["Bivalves hate warm pipes."], JOB) is None
    assert judge(GOOD, PAPER, [], JOB, cut=True) == "cut off"


def test_queries_may_be_short_and_may_share_a_phrase_with_the_abstract() -> None:
    job = Job("query", (Prompt("p", "s", "t"),), texts=1, least=1, words=(2, 16))
    assert judge("heat treatment of the intake pipes", PAPER, [], job) is None
    assert judge("how do zebra mussels die?", PAPER, [], job) is None
    assert judge("paper on zebra mussels by the authors", PAPER, [], job) == "speaks of the study"
    assert judge("mussels", PAPER, [], job) == "too short"
    assert judge("heat against zebra mussels power plants", PAPER, [], job) == "copies the title"


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
)
@settings(deadline=None, max_examples=200)
def test_alike_is_the_jaccard_index_of_the_words(one: list[str], two: list[str]) -> None:
    a, b = set(one), set(two)
    assert alike(" ".join(one), " ".join(two).upper() + ".") == (len(a & b) / len(a | b) >= 0.8)


@given(st.text() | st.text(alphabet='ab "\\[]{}:,\n'))
@settings(deadline=None, max_examples=300)
def test_parse_texts_never_raises(text: str) -> None:
    assert all(isinstance(part, str) for part in parse_texts(text))


TEXT_LISTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4
)


@given(TEXT_LISTS, st.booleans(), st.data())
@settings(deadline=None, max_examples=300)
def test_parse_texts_reads_whole_json_and_the_whole_strings_of_cut_json(
    texts: list[str], ascii_only: bool, data: st.DataObject
) -> None:
    whole = json.dumps({"texts": texts}, ensure_ascii=ascii_only)
    assert parse_texts(f"Sure:\n```json\n{whole}\n```") == texts
    cut = data.draw(st.integers(len('{"texts":'), len(whole)))
    found = parse_texts(whole[:cut])
    assert found == texts[: len(found)] or found == whole[:cut].splitlines()
    assert '"' in whole[cut:] or found == texts


def test_parse_texts_takes_lines_where_there_is_no_json() -> None:
    assert parse_texts('1. First "quoted".\n2. Second.') == ['1. First "quoted".', "2. Second."]


# Answers and headers


@pytest.mark.parametrize(
    "told, read", [("7", 7), ("-7", 0), ("1e308", 10**9), ("null", 0), ("true", 1)]
)
def test_a_server_may_tell_any_number_of_tokens(told: str, read: int) -> None:
    assert read_answer(
        f'{{"choices": [{{"message": {{}}}}], "usage": {{"prompt_tokens": {told}}}}}'.encode()
    ).tokens == (read, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


BODIES = (
    '{"choices": %s}',
    '{"choices": [%s]}',
    '{"choices": [{"message": %s}]}',
    '{"choices": [{"message": {"content": %s}}]}',
    '{"choices": [{"message": {}}], "usage": %s}',
    '{"choices": [{"message": {}}], "usage": {"prompt_tokens": %s}}',
    "%s",
    "{%s",
)


@given(JSON, st.sampled_from(BODIES))
@settings(deadline=None, max_examples=300)
def test_a_body_is_an_answer_or_a_value_error(value: Any, form: str) -> None:
    try:
        answer = read_answer((form % json.dumps(value)).encode())
    except ValueError:
        return
    assert isinstance(answer.text, str)
    assert all(isinstance(number, int) for number in answer.tokens)


@pytest.mark.parametrize(
    "value, seconds",
    [
        (None, 0),
        ("", 0),
        ("3", 3),
        ("0.5", 0.5),
        ("-3", 0),
        ("1e9", 120),
        ("inf", 120),
        ("nan", 0),
        ("soon", 0),
        ("Sat, 01 Jan 2000 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 120),
    ],
)
def test_retry_after_reads_seconds_and_dates(value: str | None, seconds: float) -> None:
    assert retry_after(value) == seconds


def test_retry_after_counts_the_seconds_to_a_date() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < retry_after(date) <= 30


@given(st.text() | st.text(alphabet="0123456789 :-+GMTJanMon,.e"))
@settings(deadline=None, max_examples=300)
def test_retry_after_takes_any_header(value: str) -> None:
    assert 0 <= retry_after(value) <= 120


# Whole runs


class Outcome:
    """What a run of a generator left: exit code, what it said, its files."""

    def __init__(self, code: int, said: str, output: Path) -> None:
        self.code, self.said, self.output = code, said, output
        self.error = said.strip().splitlines()[-1] if code else ""

    def rows(self, suffix: str = "") -> list[dict[str, Any]]:
        path = Path(f"{self.output}{suffix}")
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [json.loads(line) for line in content.splitlines()]

    def exists(self, suffix: str = "") -> bool:
        return Path(f"{self.output}{suffix}").exists()

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(Path(f"{self.output}.report.json").read_text(encoding="utf-8")))


@pytest.fixture
def generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """A function that runs a generator in this process, on its input and server, as its command
    line would.
    """
    monkeypatch.setattr(language_model, "BACKOFF", (0.001, 0.01))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = list(logging.root.handlers)

    def run(
        source: Path, *urls: str, queries: bool = False, output: str = "out.jsonl", **flags: Any
    ) -> Outcome:
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in flags.items()
        ]
        servers = [word for url in urls for word in ("--base-url", url)]
        path = tmp_path / "made" / output
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "generate",
                "--input",
                str(source),
                "--output",
                str(path),
                "--model",
                "small",
                *servers,
                *words,
            ],
        )
        code = command_line.run_command(
            generate_search_queries.main if queries else generate_train_summaries.main
        )
        return Outcome(code, capsys.readouterr().err, path)

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    logging.root.handlers[:] = before


def test_every_paper_gets_its_texts_in_the_order_of_the_input(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    rows = [bare(i, note={"kept": i}, summaries=["an old one", "and another"]) for i in (3, 1, 2)]
    with FakeServer() as server:
        done = generate(papers_file(rows), server.url, concurrency=2)
    assert done.code == 0
    assert [row["id"] for row in done.rows()] == ["paper-3", "paper-1", "paper-2"]
    for row, old in zip(done.rows(), rows, strict=True):
        assert {key: value for key, value in row.items() if key != "summaries"} == {
            key: value for key, value in old.items() if key != "summaries"
        }
        answers = {made_up(body) for body in server.requests if asked(body)[0] == row["id"]}
        assert set(row["summaries"]) == answers
        assert len(answers) == 4
    assert done.report["accepted"] == done.report["texts"] == 12
    assert done.report["completion_tokens"] == 12 * 16
    assert not done.exists(".failed.jsonl")
    assert not list(done.output.parent.glob("*.partial"))


def test_the_requests_of_one_paper_share_all_but_their_task(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    paper = bare(7)
    with FakeServer() as server:
        generate(
            papers_file([paper]),
            server.url,
            summaries_per_abstract=5,
            temperature=0.3,
            top_p=0.5,
            max_tokens=99,
        )
    head = f"Title: {paper['title']}\n\nAbstract: {paper['abstract']}\n\n"
    assert sorted(body["messages"][1]["content"] for body in server.requests) == sorted(
        head + task for task in VIEWS.values()
    )
    assert {json.dumps(body["messages"][0]) for body in server.requests} == {
        json.dumps({"role": "system", "content": generate_train_summaries.SYSTEM})
    }
    assert {
        (body["model"], body["temperature"], body["top_p"], body["max_tokens"])
        for body in server.requests
    } == {("small", 0.3, 0.5, 99)}
    assert len({body["seed"] for body in server.requests}) == 5


def test_a_rerun_sends_only_what_is_missing(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    rows = [bare(i) for i in range(3)]
    with FakeServer() as server:
        first = generate(papers_file(rows), server.url, summaries_per_abstract=2).rows()
        assert len(server.requests) == 6
        assert generate(papers_file(rows), server.url, summaries_per_abstract=2).rows() == first
        assert len(server.requests) == 6
        more = generate(papers_file(rows), server.url, summaries_per_abstract=3).rows()
        assert len(server.requests) == 9
        assert [row["summaries"][:2] for row in more] == [row["summaries"] for row in first]
        assert {asked(body)[1] for body in server.requests[6:]} == {2}
        generate(papers_file([*rows, bare(9)]), server.url, summaries_per_abstract=3)
        assert [asked(body)[0] for body in server.requests[9:]] == ["paper-9"] * 3


@pytest.mark.parametrize(
    "change", [{"temperature": 0.8}, {"top_p": 0.9}, {"max_tokens": 99}, {"model": "other"}]
)
def test_other_parameters_are_other_texts(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], change: dict[str, Any]
) -> None:
    with FakeServer() as server:
        generate(papers_file([bare(1)]), server.url)
        generate(papers_file([bare(1)]), server.url, **change)
        assert len(server.requests) == 8
        generate(papers_file([bare(1)]), server.url)
    assert len(server.requests) == 8


def test_other_words_of_prompt_or_paper_are_other_texts(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], monkeypatch: Any
) -> None:
    with FakeServer() as server:
        versions = generate(papers_file([bare(1)]), server.url).report["prompts"]
        generate(
            papers_file([bare(1, abstract="Another abstract altogether, of the same paper.")]),
            server.url,
        )
        assert len(server.requests) == 8
        monkeypatch.setitem(VIEWS, "finding", "Another task.")
        changed = generate(papers_file([bare(1)]), server.url).report["prompts"]
    assert len(server.requests) == 9
    assert {name for name in versions if versions[name] != changed[name]} == {"finding"}


def test_queries_are_kept_unless_overwritten_and_gzip_is_read_and_written(
    generate: Callable[..., Outcome], tmp_path: Path
) -> None:
    rows = [bare(0), bare(1, query="what I typed"), bare(2)]
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with FakeServer() as server:
        kept = generate(source, server.url, queries=True, output="out.jsonl.gz")
        assert len(server.requests) == 2
        replaced = generate(source, server.url, queries=True, output="out.jsonl.gz", overwrite=True)
        assert len(server.requests) == 3
    answers = [made_up(body) for body in server.requests]
    assert [kept.rows()[i]["query"] for i in (0, 2)] != ["", ""]
    assert kept.code == 0
    assert {row["query"] for row in replaced.rows()} == set(answers)
    assert replaced.output.read_bytes()[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    "kind, counted",
    [
        ("429", "HTTP 429"),
        ("429 date", "HTTP 429"),
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("408", "HTTP 408"),
        ("drop", "connection"),
        ("truncated", "connection"),
        ("not json", "bad body"),
        ("no choices", "bad body"),
        ("stall", "timeout"),
    ],
)
def test_a_fault_is_answered_by_sending_the_request_again(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], kind: str, counted: str
) -> None:
    with FakeServer(misbehave=lambda body, number: kind if number == 0 else None) as server:
        done = generate(papers_file([bare(1)]), server.url, queries=True, timeout=0.5)
    assert done.code == 0
    assert done.report["faults"] == {counted: 1}
    assert server.requests == [server.requests[0]] * 2
    assert done.rows()[0]["query"] == made_up(server.requests[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_body_may_come_in_any_form_of_http(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], form: str
) -> None:
    with FakeServer(misbehave=lambda body, number: form) as server:
        done = generate(papers_file([bare(1), bare(2)]), server.url, concurrency=1)
    assert done.report["faults"] == {}
    assert [text for row in done.rows() for text in row["summaries"]] == list(
        map(made_up, server.requests)
    )


def test_connections_are_used_again(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer() as server:
        generate(papers_file([bare(i) for i in range(10)]), server.url, concurrency=3)
    assert len(server.requests) == 40
    assert server.connections == 3


def test_a_server_is_given_the_time_it_asks_for(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer(misbehave=lambda body, number: "429" if number < 2 else None) as server:
        generate(papers_file([bare(1)]), server.url, queries=True)
    assert all(
        later - earlier >= 0.2
        for earlier, later in zip(server.times, server.times[1:], strict=False)
    )


def test_retries_are_a_budget_and_the_paper_is_tried_again_by_the_next_run(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    source = papers_file([bare(1), bare(2)])
    with FakeServer(
        misbehave=lambda body, number: "500" if asked(body) == ("paper-1", 0) else None
    ) as server:
        done = generate(source, server.url, retries=3, summaries_per_abstract=2)
        assert done.code == 0
        assert Counter(map(asked, server.requests)) == {
            ("paper-1", 0): 4,
            ("paper-1", 1): 1,
            ("paper-2", 0): 1,
            ("paper-2", 1): 1,
        }
        assert done.rows(".failed.jsonl") == [
            {"id": "paper-1", "have": 1, "want": 2, "reasons": {"HTTP 500": 1}}
        ]
        assert [row["id"] for row in done.rows()] == ["paper-2"]
        server.misbehave = lambda body, number: None
        again = generate(source, server.url, summaries_per_abstract=2)
        assert asked(server.requests[-1]) == ("paper-1", 0)
        assert len(server.requests) == 8
    assert [len(row["summaries"]) for row in again.rows()] == [2, 2]
    assert not again.exists(".failed.jsonl")


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("empty", "empty"),
        ("refusal", "refusal"),
        ("study", "speaks of the study"),
        ("cut", "cut off"),
    ],
)
def test_a_bad_text_is_asked_for_again_with_another_seed(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], kind: str, reason: str
) -> None:
    source = papers_file([bare(1)])
    with FakeServer(misbehave=lambda body, number: kind if asked(body)[1] == 0 else None) as server:
        done = generate(source, server.url, attempts=3, summaries_per_abstract=3)
        seeds = [body["seed"] for body in server.requests if asked(body)[1] == 0]
        assert len(set(seeds)) == 3
        assert done.report["rejected"] == {reason: 3}
        assert done.rows(".failed.jsonl") == [
            {"id": "paper-1", "have": 2, "want": 3, "reasons": {reason: 3}}
        ]
        assert len(done.rows()[0]["summaries"]) == 2
        server.misbehave = lambda body, number: None
        again = generate(source, server.url, attempts=3, summaries_per_abstract=3)
    assert server.requests[-1]["seed"] not in seeds
    assert len(again.rows()[0]["summaries"]) == 3
    assert again.report["accepted"] == 1


def test_equal_answers_to_different_prompts_are_not_both_taken(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        "fake_llm_server.sentence",
        lambda body, number=0: "Always the very same sentence comes out of such a model.",
    )
    with FakeServer() as server:
        done = generate(papers_file([bare(1)]), server.url, attempts=2)
    assert len(server.requests) == 1 + 3 * 2
    assert done.report["rejected"] == {"near-duplicate": 6}
    assert done.rows() == []
    assert done.rows(".failed.jsonl")[0]["have"] == 1


@pytest.mark.parametrize(
    "status, word", [("401", "OPENAI_API_KEY"), ("403", "OPENAI_API_KEY"), ("404", "--base-url")]
)
def test_a_server_that_takes_nothing_ends_the_run(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], status: str, word: str
) -> None:
    source = papers_file([bare(i) for i in range(50)])
    with FakeServer(misbehave=lambda body, number: status if number >= 8 else None) as server:
        done = generate(source, server.url, concurrency=4)
        assert done.code == 1
        assert done.error.startswith("error: ")
        assert status in done.error
        assert word in done.error
        assert len(server.requests) <= 8 + 4
        assert len(done.rows(".journal.jsonl")) == 8
        assert not done.exists()
        server.misbehave = lambda body, number: None
        assert generate(source, server.url, concurrency=4).code == 0
    assert server.kinds.count(None) == 200


def test_a_text_that_the_server_does_not_take_fails_its_paper_only(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer(
        misbehave=lambda body, number: "400" if asked(body)[0] == "paper-1" else None
    ) as server:
        done = generate(papers_file([bare(i) for i in range(3)]), server.url, concurrency=1)
    assert done.code == 0
    assert Counter(asked(body)[0] for body in server.requests) == {
        "paper-0": 4,
        "paper-1": 1,
        "paper-2": 4,
    }
    (failed,) = done.rows(".failed.jsonl")
    assert failed["id"] == "paper-1"
    assert "made-up 400" in next(iter(failed["reasons"]))


def test_a_run_that_gets_no_paper_its_texts_fails(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    """A server of another model answers every request with 400: too few papers to call it gone, and
    an empty file is no success.
    """
    with FakeServer(misbehave=lambda body, number: "400") as server:
        done = generate(papers_file([bare(i) for i in range(3)]), server.url)
    assert (done.code, done.rows()) == (1, [])
    assert ".failed.jsonl" in done.error
    assert [row["have"] for row in done.rows(".failed.jsonl")] == [0, 0, 0]


@pytest.mark.parametrize(
    "kind, said", [("400", "HTTP 400"), ("500", "HTTP 500"), (None, "connection")]
)
def test_a_server_that_is_gone_ends_the_run_at_once(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], kind: str | None, said: str
) -> None:
    with socket.socket() as nobody, FakeServer(misbehave=lambda body, number: kind) as server:
        nobody.bind(("127.0.0.1", 0))
        url = server.url if kind else f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        start = time.monotonic()
        done = generate(papers_file([bare(i) for i in range(100)]), url)
    assert done.code == 1
    assert int(done.error.split()[1]) >= 50
    assert "requests in a row failed" in done.error
    assert said in done.error
    assert time.monotonic() - start < 20
    assert len(server.requests) <= 50 + 32


def test_a_short_outage_is_waited_out(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    """More than fifty failures in a row, but not a minute of them."""
    with FakeServer(
        misbehave=lambda body, number: "drop" if 10 <= number < 100 else None
    ) as server:
        done = generate(papers_file([bare(i) for i in range(20)]), server.url, concurrency=20)
    assert done.code == 0
    assert done.report["faults"] == {"connection": 90}
    assert [len(row["summaries"]) for row in done.rows()] == [4] * 20


def test_fewer_requests_at_a_time_after_429_and_slowly_more_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = llm.Client(
        Flags(Path("a"), Path("b"), ("http://127.0.0.1:1/v1",), "m", concurrency=100)
    )
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for later, limit in ((0.0, 70.0), (0.5, 70.0), (1.0, 49.0), (2.0, 34.3)):
        now = 1000.0 + later
        client._count_fault("HTTP 429")
        assert client.limit == pytest.approx(limit)
    client._count_fault("HTTP 500")
    assert client.limit == pytest.approx(34.3)
    for _ in range(20):
        now += 1
        client._count_fault("HTTP 429")
    assert client.limit == 1


def test_a_server_with_room_for_four_gets_all_work_done(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer(latency=0.02) as server:
        server.misbehave = lambda body, number: "429" if server.active >= 4 else None
        done = generate(
            papers_file([bare(i) for i in range(10)]), server.url, concurrency=16, retries=100
        )
    assert done.code == 0
    assert [len(row["summaries"]) for row in done.rows()] == [4] * 10
    assert server.most_active <= 16


def test_papers_take_turns_among_servers_and_a_retry_goes_to_the_next(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with (
        FakeServer() as one,
        FakeServer() as two,
        FakeServer(misbehave=lambda body, number: "500") as broken,
    ):
        generate(papers_file([bare(i) for i in range(6)]), one.url, two.url)
        assert {asked(body)[0] for body in one.requests} == {"paper-0", "paper-2", "paper-4"}
        assert {asked(body)[0] for body in two.requests} == {"paper-1", "paper-3", "paper-5"}
        done = generate(
            papers_file([bare(i) for i in range(6, 12)]), one.url, broken.url, retries=1
        )
    assert done.code == 0
    assert [len(row["summaries"]) for row in done.rows()] == [4] * 6
    assert len(broken.requests) == 12


def test_the_key_is_sent_and_stands_nowhere(
    generate: Callable[..., Outcome],
    papers_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = "sk-made-up-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key + "\n")
    said = ""
    source = papers_file([bare(i) for i in range(3)])
    for kind in (None, f"400 wrong {key}", f"401 {key}", f"500 {key}", "not json", "drop"):
        with FakeServer(misbehave=lambda body, number, kind=kind: kind) as server:  # type: ignore[misc]
            said += generate(source, server.url, output=f"{str(kind)[:3]}.jsonl", retries=1).said
        assert server.keys == {f"bearer {key}"}
    assert "***" in (source.parent / "made" / "400.jsonl.failed.jsonl").read_text()
    assert key not in said
    assert not [
        path
        for path in source.parent.rglob("*")
        if path.is_file() and key.encode() in path.read_bytes()
    ]


def test_the_estimate_is_the_sum_of_the_missing_requests(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    rows = [bare(i) for i in range(3)]
    with FakeServer() as server:
        generate(papers_file(rows[:1]), server.url)
        sent = len(server.requests)
        done = generate(
            papers_file(rows), server.url, estimate=True, price_in=1000, price_out=10_000
        )
        assert (done.code, len(server.requests)) == (0, sent)
        generate(papers_file(rows), server.url)
    missing = server.requests[sent:]
    tokens = sum(
        sum(len(message["content"]) for message in body["messages"]) // 4 for body in missing
    )
    assert f"8 missing: {len(missing)} requests" in done.said
    assert f"about {tokens} tokens to read" in done.said
    assert f"at most {8 * 120} to write" in done.said
    assert f"{(tokens * 1000 + 8 * 120 * 10_000) / 1e6:.2f}" in done.said


def test_max_cost_stops_in_time_and_a_higher_one_goes_on(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    """An answer of sixteen tokens costs 16."""
    source = papers_file([bare(i) for i in range(20)])
    with FakeServer(latency=0.01) as server:
        done = generate(source, server.url, concurrency=4, price_out=1e6, max_cost=16 * 20)
        assert done.code == 1
        assert "--max-cost" in done.error
        assert 20 <= len(server.requests) <= 20 + 4
        assert (
            done.report["cost"]
            == 16 * len(server.requests)
            == 16 * len(done.rows(".journal.jsonl"))
        )
        assert all(len(row["summaries"]) >= 2 for row in done.rows())
        assert len(done.rows()) in (5, 6)
        assert sum(row["want"] - row["have"] for row in done.rows(".failed.jsonl")) == 80 - len(
            server.requests
        )
        assert generate(source, server.url, price_out=1e6, max_cost=16 * 20).code == 1
        assert len(server.requests) <= 24
        done = generate(source, server.url, price_out=1e6, max_cost=16 * 1000)
    assert (done.code, len(server.requests), len(done.rows())) == (0, 80, 20)
    assert done.report["cost_of_all_runs"] == 16 * 80


def test_structured_requests_ask_for_all_missing_texts_at_once(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    def numbers(body: Body) -> int:
        return int(
            body["response_format"]["json_schema"]["schema"]["properties"]["texts"]["maxItems"]
        )

    with FakeServer() as server:
        done = generate(papers_file([bare(i) for i in range(3)]), server.url, structured=True)
        first = done.rows()
        assert [numbers(body) for body in server.requests] == [4] * 3
        assert {body["max_tokens"] for body in server.requests} == {480}
        assert all(
            "Write 4 different sentences" in body["messages"][1]["content"]
            for body in server.requests
        )
        more = generate(
            papers_file([bare(i) for i in range(3)]),
            server.url,
            structured=True,
            summaries_per_abstract=6,
        )
        assert [numbers(body) for body in server.requests[3:]] == [2] * 3
    assert [row["summaries"] for row in first] == [row["summaries"][:4] for row in more.rows()]
    assert [len(row["summaries"]) for row in more.rows()] == [6] * 3
    assert [row["completion_tokens"] for row in more.rows(".journal.jsonl")] == [
        4 * 16 + 1,
        0,
        0,
        0,
    ] * 3 + [2 * 16 + 1, 0] * 3


def test_the_whole_texts_of_a_cut_list_are_kept_and_the_rest_is_asked_for(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer(misbehave=lambda body, number: "cut" if number == 0 else None) as server:
        done = generate(papers_file([bare(1)]), server.url, structured=True)
    first, second = server.requests
    assert done.rows()[0]["summaries"] == [
        made_up(first, 0),
        made_up(first, 1),
        made_up(second, 0),
        made_up(second, 1),
    ]
    assert done.report["rejected"] == {"cut off": 2}


# Ends of runs


@pytest.mark.parametrize("shards, queries", [(3, False), (8, True)])
def test_the_journals_of_shards_put_together_give_the_file_of_one_run(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], shards: int, queries: bool
) -> None:
    """Byte for byte, with seven papers, one of them a bad line, without another request; each paper
    is asked about by one shard alone.
    """
    rows = [bare(i, summaries=["an old one", "and another"]) for i in range(7)]
    source = papers_file([*rows[:2], {"id": "bad"}, *rows[2:]])
    flags: dict[str, Any] = {"queries": queries, "skip_invalid": True}
    with FakeServer(misbehave=misbehaviour(random.Random(0))) as server:
        one = generate(source, server.url, **flags, output="one.jsonl", attempts=9)
        whole, sent = one.output.read_bytes(), len(server.requests)
        parts = [
            generate(source, server.url, **flags, shard=f"{i}/{shards}", attempts=9)
            for i in range(1, shards + 1)
        ]
        assert {body["messages"][1]["content"] for body in server.requests[:sent]} == {
            body["messages"][1]["content"] for body in server.requests[sent:]
        }
        outputs = [
            one.output.with_name(f"shard-{i}-of-{shards}.out.jsonl") for i in range(1, shards + 1)
        ]
        assert [
            [json.loads(line)["id"] for line in path.read_bytes().splitlines()] for path in outputs
        ] == [[row["id"] for row in rows[i::shards]] for i in range(shards)]
        assert not parts[0].exists(".journal.jsonl")
        journals = [Path(f"{path}.journal.jsonl") for path in outputs]
        Path(f"{parts[0].output}.journal.jsonl").write_bytes(
            b"".join(path.read_bytes() for path in journals if path.exists())
        )
        sent = len(server.requests)
        merged = generate(source, server.url, **flags)
        assert len(server.requests) == sent
    assert merged.output.read_bytes() == whole
    assert merged.report["accepted"] == 0


@pytest.mark.parametrize(
    "shard", ["0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", "\u0661/\u0662", ""]
)
def test_a_shard_that_is_none_is_refused(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], shard: str
) -> None:
    done = generate(papers_file([bare(1)]), "http://127.0.0.1:1/v1", shard=shard)
    assert (done.code, done.said.count("\n")) == (2, 1)
    assert "is no shard; give i/n" in done.error
    assert not done.output.parent.exists()


def test_a_damaged_row_of_the_journal_is_asked_for_again_and_others_are_not(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    """A changed letter, a refusal that became an accepted text, a row of another shape; rows of
    earlier versions, which have no sum, count.
    """
    source = papers_file([bare(i) for i in range(3)])
    with FakeServer(misbehave=lambda body, number: "refusal" if number == 0 else None) as server:
        first = generate(source, server.url, concurrency=1)
        journal = Path(f"{first.output}.journal.jsonl")
        rows = first.rows(".journal.jsonl")
        assert [("rejected" in row, "sum" in row) for row in rows] == [(True, True)] + [
            (False, True)
        ] * 12
        rows[0].pop("rejected")
        rows[1]["text"] = rows[1]["text"].upper()
        rows[2]["key"] = str(rows[2]["key"])
        del rows[3]["completion_tokens"]
        del rows[4]["sum"]
        journal.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sent = len(server.requests)
        again = generate(source, server.url, concurrency=1)
        assert Counter(map(asked, server.requests[sent:])) == Counter(
            (row["id"], row["slot"]) for row in rows[1:4]
        )
    assert "left out 4 torn or damaged rows" in again.said
    assert again.code == 0
    assert len(again.rows(".journal.jsonl")) == 9 + 3


KEY, TOKEN = "sk-planted-0123456789", "hf_planted0123456789"


def test_secrets_are_in_nothing_that_is_said_or_written(
    papers_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong: a server that says the key in its error, in its answers, or nothing at
    all, and a fault of our own with the key in its message.
    """

    crash = (
        "import os, files; files.run_command(lambda: {}['Bearer ' + os.environ['OPENAI_API_KEY']])"
    )
    environment: dict[str, Any] = {"OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN, "OPENAI_LOG": "debug"}
    source, said = papers_file([bare(i) for i in range(2)]), ""
    monkeypatch.setattr(
        fake_llm_server, "sentence", lambda body, number=0: f"{KEY} {made_up(body, number)}"
    )
    with FakeServer() as server:
        urls = dict.fromkeys(("401", "400", "none"), server.url) | {
            "gone": "http://127.0.0.1:1/v1",
            "tls": "https" + server.url[4:],
        }
        for kind, url in urls.items():
            server.misbehave = lambda body, number, kind=kind: (
                f"{kind} wrong key {KEY}, token {TOKEN}" if kind.isdigit() else None
            )  # type: ignore[misc]
            words = (
                "--input",
                source,
                "--output",
                tmp_path / f"{kind}.jsonl",
                "--base-url",
                url,
                "--model",
                "m",
                "--retries",
                "0",
                "--timeout",
                "5",
            )
            done = run_script("generate_train_summaries.py", *words, **environment)
            assert (done.returncode, "Traceback" in done.stderr) == (int(kind != "none"), False), (
                done.stderr
            )
            said += done.stdout + done.stderr
        assert server.keys == {f"bearer {KEY}"}
    done = run_script("-c", crash, **environment)
    assert "KeyError: 'Bearer ***'" in done.stderr
    written = "".join(
        path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "wrong key ***, token ***" in written
    assert [
        len(json.loads(line)["summaries"])
        for line in (tmp_path / "none.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [4, 4]
    assert not [secret for secret in (KEY, TOKEN) if secret in said + done.stderr + written]


@pytest.mark.parametrize(
    "key", ["sk-one\r\nX-Other: header", "sk-\u00e4\u00f6\u00fc-0123456789", "sk-\x1b[31m012345"]
)
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    generate: Callable[..., Outcome],
    papers_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FakeServer() as server:
        done = generate(papers_file([bare(1)]), server.url)
    assert (done.code, server.requests, done.output.parent.exists()) == (2, [], False)
    assert (
        done.error
        == "error: OPENAI_API_KEY holds characters that no HTTP header may; set it again, on one"
        " line"
    )


@pytest.mark.parametrize("torn", [b'{"key": 1, "id": "pa', b"\x00\x00\x00", b'{"key": 1}'])
def test_a_torn_last_line_of_the_journal_costs_nothing_else(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], torn: bytes
) -> None:
    source = papers_file([bare(i) for i in range(3)])
    with FakeServer() as server:
        first = generate(source, server.url)
        journal = Path(f"{first.output}.journal.jsonl")
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:-1]) + torn)
        again = generate(source, server.url)
    assert len(server.requests) == 13
    assert again.rows() == first.rows()
    assert len(again.rows(".journal.jsonl")) == 12


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_paid(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    source, append, room = papers_file([bare(i) for i in range(10)]), files.Journal.append, 15

    def full(journal: files.Journal, row: dict[str, Any]) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(journal, row)

    with FakeServer(latency=0.01) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Journal, "append", full)
        done = generate(source, server.url, concurrency=4)
        assert done.code == 1
        assert done.error.startswith("error: No space left on device; free some disk space")
        assert not done.exists()
        kept = {(row["id"], row["slot"]) for row in done.rows(".journal.jsonl")}
        assert len(kept) == 15
        before = len(server.requests)
        patch.undo()
        assert generate(source, server.url).code == 0
        assert not kept & set(map(asked, server.requests[before:]))
        assert len(server.requests) == before + 40 - 15


def test_two_runs_at_once_on_one_output_are_refused(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path], tmp_path: Path
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
        ({"temperature": "nan"}, "--temperature"),
        ({"timeout": 0}, "--timeout"),
        ({"attempts": 0}, "--attempts"),
        ({"max_cost": 1}, "--price-in"),
        ({"summaries_per_abstract": 1}, "--summaries-per-abstract"),
        ({"base_url": "ftp://a/v1"}, "--base-url"),
        ({"base_url": "http://me:secret@a/v1"}, "OPENAI_API_KEY"),
        ({"base_url": "http://a/v1?key=secret"}, "OPENAI_API_KEY"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(
    generate: Callable[..., Outcome],
    papers_file: Callable[..., Path],
    flags: dict[str, Any],
    word: str,
) -> None:
    done = generate(
        papers_file([bare(1)]), *([] if "base_url" in flags else ["http://127.0.0.1:1/v1"]), **flags
    )
    assert done.code == 2
    assert word in done.error
    assert "secret" not in done.said
    assert done.said.count("\n") == 1
    assert not done.output.parent.exists()


def test_bad_input_is_found_before_anything_is_sent(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    with FakeServer() as server:
        done = generate(
            papers_file([bare(1), bare(2), {"id": "x", "title": "no abstract"}]), server.url
        )
        assert (done.code, server.requests) == (2, [])
        assert 'papers.jsonl:3: key "abstract" is missing' in done.error
        assert not list(done.output.parent.iterdir())
        skipping = generate(
            papers_file([bare(1), bare(2), {"id": "x", "title": "no abstract"}]),
            server.url,
            skip_invalid=True,
        )
        assert len(skipping.rows()) == 2
        same = generate(skipping.output, server.url, output="out.jsonl")
        circle = skipping.output.with_name("circle.jsonl")
        circle.symlink_to(circle)
        os.mkfifo(pipe := skipping.output.with_name("pipe.jsonl"))
        others = [generate(path, server.url) for path in (circle, pipe)]
    assert same.code == 2
    assert "is a folder or the input" in same.error
    # Guards against: a traceback of pathlib, and a pipe that waits for ever, or is empty when it is
    # read the second time.
    assert [one.code for one in others] == [2, 2]
    assert "cannot be read (Too many levels of symbolic links)" in others[0].error
    assert "is a pipe or device, and papers are read three times" in others[1].error


def test_openai_is_imported_only_when_it_is_needed() -> None:
    done = run_script(
        "-c",
        "import sys, generate_train_summaries, generate_search_queries; print('openai' in"
        " sys.modules, 'torch' in sys.modules)",
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_answers_in_flight_and_keeps_them(
    papers_file: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    source, output = papers_file([bare(i) for i in range(100)]), tmp_path / "out.jsonl"
    with (
        FakeServer(latency=0.3) as server,
        started(source, output, server.url, "--concurrency", "8") as process,
    ):
        wait_for(lambda: len(server.requests) >= 20, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert len(server.requests) < 60
    assert Counter((row["id"], row["slot"]) for row in whole_rows(output)) == Counter(
        map(asked, server.requests)
    )
    assert not output.exists()


def test_a_second_ctrl_c_ends_at_once(papers_file: Callable[..., Path], tmp_path: Path) -> None:
    with (
        FakeServer(latency=20) as server,
        started(papers_file([bare(1)]), tmp_path / "out.jsonl", server.url) as process,
    ):
        wait_for(lambda: len(server.requests) >= 4, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - start < 4


def test_a_quarter_of_misbehaviour_leaves_texts_or_reasons(
    generate: Callable[..., Outcome], papers_file: Callable[..., Path]
) -> None:
    """All kinds of fault at once; a stall is longer than the timeout."""
    rows = [bare(i) for i in range(60)]
    with FakeServer(misbehave=at_random(0.25), latency=0.005) as server:
        done = generate(papers_file(rows), server.url, concurrency=32, timeout=1, attempts=2)
    assert done.code == 0
    assert set(server.kinds) == {None, *KINDS}
    # a stalled request lives on in the server
    assert server.most_active <= 32 + server.kinds.count("stall")
    failed = (
        {row["id"]: row for row in done.rows(".failed.jsonl")}
        if done.exists(".failed.jsonl")
        else {}
    )
    assert all(row["reasons"] for row in failed.values())
    written = {row["id"]: row["summaries"] for row in done.rows()}
    for row in rows:
        have = failed[row["id"]]["have"] if row["id"] in failed else 4
        assert len(set(written.get(row["id"], []))) == (have if have >= 2 else 0)
    assert list(written) == [row["id"] for row in rows if row["id"] in written]
    accepted = Counter(
        (row["id"], row["slot"]) for row in done.rows(".journal.jsonl") if "rejected" not in row
    )
    assert set(accepted.values()) == {1}
    assert done.report["rejected"] == Counter(
        row["rejected"] for row in done.rows(".journal.jsonl") if "rejected" in row
    )
