"""Distances, ranks and neighbours against numbers computed by hand, rational arithmetic, brute
force and scikit-learn.

Float32 vectors are rational numbers, so there is one true answer to which of two candidates is
closer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import semcse.distances
from semcse.distances import distances, nearest, ranks
from semcse.types import Metric

METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
each_metric = pytest.mark.parametrize("metric", METRICS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same for every call with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """The textbook formulas in float64."""
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 - (a @ b.T) / (a.square().sum(dim=1)[:, None] * b.square().sum(dim=1)[None]).sqrt()


def use_blocks(patch: pytest.MonkeyPatch, queries: int, candidates: int) -> None:
    """Compute in blocks of this size, so that few vectors make many blocks."""
    patch.setattr(semcse.distances, "QUERY_BLOCK", queries)
    patch.setattr(semcse.distances, "CANDIDATE_BLOCK", candidates)


# distances


@each_metric
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_distances_are_the_textbook_formulas(
    metric: Metric, dtype: torch.dtype, error: float
) -> None:
    a, b = 3 * draw(9, 16, seed=1, dtype=dtype), draw(5, 16, seed=2, dtype=dtype)
    b[0] = -2 * a[0]  # cosine distance 2, the largest there is
    torch.testing.assert_close(
        distances(a, b, metric).double(), plain_distances(a, b, metric), rtol=error, atol=error
    )


@each_metric
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distances_are_symmetric_and_zero_only_between_equal_rows(
    metric: Metric, offset: float
) -> None:
    rows = (draw(100, 64) + offset).repeat(2, 1)
    found = distances(rows, rows, metric)
    assert torch.equal(found, found.T)
    assert found.min() == 0
    assert torch.equal(found == 0, torch.eye(100).repeat(2, 2) == 1)


@each_metric
def test_gradients_are_finite_between_equal_rows(metric: Metric) -> None:
    rows = torch.cat([draw(2, 6), draw(2, 6), torch.zeros(2, 6)]).requires_grad_()
    (gradient,) = torch.autograd.grad(distances(rows, rows, metric).sum(), rows)
    assert torch.isfinite(gradient).all()
    assert gradient[:2].abs().max() > 0
    collapsed = draw(1, 6).repeat(4, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(distances(collapsed, collapsed, metric).sum(), collapsed)
    assert torch.equal(gradient, torch.zeros(4, 6))


# ranks and nearest: the exact answer


def exact_keys(queries: Tensor, candidates: Tensor, metric: Metric) -> list[list[Fraction]]:
    """n x m rational numbers that order the candidates of each query as their distance does.

    Euclidean: the squared distance. Cosine: -cos * |cos|, which needs no square root. `distances`
    treats a zero vector as half the squared distance of unit vectors: 0 from a zero vector and 1/2
    (cos = 1/2) from any other.
    """

    def key(q: list[Fraction], c: list[Fraction]) -> Fraction:
        if metric == "euclidean":
            return sum(((x - y) ** 2 for x, y in zip(q, c, strict=True)), Fraction(0))
        dot = sum((x * y for x, y in zip(q, c, strict=True)), Fraction(0))
        squares = [sum((x * x for x in v), Fraction(0)) for v in (q, c)]
        if 0 in squares:
            return Fraction(-1) if squares == [0, 0] else Fraction(-1, 4)
        return -dot * abs(dot) / (squares[0] * squares[1])

    rows, columns = (
        [[Fraction(number) for number in vector] for vector in vectors.tolist()]
        for vectors in (queries, candidates)
    )
    return [[key(q, c) for c in columns] for q in rows]


def exact_ranks(keys: list[list[Fraction]], positives: list[int]) -> list[float]:
    """1 + the number of strictly closer candidates + half of the others that are equally close."""
    return [
        1 + sum(key < row[positive] for key in row) + (row.count(row[positive]) - 1) / 2
        for row, positive in zip(keys, positives, strict=True)
    ]


@st.composite
def vector_sets(draw_one: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Queries and candidates, picked with repetition from six vectors: many equal vectors and equal
    directions, zero vectors, small and large units.
    """
    d = draw_one(st.integers(1, 5))
    kind = draw_one(st.sampled_from(["grid", "normal", "offset"]))
    rng = np.random.default_rng(draw_one(st.integers(0, 2**32 - 1)))
    pool = {
        "grid": rng.integers(-2, 3, (6, d)),
        "normal": rng.standard_normal((6, d)),
        "offset": 100 + 0.01 * rng.standard_normal((6, d)),
    }[kind]
    vectors = torch.from_numpy(pool * 2.0 ** draw_one(st.sampled_from([-30, 0, 30]))).float()
    if draw_one(st.booleans()):
        vectors[0] = 0
    queries = draw_one(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    candidates = draw_one(st.lists(st.integers(0, 5), min_size=2, max_size=9))
    return vectors[queries], vectors[candidates]


BLOCKS = st.tuples(st.sampled_from([1, 3, 64]), st.sampled_from([1, 4, 4096]))


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(METRICS), BLOCKS)
def test_ranks_are_exact(data: st.DataObject, metric: Metric, block: tuple[int, int]) -> None:
    queries, candidates = data.draw(vector_sets())
    place = st.integers(0, len(candidates) - 1)
    positives = data.draw(st.lists(place, min_size=len(queries), max_size=len(queries)))
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, *block)
        found = ranks(queries, candidates, metric, torch.tensor(positives))
    assert found.dtype == torch.float64
    assert found.tolist() == exact_ranks(exact_keys(queries, candidates, metric), positives)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(METRICS), BLOCKS)
