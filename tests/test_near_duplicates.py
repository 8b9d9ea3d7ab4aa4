"""semcse/near_duplicates.py: finding papers by id, title and near-equal abstract."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from conftest import ROOT

from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import Paper, read_papers


def abstract(seed: int, length: int = 160) -> str:
    """A text of random words, none of them in the text of another seed."""
    draw = random.Random(seed)
    return " ".join(f"word{seed}x{draw.randrange(400)}" for _ in range(length))


def edited(text: str, places: int) -> str:
    """`text` with this many words replaced at equal distances."""
    words = text.split()
    for i in range(places):
        words[(2 * i + 1) * len(words) // (2 * places)] = f"other{i}"
    return " ".join(words)


def full_width(text: str) -> str:
    """`text` in the full-width characters of East Asian typesetting."""
    return "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in text)


TITLE, ABSTRACT = "Soil carbon under drought: a 12-year record", abstract(1)
KNOWN = Paper("known", title=TITLE, abstract=ABSTRACT)
WITH_BOILERPLATE = f"Abstract. {ABSTRACT} All rights reserved by the publisher of this journal."


@pytest.mark.parametrize(
    "paper, reason",
    [
        (Paper("known"), "id"),
        (KNOWN, "id"),
        (Paper("KNOWN"), None),
        (Paper("new", title=TITLE, abstract=ABSTRACT), "title"),
        (Paper("new", title="  SOIL carbon\tunder  drought: a 12-year record. "), "title"),
        (Paper("new", title=full_width(TITLE)), "title"),
        (Paper("new", title="Soil carbon under drought: a 13-year record"), None),
        (Paper("new", title="Soil carbon"), None),
        (Paper("new", abstract=ABSTRACT.upper() + "."), "abstract"),
        (Paper("new", title="Another title", abstract=edited(ABSTRACT, 4)), "abstract"),
        (Paper("new", abstract=WITH_BOILERPLATE), "abstract"),
        (Paper("new", abstract=" ".join(ABSTRACT.split()[:130])), "abstract"),
        (Paper("new", abstract=edited(ABSTRACT, 60)), None),
        (Paper("new", abstract=" ".join(ABSTRACT.split()[:20]) + " " + abstract(2)), None),
        (Paper("new", abstract=abstract(2)), None),
        (Paper("new", summaries=("One.", "Two.")), None),
    ],
)
def test_a_paper_is_known_by_id_title_or_near_equal_abstract(
    paper: Paper, reason: str | None
) -> None:
    seen = SeenPapers([Paper("other", "Other title", abstract(3)), KNOWN, Paper("bare")])
    assert seen.reason(paper) == reason


def test_papers_without_title_and_abstract_match_by_id_only() -> None:
    seen = SeenPapers(
        [Paper("a"), Paper("b", title=" ", abstract=" \n"), Paper("c", abstract="...")]
    )
    papers = [Paper("x"), Paper("y", title=" "), Paper("z", abstract="?!"), Paper("a")]
    assert [seen.reason(paper) for paper in papers] == [None, None, None, "id"]


def test_real_abstracts_are_found_when_edited_and_not_confused_with_their_topic() -> None:
    """In the sample papers, four share each topic and its terms. Each abstract is found again with
    four words changed, and is never taken for another one.
    """
    papers = list(read_papers(ROOT / "data" / "sample_test.jsonl"))
    seen = SeenPapers()
    for paper in papers:
        assert seen.reason(paper) is None
        seen.add(paper)
    copies = [
        Paper(f"new {i}", title=f"New {i}", abstract=edited(paper.abstract, 4))
        for i, paper in enumerate(papers)
    ]
    assert Counter(map(seen.reason, copies)) == {"abstract": len(papers)}
    assert drop_seen(read_papers(ROOT / "data" / "sample_train.jsonl"), seen)[1] == {}


def test_a_copied_abstract_is_found_even_if_its_parts_are_in_other_abstracts() -> None:
    """Guards against: an 8-gram belongs to the first abstract that has it, so that an abstract made
    of parts of three others owns none.
    """
    thirds = [abstract(seed, 50) for seed in (4, 5, 6)]
    pieced = " ".join(thirds)
    sources = [
        Paper(f"{i}", abstract=f"{part} {abstract(10 + i, 60)}") for i, part in enumerate(thirds)
    ]
    seen = SeenPapers([*sources, Paper("pieced", abstract=pieced)])
    assert seen.reason(Paper("new", abstract=pieced)) == "abstract"


def test_dropped_papers_are_counted_by_reason() -> None:
    fresh = [Paper("a", "Title a", abstract(2)), Paper("b")]
    copies = [
        Paper("known"),
        Paper("c", TITLE.upper()),
        Paper("d", TITLE, ABSTRACT),
        Paper("e", "Title e", ABSTRACT),
    ]
    kept, dropped = drop_seen([fresh[0], *copies, fresh[1]], SeenPapers([KNOWN]))
    assert kept == fresh
    assert dropped == {"id": 1, "title": 2, "abstract": 1}
