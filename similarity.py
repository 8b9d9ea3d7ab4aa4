"""Distances, contrastive losses, exact ranks and neighbours: tensors in, tensors out. Nothing here knows of papers, models or files.

Notation: a batch holds n pairs of texts; row i of `anchors` and row i of `positives` (n x d each) are two summaries of paper i. Every text of another paper in
the batch is an in-batch negative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from settings import Loss, Metric

# Numbers gathered at once by `_Scorer.exact`: 32 MiB of float64.
CHUNK = 2**22
# Queries and candidates scored at once by `ranks` and `nearest`: 4 MiB of float32 that stay in the cache while they are looked through.
BLOCK_ROWS, BLOCK_COLUMNS = 256, 4096
# All pairs of a block of queries, which may all be in doubt where vectors have collapsed: some 20 bytes each.
MOST_PAIRS = 2**25
# bf16 products are kept while fewer than one score in so many is left in doubt: a look at one in float64 costs as much as some hundred products.
FEW = 512
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


def ranks(queries: Tensor, candidates: Tensor, metric: Metric, positives: Tensor | None = None) -> Tensor:
    """Exact mid-rank of each query's own candidate: 1 + how many others are strictly closer + half of those equally close. Best 1, worst m.

    Candidates are counted by matrix product, block by block; those too near to the positive to be told apart so are decided in float64. Beyond the vectors it
    takes the memory of a block, never n x m. The positive is excluded by index, so rounding cannot make it outrank itself.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        metric: which distance "closer" means.
        positives: (n,) index of each query's own candidate; None means candidate i for query i.

    Returns:
        (n,) float64.
    """
    positives = torch.arange(len(queries)) if positives is None else positives
    scorer = _Scorer(queries, candidates, metric)
    found = torch.ones(len(queries), dtype=torch.float64)
    for rows in scorer.row_blocks():
        own, result = positives[rows], found[rows]
        mine = scorer.exact(rows.start, len(own), torch.arange(len(own)), own)
        threshold = scorer.pair_scores(rows, torch.arange(len(own)), own)[:, None]
        for columns in scorer.column_blocks():
            closer, row, column = _near_positive(scorer, rows, columns, own, threshold)
            other = scorer.exact(rows.start, len(own), row, column)
            tolerance = scorer.tolerance(other, mine[row])
            weight = (other < mine[row] - tolerance).double() + ((other - mine[row]).abs() <= tolerance).double() / 2
            result += torch.from_numpy(closer).double() - torch.bincount(row, minlength=len(own))
            result.index_add_(0, row, weight)
    return found


def _near_positive(scorer: _Scorer, rows: slice, columns: slice, own: Tensor, threshold: Tensor) -> tuple[Any, Tensor, Tensor]:
    """How many of some columns are closer to each row than its positive or in doubt, and (row, column) of those in doubt."""
    score, doubt = scorer.scores(rows, columns)
    low, high = (threshold - doubt).numpy(), (threshold + doubt).numpy()
    near = score >= low
    near[_own(own, columns)] = False
    count = np.add.reduce(near.view(np.uint8), axis=1, dtype=np.int64)
    if count.sum() * 16 < near.size:  # the usual case: a look at the few is cheaper than another comparison of all
        row, column = np.divmod(np.flatnonzero(near), near.shape[1])
        in_doubt = score[row, column] <= high[row, 0]
        row, column = row[in_doubt], column[in_doubt]
    else:
        row, column = np.nonzero(near & (score <= high))
    if scorer.too_many(len(row), near.size):
        return _near_positive(scorer, rows, columns, own, threshold)
    return count, torch.from_numpy(row), torch.from_numpy(column + columns.start)


def nearest(queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest candidates of each query, exactly: matrix products find them with a safety margin, float64 orders them, equal distances by index.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        k: neighbours wanted; at most m (m - 1 with `excluded`).
        metric: the distance.
        excluded: (n,) index of a candidate that may not be returned (the query itself), or None.

    Returns:
        distances (n, k) float64 ascending and indices (n, k) int64.
    """
    if k > len(candidates) - (excluded is not None):
        raise ValueError(f"{k} neighbours wanted of {len(candidates)} candidates")
    scorer = _Scorer(queries, candidates, metric)
    found_distances = torch.empty(len(queries), k, dtype=torch.float64)
    found = torch.empty(len(queries), k, dtype=torch.int64)
    for rows in scorer.row_blocks():
        row, column = _near_best(scorer, rows, k, None if excluded is None else excluded[rows])
        exact = scorer.exact(rows.start, rows.stop - rows.start, row, column)
        take = _best(-exact, row, column, rows.stop - rows.start, k)
        found_distances[rows], found[rows] = scorer.as_distance(exact[take]), column[take]
    return found_distances, found


