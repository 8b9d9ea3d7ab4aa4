"""The quality gate: clean the answers of a language model, and say why a text must not be used.

The rules and thresholds are our choice.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable

from semcse.papers import normalise

SAME_WORDS = 0.8  # two texts are near-duplicates if their word sets have this Jaccard index
COPIED = 0.7  # a text is copied if this share of its word 5-grams is in the source
LONGEST_TEXT = 4_000  # in characters; the time for cleaning an answer grows with their square
CHARS_PER_WORD = 40  # a text of at most n words may have n times this many characters

_STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_LIST_MARK = re.compile(r"^(?:[-*+•>]+|#{1,6}|\(?\d{1,2}[.)])\s+")
_PREAMBLE = r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b[^:]{0,120}"
_LABEL = re.compile(
    rf"^(?:{_PREAMBLE}|(?:[\w-]+ ){{0,2}}(?:summary|answer|query|sentence|output)(?: \d+)?):\s*",
    re.I,
)
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1\.?""")
_REFUSAL = re.compile(
    r"i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i apologi[sz]e"
    r"|i (?:cannot|can't|do not|don't)\b|not applicable|(?:n/?a|none|null)\W*$|please provide"
    r"|.*\bas an? (?:ai|(?:large )?language model)\b",
    re.I | re.S,
)
# "The study shows that ...": the text is what the study shows.
_REPORTED = re.compile(
    r"(?:(?:the|this|these|a|an|our) )?(?:\w+ ){0,2}"
    r"(?:study|paper|article|abstract|research|work|results?|findings?|authors|researchers"
    r"|conclusion)"
    r"(?: (?:of|in) (?:the|this) (?:\w+ )?(?:study|paper|article|abstract|research))?"
    r" (?:also )?"
    r"(?:is|was|shows?|showed|finds?|found|reveals?|revealed|suggests?|suggested"
    r"|demonstrates?|demonstrated|indicates?|concludes?|concluded)"
    r" that ",
    re.I,
)
_ABOUT_STUDY = re.compile(
    r"\b(?:[Ww]e|[Oo]urs?|[Tt]he (?:authors?|researchers|investigators))\b"
    r"|\b(?:[Tt]h(?:e|is|ese)|[Aa]n?|[Pp]resent|[Cc]urrent) (?:\w+ )?"
    r"(?:study|studies|paper|article|manuscript|report|summary)\b"
    r"|\b[Tt]his (?:\w+ )?"
    r"(?:work|research|review|investigation|analysis|experiment|abstract|text)\b"
    r"|\b[Tt]he (?:scientific|given) abstract\b|\b[Oo]ne[- ]sentence\b"
    r"|\b(?:[Tt]he|[Tt]his) (?:subject|sentence|statement|question) (?:is|above)\b"
    r"|\b[Ff]indings? above\b"
    r"|\b[Ii]s a (?:\w+ )?fact\b|\b[Aa] (?:single )?fact (?:in|about)\b"
)


def clean(answer: str) -> str:
    """Return the text of an answer without thoughts, preamble, label, quotes, markdown and list
    marks around it. Several lines remain several lines.
    """
    text = answer.encode(errors="replace").decode().translate(_STRAIGHT_QUOTES)
    text = re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.S)[:LONGEST_TEXT]
    before = ""
    while before != text:
        before = text
        lines = re.sub(r"```\w*", "\n", text).splitlines()
        lines = [line for line in map(_clean_line, lines) if line]
        while len(lines) > 1 and lines[0].endswith(":"):
            del lines[0]
        text = "\n".join(lines)
    return text


def _clean_line(line: str) -> str:
    """Remove one layer of marks, label and quotes, and all emphasis, control characters and
    repeated white space.
    """
    line = re.sub(r"\*\*|(?<!\w)__|__(?!\w)", "", re.sub(r"[\x00-\x1f\x7f]", " ", line))
    line = re.sub(r"(?<!\w)\*(?=\S)([^*]+)(?<=\S)\*(?!\w)", r"\1", " ".join(line.split()))
    line = _LABEL.sub("", _LIST_MARK.sub("", line))
    if quoted := _QUOTED.fullmatch(line):
        line = quoted[2].strip()
    if reported := _REPORTED.match(line):
        line = line[reported.end() :]
        line = line[:1].upper() + line[1:]
    return line


def judge(
    text: str,
    *,
    title: str,
    abstract: str,
    prompt: str,
    words: tuple[int, int],
    others: Iterable[str] = (),
    question: bool = False,
    cut: bool = False,
) -> str | None:
    """Return the first reason why a cleaned text must not enter the data, or None if it is good.

    Args:
        text: What `clean` returned.
        title, abstract: Those of the paper, which the text must not copy.
        prompt: All instructions to the model, which the text must not repeat.
        words: The fewest and the most words of a text.
        others: Texts of the same paper that were accepted before.
        question: Whether the text may be a question.
        cut: Whether the token limit ended the text.
    """
    reasons: dict[str, Callable[[], object]] = {
        "cut off": lambda: cut,
        "empty": lambda: not re.search(r"\w", text),
        "refusal": lambda: _REFUSAL.match(text),
        "several lines": lambda: "\n" in text,
        "too short": lambda: len(text.split()) < words[0],
        "too long": lambda: len(text.split()) > words[1] or len(text) > CHARS_PER_WORD * words[1],
        "repeats the prompt": lambda: any(_ngrams_found(text, prompt, 4)),
        "speaks of the study": lambda: _ABOUT_STUDY.search(text),
        "a question": lambda: not question and text.endswith("?"),
        "copies the title": lambda: alike(text, title),
        "copies the abstract": lambda: copied(text, abstract),
        "near-duplicate": lambda: any(alike(text, other) for other in others),
    }
    return next((reason for reason, applies in reasons.items() if applies()), None)


def copied(text: str, source: str) -> bool:
    """Return whether a text is copied: most of its word 5-grams occur in the source or, if it has
    fewer than eight words, it is nearly equal to a sentence of the source.
    """
    if len(_words(text).split()) < 8:
        return any(alike(text, sentence) for sentence in re.split(r"(?<=[.!?:])\s+", source))
    found = _ngrams_found(text, source, 5)
    return sum(found) >= COPIED * len(found)


def _ngrams_found(text: str, source: str, n: int) -> list[bool]:
    """Return for each word n-gram of the text whether it occurs in the source."""
    words, whole = _words(text).split(), _words(source)
    return [f" {' '.join(words[i : i + n])} " in whole for i in range(len(words) - n + 1)]


def alike(one: str, two: str) -> bool:
    """Return whether the word sets of two texts have a Jaccard index of at least SAME_WORDS."""
    a, b = set(_words(one).split()), set(_words(two).split())
    return len(a & b) >= SAME_WORDS * max(1, len(a | b))


@functools.lru_cache(1024)
def _words(text: str) -> str:
    """Return the normalised words of a text with a space before and after each."""
    return " ".join(["", *re.findall(r"\w+", normalise(text)), ""])


def parse_texts(answer: str) -> list[str]:
    """Read an answer that should be JSON {"texts": [...]}: return its complete strings, even if the
    answer was cut, or its lines if there are none. Never raises.
    """
    found = []
    if re.search(r"[\[{]", answer):
        for string, colon in re.findall(r'("(?:[^"\\]|\\.)*+"?)(\s*:)?', answer, re.S):
            with contextlib.suppress(ValueError):
                if not colon:
                    found.append(str(json.loads(string, strict=False)))
    return found or answer.splitlines()
