"""The contrastive losses against numbers computed by hand and against torch's losses, and the
measure of collapse.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from semcse.types import Metric
from settings import Loss
from train_embedding_model import contrastive_loss, relative_std

METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
LOSSES: tuple[Loss, ...] = ("triplet", "infonce")
each_metric = pytest.mark.parametrize("metric", METRICS)
each_loss = pytest.mark.parametrize("loss", LOSSES)

HALVING = 1 / math.log(2)  # with this temperature, exp(-distance / temperature) is 2 ** -distance


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same for every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def info_nce(*distances: tuple[float, ...]) -> float:
    """InfoNCE with temperature HALVING: per anchor the distance to the positive, then those to the
    negatives.
    """
    terms = [math.log2(sum(2.0**-d for d in row) / 2.0 ** -row[0]) for row in distances]
    return sum(terms) / len(terms) / HALVING


def test_losses_of_four_texts_on_a_line() -> None:
    anchors = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    positives = torch.tensor([[1.0, 0.0], [7.0, 0.0]])
    # The positives are 1 and 4 apart. Negatives: a0-a1 3, a0-p1 7, p0-a1 2, p0-p1 6.
    found = contrastive_loss(anchors, positives, "euclidean", "triplet", 2.5, temperature=9)
    # The anchors are a0, p0, a1, p1.
    hinges = [1 - 3 + 2.5, 0, 1 - 2 + 2.5, 0, 4 - 3 + 2.5, 4 - 2 + 2.5, 0, 4 - 6 + 2.5]
    assert found.loss.item() == sum(hinges) / 8 == 1.3125
    assert (found.positive_distance, found.negative_distance) == (2.5, 4.5)
    assert found.active_share == 5 / 8
    found = contrastive_loss(anchors, positives, "euclidean", "infonce", 9, temperature=HALVING)
    expected = info_nce((1, 3, 7), (1, 2, 6), (4, 3, 2), (4, 7, 6))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    assert (found.positive_distance, found.negative_distance) == (2.5, 4.5)
    assert found.active_share == 1 / 4  # only for a1 is the positive not the nearest text


def test_losses_of_four_directions() -> None:
    anchors = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    positives = torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    # The positives are 1 and 2 apart. Negatives: a0-a1 2, a0-p1 0, p0-a1 1, p0-p1 1.
    found = contrastive_loss(anchors, positives, "cosine", "triplet", 0.5, temperature=9)
    hinges = [0, 1 - 0 + 0.5, 0.5, 0.5, 0.5, 2 - 1 + 0.5, 2 - 0 + 0.5, 2 - 1 + 0.5]
    assert found.loss.item() == pytest.approx(sum(hinges) / 8, rel=1e-6)
    assert found.positive_distance == pytest.approx(1.5, rel=1e-6)
    assert found.negative_distance == pytest.approx(1.0, rel=1e-6)
    assert found.active_share == 7 / 8
    found = contrastive_loss(anchors, positives, "cosine", "infonce", 9, temperature=HALVING)
    expected = info_nce((1, 2, 0), (1, 1, 1), (2, 2, 1), (2, 0, 1))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)


@each_metric
@each_loss
def test_shuffled_positives_cost_much_more_than_true_ones(metric: Metric, loss: Loss) -> None:
    anchors = draw(16, 24)
    positives = anchors + 0.3 * draw(16, 24, seed=1)
    true, shuffled = (
        contrastive_loss(anchors, rows, metric, loss, margin=0.5, temperature=0.5)
        for rows in (positives, positives.roll(1, dims=0))
    )
    assert shuffled.loss.item() > true.loss.item() + 0.3
    assert shuffled.active_share > true.active_share + 0.3
    assert true.positive_distance < true.negative_distance
    assert shuffled.positive_distance > true.positive_distance


@each_metric
@each_loss
def test_gradients_equal_finite_differences(metric: Metric, loss: Loss) -> None:
    def value(a: Tensor, p: Tensor) -> Tensor:
        return contrastive_loss(a, p, metric, loss, margin=0.4, temperature=0.3).loss

    texts = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(value, texts)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(x, y)


@each_metric
@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_loss_equals_torchs_on_all_triples(metric: Metric, margin: float) -> None:
    """Both texts of a pair are anchors, and every text of another paper is a negative."""
    n = 5
    texts = draw(2 * n, 4).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, "triplet", margin, temperature=9.0)
    pairs = [(a, other) for a in range(2 * n) for other in range(2 * n) if (other - a) % n]
    anchor, negative = (texts[list(places)] for places in zip(*pairs, strict=True))
    positive = texts[[(a + n) % (2 * n) for a, _ in pairs]]
    expected = functional.triplet_margin_with_distance_loss(
        anchor,
        positive,
        negative,
        distance_function=cosine_distance if metric == "cosine" else torch.pairwise_distance,
        margin=margin,
    )
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, texts)[0] for loss in (found.loss, expected)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert 0 < found.active_share < 1  # some hinges are zero and some are not


@each_metric
@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1.0])
def test_info_nce_is_cross_entropy_over_the_positive_and_the_negatives(
    metric: Metric, temperature: float
) -> None:
    n = 5
    texts = draw(2 * n, 4).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, "infonce", 9.0, temperature)
    terms, not_nearest = [], 0
    for a in range(2 * n):
        # The positive comes first: it is class 0.
        others = [(a + n) % (2 * n)] + [other for other in range(2 * n) if (other - a) % n]
        if metric == "cosine":
            closeness = functional.cosine_similarity(texts[a : a + 1], texts[others])
        else:
            closeness = -(texts[a] - texts[others]).square().sum(dim=1).sqrt()
        terms.append(functional.cross_entropy(closeness[None] / temperature, torch.tensor([0])))
        not_nearest += int(closeness.argmax().item() != 0)
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, texts)[0] for loss in (found.loss, expected))
    )
    assert found.active_share == pytest.approx(not_nearest / (2 * n))


@each_metric
@each_loss
def test_a_collapsed_batch_has_a_known_loss_and_finite_gradients(
    metric: Metric, loss: Loss
) -> None:
    n = 6
    texts = draw(1, 8).repeat(2 * n, 1).requires_grad_()
    found = contrastive_loss(texts[:n], texts[n:], metric, loss, margin=0.25, temperature=0.07)
    expected = 0.25 if loss == "triplet" else math.log(2 * n - 1)
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    assert (found.positive_distance, found.negative_distance, found.active_share) == (0, 0, 1)
    (gradient,) = torch.autograd.grad(found.loss, texts)
    assert torch.isfinite(gradient).all()


def test_relative_std_of_collapsed_orthogonal_and_opposite_vectors() -> None:
    assert relative_std(torch.tensor([[1.0, -2.0, 4.0]]).repeat(8, 1)) == 0
    assert relative_std(torch.zeros(4, 3)) == 0
    assert relative_std(draw(1, 50).repeat(30, 1)) < 1e-6
    # The mean is (1/5, ...): the mean squared distance to it is 1 - 1/5, the mean square length 1.
    assert relative_std(7 * torch.eye(5)) == pytest.approx(math.sqrt(1 - 1 / 5))
    assert relative_std(torch.tensor([[3.0, 4.0], [-3.0, -4.0]])) == 1
    # The mean is 2: (1 + 1) / 2 over (1 + 9) / 2.
    assert relative_std(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(math.sqrt(1 / 5))
