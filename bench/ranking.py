"""Exact ranks and neighbours of a sample of queries among 100,000 vectors beside what people write
by hand, faiss and scikit-learn.
"""

from __future__ import annotations

from typing import Any

import faiss  # type: ignore[import-not-found]
import numpy as np
import sklearn
import torch
from common import interleaved, row
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional

from semcse.distances import nearest, ranks

N, D, K = 100_000, 384, 10
BLOCK = 256


def vectors(rows: int) -> tuple[Tensor, Tensor]:
    """(queries, candidates): unit vectors; each query is its candidate with noise of its own
    strength, so that some rank first and others far behind.
    """
    generator = torch.Generator().manual_seed(0)
    candidates = functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    noise = (
        torch.randn(rows, D, generator=generator)
        / D**0.5
        * (1 + 4 * torch.rand(rows, 1, generator=generator))
    )
    return functional.normalize(candidates[:rows] + noise, dim=1), candidates


def gemm_only(queries: Tensor, candidates: Tensor) -> None:
    """The float32 products that any method needs, nothing done with them."""
    for start in range(0, len(queries), BLOCK):
        for column in range(0, N, 4096):
            torch.mm(queries[start : start + BLOCK], candidates[column : column + 4096].T)


def by_full_block(queries: Tensor, candidates: Tensor) -> Tensor:
    """Ranks by counting in whole rows of scores."""
    found = []
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ candidates.T
        own = scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))]
        found.append((scores > own[:, None]).sum(dim=1) + 1)
    return torch.cat(found)


def by_argsort(queries: Tensor, candidates: Tensor) -> Tensor:
    """Ranks by sorting whole rows of scores."""
    found = []
    for start in range(0, len(queries), BLOCK):
        order = (queries[start : start + BLOCK] @ candidates.T).argsort(dim=1, descending=True)
        found.append(
            (order == torch.arange(start, start + len(order))[:, None]).nonzero()[:, 1] + 1
        )
    return torch.cat(found)


def float64_ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """The reference."""
    scores = (
        functional.normalize(queries.double(), dim=1)
        @ functional.normalize(candidates.double(), dim=1).T
    )
    own = torch.arange(len(queries))
    return (
        1
        + (scores > scores[own, own][:, None]).sum(dim=1)
        + ((scores == scores[own, own][:, None]).sum(dim=1) - 1) / 2
    )


def run(quick: bool) -> list[dict[str, Any]]:
    """All rows of ranks and neighbours."""
    queries, candidates = vectors(4_096 if quick else 16_384)
    few = queries[:2_048]
    kept: dict[str, Any] = {}
    best = interleaved(
        {
            "ours": lambda: kept.update(ranks=ranks(queries, candidates, "cosine")),
            "gemm": lambda: gemm_only(queries, candidates),
            "block": lambda: by_full_block(queries, candidates),
        },
        2,
    )
    sorting = interleaved(
        {
            "ours": lambda: ranks(few, candidates, "cosine"),
            "argsort": lambda: by_argsort(few, candidates),
        },
        1,
    )
    checked = torch.arange(0, len(queries), len(queries) // 256)
    own = functional.normalize(queries[checked].double(), dim=1)
    scores = own @ functional.normalize(candidates.double(), dim=1).T
    mine = scores[torch.arange(len(checked)), checked]
    wrong = int((1 + (scores > mine[:, None]).sum(dim=1) != kept["ranks"][checked]).sum())
    same = (
        f"{len(checked) - wrong} of {len(checked)} ranks checked equal float64's; mean rank"
        f" {float(kept['ranks'].mean()):.2f}"
    )
    unit = {
        "unit": f"seconds for {len(queries)} queries among {N} vectors of {D}",
        "agreement": same,
    }
    version = torch.__version__
    rows = [
        row(
            "ranks_vs_argsort",
            "torch.argsort of whole rows",
            version,
            sorting["ours"],
            sorting["argsort"],
            8.0,
            **unit | {"unit": f"{len(few)} queries"},
        ),
        row(
            "ranks_vs_full_block",
            "torch, whole rows of scores, counted",
            version,
            best["ours"],
            best["block"],
            1.4,
            **unit,
        ),
        row(
            "ranks_vs_gemm",
            "the float32 matrix product alone",
            version,
            best["ours"],
            best["gemm"],
            0.85,
            **unit,
        ),
    ]
    return rows + neighbours(few if quick else queries, candidates)


def neighbours(queries: Tensor, candidates: Tensor) -> list[dict[str, Any]]:
    """k nearest neighbours against faiss' flat index and scikit-learn's brute force."""
    index = faiss.IndexFlatIP(D)
    index.add(candidates.numpy())
    brute = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="euclidean").fit(
        candidates.numpy()
    )
    kept: dict[str, Any] = {}
    best = interleaved(
        {
            "ours": lambda: kept.update(ours=nearest(queries, candidates, K, "cosine")[1]),
            "sklearn": lambda: brute.kneighbors(queries.numpy(), return_distance=False),
            "faiss": lambda: index.search(queries.numpy(), K),
        },
        1,
    )
    some = slice(0, 256)
    exact = (
        (
            functional.normalize(queries[some].double(), dim=1)
            @ functional.normalize(candidates.double(), dim=1).T
        )
        .topk(K, dim=1)
        .indices
    )
    equal = float(np.mean(kept["ours"][some].numpy() == exact.numpy()))
    unit = {
        "unit": f"seconds for the {K} nearest of {len(queries)} queries among {N} vectors of {D}",
        "agreement": f"{equal:.2%} of 256 rows' neighbours equal float64's",
    }
    return [
        row(
            "neighbours_vs_faiss",
            "faiss.IndexFlatIP",
            faiss.__version__,
            best["ours"],
            best["faiss"],
            4.0,
            **unit,
        ),
        row(
            "neighbours_vs_sklearn",
            "sklearn NearestNeighbors, brute",
            sklearn.__version__,
            best["ours"],
            best["sklearn"],
            1.4,
            **unit,
        ),
    ]
