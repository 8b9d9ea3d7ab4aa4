"""The benchmark of the bundled encoder against a separate computation with sentence-transformers,
numpy, scipy and scikit-learn, on the sample papers and on 1,000 real papers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, cast

import numpy as np
import pytest
from conftest import ROOT, SHARED
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]
from sklearn.neighbors import NearestNeighbors

from semantic_benchmark import evaluate
from semcse.encoder import Embedded, Encoder
from semcse.model_folder import BUNDLED, find_model
from semcse.models import load_model
from semcse.papers import Paper, read_papers
from semcse.tables import TASKS, main_score
from semcse.types import Metric, Pooling

Vectors = dict[str, Any]  # text -> (d,) float64
SAMPLED = ("Physics", "Art")  # with 12 sample papers each; Physics has texts of over 256 tokens


def sample_papers() -> list[Paper]:
    """24 of the sample papers."""
    papers = read_papers(ROOT / "data/sample_test.jsonl", ("title", "abstract"))
    return [paper for paper in papers if paper.field in SAMPLED]


def thousand_papers() -> list[Paper]:
    """250 papers with a query, 150 with a field of study, and 600 of nine reviews."""
    by_kind = defaultdict(list)
    for paper in read_papers(SHARED / "papers_dev.jsonl.gz", ("title", "abstract")):
        by_kind["review" if paper.source.startswith("review-") else paper.source].append(paper)
    with_field = [paper for paper in by_kind["scirepeval-fos"] if paper.field]
    return by_kind["scitldr-dev"][:250] + with_field[:150] + by_kind["review"][::4][:600]


class Recorder:
    """An encoder that records the vector of every text that it embeds."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.usage, self.vectors = encoder, encoder.usage, Vectors()

    def embed(self, texts: list[str], prompt: str = "", label: str = "") -> Embedded:
        embedded = self.encoder.embed(texts, prompt, label)
        self.vectors.update(zip(texts, embedded.vectors.double().numpy(), strict=True))
        return embedded


def cut_in_two(abstract: str) -> tuple[str, str] | None:
    """The halves of an abstract, from the definition, letter by letter."""
    ends = [
        place
        for place in range(1, len(abstract))
        if abstract[place - 1] in ".!?" and abstract[place].isspace() and abstract[place:].strip()
    ]
    if not ends:
        return None
    best = min(ends, key=lambda place: (abs(2 * place - len(abstract)), place))
    return abstract[:best], abstract[best:].strip()


def plain_ranks(pairs: list[tuple[str, str]], pool: list[str], use: Vectors, metric: Metric) -> Any:
    """The rank of the positive of each (query, positive) among the candidates of `pool`."""
    queries = np.array([use[query] for query, _ in pairs])
    table = cdist(queries, np.array([use[text] for text in pool]), metric)
    positives = [pool.index(positive) for _, positive in pairs]
    return [rankdata(row)[positive] for row, positive in zip(table, positives, strict=True)]


def plain_purities(papers: list[Paper], use: Vectors, metric: Metric, k: int = 10) -> list[float]:
    labelled = [paper for paper in papers if paper.field]
    sizes = Counter(paper.field for paper in labelled)
    points = np.array([use[paper.abstract] for paper in labelled])
    index = NearestNeighbors(n_neighbors=k + 1, algorithm="brute", metric=metric).fit(points)
    shares = []
    for place, neighbours in enumerate(index.kneighbors(points, return_distance=False)):
        others = [labelled[other].field for other in neighbours if other != place][:k]
        if sizes[labelled[place].field] > k:
            shares.append(others.count(labelled[place].field) / k)
    return shares


# The second use: the recipe's `normalize` must not remain when `--metric euclidean` replaces the
# recipe's metric, because Euclidean means the distance of the raw vectors.
@pytest.mark.parametrize(
    ("papers_of", "pooling", "metric"),
    [
        (sample_papers, "mean", "cosine"),
        (sample_papers, "cls", "euclidean"),
        pytest.param(
            thousand_papers,
            "mean",
            "cosine",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not SHARED.is_dir(), reason="the development papers are missing"
                ),
            ],
        ),
    ],
)
def test_the_scores_equal_those_of_a_separate_computation(
    papers_of: Any, pooling: Pooling, metric: Metric
) -> None:
    papers = papers_of()
    flags = (None, None) if metric == "cosine" else (pooling, metric)
    recorder = Recorder(load_model(BUNDLED, *flags, device="cpu"))
    evaluation = evaluate(cast(Encoder, recorder), papers, 0)
    use = recorder.vectors

    abstracts = [paper.abstract for paper in papers]
    titles = [(paper.title, paper.abstract) for paper in papers]
    halves = [pair for paper in papers if (pair := cut_in_two(paper.abstract))]
    queries = [(paper.query, paper.abstract) for paper in papers if paper.query]
    plain = {
        "title_abstract": plain_ranks(titles, abstracts, use, metric),
        "abstract_segments": plain_ranks(halves, [half for _, half in halves], use, metric),
        "query": plain_ranks(queries, abstracts, use, metric),
        "clustering": plain_purities(papers, use, metric),
    }
    for task in TASKS:
        values = evaluation.per_paper[task]
        assert values[~np.isnan(values)].tolist() == plain[task]
        scores = evaluation.report["tasks"][task]
        assert scores[main_score(task)] == pytest.approx(np.mean(plain[task]), rel=1e-9)
    assert evaluation.report["truncated_share"] > 0  # so that truncated texts are compared too

    from sentence_transformers import SentenceTransformer

    some = list(use)[:: len(use) // 30]
    model = SentenceTransformer(str(find_model(BUNDLED)), device="cpu")
    outputs: Any = model.encode(some, output_value=None, show_progress_bar=False)
    for text, output in zip(some, outputs, strict=True):
        both = {"mean": output["sentence_embedding"], "cls": output["token_embeddings"][0]}
        np.testing.assert_allclose(use[text], both[pooling].double().numpy(), atol=1e-5)
