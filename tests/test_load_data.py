"""load_data.py: reading papers files good and bad, the validation split, the batches, duplicates of
evaluation papers, and the two halves of an abstract.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, make_paper
from hostile import BAD_FILES, BAD_LINES, BAD_PLACES, NASTY, NEEDED, Place, nasty_papers
from hypothesis import given, settings
from hypothesis import strategies as st

from load_data import batch_pairs, split_validation, steps_per_epoch, trainable
from semantic_benchmark import halves
from semcse.errors import UserError
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import TEXT_KEYS, Paper, normalise, read_papers
from settings import PROFILES


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file name that the property tests write to again and again."""
    return tmp_path_factory.mktemp("scratch") / "papers.jsonl"


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def wide(text: str) -> str:
    """`text` in full-width characters, as East Asian typesetting has them."""
    return "".join(
        chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text
    )


# Reading good files


@pytest.mark.parametrize("name", ["papers.jsonl", "papers.jsonl.gz"])
@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(lambda data: data, id="plain"),
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(
            lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
            id="gzip in two members",
        ),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="byte order mark"),
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(
            lambda data: b"\n \n" + data.replace(b"\n", b"\n\n") + b"\t\n", id="blank lines"
        ),
        pytest.param(lambda data: data.rstrip(), id="no newline at the end"),
    ],
)
def test_every_packing_of_a_file_reads_the_same_whatever_its_name(
    tmp_path: Path, name: str, packed: Callable[[bytes], bytes]
) -> None:
    rows = [make_paper(i) for i in range(5)]
    path = tmp_path / name
    path.write_bytes(packed(jsonl(*rows)))
    assert [
        paper.as_row() for paper in read_papers(path, ("summaries", "title", "abstract", "query"))
    ] == rows


def test_reading_streams(tmp_path: Path) -> None:
    """What is appended after the first paper was handed out is still read: nothing reads the file
    to its end first.
    """
    path = tmp_path / "papers.jsonl"
    path.write_bytes(jsonl(make_paper(0)))
    papers = read_papers(path)
    assert next(papers).id == "paper-0"
    with path.open("ab") as handle:
        handle.write(jsonl(make_paper(1)) + b"no JSON\n")
    assert next(papers).id == "paper-1"
    with pytest.raises(UserError, match=r"papers\.jsonl:3: "):
        next(papers)


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    """`--train-file <(zcat a.gz b.gz)` hands over a pipe. Guards against: reading starts with a
    seek, which a pipe refuses with a traceback.
    """
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as pipe:
        pipe.write(gzip.compress(jsonl(make_paper(0))))
    assert [paper.id for paper in read_papers(f"/dev/fd/{read_end}")] == ["paper-0"]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
filled = words.filter(lambda text: bool(text.strip()))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
unknown_keys = st.dictionaries(
    words.filter(lambda key: key not in (*TEXT_KEYS, "summaries", "visits")),
    json_values,
    max_size=3,
)


