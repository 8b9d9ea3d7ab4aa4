"""semcse/papers.py: reading valid and invalid papers files, text files, and shards."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_paper
from hostile import (
    BAD_FILES,
    BAD_LINES,
    BAD_PLACES,
    NASTY,
    NEEDED,
    Place,
    jsonl,
    nasty_papers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from semcse.errors import UserError
from semcse.papers import TEXT_KEYS, normalise, read_papers, shard_slice, text_lines


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file name that the property tests write to again and again."""
    return tmp_path_factory.mktemp("scratch") / "papers.jsonl"


def message_and_fix(error: UserError) -> tuple[str, str]:
    """The two parts of an error, after a check that it is one line with exit code 2."""
    assert "\n" not in str(error)
    assert error.exit_code == 2
    message, _, fix = str(error).rpartition("; ")
    return message, fix


# Valid files


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
def test_every_packing_reads_the_same_whatever_the_name(
    tmp_path: Path, name: str, packed: Callable[[bytes], bytes]
) -> None:
    rows = [make_paper(i) for i in range(5)]
    (tmp_path / name).write_bytes(packed(jsonl(*rows)))
    need = ("summaries", "title", "abstract", "query")
    assert [paper.as_row() for paper in read_papers(tmp_path / name, need)] == rows


def test_reading_streams(tmp_path: Path) -> None:
    """A line that is appended after the first paper was yielded is still read."""
    path = tmp_path / "papers.jsonl"
    path.write_bytes(jsonl(make_paper(0)))
    papers = read_papers(path)
    assert next(papers).id == "paper-0"
    with path.open("ab") as handle:
        handle.write(jsonl(make_paper(1)) + b"no JSON\n")
    assert next(papers).id == "paper-1"
    with pytest.raises(UserError, match=r"papers\.jsonl:3: "):
        next(papers)


def test_a_pipe_is_read_like_a_file() -> None:
    """`--train-file <(zcat a.gz b.gz)` gives a pipe. Guards against: a seek, which pipes refuse."""
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as pipe:
        pipe.write(gzip.compress(jsonl(make_paper(0))))
    assert [paper.id for paper in read_papers(f"/dev/fd/{read_end}")] == ["paper-0"]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
unknown_keys = st.dictionaries(
    words.filter(lambda key: key not in (*TEXT_KEYS, "summaries", "visits")),
    json_values,
    max_size=3,
)


