"""Bad input and strange papers given to the scripts: bad input ends in one printable line, and
strange papers are used and shown unchanged.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import ROOT, make_paper, run_script
from hostile import BAD_LINES, NASTY, Place, jsonl, nasty_papers
from test_report import Page

import collect_papers
from load_data import read_training_papers
from semantic_benchmark import read_evaluation_papers
from semcse import command_line
from semcse.generation import GenerationFlags, GenerationTask, generate_texts
from semcse.papers import LONGEST_WORD, read_papers
from settings import Settings, complete

SCRIPTS: dict[str, Callable[[Path, Path], Any]] = {
    "train": lambda path, out: read_training_papers(complete(Settings(train_file=str(path))), []),
    "benchmark": lambda path, out: read_evaluation_papers(str(path)),
    "collect": lambda path, out: collect_papers.CollectedPapers(
        collect_papers.Command(
            output=str(out), input=str(ROOT / "data/sample_test.jsonl"), exclude=(str(path),)
        )
    ),
    "generate": lambda path, out: generate_texts(
        GenerationFlags(path, out, ("http://127.0.0.1:9/v1",), "m", estimate=True),
        GenerationTask("query", "", {"query": "Write."}, texts=1, min_texts=1, words=(2, 9)),
    ),
}


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """`run_command` sets a signal handler and an exception hook."""
    before, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    yield
    signal.signal(signal.SIGTERM, before)
    sys.excepthook = hook


@pytest.mark.parametrize(
    "place, what",
    [
        pytest.param(*case[1:], id=case[0])
        for case in faults.BAD
        if "bomb" not in case[0] and "pipe" not in case[0]
    ],
)
def test_every_script_refuses_bad_input_in_one_printable_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Place, what: str
) -> None:
    """The line names the first fault. A key that a script does not need may be missing."""
    inside = tmp_path / "in"
    inside.mkdir()
    with place(inside) as path:
        for name, script in SCRIPTS.items():
            if name in ("collect", "generate") and os.geteuid() != os.getuid():
                continue  # another user, who may not write into the folder either
            code = command_line.run_command(partial(script, path, tmp_path / "out.jsonl"))
            line = capsys.readouterr().err.removesuffix("\n")
            assert line.isprintable()
            if (
                re.match('key "(title|abstract|summaries)" is (missing|blank)', what)
                and what not in line
            ):
                assert code == 0 or "have two different summaries" in line
            else:
                assert (code, line[:7]) == (2, "error: "), name
                assert what.split("\\")[0] in line or "pipe or device" in line
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_strange_papers_are_trained_on_benchmarked_and_shown_as_they_are(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """A run of main.py: none of their code is in the page or reaches the terminal, and the page's
    map holds their titles.
    """
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = [
        row | {"id": f"train-{i}", "abstract": "", "title": ""}
        for i, row in enumerate(nasty_papers())
    ]
    train.write_bytes(jsonl(*rows, *map(make_paper, range(8))))
    evaluation.write_bytes(jsonl(*nasty_papers()))
    flags = "--max-steps 2 --batch-size 8 --validate-every 2 --device cpu".split()
    flags += ["--train-file", str(train), "--eval-file", str(evaluation)]
    flags += ["--encoder", str(tiny_bert), "--output-dir", str(tmp_path / "run")]
    done = run_script("main.py", *flags)
    assert done.returncode == 0, done.stderr
    assert re.sub(r"[\r\n]", "", done.stdout + done.stderr).isprintable()
    assert not [line for line in done.stderr.splitlines() if "Warning" in line]
    page = Page(tmp_path / "run" / "report.html")
    titles, fields = (json.loads(page.scripts[0])[key] for key in ("titles", "fields"))
    assert titles == [
        row["title"][:300].rstrip("\0") for row in nasty_papers() if row["field"].strip()
    ]
    assert page.tags.count("script") == 2
    assert not {"svg", "img"} & set(page.tags[page.tags.index("noscript") :])
    assert len(titles) == len(NASTY)
    assert {r"\x1b[31mred", "</script><svg onload=alert(3)>", r"$\notacommand{", "| --- |"} <= set(
        fields
    )


def test_a_bomb_is_refused_with_little_memory(tmp_path: Path) -> None:
    """Reading a gzip file whose only line has 256 MiB takes the memory of a line of 16 MiB."""
    place = next(
        place for name, place, _ in faults.BAD if name == "file: gzip bomb, one line of 256 MiB"
    )
    code = """
import resource, sys
from semcse import command_line, papers
command_line.run_command(lambda: list(papers.read_papers(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    with place(tmp_path) as path:
        small = run_script("-c", code, "/dev/null")
        large = run_script("-c", code, path)
    assert "line is longer than 16 MiB" in large.stderr
    assert int(large.stdout) - int(small.stdout) < 100 * 1024


def test_what_is_collected_from_strange_rows_is_a_papers_file(tmp_path: Path) -> None:
    """Half surrogate pairs, over-long words and ids, and duplicate keys are errors in papers files,
    but collect_papers.py repairs them in other people's rows.

    Guards against: papers that the papers reader then refuses, and a comparison of texts that takes
    minutes.
    """
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    words = ("surrogate pair", "a key twice", "id of 1,001", "a word of", "a letter with")
    lines = [
        line.replace(b"paper-7", f"strange-{i}".encode())
        for i, (name, line, _, _) in enumerate(BAD_LINES)
        if any(word in name for word in words) and b"\xed" not in line  # which is not UTF-8
    ]
    source.write_bytes(jsonl(*nasty_papers()) + b"\n".join(lines) + b"\n")
    collect_papers.collect(
        collect_papers.Command(output=str(output), input=str(source), min_words=1)
    )
    found = {paper.title: paper for paper in read_papers(output, ("title", "abstract"))}
    assert len(found) >= len(NASTY)
    assert all(" ".join(row["title"].split()) in found for row in nasty_papers())
    longest = {
        paper.id: max(map(len, f"{paper.title} {paper.abstract}".split()))
        for paper in found.values()
    }
    assert max(longest.values()) == LONGEST_WORD
    assert max(map(len, longest)) <= 1_000