@given(
    identity=filled,
    texts=st.fixed_dictionaries({}, optional={key: words for key in TEXT_KEYS if key != "id"}),
    summaries=st.none() | st.lists(words, max_size=4),
    unknown=unknown_keys,
    ascii_only=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_a_row_read_and_written_is_the_row(
    scratch: Path,
    identity: str,
    texts: dict[str, str],
    summaries: list[str] | None,
    unknown: dict[str, Any],
    ascii_only: bool,
) -> None:
    row: dict[str, Any] = (
        {"id": identity} | texts | ({} if summaries is None else {"summaries": summaries}) | unknown
    )
    scratch.write_text(
        json.dumps(row, ensure_ascii=ascii_only) + "\n", encoding="utf-8", newline=""
    )
    (paper,) = read_papers(scratch)
    texts_there = [text for text in summaries or [] if text.strip()]
    first_of_equals = [
        text
        for i, text in enumerate(texts_there)
        if normalise(text) not in map(normalise, texts_there[:i])
    ]
    expected = {key: value for key, value in row.items() if value != "" or key in unknown} | {
        "summaries": first_of_equals
    }
    assert paper.as_row() == {
        key: value for key, value in expected.items() if key != "summaries" or value
    }
    scratch.write_text(json.dumps(paper.as_row()) + "\n", encoding="utf-8")
    assert list(read_papers(scratch)) == [paper]


@pytest.mark.parametrize(
    "text",
    [
        "Soil holds carbon.",
        "soil holds carbon",
        " SOIL\tholds\n carbon. ",
        wide("soil holds") + "\u00a0carbon",
        "soil holds carbon .",
    ],
)
def test_texts_that_differ_in_case_width_space_or_full_stop_are_equal(text: str) -> None:
    # "soil holds carbon ." : its blank before the full stop must not stay at the end.
    assert normalise(text) == "soil holds carbon"


def test_letters_without_a_capital_of_their_own_are_equal_too() -> None:
    assert normalise("STRASSE") == normalise("Straße")
    assert normalise("ΛΌΓΟΣ") == normalise("λόγος")


def test_texts_that_differ_in_a_word_or_sign_are_not_equal() -> None:
    assert (
        len({normalise(text) for text in ("soil", "soils", "so il", "soil?", "no soil", "")}) == 6
    )


# Reading bad files: every case stands in line 3, after a good paper and a blank line, and before
# another good paper

each_bad_line = pytest.mark.parametrize(
    "line, what, mend", [pytest.param(*case[1:], id=case[0]) for case in BAD_LINES]
)


def among_good_lines(path: Path, line: bytes) -> Path:
    path.write_bytes(jsonl(make_paper(1)) + b"\n" + line + b"\n" + jsonl(make_paper(2)))
    return path


@each_bad_line
def test_a_bad_line_is_an_error_that_names_file_line_and_mend(
    tmp_path: Path, line: bytes, what: str, mend: str
) -> None:
    path = among_good_lines(tmp_path / "papers.jsonl", line)
    papers = read_papers(path, NEEDED)
    assert next(papers).id == "paper-1"
    with pytest.raises(UserError) as caught:
        next(papers)
    said, _, advice = str(caught.value).rpartition("; ")
    assert said.startswith(f"{path}:3: ")
    assert what in said
    assert mend in advice
    assert "--skip-invalid" in advice
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 2


@each_bad_line
def test_skip_invalid_leaves_a_bad_line_out_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, what: str, mend: str
) -> None:
    path = among_good_lines(tmp_path / "papers.jsonl", line)
    with caplog.at_level(logging.INFO):
        assert [paper.id for paper in read_papers(path, NEEDED, skip_invalid=True)] == [
            "paper-1",
            "paper-2",
        ]
    assert caplog.messages == [f"{path}: left out 1 bad lines, kept 2 papers"]


def test_skip_invalid_says_nothing_about_a_good_file_and_refuses_one_without_papers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_bytes(jsonl(make_paper(1)))
    assert len(list(read_papers(path, NEEDED, skip_invalid=True))) == 1
    assert caplog.messages == []
    path.write_bytes(b"no JSON\n" * 3)
    with pytest.raises(UserError, match=r"papers\.jsonl: holds no papers; give a JSONL file"):
        list(read_papers(path, NEEDED, skip_invalid=True))
    assert caplog.messages == [f"{path}: left out 3 bad lines, kept 0 papers"]


def test_keys_that_are_not_needed_may_be_missing_or_blank(tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_bytes(
        jsonl(
            {"id": "a"},
            {"id": "b", "title": " ", "summaries": ["One.", " ", "Two."]},
            {"id": "c", "summaries": []},
        )
    )
    assert [paper.summaries for paper in read_papers(path)] == [(), ("One.", "Two."), ()]


@pytest.mark.parametrize(
    "content, what, mend", [pytest.param(*case[1:], id=case[0]) for case in BAD_FILES]
)
@pytest.mark.parametrize("skip_invalid", [False, True])
def test_a_file_that_is_no_papers_file_is_refused(
    tmp_path: Path, content: bytes | Callable[[], bytes], what: str, mend: str, skip_invalid: bool
) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(UserError) as caught:
        list(read_papers(path, skip_invalid=skip_invalid))
    said, _, advice = str(caught.value).rpartition("; ")
    if skip_invalid and ":1: is" in what:
        what, mend = ": holds no papers", "one paper a line"
    assert said.startswith(f"{path}{what}")
    assert mend in advice
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place, what, mend", [pytest.param(*case[1:], id=case[0]) for case in BAD_PLACES]
)
def test_a_path_without_a_readable_file_is_refused(
    tmp_path: Path, place: Place, what: str, mend: str
) -> None:
    # Guards against: an OSError, which ends with exit code 1 and "mend that and run again".
    with place(tmp_path) as path, pytest.raises(UserError) as caught:
        list(read_papers(path))
    assert str(caught.value).startswith(f"{path}{what}")
    assert mend in str(caught.value).rpartition("; ")[2]