def _near_best(scorer: _Scorer, rows: slice, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row, column) of everything that may be among the k nearest of each row."""
    n = rows.stop - rows.start
    kth = torch.full((n, 1), -torch.inf)  # a score that k candidates are known to reach
    row, column, value = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    for columns in scorer.column_blocks():
        score, doubt = scorer.scores(rows, columns)
        barred = _own(excluded, columns)
        score[barred] = -np.inf
        if score.shape[1] > k and not torch.isfinite(kth).all():
            kth = torch.from_numpy(score).topk(k, dim=1).values[:, -1:] - doubt
        near = score >= (kth - doubt).numpy()
        near[barred] = False
        more_row, more_column = np.divmod(np.flatnonzero(near), near.shape[1])
        if scorer.too_many((len(more_row) - n * k) // 8, near.size):  # most are dropped again without a look in float64
            return _near_best(scorer, rows, k, excluded)
        row, column = torch.cat([row, torch.from_numpy(more_row)]), torch.cat([column, torch.from_numpy(more_column + columns.start)])
        value = torch.cat([value, torch.from_numpy(score[more_row, more_column])])
        if len(row) > 8 * n * k and bool((torch.bincount(row, minlength=n) >= k).all()):
            kth = torch.maximum(kth, value[_best(value, row, column, n, k)][:, -1:] - doubt)
            keep = value >= (kth - doubt)[row, 0]
            row, column, value = row[keep], column[keep], value[keep]
    if scorer.in_bf16:  # float32 leaves some ten of a hundred for float64
        value, doubt = scorer.pair_scores(rows, row, column), scorer.doubts[rows]
        kth = value[_best(value, row, column, n, k)][:, -1:]
        keep = value >= (kth - 2 * doubt)[row, 0]
        row, column = row[keep], column[keep]
    return row, column


def _own(columns: Tensor | None, block: slice) -> tuple[Any, Any]:
    """Numpy index of the places in a block of scores where row i meets candidate `columns[i]`."""
    if columns is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    row = torch.nonzero((columns >= block.start) & (columns < block.stop))[:, 0]
    return row.numpy(), (columns[row] - block.start).numpy()


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
    step = max(1, min(STREAMED // d, MOST_PAIRS // n))
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
            take = _best(-values, torch.cat([query, near]), found, n, k)
            best, indices = values[take], found[take]
    return (best / 2 if unit else best.sqrt()), indices


def _squares(queries: Tensor, candidates: Tensor, unit: bool) -> Tensor:
    """(n,) squared distances of row i and row i, float64; of their unit vectors where the candidates' are wanted."""
    return (queries - (functional.normalize(candidates, dim=-1) if unit else candidates)).square().sum(dim=1)


def _best(value: Tensor, row: Tensor, column: Tensor, rows: int, k: int) -> Tensor:
    """(rows, k) places of each row's k largest values, largest first, equal ones by column; each row has k or more."""
    order = torch.from_numpy(np.lexsort((column.numpy(), -value.numpy(), row.numpy())))
    counts = torch.bincount(row, minlength=rows)
    return order[(torch.cumsum(counts, 0) - counts)[:, None] + torch.arange(k)]


