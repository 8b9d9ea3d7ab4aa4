"""Distances between vectors, and exact ranks and nearest neighbours.

`ranks` and `nearest` work block by block, so memory does not grow with queries x candidates. In a
block, a float64 matrix product gives the squared distances |q|^2 + |c|^2 - 2 q.c and a bound on
their rounding error. Comparisons that this bound leaves open are decided by distances computed from
q - c, which are accurate however close two vectors are. The cosine distance is half the squared
Euclidean distance between unit vectors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from semcse.types import Metric

# A block of squared distances (2 MiB of float64) stays in the cache of a core.
QUERY_BLOCK, CANDIDATE_BLOCK = 64, 4096
# Two squared distances count as equal if they differ by at most TIE times their sum (plus UNIT_TIE
# for the cosine). That is more than float64 rounding and less than float32 vectors can differ.
TIE, UNIT_TIE = 1e-11, 2e-19


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """Return all distances between the rows of two matrices. The result is differentiable.

    Equal rows have distance exactly 0, and the gradient there is 0 instead of NaN.

    Args:
        a: (n, d) vectors.
        b: (m, d) vectors.
        metric: "euclidean" is the L2 distance of the raw vectors; "cosine" is 1 - cosine
            similarity, in [0, 2].

    Returns:
        (n, m) distances, none negative.
    """
    if metric == "cosine":
        a, b = functional.normalize(a, dim=-1), functional.normalize(b, dim=-1)
    lengths = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return lengths if metric == "euclidean" else lengths.square() / 2


def ranks(
    queries: Tensor, candidates: Tensor, metric: Metric, positives: Tensor | None = None
) -> Tensor:
    """Return the exact mid-rank of each query's positive among all candidates.

    The rank is 1 + the number of other candidates that are strictly closer + half the number of
    others that are equally close. A model that maps all texts to one vector ranks (m + 1) / 2.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        metric: The distance.
        positives: (n,) index of each query's positive; None means candidate i for query i.

    Returns:
        (n,) float64 ranks between 1 and m.

    Raises:
        ValueError: The vectors contain NaN or infinity.
    """
    positives = torch.arange(len(queries)) if positives is None else positives
    result = torch.ones(len(queries), dtype=torch.float64)
    for block in _blocks(queries, candidates, metric, positives):
        positive, _ = _points(candidates[positives[block.rows]], metric)
        to_positive = (block.queries - positive).square().sum(dim=1, keepdim=True)
        absolute = UNIT_TIE if metric == "cosine" else 0.0
        margin = block.error + 4 * TIE * to_positive + absolute
        closer = block.squares < to_positive - margin
        result[block.rows] += closer.sum(dim=1)
        uncertain = (block.squares <= to_positive + margin) ^ closer
        columns = uncertain.any(dim=0).nonzero()[:, 0]
        if len(columns):
            exact = distances(block.queries, block.candidates[columns], "euclidean").square()
            difference, tie = exact - to_positive, TIE * (exact + to_positive) + absolute
            weights = (difference <= tie).double() - (difference.abs() <= tie).double() / 2
            result[block.rows] += (weights * uncertain[:, columns]).sum(dim=1)
    return result


def nearest(
    queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the exact k nearest candidates of each query. Equal distances are ordered by index.

    The candidates are read once and may be larger than memory, such as a memory-mapped file.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        k: Number of neighbours, at least 1.
        metric: The distance.
        excluded: (n,) index of a candidate that is not a neighbour (the query itself), or -1.

    Returns:
        (n, k) float64 distances in ascending order and (n, k) int64 indices; infinity and -1 where
        there are too few candidates.

    Raises:
        ValueError: The vectors contain NaN or infinity.
    """
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    indices = torch.full((len(queries), k), -1)
    for block in _blocks(queries, candidates, metric, excluded):
        limit = best[block.rows, -1:]
        if block.squares.shape[1] >= k:
            kth = block.squares.topk(k, largest=False).values[:, -1:]
            limit = torch.minimum(limit, kth + block.error)
        possible = block.squares <= limit + block.error
        columns = possible.any(dim=0).nonzero()[:, 0]
        exact = distances(block.queries, block.candidates[columns], "euclidean").square()
        exact[block.squares[:, columns] == torch.inf] = torch.inf
        found = (columns + block.start).expand(len(exact), -1)
        # Columns are in ascending order, so a stable sort orders equal distances by index.
        merged, order = torch.cat([best[block.rows], exact], dim=1).sort(dim=1, stable=True)
        best[block.rows] = merged[:, :k]
        indices[block.rows] = torch.cat([indices[block.rows], found], dim=1).gather(1, order[:, :k])
    indices[best == torch.inf] = -1
    return (best / 2 if metric == "cosine" else best.sqrt()), indices


class _Block(NamedTuple):
    """Squared distances between some queries (r) and some candidates (c)."""

    rows: slice  # the queries of this block
    start: int  # index of its first candidate
    queries: Tensor  # (r, d) float64, unit vectors for the cosine
    candidates: Tensor  # (c, d) float64, unit vectors for the cosine
    squares: Tensor  # (r, c) with rounding errors; infinity for the excluded candidates
    error: Tensor  # (r, 1) bound on the rounding error of `squares`


def _blocks(
    queries: Tensor, candidates: Tensor, metric: Metric, excluded: Tensor | None
) -> Iterator[_Block]:
    """Yield all pairs of a block of candidates (outer loop) and a block of queries (inner loop)."""
    for start in range(0, len(candidates), CANDIDATE_BLOCK):
        c, c_squares = _points(candidates[start : start + CANDIDATE_BLOCK], metric)
        for first in range(0, len(queries), QUERY_BLOCK):
            rows = slice(first, first + QUERY_BLOCK)
            q, q_squares = _points(queries[rows], metric)
            squares = torch.addmm(q_squares[:, None] + c_squares, q, c.T, alpha=-2)
            # The rounding errors of `squares` and of the distances computed from q - c are each at
            # most (d + 8) eps (|q|^2 + |c|^2); the factor 4 is twice their sum.
            relative = 4 * (q.shape[1] + 8) * torch.finfo(torch.float64).eps
            if excluded is not None:
                column = excluded[rows] - start
                inside = ((column >= 0) & (column < len(c))).nonzero()[:, 0]
                squares[inside, column[inside]] = torch.inf
            error = relative * (q_squares[:, None] + c_squares.max())
            yield _Block(rows, start, q, c, squares, error)


def _points(vectors: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return float64 vectors (n, d), of length 1 for the cosine, and their squared lengths (n,)."""
    points = vectors.double()
    lengths = torch.linalg.vector_norm(points, dim=1)
    if not torch.isfinite(lengths).all():
        raise ValueError("the vectors contain NaN or infinity")
    if metric == "cosine":
        scale = lengths.clamp_min(1e-12)  # like torch's normalize: a zero vector stays zero
        points, lengths = points / scale[:, None], lengths / scale
    return points, lengths.square()