def test_nasty_papers_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    path, again = tmp_path / "papers.jsonl", tmp_path / "again.jsonl"
    path.write_bytes(jsonl(*nasty_papers()))
    papers = list(read_papers(path, NEEDED))
    for paper, row, changes in zip(papers, nasty_papers(), NASTY.values(), strict=True):
        assert paper.as_row() == row | (
            {"summaries": list(dict.fromkeys(row["summaries"]))} if "summaries" in changes else {}
        )
    again.write_text(
        "".join(json.dumps(paper.as_row(), ensure_ascii=False) + "\n" for paper in papers),
        encoding="utf-8",
        newline="",
    )
    assert list(read_papers(again, NEEDED)) == papers


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_missing_file_of_the_paper_profile_is_an_error_that_names_the_commands_which_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = PROFILES["paper"][key]
    with pytest.raises(UserError) as caught:
        list(read_papers(path))
    assert str(caught.value).startswith(f"{path}: no such file; ")
    scripts = ("collect_papers.py", "generate_search_queries.py", "generate_train_summaries.py")
    assert all(f"python {script}" in str(caught.value) for script in scripts)
    assert "\n" not in str(caught.value)


def test_a_line_too_long_for_a_paper_is_refused_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "papers.jsonl"
    monkeypatch.setattr(load_data, "LONGEST_LINE", 2**20)
    good = jsonl({"id": "a", "abstract": "x " * (2**19 - 50)})
    path.write_bytes(good)
    assert len(list(read_papers(path))) == 1
    path.write_bytes(gzip.compress(good + b'{"id": "' + b"x" * 2**23))
    with pytest.raises(
        UserError, match=r"papers\.jsonl:2: line is longer than 1 MiB; give one paper a line"
    ):
        list(read_papers(path))


lines = st.lists(
    st.sampled_from(
        [
            jsonl(make_paper(1)),
            jsonl(make_paper(2)),
            b"\n",
            b'{"id": "x", "summaries": ["a", "b"]}\n',
            b"{}\n",
            b"\x1f\x8b",
            b"\xff\xfe",
        ]
    )
    | st.binary(max_size=30)
    | st.recursive(
        st.none() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["id", "title", "summaries"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode() + b"\n"),
    max_size=5,
).map(b"".join)


@given(
    content=lines,
    zipped=st.booleans(),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 400),
    need=st.sets(st.sampled_from(NEEDED)),
    skip_invalid=st.booleans(),
)
@settings(deadline=None, max_examples=250)
def test_any_bytes_give_papers_or_a_user_error(
    scratch: Path,
    content: bytes,
    zipped: bool,
    damage: list[tuple[int, int]],
    cut: int,
    need: set[str],
    skip_invalid: bool,
) -> None:
    data = bytearray(gzip.compress(content) if zipped else content)
    for place, value in damage:
        if data:
            data[place % len(data)] = value
    scratch.write_bytes(data[: len(data) - cut % (len(data) + 1)] if cut % 2 else data)
    ids, said = [], ""
    try:
        for paper in read_papers(scratch, need, skip_invalid):
            assert all(getattr(paper, key) for key in ("id", *need))
            assert len(set(map(normalise, paper.summaries))) == len(paper.summaries)
            json.dumps(paper.as_row(), ensure_ascii=False).encode()
            ids.append(paper.id)
    except UserError as error:
        said = str(error)
    assert said.startswith(str(scratch)) if said else ids
    assert len(set(ids)) == len(ids)


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
    with pytest.raises(
        UserError,
        match=(
            rf"^{count} papers with two different summaries are too few to train and validate on;"
            r" give at least four"
        ),
    ):
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


@pytest.mark.parametrize("visits", ["0", "-1", "101", "1.5", "true", "null", '"2"'])
def test_visits_must_be_a_small_whole_number(papers_file: Callable[..., Path], visits: str) -> None:
    path = papers_file([])
    path.write_text(f'{{"id": "a", "visits": {visits}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf'{path.name}:1: key "visits" is not'):
        list(read_papers(path))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    """Asked for in any order, after any use of the global generators, and without touching them."""
    papers = [pair_paper(i) for i in range(20)]
    calls = [(seed, step) for seed in range(3) for step in range(12)]
    forwards = {call: batch_pairs(papers, *call, 5) for call in calls}
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
    backwards = {call: batch_pairs(papers, *call, 5) for call in reversed(calls)}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]  # noqa: NPY002
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
    assert [paper.id for paper in trainable(papers)] == ["paper-0"]
    pairs = {pair for step in range(50) for pair in batch_pairs(trainable(papers), 0, step, 2)}
    assert pairs == {("The soil dries.", "Rivers fall."), ("Rivers fall.", "The soil dries.")}


# Papers that stand in the evaluation file


def sample(name: str) -> list[Paper]:
    return list(read_papers(ROOT / "data" / name))