class _Scorer:
    """Scores (higher is closer) of queries against candidates by matrix product, with a bound on their rounding, and exact float64 values on demand.

    Both metrics are one: the cosine distance is half the squared distance of the unit vectors. Vectors are centred first (no distance changes) and brought to a
    size of about 1, so that neither a common offset nor their unit costs accuracy. The score q.c - |c|^2 / 2 orders candidates as the distance does.

    On CPUs that multiply bf16 in hardware the products are taken in bf16 first (three times faster), with the wider bound that this needs, until so many
    candidates fall inside it that float32 is faster.
    """

    def __init__(self, queries: Tensor, candidates: Tensor, metric: Metric) -> None:
        extremes = [torch.stack(vectors.aminmax()) for vectors in (queries, candidates) if vectors.numel()]  # NaN where there is one
        if not all(torch.isfinite(pair).all() for pair in extremes):
            raise ValueError("vectors hold NaN or infinity: they have no ranks")
        self.unit = metric == "cosine"
        self.vectors = queries, candidates
        size = 1.0 if self.unit else max((float(pair.abs().max()) for pair in extremes), default=0.0) or 1.0
        total = torch.zeros(candidates.shape[1], dtype=torch.float64)
        for start in range(0, len(candidates), BLOCK_ROWS):  # in pieces that stay in the cache: float64 of all would be twice the vectors' size
            total += self._precise(1, slice(start, start + BLOCK_ROWS)).sum(dim=0)
        self.centre, self.scale = total / max(1, len(candidates)), 1 / size
        self.queries, self.candidates = (self._centred(which) for which in (0, 1))
        lengths = [torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64) for vectors in (self.queries, self.candidates)]
        self.half_squares = (lengths[1].square() / 2).float()
        longest = lengths[1].max() if len(candidates) else torch.zeros(())
        # rounding of the difference of two scores: (d + 4) eps |q| |c| for each product, as much for each |c|^2 / 2; a unit vector is good to some 1e-16
        eps = torch.finfo(torch.float32).eps * (queries.shape[1] + 4)
        slack = 4e-15 if self.unit else 0.0
        self.doubts = ((lengths[0] + longest) * (2 * eps * longest + slack)).float()[:, None]
        # a number is good to 2^-8 of itself in bf16, a product of two to 2^-7 + 2^-16
        self.bf16_doubts = self.doubts + (lengths[0] * longest * (2**-7 + 2**-15)).float()[:, None]
        capabilities = torch.cpu.get_capabilities()
        self.in_bf16 = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)

    def _precise(self, which: int, rows: slice | Tensor) -> Tensor:
        """Some queries (0) or candidates (1) in float64, unit vectors for the cosine."""
        vectors = self.vectors[which][rows].double()
        return functional.normalize(vectors, dim=-1) if self.unit else vectors

    def _centred(self, which: int) -> Tensor:
        centred = torch.empty_like(self.vectors[which])
        for start in range(0, len(centred), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            centred[rows] = (self._precise(which, rows) - self.centre) * self.scale
        return centred

    def row_blocks(self) -> Iterator[slice]:
        """Cuts of the queries."""
        step = max(1, min(BLOCK_ROWS, MOST_PAIRS // max(1, len(self.candidates))))
        return (slice(start, min(start + step, len(self.queries))) for start in range(0, len(self.queries), step))

    def column_blocks(self) -> Iterator[slice]:
        """Cuts of the candidates."""
        return (slice(start, min(start + BLOCK_COLUMNS, len(self.candidates))) for start in range(0, len(self.candidates), BLOCK_COLUMNS))

    def scores(self, rows: slice, columns: slice) -> tuple[Any, Tensor]:
        """(rows, columns) numpy scores of some queries against some candidates, and a (rows, 1) bound on the rounding of a difference of two of a row's."""
        with _products_in("bf16" if self.in_bf16 else "ieee"):
            score = torch.addmm(-self.half_squares[columns], self.queries[rows], self.candidates[columns].T)
        return score.numpy(), (self.bf16_doubts if self.in_bf16 else self.doubts)[rows]

    def too_many(self, in_doubt: int, scored: int) -> bool:
        """Whether to score again in float32, and from now on, because bf16 left too much in doubt."""
        if not self.in_bf16 or in_doubt * FEW <= scored:
            return False
        self.in_bf16 = False
        return True

    def pair_scores(self, rows: slice, row: Tensor, column: Tensor) -> Tensor:
        """(len(row),) scores of query rows.start + row[j] and candidate column[j], each good to float32."""
        pieces = zip(torch.split(row + rows.start, BLOCK_COLUMNS), torch.split(column, BLOCK_COLUMNS), strict=True)
        products = [(self.queries[r] * self.candidates[c]).sum(dim=1) for r, c in pieces]
        scores: Tensor = torch.cat(products) - self.half_squares[column]
        return scores

    def exact(self, start: int, rows: int, row: Tensor, column: Tensor) -> Tensor:
        """(len(row),) float64: squared Euclidean distance or 1 - cosine of query start + row[j] and candidate column[j], 0 <= row < rows."""
        queries = self._precise(0, slice(start, start + rows))
        chunk = max(1, CHUNK // queries.shape[1])
        first, last = (int(column.min()), int(column.max()) + 1) if len(column) else (0, 0)
        if 8 * len(row) > rows * (last - first):  # gathering would cost more than all distances do
            candidates = self._precise(1, slice(first, last))
            squares = torch.cdist(queries, candidates, compute_mode="donot_use_mm_for_euclid_dist").square_()[row, column - first]
        else:
            pairs = zip(torch.split(row, chunk), torch.split(column, chunk), strict=True)
            squares = torch.cat([(queries[r] - self._precise(1, c)).square().sum(dim=1) for r, c in pairs])
        return squares / 2 if self.unit else squares

    def tolerance(self, one: Tensor, other: Tensor) -> Tensor:
        """Differences of two `exact` values that are float64 rounding, not distance; unit vectors are rounded themselves."""
        return TIE * (one + other) + (1e-19 if self.unit else 0.0)

    def as_distance(self, exact: Tensor) -> Tensor:
        """What `exact` returned, as a distance."""
        return exact if self.unit else exact.sqrt()


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Float32 matrix products on the CPU by "bf16" (inputs rounded, sums and result in float32; only where the hardware has it) or by "ieee" float32."""
    mkldnn: Any = torch.backends.mkldnn  # untyped
    before, mkldnn.matmul.fp32_precision = mkldnn.matmul.fp32_precision, precision
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before