def test_nearest_are_exact(data: st.DataObject, metric: Metric, block: tuple[int, int]) -> None:
    queries, candidates = data.draw(vector_sets())
    place = st.integers(-1, len(candidates) - 1)
    excluded = data.draw(st.lists(place, min_size=len(queries), max_size=len(queries)))
    k = data.draw(st.integers(1, len(candidates) + 1))
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, *block)
        found_distances, found = nearest(queries, candidates, k, metric, torch.tensor(excluded))
    for i, keys in enumerate(exact_keys(queries, candidates, metric)):
        allowed = [c for c in range(len(candidates)) if c != excluded[i]]
        # `sorted` is stable: candidates at equal distances stay in the order of their index.
        expected = sorted(allowed, key=lambda c: keys[c])[:k]
        mine = found[i].tolist()
        missing = k - len(expected)
        assert mine[len(expected) :] == [-1] * missing
        assert found_distances[i, len(expected) :].tolist() == [math.inf] * missing
        mine = mine[: len(expected)]
        if metric == "euclidean":
            assert mine == expected
        else:
            # The directions (1, 1) and (3, 3) are equal but are rounded differently, so only equal
            # vectors are certain to be in the order of their index.
            assert set(mine) <= set(allowed)
            assert [keys[c] for c in mine] == [keys[c] for c in expected]
            for a, b in itertools.pairwise(mine):
                assert a < b or not torch.equal(candidates[a], candidates[b])


HARD: dict[str, Callable[[], Tensor]] = {
    "ordinary": lambda: draw(60, 8),
    # A tie tolerance relative to the length of the vectors would call all of these equal.
    "large common offset": lambda: 1e4 + 0.01 * draw(60, 8),
    "nearly collapsed": lambda: draw(1, 96, seed=5) + 1e-5 * draw(60, 96),
    # The squares of these are outside the range of float32.
    "huge unit": lambda: 1e20 * draw(60, 8),
    "tiny unit": lambda: 1e-22 * draw(60, 8),
    "zero vectors": lambda: draw(60, 8) * (torch.arange(60) % 7 != 0)[:, None],
    "one long vector": lambda: torch.cat([1e6 * draw(1, 8), draw(59, 8, seed=1)]),
    "duplicates far from the origin": lambda: (3e3 + draw(20, 8)).repeat(3, 1),
    "each block brings nearer vectors": lambda: draw(60, 8) * torch.linspace(50, 1, 60)[:, None],
}
# torch's normalize does not scale vectors shorter than 1e-12: they have no direction.
NO_DIRECTION = {("cosine", "tiny unit")}


