"""The sample papers keep the promises of data/README.md: counts, lengths, and texts that are not
copied from each other. Whether the papers make sense is left to human readers.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from conftest import ROOT

from semantic_benchmark import halves
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import read_papers

Row = dict[str, Any]
TOPIC_NUMBERS = {"sample_train.jsonl": (1, 2), "sample_test.jsonl": (3, 4, 5)}
KEYS = {"id", "title", "abstract", "summaries", "query", "field", "topic"}
LENGTHS = {"title": (4, 22), "abstract": (130, 220), "query": (3, 14)}  # in words
ABOUT_ITSELF = re.compile(
    r"\b(this|these|the|present) (study|studies|paper|article|authors?|work|research)\b"
    r"|\b(we|our|us)\b",
    re.IGNORECASE,
)


@cache
def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def ngrams(text: str, n: int) -> frozenset[str]:
    parts = words(text)
    return frozenset(" ".join(parts[i : i + n]) for i in range(len(parts) - n + 1))


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?]['\")]?(?=\s+['\"(]?[A-Z0-9]|$)", text))


def texts_of(row: Row) -> list[str]:
    return [row["title"], row["abstract"], row["query"], *row["summaries"]]


def problems_of_paper(row: Row) -> Iterator[str]:
    """What is wrong with one paper by itself."""
    if row.keys() != KEYS or len(row["summaries"]) != 4:
        yield f"keys or summaries are wrong: {row}"
        return
    title, abstract, query = row["title"], row["abstract"], row["query"]
    for text in texts_of(row):
        if not (text.isascii() and text.isprintable()) or text != " ".join(text.split()):
            yield f"not plain ASCII with single spaces: {text[:40]!r}"
    for key, (least, most) in LENGTHS.items():
        if not least <= len(row[key].split()) <= most:
            yield f"{key} has {len(row[key].split())} words"
    checks = {
        "abstract has too few sentences": sentences(abstract) >= 5,
        "abstract repeats the title": " ".join(words(title)) not in " ".join(words(abstract)),
        "query copies the title": not ngrams(query, 5) & ngrams(title, 5),
        "query copies the abstract": not ngrams(query, 5) & ngrams(abstract, 5),
        "query has only words of the title": not set(words(query)) <= set(words(title)),
    }
    yield from (problem for problem, passed in checks.items() if not passed)
    for number, text in enumerate(row["summaries"]):
        for problem in problems_of_summary(text, title, abstract):
            yield f"summary {number} {problem}"
    for one, two in combinations(row["summaries"], 2):
        first, second = set(words(one)), set(words(two))
        overlap = len(first & second) / len(first | second)
        if overlap > 0.45 or ngrams(one, 5) & ngrams(two, 5):
            yield f"two summaries are alike: {one[:40]}"


def problems_of_summary(text: str, title: str, abstract: str) -> Iterator[str]:
    if not 12 <= len(text.split()) <= 40:
        yield f"has {len(text.split())} words"
    if sentences(text) != 1 or not text.endswith("."):
        yield "is not one sentence"
    if ABOUT_ITSELF.search(text):
        yield "speaks of the study instead of its subject"
    copied = len(ngrams(text, 3) & ngrams(abstract, 3)) / max(1, len(ngrams(text, 3)))
    if ngrams(text, 6) & ngrams(abstract, 6) or copied > 0.25:
        yield "copies the abstract"
    if ngrams(text, 5) & ngrams(title, 5):
        yield "copies the title"


def problems_between_papers(papers: list[Row]) -> Iterator[str]:
    """Texts or openings that several papers share."""
    for key in ("id", "title", "abstract", "query"):
        counts = Counter(" ".join(words(row[key])) for row in papers)
        yield from (f"{key} used {n} times: {text[:60]}" for text, n in counts.items() if n > 1)
    openings = (
        ("abstracts", 3, 1, [row["abstract"] for row in papers]),
        ("abstracts", 1, len(papers) // 20, [row["abstract"] for row in papers]),
        ("summaries", 3, 2, [text for row in papers for text in row["summaries"]]),
    )
    for name, length, most, texts in openings:
        counts = Counter(" ".join(words(text)[:length]) for text in texts)
        yield from (f'{n} {name} open with "{text}"' for text, n in counts.items() if n > most)
    first_paper: dict[str, str] = {}
    for row in papers:
        for ngram in {ngram for text in texts_of(row) for ngram in ngrams(text, 7)}:
            if (first := first_paper.setdefault(ngram, row["id"])) != row["id"]:
                yield f'{first} and {row["id"]} share "{ngram}"'


def problems(papers: list[Row]) -> list[str]:
    """Everything that is wrong with the sample papers."""
    found = [f"{row['id']}: {problem}" for row in papers for problem in problems_of_paper(row)]
    return found or list(problems_between_papers(papers))


@pytest.fixture(scope="module")
def sample() -> dict[str, list[Row]]:
    texts = {file: (ROOT / "data" / file).read_text(encoding="utf-8") for file in TOPIC_NUMBERS}
    return {file: [json.loads(line) for line in text.splitlines()] for file, text in texts.items()}


def test_the_sample_papers_have_no_problems(sample: dict[str, list[Row]]) -> None:
    assert problems([row for rows in sample.values() for row in rows]) == []


def test_ids_fields_and_topics_agree_with_the_table_of_the_readme(
    sample: dict[str, list[Row]],
) -> None:
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("## Topics")[1]
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in readme.splitlines()
        if line.startswith("|")
    ][2:]
    assert len(table) == 19
    for column, (file, numbers) in enumerate(TOPIC_NUMBERS.items(), start=1):
        expected = {
            f"{cells[0].lower().replace(' ', '-')}-{number}-{paper}": (cells[0], topic)
            for cells in table
            for number, topic in zip(numbers, cells[column].split("; "), strict=True)
            for paper in range(1, 5)
        }
        assert {row["id"]: (row["field"], row["topic"]) for row in sample[file]} == expected
        assert len(sample[file]) == len(expected)


def test_the_project_can_train_and_evaluate_on_them() -> None:
    """No training paper counts as an evaluation paper, and every paper is in all four tasks."""
    train, test = (list(read_papers(ROOT / "data" / name, need=KEYS)) for name in TOPIC_NUMBERS)
    assert len(train) == 152
    assert all(len(paper.summaries) >= 2 for paper in train)
    kept, dropped = drop_seen(train, SeenPapers(test))
    assert len(kept) == 152
    assert not dropped
    assert all(halves(paper.abstract) for paper in test)


def replace(key: str, make: Callable[[Row, Row], Any]) -> Callable[[Row, Row], None]:
    """A change of one value of the first paper, computed from the first and the last paper."""
    return lambda row, other: row.update({key: make(row, other)})


def replace_summary(make: Callable[[Row], str]) -> Callable[[Row, Row], None]:
    """A change of the last summary of the first paper."""
    return replace("summaries", lambda row, other: [*row["summaries"][:3], make(row)])


def first_words(text: str, n: int) -> str:
    return " ".join(text.split()[:n])


BROKEN: dict[str, Callable[[Row, Row], object]] = {
    "keys or summaries are": lambda row, other: row.pop("query"),
    "not plain ASCII": replace("title", lambda row, other: row["title"] + "\u2019"),
    "abstract has 129 words": replace("abstract", lambda row, _: first_words(row["abstract"], 129)),
    "abstract repeats": replace("abstract", lambda row, _: f"{row['abstract']} {row['title']}."),
    "query copies": replace("query", lambda row, other: first_words(row["title"], 5)),
    "two summaries are alike": replace_summary(lambda row: row["summaries"][1]),
    "summary 3 copies the abstract": replace_summary(lambda row: row["abstract"].split(". ")[0]),
    "summary 3 speaks of": replace_summary(lambda row: "We find that " + row["summaries"][3]),
    "title used 2 times": replace("title", lambda row, other: other["title"].upper()),
    '2 abstracts open with "': replace(
        "abstract", lambda row, other: f"{first_words(other['abstract'], 3)} {row['abstract']}"
    ),
    "share": replace("query", lambda row, other: first_words(other["summaries"][3], 7)),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_the_checks_find_broken_papers(sample: dict[str, list[Row]], expected: str) -> None:
    papers = copy.deepcopy([row for rows in sample.values() for row in rows])
    BROKEN[expected](papers[0], papers[-1])
    assert any(expected in problem for problem in problems(papers))
