"""similarity.py against hand-computed numbers, exact rational arithmetic, torch's own losses and
scikit-learn's neighbours.

Ranks and neighbours are compared with exact references: float32 vectors are rational numbers, so
which of two candidates is closer has one true answer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from semcse import distances
from semcse.distances import distances, nearest, ranks
from semcse.types import Metric
from settings import Loss
from train_embedding_model import contrastive_loss, spread

METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
LOSSES: tuple[Loss, ...] = ("triplet", "infonce")
each_metric = pytest.mark.parametrize("metric", METRICS)
each_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, always the same for a seed."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def plain_distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """The textbook formulas in float64."""
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 - (a @ b.T) / (a.square().sum(dim=1)[:, None] * b.square().sum(dim=1)[None]).sqrt()


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
def test_distances_are_symmetric_never_negative_and_exactly_zero_only_between_equal_rows(
    metric: Metric, offset: float
) -> None:
    unlike = draw(100, 64) + offset
    found = distances(torch.cat([unlike, unlike]), torch.cat([unlike, unlike]), metric)
    assert torch.equal(found, found.T)
    assert found.min() == 0
    assert torch.equal(found == 0, torch.eye(100).repeat(2, 2) == 1)


@each_metric
def test_gradients_are_finite_between_equal_rows_and_zero_where_all_rows_are_equal(
    metric: Metric,
) -> None:
    rows = torch.cat([draw(2, 6), draw(2, 6), torch.zeros(2, 6)]).requires_grad_()
    (gradient,) = torch.autograd.grad(distances(rows, rows, metric).sum(), rows)
    assert torch.isfinite(gradient).all()
    assert gradient[:2].abs().max() > 0
    collapsed = draw(1, 6).repeat(4, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(distances(collapsed, collapsed, metric).sum(), collapsed)
    assert torch.equal(gradient, torch.zeros(4, 6))


# contrastive_loss

HALVING = 1 / math.log(2)  # a temperature at which exp(-distance / temperature) is 2 ** -distance


def test_losses_of_four_texts_on_a_line() -> None:
    anchors, positives = (
        torch.tensor([[0.0, 0.0], [3.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [7.0, 0.0]]),
    )
    # positives: 1 and 4 apart; negatives: a0-a1 3, a0-p1 7, p0-a1 2, p0-p1 6
    triplet = contrastive_loss(
        anchors, positives, "euclidean", "triplet", margin=2.5, temperature=9.0
    )
    # anchors a0, p0, a1, p1
    hinges = [1 - 3 + 2.5, 0, 1 - 2 + 2.5, 0, 4 - 3 + 2.5, 4 - 2 + 2.5, 0, 4 - 6 + 2.5]
    assert triplet.loss.item() == sum(hinges) / 8 == 1.3125
    assert (triplet.positive_distance, triplet.negative_distance, triplet.active_share) == (
        2.5,
        4.5,
        5 / 8,
    )
    info_nce = contrastive_loss(
        anchors, positives, "euclidean", "infonce", margin=9.0, temperature=HALVING
    )
    shares = [
        2**-1 / (2**-1 + 2**-3 + 2**-7),
        2**-1 / (2**-1 + 2**-2 + 2**-6),
        2**-4 / (2**-4 + 2**-3 + 2**-2),
        2**-4 / (2**-4 + 2**-7 + 2**-6),
    ]
    assert info_nce.loss.item() == pytest.approx(-sum(map(math.log, shares)) / 4, rel=1e-6)
    # only a1's partner is not its nearest text
    assert (info_nce.positive_distance, info_nce.negative_distance, info_nce.active_share) == (
        2.5,
        4.5,
        1 / 4,
    )


def test_losses_of_four_directions() -> None:
    anchors, positives = (
        torch.tensor([[2.0, 0.0], [-1.0, 0.0]]),
        torch.tensor([[0.0, 3.0], [5.0, 0.0]]),
    )
    # positives: 1 and 2 apart; negatives: a0-a1 2, a0-p1 0, p0-a1 1, p0-p1 1
    triplet = contrastive_loss(anchors, positives, "cosine", "triplet", margin=0.5, temperature=9.0)
    hinges = [
        0,
        1 - 0 + 0.5,
        1 - 1 + 0.5,
        1 - 1 + 0.5,
        2 - 2 + 0.5,
        2 - 1 + 0.5,
        2 - 0 + 0.5,
        2 - 1 + 0.5,
    ]
    assert triplet.loss.item() == pytest.approx(sum(hinges) / 8, rel=1e-6)
    assert sum(hinges) / 8 == 1.0625
    assert triplet.positive_distance == pytest.approx(1.5, rel=1e-6)
    assert triplet.negative_distance == pytest.approx(1.0, rel=1e-6)
    assert triplet.active_share == 7 / 8
    info_nce = contrastive_loss(
        anchors, positives, "cosine", "infonce", margin=9.0, temperature=HALVING
    )
    shares = [
        1 / 2 / (1 / 2 + 1 / 4 + 1),
        1 / 2 / (1 / 2 + 1 / 2 + 1 / 2),
        1 / 4 / (1 / 4 + 1 / 4 + 1 / 2),
        1 / 4 / (1 / 4 + 1 + 1 / 2),
    ]
    assert info_nce.loss.item() == pytest.approx(-sum(map(math.log, shares)) / 4, rel=1e-6)


@each_metric
@each_loss
def test_shuffled_positives_cost_much_more_than_true_ones(metric: Metric, loss: Loss) -> None:
    anchors = draw(16, 24)
    positives = anchors + 0.3 * draw(16, 24, seed=1)
    true = contrastive_loss(anchors, positives, metric, loss, margin=0.5, temperature=0.5)
    shuffled = contrastive_loss(
        anchors, positives.roll(1, dims=0), metric, loss, margin=0.5, temperature=0.5
    )
    assert shuffled.loss.item() > true.loss.item() + 0.3
    assert shuffled.active_share > true.active_share + 0.3
    assert true.positive_distance < true.negative_distance
    assert shuffled.positive_distance > true.positive_distance


@each_metric
@each_loss
def test_gradients_are_those_of_finite_differences(metric: Metric, loss: Loss) -> None:
    anchors, positives = (
        draw(4, 3, dtype=torch.float64).requires_grad_(),
        draw(4, 3, seed=1, dtype=torch.float64).requires_grad_(),
    )

    def value(a: Tensor, p: Tensor) -> Tensor:
        return contrastive_loss(a, p, metric, loss, margin=0.4, temperature=0.3).loss

    assert torch.autograd.gradcheck(value, (anchors, positives))


def expanded_triples(n: int) -> tuple[list[int], list[int], list[int]]:
    """Places of anchor, positive and negative among the 2n texts [anchors, positives]: both texts
    of a pair as anchor, every other paper's as negative.
    """
    triples = [
        (a, a + n if a < n else a - n, other)
        for a in range(2 * n)
        for other in range(2 * n)
        if other % n != a % n
    ]
    return (
        [a for a, _, _ in triples],
        [p for _, p, _ in triples],
        [other for _, _, other in triples],
    )


@each_metric
@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_loss_is_torchs_on_the_expanded_triples(metric: Metric, margin: float) -> None:
    n = 5
    texts = draw(2 * n, 4, dtype=torch.float64).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, "triplet", margin, temperature=9.0)
    (found_gradient,) = torch.autograd.grad(found.loss, texts)
    anchor, positive, negative = (texts[places] for places in expanded_triples(n))
    assert len(anchor) == 2 * n * 2 * (n - 1)

    def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(x, y)

    if metric == "euclidean":
        expected = functional.triplet_margin_loss(
            anchor, positive, negative, margin=margin, eps=0.0
        )
    else:
        expected = functional.triplet_margin_with_distance_loss(
            anchor, positive, negative, distance_function=cosine_distance, margin=margin
        )
    (expected_gradient,) = torch.autograd.grad(expected, texts)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)
    assert 0 < found.active_share < 1  # both sides of the hinge are met


@each_metric
@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1.0])
def test_info_nce_is_cross_entropy_over_the_positive_and_the_negatives(
    metric: Metric, temperature: float
) -> None:
    n = 5
    texts = draw(2 * n, 4, dtype=torch.float64).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, "infonce", 9.0, temperature)
    (found_gradient,) = torch.autograd.grad(found.loss, texts)
    terms, not_nearest = [], 0
    for a in range(2 * n):
        # the positive is class 0
        others = [(a + n) % (2 * n)] + [other for other in range(2 * n) if other % n != a % n]
        away = (texts[a] - texts[others]).square().sum(dim=1).sqrt()
        closeness = (
            functional.cosine_similarity(texts[a : a + 1], texts[others])
            if metric == "cosine"
            else -away
        )
        terms.append(functional.cross_entropy(closeness[None] / temperature, torch.tensor([0])))
        not_nearest += int(closeness.argmax().item() != 0)
    expected = torch.stack(terms).mean()
    (expected_gradient,) = torch.autograd.grad(expected, texts)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)
    assert found.active_share == pytest.approx(not_nearest / (2 * n))


@each_metric
@each_loss
def test_a_collapsed_batch_costs_the_margin_or_the_log_of_its_choices_and_has_finite_gradients(
    metric: Metric, loss: Loss
) -> None:
    n = 6
    texts = draw(1, 8).repeat(2 * n, 1).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, loss, margin=0.25, temperature=0.07)
    assert found.loss.item() == (
        0.25 if loss == "triplet" else pytest.approx(math.log(2 * n - 1), rel=1e-6)
    )
    assert (found.positive_distance, found.negative_distance, found.active_share) == (0, 0, 1)
    (gradient,) = torch.autograd.grad(found.loss, texts)
    assert torch.isfinite(gradient).all()


# spread


def test_spread_of_collapsed_orthogonal_and_opposite_vectors() -> None:
    assert spread(torch.tensor([[1.0, -2.0, 4.0]]).repeat(8, 1)) == 0
    assert spread(torch.zeros(4, 3)) == 0
    assert spread(draw(1, 50).repeat(30, 1)) < 1e-6
    # mean (1/5, ...): squared distance 1 - 1/5 of squared length 1
    assert spread(7 * torch.eye(5)) == pytest.approx(math.sqrt(1 - 1 / 5))
    assert spread(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])) == 1
    # mean 2: (1 + 1) / 2 over (1 + 9) / 2
    assert spread(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(math.sqrt(1 / 5))


# ranks and nearest: the exact answer


def exact_keys(queries: Tensor, candidates: Tensor, metric: Metric) -> list[list[Fraction]]:
    """Keys that order the candidates of each query exactly as their distance does (n x m rational
    numbers, smaller is closer).

    Euclidean: the squared distance. Cosine: -cos * |cos|, which has no root in it. A zero vector is
    what `distances` makes of it, half the squared distance of unit vectors: 0 from a zero vector
    and 1/2 (cos = 1/2) from any other.
    """
    rows, columns = (
        [[Fraction(number) for number in vector] for vector in vectors.tolist()]
        for vectors in (queries, candidates)
    )

    def key(q: list[Fraction], c: list[Fraction]) -> Fraction:
        if metric == "euclidean":
            return sum(((x - y) ** 2 for x, y in zip(q, c, strict=True)), Fraction(0))
        dot = sum((x * y for x, y in zip(q, c, strict=True)), Fraction(0))
        squares = [sum((x * x for x in v), Fraction(0)) for v in (q, c)]
        if 0 in squares:
            return Fraction(-1) if squares == [0, 0] else Fraction(-1, 4)
        return -dot * abs(dot) / (squares[0] * squares[1])

    return [[key(q, c) for c in columns] for q in rows]


def exact_ranks(keys: list[list[Fraction]], positives: list[int]) -> list[float]:
    """The definition: 1 + how many are strictly closer than the own candidate + half of the others
    that are equally close.
    """
    pairs = [(row, row[own]) for row, own in zip(keys, positives, strict=True)]
    return [
        1 + sum(key < mine for key in row) + (sum(key == mine for key in row) - 1) / 2
        for row, mine in pairs
    ]


@st.composite
def vector_sets(draw_one: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Queries and candidates picked with repetition from one pool of vectors: many equal ones,
    equal directions, zero vectors, small and large units.
    """
    d = draw_one(st.integers(1, 5))
    kind = draw_one(st.sampled_from(["grid", "normal", "offset"]))
    rng = np.random.default_rng(draw_one(st.integers(0, 2**32 - 1)))
    pool = (
        rng.integers(-2, 3, (6, d))
        if kind == "grid"
        else rng.standard_normal((6, d)) * (0.01 if kind == "offset" else 1)
        + (100 if kind == "offset" else 0)
    )
    vectors = torch.from_numpy(pool * 2.0 ** draw_one(st.sampled_from([-30, 0, 30]))).float()
    if draw_one(st.booleans()):
        vectors[0] = 0
    queries, candidates = (
        draw_one(st.lists(st.integers(0, 5), min_size=least, max_size=9)) for least in (1, 2)
    )
    return vectors[queries], vectors[candidates]


