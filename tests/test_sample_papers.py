"""The sample papers keep the promises of data/README.md: counts, lengths, variety, nothing copied.
`problems` is the checker; broken copies show that it bites.

Reading the papers for sense (units, logic, real names) is left to people: no rule here can do it.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from conftest import ROOT

from load_data import trainable
from semantic_benchmark import halves
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import normalise, read_papers

Row = dict[str, Any]
Sample = dict[str, list[Row]]  # file name -> its rows

FIELDS = (
    "Art",
    "Biology",
    "Business",
    "Chemistry",
    "Computer science",
    "Economics",
    "Engineering",
    "Environmental science",
    "Geography",
    "Geology",
    "History",
    "Materials science",
    "Mathematics",
    "Medicine",
    "Philosophy",
    "Physics",
    "Political science",
    "Psychology",
    "Sociology",
)
TOPIC_NUMBERS = {"sample_train.jsonl": (1, 2), "sample_test.jsonl": (3, 4, 5)}
PAPERS_A_TOPIC = 4
KEYS = ("id", "title", "abstract", "summaries", "query", "field", "topic")
TEXT_KEYS = ("id", "title", "abstract", "query", "field", "topic")
SUMMARIES = 4

ABSTRACT_WORDS = (130, 220)
ABSTRACT_SENTENCES = 5  # at least
TITLE_WORDS = (4, 22)
QUERY_WORDS = (3, 14)
SUMMARY_WORDS = (12, 40)
RUN_BETWEEN_PAPERS = 7  # so many words in a row stand in the texts of one paper only
RUN_SUMMARY_ABSTRACT = 6
RUN_WITHIN_PAPER = 5  # between two summaries, a summary and the title, the query and the rest
# largest share of a summary's word triples that may stand in its abstract
TRIPLES_IN_ABSTRACT = 0.25
# largest overlap (intersection over union) of the words of two summaries of a paper
SAME_WORDS = 0.45
SUMMARY_OPENING = 2  # so often at most may three words open a summary
FIRST_WORD = 0.05  # share of the abstracts that may open with one and the same word
SELF_REFERENCE = re.compile(
    r"\b(this|these|the|present)"
    r" (study|studies|paper|article|authors?|work|research)\b|\b(we|our|us)\b",
    re.IGNORECASE,
)


@cache
def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def runs(text: str, length: int) -> frozenset[str]:
    """Every run of so many words of a text."""
    parts = words(text)
    return frozenset(" ".join(parts[i : i + length]) for i in range(len(parts) - length + 1))


def opening(text: str) -> str:
    return " ".join(words(text)[:3])


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?]['\")]?(?=\s+['\"(]?[A-Z0-9]|$)", text))


def problems(sample: Sample) -> list[str]:
    """Everything that is wrong with the sample papers, one line each, naming the paper."""
    papers = [row for rows in sample.values() for row in rows]
    malformed = [problem for row in papers for problem in form_problems(row)]
    if malformed:
        return malformed  # the other rules presume the form
    found = [
        *count_problems(sample),
        *repeat_problems(papers),
        *opening_problems(papers),
        *shared_run_problems(papers),
    ]
    return found + [
        f"{row['id']}: {problem}"
        for row in papers
        for problem in (*text_problems(row), *summary_problems(row))
    ]


def form_problems(row: Row) -> Iterator[str]:
    name = row.get("id", "paper without id")
    if sorted(row) != sorted(KEYS):
        yield f"{name}: keys are {sorted(row)}"
    elif not all(isinstance(row[key], str) for key in TEXT_KEYS) or not all(
        isinstance(text, str) for text in row["summaries"]
    ):
        yield f"{name}: a value has the wrong type"
    elif len(row["summaries"]) != SUMMARIES:
        yield f"{name}: has {len(row['summaries'])} summaries"
    else:
        for text in texts_of(row):
            if not (text.isascii() and text.isprintable()) or text != " ".join(text.split()):
                yield f"{name}: not plain printable ASCII with single spaces: {text[:40]!r}"


def texts_of(row: Row) -> list[str]:
    return [row["title"], row["abstract"], row["query"], *row["summaries"]]


def count_problems(sample: Sample) -> Iterator[str]:
    """Ids say field, topic and paper number, so the right ids in the right file are the right
    counts; field and topic must agree with the id.
    """
    topics_of, groups_of = defaultdict(set), defaultdict(set)
    for file, rows in sample.items():
        fields = {
            f"{field.lower().replace(' ', '-')}-{topic}": field
            for field in FIELDS
            for topic in TOPIC_NUMBERS[file]
        }
        ids = Counter(row["id"] for row in rows)
        due = {f"{group}-{paper}" for group in fields for paper in range(1, PAPERS_A_TOPIC + 1)}
        yield from (f"{file}: {name} is missing" for name in sorted(due - ids.keys()))
        yield from (f"{file}: {name} does not belong here" for name in sorted(ids.keys() - due))
        for row in rows:
            group = row["id"].rpartition("-")[0]
            topics_of[group].add(row["topic"])
            groups_of[row["topic"]].add(group)
            if row["field"] != fields.get(group, row["field"]):
                yield f'{row["id"]}: field is "{row["field"]}"'
    yield from (
        f"{group}: has the topics {sorted(topics)}"
        for group, topics in topics_of.items()
        if len(topics) > 1
    )
    yield from (
        f'topic "{topic}" is used by {sorted(groups)}'
        for topic, groups in groups_of.items()
        if len(groups) > 1
    )


def repeat_problems(papers: list[Row]) -> Iterator[str]:
    for key in ("id", "title", "abstract", "query"):
        counts = Counter(normalise(row[key]) for row in papers)
        yield from (
            f"{key} used {count} times: {text[:60]}" for text, count in counts.items() if count > 1
        )


def opening_problems(papers: list[Row]) -> Iterator[str]:
    abstracts = Counter(opening(row["abstract"]) for row in papers)
    yield from (
        f'{count} abstracts open with "{text}"' for text, count in abstracts.items() if count > 1
    )
    firsts = Counter(words(row["abstract"])[0] for row in papers)
    yield from (
        f'{count} abstracts open with the word "{word}"'
        for word, count in firsts.items()
        if count > FIRST_WORD * len(papers)
    )
    summaries = Counter(opening(text) for row in papers for text in row["summaries"])
    yield from (
        f'{count} summaries open with "{text}"'
        for text, count in summaries.items()
        if count > SUMMARY_OPENING
    )


def shared_run_problems(papers: list[Row]) -> Iterator[str]:
    owner: dict[str, int] = {}
    told = set()
    for number, row in enumerate(papers):
        for text in texts_of(row):
            for run in runs(text, RUN_BETWEEN_PAPERS):
                first = owner.setdefault(run, number)
                if first != number and (first, number) not in told:
                    told.add((first, number))
                    yield f'{papers[first]["id"]} and {row["id"]} share the words "{run}"'


def text_problems(row: Row) -> Iterator[str]:
    title, abstract, query = row["title"], row["abstract"], row["query"]
    for key, (least, most) in (
        ("abstract", ABSTRACT_WORDS),
        ("title", TITLE_WORDS),
        ("query", QUERY_WORDS),
    ):
        if not least <= len(row[key].split()) <= most:
            yield f"{key} has {len(row[key].split())} words"
    if sentences(abstract) < ABSTRACT_SENTENCES:
        yield f"abstract has {sentences(abstract)} sentences"
    if normalise(title) in normalise(abstract):
        yield "abstract repeats the title"
    for other, name in ((title, "title"), (abstract, "abstract")):
        if runs(query, RUN_WITHIN_PAPER) & runs(other, RUN_WITHIN_PAPER):
            yield f"query copies the {name}"
    if set(words(query)) <= set(words(title)):
        yield "query has no word of its own beside the title"


def summary_problems(row: Row) -> Iterator[str]:
    title, abstract = row["title"], row["abstract"]
    for number, text in enumerate(row["summaries"]):
        if not SUMMARY_WORDS[0] <= len(text.split()) <= SUMMARY_WORDS[1]:
            yield f"summary {number} has {len(text.split())} words"
        if sentences(text) != 1 or not text.endswith("."):
            yield f"summary {number} is not one sentence"
        if SELF_REFERENCE.search(text):
            yield f"summary {number} speaks of itself"
        if runs(text, RUN_SUMMARY_ABSTRACT) & runs(abstract, RUN_SUMMARY_ABSTRACT):
            yield f"summary {number} copies the abstract"
        triples = runs(text, 3)
        if len(triples & runs(abstract, 3)) > TRIPLES_IN_ABSTRACT * len(triples):
            yield f"summary {number} is a patchwork of the abstract"
        if runs(text, RUN_WITHIN_PAPER) & runs(title, RUN_WITHIN_PAPER):
            yield f"summary {number} copies the title"
    for (i, one), (j, two) in combinations(enumerate(row["summaries"]), 2):
        ours, theirs = set(words(one)), set(words(two))
        if len(ours & theirs) > SAME_WORDS * len(ours | theirs) or runs(
            one, RUN_WITHIN_PAPER
        ) & runs(two, RUN_WITHIN_PAPER):
            yield f"summaries {i} and {j} are alike"


@pytest.fixture(scope="module")
def sample() -> Sample:
    return {
        name: [
            json.loads(line)
            for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
        ]
        for name in TOPIC_NUMBERS
    }


def test_sample_papers_have_no_problems(sample: Sample) -> None:
    assert problems(sample) == []


def test_counts_are_those_of_the_readme(sample: Sample) -> None:
    assert {name: len(rows) for name, rows in sample.items()} == {
        "sample_train.jsonl": 152,
        "sample_test.jsonl": 228,
    }
    topics = [{(row["field"], row["topic"]) for row in rows} for rows in sample.values()]
    assert [len(some) for some in topics] == [38, 57]
    assert not topics[0] & topics[1]


def test_readme_lists_every_topic_beside_its_field(sample: Sample) -> None:
    lines = [
        line.split("|")
        for line in (ROOT / "data" / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    table = {
        cells[1].strip(): [topic.strip() for cell in cells[2:4] for topic in cell.split(";")]
        for cells in lines
    }
    assert {field: table.get(field) for field in FIELDS} == {
        field: list(
            dict.fromkeys(
                row["topic"] for rows in sample.values() for row in rows if row["field"] == field
            )
        )
        for field in FIELDS
    }


def test_the_project_can_train_and_evaluate_on_them() -> None:
    """The project's own reader takes every line, no training paper counts as an evaluation paper,
    and each paper takes part in all four tasks.
    """
    train, evaluation = (
        list(read_papers(ROOT / "data" / name, need=KEYS)) for name in TOPIC_NUMBERS
    )
    assert len(trainable(train)) == len(train) == 152
    kept, dropped = drop_seen(train, SeenPapers(evaluation))
    assert len(kept) == 152
    assert not dropped
    assert all(halves(paper.abstract) for paper in evaluation)


def first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text)[0]


Change = Callable[[list[Row], list[Row]], object]  # (training rows, test rows), changed in place


def set_summary(make: Callable[[Row], str]) -> Change:
    """Replace summary 2 of the first training paper."""

    def change(train: list[Row], test: list[Row]) -> None:
        train[0]["summaries"][2] = make(train[0])

    return change


def set_text(key: str, make: Callable[[Row, Row], str]) -> Change:
    """Replace a text of the first training paper, given that paper and the last test paper."""

    def change(train: list[Row], test: list[Row]) -> None:
        train[0][key] = make(train[0], test[-1])

    return change


def chunks_of_five(text: str) -> str:
    """The first 25 words of a text with a foreign word after every fifth: no run of six is left."""
    parts = re.findall(r"[\w-]+", text)[:25]
    return " ".join(" ".join([*parts[i : i + 5], "indeed"]) for i in range(0, 25, 5)) + "."


def open_three_alike(train: list[Row], test: list[Row]) -> None:
    for row in train[:3]:
        row["summaries"][0] = "Nobody has settled how " + row["summaries"][0]


def open_twenty_with(word: str) -> Change:
    def change(train: list[Row], test: list[Row]) -> None:
        for row in test[:20]:
            row["abstract"] = f"{word} {row['abstract']}"

    return change


# What is done to the papers, and what the checker must say of it.
BROKEN: dict[str, tuple[Change, str]] = {
    "paper lost": (lambda train, test: train.pop(), "sample_train.jsonl: sociology-2-4 is missing"),
    "paper in the wrong file": (
        lambda train, test: test.append(train.pop()),
        "sample_test.jsonl: sociology-2-4 does not belong here",
    ),
    "paper twice": (lambda train, test: train.append(train[0]), "id used 2 times: art-1-1"),
    "field misspelt": (set_text("field", lambda row, other: "Arts"), 'art-1-1: field is "Arts"'),
    "topic in both files": (
        lambda train, test: [row.update(topic=test[0]["topic"]) for row in train[:4]],
        "is used by ['art-1', 'art-3']",
    ),
    "two topics in a group": (
        set_text("topic", lambda row, other: "varnish"),
        "art-1: has the topics",
    ),
    "key missing": (lambda train, test: train[0].pop("query"), "art-1-1: keys are"),
    "key unknown": (lambda train, test: train[0].update(source="press"), "art-1-1: keys are"),
    "number for a text": (
        lambda train, test: train[0].update(title=7),
        "art-1-1: a value has the wrong type",
    ),
    "three summaries": (
        lambda train, test: train[0]["summaries"].pop(),
        "art-1-1: has 3 summaries",
    ),
    "typographic quote": (
        set_text("title", lambda row, other: row["title"] + "\u2019"),
        "art-1-1: not plain printable ASCII",
    ),
    "line break": (
        set_text("abstract", lambda row, other: row["abstract"].replace(". ", ".\n", 1)),
        "art-1-1: not plain printable ASCII",
    ),
    "abstract too short": (
        set_text("abstract", lambda row, other: first_words(row["abstract"], 129)),
        "art-1-1: abstract has 129 words",
    ),
    "abstract too long": (
        set_text("abstract", lambda row, other: " ".join((row["abstract"].split() * 2)[:221])),
        "art-1-1: abstract has 221 words",
    ),
    "abstract in one breath": (
        set_text("abstract", lambda row, other: re.sub(r"\.(?= )", ";", row["abstract"])),
        "art-1-1: abstract has 1 sentences",
    ),
    "abstract repeats its title": (
        set_text("abstract", lambda row, other: f"{row['abstract']} {row['title']}."),
        "art-1-1: abstract repeats the title",
    ),
    "abstract of another paper": (
        set_text("abstract", lambda row, other: other["abstract"]),
        "abstract used 2 times",
    ),
    "title of another paper": (
        set_text("title", lambda row, other: other["title"].upper()),
        "title used 2 times",
    ),
    "title of three words": (
        set_text("title", lambda row, other: first_words(row["title"], 3)),
        "art-1-1: title has 3 words",
    ),
    "run of another abstract": (
        set_text(
            "abstract", lambda row, other: f"{row['abstract']} {first_words(other['abstract'], 7)}."
        ),
        "art-1-1 and sociology-5-4 share",
    ),
    "run of another summary": (
        set_text("query", lambda row, other: first_words(other["summaries"][3], 7)),
        "art-1-1 and sociology-5-4 share",
    ),
    "abstracts open alike": (
        set_text(
            "abstract", lambda row, other: f"{first_words(other['abstract'], 3)} {row['abstract']}"
        ),
        '2 abstracts open with "where do evicted"',
    ),
    "abstracts open with one word": (
        open_twenty_with("Recently"),
        '20 abstracts open with the word "recently"',
    ),
    "summaries open alike": (open_three_alike, '3 summaries open with "nobody has settled"'),
    "summary copied": (
        set_summary(lambda row: first_sentence(row["abstract"])),
        "art-1-1: summary 2 copies the abstract",
    ),
    "summary pieced together": (
        set_summary(lambda row: chunks_of_five(row["abstract"])),
        "art-1-1: summary 2 is a patchwork",
    ),
    "summary with the title in it": (
        set_summary(
            lambda row: (
                f"One may hold that {first_words(row['title'], 9).lower()} in such works of art."
            )
        ),
        "art-1-1: summary 2 copies the title",
    ),
    "summary twice": (
        set_summary(lambda row: row["summaries"][1]),
        "art-1-1: summaries 1 and 2 are alike",
    ),
    "summary with shuffled words": (
        set_summary(lambda row: " ".join(row["summaries"][1][:-1].split()[::-1]) + "."),
        "art-1-1: summaries 1 and 2 are alike",
    ),
    "summary of two sentences": (
        set_summary(lambda row: row["summaries"][2] + " Smalt fades."),
        "art-1-1: summary 2 is not one sentence",
    ),
    "summary without a full stop": (
        set_summary(lambda row: row["summaries"][2][:-1]),
        "art-1-1: summary 2 is not one sentence",
    ),
    "summary of six words": (
        set_summary(lambda row: "The glass pigment loses its hue."),
        "art-1-1: summary 2 has 6 words",
    ),
    "summary says this study": (
        set_summary(lambda row: "This study finds that " + row["summaries"][2]),
        "art-1-1: summary 2 speaks of itself",
    ),
    "summary says we": (
        set_summary(lambda row: "In old glass we see that " + row["summaries"][2]),
        "art-1-1: summary 2 speaks of itself",
    ),
    "query copies the title": (
        set_text("query", lambda row, other: first_words(row["title"], 5)),
        "art-1-1: query copies the title",
    ),
    "query copies the abstract": (
        set_text("query", lambda row, other: first_words(row["abstract"], 6)),
        "art-1-1: query copies the abstract",
    ),
    "query made of title words": (
        set_text("query", lambda row, other: "smalt greying potassium loss"),
        "art-1-1: query has no word of its own",
    ),
    "query of one word": (
        set_text("query", lambda row, other: "pigments"),
        "art-1-1: query has 1 words",
    ),
}


@pytest.mark.parametrize(("change", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_checker_names_what_is_broken(sample: Sample, change: Change, expected: str) -> None:
    broken = copy.deepcopy(sample)
    change(*broken.values())
    found = problems(broken)
    assert any(expected in problem for problem in found), found[:5]
