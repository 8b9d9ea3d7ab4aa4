"""Distances, contrastive losses, exact ranks and neighbours: tensors in, tensors out. Nothing here knows of papers, models or files.

Notation: a batch holds n pairs of texts; row i of `anchors` and row i of `positives` (n x d each) are two summaries of paper i. Every text of another paper in
the batch is an in-batch negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from settings import Loss, Metric

# Numbers gathered at once by `_Scorer.exact`: 32 MiB of float64.
CHUNK = 2**22
# Scores held at once by `ranks` and `nearest`: 2^24 float32 are 64 MiB, whatever the number of queries.
BLOCK_SCORES = 2**24
# Numbers of candidates looked at together by `nearest_streamed`: 2 MiB of float32 stay in a core's cache.
STREAMED = 2**19
# Two float64 distances count as equal when they differ by less than this share of them: far above float64 rounding, far below any float32 difference.
TIE = 1e-11


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """All distances between rows: (n, d), (m, d) -> (n, m), none negative, exactly 0 between equal rows, with finite gradients there too.

    Euclidean: L2 distance of the raw vectors. Cosine: 1 - cosine similarity, in [0, 2], computed as half the squared distance of the unit vectors, the same
    number without the rounding that makes 1 - cos slightly negative. torch's cdist has gradient 0 where two rows are equal (a plain square root has NaN).
    """
    if metric == "cosine":
        a, b = functional.normalize(a, dim=-1), functional.normalize(b, dim=-1)
    plain = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return plain if metric == "euclidean" else plain.square() / 2


@dataclass(frozen=True)
class LossValues:
    """A batch's loss (scalar with gradient) and what the log shows of it (floats without)."""

    loss: Tensor
    positive_distance: float
    negative_distance: float
    active_share: float  # triplet: share of hinges above zero; InfoNCE: share of anchors whose positive is not the nearest text


def contrastive_loss(anchors: Tensor, positives: Tensor, metric: Metric, loss: Loss, margin: float, temperature: float) -> LossValues:
    """The batch's loss over all 2n texts, both texts of a pair as anchors. anchors, positives: (n, d), n >= 2.

    `margin` is in units of the metric's distance and used by "triplet"; `temperature` likewise and used by "infonce".
    """
    texts = torch.cat([anchors, positives])
    n = len(anchors)
    all_distances = distances(texts, texts, metric)
    rows = torch.arange(2 * n, device=texts.device)
    to_positive = all_distances[rows, (rows + n) % (2 * n)]
    is_negative = (rows[:, None] - rows[None, :]) % n != 0  # another paper's text
    if loss == "triplet":
        value, active = _triplet(all_distances, to_positive, is_negative, margin)
    else:
        value, active = _info_nce(all_distances, to_positive, is_negative, temperature)
    with torch.no_grad():
        return LossValues(value, to_positive.mean().item(), all_distances[is_negative].mean().item(), active.item())