@given(
    identity=words.filter(str.strip),
    texts=st.fixed_dictionaries({}, optional={key: words for key in TEXT_KEYS if key != "id"}),
    summaries=st.lists(words, max_size=4),
    unknown=unknown_keys,
    ascii_only=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_a_row_is_read_and_written_unchanged(
    scratch: Path,
    identity: str,
    texts: dict[str, str],
    summaries: list[str],
    unknown: dict[str, Any],
    ascii_only: bool,
) -> None:
    """Except that empty texts and repeated summaries are left out."""
    row = {"id": identity} | texts | {"summaries": summaries} | unknown
    scratch.write_text(
        json.dumps(row, ensure_ascii=ascii_only) + "\n", encoding="utf-8", newline=""
    )
    (paper,) = read_papers(scratch)
    distinct: list[str] = []
    for text in summaries:
        if text.strip() and normalise(text) not in map(normalise, distinct):
            distinct.append(text)
    expected = {"id": identity} | {key: text for key, text in texts.items() if text} | unknown
    assert paper.as_row() == expected | ({"summaries": distinct} if distinct else {})
    scratch.write_text(json.dumps(paper.as_row()) + "\n", encoding="utf-8")
    assert list(read_papers(scratch)) == [paper]


def test_strange_papers_are_read_and_written_unchanged(tmp_path: Path) -> None:
    path, again = tmp_path / "papers.jsonl", tmp_path / "again.jsonl"
    path.write_bytes(jsonl(*nasty_papers()))
    papers = list(read_papers(path, NEEDED))
    for paper, row, changes in zip(papers, nasty_papers(), NASTY.values(), strict=True):
        if "summaries" in changes:
            row["summaries"] = list(dict.fromkeys(row["summaries"]))
        assert paper.as_row() == row
    lines = [json.dumps(paper.as_row(), ensure_ascii=False) + "\n" for paper in papers]
    again.write_text("".join(lines), encoding="utf-8", newline="")
    assert list(read_papers(again, NEEDED)) == papers


def test_keys_that_are_not_needed_may_be_missing_or_blank(
    papers_file: Callable[..., Path],
) -> None:
    rows = [
        {"id": "a"},
        {"id": "b", "title": " ", "summaries": ["One.", " ", "Two."]},
        {"id": "c", "summaries": []},
    ]
    found = [paper.summaries for paper in read_papers(papers_file(rows))]
    assert found == [(), ("One.", "Two."), ()]


@pytest.mark.parametrize(
    "one, other",
    [
        ("Soil holds carbon.", "soil holds carbon"),
        (" SOIL\tholds\n carbon. ", "soil holds carbon"),
        ("ｓｏｉｌ ｈｏｌｄｓ\u00a0carbon", "soil holds carbon"),  # noqa: RUF001
        ("soil holds carbon .", "soil holds carbon"),
        ("STRASSE", "Straße"),
        ("ΛΌΓΟΣ", "λόγος"),
    ],
)
def test_texts_that_differ_in_case_width_space_or_full_stop_are_equal(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_texts_that_differ_in_a_word_or_sign_are_not_equal() -> None:
    texts = ("soil", "soils", "so il", "soil?", "no soil", "")
    assert len({normalise(text) for text in texts}) == len(texts)


# Invalid files


@pytest.mark.parametrize(
    "line, what, fix", [pytest.param(*case[1:], id=case[0]) for case in BAD_LINES]
)
def test_a_bad_line_is_named_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, what: str, fix: str
) -> None:
    """Each bad line is line 3, after a valid paper and a blank line, and before a valid paper."""
    path = tmp_path / "papers.jsonl"
    path.write_bytes(jsonl(make_paper(1)) + b"\n" + line + b"\n" + jsonl(make_paper(2)))
    papers = read_papers(path, NEEDED)
    assert next(papers).id == "paper-1"
    with pytest.raises(UserError) as caught:
        next(papers)
    message, advice = message_and_fix(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert what in message
    assert fix in advice
    assert "--skip-invalid" in advice
    assert len(str(caught.value)) < 400

    kept = list(read_papers(path, NEEDED, skip_invalid=True))
    assert [paper.id for paper in kept] == ["paper-1", "paper-2"]
    assert caplog.messages == [f"{path}: left out 1 bad lines, kept 2 papers"]


def test_skip_invalid_logs_nothing_for_a_valid_file_and_refuses_a_file_without_papers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_bytes(jsonl(make_paper(1)))
    assert len(list(read_papers(path, NEEDED, skip_invalid=True))) == 1
    assert caplog.messages == []
    path.write_bytes(b"no JSON\n" * 3)
    with pytest.raises(UserError, match=r"papers\.jsonl: holds no papers; give a file"):
        list(read_papers(path, NEEDED, skip_invalid=True))
    assert caplog.messages == [f"{path}: left out 3 bad lines, kept 0 papers"]


@pytest.mark.parametrize(
    "content, what, fix", [pytest.param(*case[1:], id=case[0]) for case in BAD_FILES]
)
def test_a_file_that_is_not_a_papers_file_is_refused(
    tmp_path: Path, content: bytes | Callable[[], bytes], what: str, fix: str
) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(UserError) as caught:
        list(read_papers(path))
    message, advice = message_and_fix(caught.value)
    assert message.startswith(f"{path}{what}")
    assert fix in advice
    if ":1: is" in what:
        with pytest.raises(UserError, match=r"holds no papers; .*one paper per line"):
            list(read_papers(path, skip_invalid=True))


@pytest.mark.parametrize(
    "place, what, fix", [pytest.param(*case[1:], id=case[0]) for case in BAD_PLACES]
)
def test_a_path_without_a_readable_file_is_refused(
    tmp_path: Path, place: Place, what: str, fix: str
) -> None:
    """Guards against: an OSError, which would end the script with exit code 1."""
    with place(tmp_path) as path, pytest.raises(UserError) as caught:
        list(read_papers(path))
    message, advice = message_and_fix(caught.value)
    assert message.startswith(f"{path}{what}")
    assert fix in advice


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
@settings(deadline=None, max_examples=120)
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
    ids, message = [], ""
    try:
        for paper in read_papers(scratch, need, skip_invalid):
            assert all(getattr(paper, key) for key in ("id", *need))
            assert len(set(map(normalise, paper.summaries))) == len(paper.summaries)
            json.dumps(paper.as_row(), ensure_ascii=False).encode()
            ids.append(paper.id)
    except UserError as error:
        message = str(error)
    assert message.startswith(str(scratch)) if message else ids
    assert len(set(ids)) == len(ids)


# Text files and shards


def test_text_lines_are_numbered_and_stripped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeff Bäume \n\n\tsoil and\triver\r\n".encode() + b"caf\xe9\nlast")
    with pytest.raises(UserError, match=r"texts\.txt:4: is not UTF-8; .*--skip-invalid"):
        list(text_lines(path))
    with caplog.at_level(logging.WARNING):
        found = list(text_lines(path, skip_invalid=True))
    assert found == [(1, "Bäume"), (3, "soil and\triver"), (5, "last")]
    assert caplog.messages == [f"{path}: left out 1 bad lines, kept 3 texts"]
    path.write_bytes(b" \n")
    with pytest.raises(UserError, match=r"texts\.txt: holds no texts"):
        list(text_lines(path))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shards_hold_every_paper_once(count: int) -> None:
    shards = [shard_slice(f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(place for shard in shards for place in range(20)[shard]) == list(range(20))


@pytest.mark.parametrize("shard", ["", "0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "01/2"])
def test_what_is_not_a_shard_is_refused(shard: str) -> None:
    with pytest.raises(UserError, match=r"is not a shard; give i/n"):
        shard_slice(shard)
