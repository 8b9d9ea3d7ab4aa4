"""The bundled encoder on 1,000 real papers: the four tasks' numbers against a computation with
numpy, scipy and scikit-learn alone, and the time it takes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]
from sklearn.neighbors import NearestNeighbors

from semantic_benchmark import evaluate
from semcse.encoder import Embedded
from semcse.model_folder import BUNDLED, find_model
from semcse.models import Wanted, load_model
from semcse.papers import Paper, read_papers
from semcse.tables import TASKS, main_score
from settings import Settings

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the development papers are not here")
Vectors = dict[str, Any]  # text -> (d,) float64


def thousand() -> list[Paper]:
    """250 papers with a query, 150 with a field of study, and 600 of nine reviews."""
    by_kind = defaultdict(list)
    for paper in read_papers(SHARED / "papers_dev.jsonl.gz", ("title", "abstract")):
        by_kind["review" if paper.source.startswith("review-") else paper.source].append(paper)
    return (
        by_kind["scitldr-dev"][:250]
        + [paper for paper in by_kind["scirepeval-fos"] if paper.field][:150]
        + by_kind["review"][::4][:600]
    )


def cut_in_two(abstract: str) -> tuple[str, str] | None:
    """After the sentence end nearest to the middle, the earlier one on a tie; None for one
    sentence.
    """
    best = None
    for place in range(1, len(abstract)):
        ends = (
            abstract[place - 1] in ".!?" and abstract[place].isspace() and abstract[place:].strip()
        )
        if ends and (
            best is None or abs(2 * place - len(abstract)) < abs(2 * best - len(abstract))
        ):
            best = place
    return (abstract[:best], abstract[best:].strip()) if best else None


def mean_rank(
    queries: list[str], candidates: list[str], positives: list[int], vectors: Vectors
) -> float:
    distances = cdist(
        np.array([vectors[text] for text in queries]),
        np.array([vectors[text] for text in candidates]),
        "cosine",
    )
    return float(
        np.mean(
            [rankdata(row)[positive] for row, positive in zip(distances, positives, strict=True)]
        )
    )


def purity(papers: list[Paper], vectors: Vectors, k: int = 10) -> float:
    labelled = [paper for paper in papers if paper.field]
    sizes = Counter(paper.field for paper in labelled)
    points = np.array([vectors[paper.abstract] for paper in labelled])
    found = (
        NearestNeighbors(n_neighbors=k + 1, algorithm="brute", metric="cosine")
        .fit(points)
        .kneighbors(points, return_distance=False)
    )
    shares = []
    for place, paper in enumerate(labelled):
        if sizes[paper.field] > k:
            others = [other for other in found[place] if other != place][:k]
            shares.append(np.mean([labelled[other].field == paper.field for other in others]))
    return float(np.mean(shares))


def test_a_thousand_papers_are_scored_as_a_plain_computation_scores_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    papers = thousand()
    encoder, _ = load_model(BUNDLED, Wanted(), Settings(device="cpu"))
    vectors: Vectors = {}
    embed = encoder.embed

    def noting(texts: list[str], prompt: str = "", label: str = "") -> Embedded:
        embedded = embed(texts, prompt, label)
        vectors.update(zip(texts, embedded.vectors.double().numpy(), strict=True))
        return embedded

    monkeypatch.setattr(encoder, "embed", noting)
    started = time.process_time()
    report = evaluate(encoder, papers, 0).report
    seconds = time.process_time() - started
    print(f"{seconds:.0f} s of CPU time on one thread")

    abstracts = [paper.abstract for paper in papers]
    pairs = [pair for paper in papers if (pair := cut_in_two(paper.abstract))]
    asked = [i for i, paper in enumerate(papers) if paper.query]
    plain = {
        "title_abstract": mean_rank(
            [paper.title for paper in papers], abstracts, list(range(1_000)), vectors
        ),
        "abstract_segments": mean_rank(
            [first for first, _ in pairs],
            [second for _, second in pairs],
            list(range(len(pairs))),
            vectors,
        ),
        "query": mean_rank([papers[i].query for i in asked], abstracts, asked, vectors),
        "clustering": purity(papers, vectors),
    }
    tasks = report["tasks"]
    assert {task: tasks[task][main_score(task)] for task in TASKS} == pytest.approx(plain, rel=1e-9)
    assert (
        tasks["title_abstract"]["pool"],
        tasks["query"]["n"],
        tasks["abstract_segments"]["n"],
    ) == (1_000, 250, len(pairs))
    print({task: f"{score:.4f}" for task, score in plain.items()})

    from sentence_transformers import SentenceTransformer

    some = list(vectors)[::97]
    theirs = SentenceTransformer(str(find_model(BUNDLED)), device="cpu").encode(
        some, show_progress_bar=False
    )
    np.testing.assert_allclose(np.array([vectors[text] for text in some]), theirs, atol=1e-5)
    # of CPU time, on one thread: four minutes on two cores leave twice as much
    assert seconds < 240