@pytest.mark.parametrize(
    "metric, name", [case for case in itertools.product(METRICS, HARD) if case not in NO_DIRECTION]
)
def test_ranks_and_neighbours_are_exact_where_float32_is_not(
    metric: Metric, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 5, 13)
    candidates = HARD[name]()
    queries = (0.7 * candidates + 0.3 * candidates.roll(7, dims=0))[:12]
    positives = [(7 * i) % 60 for i in range(12)]
    keys = exact_keys(queries, candidates, metric)
    found_ranks = ranks(queries, candidates, metric, torch.tensor(positives))
    assert found_ranks.tolist() == exact_ranks(keys, positives)
    found_distances, found = nearest(queries, candidates, 5, metric)
    assert found.tolist() == [sorted(range(len(row)), key=row.__getitem__)[:5] for row in keys]
    if metric == "euclidean":
        expected = [[math.sqrt(key) for key in sorted(row)[:5]] for row in keys]
        np.testing.assert_allclose(found_distances.numpy(), expected, rtol=1e-14)


@each_metric
def test_large_sets_agree_with_brute_force(metric: Metric) -> None:
    """Several blocks of the real size, near and far positives, and dense clusters."""
    candidates = draw(40, 32)[torch.arange(9_000) * 7 % 40] + 0.05 * draw(9_000, 32, seed=1)
    candidates[4_500:] = draw(4_500, 32, seed=2)
    positives = torch.arange(300) * 29
    noise = torch.tensor([0.01, 0.1, 1.0]).repeat(100)[:, None]
    queries = candidates[positives] + noise * draw(300, 32, seed=3)
    gaps = plain_distances(queries, candidates, metric)
    closer = (gaps < gaps.gather(1, positives[:, None])).sum(dim=1)
    assert torch.equal(ranks(queries, candidates, metric, positives), 1.0 + closer)
    assert torch.equal(
        nearest(queries, candidates, 10, metric)[1], gaps.topk(10, largest=False).indices
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_numbers_are_refused(bad: float) -> None:
    good, broken = draw(3, 2), draw(3, 2)
    broken[1, 1] = bad
    for queries, candidates in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            ranks(queries, candidates, "euclidean")
        with pytest.raises(ValueError, match="NaN or infinity"):
            nearest(queries, candidates, 1, "cosine")


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of the largest tensor that was made while it was active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@each_metric
@pytest.mark.parametrize("collapsed", [False, True])
def test_memory_does_not_grow_with_the_number_of_pairs(
    metric: Metric, collapsed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 16, 64)
    n = 500
    vectors = draw(1, 8).expand(n, -1).clone() if collapsed else draw(n, 8)
    with LargestTensor() as largest:
        ranks(vectors, vectors, metric)
        nearest(vectors, vectors, 3, metric, torch.arange(n))
    assert largest.bytes <= max(8 * n * 8, 2 * 8 * 16 * 64) < 8 * n * n / 50


# ranks


def test_ranks_by_hand() -> None:
    places = torch.tensor([[1.0], [-2.0], [2.0], [5.0], [2.0]])
    # From 0 the distances are 1 2 2 5 2, from 4 they are 3 6 2 1 2.
    assert ranks(torch.zeros(5, 1), places, "euclidean").tolist() == [1, 3, 3, 5, 3]
    assert ranks(torch.full((5, 1), 4.0), places, "euclidean").tolist() == [4, 5, 2.5, 1, 2.5]
    queries, positives = torch.tensor([[4.0], [0.0], [0.0]]), torch.tensor([2, 4, 0])
    assert ranks(queries, places, "euclidean", positives).tolist() == [2.5, 3, 1]
    directions = torch.tensor(
        [[2.0, 0.0], [0.0, 1.0], [0.0, -5.0], [-1.0, 0.0], [3.0, 3.0], [0.7, 0.7]]
    )
    # From (1, 0) the cosine distances are 0 1 1 2 0.29 0.29, whatever the lengths.
    found = ranks(torch.tensor([[1.0, 0.0]]).repeat(6, 1), directions, "cosine")
    assert found.tolist() == [1, 4.5, 4.5, 6, 2.5, 2.5]


@each_metric
@pytest.mark.parametrize(
    "vector",
    [torch.ones(4), torch.zeros(4), draw(300), 1e4 * draw(300), 1e-3 * draw(5)],
    ids=["ones", "zeros", "normal", "long", "short"],
)
def test_a_collapsed_model_ranks_in_the_middle(metric: Metric, vector: Tensor) -> None:
    collapsed = vector.repeat(8, 1)
    assert ranks(collapsed, collapsed, metric).tolist() == [4.5] * 8
    assert ranks(-collapsed, collapsed, metric).tolist() == [4.5] * 8


def test_equal_directions_are_a_collapse_for_the_cosine() -> None:
    lengths = torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0, 11.0, 13.0, 1000.0])[:, None]
    vectors = lengths * torch.arange(1.0, 51.0)
    assert ranks(vectors.flip(0), vectors, "cosine").tolist() == [4.5] * 8
    assert ranks(vectors, vectors, "euclidean").tolist() == [1] * 8