def _triplet(all_distances: Tensor, to_positive: Tensor, is_negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """max(0, d(a, p) - d(a, n) + margin), plain mean over every (anchor, in-batch negative), zeros included [METHOD: analogue]."""
    hinges = functional.relu(to_positive[:, None] - all_distances + margin)[is_negative]
    return hinges.mean(), (hinges > 0).float().mean()


def _info_nce(all_distances: Tensor, to_positive: Tensor, is_negative: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-log( exp(-d(a, p) / t) / (exp(-d(a, p) / t) + sum over negatives exp(-d(a, n) / t)) ), mean over the 2n anchors.

    With the cosine distance this is the usual InfoNCE on cosine similarity: the constant 1 in 1 - cos cancels.
    """
    logits = (-all_distances / temperature).masked_fill(~is_negative, -torch.inf)
    positive = -to_positive / temperature
    everything = torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1)
    return (everything - positive).mean(), (logits.amax(dim=1) >= positive).float().mean()


def spread(vectors: Tensor) -> float:
    """Root mean squared distance to the mean vector over the root mean square length, in [0, 1]: near 0 means the embeddings have collapsed."""
    vectors = vectors.detach().float()
    centred = vectors - vectors.mean(dim=0)
    return (centred.square().sum(dim=1).mean() / vectors.square().sum(dim=1).mean().clamp_min(torch.finfo(torch.float32).tiny)).sqrt().item()


def ranks(queries: Tensor, candidates: Tensor, metric: Metric, positives: Tensor | None = None, block_scores: int = BLOCK_SCORES) -> Tensor:
    """Exact mid-rank of each query's own candidate: 1 + how many others are strictly closer + half of those equally close. Best 1, worst m.

    Candidates are counted by float32 matrix product; those too near to the positive to be told apart in float32 are decided in float64. Memory is
    O(block_scores), never n x m. The positive is excluded by index, so rounding cannot make it outrank itself.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        metric: which distance "closer" means.
        positives: (n,) index of each query's own candidate; None means candidate i for query i.
        block_scores: scores held in memory at once.

    Returns:
        (n,) float64.
    """
    positives = torch.arange(len(queries)) if positives is None else positives
    scorer = _Scorer(queries, candidates, metric)
    found = torch.empty(len(queries), dtype=torch.float64)
    for start, score, doubt in scorer.blocks(block_scores):
        rows = torch.arange(len(score))
        own = positives[start : start + len(score)]
        ahead = score - score[rows, own][:, None]  # > 0: closer than the positive, up to rounding
        ahead[rows, own] = -torch.inf
        closer = (ahead > doubt).sum(dim=1).double()
        row, column = torch.nonzero(ahead.abs() <= doubt, as_tuple=True)
        other = scorer.exact(start, len(score), row, column)
        mine = scorer.exact(start, len(score), rows, own)[row]
        tolerance = scorer.tolerance(other, mine)
        weight = (other < mine - tolerance).double() + ((other - mine).abs() <= tolerance).double() / 2
        found[start : start + len(score)] = 1 + closer.index_add_(0, row, weight)
    return found


def nearest(
    queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None, block_scores: int = BLOCK_SCORES
) -> tuple[Tensor, Tensor]:
    """The k nearest candidates of each query, exactly: float32 finds them with a safety margin, float64 orders them; equal distances stand in index order.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        k: neighbours wanted; at most m (m - 1 with `excluded`).
        metric: the distance.
        excluded: (n,) index of a candidate that may not be returned (the query itself), or None.
        block_scores: scores held in memory at once.

    Returns:
        distances (n, k) float64 ascending and indices (n, k) int64.
    """
    if k > len(candidates) - (excluded is not None):
        raise ValueError(f"{k} neighbours wanted of {len(candidates)} candidates")
    scorer = _Scorer(queries, candidates, metric)
    found_distances = torch.empty(len(queries), k, dtype=torch.float64)
    found = torch.empty(len(queries), k, dtype=torch.int64)
    for start, score, doubt in scorer.blocks(block_scores):
        if excluded is not None:
            score[torch.arange(len(score)), excluded[start : start + len(score)]] = -torch.inf
        kth = score.topk(k, dim=1).values[:, -1:]
        row, column = torch.nonzero(score >= kth - doubt, as_tuple=True)
        exact = scorer.exact(start, len(score), row, column)
        take = _smallest(exact, row, len(score), k)  # columns ascend within a row already, so equal distances keep index order
        found_distances[start : start + len(score)] = scorer.as_distance(exact[take])
        found[start : start + len(score)] = column[take]
    return found_distances, found


def nearest_streamed(queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`nearest` for more candidates than memory holds, such as a memory-mapped file: they are read once, block by block, for all queries.

    In each block float32 bounds tell which candidates can be among the k nearest; only these are computed in float64. Where float32 cannot tell (NaN) they can.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        k: neighbours wanted, at least 1.
        metric: the distance.
        excluded: (n,) index of a candidate that may not be returned, or -1; None: each may.

    Returns:
        distances (n, k) float64 ascending and indices (n, k) int64; infinity and -1 where there are too few candidates.
    """
    (n, d), unit = queries.shape, metric == "cosine"
    precise = functional.normalize(queries.double(), dim=-1) if unit else queries.double()
    centre = candidates[:: -(-len(candidates) // 256)].double().mean(dim=0).float()  # roughly; a common offset would cost accuracy
    rough = (precise if unit else precise - centre).float()
    own_squares = rough.square().sum(dim=1, keepdim=True)
    # the float32 |q|^2 + |c|^2 - 2 q.c is good to this share of |q|^2 + |c|^2: two sums of d products, a length, single roundings; taken twice
    doubt = 2 * (2 * d + 16) * torch.finfo(torch.float32).eps
    excluded = torch.full((n,), -1) if excluded is None else excluded
    query = torch.arange(n).repeat_interleave(k)
    best, indices = torch.full((n, k), torch.inf, dtype=torch.float64), torch.full((n, k), -1)
    step = max(1, min(STREAMED // d, BLOCK_SCORES // n))
    buffer = torch.empty(step, d)
    for start in range(0, len(candidates), step):
        block = candidates[start : start + step]
        shifted = block if unit else torch.sub(block, centre, out=buffer[: len(block)])
        lengths, products = torch.linalg.vector_norm(shifted, dim=1), rough @ shifted.T
        if unit:
            lengths = torch.where((lengths > 1e-10) & (lengths < 1e15), lengths, torch.nan)  # squares of others may be 0 or infinite
            products, lengths = products / lengths, lengths / lengths
        sizes = own_squares + lengths.square()
        upper = torch.sub((1 + doubt) * sizes, products, alpha=2)
        barred = excluded[:, None] == torch.arange(start, start + len(block))
        kth = upper.masked_fill(barred, torch.inf).topk(k, largest=False).values[:, -1] if len(block) >= k else torch.tensor(torch.inf)
        beyond = upper - 2 * doubt * sizes > torch.fmin(best[:, -1], kth)[:, None]
        near, row = torch.nonzero(~(beyond | barred), as_tuple=True)
        if len(row):
            exact = torch.cat(
                [_squares(precise[q], block[r].double(), unit) for q, r in zip(torch.split(near, CHUNK // d), torch.split(row, CHUNK // d), strict=True)]
            )
            values, found = torch.cat([best.flatten(), exact]), torch.cat([indices.flatten(), row + start])
            take = _smallest(values, torch.cat([query, near]), n, k)
            best, indices = values[take], found[take]
    return (best / 2 if unit else best.sqrt()), indices


def _squares(queries: Tensor, candidates: Tensor, unit: bool) -> Tensor:
    """(n,) squared distances of row i and row i, float64; of their unit vectors where the candidates' are wanted."""
    return (queries - (functional.normalize(candidates, dim=-1) if unit else candidates)).square().sum(dim=1)


def _smallest(values: Tensor, row: Tensor, rows: int, k: int) -> Tensor:
    """Places (rows, k) in `values` of each row's k smallest, ascending, equal ones in their order; `row` says whose each value is."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    counts = torch.bincount(row, minlength=rows)
    return order[(torch.cumsum(counts, 0) - counts)[:, None] + torch.arange(k)]


class _Scorer:
    """Scores (higher is closer) of queries against candidates by float32 matrix product, with a bound on their rounding, and exact float64 values on demand.

    Both metrics are one: the cosine distance is half the squared distance of the unit vectors. Vectors are centred first (no distance changes) and brought to a
    size of about 1, so that neither a common offset nor their unit costs accuracy. The score q.c - |c|^2 / 2 orders candidates as the distance does.
    """

    def __init__(self, queries: Tensor, candidates: Tensor, metric: Metric) -> None:
        if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
            raise ValueError("vectors hold NaN or infinity: they have no ranks")
        self.unit = metric == "cosine"
        self.precise = [functional.normalize(v.double(), dim=-1) if self.unit else v.double() for v in (queries, candidates)]
        centre = self.precise[1].mean(dim=0)
        centred = [vectors - centre for vectors in self.precise]
        size = max((vectors.abs().max().item() for vectors in centred if len(vectors)), default=0.0)
        self.queries, self.candidates = ((vectors / (size or 1.0)).float() for vectors in centred)
        lengths = [vectors.double().norm(dim=1) for vectors in (self.queries, self.candidates)]
        self.half_squares = (lengths[1].square() / 2).float()
        longest = lengths[1].max() if len(candidates) else torch.zeros(())
        # rounding of the difference of two scores: (d + 4) eps |q| |c| for each product, as much for each |c|^2 / 2; a unit vector is good to some 1e-16
        eps = torch.finfo(torch.float32).eps * (queries.shape[1] + 4)
        slack = 4e-15 / (size or 1.0) if self.unit else 0.0
        self.doubts = ((lengths[0] + longest) * (2 * eps * longest + slack)).float()[:, None]

    def blocks(self, block_scores: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first query row, scores of some queries against all candidates, (rows, 1) bound on the rounding of a difference of two of a row's scores)."""
        rows = max(1, block_scores // max(1, len(self.candidates)))
        for start in range(0, len(self.queries), rows):
            stop = start + rows
            yield start, torch.addmm(-self.half_squares, self.queries[start:stop], self.candidates.T), self.doubts[start:stop]

    def exact(self, start: int, rows: int, row: Tensor, column: Tensor) -> Tensor:
        """(len(row),) float64: squared Euclidean distance or 1 - cosine of query start + row[j] and candidate column[j], 0 <= row < rows."""
        queries, candidates = self.precise[0][start : start + rows], self.precise[1]
        chunk = max(1, CHUNK // queries.shape[1])
        if 8 * len(row) > rows * len(candidates):  # gathering would cost more than all distances do
            squares = torch.cdist(queries, candidates, compute_mode="donot_use_mm_for_euclid_dist").square_()[row, column]
        else:
            squares = torch.cat(
                [(queries[r] - candidates[c]).square().sum(dim=1) for r, c in zip(torch.split(row, chunk), torch.split(column, chunk), strict=True)]
            )
        return squares / 2 if self.unit else squares

    def tolerance(self, one: Tensor, other: Tensor) -> Tensor:
        """Differences of two `exact` values that are float64 rounding, not distance; unit vectors are rounded themselves."""
        return TIE * (one + other) + (1e-19 if self.unit else 0.0)

    def as_distance(self, exact: Tensor) -> Tensor:
        """What `exact` returned, as a distance."""
        return exact if self.unit else exact.sqrt()
