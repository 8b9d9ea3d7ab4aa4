"""Find papers that are already in a collection, by id, title or near-equal abstract, so that no
evaluation paper is trained on. Abstracts are compared by sketches (bottom-k MinHash): a sample of
the hashes of their word 8-grams.
"""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Iterable

from semcse.papers import Paper, normalise

# Our choice. 24 hashes keep the sketches of 350,000 papers near 1 GiB.
SHINGLE_WORDS = 8
SKETCH = 24
NEAR_EQUAL = 0.5  # share of the smaller sketch that near-equal abstracts have in common


@functools.lru_cache(maxsize=2)  # because a paper is looked up and then added
def sketch(text: str) -> tuple[int, ...]:
    """Return the SKETCH smallest hashes of a text's word 8-grams, or all if there are fewer. The
    share of hashes that two sketches have in common estimates the share of common 8-grams.
    """
    words = re.findall(r"\w+", normalise(text))
    # A text of fewer than eight words is one shorter n-gram; a text without words has none.
    starts = range(max(min(len(words), 1), len(words) - SHINGLE_WORDS + 1))
    grams = {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}
    return tuple(sorted({zlib.crc32(gram.encode()) for gram in grams})[:SKETCH])


class SeenPapers:
    """A collection of papers that recognises the papers it already holds."""

    def __init__(self, papers: Iterable[Paper] = ()) -> None:
        self.ids: set[str] = set()
        self._titles: set[str] = set()
        self._sketch_sizes: list[int] = []  # by abstract, in the order of `add`
        self._first_with: dict[int, int] = {}  # hash of an 8-gram -> the first abstract with it
        self._whole_sketches: set[int] = set()  # one hash per sketch, which finds exact copies
        for paper in papers:
            self.add(paper)

    def add(self, paper: Paper) -> None:
        """Add one paper to the collection."""
        self.ids.add(paper.id)
        self._titles.add(normalise(paper.title))
        hashes = sketch(paper.abstract)
        for value in hashes:
            self._first_with.setdefault(value, len(self._sketch_sizes))
        self._sketch_sizes.append(len(hashes))
        self._whole_sketches.add(hash(hashes))

    def reason(self, paper: Paper) -> str | None:
        """Return why `paper` counts as already collected ("id", "title" or "abstract"), or None if
        it is new.
        """
        if paper.id in self.ids:
            return "id"
        title, hashes = normalise(paper.title), sketch(paper.abstract)
        if title and title in self._titles:
            return "title"
        if hashes and hash(hashes) in self._whole_sketches:
            return "abstract"
        shared = Counter(self._first_with[value] for value in hashes if value in self._first_with)
        for other, count in shared.items():
            if count >= NEAR_EQUAL * min(len(hashes), self._sketch_sizes[other]):
                return "abstract"
        return None


def drop_seen(papers: Iterable[Paper], seen: SeenPapers) -> tuple[list[Paper], Counter[str]]:
    """Return the papers that are not in `seen`, and how many were dropped for which reason."""
    reasons = [(paper, seen.reason(paper)) for paper in papers]
    kept = [paper for paper, reason in reasons if reason is None]
    return kept, Counter(reason for _, reason in reasons if reason)