def abstract(seed: int, length: int = 160) -> str:
    """A text of random words, none shared with another seed."""
    draw = random.Random(seed)
    return " ".join(f"word{seed}x{draw.randrange(400)}" for _ in range(length))


def edited(text: str, places: int) -> str:
    """`text` with that many of its words replaced, spread evenly."""
    parts = text.split()
    for i in range(places):
        parts[(2 * i + 1) * len(parts) // (2 * places)] = f"other{i}"
    return " ".join(parts)


KNOWN = Paper("known", title="Soil carbon under drought: a 12-year record", abstract=abstract(1))


@pytest.mark.parametrize(
    "paper, reason",
    [
        (Paper("known"), "id"),
        (Paper("known", title=KNOWN.title, abstract=KNOWN.abstract), "id"),
        (Paper("KNOWN"), None),
        (Paper("new", title=KNOWN.title, abstract=KNOWN.abstract), "title"),
        (Paper("new", title="  SOIL carbon\tunder  drought: a 12-year record. "), "title"),
        (Paper("new", title=wide(KNOWN.title)), "title"),
        (Paper("new", title="Soil carbon under drought: a 13-year record"), None),
        (Paper("new", title="Soil carbon"), None),
        (Paper("new", abstract=KNOWN.abstract.upper() + "."), "abstract"),
        (Paper("new", title="Another title", abstract=edited(KNOWN.abstract, 4)), "abstract"),
        (
            Paper(
                "new",
                abstract=(
                    f"Abstract. {KNOWN.abstract} All rights reserved by the publisher of this"
                    " journal."
                ),
            ),
            "abstract",
        ),
        (Paper("new", abstract=" ".join(KNOWN.abstract.split()[:130])), "abstract"),
        (Paper("new", abstract=edited(KNOWN.abstract, 60)), None),
        (Paper("new", abstract=" ".join(KNOWN.abstract.split()[:20]) + " " + abstract(2)), None),
        (Paper("new", abstract=abstract(2)), None),
        (Paper("new", summaries=("One.", "Two.")), None),
    ],
)
def test_a_paper_is_known_by_id_title_or_near_equal_abstract(
    paper: Paper, reason: str | None
) -> None:
    assert (
        SeenPapers([Paper("other", "Other title", abstract(3)), KNOWN, Paper("bare")]).reason(paper)
        == reason
    )


def test_papers_without_title_and_abstract_match_by_id_only() -> None:
    seen = SeenPapers(
        [Paper("a"), Paper("b", title=" ", abstract=" \n"), Paper("c", abstract="...")]
    )
    assert [
        seen.reason(paper)
        for paper in (Paper("x"), Paper("y", title=" "), Paper("z", abstract="?!"), Paper("a"))
    ] == [None, None, None, "id"]


def test_real_abstracts_are_found_when_edited_and_not_confused_with_their_topic() -> None:
    """The sample papers: four on each topic, in the same terms. Each is found again with four words
    changed, and never for another paper.
    """
    papers = sample("sample_test.jsonl")
    seen = SeenPapers()
    # none is found among those before it, of which up to three share its topic
    for paper in papers:
        assert seen.reason(paper) is None
        seen.add(paper)
    found = Counter(
        seen.reason(Paper(f"new {i}", title=f"New {i}", abstract=edited(paper.abstract, 4)))
        for i, paper in enumerate(papers)
    )
    assert found == {"abstract": len(papers)}
    assert drop_seen(sample("sample_train.jsonl"), seen)[1] == {}


def test_a_copied_abstract_is_found_even_if_all_of_it_was_pieced_together() -> None:
    """Guards against: an 8-gram belongs to the first abstract that held it, so a collection's own
    abstract made of three others is not found.
    """
    thirds = [abstract(seed, 50) for seed in (4, 5, 6)]
    pieced = " ".join(thirds)
    seen = SeenPapers(
        [
            *(
                Paper(f"{i}", abstract=f"{part} {abstract(10 + i, 60)}")
                for i, part in enumerate(thirds)
            ),
            Paper("pieced", abstract=pieced),
        ]
    )
    assert seen.reason(Paper("new", abstract=pieced)) == "abstract"


def test_dropped_papers_are_counted_by_reason() -> None:
    fresh = [Paper("a", "Title a", abstract(2)), Paper("b")]
    copies = [
        Paper("known"),
        Paper("c", KNOWN.title.upper()),
        Paper("d", KNOWN.title, KNOWN.abstract),
        Paper("e", "Title e", KNOWN.abstract),
    ]
    kept, dropped = drop_seen([fresh[0], *copies, fresh[1]], SeenPapers([KNOWN]))
    assert kept == fresh
    assert dropped == {"id": 1, "title": 2, "abstract": 1}


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
