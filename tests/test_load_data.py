"""load_data.py: reading papers files good and bad, the validation split, the batches, duplicates of
evaluation papers, and the two halves of an abstract.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_paper
from hypothesis import given, settings
from hypothesis import strategies as st

from load_data import batch_pairs, split_validation, steps_per_epoch
from semantic_benchmark import halves
from semcse.errors import UserError
from semcse.papers import Paper, read_papers


def wide(text: str) -> str:
    """`text` in full-width characters, as East Asian typesetting has them."""
    return "".join(
        chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text
    )


def random_states() -> str:
    """The global random states, which drawing a batch must not touch."""
    return str((random.getstate(), np.random.get_state()))  # noqa: NPY002


# The validation split


def pair_paper(number: int, topic: str = "", field: str = "") -> Paper:
    return Paper(
        f"{number:08d}",
        summaries=tuple(f"{number}:{i}" for i in range(4)),
        topic=topic,
        field=field,
    )


def ids(papers: list[Paper]) -> list[str]:
    return [paper.id for paper in papers]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "share, most, wanted",
    [
        (0.1, 150, 11),
        (0.3, 150, 34),
        (0.3, 20, 20),
        (0.001, 150, 2),
        (0.9, 150, 101),
        (0.99, 150, 106),
    ],
)
def test_the_split_takes_whole_topics_and_as_many_papers_as_asked(
    seed: int, share: float, most: int, wanted: int
) -> None:
    """112 papers: 20 topics of 5, each name used in two fields that have nothing to do with each
    other, and 12 papers without topic.
    """
    papers = [pair_paper(i, f"topic {i // 10}", f"field {i % 2}") for i in range(100)] + [
        pair_paper(i) for i in range(100, 112)
    ]
    train, held = split_validation(papers, share, most, seed)
    assert sorted(ids(train) + ids(held)) == ids(papers)
    assert ids(train) == sorted(ids(train))
    assert wanted <= len(held) <= min(wanted + 4, 110)
    assert not {(p.field, p.topic) for p in train if p.topic} & {
        (p.field, p.topic) for p in held if p.topic
    }


def test_the_split_does_not_depend_on_the_file_order() -> None:
    papers = [pair_paper(i, f"topic {i // 5}") for i in range(60)] + [
        pair_paper(i) for i in range(60, 80)
    ]
    held = {paper.id for paper in split_validation(papers, 0.2, 150, 3)[1]}
    for order in range(5):
        shuffled = random.Random(order).sample(papers, len(papers))
        assert {paper.id for paper in split_validation(shuffled, 0.2, 150, 3)[1]} == held


def test_every_seed_draws_another_split_and_no_paper_is_favoured() -> None:
    """Ids of one length, as most sources have them.

    Guards against: CRC-32 of (seed, id) is linear, so another seed of as many digits only XORs one
    constant onto all of them, and the same few groups of papers come back: 100 seeds give eight
    splits.
    """
    papers = [pair_paper(i) for i in range(400)]
    splits = [
        frozenset(ids(split_validation(papers, 0.125, 150, seed)[1])) for seed in range(100, 200)
    ]
    assert len(set(splits)) == 100
    # of 50 papers: hypergeometric, mean 6.25, standard deviation 2.2
    shared = [len(a & b) for a, b in itertools.combinations(splits, 2)]
    assert 6 < sum(shared) / len(shared) < 6.5
    assert max(shared) < 20
    # binomial, mean 12.5, standard deviation 3.3
    often = Counter(itertools.chain.from_iterable(splits))
    assert max(often[paper.id] for paper in papers) < 32


@pytest.mark.parametrize(
    "topics, held_out",
    [
        pytest.param(["a"] * 10, 2, id="one topic"),
        pytest.param(["a"] * 9 + ["b"], 2, id="a topic of one paper and one too large to hold out"),
        pytest.param([""] * 4, 2, id="four papers"),
        pytest.param(["a"] * 2 + ["b"] * 2, 2, id="two topics of two"),
    ],
)
def test_topics_that_cannot_be_parted_are_split_by_paper(topics: list[str], held_out: int) -> None:
    for seed in range(10):
        train, held = split_validation(
            [pair_paper(i, topic) for i, topic in enumerate(topics)], 0.2, 150, seed
        )
        assert len(held) == held_out
        assert len(train) == len(topics) - held_out


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_papers_to_split_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"^{count} papers are too few to split; give at least"):
        split_validation([pair_paper(i) for i in range(count)], 0.1, 150, 0)


# Summary pairs and batches


def drawn(papers: list[Paper], seed: int, step: int, batch_size: int) -> list[tuple[int, int, int]]:
    """A batch as (paper, number of the first summary, number of the second); the texts of
    `pair_paper` say which they are.
    """
    found = []
    for anchor, positive in batch_pairs(papers, seed, step, batch_size):
        (paper, first), (other, second) = (
            (int(part) for part in text.split(":")) for text in (anchor, positive)
        )
        assert paper == other
        assert first != second
        found.append((paper, first, second))
    assert len({paper for paper, _, _ in found}) == len(found)
    return found


@pytest.mark.parametrize(
    "papers, batch_size, steps", [(24, 6, 4), (24, 24, 1), (26, 6, 4), (5, 6, 1), (7, 2, 3)]
)
def test_an_epoch_visits_papers_once(papers: int, batch_size: int, steps: int) -> None:
    """All of them where the batch size divides their number, else all but the remainder; another
    epoch leaves other papers over.
    """
    some = [pair_paper(i) for i in range(papers)]
    assert steps_per_epoch(some, batch_size) == steps
    epochs = []
    for epoch in range(12):
        batches = [drawn(some, 3, epoch * steps + place, batch_size) for place in range(steps)]
        assert {len(batch) for batch in batches} == {min(papers, batch_size)}
        epochs.append([paper for batch in batches for paper, _, _ in batch])
        assert len(set(epochs[-1])) == len(epochs[-1]) == min(papers, steps * batch_size)
    assert len(set(map(tuple, epochs))) > 9
    assert set().union(*epochs) == set(range(papers))


def test_visits_say_how_often_an_epoch_draws_a_paper() -> None:
    """Two of twelve papers with five visits: 20 visits, four batches of five; a paper drawn twice
    for one batch stands in it once.
    """
    some = [dataclasses.replace(pair_paper(i), visits=5 if i < 2 else 1) for i in range(12)]
    assert steps_per_epoch(some, 5) == 4
    counts = Counter(paper for step in range(4 * 200) for paper, _, _ in drawn(some, 3, step, 5))
    assert all(counts[i] == 200 for i in range(2, 12))
    # Of 20 places in 4 batches of 5, a paper with 5 places misses a batch with probability C(15, 5)
    # / C(20, 5) = 0.1937: 3.225 batches an epoch.
    assert all(counts[i] / 200 == pytest.approx(3.225, abs=0.2) for i in range(2))


def test_a_batch_has_a_negative_however_often_one_paper_is_visited() -> None:
    some = [dataclasses.replace(pair_paper(0), visits=100), pair_paper(1)]
    assert all(len(drawn(some, 3, step, 2)) == 2 for step in range(100))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    """Asked for in any order, after any use of the global generators, and without touching them."""
    papers = [pair_paper(i) for i in range(20)]
    calls = [(seed, step) for seed in range(3) for step in range(12)]
    forwards = {call: batch_pairs(papers, *call, 5) for call in calls}
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random_states()
    backwards = {call: batch_pairs(papers, *call, 5) for call in reversed(calls)}
    assert random_states() == before
    assert backwards == forwards
    assert len(set(map(tuple, forwards.values()))) == len(calls)
    choices = [
        tuple((first, second) for _, first, second in drawn(papers, *call, 5)) for call in calls
    ]
    # not the same choice of summaries in every batch of an epoch, either
    assert len(set(choices)) == len(calls)


def test_batches_mix_papers_anew_in_every_epoch() -> None:
    """Over 300 epochs each two of 12 papers meet in a batch of 4 about 300 x 3/11 = 82 times
    (standard deviation 7.7).
    """
    papers = [pair_paper(i) for i in range(12)]
    meetings = Counter(
        frozenset(two)
        for step in range(300 * 3)
        for two in itertools.combinations(
            sorted(paper for paper, _, _ in drawn(papers, 0, step, 4)), 2
        )
    )
    assert len(meetings) == 66
    assert min(meetings.values()) > 50
    assert max(meetings.values()) < 114


def test_all_ordered_pairs_of_summaries_are_drawn_equally_often() -> None:
    """Twelve ordered pairs of four summaries: over 1,200 epochs each about 100 times (standard
    deviation 9.6), for every paper.
    """
    papers = [pair_paper(i) for i in range(4)]
    found = Counter(draw for step in range(1200 * 2) for draw in drawn(papers, 1, step, 2))
    assert len(found) == 4 * 12
    assert min(found.values()) > 60
    assert max(found.values()) < 140


def test_joined_pairs_hold_every_summary_of_the_paper_once() -> None:
    """A quarter of 800 pairs is joined (standard deviation 12): one summary against all others;
    which one is the anchor changes, and so does their order.
    """
    papers = [pair_paper(i) for i in range(4)]
    summaries = {paper.id: set(paper.summaries) for paper in papers}
    pairs = [pair for step in range(200 * 2) for pair in batch_pairs(papers, 3, step, 2, 0.25)]
    joined = [pair for pair in pairs if not any(pair[1] in texts for texts in summaries.values())]
    assert len(pairs) == 800
    assert 150 < len(joined) < 250
    for anchor, positive in joined:
        (texts,) = (texts for texts in summaries.values() if anchor in texts)
        rest = texts - {anchor}
        assert positive in {" ".join(order) for order in itertools.permutations(rest)}
    assert len({anchor for anchor, _ in joined}) == 16
    assert len(set(joined)) > 60  # of 4 x 4 x 6
    assert batch_pairs(papers, 3, 5, 2) == batch_pairs(papers, 3, 5, 2, 0.0)


def test_equal_summaries_are_never_a_pair(papers_file: Callable[..., Path]) -> None:
    rows = [
        make_paper(
            0,
            summaries=[
                "The soil dries.",
                "the  soil dries",
                wide("THE SOIL DRIES."),
                "Rivers fall.",
            ],
        ),
        make_paper(1, summaries=["One.", "one", " ONE "]),
    ]
    papers = list(read_papers(papers_file(rows), ("summaries",)))
    assert [len(paper.summaries) for paper in papers] == [2, 1]
    pairs = {pair for step in range(50) for pair in batch_pairs(papers[:1], 0, step, 2)}
    assert pairs == {("The soil dries.", "Rivers fall."), ("Rivers fall.", "The soil dries.")}


def sample(name: str) -> list[Paper]:
    return list(read_papers(ROOT / "data" / name))


# Halves of an abstract


@pytest.mark.parametrize(
    "text, cut",
    [
        ("One two. Six ten.", ("One two.", "Six ten.")),
        # 21 characters, places 5, 11, 17: 11 is nearest to 10.5
        ("aaaa. bbbb! cccc? dd.", ("aaaa. bbbb!", "cccc? dd.")),
        ("aa. b. ccccc", ("aa. b.", "ccccc")),  # 12 characters, places 3 and 6
        # 13 characters, 6.5 between places 4 and 8: 8 is nearer
        ("aaa. bb. cccc", ("aaa. bb.", "cccc")),
        ("abc. de. fghi", ("abc. de.", "fghi")),
        # 14 characters, places 5 and 8: 8 is nearer to 7
        ("abcd. f. hijk.", ("abcd. f.", "hijk.")),
        # 14 characters, places 5 and 9, both 2 away from 7: the earlier
        ("abcd. fg. hij.", ("abcd.", "fg. hij.")),
        # an abbreviation counts as a sentence end
        ("Soil, e.g. clay, holds water longer", ("Soil, e.g.", "clay, holds water longer")),
        ("One two.   \n\t Six ten.", ("One two.", "Six ten.")),
        ("  One two. Six ten. \n", ("One two.", "Six ten.")),
        ("One two.\u00a0Six ten.", ("One two.", "Six ten.")),
        # the quotation mark stands between the sign and the white space
        ('He asked "why?" Then he left.', None),
        ("Why? " + "x" * 50, ("Why?", "x" * 50)),
        ("x" * 50 + ". Y", ("x" * 50 + ".", "Y")),
        ("Only one sentence. ", None),
        ("Growth of 3.5 per cent at www.example.org", None),
        ("", None),
        (" . ", None),
    ],
)
def test_an_abstract_is_cut_at_the_sentence_end_nearest_its_middle(
    text: str, cut: tuple[str, str] | None
) -> None:
    assert halves(text) == cut


def cut_by_trying_every_place(abstract: str) -> tuple[str, str] | None:
    text = abstract.strip()
    places = [i for i in range(1, len(text)) if text[i - 1] in ".!?" and text[i].isspace()]
    best: int | None = None
    for i in places:
        if best is None or abs(2 * i - len(text)) < abs(2 * best - len(text)):
            best = i
    return None if best is None else (text[:best], text[best:].lstrip())


@given(st.text("ab.!? \n\u00a0", max_size=40))
@settings(deadline=None, max_examples=500)
def test_halves_agrees_with_trying_every_place(text: str) -> None:
    assert halves(text) == cut_by_trying_every_place(text)


def test_halves_of_real_abstracts_are_about_equally_long_and_lose_only_white_space() -> None:
    for paper in sample("sample_test.jsonl"):
        cut = halves(paper.abstract)
        assert cut is not None
        left, right = cut
        assert " ".join(f"{left} {right}".split()) == " ".join(paper.abstract.split())
        assert left[-1] in ".!?"
        assert cut == cut_by_trying_every_place(paper.abstract)
        assert 0.2 < len(left) / len(paper.abstract) < 0.8
