"""TODO: say what this file is for: semcse.near_duplicates."""

from __future__ import annotations

import functools
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable

from semcse.papers import Paper, normalise

log = logging.getLogger(__name__)

# Two abstracts are near-equal when their sketches of SKETCH hashed word 8-grams share this part
# [ours]. 24 hashes keep 350,000 papers' sketches near 1 GiB.
SHINGLE_WORDS = 8
SKETCH = 24
NEAR_EQUAL = 0.5


@functools.lru_cache(maxsize=2)  # a paper is looked up, then added
def sketch(text: str) -> tuple[int, ...]:
    """The smallest hashes of a text's word 8-grams, at most SKETCH of them: two texts share about
    as large a part of these as of all their 8-grams.
    """
    words = re.findall(r"\w+", normalise(text))
    grams = (
        {
            " ".join(words[i : i + SHINGLE_WORDS])
            for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
        }
        if words
        else set()
    )
    return tuple(sorted({zlib.crc32(gram.encode()) for gram in grams})[:SKETCH])


class SeenPapers:
    """Finds papers that stand in a given collection already: by id, normalised title, or near-equal
    abstract (half of the sketch shared).
    """

    def __init__(self, papers: Iterable[Paper] = ()) -> None:
        self.ids: set[str] = set()
        self.titles: set[str] = set()
        # hash of an 8-gram -> number of the first abstract that held it
        self.owners: dict[int, int] = {}
        self.sizes: list[int] = []
        self.whole: set[int] = set()  # hashes of whole sketches, for exact copies
        for paper in papers:
            self.add(paper)

    def add(self, paper: Paper) -> None:
        """Take one more paper into the collection."""
        self.ids.add(paper.id)
        if paper.title.strip():
            self.titles.add(normalise(paper.title))
        hashes = sketch(paper.abstract)
        for value in hashes:
            self.owners.setdefault(value, len(self.sizes))
        self.sizes.append(len(hashes))
        if hashes:
            self.whole.add(hash(hashes))

    def reason(self, paper: Paper) -> str | None:
        """Why `paper` counts as one of the collection ("id", "title" or "abstract"); None if it
        does not.
        """
        if paper.id in self.ids:
            return "id"
        if paper.title.strip() and normalise(paper.title) in self.titles:
            return "title"
        hashes = sketch(paper.abstract)
        shared = Counter(self.owners[value] for value in hashes if value in self.owners)
        near = hash(hashes) in self.whole or any(
            count >= NEAR_EQUAL * min(len(hashes), self.sizes[owner])
            for owner, count in shared.items()
        )
        return "abstract" if near else None


def drop_seen(papers: Iterable[Paper], seen: SeenPapers) -> tuple[list[Paper], Counter[str]]:
    """(papers that are not in `seen`, how many were dropped for which reason)."""
    kept, dropped = list[Paper](), Counter[str]()
    for paper in papers:
        if reason := seen.reason(paper):
            dropped[reason] += 1
        else:
            kept.append(paper)
    return kept, dropped
