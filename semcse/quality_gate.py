"""TODO: say what this file is for: semcse.quality_gate."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from semcse.papers import Paper, normalise

log = logging.getLogger(__name__)

SAME_WORDS = 0.8  # share of common words (Jaccard) from which two texts count as the same [ours]
# characters read of a text; so many a word are too many: cleaning takes time by the square
LONGEST_TEXT, CHARS_PER_WORD = 4_000, 40
COPIED = 0.7  # share of its word 5-grams in a source from which a text counts as copied [ours]


@dataclass(frozen=True)
class Prompt:
    """One instruction to the model."""

    name: str
    system: str
    task: str  # stands after the paper's text; "{n}" in it becomes the number of texts asked for


@dataclass(frozen=True)
class Job:
    """What a script wants of every paper."""

    key: Literal["summaries", "query"]  # where the texts go
    prompts: tuple[Prompt, ...]  # slot i has prompt i modulo their number
    texts: int  # texts wanted of a paper
    least: int  # papers with fewer are left out of the output
    words: tuple[int, int]  # fewest and most words of a text
    at_once: bool = False  # one request with a JSON schema for all missing texts of a paper
    keep: bool = False  # leave papers alone that have something under `key` already


# The quality gate

_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_MARK = re.compile(r"^(?:[-*+•>]+|#{1,6}|\(?\d{1,2}[.)])\s+")
_PREAMBLE = r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b[^:]{0,120}"
_LABEL = re.compile(
    rf"^(?:{_PREAMBLE}|(?:[\w-]+ ){{0,2}}(?:summary|answer|query|sentence|output)(?: \d+)?):\s*",
    re.I,
)
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1\.?""")
_REFUSAL = re.compile(
    r"i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i apologi[sz]e|i (?:cannot|can't|do"
    r" not|don't)\b|not applicable|(?:n/?a|none|null)\W*$|please provide"
    r"|.*\bas an? (?:ai|(?:large )?language model)\b",
    re.I | re.S,
)
_REPORTED = re.compile(  # "The study shows that ...": what it shows is the text
    r"(?:(?:the|this|these|a|an|our) )?(?:\w+"
    r" ){0,2}(?:study|paper|article|abstract|research|work|results?|findings?|authors|researchers|conclusion)"
    r"(?: (?:of|in) (?:the|this) (?:\w+ )?(?:study|paper|article|abstract|research))?"
    r" (?:also"
    r" )?(?:is|was|shows?|showed|finds?|found|reveals?|revealed|suggests?|suggested|demonstrates?|demonstrated|indicates?|concludes?|concluded)"
    r" that ",
    re.I,
)
_ABOUT_STUDY = re.compile(
    r"\b(?:[Ww]e|[Oo]urs?|[Tt]he (?:authors?|researchers|investigators))\b"
    r"|\b(?:[Tt]h(?:e|is|ese)|[Aa]n?|[Pp]resent|[Cc]urrent) (?:\w+"
    r" )?(?:study|studies|paper|article|manuscript|report|summary)\b"
    r"|\b[Tt]his (?:\w+"
    r" )?(?:work|research|review|investigation|analysis|experiment|abstract|text)\b"
    r"|\b[Tt]he (?:scientific|given) abstract\b|\b[Oo]ne[- ]sentence\b"
    r"|\b(?:[Tt]he|[Tt]his) (?:subject|sentence|statement|question) (?:is|above)\b|\b[Ff]indings?"
    r" above\b"
    r"|\b[Ii]s a (?:\w+ )?fact\b|\b[Aa] (?:single )?fact (?:in|about)\b"
)


def clean(text: str) -> str:
    """A model's answer without what stands around its text: thoughts, preamble, label, quotes,
    markdown, list mark. Several lines stay several lines.
    """
    text, before = (
        re.sub(
            r"<think>.*?(?:</think>|\Z)",
            "",
            text.encode(errors="replace").decode().translate(_STRAIGHT),
            flags=re.S,
        )[:LONGEST_TEXT],
        "",
    )
    while before != text:
        before = text
        lines = [line for line in map(_bare, re.sub(r"```\w*", "\n", text).splitlines()) if line]
        while len(lines) > 1 and lines[0].endswith(":"):
            del lines[0]
        text = "\n".join(lines)
    return text


