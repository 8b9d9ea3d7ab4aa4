"""The quality gate, on hand-written and on generated texts."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semcse.papers import normalise
from semcse.quality_gate import alike, clean, judge, parse_texts

TITLE = "Heat against zebra mussels in power plants"
ABSTRACT = (
    "Zebra mussels clog the water intakes of power plants along large rivers. Regular heat"
    " treatment of the intake pipes at 40 degrees kills nine of ten mussels within an hour. Costs"
    " fell by half in three plants."
)
PROMPT = (
    "Answer with the sentence only. Write one sentence about the main result: as concretely as it"
    " can be told."
)
GOOD = (
    "Warming the pipes that feed river power stations removes most invasive bivalves and halves the"
    " expense."
)


def judged(text: str, words: tuple[int, int] = (6, 80), **options: Any) -> str | None:
    return judge(text, title=TITLE, abstract=ABSTRACT, prompt=PROMPT, words=words, **options)


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
def test_clean_removes_what_is_around_the_text(raw: str) -> None:
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
def test_clean_changes_nothing_that_belongs_to_the_text(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("raw", ["", " \n\t", "<think>never ends", "```\n```", '""', "- "])
def test_an_answer_without_a_text_is_empty(raw: str) -> None:
    assert judged(clean(raw)) == "empty"


LAYERS = [
    "- ",
    "1. ",
    "__",
    "**",
    "Summary: ",
    '"',
    "<think>",
    "this ",
    "as an ",
    '{"\\"',
    "a\u0301",
]


@pytest.mark.parametrize("layer", LAYERS)
def test_an_endless_answer_is_rejected_quickly(layer: str) -> None:
    """Cleaning layer by layer, or searching again from every quote, could take minutes."""
    start = time.process_time()
    for raw in (layer * 20_000, "{" + layer * 20_000, GOOD + layer * 20_000):
        texts = [raw, *parse_texts(raw)[:4]]
        assert all(judged(clean(text), others=[GOOD]) for text in texts)
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
@settings(deadline=None, max_examples=100)
def test_every_text_that_passes_is_one_valid_line(noise: str, form: str) -> None:
    raw = form.replace("%s", noise)
    for text in map(clean, [raw, *parse_texts(raw)]):
        if judged(text) is None:
            assert 6 <= len(text.split()) <= 80
            assert text == " ".join(text.split())
            assert text.encode().decode() == text


@given(st.text() | st.text(alphabet="ab \"'`*_#-1.:\n\\[]{}<think>/Sumary"))
@settings(deadline=None, max_examples=100)
def test_clean_is_idempotent(raw: str) -> None:
    text = clean(raw)
    assert clean(text) == text
    assert all(line == " ".join(line.split()) != "" for line in text.split("\n") if text)


FREES = "warm water frees pipes from most bivalves."
REJECTED = {
    "empty": ["", "..."],
    "refusal": [
        "I'm sorry, but I can't summarise this text for you.",
        "Not applicable to this kind of text, which has no result.",
        "N/A.",
        "As an AI language model I have no access to the paper itself.",
        "Sadly, as a language model I have no access to it.",
    ],
    "several lines": [f"{GOOD}\n{GOOD}"],
    "too short": ["Heat kills most mussels quickly."],
    "too long": [
        " ".join(f"word{i}" for i in range(81)),
        "Seven long words are no summary either: " + "x" * 3_200,
    ],
    "speaks of the study": [
        "This study shows that warm water removes most bivalves from pipes.",
        "Warm water, the authors say, removes most bivalves from river pipes.",
        "Warm water removes most bivalves from pipes, as we could show.",
        f"A recent paper says {FREES}",
        f"A one-sentence account of how {FREES}",
        f"The scientific abstract says {FREES}",
        f"The subject is an example of how {FREES}",
        f"This is a fact about how {FREES}",
        f"The finding above means that {FREES}",
    ],
    "a question": ["Does warm water remove most bivalves from the pipes of power stations?"],
    "repeats the prompt": [
        "Write one sentence about the main result, as concretely as it can be told.",
        "As concretely as it can be told.",
    ],
    "copies the title": [TITLE, "heat against Zebra mussels, in power plants!"],
    "copies the abstract": [
        "Zebra mussels clog the water intakes of power plants along large rivers.",
        "Costs fell by half in three plants.",
        "In truth, zebra mussels clog the water intakes of power plants along large rivers.",
        "Regular heat treatment of the intake pipes at 40 degrees kills nine of ten mussels within"
        " an hour and halves costs",
    ],
    None: [
        GOOD,
        "None of the heated mussels in river pipes lived longer than a day.",
        " ".join(f"word{i}" for i in range(80)),
        "Bivalves are the subject of control by warm water in river pipes.",
        f"The abstract theory of groups explains how {FREES}",
        "Studies of rivers need warm water; the US Army removes bivalves.",
        "Mussels die when pipes are heated to 40 degrees for an hour, at half the earlier cost.",
    ],
}


@pytest.mark.parametrize(
    "text, reason", [(text, reason) for reason, texts in REJECTED.items() for text in texts]
)
def test_judge_returns_the_reason(text: str, reason: str | None) -> None:
    assert judged(text) == reason


def test_judge_compares_with_the_other_texts_of_the_paper() -> None:
    other = GOOD.replace("Warming the pipes", "Warming pipes").replace("the expense", "expense")
    words, others = set(normalise(GOOD).split()), set(normalise(other).split())
    assert len(words & others) / len(words | others) >= 0.8
    assert judged(GOOD, others=[other]) == "near-duplicate"
    assert judged(GOOD, others=["Bivalves hate warm pipes."]) is None
    assert judged(GOOD, cut=True) == "cut off"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("heat treatment of the intake pipes", None),
        ("how do zebra mussels die?", None),
        ("paper on zebra mussels by the authors", "speaks of the study"),
        ("mussels", "too short"),
        ("heat against zebra mussels power plants", "copies the title"),
    ],
)
def test_queries_may_be_short_questions_and_share_a_phrase_with_the_abstract(
    text: str, reason: str | None
) -> None:
    assert judged(text, words=(2, 16), question=True) == reason


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
)
@settings(deadline=None, max_examples=100)
def test_alike_is_the_jaccard_index_of_the_words(one: list[str], two: list[str]) -> None:
    a, b = set(one), set(two)
    assert alike(" ".join(one), " ".join(two).upper() + ".") == (len(a & b) / len(a | b) >= 0.8)


@given(st.text() | st.text(alphabet='ab "\\[]{}:,\n'))
@settings(deadline=None, max_examples=100)
def test_parse_texts_never_raises(text: str) -> None:
    assert all(isinstance(part, str) for part in parse_texts(text))


TEXT_LISTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4
)


@given(TEXT_LISTS, st.booleans(), st.data())
@settings(deadline=None, max_examples=100)
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
