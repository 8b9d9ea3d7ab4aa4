"""Distances, contrastive losses, exact ranks and neighbours: tensors in, tensors out. Nothing here
knows of papers, models or files.

Notation: a batch holds n pairs of texts; row i of `anchors` and row i of `positives` (n x d each)
are two summaries of paper i. Every text of another paper in the batch is an in-batch negative.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from semcse.types import Metric

# Numbers gathered at once by `_Scorer.exact`: half a MiB of float64, which stays in the cache.
CHUNK = 2**16
# Queries and candidates scored at once by `ranks`: 2 MiB of bf16 or 4 of float32 that stay in the
# cache while they are looked through.
BLOCK = 256, 4096
# The same for `nearest`, which looks once, at the best of GROUP candidates and then only into
# groups whose best is good enough: 16 or 32 MiB.
WIDE_BLOCK, GROUP = (512, 16384), 16
# All pairs of a block of queries, which may all be in doubt where vectors have collapsed: some 20
# bytes each.
MOST_PAIRS = 2**25
# bf16 products are kept while fewer than one score in so many is left in doubt: a look at one in
# float64 costs as much as some hundred products.
FEW = 512
# Numbers of candidates looked at together by `nearest_streamed`: 2 MiB of float32 stay in a core's
# cache.
STREAMED = 2**19
# Two float64 distances count as equal when they differ by less than this share of them: far above
# float64 rounding, far below any float32 difference.
TIE = 1e-11


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """All distances between rows: (n, d), (m, d) -> (n, m), none negative, exactly 0 between equal
    rows, with finite gradients there too.

    Euclidean: L2 distance of the raw vectors. Cosine: 1 - cosine similarity, in [0, 2], computed as
    half the squared distance of the unit vectors, the same number without the rounding that makes 1
    - cos slightly negative. torch's cdist has gradient 0 where two rows are equal (a plain square
    root has NaN).
    """
    if metric == "cosine":
        a, b = functional.normalize(a, dim=-1), functional.normalize(b, dim=-1)
    plain = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return plain if metric == "euclidean" else plain.square() / 2


def ranks(
    queries: Tensor, candidates: Tensor, metric: Metric, positives: Tensor | None = None
) -> Tensor:
    """Exact mid-rank of each query's own candidate: 1 + how many others are strictly closer + half
    of those equally close. Best 1, worst m.

    Candidates are counted by matrix product, block by block; those too near to the positive to be
    told apart so are decided in float64. Beyond the vectors it takes the memory of a block, never n
    x m. The positive is excluded by index, so rounding cannot make it outrank itself.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        metric: which distance "closer" means.
        positives: (n,) index of each query's own candidate; None means candidate i for query i.

    Returns:
        (n,) float64.
    """
    positives = torch.arange(len(queries)) if positives is None else positives
    scorer = _Scorer(queries, candidates, metric, BLOCK)
    found = torch.ones(len(queries), dtype=torch.float64)
    for rows in scorer.row_blocks():
        own, result = positives[rows], found[rows]
        mine = scorer.exact(rows.start, len(own), torch.arange(len(own)), own)
        for columns in scorer.column_blocks():
            closer, row, column = _near_positive(scorer, rows, columns, own, mine)
            other = scorer.exact(rows.start, len(own), row, column)
            tolerance = scorer.tolerance(other, mine[row])
            weight = (other < mine[row] - tolerance).double() + (
                (other - mine[row]).abs() <= tolerance
            ).double() / 2
            result += torch.from_numpy(closer).double() - torch.bincount(row, minlength=len(own))
            result.index_add_(0, row, weight)
    return found


def _near_positive(
    scorer: _Scorer, rows: slice, columns: slice, own: Tensor, mine: Tensor
) -> tuple[Any, Tensor, Tensor]:
    """How many of some columns are closer to each row than its positive or in doubt, and (row,
    column) of those in doubt.
    """
    low, high = scorer.bounds(rows, scorer.as_score(rows, mine))
    signed = bool((low <= 0).any())
    keys = _ordered(scorer.scores(rows, columns), signed).numpy()
    near = keys >= _ordered(low, signed).numpy()
    near[_own(own, columns)] = False
    count = np.add.reduce(near.view(np.uint8), axis=0, dtype=np.uint16).astype(np.int64)
    # the usual case: a look at the few is cheaper than another comparison of all
    if count.sum() * 16 < near.size:
        column, row = np.divmod(np.flatnonzero(near), near.shape[1])
        in_doubt = keys[column, row] <= _ordered(high, signed).numpy()[row]
        row, column = row[in_doubt], column[in_doubt]
    else:
        column, row = np.nonzero(near & (keys <= _ordered(high, signed).numpy()))
    if scorer.too_many(len(row), near.size):
        return _near_positive(scorer, rows, columns, own, mine)
    return count, torch.from_numpy(row), torch.from_numpy(column + columns.start)


def nearest(
    queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest candidates of each query, exactly: matrix products find them with a safety
    margin, float64 orders them, equal distances by index.

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
    scorer = _Scorer(queries, candidates, metric, WIDE_BLOCK)
    found_distances = torch.empty(len(queries), k, dtype=torch.float64)
    found = torch.empty(len(queries), k, dtype=torch.int64)
    for rows in scorer.row_blocks():
        row, column = _near_best(scorer, rows, k, None if excluded is None else excluded[rows])
        exact = scorer.exact(rows.start, rows.stop - rows.start, row, column)
        take = _best(-exact, row, column, rows.stop - rows.start, k)
        found_distances[rows], found[rows] = scorer.as_distance(exact[take]), column[take]
    return found_distances, found


def _near_best(
    scorer: _Scorer, rows: slice, k: int, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(row, column) of everything that may be among the k nearest of each row."""
    n = rows.stop - rows.start
    # a score that k candidates are known to reach
    kth = torch.full((n,), -torch.inf, dtype=torch.float64)
    row, column, value = (
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0),
    )
    for number, columns in enumerate(scorer.column_blocks(), 1):
        score = scorer.scores(rows, columns)
        score[_own(excluded, columns)] = -torch.inf
        groups = score.view(_group_size(len(score), k), -1, n)
        # the k-th of the groups' best is a little below the k-th of all, and far sooner found
        if number == 1 and groups.shape[1] > k:
            kth = scorer.surely(rows, groups.amax(dim=0).float().topk(k, dim=0).values[-1])
        member, group, more_row = _at_least(groups, scorer.bounds(rows, kth)[0])
        # most are dropped again without a look in float64
        if scorer.too_many((len(more_row) - n * k) // 8, score.numel()):
            return _near_best(scorer, rows, k, excluded)
        row, column = (
            torch.cat([row, more_row]),
            torch.cat([column, member * groups.shape[1] + group + columns.start]),
        )
        value = torch.cat([value, groups[member, group, more_row].float()])
        last = columns.stop == len(scorer.vectors[1])
        if (last or not number & (number - 1) or len(row) > 8 * n * k) and bool(
            (torch.bincount(row, minlength=n) >= k).all()
        ):
            kth = torch.maximum(kth, scorer.surely(rows, _kth_best(value, row, n, k)))
            keep = value >= scorer.bounds(rows, kth)[0].float()[row]
            row, column, value = row[keep], column[keep], value[keep]
    return row, column


def _group_size(candidates: int, k: int) -> int:
    """How many candidates of a block are compared by the best of them: a divisor of their number
    that leaves many more groups than k.
    """
    size = math.gcd(candidates, GROUP)
    while size > 1 and candidates < 8 * k * size:
        size //= 2
    return size


def _at_least(groups: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where scores (size, groups, rows) reach their row's `low` and are not -infinity. Only of
    groups whose best does is each member looked at.
    """
    low = low.clamp_min(torch.finfo(low.dtype).min)
    signed = bool((low <= 0).any())
    keys, least = _ordered(groups, signed), _ordered(low, signed)
    group, row = map(
        torch.from_numpy,
        np.divmod(np.flatnonzero(keys.amax(dim=0).numpy() >= least.numpy()), len(low)),
    )
    member, hit = torch.nonzero(keys[:, group, row] >= least[row], as_tuple=True)
    return member, group[hit], row[hit]


def _kth_best(value: Tensor, row: Tensor, rows: int, k: int) -> Tensor:
    """(rows,) float64: each row's k-th largest value or, by rounding, a little less; each row has k
    or more.
    """
    span = 4 * float(value.abs().max())
    ordered = np.sort((row * span - value.double()).numpy())
    counts = torch.bincount(row, minlength=rows)
    place = torch.cumsum(counts, 0) - counts + k - 1
    return (
        torch.arange(rows) * span - torch.from_numpy(ordered[place.numpy()]) - 1e-15 * rows * span
    )


def _ordered(scores: Tensor, signed: bool) -> Tensor:
    """Numbers in the order of some scores: these themselves, or the bits of bf16 as integers. Not
    `signed`: only numbers above 0 need be in order.
    """
    if scores.dtype != torch.bfloat16:
        return scores
    bits = scores.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF) if signed else bits


def _own(columns: Tensor | None, block: slice) -> tuple[Any, Any]:
    """Numpy index of the places in a block of scores where row i meets candidate `columns[i]`."""
    if columns is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    row = torch.nonzero((columns >= block.start) & (columns < block.stop))[:, 0]
    return (columns[row] - block.start).numpy(), row.numpy()


def nearest_streamed(
    queries: Tensor, candidates: Tensor, k: int, metric: Metric, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nearest` for more candidates than memory holds, such as a memory-mapped file: they are read
    once, block by block, for all queries.

    In each block float32 bounds tell which candidates can be among the k nearest; only these are
    computed in float64. Where float32 cannot tell (NaN) they can.

    Args:
        queries: (n, d) float32.
        candidates: (m, d) float32.
        k: neighbours wanted, at least 1.
        metric: the distance.
        excluded: (n,) index of a candidate that may not be returned, or -1; None: each may.

    Returns:
        distances (n, k) float64 ascending and indices (n, k) int64; infinity and -1 where there are
            too few candidates.
    """
    (n, d), unit = queries.shape, metric == "cosine"
    precise = functional.normalize(queries.double(), dim=-1) if unit else queries.double()
    # roughly; a common offset would cost accuracy
    centre = candidates[:: -(-len(candidates) // 256)].double().mean(dim=0).float()
    rough = (precise if unit else precise - centre).float()
    own_squares = rough.square().sum(dim=1, keepdim=True)
    # the float32 |q|^2 + |c|^2 - 2 q.c is good to this share of |q|^2 + |c|^2: two sums of d
    # products, a length, single roundings; taken twice
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
            # squares of others may be 0 or infinite
            lengths = torch.where((lengths > 1e-10) & (lengths < 1e15), lengths, torch.nan)
            products, lengths = products / lengths, lengths / lengths
        sizes = own_squares + lengths.square()
        upper = torch.sub((1 + doubt) * sizes, products, alpha=2)
        barred = excluded[:, None] == torch.arange(start, start + len(block))
        kth = (
            upper.masked_fill(barred, torch.inf).topk(k, largest=False).values[:, -1]
            if len(block) >= k
            else torch.tensor(torch.inf)
        )
        beyond = upper - 2 * doubt * sizes > torch.fmin(best[:, -1], kth)[:, None]
        near, row = torch.nonzero(~(beyond | barred), as_tuple=True)
        if len(row):
            exact = torch.cat(
                [
                    _squares(precise[q], block[r].double(), unit)
                    for q, r in zip(
                        torch.split(near, CHUNK // d), torch.split(row, CHUNK // d), strict=True
                    )
                ]
            )
            values, found = (
                torch.cat([best.flatten(), exact]),
                torch.cat([indices.flatten(), row + start]),
            )
            take = _best(-values, torch.cat([query, near]), found, n, k)
            best, indices = values[take], found[take]
    return (best / 2 if unit else best.sqrt()), indices


def _squares(queries: Tensor, candidates: Tensor, unit: bool) -> Tensor:
    """(n,) squared distances of row i and row i, float64; of their unit vectors where the
    candidates' are wanted.
    """
    return (
        (queries - (functional.normalize(candidates, dim=-1) if unit else candidates))
        .square()
        .sum(dim=1)
    )


def _best(value: Tensor, row: Tensor, column: Tensor, rows: int, k: int) -> Tensor:
    """(rows, k) places of each row's k largest values, largest first, equal ones by column; each
    row has k or more.
    """
    order = torch.from_numpy(np.lexsort((column.numpy(), -value.numpy(), row.numpy())))
    counts = torch.bincount(row, minlength=rows)
    return order[(torch.cumsum(counts, 0) - counts)[:, None] + torch.arange(k)]


class _Scorer:
    """Scores (higher is closer) of queries against candidates by matrix product, with a bound on
    their rounding, and exact float64 values on demand.

    Both metrics are one: the cosine distance is half the squared distance of the unit vectors.
    Vectors are centred first (no distance changes) and brought to a size of about 1, so that
    neither a common offset nor their unit costs accuracy. The score q.c - h, h = |c|^2 / 2 less its
    mean, orders candidates as the distance does; it is one product of (q, 1, 1) and (c, -h, -what
    rounding took from h).

    On CPUs that multiply bf16 in hardware the products are taken in bf16 first (several times
    faster), with the wider bound that this needs, until so many candidates fall inside it that
    float32 is faster. Rounding never reverses an order, so a bound on the unrounded score is
    rounded like a score.
    """

    def __init__(
        self, queries: Tensor, candidates: Tensor, metric: Metric, block: tuple[int, int]
    ) -> None:
        self.block = block
        # NaN where there is one
        extremes = [
            torch.stack(vectors.aminmax()) for vectors in (queries, candidates) if vectors.numel()
        ]
        if not all(torch.isfinite(pair).all() for pair in extremes):
            raise ValueError("vectors hold NaN or infinity: they have no ranks")
        self.unit = metric == "cosine"
        self.vectors, self.norms = (queries, candidates), (_norms(queries), _norms(candidates))
        size = (
            1.0
            if self.unit
            else max((float(pair.abs().max()) for pair in extremes), default=0.0) or 1.0
        )
        sample = self._precise(1, slice(None, None, -(-len(candidates) // BLOCK[0]) or None))
        # roughly: any centre serves that takes a common offset away
        self.centre, self.scale = sample.sum(dim=0) / max(1, len(sample)), 1 / size
        capabilities = torch.cpu.get_capabilities()
        self._prepare(
            torch.bfloat16
            if capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
            else torch.float32
        )

    def _prepare(self, dtype: torch.dtype) -> None:
        """Bring both sides into the form and precision that they are multiplied in."""
        pairs = min(
            self.block[0] * self.block[1], MOST_PAIRS, len(self.vectors[0]) * len(self.vectors[1])
        )
        self.dtype, self.buffer = dtype, torch.empty(pairs, dtype=dtype)
        (self.queries, lengths, lost), (self.candidates, others, others_lost) = (
            self._rounded(0),
            self._rounded(1),
        )
        self.half_squares, halves = lengths.square() / 2, others.square() / 2
        self.shift = halves.mean() if len(halves) else torch.zeros((), dtype=torch.float64)
        self.queries[:, -2:] = 1
        rest = self.shift - halves
        for column in (-2, -1):
            self.candidates[:, column] = rest
            rest = rest - self.candidates[:, column].double()
        longest, most_lost, rest = (
            x.max() if len(x) else torch.zeros(()) for x in (others, others_lost, rest.abs())
        )
        # what rounding the factors changes (Cauchy and Schwarz), float32 sums of d products and of
        # h, float64 rounding of unit vectors and lengths
        sums = (
            torch.finfo(torch.float32).eps
            * (self.queries.shape[1] + 8)
            * longest
            * (lengths + longest)
        )
        self.doubts = (
            lost * (longest + most_lost)
            + lengths * most_lost
            + rest
            + sums
            + 1e-12 * (lengths + longest) ** 2
            + 4e-15 * (lengths + longest)
            + 1e-35
        )

    def _rounded(self, which: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some queries (0) or candidates (1) without the centre, in the products' precision, in
        pieces that stay in the cache.

        Returns (n, d + 2 or more, the rest 0) vectors, (n,) float64 lengths before rounding and
        (n,) lengths of what rounding took away.
        """
        count, d = self.vectors[which].shape
        rounded = torch.zeros(count, -(-(d + 2) // 32) * 32, dtype=self.dtype)  # whole cache lines
        lengths, lost = torch.empty(2, count, dtype=torch.float64)
        for start in range(0, count, BLOCK[0]):
            rows = slice(start, start + BLOCK[0])
            piece = self._precise(which, rows).sub_(self.centre).mul_(self.scale)
            lengths[rows] = torch.linalg.vector_norm(piece, dim=1)
            rounded[rows, :d] = piece
            lost[rows] = torch.linalg.vector_norm(piece.sub_(rounded[rows, :d]), dim=1)
        return rounded, lengths, lost

    def _precise(self, which: int, rows: slice | Tensor) -> Tensor:
        """Some queries (0) or candidates (1) in float64, unit vectors for the cosine."""
        vectors = self.vectors[which][rows].to(torch.float64, copy=True)
        return vectors.div_(self.norms[which][rows, None]) if self.unit else vectors

    def row_blocks(self) -> Iterator[slice]:
        """Cuts of the queries."""
        step = max(1, min(self.block[0], MOST_PAIRS // max(1, len(self.candidates))))
        return (
            slice(start, min(start + step, len(self.queries)))
            for start in range(0, len(self.queries), step)
        )

    def column_blocks(self) -> Iterator[slice]:
        """Cuts of the candidates."""
        step, count = self.block[1], len(self.candidates)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """(columns, rows) scores of some candidates for some queries, rounded; overwritten by the
        next call.
        """
        shape = columns.stop - columns.start, rows.stop - rows.start
        with _plain_products():
            return torch.mm(
                self.candidates[columns],
                self.queries[rows].T,
                out=self.buffer[: shape[0] * shape[1]].view(shape),
            )

    def bounds(self, rows: slice, score: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) least and greatest rounded score that something of a query's true float64 score
        may get.
        """
        low, high = (
            (score - self.doubts[rows]).to(self.dtype),
            (score + self.doubts[rows]).to(self.dtype),
        )
        # the two zeros' bits differ
        return low.masked_fill_(low == 0, -0.0), high.masked_fill_(high == 0, 0.0)

    def surely(self, rows: slice, score: Tensor) -> Tensor:
        """(rows,) float64 that a true score is not below if it became this one."""
        return (
            score.double() - score.double().abs() * torch.finfo(self.dtype).eps - self.doubts[rows]
        )

    def as_score(self, rows: slice, exact: Tensor) -> Tensor:
        """The true score of something that is so far, as `exact` says, from each query."""
        return (
            self.half_squares[rows] + self.shift - exact * self.scale**2 / (1 if self.unit else 2)
        )

    def too_many(self, in_doubt: int, scored: int) -> bool:
        """Whether to score again in float32, and from now on, because bf16 left too much in doubt."""
        if self.dtype == torch.float32 or in_doubt * FEW <= scored:
            return False
        self._prepare(torch.float32)
        return True

    def exact(self, start: int, rows: int, row: Tensor, column: Tensor) -> Tensor:
        """(len(row),) float64: squared Euclidean distance or 1 - cosine of query start + row[j] and
        candidate column[j], 0 <= row < rows.
        """
        queries = self._precise(0, slice(start, start + rows))
        chunk = max(1, CHUNK // queries.shape[1])
        first, last = (int(column.min()), int(column.max()) + 1) if len(column) else (0, 0)
        if 8 * len(row) > rows * (last - first):  # gathering would cost more than all distances do
            candidates = self._precise(1, slice(first, last))
            squares = torch.cdist(
                queries, candidates, compute_mode="donot_use_mm_for_euclid_dist"
            ).square_()[row, column - first]
        else:
            pairs = zip(torch.split(row, chunk), torch.split(column, chunk), strict=True)
            squares = torch.cat(
                [
                    torch.linalg.vector_norm(queries[r].sub_(self._precise(1, c)), dim=1)
                    for r, c in pairs
                ]
            ).square_()
        return squares / 2 if self.unit else squares

    def tolerance(self, one: Tensor, other: Tensor) -> Tensor:
        """Differences of two `exact` values that are float64 rounding, not distance; unit vectors
        are rounded themselves.
        """
        return TIE * (one + other) + (1e-19 if self.unit else 0.0)

    def as_distance(self, exact: Tensor) -> Tensor:
        """What `exact` returned, as a distance."""
        return exact if self.unit else exact.sqrt()


def _norms(vectors: Tensor) -> Tensor:
    """(n,) float64 lengths, at least 1e-12 to divide by, in pieces that stay in the cache."""
    pieces = [
        torch.linalg.vector_norm(piece.double(), dim=1) for piece in torch.split(vectors, BLOCK[0])
    ]
    return torch.cat(pieces).clamp_min_(1e-12)


@contextlib.contextmanager
def _plain_products() -> Iterator[None]:
    """Float32 matrix products on the CPU in float32, whatever the caller has allowed."""
    mkldnn: Any = torch.backends.mkldnn  # untyped
    before, mkldnn.matmul.fp32_precision = mkldnn.matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before