@each_metric
@pytest.mark.parametrize("offset, noise", [(0.0, 1.0), (10.0, 1.0), (1e3, 1.0), (1e4, 0.1)])
def test_a_candidate_never_outranks_itself(metric: Metric, offset: float, noise: float) -> None:
    """However the distance between a query and an equal candidate is rounded."""
    vectors = offset + noise * draw(400, 48, seed=3)
    assert ranks(vectors, vectors, metric).tolist() == [1] * 400
    twice = vectors.repeat(2, 1)
    assert ranks(twice, twice, metric).tolist() == [1.5] * 800


# nearest


def test_nearest_by_hand() -> None:
    places = torch.tensor([[0.0], [3.0], [1.0], [-1.0], [0.0]])
    queries, excluded = torch.tensor([[0.0], [0.0], [2.0]]), torch.tensor([0, 4, 3])
    found_distances, found = nearest(queries, places, 3, "euclidean", excluded)
    assert found.tolist() == [[4, 2, 3], [0, 2, 3], [1, 2, 0]]
    assert found_distances.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 2]]
    directions = torch.tensor([[0.0, -3.0], [-1.0, 0.0], [6.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    found_distances, found = nearest(torch.tensor([[2.0, 0.0]]), directions, 5, "cosine")
    assert found.tolist() == [[2, 4, 0, 3, 1]]
    np.testing.assert_allclose(found_distances, [[0, 0.4, 1, 1, 2]], atol=1e-15)


@each_metric
def test_nearest_agree_with_scikit_learn(metric: Metric) -> None:
    candidates, queries = draw(300, 16) + 0.5, draw(40, 16, seed=1)
    peer = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute")
    peer.fit(candidates.double().numpy())
    for (found_distances, found), (peer_distances, peer_found) in (
        (nearest(queries, candidates, 10, metric), peer.kneighbors(queries.double().numpy())),
        # Without queries: the neighbours of each candidate, without itself.
        (
            nearest(candidates, candidates, 10, metric, excluded=torch.arange(300)),
            peer.kneighbors(),
        ),
    ):
        assert np.array_equal(found.numpy(), peer_found)
        np.testing.assert_allclose(found_distances.numpy(), peer_distances, rtol=1e-9, atol=1e-12)