@contextlib.contextmanager
def blocks(
    rows: int, columns: int, bf16: bool | None = None, few: int = distances.FEW
) -> Iterator[None]:
    """Blocks of another size; products first in bf16 or not, whatever the hardware; at most one in
    `few` scores left in doubt by it, 0: any number.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK", (rows, columns))
        patch.setattr(similarity, "WIDE_BLOCK", (rows, columns))
        patch.setattr(similarity, "FEW", few)
        if bf16 is not None:
            patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bf16})
        yield


ANY_BLOCKS = st.tuples(
    st.sampled_from([1, 3, 256]),
    st.sampled_from([1, 4, 4096]),
    st.booleans(),
    st.sampled_from([0, 2, 512]),
)


@settings(deadline=None, max_examples=250)
@given(st.data(), st.sampled_from(METRICS))
def test_ranks_are_exact(data: st.DataObject, metric: Metric) -> None:
    queries, candidates = data.draw(vector_sets())
    positives = data.draw(
        st.lists(st.integers(0, len(candidates) - 1), min_size=len(queries), max_size=len(queries))
    )
    with blocks(*data.draw(ANY_BLOCKS)):
        found = ranks(queries, candidates, metric, torch.tensor(positives))
    assert found.dtype == torch.float64
    assert found.tolist() == exact_ranks(exact_keys(queries, candidates, metric), positives)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(METRICS))
def test_nearest_are_exact(data: st.DataObject, metric: Metric) -> None:
    queries, candidates = data.draw(vector_sets())
    excluded = data.draw(
        st.none()
        | st.lists(
            st.integers(0, len(candidates) - 1), min_size=len(queries), max_size=len(queries)
        )
    )
    k = data.draw(st.integers(1, len(candidates) - (excluded is not None)))
    group = data.draw(st.sampled_from([1, 2, 16]))
    with (
        blocks(*data.draw(ANY_BLOCKS)),
        mock.patch.object(
            similarity, "_group_size", lambda candidates, k: math.gcd(candidates, group)
        ),
    ):
        _, found = nearest(
            queries, candidates, k, metric, None if excluded is None else torch.tensor(excluded)
        )
    for i, keys in enumerate(exact_keys(queries, candidates, metric)):
        allowed = [c for c in range(len(candidates)) if excluded is None or c != excluded[i]]
        # sorted is stable: equal distances stay in index order
        expected = sorted(allowed, key=lambda c: keys[c])[:k]
        mine = found[i].tolist()
        assert len(set(mine)) == k
        assert set(mine) <= set(allowed)
        if metric == "euclidean":
            assert mine == expected
        # (1, 1) and (3, 3) have equal distances but unequal roundings, so equal vectors alone are
        # sure to stand in index order
        else:
            assert [keys[c] for c in mine] == [keys[c] for c in expected]
            assert all(
                a < b
                for a, b in itertools.pairwise(mine)
                if torch.equal(candidates[a], candidates[b])
            )


HARD: dict[str, Callable[[], Tensor]] = {
    # A tolerance for ties that grows with the vectors' length instead of their distance calls all
    # of these equal.
    "large common offset": lambda: 1e4 + 0.01 * draw(60, 8),
    "nearly collapsed": lambda: draw(1, 96, seed=5) + 1e-5 * draw(60, 96),
    # Squares of these leave the range of float32.
    "huge unit": lambda: 1e20 * draw(60, 8),
    "tiny unit": lambda: 1e-22 * draw(60, 8),
    # The cosine distance of a zero vector has to be the same number in every step.
    "zero vectors": lambda: draw(60, 8) * (torch.arange(60) % 7 != 0)[:, None],
    "one long vector among short ones": lambda: torch.cat([1e6 * draw(1, 8), draw(59, 8, seed=1)]),
    "duplicates far from the origin": lambda: (3e3 + draw(20, 8)).repeat(3, 1),
}


# torch's normalize leaves vectors shorter than 1e-12 short: they have no direction
@pytest.mark.parametrize(
    "metric, name",
    [
        (metric, name)
        for metric in METRICS
        for name in HARD
        if (metric, name) != ("cosine", "tiny unit")
    ],
)
def test_ranks_and_neighbours_are_exact_where_float32_is_not(metric: Metric, name: str) -> None:
    candidates = HARD[name]()
    queries, own = (
        (0.7 * candidates + 0.3 * candidates.roll(7, dims=0))[:12],
        [(7 * i) % 60 for i in range(12)],
    )
    keys = exact_keys(queries, candidates, metric)
    assert ranks(queries, candidates, metric, torch.tensor(own)).tolist() == exact_ranks(keys, own)
    _, found = nearest(queries, candidates, 5, metric)
    assert found.tolist() == [sorted(range(len(row)), key=row.__getitem__)[:5] for row in keys]


# ranks


def test_ranks_by_hand() -> None:
    places = torch.tensor([[1.0], [-2.0], [2.0], [5.0], [2.0]])
    # from 0 the distances are 1 2 2 5 2, from 4 they are 3 6 2 1 2
    assert ranks(torch.zeros(5, 1), places, "euclidean").tolist() == [1, 3, 3, 5, 3]
    assert ranks(torch.full((5, 1), 4.0), places, "euclidean").tolist() == [4, 5, 2.5, 1, 2.5]
    assert ranks(
        torch.tensor([[4.0], [0.0], [0.0]]), places, "euclidean", positives=torch.tensor([2, 4, 0])
    ).tolist() == [2.5, 3, 1]
    directions = torch.tensor(
        [[2.0, 0.0], [0.0, 1.0], [0.0, -5.0], [-1.0, 0.0], [3.0, 3.0], [0.7, 0.7]]
    )
    # from (1, 0) the cosine distances are 0 1 1 2 0.29 0.29: length plays no part
    assert ranks(torch.tensor([[1.0, 0.0]]).repeat(6, 1), directions, "cosine").tolist() == [
        1,
        4.5,
        4.5,
        6,
        2.5,
        2.5,
    ]


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
    direction, lengths = (
        torch.arange(1.0, 51.0),
        torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0, 11.0, 13.0, 1000.0])[:, None],
    )
    assert ranks(lengths * direction, lengths.flip(0) * direction, "cosine").tolist() == [4.5] * 8
    assert ranks(lengths * direction, lengths * direction, "euclidean").tolist() == [1] * 8


@each_metric
@pytest.mark.parametrize("offset, noise", [(0.0, 1.0), (10.0, 1.0), (1e3, 1.0), (1e4, 0.1)])
def test_a_candidate_never_outranks_itself(metric: Metric, offset: float, noise: float) -> None:
    vectors = offset + noise * draw(400, 48, seed=3)
    # the query is its own candidate: nothing is as close, and the candidate itself, however its
    # score is rounded, does not count
    assert ranks(vectors, vectors, metric).tolist() == [1] * 400
    twice = vectors.repeat(2, 1)
    assert ranks(twice, twice, metric).tolist() == [1.5] * 800


@each_metric
def test_ranks_do_not_depend_on_the_blocks(metric: Metric) -> None:
    candidates = draw(17, 5).repeat_interleave(2, dim=0)[:31]
    queries, positives = draw(23, 5, seed=1), torch.arange(23) % 31
    whole = ranks(queries, candidates, metric, positives)
    assert (whole % 1 == 0.5).any()
    expected = nearest(queries, candidates, 4, metric, positives)
    for rows, columns in ((1, 1), (1, 31), (5, 7), (22, 30), (23, 2), (100, 100)):
        for bf16, few in ((False, 0), (True, 0), (True, 1), (True, 512)):
            with blocks(rows, columns, bf16, few):
                assert torch.equal(ranks(queries, candidates, metric, positives), whole)
                for one, other in zip(
                    nearest(queries, candidates, 4, metric, positives), expected, strict=True
                ):
                    assert torch.equal(one, other)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that one tensor held while this was active, views counted by what they look
    at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def test_memory_is_that_of_a_block_not_of_all_pairs() -> None:
    n, m, d = 2_000, 20_000, 8
    candidates = draw(m, d)
    queries, positives = candidates[::10] + 0.1 * draw(n, d, seed=1), torch.arange(0, m, 10)
    with LargestTensor() as largest, blocks(64, 2_000):
        found = ranks(queries, candidates, "euclidean", positives)
    # it did work in blocks of this size; the float64 vectors are larger, all pairs 100 times as
    # large
    assert 4 * 64 * 2_000 <= largest.bytes <= 8 * m * d
    gaps = plain_distances(queries[::50], candidates, "euclidean")
    assert torch.equal(
        found[::50], 1 + (gaps < gaps.gather(1, positives[::50, None])).sum(dim=1).double()
    )


@each_metric
def test_memory_of_a_collapsed_model_is_bounded_too(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d, pairs = 500, 16, 2**13
    monkeypatch.setattr(similarity, "MOST_PAIRS", pairs)
    collapsed = draw(1, d).repeat(n, 1)
    with LargestTensor() as largest:
        assert ranks(collapsed, collapsed, metric).eq((n + 1) / 2).all()
        assert nearest(collapsed, collapsed, 3, metric, torch.arange(n))[1][:2].tolist() == [
            [1, 2, 3],
            [0, 2, 3],
        ]
    assert largest.bytes <= 16 * pairs < 4 * n * n


@each_metric
@pytest.mark.parametrize("bf16", [True, False])
def test_large_sets_agree_with_brute_force(metric: Metric, bf16: bool) -> None:
    """Several blocks of both kinds at their real sizes, near and far positives, dense clusters that
    bf16 cannot tell apart.
    """
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(40, 32, generator=generator)
    candidates = centres[torch.randint(40, (9_000,), generator=generator)] + 0.05 * torch.randn(
        9_000, 32, generator=generator
    )
    candidates[4_500:] = torch.randn(4_500, 32, generator=generator)
    positives = torch.randint(9_000, (300,), generator=generator)
    queries = (
        candidates[positives]
        + torch.randn(300, 32, generator=generator)
        * torch.tensor([0.01, 0.1, 1.0]).repeat(100)[:, None]
    )
    gaps = plain_distances(queries.double(), candidates.double(), metric)
    for few in (0, 512):
        with blocks(256, 4096, bf16, few):
            assert torch.equal(
                ranks(queries, candidates, metric, positives),
                1 + (gaps < gaps.gather(1, positives[:, None])).sum(dim=1).double(),
            )
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


# nearest


def test_nearest_by_hand() -> None:
    places = torch.tensor([[0.0], [3.0], [1.0], [-1.0], [0.0]])
    found_distances, found = nearest(
        torch.tensor([[0.0], [0.0], [2.0]]),
        places,
        3,
        "euclidean",
        excluded=torch.tensor([0, 4, 3]),
    )
    assert found.tolist() == [[4, 2, 3], [0, 2, 3], [1, 2, 0]]
    assert found_distances.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 2]]
    directions = torch.tensor([[0.0, -3.0], [-1.0, 0.0], [6.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    found_distances, found = nearest(torch.tensor([[2.0, 0.0]]), directions, 5, "cosine")
    assert found.tolist() == [[2, 4, 0, 3, 1]]
    torch.testing.assert_close(
        found_distances, torch.tensor([[0, 0.4, 1, 1, 2]], dtype=torch.float64)
    )


@each_metric
def test_nearest_agree_with_scikit_learn(metric: Metric) -> None:
    candidates, queries = draw(300, 16) + 0.5, draw(40, 16, seed=1)
    peer = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(
        candidates.double().numpy()
    )
    for (found_distances, found), (peer_distances, peer_found) in (
        (nearest(queries, candidates, 10, metric), peer.kneighbors(queries.double().numpy())),
        # without queries: each point's, itself left out
        (
            nearest(candidates, candidates, 10, metric, excluded=torch.arange(300)),
            peer.kneighbors(),
        ),
    ):
        assert np.array_equal(found.numpy(), peer_found)
        np.testing.assert_allclose(found_distances.numpy(), peer_distances, rtol=1e-9, atol=1e-12)