def _bare(line: str) -> str:
    """One line without what may stand at its ends, emphasis, control characters and runs of white
    space.
    """
    line = re.sub(r"\*\*|(?<!\w)__|__(?!\w)", "", re.sub(r"[\x00-\x1f\x7f]", " ", line))
    line = re.sub(r"(?<!\w)\*(?=\S)([^*]+)(?<=\S)\*(?!\w)", r"\1", " ".join(line.split()))
    line = _LABEL.sub("", _MARK.sub("", line))
    quoted = _QUOTED.fullmatch(line)
    line = quoted[2].strip() if quoted else line
    reported = _REPORTED.match(line)
    return line[reported.end() :][:1].upper() + line[reported.end() + 1 :] if reported else line


def judge(
    text: str, paper: Paper, others: Iterable[str], job: Job, cut: bool = False
) -> str | None:
    """Why a cleaned text on `paper`, of which `others` were accepted before, must not enter the
    data; None if it may. `cut`: the token limit ended it.
    """
    reasons: dict[str, Callable[[], object]] = {
        "cut off": lambda: cut,
        "empty": lambda: not re.search(r"\w", text),
        "refusal": lambda: _REFUSAL.match(text),
        "several lines": lambda: "\n" in text,
        "too short": lambda: len(text.split()) < job.words[0],
        "too long": (
            lambda: len(text.split()) > job.words[1] or len(text) > CHARS_PER_WORD * job.words[1]
        ),
        "repeats the prompt": lambda: any(_shared(text, _all_prompts(job.prompts), 4)),
        "speaks of the study": lambda: _ABOUT_STUDY.search(text),
        "a question": lambda: job.key == "summaries" and text.endswith("?"),
        "copies the title": lambda: alike(text, paper.title),
        "copies the abstract": lambda: copied(text, paper.abstract),
        "near-duplicate": lambda: any(alike(text, other) for other in others),
    }
    return next((reason for reason, applies in reasons.items() if applies()), None)


def copied(text: str, source: str) -> bool:
    """Whether most word 5-grams of a text stand in the source; a text of fewer than eight words is
    compared with whole sentences instead.
    """
    if len(_words(text).split()) < 8:
        return any(alike(text, sentence) for sentence in re.split(r"(?<=[.!?:])\s+", source))
    found = _shared(text, source, 5)
    return sum(found) >= COPIED * len(found)


@functools.lru_cache(8)
def _all_prompts(prompts: tuple[Prompt, ...]) -> str:
    """What the model was told in any request, each part once."""
    return " ".join(
        dict.fromkeys(part for prompt in prompts for part in (prompt.system, prompt.task))
    )


def _shared(text: str, source: str, n: int) -> list[bool]:
    """Of every n words in a row of a text, whether they stand in the source."""
    words, whole = _words(text).split(), _words(source)
    return [f" {' '.join(words[i : i + n])} " in whole for i in range(len(words) - n + 1)]


def alike(one: str, two: str) -> bool:
    """Whether two texts consist of nearly the same words."""
    a, b = _word_set(one), _word_set(two)
    return len(a & b) >= SAME_WORDS * max(1, len(a | b))


@functools.lru_cache(1024)
def _word_set(text: str) -> frozenset[str]:
    return frozenset(_words(text).split())


@functools.lru_cache(1024)
def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", normalise(text)), ""])


def parse_texts(text: str) -> list[str]:
    """The whole strings of an answer that should be JSON {"texts": [...]}, also of one that was
    cut; the lines of an answer in prose. Never raises.
    """
    found = []
    for string, colon in (
        re.findall(r'("(?:[^"\\]|\\.)*+"?)(\s*:)?', text, re.S) if re.search(r"[\[{]", text) else []
    ):
        with contextlib.suppress(ValueError):
            found += [] if colon else [str(json.loads(string, strict=False))]
    return found or text.splitlines()
